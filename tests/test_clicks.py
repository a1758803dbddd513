"""Clicks: what is asked, what is saved, what a kill leaves, what reaches training, bad input."""

import doctest
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import ipywidgets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_helpers import clicks as module
from rlhf_helpers import clicks_file, clicks_panel, clicks_questions
from rlhf_helpers.clicks import Clicks, simulated
from rlhf_helpers.clicks_file import RowFile
from rlhf_helpers.clicks_questions import GAP
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.rubric import gold_reward
from rlhf_helpers.sources import preference_dataset

TALK = [
    {"role": "user", "content": "what is tea?"},
    {"role": "assistant", "content": "a drink."},
    {"role": "user", "content": "and coffee?"},
]


def pairs(count=60, answer="it is"):
    """Questions with a right and a wrong answer, the right one first in every pair."""
    numbers = range(count)
    return [(f"what is {n} plus 0?", f"{answer} {n}.", f"no {answer} {n + 1}.") for n in numbers]


def gold(prompt, answer):
    return 0.0 if answer.startswith("no") else 1.0


def decided(clicks):
    return [row for row in clicks.rows if row["side"] and not row["repeat"]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "clicks.jsonl"


@pytest.fixture
def aside(tmp_path):
    return tmp_path / "clicks.aside.jsonl"


@pytest.mark.parametrize("part", [module, clicks_file])
def test_doctests(part):
    results = doctest.testmod(part)
    assert results.attempted and not results.failed


# --- what is asked -------------------------------------------------------------------------


def test_repeats_come_later_with_the_sides_exchanged():
    clicks = Clicks(pairs(), repeats=8)
    assert len(clicks.questions) == 68
    assert [q.number for q in clicks.questions] == list(range(68))
    again = [q for q in clicks.questions if q.repeat]
    assert len({q.pair for q in again}) == 8
    for question in again:
        before = next(q for q in clicks.questions if q.pair == question.pair)
        assert (before.first, before.second) == (question.second, question.first)
        assert question.number - before.number > GAP


def test_sides_are_drawn_by_the_seed():
    def left(seed):  # how often the answer given first is shown first
        questions = Clicks(pairs(400), seed=seed, repeats=0).questions
        return [q.first.startswith("it") for q in questions]

    assert left(0) == left(0) != left(1)
    assert 160 < sum(left(0)) < 240  # four standard deviations


@pytest.mark.parametrize("count", [4, 5, 9, 20])
def test_few_pairs_have_fewer_repeats(count):
    clicks = Clicks(pairs(count), repeats=99)
    again = [q.pair for q in clicks.questions if q.repeat]
    assert len(set(again)) == len(again) == count - min(GAP, count // 2)
    assert not Clicks(pairs(count), repeats=0).questions[-1].repeat


def test_pairs_without_a_choice_are_left_out_and_counted(capsys):
    useless = [("a?", "same.", " same. "), ("b?", "", "an answer."), ("c?", "x.", "\ud800")]
    clicks = Clicks([*useless, *pairs(4)])
    assert clicks.pairs == pairs(4)
    said = capsys.readouterr().out
    assert "4 pairs are used" in said
    assert "1 of two equal answers, 1 with an empty answer, 1 with half of a character" in said


# --- what is saved -------------------------------------------------------------------------


def test_each_choice_is_a_row_in_the_file_at_once(path, aside):
    clicks = Clicks(pairs(), path, repeats=0)
    clicks.record("first")
    clicks.record("second")
    clicks.record(None)
    first, second = map(json.loads, path.read_text("utf-8").splitlines())
    (undecided,) = map(json.loads, aside.read_text("utf-8").splitlines())
    asked = clicks.questions
    assert (first["chosen"], first["rejected"]) == (asked[0].first, asked[0].second)
    assert (second["chosen"], second["rejected"]) == (asked[1].second, asked[1].first)
    assert [row["side"] for row in (first, second, undecided)] == ["first", "second", None]
    assert first["prompt"] == asked[0].prompt and first["seconds"] >= 0
    assert not first["repeat"] and first["by"] == "person"
    assert clicks.rows == [first, second, undecided]


def test_a_session_goes_on_where_it_was(path):
    Clicks(pairs(), path).click_through(simulated(gold), limit=5)
    clicks = Clicks(pairs(), path)
    assert len(clicks.rows) == 5 and clicks.show_next().number == 5
    assert {row["by"] for row in clicks.rows} == {"simulated"}
    clicks.click_through(simulated(gold))
    at_once = Clicks(pairs())
    at_once.click_through(simulated(gold))
    assert [row | {"seconds": 0} for row in clicks.rows] == [
        row | {"seconds": 0} for row in at_once.rows
    ]
    assert clicks.show_next() is None


def test_what_the_file_holds_is_what_is_trained_on(path, pocket):
    clicks = Clicks(pairs(), path, repeats=8)
    shown = iter(range(100))
    clicks.click_through(lambda *_: [None, "first", "second"][next(shown) % 3])
    assert any(row["repeat"] and row["side"] for row in clicks.rows)
    read = preference_dataset(pocket, source=str(path)).to_list()
    assert read == clicks.preferences().to_list()
    assert len(read) == len(decided(clicks)) < 60
    for row in read:
        assert {row["chosen"], row["rejected"]} in [set(pair[1:]) for pair in clicks.pairs]


def test_dialogues_are_kept_and_saved_as_messages(path, pocket, capsys):
    answers = [(f"yes {n}.", f"no {n}.") for n in range(5)]
    clicks = Clicks([(TALK, *both) for both in answers], path, repeats=0)
    clicks_panel.ask(clicks, typed("1", "2", "1", "1", "1"))
    assert "user: what is tea?\nassistant: a drink.\nuser: and coffee?" in capsys.readouterr().out
    read = preference_dataset(pocket, source=str(path)).to_list()
    assert [row["prompt"] for row in read] == [TALK] * 5
    assert read[0]["chosen"] == [{"role": "assistant", "content": clicks.questions[0].first}]
    assert read == clicks.preferences().to_list()


def test_answers_may_be_messages():
    answers = [[{"role": "assistant", "content": text}] for text in ("yes.", "no.")]
    clicks = Clicks([(TALK, *answers)] * 4)
    assert {clicks.questions[0].first, clicks.questions[0].second} == {"yes.", "no."}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["first", "second", None, "undo", "restart"]), max_size=40))
