"""``rankwise inspect``: describe a folder from its headers, and test whether an adapter fits a base."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rankwise.cli.folders import refuse_comparisons
from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output, shortened
from rankwise.cli.settings import InspectSettings
from rankwise.cli.sparkline import sparkline
from rankwise.cli.words import parameter_count
from rankwise.errors import AdapterError, ModelError, RankwiseError, RunError
from rankwise.foreign import JsonObject, read_object
from rankwise.records import RUN_FILE, load_record
from rankwise.reports.numbers import byte_size, plural
from rankwise.serving import served

SHOWN_PROBLEMS = 3


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors of one or more safetensors files, by their headers alone."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    size_bytes: int
    # {tensor: number of weights in its 4-bit codes}; 0 for scales and tables, which are not parameters.
    packed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        dense = (math.prod(shape) for name, shape in self.shapes.items() if name not in self.packed)
        return sum(dense) + sum(self.packed.values())

    def describe(self) -> JsonObject:
        """Counts for the report; ``dtypes`` is {dtype: number of tensors}."""
        return {
            "tensors": len(self.shapes),
            "parameters": self.parameters,
            "dtypes": dict(Counter(self.dtypes.values()).most_common()),
            "size_bytes": self.size_bytes,
        }


def run(settings: InspectSettings, output: Output) -> Document:
    folder = settings.folder
    document: JsonObject = {"folder": str(folder)} | _describe(folder)
    if settings.model is not None:
        document["fits"] = _fit(folder, settings.model, document)
    _print(output, document)
    return document


def _describe(folder: Path) -> JsonObject:
    """The description of a folder, by its kind. Raises RunError (RW560) for a folder of another kind."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise RunError("RW560", f"{folder} {state}; give the folder of an adapter, a run or a model.")
    run = {"run": _run(folder)} if (folder / RUN_FILE).is_file() else {}
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


def _run(folder: Path) -> JsonObject:
    record = load_record(folder)
    wanted = ("status", "method", "seed", "steps", "kept_step", "initial_eval_loss", "eval_loss", "train_loss")
    return {name: getattr(record, name) for name in wanted}


def _adapter(folder: Path) -> JsonObject:
    from rankwise.adapters.checkpoint import read_folder
    from rankwise.adapters.peft_config import read_config

    config, document = read_folder(folder)[0], read_config(folder)
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
        "target_modules": config.target_modules
        if isinstance(config.target_modules, str)
        else list(config.target_modules or ()),
        "target_parameters": list(config.target_parameters or ()),
        "modules_to_save": list(config.modules_to_save or ()),
        "bias": config.bias,
        "adapted_modules": len({name.partition(".lora_")[0] for name in weights.shapes if ".lora_" in name}),
        **weights.describe(),
        "norm_of_B": norms_of_b(path, weights.shapes),
        "serving": list(served("dora" if config.use_dora else "lora", {**document, "init": config.init.kind})),
    }


def _model(folder: Path) -> JsonObject:
    from rankwise.weights_file import refuse_pickles

    config = read_object(folder / "config.json", error=ModelError, code="RW302", constants=True)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickles(folder)
        raise ModelError("RW301", f"{folder} holds a config.json and no .safetensors file; its weights are missing.")
    names, quantization = config.get("architectures"), config.get("quantization_config")
    weights = _weights(files, ModelError, "RW302")
    if isinstance(quantization, dict) and quantization.get("load_in_4bit"):
        weights = dataclasses.replace(weights, packed=_packed(files))
    return {
        "architecture": ", ".join(map(str, names)) if isinstance(names, list) and names else "unknown",
        "model_type": config.get("model_type"),
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "hidden_size": config.get("hidden_size", config.get("n_embd")),
        "quantization": quantization.get("quant_method") if isinstance(quantization, dict) else None,
        **weights.describe(),
        "tokenizer": any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")),
    }


def _weights(files: Sequence[Path], kind: type[RankwiseError], code: str) -> Weights:
    """The headers of ``files``, checked before anything is read or allocated."""
    from rankwise.weights_file import read_header

    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in files:
        for name, info in read_header(path, error=kind, code=code).tensors.items():
            shapes[name], dtypes[name] = tuple(info.shape), str(info.dtype)
    return Weights(shapes, dtypes, sum(path.stat().st_size for path in files))


def _packed(files: Sequence[Path]) -> dict[str, int]:
    """{tensor of a 4-bit weight: how many weights it holds}. Raises QuantizationError (RW611) for a damaged one."""
    from rankwise.quantization.bitsandbytes_format import PARTS
    from rankwise.quantization.checkpoint import stored_weights

    counts: dict[str, int] = {}
    for name, stored in stored_weights(files).items():
        counts |= {f"{name}.{part}": 0 for part in PARTS} | {name: math.prod(stored.shape)}
    return counts


