"""How varied sampled texts are: what a policy loses when it settles on what pays."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence

from sacrebleu.metrics import BLEU

from rlhf_helpers.kinds import Whole
from rlhf_helpers.validation import checked


@checked
def distinct_n(texts: Sequence[str], n: Whole[1]) -> float:
    """Share of different n-grams among all n-grams of the texts.

    distinct-n = |set of n-grams| / number of n-grams, over all texts together; an n-gram is n words
    in a row within one text. More or longer texts repeat more: compare equally many of like length.

    Args:
        texts: words are what stands between spaces (`str.split`). A text of fewer than n words, an
            empty one included, has no n-gram and counts for nothing.
        n: words in a row, at least 1.

    Returns:
        A share above 0; 1 if no n-gram comes twice.

    Raises:
        TypeError: `texts` is one text, or holds something else than texts.
        ValueError: no texts, n is no whole number of at least 1, or no text has n words.

    Example:
        Of the six words, "the" and "duck" come twice: 4/6. Of the four pairs, "the duck" does: 3/4.

        >>> texts = ["the duck swims", "the duck flies"]
        >>> round(distinct_n(texts, 1), 4), distinct_n(texts, 2)
        (0.6667, 0.75)

    Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (arXiv
    1510.03055), section 5.1. Derived in lesson 05.
    """
    rows = _words(texts)
    if math.isnan(share := _distinct(rows, n)):
        longest = max(len(row) for row in rows)
        mend = "choose a smaller n or longer texts."
        raise ValueError(f"n is {n}, and the longest text has {longest} words: {mend}")
    return share


def unique_share(texts: Sequence[str]) -> float:
    """Share of different texts.

    |set of texts| / number of texts. Two texts are the same if they have the same words.

    Args:
        texts: an empty text is a text like any other.

    Returns:
        A share from 1/N, if all N are the same, to 1.

    Raises:
        TypeError: `texts` is one text, or holds something else than texts.
        ValueError: no texts.

    Example:
        Two different ones of four.

        >>> unique_share(["yes", "yes", "no", "yes"])
        0.5

    Derived in lesson 05.
    """
    rows = _words(texts)
    return len(set(map(tuple, rows))) / len(rows)


@checked
def self_bleu(texts: Sequence[str], sample: Whole[2] = 64, seed: Whole[0] = 0) -> float:
    """Mean BLEU of each text against all the others: how much of it the others say as well.

    With pₙ the share of a text's n-grams that another text has, for n from 1 to N:

        BLEU = min(1, e^(1 − closest length / length)) · (p₁ · … · p_N)^(1/N)

    N is 4, or the text's length if it has fewer words. An n-gram counts at most as often as it
    comes in the one text that has it most. A pₙ of 0 is smoothed: the k-th such becomes
    1/(2ᵏ · number of n-grams). A text that shares no word with any other has BLEU 0.

    The more texts there are, the more likely one of them says the same: compare equally many.

    Args:
        texts: at least 2, words as `str.split` cuts them. An empty text has BLEU 1 if another one
            is empty, else 0; nothing else is measured against it.
        sample: how many texts are compared, at least 2; of more than these a random sample is
            taken, since the time grows with its square.
        seed: of that sample. It does not depend on the order of the texts.

    Returns:
        A number from 0, no word shared, to 1, each text a copy of another. High means little
        variety, unlike the other measures here.

    Raises:
        TypeError: `texts` is one text, or holds something else than texts.
        ValueError: fewer than 2 texts, or a sample that is no whole number of at least 2.

    Example:
        p₁ = 2/3 and p₂ = 1/2; p₃ = 0 of one becomes 1/2. The third root of 1/6 is 0.5503.

        >>> round(self_bleu(["the duck swims", "the duck flies"]), 4)
        0.5503

    Zhu et al., Texygen (arXiv 1802.01886), section 3; BLEU by sacrebleu, Post (arXiv 1804.08771).
    Derived in lesson 05.
    """
    rows = _words(texts)
    if len(rows) < 2:
        raise ValueError(f"texts is {list(texts)!r}: give at least 2, to compare one with others.")
    texts = sorted(map(" ".join, rows))
    if len(texts) > sample:
        texts = random.Random(seed).sample(texts, sample)
    bleu = BLEU(tokenize="none", effective_order=True)
    scores = [_bleu(bleu, text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    return math.fsum(scores) / len(scores)  # the same in any order


def mean_length(texts: Sequence[str]) -> float:
    """Mean length of the texts in words.

    Args:
        texts: words as `str.split` cuts them; an empty text has 0.

    Returns:
        Words per text, at least 0.

    Raises:
        TypeError: `texts` is one text, or holds something else than texts.
        ValueError: no texts.

    Example:
        (3 + 1 + 0 + 0) / 4.

        >>> mean_length(["the duck swims", "yes", "", " "])
        1.0

    Derived in lesson 05.
    """
    rows = _words(texts)
    return sum(map(len, rows)) / len(rows)


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """All measures of this module, of one set of texts.

    Unlike the functions of its own, a measure that these texts do not have is NaN here and no
    error: distinct-n where no text has n words, and self-BLEU of a single text. A policy that fell
    silent is then still recorded.

    Args:
        texts: as for the functions of their own; self-BLEU is of 64 texts at most.

    Returns:
        `distinct_1`, `distinct_2`, `unique` and `self_bleu`, numbers from 0 to 1, and `length`, in
        words.

    Raises:
        TypeError: `texts` is one text, or holds something else than texts.
        ValueError: no texts.

    Example:
        One word of two, no pair; two equal texts.

        >>> diversity(["yes", "yes"])
        {'distinct_1': 0.5, 'distinct_2': nan, 'unique': 0.5, 'self_bleu': 1.0, 'length': 1.0}

    Derived in lesson 05.
    """
    rows = _words(texts)
    return {
        "distinct_1": _distinct(rows, 1),
        "distinct_2": _distinct(rows, 2),
        "unique": unique_share(texts),
        "self_bleu": self_bleu(texts) if len(rows) > 1 else math.nan,
        "length": mean_length(texts),
    }


def _words(texts: Iterable[str]) -> list[list[str]]:
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"texts is {texts!r}: give a list of texts.")
    texts = list(texts)
    if not texts:
        raise ValueError("texts is empty: give at least one text.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is {text!r}: give texts, decoded from their tokens.")
    return [text.split() for text in texts]


def _distinct(rows: list[list[str]], n: int) -> float:
    ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def _bleu(bleu: BLEU, text: str, others: list[str]) -> float:
    references = [other for other in others if other]
    if not text or not references:
        return float(text in others)
    return min(1.0, bleu.sentence_score(text, references).score / 100)  # rounding may pass 100
