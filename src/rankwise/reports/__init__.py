"""Plots and pages from the records of runs. Imports no torch."""

from rankwise.reports.loss_plot import loss_svg
from rankwise.reports.model_card import model_card

__all__ = ["loss_svg", "model_card"]
