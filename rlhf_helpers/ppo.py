"""PPO: one update, and the loop, with a critic or with groups of responses (RLOO, GRPO)."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers.guards import context_length
from rlhf_helpers.kinds import Above, Between, From, OneOf, Whole
from rlhf_helpers.kl import KINDS, AdaptiveKL, kl_estimate
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.losses import (
    AVERAGES,
    GROUPED,
    RATIOS,
    average,
    gae,
    group_advantages,
    masked_mean,
    policy_loss,
    shape_rewards,
    value_loss,
    whiten,
)
from rlhf_helpers.reward import check_rewards, require_normalised, score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import Rollout, sample_responses
from rlhf_helpers.text import Prompt, encode_prompts
from rlhf_helpers.training import Run, digest
from rlhf_helpers.validation import check_fields, checked

TRAINED = ("policy", "value")
ADVANTAGES = ("gae", *GROUPED)
PLACES = ("reward", "loss")  # of the KL penalty
RewardFunction = Callable[[list[Prompt], Rollout], Tensor]  # `[B]` rewards of a rollout's responses


@dataclass(frozen=True)
class PPOConfig:
    """Settings of `train_ppo`.

    Args:
        updates: rounds of sampling and learning.
        batch_size: responses sampled for an update, `group_size` to each prompt.
        minibatch_size: responses in an optimizer step; must divide `batch_size`.
        epochs: passes over the batch in an update.
        learning_rate: of Adam, for policy and critic alike; constant.
        beta: β, the price of a nat of KL, in units of the normalised reward.
        kl_kind: the estimate that is the penalty, `k1`, `k2` or `k3`; in the reward only `k1` has
            the gradient of the KL (lesson 05).
        kl_in: where the penalty stands. `reward`: it is part of each token's reward, so the critic
            and the advantages know of it. `loss`: β times its mean is added to the policy's loss,
            and the reward is the score alone; for `k2` and `k3`, since the gradient of `k1` is 0 on
            average.
        target_kl: if given, β is adapted so that KL, in nats per response, comes near it.
        stop_kl: if given, the run ends after an update whose KL exceeds it.
        advantages: `gae`, with a critic, or a kind of `losses.group_advantages`: then there is no
            critic, and the score of a whole response, less β times its KL if that stands in the
            reward, is compared with those of the other responses to its prompt.
        group_size: responses to each prompt; at least 2 without a critic; must divide `batch_size`.
            Minibatches may split groups.
        gamma, lam: see `gae`.
        clip, clip_high, ratio_of, value_clip: see `policy_loss` and `value_loss`.
        mean_over: see `losses.average`, for the policy's loss and a KL penalty in it; the constant
            of `length` is `response_length`.
        eos_penalty: taken off the score of a response that does not end by itself.
        temperature: of sampling and of scoring.
        response_length: the most tokens of a response.
        max_grad_norm: longer gradients, each role's by itself, are scaled down to this length.
        save_every: updates between two saves of an unfinished run.
        seed: of the choice of prompts and of all samples.
    """

    updates: Whole[1] = 30
    batch_size: Whole[1] = 64
    minibatch_size: Whole[1] = 32
    epochs: Whole[1] = 2
    learning_rate: Above[0] = 1e-3
    beta: From[0] = 0.1
    kl_kind: OneOf[KINDS] = "k1"
    kl_in: OneOf[PLACES] = "reward"
    target_kl: Above[0] | None = None
    stop_kl: Above[0] | None = None
    advantages: OneOf[ADVANTAGES] = "gae"
    group_size: Whole[1] = 1
    gamma: Between[0, 1] = 1.0
    lam: Between[0, 1] = 0.95
    clip: Above[0] = 0.2
    clip_high: Above[0] | None = None
    ratio_of: OneOf[RATIOS] = "token"
    mean_over: OneOf[AVERAGES] = "tokens"
    value_clip: Above[0] = 1.0
    eos_penalty: From[0] = 1.0
    temperature: Above[0] = 1.0
    response_length: Whole[1] = 32
    max_grad_norm: Above[0] = 1.0
    save_every: Whole[1] = 1
    seed: Whole[0] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kl_in == "loss" and self.kl_kind == "k1":
            raise ValueError(
                "kl_kind is 'k1' with kl_in='loss': its gradient is 0 on average; choose k2 or k3"
            )
        if self.target_kl is not None and self.beta == 0:
            raise ValueError("beta is 0, which no factor can move to a target_kl; begin above 0")
        for name in ("minibatch_size", "group_size"):
            if self.batch_size % (size := getattr(self, name)):
                raise ValueError(
                    f"batch_size {self.batch_size} cannot be divided by {name} {size}; give one "
                    "that divides it"
                )
        if self.advantages != "gae" and self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size} with advantages={self.advantages!r}: without a "
                "critic a response is compared with others to its prompt; give 2 or more"
            )

    @property
    def trained(self) -> tuple[str, ...]:
        """The roles that learn: the policy, and with `gae` the critic."""
        return TRAINED if self.advantages == "gae" else TRAINED[:1]

    @property
    def groups(self) -> int:
        """Prompts of an update."""
        return self.batch_size // self.group_size

    @property
    def averaging(self) -> tuple[str, int | None]:
        """The last arguments of `policy_loss` and `average`."""
        return self.mean_over, self.response_length if self.mean_over == "length" else None

    @property
    def steps(self) -> int:
        """What the engine counts: updates."""
        return self.updates

    def rate(self, step: int) -> float:
        """Learning rate of an update: constant."""
        return self.learning_rate


@dataclass(frozen=True)
class Experience:
    """Sampled responses, and all that the two losses need to know of them.

    Attributes:
        prompts: B questions or dialogues.
        rollout: the responses.
        scores: `[B]`, from the reward model, less the penalty for a missing EOS.
        logprobs, ref_logprobs: `[B, T]`, under the policy that sampled, and under the reference.
        values: `[B, T]`, the critic's, before each token; None without one.
        rewards, advantages, returns: `[B, T]`. With a critic the advantages are whitened; without,
            all tokens of a response have the same, and there are no returns.
    """

    prompts: list[Prompt]
    rollout: Rollout
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None

    @property
    def kl(self) -> Tensor:
        """`[B]`: log π(y) − log π_ref(y) of each response, an estimate of its KL in nats."""
        difference = self.logprobs - self.ref_logprobs
        return difference.masked_fill(self.rollout.response_mask == 0, 0).sum(-1)


@dataclass(frozen=True)
class PPOStats:
    """What one update reports. Samples and KL are of the policy *before* the update.

    Attributes:
        update: its number, from 1.
        experience: what it learnt from, samples included.
        score: mean reward of the responses, from the reward model; their penalties included.
        kl: mean over responses of the KL to the reference, in nats per response.
        beta: the price of a nat in this update.
        entropy: mean of −log π over the sampled tokens, in nats per token.
        length: mean tokens of a response.
        finished: share of responses that end by themselves.
        policy, value: means over the update's steps of `loss`, `grad_norm` and of what
            `policy_loss` and `value_loss` report; `value` is empty without a critic.
        first_ratio: the mean ratio in the first step; 1 if nothing is wrong.
        seconds: since the run began, saved ones included.
    """

    update: int
    experience: Experience
    score: float
    kl: float
    beta: float
    entropy: float
    length: float
    finished: float
    policy: dict[str, float]
    value: dict[str, float]
    first_ratio: float
    seconds: float = 0.0


@checked
def collect_experience(
    roles: Roles,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    config: PPOConfig,
    beta: From[0],
    seed: Whole[0],
    role: str = "policy",
    reward_function: RewardFunction | None = None,
) -> Experience:
    """Sample a response to each prompt and ask all roles about it. Nothing is learnt here.

    The log-probabilities are those of a forward pass like the ones that training makes, in the same
    minibatches, so that the first ratio is exactly 1. What need not be exact to the last bit, the
    samples, scores and values, comes from `Roles.dense`.

    Args:
        roles: with `policy`, `reference`, `reward` and, if `config` has a critic, `value`.
        prompts: without a critic each `config.group_size` times, side by side.
        beta: β of this round; `config.beta` may have been adapted.
        seed: of the samples.
        role: who answers; `reference` to see what the policy started from.
        reward_function: who scores, in place of role `reward`.

    Raises:
        ValueError: prompts that are no groups of equal ones.
        TypeError, FloatingPointError: as `reward.check_rewards`.
    """
    if config.advantages != "gae":
        check_groups(prompts, config.group_size)
    length, options = config.response_length, {"temperature": config.temperature, "seed": seed}
    with roles.dense(role) as model:
        rollout = sample_responses(model, tokenizer, prompts, length, **options)
    ids, seen = rollout.input_ids, rollout.attention_mask
    parts, exact = minibatches(rollout, config), torch.no_grad()
    ask = {
        "logprobs": (exact, lambda x: role_logprobs(roles, role, rollout, x, config)),
        "ref_logprobs": (exact, lambda x: role_logprobs(roles, "reference", rollout, x, config)),
        "values": (roles.dense("value"), lambda x: response_values(roles, "value", rollout, x)),
        "scores": (roles.dense("reward"), lambda x: score_tokens(roles, "reward", ids[x], seen[x])),
    }
    if "value" not in config.trained:
        del ask["values"]
    if reward_function:
        del ask["scores"]
    said = {}
    for name, (way, answer) in ask.items():
        with way:
            said[name] = torch.cat([answer(part) for part in parts])
    if reward_function:
        given = check_rewards(reward_function(prompts, rollout), len(prompts))
        said["scores"] = given.to(said["logprobs"])
    scores = said.pop("scores") - config.eos_penalty * (~rollout.finished)
    mask, price = rollout.response_mask, beta if config.kl_in == "reward" else 0.0
    pair = said["logprobs"], said["ref_logprobs"]
    said["rewards"] = shape_rewards(scores, *pair, mask, price, config.kl_kind)
    said["values"] = values = said.get("values")
    said["advantages"], said["returns"] = _advantages(said["rewards"], values, mask, config)
    return Experience(prompts, rollout, scores, **said)


def _advantages(
    rewards: Tensor, values: Tensor | None, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor | None]:
    """`[B, T]`, and the critic's targets if there is one."""
    if values is not None:
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        return whiten(advantages, mask), returns
    whole = group_advantages(rewards.sum(-1), config.group_size, config.advantages)
    return whole[:, None] * mask, None


