"""The reward model: pairs of responses, Bradley–Terry, a scalar head, its evaluation."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from rlhf_helpers.guards import in_range, require_columns
from rlhf_helpers.kinds import Above, B, Finite, L, Mask, N, Whole
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import (
    Prompt,
    answer_text,
    check_examples,
    encode_examples,
    pad_examples,
    same_prompt,
)
from rlhf_helpers.training import Run, TrainConfig, TrainStats, digest, fit
from rlhf_helpers.validation import checked

ROWS = 128  # responses scored at a time


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Settings of `train_reward_model`; a batch is of pairs."""

    steps: Whole[1] = 200
    learning_rate: Above[0] = 1e-3


@checked
def pairwise_loss(chosen: Finite[N], rejected: Finite[N]) -> Tensor:
    """Mean surprise at the choices, by Bradley and Terry: −log σ(r_chosen − r_rejected), in nats.

    L = −(1/N) Σ log σ(r_c − r_r). Its gradient with respect to r_c is −(1 − σ(r_c − r_r))/N: the
    more surprised the model, the harder it is pushed. `logsigmoid` stays finite where
    `sigmoid(...).log()` would be −inf.

    Args:
        chosen, rejected: `[N]` rewards of the preferred and of the other responses, floating point.

    Returns:
        A scalar, differentiable with respect to both.

    Raises:
        TypeError: rewards that are not floating point.
        ValueError: shapes that differ, no pairs, or a reward that is not finite.

    Example:
        A pair that the model ranks even, and one that it gets right by log 3: log 2 and log 4/3.

        >>> pairwise_loss(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor(0.6931)
        >>> pairwise_loss(torch.tensor([1.0986]), torch.tensor([0.0]))
        tensor(0.2877)

    Stiennon et al. (arXiv 2009.01325), section 3.4; Bradley and Terry 1952. Derived in lesson 02.
    """
    return -logsigmoid(chosen - rejected).mean()


@checked
def last_token_index(attention_mask: Mask[B, L]) -> Tensor:
    """Column of the last real token of each row, whichever side the padding is on.

    Args:
        attention_mask: `[B, L]`, 1 for a real token, 0 for padding.

    Returns:
        `[B]`, int64.

    Raises:
        ValueError: a shape that is not `[B, L]`, or a row without a real token.

    Example:
        >>> last_token_index(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
        [1, 2]
    """
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return ((attention_mask != 0) * columns).argmax(-1)


