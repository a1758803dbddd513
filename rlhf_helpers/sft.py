"""Supervised fine-tuning: labels for the response only, the loss, the training loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_helpers.kinds import Above, B, Floating, Ids, L, Mask, V, Whole
from rlhf_helpers.logprobs import last_logprobs, token_logprobs
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import check_examples, pad_examples
from rlhf_helpers.training import Run, TrainConfig, TrainStats, digest, fit
from rlhf_helpers.validation import checked

IGNORE = -100  # the label that PyTorch and transformers leave out of a loss


@checked
def mask_prompt(
    input_ids: Ids[B, L], attention_mask: Mask[B, L], prompt_length: Whole[1]
) -> Tensor:
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
    length = input_ids.shape[1]
    if prompt_length >= length:
        raise ValueError(
            f"prompt_length is {prompt_length} in sequences of {length} tokens: it must leave a "
            f"response, so at most {length - 1}."
        )
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE)
    labels[:, :prompt_length] = IGNORE
    _check_labels(labels)
    return labels


@checked
def sft_loss(logits: Floating[B, L, V], labels: Ids[B, L]) -> Tensor:
    """Mean surprise at the labelled tokens: −log π(y_t | what stands before), in nats per token.

    L = −(1/N) Σ log softmax(logits[b, t])[labels[b, t + 1]] over the N labels that are not -100.

    Args:
        logits: `[B, L, V]`, floating point; position t predicts token t + 1.
        labels: `[B, L]`, int64, where their tokens stand; see `mask_prompt`.

    Returns:
        A scalar, differentiable with respect to `logits`.

    Raises:
        ValueError: shapes that do not match, or no label left to learn from.

    Example:
        Four equally likely tokens: log 4, whatever the labels.

        >>> sft_loss(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 3]]))
        tensor(1.3863)

    What `transformers` computes from `labels`, without a log-softmax of the logits' size. Derived
    in lesson 01.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORE
    if not counted.any():
        raise ValueError(f"all labels are {IGNORE}: nothing to learn from. Label the responses.")
    logprobs = token_logprobs(logits[:, :-1], targets.masked_fill(~counted, 0))
    return -logprobs[counted].mean()


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Settings of `train_sft`."""

    steps: Whole[1] = 150
    learning_rate: Above[0] = 2e-3


Labels = Callable[[Tensor, Tensor, int], Tensor]


def train_sft(
    roles: Roles,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    held_out: list[dict],
    config: SFTConfig | None = None,
    labels: Labels = mask_prompt,
    folder: Path | None = None,
) -> Iterator[TrainStats]:
    """Train a role on demonstrations: one update for each item that is drawn from the iterator.

    With a `folder`, a run that stops early, by Ctrl-C for example, is kept in
    `<folder>.unfinished`. The same call then goes on from there, to the same weights as a run that
    was never stopped. The finished adapter goes to `folder`.

    Args:
        role: a trainable role of `roles`.
        examples, held_out: from `encode_examples`.
        labels: which tokens are learnt, as `mask_prompt` says it; lesson 01 tries wrong ones.

    Yields:
        `TrainStats`, the first before any update; `held_out` holds the `loss`, always over the
        response alone.

    Raises:
        ValueError: for an example without EOS or longer than the model's context, or an unfinished
            run with other settings or data; nothing has been computed or overwritten then.
        FloatingPointError: if loss or gradient is not finite; the state before is kept.

    Lesson 01 writes the loop out.
    """
    config = config or SFTConfig()
    check_examples("examples", examples, roles.base, tokenizer)
    check_examples("held_out", held_out, roles.base, tokenizer)
    name = getattr(labels, "__qualname__", repr(labels))
    settings = {"role": role, "labels": name, "examples": digest(examples)}
    run = Run(roles, [role], config, folder, settings)

    def loss_of(step: int) -> Tensor:
        return batch_loss(roles.model, tokenizer, config.batch(examples, step), labels)

    def measure() -> dict[str, float]:
        return {"loss": held_out_loss(roles.model, tokenizer, held_out)}

    return fit(run, loss_of, measure)


@torch.no_grad()
def held_out_loss(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    batch_size: int = 128,
) -> float:
    """`sft_loss` of the responses in all examples, in nats per token."""
    if not examples:
        raise ValueError("examples is empty: give at least one example")
    total = count = 0
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        tokens = sum(len(row["response"]) for row in rows)
        total += batch_loss(model, tokenizer, rows).item() * tokens
        count += tokens
    return total / count


def batch_loss(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    labels: Labels = mask_prompt,
) -> Tensor:
    """`sft_loss` of one batch; only the positions that predict a label get logits, in pieces."""
    input_ids, attention_mask, prompt_length = pad_examples(tokenizer, examples)
    targets = labels(input_ids, attention_mask, prompt_length)
    before = torch.nn.functional.pad(attention_mask[:, :-1], (1, 0))
    targets = targets.masked_fill(before == 0, IGNORE)  # nothing stands before a row's first token
    _check_labels(targets)
    count = input_ids.shape[1] - max(int((targets != IGNORE).any(0).nonzero()[0]), 1)
    device = model.device
    logprobs = last_logprobs(model, input_ids.to(device), attention_mask.to(device), count)
    return -logprobs[targets[:, -count:].to(device) != IGNORE].mean()


def _check_labels(labels: Tensor) -> None:
    empty = (labels == IGNORE).all(-1)
    if empty.any():
        raise ValueError(
            f"labels of row {int(empty.nonzero()[0])} are all {IGNORE}: nothing to learn from. "
            "Give it a response, at least EOS."
        )
