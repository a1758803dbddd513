"""The checks of lesson 04: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import copy
import doctest

import pytest
import torch

from rlhf_helpers import memory
from rlhf_helpers.checks import (
    check_predict_bytes,
    check_shape_rewards,
    check_train_step,
    lesson_04,
)
from rlhf_helpers.checks.exercise import name_mistake, same
from rlhf_helpers.roles import Roles

CHECKS = {
    "train_step": check_train_step,
    "shape_rewards": check_shape_rewards,
    "predict_bytes": check_predict_bytes,
}
STEP_MESSAGES = [
    getattr(lesson_04, name)
    for name in (
        *("_SUMMED", "_FORWARDS_FIRST", "_NOT_USED", "_CARRIED", "_FROZEN_ROLE", "_LEFT_OUT"),
        *("_NO_BACKWARD", "_BACKWARD_TWICE", "_NO_STEP", "_STEPS_TWICE", "_STEP_FIRST"),
        *("_CLEARED_BETWEEN", "_NOT_CLEARED", "_CLEARED_LAST", "_MODEL_CLEARED", "_UNKNOWN_ORDER"),
    )
]


def run(name, answer, capsys):
    """What the check of that exercise prints about the answer; line breaks become spaces."""
    assert CHECKS[name](answer) is None
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    return " ".join(printed.split())


def test_doctests():
    results = doctest.testmod(lesson_04)
    assert results.attempted == 3
    assert results.failed == 0


# --- train_step, wrong ---


def clear(optimizers):
    for optimizer in optimizers.values():
        optimizer.zero_grad()


def step(optimizers):
    for optimizer in optimizers.values():
        optimizer.step()


def summed(roles, losses, optimizers):
    clear(optimizers)
    policy = losses["policy"](roles.use("policy"))
    value = losses["value"](roles.use("value"))
    (policy + value).backward()
    step(optimizers)


def summed_in_one_line(roles, losses, optimizers):
    clear(optimizers)
    sum(losses[role](roles.use(role)) for role in losses).backward()
    step(optimizers)


def summed_critic_first(roles, losses, optimizers):
    clear(optimizers)
    value = losses["value"](roles.use("value"))
    torch.stack([value, losses["policy"](roles.use("policy"))]).mean().backward()
    step(optimizers)


def forwards_first(roles, losses, optimizers):
    computed = {role: losses[role](roles.use(role)) for role in losses}
    for role, loss in computed.items():
        optimizers[role].zero_grad()
        loss.backward()
        optimizers[role].step()


def backward_of_a_list(roles, losses, optimizers):
    clear(optimizers)
    torch.autograd.backward([losses[role](roles.use(role)) for role in losses])
    step(optimizers)


def used_once(roles, losses, optimizers):
    model = roles.use("policy")
    for role in losses:
        optimizers[role].zero_grad()
        losses[role](model).backward()
        optimizers[role].step()


def never_used(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        losses[role](roles.model).backward()
        optimizers[role].step()


def used_too_late(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        loss = losses[role](roles.model)
        roles.use(role)
        loss.backward()
        optimizers[role].step()


def running_total(roles, losses, optimizers):
    clear(optimizers)
    total = 0
    for role in losses:
        total = total + losses[role](roles.use(role))
        total.backward()
    step(optimizers)


def all_names(roles, losses, optimizers):
    for role in roles.names:
        optimizers[role].zero_grad()
        losses[role](roles.use(role)).backward()
        optimizers[role].step()


def all_losses(roles, losses, optimizers):
    clear(optimizers)
    for role in reversed(roles.names):
        losses[role](roles.use(role)).backward()
    step(optimizers)


def parameters_of_all(roles, losses, optimizers):
    for role in roles.names:
        for parameter in roles.parameters(role).values():
            parameter.grad = None


def only_the_policy(roles, losses, optimizers):
    optimizers["policy"].zero_grad()
    losses["policy"](roles.use("policy")).backward()
    optimizers["policy"].step()


def without_backward(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        losses[role](roles.use(role))
        optimizers[role].step()


def backward_of_the_last(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        loss = losses[role](roles.use(role))
    loss.backward()
    step(optimizers)


def backward_twice(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        loss = losses[role](roles.use(role))
        loss.backward(retain_graph=True)
        loss.backward()
        optimizers[role].step()


def without_step(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        losses[role](roles.use(role)).backward()


def one_steps(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        losses[role](roles.use(role)).backward()
    optimizers[role].step()


def all_step_each_time(roles, losses, optimizers):
    clear(optimizers)
    for role in losses:
        losses[role](roles.use(role)).backward()
        step(optimizers)


def steps_first(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        loss = losses[role](roles.use(role))
        optimizers[role].step()
        loss.backward()


def cleared_between(roles, losses, optimizers):
    for role in losses:
        losses[role](roles.use(role)).backward()
        optimizers[role].zero_grad()
        optimizers[role].step()


def all_cleared_each_time(roles, losses, optimizers):
    for role in losses:
        clear(optimizers)
        losses[role](roles.use(role)).backward()
    step(optimizers)


def never_cleared(roles, losses, optimizers):
    for role in losses:
        losses[role](roles.use(role)).backward()
        optimizers[role].step()


def one_cleared(roles, losses, optimizers):
    optimizers["policy"].zero_grad()
    never_cleared(roles, losses, optimizers)


def cleared_last(roles, losses, optimizers):
    never_cleared(roles, losses, optimizers)
    clear(optimizers)


def cleared_after_each_step(roles, losses, optimizers):
    for role in losses:
        losses[role](roles.use(role)).backward()
        optimizers[role].step()
        optimizers[role].zero_grad()


def model_cleared(roles, losses, optimizers):
    for role in losses:
        model = roles.use(role)
        model.zero_grad()
        losses[role](model).backward()
        optimizers[role].step()


def halved(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_grad()
        (losses[role](roles.use(role)) / len(losses)).backward()
        optimizers[role].step()


STEP_MISTAKES = [
    ("the losses are added up", summed),
    ("the losses are added up", summed_in_one_line),
    ("the losses are added up", summed_critic_first),
    ("both forward passes come before", forwards_first),
    ("both forward passes come before", backward_of_a_list),
    ("the loss of value is computed as policy.", used_once),
    ("the loss of policy is computed as reward.", never_used),
    ("the loss of policy is computed as reward.", used_too_late),
    ("the second backward pass runs", running_total),
    ("reference is asked for a loss", all_names),
    ("reward is asked for a loss", all_losses),
    ("reference is asked for a loss", parameters_of_all),
    ("value learns nothing", only_the_policy),
    ("policy learns nothing", lambda roles, losses, optimizers: None),
    ("the loss of policy gets no backward pass.", without_backward),
    ("the loss of policy gets no backward pass.", backward_of_the_last),
    ("there are two backward passes through policy", backward_twice),
    ("the optimizer of policy takes no step.", without_step),
    ("the optimizer of policy takes no step.", one_steps),
    ("the optimizer of policy steps more than once", all_step_each_time),
    ("policy steps before its backward pass.", steps_first),
    ("the gradients of policy are cleared between", cleared_between),
    ("the gradients of policy are cleared between", all_cleared_each_time),
    ("the gradients of policy are never cleared.", never_cleared),
    ("the gradients of value are never cleared.", one_cleared),
    ("the gradients of policy are cleared after the step only.", cleared_last),
    ("the gradients of policy are cleared after the step only.", cleared_after_each_step),
    ("it is the model's zero_grad.", model_cleared),
    ("the weights after three steps are not those", halved),
]


# --- train_step, right ---


def steps_at_the_end(roles, losses, optimizers):
    clear(optimizers)
    for role in ("value", "policy"):
        losses[role](roles.use(role)).backward()
    step(optimizers)


def in_training_mode(roles, losses, optimizers):
    reports = {}
    for role in optimizers:
        model = roles.use(role).train()
        loss = losses[role](model)
        optimizers[role].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(roles.parameters(role).values(), 1.0)
        optimizers[role].step()
        model.eval()
        reports[role] = loss.item()
    return reports


def used_again_before_backward(roles, losses, optimizers):
    clear(optimizers)
    computed = {role: losses[role](roles.use(role)) for role in losses}
    for role, loss in computed.items():
        roles.use(role)
        loss.backward()
    step(optimizers)


def cleared_by_hand(roles, losses, optimizers):
    for role, loss_of in losses.items():
        for parameter in roles.parameters(role).values():
            parameter.grad = None
        torch.autograd.backward(loss_of(roles.use(role)))
        optimizers[role].step()


def by_autograd_grad(roles, losses, optimizers):
    for role in losses:
        parameters = list(roles.parameters(role).values())
        gradients = torch.autograd.grad(losses[role](roles.use(role)), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizers[role].step()


def cleared_before_and_after(roles, losses, optimizers):
    clear(optimizers)
    cleared_last(roles, losses, optimizers)


def looks_at_all_names(roles, losses, optimizers):
    for role in roles.names:
        if role in losses:
            optimizers[role].zero_grad()
            losses[role](roles.use(role)).backward()
            optimizers[role].step()
    roles.use("reference")


STEP_RIGHT = [
    lesson_04.train_step,
    steps_at_the_end,
    in_training_mode,
    used_again_before_backward,
    cleared_by_hand,
    by_autograd_grad,
    cleared_before_and_after,
    looks_at_all_names,
]


# --- shape_rewards: one token at a time, as a learner would write it ---


def tokenwise(
    penalty=lambda new, ref: new - ref,
    price=lambda beta: beta,
    paid=lambda score, beta: score,
    place=lambda n, length: [n - 1],
    real=lambda n, length: n,
    replaced=False,
):
    """Rewards of one row after the other; `place` gives the columns of the score."""

    def answer(scores, logprobs, ref_logprobs, response_mask, beta):
        rewards = torch.zeros_like(logprobs)
        length = logprobs.shape[1]
        for b in range(len(scores)):
            n = int(response_mask[b].sum())
            for t in range(real(n, length)):
                rewards[b, t] = -price(beta) * penalty(logprobs[b, t], ref_logprobs[b, t])
            for t in place(n, length):
                if replaced:
                    rewards[b, t] = paid(scores[b], beta)
                else:
                    rewards[b, t] += paid(scores[b], beta)
        return rewards

    return answer


right_rewards = tokenwise()


def charged(of):
    """The right scores; `of` gives the penalties of all tokens from the masked log-ratio."""

    def answer(scores, logprobs, ref_logprobs, response_mask, beta):
        mask = response_mask.float()
        rewards = -beta * of((logprobs - ref_logprobs) * mask, mask) * mask
        rewards[torch.arange(len(scores)), response_mask.sum(1) - 1] += scores
        return rewards

    return answer


def all_unmasked(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = -beta * (logprobs - ref_logprobs)
    rewards[:, -1] += scores
    return rewards


def swapped_and_unmasked(scores, logprobs, ref_logprobs, response_mask, beta):
    return all_unmasked(scores, ref_logprobs, logprobs, response_mask, beta)


def by_index_too_early(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = -beta * (logprobs - ref_logprobs) * response_mask
    rewards[torch.arange(len(scores)), response_mask.sum(1) - 2] += scores
    return rewards


def everything_times_beta(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = -(logprobs - ref_logprobs) * response_mask
    rewards[torch.arange(len(scores)), response_mask.sum(1) - 1] += scores
    return beta * rewards


def everywhere_by_broadcasting(scores, logprobs, ref_logprobs, response_mask, beta):
    return scores.unsqueeze(1) - beta * (logprobs - ref_logprobs)


REWARD_MISTAKES = [
    ("the penalty is paid out.", tokenwise(lambda new, ref: ref - new)),
    ("the penalty is paid out.", tokenwise(price=lambda beta: -beta)),
    ("the penalty is paid out.", swapped_and_unmasked),
    ("the score stands at every token.", tokenwise(place=lambda n, length: range(n))),
    ("the score stands at every token.", everywhere_by_broadcasting),
    ("the score stands in the last column.", tokenwise(place=lambda n, length: [-1])),
    (
        "the score stands in the last column.",
        tokenwise(place=lambda n, length: [length - 1], replaced=True),
    ),
    ("the score stands one column too late", tokenwise(place=lambda n, L: [min(n, L - 1)])),
    ("the score stands one column too late", tokenwise(place=lambda n, L: [n] if n < L else [])),
    (
        "the score stands one column too late",
        tokenwise(place=lambda n, L: [min(n, L - 1)], replaced=True),
    ),
    ("the score stands one token too early.", by_index_too_early),
    ("the score stands one token too early.", tokenwise(place=lambda n, L: [max(n - 2, 0)])),
    ("the score stands one token too early.", tokenwise(place=lambda n, L: [n - 2])),
    ("padding is charged.", tokenwise(real=lambda n, length: length)),
    ("the mask is not used", all_unmasked),
    ("the penalty is not multiplied by β", tokenwise(price=lambda beta: 1)),
    ("the penalty takes probabilities.", tokenwise(lambda new, ref: new.exp() - ref.exp())),
    ("the penalty takes probabilities.", tokenwise(lambda new, ref: new.exp() * (new - ref))),
    ("the penalty takes the ratio", tokenwise(lambda new, ref: new.exp() / ref.exp())),
    ("every token pays the mean", charged(lambda x, mask: (x.sum(1) / mask.sum(1))[:, None])),
    ("every token pays the mean", charged(lambda x, mask: x.sum() / mask.sum())),
    ("every token pays the sum", charged(lambda x, mask: x.sum(1, keepdim=True))),
    (
        "the whole penalty is charged at the last token.",
        charged(lambda x, mask: x.sum(1, keepdim=True) * (mask.cumsum(1) == mask.sum(1)[:, None])),
    ),
    ("the score is multiplied by β.", tokenwise(paid=lambda score, beta: beta * score)),
    ("the score is multiplied by β.", everything_times_beta),
    (
        "β has changed sides",
        tokenwise(price=lambda beta: 1, paid=lambda score, beta: beta * score),
    ),
    ("it is the absolute value", tokenwise(lambda new, ref: abs(new - ref))),
    ("the log-ratio is squared.", tokenwise(lambda new, ref: (new - ref) ** 2 / 2)),
    ("the log-ratio is squared.", tokenwise(lambda new, ref: (new - ref) ** 2)),
    (
        "it is the estimate k3",
        tokenwise(lambda new, ref: (ref - new).exp() - 1 - (ref - new)),
    ),
    ("at the last token the score replaces", tokenwise(replaced=True)),
    ("there is no penalty at all", tokenwise(real=lambda n, length: 0)),
    ("there is no score", tokenwise(place=lambda n, length: [])),
    ("the score stands at the first token.", tokenwise(place=lambda n, length: [0])),
    (
        "the score is divided",
        lambda scores, new, ref, mask, beta: (
            (scores[:, None] / mask.sum(1, keepdim=True) - beta * (new - ref)) * mask
        ),
    ),
]


def by_scatter(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = beta * (ref_logprobs - logprobs).masked_fill(response_mask == 0, 0)
    last = response_mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def by_the_next_of_the_mask(scores, logprobs, ref_logprobs, response_mask, beta):
    follows = torch.nn.functional.pad(response_mask[:, 1:], (0, 1))
    ends = (response_mask - follows).bool()
    penalty = torch.where(response_mask.bool(), beta * (logprobs - ref_logprobs), 0.0)
    return torch.where(ends, scores[:, None] - penalty, -penalty)


def rewards_in_float64(scores, logprobs, ref_logprobs, response_mask, beta):
    tensors = (x.double() for x in (scores, logprobs, ref_logprobs))
    return right_rewards(*tensors, response_mask, beta)


REWARD_RIGHT = [
    right_rewards,
    by_scatter,
    by_the_next_of_the_mask,
    rewards_in_float64,
    charged(lambda x, mask: x),
]


# --- predict_bytes ---


def counted(
    weight=4.127 / 8,
    outside=2.0,
    learning=16,
    resting=4,
    adapter=lambda o, i, rank: o * rank + rank * i,
    bases=lambda trains: 1,
    roles=None,
    of_layers=lambda layers: (layers, layers),
    unit=1.0,
):
    """Bytes added up layer by layer; each argument is a place to go wrong."""

    def answer(shapes, layers, other, rank, trains):
        in_base, in_adapters = of_layers(layers)
        base = other * outside
        for outputs, inputs in shapes * in_base:
            base += outputs * inputs * weight
        parameters = sum(adapter(o, i, rank) for o, i in shapes) * in_adapters
        number = sum(trains.values())
        each = learning * number + resting * (len(trains) - number)
        if roles is not None:
            each = roles
        return (bases(trains) * base + parameters * each) / unit

    return answer


FROZEN_TRAINED = "the frozen roles are charged with more"
HALF = "the adapters are counted with 2 bytes"
BYTES_MISTAKES = [
    ("bits are taken for bytes.", counted(weight=4.127)),
    ("bits are taken for bytes.", counted(weight=4)),
    ("bits are taken for bytes.", counted(weight=4.127, outside=16)),
    ("bits are taken for bytes.", counted(unit=1 / 8)),
    ("the linear layers of the base are not in NF4.", counted(weight=2)),
    ("the linear layers of the base are not in NF4.", counted(weight=1)),
    ("it is 4.5 bits for a weight", counted(weight=0.5 + 4 / 64)),
    ("embeddings and all else are quantized too.", counted(outside=4.127 / 8)),
    ("the weights outside of the linear layers are missing.", counted(outside=0)),
    ("the weights outside of the linear layers are counted as float32.", counted(outside=4)),
    ("every role has a base of its own.", counted(bases=len)),
    (FROZEN_TRAINED, counted(resting=16)),
    (FROZEN_TRAINED, counted(resting=12)),
    (FROZEN_TRAINED, counted(resting=8)),
    ("the optimizer is missing", counted(learning=8)),
    ("a trained parameter is counted with 12 bytes.", counted(learning=12)),
    ("trained roles cost no more", counted(learning=4)),
    (HALF, counted(learning=8, resting=2)),
    (HALF, counted(learning=12, resting=2)),
    (HALF, counted(learning=14, resting=2)),
    (HALF, counted(learning=16, resting=2)),
    ("frozen roles cost nothing.", counted(resting=0)),
    ("there is one adapter for all roles.", counted(roles=16)),
    ("it always counts two trained roles", counted(roles=2 * 16 + 2 * 4)),
    ("trained and frozen are exchanged.", counted(learning=4, resting=16)),
    ("one of an adapter's two matrices", counted(adapter=lambda o, i, rank: rank * i)),
    ("one of an adapter's two matrices", counted(adapter=lambda o, i, rank: rank * o)),
    ("the rank is missing", counted(adapter=lambda o, i, rank: o + i)),
    ("an adapter has as many parameters", counted(adapter=lambda o, i, rank: o * i)),
    ("an adapter has as many parameters", counted(adapter=lambda o, i, rank: o * i * rank)),
    ("base or adapters are counted for one block.", counted(of_layers=lambda n: (n, 1))),
    ("base or adapters are counted for one block.", counted(of_layers=lambda n: (1, n))),
    ("base or adapters are counted for one block.", counted(of_layers=lambda n: (1, 1))),
    ("it is not in bytes, but in MB or GB.", counted(unit=1e9)),
    ("it is not in bytes, but in MB or GB.", counted(unit=1e6)),
    ("it is not in bytes, but in MiB or GiB.", counted(unit=2**30)),
    ("it is not in bytes, but in MiB or GiB.", counted(unit=2**20)),
]


def exactly(shapes, layers, other, rank, trains):
    """With every rounding that NF4 makes."""
    total = layers * sum(memory.nf4_bytes(o * i) for o, i in shapes) + 2 * other
    for learns in trains.values():
        total += (16 if learns else 4) * memory.lora_parameters(shapes * layers, rank)
    return total


def as_a_tensor(*arguments):
    return torch.tensor(counted()(*arguments))


BYTES_RIGHT = [
    counted(),
    exactly,
    as_a_tensor,
    counted(weight=0.5),  # without scales
    counted(weight=0.52),
    lambda *arguments: round(counted()(*arguments)),
]

MISTAKES = [
    *(("train_step", answer, message) for message, answer in STEP_MISTAKES),
    *(("shape_rewards", answer, message) for message, answer in REWARD_MISTAKES),
    *(("predict_bytes", answer, message) for message, answer in BYTES_MISTAKES),
]
RIGHT = [
    *(("train_step", answer) for answer in STEP_RIGHT),
    *(("shape_rewards", answer) for answer in REWARD_RIGHT),
    *(("predict_bytes", answer) for answer in BYTES_RIGHT),
]
MESSAGES = {
    "train_step": {message.format(role="policy", active="reward") for message in STEP_MESSAGES},
    "shape_rewards": {message for _, message in lesson_04._REWARD_MISTAKES},
    "predict_bytes": {message for _, message in lesson_04._BYTES_MISTAKES},
}


@pytest.mark.parametrize(("name", "answer", "message"), MISTAKES)
def test_a_known_mistake_is_named(name, answer, message, capsys):
    printed = run(name, answer, capsys)
    assert printed.startswith(f"{name}: {message}")
    assert " yours " in printed
    assert " expected " in printed


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_passes(name, answer, capsys):
    printed = run(name, answer, capsys)
    assert printed.startswith(f"{name}: correct")
    assert "Tested: " in printed


def test_rewards_that_make_a_mistake_look_like_no_other():
    """Else the first of them would be named for both."""
    exercise = lesson_04._SHAPE_REWARDS
    right = [exercise.reference(*case) for case in exercise.cases]
    for wrong, message in exercise.mistakes:
        results = [wrong(*case) for case in exercise.cases]
        assert name_mistake(exercise, results) == message
        assert not all(same(got, want) for got, want in zip(results, right, strict=True))


def test_bytes_that_make_a_mistake_look_like_no_other():
    """Two mistakes lie further apart than a prediction may be off and still be named."""
    mistakes = lesson_04._BYTES_MISTAKES
    for wrong, message in mistakes:
        results = [wrong(*case) for case in lesson_04._BYTES_CASES]
        assert lesson_04._nearest_mistake(results) == message
        assert lesson_04._furthest_off(results, lesson_04.predict_bytes) > 0.06
        for other, another in mistakes:
            assert another == message or lesson_04._furthest_off(results, other) > 0.04


@pytest.mark.parametrize("name", CHECKS)
def test_every_message_has_a_test(name):
    tested = {message for other, _, message in MISTAKES if other == name}
    named = {"value": "policy", "reference": "policy"}
    for role, policy in named.items():
        tested |= {message.replace(role, policy) for message in tested}
    untested = [m for m in MESSAGES[name] if not any(m.startswith(start) for start in tested)]
    assert untested == []


@pytest.mark.parametrize("name", CHECKS)
def test_messages_say_why_and_hold_no_code(name):
    for message in MESSAGES[name]:
        assert len(message.split()) > 8
        assert not any(code in message for code in ("[:", "clone(", ".T", "@", "==", "{"))


# --- not attempted ---


def stub(*arguments):
    raise NotImplementedError


def dots(*arguments):
    return ...


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("answer", [stub, dots, ...])
def test_unattempted_says_so(name, answer, capsys):
    assert run(name, answer, capsys) == f"{name}: not attempted yet."


# --- structural faults ---


@pytest.mark.parametrize("name", ["shape_rewards", "predict_bytes"])
def test_none_is_named(name, capsys):
    assert f"{name}: it returned None." in run(name, lambda *arguments: None, capsys)


@pytest.mark.parametrize("name", CHECKS)
def test_a_result_in_place_of_the_function_is_named(name, capsys):
    assert f"{name}: give the check the function itself" in run(name, 3, capsys)


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("shape_rewards", lambda *x: right_rewards(*x).sum(1), "shape [1], expected is [1, 3]"),
        ("shape_rewards", lambda *x: right_rewards(*x).tolist(), "it returned list"),
        ("predict_bytes", lambda *x: {"base": 1}, "it returned dict {'base': 1}"),
        ("predict_bytes", lambda *x: torch.ones(2), "return one number"),
    ],
)
def test_a_result_of_another_shape_or_kind_is_named(name, answer, message, capsys):
    assert message in run(name, answer, capsys)


def logprobs_in_place(scores, logprobs, ref_logprobs, response_mask, beta):
    logprobs -= ref_logprobs
    return right_rewards(scores, logprobs, 0 * ref_logprobs, response_mask, beta)


def scores_in_place(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = right_rewards(scores, logprobs, ref_logprobs, response_mask, beta)
    scores.clamp_(-1, 1)
    return rewards


def shapes_in_place(shapes, layers, other, rank, trains):
    shapes *= layers
    return counted()(shapes, 1, other, rank, trains)


def trains_in_place(shapes, layers, other, rank, trains):
    total = counted()(shapes, layers, other, rank, trains)
    trains.clear()
    return total


@pytest.mark.parametrize(
    ("name", "answer", "argument"),
    [
        ("shape_rewards", logprobs_in_place, "logprobs"),
        ("shape_rewards", scores_in_place, "scores"),
        ("predict_bytes", trains_in_place, "trains"),
    ],
)
def test_an_argument_changed_in_place_is_named(name, answer, argument, capsys):
    printed = run(name, answer, capsys)
    assert f"{name}: it changes its argument {argument} in place" in printed
    right = next(answer for other, answer in RIGHT if other == name)
    assert "correct" in run(name, right, capsys)


def test_shapes_changed_in_place_are_named(capsys):
    assert "it changes its argument shapes in place" in run(
        "predict_bytes", shapes_in_place, capsys
    )


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_check_leaves_its_cases_as_they_are(name, answer, capsys):
    exercises = (lesson_04._SHAPE_REWARDS, lesson_04._PREDICT_BYTES)
    before = copy.deepcopy([repr(exercise.cases) for exercise in exercises])
    run(name, answer, capsys)
    assert [repr(exercise.cases) for exercise in exercises] == before


# --- the unknown, NaN, and exceptions ---


@pytest.mark.parametrize(
    ("name", "answer", "shown"),
    [
        ("shape_rewards", lambda *x: right_rewards(*x) - 7, "yours tensor([[-7.06"),
        ("shape_rewards", lambda *x: right_rewards(*x) * torch.nan, "expected tensor([[-0.06"),
        ("predict_bytes", lambda *x: 1.2345 * counted()(*x), "expected 4873.0"),
        ("predict_bytes", lambda *x: float("nan"), "yours nan"),
    ],
)
def test_an_unknown_mistake_shows_the_case(name, answer, shown, capsys):
    printed = run(name, answer, capsys)
    assert "not in a way that this check has a name for" in printed
    assert shown in printed


def test_a_wrong_order_is_shown_beside_the_right_one(capsys):
    printed = run("train_step", forwards_first, capsys)
    yours = "yours use policy, loss policy, use value, loss value, zero_grad policy, "
    assert f"{yours}backward policy while value is active, step policy," in printed
    assert "expected zero_grad policy, use policy, loss policy, backward policy, step" in printed


def misspelt(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_gard()


def without_the_model(roles, losses, optimizers):
    for role in losses:
        losses[role](roles).backward()


@pytest.mark.parametrize(
    ("answer", "error", "line"),
    [
        (misspelt, AttributeError, "optimizers[role].zero_gard()"),
        (without_the_model, TypeError, "losses[role](roles).backward()"),
    ],
)
def test_an_exception_names_call_and_line_and_is_raised_again(answer, error, line, capsys):
    with pytest.raises(error):
        check_train_step(answer)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"train_step: {error.__name__} in your line ")
    assert f": {line} on this call: roles Roles(policy, value, reference, reward)" in printed


def raised_by_a_helper(*arguments):
    return stub()


@pytest.mark.parametrize("name", CHECKS)
def test_a_not_implemented_error_from_elsewhere_is_an_exception(name, capsys):
    with pytest.raises(NotImplementedError):
        CHECKS[name](raised_by_a_helper)
    assert "not attempted" not in capsys.readouterr().out


def test_the_imitation_moves_each_role_as_if_it_were_alone():
    """The expected weights, computed by hand: w ← w − 0.2 (w [+ head] − target), three times."""
    together = lesson_04._expected_weights()
    alone = torch.tensor([0.5, -0.25])
    for _ in range(3):
        alone = alone - 0.2 * (alone - 0.25)
    torch.testing.assert_close(together[0], alone)
    adapter, head = torch.tensor([0.75, 0.5]), torch.tensor([0.25, 0.5])
    for _ in range(3):
        gradient = adapter + head - 0.5
        adapter, head = adapter - 0.2 * gradient, head - 0.2 * gradient
    torch.testing.assert_close(together[1], adapter)
    torch.testing.assert_close(together[4], head)
    assert together[2].tolist() == [0.5, -0.25]  # the reference


def test_the_imitation_has_the_names_of_the_original():
    recorder = lesson_04._Recorder()
    for name in ("names", "active", "use", "parameters"):
        assert hasattr(Roles, name)
        assert hasattr(recorder, name)


def test_predicted_bytes_are_those_of_the_memory_table():
    case = lesson_04._BYTES_CASES[1]
    sizes = memory.ModelSizes(tuple(case[0] * case[1]), case[2], output=0, width=1536)
    rows = memory.memory_table(sizes, rank=case[3])["LoRA on 1 NF4 base"]
    total = sum(row.total for row in rows)
    assert abs(lesson_04.predict_bytes(*case) / total - 1) < 1e-4
