"""The checks of lesson 10: whitening over ranks, a split log-softmax, bytes held and sent.

Ranks are threads here, each with the learner's function; what they send goes through a barrier.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers import losses
from rlhf_helpers.checks.exercise import Exercise, check, each, fault_at, same, table, texts
from rlhf_helpers.logprobs import token_logprobs

SAY = texts("""
whitening: mean and spread are {}. Asked for are those of all entries that count, on whichever rank
    they are.
by_itself (whitening): those of each rank by itself, so that nothing was sent that matters
mean_of_means (whitening): made from a mean of the ranks' means, in which an entry of a rank with
    few counts more
mean_of_variances (whitening): not both over all: the variance is a mean of the ranks' variances,
    which leaves out how far the ranks' means are apart
mean_of_deviations (whitening): not both over all: the standard deviation is a mean of the ranks'
    standard deviations, which leaves out how far their means are apart
own_variance (whitening): not both over all: the mean is, but the variance is each rank's own
own_mean (whitening): not both over all: the mean that is taken off is each rank's own
own_mean_in_variance (whitening): not both over all: the squares are taken around each rank's own
    mean, which leaves out how far the ranks' means are apart
with_padding (whitening): over the padding too
padding_in_mean (whitening): over the padding too in one place: it is in the sum of the mean, though
    not in the number of entries
padding_in_squares (whitening): over the padding too in one place: it is in the sum of the squares,
    though not in the number of entries
padding_in_sums (whitening): over the padding too in two places: it is in the sums, of entries and
    of squares, though not in their number
padding_in_count (whitening): over the padding too in one place: it is in the number of entries,
    though not in the sums
by_ranks (whitening): made of a sum over all that is divided by the number of ranks, where it is to
    be divided by the number of entries
mean_by_one_less (whitening): right but for the divisor of the mean, which is one less than the
    number of entries; only that of the variance is
indexed (whitening): those of the entries number 0 and 1, since a mask of integers in square
    brackets is a list of numbers; make it bool first
places (whitening): those of the entries at one and the same place of each rank, since whole tensors
    were summed over the ranks; each rank's own entries are to be added up before
not_summed (whitening): not both over all: a sum of this rank's entries, or of their squares, is
    divided by the number of all ranks' entries
equal_counts (whitening): made with the number of entries of one rank times the number of ranks, as
    if each had as many
own_count (whitening): sums over all ranks, divided by the number of entries of one
by_number (whitening): right but for the divisor of the variance, which is the number of entries;
    here, as in torch, it is one less
one_less_each (whitening): right but for the divisor of the variance: one is taken off on every
    rank, and so as many as there are ranks
not_centred: it is divided by the spread, but the mean is not taken off.
not_divided: the mean of all is taken off, but it is not divided by the spread.
variance: it is divided by the variance of all, and not by its root.
deviation: it is divided by the mean of the distances from the mean. Asked for is the root of the
    variance, which is made of their squares.
second_moment: it is divided by the root of the mean square of the entries themselves. A variance is
    made of squares around the mean.
square_of_sum: distances from the mean are added up and then squared, so that they cancel: square
    them before.
padding_kept: where the mask is 0 something else than 0 stands.
rounding: it is right on small numbers, but not for numbers near 1,000 that differ by less than 1: a
    difference of two large sums is lost in rounding there. Sum the squares around the mean of all.
one_rank: one rank by itself comes out right, but not several together. Look at what each rank
    brings to a sum, and at what is not summed.
two_numbers: from each entry a number is taken off, and the rest is divided by another, as it should
    be. In this case, on rank {}, they are {:.4g} and {:.4g}; the mean of all is {:.4g}, the root of
    their variance {:.4g}.
no_epsilon: where all entries are equal, 0 is divided by 0, which is no number: add 1e-8 to the
    variance before the root. Elsewhere it is right.
epsilon: it is right on large spreads, but not where the variance is 1e-4: what is added to it is
    1e-8, and no more.
before_the_root: it is right on large spreads, but not where the variance is as small as 1e-8: that
    much is added to the variance, before the root is taken.
single: it is right but where a rank has one entry that counts. One alone has no variance of its
    own: add up the squares around the mean of all.
maximum: the maximum that is taken off is {}. It must be one number for all ranks, or their sums
    are of different things.
own_maximum (maximum): each rank's own, in the sum and in the result
own_in_sum (maximum): each rank's own in the sum of exponentials, and that of all in the result
no_maximum (maximum): missing: e to the 200 is more than float32 can hold
not_below_0 (maximum): held at 0 or more, and where all logits lie far below it, all exponentials
    round to 0
absolute (maximum): the largest without its sign, which may lie far above all logits, so that the
    exponentials round to 0
summed_maximum (maximum): the sum of the ranks' maxima, which is so far above all logits that the
    exponentials round to 0
one_maximum: the maximum is one for all tokens of the text. Where a row of logits lies far below it,
    its exponentials all round to 0. Each token has a maximum of its own.
probability: a probability or its inverse is formed, and the logarithm taken at the end; float32
    rounds a small one to 0, and its inverse to infinity. Stay with logarithms.
maximum_added: the shared maximum is added at the end, where it is to be taken off.
maximum_alone: the largest logit stands where the logarithm of the sum of all exponentials belongs.
over_tokens: the sum of exponentials runs over the tokens of the text as well; each has one of its
    own.
not_put_back: the shared maximum is taken off inside of the exponentials, but not from the logit.
not_inside: the shared maximum is taken off from the logit, but not inside of the exponentials.
largest_sum: the largest of the ranks' sums of exponentials stands where they are to be added up.
owner_alone: the rank that has the token has the right result, and the others have 0. All need it:
    one more sum brings what they lack.
whole_logit: the token's logit has lost its fraction, as where it is written into a tensor of whole
    numbers, which one made like the token ids is.
own_sum: the sum of exponentials is each rank's own, that of its part of the vocabulary.
own_softmax: each rank takes a log-softmax of its own columns, as if there were no others.
mean_sum: the sum of exponentials is averaged over the ranks where it is to be added up.
mean_columns: exponentials are averaged over a rank's columns where they are to be added up.
no_logarithm: the sum of exponentials is taken off, and not its logarithm.
every_rank: the logit of the token is counted on every rank: those that do not have it add another
    token's. They must add 0.
modulo: the logit of the token is counted on every rank, at the remainder of its id: those that do
    not have it must add 0.
