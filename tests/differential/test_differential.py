"""Random small models, adapters, rows and losses: ours against PEFT and trl.

    make differential COUNT=1000 SEED=1

A seed is a case: a family's model, an adapter's configuration, rows and a loss. PEFT adapts the model, its folder is
loaded here, and both sides measure the same: logits, gradients of every tensor of the adapter's file, merged weights,
and loss and gradients by trl's trainers and ours. PEFT's model in float64 says what is right: ours may err by twice as
much as PEFT's model in the case's dtype, and by ROUNDINGS. Over a 4-bit base of ours, PEFT gets the dequantized
weights. A case that fails shows its seed and its description; SEED=n COUNT=1 repeats it.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import itertools
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

import rankwise as rw
from acceleration.families import small_config, without_dropout
from rankwise.acceleration import attention
from rankwise.acceleration.attention import flattening_obstacle
from rankwise.acceleration.layouts import Layout
from rankwise.acceleration.log_probs import sharing_obstacle
from rankwise.acceleration.loss import scored_positions
from rankwise.adapters import adapter_tensors, load_tensors
from rankwise.compat.transformers import attention_of
from rankwise.errors import RankwiseError
from rankwise.quantization import dequantize
from rankwise.training.batches import KEY, Counted, laid_out
from rankwise.training.objectives import Demonstrations, Preferences, Scoring
from rankwise.training.step import Loss

Draw = random.Random
Row = dict[str, Any]
Numbers = dict[str, Tensor]
WEIGHTS = "adapter_model.safetensors"

IN_MAKE_TEST = range(36)
# Roundings, of the norm of a tensor, that ours may err beyond twice PEFT's error. More in float32, in which
# transformers computes norms and positions of the float64 model too.
ROUNDINGS = {torch.float32: 64, torch.bfloat16: 16}
# A tensor's norm counts at least as this share of the largest of its kind: some gradients cancel to nothing.
LEAST_SHARE = 0.01

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("gpt2", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "opt", "bloom", "falcon", "cohere", "cohere2", "olmo"),
    *("olmo2", "olmoe", "stablelm", "starcoder2", "granite", "mpt", "biogpt", "xglm", "glm4", "helium", "smollm3"),
    *("exaone4", "seed_oss", "ernie4_5", "gpt_oss", "qwen2_moe"),
)
LOSSES: dict[str, tuple[dict[str, Any], ...]] = {
    "sft": ({},),
    "dpo": (
        *({"loss_type": "sigmoid"}, {"loss_type": "ipo"}, {"loss_type": "hinge"}, {"loss_type": "apo_zero"}),
        {"loss_type": "robust", "label_smoothing": 0.2},
    ),
    "kto": ({"loss_type": "kto"}, {"loss_type": "kto", "desirable_weight": 1.5}, {"loss_type": "apo_zero_unpaired"}),
}
# {loss: trl's trainer with its arguments}.
TRAINERS: dict[str, Any] = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
}
# What is not drawn: what ours gets wrong or refuses, and the frozen bias that PEFT stores with an adapted head.
KEPT_AWAY: dict[str, Callable[[Case, Places], bool]] = {
    "a mixture's router": lambda case, at: bool(at.stacks) and case.adapter["target_modules"] == "all-linear",
    "a head with a bias": lambda case, at: at.head_has_bias and leaf(at.head) in case.adapter["target_modules"],
}


# --- cases ---


@dataclasses.dataclass
class Case:
    """What a seed stands for."""

    seed: int
    family: str
    # Changes to the family's small configuration.
    config: dict[str, Any]
    dtype: torch.dtype
    # Block size of a 4-bit base; 0 for a dense one.
    four_bit: int
    loss: str
    options: dict[str, Any]
    rows: list[Row]
    # The side of the padding.
    padding: str
    fast: bool
    # Whether ours lays rows end to end in the fast step, where the model can.
    flat: bool
    checkpointing: bool
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Whether the adapter changes the embedding or the head.
    ends: bool = False

    def __str__(self) -> str:
        return "\n".join(f"  {field.name}: {getattr(self, field.name)}" for field in dataclasses.fields(self))


class Places:
    """The modules of a case's model, by what an adapter can do with them."""

    def __init__(self, case: Case) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small_config(case.family, **case.config))
        modules = dict(model.named_modules())
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        self.embedding, self.head = (next(name for name, one in modules.items() if one is end) for end in ends)
        self.is_tied = ends[0].weight is ends[1].weight
        self.head_has_bias = ends[1].bias is not None
        self.linear = [
            name for name, one in modules.items() if isinstance(one, nn.Linear | Conv1D) and name != self.head
        ]
        self.leaves = sorted({leaf(name) for name in self.linear})
        self.norms = sorted({leaf(name) for name in modules if "norm" in leaf(name) or "ln_" in leaf(name)})
        stacks = [name for name, one in model.named_parameters() if one.dim() == 3]
        self.stacks = sorted({".".join(name.split(".")[-3:]) for name in stacks})
        self.layers = case.config["num_hidden_layers"]


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def saved(case: Case) -> list[str]:
    return case.adapter.get("modules_to_save", [])


