"""The checks of lesson 03: log-probabilities of tokens, advantages, the clipped loss."""

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from rlhf_helpers import logprobs, losses
from rlhf_helpers.checks.changes import OF_ROWS
from rlhf_helpers.checks.exercise import (
    EPSILONS,
    NO_MEAN,
    NO_MEANS,
    Exercise,
    call,
    check,
    check_pair,
    each,
    family,
    gradient_fault,
    gradients,
    same,
    show,
    table,
    texts,
)

SAY = texts("""
whitened_returns (returns): made of whitened advantages
plain_policy_gradient (gain): log π A, the plain policy gradient without a ratio
minimum_after_mean (gain): a term whose minimum is taken after the mean, not for each token
maximum_of_losses (gain): the larger of the two terms, which belongs to losses, with a minus inside
digits: {}. The log-probability there is a harmless number such as -150, but exp(150) is infinite in
    float32 and a softmax of exp(-150) rounds to 0. Logarithm and softmax have to become one step,
    which subtracts the largest logit first: no clamp and no ε.
not_finite (digits): it is not finite where two logits differ by 150
cut_off (digits): it is right for moderate logits, but cut off where two differ by 150
far_apart (digits): it does not hold where two logits differ by 800, or two positions by 1000
bounds: {}. Sum from the last real token, EOS, to the first. After EOS both V and A are 0: mask
    rewards and values before the sums, since padding has numbers of its own, and the results after.
past_eos (bounds): a value from behind the end is used
masked_late (bounds): the mask comes too late
unmasked (bounds): padding has advantages
returns_unmasked (bounds): the advantages are right, but the returns at padding are not
not_cut (bounds): the next value is cut off at the end of the response, but not the advantage
own_mask (bounds): the mask of token t stands where that of token t + 1 is meant
wrapped_round (bounds): the value after the last column is that of the first
last_left_out (bounds): the last token of a response, its EOS, is left out
last_column_never_computed (bounds): the last column is never computed
time_runs_forward (bounds): time runs forward: each advantage collects the TD errors before it
reversed (bounds): the result is in reverse order: the last token's stands first
score: it is {}. Asked for is the log-probability of the token at hand: its logit less the logarithm
    of the sum of the exponentials of all logits at its position.
greedy (score): the log-probability of the likeliest token
surprise (score): the surprise -log p, which cross-entropy returns, with the sign turned round
whole_vocabulary (score): a sum or mean over the whole vocabulary
no_tokens (score): the entropy, or minus the entropy, which asks for no token
probabilities (score): the probability, without the logarithm
raw_logits (score): the raw logit, not normalised
no_log_sum (score): the logit less a mean or the largest one, or with that not put back
log_of_logits (score): the logarithm of the logit, which is one already
over_the_tokens (score): a softmax over the chosen logits, of the row or of the batch
over_positions_too (score): a softmax over the vocabulary and all positions at once
shift: a token is looked up {}. The logits at t have read the token at t and predict the one at
    t + 1; the response stands at the end: both windows have T columns, one apart.
unshifted (shift): at its own position
other_way (shift): one position to the right
shifted_twice (shift): two positions to the left
too_early (shift): well, but in a window that begins with the last prompt token
from_the_start (shift): at the beginning of the sequence
mean: it is {}. Asked for is the mean over all real tokens of the batch at once: padding counts
    neither above nor below, and each real token as much as any other.
wrong_denominator (mean): a mean whose denominator counts padding
summed (mean): the sum over all tokens
per_response (mean): the mean over the responses of the sum over their tokens
of_columns (mean): the mean of the columns' means, as where time stands first
two_means (mean): a mean with padding, multiplied by the mean of the mask
mean_of_means (mean): the mean of the responses' means
grid (mean): a sum of [B] over counts of [B, 1], each response by the length of each
integer_mask (mean): a mean of places that integers in square brackets pick, the mask as numbers
maximum (gain): the larger of the two terms
minimum_of_ratios (gain): the smaller ratio times A
only_clipped_term (gain): the clipped term alone
nothing_clipped (gain): ρ A, with nothing clipped
product (gain): ρ A with a clip of the product
advantage_added (gain): a sum of ρ and A
one_sided (gain): a minimum with a clip that has one end only
uneven (gain): a minimum with a clip of other ends
not_round_one (gain): a minimum with a clip round 0
moved: the tokens are looked up in the logits used {}. Row b of the tokens belongs to row b of the
    logits, and position by position: look at every flatten, view, transpose and index.
wrong_dimension: the softmax runs over the wrong dimension. One distribution is over the vocabulary,
    the last dimension of the logits; positions and rows of the batch do not compete.
too_long: it is right for short responses, but not for 200 tokens. A division by a power of γλ, or a
    negative power, fails where the power rounds to 0, whatever guards it, and a sum of a fixed
    number of TD errors loses the rest. Carry the sum from the end to the beginning instead.
zero_by_zero: it is right as long as γλ is above 0. A division by a power of γλ, or a negative
    power, gives inf or nan at λ = 0, and no factor of 0 takes that away; with long responses the
    power rounds to 0 before that. Carry the sum from the end to the beginning instead.
whitened: the advantages are whitened. That is a step of its own, after this one; a function that
    gives advantages should give those of the formula.
gamma_of_0: it is right unless γ is 0; then nothing counts but the token's own reward, and its
    advantage is r - V. Python takes 0 for false: does a test or a default replace it?
td_error: the TD error is taken as {}, not as r + γV' - V, where V' is the next token's value. It
    is the reward and what can still be expected, at the price γ, less what was expected.
weights: a TD error l steps ahead is weighed with {}, not with (γλ) to the power l. γ is the price
    of time, and λ says how far ahead to look.
returns: the returns are {}, not A + V. An advantage is a return less the value at its own token:
    the critic's target adds that, and smooths by λ as the advantage does.
pair_swapped: the pair is swapped: the advantages come first, then the returns.
time_first: time is taken for the first dimension, as in code for tensors [T, B]. Here rows are
    responses, and time runs along a row: step over columns, and keep all rows.
exponentials_divided: it is a ratio of two exponentials: below -103 nats both are 0 in float32, and
    an ε in the denominator outweighs them long before. Subtract the logarithms first.
ratio_cut_off: it is cut off where the ratio is far from 1. A bad token that has become 30 or 8000
    times as likely must count in full, or nothing brings it back: no limit on the log-ratio, and
    none but the clip on the ratio.
advantage_of_0: a real token whose advantage is 0 is not counted. It has nothing to gain, but it is
    one of the tokens that the mean is over: only the mask says what padding is.
not_finite_at_padding: it is not finite (or its gradient is not) where padding holds
    log-probabilities far apart: inf times 0 is nan. Set the difference at padding to 0 before the
    exp.
ratio: the ratio is taken as {}, not as π/π_old. The probabilities are there as logarithms: a
    quotient is the exponential of a difference, 1 where nothing has changed, and more than that for
    a token that has become likelier.
gain: the gain of a token is taken as {}. It is the smaller of ρ A and clip(ρ) A, with ρ held
    between 1 - ε and 1 + ε: no credit beyond the clip, and full blame for what went the wrong way.
left_out: a token is left out of {} where the ratio is beyond the clip. The mean is over all real
    tokens: a clipped one has no slope, but counts with clip(ρ) A, and one that moved the wrong way
    counts in full.
log_probability (gain): π's own log-probability times A, weighed with the ratio or not
padding_after_ratio: the log-ratio or the ratio is masked, and padding counts all the same: exp(0)
    is 1, and a ratio of 0 is clipped to 1 - ε, so that padding keeps a part in the loss. Mask what
    the mean is taken of.
""")

