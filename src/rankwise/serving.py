"""The adapters that each server accepts: one table for `plan`, `inspect`, the model card, `compare` and `export`.

The facts come from the servers' sources of November 2026. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rankwise.foreign import Fields, JsonObject
from rankwise.labels import Labels
from rankwise.methods import PEFT_KINDS, Method, method_of

# The values that vLLM's --max-lora-rank admits. An adapter of any rank up to the given value loads.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
# {model_type: how vLLM reads adapters on its experts}, by its source (0.32); its build for CPUs serves no mixture with
# an adapter.
VLLM_EXPERTS = {"qwen2_moe": "one by one", "qwen3_moe": "one by one", "olmoe": "one by one", "gpt_oss": "stacked"}
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
AS_IT_IS = "PEFT, as it is"
GGUF = "llama.cpp and Ollama: `rankwise export --for llama.cpp`"
MODEL_FILE = "model.gguf"
ANYWHERE = "merged (`rankwise merge`): anywhere"
OF_LABELS = "vLLM, of decoders: `rankwise export --for vllm`"
# LoftQ corrects the rounding of a 4-bit base, and servers load dense ones.
OF_LOFTQ = ("PEFT, over the 4-bit base", "no server, since it corrects the rounding of a 4-bit base")
LOFTQ_ANYWHERE = "merged (`rankwise merge --onto quantized`): anywhere"
OF_MERGED = ("no server beside its base, since it was trained for the merged 4-bit file",)
DORA_AS_LORA = (
    "An export writes DoRA as plain LoRA and states the error. It takes the least rank at which the update differs by "
    "at most 5 % (`--max-error`) and the perplexity of held-out rows by at most 1 %."
)
FULL = ("any server of the base model: the result is an ordinary model",)
WHOLE_OF_LABELS = "transformers, and vLLM with --runner pooling"
OF_ANOTHER = ("no server: a method of another package, measured for comparison",)
OF_OTHER_KIND = ("as plain LoRA, with a stated error, by `rankwise export`", ANYWHERE)

Trait = Literal["dora", "rslora", "rank_pattern", "alpha_pattern", "experts", "bias", "modules_to_save"]
WORDS: dict[Trait, str] = {
    "dora": "DoRA's magnitudes",
    "rslora": "rsLoRA's scale",
    "rank_pattern": "`rank_pattern`",
    "alpha_pattern": "`alpha_pattern`",
    "experts": "adapters on stacked experts",
    "bias": "trained biases",
    "modules_to_save": "`modules_to_save`",
}
# The traits that no low-rank export can hold.
MERGED_ONLY: tuple[Trait, ...] = ("bias", "modules_to_save")


@dataclasses.dataclass(frozen=True)
class Server:
    """A program that serves adapters over a base, and the parts of PEFT's format that it does not support."""

    name: str
    # The format that `rankwise export` writes for the server.
    form: Literal["peft", "gguf"]
    # The server stops with an error for these.
    refuses: tuple[Trait, ...] = ()
    # The server ignores these, and gives wrong answers.
    ignores: tuple[Trait, ...] = ()
    # Heads of labels that the server takes whole beside an adapter. Of encoders (`classifier`) vLLM takes no adapter.
    heads: tuple[str, ...] = ()


# {name in `rankwise export --for`: server}.
SERVERS: dict[str, Server] = {
    "peft": Server("PEFT", "peft"),
    "vllm": Server("vLLM", "peft", ("dora", *MERGED_ONLY), ("rank_pattern", "alpha_pattern"), ("score",)),
    "sglang": Server("SGLang", "peft", ("dora", "experts", *MERGED_ONLY), ("rslora", "rank_pattern", "alpha_pattern")),
    "llama.cpp": Server("llama.cpp", "gguf", ("dora", *MERGED_ONLY)),
    "ollama": Server("Ollama", "gguf", ("dora", *MERGED_ONLY)),
}


def traits_of(config: Fields) -> tuple[Trait, ...]:
    """The traits by which an adapter differs from plain LoRA with one rank and alpha, from ``adapter_config.json``."""
    found: dict[Trait, object] = {
        "dora": config.get("use_dora"),
        "rslora": config.get("use_rslora"),
        "rank_pattern": config.get("rank_pattern"),
        "alpha_pattern": config.get("alpha_pattern"),
        "experts": config.get("target_parameters"),
        "bias": config.get("bias", "none") != "none",
        "modules_to_save": config.get("modules_to_save"),
    }
    return tuple(trait for trait, present in found.items() if present)


def answers_labels(config: Fields) -> bool:
    """Whether an ``adapter_config.json``, a run's settings or a plan's step are of a model that answers with labels."""
    return config.get("task_type") == "SEQ_CLS" or config.get("objective") == "classify" or bool(config.get("labels"))


def refusing(trait: Trait) -> str:
    """The names of the servers that load PEFT folders and refuse this trait."""
    return " and ".join(server.name for server in SERVERS.values() if server.form == "peft" and trait in server.refuses)


def vllm_rank(r: int) -> int | None:
    """The least value of --max-lora-rank that admits rank ``r``; None if ``r`` exceeds the largest."""
    return next((rank for rank in VLLM_RANKS if rank >= r), None)