def some(draw: Draw, names: list[str]) -> list[str]:
    return draw.sample(names, draw.randint(1, len(names)))


def patterns(draw: Draw, at: Places) -> dict[str, int]:
    name = draw.choice(at.linear + at.stacks)
    ways = [leaf(name), name.partition(".")[2], rf".*\.0\..*{leaf(name)}"]
    # PEFT's file sorts them, and the first that matches counts.
    return {key: draw.randint(1, 9) for key in sorted(draw.sample(ways, draw.randint(1, 2)))}


TARGETS: dict[str, Callable[[Draw, Places], Any]] = {
    "names": lambda draw, at: some(draw, at.leaves),
    "all-linear": lambda draw, at: "all-linear",
    "embedding": lambda draw, at: [*some(draw, at.leaves), leaf(at.embedding)],
    "head": lambda draw, at: [*some(draw, at.leaves), leaf(at.head)],
    "a whole name": lambda draw, at: [*some(draw, at.leaves), draw.choice(at.linear)],
    "regex": lambda draw, at: rf".*\.({'|'.join(some(draw, at.leaves))})",
    "regex of a layer": lambda draw, at: rf".*\.{draw.randrange(at.layers)}\..*({'|'.join(at.leaves)})",
}
# (share of the cases, further fields).
FIELDS: list[tuple[float, Callable[[Draw, Places], dict[str, Any]]]] = [
    (0.4, lambda draw, at: {"use_dora": True}),
    (0.3, lambda draw, at: {"use_rslora": True}),
    (0.3, lambda draw, at: {"rank_pattern": patterns(draw, at)}),
    (0.3, lambda draw, at: {"alpha_pattern": patterns(draw, at)}),
    (0.25, lambda draw, at: {"modules_to_save": [draw.choice([leaf(at.head), leaf(at.embedding), *at.norms])]}),
    (0.15, lambda draw, at: {"trainable_token_indices": draw.sample(range(97), 3)}),
    (0.15, lambda draw, at: {"trainable_token_indices": {leaf(at.embedding): draw.sample(range(97), 2)}}),
    (0.1, lambda draw, at: {} if at.is_tied else {"trainable_token_indices": {leaf(at.head): [5, 9]}}),
    (0.25, lambda draw, at: {"bias": draw.choice(["all", "lora_only"])}),
    (0.2, lambda draw, at: {"layers_to_transform": draw.choice([0, [at.layers - 1], list(range(at.layers))])}),
    (0.2, lambda draw, at: {"exclude_modules": draw.choice([[draw.choice(at.linear)], r".*\.0\..*"])}),
    (0.5, lambda draw, at: {"target_parameters": some(draw, at.stacks)} if at.stacks else {}),
    (0.2, lambda draw, at: {"target_parameters": some(draw, at.stacks), "target_modules": []} if at.stacks else {}),
]


