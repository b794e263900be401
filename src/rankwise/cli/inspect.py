"""``rankwise inspect``: describe a folder from its headers, and test whether an adapter fits a base."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rankwise.cli.folders import refuse_comparisons
from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output, shortened
from rankwise.cli.settings import InspectSettings
from rankwise.cli.words import parameter_count
from rankwise.errors import AdapterError, ModelError, RankwiseError, RunError
from rankwise.foreign import Fields, JsonObject, read_object
from rankwise.records import RUN_FILE, load_record
from rankwise.reports.numbers import byte_size
from rankwise.serving import served

# What is shown of PEFT's configuration, of a model's and of a run's record.
ADAPTER = (
    *("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "modules_to_save", "bias"),
)
MODEL = ("architectures", "model_type", "num_hidden_layers", "hidden_size")
RUN = ("status", "method", "seed", "steps", "kept_step", "initial_eval_loss", "eval_loss", "train_loss")


def run(settings: InspectSettings, output: Output) -> Document:
    folder = settings.folder
    document: JsonObject = {"folder": str(folder)} | _describe(folder)
    if settings.model is not None:
        document["fits"] = _fit(folder, settings.model, document)
    for label, text in _lines(document):
        output.line(f"{label.replace('_', ' '):<24}{shortened(text)}")
    return document


def _describe(folder: Path) -> JsonObject:
    """The description of a folder, by its kind. Raises RunError (RW560) for a folder of another kind."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise RunError("RW560", f"{folder} {state}; give the folder of an adapter, a run or a model.")
    run: JsonObject = {}
    if (folder / RUN_FILE).is_file():
        record = load_record(folder)
        run = {"run": {name: getattr(record, name) for name in RUN}}
    if (folder / "adapter_config.json").is_file() or (folder / "adapter_model.safetensors").is_file():
        return {"kind": "adapter"} | _adapter(folder) | run
    if (folder / "config.json").is_file():
        return {"kind": "model"} | _model(folder) | run
    if run:
        return {"kind": "run"} | run
    refuse_comparisons([folder])
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise RunError(
        "RW560",
        f"{folder} holds no adapter, run or model (adapter_config.json, run.json, config.json); it holds {found}.",
    )


def _adapter(folder: Path) -> JsonObject:
    from rankwise.adapters.checkpoint import read_folder
    from rankwise.adapters.peft_config import read_config

    (config, header), document = read_folder(folder), read_config(folder)
    method = "dora" if config.use_dora else "lora"
    return {
        "method": "DoRA" if config.use_dora else "LoRA",
        **{name: document.get(name) for name in ADAPTER},
        "scaling": config.scaling(config.r, config.lora_alpha),
        **_counts([folder / "adapter_model.safetensors"], AdapterError, "RW409"),
        "norm_of_B": norms_of_b(folder / "adapter_model.safetensors", header.tensors),
        "serving": list(served(method, {**document, "init": config.init.kind})),
    }


def _model(folder: Path) -> JsonObject:
    from rankwise.weights_file import refuse_pickles

    config = read_object(folder / "config.json", error=ModelError, code="RW302", constants=True)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickles(folder)
        raise ModelError("RW301", f"{folder} holds a config.json and no .safetensors file; its weights are missing.")
    found = config.get("quantization_config")
    quantization: Fields = found if isinstance(found, dict) else {}
    packed = _packed(files) if quantization.get("load_in_4bit") else {}
    return {
        **{name: config.get(name) for name in MODEL},
        "quantization": quantization.get("quant_method"),
        **_counts(files, ModelError, "RW302", packed),
        "tokenizer": any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")),
    }


def _counts(
    files: Sequence[Path], kind: type[RankwiseError], code: str, packed: Mapping[str, int] | None = None
) -> JsonObject:
    """Tensors, parameters, dtypes and bytes of ``files``; ``packed``: {tensor of a 4-bit weight: its parameters}."""
    from rankwise.weights_file import read_header

    infos = {name: info for path in files for name, info in read_header(path, error=kind, code=code).tensors.items()}
    return {
        "tensors": len(infos),
        "parameters": sum((packed or {}).get(name, math.prod(info.shape)) for name, info in infos.items()),
        "dtypes": sorted({str(info.dtype) for info in infos.values()}),
        "size_bytes": sum(path.stat().st_size for path in files),
    }


