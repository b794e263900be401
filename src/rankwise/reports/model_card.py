"""``README.md`` of a run folder: a model card for the hub and for later readers of the folder.

Every figure comes from the run's record. Statements about other software carry their date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from rankwise.config import DEMO, DEMO_HUB_ID
from rankwise.constants import FILE_BITS
from rankwise.foreign import Fields, Json
from rankwise.methods import PEFT_KINDS, method_of, other_kinds
from rankwise.objectives import OBJECTIVES
from rankwise.records import RunRecord
from rankwise.reports.numbers import byte_size, capital, visible
from rankwise.reports.words import last_part
from rankwise.serving import DORA_AS_LORA, WORDS, served

# Fields of the record, in the order of the card.
RESULTS = {
    "train_loss": "training loss",
    "initial_eval_loss": "evaluation loss before training",
    "eval_loss": "evaluation loss of the weights kept",
    "steps": "steps",
    "kept_step": "step kept",
    "kept_because": "why that step",
    "trainable_parameters": "trainable parameters",
    "total_parameters": "all parameters",
    "tokens_per_second": "tokens per second",
    "examples_per_second": "examples per second",
    "peak_memory_bytes": "peak memory",
    "predicted_peak_memory_bytes": "predicted peak memory",
    "wall_seconds": "seconds in all",
}
# Names of the reward, whose negative is the evaluation loss of grpo.
REWARDS = {
    "initial_eval_loss": "evaluation reward before training",
    "eval_loss": "evaluation reward of the weights kept",
}
# Settings that name paths on one machine, or that another part of the card shows.
LOCAL_SETTINGS = ("model", "data", "eval_data", "output", "resume", "overwrite", "chat_template", "adapter", "cache")
# An underscore within a word means nothing.
SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~&]|(?<!\w)_|_(?!\w))")


def model_card(record: RunRecord, adapter_config: Fields | None = None) -> str:
    """The card as Markdown with YAML front matter.

    ``adapter_config``: the content of ``adapter_config.json``; without it the record's settings are used.
    """
    row = method_of(record.method)
    by_settings = {} if row.trains_all else {**record.settings, "use_dora": row.kind == "dora"}
    config = adapter_config or by_settings
    # PEFT's file has no words for these.
    config = {**config, **{name: record.settings.get(name) for name in ("init", "for_merge")}}
    base = _base_model(record, config)
    warnings = [f"- {_cell(item.get('code', ''))}: {_cell(item.get('message', ''))}" for item in record.warnings]
    sections = [
        _front_matter(record, base, config),
        f"# {_title(record, base)}",
        _summary(record, base, config),
        section("Results", _table(("what", "value"), _results(record))),
        section("Data", _data(record.data)),
        section("Settings", _table(("setting", "value"), _settings(record.settings))),
        section("How to load it", _loading(record, base)),
        section("Where it can be served", _serving(record.method, config)),
        section("Made with", _table(("what", "version or name"), [*record.versions.items(), *record.device.items()])),
        section("Warnings of the run", "\n".join(warnings)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _base_model(record: RunRecord, config: Fields) -> str:
    facts = record.base_model
    named = config.get("base_model_name_or_path") or facts.get("base_model") or facts.get("name")
    name = str(named or record.settings.get("model") or "unknown")
    return DEMO_HUB_ID if name == DEMO else name


def _front_matter(record: RunRecord, base: str, config: Fields) -> str:
    import yaml

    full, kind = method_of(record.method).trains_all, method_of(record.method).kind
    tags = ["rankwise", *([] if full else ["lora", f"base_model:adapter:{base}"])]
    if config.get("use_dora"):
        tags.insert(2, "dora")
    content = {
        "base_model": base,
        "base_model_relation": "finetune" if full else "adapter",
        "library_name": "transformers" if full else "peft" if kind in PEFT_KINDS else "rankwise",
        "pipeline_tag": "text-classification" if OBJECTIVES[record.objective].of_labels else "text-generation",
        "tags": tags,
    }
    return "---\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000) + "---"


def _title(record: RunRecord, base: str) -> str:
    name, model = _name(record.method), escaped(last_part(base))
    return f"{capital(name)} of {model}" if method_of(record.method).trains_all else f"{name} for {model}"


def _name(method: str) -> str:
    row = method_of(method)
    return "fully fine-tuned model" if row.trains_all else f"{row.words} adapter"


def _summary(record: RunRecord, base: str, config: Fields) -> str:
    facts = record.base_model
    what = f"A {_name(record.method)}"
    if config:
        scale = "rank-stabilised scale" if config.get("use_rslora") else "scale"
        what += f" of rank {config.get('r')} and alpha {config.get('lora_alpha')} ({scale})"
    lines = [
        f"{what} {'from' if record.method == 'full' else 'for'} `{base}`, trained by rankwise with seed {record.seed}"
        f"{_learned_from(record)}."
    ]
    if facts.get("kind") in ("gguf", "demo") or facts.get("name") == DEMO:
        weights = "the dequantized weights of a GGUF file"
        if (facts.get("quantization") or {}).get("quant_type") == FILE_BITS:
            weights = "a GGUF file in its own bits, beside which it is served as trained"
        lines.append(f"It was trained on {weights}, and every number here is of those weights.")
    if (four_bit := _four_bit(record)) is not None:
        lines.append(
            f"The base was quantized to 4 bits during training ({four_bit['quant_type'].upper()}, blocks of "
            f"{four_bit['block_size']}{', double quantization' if four_bit['double_quant'] else ''}), and every number "
            "here is of that base."
        )
    if facts.get("sha256"):
        lines.append(f"SHA-256 of the base's weights: `{facts['sha256']}`.")
    if record.status != "finished":
        lines.append(f"The run's status when this card was written: {record.status}.")
    return " ".join(lines)


def _learned_from(record: RunRecord) -> str:
    """What follows "trained"; nothing for demonstrations."""
    reference = "its own base" if record.settings.get("adapter") is None else "the adapter that training began with"
    return OBJECTIVES[record.objective].words.format(reference=reference)


def section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Json]]) -> str:
    """A table of such cells; nothing without rows."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + " --- |" * len(head))
    return "\n".join(lines) if rows else ""


