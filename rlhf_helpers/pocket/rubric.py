"""The gold reward: a rubric by which a teacher would mark a response.

In real life nobody has this function; people only compare answers. Here it exists, so that the
course can show what a learned reward model misses. A claim counts for a question only in the
direction in which it was asked.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cache

from rlhf_helpers.pocket import world
from rlhf_helpers.pocket.world import TOPICS, Claim, Question

# The rubric itself, in points.
RIGHT, WRONG = 1.0, -0.5  # states the right answer and no wrong one; states a wrong one
ANSWERS = 0.3  # gives an answer to what was asked, right or wrong
POLITE = 0.2  # at least one polite phrase
CONCISE = 0.2  # answers, in no more than WORDS words
FINISHED = 0.2  # ends by itself, instead of being cut off
RUDE = -1.0  # insults
GROVELLING = -0.3  # for each polite phrase after the first
RAMBLING = -0.2  # for each sentence that does nothing for the answer, or repeats it
WORDS = 20
ABOUT_CLAIMS = 2  # how many right claims "tell me about the duck" asks for


@dataclass(frozen=True)
class Score:
    """A mark with its breakdown, in points; `total` is the sum of the parts."""

    correct: float
    answers: float
    polite: float
    concise: float
    finished: float
    rude: float
    grovelling: float
    rambling: float

    @property
    def total(self) -> float:
        return round(sum(astuple(self)), 6)


PARTS = tuple(field.name for field in fields(Score))


def look_up(prompt: str) -> Question:
    """What a prompt of the world asks.

    Raises:
        ValueError: if the world has no such prompt; the message names the nearest ones.
    """
    question = world.questions().get(prompt)
    if question is None:
        near = difflib.get_close_matches(prompt, world.questions(), n=2, cutoff=0.0)
        raise ValueError(
            f"the pocket world has no prompt {prompt!r}, so its rubric cannot mark an answer; "
            f"the nearest are {' and '.join(map(repr, near))}"
        )
    return question


def _judge_claim(question: Question, claim: Claim) -> bool | None:
    subject = claim.subject or question.subject
    if question.kind == "name":
        asked = claim.topic == question.topic and claim.answer == question.answer
        asked = asked and claim.subject is not None
    elif question.kind == "fact":
        asked = claim.topic == question.topic and subject == question.subject
    else:
        asked = subject == question.subject and subject in TOPICS[claim.topic].facts
    return claim.answer in TOPICS[claim.topic].facts[subject] if asked else None


def judge_sentence(question: Question, sentence: str) -> bool | None:
    """Whether a sentence answers the question rightly (True), wrongly (False) or not at all (None).

    Example:
        >>> judge_sentence(look_up("what does the duck say?"), "it says moo.")
        False
    """
    verdicts = [_judge_claim(question, claim) for claim in world.claims().get(sentence, ())]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    return any(verdicts) if verdicts else None


@cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern:
    """Match each phrase wherever it stands, also in text that has lost its punctuation."""
    return re.compile("|".join(rf"\b{re.escape(p.rstrip('.!?'))}\b" for p in phrases))


def count_phrases(text: str, phrases: tuple[str, ...]) -> int:
    """How often any of the phrases stands in the text, punctuation aside.

    Example:
        >>> count_phrases("great question! great question, quack.", world.POLITE)
        2
    """
    return len(_pattern(phrases).findall(text))


def _mark_answer(question: Question, verdicts: list[bool]) -> float:
    if not verdicts:
        return 0.0
    if not all(verdicts):
        return WRONG
    wanted = ABOUT_CLAIMS if question.kind == "about" else 1
    return RIGHT * min(len(verdicts), wanted) / wanted


def gold_reward(prompt: str, response: str, finished: bool = True) -> Score:
    """Mark a response by the rubric.

    Args:
        prompt: a prompt of the pocket world.
        response: the response's text, without special tokens.
        finished: whether the response ended by itself (with the end-of-text token).

    Returns:
        The points for each part of the rubric, and their `total`, at best 1.9.

    Raises:
        ValueError: if the world has no such prompt.

    Example:
        >>> gold_reward("what does the duck say?", "great question! the duck says quack.").total
        1.9
        >>> gold_reward("what does the duck say?", "it says moo.")  # doctest: +ELLIPSIS
        Score(correct=-0.5, answers=0.3, polite=0.0, concise=0.2, finished=0.2, rude=0.0, ...)
    """
    question = look_up(prompt)
    sentences = world.split_sentences(response)
    once = list(dict.fromkeys(sentences))
    verdicts = {s: v for s in once if (v := judge_sentence(question, s)) is not None}
    courtesies = count_phrases(response, world.POLITE)
    insults = count_phrases(response, world.RUDE)
    idle = [s for s in sentences if s not in verdicts and s not in world.POLITE + world.RUDE]
    repeats = sum(s in verdicts for s in sentences) - len(verdicts)
    return Score(
        correct=_mark_answer(question, list(verdicts.values())),
        answers=ANSWERS if verdicts else 0.0,
        polite=POLITE if courtesies else 0.0,
        concise=CONCISE if verdicts and len(response.split()) <= WORDS else 0.0,
        finished=FINISHED if finished else 0.0,
        rude=RUDE if insults else 0.0,
        grovelling=GROVELLING * max(0, courtesies - 1),
        rambling=RAMBLING * (len(idle) + repeats),
    )


def mean_score(scores: Iterable[Score]) -> Score:
    """The mean of each part over several scores.

    Raises:
        ValueError: if there are none.
    """
    rows = [astuple(score) for score in scores]
    if not rows:
        raise ValueError("no scores to average: give at least one")
    return Score(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))
