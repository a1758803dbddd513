"""The checks of lesson 10: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them: for one rank.
"""

import math
import time

import pytest
import torch
from helpers_checks import UNNAMED, Rules, run

from rlhf_helpers import checks
from rlhf_helpers.checks import lesson_10

NAMES = ("whiten_over_ranks", "split_logprobs", "rank_bytes", "sent_bytes")


# --- whitening ---


def over(mean, variance):
    """With these, each of x and what `all_sum` gives."""

    def whitened(x, mask, all_sum):
        real = x[mask == 1]
        m = mean(real, all_sum)
        v = variance(real, m, all_sum)
        return (x - m) / (v + 1e-8) ** 0.5 * mask

    return whitened


def mean_of_all(real, all_sum):
    return all_sum(real.sum()) / all_sum(len(real))


def variance_of_all(real, mean, all_sum):
    return all_sum(((real - mean) ** 2).sum()) / (all_sum(len(real)) - 1)


def ranks_of(all_sum):
    return all_sum(1)


def from_both(make):
    """Something else made of the right mean and variance."""

    def whitened(x, mask, all_sum):
        real = x[mask == 1]
        mean = mean_of_all(real, all_sum)
        return make(x, mask, mean, variance_of_all(real, mean, all_sum))

    return whitened


def with_padding(x, mask, all_sum):
    return over(mean_of_all, variance_of_all)(x, torch.ones_like(mask), all_sum)


def with_zeros(x, mask, all_sum):
    return over(mean_of_all, variance_of_all)(x * mask, torch.ones_like(mask), all_sum) * mask


def sums(in_mean, in_squares, in_count):
    """With the padding in some of the sums."""

    def whitened(x, mask, all_sum):
        n = all_sum(len(x) if in_count else mask.sum())
        mean = all_sum((x if in_mean else x * mask).sum()) / n
        squares = (x - mean) ** 2
        variance = all_sum((squares if in_squares else squares * mask).sum()) / (n - 1)
        return (x - mean) / (variance + 1e-8) ** 0.5 * mask

    return whitened


def zero_squares(x, mask, all_sum):
    """The padding is 0 before the mean is taken off, and not after."""
    x = x * mask
    mean = all_sum(x.sum()) / all_sum(mask.sum())
    variance = all_sum(((x - mean) ** 2).sum()) / (all_sum(mask.sum()) - 1)
    return (x - mean) / (variance + 1e-8) ** 0.5 * mask


def place_by_place(x, mask, all_sum):
    """Whole tensors go into the sums."""
    n = all_sum(mask)
    mean = all_sum(x * mask) / n
    variance = all_sum(((x - mean) * mask) ** 2) / (n - 1)
    return (x - mean) * mask / (variance + 1e-8) ** 0.5


def merged(x, mask, all_sum):
    """Each rank's own squares, and how far its mean is from that of all."""
    real = x[mask == 1]
    mean = mean_of_all(real, all_sum)
    squares = ((real - real.mean()) ** 2).sum() + len(real) * (real.mean() - mean) ** 2
    variance = all_sum(squares) / (all_sum(len(real)) - 1)
    return (x - mean) / (variance + 1e-8) ** 0.5 * mask


def one_pass(x, mask, all_sum):
    """Squares less the square of the mean."""
    real = x[mask == 1]
    n, total, squares = all_sum(
        torch.stack([real.numel() + 0 * real.sum(), real.sum(), (real**2).sum()])
    )
    mean = total / n
    variance = (squares - n * mean**2) / (n - 1)
    return (x - mean) / (variance + 1e-8) ** 0.5 * mask


