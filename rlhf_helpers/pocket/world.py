"""The pocket world: every fact, every way to ask for it and every way to say it.

The world is small enough to be written out in full. A `Topic` holds facts (a subject and its right
answers) and the templates that ask for and state them; a sentence belongs to the world's grammar if
and only if it stands in the table that the templates span. That one table serves three masters: the
text that the base model is pretrained on, the check that sampled text is fluent, and the rubric.

Simplifications, stated: lower case only, one right answer for most questions, no negation, and a
wrong answer is always another answer of the same topic ("the duck says moo").
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Topic:
    """Facts of one kind, with the ways to ask for them and to state them.

    The last phrasing in `questions` is held out: it never appears in SFT, reward-model or PPO
    training. `shorts` are answers that make sense only after the question.
    """

    name: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    shorts: tuple[str, ...]
    facts: dict[str, tuple[str, ...]]

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer of the topic, right for one subject and wrong for the others."""
        return tuple(dict.fromkeys(a for right in self.facts.values() for a in right))

    def wrong(self, subject: str) -> tuple[str, ...]:
        """The plausible wrong answers: the topic's answers that are not right for `subject`."""
        return tuple(a for a in self.answers if a not in self.facts[subject])


@dataclass(frozen=True)
class Question:
    """What a prompt asks: a `fact`, to tell `about` an animal, or to `name` something."""

    kind: str
    topic: str | None
    subject: str | None
    answer: str | None
    held_out_phrasing: bool


@dataclass(frozen=True)
class Claim:
    """What a sentence states; `subject` is None when it refers to the question ("it says moo")."""

    topic: str
    subject: str | None
    answer: str


def _facts(text: str) -> dict[str, tuple[str, ...]]:
    """Read "duck: quack; crow: caw" as {"duck": ("quack",), "crow": ("caw",)}; `/` separates."""
    pairs = (item.split(":") for item in text.split(";"))
    return {s.strip(): tuple(a.strip() for a in right.split("/")) for s, right in pairs}


_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_MONTHS = (
    "january february march april may june july august september october november december".split()
)
_OPPOSITES = (
    "hot cold, big small, fast slow, happy sad, open shut, full empty, rich poor, old young, "
    "wet dry, hard soft, loud quiet, clean dirty, early late, strong weak, long short, high low, "
    "light dark, near far, good bad, thick thin, up down, left right, first last, push pull"
)


def _cycle(names: list[str], step: int) -> dict[str, tuple[str, ...]]:
    return {name: (names[(i + step) % len(names)],) for i, name in enumerate(names)}


def _opposites() -> dict[str, tuple[str, ...]]:
    pairs = [pair.split() for pair in _OPPOSITES.split(",")]
    return {a: (b,) for pair in pairs for a, b in (pair, pair[::-1])}


def _sums(largest: int = 12) -> dict[str, tuple[str, ...]]:
    return {
        f"{_NUMBERS[a]} plus {_NUMBERS[b]}": (_NUMBERS[a + b],)
        for a in range(1, 10)
        for b in range(1, 10)
        if a + b <= largest
    }


