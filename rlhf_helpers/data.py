"""Data sets in TRL's columns: generated, local or from the hub."""

import csv
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from rlhf_helpers.hub import from_hub
from rlhf_helpers.pocket import corpus, world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.presets import Preset
from rlhf_helpers.text import bare_tokenizer, render_prompt
from rlhf_helpers.validation import require_columns

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # who speaks in a transcript of hh-rlhf
ANSWERS = ("completion", "chosen", "rejected")
HELD_OUT = ("held_out", "held_out_phrasing", "held_out_fact")


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
    tokenizer = bare_tokenizer(preset)
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
