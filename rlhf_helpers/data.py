"""Data sets in TRL's columns, generated, local or from the hub; tokenizers; encoded prompts."""

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import BatchEncoding

from rlhf_helpers.pocket import corpus, world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.presets import Preset

# Reserved tokens that no text holds, by which vocabularies have one to pad with.
PADS = (
    "<|fim_pad|>",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<pad>",
    "[PAD]",
    "<unk>",
)
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # who speaks in a transcript of hh-rlhf
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ 'Human: ' + message['content'] + '\n\nAssistant:' }}{% endif %}"
    "{% endfor %}"
)
ANSWERS = ("completion", "chosen", "rejected")
HELD_OUT = ("held_out", "held_out_phrasing", "held_out_fact")


def load_tokenizer(preset: Preset) -> PreTrainedTokenizerBase:
    """The tokenizer of the preset's model, padding on the left.

    Many base models have no pad token, or EOS in its place, and no chat template. They get a
    reserved token of their vocabulary, so that no embedding is added, and a plain template.

    Raises:
        FileNotFoundError: if a shipped file is missing.
        ConnectionError: if the model is a hub id and the hub cannot be reached.
        ValueError: if pad and eos are the same token and no other is to be had, or the pocket
            model has no chat template.
    """
    tokenizer = _load_tokenizer(preset)
    if tokenizer.chat_template == PLAIN_TEMPLATE:
        print(f"{preset.model!r} has no chat template; prompts are 'Human: …\\n\\nAssistant:'")
    return tokenizer


def _load_tokenizer(preset: Preset) -> PreTrainedTokenizerBase:
    if preset.name == "pocket":
        require_files(Path(preset.model), "tokenizer.json", "tokenizer_config.json")
        # AutoTokenizer guesses the class from the model's config and can guess wrong.
        tokenizer = from_hub(preset.model, PreTrainedTokenizerFast.from_pretrained, preset.model)
    else:
        with_hub = {"revision": preset.revision, "local_files_only": preset.offline}
        tokenizer = from_hub(preset.model, AutoTokenizer.from_pretrained, preset.model, **with_hub)
        _complete(tokenizer)
    tokenizer.padding_side = "left"
    _check_tokenizer(tokenizer)
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if None in (pad, eos) or pad == eos:
        raise ValueError(
            f"pad token {tokenizer.pad_token!r} and eos token {tokenizer.eos_token!r} must be "
            "two tokens, else a response's end looks like padding; set tokenizer.pad_token"
        )
    if not tokenizer.chat_template:
        source = tokenizer.name_or_path
        raise ValueError(f"the tokenizer of {source!r} has no chat template; set one")


