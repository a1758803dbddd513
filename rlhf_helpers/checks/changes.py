"""Mistakes of any exercise: an argument changed before it is used, or the right result after.

What is said here is true of everyone with these results: with that one change the reference gives
them too. Where there is no such change, the function itself is tried on easier arguments.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor

FIRST = "it is right but in the first column, number 0. Where does a loop end?"
LAST = "it is right but in the last column. Where does a loop begin, and what does it leave out?"
AT_PADDING = "it is right at every real token, but not at padding. What should stand there?"
AT_LAST_TOKEN = "it is right but at the last real token of a response. What is special there?"
ROWS_MIX = (
    "each row alone comes out right, but not several together: something is carried from one row "
    "to the next, taken over the whole batch, or broadcast."
)
Change = tuple[str, Callable]
_DIVISORS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.5, 2, 3, 4, 5, 10)
_CONSTANTS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 0.95, 0.97, 0.99, 1, 2, 4, 8, 16, 32)
_KNOWN = {
    -1: "the sign is turned round",
    1 / math.log(2): "the logarithm is to the base 2, not the natural one",
    1 / math.log(10): "the logarithm is to the base 10, not the natural one",
    100: "it is in percent",
}


def _moved(x: Tensor, step: int, fill: float = 0) -> Tensor:
    """The columns moved by a place, to the right if `step` is 1; `fill` where none comes from."""
    moved = x.roll(step, -1)
    moved[..., 0 if step > 0 else -1] = fill
    return moved


def _white(correction: int, x: Tensor, **options) -> Tensor:
    centred = x - x.mean(**options)
    variance = centred.square().mean(**options) * x.numel() / max(x.numel() - correction, 1)
    return centred / (variance.sqrt() + 1e-8)


_OF_TENSORS: tuple[Change, ...] = (
    ("as 0", torch.zeros_like),
    ("with the opposite sign", lambda x: -x),
    *((f"times {1 / k:.3g}, as if divided by {k}", lambda x, k=k: x / k) for k in _DIVISORS),
    *((f"with {k} added", lambda x, k=k: x + k) for k in (1, -1, 0.5, -0.5)),
    ("less its mean", lambda x: x - x.mean()),
    ("less the mean of its row", lambda x: x - x.mean(-1, keepdim=True)),
    *(("whitened", lambda x, k=k: _white(k, x)) for k in (0, 1)),
    ("whitened by rows", lambda x: _white(0, x, dim=-1, keepdim=True)),
    ("cut off at 0", lambda x: x.clamp(min=0)),
    *((f"clipped to ±{k}", lambda x, k=k: x.clamp(-k, k)) for k in (0.2, 0.5, 1, 2, 3, 5, 10)),
    ("without its sign", lambda x: x.abs()),
    ("as its sign alone", lambda x: x.sign()),
    ("squared", lambda x: x.square()),
    ("squared and halved", lambda x: x.square() / 2),
    ("exponentiated", lambda x: x.exp()),
    ("as a logarithm", lambda x: x.log()),
    ("through a sigmoid", lambda x: x.sigmoid()),
    ("through a tanh", lambda x: x.tanh()),
    ("through a softmax", lambda x: x.softmax(-1)),
    ("as running sums along its row", lambda x: x.cumsum(-1)),
    ("as running sums from the end of its row", lambda x: x.flip(-1).cumsum(-1).flip(-1)),
    ("with its mean at every place", lambda x: x.mean().expand(x.shape)),
    ("with its row's mean at every place", lambda x: x.mean(-1, keepdim=True).expand(x.shape)),
    *(("one column too far to the right", lambda x, f=f: f(x, 1)) for f in (_moved, Tensor.roll)),
    *(("one column too far to the left", lambda x, f=f: f(x, -1)) for f in (_moved, Tensor.roll)),
    ("in reverse order", lambda x: x.flip(-1)),
    ("without its fraction", lambda x: x.trunc()),
    ("rounded", lambda x: x.round()),
)
_OF_MASKS: tuple[Change, ...] = (
    ("as if it were 1 everywhere", torch.ones_like),
    ("the wrong way round, 0 for 1", lambda x: 1 - x),
    ("with one 1 too few, without the last", lambda x: _moved(x, -1)),
    ("with one 1 too few, without the first", lambda x: x * _moved(x, 1)),
    ("with one 1 too many, behind the last", lambda x: _moved(x, 1, 1)),
)
_OF_NUMBERS: tuple[Change, ...] = (
    *((f"as {k}, whatever it is", lambda x, k=k: float(k)) for k in _CONSTANTS),
    ("squared", lambda x: x * x),
    ("as its square root", math.sqrt),
    ("upside down", lambda x: 1 / x),
    ("subtracted from 1", lambda x: 1 - x),
    ("halved", lambda x: x / 2),
    ("doubled", lambda x: 2 * x),
)


def changed(
    names: Sequence[str],
    reference: Callable,
    cases: Sequence[tuple],
    results: Sequence,
    same: Callable,
) -> str:
    """The one change of the result, or of arguments, that leads from `reference` to `results`."""
    right = [reference(*case) for case in cases]
    for how, change in _of_results(right, results):
        if _agree(results, right, change, same):
            return f"all is right up to one thing: the result comes out {how}."
    if not isinstance(right[0], Tensor):
        return ""  # plain numbers are few, and may agree by chance
    for who, how, change in _of_arguments(names, cases[0]):
        if _agree(results, cases, lambda case, change=change: reference(*change(case)), same):
            return f"all is right up to one thing: {who} used {how}."
    return _place(right, results, cases)


def _agree(results: Sequence, items: Sequence, of: Callable, same: Callable) -> bool:
    try:
        return all(same(got, of(item)) for got, item in zip(results, items, strict=True))
    except Exception:  # some changes make what a function refuses
        return False


def _place(right: Sequence, results: Sequence, cases: Sequence[tuple]) -> str:
    """The one place where results are wrong."""
    if not all(isinstance(x, Tensor) and x.dim() > 1 for x in right):
        return ""
    pairs = zip(results, right, strict=True)
    off = [~torch.isclose(x.double(), y.double(), 1e-4, 1e-5, equal_nan=True) for x, y in pairs]
    if not any(x[..., 1:].any() for x in off):
        return FIRST
    if not any(x[..., :-1].any() for x in off):
        return LAST
    which = [i for i, x in enumerate(cases[0]) if _changes(x) is _OF_MASKS]
    if not which:
        return ""
    real = [case[which[0]] == 1 for case in cases]
    if not any((x & m).any() for x, m in zip(off, real, strict=True)):
        return AT_PADDING
    last = [m & (m.flip(-1).cumsum(-1).flip(-1) == 1) for m in real]
    return "" if any((x & ~m).any() for x, m in zip(off, last, strict=True)) else AT_LAST_TOKEN


def _of_results(right: Sequence, results: Sequence) -> Iterator[Change]:
    got, want = (_numbers(numbers) for numbers in (results, right))
    place = want.abs().nan_to_num(0, 0, 0).argmax()
    factor, offset = float(got[place] / want[place]), float(got[place] - want[place])
    if math.isfinite(factor) and factor:
        known = next((f": {what}" for k, what in _KNOWN.items() if abs(factor / k - 1) < 1e-4), "")
        yield f"times {factor:.4g} everywhere{known}", lambda x: x * factor
    if math.isfinite(offset):
        yield f"with {offset:.4g} added everywhere", lambda x: x + offset
    if isinstance(right[0], Tensor):
        yield from _OF_TENSORS


def _numbers(results: Sequence) -> Tensor:
    return torch.cat([torch.as_tensor(r).detach().double().flatten() for r in results])


def _of_arguments(names: Sequence[str], case: tuple) -> Iterator[tuple[str, str, Callable]]:
    """Who is changed, how, and the change of a whole case."""
    floats = [i for i, x in enumerate(case) if _is_float(x)]
    alike = [
        group
        for size in range(2, len(floats) + 1)
        for group in combinations(floats, size)
        if len({case[i].shape for i in group}) == 1
    ]
    for group in [*((i,) for i in range(len(case))), *alike]:
        who = " and ".join(names[i] for i in group) + (" are" if len(group) > 1 else " is")
        for how, change in _changes(case[group[0]]):
            yield who, how, lambda case, g=group, f=change: _with(case, g, f)
    for i, j in permutations(floats, 2):
        if case[i].shape == case[j].shape:
            who = f"the difference of {names[i]} and {names[j]} is"
            for how, change in _OF_TENSORS:
                yield who, how, partial(_other_difference, i, j, change)
            how = f"where {names[j]} belongs"
            yield f"{names[i]} is", how, lambda case, i=i, j=j: _with(case, (j,), lambda x: case[i])


def _other_difference(i: int, j: int, change: Callable, case: tuple) -> tuple:
    """The case with another difference of two arguments, both below 0 as log-probabilities are."""
    difference = change((case[i] - case[j]).double())
    top = difference.max().clamp(min=0) + 1
    second = -top.expand(case[j].shape)
    return _with(_with(case, (i,), lambda x: difference - top), (j,), lambda x: second)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _changes(x: Any) -> tuple[Change, ...]:
    if _is_float(x):
        return _OF_TENSORS
    if isinstance(x, Tensor):
        return _OF_MASKS if ((x == 0) | (x == 1)).all() else ()
    return _OF_NUMBERS if isinstance(x, float) else ()


def _with(case: tuple, group: Sequence[int], change: Callable) -> tuple:
    return tuple(change(x) if i in group else x for i, x in enumerate(case))


def miscounted(parts: Sequence, terms: Sequence, results: Sequence, within: float = 1e-6) -> str:
    """Which parts are counted wrongly, if the results are sums of `terms`, a row for each of them.

    A part is its name, what its term counts, and why. Results may be off by the share `within`.
    """
    if not all(map(math.isfinite, results)):
        return ""
    scale = torch.tensor([[max(abs(result), 1e-9)] for result in results], dtype=torch.float64)
    rows = torch.tensor(terms, dtype=torch.float64) / scale
    found = torch.linalg.lstsq(rows, torch.ones_like(scale), driver="gelsd").solution
    if not torch.allclose(rows @ found, torch.ones_like(scale), rtol=0, atol=within):
        return ""
    off = [
        f"{what}: {round(got, 3) + 0.0:.4g}, not {want:.4g} ({why})"
        for (what, want, why), got in zip(parts, found[:, 0].tolist(), strict=True)
        if abs(got - want) > 0.05 * max(want, 0.1)
    ]
    return f"it counts otherwise than the exercise: {'; '.join(off)}." if off else ""


def easier(
    names: Sequence[str], reference: Callable, cases: Sequence[tuple], fn: Callable, same: Callable
) -> str:
    """The easier arguments on which `fn` is right."""

    def right_on(cases: Sequence[tuple], told: Callable = torch.any) -> bool:
        try:
            right = [reference(*case) for case in cases]
        except Exception:  # it refuses such arguments
            return False
        enough = any(told(torch.as_tensor(want)) for want in right)
        return enough and _agree(right, cases, lambda case: fn(*copy.deepcopy(case)), same)

    rows = [row for case in cases for row in _rows(case)]
    if len(rows) > len(cases) and right_on(rows):
        return ROWS_MIX
    for i, name in enumerate(names[: len(cases[0])]):
        for value, change in _easy(cases[0][i]):
            told = (lambda x: len(x.unique()) > 1) if _is_float(cases[0][i]) else torch.any
            if right_on([_with(case, (i,), change) for case in cases], told):
                return f"it is right where {name} is {value}. Look at what else you do with {name}."
    return ""


def _rows(case: tuple) -> list[tuple]:
    """The case as batches of one row, [] if it has no batch."""
    tensors = [x for x in case if isinstance(x, Tensor)]
    sizes = {len(x) for x in tensors if x.dim()}
    if len(sizes) != 1 or max(x.dim() for x in tensors) < 2:
        return []
    return [
        tuple(x[b : b + 1] if isinstance(x, Tensor) else x for x in case) for b in range(*sizes)
    ]


def _easy(x: Any) -> tuple[Change, ...]:
    if isinstance(x, Tensor):
        one, zero = ("1 throughout", torch.ones_like), ("0 throughout", torch.zeros_like)
        return (zero,) if _is_float(x) else (one,) if _changes(x) else ()
    if isinstance(x, bool):
        return tuple((str(value), lambda x, value=value: value) for value in (True, False))
    return tuple((str(k), lambda x, k=k: float(k)) for k in (0, 1)) if isinstance(x, float) else ()
