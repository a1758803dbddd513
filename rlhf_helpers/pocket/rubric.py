"""The gold reward: a rubric by which a teacher would mark a response.

In real life nobody has this function; people only compare answers. Here it exists, so that the
course can show what a learned reward model misses. A claim counts for a question only in the
direction in which it was asked (opposites count both ways), and true or false talk about other
things counts as rambling alike.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cache

from rlhf_helpers.guards import shown
from rlhf_helpers.pocket import world
from rlhf_helpers.pocket.world import TOPICS, Claim, Question

# The rubric itself, in points.
RIGHT, WRONG = 1.0, -0.5  # states the right answer and no wrong one; states a wrong one
ANSWERS = 0.3  # gives an answer to what was asked, right or wrong
POLITE = 0.2  # an answer with at least one polite phrase
CONCISE = 0.2  # answers, in no more than WORDS words
FINISHED = 0.2  # an answer that ends by itself, instead of being cut off
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
    question = world.questions().get(prompt) if isinstance(prompt, str) else None
    if question is None:
        near = difflib.get_close_matches(str(prompt), world.questions(), n=2, cutoff=0.0)
        raise ValueError(
            f"the pocket world has no prompt {prompt!r}, so its rubric cannot mark an answer; "
            f"the nearest are {' and '.join(map(repr, near))}"
        )
    return question


def _resolve(question: Question, claim: Claim) -> Claim | None:
    """The claim with its subject filled in, or None if it does not answer the question."""
    if question.topic == claim.topic == "opposite" and claim.answer == question.subject:
        claim = Claim(claim.topic, question.subject, claim.subject)  # said the other way round
    subject = claim.subject or question.subject
    if question.kind == "name":
        asked = claim.topic == question.topic and claim.answer == question.answer
        asked = asked and claim.subject is not None
    elif question.kind == "fact":
        asked = claim.topic == question.topic and subject == question.subject
    else:
        asked = subject == question.subject and subject in TOPICS[claim.topic].facts
    return Claim(claim.topic, subject, claim.answer) if asked else None


def answer_in(question: Question, sentence: str) -> Claim | None:
    """The answer that a sentence gives to the question, None if it gives none.

    A last sentence may lack its end mark. Where a sentence has two meanings, the right one counts.

    Example:
        >>> answer_in(look_up("what does the duck say?"), "it says moo.")
        Claim(topic='sound', subject='duck', answer='moo')
    """
    meanings = world.claims().get(sentence) or world.claims().get(sentence + ".", ())
    resolved = [c for claim in meanings if (c := _resolve(question, claim)) is not None]
    return max(resolved, key=world.is_true, default=None)


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
        TypeError: if the response is no text.
        ValueError: if the world has no such prompt.

    Example:
        >>> gold_reward("what does the duck say?", "great question! the duck says quack.").total
        1.9
        >>> gold_reward("what does the duck say?", "it says moo.")  # doctest: +ELLIPSIS
        Score(correct=-0.5, answers=0.3, polite=0.0, concise=0.2, finished=0.2, rude=0.0, ...)
    """
    question = look_up(prompt)
    if not isinstance(response, str):
        raise TypeError(f"response is {shown(response)}: give its text")
    sentences = world.split_sentences(response)
    found = [answer_in(question, sentence) for sentence in sentences]
    answers = {claim: world.is_true(claim) for claim in found if claim is not None}
    courtesies = count_phrases(response, world.POLITE)
    insults = count_phrases(response, world.RUDE)
    manners = world.POLITE + world.RUDE
    busy = [claim is not None or s in manners for s, claim in zip(sentences, found, strict=True)]
    repeats = sum(claim is not None for claim in found) - len(answers)
    return Score(
        correct=_mark_answer(question, list(answers.values())),
        answers=ANSWERS if answers else 0.0,
        polite=POLITE if answers and courtesies else 0.0,
        concise=CONCISE if answers and len(response.split()) <= WORDS else 0.0,
        finished=FINISHED if answers and finished else 0.0,
        rude=RUDE if insults else 0.0,
        grovelling=GROVELLING * max(0, courtesies - 1),
        rambling=RAMBLING * (busy.count(False) + repeats),
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
