"""Base models whose weights are kept in fewer bits."""
