"""Will it fit? Peak memory of one training step, before anything is downloaded. No import of torch before it is needed.

``estimate`` answers from ``config.json`` alone, or, with ``exact=True``, by running the real step on fake tensors.
"""

from rankwise.planning.estimate import estimate
from rankwise.planning.measure import Measurement, measure
from rankwise.planning.terms import PLANNED, TERMS, MemoryEstimate
from rankwise.planning.workload import Workload

__all__ = ["PLANNED", "TERMS", "Measurement", "MemoryEstimate", "Workload", "estimate", "measure"]
