"""Reports: run folders read as tables, statistics over seeds, figures, and pages of them."""