def _complete(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a base model's tokenizer what it lacks: a pad token that is not EOS, a template."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        vocabulary = tokenizer.get_vocab()
        reserved = (name for name in PADS if name in vocabulary and name != tokenizer.eos_token)
        tokenizer.pad_token = next(reserved, tokenizer.pad_token)
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE


def require_files(folder: Path, *names: str) -> None:
    """Raise FileNotFoundError, saying how to mend it, unless the folder has all these files."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder / missing[0]} is missing; reinstall rlhf_helpers, or, if this is a folder of "
            "your own, save a model and its tokenizer there with save_pretrained"
        )


def from_hub(source: str, load, *args, **kwargs):
    """Call a loader of a folder or hub id; if it fails, say what to do instead."""
    try:
        return load(*args, **kwargs)
    except Exception as error:
        if Path(source).is_dir():
            raise ValueError(
                f"{source!r} cannot be loaded ({type(error).__name__}: {error}); if a file is "
                "truncated or damaged, reinstall rlhf_helpers, or save model and tokenizer again"
            ) from error
        if not isinstance(error, OSError):
            raise
        raise ConnectionError(
            f"{source!r} is no local path, and {_refusal(error)}, or download it elsewhere and "
            "pass the local folder"
        ) from error


def _refusal(error: BaseException) -> str:
    """Why the hub gave nothing, and what to do; the loaders hide the reason among the causes."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            "the hub gives it only to those who accepted its licence; do so on its page at "
            "huggingface.co and log in with `hf auth login`"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            "the hub shows you none of that name; check the name, log in with `hf auth login` if "
            "it is private"
        )
    detail = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return f"the hub did not give it ({detail}); check the name and the network"


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], prompt_length: int
) -> BatchEncoding:
    """Apply the chat template and left-pad to the longest prompt of the batch.

    Args:
        prompts: B questions as plain text.
        prompt_length: the most tokens that a prompt may have with its template.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, P] with P ≤ prompt_length.

    Raises:
        TypeError: if `prompts` is not a list of texts.
        ValueError: for a tokenizer without a chat template or a pad token of its own, no prompts,
            an empty one, one that contains a special token, or one that is too long: it is never
            cut.
    """
    rows = _prompt_tokens(tokenizer, prompts, prompt_length)
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    prompt_length: int,
    response_length: int,
) -> list[dict[str, list[int]]]:
    """Token ids of demonstrations: prompts in the chat template, completions closed by EOS.

    Args:
        dataset: columns `prompt` and `completion`.
        prompt_length, response_length: the most tokens of each, template and EOS included.

    Returns:
        For each row its token ids, as `{"prompt": [...], "response": [...]}`.

    Raises:
        TypeError: if a column holds something else than texts.
        ValueError: for a missing column, columns of different lengths, no rows, a text that is
            empty or contains a token of the template, or one that is too long: nothing is cut,
            since a cut response would have lost its EOS.

    Example: for the pocket tokenizer "what is hot?" and "fire." become the tokens of
    "<|user|> what is hot?<|assistant|>" and of " fire.<|eos|>".
    """
    require_columns(dataset, "dataset", ("prompt", "completion"))
    prompts, completions = (
        texts if isinstance(texts, str) else list(texts)
        for texts in (dataset["prompt"], dataset["completion"])
    )
    prompt_rows = _prompt_tokens(tokenizer, prompts, prompt_length)
    _check_texts(tokenizer, "completion", completions)
    if len(prompts) != len(completions):
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(completions)} completions; give one of "
            "each for every example"
        )
    rows = tokenizer(completions, add_special_tokens=False)["input_ids"]
    response_rows = [[*row, tokenizer.eos_token_id] for row in rows]
    _check_lengths("completion", completions, response_rows, "response_length", response_length)
    pairs = zip(prompt_rows, response_rows, strict=True)
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]


