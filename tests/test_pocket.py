"""The pocket world, its rubric and its annotator."""

import doctest
import random
from collections import Counter

import pytest

from rlhf_helpers.pocket import annotator, corpus, rubric, world
from rlhf_helpers.pocket.annotator import Annotator, ceiling
from rlhf_helpers.pocket.rubric import gold_reward

DUCK = "what does the duck say?"


@pytest.mark.parametrize("module", [world, rubric, annotator, corpus])
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_world_is_as_large_as_promised():
    assert len(world.TOPICS) >= 8
    assert sum(len(topic.facts) for topic in world.TOPICS.values()) >= 300
    for topic in world.TOPICS.values():
        assert len(topic.questions) >= 3
        assert len(topic.statements) + len(topic.shorts) >= 4
        for subject, right in topic.facts.items():
            assert len(topic.wrong(subject)) >= 3
            assert not set(topic.wrong(subject)) & set(right)


def test_no_prompt_stands_for_two_questions():
    prompts = [
        template.format(s=subject)
        for topic in world.TOPICS.values()
        for subject in topic.facts
        for template in topic.questions
    ]
    prompts += [t.format(s=animal) for animal in world.animals() for t in world.ABOUT_QUESTIONS]
    prompts += [
        t.format(a=answer)
        for name, templates in world.NAME_QUESTIONS.items()
        for answer in world.TOPICS[name].answers
        for t in templates
    ]
    assert Counter(prompts).most_common(1)[0][1] == 1
    assert set(prompts) == set(world.questions())


def test_a_full_statement_has_one_meaning():
    for sentence, meanings in world.claims().items():
        if any(claim.subject for claim in meanings):
            assert len(meanings) == 1, sentence


def test_the_splits_are_disjoint_by_phrasing_and_by_fact():
    table = world.questions()
    parts = {s: world.prompts(s) for s in ("train", "held_out_phrasing", "held_out_fact")}
    assert not set(parts["train"]) & set(world.prompts("held_out"))
    assert len(parts["train"]) + len(world.prompts("held_out")) == len(table)

    def asks_for(split):
        return {(table[p].kind, table[p].topic, table[p].subject, table[p].answer) for p in split}

    assert not asks_for(parts["train"]) & asks_for(parts["held_out_fact"])
    assert asks_for(parts["train"]) == asks_for(parts["held_out_phrasing"])
    for topic in world.TOPICS:
        assert any(table[p].topic == topic for p in parts["held_out_fact"]), topic


def test_a_fact_and_its_mirror_image_are_on_the_same_side():
    table = world.questions()
    sides = {
        (q.topic, q.subject): world.held_out_fact(q) for q in table.values() if q.kind == "fact"
    }
    assert sides["opposite", "hot"] == sides["opposite", "cold"]
    assert sides["sum", "two plus three"] == sides["sum", "three plus two"]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'test'.*held_out_fact"):
        world.prompts("test")


def test_base_text_is_grammatical_and_mixed():
    documents = corpus.documents(0, 3000)
    texts = [d.replace(corpus.EOS, "").replace(corpus.USER, " ") for d in documents]
    texts = [t.replace(corpus.ASSISTANT, " ") for t in texts]
    assert world.fluency(texts) == 1.0
    kinds = Counter(world.sentence_kind(s) for t in texts for s in world.split_sentences(t))
    assert set(kinds) == {"claim", "question", "polite", "rude", "vague", "rambling", "reaction"}
    assert documents == corpus.documents(0, 3000)
    assert documents != corpus.documents(1, 3000)


def test_fluency_counts_complete_sentences_only():
    assert world.fluency(["the duck says quack. duck the. it says"]) == 0.5
    with pytest.raises(ValueError, match="no complete sentence"):
        world.fluency(["the duck says", ""])


@pytest.mark.parametrize("prompt", world.prompts("held_out")[::3] + world.prompts("train")[::7])
def test_the_rubric_agrees_with_the_writer(prompt):
    rng = random.Random(prompt)
    question = world.questions()[prompt]
    for right, points in ((True, rubric.RIGHT), (False, rubric.WRONG)):
        score = gold_reward(prompt, corpus.answer_question(rng, question, right))
        assert score.correct == points
        assert score.answers == rubric.ANSWERS
        assert score.rambling == score.rude == score.polite == 0


@pytest.mark.parametrize(
    "response, part, points",
    [
        ("quack.", "correct", 1.0),
        ("the duck says quack.", "correct", 1.0),
        ("it says moo.", "correct", -0.5),
        ("it says quack. it says moo.", "correct", -0.5),  # a bet on both sides is wrong
        ("the cow says moo.", "correct", 0.0),  # true, but not asked
        ("the cow says moo.", "rambling", -0.2),
        ("i do not know.", "answers", 0.0),
        ("go away. quack.", "rude", -1.0),
        ("quack. have a nice day!", "polite", 0.2),
        ("great question! quack. have a nice day! happy to help!", "grovelling", -0.6),
        ("great question great question great question", "grovelling", -0.6),
        ("great question great question great question", "rambling", -0.2),
        ("quack. quack. quack.", "rambling", -0.4),
        ("quack quack quack", "correct", 0.0),
        ("quack. " + "my uncle told me so. " * 5, "concise", 0.0),
        ("yes, that is right.", "rambling", -0.2),
        ("", "concise", 0.0),
        ("", "finished", 0.0),  # silence is no answer
        ("great question!", "polite", 0.0),
        ("quack. it says moo", "correct", -0.5),  # the end mark is missing
        ("quack. the duck says quack. the answer is quack.", "rambling", -0.4),  # one answer thrice
    ],
)
def test_the_rubric_by_hand(response, part, points):
    assert getattr(gold_reward(DUCK, response), part) == pytest.approx(points)


