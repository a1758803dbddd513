"""The checks of lesson 02: the pairwise loss, the last real token, accuracy with ties."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_helpers.checks.changes import miscounted
from rlhf_helpers.checks.exercise import (
    NO_MEAN,
    NO_MEANS,
    Exercise,
    check,
    each,
    gradient_fault,
    gradients,
    int64_fault,
    same,
    texts,
)
from rlhf_helpers.reward import last_token_index, pair_accuracy, pairwise_loss

SAY = texts("""
apart (pairs): one with a σ for each reward by itself, not for their difference
pairs: the loss is {}. It is the mean over the pairs of -log σ(chosen - rejected): each pair's own
    surprise, which is never negative and small where the chosen one is higher.
swapped (pairs): that of swapped rewards: it falls when the rejected response gets the higher one
summed (pairs): a sum over the pairs, which grows with the batch
minus_sign_missing (pairs): a mean whose minus sign is missing
two_signs_wrong (pairs): one with two signs wrong, that of the gap and that of the loss
gaps_averaged (pairs): that of the gaps averaged, with the logarithm taken last
divided_by_2 (pairs): a sum divided by 2, as in the example, whatever the number of pairs
crossed (pairs): a mean over every chosen with every rejected response
share: it is {}. Asked for is the share of all pairs, ties included, whose chosen response has the
    higher reward, however small the gap; a tie counts half.
accuracy_count (share): a number of pairs, not a share
dropped (share): the share among the pairs without a tie
ties_above_only (share): points of all pairs divided by the number of pairs without a tie
ties_together (share): a share in which ties count only if all pairs are ties
nearly (share): a share with rewards that are nearly equal taken for ties
accuracy_crossed (share): a share of all chosen with all rejected ones, across the pairs
against_zero (share): a comparison with 0, which means nothing for a reward
accuracy_mean_gap (share): the mean gap
mean_probability (share): the mean probability of the choices
two_means_compared (share): a comparison of the two means
saturated (share): a share of rewards that a function made equal far from 0
no_log (loss): a σ without its logarithm
mean_gap (loss): the gap without σ and logarithm
hinge (loss): a hinge, which asks for a margin of 1
squared (loss): a square
count_less_one (column): the number of real tokens less one
count (column): the number of real tokens
last_column (column): always the last column
first_real_token (column): the first real token
before_padding (column): the column before the first padding
before_padding_wrapped (column): the column before the first padding, -1 made the last one
from_the_right (column): the amount of padding behind the last real token
negative (column): counted from the end, as a negative number
through_the_batch (column): counted through the whole batch
first_padding (column): the first column of padding, 0 where there is none
no_fall (column): where the mask falls from 1 to 0, and 0 where it never does
added_up (column): the sum or the mean of the real columns
nan_gradient: the values are right, but the gradient is NaN in places. Some step on the way is
    infinite: torch.where computes both of its branches, and in the backward pass 0 times the
    infinite one is NaN. Masking afterwards comes too late; use one expression that is finite at
    every gap.
nan_hidden: the values are right, but a reward that is NaN is passed over, by nanmean, nan_to_num or
    a filter. NaN means that the model's weights have diverged; a loss that hides it trains on.
early: it is right at small and at huge gaps, but it goes over from one form to the other too early.
    At a gap of 7 the loss is still 0.0009, not 0, and at -7 it is 7.0009. The two forms should meet
    where float32 sees no difference.
overflow: it is not finite at a gap of -200. In float32 σ(-200) rounds to 0 and exp(200) to
    infinity, so that the logarithm has nothing left to work on. The loss there is 200, a harmless
    number: the two steps have to become one that never leaves the range.
exponentiated: each reward is exponentiated by itself, which overflows although the gap is small.
    Only the gap matters: take the difference of the rewards first, then the logarithm of σ in one
    step.
