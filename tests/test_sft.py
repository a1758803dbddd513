"""Supervised fine-tuning: labels, loss, the loop and its interruption."""

import itertools
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers_training import facts, kept_in, names_in, press, random_ids, reports_of
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from test_roles import base_bits, fill, same, save_tiny

from rlhf_helpers import sft
from rlhf_helpers.base import load_base
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import CONFIG, WEIGHTS, Roles
from rlhf_helpers.sft import (
    IGNORE,
    SFTConfig,
    batch_loss,
    held_out_loss,
    mask_prompt,
    sft_loss,
    train_sft,
)
from rlhf_helpers.sources import sft_dataset
from rlhf_helpers.text import encode_examples, pad_examples
from rlhf_helpers.training import TrainStats

# --- mask_prompt ---------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7, 1, 0], [0, 6, 8, 9, 1]])  # 0 is padding, 1 is EOS
MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    "prompt_length, labels",
    [
        (1, [[-100, 6, 7, 1, -100], [-100, 6, 8, 9, 1]]),
        (2, [[-100, -100, 7, 1, -100], [-100, -100, 8, 9, 1]]),
        (3, [[-100, -100, -100, 1, -100], [-100, -100, -100, 9, 1]]),
    ],
)
def test_labels_are_the_response_with_eos_and_nothing_else(prompt_length, labels):
    ids, mask = IDS.clone(), MASK.clone()
    found = mask_prompt(ids, mask, prompt_length)
    assert found.tolist() == labels
    assert found.dtype == torch.int64
    assert torch.equal(ids, IDS) and torch.equal(mask, MASK)


def test_the_mask_decides_what_is_padding_not_the_token(tokenizer):
    """With a tokenizer whose padding is EOS, the response's own EOS is still learnt."""
    ids = torch.tensor([[5, 6, 7, 1, 1]])
    assert mask_prompt(ids, torch.tensor([[1, 1, 1, 1, 0]]), 2).tolist() == [
        [-100, -100, 7, 1, -100]
    ]


@pytest.mark.parametrize(
    "ids, mask, prompt_length, message",
    [
        (IDS, MASK, 0, "prompt_length is 0: it must be a whole"),
        (IDS, MASK, -1, "prompt_length is -1"),
        (IDS, MASK, 5, "prompt_length is 5 .*at most 4"),
        (IDS, MASK, 6, "prompt_length is 6"),
        (IDS, MASK, 4, r"labels in a row is 0 at \[0\]"),
        (IDS, torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 0, 0]]), 2, r"in a row is 0 at \[1\]"),
        (IDS, MASK[:, :4], 2, r"attention_mask has shape \[2, 4\], input_ids \[2, 5\]"),
        (IDS[0], MASK[0], 2, r"input_ids has shape \[5\]"),
        (IDS[None], MASK[None], 2, r"input_ids has shape \[1, 2, 5\]"),
    ],
)
def test_what_gives_no_labels_is_refused(ids, mask, prompt_length, message):
    with pytest.raises(ValueError, match=message):
        mask_prompt(ids, mask, prompt_length)


# --- sft_loss ------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """Probabilities 1/2, 1/8 and 3/4 at the labelled tokens."""
    p = [[0.5, 0.25, 0.25], [0.125, 0.375, 0.5], [0.1, 0.2, 0.7], [0.75, 0.125, 0.125]]
    logits = torch.tensor([p[:3], [p[2], p[3], p[0]]], dtype=torch.float64).log()
    labels = torch.tensor([[IGNORE, 0, 0], [IGNORE, IGNORE, 0]])
    expected = -(torch.tensor([0.5, 0.125, 0.75], dtype=torch.float64).log().sum() / 3)
    torch.testing.assert_close(sft_loss(logits, labels), expected, rtol=1e-12, atol=0)
    shifted = logits + torch.tensor([3.0, -50.0]).double()[:, None, None]
    torch.testing.assert_close(sft_loss(shifted, labels), expected, rtol=1e-12, atol=0)


