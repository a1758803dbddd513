"""The reward model: pairs of responses, Bradley–Terry, a scalar head, its evaluation."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import text
from rlhf_helpers.guards import first_index, in_range, require_columns, shown
from rlhf_helpers.kinds import Above, B, Finite, L, Mask, N, Whole
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import Prompt, encode_examples, like_length_batches, pad_examples
from rlhf_helpers.training import Run, TrainConfig, TrainStats, digest, fit
from rlhf_helpers.validation import checked

SIDES = ("chosen", "rejected")
Sides = tuple[Tensor, Tensor]  # a number for each pair's chosen response, and for its rejected one
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


@checked
def split_by_prompt(
    dataset: Dataset, share: float = 1 / 8, seed: Whole[0] = 0
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
    keys = [text.same_prompt(prompt) for prompt in dataset["prompt"]]
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


@checked
def encode_pairs(
    tokenizer: Tokenizer, dataset: Dataset, prompt_length: int, response_length: int
) -> list[dict]:
    """Token ids of pairs, `{"chosen": {"prompt", "response"}, "rejected": {…}}` for each row.

    Raises:
        ValueError: no rows, a missing column, equal responses, swapped columns (which shows where
            there is a `probability`), and what `encode_examples` raises.
    """
    require_columns(dataset, "dataset", ("prompt", *SIDES))
    sides = []
    for side in SIDES:
        texts = {"prompt": dataset["prompt"], "completion": dataset[side]}
        try:
            sides.append(encode_examples(tokenizer, texts, prompt_length, response_length))
        except ValueError as error:
            raise ValueError(f"in column {side!r}, {error}") from error
    for i, row in enumerate(dataset):
        if text.answer_text(row["chosen"]).strip() == text.answer_text(row["rejected"]).strip():
            raise ValueError(
                f"pair {i}: chosen and rejected are both {row['chosen']!r}; remove the pair"
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
            f"by column 'probability', 'chosen' wins with {bets.mean() + 0.5:.2f} on average; swap "
            "the two columns back"
        )


def check_sides(name: str, pairs: list[dict]) -> None:
    """Raise ValueError unless there are pairs, each with both its sides."""
    if not pairs:
        raise ValueError(f"{name} is empty: give at least one example")
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, Mapping) and set(SIDES) <= pair.keys()):
            raise ValueError(f"{name}[{i}] is {shown(pair)}: give pairs from encode_pairs")


def check_pairs(name: str, pairs: list[dict], model: nn.Module, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless encoded pairs are of one prompt and two responses that fit the model.

    Args:
        name: of `pairs`, for the message.
    """
    check_sides(name, pairs)
    for side in SIDES:
        text.check_examples(f"{side} of {name}", [pair[side] for pair in pairs], model, tokenizer)
    for i, (a, b) in enumerate((pair["chosen"], pair["rejected"]) for pair in pairs):
        if a["prompt"] != b["prompt"] or a["response"] == b["response"]:
            texts = [tokenizer.decode(x["prompt"] + x["response"]) for x in (a, b)]
            raise ValueError(
                f"{name}[{i}] has two prompts, or equal responses: {texts[0]!r} and {texts[1]!r}; "
                "give two different responses to one prompt, or remove the pair"
            )


@checked
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


@checked
def score_examples(roles: Roles, role: str, tokenizer: Tokenizer, examples: list[dict]) -> Tensor:
    """Rewards `[N]` of encoded examples, in batches of like length, on the CPU."""
    roles.require_head(role)
    rewards = torch.empty(len(examples))
    with roles.dense(role):
        for rows in like_length_batches(examples, ROWS):
            batch = [examples[i] for i in rows]
            rewards[rows] = _score_batch(roles, role, tokenizer, batch).cpu()
    return rewards


def _score_batch(roles: Roles, role: str, tokenizer, examples: list[dict]) -> Tensor:
    input_ids, mask, _ = pad_examples(tokenizer, examples)
    device = roles.base.device
    return score_tokens(roles, role, input_ids.to(device), mask.to(device))