bounds: whether a token is among a rank's columns is asked wrongly: {}. They are as many ids as the
    rank has columns, and the first of them is given.
first_missing (bounds): the first of them is left out, and nobody brings its logit
last_missing (bounds): the last of them is left out, and nobody brings its logit
beyond (bounds): the id behind the last of them counts as well, and so on two ranks
no_upper (bounds): every id behind the last of them counts as well, with some logit of this rank
no_lower (bounds): every id before the first of them counts as well, with some logit of this rank
minus_infinity: ranks that lack the token's logit bring minus infinity, and any sum with it is minus
    infinity. They must bring 0.
off_by_one: a rank's columns are taken to begin one id too early, or too late. The id that is given
    is that of its first column.
some_tokens: it is right for some tokens, but not for all. In this case the first it is wrong for
    has the id {} and, on rank {}, a logit of {:.4g}; the largest of its row is {:.4g}.
first_unused: a rank looks for the token's id among its columns as if they began at 0, whatever the
    id of its first one.
wrong_column: the rank that has the token reads another of its columns: their numbers begin at 0, so
    that a token's is its id less that of the first.
rank_number: the id of the first column is taken for the number of the rank. It is where this rank's
    columns begin.
first_added: the id of the first column is added to the token's id, where it is to be taken off;
    only on rank 0 does that find the right one.
averaged_logit: the logit of the token is averaged over the ranks. The others bring 0, so that the
    sum is the logit itself.
log_of_zero: a rank that lacks the token takes the logarithm of 0, which is minus infinity: what one
    rank knows is to be summed before.
by_maximum: the logit of the token is brought to all by a maximum, where the 0 of a rank that lacks
    it wins over a logit below 0. A sum has no such trouble.
sum_of_logarithms: logarithms are added up over the ranks. The sums of exponentials are to be added
    up first, and one logarithm taken of that.
logarithm_each: the logarithm of the sum is taken off once for each rank. It is one number, taken
    off once.
maximum_each: the maximum is taken off once for each rank: a rank that lacks the logit must bring 0,
    and brings 0 less the maximum.
formula_summed: the whole result is summed over the ranks, so that the maximum and the logarithm are
    taken off once for each of them. The token's logit alone is to be summed so.
not_shared: the logit of the token is known on the rank that has it, and the others go on with 0:
    one more sum brings it to all.
sum_alone: it is the logarithm of the sum over the vocabulary by itself; the token's logit is still
    to come.
turned_round: every sign is the wrong way round: a log-probability is not above 0.
bytes_counted: it counts otherwise than the exercise. Bytes of a parameter that are whole, and that
    are cut by the ranks: {}.
passes_counted: it counts otherwise than the exercise. Passes, in each of which a rank sends
    (W − 1)/W of the whole: {}.
stages: it is right in {}, but not in {}.
held: {}. Stage 1 cuts the optimizer, stage 2 the gradients as well, stage 3 also the weights.
optimizer_whole (held): the optimizer is whole on each rank
gradients_whole (held): the gradients are never cut
gradients_early (held): the gradients are cut in stage 1 already
weights_whole (held): in stage 3 the weights are whole still, or the gradients, and the bytes do not
    tell which
weights_early (held): the weights are cut in stage 2 already
all_cut (held): everything is cut, in stage 0 too
nothing_cut (held): nothing is cut
of_stage_3 (held): any stage above 0 is counted as stage 3
no_copy: the optimizer has 8 bytes. It keeps three numbers of 4 bytes: two moments and, as the
    weights have 16 bits, a float32 copy of them.
one_parameter: it is what one parameter takes; there are many.
drops_a_rest: it is right where the ranks' parts are equal, but not for 1001 on two ranks: a
    division without a remainder drops a part of what is cut.
alone: a rank that is alone has nobody to send to. It sends 0 bytes.
no_gradients: the gradients are left out; they are 2 bytes for each parameter.
no_weights: the weights themselves are left out; they are 2 bytes for each parameter.
other_parts: a rank holds all parts but its own, (W − 1)/W of what is cut. Asked for is its own.
cut_by_more: what is cut is divided by one more than the number of ranks.
cut_by_less: what is cut is divided by one less than the number of ranks, of which each keeps a
    part.
all_together: it is what all ranks together hold. Asked for is one of them.
float_weights: weights and gradients are counted with 4 bytes; in bfloat16 they have 2.
sends: {}. To sum into parts and to gather a whole from parts, each rank sends its share to all
    others but itself, in all (W − 1)/W of the whole.
whole_sent (sends): a whole is counted for each pass, with nothing left at home
to_each (sends): the whole is counted for each of the other ranks, which is what all ranks together
    send
part_sent (sends): one part is counted for each pass, 1/W of the whole
one_pass (sends): an all-reduce is one pass here; it is two, a summing into parts and a gathering
as_others (sends): stage 3 is counted as the others; it gathers the weights twice, before forward
    and before backward, and sums the gradients into parts: three passes
four_passes (sends): stage 3 has four passes here; after its gradients are summed into parts nobody
    needs the whole of them
less_in_2 (sends): in stage 2 the new weights are not gathered; each rank has updated its part alone
less_in_1_and_2 (sends): in stages 1 and 2 the new weights are not gathered; each rank has updated
    its part alone
twice (sends): everything is counted twice, be it that weights were taken for parameters, and not
    for bytes, or that what is received was added to what is sent
upside_down (sends): the fraction is upside down, W/(W − 1), so that a rank would send more than
    the whole
