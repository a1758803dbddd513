"""The checks of lesson 08: the DPO loss, implicit rewards, which log had the wrong reference."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_helpers import dpo
from rlhf_helpers.checks.diagnosis import judge, read_log
from rlhf_helpers.checks.exercise import (
    CUT_IN_PLACE,
    EPSILONS,
    NO_MEAN,
    NO_MEANS,
    Exercise,
    call,
    check,
    same,
    texts,
)

SAY = texts("""
gap: h is {}. It is the log-ratio of the policy to the reference for the chosen response, less the
    same for the rejected one: four log-probabilities, two of them with a minus.
no_reference (gap): made of the policy alone; then the loss asks for a large difference, and not for
    one that is larger than the reference's
reference_alone (gap): made of the reference alone, which never changes
ref_of_chosen (gap): made without the reference's log-probability of the rejected response
ref_of_rejected (gap): made without the reference's log-probability of the chosen response
chosen_alone (gap): the log-ratio of the chosen response alone
rejected_alone (gap): that of the rejected response alone
sides_added (gap): the sum of the two log-ratios, not their difference
ref_added (gap): made with the sign of the reference turned round
one_ref_added (gap): made with one of the reference's two log-probabilities under the wrong sign, as
    where a bracket is lost
unsigned (gap): made without its sign, so that either choice would do
not_logs (gap): made of probabilities, or of their ratios without a logarithm
quotients (gap): made of quotients of logarithms, where their differences are asked for
opposite: it is the loss of -h. Chosen and rejected have changed places, or policy and reference
    have, or the sign is turned round before σ: softplus of -x is -log σ(x), and so is the
    cross-entropy of x with a target of 1. Training would then make the rejected responses likely.
beta: β {}. It multiplies h inside of σ: a log-ratio times β is a reward.
outside (beta): stands outside of the logarithm, where it only scales the gradient
missing (beta): is not used
divided (beta): divides h
half (beta): multiplies one half of h, not the other
policy_spared (beta): multiplies the reference's half of h, not the policy's
first_alone_scaled (beta): multiplies the first of the four log-probabilities alone
loss: the loss of a pair is taken as {}. It is -log σ(βh), and the loss of the batch its mean.
no_log (loss): a σ without its logarithm
no_minus (loss): log σ(βh), without the minus
two_minuses (loss): log σ(-βh), with two signs turned round
gap_alone (loss): the gap without σ and logarithm
hinge (loss): a hinge, which is another method's
ipo (loss): the square of IPO
smoothed (loss): a mean of both choices, as if labels were wrong now and then (conservative DPO)
apart (loss): two surprises, one for each response by itself; only their difference was judged
summed: it is a sum over the pairs, which grows with the batch. Take the mean.
gaps_averaged: the gaps are averaged before σ and logarithm. Each pair has a surprise of its own,
    and the loss is the mean of those.
chances_averaged: σ is averaged over the batch before the logarithm. Each pair has a surprise of its
    own, and the loss is the mean of those.
overflow: it is not finite at βh = -200. There σ rounds to 0, and its logarithm to -∞: the two steps
    have to become one that never leaves the range, as in lesson 02.
exponentiated: log-probabilities are exponentiated on the way. A whole response may have one of
    -200, and e to that is 0 in float32: only differences of logarithms stay in range.
capped: it is right for moderate gaps, but cut off at βh = -200, where the loss is 200. A clamp or
    an ε in the logarithm does that, and takes the gradient from the pairs that are most wrong.
through_reference: the values are right, but a gradient reaches the reference. It is fixed, whoever
    made its log-probabilities: take them out of the graph.
policy_cut: the values are right, but not the gradients of the policy, so that training would not
    move it, or move it wrongly. Look for a detach, no_grad or item in the wrong place.
reward: a response gets {}. Its reward is β times the log-ratio of the whole response: the sum over
    its own tokens, EOS included, of the policy's log-probability less the reference's.
