"""The checks of lesson 09: advantages of groups, k3 in the loss, groups that teach nothing."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import nan

import torch
from torch import Tensor

from rlhf_helpers import losses
from rlhf_helpers.checks.changes import last_real
from rlhf_helpers.checks.exercise import (
    CUT_IN_PLACE,
    Exercise,
    call,
    check,
    each,
    family,
    fault_at,
    gradient_fault,
    same,
    show,
    table,
    texts,
)
from rlhf_helpers.kl import kl_estimate

SAY = texts("""
baseline: what is taken off the score is {}. Asked for is the mean of the other responses to the
    same prompt.
own_mean (baseline): the mean of the whole group, its own score included, which makes every
    advantage too small by the same factor
batch_mean (baseline): the mean of the whole batch, in which an easy prompt makes every response
    look good
batch_others (baseline): the mean of all other responses of the batch, whatever their prompts
sum_of_others (baseline): the sum of the others, not yet divided by their number
by_size (baseline): the sum of the others divided by the size of the group; there is one fewer
best_other (baseline): the best of the others
worst_other (baseline): the worst of the others
median_other (baseline): the median of the others
neighbour (baseline): one other response alone
earlier (baseline): the mean of those that stand before it in its group
own_kept (baseline): the sum of the whole group, its own score included, divided by the number of
    the others
only_unequal (baseline): the mean of those with another score; a response with the same score is
    another response all the same
batch_sum (baseline): the sum of all other responses of the batch, divided by the number of others
    in a group; the sum is that of a group, too
others_alone (baseline): the mean of the responses to the other prompts. Compared are responses to
    the same one
fixed_out (baseline): the mean of the group without its first, or without its last, response,
    whichever is being scored. It is the own score that is left out
other_prompts (baseline): made of the responses at the same place to other prompts, since a sum or a
    mean runs down the columns
nothing (baseline): nothing at all
interleaved: responses to different prompts are compared. Those of one prompt stand side by side, so
    a group is a row once there are as many columns as a group has responses.
taken_for_count: the group size is taken for the number of groups, so that responses to different
    prompts are compared. It says how many responses stand in each group.
baseline_alone: it is the mean of the others by itself; the score of the response is still to come.
turned_round: every sign is the wrong way round, so that the worse responses would become likely.
factor_down: it is the score less the mean of the whole group, made smaller by a factor. The mean of
    the others is further away than that of all, so that the factor is above 1.
columns_first: the advantages are right, but come out in another order: first those of the first
    response to each prompt. They belong where the scores stand.
laid_out: sums or means of the groups are laid out one after the other, over and over. Each belongs
    to all responses of its own group, which stand side by side.
no_number: it gives NaN, which is no number: somewhere a mean or a spread is taken of no response at
    all, or of one alone, or 0 is divided by 0.
spread_too: it is divided by a spread as well. That is GRPO's; leave-one-out takes off a baseline
    and does no more, which is why it stays unbiased.
spread: the score less the mean of its group is {}. Asked for is its division by the standard
    deviation of the group, with 1e-4 added.
not_divided (spread): not divided at all, which is the version without the spread
variance (spread): divided by the variance, the square of the standard deviation
batch_spread (spread): divided by the standard deviation of the whole batch
population (spread): divided by a standard deviation that divides the sum of squares by the size of
    the group; here, as in torch and in TRL, it is one less
deviation (spread): divided by the mean absolute deviation
root_mean_square (spread): divided by the root of the mean square of the scores themselves, from
    which the mean has not been taken off
range (spread): divided by the distance of the best from the worst
multiplied (spread): multiplied with the standard deviation
whitened: mean and spread are those of the whole batch. That is the whitening of lesson 03; a group
    is compared with itself alone.
others_on_top: the mean on top is that of the others. In GRPO it is that of the whole group.
batch_mean_on_top: the mean that is taken off is that of the whole batch, while the spread is the
    group's. Both are the group's: an easy prompt must not lend its answers an advantage.
not_centred: the scores are divided by the spread, but the mean of their group is not taken off.
added_behind: 1e-4 is added to the quotient, and not to the standard deviation: a division comes
    before a sum where no brackets say otherwise.
mean_divided: the mean alone is divided by the spread, and then taken off: a division comes before a
    difference where no brackets say otherwise.
median_on_top: what is taken off the score is the median of its group. Asked for is the mean.
from_the_worst: what is taken off the score is the lowest of its group, and what it is divided by is
    the distance from there to the highest. Asked for are the mean and the standard deviation.
softmax: it is a softmax over the group, which is all above 0: no response would become less likely.
ranks: scores are replaced by their places in the order of the group. A score that is far better
    than the others counts for more.
large_epsilon: it is divided by the standard deviation with much more than 1e-4 added, which makes
    every advantage smaller.
added_on_top: 1e-4 is added to the difference above the line as well; it belongs below alone.
down: mean and spread run down the columns, and so over responses to other prompts. Those of one
    prompt are a row.
no_epsilon: where all scores of a group are equal, 0 is divided by 0, which is no number: add 1e-4
    to the standard deviation. Where they are far apart it is right.
hair: it is right where the scores of a group are far apart, but not where they differ by a
    thousandth: {}. Asked for is the standard deviation with 1e-4 added to it.
under_root (hair): there 1e-4 under the root, added to the variance, makes the divisor 1e-2
nothing_added (hair): there it shows that nothing as large as 1e-4 is added
taken_equal (hair): there a group whose scores differ a little is taken for one in which all are
    equal
