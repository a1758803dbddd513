"""The clinic's faults: silent in the real trainer, not without effect, and gone afterwards."""

import doctest
import inspect
import math
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_text import CHAT, tokenizer_with
from test_train_ppo import (
    PROMPTS,
    SETTINGS,
    far_roles,
    new_roles,
    same,
    save_talker,
    weights,
)
from torch.testing import assert_close

from rlhf_helpers import clinic, ppo, reward, rollout
from rlhf_helpers.clinic import FAULTS, plant
from rlhf_helpers.examine import examine, log_row
from rlhf_helpers.losses import gae, whiten
from rlhf_helpers.ppo import collect_experience, train_ppo
from rlhf_helpers.roles import ScalarHead

LONGEST = 20  # lines of a fault that can be read at a glance


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return save_talker(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


def run(preset, tokenizer, fault=None):
    """The log of a small run, and the weights of both trained roles at its end."""
    roles = new_roles(preset)
    with plant(fault, roles) if fault else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = [log_row(stats) for stats in train_ppo(roles, tokenizer, PROMPTS, SETTINGS)]
    return rows, weights(roles)


@pytest.fixture(scope="module")
def healthy(tiny, tokenizer):
    return run(tiny, tokenizer)


def test_doctests():
    results = doctest.testmod(clinic)
    assert results.attempted > 0 and results.failed == 0


def test_there_are_at_least_twelve():
    assert len(FAULTS) >= 12


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_silent_and_changes_the_run(tiny, tokenizer, healthy, fault):
    rows, end = run(tiny, tokenizer, fault)
    assert len(rows) == SETTINGS.updates
    assert all(torch.isfinite(tensor).all() for tensor in end.values())
    assert not same(end, healthy[1])


@pytest.mark.parametrize("error", [None, KeyError])
def test_nothing_of_a_fault_is_left(tiny, tokenizer, healthy, error):
    roles = new_roles(tiny)
    for fault in FAULTS:
        with pytest.raises(error) if error else nullcontext(), plant(fault, roles):
            if error:
                raise error
    rows, end = run(tiny, tokenizer)
    assert rows == healthy[0] and same(end, healthy[1])


def test_weights_are_in_float32_again(tiny):
    roles = new_roles(tiny)
    with plant("adapter_in_bfloat16", roles):
        assert {p.dtype for p in roles.parameters("policy").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in roles.state("policy").values()} == {torch.float32}
    assert {tensor.dtype for tensor in roles.state("reference").values()} == {torch.float32}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_can_be_read(fault):
    lines = inspect.getsource(FAULTS[fault]).splitlines()
    assert len(lines) <= LONGEST and FAULTS[fault].__doc__ and lines[0] == "@fault"
    assert lines[1].startswith(f"def {fault}(roles")


@pytest.mark.parametrize(
    ("fault", "quantity"),
    [
        ("ratio_to_reference", "first_ratio"),
        ("padding_whitened", "advantage_std"),
        ("whitened_returns", "return_gap"),
        ("lost_gradient", "policy_grad_norm"),
    ],
)
def test_what_must_be_exact_says_broken(tiny, tokenizer, healthy, fault, quantity):
    broken = [a.quantity for a in examine(run(tiny, tokenizer, fault)[0]) if a.severity == "broken"]
    assert quantity in broken
    assert all(alarm.severity == "look" for alarm in examine(healthy[0]))


def test_a_history_is_examined_as_its_log_is(tiny, tokenizer):
    history = list(train_ppo(new_roles(tiny), tokenizer, PROMPTS, SETTINGS))
    rows = [log_row(stats) for stats in history]
    assert examine(history) == examine(rows) != []
    assert rows[0]["first_ratio"] == 1 and rows[0]["policy_grad_norm"] > 0


def test_a_history_without_a_critic(tiny, tokenizer):
    config = replace(SETTINGS, advantages="rloo", group_size=4, batch_size=16)
    history = list(train_ppo(new_roles(tiny), tokenizer, PROMPTS, config))
    rows = [log_row(stats) for stats in history]
    assert all(alarm.severity == "look" for alarm in examine(history))
    assert rows[0]["policy_loss"] and not {"value_loss", "return_gap"} & rows[0].keys()


# --- what each does, by hand -----------------------------------------------------------------

PART = slice(1, 4)


@pytest.fixture
def roles(tiny):
    return new_roles(tiny)


@pytest.fixture
def far(tiny, tokenizer):
    """Roles whose policy has left the reference, and what they have sampled."""
    roles = far_roles(tiny)
    return roles, collect_experience(roles, tokenizer, PROMPTS[:4], SETTINGS, 0.1, seed=0)


def mean_of(x, experience):
    """Over the tokens of the part that count."""
    return x[experience.rollout.response_mask[PART] == 1].mean().item()


def test_a_bare_prompt_is_its_text_alone(roles):
    tokenizer = tokenizer_with(CHAT, "bos")
    with plant("bare_prompt", roles):
        batch = rollout.encode_prompts(tokenizer, ["hi", "what is tea like?"], 99)
    assert batch.keys() == {"input_ids", "attention_mask"}
    ids = [row[seen == 1] for row, seen in zip(*batch.values(), strict=True)]
    assert tokenizer.batch_decode(ids) == ["hi", "what is tea like?"]


def test_generation_has_the_settings_of_chat_models(roles):
    with plant("generate_defaults", roles):
        settings = rollout.GenerationConfig(max_new_tokens=5, temperature=1.0, top_k=0)
    assert (settings.temperature, settings.top_k, settings.max_new_tokens) == (0.7, 50, 5)


def test_one_token_off_is_each_sequence_alone_at_its_own_places(roles):
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 5, 6, 7, 8, 4]])
    mask = (ids != 0).long()
    with plant("one_token_off", roles), torch.no_grad():
        found = ppo.response_logprobs(roles.use("policy"), ids, mask, 3, 2.0)
        for row, seen, logprobs in zip(ids, mask, found, strict=True):
            logits = roles.model(row[seen == 1][None]).logits[0, -3:] / 2
            assert_close(logprobs, logits.log_softmax(-1)[torch.arange(3), row[-3:]])


