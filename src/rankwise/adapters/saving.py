"""``save_pretrained`` of a model that carries an adapter: a folder in PEFT's format, as PEFT's models write it.

transformers' own method would write the whole base with our tensors beside it under names that nobody else reads, and
that folder loads as the untrained base. Trainers and ``push_to_hub`` call the model's method, so it is replaced there.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from rankwise.adapters.state import AdapterState
from rankwise.errors import AdapterError
from rankwise.records import write_bytes

TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""transformers' name of a Trainer's checkpoint."""
TRAINER_WEIGHTS = "model.safetensors"
NOT_FOR_ADAPTERS = {"push_to_hub": False, "variant": None, "save_peft_format": True, "distributed_checkpoint": False}
"""Options that change what ``save_pretrained`` writes, with the values that change nothing."""


class SavePretrained:
    """Stands on a model in place of its method, which goes on writing models without an adapter and merged ones."""

    def __init__(self, model: nn.Module) -> None:
        # Weak: a model that refers to itself is freed late.
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        model: Any = self._model()
        return SavePretrained(memo.get(id(model), model))

    def __reduce__(self) -> tuple[type[SavePretrained], tuple[Any]]:
        return SavePretrained, (self._model(),)

    def __call__(self, *args: Any, **options: Any) -> None:
        model: Any = self._model()
        plain = type(model).save_pretrained
        state = getattr(model, "rankwise_adapters", AdapterState())
        if not state.configs or state.merged is not None:
            plain(model, *args, **options)
            return
        given = inspect.signature(plain).bind(model, *args, **options).arguments
        given |= given.pop("kwargs", {})
        _check_options(given)
        if given.get("is_main_process", True):
            _save(model, state, Path(given["save_directory"]), given.get("state_dict"))


def _check_options(given: Mapping[str, Any]) -> None:
    asked = [f"{name}={given[name]!r}" for name, usual in NOT_FOR_ADAPTERS.items() if given.get(name, usual) != usual]
    if asked:
        raise AdapterError(
            "RW421",
            f"save_pretrained got {', '.join(asked)}, and an adapter's folder is written without that; leave it out "
            "(model.push_to_hub(NAME) uploads), or call merge_adapter(model) first to save a whole model.",
        )


def _save(model: nn.Module, state: AdapterState, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """The active adapter into ``folder``, the others into folders of their names within, as PEFT keeps several."""
    # What writes adapters stands on what attaches them, which puts this class on the model.
    from rankwise.adapters.checkpoint import adapter_parameters, save_adapter

    assert state.active is not None, "a model with adapters has an active one, disabled or not"
    for name in state.configs:
        place = folder if name == state.active else folder / name
        save_adapter(model, place, name=name, state_dict=state_dict)
    if TRAINER_CHECKPOINT.fullmatch(folder.name):
        # A Trainer resumes, and loads its best step, from a file of this name alone.
        live = {id(parameter) for parameter in adapter_parameters(model, state.active).values()}
        named = model.state_dict(keep_vars=True).items()
        source = {key: value for key, value in named if id(value) in live}
        tensors = {key: (state_dict or source)[key].detach().cpu().contiguous() for key in source}
        write_bytes(folder / TRAINER_WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