def check_examples(
    name: str,
    examples: list[dict[str, list[int]]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise ValueError unless encoded examples have a prompt and an EOS, and fit the model.

    Args:
        name: of `examples`, for the message.
    """
    if not examples:
        raise ValueError(f"{name} is empty: give at least one example")
    eos, context = tokenizer.eos_token_id, model.config.max_position_embeddings
    for i, example in enumerate(examples):
        if not {"prompt", "response"} <= set(example) or isinstance(example["prompt"], str):
            raise ValueError(
                f"{name}[{i}] is {example!s:.99}, without the token ids of a prompt and a "
                "response; give what encode_examples returns"
            )
        prompt, response = example["prompt"], example["response"]
        if not prompt or not response or response[-1] != eos:
            raise ValueError(
                f"{name}[{i}] has no prompt, or a response that does not end with EOS ({eos}): "
                f"{tokenizer.decode(prompt + response)!r}. Without EOS the model never learns to "
                "stop; encode_examples appends it"
            )
        if (largest := max(*prompt, *response)) >= model.config.vocab_size:
            raise ValueError(
                f"{name}[{i}] holds token id {largest}, and the model has "
                f"{model.config.vocab_size} tokens; use the model's own tokenizer"
            )
        if len(prompt) + len(response) > context:
            raise ValueError(
                f"{name}[{i}] has {len(prompt) + len(response)} tokens, more than the model's "
                f"context of {context}; leave it out or shorten it"
            )


def pad_examples(
    tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, list[int]]]
) -> tuple[Tensor, Tensor, int]:
    """One batch of encoded examples: prompts padded on the left, responses on the right.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, P + T], and P, the length of the longest prompt.

    Example: with prompts [5, 6] and [7], responses [8, 1] and [9, 9, 1], and 0 for padding,
    input_ids is [[5, 6, 8, 1, 0], [0, 7, 9, 9, 1]] and P is 2.
    """
    if not examples:
        raise ValueError("examples is empty: give at least one example")
    sides = {"prompt": "left", "response": "right"}
    prompts, responses = (
        tokenizer.pad(
            {"input_ids": [example[part] for example in examples]},
            padding_side=side,
            return_tensors="pt",
        )
        for part, side in sides.items()
    )
    names = ("input_ids", "attention_mask")
    input_ids, mask = (torch.cat([prompts[name], responses[name]], dim=1) for name in names)
    return input_ids, mask, prompts["input_ids"].shape[1]


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], prompt_length: int
) -> list[list[int]]:
    _check_tokenizer(tokenizer)
    _check_texts(tokenizer, "prompt", prompts)
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    _check_lengths("prompt", prompts, rows, "prompt_length", prompt_length)
    return rows


def _check_texts(tokenizer: PreTrainedTokenizerBase, name: str, texts: list[str]) -> None:
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}s is {texts!r:.99}: give a list of texts")
    if bad := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise TypeError(f"{name} {bad[0]} is {texts[bad[0]]!r:.99}: give a list of texts")
    if not texts:
        raise ValueError(f"{name}s is empty: give at least one text")
    for i, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"{name} {i} is {text!r}: give it some text")
        if marks := [mark for mark in tokenizer.all_special_tokens if mark in text]:
            raise ValueError(
                f"{name} {i} contains {marks[0]!r}, a token of the template: remove it"
            )


def _check_lengths(name: str, texts: list[str], rows: list, limit_name: str, limit: int) -> None:
    if long := [i for i, row in enumerate(rows) if len(row) > limit]:
        i = long[0]
        raise ValueError(
            f"{name} {i} ({texts[i][:60]!r}) has {len(rows[i])} tokens with its template, and the "
            f"limit is {limit}; shorten it or raise {limit_name}"
        )


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt in the chat template, up to where the assistant's response begins.

    Example: "what is hot?" becomes "<|user|> what is hot?<|assistant|>" for the pocket tokenizer.
    """
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def prompt_dataset(preset: Preset, split: str = "train", source: str | None = None) -> Dataset:
    """Prompts to respond to; column `prompt`.

    With `preset.drop_unfit`, rows of a source that cannot be used are left out, a line says how
    many and why, and at most `preset.rows` of the others are used, in an order of `preset.seed`.
    `held_out` is then the source's test or validation split, else the last tenth of its only one.

    Args:
        split: `train`, `held_out`, and in the generated world its parts `held_out_phrasing` and
            `held_out_fact`; for other sources also the name of a split of theirs.
        source: a hub id, a folder or a file (.jsonl, .csv, .parquet); None for the preset's data.
            Its columns may be `chosen` and `rejected` transcripts ("\\n\\nHuman: …
            \\n\\nAssistant: …", as in hh-rlhf), or `prompt` with `chosen` and `rejected` or with
            `completion`, each a text or a list of messages.

    Raises:
        ValueError: for a file that is empty, not UTF-8, uneven, or lacks the column; for a split
            that is not there, or without a row that can be used.
    """
    if source := source or preset.data:
        return _read(source, split, ("prompt",), preset)
    return Dataset.from_dict({"prompt": world.prompts(split)})


def sft_dataset(
    preset: Preset, split: str = "train", source: str | None = None, copies: int = 5
) -> Dataset:
    """Demonstrations to imitate; columns `prompt`, `completion`.

    Args:
        split, source: as for `prompt_dataset`.
        copies: how many demonstrations are written for each generated prompt.

    Raises:
        ValueError: as for `prompt_dataset`.
    """
    if source := source or preset.data:
        return _read(source, split, ("prompt", "completion"), preset)
    if not isinstance(copies, int) or copies < 1:
        raise ValueError(f"copies is {copies}; give at least 1, a whole number")
    rng = random.Random(f"sft-{split}-{preset.seed}")
    prompts = world.prompts(split) * copies
    rng.shuffle(prompts)
    completions = [corpus.demonstration(rng, prompt) for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def preference_dataset(
    preset: Preset,
    split: str = "train",
    source: str | None = None,
    annotator: Annotator | None = None,
) -> Dataset:
    """Pairs of responses; columns `prompt`, `chosen`, `rejected`, and `probability` if generated.

    Generated pairs are two answers in the style of the base text, labelled by the annotator;
    `probability` is the chance with which the annotator chooses the one in `chosen`.

    Args:
        split, source: as for `prompt_dataset`. With `preset.drop_unfit`, the pairs of a source to
            train on are halved: `train` is for the reward model, `judge` for one that it never met.
        annotator: who labels generated pairs; None for `Annotator()`.

    Raises:
        ValueError: as for `prompt_dataset`, and for a pair whose two responses are equal.
    """
    if source := source or preset.data:
        return _read(source, split, ("prompt", "chosen", "rejected"), preset)
    rng = random.Random(f"preferences-{split}-{preset.seed}")
    annotator = annotator or Annotator()
    return Dataset.from_list([_pair(rng, annotator, prompt) for prompt in world.prompts(split)])


def _pair(rng: random.Random, annotator: Annotator, prompt: str) -> dict:
    question = world.questions()[prompt]
    first = second = corpus.web_answer(rng, question, held_out=False)[0]
    while second == first:
        second = corpus.web_answer(rng, question, held_out=False)[0]
    if not annotator.prefer(prompt, first, second, rng):
        first, second = second, first
    probability = annotator.probability(prompt, first, second)
    return {"prompt": prompt, "chosen": first, "rejected": second, "probability": probability}


def _read(source: str, split: str, columns: tuple[str, ...], preset: Preset) -> Dataset:
    """Read a file, a folder or a hub data set, and check its columns."""
    if preset.drop_unfit:
        dataset = Dataset.from_list(_fit_part(source, split, columns, preset))
    else:
        dataset = _as_texts(_load(source, preset, split), source)
    if columns == ("prompt", "completion") and "completion" not in dataset.column_names:
        if "chosen" in dataset.column_names:  # preferred responses serve as demonstrations
            dataset = dataset.rename_column("chosen", "completion")
    return _check_columns(dataset, source, columns)


def _load(source: str, preset: Preset, split: str | None = None) -> Dataset | dict[str, Dataset]:
    """One split of a source as it is, or, without a name, all of them by their names."""
    path = Path(source)
    if path.suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source!r}; check the path to your data")
        if split not in (None, "train"):
            raise ValueError(
                f"split is {split!r}, but the file {source!r} is one split, 'train'; give another "
                "file, or a folder with a file for each split"
            )
        dataset = _READERS[path.suffix](path)
        return {"train": dataset} if split is None else dataset
    if path.is_file():
        raise ValueError(f"{source!r} ends in none of {', '.join(_READERS)}; convert it to one")
    options = {"data_dir": preset.data_dir if source == preset.data else None, "split": split}
    if path.is_dir():
        try:
            return load_dataset(source, **options)
        except Exception as error:
            detail = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(
                f"the folder {source!r} cannot be read as data ({detail:.150}); give it one file "
                "for each split, such as train.jsonl"
            ) from error
    if source == preset.data:
        options["revision"] = preset.data_revision
    return from_hub(source, load_dataset, source, **options)


def _fit_part(source: str, split: str, columns: tuple[str, ...], preset: Preset) -> list[dict]:
    """The rows of a split that can be used; the source's own splits go before the course's."""
    splits, pairs = _load(source, preset), "rejected" in columns
    names = list(splits)
    train = names[0] if len(names) == 1 else "train"
    own = next((name for name in ("test", "validation") if name in names and name != train), None)
    if split in names and split != "train":
        return _fit_rows(splits[split], source, split, columns, preset)
    if split in HELD_OUT and own:
        return _fit_rows(splits[own], source, own, columns, preset)
    if train not in names or split not in ("train", "judge", *HELD_OUT):
        raise ValueError(
            f"{source!r} has no split {split!r}; it has {', '.join(names)}; choose one of those"
        )
    if split == "judge" and not pairs:
        raise ValueError("split is 'judge', which holds pairs: only preference_dataset has it")
    rows = _fit_rows(splits[train], source, train, columns, preset)
    if own is None:
        last = len(rows) - len(rows) // 10
        rows = rows[last:] if split in HELD_OUT else rows[:last]
    if pairs and split not in HELD_OUT:
        rows = rows[1::2] if split == "judge" else rows[::2]
    if not rows:
        raise ValueError(
            f"{source!r} has too few rows that can be used for a split {split!r}; held_out needs "
            "10, judge needs 2; give more data"
        )
    return rows


def _fit_rows(
    dataset: Dataset, source: str, split: str, columns: tuple[str, ...], preset: Preset
) -> list[dict]:
    """Rows that can be used, shuffled, at most `preset.rows`; a line says what was left out."""
    names = [name for name in ("prompt", *ANSWERS) if name in dataset.column_names]
    if "chosen" not in names or ("rejected" in columns and "rejected" not in names):
        require_columns(dataset, source, columns)  # else the prompt may be in a transcript
    tokenizer = _load_tokenizer(preset)
    marks = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    left_out, rows = Counter(), []
    for row in map(_texts, dataset.select_columns(names).to_list()):
        if reason := _unfit(row, marks):
            left_out[reason] += 1
        else:
            rows.append({name: text.strip() for name, text in row.items()})
    short = _short_enough(rows, tokenizer, preset)
    left_out["too long"] = len(rows) - len(short)
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common() if count)
    if not short:
        raise ValueError(
            f"{source!r}, split {split!r}, has no row that can be used ({reasons or 'no rows'}). A "
            f"prompt may have {preset.prompt_length} tokens with its template, a response "
            f"{preset.response_length} with EOS: raise prompt_length or response_length, or give "
            "other data"
        )
    _report(source, split, len(dataset), len(short), reasons, preset.rows)
    random.Random(preset.seed).shuffle(short)
    return short[: preset.rows]


