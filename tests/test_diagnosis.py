"""The recorded training logs of exercise 03, and the check of their diagnosis."""

import doctest

import pytest

from rlhf_helpers import checks
from rlhf_helpers.checks import diagnosis

RIGHT = {"A": "penalty sign", "B": "reference ratio", "C": "fresh old"}


def test_doctests():
    results = doctest.testmod(diagnosis)
    assert results.attempted > 0 and results.failed == 0


def test_each_log_shows_its_fault_and_the_healthy_one_shows_none():
    """What the exercise asks to see, asserted on the recorded numbers."""
    logs = {name: checks.training_log(name) for name in ("healthy", "A", "B", "C")}
    for name, rows in logs.items():
        assert [row["update"] for row in rows] == list(range(1, 11))
        exact = all(row["first_ratio"] == 1 for row in rows)
        clipped = any(row["clip_fraction"] > 0 for row in rows)
        assert exact == (name != "B")
        assert clipped == (name != "C")
        assert (rows[-1]["kl"] > 10) == (name == "A")
        assert rows[0]["kl"] == 0
    columns = ("score", "length", "explained_variance", "value_loss")
    for name in "ABC":  # what two of the refusals rest on
        assert all(logs[name][0][key] == logs["healthy"][0][key] for key in columns)
    assert max(row["score"] for row in logs["A"]) > max(row["score"] for row in logs["healthy"])
    assert logs["B"][-1]["score"] < logs["healthy"][-1]["score"] - 0.5


def test_right_answers(capsys):
    checks.check_diagnosis(RIGHT)
    printed = capsys.readouterr().out
    assert [line.split(",")[0] for line in printed.splitlines()] == [
        f"{log}: correct" for log in "ABC"
    ]


@pytest.mark.parametrize(
    ("fault", "evidence"),
    [
        ("reference ratio", "first_ratio is 1 throughout"),
        ("fresh old", "clip_fraction is between 0.0065 and 0.0581"),
        ("whitened returns", "the first row is that of the healthy run"),
        ("idle critic", "it goes from -0.469 to 0.173"),
    ],
)
def test_a_wrong_answer_hears_what_speaks_against_it(fault, evidence, capsys):
    checks.check_diagnosis(RIGHT | {"A": fault})
    printed = capsys.readouterr().out
    assert printed.startswith(f"A: it is not that {checks.FAULTS[fault]}")
    assert evidence in printed


def test_faults_that_are_in_no_log_are_refuted_too(capsys):
    checks.check_diagnosis(RIGHT | {"B": "penalty sign", "C": "no EOS"})
    printed = capsys.readouterr().out
    assert "in this log kl is at most 0.537, and 0.0876 at the end" in printed
    assert printed.endswith("does nothing while the policy is still the reference.\n")


def test_stubs_are_not_attempted(capsys):
    checks.check_diagnosis(dict.fromkeys("ABC", ...))
    assert capsys.readouterr().out.count("not attempted yet") == 3


def test_capitals_and_spaces_do_not_count(capsys):
    checks.check_diagnosis({"A": "Penalty Sign", "B": " referenceratio", "C": "fresh  old\n"})
    assert capsys.readouterr().out.count("correct") == 3


@pytest.mark.parametrize("answer", ["gremlins", ["penalty sign", "idle critic"], None, 3, ""])
def test_an_answer_that_is_no_fault_is_named(answer, capsys):
    checks.check_diagnosis(RIGHT | {"B": answer})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"B: {answer!r} is none of the list; choose from ['reference")
    assert [line.split(",")[0] for line in lines[::2]] == ["A: correct", "C: correct"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no answer for log 'C'"):
        checks.check_diagnosis({"A": ..., "B": ...})
    with pytest.raises(ValueError, match="there is no log 'D'"):
        checks.training_log("D")