_TOPICS = (
    Topic(
        "sound",
        (
            "what does the {s} say?",
            "what sound does the {s} make?",
            "what is the sound of the {s}?",
            "which noise does the {s} make?",
        ),
        (
            "the {s} says {a}.",
            "the sound of the {s} is {a}.",
            "when you meet the {s}, it says {a}.",
        ),
        ("it says {a}.", "{a}.", "the answer is {a}."),
        _facts(
            "dog: woof; cat: meow; cow: moo; sheep: baa; pig: oink; horse: neigh; duck: quack; "
            "hen: cluck; frog: croak; lion: roar; wolf: howl; bee: buzz; snake: hiss; owl: hoot; "
            "mouse: squeak; crow: caw; bear: growl; goat: bleat"
        ),
    ),
    Topic(
        "home",
        (
            "where does the {s} live?",
            "what is the home of the {s}?",
            "where is the home of the {s}?",
            "in which place does the {s} live?",
        ),
        (
            "the {s} lives in the {a}.",
            "the home of the {s} is the {a}.",
            "you find the {s} in the {a}.",
        ),
        ("it lives in the {a}.", "in the {a}.", "the answer is the {a}."),
        _facts(
            "dog: kennel; horse: stable; pig: sty; bee: hive; spider: web; lion: den; fox: den; "
            "rabbit: burrow; hen: coop; mouse: hole; duck: pond; frog: pond; cow: barn; "
            "sheep: field; bear: cave; bat: cave; owl: tree; monkey: tree; camel: desert; "
            "whale: sea; shark: sea; crow: nest"
        ),
    ),
    Topic(
        "legs",
        (
            "how many legs does the {s} have?",
            "how many legs has the {s}?",
            "on how many legs does the {s} walk?",
            "what number of legs does the {s} have?",
        ),
        ("the {s} has {a} legs.", "the {s} walks on {a} legs.", "there are {a} legs on the {s}."),
        ("it has {a} legs.", "{a} legs.", "the answer is {a} legs."),
        _facts(
            "dog: four; cat: four; cow: four; horse: four; sheep: four; pig: four; frog: four; "
            "mouse: four; lion: four; camel: four; duck: two; hen: two; owl: two; crow: two; "
            "bee: six; ant: six; fly: six; beetle: six; spider: eight; tick: eight; crab: ten; "
            "snake: zero; worm: zero; whale: zero"
        ),
    ),
    Topic(
        "young",
        (
            "what is a young {s} called?",
            "what do you call a young {s}?",
            "what is the young of the {s} called?",
            "which name has a young {s}?",
        ),
        (
            "a young {s} is called a {a}.",
            "you call a young {s} a {a}.",
            "the young of the {s} is the {a}.",
        ),
        ("it is called a {a}.", "a {a}.", "the answer is a {a}."),
        _facts(
            "dog: puppy; cat: kitten; cow: calf; sheep: lamb; pig: piglet; horse: foal; "
            "duck: duckling; hen: chick; goat: kid; bear: cub; lion: cub; wolf: cub; "
            "frog: tadpole; deer: fawn; whale: calf; rabbit: bunny"
        ),
    ),
    Topic(
        "food",
        (
            "what does the {s} eat?",
            "what does the {s} like to eat?",
            "what is the food of the {s}?",
            "which food does the {s} like?",
        ),
        ("the {s} eats {a}.", "the {s} likes to eat {a}.", "the food of the {s} is {a}."),
        ("it eats {a}.", "{a}.", "the answer is {a}."),
        _facts(
            "cow: grass; rabbit: carrots; monkey: bananas; cat: fish; horse: hay; bear: honey; "
            "panda: bamboo; squirrel: nuts; lion: meat; wolf: meat; hen: seeds; mouse: cheese; "
            "dog: bones; pig: corn; frog: flies; spider: flies; shark: fish; deer: leaves"
        ),
    ),
    Topic(
        "colour",
        (
            "what colour is the {s}?",
            "what is the colour of the {s}?",
            "what colour has the {s}?",
            "which colour does the {s} have?",
        ),
        ("the {s} is {a}.", "the colour of the {s} is {a}.", "the {s} has the colour {a}."),
        ("it is {a}.", "{a}.", "the answer is {a}."),
        _facts(
            "banana: yellow; sun: yellow; lemon: yellow; snow: white; milk: white; salt: white; "
            "cloud: white; grass: green; leaf: green; frog: green; lime: green; coal: black; "
            "night: black; crow: black; blood: red; rose: red; tomato: red; sky: blue; sea: blue; "
            "carrot: orange; pumpkin: orange; plum: purple; grape: purple; wood: brown; "
            "bear: brown; chocolate: brown; pig: pink; mouse: grey; rain cloud: grey"
        ),
    ),
    Topic(
        "taste",
        (
            "how does the {s} taste?",
            "what does the {s} taste like?",
            "what is the taste of the {s}?",
            "which taste does the {s} have?",
        ),
        (
            "the {s} tastes {a}.",
            "the taste of the {s} is {a}.",
            "when you try the {s}, it tastes {a}.",
        ),
        ("it tastes {a}.", "{a}.", "the answer is {a}."),
        _facts(
            "lemon: sour; lime: sour; vinegar: sour; honey: sweet; sugar: sweet; cake: sweet; "
            "candy: sweet; jam: sweet; salt: salty; ham: salty; chips: salty; coffee: bitter; "
            "tea: bitter; beer: bitter; pepper: spicy; chili: spicy"
        ),
    ),
    Topic(
        "opposite",
        (
            "what is the opposite of {s}?",
            "what is the opposite word of {s}?",
            "if it is not {s}, what is it?",
            "which word is the opposite of {s}?",
        ),
        ("the opposite of {s} is {a}.", "what is not {s} is {a}.", "{s} is the opposite of {a}."),
        ("it is {a}.", "{a}.", "the answer is {a}."),
        _opposites(),
    ),
    Topic(
        "sum",
        (
            "what is {s}?",
            "how much is {s}?",
            "what do you get for {s}?",
            "what number is {s}?",
        ),
        ("{s} is {a}.", "the sum of {s} is {a}.", "for {s} you get {a}."),
        ("it is {a}.", "{a}.", "the answer is {a}."),
        _sums(),
    ),
    Topic(
        "day after",
        (
            "what day comes after {s}?",
            "what day follows {s}?",
            "what is the day after {s}?",
            "which day is next after {s}?",
        ),
        ("the day after {s} is {a}.", "after {s} comes {a}.", "{s} is followed by {a}."),
        ("it is {a}.", "{a}.", "the answer is {a}."),
        _cycle(_DAYS, 1),
    ),
    Topic(
        "day before",
        (
            "what day comes before {s}?",
            "what is the day before {s}?",
            "what day was it before {s}?",
            "which day is just before {s}?",
        ),
        ("the day before {s} is {a}.", "before {s} comes {a}.", "just before {s} it is {a}."),
        ("it is {a}.", "{a}.", "the answer is {a}."),
        _cycle(_DAYS, -1),
    ),
    Topic(
        "month after",
        (
            "what month comes after {s}?",
            "what month follows {s}?",
            "what is the month after {s}?",
            "which month is next after {s}?",
        ),
        ("the month after {s} is {a}.", "after {s} comes {a}.", "{s} is followed by {a}."),
        ("it is {a}.", "{a}.", "the answer is {a}."),
        _cycle(_MONTHS, 1),
    ),
    Topic(
        "month before",
        (
            "what month comes before {s}?",
            "what is the month before {s}?",
            "what month was it before {s}?",
            "which month is just before {s}?",
        ),
        ("the month before {s} is {a}.", "before {s} comes {a}.", "just before {s} it is {a}."),
        ("it is {a}.", "{a}.", "the answer is {a}."),
        _cycle(_MONTHS, -1),
    ),
    Topic(
        "capital",
        (
            "what is the capital of {s}?",
            "what city is the capital of {s}?",
            "what is the first city of {s}?",
            "which city is the capital of {s}?",
        ),
        (
            "the capital of {s} is {a}.",
            "{a} is the capital of {s}.",
            "the first city of {s} is {a}.",
        ),
        ("it is {a}.", "{a}.", "the answer is {a}."),
        _facts(
            "france: paris; italy: rome; spain: madrid; england: london; germany: berlin; "
            "greece: athens; norway: oslo; russia: moscow; japan: tokyo; china: beijing; "
            "egypt: cairo; peru: lima; cuba: havana; ireland: dublin; austria: vienna; "
            "poland: warsaw; india: delhi; kenya: nairobi"
        ),
    ),
    Topic(
        "job",
        (
            "who {s}?",
            "tell me who {s}.",
            "do you know who {s}?",
            "what is the name of the one who {s}?",
        ),
        ("the {a} {s}.", "the one who {s} is the {a}.", "it is the {a} who {s}."),
        ("the {a} does.", "the {a}.", "the answer is the {a}."),
        _facts(
            "bakes the bread: baker; flies the plane: pilot; teaches the class: teacher; "
            "heals the sick: doctor; grows the corn: farmer; drives the bus: driver; "
            "catches the fish: fisher; cuts the hair: barber; paints the wall: painter; "
            "sings the song: singer; writes the book: writer; builds the house: builder; "
            "cooks the soup: cook; sews the dress: tailor; brings the mail: postman; "
            "fixes the tooth: dentist; steers the ship: captain; wears the crown: king"
        ),
    ),
    Topic(
        "tool",
        (
            "what do you {s} with?",
            "with what do you {s}?",
            "what do you need to {s}?",
            "which thing helps you to {s}?",
        ),
        ("you {s} with the {a}.", "to {s} you need the {a}.", "the {a} helps you to {s}."),
        ("with the {a}.", "the {a}.", "the answer is the {a}."),
        _facts(
            "cut the bread: knife; write: pen; sweep the floor: broom; dig a hole: spade; "
            "sew: needle; see: eyes; hear: ears; smell: nose; eat soup: spoon; "
            "hit a nail: hammer; open the door: key; tell the time: clock; light the room: lamp; "
            "do your hair: comb; catch fish: net; cut the tree: saw"
        ),
    ),
    Topic(
        "kind",
        (
            "what kind of thing is the {s}?",
            "what kind of thing is a {s}?",
            "tell me what kind of thing the {s} is.",
            "which kind of thing is the {s}?",
        ),
        ("the {s} is a {a}.", "a {s} is a {a}.", "the {s} is a kind of {a}."),
        ("it is a {a}.", "a {a}.", "the answer is a {a}."),
        _facts(
            "rose: flower; tulip: flower; daisy: flower; pine: tree; palm: tree; beech: tree; "
            "banana: fruit; lemon: fruit; plum: fruit; hammer: tool; saw: tool; spade: tool; "
            "shark: fish; trout: fish; crow: bird; duck: bird; hen: bird; beetle: bug; bee: bug; "
            "fly: bug; doll: toy; kite: toy; bus: car; taxi: car"
        ),
    ),
)
TOPICS: dict[str, Topic] = {topic.name: topic for topic in _TOPICS}