tree (sends): a whole is counted for each round of a tree, log W of them; no rank need send as much
hard_coded (sends): 3/4 of the whole is counted for each pass, whatever the number of ranks
without_weights (sends): passes alone are counted, without the bytes of the weights
one_more (sends): W + 1 stands where W − 1 belongs: a rank sends nothing to itself
cut_again (sends): stage 3 is divided by the number of ranks once more
""")


PATIENCE = 20  # seconds that a rank waits for the others


# --- ranks as threads ------------------------------------------------------------------------


class Ranks:
    """As many threads as ranks, and what they say to each other."""

    def __init__(self, count: int) -> None:
        self.brought: list[tuple[str, Tensor] | None] = [None] * count
        self.returned = False  # whether some rank has, so that no more messages can be sent
        self.barrier = threading.Barrier(count, timeout=PATIENCE)

    def reduce(self, how: str, rank: int, x: Tensor | float) -> Tensor:
        """`all_sum` or `all_max` of what the ranks bring; it waits for all of them."""
        if self.returned:
            self.barrier.abort()
        self.brought[rank] = how, torch.as_tensor(x).detach().clone()
        self.barrier.wait()
        asked, tensors = zip(*self.brought, strict=True)
        if len(set(asked)) > 1:
            raise ValueError(
                "one rank calls all_sum where another calls all_max: the order of the calls must "
                "be the same on all ranks"
            )
        shapes = [list(tensor.shape) for tensor in tensors]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"the ranks bring tensors of shapes {shapes}: they must be equal")
        stacked = torch.stack(tensors)
        result = stacked.sum(0) if how == "sum" else stacked.amax(0)
        self.barrier.wait()  # nobody brings the next before all have taken this one
        return result

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What the function returns on each rank; the first error that is a rank's own."""

        def one(rank: int) -> Any:
            try:
                result = function(rank)
                self.returned = True
                if self.barrier.n_waiting:  # for this one, in vain
                    self.barrier.abort()
                return result
            except BaseException:
                self.barrier.abort()  # the others must not wait for this one
                raise

        with ThreadPoolExecutor(len(self.brought)) as pool:
            done = [pool.submit(one, rank) for rank in range(len(self.brought))]
        errors = [error for future in done if (error := future.exception())]
        own = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        if errors and not own:
            raise RuntimeError("some ranks wait for a message that others never send")
        if own:
            raise own[0]
        return [future.result() for future in done]


def on_ranks(given: Callable[[int, Any], Sequence]) -> Callable[[Callable], Callable]:
    """Make of a function of one rank one of all: the results stacked, a row for each rank.

    Args:
        given: from rank and case to what the rank's function gets, before its messages.
    """

    def of(fn: Callable, messages: Sequence[str]) -> Callable:
        @functools.wraps(fn)  # so that the check finds the learner's code
        def all_ranks(*case):
            ranks = Ranks(len(case[0]))

            def one(rank: int):
                say = [functools.partial(ranks.reduce, how, rank) for how in messages]
                return fn(*given(rank, *case), *say)

            return _stacked(ranks.run(one))

        return all_ranks

    return of


def _stacked(results: list) -> Any:
    """Tensors of one shape as one; else the first that can be none, for the check to name it."""
    if all(isinstance(x, Tensor) and x.shape == results[0].shape for x in results):
        return torch.stack(results)
    return next((x for x in results if not isinstance(x, Tensor)), results[0])


# --- lesson 10: whitening --------------------------------------------------------------------


def whiten_over_ranks(x: Tensor, mask: Tensor) -> Tensor:
    """`losses.whiten` of all ranks' entries: a row for each rank."""
    return losses.whiten(x, mask)


def check_whiten_over_ranks(fn: Callable[[Tensor, Tensor, Callable], Tensor]) -> None:
    """Check the learner's `whiten_over_ranks(x, mask, all_sum)`, a function of one rank.

    Args:
        fn: gets `[N]` entries and their mask, and `all_sum`, which gives the sum over all ranks of
            what it gets; returns `[N]`.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> def right(x, mask, all_sum):
        ...     real = mask.bool()
        ...     count, total = all_sum(real.sum()), all_sum(x[real].sum())
        ...     centred = (x - total / count) * mask
        ...     variance = all_sum(centred.square().sum()) / (count - 1)
        ...     return centred / (variance + 1e-8).sqrt()
        >>> check_whiten_over_ranks(right)
        whiten_over_ranks: correct. Tested: unequal counts, padding, three ranks, equal or large x.
    """
    check(WHITEN, _of_whitening(fn, ["sum"]) if callable(fn) else fn)


_of_whitening = on_ranks(lambda rank, x, mask: (x[rank], mask[rank]))


def _with(mean: Callable, variance: Callable, x: Tensor, mask: Tensor) -> Tensor:
    """Whitened with another mean or variance, each a number or a column, a row for each rank."""
    m = mean(x, mask)
    return (x - m) * (variance(x, mask, m) + 1e-8).rsqrt() * mask


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def _own_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