def norms_of_b(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> JsonObject:
    """Frobenius norm of the B matrices per layer: sqrt of the sum of squares over the layer's modules.

    B starts at zero, so a layer with norm 0 has learned nothing. A layer is the first number in a module's path.
    """
    import safetensors

    squares: defaultdict[int, float] = defaultdict(float)
    with safetensors.safe_open(path, framework="pt") as file:
        for name in shapes:
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
    trained_on = found["base_model"] if is_other_hub_model(model, found["base_model"]) else None
    return {"model": model, "fits": True, "another_base": trained_on}


def _print(output: Output, document: Document) -> None:
    printers = {"adapter": _adapter_rows, "model": _model_rows, "run": lambda _: iter(())}
    rows = [("folder", document["folder"]), *printers[document["kind"]](document)]
    rows += _run_rows(document["run"]) if "run" in document else []
    rows += _fit_rows(document["fits"]) if "fits" in document else []
    for label, text in rows:
        output.line(f"{label:<16}{shortened(str(text))}")


def _adapter_rows(found: Document) -> Iterator[tuple[str, str]]:
    root = "sqrt(r)" if found["use_rslora"] else "r"
    yield "kind", f"{found['method']} adapter in PEFT's format"
    yield "base model", found["base_model"] or "not named"
    yield "rank", f"r = {found['r']}, alpha = {found['lora_alpha']:g}, scale alpha / {root} = {found['scaling']:.4g}"
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if found[name]:
            yield name.replace("_", " "), str(found[name])
    targets = found["target_modules"]
    named = [targets] if isinstance(targets, str) else targets
    yield "targets", ", ".join([*named, *found["target_parameters"]])
    if found["bias"] != "none":
        yield "biases", found["bias"]
    yield "size", _size(found)
    yield "tensors", f"{found['tensors']:,} over {plural(found['adapted_modules'], 'module')}"
    yield "norm of B", _norm_sentence(found["norm_of_B"])
    yield from (("served by" if index == 0 else "", place) for index, place in enumerate(found["serving"]))


def _norm_sentence(norms: Document) -> str:
    """The norm by layer as a curve, since one layer of 0 says more than the total."""
    layers = norms["layers"]
    if not layers or norms["total"] == 0:
        return "0: this adapter changes nothing yet"
    low, high = min(layers.values()), max(layers.values())
    dead = f"; 0 in layers {', '.join(map(str, norms['zero_layers']))}" if norms["zero_layers"] else ""
    curve = sparkline(list(layers.values()), 40)
    return f"{norms['total']:.4g}; by layer {low:.3g} to {high:.3g}  {curve}{dead}"


def _model_rows(found: Document) -> Iterator[tuple[str, str]]:
    yield "kind", f"model: {found['architecture']} ({found['model_type']})"
    if found["layers"]:
        yield "layers", f"{found['layers']} of width {found['hidden_size']}"
    yield "quantization", found["quantization"] or "none"
    yield "size", _size(found)
    yield "tokenizer", "present" if found["tokenizer"] else "missing: token ids only, no training on text"


def _size(found: Document) -> str:
    dtypes = ", ".join(found["dtypes"])
    return f"{parameter_count(found['parameters'])} parameters, {dtypes}, {byte_size(found['size_bytes'])}"


def _run_rows(run: Document) -> Iterator[tuple[str, str]]:
    yield "run", f"{run['method']}, {run['status']}, seed {run['seed']}"
    if run["steps"] is not None:
        kept = f", the adapter is that of step {run['kept_step']}" if run["kept_step"] is not None else ""
        yield "steps", f"{run['steps']}{kept}"
    if run["initial_eval_loss"] is not None and run["eval_loss"] is not None:
        yield "evaluation loss", f"{run['initial_eval_loss']:.4f} -> {run['eval_loss']:.4f}"
    elif run["train_loss"] is not None:
        yield "training loss", f"{run['train_loss']:.4f}"


def _fit_rows(fit: Document) -> Iterator[tuple[str, str]]:
    if fit["fits"]:
        trained_on = fit["another_base"]
        yield (
            "fits",
            f"the shapes fit {fit['model']}, but it was trained on {trained_on}"
            if trained_on
            else f"yes, {fit['model']}",
        )
        return
    problems = str(fit["reason"]).split("; ")
    yield "fits", f"no, not {fit['model']} ({fit['code']})"
    yield "", "; ".join(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        yield "", f"... and {len(problems) - SHOWN_PROBLEMS} more, which --json lists"


VERB = Verb(
    name="inspect",
    settings=InspectSettings,
    run=run,
    summary="Say what an adapter, run or model folder holds, and whether an adapter fits a base.",
    examples=("rankwise inspect runs/first", "rankwise inspect runs/first --model demo"),
)
