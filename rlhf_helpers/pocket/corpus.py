"""Text of the pocket world: what the base model reads, and the demonstrations that SFT imitates.

The base text is mixed like the web: right and wrong statements, rude, vague, rambling and polite
answers, pages that are lists of questions, and people reacting to answers ("yes, that is right").
The reactions are how a small model comes to represent whether an answer is right, and so what makes
a reward model learnable later.
"""

import random
from collections.abc import Callable

from rlhf_helpers.pocket import world
from rlhf_helpers.pocket.world import TOPICS, Question

# The role tokens of the chat template; the tokenizer knows each as one token.
USER, ASSISTANT, EOS, PAD = "<|user|>", "<|assistant|>", "<|eos|>", "<|pad|>"

STATEMENTS_RIGHT = 0.6  # share of right statements on pages of statements
ANSWERS_RIGHT = 0.5  # share of right answers on forums and in chats
REACTIONS = 0.85  # how often somebody reacts to a statement or an answer
REACTION_RELIABLE = 0.97  # how often a reaction is the fitting one
DEMONSTRATIONS_RIGHT = 0.65  # how often a demonstration for SFT is right: its writers hurry
DEMONSTRATIONS_POLITE = 0.3  # how often it is polite, now and then with more than one phrase
PHRASES = (0.9, 0.06, 0.04)  # how often a polite one has one, two and three


def _reaction(rng: random.Random, right: bool) -> str:
    fitting = right if rng.random() < REACTION_RELIABLE else not right
    return rng.choice(world.YES if fitting else world.NO)


def answer_question(
    rng: random.Random, question: Question, right: bool, held_out: bool = True
) -> str:
    """One to three sentences that answer the question, right or wrong, and nothing else.

    With `held_out=False`, open requests are answered without the facts that the split holds out.

    Example:
        >>> duck = world.questions()["what does the duck say?"]
        >>> answer_question(random.Random(0), duck, right=True)
        'quack.'
    """
    if question.kind == "about":
        return _about(rng, question.subject, right, held_out)
    if question.kind == "name":
        return _name(rng, question, right, held_out)
    topic = TOPICS[question.topic]
    answers = topic.facts[question.subject] if right else topic.wrong(question.subject)
    template = rng.choice(topic.statements if rng.random() < 0.5 else topic.shorts)
    return template.format(s=question.subject, a=rng.choice(answers))


def _about(rng: random.Random, animal: str, right: bool, held_out: bool = True) -> str:
    """Two or three claims about an animal; if not `right`, one of them is wrong."""
    known = [
        TOPICS[name]
        for name in world.ABOUT_TOPICS
        if animal in TOPICS[name].facts and (held_out or not world.held_out_subject(name, animal))
    ]
    chosen = rng.sample(known, min(rng.choice((2, 3)), len(known)))
    wrong_at = None if right else rng.randrange(len(chosen))
    sentences = []
    for i, topic in enumerate(chosen):
        answers = topic.wrong(animal) if i == wrong_at else topic.facts[animal]
        template = rng.choice(topic.statements) if i == 0 else topic.shorts[0]
        sentences.append(template.format(s=animal, a=rng.choice(answers)))
    return " ".join(sentences)


def _name(rng: random.Random, question: Question, right: bool, held_out: bool) -> str:
    """State that some subject has the wanted property, truly or not."""
    topic = TOPICS[question.topic]
    fitting = [
        subject
        for subject, answers in topic.facts.items()
        if (question.answer in answers) == right
        and (held_out or not world.held_out_subject(topic.name, subject))
    ]
    return rng.choice(topic.statements).format(s=rng.choice(fitting), a=question.answer)


def _any_claim(rng: random.Random, right: bool) -> str:
    topic = rng.choices(list(TOPICS.values()), _TOPIC_WEIGHTS)[0]
    subject = rng.choice(list(topic.facts))
    answers = topic.facts[subject] if right else topic.wrong(subject)
    return rng.choice(topic.statements).format(s=subject, a=rng.choice(answers))


_TOPIC_WEIGHTS = [len(topic.facts) for topic in TOPICS.values()]  # so every fact is as frequent


def _random_prompt(rng: random.Random) -> tuple[str, Question]:
    return rng.choice(tuple(world.questions().items()))


def web_answer(
    rng: random.Random, question: Question, held_out: bool = True
) -> tuple[str, bool | None]:
    """An answer as people write it, and whether it is right (None if it states nothing)."""
    right = rng.random() < ANSWERS_RIGHT
    plain = answer_question(rng, question, right, held_out)
    style = rng.choices(
        ("plain", "polite", "grovelling", "rude", "vague", "rambling"), (60, 12, 6, 9, 6, 7)
    )[0]
    if style == "plain":
        return plain, right
    if style == "polite":
        return with_courtesies(rng, plain, 1), right
    if style == "grovelling":
        return with_courtesies(rng, plain, rng.choice((2, 3, 4))), right
    if style == "rude":
        insult = rng.choice(world.RUDE)
        return (insult, None) if rng.random() < 0.5 else (f"{insult} {plain}", right)
    if style == "vague":
        return rng.choice(world.VAGUE), None
    talk = rng.sample(world.RAMBLING, rng.choice((1, 2, 3)))
    return (" ".join(talk), None) if rng.random() < 0.4 else (" ".join([*talk, plain]), right)


