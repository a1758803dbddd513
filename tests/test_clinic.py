"""The clinic's faults: silent in the real trainer, not without effect, and gone afterwards."""

import doctest
import inspect
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_train_ppo import PROMPTS, SETTINGS, new_roles, same, save_talker, weights

from rlhf_helpers import clinic
from rlhf_helpers.clinic import FAULTS, plant
from rlhf_helpers.examine import examine, log_row
from rlhf_helpers.ppo import train_ppo

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


@pytest.mark.parametrize("name", ["gremlins", "", None, "KL_SIGN"])
def test_an_unknown_fault(tiny, name):
    with pytest.raises(ValueError, match=f"there is no fault {name!r}; choose one of bare_prompt"):
        plant(name, new_roles(tiny))
