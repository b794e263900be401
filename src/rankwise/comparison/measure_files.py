"""Names that ``measure`` writes and others read. Imports nothing."""

PERPLEXITY = "perplexity"
FACTS_FILE = "measured.json"
FOUR_BITS = ("qlora", "qdora")
MERGEABLE = ("lora", "dora", *FOUR_BITS)
# Methods whose result folds into the base's weights.
