"""The checks of lesson 10: whitening over ranks, a split log-softmax, bytes held and sent.

Ranks are threads here, each with the learner's function; what they send goes through a barrier.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers import losses
from rlhf_helpers.checks.exercise import Exercise, check, each, table, texts
from rlhf_helpers.logprobs import token_logprobs

SAY = texts("""
whitening: mean and spread are {}. Asked for are those of all entries that count, on whichever rank
    they are.
by_itself (whitening): those of each rank by itself, so that nothing was sent that matters
mean_of_means (whitening): made from a mean of the ranks' means, in which an entry of a rank with
    few counts more
mean_of_variances (whitening): not both over all: the variance is a mean of the ranks' variances,
    which leaves out how far the ranks' means are apart
own_mean_in_variance (whitening): not both over all: the squares are taken around each rank's own
    mean, which leaves out how far the ranks' means are apart
with_padding (whitening): over the padding too
own_count (whitening): sums over all ranks, divided by the number of entries of one
by_number (whitening): right but for the divisor of the variance, which is the number of entries;
    here, as in torch, it is one less
one_less_each (whitening): right but for the divisor of the variance: one is taken off on every
    rank, and so as many as there are ranks
not_centred: it is divided by the spread, but the mean is not taken off.
not_divided: the mean of all is taken off, but it is not divided by the spread.
variance: it is divided by the variance of all, and not by its root.
padding_kept: where the mask is 0 something else than 0 stands.
no_epsilon: where all entries are equal, 0 is divided by 0, which is no number: add 1e-8 to the
    variance before the root. Elsewhere it is right.
maximum: the maximum that is taken off is {}. It must be one number for all ranks, or their sums
    are of different things.
own_maximum (maximum): each rank's own, in the sum and in the result
own_in_sum (maximum): each rank's own in the sum of exponentials, and that of all in the result
no_maximum (maximum): missing: e to the 200 is more than float32 can hold
summed_maximum (maximum): the sum of the ranks' maxima, which is so far above all logits that the
    exponentials round to 0
not_put_back: the shared maximum is taken off inside of the exponentials, but not from the logit.
own_sum: the sum of exponentials is each rank's own, that of half of the vocabulary.
own_softmax: each rank takes a log-softmax of its own columns, as if there were no others.
mean_sum: the sum of exponentials is averaged over the ranks where it is to be added up.
no_logarithm: the sum of exponentials is taken off, and not its logarithm.
every_rank: the logit of the token is counted on every rank: those that do not have it add another
    token's. They must add 0.
modulo: the logit of the token is counted on every rank, at the remainder of its id: those that do
    not have it must add 0.
not_shared: the logit of the token is known on the rank that has it, and the others go on with 0:
    one more sum brings it to all.
sum_alone: it is the logarithm of the sum over the vocabulary by itself; the token's logit is still
    to come.
turned_round: every sign is the wrong way round: a log-probability is not above 0.
held: {}. Stage 1 cuts the optimizer, stage 2 the gradients as well, stage 3 also the weights.
optimizer_whole (held): the optimizer is whole on each rank
gradients_whole (held): the gradients are never cut
gradients_early (held): the gradients are cut in stage 1 already
weights_whole (held): the weights are never cut
weights_early (held): the weights are cut in stage 2 already
all_cut (held): everything is cut, in stage 0 too
nothing_cut (held): nothing is cut
of_stage_3 (held): any stage above 0 is counted as stage 3
no_copy: the optimizer has 8 bytes, its two moments. With 16-bit weights it keeps a float32 copy of
    them too: 12.
no_gradients: the gradients are left out; they are 2 bytes for each parameter.
no_weights: the weights themselves are left out; they are 2 bytes for each parameter.
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
cut_again (sends): stage 3 is divided by the number of ranks once more
""")


PATIENCE = 20  # seconds that a rank waits for the others


# --- ranks as threads ------------------------------------------------------------------------


class Ranks:
    """As many threads as ranks, and what they say to each other."""

    def __init__(self, count: int) -> None:
        self.brought: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count, timeout=PATIENCE)

    def reduce(self, how: str, rank: int, x: Tensor | float) -> Tensor:
        """`all_sum` or `all_max` of what the ranks bring; it waits for all of them."""
        self.brought[rank] = torch.as_tensor(x).detach().clone()
        self.barrier.wait()
        shapes = [list(tensor.shape) for tensor in self.brought]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"the ranks bring tensors of shapes {shapes}: they must be equal")
        stacked = torch.stack(self.brought)
        result = stacked.sum(0) if how == "sum" else stacked.amax(0)
        self.barrier.wait()  # nobody brings the next before all have taken this one
        return result

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What the function returns on each rank; the first error that is a rank's own."""

        def one(rank: int) -> Any:
            try:
                return function(rank)
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
        whiten_over_ranks: correct. Tested: unequal counts, padding, three ranks, equal entries.
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


def _padded(x: Tensor, mask: Tensor) -> Tensor:
    """With the padding among the entries, as it is."""
    return _with(lambda x, m: x.mean(), lambda x, m, mean: x.var(), x, mask)


