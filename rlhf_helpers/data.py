"""Data sets in TRL's columns, from a file, a folder or the hub."""

import hashlib
import random
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers.files import read_source
from rlhf_helpers.guards import require_columns
from rlhf_helpers.presets import Preset
from rlhf_helpers.text import (
    Message,
    Unfit,
    as_messages,
    load_tokenizer,
    messages_of,
    prompt_tokens,
    render,
    reserved,
    response_tokens,
    same_prompt,
)

MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content)['\"]")
MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):")  # who speaks in a transcript of hh-rlhf
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
ANSWERS = ("completion", "chosen", "rejected")
READ = ("prompt", "system", "label", *ANSWERS)
HELD_OUT = ("held_out", "held_out_phrasing", "held_out_fact")


def read_dataset(source: str, split: str, columns: tuple[str, ...], preset: Preset) -> Dataset:
    """Rows of a file, a folder or a hub data set, in TRL's columns.

    With `preset.drop_unfit`, rows that cannot be used are left out, a line says how many and why,
    and at most `preset.rows` of the others are used, in an order of `preset.seed`. `held_out` is
    then the source's test or validation split, else the last tenth of the prompts of its only one;
    no prompt of it is in `train`. Pairs to train on are halved by prompt: `train` is for the reward
    model, `judge` for another.

    A prompt is everything before the last answer: a question, or a dialogue. Where some rows have
    dialogues, prompts and answers are lists of messages, as TRL has them, else texts.

    Args:
        source: a hub id, a folder or a file (.jsonl, .json, .csv, .parquet, or one of them with
            .gz). Its columns may be `chosen` and `rejected` transcripts
            ("\\n\\nHuman: … \\n\\nAssistant: …", as in hh-rlhf), or `prompt` with `chosen` and
            `rejected` or with `completion`, each a text or a list of messages.
        split: `train`, `held_out`, `judge`, or the name of a split of the source.
        columns: `prompt`, and where wanted `completion`, or `chosen` and `rejected`.

    Raises:
        ValueError: for a file that is empty or cannot be read, or lacks a column; for a split that
            is not there, or without a row that can be used; for a pair of equal responses.
    """
    if preset.drop_unfit:
        rows = _fit_part(source, split, columns, preset)
    else:
        rows = _all_rows(read_source(source, preset, split), source, columns)
    rows = [{"completion": row.get("chosen")} | row for row in rows]  # the preferred one serves
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def _in_columns(rows: list[dict]) -> list[dict]:
    """Rows as texts, or, where some prompts have several turns, all as TRL's lists of messages."""
    if all(len(row["prompt"]) == 1 for row in rows):
        return [row | {"prompt": row["prompt"][0]["content"]} for row in rows]

    def message(text: str) -> list[Message]:
        return [{"role": "assistant", "content": text}]

    return [row | {n: message(row[n]) for n in ANSWERS if n in row} for row in rows]


# --- rows ----------------------------------------------------------------------------------


def _all_rows(dataset: Dataset, source: str, columns: tuple[str, ...]) -> list[dict]:
    """All rows, each as `_parse` gives it; ValueError for the first that cannot be used."""
    _require(dataset, source, columns)
    rows = []
    for number, row in enumerate(_read_columns(dataset), 1):
        try:
            rows.append(_parse(row))
            _check_answers(rows[-1])
        except Unfit as reason:
            fault = f"row {number} cannot be used ({reason}): {row!s:.200}"
            raise ValueError(f"{source!r}, {fault}; mend or remove it") from None
    return _in_columns(rows)


def _require(dataset: Dataset, source: str, columns: tuple[str, ...]) -> None:
    """Raise ValueError unless a data set has what is needed for these columns."""
    there = dataset.column_names
    if "chosen" in there:  # preferred responses serve, and the prompt may be in the transcripts
        serves = {name: "chosen" for name in ("prompt", "completion") if name not in there}
        columns = tuple(dict.fromkeys(serves.get(name, name) for name in columns))
    require_columns(dataset, source, columns)


