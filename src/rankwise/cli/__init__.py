"""The command line: one short file per verb. Imports everything, imported by nothing."""
