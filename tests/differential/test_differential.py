"""Random small models, adapters, data and losses: ours against PEFT and trl.

    make differential COUNT=1000 SEED=1

Each seed is a case: a model of a family, an adapter's configuration, rows and a loss. PEFT adapts the model, its folder
is loaded here, and both sides measure the same things. PEFT's model in float64 says what is right: ours may err by
twice what PEFT's model errs in the same dtype, and by ROUNDINGS roundings. Over a 4-bit base of ours PEFT gets the
dequantized weights. A case that fails prints its seed and its description; SEED=n COUNT=1 repeats it.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import itertools
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from datasets import Dataset
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

import rankwise as rw
from acceleration.families import small_config, without_dropout
from rankwise.acceleration import attention
from rankwise.acceleration.rows import flattening_obstacle
from rankwise.adapters import adapter_tensors, load_tensors
from rankwise.errors import RankwiseError
from rankwise.quantization import dequantize
from rankwise.training.objectives.preferences import MarkedArguments, MarkedTrainer, PairArguments, PairTrainer
from rankwise.training.trainer import RankwiseTrainer

Numbers = dict[str, Tensor]
Draw = random.Random

IN_MAKE_TEST = range(40)
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("gpt2", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "opt", "bloom", "falcon", "cohere", "cohere2"),
    *("olmo", "olmo2", "olmoe", "stablelm", "starcoder2", "granite", "mpt", "biogpt", "xglm", "glm4", "helium"),
    *("smollm3", "exaone4", "seed_oss", "ernie4_5"),
)
LOSSES = {
    "sft": ({},),
    "dpo": (
        *({"loss_type": "sigmoid"}, {"loss_type": "ipo"}, {"loss_type": "hinge"}, {"loss_type": "apo_zero"}),
        {"loss_type": "robust", "label_smoothing": 0.2},
    ),
    "kto": ({"loss_type": "kto"}, {"loss_type": "kto", "desirable_weight": 1.5}, {"loss_type": "apo_zero_unpaired"}),
}
# Roundings, of the norm of a tensor, that ours may err beyond twice PEFT's error. More in float32, in which norms and
# positions are computed in the float64 model too.
ROUNDINGS = {torch.float32: 64, torch.bfloat16: 16}
# What ours still gets wrong: no case is drawn of it.
KEPT_AWAY: dict[str, Callable[[Case, Places], bool]] = {
    "Gemma's embedding trained whole": lambda case, at: "gemma" in case.family and leaf(at.embedding) in saved(case),
    "a constant embedding scale": lambda case, at: case.family in ("biogpt", "xglm") and case.ends,
    "preferences of mixtures": lambda case, at: bool(at.stacks) and case.loss != "sft",
    "a head with a bias": lambda case, at: case.family in ("phi", "gptj", "codegen") and case.ends,
    "DoRA on wte": lambda case, at: leaf(at.embedding) == "wte" and case.ends and "use_dora" in case.adapter,
    "modules_to_save by ending": lambda case, at: any(
        name.endswith(key) and leaf(name) != key for key in saved(case) for name in at.names
    ),
    "a router": lambda case, at: bool(at.stacks) and case.adapter["target_modules"] == "all-linear",
    "biases of a module trained whole": lambda case, at: saved(case) and case.adapter.get("bias") == "all",
}


# --- cases ---


@dataclasses.dataclass
class Case:
    """What a seed stands for."""

    seed: int
    family: str
    # Changes to the small configuration of the family.
    config: dict[str, Any]
    dtype: torch.dtype
    # Block size of a 4-bit base; 0 for a dense one.
    four_bit: int
    adapter: dict[str, Any]
    loss: str
    loss_options: dict[str, Any]
    # Rows of prompt and completions.
    rows: list[dict[str, Any]]
    padding: str
    fast: bool
    # Rows without padding, where the model can.
    flat: bool
    checkpointing: bool
    # Whether the adapter changes the embedding or the head.
    ends: bool = False


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
            adapter={},
            loss=loss,
            loss_options=dict(draw.choice(LOSSES[loss])),
            rows=draw_rows(draw, loss),
            padding=draw.choice(["left", "right"]),
            fast=draw.random() < 0.6,
            flat=draw.random() < 0.5,
            checkpointing=draw.random() < 0.3,
        )
        if loss != "sft":
            case.loss_options["beta"] = draw.choice([0.1, 0.5])
        at = Places(case)
        case.adapter = draw_adapter(draw, case, at)
        if not any(is_known(case, at) for is_known in KEPT_AWAY.values()):
            return case
    raise AssertionError("unreachable")


def draw_rows(draw: Draw, loss: str) -> list[dict[str, Any]]:
    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(3, 97) for _ in range(draw.randint(least, most))]

    rows: list[dict[str, Any]] = []
    for number in range(draw.randint(2 if loss == "kto" else 1, 4)):
        prompt = ids(1, 6)
        if loss == "sft":
            answer = ids(0 if number else 1, 9)
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        elif loss == "dpo":
            common = ids(0, 2)
            rows.append({"prompt_ids": prompt, "chosen_ids": common + ids(1, 5), "rejected_ids": common + ids(1, 5)})
        else:
            rows.append({"prompt_ids": prompt, "completion_ids": ids(1, 6), "label": draw.random() < 0.5})
    for row, before in zip(rows, rows[-1:] + rows[:-1]):
        if loss == "kto":
            row["KL_completion_ids"] = before["completion_ids"]
    return rows


class Places:
    """The modules of a family's model, by what can be done with them."""

    def __init__(self, case: Case) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small_config_of(case))
        modules = dict(model.named_modules())
        self.names = list(modules)
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        self.embedding, self.head = (next(name for name, one in modules.items() if one is end) for end in ends)
        self.is_tied = ends[0].weight is ends[1].weight
        self.linear = [
            name for name, one in modules.items() if isinstance(one, nn.Linear | Conv1D) and name != self.head
        ]
        self.leaves = sorted({leaf(name) for name in self.linear})
        self.norms = sorted({leaf(name) for name in modules if "norm" in leaf(name) or "ln_" in leaf(name)})
        self.stacks = sorted(
            {".".join(name.split(".")[-3:]) for name, one in model.named_parameters() if one.dim() == 3}
        )
        self.layers = case.config["num_hidden_layers"]


