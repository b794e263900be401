"""Whether 8-bit products are admitted by what they do to gradients."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rows import Recorder, write_rows

from rankwise.acceleration import calibrate_products, optimize_for_training
from rankwise.adapters import add_adapter
from rankwise.adapters.switch import keep_reference, reference_at_work
from rankwise.lora_config import LoraConfig
from rankwise.ops.cpu import products as sums
from rankwise.training import products, step
from rankwise.training.products import affordable_rows, judge, pairs_in_eight_bits
from rankwise.training.run import train
from tiny_models import tiny_llama, tiny_moe

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 256}

needs_products = pytest.mark.skipif(not sums.available(), reason="this CPU or build has no sums of products")


@pytest.fixture(autouse=True)
def _it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "eight_bit_pays", lambda like: True)


def mixture() -> Any:
    """In bfloat16: of 16 bits alone sums of products take every level's rows."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": 128, "max_position_embeddings": 256}
    return tiny_moe("qwen3_moe", **sizes).to(torch.bfloat16)


def outliers(model: Any, layers: Any, size: float) -> Any:
    """Two channels of each MLP that are equal, ``size`` times as large, and cancel in its output: in 8 bits their
    weights' rounding does not. The larger they are, the more their gradients' dithering errs in the other layers."""
    with torch.no_grad():
        for layer in (model.model.layers[number] for number in layers):
            gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
            gate[1] = gate[0]
            up[0] *= size
            up[1] = up[0]
            down[:, 0] *= 4
            down[:, 1] = -down[:, 0]
    return model


def judged(loop_of: Any, model: Any, **how: Any) -> tuple[Any, Any]:
    """(the measurement, the model) of a loop with 8-bit products."""
    loop = loop_of(model=model, **how)
    optimize_for_training(loop.model, products="int8")
    # A run makes its objective after its model.
    loop.objective.own_loss = True
    ids = torch.tensor([[token for row in loop.objective.rows["input_ids"][:16] for token in row]])
    calibrate_products(loop.model, ids)
    return judge(loop.model, loop.objective, None, 2, loop.folder / "kept.json"), loop.model


def test_8_bits_are_admitted_where_their_error_is_below_the_noise(loop_of: Any) -> None:
    found, _ = judged(loop_of, tiny_llama(**SIZES, vocab_size=128))
    assert (found.products, found.left, found.layers, found.rows) == ("int8", [], 22, 2)
    assert 0.001 < found.gradient_error < 0.2


def test_a_head_whose_logits_err_keeps_its_dtype(loop_of: Any) -> None:
    """Two channels that are equal, far larger than the others, and cancel in the logits."""
    model = tiny_llama(**SIZES, vocab_size=128)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :2] = 1
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:2] = layer.self_attn.o_proj.weight[:2] = 0
        model.model.norm.weight[:2] = 1e4
        # Logits near zero would have the gradient of none.
        model.lm_head.weight *= 50
        model.lm_head.weight[:, 1] = -model.lm_head.weight[:, 0]
    found, _ = judged(loop_of, model)
    assert (found.products, found.left) == ("int8", ["lm_head"])


def test_layers_with_outliers_keep_the_bases_dtype(loop_of: Any) -> None:
    found, _ = judged(loop_of, outliers(tiny_llama(**SIZES), [1], 1e3))
    assert (found.products, found.left) == ("int8", ["model.layers.1.mlp.down_proj"])


def test_8_bits_are_refused_where_gradients_err(loop_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LARGEST_OUTPUT_ERROR", math.inf)
    found, _ = judged(loop_of, outliers(tiny_llama(**SIZES), range(3), 1e5))
    assert found.products == "bfloat16"
    assert found.gradient_error > 0.5


@needs_products
def test_experts_are_measured_stack_by_stack(loop_of: Any) -> None:
    """One whose rows err keeps the base's dtype: two channels of its input that are equal, large, and cancel."""
    model = mixture()
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        up = experts.gate_up_proj[:, 32:]
        up[:, 0] *= 1e3
        experts.gate_up_proj[:, 1], up[:, 1] = experts.gate_up_proj[:, 0], up[:, 0]
        experts.down_proj[:, :, 0] *= 4
        experts.down_proj[:, :, 1] = -experts.down_proj[:, :, 0]
    found, _ = judged(loop_of, model)
    # Two projections and two stacks in each of two layers, and the head.
    assert (found.products, found.left, found.layers) == ("int8", ["model.layers.1.mlp.experts.down_proj"], 9)


def test_measuring_leaves_no_trace(loop_of: Any) -> None:
    """Weights, gradients, random numbers and the choice of layers are as before, also with dropout."""
    loop = loop_of(model=tiny_llama(**SIZES))
    optimize_for_training(loop.model, products="int8")
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    pairs, state = pairs_in_eight_bits(loop.model), torch.random.get_rng_state()
    judge(loop.model, loop.objective, None, 2, loop.folder / "kept.json")
    after = loop.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in loop.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert pairs_in_eight_bits(loop.model).keys() == pairs.keys()


def test_a_measurement_is_kept(loop_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, model = judged(loop_of, tiny_llama(**SIZES))
    loop = loop_of(model=tiny_llama(**SIZES))
    # Nothing to afford, and nothing to do.
    assert judge(model, loop.objective, None, 0, loop.folder / "kept.json") == found
    assert judge(model, loop.objective, None, 0, loop.folder / "other.json") is None


def test_a_short_run_cannot_afford_it() -> None:
    assert [affordable_rows(8, 100, count) for count in (10, 130, 10_000)] == [0, 2, 8]


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "classify"])
def test_every_objective_with_rows_is_measured(
    objective: str, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LARGEST_SHARE", 9.0)
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl", 40).read_text().splitlines()]
    if objective == "classify":
        rows = [{"text": row["prompt"], "label": index % 2} for index, row in enumerate(rows)]
    elif objective != "sft":
        rows = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in itertools.pairwise(rows)
        ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    watcher = Recorder()
    record = train(settings(objective=objective, data=str(data), eval_data=None, eval_steps=None), watcher)
    assert record.products == "int8"
    assert record.products_measured is not None
    assert record.products_measured["layers"] > 0
    assert any(note.startswith("frozen products: int8 (the gradient errs by 0.") for note in watcher.notes)


@pytest.mark.parametrize("made", [lambda: tiny_llama(**SIZES), mixture])
@pytest.mark.parametrize("continued", [False, True])
def test_a_steps_reference_has_the_steps_products(loop_of: Any, continued: bool, made: Callable[[], Any]) -> None:
    """Where the adapter changes nothing yet, a step's model and its reference are equal to the bit."""
    loop = loop_of(model=made(), lora=None)
    model = loop.model
    add_adapter(model, LoraConfig(r=4, use_dora=True, init_lora_weights=not continued))
    if continued:
        keep_reference(model)
    optimize_for_training(model, products="int8")
    ids = torch.arange(20)[None]
    calibrate_products(model, ids)
    with torch.no_grad():
        own = model.train()(ids).logits
        with reference_at_work(model):
            reference = model(ids).logits
        evaluated = model.eval()(ids).logits
        with reference_at_work(model):
            reference_then = model(ids).logits
    assert torch.equal(own, reference)
    assert not torch.equal(own, evaluated)
    torch.testing.assert_close(reference_then, evaluated)
