"""The command line: one short file per command. It may import every package; no package imports it."""