def saved(case: Case) -> list[str]:
    return case.adapter.get("modules_to_save", [])


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def some(draw: Draw, names: list[str]) -> list[str]:
    return draw.sample(names, draw.randint(1, len(names)))


# {form: target_modules}.
TARGETS: dict[str, Callable[[Draw, Places], Any]] = {
    "names": lambda draw, at: some(draw, at.leaves),
    "names and a whole name": lambda draw, at: [*some(draw, at.leaves), draw.choice(at.linear)],
    "regex": lambda draw, at: rf".*\.({'|'.join(some(draw, at.leaves))})",
    "regex of a layer": lambda draw, at: rf".*\.{draw.randrange(at.layers)}\..*({'|'.join(at.leaves)})",
    "all-linear": lambda draw, at: "all-linear",
    "embedding": lambda draw, at: [*some(draw, at.leaves), leaf(at.embedding)],
    "head": lambda draw, at: [*some(draw, at.leaves), leaf(at.head)],
}
# (share of cases, further fields).
OPTIONS: list[tuple[float, Callable[[Draw, Places, dict[str, Any]], dict[str, Any]]]] = [
    (0.4, lambda draw, at, given: {"use_dora": True}),
    (0.3, lambda draw, at, given: {"use_rslora": True}),
    (0.3, lambda draw, at, given: {"rank_pattern": {key: draw.randint(1, 9) for key in patterns(draw, at)}}),
    (0.3, lambda draw, at, given: {"alpha_pattern": {key: draw.randint(1, 9) for key in patterns(draw, at)}}),
    (0.2, lambda draw, at, given: {"modules_to_save": [draw.choice([leaf(at.head), leaf(at.embedding), *at.norms])]}),
    (0.15, lambda draw, at, given: {"trainable_token_indices": draw.sample(range(97), 3)}),
    (0.15, lambda draw, at, given: {"trainable_token_indices": {leaf(at.embedding): draw.sample(range(97), 2)}}),
    (0.1, lambda draw, at, given: {} if at.is_tied else {"trainable_token_indices": {leaf(at.head): [5, 9]}}),
    (0.2, lambda draw, at, given: {"bias": draw.choice(["all", "lora_only"])}),
    (0.2, lambda draw, at, given: {"layers_to_transform": draw.choice([0, [at.layers - 1], list(range(at.layers))])}),
    (0.2, lambda draw, at, given: {"exclude_modules": draw.choice([[draw.choice(at.linear)], r".*\.0\..*"])}),
    (0.5, lambda draw, at, given: {"target_parameters": some(draw, at.stacks)} if at.stacks else {}),
]


