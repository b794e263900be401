"""Answers are those of transformers' generate, and do not depend on who shares the batch."""

from __future__ import annotations

import dataclasses
import itertools
import random
import warnings
from typing import Any

import pytest
import torch
from families import small_config
from transformers import AutoModelForCausalLM

from rankwise.acceleration.generation import (
    Decoding,
    Generator,
    Prompt,
    batches_that_fit,
    drawn,
    repeating_tokens,
    takes_cache,
)
from rankwise.errors import ModelError, RankwiseWarning
from tiny_models import tiny_gpt2, tiny_llama

STOPS = frozenset(range(5, 13))
MODELS = [tiny_llama, tiny_gpt2]


def prompts(count: int = 12, beginning: tuple[int, ...] = (), seed: int = 0) -> list[Prompt]:
    draw = random.Random(seed)
    ids = [tuple(draw.randrange(3, 97) for _ in range(draw.randrange(2, 14))) for _ in range(count)]
    return [Prompt(beginning + tail) for tail in ids]


def by_transformers(model: Any, prompt: Prompt, decoding: Decoding, **options: Any) -> list[int]:
    tokens = model.generate(
        torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=sorted(decoding.stop_ids),
        pad_token_id=0,
        **options,
    )[0, len(prompt.ids) :].tolist()
    end = next((index for index, token in enumerate(tokens) if token in decoding.stop_ids), len(tokens))
    return tokens[:end]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("beginning", [(), tuple(range(20, 56))])
def test_greedy_answers_are_those_of_transformers_one_by_one(make, beginning):
    model, decoding, asked = make(), Decoding(max_new_tokens=12, stop_ids=STOPS), prompts(beginning=beginning)
    generator = Generator(model, decoding)
    generator.share(asked)
    assert (generator._prefix[1] is not None) == bool(beginning)
    answers = generator.answers(asked)
    assert answers == [by_transformers(model, prompt, decoding) for prompt in asked]
    lengths = {len(answer) for answer in answers}
    assert len(lengths) > 1, "rows should leave the batch at different steps"


CACHED = ("gpt2", "gemma2", "mixtral", "qwen3")
# Families with states or caches of their own.
OTHERS = ("mamba", "falcon_mamba", "rwkv", "recurrent_gemma", "minimax", "xlstm", "openai-gpt")


@pytest.mark.filterwarnings("ignore:RW573")
@pytest.mark.parametrize("family", [*CACHED, *OTHERS])
def test_greedy_answers_of_every_family_are_those_of_whole_passes(family: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family)).eval()
    assert takes_cache(model) or family in OTHERS
    asked, decoding = prompts(4), Decoding(max_new_tokens=6, stop_ids=frozenset())
    assert batches_that_fit(model, asked, decoding)
    answers = Generator(model, decoding).answers([*asked, dataclasses.replace(asked[0], repeat=1)])
    for prompt, answer in zip([*asked, asked[0]], answers, strict=True):
        ids = list(prompt.ids)
        for token in answer:
            assert token == int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids.append(token)


def test_a_model_without_a_cache_says_so_once():
    model = AutoModelForCausalLM.from_config(small_config("mamba")).eval()
    decoding = Decoding(max_new_tokens=2, stop_ids=STOPS, temperature=1.0, to_train_on=True)
    with pytest.warns(RankwiseWarning, match="RW573: MambaForCausalLM cannot continue"):
        Generator(model, decoding).answers(prompts(3))
    with warnings.catch_warnings(action="error"):
        Generator(model, decoding).answers(prompts(3))


@pytest.mark.parametrize("make", MODELS)
def test_beam_answers_do_not_depend_on_the_batch(make):
    model, asked = make(), prompts(6)
    decoding = Decoding(max_new_tokens=8, stop_ids=STOPS, num_beams=4, length_penalty=0.9)
    generator = Generator(model, decoding)
    together = generator.answers(asked)
    assert together == [generator.answers([prompt])[0] for prompt in asked]
    assert together == [by_transformers(model, p, decoding, num_beams=4, length_penalty=0.9) for p in asked]


@pytest.mark.parametrize("beams", [1, 4])
def test_a_stop_string_ends_an_answer_as_a_stop_token_does(beams: int):
    model, asked = tiny_llama(), prompts(6)
    by_tokens = Generator(model, Decoding(max_new_tokens=8, stop_ids=STOPS, num_beams=beams)).answers(asked)
    generator = Generator(model, Decoding(max_new_tokens=8, stop_ids=frozenset(), num_beams=beams))
    for expected, answer in zip(by_tokens, generator.answers(asked, lambda ids: ids[-1] in STOPS)):
        end = next((place for place, token in enumerate(answer) if token in STOPS), len(answer))
        assert answer[:end] == expected