def _fit_part(source: str, split: str, columns: tuple[str, ...], preset: Preset) -> list[dict]:
    """The rows of a split that can be used; the source's own splits go before the course's.

    No prompt stands in two of `train`, `judge` and `held_out`: what is measured on a prompt that
    was trained on measures memory.
    """
    splits, pairs = read_source(source, preset), "rejected" in columns
    train = "train" if len(splits) > 1 else next(iter(splits))
    own = next((name for name in ("test", "validation") if name in splits and name != train), None)
    if split in HELD_OUT and split not in splits and own:
        split = own
    whole = split in splits and split != "train"
    if not whole and (train not in splits or split not in ("train", "judge", *HELD_OUT)):
        there = f"it has {', '.join(splits)}; choose one of those"
        raise ValueError(f"{source!r} has no split {split!r}; {there}")
    if not whole and split == "judge" and not pairs:
        raise ValueError("split is 'judge', which holds pairs: only preference_dataset has it")
    dataset = splits[split if whole else train]
    _require(dataset, source, columns)
    if whole:
        return _fit_rows(dataset, source, split, preset)
    held_out = {p for name in splits if name != train for p in _prompts(splits[name])}
    rows = _fit_rows(dataset, source, train, preset, held_out)
    # By a hash of each prompt: its side does not change with the lengths that are allowed, nor, but
    # for a few at the borders, with the rows that a file gets or loses.
    prompts = sorted(
        _prompts(dataset) - held_out,
        key=lambda prompt: hashlib.sha256(f"{preset.seed} {prompt}".encode()).digest(),
    )
    last = len(prompts) if own else len(prompts) - len(prompts) // 10
    middle = (last + 1) // 2 if pairs else last
    parts = {"train": prompts[:middle], "judge": prompts[middle:last]}
    wanted = set(parts.get(split, prompts[last:]))
    rows = [row for row in rows if same_prompt(row["prompt"]) in wanted]
    if not rows:
        mend = "give more data: held_out needs 10 prompts, judge needs 2"
        raise ValueError(f"{source!r} has too few rows for a split {split!r}; {mend}")
    return rows


def _fit_rows(
    dataset: Dataset, source: str, split: str, preset: Preset, held_out: set[str] = frozenset()
) -> list[dict]:
    """Rows that can be used, shuffled, at most `preset.rows`; a line says what was left out."""
    tokenizer = load_tokenizer(preset, report=False)
    marks, left_out, rows = reserved(tokenizer), Counter(), {}
    for row in _read_columns(dataset):
        try:
            row = _parse(row)
            rendered = _rendered(tokenizer, marks, row)
            if (prompt := same_prompt(row["prompt"])) in held_out:
                raise Unfit("of a held-out prompt")
            key = prompt, *(row.get(name) for name in ANSWERS)
            if key in rows:
                raise Unfit("copies")
            rows[key] = row, rendered
        except Unfit as reason:
            left_out[str(reason)] += 1
    short = _short_enough(list(rows.values()), tokenizer, preset) if rows else []
    left_out["too long"] = len(rows) - len(short)
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common() if count)
    if not short:
        raise ValueError(
            f"{source!r}, split {split!r}, has no row that can be used ({reasons or 'no rows'}); "
            f"give others, or raise prompt_length {preset.prompt_length} or response_length "
            f"{preset.response_length}"
        )
    name = Path(source).name if Path(source).exists() else source
    _report(f"{name}, {split}", dataset, len(short), reasons, preset.rows)
    random.Random(preset.seed).shuffle(short)
    return _in_columns(short[: preset.rows])


def _read_columns(dataset: Dataset) -> list[dict]:
    return dataset.select_columns([n for n in READ if n in dataset.column_names]).to_list()


def _prompts(dataset: Dataset) -> set[str]:
    """The prompts of all rows, as keys; rows without one are passed over."""
    found = set()
    for row in _read_columns(dataset):
        with suppress(Unfit):
            found.add(same_prompt(_parse(row)["prompt"]))
    return found


def _report(name: str, dataset: Dataset, kept: int, reasons: str, limit: int | None) -> None:
    parts = [f"{name}: {kept} of {len(dataset)} rows kept"]
    if reasons:
        parts.append(f"left out: {reasons}")
    if unread := [column for column in dataset.column_names if column not in READ]:
        parts.append(f"columns not read: {', '.join(unread)}")
    if limit is not None and limit < kept:
        parts.append(f"{limit} of them are used")
    print("; ".join(parts))