# --- lesson 03: the log-probabilities of the response ----------------------------------------


def check_token_logprobs(fn: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """Check the learner's `token_logprobs(logits, input_ids, response_length)`.

    Args:
        fn: takes logits `[B, L, V]` and token ids `[B, L]` of prompts and responses, and T;
            returns `[B, T]`, float32, the log-probabilities of the last T tokens, differentiable.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_token_logprobs(_token_logprobs)
        token_logprobs: correct. Tested: padded prompts, T = 1, logits up to 1000 apart, gradients.
    """
    check(TOKEN_LOGPROBS, fn)


def _token_logprobs(logits: Tensor, input_ids: Tensor, response_length: int) -> Tensor:
    tokens = input_ids[:, -response_length:]
    return logprobs.token_logprobs(logits[:, -response_length - 1 : -1], tokens)


def further_fault(
    exercise: Exercise, further: tuple, fn: Callable, gradient: bool = True, dtype: bool = True
) -> str:
    """What goes wrong on cases beyond those of the exercise, or with the dtype; "" if nothing does.

    Each case comes with what to tell those who get only this one wrong.
    """
    both = (fn, exercise.reference)
    for case, message in further:
        result, expected = (call(exercise, f, copy.deepcopy(case)) for f in both)
        fault = f"{message}\n{show(exercise, case, result)}"
        if not same(result, expected):
            return fault
        if gradient and gradient_fault(exercise, fn, (case,), (0,)):
            slope = gradients(exercise, fn, case, (0,))
            return slope if isinstance(slope, str) else f"{fault}\n  your gradient: {slope[0]}"
    if dtype and result.dtype != expected.dtype:
        return (
            f"the values are right, but the dtype is {result.dtype}; return {expected.dtype}, that "
            "of the arguments, or everything computed from the result changes its dtype too."
        )
    return ""


def pick(scores: Tensor, tokens: Tensor) -> Tensor:
    return scores.gather(-1, tokens[..., None]).squeeze(-1)


def _window(x: Tensor, length: int, back: int) -> Tensor:
    """The columns of the response, `back` places to the left."""
    end = x.shape[1] - back
    return x[:, end - length : end]


def _misaligned(normalise: Callable, begin: Callable, logits: Tensor, ids: Tensor, length: int):
    """Windows of logits and tokens that begin at other columns."""
    size, columns = ids.shape[1], torch.arange(length)
    at, of = begin(size, length)
    return pick(normalise(logits[:, (at + columns) % size], -1), ids[:, of + columns])


def _aligned(of: Callable, logits: Tensor, ids: Tensor, length: int) -> Tensor:
    """`of` what the right window and shift give."""
    return of(_window(logits, length, 1), _window(ids, length, 0))


def _normalised_before(how: tuple[Callable, int], logits: Tensor, ids: Tensor, length: int):
    """The right window and shift, of the whole logits normalised over a dimension."""
    normalise, dim = how
    return _aligned(pick, normalise(logits, dim), ids, length)


def _naive(logits: Tensor, dim: int) -> Tensor:
    return logits.softmax(dim).log()


def _naive_difference(logits: Tensor, dim: int) -> Tensor:
    return logits - logits.exp().sum(dim, keepdim=True).log()


def _naive_share(logits: Tensor, dim: int) -> Tensor:
    return (logits.exp() / logits.exp().sum(dim, keepdim=True)).log()


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers, rounded so that a case can be read."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(10).round() / 10


_TOKEN_CASES = (
    (
        torch.tensor([[[0.0, 1.0, 2.0], [0.0, 0.6931, 0.0], [0.6931, 0.0, 0.0], [3.0, 1.0, 0.0]]]),
        torch.tensor([[0, 2, 1, 2]]),  # padding, a prompt of one token, a response of two
        2,
    ),
    (3 * drawn(2, 6, 5, seed=0), torch.tensor([[0, 3, 2, 4, 3, 1], [2, 2, 4, 1, 0, 0]]), 3),
    (3 * drawn(3, 5, 4, seed=1), torch.tensor([[0, 2, 3, 2, 1], [3, 3, 2, 3, 1], [2] * 5]), 1),
    (
        torch.tensor([[[1.0, 0.0], [150.0, 0.0], [0.0, 150.0], [2.0, 1.0]]]),
        torch.tensor([[0, 1, 1, 1]]),  # log-probabilities of -150 and 0
        2,
    ),
)
TOKEN_FURTHER = (
    (
        (
            torch.tensor(
                [
                    [[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 800.0, 0.0], [0.0, 0.0, 0.0]],
                    [[0.0, 0.0, 0.0], [1000.0, 1001.0, 1002.0], [1000.0, 200.0, 1000.0], [0.0] * 3],
                ]
            ),
            torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]]),
            2,
        ),
        SAY.far_apart,
    ),
)

