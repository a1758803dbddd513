"""Supervised fine-tuning: labels for the response only, the loss, the training loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers.guards import check_part, refuse
from rlhf_helpers.kinds import Above, B, Floating, Ids, L, Mask, V, Whole
from rlhf_helpers.logprobs import last_logprobs, token_logprobs
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import check_encoded, check_examples, like_length_batches, pad_examples
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
    check_part("prompt_length", prompt_length, input_ids.shape[1], "a response")
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


@checked
def train_sft(
    roles: Roles,
    role: str,
    tokenizer: Tokenizer,
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
        TypeError: for a `config` that is no SFTConfig.
        ValueError: for an example without EOS, without a label or longer than the model's context,
            or an unfinished run with other settings or data; nothing has been computed or
            overwritten then.
        FloatingPointError: if loss or gradient is not finite; the state before is kept.

    Lesson 01 writes the loop out.
    """
    config = config or SFTConfig()
    for name, rows in (("examples", examples), ("held_out", held_out)):
        check_examples(name, rows, roles.base, tokenizer)
    for rows in like_length_batches(examples, config.batch_size):
        _batch(tokenizer, [examples[i] for i in rows], labels)  # raises for one without a label
    name = getattr(labels, "__qualname__", repr(labels))
    settings = {"role": role, "labels": name, "examples": digest(examples)}
    run = Run(roles, [role], config, folder, settings)

    def loss_of(step: int) -> Tensor:
        return batch_loss(roles.model, tokenizer, config.batch(examples, step), labels)

    def measure() -> dict[str, float]:
        return {"loss": held_out_loss(roles.model, tokenizer, held_out)}

    return fit(run, loss_of, measure)


@torch.no_grad()
@checked
def held_out_loss(
    model: nn.Module, tokenizer: Tokenizer, examples: list[dict], batch_size: int = 128
) -> float:
    """`sft_loss` of the responses in all examples, in nats per token."""
    check_encoded("examples", examples)
    total = count = 0
    for rows in like_length_batches(examples, batch_size):
        batch = [examples[i] for i in rows]
        tokens = sum(len(row["response"]) for row in batch)
        total += batch_loss(model, tokenizer, batch).item() * tokens
        count += tokens
    return total / count


def batch_loss(
    model: nn.Module, tokenizer: Tokenizer, examples: list[dict], labels: Labels = mask_prompt
) -> Tensor:
    """`sft_loss` of one batch; only the positions that predict a label get logits, in pieces."""
    return -label_logprobs(model, tokenizer, examples, labels).mean()


def label_logprobs(
    model: nn.Module, tokenizer: Tokenizer, examples: list[dict], labels: Labels = mask_prompt
) -> Tensor:
    """Log-probability `[N]` of each labelled token of a batch, in nats."""
    *inputs, targets = (x.to(model.device) for x in _batch(tokenizer, examples, labels))
    learnt = targets != IGNORE
    count = targets.shape[1] - max(int(learnt.any(0).nonzero()[0]), 1)
    return last_logprobs(model, *inputs, count)[learnt[:, -count:]]


def _batch(tokenizer: Tokenizer, examples: list[dict], labels: Labels) -> tuple[Tensor, ...]:
    """Token ids, mask and labels of a batch, each row with a label."""
    input_ids, attention_mask, prompt_length = pad_examples(tokenizer, examples)
    targets = labels(input_ids, attention_mask, prompt_length)
    before = nn.functional.pad(attention_mask[:, :-1], (1, 0))
    targets = targets.masked_fill(before == 0, IGNORE)  # nothing stands before a row's first token
    _check_labels(targets)
    return input_ids, attention_mask, targets


def _check_labels(labels: Tensor) -> None:
    learnt = (labels != IGNORE).sum(-1)
    why = f"all are {IGNORE}, nothing to learn from. Give it a response, at least EOS."
    refuse("the number of labels in a row", learnt, learnt == 0, why)