def test_the_loss_is_the_one_that_transformers_computes(base, tokenizer, pocket):
    examples = encode_examples(tokenizer, sft_dataset(pocket).select(range(6)), 24, 40)
    ids, mask, prompt_length = pad_examples(tokenizer, examples)
    labels = mask_prompt(ids, mask, prompt_length)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = base(input_ids=ids, attention_mask=mask, position_ids=position_ids, labels=labels)
    torch.testing.assert_close(sft_loss(out.logits, labels), out.loss, rtol=1e-6, atol=1e-6)


def test_the_losses_gradient_is_right():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([[IGNORE, IGNORE, 3, 1], [IGNORE, 0, 4, IGNORE]])
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, labels), logits)
    (gradient,) = torch.autograd.grad(sft_loss(logits, labels), logits)
    counted = gradient.abs().sum(-1) > 0
    assert counted.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_no_label_at_all_is_refused():
    with pytest.raises(ValueError, match="all labels are -100: nothing to learn from"):
        sft_loss(torch.zeros(1, 3, 4), torch.full((1, 3), IGNORE))
    with pytest.raises(ValueError, match="nothing to learn"):  # the first has nothing before it
        sft_loss(torch.zeros(1, 3, 4), torch.tensor([[2, IGNORE, IGNORE]]))


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2, 4), (3,), (2, 3, 1)])
def test_shapes_that_do_not_match_are_refused(shape):
    with pytest.raises(ValueError, match=r"labels has shape .* must be"):
        sft_loss(torch.zeros(2, 3, 4), torch.zeros(shape, dtype=torch.int64))


# --- batch_loss and held_out_loss ----------------------------------------------------------


@pytest.fixture(scope="module")
def demonstrations(pocket, tokenizer):
    return encode_examples(tokenizer, sft_dataset(pocket).select(range(160)), 24, 40)


def single_loss(model, example):
    """One example without padding or any of the functions tested: (sum of -log p, tokens)."""
    prompt, response = example["prompt"], example["response"]
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    rows = logprobs[len(prompt) - 1 : -1]
    return -rows[torch.arange(len(response)), torch.tensor(response)].sum().item(), len(response)


def by_length(examples):
    return sorted(examples, key=lambda e: (len(e["prompt"]), len(e["response"])))


def test_a_batchs_loss_is_that_of_its_examples_alone(base, tokenizer, demonstrations):
    rows = by_length(demonstrations)
    rows = [rows[0], rows[-1], *demonstrations[:4]]
    assert len({len(row["prompt"]) for row in rows}) > 2
    sums, counts = zip(*(single_loss(base, row) for row in rows), strict=True)
    with torch.no_grad():
        found = batch_loss(base, tokenizer, rows).item()
        short = batch_loss(base, tokenizer, rows[:1]).item()
    assert found == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert short == pytest.approx(sums[0] / counts[0], rel=1e-5)