def _cell(value: Json) -> str:
    return escaped(plain(value))


def escaped(text: str) -> str:
    """The text on one line, with every character escaped that Markdown or HTML would interpret."""
    return SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))


def plain(value: Json) -> str:
    """A setting, a version or a fact as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "–"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value)) or "–"
    return str(value)


def _results(record: RunRecord) -> list[tuple[str, Json]]:
    names = RESULTS | REWARDS if OBJECTIVES[record.objective].of_rewards else RESULTS
    found = ((name, field, getattr(record, field)) for field, name in names.items())
    is_reward = REWARDS if OBJECTIVES[record.objective].of_rewards else ()
    rewards = [(f"evaluation's {name.replace('_', ' ')}", value) for name, value in record.eval_rewards.items()]
    results = [
        (name, -value if field in is_reward else byte_size(value) if field.endswith("_bytes") else value)
        for name, field, value in found
        if value is not None
    ]
    return results + [(name, value) for name, value in rewards if value is not None]


def _settings(settings: Fields) -> list[tuple[str, Json]]:
    # A reward's path is valid on one machine only; its file name is shown.
    rewards = [last_part(spec) if ".py:" in spec else spec for spec in settings.get("reward") or ()]
    known = {**settings, "reward": rewards or None}
    return [(name, value) for name, value in known.items() if value is not None and name not in LOCAL_SETTINGS]


def _data(data: Mapping[str, Fields]) -> str:
    """The data of the run: one column for each file, and only the last part of a path."""
    known = (item for facts in data.values() for item in facts.items())
    fields = dict.fromkeys(field for field, value in known if value not in ("", None))
    rows = [(field, *(_place(field, facts.get(field, "")) for facts in data.values())) for field in fields]
    return _table(("what", *data), rows)


def _place(field: str, value: Json) -> Json:
    return last_part(str(value)) if field in ("path", "source", "file") and value else value


def _four_bit(record: RunRecord) -> Fields | None:
    """The 4-bit format and the dtypes of the base; None for a dense one."""
    facts = record.base_model
    stored = facts.get("quantization")
    # PiSSA's adapter belongs on the original weights; a GGUF file has bits of its own.
    if str(record.settings.get("init", "")).startswith("pissa") or not stored or stored["quant_type"] == FILE_BITS:
        return None
    return {**stored, "dtype": facts["dtype"], "compute_dtype": stored.get("compute_dtype") or facts["dtype"]}


def _in_transformers(four_bit: Fields) -> list[str]:
    return [
        "quantization = BitsAndBytesConfig(",
        "    load_in_4bit=True,",
        f'    bnb_4bit_quant_type="{four_bit["quant_type"]}",',
        f"    bnb_4bit_use_double_quant={four_bit['double_quant']},",
        f"    bnb_4bit_compute_dtype=torch.{four_bit['compute_dtype']},",
        ")",
    ]


def _loading(record: RunRecord, base: str) -> str:
    """The lines of transformers or PEFT, and our command."""
    is_full, has_labels = method_of(record.method).trains_all, OBJECTIVES[record.objective].of_labels
    kind = "AutoModelForSequenceClassification" if has_labels else "AutoModelForCausalLM"
    if is_full:
        lines = [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("FOLDER")']
    else:
        four_bit = None if has_labels else _four_bit(record)
        given = f", num_labels={len(record.data['train']['labels']['names'])}" if has_labels else ""
        if four_bit is not None:
            given = f", dtype=torch.{four_bit['dtype']}, quantization_config=quantization"
        lines = [
            *(["import torch"] if four_bit else []),
            "from peft import PeftModel",
            f"from transformers import {kind}" + (", BitsAndBytesConfig" if four_bit else ""),
            "",
            *(_in_transformers(four_bit) if four_bit else []),
            f"model = {kind}.from_pretrained({json.dumps(base, ensure_ascii=False)}{given})",
            'model = PeftModel.from_pretrained(model, "FOLDER")',
        ]
    library, option = ("transformers", "--model") if is_full else ("PEFT", "--adapter")
    command = f"predict {option} FOLDER --data D" if has_labels else f'generate {option} FOLDER --prompt "..."'
    code = "\n".join(lines)
    ours = f"In rankwise: `rankwise {command}`."
    if method_of(record.method).kind in other_kinds():
        return ours
    return f"In {library}, with `FOLDER` the folder of this file:\n\n```python\n{code}\n```\n\n{ours}"


def _serving(method: str, config: Fields) -> str:
    """Where the adapter can be served, from its own properties."""
    places = served(method, config)
    said = "As of November 2026, and without warranty:\n\n" + "\n".join(f"- {place}" for place in places)
    if any(WORDS["dora"] in place for place in places):
        said += f"\n\n{DORA_AS_LORA}"
    return said
