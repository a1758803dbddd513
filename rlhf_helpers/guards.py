"""Checks of values that no signature can say, and what `kinds` are made of."""

import math
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

CONTEXT = ("max_position_embeddings", "max_seq_len")  # what configs call the most tokens


def upcast(values: Tensor) -> Tensor:
    """Float32, or float64 if it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def shown(value: object) -> str:
    """A value in an error's message: the beginning of its repr, on one line."""
    text = " ".join(line.strip() for line in f"{value!r:.300}".splitlines())
    return text if len(text) < 100 else f"{text[:98]}…"


def first_index(bad: Tensor) -> list[int] | None:
    """Index of the first true entry, None if there is none."""
    return bad.nonzero()[0].tolist() if bad.any() else None


def refuse(name: str, values: Tensor, bad: Tensor, why: str) -> None:
    """Raise ValueError with the first bad entry, where it stands, and why it cannot be."""
    if (index := first_index(bad)) is not None:
        value = values[tuple(index)].item()
        value = f"{value:.4g}" if isinstance(value, float) else value
        raise ValueError(f"{name} is {value} at {index}: {why}")


def in_range(value: float, low: float = 0, high: float = math.inf, above: bool = False) -> bool:
    """Whether `value` is a finite number from `low` to `high`; with `above`, not `low` itself."""
    try:
        inside = low <= value <= high and value < math.inf and (value > low or not above)
        return bool(inside) and not isinstance(value, bool)
    except (TypeError, ValueError, RuntimeError):  # no number at all, or several
        return False


def check_softmax(name: str, result: Tensor) -> None:
    """Find bad logits in what was computed from them: a search in them would be of size V."""
    if (index := first_index(result.isnan())) is not None:
        raise ValueError(
            f"{name} at position {index} have no softmax: they hold NaN or +inf, or are all -inf. "
            "Look for an overflow in low precision, or weights that diverged."
        )


def check_part(name: str, value: int, length: int, rest: str) -> None:
    """Raise ValueError unless a part of sequences of a length leaves something of them."""
    if value >= length:
        raise ValueError(
            f"{name} is {value} in sequences of {length} tokens: it must leave {rest}, so at most "
            f"{length - 1}."
        )


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ids are those of a vocabulary."""
    why = f"ids go from 0 to {vocab_size - 1}. Use the model's own tokenizer; for ignored tokens"
    refuse(name, ids, (ids < 0) | (ids >= vocab_size), f"{why} put the pad id and mask the result.")


def require_columns(dataset: object, source: str, columns: tuple[str, ...]) -> None:
    """Raise ValueError, naming the source, unless a data set has all these columns."""
    if not (hasattr(dataset, "column_names") or isinstance(dataset, Mapping)):
        raise TypeError(f"{source} is {shown(dataset)}: give a Dataset, as Dataset.from_list(rows)")
    names = list(getattr(dataset, "column_names", dataset))
    if missing := [c for c in columns if c not in names]:
        raise ValueError(
            f"{source!r} has no column {missing[0]!r}, only {', '.join(names)}; "
            f"rename or add it: needed are {', '.join(columns)}"
        )


def context_length(model: nn.Module) -> int:
    """The most tokens that a model takes; `sys.maxsize` where its config knows no limit.

    Models of recurrent layers or ALiBi biases may have none.
    """
    lengths = (getattr(model.config, name, None) for name in CONTEXT)
    return next((length for length in lengths if isinstance(length, int)), sys.maxsize)