mean (reward): the mean over its tokens, so that a long response is worth no more than a short one
mean_of_row (reward): the mean over all columns, prompt and padding included
prompt_counted (reward): its prompt's tokens too. Nobody chose those
padding_counted (reward): the padding behind it too
no_mask (reward): everything in its row, prompt and padding included
mask_reversed (reward): what is not its own: prompt and padding
from_0 (reward): as many columns as it has tokens, but counted from column 0, where the prompt is
from_end (reward): as many columns as it has tokens, but the last ones of the row, where padding is
third (reward): ρ - 1 - log ρ, the estimate k3 of a KL, which has no sign
no_eos (reward): all but its last token
no_last_column (reward): all but the row's last column, in which its EOS stands where no padding
    follows
last_alone (reward): its last token alone
first_alone (reward): its first token alone
batch_mean (reward): a mean over the batch
batch_sum (reward): a sum over the batch
of_policy (reward): the policy's log-probability, without the reference's
of_reference (reward): the reference's log-probability, without the policy's
roles_swapped (reward): the log-ratio of the reference to the policy. What the policy has learnt to
    like would be punished
ratio (reward): a ratio of probabilities, not its logarithm
ratio_quotient (reward): a quotient of logarithms, not their difference
absolute (reward): log-ratios without their signs
squared (reward): squares of log-ratios
weighted (reward): log-ratios weighed with probabilities
half_masked (reward): one log-probability that is masked and one that is not; look at the brackets
beta_missing (reward): the log-ratio itself, without β
beta_divided (reward): the log-ratio divided by β
beta_half (reward): a difference of which β multiplies one half
negative_kl (reward): the reward less a KL, as in part 4 of exercise 05; here the log-ratio is the
    reward itself
""")

# --- lesson 08: the loss ---------------------------------------------------------------------


def check_dpo_loss(fn: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check `dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_…, ref_rejected_…, beta)`.

    Args:
        fn: returns a scalar tensor, as `rlhf_helpers.dpo.dpo_loss` does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_dpo_loss(dpo.dpo_loss)
        dpo_loss: correct. Tested: one pair and several, βh of -200 to 200, small β, gradients.
    """
    check(DPO_LOSS, fn)


def _dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
) -> Tensor:
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    return -logsigmoid(beta * h).mean()


def _gradient_fault(fn: Callable) -> str:
    """Whether the policy's gradients are those of the reference version, and the other's are 0."""
    for case in _LOSS_CASES:
        got, (want, _) = (_gradients(f, case) for f in (fn, _dpo_loss))
        if got is None:
            return CUT_IN_PLACE
        policy, fixed = got
        if not same(policy, want):
            return SAY.policy_cut
        if fixed.any():
            return SAY.through_reference
    return ""


def _gradients(fn: Callable, case: tuple) -> tuple[Tensor, Tensor] | None:
    """With respect to the policy's log-probabilities, and to the reference's.

    None if one of them is no longer to be differentiated.
    """
    sides = [side.clone().requires_grad_() for side in case[:4]]
    with torch.enable_grad():
        try:
            loss = fn(*sides, case[4])
        except ValueError:  # as the package's, which refuses a reference that requires gradients
            loss = call(DPO_LOSS, fn, (*sides[:2], *(x.detach() for x in sides[2:]), case[4]))
        except (
            Exception
        ):  # such as one of numpy, which takes no tensor that is to be differentiated
            loss = call(DPO_LOSS, fn, (*sides, case[4]))
        if not all(side.requires_grad for side in sides):
            return None
        loss = loss + 0 * sum(side.sum() for side in sides)  # so that the loss may lack a graph
    gradients = torch.autograd.grad(loss, sides)
    return torch.stack(gradients[:2]), torch.stack(gradients[2:])


def _naive(x: Tensor) -> Tensor:
    """log σ as two steps, which is −∞ where σ rounds to 0."""
    return x.sigmoid().log()