NAIVE = (_naive, _naive_difference, _naive_share)
LOOKUPS = (  # of logits and tokens that are aligned
    *each(SAY.over_the_tokens, lambda dim, z, tokens: pick(z, tokens).log_softmax(dim), -1, 0),
    *(
        (of, message)
        for f in (torch.log_softmax, *NAIVE)
        for of, message in (
            (lambda z, tokens, f=f: -pick(f(z, -1), tokens), SAY.surprise),
            (lambda z, tokens, f=f: pick(f(z, 0), tokens), SAY.wrong_dimension),
            (lambda z, tokens, f=f: pick(f(z, 1), tokens), SAY.wrong_dimension),
            (lambda z, tokens, f=f: f(z, -1).amax(-1), SAY.greedy),
            (lambda z, tokens, f=f: f(z, -1).sum(-1), SAY.whole_vocabulary),
            (lambda z, tokens, f=f: f(z, -1).mean(-1), SAY.whole_vocabulary),
            (lambda z, tokens, f=f: (f(z, -1).exp() * f(z, -1)).sum(-1), SAY.no_tokens),
            (lambda z, tokens, f=f: -(f(z, -1).exp() * f(z, -1)).sum(-1), SAY.no_tokens),
        )
    ),
    *((lambda z, tokens, f=f: pick(f(z, -1), tokens), SAY.not_finite) for f in NAIVE),
    *each(
        SAY.cut_off,
        lambda low, z, tokens: logprobs.token_logprobs(z, tokens).clamp(min=low),
        *(*map(math.log, EPSILONS), -10, -20, -30, -50, -100),
    ),
    *table(
        lambda of, z, tokens: pick(of(z), tokens),
        (lambda z: z - z.logsumexp((-2, -1), True), SAY.over_positions_too),
        (lambda z: z - z.logsumexp((-3, -2, -1), True), SAY.over_positions_too),
        *((lambda z, f=f: f(z).log_softmax(-1), SAY.moved.format(how)) for how, f in OF_ROWS),
        (lambda z: z.softmax(-1), SAY.probabilities),
        (lambda z: z, SAY.raw_logits),
        (lambda z: z.log(), SAY.log_of_logits),
        (lambda z: z - z.mean(-1, keepdim=True), SAY.no_log_sum),
        (lambda z: z - z.amax(-1, keepdim=True), SAY.no_log_sum),
        (lambda z: z - (z - z.amax(-1, keepdim=True)).logsumexp(-1, True), SAY.no_log_sum),
        (lambda z: z - z.exp().mean(-1, keepdim=True).log(), SAY.no_log_sum),
    ),
)
_WINDOWS = (  # where the windows of logits and tokens begin, by all columns and the response's
    (lambda size, n: (size - n, size - n), SAY.unshifted),
    (lambda size, n: (size - n - 1, size - n - 1), SAY.unshifted),
    (lambda size, n: (size - n, size - n - 1), SAY.other_way),
    (lambda size, n: (size - n + 1, size - n), SAY.other_way),
    (lambda size, n: (size - n - 2, size - n), SAY.shifted_twice),
    (lambda size, n: (size - n - 2, size - n - 1), SAY.too_early),
    (lambda size, n: (0, 0), SAY.from_the_start),
    (lambda size, n: (0, 1), SAY.from_the_start),
    (lambda size, n: (0, size - n), SAY.from_the_start),
)
_TOKEN_MISTAKES = (
    *(
        (partial(_misaligned, normalise, begin), message)
        for normalise in (torch.log_softmax, *NAIVE)
        for begin, message in _WINDOWS
    ),
    *each(SAY.wrong_dimension, _normalised_before, *product((torch.log_softmax, *NAIVE), (0, 1))),
    *((partial(_aligned, of), message) for of, message in LOOKUPS),
)
TOKEN_LOGPROBS = Exercise(
    "token_logprobs",
    _token_logprobs,
    _TOKEN_CASES,
    _TOKEN_MISTAKES,
    tested="padded prompts, T = 1, logits up to 1000 apart, gradients",
    shape_hint="It is one number for each token of the response, response_length columns: none for "
    "the prompt, none lost to the shift, and no mean or sum over them.",
    further=lambda fn: (
        gradient_fault(TOKEN_LOGPROBS, fn, _TOKEN_CASES, (0,))
        or further_fault(TOKEN_LOGPROBS, TOKEN_FURTHER, fn)
    ),
)