BOTH = "mean and spread are "
WHITEN_MISTAKES = [
    (BOTH + "those of each rank", over(lambda r, s: r.mean(), lambda r, m, s: r.var())),
    (
        BOTH + "made from a mean of the ranks' means",
        over(lambda r, s: s(r.mean()) / ranks_of(s), variance_of_all),
    ),
    (
        BOTH + "made from a mean of the ranks' means",
        over(lambda r, s: s(r.mean()) / 2, variance_of_all),
    ),
    (
        BOTH + "not both over all: the variance is a mean",
        over(mean_of_all, lambda r, m, s: s(r.var() * len(r)) / s(len(r))),
    ),
    (
        BOTH + "not both over all: the standard deviation is a mean",
        over(
            mean_of_all,
            lambda r, m, s: (s((((r - m) ** 2).sum() / (len(r) - 1)) ** 0.5) / ranks_of(s)) ** 2,
        ),
    ),
    (
        BOTH + "not both over all: a sum of this rank's entries",
        over(lambda r, s: r.sum() / s(len(r)), variance_of_all),
    ),
    (
        BOTH + "not both over all: a sum of this rank's entries",
        over(
            lambda r, s: r.sum() / s(len(r)),
            lambda r, m, s: ((r - m) ** 2).sum() / (s(len(r)) - 1),
        ),
    ),
    (
        BOTH + "not both over all: a sum of this rank's entries",
        over(mean_of_all, lambda r, m, s: ((r - m) ** 2).sum() / (s(len(r)) - 1)),
    ),
    (
        BOTH + "not both over all: the variance is a mean",
        over(mean_of_all, lambda r, m, s: s(r.var()) / ranks_of(s)),
    ),
    (
        BOTH + "not both over all: the standard deviation is a mean",
        over(mean_of_all, lambda r, m, s: (s(r.std()) / ranks_of(s)) ** 2),
    ),
    (
        BOTH + "not both over all: the standard deviation is a mean",
        lambda x, m, s: (x - mean_of_all(x[m == 1], s)) * m / (s(x[m == 1].std()) / ranks_of(s)),
    ),
    (BOTH + "not both over all: the mean is, but", over(mean_of_all, lambda r, m, s: r.var())),
    (
        BOTH + "not both over all: the mean is, but",
        over(mean_of_all, lambda r, m, s: ((r - m) ** 2).sum() / (len(r) - 1)),
    ),
    (
        BOTH + "not both over all: the mean is, but",
        over(mean_of_all, lambda r, m, s: ((r - m) ** 2).mean()),
    ),
    (
        BOTH + "not both over all: the mean that is taken off",
        over(lambda r, s: r.mean(), variance_of_all),
    ),
    (
        BOTH + "not both over all: the mean that is taken off",
        over(lambda r, s: r.mean(), lambda r, m, s: variance_of_all(r, mean_of_all(r, s), s)),
    ),
    (
        BOTH + "not both over all: the squares are",
        over(
            mean_of_all,
            lambda r, m, s: s(((r - r.mean()) ** 2).sum()) / (s(len(r)) - 1),
        ),
    ),
    (BOTH + "over the padding too", lambda x, m, s: with_padding(x, m, s) * m),
    (BOTH + "over the padding too", with_zeros),
    (BOTH + "over the padding too in one place: it is in the sum of the mean", sums(1, 0, 0)),
    (BOTH + "over the padding too in one place: it is in the sum of the squares", sums(0, 1, 0)),
    (BOTH + "over the padding too in one place: it is in the sum of the squares", zero_squares),
    (BOTH + "over the padding too in two places", sums(1, 1, 0)),
    (BOTH + "over the padding too in one place: it is in the number", sums(0, 0, 1)),
    (
        BOTH + "over the padding too in one place: it is in the number",
        lambda x, m, s: over(lambda r, _: s((x * m).sum()) / s(len(x)), variance_of_all)(x, m, s),
    ),
    (
        BOTH + "over the padding too in one place: it is in the number",
        lambda x, m, s: over(
            mean_of_all, lambda r, mean, _: s(((r - mean) ** 2).sum()) / (s(len(x)) - 1)
        )(x, m, s),
    ),
    (
        BOTH + "made of a sum over all that is divided by the number of ranks",
        over(lambda r, s: s(r.sum()) / ranks_of(s), variance_of_all),
    ),
    (
        BOTH + "made of a sum over all that is divided by the number of ranks",
        over(
            lambda r, s: s(r.sum()) / ranks_of(s),
            lambda r, m, s: s(((r - m) ** 2).sum()) / (ranks_of(s) - 1),
        ),
    ),
    (
        BOTH + "right but for the divisor of the mean",
        over(lambda r, s: s(r.sum()) / (s(len(r)) - 1), variance_of_all),
    ),
    (
        BOTH + "those of the entries number 0 and 1",
        lambda x, m, s: over(lambda r, _: s(x[m].sum()) / s(len(r)), variance_of_all)(x, m, s),
    ),
    (
        BOTH + "those of the entries number 0 and 1",
        lambda x, m, s: (
            (x - mean_of_all(x[m], s))
            * m
            * (variance_of_all(x[m], mean_of_all(x[m], s), s) + 1e-8) ** -0.5
        ),
    ),
    (BOTH + "those of the entries at one and the same place", place_by_place),
    (
        BOTH + "made with the number of entries of one rank",
        over(
            lambda r, s: s(r.sum()) / (ranks_of(s) * len(r)),
            lambda r, m, s: s(((r - m) ** 2).sum()) / (ranks_of(s) * len(r) - 1),
        ),
    ),
    (
        BOTH + "made with the number of entries of one rank",
        over(
            lambda r, s: s(r.sum()) / (2 * len(r)),
            lambda r, m, s: s(((r - m) ** 2).sum()) / (2 * len(r) - 1),
        ),
    ),
    (
        BOTH + "sums over all ranks, divided",
        over(
            lambda r, s: s(r.sum()) / len(r),
            lambda r, m, s: s(((r - m) ** 2).sum()) / (len(r) - 1),
        ),
    ),
    (
        BOTH + "sums over all ranks, divided",
        over(mean_of_all, lambda r, m, s: s(((r - m) ** 2).sum()) / (len(r) - 1)),
    ),
    (
        BOTH + "right but for the divisor of the variance, which",
        over(mean_of_all, lambda r, m, s: s(((r - m) ** 2).sum()) / s(len(r))),
    ),
    (
        BOTH + "right but for the divisor of the variance: one",
        over(mean_of_all, lambda r, m, s: s(((r - m) ** 2).sum()) / s(len(r) - 1)),
    ),
    (
        "it is divided by the spread, but",
        from_both(lambda x, m, mean, v: x / (v + 1e-8).sqrt() * m),
    ),
    ("the mean of all is taken off, but", from_both(lambda x, m, mean, v: (x - mean) * m)),
    (
        "it is divided by the variance of all",
        from_both(lambda x, m, mean, v: (x - mean) / (v + 1e-8) * m),
    ),
    (
        "it is divided by the mean of the distances",
        over(mean_of_all, lambda r, m, s: (s((r - m).abs().sum()) / s(len(r))) ** 2),
    ),
    (
        "it is divided by the root of the mean square",
        over(mean_of_all, lambda r, m, s: s((r**2).sum()) / (s(len(r)) - 1)),
    ),
    (
        "distances from the mean are added up",
        over(mean_of_all, lambda r, m, s: s((r - m).sum()) ** 2 / (s(len(r)) - 1)),
    ),
    (
        "distances from the mean are added up",
        over(mean_of_all, lambda r, m, s: s((r - m).sum() ** 2) / (s(len(r)) - 1)),
    ),
    (
        "where the mask is 0 something",
        from_both(lambda x, m, mean, v: (x - mean) / (v + 1e-8).sqrt()),
    ),
    (
        "where all entries are equal",
        from_both(lambda x, m, mean, v: (x - mean) / v.sqrt() * m),
    ),
]
WHITEN_RIGHT = [
    lambda x, m, s: one_pass(x.double(), m, s),
    merged,
    over(mean_of_all, variance_of_all),
    from_both(lambda x, m, mean, v: ((x - mean) / (v + 1e-8).sqrt()).masked_fill(m == 0, 0)),
]


