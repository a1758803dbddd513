"""How varied texts are: numbers worked out by hand, and what must hold for any texts."""

import doctest
import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_helpers import diversity as module
from rlhf_helpers.diversity import distinct_n, diversity, mean_length, self_bleu, unique_share

WORDS = st.lists(st.sampled_from("abcde"), max_size=6).map(" ".join)
EACH = [lambda texts: distinct_n(texts, 1), unique_share, self_bleu, mean_length, diversity]


def test_doctests():
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# --- distinct_n ---


def test_distinct_n_by_hand():
    # words: a b a, a b, c: three different of six; pairs: ab ba, ab: two of three; triples: one
    texts = ["a b a", "a b", "c", ""]
    assert distinct_n(texts, 1) == 3 / 6
    assert distinct_n(texts, 2) == 2 / 3
    assert distinct_n(texts, 3) == 1


def test_ngrams_do_not_cross_texts():
    assert distinct_n(["a b", "c d"], 2) == 1  # ab and cd; bc is none
    assert distinct_n(["a b", "b a", "a b"], 2) == 2 / 3


def test_spaces_do_not_count_and_case_does():
    assert distinct_n([" a\n b ", "a  b"], 2) == 1 / 2
    assert distinct_n(["A", "a"], 1) == 1


@pytest.mark.parametrize("n", [0, -1, 1.0, "2"])
def test_distinct_n_refuses_an_n_below_one(n):
    with pytest.raises(ValueError, match="n is .*: it must be a whole number, at least 1"):
        distinct_n(["a b"], n)


@pytest.mark.parametrize(("texts", "longest"), [(["a b", "c"], 2), (["", " "], 0)])
def test_distinct_n_refuses_texts_that_are_all_shorter(texts, longest):
    with pytest.raises(ValueError, match=f"n is 3, and the longest text has {longest} words"):
        distinct_n(texts, 3)


# --- unique_share, mean_length ---


def test_unique_share_by_hand():
    assert unique_share(["a b", "b a", "a b"]) == 2 / 3
    assert unique_share(["", "a", " "]) == 2 / 3  # two without a word are the same
    assert unique_share([""]) == 1


def test_mean_length_by_hand():
    assert mean_length(["a b c", "a", ""]) == 4 / 3
    assert mean_length(["", ""]) == 0


# --- self_bleu ---


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # one word of two is shared; the pair is not: 1/(2 · 1). √(1/2 · 1/2)
        (["a b", "a c"], 1 / 2),
        # three words of four; two pairs of three; one triple of two; no four: 1/(2 · 1)
        (["a b c d", "a b c e"], (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4)),
        # "a" is all in "a b", but too short: e^(1 − 2/1). "a b": p1 = 1/2, p2 = 1/2
        (["a", "a b"], (math.exp(-1) + 1 / 2) / 2),
        # the first two are copies: 1 each. The third has nothing of them: 0
        (["a b", "a b", "c"], 2 / 3),
        # "a a a" has "a" three times, and "a b" once, which counts 1 of 3; pairs: 0 of 2,
        # 1/(2 · 2); triples: 0 of 1, 1/(4 · 1). "a b": p1 = 1/2, p2 = 1/2, too short: e^(1 − 3/2)
        (
            ["a a a", "a b"],
            ((1 / 3 * 1 / 4 * 1 / 4) ** (1 / 3) + math.exp(-1 / 2) / 2) / 2,
        ),
        # "a b": both words stand in others, the pair does not. "a": all in "a b", and "b" is as
        # short as it: no penalty
        (["a b", "a", "b"], ((1 * 1 / 2) ** (1 / 2) + 1 + 1) / 3),
        # as the third case, and 0: the empty text is no reference, though as near in length to "a"
        (["a", "a b", ""], (math.exp(-1) + 1 / 2 + 0) / 3),
        (["", "", "a"], 2 / 3),
        (["", "a"], 0),
        (["", " "], 1),
    ],
)
def test_self_bleu_by_hand(texts, expected):
    assert self_bleu(texts) == pytest.approx(expected)


def test_self_bleu_cuts_words_at_spaces_only():
    assert self_bleu(["yes, it is", "no; we are"]) == 0
    assert self_bleu(["yes.", "no."]) == 0  # BLEU's usual tokenization would share the full stop


def test_self_bleu_of_a_sample():
    texts = [f"the duck says {i}" for i in range(9)] + ["nothing of this kind"] * 3
    random = Random(1)
    values = {self_bleu(texts, sample=4)}
    for _ in range(3):
        random.shuffle(texts)
        values.add(self_bleu(texts, sample=4))
    assert len(values) == 1  # the order of the texts does not matter
    assert len({self_bleu(texts, sample=4, seed=seed) for seed in range(5)}) > 1
    assert self_bleu(texts, sample=12, seed=0) == self_bleu(texts, sample=99, seed=7)


def test_self_bleu_leaves_the_generator_alone():
    import random

    before = random.getstate()
    self_bleu(["a", "b", "c"], sample=2)
    assert random.getstate() == before


@pytest.mark.parametrize("sample", [1, 0, 2.5])
def test_self_bleu_refuses_a_sample_of_one(sample):
    with pytest.raises(ValueError, match="sample is .* at least 2"):
        self_bleu(["a", "b"], sample=sample)


# --- all of them ---


def test_diversity_has_the_same_numbers():
    texts = ["a b a", "a b", "c", ""]
    assert diversity(texts) == {
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "unique": unique_share(texts),
        "self_bleu": self_bleu(texts),
        "length": mean_length(texts),
    }


def test_diversity_of_silence():
    silent = diversity(["", ""])
    assert math.isnan(silent.pop("distinct_1")) and math.isnan(silent.pop("distinct_2"))
    assert silent == {"unique": 0.5, "self_bleu": 1, "length": 0}
    assert math.isnan(diversity(["a b"])["self_bleu"])


@pytest.mark.parametrize("number", [1, 2, 5])
def test_equal_texts(number):
    texts = ["a b c d e"] * number
    assert distinct_n(texts, 1) == distinct_n(texts, 4) == unique_share(texts) == 1 / number
    if number > 1:
        assert self_bleu(texts) == 1


def test_different_words():
    texts = [" ".join(f"w{i}-{j}" for j in range(5)) for i in range(6)]
    assert distinct_n(texts, 1) == distinct_n(texts, 2) == unique_share(texts) == 1
    assert self_bleu(texts) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=6), st.randoms())
def test_order_does_not_matter_and_shares_are_shares(texts, random):
    first = diversity(texts)
    random.shuffle(texts)
    second = diversity(texts)
    assert first == pytest.approx(second, nan_ok=True, rel=0, abs=0)
    for name in ("distinct_1", "distinct_2", "unique", "self_bleu"):
        assert math.isnan(first[name]) or 0 <= first[name] <= 1


@pytest.mark.parametrize("measure", EACH)
@pytest.mark.parametrize("texts", ["the duck", b"duck", None, 3])
def test_one_text_is_no_list(measure, texts):
    with pytest.raises(TypeError, match="texts is .*: give a list of texts"):
        measure(texts)


@pytest.mark.parametrize("measure", EACH)
def test_bad_lists(measure):
    with pytest.raises(ValueError, match="texts is empty: give at least one text"):
        measure([])
    with pytest.raises(TypeError, match=r"texts\[1\] is None: give texts"):
        measure(["a", None])
    with pytest.raises(TypeError, match=r"texts\[0\] is \[1, 2\]: give texts, decoded"):
        measure([[1, 2]])