def _squares(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return ((x - mean).square() * mask).sum(-1, keepdim=True)


def _variance(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return _squares(x, mask, mean).sum() / (mask.sum() - 1)


def _own_variance(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return _squares(x, mask, _own_mean(x, mask)) / (mask.sum(-1, keepdim=True) - 1)


_VARIANCES = (_variance, lambda x, mask, mean: _variance(x, mask, _mean(x, mask)))
_OWN_VARIANCES = (
    _own_variance,
    lambda x, mask, mean: _squares(x, mask, mean) / (mask.sum(-1, keepdim=True) - 1),
    lambda x, mask, mean: _squares(x, mask, mean) / mask.sum(-1, keepdim=True),
)


def _part_of_mean(x: Tensor, mask: Tensor) -> Tensor:
    """What each rank brings to the mean."""
    return (x * mask).sum(-1, keepdim=True) / mask.sum()


def _part_of_variance(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return _squares(x, mask, mean) / (mask.sum() - 1)


def _with_sums(masked: Sequence[bool], x: Tensor, mask: Tensor) -> Tensor:
    """With the mask, or all ones, in the sum of the mean, in that of the squares, in the number."""
    first, second, count = (mask if own else torch.ones_like(mask) for own in masked)
    return _with(
        lambda x, m: (x * first).sum() / count.sum(),
        lambda x, m, mean: _squares(x, second, mean).sum() / (count.sum() - 1),
        x,
        mask,
    )


def _indexed(all_of_it: bool, x: Tensor, mask: Tensor) -> Tensor:
    """With the mask as row numbers: in the mean, or in number and squares as well."""
    taken = x.gather(-1, mask)
    count = mask.numel() if all_of_it else mask.sum()
    return _with(
        lambda x, m: taken.sum() / count,
        lambda x, m, mean: (
            (taken - mean).square().sum() / (count - 1) if all_of_it else _variance(x, m, mean)
        ),
        x,
        mask,
    )


def _equal_counts(ranks: Callable, x: Tensor, mask: Tensor) -> Tensor:
    """With so many times the own number of entries in place of all ranks'."""
    count = ranks(x) * mask.sum(-1, keepdim=True)
    return _with(
        lambda x, m: (x * m).sum() / count,
        lambda x, m, mean: _squares(x, m, mean).sum() / (count - 1),
        x,
        mask,
    )


def _padded(x: Tensor, mask: Tensor) -> Tensor:
    """With the padding among the entries, as it is."""
    return _with(lambda x, m: x.mean(), lambda x, m, mean: x.var(), x, mask)


def _zero_padded(x: Tensor, mask: Tensor) -> Tensor:
    """With the padding among the entries, as zeros."""
    return _with(lambda x, m: (x * m).mean(), lambda x, m, mean: (x * m).var(), x, mask)


def _distance(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return ((x - mean).abs() * mask).sum() / mask.sum()


def _changed(how: Callable, x: Tensor, mask: Tensor) -> Tensor:
    """Something else made of the right mean and variance."""
    mean = _mean(x, mask)
    return how(x, mask, mean, _variance(x, mask, mean))


def _case(x: list, mask: list) -> tuple[Tensor, Tensor]:
    return torch.tensor(x), torch.tensor(mask)


_WHITEN_CASES = (
    _case([[1.0, 2.0, 6.0], [5.0, 1.0, 0.0]], [[1, 1, 1], [1, 1, 0]]),
    _case(
        [[0.5, -1.0, 2.0, 9.0], [3.0, 4.0, -7.0, 1.0], [10.0, 12.0, 1.0, 8.0]],
        [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
    ),
    _case([[2.0, 2.0, 5.0], [2.0, 2.0, 2.0]], [[1, 1, 0], [1, 1, 1]]),
)
_WHITEN_MISTAKES = (
    (lambda x, mask: _with(_own_mean, _own_variance, x, mask), SAY.by_itself),
    *((partial(_with, _mean, variance), SAY.own_variance) for variance in _OWN_VARIANCES),
    *((partial(_with, _own_mean, variance), SAY.own_mean) for variance in _VARIANCES),
    *each(
        SAY.mean_of_means,
        lambda variance, x, mask: _with(lambda x, m: _own_mean(x, m).mean(), variance, x, mask),
        _variance,
        lambda x, m, mean: _own_variance(x, m, mean).mean(),
    ),
    (
        lambda x, mask: _with(lambda x, m: _own_mean(x, m).sum() / 2, _variance, x, mask),
        SAY.mean_of_means,
    ),
    *each(
        SAY.mean_of_variances,
        lambda variance, x, mask: _with(_mean, variance, x, mask),
        lambda *a: _own_variance(*a).mean(),
        lambda x, m, mean: (_own_variance(x, m, mean) * m.sum(-1, keepdim=True)).sum() / m.sum(),
    ),
    *each(
        SAY.not_summed,
        lambda how, x, mask: _with(*how, x, mask),
        (_part_of_mean, _variance),
        (_part_of_mean, _VARIANCES[1]),
        (_part_of_mean, _part_of_variance),
        (_mean, _part_of_variance),
    ),
    (
        lambda x, mask: _with(_mean, lambda *a: _own_variance(*a).sqrt().mean().square(), x, mask),
        SAY.mean_of_deviations,
    ),
    (
        lambda x, mask: (x - _mean(x, mask)) * mask / _own_variance(x, mask, x).sqrt().mean(),
        SAY.mean_of_deviations,
    ),
    (
        lambda x, mask: _with(
            _mean, lambda *a: _OWN_VARIANCES[1](*a).sqrt().mean().square(), x, mask
        ),
        SAY.mean_of_deviations,
    ),
    (
        lambda x, mask: _with(_mean, lambda x, m, mean: _variance(x, m, _own_mean(x, m)), x, mask),
        SAY.own_mean_in_variance,
    ),
    (_padded, SAY.with_padding),
    (_zero_padded, SAY.with_padding),
    *table(
        _with_sums,
        ((False, True, True), SAY.padding_in_mean),
        ((True, False, True), SAY.padding_in_squares),
        ((False, False, True), SAY.padding_in_sums),
        ((True, True, False), SAY.padding_in_count),
    ),
    (
        lambda x, mask: _with(
            _mean, lambda x, m, n: (x * m - n).square().sum() / (m.sum() - 1), x, mask
        ),
        SAY.padding_in_squares,
    ),
    (
        lambda x, mask: _with(lambda x, m: (x * m).mean(), _variance, x, mask),
        SAY.padding_in_count,
    ),
    (
        lambda x, mask: _with(
            _mean, lambda x, m, n: _squares(x, m, n).sum() / (m.numel() - 1), x, mask
        ),
        SAY.padding_in_count,
    ),
    (
        lambda x, mask: _with(
            lambda x, m: (x * m).sum(0) / m.sum(0),
            lambda x, m, mean: ((x - mean).square() * m).sum(0) / (m.sum(0) - 1),
            x,
            mask,
        ),
        SAY.places,
    ),
    *each(SAY.equal_counts, _equal_counts, len, lambda x: 2),
    *each(
        SAY.by_ranks,
        lambda variance, x, mask: _with(lambda x, m: (x * m).sum() / len(m), variance, x, mask),
        _variance,
        lambda x, m, mean: _squares(x, m, mean).sum() / (len(m) - 1),
    ),
    (
        lambda x, mask: _with(lambda x, m: (x * m).sum() / (m.sum() - 1), _variance, x, mask),
        SAY.mean_by_one_less,
    ),
    *each(SAY.indexed, _indexed, False, True),
    (
        lambda x, mask: _with(
            lambda x, m: (x * m).sum() / m.sum(-1, keepdim=True),
            lambda x, m, mean: _squares(x, m, mean).sum() / (m.sum(-1, keepdim=True) - 1),
            x,
            mask,
        ),
        SAY.own_count,
    ),
    (
        lambda x, mask: _with(
            _mean,
            lambda x, m, mean: _squares(x, m, mean).sum() / (m.sum(-1, keepdim=True) - 1),
            x,
            mask,
        ),
        SAY.own_count,
    ),
    (
        lambda x, mask: _with(_mean, lambda x, m, n: _squares(x, m, n).sum() / m.sum(), x, mask),
        SAY.by_number,
    ),
    (
        lambda x, mask: _with(
            _mean, lambda x, m, n: _squares(x, m, n).sum() / (m.sum() - len(m)), x, mask
        ),
        SAY.one_less_each,
    ),
    *table(
        _changed,
        (lambda x, m, mean, v: x * m * (v + 1e-8).rsqrt(), SAY.not_centred),
        (lambda x, m, mean, v: (x - mean) * m, SAY.not_divided),
        (lambda x, m, mean, v: (x - mean) * m / (v + 1e-8), SAY.variance),
        (lambda x, m, mean, v: (x - mean) * m / (_distance(x, m, mean) + 1e-8), SAY.deviation),
        (lambda x, m, mean, v: (x - mean) * m / _distance(x, m, mean), SAY.deviation),
        *each(
            SAY.second_moment,
            lambda less, x, m, mean, v: (
                (x - mean) * m * ((x * m).square().sum() / (m.sum() - less) + 1e-8).rsqrt()
            ),
            *(0, 1),
        ),
        (
            lambda x, m, mean, v: (
                (x - mean) * m * (((x - mean) * m).sum().square() / (m.sum() - 1) + 1e-8).rsqrt()
            ),
            SAY.square_of_sum,
        ),
        (
            lambda x, m, mean, v: (
                (x - mean)
                * m
                * (((x - mean) * m).sum(-1).square().sum() / (m.sum() - 1) + 1e-8).rsqrt()
            ),
            SAY.square_of_sum,
        ),
        (lambda x, m, mean, v: (x - mean) * (v + 1e-8).rsqrt(), SAY.padding_kept),
        (lambda x, m, mean, v: (x * m - mean) * (v + 1e-8).rsqrt(), SAY.padding_kept),
        (lambda x, m, mean, v: (x - mean) * m / v.sqrt(), SAY.no_epsilon),
        (lambda x, m, mean, v: ((x - mean) / v.sqrt()).masked_fill(m == 0, 0), SAY.no_epsilon),
    ),
)
# Means are exact here, of each rank and of all; squares are around a million.
_FAR_OUT = _case(
    [[1000.25, 999.75, 1000.5, 1000.0], [999.5, 1000.0, 0.0, 0.0]], [[1, 1, 1, 1], [1, 1, 0, 0]]
)


_SMALL = _case([[0.01, 0.02, 0.03], [0.01, 0.03, 0.0]], [[1, 1, 1], [1, 1, 0]])  # variance of 1e-4
_TINY = _case([[1e-4, 2e-4, 3e-4], [1e-4, 3e-4, 0.0]], [[1, 1, 1], [1, 1, 0]])  # of 1e-8
_SINGLE = _case([[1.0, 3.0], [5.0, 0.0]], [[1, 1], [1, 0]])


def _further_fault(fn: Callable) -> str:
    """A rank with one entry, and what rounding or an epsilon does to large or small numbers."""
    for case, message in (
        (_SINGLE, SAY.single),
        (_SMALL, SAY.epsilon),
        (_TINY, SAY.before_the_root),
        (_FAR_OUT, SAY.rounding),
    ):
        if fault := fault_at(WHITEN, fn, case, message):
            return fault
    return ""


def _two_numbers(results: Sequence) -> str:
    """What is taken off, and what the rest is divided by, if there are two such on each rank."""
    if all(
        same(-got, whiten_over_ranks(*c)) for got, c in zip(results, _WHITEN_CASES, strict=True)
    ):
        return ""  # the sign alone has a name
    wrong = None
    for (x, mask), result in zip(_WHITEN_CASES[:2], results, strict=False):
        right = (mean := _mean(x, mask)), _variance(x, mask, mean).sqrt()
        for rank, (row, real, got) in enumerate(zip(x, mask.bool(), result, strict=True)):
            divisor = (row[0] - row[1]) / (got[0] - got[1])
            found = (taken := row[0] - got[0] * divisor), divisor
            if not same((row - taken) / divisor * real, got):
                return ""
            if wrong is None and not same(torch.stack(found), torch.stack(right)):
                wrong = (rank, *(value.item() + 0.0 for value in (*found, *right)))
    return SAY.two_numbers.format(*wrong) if wrong else ""


WHITEN = Exercise(
    "whiten_over_ranks",
    whiten_over_ranks,
    _WHITEN_CASES,
    _WHITEN_MISTAKES,
    tested="unequal counts, padding, three ranks, equal or large x",
    shape_hint="Rows are ranks: each returns as many entries as it was given.",
    further=_further_fault,
    general=_two_numbers,
    rows_mix=SAY.one_rank,
)


# --- lesson 10: half a vocabulary ------------------------------------------------------------


def split_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of tokens `[T]` from columns on several ranks, `[W, T, V / W]`."""
    whole = torch.cat(list(logits), dim=-1)
    return token_logprobs(whole, tokens).expand(len(logits), -1).clone()


def check_split_logprobs(fn: Callable[..., Tensor]) -> None:
    """Check the learner's `split_logprobs(logits, tokens, first, all_max, all_sum)`, of one rank.

    Args:
        fn: gets `[T, V / W]` logits, `[T]` token ids of the whole vocabulary, the id of its first
            column, and two functions: the maximum and the sum over all ranks; returns `[T]`.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> def right(logits, tokens, first, all_max, all_sum):
        ...     top = all_max(logits.amax(-1))
        ...     total = all_sum((logits - top[:, None]).exp().sum(-1))
        ...     ids = first + torch.arange(logits.shape[-1])
        ...     return all_sum((logits * (ids == tokens[:, None])).sum(-1)) - top - total.log()
        >>> check_split_logprobs(right)
        split_logprobs: correct. Tested: two and three ranks, tokens on each, logits of 200 and -3.
    """
    check(SPLIT, _of_columns(fn, ["max", "sum"]) if callable(fn) else fn)


_of_columns = on_ranks(lambda rank, logits, tokens: (logits[rank], tokens, rank * logits.shape[-1]))


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """`[W, T]`: the token's logit on the rank that has it, 0 on the others."""
    width = logits.shape[-1]
    first = width * torch.arange(len(logits))[:, None]
    here = (tokens >= first) & (tokens < first + width)
    index = (tokens - first).clamp(0, width - 1)
    return logits.gather(-1, index[..., None])[..., 0] * here


def _of(how: Callable, logits: Tensor, tokens: Tensor) -> Tensor:
    """Made of the logit, each rank's, and each rank's maximum and logits; `[W, T]`."""
    return how(_chosen(logits, tokens), logits.amax(-1), logits).expand(len(logits), -1).clone()


def _found(here: Callable, logits: Tensor, tokens: Tensor) -> Tensor:
    """With another test of which of the ids `[W, T]`, less the first, are among the columns."""
    width = logits.shape[-1]
    index = tokens - width * torch.arange(len(logits))[:, None]
    own = logits.gather(-1, index.clamp(0, width - 1)[..., None])[..., 0] * here(index, width)
    return own.sum(0).expand(len(logits), -1) - torch.cat(list(logits), -1).logsumexp(-1)


def _started(index: Callable, logits: Tensor, tokens: Tensor) -> Tensor:
    """With another number of a token's column, from its id and that of a rank's first column."""
    width = logits.shape[-1]
    first = width * torch.arange(len(logits))[:, None]
    column = index(tokens, first).expand(len(logits), -1)
    return _found(lambda *_: column < width, logits, column + first)


def _looked_up(how: tuple[Callable, Callable], logits: Tensor, tokens: Tensor) -> Tensor:
    """With another id of the first column, or another number of a token's column."""
    (start, column), width = how, logits.shape[-1]
    first = start(width * torch.arange(len(logits))[:, None], width)
    here = (tokens >= first) & (tokens < first + width)
    index = column(tokens.expand(len(logits), -1), first).clamp(0, width - 1)
    own = logits.gather(-1, index[..., None])[..., 0] * here
    return own.sum(0).expand(len(logits), -1) - torch.cat(list(logits), -1).logsumexp(-1)


def _sums(logits: Tensor, less: Tensor) -> Tensor:
    """`[W, T]`: each rank's sum of exponentials, less something `[W, T]` or `[T]`."""
    return (logits - less[..., None]).exp().sum(-1)


def _everywhere(index: Callable, logits: Tensor, tokens: Tensor) -> Tensor:
    """The logits of a column on each rank, added up."""
    width = logits.shape[-1]
    first = width * torch.arange(len(logits))[:, None]
    column = index(tokens.expand(len(logits), -1), first, width)
    own = logits.gather(-1, column[..., None])[..., 0].sum(0)
    normal = torch.cat(list(logits), dim=-1).logsumexp(-1)
    return (own - normal).expand(len(logits), -1).clone()


def _columns(logits: list, tokens: list) -> tuple[Tensor, Tensor]:
    return torch.tensor(logits), torch.tensor(tokens)


_SPLIT_CASES = (
    _columns([[[1.0, 2.0]], [[6.0, 4.0]]], [3]),
    _columns(
        [
            [[1.0, -2.0, 0.5], [3.0, 1.0, 0.0], [0.0, 0.5, 2.0], [1.0, 1.0, 2.0]],
            [[2.0, 1.5, -1.0], [-1.0, 0.25, 2.0], [4.0, 1.0, -3.0], [0.0, 2.0, 1.0]],
        ],
        [0, 5, 3, 2],
    ),
    _columns(
        [[[0.5, 1.0], [2.0, 2.5]], [[3.0, 1.5], [1.0, 0.0]], [[1.0, 4.0], [0.5, 0.0]]], [5, 1]
    ),
    _columns([[[-1.0, -3.0], [0.5, -2.0]], [[-2.0, -0.5], [1.0, -1.5]]], [1, 2]),
    _columns([[[200.0, 198.0]], [[199.0, 201.0]]], [2]),
    _columns([[[-200.0, -201.0]], [[-199.0, -202.0]]], [1]),
    _columns(
        [[[200.0, 198.0], [1.0, 2.0], [1.0, -199.0]], [[199.0, 201.0], [0.5, -1.0], [2.0, 0.5]]],
        [2, 1, 1],
    ),
)
_SPLIT_MISTAKES = (
    *table(
        _of,
        (lambda c, m, z: c.sum(0) - m - _sums(z, m).sum(0).log(), SAY.own_maximum),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m).sum(0).log(), SAY.own_in_sum),
        (lambda c, m, z: c.sum(0) - z.exp().sum((0, -1)).log(), SAY.no_maximum),
        (lambda c, m, z: c.sum(0) - m.sum(0) - _sums(z, m.sum(0)).sum(0).log(), SAY.summed_maximum),
        *table(
            lambda top, c, m, z: c.sum(0) - top(z) - _sums(z, top(z) + 0 * m).sum(0).log(),
            (lambda z: z.amax((0, -1)).clamp(min=0), SAY.not_below_0),
            (lambda z: z.abs().amax((0, -1)), SAY.absolute),
        ),
        (lambda c, m, z: c.sum(0) - m.amax(0) - z.exp().sum((0, -1)).log(), SAY.not_inside),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).amax(0).log(), SAY.largest_sum),
        (lambda c, m, z: (c.sum(0) - z.logsumexp(-1).logsumexp(0)) * (c != 0), SAY.owner_alone),
        (lambda c, m, z: c.sum(0).trunc() - z.logsumexp(-1).logsumexp(0), SAY.whole_logit),
        (
            lambda c, m, z: c.sum(0) - m.amax() - _sums(z, 0 * m + m.amax()).sum(0).log(),
            SAY.one_maximum,
        ),
        *each(
            SAY.probability,
            lambda of, c, m, z: of(c, z.logsumexp(-1).logsumexp(0), m.amax(0)).log(),
            lambda c, whole, top: (c.sum(0) - whole).exp(),
            lambda c, whole, top: ((c - whole).exp() * (c != 0)).sum(0),
            lambda c, whole, top: ((c - top).exp() * (c != 0)).sum(0) / (whole - top).exp(),
        ),
        (lambda c, m, z: c.sum(0) - _sums(z, m.amax(0)).sum(0).log(), SAY.not_put_back),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).log(), SAY.own_sum),
        (lambda c, m, z: c.sum(0) - z.logsumexp(-1), SAY.own_sum),
        (lambda c, m, z: ((c - z.logsumexp(-1)) * (c != 0)).sum(0), SAY.own_softmax),
        (lambda c, m, z: (c - z.logsumexp(-1)) * (c != 0), SAY.own_softmax),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).mean(0).log(), SAY.mean_sum),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).sum(0), SAY.no_logarithm),
        (lambda c, m, z: c - m.amax(0) - _sums(z, m.amax(0)).sum(0).log(), SAY.not_shared),
        (lambda c, m, z: c.amax(0) - m.amax(0) - _sums(z, m.amax(0)).sum(0).log(), SAY.by_maximum),
        (
            lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).log().sum(0),
            SAY.sum_of_logarithms,
        ),
        (lambda c, m, z: c.sum(0) - z.logsumexp(-1).sum(0), SAY.sum_of_logarithms),
        (
            lambda c, m, z: (c - m.amax(0)).sum(0) - _sums(z, m.amax(0)).sum(0).log(),
            SAY.maximum_each,
        ),
        (
            lambda c, m, z: (c - _sums(z, m.amax(0)).sum(0).log()).sum(0) - m.amax(0),
            SAY.logarithm_each,
        ),
        (
            lambda c, m, z: (c - m.amax(0) - _sums(z, m.amax(0)).sum(0).log()).sum(0),
            SAY.formula_summed,
        ),
        (
            lambda c, m, z: c.sum(0) + m.amax(0) - _sums(z, m.amax(0)).sum(0).log(),
            SAY.maximum_added,
        ),
        (lambda c, m, z: c.sum(0) - m.amax(0), SAY.maximum_alone),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).sum().log(), SAY.over_tokens),
        (
            lambda c, m, z: c.sum(0) - m.amax(0) - (_sums(z, m.amax(0)).sum(0) / z.shape[-1]).log(),
            SAY.mean_columns,
        ),
        (lambda c, m, z: -torch.inf + 0 * c, SAY.minus_infinity),
        (
            lambda c, m, z: c.mean(0) - m.amax(0) - _sums(z, m.amax(0)).sum(0).log(),
            SAY.averaged_logit,
        ),
        (
            lambda c, m, z: c.masked_fill(c == 0, -torch.inf) - z.logsumexp(-1).logsumexp(0),
            SAY.log_of_zero,
        ),
        (
            lambda c, m, z: ((c - z.logsumexp(-1).logsumexp(0)).exp() * (c != 0)).log(),
            SAY.log_of_zero,
        ),
        (lambda c, m, z: m.amax(0) + _sums(z, m.amax(0)).sum(0).log(), SAY.sum_alone),
        (lambda c, m, z: m.amax(0) + _sums(z, m.amax(0)).sum(0).log() - c.sum(0), SAY.turned_round),
    ),
    *table(
        _found,
        (lambda i, width: (i > 0) & (i < width), SAY.first_missing),
        (lambda i, width: (i >= 0) & (i < width - 1), SAY.last_missing),
        (lambda i, width: (i >= 0) & (i <= width), SAY.beyond),
        (lambda i, width: i >= 0, SAY.no_upper),
        (lambda i, width: i < width, SAY.no_lower),
    ),
    *table(
        _started,
        (lambda tokens, first: tokens, SAY.first_unused),
        (lambda tokens, first: tokens + first, SAY.first_added),
    ),
    *table(
        _looked_up,
        ((lambda first, width: first, lambda t, first: t), SAY.wrong_column),
        ((lambda first, width: first * width, torch.sub), SAY.rank_number),
        ((lambda first, width: first + 1, torch.sub), SAY.off_by_one),
        ((lambda first, width: first - 1, torch.sub), SAY.off_by_one),
    ),
    *table(
        _everywhere,
        (lambda t, first, width: (t - first).clamp(0, width - 1), SAY.every_rank),
        (lambda t, first, width: t % width, SAY.modulo),
    ),
)