def _of_gap(of: Callable, c, r, ref_c, ref_r, beta) -> Tensor:
    """Another loss of h and β."""
    return of((c - ref_c) - (r - ref_r), beta)


def _other_gap(gap: Callable, log_sigmoid: Callable, c, r, ref_c, ref_r, beta) -> Tensor:
    """The loss of something else than h."""
    return -log_sigmoid(beta * gap(c, r, ref_c, ref_r)).mean()


def _smoothed(x: Tensor, share: float) -> Tensor:
    return -((1 - share) * logsigmoid(x) + share * logsigmoid(-x)).mean()


def _with_epsilon(h: Tensor, beta: float, epsilon: float) -> Tensor:
    return -((beta * h).sigmoid() + epsilon).log().mean()


def _pairs_of(*rows: tuple[float, float, float, float], beta: float) -> tuple:
    """A case from the four log-probabilities of each pair."""
    return (*torch.tensor(rows).unbind(1), beta)


# 0.3 and 0.2 for the policy, 0.1 and 0.2 for the reference: h = log 3, so 3/4 at β = 1
_HAND_LOSS = (*(torch.tensor([p]).log() for p in (0.3, 0.2, 0.1, 0.2)), 1.0)
_LOSS_CASES = (
    _HAND_LOSS,
    _pairs_of((-4.0, -6.0, -5.5, -5.0), (-9.0, -3.0, -7.5, -4.0), beta=0.5),
    _pairs_of(
        (-11.0, -8.0, -12.5, -6.5),
        (-20.0, -17.0, -16.0, -18.0),
        (-2.5, -31.0, -3.0, -9.0),
        beta=0.1,
    ),
    _pairs_of((-120.0, -20.0, -20.0, -20.0), beta=2.0),  # βh = -200, so the loss is 200
    _pairs_of((-220.0, -320.0, -230.0, -230.0), (-250.0, -260.0, -240.0, -255.0), beta=0.05),
    _pairs_of((-5.0, -105.0, -5.0, -5.0), beta=2.0),
)

