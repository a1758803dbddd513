"""Checks that several modules share; each message names the argument."""

import math
import sys

import torch
from torch import Tensor, nn

CONTEXT = ("max_position_embeddings", "max_seq_len")  # what configs call the most tokens
LOGPROB_TOLERANCE = 1e-4  # how far above 0 rounding may push a log-probability
SUM_TOLERANCE = 1e-3  # how far from 1 it may push the sum of a row of probabilities


def upcast(values: Tensor) -> Tensor:
    """Float32, or float64 if it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def first_index(bad: Tensor) -> list[int] | None:
    """Index of the first true entry, None if there is none."""
    return bad.nonzero()[0].tolist() if bad.any() else None


def in_range(value: float, low: float = 0, high: float = math.inf, above: bool = False) -> bool:
    """Whether `value` is a finite number from `low` to `high`; with `above`, not `low` itself."""
    try:
        return bool(low <= value <= high and value < math.inf and (value > low or not above))
    except (TypeError, ValueError, RuntimeError):  # no number at all, or several
        return False


def check_whole(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, at least {least}.")


def check_floating(name: str, values: Tensor) -> None:
    """Raise TypeError unless `values` is a floating-point tensor."""
    if not isinstance(values, Tensor):
        kind = type(values).__name__
        raise TypeError(f"{name} must be a tensor, not {kind}: convert with torch.tensor.")
    if not values.is_floating_point():
        kind = values.dtype
        raise TypeError(f"{name} must be floating point, not {kind}: convert with .float().")


def check_binary(name: str, mask: Tensor) -> None:
    """Raise unless a mask holds nothing but 0 and 1."""
    if (index := first_index((mask != 0) & (mask != 1))) is not None:
        raise ValueError(
            f"{name} holds {mask[tuple(index)].item()} at {index}: only 0 and 1 may stand there."
        )


def check_logits(name: str, logits: Tensor) -> None:
    """Raise unless `logits` is floating point and not empty."""
    check_floating(name, logits)
    if logits.dim() == 0 or logits.numel() == 0:
        raise ValueError(
            f"{name} has shape {list(logits.shape)}: nothing to take a softmax of. Give [..., V], "
            "none of them 0."
        )


def check_softmax(name: str, result: Tensor) -> None:
    """Find bad logits in what was computed from them: a search in them would be of size V."""
    if (index := first_index(result.isnan())) is not None:
        raise ValueError(
            f"{name} at position {index} have no softmax: they hold NaN or +inf, or are all -inf. "
            "Look for an overflow in low precision, or weights that diverged."
        )


def check_logprobs(name: str, logprobs: Tensor) -> None:
    """Raise unless `logprobs` could be log-probabilities: floating point, no NaN, none above 0."""
    check_floating(name, logprobs)
    if (index := first_index(logprobs.isnan())) is not None:
        raise ValueError(f"{name} is NaN at {index}: look at the logits it was computed from.")
    if (index := first_index(logprobs > LOGPROB_TOLERANCE)) is not None:
        raise ValueError(
            f"{name} is {logprobs[tuple(index)].item():.4g} at {index}: a log-probability is never "
            "above 0. Pass log-probabilities, not probabilities or logits."
        )


def check_normalised(name: str, logprobs: Tensor) -> None:
    """Raise unless each row `[..., V]` of log-probabilities holds probabilities that sum to 1."""
    check_floating(name, logprobs)
    sums = upcast(logprobs.detach()).exp().sum(-1)
    if (index := first_index(~((sums - 1).abs() <= SUM_TOLERANCE))) is not None:
        raise ValueError(
            f"the probabilities of {name} sum to {sums[tuple(index)].item():.4g} at {index}, not "
            "to 1: take torch.log_softmax of the logits first."
        )


def require_columns(dataset: object, source: str, columns: tuple[str, ...]) -> None:
    """Raise ValueError, naming the source, unless a data set has all these columns."""
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