def _some_tokens(results: Sequence) -> str:
    """The first token that the result is wrong for, if it is right for others in some case."""
    pairs = zip(_SPLIT_CASES, results, strict=True)
    off = [(c, ~torch.isclose(r, split_logprobs(*c), 1e-4, 1e-5).all(0)) for c, r in pairs]
    for (logits, tokens), wrong in off:
        if wrong.any() and not all(w.all() for _, w in off):
            place = int(wrong.int().argmax())
            rank, column = divmod(int(tokens[place]), logits.shape[-1])
            logit, top = logits[rank, place, column], logits[:, place].max()
            return SAY.some_tokens.format(int(tokens[place]), rank, logit.item(), top.item())
    return ""


SPLIT = Exercise(
    "split_logprobs",
    split_logprobs,
    _SPLIT_CASES,
    _SPLIT_MISTAKES,
    tested="two and three ranks, tokens on each, logits of 200 and -3",
    shape_hint="Rows are ranks: each returns one number for each token.",
    general=_some_tokens,
    rows_mix=SAY.one_rank,
)


# --- lesson 10: bytes ------------------------------------------------------------------------


def rank_bytes(parameters: int, world_size: int, stage: int) -> float:
    """What a rank holds under ZeRO; `memory.parallel_table` has stages 0, 2 and 3."""
    return _held(parameters, world_size, stage)