def _rendered(tokenizer: Tokenizer, marks: re.Pattern, row: dict) -> str:
    """A parsed row's prompt in the chat template; Unfit for a pair or texts that cannot be used."""
    texts = [*_check_answers(row), *(turn["content"] for turn in row["prompt"])]
    if any(map(marks.search, texts)):
        raise Unfit("with a special token")
    return render(tokenizer, row["prompt"])


def _check_answers(row: dict) -> list[str]:
    answers = [row[name] for name in ANSWERS if name in row]
    if not all(answers):
        raise Unfit("empty")
    if row.get("chosen") is not None and row["chosen"] == row.get("rejected"):
        raise Unfit("equal pairs")
    return answers


def _short_enough(
    parsed: list[tuple[dict, str]], tokenizer: Tokenizer, preset: Preset
) -> list[dict]:
    """The rows whose prompt, with its template, and responses, with EOS, are within the limits."""
    rows, rendered = [row for row, _ in parsed], [text for _, text in parsed]
    fits = [[len(ids) <= preset.prompt_length for ids in prompt_tokens(tokenizer, rendered)]]
    for name in (name for name in ANSWERS if name in rows[0]):
        tokens = response_tokens(tokenizer, rendered, [row[name] for row in rows])
        fits.append([len(ids) <= preset.response_length for ids in tokens])
    return [row for row, *fit in zip(rows, *fits, strict=True) if all(fit)]


# --- one row -------------------------------------------------------------------------------


def _parse(row: dict) -> dict:
    """A row's prompt as messages, its answers as texts.

    A transcript or a list of messages without a prompt beside it is one up to its last turn, which
    is the answer.

    Raises:
        Unfit: if it has no prompt, or two, or an answer that is none, and as `as_messages`.
    """
    if row.get("label") is False:
        raise Unfit("labelled as undesirable")
    prompts, answers = [], {}
    if row.get("prompt"):
        prompts = [_turns(row["prompt"])]
        if prompts[0][-1:] == [{"role": "assistant", "content": ""}]:
            prompts[0].pop()  # the mark behind which the answer is to begin
    for name in (name for name in ANSWERS if name in row):
        if "prompt" in row and not isinstance(row[name], list):
            answers[name] = _clean(row[name])
            if MARK.search(answers[name]):
                raise Unfit("with turns behind the answer")
            continue
        *before, last = _turns(row[name]) or [{}]
        if last.get("role") != "assistant":
            raise Unfit("without an answer")
        answers[name] = last["content"]
        if before:
            prompts.append(before)
    if system := _clean(row.get("system")):
        first = {"role": "system", "content": system}
        prompts = [talk if talk[:1] == [first] else [first, *talk] for talk in prompts]
    talks = {same_prompt(talk): as_messages(talk) for talk in prompts}
    if len(talks) != 1:
        raise Unfit("of two prompts" if talks else "empty")
    return {"prompt": next(iter(talks.values())), **answers}


def _turns(value: object) -> list[Message]:
    """The messages of a prompt or dialogue, given as messages or as a transcript of hh-rlhf.

    What stands before the first mark is the user's, or, before the user's, a system message.
    """
    if isinstance(value, list):
        return [turn | {"content": _clean(turn["content"])} for turn in messages_of(value)]
    before, *rest = MARK.split(_clean(value))
    speakers = [SPEAKERS[mark] for mark in rest[::2]]
    if before:
        speakers.insert(0, "system" if speakers[:1] == ["user"] else "user")
        rest = ["", before, *rest]
    turns = zip(speakers, rest[1::2], strict=True)
    return [{"role": role, "content": content.strip()} for role, content in turns]


def _clean(value: object) -> str:
    """A text without blanks around it, its lines ended by newlines alone."""
    if not isinstance(value, str | None):
        raise Unfit("neither text nor messages")
    if MESSAGES.match(value or ""):
        raise Unfit("with messages written as text")
    return re.sub(r"\r\n?", "\n", value or "").strip()
