"""What `export --verify` makes of a server's numbers. Real servers are in `test_gguf.py` and need one installed."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

import rankwise as rw
from gguf_cases import base_gguf, saved
from gguf_writer import write_folder_gguf
from rankwise.adapters import adapter_disabled
from rankwise.errors import RunError
from rankwise.export.proof import Answers, Proof, Served, _difference, _judge, _logprobs, _scored, prove
from rankwise.export.verify import round_as_served
from rankwise.labels import NUMBER, SEVERAL, SINGLE, Labels
from rankwise.models import resolve_model
from tiny_models import tiny_llama

PROVEN = Proof(
    server="server", prompts=2, tokens=24, difference=0.3, rounding=0.2, unexplained=0.05, bound=0.06, effect=0.9,
    base_difference=0.02, equal_texts=2, changed_texts=1,
)  # fmt: skip
PROMPTS = [[1, 5, 9, 14, 33, 60], [1, 44, 3, 8, 20, 21, 22]]


def judged(**changes: float) -> None:
    _judge(dataclasses.replace(PROVEN, **changes))


def test_a_server_may_differ_by_the_bound() -> None:
    judged()
    judged(unexplained=0.06)
    words = r"RW738: not proven.* by 0\.3 nats a token \(without the adapter by 0\.02\) over 24 tokens; .*"
    words += r" 0\.061 remain, of 0\.06 allowed"
    with pytest.raises(RunError, match=words):
        judged(unexplained=0.061)
    with pytest.raises(RunError, match="RW738"):
        judged(unexplained=float("nan"))


@pytest.mark.parametrize("without", [{"changed_texts": 0}, {"effect": 0.3}, {"effect": 0.01}])
def test_a_server_that_answers_as_without_the_adapter_proves_nothing(without: dict[str, float]) -> None:
    with pytest.raises(RunError, match=r"RW738: not proven.*answers as without"):
        judged(**without)


def test_a_difference_is_the_mean_over_all_tokens() -> None:
    one, other = Answers([], [[-1.0, -2.0], [-3.0]]), Answers([], [[-1.5, -2.0], [-1.0]])
    assert _difference(one, other) == pytest.approx((0.5 + 0.0 + 2.0) / 3)


@pytest.fixture
def trained(tmp_path):
    """A model that trained in float32, and a function that loads it over a file of its base."""

    def load(base):
        model, _ = rw.load_model(base, dtype=torch.float32)
        rw.load_adapter(model, tmp_path / "adapter")
        return model.eval()

    return saved("llama", tmp_path).eval(), load


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_a_model_is_rounded_to_the_weights_that_the_file_holds(trained, tmp_path, kind) -> None:
    _, load = trained
    base = base_gguf(tmp_path, kind)
    rounded, wanted = round_as_served(load(tmp_path / "base"), base), load(base).state_dict()
    assert rounded.is_known
    for name, value in rounded.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_another_base_of_the_same_architecture_is_not_proven(trained, tmp_path, monkeypatch, kind) -> None:
    """The server here is rankwise over the file, with inputs rounded as well."""
    model, load = trained

    def ask(target, python, served, prompts, texts, labels):
        server = load(served.model)
        round_as_served(server, served.model).compute()
        adapted = [_logprobs(server, *pair) for pair in zip(prompts, texts)]
        with adapter_disabled(server):
            base = [_logprobs(server, *pair) for pair in zip(prompts, texts)]
        empty = [[] for _ in texts]
        return {
            "version": "a server",
            "base": {"texts": empty, "logprobs": base},
            "adapted": {"texts": texts, "logprobs": adapted},
        }

    monkeypatch.setattr("rankwise.export.proof.ask_server", ask)
    base, wrong = base_gguf(tmp_path, kind), tmp_path / "wrong.gguf"
    rounded = partial(round_as_served, model=load(tmp_path / "base"), files=base)
    proof = prove("llama.cpp", "", model, Served(base), PROMPTS, rounded)
    assert proof.unexplained <= proof.bound
    assert proof.rounding > 0
    rounded = partial(round_as_served, model=load(tmp_path / "base"), files=base)
    other, _ = rw.load_model(tmp_path / "base", dtype=torch.float32)
    for parameter in other.parameters():
        parameter.data += 0.02 * parameter.std() * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "base")
    write_folder_gguf(wrong, tmp_path / "base", kind)
    with pytest.raises(RunError, match="RW738: not proven"):
        prove("llama.cpp", "", model, Served(wrong), PROMPTS, rounded)


@pytest.mark.parametrize("problem", [SINGLE, SEVERAL, NUMBER])
def test_a_head_of_labels_is_proven_by_its_logits(tmp_path, monkeypatch, problem) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    labels = Labels(("no", "yes") if problem != NUMBER else ("value",), problem)
    source = dataclasses.replace(resolve_model(str(tmp_path / "base")), labels=labels)

    def load():
        torch.manual_seed(0)
        model, _ = rw.load_model(source, dtype=torch.float32)
        rw.add_adapter(model, rw.LoraConfig(r=3, init_lora_weights=False))
        return model.eval()

    def ask(*_):
        server = load()
        round_as_served(server, tmp_path / "base").compute()
        answered = {"texts": [], "logprobs": _scored(server, PROMPTS, []).logprobs}
        return {"version": "a server", "base": answered, "adapted": answered}

    monkeypatch.setattr("rankwise.export.proof.ask_server", ask)
    rounded = partial(round_as_served, model=load(), files=tmp_path / "base")
    proof = prove("vllm", "", load(), Served(tmp_path / "base"), PROMPTS, rounded)
    counted = "numbers" if problem == NUMBER else "logits"
    assert (proof.tokens, proof.counted) == (len(PROMPTS) * len(labels.names), counted)
    assert proof.unexplained == 0 < proof.rounding < proof.effect
    assert proof.equal_texts == len(PROMPTS) or problem == NUMBER
