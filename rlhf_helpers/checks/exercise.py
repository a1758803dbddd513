"""How a check finds out which mistake was made, and says so.

A check calls the function on a few small cases and prints one verdict: correct, not attempted yet,
or what is wrong. To name a mistake it keeps functions that make it: one whose results are the
learner's on every case tells what went wrong. An exception is reported with the learner's line
and raised again.
"""

import ast
import copy
import functools
import inspect
import linecache
import math
import re
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers.checks.changes import ROWS_MIX, changed, easier

NOT_ATTEMPTED = "not attempted yet."
UNKNOWN = "not right, and not in a way that this check has a name for. Work this case out by hand:"
AGAIN = (
    "the same arguments give another result the second time: there is chance in it, as in a coin "
    "for ties, or something is kept from call to call. A result must depend on the arguments alone."
)
INTEGERS = (
    "it is made of whole numbers, and what is written there loses its fraction. A tensor made like "
    "a mask or like token ids has their type; make it like one of the float arguments."
)
OVERWRITTEN = (
    "the values are right, but the backward pass fails: an operation in place has overwritten "
    "numbers that it needs. Use operations that make a new tensor."
)
CUT_IN_PLACE = (
    "the values are right, but an argument is taken out of the graph in place, and whoever called "
    "may still need it there. Make a new tensor that has no graph."
)
NO_NUMBER = (
    "it gives NaN, which is no number. That comes of 0 divided by 0, of a logarithm or a root of a "
    "number below 0, and of the mean or the spread of no number at all."
)
WRONG_GRADIENT = (
    "the values are right, but not the gradient: that with respect to {} differs, so that training "
    "would not move what it should, or not rightly{}. Look for anything that takes a tensor out of "
    "the graph: detach, no_grad, data, item, or a new tensor made from numbers."
)
SQUEEZED = (
    "A squeeze without a dimension drops every dimension of size 1, and so also a batch of one row "
    "or a response of one token: name the one that is to go."
)
GRID = (
    "A dimension of size 1 that was kept, as by keepdim, or added met the rows, and broadcasting "
    "then pairs every row with every other. Both sides need the same shape."
)
FEW_DIGITS = (
    "it is computed in 16 bits, with three digits or fewer. Leave the arguments as they are."
)
NO_MEAN = "it is a median, a maximum or a minimum where the mean is asked for."
NO_MEANS = (Tensor.median, lambda x: -(-x).median(), Tensor.max, Tensor.min)
TRANSPOSED = "Rows and columns have changed places: here the batch stands first, and time second."
# what learners put into a logarithm, so that it stays finite
EPSILONS = (*(10.0**-power for power in range(5, 31)), torch.finfo().eps, torch.finfo().tiny)


@dataclass(frozen=True)
class Exercise:
    name: str
    reference: Callable
    cases: tuple[tuple, ...]  # arguments, smallest first
    mistakes: tuple[tuple[Callable, str], ...]  # a wrong function, and what to tell its author
    tested: str
    shape_hint: str = ""
    further: Callable[[Callable], str] = lambda fn: ""  # names a fault of right values
    general: Callable[[Sequence], str] = lambda results: ""  # of wrong ones that no mistake gives
    parts: tuple[str, ...] = ()  # the names of two results, in the plural, stacked by the reference
    equal: Callable = lambda result, want: same(result, want)  # whether a result counts as right
    size_hint: str = ""  # a line for the author of an error about sizes
    rows_mix: str = ROWS_MIX  # where each row alone comes out right, but not several


def texts(block: str) -> SimpleNamespace:
    """Messages by name, from paragraphs `name: message` whose further lines are indented.

    In `name (other): message` the message takes the place of {} in the other.
    """
    found = re.findall(r"^(\w+)(?: \((\w+)\))?: (.*(?:\n +.*)*)", block, re.MULTILINE)
    plain = {name: " ".join(message.split()) for name, _, message in found}
    whole = {name: plain[of].format(plain[name]) for name, of, _ in found if of}
    return SimpleNamespace(**plain | whole)


def each(message: str, wrong: Callable, *values: Any) -> list[tuple[Callable, str]]:
    """Mistakes of one message: `wrong`, with each value as its first argument."""
    return [(partial(wrong, value), message) for value in values]


def table(wrong: Callable, *rows: tuple[Any, str]) -> list[tuple[Callable, str]]:
    """Mistakes in rows of a value, the first argument of `wrong`, and its message."""
    return [(partial(wrong, value), message) for value, message in rows]


def family(text: str, wrong: Callable, *rows: tuple[str, Any]) -> list[tuple[Callable, str]]:
    """Mistakes in rows of what fills the text and a value, the first argument of `wrong`."""
    return table(wrong, *((value, text.format(how)) for how, value in rows))


