"""Metrics of existing texts. They need no model and no torch."""
