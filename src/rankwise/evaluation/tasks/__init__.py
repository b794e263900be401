"""The tasks of ``rankwise evaluate``; ``evaluation/settings.py`` finds them by name."""
