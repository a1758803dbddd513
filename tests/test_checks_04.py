"""The checks of lesson 04: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

from itertools import product

import torch
from helpers_checks import Rules, run

from rlhf_helpers import memory
from rlhf_helpers.checks import lesson_04
from rlhf_helpers.roles import Roles

BYTES_MESSAGES = {message for _, message in lesson_04._BYTES_MISTAKES}
REWARD_MESSAGES = {message for _, message in lesson_04.SHAPE_REWARDS.mistakes}
STEP_MESSAGES = {
    message.format(role=role, active=active, other=other, factor="times -1")
    for message in vars(lesson_04.SAY).values()
    if message not in REWARD_MESSAGES | BYTES_MESSAGES and "{}" not in message
    for role, active, other in product(lesson_04._TRAINED + lesson_04._FROZEN, repeat=3)
}


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


def head_forgotten(roles, losses, optimizers):
    for role in losses:
        for name, parameter in roles.parameters(role).items():
            if name != "head":
                parameter.grad = None
        losses[role](roles.use(role)).backward()
        optimizers[role].step()


def changed(of_loss=lambda loss: loss, of_gradients=lambda parameters: None):
    """The right order, with other losses or other gradients."""

    def answer(roles, losses, optimizers):
        for role in losses:
            optimizers[role].zero_grad()
            of_loss(losses[role](roles.use(role))).backward()
            of_gradients(roles.parameters(role).values())
            optimizers[role].step()

    return answer


def clipped_and_cleared_by_hand(roles, losses, optimizers):
    for role, loss_of in losses.items():
        for parameter in roles.parameters(role).values():
            parameter.grad = None
        loss_of(roles.use(role)).backward()
        torch.nn.utils.clip_grad_norm_(roles.parameters(role).values(), 1.0)
        optimizers[role].step()


def thawed(roles, losses, optimizers):
    roles.model.requires_grad_(True)
    changed()(roles, losses, optimizers)


def returns_losses(roles, losses, optimizers):
    clear(optimizers)
    reports = {}
    for role in losses:
        loss = losses[role](roles.use(role))
        loss.backward()
        reports[role] = loss.item()
    step(optimizers)
    return reports


def retained_total(roles, losses, optimizers):
    clear(optimizers)
    total = 0
    for role in losses:
        total = total + losses[role](roles.use(role))
        total.backward(retain_graph=True)
    step(optimizers)


def names_written_in(roles, losses, optimizers):
    for role in ("policy", "value"):
        optimizers[role].zero_grad()
        losses[role](roles.use(role)).backward()
        optimizers[role].step()


def unpacked(roles, losses, optimizers):
    first, second = losses
    clear(optimizers)
    for role in (first, second):
        losses[role](roles.use(role)).backward()
    step(optimizers)


def made_anew(roles, losses, optimizers):
    for role in losses:
        group = optimizers[role].param_groups[0]
        optimizer = torch.optim.SGD(group["params"], lr=group["lr"])
        optimizer.zero_grad()
        losses[role](roles.use(role)).backward()
        optimizer.step()


def one_for_both(roles, losses, optimizers):
    for role in losses:
        optimizers["value"].zero_grad()
        losses[role](roles.use(role)).backward()
        optimizers["value"].step()


def by_order(roles, losses, optimizers):
    for (role, loss_of), optimizer in zip(losses.items(), optimizers.values(), strict=True):
        optimizer.zero_grad()
        loss_of(roles.use(role)).backward()
        optimizer.step()


def by_order_of_names(roles, losses, optimizers):
    for role, name in zip(losses, sorted(optimizers, reverse=True), strict=True):
        optimizers[name].zero_grad()
        losses[role](roles.use(role)).backward()
        optimizers[name].step()


STEP_MISTAKES = [
    ("the second backward pass runs through the first role's graph once more", retained_total),
    ("it holds for a policy and a value model, but not", names_written_in),
    ("it holds for a policy and a value model, but not", unpacked),
    ("the optimizer of policy, the one that was handed over, takes no step", made_anew),
    ("the optimizer of value steps for both roles", one_for_both),
    ("the loss of policy is followed by a step of value", by_order),
    ("the loss of policy is followed by a step of value", by_order_of_names),
    ("the losses are added up", summed),
    ("the losses are added up", summed_in_one_line),
    ("the losses are added up", summed_critic_first),
    ("both forward passes come before", forwards_first),
    ("both forward passes come before", backward_of_a_list),
    ("the loss of value is computed as policy.", used_once),
    ("the loss of policy is computed as reward.", never_used),
    ("the loss of policy is computed as reward.", used_too_late),
    ("the second backward pass runs through the first role's graph again", running_total),
    ("reference is asked for a loss", all_names),
    ("reward is asked for a loss", all_losses),
    ("reference is asked for a loss", parameters_of_all),
    ("value learns nothing", only_the_policy),
    ("policy learns nothing", lambda roles, losses, optimizers: None),
    ("the loss of policy gets no backward pass.", without_backward),
    ("the loss of policy gets no backward pass.", backward_of_the_last),
    ("there are two backward passes through policy", backward_twice),
    ("the optimizer of policy, the one that was handed over, takes no step", without_step),
    ("the optimizer of policy, the one that was handed over, takes no step", one_steps),
    ("the optimizer of policy steps more than once", all_step_each_time),
    ("policy steps before its backward pass.", steps_first),
    ("the gradients of policy are cleared between", cleared_between),
    ("the gradients of policy are cleared between", all_cleared_each_time),
    ("the gradients of policy are never cleared.", never_cleared),
    ("the gradients of value are never cleared.", one_cleared),
    ("the gradients of policy are cleared after the step only.", cleared_last),
    ("the gradients of policy are cleared after the step only.", cleared_after_each_step),
    ("it is the model's zero_grad.", model_cleared),
    ("the gradient of the head of value is not cleared", head_forgotten),
    *(
        ("the loss of policy is changed before its backward pass: its slope arrives times", answer)
        for answer in (
            changed(lambda loss: loss / 2),
            changed(lambda loss: loss.abs()),
            changed(lambda loss: loss.clamp(min=0)),
        )
    ),
    *(
        ("the gradients of policy are made smaller", answer)
        for answer in (
            changed(of_gradients=lambda own: torch.nn.utils.clip_grad_norm_(own, 1.0)),
            changed(of_gradients=lambda own: torch.nn.utils.clip_grad_norm_(own, 10.0)),
            changed(of_gradients=lambda own: torch.nn.utils.clip_grad_value_(own, 1.0)),
            clipped_and_cleared_by_hand,
        )
    ),
    ("the roles move as they should, but the base", thawed),
    ("the roles move as they should, but something is returned", returns_losses),
]


# --- train_step, right ---


def steps_at_the_end(roles, losses, optimizers):
    clear(optimizers)
    for role in reversed(list(losses)):
        losses[role](roles.use(role)).backward()
    step(optimizers)


def in_training_mode(roles, losses, optimizers):
    for role in optimizers:
        model = roles.use(role).train()
        loss = losses[role](model)
        optimizers[role].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[role].step()
        model.eval()


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


def by_closures(roles, losses, optimizers):
    for role in losses:

        def closure(role=role):
            optimizers[role].zero_grad()
            loss = losses[role](roles.use(role))
            loss.backward()
            return loss

        optimizers[role].step(closure)


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


def one_inside_the_other(roles, losses, optimizers):
    def learn(names):
        if names:
            optimizers[names[0]].zero_grad()
            losses[names[0]](roles.use(names[0])).backward()
            learn(names[1:])
            optimizers[names[0]].step()

    learn(sorted(losses))


STEP_RIGHT = [
    one_inside_the_other,
    lesson_04.train_step,
    steps_at_the_end,
    in_training_mode,
    used_again_before_backward,
    cleared_by_hand,
    by_autograd_grad,
    by_closures,
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


def cut_off(answer=right_rewards, scores=None, logprobs=None, ratio=None, beta=None):
    """The right rewards of numbers that are limited first."""

    def limited(s, new, ref, mask, price):
        s = s.clamp(-scores, scores) if scores else s
        new, ref = (x.clamp(min=logprobs) if logprobs else x for x in (new, ref))
        new = ref + (new - ref).clamp(-ratio, ratio) if ratio else new
        return answer(s, new, ref, mask, min(price, beta) if beta else price)

    return limited


def every_row(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = -beta * (logprobs - ref_logprobs) * response_mask
    rewards[:, response_mask.sum(1) - 1] += scores[:, None]
    return rewards


def every_row_all_scores(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = -beta * (logprobs - ref_logprobs) * response_mask
    rewards[:, response_mask.sum(1) - 1] += scores
    return rewards


def cumsum_alone(scores, logprobs, ref_logprobs, response_mask, beta):
    last = response_mask.cumsum(1) == response_mask.sum(1, keepdim=True)
    return last * scores[:, None] - beta * (logprobs - ref_logprobs) * response_mask


DIFFERENCE = "all is right up to one thing: the difference of logprobs and ref_logprobs is used "
REWARD_MISTAKES = [
    (
        "all is right up to one thing: logprobs and ref_logprobs are used divided by the number",
        lambda scores, new, ref, mask, beta: (
            scores[:, None] * lesson_04.last_token(mask)
            - beta * (new - ref) * mask / mask.sum(1, keepdim=True)
        ),
    ),
    ("the penalty is paid out.", tokenwise(lambda new, ref: ref - new)),
    ("the penalty is paid out.", tokenwise(price=lambda beta: -beta)),
    ("the penalty is paid out.", swapped_and_unmasked),
    ("the score stands at every token.", tokenwise(place=lambda n, length: range(n))),
    ("the score stands at every token.", everywhere_by_broadcasting),
    (
        "the score stands in the last column, be it padding or not",
        tokenwise(place=lambda n, length: [-1]),
    ),
    (
        "the score stands in the last column, be it padding or not",
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
    (
        "it is right at every real token, but not at padding",
        tokenwise(real=lambda n, length: length),
    ),
    (
        "all is right up to one thing: response_mask is used as if it were 1 everywhere",
        all_unmasked,
    ),
    (
        "all is right up to one thing: beta is used as 1, whatever it is",
        tokenwise(price=lambda beta: 1),
    ),
    (
        "the log-ratio is taken as a difference of probabilities, not of logarithms",
        tokenwise(lambda new, ref: new.exp() - ref.exp()),
    ),
    (
        "the log-ratio is taken weighed with a probability, which the sampling has done already",
        tokenwise(lambda new, ref: new.exp() * (new - ref)),
    ),
    (
        DIFFERENCE + "exponentiated",
        tokenwise(lambda new, ref: new.exp() / ref.exp()),
    ),
    (
        "all is right up to one thing: logprobs and ref_logprobs are used with their row's mean",
        charged(lambda x, mask: (x.sum(1) / mask.sum(1))[:, None]),
    ),
    (
        "all is right up to one thing: logprobs and ref_logprobs are used with their mean over",
        charged(lambda x, mask: x.sum() / mask.sum()),
    ),
    ("every token pays a mean over", charged(lambda x, mask: x.mean())),
    *(
        (
            "all is right up to one thing: beta is used as 0.",
            lambda s, new, ref, mask, beta, b=b: right_rewards(s, new, ref, mask, b),
        )
        for b in (0.1, 0.05)
    ),
    (
        "one of the two log-probabilities is masked",
        lambda s, new, ref, mask, beta: (
            tokenwise()(s, ref, ref, mask, 1) - beta * (new - ref * mask)
        ),
    ),
    (
        "the score stands nowhere where a response fills its row, as if it had no end",
        tokenwise(place=lambda n, length: [n - 1] if n < length else []),
    ),
    (
        "all is right up to one thing: logprobs and ref_logprobs are used with their row's sum",
        charged(lambda x, mask: x.sum(1, keepdim=True)),
    ),
    (
        "the whole penalty is charged at the last token.",
        charged(lambda x, mask: x.sum(1, keepdim=True) * (mask.cumsum(1) == mask.sum(1)[:, None])),
    ),
    ("the score is multiplied by β.", tokenwise(paid=lambda score, beta: beta * score)),
    ("the score is multiplied by β.", everything_times_beta),
    (
        "the score is multiplied by β, and the penalty is not",
        tokenwise(price=lambda beta: 1, paid=lambda score, beta: beta * score),
    ),
    (DIFFERENCE + "without its sign", tokenwise(lambda new, ref: abs(new - ref))),
    (
        DIFFERENCE + "squared",
        tokenwise(lambda new, ref: (new - ref) ** 2 / 2),
    ),
    (
        DIFFERENCE + "squared",
        tokenwise(lambda new, ref: (new - ref) ** 2),
    ),
    (
        "the log-ratio is taken as ρ - 1 - log ρ, the estimate k3",
        tokenwise(lambda new, ref: (ref - new).exp() - 1 - (ref - new)),
    ),
    (
        "the score is put in place of the penalty at the last token, not added to it",
        tokenwise(replaced=True),
    ),
    (
        "all is right up to one thing: beta is used as 0, whatever it is",
        tokenwise(real=lambda n, length: 0),
    ),
    ("all is right up to one thing: scores is used as 0", tokenwise(place=lambda n, length: [])),
    ("the score stands at the first token.", tokenwise(place=lambda n, length: [0])),
    (
        "the score is divided",
        lambda scores, new, ref, mask, beta: (
            (scores[:, None] / mask.sum(1, keepdim=True) - beta * (new - ref)) * mask
        ),
    ),
    ("the score stands for every row at the last token of each", every_row),
    ("the score stands for every row at the last token of each", every_row_all_scores),
    ("it is right at every real token, but not at padding", cumsum_alone),
    (
        DIFFERENCE + "cut off at 0",
        tokenwise(lambda new, ref: max(new - ref, 0)),
    ),
    (
        "all is right up to one thing: scores is used divided by the number of its row's",
        lambda scores, new, ref, mask, beta: right_rewards(
            scores / mask.sum(1), new, ref, mask, beta
        ),
    ),
]
REWARD_CUTS = [
    cut_off(ratio=2),
    cut_off(ratio=5),
    cut_off(logprobs=-5),
    cut_off(scores=3),
    cut_off(scores=5),
    cut_off(beta=0.5),
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
    lambda s, new, ref, m, beta: (
        torch.where(m > 0, beta * (ref - new), 0)
        + torch.nn.functional.one_hot(m.sum(1) - 1, m.shape[1]) * s[:, None]
    ),
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


def roles_miscounted(number):
    """`number` gives the trained and the frozen roles that are counted."""

    def answer(shapes, layers, other, rank, trains):
        learning = sum(trains.values())
        learning, resting = number(learning, len(trains) - learning)
        return counted(roles=16 * learning + 4 * resting)(shapes, layers, other, rank, trains)

    return answer


FROZEN_TRAINED = "it counts otherwise than the exercise: bytes of a frozen role's parameter:"
HALF = "it counts otherwise than the exercise: bytes of a"
BYTES_MISTAKES = [
    (
        "it is counted as if its name",
        lambda shapes, layers, other, rank, trains: lesson_04.predict_bytes(
            shapes, layers, other, rank, {name: name in ("policy", "value") for name in trains}
        ),
    ),
    (
        "it is counted as if its place",
        lambda shapes, layers, other, rank, trains: lesson_04.predict_bytes(
            shapes, layers, other, rank, {name: i < 2 for i, name in enumerate(trains)}
        ),
    ),
    (
        "it is counted as if every role, or every",
        lambda shapes, layers, other, rank, trains: (
            lesson_04.predict_bytes(shapes, layers, other, rank, trains)
            + (len(trains) - 1) * layers * sum(o * i for o, i in shapes) / 2
        ),
    ),
    (
        "the last layer is left out",
        lambda shapes, *rest: lesson_04.predict_bytes(shapes[:-1], *rest),
    ),
    ("r · in + out", counted(adapter=lambda o, i, rank: rank * i + o)),
    ("r · out + in", counted(adapter=lambda o, i, rank: rank * o + i)),
    (
        "it is counted as if layers of equal shape are counted once",
        lambda shapes, *others: counted()(list(set(shapes)), *others),
    ),
    (
        "it counts otherwise than the exercise: bits of a weight in a linear layer: 33",
        counted(weight=4.127),
    ),
    (
        "it counts otherwise than the exercise: bits of a weight in a linear layer: 32, not 4.127",
        counted(weight=4),
    ),
    (
        "it counts otherwise than the exercise: bits of a weight in a linear layer: 33",
        counted(weight=4.127, outside=16),
    ),
    (
        "it counts otherwise than the exercise: bits of a weight in a linear layer: 33",
        counted(unit=1 / 8),
    ),
    (
        "it counts otherwise than the exercise: bits of a weight in a linear layer: 16, not 4.127",
        counted(weight=2),
    ),
    (
        "it counts otherwise than the exercise: bits of a weight in a linear layer: 8, not 4.127",
        counted(weight=1),
    ),
    (
        "it counts otherwise than the exercise: bits of a weight in a linear layer: 4.5, not 4.127",
        counted(weight=0.5 + 4 / 64),
    ),
    (
        "it counts otherwise than the exercise: bytes of a weight outside of those: 0.516, not 2",
        counted(outside=4.127 / 8),
    ),
    (
        "it counts otherwise than the exercise: bytes of a weight outside of those: 0, not 2",
        counted(outside=0),
    ),
    (
        "it counts otherwise than the exercise: bytes of a weight outside of those: 4, not 2",
        counted(outside=4),
    ),
    ("it is counted as if every role has a base of its own", counted(bases=len)),
    (FROZEN_TRAINED, counted(resting=16)),
    (FROZEN_TRAINED, counted(resting=12)),
    (FROZEN_TRAINED, counted(resting=8)),
    (
        "it counts otherwise than the exercise: bytes of a trained parameter: 8, not 16",
        counted(learning=8),
    ),
    (
        "it counts otherwise than the exercise: bytes of a trained parameter: 12, not 16",
        counted(learning=12),
    ),
    (
        "it counts otherwise than the exercise: bytes of a trained parameter: 4, not 16",
        counted(learning=4),
    ),
    (HALF, counted(learning=8, resting=2)),
    (HALF, counted(learning=12, resting=2)),
    (HALF, counted(learning=14, resting=2)),
    (HALF, counted(learning=16, resting=2)),
    (
        "it counts otherwise than the exercise: bytes of a frozen role's parameter: 0, not 4",
        counted(resting=0),
    ),
    ("it is counted as if the adapters are left out", counted(roles=0)),
    (
        "it is counted as if all roles have one adapter",
        counted(roles=16),
    ),
    (
        "it is counted as if there are always two trained roles and two frozen ones",
        counted(roles=2 * 16 + 2 * 4),
    ),
    (
        "it counts otherwise than the exercise: bytes of a trained parameter: 4, not 16",
        counted(learning=4, resting=16),
    ),
    (
        "r · in stands for the entries of a layer's A and B",
        counted(adapter=lambda o, i, rank: rank * i),
    ),
    (
        "r · out stands for the entries of a layer's A and B",
        counted(adapter=lambda o, i, rank: rank * o),
    ),
    (
        "2r · out stands for the entries of a layer's A and B",
        counted(adapter=lambda o, i, r: r * 2 * o),
    ),
    (
        "2r · in stands for the entries of a layer's A and B",
        counted(adapter=lambda o, i, r: r * 2 * i),
    ),
    (
        "in + out stands for the entries of a layer's A and B",
        counted(adapter=lambda o, i, rank: o + i),
    ),
    ("r²(in + out)", counted(adapter=lambda o, i, rank: rank**2 * (o + i))),
    (
        "in · out stands for the entries of a layer's A and B",
        counted(adapter=lambda o, i, rank: o * i),
    ),
    ("r · in · out", counted(adapter=lambda o, i, rank: o * i * rank)),
    (
        "it is counted as if base or adapters are counted for one block",
        counted(of_layers=lambda n: (n, 1)),
    ),
    (
        "it is counted as if base or adapters are counted for one block",
        counted(of_layers=lambda n: (1, n)),
    ),
    (
        "it is counted as if base or adapters are counted for one block",
        counted(of_layers=lambda n: (1, 1)),
    ),
    ("it is not in bytes, but in MB or GB; a GB is 10⁹ bytes", counted(unit=1e9)),
    ("it is not in bytes, but in MB or GB; a GB is 10⁹ bytes", counted(unit=1e6)),
    (
        "it is not in bytes, but in MiB or GiB",
        counted(unit=2**30),
    ),
    (
        "it is not in bytes, but in MiB or GiB",
        counted(unit=2**20),
    ),
]
ROLES_MISCOUNTED = [
    roles_miscounted(lambda trained, frozen: (trained, min(frozen, 2))),
    roles_miscounted(lambda trained, frozen: (trained, min(frozen, 4 - trained))),
    roles_miscounted(lambda trained, frozen: (max(trained, 1), frozen)),
    roles_miscounted(lambda trained, frozen: (trained, max(frozen, 1))),
    roles_miscounted(lambda trained, frozen: (min(trained, 2), frozen)),
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


def slowed(roles, losses, optimizers):
    for role, loss_of in losses.items():
        optimizers[role].param_groups[0]["lr"] *= 0.5
        optimizers[role].zero_grad()
        loss_of(roles.use(role)).backward()
        optimizers[role].step()


def less_their_mean(scores, logprobs, ref_logprobs, mask, beta):
    rewards = -beta * (logprobs - ref_logprobs) * mask
    rewards[torch.arange(len(rewards)), mask.sum(1) - 1] += scores - scores.mean()
    return rewards


def base_twice(shapes, layers, other, rank, trains):
    weights = layers * sum(o * i for o, i in shapes)
    adapters = (
        sum(16 if on else 4 for on in trains.values()) * layers * rank * sum(map(sum, shapes))
    )
    return 2 * (4.127 / 8 * weights + 2 * other) + adapters


MISTAKES = [
    ("train_step", slowed, "the weights after three steps are not those"),
    (
        "shape_rewards",
        less_their_mean,
        "all is right up to one thing: scores is used less its mean",
    ),
    ("predict_bytes", base_twice, "it counts otherwise than the exercise: bits of a weight"),
    *(("train_step", answer, message) for message, answer in STEP_MISTAKES),
    *(("shape_rewards", answer, message) for message, answer in REWARD_MISTAKES),
    *(("predict_bytes", answer, message) for message, answer in BYTES_MISTAKES),
]
RIGHT = [
    *(("train_step", answer) for answer in STEP_RIGHT),
    *(("shape_rewards", answer) for answer in REWARD_RIGHT),
    *(("predict_bytes", answer) for answer in BYTES_RIGHT),
]


def test_bytes_that_make_a_mistake_look_like_no_other():
    """Two mistakes lie further apart than a prediction may be off and still be named."""

    def near(results, of, tolerance):
        made = (of(*case) for case in lesson_04._BYTES_CASES)
        return all(lesson_04._near(x, y, tolerance) for x, y in zip(results, made, strict=True))

    mistakes = lesson_04._BYTES_MISTAKES
    for wrong, message in mistakes:
        results = [wrong(*case) for case in lesson_04._BYTES_CASES]
        assert lesson_04._nearest_mistake(results) == message
        assert not near(results, lesson_04.predict_bytes, 0.06)
        for other, another in mistakes:
            assert another == message or not near(results, other, 0.04)


# --- the rules ---


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


def test_a_wrong_order_is_shown_beside_the_right_one(capsys):
    printed = run("train_step", forwards_first, capsys)
    yours = "yours use policy, loss policy, use value, loss value, zero_grad policy, "
    assert f"{yours}backward policy while value is active, step policy," in printed
    assert "expected zero_grad policy, use policy, loss policy, backward policy, step" in printed


def test_a_right_order_with_two_graphs_gets_a_note(capsys):
    printed = run("train_step", used_again_before_backward, capsys)
    assert printed.startswith("train_step: correct, but both graphs are in memory at once")
    assert "graphs" not in run("train_step", steps_at_the_end, capsys)


def misspelt(roles, losses, optimizers):
    for role in losses:
        optimizers[role].zero_gard()


def without_the_model(roles, losses, optimizers):
    for role in losses:
        losses[role](roles).backward()


class TestRules(Rules):
    modules = (lesson_04,)
    exercises = (lesson_04.TRAIN_STEP, lesson_04.SHAPE_REWARDS, lesson_04.PREDICT_BYTES)
    further = (
        *(("train_step", message) for message in STEP_MESSAGES),
        *(("predict_bytes", message) for message in BYTES_MESSAGES),
    )
    mistakes = MISTAKES
    right = RIGHT
    other_kinds = (
        ("shape_rewards", lambda *x: right_rewards(*x).sum(1), "shape [1], expected is [1, 3]"),
        ("shape_rewards", lambda *x: right_rewards(*x).tolist(), "it returned list"),
        ("predict_bytes", lambda *x: {"base": 1}, "it returned dict {'base': 1}"),
        ("predict_bytes", lambda *x: torch.ones(2), "return one number"),
    )
    in_place = (
        ("shape_rewards", logprobs_in_place, "logprobs"),
        ("shape_rewards", scores_in_place, "scores"),
        ("predict_bytes", shapes_in_place, "shapes"),
        ("predict_bytes", trains_in_place, "trains"),
    )
    unknown = (
        ("shape_rewards", lambda *x: right_rewards(*x) - 7, ("yours tensor([[-7.06",)),
        ("shape_rewards", lambda *x: right_rewards(*x) * torch.nan, ("expected tensor([[-0.06",)),
        ("predict_bytes", lambda *x: 1.2345 * counted()(*x), ("expected 4873.0",)),
        ("predict_bytes", lambda *x: float("nan"), ("yours nan",)),
        *(("shape_rewards", answer, ("yours",)) for answer in REWARD_CUTS),
        *(("predict_bytes", answer, ("yours",)) for answer in ROLES_MISCOUNTED),
    )
    failing = (
        (
            "train_step",
            misspelt,
            AttributeError,
            "optimizers[role].zero_gard()",
            "roles Roles(policy, value, reference, reward)",
        ),
        (
            "train_step",
            without_the_model,
            TypeError,
            "losses[role](roles).backward()",
            "roles Roles(policy, value, reference, reward)",
        ),
    )


def test_the_imitation_moves_each_role_as_if_it_were_alone():
    """The expected weights, computed by hand: w ← w − 0.2 (w [+ head] − target), three times."""
    together = lesson_04._expected_weights()
    alone = torch.tensor([0.5, -0.25])
    for _ in range(3):
        alone = alone - 0.2 * (alone - 20)
    torch.testing.assert_close(together[0], alone)
    adapter, head = torch.tensor([0.75, 0.5]), torch.tensor([0.25, 0.5])
    for _ in range(3):
        gradient = adapter + head - 20
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
