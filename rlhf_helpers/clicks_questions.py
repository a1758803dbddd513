"""What a session of clicks asks: which pairs, on which side each answer, which of them twice."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_helpers.guards import shown
from rlhf_helpers.text import HALF, Prompt, Unfit, answer_text, as_messages, readable

Pair = tuple[Prompt, str, str]  # a prompt and two different answers
FEWEST = 4  # pairs that can be trained on
GAP = 10  # pairs between a pair and its repeat


@dataclass(frozen=True)
class Question:
    """Two answers to choose from.

    Attributes:
        number: its place in the session, from 0.
        pair: the place of its pair in `Clicks.pairs`.
        prompt: a question or a dialogue.
        first, second: the answers, in the order in which they are shown.
        repeat: whether the pair was shown before, with the answers exchanged.
    """

    number: int
    pair: int
    prompt: Prompt
    first: str
    second: str
    repeat: bool


def usable_pairs(pairs: Iterable) -> list[Pair]:
    """The pairs with a choice to make; a line says how many others there are, and why.

    Raises:
        TypeError: for what is no list.
        ValueError: for a pair that is no prompt with two answers, texts and dialogues mixed, and
            fewer than `FEWEST` that can be used.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs is {shown(pairs)}: give a list of (prompt, answer, answer)")
    kept, left_out = [], Counter()
    for number, pair in enumerate(pairs):
        try:
            if not isinstance(pair, list | tuple) or len(pair) != 3:
                raise Unfit("no list or tuple of three")
            prompt, first, second = pair
            as_messages(prompt)
            first, second = answer_text(first).strip(), answer_text(second).strip()
        except Unfit as reason:
            raise ValueError(
                f"pair {number} is {shown(pair)} ({reason}); give a prompt and two answers"
            ) from None
        if first == second:
            left_out["of two equal answers"] += 1
        elif not first or not second:
            left_out["with an empty answer"] += 1
        elif HALF.search(f"{readable(prompt)}{first}{second}"):
            left_out["with half of a character"] += 1
        else:
            kept.append((prompt, first, second))
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if len(kept) < FEWEST:
        raise ValueError(
            f"{len(kept)} pairs can be used{f' ({reasons} left out)' * bool(reasons)}; give at "
            f"least {FEWEST}, of two different answers each"
        )
    if len({type(prompt) for prompt, *_ in kept}) > 1:
        raise ValueError("some prompts are texts and some lists of messages; give all as messages")
    if reasons:
        print(f"{len(kept)} pairs are used; left out: {reasons}")
    return kept


def make_questions(pairs: list[Pair], seed: int, repeats: int) -> list[Question]:
    """All pairs in their order, and some of them a second time, with the sides exchanged."""
    rng = random.Random(f"clicks-{seed}")
    gap = min(GAP, len(pairs) // 2)
    exchanged = [rng.random() < 0.5 for _ in pairs]
    twice = rng.sample(range(len(pairs) - gap), min(repeats, len(pairs) - gap))
    order = [(i, i, False) for i in range(len(pairs))] + [(i + gap + 0.5, i, True) for i in twice]
    questions = []
    for number, (_, i, repeat) in enumerate(sorted(order)):
        prompt, *answers = pairs[i]
        first, second = answers[::-1] if exchanged[i] != repeat else answers
        questions.append(Question(number, i, prompt, first, second, repeat))
    return questions
