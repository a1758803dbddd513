"""What the tests of the exercise checks share: running a check, and what holds for every exercise.

A test file keeps its own answers, wrong and right: pairs (exercise's name, answer) or triples with
the beginning of the message.
"""

from rlhf_helpers import checks
from rlhf_helpers.checks.exercise import name_mistake, same

OTHERWISE_RIGHT = "the values are right"  # so begin the messages that show no case
CODE = ("[:", "clone(", ".T", "@", "==", "ceil(", "{")


def check_of(name):
    """The check of that exercise."""
    return getattr(checks, f"check_{name}")


def run(name, answer, capsys):
    """What the check of that exercise prints about the answer; line breaks become spaces."""
    assert check_of(name)(answer) is None
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    return " ".join(printed.split())


def right_answer(name, right):
    """The first right answer to that exercise."""
    return next(answer for other, answer in right if other == name)


# --- answers to any exercise ---


def stub(*arguments):
    raise NotImplementedError


def dots(*arguments):
    return ...


def raised_by_a_helper(*arguments):
    return stub()


UNATTEMPTED = [stub, dots, ...]


# --- what holds for every answer ---


def assert_mistake_is_named(name, answer, message, capsys):
    printed = run(name, answer, capsys)
    assert printed.startswith(f"{name}: {message}")
    if not message.startswith(OTHERWISE_RIGHT):
        assert " yours " in printed
        assert " expected " in printed


def assert_case_is_shown(name, answer, shown, capsys):
    """After a mistake without a name: all texts of `shown`."""
    printed = run(name, answer, capsys)
    assert "not in a way that this check has a name for" in printed
    assert all(text in printed for text in shown)


def assert_change_in_place_is_named(name, answer, argument, right, capsys):
    """And the next answer is checked on whole cases."""
    printed = run(name, answer, capsys)
    assert f"{name}: it changes its argument {argument} in place" in printed
    assert "correct" in run(name, right_answer(name, right), capsys)


def assert_cases_stay(exercises, name, answer, capsys):
    before = [repr(exercise.cases) for exercise in exercises]
    run(name, answer, capsys)
    assert [repr(exercise.cases) for exercise in exercises] == before


# --- what holds for every exercise ---


def messages_of(exercise):
    return {message for _, message in exercise.mistakes}


def expected_messages(name, mistakes):
    """The beginnings of messages that the tests expect for that exercise."""
    return {message for other, _, message in mistakes if other == name}


def assert_mistakes_differ(exercise):
    """Those with different messages, or the first of them would be named for both."""
    right = [exercise.reference(*case) for case in exercise.cases]
    for wrong, message in exercise.mistakes:
        results = [wrong(*case) for case in exercise.cases]
        assert name_mistake(exercise, results) == message
        assert not all(same(got, want) for got, want in zip(results, right, strict=True))


def assert_all_tested(messages, tested):
    assert [m for m in messages if not any(m.startswith(start) for start in tested)] == []


def assert_beginnings_differ(messages, tested):
    """Else a test of one message could pass on another."""
    for start in tested:
        found = sum(message.startswith(start) for message in messages)
        assert found == (not start.startswith(OTHERWISE_RIGHT))


def assert_say_why(messages):
    """And hold no code."""
    for message in messages:
        assert len(message.split()) > 8
        assert not any(code in message for code in CODE)
