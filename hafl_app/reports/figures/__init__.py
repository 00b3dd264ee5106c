"""Figures of runs, all in one style: readable in gray, shares in percent."""
