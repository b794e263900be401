"""Write models and adapters for other programs."""
