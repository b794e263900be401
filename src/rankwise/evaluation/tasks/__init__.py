"""The tasks of ``rankwise evaluate``, one file each; ``registry.py`` finds them by name."""
