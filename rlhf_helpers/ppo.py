"""PPO: one update, and the loop."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers.guards import context_length
from rlhf_helpers.kinds import Above, Between, From, OneOf, Whole
from rlhf_helpers.kl import KINDS, AdaptiveKL, kl_estimate
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.losses import gae, masked_mean, policy_loss, shape_rewards, value_loss, whiten
from rlhf_helpers.reward import require_normalised, score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import Rollout, sample_responses
from rlhf_helpers.text import Prompt, encode_prompts
from rlhf_helpers.training import Run, digest, settings_of
from rlhf_helpers.validation import check_fields

TRAINED = ("policy", "value")
PLACES = ("reward", "loss")  # of the KL penalty


@dataclass(frozen=True)
class PPOConfig:
    """Settings of `train_ppo`.

    Args:
        updates: rounds of sampling and learning.
        batch_size: responses sampled for an update, each to another prompt.
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
        gamma, lam: see `gae`.
        clip, value_clip: see `policy_loss` and `value_loss`.
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
    gamma: Between[0, 1] = 1.0
    lam: Between[0, 1] = 0.95
    clip: Above[0] = 0.2
    value_clip: Above[0] = 1.0
    eos_penalty: From[0] = 1.0
    temperature: Above[0] = 1.0
    response_length: Whole[1] = 32
    max_grad_norm: Above[0] = 1.0
    save_every: Whole[1] = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kl_in == "loss" and self.kl_kind == "k1":
            raise ValueError(
                "kl_kind is 'k1' with kl_in='loss': its gradient is 0 on average; choose k2 or k3"
            )
        if self.target_kl is not None and self.beta == 0:
            raise ValueError("beta is 0, which no factor can move to a target_kl; begin above 0")
        if self.batch_size % self.minibatch_size:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be divided by minibatch_size "
                f"{self.minibatch_size}; give one that divides it"
            )

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
        values: `[B, T]`, the critic's, before each token.
        rewards, advantages, returns: `[B, T]`; the advantages are whitened.
    """

    prompts: list[Prompt]
    rollout: Rollout
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

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
            `policy_loss` and `value_loss` report.
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


def collect_experience(
    roles: Roles,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    config: PPOConfig,
    beta: float,
    seed: int,
    role: str = "policy",
) -> Experience:
    """Sample a response to each prompt and ask all four roles about it. Nothing is learnt here.

    The log-probabilities are those of a forward pass like the ones that training makes, in the same
    minibatches, so that the first ratio is exactly 1.

    Args:
        roles: with `policy`, `reference`, `reward` and `value`.
        beta: β of this round; `config.beta` may have been adapted.
        seed: of the samples.
        role: who answers; `reference` to see what the policy started from.
    """
    length, options = config.response_length, {"temperature": config.temperature, "seed": seed}
    rollout = sample_responses(roles.use(role), tokenizer, prompts, length, **options)
    parts = _minibatches(rollout, config)
    ask = (
        lambda part: role_logprobs(roles, role, rollout, part, config),
        lambda part: role_logprobs(roles, "reference", rollout, part, config),
        lambda part: response_values(roles, "value", rollout, part),
        lambda part: score_tokens(
            roles, "reward", rollout.input_ids[part], rollout.attention_mask[part]
        ),
    )
    with torch.no_grad():
        logprobs, ref_logprobs, values, scores = (torch.cat([f(x) for x in parts]) for f in ask)
    scores = scores - config.eos_penalty * (~rollout.finished)
    mask, price = rollout.response_mask, beta if config.kl_in == "reward" else 0.0
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, price, config.kl_kind)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    shaped = {"rewards": rewards, "advantages": whiten(advantages, mask), "returns": returns}
    return Experience(prompts, rollout, scores, logprobs, ref_logprobs, values, **shaped)


def response_values(roles: Roles, role: str, rollout: Rollout, part: slice) -> Tensor:
    """The critic's value `[B, T]` of the state before each response token, of some rows.

    The state before token t is the prompt and the response up to t − 1, so its value is read at the
    token before: the same shift by one as that of the logits.
    """
    values = roles.values(role, rollout.input_ids[part], rollout.attention_mask[part])
    return values[:, -rollout.response_mask.shape[1] - 1 : -1]


def train_ppo(
    roles: Roles,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    config: PPOConfig | None = None,
    folder: Path | None = None,
) -> Iterator[PPOStats]:
    """Train the policy against the reward model: one update for each item drawn.

    Each update samples responses to `batch_size` prompts, scores them, and takes
    `epochs` × `batch_size`/`minibatch_size` steps of Adam on the policy, and as many on the critic.
    The two share no weight, so each has its loss and its optimizer, and there is no coefficient
    between them.

    With a `folder`, the run is kept in `<folder>.unfinished` after each update. The same call goes
    on from there, on a CPU to the same weights bit for bit as a run that was never stopped. The
    finished policy goes to `folder`.

    Args:
        roles: `policy` and `value` trainable, the latter with a head; `reference` and `reward`
            frozen, the latter with a normalised head.
        prompts: at least `batch_size` questions or dialogues to draw from.

    Yields:
        `PPOStats`.

    Raises:
        TypeError: for a `config` that is no PPOConfig, or prompts that are not texts.
        ValueError: for roles that are missing or not as above, too few prompts, or an unfinished
            run with another configuration; nothing has been computed or overwritten then.
        NotADirectoryError: if a file is in the place of the folder.
        FloatingPointError: if a loss or gradient is not finite; what was saved last is kept.

    Example:
        >>> for stats in train_ppo(roles, tokenizer, prompts):  # doctest: +SKIP
        ...     print(stats.update, stats.score, stats.kl)

    Schulman et al. (arXiv 1707.06347), algorithm 1; Ziegler et al. (arXiv 1909.08593), section 2.
    Lesson 04 writes an update out.
    """
    config = settings_of(PPOConfig, config)
    prompts = prompts if isinstance(prompts, str) else list(prompts)  # a text would become letters
    for role in TRAINED:
        roles.require(role, trainable=True, head=role == "value")
    for role in ("reference", "reward"):
        roles.require(role, trainable=False)
    require_normalised(roles, "reward")
    room = context_length(roles.base) - config.response_length
    encode_prompts(tokenizer, prompts, room)  # raises for what cannot be a prompt, or is too long
    if len(prompts) < config.batch_size:
        raise ValueError(
            f"there are {len(prompts)} prompts for a batch of {config.batch_size}; give more, or a "
            "smaller batch_size"
        )
    run = Run(roles, TRAINED, config, folder, {"prompts": digest(prompts)})
    return _updates(run, prompts, tokenizer)


def _updates(run: Run, prompts: list[Prompt], tokenizer: Tokenizer):
    roles, config = run.roles, run.config
    beta = run.facts.setdefault("beta", config.beta)
    controller = AdaptiveKL(beta, config.target_kl) if config.target_kl else None
    for update in run.left():
        rng = random.Random(f"{config.seed}-{update}")
        asked, seed = rng.sample(prompts, config.batch_size), rng.randrange(2**31)
        with run.diverging("policy", RuntimeError):
            experience = collect_experience(roles, tokenizer, asked, config, beta, seed)
        stats = _report(update + 1, experience, beta, _learn(run, experience, beta))
        stop = config.stop_kl is not None and stats.kl > config.stop_kl
        with run.whole_step(last=stop):
            if controller:
                beta = run.facts["beta"] = controller.update(stats.kl)
        yield replace(stats, seconds=run.seconds)


def _learn(run: Run, experience: Experience, beta: float) -> dict[str, list[dict[str, float]]]:
    """All steps of an update; what each role's reported."""
    objectives = {"policy": policy_objective, "value": value_objective}
    reports = {role: [] for role in TRAINED}
    for _ in range(run.config.epochs):
        for part in _minibatches(experience.rollout, run.config):
            for role, objective in objectives.items():
                run.roles.use(role).train()
                with run.diverging(role):
                    loss, report = objective(run.roles, experience, part, run.config, beta)
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
    loss, report = policy_loss(logprobs, old, advantages, mask, config.clip)
    if config.kl_in == "loss":
        padding, ref_logprobs = mask == 0, experience.ref_logprobs[part]
        pair = (x.masked_fill(padding, 0) for x in (logprobs, ref_logprobs))
        loss = loss + beta * masked_mean(kl_estimate(*pair, config.kl_kind), ~padding)
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


def _minibatches(rollout: Rollout, config: PPOConfig) -> list[slice]:
    size = config.minibatch_size
    return [slice(start, start + size) for start in range(0, len(rollout.texts), size)]


def _report(update: int, experience: Experience, beta: float, learnt: dict) -> PPOStats:
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
        **means,
    )
