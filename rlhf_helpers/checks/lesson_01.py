"""The checks of lesson 01: labels, the LoRA forward, counting."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from numbers import Integral

import torch
from torch import Tensor

from rlhf_helpers.checks.changes import miscounted
from rlhf_helpers.checks.exercise import (
    Exercise,
    call,
    check,
    each,
    family,
    gradient_fault,
    int64_fault,
    table,
    texts,
)
from rlhf_helpers.memory import FLOAT32, NF4_BLOCK, NF4_SUPERBLOCK, lora_parameters, nf4_bytes
from rlhf_helpers.sft import IGNORE, mask_prompt

SAY = texts("""
kept: {}. A label stands at every real token from column prompt_length on, EOS included, and
    nowhere else. Columns count from 0, padding included, and attention_mask alone tells what is
    real: padding may be any token, and stand on either side.
inverted (kept): the prompt has the labels and the response is ignored
rows (kept): the first prompt_length rows are treated, not the first prompt_length columns
everything_ignored (kept): everything is ignored
first_response_token_ignored (kept): the first response token is ignored
prompt_token_labelled (kept): the last prompt token has a label
token_0_as_padding (kept): it takes token 0 for padding
real_token_0_ignored (kept): a real token 0 is ignored
eos_looked_for (kept): the end of a response is looked for by its EOS, token 1
only_padding_has_labels (kept): only padding has labels
nothing_ignored (kept): nothing is ignored: prompt and padding have labels like the response
only_padding_ignored (kept): padding is ignored, the prompt is not
both (kept): only padding among the prompts is ignored: it takes one reason, not both
counted_from_first_token (kept): prompt_length is counted from the first real token of each row
left_padding_subtracted (kept): the padding on the left is subtracted from prompt_length
from_the_end (kept): prompt_length is taken for the length of the response, counted from the end
end_by_count (kept): the end of a row is taken to be the number of its real tokens
no_eos: the last token of a response, its EOS, is ignored. EOS is an action like every other token:
    a model that never gets a loss on it is never taught to stop. Look at what you leave out at the
    end of a row; only padding should go.
shifted: the labels are shifted by one. That the logits at t predict token t + 1 is true, but the
    loss shifts already; after a second shift the model learns to skip a token. A label stands where
    its token stands.
integer_index: whole rows are ignored. attention_mask holds the integers 0 and 1: as an index they
    are the numbers of two rows, and so are -1 and -2, which ~ makes of them. Compare with 0 to get
    a condition.
ignored_hold_0: ignored positions hold 0, which is a token like any other: the loss would count it.
    PyTorch's cross-entropy leaves out one value only, its ignore_index.
ignored_hold_minus_1: ignored positions hold -1. PyTorch's cross-entropy leaves out one value only,
    its ignore_index, which is -100; at any other negative label it raises an error.
label_type: the values are right, but their type is {}. Labels are token ids: keep int64, the type
    of input_ids. A float -100. or a mask of floats makes them float; where does another type enter?
mask_returned: it returns a mask of zeros and ones. The right positions are marked, but labels are
    the tokens themselves there, and the ignored value elsewhere.
reshaped: a matrix has the shape of its transpose, but not its entries. reshape and view keep the
    order in memory and only cut it into other rows; a transpose swaps rows and columns.
scale: the update is scaled by {}, not by α/r. α is the argument, and r the inner size, the one that
    A and B have in common; divided by it an update does not grow with the rank.
dead_at_0: the values are right, but with B = 0 nothing reaches B, so that it stays 0 for ever: the
    value is the layer's own, but the graph must still contain the update.
whole_sum_scaled: the frozen layer is scaled, too or alone. With B = 0 the result must be the
    layer's own; look at what your factor multiplies.
of_a_layer: {} stands for the entries of a layer's A and B. A has r × in of them and B out × r,
    without biases, and the frozen W is not trained.
only_first_layer_counted: only the first layer is counted. Each adapted layer has an A and a B of
    its own; is your return inside a loop?
layers_alike: every layer is taken to have the first one's shape. Go through all of them.
sums_multiplied: all inputs are multiplied by all outputs. Count A and B apart, for each layer.
times_layers: the sum over the layers is multiplied by their number as well. It has each of them.
only_last_layer_counted: only the last layer is counted. Each adapted layer has an A and a B of its
    own; does your loop add, or overwrite?
