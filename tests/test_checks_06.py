"""The checks of lesson 06: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import math
from itertools import cycle

import numpy as np
import pytest
import torch
from helpers_checks import Rules, check_of, run

from rlhf_helpers.checks import lesson_06

# --- self_agreement ---


def counted(first, second):
    """The table of answers, left and right as the pair stood the first time."""
    table = [[0, 0], [0, 0]]
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        table[a][1 - b] += 1
    return table


def from_table(of, degenerate=0.0):
    """What `of` makes of agreement and chance, of a table of counts."""

    def answer(first, second):
        table = np.array(counted(first, second))
        n = table.sum()
        same = np.trace(table) / n
        chance = sum(table[k].sum() * table[:, k].sum() for k in (0, 1)) / n**2
        return float(of(same, chance)) if chance < 1 else degenerate

    return answer


def kappa(same, chance):
    return (same - chance) / (1 - chance)


def agreeing(first, second):
    return (first != second).float().mean()


def with_chance(chance):
    """κ from tensors, with a chance of first and exchanged second sides."""

    def answer(first, second):
        expected = chance(first.float().mean(), (1 - second).float().mean())
        return ((agreeing(first, second) - expected) / (1 - expected)).item()

    return answer


def pooled(p, q):
    both = (p + q) / 2
    return both**2 + (1 - both) ** 2


def sides_as_they_are(first, second):
    return from_table(kappa)(first, 1 - second)


def chance_of_same_side(first, second):
    p, q = first.float().mean(), second.float().mean()
    expected = p * q + (1 - p) * (1 - q)
    return (agreeing(first, second) - expected) / (1 - expected)


def correlated(first, second):
    return float(np.corrcoef(first.numpy(), 1 - second.numpy())[0, 1])


def sides_counted(first, second):
    p, q = first.float().mean(), 1 - second.float().mean()
    expected = p * q + (1 - p) * (1 - q)
    return ((first == second).float().mean() - expected) / (1 - expected)


def joint(first, second):
    """With both clicks of the pair in the chance, as they were."""
    turned = 1 - second
    chance = sum(((first == side) & (turned == side)).float().mean() for side in (0, 1))
    return ((first == turned).float().mean() - chance) / (1 - chance) if chance < 1 else 0.0


def rounded_to(digits):
    return from_table(lambda same, chance: round(kappa(same, chance), digits))


def nan_where_nothing_is_left(first, second):
    return from_table(kappa, degenerate=math.nan)(first, second)


IT_IS = "it is "
AGREEMENT_MISTAKES = [
    (IT_IS + "the share of pairs decided alike", from_table(lambda same, chance: same)),
    (IT_IS + "the share of pairs decided alike", agreeing),
    (IT_IS + "the share of pairs decided differently", lambda a, b: (a == b).float().mean()),
    (IT_IS + "the chance agreement alone", from_table(lambda same, chance: chance)),
    (IT_IS + "the agreement less chance", from_table(lambda same, chance: same - chance)),
    (IT_IS + "divided by the chance", from_table(lambda same, chance: (same - chance) / chance)),
    (
        IT_IS + "divided by the share that agrees",
        from_table(lambda same, chance: (same - chance) / same),
    ),
    (IT_IS + "corrected for a chance of one half", lambda a, b: 2 * agreeing(a, b) - 1),
    (IT_IS + "corrected for a chance made of both", with_chance(pooled)),
    (IT_IS + "corrected for one way only", with_chance(lambda p, q: p * q)),
    (IT_IS + "corrected for one way only", with_chance(lambda p, q: (1 - p) * (1 - q))),
    (IT_IS + "corrected for a chance made of one", with_chance(lambda p, q: p * p + (1 - p) ** 2)),
    (IT_IS + "corrected for a mean of the two", with_chance(lambda p, q: (p + q) / 2)),
    (IT_IS + "corrected for a mean of the two", with_chance(lambda p, q: (1 - p + 1 - q) / 2)),
    (IT_IS + "corrected for the chance that one of two", with_chance(lambda p, q: p + q - p * q)),
    (IT_IS + "corrected for a sum of squares", with_chance(lambda p, q: p**2 + q**2)),
    (
        IT_IS + "divided by the share that does not agree",
        from_table(lambda same, chance: (same - chance) / (1 - same) if same < 1 else 0.0),
    ),
    (IT_IS + "κ, subtracted from 1", from_table(lambda same, chance: 1 - kappa(same, chance))),
    (IT_IS + "the agreement less something", from_table(lambda a, b: a - b / 1 - b)),
    (IT_IS + "the agreement less something", from_table(lambda a, b: a - b / (1 - b))),
    (IT_IS + "made with a division of whole", lambda a, b: (a != b).sum() // len(a)),
    (IT_IS + "rounded", rounded_to(2)),
    (IT_IS + "rounded", rounded_to(1)),
    ("chance is right, but the agreement is counted in sides", sides_counted),
    ("it is right where one agrees", from_table(lambda *shares: max(0.0, kappa(*shares)))),
    ("it is right where one agrees", from_table(lambda *shares: abs(kappa(*shares)))),
    ("it is 0 in every case", joint),
    (IT_IS + "a correlation", correlated),
    (IT_IS + "a number of pairs", lambda a, b: float((a != b).sum())),
    ("the sides themselves are compared", sides_as_they_are),
    ("the agreement is counted rightly, but its chance", chance_of_same_side),
    ("it is right but where one has clicked the same side", nan_where_nothing_is_left),
]


def by_hand(first, second):
    n = len(first)
    agree = sum(1 for a, b in zip(first, second, strict=True) if a + b == 1) / n
    left, left_again = (first == 0).sum() / n, (second == 1).sum() / n
    chance = left * left_again + (1 - left) * (1 - left_again)
    return 0.0 if chance == 1 else (agree - chance) / (1 - chance)


AGREEMENT_RIGHT = [lesson_06.self_agreement, from_table(kappa), by_hand]


# --- most_unsure ---


def by_key(key, reverse=False):
    """Row numbers sorted by what `key` makes of the two scores."""

    def answer(first_scores, second_scores, count):
        rows = range(len(first_scores))
        order = sorted(
            rows, key=lambda i: float(key(first_scores[i], second_scores[i])), reverse=reverse
        )
        return torch.tensor(order[:count])

    return answer


def distance(a, b):
    return abs(a - b)


def topk(first_scores, second_scores, count):
    return (first_scores - second_scores).abs().topk(count, largest=False).indices


def first_ahead(first_scores, second_scores, count):
    gaps = first_scores - second_scores
    gaps[gaps < 0] = math.inf
    return gaps.argsort()[:count]


UNSURE_MISTAKES = [
    (IT_IS + "the pairs whose scores lie farthest", by_key(distance, reverse=True)),
    (
        IT_IS + "the pairs whose scores lie farthest",
        lambda a, b, n: (a - b).abs().topk(n).indices,
    ),
    (IT_IS + "an order of the difference with its sign", by_key(lambda a, b: a - b)),
    (IT_IS + "an order of the difference with its sign", by_key(lambda a, b: b - a)),
    (
        IT_IS + "an order of the difference with its sign",
        by_key(lambda a, b: torch.sigmoid(a - b)),
    ),
    (IT_IS + "an order of the scores themselves", by_key(lambda a, b: a + b)),
    (IT_IS + "an order of the scores themselves", by_key(lambda a, b: a + b, reverse=True)),
    (IT_IS + "an order of the scores themselves", by_key(min)),
    (IT_IS + "an order of the scores themselves", by_key(max)),
    (IT_IS + "the pairs whose scores lie farthest", lambda a, b, n: (a - b).abs().argsort()[-n:]),
    (IT_IS + "an order of the difference with its sign", lambda a, b, n: (a - b).argsort()[-n:]),
    (IT_IS + "an order of the scores of one answer", by_key(lambda a, b: b)),
    (IT_IS + "an order of the scores of one answer", by_key(lambda a, b: a, reverse=True)),
    (IT_IS + "an order of those pairs alone", first_ahead),
    (
        IT_IS + "an order of the distance as a share",
        by_key(lambda a, b: abs(a - b) / (abs(a) + abs(b))),
    ),
    (IT_IS + "an order of the first few pairs", lambda a, b, n: (a - b)[:n].abs().argsort()),
    (IT_IS + "the first rows in their order", lambda a, b, n: torch.arange(n)),
    (IT_IS + "the right pairs, but in another order", lambda *x: topk(*x).flip(0)),
    (IT_IS + "the right pairs, but in another order", lambda *x: topk(*x).sort()[0]),
    (IT_IS + "the distances, not the numbers", lambda a, b, n: (a - b).abs().sort()[0][:n]),
    (IT_IS + "the place of each row", lambda a, b, n: (a - b).abs().argsort().argsort()[:n]),
]
UNSURE_RIGHT = [
    lesson_06.most_unsure,
    topk,
    by_key(distance),
    by_key(lambda a, b: abs(torch.sigmoid(a - b) - 0.5)),
    lambda a, b, n: torch.argsort((a - b) ** 2)[:n],
]


# --- mixture ---


def batches(new, old, steps, batch_size, replayed, start=lambda step, count: step * count):
    """Row by row, as a learner would write it."""
    rows = []
    for step in range(steps):
        row = []
        for pairs, count in ((new, batch_size - replayed), (old, replayed)):
            first = start(step, count)
            row += [pairs[(first + i) % len(pairs)].item() for i in range(count)]
        rows.append(row)
    return torch.tensor(rows)


def rounded(batch_size, replay):
    return round(batch_size * replay)


def with_start(start):
    return lambda new, old, steps, batch_size, replay: batches(
        new, old, steps, batch_size, rounded(batch_size, replay), start
    )


def with_cycles(new, old, steps, batch_size, replay):
    k = rounded(batch_size, replay)
    fresh, again = cycle(new.tolist()), cycle(old.tolist())
    return torch.tensor(
        [
            [next(fresh) for _ in range(batch_size - k)] + [next(again) for _ in range(k)]
            for _ in range(steps)
        ]
    )


def old_before_new(new, old, steps, batch_size, replay):
    k = rounded(batch_size, replay)
    right = with_cycles(new, old, steps, batch_size, replay)
    return torch.cat([right[:, batch_size - k :], right[:, : batch_size - k]], dim=1)


def until_the_last(new, old, steps, batch_size, replay):
    k = rounded(batch_size, replay)
    rows = []
    for step in range(steps):
        row = []
        for pairs, count in ((new, batch_size - k), (old, k)):
            row += [pairs[min(step * count + i, len(pairs) - 1)].item() for i in range(count)]
        rows.append(row)
    return torch.tensor(rows)


def all_new_first(new, old, steps, batch_size, replay):
    k = rounded(batch_size, replay)
    fresh, again = cycle(new.tolist()), cycle(old.tolist())
    row = [next(fresh) for _ in range(steps * (batch_size - k))]
    row += [next(again) for _ in range(steps * k)]
    return torch.tensor(row).view(steps, batch_size)


def in_one_row(*order):
    def answer(new, old, steps, batch_size, replay):
        lists = {"new": new.tolist(), "old": old.tolist()}
        stream = cycle(lists[order[0]] + lists[order[1]])
        return torch.tensor([[next(stream) for _ in range(batch_size)] for _ in range(steps)])

    return answer


def places(new, old, *settings):
    return with_cycles(torch.arange(len(new)), torch.arange(len(old)), *settings)


def only_old_begin_anew(new, old, steps, batch_size, replay):
    right = with_cycles(new, old, steps, batch_size, replay)
    k = rounded(batch_size, replay)
    right[:, batch_size - k :] = right[0, batch_size - k :].clone()
    return right


def only_new_begin_anew(new, old, steps, batch_size, replay):
    right = with_cycles(new, old, steps, batch_size, replay)
    fresh = batch_size - rounded(batch_size, replay)
    right[:, :fresh] = right[0, :fresh].clone()
    return right


def with_rounding(of):
    return lambda new, old, n, b, share: batches(new, old, n, b, of(b * share))


def of_each(of):
    """`of` each list, the number of steps, and how many of them a batch takes."""

    def answer(new, old, steps, batch_size, replay):
        k = rounded(batch_size, replay)
        return torch.hstack([of(new, steps, batch_size - k), of(old, steps, k)])

    return answer


def in_turn(pairs, steps, count):
    return pairs[torch.arange(steps * count) % len(pairs)].reshape(steps, count)


def down_the_columns(pairs, steps, count):
    return pairs[torch.arange(steps * count) % len(pairs)].reshape(count, steps).T


def each_repeated(pairs, steps, count):
    again = pairs.repeat_interleave(steps * count // len(pairs) + 1)
    return again[: steps * count].reshape(steps, count)


def begin_again_where_few_are_left(pairs, steps, count):
    rows, start = [], 0
    for _ in range(steps):
        if start + count > len(pairs):
            start = 0
        rows.append(pairs[(start + torch.arange(count)) % len(pairs)])
        start += count
    return torch.stack(rows)


def from_the_second_round_on_without_the_first(pairs, steps, count):
    row, place = [], 0
    for _ in range(steps * count):
        row.append(pairs[place])
        place = place + 1 if place + 1 < len(pairs) else min(1, len(pairs) - 1)
    return torch.stack(row).view(steps, count) if row else pairs[:0].view(steps, 0)


def with_one_counter(new, old, steps, batch_size, replay):
    k, place, rows = rounded(batch_size, replay), 0, []
    for _ in range(steps):
        row = [new[(place + i) % len(new)] for i in range(batch_size - k)]
        row += [old[(place + i) % len(old)] for i in range(k)]
        rows.append(torch.stack(row))
        place += batch_size - k
    return torch.stack(rows)


def by_place_in_the_batch(new, old, steps, batch_size, replay):
    fresh = batch_size - rounded(batch_size, replay)
    result = torch.zeros(steps, batch_size, dtype=torch.int64)
    for i in range(steps * batch_size):
        pairs = new if i % batch_size < fresh else old
        result[i // batch_size, i % batch_size] = pairs[i % len(pairs)]
    return result


def share_of_the_run(new, old, steps, batch_size, replay):
    k = round(replay * steps * batch_size)
    row = [in_turn(new, 1, steps * batch_size - k), in_turn(old, 1, k)]
    return torch.hstack(row).view(steps, batch_size)


HOLDS = "a batch holds "
MIXTURE_MISTAKES = [
    (
        HOLDS + "the share of replayed pairs where that",
        lambda new, old, n, b, share: batches(new, old, n, b, b - rounded(b, share)),
    ),
    (HOLDS + "the replayed pairs first", old_before_new),
    (HOLDS + "the same pairs in every batch", with_start(lambda step, count: 0)),
    (HOLDS + "the same pairs in every batch", only_old_begin_anew),
    (HOLDS + "the same pairs in every batch", only_new_begin_anew),
    (
        HOLDS + "the next pairs counted by whole batches",
        lambda new, old, n, b, share: batches(
            new, old, n, b, rounded(b, share), lambda step, count: step * b
        ),
    ),
    (HOLDS + "the pairs of the batch before, moved on", with_start(lambda step, count: step)),
    (HOLDS + "the last pair over and over", until_the_last),
    (HOLDS + "at first only new pairs", all_new_first),
    (HOLDS + "whatever comes next of all pairs", in_one_row("new", "old")),
    (HOLDS + "whatever comes next of all pairs", in_one_row("old", "new")),
    (
        HOLDS + "one replayed pair too few",
        lambda new, old, n, b, share: batches(new, old, n, b, int(b * share)),
    ),
    (HOLDS + "places in the two lists", places),
    (HOLDS + "one replayed pair too many", with_rounding(math.ceil)),
    (HOLDS + "as many old pairs as new", lambda n, o, s, b, share: batches(n, o, s, b, b // 2)),
    (HOLDS + "at first only new pairs", share_of_the_run),
    (HOLDS + "pairs that are counted on from where", with_one_counter),
    (
        HOLDS + "pairs that are counted on from where",
        lambda new, old, n, b, share: with_start(lambda step, count: step * (b - count))(
            new, old, n, b, share
        ),
    ),
    (HOLDS + "old pairs where the new ones", lambda new, old, *x: with_cycles(old, new, *x)),
    (
        HOLDS + "pairs that are counted round by the length",
        lambda new, old, *x: with_cycles(new[: len(old)], old[: len(new)], *x),
    ),
    (
        HOLDS + "pairs that are counted round by the length",
        lambda new, old, *x: with_cycles(new, old[: len(new)], *x),
    ),
    (HOLDS + "pairs counted by their place", by_place_in_the_batch),
    (
        HOLDS + "pairs that are one place further on",
        with_start(lambda step, count: step * count + 1),
    ),
    (HOLDS + "pairs that lie apart in a list", of_each(down_the_columns)),
    (HOLDS + "the same pair several times", of_each(each_repeated)),
    (
        HOLDS + "all pairs in turn but the last",
        lambda new, old, *x: with_cycles(new, old[:-1] if len(old) > 1 else old, *x),
    ),
    (
        HOLDS + "all pairs in turn, but from the second",
        of_each(from_the_second_round_on_without_the_first),
    ),
    (HOLDS + "the beginning of a list again", of_each(begin_again_where_few_are_left)),
]


def by_index(new, old, steps, batch_size, replay):
    k = rounded(batch_size, replay)
    fresh = new.repeat(steps * batch_size)[: steps * (batch_size - k)].view(steps, -1)
    again = old.repeat(steps * batch_size)[: steps * k].view(steps, k)
    return torch.hstack([fresh, again]) if k < batch_size else again


MIXTURE_RIGHT = [
    lesson_06.mixture,
    with_cycles,
    by_index,
    with_start(lambda step, count: step * count),
]


MISTAKES = [
    *(("self_agreement", answer, message) for message, answer in AGREEMENT_MISTAKES),
    *(("most_unsure", answer, message) for message, answer in UNSURE_MISTAKES),
    *(("mixture", answer, message) for message, answer in MIXTURE_MISTAKES),
]
RIGHT = [
    *(("self_agreement", answer) for answer in AGREEMENT_RIGHT),
    *(("most_unsure", answer) for answer in UNSURE_RIGHT),
    *(("mixture", answer) for answer in MIXTURE_RIGHT),
]


def in_another_order(new, old, *settings):
    shuffled = (x[torch.randperm(len(x), generator=torch.manual_seed(0))] for x in (new, old))
    return with_cycles(*shuffled, *settings)


def into_zeros(new, old, steps, batch_size, replay):
    result = torch.zeros(steps, batch_size)
    result[:] = with_cycles(new, old, steps, batch_size, replay)
    return result


def left_alone(first, second):
    same = ((first == 0) & (second == 1)).float().mean().item()
    p, q = first.float().mean().item(), 1 - second.float().mean().item()
    return kappa(same, p * q + (1 - p) * (1 - q))


def in_reverse(first, second):
    return from_table(kappa)(first, second.flip(0))


def of_minus(first, second):
    p, q = first.float().mean(), (-second).float().mean()
    chance = p * q + (1 - p) * (1 - q)
    return ((first == -second).float().mean() - chance) / (1 - chance)


def without_half_of_chance(first, second):
    return from_table(lambda same, chance: kappa(same, chance) if chance < 0.51 else 0.0)(
        first, second
    )


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("self_agreement", left_alone, "3 of 4 pairs are decided alike, and the chance of that is"),
        ("self_agreement", left_alone, "is 0.5. With that chance, 2 pairs alike would give your"),
        ("self_agreement", in_reverse, "first is used with its rows in reverse order"),
        ("self_agreement", of_minus, "With that agreement, a chance of 0.875 would give your"),
        ("self_agreement", without_half_of_chance, "Yours is 0: is your chance as large, or"),
        (
            "self_agreement",
            lambda *x: 100 * lesson_06.self_agreement(*x),
            "the result comes out times 100 everywhere: it is in percent",
        ),
        (
            "self_agreement",
            lambda *x: lesson_06.self_agreement(*x) or None,
            "it is right but where one has clicked the same side throughout",
        ),
        ("most_unsure", lambda a, b, n: (a - b).sigmoid()[:n], "it is numbers with a fraction"),
        ("most_unsure", lambda *x: topk(*x).roll(1), "it is the right pairs, but in another order"),
        (
            "most_unsure",
            lambda *x: topk(*x).float(),
            "but the result is torch.float32; row numbers",
        ),
        ("most_unsure", lambda a, b, n: (a.abs() - b.abs()).abs().argsort()[:n], "their sign."),
        ("mixture", into_zeros, "but the result is torch.float32; numbers of pairs are used"),
        ("mixture", in_another_order, HOLDS + "the pairs of a list in another order than theirs"),
        ("mixture", lambda *x: with_cycles(*x).sort(1, True)[0], HOLDS + "the right pairs, but in"),
        ("mixture", lambda *x: with_cycles(*x)[1:], "A slice ends where its list does"),
    ],
)
def test_what_is_told_of_a_mistake_without_a_name(name, answer, message, capsys):
    assert message in run(name, answer, capsys)


def test_a_batch_that_came_out_short_hears_of_slices(capsys):
    def sliced(new, old, steps, batch_size, replay):
        k = rounded(batch_size, replay)
        counts = ((new, batch_size - k), (old, k))
        return torch.stack(
            [torch.cat([x[t * n : (t + 1) * n] for x, n in counts]) for t in range(steps)]
        )

    with pytest.raises(RuntimeError, match="equal size"):
        check_of("mixture")(sliced)
    assert "A slice ends where its list does" in capsys.readouterr().out


def test_a_division_by_nothing_hears_what_to_return(capsys):
    def unguarded(first, second):
        shares = counted(first, second)
        same = (shares[0][0] + shares[1][1]) / len(first)
        p, q = sum(shares[1]) / len(first), (shares[0][1] + shares[1][1]) / len(first)
        return kappa(same, p * q + (1 - p) * (1 - q))

    with pytest.raises(ZeroDivisionError):
        check_of("self_agreement")(unguarded)
    assert "no number: return 0, no agreement" in " ".join(capsys.readouterr().out.split())


# --- the rules ---


def second_exchanged_in_place(first, second):
    second.neg_().add_(1)
    return from_table(kappa)(first, 1 - second)


def scores_in_place(first_scores, second_scores, count):
    first_scores -= second_scores
    return first_scores.abs().argsort()[:count]


def old_in_place(new, old, steps, batch_size, replay):
    result = with_cycles(new, old, steps, batch_size, replay)
    old.zero_()
    return result


def test_a_choice_left_to_chance_is_noticed(capsys):
    def drawn(first_scores, second_scores, count):
        return torch.randperm(len(first_scores))[:count]

    torch.manual_seed(0)
    assert "the same arguments give another result the second time" in run(
        "most_unsure", drawn, capsys
    )


def misspelt(new, old, steps, batch_size, replay):
    return torch.arrange(steps)


def undivided(first, second):
    same = (first != second).float().mean().item()
    p, q = first.float().mean().item(), second.float().mean().item()
    chance = p * (1 - q) + (1 - p) * q
    return (same - chance) / (1 - chance)


class TestRules(Rules):
    modules = (lesson_06,)
    exercises = (lesson_06.SELF_AGREEMENT, lesson_06.MOST_UNSURE, lesson_06.MIXTURE)
    mistakes = MISTAKES
    right = RIGHT
    other_kinds = (
        (
            "self_agreement",
            lambda a, b: (a != b).float(),
            "it returned Tensor tensor([1., 1., 1., 0.]); return one number.",
        ),
        ("most_unsure", lambda a, b, n: (a - b).abs() < 1, "has shape [4], expected is [2]. It is"),
        ("most_unsure", lambda *x: topk(*x).tolist(), "it returned list [3, 0]"),
        ("mixture", lambda *x: with_cycles(*x).flatten(), "[8], expected is [2, 4]. It is one row"),
        ("mixture", lambda *x: with_cycles(*x).tolist(), "it returned list [[10, 11, 20, 21], "),
    )
    in_place = (
        ("self_agreement", second_exchanged_in_place, "second"),
        ("most_unsure", scores_in_place, "first_scores"),
        ("mixture", old_in_place, "old"),
    )
    unknown = (
        (
            "self_agreement",
            lambda a, b: lesson_06.self_agreement(a, b) ** 2 - 7,
            ("first tensor([0, 0, 1, 1])", "yours -6.75", "expected 0.5"),
        ),
        (
            "most_unsure",
            lambda a, b, n: torch.full((n,), 2),
            ("count 2", "yours tensor([2, 2])", "expected tensor([3, 0])"),
        ),
        (
            "mixture",
            lambda *x: with_cycles(*x).flip(0) + 1000,
            ("replay 0.5", "yours tensor([[1012,", "expected tensor([[10, 11, 20, 21],"),
        ),
    )
    failing = (
        ("mixture", misspelt, AttributeError, "return torch.arrange(steps)", "replay 0.5"),
        (
            "self_agreement",
            undivided,
            ZeroDivisionError,
            "(same - chance) / (1 - chance)",
            "first tensor([0, 0, 0])",
        ),
    )

    def family(self, message):
        """Each message is tested, also where several share a text."""
        return message


# --- the reference against what is known of it ---


def test_kappa_by_hand_and_at_its_ends():
    first, second = lesson_06._AGREEMENT_CASES[0]
    assert lesson_06.self_agreement(first, second) == pytest.approx(0.5)
    sides = torch.tensor([0, 1, 1, 0])
    assert lesson_06.self_agreement(sides, 1 - sides) == 1
    assert lesson_06.self_agreement(sides, sides) < 0
    always_left = torch.zeros(8, dtype=torch.int64)
    assert lesson_06.self_agreement(always_left, always_left) == 0


def test_kappa_of_clicks_at_random_is_near_0():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 2, (2, 10_000), generator=generator)
    assert abs(lesson_06.self_agreement(first, second)) < 0.03