def check_groups(prompts: list[Prompt], group_size: int) -> None:
    """Raise ValueError unless prompts come in whole groups of equal ones, side by side."""
    if len(prompts) % group_size:
        raise ValueError(
            f"{len(prompts)} prompts are no groups of {group_size}; give each prompt {group_size} "
            "times, side by side"
        )
    for i, prompt in enumerate(prompts):
        if prompt != prompts[first := i - i % group_size]:
            raise ValueError(
                f"prompts {first} and {i} are of one group of {group_size} and differ: "
                f"{prompts[first]!r}, {prompt!r}; give each prompt {group_size} times, side by side"
            )


def response_values(roles: Roles, role: str, rollout: Rollout, part: slice) -> Tensor:
    """The critic's value `[B, T]` of the state before each response token, of some rows.

    The state before token t is the prompt and the response up to t − 1, so its value is read at the
    token before: the same shift by one as that of the logits.
    """
    values = roles.values(role, rollout.input_ids[part], rollout.attention_mask[part])
    return values[:, -rollout.response_mask.shape[1] - 1 : -1]


@checked
def train_ppo(
    roles: Roles,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    config: PPOConfig | None = None,
    folder: Path | None = None,
    reward_function: RewardFunction | None = None,
) -> Iterator[PPOStats]:
    """Train the policy against the reward model: one update for each item drawn.

    Each update samples `batch_size` responses, scores them, and takes `epochs` ×
    `batch_size`/`minibatch_size` steps of Adam on the policy, and as many on the critic, if there
    is one. The two share no weight, so each has its loss and its optimizer, and there is no
    coefficient between them. Without a critic (`advantages="rloo"`, `"grpo"` or `"centred"`) all
    else is the same, and role `value` is neither needed nor touched.

    With a `folder`, the run is kept in `<folder>.unfinished` after each update. The same call goes
    on from there, on a CPU to the same weights bit for bit as a run that was never stopped. The
    finished policy goes to `folder`.

    Args:
        roles: `policy` and, with a critic, `value` trainable, the latter with a head; `reference`
            and `reward` frozen, the latter with a normalised head.
        prompts: questions or dialogues to draw from, at least as many as an update asks.
        reward_function: a program that scores in place of role `reward`, `gold(prompts, rollout)`
            for example; then that role is not needed. A run that goes on must have one of the same
            name.

    Yields:
        `PPOStats`.

    Raises:
        TypeError: for a `config` that is no PPOConfig, prompts that are not texts, or a reward
            function that returns None or too few numbers.
        ValueError: for roles that are missing or not as above, too few prompts, or an unfinished
            run with another configuration; nothing has been computed or overwritten then.
        NotADirectoryError: if a file is in the place of the folder.
        FloatingPointError: if a loss, a gradient or what a reward function returns is not finite;
            what was saved last is kept.

    Example:
        >>> for stats in train_ppo(roles, tokenizer, prompts):  # doctest: +SKIP
        ...     print(stats.update, stats.score, stats.kl)

    Schulman et al. (arXiv 1707.06347), algorithm 1; Ziegler et al. (arXiv 1909.08593), section 2;
    Ahmadian et al. (arXiv 2402.14740); Shao et al. (arXiv 2402.03300), algorithm 1.
    Lesson 04 writes an update out, lesson 09 one without a critic.
    """
    config = config or PPOConfig()
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | Mapping):
        prompts = list(prompts)  # a text would become letters
    for role in config.trained:
        roles.require(role, trainable=True, head=role == "value")
    roles.require("reference", trainable=False)
    if reward_function is None:
        roles.require("reward", trainable=False)
        require_normalised(roles, "reward")
    room = context_length(roles.base) - config.response_length
    encode_prompts(tokenizer, prompts, room)  # raises for what cannot be a prompt, or is too long
    if len(prompts) < config.groups:
        raise ValueError(
            f"there are {len(prompts)} prompts for a batch of {config.groups}; give more, or a "
            "smaller batch_size"
        )
    settings = {"prompts": digest(prompts)}
    if reward_function:
        kind = type(reward_function)
        settings["reward_function"] = getattr(reward_function, "__qualname__", kind.__qualname__)
    run = Run(roles, config.trained, config, folder, settings)
    return _updates(run, prompts, tokenizer, reward_function)


