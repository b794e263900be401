"""The command line: one short file per verb. It may import every package; no package imports it."""