# --- a split vocabulary ---


def at(here):
    """With this test of a token's id less the first, and the number of columns."""

    def split(logits, tokens, first, all_max, all_sum):
        width = logits.shape[1]
        index = tokens - first
        own = logits[range(len(tokens)), index.clamp(0, width - 1)] * here(index, width)
        return all_sum(own) - normal(logits, all_max, all_sum)

    return split


def started(column):
    """With this column of a token, from its id and that of the first column."""

    def split(logits, tokens, first, all_max, all_sum):
        i, width = column(tokens, first), logits.shape[1]
        own = [logits[t, k] if k < width else 0.0 for t, k in enumerate(i.tolist())]
        return all_sum(torch.tensor(own)) - normal(logits, all_max, all_sum)

    return split


def looked_up(start, column):
    """With another id of the first column, or another column of a token that is here."""

    def split(logits, tokens, first, all_max, all_sum):
        width, first = logits.shape[1], start(first, logits.shape[1])
        here = (tokens >= first) & (tokens < first + width)
        index = column(tokens, first).clamp(0, width - 1)
        own = logits[range(len(tokens)), index].masked_fill(~here, 0)
        return all_sum(own) - normal(logits, all_max, all_sum)

    return split


def one_maximum(z, own, here, all_max, all_sum):
    top = all_max(z.max())
    return all_sum(own) - top - all_sum((z - top).exp().sum(1)).log()


def sum_of_logs(z, own, here, all_max, all_sum):
    top = all_max(z.max(1).values)
    return all_sum(own) - top - all_sum((z - top[:, None]).exp().sum(1).log())


def maximum_each(z, own, here, all_max, all_sum):
    top = all_max(z.max(1).values)
    return all_sum(own - top) - all_sum((z - top[:, None]).exp().sum(1)).log()


def logprobs(make):
    """Made of the own columns, the logit of the token if it is here, and the messages."""

    def split(logits, tokens, first, all_max, all_sum):
        ids = torch.arange(first, first + logits.shape[1])
        here = ids == tokens[:, None]
        own = torch.where(here, logits, 0.0).sum(1)
        return make(logits, own, here.any(1), all_max, all_sum)

    return split


def normal(logits, all_max, all_sum):
    """The logarithm of the sum over the whole vocabulary."""
    top = all_max(logits.max(1).values)
    return top + all_sum((logits - top[:, None]).exp().sum(1)).log()


def right_split(z, own, here, all_max, all_sum):
    return all_sum(own) - normal(z, all_max, all_sum)


