"""The exercise checks: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_checks import GradientRules, run

from rlhf_helpers import kl, reward
from rlhf_helpers.checks import (
    check_estimate_kl,
    check_lora_forward,
    check_lora_parameters,
    check_nf4_bytes,
    check_pair_accuracy,
    lesson_01,
    lesson_02,
)
from rlhf_helpers.checks.exercise import UNKNOWN, same

RIGHT_AT_0 = "it is right where lora_A is 0 throughout"
GRADIENT = "the values are right, but not the gradient: that with respect to "
FEW_BITS = "it is right in short rows only"

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


def inverted_integers(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    labels[~attention_mask] = -100
    return labels


def mask_as_index(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    labels[attention_mask] = -100
    return labels


def product_is_zero(input_ids, attention_mask, prompt_length):
    labels = input_ids * attention_mask
    labels[:, :prompt_length] = -100
    return labels.masked_fill(labels == 0, -100)


def until_eos(input_ids, attention_mask, prompt_length):
    labels = torch.full_like(input_ids, -100)
    for b, row in enumerate(input_ids.tolist()):
        end = row.index(1, prompt_length) + 1 if 1 in row[prompt_length:] else len(row)
        labels[b, prompt_length:end] = input_ids[b, prompt_length:end]
    return labels


def minus_one(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -1
    labels[attention_mask == 0] = -1
    return labels


def left_padding_subtracted(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    for b, mask in enumerate(attention_mask):
        labels[b, : prompt_length - mask.argmax()] = -100
    labels[attention_mask == 0] = -100
    return labels


def mask_as_floats(input_ids, attention_mask, prompt_length):
    response = attention_mask.float()
    response[:, :prompt_length] = 0
    return input_ids * response - 100 * (1 - response)


def mask_as_int32(input_ids, attention_mask, prompt_length):
    return mask_by_where(input_ids, attention_mask, prompt_length).int()


def mask_by_a_float(input_ids, attention_mask, prompt_length):
    columns = torch.arange(input_ids.size(1))
    kept = (columns >= prompt_length) & attention_mask.bool()
    return torch.where(kept, input_ids, torch.tensor(-100.0))


FLOAT_LABELS = "the values are right, but their type is torch.float32."


def until_the_number_of_real_tokens(input_ids, attention_mask, prompt_length):
    labels = torch.full_like(input_ids, -100)
    for b, n in enumerate(attention_mask.sum(1).tolist()):
        labels[b, prompt_length:n] = input_ids[b, prompt_length:n]
    return labels


def padding_is_0(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    labels[attention_mask == 0] = 0
    return labels


MASK_MISTAKES = {
    lambda ids, mask, p: ids.masked_fill(
        (mask == 0) | (torch.arange(ids.shape[1]) < ids.shape[1] - p), -100
    ): "prompt_length is taken for the length of the response",
    until_the_number_of_real_tokens: "the end of a row is taken to be the number",
    padding_is_0: "ignored positions hold 0",
    lambda input_ids, mask, prompt_length: torch.full(
        input_ids.shape, -100
    ): "everything is ignored.",
    late: "the first response token is ignored.",
    early: "the last prompt token has a label.",
    no_eos: "the last token of a response, its EOS, is ignored.",
    no_last_token: "the last token of a response, its EOS, is ignored.",
    no_last_column: "the last token of a response, its EOS, is ignored.",
    padding_counts: "all is right up to one thing: attention_mask is used as if it were 1",
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
    inverted_integers: "whole rows are ignored.",
    mask_as_index: "whole rows are ignored.",
    product_is_zero: "a real token 0 is ignored.",
    until_eos: "the end of a response is looked for by its EOS, token 1.",
    minus_one: "ignored positions hold -1.",
    left_padding_subtracted: "the padding on the left is subtracted from prompt_length.",
    mask_as_floats: FLOAT_LABELS,
    mask_by_a_float: FLOAT_LABELS,
    mask_as_int32: "the values are right, but their type is torch.int32.",
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


def mask_by_arithmetic(input_ids, attention_mask, prompt_length):
    prompt = torch.full_like(input_ids[:, :prompt_length], -100)
    mask = attention_mask[:, prompt_length:]
    response = input_ids[:, prompt_length:] * mask - 100 * (1 - mask)
    return torch.cat([prompt, response], dim=1)


MASK_RIGHT = [
    lambda ids, mask, p: (ids * mask - 100 * (1 - mask)).index_fill(1, torch.arange(p), -100),
    lambda ids, mask, p: torch.cat(
        [torch.full_like(ids[:, :p], -100), torch.where(mask[:, p:] > 0, ids[:, p:], -100)], 1
    ),
    mask_by_loops,
    mask_in_place_on_a_clone,
    mask_by_where,
    mask_by_arithmetic,
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


def skipped_at_zero(x, weight, lora_A, lora_B, alpha):
    y = x @ weight.T
    return y if not lora_B.any() else y + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T


def x_detached(x, weight, lora_A, lora_B, alpha):
    return F.linear(x, weight) + alpha / len(lora_A) * x.detach() @ lora_A.T @ lora_B.T


def x_detached_before(x, weight, lora_A, lora_B, alpha):
    return lora(x.detach(), weight, lora_A, lora_B, alpha / len(lora_A))


def frozen_without_grad(x, weight, lora_A, lora_B, alpha):
    with torch.no_grad():
        y = x @ weight.T
    return y + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T


def rank_is_smaller_size(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha / min(lora_A.shape))


def rank_of_a(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha / torch.linalg.matrix_rank(lora_A).item())


def scale_rounded(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, round(alpha / len(lora_A), 2))


def scale_rounded_to_a_whole_number(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, round(alpha / len(lora_A)))


def update_in(dtype, x, weight, lora_A, lora_B, alpha):
    update = x.to(dtype) @ lora_A.to(dtype).T @ lora_B.to(dtype).T
    return x @ weight.T + alpha / len(lora_A) * update.to(x.dtype)


def scaled_by(of, x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, of(len(lora_A), alpha))


def weight_not_frozen(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight.requires_grad_(True), lora_A, lora_B, alpha / len(lora_A))


def detached(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A.detach(), lora_B.detach(), alpha / len(lora_A))


@torch.no_grad()
def without_grad(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B, alpha / len(lora_A))


def b_detached(x, weight, lora_A, lora_B, alpha):
    return lora(x, weight, lora_A, lora_B.data, alpha / len(lora_A))


LORA_MISTAKES = {
    partial(scaled_by, lambda r, alpha: 3): "the update is scaled by",
    partial(scaled_by, lambda r, alpha: alpha / 2): "the update is scaled by",
    partial(scaled_by, lambda r, alpha: 6 / r): "all is right up to one thing: alpha is used as 6",
    lambda x, weight, lora_A, lora_B, alpha: lora(
        x, weight, lora_A, lora_B, alpha // len(lora_A)
    ): ("the update is scaled by α//r"),
    no_scale: "the update is scaled by 1",
    alpha_alone: "the update is scaled by α, not by α/r.",
    upside_down: "the update is scaled by r/α",
    by_root_of_rank: "the update is scaled by α/√r",
    no_alpha: "all is right up to one thing: alpha is used as 1, whatever",
    times_rank: "the update is scaled by α·r",
    rank_is_in: "the update is scaled by α",
    rank_is_out: "the update is scaled by α",
    update_only: "all is right up to one thing: weight is used as 0",
    layer_only: "all is right up to one thing: lora_A is used as 0",
    sum_scaled: "the frozen layer is scaled, too or alone",
    a_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    b_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    weight_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    all_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    product_reshaped: "a matrix has the shape of its transpose, but not its entries.",
    detached: GRADIENT + "lora_A and lora_B",
    without_grad: GRADIENT + "lora_A and lora_B",
    b_detached: GRADIENT + "lora_B differs",
    skipped_at_zero: "the values are right, but with B = 0 nothing reaches B",
    x_detached: GRADIENT + "x differs",
    x_detached_before: GRADIENT + "x differs",
    frozen_without_grad: GRADIENT + "x differs",
    rank_is_smaller_size: "the update is scaled by α",
    rank_of_a: "the update is scaled by α over the rank that A has as a matrix",
    scale_rounded: "the update is scaled by α/r rounded to a few digits",
    scale_rounded_to_a_whole_number: "the update is scaled by α/r rounded to a few digits",
    partial(update_in, torch.float16): RIGHT_AT_0,
    partial(update_in, torch.bfloat16): RIGHT_AT_0,
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
    lambda x, w, a, b, alpha: F.linear(x, w.addmm(b, a, alpha=alpha / len(a))),
    lambda x, w, a, b, alpha: F.linear(F.linear(x * (alpha / b.size(1)), a), b) + F.linear(x, w),
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


SQUARE = "2r ·"
PARAMETER_MISTAKES = [
    ("the last layer is left out", lambda s, r: sum(r * (o + i) for o, i in s[:-1])),
    ("the first layer is left out", lambda s, r: sum(r * (o + i) for o, i in s[1:])),
    ("the smallest of r, in", lambda s, r: sum(min(r, o, i) * (o + i) for o, i in s)),
    ("the product of both", lambda s, r: sum(r * i * o * r for o, i in s)),
    ("it counts otherwise", lambda s, r: sum(r * (o + i) + 3 * r for o, i in s)),
    (
        "r²(in + out) stands for the entries of a layer's A and B",
        lambda shapes, rank: rank**2 * sum(o + i for o, i in shapes),
    ),
    ("r · in + out", lambda shapes, rank: sum(rank * i + o for o, i in shapes)),
    ("r · out + in", lambda shapes, rank: sum(i + rank * o for o, i in shapes)),
    (
        "r · in stands for the entries of a layer's A and B",
        lambda shapes, rank: sum(rank * s[1] for s in shapes),
    ),
    (
        "r · out stands for the entries of a layer's A and B",
        lambda shapes, rank: sum(s[0] * rank for s in shapes),
    ),
    (
        "r · in · out stands for the entries of a layer's A and B",
        lambda shapes, rank: rank * sum(map(math.prod, shapes)),
    ),
    (
        "in · out stands for the entries of a layer's A and B",
        lambda shapes, rank: sum(map(math.prod, shapes)),
    ),
    (
        "it counts otherwise than the exercise: entries for each entry of W: 1",
        lambda shapes, rank: sum(math.prod(s) + rank * sum(s) for s in shapes),
    ),
    ("only the first layer is counted.", first_only),
    ("only the last layer is counted.", last_only),
    (
        "layers of equal shape are counted once.",
        lambda shapes, rank: sum(rank * sum(s) for s in dict.fromkeys(shapes)),
    ),
    (
        "it counts otherwise than the exercise: entries for each output: 1",
        lambda shapes, rank: sum(rank * (i + 1) + o * (rank + 1) for o, i in shapes),
    ),
    (
        "it counts otherwise than the exercise: entries for each output: 1",
        lambda shapes, rank: sum(rank * i + o * (rank + 1) for o, i in shapes),
    ),
    (
        "in + out stands for the entries of a layer's A and B",
        lambda shapes, rank: sum(map(sum, shapes)),
    ),
    (SQUARE, lambda shapes, rank: sum(2 * rank * i for o, i in shapes)),
    (SQUARE, lambda shapes, rank: sum(2 * rank * o for o, i in shapes)),
    (
        "the values are right, but it returned float 14.0",
        lambda shapes, rank: float(rank * torch.tensor(shapes).sum()),
    ),
    (
        "the values are right, but it returned Tensor tensor(14)",
        lambda shapes, rank: rank * torch.tensor(shapes).sum(),
    ),
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
    lambda shapes, rank: int(torch.tensor(shapes).sum() * rank),
    parameters_by_loop,
    parameters_of_real_matrices,
    lambda shapes, rank: rank * sum(map(sum, shapes)),
    lambda shapes, rank: int(rank * torch.tensor(shapes).sum()),
    lambda shapes, rank: rank * np.sum(shapes),  # NumPy's int64
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


def bytes_of(codes, scales, constants, double):
    return codes + (scales + 4 * constants if double else 4 * scales)


BYTE_MISTAKES = [
    (
        "one is always added",
        lambda n, double: bytes_of(-(-n // 2), n // 64 + 1, -(-(n // 64 + 1) // 256), double),
    ),
    (
        "a number of scales, constants",
        lambda n, double: bytes_of(
            -(-n // 2), max(1, round(n / 64)), max(1, round(max(1, round(n / 64)) / 256)), double
        ),
    ),
    (
        "the codes of whole blocks",
        lambda n, double: lesson_01.nf4_bytes(n, double) + 32 * -(-n // 64) - -(-n // 2),
    ),
    (
        "the blocks have other sizes than here, or theirs have changed places",
        lambda n, double: (
            up(n, 2) + (up(n, 256) + 4 * up(up(n, 256), 64) if double else 4 * up(n, 256))
        ),
    ),
    (
        "8 times too many: these are bits, not bytes",
        lambda n, double: (
            4 * n + (8 * up(n, 64) + 32 * up(up(n, 64), 256) if double else 32 * up(n, 64))
        ),
    ),
    (
        "it counts otherwise than the exercise",
        lambda n, double: (
            up(n, 2) + 4 * up(n, 64) + (up(n, 64) + 4 * up(up(n, 64), 256) if double else 0)
        ),
    ),
    ("it counts otherwise than the exercise", lambda n, double: up(n, 2)),
    (
        "it counts otherwise than the exercise: bits of a code: 32, not 4",
        lambda n, double: (
            8 * up(n, 2) + (8 * up(n, 64) + 32 * up(up(n, 64), 256) if double else 32 * up(n, 64))
        ),
    ),
    (
        "the codes take too much",
        lambda n, double: 4 * n + (up(n, 64) + 4 * up(up(n, 64), 256) if double else 4 * up(n, 64)),
    ),
    (
        "it counts otherwise than the exercise",
        lambda n, double: (
            up(n, 2) + (8 * up(n, 64) + 32 * up(up(n, 64), 256) if double else 32 * up(n, 64))
        ),
    ),
    (
        "it counts otherwise than the exercise",
        lambda n, double: up(n, 2) + 4 * up(n, 64),
    ),
    (
        "it counts otherwise than the exercise",
        lambda n, double: up(n, 2) + up(n, 64) + 4 * up(up(n, 64), 256),
    ),
    (
        "it counts otherwise than the exercise",
        lambda n, double: (
            up(n, 2) + (4 * up(n, 64) if double else up(n, 64) + 4 * up(up(n, 64), 256))
        ),
    ),
    (
        "it counts otherwise than the exercise",
        lambda n, double: up(n, 2) + (1 if double else 4) * up(n, 64),
    ),
    (
        "the float32 constants are not counted from the scales",
        lambda n, double: up(n, 2) + (up(n, 64) + 4 * up(n, 256) if double else 4 * up(n, 64)),
    ),
    (
        "the codes take too much",
        lambda n, double: n + (up(n, 64) + 4 * up(up(n, 64), 256) if double else 4 * up(n, 64)),
    ),
    (
        "it counts otherwise than the exercise",
        lambda n, double: up(n, 2) + up(n, 64) + (up(up(n, 64), 256) if double else 0),
    ),
    (ROUNDING, ceil_of_total),
    (ROUNDING, exact_total),
    (ROUNDING, floors),
    (ROUNDING, codes_floored),
    (
        "it counts otherwise than the exercise",
        lambda n, double: up(n, 2) + (up(n, 64) + up(up(n, 64), 256) if double else 4 * up(n, 64)),
    ),
    (
        "it counts otherwise than the exercise",
        lambda n, double: up(n, 2) + 4 * up(n, 64) + (4 * up(up(n, 64), 256) if double else 0),
    ),
    (
        "it is right where double_quant is False",
        lambda n, double: bytes_by_loop(n, double) - (4 if double and n <= 64 else 0),
    ),
    (UNKNOWN, lambda n, double: bytes_by_loop(n, double) - (n % 2 if n < 64 else 0)),
    (
        "the values are right, but without a second argument 128 weights take 72 bytes",
        lambda n, double=False: bytes_by_loop(n, double),
    ),
    (
        "the values are right, but it returned float 72.0",
        lambda n, double=True: float(bytes_by_loop(n, double)),
    ),
]


def bytes_by_loop(weights, double_quant=True):
    total, scales = 0, 0
    for start in range(0, weights, 64):
        scales += 1
        total += (min(64, weights - start) + 1) // 2
    if not double_quant:
        return total + 4 * scales
    return total + scales + 4 * len(range(0, scales, 256))


def bytes_of_real_tensors(weights, double_quant=True):
    codes = torch.empty((weights + 1) // 2, dtype=torch.uint8)
    scales = torch.empty((weights + 63) // 64, dtype=torch.uint8 if double_quant else torch.float)
    constants = torch.empty((len(scales) + 255) // 256 if double_quant else 0)
    return codes.nbytes + scales.nbytes + constants.nbytes


BYTES_RIGHT = [
    lambda n, double_quant=True: (
        up(n, 2) + (up(n, 64) + 4 * up(n, 64 * 256) if double_quant else up(n, 64) << 2)
    ),
    bytes_by_loop,
    bytes_of_real_tensors,
    lambda n, double=True: (
        up(n, 2) + (up(n, 64) + 4 * up(up(n, 64), 256) if double else 4 * up(n, 64))
    ),
    lambda n, double=True: bytes_by_loop(np.int64(n), double),
]

# --- pairwise_loss, wrong ---


def with_epsilon(chosen, rejected):
    return -torch.log(torch.sigmoid(chosen - rejected) + 1e-8).mean()


def with_clamped_probability(chosen, rejected):
    return -torch.log(torch.sigmoid(chosen - rejected).clamp(min=1e-6)).mean()


def with_clamped_gap(chosen, rejected):
    return -F.logsigmoid((chosen - rejected).clamp(-50, 50)).mean()


def with_smallest_probability(chosen, rejected):
    return -torch.log(torch.sigmoid(chosen - rejected).clamp(min=1e-38)).mean()


def with_clamped_exponent(chosen, rejected):
    return torch.log1p(torch.exp((rejected - chosen).clamp(max=80))).mean()


def in_three_pieces(chosen, rejected):
    gap = chosen - rejected
    middle = torch.log1p(torch.exp(-gap.clamp(-5, 5)))
    return torch.where(gap > 5, 0, torch.where(gap < -5, -gap, middle)).mean()


def hinge_in_disguise(chosen, rejected):
    gap = chosen - rejected
    return torch.where(gap > 2, 0, F.softplus(-gap)).mean()


def without_nan(chosen, rejected):
    losses = F.softplus(rejected - chosen)
    return losses[~losses.isnan()].mean()


def by_binary_cross_entropy(chosen, rejected):
    probability = torch.sigmoid(chosen - rejected)
    return F.binary_cross_entropy(probability, torch.ones_like(probability))


def by_exponentials(chosen, rejected):
    won, lost = torch.exp(chosen), torch.exp(rejected)
    return -torch.log(won / (won + lost)).mean()


def by_log_of_exponentials(chosen, rejected):
    return (torch.log(torch.exp(chosen) + torch.exp(rejected)) - chosen).mean()


def labels_for_each(chosen, rejected):
    good = F.binary_cross_entropy_with_logits(chosen, torch.ones_like(chosen))
    return good + F.binary_cross_entropy_with_logits(rejected, torch.zeros_like(rejected))


def logs_subtracted(chosen, rejected):
    return (F.logsigmoid(rejected) - F.logsigmoid(chosen)).mean()


def two_branches(chosen, rejected):
    gap = chosen - rejected
    positive, negative = torch.log1p(torch.exp(-gap)), -gap + torch.log1p(torch.exp(gap))
    return torch.where(gap > 0, positive, negative).mean()


def masked_afterwards(chosen, rejected):
    gap = chosen - rejected
    loss = -torch.sigmoid(gap).log()
    return torch.where(loss.isinf(), -gap, loss).mean()


@torch.no_grad()
def loss_without_grad(chosen, rejected):
    return F.softplus(rejected - chosen).mean()


OVERFLOW = "it is not finite at a gap of -200."
CAPPED = "it is right for moderate gaps, but capped"
EXPONENTIATED = "each reward is exponentiated by itself"
APART = "the loss is one with a σ for each reward by itself, not for their difference"
NO_LOG = "the loss of a pair is taken as a σ without its logarithm"
SQUARED = "the loss of a pair is taken as a square"
EARLY = "it is right at small and at huge gaps, but it goes over"
NAN_HIDDEN = "the values are right, but a reward that is NaN is passed over"
SWAPPED_LOSS = "the loss is that of swapped rewards"
AT_A_TIE = "the values are right, but not the slope at a tie"
LOSS_MISTAKES = [
    (AT_A_TIE, lambda c, r: (F.relu(r - c) + torch.log1p(torch.exp(-(c - r).abs()))).mean()),
    (AT_A_TIE, lambda c, r: ((r - c).clamp(min=0) + (-(c - r).abs()).exp().log1p()).mean()),
    (OVERFLOW, lambda c, r: -torch.log(torch.sigmoid(c - r)).mean()),
    (OVERFLOW, lambda c, r: torch.log(1 + torch.exp(r - c)).mean()),
    (OVERFLOW, lambda c, r: (1 + (r - c).exp()).reciprocal().log().neg().mean()),
    (CAPPED, with_epsilon),
    (CAPPED, with_clamped_probability),
    (CAPPED, with_clamped_gap),
    (CAPPED, by_binary_cross_entropy),
    (CAPPED, with_smallest_probability),
    (CAPPED, with_clamped_exponent),
    (CAPPED, lambda c, r: -torch.log(torch.sigmoid(c - r) + 1e-4).mean()),
    (CAPPED, lambda c, r: -F.logsigmoid((c - r).clamp(min=-8)).mean()),
    (EARLY, lambda c, r: F.softplus(r - c, threshold=2).mean()),
    (EARLY, lambda c, r: F.softplus(r - c, threshold=5).mean()),
    (EARLY, hinge_in_disguise),
    (EARLY, in_three_pieces),
    (NAN_HIDDEN, lambda c, r: F.softplus(r - c).nanmean()),
    (NAN_HIDDEN, lambda c, r: F.softplus((r - c).nan_to_num()).mean()),
    (NAN_HIDDEN, without_nan),
    (UNKNOWN, lambda c, r: F.softplus(r - c)[:8].mean()),
    (
        "all is right up to one thing: the result comes out times 0.5 everywhere",
        lambda c, r: F.softplus(r - c).mean() / 2,
    ),
    (
        "the loss is a sum divided by 2, as in the example, whatever the number of pairs",
        lambda c, r: F.softplus(r - c).sum() / 2,
    ),
    (
        "the loss is a sum divided by 2, as in the example, whatever the number of pairs",
        lambda c, r: -torch.log(torch.sigmoid(c - r)).sum() / 2,
    ),
    (EXPONENTIATED, by_exponentials),
    (EXPONENTIATED, by_log_of_exponentials),
    (SWAPPED_LOSS, lambda c, r: F.softplus(c - r).mean()),
    (SWAPPED_LOSS, lambda c, r: -torch.log(torch.sigmoid(r - c)).mean()),
    (
        "the loss is a sum over the pairs, which grows with the batch",
        lambda c, r: F.softplus(r - c).sum(),
    ),
    (
        "the loss is a sum over the pairs, which grows with the batch",
        lambda c, r: -torch.log(torch.sigmoid(c - r)).sum(),
    ),
    ("the loss is a mean whose minus sign is missing", lambda c, r: -F.softplus(r - c).mean()),
    (
        "the loss is a mean whose minus sign is missing",
        lambda c, r: torch.log(torch.sigmoid(c - r)).mean(),
    ),
    (
        "the loss is one with two signs wrong, that of the gap and that of the loss",
        lambda c, r: F.logsigmoid(r - c).mean(),
    ),
    (
        "the loss is one with two signs wrong, that of the gap and that of the loss",
        lambda c, r: torch.log(torch.sigmoid(r - c)).mean(),
    ),
    (
        "the loss is that of the gaps averaged, with the logarithm taken last",
        lambda c, r: F.softplus(r.mean() - c.mean()),
    ),
    (APART, labels_for_each),
    (APART, logs_subtracted),
    (APART, lambda c, r: F.softplus(-c).mean()),
    (
        "all is right up to one thing: the result comes out times 1.443",
        lambda c, r: F.softplus(r - c).mean() / torch.tensor(2.0).log(),
    ),
    (
        "all is right up to one thing: the result comes out times 1.443",
        lambda c, r: torch.logaddexp2(torch.zeros(1), (r - c) / math.log(2)).mean(),
    ),
    ("the loss is a mean over every chosen", lambda c, r: F.softplus(r[:, None] - c[None]).mean()),
    (NO_LOG, lambda c, r: -torch.sigmoid(c - r).mean()),
    (NO_LOG, lambda c, r: (1 - torch.sigmoid(c - r)).mean()),
    (
        "the loss of a pair is taken as the gap without σ and logarithm",
        lambda c, r: -(c - r).mean(),
    ),
    (
        "the loss of a pair is taken as a hinge, which asks for a margin of 1",
        lambda c, r: torch.clamp(1 - c + r, min=0).mean(),
    ),
    (
        "the loss of a pair is taken as a hinge, which asks for a margin of 1",
        lambda c, r: F.margin_ranking_loss(c, r, torch.ones_like(c), margin=1),
    ),
    (SQUARED, lambda c, r: F.mse_loss(c, r)),
    (SQUARED, lambda c, r: F.mse_loss(c - r, torch.ones_like(c))),
    (SQUARED, lambda c, r: ((1 - torch.sigmoid(c - r)) ** 2).mean()),
    ("the values are right, but the gradient is NaN", two_branches),
    ("the values are right, but the gradient is NaN", masked_afterwards),
    (
        GRADIENT + "chosen and rejected differs",
        loss_without_grad,
    ),
    (
        GRADIENT + "rejected differs",
        lambda c, r: F.softplus(r.detach() - c).mean(),
    ),
]


# --- pairwise_loss, right ---


def loss_by_loop(chosen, rejected):
    total = 0
    for good, bad in zip(chosen, rejected, strict=True):
        total = total - F.logsigmoid(good - bad)
    return total / len(chosen)


def loss_by_logs_of_shifted_sums(chosen, rejected):
    top = torch.maximum(chosen, rejected)
    return (top + torch.log(torch.exp(chosen - top) + torch.exp(rejected - top)) - chosen).mean()


def loss_by_cross_entropy(chosen, rejected):
    logits = torch.stack([chosen, rejected], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(chosen), dtype=torch.long))


def loss_by_sign(chosen, rejected):
    gap = chosen - rejected
    right, wrong = gap[gap >= 0], gap[gap < 0]
    losses = torch.log1p(torch.exp(-right)), torch.log1p(torch.exp(wrong)) - wrong
    return torch.cat(losses).mean()


def loss_by_sign_in_place(chosen, rejected):
    gap = chosen - rejected
    losses = torch.zeros_like(gap)
    losses[gap >= 0] = torch.log1p(torch.exp(-gap[gap >= 0]))
    losses[gap < 0] = torch.log1p(torch.exp(gap[gap < 0])) - gap[gap < 0]
    return losses.sum() / len(gap)


def loss_by_cases(chosen, rejected):
    total = 0
    for gap in chosen - rejected:
        if gap >= 0:
            total = total + torch.log1p(torch.exp(-gap))
        elif gap < 0:
            total = total - gap + torch.log1p(torch.exp(gap))
    return total / len(chosen)


def loss_that_refuses_nan(chosen, rejected):
    if torch.isnan(chosen - rejected).any():
        raise RuntimeError("NaN")
    return F.softplus(rejected - chosen).mean()


LOSS_RIGHT = [
    loss_by_logs_of_shifted_sums,
    lambda c, r: torch.special.log_ndtr(c - r).mean() * 0 + F.softplus(r - c).mean(),
    lambda c, r: torch.einsum("n->", F.softplus(r - c)) / r.numel(),
    lambda c, r: -torch.stack([c - r, torch.zeros_like(c)], 1).log_softmax(1).select(1, 0).mean(),
    loss_by_loop,
    loss_by_sign,
    loss_by_sign_in_place,
    loss_by_cases,
    loss_that_refuses_nan,
    loss_by_cross_entropy,
    lambda c, r: F.softplus(r - c).mean(),
    lambda c, r: torch.logaddexp(torch.zeros_like(c), r - c).mean(),
    lambda c, r: (torch.logaddexp(c, r) - c).mean(),
    lambda c, r: -torch.stack([c, r]).log_softmax(0)[0].mean(),
    lambda c, r: F.binary_cross_entropy_with_logits(c - r, torch.ones_like(c)),
    lambda c, r: -F.logsigmoid(c.double() - r.double()).mean(),
    lambda c, r: -torch.log(torch.sigmoid(c.double() - r.double())).mean(),
]


# --- last_token_index ---


def first_padding(mask):
    columns = []
    for row in mask.tolist():
        columns.append(row.index(0) - 1 if 0 in row else -1)
    return torch.tensor(columns)


def through_the_batch(mask):
    real = mask.flatten().nonzero().flatten()
    length = mask.shape[1]
    return torch.stack([real[real // length == b].max() for b in range(len(mask))])


def last_by_loops(mask):
    columns = []
    for row in mask:
        for t in range(len(row)):
            if row[t]:
                last = t
        columns.append(last)
    return torch.tensor(columns)


def last_but_one(mask):
    return last_by_loops(mask) - 1


def last_in(dtype, mask):
    return (mask.to(dtype) * torch.arange(mask.shape[1]).to(dtype)).argmax(-1)


INT32_COLUMN = "the values are right, but the result is torch.int32"
FLOAT_COLUMN = "the values are right, but the result is torch.float"
BEFORE_PADDING = "it is the column before the first padding"
TOKEN_MISTAKES = [
    (INT32_COLUMN, lambda mask: last_by_loops(mask).int()),
    ("it is the number of real tokens less one", lambda mask: mask.cumsum(1)[:, -1] - 1),
    ("it is the number of real tokens", lambda mask: torch.count_nonzero(mask, dim=1)),
    ("it is always the last column.", lambda mask: torch.tensor([mask.size(1) - 1] * len(mask))),
    ("it is the first real token.", lambda mask: torch.argmax(mask, dim=1)),
    (BEFORE_PADDING, first_padding),
    (BEFORE_PADDING, lambda mask: mask.argmin(-1) - 1),
    (
        "it is the column before the first padding, -1 made the last one",
        lambda mask: (torch.eq(mask, 0).int().argmax(-1) - 1) % mask.shape[-1],
    ),
    (
        "it is the amount of padding behind the last real token",
        lambda mask: torch.fliplr(mask).argmax(1),
    ),
    (
        "it is counted from the end, as a negative number",
        lambda mask: -1 - mask.flip(-1).argmax(-1),
    ),
    (
        "all is right up to one thing: the result comes out with 1 added",
        lambda mask: mask.argmax(-1) + mask.sum(-1),
    ),
    ("all is right up to one thing: the result comes out with -1 added", last_but_one),
    ("it is counted through the whole batch", through_the_batch),
    (FLOAT_COLUMN, lambda mask: torch.stack([row.nonzero().max() for row in mask]).double()),
    (FLOAT_COLUMN, lambda mask: (mask * torch.arange(float(mask.shape[1]))).max(1).values),
    (FEW_BITS, partial(last_in, torch.bfloat16)),
    (FEW_BITS, partial(last_in, torch.float16)),
    (UNKNOWN, partial(last_in, torch.int8)),
]
TOKEN_RIGHT = [
    lambda mask: torch.tensor([max(t for t, m in enumerate(row) if m) for row in mask.tolist()]),
    lambda mask: (mask * 2 + torch.arange(mask.shape[1]) / 1e4).argmax(dim=1),
    lambda mask: mask.shape[1] - torch.from_numpy(mask.numpy()[:, ::-1].copy()).argmax(1) - 1,
    last_by_loops,
    lambda mask: mask.shape[1] - 1 - mask.flip(1).argmax(1),
    lambda mask: mask.cumsum(1).argmax(1),
    lambda mask: mask.argmax(-1) + mask.sum(-1) - 1,
    lambda mask: (mask * torch.arange(mask.shape[1])).max(dim=1).values,
    lambda mask: torch.stack([row.nonzero().max() for row in mask]),
    lambda mask: (mask.flip(1).cumsum(1) == 0).sum(1).neg() + mask.shape[1] - 1,
]


# --- pair_accuracy ---


def ranked(chosen, rejected):
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean()


def decided_only(chosen, rejected):
    right = wrong = 0
    for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True):
        right += c > r
        wrong += c < r
    return right / max(right + wrong, 1)


SATURATED = "it is a share of rewards that a function made equal far from 0"
CROSSED = "it is a share of all chosen with all rejected ones"
NEARLY = "it is a share with rewards that are nearly equal taken for ties"
AGAINST_ZERO = "it is a comparison with 0, which means nothing for a reward"
NO_SHARE = "it is a number of pairs"
PERCENTAGE = "it counts otherwise than the exercise: a win: 100, not 1"
SWAPPED_PAIRS = "it counts otherwise than the exercise: a win: 0, not 1"
DROPPED_TIES = "it is the share among the pairs without a tie"
ACCURACY_MISTAKES = [
    (
        "it is points of all pairs",
        lambda c, r: (((c > r).sum() + 0.5 * (c == r).sum()) / (c != r).sum().clamp(min=1)).item(),
    ),
    (
        "it is a share in which ties count only if",
        lambda c, r: (c > r).float().mean().item() + 0.5 * torch.equal(c, r),
    ),
    (
        "all is right up to one thing: chosen and rejected are used without their fraction",
        lambda c, r: ((c.int() > r.int()) + 0.5 * (c.int() == r.int())).mean().item(),
    ),
    ("ties count as wrong.", lambda c, r: (c > r).float().mean()),
    ("ties count as right.", lambda c, r: (c - r >= 0).float().mean().item()),
    (
        "it counts otherwise than the exercise",
        lambda c, r: ((c >= r).float() + 0.5 * (c == r).float()).mean(),
    ),
    (SWAPPED_PAIRS, lambda c, r: ((c < r).float() + 0.5 * (c == r).float()).mean()),
    (SWAPPED_PAIRS, lambda c, r: (c < r).float().mean()),
    (SWAPPED_PAIRS, lambda c, r: (c <= r).float().mean()),
    (NO_SHARE, lambda c, r: (c > r).sum()),
    (NO_SHARE, lambda c, r: (c >= r).sum().item()),
    (NO_SHARE, lambda c, r: (c > r).sum() + 0.5 * (c == r).sum()),
    (PERCENTAGE, lambda c, r: 100 * ((c > r).float() + 0.5 * (c == r).float()).mean()),
    (PERCENTAGE, lambda c, r: (c > r).float().mean() * 100),
    (PERCENTAGE, lambda c, r: (c >= r).float().mean() * 100),
    (DROPPED_TIES, decided_only),
    (DROPPED_TIES, lambda c, r: (c > r).sum() / (c != r).sum()),
    (DROPPED_TIES, lambda c, r: (c > r)[c != r].float().mean().item()),
    (DROPPED_TIES, lambda c, r: (c > r)[c != r].float().mean().nan_to_num(0.5)),
    (
        "it is the mean gap. Asked for is the share of all pairs, tie",
        lambda c, r: c.mean() - r.mean(),
    ),
    ("it counts otherwise than the exercise", lambda c, r: torch.sign(c - r).mean().item()),
    ("it is the mean probability", lambda c, r: (1 / (1 + torch.exp(r - c))).mean()),
    ("it is a comparison of the two means", lambda c, r: 1.0 if c.sum() > r.sum() else 0.0),
    (NEARLY, lambda c, r: ((c > r) + 0.5 * (torch.abs(c - r) < 1e-5)).mean()),
    (NEARLY, lambda c, r: torch.where(c.isclose(r), 0.5, (c > r).float()).mean()),
    (NEARLY, lambda c, r: ranked((c - r).round(decimals=6), torch.zeros_like(c))),
    (SATURATED, lambda c, r: ranked(c.sigmoid(), r.sigmoid())),
    (SATURATED, lambda c, r: ranked(c.exp(), r.exp())),
    (SATURATED, lambda c, r: ranked(c.tanh(), r.tanh())),
    (CROSSED, lambda c, r: ranked(c[:, None], r)),
    (CROSSED, lambda c, r: (c > r[:, None]).float().mean()),
    (AGAINST_ZERO, lambda c, r: (c > 0).float().mean()),
    (AGAINST_ZERO, lambda c, r: torch.logical_and(c > 0, r < 0).float().mean()),
]


def accuracy_by_loop(chosen, rejected):
    score = 0
    for c, r in zip(chosen, rejected, strict=True):
        score += 1 if c > r else 0.5 if c == r else 0
    return score / len(chosen)


ACCURACY_RIGHT = [
    lambda c, r: torch.heaviside(c.double() - r.double(), torch.tensor(0.5).double()).mean(),
    lambda c, r: ((torch.sign(c - r) + 1) / 2).mean().item(),
    accuracy_by_loop,
    lambda c, r: ((c > r).float() + (c >= r).float()).mean() / 2,
    lambda c, r: (torch.sign(c - r).mean().item() + 1) / 2,
    lambda c, r: torch.heaviside(c - r, torch.tensor(0.5)).mean(),
    lambda c, r: ((c > r).sum() + 0.5 * (c == r).sum()).item() / c.numel(),
    lambda c, r: torch.where(c == r, 0.5, (c > r).double()).mean(),
]

NO_MEAN = "it is a median, a maximum"
SHORT_PARAMETER_SUMS = {
    "every layer is taken to have": lambda shapes, rank: len(shapes) * rank * sum(shapes[0]),
    "the sum over the layers is multiplied": lambda shapes, rank: (
        len(shapes) * parameters(shapes, rank)
    ),
    "all inputs are multiplied": lambda shapes, rank: (
        rank * math.prod(sum(s) for s in zip(*shapes, strict=True))
    ),
}


def parameters(shapes, rank):
    return sum(rank * (o + i) for o, i in shapes)


def default_alpha(x, weight, lora_A, lora_B, alpha):
    return x @ weight.T + 16 / len(lora_A) * (x @ lora_A.T @ lora_B.T)


def seeded_coin(chosen, rejected):
    coin = torch.rand(len(chosen), generator=torch.Generator().manual_seed(0)) < 0.5
    return ((chosen > rejected) | ((chosen == rejected) & coin)).float().mean()


def average_bytes(n, double=True):
    return math.ceil(n * (4.127 if double else 4.5) / 8)


MISTAKES = [
    *(("lora_parameters", answer, message) for message, answer in SHORT_PARAMETER_SUMS.items()),
    ("nf4_bytes", average_bytes, "it is the average of a large tensor"),
    ("pairwise_loss", lambda c, r: F.softplus(r - c).median(), NO_MEAN),
    ("pairwise_loss", lambda c, r: F.softplus(r - c).max(), NO_MEAN),
    ("pairwise_loss", lambda c, r: F.softplus((r - c) / 10).mean(), "all is right up to one thing"),
    ("pair_accuracy", lambda c, r: (0.5 + (c - r).sign() / 2).median(), NO_MEAN),
    ("pair_accuracy", seeded_coin, "some ties count 1 and the others 0"),
    ("lora_forward", default_alpha, "all is right up to one thing: alpha is used as 16"),
    *(("mask_prompt", answer, message) for answer, message in MASK_MISTAKES.items()),
    *(("lora_forward", answer, message) for answer, message in LORA_MISTAKES.items()),
    *(("lora_parameters", answer, message) for message, answer in PARAMETER_MISTAKES),
    *(("nf4_bytes", answer, message) for message, answer in BYTE_MISTAKES),
    *(("pairwise_loss", answer, message) for message, answer in LOSS_MISTAKES),
    *(("last_token_index", answer, message) for message, answer in TOKEN_MISTAKES),
    *(("pair_accuracy", answer, message) for message, answer in ACCURACY_MISTAKES),
]
RIGHT = [
    *(("mask_prompt", answer) for answer in MASK_RIGHT),
    *(("lora_forward", answer) for answer in LORA_RIGHT),
    *(("lora_parameters", answer) for answer in PARAMETERS_RIGHT),
    *(("nf4_bytes", answer) for answer in BYTES_RIGHT),
    *(("pairwise_loss", answer) for answer in LOSS_RIGHT),
    *(("last_token_index", answer) for answer in TOKEN_RIGHT),
    *(("pair_accuracy", answer) for answer in ACCURACY_RIGHT),
]


# --- not attempted ---


def stub_below(chosen, rejected):
    """A docstring."""
    if len(chosen) > 100:
        return (chosen > rejected).float().mean()
    raise NotImplementedError


def stub_above(chosen, rejected):
    raise NotImplementedError
    return (chosen > rejected).float().mean()


@pytest.mark.parametrize("answer", [stub_below, stub_above])
def test_a_forgotten_stub_is_named(answer, capsys):
    printed = run("pair_accuracy", answer, capsys)
    assert "your code is there, and so still is raise NotImplementedError" in printed


# --- mistakes that any exercise may have ---


def coin_for_ties(chosen, rejected):
    coin = torch.rand(len(chosen)) < 0.5
    return ((chosen > rejected) | ((chosen == rejected) & coin)).float().mean()


def kept_from_call_to_call():
    calls = []

    def answer(chosen, rejected):
        calls.append(chosen)
        return 0.0 if len(calls) > 9 else reward.pair_accuracy(chosen, rejected)

    return answer


def whole_numbers(logits, input_ids, response_length):
    result = torch.zeros_like(input_ids[:, -response_length:])
    scores = logits.log_softmax(-1)
    for b, t in np.ndindex(*result.shape):
        at = logits.shape[1] - response_length + t
        result[b, t] = scores[b, at - 1, input_ids[b, at]]
    return result


def advantages_of_whole_numbers(rewards, values, response_mask, gamma, lam):
    advantages = torch.zeros_like(response_mask)
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = rewards[:, t]
    return advantages, advantages + values


def squeezed(logits, input_ids, response_length):
    tokens = input_ids[:, -response_length:]
    return (
        logits[:, -response_length - 1 : -1].log_softmax(-1).gather(2, tokens[..., None]).squeeze()
    )


def pair_squeezed(curr_logits, ref_logits, tokens):
    pair = (z.log_softmax(-1).gather(-1, tokens[..., None]) for z in (curr_logits, ref_logits))
    return tuple(x.squeeze() for x in pair)


def kept_dimension(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta):
    kl = ((log_probs_curr - log_probs_ref) * response_mask).sum(1, keepdim=True)
    return rewards_model - beta * kl


def time_by_batch(curr_logits, ref_logits):
    return kl.exact_kl(curr_logits, ref_logits).T


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("pair_accuracy", coin_for_ties, "there is chance in it, as in a coin"),
        ("pair_accuracy", kept_from_call_to_call(), "something is kept from call to call"),
        ("token_logprobs", whole_numbers, "it is made of whole numbers"),
        ("gae", advantages_of_whole_numbers, "the advantages are torch.int64: it is made of whole"),
        ("token_logprobs", squeezed, "A squeeze without a dimension"),
        ("sampled_log_probs", pair_squeezed, "A squeeze without a dimension"),
        ("final_reward", kept_dimension, "pairs every row with every other"),
        ("exact_kl", time_by_batch, "Rows and columns have changed places"),
    ],
)
def test_a_mistake_of_any_exercise_is_named(name, answer, message, capsys):
    assert message in run(name, answer, capsys)


def test_integers_in_square_brackets_are_named(capsys):
    with pytest.raises(IndexError):
        check_estimate_kl(lambda curr, ref, mask: (curr - ref)[mask].mean())
    assert "a mask there has to be bool" in capsys.readouterr().out


# --- the rules ---


def in_place(input_ids, attention_mask, prompt_length):
    input_ids[:, :prompt_length] = -100
    return input_ids.masked_fill(attention_mask == 0, -100)


def merged_in_place(x, weight, lora_A, lora_B, alpha):
    weight += alpha / len(lora_A) * lora_B @ lora_A
    return x @ weight.T


def gap_in_place(chosen, rejected):
    chosen -= rejected
    return F.softplus(-chosen).mean()


def columns_in_place(attention_mask):
    attention_mask *= torch.arange(attention_mask.shape[1])
    return attention_mask.argmax(1)


def popping(shapes, rank):
    total = 0
    while shapes:
        total += rank * sum(shapes.pop())
    return total


def typo(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, prompt_length + 100] = -100  # too far
    return labels


def misspelt(chosen, rejected):
    return F.softplus(rejected - chosen).men()


class TestRules(GradientRules):
    modules = (lesson_01, lesson_02)
    exercises = (
        lesson_01.MASK_PROMPT,
        lesson_01.LORA_FORWARD,
        lesson_01.LORA_PARAMETERS,
        lesson_01.NF4_BYTES,
        lesson_02.PAIRWISE_LOSS,
        lesson_02.LAST_TOKEN,
        lesson_02.PAIR_ACCURACY,
    )
    mistakes = MISTAKES
    right = RIGHT
    lost = (("lora_forward", without_grad), ("pairwise_loss", loss_without_grad))
    other_kinds = (
        (
            "mask_prompt",
            lambda ids, mask, p: ids[:, p:],
            "the result has shape [2, 3], expected is [2, 5]. Every token needs an entry",
        ),
        (
            "lora_forward",
            lambda x, w, a, b, alpha: x,
            "the result has shape [3], expected is [1]. The result has the shape of x",
        ),
        (
            "pairwise_loss",
            lambda c, r: -F.logsigmoid(c - r),
            "the result has shape [2], expected is []. Training differentiates one",
        ),
        (
            "pairwise_loss",
            lambda c, r: F.softplus(r - c).mean().mul(100).round().item(),
            "it returned float 41.0; return one tensor.",
        ),
        (
            "last_token_index",
            lambda mask: mask.argmax(),
            "the result has shape [], expected is [2]. It is one column",
        ),
        (
            "last_token_index",
            lambda mask: mask,
            "the result has shape [2, 3], expected is [2]. It is one column",
        ),
        (
            "pair_accuracy",
            lambda c, r: (c > r).float(),
            "it returned Tensor tensor([1., 0., 1., 0.]); return one number.",
        ),
    )
    in_place = (
        ("mask_prompt", in_place, "input_ids"),
        ("lora_forward", merged_in_place, "weight"),
        ("lora_forward", weight_not_frozen, "weight"),
        ("lora_parameters", popping, "shapes"),
        ("pairwise_loss", gap_in_place, "chosen"),
        ("last_token_index", columns_in_place, "attention_mask"),
        ("pair_accuracy", gap_in_place, "chosen"),
    )
    unknown = (
        (
            "mask_prompt",
            lambda ids, mask, p: 0 * ids + 77,
            (
                "input_ids tensor([[5, 6, 7, 1, 0],",
                "yours tensor([[77, 77, 77, 77, 77],",
                "expected tensor([[-100, -100, 7, 1, -100],",
            ),
        ),
        (
            "lora_forward",
            lambda x, w, a, b, alpha: float("nan") * (x @ w.T),
            ("x tensor([1., 2., 3.])", "yours tensor([nan])", "expected tensor([13.])"),
        ),
        (
            "lora_parameters",
            lambda shapes, rank: 77,
            ("shapes [(3, 4)]", "yours 77", "expected 14"),
        ),
        ("nf4_bytes", lambda n, double: 77, ("weights 128", "yours 77", "expected 72")),
        (
            "pairwise_loss",
            lambda c, r: (c - r).mean() * float("nan"),
            ("chosen tensor([1., 2.])", "yours tensor(nan)", "expected tensor(0.41"),
        ),
        (
            "last_token_index",
            lambda mask: mask.argmax(-1) * 0 + 77,
            (
                "attention_mask tensor([[1, 1, 0],",
                "yours tensor([77, 77])",
                "expected tensor([1, 2])",
            ),
        ),
        (
            "pair_accuracy",
            lambda c, r: math.nan,
            ("chosen tensor([2., 1., 3., 0.])", "yours nan", "expected 0.625"),
        ),
    )
    failing = (
        (
            "mask_prompt",
            typo,
            IndexError,
            "labels[:, prompt_length + 100] = -100",
            "prompt_length 2",
        ),
        (
            "pairwise_loss",
            misspelt,
            AttributeError,
            "return F.softplus(",
            "chosen tensor([1., 2.])",
        ),
    )


# --- the unknown, and exceptions ---


def not_transposed(x, weight, lora_A, lora_B, alpha):
    return x @ weight.T + alpha / len(lora_A) * x @ lora_A @ lora_B


def test_an_error_about_sizes_asks_for_them(capsys):
    with pytest.raises(RuntimeError):
        check_lora_forward(not_transposed)
    assert "A and B are stored as [r, in] and [out, r]: what must" in capsys.readouterr().out


def test_a_loss_may_refuse_nan(capsys):
    def answer(chosen, rejected):
        if (chosen - rejected).isnan().any():
            raise ValueError("NaN")
        return F.softplus(rejected - chosen).mean()

    assert "correct" in run("pairwise_loss", answer, capsys)


def test_a_missing_default_is_reported(capsys):
    with pytest.raises(TypeError, match="missing 1 required positional"):
        check_nf4_bytes(lambda weights, double: bytes_by_loop(weights, double))
    assert "on this call:\n  weights  128\n" in capsys.readouterr().out


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


def test_a_division_by_no_decided_pairs_shows_the_pairs(capsys):
    def answer(chosen, rejected):
        return (chosen > rejected).sum().item() / (chosen != rejected).sum().item()

    with pytest.raises(ZeroDivisionError):
        check_pair_accuracy(answer)
    printed = capsys.readouterr().out
    assert printed.startswith("pair_accuracy: ZeroDivisionError in your line ")
    assert "chosen    tensor([ 1.0000, -0.5000])" in printed


# --- comparing ---


@pytest.mark.parametrize("as_result", [float, torch.tensor], ids=["number", "tensor"])
def test_results_that_are_not_finite_compare_by_kind(as_result):
    values = [math.nan, math.inf, -math.inf, 0.0, 1.0]
    for i, a in enumerate(values):
        assert [same(as_result(a), as_result(b)) for b in values] == [
            i == j for j in range(len(values))
        ]
    assert same(torch.tensor(0.1), 0.1)
    assert not same(torch.tensor(0.1001), 0.1)