def test_any_sequence_of_choices_undone_and_restarts(actions):
    """The file always holds what a list with pop and append holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clicks.jsonl"
        clicks, sides = Clicks(pairs(8), path, repeats=4), []
        for action in actions:
            if action == "restart":
                clicks = Clicks(pairs(8), path, repeats=4)
            elif action == "undo":
                assert clicks.undo() == bool(sides)
                sides = sides[:-1]
            elif len(sides) < 12:
                clicks.record(action)
                sides.append(action)
            else:
                with pytest.raises(ValueError, match="all 12 questions are answered"):
                    clicks.record(action)
        again = Clicks(pairs(8), path, repeats=4)
        assert [row["side"] for row in again.rows] == sides
        assert [row["number"] for row in again.rows] == list(range(len(sides)))
        assert again.rows == clicks.rows


def test_each_choice_is_on_the_disk_before_the_next(path, monkeypatch):
    calls, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(sync(file)))
    clicks = Clicks(pairs(), path)
    clicks.record("first")
    clicks.record(None)
    clicks.undo()
    assert len(calls) == 3


def test_choosing_and_saving_takes_under_50_milliseconds(path):
    clicks, times = Clicks(pairs(120), path), []
    while question := clicks.show_next():
        start = time.perf_counter()
        clicks.record("first" if question.number % 2 else None)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.05


# --- what a kill leaves --------------------------------------------------------------------

SCRIPT = ["first", None, "second", "undo", "second", "first", "undo", None] * 12


def state_after(actions):
    sides = []
    for action in actions:
        sides = sides[:-1] if action == "undo" else [*sides, action]
    return sides


def act(clicks, action):
    if action == "undo":
        clicks.undo()
    else:
        clicks.record(action)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_kill_at_any_moment_loses_nothing(path):
    """A child acts and reports each action that is done; it is killed 40 times, at random."""
    rng, done = random.Random(0), 0
    for _ in range(40):
        reports, written = os.pipe()
        child = os.fork()
        if not child:
            try:
                clicks = Clicks(pairs(60), path, repeats=0)
                for action in SCRIPT[done:]:
                    act(clicks, action)
                    os.write(written, b".")
            finally:
                os._exit(0)
        os.close(written)
        os.read(reports, 1)  # it has begun
        time.sleep(rng.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reports, "rb") as rest:
            done += 1 + len(rest.read())
        sides = [row["side"] for row in Clicks(pairs(60), path, repeats=0).rows]
        if sides != state_after(SCRIPT[:done]):  # saved, and killed before it was reported
            done += 1
            assert sides == state_after(SCRIPT[:done])
        if done > len(SCRIPT) - 20:
            done = 0
            path.unlink()
            path.with_suffix(".aside.jsonl").unlink(missing_ok=True)


def test_a_write_that_fails_changes_nothing(path, monkeypatch):
    clicks = Clicks(pairs(), path)
    clicks.record("first")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        clicks.show_next()
        clicks._shown_at -= 5
        for action in (lambda: clicks.record("second"), clicks.undo):
            with pytest.raises(OSError, match=r"cannot be written .*No space left.*Make room"):
                action()
    assert path.read_bytes() == before and len(clicks.rows) == 1
    clicks.record("second")
    assert clicks.rows[1]["seconds"] >= 5  # the time counts from when the question was shown
    assert len(Clicks(pairs(), path).rows) == 2


@pytest.mark.parametrize("cut", [1, "inside é", -2])
def test_a_half_written_last_line_is_left_out_with_a_notice(path, cut, capsys):
    Clicks(pairs(answer="é"), path, repeats=0).click_through(simulated(gold), limit=5)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    end = lines[4].index("é".encode()) + 1 if isinstance(cut, str) else cut
    path.write_bytes(b"".join(lines[:4]) + lines[4][:end])
    clicks = Clicks(pairs(answer="é"), path, repeats=0)
    assert "its last line, 5, is cut and was left out" in capsys.readouterr().out
    assert clicks.show_next().number == 4
    clicks.click_through(simulated(gold), limit=1)
    again = path.read_text("utf-8").splitlines()
    assert again[:4] == content.decode().splitlines()[:4] and len(again) == 5


def test_a_last_line_without_its_newline_is_whole(path, capsys):
    Clicks(pairs(), path, repeats=0).click_through(simulated(gold), limit=3)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert len(Clicks(pairs(), path, repeats=0).rows) == 3
    assert not capsys.readouterr().out


def test_a_second_panel_on_the_same_file_cannot_overwrite_the_first(path):
    old, new = Clicks(pairs(), path), Clicks(pairs(), path)
    new.record("first")
    before = path.read_bytes()
    for action in (lambda: old.record("second"), lambda: old.record(None)):
        with pytest.raises(RuntimeError, match="changed since this session read it"):
            action()
    assert path.read_bytes() == before and not old.rows


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "drive" / "mine.jsonl", tmp_path / "clicks.jsonl"
    target.parent.mkdir()
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("this system makes no links")
    Clicks(pairs(), link).record("first")
    assert link.is_symlink() and target.read_bytes().count(b"\n") == 1


# --- what has come of it -------------------------------------------------------------------


def test_agreement_counts_the_answer_and_not_the_side():
    honest, lefty = Clicks(pairs(), repeats=8), Clicks(pairs(), repeats=8)
    honest.click_through(simulated(gold))
    lefty.click_through(lambda *_: "first")
    assert honest.agreement() == (8, 8)
    assert lefty.agreement() == (0, 8)


def test_agreement_leaves_out_what_was_not_decided_twice():
    clicks = Clicks(pairs(), repeats=8)
    clicks.click_through(lambda prompt, first, second: None if "1" in prompt else "first")
    twice = {q.pair for q in clicks.questions if q.repeat}
    assert clicks.agreement() == (0, sum("1" not in clicks.pairs[i][0] for i in twice))


def test_progress_has_the_time_left_at_the_median_pace(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    clicks = Clicks(pairs(60), repeats=0)
    assert clicks.progress() == "0 of 60 done"
    for seconds in (10, 30, 300):  # the last is a break, which the median passes over
        clicks.show_next()
        now += seconds
        clicks.record("first")
    assert [row["seconds"] for row in clicks.rows] == [10, 30, 300]
    assert clicks.progress() == "3 of 60 done, about 28 min left"


@pytest.mark.parametrize(
    "seconds, words",
    [(60, "about 1 min left"), (59, "under 1 min left"), (150, "about 2 min left")],
)
def test_progress_before_the_last_question(monkeypatch, seconds, words):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    clicks = Clicks(pairs(5), repeats=0)
    for _ in range(4):
        now += seconds
        clicks.record("first")  # the next question is shown from now on
    assert clicks.progress() == f"4 of 5 done, {words}"
    clicks.record("first")
    assert clicks.progress() == "5 of 5 done"


def test_seconds_are_kept_to_a_hundredth(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    clicks = Clicks(pairs(5))
    now = 1.2345
    assert clicks.seconds_shown() == 1.2345
    clicks.record("first")
    assert clicks.rows[0]["seconds"] == 1.23


def test_what_is_not_given_is_seed_0_and_8_repeats():
    assert Clicks(pairs()).session == Clicks(pairs(), None, 0, 8).session
    careless, numbers = simulated(gold, wrong=0.5), range(20)
    asked = [(f"{n}?", "so.", "no.") for n in numbers]
    again = simulated(gold, 0.0, 0.5, 0)
    assert [careless(*question) for question in asked] == [again(*question) for question in asked]


def test_four_choices_of_one_side_come_by_chance_once_in_8_times():
    clicks = Clicks(pairs(), repeats=0)
    clicks.click_through(lambda *_: "first", limit=3)
    assert clicks.one_sided() is None
    clicks.click_through(lambda *_: "first", limit=1)
    assert "all 4 choices are the first" in clicks.one_sided()
    assert "once in 8 times" in clicks.one_sided()


def test_a_limit_of_none_or_0_questions():
    clicks = Clicks(pairs(5), repeats=0)
    clicks.click_through(simulated(gold), limit=0)
    assert clicks.rows == []
    clicks.click_through(simulated(gold))
    assert len(clicks.rows) == 5


def test_a_person_who_always_takes_one_side_is_warned(path):
    clicks = Clicks(pairs(), path)
    clicks.click_through(lambda *_: "second", limit=8)
    kept = len(decided(clicks))
    with pytest.warns(UserWarning, match=f"all {kept} choices are the second.*position bias"):
        clicks.preferences()
    clicks.click_through(lambda *_: "first", limit=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(clicks.preferences()) == len(decided(clicks))


@pytest.mark.parametrize(
    "choices, words",
    [
        ([], "only 0 of 60 pairs are decided; choose between at least 4"),
        ([None] * 6, "only 0 of 60 pairs are decided, all 'cannot tell'"),
        (["first", None, "second", "first"], "only 3 of 60 pairs are decided, 1 'cannot tell'"),
    ],
)
def test_too_few_decided_pairs_are_not_trained_on(path, choices, words):
    clicks = Clicks(pairs(), path, repeats=0)
    for choice in choices:
        clicks.record(choice)
    with pytest.raises(ValueError, match=words):
        clicks.preferences()
    assert len(Clicks(pairs(), path, repeats=0).rows) == len(choices)


# --- who answers ---------------------------------------------------------------------------


def share_right(clicker, count=1000):
    clicks = Clicks(pairs(count), repeats=0)
    clicks.click_through(clicker)
    return statistics.mean(gold("", row["chosen"]) for row in clicks.rows)


def test_simulated_clickers_honest_careless_and_noisy():
    assert share_right(simulated(gold)) == 1
    assert abs(share_right(simulated(gold, wrong=0.2)) - 0.8) < 0.05  # four standard deviations
    assert abs(share_right(simulated(gold, temperature=1.0)) - 0.731) < 0.056  # σ(1)
    assert abs(share_right(simulated(gold, temperature=0.5)) - 0.881) < 0.041  # σ(2)
    assert share_right(simulated(gold, wrong=0.2)) == share_right(simulated(gold, wrong=0.2))
    assert share_right(simulated(gold, wrong=0.2)) != share_right(
        simulated(gold, wrong=0.2, seed=1)
    )


def test_a_simulated_clicker_cannot_tell_answers_of_one_score():
    assert simulated(lambda prompt, answer: 1.0)("why?", "a.", "b.") is None


def test_a_simulated_clicker_answers_the_same_after_a_restart(path):
    careless = {"score": gold, "wrong": 0.4}
    Clicks(pairs(), path).click_through(simulated(**careless), limit=20)
    Clicks(pairs(), path).click_through(simulated(**careless))
    at_once = Clicks(pairs())
    at_once.click_through(simulated(**careless))
    assert [r["side"] for r in Clicks(pairs(), path).rows] == [r["side"] for r in at_once.rows]


def test_the_pocket_annotator_is_a_biased_clicker():
    plain, polite = "it says quack.", "it says quack. have a nice day! thank you for asking."
    prompt, annotator = "what does the duck say?", Annotator()
    honest = simulated(lambda p, answer: gold_reward(p, answer).total)
    biased = simulated(annotator.utility)
    grovelling = polite + " have a nice day!"
    assert honest(prompt, plain, grovelling) == "first"
    assert biased(prompt, plain, grovelling) == "second"
    drawn = simulated(annotator.utility, temperature=annotator.temperature)
    several = [(f"{n}?", plain, polite) for n in range(4)]
    assert Clicks(several).click_through(lambda p, *both: drawn(prompt, *both)) is None


def test_the_core_does_not_import_the_pocket_world():
    for part in (module, clicks_file, clicks_panel, clicks_questions):
        assert "rlhf_helpers.pocket" not in Path(part.__file__).read_text("utf-8")


def typed(*keys):
    keys = iter(keys)

    def read(question):
        try:
            return next(keys)
        except StopIteration:
            raise EOFError from None

    return read


def test_text_prompt_takes_choices_undo_and_stop(path, capsys):
    clicks = Clicks(pairs(6), path, repeats=0)
    clicks_panel.ask(clicks, typed("u", "1", "2", "U", "0", "left", "2 ", "q", "1"))
    assert [row["side"] for row in clicks.rows] == ["first", None, "second"]
    said = capsys.readouterr().out
    assert "there is nothing to undo" in said and "'left' is none of 1, 2, 0, u and q" in said
    assert f"  1: {clicks.questions[0].first}\n" in said and "3 of 6 done" in said
    assert f"saved in {path.resolve()}" in said
    clicks_panel.ask(Clicks(pairs(6), path, repeats=0), typed("1"))  # then the input ends
    assert len(Clicks(pairs(6), path, repeats=0).rows) == 4


# --- the panel, without a browser ----------------------------------------------------------


class Panel:
    """The panel's widgets by what they say."""

    def __init__(self, clicks):
        self.widgets = list(self.inside(clicks_panel.Panel(clicks, ipywidgets).box))

    def inside(self, widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from self.inside(child)

    def button(self, name):
        return next(w for w in self.widgets if f"rlhf-{name}" in w._dom_classes)

    def press(self, name):
        self.button(name).click()

    @property
    def text(self):
        return "\n".join(w.value for w in self.widgets if type(w).__name__ == "HTML")


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(clicks_panel, "FASTEST", 0)


@pytest.mark.usefixtures("fast")
def test_panel_goes_through_a_session(path):
    clicks = Clicks(pairs(5), path, repeats=1)
    panel = Panel(clicks)
    assert panel.button("undo").disabled and not panel.button("first").disabled
    for name in ("first", "neither", "second", "undo", "first", "second", "first", "second"):
        panel.press(name)
    sides = ["first", None, "first", "second", "first", "second"]
    assert [row["side"] for row in Clicks(pairs(5), path, repeats=1).rows] == sides
    assert panel.button("first").disabled and not panel.button("undo").disabled
    assert "6 of 6 done" in panel.text and "agreed with yourself" in panel.text
    panel.press("undo")
    assert not panel.button("first").disabled and "agreed with yourself" not in panel.text


def test_panel_shows_markup_as_text_and_dialogues_by_turns():
    talk = [{"role": "user", "content": "<script>alert(1)</script>"}]
    panel = Panel(Clicks([(talk, f"<b>yes</b> {n}", "no & no") for n in range(4)]))
    assert "<script>" not in panel.text and "user: &lt;script&gt;" in panel.text
    assert "&lt;b&gt;yes&lt;/b&gt;" in panel.text and "no &amp; no" in panel.text


def test_the_second_half_of_a_double_click_is_no_choice():
    clicks = Clicks(pairs())
    panel = Panel(clicks)
    clicks._shown_at -= 1
    panel.press("first")
    panel.press("first")
    assert len(clicks.rows) == 1


@pytest.mark.usefixtures("fast")
def test_panel_says_what_could_not_be_saved_and_keeps_the_question(path):
    clicks = Clicks(pairs(), path)
    panel = Panel(clicks)
    Clicks(pairs(), path).record("first")
    before = path.read_bytes()
    panel.press("second")
    assert "Not saved: " in panel.text and "changed since" in panel.text
    assert path.read_bytes() == before and clicks.questions[0].first in panel.text


@pytest.mark.usefixtures("fast")
def test_panel_names_position_bias_at_the_end():
    clicks = Clicks(pairs(5), repeats=0)
    panel = Panel(clicks)
    for _ in clicks.pairs:
        panel.press("first")
    assert "position bias" in panel.text


def test_without_ipywidgets_the_text_prompt_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=re.escape("pip install ipywidgets")) as caught:
        clicks_panel.show(Clicks(pairs()))
    assert "clicks_panel.ask(clicks)" in str(caught.value)


