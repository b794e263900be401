"""Canaries of what our subclasses override: the foreign base still has each method, with the parameters we rely on.

The tables name every override, so that a method which a new base happens to have too is noticed as well.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator

import pytest
from torch import nn

from rankwise.adapters.layer import OverBase
from rankwise.quantization.linear import FourBitModule
from rankwise.quantization.transformers_plugin import DeserializeOperation, FourBitQuantizer, QuantizeOperation

OPERATION = {"convert": "input_dict"}
# {class: {method: the base's leading parameters}}. Of modules the underscored methods alone: nn.Module's others are
# meant to be overridden.
OVERRIDDEN: dict[type, dict[str, str]] = {
    FourBitQuantizer: {
        "__init__": "quantization_config",
        "validate_environment": "args",
        "param_needs_quantization": "model param_name",
        "is_serializable": "",
        "get_quantize_ops": "",
        "get_load_operations": "",
        "update_weight_conversions": "weight_conversions model",
        "get_state_dict_and_metadata": "model",
        "_process_model_before_weight_loading": "model",
        "_process_model_after_weight_loading": "model",
        "_dequantize": "model dtype",
    },
    QuantizeOperation: OPERATION,
    DeserializeOperation: OPERATION,
    OverBase: {"_apply": "fn recurse"},
    FourBitModule: {
        "_apply": "fn recurse",
        "_load_from_state_dict": "state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs",
    },
}
if importlib.util.find_spec("lm_eval"):
    from rankwise.evaluation.harness_model import EngineLM

    OVERRIDDEN[EngineLM] = {
        "__init__": "",
        "tok_encode": "string",
        "loglikelihood": "requests disable_tqdm",
        "loglikelihood_rolling": "requests disable_tqdm",
        "generate_until": "requests disable_tqdm",
        "_loglikelihood_tokens": "requests",
    }
CASES = [(kind, method) for kind, methods in OVERRIDDEN.items() for method in methods]


def foreign_bases(kind: type) -> Iterator[type]:
    for base in kind.__mro__:
        if not base.__module__.startswith("rankwise") and base is not object:
            yield base


def overridden(kind: type) -> set[str]:
    """Methods that ``kind`` defines and a foreign base has."""
    own = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
    inherited = {name for base in foreign_bases(kind) for name, value in vars(base).items() if callable(value)}
    return own & inherited


@pytest.mark.parametrize(("kind", "method"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_the_base_has_the_method_with_these_parameters(kind: type, method: str) -> None:
    found = next((vars(base)[method] for base in foreign_bases(kind) if method in vars(base)), None)
    assert found is not None, f"no base of {kind.__name__} has {method} any more: ours is never called"
    wanted = OVERRIDDEN[kind][method].split()
    names = [name for name in inspect.signature(found).parameters if name != "self"]
    assert names[: len(wanted)] == wanted


@pytest.mark.parametrize("kind", OVERRIDDEN, ids=lambda kind: kind.__name__)
def test_the_table_names_every_override(kind: type) -> None:
    found = overridden(kind)
    if issubclass(kind, nn.Module):
        found = {name for name in found if name.startswith("_") and not name.startswith("__")}
    assert found - {"__deepcopy__"} == set(OVERRIDDEN[kind])


def test_no_override_is_missed(subclasses: set[type]) -> None:
    """Of all that is loaded, every class of ours that overrides a foreign underscored method is in the table."""
    missed = {
        f"{kind.__name__}.{name}"
        for kind in subclasses - OVERRIDDEN.keys()
        for name in overridden(kind)
        if name.startswith("_") and not name.startswith("__")
    }
    assert not missed


@pytest.fixture
def subclasses() -> set[type]:
    todo, found = [nn.Module, *FourBitQuantizer.__mro__[1:-1]], set()
    while todo:
        below = set(todo.pop().__subclasses__()) - found
        found |= below
        todo += below
    return {kind for kind in found if kind.__module__.startswith("rankwise.")}