capped: it is right for moderate gaps, but capped: at a gap of -200 the loss must be 200. A clamp,
    an ε inside the logarithm and binary_cross_entropy cut it off, and a loss that is cut off has
    gradient 0, on just those pairs that the model gets most wrong.
loss: the loss of a pair is taken as {}. The data are choices, and the surprise at a choice of
    probability σ(Δ) is -log σ(Δ): it never stops asking, and never pulls hard on a settled pair.
slope_at_tie: the values are right, but not the slope at a tie, which is -½ for each pair: relu,
    clamp and abs have a kink where the gap is 0, and go on with 0 or -1 there. All rewards are
    nearly equal when training begins. Take one smooth expression for all gaps.
column: it is {}. Asked for is the last column whose mask is 1, counted from 0 in each row; padding
    may stand on either side, on both or nowhere.
column_type: the values are right, but the result is {}; a column number is used as an index, in
    gather as well, which takes int64 only.
few_bits: it is right in short rows only: in 16 bits a number such as 2605 is rounded to another.
    Leave columns as the integers that they are.
ties_count_wrong: ties count as wrong. A model that gives every response the same reward would get
    0, as if it were worse than guessing; a tie counts half.
ties_count_right: ties count as right. A model that gives every response the same reward would get 1
    without knowing anything; a tie counts half.
whole_ties: some ties count 1 and the others 0, as with a coin, also one with a fixed seed, or where
    a half is rounded. Each tie counts half.
""")

# --- lesson 02: the pairwise loss ------------------------------------------------------------


def check_pairwise_loss(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check the learner's `pairwise_loss(chosen, rejected)`.

    Args:
        fn: returns a scalar tensor, as `rlhf_helpers.reward.pairwise_loss` does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_pairwise_loss(pairwise_loss)
        pairwise_loss: correct. Tested: float32 gaps of -200 to 200, gradients, 20 pairs, NaN.
    """
    check(PAIRWISE_LOSS, fn)


def _pairwise_gradient_fault(fn: Callable) -> str:
    """Whether the gradients with respect to both rewards are those of the reference."""
    for case in reversed(_PAIRWISE_CASES):
        if fault := gradient_fault(PAIRWISE_LOSS, fn, (case,), (0, 1)):
            got = gradients(PAIRWISE_LOSS, fn, case, (0, 1))
            if isinstance(got, str):
                return got
            if any(gradient.isnan().any() for gradient in got):
                return SAY.nan_gradient
            return SAY.slope_at_tie if case is _PAIRWISE_CASES[0] else fault
    return _nan_fault(fn)


def _nan_fault(fn: Callable) -> str:
    """Whether NaN is passed over by name; where gaps are sorted by sign it may fall through."""
    names = getattr(getattr(fn, "__code__", None), "co_names", ())
    if not any("nan" in name or "isfinite" in name for name in names):
        return ""
    try:
        loss = fn(torch.tensor([math.nan, 2.0]), torch.tensor([1.0, 0.0]))
        return "" if loss.isnan() else SAY.nan_hidden
    except Exception:  # NaN may be refused, as by the package's function
        return ""


def _naive(gap: Tensor) -> Tensor:
    """log σ as two steps, which is −∞ where σ rounds to 0."""
    return gap.sigmoid().log()


def _softplus(gap: Tensor) -> Tensor:
    return -logsigmoid(-gap)


