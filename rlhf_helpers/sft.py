"""Supervised fine-tuning: labels for the response only, the loss, the training loop."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_helpers.checkpoints import adam_state, finish_first, restore_adam, whole_folder
from rlhf_helpers.data import pad_examples
from rlhf_helpers.logprobs import token_logprobs
from rlhf_helpers.roles import Roles

IGNORE = -100  # the label that PyTorch and transformers leave out of a loss
OPTIMIZER = "optimizer.safetensors"


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


def sft_loss(logits: Tensor, labels: Tensor) -> Tensor:
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
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits have shape {list(logits.shape)}, labels {list(labels.shape)}: they must be "
            "[B, L, V] and [B, L]."
        )
    targets = labels[:, 1:]
    counted = targets != IGNORE
    if not counted.any():
        raise ValueError(f"all labels are {IGNORE}: nothing to learn from. Label the responses.")
    logprobs = token_logprobs(logits[:, :-1], targets.masked_fill(~counted, 0))
    return -logprobs[counted].mean()


@dataclass(frozen=True)
class SFTConfig:
    """Settings of `train_sft`.

    Args:
        steps: updates; the examples are taken in their order, again from the start if need be.
        batch_size: examples in an update.
        learning_rate: the highest; it rises linearly from 0 and falls linearly to 0.
        warmup_steps: steps of the rise.
        max_grad_norm: longer gradients are scaled down to this length.
        eval_every: steps between two measurements of the held-out loss.
        save_every: steps between two saves of an unfinished run.
    """

    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    eval_every: int = 25
    save_every: int = 50

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; give a number above 0")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of {self.steps} steps; give fewer"
            )


@dataclass(frozen=True)
class SFTStats:
    """What one update reports.

    Attributes:
        step: how many updates are done; 0 is the report before the first, with no loss.
        loss: of the update's batch before the update, in nats per labelled token.
        held_out_loss: after the update, None where it was not measured.
        grad_norm: before it was scaled down.
        learning_rate: of the update.
        seconds: since the run began, saved ones included.
    """

    step: int
    loss: float | None
    held_out_loss: float | None
    grad_norm: float | None
    learning_rate: float
    seconds: float


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
) -> Iterator[SFTStats]:
    """Train a role on demonstrations: one update for each item that is drawn from the iterator.

    With a `folder`, a run that stops early, by Ctrl-C for example, is kept in
    `<folder>.unfinished`. The same call then goes on from there, to the same weights as a run that
    was never stopped. The finished adapter goes to `folder`.

    Args:
        role: a trainable role of `roles`.
        examples, held_out: from `encode_examples`.
        labels: which tokens are learnt, as `mask_prompt` says it; lesson 01 tries wrong ones. The
            held-out loss is always over the response alone.

    Yields:
        `SFTStats`, the first before any update.

    Raises:
        ValueError: for an example without EOS or longer than the model's context, or an unfinished
            run with other settings or data; nothing has been computed or overwritten then.
        FloatingPointError: if the loss is not finite; the state before that update is kept.

    Lesson 01 writes the loop out.
    """
    config = config or SFTConfig()
    context = roles.base.config.max_position_embeddings
    _check_examples("examples", examples, tokenizer, context)
    _check_examples("held_out", held_out, tokenizer, context)
    run = _Run(roles, role, config, folder, _digest(config, role, labels, examples))
    return _updates(run, tokenizer, examples, held_out, labels)


@torch.no_grad()
def held_out_loss(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    batch_size: int = 128,
) -> float:
    """`sft_loss` of the responses in all examples, in nats per token."""
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
    """`sft_loss` of one batch; only the positions that predict a label get logits."""
    input_ids, attention_mask, prompt_length = pad_examples(tokenizer, examples)
    targets = labels(input_ids, attention_mask, prompt_length)
    first = int((targets != IGNORE).any(0).nonzero()[0])
    kept = input_ids.shape[1] - max(first - 1, 0)
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    return sft_loss(logits, targets[:, -kept:].to(model.device))


def learning_rate(step: int, config: SFTConfig) -> float:
    """Linear rise and fall, as transformers' `linear` schedule: 0 at step 0, highest after warm-up.

    Example:
        >>> config = SFTConfig(steps=150, warmup_steps=10, learning_rate=0.002)
        >>> [learning_rate(step, config) for step in (0, 5, 10, 80)]
        [0.0, 0.001, 0.002, 0.001]
    """
    rise = step / config.warmup_steps
    fall = (config.steps - step) / (config.steps - config.warmup_steps)
    return config.learning_rate * min(rise, fall)


def _updates(run: "_Run", tokenizer, examples, held_out, labels) -> Iterator[SFTStats]:
    config, begun = run.config, time.perf_counter() - run.seconds
    try:
        if run.step == 0:
            before = held_out_loss(run.roles.use(run.role), tokenizer, held_out)
            yield SFTStats(0, None, before, None, 0.0, run.seconds)
        while run.step < config.steps:
            model = run.roles.use(run.role).train()
            rows = [
                examples[(run.step * config.batch_size + i) % len(examples)]
                for i in range(config.batch_size)
            ]
            loss = batch_loss(model, tokenizer, rows, labels)
            _check_loss(loss, run.step, config)
            loss.backward()
            with finish_first():
                rate, norm = run.update()
                run.seconds = time.perf_counter() - begun
                if run.step % config.save_every == 0:
                    run.save()
            model.eval()
            measure = run.step % config.eval_every == 0 or run.step == config.steps
            measured = held_out_loss(model, tokenizer, held_out) if measure else None
            yield SFTStats(run.step, loss.item(), measured, norm, rate, run.seconds)
    finally:
        with finish_first():
            run.save()


class _Run:
    """Where a run stands, and how that is kept on disk."""

    def __init__(
        self, roles: Roles, role: str, config: SFTConfig, folder: Path | None, digest: str
    ):
        self.roles, self.role, self.config = roles, role, config
        self.folder, self.digest = folder, digest
        self.parameters = roles.parameters(role)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=0.0)
        self.step = self.saved = 0
        self.seconds = 0.0
        if folder is not None:
            self.unfinished = folder.with_name(f"{folder.name}.unfinished")
            if self.unfinished.exists():
                self._resume()

    def update(self) -> tuple[float, float]:
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return rate, norm.item()

    def save(self) -> None:
        if self.folder is None or self.step == self.saved:
            return
        if self.step == self.config.steps:
            self.roles.save(self.role, self.folder)
            shutil.rmtree(self.unfinished, ignore_errors=True)
        else:
            facts = {"step": self.step, "seconds": self.seconds, "digest": self.digest}
            moments = adam_state(self.parameters, self.optimizer)
            with whole_folder(self.unfinished) as new:
                self.roles.write(self.role, new)
                metadata = {name: str(value) for name, value in facts.items()}
                save_file(moments, new / OPTIMIZER, metadata=metadata)
        self.saved = self.step

    def _resume(self) -> None:
        with safe_open(self.unfinished / OPTIMIZER, "pt") as file:
            facts = file.metadata()
            moments = {key: file.get_tensor(key) for key in file.keys()}
        if facts["digest"] != self.digest:
            raise ValueError(
                f"'{self.unfinished}' holds {facts['step']} steps of a run with other settings or "
                "data; give those to go on with it, or delete the folder to begin anew"
            )
        self.roles.load(self.role, self.unfinished, trainable=True)
        self.parameters = self.roles.parameters(self.role)
        self.step = self.saved = int(facts["step"])
        self.seconds = float(facts["seconds"])
        restore_adam(self.parameters, self.optimizer, moments, self.step)


def _digest(config: SFTConfig, role: str, labels: Labels, examples: list[dict]) -> str:
    """A short text that differs where anything differs that a run depends on."""
    settings = json.dumps([asdict(config), role, labels.__name__, examples])
    return hashlib.sha256(settings.encode()).hexdigest()


def _check_loss(loss: Tensor, step: int, config: SFTConfig) -> None:
    if not loss.isfinite():
        raise FloatingPointError(
            f"the loss of step {step + 1} is {loss.item()}; lower the learning_rate of "
            f"{config.learning_rate}, or look for examples that do not belong"
        )


def _check_examples(name: str, examples: list[dict], tokenizer, context: int) -> None:
    if not examples:
        raise ValueError(f"{name} is empty: give at least one example")
    eos = tokenizer.eos_token_id
    for i, example in enumerate(examples):
        prompt, response = example["prompt"], example["response"]
        if not prompt or not response or response[-1] != eos:
            raise ValueError(
                f"{name}[{i}] has no prompt, or a response that does not end with EOS ({eos}): "
                f"{tokenizer.decode(prompt + response)!r}. Without EOS the model never learns to "
                "stop; encode_examples appends it"
            )
        if len(prompt) + len(response) > context:
            raise ValueError(
                f"{name}[{i}] has {len(prompt) + len(response)} tokens, more than the model's "
                f"context of {context}; leave it out or shorten it"
            )


def _check_labels(labels: Tensor) -> None:
    empty = (labels == IGNORE).all(-1)
    if empty.any():
        raise ValueError(
            f"labels of row {int(empty.nonzero()[0])} are all {IGNORE}: nothing to learn from. "
            "Give it a response, at least EOS."
        )
