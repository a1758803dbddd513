"""What the tests of the exercise checks share: running a check, and what holds for every exercise.

A test file keeps its own answers, wrong and right: pairs (exercise's name, answer) or triples with
the beginning of the message.
"""

from rlhf_helpers import checks
from rlhf_helpers.checks import (
    lesson_01,
    lesson_02,
    lesson_03,
    lesson_04,
    lesson_05,
    lesson_06,
    lesson_08,
    lesson_09,
    lesson_10,
)
from rlhf_helpers.checks.exercise import name_mistake, same

UNNAMED = "not in a way that this check has a name for"
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
    """After a mistake without a name of its own: all texts of `shown`."""
    printed = run(name, answer, capsys)
    assert any(text in printed for text in (UNNAMED, *GENERAL))
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


def families():
    """Beginning and end of the messages that share a text, from the texts with a gap."""
    first = (lesson_01, lesson_02, lesson_03, lesson_04, lesson_05)
    lessons = (*first, lesson_06, lesson_08, lesson_09, lesson_10)
    texts = {text for lesson in lessons for text in vars(lesson.SAY).values()}
    return {(parts[0], parts[-1]) for text in texts if len(parts := text.split("{}")) > 1}


def family_of(message):
    """The family that the message belongs to; the message itself if to none."""
    for begin, end in families():
        if message.startswith(begin) and message.endswith(end):
            return begin, end
    return message


def assert_all_tested(messages, tested):
    """Each message by its beginning, or another one of its family."""
    seen = {family_of(m) for m in messages if any(m.startswith(start) for start in tested)}
    assert [m for m in messages if family_of(m) not in seen] == []


GENERAL = (
    "all is right up to",
    "it counts otherwise",
    "it is right where",
    "it is right but",
    "each row alone",
    "some ties count",
    "the advantages are right, the returns are not",
    "the returns are right, the advantages are not",
)


def assert_beginnings_differ(messages, tested):
    """Else a test of one message could pass on another; those of one family may begin alike."""
    for start in tested:
        found = {family_of(m) for m in messages if m.startswith(start)}
        assert len(found) == (not start.startswith((OTHERWISE_RIGHT, *GENERAL)))


def assert_say_why(messages):
    """And hold no code."""
    for message in messages:
        assert len(message.split()) > 8
        assert not any(code in message for code in CODE)