def test_the_model_is_told_where_the_padding_is(tokenizer):
    """Positions count from the first real token: it matters for models with absolute positions."""
    given = {}

    class Model:
        device, config = "cpu", SimpleNamespace(vocab_size=10)

        def __call__(self, **inputs):
            given.update(inputs)
            return SimpleNamespace(logits=torch.zeros(2, inputs["logits_to_keep"], 10))

    examples = [{"prompt": [5, 6], "response": [8, 1]}, {"prompt": [7], "response": [9, 9, 1]}]
    loss = batch_loss(Model(), tokenizer, examples)
    assert loss.item() == pytest.approx(math.log(10))
    assert given["input_ids"].tolist() == [[5, 6, 8, 1, 0], [0, 7, 9, 9, 1]]
    assert given["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert given["position_ids"].tolist() == [[0, 1, 2, 3, 3], [0, 0, 1, 2, 3]]
    assert given["logits_to_keep"] == 4  # from the last prompt token on


def test_a_batchs_loss_is_that_of_all_logits(base, tokenizer, demonstrations):
    ids, mask, prompt_length = pad_examples(tokenizer, demonstrations[:5])
    labels = mask_prompt(ids, mask, prompt_length)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = base(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
        found = batch_loss(base, tokenizer, demonstrations[:5])
    torch.testing.assert_close(found, sft_loss(logits, labels), rtol=1e-6, atol=1e-6)


def test_ignored_labels_and_padded_tokens_change_nothing(
    base, tokenizer, demonstrations, monkeypatch
):
    rows = demonstrations[:4]
    ids, mask, prompt_length = pad_examples(tokenizer, rows)
    assert (mask[:, 0] == 0).any() and (mask[:, -1] == 0).any()  # padding on both sides
    noise = torch.randint(4, 1000, ids.shape, generator=torch.Generator().manual_seed(0))
    noisy = torch.where(mask == 1, ids, noise)
    assert not torch.equal(noisy, ids)
    with torch.no_grad():
        clean = batch_loss(base, tokenizer, rows)
        monkeypatch.setattr(sft, "pad_examples", lambda *_: (noisy, mask, prompt_length))
        assert torch.equal(batch_loss(base, tokenizer, rows), clean)
        noisy = noisy.clone()
        noisy[0, prompt_length] = 5  # a token that counts
        assert not torch.equal(batch_loss(base, tokenizer, rows), clean)


def test_ignored_targets_change_nothing():
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[IGNORE, IGNORE, 3, 1]])
    other = logits.clone()
    other[:, 0] = 7.0  # predicts an ignored token
    other[:, 3] = -7.0  # predicts what comes after the end
    assert torch.equal(sft_loss(other, labels), sft_loss(logits, labels))


def everything(input_ids, attention_mask, prompt_length):
    """Labels that lesson 01 tries: the prompt is learnt too."""
    return input_ids.masked_fill(attention_mask == 0, IGNORE)


def test_a_batchs_loss_takes_other_labels(base, tokenizer, demonstrations):
    rows = demonstrations[:4]
    ids, mask, prompt_length = pad_examples(tokenizer, rows)
    labels = everything(ids, mask, prompt_length)
    labels[range(4), mask.argmax(-1)] = IGNORE  # nothing stands before a row's first token
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = base(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
        found = batch_loss(base, tokenizer, rows, everything)
        assert not torch.isclose(found, batch_loss(base, tokenizer, rows))
    torch.testing.assert_close(found, sft_loss(logits, labels), rtol=1e-6, atol=1e-6)


def test_the_held_out_loss_weighs_tokens_not_batches(base, tokenizer, demonstrations):
    rows = by_length(demonstrations)[::23]
    assert len(rows) == 7
    sums, counts = zip(*(single_loss(base, row) for row in rows), strict=True)
    expected = sum(sums) / sum(counts)
    means = [s / c for s, c in zip(sums, counts, strict=True)]
    assert abs(sum(means) / 7 - expected) > 1e-3  # so a plain mean would be seen
    for batch_size in (1, 2, 3, 7, 128):
        assert held_out_loss(base, tokenizer, rows, batch_size) == pytest.approx(expected, rel=1e-5)


# --- settings ------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls():
    config = SFTConfig(steps=10, warmup_steps=4, learning_rate=0.8)
    rates = [config.rate(step) for step in range(11)]
    expected = [0, 0.2, 0.4, 0.6, 0.8, 2 / 3, 1.6 / 3, 0.4, 0.8 / 3, 0.4 / 3, 0]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_the_learning_rate_is_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    config = SFTConfig()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
    for step in range(config.steps):
        assert config.rate(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps is 0: it must be a whole number, at least 1"),
        ({"steps": -3}, "steps is -3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"warmup_steps": 0}, "warmup_steps is 0"),
        ({"steps": 10}, "warmup_steps is 10 of 10 steps; give fewer"),
    ],
)
def test_settings_that_make_no_run_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**settings)


# --- training the pocket base --------------------------------------------------------------