def draw_adapter(draw: Draw, at: Places) -> dict[str, Any]:
    adapter: dict[str, Any] = {"r": draw.randint(1, 8), "lora_alpha": draw.randint(1, 16)}
    # Of a mixture's targets PEFT takes the last names alone, of a regular expression too.
    forms = list(TARGETS)[:4] if at.stacks else list(TARGETS)
    adapter["target_modules"] = TARGETS[draw.choice(forms)](draw, at)
    for share, field in FIELDS:
        if draw.random() < share:
            adapter |= field(draw, at)
    # What one of the two libraries refuses; and PEFT forgets the bias of a head beside trained rows.
    targets = adapter["target_modules"]
    if isinstance(targets, str):
        adapter.pop("layers_to_transform", None)
    if "target_parameters" in adapter:
        adapter.pop("use_dora", None)
        adapter.pop("exclude_modules", None)
    ends = {leaf(at.embedding), leaf(at.head)}
    if ends & {*targets, *adapter.get("modules_to_save", [])} or at.head_has_bias:
        adapter.pop("trainable_token_indices", None)
    if {*targets} & {*adapter.get("modules_to_save", [])}:
        adapter.pop("modules_to_save")
    return adapter


def draw_rows(draw: Draw, loss: str) -> list[Row]:
    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(97) for _ in range(draw.randint(least, most))]

    rows: list[Row] = []
    for number in range(draw.randint(2 if loss == "kto" else 1, 4)):
        prompt, common = ids(1, 6), ids(0, 2)
        if loss == "sft":
            # Some rows have nothing to learn from.
            answer = ids(0 if number else 1, 9)
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        elif loss == "dpo":
            rows.append({"prompt_ids": prompt, "chosen_ids": common + ids(1, 5), "rejected_ids": common + ids(1, 5)})
        else:
            rows.append({"prompt_ids": prompt, "completion_ids": ids(1, 6), "label": draw.random() < 0.5})
    for row, before in zip(rows, rows[-1:] + rows[:-1]):
        if loss == "kto":
            row["KL_completion_ids"] = before["completion_ids"]
    return rows


def draw_case(seed: int) -> Case:
    for attempt in itertools.count():
        draw = Draw(f"{seed}/{attempt}")
        loss = draw.choice(["sft", "sft", "dpo", "kto"])
        case = Case(
            seed=seed,
            family=draw.choice(FAMILIES),
            config={"tie_word_embeddings": draw.random() < 0.5, "num_hidden_layers": draw.randint(1, 3)},
            dtype=draw.choice([torch.float32, torch.float32, torch.bfloat16]),
            four_bit=draw.choice([0, 0, 0, 32, 64]),
            loss=loss,
            options={**draw.choice(LOSSES[loss]), **({} if loss == "sft" else {"beta": draw.choice([0.1, 0.5])})},
            rows=draw_rows(draw, loss),
            padding=draw.choice(["left", "right"]),
            fast=draw.random() < 0.6,
            flat=draw.random() < 0.5,
            checkpointing=draw.random() < 0.3,
        )
        at = Places(case)
        adapter = case.adapter = draw_adapter(draw, at)
        changed = {*adapter["target_modules"], *saved(case)}
        case.ends = "trainable_token_indices" in adapter or bool(changed & {leaf(at.embedding), leaf(at.head)})
        if at.stacks or case.family == "opt" or (case.ends and at.is_tied):
            # Rounding chooses other experts, and other sides of a ReLU; what PEFT merges into a shared weight is wrong.
            case.dtype = torch.float32
        if case.ends or "bias" in adapter:
            # trl computes no preference loss through an adapted head, and none against a base with other biases.
            case.loss, case.options, case.rows = "sft", {}, draw_rows(draw, "sft")
        if not any(is_known(case, at) for is_known in KEPT_AWAY.values()):
            return case
    raise AssertionError("unreachable")