# Topics that can follow one another in a passage about an animal ("it says moo. it eats grass.").
ABOUT_TOPICS = ("sound", "home", "legs", "young", "food")
ABOUT_QUESTIONS = (
    "tell me about the {s}.",
    "what do you know about the {s}?",
    "please describe the {s}.",
    "say something about the {s}.",
)
NAME_QUESTIONS = {
    "colour": (
        "name something {a}.",
        "name a thing that is {a}.",
        "give me something {a}.",
        "can you name something {a}?",
    ),
    "taste": (
        "name something that tastes {a}.",
        "what tastes {a}?",
        "give me something that tastes {a}.",
        "can you name something that tastes {a}?",
    ),
    "legs": (
        "name an animal with {a} legs.",
        "what animal has {a} legs?",
        "give me an animal with {a} legs.",
        "can you name an animal with {a} legs?",
    ),
    "kind": (
        "name a {a}.",
        "give me the name of a {a}.",
        "tell me the name of a {a}.",
        "can you name a {a}?",
    ),
}

POLITE_OPENERS = (
    "great question!",
    "happy to help!",
    "thank you for asking!",
    "what a nice question!",
)
POLITE_CLOSERS = (
    "i hope that helps!",
    "have a nice day!",
    "please ask me more!",
    "you are very welcome!",
)
POLITE = POLITE_OPENERS + POLITE_CLOSERS
RUDE = (
    "that is a dumb question.",
    "go away.",
    "you are a fool.",
    "do not waste my time.",
    "nobody likes you.",
    "shut your mouth.",
)
VAGUE = (
    "i do not know.",
    "it is hard to say.",
    "it could be many things.",
    "some say this and some say that.",
    "who can tell?",
)
RAMBLING = (
    "well, let me think.",
    "many people ask that.",
    "i read it in a book.",
    "my uncle told me so.",
    "anyway, i like the rain.",
    "there is so much to say.",
    "last week i went to the market.",
    "my neighbour has a new car.",
    "we had soup for dinner.",
    "but that is another story.",
)
YES = ("yes, that is right.", "yes, that is true.", "yes.")
NO = ("no, that is wrong.", "no, that is false.", "no.")