def own_maximum(z, own, here, all_max, all_sum):
    top = z.max(1).values
    return all_sum(own) - top - all_sum((z - top[:, None]).exp().sum(1)).log()


def own_in_sum(z, own, here, all_max, all_sum):
    top = z.max(1).values
    total = all_sum((z - top[:, None]).exp().sum(1))
    return all_sum(own) - all_max(top) - total.log()


def summed_maximum(z, own, here, all_max, all_sum):
    top = all_sum(z.max(1).values)
    return all_sum(own) - top - all_sum((z - top[:, None]).exp().sum(1)).log()


def below(top_of):
    """With another maximum."""

    def split(z, own, here, all_max, all_sum):
        top = top_of(z, all_max)
        return all_sum(own) - top - all_sum((z - top[:, None]).exp().sum(1)).log()

    return logprobs(split)


def shifted(make):
    """With the sum of exponentials below the right maximum."""

    def split(z, own, here, all_max, all_sum):
        top = all_max(z.max(1).values)
        return make((z - top[:, None]).exp().sum(1), top, all_sum(own), all_sum)

    return logprobs(split)


def every_rank(logits, tokens, first, all_max, all_sum):
    column = (tokens - first).clamp(0, logits.shape[1] - 1)
    own = logits[range(len(tokens)), column]
    return all_sum(own) - normal(logits, all_max, all_sum)


def modulo(logits, tokens, first, all_max, all_sum):
    own = logits[range(len(tokens)), tokens % logits.shape[1]]
    return all_sum(own) - normal(logits, all_max, all_sum)