def patterns(draw: Draw, at: Places) -> list[str]:
    name = draw.choice(at.linear)
    ways = [leaf(name), name.partition(".")[2], rf".*\.0\..*{leaf(name)}"]
    # PEFT's file sorts them, and the first that matches counts.
    return sorted(draw.sample(ways, draw.randint(1, 2)))


def draw_adapter(draw: Draw, case: Case, at: Places) -> dict[str, Any]:
    adapter: dict[str, Any] = {"r": draw.randint(1, 8), "lora_alpha": draw.randint(1, 16)}
    adapter["target_modules"] = draw.choice([*TARGETS.values()])(draw, at)
    for share, option in OPTIONS:
        if draw.random() < share:
            adapter |= option(draw, at, adapter)
    adapter = possible(adapter, at)
    ends = {*adapter["target_modules"], *adapter.get("modules_to_save", [])} & {leaf(at.embedding), leaf(at.head)}
    case.ends = bool(ends) or "trainable_token_indices" in adapter
    if at.stacks or (case.ends and at.is_tied):
        # Rounding chooses other experts; and what PEFT merges into a shared weight is no oracle.
        case.dtype = torch.float32
    if case.ends or "bias" in adapter:
        # trl computes no preference loss through an adapted head, and none against a base with other biases.
        case.loss, case.loss_options, case.rows = "sft", {}, draw_rows(draw, "sft")
    return adapter


def possible(adapter: dict[str, Any], at: Places) -> dict[str, Any]:
    """Without what the two libraries refuse together."""
    targets, saved = adapter["target_modules"], adapter.get("modules_to_save", [])
    ends = [leaf(at.embedding), leaf(at.head)]
    if isinstance(targets, str):
        adapter.pop("layers_to_transform", None)
    if adapter.get("use_dora"):
        adapter.pop("target_parameters", None)
    if {*ends} & {*targets, *saved}:
        adapter.pop("trainable_token_indices", None)
    if {*targets} & {*saved}:
        adapter.pop("modules_to_save")
    return adapter


# --- models ---


def small_config_of(case: Case) -> Any:
    return small_config(case.family, **case.config)


@torch.no_grad()
def base(case: Case) -> Any:
    """Of weights large enough that every part matters."""
    torch.manual_seed(case.seed)
    model = AutoModelForCausalLM.from_config(small_config_of(case))
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
    if case.four_bit:
        dequantize(model)
    # torch multiplies no groups in float64.
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Move all that trains, so that no part of an adapter is zero or one."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))


# --- the two sides ---


class Theirs:
    """PEFT's model, with trl's losses."""

    trainers = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}

    def __init__(self, case: Case, model: Any) -> None:
        self.case, self.model = case, model

    def file(self) -> Numbers:
        return peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)

    def merged(self) -> nn.Module:
        return copy.deepcopy(self.model).merge_and_unload()

    @functools.cached_property
    def trainer(self) -> Any:
        kind, arguments = self.trainers[self.case.loss]
        trainer = make_trainer(kind, arguments, self.case, self.model, **self.case.loss_options)
        if "ref" in self.model.peft_config:
            # A copy of the adapter as it is: the base is to be the reference.
            self.model.delete_adapter("ref")
        return trainer

    def loss(self) -> Tensor:
        if self.case.ends:
            # trl computes no loss through an adapted head.
            router = {"output_router_logits": True} if hasattr(self.model.config, "router_aux_loss_coef") else {}
            return self.model(**padded(self.case), **router, use_cache=False).loss
        return self.trainer.compute_loss(self.model, self.batch())

    def batch(self) -> dict[str, Any]:
        return padded(self.case) if self.case.loss == "sft" else self.trainer.data_collator(self.case.rows)