def _updates(run: Run, prompts: list[Prompt], tokenizer: Tokenizer, reward_function):
    roles, config = run.roles, run.config
    beta = run.facts.setdefault("beta", config.beta)
    controller = AdaptiveKL(beta, config.target_kl) if config.target_kl else None
    for update in run.left():
        rng = random.Random(f"{config.seed}-{update}")
        drawn, seed = rng.sample(prompts, config.groups), rng.randrange(2**31)
        asked = [prompt for prompt in drawn for _ in range(config.group_size)]
        arguments = (roles, tokenizer, asked, config, beta, seed, "policy", reward_function)
        with run.diverging("policy", RuntimeError):
            experience = collect_experience(*arguments)
        stats = update_stats(update + 1, experience, beta, _learn(run, experience, beta))
        stop = config.stop_kl is not None and stats.kl > config.stop_kl
        with run.whole_step(last=stop):
            if controller:
                beta = run.facts["beta"] = controller.update(stats.kl)
        yield replace(stats, seconds=run.seconds)


def _learn(run: Run, experience: Experience, beta: float) -> dict[str, list[dict[str, float]]]:
    """All steps of an update; what each role's reported."""
    objectives = {"policy": policy_objective, "value": value_objective}
    reports = {role: [] for role in run.trained}
    for _ in range(run.config.epochs):
        for part in minibatches(experience.rollout, run.config):
            for role in run.trained:
                run.roles.use(role).train()
                with run.diverging(role):
                    loss, report = objectives[role](run.roles, experience, part, run.config, beta)
                report = {"loss": loss.item(), "grad_norm": run.gradients(role, loss), **report}
                run.apply(role)
                reports[role].append(report)
    return reports