# --- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_pairs, words",
    [
        (pairs(3), "3 pairs can be used; give at least 4"),
        ([], "0 pairs can be used"),
        ([("a?", "x.", "x.")] * 5, "0 pairs can be used (5 of two equal answers left out)"),
        ([*pairs(4), ("a?", "only one.")], "pair 4 is ('a?', 'only one.')"),
        ([*pairs(4), ("  ", "x.", "y.")], "pair 4 is ('  ', 'x.', 'y.') (empty)"),
        ([*pairs(4), ("a?", "x.", 7)], "pair 4"),
        ([*pairs(4), 7], "pair 4 is 7"),
        ([*pairs(4), "why"], "pair 4 is 'why'"),
        ([*pairs(4), {"prompt": "a?", "chosen": "x.", "rejected": "y."}], "pair 4 is {'prompt'"),
        ([*pairs(4), (TALK[:2], "x.", "y.")], "turns that do not alternate"),
        ([*pairs(4), (TALK, "x.", "y.")], "give all as messages"),
    ],
)
def test_pairs_that_are_none_are_named(given_pairs, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Clicks(given_pairs)


@pytest.mark.parametrize("repeats", [-1, 1.5, "8"])
def test_repeats_must_be_a_whole_number(repeats):
    with pytest.raises(ValueError, match=f"repeats is {repeats!r}"):
        Clicks(pairs(), repeats=repeats)


@pytest.mark.parametrize("limit", [-1, 0.5])
def test_a_limit_must_be_a_whole_number(limit):
    with pytest.raises(ValueError, match=f"limit is {limit}"):
        Clicks(pairs()).click_through(simulated(gold), limit=limit)


@pytest.mark.parametrize("choice", ["left", 1, True, ""])
def test_another_choice_is_refused(path, choice):
    clicks = Clicks(pairs(), path)
    with pytest.raises(ValueError, match=f"choice is {choice!r}"):
        clicks.record(choice)
    assert not clicks.rows and not path.exists()


@pytest.mark.parametrize(
    "other, words",
    [
        ({"pairs": [(f"is {n} odd?", "yes.", "no.") for n in range(60)]}, "on other prompts"),
        ({"pairs": pairs(answer="maybe")}, "on other answers, of another model or sampled anew"),
        ({"pairs": [(p, a, f"{b} really.") for p, a, b in pairs()]}, "on other answers"),
        ({"seed": 1}, "in another order: see seed and repeats"),
        ({"repeats": 3}, "in another order: see seed and repeats"),
        ({"pairs": pairs(61)}, "on these pairs, but more, fewer"),
    ],
)
@pytest.mark.parametrize("choice", ["first", None])
def test_a_file_of_another_session_is_refused_and_kept(path, aside, other, words, choice):
    Clicks(pairs(), path).click_through(lambda *_: choice, limit=3)
    before = [file.read_bytes() for file in (path, aside) if file.exists()]
    with pytest.raises(ValueError, match=words) as caught:
        Clicks(**{"pairs": pairs(), "path": path} | other)
    assert "is of another session" in str(caught.value)
    assert "give another path, or move it away" in str(caught.value)
    assert [file.read_bytes() for file in (path, aside) if file.exists()] == before


def test_a_file_of_other_rows_is_refused_and_kept(path):
    path.write_text('{"prompt": "a?", "chosen": "x.", "rejected": "y."}\n', "utf-8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is of another session, on other prompts, such as 'a\\?'"):
        Clicks(pairs(), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b'{"prompt": "wh', b"7", b"\xff", b"[]x"])