def _report(
    source: str, split: str, total: int, kept: int, reasons: str, limit: int | None
) -> None:
    name = Path(source).name if Path(source).exists() else source
    line = f"{name}, {split}: {kept} of {total} rows kept"
    if reasons:
        line += f"; left out: {reasons}"
    if limit is not None and limit < kept:
        line += f"; {limit} of them are used"
    print(line)


def _unfit(row: dict, marks: re.Pattern) -> str | None:
    """Why a row cannot be used, whatever its length; None if it can."""
    if row["prompt"] is None:
        return "of two prompts"
    if not all(isinstance(text, str) and text.strip() for text in row.values()):
        return "empty"
    if any(mark in text for text in row.values() for mark in (HUMAN, ASSISTANT)):
        return "with several turns"
    if {"chosen", "rejected"} <= row.keys() and row["chosen"].strip() == row["rejected"].strip():
        return "equal pairs"
    if any(marks.search(text) for text in row.values()):
        return "with a template token"
    return None


def _short_enough(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, preset: Preset
) -> list[dict]:
    """The rows whose prompt, with its template, and responses, with EOS, are within the limits."""
    fits = [True] * len(rows)
    for name in rows[0] if rows else ():
        texts, limit = [row[name] for row in rows], preset.response_length - 1
        if name == "prompt":
            texts = [render_prompt(tokenizer, text) for text in texts]
            limit = preset.prompt_length
        tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        fits = [fit and len(ids) <= limit for fit, ids in zip(fits, tokens, strict=True)]
    return [row for row, fit in zip(rows, fits, strict=True) if fit]


