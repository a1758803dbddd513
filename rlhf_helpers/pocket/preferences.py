"""Preferences of the pocket world: pairs of responses, labelled by the annotator."""

import hashlib
import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_helpers.checkpoints import require_no_file
from rlhf_helpers.kinds import Whole
from rlhf_helpers.pocket import corpus, world
from rlhf_helpers.pocket.annotator import Annotator, ceiling
from rlhf_helpers.pocket.rubric import gold_reward
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.validation import checked


def written_preferences(split: str, annotator: Annotator, seed: int) -> list[dict]:
    """For each prompt of a split a labelled pair of answers in the style of the base text."""
    rng = random.Random(f"preferences-{split}-{seed}")
    rows = []
    for prompt in world.prompts(split):
        question = world.questions()[prompt]
        first = second = corpus.web_answer(rng, question, held_out=False)[0]
        while second == first:
            second = corpus.web_answer(rng, question, held_out=False)[0]
        rows.append(annotator.label(prompt, first, second, rng))
    return rows


@checked
def collect_preferences(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    annotator: Annotator,
    draws: int = 4,
    response_length: int = 32,
    seed: Whole[0] = 0,
    cache: Path | None = None,
) -> Dataset:
    """Ask for preferences: sample responses to each prompt, let the annotator choose between two.

    With draws y_1 … y_K the pairs are (y_1, y_2), (y_2, y_3), …, (y_K, y_1): every response is in
    two. Left out are pairs of equal responses, which carry no preference, and those with a response
    that is empty or was cut off before its EOS.

    Args:
        model: who responds, the SFT model.
        draws: K, responses to each prompt; at least 3.
        seed: of samples and labels.
        cache: a folder; pairs of the same model, prompts and settings are read from there, else
            written there as `preferences-<digest>.jsonl`, with a data card beside them.

    Returns:
        Columns `prompt`, `chosen`, `rejected`, and `probability`: that with which the annotator
        chooses the one in `chosen`.
    """
    if not isinstance(draws, int) or draws < 3:
        raise ValueError(f"draws is {draws!r}; give at least 3, so that each makes another pair")
    if cache:
        require_no_file(Path(cache))
    settings = [prompts, asdict(annotator), draws, response_length, seed, _weights_digest(model)]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    file = cache and Path(cache) / f"preferences-{digest}.jsonl"
    if file and file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([json.loads(line) for line in lines])
    dataset = _collect(model, tokenizer, prompts, annotator, draws, response_length, seed)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".md").write_text(preference_card(dataset, annotator), encoding="utf-8")
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in dataset), encoding="utf-8")
        os.replace(part, file)
    return dataset


def _collect(model, tokenizer, prompts, annotator, draws, response_length, seed) -> Dataset:
    rng = random.Random(seed)
    samples = [
        sample_responses(model, tokenizer, prompts, response_length, seed=seed * draws + draw)
        for draw in range(draws)
    ]
    rows = []
    for first, second in zip(samples, samples[1:] + samples[:1], strict=True):
        whole = (first.finished & second.finished).tolist()
        for prompt, a, b, kept in zip(prompts, first.texts, second.texts, whole, strict=True):
            if kept and a and b and a != b:
                rows.append(annotator.label(prompt, a, b, rng))
    if not rows:
        raise ValueError(
            f"no pair of {draws} responses to {len(prompts)} prompts can be compared: all are "
            "equal, empty or cut off; give more prompts, or a longer response_length"
        )
    return Dataset.from_list(rows)


def _weights_digest(model: PeftModel | PreTrainedModel) -> str:
    """Tells models apart by the weights that they respond with: base and active adapter."""
    active = f".{getattr(model, 'active_adapter', '')}."
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" not in name or active in name:
            digest.update(str(parameter.dtype).encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def preference_card(dataset: Dataset, annotator: Annotator) -> str:
    """A data card, in Markdown: where the pairs come from, and what is in them."""
    rows = list(dataset)
    words = {
        side: sum(len(row[side].split()) for row in rows) / len(rows)
        for side in ("chosen", "rejected")
    }
    better = [
        gold_reward(row["prompt"], row["chosen"]).total
        - gold_reward(row["prompt"], row["rejected"]).total
        for row in rows
    ]
    differ = [gap for gap in better if gap] or [0.0]
    polite = annotator.politeness
    return f"""# Preferences of the pocket world

{len(rows)} pairs of responses to {len(set(dataset["prompt"]))} prompts, sampled from the SFT model
at temperature 1 and labelled by a simulated person: gold reward plus {polite} for each
polite phrase and {annotator.length} for each word; choices at a temperature of
{annotator.temperature:.2f} points. No text of anybody else is in them. Licence: Apache-2.0.

- best accuracy possible on these labels, in expectation: {ceiling(dataset["probability"]):.1%}
- chosen has the higher gold reward in {sum(gap > 0 for gap in differ) / len(differ):.1%} of the \
{len(differ)} pairs that differ in gold
- words: chosen {words["chosen"]:.1f}, rejected {words["rejected"]:.1f}
"""
