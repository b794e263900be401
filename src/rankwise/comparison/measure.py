"""``python -m rankwise.comparison.measure JOB.json``: what a finished run is like, in one process with one loading.

Loss of every evaluation row, a few answers, merged against unmerged, and how far each weight moved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rankwise.comparison.measure_files import FACTS_FILE, PERPLEXITY
from rankwise.comparison.schema import EVALUATION_FOLDER, MergedCheck
from rankwise.data import Encoded, encode_rows, read_rows, read_template
from rankwise.data.encoding import IGNORED
from rankwise.errors import RankwiseError
from rankwise.evaluation.record import EXAMPLES_FILE, RESULT_FILE
from rankwise.records import load_record, write_json, write_text
from rankwise.training.provenance import versions

ANSWERED = 6
# Rows that the model also answers, for people to read.
ANSWER_TOKENS = 48
CHECKED_ROWS = 4
# Rows whose logits are compared, merged against unmerged.


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``evaluation/perplexity`` and ``measured.json`` into the run's folder; gives the latter's content.

    ``job``: folder, model, method (None for the base), dtype, device, trust_remote_code, revision; eval_data, columns,
    max_length, chat_template, batch_size; merged_check.
    """
    torch.manual_seed(0)
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_run(job)
    rows = read_rows(job["eval_data"], split="validation", **job["columns"])
    template = read_template(Path(job["chat_template"])) if job["chat_template"] else None
    encoded = encode_rows(rows, tokenizer, max_length=job["max_length"], chat_template=template, name="eval")
    started = time.monotonic()
    losses = row_losses(model, encoded, job["batch_size"])
    answers, speed = _answers(model, tokenizer, encoded)
    _write_examples(job, folder, tokenizer, encoded, losses, answers, rows.sha256, time.monotonic() - started)
    facts: dict[str, Any] = {"merged": None, "update_norms": None}
    if job["method"] is not None:
        facts["adapter_bytes"] = _stored_bytes(folder)
        facts |= _merge_facts(job, model, tokenizer, encoded, speed)
    write_json(folder / FACTS_FILE, facts)
    return facts


