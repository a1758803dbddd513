"""Checks before a run: all pass on the course's roles, each finds its fault, nothing is changed."""

import math
import random
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import record_ppo
import torch
from helpers_training import role_weights
from test_train_ppo import PROMPTS, SETTINGS, new_roles, same, save_talker

from rlhf_helpers import ppo
from rlhf_helpers.clinic import plant
from rlhf_helpers.pocket import world
from rlhf_helpers.preflight import CHECKS, Finding, preflight

# On a base of random weights; what steps can do there is too little for some checks.
FOUND = {
    "bare_prompt": "prompts in their template",
    "eos_masked_out": "an answer counts to its EOS",
    "generate_defaults": "scored as it was sampled",
    "one_token_off": "scored as it was sampled",
    "score_at_padding": "score without regard to padding",
    "padding_whitened": "advantages and returns come out",
    "whitened_returns": "advantages and returns come out",
    "ratio_to_reference": "first ratio is 1",
    "lost_gradient": "gradients reach each its own role",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return save_talker(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture
def roles(tiny):
    return new_roles(tiny)


@pytest.fixture(scope="module")
def pocket_roles():
    return record_ppo.fresh_roles()


def failed(findings):
    return {finding.name for finding in findings if not finding.passed}


def everything(roles):
    """Weights of all roles, which of them are trained, and what acts and how."""
    flags = {name: p.requires_grad for name, p in roles.model.named_parameters()}
    grads = {name: p.grad is None for name, p in roles.model.named_parameters()}
    weights = {
        f"{role}/{key}": tensor
        for role in roles.names
        for key, tensor in role_weights(roles, role).items()
    }
    return weights, (flags, grads, roles.active, roles.model.training)


def test_all_is_well_in_the_pocket_world(pocket_roles, tokenizer):
    prompts = random.Random(1).sample(world.prompts("train"), 64)
    findings = preflight(pocket_roles, tokenizer, prompts)
    assert failed(findings) == set() and [f.name for f in findings] == [*CHECKS]
    assert all(str(finding).startswith("ok") for finding in findings)


@pytest.mark.parametrize(
    ("advantages", "fault", "names"),
    [
        ("rloo", None, set()),
        ("grpo", None, set()),
        ("rloo", "kl_sign", {"the price of KL calls it back"}),
        ("rloo", "one_token_off", {"scored as it was sampled"}),
    ],
)
def test_runs_without_a_critic(pocket_roles, tokenizer, advantages, fault, names):
    kl = {"kl_in": "loss", "kl_kind": "k3"} if advantages == "grpo" else {}
    config = ppo.PPOConfig(advantages=advantages, group_size=4, **kl)
    with plant(fault, pocket_roles) if fault else nullcontext():
        findings = preflight(pocket_roles, tokenizer, world.prompts("train"), config)
    assert failed(findings) >= names and (fault or failed(findings) == set())
    assert [f.name for f in findings] == [*CHECKS]


@pytest.mark.parametrize("group_size", [3, 8, 16])
def test_a_batch_has_whole_groups(roles, tokenizer, group_size):
    sizes = {"group_size": group_size, "batch_size": group_size, "minibatch_size": 1}
    config = replace(SETTINGS, advantages="rloo", **sizes)
    findings = preflight(roles, tokenizer, PROMPTS, config)
    (seen,) = [f.seen for f in findings if f.name == "an answer counts to its EOS"]
    assert f"of {2 * group_size * math.ceil(8 / group_size)} do" in seen


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("lost_head", "scores in their unit"),
        ("kl_sign", "the price of KL calls it back"),
        ("kl_without_gradient", "the price of KL calls it back"),
    ],
)
def test_faults_of_the_score_and_of_its_price(pocket_roles, tokenizer, fault, name):
    with plant(fault, pocket_roles):
        findings = preflight(pocket_roles, tokenizer, world.prompts("train"))
    assert name in failed(findings)


def test_what_no_check_can_know(pocket_roles, tokenizer):
    """A reward that is the opposite of what was wanted is as good a number as any."""
    with plant("swapped_labels", pocket_roles):
        findings = preflight(pocket_roles, tokenizer, world.prompts("train"))
    assert failed(findings) == set()


@pytest.fixture(scope="module")
def sound(tiny, tokenizer):
    """What fails on this base with nothing planted."""
    return failed(preflight(new_roles(tiny), tokenizer, PROMPTS, SETTINGS))


