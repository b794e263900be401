"""Names that ``measure`` writes and others read. Imports nothing."""

PERPLEXITY = "perplexity"
FACTS_FILE = "measured.json"
