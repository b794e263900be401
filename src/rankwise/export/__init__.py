"""What leaves the project for others: model cards."""

from rankwise.export.model_card import model_card

__all__ = ["model_card"]
