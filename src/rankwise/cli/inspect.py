"""``rankwise inspect``: describe a folder from its headers, and test whether an adapter fits a base."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from pathlib import Path

from rankwise.cli.glance import refuse_comparisons
from rankwise.cli.options import Command
from rankwise.cli.output import Document, Output, shortened
from rankwise.cli.settings import InspectSettings
from rankwise.errors import AdapterError, ModelError, RankwiseError, RunError
from rankwise.foreign import JsonObject, read_object
from rankwise.records import RUN_FILE, load_record
from rankwise.serving import served

# What is shown of PEFT's configuration, of a model's and of a run's record.
ADAPTER = (
    *("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "target_modules", "target_parameters"),
    *("modules_to_save", "bias"),
)
MODEL = ("architectures", "model_type", "num_hidden_layers", "hidden_size")
RUN = ("status", "method", "seed", "steps", "kept_step", "initial_eval_loss", "eval_loss", "train_loss")


def run(settings: InspectSettings, output: Output) -> Document:
    """Raises RunError (RW560) for a folder of a different kind."""
    folder, is_run = settings.folder, (settings.folder / RUN_FILE).is_file()
    found: JsonObject = {"folder": str(folder), "kind": "run"}
    if (folder / "adapter_config.json").is_file():
        found |= _adapter(folder) | _weights(folder, AdapterError, "RW409")
    elif (folder / "config.json").is_file():
        config = read_object(folder / "config.json", error=ModelError, code="RW302")
        found |= {"kind": "model", **{name: config.get(name) for name in MODEL}}
        found |= _weights(folder, ModelError, "RW302")
    elif not is_run:
        refuse_comparisons([folder])
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) if folder.is_dir() else ""
        raise RunError(
            "RW560", f"{folder} is no folder of an adapter, a run or a model; it holds {there or 'no files'}."
        )
    if is_run:
        record = load_record(folder)
        found["run"] = {name: getattr(record, name) for name in RUN}
    if settings.model is not None:
        found["fits"] = _fit(folder, settings.model)
    for label, value in found.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for name, part in parts:
            if part not in (None, []):
                text = "; ".join(map(str, part)) if isinstance(part, list) else str(part)
                start = f"{label}: {name}" if name else label
                output.line(f"{start.replace('_', ' '):<24}{shortened(text)}")
    return found


def _adapter(folder: Path) -> JsonObject:
    from rankwise.adapters.checkpoint import read_folder
    from rankwise.adapters.peft_config import read_config

    (config, _), document = read_folder(folder), read_config(folder)
    method = "DoRA" if config.use_dora else "LoRA"
    found = {"kind": "adapter", "method": method, **{name: document.get(name) for name in ADAPTER}}
    found["norm_of_B"] = norms_of_b(folder / "adapter_model.safetensors")
    return {**found, "served_by": list(served(method.lower(), {**document, "init": config.init.kind}))}


def _weights(folder: Path, kind: type[RankwiseError], code: str) -> JsonObject:
    from rankwise.weights_file import read_header, refuse_pickles

    refuse_pickles(folder)
    headers = [read_header(path, error=kind, code=code) for path in sorted(folder.glob("*.safetensors"))]
    infos = [info for header in headers for info in header.tensors.values()]
    numbers = sum(math.prod(info.shape) for info in infos)
    return {"tensors": len(infos), "numbers": numbers, "dtypes": sorted({str(info.dtype) for info in infos})}


def norms_of_b(path: Path) -> JsonObject:
    """Frobenius norm of the B matrices by layer, the first number in a module's path. B starts at zero, so a layer with
    norm 0 has learned nothing.
    """
    import safetensors

    squares: defaultdict[int, float] = defaultdict(float)
    with safetensors.safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if "lora_B" in name or "lora_embedding_B" in name:
                number = re.search(r"\.(\d{1,9})\.", name)
                squares[int(number[1]) if number else -1] += float(file.get_tensor(name).float().square().sum())
    layers = [float(f"{math.sqrt(squares[layer]):.3g}") for layer in sorted(squares)]
    zero = [layer for layer in sorted(squares) if not squares[layer]]
    return {"total": math.sqrt(sum(squares.values())), "zero_in_layers": zero, "layers": layers}


def _fit(folder: Path, model: str) -> JsonObject:
    """Whether the adapter fits ``model``; only shapes are compared, on a model without weights."""
    from rankwise.adapters.checkpoint import read_adapter
    from rankwise.adapters.peft_config import read_config
    from rankwise.adapters.trained_base import labels_of
    from rankwise.models import fetch_model, is_other_hub_model, load_skeleton

    try:
        source = dataclasses.replace(fetch_model(model, weights=False), labels=labels_of(folder))
        read_adapter(load_skeleton(source), folder)
    except AdapterError as error:
        return {"shapes": False, "code": error.code, "reason": error.message}
    named = read_config(folder).get("base_model_name_or_path")
    return {"shapes": True, "trained_on_another": named if is_other_hub_model(model, named) else None}


COMMAND = Command(
    name="inspect",
    settings=InspectSettings,
    run=run,
    summary="Say what an adapter, run or model folder holds, and whether an adapter fits a base.",
    examples=("rankwise inspect runs/first", "rankwise inspect runs/first --model demo"),
)
