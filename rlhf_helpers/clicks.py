"""Comparisons made by a person: two answers side by side, each choice saved at once.

The file of a session holds what is to be trained on, and nothing else: for each pair that the
person could decide one line of JSON, in TRL's columns `prompt`, `chosen`, `rejected`. What must not
reach training, "cannot tell" and second answers to a pair, stands in a file beside it, of the same
columns: `clicks.aside.jsonl` beside `clicks.jsonl`. A choice, or its undoing, changes one of the
two files, which is written anew under another name and then renamed: a kill loses no choice.

Who answers is a person in a panel of the notebook or at a text prompt (`clicks_panel`), or a
function such as `simulated` makes.
"""

import hashlib
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from datasets import Dataset

from rlhf_helpers.checkpoints import finish_first
from rlhf_helpers.clicks_file import RowFile
from rlhf_helpers.clicks_questions import FEWEST, Question, make_questions, usable_pairs
from rlhf_helpers.guards import shown
from rlhf_helpers.kinds import Between, From, Whole
from rlhf_helpers.text import Prompt
from rlhf_helpers.validation import checked

Clicker = Callable[[Prompt, str, str], str | None]  # "first", "second", or None: cannot tell
SIDES = ("first", "second")
COLUMNS = ("prompt", "chosen", "rejected")
_NEEDED = {*COLUMNS, "side", "seconds", "repeat", "pair"}