other_number (hair): there it shows that it is another number than 1e-4 that is added
cancelled: it is right but for scores that differ by a thousandth and are far from 0. The mean of
    the squares less the square of the mean is the difference of two large numbers, which rounding
    spoils: take the mean off first.
flat: it is right but where all scores of a group are equal. There no response is better than the
    others, and every advantage is 0.
tied: it is right but in groups in which some scores are equal. Equal scores are those of different
    responses, and each counts.
weights: it counts otherwise than the exercise. In this case the own score counts {:.6g}, and each
    of the others {:.6g}, where 1 and {:.6g} are asked for.
divisor: it is right but for what the score less the mean of its group is divided by. In this case,
    in group number {} of it, that is {:.5g}, where the standard deviation with 1e-4 is {:.5g}.
first_group: the first group comes out right, but not those behind it. Look where a place in the
    group is taken for one in the batch, or the other way round.
estimate: each token contributes {}. With r, the reference's log-probability less the policy's, it
    is e to the r, less 1, less r.
flipped (estimate): the k3 of the other direction, with the sign of r turned round
k1 (estimate): the k1 of lesson 05, whose gradient is 0 on average
minus_k1 (estimate): r itself, which is k1 with its sign turned round
k2 (estimate): the k2 of lesson 05, half the square of r
square (estimate): the square of r, twice the k2 of lesson 05
half_flipped (estimate): e to the minus r, less 1, less r, whose two halves belong to two directions
ratio (estimate): e to the r alone
no_one (estimate): e to the r less r, so that two equal policies would have a distance of 1
no_r (estimate): e to the r less 1, which is 0 on average whatever the policies
plus_r (estimate): e to the r, less 1, plus r
inside (estimate): e to the r less 1 as a whole, less r: the 1 is taken off inside of the exponent
quotient (estimate): a k3 whose r is the quotient of the two log-probabilities, not their difference
ratio_for_r (estimate): a k3 whose r is the ratio of the probabilities, which is e to the r already
of_probabilities (estimate): a k3 whose r is the difference of the probabilities, without logarithms
absolute (estimate): the size of r without its sign
weighted (estimate): a k3 that is weighed with the policy's probability a second time
kl_div (estimate): what torch's kl_div makes of the two, r weighed with the reference's probability,
    as in a sum over the whole vocabulary
weighted_k1 (estimate): k1 weighed with the policy's probability, as in a sum over the whole
    vocabulary; sampled tokens come up by their probability already
by_reference (estimate): k3 times the ratio of the policy to the reference
of_whole: r is summed over the tokens of a response before the exponential. k3 belongs to each of
    them.
mean: the tokens are brought together by {}. Asked for is one mean over the response tokens of the
    whole batch.
with_padding (mean): a mean over all positions, padding included
padding_in_sum (mean): a sum over all positions, padding included, divided by the number of the
    response tokens
padding_zeros (mean): a sum over the response tokens divided by the number of all positions
of_responses (mean): a mean over the responses, each a mean over its own tokens first, as in GRPO's
    paper
summed (mean): a sum
by_batch (mean): a sum over tokens divided by the number of responses
of_positions (mean): a mean over the positions, each a mean over the responses that reach it
no_first (mean): a mean that leaves out the first token of each response, which is sampled too
no_eos (mean): a mean that leaves out the last token of each response, its EOS, which counts
padding_alone (mean): a mean over the padding, since the mask is turned round
times_ratio: the value is right, but the gradient is that of k3 times the ratio of the new policy to
    the old one. Asked for is k3 alone, as in GRPO's paper.
through_reference: the value is right, but a gradient reaches the reference, which is fixed: take it
    out of the graph.
teaching: it is {}. Asked for is the share of the groups in which not all scores are equal.
silent_share (teaching): the share of the groups in which all are equal
number (teaching): a number of groups, not a share of them
of_responses_share (teaching): a share of the responses, not of the groups
by_size_of_group (teaching): the number of the groups divided by the size of a group
only_first (teaching): 1 if the first group teaches and 0 if not, as where a return stands inside of
    the loop
different_groups (teaching): the number of different groups divided by that of all groups
neither (teaching): the share of the groups whose sum is neither 0 nor the number of responses,
    which tells something of scores that are 0 or 1 alone
both (teaching): the share of the groups with both a 0 and a 1, while other scores may differ, too
some_equal (teaching): the share of the groups in which some scores are equal
one_dropped (teaching): the share of the groups in which not all scores are equal if one response is
    left out of each, the first or the last
by_responses (teaching): the number of the groups divided by that of the responses
not_zero (teaching): the share of the groups whose mean is not 0; a group that is all right has no
    variance either
sum_above (teaching): the share of the groups whose sum is above 0, among them those that are all
    right
not_all_right (teaching): the share of the groups that are not all right; those that are all wrong
    teach as little
advantages (teaching): 0 whatever the scores, as is the sum of a group's advantages; look at each of
    them, or at the scores
digits (teaching): a share that has been rounded
some_right (teaching): the share of the groups in which something scored above 0
some_not_zero (teaching): the share of the groups in which some score is not 0; equal ones teach
    nothing wherever they are
between (teaching): the share of the groups whose mean lies between 0 and 1, which tells something
    of scores that are 0 or 1 alone
all_differ (teaching): the share of the groups in which no two scores are equal; one that differs is
    enough