def load_run(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model of a run with what it trained, in evaluation mode; the base where there is no method."""
    from rankwise.models import choose_device, load_model

    folder, method = Path(job["folder"]), job["method"]
    record = load_record(folder) if method is not None else None
    choice = choose_device(job["device"], job["dtype"])
    dtype = getattr(torch, record.device["dtype"]) if record else choice.dtype
    more = {"dtype": dtype, "device": str(choice.device), "trust_remote_code": job["trust_remote_code"]}
    if method == "full":
        model, tokenizer = load_model(str(folder), **more)
    elif record is not None:
        from rankwise.adapters.trained_base import quantization_of

        model, tokenizer = load_model(
            job["model"], quantization=quantization_of(folder), revision=job["revision"], **more
        )
        _load_adapter(model, folder, method)
    else:
        model, tokenizer = load_model(job["model"], revision=job["revision"], **more)
    return model.eval(), tokenizer


def _load_adapter(model: Any, folder: Path, method: str) -> None:
    from rankwise.adapters import load_adapter
    from rankwise.adapters.baselines import BASELINES, load_baseline

    if method in BASELINES:
        load_baseline(model, folder)
    else:
        load_adapter(model, folder, trainable=False)


@torch.inference_mode()
def row_losses(model: Any, encoded: Encoded, batch_size: int) -> list[tuple[float, int]]:
    """(mean negative log-likelihood of the trained tokens in nats, their count) of every row, in float32."""
    order = sorted(range(len(encoded.dataset)), key=lambda index: len(encoded.dataset[index]["input_ids"]))
    found: dict[int, tuple[float, int]] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        ids, labels, mask = _batch([encoded.dataset[index] for index in indices], model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for index, row_logits, row_labels in zip(indices, logits[:, :-1], labels[:, 1:]):
            trained = row_labels != IGNORED
            loss = cross_entropy(row_logits[trained].float(), row_labels[trained], reduction="mean")
            found[index] = loss.item(), int(trained.sum())
    return [found[index] for index in range(len(order))]


def _batch(rows: list[Mapping[str, Any]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels and mask, (B, L) each, padded at the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        labels[index, :length] = torch.tensor(row["labels"])
        mask[index, :length] = 1
    return ids.to(device), labels.to(device), mask.to(device)


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, encoded: Encoded) -> tuple[dict[int, str], float | None]:
    """Greedy answers to some rows, and the tokens per second of writing them; rows without a prompt get none."""
    answers: dict[int, str] = {}
    tokens, seconds = 0, 0.0
    step = max(1, len(encoded.dataset) // ANSWERED)
    for index in range(0, len(encoded.dataset), step)[:ANSWERED]:
        prompt = _prompt_ids(encoded.dataset[index])
        if not prompt:
            continue
        ids = torch.tensor([prompt], device=model.device)
        if not answers:
            # The first call allocates and compiles.
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        started = time.perf_counter()
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )[0, len(prompt) :]
        seconds += time.perf_counter() - started
        tokens += len(written)
        answers[index] = tokenizer.decode(written, skip_special_tokens=True).strip()
    return answers, tokens / seconds if seconds else None


def _prompt_ids(row: Mapping[str, Any]) -> list[int]:
    """The ids in front of the first trained one."""
    trained = [label != IGNORED for label in row["labels"]]
    return list(row["input_ids"][: trained.index(True)])


def _write_examples(
    job: Mapping[str, Any],
    folder: Path,
    tokenizer: Any,
    encoded: Encoded,
    losses: list[tuple[float, int]],
    answers: Mapping[int, str],
    sha256: str,
    seconds: float,
) -> None:
    target = folder / EVALUATION_FOLDER / PERPLEXITY
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (row, (loss, tokens)) in enumerate(zip(encoded.dataset, losses)):
        prompt, kept = _prompt_ids(row), [label for label in row["labels"] if label != IGNORED]
        example = {
            "id": str(index),
            "cluster": hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16] if prompt else None,
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "prediction": answers.get(index, ""),
            "references": [tokenizer.decode(kept, skip_special_tokens=True).strip()],
            "scores": {"loss": loss, "tokens": tokens},
        }
        lines.append(json.dumps(example, ensure_ascii=False) + "\n")
    write_text(target / EXAMPLES_FILE, "".join(lines))
    total = sum(tokens for _, tokens in losses)
    mean = sum(loss * tokens for loss, tokens in losses) / total
    write_json(
        target / RESULT_FILE,
        {
            "task": PERPLEXITY,
            "model": job["model"],
            "adapter": str(folder) if job["method"] is not None else None,
            "metrics": {"loss": mean, "perplexity": float(torch.tensor(mean, dtype=torch.float64).exp())},
            "primary": "loss",
            "higher_is_better": {"loss": False, "perplexity": False},
            "standard_errors": {"loss": None, "perplexity": None},
            "count": len(losses),
            "settings": {"max_length": job["max_length"], "answered": sorted(answers)},
            "data_sha256": sha256,
            "versions": versions(),
            "wall_seconds": round(seconds, 3),
            "examples": EXAMPLES_FILE,
        },
    )


def _merge_facts(
    job: Mapping[str, Any], model: Any, tokenizer: Any, encoded: Encoded, speed: float | None
) -> dict[str, Any]:
    """Merge the adapter in memory: what the logits and the speed become, and how far each weight moved."""
    if job["method"] == "full":
        return {"merged": None, "update_norms": _full_norms(job, model)}
    if job["method"] not in ("lora", "qlora", "dora", "qdora"):
        return {"merged": None, "update_norms": None}
    from rankwise.adapters import merge_adapter

    before = _logits(model, encoded) if job["merged_check"] else []
    weights = _adapted_weights(model)
    merge_adapter(model, reversible=False)
    norms = {name: _relative(model.get_submodule(name), old) for name, old in weights.items()}
    if not job["merged_check"]:
        return {"merged": None, "update_norms": norms}
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
    after = _logits(model, encoded)
    _, merged_speed = _answers(model, tokenizer, encoded)
    merged: MergedCheck = {
        "max_logit_difference": max((one - two).abs().max().item() for one, two in zip(before, after)),
        "generate_tokens_per_second_merged": merged_speed,
        "generate_tokens_per_second_unmerged": speed,
    }
    return {"merged": merged, "update_norms": norms}


@torch.inference_mode()
def _logits(model: Any, encoded: Encoded) -> list[Tensor]:
    found = []
    for index in range(min(CHECKED_ROWS, len(encoded.dataset))):
        ids = torch.tensor([encoded.dataset[index]["input_ids"]], device=model.device)
        found.append(model(input_ids=ids, use_cache=False).logits.float().cpu())
    return found


@torch.no_grad()
def _adapted_weights(model: nn.Module) -> dict[str, Tensor]:
    from rankwise.adapters.state import inner_module, wrappers

    return {name: _dense(inner_module(wrapper)).cpu() for name, wrapper in wrappers(model)}


@torch.no_grad()
def _dense(module: nn.Module) -> Tensor:
    dequantize = getattr(module, "dequantize", None)
    weight = dequantize() if callable(dequantize) else module.weight
    return weight.detach().to(torch.bfloat16 if weight.dtype != torch.float32 else torch.float32)  # type: ignore[operator]


@torch.no_grad()
def _relative(module: nn.Module, old: Tensor) -> float:
    """``||W' - W||_F / ||W||_F``."""
    before = old.float()
    return float((_dense(module).cpu().float() - before).norm() / before.norm().clamp_min(1e-30))


@torch.no_grad()
def _full_norms(job: Mapping[str, Any], model: nn.Module) -> dict[str, float]:
    """Of the matrices of a fully fine-tuned model, against the base's."""
    base, _ = load_run({**job, "method": None})
    return {name: _relative(model.get_submodule(name), _dense(module).cpu()) for name, module in _matrices(base)}


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            yield name, module


def _stored_bytes(folder: Path) -> int:
    """Of the weights in the run folder's top level: the adapter's file, or a whole model's."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(argv: list[str]) -> int:
    """Exit codes and the document on stdout as of a verb of the command line."""
    document: dict[str, Any]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            document = measure(json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    except RankwiseError as error:
        document = {"error": {"code": error.code, "message": error.message}}
        print(json.dumps(document))
        return error.exit_code
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
