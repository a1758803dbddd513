"""The exercise checks: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F

from rlhf_helpers.checks import (
    check_lora_forward,
    check_lora_parameters,
    check_mask_prompt,
    check_nf4_bytes,
    lesson_01,
)
from rlhf_helpers.checks.exercise import name_mistake, same

CHECKS = {
    "mask_prompt": check_mask_prompt,
    "lora_forward": check_lora_forward,
    "lora_parameters": check_lora_parameters,
    "nf4_bytes": check_nf4_bytes,
}
EXERCISES = (
    lesson_01._MASK_PROMPT,
    lesson_01._LORA_FORWARD,
    lesson_01._LORA_PARAMETERS,
    lesson_01._NF4_BYTES,
)


def run(name, answer, capsys):
    """What the check of that exercise prints about the answer; line breaks become spaces."""
    assert CHECKS[name](answer) is None
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    return " ".join(printed.split())


def test_doctests():
    results = doctest.testmod(lesson_01)
    assert results.attempted > 0
    assert results.failed == 0


# --- mask_prompt, wrong ---


def late(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, : prompt_length + 1] = -100
    labels[attention_mask == 0] = -100
    return labels


def early(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, : prompt_length - 1] = -100
    labels[attention_mask == 0] = -100
    return labels


def no_eos(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    labels[attention_mask == 0] = -100
    labels[labels == 1] = -100
    return labels


def no_last_token(input_ids, attention_mask, prompt_length):
    labels = torch.full_like(input_ids, -100)
    for b in range(len(input_ids)):
        last = max(t for t in range(input_ids.shape[1]) if attention_mask[b, t])
        labels[b, prompt_length:last] = input_ids[b, prompt_length:last]
    return labels


def no_last_column(input_ids, attention_mask, prompt_length):
    labels = torch.full_like(input_ids, -100)
    labels[:, prompt_length:-1] = input_ids[:, prompt_length:-1]
    labels[attention_mask == 0] = -100
    return labels


def padding_counts(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    return labels


def pad_is_zero(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    labels[input_ids == 0] = -100
    return labels


def only_padding(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    labels[attention_mask == 1] = -100
    return labels


def inverted(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, prompt_length:] = -100
    labels[attention_mask == 0] = -100
    return labels


def inverted_with_padding(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, prompt_length:] = -100
    return labels


def zeros(input_ids, attention_mask, prompt_length):
    labels = input_ids * attention_mask
    labels[:, :prompt_length] = 0
    return labels


def a_mask(input_ids, attention_mask, prompt_length):
    mask = attention_mask.clone()
    mask[:, :prompt_length] = 0
    return mask


def shifted_labels(input_ids, attention_mask, prompt_length):
    labels = padding_counts(input_ids, attention_mask, prompt_length)
    labels[attention_mask == 0] = -100
    ignored = torch.full((len(labels), 1), -100)
    return torch.cat([labels[:, 1:], ignored], dim=1)


def shifted_ids(input_ids, attention_mask, prompt_length):
    labels = torch.roll(input_ids, -1, dims=1)
    labels[:, :prompt_length] = -100
    labels[attention_mask == 0] = -100
    return labels


def nothing(input_ids, attention_mask, prompt_length):
    return input_ids


def prompt_too(input_ids, attention_mask, prompt_length):
    return input_ids.masked_fill(attention_mask == 0, -100)


def from_first_real_token(input_ids, attention_mask, prompt_length):
    labels = torch.full_like(input_ids, -100)
    for b, mask in enumerate(attention_mask):
        start = mask.argmax() + prompt_length
        labels[b, start:] = input_ids[b, start:]
    labels[attention_mask == 0] = -100
    return labels


def rows(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:prompt_length] = -100
    labels[attention_mask == 0] = -100
    return labels


def rows_with_padding(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:prompt_length] = -100
    return labels


MASK_MISTAKES = {
    lambda input_ids, mask, prompt_length: torch.full(
        input_ids.shape, -100
    ): "everything is ignored.",
    late: "the first response token is ignored.",
    early: "the last prompt token has a label.",
    no_eos: "the last token of a response, its EOS, is ignored.",
    no_last_token: "the last token of a response, its EOS, is ignored.",
    no_last_column: "the last token of a response, its EOS, is ignored.",
    padding_counts: "padding counts",
    pad_is_zero: "it takes token 0 for padding.",
    only_padding: "only padding has labels.",
    inverted: "the prompt has the labels and the response is ignored",
    inverted_with_padding: "the prompt has the labels and the response is ignored",
    zeros: "ignored positions hold 0",
    a_mask: "it returns a mask of zeros and ones.",
    shifted_labels: "the labels are shifted by one.",
    shifted_ids: "the labels are shifted by one.",
    nothing: "nothing is ignored",
    prompt_too: "padding is ignored, the prompt is not.",
    from_first_real_token: "prompt_length is counted from the first real token",
    rows: "the first prompt_length rows are treated",
    rows_with_padding: "the first prompt_length rows are treated",
}


# --- mask_prompt, right ---


def mask_by_loops(input_ids, attention_mask, prompt_length):
    labels = []
    for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        pairs = enumerate(zip(ids, mask, strict=True))
        labels.append([i if t >= prompt_length and m else -100 for t, (i, m) in pairs])
    return torch.tensor(labels)


def mask_in_place_on_a_clone(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    labels[attention_mask == 0] = -100
    return labels


def mask_by_where(input_ids, attention_mask, prompt_length):
    columns = torch.arange(input_ids.size(1))
    return torch.where((columns >= prompt_length) & attention_mask.bool(), input_ids, -100)


def mask_as_floats(input_ids, attention_mask, prompt_length):
    response = attention_mask.float()
    response[:, :prompt_length] = 0
    return input_ids * response - 100 * (1 - response)


def mask_as_int32(input_ids, attention_mask, prompt_length):
    prompt = torch.full_like(input_ids[:, :prompt_length], -100)
    mask = attention_mask[:, prompt_length:]
    response = input_ids[:, prompt_length:] * mask - 100 * (1 - mask)
    return torch.cat([prompt, response], dim=1).int()


MASK_RIGHT = [
    mask_by_loops,
    mask_in_place_on_a_clone,
    mask_by_where,
    mask_as_floats,
    mask_as_int32,
]


# --- lora_forward, wrong ---


def lora(x, weight, lora_A, lora_B, scale):
    return F.linear(x, weight) + scale * F.linear(F.linear(x, lora_A), lora_B)


def no_scale(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, 1)


def alpha_alone(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha)


def upside_down(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, lora_B.shape[1] / alpha)


def by_root_of_rank(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha / lora_B.shape[1] ** 0.5)


def no_alpha(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, 1 / len(lora_A))


def times_rank(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha * len(lora_A))


def rank_is_in(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha / lora_A.shape[-1])


def rank_is_out(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha / lora_B.shape[0])


def update_only(x, weight, lora_A, lora_B, alpha):
    return alpha / len(lora_A) * x @ (lora_B @ lora_A).T


def layer_only(x, weight, lora_A, lora_B, alpha):
    return F.linear(x, weight)


def sum_scaled(x, weight, lora_A, lora_B, alpha):
    return (x @ weight.T + x @ lora_A.T @ lora_B.T) * (alpha / len(lora_A))


def a_reshaped(x, weight, lora_A, lora_B, alpha):
    r, width = lora_A.shape
    return x @ weight.T + alpha / r * (x @ lora_A.reshape(width, r)) @ lora_B.T


def b_reshaped(x, weight, lora_A, lora_B, alpha):
    r = len(lora_A)
    return x @ weight.T + alpha / r * (x @ lora_A.T) @ lora_B.view(r, -1)


def weight_reshaped(x, weight, lora_A, lora_B, alpha):
    r = len(lora_A)
    return x @ weight.view(x.shape[-1], -1) + alpha / r * x @ lora_A.T @ lora_B.T


def all_reshaped(x, weight, lora_A, lora_B, alpha):
    r, width = lora_A.shape
    update = x @ lora_A.view(width, r) @ lora_B.view(r, -1)
    return x @ weight.view(width, -1) + alpha / r * update


def product_reshaped(x, weight, lora_A, lora_B, alpha):
    update = (lora_B @ lora_A).reshape(x.shape[-1], -1)
    return x @ weight.T + alpha / len(lora_A) * x @ update


def detached(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A.detach(), lora_B.detach(), alpha / len(lora_A))


@torch.no_grad()
def without_grad(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha / len(lora_A))


def b_detached(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B.data, alpha / len(lora_A))


LORA_MISTAKES = {
    lambda x, weight, lora_A, lora_B, alpha: lora(
        x, weight, lora_A, lora_B, alpha // len(lora_A)
    ): ("α/r is rounded down to a whole number."),
    no_scale: "the update is not scaled.",
    alpha_alone: "the update is scaled by α, not by α/r.",
    upside_down: "the scale is upside down",
    by_root_of_rank: "the update is scaled by α/√r.",
    no_alpha: "the update is divided by r, but α is missing",
    times_rank: "the update is multiplied by r.",
    rank_is_in: "α is divided by a width of the layer.",
    rank_is_out: "α is divided by a width of the layer.",
    update_only: "only the update is returned.",
    layer_only: "only the frozen layer is returned",
    sum_scaled: "the whole sum is scaled",
    a_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    b_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    weight_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    all_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    product_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    detached: "the values are right, but not the gradients: that of lora_A and that of lora_B",
    without_grad: "the values are right, but not the gradients: that of lora_A and that of lora_B",
    b_detached: "the values are right, but not the gradients: that of lora_B",
}


# --- lora_forward, right ---


def lora_by_linear(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha / lora_A.shape[0])


def lora_materialised(x, weight, lora_A, lora_B, alpha):
    return x @ (weight + alpha / lora_B.shape[1] * lora_B @ lora_A).T


def lora_by_einsum(x, weight, lora_A, lora_B, alpha):
    update = torch.einsum("...i,ri,or->...o", x, lora_A, lora_B)
    return torch.einsum("...i,oi->...o", x, weight) + update * alpha / len(lora_A)


def lora_by_loops(x, weight, lora_A, lora_B, alpha):
    y = x @ weight.mT
    for a, b in zip(lora_A, lora_B.T, strict=True):
        y += alpha / len(lora_A) * (x * a).sum(-1, keepdim=True) * b
    return y


def lora_in_float64(x, weight, lora_A, lora_B, alpha):
    x, weight, lora_A, lora_B = (t.double() for t in (x, weight, lora_A, lora_B))
    return lora(x, weight, lora_A, lora_B, alpha / lora_A.shape[0])


def lora_in_float32(x, weight, lora_A, lora_B, alpha):
    x, weight, lora_A, lora_B = (t.float() for t in (x, weight, lora_A, lora_B))
    return lora(x, weight, lora_A, lora_B, alpha / lora_A.shape[0])


LORA_RIGHT = [
    lora_by_linear,
    lora_materialised,
    lora_by_einsum,
    lora_by_loops,
    lora_in_float64,
    lora_in_float32,
]


# --- lora_parameters ---


def first_only(shapes, rank):
    for out, inputs in shapes:
        return rank * (out + inputs)


def last_only(shapes, rank):
    for out, inputs in shapes:
        total = rank * (out + inputs)
    return total


SQUARE = "every layer is taken to be square"
PARAMETER_MISTAKES = [
    ("only A is counted.", lambda shapes, rank: sum(rank * s[1] for s in shapes)),
    ("only B is counted.", lambda shapes, rank: sum(s[0] * rank for s in shapes)),
    ("the two widths are multiplied.", lambda shapes, rank: rank * sum(map(math.prod, shapes))),
    ("these are the frozen weights W.", lambda shapes, rank: sum(map(math.prod, shapes))),
    (
        "the frozen weights W are counted with A and B.",
        lambda shapes, rank: sum(math.prod(s) + rank * sum(s) for s in shapes),
    ),
    ("only the first layer is counted.", first_only),
    ("only the last layer is counted.", last_only),
    (
        "layers of equal shape are counted once.",
        lambda shapes, rank: sum(rank * sum(s) for s in dict.fromkeys(shapes)),
    ),
    (
        "A and B are counted with a bias each.",
        lambda shapes, rank: sum(rank * (i + 1) + o * (rank + 1) for o, i in shapes),
    ),
    (
        "a bias for each layer is counted.",
        lambda shapes, rank: sum(rank * i + o * (rank + 1) for o, i in shapes),
    ),
    ("the rank is missing.", lambda shapes, rank: sum(map(sum, shapes))),
    (SQUARE, lambda shapes, rank: sum(2 * rank * i for o, i in shapes)),
    (SQUARE, lambda shapes, rank: sum(2 * rank * o for o, i in shapes)),
]


def parameters_by_loop(shapes, rank):
    total = 0
    for out, inputs in shapes:
        total += rank * inputs
        total += out * rank
    return total


def parameters_of_real_matrices(shapes, rank):
    matrices = [(torch.empty(rank, i), torch.empty(o, rank)) for o, i in shapes]
    return sum(a.numel() + b.numel() for a, b in matrices)


PARAMETERS_RIGHT = [
    parameters_by_loop,
    parameters_of_real_matrices,
    lambda shapes, rank: rank * sum(map(sum, shapes)),
    lambda shapes, rank: float(rank * torch.tensor(shapes).sum()),
    lambda shapes, rank: rank * torch.tensor(shapes).sum(),
]


# --- nf4_bytes ---


def ceil_of_total(n, double_quant):
    bits = 4 + 8 / 64 + 32 / (64 * 256) if double_quant else 4 + 32 / 64
    return math.ceil(n * bits / 8)


def exact_total(n, double_quant):
    bits = 4 + 8 / 64 + 32 / (64 * 256) if double_quant else 4 + 32 / 64
    return n * bits / 8


def floors(n, double_quant):
    scales = n // 64
    return n // 2 + (scales + 4 * (scales // 256) if double_quant else 4 * scales)


def codes_floored(n, double_quant):
    scales = math.ceil(n / 64)
    return n // 2 + (scales + 4 * math.ceil(scales / 256) if double_quant else 4 * scales)


def up(a, b):
    return -(-a // b)


ROUNDING = "the total is right only where everything divides evenly."
BYTE_MISTAKES = [
    (
        "8 times too many: these are bits",
        lambda n, double: (
            4 * n + (8 * up(n, 64) + 32 * up(up(n, 64), 256) if double else 32 * up(n, 64))
        ),
    ),
    (
        "under double quantization the scales are counted twice",
        lambda n, double: (
            up(n, 2) + 4 * up(n, 64) + (up(n, 64) + 4 * up(up(n, 64), 256) if double else 0)
        ),
    ),
    ("the scales are missing.", lambda n, double: up(n, 2)),
    (
        "8 times too many: these are bits",
        lambda n, double: (
            8 * up(n, 2) + (8 * up(n, 64) + 32 * up(up(n, 64), 256) if double else 32 * up(n, 64))
        ),
    ),
    (
        "the codes take 8 times too much",
        lambda n, double: 4 * n + (up(n, 64) + 4 * up(up(n, 64), 256) if double else 4 * up(n, 64)),
    ),
    (
        "the codes are in bytes, but what the scales add is in bits",
        lambda n, double: (
            up(n, 2) + (8 * up(n, 64) + 32 * up(up(n, 64), 256) if double else 32 * up(n, 64))
        ),
    ),
    (
        "double_quant changes nothing: the scales always count as float32.",
        lambda n, double: up(n, 2) + 4 * up(n, 64),
    ),
    (
        "double_quant changes nothing: the scales always count as quantized.",
        lambda n, double: up(n, 2) + up(n, 64) + 4 * up(up(n, 64), 256),
    ),
    (
        "double_quant is taken the wrong way round",
        lambda n, double: (
            up(n, 2) + (4 * up(n, 64) if double else up(n, 64) + 4 * up(up(n, 64), 256))
        ),
    ),
    (
        "under double quantization the second level is missing.",
        lambda n, double: up(n, 2) + (1 if double else 4) * up(n, 64),
    ),
    (
        "there are too many float32 constants",
        lambda n, double: up(n, 2) + (up(n, 64) + 4 * up(n, 256) if double else 4 * up(n, 64)),
    ),
    (
        "the codes take twice too much, a byte per weight.",
        lambda n, double: n + (up(n, 64) + 4 * up(up(n, 64), 256) if double else 4 * up(n, 64)),
    ),
    (
        "a float32 counts as one byte.",
        lambda n, double: up(n, 2) + up(n, 64) + (up(up(n, 64), 256) if double else 0),
    ),
    (ROUNDING, ceil_of_total),
    (ROUNDING, exact_total),
    (ROUNDING, floors),
    (ROUNDING, codes_floored),
]


def bytes_by_loop(weights, double_quant):
    total, scales = 0, 0
    for start in range(0, weights, 64):
        scales += 1
        total += (min(64, weights - start) + 1) // 2
    if not double_quant:
        return total + 4 * scales
    return total + scales + 4 * len(range(0, scales, 256))


def bytes_of_real_tensors(weights, double_quant):
    codes = torch.empty((weights + 1) // 2, dtype=torch.uint8)
    scales = torch.empty((weights + 63) // 64, dtype=torch.uint8 if double_quant else torch.float)
    constants = torch.empty((len(scales) + 255) // 256 if double_quant else 0)
    return codes.nbytes + scales.nbytes + constants.nbytes


BYTES_RIGHT = [
    bytes_by_loop,
    bytes_of_real_tensors,
    lambda n, double: float(
        up(n, 2) + (up(n, 64) + 4 * up(up(n, 64), 256) if double else 4 * up(n, 64))
    ),
]

MISTAKES = [
    *(("mask_prompt", answer, message) for answer, message in MASK_MISTAKES.items()),
    *(("lora_forward", answer, message) for answer, message in LORA_MISTAKES.items()),
    *(("lora_parameters", answer, message) for message, answer in PARAMETER_MISTAKES),
    *(("nf4_bytes", answer, message) for message, answer in BYTE_MISTAKES),
]
RIGHT = [
    *(("mask_prompt", answer) for answer in MASK_RIGHT),
    *(("lora_forward", answer) for answer in LORA_RIGHT),
    *(("lora_parameters", answer) for answer in PARAMETERS_RIGHT),
    *(("nf4_bytes", answer) for answer in BYTES_RIGHT),
]


@pytest.mark.parametrize(("name", "answer", "message"), MISTAKES)
def test_a_known_mistake_is_named(name, answer, message, capsys):
    printed = run(name, answer, capsys)
    assert printed.startswith(f"{name}: {message}")
    if "gradient" not in message:
        assert " yours " in printed
        assert " expected " in printed


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_passes(name, answer, capsys):
    printed = run(name, answer, capsys)
    assert printed.startswith(f"{name}: correct. Tested: ")


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_no_two_mistakes_with_different_messages_look_alike(exercise):
    """Else the first of them would be named for both."""
    for wrong, message in exercise.mistakes:
        results = [wrong(*case) for case in exercise.cases]
        assert name_mistake(exercise, results) == message
        right = [exercise.reference(*case) for case in exercise.cases]
        agree = [same(got, want) for got, want in zip(results, right, strict=True)]
        assert not all(agree)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_message_has_a_test(exercise):
    messages = {message for _, message in exercise.mistakes}
    tested = {message for name, _, message in MISTAKES if name == exercise.name}
    untested = [m for m in messages if not any(m.startswith(start) for start in tested)]
    assert untested == []


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_messages_say_why_and_hold_no_code(exercise):
    for _, message in exercise.mistakes:
        assert len(message.split()) > 8
        assert not any(code in message for code in ("[:", "clone(", ".T", "@", "==", "ceil("))


# --- not attempted ---


def stub(*arguments):
    raise NotImplementedError


def dots(*arguments):
    return ...


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("answer", [stub, dots, ...])
def test_unattempted_says_so(name, answer, capsys):
    assert run(name, answer, capsys) == f"{name}: not attempted yet."


def raised_by_torch(input_ids, attention_mask, prompt_length):
    return input_ids.softmax(-1)


def raised_by_a_helper(input_ids, attention_mask, prompt_length):
    return stub()


@pytest.mark.parametrize("answer", [raised_by_torch, raised_by_a_helper])
def test_a_not_implemented_error_from_elsewhere_is_an_exception(answer, capsys):
    with pytest.raises(NotImplementedError):
        check_mask_prompt(answer)
    printed = capsys.readouterr().out
    assert printed.startswith("mask_prompt: NotImplementedError in your line ")
    assert "not attempted" not in printed


# --- structural faults ---


@pytest.mark.parametrize("name", CHECKS)
def test_none_is_named(name, capsys):
    assert f"{name}: it returned None." in run(name, lambda *arguments: None, capsys)


@pytest.mark.parametrize("name", CHECKS)
def test_a_result_of_another_kind_is_named(name, capsys):
    assert f"{name}: it returned list [1, 2]; return one " in run(name, lambda *a: [1, 2], capsys)


@pytest.mark.parametrize("name", CHECKS)
def test_a_result_in_place_of_the_function_is_named(name, capsys):
    assert f"{name}: give the check the function itself" in run(name, 3, capsys)


def test_a_tensor_of_another_shape_is_named(capsys):
    printed = run("mask_prompt", lambda ids, mask, p: ids[:, p:], capsys)
    assert "the result has shape [2, 3], expected is [2, 5]. Every token needs an entry" in printed
    printed = run("lora_forward", lambda x, w, a, b, alpha: x, capsys)
    assert "the result has shape [3], expected is [1]. The result has the shape of x" in printed


def in_place(input_ids, attention_mask, prompt_length):
    input_ids[:, :prompt_length] = -100
    return input_ids.masked_fill(attention_mask == 0, -100)


def merged_in_place(x, weight, lora_A, lora_B, alpha):
    weight += alpha / len(lora_A) * lora_B @ lora_A
    return x @ weight.T


def popping(shapes, rank):
    total = 0
    while shapes:
        total += rank * sum(shapes.pop())
    return total


@pytest.mark.parametrize(
    ("name", "answer", "argument"),
    [
        ("mask_prompt", in_place, "input_ids"),
        ("lora_forward", merged_in_place, "weight"),
        ("lora_parameters", popping, "shapes"),
    ],
)
def test_an_argument_changed_in_place_is_named(name, answer, argument, capsys):
    assert f"{name}: it changes its argument {argument} in place" in run(name, answer, capsys)


def test_the_cases_survive_an_answer_that_changes_them(capsys):
    run("mask_prompt", in_place, capsys)
    assert "correct" in run("mask_prompt", mask_by_loops, capsys)


# --- the unknown, and exceptions ---


@pytest.mark.parametrize(
    ("name", "answer", "case", "yours", "expected"),
    [
        (
            "mask_prompt",
            lambda ids, mask, p: 0 * ids + 77,
            "input_ids tensor([[5, 6, 7, 1, 0],",
            "yours tensor([[77, 77, 77, 77, 77],",
            "expected tensor([[-100, -100, 7, 1, -100],",
        ),
        (
            "lora_forward",
            lambda x, w, a, b, alpha: float("nan") * (x @ w.T),
            "x tensor([1., 2., 3.])",
            "yours tensor([nan])",
            "expected tensor([13.])",
        ),
        ("lora_parameters", lambda shapes, rank: 77, "shapes [(3, 4)]", "yours 77", "expected 14"),
        ("nf4_bytes", lambda n, double: 77, "weights 128", "yours 77", "expected 72"),
    ],
)
def test_an_unknown_mistake_shows_the_case(name, answer, case, yours, expected, capsys):
    printed = run(name, answer, capsys)
    assert "not in a way that this check has a name for" in printed
    assert all(text in printed for text in (case, yours, expected))


def typo(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, prompt_length + 100] = -100  # too far
    return labels


def test_an_exception_names_call_and_line_and_is_raised_again(capsys):
    with pytest.raises(IndexError, match="out of bounds") as caught:
        check_mask_prompt(typo)
    printed = capsys.readouterr().out
    number = typo.__code__.co_firstlineno + 2
    line = f"in your line {number}: labels[:, prompt_length + 100] = -100  # too far\n"
    assert printed.startswith(f"mask_prompt: IndexError {line}on this call:\n")
    assert "prompt_length   2" in printed
    assert caught.traceback[-1].frame.code.raw is typo.__code__


def test_an_exception_inside_a_library_names_the_learners_line(capsys):
    def answer(x, weight, lora_A, lora_B, alpha):
        return F.cosine_similarity(x, "weight")

    with pytest.raises(TypeError):
        check_lora_forward(answer)
    assert ': return F.cosine_similarity(x, "weight")\n' in capsys.readouterr().out


def test_a_wrong_number_of_arguments_has_no_line(capsys):
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        check_nf4_bytes(lambda weights: weights)
    assert capsys.readouterr().out.startswith("nf4_bytes: TypeError\non this call:\n  weights  ")


def test_an_exception_in_a_notebook_cell_shows_the_cells_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    cell = "def answer(shapes, rank):\n    return rank / 0\n\ncheck_lora_parameters(answer)"
    shell.user_ns["check_lora_parameters"] = check_lora_parameters
    assert isinstance(shell.run_cell(cell).error_in_exec, ZeroDivisionError)
    assert "ZeroDivisionError in your line 2: return rank / 0\n" in capsys.readouterr().out


def test_an_exception_that_only_gradients_bring_out_is_reported(capsys):
    def answer(x, weight, lora_A, lora_B, alpha):
        product = torch.from_numpy(lora_B.numpy() @ lora_A.numpy())
        return x @ weight.T + alpha / len(lora_A) * x @ product.T

    with pytest.raises(RuntimeError, match="requires grad"):
        check_lora_forward(answer)
    assert ": product = torch.from_numpy(" in capsys.readouterr().out


def test_gradients_are_checked_where_they_are_switched_off(capsys):
    with torch.no_grad():
        assert "correct" in run("lora_forward", lora_by_linear, capsys)
        assert "gradient" in run("lora_forward", without_grad, capsys)