def sent_bytes(weights: int, world_size: int, stage: int) -> float:
    """What a rank sends in a step under ZeRO, of weights of so many bytes in all."""
    return _passes(weights, world_size, 3 if stage == 3 else 2)


def check_rank_bytes(fn: Callable[[int, int, int], float]) -> None:
    """Check the learner's `rank_bytes(parameters, world_size, stage)`.

    Args:
        fn: returns a number of bytes.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_rank_bytes(rank_bytes)
        rank_bytes: correct. Tested: stages 0 to 3, two, four and eight ranks.
    """
    check(HELD, fn)


def check_sent_bytes(fn: Callable[[int, int, int], float]) -> None:
    """Check the learner's `sent_bytes(weights, world_size, stage)`.

    Args:
        fn: returns a number of bytes.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_sent_bytes(sent_bytes)
        sent_bytes: correct. Tested: stages 0 to 3, two, four and eight ranks.
    """
    check(SENT, fn)


NEVER = 4  # a stage that there is not
USUAL = (2, 2, 12)  # bytes of weights, gradients, optimizer
STAGES = (3, 2, 1)  # from which on each of them is cut


def _held(n: int, ranks: int, stage: int, stages: tuple = STAGES, each: tuple = USUAL) -> float:
    cut = (
        size / (ranks if stage >= since else 1) for size, since in zip(each, stages, strict=True)
    )
    return n * sum(cut)