_GAPS = (
    (lambda c, r, ref_c, ref_r: c - r, SAY.no_reference),
    (lambda c, r, ref_c, ref_r: ref_c - ref_r, SAY.reference_alone),
    (lambda c, r, ref_c, ref_r: (c - ref_c) - r, SAY.ref_of_chosen),
    (lambda c, r, ref_c, ref_r: c - (r - ref_r), SAY.ref_of_rejected),
    (lambda c, r, ref_c, ref_r: c - ref_c, SAY.chosen_alone),
    (lambda c, r, ref_c, ref_r: ref_r - r, SAY.rejected_alone),
    (lambda c, r, ref_c, ref_r: r - ref_r, SAY.rejected_alone),
    (lambda c, r, ref_c, ref_r: (c - ref_c) + (r - ref_r), SAY.sides_added),
    (lambda c, r, ref_c, ref_r: (c + ref_c) - (r + ref_r), SAY.ref_added),
    (lambda c, r, ref_c, ref_r: (c - ref_c) - (r + ref_r), SAY.one_ref_added),
    (lambda c, r, ref_c, ref_r: (c + ref_c) - (r - ref_r), SAY.one_ref_added),
    (lambda c, r, ref_c, ref_r: (c - ref_c).exp() - (r - ref_r).exp(), SAY.not_logs),
    (
        lambda c, r, ref_c, ref_r: (c.exp() - ref_c.exp()) - (r.exp() - ref_r.exp()),
        SAY.not_logs,
    ),
    (lambda c, r, ref_c, ref_r: c.exp() / ref_c.exp() - r.exp() / ref_r.exp(), SAY.not_logs),
    (lambda c, r, ref_c, ref_r: c / ref_c - r / ref_r, SAY.quotients),
    (lambda c, r, ref_c, ref_r: (r - ref_r) - (c - ref_c), SAY.opposite),
    (lambda c, r, ref_c, ref_r: ((c - ref_c) - (r - ref_r)).abs(), SAY.unsigned),
    (
        lambda c, r, ref_c, ref_r: (c.exp() / ref_c.exp()).log() - (r.exp() / ref_r.exp()).log(),
        SAY.exponentiated,
    ),
)
_LOSS_MISTAKES = (
    *(
        (partial(_other_gap, gap, log_sigmoid), message)
        for gap, message in _GAPS
        for log_sigmoid in (logsigmoid, _naive)
    ),
    *(
        (partial(_of_gap, of), message)
        for f in (logsigmoid, _naive)
        for of, message in (
            (lambda h, beta, f=f: -beta * f(h).mean(), SAY.outside),
            (lambda h, beta, f=f: -f(h).mean() / beta, SAY.outside),
            (lambda h, beta, f=f: -f(h).mean(), SAY.missing),
            (lambda h, beta, f=f: -f(h / beta).mean(), SAY.divided),
            (lambda h, beta, f=f: f(beta * h).mean(), SAY.no_minus),
            (lambda h, beta, f=f: f(-beta * h).mean(), SAY.two_minuses),
            (lambda h, beta, f=f: -f(beta * h).sum(), SAY.summed),
            (lambda h, beta, f=f: -f(beta * h.mean()), SAY.gaps_averaged),
        )
    ),
    *(
        (partial(_of_gap, of), message)
        for of, message in (
            (lambda h, beta: -_naive(beta * h).mean(), SAY.overflow),
            (lambda h, beta: (1 + (-beta * h).exp()).log().mean(), SAY.overflow),
            *((lambda h, beta, e=e: _with_epsilon(h, beta, e), SAY.capped) for e in EPSILONS),
            *(
                (lambda h, beta, k=k: -logsigmoid((beta * h).clamp(-k, k)).mean(), SAY.capped)
                for k in (20, 30, 50, 80, 88, 100)
            ),
            (lambda h, beta: -(beta * h).sigmoid().mean(), SAY.no_log),
            (lambda h, beta: (-beta * h).sigmoid().mean(), SAY.no_log),
            (lambda h, beta: -(beta * h).mean(), SAY.gap_alone),
            (lambda h, beta: -h.mean(), SAY.gap_alone),
            (lambda h, beta: (beta * h).mean(), SAY.gap_alone),
            (lambda h, beta: h.mean(), SAY.gap_alone),
            (lambda h, beta: -(beta * h).sigmoid().mean().log(), SAY.chances_averaged),
            (lambda h, beta: (1 - beta * h).relu().mean(), SAY.hinge),
            (lambda h, beta: (-beta * h).relu().mean(), SAY.hinge),
            *(
                (lambda h, beta, k=k: _smoothed(beta * h, k), SAY.smoothed)
                for k in (0.01, 0.05, 0.1, 0.2, 0.25)
            ),
            (lambda h, beta: (h - 1 / (2 * beta)).square().mean(), SAY.ipo),
            *((lambda h, beta, of=of: of(-logsigmoid(beta * h)), NO_MEAN) for of in NO_MEANS),
        )
    ),
    *(
        (lambda c, r, p, q, beta, f=f: -f(beta * (c - p) - (r - q)).mean(), SAY.half)
        for f in (logsigmoid, _naive)
    ),
    *(
        (lambda c, r, p, q, beta, f=f: -f(beta * (c - r) - (p - q)).mean(), SAY.half)
        for f in (logsigmoid, _naive)
    ),
    *(
        (lambda c, r, p, q, beta, f=f: -f(c - r - beta * (p - q)).mean(), SAY.policy_spared)
        for f in (logsigmoid, _naive)
    ),
    *(
        (lambda c, r, p, q, beta, f=f: -f(beta * c - p - r + q).mean(), SAY.first_alone_scaled)
        for f in (logsigmoid, _naive)
    ),
    *(
        (
            lambda c, r, p, q, beta, k=k: (
                -k * (logsigmoid(beta * (c - p)) + logsigmoid(-beta * (r - q))).mean()
            ),
            SAY.apart,
        )
        for k in (1, 0.5)
    ),
    (
        lambda c, r, p, q, beta: -(logsigmoid(beta * (c - p)) - logsigmoid(beta * (r - q))).mean(),
        SAY.apart,
    ),
)
DPO_LOSS = Exercise(
    "dpo_loss",
    _dpo_loss,
    _LOSS_CASES,
    _LOSS_MISTAKES,
    tested="one pair and several, βh of -200 to 200, small β, gradients",
    shape_hint="Training differentiates one number, the mean over the pairs.",
    further=_gradient_fault,
)