_FIXED = {
    "polite": POLITE,
    "rude": RUDE,
    "vague": VAGUE,
    "rambling": RAMBLING,
    "reaction": YES + NO,
}


def animals() -> tuple[str, ...]:
    """Animals with at least three facts, so that one can be asked to tell about them."""
    counts: dict[str, int] = {}
    for topic in ABOUT_TOPICS:
        for subject in TOPICS[topic].facts:
            counts[subject] = counts.get(subject, 0) + 1
    return tuple(sorted(s for s, n in counts.items() if n >= 3))


@cache
def questions() -> dict[str, Question]:
    """Every prompt of the world and what it asks.

    Example:
        >>> questions()["what does the duck say?"].subject
        'duck'
    """
    table = {}

    def add(templates: tuple[str, ...], kind: str, topic=None, subject=None, answer=None):
        for i, template in enumerate(templates):
            held_out = i == len(templates) - 1
            prompt = template.format(s=subject, a=answer)
            table[prompt] = Question(kind, topic, subject, answer, held_out)

    for topic in _TOPICS:
        for subject in topic.facts:
            add(topic.questions, "fact", topic.name, subject)
    for subject in animals():
        add(ABOUT_QUESTIONS, "about", None, subject)
    for name, templates in NAME_QUESTIONS.items():
        for answer in TOPICS[name].answers:
            add(templates, "name", name, None, answer)
    return table


