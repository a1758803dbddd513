"""PPO's loop: what an update does, what it leaves alone, and how a run survives being stopped."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers_training import names_in, press, reports_of, role_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_roles import base_bits, fill, same, save_tiny
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from rlhf_helpers import ppo, training
from rlhf_helpers import roles as roles_module
from rlhf_helpers.base import load_base
from rlhf_helpers.kl import AdaptiveKL
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.losses import gae, policy_loss, shape_rewards, value_loss, whiten
from rlhf_helpers.ppo import PPOConfig, collect_experience, response_values, train_ppo
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import CONFIG, HEAD, WEIGHTS, Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.text import load_tokenizer
from rlhf_helpers.training import OPTIMIZER

NAN, INF = float("nan"), float("inf")
KILLS = 3  # random moments at which a run is killed; set it to 20 for a thorough test by hand

UPDATES, STEPS = 4, 4  # STEPS are each role's in an update
SETTINGS = PPOConfig(
    updates=UPDATES,
    batch_size=4,
    minibatch_size=2,
    epochs=2,
    learning_rate=0.02,
    response_length=6,
)
PROMPTS = [
    "what is hot?",
    "how are you?",
    "what does the duck say to the cow?",
    "the cow",
    "is fire hot?",
    "what is cold and wet?",
    "duck",
]


# --- a base, roles and runs that are small -------------------------------------------------


def save_talker(folder, tokenizer, seed=0, end=2.0):
    """A narrow base that ends about half of its responses, so that batches are ragged.

    A greater `end` makes ends likelier.
    """
    preset = save_tiny(
        folder,
        seed,
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        max_position_embeddings=48,
    )
    weights = load_file(folder / "model.safetensors")
    embeddings, output = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embeddings[:, 0] = 0.1  # one coordinate that is large for every token, and so acts as a bias
    output *= 10
    output[:, 0] = 0
    output[tokenizer.eos_token_id, 0] = end
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return preset


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return save_talker(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


def new_roles(preset, head_seed=0):
    roles = Roles(load_base(preset), rank=4, alpha=8)
    roles.add("policy")
    fill(roles.model, "policy", 0)
    roles.add("reference", copy_of="policy", trainable=False)
    roles.add("reward", trainable=False)
    fill(roles.model, "reward", 1)
    roles.add_head("reward")
    roles.heads["reward"].rescale(0.1, 0.5)
    roles.add("value", copy_of="reward")
    if head_seed:
        roles.heads.pop("value")
        roles.add_head("value", head_seed)
    return roles


def far_roles(preset):
    """The policy has gone far from the reference."""
    roles = new_roles(preset)
    with torch.no_grad():
        for parameter in roles.parameters("policy").values():
            parameter.mul_(3)
    return roles


def weights(roles, names=("policy", "value")):
    states = {role: role_weights(roles, role) for role in names}
    return {f"{role}/{k}": tensor for role, state in states.items() for k, tensor in state.items()}


def saved_weights(folder):
    """Those of a save of an unfinished run."""
    found = {f"{r}/{k}": t for r in ppo.TRAINED for k, t in load_file(folder / r / WEIGHTS).items()}
    head = load_file(folder / "value" / HEAD)
    return found | {f"value/head.{name}": tensor for name, tensor in head.items()}


def facts(stats):
    """All that the updates report, but for the time; as text, in which floats are exact."""
    return [json.dumps(asdict(replace(s, seconds=0.0)), default=Tensor.tolist) for s in stats]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def train(tiny, tokenizer):
    """Train the policy; in the ordinary case fresh roles on a fresh base."""

    def train(folder=None, roles=None, visit=None, prompts=PROMPTS, config=SETTINGS):
        roles = roles or new_roles(tiny)
        return roles, reports_of(train_ppo(roles, tokenizer, prompts, config, folder), visit)

    return train


@pytest.fixture(scope="module")
def history(tiny, tokenizer):
    """A run that was never stopped: after each update its report and the weights."""
    roles = new_roles(tiny)
    run = train_ppo(roles, tokenizer, PROMPTS, SETTINGS)
    return [(None, weights(roles)), *((stats, weights(roles)) for stats in run)]


@pytest.fixture(scope="module")
def reports(history):
    return [stats for stats, _ in history[1:]]


@pytest.fixture(scope="module")
def final(history):
    return history[-1][1]


@pytest.fixture(scope="module")
def terse(tmp_path_factory, tokenizer):
    """Of this one's far policy, too, some responses end and some do not, whatever the seed."""
    return save_talker(tmp_path_factory.mktemp("models") / "terse", tokenizer, end=4.0)


@pytest.fixture(scope="module")
def experience(terse, tokenizer):
    """Of a policy that is not the reference. No test may change it."""
    return collect_experience(far_roles(terse), tokenizer, PROMPTS, SETTINGS, beta=0.1, seed=3)


@pytest.fixture(scope="module")
def asked(terse):
    """The roles of `experience`."""
    return far_roles(terse)


def test_the_batches_are_ragged(experience, reports):
    """Otherwise the tests below would say little."""
    mask = experience.rollout.attention_mask
    assert (mask[:, 0] == 0).any() and (mask[:, -1] == 0).any()
    assert 0 < experience.rollout.finished.sum() < len(PROMPTS)
    assert any(0 < stats.finished < 1 for stats in reports)


# --- settings ------------------------------------------------------------------------------

COUNTS = ("updates", "batch_size", "minibatch_size", "epochs", "save_every")
POSITIVE = ("learning_rate", "max_grad_norm", "target_kl", "stop_kl")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.0, NAN, "3", None])
def test_counts_are_whole_numbers_above_0(name, value):
    with pytest.raises(
        ValueError, match=f"{name} is {value!r}: it must be a whole number, at least 1"
    ):
        PPOConfig(**{name: value})


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1.0, NAN, INF])
def test_sizes_are_finite_and_above_0(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: it must be a finite number above 0"):
        PPOConfig(**{name: value})


def test_minibatches_fill_the_batch():
    with pytest.raises(ValueError, match="batch_size 64 cannot be divided by minibatch_size 24"):
        PPOConfig(minibatch_size=24)
    with pytest.raises(ValueError, match="batch_size 4 cannot be divided by minibatch_size 8"):
        PPOConfig(batch_size=4, minibatch_size=8)


LATE = {
    "beta": (-0.1, NAN, INF),
    "eos_penalty": (NAN, INF),
    "gamma": (-0.1, 1.1, NAN),
    "lam": (-0.1, 1.1, NAN),
    "clip": (0.0, -0.2, NAN, INF),
    "value_clip": (0.0, -0.2, NAN, INF),
    "temperature": (0.0, -1.0, NAN, INF),
    "response_length": (0, -1, 6.0, True),
    "kl_kind": ("k4",),
} | {name: (True,) for name in COUNTS}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in LATE.items() for v in values])
def test_other_bad_settings_are_refused_too(name, value):
    good = {"batch_size": 1, "minibatch_size": 1}
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        PPOConfig(**good | {name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("beta", -0.1),
        ("beta", NAN),
        ("eos_penalty", NAN),
        ("gamma", 1.1),
        ("lam", -0.1),
        ("temperature", 0.0),
        ("response_length", 0),
        ("kl_kind", "k4"),
        ("clip", 0.0),
        ("value_clip", 0.0),
        ("response_length", 6.0),
    ],
)
def test_bad_settings_change_and_write_nothing(tiny, train, name, value, tmp_path):
    roles = new_roles(tiny)
    before = weights(roles)
    with pytest.raises(ValueError):
        train(tmp_path / "policy", roles, config=replace(SETTINGS, **{name: value}))
    assert same(weights(roles), before)
    assert list(tmp_path.iterdir()) == []


