"""A merge is judged against what rounding costs the merged model itself."""

from __future__ import annotations

import pytest
import torch

from rankwise.adapters import add_adapter, merge_adapter
from rankwise.export.verify import is_more_than_rounding, rounding_cost
from rankwise.lora_config import LoraConfig
from tiny_models import tiny_llama

IDS = [torch.arange(3, 23)[None], torch.arange(5, 40)[None]]


def logits(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits.double() for ids in IDS]


def largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_a_right_merge_is_rounding_and_a_wrong_one_is_more(seed: int, dtype: torch.dtype, use_dora: bool):
    torch.manual_seed(seed)
    model = tiny_llama().to(dtype).eval()
    add_adapter(model, LoraConfig(r=4, use_dora=use_dora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    before = logits(model)
    merge_adapter(model, reversible=False)
    after = logits(model)
    rounding = rounding_cost(model, IDS)
    assert 0 < rounding < 0.5
    assert not is_more_than_rounding(largest(before, after), rounding)
    # Measuring leaves the model as it was, to the bit.
    assert largest(after, logits(model)) == 0
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert is_more_than_rounding(largest(before, logits(model)), rounding_cost(model, IDS))


def test_what_is_no_number_is_more_than_rounding():
    assert is_more_than_rounding(float("nan"), 1.0)
    assert is_more_than_rounding(1.0, float("nan"))
    assert not is_more_than_rounding(0.0, 0.0)