# --- models and batches ---


@torch.no_grad()
def base(case: Case) -> Any:
    """The case's model, 4-bit where it is. Its weights are large enough that every part of it matters."""
    torch.manual_seed(case.seed)
    model = AutoModelForCausalLM.from_config(small_config(case.family, **case.config))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model = without_dropout(model.to(case.dtype)).train()
    if case.four_bit:
        rw.quantize(model, rw.Nf4Config(block_size=case.four_bit))
    return model


def dense(case: Case) -> Any:
    model = base(case)
    dequantize(model)
    # torch multiplies no groups of experts in float64.
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Move all that trains, so that no part of an adapter is zero."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))


def padded(rows: list[Row], side: str) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def column(lists: list[list[int]], filler: int) -> Tensor:
        fills = [[filler] * (longest - len(values)) for values in lists]
        return torch.tensor([(fill + own if side == "left" else own + fill) for own, fill in zip(lists, fills)])

    ids = [row["input_ids"] for row in rows]
    mask = column([[1] * len(row) for row in ids], 0)
    return {
        "input_ids": column(ids, 0),
        "attention_mask": mask,
        "labels": column([row["labels"] for row in rows], -100),
    }


def logits_of(model: Any, case: Case) -> Tensor:
    """Of the case's rows, at all tokens but padding."""
    answers = ("completion_ids", "chosen_ids")
    whole = [
        row.get("input_ids") or row["prompt_ids"] + next(row[key] for key in answers if key in row) for row in case.rows
    ]
    batch = padded([{"input_ids": ids, "labels": ids} for ids in whole], case.padding)
    mask = batch["attention_mask"]
    return model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits[mask.bool()]


# --- what each library does ---


def is_peft(model: Any) -> bool:
    return isinstance(model, peft.PeftModel)


