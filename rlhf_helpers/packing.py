"""Passes without padding: the sequences of a batch side by side, in fewer rows."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_PACKS: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The body's last hidden states at every position; no number depends on the padding.

    Half of a batch of sampled responses may be padding. On a CPU, where every column is paid for,
    short sequences are put side by side in rows as long as the longest, each with its own positions
    0, 1, …, by which transformers knows that tokens of one must not see another. The layout follows
    from the mask alone, so two passes over the same batch are the same computation.

    Whether a model does so is tried once with a few tokens; for one that does not, on a GPU, and
    where no row is saved, the batch goes through as it is.

    Args:
        model: a causal language model; the body is its `base_model`.
        input_ids: `[B, L]`, int64.
        attention_mask: `[B, L]`, 1 for a real token; padding may stand on either side.

    Returns:
        `[B, L, width]`; what stands at padding means nothing.

    Krell et al., packing without cross-contamination (arXiv 2107.02027).
    """
    layout = _layout(attention_mask) if input_ids.device.type == "cpu" else None
    if layout is None or not _packs(model):
        return _plain(model, input_ids, attention_mask)
    return _packed(model, input_ids, attention_mask, *layout)


def _plain(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _packed(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor, starts: list[int], shape: tuple
) -> Tensor:
    """`starts`: each sequence's first place in rows of `shape`, counted through all of them."""
    positions, real = mask.long().cumsum(-1) - 1, mask.flatten().nonzero().squeeze(1)
    places = (torch.tensor(starts)[:, None] + positions).flatten()[real]

    def pack(x: Tensor) -> Tensor:
        rows = x.new_zeros(shape).flatten()
        return rows.index_copy(0, places, x.flatten()[real]).view(shape)

    inputs = {"input_ids": pack(input_ids), "position_ids": pack(positions)}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, places)
    spread = hidden.new_zeros(mask.numel(), hidden.shape[-1]).index_copy(0, real, hidden)
    return spread.unflatten(0, mask.shape)


def _layout(mask: Tensor) -> tuple[list[int], tuple[int, int]] | None:
    """First fit, longest first: `starts` and `shape` of `_packed`; None if it saves no row."""
    lengths = mask.sum(-1).tolist()
    width, room, starts = max(lengths), [], [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(room))
        if row == len(room):
            room.append(width)
        starts[i] = (row + 1) * width - room[row]
        room[row] -= lengths[i]
    return (starts, (len(room), width)) if len(room) < len(lengths) else None


@torch.no_grad()
def _packs(model: PreTrainedModel) -> bool:
    """Whether a packed batch gives what a padded one gives, tried once for each model."""
    if model not in _PACKS:
        ids = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 0, 3, 2, 1], [3, 5, 0, 0, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
        ids = ids % model.config.vocab_size
        plain = _plain(model, ids, mask)[mask == 1]
        packed = _packed(model, ids, mask, *_layout(mask))[mask == 1]
        _PACKS[model] = bool((plain - packed).abs().max() <= 1e-3 * plain.abs().max())
    return _PACKS[model]
