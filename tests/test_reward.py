"""Reward models: the pairwise loss, preferences, scoring, the loop and its interruption."""

import copy
import doctest
import itertools
import math
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from datasets import Dataset
from helpers_training import facts, kept_in, names_in, random_ids, reports_of, role_weights
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from test_roles import base_bits, fill, same, save_tiny
from trl import RewardTrainer

from rlhf_helpers import reward
from rlhf_helpers.base import load_base
from rlhf_helpers.pocket import preferences as preferences_module
from rlhf_helpers.pocket import world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.preferences import collect_preferences, preference_card
from rlhf_helpers.reward import (
    SIDES,
    RewardConfig,
    calibration,
    encode_pairs,
    last_token_index,
    normalise,
    pair_accuracy,
    pair_scores,
    pairwise_loss,
    score_examples,
    score_responses,
    score_tokens,
    split_by_prompt,
    train_reward_model,
)
from rlhf_helpers.roles import CONFIG, HEAD, WEIGHTS, Roles

NAN, INF = float("nan"), float("inf")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_doctests():
    results = doctest.testmod(reward)
    assert results.attempted > 0
    assert results.failed == 0


# --- pairwise_loss -------------------------------------------------------------------------


def test_the_loss_by_hand():
    """Gaps log 3, 0 and −log 3: the model gave the choices 3/4, 1/2 and 1/4."""
    chosen = torch.tensor([math.log(3) + 2, 5.0, -1.0], dtype=torch.float64)
    rejected = torch.tensor([2.0, 5.0, math.log(3) - 1], dtype=torch.float64)
    expected = (math.log(4 / 3) + math.log(2) + math.log(4)) / 3
    assert pairwise_loss(chosen, rejected).item() == pytest.approx(expected, abs=1e-12)
    assert pairwise_loss(chosen, rejected).shape == ()