# --- lesson 03: advantages and returns -------------------------------------------------------


def check_gae(fn: Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]) -> None:
    """Check the learner's `gae(rewards, values, response_mask, gamma, lam)`.

    Where it shows a result, the advantages stand first and the returns below.

    Args:
        fn: returns advantages and returns, `[B, T]` each, float32, as `losses.gae` does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_gae(losses.gae)
        gae: correct. Tested: padding, a response of EOS alone, 200 tokens, λ and γ from 0 to 1.
    """
    check_pair(GAE, fn)


def _gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> Tensor:
    return torch.stack(losses.gae(rewards, values, response_mask, gamma, lam))


def _next(values: Tensor) -> Tensor:
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


def _sum_up(deltas: Tensor, decay: float) -> Tensor:
    return deltas @ losses.gae_weights(deltas.shape[1], decay).to(deltas)


def _with_values(advantages: Tensor, values: Tensor) -> Tensor:
    return torch.stack([advantages, advantages + values])


def _td_error(r: Tensor, v: Tensor, gamma: float, lam: float) -> Tensor:
    return r + gamma * _next(v) - v


def _other_delta(of: Callable, rewards, values, mask, gamma, lam) -> Tensor:
    """gae with another TD error; the mask is respected."""
    v = values * mask
    deltas = of(rewards * mask, v, gamma, lam) * mask
    return _with_values(_sum_up(deltas, gamma * lam), v) * mask


def _other_sum(of: Callable, rewards, values, mask, gamma, lam) -> Tensor:
    """gae with another sum of TD errors, of these, γ and λ."""
    v = values * mask
    return _with_values(of(_td_error(rewards * mask, v, gamma, lam), gamma, lam), v) * mask


def _from_the_start(deltas: Tensor, gamma: float, lam: float) -> Tensor:
    weighted = deltas * (gamma * lam) ** torch.arange(deltas.shape[1])
    return weighted.flip(1).cumsum(1).flip(1)


def _divided(deltas: Tensor, gamma: float, lam: float) -> Tensor:
    """A sum of TD errors times powers, divided by a power: 0/0 where γλ is 0."""
    return _from_the_start(deltas, gamma, lam) / (gamma * lam) ** torch.arange(deltas.shape[1])


def _other_returns(of: Callable, rewards: Tensor, values: Tensor, mask: Tensor, gamma, lam):
    """The right advantages, with other returns."""
    advantages, _ = losses.gae(rewards, values, mask, gamma, lam)
    returns = of(rewards * mask, values * mask, advantages, gamma)
    return torch.stack([advantages, returns * mask])


def _carelessly_masked(end: Callable, which: tuple, rewards, values, mask, gamma, lam) -> Tensor:
    """gae where only what is marked in `which` is masked; `end(values)` follows the last column.

    Rewards, values, TD errors, both results, the values that are added to the advantages.
    """
    r, v, d, results, added = (mask if masked else torch.ones_like(mask) for masked in which)
    values_after = torch.cat([(values * v)[:, 1:], end(values * v)], dim=1)
    deltas = (rewards * r + gamma * values_after - values * v) * d
    return _with_values(_sum_up(deltas, gamma * lam), values * added) * results