last_differs (teaching): the share of the groups whose first and last score differ
first_two (teaching): the share of the groups whose first two scores differ
around_zero (teaching): the share of the groups that have scores on both sides of 0
other_mean (teaching): the share of the groups whose mean is not that of the batch
mean_spread (teaching): the mean of the groups' standard deviations
whole_number (teaching): 0 unless all groups teach, as by a division without a remainder
not_first (teaching): a share to which the first group does not contribute
not_last (teaching): a share to which the last group does not contribute
neighbours (teaching): the share of scores in the batch that differ from the one before
far_apart (teaching): the share of the groups whose scores differ by more than a hair; the smallest
    difference has a gradient too
rounded (teaching): the share of the groups with a deviation from their mean, and a mean is rounded:
    three times 0.9 has a deviation of 7e-8. Compare the scores with each other
batch_whole (teaching): 1 if anything differs in the batch and 0 if not
other_rows: responses to different prompts are thrown together. Those of one prompt stand side by
    side.
""")

COLUMN = (
    "Groups are rows, and a sum, mean or deviation of each row has one dimension less: kept as a "
    "column, it meets its own row.\n"
)

# --- lesson 09: the advantages ---------------------------------------------------------------


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """Each score less the mean of the others to its prompt; `losses.group_advantages`."""
    return losses.group_advantages(scores, group_size, "rloo")


def grpo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """The score less its group's mean, over the group's spread; `losses.group_advantages`."""
    return losses.group_advantages(scores, group_size, "grpo")


def check_leave_one_out(fn: Callable[[Tensor, int], Tensor]) -> None:
    """Check the learner's `leave_one_out(scores, group_size)`.

    Args:
        fn: returns `[B]`, as `leave_one_out` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_leave_one_out(leave_one_out)
        leave_one_out: correct. Tested: groups of 2 to 4, a group of equal scores, one group alone.
    """
    check(LEAVE_ONE_OUT, fn)


def check_grpo_advantages(fn: Callable[[Tensor, int], Tensor]) -> None:
    """Check the learner's `grpo_advantages(scores, group_size)`.

    Args:
        fn: returns `[B]`, as `grpo_advantages` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_grpo_advantages(grpo_advantages)
        grpo_advantages: correct. Tested: spreads from 1 to 13, groups of equal scores.
    """
    check(GRPO_ADVANTAGES, fn)


def _rows(scores: Tensor, size: int) -> Tensor:
    return scores.view(-1, size)


def _less(baseline: Callable, scores: Tensor, size: int) -> Tensor:
    """Scores less another baseline, made of the groups as rows."""
    groups = _rows(scores, size)
    return (groups - baseline(groups)).flatten()


def _others(groups: Tensor) -> Tensor:
    """The mean of the others in each row."""
    return (groups.sum(-1, keepdim=True) - groups) / (groups.shape[-1] - 1)


def _of_others(value: Callable, groups: Tensor) -> Tensor:
    """Some number made of the others in each row."""
    own = torch.eye(groups.shape[-1]).bool()
    return torch.tensor([[value(row[~one]) for one in own] for row in groups])


def _ranks(groups: Tensor) -> Tensor:
    return groups.argsort(-1).argsort(-1).float()


def _interleaved(of: Callable, scores: Tensor, size: int) -> Tensor:
    """With every so many-th response as a group."""
    return of(scores.view(size, -1).T.flatten(), size).view(-1, size).T.flatten()


def _as_count(value: Callable, scores: Tensor, size: int) -> Tensor:
    """With the size of a group taken for the number of groups."""
    return value(scores.view(size, -1), size).flatten()


def _of(value: Callable, scores: Tensor, size: int) -> Tensor:
    """Whatever a function makes of the groups."""
    return value(_rows(scores, size)).flatten()


def _centred(groups: Tensor) -> Tensor:
    return groups - groups.mean(-1, keepdim=True)


def _spread(groups: Tensor, correction: int = 1) -> Tensor:
    return groups.std(-1, keepdim=True, correction=correction)


def _off(baseline: Tensor, groups: Tensor) -> Tensor:
    return (groups - baseline) / (_spread(groups) + 1e-4)


def _earlier(groups: Tensor) -> Tensor:
    counts = torch.arange(groups.shape[-1]).clamp(min=1)
    return (groups.cumsum(-1) - groups) / counts


def _unequal(times: float, groups: Tensor) -> Tensor:
    """The mean of those with another score, or so many times the score itself if there is none."""
    other = groups[:, :, None] != groups[:, None, :]
    mean = (other * groups[:, None, :]).sum(-1) / other.sum(-1).clamp(min=1)
    return torch.where(other.any(-1), mean, times * groups)


def _laid_out(groups: Tensor, of: Tensor) -> Tensor:
    """A number of each group, written as many times as it has responses, but not side by side."""
    return of.repeat(groups.shape[-1]).view_as(groups)


def _by_hand(groups: Tensor) -> Tensor:
    """`_spread`, but NaN without a warning in groups of one."""
    return (_centred(groups).square().sum(-1, keepdim=True) / (groups.shape[-1] - 1)).sqrt()


def _down(groups: Tensor) -> Tensor:
    """Whitened by columns."""
    return (_centred(groups.T) / (_by_hand(groups.T) + 1e-4)).T


def _where(cases: Sequence[tuple], reference: Callable, results: Sequence) -> str:
    """In which groups results are wrong, if that tells something."""
    first, flat, tied = [], [], []
    for (scores, size), result in zip(cases, results, strict=True):
        want = reference(scores, size)
        off = _rows(~torch.isclose(result.double(), want.double(), 1e-4, 1e-5), size).any(-1)
        groups = _rows(scores, size)
        equal = groups.amax(-1) == groups.amin(-1)
        some = (groups.sort(-1).values.diff(dim=-1) == 0).any(-1)
        behind = torch.arange(len(groups)) > 0
        flat.append(not (off & ~equal).any())
        tied.append(torch.equal(off, some & ~equal))
        first.append(torch.equal(off | equal, behind | equal) and not off[0])
    told = (flat, SAY.flat), (tied, SAY.tied), (first, SAY.first_group)
    return next((message for holds, message in told if all(holds)), "")


def _general(cases: Sequence, reference: Callable, told: Callable, results: Sequence) -> str:
    """What results tell of a mistake without a name."""
    if any(result.isnan().any() for result in results):
        return SAY.no_number
    return _where(cases, reference, results) or told(results)


def _weights(results: Sequence) -> str:
    """What the own score and the others count, if no more than that is other than asked for."""
    wrong = None
    for (scores, size), result in zip(_LOO_CASES, results, strict=True):
        own, got = scores.double(), result.double()
        others = _rows(own, size).sum(-1).repeat_interleave(size) - own
        terms = torch.stack([own, others], -1)
        counts = torch.linalg.lstsq(terms, got[:, None]).solution[:, 0]
        if not same(got, terms @ counts):
            return ""
        if wrong is None and not same(result, leave_one_out(scores, size)):
            wrong = (*(x + 0.0 for x in counts.tolist()), -1 / (size - 1))
    return SAY.weights.format(*wrong)


def _divisor(results: Sequence) -> str:
    """What the difference from the mean is divided by, if it is one number for each group."""
    wrong = None
    for (scores, size), result in zip(_GRPO_CASES, results, strict=True):
        groups = _rows(scores, size)
        rows = zip(_centred(groups), _spread(groups) + 1e-4, _rows(result, size), strict=True)
        for number, (above, want, got) in enumerate(rows):
            k = above.abs().argmax()
            divisor = above[k] / got[k] if got[k] else want[0]
            if not same(divisor * got, above):
                return ""
            if wrong is None and not same(divisor * torch.ones(1), want):
                wrong = number, divisor.item(), want.item()
    return SAY.divisor.format(*wrong) if wrong else ""


def _scores(*values: float) -> Tensor:
    return torch.tensor(values)


_HAND = (_scores(3.0, 1.0, 2.0), 3)
_LOO_CASES = (
    _HAND,
    (_scores(3.0, 1.0, 2.0, 0.0, 4.0, 8.0), 3),
    (_scores(0.5, -1.5, 2.0, 2.0, -0.75, 4.0), 2),
    (_scores(1.0, 0.0, 0.0, 1.0, -2.0, 3.0, 0.25, 7.0), 4),
)
_LOO_MISTAKES = (
    *table(
        _less,
        (lambda g: g.mean(-1, keepdim=True), SAY.own_mean),
        (lambda g: g.mean(), SAY.batch_mean),
        (lambda g: (g.sum() - g) / (g.numel() - 1), SAY.batch_others),
        (lambda g: g.sum(-1, keepdim=True) - g, SAY.sum_of_others),
        (lambda g: (g.sum(-1, keepdim=True) - g) / g.shape[-1], SAY.by_size),
        (partial(_of_others, Tensor.max), SAY.best_other),
        (partial(_of_others, Tensor.min), SAY.worst_other),
        (partial(_of_others, Tensor.median), SAY.median_other),
        (partial(_of_others, lambda x: x.quantile(0.5)), SAY.median_other),
        (lambda g: g.roll(1, -1), SAY.neighbour),
        (lambda g: g.roll(-1, -1), SAY.neighbour),
        (lambda g: g[:, :1], SAY.neighbour),
        (_earlier, SAY.earlier),
        (lambda g: g.sum(-1, keepdim=True) / (g.shape[-1] - 1), SAY.own_kept),
        *each(SAY.only_unequal, _unequal, 1.0, 0.0, nan),
        (lambda g: (g.sum(0) - g) / (g.shape[-1] - 1), SAY.other_prompts),
        (lambda g: (g.sum(0) - g) / (len(g) - 1), SAY.other_prompts),
        (lambda g: g.mean(0), SAY.other_prompts),
        (lambda g: (g.sum() - g) / (g.shape[-1] - 1), SAY.batch_sum),
        (lambda g: (g.sum() - g.sum(-1, True)) / (g.numel() - g.shape[-1]), SAY.others_alone),
        (lambda g: g[:, 1:].mean(-1, keepdim=True), SAY.fixed_out),
        (lambda g: g[:, :-1].mean(-1, keepdim=True), SAY.fixed_out),
        (lambda g: 0 * g, SAY.nothing),
    ),
    (partial(_interleaved, leave_one_out), SAY.interleaved),
    *table(
        _as_count,
        (lambda g, size: g - _others(g), SAY.taken_for_count),
        (lambda g, size: g - (g.sum(-1, True) - g) / (size - 1), SAY.taken_for_count),
    ),
    *table(
        _of,
        (_others, SAY.baseline_alone),
        (lambda g: g - (_laid_out(g, g.sum(-1)) - g) / (g.shape[-1] - 1), SAY.laid_out),
        (lambda g: g - _laid_out(g, g.mean(-1)), SAY.laid_out),
        (lambda g: _others(g) - g, SAY.turned_round),
        (lambda g: g.mean(-1, keepdim=True) - g, SAY.turned_round),
        (lambda g: _centred(g) * (g.shape[-1] - 1) / g.shape[-1], SAY.factor_down),
        (lambda g: (g - _others(g)).T, SAY.columns_first),
        (lambda g: _centred(g) / (_spread(g) + 1e-4), SAY.spread_too),
        (lambda g: (g - _others(g)) / (_spread(g) + 1e-4), SAY.spread_too),
        (lambda g: (g - _others(g)) / _spread(g), SAY.spread_too),
        (lambda g: _centred(g) / _spread(g), SAY.spread_too),
        (lambda g: (g - _others(g)) / (g - _others(g)).std(), SAY.spread_too),
        (lambda g: (g - _others(g)) / (g - _others(g)).std(correction=0), SAY.spread_too),
    ),
)
LEAVE_ONE_OUT = Exercise(
    "leave_one_out",
    leave_one_out,
    _LOO_CASES,
    _LOO_MISTAKES,
    tested="groups of 2 to 4, a group of equal scores, one group alone",
    shape_hint="There is one advantage for each response, in the order of the scores.",
    size_hint=COLUMN,
    general=lambda results: _general(_LOO_CASES, leave_one_out, _weights, results),
)


def _hair_fault(fn: Callable) -> str:
    """What is added to the standard deviation, which shows where it is small itself."""
    near, far = (call(GRPO_ADVANTAGES, fn, copy.deepcopy(case)) for case in (_HAIR, _FAR_HAIR))
    if same(near, grpo_advantages(*_HAIR)):
        # right answers may be off by some 1e-4 there; of a variance that cancels nothing is left
        if torch.allclose(far, grpo_advantages(*_FAR_HAIR).to(far), rtol=0.01, atol=0.01):
            return ""
        return f"{SAY.cancelled}\n{show(GRPO_ADVANTAGES, _FAR_HAIR, far)}"
    groups, shown = _rows(*_HAIR), show(GRPO_ADVANTAGES, _HAIR, near)
    for wrong, message in (
        (0 * groups, SAY.taken_equal),
        (_centred(groups) / (_spread(groups).square() + 1e-4).sqrt(), SAY.under_root),
        (_centred(groups) / _spread(groups), SAY.nothing_added),
    ):
        if same(near, wrong.flatten()):
            return f"{message}\n{shown}"
    return f"{SAY.other_number}\n{shown}"


# Spreads of at least 1: there any small number in place of 1e-4 gives the same, and a mistake has
# one name whatever it is. Whoever makes none is asked for it by scores that differ by a hair.
_HAIR = (_scores(0.5, 0.5 + 2**-10, 0.5 - 2**-10, 0.5), 4)
_FAR_HAIR = (_HAIR[0] + 4.5, 4)  # without rounding, too
_GRPO_CASES = (
    _HAND,
    (_scores(1.0, 1.0, 0.0, 6.0), 2),
    (_scores(0.0, 1.0, 3.0, 5.0, -5.0, 20.0), 3),
    (_scores(4.0, 0.0, 0.0, 2.0, -2.0, -2.0, -2.0, -2.0), 4),
)
_GRPO_MISTAKES = (
    *table(
        _of,
        (_centred, SAY.not_divided),
        (lambda g: _centred(g) / (_spread(g).square() + 1e-4), SAY.variance),
        (lambda g: _centred(g) / (g.std() + 1e-4), SAY.batch_spread),
        (lambda g: _centred(g) / g.std(), SAY.batch_spread),
        (lambda g: _centred(g) / (_spread(g, 0) + 1e-4), SAY.population),
        (lambda g: _centred(g) / _spread(g, 0), SAY.population),
        (
            lambda g: _centred(g) / (_centred(g).abs().mean(-1, keepdim=True) + 1e-4),
            SAY.deviation,
        ),
        (lambda g: _centred(g) / (g.amax(-1, True) - g.amin(-1, True) + 1e-4), SAY.range),
        (lambda g: _centred(g) * (_spread(g) + 1e-4), SAY.multiplied),
        (lambda g: _centred(g) * _spread(g), SAY.multiplied),
        (lambda g: (g - g.mean()) / (g.std() + 1e-4), SAY.whitened),
        (lambda g: (g - g.mean()) / g.std(), SAY.whitened),
        (lambda g: _off(_others(g), g), SAY.others_on_top),
        (lambda g: (g - _others(g)) / (_spread(g, 0) + 1e-4), SAY.others_on_top),
        (lambda g: _centred(g) / _spread(g), SAY.no_epsilon),
        (lambda g: -_centred(g) / (_spread(g) + 1e-4), SAY.turned_round),
        (lambda g: (_centred(g) / (_spread(g) + 1e-4)).T, SAY.columns_first),
        (
            lambda g: _centred(g) / (g.square().mean(-1, True).sqrt() + 1e-4),
            SAY.root_mean_square,
        ),
        (lambda g: _off(g.median(-1, True).values, g), SAY.median_on_top),
        (lambda g: _off(g.quantile(0.5, -1, True), g), SAY.median_on_top),
        (
            lambda g: (g - g.amin(-1, True)) / (g.amax(-1, True) - g.amin(-1, True) + 1e-4),
            SAY.from_the_worst,
        ),
        (lambda g: g.softmax(-1), SAY.softmax),
        (lambda g: _centred(_ranks(g)) / (_spread(_ranks(g)) + 1e-4), SAY.ranks),
        *each(
            SAY.large_epsilon,
            lambda epsilon, g: _centred(g) / (_spread(g) + epsilon),
            *(1.0, 0.1, 1e-2, 1e-3),
        ),
        (lambda g: (_centred(g) + 1e-4) / (_spread(g) + 1e-4), SAY.added_on_top),
        (lambda g: (_centred(g) + 1e-4) / _spread(g), SAY.added_on_top),
        (lambda g: _off(g.mean(), g), SAY.batch_mean_on_top),
        (lambda g: g / (_spread(g) + 1e-4), SAY.not_centred),
        (lambda g: _centred(g) / _spread(g) + 1e-4, SAY.added_behind),
        (lambda g: g - g.mean(-1, True) / (_spread(g) + 1e-4), SAY.mean_divided),
        (lambda g: g - g.mean(-1, True) / _spread(g) + 1e-4, SAY.mean_divided),
        (lambda g: (g - _laid_out(g, g.mean(-1))) / (_laid_out(g, g.std(-1)) + 1e-4), SAY.laid_out),
        (_down, SAY.down),
    ),
    (partial(_interleaved, grpo_advantages), SAY.interleaved),
    (partial(_as_count, lambda g, size: _centred(g) / (_by_hand(g) + 1e-4)), SAY.taken_for_count),
)
GRPO_ADVANTAGES = Exercise(
    "grpo_advantages",
    grpo_advantages,
    _GRPO_CASES,
    _GRPO_MISTAKES,
    tested="spreads from 1 to 13, groups of equal scores",
    shape_hint="There is one advantage for each response, in the order of the scores.",
    size_hint=COLUMN,
    further=_hair_fault,
    general=lambda results: _general(_GRPO_CASES, grpo_advantages, _divisor, results),
)


# --- lesson 09: k3 in the loss ---------------------------------------------------------------


def k3_penalty(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """The mean of k3 over the response tokens of a batch, to be added to a loss.

    Args:
        logprobs: `[B, T]`, of the sampled tokens under the policy, in nats.
        ref_logprobs: `[B, T]`, under the reference; data.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0.

    Returns:
        A scalar, differentiable with respect to `logprobs`.
    """
    real = response_mask.bool()
    return kl_estimate(logprobs[real], ref_logprobs.detach()[real], "k3").mean()


def check_k3_penalty(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Check the learner's `k3_penalty(logprobs, ref_logprobs, response_mask)`.

    Args:
        fn: returns a scalar tensor, as `k3_penalty` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_k3_penalty(k3_penalty)
        k3_penalty: correct. Tested: padding, unequal lengths, equal policies, gradients.
    """
    check(K3_PENALTY, fn)