def require_columns(dataset: Dataset | dict, source: str, columns: tuple[str, ...]) -> None:
    """Raise ValueError, naming the source, unless a data set has all these columns."""
    names = list(getattr(dataset, "column_names", dataset))
    if missing := [c for c in columns if c not in names]:
        raise ValueError(
            f"{source!r} has no column {missing[0]!r}, only {', '.join(names)}; "
            f"rename or add it: needed are {', '.join(columns)}"
        )


def _check_columns(dataset: Dataset, source: str, columns: tuple[str, ...]) -> Dataset:
    require_columns(dataset, source, columns)
    if not len(dataset):
        raise ValueError(f"{source!r} is empty: it needs at least one row")
    dataset = dataset.select_columns(list(columns))
    for number, row in enumerate(dataset, 1):
        if bad := [c for c in columns if not isinstance(row[c], str) or not row[c].strip()]:
            raise ValueError(
                f"{source!r}, row {number}: {bad[0]} is {row[bad[0]]!r}, give it some text"
            )
        if "chosen" in columns and row["chosen"] == row["rejected"]:
            raise ValueError(
                f"{source!r}, row {number}: chosen and rejected are both {row['chosen']!r}; "
                "remove the pair, it carries no preference"
            )
    return dataset


def _as_texts(dataset: Dataset, source: str) -> Dataset:
    """Give transcripts without a prompt column one, and make texts of messages."""
    names = [name for name in ("prompt", *ANSWERS) if name in dataset.column_names]
    messages = any(isinstance(row[name], list) for row in dataset.take(1) for name in names)
    if not messages and ("prompt" in names or "chosen" not in names):
        return dataset

    def split(row: dict) -> dict:
        texts = _texts({name: row[name] for name in names})
        if not texts["prompt"]:
            raise ValueError(
                f"{source!r}: without a prompt column, chosen and rejected must be one dialogue "
                f"with two last answers after {ASSISTANT!r}; these are not one dialogue: "
                f"{row!s:.99}"
            )
        return texts

    return dataset.map(split)