def _time_first(which: tuple, rewards, values, mask, gamma, lam) -> Tensor:
    tensors = (rewards.T, values.T, mask.T)
    return _carelessly_masked(lambda v: 0 * v[:, :1], which, *tensors, gamma, lam).mT


def _masking_message(which: tuple[bool, bool, bool, bool, bool]) -> str:
    rewards, values, deltas, results, added = which
    if values and (rewards or deltas):
        return "" if results or added else SAY.returns_unmasked
    if deltas:
        return SAY.past_eos
    return SAY.masked_late if results else SAY.unmasked


def _cut(masks: Callable, masked: tuple[bool, bool], rewards, values, mask, gamma, lam) -> Tensor:
    """gae in a loop, where masks cut off the next token's value and advantage, each its own.

    `masked` says whether the rewards and the results are masked too.
    """
    of_value, of_advantage = masks(mask, _next(mask))
    r, results = (mask if use else torch.ones_like(mask) for use in masked)
    advantages = rewards * r + gamma * _next(values) * of_value - values
    for t in reversed(range(values.shape[1] - 1)):
        advantages[:, t] += gamma * lam * of_advantage[:, t] * advantages[:, t + 1]
    return _with_values(advantages, values) * results


def _left_reversed(both: bool, masked: bool, rewards, values, mask, gamma, lam) -> Tensor:
    """The advantages, or both results, from the last token to the first."""
    advantages, v = losses.gae(rewards, values, mask, gamma, lam)[0], values * mask
    result = _with_values(advantages, v).flip(-1) if both else _with_values(advantages.flip(-1), v)
    return result * mask if masked else result


def _without_eos(keeps_return: bool, rewards, values, mask, gamma, lam) -> Tensor:
    """gae with the last real token taken for padding."""
    kept = _next(mask)
    deltas = _td_error(rewards * mask, values * mask, gamma, lam) * kept
    return _with_values(_sum_up(deltas, gamma * lam), values) * (mask if keeps_return else kept)


def _white(x: Tensor, mask: Tensor, correction: int, everywhere: bool) -> Tensor:
    variance, mean = torch.var_mean(x if everywhere else x[mask.bool()], correction=correction)
    return (x - mean) / variance.sqrt()


def _whitened(
    where: tuple[bool, bool], correction: int, everywhere: bool, rewards, values, mask, gamma, lam
) -> Tensor:
    """gae with whitened advantages as the result, or in the returns, or both (`where`)."""
    plain, _ = losses.gae(rewards, values, mask, gamma, lam)
    white = _white(plain, mask, correction, everywhere)
    shown, used = (white if whiten else plain for whiten in where)
    return torch.stack([shown, used + values]) * mask


_LENGTHS = torch.tensor([[1], [4], [6]])
_SHORT = (
    torch.tensor([[0.3, 0.0, 1.0], [-0.2, 2.0, 5.0]]),
    torch.tensor([[0.5, -1.0, 0.25], [0.5, 1.0, 4.0]]),
    torch.tensor([[1, 1, 1], [1, 1, 0]]),
)
_GAE_CASES = (
    (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.6]]), torch.ones(1, 2).long(), 1.0, 0.95),
    (
        torch.tensor([[0.5, -1.0, 2.0, 9.0], [1.0, 0.0, -0.5, 3.0]]),
        torch.tensor([[1.0, 0.5, -0.5, 7.0], [0.2, 0.4, 0.6, -0.8]]),  # 9 and 7 are padding
        torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        0.9,
        0.8,
    ),
    (drawn(3, 6, seed=2), drawn(3, 6, seed=3), (torch.arange(6) < _LENGTHS).long(), 1.0, 0.95),
    (*_SHORT, 0.9, 0.0),
    (*_SHORT, 0.5, 1.0),
)
_LONG = (
    drawn(6, 200, seed=4),
    drawn(6, 200, seed=5),
    (torch.arange(200) < torch.tensor([[1], [7], [60], [120], [199], [200]])).long(),
)
GAE_FURTHER = (
    *(((*_LONG, 1.0, lam), SAY.too_long) for lam in (0.95, 0.5, 0.0)),
    ((*_SHORT, 0.0, 0.95), SAY.gamma_of_0),
)

