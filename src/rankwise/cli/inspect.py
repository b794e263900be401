"""``rankwise inspect``: describe a folder from its headers, and test whether an adapter fits a base."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from rankwise.cli.options import Command
from rankwise.errors import AdapterError, ModelError, RunError
from rankwise.foreign import JsonObject, read_header, read_object
from rankwise.records import RUN_FILE, load_record
from rankwise.serving import served
from rankwise.verbs.output import Document, Output, shortened
from rankwise.verbs.settings import InspectSettings, refuse_comparisons

# What is shown of PEFT's configuration, of a model's and of a run's record.
ADAPTER = ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "target_parameters", "modules_to_save")
MODEL = ("architectures", "model_type", "num_hidden_layers", "hidden_size")
RUN = ("status", "method", "seed", "steps", "kept_step", "initial_eval_loss", "eval_loss", "train_loss")


def run(settings: InspectSettings, output: Output) -> Document:
    """Raises RunError (RW560) for a folder of a different kind."""
    folder, is_run = settings.folder, (settings.folder / RUN_FILE).is_file()
    found: JsonObject = {"folder": str(folder), "kind": "run"}
    if (folder / "adapter_config.json").is_file():
        found |= _adapter(folder)
    elif (folder / "config.json").is_file():
        config = read_object(folder / "config.json", error=ModelError, code="RW302")
        found |= {"kind": "model", **{name: config.get(name) for name in MODEL}}
    elif not is_run:
        refuse_comparisons([folder])
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) if folder.is_dir() else ""
        raise RunError("RW560", f"{folder} holds no adapter, run or model; it holds {there or 'no files'}.")
    if infos := [info for path in folder.glob("*.safetensors") for info in read_header(path).tensors.values()]:
        numbers = sum(math.prod(info.shape) for info in infos)
        found |= {"tensors": len(infos), "numbers": numbers, "dtypes": sorted({info.dtype for info in infos})}
    if is_run:
        found["run"] = {name: getattr(load_record(folder), name) for name in RUN}
    if settings.model is not None:
        found["fits"] = _fit(folder, settings.model)
    for label, value in found.items():
        for name, part in value.items() if isinstance(value, dict) else [("", value)]:
            if part not in (None, []):
                text = "; ".join(map(str, part)) if isinstance(part, list) else str(part)
                output.line(f"{f'{label}: {name}'.removesuffix(': ').replace('_', ' '):<26}{shortened(text)}")
    return found


def _adapter(folder: Path) -> JsonObject:
    from safetensors.torch import load_file

    from rankwise.adapters.folder import read_config, read_folder

    (config, _), document = read_folder(folder), read_config(folder)
    method = config.kind
    found = {"kind": "adapter", "method": method, **{name: document.get(name) for name in ADAPTER}}
    # Frobenius norms of B by layer, the first number in a module's path. A layer of norm 0 has learned nothing.
    squares: dict[int, float] = {}
    for name, B in load_file(folder / "adapter_model.safetensors").items():
        if "lora_B" in name or "lora_embedding_B" in name:
            layer = next((int(part) for part in name.split(".") if part.isdecimal() and len(part) < 10), -1)
            squares[layer] = squares.get(layer, 0.0) + B.float().square().sum().item()
    layers = [float(f"{math.sqrt(squares[layer]):.3g}") for layer in sorted(squares)]
    zero = [layer for layer in sorted(squares) if squares[layer] == 0]
    found["norm_of_B"] = {"total": math.sqrt(sum(squares.values())), "zero_in_layers": zero, "layers": layers}
    return {**found, "served_by": [*served(method, {**document, "init": config.init.kind})]}


def _fit(folder: Path, model: str) -> JsonObject:
    """Whether the adapter fits ``model``; only shapes are compared, on a model without weights."""
    from rankwise.adapters.checkpoint import read_adapter
    from rankwise.adapters.folder import labels_of, read_config
    from rankwise.models import fetch_model, load_skeleton
    from rankwise.models.source import warns_of_other_hub_model

    try:
        source = dataclasses.replace(fetch_model(model, weights=False), labels=labels_of(folder))
        read_adapter(load_skeleton(source), folder)
    except AdapterError as error:
        return {"shapes": False, "code": error.code, "reason": error.message}
    warns_of_other_hub_model(model, folder, read_config(folder))
    return {"shapes": True}


COMMAND = Command(
    name="inspect",
    settings=InspectSettings,
    run=run,
    summary="Say what an adapter, run or model folder holds, and whether an adapter fits a base.",
    examples=("rankwise inspect runs/first", "rankwise inspect runs/first --model demo"),
)