class Ours(Theirs):
    trainers = {
        "sft": (RankwiseTrainer, SFTConfig),
        "dpo": (PairTrainer, PairArguments),
        "kto": (MarkedTrainer, MarkedArguments),
    }

    def file(self) -> Numbers:
        return adapter_tensors(self.model)

    def merged(self) -> nn.Module:
        model = copy.deepcopy(self.model)
        rw.merge_adapter(model)
        dequantize(model)
        return model

    def loss(self) -> Tensor:
        return self.trainer.compute_loss(self.model, self.batch())

    @functools.cached_property
    def trainer(self) -> Any:
        kind, arguments = self.trainers[self.case.loss]
        flat = False
        if self.case.fast:
            rw.optimize_for_training(self.model)
            if self.case.flat and attention.config_obstacle(self.model.config) is None:
                attention.register()
                self.model.set_attn_implementation(attention.NAME)
                flat = flattening_obstacle(self.model) is None
        self.flat = flat
        if self.case.checkpointing and self.model.supports_gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        own = {} if self.case.loss == "sft" else {"flat": flat, "disable_dropout": False}
        return make_trainer(kind, arguments, self.case, self.model, **self.case.loss_options, **own)

    def batch(self) -> dict[str, Any]:
        trainer = self.trainer
        if self.case.loss == "sft" and self.flat:
            return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(self.case.rows)
        return super().batch() if self.case.loss == "sft" else trainer.data_collator(self.case.rows)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_trainer(kind: Any, arguments: Any, case: Case, model: Any, **own: Any) -> Any:
    folder = Path(tempfile.gettempdir()) / "differential"
    given = arguments(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **own
    )
    with patch.object(kind, "_prepare_dataset", lambda self, dataset, *_: dataset):
        data = Dataset.from_list(case.rows)
        return kind(model=model, args=given, processing_class=tokenizer(), train_dataset=data)


def padded(case: Case, rows: list[list[int]] | None = None) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in case.rows)

    def filled(values: list[int], filler: int) -> list[int]:
        fill = [filler] * (longest - len(values))
        return fill + values if case.padding == "left" else values + fill

    columns = {
        "input_ids": [filled(row["input_ids"], 0) for row in case.rows],
        "attention_mask": [filled([1] * len(row["input_ids"]), 0) for row in case.rows],
        "labels": [filled(row["labels"], -100) for row in case.rows],
    }
    return {name: torch.tensor(values) for name, values in columns.items()}


# --- what is measured ---


def plain_inputs(case: Case) -> dict[str, Tensor]:
    """Rows of the case, padded on its side, as a model takes them."""
    ids = [row.get("input_ids") or row["prompt_ids"] + row.get("completion_ids", row.get("chosen_ids")) for row in case.rows]
    whole = [{"input_ids": row, "labels": row} for row in ids]
    return padded(dataclasses.replace(case, rows=whole))


def logits_of(model: Any, case: Case) -> Tensor:
    inputs = plain_inputs(case)
    mask = inputs.pop("attention_mask")
    return model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).logits[mask.bool()]


def gradients(side: Theirs, loss: Tensor) -> Numbers:
    """{key in the adapter's file: gradient}: those of the parameters, put in place of their values for a moment."""
    side.model.zero_grad(set_to_none=True)
    loss.backward()
    trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in trained]
    for parameter in trained:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found = {key: value.clone() for key, value in side.file().items()}
    for parameter, value in zip(trained, values):
        parameter.data, parameter.grad = value, None
    return found


def by_logits(side: Theirs) -> Iterator[tuple[str, Numbers]]:
    logits = logits_of(side.model, side.case)
    yield "logits", {"": logits.detach()}
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    yield "gradients of the logits", gradients(side, (logits * weights.to(logits.dtype)).sum())


def by_merging(side: Theirs) -> Iterator[tuple[str, Numbers]]:
    is_untied = side.case.ends and side.case.config["tie_word_embeddings"]
    # PEFT merges into the weight that embedding and head share.
    merged = side.model if is_untied and type(side) is Theirs else side.merged()
    with torch.no_grad():
        yield "merged logits", {"": logits_of(merged, side.case)}
    if not is_untied:
        yield "merged weights", dict(merged.state_dict())


def by_loss(side: Theirs) -> Iterator[tuple[str, Numbers]]:
    loss = side.loss()
    yield "loss", {"": loss.detach()}
    yield "gradients of the loss", gradients(side, loss)


def measured(side: Theirs) -> dict[str, Numbers]:
    parts = itertools.chain(by_logits(side), by_merging(side), by_loss(side))
    return {name: {key: value.double() for key, value in numbers.items()} for name, numbers in parts}


# --- what must hold ---


def check_written(model: Any, case: Case, theirs: Any, stored: Numbers, folder: Path) -> None:
    """The folder that we write has the tensors and settings of PEFT's, and PEFT computes the same with it."""
    rw.save_adapter(model, folder / "ours")
    written = load_file(folder / "ours" / "adapter_model.safetensors")
    assert stored.keys() == written.keys(), f"other tensors: {sorted(stored.keys() ^ written.keys())}"
    odd = [key for key in stored if not torch.equal(stored[key], written[key])]
    assert not odd, f"other values of {odd}"
    check_config(folder)
    read = peft.PeftModel.from_pretrained(dense(case), folder / "ours").train()
    assert torch.equal(logits_of(read, case), logits_of(theirs, case)), "PEFT computes something else with our folder"


