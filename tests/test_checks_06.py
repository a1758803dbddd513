"""The checks of lesson 06: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import doctest
import math
from itertools import cycle

import helpers_checks as shared
import numpy as np
import pytest
import torch
from helpers_checks import run

from rlhf_helpers.checks import lesson_06

EXERCISES = (lesson_06.SELF_AGREEMENT, lesson_06.MOST_UNSURE, lesson_06.MIXTURE)
NAMES = [exercise.name for exercise in EXERCISES]


def test_doctests():
    results = doctest.testmod(lesson_06)
    assert results.attempted == 3
    assert results.failed == 0


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
    (IT_IS + "divided by the share", from_table(lambda same, chance: (same - chance) / same)),
    (IT_IS + "corrected for a chance of one half", lambda a, b: 2 * agreeing(a, b) - 1),
    (IT_IS + "corrected for a chance made of both", with_chance(pooled)),
    (IT_IS + "corrected for one way only", with_chance(lambda p, q: p * q)),
    (IT_IS + "corrected for one way only", with_chance(lambda p, q: (1 - p) * (1 - q))),
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


@pytest.mark.parametrize(("name", "answer", "message"), MISTAKES)
def test_a_known_mistake_is_named(name, answer, message, capsys):
    printed = run(name, answer, capsys)
    assert printed.startswith(f"{name}: {message}")
    if answer is not nan_where_nothing_is_left:
        shared.assert_mistake_is_named(name, answer, message, capsys)


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_passes(name, answer, capsys):
    assert run(name, answer, capsys).startswith(f"{name}: correct. Tested: ")


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_each_part_names_at_least_five_mistakes(exercise):
    assert len(shared.messages_of(exercise)) >= 5


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_no_two_mistakes_with_different_messages_look_alike(exercise):
    shared.assert_mistakes_differ(exercise)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_message_has_a_test(exercise):
    """Each by itself, also those that share a text with a gap."""
    tested = shared.expected_messages(exercise.name, MISTAKES)
    messages = shared.messages_of(exercise)
    assert [m for m in messages if not any(m.startswith(start) for start in tested)] == []
    for start in tested - {"it is right but where one has clicked the same side"}:
        assert len([m for m in messages if m.startswith(start)]) == 1


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_messages_say_why_and_hold_no_code(exercise):
    shared.assert_say_why(shared.messages_of(exercise))


# --- not attempted, structural faults ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", shared.UNATTEMPTED)
def test_unattempted_says_so(name, answer, capsys):
    assert run(name, answer, capsys) == f"{name}: not attempted yet."


@pytest.mark.parametrize("name", NAMES)
def test_none_is_named(name, capsys):
    assert f"{name}: it returned None." in run(name, lambda *arguments: None, capsys)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_in_place_of_the_function_is_named(name, capsys):
    assert f"{name}: give the check the function itself" in run(name, 3, capsys)


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        (
            "self_agreement",
            lambda a, b: (a != b).float(),
            "it returned Tensor tensor([1., 1., 1., 0.]); return one number.",
        ),
        ("most_unsure", lambda a, b, n: (a - b).abs() < 1, "has shape [4], expected is [2]. It is"),
        ("most_unsure", lambda *x: topk(*x).tolist(), "it returned list [3, 0]"),
        ("mixture", lambda *x: with_cycles(*x).flatten(), "[8], expected is [2, 4]. It is one row"),
        ("mixture", lambda *x: with_cycles(*x).tolist(), "it returned list [[10, 11, 20, 21], "),
    ],
)
def test_a_result_of_another_shape_or_kind_is_named(name, answer, message, capsys):
    assert message in run(name, answer, capsys)


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


@pytest.mark.parametrize(
    ("name", "answer", "argument"),
    [
        ("self_agreement", second_exchanged_in_place, "second"),
        ("most_unsure", scores_in_place, "first_scores"),
        ("mixture", old_in_place, "old"),
    ],
)
def test_an_argument_changed_in_place_is_named(name, answer, argument, capsys):
    shared.assert_change_in_place_is_named(name, answer, argument, RIGHT, capsys)


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_check_leaves_its_cases_as_they_are(name, answer, capsys):
    shared.assert_cases_stay(EXERCISES, name, answer, capsys)


# --- the unknown, chance, and exceptions ---


@pytest.mark.parametrize(
    ("name", "answer", "case", "yours", "expected"),
    [
        (
            "self_agreement",
            lambda a, b: lesson_06.self_agreement(a, b) ** 2 - 7,
            "first tensor([0, 0, 1, 1])",
            "yours -6.75",
            "expected 0.5",
        ),
        (
            "most_unsure",
            lambda a, b, n: torch.full((n,), 2),
            "count 2",
            "yours tensor([2, 2])",
            "expected tensor([3, 0])",
        ),
        (
            "mixture",
            lambda *x: with_cycles(*x).flip(0) + 1000,
            "replay 0.5",
            "yours tensor([[1012,",
            "expected tensor([[10, 11, 20, 21],",
        ),
    ],
)
def test_an_unknown_mistake_shows_the_case(name, answer, case, yours, expected, capsys):
    shared.assert_case_is_shown(name, answer, (case, yours, expected), capsys)


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


@pytest.mark.parametrize(
    ("name", "answer", "error", "line"),
    [
        ("mixture", misspelt, AttributeError, "return torch.arrange(steps)"),
        ("self_agreement", undivided, ZeroDivisionError, "(same - chance) / (1 - chance)"),
    ],
)
def test_an_exception_names_call_and_line_and_is_raised_again(name, answer, error, line, capsys):
    with pytest.raises(error):
        shared.check_of(name)(answer)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"{name}: {error.__name__} in your line ")
    assert line in printed
    assert " on this call: " in printed


@pytest.mark.parametrize("name", NAMES)
def test_a_not_implemented_error_from_elsewhere_is_an_exception(name, capsys):
    with pytest.raises(NotImplementedError):
        shared.check_of(name)(shared.raised_by_a_helper)
    assert "not attempted" not in capsys.readouterr().out


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