def _early(low: float, high: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The loss as −gap below a gap of −`low`, and as 0 above `high`."""
    gap = chosen - rejected
    loss = torch.where(gap < -low, -gap, _softplus(-gap))
    return torch.where(gap > high, 0.0, loss).mean()


def _too_small(results: Sequence) -> str:
    """Whether results are right near a gap of 0, and finite but too small where it is -200."""
    for case, result in zip(_PAIRWISE_CASES, results, strict=True):
        gap, right = (case[0] - case[1]).min(), pairwise_loss(*case)
        if gap > -3 and not (result - right).abs() < 0.02:
            return ""
        if gap == -200 and (same(result, right) or not 0 <= result < right):
            return ""
    return SAY.capped


_GAPS = (2.5, -2.5, 4.0, -4.0, 7.0, -7.0, 12.0, -12.0, 30.0, -30.0)
_PAIRWISE_CASES = (
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])),
    (torch.tensor([-1.5, -2.0, 0.5]), torch.tensor([0.5, -3.0, 0.0])),
    (torch.tensor([200.0, 0.0]), torch.tensor([0.0, 200.0])),
    (torch.tensor([150.0, -150.0]), torch.tensor([149.0, -148.0])),  # small gaps, far from 0
    (torch.tensor([-3.0]), torch.tensor([-1.0])),
    *((torch.tensor([gap]), torch.zeros(1)) for gap in _GAPS),
    (torch.tensor(_GAPS * 2) + 1, torch.ones(20)),
)

_PAIRWISE_MISTAKES = (
    (lambda c, r: -_naive(c - r).mean(), SAY.overflow),
    (lambda c, r: -(c.exp() / (c.exp() + r.exp())).log().mean(), SAY.exponentiated),
    (lambda c, r: ((c.exp() + r.exp()).log() - c).mean(), SAY.exponentiated),
    *(
        (partial(_early, low, high), SAY.early)  # one threshold for each step between the gaps
        for low, high in product((0.75, 1.5, 2.2, 3, 5, math.inf), repeat=2)
        if (low, high) != (math.inf, math.inf)
    ),
    *(
        (wrong, message)
        for log_sigmoid in (logsigmoid, _naive)
        for wrong, message in (
            (lambda c, r, f=log_sigmoid: -f(r - c).mean(), SAY.swapped),
            (lambda c, r, f=log_sigmoid: -f(c - r).sum(), SAY.summed),
            (lambda c, r, f=log_sigmoid: f(c - r).mean(), SAY.minus_sign_missing),
            (lambda c, r, f=log_sigmoid: f(r - c).mean(), SAY.two_signs_wrong),
            (lambda c, r, f=log_sigmoid: -f((c - r).mean()), SAY.gaps_averaged),
            (lambda c, r, f=log_sigmoid: -f(c - r).sum() / 2, SAY.divided_by_2),
            (lambda c, r, f=log_sigmoid: -(f(c) - f(r)).mean(), SAY.apart),
            (lambda c, r, f=log_sigmoid: -(f(c) + f(-r)).mean(), SAY.apart),
            (lambda c, r, f=log_sigmoid: -f(c).mean(), SAY.apart),
        )
    ),
    *((lambda c, r, of=of: of(_softplus(r - c)), NO_MEAN) for of in NO_MEANS),
    (lambda c, r: -logsigmoid(c[:, None] - r).mean(), SAY.crossed),
    (lambda c, r: -(c - r).sigmoid().mean(), SAY.no_log),
    (lambda c, r: (r - c).sigmoid().mean(), SAY.no_log),
    (lambda c, r: (r - c).mean(), SAY.mean_gap),
    (lambda c, r: (1 - (c - r)).relu().mean(), SAY.hinge),
    (lambda c, r: (c - r).square().mean(), SAY.squared),
    (lambda c, r: (1 - (c - r)).square().mean(), SAY.squared),
    (lambda c, r: (1 - (c - r).sigmoid()).square().mean(), SAY.squared),
)
PAIRWISE_LOSS = Exercise(
    "pairwise_loss",
    pairwise_loss,
    _PAIRWISE_CASES,
    _PAIRWISE_MISTAKES,
    tested="float32 gaps of -200 to 200, gradients, 20 pairs, NaN",
    shape_hint="Training differentiates one number, the mean over the pairs.",
    further=_pairwise_gradient_fault,
    general=_too_small,
)


# --- lesson 02: the last real token ----------------------------------------------------------


def check_last_token_index(fn: Callable[[Tensor], Tensor]) -> None:
    """Check the learner's `last_token_index(attention_mask)`.

    Args:
        fn: returns columns `[B]`, as `rlhf_helpers.reward.last_token_index` does; integers.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_last_token_index(last_token_index)  # doctest: +ELLIPSIS
        last_token_index: correct. Tested: padding on the left, on the right, on both sides, ...
    """
    check(LAST_TOKEN, fn)


def _first(mask: Tensor) -> Tensor:
    """The first real column of each row."""
    return mask.argmax(-1)


def _before_padding(mask: Tensor) -> Tensor:
    """The column before the first padding, −1 if the row begins with it or has none."""
    return (mask == 0).int().argmax(-1) - 1


_LAST_TOKEN_MISTAKES = (
    (lambda mask: mask.sum(-1) - 1, SAY.count_less_one),
    (lambda mask: mask.sum(-1), SAY.count),
    (lambda mask: torch.full_like(mask[:, 0], mask.shape[1] - 1), SAY.last_column),
    (_first, SAY.first_real_token),
    (_before_padding, SAY.before_padding),
    (lambda mask: _before_padding(mask) % mask.shape[1], SAY.before_padding_wrapped),
    (lambda mask: (mask == 0).int().argmax(-1), SAY.first_padding),
    (lambda mask: (mask.diff(dim=-1) < 0).int().argmax(-1), SAY.no_fall),
    (lambda mask: (mask * torch.arange(mask.shape[1])).sum(-1), SAY.added_up),
    (lambda mask: (mask * torch.arange(mask.shape[1])).sum(-1) // mask.sum(-1), SAY.added_up),
    (lambda mask: mask.flip(-1).argmax(-1), SAY.from_the_right),
    (lambda mask: last_token_index(mask) - mask.shape[1], SAY.negative),
    *each(
        SAY.few_bits,
        lambda t, mask: (mask * torch.arange(mask.shape[1]).to(t)).argmax(-1),
        *(torch.float16, torch.bfloat16),
    ),
    *each(SAY.few_bits, lambda t, mask: last_token_index(mask).to(t), torch.int8, torch.uint8),
    (
        lambda mask: last_token_index(mask) + mask.shape[1] * torch.arange(len(mask)),
        SAY.through_the_batch,
    ),
)
LAST_TOKEN = Exercise(
    "last_token_index",
    last_token_index,
    cases=(
        (torch.tensor([[1, 1, 0], [0, 1, 1]]),),
        (torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]),),
        (torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]),),
        (torch.tensor([[1, 1, 1, 0, 0]]),),
        (torch.tensor([[0] * 700 + [1] * 1906 + [0] * 394]),),  # 2605 is no float of 16 bits
    ),
    mistakes=_LAST_TOKEN_MISTAKES,
    tested="padding on the left, on the right, on both sides, none; single tokens, long rows",
    shape_hint="It is one column number for each row of the batch, with no further dimension.",
    further=lambda fn: int64_fault(LAST_TOKEN, fn, SAY.column_type),
)


# --- lesson 02: accuracy ---------------------------------------------------------------------


def check_pair_accuracy(fn: Callable[[Tensor, Tensor], float]) -> None:
    """Check the learner's `pair_accuracy(chosen, rejected)`.

    Args:
        fn: returns a number or a scalar tensor, as `rlhf_helpers.reward.pair_accuracy` does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_pair_accuracy(pair_accuracy)  # doctest: +ELLIPSIS
        pair_accuracy: correct. Tested: wins, losses, ties, nothing but ties, rewards from ...
    """
    check(PAIR_ACCURACY, fn)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _without_ties(if_all_tie: float, chosen: Tensor, rejected: Tensor) -> float:
    decided = chosen != rejected
    return _share((chosen > rejected)[decided]) if decided.any() else if_all_tie


_OUTCOMES = (
    ("a win", 1, "the chosen one is higher"),
    ("a tie", 0.5, "what guessing would earn"),
    ("a loss", 0, "the rejected one is higher"),
)


def _other_outcomes(results: Sequence) -> str:
    """What win, tie and loss count, or that a tie counts now as one, now as the other."""
    shares = [[_share(c > r), _share(c == r), _share(c < r)] for c, r in PAIR_ACCURACY.cases]
    ties = [
        (len(c) * (float(result) - win), len(c) * tie)
        for result, (win, tie, _), (c, _) in zip(results, shares, PAIR_ACCURACY.cases, strict=True)
    ]
    if all(-1e-4 < n < of + 1e-4 and abs(n - round(n)) < 1e-4 for n, of in ties):
        return SAY.whole_ties
    return miscounted(_OUTCOMES, shares, results)


PAIR_ACCURACY = Exercise(
    "pair_accuracy",
    pair_accuracy,
    cases=(
        (torch.tensor([2.0, 1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 0.5, 3.0])),
        (torch.tensor([-1.0, -3.0, -0.5]), torch.tensor([-2.0, -1.5, -0.75])),
        (torch.tensor([1.0, -0.5]), torch.tensor([1.0, -0.5])),  # nothing but ties
        (torch.tensor([0.0]), torch.tensor([-4.0])),
        (torch.tensor([5.0, -1.0, 0.0, 2.0, 2.0]), torch.tensor([6.0, -1.0, 0.0, 2.0, -2.0])),
        (torch.tensor([1e-9]), torch.tensor([0.0])),  # close, and no tie
        (torch.tensor([30.0, -150.0, 5.0]), torch.tensor([20.0, -200.0, 6.0])),
    ),
    mistakes=(
        (lambda c, r: _share(c > r), SAY.ties_count_wrong),
        (lambda c, r: _share(c >= r), SAY.ties_count_right),
        *((lambda c, r, of=of: of((c - r).sign() / 2 + 0.5).item(), NO_MEAN) for of in NO_MEANS),
        (lambda c, r: _share(c > r) + 0.5 * _share(c.isclose(r)), SAY.nearly),
        (lambda c, r: _share((c > r) & ~c.isclose(r)) + 0.5 * _share(c.isclose(r)), SAY.nearly),
        *each(
            SAY.saturated,
            lambda f, c, r: pair_accuracy(f(c), f(r)),
            *(torch.sigmoid, torch.exp, torch.tanh),
        ),
        (
            lambda c, r: pair_accuracy(c[:, None].expand(-1, len(r)), r.expand(len(c), -1)),
            SAY.accuracy_crossed,
        ),
        (lambda c, r: _share(c[:, None] > r), SAY.accuracy_crossed),
        (lambda c, r: len(c) * pair_accuracy(c, r), SAY.accuracy_count),
        (lambda c, r: len(c) * _share(c > r), SAY.accuracy_count),
        (lambda c, r: len(c) * _share(c >= r), SAY.accuracy_count),
        *each(SAY.dropped, _without_ties, math.nan, 0, 0.5, 1),
        *each(
            SAY.ties_above_only,
            lambda k, c, r: (_share(c > r) + k * _share(c == r)) / max(_share(c != r), 1 / len(c)),
            *(0.5, 1),
        ),
        *((lambda c, r, k=k: _share(c > r) + k * c.equal(r), SAY.ties_together) for k in (0.5, 1)),
        (lambda c, r: (c - r).mean().item(), SAY.accuracy_mean_gap),
        (lambda c, r: (c - r).sigmoid().mean().item(), SAY.mean_probability),
        (lambda c, r: float(c.mean() > r.mean()), SAY.two_means_compared),
        (lambda c, r: _share(c > 0), SAY.against_zero),
        (lambda c, r: _share((c > 0) & (r < 0)), SAY.against_zero),
    ),
    tested="wins, losses, ties, nothing but ties, rewards from -200 to 30",
    general=_other_outcomes,
)