layer_left_out: the {} layer is left out. Each adapted layer has an A and a B of its own; where does
    your loop begin, and where does it end?
equal_shapes_once: layers of equal shape are counted once. They are different layers, each with an A
    and a B of its own.
rounding: the total is right only where everything divides evenly. Codes left over still take a
    byte, weights left over a scale, and scales left over a constant: round up at each of these
    levels, before you multiply and add.
nearest: a number of scales, constants or bytes is rounded to the nearest whole number. A scale is
    needed for a single weight too, and a constant for a single scale: round up at each level.
one_more: one is always added at a level, also where it divides evenly and nothing is left over. Up
    is the next whole number only for what is no whole number itself.
padded: the codes of whole blocks are counted. A block that is not full takes a scale of its own,
    but only as many codes as it has weights, two to a byte.
codes: the codes take too much. A code has 4 bits; how many fit in a byte?
average: it is the average of a large tensor, in bits for each weight. Blocks that are not full
    still take a scale and a constant: count codes, scales and constants, each rounded up.
constants: the float32 constants are not counted from the scales. It is one for every 256 scales,
    and a scale stands for 64 weights already.
other_blocks: the blocks have other sizes than here, or theirs have changed places. A scale is for
    64 weights, a constant for 256 scales.
""")

# --- lesson 01: the labels of the response ---------------------------------------------------


def check_mask_prompt(fn: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """Check the learner's `mask_prompt(input_ids, attention_mask, prompt_length)`.

    Args:
        fn: returns labels `[B, P + T]`, int64, as `rlhf_helpers.sft.mask_prompt` does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_mask_prompt(mask_prompt)
        mask_prompt: correct. Tested: padding on both sides, EOS alone, no EOS, P = 1, int64.
    """
    check(MASK_PROMPT, fn)


def _keep(input_ids: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, input_ids, IGNORE)


def _columns(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1]).expand(input_ids.shape)


def _rows(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[0])[:, None].expand(input_ids.shape)


def _whole_rows(rows: slice, input_ids: Tensor, mask: Tensor, prompt_length: int) -> Tensor:
    kept = _columns(input_ids) >= prompt_length
    kept[rows] = False
    return _keep(input_ids, kept)


def _next_tokens(how: tuple[int, bool], input_ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """The next token at each place from `length` less how[0] on; how[1] says if there is a last."""
    columns = _columns(input_ids)
    kept = (columns >= length - how[0]) & (mask == 1)
    return _keep(input_ids.roll(-1, 1), kept & ((columns < columns[0, -1]) | how[1]))


def _until_eos(input_ids: Tensor, mask: Tensor, prompt_length: int) -> Tensor:
    response = _columns(input_ids) >= prompt_length
    ends = ((input_ids == 1) & response).int()
    return _keep(input_ids, response & (ends.cumsum(1) == ends))


def _last_real(mask: Tensor) -> Tensor:
    return (mask == 1) & (mask.flip(1).cumsum(1).flip(1) == 1)


def _mask_case(rows: str, real: str, prompt_length: int) -> tuple[Tensor, Tensor, int]:
    """A case from rows of one digit for each token, and for each entry of the mask."""
    ids, mask = (torch.tensor([[*map(int, row)] for row in x.split()]) for x in (rows, real))
    return ids, mask, prompt_length


# EOS is token 1, at last 3. Padding is 0, then 2, then EOS: the mask tells, and no token does.
_MASK_CASES = (
    _mask_case("56710 06891", "11110 01111", 2),
    _mask_case("4100 5781", "1100 1111", 1),  # a response of EOS alone
    # prompts that end with EOS themselves; a response cut off before its EOS
    _mask_case("22617012 63511222 24917908", "00111110 11111000 01111111", 4),
    _mask_case("341633 598733", "011110 111100", 2),  # cut off, and padded all the same
)

_MASK_MISTAKES = (
    (lambda ids, mask, p: torch.full_like(ids, IGNORE), SAY.everything_ignored),
    *each(SAY.integer_index, _whole_rows, slice(-2, None), slice(None, 2)),
    (_until_eos, SAY.eos_looked_for),
    *table(
        lambda of, ids, mask, p: of(mask_prompt(ids, mask, p), ids, mask),
        (lambda y, ids, m: y.masked_fill(_last_real(m), IGNORE), SAY.no_eos),
        (lambda y, ids, m: y.masked_fill(ids == 1, IGNORE), SAY.no_eos),
        (lambda y, ids, m: _keep(y, _columns(ids) < ids.shape[1] - 1), SAY.no_eos),
        (lambda y, ids, m: y.masked_fill(y == IGNORE, 0), SAY.ignored_hold_0),
        (lambda y, ids, m: y.masked_fill(y == IGNORE, -1), SAY.ignored_hold_minus_1),
        (lambda y, ids, m: m * y, SAY.ignored_hold_0),
        (lambda y, ids, m: y != IGNORE, SAY.mask_returned),
        (lambda y, ids, m: y.roll(-1, 1), SAY.shifted),
    ),
    *((partial(_next_tokens, how), SAY.shifted) for how in product((0, 1), (False, True))),
    (lambda ids, mask, p: ids, SAY.nothing_ignored),
    *table(
        lambda of, ids, mask, p: _keep(ids, of(ids, mask, _columns(ids), p)),
        (lambda ids, m, t, p: (m == 1) & (t > p), SAY.first_response_token_ignored),
        (lambda ids, m, t, p: (m == 1) & (t >= p - 1), SAY.prompt_token_labelled),
        (lambda ids, m, t, p: (t >= p) & (ids != 0), SAY.token_0_as_padding),
        (lambda ids, m, t, p: (t >= p) & (ids * m != 0), SAY.real_token_0_ignored),
        (lambda ids, m, t, p: (t >= p) & (t < m.sum(1, True)), SAY.end_by_count),
        (lambda ids, m, t, p: (t >= p) & (m == 0), SAY.only_padding_has_labels),
        (lambda ids, m, t, p: (t < p) & (m == 1), SAY.inverted),
        (lambda ids, m, t, p: t < p, SAY.inverted),
        (lambda ids, m, t, p: m == 1, SAY.only_padding_ignored),
        (lambda ids, m, t, p: (m == 1) & (m.cumsum(1) > p), SAY.counted_from_first_token),
        (lambda ids, m, t, p: (m == 1) & (t >= p - m.argmax(1, True)), SAY.left_padding_subtracted),
        (lambda ids, m, t, p: (m == 1) | (t >= p), SAY.both),
        (lambda ids, m, t, p: (m == 1) & (t >= t.shape[1] - p), SAY.from_the_end),
        (lambda ids, m, t, p: (m == 1) & (m.flip(1).cumsum(1).flip(1) <= p), SAY.from_the_end),
        (lambda ids, m, t, p: t >= t.shape[1] - p, SAY.from_the_end),
        (lambda ids, m, t, p: (m == 1) & (_rows(ids) >= p), SAY.rows),
        (lambda ids, m, t, p: _rows(ids) >= p, SAY.rows),
    ),
)
MASK_PROMPT = Exercise(
    "mask_prompt",
    mask_prompt,
    _MASK_CASES,
    _MASK_MISTAKES,
    tested="padding on both sides, EOS alone, no EOS, P = 1, int64",
    shape_hint="Every token needs an entry, also one that is ignored, and the shift by one is "
    "left to the loss: the labels have the shape of input_ids.",
    further=lambda fn: int64_fault(MASK_PROMPT, fn, SAY.label_type),
)


# --- lesson 01: LoRA -------------------------------------------------------------------------


def check_lora_forward(fn: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check the learner's `lora_forward(x, weight, lora_A, lora_B, alpha)`.

    y = x Wᵀ + (α/r) x Aᵀ Bᵀ, differentiable with respect to x, A and B.

    Args:
        fn: takes x `[..., in]`, weight `[out, in]`, lora_A `[r, in]`, lora_B `[out, r]` and
            alpha > 0; returns `[..., out]`.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_lora_forward(_lora_forward)  # doctest: +ELLIPSIS
        lora_forward: correct. Tested: x of 1 to 3 dimensions, ranks 1 to 4, also above in, and ...

    Hu et al., LoRA (arXiv 2106.09685), equation 3.
    """
    check(LORA_FORWARD, fn)


