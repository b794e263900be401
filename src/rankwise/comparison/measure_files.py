"""The file names that ``measure`` writes and other modules read. Imports no torch."""

from rankwise.config import FOUR_BITS

# The tasks on the evaluation data themselves: of demonstrations, and of preferences.
PERPLEXITY, PREFERENCE = OWN_TASKS = ("perplexity", "preference")
FACTS_FILE = "measured.json"
MERGEABLE = ("lora", "dora", *FOUR_BITS)
# Methods whose result folds into the base's weights.