_GAE_MISTAKES = (
    *(
        (partial(_carelessly_masked, end, which), message)
        for end, message_of in (
            (lambda v: 0 * v[:, :1], _masking_message),
            (lambda v: v[:, -1:], lambda which: SAY.past_eos),
            (lambda v: v[:, :1], lambda which: SAY.wrapped_round),
        )
        for which in product((True, False), repeat=5)
        if (message := message_of(which))
    ),
    *(
        (partial(_cut, masks, masked), message)
        for masks, message in (
            (lambda own, later: (later, torch.ones_like(own)), SAY.not_cut),
            (lambda own, later: (own, own), SAY.own_mask),
            (lambda own, later: (later, own), SAY.own_mask),
        )
        for masked in product((True, False), repeat=2)
    ),
    *((partial(_time_first, which), SAY.time_first) for which in product((1, 0), repeat=5)),
    *((partial(_left_reversed, *how), SAY.reversed) for how in product((True, False), repeat=2)),
    *each(SAY.last_left_out, _without_eos, True, False),
    *table(
        _other_sum,
        (lambda d, g, lam: _sum_up(d.flip(1), g * lam).flip(1), SAY.time_runs_forward),
        (
            lambda d, g, lam: _sum_up(d * (torch.arange(n := d.shape[1]) < n - 1), g * lam),
            SAY.last_column_never_computed,
        ),
        (_divided, SAY.zero_by_zero),
    ),
    (lambda *x: _other_sum(_divided, *x).masked_fill(x[2] == 0, 0), SAY.zero_by_zero),
    *family(
        SAY.weights,
        _other_sum,
        ("λ to the power l", lambda d, g, lam: _sum_up(d, lam)),
        ("1", lambda d, g, lam: _sum_up(d, 1)),
        ("γλ if l is 1, and 0 beyond", lambda d, g, lam: d + g * lam * _next(d)),
        ("γλ to the power l + 1", lambda d, g, lam: g * lam * _sum_up(d, g * lam)),
        ("γλ to the power of its place in the row", _from_the_start),
    ),
    *family(
        SAY.td_error,
        _other_delta,
        ("r + γλV' - V", lambda r, v, gamma, lam: r + gamma * lam * _next(v) - v),
        ("r + λV' - V", lambda r, v, gamma, lam: r + lam * _next(v) - v),
        ("r + V' - V", lambda r, v, gamma, lam: r + _next(v) - v),
        ("V - r - γV'", lambda r, v, gamma, lam: v - r - gamma * _next(v)),
        ("r + γV - V", lambda r, v, gamma, lam: r + gamma * v - v),
        (
            "r + γV' - V, with V' of the token before",
            lambda r, v, gamma, lam: r + gamma * _next(v.flip(1)).flip(1) - v,
        ),
        ("r + γV'", lambda r, v, gamma, lam: r + gamma * _next(v)),
        ("r + γV' + V", lambda r, v, gamma, lam: r + gamma * _next(v) + v),
        ("r - γV' - V", lambda r, v, gamma, lam: r - gamma * _next(v) - v),
        ("r - V", lambda r, v, gamma, lam: r - v),
        ("r", lambda r, v, gamma, lam: r),
    ),
    (lambda r, v, mask, gamma, lam: _gae(r, v, mask, gamma, lam).flip(0), SAY.pair_swapped),
    *(
        (partial(_whitened, where, correction, everywhere), message)
        for where, message in (
            ((True, False), SAY.whitened),
            ((True, True), SAY.whitened_returns),
            ((False, True), SAY.whitened_returns),
        )
        for correction, everywhere in product((0, 1), (False, True))
    ),
    *family(
        SAY.returns,
        _other_returns,
        ("A", lambda r, v, a, gamma: a),
        ("A + r", lambda r, v, a, gamma: a + r),
        ("A - V", lambda r, v, a, gamma: a - v),
        ("A + V'", lambda r, v, a, gamma: a + _next(v)),
        ("r + γV'", lambda r, v, a, gamma: r + gamma * _next(v)),
        ("the sums of rewards", lambda r, v, a, gamma: _sum_up(r, gamma)),
        ("V", lambda r, v, a, gamma: v),
    ),
)
GAE = Exercise(
    "gae",
    _gae,
    _GAE_CASES,
    _GAE_MISTAKES,
    tested="padding, a response of EOS alone, 200 tokens, λ and γ from 0 to 1",
    parts=("the advantages", "the returns"),
    further=lambda fn: further_fault(GAE, GAE_FURTHER, fn, gradient=False),
)


# --- lesson 03: the clipped loss -------------------------------------------------------------


