"""Supervised fine-tuning: labels for the response only, the loss, the training loop."""

import torch
from torch import Tensor

IGNORE = -100  # the label that PyTorch and transformers leave out of a loss


def mask_prompt(input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
    """Labels for supervised fine-tuning: the response, EOS included; all else ignored.

    labels[b, t] = input_ids[b, t] where t ≥ P and attention_mask[b, t] = 1, else -100. Labels
    stand where their tokens stand; the shift by one, since the logits at t predict token t + 1,
    belongs to the loss.

    Args:
        input_ids: `[B, P + T]`, int64: prompts padded on the left, responses on the right.
        attention_mask: `[B, P + T]`, 1 for a real token, 0 for padding.
        prompt_length: P, the columns that hold the prompts; at least 1.

    Returns:
        `[B, P + T]` labels, int64; the arguments stay as they are.

    Raises:
        ValueError: shapes that do not match, a `prompt_length` that leaves no prompt or no
            response, or a row whose labels would all be ignored.

    Example:
        Two prompt columns, three response columns; 0 is padding, 1 is EOS.

        >>> ids = torch.tensor([[5, 6, 7, 1, 0], [0, 6, 8, 9, 1]])
        >>> mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
        >>> mask_prompt(ids, mask, prompt_length=2).tolist()
        [[-100, -100, 7, 1, -100], [-100, -100, 8, 9, 1]]

    Derived in lesson 01.
    """
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}, attention_mask "
            f"{list(attention_mask.shape)}: both must be [B, P + T]."
        )
    length = input_ids.shape[1]
    if not 1 <= prompt_length < length:
        raise ValueError(
            f"prompt_length is {prompt_length} in sequences of {length} tokens: it must be at "
            f"least 1 and leave a response, so at most {length - 1}."
        )
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE)
    labels[:, :prompt_length] = IGNORE
    _check_labels(labels)
    return labels


def _check_labels(labels: Tensor) -> None:
    empty = (labels == IGNORE).all(-1)
    if empty.any():
        raise ValueError(
            f"labels of row {int(empty.nonzero()[0])} are all {IGNORE}: nothing to learn from. "
            "Give it a response, at least EOS."
        )