@checked
def score_responses(
    roles: Roles,
    role: str,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    prompt_length: int,
    response_length: int,
) -> Tensor:
    """Normalised rewards `[N]` of responses to prompts; EOS is appended.

    Raises:
        ValueError: if the head was never normalised (`normalise`), and for empty or long texts.
    """
    require_normalised(roles, role)
    texts = {"prompt": prompts, "completion": responses}
    examples = encode_examples(tokenizer, texts, prompt_length, response_length)
    return score_examples(roles, role, tokenizer, examples)


def require_normalised(roles: Roles, role: str) -> None:
    """Raise ValueError unless the role's head was normalised."""
    if roles.require_head(role).statistics is None:
        raise ValueError(
            f"the head of role {role!r} has no normalisation statistics; call reward.normalise on "
            "scores of reference samples first"
        )


def check_rewards(rewards: Sequence[float] | Tensor | None, count: int) -> Tensor:
    """What a reward function returned, as `[B]`, float32.

    Raises:
        TypeError: for what is no list of numbers, or not as many as there are responses.
        FloatingPointError: for a reward that is None, NaN or infinite.

    Example:
        >>> check_rewards([0.5, 1], count=2)
        tensor([0.5000, 1.0000])
    """
    try:
        numbers = torch.tensor([float("nan") if x is None else float(x) for x in rewards])
    except (TypeError, ValueError):  # None, a single number, texts, rows of numbers
        numbers = None
    if numbers is None or len(numbers) != count:
        given = shown(rewards) if numbers is None else f"{len(rewards)} rewards"
        raise TypeError(
            f"the reward function returned {given} for {count} responses; return one number each"
        )
    if (bad := first_index(~numbers.isfinite())) is not None:
        raise FloatingPointError(
            f"the reward function returned {rewards[bad[0]]} for response {bad[0]}; return a "
            "finite number for each"
        )
    return numbers


@checked
def normalise(roles: Roles, role: str, scores: Finite[N]) -> None:
    """Shift and scale a head so that these scores of it get mean 0 and standard deviation 1.

    r ← (r − μ)/σ, folded into the head: w ← w/σ, b ← (b − μ)/σ. μ and σ are kept with the head.

    Args:
        scores: `[N]`, what the head gives to reference samples, those of the SFT model.

    Raises:
        TypeError: scores that are no floating-point tensor.
        ValueError: fewer than two scores, equal ones, or one that is not finite.
    """
    head = roles.require_head(role)
    std, mean = torch.std_mean(scores.double())
    if not (std.isfinite() and std > 0):
        raise ValueError(
            f"the reference scores have mean {mean.item()} and standard deviation {std.item()}; "
            "give two or more scores that differ"
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


@checked
def pair_scores(roles: Roles, role: str, tokenizer: Tokenizer, pairs: list[dict]) -> Sides:
    """Rewards `[N]` of the chosen and of the rejected responses."""
    check_sides("pairs", pairs)
    sides = ([pair[side] for pair in pairs] for side in SIDES)
    chosen, rejected = (score_examples(roles, role, tokenizer, side) for side in sides)
    return chosen, rejected


@checked
def train_reward_model(
    roles: Roles,
    role: str,
    tokenizer: Tokenizer,
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
        TypeError: for a `config` that is no RewardConfig.
        ValueError: a role without a head, what `check_pairs` refuses, or an unfinished run with
            other settings or data.
        FloatingPointError: if loss or gradient is not finite; the state before is kept.
    """
    config = config or RewardConfig()
    for name, rows in (("pairs", pairs), ("held_out", held_out)):
        check_pairs(name, rows, roles.base, tokenizer)
    head = roles.require_head(role)
    run = Run(roles, [role], config, folder, {"role": role, "pairs": digest(pairs)})
    head.statistics = None  # a scale that was fixed before holds no longer

    def loss_of(step: int) -> Tensor:
        batch = config.batch(pairs, step)
        examples = [pair[side] for side in SIDES for pair in batch]
        return pairwise_loss(*_score_batch(roles, role, tokenizer, examples).split(len(batch)))

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
        if (inside := group == number).any():
            hits = pair_accuracy(gaps[inside], torch.zeros_like(gaps[inside]))
            rows.append((confidence[inside].mean().item(), hits, int(inside.sum())))
    return rows