def test_without_its_eos_a_mask_ends_before_it(roles):
    tokens = torch.tensor([[7, 2, 2], [7, 8, 9], [2, 2, 2]])
    with plant("eos_masked_out", roles):
        found = rollout.mask_after_eos(tokens, 2)
    assert found.tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0]]


def test_the_score_is_read_in_the_last_column(roles):
    with plant("score_at_padding", roles):
        assert reward.last_token_index(torch.tensor([[1, 1, 0], [1, 0, 0]])).tolist() == [2, 2]


def test_heads_that_are_lost_or_turned_round(roles):
    right = roles.heads["reward"]
    with plant("lost_head", roles):
        lost = roles.heads["reward"]
        assert_close(lost.weight.data, ScalarHead(right.in_features, seed=1).weight.data)
        assert lost.statistics == right.statistics and not lost.weight.requires_grad
    with plant("swapped_labels", roles):
        turned = roles.heads["reward"]
        assert_close(turned.weight, -right.weight)
        assert_close(turned.bias, -right.bias)
    assert roles.heads["reward"] is right


def test_the_penalty_is_a_bonus_or_none(roles):
    """The policy finds the first token twice as likely as the reference does."""
    pair = torch.tensor([[0.5, 0.5, 1.0]]).log(), torch.tensor([[0.25, 0.5, 1.0]]).log()
    arguments = (torch.tensor([2.0]), *pair, torch.tensor([[1, 1, 0]]), 0.1, "k1")
    for fault, first in (("kl_sign", 0.1 * math.log(2)), ("kl_without_gradient", 0.0)):
        with plant(fault, roles):
            assert_close(ppo.shape_rewards(*arguments), torch.tensor([[first, 2, 0]]))


def test_kl_in_the_loss_is_a_constant(far):
    roles, experience = far
    arguments = roles, experience, PART, SETTINGS, 0.3
    right = ppo.policy_objective(*arguments)
    with plant("kl_without_gradient", roles):
        loss, report = ppo.policy_objective(*arguments)
    kl = mean_of((experience.logprobs - experience.ref_logprobs)[PART], experience)
    assert loss.item() - right[0].item() == pytest.approx(0.3 * kl, rel=1e-4)
    assert report == right[1] and abs(kl) > 0.01


def test_the_ratio_is_to_the_reference(far):
    roles, experience = far
    config = replace(SETTINGS, clip=0.05)
    with plant("ratio_to_reference", roles):
        loss, report = ppo.policy_objective(roles, experience, PART, config, 0.3)
    ratio = (experience.logprobs - experience.ref_logprobs)[PART].exp()
    advantages = experience.advantages[PART]
    kept = torch.minimum(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages)
    assert report["ratio"] == pytest.approx(mean_of(ratio, experience), rel=1e-4)
    assert loss.item() == pytest.approx(-mean_of(kept, experience), rel=1e-4)


def test_what_is_whitened(roles):
    values, mask = torch.tensor([[1.0, 3.0, 0.0], [2.0, 0.0, 0.0]]), torch.ones(2, 3)
    mask[0, 2] = mask[1, 1:] = 0
    with plant("padding_whitened", roles):  # mean 1, variance (0 + 4 + 1 + 1 + 1 + 1)/5
        assert_close(ppo.whiten(values, mask), (values - 1) / 1.6**0.5)
    rewards = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    expected = gae(rewards, values, mask, 0.9, 0.5)
    with plant("whitened_returns", roles):
        advantages, returns = ppo.gae(rewards, values, mask, 0.9, 0.5)
    assert_close(advantages, expected[0])
    assert_close(returns, whiten(expected[1], mask))


@pytest.mark.parametrize("name", ["gremlins", "", None, "KL_SIGN"])
def test_an_unknown_fault(tiny, name):
    with pytest.raises(ValueError, match=f"there is no fault {name!r}; choose one of bare_prompt"):
        plant(name, new_roles(tiny))