def check(exercise: Exercise, fn: Callable) -> None:
    print(wrapped(f"{exercise.name}: {verdict(exercise, fn)}"))


def check_pair(exercise: Exercise, fn: Callable) -> None:
    """`check` for a function that returns two tensors of one shape, the `parts` of the exercise.

    Reference and mistakes of the exercise return the two stacked, and so they are shown.
    """
    if callable(fn) and (fault := _pair_fault(exercise, fn)):
        print(wrapped(f"{exercise.name}: {fault}"))
    else:
        check(exercise, _stacked(fn) if callable(fn) else fn)


def _pair_fault(exercise: Exercise, fn: Callable) -> str:
    """What is wrong with the results as pairs of tensors, "" if nothing is."""
    for case in exercise.cases:
        result = call(exercise, fn, copy.deepcopy(case))
        if result is ...:
            return ""
        shape = list(exercise.reference(*case).shape[1:])
        if fault := _not_a_pair(result, shape, exercise.parts):
            return f"{fault} {_shape_hint(exercise, fn)}" if "have shape" in fault else fault
    return ""


def _not_a_pair(result: Any, shape: list[int], names: tuple[str, str]) -> str:
    wanted = f"return two tensors of shape {shape}, {names[0]} and {names[1]}."
    if result is None:
        return f"it returned None. Does every path through the function end with a return? {wanted}"
    if isinstance(result, Tensor):
        return f"it returned one tensor, of shape {list(result.shape)}; {wanted}"
    if not isinstance(result, tuple | list) or len(result) != 2:
        return f"it returned {type(result).__name__} {result!r}; {wanted}"
    for name, part in zip(names, result, strict=True):
        if not isinstance(part, Tensor):
            return f"{name} are {type(part).__name__} {part!r}; {wanted}"
        if list(part.shape) != shape:
            return f"{name} have shape {list(part.shape)}; {wanted}"
        if not part.is_floating_point():
            return f"{name} are {part.dtype}: {INTEGERS}"
    return ""


def _stacked(fn: Callable) -> Callable[..., Tensor]:
    """`fn` with its two results as one tensor, which is what a check can compare."""

    @functools.wraps(fn)  # so that the check finds the learner's code
    def stacked(*arguments):
        result = fn(*arguments)
        return result if result is ... else torch.stack(tuple(result))

    return stacked


def wrapped(text: str) -> str:
    """The text with its first paragraph on lines of at most 100 characters."""
    message, newline, shown = text.partition("\n")
    return textwrap.fill(message, 100, break_on_hyphens=False) + newline + shown


def verdict(exercise: Exercise, fn: Callable) -> str:
    """That the learner's function is correct, or not attempted yet, or what is wrong with it."""
    if fn is ...:
        return NOT_ATTEMPTED
    if not callable(fn):
        return f"give the check the function itself, not a result; it got {fn!r}."
    results = []
    for case in exercise.cases:
        arguments = copy.deepcopy(case)
        result = call(exercise, fn, arguments)
        if result is ...:
            return unattempted(fn)
        if fault := structural_fault(exercise, case, arguments, result, fn):
            return fault
        results.append(result)
    pairs = zip(exercise.cases, results, strict=True)
    if wrong := [p for p in pairs if not exercise.equal(p[1], exercise.reference(*p[0]))]:
        message = AGAIN if _changes(exercise, fn, results) else name_mistake(exercise, results, fn)
        if "NaN" in message:  # a case that shows one comes first
            wrong.sort(key=lambda pair: not torch.as_tensor(pair[1]).isnan().any())
        return f"{message}\n{show(exercise, *wrong[0])}"
    if _changes(exercise, fn, results):
        return AGAIN
    return exercise.further(fn) or f"correct. Tested: {exercise.tested}."


def _changes(exercise: Exercise, fn: Callable, results: Sequence) -> bool:
    """Whether further calls with the same arguments give something else."""
    for case, result in zip(exercise.cases * 3, [*results] * 3, strict=True):
        again = call(exercise, fn, copy.deepcopy(case))
        if type(again) is not type(result) or not same(again, result):
            return True
    return False