def served(method: str, config: Fields) -> tuple[str, ...]:
    """How the result of ``method`` can be served, one line for each way: directly, by `rankwise export`, or merged."""
    row = method_of(method)
    if row.kind not in PEFT_KINDS:
        return _without_peft(row, config)
    if config.get("for_merge"):
        return *OF_MERGED, ANYWHERE
    if config.get("init") == "loftq":
        return *OF_LOFTQ, LOFTQ_ANYWHERE
    traits = traits_of({**config, "use_dora": config.get("use_dora") or row.kind == "dora"})
    if answers_labels(config):
        return AS_IT_IS, *([] if "dora" in traits else [OF_LABELS]), f"merged (`rankwise merge`): {WHOLE_OF_LABELS}"
    if any(trait in MERGED_ONLY for trait in traits):
        return AS_IT_IS, f"no server takes {_words(traits, MERGED_ONLY)} beside an adapter", ANYWHERE
    r = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    # ``config`` may be a run's settings. A pissa adapter, saved relative to the original weights, has twice the rank.
    r *= 2 if str(config.get("init", "")).startswith("pissa") else 1
    return AS_IT_IS, _by_folder("vllm", traits, r), _by_folder("sglang", traits, r), GGUF, ANYWHERE


def served_in_short(method: str, config: Fields) -> tuple[str, ...]:
    """`served` in short, for a table cell: servers of the adapter, servers of its export, and merged."""
    row = method_of(method)
    if row.kind not in PEFT_KINDS:
        return _without_peft(row, config)
    if config.get("for_merge"):
        return (ANYWHERE,)
    if config.get("init") == "loftq":
        return "PEFT", LOFTQ_ANYWHERE
    traits = traits_of({**config, "use_dora": config.get("use_dora") or row.kind == "dora"})
    if answers_labels(config):
        exported = [] if "dora" in traits else ["by export: vLLM (of decoders)"]
        return "PEFT", *exported, f"merged: {WHOLE_OF_LABELS}"
    if any(trait in (*MERGED_ONLY, "experts") for trait in traits):
        return "PEFT", "merged: anywhere"
    servers = [server for server in SERVERS.values() if server.name != "PEFT"]
    plain = [s.name for s in servers if s.form == "peft" and not _words(traits, (*s.refuses, *s.ignores))]
    exported = [server.name for server in servers if server.name not in plain]
    return ", ".join(["PEFT", *plain]), f"by export: {', '.join(exported)}", "merged: anywhere"


def _without_peft(row: Method, config: Fields) -> tuple[str, ...]:
    if not row.trains_all:
        return OF_ANOTHER if row.is_guest else OF_OTHER_KIND
    return (f"{WHOLE_OF_LABELS}: the result is an ordinary model",) if answers_labels(config) else FULL


def _by_folder(target: str, traits: Sequence[Trait], r: int) -> str:
    """How a server that loads PEFT folders can serve this adapter."""
    server, flag = SERVERS[target], ""
    if target == "vllm" and r > VLLM_DEFAULT_RANK and "dora" not in traits:
        value = vllm_rank(r)
        flag = f" and --max-lora-rank {value}" if value else f"; rank {r} is beyond its largest, {VLLM_RANKS[-1]}"
    if "experts" in traits and target == "vllm":
        return f"vLLM on a GPU, of {', '.join(VLLM_EXPERTS)}: `rankwise export --for vllm`{flag}"
    if "experts" in traits:
        return f"{server.name}: merge first, {WORDS['experts']} were not tried there"
    export = f"{server.name}: `rankwise export --for {target}`"
    if refused := _words(traits, server.refuses):
        return f"{export}{flag}, since it refuses {refused}"
    if ignored := _words(traits, server.ignores):
        return f"{export}{flag}, since it ignores {ignored}"
    return f"{server.name}, as it is" + flag.replace(" and", ", with")


def _words(traits: Sequence[Trait], among: Sequence[Trait]) -> str:
    return ", ".join(WORDS[trait] for trait in traits if trait in among)


def vllm_labels(labels: Labels) -> JsonObject:
    """What vLLM must know of a head over a base without one. By its problem vLLM takes softmax, a sigmoid, or the
    number as it is.
    """
    return {"num_labels": len(labels.names), "problem_type": labels.problem}


def served_by(target: str, folder: str, base: str, r: int, labels: Labels | None = None) -> tuple[str, ...]:
    """The commands that serve what `rankwise export --for TARGET` wrote to ``folder``, over ``base``, which a head
    makes answer with ``labels``."""
    name = Path(folder).name
    flag = f" --max-lora-rank {vllm_rank(r)}" if r > VLLM_DEFAULT_RANK else ""
    kind, count = "CausalLM", ""
    if labels is not None:
        kind, count = "SequenceClassification", f", num_labels={len(labels.names)}"
        flag += f" --runner pooling --convert classify --hf-overrides '{json.dumps(vllm_labels(labels))}'"
    return {
        "peft": (f'PeftModel.from_pretrained(AutoModelFor{kind}.from_pretrained("{base}"{count}), "{folder}")',),
        "vllm": (f"vllm serve {base} --enable-lora --lora-modules {name}={folder}{flag}",),
        "sglang": (f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={folder}",),
        "llama.cpp": (f"llama-server --model {base} --lora {folder}/adapter.gguf",),
        "ollama": (f"ollama create {name} --file {folder}/Modelfile", f"ollama run {name}"),
    }[target]


def served_whole(target: str, folder: str, *, has_labels: bool = False) -> tuple[str, ...]:
    """The commands that serve a merged model in ``folder``; llama.cpp's own converter makes its GGUF."""
    kind, flag = ("SequenceClassification", " --runner pooling") if has_labels else ("CausalLM", "")
    name = Path(folder).name
    convert = f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {folder}/{MODEL_FILE}"
    return {
        "peft": (f'AutoModelFor{kind}.from_pretrained("{folder}")',),
        "vllm": (f"vllm serve {folder}{flag}",),
        "sglang": (f"python -m sglang.launch_server --model-path {folder}",),
        "llama.cpp": (convert, f"llama-server --model {folder}/{MODEL_FILE}"),
        "ollama": (convert, f"ollama create {name} --file {folder}/Modelfile", f"ollama run {name}"),
    }[target]