def test_the_loss_goes_down_on_the_pocket_base(pocket, tokenizer, demonstrations):
    roles = Roles(load_base(pocket))
    roles.add("sft")
    held_out = encode_examples(tokenizer, sft_dataset(pocket, "held_out", copies=1), 24, 40)[:32]
    config = SFTConfig(steps=15, batch_size=8, warmup_steps=2, eval_every=10)
    stats = list(train_sft(roles, "sft", tokenizer, demonstrations, held_out, config))
    assert [s.step for s in stats] == list(range(16))
    measured = {s.step: s.held_out["loss"] for s in stats if s.held_out}
    assert sorted(measured) == [0, 10, 15]
    assert measured[0] == pytest.approx(held_out_loss(load_base(pocket), tokenizer, held_out))
    assert measured[15] == held_out_loss(roles.model, tokenizer, held_out)
    assert measured[15] < measured[10] < measured[0] - 0.1
    first = sft_loss_of(load_base(pocket), tokenizer, demonstrations[:8])
    assert stats[1].loss == pytest.approx(first, rel=1e-5)  # before the update
    assert [s.learning_rate for s in stats[1:]] == [config.rate(k) for k in range(15)]
    assert all(s.grad_norm > 0 for s in stats[1:])
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(stats))
    assert (stats[0].loss, stats[0].grad_norm, stats[0].learning_rate) == (None, None, 0.0)


def sft_loss_of(model, tokenizer, rows):
    with torch.no_grad():
        return batch_loss(model, tokenizer, rows).item()


# --- the loop, on a narrow base ------------------------------------------------------------

STEPS = 12
SETTINGS = SFTConfig(
    steps=STEPS, batch_size=3, learning_rate=0.02, warmup_steps=2, eval_every=5, save_every=4
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=32)


def rows(count, seed):
    """Random examples of uneven lengths, with the pocket tokenizer's EOS."""
    generator = torch.Generator().manual_seed(seed)

    some = partial(random_ids, generator, vocabulary=64)
    return [{"prompt": some(2, 7), "response": [*some(1, 6), 1]} for _ in range(count)]


EXAMPLES, HELD_OUT = rows(10, 0), rows(4, 1)


def new_roles(preset):
    roles = Roles(load_base(preset), rank=4, alpha=8)
    roles.add("sft")
    return roles


@pytest.fixture
def train(tiny, tokenizer):
    """Train a role; in the ordinary case a fresh one on a fresh base."""

    def train(folder=None, roles=None, role="sft", visit=None, **changes):
        roles = roles or new_roles(tiny)
        options = {"examples": EXAMPLES, "held_out": HELD_OUT, "config": SETTINGS} | changes
        run = train_sft(roles, role, tokenizer, folder=folder, **options)
        return roles, reports_of(run, visit)

    return train


@pytest.fixture(scope="module")
def history(tiny, tokenizer):
    """A run that was never stopped: its report and its weights after each update."""
    roles = new_roles(tiny)
    run = train_sft(roles, "sft", tokenizer, EXAMPLES, HELD_OUT, SETTINGS)
    return [(stats, roles.state("sft")) for stats in run]


@pytest.fixture(scope="module")
def states(history):
    return [state for _, state in history]


@pytest.fixture(scope="module")
def straight(history):
    """The weights at the end of a run that was never stopped, and its reports."""
    return history[-1][1], [stats for stats, _ in history]


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_run_is_repeatable_bit_for_bit(train, straight):
    torch.manual_seed(123)  # of no influence
    roles, stats = train()
    assert same(roles.state("sft"), straight[0])
    assert facts(stats) == facts(straight[1])
    other, _ = train(examples=EXAMPLES[::-1])
    assert not same(other.state("sft"), straight[0])


def test_the_reports_say_when_the_held_out_loss_was_measured(straight):
    assert [s.step for s in straight[1]] == list(range(STEPS + 1))
    assert [s.step for s in straight[1] if s.held_out] == [0, 5, 10, 12]
    assert isinstance(straight[1][0], TrainStats)


def test_examples_are_taken_in_their_order_and_again(train, monkeypatch):
    seen = []

    def spy(model, tokenizer, rows, *labels):
        if labels:
            seen.append(rows)
        return batch_loss(model, tokenizer, rows, *labels)

    monkeypatch.setattr(sft, "batch_loss", spy)
    train()
    order = [row for batch in seen for row in batch]
    assert [len(batch) for batch in seen] == [3] * STEPS
    assert order == (EXAMPLES * 4)[: 3 * STEPS]