def test_n_grams_are_counted_in_the_answer_alone():
    model, [prompt] = tiny_llama(), prompts(1)
    free = Generator(model, Decoding(max_new_tokens=30, stop_ids=frozenset())).answers([prompt])[0]
    copied = Prompt(prompt.ids + tuple(free[:4]))
    for beams in (1, 3):
        decoding = Decoding(max_new_tokens=30, stop_ids=frozenset(), num_beams=beams, no_repeat_ngram_size=2)
        [answer] = Generator(model, decoding).answers([copied])
        pairs = list(itertools.pairwise(answer))
        assert len(pairs) == len(set(pairs))
    assert repeating_tokens([1, 2, 3, 1, 2], 3) == [3]
    assert repeating_tokens([1, 2], 3) == []


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"to_train_on": True}], ids=["from the likeliest", "to train on"])
def test_draws_do_not_depend_on_the_batch(options):
    model, asked = tiny_llama(), prompts(8)
    generator = Generator(model, Decoding(max_new_tokens=10, stop_ids=frozenset(), temperature=1.0, seed=3, **options))
    together = generator.answers(asked)
    assert together == [generator.answers([prompt])[0] for prompt in asked]
    other = Generator(
        model, Decoding(max_new_tokens=10, stop_ids=frozenset(), temperature=1.0, seed=4, **options)
    ).answers(asked)
    assert together != other
    assert generator.answers([Prompt(asked[0].ids, repeat=1)]) != together[:1]


def test_a_draw_takes_no_token_without_probability():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, -1).clone()
    assert drawn(p, torch.tensor([0.0, 0.2499, 0.25, 1 - 2**-24])).tolist() == [1, 1, 3, 3]


def test_an_answer_ends_where_its_text_says_so():
    model, asked = tiny_llama(), prompts(3)
    free = Generator(model, Decoding(max_new_tokens=12, stop_ids=frozenset())).answers(asked)
    cut = Generator(model, Decoding(max_new_tokens=12, stop_ids=frozenset())).answers(asked, lambda ids: len(ids) >= 4)
    assert cut == [answer[:4] for answer in free]


@pytest.mark.parametrize("make", MODELS)
def test_answers_to_train_on_end_with_their_stop_token(make):
    """Equal prompts are run once, among others of other lengths."""
    model, asked = make(), prompts()
    repeated = [Prompt(prompt.ids, repeat=turn) for prompt in asked for turn in range(3)]
    plain = Generator(model, Decoding(max_new_tokens=12, stop_ids=STOPS)).answers(asked)
    found = Generator(model, Decoding(max_new_tokens=12, stop_ids=STOPS, to_train_on=True)).answers(repeated)
    assert len({len(answer) for answer in plain}) > 1
    for number, answer in enumerate(found):
        wanted = plain[number // 3]
        assert answer[: len(wanted)] == wanted
        assert len(answer) == min(12, len(wanted) + 1)
        assert all((token in STOPS) == (place == len(wanted)) for place, token in enumerate(answer))


def test_draws_to_train_on_follow_the_model_s_probabilities_and_the_seed():
    model, [prompt] = tiny_llama(), prompts(1)
    with torch.no_grad():
        model.lm_head.weight *= 20
        p = torch.softmax(model(torch.tensor([prompt.ids])).logits[0, -1].double() / 0.7, -1)
    asked = [Prompt(prompt.ids, repeat=turn) for turn in range(4000)]
    tokens = {}
    for seed in (0, 1):
        decoding = Decoding(max_new_tokens=1, stop_ids=frozenset(), temperature=0.7, seed=seed, to_train_on=True)
        tokens[seed] = [answer[0] for answer in Generator(model, decoding).answers(asked)]
        assert tokens[seed] == [answer[0] for answer in Generator(model, decoding).answers(asked)]
    assert tokens[0] != tokens[1]
    counts = torch.bincount(torch.tensor(tokens[0]), minlength=97) / len(asked)
    deviation = (p * (1 - p) / len(asked)).sqrt()
    assert 0.05 < p.max() < 0.9
    assert ((counts - p).abs() <= 5 * deviation + 1e-3).all()


def test_a_row_that_has_stopped_draws_no_more_for_another():
    """The draws of a prompt depend on it and the seed, also where rows stop at different steps."""
    model, asked = tiny_llama(), prompts(8)
    generator = Generator(model, Decoding(max_new_tokens=10, stop_ids=STOPS, temperature=1.0, seed=3))
    together = generator.answers(asked)
    assert len({len(answer) for answer in together}) > 1
    assert together == [generator.answers([prompt])[0] for prompt in asked]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0}])
def test_a_model_that_computes_nan_writes_nothing(options: dict[str, Any]):
    """Of NaN the argmax is a token like any other."""
    model = tiny_llama()
    model.model.norm.variance_epsilon = float("nan")
    decoding = Decoding(max_new_tokens=3, stop_ids=STOPS, **options)
    with pytest.raises(ModelError, match="computes NaN") as caught:
        Generator(model, decoding).answers(prompts(2))
    assert caught.value.code == "RW323"
