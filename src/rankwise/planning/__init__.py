"""Predict the peak memory of a training step before anything is downloaded. torch is imported only where needed."""

from rankwise.planning.extend import TERMS, MemoryEstimate, estimate
from rankwise.planning.real_steps import Measurement, measure
from rankwise.planning.workload import PLANNED, Workload

__all__ = ["PLANNED", "TERMS", "Measurement", "MemoryEstimate", "Workload", "estimate", "measure"]