# --- lesson 08: implicit rewards -------------------------------------------------------------


def implicit_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """β times the log-ratio of each whole response, from the log-probabilities of its tokens.

    Args:
        logprobs, ref_logprobs: `[B, L]`, of prompt, response and padding, in nats.
        response_mask: `[B, L]`, int64, 1 on the tokens of the response, EOS included.
        beta: β, above 0.

    Returns:
        `[B]`.

    Derived in lesson 08; `dpo.implicit_rewards` takes the sums.
    """
    real = response_mask.bool()
    sums = ((x * real).sum(-1) for x in (logprobs, ref_logprobs))
    return dpo.implicit_rewards(*sums, beta)


def check_implicit_rewards(fn: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check the learner's `implicit_rewards(logprobs, ref_logprobs, response_mask, beta)`.

    Args:
        fn: returns `[B]`, as `implicit_rewards` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_implicit_rewards(implicit_rewards)
        implicit_rewards: correct. Tested: prompts, padding, a response of EOS alone, β of 0.1 to 2.
    """
    check(IMPLICIT_REWARDS, fn)


def _row_sum(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(1)


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    return _row_sum(x, mask) / mask.sum(1)


def _from_first(mask: Tensor) -> Tensor:
    """1 from the first response token to the end of the row."""
    return (mask.cumsum(1) > 0).long()


def _to_last(mask: Tensor) -> Tensor:
    """1 from the start of the row to the last response token."""
    return _from_first(mask.flip(1)).flip(1)


def _left(mask: Tensor) -> Tensor:
    """As many 1s in each row, but from column 0 on."""
    return (torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)).long()


def _last(mask: Tensor) -> Tensor:
    return mask * (mask.flip(1).cumsum(1).flip(1) == 1)


def _first(mask: Tensor) -> Tensor:
    return mask * (mask.cumsum(1) == 1)


def _other_log_ratio(of: Callable, logprobs, ref_logprobs, mask, beta) -> Tensor:
    """β times something else than the log-ratio of the response."""
    return beta * of(logprobs, ref_logprobs, mask)


def _tokens(ratios: list, ref: list, mask: list, beta: float) -> tuple:
    """A case from the ratios of policy to reference, and the reference's probabilities."""
    ref_logprobs = torch.tensor(ref).log()
    return torch.tensor(ratios).log() + ref_logprobs, ref_logprobs, torch.tensor(mask), beta


_REWARD_CASES = (
    # a prompt of one token, a response of two: log 2 + log 1/2·3 = log 3, padding
    _tokens([[1.25, 2.0, 1.5, 0.5]], [[0.4, 0.25, 0.5, 0.5]], [[0, 1, 1, 0]], 1.0),
    _tokens(
        [[3.0, 0.5, 1.5, 2.0, 0.4], [0.25, 2.0, 1.2, 0.4, 3.0]],
        [[0.2, 0.3, 0.5, 0.1, 0.6], [0.9, 0.4, 0.7, 0.8, 0.1]],
        [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]],
        0.5,
    ),
    _tokens(
        [[1.5, 0.7, 2.5], [0.6, 3.0, 0.2], [2.0, 0.8, 1.3]],
        [[0.3, 0.6, 0.2], [0.5, 0.1, 0.9], [0.2, 0.7, 0.5]],
        [[0, 1, 0], [0, 0, 1], [0, 1, 1]],  # responses of EOS alone
        2.0,
    ),
    _tokens(
        [[2.0, 0.3, 1.7, 1.2, 0.9, 3.0]],
        [[0.1, 0.4, 0.5, 0.8, 0.7, 0.2]],
        [[0, 0, 1, 1, 1, 0]],
        0.1,
    ),
)
_REWARD_MISTAKES = (
    *(
        (partial(_other_log_ratio, of), message)
        for of, message in (
            (lambda p, q, m: _row_mean(p - q, m), SAY.mean),
            (lambda p, q, m: ((p - q) * m).mean(1), SAY.mean_of_row),
            (lambda p, q, m: (p - q).mean(1), SAY.mean_of_row),
            (lambda p, q, m: _row_sum(p - q, _to_last(m)), SAY.prompt_counted),
            (lambda p, q, m: _row_sum(p - q, _from_first(m)), SAY.padding_counted),
            (lambda p, q, m: (p - q).sum(1), SAY.no_mask),
            (lambda p, q, m: _row_sum(p - q, 1 - m), SAY.mask_reversed),
            (lambda p, q, m: _row_sum(p - q, _left(m)), SAY.from_0),
            (lambda p, q, m: _row_sum(p - q, _left(m).flip(1)), SAY.from_end),
            (lambda p, q, m: _row_sum((q - p).exp() - 1 - (q - p), m), SAY.third),
            (lambda p, q, m: _row_sum((p - q).exp() - 1 - (p - q), m), SAY.third),
            (lambda p, q, m: _row_sum(p - q, m - _last(m)), SAY.no_eos),
            (lambda p, q, m: _row_sum((p - q)[:, :-1], m[:, :-1]), SAY.no_last_column),
            (lambda p, q, m: _row_sum(p - q, _last(m)), SAY.last_alone),
            (lambda p, q, m: _row_sum(p - q, _first(m)), SAY.first_alone),
            (lambda p, q, m: _row_sum(p - q, m).mean().expand(len(p)), SAY.batch_mean),
            (lambda p, q, m: _row_sum(p - q, m).sum().expand(len(p)), SAY.batch_sum),
            (lambda p, q, m: _row_sum(p, m), SAY.of_policy),
            (lambda p, q, m: _row_sum(q, m), SAY.of_reference),
            (lambda p, q, m: _row_sum(q - p, m), SAY.roles_swapped),
            (lambda p, q, m: _row_sum(p - q, m).exp(), SAY.ratio),
            (lambda p, q, m: _row_sum((p - q).exp(), m), SAY.ratio),
            (lambda p, q, m: _row_sum(p.exp() - q.exp(), m), SAY.ratio),
            (lambda p, q, m: _row_sum(p, m) / _row_sum(q, m), SAY.ratio_quotient),
            (lambda p, q, m: _row_sum(p / q, m), SAY.ratio_quotient),
            (lambda p, q, m: _row_sum((p - q).abs(), m), SAY.absolute),
            (lambda p, q, m: _row_sum(p - q, m).abs(), SAY.absolute),
            (lambda p, q, m: _row_sum((p - q).square(), m), SAY.squared),
            (lambda p, q, m: _row_sum((p - q).square(), m) / 2, SAY.squared),
            (lambda p, q, m: _row_sum(p.exp() * (p - q), m), SAY.weighted),
            (lambda p, q, m: (p * m - q).sum(1), SAY.half_masked),
            (lambda p, q, m: (p - q * m).sum(1), SAY.half_masked),
        )
    ),
    (lambda p, q, m, beta: _row_sum(p - q, m), SAY.beta_missing),
    (lambda p, q, m, beta: _row_sum(p - q, m) / beta, SAY.beta_divided),
    (lambda p, q, m, beta: _row_sum(beta * p - q, m), SAY.beta_half),
    (lambda p, q, m, beta: _row_sum(p - beta * q, m), SAY.beta_half),
    (lambda p, q, m, beta: _row_sum(p - beta * (p - q), m), SAY.negative_kl),
)
IMPLICIT_REWARDS = Exercise(
    "implicit_rewards",
    implicit_rewards,
    _REWARD_CASES,
    _REWARD_MISTAKES,
    tested="prompts, padding, a response of EOS alone, β of 0.1 to 2",
    shape_hint="It is one number for each response: its tokens are added up, responses are not.",
)


