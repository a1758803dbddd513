"""The checks of lesson 06: agreement with oneself, which pairs to ask about, old among new."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlhf_helpers.checks.exercise import Exercise, call, check, texts

SAY = texts("""
kappa: it is {}. Asked for is (same - chance) / (1 - chance): what the agreement has above chance,
    as a share of all that chance leaves.
raw (kappa): the share of pairs decided alike, with nothing taken off for chance
apart_share (kappa): the share of pairs decided differently
chance_alone (kappa): the chance agreement alone
not_scaled (kappa): the agreement less chance, not yet divided by what chance leaves
by_chance (kappa): divided by the chance itself
by_same (kappa): divided by the share that agrees
half (kappa): corrected for a chance of one half, whatever the sides that were clicked
pooled (kappa): corrected for a chance made of both times thrown together
one_way (kappa): corrected for one way only to agree by chance, and there are two
correlation (kappa): a correlation
number_of (kappa): a number of pairs, not a share of them
sides_compared: the sides themselves are compared. The answers changed places in between, so that
    whoever stays with an answer clicks the other side the second time.
chance_of_sides: the agreement is counted rightly, but its chance is that of clicking the same side
    twice. The answers changed places: by chance as well, agreeing means the other side.
nothing_left: it is right but where one has clicked the same side throughout, and then the other
    side throughout. Chance alone agrees everywhere there, nothing is left to share out, and 0
    divided by 0 is no number: return 0, no agreement beyond chance.
chosen: it is {}. Asked for are the row numbers of the pairs whose two scores lie closest together,
    the closest first.
surest (chosen): the pairs whose scores lie farthest apart, which the reward model is sure about
signed (chosen): an order of the difference with its sign, which puts the surest pairs at one end
of_sum (chosen): an order of the scores themselves, not of their distance
other_order (chosen): the right pairs, but in another order, so that a smaller budget, the first few
    of them, would not get the closest
gaps (chosen): the distances, not the numbers of the rows that have them
ranks (chosen): the place of each row in the order, not the row at each place
in_each (mixed): the same pairs in every batch, always from the beginning
mixed: a batch holds {}. Asked for are first the new pairs, then the replayed ones, each going on
    where the batch before ended, and from the beginning when all have been.
share_of_new (mixed): the share of replayed pairs where that of the new ones belongs
old_first (mixed): the replayed pairs first
skipping (mixed): the next pairs counted by whole batches, so that some are passed over
sliding (mixed): the pairs of the batch before, moved on by one
stuck (mixed): the last pair over and over, once all have been
one_stream (mixed): whatever comes next of all pairs in one row, new and old, with no share kept
one_after_the_other (mixed): at first only new pairs and in the end only old ones, which are then
    forgotten, or the new ones are
rounded_down (mixed): one replayed pair too few, since the share of a batch was cut to a whole
    number, not rounded
