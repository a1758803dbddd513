"""Mistakes of any exercise: an argument changed before it is used, or the right result after.

What is said here is true of everyone with these results: with that one change the reference gives
them too. Where there is no such change, the function itself is tried on easier arguments.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, permutations, product
from typing import Any

import torch
from torch import Tensor

FIRST = "it is right but in the first column, number 0. Where does a loop end?"
LAST = "it is right but in the last column. Where does a loop begin, and what does it leave out?"
AT_PADDING = "it is right at every real token, but not at padding. What should stand there?"
AT_LAST_TOKEN = "it is right but at the last real token of a response. What is special there?"
MIXED = "with rows and positions mixed up, as where a transpose is cut into rows again"
ROWS_MIX = (
    "each row alone comes out right, but not several together: something is carried from one row "
    "to the next, taken over the whole batch, or broadcast."
)
Change = tuple[str, Callable]
_DIVISORS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.5, 2, 3, 4, 5, 10)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 0.95, 0.97, 0.99)
_CONSTANTS = (0, *_SHARES, 1, 2, 4, 6, 8, 16, 32, 64)
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


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(-1, True) / mask.sum(-1, True)


def _white_at(correction: int, x: Tensor, real: Tensor) -> Tensor:
    return (x - x[real].mean()) / (x[real].std(correction=correction) + 1e-8)


def last_real(mask: Tensor) -> Tensor:
    """1 at the last 1 of each row."""
    return mask * (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def _first_real(mask: Tensor) -> Tensor:
    return mask * (mask.cumsum(-1) == 1)


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
    ("cut off above 0", lambda x: x.clamp(max=0)),
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
OF_ROWS: tuple[Change, ...] = (  # of the first two dimensions
    ("with the row before in place of its own", lambda x: x.roll(1, 0)),
    ("with the row behind in place of its own", lambda x: x.roll(-1, 0)),
    ("with the first row for every row", lambda x: x[:1].expand(x.shape)),
    ("with the last row for every row", lambda x: x[-1:].expand(x.shape)),
    ("with its rows in reverse order", lambda x: x.flip(0)),
    (MIXED, lambda x: x.transpose(0, 1).reshape(x.shape)),
    (MIXED, lambda x: x.reshape(x.shape[1], len(x), *x.shape[2:]).transpose(0, 1)),
)
_OF_POSITIONS: tuple[Change, ...] = (
    ("with the position before in place of its own", lambda x: x.roll(1, 1)),
    ("with the next position in place of its own", lambda x: x.roll(-1, 1)),
    ("with the position two before in place of its own", lambda x: x.roll(2, 1)),
    ("with the position two behind in place of its own", lambda x: x.roll(-2, 1)),
    ("with its positions in reverse order", lambda x: x.flip(1)),
    ("with the first position for every one", lambda x: x[:, :1].expand(x.shape)),
    ("with the last position for every one", lambda x: x[:, -1:].expand(x.shape)),
)
_OF_BOTH: tuple[Change, ...] = (
    *OF_ROWS,
    *_OF_POSITIONS,
    *(
        (f"{rows}, and {how}", lambda x, f=f, g=g: g(f(x)))
        for rows, f in OF_ROWS[:5]
        for how, g in _OF_POSITIONS[:2]
    ),
)
_OF_REAL: tuple[Change, ...] = (  # of a tensor and the mask
    ("divided by the number of its row's real tokens", lambda x, m: x / m.sum(-1, True)),
    ("times the number of its row's real tokens", lambda x, m: x * m.sum(-1, True)),
    ("divided by the number of all real tokens", lambda x, m: x / m.sum()),
    ("divided by the number of columns", lambda x, m: x / m.shape[-1]),
    ("divided by the number of rows", lambda x, m: x / len(m)),
    ("less its mean over all real tokens", lambda x, m: x - x[m.bool()].mean()),
    ("less the mean of its row's real tokens", lambda x, m: x - _row_mean(x, m)),
    *(
        ("whitened over all real tokens", lambda x, m, k=k: _white_at(k, x, m.bool()))
        for k in (0, 1)
    ),
    ("with its mean over real tokens everywhere", lambda x, m: x[m.bool()].mean().expand(x.shape)),
    ("with its row's mean over real tokens everywhere", lambda x, m: _row_mean(x, m) + 0 * x),
    ("with its row's sum over real tokens everywhere", lambda x, m: (x * m).sum(-1, True) + 0 * x),
    ("as 0 at the last real token", lambda x, m: x * (1 - last_real(m))),
    ("as 0 but at the last real token", lambda x, m: x * last_real(m)),
    ("as 0 at the first real token", lambda x, m: x * (1 - _first_real(m))),
    ("as 0 but at the first real token", lambda x, m: x * _first_real(m)),
)
_WHERE: tuple[Change, ...] = (  # of numbers
    ("is 0", lambda x: x == 0),
    ("is above 0", lambda x: x > 0),
    ("is below 0", lambda x: x < 0),
)
_ROWS_WHERE: tuple[Change, ...] = (  # of a mask, and which rows
    ("of the first row", lambda m: torch.arange(len(m)) == 0),
    ("of the last row", lambda m: torch.arange(len(m)) == len(m) - 1),
    ("of rows without padding", lambda m: m.bool().all(-1)),
    ("of rows with padding", lambda m: ~m.bool().all(-1)),
    ("of rows that begin with padding", lambda m: m[:, 0] == 0),
    ("of rows of one real token", lambda m: m.sum(-1) == 1),
    ("of rows of several real tokens", lambda m: m.sum(-1) > 1),
)
_OF_MASKS: tuple[Change, ...] = (
    ("as if it were 1 everywhere", torch.ones_like),
    ("the wrong way round, 0 for 1", lambda x: 1 - x),
    ("with one 1 too few, without the last", lambda x: x - last_real(x)),
    ("with one 1 too few, without the first", lambda x: x - _first_real(x)),
    ("with one 1 too many, behind the last", lambda x: _moved(x, 1, 1)),
    ("with one 1 too many, behind the last", lambda x: torch.maximum(x, _moved(x, 1))),
    ("one column too far to the right", lambda x: _moved(x, 1)),
    ("one column too far to the right", lambda x: x.roll(1, -1)),
    ("one column too far to the left", lambda x: _moved(x, -1)),
    ("one column too far to the left", lambda x: x.roll(-1, -1)),
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
_OF_INTEGERS: tuple[Change, ...] = (
    *((f"as {k}, whatever it is", lambda x, k=k: k) for k in range(5)),
    *((f"with {k} added", lambda x, k=k: x + k) for k in (1, -1, 2, -2)),
    ("doubled", lambda x: 2 * x),
    ("halved", lambda x: x // 2),
)
_OF_TOKENS: tuple[Change, ...] = (
    *(("one column too far to the right", lambda x, k=k: _moved(x, 1, k)) for k in (0, 1)),
    *(("one column too far to the left", lambda x, k=k: _moved(x, -1, k)) for k in (0, 1)),
    *((f"as {k} everywhere", lambda x, k=k: 0 * x + k) for k in (0, 1)),
    *((f"with {k} added", lambda x, k=k: (x + k).clamp(min=0)) for k in (1, -1)),
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
    if not any(isinstance(x, Tensor) for x in cases[0]):
        return ""  # plain numbers are few, and may agree by chance
    if message := _other_divisor(right, results, cases, same):
        return message
    for who, how, change in _of_arguments(names, cases):
        if _agree(results, cases, lambda case, change=change: reference(*change(case)), same):
            return f"all is right up to one thing: {who} {how}."
    return _place(names, right, results, cases)


def _agree(results: Sequence, items: Sequence, of: Callable, same: Callable) -> bool:
    try:
        return all(same(got, of(item)) for got, item in zip(results, items, strict=True))
    except Exception:  # some changes make what a function refuses
        return False


def _other_divisor(right: Sequence, results: Sequence, cases: Sequence, same: Callable) -> str:
    """By what a mean is divided, if it is another number than that of its terms."""
    if any(torch.as_tensor(x).dim() for x in right):
        return ""
    masked = _masked(cases)
    what = "real tokens" if masked is not None else "pairs"
    items = []
    for want, case in zip(right, cases, strict=True):
        rows, columns = len(case[0]), case[0].shape[-1]
        items.append((want, rows if masked is None else int(case[masked].sum()), rows, columns))
    for how, of in (
        (f"the number of {what} less 1", lambda n, b, t: n - 1),
        (f"the number of {what} and 1", lambda n, b, t: n + 1),
        (f"twice the number of {what}", lambda n, b, t: 2 * n),
        (f"the number of {what} squared", lambda n, b, t: n * n),
        (f"the root of the number of {what}", lambda n, b, t: math.sqrt(n)),
        ("the number of rows", lambda n, b, t: b),
        ("the number of columns", lambda n, b, t: t),
        ("the number of rows less 1", lambda n, b, t: b - 1),
    ):
        for low in (1e-9, 1):  # a 0 raised to 1, or not
            if _agree(
                results, items, lambda x, of=of, low=low: x[0] * x[1] / max(of(*x[1:]), low), same
            ):
                what = f"the sum is divided by {how}, not by that of {what}"
                return f"all is right up to one thing: {what}."
    return ""


def _place(names: Sequence[str], right: Sequence, results: Sequence, cases: Sequence[tuple]) -> str:
    """The one place where results are wrong."""
    if not all(isinstance(x, Tensor) and x.dim() for x in right):
        return ""
    pairs = [(x.double(), y.double()) for x, y in zip(results, right, strict=True)]
    off = [~torch.isclose(x, y, 1e-4, 1e-5, equal_nan=True) for x, y in pairs]
    if all(x.all() for x in off):  # then it is right nowhere
        return ""
    deep = right[0].dim() > 1
    if deep and not any(x[..., 1:].any() for x in off):
        return FIRST
    if deep and not any(x[..., :-1].any() for x in off):
        return LAST
    if deep and (masked := _masked(cases)) is not None:
        masks = [case[masked] for case in cases]
        if not any((x & (m == 1)).any() for x, m in zip(off, masks, strict=True)):
            return AT_PADDING
        if not any((x & (last_real(m) == 0)).any() for x, m in zip(off, masks, strict=True)):
            return AT_LAST_TOKEN
    which = zip(cases, right, strict=True)
    where = [dict(_conditions(names, case, x.shape, _masked(cases))) for case, x in which]
    for how in where[0]:
        places = [x[how].expand(y.shape) for x, y in zip(where, off, strict=True)]
        if all(torch.equal(x, y) for x, y in zip(places, off, strict=True)):
            there = {
                round(v, 4) for (x, _), y in zip(pairs, off, strict=True) for v in x[y].tolist()
            }
            given = f"; there it gives {there.pop() + 0.0:.4g}" if len(there) == 1 else ""
            return f"it is right but {how}{given}. What is special there?"
    return ""


def _conditions(names: Sequence, case: tuple, shape: Sequence, masked: int | None) -> Iterator:
    """Places of a result of that shape, by what holds there."""
    rows = shape[-2] if len(shape) > 1 else shape[0]
    for i, x in enumerate(case):
        if not isinstance(x, Tensor):
            continue
        if i == masked and x.dim() == 2 and len(x) == rows:
            for how, of in _ROWS_WHERE:
                yield f"in the tokens {how}", of(x)[:, None] if len(shape) > 1 else of(x)
        elif x.dim() == min(len(shape), 2) and x.shape[-1] >= shape[-1] and len(x) == rows:
            for how, of in _WHERE:
                yield f"where {names[i]} {how}", of(x[..., -shape[-1] :])


def _of_results(right: Sequence, results: Sequence) -> Iterator[Change]:
    got, want = (_numbers(numbers) for numbers in (results, right))
    place = want.abs().nan_to_num(0, 0, 0).argmax()
    factor, offset = float(got[place] / want[place]), float(got[place] - want[place])
    if math.isfinite(factor) and factor:
        known = next((f": {what}" for k, what in _KNOWN.items() if abs(factor / k - 1) < 1e-4), "")
        yield f"times {factor:.4g} everywhere{known}", lambda x: x * factor
    if math.isfinite(offset):
        yield f"with {offset:.4g} added everywhere", lambda x: x + offset
    top, low = float(got.max()), float(got.min())
    if top == low and want.max() > want.min():
        yield f"as {top:.4g}, whatever the arguments", lambda x: 0 * x + top
    if math.isfinite(top) and (got == top).sum() > 1 and (want > top).any():
        yield f"cut off at {top:.4g}", lambda x: torch.as_tensor(x).clamp(max=top)
    if math.isfinite(low) and (got == low).sum() > 1 and (want < low).any():
        yield f"cut off at {low:.4g}", lambda x: torch.as_tensor(x).clamp(min=low)
    if isinstance(right[0], Tensor):
        yield from _OF_TENSORS
        yield from _OF_BOTH if right[0].dim() > 1 else OF_ROWS[:5]


def _numbers(results: Sequence) -> Tensor:
    return torch.cat([torch.as_tensor(r).detach().double().flatten() for r in results])


def _of_arguments(names: Sequence, cases: Sequence[tuple]) -> Iterator[tuple[str, str, Callable]]:
    """Who is changed, how, and the change of a whole case."""
    case, masked = cases[0], _masked(cases)
    floats = [i for i, x in enumerate(case) if _is_float(x)]
    alike = [
        group
        for size in range(2, len(floats) + 1)
        for group in combinations(floats, size)
        if len({case[i].shape for i in group}) == 1
    ]
    of_real = _OF_REAL if masked is not None else ()
    for group in [*((i,) for i in range(len(case))), *alike]:
        who = " and ".join(names[i] for i in group) + (
            " are used" if len(group) > 1 else " is used"
        )
        changes = [
            (how, lambda case, g=group, f=change: _with(case, g, f))
            for how, change in _changes(cases, group[0])
        ]
        if group[0] in floats:
            changes += [(how, partial(_with_mask, group, f, masked)) for how, f in of_real]
        for how, change in changes:
            yield who, how.replace(" its ", " their ") if len(group) > 1 else how, change
    for i, j in permutations(floats, 2):
        if case[i].shape == case[j].shape:
            who = f"the difference of {names[i]} and {names[j]} is used"
            for how, change in _OF_TENSORS:
                yield who, how, partial(_other_difference, i, j, lambda x, case, f=change: f(x))
            for how, change in of_real:
                of = partial(lambda f, x, case: f(x, case[masked]), change)
                yield who, how, partial(_other_difference, i, j, of)
            who, how = f"{names[i]} is used", f"where {names[j]} belongs"
            yield who, how, lambda case, i=i, j=j: _with(case, (j,), lambda x: case[i])
    yield from _left_out(names, floats, masked)


def _left_out(names: Sequence, floats: Sequence[int], masked: int | None) -> Iterator:
    """Tokens that do not count although the mask is 1, or pairs that do not count."""
    what, kept = ("pair", _of_rows) if masked is None else ("token", partial(_of_mask, masked))
    numbers = [(names[i], lambda case, i=i: case[i]) for i in floats]
    for i, j in combinations(floats, 2):
        name = f"difference of {names[i]} and {names[j]}"
        numbers.append((name, lambda case, i=i, j=j: case[i] - case[j]))
    out = "left out of sum and number"
    for (name, of), (how, where) in product(numbers, _WHERE):
        which = partial(lambda of, where, case: ~where(of(case)), of, where)
        yield f"a {what} whose {name} {how} is", out, partial(kept, which)
    for how, where in _ROWS_WHERE if masked is not None else ():
        which = partial(lambda where, case: ~where(case[masked])[:, None], where)
        yield f"what is {how} is", out, partial(kept, which)
    for how, k in (("first", 0), ("last", -1)) if masked is None else ():
        which = partial(lambda k, case: torch.arange(n := len(case[floats[0]])) != k % n, k)
        yield f"the {how} pair is", out, partial(kept, which)


def _of_mask(masked: int, which: Callable, case: tuple) -> tuple:
    return _with(case, (masked,), lambda x: x * which(case))


def _of_rows(which: Callable, case: tuple) -> tuple:
    return tuple(x[which(case)] if isinstance(x, Tensor) else x for x in case)


def _with_mask(group: Sequence[int], change: Callable, masked: int, case: tuple) -> tuple:
    """The case with a change by its mask; a row's number counts as a column of one."""
    mask = case[masked]

    def of(x: Tensor) -> Tensor:
        return change(x[:, None], mask).reshape(x.shape) if x.dim() < 2 else change(x, mask)

    return _with(case, group, of)