class Clicks:
    """A session of comparisons, saved after each one, to go on with at any time.

    Args:
        pairs: for each a prompt and two answers, as texts, or as TRL's lists of messages. Pairs
            whose answers are equal, or one of them empty, are left out; a line says how many.
        path: the file, ending in .jsonl; where it exists, the session goes on. None keeps the
            choices in memory only.
        seed: of the sides, and of which pairs are shown twice.
        repeats: how many pairs are shown a second time, some ten pairs later, with the sides
            exchanged; fewer where there are few pairs.

    Attributes:
        pairs: prompt and answers of the pairs that are used.
        questions: what is asked, in this order.
        rows: the choices in order. Beside TRL's columns each has `side`, the answer chosen as it
            was shown, "first", "second" or None; `seconds`; `repeat`; `by`, a person or simulated;
            `number` and `pair`, as in `Question`; `session`, by which the file is recognised.
            Where `side` is None, `chosen` and `rejected` are the first and the second.

    Raises:
        TypeError: for pairs that are no list.
        ValueError: for a pair that is none, fewer than four that can be used, and a file that is
            of other prompts, answers, seed or repeats, or damaged elsewhere than in its last line.
        OSError: if the file cannot be written.

    Example:
        >>> talk = [(f"what is {n} plus 1?", f"{n + 1}.", "no idea.") for n in range(5)]
        >>> clicks = Clicks(talk, repeats=2)
        >>> clicks.click_through(simulated(lambda prompt, answer: answer != "no idea."))
        >>> clicks.progress(), clicks.agreement()
        ('7 of 7 done', (2, 2))
        >>> clicks.preferences()["chosen"][:3]
        ['1.', '2.', '3.']

    Source: Ziegler et al. (arXiv 1909.08593) collect comparisons in this way; TRL's preference
    format. Lesson 06.
    """

    @checked
    def __init__(
        self,
        pairs: Iterable[tuple[Prompt, Prompt, Prompt]],
        path: str | Path | None = None,
        seed: Whole[0] = 0,
        repeats: Whole[0] = 8,
    ) -> None:
        self.pairs = usable_pairs(pairs)
        self.questions = make_questions(self.pairs, seed, repeats)
        asked = [(q.prompt, q.first, q.second, q.repeat) for q in self.questions]
        self.session = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        paths = [Path(path), Path(path).with_suffix(".aside.jsonl")] if path else []
        self._files = [RowFile(path) for path in paths]
        self.path = self._files[0].path if path else None
        rows = [self._of_this_session(row, file) for file in self._files for row in file.rows()]
        # By number; in a session that goes on, the choice made last is at the end.
        self._rows = {row["number"]: row for row in sorted(rows, key=lambda row: row["number"])}
        if len(self._rows) < len(rows):
            raise ValueError(
                f"'{self.path}' and '{paths[1].name}' answer a question twice; remove one answer"
            )
        self._shown_at = time.monotonic()

    @property
    def rows(self) -> list[dict]:
        return [self._rows[number] for number in sorted(self._rows)]

    # --- asking ----------------------------------------------------------------------------

    def show_next(self) -> Question | None:
        """The next question, None after the last; its time runs from now on."""
        self._shown_at = time.monotonic()
        return self._next()

    def seconds_shown(self) -> float:
        """How long the next question has been shown."""
        return time.monotonic() - self._shown_at

    def record(self, choice: str | None, by: str = "person") -> None:
        """Save the choice for the next question.

        Args:
            choice: "first", "second", or None for "cannot tell".
            by: who chose.

        Raises:
            ValueError: for another choice, or if all questions are answered.
            OSError: if it cannot be saved; nothing has changed then.
            RuntimeError: if something else has written to the file since; likewise.
        """
        seconds = round(self.seconds_shown(), 2)
        if choice not in (*SIDES, None):
            raise ValueError(f"choice is {choice!r}; give 'first', 'second' or None: cannot tell")
        if (question := self._next()) is None:
            raise ValueError(f"all {len(self.questions)} questions are answered; undo one first")
        answers = [_as_saved(question.prompt, a) for a in (question.first, question.second)]
        values = (question.prompt, *(answers[::-1] if choice == "second" else answers))
        row = dict(zip(COLUMNS, values, strict=True))
        row |= {"side": choice, "seconds": seconds, "repeat": question.repeat, "by": by}
        row |= {"number": question.number, "pair": question.pair, "session": self.session}
        self._save(self._rows | {question.number: row}, row)

    def undo(self) -> bool:
        """Take back the choice made last; False if there is none. Raises as `record`."""
        if not self._rows:
            return False
        *before, (_, last) = self._rows.items()
        self._save(dict(before), last)
        return True

    @checked
    def click_through(self, clicker: Clicker, limit: Whole[0] | None = None) -> None:
        """Let a function answer the next questions, `limit` of them or all.

        Args:
            clicker: of prompt, first and second answer; returns what `record` takes.
        """
        while limit != 0 and (question := self.show_next()):
            choice = clicker(question.prompt, question.first, question.second)
            self.record(choice, by="simulated")
            limit = limit and limit - 1

    # --- what has come of it ---------------------------------------------------------------

    def progress(self) -> str:
        """How far the session is, with the time left at the median pace so far."""
        left = len(self.questions) - len(self._rows)
        text = f"{len(self._rows)} of {len(self.questions)} done"
        if not left or not self._rows:
            return text
        minutes = left * statistics.median(row["seconds"] for row in self.rows) / 60
        return text + (f", about {minutes:.0f} min left" if minutes >= 1 else ", under 1 min left")

    def agreement(self) -> tuple[int, int]:
        """In how many pairs that were decided twice the same answer was chosen; and how many."""
        chosen: dict[int, list] = {}
        for row in self.rows:
            if row["side"]:
                chosen.setdefault(row["pair"], []).append(row["chosen"])
        twice = [answers for answers in chosen.values() if len(answers) == 2]
        return sum(first == second for first, second in twice), len(twice)

    def one_sided(self) -> str | None:
        """What to say if all choices fell on one side; None if they did not."""
        sides = [row["side"] for row in self._decided()]
        if len(sides) < FEWEST or len(set(sides)) > 1:
            return None
        return (
            f"all {len(sides)} choices are the {sides[0]} answer (position bias): sides are drawn "
            f"at random, so this comes by chance once in {2 ** (len(sides) - 1)} times. If you did "
            "not read both answers, undo, or begin anew in another file"
        )

    def preferences(self) -> Dataset:
        """The pairs to train on, as `preference_dataset(preset, source=path)` reads them.

        A preset with `drop_unfit` divides any source between reward model, judge and held-out
        prompts, also this one: to train on all choices, use what this returns. It warns if they
        all fell on one side.

        Raises:
            ValueError: if fewer than four pairs are decided.
        """
        decided = self._decided()
        if len(decided) < FEWEST:
            undecided = sum(row["side"] is None for row in self.rows)
            what = f"only {len(decided)} of {len(self.pairs)} pairs are decided"
            if undecided:
                what += f", {'all' if undecided == len(self.rows) else undecided} 'cannot tell'"
            raise ValueError(f"{what}; choose between at least {FEWEST} before training on them")
        if bias := self.one_sided():
            warnings.warn(bias, stacklevel=2)
        return Dataset.from_list([{name: row[name] for name in COLUMNS} for row in decided])

    def _next(self) -> Question | None:
        return next((q for q in self.questions if q.number not in self._rows), None)

    def _decided(self) -> list[dict]:
        return [row for row in self.rows if _trained_on(row)]

    # --- files -----------------------------------------------------------------------------

    def _save(self, rows: dict[int, dict], changed: dict) -> None:
        """Make these the session's rows, by writing the file that holds the changed one."""
        with finish_first():
            if self.path:
                if any(file.changed() for file in self._files):
                    raise RuntimeError(
                        f"'{self.path.name}' was changed since this session read it, by another "
                        "notebook or a second panel; nothing was written. Run this cell again to "
                        "go on from the file"
                    )
                which = _trained_on(changed)
                file = self._files[0 if which else 1]
                file.write([rows[n] for n in sorted(rows) if _trained_on(rows[n]) == which])
            self._rows, self._shown_at = rows, time.monotonic()

    def _of_this_session(self, row: dict, file: RowFile) -> dict:
        """A row of a file; ValueError if it is of another session, saying what differs."""
        number = row.get("number") in range(len(self.questions))
        if row.get("session") == self.session and number and _NEEDED <= row.keys():
            return row
        prompt, chosen, rejected = map(row.get, COLUMNS)
        known = [_as_saved(p, a) for p, *answers in self.pairs for a in answers if p == prompt]
        if not known:
            what = f"other prompts, such as {prompt!r:.99}"
        elif chosen not in known or rejected not in known:
            what = f"other answers, of another model or sampled anew, such as {chosen!r:.99}"
        else:
            what = "these pairs, but more, fewer or in another order: see seed and repeats"
        raise ValueError(
            f"'{file.path}' is of another session, on {what}. The file is as it was: give another "
            "path, or move it away"
        )