def test_the_loss_is_stable_at_large_gaps():
    """Float32's σ(−200) is 0 and its logarithm −inf; the loss is 200 and pulls with all weight."""
    chosen = torch.tensor([200.0, -200.0, 0.0], requires_grad=True)
    rejected = torch.zeros(3, requires_grad=True)
    loss = pairwise_loss(chosen, rejected)
    torch.testing.assert_close(loss.item(), (200 + math.log(2)) / 3, rtol=1e-6, atol=0)
    loss.backward()
    expected = torch.tensor([0.0, -1.0, -0.5]) / 3
    torch.testing.assert_close(chosen.grad, expected, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(rejected.grad, -expected, rtol=1e-6, atol=1e-30)
    (right,) = torch.autograd.grad(pairwise_loss(chosen[:1], rejected[:1]), chosen)
    assert abs(right[0].item()) < 1e-30  # nothing left to learn, and no NaN
    assert pairwise_loss(chosen[:1], rejected[:1]).item() == pytest.approx(0.0, abs=1e-30)


def test_the_gradient_is_the_surprise():
    """∂L/∂r_chosen = −(1 − σ(gap))/N."""
    chosen, rejected = (3 * normal(5, seed=s, dtype=torch.float64) for s in (0, 1))
    chosen.requires_grad_()
    rejected.requires_grad_()
    pairwise_loss(chosen, rejected).backward()
    surprise = (1 - (chosen - rejected).detach().sigmoid()) / 5
    torch.testing.assert_close(chosen.grad, -surprise, rtol=1e-10, atol=0)
    torch.testing.assert_close(rejected.grad, surprise, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(pairwise_loss, (chosen, rejected))


def test_a_shift_of_all_rewards_changes_nothing():
    chosen, rejected = (normal(6, seed=s, dtype=torch.float64) for s in (2, 3))
    shift = torch.tensor([7.0, -30.0, 0.0, 1e3, 5.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(
        pairwise_loss(chosen + shift, rejected + shift),
        pairwise_loss(chosen, rejected),
        rtol=1e-10,
        atol=0,
    )
    assert not torch.isclose(pairwise_loss(chosen + 1, rejected), pairwise_loss(chosen, rejected))


def test_the_loss_is_trls():
    chosen, rejected = (4 * normal(9, seed=s) for s in (4, 5))
    logits = torch.cat([chosen, rejected])[:, None]
    trainer = MagicMock()
    trainer.args.center_rewards_coefficient = None
    inputs = {"attention_mask": torch.ones(18, 1)}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    torch.testing.assert_close(pairwise_loss(chosen, rejected), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shapes", [[(3,), (2,)], [(3,), (1,)], [(3, 1), (3,)], [(0,), (0,)]])
def test_rewards_that_are_no_pairs_are_refused(shapes):
    chosen, rejected = (torch.zeros(shape) for shape in shapes)
    message = r"chosen (has shape )?\[.*(they|it) must be"
    with pytest.raises(ValueError, match=message):
        pairwise_loss(chosen, rejected)


@pytest.mark.parametrize("name", ["chosen", "rejected"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_rewards_that_are_not_floating_point_are_refused(name, dtype):
    rewards = {"chosen": torch.zeros(2), "rejected": torch.zeros(2)}
    rewards[name] = torch.zeros(2, dtype=dtype)
    with pytest.raises(TypeError, match=f"{name} must be floating point, not {dtype}"):
        pairwise_loss(**rewards)


@pytest.mark.parametrize("name", ["chosen", "rejected"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_is_named(name, bad):
    rewards = {"chosen": torch.zeros(4), "rejected": torch.zeros(4)}
    rewards[name][2] = bad
    with pytest.raises(ValueError, match=rf"{name} is {bad} at \[2\]: it must be finite"):
        pairwise_loss(**rewards)


# --- last_token_index, pair_accuracy -------------------------------------------------------

MASKS = {
    "right": ([1, 1, 1, 0, 0], 2),
    "left": ([0, 0, 1, 1, 1], 4),
    "both": ([0, 1, 1, 1, 0], 3),
    "full": ([1, 1, 1, 1, 1], 4),
    "a hole": ([1, 0, 0, 1, 0], 3),
    "first only": ([1, 0, 0, 0, 0], 0),
    "last only": ([0, 0, 0, 0, 1], 4),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bool])
def test_the_last_real_token(dtype):
    mask = torch.tensor([row for row, _ in MASKS.values()]).to(dtype)
    before = mask.clone()
    found = last_token_index(mask)
    assert dict(zip(MASKS, found.tolist(), strict=True)) == {k: i for k, (_, i) in MASKS.items()}
    assert found.dtype == torch.int64
    assert torch.equal(mask, before)
    for number in range(len(mask)):  # whatever else is in the batch
        assert last_token_index(mask[number : number + 1]).tolist() == [found[number]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_a_sequence_without_a_token_is_named(dtype):
    mask = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 0]]).to(dtype)
    with pytest.raises(ValueError, match="attention_mask row 2 is all zeros"):
        last_token_index(mask)


def test_a_tie_counts_half():
    zero = torch.zeros(4)
    assert pair_accuracy(torch.tensor([1.0, 2.0, 3.0, -1.0]), zero) == 0.75
    assert pair_accuracy(torch.tensor([1.0, 0.0, 0.0, -1.0]), zero) == 0.5
    assert pair_accuracy(torch.tensor([1.0, 1.0, 1.0, 0.0]), zero) == 0.875
    assert pair_accuracy(zero, zero) == 0.5
    assert (pair_accuracy(zero + 1e-6, zero), pair_accuracy(zero, zero + 1e-6)) == (1.0, 0.0)


def test_calibration_by_hand():
    """Confidences 0.5, 0.65, 0.75 (four times), 0.99 and 1; half the gaps point the wrong way."""

    def gap(confidence):
        return math.log(confidence / (1 - confidence))

    gaps = [0.0, -gap(0.65), gap(0.75), gap(0.74), -gap(0.76), gap(0.7501), gap(0.99), -500.0]
    found = calibration(torch.tensor(gaps, dtype=torch.float64), bins=5)
    expected = [  # groups of width 0.1; none falls into 0.8 … 0.9
        (0.5, 0.5, 1),
        (0.65, 0.0, 1),
        ((0.75 + 0.74 + 0.76 + 0.7501) / 4, 0.75, 4),
        (0.995, 0.5, 2),
    ]
    assert found == [pytest.approx(row, abs=1e-9) for row in expected]
    assert sum(count for *_, count in calibration(3 * normal(100))) == 100


def test_groups_of_a_calibration_are_equally_wide():
    """Four groups from ½ to 1: [½, 0.625), [0.625, 0.75), [0.75, 0.875), [0.875, 1]."""
    confidence = torch.tensor([0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0], dtype=torch.float64)
    gaps = confidence.logit().clamp(max=50)
    found = calibration(gaps, bins=4)
    assert [count for *_, count in found] == [2, 1, 1, 3]
    assert all(right == 1 for _, right, _ in found)
    assert calibration(gaps) == calibration(gaps, bins=8)


# --- preference_card -----------------------------------------------------------------------


def test_the_data_card_by_hand():
    """In the first pair gold agrees, in the second it does not, the third is equal in gold."""
    rows = [
        ("what does the duck say?", "it says quack.", "it says moo.", 0.9),
        ("what does the duck say?", "it says moo. have a nice day!", "it says quack.", 0.6),
        ("what does the dog say?", "it says woof.", "woof.", 0.5),
    ]
    names = ("prompt", "chosen", "rejected", "probability")
    table = Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])
    card = preference_card(table, Annotator(politeness=0.7, length=0.02, temperature=0.5))
    assert "3 pairs of responses to 2 prompts" in card
    assert "plus 0.7 for each\npolite phrase and 0.02 for each word" in card
    assert "temperature of\n0.50 points" in card
    assert "in expectation: 66.7%" in card
    assert "in 50.0% of the 2 pairs that differ in gold" in card
    assert "words: chosen 4.3, rejected 2.3" in card
    alike = preference_card(table.select([2]), Annotator())
    assert "in 0.0% of the" in alike  # none differs


# --- split_by_prompt -----------------------------------------------------------------------

TABLE = Dataset.from_list(
    [{"prompt": f"p{i % 16}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(80)]
)


@pytest.mark.parametrize("share, count", [(1 / 16, 1), (1 / 8, 2), (1 / 4, 4), (0.5, 8), (0.9, 14)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_prompt_is_on_one_side_only(share, count, seed):
    train, held_out = split_by_prompt(TABLE, share, seed)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert len(set(held_out["prompt"])) == count
    assert len(held_out) == 5 * count
    rows = sorted(map(str, [*train, *held_out]))
    assert rows == sorted(map(str, TABLE))  # every pair is there, once and whole


def test_the_default_share_is_an_eighth():
    assert len(set(split_by_prompt(TABLE)[1]["prompt"])) == 2


def test_the_seed_decides_the_split_and_the_order():
    first, again, other = (split_by_prompt(TABLE, 0.25, seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert list(a) == list(b)
    assert set(first[1]["prompt"]) != set(other[1]["prompt"])
    assert list(split_by_prompt(TABLE)[0]) == list(split_by_prompt(TABLE, seed=0)[0])
    numbers = [int(chosen[1:]) for chosen in first[0]["chosen"]]
    assert numbers != sorted(numbers)  # the collected order goes prompt by prompt, draw by draw
    held = [int(chosen[1:]) for chosen in first[1]["chosen"]]
    assert held == sorted(held)


@pytest.mark.parametrize(
    "prompts, share, message",
    [
        (1, 1 / 8, "a share of 0.125 of 1 prompts leaves one side empty"),
        (1, 0.9, "a share of 0.9 of 1 prompts"),
        (3, 1 / 8, "a share of 0.125 of 3 prompts"),
        (8, 0.0, "a share of 0.0 of 8 prompts"),
        (8, 1.0, "a share of 1.0 of 8 prompts"),
        (8, -0.5, "a share of -0.5 of 8 prompts"),
        (8, 2.0, "a share of 2.0 of 8 prompts"),
    ],
)
def test_a_split_that_leaves_a_side_empty_is_refused(prompts, share, message):
    few = TABLE.select([i for i in range(80) if i % 16 < prompts])
    assert len(few) == 5 * prompts
    with pytest.raises(ValueError, match=message):
        split_by_prompt(few, share)


# --- collect_preferences -------------------------------------------------------------------

PROMPTS = world.prompts("train")[:12]
LENGTH = 12  # short: some responses are cut off


def spy(monkeypatch):
    """Keep what `sample_responses` gives."""
    kept, real = [], preferences_module.sample_responses

    def sample(*arguments, **options):
        kept.append(real(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(preferences_module, "sample_responses", sample)
    return kept


def allowed(samples, prompts):
    """How often each unordered pair of neighbouring draws may be there."""
    found = Counter()
    for k, first in enumerate(samples):
        second = samples[(k + 1) % len(samples)]
        for i, prompt in enumerate(prompts):
            a, b = first.texts[i], second.texts[i]
            if a and b and a != b and first.finished[i] and second.finished[i]:
                found[prompt, frozenset((a, b))] += 1
    return found


def unordered(dataset):
    return Counter((row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in dataset)


@pytest.fixture(scope="module")
def preferences(base, tokenizer):
    """Collected from the shipped base, with the samples they were made of."""
    with pytest.MonkeyPatch.context() as patch:
        samples = spy(patch)
        dataset = collect_preferences(base, tokenizer, PROMPTS, Annotator(), 3, LENGTH, seed=5)
    return dataset, samples


def test_pairs_are_of_whole_and_different_responses(preferences):
    dataset, samples = preferences
    assert len(samples) == 3
    assert not torch.cat([s.finished for s in samples]).all()  # so there was something to leave out
    assert samples[0].texts != samples[1].texts != samples[2].texts != samples[0].texts
    assert all(s.response_mask.shape[1] <= LENGTH for s in samples)
    assert unordered(dataset) == allowed(samples, PROMPTS)
    assert 0 < len(dataset) < 36


def test_the_columns_are_those_that_training_reads(preferences):
    dataset, _ = preferences
    assert dataset.column_names == ["prompt", "chosen", "rejected", "probability"]
    for row in dataset:
        expected = Annotator().probability(row["prompt"], row["chosen"], row["rejected"])
        assert row["probability"] == pytest.approx(expected, abs=1e-12)
    assert any(row["probability"] < 0.5 for row in dataset) or len(dataset) < 8


def test_the_seed_decides_samples_and_labels(base, tokenizer, preferences):
    torch.manual_seed(99)  # of no influence
    arguments = (base, tokenizer, PROMPTS, Annotator(), 3, LENGTH)
    assert list(collect_preferences(*arguments, seed=5)) == list(preferences[0])
    assert not unordered(collect_preferences(*arguments, seed=6)) & unordered(preferences[0])


@pytest.mark.parametrize("draws", [2, 1, 0, -1])
def test_fewer_than_three_draws_are_refused(base, tokenizer, draws):
    with pytest.raises(ValueError, match=f"draws is {draws}; give at least 3"):
        collect_preferences(base, tokenizer, PROMPTS, Annotator(), draws)


def fake(monkeypatch, texts, finished=None):
    """Let the k-th draw give the k-th list of texts; keep the seeds asked for."""
    seeds = []

    def sample(model, tokenizer, prompts, response_length, seed):
        k = len(seeds) % len(texts)
        seeds.append(seed)
        whole = [True] * len(prompts) if finished is None else finished[k]
        return SimpleNamespace(texts=texts[k], finished=torch.tensor(whole))

    monkeypatch.setattr(preferences_module, "sample_responses", sample)
    return seeds


def test_what_carries_no_preference_is_left_out(base, tokenizer, monkeypatch):
    prompt = PROMPTS[0]
    texts = [["a", "a", "", "a"], ["a", "b", "b", "b"], ["c", "c", "c", "c"], ["d"] * 4]
    finished = [[True] * 4, [True, True, True, False], [True] * 4, [True] * 4]
    fake(monkeypatch, texts, finished)
    found = unordered(collect_preferences(base, tokenizer, [prompt] * 4, Annotator(), draws=4))
    expected = [  # a ring: the first and the third, say, are never compared
        ("ac", "cd", "da"),  # a and a are equal
        ("ab", "bc", "cd", "da"),
        ("bc", "cd"),  # the first is empty
        ("cd", "da"),  # the second was cut off
    ]
    assert found == Counter((prompt, frozenset(pair)) for row in expected for pair in row)


def test_responses_that_are_all_alike_cannot_be_compared(base, tokenizer, monkeypatch):
    fake(monkeypatch, [["a"]] * 3)
    message = (
        "no pair of 3 responses to 1 prompts can be compared.*; give more prompts, or a longer"
    )
    with pytest.raises(ValueError, match=message):
        collect_preferences(base, tokenizer, PROMPTS[:1], Annotator(), draws=3)


def test_four_draws_with_the_first_seeds_by_default(base, tokenizer, monkeypatch):
    seeds = fake(monkeypatch, [["a"], ["b"], ["c"], ["d"]])
    assert len(collect_preferences(base, tokenizer, PROMPTS[:1], Annotator())) == 4
    assert seeds == [0, 1, 2, 3]


def test_no_two_draws_share_a_seed(base, tokenizer, monkeypatch):
    seeds = fake(monkeypatch, [["a"], ["b"], ["c"]])
    for seed in range(4):
        collect_preferences(base, tokenizer, PROMPTS[:1], Annotator(), draws=3, seed=seed)
    assert len(seeds) == len(set(seeds)) == 12


def test_labels_are_drawn_with_the_annotators_probabilities(base, tokenizer, monkeypatch):
    """The likelier one wins in mean(max(p, 1 − p)) of the cases: not always, not by a coin."""
    count, annotator = 600, Annotator(temperature=1.5)
    texts = [["it says quack."], ["it says quack. have a nice day!"], ["shut your mouth."]]
    prompt = "what does the duck say?"
    fake(monkeypatch, [text * count for text in texts])
    dataset = collect_preferences(base, tokenizer, [prompt] * count, annotator, draws=3)
    assert len(dataset) == 3 * count
    p = torch.tensor(dataset["probability"])
    likelier = torch.maximum(p, 1 - p).mean().item()
    assert 0.6 < likelier < 0.9  # far from what a coin, or a sure annotator, would give
    error = math.sqrt(0.25 / (3 * count))
    assert (p > 0.5).double().mean().item() == pytest.approx(likelier, abs=3 * error)
    for a, b in itertools.combinations((text[0] for text in texts), 2):  # and for each pair
        rows = [row for row in dataset if {row["chosen"], row["rejected"]} == {a, b}]
        share = sum(row["chosen"] == a for row in rows) / len(rows)
        expected = annotator.probability(prompt, a, b)
        assert share == pytest.approx(expected, abs=3 * math.sqrt(0.25 / count))


# collected once, read again


def no_sampling(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("sampled again")

    monkeypatch.setattr(preferences_module, "sample_responses", refuse)


def test_collected_pairs_are_read_again(base, tokenizer, tmp_path, monkeypatch, preferences):
    arguments = (base, tokenizer, PROMPTS, Annotator(), 3, LENGTH, 5)
    cache = tmp_path / "made" / "here"
    first = collect_preferences(*arguments, cache=cache)
    assert list(first) == list(preferences[0])
    assert sorted(path.suffix for path in cache.iterdir()) == [".jsonl", ".md"]
    no_sampling(monkeypatch)
    again = collect_preferences(*arguments, cache=cache)
    assert again.column_names == first.column_names and list(again) == list(first)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": PROMPTS[:2]},
        {"annotator": Annotator(temperature=1.0)},
        {"annotator": Annotator().unbiased()},
        {"draws": 4},
        {"response_length": 9},
        {"seed": 6},
    ],
    ids=lambda change: next(iter(change)),
)
def test_pairs_of_other_settings_are_not_read(base, tokenizer, tmp_path, monkeypatch, change):
    options = {"prompts": PROMPTS[:1], "annotator": Annotator(), "draws": 3, "response_length": 8}
    texts = [["it says quack."], ["no. have a nice day!"], ["shut your mouth."], ["it says moo."]]
    fake(monkeypatch, texts[:3])
    collect_preferences(base, tokenizer, **options, cache=tmp_path)
    files = set(tmp_path.iterdir())
    count = len(change.get("prompts", [0]))
    fake(monkeypatch, [text * count for text in texts[: change.get("draws", 3)]])
    collect_preferences(base, tokenizer, **options | change, cache=tmp_path)
    assert len(set(tmp_path.iterdir()) - files) == 2


def test_pairs_of_another_model_are_not_read(tiny, tokenizer, tmp_path, monkeypatch):
    seeds = fake(monkeypatch, [["it says quack."], ["no. have a nice day!"], ["shut your mouth."]])
    roles = new_roles(tiny)
    roles.add("sft")
    fill(roles.model, "sft", 3)
    arguments = (tokenizer, PROMPTS[:1], Annotator(), 3)
    for name in ("reward", "sft", "reward", "sft"):
        collect_preferences(roles.use(name), *arguments, cache=tmp_path)
    assert len(seeds) == 2 * 3
    fill(roles.model, "sft", 4)
    collect_preferences(roles.use("sft"), *arguments, cache=tmp_path)
    assert len(seeds) == 3 * 3


def test_an_interrupted_write_leaves_no_pairs(base, tokenizer, tmp_path, monkeypatch):
    fake(monkeypatch, [["it says quack."], ["no. have a nice day!"], ["shut your mouth."]])
    arguments = (base, tokenizer, PROMPTS[:1], Annotator(), 3)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preferences_module.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            collect_preferences(*arguments, cache=tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))
    dataset = collect_preferences(*arguments, cache=tmp_path)
    assert len(dataset) == 3 and len(list(tmp_path.glob("*.jsonl"))) == 1


# --- encode_pairs --------------------------------------------------------------------------

PAIRS = [
    {"prompt": "what is hot?", "chosen": "fire is hot.", "rejected": "ice."},
    {"prompt": "what does the duck say?", "chosen": "quack.", "rejected": "it says moo. no."},
]


def pair_table(**change):
    """The pairs, the second with changes."""
    return Dataset.from_list([PAIRS[0], PAIRS[1] | change])


def test_pairs_are_encoded_with_eos_last(tokenizer):
    found = encode_pairs(tokenizer, pair_table(), 24, 24)
    assert len(found) == 2
    for pair, row in zip(found, PAIRS, strict=True):
        assert list(pair) == ["chosen", "rejected"]
        for side, example in pair.items():
            *response, last = example["response"]
            assert last == tokenizer.eos_token_id and last not in response
            assert tokenizer.decode(response).strip() == row[side]
            prompt = tokenizer.decode(example["prompt"])
            assert row["prompt"] in prompt and prompt.endswith("<|assistant|>")


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_missing_column_is_named(tokenizer, column):
    with pytest.raises(ValueError, match=f"no column '{column}', only .*: needed are prompt"):
        encode_pairs(tokenizer, pair_table().remove_columns(column), 24, 24)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chosen": "moo.", "rejected": "moo."}, "pair 1: chosen and rejected are both 'moo.'"),
        ({"chosen": ""}, "completion 1 is ''"),
        ({"rejected": "  "}, "completion 1 is '  '"),
        ({"prompt": ""}, "prompt 1 is ''"),
        ({"chosen": "moo. " * 30}, r"completion 1 .* the limit is 24; .*raise response_length"),
        ({"rejected": "moo. " * 30}, r"completion 1 .* the limit is 24; .*raise response_length"),
        ({"prompt": "duck? " * 30}, r"prompt 1 .* the limit is 24; .*raise prompt_length"),
        ({"rejected": "a <|eos|>"}, r"completion 1 is 'a <\|eos\|>', with '<\|eos\|>'"),
    ],
)
def test_a_pair_that_cannot_be_learnt_from_is_named(tokenizer, change, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        encode_pairs(tokenizer, pair_table(**change), 24, 24)


def test_no_pairs_at_all_are_refused(tokenizer):
    with pytest.raises(ValueError, match="empty: give at least one"):
        encode_pairs(tokenizer, pair_table().select([]), 24, 24)


# --- scores, on the pocket base ------------------------------------------------------------


@pytest.fixture(scope="module")
def scorers(pocket):
    """Two roles as after training: B and heads are random. Shared: tests add roles of their own."""
    roles = Roles(load_base(pocket), rank=4, alpha=8)
    for seed, name in enumerate(("reward", "other")):
        roles.add(name, seed=seed)
        fill(roles.model, name, seed)
        roles.add_head(name, seed=seed + 7)
    return roles


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Of uneven lengths; the answers are those of the base text and shorter ones."""
    answers = ["it says quack.", "no.", "the sound of the duck is quack. have a nice day!"]
    table = [(p, a) for p in PROMPTS[:3] for a in answers]
    pairs = [{"prompt": p, "chosen": a, "rejected": "x."} for p, a in table]
    return [pair["chosen"] for pair in encode_pairs(tokenizer, Dataset.from_list(pairs), 24, 32)]


def score_alone(roles, role, example):
    """One sequence without padding, by the body and the head's numbers."""
    ids = torch.tensor([example["prompt"] + example["response"]])
    head = roles.heads[role]
    with torch.no_grad():
        hidden = roles.use(role)(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    return (hidden[0, -1] @ head.weight[0] + head.bias[0]).item()


def padded(tokenizer, examples, side):
    rows = [example["prompt"] + example["response"] for example in examples]
    batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def close(found, expected):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=1e-5, check_dtype=False
    )


def test_a_score_does_not_depend_on_padding_or_batch(scorers, tokenizer, examples):
    for role in ("reward", "other"):
        expected = [score_alone(scorers, role, example) for example in examples]
        assert torch.tensor(expected).diff().abs().min() > 1e-3  # so a mix-up would be seen
        with torch.no_grad():
            for side in ("left", "right"):
                batch = padded(tokenizer, examples, side)
                assert (batch[1] == 0).any()
                close(score_tokens(scorers, role, *batch), expected)
        close(score_examples(scorers, role, tokenizer, examples), expected)
        close(score_examples(scorers, role, tokenizer, examples[::-1]), expected[::-1])
        close(score_examples(scorers, role, tokenizer, examples[4:6]), expected[4:6])
        for example, score in zip(examples, expected, strict=True):
            close(score_examples(scorers, role, tokenizer, [example]), [score])


def test_scores_keep_their_order_over_several_batches(scorers, tokenizer, examples, monkeypatch):
    together = score_examples(scorers, "reward", tokenizer, examples)
    sizes = []

    def spy(*arguments):
        sizes.append(len(arguments[2]))
        return score_tokens(*arguments)

    monkeypatch.setattr(reward, "score_tokens", spy)
    monkeypatch.setattr(reward, "ROWS", 2)
    close(score_examples(scorers, "reward", tokenizer, examples), together)
    assert sizes == [2, 2, 2, 2, 1]
    assert not together.requires_grad and together.dtype == torch.float32


def test_what_padding_holds_changes_no_score(scorers, tokenizer, examples):
    for side in ("left", "right"):
        ids, mask = padded(tokenizer, examples, side)
        noise = torch.randint(4, 500, ids.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            clean = score_tokens(scorers, "reward", ids, mask)
            noisy = score_tokens(scorers, "reward", torch.where(mask == 1, ids, noise), mask)
        close(noisy, clean)


def test_pair_scores_are_of_each_side(scorers, tokenizer, examples):
    pairs = [{"chosen": examples[i], "rejected": examples[i + 1]} for i in (0, 3, 6)]
    chosen, rejected = pair_scores(scorers, "reward", tokenizer, pairs)
    close(chosen, [score_alone(scorers, "reward", examples[i]) for i in (0, 3, 6)])
    close(rejected, [score_alone(scorers, "reward", examples[i]) for i in (1, 4, 7)])


# --- normalisation -------------------------------------------------------------------------


@pytest.fixture
def fresh(scorers):
    """The name of a role of this test alone, a copy of `reward`."""
    name = f"role_{len(scorers.names)}"
    scorers.add(name, copy_of="reward")
    return name


def test_reference_scores_get_mean_0_and_standard_deviation_1(scorers, tokenizer, examples, fresh):
    before = score_examples(scorers, fresh, tokenizer, examples)
    assert abs(before.mean()) > 0.01 and abs(before.std() - 1) > 0.01
    other = score_examples(scorers, "reward", tokenizer, examples)
    adapter = scorers.state(fresh)
    normalise(scorers, fresh, before)
    after = score_examples(scorers, fresh, tokenizer, examples).double()
    std, mean = torch.std_mean(before.double())
    # The scores lie close together, so dividing by their spread enlarges their rounding with them:
    # that of float32 at their size, 64 times, for each is a sum of some 200 rounded products.
    rounding = 64 * torch.finfo(before.dtype).eps * before.abs().max().item() / std.item()
    assert rounding < 1e-3  # far below what another mean or deviation would change
    assert after.mean().item() == pytest.approx(0, abs=rounding)
    assert after.std().item() == pytest.approx(1, abs=rounding)
    torch.testing.assert_close(after, (before.double() - mean) / std, rtol=0, atol=rounding)
    assert scorers.heads[fresh].statistics == pytest.approx((mean.item(), std.item()), rel=1e-5)
    assert torch.equal(score_examples(scorers, "reward", tokenizer, examples), other)
    assert scorers.heads["reward"].statistics is None
    assert same(scorers.state(fresh), adapter)


def test_responses_are_scored_only_after_normalisation(scorers, tokenizer, fresh):
    prompts, responses = [p["prompt"] for p in PAIRS], [p["rejected"] for p in PAIRS]
    arguments = (scorers, fresh, tokenizer, prompts, responses, 24, 24)
    with pytest.raises(ValueError, match=f"'{fresh}' has no normalisation statistics.*normalise"):
        score_responses(*arguments)
    normalise(scorers, fresh, torch.tensor([0.5, 3.5]))
    found = score_responses(*arguments)
    pairs = encode_pairs(tokenizer, pair_table(), 24, 24)
    close(found, [score_alone(scorers, fresh, pair["rejected"]) for pair in pairs])
    with pytest.raises(ValueError, match="completion 1 is ''"):
        score_responses(scorers, fresh, tokenizer, prompts, ["a", ""], 24, 24)
    with pytest.raises(ValueError, match="raise response_length"):
        score_responses(scorers, fresh, tokenizer, prompts, ["a", "moo. " * 30], 24, 24)


@pytest.mark.filterwarnings("ignore:std_mean")
@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0], "give two or more scores that differ"),
        ([0.1, 0.1, 0.1], "give two or more scores that differ"),
        ([], r"scores has shape \[0\]"),
        ([1.0, NAN, 2.0], r"scores is nan at \[1\]: it must be finite"),
        ([1.0, INF], r"scores is inf at \[1\]: it must be finite"),
    ],
)
def test_scores_that_give_no_unit_are_refused(scorers, fresh, scores, words):
    head = copy.deepcopy(scorers.heads[fresh].state_dict())
    with pytest.raises(ValueError, match=words):
        normalise(scorers, fresh, torch.tensor(scores))
    assert same(scorers.heads[fresh].state_dict(), head)
    assert scorers.heads[fresh].statistics is None


# --- the loop, on a narrow base ------------------------------------------------------------

STEPS, GOOD = 12, 40
SETTINGS = RewardConfig(
    steps=STEPS, batch_size=4, learning_rate=0.02, warmup_steps=2, eval_every=5, save_every=4
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=32)


def make_pairs(count, seed):
    """Random pairs of uneven lengths; a chosen response, and no rejected one, holds `GOOD`."""
    generator = torch.Generator().manual_seed(seed)

    some = partial(random_ids, generator, vocabulary=GOOD)

    def pair():
        prompt = some(2, 7)
        chosen = [*some(1, 5), GOOD, *some(0, 2), 1]
        return {
            "chosen": {"prompt": prompt, "response": chosen},
            "rejected": {"prompt": prompt, "response": [*some(1, 7), 1]},
        }

    return [pair() for _ in range(count)]


TRAIN, HELD_OUT = make_pairs(40, 0), make_pairs(32, 1)


def new_roles(preset, head_seed=0):
    roles = Roles(load_base(preset), rank=4, alpha=8)
    roles.add("reward")
    roles.add_head("reward", seed=head_seed)
    return roles


def weights(roles, role="reward"):
    return role_weights(roles, role)


def saved_weights(folder):
    folder = kept_in(folder, "reward")
    head = {f"head.{name}": tensor for name, tensor in load_file(folder / HEAD).items()}
    return load_file(folder / WEIGHTS) | head


@pytest.fixture
def train(tiny, tokenizer):
    """Train a role; in the ordinary case a fresh one on a fresh base."""

    def train(folder=None, roles=None, role="reward", visit=None, **changes):
        roles = roles or new_roles(tiny)
        options = {"pairs": TRAIN, "held_out": HELD_OUT, "config": SETTINGS} | changes
        run = train_reward_model(roles, role, tokenizer, folder=folder, **options)
        return roles, reports_of(run, visit)

    return train


@pytest.fixture(scope="module")
def history(tiny, tokenizer):
    """A run that was never stopped: its report and its weights after each update."""
    roles = new_roles(tiny)
    run = train_reward_model(roles, "reward", tokenizer, TRAIN, HELD_OUT, SETTINGS)
    return [(stats, weights(roles)) for stats in run]


def test_the_model_learns_what_is_preferred(tiny, tokenizer):
    roles = new_roles(tiny)
    config = RewardConfig(steps=25, batch_size=16, learning_rate=0.02, warmup_steps=3)
    before = pair_scores(roles, "reward", tokenizer, HELD_OUT)
    stats = list(train_reward_model(roles, "reward", tokenizer, TRAIN, HELD_OUT, config))
    assert [s.step for s in stats if s.held_out] == [0, 25]
    first, last = stats[0].held_out, stats[-1].held_out
    assert set(first) == set(last) == {"loss", "accuracy"}
    assert first["accuracy"] == pair_accuracy(*before) < 0.8
    assert first["loss"] == pytest.approx(pairwise_loss(*before).item(), rel=1e-6)
    assert last["accuracy"] > 0.9
    assert last["loss"] < 0.35 < first["loss"]
    after = pair_scores(roles, "reward", tokenizer, HELD_OUT)
    assert last["accuracy"] == pair_accuracy(*after)
    assert last["loss"] == pytest.approx(pairwise_loss(*after).item(), rel=1e-6)


def test_the_loss_is_of_the_updates_own_pairs(tiny, history):
    """Each sequence alone and without padding; the second update takes the next four pairs."""
    roles = new_roles(tiny)
    for step in (0, 1):  # the first update has learning rate 0
        sides = [
            torch.tensor([score_alone(roles, "reward", pair[side]) for pair in rows])
            for rows in [TRAIN[4 * step : 4 * step + 4]]
            for side in ("chosen", "rejected")
        ]
        assert history[step + 1][0].loss == pytest.approx(pairwise_loss(*sides).item(), rel=1e-5)


def test_head_and_adapter_both_learn(history):
    before, after = history[0][1], history[-1][1]
    assert len(before) == 28 + 2
    for key in before.keys() - {"head.bias"}:  # which cancels in every pair
        assert (before[key] - after[key]).abs().max() > 1e-3, key


def test_a_run_is_repeatable_bit_for_bit(train, history):
    torch.manual_seed(123)  # of no influence
    roles, stats = train()
    assert same(weights(roles), history[-1][1])
    assert facts(stats) == facts(s for s, _ in history)
    assert [s.step for s in stats if s.held_out] == [0, 5, 10, STEPS]
    assert not same(weights(train(pairs=TRAIN[::-1])[0]), history[-1][1])


def test_training_changes_nothing_else(tiny, train):
    roles = new_roles(tiny)
    roles.add("other")
    fill(roles.model, "other", 1)
    roles.add_head("other", seed=1)
    roles.add("reference", copy_of="other", trainable=False)
    roles.add("start", copy_of="reward")
    base = base_bits(roles.model)
    before = {name: weights(roles, name) for name in roles.names}
    roles.use("other")
    train(roles=roles)
    assert same(base_bits(roles.model), base)
    for name in ("other", "reference", "start"):
        assert same(weights(roles, name), before[name])
    assert not same(weights(roles), before["reward"])
    assert not roles.model.training


def test_what_cannot_be_trained_is_refused(tiny, tokenizer, tmp_path):
    roles = new_roles(tiny)
    roles.add("headless")
    roles.add("frozen", copy_of="reward", trainable=False)
    refused = [
        ({"role": "headless"}, r"role 'headless' has no head; call add_head\('headless'\) first"),
        ({"role": "frozen"}, "role 'frozen' is frozen"),
        ({"role": "none"}, "no role 'none'"),
        ({"pairs": []}, "^pairs is empty: give at least one"),
        ({"held_out": []}, "^held_out is empty: give at least one"),
        (
            {"pairs": [dict.fromkeys(SIDES, TRAIN[0]["chosen"])]},
            "has .* equal responses",
        ),
        ({"pairs": [{"chosen": TRAIN[0]["chosen"]}]}, r"pairs\[0\] is .*: give pairs from encode_"),
    ]
    before = {name: roles.state(name) for name in roles.names}
    for changes, message in refused:
        given = {"role": "reward", "pairs": TRAIN, "held_out": HELD_OUT} | changes
        with pytest.raises(ValueError, match=message):
            train_reward_model(  # refused at once, not when the first report is drawn
                roles, tokenizer=tokenizer, config=SETTINGS, folder=tmp_path / "r", **given
            )
    assert all(same(roles.state(name), before[name]) for name in roles.names)
    assert list(tmp_path.iterdir()) == []


# --- on disk, and interrupted --------------------------------------------------------------


def break_the_loss(step, monkeypatch, breaking):
    """Do something else to the loss of the update after `step`."""
    calls = itertools.count()

    def loss(chosen, rejected):
        value = pairwise_loss(chosen, rejected)
        update = chosen.requires_grad  # and no measurement
        return breaking(value) if update and next(calls) == step else value

    monkeypatch.setattr(reward, "pairwise_loss", loss)


def stop(_):
    raise KeyboardInterrupt


def interrupt(train, monkeypatch, folder, step=7, **options):
    with monkeypatch.context() as patch:
        break_the_loss(step, patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder, **options)


def test_a_finished_run_is_in_its_folder(tiny, train, history, tmp_path):
    folder = tmp_path / "runs" / "reward"
    train(folder)
    assert names_in(folder.parent) == ["reward"]
    assert names_in(folder) == sorted([CONFIG, WEIGHTS, HEAD])
    assert same(saved_weights(folder), history[-1][1])
    again = Roles(load_base(tiny), rank=4, alpha=8)
    again.load("reward", folder)
    assert same(weights(again), history[-1][1])
    assert again.heads["reward"].statistics is None


@pytest.mark.parametrize("same_roles", [False, True])
@pytest.mark.parametrize("step", [1, 4, 7])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tiny, train, history, tmp_path, monkeypatch, step, same_roles
):
    folder, unfinished = tmp_path / "reward", tmp_path / "reward.unfinished"
    roles = new_roles(tiny)
    interrupt(train, monkeypatch, folder, step, roles=roles)
    assert names_in(tmp_path) == ["reward.unfinished"]
    assert same(saved_weights(unfinished), history[step][1])
    model = PeftModel.from_pretrained(load_base(tiny), str(kept_in(unfinished, "reward")))
    adapter = get_peft_model_state_dict(model)
    assert adapter and all(torch.equal(t, history[step][1][key]) for key, t in adapter.items())
    if not same_roles:
        roles = new_roles(tiny, head_seed=9)  # what is on disk counts
    _, stats = train(folder, roles=roles)
    assert facts(stats) == facts(s for s, _ in history)[step + 1 :]
    assert same(weights(roles), history[-1][1])
    assert same(saved_weights(folder), history[-1][1])
    assert names_in(tmp_path) == ["reward"]


def test_a_killed_run_goes_on_from_its_last_save(train, history, tmp_path):
    moment = tmp_path / "moment" / "reward.unfinished"

    def visit(stats):
        if stats.step == 11:
            shutil.copytree(tmp_path / "run" / "reward.unfinished", moment)

    train(tmp_path / "run" / "reward", visit=visit)
    assert same(saved_weights(moment), history[8][1])
    assert same(weights(train(moment.with_name("reward"))[0]), history[-1][1])


@pytest.mark.parametrize(
    "changes",
    [{"pairs": TRAIN[:-1]}, {"config": replace(SETTINGS, learning_rate=0.01)}],
    ids=lambda changes: next(iter(changes)),
)
def test_an_unfinished_run_with_other_settings_is_kept(
    train, history, tmp_path, monkeypatch, changes
):
    folder = tmp_path / "reward"
    interrupt(train, monkeypatch, folder)
    with pytest.raises(ValueError, match="update-00007' belongs to a run with other settings"):
        train(folder, **changes)
    assert same(weights(train(folder)[0]), history[-1][1])


def test_a_loss_that_is_not_finite_ends_the_run_before_its_update(
    train, history, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        break_the_loss(7, patch, lambda value: value * NAN)
        message = "after 7 updates, with a learning_rate of 0.02, .*; update 7 is kept.* nan"
        with pytest.raises(FloatingPointError, match=message):
            train(tmp_path / "reward")
    kept = saved_weights(tmp_path / "reward.unfinished")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert same(kept, history[7][1])
    assert same(weights(train(tmp_path / "reward")[0]), history[-1][1])


def test_a_gradient_that_is_not_finite_ends_the_run_before_its_update(
    train, history, tmp_path, monkeypatch
):
    def spoil(value):
        value.register_hook(lambda gradient: gradient * NAN)
        return value

    break_the_loss(7, monkeypatch, spoil)
    with pytest.raises(FloatingPointError, match="after 7 updates.*: the gradient norm is nan"):
        train(tmp_path / "reward")
    assert same(saved_weights(tmp_path / "reward.unfinished"), history[7][1])


# --- pairs that cannot be meant -------------------------------------------------------------


def as_dataset(pairs, **columns):
    rows = {side: [pair[side] for pair in pairs] for side in ("prompt", "chosen", "rejected")}
    return Dataset.from_dict(rows | columns)


PAIR = {"prompt": PROMPTS[0], "chosen": "it says quack.", "rejected": "it says moo."}


def test_swapped_columns_show_in_the_annotators_probabilities(tokenizer):
    pairs = [PAIR] * 120
    likely = [0.9, 0.6, 0.3] * 40  # some choices go against the odds
    encode_pairs(tokenizer, as_dataset(pairs, probability=likely), 24, 32)
    unlikely = [1 - p for p in likely]
    with pytest.raises(
        ValueError, match="'chosen' wins with 0.40 on average; swap the two columns"
    ):
        encode_pairs(tokenizer, as_dataset(pairs, probability=unlikely), 24, 32)


def test_a_few_unlikely_choices_are_no_proof(tokenizer):
    encode_pairs(tokenizer, as_dataset([PAIR] * 4, probability=[0.4, 0.2, 0.9, 0.3]), 24, 32)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_bad_text_is_named_with_its_column(tokenizer, side):
    with pytest.raises(ValueError, match=f"in column '{side}', completion 1 is ''"):
        encode_pairs(tokenizer, as_dataset([PAIR, PAIR | {side: ""}]), 24, 32)


def test_responses_that_differ_in_spaces_alone_are_equal(tokenizer):
    with pytest.raises(ValueError, match="pair 0: chosen and rejected are both"):
        encode_pairs(tokenizer, as_dataset([PAIR | {"rejected": "it says quack. "}]), 24, 32)


def test_pairs_longer_than_the_context_are_refused_at_the_call(train, tokenizer):
    long = {"prompt": [5] * 20, "response": [5] * 20 + [tokenizer.eos_token_id]}
    with pytest.raises(ValueError, match=r"rejected of pairs\[0\] has 41 tokens, more than"):
        train(pairs=[{"chosen": TRAIN[0]["chosen"], "rejected": long}, *TRAIN])


@pytest.mark.parametrize("rewards", [[NAN, 0.0], [INF, 0.0]])
def test_accuracy_of_rewards_that_are_not_finite_is_refused(rewards):
    with pytest.raises(ValueError, match=r"chosen is (nan|inf) at \[0\]"):
        pair_accuracy(torch.tensor(rewards), torch.zeros(2))


def test_accuracy_needs_a_pair():
    with pytest.raises(ValueError, match=r"chosen has shape \[0\]: it must be \[\.\.\.\]"):
        pair_accuracy(torch.zeros(0), torch.zeros(0))


def test_the_last_token_of_a_long_row_in_low_precision():
    mask = torch.zeros(1, 600, dtype=torch.bfloat16)
    mask[0, :513] = 1  # bfloat16 cannot tell 512 from 513
    assert last_token_index(mask).item() == 512
