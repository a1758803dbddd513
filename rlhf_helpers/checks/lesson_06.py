"""The checks of lesson 06: agreement with oneself, which pairs to ask about, old among new."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real

import torch
from torch import Tensor

from rlhf_helpers.checks.changes import changed
from rlhf_helpers.checks.exercise import (
    Exercise,
    call,
    check,
    int64_fault,
    same,
    texts,
    wrapped,
)

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
one_pass (kappa): corrected for a chance made of one of the two times alone, and it takes two
mean_chance (kappa): corrected for a mean of the two shares, and both happening is their product
or_chance (kappa): corrected for the chance that one of two things happens, p + q - pq; agreeing by
    chance takes both to be left, or both to be right
squares (kappa): corrected for a sum of squares; a chance multiplies the share of the one time with
    that of the other
by_rest (kappa): divided by the share that does not agree
from_1 (kappa): κ, subtracted from 1
correlation (kappa): a correlation
brackets (kappa): the agreement less something: a division goes before a difference, unless
    brackets hold the difference together
number_of (kappa): a number of pairs, not a share of them
sides_compared: the sides themselves are compared. The answers changed places in between, so that
    whoever stays with an answer clicks the other side the second time.
chance_of_sides: the agreement is counted rightly, but its chance is that of clicking the same side
    twice. The answers changed places: by chance as well, agreeing means the other side.
sides_counted: chance is right, but the agreement is counted in sides. The answers changed places in
    between: whoever clicks the same side twice has chosen the other answer.
never_below: it is right where one agrees at least as often as by chance, but never below 0. Whoever
    agrees with himself less often than by chance has a κ below 0, and that is worth seeing.
always_0: it is 0 in every case. Either the return for chance alone is taken each time, or chance is
    counted from the same pairs as the agreement. It comes from the two times apart, as if they had
    nothing to do with each other: a product of shares.
whole_division (kappa): made with a division of whole numbers, which drops the fraction
digits (kappa): rounded
counts: it counts otherwise, agreement or chance; print both. In the case below {} of {} pairs are
    decided alike, and the chance of that is {}.
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
one_side (chosen): an order of the scores of one answer; what counts is its distance to the other's
first_rows (chosen): the first rows in their order, whatever the scores are
one_winner (chosen): an order of those pairs alone in which one certain answer is ahead
relative (chosen): an order of the distance as a share of the scores, and only the distance counts
first_few (chosen): an order of the first few pairs, as many as count says; nobody looked at the
    others
no_rows (chosen): numbers with a fraction, as scores, distances and probabilities are, not those of
    rows
row_type: the rows are right, but the result is {}; row numbers are used as an index, which takes
    whole numbers, here int64.
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
rounded_up (mixed): one replayed pair too many, since the share of a batch was raised to a whole
    number, or that of the new ones cut, and not rounded
exchanged (mixed): old pairs where the new ones belong, and new ones where the old ones do
one_length (mixed): pairs that are counted round by the length of the other list; each is gone round
    by its own
one_counter (mixed): pairs that are counted on from where the other list is; each list needs a
    counter of its own
from_second (mixed): pairs that are one place further on, as if the counter had moved before the
    first was taken
columns (mixed): pairs that lie apart in a list, since the row of its pairs was cut down the
    columns; a batch takes neighbours
each_again (mixed): the same pair several times before the next one comes; a list is repeated as a
    whole
never_last (mixed): all pairs in turn but the last of a list, which never comes
rest_lost (mixed): the beginning of a list again as soon as fewer are left than a batch needs, so
    that the last ones hardly ever come
half_each (mixed): as many old pairs as new ones, whatever replay says
one_place (mixed): pairs counted by their place in the batch, new and old together, so that some are
    passed over
never_first_again (mixed): all pairs in turn, but from the second round on the first one never comes
own_order (mixed): the pairs of a list in another order than theirs
other_order_in_row (mixed): the right pairs, but in another order
number_type: the numbers are right, but the result is {}; numbers of pairs are used as an index,
    which takes whole numbers, here int64. A tensor of zeros or an empty one is of floats unless it
    is told otherwise.
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
    return _kappa(_same(first, second), _alike(p, q))


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


def _sides_counted(first: Tensor, second: Tensor) -> float:
    chance = _alike(_right(first), 1 - _right(second))
    return _over(1 - _same(first, second) - chance, 1 - chance)


def _counts(results: Sequence) -> str:
    """A change of the result; else agreement and chance of the first case that is wrong."""
    if message := changed(("first", "second"), self_agreement, _AGREEMENT_CASES, results, same):
        return message
    made = []
    for result, (first, second) in zip(map(float, results), _AGREEMENT_CASES, strict=True):
        agree, chance = _same(first, second), _alike(_right(first), 1 - _right(second))
        number = len(first) * (result * (1 - chance) + chance)  # alike, were the chance right
        made.append((result, agree, chance, len(first), number))
    result, agree, chance, n, number = next(x for x in made if not same(x[0], _kappa(*x[1:3])))
    told = SAY.counts.format(round(n * agree), n, f"{chance:.4g}")
    if all(abs(x[-1] - round(x[-1])) < 1e-4 for x in made if math.isfinite(x[-1])):
        return f"{told} With that chance, {round(number)} pairs alike would give your result."
    if result == 0:
        return f"{told} Yours is 0: is your chance as large, or the return for chance alone taken?"
    implied = _over(agree - result, 1 - result)
    if 0 <= implied <= 1:
        return f"{told} With that agreement, a chance of {implied:.4g} would give your result."
    return told


def _kappa(agree: float, chance: float) -> float:
    return (agree - chance) / (1 - chance) if chance < 1 else 0.0


def _pooled(p: float, q: float) -> float:
    return _alike((p + q) / 2, (p + q) / 2)


def _clicked(first: list[int], second: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(first), torch.tensor(second)


def _nothing_left(fn: Callable) -> str:
    try:
        value = call(SELF_AGREEMENT, fn, _clicked([0, 0, 0], [1, 1, 1]))
    except ZeroDivisionError:
        print(wrapped(SAY.nothing_left))
        raise
    return "" if isinstance(value, Real | Tensor) and value == 0 else SAY.nothing_left


_AGREEMENT_CASES = (
    _clicked([0, 0, 1, 1], [1, 1, 0, 1]),
    _clicked([0, 1, 1, 0, 1], [1, 0, 0, 1, 0]),  # always the same answer
    _clicked([0, 0, 0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0]),
    _clicked([1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 0, 0]),  # less than by chance
)
SELF_AGREEMENT = Exercise(
    "self_agreement",
    self_agreement,
    _AGREEMENT_CASES,
    mistakes=(
        (_same, SAY.raw),
        (lambda first, second: 1 - _same(first, second), SAY.apart_share),
        (lambda first, second: len(first) * _same(first, second), SAY.number_of),
        (lambda first, second: _same(first, second) // 1, SAY.whole_division),
        (lambda first, second: self_agreement(first, 1 - second), SAY.sides_compared),
        (_unmoved_chance, SAY.chance_of_sides),
        (_sides_counted, SAY.sides_counted),
        (lambda first, second: max(0.0, self_agreement(first, second)), SAY.never_below),
        (lambda first, second: abs(self_agreement(first, second)), SAY.never_below),
        *(
            (partial(_corrected, chance), message)
            for chance, message in (
                (lambda p, q: 0.5, SAY.half),
                (_pooled, SAY.pooled),
                (lambda p, q: (p + q) / 2, SAY.mean_chance),
                (lambda p, q: 1 - (p + q) / 2, SAY.mean_chance),
                (lambda p, q: p + q - p * q, SAY.or_chance),
                (lambda p, q: 1 - p * q, SAY.or_chance),
                (lambda p, q: p * p + q * q, SAY.squares),
                (lambda p, q: (1 - p) ** 2 + (1 - q) ** 2, SAY.squares),
                (lambda p, q: _alike(p, p), SAY.one_pass),
                (lambda p, q: _alike(q, q), SAY.one_pass),
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
                (lambda same, chance: same - _over(chance, 1 - chance), SAY.brackets),
                (lambda same, chance: same - 2 * chance, SAY.brackets),
                (lambda same, chance: _over(same - chance, 1 - same), SAY.by_rest),
                (lambda same, chance: _over(same - chance, 1 - same or math.inf), SAY.by_rest),
                (lambda same, chance: 1 - _over(same - chance, 1 - chance), SAY.from_1),
                (lambda same, chance: 0.0, SAY.always_0),
                *(
                    (
                        lambda same, chance, k=k: round((same - chance) / (1 - chance), k),
                        SAY.digits,
                    )
                    for k in (1, 2, 3, 4)
                ),
            )
        ),
        (_correlation, SAY.correlation),
    ),
    tested="full, partial and no agreement, one side only",
    further=_nothing_left,
    general=_counts,
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


def _last_of(of: Callable, first: Tensor, second: Tensor, count: int) -> Tensor:
    return of(first, second).argsort()[-count:]


def _other_numbers(results: Sequence[Tensor]) -> str:
    """No row numbers, or those of the right pairs in another order."""
    if any((x.double() % 1).any() for x in results):
        return SAY.no_rows
    right = (most_unsure(*case) for case in _UNSURE_CASES)
    alike = all(same(x.sort()[0], y.sort()[0]) for x, y in zip(results, right, strict=True))
    return SAY.other_order if alike else ""


_UNSURE_CASES = (
    (torch.tensor([1.0, 0.5, 2.0, -1.0]), torch.tensor([0.75, 1.5, -1.0, -0.9]), 2),
    (
        torch.tensor([0.3, -2.0, 1.7, 0.0, 4.0, 1.1, -3.5, 0.1, -0.6]),
        torch.tensor([1.2, -1.4, 1.9, 1.5, 2.9, 1.05, -3.1, 0.6, -0.95]),
        4,
    ),
    (torch.tensor([3.0, -1.0, 0.25]), torch.tensor([0.0, 1.0, 1.25]), 3),
    (torch.tensor([0.5, -0.9, 0.7, 2.0]), torch.tensor([2.5, 1.0, 0.4, 1.0]), 1),
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
                *((lambda a, b, k=k: k * a, SAY.one_side) for k in (1, -1)),
                *((lambda a, b, k=k: k * b, SAY.one_side) for k in (1, -1)),
                (lambda a, b: (a - b).where(a > b, torch.inf), SAY.one_winner),
                (lambda a, b: (b - a).where(b > a, torch.inf), SAY.one_winner),
                (lambda a, b: (a - b).abs() / (a.abs() + b.abs()), SAY.relative),
                (lambda a, b: ((a - b) / a).abs(), SAY.relative),
                (lambda a, b: ((a - b) / b).abs(), SAY.relative),
            )
        ),
        (partial(_last_of, lambda a, b: (a - b).abs()), SAY.surest),
        (partial(_last_of, lambda a, b: a - b), SAY.signed),
        (partial(_last_of, lambda a, b: b - a), SAY.signed),
        (lambda a, b, n: torch.arange(n), SAY.first_rows),
        (lambda a, b, n: most_unsure(a[:n], b[:n], n), SAY.first_few),
        (lambda a, b, n: most_unsure(a, b, n).flip(0), SAY.other_order),
        (lambda a, b, n: (a - b).abs().sort().values[:n], SAY.gaps),
        (lambda a, b, n: (a - b).abs().argsort().argsort()[:n], SAY.ranks),
    ),
    tested="either answer ahead, one pair, all pairs",
    shape_hint="It is one row number for each pair that is asked about, as many as count says.",
    further=lambda fn: int64_fault(MOST_UNSURE, fn, SAY.row_type),
    general=_other_numbers,
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


def _in_turn(count: Callable, new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    """All new ones, then as many old ones as `count` says, cut into batches."""
    replayed = count(steps, batch_size, replay)
    parts = (
        _next_of(new, 1, steps * batch_size - replayed, 0),
        _next_of(old, 1, replayed, 0),
    )
    return torch.cat(parts, dim=1).view(steps, batch_size)


def _rounding(of: Callable, new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    return mixture(new, old, steps, batch_size, of(replay * batch_size) / batch_size)


def _row_by_row(of: Callable, new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    """As `mixture`, but what each list gives is `of` the list, the steps and its count."""
    replayed = round(replay * batch_size)
    counts = ((new, batch_size - replayed), (old, replayed))
    return torch.cat([of(pairs, steps, count) for pairs, count in counts], dim=1)


def _down(pairs: Tensor, steps: int, count: int) -> Tensor:
    return _next_of(pairs, 1, steps * count, 0).view(count, steps).T


def _each_again(times: Callable, pairs: Tensor, steps: int, count: int) -> Tensor:
    again = pairs.repeat_interleave(times(steps * count, len(pairs), steps))
    return _next_of(again, steps, count, count)


def _rest_lost(pairs: Tensor, steps: int, count: int) -> Tensor:
    """Whoever has too few left for a batch begins again."""
    batches = max(len(pairs) // max(count, 1), 1)
    starts = torch.arange(steps)[:, None] % batches * count
    return pairs[(starts + torch.arange(count)) % len(pairs)]


def _all_but_last(pairs: Tensor) -> Tensor:
    return pairs[: max(len(pairs) - 1, 1)]


def _first_once(pairs: Tensor, steps: int, count: int) -> Tensor:
    """All pairs in turn, and then in turn those behind the first."""
    again = pairs[min(1, len(pairs) - 1) :].repeat(steps * count)
    return torch.cat([pairs[:1], again])[: steps * count].view(steps, count)


def _by_place(new, old, steps: int, batch_size: int, replay: float) -> Tensor:
    fresh = batch_size - round(replay * batch_size)
    parts = (_next_of(pairs, steps, batch_size, batch_size) for pairs in (new, old))
    return torch.where(torch.arange(batch_size) < fresh, *parts)


def _other_order(results: Sequence[Tensor]) -> str:
    """Right rows in another order, or lists in another order than theirs."""
    right = [mixture(*case) for case in _MIXTURE_CASES]
    if all(same(x.sort(1)[0], y.sort(1)[0]) for x, y in zip(results, right, strict=True)):
        return SAY.other_order_in_row
    for got, (new, old, _, size, replay) in zip(results, _MIXTURE_CASES, strict=True):
        parts = got.split([size - (replayed := round(replay * size)), replayed], dim=1)
        if not all(_in_turn_of(x.flatten(), y) for x, y in zip(parts, (new, old), strict=True)):
            return ""
    return SAY.own_order


def _in_turn_of(row: Tensor, pairs: Tensor) -> bool:
    """Whether the row holds these pairs in some order, over and over."""
    n = len(pairs)
    once = row[:n].unique()
    whole = len(once) == min(n, len(row)) and bool(torch.isin(once, pairs).all())
    return whole and torch.equal(row[n:], row[: max(len(row) - n, 0)])


_MIXTURE_CASES = (
    (torch.tensor([10, 11, 12]), torch.tensor([20, 21, 22, 23, 24]), 2, 4, 0.5),
    (torch.arange(100, 105), torch.arange(200, 207), 5, 8, 0.7),
    (torch.arange(30, 37), torch.arange(50, 54), 4, 7, 0.3),
    (torch.tensor([7, 8]), torch.tensor([9]), 3, 3, 0.0),
    (torch.tensor([7]), torch.tensor([3, 4, 5]), 2, 2, 1.0),
)
MIXTURE = Exercise(
    "mixture",
    mixture,
    _MIXTURE_CASES,
    mistakes=(
        (lambda new, old, n, b, share: mixture(new, old, n, b, 1 - share), SAY.share_of_new),
        (partial(_rounding, int), SAY.rounded_down),
        (partial(_rounding, math.ceil), SAY.rounded_up),
        (_old_first, SAY.old_first),
        (_by_place, SAY.one_place),
        (lambda new, old, n, b, _: mixture(new, old, n, b, b // 2 / b), SAY.half_each),
        (lambda new, old, n, b, _: mixture(new, old, n, b, -(-b // 2) / b), SAY.half_each),
        *(
            (partial(_advancing, by), message)
            for by, message in (
                (lambda b, k: (0, 0), SAY.in_each),
                (lambda b, k: (0, k), SAY.in_each),
                (lambda b, k: (b - k, 0), SAY.in_each),
                (lambda b, k: (b, b), SAY.skipping),
                (lambda b, k: (1, 1), SAY.sliding),
                (lambda b, k: (b - k, b - k), SAY.one_counter),
                (lambda b, k: (k, k), SAY.one_counter),
                (lambda b, k: (k, b - k), SAY.one_counter),
            )
        ),
        *(
            (partial(_row_by_row, of), message)
            for of, message in (
                (_down, SAY.columns),
                (_rest_lost, SAY.rest_lost),
                (_first_once, SAY.never_first_again),
                (partial(_each_again, lambda taken, n, steps: taken), SAY.each_again),
                (partial(_each_again, lambda taken, n, steps: taken // n + 1), SAY.each_again),
                (partial(_each_again, lambda taken, n, steps: -(-taken // n)), SAY.each_again),
                (partial(_each_again, lambda taken, n, steps: steps), SAY.each_again),
            )
        ),
        (lambda new, old, *rest: mixture(old, new, *rest), SAY.exchanged),
        (lambda new, old, *rest: mixture(new, old[: len(new)], *rest), SAY.one_length),
        (lambda new, old, *rest: mixture(new[: len(old)], old, *rest), SAY.one_length),
        (
            lambda new, old, *rest: mixture(new[: len(old)], old[: len(new)], *rest),
            SAY.one_length,
        ),
        (lambda new, old, *rest: mixture(new.roll(-1), old.roll(-1), *rest), SAY.from_second),
        (
            lambda new, old, *rest: mixture(_all_but_last(new), _all_but_last(old), *rest),
            SAY.never_last,
        ),
        (lambda new, old, *rest: mixture(_all_but_last(new), old, *rest), SAY.never_last),
        (lambda new, old, *rest: mixture(new, _all_but_last(old), *rest), SAY.never_last),
        (_clamped, SAY.stuck),
        *(
            (partial(_in_turn, count), SAY.one_after_the_other)
            for count in (
                lambda n, b, share: n * round(share * b),
                lambda n, b, share: round(n * b * share),
            )
        ),
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
    shape_hint="It is one row for each step, with one number for each pair of the batch. A slice "
    "ends where its list does; the rest of a batch comes from the beginning.",
    size_hint="A slice ends where its list does; the rest of a batch comes from the beginning.\n",
    further=lambda fn: int64_fault(MIXTURE, fn, SAY.number_type),
    general=_other_order,
)