def test_a_damaged_line_in_the_middle_is_named_and_kept(path, line):
    Clicks(pairs(), path).click_through(simulated(gold), limit=3)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, lines[2], b""]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2, is damaged"):
        Clicks(pairs(), path)
    assert path.read_bytes() == before


def test_a_question_answered_in_two_lines_is_refused(path):
    Clicks(pairs(), path).click_through(simulated(gold), limit=3)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="answer a question twice; remove one"):
        Clicks(pairs(), path)


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x", "utf-8")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(NotADirectoryError, match="is a file"):
        Clicks(pairs(), tmp_path / "file" / "clicks.jsonl")
    with pytest.raises(OSError, match="cannot be written"):
        Clicks(pairs(), tmp_path / "folder.jsonl")
    with pytest.raises(ValueError, match="ends in .jsonl"):
        Clicks(pairs(), tmp_path / "clicks.csv")
    RowFile(tmp_path / "kept.jsonl").write([])
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root everything is allowed
    with pytest.raises(OSError, match="write-protected"):
        Clicks(pairs(), tmp_path / "kept.jsonl")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_rights_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="cannot be written"):
            Clicks(pairs(), tmp_path / "clicks.jsonl")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"wrong": 1.5}, "wrong is 1.5"),
        ({"wrong": float("nan")}, "wrong is nan"),
    ],
)
def test_settings_of_a_simulated_clicker_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        simulated(gold, **settings)


def test_a_score_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="the scores of 'a.' and 'b.' differ by nan"):
        simulated(lambda prompt, answer: float("nan"))("why?", "a.", "b.")
