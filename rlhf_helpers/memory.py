"""What a model costs, from first principles: parameters of adapters, bytes of NF4 weights."""

from collections.abc import Sequence
from math import ceil

from rlhf_helpers.roles import NF4_BLOCK

NF4_SUPERBLOCK = 256  # scales that share one float32 under double quantization
FLOAT32 = 4  # bytes


def lora_parameters(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Trainable parameters of LoRA adapters on linear layers.

    The layer y = x Wᵀ with W `[out, in]` gets A `[rank, in]` and B `[out, rank]`, so
    Σ rank · (in + out) over all adapted layers. W itself is frozen, and the adapters have no bias.

    Args:
        shapes: `(out, in)` of each adapted layer, the shape of its weight; equal ones as often as
            they occur.
        rank: r, at least 1.

    Returns:
        The number of parameters.

    Raises:
        ValueError: a rank or a size that is no whole number of at least 1, or no layer at all.

    Example:
        A is 2 × 4 and B is 3 × 2, so 8 + 6.

        >>> lora_parameters([(3, 4)], rank=2)
        14

    Hu et al., LoRA (arXiv 2106.09685), section 4. Derived in lesson 01.
    """
    _check_count("rank", rank)
    if not shapes:
        raise ValueError("shapes is empty: give (out, in) of at least one adapted layer.")
    for index, shape in enumerate(shapes):
        if len(shape) != 2:
            raise ValueError(
                f"shapes[{index}] is {tuple(shape)}: give (out, in) of a linear layer."
            )
        for size in shape:
            _check_count(f"shapes[{index}] is {tuple(shape)}, and its size", size)
    return sum(rank * (outputs + inputs) for outputs, inputs in shapes)


def nf4_bytes(weights: int, double_quant: bool = True) -> int:
    """Bytes of one weight tensor in NF4, its scales included.

    Each weight is a 4-bit code, two to a byte; each block of 64 weights has one scale. Plain, a
    scale is a float32. Double quantization stores it in 8 bits, plus one float32 for every 256
    scales. What is left over at the end makes a byte or a block of its own:

        codes  = ⌈weights / 2⌉,  scales = ⌈weights / 64⌉
        plain:   codes + 4 · scales                   (4.5 bits per weight)
        double:  codes + scales + 4 · ⌈scales / 256⌉  (4 + 8/64 + 32/(64 · 256) = 4.127 bits)

    Left out is what does not grow with the tensor: bitsandbytes keeps a codebook of 16 float32
    values for the codes and, under double quantization, one of 256 for the scales and their mean.

    Args:
        weights: entries of the tensor, at least 1. Tensors are quantized one by one: add their
            bytes, do not give their total.
        double_quant: whether the scales are quantized as well.

    Returns:
        The number of bytes.

    Raises:
        ValueError: `weights` is no whole number of at least 1.

    Example:
        128 weights take 64 bytes of codes. They have two scales: 8 bytes plain; 2 bytes and a
        float32 under double quantization.

        >>> nf4_bytes(128, double_quant=False), nf4_bytes(128)
        (72, 70)

    Dettmers et al., QLoRA (arXiv 2305.14314), section 3. Derived in lesson 01.
    """
    _check_count("weights", weights)
    codes, scales = ceil(weights / 2), ceil(weights / NF4_BLOCK)
    if not double_quant:
        return codes + FLOAT32 * scales
    return codes + scales + FLOAT32 * ceil(scales / NF4_SUPERBLOCK)


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, at least 1.")