def split_by_prompt(
    dataset: Dataset, share: float = 1 / 8, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Training and held-out pairs; all pairs of a prompt fall on the same side.

    Args:
        share: of the prompts that is held out, between 0 and 1.
        seed: of the choice of prompts, and of the order of the training pairs.

    Raises:
        ValueError: no column `prompt`, a share out of range, or too few prompts to have some on
            both sides.
    """
    require_columns(dataset, "dataset", ("prompt",))
    keys = [same_prompt(prompt) for prompt in dataset["prompt"]]
    prompts = sorted(set(keys))
    count = round(share * len(prompts)) if in_range(share, 0, 1) else 0
    if not 0 < count < len(prompts):
        raise ValueError(
            f"a share of {share} of {len(prompts)} prompts leaves one side empty; give pairs of "
            "more prompts, or another share"
        )
    held_out = set(random.Random(seed).sample(prompts, count))
    sides = [key in held_out for key in keys]
    train = dataset.select([i for i, held in enumerate(sides) if not held])
    return train.shuffle(seed=seed), dataset.select([i for i, held in enumerate(sides) if held])


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, prompt_length: int, response_length: int
) -> list[dict]:
    """Token ids of pairs, `{"chosen": {"prompt", "response"}, "rejected": {…}}` for each row.

    Raises:
        ValueError: no rows, a missing column, equal responses, swapped columns (which shows where
            there is a `probability`), and what `encode_examples` raises.
    """
    if missing := {"prompt", "chosen", "rejected"} - set(dataset.column_names):
        raise ValueError(
            f"the pairs have no column {min(missing)!r}, only {', '.join(dataset.column_names)}; "
            "needed are prompt, chosen and rejected"
        )
    sides = []
    for side in ("chosen", "rejected"):
        texts = {"prompt": dataset["prompt"], "completion": dataset[side]}
        try:
            sides.append(encode_examples(tokenizer, texts, prompt_length, response_length))
        except ValueError as error:
            raise ValueError(f"in column {side!r}, {error}") from error
    for i, row in enumerate(dataset):
        if answer_text(row["chosen"]).strip() == answer_text(row["rejected"]).strip():
            raise ValueError(
                f"pair {i}: chosen and rejected are both {row['chosen']!r}; remove the pair, it "
                "carries no preference"
            )
    _check_not_swapped(dataset)
    return [{"chosen": c, "rejected": r} for c, r in zip(*sides, strict=True)]


def _check_not_swapped(dataset: Dataset) -> None:
    """Where the annotator's probabilities are known, those of the chosen exceed one half."""
    if "probability" not in dataset.column_names:
        return
    bets = torch.tensor(dataset["probability"], dtype=torch.float64) - 0.5
    if bets.mean() < -3 * (bets.square().mean() / len(bets)).sqrt():
        raise ValueError(
            "the annotator would rather have chosen what stands in 'rejected': by column "
            f"'probability', 'chosen' wins with {bets.mean() + 0.5:.2f} on average; swap the two "
            "columns back"
        )


def score_tokens(roles: Roles, role: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Rewards of sequences: the head's value at the last real token.

    Args:
        input_ids: `[B, L]`, int64, padded on either side.
        attention_mask: `[B, L]`, 1 for a real token.

    Returns:
        `[B]` rewards, float32, differentiable with respect to a trainable role.
    """
    values = roles.values(role, input_ids, attention_mask)
    return values.gather(1, last_token_index(attention_mask)[:, None]).squeeze(1)


def score_examples(
    roles: Roles, role: str, tokenizer: PreTrainedTokenizerBase, examples: list[dict]
) -> Tensor:
    """Rewards `[N]` of encoded examples, in batches of similar length."""
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i].values())))
    rewards = torch.empty(len(examples))
    with torch.no_grad():
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            input_ids, mask, _ = pad_examples(tokenizer, [examples[i] for i in rows])
            device = roles.base.device
            rewards[rows] = score_tokens(roles, role, input_ids.to(device), mask.to(device)).cpu()
    return rewards


def score_responses(
    roles: Roles,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    prompt_length: int,
    response_length: int,
) -> Tensor:
    """Normalised rewards `[N]` of responses to prompts; EOS is appended.

    Raises:
        ValueError: if the head was never normalised (`normalise`), and for empty or long texts.
    """
    require_reference(roles, role)
    texts = {"prompt": prompts, "completion": responses}
    examples = encode_examples(tokenizer, texts, prompt_length, response_length)
    return score_examples(roles, role, tokenizer, examples)


def require_reference(roles: Roles, role: str) -> None:
    """Raise ValueError unless the role's head was normalised."""
    if roles.require_head(role).reference is None:
        raise ValueError(
            f"the head of role {role!r} has no normalisation statistics, so its rewards have no "
            "fixed zero or unit; call reward.normalise on reference samples first"
        )


def normalise(roles: Roles, role: str, scores: Tensor) -> None:
    """Shift and scale a head so that these scores of it get mean 0 and standard deviation 1.

    r ← (r − μ)/σ, folded into the head: w ← w/σ, b ← (b − μ)/σ. μ and σ are kept with the head.

    Args:
        scores: `[N]`, what the head gives to reference samples, those of the SFT model.

    Raises:
        ValueError: fewer than two scores, equal ones, or one that is not finite.
    """
    head = roles.require_head(role)
    std, mean = torch.std_mean(scores.double())
    if not (std.isfinite() and std > 0):
        raise ValueError(
            f"the reference scores have mean {mean.item()} and standard deviation {std.item()}; "
            "give two or more scores that differ and are finite"
        )
    head.rescale(mean.item(), std.item())


@checked
def pair_accuracy(chosen: Finite[...], rejected: Finite[...]) -> float:
    """Share of pairs whose chosen response has the higher reward; a tie counts half.

    Raises:
        As `pairwise_loss`.

    Example:
        >>> pair_accuracy(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 3.0]))
        0.5
    """
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def pair_scores(
    roles: Roles, role: str, tokenizer: PreTrainedTokenizerBase, pairs: list[dict]
) -> tuple[Tensor, Tensor]:
    """Rewards `[N]` of the chosen and of the rejected responses."""
    sides = ([pair[side] for pair in pairs] for side in ("chosen", "rejected"))
    chosen, rejected = (score_examples(roles, role, tokenizer, side) for side in sides)
    return chosen, rejected


def train_reward_model(
    roles: Roles,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict],
    held_out: list[dict],
    config: RewardConfig | None = None,
    folder: Path | None = None,
) -> Iterator[TrainStats]:
    """Train a role and its head on pairs: one update for each item drawn from the iterator.

    Saving and going on work as in `train_sft`.

    Args:
        role: a trainable role of `roles` with a head.
        pairs, held_out: from `encode_pairs`.

    Yields:
        `TrainStats`, with `loss` and `accuracy` of the held-out pairs.

    Raises:
        ValueError: a role without a head, no pairs, or an unfinished run with other settings or
            data.
        FloatingPointError: if the loss is not finite; the state before that update is kept.
    """
    config = config or RewardConfig()
    for name, rows in (("pairs", pairs), ("held_out", held_out)):
        if not rows:
            raise ValueError(f"{name} is empty: give at least one pair")
        if not {"chosen", "rejected"} <= set(rows[0]):
            raise ValueError(f"{name}[0] has {', '.join(rows[0])}: give pairs from encode_pairs")
        for side in ("chosen", "rejected"):
            check_examples(f"{side} of {name}", [row[side] for row in rows], roles.base, tokenizer)
    head = roles.require_head(role)
    run = Run(roles, [role], config, folder, {"role": role, "pairs": digest(pairs)})
    head.reference = None  # a scale that was fixed before holds no longer

    def loss_of(step: int) -> Tensor:
        batch = config.batch(pairs, step)
        examples = [pair[side] for side in ("chosen", "rejected") for pair in batch]
        input_ids, mask, _ = pad_examples(tokenizer, examples)
        device = roles.base.device
        rewards = score_tokens(roles, role, input_ids.to(device), mask.to(device))
        run.check_finite(role, "mean reward", rewards.mean())
        return pairwise_loss(*rewards.split(len(batch)))

    def measure() -> dict[str, float]:
        chosen, rejected = pair_scores(roles, role, tokenizer, held_out)
        loss = pairwise_loss(chosen, rejected).item()
        return {"loss": loss, "accuracy": pair_accuracy(chosen, rejected)}

    return fit(run, loss_of, measure)


@checked
def calibration(gaps: Finite[N], bins: Whole[1] = 8) -> list[tuple[float, float, int]]:
    """Predicted against observed choices: where a model says 80%, is it right in 80%?

    A model bets on the response with the higher reward, with confidence σ(|Δ|) for a gap of
    Δ = r_chosen − r_rejected before normalisation. Pairs are grouped by that confidence.

    Args:
        gaps: `[N]`.
        bins: groups of equal width between 0.5 and 1.

    Returns:
        For each group that is not empty: mean prediction, share that came true, number of pairs.

    Raises:
        TypeError: `gaps` not floating point.
        ValueError: no gaps, one that is NaN, or bins that are no whole number of at least 1.
    """
    confidence = torch.sigmoid(gaps.abs())
    group = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows = []
    for number in range(bins):
        inside = group == number
        if count := int(inside.sum()):
            hits = (gaps[inside] > 0).double() + 0.5 * (gaps[inside] == 0).double()
            rows.append((confidence[inside].mean().item(), hits.mean().item(), count))
    return rows