def policy_objective(
    roles: Roles, experience: Experience, part: slice, config: PPOConfig, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """The policy's loss on some rows, with the KL penalty if it stands in the loss."""
    logprobs = role_logprobs(roles, "policy", experience.rollout, part, config)
    old, advantages = experience.logprobs[part], experience.advantages[part]
    mask = experience.rollout.response_mask[part]
    switches = config.clip, config.clip_high, config.ratio_of, *config.averaging
    loss, report = policy_loss(logprobs, old, advantages, mask, *switches)
    if config.kl_in == "loss":
        padding, ref_logprobs = mask == 0, experience.ref_logprobs[part]
        pair = (x.masked_fill(padding, 0) for x in (logprobs, ref_logprobs))
        kl = kl_estimate(*pair, config.kl_kind)
        loss = loss + beta * average(kl, mask, *config.averaging)
    return loss, report


def value_objective(
    roles: Roles, experience: Experience, part: slice, config: PPOConfig, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """The critic's loss on some rows; β is in its returns already."""
    values = response_values(roles, "value", experience.rollout, part)
    old, returns = experience.values[part], experience.returns[part]
    mask = experience.rollout.response_mask[part]
    return value_loss(values, old, returns, mask, config.value_clip)


def role_logprobs(
    roles: Roles, role: str, rollout: Rollout, part: slice, config: PPOConfig
) -> Tensor:
    ids, mask = rollout.input_ids[part], rollout.attention_mask[part]
    length = rollout.response_mask.shape[1]
    return response_logprobs(roles.use(role), ids, mask, length, config.temperature)


def minibatches(rollout: Rollout, config: PPOConfig) -> list[slice]:
    """The rows of each of an update's steps."""
    size = config.minibatch_size
    return [slice(start, start + size) for start in range(0, len(rollout.texts), size)]


def update_stats(update: int, experience: Experience, beta: float, learnt: dict) -> PPOStats:
    """What an update reports, from its samples and what each role's steps reported."""
    rollout, mask = experience.rollout, experience.rollout.response_mask
    means = {
        role: {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
        for role, rows in learnt.items()
    }
    return PPOStats(
        update,
        experience,
        score=experience.scores.mean().item(),
        kl=experience.kl.mean().item(),
        beta=beta,
        entropy=-masked_mean(experience.logprobs, mask.bool()).item(),
        length=mask.sum(-1).double().mean().item(),
        finished=rollout.finished.double().mean().item(),
        first_ratio=learnt["policy"][0]["ratio"],
        **{"value": {}} | means,
    )
