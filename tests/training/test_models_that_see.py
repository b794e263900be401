"""Models that also see train on text alone: the part that sees gets no adapter, and the run says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import rankwise as rw
from rankwise.errors import RankwiseWarning
from rankwise.export.merged import merge_to_folder
from rankwise.planning import Workload, estimate
from rankwise.training.run import train

TEXT: dict[str, Any] = {
    "vocab_size": 94,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16}, vision_config=EYES, mm_tokens_per_image=4, image_token_index=93
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    eyes = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={**eyes, "fullatt_block_indexes": [0]},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


FAMILIES = {"gemma3": gemma3, "qwen2_5_vl": qwen2_5_vl}


@pytest.fixture(params=FAMILIES)
def seeing(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / request.param
    FAMILIES[request.param]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [{"method": "qdora"}, {"method": "dora", "target_modules": ["q_proj", "up_proj"]}],
    ids=str,
)
def test_text_trains_the_language_side(changes: dict[str, Any], seeing: Path, settings: Any, tmp_path: Path) -> None:
    with pytest.warns(RankwiseWarning, match="RW177"):
        record = train(settings(model=str(seeing), **changes))
    assert record.eval_loss < record.initial_eval_loss
    names = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "run" / "adapter_model.safetensors")}
    assert names
    assert not [name for name in names if "language_model" not in name and "text_model" not in name]
    model, _ = rw.load_model(str(seeing))
    report = rw.load_adapter(model, tmp_path / "run")
    assert report.trainable_parameters == record.trainable_parameters
    ids = torch.tensor([[1, 5, 9, 14, 33, 60, 90 - 20, 2]])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        rw.merge_adapter(model)
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)


def test_peft_reads_the_adapter(seeing: Path, settings: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")
    with pytest.warns(RankwiseWarning, match="RW177"):
        train(settings(model=str(seeing), target_modules=["q_proj", "up_proj"]))
    ids = torch.tensor([[1, 5, 9, 14, 33, 60, 2]])
    model, _ = rw.load_model(str(seeing))
    theirs = peft.PeftModel.from_pretrained(rw.load_model(str(seeing))[0], tmp_path / "run")
    rw.load_adapter(model, tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_merge_on_disk_finds_the_tensors(seeing: Path, tmp_path: Path) -> None:
    """Under their names in the files, which are not always those of the model."""
    model, _ = rw.load_model(str(seeing))
    with pytest.warns(RankwiseWarning, match="RW177"):
        rw.add_adapter(model, rw.LoraConfig(r=4))
    for parameter in rw.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    rw.save_adapter(model, tmp_path / "adapter")
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged", model=str(seeing))
    merged, _ = rw.load_model(str(tmp_path / "merged"))
    ids = torch.tensor([[1, 5, 9, 14, 33, 60, 2]])
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_an_expression_still_reaches_the_part_that_sees(seeing: Path) -> None:
    model, _ = rw.load_model(str(seeing))
    config = rw.LoraConfig(r=2, target_modules=r".*(vision|visual).*(qkv|q_proj|up_proj|fc1)")
    assert all("vis" in item.name for item in rw.add_adapter(model, config).modules)


def test_a_plan_counts_what_trains(seeing: Path) -> None:
    model, _ = rw.load_model(str(seeing))
    workload = Workload(batch_size=2, max_length=16, r=4)
    with pytest.warns(RankwiseWarning, match="RW177"):
        trained = rw.add_adapter(model, rw.LoraConfig(r=4)).trainable_parameters
    assert estimate(str(seeing), "lora", workload).trainable_parameters == trained