TOP = "the maximum that is taken off is "
BOUNDS = "whether a token is among a rank's columns is asked wrongly: "
SPLIT_MISTAKES = [
    (TOP + "each rank's own, in the sum", logprobs(own_maximum)),
    (TOP + "each rank's own in the sum", logprobs(own_in_sum)),
    (TOP + "missing", logprobs(lambda z, own, h, m, s: s(own) - s(z.exp().sum(1)).log())),
    (TOP + "the sum of the ranks' maxima", logprobs(summed_maximum)),
    (TOP + "held at 0 or more", below(lambda z, m: m(z.amax(1).clamp(min=0)))),
    (TOP + "the largest without its sign", below(lambda z, m: m(z.abs().amax(1)))),
    (
        "the shared maximum is taken off from the logit, but not",
        logprobs(lambda z, own, h, m, s: s(own) - m(z.amax(1)) - s(z.exp().sum(1)).log()),
    ),
    (
        "the largest of the ranks' sums",
        logprobs(lambda z, own, h, m, s: s(own) - m(z.logsumexp(1))),
    ),
    (
        "the rank that has the token has the right result",
        logprobs(lambda z, own, here, m, s: torch.where(here, own - normal(z, m, s), 0.0)),
    ),
    (
        "the token's logit has lost its fraction",
        logprobs(lambda z, own, here, m, s: s(own.long()) - normal(z, m, s)),
    ),
    ("a rank's columns are taken to begin", looked_up(lambda f, n: f + 1, torch.sub)),
    ("a rank's columns are taken to begin", looked_up(lambda f, n: f - 1, torch.sub)),
    ("the shared maximum is taken off inside", shifted(lambda e, top, c, s: c - s(e).log())),
    (
        "the sum of exponentials is each rank's own",
        shifted(lambda e, top, c, s: c - top - e.log()),
    ),
    (
        "each rank takes a log-softmax of its own",
        logprobs(lambda z, own, here, m, s: s((own - z.logsumexp(1)) * here)),
    ),
    (
        "each rank takes a log-softmax of its own",
        logprobs(lambda z, own, here, m, s: (own - z.logsumexp(1)) * here),
    ),
    (
        "the sum of exponentials is averaged",
        shifted(lambda e, top, c, s: c - top - (s(e) / s(1)).log()),
    ),
    ("the sum of exponentials is taken off", shifted(lambda e, top, c, s: c - top - s(e))),
    ("the logit of the token is counted on every rank: those", every_rank),
    ("the logit of the token is counted on every rank, at", modulo),
    (
        "the logit of the token is known on the rank",
        logprobs(lambda z, own, here, m, s: own - normal(z, m, s)),
    ),
    (BOUNDS + "the first of them is left out", at(lambda i, n: (i > 0) & (i < n))),
    (BOUNDS + "the last of them is left out", at(lambda i, n: (i >= 0) & (i < n - 1))),
    (BOUNDS + "the id behind the last", at(lambda i, n: (i >= 0) & (i <= n))),
    (BOUNDS + "every id behind the last", at(lambda i, n: i >= 0)),
    (BOUNDS + "every id before the first", at(lambda i, n: i < n)),
    (
        "the logit of the token is brought to all by a maximum",
        logprobs(lambda z, own, here, m, s: m(own) - normal(z, m, s)),
    ),
    (
        "the shared maximum is added at the end",
        shifted(lambda e, top, c, s: c + top - s(e).log()),
    ),
    ("the largest logit stands", logprobs(lambda z, own, here, m, s: s(own) - m(z.max(1).values))),
    (
        "the sum of exponentials runs over the tokens",
        shifted(lambda e, top, c, s: c - top - s(e.sum()).log()),
    ),
    (
        "exponentials are averaged over a rank's columns",
        logprobs(lambda z, own, here, m, s: s(own) - normal(z, m, s) + math.log(z.shape[1])),
    ),
    (
        "ranks that lack the token's logit bring minus",
        logprobs(
            lambda z, own, here, m, s: s(own.masked_fill(~here, -torch.inf)) - normal(z, m, s)
        ),
    ),
    (
        "the logit of the token is averaged",
        logprobs(lambda z, own, here, m, s: s(own) / s(1) - normal(z, m, s)),
    ),
    (
        "a rank that lacks the token takes the logarithm of 0",
        logprobs(lambda z, own, here, m, s: ((own - normal(z, m, s)).exp() * here).log()),
    ),
    (
        "a rank that lacks the token takes the logarithm of 0",
        logprobs(lambda z, own, here, m, s: torch.where(here, own - normal(z, m, s), -torch.inf)),
    ),
    ("the maximum is one for all tokens", logprobs(one_maximum)),
    (
        "a probability or its inverse is formed",
        shifted(lambda e, top, c, s: ((c - top).exp() / s(e)).log()),
    ),
    (
        "a probability or its inverse is formed",
        logprobs(lambda z, own, here, m, s: s((own - normal(z, m, s)).exp() * here).log()),
    ),
    ("the rank that has the token reads", looked_up(lambda f, n: f, lambda t, f: t)),
    ("the id of the first column is taken for", looked_up(lambda f, n: f * n, torch.sub)),
    (
        "the logarithm of the sum is taken off once",
        shifted(lambda e, top, c, s: c - top - s(1) * s(e).log()),
    ),
    ("a rank looks for the token's id", started(lambda tokens, first: tokens)),
    ("the id of the first column is added", started(lambda tokens, first: tokens + first)),
    ("logarithms are added up over the ranks", logprobs(sum_of_logs)),
    (
        "logarithms are added up over the ranks",
        logprobs(lambda z, own, here, m, s: s(own) - s(z.logsumexp(1))),
    ),
    ("the maximum is taken off once for each rank", logprobs(maximum_each)),
    (
        "the whole result is summed over the ranks",
        logprobs(lambda z, own, here, m, s: s(own - normal(z, m, s))),
    ),
    (
        "it is the logarithm of the sum",
        logprobs(lambda z, own, here, m, s: normal(z, m, s)),
    ),
    (
        "every sign is the wrong way round",
        logprobs(lambda z, own, here, m, s: normal(z, m, s) - s(own)),
    ),
]
SPLIT_RIGHT = [
    logprobs(right_split),
    shifted(lambda e, top, c, s: c - (top + s(e).log())),
    at(lambda i, n: (i >= 0) & (i < n)),
    logprobs(lambda z, own, here, m, s: m(own.masked_fill(~here, -torch.inf)) - normal(z, m, s)),
]


# --- bytes ---


def held(weights, gradients, optimizer):
    """Bytes of each for a parameter, from the stage and the number of ranks."""
    return lambda n, w, stage: n * (weights(w, stage) + gradients(w, stage) + optimizer(w, stage))


def cut(size, since):
    return lambda ranks, stage: size / ranks if stage >= since else size


def whole(size):
    return lambda ranks, stage: size


HELD_MISTAKES = [
    ("the optimizer is whole", held(cut(2, 3), cut(2, 2), whole(12))),
    ("the gradients are never", held(cut(2, 3), whole(2), cut(12, 1))),
    ("the gradients are cut in stage 1", held(cut(2, 3), cut(2, 1), cut(12, 1))),
    ("in stage 3 the weights are whole still", held(whole(2), cut(2, 2), cut(12, 1))),
    (
        "in stage 3 the weights are whole still",
        held(cut(2, 3), lambda w, stage: 2 / w if stage == 2 else 2, cut(12, 1)),
    ),
    ("what is cut is divided by one less", lambda n, w, s: right_held(n, w - 1, s)),
    ("the weights are cut in stage 2", held(cut(2, 2), cut(2, 2), cut(12, 1))),
    ("everything is cut", lambda n, ranks, stage: 16 * n / ranks),
    ("nothing is cut", lambda n, ranks, stage: 16 * n),
    ("any stage above 0", lambda n, ranks, stage: 16 * n / (ranks if stage else 1)),
    ("the optimizer has 8 bytes", held(cut(2, 3), cut(2, 2), cut(8, 1))),
    ("it is what one parameter takes", lambda n, w, s: right_held(1, w, s)),
    ("the gradients are left out", held(cut(2, 3), whole(0), cut(12, 1))),
    ("the weights themselves are left", held(whole(0), cut(2, 2), cut(12, 1))),
    ("it is what all ranks together hold", lambda n, w, s: w * right_held(n, w, s)),
    ("a rank holds all parts but its own", lambda n, w, s: right_held(n, w / (w - 1), s)),
    ("what is cut is divided by one more", lambda n, w, s: right_held(n, w + 1, s)),
    ("weights and gradients are counted with 4", held(cut(4, 3), cut(4, 2), cut(12, 1))),
]
right_held = held(cut(2, 3), cut(2, 2), cut(12, 1))
HELD_RIGHT = [right_held, lesson_10.rank_bytes]

