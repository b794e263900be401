"""Plots and pages from the records of runs. Imports no torch."""

from rankwise.reports.loss_plot import loss_svg

__all__ = ["loss_svg"]