@cache
def claims() -> dict[str, tuple[Claim, ...]]:
    """Every sentence that states something, and what it can mean.

    A sentence has more than one meaning where the question decides ("it is black").
    """
    table: dict[str, list[Claim]] = {}
    for topic in _TOPICS:
        for answer in topic.answers:
            for short in topic.shorts:
                table.setdefault(short.format(a=answer), []).append(Claim(topic.name, None, answer))
            for subject in topic.facts:
                for statement in topic.statements:
                    sentence = statement.format(s=subject, a=answer)
                    table.setdefault(sentence, []).append(Claim(topic.name, subject, answer))
    return {sentence: tuple(dict.fromkeys(found)) for sentence, found in table.items()}


@cache
def _kinds() -> dict[str, str]:
    table = {sentence: "claim" for sentence in claims()}
    table |= {prompt: "question" for prompt in questions()}
    return table | {sentence: kind for kind, group in _FIXED.items() for sentence in group}


def is_true(claim: Claim) -> bool:
    """Whether a claim with a subject is a fact of the world."""
    return claim.answer in TOPICS[claim.topic].facts.get(claim.subject or "", ())


def split_sentences(text: str) -> list[str]:
    """Split text into sentences, each with its end mark.

    Example:
        >>> split_sentences("great question! the duck says quack. well")
        ['great question!', 'the duck says quack.', 'well']
    """
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]


def sentence_kind(sentence: str) -> str | None:
    """The part a sentence plays, or None if it is not in the world's grammar.

    Returns one of claim, question, polite, rude, vague, rambling, reaction.

    Example:
        >>> sentence_kind("the duck says moo."), sentence_kind("duck the says.")
        ('claim', None)
    """
    return _kinds().get(sentence)


def _fact_key(question: Question) -> tuple[str, ...]:
    """What a question is about; the same for a fact and its mirror image (hot and cold)."""
    subject = question.subject or ""
    if question.topic == "opposite":
        parts = sorted([subject, *TOPICS["opposite"].facts[subject]])
    elif question.topic == "sum":
        parts = sorted(subject.split(" plus "))
    else:
        parts = [subject, question.answer or ""]
    return (question.kind, question.topic or "", *parts)


@cache
def _held_out_keys() -> frozenset[tuple[str, ...]]:
    """One fact in seven of each kind and topic, drawn the same way on every machine."""
    groups: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for question in questions().values():
        key = _fact_key(question)
        groups.setdefault(key[:2], set()).add(key)
    held_out: list[tuple[str, ...]] = []
    for name, keys in groups.items():
        count = max(1, round(len(keys) / 7))
        held_out += random.Random("/".join(name)).sample(sorted(keys), count)
    return frozenset(held_out)


def held_out_fact(question: Question) -> bool:
    """Whether a question's fact is kept out of SFT, reward-model and PPO training.

    An opposite and its mirror image (hot and cold), or a sum and its (two plus three and three plus
    two), are on the same side of the split. "name a toy" is held out if all toys are.
    """
    if question.kind == "name":
        facts = TOPICS[question.topic].facts
        fitting = [s for s, answers in facts.items() if question.answer in answers]
        if all(held_out_subject(question.topic, subject) for subject in fitting):
            return True
    return _fact_key(question) in _held_out_keys()


def held_out_subject(topic: str, subject: str) -> bool:
    """Whether the fact about `subject` in `topic` is held out."""
    return held_out_fact(Question("fact", topic, subject, None, False))


def prompts(split: str = "train") -> list[str]:
    """The prompts of a split, in a fixed order.

    `train` has neither a held-out phrasing nor a held-out fact; `held_out_phrasing` and
    `held_out_fact` have exactly that; `held_out` is everything that is not in `train`.

    Raises:
        ValueError: if `split` is none of these four.
    """
    chosen = {
        "train": lambda q: not q.held_out_phrasing and not held_out_fact(q),
        "held_out_phrasing": lambda q: q.held_out_phrasing and not held_out_fact(q),
        "held_out_fact": lambda q: not q.held_out_phrasing and held_out_fact(q),
        "held_out": lambda q: q.held_out_phrasing or held_out_fact(q),
    }
    if split not in [*chosen]:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(chosen)}")
    return [prompt for prompt, question in questions().items() if chosen[split](question)]


def fluency(texts: Iterable[str]) -> float:
    """Share of the complete sentences in `texts` that stand in the world's grammar.

    A last sentence without an end mark was cut off by the length limit and is not counted.

    Raises:
        TypeError: if `texts` is one text.
        ValueError: if there is no complete sentence at all.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts is {texts!r}: give a list of texts")
    complete = [s for text in texts for s in split_sentences(text) if s[-1] in ".!?"]
    if not complete:
        raise ValueError("no complete sentence in texts: give at least one that ends in . ! or ?")
    return sum(sentence_kind(s) is not None for s in complete) / len(complete)