def check_policy_loss(fn: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check the learner's `policy_loss(logprobs, old_logprobs, advantages, response_mask, clip)`.

    Args:
        fn: returns a scalar, float32, the first of what `rlhf_helpers.losses.policy_loss` returns.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_policy_loss(_policy_loss)
        policy_loss: correct. Tested: small and large ratios, both signs, padding, clip, gradients.
    """
    check(POLICY_LOSS, fn)


def _policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, clip: float
) -> Tensor:
    return losses.policy_loss(logprobs, old_logprobs, advantages, response_mask, clip)[0]


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def _clipped_objective(ratio: Tensor, a: Tensor, clip: float) -> Tensor:
    return torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)


def _other_objective(of: Callable, new, old, a, mask, clip) -> Tensor:
    """The loss with another objective for each token, of the ratio, the advantage and ε."""
    return -token_mean(of((new - old).exp(), a, clip), mask)


def _other_ratio(of: Callable, new, old, a, mask, clip) -> Tensor:
    """The loss with another ratio, of the two log-probabilities."""
    return -token_mean(_clipped_objective(of(new, old), a, clip), mask)


def _other_mean(of: Callable, new, old, a, mask, clip) -> Tensor:
    """The loss with another mean, of the objective and the mask."""
    return -of(_clipped_objective((new - old).exp(), a, clip), mask)


def _beyond(p: Tensor, a: Tensor, e: float) -> Tensor:
    return (p - 1).abs() > e


def _let_go(p: Tensor, a: Tensor, e: float) -> Tensor:
    """Where the clip takes the slope."""
    return (p - 1) * a.sign() > e


def _without(which: Callable, of_sum: bool, new, old, a, mask, clip) -> Tensor:
    """The loss without the tokens of which `which` is true."""
    ratio = (new - old).exp()
    kept = mask * ~which(ratio, a, clip)
    return -(ratio * a * kept).sum() / (mask if of_sum else kept).sum().clamp(min=1)


_LOG_OBJECTIVES = (  # of log π, the ratio, the advantage and ε
    lambda z, p, a, e: p * z * a,
    lambda z, p, a, e: torch.minimum(p * z * a, p.clamp(1 - e, 1 + e) * z * a),
    lambda z, p, a, e: p.clamp(1 - e, 1 + e) * z * a,
    lambda z, p, a, e: torch.where(_let_go(p, a, e), p.clamp(1 - e, 1 + e) * a, p * z * a),
    lambda z, p, a, e: torch.where(_let_go(p, a, e), 0, p * z * a),
    lambda z, p, a, e: torch.where(_let_go(p, a, e), 0, z * a),
)


def _of_log(of: Callable, new, old, a, mask, clip) -> Tensor:
    return -token_mean(of(new, (new - old).exp(), a, clip), mask)


def _minimum_after_mean(new, old, a, mask, clip) -> Tensor:
    ratio = (new - old).exp()
    terms = ratio * a, ratio.clamp(1 - clip, 1 + clip) * a
    return -torch.minimum(*(token_mean(x, mask) for x in terms))


def _ratio_masked(log: bool, everywhere: bool, new, old, a, mask, clip) -> Tensor:
    """The log-ratio or the ratio masked, and nothing else, with a mean over the row or the mask."""
    ratio = ((new - old) * mask).exp() if log else (new - old).exp() * mask
    objective = _clipped_objective(ratio, a, clip)
    return -(objective.mean() if everywhere else objective.sum() / mask.sum())


OTHER_MEANS = (  # of what stands at each token, and the mask
    (lambda x, mask: (x * mask).mean(), SAY.wrong_denominator),
    (lambda x, mask: ((x * mask).sum(1) / mask.sum(1, keepdim=True)).mean(), SAY.grid),
    (lambda x, mask: x.gather(1, mask).mean(), SAY.integer_mask),
    (lambda x, mask: (x * mask).sum(), SAY.summed),
    (lambda x, mask: x.sum(), SAY.summed),
    (lambda x, mask: (x * mask).sum(1).mean(), SAY.per_response),
    (lambda x, mask: x.sum(1).mean(), SAY.per_response),
    (lambda x, mask: ((x * mask).sum(1) / mask.sum(1)).mean(), SAY.mean_of_means),
    (lambda x, mask: ((x * mask).sum(0) / mask.sum(0).clamp(min=1)).mean(), SAY.of_columns),
    (lambda x, mask: ((x * mask).sum(0) / mask.sum(0)).nanmean(), SAY.of_columns),
    *((lambda x, mask, of=of: of(x[mask.bool()]), NO_MEAN) for of in NO_MEANS),
    (lambda x, mask: x.mean() * mask.float().mean(), SAY.two_means),
)


def _other_clip(low: Callable, high: Callable, new, old, a, mask, clip) -> Tensor:
    """The loss with the ratio held between two other ends."""
    ratio = (new - old).exp()
    return -token_mean(torch.minimum(ratio * a, ratio.clamp(low(clip), high(clip)) * a), mask)


def _case_of_ratios(ratios: list, advantages: list, mask: list, clip: float) -> tuple:
    ratio = torch.tensor(ratios)
    old = torch.linspace(0.1, 0.2, ratio.numel()).reshape(ratio.shape)
    return (old * ratio).log(), old.log(), torch.tensor(advantages), torch.tensor(mask), clip


def _case_of_row(new: list, old: list, advantages: list, mask: list) -> tuple:
    return *(torch.tensor([row]) for row in (new, old, advantages, mask)), 0.2


_LOSS_CASES = (
    (
        torch.tensor([[0.3, 0.1, 0.3]]).log(),
        torch.tensor([[0.2, 0.2, 0.2]]).log(),
        torch.tensor([[1.0, 1.0, -1.0]]),
        torch.tensor([[1, 1, 1]]),
        0.2,
    ),
    _case_of_ratios(
        [[1.5, 0.5, 1.1, 3.0], [1.6, 0.6, 0.9, 0.4]],
        [[1.0, 2.0, -1.0, 6.0], [-2.0, -0.5, 1.5, -1.0]],  # 3.0 and 6.0 are padding
        [[1, 1, 1, 0], [1, 1, 1, 1]],
        0.2,
    ),
    _case_of_ratios(
        [[1.15, 0.85, 4.0], [0.7, 2.0, 0.5], [1.05, 4.0, 0.25]],
        [[0.5, -1.5, 2.0], [-1.0, 3.0, -4.0], [1.0, -0.5, -2.0]],
        [[1, 1, 0], [1, 0, 0], [1, 1, 1]],
        0.1,
    ),
    _case_of_ratios(
        [[1.0, 1.0], [1.0, 1.0]], [[0.5, -1.0], [2.0, 3.0]], [[1, 1], [1, 0]], 0.2
    ),  # before the first step
    _case_of_ratios([[1.7, 0.4], [0.3, 1.4]], [[1.0, -1.0], [1.0, 2.0]], [[1, 1], [1, 1]], 0.5),
)

POLICY_FURTHER = (
    (_case_of_row([-20.0, -150.0], [-20.0, -150.0], [1.0, 2.0], [1, 1]), SAY.exponentials_divided),
    (
        _case_of_row([-1.0, -1.0, -5.0], [-4.4, -10.0, -1.0], [-1.0, -1.0, 1.0], [1, 1, 1]),
        SAY.ratio_cut_off,
    ),
    (_case_of_ratios([[1.1, 0.9, 1.0]], [[1.0, 0.0, -0.5]], [[1, 1, 1]], 0.2), SAY.advantage_of_0),
    (
        _case_of_row(
            [-1.0, -2.0, -1.0, -1.0, -201.0],
            [-1.1, -1.9, -201.0, -201.0, -1.0],
            [1.0, -1.0, -1.0, 1.0, 1.0],
            [1, 1, 0, 0, 0],
        ),
        SAY.not_finite_at_padding,
    ),
)

_POLICY_MISTAKES = (
    *family(
        SAY.ratio,
        _other_ratio,
        ("log π - log π_old", lambda new, old: new - old),
        ("1 + log π - log π_old", lambda new, old: 1 + new - old),
        ("log π/log π_old", lambda new, old: new / old),
        ("the exponential of log π/log π_old", lambda new, old: (new / old).exp()),
        ("π - π_old", lambda new, old: new.exp() - old.exp()),
    ),
    (partial(_other_clip, lambda e: 1 / (1 + e), lambda e: 1 + e), SAY.uneven),
    (partial(_other_clip, lambda e: 1 - e, lambda e: math.inf), SAY.one_sided),
    (partial(_other_clip, lambda e: -math.inf, lambda e: 1 + e), SAY.one_sided),
    (partial(_other_clip, lambda e: -e, lambda e: e), SAY.not_round_one),
    (lambda new, old, a, mask, clip: -token_mean(new * a, mask), SAY.plain_policy_gradient),
    *(
        (partial(_without, which, of_sum), SAY.left_out.format(where))
        for which in (_beyond, _let_go)
        for of_sum, where in ((True, "the sum"), (False, "sum and number"))
    ),
    *((partial(_of_log, of), SAY.log_probability) for of in _LOG_OBJECTIVES),
    (_minimum_after_mean, SAY.minimum_after_mean),
    *((partial(_ratio_masked, *how), SAY.padding_after_ratio) for how in product((1, 0), (1, 0))),
    *((partial(_other_mean, of), message) for of, message in OTHER_MEANS),
    *table(
        _other_objective,
        (lambda p, a, e: torch.maximum(p * a, p.clamp(1 - e, 1 + e) * a), SAY.maximum),
        (lambda p, a, e: -torch.maximum(p * a, p.clamp(1 - e, 1 + e) * a), SAY.maximum_of_losses),
        (lambda p, a, e: torch.minimum(p, p.clamp(1 - e, 1 + e)) * a, SAY.minimum_of_ratios),
        (lambda p, a, e: p.clamp(1 - e, 1 + e) * a, SAY.only_clipped_term),
        (lambda p, a, e: torch.minimum(p + a, p.clamp(1 - e, 1 + e) + a), SAY.advantage_added),
        (lambda p, a, e: p * a, SAY.nothing_clipped),
        (lambda p, a, e: torch.minimum(p * a, p.log().clamp(-e, e).exp() * a), SAY.uneven),
        (lambda p, a, e: torch.minimum(p * a, (p * a).clamp(1 - e, 1 + e)), SAY.product),
        (
            lambda p, a, e: torch.minimum(p * a, (p * a).clamp((1 - e) * a, (1 + e) * a)),
            SAY.product,
        ),
    ),
)
POLICY_LOSS = Exercise(
    "policy_loss",
    _policy_loss,
    _LOSS_CASES,
    _POLICY_MISTAKES,
    tested="small and large ratios, both signs, padding, clip, gradients",
    shape_hint="Training differentiates one number, the mean over all real tokens.",
    further=lambda fn: (
        gradient_fault(POLICY_LOSS, fn, _LOSS_CASES, (0,))
        or further_fault(POLICY_LOSS, POLICY_FURTHER, fn)
    ),
)