# --- what is refused at the call -----------------------------------------------------------


def without(name):
    def change(roles):
        others = {n: t for n, t in roles._trainable.items() if n != name}
        roles._trainable = others

    return change


def frozen(name):
    def change(roles):
        roles._trainable[name] = False

    return change


def headless(name):
    return lambda roles: roles.heads.pop(name)


def not_normalised(roles):
    roles.heads["reward"].statistics = None


REFUSED = {
    **{
        f"no {name}": (without(name), f"no role '{name}'; there are .*; load or add it first")
        for name in ("policy", "reference", "reward", "value")
    },
    **{
        f"frozen {name}": (frozen(name), f"role '{name}' is frozen; add a copy")
        for name in ("policy", "value")
    },
    **{
        f"headless {name}": (headless(name), f"role '{name}' has no head; call add_head")
        for name in ("reward", "value")
    },
    "not normalised": (not_normalised, "'reward' has no normalisation statistics.*normalise"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_roles_that_cannot_do_it_are_refused_at_the_call(
    tiny, tokenizer, tmp_path, change, message
):
    roles = new_roles(tiny)
    before = weights(roles, roles.names)
    change(roles)
    heads = dict(roles.heads)
    with pytest.raises(ValueError, match=message):
        train_ppo(roles, tokenizer, PROMPTS, SETTINGS, tmp_path / "policy")  # nothing is drawn
    roles.heads |= heads
    assert all(torch.equal(before[k], t) for k, t in weights(roles, roles.names).items())
    assert list(tmp_path.iterdir()) == []


def test_too_few_prompts_are_refused_at_the_call(tiny, tokenizer, tmp_path):
    few = "there are 3 prompts for a batch of 4; give more, or a smaller"
    for prompts, message in (([], "prompts is empty"), (PROMPTS[:3], few)):
        with pytest.raises(ValueError, match=message):
            train_ppo(new_roles(tiny), tokenizer, prompts, SETTINGS, tmp_path / "policy")
    with pytest.raises(ValueError, match="7 prompts for a batch of 64"):
        train_ppo(new_roles(tiny), tokenizer, PROMPTS)  # the default settings
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_in": "advantage"}, "kl_in is 'advantage': it must be one of 'reward', 'loss'"),
        ({"kl_in": "loss"}, "its gradient is 0 on average"),
    ],
)
def test_where_the_penalty_cannot_stand_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_beta_0_cannot_be_adapted():
    with pytest.raises(ValueError, match="beta is 0, which no factor can move to a target_kl"):
        replace(SETTINGS, beta=0.0, target_kl=1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"response_length": 48}, "has [0-9]+ tokens with its template, and the limit is 0"),
        ({"response_length": 47}, "has [0-9]+ tokens with its template, and the limit is 1"),
    ],
)
def test_what_does_not_fit_the_context_is_refused_before_anything_is_written(
    tiny, train, tmp_path, change, message
):
    roles = new_roles(tiny)
    before = weights(roles)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "policy", roles, config=replace(SETTINGS, **change))
    assert same(weights(roles), before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "prompts, length",
    [
        (PROMPTS, 48),
        (["cow " * 60, *PROMPTS], 6),
        (["", *PROMPTS], 6),
        ([7, *PROMPTS], 6),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_the_call(tiny, tokenizer, prompts, length):
    """In whatever update it would be drawn."""
    with pytest.raises((ValueError, TypeError)):
        train_ppo(new_roles(tiny), tokenizer, prompts, replace(SETTINGS, response_length=length))


def test_nothing_runs_before_the_first_report_is_drawn(tiny, tokenizer, tmp_path):
    roles = new_roles(tiny)
    before = weights(roles)
    run = train_ppo(roles, tokenizer, PROMPTS, SETTINGS, tmp_path / "policy")
    assert same(weights(roles), before)
    assert list(tmp_path.iterdir()) == []
    assert next(run).update == 1
    assert not same(weights(roles), before)
    assert next(run).update == 2


# --- collect_experience --------------------------------------------------------------------


def rows_of(experience):
    """Each row without padding: (its number, ids, tokens of the prompt, of the response)."""
    rollout = experience.rollout
    for i, (ids, mask) in enumerate(
        zip(rollout.input_ids, rollout.attention_mask.bool(), strict=True)
    ):
        length = int(rollout.response_mask[i].sum())
        yield i, ids[mask][None], int(mask.sum()) - length, length


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_the_score_is_the_heads_at_the_last_token_less_the_penalty(asked, experience):
    eos = experience.rollout.finished
    for i, ids, _, _ in rows_of(experience):
        with torch.no_grad():
            score = asked.values("reward", ids, torch.ones_like(ids))[0, -1]
        assert bool(eos[i]) == (ids[0, -1].item() == 1)
        close(experience.scores[i], score - (0.0 if eos[i] else SETTINGS.eos_penalty))


def test_the_penalty_is_the_settings(asked, tokenizer, experience):
    config = replace(SETTINGS, eos_penalty=2.5)
    other = collect_experience(asked, tokenizer, PROMPTS, config, beta=0.1, seed=3)
    close(experience.scores - other.scores, 1.5 * (~experience.rollout.finished).float())


def test_a_value_is_of_the_state_before_its_token(asked, experience):
    """The critic has seen the prompt and the response so far, and no more."""
    for i, ids, prompt, length in rows_of(experience):
        for t in range(length):
            seen = ids[:, : prompt + t]
            with torch.no_grad():
                value = asked.values("value", seen, torch.ones_like(seen))[0, -1]
            close(experience.values[i, t], value)


def test_response_values_are_those_of_the_rows_asked_for(asked, experience):
    with torch.no_grad():
        found = response_values(asked, "value", experience.rollout, slice(2, 5))
    real = experience.rollout.response_mask[2:5].bool()
    close(found[real], experience.values[2:5][real])
    assert response_values(asked, "value", experience.rollout, slice(0, 1)).requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampled_tokens(asked, tokenizer, temperature):
    config = replace(SETTINGS, temperature=temperature)
    experience = collect_experience(asked, tokenizer, PROMPTS, config, beta=0.1, seed=3)
    for role, found in (("policy", experience.logprobs), ("reference", experience.ref_logprobs)):
        for i, ids, prompt, length in rows_of(experience):
            with torch.no_grad():
                logits = asked.use(role)(input_ids=ids).logits[0, prompt - 1 : -1]
            expected = (logits / temperature).log_softmax(-1).gather(-1, ids[0, prompt:, None])
            close(found[i, :length], expected[:, 0])


def test_rewards_advantages_and_returns_are_the_pure_functions(asked, tokenizer):
    changes = {"kl_kind": "k3", "gamma": 0.9, "lam": 0.5}
    one = collect_experience(asked, tokenizer, PROMPTS, replace(SETTINGS, **changes), 0.7, seed=3)
    mask = one.rollout.response_mask
    rewards = shape_rewards(one.scores, one.logprobs, one.ref_logprobs, mask, 0.7, "k3")
    advantages, returns = gae(rewards, one.values, mask, 0.9, 0.5)
    assert torch.equal(one.rewards, rewards)  # β is the argument, not the settings' 0.1
    assert torch.equal(one.returns, returns)
    assert torch.equal(one.advantages, whiten(advantages, mask))
    real = one.advantages[mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-5)
    assert real.std().item() == pytest.approx(1, abs=1e-4)


def test_experience_is_data(experience):
    tensors = [value for value in vars(experience).values() if isinstance(value, Tensor)]
    assert len(tensors) == 7
    assert not any(tensor.requires_grad for tensor in tensors)
    assert experience.prompts == PROMPTS
    assert experience.scores.shape == experience.kl.shape == (len(PROMPTS),)
    shape = experience.rollout.response_mask.shape
    assert all(tensor.shape == shape for tensor in tensors if tensor.dim() == 2)


def test_the_references_own_answers_have_kl_0(asked, tokenizer, experience):
    one = collect_experience(asked, tokenizer, PROMPTS, SETTINGS, 0.1, 3, role="reference")
    assert torch.equal(one.logprobs, one.ref_logprobs)
    assert one.kl.tolist() == [0.0] * len(PROMPTS)
    rollout = sample_responses(asked.use("reference"), tokenizer, PROMPTS, 6, seed=3)
    assert one.rollout.texts == rollout.texts != experience.rollout.texts
    assert experience.kl.abs().min() > 0.01


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_size_of_a_minibatch_changes_rounding_only(asked, tokenizer, size):
    config = replace(SETTINGS, batch_size=6, minibatch_size=6)
    arguments = {"prompts": PROMPTS[:6], "beta": 0.1, "seed": 3}
    one = collect_experience(asked, tokenizer, config=config, **arguments)
    two = collect_experience(
        asked, tokenizer, config=replace(config, minibatch_size=size), **arguments
    )
    real = one.rollout.response_mask.bool()
    assert torch.equal(one.rollout.input_ids, two.rollout.input_ids)
    close(two.scores, one.scores)
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        found, expected = getattr(two, name)[real], getattr(one, name)[real]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_a_seed_makes_it_repeatable_and_leaves_torchs_generator(asked, tokenizer, experience):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = collect_experience(asked, tokenizer, PROMPTS, SETTINGS, beta=0.1, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in vars(experience).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(again, name), value), name
    other = collect_experience(asked, tokenizer, PROMPTS, SETTINGS, beta=0.1, seed=4)
    assert other.rollout.texts != experience.rollout.texts


@pytest.mark.parametrize("garbage", [1e9, NAN, -INF])
def test_the_kl_is_of_real_tokens(experience, garbage):
    mask = experience.rollout.response_mask
    expected = [
        (experience.logprobs[i, :n] - experience.ref_logprobs[i, :n]).sum()
        for i, n in enumerate(mask.sum(-1).tolist())
    ]
    close(experience.kl, torch.stack(expected))
    dirty = replace(experience, logprobs=experience.logprobs.masked_fill(mask == 0, garbage))
    assert torch.equal(dirty.kl, experience.kl)


# --- updates -------------------------------------------------------------------------------


def test_before_the_first_step_policy_and_reference_are_one(reports):
    first = reports[0]
    assert torch.equal(first.experience.logprobs, first.experience.ref_logprobs)
    assert first.kl == 0.0
    assert first.experience.kl.tolist() == [0.0] * 4
    assert all(stats.kl != 0.0 for stats in reports[1:])


def test_the_first_ratio_is_exactly_1_in_every_update(reports):
    assert [stats.first_ratio for stats in reports] == [1.0] * UPDATES
    assert all(stats.policy["ratio"] != 1.0 for stats in reports)  # in the steps after


def test_an_update_is_the_pure_functions_and_adam(tiny, history):
    """The first update by hand on fresh roles: gradients, their lengths, and weights bit by bit."""
    roles, (stats, expected) = new_roles(tiny), history[1]
    one = stats.experience
    ids, attention, mask = (
        one.rollout.input_ids,
        one.rollout.attention_mask,
        one.rollout.response_mask,
    )
    width = mask.shape[1]
    adam = {r: torch.optim.Adam(roles.parameters(r).values(), lr=0.02) for r in ppo.TRAINED}
    norms = {role: [] for role in adam}
    losses = {role: [] for role in adam}

    def step(role, loss):
        parameters = list(roles.parameters(role).values())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        norms[role].append(clip_grad_norm_(parameters, SETTINGS.max_grad_norm).item())
        losses[role].append(loss.item())
        adam[role].step()

    for _ in range(2):
        for part in (slice(0, 2), slice(2, 4)):
            model = roles.use("policy")
            logprobs = response_logprobs(model, ids[part], attention[part], width)
            old, advantages = one.logprobs[part], one.advantages[part]
            step("policy", policy_loss(logprobs, old, advantages, mask[part], 0.2)[0])
            values = roles.values("value", ids[part], attention[part])[:, -width - 1 : -1]
            old, returns = one.values[part], one.returns[part]
            step("value", value_loss(values, old, returns, mask[part], 1.0)[0])

    assert same(weights(roles), expected)
    for role, report in (("policy", stats.policy), ("value", stats.value)):
        assert report["loss"] == pytest.approx(sum(losses[role]) / STEPS, rel=1e-9)
        assert report["grad_norm"] == pytest.approx(sum(norms[role]) / STEPS, rel=1e-9)
    assert max(norms["value"]) > 1.0  # so that a gradient was scaled down


def test_the_gradients_of_a_step_are_the_losses_own(tiny, train, monkeypatch):
    config = replace(SETTINGS, updates=1, epochs=1, minibatch_size=4, max_grad_norm=1e9)
    roles, seen = new_roles(tiny), []
    real = torch.optim.AdamW.step

    def spy(optimizer):
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return real(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    _, (stats,) = train(roles=roles, config=config)
    one, fresh = stats.experience, new_roles(tiny)
    ids, attention, mask = (
        one.rollout.input_ids,
        one.rollout.attention_mask,
        one.rollout.response_mask,
    )
    logprobs = response_logprobs(fresh.use("policy"), ids, attention, mask.shape[1])
    loss, _ = policy_loss(logprobs, one.logprobs, one.advantages, mask, config.clip)
    policy = torch.autograd.grad(loss, list(fresh.parameters("policy").values()))
    values = fresh.values("value", ids, attention)[:, -mask.shape[1] - 1 : -1]
    loss, _ = value_loss(values, one.values, one.returns, mask, config.value_clip)
    value = torch.autograd.grad(loss, list(fresh.parameters("value").values()))
    assert len(seen) == 2
    for found, expected in zip(seen, (policy, value), strict=True):
        assert len(found) == len(expected) and any(g.abs().max() > 0 for g in found)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_in_the_loss_is_added_there_and_not_to_the_reward(tiny, train, kind):
    config = replace(SETTINGS, updates=1, epochs=1, minibatch_size=4)
    config = replace(config, kl_in="loss", kl_kind=kind, beta=0.5)
    roles = far_roles(tiny)
    policy = roles.state("policy")
    _, (stats,) = train(roles=roles, config=config)
    one = stats.experience
    assert stats.kl > 0.1  # the policy begins far from the reference, or nothing is tested
    mask = one.rollout.response_mask
    zero = torch.zeros_like(one.logprobs)
    torch.testing.assert_close(one.rewards, shape_rewards(one.scores, zero, zero, mask, 0.0))
    r = (one.ref_logprobs - one.logprobs).masked_fill(mask == 0, 0)
    penalty = {"k2": r.square() / 2, "k3": r.exp() - 1 - r}[kind].sum() / mask.sum()
    without, _ = policy_loss(one.logprobs, one.logprobs, one.advantages, mask, config.clip)
    assert stats.policy["loss"] == pytest.approx((without + 0.5 * penalty).item(), rel=1e-5)
    assert not same(roles.state("policy"), policy)


def test_kl_in_the_loss_pulls_the_policy_back(tiny, train, monkeypatch):
    """With equal scores there is nothing to win but nearness."""
    level = lambda roles, role, ids, mask: torch.zeros(len(ids))  # noqa: E731
    monkeypatch.setattr(ppo, "score_tokens", level)
    config = replace(SETTINGS, updates=12, kl_in="loss", kl_kind="k2", eos_penalty=0.0)
    config = replace(config, batch_size=6, minibatch_size=6, epochs=4)
    ends = {}
    for beta in (0.0, 10.0):
        _, reports = train(roles=far_roles(tiny), config=replace(config, beta=beta))
        ends[beta] = sum(stats.kl for stats in reports[6:]) / 6
    assert ends[10.0] < 0.75 * ends[0.0]


def test_policy_value_and_its_head_learn(history):
    before, after = history[0][1], history[-1][1]
    assert len(before) == 2 * 14 + 2
    for key in before:
        assert not torch.equal(before[key], after[key]), key


def test_training_changes_nothing_else(tiny, train, experience):
    roles = new_roles(tiny)
    roles.add("other", copy_of="reward")
    others = ("reference", "reward", "other")
    rollout = experience.rollout

    def answers():
        with torch.no_grad():
            return {
                "logprobs": response_logprobs(
                    roles.use("reference"), rollout.input_ids, rollout.attention_mask, 6
                ),
                "rewards": roles.values("reward", rollout.input_ids, rollout.attention_mask),
            }

    base, states, said = base_bits(roles.model), weights(roles, others), answers()
    roles.use("other")
    train(roles=roles)
    assert same(base_bits(roles.model), base)
    assert same(weights(roles, others), states)
    assert same(answers(), said)
    assert roles.heads["reward"].statistics == (0.1, 0.5)
    assert not roles.model.training
    assert roles.parameters("policy") and roles.parameters("value")
    with pytest.raises(ValueError, match="'reference' is frozen"):
        roles.parameters("reference")


def test_a_run_is_repeatable_bit_for_bit(train, final, reports):
    torch.manual_seed(123)  # of no influence
    before = torch.get_rng_state()
    roles, stats = train()
    assert same(weights(roles), final)
    assert facts(stats) == facts(reports)
    assert torch.equal(torch.get_rng_state(), before)
    _, other = train(config=replace(SETTINGS, updates=1, seed=1))
    assert other[0].experience.rollout.texts != reports[0].experience.rollout.texts


def test_every_update_draws_other_prompts(reports):
    drawn = [stats.experience.prompts for stats in reports]
    assert all(len(set(prompts)) == 4 and set(prompts) <= set(PROMPTS) for prompts in drawn)
    assert len({tuple(prompts) for prompts in drawn}) == UPDATES


def test_a_report_is_of_what_was_sampled(reports):
    for number, stats in enumerate(reports, 1):
        one, mask = stats.experience, stats.experience.rollout.response_mask
        assert stats.update == number
        assert stats.score == one.scores.mean().item()
        assert stats.kl == one.kl.mean().item()
        assert stats.beta == SETTINGS.beta
        assert stats.length == mask.sum().item() / 4
        assert stats.finished == one.rollout.finished.sum().item() / 4
        assert stats.entropy == pytest.approx(-one.logprobs[mask.bool()].mean().item(), rel=1e-5)
        names = {"loss", "grad_norm", "clip_fraction"}
        assert stats.policy.keys() == names | {"ratio", "approx_kl", "entropy"}
        assert stats.value.keys() == names | {"explained_variance"}
    times = [stats.seconds for stats in reports]
    assert times == sorted(times) and times[0] > 0


def test_what_stands_at_padding_changes_nothing(train, final, reports, monkeypatch):
    """Noise in place of the padding tokens, in front of the prompts and behind the responses."""
    generator = torch.Generator().manual_seed(0)
    changed = []

    def noisy(*arguments, **options):
        rollout = sample_responses(*arguments, **options)
        noise = torch.randint(4, 1000, rollout.input_ids.shape, generator=generator)
        ids = torch.where(rollout.attention_mask == 1, rollout.input_ids, noise)
        changed.append(not torch.equal(ids, rollout.input_ids))
        return replace(rollout, input_ids=ids)

    monkeypatch.setattr(ppo, "sample_responses", noisy)
    roles, stats = train()
    assert all(changed)
    assert [s.score for s in stats] == [s.score for s in reports]
    assert [s.policy for s in stats] == [s.policy for s in reports]
    assert same(weights(roles), final)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_what_is_paid_for(tiny, train, monkeypatch, seed):
    """A stub that pays 1 for an end and −1 for none."""

    def pay(roles, role, input_ids, attention_mask):
        assert role == "reward"
        return 2 * (input_ids[:, -1] <= 1).float() - 1  # EOS, or the padding behind it

    monkeypatch.setattr(ppo, "score_tokens", pay)
    roles = new_roles(tiny)
    for parameter in roles.heads["value"].parameters():
        parameter.data.zero_()
    config = replace(
        SETTINGS, updates=7, batch_size=16, minibatch_size=8, seed=seed, learning_rate=0.005
    )
    config = replace(config, beta=0.0, eos_penalty=0.0)
    _, stats = train(roles=roles, prompts=PROMPTS * 3, config=config)
    scores = [s.score for s in stats]
    assert scores[0] < 0.5  # there is something to learn
    assert sum(scores[-3:]) / 3 > scores[0] + 0.4, scores
    assert stats[-1].finished > stats[0].finished + 0.2


# --- β, and the end by KL ------------------------------------------------------------------


@pytest.mark.parametrize("target, factor", [(1e9, 0.9), (1e-9, 1.1)])
def test_beta_goes_where_the_target_is(tiny, train, target, factor):
    """Down while KL is below the target, up while it is above."""
    roles, config = far_roles(tiny), replace(SETTINGS, updates=3, beta=5.0, learning_rate=1e-4)
    _, stats = train(roles=roles, config=replace(config, target_kl=target))
    assert all(0.1 < s.kl < 1e3 for s in stats)
    assert [s.beta for s in stats] == pytest.approx([5, 5 * factor, 5 * factor**2])
    one = stats[1].experience
    used = shape_rewards(
        one.scores, one.logprobs, one.ref_logprobs, one.rollout.response_mask, stats[1].beta
    )
    assert torch.equal(one.rewards, used)


def test_the_controller_is_told_every_kl(train):
    config = replace(SETTINGS, target_kl=0.5)
    _, stats = train(config=config)
    controller = AdaptiveKL(SETTINGS.beta, 0.5)
    expected = [SETTINGS.beta, *(controller.update(s.kl) for s in stats[:-1])]
    assert [s.beta for s in stats] == expected
    assert len(set(expected)) == UPDATES


def test_a_run_ends_by_itself_when_kl_is_too_high(tiny, train, tmp_path):
    roles, folder = far_roles(tiny), tmp_path / "policy"
    first = weights(roles)
    _, stats = train(folder, roles, config=replace(SETTINGS, stop_kl=0.01))
    assert [s.update for s in stats] == [1]
    assert stats[0].kl > 0.01
    assert not same(weights(roles), first)  # that update is learnt
    assert names_in(tmp_path) == ["policy"]
    assert same(load_file(folder / WEIGHTS), roles.state("policy"))


def test_a_run_below_stop_kl_goes_on(train, final, reports, tmp_path):
    folder = tmp_path / "policy"
    roles, stats = train(folder, config=replace(SETTINGS, stop_kl=max(s.kl for s in reports)))
    assert facts(stats) == facts(reports)
    assert same(weights(roles), final)
    highest = max(range(UPDATES), key=lambda i: reports[i].kl)
    below = replace(SETTINGS, stop_kl=reports[highest].kl * 0.999)
    assert len(train(config=below)[1]) == highest + 1


# --- on disk, and interrupted --------------------------------------------------------------


def test_a_finished_run_is_in_its_folder(tiny, train, final, tmp_path):
    folder = tmp_path / "runs" / "policy"
    train(folder)
    assert names_in(folder.parent) == ["policy"]
    assert names_in(folder) == sorted([CONFIG, WEIGHTS])
    again = Roles(load_base(tiny), rank=4, alpha=8)
    again.load("policy", folder)
    assert same(weights(again, ["policy"]), {k: t for k, t in final.items() if "policy" in k})


def test_what_is_on_disk_after_each_update(train, history, tmp_path):
    seen = []

    def visit(stats):
        seen.append(stats.update)
        if stats.update == UPDATES:
            assert names_in(tmp_path) == ["policy"]
            return
        assert names_in(tmp_path) == ["policy.unfinished"]
        kept = [f"update-{n:05}" for n in (stats.update - 1, stats.update)]
        assert names_in(tmp_path / "policy.unfinished") == kept
        for name in kept:
            folder = tmp_path / "policy.unfinished" / name
            assert same(saved_weights(folder), history[int(name[-5:])][1])

    train(tmp_path / "policy", visit=visit)
    assert seen == [1, 2, 3, 4]


def test_without_a_folder_nothing_is_written(train, final, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same(weights(train()[0]), final)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_be_text_and_the_prompts_a_tuple(train, final, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupt(train, monkeypatch, "deep/policy", stop_in_the_consumer, 2)
    roles, _ = train(Path("deep/policy"), prompts=tuple(PROMPTS))
    assert same(weights(roles), final)
    assert names_in(tmp_path / "deep") == ["policy"]


def test_the_old_policy_stays_until_the_new_is_whole(train, tmp_path):
    folder = tmp_path / "policy"
    train(folder, config=replace(SETTINGS, updates=1))
    old = contents(folder)

    def visit(stats):
        assert (contents(folder) == old) == (stats.update < UPDATES)

    train(folder, visit=visit)


def nth(number, real, action):
    """`real`, but before call `number` (from 0) the action."""
    calls = itertools.count()

    def call(*arguments, **options):
        if next(calls) == number:
            action()
        return real(*arguments, **options)

    return call


def stop():
    raise KeyboardInterrupt


def stop_in_sampling(update, patch):
    """Ctrl-C at the third token that the update after `update` samples."""
    calls = itertools.count()

    def sample(model, *arguments, **options):
        if next(calls) == update:
            forwards = itertools.count()

            def third(*_):
                if next(forwards) == 2:
                    hook.remove()
                    raise KeyboardInterrupt

            hook = model.get_base_model().register_forward_pre_hook(third)
        return sample_responses(model, *arguments, **options)

    patch.setattr(ppo, "sample_responses", sample)


def stop_in_scoring(update, patch):
    patch.setattr(ppo, "score_tokens", nth(2 * update + 1, ppo.score_tokens, stop))


def stop_in_the_policys_loss(update, patch):
    """In the third of four steps."""
    patch.setattr(ppo, "policy_loss", nth(STEPS * update + 2, policy_loss, stop))


def stop_in_the_values_backward(update, patch):
    """When most gradients are there."""
    calls = itertools.count()

    def values(roles, *arguments):
        if torch.is_grad_enabled() and next(calls) == STEPS * update + 1:
            parameter = next(iter(roles.parameters("value").values()))

            def interrupt(_):
                hook.remove()
                raise KeyboardInterrupt

            hook = parameter.register_post_accumulate_grad_hook(interrupt)
        return response_values(roles, *arguments)

    patch.setattr(ppo, "response_values", values)


def stop_in_the_optimizer(update, patch):
    """A real Ctrl-C at the end of the critic's second step."""
    real, calls = torch.optim.AdamW.step, itertools.count()

    def stepped(optimizer):
        done = real(optimizer)
        if next(calls) == 2 * STEPS * update + 3:
            press()
        return done

    patch.setattr(torch.optim.AdamW, "step", stepped)


def stop_in_the_save(update, patch):
    """A real Ctrl-C while update `update` is saved, which is finished first."""
    patch.setattr(training, "save_file", nth(update, save_file, press))


def stop_in_the_consumer(update, patch):
    """Ctrl-C between two updates, in the body of the `for`."""

    def visit(stats):
        if stats.update == update:
            raise KeyboardInterrupt

    return visit


STOPS = [
    stop_in_sampling,
    stop_in_scoring,
    stop_in_the_policys_loss,
    stop_in_the_values_backward,
    stop_in_the_optimizer,
    stop_in_the_save,
    stop_in_the_consumer,
]


def interrupt(train, monkeypatch, folder, stop=stop_in_the_policys_loss, update=3, **options):
    """Let a run be stopped when `update` updates are done."""
    with monkeypatch.context() as patch:
        visit = stop(update, patch)
        with pytest.raises(KeyboardInterrupt):
            train(folder, visit=visit, **options)


@pytest.mark.parametrize("stop, update", [*zip(STOPS, (1, 2, 3, 1, 2, 3, 1), strict=True)])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tiny, train, history, tmp_path, monkeypatch, stop, update
):
    folder, unfinished = tmp_path / "policy", tmp_path / "policy.unfinished"
    interrupt(train, monkeypatch, folder, stop, update)
    assert names_in(tmp_path) == ["policy.unfinished"]
    assert names_in(unfinished)[-1] == f"update-{update:05}"
    assert same(saved_weights(unfinished / f"update-{update:05}"), history[update][1])
    roles, stats = train(folder, new_roles(tiny, head_seed=9))  # what is on disk counts
    assert facts(stats) == facts(s for s, _ in history[update + 1 :])
    assert same(weights(roles), history[-1][1])
    assert same(load_file(folder / WEIGHTS), roles.state("policy"))
    assert names_in(tmp_path) == ["policy"]


@pytest.mark.parametrize("stop", STOPS)
def test_the_same_roles_go_on_too(tiny, train, final, tmp_path, monkeypatch, stop):
    """As in a notebook, where the cell is run again with the roles that are there."""
    roles = new_roles(tiny)
    interrupt(train, monkeypatch, tmp_path / "policy", stop, roles=roles)
    train(tmp_path / "policy", roles)
    assert same(weights(roles), final)


@pytest.mark.parametrize("stop", [stop_in_sampling, stop_in_the_policys_loss])
def test_a_run_that_is_stopped_in_its_first_update_begins_anew(
    train, final, tmp_path, monkeypatch, stop
):
    interrupt(train, monkeypatch, tmp_path / "policy", stop, 0)
    assert same(weights(train(tmp_path / "policy")[0]), final)


SAVE_EVERY_2 = replace(SETTINGS, save_every=2)


@pytest.mark.parametrize(
    "config, stop, update",
    [
        (SETTINGS, stop_in_the_policys_loss, 0),
        (SAVE_EVERY_2, stop_in_the_consumer, 1),
    ],
)
def test_the_same_roles_go_on_before_the_first_save_too(
    tiny, train, final, tmp_path, monkeypatch, config, stop, update
):
    roles = new_roles(tiny)
    interrupt(train, monkeypatch, tmp_path / "policy", stop, update, roles=roles, config=config)
    train(tmp_path / "policy", roles, config=config)
    assert same(weights(roles), final)


def test_a_run_may_be_interrupted_again_and_again(train, final, tmp_path, monkeypatch):
    for update in (1, 2, 3):
        interrupt(train, monkeypatch, tmp_path / "policy", stop_in_the_consumer, update)
    assert same(weights(train(tmp_path / "policy")[0]), final)


@pytest.mark.parametrize(
    "stop, update, kept",
    [
        (stop_in_the_consumer, 3, (2, 3)),  # between two updates all is whole, and kept
        (stop_in_sampling, 2, (0, 2)),
        (stop_in_the_optimizer, 3, (0, 2)),  # in the middle of one only the last save is
    ],
)
def test_with_fewer_saves_some_updates_are_made_again(
    train, history, tmp_path, monkeypatch, stop, update, kept
):
    folder = tmp_path / "policy"
    interrupt(train, monkeypatch, folder, stop, update, config=SAVE_EVERY_2)
    assert names_in(tmp_path / "policy.unfinished") == [f"update-{n:05}" for n in kept]
    last = kept[-1]
    roles, stats = train(folder, config=SAVE_EVERY_2)
    assert facts(stats) == facts(s for s, _ in history[last + 1 :])
    assert same(weights(roles), history[-1][1])


def test_an_adapted_beta_goes_on_too(train, tmp_path, monkeypatch):
    config = replace(SETTINGS, target_kl=0.5)
    roles, straight = train(config=config)
    for stop, update in ((stop_in_the_optimizer, 1), (stop_in_the_consumer, 3)):
        interrupt(train, monkeypatch, tmp_path / "policy", stop, update, config=config)
    again, stats = train(tmp_path / "policy", config=config)
    assert straight[3].beta != straight[2].beta != SETTINGS.beta
    assert facts(stats) == facts(straight[3:])
    assert same(weights(again), weights(roles))


def test_a_run_left_early_is_kept(tiny, tokenizer, train, final, tmp_path):
    run = train_ppo(new_roles(tiny), tokenizer, PROMPTS, SETTINGS, tmp_path / "policy")
    for stats in run:
        if stats.update == 2:
            break
    assert same(weights(train(tmp_path / "policy")[0]), final)


def test_a_run_that_is_still_held_does_not_disturb_the_next(tiny, tokenizer, final, tmp_path):
    arguments = (new_roles(tiny), tokenizer, PROMPTS, SETTINGS, tmp_path / "policy")
    run = train_ppo(*arguments)
    assert [next(run).update, next(run).update] == [1, 2]
    again = train_ppo(*arguments)
    assert next(again).update == 3
    run.close()
    list(again)
    assert same(weights(arguments[0]), final)


def test_time_goes_on_too(train, tmp_path, monkeypatch):
    before = []

    def visit(stats):
        before.append(stats.seconds)
        if stats.update == 2:
            raise KeyboardInterrupt

    interrupt(train, monkeypatch, tmp_path / "policy", lambda *_: visit)
    _, stats = train(tmp_path / "policy")
    assert stats[0].seconds > before[-1] > before[0] > 0


# --- an unfinished run with other settings -------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(tiny, tokenizer, tmp_path_factory):
    """What a run leaves that is stopped after three updates. No test may change it."""
    folder = tmp_path_factory.mktemp("stopped") / "policy"
    run = train_ppo(new_roles(tiny), tokenizer, PROMPTS, SETTINGS, folder)
    assert [next(run).update for _ in range(3)] == [1, 2, 3]
    run.close()
    return folder.with_name("policy.unfinished")


@pytest.fixture
def stopped(unfinished, tmp_path):
    """A copy of it, and the folder to go on with."""
    shutil.copytree(unfinished, tmp_path / "policy.unfinished")
    return tmp_path / "policy"


def test_that_run_goes_on_to_the_same_weights(train, final, stopped):
    assert same(weights(train(stopped)[0]), final)


OTHER = {
    "updates": 9,
    "batch_size": 6,
    "minibatch_size": 4,
    "epochs": 1,
    "learning_rate": 0.01,
    "beta": 0.2,
    "kl_kind": "k3",
    "kl_in": "loss",
    "target_kl": 3.0,
    "stop_kl": 9.0,
    "advantages": "rloo",
    "group_size": 2,
    "gamma": 0.99,
    "lam": 0.9,
    "clip": 0.1,
    "clip_high": 0.3,
    "ratio_of": "response",
    "mean_over": "responses",
    "value_clip": 0.5,
    "eos_penalty": 0.5,
    "temperature": 0.9,
    "response_length": 7,
    "max_grad_norm": 0.5,
    "save_every": 2,
    "seed": 1,
}


def refuse(tiny, tokenizer, stopped, message, prompts=PROMPTS, config=SETTINGS, roles=None):
    roles, before = roles or new_roles(tiny), contents(stopped.parent)
    first = weights(roles, roles.names)
    with pytest.raises(ValueError, match=message) as caught:
        train_ppo(roles, tokenizer, prompts, config, stopped)  # at the call
    assert contents(stopped.parent) == before
    assert same(weights(roles, roles.names), first)
    return str(caught.value)


def test_every_setting_is_compared(tiny, tokenizer, stopped):
    assert OTHER.keys() == asdict(SETTINGS).keys()
    roles = new_roles(tiny)
    for name, value in OTHER.items():
        there = getattr(SETTINGS, name)
        needs = {"kl_in": {"kl_kind": "k3"}, "advantages": {"group_size": 2}}  # k1 is no loss
        config = replace(SETTINGS, **{name: value}, **needs.get(name, {}))
        message = rf"settings \(.*{name}: {there} there, {value} here.*\); give those to go on"
        refuse(tiny, tokenizer, stopped, message, config=config, roles=roles)


def test_all_that_differs_is_named_and_so_are_the_folders(tiny, tokenizer, stopped):
    config = replace(SETTINGS, beta=0.3, seed=7)
    text = refuse(tiny, tokenizer, stopped, "other settings", PROMPTS[:-1], config)
    assert "beta: 0.1 there, 0.3 here; seed: 0 there, 7 here; prompts: 7 rows, digest" in text
    assert " there, 6 rows, digest " in text
    newest = stopped.with_name("policy.unfinished") / "update-00003"
    assert f"'{newest}' belongs" in text
    assert f"delete '{newest.parent}' to begin anew" in text


@pytest.mark.parametrize("prompts", [PROMPTS[:-1], PROMPTS[::-1], [*PROMPTS[:-1], "cow"]])
def test_prompts_are_compared(tiny, tokenizer, stopped, prompts):
    refuse(tiny, tokenizer, stopped, r"other settings \(prompts: 7 rows, digest", prompts)


def test_a_run_of_other_roles_is_kept(tiny, tokenizer, stopped, tmp_path):
    before = contents(stopped.parent)
    other = save_talker(tmp_path / "base", tokenizer, seed=1)
    for preset, rank, message in ((other, 4, "on another base"), (tiny, 8, "r 4, these roles 8")):
        roles = Roles(load_base(preset), rank, alpha=8)
        for role in ("policy", "reference", "reward"):
            roles.add(role, trainable=role == "policy")
        roles.add_head("reward")
        roles.heads["reward"].rescale(0.0, 1.0)
        roles.add("value", copy_of="reward")
        with pytest.raises(ValueError, match=message):
            train_ppo(roles, tokenizer, PROMPTS, SETTINGS, stopped)
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        assert contents(stopped.parent) == before


# --- damaged saves, and full disks ---------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


FILES = [
    f"policy/{CONFIG}",
    f"policy/{WEIGHTS}",
    f"value/{CONFIG}",
    f"value/{WEIGHTS}",
    f"value/{HEAD}",
    OPTIMIZER,
]


def test_the_files_of_a_save_are_these(unfinished):
    assert names_in(unfinished) == ["update-00002", "update-00003"]
    assert sorted(contents(unfinished / "update-00003")) == sorted(FILES)


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_of_a_damaged_save_the_one_before_is_used(
    tiny, tokenizer, reports, stopped, capsys, name, damage
):
    newest = stopped.with_name("policy.unfinished") / "update-00003"
    damage(newest / name)
    run = train_ppo(new_roles(tiny), tokenizer, PROMPTS, SETTINGS, stopped)
    assert f"'{newest}' cannot be read (" in (out := capsys.readouterr().out)
    assert "); going on from the save before it" in out
    assert facts([next(run)]) == facts(reports[2:3])


def test_a_run_goes_on_over_a_damaged_save(train, final, stopped):
    cut(stopped.with_name("policy.unfinished") / "update-00003" / OPTIMIZER)
    roles, stats = train(stopped)
    assert [s.update for s in stats] == [3, 4]
    assert same(weights(roles), final)
    assert names_in(stopped.parent) == ["policy"]


def test_a_save_that_is_missing_is_as_good(train, final, stopped):
    shutil.rmtree(stopped.with_name("policy.unfinished") / "update-00003")
    roles, stats = train(stopped)
    assert [s.update for s in stats] == [3, 4]
    assert same(weights(roles), final)


@pytest.mark.parametrize("name", FILES)
def test_without_a_whole_save_nothing_is_changed(tiny, tokenizer, stopped, name):
    unfinished = stopped.with_name("policy.unfinished")
    for save in unfinished.iterdir():
        cut(save / name)
    message = "no save in '.*policy.unfinished' can be read; delete the folder to begin anew"
    refuse(tiny, tokenizer, stopped, message)


def full(number, real):
    """`real`, but call `number` finds a full disk."""

    def action():
        raise OSError(28, "No space left on device")

    return nth(number, real, action)


def full_from(number, real):
    """No room is made."""
    calls = itertools.count()

    def call(*arguments, **options):
        if next(calls) >= number:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    return call


def full_safetensors(number, real):
    def action():
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    return nth(number, real, action)


def fill_the_optimizers_file(patch, full):
    patch.setattr(training, "save_file", full(2, save_file))


def fill_an_adapters_file(patch, full):
    patch.setattr(roles_module, "save_file", full(7, roles_module.save_file))


def fill_at_the_rename(patch, full):
    patch.setattr(os, "replace", full(2, os.replace))


@pytest.mark.parametrize("full", [full, full_safetensors])
@pytest.mark.parametrize(
    "where", [fill_the_optimizers_file, fill_an_adapters_file, fill_at_the_rename]
)
def test_on_a_full_disk_the_run_goes_on(train, history, tmp_path, monkeypatch, where, full):
    """Update 2 cannot be saved."""
    on_disk = {}

    def visit(stats):
        if stats.update < UPDATES:
            on_disk[stats.update] = [n[-5:] for n in names_in(tmp_path / "policy.unfinished")]
            newest = tmp_path / "policy.unfinished" / f"update-{on_disk[stats.update][-1]}"
            assert same(saved_weights(newest), history[int(newest.name[-5:])][1])

    with monkeypatch.context() as patch:
        where(patch, full)
        message = (
            r"update 2 could not be saved in .*policy.unfinished' \(.*No space left.*\); "
            "the newest save is update-00001; make room, the run goes on"
        )
        with pytest.warns(UserWarning, match=message):
            roles, stats = train(tmp_path / "policy", visit=visit)
    assert on_disk == {1: ["00000", "00001"], 2: ["00000", "00001"], 3: ["00001", "00003"]}
    assert facts(stats) == facts(s for s, _ in history[1:])
    assert same(weights(roles), history[-1][1])
    assert names_in(tmp_path) == ["policy"]


@pytest.mark.parametrize("kind, saved", [(full_from, 1), (full, 2)])
def test_a_run_that_could_not_be_saved_is_stopped_and_goes_on(
    train, history, tmp_path, monkeypatch, kind, saved
):
    """If room is made before the run ends, the update that had no room is saved then."""
    with monkeypatch.context() as patch:
        fill_the_optimizers_file(patch, kind)
        with pytest.warns(UserWarning, match="update 2 could not be saved"):
            interrupt(train, monkeypatch, tmp_path / "policy", stop_in_the_consumer, 2)
    roles, stats = train(tmp_path / "policy")
    assert facts(stats) == facts(s for s, _ in history[saved + 1 :])
    assert same(weights(roles), history[-1][1])


def test_a_full_disk_at_the_end_keeps_the_run(train, history, final, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(roles_module, "save_file", full_from(3 * UPDATES, save_file))
        with pytest.raises(OSError, match="No space left"):
            train(tmp_path / "policy")
    assert "policy" not in names_in(tmp_path)
    roles, stats = train(tmp_path / "policy")
    assert facts(stats) == facts(s for s, _ in history[UPDATES:])
    assert same(weights(roles), final)
    assert names_in(tmp_path) == ["policy"]


# --- what is not finite --------------------------------------------------------------------


def spoil_the_loss(role, value):
    name, real = f"{role}_loss", getattr(ppo, f"{role}_loss")

    def spoil(patch, number):
        calls = itertools.count()

        def loss(*arguments):
            result, report = real(*arguments)
            return (result * value if next(calls) == number else result), report

        patch.setattr(ppo, name, loss)

    return spoil


def spoil_the_gradient(role):
    name, real = f"{role}_loss", getattr(ppo, f"{role}_loss")

    def spoil(patch, number):
        calls = itertools.count()

        def loss(new, *arguments):
            if next(calls) == number:
                new.register_hook(lambda gradient: gradient * NAN)  # even if all is clipped
            return real(new, *arguments)

        patch.setattr(ppo, name, loss)

    return spoil


def spoil_the_logits(patch, number):
    calls = itertools.count()

    def logprobs(model, *arguments):
        if torch.is_grad_enabled() and next(calls) == number:
            output = model.get_output_embeddings()
            hook = output.register_forward_hook(lambda *_: hook.remove() or _[2] * NAN)
        return response_logprobs(model, *arguments)

    patch.setattr(ppo, "response_logprobs", logprobs)


def spoil_the_values(patch, number):
    calls = itertools.count()

    def values(*arguments):
        result = response_values(*arguments)
        broken = torch.is_grad_enabled() and next(calls) == number
        return result * INF if broken else result

    patch.setattr(ppo, "response_values", values)


BROKEN = {
    "policy loss nan": (spoil_the_loss("policy", NAN), "policy", "the loss is nan"),
    "policy loss inf": (spoil_the_loss("policy", INF), "policy", "the loss is -?inf"),
    "value loss nan": (spoil_the_loss("value", NAN), "value", "the loss is nan"),
    "value loss inf": (spoil_the_loss("value", INF), "value", "the loss is inf"),
    "policy gradient": (spoil_the_gradient("policy"), "policy", "the gradient norm is nan"),
    "value gradient": (spoil_the_gradient("value"), "value", "the gradient norm is nan"),
    "logits": (spoil_the_logits, "policy", "logits at position .* have no softmax"),
    "values": (spoil_the_values, "value", "values is -?inf at"),
}


@pytest.mark.parametrize("spoil, role, message", BROKEN.values(), ids=BROKEN)
def test_what_is_not_finite_ends_the_run_and_keeps_the_last_save(
    tiny, train, history, tmp_path, monkeypatch, spoil, role, message
):
    """In the third step of update 2, with the same roles as in a notebook."""
    roles, folder = new_roles(tiny), tmp_path / "policy"
    with monkeypatch.context() as patch:
        spoil(patch, STEPS + 2)
        where = f"broke off at role '{role}' after 1 updates, with a learning_rate of 0.02"
        with pytest.raises(FloatingPointError, match=f"{where}.*update 1 is kept .*{message}"):
            train(folder, roles)
    newest = tmp_path / "policy.unfinished" / "update-00001"
    assert names_in(newest.parent) == ["update-00000", "update-00001"]
    assert same(saved_weights(newest), history[1][1])
    _, stats = train(folder, roles)
    assert facts(stats) == facts(s for s, _ in history[2:])
    assert same(weights(roles), history[-1][1])


def test_nothing_is_said_to_be_kept_without_a_folder(train, monkeypatch):
    spoil_the_loss("policy", NAN)(monkeypatch, 0)
    with pytest.raises(
        FloatingPointError, match="broke off at role 'policy' after 0 updates"
    ) as caught:
        train()
    assert "kept" not in str(caught.value)


@pytest.mark.parametrize("config, number", [(SETTINGS, 0), (SAVE_EVERY_2, 3 * STEPS)])
def test_the_save_that_is_said_to_be_kept_is_there(train, tmp_path, monkeypatch, config, number):
    spoil_the_loss("policy", NAN)(monkeypatch, number)
    with pytest.raises(FloatingPointError) as caught:
        train(tmp_path / "policy", config=config)
    folder = tmp_path / "policy.unfinished"
    kept = names_in(folder)[-1:] if folder.exists() else []
    said = [f"update-{n:05}" for n in range(9) if f"; update {n} is kept" in str(caught.value)]
    assert said == kept


def test_weights_that_diverge_end_the_run(train, tmp_path):
    with pytest.raises(FloatingPointError, match="broke off at role 'policy' after 0 updates"):
        train(tmp_path / "policy", config=replace(SETTINGS, learning_rate=1e25))
    assert names_in(tmp_path / "policy.unfinished") == ["update-00000"]


def test_a_policy_that_can_no_longer_sample_ends_the_run(tiny, train, tmp_path):
    """One step in an update, so large that the next cannot begin."""
    config = replace(SETTINGS, learning_rate=1e25, epochs=1, minibatch_size=4)
    with pytest.raises(FloatingPointError, match="broke off at role 'policy' after 1 updates"):
        train(tmp_path / "policy", config=config)


# --- real kills ----------------------------------------------------------------------------


def run_in_a_child(base, folder, action=None):
    """Fork a child that trains in `folder` and then writes its critic too; the child's id."""
    if pid := os.fork():
        return pid
    try:
        if action:
            action()
        roles, tokenizer = new_roles(base), load_tokenizer(load_preset("pocket"))
        list(train_ppo(roles, tokenizer, PROMPTS, replace(SETTINGS, updates=3), folder))
        roles.save("value", folder.with_name("value"))
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        os._exit(1)


def exit_in_the_save():
    """Die with half of the optimizer's file written."""
    calls = itertools.count()

    def write(tensors, path, **options):
        save_file(tensors, path, **options)
        if next(calls) == 1:
            cut(path)
            os._exit(9)

    training.save_file = write


def kill_runs(model, folder, kills):
    """Kill runs at random moments and let them go on; all must end like one that was not killed."""
    base = load_preset("pocket", model=model)
    begun = time.perf_counter()
    _, status = os.waitpid(run_in_a_child(base, folder / "straight" / "policy"), 0)
    assert status == 0
    length = time.perf_counter() - begun
    expected = saved_weights(folder / "straight")
    rng = random.Random()
    actions = [exit_in_the_save, *[None] * kills]
    for number, action in enumerate(actions):
        place = folder / str(number) / "policy"
        pid, moment = (
            run_in_a_child(base, place, action),
            rng.uniform(0.4, 1) * length,
        )  # most of it loads
        if action is None:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        left = sorted(str(p.relative_to(place.parent)) for p in place.parent.glob("*/*"))
        how = f"{action.__name__ if action else f'{moment:.2f} s'}, status {status}, left {left}"
        _, again = os.waitpid(run_in_a_child(base, place), 0)
        right = again == 0 and same(saved_weights(place.parent), expected)
        verdict = "same" if right else f"DIFFERENT, status {again}"
        print(f"{number}: {how}: {verdict}", flush=True)


def test_killed_runs_go_on_to_the_same_weights(tiny, tmp_path):
    """One process that forks the runs: it imports once, and has one thread, as a fork needs."""
    code = (
        "import sys, torch, pathlib, test_train_ppo as t; torch.set_num_threads(1); "
        f"t.kill_runs({tiny.model!r}, pathlib.Path({str(tmp_path)!r}), {KILLS})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(lines) == KILLS + 1, done.stdout
    assert all(line.endswith(": same") for line in lines), done.stdout


SHORT = replace(SETTINGS, updates=2, epochs=1, minibatch_size=4)
FILE_OPERATIONS = 21  # of that run: files, renames, removals


@pytest.fixture(scope="module")
def short(tiny, tokenizer):
    """The weights at its end."""
    roles = new_roles(tiny)
    list(train_ppo(roles, tokenizer, PROMPTS, SHORT))
    return weights(roles)


@pytest.mark.parametrize("number", range(FILE_OPERATIONS + 1))
def test_wherever_a_save_stops_the_run_goes_on(train, short, tmp_path, monkeypatch, number):
    """A kill before each file, rename and removal, as far as they are done from Python."""
    calls = itertools.count()

    def guarded(real):
        def call(*arguments, **options):
            if next(calls) == number:
                raise SystemExit
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", guarded(os.replace))
        patch.setattr(shutil, "rmtree", guarded(shutil.rmtree))
        for module in (training, roles_module):
            patch.setattr(module, "save_file", guarded(save_file))
        if number == FILE_OPERATIONS:
            train(tmp_path / "policy", config=SHORT)  # these were all
            return
        with pytest.raises(SystemExit):
            train(tmp_path / "policy", config=SHORT)
    assert same(weights(train(tmp_path / "policy", config=SHORT)[0]), short)
    assert names_in(tmp_path) == ["policy"]


def test_a_kill_in_the_last_removal_does_no_harm(train, short, tmp_path, monkeypatch):
    """In the midst of it: some files are gone, and some are not."""
    real = shutil.rmtree

    def half(path, **options):
        if path.name.endswith(".done") and path.exists():
            (path / "update-00001" / OPTIMIZER).unlink()
            raise SystemExit
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(SystemExit):
            train(tmp_path / "policy", config=SHORT)
    assert same(weights(train(tmp_path / "policy", config=SHORT)[0]), short)


def test_a_policy_with_a_head_is_refused(tiny, tokenizer):
    roles = new_roles(tiny)
    roles.add_head("policy")
    with pytest.raises(ValueError, match="role 'policy' has a head"):
        train_ppo(roles, tokenizer, PROMPTS, SETTINGS)


@pytest.mark.parametrize("role", ["reference", "reward"])
def test_a_frozen_role_must_be_frozen(tiny, tokenizer, role):
    roles = new_roles(tiny)
    roles._trainable[role] = True
    with pytest.raises(ValueError, match=f"role '{role}' is trainable"):
        train_ppo(roles, tokenizer, PROMPTS, SETTINGS)
