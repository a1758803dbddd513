"""Four questions to a base model: is it fluent, does it know, can it judge, is it an assistant?"""

import random
import re
from collections import Counter
from collections.abc import Sequence

import torch

from rlhf_helpers.pocket import corpus, world
from rlhf_helpers.pocket.rubric import RIGHT, answer_in, gold_reward, look_up
from rlhf_helpers.pocket.world import TOPICS

_ROLES = re.compile(
    "|".join(map(re.escape, (corpus.USER, corpus.ASSISTANT, corpus.EOS, corpus.PAD)))
)
STYLES = (
    "right, nothing more",
    "wrong",
    "asks back",
    "rude",
    "vague or rambling",
    "answers, but goes on",
    "other",
)


@torch.no_grad()
def sampled_pages(model, tokenizer, count: int = 256, length: int = 64, seed: int = 0) -> list[str]:
    """Pages of base text that the model makes up, at temperature 1.

    Each follows a finished page of real base text, as pages did in pretraining, and is not told
    what to be about. Role tokens are taken out, so that `world.fluency` can check what is left.
    """
    before = corpus.documents(f"before-{seed}", count)
    start = tokenizer(before, padding=True, padding_side="left", return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = model.generate(
            **start.to(model.device),
            max_new_tokens=length,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    pages = tokenizer.batch_decode(tokens[:, start["input_ids"].shape[1] :])
    return [" ".join(_ROLES.sub(" ", page).split()) for page in pages]


@torch.no_grad()
def continuation_logprobs(
    model, tokenizer, contexts: list[str], continuations: list[str]
) -> torch.Tensor:
    """Log-probability of each continuation after its context, in nats, shape [N].

    Args:
        contexts: N texts, each at least one token long; nothing is predicted before them.
        continuations: N texts to score.

    Raises:
        ValueError: for no contexts or an empty one, or not as many continuations.
    """
    if not contexts or not all(contexts):
        raise ValueError(
            "contexts must be texts of at least one token: nothing is before the first"
        )
    if len(contexts) != len(continuations):
        raise ValueError(
            f"{len(contexts)} contexts for {len(continuations)} continuations; give one for each"
        )
    scores = []
    pairs = list(zip(contexts, continuations, strict=True))
    for start in range(0, len(pairs), 256):
        chunk = pairs[start : start + 256]
        heads = [tokenizer(c, add_special_tokens=False)["input_ids"] for c, _ in chunk]
        tails = [tokenizer(t, add_special_tokens=False)["input_ids"] for _, t in chunk]
        rows = {"input_ids": [h + t for h, t in zip(heads, tails, strict=True)]}
        batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)
        logits = model(**batch).logits[:, :-1].float()
        targets = batch["input_ids"][:, 1:]
        logprobs = -torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none"
        )
        position = torch.arange(1, logits.shape[1] + 1, device=model.device)
        first = torch.tensor([len(h) for h in heads], device=model.device)[:, None]
        last = first + torch.tensor([len(t) for t in tails], device=model.device)[:, None]
        scores.append((logprobs * ((position >= first) & (position < last))).sum(-1))
    return torch.cat(scores)


def known_facts(model, tokenizer) -> dict[str, float]:
    """For each topic, the share of facts whose right statement beats every wrong one.

    The statement's plain form is scored from the answer on ("the duck says" | "quack.").
    """
    questions, contexts, continuations = [], [], []
    for topic in TOPICS.values():
        for subject in topic.facts:
            for answer in topic.answers:
                questions.append((topic.name, subject, answer))
                before, after = topic.statements[0].format(s=subject, a="|").split("|")
                contexts.append(before.strip())
                continuations.append(answer + after)
    scores = continuation_logprobs(model, tokenizer, contexts, continuations)
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for (topic, subject, answer), score in zip(questions, scores.tolist(), strict=True):
        best[topic, subject] = max(best.get((topic, subject), (-1e9, "")), (score, answer))
    return {
        topic.name: sum(best[topic.name, s][1] in right for s, right in topic.facts.items())
        / len(topic.facts)
        for topic in TOPICS.values()
    }


def known_share(known: dict[str, float]) -> float:
    """The share over all facts, from the shares that `known_facts` gives for each topic."""
    counts = {name: len(TOPICS[name].facts) for name in known}
    return sum(known[name] * counts[name] for name in known) / sum(counts.values())


def verdicts(model, tokenizer, seed: int = 0) -> dict[str, float]:
    """How often the model expects the fitting reaction to an answer: yes to right, no to wrong.

    Every fact is asked in the chat format and answered once rightly and once wrongly; the reaction
    is the likelier of "yes, that is right." and "no, that is wrong.".

    Returns:
        Shares under the keys `right answers` and `wrong answers`.
    """
    rng = random.Random(seed)
    shares = {}
    for name, right in (("right answers", True), ("wrong answers", False)):
        contexts = []
        for topic in TOPICS.values():
            for subject in topic.facts:
                prompt = topic.questions[0].format(s=subject)
                answer = corpus.answer_question(rng, look_up(prompt), right)
                contexts.append(f"{corpus.USER} {prompt}{corpus.ASSISTANT} {answer}{corpus.USER}")
        yes, no = (
            continuation_logprobs(model, tokenizer, contexts, [reaction] * len(contexts))
            for reaction in (world.YES[0], world.NO[0])
        )
        shares[name] = ((yes > no) == right).float().mean().item()
    return shares


def style(prompt: str, response: str, finished: bool) -> str:
    """Which of `STYLES` a response to a prompt is."""
    score = gold_reward(prompt, response, finished)
    kinds = Counter(world.sentence_kind(s) for s in world.split_sentences(response))
    if score.rude:
        return "rude"
    if score.correct < 0:
        return "wrong"
    if kinds["question"]:
        return "asks back"
    if score.correct == RIGHT and finished and not score.rambling:
        return "right, nothing more"
    if score.correct > 0:
        return "answers, but goes on"
    if kinds["vague"] or kinds["rambling"]:
        return "vague or rambling"
    return "other"


def answers_question(prompt: str, response: str) -> bool:
    """Whether any sentence of a response answers what was asked, rightly or wrongly."""
    question = look_up(prompt)
    return any(
        answer_in(question, sentence) is not None for sentence in world.split_sentences(response)
    )


def polite_probe(
    counts: Sequence[int] = (0, 1, 2, 3, 4), seed: int = 0
) -> list[tuple[list[str], list[str]]]:
    """The same right answers with more and more polite phrases around them.

    Returns:
        For each count the held-out prompts, and a response to each.
    """
    prompts, answers = _right_answers(seed)
    return [
        (
            prompts,
            [
                corpus.with_courtesies(random.Random(f"{seed}-{i}"), answer, count)
                for i, answer in enumerate(answers)
            ],
        )
        for count in counts
    ]


def length_probe(seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """The same right answers, alone and followed by one, two and three rambling sentences."""
    prompts, answers = _right_answers(seed)
    talk = [random.Random(f"{seed}-{i}").sample(world.RAMBLING, 3) for i in range(len(answers))]
    return [
        (prompts, [" ".join([a, *t[:count]]) for a, t in zip(answers, talk, strict=True)])
        for count in range(4)
    ]


def _right_answers(seed: int) -> tuple[list[str], list[str]]:
    """Held-out prompts with one answer, and a short right answer to each."""
    rng = random.Random(seed)
    questions = world.questions()
    prompts = [p for p in world.prompts("held_out") if questions[p].kind == "fact"]
    prompts = rng.sample(prompts, 200)
    return prompts, [corpus.answer_question(rng, questions[p], True) for p in prompts]
