"""What arguments must be, said once, in the signature; `checked` reads it there and enforces it.

    @checked
    def gae(rewards: Finite[B, T], response_mask: Responses[B, T], lam: Between[0, 1] = 0.95):

Each kind is `typing.Annotated`, so a signature stays plain typing. Libraries that check shapes
(jaxtyping with beartype) find the same mistakes, but say neither what the value was nor how to mend
it, and know no masks, ranges or log-probabilities.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Annotated, get_args, get_type_hints

import torch
from torch import Tensor, nn

CONTEXT = ("max_position_embeddings", "max_seq_len")  # what configs call the most tokens
B, L, N, T, V = "BLNTV"  # batch, tokens with the prompt, pairs, response tokens, vocabulary
LOGPROB_TOLERANCE = 1e-4  # how far above 0 rounding may push a log-probability
SUM_TOLERANCE = 1e-3  # how far from 1 it may push the sum of a row of probabilities


def checked(function: Callable) -> Callable:
    """Before each call, check every argument whose annotation is a kind of this module.

    Types, ranges and shapes come first, then what stands in the tensors. Where one argument is a
    mask, the others of its shape are looked at where it is 1.

    Example:
        >>> @checked
        ... def scale(values: Finite[B], by: Above[0] = 1.0): ...
        >>> scale(torch.ones(2), by=-1)
        Traceback (most recent call last):
        ValueError: by is -1: it must be a finite number above 0.
    """
    signature, kinds = inspect.signature(function), _kinds_of(function)

    @functools.wraps(function)
    def checking(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        check_all(kinds, bound.arguments)
        return function(*args, **kwargs)

    return checking


def check_fields(settings: object) -> None:
    """Check the fields of a dataclass by their annotations; for its `__post_init__`."""
    check_all(_kinds_of(type(settings)), vars(settings))


def check_all(kinds: dict[str, tuple["Kind", bool]], values: dict[str, object]) -> None:
    """Raise for the first value that is not of its kind."""
    given = {
        name: (kind, values[name])
        for name, (kind, optional) in kinds.items()
        if not (optional and values[name] is None)
    }
    sizes = {}  # of each dimension: its length, and the argument that has it first
    for name, (kind, value) in given.items():
        kind.check(name, value)
        if isinstance(kind, TensorKind):
            _check_shape(name, value, kind, sizes)
    masks = [value for kind, value in given.values() if isinstance(kind, Mask)]
    for name, (kind, value) in sorted(given.items(), key=lambda x: not isinstance(x[1][0], Mask)):
        if isinstance(kind, TensorKind):
            mask = next((m.bool() for m in masks if m.shape == value.shape), None)
            kind.check_entries(name, value, mask)


@functools.cache
def _kinds_of(annotated: Callable | type) -> dict[str, tuple["Kind", bool]]:
    """By name the kind of each annotated argument, and whether it may be None."""
    found = {}
    for name, hint in get_type_hints(annotated, include_extras=True).items():
        for part in (hint, *get_args(hint)):  # a kind, or a kind or None
            if isinstance(kind := getattr(part, "__metadata__", (None,))[0], Kind):
                found[name] = (kind, part is not hint)
    return found


def _check_shape(name: str, value: Tensor, kind: "TensorKind", sizes: dict) -> None:
    """Raise unless a tensor has its dimensions, each as long as in the arguments before."""
    names, shape = kind.spec, list(value.shape)
    free = names[0] is ...
    if len(shape) < len(names) - free or (len(shape) > len(names) and not free) or 0 in shape:
        raise ValueError(f"{name} has shape {shape}: it must be {kind}, none of them 0.")
    split = len(shape) - len(names) + 1 if free else 0
    for dim, size in zip(names, ([shape[:split]] if free else []) + shape[split:], strict=True):
        length, other, before, wanted = sizes.setdefault(dim, (size, name, value, kind))
        if length != size:
            dim = "..." if dim is ... else dim
            both = f"{kind} and {wanted}, with one {dim}" if kind.spec != wanted.spec else "equal"
            raise ValueError(
                f"{name} has shape {shape}, {other} {list(before.shape)}: they must be {both}."
            )


class Kind:
    """What an argument must be; `Kind[...]` stands in a signature."""

    of: type = object

    def __init__(self, *spec) -> None:
        self.spec = spec

    def __class_getitem__(cls, spec):
        return Annotated[cls.of, cls(*(spec if isinstance(spec, tuple) else (spec,)))]


# --- numbers and words ---------------------------------------------------------------------


class Between(Kind):
    """A number from one bound to another: `Between[0, 1]`."""

    of = float
    words = "between {} and {}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of these."""
        return not isinstance(value, bool) and in_range(value, *self.spec)

    def check(self, name: str, value: object) -> None:
        """Raise ValueError, with the value and what to give instead."""
        if not self.fits(value):
            raise ValueError(f"{name} is {value!r}: it must be {self.words.format(*self.spec)}.")


