"""What the tests of the exercise checks share: running a check, and the rules for every lesson.

A test file keeps its own answers, wrong and right, and holds its lesson to `Rules`.
"""

import doctest
import functools
import inspect
import re

import pytest
import torch

from rlhf_helpers import checks
from rlhf_helpers.checks.exercise import name_mistake, same

UNNAMED = "not in a way that this check has a name for"
# so begin the messages that show no case
OTHERWISE_RIGHT = ("the values are right", "it is right but where one has clicked the same side")
GENERAL = (  # so begin those that no mistake of the exercise has
    f"not right, and {UNNAMED}",
    "it gives NaN, which is no number. That comes of",
    "all is right up to",
    "it counts otherwise",
    "it is right at every real token",
    "it is right for moderate gaps",
    "it is right where",
    "it is right but",
    "each row alone",
    "some ties count",
    "the advantages are right, the returns are not",
    "the returns are right, the advantages are not",
)
CODE = ("[:", "clone(", ".T", "@", "==", "ceil(", "{")


def check_of(name):
    """The check of that exercise."""
    return getattr(checks, f"check_{name}")


def run(name, answer, capsys):
    """What the check of that exercise prints about the answer; line breaks become spaces."""
    assert check_of(name)(answer) is None
    return printed_about(name, capsys)


def printed_about(name, capsys):
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    return " ".join(printed.split())


def assert_mistake_is_named(name, answer, message, capsys):
    printed = run(name, answer, capsys)
    assert printed.startswith(f"{name}: {message}")
    if not message.startswith(OTHERWISE_RIGHT):
        assert " yours " in printed
        assert " expected " in printed


def assert_examples_run(module):
    """Of each check in the module at least one."""
    results = doctest.testmod(module)
    own = [fn for fn in vars(module).values() if getattr(fn, "__module__", "") == module.__name__]
    assert results.failed == 0
    assert results.attempted >= sum(fn.__name__.startswith("check_") for fn in own)


@functools.cache
def families():
    """Beginning and end of the messages that share a text with a gap, the longest first."""
    lessons = [module for module in vars(checks).values() if hasattr(module, "SAY")]
    texts = [re.split(r"{\w*}", text) for lesson in lessons for text in vars(lesson.SAY).values()]
    ends = {(parts[0], parts[-1]) for parts in texts if len(parts) > 1}
    return sorted(ends, key=lambda pair: (len(pair[0] + pair[1]), pair), reverse=True)


def family_of(message):
    """The family that the message belongs to; the message itself if to none."""
    for begin, end in families():
        if message.startswith(begin) and message.endswith(end):
            return begin, end
    return message


# --- answers to any exercise ---


def stub(*arguments):
    raise NotImplementedError


def dots(*arguments):
    return ...


def raised_by_a_helper(*arguments):
    return stub()


def raised_by_torch(*arguments):
    return torch.arange(2).softmax(0)


# --- the rules ---


def name_of(value):
    """An exercise's; for other parameters pytest finds one."""
    return getattr(value, "name", None)


def each(rows, arguments):
    """Asks a rule of each row of the list of that name."""

    def asked(rule):
        rule.rows = rows, arguments
        return rule

    return asked


