"""Predict the peak memory of a training step before anything is downloaded. torch is imported only where needed."""

from rankwise.planning.extend import estimate
from rankwise.planning.memory import TERMS, MemoryEstimate
from rankwise.planning.workload import Workload, planned_methods

__all__ = ["TERMS", "MemoryEstimate", "Workload", "estimate", "planned_methods"]