def _other_difference(i: int, j: int, change: Callable, case: tuple) -> tuple:
    """The case with another difference of two arguments, both below 0 as log-probabilities are."""
    difference = change((case[i] - case[j]).double(), case)
    top = difference.max().clamp(min=0) + 1
    second = -top.expand(case[j].shape)
    return _with(_with(case, (i,), lambda x: difference - top), (j,), lambda x: second)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _masked(cases: Sequence[tuple]) -> int | None:
    """The number of the argument that is a mask: of integers, and 0 or 1 in every case."""
    for i, x in enumerate(cases[0]):
        if isinstance(x, Tensor) and not _is_float(x):
            if all(((case[i] == 0) | (case[i] == 1)).all() for case in cases):
                return i
    return None


def _changes(cases: Sequence[tuple], number: int) -> tuple[Change, ...]:
    """What may be made of the argument of that number."""
    x = cases[0][number]
    if isinstance(x, Tensor):
        masks = _OF_MASKS if number == _masked(cases) else _OF_TOKENS
        own = _OF_TENSORS if _is_float(x) else masks
        return own + (_OF_BOTH if x.dim() > 1 else OF_ROWS[:5])
    numbers = {float: _OF_NUMBERS, int: _OF_INTEGERS}
    return numbers.get(type(x), ())


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
    names: Sequence[str],
    reference: Callable,
    cases: Sequence[tuple],
    fn: Callable,
    same: Callable,
    rows_mix: str = ROWS_MIX,
) -> str:
    """The easier arguments on which `fn` is right; `rows_mix` where each row alone is."""

    def right_on(cases: Sequence[tuple], told: Callable = torch.any) -> bool:
        try:
            right = [reference(*case) for case in cases]
        except Exception:  # it refuses such arguments
            return False
        enough = any(told(torch.as_tensor(want)) for want in right)
        enough = enough and len(_numbers(right).unique()) > 1  # else the others would not count
        return enough and _agree(right, cases, lambda case: fn(*copy.deepcopy(case)), same)

    rows = [row for case in cases for row in _rows(case)]
    if len(rows) > len(cases) and right_on(rows):
        return rows_mix
    for i, name in enumerate(names[: len(cases[0])]):
        for value, change in _easy(cases, i):
            told = (lambda x: len(x.unique()) > 1) if _is_float(cases[0][i]) else torch.any
            if right_on([_with(case, (i,), change) for case in cases], told):
                return (
                    f"it is right where {name} is {value}, also with all else as here, but not in "
                    f"this case: follow {name} from where it comes in."
                )
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


def _easy(cases: Sequence[tuple], number: int) -> tuple[Change, ...]:
    x = cases[0][number]
    if isinstance(x, Tensor):
        one, zero = ("1 throughout", torch.ones_like), ("0 throughout", torch.zeros_like)
        mask = (one,) if number == _masked(cases) else ()  # ids that are all 1 are no easier
        return (zero,) if _is_float(x) else mask
    if isinstance(x, bool):
        return tuple((str(value), lambda x, value=value: value) for value in (True, False))
    return tuple((str(k), lambda x, k=k: float(k)) for k in (0, 1)) if isinstance(x, float) else ()