places (mixed): places in the two lists, counted from 0, not what stands there
""")

# --- lesson 06: agreement with oneself -------------------------------------------------------


def self_agreement(first: Tensor, second: Tensor) -> float:
    """Agreement of two passes over the same pairs, corrected for chance: Cohen's κ.

    κ = (same − chance) / (1 − chance), with `same` the share of pairs in which the same answer was
    chosen, and `chance` that share if the two passes had nothing to do with each other.

    Args:
        first: `[N]`, int64, the side chosen the first time: 0 left, 1 right.
        second: `[N]`, the second time, with the answers exchanged: the same answer is on the other
            side.

    Returns:
        1 where all agree, about 0 for chance; 0 if chance alone agrees everywhere.

    Cohen 1960, Educational and Psychological Measurement 20, page 40. Lesson 06.
    """
    p, q = first.double().mean().item(), 1 - second.double().mean().item()
    chance = _alike(p, q)
    return (_same(first, second) - chance) / (1 - chance) if chance < 1 else 0.0


def check_self_agreement(fn: Callable[[Tensor, Tensor], float]) -> None:
    """Check the learner's `self_agreement(first, second)`.

    Args:
        fn: returns a number or a scalar tensor, as `self_agreement` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_self_agreement(self_agreement)
        self_agreement: correct. Tested: full, partial and no agreement, one side only.
    """
    check(SELF_AGREEMENT, fn)


def _same(first: Tensor, second: Tensor) -> float:
    return (first != second).double().mean().item()


def _right(sides: Tensor) -> float:
    return sides.double().mean().item()


def _alike(p: float, q: float) -> float:
    return p * q + (1 - p) * (1 - q)


def _over(x: float, y: float) -> float:
    return x / y if y else math.nan


def _corrected(chance: Callable, first: Tensor, second: Tensor) -> float:
    """κ with another chance, of the shares of answers."""
    by_chance = chance(_right(first), 1 - _right(second))
    return _over(_same(first, second) - by_chance, 1 - by_chance)


def _scaled(of: Callable, first: Tensor, second: Tensor) -> float:
    """Something else made of agreement and chance."""
    return of(_same(first, second), _alike(_right(first), 1 - _right(second)))


def _correlation(first: Tensor, second: Tensor) -> float:
    both = torch.stack([first, 1 - second]).double()
    return torch.corrcoef(both)[0, 1].item()


def _unmoved_chance(first: Tensor, second: Tensor) -> float:
    chance = _alike(_right(first), _right(second))
    return _over(_same(first, second) - chance, 1 - chance)


def _pooled(p: float, q: float) -> float:
    return _alike((p + q) / 2, (p + q) / 2)


def _clicked(first: list[int], second: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(first), torch.tensor(second)


def _nothing_left(fn: Callable) -> str:
    value = call(SELF_AGREEMENT, fn, _clicked([0, 0, 0], [1, 1, 1]))
    return "" if float(value) == 0 else SAY.nothing_left


_AGREEMENT_CASES = (
    _clicked([0, 0, 1, 1], [1, 1, 0, 1]),
    _clicked([0, 1, 1, 0, 1], [1, 0, 0, 1, 0]),  # always the same answer
    _clicked([0, 0, 0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0]),
    _clicked([1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 1, 1]),  # less than by chance
)
SELF_AGREEMENT = Exercise(
    "self_agreement",
    self_agreement,
    _AGREEMENT_CASES,
    mistakes=(
        (_same, SAY.raw),
        (lambda first, second: 1 - _same(first, second), SAY.apart_share),
        (lambda first, second: len(first) * _same(first, second), SAY.number_of),
        (lambda first, second: self_agreement(first, 1 - second), SAY.sides_compared),
        (_unmoved_chance, SAY.chance_of_sides),
        *(
            (partial(_corrected, chance), message)
            for chance, message in (
                (lambda p, q: 0.5, SAY.half),
                (_pooled, SAY.pooled),
                (lambda p, q: p * q, SAY.one_way),
                (lambda p, q: (1 - p) * (1 - q), SAY.one_way),
            )
        ),
        *(
            (partial(_scaled, of), message)
            for of, message in (
                (lambda same, chance: chance, SAY.chance_alone),
                (lambda same, chance: same - chance, SAY.not_scaled),
                (lambda same, chance: _over(same - chance, chance), SAY.by_chance),
                (lambda same, chance: _over(same - chance, same), SAY.by_same),
            )
        ),
        (_correlation, SAY.correlation),
    ),
    tested="full, partial and no agreement, one side only",
    further=_nothing_left,
)


# --- lesson 06: which pairs to ask about -----------------------------------------------------


def most_unsure(first_scores: Tensor, second_scores: Tensor, count: int) -> Tensor:
    """The pairs about which a reward model is least sure: their two scores lie closest together.

    By Bradley and Terry a pair is a coin with probability σ(Δ); it is least certain where |Δ| is
    least.

    Args:
        first_scores, second_scores: `[N]`, of the two answers of each pair.
        count: how many pairs, at most N.

    Returns:
        `[count]`, int64, row numbers, the closest pair first.

    Lesson 06.
    """
    return (first_scores - second_scores).abs().argsort()[:count]


def check_most_unsure(fn: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """Check the learner's `most_unsure(first_scores, second_scores, count)`.

    Args:
        fn: returns row numbers `[count]`, as `most_unsure` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_most_unsure(most_unsure)
        most_unsure: correct. Tested: either answer ahead, one pair, all pairs.
    """
    check(MOST_UNSURE, fn)


def _ordered_by(of: Callable, first: Tensor, second: Tensor, count: int) -> Tensor:
    return of(first, second).argsort()[:count]


_UNSURE_CASES = (
    (torch.tensor([1.0, 0.5, 2.0, -1.0]), torch.tensor([0.75, 1.5, -1.0, -0.9]), 2),
    (
        torch.tensor([0.3, -2.0, 1.7, 0.0, 4.0, 1.1]),
        torch.tensor([1.2, -1.4, 1.9, 1.5, 2.9, 1.05]),
        4,
    ),
    (torch.tensor([3.0, -1.0, 0.25]), torch.tensor([0.0, 1.0, 1.25]), 3),
    (torch.tensor([0.5, 2.0, 0.7]), torch.tensor([2.5, 1.0, 0.4]), 1),
)
MOST_UNSURE = Exercise(
    "most_unsure",
    most_unsure,
    _UNSURE_CASES,
    mistakes=(
        *(
            (partial(_ordered_by, of), message)
            for of, message in (
                (lambda a, b: -(a - b).abs(), SAY.surest),
                (lambda a, b: a - b, SAY.signed),
                (lambda a, b: b - a, SAY.signed),
                (lambda a, b: a + b, SAY.of_sum),
                (lambda a, b: -(a + b), SAY.of_sum),
                (torch.minimum, SAY.of_sum),
                (torch.maximum, SAY.of_sum),
            )
        ),
        (lambda a, b, n: most_unsure(a, b, n).flip(0), SAY.other_order),
        (lambda a, b, n: most_unsure(a, b, n).sort().values, SAY.other_order),
        (lambda a, b, n: (a - b).abs().sort().values[:n], SAY.gaps),
        (lambda a, b, n: (a - b).abs().argsort().argsort()[:n], SAY.ranks),
    ),
    tested="either answer ahead, one pair, all pairs",
    shape_hint="It is one row number for each pair that is asked about, as many as count says.",
)


# --- lesson 06: old pairs among the new ------------------------------------------------------


def mixture(new: Tensor, old: Tensor, steps: int, batch_size: int, replay: float) -> Tensor:
    """Which pairs are in each batch: a fixed share of old ones, so that they are not forgotten.

    Args:
        new, old: `[N]` and `[M]`, int64, numbers of the pairs.
        steps, batch_size: how many batches, and pairs in each.
        replay: share of old pairs in a batch, from 0 to 1; rounded to whole pairs.

    Returns:
        `[steps, batch_size]`: in each row first new pairs, then old ones. Each of the two goes on
        where the batch before ended, and from the beginning when all have been.

    Lesson 06.
    """
    replayed = round(replay * batch_size)
    counts = ((new, batch_size - replayed), (old, replayed))
    return torch.cat([_next_of(pairs, steps, count, count) for pairs, count in counts], dim=1)


def check_mixture(fn: Callable[[Tensor, Tensor, int, int, float], Tensor]) -> None:
    """Check the learner's `mixture(new, old, steps, batch_size, replay)`.

    Args:
        fn: returns numbers of pairs `[steps, batch_size]`, as `mixture` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_mixture(mixture)
        mixture: correct. Tested: few pairs and many, no replay, nothing else, a share to round.
    """
    check(MIXTURE, fn)


def _next_of(pairs: Tensor, steps: int, count: int, advance: int) -> Tensor:
    """`[steps, count]`: row t from place t · `advance` on, from the start after the last."""
    places = torch.arange(steps)[:, None] * advance + torch.arange(count)
    return pairs[places % len(pairs)]


def _advancing(by: Callable, new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    """As `mixture`, but each list is moved on by another number, of its count and the batch."""
    replayed = round(replay * batch_size)
    moves = zip(
        (new, old), (batch_size - replayed, replayed), by(batch_size, replayed), strict=True
    )
    return torch.cat([_next_of(pairs, steps, count, move) for pairs, count, move in moves], dim=1)


def _clamped(new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    replayed = round(replay * batch_size)
    counts = ((new, batch_size - replayed), (old, replayed))
    places = [
        (p, torch.arange(steps)[:, None] * count + torch.arange(count)) for p, count in counts
    ]
    return torch.cat([p[i.clamp(max=len(p) - 1)] for p, i in places], dim=1)


def _old_first(new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    fresh = batch_size - round(replay * batch_size)
    return mixture(new, old, steps, batch_size, replay).roll(-fresh, 1)


def _one_stream(pairs: Tensor, steps: int, batch_size: int) -> Tensor:
    return _next_of(pairs, steps, batch_size, batch_size)


def _in_turn(new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    replayed = round(replay * batch_size)
    parts = (
        _next_of(new, 1, steps * (batch_size - replayed), 0),
        _next_of(old, 1, steps * replayed, 0),
    )
    return torch.cat(parts, dim=1).view(steps, batch_size)


def _cut(new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    return mixture(new, old, steps, batch_size, int(replay * batch_size) / batch_size)


_MIXTURE_CASES = (
    (torch.tensor([10, 11, 12]), torch.tensor([20, 21, 22, 23, 24]), 2, 4, 0.5),
    (torch.arange(100, 105), torch.arange(200, 207), 5, 8, 0.7),
    (torch.arange(30, 37), torch.arange(50, 54), 4, 6, 0.3),
    (torch.tensor([7, 8]), torch.tensor([9]), 3, 3, 0.0),
    (torch.tensor([7]), torch.tensor([3, 4, 5]), 2, 2, 1.0),
)
MIXTURE = Exercise(
    "mixture",
    mixture,
    _MIXTURE_CASES,
    mistakes=(
        (lambda new, old, n, b, share: mixture(new, old, n, b, 1 - share), SAY.share_of_new),
        (_cut, SAY.rounded_down),
        (_old_first, SAY.old_first),
        *(
            (partial(_advancing, by), message)
            for by, message in (
                (lambda b, k: (0, 0), SAY.in_each),
                (lambda b, k: (0, k), SAY.in_each),
                (lambda b, k: (b - k, 0), SAY.in_each),
                (lambda b, k: (b, b), SAY.skipping),
                (lambda b, k: (1, 1), SAY.sliding),
            )
        ),
        (_clamped, SAY.stuck),
        (_in_turn, SAY.one_after_the_other),
        (lambda new, old, n, b, share: _one_stream(torch.cat([new, old]), n, b), SAY.one_stream),
        (lambda new, old, n, b, share: _one_stream(torch.cat([old, new]), n, b), SAY.one_stream),
        (
            lambda new, old, n, b, share: mixture(
                torch.arange(len(new)), torch.arange(len(old)), n, b, share
            ),
            SAY.places,
        ),
    ),
    tested="few pairs and many, no replay, nothing else, a share to round",
    shape_hint="It is one row for each step, with one number for each pair of the batch.",
)
