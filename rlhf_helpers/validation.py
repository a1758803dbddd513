"""What arguments must be, said once, in the signature; `checked` reads it there and enforces it.

    @checked
    def gae(rewards: Finite[B, T], response_mask: Responses[B, T], lam: Between[0, 1] = 0.95):

Libraries that check shapes (jaxtyping with beartype) find the same mistakes, but say neither what
the value was nor how to mend it, and know no masks, ranges or log-probabilities.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

from torch import Tensor

from rlhf_helpers.kinds import MADE_BY, PLAIN, Kind, Mask, Object, TensorKind

PACKAGE = __name__.partition(".")[0]


def checked(function: Callable) -> Callable:
    """Before each call, check every argument whose annotation is one of `kinds`.

    Of plain annotations those of `kinds.PLAIN` and `kinds.MADE_BY` and the classes of this package
    are such too; any may be joined with None. Types, ranges and shapes come first, then what stands
    in the tensors. Where one argument is a mask, the others of its shape are looked at where it is
    1.

    Example:
        >>> from rlhf_helpers.kinds import Above
        >>> @checked
        ... def scale(value: float, by: Above[0] = 1.0): ...
        >>> scale(2.0, by=-1)
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


def check_all(kinds: dict[str, tuple[Kind, bool]], values: dict[str, object]) -> None:
    """Raise for the first value that is not of its kind."""
    tensors, sizes = [], {}  # of each dimension: its length, and the argument that has it first
    for name, (kind, optional) in kinds.items():
        value = values[name]
        if optional and value is None:
            continue
        kind.check(name, value)
        if isinstance(kind, TensorKind):
            _check_shape(name, value, kind, sizes)
            tensors.append((name, value, kind))
    masks = [value for _, value, kind in tensors if isinstance(kind, Mask)]
    for name, value, kind in sorted(tensors, key=lambda x: not isinstance(x[2], Mask)):
        mask = next((m.bool() for m in masks if m.shape == value.shape), None)
        kind.check_entries(name, value, mask)


@functools.cache
def _kinds_of(annotated: Callable | type) -> dict[str, tuple[Kind, bool]]:
    """By name the kind of each annotated argument, and whether it may be None."""
    found = {}
    for name, hint in get_type_hints(annotated, include_extras=True).items():
        several = get_origin(hint) in (Union, UnionType)
        parts = set(get_args(hint)) - {type(None)} if several else {hint}
        if Path in parts:
            parts.discard(str)  # a text is a path too
        kinds = [kind for part in parts if (kind := _kind_of(part))]
        if name != "return" and len(parts) == len(kinds) == 1:
            found[name] = (kinds[0], type(None) in get_args(hint))
    return found


def _kind_of(part: object) -> Kind | None:
    """The kind that one annotation is, if it is one."""
    if isinstance(kind := getattr(part, "__metadata__", (None,))[0], Kind):
        return kind
    if (plain := get_origin(part) or part) in PLAIN:
        return PLAIN[plain]
    if not isinstance(part, type):
        return None
    own, name = part.__module__.partition(".")[0] == PACKAGE, part.__name__
    return Object(part, MADE_BY.get(name, f"{name}(...)")) if own or name in MADE_BY else None


def _check_shape(name: str, value: Tensor, kind: TensorKind, sizes: dict) -> None:
    """Raise unless a tensor has its dimensions, each as long as in the arguments before."""
    names, shape = kind.spec, list(value.shape)
    free = names[0] is ...
    if len(shape) < len(names) - free or (len(shape) > len(names) and not free) or 0 in shape:
        raise ValueError(f"{name} has shape {shape}: it must be {kind}, none of them 0.")
    split = len(shape) - len(names) + 1 if free else 0
    for dim, size in zip(names, ([shape[:split]] if free else []) + shape[split:], strict=True):
        length, other, before, wanted = sizes.setdefault(dim, (size, name, value, kind))
        if length != size:
            both = f"{kind} and {wanted}" if kind.spec != wanted.spec else "equal"
            raise ValueError(
                f"{name} has shape {shape}, {other} {list(before.shape)}: they must be {both}."
            )