def _texts(row: dict) -> dict:
    """A row's prompt and answers as texts.

    Messages become a transcript, as in hh-rlhf; a transcript is split at its last answer. The
    prompt is None if the answers are to different ones.
    """
    prompts, texts = {_bare(row.get("prompt"))}, {}
    for name in (name for name in ANSWERS if name in row):
        texts[name] = row[name]
        if "prompt" not in row or isinstance(row[name], list):
            prompt, _, answer = _transcript(row[name]).rpartition(ASSISTANT)
            texts[name] = answer.strip()
            prompts.add(_bare(prompt))
    prompts.discard("")  # an answer alone names no prompt
    return {"prompt": None if len(prompts) > 1 else next(iter(prompts), ""), **texts}


def _bare(prompt: object) -> str:
    """A prompt without the marks of who speaks first and last."""
    text = _transcript(prompt).rstrip().removesuffix(ASSISTANT)
    return text.removeprefix(HUMAN).strip()


def _transcript(value: object) -> str:
    if not isinstance(value, list):
        return value if isinstance(value, str) else ""
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        raise ValueError(f"{value!r:.99} is no list of messages; give each a role and content")
    marks = {"user": HUMAN, "assistant": ASSISTANT}
    return "".join(f"{marks.get(turn['role'], '')} {turn['content'] or ''}" for turn in value)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is not UTF-8 (byte {error.start}); save it with that encoding"
        ) from error
    if not text.strip():
        raise ValueError(f"'{path}' is empty: it needs at least one row")
    return text


def _read_jsonl(path: Path) -> Dataset:
    rows: list[dict] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}', line {number}: not JSON ({error}); mend it") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"'{path}', line {number}: {row!r:.99} is no JSON object; give each row a line, "
                '{"prompt": …}'
            )
        rows.append(row)
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"'{path}', line {number}: fields {', '.join(row)}, but line 1 has "
                f"{', '.join(rows[0])}; give every line the same fields"
            )
    try:
        return Dataset.from_list(rows)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"'{path}': a field is text in one line and not in another; make it text in all"
        ) from error


def _read_csv(path: Path) -> Dataset:
    try:
        header, *rows = csv.reader(io.StringIO(_text(path), newline=""))
    except csv.Error as error:
        raise ValueError(f"'{path}': {error}; look for a quote that is never closed") from error
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(
                f"'{path}', line {number}: {len(row)} fields, but the header has {len(header)}; "
                "give every line the same number, and quote texts with commas"
            )
    return Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(header)})


def _read_parquet(path: Path) -> Dataset:
    try:
        return Dataset.from_parquet(str(path))
    except (pyarrow.ArrowException, DatasetGenerationError) as error:
        raise ValueError(
            f"'{path}' cannot be read as Parquet ({error}); it is truncated or damaged: copy it "
            "again"
        ) from error


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