# --- lesson 08: three logs -------------------------------------------------------------------

ORIGINS = {
    "copy": "the policy began as a copy of its reference",
    "bare base": "the reference is the bare base: the adapter was switched off",
    "second round": "the policy had learnt before, and the reference is what it first began from",
    "sides swapped": "chosen and rejected have changed places",
    "roles swapped": "policy and reference have changed places in the loss",
    "no reference": "the reference is left out: log-ratios are log-probabilities",
    "β outside": "β stands outside of the sigmoid",
}
_LOGS = {"A": "second round", "B": "bare base", "C": "copy"}
_EVIDENCE = {
    "copy": (
        "both log-ratios would be 0 before the first update, and the loss log 2 = 0.693; in this "
        "log they are {start_chosen_log_ratio} and {start_rejected_log_ratio}, and the loss is "
        "{start_loss}"
    ),
    "bare base": (
        "the responses would be likelier for the policy than for the reference before the first "
        "update already, chosen and rejected alike: SFT wrote them, and the base would not have; "
        "in this log their log-ratios are {start_chosen_log_ratio} and {start_rejected_log_ratio}"
    ),
    "second round": (
        "the policy would have left the reference before the first update, and SFT's answers would "
        "have become less likely, the rejected ones most; in this log the log-ratios there are "
        "{start_chosen_log_ratio} and {start_rejected_log_ratio}"
    ),
    "sides swapped": (
        "the accuracy on held-out pairs would fall below one half; in this log it ends at "
        "{end_accuracy}"
    ),
    "roles swapped": (
        "what is chosen would become the less likely of the two, and the accuracy would fall below "
        "one half; in this log it ends at {end_accuracy}"
    ),
    "no reference": (
        "the log-ratios would begin at the log-probabilities of whole answers, about -5 nats; in "
        "this log they begin at {start_chosen_log_ratio} and {start_rejected_log_ratio}"
    ),
    "β outside": (
        "the loss would be a tenth of a surprise, at first about 0.07; in this log it begins at "
        "{start_loss} and ends at {end_loss}"
    ),
}


def dpo_log(name: str) -> list[dict[str, float]]:
    """A recorded log of exercise 08: a row for each measurement on held-out pairs, β = 0.1.

    Args:
        name: "A", "B" or "C".

    Returns:
        Rows with `step`, `loss`, `accuracy`, `chosen_log_ratio`, `rejected_log_ratio`, `margin`.

    Raises:
        ValueError: for another name.
    """
    if name not in [*_LOGS]:
        raise ValueError(f"there is no log {name!r}; choose A, B or C")
    return read_log("dpo_logs", name)


def check_origins(answers: Mapping[str, str]) -> None:
    """Check what the learner says of the three logs, and tell what speaks against a wrong answer.

    Args:
        answers: for each of the logs "A", "B" and "C" a key of `ORIGINS` or what it stands for, or
            `...` for not yet.

    Raises:
        ValueError: for a log that is missing.

    Example:
        >>> check_origins({"A": ..., "B": ..., "C": ...})
        A: not attempted yet.
        B: not attempted yet.
        C: not attempted yet.
    """
    judge(answers, _LOGS, ORIGINS, _EVIDENCE, dpo_log)
