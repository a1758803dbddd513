"""What a file, a folder or the hub holds, as it is: read by `datasets`, or a clear error."""

import glob
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, load_dataset
from pandas.errors import ParserWarning

from rlhf_helpers.hub import from_hub
from rlhf_helpers.presets import Preset

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TEXTS = ("prompt", "system", "completion", "chosen", "rejected")  # texts, even "12" and "NA"
CSV = {"converters": dict.fromkeys(TEXTS, str), "keep_default_na": False, "index_col": False}
NO_TEXT = "has half of a character, or is not UTF-8; save it with that encoding"
EMPTY = ("no data", "No columns", "is 0 bytes")  # what the readers say of a file without rows


def read_source(
    source: str, preset: Preset, split: str | None = None
) -> Dataset | dict[str, Dataset]:
    """One split of a source as it is, or, without a name, all of them by their names."""
    path = Path(source).expanduser()
    own = {"data_dir": preset.data_dir} if source == preset.data else {}
    if path.is_dir():
        inside = (path / (own.get("data_dir") or "")).rglob("*")
        files = [file for file in inside if file.is_file() and file.suffix != ".json"]
        return _read_local(path, files, split, path=str(path), **own)
    if kind := _kind(path):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source!r}; check the path to your data")
        data_files = {"train": [glob.escape(str(path))]}
        return _read_local(path, [path], split, path=kind, data_files=data_files)
    if path.is_file():
        raise ValueError(f"{source!r} ends in none of {', '.join(FORMATS)}; convert it to one")
    if own:
        own["revision"] = preset.data_revision
    return from_hub(source, load_dataset, source, split=split, **own)


def _kind(path: Path) -> str | None:
    return FORMATS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _read_local(
    source: Path, files: list[Path], split: str | None, **options
) -> Dataset | dict[str, Dataset]:
    """`load_dataset` without its cache, which takes a changed file of the same date for the old."""
    try:
        kinds = {kind: file.name for file in files if (kind := _kind(file))}
        if len(kinds) > 1:
            raise ValueError(f"of several kinds, {' and '.join(sorted(kinds.values()))}, keep one")
        options |= CSV if "csv" in kinds else {}
        with TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # more fields than the header has
            options |= {"cache_dir": cache, "keep_in_memory": True}
            found = load_dataset(split=split, **options)
        for part in found.values() if split is None else [found]:
            part[:]  # finds what is not UTF-8
        return found
    except Exception as error:
        raise ValueError(
            f"'{source}' cannot be read as data ({_reason(error, files)}); mend that (a .csv "
            "must quote texts with commas, and close every quote), copy a damaged file again, or "
            "give a folder with a file for each split, such as train.jsonl"
        ) from error


def _reason(error: Exception, files: list[Path]) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeError):
        return f"it {NO_TEXT}"
    if isinstance(cause, StopIteration) or any(words in str(cause) for words in EMPTY):
        return "it is empty, and needs at least one row"
    bad_lines = (_bad_line(file) for file in files if file.suffix == ".jsonl")
    return next(filter(None, bad_lines), str(cause).strip().partition("\n")[0][:150])


def _bad_line(path: Path) -> str | None:
    """Where a file of JSON lines is wrong; the library names a row of a block, or none."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()
                json.dumps(json.loads(line.strip() or "{}"), ensure_ascii=False).encode()
            except UnicodeError:
                return f"line {number} of {path.name} {NO_TEXT}"
            except ValueError as error:
                return f"line {number} of {path.name} is not JSON: {error}"
    return None
