"""What a file, a folder or the hub holds, as it is: read by `datasets`, or a clear error."""

import csv
import glob
import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, load_dataset

from rlhf_helpers.hub import from_hub
from rlhf_helpers.presets import Preset
from rlhf_helpers.text import HALF

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TEXTS = ("prompt", "system", "completion", "chosen", "rejected")
CSV = {"converters": dict.fromkeys(TEXTS, str), "keep_default_na": False}
EMPTY = ("no data", "No columns", "is 0 bytes")  # what the readers say of a file without rows


def read_source(
    source: str, preset: Preset, split: str | None = None
) -> Dataset | dict[str, Dataset]:
    """One split of a source as it is, or, without a name, all of them by their names."""
    path = Path(source).expanduser()
    kind = _kind(path)
    if kind and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source!r}; check the path to your data")
        if split not in (None, "train"):
            raise ValueError(
                f"split is {split!r}, but the file {source!r} is one split, 'train'; give another "
                "file, or a folder with a file for each split"
            )
        dataset = _read_file(path, kind)
        return {"train": dataset} if split is None else dataset
    if path.is_file():
        raise ValueError(f"{source!r} ends in none of {', '.join(FORMATS)}; convert it to one")
    options = {"data_dir": preset.data_dir if source == preset.data else None, "split": split}
    if path.is_dir():
        options |= _folder_options(path / (options["data_dir"] or ""))
        try:
            return _load_local(str(path), **options)
        except Exception as error:
            detail = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(
                f"the folder {source!r} cannot be read as data ({detail:.150}); give it one file "
                "for each split, such as train.jsonl"
            ) from error
    if source == preset.data:
        options["revision"] = preset.data_revision
    return from_hub(source, load_dataset, source, **options)


def _kind(path: Path) -> str | None:
    return FORMATS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _folder_options(folder: Path) -> dict:
    """How to read a folder's files; ValueError for what would be read wrongly, or not at all."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    kinds = {kind: path for path in files if (kind := _kind(path))}
    if len(kinds) > 1:
        names = ", ".join(sorted(path.name for path in kinds.values()))
        raise ValueError(
            f"the folder '{folder}' has data of several kinds ({names}), of which one would be "
            "read; keep one kind"
        )
    for path in files:
        if _kind(path) == "csv":
            _check_csv(path)
    return CSV if "csv" in kinds else {}


def _load_local(*source: str, **options) -> Dataset | dict[str, Dataset]:
    """`load_dataset` without its cache, which takes a changed file of the same date for the old."""
    with TemporaryDirectory() as cache:
        return load_dataset(*source, cache_dir=cache, keep_in_memory=True, **options)


def _read_file(path: Path, kind: str) -> Dataset:
    """One file, by the `datasets` library; texts of a CSV file stay texts, even "12" and "NA"."""
    options = {"data_files": {"train": [glob.escape(str(path))]}, "split": "train"}
    if kind == "csv":
        _check_csv(path)
        options |= CSV
    try:
        dataset = _load_local(kind, **options)
        dataset[:]  # finds what is not UTF-8
        return dataset
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration) or any(words in str(cause) for words in EMPTY):
            raise ValueError(f"'{path}' is empty: it needs at least one row") from error
        detail = _bad_line(path) if path.suffix == ".jsonl" else None
        if isinstance(cause, UnicodeDecodeError):
            detail = "it is not UTF-8; save it with that encoding"
        detail = detail or str(cause).strip().partition("\n")[0]
        raise ValueError(
            f"'{path}' cannot be read as {kind} ({detail}); mend that, or, if the file is "
            "truncated or damaged, copy it again"
        ) from error


def _check_csv(path: Path) -> None:
    """Rows of another length than the header: the library would shift or drop columns."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            for row in rows:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"'{path}', line {rows.line_num}: {len(row)} fields, but the header has "
                        f"{len(header)}; give every line the same number, and quote texts with "
                        "commas"
                    )
    except csv.Error as error:
        raise ValueError(
            f"'{path}': {error}; look for a quote that is never closed, or give such long texts as "
            ".jsonl"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8; save it with that encoding") from error


def _bad_line(path: Path) -> str | None:
    """Where a file of JSON lines is wrong; the library names a row of a block, or none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 (byte {error.start}); save it with that encoding"
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON: {error}"
        if not isinstance(row, dict):
            return f"line {number} is {row!r:.99}, no JSON object such as {{'prompt': …}}"
        for name, value in row.items():
            if HALF.search(str(value)):
                return f"line {number} has half of a character, a lone surrogate, in {name!r}"
    return None