@pytest.mark.parametrize("fault", FOUND)
def test_each_fault_is_found_by_its_check_and_nothing_is_changed(roles, tokenizer, sound, fault):
    assert FOUND[fault] not in sound
    weights, rest = everything(roles)
    random_state = torch.get_rng_state()
    with plant(fault, roles), warnings.catch_warnings():
        warnings.simplefilter("error")
        findings = preflight(roles, tokenizer, PROMPTS, SETTINGS)
    assert FOUND[fault] in failed(findings)
    (line,) = [str(f) for f in findings if f.name == FOUND[fault]]
    assert line.startswith("FAILED") and len(line.splitlines()) == 2
    now, rest_now = everything(roles)
    assert same(weights, now) and rest == rest_now
    assert torch.equal(random_state, torch.get_rng_state())
    assert "generate" not in vars(roles.base)


def test_a_reference_that_the_policy_does_not_begin_as(roles, tokenizer):
    for weight in roles._adapter("reference").values():
        weight.data *= 1.1
    assert "first KL is 0" in failed(preflight(roles, tokenizer, PROMPTS, SETTINGS))


def test_a_reference_that_moves_along(roles, tokenizer, monkeypatch):
    right = ppo.role_logprobs

    def same_object(roles, role, *rest):
        return right(roles, "policy" if role == "reference" else role, *rest)

    monkeypatch.setattr(ppo, "role_logprobs", same_object)
    findings = {f.name: f for f in preflight(roles, tokenizer, PROMPTS, SETTINGS)}
    assert not findings["the price of KL calls it back"].passed
    assert findings["the price of KL calls it back"].seen.startswith("0.00 to 0.00 nats")


def test_steps_that_round_to_nothing_are_seen_at_a_small_learning_rate(roles, tokenizer):
    small = replace(SETTINGS, learning_rate=1e-6)
    name = "a step moves every weight"
    assert name not in failed(preflight(roles, tokenizer, PROMPTS, small))
    with plant("adapter_in_bfloat16", roles):
        assert name in failed(preflight(roles, tokenizer, PROMPTS, small))


def test_nothing_is_changed_after_an_error(roles, tokenizer, monkeypatch):
    roles.use("reward")
    weights, rest = everything(roles)
    monkeypatch.setattr("rlhf_helpers.ppo.value_objective", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preflight(roles, tokenizer, PROMPTS, SETTINGS)
    now, rest_now = everything(roles)
    assert same(weights, now) and rest == rest_now


def test_a_sampler_that_cannot_be_watched_is_no_pass(roles, tokenizer, monkeypatch):
    asked = [PROMPTS[i % len(PROMPTS)] for i in range(16)]
    rollout = ppo.sample_responses(roles.use("policy"), tokenizer, asked, 6, seed=0)
    monkeypatch.setattr(ppo, "sample_responses", lambda *arguments, **options: rollout)
    found = {f.name: f for f in preflight(roles, tokenizer, PROMPTS, SETTINGS)}
    assert not found["scored as it was sampled"].passed
    assert found["scored as it was sampled"].seen == "log-probabilities within inf"


def without(role=None, head=None):
    def change(roles):
        if head:
            del roles.heads[head]
        if role:
            del roles._trainable[role]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(head="value"), "role 'value' has no head; call add_head"),
        (without(head="reward"), "role 'reward' has no head; call add_head"),
        (without(role="reference"), "there is no role 'reference'"),
        (lambda roles: setattr(roles.heads["reward"], "statistics", None), "normalise"),
    ],
)
def test_roles_that_cannot_be_trained(roles, tokenizer, change, message):
    change(roles)
    with pytest.raises(ValueError, match=message):
        preflight(roles, tokenizer, PROMPTS, SETTINGS)


@pytest.mark.parametrize(
    ("prompts", "config", "error", "message"),
    [
        ([], SETTINGS, ValueError, "prompts is empty"),
        ("what is hot?", SETTINGS, TypeError, "give a list of texts"),
        (PROMPTS[:2], SETTINGS, ValueError, "there are 2 prompts for a batch of 4"),
        (PROMPTS, {"beta": 0.1}, TypeError, r"give PPOConfig\("),
    ],
)
def test_bad_arguments(roles, tokenizer, prompts, config, error, message):
    with pytest.raises(error, match=message):
        preflight(roles, tokenizer, prompts, config)


def test_a_line_says_what_was_seen():
    assert str(Finding("first KL is 0", True, "0 nats")) == (
        "ok     first KL is 0                     0 nats"
    )
    assert str(Finding("first KL is 0", False, "2 nats")).splitlines() == [
        "FAILED first KL is 0                     2 nats",
        f"       look {CHECKS['first KL is 0']}",
    ]