def unattempted(fn: Callable) -> str:
    """What to tell whose function ends at its stub: it may stand below code, or above."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(fn)))).body[0].body
    except (AttributeError, OSError, SyntaxError, TypeError):  # no function, or one without source
        return NOT_ATTEMPTED
    written = [node for node in body if not isinstance(getattr(node, "value", None), ast.Constant)]
    if len(written) < 2 or not any(isinstance(node, ast.Raise) for node in written):
        return NOT_ATTEMPTED
    return "your code is there, and so still is raise NotImplementedError: delete that line."


def call(exercise: Exercise, fn: Callable, arguments: tuple) -> Any:
    """What `fn` returns; `...` if it is the stub. Other exceptions are reported and raised."""
    case = copy.deepcopy(arguments)
    try:
        return fn(*arguments)
    except Exception as error:
        if _is_stub(error, fn):
            return ...
        print(f"{exercise.name}: {type(error).__name__}{_learner_line(error, fn)}")
        sizes_clash = re.search("shape|size", str(error)) and "invalid for input" not in str(error)
        hint = exercise.size_hint if sizes_clash else ""
        if isinstance(error, IndexError) and "mask]" in _learner_line(error, fn):
            hint = "Integers in square brackets are row numbers; a mask there has to be bool.\n"
        print(f"on this call:\n{show(exercise, case)}\n{hint}The traceback follows.")
        raise


def _code(fn: Callable):
    return getattr(inspect.unwrap(fn), "__code__", None)


def _is_stub(error: Exception, fn: Callable) -> bool:
    """Whether a bare NotImplementedError left `fn` itself; torch raises it too, with a message."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return type(error) is NotImplementedError and not error.args and frame.f_code is _code(fn)