def _packed(files: Sequence[Path]) -> dict[str, int]:
    """{tensor of a 4-bit weight: how many weights it holds}. Raises QuantizationError (RW611) for a damaged one."""
    from rankwise.quantization.bitsandbytes_format import PARTS
    from rankwise.quantization.checkpoint import stored_weights

    counts: dict[str, int] = {}
    for name, stored in stored_weights(files).items():
        counts |= {f"{name}.{part}": 0 for part in PARTS} | {name: math.prod(stored.shape)}
    return counts


def norms_of_b(path: Path, names: Iterable[str]) -> JsonObject:
    """Frobenius norm of the B matrices per layer: sqrt of the sum of squares over the layer's modules.

    B starts at zero, so a layer with norm 0 has learned nothing. A layer is the first number in a module's path.
    """
    import safetensors

    squares: defaultdict[int, float] = defaultdict(float)
    with safetensors.safe_open(path, framework="pt") as file:
        for name in names:
            if re.search(r"\.lora_(embedding_)?B", name):
                number = re.search(r"\.(\d{1,9})\.", name)
                squares[int(number[1]) if number else -1] += float(file.get_tensor(name).float().square().sum())
    layers = {layer: math.sqrt(value) for layer, value in sorted(squares.items())}
    return {
        "total": math.sqrt(sum(squares.values())),
        "zero_layers": [layer for layer, value in layers.items() if value == 0],
        "layers": layers,
    }


def _fit(folder: Path, model: str, found: Document) -> JsonObject:
    """Whether the adapter fits ``model``; only shapes are compared, on a model without weights."""
    from rankwise.adapters.checkpoint import read_adapter
    from rankwise.models import is_other_hub_model, load_skeleton

    if found["kind"] != "adapter":
        raise RunError("RW561", f"--model asks whether an adapter fits, and {folder} is a {found['kind']} folder.")
    try:
        read_adapter(load_skeleton(model), folder)
    except AdapterError as error:
        return {"model": model, "fits": False, "code": error.code, "reason": shortened(error.message)}
    named = found["base_model_name_or_path"]
    return {"model": model, "fits": True, "another_base": named if is_other_hub_model(model, named) else None}


def _lines(found: Document) -> Iterable[tuple[str, str]]:
    """The document in lines: what is empty is left out."""
    for name, value in found.items():
        if name == "parameters":
            yield name, f"{parameter_count(value)} of {', '.join(found['dtypes'])}, {byte_size(found['size_bytes'])}"
        elif name == "norm_of_B":
            zero = f"; 0 in layers {', '.join(map(str, value['zero_layers']))}" if value["zero_layers"] else ""
            low, high = min(value["layers"].values(), default=0), max(value["layers"].values(), default=0)
            yield "norm of B", f"{value['total']:.4g}; by layer {low:.3g} to {high:.3g}{zero}"
        elif name == "fits":
            other = value.get("another_base")
            fits = f"the shapes fit {value['model']}, but it was trained on {other}" if other else "yes"
            yield name, fits if value["fits"] else f"no ({value['code']}): {value['reason']}"
        elif name == "run":
            yield from ((f"run: {key}", _text(each)) for key, each in value.items() if each is not None)
        elif name == "serving":
            yield from (("served by", place) for place in value)
        elif value not in (None, [], {}, "none") and name not in ("dtypes", "size_bytes"):
            yield name, _text(value)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


VERB = Verb(
    name="inspect",
    settings=InspectSettings,
    run=run,
    summary="Say what an adapter, run or model folder holds, and whether an adapter fits a base.",
    examples=("rankwise inspect runs/first", "rankwise inspect runs/first --model demo"),
)