def _passes(weights: int, ranks: int, count: float) -> float:
    return count * weights * (ranks - 1) / ranks


def _held_by(stages: tuple, n: int, ranks: int, stage: int) -> float:
    return _held(n, ranks, stage, stages)


def _held_each(each: tuple, n: int, ranks: int, stage: int) -> float:
    return _held(n, ranks, stage, each=each)


def _sent_by(how: Callable, weights: int, ranks: int, stage: int) -> float:
    """Made of the number of passes, the whole and the ranks."""
    return how(3 if stage == 3 else 2, weights, ranks)


def _counted(passes: Callable, weights: int, ranks: int, stage: int) -> float:
    """With another number of passes for some stage."""
    return _passes(weights, ranks, passes(stage, ranks))


_HELD_CASES = tuple((n, w, s) for n, w in ((800, 4), (1000, 2), (16, 8)) for s in range(4))
_HELD_MISTAKES = (
    *table(
        _held_by,
        ((3, 2, NEVER), SAY.optimizer_whole),
        ((3, NEVER, 1), SAY.gradients_whole),
        ((3, 1, 1), SAY.gradients_early),
        ((NEVER, 2, 1), SAY.weights_whole),
        ((2, 2, 1), SAY.weights_early),
        ((0, 0, 0), SAY.all_cut),
        ((NEVER, NEVER, NEVER), SAY.nothing_cut),
        ((1, 1, 1), SAY.of_stage_3),
    ),
    *table(
        _held_each,
        ((2, 2, 8), SAY.no_copy),
        ((2, 0, 12), SAY.no_gradients),
        ((0, 2, 12), SAY.no_weights),
        ((4, 4, 12), SAY.float_weights),
        ((4, 4, 8), SAY.float_weights),
    ),
    (lambda n, ranks, stage: _held(1, ranks, stage), SAY.one_parameter),
    (lambda n, ranks, stage: ranks * _held(n, ranks, stage), SAY.all_together),
    (lambda n, ranks, stage: _held(n, ranks / (ranks - 1), stage), SAY.other_parts),
    (lambda n, ranks, stage: _held(n, ranks + 1, stage), SAY.cut_by_more),
    (lambda n, ranks, stage: _held(n, ranks - 1, stage), SAY.cut_by_less),
)
_SENT_CASES = tuple((n, w, s) for n, w in ((800, 4), (1000, 2), (16, 8)) for s in range(4))
_SENT_MISTAKES = (
    *table(
        _sent_by,
        (lambda passes, n, ranks: passes * n, SAY.whole_sent),
        (lambda passes, n, ranks: passes * n * (ranks - 1), SAY.to_each),
        (lambda passes, n, ranks: passes * n / ranks, SAY.part_sent),
        (lambda passes, n, ranks: passes * n * ranks / (ranks - 1), SAY.upside_down),
        (lambda passes, n, ranks: passes * n * (ranks + 1) / ranks, SAY.one_more),
        (lambda passes, n, ranks: passes * n * math.log2(ranks), SAY.tree),
        (lambda passes, n, ranks: 2 * passes * n * (ranks - 1) / ranks, SAY.twice),
        (lambda passes, n, ranks: passes * n * 3 / 4, SAY.hard_coded),
        (lambda passes, n, ranks: passes * (ranks - 1) / ranks, SAY.without_weights),
    ),
    *table(
        _counted,
        (lambda stage, ranks: 3 if stage == 3 else 1, SAY.one_pass),
        (lambda stage, ranks: 2 if stage == 3 else 1, SAY.one_pass),
        (lambda stage, ranks: 2, SAY.as_others),
        (lambda stage, ranks: 4 if stage == 3 else 2, SAY.four_passes),
        (lambda stage, ranks: (2, 2, 1, 3)[stage], SAY.less_in_2),
        (lambda stage, ranks: (2, 1, 1, 3)[stage], SAY.less_in_1_and_2),
        (lambda stage, ranks: 3 / ranks if stage == 3 else 2, SAY.cut_again),
    ),
)