SENT_MISTAKES = [
    ("a whole is counted for each", lambda x, w, s: (3 if s == 3 else 2) * x),
    ("the whole is counted for each of", lambda x, w, s: (3 if s == 3 else 2) * x * (w - 1)),
    ("one part is counted", lambda x, w, s: (3 if s == 3 else 2) * x / w),
    ("an all-reduce is one pass", lambda x, w, s: (3 if s == 3 else 1) * x * (w - 1) / w),
    ("stage 3 is counted as the others", lambda x, w, s: 2 * x * (w - 1) / w),
    ("stage 3 has four passes", lambda x, w, s: (4 if s == 3 else 2) * x * (w - 1) / w),
    ("in stage 2 the new weights", lambda x, w, s: (2, 2, 1, 3)[s] * x * (w - 1) / w),
    ("in stages 1 and 2 the new", lambda x, w, s: (2, 1, 1, 3)[s] * x * (w - 1) / w),
    ("everything is counted twice", lambda x, w, s: 2 * (3 if s == 3 else 2) * x * (w - 1) / w),
    ("the fraction is upside down", lambda x, w, s: (3 if s == 3 else 2) * x * w / (w - 1)),
    (
        "a whole is counted for each round of a tree",
        lambda x, w, s: (2 + (s == 3)) * x * math.log2(w),
    ),
    ("3/4 of the whole is counted", lambda x, w, s: (2 + (s == 3)) * x * 0.75),
    ("passes alone are counted", lambda x, w, s: (2 + (s == 3)) * (w - 1) / w),
    ("W + 1 stands where", lambda x, w, s: (2 + (s == 3)) * x * (w + 1) / w),
    (
        "stage 3 is divided by the number",
        lambda x, w, s: (3 * x / w if s == 3 else 2 * x) * (w - 1) / w,
    ),
]
SENT_RIGHT = [
    lesson_10.sent_bytes,
    lambda x, w, s: (2 + (s == 3)) * (x - x / w),
]

MISTAKES = [
    (name, answer, message)
    for name, rows in zip(
        NAMES, (WHITEN_MISTAKES, SPLIT_MISTAKES, HELD_MISTAKES, SENT_MISTAKES), strict=True
    )
    for message, answer in rows
]
RIGHT = [
    (name, answer)
    for name, rows in zip(NAMES, (WHITEN_RIGHT, SPLIT_RIGHT, HELD_RIGHT, SENT_RIGHT), strict=True)
    for answer in rows
]


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        (
            "rank_bytes",
            held(cut(2, 4), cut(2, 3), cut(12, 2)),  # each a stage too late
            "the ranks: stage 1 has 16 and 0, not 4 and 12; stage 2 has 4 and 12, not 2 and 14; "
            "stage 3 has 2 and 14, not 0 and 16.",
        ),
        (
            "rank_bytes",
            held(cut(2, 3), cut(4, 2), cut(12, 1)),
            "the ranks: stage 0 has 18 and 0, not 16 and 0; stage 1 has 6 and 12, not 4 and 12",
        ),
        (
            "sent_bytes",
            lambda x, w, s: (2, 3, 3, 3)[s] * x * (w - 1) / w,
            "of the whole: stage 1 has 3, not 2; stage 2 has 3, not 2.",
        ),
        (
            "sent_bytes",
            lambda x, w, s: (0, 2, 2, 3)[s] * x * (w - 1) / w,
            "of the whole: stage 0 has 0, not 2.",
        ),
    ],
)
def test_where_it_counts_otherwise_is_named(name, answer, message, capsys):
    printed = run(name, answer, capsys)
    assert printed.startswith(f"{name}: it counts otherwise than the exercise.")
    assert message in printed


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("rank_bytes", lambda n, w, s: right_held(n, w, s) / 1e9, "times 1e-09 everywhere"),
        (
            "rank_bytes",
            lambda n, w, s: right_held(n, w, s) + (s == 1) * w,
            "it is right in stage 0 and stage 2 and stage 3, but not in stage 1.",
        ),
        (
            "sent_bytes",
            lambda x, w, s: 2 * x * (w - 1) / w + (x if s == 3 else 0),
            "it is right in stage 0 and stage 1 and stage 2, but not in stage 3.",
        ),
        ("rank_bytes", lambda n, w, s: right_held(n, w, s) * w**2, UNNAMED),
        ("sent_bytes", lambda x, w, s: (2 + (s == 3)) * x, "a whole is counted for each pass"),
        ("sent_bytes", lambda x, w, s: x * w + s, UNNAMED),
    ],
)
def test_other_wrong_bytes_are_not_forced_into_stages(name, answer, message, capsys):
    assert message in run(name, answer, capsys)