def _learner_line(error: Exception, fn: Callable) -> str:
    """The innermost line of the file or cell that defines `fn`; "" if none was reached."""
    code = _code(fn)
    frames = [
        (frame, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if code and frame.f_code.co_filename == code.co_filename
    ]
    if not frames:
        return ""
    frame, number = frames[-1]
    source = linecache.getline(code.co_filename, number, frame.f_globals).strip()
    return f" in your line {number}" + (f": {source}" if source else "")


def structural_fault(
    exercise: Exercise, case: tuple, arguments: tuple, result: Any, fn: Callable
) -> str:
    """What is wrong with the result whatever its values are, "" if nothing is."""
    expected = exercise.reference(*case)
    kind = "tensor" if isinstance(expected, Tensor) else "number"
    if result is None:
        return f"it returned None. Does every path through the function return the {kind}?"
    if not _is_kind(result, kind):
        return f"it returned {type(result).__name__} {result!r}; return one {kind}."
    for name, before, after in zip(_argument_names(exercise), case, arguments, strict=True):
        if not _identical(before, after):
            return (
                f"it changes its argument {name} in place, and whoever calls it still needs "
                f"{name} as it was. Work on a copy, or use operations that make a new one."
            )
    if kind == "tensor" and result.shape != expected.shape:
        shapes = f"the result has shape {list(result.shape)}, expected is {list(expected.shape)}."
        return f"{shapes} {_shape_hint(exercise, fn)}\n{show(exercise, case, result)}"
    return ""


def _shape_hint(exercise: Exercise, fn: Callable) -> str:
    """How the shapes on all cases came about, if they tell, else what the exercise has to say."""
    shapes = []
    for case in exercise.cases:
        try:
            result, want = fn(*copy.deepcopy(case)), exercise.reference(*case).shape
            if isinstance(result, tuple | list):
                shapes.append(((2, *result[0].shape), want))
            else:
                shapes.append((tuple(result.shape), want))
        except Exception:  # one shape may stop what another lets pass
            continue
    for message, of in (
        (SQUEEZED, lambda want: tuple(size for size in want if size > 1)),
        (GRID, lambda want: (*want[:1], *want)),
        (GRID, lambda want: (*want, *want[-1:])),
        (TRANSPOSED, lambda want: (*want[:-2], *want[:-3:-1])),
    ):
        if shapes and all(got == of(want) for got, want in shapes):
            return message
    return exercise.shape_hint


def _is_kind(result: Any, kind: str) -> bool:
    if isinstance(result, Tensor):
        return kind == "tensor" or result.dim() == 0
    return kind == "number" and isinstance(result, Real)


def _identical(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after) and before.requires_grad == after.requires_grad
    return before == after


def same(result: Any, expected: Any) -> bool:
    """Equal in value, up to rounding in float32; the dtype does not count, and NaN equals NaN."""
    if not isinstance(expected, Tensor):
        both_nan = math.isnan(result) and math.isnan(expected)
        return both_nan or math.isclose(float(result), expected, rel_tol=1e-6, abs_tol=1e-6)
    if result.shape != expected.shape:
        return False
    return torch.allclose(_values(result), _values(expected), rtol=1e-4, atol=1e-5, equal_nan=True)


def _values(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def int64_fault(exercise: Exercise, fn: Callable, message: str) -> str:
    """The message with the dtype in its gap, if results have another one than int64."""
    dtype = call(exercise, fn, copy.deepcopy(exercise.cases[0])).dtype
    return "" if dtype == torch.int64 else message.format(dtype)


def fault_at(exercise: Exercise, fn: Callable, case: tuple, message: str) -> str:
    """The message and the case, if the function is wrong there: a case beyond the exercise's."""
    result = call(exercise, fn, copy.deepcopy(case))
    right = same(result, exercise.reference(*case))
    return "" if right else f"{message}\n{show(exercise, case, result)}"


def gradients(
    exercise: Exercise, fn: Callable, arguments: tuple, numbers: Sequence[int]
) -> tuple[Tensor, ...] | str:
    """The gradients of a weighted sum of the result, so that no two entries can be mistaken.

    They are those with respect to the arguments of these numbers; or what stands in their way.
    """
    case = copy.deepcopy(arguments)
    leaves = [case[i].requires_grad_() for i in numbers]
    with torch.enable_grad():
        result = call(exercise, fn, case)
        if not all(leaf.requires_grad for leaf in leaves):
            return CUT_IN_PLACE
        weights = torch.arange(1.0, result.numel() + 1).reshape(result.shape)
        total = (weights * result).sum() + 0 * sum(leaf.sum() for leaf in leaves)  # a graph at all
    try:
        return torch.autograd.grad(total, leaves)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return OVERWRITTEN


def gradient_fault(
    exercise: Exercise, fn: Callable, cases: Sequence[tuple], numbers: Sequence[int], also: str = ""
) -> str:
    """Whether gradients are the reference's; `also` says more about what they are for."""
    for case in cases:
        got, want = (gradients(exercise, f, case, numbers) for f in (fn, exercise.reference))
        if isinstance(got, str):
            return got
        names = [_argument_names(exercise)[i] for i in numbers]
        lost = [n for n, g, w in zip(names, got, want, strict=True) if not same(g, w)]
        if lost:
            return WRONG_GRADIENT.format(" and ".join(lost), also)
    return ""


def name_mistake(exercise: Exercise, results: Sequence, fn: Callable | None = None) -> str:
    """The message of the first known mistake that gives these results on all cases.

    Without one it is a change of arguments or result, or where `fn` is right.
    """
    floats = [exercise.reference(*case) for case in exercise.cases]
    if all(isinstance(r, Tensor) and not r.is_floating_point() for r in results) and any(
        isinstance(x, Tensor) and x.is_floating_point() for x in floats
    ):
        return INTEGERS
    if all(isinstance(r, Tensor) and r.dtype in (torch.float16, torch.bfloat16) for r in results):
        return FEW_DIGITS
    for wrong, message in exercise.mistakes:
        made = (wrong(*case) for case in exercise.cases)
        if all(same(result, other) for result, other in zip(results, made, strict=True)):
            return message
    if message := exercise.general(results):
        return message
    known = (_argument_names(exercise), exercise.reference, exercise.cases)
    message = changed(*known, results, same) or _changed_part(exercise, results)
    if message := message or (fn and easier(*known, fn, same, exercise.rows_mix)):
        return message
    return NO_NUMBER if any(torch.as_tensor(r).isnan().any() for r in results) else UNKNOWN


def _changed_part(exercise: Exercise, results: Sequence) -> str:
    """Which of two results is right, and what was changed in the other."""
    names, cases = _argument_names(exercise), exercise.cases
    for k, name in enumerate(exercise.parts):
        halves = [partial(_part, exercise.reference, j) for j in (1 - k, k)]
        others, own = ([result[j] for result in results] for j in (1 - k, k))
        if all(same(x, halves[0](*case)) for x, case in zip(others, cases, strict=True)):
            how = changed(names, halves[1], cases, own, same)
            for sign in (1, -1):  # the difference of both is a common one
                if all(
                    same(x, sign * (y - halves[1](*c)))
                    for x, y, c in zip(own, others, cases, strict=True)
                ):
                    how = "they are the difference of the two."
            return f"{exercise.parts[1 - k]} are right, {name} are not{how and ': '}{how or '.'}"
    return ""


def _part(reference: Callable, number: int, *case) -> Tensor:
    return reference(*case)[number]


def _argument_names(exercise: Exercise) -> list[str]:
    return list(inspect.signature(exercise.reference).parameters)


def show(exercise: Exercise, case: tuple, *result: Any) -> str:
    """The arguments, and if there is a result, the learner's and the expected one, line by line."""
    shown = dict(zip(_argument_names(exercise), case, strict=False))  # defaults may be left out
    if result:
        shown |= {"yours": result[0], "expected": exercise.reference(*case)}
    width = max(map(len, shown)) + 2
    return "\n".join(f"  {name:{width}}{_text(value, width + 2)}" for name, value in shown.items())


def _text(value: Any, indent: int) -> str:
    text = str(value.detach() if isinstance(value, Tensor) else value)
    return text.replace("\n", "\n" + " " * indent)