def test_nothing_runs_before_the_first_report_is_drawn(tiny, tokenizer):
    roles = new_roles(tiny)
    before = roles.state("sft")
    run = train_sft(roles, "sft", tokenizer, EXAMPLES, HELD_OUT, SETTINGS)
    assert same(roles.state("sft"), before)
    assert next(run).step == 0
    assert same(roles.state("sft"), before)
    assert [next(run).step, next(run).step] == [1, 2]
    assert not same(roles.state("sft"), before)


def test_one_update_is_adams_after_scaling_the_gradient(tiny, tokenizer):
    """The loop's second update, worked out with autograd and Adam's formula."""
    config = SFTConfig(
        steps=3, batch_size=3, learning_rate=0.02, warmup_steps=1, max_grad_norm=0.01
    )
    roles, by_hand = new_roles(tiny), new_roles(tiny)
    stats = list(
        itertools.islice(train_sft(roles, "sft", tokenizer, EXAMPLES, HELD_OUT, config), 3)
    )
    weights = by_hand.parameters("sft")
    values = list(weights.values())
    m, v = ([torch.zeros_like(p) for p in values] for _ in range(2))
    model = by_hand.use("sft")
    for step in (0, 1):
        loss = batch_loss(model, tokenizer, (EXAMPLES * 2)[3 * step : 3 * step + 3])
        grads = torch.autograd.grad(loss, values)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert stats[step + 1].grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 0.01
        for i, g in enumerate(grads):
            g = g * 0.01 / norm
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            hats = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.999 ** (step + 1))
            with torch.no_grad():
                values[i] -= config.rate(step) * hats[0] / (hats[1].sqrt() + 1e-8)
    assert stats[2].learning_rate == 0.02
    for (name, found), expected in zip(roles.parameters("sft").items(), values, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4, msg=name)


def test_training_changes_nothing_else(tiny, train):
    roles = new_roles(tiny)
    roles.add("other")
    fill(roles.model, "other", 1)
    roles.add("reference", copy_of="other", trainable=False)
    base = base_bits(roles.model)
    before = {name: roles.state(name) for name in roles.names}
    roles.use("other")
    train(roles=roles)
    assert same(base_bits(roles.model), base)
    for name in ("other", "reference"):
        assert same(roles.state(name), before[name])
    assert not same(roles.state("sft"), before["sft"])
    assert not roles.model.training