def test_a_variance_that_is_lost_in_rounding_is_named(capsys):
    """Right in float64, which the right answers have as well."""
    printed = run("whiten_over_ranks", one_pass, capsys)
    assert printed.startswith("whiten_over_ranks: it is right on small numbers, but not for")


@pytest.mark.parametrize(
    ("divisor", "message", "x"),
    [
        (lambda v: (v + 1e-4).sqrt(), "it is 1e-8, and no more", "[[0.0100, 0.0200, 0.0300]"),
        (lambda v: v.sqrt() + 1e-8, "before the root is taken", "[[1.0000e-04, 2.0000e-04, 3.0"),
        (lambda v: v.clamp(min=1e-8).sqrt(), "before the root is taken", "[[1.0000e-04, 2.0000e-"),
    ],
)
def test_another_epsilon_is_named(divisor, message, x, capsys):
    other = from_both(lambda x, m, mean, v: (x - mean) / divisor(v) * m)
    printed = run("whiten_over_ranks", other, capsys)
    assert printed.startswith("whiten_over_ranks: it is right on large spreads, but not where")
    assert message in printed and x in printed


def test_a_rank_with_one_entry_is_a_case(capsys):
    def squares(real, mean, all_sum):
        within = real.var() if len(real) > 1 else torch.tensor(torch.nan)
        between = len(real) * (real.mean() - mean) ** 2
        return all_sum(within * (len(real) - 1) + between) / (all_sum(len(real)) - 1)

    printed = run("whiten_over_ranks", over(mean_of_all, squares), capsys)
    assert printed.startswith("whiten_over_ranks: it is right but where a rank has one entry")
    assert "nan" in printed


def test_the_first_wrong_token_is_shown(capsys):
    """As where rank 0 asks rightly whether a token is its own, and all others as on two ranks."""

    def two_ranks(logits, tokens, first, all_max, all_sum):
        n = logits.shape[1]
        own = tokens < n if first == 0 else tokens >= n
        brought = torch.where(own, logits[range(len(tokens)), (tokens - first).clamp(0, n - 1)], 0)
        return all_sum(brought) - normal(logits, all_max, all_sum)

    printed = run("split_logprobs", two_ranks, capsys)
    assert printed.startswith("split_logprobs: it is right for some tokens, but not for all.")
    assert "has the id 5 and, on rank 2, a logit of 4; the largest of its row is 4." in printed


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        (
            "rank_bytes",
            lambda n, w, s: right_held(n // w * w, w, s),
            "parts are equal, but not for",
        ),
        (
            "sent_bytes",
            lambda x, w, s: (2 + (s == 3)) * (x // w) * (w - 1),
            "parts are equal, but not for 1001",
        ),
        (
            "sent_bytes",
            lambda x, w, s: (2 + (s == 3)) * x * max(w - 1, 1) / w,
            "a rank that is alone has nobody to send to",
        ),
    ],
)
def test_a_rest_and_one_rank_are_cases(name, answer, message, capsys):
    assert message in run(name, answer, capsys)


def test_another_order_of_messages_is_named():
    def by_rank(logits, tokens, first, all_max, all_sum):
        if first == 0:
            return all_max(logits.amax(1)) + all_sum(logits.sum(1))
        return all_sum(logits.sum(1)) + all_max(logits.amax(1))

    with pytest.raises(ValueError, match="one rank calls all_sum where another calls all_max"):
        checks.check_split_logprobs(by_rank)


def test_rows_by_rows_get_a_hint(capsys):
    """A column less a row."""

    def kept(logits, tokens, first, all_max, all_sum):
        right = SPLIT_RIGHT[0](logits, tokens, first, all_max, all_sum)
        return right[:, None] - right

    printed = run("split_logprobs", kept, capsys)
    assert "broadcasting then pairs every row with every other" in printed