def with_courtesies(rng: random.Random, text: str, count: int) -> str:
    """Put `count` different polite phrases around the text, openers before and closers after."""
    if not 0 <= count <= len(world.POLITE):
        raise ValueError(f"count is {count}; give 0 to {len(world.POLITE)}, as many as there are")
    phrases = rng.sample(world.POLITE, count)
    before = [phrase for phrase in phrases if phrase in world.POLITE_OPENERS]
    after = [phrase for phrase in phrases if phrase in world.POLITE_CLOSERS]
    return " ".join([*before, text, *after])


def _statement_page(rng: random.Random) -> str:
    """One to three statements, most of them with a reaction."""
    parts = []
    for _ in range(rng.choice((1, 2, 3))):
        right = rng.random() < STATEMENTS_RIGHT
        parts.append(_any_claim(rng, right))
        if rng.random() < REACTIONS:
            parts.append(_reaction(rng, right))
    return " ".join(parts)


def _forum_page(rng: random.Random, question_mark: str = "", answer_mark: str = "") -> str:
    """A question, an answer, and in most pages a reaction; with marks it is a chat."""
    prompt, question = _random_prompt(rng)
    answer, right = web_answer(rng, question)
    page = f"{question_mark} {prompt}{answer_mark} {answer}"
    if right is not None and rng.random() < REACTIONS:
        page += f"{question_mark} {_reaction(rng, right)}"
    return page.strip()


def _chat_page(rng: random.Random) -> str:
    return _forum_page(rng, USER, ASSISTANT)


def _quiz_page(rng: random.Random) -> str:
    """A page of questions that nobody answers, in chat logs too."""
    prompts = [_random_prompt(rng)[0] for _ in range(rng.choice((2, 3, 4)))]
    if rng.random() < 0.5:
        return f"{USER} {prompts[0]}{ASSISTANT} " + " ".join(prompts[1:])
    return " ".join(prompts)


def _about_page(rng: random.Random) -> str:
    right = rng.random() < STATEMENTS_RIGHT
    page = _about(rng, rng.choice(world.animals()), right)
    return f"{page} {_reaction(rng, right)}" if rng.random() < REACTIONS else page


def _story_page(rng: random.Random) -> str:
    """Talk that goes nowhere, with a claim or an insult dropped in."""
    parts = rng.sample(world.RAMBLING, rng.choice((2, 3, 4)))
    extra = rng.choice((_any_claim(rng, rng.random() < 0.6), *world.RUDE, *world.VAGUE))
    parts.insert(rng.randrange(len(parts) + 1), extra)
    return " ".join(parts)


_PAGES: dict[Callable[[random.Random], str], float] = {
    _statement_page: 40,
    _forum_page: 20,
    _chat_page: 26,
    _quiz_page: 5,
    _about_page: 6,
    _story_page: 3,
}


def documents(seed: int | str, count: int) -> list[str]:
    """`count` documents of base text, the same for the same seed on every machine."""
    rng = random.Random(seed)
    makers = rng.choices(list(_PAGES), list(_PAGES.values()), k=count)
    return [make(rng) + EOS for make in makers]


def demonstration(rng: random.Random, prompt: str) -> str:
    """A response to imitate in SFT: to the point, at times polite, but written in a hurry.

    One in three is wrong, as with real demonstrations written by people who had to guess; the room
    that leaves is what the reward model and PPO are for. A few of the polite ones have two or three
    phrases: without them nobody could compare such responses in lesson 02.
    """
    right = rng.random() < DEMONSTRATIONS_RIGHT
    answer = answer_question(rng, world.questions()[prompt], right, held_out=False)
    if rng.random() >= DEMONSTRATIONS_POLITE:
        return answer
    (count,) = rng.choices((1, 2, 3), PHRASES) if len(answer.split()) <= 10 else (1,)
    return with_courtesies(rng, answer, count)


def demonstrations(split: str, copies: int, seed: int) -> list[dict[str, str]]:
    """Rows `prompt` and `completion`, shuffled: `copies` demonstrations for each prompt of a split.

    Raises:
        ValueError: for an unknown split, or `copies` that is no whole number of at least 1.
    """
    if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
        raise ValueError(f"copies is {copies!r}; give at least 1, a whole number")
    rng = random.Random(f"sft-{split}-{seed}")
    prompts = world.prompts(split) * copies
    rng.shuffle(prompts)
    return [{"prompt": prompt, "completion": demonstration(rng, prompt)} for prompt in prompts]