def file_of(model: Any) -> Numbers:
    """The tensors of the adapter's file."""
    if is_peft(model):
        return once(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    return adapter_tensors(model)


def merged(model: Any, case: Case) -> Any:
    if not is_peft(model):
        rw.merge_adapter(model := copy.deepcopy(model))
        dequantize(model)
        return model
    # PEFT merges into the weight that embedding and head share.
    return model if is_untied(case) else copy.deepcopy(model).merge_and_unload()


def objective_of(model: Any, case: Case) -> tuple[Any, bool]:
    """Our objective, and whether its rows are laid end to end."""
    rows, flat = Dataset.from_list(case.rows), False
    if case.fast:
        rw.optimize_for_training(model)
        if case.flat and attention_of(model.config) == "sdpa" and not attention.config_obstacle(model.config):
            # Also in float32, in which it is not chosen.
            attention.register()
            model.set_attn_implementation(attention.NAME)
            flat = flattening_obstacle(model) is None
    layout: Layout = "padded" if not flat else "flat" if sharing_obstacle(model) else "shared"
    if case.checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if case.loss == "sft":
        return Demonstrations(
            model=model, rows=rows, eval_rows=None, pad=0, size=len(rows), seed=0, layout=layout
        ), flat
    options = {"beta": 0.1, "max_length": 1024, "loss_type": case.loss, **case.options}
    scoring = Scoring(model, layout)
    return Preferences(scoring=scoring, rows=rows, eval_rows=None, pad=0, size=len(rows), seed=0, **options), flat


def trainer_of(model: Any, case: Case) -> tuple[Any, bool]:
    """trl's trainer for PEFT's model."""
    kind, arguments = TRAINERS[case.loss]
    folder = str(Path(tempfile.gettempdir()) / "differential")
    given = arguments(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **case.options
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    with patch.object(kind, "_prepare_dataset", lambda self, dataset, *_: dataset):
        trainer = kind(model=model, args=given, processing_class=tokenizer, train_dataset=Dataset.from_list(case.rows))
    if "ref" in getattr(model, "peft_config", ()):
        # trl's copy of the adapter as it is; here the base is the reference.
        model.delete_adapter("ref")
    return trainer, False


def loss_of(model: Any, case: Case, made: Callable[[], tuple[Any, bool]]) -> Tensor:
    if is_peft(model) and case.ends:
        # trl refuses an adapted head.
        router = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
        return model(**padded(case.rows, case.padding), **router, use_cache=False).loss
    maker, flat = made()
    if case.loss != "sft":
        collate = maker.data_collator if is_peft(model) else maker.collate
        batch = collate(list(maker.train_dataset if is_peft(model) else maker.rows))
    else:
        batch = padded(case.rows, case.padding)
        scored = scored_positions(batch["labels"])
        batch, found = laid_out(case.rows, 0, "flat") if flat else (batch, Counted(len(scored), 0, 0, scored))
    if is_peft(model):
        return maker.compute_loss(model, batch)
    if case.loss == "sft":
        batch[KEY] = found
    computed: Loss = maker.loss(model, batch)
    return computed.sum / batch[KEY].targets + (0 if computed.aux is None else computed.aux)


def once(tensors: Numbers) -> Numbers:
    """Without what PEFT stores in addition: frozen embeddings and heads, and biases of modules trained whole again."""
    more = (".base_layer.weight", ".modules_to_save.bias", ".original_module.bias")
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(more)}


def is_untied(case: Case) -> bool:
    return case.ends and case.config["tie_word_embeddings"]


# --- what is measured ---


def measured(model: Any, case: Case, made: Callable[[], tuple[Any, bool]]) -> dict[str, Numbers]:
    """{name of a measurement: {name of a tensor: its values in float64}}."""
    found: dict[str, Numbers] = {}
    logits = logits_of(model, case)
    found["logits"] = {"": logits.detach()}
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    found["gradients of the logits"] = gradients(model, (logits * weights.to(logits.dtype)).sum())
    after = merged(model, case)
    with torch.no_grad():
        found["merged logits"] = {"": logits_of(after, case)}
    found["merged weights"] = {} if is_untied(case) else dict(after.state_dict())
    loss = loss_of(model, case, made)
    found["loss"] = {"": loss.detach()}
    found["gradients of the loss"] = gradients(model, loss)
    return {name: {key: value.double() for key, value in numbers.items()} for name, numbers in found.items()}


def gradients(model: Any, loss: Tensor) -> Numbers:
    """{key in the adapter's file: gradient}: for a moment, each trained parameter holds its gradient."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in trained]
    for parameter in trained:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found = {key: value.clone() for key, value in file_of(model).items()}
    for parameter, value in zip(trained, values):
        parameter.data, parameter.grad = value, None
    return found


def in_float64(model: Any, case: Case, made: Callable[[], tuple[Any, bool]]) -> dict[str, Numbers]:
    """What is right. In float32 where a family's padding gives NaN in float64."""
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            found = measured(model.to(dtype), case, made)
        finally:
            torch.set_default_dtype(torch.float32)
        if all(value.isfinite().all() for numbers in found.values() for value in numbers.values()):
            break
    return found


# --- what must hold ---


def check_written(model: Any, case: Case, oracle: Any, folder: Path) -> None:
    """The folder that we write has the tensors and the settings of PEFT's, and PEFT computes the same with it."""
    rw.save_adapter(model, folder / "ours")
    stored, written = (once(load_file(folder / side / WEIGHTS)) for side in ("theirs", "ours"))
    assert stored.keys() == written.keys(), f"other tensors: {sorted(stored.keys() ^ written.keys())}"
    odd = [key for key in stored if not torch.equal(stored[key], written[key])]
    assert not odd, f"other values of {odd}"
    own, wanted = (peft.LoraConfig.from_pretrained(folder / side).to_dict() for side in ("ours", "theirs"))
    # Whether targets in another form are the same targets, the tensors say; layers may be a number or a list.
    free = {"target_modules", "target_parameters", "init_lora_weights", "peft_version", "fan_in_fan_out"}
    layers = wanted["layers_to_transform"]
    wanted["layers_to_transform"] = [layers] if isinstance(layers, int) else layers
    differing = {
        key: (own[key], wanted[key]) for key in wanted.keys() - free if (own[key] or None) != (wanted[key] or None)
    }
    assert not differing, f"other settings (ours, PEFT's): {differing}"
    read = peft.PeftModel.from_pretrained(dense(case), folder / "ours").train()
    assert torch.equal(logits_of(read, case), logits_of(oracle, case)), "PEFT computes something else with our folder"


def _as_one(tensors: Numbers, order: Numbers) -> Numbers:
    return {"all": torch.cat([tensors[key].flatten() for key in order])}


def check_errors(
    own: dict[str, Numbers], reference: dict[str, Numbers], exact: dict[str, Numbers], dtype: torch.dtype
) -> None:
    problems = []
    for name, numbers in exact.items():
        assert own[name].keys() == numbers.keys(), f"{name}: {sorted(own[name].keys() ^ numbers.keys())}"
        if dtype is torch.bfloat16 and numbers:
            # Of a single tensor the order is a matter of luck.
            own[name], reference[name], numbers = (
                _as_one(side, numbers) for side in (own[name], reference[name], numbers)
            )
        least = LEAST_SHARE * max((float(value.norm()) for value in numbers.values()), default=0.0)
        for key, value in numbers.items():
            error, allowed = (float((side[name][key] - value).norm()) for side in (own, reference))
            norm = max(float(value.norm()), least)
            if not error <= 2 * allowed + ROUNDINGS[dtype] * torch.finfo(dtype).eps * norm:
                problems.append(f"{name} {key}: off by {error:.3g} of {norm:.3g}, PEFT and trl by {allowed:.3g}")
    assert not problems, "\n".join(problems)


def run_case(case: Case, folder: Path) -> None:
    try:
        oracle = peft.get_peft_model(dense(case), peft.LoraConfig(**case.adapter, task_type="CAUSAL_LM"))
    except NoMatchingPeftModuleError:
        with pytest.raises(RankwiseError):
            rw.add_adapter(base(case), rw.LoraConfig(**case.adapter))
        return
    scatter(oracle.train())
    oracle.save_pretrained(folder / "theirs")
    loaded, new = base(case), base(case)
    rw.load_adapter(loaded, folder / "theirs")
    rw.add_adapter(new, rw.LoraConfig(**case.adapter))
    load_tensors(new, once(load_file(folder / "theirs" / WEIGHTS)))
    for model in (loaded, new):
        check_written(model, case, oracle, folder)
    own = measured(loaded, case, lambda: objective_of(loaded, case))
    by_trl = functools.cache(lambda: trainer_of(oracle, case))
    check_errors(own, measured(oracle, case, by_trl), in_float64(oracle, case, by_trl), case.dtype)


def run_seed(seed: int, folder: Path) -> str:
    """The family of the case. What fails carries the case's description."""
    case = draw_case(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_case(case, folder)
    except BaseException as error:
        error.add_note(f"make differential SEED={seed} COUNT=1\n{case}")
        raise
    return case.family


@pytest.mark.parametrize("seed", IN_MAKE_TEST)
def test_a_random_case(seed: int, tmp_path: Path) -> None:
    run_seed(seed, tmp_path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    failed, families = [], collections.Counter[str]()
    for seed in range(given.seed, given.seed + given.count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                families[run_seed(seed, Path(folder))] += 1
            except Exception:  # noqa: BLE001
                failed.append(seed)
                traceback.print_exc(limit=-4)
    seconds = time.process_time()
    print(
        f"{given.count} cases, {len(families)} families, {seconds:.0f} s of processor time; failed: {failed or 'none'}"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