def _lora_forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float
) -> Tensor:
    return _scaled(x, weight, lora_A, lora_B, alpha / lora_A.shape[0])


def _scaled(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    return x @ weight.T + scale * (x @ lora_A.T @ lora_B.T)


def _reshaped(matrix: Tensor) -> Tensor:
    """The transpose's shape, and not the transpose."""
    return matrix.reshape(matrix.shape[1], matrix.shape[0])


def _misread(which: tuple[bool, ...], x, weight, lora_A, lora_B, alpha) -> Tensor:
    """lora_forward with the matrices marked in `which` reshaped where they should be transposed."""
    matrices = zip((weight, lora_A, lora_B), which, strict=True)
    return _lora_forward(x, *(_reshaped(m).T if wrong else m for m, wrong in matrices), alpha)


def _lora_gradient_fault(fn: Callable) -> str:
    """Whether the gradients of A, B and x are those of the reference, also at B = 0."""
    also = "; by way of x, training reaches the layers below"
    if fault := gradient_fault(LORA_FORWARD, fn, _LORA_CASES[1:2], (2, 3, 0), also):
        return fault
    return gradient_fault(LORA_FORWARD, fn, _LORA_CASES[4:5], (2, 3, 0)) and SAY.dead_at_0


def _small(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers from -2 to 3, so that a case can be followed by hand."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 4, shape, generator=generator).to(dtype)


def _lora_case(
    batch: tuple[int, ...],
    inputs: int,
    outputs: int,
    rank: int,
    alpha: float,
    dtype: torch.dtype = torch.float32,
) -> tuple:
    shapes = ((*batch, inputs), (outputs, inputs), (rank, inputs), (outputs, rank))
    tensors = (_small(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    return *tensors, alpha


_LORA_CASES = (
    (
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([[1.0, 0.0, 1.0]]),
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        torch.tensor([[1.0, 1.0]]),
        6.0,
    ),
    _lora_case((2,), 3, 4, rank=2, alpha=6.0),
    _lora_case((2, 2), 5, 3, rank=4, alpha=6.0, dtype=torch.float64),
    _lora_case((2,), 3, 2, rank=1, alpha=2.0),
    (_small(2, 3, seed=4), _small(4, 3, seed=5), _small(2, 3, seed=6), torch.zeros(4, 2), 3.0),
    (
        _small(2, 2, seed=7) / 3,
        _small(4, 2, seed=8) / 7,
        torch.tensor([[0.5, -1.0], [1.0, -2.0], [0.3, -0.6]]),  # r = 3, above in; of rank 1
        _small(4, 3, seed=9) / 3,
        1.0,
    ),
)

_SCALES = (  # what a scale is, and the scale of A, B and α
    ("1", lambda a, b, alpha: 1),
    ("α", lambda a, b, alpha: alpha),
    ("r/α", lambda a, b, alpha: len(a) / alpha),
    ("α/√r", lambda a, b, alpha: alpha / math.sqrt(len(a))),
    ("(α/r)²", lambda a, b, alpha: (alpha / len(a)) ** 2),
    ("α·r", lambda a, b, alpha: alpha * len(a)),
    ("α/(r + 1)", lambda a, b, alpha: alpha / (len(a) + 1)),
    ("α//r", lambda a, b, alpha: alpha // len(a)),
    (
        "α over the rank that A has as a matrix",
        lambda a, b, alpha: alpha / a.svd()[1].gt(1e-5).sum(),
    ),
    ("α over the smaller size of A", lambda a, b, alpha: alpha / min(a.shape)),
    ("α/in", lambda a, b, alpha: alpha / a.shape[1]),
    ("α/out", lambda a, b, alpha: alpha / len(b)),
    *((f"α/{n}", lambda a, b, alpha, n=n: alpha / n) for n in (2, 4, 8, 16, 32)),
    *((f"{n}", lambda a, b, alpha, n=n: n) for n in (0.5, 2, 3, 4, 8, 16)),
    *(
        ("α/r rounded to a few digits", lambda a, b, alpha, n=n: round(alpha / len(a), n))
        for n in range(4)
    ),
)
_LORA_MISTAKES = (
    *family(
        SAY.scale, lambda of, x, w, a, b, alpha: _scaled(x, w, a, b, of(a, b, alpha)), *_SCALES
    ),
    *each(
        SAY.whole_sum_scaled,
        lambda of, x, w, a, b, alpha: _scaled(x, alpha / len(a) * w, a, b, of(alpha / len(a))),
        *(lambda scale: scale, lambda scale: 1, lambda scale: scale**2),
    ),
    *each(SAY.reshaped, _misread, *[*product((False, True), repeat=3)][1:]),
    (lambda x, w, a, b, alpha: x @ w.T + alpha / a.shape[0] * x @ _reshaped(b @ a), SAY.reshaped),
)
LORA_FORWARD = Exercise(
    "lora_forward",
    _lora_forward,
    _LORA_CASES,
    _LORA_MISTAKES,
    tested="x of 1 to 3 dimensions, ranks 1 to 4, also above in, and gradients of A, B and x, also "
    "at B = 0",
    shape_hint="The result has the shape of x, with out in place of in as the last size.",
    further=_lora_gradient_fault,
    size_hint="A and B are stored as [r, in] and [out, r]: what must the inner sizes be?\n",
)


# --- lesson 01: counting ---------------------------------------------------------------------


def check_lora_parameters(fn: Callable[[Sequence[tuple[int, int]], int], int]) -> None:
    """Check the learner's `lora_parameters(shapes, rank)`.

    Args:
        fn: returns an int, as `rlhf_helpers.memory.lora_parameters` does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_lora_parameters(lora_parameters)
        lora_parameters: correct. Tested: one layer, several, equal ones, rank 1.
    """
    check(LORA_PARAMETERS, fn)


def _not_whole(exercise: Exercise, fn: Callable) -> str:
    for case in exercise.cases:
        result = call(exercise, fn, copy.deepcopy(case))
        if not isinstance(result, Integral):  # NumPy's whole numbers too
            return (
                f"the values are right, but it returned {type(result).__name__} {result!r}: this "
                "is a count, a whole number, so return an int. Where does a division or a "
                "tensor come in?"
            )
    return ""


ADAPTERS = (  # what a layer's adapter may be counted as, with the fn of out, in and rank
    ("r · in", lambda o, i, r: r * i),
    ("r · out", lambda o, i, r: r * o),
    ("2r · in", lambda o, i, r: 2 * r * i),
    ("2r · out", lambda o, i, r: 2 * r * o),
    ("in + out", lambda o, i, r: o + i),
    ("r · in + out", lambda o, i, r: r * i + o),
    ("r · out + in", lambda o, i, r: r * o + i),
    ("r²(in + out)", lambda o, i, r: r * r * (o + i)),
    ("in · out", lambda o, i, r: o * i),
    ("r · in · out", lambda o, i, r: r * o * i),
)


_SIZES = ((11, 13), (17, 6), (10, 31))
_ENTRIES = (  # of a layer, times a number that is a count of them
    ("entries for each input and each unit of the rank", 1, "A is r × in"),
    ("entries for each output and each unit of the rank", 1, "B is out × r"),
    ("entries for each entry of W", 0, "W is frozen"),
    ("entries for each input", 0, "there is no bias"),
    ("entries for each output", 0, "there is no bias"),
    ("entries for each entry of an r × r matrix", 0, "there is none between A and B"),
    ("entries for each unit of the rank", 0, "there is no scale for it"),
    ("entries for each layer", 0, "α is a setting"),
)


def _miscounted_entries(results: Sequence) -> str:
    terms = [
        [
            sum(x)
            for x in zip(
                *((r * i, r * o, o * i, i, o, r * r, r, 1) for o, i in shapes), strict=True
            )
        ]
        for shapes, r in LORA_PARAMETERS.cases
    ]
    return miscounted(_ENTRIES, terms, results)


def _of_layers(of: Callable, shapes: Sequence[tuple[int, int]], rank: int) -> float:
    return sum(of(outputs, inputs, rank) for outputs, inputs in shapes)


LORA_PARAMETERS = Exercise(
    "lora_parameters",
    lora_parameters,
    cases=(
        ([(3, 4)], 2),
        ([(3, 4), (5, 2)], 3),
        ([(8, 8), (8, 8), (20, 8), (8, 20)], 4),
        ([(7, 5)], 1),
        ([(2, 6), (6, 9), (3, 3)], 4),
        ([(9, 2)], 5),
        *(([(o, i), (i + 1, 2 * o)][:n], r) for n, r in product((1, 2), (2, 7)) for o, i in _SIZES),
    ),
    mistakes=(
        *family(
            SAY.of_a_layer,
            _of_layers,
            *ADAPTERS,
            ("r(in + out)/2", lambda o, i, r: r * (o + i) // 2),
            *(
                (f"{how}(in + out)", lambda o, i, r, of=of: of(r, o, i) * (o + i))
                for how, of in (
                    ("the smallest of r, in and out, times ", min),
                    ("the smaller of r and in, times ", lambda r, o, i: min(r, i)),
                    ("the smaller of r and out, times ", lambda r, o, i: min(r, o)),
                    ("the largest of r, in and out, times ", max),
                )
            ),
            ("the product of both, r · in · r · out,", lambda o, i, r: r * r * o * i),
            ("r times the larger width, twice,", lambda o, i, r: 2 * r * max(o, i)),
            ("r times the smaller width, twice,", lambda o, i, r: 2 * r * min(o, i)),
        ),
        (lambda shapes, rank: rank * sum(shapes[0]), SAY.only_first_layer_counted),
        (lambda shapes, rank: rank * sum(shapes[-1]), SAY.only_last_layer_counted),
        *table(
            lambda of, shapes, r: _of_layers(lambda o, i, r: r * (o + i), of(shapes), r),
            (lambda shapes: shapes[1:], SAY.layer_left_out.format("first")),
            (lambda shapes: shapes[:-1], SAY.layer_left_out.format("last")),
            (lambda shapes: shapes[1:-1], SAY.layer_left_out.format("first and the last")),
        ),
        (lambda shapes, rank: rank * len(shapes) * sum(shapes[0]), SAY.layers_alike),
        (lambda shapes, rank: rank * len(shapes) * sum(map(sum, shapes)), SAY.times_layers),
        (
            lambda shapes, rank: rank * math.prod(map(sum, zip(*shapes, strict=True))),
            SAY.sums_multiplied,
        ),
        (lambda shapes, rank: sum(rank * (o + i) for o, i in set(shapes)), SAY.equal_shapes_once),
    ),
    tested="one layer, several, equal ones, rank 1",
    further=lambda fn: _not_whole(LORA_PARAMETERS, fn),
    general=_miscounted_entries,
)


def check_nf4_bytes(fn: Callable[[int, bool], int]) -> None:
    """Check the learner's `nf4_bytes(weights, double_quant)`.

    Args:
        fn: returns an int, as `rlhf_helpers.memory.nf4_bytes` does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_nf4_bytes(nf4_bytes)  # doctest: +ELLIPSIS
        nf4_bytes: correct. Tested: plain and double quantization, blocks that are not full, ...
    """
    check(NF4_BYTES, fn)


def _bytes(codes: float, scales: float, constants: float, double_quant: bool) -> float:
    """nf4_bytes from the bytes of codes, the number of scales and of their constants."""
    return codes + (scales + FLOAT32 * constants if double_quant else FLOAT32 * scales)


def _codes(n: int) -> int:
    return math.ceil(n / 2)


def _scales(n: int) -> int:
    return math.ceil(n / NF4_BLOCK)


def _constants(n: int) -> int:
    return math.ceil(_scales(n) / NF4_SUPERBLOCK)


def _rounded(levels: Sequence[Callable], n: int, double_quant: bool) -> float:
    """nf4_bytes with another rounding of codes, scales and constants; `float` does not round."""
    codes, scales = levels[0](n / 2), levels[1](n / NF4_BLOCK)
    return _bytes(codes, scales, levels[2](scales / NF4_SUPERBLOCK), double_quant)


def _other_blocks(sizes: tuple[int, int], n: int, double_quant: bool) -> float:
    scales = math.ceil(n / sizes[0])
    return _bytes(_codes(n), scales, math.ceil(scales / sizes[1]), double_quant)


_COUNTS = (
    ("bits of a code", 4, "two to a byte"),
    ("bytes of a scale without double quantization", 4, "a float32"),
    ("bytes of a constant without double quantization", 0, "there is none"),
    ("bytes of a scale with double quantization", 1, "8 bits in place of a float32"),
    ("bytes of a constant with double quantization", 4, "a float32"),
    ("further bytes without double quantization", 0, "codes and scales are all"),
    ("further bytes with double quantization", 0, "codes, scales and constants are all"),
)


def _miscounted_bytes(results: Sequence) -> str:
    terms = []
    for n, double in NF4_BYTES.cases:
        counts = [_scales(n), _constants(n)]
        counts = (0, 0, *counts) if double else (*counts, 0, 0)
        terms.append([_codes(n) / 4, *counts, not double, double])
    return miscounted(_COUNTS, terms, results)


def _nf4_fault(fn: Callable) -> str:
    if fault := _not_whole(NF4_BYTES, fn):
        return fault
    if (result := call(NF4_BYTES, fn, (128,))) != nf4_bytes(128):
        return (
            f"the values are right, but without a second argument 128 weights take {result} bytes, "
            f"not {nf4_bytes(128)}: double_quant must be True by default."
        )
    return ""


_ONE_MORE = (lambda x: math.floor(x) + 1, lambda x: math.ceil(x) + 1)
_NEAREST = (round, lambda x: max(1, round(x)), lambda x: math.floor(x + 0.5))


def _padded(n: int, k: int) -> int:
    """Bytes of the codes of whole blocks of k weights."""
    return k * math.ceil(n / k) // 2


def _exact_bytes(n: int, double_quant: bool) -> float:
    return _rounded((float, float, float), n, double_quant)


NF4_BYTES = Exercise(
    "nf4_bytes",
    nf4_bytes,
    cases=(
        (128, False),
        (128, True),
        (16384, False),
        (16384, True),
        (100, False),
        (101, True),
        (50001, False),
        (50001, True),
        *product((1, 63, 12900, 40000, 3000, 20481), (False, True)),
    ),
    mistakes=(
        *each(
            SAY.codes,
            lambda of, n, double: _bytes(of(n), _scales(n), _constants(n), double),
            *(lambda n: n, lambda n: 2 * n, lambda n: 4 * n),
        ),
        (
            lambda n, double: 4 * n + 8 * _bytes(0, _scales(n), _constants(n), double),
            "8 times too many: these are bits, not bytes.",
        ),
        *each(
            SAY.constants,
            lambda of, n, double: _bytes(_codes(n), _scales(n), of(n), double),
            lambda n: math.ceil(n / NF4_SUPERBLOCK),
        ),
        *each(
            SAY.average,
            lambda of, n, double: of(n * (4.127 if double else 4.5) / 8),
            *(math.ceil, math.floor, round, float),
        ),
        *(
            (partial(_rounded, levels), SAY.rounding)
            for levels in product((math.ceil, math.floor, float), repeat=3)
            if levels != (math.ceil,) * 3
        ),
        *(
            (partial(_rounded, levels), message)
            for others, message in ((_ONE_MORE, SAY.one_more), (_NEAREST, SAY.nearest))
            for levels in product((math.ceil, *others), repeat=3)
            if set(levels) & set(others) and levels[0] not in _NEAREST
        ),
        *each(
            SAY.padded,
            lambda k, n, double: _bytes(_padded(n, k), _scales(n), _constants(n), double),
            *(NF4_BLOCK, NF4_BLOCK * NF4_SUPERBLOCK, 16, 32, 128, 256),
        ),
        *(
            (partial(_other_blocks, sizes), SAY.other_blocks)
            for sizes in product((32, 64, 128, 256, 512, 4096), (64, 128, 256, 512))
            if sizes != (NF4_BLOCK, NF4_SUPERBLOCK)
        ),
        (lambda n, double: math.ceil(_exact_bytes(n, double)), SAY.rounding),
        (lambda n, double: int(_exact_bytes(n, double)), SAY.rounding),
        (lambda n, double: round(_exact_bytes(n, double)), SAY.rounding),
    ),
    tested="plain and double quantization, blocks that are not full, 1 weight, the default",
    further=_nf4_fault,
    general=_miscounted_bytes,
)
