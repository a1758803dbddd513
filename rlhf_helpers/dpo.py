"""DPO: preferences without a reward model. The loss, the implicit rewards, the training loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers.guards import upcast
from rlhf_helpers.kinds import Above, Between, N, OneOf, RefLogProbs, SampledLogProbs, Whole
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.reward import ROWS, SIDES, Sides, check_pairs, check_sides, pair_accuracy
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import like_length_batches, pad_examples
from rlhf_helpers.training import Run, TrainConfig, TrainStats, digest, fit
from rlhf_helpers.validation import checked

KINDS = ("sigmoid", "ipo")
MOST_SLIPS = 0.499  # at one half choices say nothing


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """Settings of `train_dpo`; a batch is of pairs.

    Args:
        beta: β of `dpo_loss`, above 0.
        kind: of the loss, `sigmoid` or `ipo`.
        label_smoothing: ε of `dpo_loss`, at least 0 and below 0.5.
    """

    steps: Whole[1] = 127
    learning_rate: Above[0] = 5e-4
    beta: Above[0] = 0.1
    kind: OneOf[KINDS] = "sigmoid"
    label_smoothing: Between[0, MOST_SLIPS] = 0.0


@checked
def dpo_loss(
    chosen_logprobs: SampledLogProbs[N],
    rejected_logprobs: SampledLogProbs[N],
    ref_chosen_logprobs: RefLogProbs[N],
    ref_rejected_logprobs: RefLogProbs[N],
    beta: Above[0],
    kind: OneOf[KINDS] = "sigmoid",
    label_smoothing: Between[0, MOST_SLIPS] = 0.0,
) -> Tensor:
    """How badly the policy's own log-ratios to the reference predict which response was chosen.

    With h = [log π(y_c|x) − log π_ref(y_c|x)] − [log π(y_r|x) − log π_ref(y_r|x)]

    - `sigmoid`: ℓ(h) = −log σ(β h), the surprise of Bradley and Terry at rewards of β log(π/π_ref).
    - `ipo`: ℓ(h) = (h − 1/(2β))². Its least value is at h = 1/(2β); −log σ(β h) falls for ever, and
      a pair that is always chosen alike drives h without end.

    L = mean of (1 − ε) ℓ(h) + ε ℓ(−h), the mean loss if a share ε of the choices is a slip. The
    gradient of ℓ(h) = −log σ(β h) with respect to log π(y_c|x) is −β σ(−β h).

    Args:
        chosen_logprobs, rejected_logprobs: `[N]`, of whole responses under the policy: the sums of
            `response_logprobs` up to and including EOS, in nats.
        ref_chosen_logprobs, ref_rejected_logprobs: `[N]`, of the same responses under the
            reference; data, without gradient.
        beta: β, above 0: for `sigmoid` what a nat of the log-ratio is worth as a reward, for `ipo`
            the τ of its paper. The smaller, the farther from the reference the policy goes.
        kind: `sigmoid` or `ipo`.
        label_smoothing: ε, at least 0 and below 0.5, at which choices say nothing.

    Returns:
        A scalar, differentiable with respect to the policy's log-probabilities; in nats for
        `sigmoid`, in square nats for `ipo`.

    Raises:
        TypeError: log-probabilities that are not floating point.
        ValueError: shapes that are not one `[N]`, no pairs; an entry above 0 or not finite; a
            reference with a gradient; β not above 0; another kind; ε out of range.

    Example:
        The policy finds the chosen response three times as likely as the reference does, the other
        equally likely: h = log 3. With β = 1 that predicts the choice with 3/4, and costs log 4/3.

        >>> chosen, rejected, ref = (torch.tensor([p]).log() for p in (0.3, 0.2, 0.1))
        >>> dpo_loss(chosen, rejected, ref, rejected, beta=1.0)
        tensor(0.2877)

        If one choice in four is a slip, 3/4 is exactly right: the loss is the entropy of 1/4.

        >>> dpo_loss(chosen, rejected, ref, rejected, beta=1.0, label_smoothing=0.25)
        tensor(0.5623)

    Rafailov et al. (arXiv 2305.18290), equation 7; `ipo` is Azar et al. (arXiv 2310.12036),
    equation 17; smoothing is Mitchell, "A note on DPO with noisy preferences" (2023).
    TRL 1.16 differs in two places: its `ipo` gets log-probabilities divided by the number of their
    tokens, and its `label_smoothing` belongs to its loss `robust` (arXiv 2403.00409), which
    subtracts the second term.
    """
    chosen = upcast(chosen_logprobs) - upcast(ref_chosen_logprobs)
    gap = chosen - (upcast(rejected_logprobs) - upcast(ref_rejected_logprobs))
    agreed, slips = _pair_loss(gap, beta, kind), _pair_loss(-gap, beta, kind)
    return ((1 - label_smoothing) * agreed + label_smoothing * slips).mean()


def _pair_loss(gap: Tensor, beta: float, kind: str) -> Tensor:
    return (gap - 1 / (2 * beta)).square() if kind == "ipo" else -logsigmoid(beta * gap)


@checked
def implicit_rewards(
    logprobs: SampledLogProbs[N], ref_logprobs: RefLogProbs[N], beta: Above[0]
) -> Tensor:
    """The rewards for which a policy would be the best one at that price of the KL.

    r̂(x, y) = β [log π(y|x) − log π_ref(y|x)], up to a number that depends on the prompt alone and
    cancels between two responses to it. `reward.pair_accuracy` of the chosen and the rejected ones
    says how often they rank a pair as it was chosen.

    Args:
        logprobs: `[N]`, of whole responses under the policy, in nats.
        ref_logprobs: `[N]`, of the same responses under the reference; data.
        beta: β, above 0.

    Returns:
        `[N]`, float32 (float64 if either input is).

    Raises:
        As `dpo_loss`.

    Example:
        >>> twice, half = torch.tensor([0.4, 0.1]).log(), torch.tensor([0.2, 0.2]).log()
        >>> implicit_rewards(twice, half, beta=0.1)  # 0.1 log 2 and 0.1 log 1/2
        tensor([ 0.0693, -0.0693])

    Rafailov et al. (arXiv 2305.18290), equation 5 and section 4.
    """
    return beta * (upcast(logprobs) - upcast(ref_logprobs))


@checked
def sequence_logprobs(model: nn.Module, tokenizer: Tokenizer, examples: list[dict]) -> Tensor:
    """log π(y|x) of whole responses: the sum over their tokens, EOS included, none of the prompt's.

    Only the positions that predict a response token get logits.

    Args:
        model: acts as the role that is asked, see `Roles.use`.
        examples: token ids, `{"prompt": [...], "response": [...]}`, as from `encode_examples`.

    Returns:
        `[N]`, in nats, float32, differentiable with respect to the model's trainable parameters.

    Raises:
        ValueError: no examples, texts in place of ids, and what `response_logprobs` refuses.
    """
    input_ids, attention_mask, prompt_length = pad_examples(tokenizer, examples)
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    response_mask = attention_mask[:, prompt_length:]
    logprobs = response_logprobs(model, input_ids, attention_mask, response_mask.shape[1])
    return logprobs.masked_fill(response_mask == 0, 0).sum(-1)


@torch.no_grad()
@checked
def pair_logprobs(roles: Roles, role: str, tokenizer: Tokenizer, pairs: list[dict]) -> Sides:
    """`sequence_logprobs` `[N]` of the chosen and of the rejected responses, without gradient.

    In batches of like length, on the CPU, in the order of the pairs.
    """
    check_sides("pairs", pairs)
    model = roles.use(role)
    examples = [pair[side] for side in SIDES for pair in pairs]
    logprobs = torch.empty(len(examples))
    for rows in like_length_batches(examples, ROWS):
        logprobs[rows] = sequence_logprobs(model, tokenizer, [examples[i] for i in rows]).cpu()
    return logprobs.split(len(pairs))


@checked
def train_dpo(
    roles: Roles,
    role: str,
    reference: str,
    tokenizer: Tokenizer,
    pairs: list[dict],
    held_out: list[dict],
    config: DPOConfig | None = None,
    folder: Path | None = None,
    any_reference: bool = False,
) -> Iterator[TrainStats]:
    """Train a role on pairs by `dpo_loss`: one update for each item drawn from the iterator.

    The reference's log-probabilities are computed once, when the first item is drawn. Saving and
    going on work as in `train_sft`; a run that goes on must find the same reference, and its role's
    weights are those that were saved, whatever the role at hand.

    Args:
        role: a trainable role of `roles` without a head, added as a copy of the reference.
        reference: a frozen role, the SFT adapter.
        pairs, held_out: from `reward.encode_pairs`.
        any_reference: take a reference that the role did not start from, or one that is the bare
            base.

    Yields:
        `TrainStats`, the first before any update. `held_out` has, as means over the held-out pairs,
        `loss`; `accuracy`, the share that the implicit rewards rank right (a tie counts half);
        `chosen_log_ratio` and `rejected_log_ratio`, log π − log π_ref in nats per response; and
        `margin`, β times their difference.

    Raises:
        TypeError: for a `config` that is no DPOConfig.
        ValueError: no pairs, or one with equal responses, two prompts, no EOS, or more tokens than
            the model's context; a role or reference that is missing or not as above; a run that
            begins with a role whose weights are not the reference's; or an unfinished run with
            other settings, pairs or reference. Nothing has been computed or overwritten then.
        FloatingPointError: if loss or gradient is not finite; the state before is kept.

    Rafailov et al. (arXiv 2305.18290), section 4.
    """
    config = config or DPOConfig()
    for name, rows in (("pairs", pairs), ("held_out", held_out)):
        check_pairs(name, rows, roles.base, tokenizer)
    roles.require(role, trainable=True, head=False)
    _check_reference(roles, reference, any_reference)
    weights = roles.digest(reference)
    settings = {"role": role, "reference": f"weights {weights}", "pairs": digest(pairs)}
    run = Run(roles, [role], config, folder, settings)
    begins = run.step == 0  # later the role has moved on, as it should
    if begins and roles.digest(role) != weights and not any_reference:
        raise ValueError(
            f"role {role!r} is no copy of {reference!r} before the first update; begin with one of "
            f"roles.add(..., copy_of={reference!r}), or give any_reference=True if that is meant"
        )
    return _updates(run, reference, tokenizer, pairs, held_out)


def _updates(run: Run, reference: str, tokenizer: Tokenizer, pairs, held_out):
    roles, (role,), config = run.roles, run.trained, run.config
    settings = (config.beta, config.kind, config.label_smoothing)
    ref, ref_held_out = (pair_logprobs(roles, reference, tokenizer, x) for x in (pairs, held_out))

    def loss_of(step: int) -> Tensor:
        rows = config.batch(range(len(pairs)), step)
        examples = [pairs[i][side] for side in SIDES for i in rows]
        logprobs = sequence_logprobs(roles.model, tokenizer, examples)
        batch_ref = (side[rows].to(logprobs.device) for side in ref)
        return dpo_loss(*logprobs.split(len(rows)), *batch_ref, *settings)

    def measure() -> dict[str, float]:
        logprobs = pair_logprobs(roles, role, tokenizer, held_out)
        chosen, rejected = (a - b for a, b in zip(logprobs, ref_held_out, strict=True))
        return {
            "loss": dpo_loss(*logprobs, *ref_held_out, *settings).item(),
            "accuracy": pair_accuracy(chosen, rejected),
            "chosen_log_ratio": chosen.mean().item(),
            "rejected_log_ratio": rejected.mean().item(),
            "margin": config.beta * (chosen - rejected).mean().item(),
        }

    yield from fit(run, loss_of, measure)


def _check_reference(roles: Roles, reference: str, any_reference: bool) -> None:
    roles.require(reference, trainable=False)
    learnt = any(w.any() for name, w in roles.state(reference).items() if ".lora_B." in name)
    if not (learnt or any_reference):
        raise ValueError(
            f"role {reference!r} answers as the bare base, its adapter is still 0; load the SFT "
            "adapter, or give any_reference=True if the base itself is to be the reference"
        )