def check_config(folder: Path) -> None:
    kinds = [peft.LoraConfig.from_pretrained(folder / side).to_dict() for side in ("ours", "theirs")]
    # A regular expression or "all-linear" may become names: the keys of the tensors say whether they are the same.
    free = {"target_modules", "init_lora_weights", "base_model_name_or_path", "task_type", "peft_version", "fan_in_fan_out"}
    odd = {
        key: (kinds[0][key], value)
        for key, value in kinds[1].items()
        if key not in free and (kinds[0][key] or None) != (value or None)
    }
    assert not odd, f"other settings (ours, PEFT's): {odd}"


def check_equal(
    ours: dict[str, Numbers], theirs: dict[str, Numbers], exact: dict[str, Numbers], case: Case
) -> None:
    eps, problems = torch.finfo(case.dtype).eps, []
    for name, numbers in exact.items():
        assert ours[name].keys() == numbers.keys(), (name, sorted(ours[name].keys() ^ numbers.keys()))
        largest = max(float(value.norm()) for value in numbers.values())
        for key, value in numbers.items():
            error, their_error = (float((side[name][key] - value).norm()) for side in (ours, theirs))
            scale = max(float(value.norm()), 1e-2 * largest)
            RATIOS[name].append((max(0, error - 2 * their_error) / (eps * scale + 1e-30), error/(their_error+1e-30), case.seed, key, str(case.dtype)))
            if not error <= 2 * their_error + ROUNDINGS[case.dtype] * eps * scale:
                problems.append(f"{name} {key}: off by {error:.3g} of {scale:.3g}, PEFT and trl by {their_error:.3g}")
    assert not problems, "\n".join(problems)

RATIOS = collections.defaultdict(list)

def exact_numbers(side: Theirs) -> dict[str, Numbers]:
    """In float64; in float32 where a model of transformers gives NaN for padding in float64."""
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            side.model.to(dtype)
            found = measured(side)
        finally:
            torch.set_default_dtype(torch.float32)
        if all(value.isfinite().all() for numbers in found.values() for value in numbers.values()):
            break
    return found


def run_case(case: Case, folder: Path) -> None:
    try:
        model = peft.get_peft_model(dense(case), peft.LoraConfig(**case.adapter, task_type="CAUSAL_LM"))
    except NoMatchingPeftModuleError:
        with pytest.raises(RankwiseError):
            rw.add_adapter(base(case), rw.LoraConfig(**case.adapter))
        return
    scatter(model)
    theirs = Theirs(case, model.train())
    model.save_pretrained(folder / "theirs", save_embedding_layers=False)
    ours = Ours(case, base(case))
    rw.load_adapter(ours.model, folder / "theirs")
    ours.model.train()
    new = base(case)
    rw.add_adapter(new, rw.LoraConfig(**case.adapter))
    stored = load_file(folder / "theirs" / "adapter_model.safetensors")
    load_tensors(new, stored)
    for each in (ours.model, new):
        check_written(each, case, model, stored, folder)
    own, their = measured(ours), measured(theirs)
    check_equal(own, their, exact_numbers(theirs), case)


def described(case: Case) -> str:
    return "\n".join(f"  {field.name}: {getattr(case, field.name)}" for field in dataclasses.fields(case))


@pytest.mark.parametrize("seed", IN_MAKE_TEST)
def test_a_random_case_is_that_of_peft_and_trl(seed: int, tmp_path: Path) -> None:
    case = draw_case(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_case(case, tmp_path)
    except Exception:
        print(described(case))
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed, families, began = [], collections.Counter(), time.process_time()
    for seed in range(given.seed, given.seed + given.count):
        case = draw_case(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_case(case, Path(folder))
            except Exception as e:
                failed.append(seed)
                print(f"seed {seed} failed: {type(e).__name__} {str(e)[:600]}\n{described(case)}", flush=True)
                tb = traceback.extract_tb(e.__traceback__)
                print("\n".join(f"   {f.filename.split('site-packages/')[-1]}:{f.lineno} {f.line}" for f in tb[-6:]), flush=True)
        families[case.family] += 1
    print(f"{given.count} cases of {len(families)} families, {time.process_time() - began:.0f} s of processor time; {len(failed)} failed: {failed}")
    import json
    json.dump(RATIOS, open("/tmp/ratios.json","w"))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
