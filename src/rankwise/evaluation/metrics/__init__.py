"""Metrics of texts that are there already: no model, no torch."""