def _by_stage(right: Callable, cases: Sequence[tuple], results: Sequence) -> list[list[tuple]]:
    """Result, number and ranks of each stage's cases; [] if all are off by one factor."""
    stages = [[], [], [], []]
    for (n, ranks, stage), got in zip(cases, results, strict=True):
        stages[stage].append((float(got), n, ranks))
    factors = [float(got) / right(*case) for case, got in zip(cases, results, strict=True)]
    return [] if all(math.isclose(x, factors[0], rel_tol=1e-6) for x in factors) else stages


def _right_stages(right: Callable, stages: list[list[tuple]]) -> str:
    """In which stages it is right, if in some of them."""
    good, bad = [], []
    for stage, rows in enumerate(stages):
        ok = all(same(got, float(right(n, ranks, stage))) for got, n, ranks in rows)
        (good if ok else bad).append(f"stage {stage}")
    return SAY.stages.format(*map(" and ".join, (good, bad))) if good and bad else ""


def _held_otherwise(results: Sequence) -> str:
    """The stages in which other bytes of a parameter are whole, or cut, than should be."""
    found, stages = [], _by_stage(rank_bytes, _HELD_CASES, results)
    for stage, rows in enumerate(stages):
        each = [(got / n, ranks) for got, n, ranks in rows]
        (a, v), (b, w), _ = each
        cut = (a - b) / (1 / v - 1 / w)
        whole = a - cut / v
        if not all(math.isclose(x, whole + cut / ranks, rel_tol=1e-6) for x, ranks in each):
            return _right_stages(rank_bytes, stages)
        kept = sum(size for size, since in zip(USUAL, STAGES, strict=True) if stage < since)
        if abs(whole - kept) + abs(cut - 16 + kept) > 1e-3:
            counts = " and ".join(f"{round(x, 2) + 0.0:.4g}" for x in (whole, cut))
            found.append(f"stage {stage} has {counts}, not {kept} and {16 - kept}")
    return SAY.bytes_counted.format("; ".join(found)) if found else ""


def _sent_otherwise(results: Sequence) -> str:
    """The stages with another number of passes."""
    found, stages = [], _by_stage(sent_bytes, _SENT_CASES, results)
    for stage, rows in enumerate(stages):
        passes = [got / _passes(n, ranks, 1) for got, n, ranks in rows]
        if not all(math.isclose(x, passes[0], rel_tol=1e-6) for x in passes):
            return _right_stages(sent_bytes, stages)
        if abs(passes[0] - (want := 3 if stage == 3 else 2)) > 1e-3:
            found.append(f"stage {stage} has {round(passes[0], 2) + 0.0:.4g}, not {want}")
    return SAY.passes_counted.format("; ".join(found)) if found else ""


def _rest_fault(fn: Callable) -> str:
    return fault_at(HELD, fn, (1001, 2, 3), SAY.drops_a_rest)


def _rest_or_alone_fault(fn: Callable) -> str:
    dropped = fault_at(SENT, fn, (1001, 2, 0), SAY.drops_a_rest)
    return dropped or fault_at(SENT, fn, (800, 1, 0), SAY.alone)


HELD = Exercise(
    "rank_bytes",
    rank_bytes,
    _HELD_CASES,
    _HELD_MISTAKES,
    tested="stages 0 to 3, two, four and eight ranks",
    further=_rest_fault,
    general=_held_otherwise,
)
SENT = Exercise(
    "sent_bytes",
    sent_bytes,
    _SENT_CASES,
    _SENT_MISTAKES,
    tested="stages 0 to 3, two, four and eight ranks",
    further=_rest_or_alone_fault,
    general=_sent_otherwise,
)