class Rules:
    """What holds for every exercise with a check; `TestRules` of a test file gives its lists.

    Attributes:
        modules: those of the checks.
        exercises: as they stand there.
        further: exercise's name, a message that is not among its mistakes.
        mistakes: exercise's name, wrong answer, beginning of the message.
        right: exercise's name, right answer.
        other_kinds: exercise's name, answer, what is said of its shape or type.
        in_place: exercise's name, answer, argument that it changes.
        unknown: exercise's name, answer, all that is shown of a mistake without a name.
        failing: exercise's name, answer, its error, the line, something of the call.
    """

    further = ()

    def pytest_generate_tests(self, metafunc):
        rows, arguments = metafunc.function.rows
        metafunc.parametrize(arguments, getattr(self, rows), ids=name_of)

    @property
    def names(self):
        return [exercise.name for exercise in self.exercises]

    @property
    def with_cases(self):
        return [exercise for exercise in self.exercises if exercise.cases]

    @property
    def with_mistakes(self):
        return [exercise for exercise in self.exercises if exercise.mistakes]

    def messages(self, name):
        (exercise,) = (exercise for exercise in self.exercises if exercise.name == name)
        further = {message for other, message in self.further if other == name}
        return {message for _, message in exercise.mistakes} | further

    def expected(self, name):
        """The beginnings of messages that the tests expect for that exercise."""
        return {message for other, _, message in self.mistakes if other == name}

    def family(self, message):
        """What one test is enough for."""
        return family_of(message)

    def right_answer(self, name):
        """The first right answer to that exercise."""
        return next(answer for other, answer in self.right if other == name)

    @each("modules", "module")
    def test_doctests(self, module):
        assert_examples_run(module)

    @each("mistakes", "name, answer, message")
    def test_a_known_mistake_is_named(self, name, answer, message, capsys):
        assert_mistake_is_named(name, answer, message, capsys)

    @each("right", "name, answer")
    def test_a_right_answer_passes(self, name, answer, capsys):
        printed = run(name, answer, capsys)
        assert printed.startswith(f"{name}: correct")
        assert ". Tested: " in printed

    @each("right", "name, answer")
    def test_a_check_leaves_its_cases_as_they_are(self, name, answer, capsys):
        before = [repr(exercise.cases) for exercise in self.exercises]
        run(name, answer, capsys)
        assert [repr(exercise.cases) for exercise in self.exercises] == before

    @each("names", "name")
    def test_at_least_five_mistakes_have_a_name(self, name):
        assert len(self.messages(name)) >= 5

    @each("with_mistakes", "exercise")
    def test_no_two_mistakes_with_different_messages_look_alike(self, exercise):
        """Or the first of them would be named for both."""
        right = [exercise.reference(*case) for case in exercise.cases]
        for wrong, message in exercise.mistakes:
            results = [wrong(*case) for case in exercise.cases]
            assert name_mistake(exercise, results) == message
            assert not all(same(got, want) for got, want in zip(results, right, strict=True))

    @each("names", "name")
    def test_every_message_has_a_test(self, name):
        """Each by its beginning, or another one of its family."""
        messages = self.messages(name)
        starts = tuple(self.expected(name))
        seen = {self.family(message) for message in messages if message.startswith(starts)}
        assert [message for message in messages if self.family(message) not in seen] == []

    @each("names", "name")
    def test_no_message_begins_like_another(self, name):
        """Else a test of one could pass on another; those of one family may begin alike."""
        for start in self.expected(name):
            found = {self.family(m) for m in self.messages(name) if m.startswith(start)}
            assert len(found) < 2
            assert found or start.startswith((*OTHERWISE_RIGHT, *GENERAL))

    @each("names", "name")
    def test_messages_say_why_and_hold_no_code(self, name):
        for message in self.messages(name):
            assert len(message.split()) > 8
            assert not any(code in message for code in CODE)

    @each("names", "name")
    @pytest.mark.parametrize("answer", [stub, dots, ...])
    def test_unattempted_says_so(self, name, answer, capsys):
        assert run(name, answer, capsys) == f"{name}: not attempted yet."

    @each("names", "name")
    @pytest.mark.parametrize("answer", [raised_by_a_helper, raised_by_torch])
    def test_a_not_implemented_error_from_elsewhere_is_an_exception(self, name, answer, capsys):
        with pytest.raises(NotImplementedError):
            check_of(name)(answer)
        printed = printed_about(name, capsys)
        assert printed.startswith(f"{name}: NotImplementedError in your line ")
        assert "not attempted" not in printed

    @each("names", "name")
    def test_a_result_in_place_of_the_function_is_named(self, name, capsys):
        assert f"{name}: give the check the function itself" in run(name, 3, capsys)

    @each("with_cases", "exercise")
    def test_none_is_named(self, exercise, capsys):
        printed = run(exercise.name, lambda *arguments: None, capsys)
        assert f"{exercise.name}: it returned None." in printed

    @each("with_cases", "exercise")
    def test_a_result_of_another_kind_is_named(self, exercise, capsys):
        printed = run(exercise.name, lambda *arguments: [1, 2, 3], capsys)
        count = "two" if exercise.parts else "one"
        assert f"{exercise.name}: it returned list [1, 2, 3]; return {count} " in printed

    @each("other_kinds", "name, answer, message")
    def test_a_result_of_another_shape_or_kind_is_named(self, name, answer, message, capsys):
        assert message in run(name, answer, capsys)

    @each("in_place", "name, answer, argument")
    def test_an_argument_changed_in_place_is_named(self, name, answer, argument, capsys):
        """And the next answer is checked on whole cases."""
        printed = run(name, answer, capsys)
        assert f"{name}: it changes its argument {argument} in place" in printed
        assert "correct" in run(name, self.right_answer(name), capsys)

    @each("unknown", "name, answer, shown")
    def test_an_unknown_mistake_shows_the_case(self, name, answer, shown, capsys):
        printed = run(name, answer, capsys)
        assert any(text in printed for text in GENERAL)
        assert all(text in printed for text in shown)

    @each("failing", "name, answer, error, line, call")
    def test_an_exception_names_call_and_line_and_is_raised_again(
        self, name, answer, error, line, call, capsys
    ):
        with pytest.raises(error) as caught:
            check_of(name)(answer)
        assert answer.__code__ in [entry.frame.code.raw for entry in caught.traceback]
        lines, first = inspect.getsourcelines(answer)
        (number,) = (first + place for place, text in enumerate(lines) if line in text)
        printed = printed_about(name, capsys)
        assert printed.startswith(f"{name}: {error.__name__} in your line {number}: ")
        said, given = printed.split(" on this call: ")
        assert line in said
        assert call in given


class GradientRules(Rules):
    """And what holds where gradients are checked.

    Attributes:
        lost: exercise's name, answer with right values and without the gradient.
    """

    @each("lost", "name, answer")
    def test_gradients_are_checked_where_they_are_switched_off(self, name, answer, capsys):
        with torch.no_grad():
            assert "correct" in run(name, self.right_answer(name), capsys)
            assert "gradient" in run(name, answer, capsys)