def _zero_padded(x: Tensor, mask: Tensor) -> Tensor:
    """With the padding among the entries, as zeros."""
    return _with(lambda x, m: (x * m).mean(), lambda x, m, mean: (x * m).var(), x, mask)


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
    (lambda x, mask: _with(_mean, _own_variance, x, mask), SAY.by_itself),
    *each(
        SAY.mean_of_means,
        lambda variance, x, mask: _with(lambda x, m: _own_mean(x, m).mean(), variance, x, mask),
        _variance,
        lambda x, m, mean: _own_variance(x, m, mean).mean(),
    ),
    (
        lambda x, mask: _with(_mean, lambda *a: _own_variance(*a).mean(), x, mask),
        SAY.mean_of_variances,
    ),
    (
        lambda x, mask: _with(_mean, lambda x, m, mean: _variance(x, m, _own_mean(x, m)), x, mask),
        SAY.own_mean_in_variance,
    ),
    (_padded, SAY.with_padding),
    (_zero_padded, SAY.with_padding),
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
        (lambda x, m, mean, v: (x - mean) * (v + 1e-8).rsqrt(), SAY.padding_kept),
        (lambda x, m, mean, v: (x * m - mean) * (v + 1e-8).rsqrt(), SAY.padding_kept),
        (lambda x, m, mean, v: (x - mean) * m / v.sqrt(), SAY.no_epsilon),
        (lambda x, m, mean, v: ((x - mean) / v.sqrt()).masked_fill(m == 0, 0), SAY.no_epsilon),
    ),
)
WHITEN = Exercise(
    "whiten_over_ranks",
    whiten_over_ranks,
    _WHITEN_CASES,
    _WHITEN_MISTAKES,
    tested="unequal counts, padding, three ranks, equal entries",
    shape_hint="Rows are ranks: each returns as many entries as it was given.",
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
        split_logprobs: correct. Tested: two and three ranks, tokens on each of them, logits of 200.
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
    _columns([[[200.0, 198.0]], [[199.0, 201.0]]], [2]),
)
_SPLIT_MISTAKES = (
    *table(
        _of,
        (lambda c, m, z: c.sum(0) - m - _sums(z, m).sum(0).log(), SAY.own_maximum),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m).sum(0).log(), SAY.own_in_sum),
        (lambda c, m, z: c.sum(0) - z.exp().sum((0, -1)).log(), SAY.no_maximum),
        (lambda c, m, z: c.sum(0) - m.sum(0) - _sums(z, m.sum(0)).sum(0).log(), SAY.summed_maximum),
        (lambda c, m, z: c.sum(0) - _sums(z, m.amax(0)).sum(0).log(), SAY.not_put_back),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).log(), SAY.own_sum),
        (lambda c, m, z: c.sum(0) - z.logsumexp(-1), SAY.own_sum),
        (lambda c, m, z: ((c - z.logsumexp(-1)) * (c != 0)).sum(0), SAY.own_softmax),
        (lambda c, m, z: (c - z.logsumexp(-1)) * (c != 0), SAY.own_softmax),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).mean(0).log(), SAY.mean_sum),
        (lambda c, m, z: c.sum(0) - m.amax(0) - _sums(z, m.amax(0)).sum(0), SAY.no_logarithm),
        (lambda c, m, z: c - m.amax(0) - _sums(z, m.amax(0)).sum(0).log(), SAY.not_shared),
        (lambda c, m, z: m.amax(0) + _sums(z, m.amax(0)).sum(0).log(), SAY.sum_alone),
        (lambda c, m, z: m.amax(0) + _sums(z, m.amax(0)).sum(0).log() - c.sum(0), SAY.turned_round),
    ),
    *table(
        _everywhere,
        (lambda t, first, width: (t - first).clamp(0, width - 1), SAY.every_rank),
        (lambda t, first, width: t % width, SAY.modulo),
    ),
)
SPLIT = Exercise(
    "split_logprobs",
    split_logprobs,
    _SPLIT_CASES,
    _SPLIT_MISTAKES,
    tested="two and three ranks, tokens on each of them, logits of 200",
    shape_hint="Rows are ranks: each returns one number for each token.",
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
    (lambda n, ranks, stage: ranks * _held(n, ranks, stage), SAY.all_together),
)
_SENT_CASES = tuple((n, w, s) for n, w in ((800, 4), (1000, 2), (16, 8)) for s in range(4))
_SENT_MISTAKES = (
    *table(
        _sent_by,
        (lambda passes, n, ranks: passes * n, SAY.whole_sent),
        (lambda passes, n, ranks: passes * n * (ranks - 1), SAY.to_each),
        (lambda passes, n, ranks: passes * n / ranks, SAY.part_sent),
    ),
    *table(
        _counted,
        (lambda stage, ranks: 3 if stage == 3 else 1, SAY.one_pass),
        (lambda stage, ranks: 2 if stage == 3 else 1, SAY.one_pass),
        (lambda stage, ranks: 2, SAY.as_others),
        (lambda stage, ranks: 4 if stage == 3 else 2, SAY.four_passes),
        (lambda stage, ranks: (2, 2, 1, 3)[stage], SAY.less_in_2),
        (lambda stage, ranks: (2, 1, 1, 3)[stage], SAY.less_in_2),
        (lambda stage, ranks: 3 / ranks if stage == 3 else 2, SAY.cut_again),
    ),
)
HELD = Exercise(
    "rank_bytes",
    rank_bytes,
    _HELD_CASES,
    _HELD_MISTAKES,
    tested="stages 0 to 3, two, four and eight ranks",
)
SENT = Exercise(
    "sent_bytes",
    sent_bytes,
    _SENT_CASES,
    _SENT_MISTAKES,
    tested="stages 0 to 3, two, four and eight ranks",
)
