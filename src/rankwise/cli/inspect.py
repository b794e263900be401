"""``rankwise inspect``: what a folder holds, read from its headers, and whether an adapter fits a base."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.cli.options import Verb
from rankwise.cli.output import Output
from rankwise.cli.settings import InspectSettings
from rankwise.cli.sparkline import sparkline
from rankwise.cli.words import byte_size, parameter_count
from rankwise.errors import AdapterError, ModelError, RunError
from rankwise.records import RUN_FILE, load_record

CONFIG_BYTES_LIMIT = 4 << 20


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors of one or more safetensors files, by their headers alone."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    size_bytes: int

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def describe(self) -> dict[str, Any]:
        """Counts for the report; ``dtypes`` is {dtype: number of tensors}."""
        return {
            "tensors": len(self.shapes),
            "parameters": self.parameters,
            "dtypes": dict(Counter(self.dtypes.values()).most_common()),
            "size_bytes": self.size_bytes,
        }


def run(settings: InspectSettings, output: Output) -> Mapping[str, Any]:
    folder = settings.folder
    document: dict[str, Any] = {"folder": str(folder)} | _describe(folder)
    if settings.model is not None:
        document["fits"] = _fit(folder, settings.model, document)
    _print(output, document)
    return document


def _describe(folder: Path) -> dict[str, Any]:
    """What kind of folder it is decides what is said. Raises RunError (RW531) when it is none of them."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise RunError("RW531", f"{folder} {state}; give the folder of an adapter, a run or a model.")
    run = {"run": _run(folder)} if (folder / RUN_FILE).is_file() else {}
    if (folder / "adapter_config.json").is_file() or (folder / "adapter_model.safetensors").is_file():
        return {"kind": "adapter"} | _adapter(folder) | run
    if (folder / "config.json").is_file():
        return {"kind": "model"} | _model(folder) | run
    if run:
        return {"kind": "run"} | run
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise RunError(
        "RW531", f"{folder} holds no adapter, run or model (adapter_config.json, run.json, config.json); it holds {found}."
    )


def _run(folder: Path) -> dict[str, Any]:
    record = load_record(folder)
    wanted = ("status", "method", "seed", "steps", "kept_step", "initial_eval_loss", "eval_loss", "train_loss")
    return {name: getattr(record, name) for name in wanted}


def _adapter(folder: Path) -> dict[str, Any]:
    from rankwise.adapters.peft_config import CONFIG_FILE, from_peft, read_config
    from rankwise.weights_file import refuse_pickles

    refuse_pickles(folder, AdapterError, "RW409")
    document = read_config(folder)
    config = from_peft(document, folder / CONFIG_FILE)
    path = folder / "adapter_model.safetensors"
    weights = _weights([path], AdapterError, "RW409")
    return {
        "method": "DoRA" if config.use_dora else "LoRA",
        "base_model": document.get("base_model_name_or_path"),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "scaling": config.scaling(config.r, config.lora_alpha),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules or ()),
        "modules_to_save": list(config.modules_to_save or ()),
        "bias": config.bias,
        "adapted_modules": len({name.partition(".lora_")[0] for name in weights.shapes if ".lora_" in name}),
        **weights.describe(),
        "norm_of_B": norms_of_b(path, weights.shapes),
    }


def _model(folder: Path) -> dict[str, Any]:
    from rankwise.weights_file import refuse_pickles

    config = _read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickles(folder, ModelError, "RW301")
        raise ModelError("RW301", f"{folder} holds a config.json and no .safetensors file; its weights are missing.")
    quantization = config.get("quantization_config")
    return {
        "architecture": ", ".join(str(name) for name in config.get("architectures") or ["unknown"]),
        "model_type": config.get("model_type"),
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "hidden_size": config.get("hidden_size", config.get("n_embd")),
        "quantization": quantization.get("quant_method") if isinstance(quantization, dict) else None,
        **_weights(files, ModelError, "RW302").describe(),
        "tokenizer": any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")),
    }


def _weights(files: Sequence[Path], kind: Any, code: str) -> Weights:
    """The headers of ``files``, checked before anything is read or allocated."""
    from rankwise.weights_file import read_header

    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in files:
        for name, info in read_header(path, kind, code).tensors.items():
            shapes[name], dtypes[name] = tuple(info.shape), str(info.dtype)
    return Weights(shapes, dtypes, sum(path.stat().st_size for path in files))


def norms_of_b(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Frobenius norm of the B matrices per layer: sqrt of the sum of squares over the layer's modules.

    B starts at zero, so a layer whose norm is 0 has learned nothing. A layer is the first number in a module's path.
    """
    import safetensors

    squares: defaultdict[int, float] = defaultdict(float)
    with safetensors.safe_open(path, framework="pt") as file:
        for name in shapes:
            if re.search(r"\.lora_(embedding_)?B", name):
                number = re.search(r"\.(\d+)\.", name)
                squares[int(number[1]) if number else -1] += float(file.get_tensor(name).float().square().sum())
    layers = {layer: math.sqrt(value) for layer, value in sorted(squares.items())}
    return {
        "total": math.sqrt(sum(squares.values())),
        "zero_layers": [layer for layer, value in layers.items() if value == 0],
        "layers": layers,
    }