@checked
def simulated(
    score: Callable[[Prompt, str], float],
    temperature: From[0] = 0.0,
    wrong: Between[0, 1] = 0.0,
    seed: Whole[0] = 0,
) -> Clicker:
    """A clicker who chooses by the score of each answer.

    P(first) = σ((s_first − s_second) / temperature), and at temperature 0 the better one, "cannot
    tell" if they are equal. So `simulated(gold)` is an honest clicker; `simulated(utility, 1/3)`,
    of a biased annotator's utility, a biased one; `simulated(gold, wrong=0.2)` a careless one. A
    pair shown in the same way is answered in the same way, also after a restart.

    Args:
        score: of prompt and answer, in points.
        temperature: in points.
        wrong: with which chance the other answer is named.
        seed: of all that is drawn.

    Raises:
        TypeError: for a score that is no function; of the clicker, if it returns no number.
        ValueError: for a negative temperature, a chance that is none; of the clicker, for a score
            that is NaN.

    Example:
        >>> simulated(lambda prompt, answer: -len(answer))("why?", "because of that.", "because.")
        'second'
    """

    def points(prompt: Prompt, answer: str) -> float:
        given = score(prompt, answer)
        try:
            return float(given)
        except (TypeError, ValueError) as error:
            text = f"the score of {answer!r:.60} is {shown(given)}: return a number"
            raise TypeError(text) from error

    def clicker(prompt: Prompt, first: str, second: str) -> str | None:
        rng = random.Random(f"{seed} {prompt!r} {first!r} {second!r}")
        gap = points(prompt, first) - points(prompt, second)
        if not math.isfinite(gap):
            raise ValueError(f"the scores of {first!r:.60} and {second!r:.60} differ by {gap}")
        if temperature:
            better = rng.random() < (1 + math.tanh(gap / temperature / 2)) / 2
        elif gap:
            better = gap > 0
        else:
            return None
        return "first" if better != (rng.random() < wrong) else "second"

    return clicker


def _as_saved(prompt: Prompt, answer: str) -> Prompt:
    """An answer in the form of its prompt: TRL has both as texts or both as messages."""
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]


def _trained_on(row: dict) -> bool:
    return bool(row["side"]) and not row["repeat"]