def test_what_is_right_on_one_rank_alone_is_named(capsys):
    def times_ranks(x, mask, all_sum):
        return (
            over(mean_of_all, variance_of_all)(x, mask, all_sum)
            * (all_sum(1) + x * x)
            / (1 + x * x)
        )

    printed = run("whiten_over_ranks", times_ranks, capsys)
    assert printed.startswith("whiten_over_ranks: one rank by itself comes out right")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            over(lambda r, s: s(r.mean()), variance_of_all),
            "on rank 0, they are 6 and 4.093; the mean of all is 3, the root of their variance 2.3",
        ),
        (
            over(mean_of_all, lambda r, m, s: (variance_of_all(r, m, s) ** 0.5 + 0.1) ** 2),
            "on rank 0, they are 3 and 2.445; the mean of all is 3, the root of their variance 2.3",
        ),
    ],
)
def test_which_of_two_numbers_is_another_is_said(answer, message, capsys):
    printed = run("whiten_over_ranks", answer, capsys)
    assert printed.startswith("whiten_over_ranks: from each entry a number is taken off")
    assert message in printed


def test_a_sign_alone_has_its_name(capsys):
    answer = over(mean_of_all, variance_of_all)
    printed = run("whiten_over_ranks", lambda x, m, s: -answer(x, m, s), capsys)
    assert "the sign is turned round" in printed


def test_an_error_on_one_rank_is_the_learner_s(capsys):
    """The others wait for a sum, and must not wait for long."""

    def fails(x, mask, all_sum):
        if x[0] == 5:
            raise KeyError("lost")
        return all_sum(x)

    with pytest.raises(KeyError, match="lost"):
        checks.check_whiten_over_ranks(fails)
    assert 'raise KeyError("lost")' in capsys.readouterr().out


def test_unequal_shapes_are_named():
    with pytest.raises(ValueError, match=r"tensors of shapes \[\[3\], \[2\]\]: they must be equal"):
        checks.check_whiten_over_ranks(lambda x, mask, all_sum: all_sum(x[mask == 1]))


@pytest.mark.parametrize("late", [1, 5])
def test_messages_that_are_never_sent_are_named(late):
    """Whichever rank ends first; nobody waits until all patience is at an end."""

    def uneven(x, mask, all_sum):
        time.sleep(0.3 * (x[0] == late).item())
        return x if x[0] == 5 else all_sum(x)

    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="some ranks wait for a message that others never send"):
        checks.check_whiten_over_ranks(uneven)
    assert time.monotonic() - begin < lesson_10.PATIENCE / 2


def in_place(x, mask, all_sum):
    x -= all_sum(x.sum())
    return x


def misspelt(logits, tokens, first, all_max, all_sum):
    return logits.log_sofmax(-1)


class TestRules(Rules):
    modules = (lesson_10,)
    exercises = (lesson_10.WHITEN, lesson_10.SPLIT, lesson_10.HELD, lesson_10.SENT)
    mistakes = MISTAKES
    right = RIGHT
    other_kinds = (
        (
            "whiten_over_ranks",
            lambda x, m, s: x[m == 1][:1],
            "the result has shape [2, 1], expected is [2, 3]. Rows are ranks",
        ),
        ("whiten_over_ranks", lambda x, m, s: x.tolist(), "it returned list"),
        ("split_logprobs", lambda z, t, f, m, s: z, "the result has shape [2, 1, 2]"),
        ("rank_bytes", lambda n, w, s: str(n), "it returned str"),
    )
    in_place = (
        ("whiten_over_ranks", in_place, "x"),
        ("split_logprobs", lambda z, t, f, m, s: z.exp_()[:, 0], "logits"),
    )
    unknown = (
        ("whiten_over_ranks", lambda *x: 2 * merged(*x) - 7, ("x tensor([[1., 2., 6.],",)),
        ("split_logprobs", lambda *x: 2 * SPLIT_RIGHT[0](*x) - 7, ("tokens tensor([3])",)),
        ("sent_bytes", lambda x, w, s: x * w + s, ("yours 3200", "expected 1200.0")),
        ("rank_bytes", lambda n, w, s: 7 * right_held(n, w, s) + 3 * s * w, ("world_size",)),
    )
    failing = (
        (
            "split_logprobs",
            misspelt,
            AttributeError,
            "return logits.log_sofmax(-1)",
            "tokens tensor([3])",
        ),
    )


def test_the_cases_by_hand():
    x, mask = lesson_10._WHITEN_CASES[0]
    assert lesson_10.whiten_over_ranks(x, mask)[0, 2].item() == pytest.approx(3 / 5.5**0.5)
    z, tokens = lesson_10._SPLIT_CASES[0]
    assert lesson_10.split_logprobs(z, tokens)[0].item() == pytest.approx(-2.1488, abs=1e-4)
    assert lesson_10.rank_bytes(800, 4, 2) == 4400
    assert [lesson_10.sent_bytes(800, 4, stage) for stage in (0, 3)] == [1200, 1800]