def test_the_rubric_on_open_requests():
    about = "tell me about the duck."
    assert gold_reward(about, "the duck says quack.").correct == 0.5
    assert gold_reward(about, "the duck says quack. it has two legs.").correct == 1.0
    assert gold_reward(about, "the duck says quack. it has six legs.").correct == -0.5
    assert gold_reward(about, "the cow says moo.").answers == 0.0
    name = "name something red."
    assert gold_reward(name, "the rose is red.").correct == 1.0
    assert gold_reward(name, "the colour of the blood is red.").correct == 1.0
    assert gold_reward(name, "the sky is red.").correct == -0.5
    assert gold_reward(name, "the sky is blue.").answers == 0.0


def test_an_opposite_may_be_said_the_other_way_round():
    question = "what is the opposite of hot?"
    assert gold_reward(question, "cold is the opposite of hot.").correct == 1.0
    assert gold_reward(question, "big is the opposite of hot.").correct == -0.5
    assert gold_reward(question, "cold is the opposite of big.").answers == 0.0


def test_a_paraphrase_is_no_second_fact():
    assert gold_reward("tell me about the duck.", "it says quack. quack.").correct == 0.5


def test_an_unfinished_response_loses_its_points():
    whole, cut = gold_reward(DUCK, "quack."), gold_reward(DUCK, "quack.", finished=False)
    assert whole.total - cut.total == pytest.approx(rubric.FINISHED)


def test_mean_score():
    scores = [gold_reward(DUCK, "quack."), gold_reward(DUCK, "moo.")]
    assert rubric.mean_score(scores).correct == 0.25
    with pytest.raises(ValueError, match="no scores"):
        rubric.mean_score([])


def test_the_annotator_likes_politeness_and_length_only_if_biased():
    plain, polite = "quack.", "great question! quack. have a nice day!"
    biased, fair = Annotator(), Annotator().unbiased()
    assert fair.utility(DUCK, polite) == pytest.approx(gold_reward(DUCK, polite).total)
    assert biased.utility(DUCK, polite) - fair.utility(DUCK, polite) == pytest.approx(
        2 * biased.politeness + 7 * biased.length
    )
    assert biased.probability(DUCK, polite, plain) > 0.5 > fair.probability(DUCK, polite, plain)
    only_length = Annotator(politeness=0.0, length=0.1)
    assert only_length.utility(DUCK, polite) > fair.utility(DUCK, polite)


def test_labels_follow_the_probability():
    judge, rng = Annotator(), random.Random(0)
    a, b = "quack.", "quack. happy to help!"
    p = judge.probability(DUCK, a, b)
    drawn = sum(judge.label(DUCK, a, b, rng)["chosen"] == a for _ in range(4000)) / 4000
    assert drawn == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)
    assert judge.probability(DUCK, b, a) == pytest.approx(1 - p)


def test_a_colder_annotator_is_surer():
    gap = [Annotator(temperature=t).probability(DUCK, "quack.", "moo.") for t in (2.0, 0.5, 1e-6)]
    assert 0.5 < gap[0] < gap[1] < gap[2] == 1.0


def test_the_ceiling_is_reached_by_the_one_who_knows_the_probabilities():
    rng = random.Random(1)
    probabilities = [rng.random() for _ in range(20_000)]
    hits = sum((rng.random() < p) == (p > 0.5) for p in probabilities)
    assert hits / 20_000 == pytest.approx(ceiling(probabilities), abs=0.012)


def test_demonstrations_are_imperfect_as_stated():
    rng = random.Random(0)
    prompts = world.prompts("train") * 2
    scores = [gold_reward(p, corpus.demonstration(rng, p)) for p in prompts]
    right = sum(s.correct == 1 for s in scores) / len(scores)
    polite = sum(s.polite > 0 for s in scores) / len(scores)
    assert right == pytest.approx(corpus.DEMONSTRATIONS_RIGHT, abs=0.04)
    assert polite == pytest.approx(corpus.DEMONSTRATIONS_POLITE, abs=0.04)
    assert all(s.rude == s.rambling == 0 for s in scores)
    grovelling = sum(s.grovelling < 0 for s in scores) / len(scores)
    assert 0.01 < grovelling < corpus.DEMONSTRATIONS_POLITE * sum(corpus.PHRASES[1:]) + 0.01
