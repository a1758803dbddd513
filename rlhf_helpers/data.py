"""Data sets in TRL's columns, generated, local or from the hub; tokenizers; encoded prompts."""

import csv
import io
import json
import random
from pathlib import Path

import pyarrow
import torch
from datasets import Dataset, load_dataset
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
from rlhf_helpers.presets import PRESETS, Preset


def load_tokenizer(preset: Preset) -> PreTrainedTokenizerBase:
    """The tokenizer of the preset's model, padding on the left.

    Raises:
        FileNotFoundError: if a shipped file is missing.
        ConnectionError: if the model is a hub id and the hub cannot be reached.
        ValueError: if pad and eos are the same token, or there is no chat template.
    """
    if preset.name == "pocket":
        require_files(Path(preset.model), "tokenizer.json", "tokenizer_config.json")
        # AutoTokenizer guesses the class from the model's config and can guess wrong.
        tokenizer = from_hub(preset.model, PreTrainedTokenizerFast.from_pretrained, preset.model)
    else:
        with_hub = {"revision": preset.revision, "local_files_only": preset.offline}
        tokenizer = from_hub(preset.model, AutoTokenizer.from_pretrained, preset.model, **with_hub)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"pad token {tokenizer.pad_token!r} and eos token {tokenizer.eos_token!r} must be "
            "two tokens, else a response's end looks like padding; set tokenizer.pad_token"
        )
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {preset.model!r} has no chat template; set one")
    return tokenizer


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
            f"{source!r} is no local path, and the hub did not give it ({type(error).__name__}); "
            "check the name and the network, or download it elsewhere and pass the local folder"
        ) from error


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
        ValueError: for no prompts, an empty one, one that contains a special token, or one that is
            too long: it is never cut.
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
        ValueError: for no rows, a text that is empty or contains a token of the template, or one
            that is too long: nothing is cut, since a cut response would have lost its EOS.

    Example: for the pocket tokenizer "what is hot?" and "fire." become the tokens of
    "<|user|> what is hot?<|assistant|>" and of " fire.<|eos|>".
    """
    completions = list(dataset["completion"])
    prompt_rows = _prompt_tokens(tokenizer, list(dataset["prompt"]), prompt_length)
    _check_texts(tokenizer, "completion", completions)
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
    """Raise ValueError unless encoded examples have a prompt and an EOS, and fit the context.

    Args:
        name: of `examples`, for the message.
    """
    if not examples:
        raise ValueError(f"{name} is empty: give at least one example")
    eos, context = tokenizer.eos_token_id, model.config.max_position_embeddings
    for i, example in enumerate(examples):
        prompt, response = example["prompt"], example["response"]
        if not prompt or not response or response[-1] != eos:
            raise ValueError(
                f"{name}[{i}] has no prompt, or a response that does not end with EOS ({eos}): "
                f"{tokenizer.decode(prompt + response)!r}. Without EOS the model never learns to "
                "stop; encode_examples appends it"
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
    _check_texts(tokenizer, "prompt", prompts)
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    _check_lengths("prompt", prompts, rows, "prompt_length", prompt_length)
    return rows


def _check_texts(tokenizer: PreTrainedTokenizerBase, name: str, texts: list[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}s is {texts!r}: give a list of texts")
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

    Args:
        split: for the generated world `train`, `held_out`, `held_out_phrasing` or `held_out_fact`;
            for other sources the name of their split.
        source: a hub id, a folder or a file (.jsonl, .csv, .parquet); None for the preset's data.

    Raises:
        ValueError: for a file that is empty, not UTF-8, uneven, or lacks the column.
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
    if copies < 1:
        raise ValueError(f"copies is {copies}; give at least 1")
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
        split, source: as for `prompt_dataset`.
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
    path = Path(source)
    if path.suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source!r}; check the path to your data")
        if split != "train":
            raise ValueError(
                f"split is {split!r}, but the file {source!r} is one split, 'train'; give another "
                "file, or a folder with a file for each split"
            )
        dataset = _READERS[path.suffix](path)
    elif path.is_file():
        raise ValueError(f"{source!r} ends in none of {', '.join(_READERS)}; convert it to one")
    elif path.is_dir():
        dataset = load_dataset(source, split=split)
    else:
        data_dir = preset.data_dir if source == PRESETS[preset.name].data else None
        options = {"data_dir": data_dir, "split": split}
        dataset = from_hub(source, load_dataset, source, **options)
    dataset = _split_transcripts(dataset, source)
    if columns == ("prompt", "completion") and "completion" not in dataset.column_names:
        if "chosen" in dataset.column_names:  # preferred responses serve as demonstrations
            dataset = dataset.rename_column("chosen", "completion")
    return _check_columns(dataset, source, columns)


def _check_columns(dataset: Dataset, source: str, columns: tuple[str, ...]) -> Dataset:
    if missing := [c for c in columns if c not in dataset.column_names]:
        raise ValueError(
            f"{source!r} has no column {missing[0]!r}, only {', '.join(dataset.column_names)}; "
            f"rename or add it: needed are {', '.join(columns)}"
        )
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


def _split_transcripts(dataset: Dataset, source: str) -> Dataset:
    """Give transcripts without a prompt column one: what chosen and rejected share (hh-rlhf)."""
    if "prompt" in dataset.column_names or "chosen" not in dataset.column_names:
        return dataset
    mark = "\n\nAssistant:"

    def split(row: dict) -> dict:
        prompt, found, chosen = (row["chosen"] or "").rpartition(mark)
        other, _, rejected = (row.get("rejected") or "").rpartition(mark)
        if not found or prompt != other:
            raise ValueError(
                f"{source!r} has no column 'prompt', and chosen and rejected are not one dialogue "
                f"with two last answers after {mark!r}: {row}"
            )
        prompt = prompt.removeprefix("\n\nHuman:")
        return {"prompt": prompt.strip(), "chosen": chosen.strip(), "rejected": rejected.strip()}

    return dataset.map(split)


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
            raise ValueError(f"'{path}', line {number}: {row!r} is no JSON object")
        rows.append(row)
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"'{path}', line {number}: fields {', '.join(row)}, but line 1 has "
                f"{', '.join(rows[0])}; give every line the same fields"
            )
    try:
        return Dataset.from_list(rows)
    except pyarrow.ArrowException as error:
        raise ValueError(f"'{path}': a field is text in one line and not in another") from error


def _read_csv(path: Path) -> Dataset:
    header, *rows = csv.reader(io.StringIO(_text(path), newline=""))
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(
                f"'{path}', line {number}: {len(row)} fields, but the header has {len(header)}; "
                "give every line the same number, and quote texts with commas"
            )
    return Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(header)})


def _read_parquet(path: Path) -> Dataset:
    return Dataset.from_parquet(str(path))


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