def _k3(r: Tensor) -> Tensor:
    return r.exp() - 1 - r


def _mean_of(value: Callable, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The right mean, of something else than k3."""
    return (value(ref_logprobs - logprobs) * mask).sum() / mask.sum()


def _averaged(by: Callable, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Another mean of k3."""
    return by(_k3(ref_logprobs - logprobs), mask)


def _of_other_r(r: Callable, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    return (_k3(r(logprobs, ref_logprobs)) * mask).sum() / mask.sum()


def _weighted(of: Callable, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    return (logprobs.exp() * of(ref_logprobs - logprobs) * mask).sum() / mask.sum()


def _without_last(k3: Tensor, mask: Tensor) -> Tensor:
    before = mask - last_real(mask)
    return (k3 * before).sum() / before.sum()


def _times_ratio(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """k3 times a ratio that is 1, and whose gradient is not 0."""
    ratio = (logprobs - logprobs.detach()).exp()
    return (ratio * _k3(ref_logprobs - logprobs) * mask).sum() / mask.sum()


def _k3_gradient_fault(fn: Callable) -> str:
    """Whether the gradients are the reference's: the policy's its own, the other's 0."""
    cases = _K3_CASES[1:]
    if fault := gradient_fault(K3_PENALTY, fn, cases, (0,)):
        corrected = replace(K3_PENALTY, reference=_times_ratio)
        return fault if gradient_fault(corrected, fn, cases, (0,)) else SAY.times_ratio
    fault = gradient_fault(K3_PENALTY, fn, cases, (1,))
    return fault if fault in ("", CUT_IN_PLACE) else SAY.through_reference


def _logs(policy: list, ref: list, mask: list) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(policy).log(), torch.tensor(ref).log(), torch.tensor(mask)


# By hand: ratios of 1/2 and 3/2 give log 2 - 1/2 and 1/2 - log 3/2, as in lesson 05.
_K3_CASES = (
    _logs([[0.5, 0.5]], [[0.25, 0.75]], [[1, 1]]),
    _logs([[0.5, 0.2, 0.9]], [[0.25, 0.6, 0.1]], [[1, 1, 0]]),
    _logs(
        [[0.3, 0.5, 0.1, 0.7], [0.6, 0.2, 0.4, 0.9], [0.8, 0.3, 0.3, 0.5]],
        [[0.4, 0.1, 0.2, 0.7], [0.3, 0.2, 0.8, 0.1], [0.5, 0.6, 0.3, 0.9]],
        [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]],
    ),
    _logs([[0.3, 0.5], [0.2, 0.6]], [[0.3, 0.5], [0.2, 0.4]], [[1, 1], [1, 0]]),
    _logs([[0.5, 0.001]], [[0.001, 0.5]], [[1, 1]]),  # r of ±6.2, which must not be clipped
)
_K3_MISTAKES = (
    *table(
        _mean_of,
        (lambda r: _k3(-r), SAY.flipped),
        (lambda r: -r, SAY.k1),
        (lambda r: r, SAY.minus_k1),
        (lambda r: r.square() / 2, SAY.k2),
        (torch.square, SAY.square),
        (lambda r: (-r).exp() - 1 - r, SAY.half_flipped),
        (torch.exp, SAY.ratio),
        (lambda r: r.exp() - r, SAY.no_one),
        (torch.expm1, SAY.no_r),
        (lambda r: r.exp() - 1 + r, SAY.plus_r),
        (lambda r: (r - 1).exp() - r, SAY.inside),
        (torch.abs, SAY.absolute),
        (lambda r: (-r).exp() * _k3(r), SAY.by_reference),
    ),
    *table(
        _weighted,
        (_k3, SAY.weighted),
        (torch.neg, SAY.weighted_k1),
        (lambda r: r.exp() * r, SAY.kl_div),
    ),
    *table(
        _of_other_r,
        (lambda logprobs, ref: ref / logprobs, SAY.quotient),
        (lambda logprobs, ref: ref.exp() - logprobs.exp(), SAY.of_probabilities),
        (lambda logprobs, ref: (ref - logprobs).exp(), SAY.ratio_for_r),
    ),
    (
        lambda policy, ref, mask: _k3(((ref - policy) * mask).sum(-1)).mean(),
        SAY.of_whole,
    ),
    *table(
        _averaged,
        (lambda k, m: k.mean(), SAY.with_padding),
        (lambda k, m: k.sum() / m.sum(), SAY.padding_in_sum),
        (lambda k, m: (k * m).mean(), SAY.padding_zeros),
        (lambda k, m: ((k * m).sum(-1) / m.sum(-1)).mean(), SAY.of_responses),
        (lambda k, m: (k * m).sum(), SAY.summed),
        (lambda k, m: (k * m).sum(-1).mean(), SAY.by_batch),
        (lambda k, m: ((k * m).sum(0) / m.sum(0)).mean(), SAY.of_positions),
        (lambda k, m: ((k * m).sum(0) / m.sum(0).clamp(min=1)).mean(), SAY.of_positions),
        (lambda k, m: (k * m)[:, 1:].sum() / m[:, 1:].sum(), SAY.no_first),
        (_without_last, SAY.no_eos),
        (lambda k, m: (k * (1 - m)).sum() / (1 - m).sum().clamp(min=1), SAY.padding_alone),
        (lambda k, m: (k * (1 - m)).sum() / (1 - m).sum(), SAY.padding_alone),
    ),
)
K3_PENALTY = Exercise(
    "k3_penalty",
    k3_penalty,
    _K3_CASES,
    _K3_MISTAKES,
    tested="padding, unequal lengths, equal policies, gradients",
    shape_hint="A loss is one number: the mean over the response tokens of the whole batch.",
    further=_k3_gradient_fault,
)


# --- lesson 09: groups that teach ------------------------------------------------------------


def teaching_share(scores: Tensor, group_size: int) -> float:
    """The share of groups in which not all scores are equal; from `losses.equal_groups`."""
    return (~losses.equal_groups(scores, group_size)).double().mean().item()


def check_teaching_share(fn: Callable[[Tensor, int], float]) -> None:
    """Check the learner's `teaching_share(scores, group_size)`.

    Args:
        fn: returns a number or a scalar tensor, as `teaching_share` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_teaching_share(teaching_share)
        teaching_share: correct. Tested: all right, all wrong, one that differs, negative scores.
    """
    check(TEACHING_SHARE, fn)


def _share(which: Callable, scores: Tensor, size: int) -> float:
    """The share of the groups for which something holds."""
    return which(_rows(scores, size)).double().mean().item()


def _differ(groups: Tensor) -> Tensor:
    return groups.amax(-1) > groups.amin(-1)


def _apart(by: float, groups: Tensor) -> Tensor:
    return groups.amax(-1) - groups.amin(-1) > by


def _one_group_fault(fn: Callable) -> str:
    """Whether torch's deviation of one group alone is that of its rounded mean."""
    return fault_at(TEACHING_SHARE, fn, (_scores(0.9, 0.9, 0.9), 3), SAY.rounded)


_MANY = (
    *(1.0, 0.0, 1.0, 1.0),
    *(0.0, 0.0, 0.0, 0.0),
    *(2.0, 2.0, 2.0, 2.0),
    *(0.0, 1.0, 0.0, 0.0),
    *(-1.0, -1.0, -1.0, -1.0),
    *(1.0, 0.0, 0.0, 1.0),
    *(0.5, 0.5, 0.5, -0.5),
    *(1.0, 1.0, 2.0, 1.0),
    *(3.0, 3.0, 3.0, 3.0),
    *(0.25, 0.75, 0.0, 1.0),
)
_SHARE_CASES = (
    (_scores(1.0, 0.0, 1.0, 1.0), 2),
    (_scores(0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0), 3),
    (_scores(-1.0, -1.0, -1.0, -2.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0), 4),
    (_scores(1.0, 2.0, 3.0, -4.0, 4.0, 0.0, 2.0, 2.0, 2.0), 3),
    (_scores(2.0, 2.0, -1.0, -1.0), 2),
    (_scores(0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.5, 0.5, -0.5), 3),
    (_scores(0.5, 0.501, 0.5, 0.9, 0.9, 0.9, -1.7, -1.7, -1.7), 3),
    (_scores(1.0, 0.0, 0.0, 1.0), 2),
    (_scores(0.25, 0.250001, 0.25, 0.0, 1.0, 0.0), 3),
    (_scores(0.9, 0.9, 0.9, 0.9), 2),
    (_scores(1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0), 2),
    (_scores(*_MANY), 4),  # a number that many groups make is hardly met by chance
)
_SHARE_MISTAKES = (
    *family(
        "{}",
        _share,
        (SAY.silent_share, lambda g: ~_differ(g)),
        (SAY.not_zero, lambda g: g.mean(-1) != 0),
        (SAY.some_not_zero, lambda g: g.any(-1)),
        (SAY.between, lambda g: (g.mean(-1) > 0) & (g.mean(-1) < 1)),
        (SAY.far_apart, partial(_apart, 0.01)),
        (SAY.far_apart, partial(_apart, 1e-5)),
        (SAY.rounded, lambda g: torch.stack([group.std() for group in g]) > 0),
        (SAY.rounded, lambda g: (g != g.mean(-1, keepdim=True)).any(-1)),
        (SAY.only_first, lambda g: _differ(g[:1])),
        (SAY.neither, lambda g: (g.sum(-1) != 0) & (g.sum(-1) != g.shape[-1])),
        (SAY.both, lambda g: (g == 0).any(-1) & (g == 1).any(-1)),
        (SAY.some_equal, lambda g: (g.sort(-1).values.diff(dim=-1) == 0).any(-1)),
        (SAY.one_dropped, lambda g: _differ(g[:, 1:])),
        (SAY.one_dropped, lambda g: _differ(g[:, :-1])),
        (SAY.first_two, lambda g: g[:, 0] != g[:, 1]),
        (SAY.around_zero, lambda g: (g > 0).any(-1) & (g <= 0).any(-1)),
        (SAY.around_zero, lambda g: (g > 0).any(-1) & (g < 0).any(-1)),
        (SAY.other_mean, lambda g: g.mean(-1) != g.mean()),
        (SAY.mean_spread, lambda g: g.std(-1)),
        (SAY.whole_number, lambda g: _differ(g).all()[None]),
        (SAY.not_first, lambda g: _differ(g[1:])),
        (SAY.not_first, lambda g: _differ(g) & (torch.arange(len(g)) > 0)),
        (SAY.sum_above, lambda g: g.sum(-1) > 0),
        (SAY.not_all_right, lambda g: (g != 1).any(-1)),
        (SAY.not_all_right, lambda g: (g < 1).any(-1)),
        (SAY.not_all_right, lambda g: g.mean(-1) < 1),
        (SAY.advantages, lambda g: 0 * g),
        (SAY.some_right, lambda g: (g > 0).any(-1)),
        (SAY.all_differ, lambda g: (g.sort(-1).values.diff(dim=-1) > 0).all(-1)),
        (SAY.last_differs, lambda g: g[:, 0] != g[:, -1]),
        (SAY.batch_whole, lambda g: (g.amax() > g.amin())[None]),
        (SAY.of_responses_share, lambda g: g != g[:, :1]),
        (SAY.of_responses_share, lambda g: g != g.amax(-1, keepdim=True)),
        (SAY.of_responses_share, lambda g: g != g.mean(-1, keepdim=True)),
        (SAY.of_responses_share, lambda g: _centred(g).abs() > 1e-6),
        (SAY.neighbours, lambda g: g.flatten().diff() != 0),
        (SAY.not_last, lambda g: _differ(g[:-1])),
        (SAY.not_last, lambda g: _differ(g) & (torch.arange(len(g)) < len(g) - 1)),
    ),
    (lambda scores, size: _share(_differ, scores, size) / size, SAY.by_responses),
    (lambda scores, size: _differ(_rows(scores, size)).sum().item() / size, SAY.by_size_of_group),
    (
        lambda scores, size: len(_rows(scores, size).unique(dim=0)) * size / len(scores),
        SAY.different_groups,
    ),
    *table(
        lambda rows, *case: _differ(rows(*case)).double().mean().item(),
        (lambda scores, size: scores.view(size, -1), SAY.other_rows),
        (lambda scores, size: _rows(scores, size).T, SAY.other_rows),
    ),
    *each(SAY.digits, lambda digits, *case: round(_share(_differ, *case), digits), *(0, 1, 2, 3)),
    (lambda scores, size: _differ(_rows(scores, size)).sum().item(), SAY.number),
    (lambda scores, size: (~_differ(_rows(scores, size))).sum().item(), SAY.number),
    (lambda scores, size: _share(_differ, scores.view(size, -1).T.flatten(), size), SAY.other_rows),
)
TEACHING_SHARE = Exercise(
    "teaching_share",
    teaching_share,
    _SHARE_CASES,
    _SHARE_MISTAKES,
    tested="all right, all wrong, one that differs, negative scores",
    further=_one_group_fault,
)
