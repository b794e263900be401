"""Packed scoring gives each sequence the numbers it gets alone, whatever the batches."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rankwise.acceleration.scoring import Scorer, Target, build_trees, lay_out, pack, target_of
from rankwise.errors import RankwiseWarning
from rankwise.planning.tracker import StorageTracker
from tiny_models import tiny_gpt2, tiny_llama


def choices(count: int, vocabulary: int = 97, seed: int = 0, longest: int = 20) -> list[tuple[list[int], list[int]]]:
    """Contexts with four continuations each."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        context = [draw.randrange(3, vocabulary) for _ in range(draw.randrange(2, longest))]
        for _ in range(4):
            pairs.append((context, [draw.randrange(3, vocabulary) for _ in range(draw.randrange(1, 6))]))
    return pairs


def alone(model: Any, target: Target) -> tuple[float, bool]:
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([target.ids])).logits[0].float().log_softmax(-1)
    rows, wanted = log_p[list(target.places)], torch.tensor(target.wanted)
    return rows.gather(1, wanted[:, None]).sum().item(), bool((rows.argmax(-1) == wanted).all())


def all_scores(model: Any, targets: list[Target], **options: Any) -> dict[int, Any]:
    scorer = Scorer(model, **{"budget": 300, **options})
    return {index: score for batch in scorer.score(targets) for index, score in batch.items()}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_pair_scores_as_it_does_alone(make, attention):
    model = make()
    model.set_attn_implementation(attention)
    targets = [target_of(*pair, 64) for pair in choices(12)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankwiseWarning)
        found = all_scores(model, targets)
    for index, target in enumerate(targets):
        total, greedy = alone(model, target)
        assert abs(found[index].total - total) < 1e-4
        assert found[index].greedy == greedy
        assert found[index].total == pytest.approx(sum(found[index].tokens))


@pytest.mark.parametrize("options", [{"budget": 40}, {"budget": 100_000}, {"budget": 100_000, "max_rows": 1}])
def test_batches_do_not_change_the_scores(llama: LlamaForCausalLM, options):
    targets = [target_of(*pair, 64) for pair in choices(12)]
    before, after = all_scores(llama, targets), all_scores(llama, targets, **options)
    assert all(abs(before[index].total - after[index].total) < 1e-5 for index in before)


def test_the_order_of_the_data_does_not_change_a_bit(llama: LlamaForCausalLM):
    targets = [target_of(*pair, 64) for pair in choices(12)]
    order = random.Random(1).sample(range(len(targets)), len(targets))
    before, after = all_scores(llama, targets), all_scores(llama, [targets[index] for index in order])
    assert all(after[place].tokens == before[index].tokens for place, index in enumerate(order))


def test_a_shared_context_is_computed_once():
    sequences = [(1, 2, 3, 4, 5, 6, choice, 8) for choice in (10, 11, 12)]
    [tree] = build_trees(sequences, longest=100)
    assert tree.length == 6 + 3 * 2
    [row] = pack([tree], 256)
    batch = lay_out([row], 0, "cpu")
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 6, 7]
    second = batch.mask[0, 0, 9].nonzero().flatten().tolist()
    assert second == [0, 1, 2, 3, 4, 5, 8, 9]


def test_equal_pairs_and_nested_pairs_get_their_own_scores(llama: LlamaForCausalLM):
    context = [5, 6, 7, 8]
    pairs = [(context, [9]), (context, [9, 10]), (context, [9]), (context, [9, 10, 11])]
    targets = [target_of(*pair, 64) for pair in pairs]
    found = all_scores(llama, targets)
    assert found[0] == found[2]
    assert all(abs(found[i].total - alone(llama, t)[0]) < 1e-4 for i, t in enumerate(targets))


def test_what_is_too_long_loses_its_beginning():
    target = target_of(list(range(100)), [7, 8, 9], 10)
    assert target.ids == (*range(92, 100), 7, 8)
    assert target.wanted == (7, 8, 9)
    assert target.places == (7, 8, 9)


def test_a_model_with_a_narrow_window_gets_rows_of_its_own_and_says_so():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    targets = [target_of(*pair, 64) for pair in choices(4)]
    with pytest.warns(RankwiseWarning, match="RW573"):
        found = all_scores(model, targets)
    assert all(abs(found[i].total - alone(model, t)[0]) < 1e-4 for i, t in enumerate(targets))


def windowed(window: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, sliding_window=window, pad_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_each_set_of_sequences_is_held_against_the_window():
    scorer = Scorer(windowed(300), budget=600)
    short, long = ([target_of([5] * length, [6], 2048)] for length in (20, 400))

    def packs(targets: list[Target]) -> bool:
        scorer.plan(targets)
        return scorer.packs

    assert packs(short)
    with pytest.warns(RankwiseWarning, match="RW573"):
        assert not packs(long)
    assert packs(short)


def test_the_first_look_at_a_model_makes_the_logits_of_one_row_at_a_time():
    length, vocabulary = 50, 4000
    targets = [target_of([5] * (length - 1) + [word], [6], 64) for word in range(4)]
    scorer = Scorer(tiny_llama(vocab_size=vocabulary), budget=1000)
    with StorageTracker() as tracker:
        tracker.enter("forward")
        scorer.plan(targets)
    [terms] = tracker.peaks().values()
    assert sum(terms.values()) < 2 * 4 * vocabulary * length