def test_other_labels_are_used(train, straight):
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return everything(*arguments)

    roles, stats = train(labels=spy)
    # Once before all, over all; the held-out loss is over the response alone.
    assert len(calls) == -(-len(EXAMPLES) // SETTINGS.batch_size) + STEPS
    assert stats[0].held_out == straight[1][0].held_out
    assert stats[1].loss != straight[1][1].loss
    assert not same(roles.state("sft"), straight[0])


@pytest.mark.parametrize("role", ["reference", "nobody"])
def test_a_role_that_cannot_learn_is_refused(tiny, train, role, tmp_path):
    roles = new_roles(tiny)
    roles.add("reference", trainable=False)
    with pytest.raises(ValueError, match=f"role '{role}'"):
        train(tmp_path / "sft", roles=roles, role=role)
    assert list(tmp_path.iterdir()) == []


BAD = {
    "no EOS": ({"prompt": [5], "response": [6, 7]}, r"\[1\] has no prompt, or .* with EOS \(1\)"),
    "EOS inside": ({"prompt": [5], "response": [1, 7]}, r"\[1\] .* does not end with EOS"),
    "no response": ({"prompt": [5], "response": []}, r"\[1\] .* does not end with EOS"),
    "no prompt": ({"prompt": [], "response": [6, 1]}, r"\[1\] has no prompt"),
    "too long": (
        {"prompt": [5] * 10, "response": [6] * 22 + [1]},
        r"\[1\] has 33 tokens, more than the model's context of 32",
    ),
}


@pytest.mark.parametrize("argument", ["examples", "held_out"])
@pytest.mark.parametrize("bad, message", BAD.values(), ids=BAD)
def test_bad_examples_are_named(train, argument, bad, message, tmp_path):
    with pytest.raises(ValueError, match=f"{argument}{message}"):
        train(tmp_path / "sft", **{argument: [EXAMPLES[0], bad]})
    with pytest.raises(ValueError, match=f"{argument} is empty"):
        train(tmp_path / "sft", **{argument: []})
    assert list(tmp_path.iterdir()) == []


def test_an_example_may_fill_the_context(train):
    full = {"prompt": [5] * 10, "response": [6] * 21 + [1]}
    train(examples=[full], config=SFTConfig(steps=2, batch_size=2, warmup_steps=1))


# --- on disk, and interrupted --------------------------------------------------------------


def test_a_finished_run_is_in_its_folder(tiny, train, straight, tmp_path):
    folder = tmp_path / "runs" / "sft"
    roles, _ = train(folder)
    assert names_in(folder.parent) == ["sft"]
    assert sorted(files(folder)) == [CONFIG, WEIGHTS]
    again = Roles(load_base(tiny), rank=4, alpha=8)
    again.load("sft", folder)
    assert same(again.state("sft"), straight[0])
    assert same(roles.state("sft"), straight[0])


def test_the_old_adapter_stays_until_the_new_is_whole(train, tmp_path):
    folder = tmp_path / "sft"
    train(folder)
    old, seen = files(folder), []

    def visit(stats):
        seen.append(stats.step)
        if stats.step < STEPS:
            assert files(folder) == old
        assert (tmp_path / "sft.unfinished").exists() == (4 <= stats.step < STEPS)

    train(folder, examples=EXAMPLES[::-1], visit=visit)
    assert len(seen) == STEPS + 1
    assert files(folder) != old
    assert names_in(tmp_path) == ["sft"]


def stop_in_the_loss(step, monkeypatch):
    """Ctrl-C in the forward pass of the update after `step`."""
    calls = itertools.count()

    def loss(*arguments):
        if len(arguments) == 4 and next(calls) == step:
            raise KeyboardInterrupt
        return batch_loss(*arguments)

    monkeypatch.setattr(sft, "batch_loss", loss)


def stop_in_backward(step, monkeypatch):
    """Ctrl-C when most gradients of the update after `step` are there."""
    calls = itertools.count()

    def loss(model, *arguments):
        if len(arguments) == 3 and next(calls) == step:
            parameter = next(p for p in model.parameters() if p.requires_grad)

            def interrupt(_):
                hook.remove()
                raise KeyboardInterrupt

            hook = parameter.register_post_accumulate_grad_hook(interrupt)
        return batch_loss(model, *arguments)

    monkeypatch.setattr(sft, "batch_loss", loss)


def stop_in_the_optimizer(step, monkeypatch):
    """A real Ctrl-C in the middle of update `step`, which is finished first."""
    real, calls = torch.optim.AdamW.step, itertools.count(1)

    def stepped(optimizer):
        if next(calls) == step:
            press()
        return real(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


def stop_in_the_consumer(step, monkeypatch):
    """Ctrl-C between two updates, in the body of the `for`."""

    def visit(stats):
        if stats.step == step:
            raise KeyboardInterrupt

    return visit


STOPS = [stop_in_the_loss, stop_in_backward, stop_in_the_optimizer, stop_in_the_consumer]


def interrupt(train, monkeypatch, folder, stop=stop_in_the_loss, step=7, **options):
    with monkeypatch.context() as patch:
        visit = stop(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train(folder, visit=visit, **options)


def weights_in(folder):
    """Of a finished adapter, or of the newest save of an unfinished run."""
    return load_file(kept_in(folder, "sft") / WEIGHTS)


@pytest.mark.parametrize("step", [1, 4, 7, 11])
@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tiny, train, straight, states, tmp_path, monkeypatch, stop, step
):
    folder, unfinished = tmp_path / "sft", tmp_path / "sft.unfinished"
    interrupt(train, monkeypatch, folder, stop, step)
    assert names_in(tmp_path) == ["sft.unfinished"]
    assert same(weights_in(unfinished), states[step])
    model = PeftModel.from_pretrained(load_base(tiny), str(kept_in(unfinished, "sft")))
    assert same(get_peft_model_state_dict(model), states[step])
    roles, stats = train(folder)
    assert facts(stats) == facts(straight[1])[step + 1 :]
    assert same(roles.state("sft"), straight[0])
    assert same(weights_in(folder), straight[0])
    assert names_in(tmp_path) == ["sft"]


@pytest.mark.parametrize(
    "stop",
    [
        stop_in_the_loss,
        stop_in_backward,
        stop_in_the_optimizer,
        stop_in_the_consumer,
    ],
)
def test_the_same_roles_go_on_too(tiny, train, straight, tmp_path, monkeypatch, stop):
    """As in a notebook, where the cell is run again with the roles that are there."""
    roles = new_roles(tiny)
    interrupt(train, monkeypatch, tmp_path / "sft", stop, roles=roles)
    train(tmp_path / "sft", roles=roles)
    assert same(roles.state("sft"), straight[0])


def test_a_run_may_be_interrupted_again_and_again(train, straight, tmp_path, monkeypatch):
    folder = tmp_path / "sft"
    for step in (2, 3, 9, 12):
        if step < STEPS:
            interrupt(train, monkeypatch, folder, stop_in_the_consumer, step)
    assert same(train(folder)[0].state("sft"), straight[0])


def test_a_killed_run_goes_on_from_its_last_save(train, straight, states, tmp_path):
    """A kill runs no cleanup: what is on disk in the middle of a run must do."""
    moment = tmp_path / "moment" / "sft.unfinished"

    def visit(stats):
        if stats.step == 11:
            shutil.copytree(tmp_path / "run" / "sft.unfinished", moment)

    train(tmp_path / "run" / "sft", visit=visit)
    assert same(weights_in(moment), states[8])
    roles, stats = train(moment.with_name("sft"))
    assert facts(stats) == facts(straight[1])[9:]
    assert same(roles.state("sft"), straight[0])


def test_time_goes_on_too(train, tmp_path, monkeypatch):
    before = []

    def visit(stats):
        before.append(stats.seconds)
        if stats.step == 3:
            raise KeyboardInterrupt

    interrupt(train, monkeypatch, tmp_path / "sft", lambda *_: visit)
    _, stats = train(tmp_path / "sft")
    assert before[0] == 0 and stats[0].seconds > before[-1] > 0


def test_a_run_left_early_is_kept(tiny, tokenizer, train, straight, tmp_path):
    for stats in train_sft(
        new_roles(tiny), "sft", tokenizer, EXAMPLES, HELD_OUT, SETTINGS, folder=tmp_path / "sft"
    ):
        if stats.step == 5:
            break
    assert names_in(tmp_path) == ["sft.unfinished"]
    assert same(train(tmp_path / "sft")[0].state("sft"), straight[0])


def test_a_run_without_an_update_leaves_nothing(train, tmp_path, monkeypatch):
    interrupt(train, monkeypatch, tmp_path / "sft", stop_in_the_loss, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_old_adapter_outlives_an_interrupted_run(train, tmp_path, monkeypatch):
    folder = tmp_path / "sft"
    train(folder)
    old = files(folder)
    interrupt(train, monkeypatch, folder, examples=EXAMPLES[::-1])
    assert files(folder) == old
    train(folder, examples=EXAMPLES[::-1])
    assert files(folder) != old
    assert names_in(tmp_path) == ["sft"]


OTHER_TOKEN = [{"prompt": [63], "response": EXAMPLES[0]["response"]}, *EXAMPLES[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        {"config": replace(SETTINGS, learning_rate=0.01)},
        {"config": replace(SETTINGS, steps=20)},
        {"config": replace(SETTINGS, batch_size=4)},
        {"config": replace(SETTINGS, warmup_steps=3)},
        {"config": replace(SETTINGS, max_grad_norm=2.0)},
        {"examples": OTHER_TOKEN},
        {"examples": EXAMPLES[:-1]},
        {"labels": everything},
        {"role": "policy"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_unfinished_run_with_other_settings_is_kept(
    tiny, train, straight, tmp_path, monkeypatch, changes
):
    interrupt(train, monkeypatch, tmp_path / "sft")
    before = files(tmp_path / "sft.unfinished")
    roles = new_roles(tiny)
    roles.add("policy")
    weights = roles.state("sft")
    message = "update-00007' belongs to a run with other settings .* there, .* here.*; give those"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "sft", roles=roles, **changes)
    assert files(tmp_path / "sft.unfinished") == before
    assert same(roles.state("sft"), weights)
    assert names_in(tmp_path) == ["sft.unfinished"]
    roles, _ = train(tmp_path / "sft")
    assert same(roles.state("sft"), straight[0])


def test_an_unfinished_run_of_other_roles_is_kept(train, tmp_path, monkeypatch):
    interrupt(train, monkeypatch, tmp_path / "sft")
    before = files(tmp_path / "sft.unfinished")
    others = [
        (save_tiny(tmp_path / "base", max_position_embeddings=32, seed=1), 4, "on another base"),
        (load_preset("pocket", model=str(tmp_path / "base")), 8, "r 4, these roles 8"),
    ]
    for preset, rank, message in others:
        roles = Roles(load_base(preset), rank, alpha=8)
        roles.add("sft")
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "sft", roles=roles)
        assert files(tmp_path / "sft.unfinished") == before


def test_a_loss_that_is_not_finite_ends_the_run_before_its_update(
    train, straight, states, tmp_path, monkeypatch
):
    calls = itertools.count()

    def loss(*arguments):
        value = batch_loss(*arguments)
        broken = len(arguments) == 4 and next(calls) == 7
        return value * float("nan") if broken else value

    with monkeypatch.context() as patch:
        patch.setattr(sft, "batch_loss", loss)
        message = "after 7 updates, with a learning_rate of 0.02, .*; update 7 is kept.* nan"
        with pytest.raises(FloatingPointError, match=message):
            train(tmp_path / "sft")
    assert same(weights_in(tmp_path / "sft.unfinished"), states[7])
    roles, _ = train(tmp_path / "sft")
    assert same(roles.state("sft"), straight[0])


def test_weights_that_diverge_end_the_run(train, tmp_path):
    config = replace(SETTINGS, learning_rate=1e25)
    message = r"with a learning_rate of 1e\+25, which may be too high"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path / "sft", config=config)
    kept = weights_in(tmp_path / "sft.unfinished")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_gradient_that_is_not_finite_ends_the_run_before_its_update(train, tmp_path, monkeypatch):
    calls = itertools.count()

    def loss(*arguments):
        value = batch_loss(*arguments)
        if len(arguments) == 4 and next(calls) == 7:
            value.register_hook(lambda gradient: gradient * float("nan"))
        return value

    monkeypatch.setattr(sft, "batch_loss", loss)
    with pytest.raises(FloatingPointError):
        train(tmp_path / "sft")
    kept = weights_in(tmp_path / "sft.unfinished")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_run_that_is_stopped_but_still_held_saves_before_the_next_goes_on(
    tiny, tokenizer, straight, tmp_path
):
    """As in a notebook: `run = train_sft(...)`, the loop is interrupted, the cell is run again."""
    roles = new_roles(tiny)
    arguments = (roles, "sft", tokenizer, EXAMPLES, HELD_OUT, SETTINGS)
    run = train_sft(*arguments, folder=tmp_path / "sft")
    while next(run).step < 3:
        pass
    again = train_sft(*arguments, folder=tmp_path / "sft")
    assert next(again).step == 4
    run.close()  # the old one must not save over the new one
    list(again)
    assert same(roles.state("sft"), straight[0])
    assert names_in(tmp_path) == ["sft"]


def test_labels_that_ignore_everything_are_named(train):
    with pytest.raises(ValueError, match=r"labels in a row is 0 at \[0\]"):
        train(labels=lambda ids, mask, prompt_length: torch.full_like(ids, IGNORE))
