"""A trace counts what a real step really holds, by the same count of storages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from planning_models import skeleton, trace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from rankwise.errors import ModelError
from rankwise.labels import Labels
from rankwise.models.load import skeleton_of
from rankwise.ops.grouped import rows_per_expert
from rankwise.ops.experts import rows_per_expert
