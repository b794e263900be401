"""Predict the peak memory of a training step before anything is downloaded. torch is imported only where needed.

``estimate`` uses ``config.json`` alone or, with ``exact=True``, runs the real step on fake tensors.
"""

from rankwise.planning.estimate import estimate
from rankwise.planning.measure import Measurement, measure
from rankwise.planning.terms import PLANNED, TERMS, MemoryEstimate
from rankwise.planning.workload import Workload

__all__ = ["PLANNED", "TERMS", "Measurement", "MemoryEstimate", "Workload", "estimate", "measure"]