class AtLeast(Between):
    """A finite number that is not below a bound: `AtLeast[0]`."""

    words = "a finite number, {} or above"


class Above(Between):
    """A finite number above a bound: `Above[0]`; `Above[0, math.inf]` takes infinity too."""

    words = "a finite number above {}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of these."""
        inside = in_range(value, self.spec[0], above=True) and not isinstance(value, bool)
        return inside or (math.inf,) == (value,) == self.spec[1:]


class Whole(Between):
    """A whole number, of at least a bound: `Whole[1]`."""

    of = int
    words = "a whole number, at least {}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of these."""
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.spec[0]


class OneOf(Between):
    """One of some words: `OneOf["k1", "k2"]`."""

    of = str

    def __init__(self, *choices: str) -> None:
        super().__init__(*choices)
        self.words = f"one of {', '.join(map(repr, choices))}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of these."""
        return value in self.spec


# --- tensors -------------------------------------------------------------------------------


class TensorKind(Kind):
    """A tensor with named dimensions, `[..., V]`; one name has one length in a call."""

    of = Tensor

    def __str__(self) -> str:
        return f"[{', '.join('...' if dim is ... else dim for dim in self.spec)}]"

    def check(self, name: str, value: object) -> None:
        """Raise TypeError unless it is a tensor."""
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"{name} must be a tensor, not {kind}: convert with torch.tensor.")

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for an entry that cannot be; under a mask, if there is one."""


class Floating(TensorKind):
    """Floating-point numbers of any size."""

    def check(self, name: str, value: object) -> None:
        """Raise TypeError unless it is a floating-point tensor."""
        super().check(name, value)
        if not value.is_floating_point():
            kind = value.dtype
            raise TypeError(f"{name} must be floating point, not {kind}: convert with .float().")


class Finite(Floating):
    """Floating-point numbers, neither NaN nor infinite."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for one that is not finite."""
        bad = ~value.isfinite() if mask is None else ~value.isfinite() & mask
        refuse(name, value, bad, "it must be finite; look for weights that diverged.")


class LogProbs(Floating):
    """Log-probabilities: not NaN, and not above 0 by more than rounding."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for one that is no log-probability; under a mask also for −inf."""
        if mask is not None:
            Finite.check_entries(self, name, value, mask)
            value = value.masked_fill(~mask, 0)
        refuse(name, value, value.isnan(), "look at the logits it was computed from.")
        never = "a log-probability is never above 0. Pass log-probabilities, not probabilities or"
        refuse(name, value, value > LOGPROB_TOLERANCE, f"{never} logits.")


class Distributions(LogProbs):
    """Log-probabilities of a whole vocabulary, in the last dimension."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for a row whose probabilities do not sum to 1."""
        sums = upcast(value.detach()).exp().sum(-1)
        bad = ~((sums - 1).abs() <= SUM_TOLERANCE)
        mend = "it must be 1. Take torch.log_softmax of the logits first."
        refuse(f"the sum of the probabilities of {name}", sums, bad, mend)
        super().check_entries(name, value, mask)


class Ids(TensorKind):
    """Token ids, int64."""

    def check(self, name: str, value: object) -> None:
        """Raise TypeError unless they are int64."""
        super().check(name, value)
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, not {value.dtype}: convert with .long().")


class Mask(TensorKind):
    """1 for what counts, else 0; in the last dimension at least one 1."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for another number, or a row without a 1."""
        refuse(name, value, (value != 0) & (value != 1), "only 0 and 1 may stand there.")
        if (row := first_index(~value.bool().any(-1))) not in (None, []):
            raise ValueError(f"{name} row {row[0]} is all zeros: drop this empty sequence.")


class Responses(Mask):
    """A mask of responses: 1 up to and including EOS, then 0."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for a hole, or as `Mask` does."""
        super().check_entries(name, value, mask)
        holes = torch.nn.functional.pad(value[:, 1:] > value[:, :-1], (1, 0))
        refuse(name, value, holes, "a 0 stands before it. Give 1 up to and including EOS, then 0.")


# --- what the kinds are made of, and what no signature can say -------------------------------


def upcast(values: Tensor) -> Tensor:
    """Float32, or float64 if it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


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
        return bool(low <= value <= high and value < math.inf and (value > low or not above))
    except (TypeError, ValueError, RuntimeError):  # no number at all, or several
        return False


def check_softmax(name: str, result: Tensor) -> None:
    """Find bad logits in what was computed from them: a search in them would be of size V."""
    if (index := first_index(result.isnan())) is not None:
        raise ValueError(
            f"{name} at position {index} have no softmax: they hold NaN or +inf, or are all -inf. "
            "Look for an overflow in low precision, or weights that diverged."
        )


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ids are those of a vocabulary."""
    why = f"ids go from 0 to {vocab_size - 1}. Use the model's own tokenizer; for ignored tokens"
    refuse(name, ids, (ids < 0) | (ids >= vocab_size), f"{why} put the pad id and mask the result.")


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
