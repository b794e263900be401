"""How many tokens a row may have where positions are looked up in a table."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise.models.load import LEARNED, answer_room, config_table_rows, table_rows

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}
OTHERS = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": {"intermediate_size": 48},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
}


def built(family, **changes):
    config = AutoConfig.for_model(family, **{**SMALL, **OTHERS.get(family, {}), **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", sorted(LEARNED))
def test_config_and_model_agree(family):
    model = built(family)
    rows = table_rows(model)
    assert rows is not None
    assert config_table_rows(model.config.to_dict()) == rows


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_last_row_is_in_the_table_and_the_next_is_not(family):
    model = built(family, max_position_embeddings=40).to_empty(device="cpu")
    rows = table_rows(model)
    assert rows == 40
    with torch.no_grad():
        model(input_ids=torch.ones(1, rows, dtype=torch.long))
        with pytest.raises(IndexError):
            model(input_ids=torch.ones(1, rows + 1, dtype=torch.long))


def test_rows_of_padding_belong_to_no_token():
    assert table_rows(built("roberta", max_position_embeddings=40, is_decoder=True, intermediate_size=48)) == 38


def test_computed_positions_have_no_end():
    model = built("llama", intermediate_size=48, max_position_embeddings=97)
    assert table_rows(model) is None
    assert config_table_rows(model.config.to_dict()) is None


def test_an_answer_ends_where_the_table_ends(gpt2, llama):
    """``gpt2`` has 64 positions: one token more than the room is one look-up too many."""
    prompt = torch.ones(1, 60, dtype=torch.long)
    room = answer_room(gpt2, 60, 100)
    assert gpt2.generate(prompt, min_new_tokens=room, max_new_tokens=room, use_cache=True).shape[1] == 60 + room
    with pytest.raises(IndexError):
        gpt2.generate(prompt, min_new_tokens=room + 1, max_new_tokens=room + 1, use_cache=True)
    assert answer_room(gpt2, 60, 2) == 2
    assert answer_room(gpt2, 65, 100) == 0
    assert answer_room(llama, 1000, 100) == 100
