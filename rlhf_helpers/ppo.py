"""PPO: rewards per token, advantages, the clipped losses, and the loop that uses them."""

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from rlhf_helpers.checkpoints import (
    adam_state,
    finish_first,
    keep_two,
    newest_readable,
    require_no_file,
    restore_adam,
)
from rlhf_helpers.kl import AdaptiveKL, kl_estimate
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.reward import require_reference, score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import Rollout, sample_responses
from rlhf_helpers.text import Prompt, encode_prompts
from rlhf_helpers.training import backward
from rlhf_helpers.validation import (
    check_binary,
    check_floating,
    check_logprobs,
    context_length,
    first_index,
    in_range,
    upcast,
)

VARIANCE_EPSILON = 1e-8  # keeps whitening finite where all values are equal
TRAINED = ("policy", "value")
OPTIMIZER = "optimizer.safetensors"


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    beta: float,
    kind: str = "k1",
) -> Tensor:
    """The reward of each token: the KL penalty everywhere, the score at the last token.

    r_t = −β k(log π(a_t), log π_ref(a_t)) + [t is the last real token] · score

    Args:
        scores: `[B]`, one reward for each whole response, floating point.
        logprobs: `[B, T]`, of the sampled tokens under the policy that sampled them, in nats.
        ref_logprobs: `[B, T]`, of the same tokens under the reference.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0.
        beta: β, the price of a nat; at least 0. At 0 the penalty is not computed at all.
        kind: which estimate of the KL, see `kl.kl_estimate`.

    Returns:
        `[B, T]` rewards, float32 (float64 if any input is), 0 where the mask is 0. A gradient stops
        here: rewards are data.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that do not match; a mask with a hole or an empty row; a score that is
            not finite; β below 0 or not a number; what `kl_estimate` refuses.

    Example:
        Two real tokens, of which the policy finds the first twice as likely as the reference does.

        >>> logprobs = torch.tensor([[0.5, 0.5, 1.0]]).log()
        >>> ref_logprobs = torch.tensor([[0.25, 0.5, 1.0]]).log()
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> shape_rewards(torch.tensor([2.0]), logprobs, ref_logprobs, mask, beta=0.1)
        tensor([[-0.0693,  2.0000,  0.0000]])

    Ziegler et al. (arXiv 1909.08593), equation 2; Stiennon et al. (arXiv 2009.01325), section 3.4.
    Derived in lesson 03.
    """
    _check_all(response_mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_floating("scores", scores)
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(
            f"scores has shape {list(scores.shape)}, response_mask {list(response_mask.shape)}: "
            "give one score for each response, [B]."
        )
    if (index := first_index(~scores.isfinite())) is not None:
        raise ValueError(
            f"scores{index} is {scores[tuple(index)].item()}: not a reward. Look for weights that "
            "diverged."
        )
    if not in_range(beta):
        raise ValueError(f"beta is {beta}: it must be a finite number, 0 or above.")
    mask = response_mask.bool()
    rewards = torch.zeros_like(upcast(logprobs + ref_logprobs + scores[:, None])).detach()
    if beta > 0:
        kl = kl_estimate(
            *(x.detach().masked_fill(~mask, 0) for x in (logprobs, ref_logprobs)), kind
        )
        rewards = rewards - beta * kl  # 0 at padding, where both were set to 0
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.detach().to(rewards.dtype)[:, None])


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: an exponential mix of TD errors.

    δ_t = r_t + γ V_{t+1} − V_t, A_t = Σ_{l ≥ t} (γλ)^{l−t} δ_l, and the critic's target, the
    return, is R_t = A_t + V_t. After the last real token there is no state: V = 0 there.

    Computed as one product of the TD errors with a triangular matrix of weights, `[T, T]`, in
    place of a loop over the tokens from the last to the first.

    Args:
        rewards: `[B, T]`, floating point, see `shape_rewards`.
        values: `[B, T]`, the critic's V before each token.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0.
        gamma: γ, between 0 and 1; 1 counts late rewards in full.
        lam: λ, between 0 and 1; 0 trusts the critic (the TD error alone), 1 the rewards (their
            sum from here on, less V).

    Returns:
        Advantages and returns, `[B, T]` each, float32 (float64 if either input is), 0 where the
        mask is 0. No gradient: both are data.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that do not match; a mask with a hole or an empty row; rewards or values
            that are not finite; γ or λ out of range.

    Example:
        Two tokens, a reward at the end: δ = (0.6 − 0.5, 1 − 0.6), A_0 = 0.1 + 0.95 · 0.4.

        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.6]])
        >>> gae(rewards, values, torch.ones(1, 2))
        (tensor([[0.4800, 0.4000]]), tensor([[0.9800, 1.0000]]))

    Schulman et al. (arXiv 1506.02438), equation 16. Derived in lesson 03.
    """
    _check_all(response_mask, rewards=rewards, values=values)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not in_range(value, 0, 1):
            raise ValueError(f"{name} is {value}: it must be between 0 and 1.")
    padding = ~response_mask.bool()
    rewards, values = (upcast(x.detach()).masked_fill(padding, 0) for x in (rewards, values))
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    with torch.autocast(deltas.device.type, enabled=False):
        advantages = deltas @ gae_weights(deltas.shape[1], gamma * lam).to(deltas)
    return advantages.masked_fill(padding, 0), (advantages + values).masked_fill(padding, 0)


def gae_weights(length: int, decay: float) -> Tensor:
    """The weight of the TD error at l (row) in the advantage at t (column): decay^(l−t), l ≥ t.

    Example:
        >>> gae_weights(3, 0.5)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 1.0000, 0.0000],
                [0.2500, 0.5000, 1.0000]], dtype=torch.float64)
    """
    steps = torch.arange(length)
    powers = decay ** steps.double()
    return powers[(steps[:, None] - steps).clamp(min=0)].tril()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the entries that count.

    (x − μ) / √(s² + 1e−8), with μ the mean and s² the unbiased variance under the mask.

    Args:
        x: any shape, floating point; advantages, never returns: the critic needs their scale.
        mask: of the same shape, 1 where an entry counts.

    Returns:
        As `x`, float32 or float64, 0 where the mask is 0; differentiable.

    Raises:
        TypeError: `x` not floating point.
        ValueError: shapes that differ, an entry under the mask that is not finite, or fewer than
            two entries that count.

    Example:
        >>> whiten(torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor([1, 1, 1, 0]))
        tensor([-1.,  0.,  1.,  0.])

    Huang et al. (arXiv 2403.17031), detail 18. Derived in lesson 03.
    """
    check_floating("x", x)
    _check_binary("mask", mask, x, "x")
    real = mask.bool()
    _check_finite("x", x, real)
    if (count := int(real.sum())) < 2:
        raise ValueError(f"mask counts {count} entries: a spread needs at least 2.")
    values = upcast(x).masked_fill(~real, 0)
    variance, mean = torch.var_mean(values[real])
    return ((values - mean) * (variance + VARIANCE_EPSILON).rsqrt()).masked_fill(~real, 0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip: float = 0.2,
) -> tuple[Tensor, dict[str, float]]:
    """PPO's clipped loss: raise what turned out better than expected, but not far at a time.

    ρ_t = π(a_t) / π_old(a_t), L = −mean_t min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t)

    The ratio is to the policy that *sampled*, not to the reference.

    Args:
        logprobs: `[B, T]`, of the sampled tokens under the policy that is trained, in nats.
        old_logprobs: `[B, T]`, under the policy that sampled; data, no gradient goes there.
        advantages: `[B, T]`; data.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0. The mean is over its tokens.
        clip: ε, above 0.

    Returns:
        The loss, a scalar that is differentiable with respect to `logprobs`, and

        - `ratio`: the mean of ρ; 1 before the first step.
        - `approx_kl`: the mean of ρ − 1 − log ρ, an estimate of KL(π_old‖π) in nats per token.
        - `clip_fraction`: the share of tokens whose gradient the clip switched off.
        - `entropy`: the mean of −log π(a), the estimate from the sampled tokens, in nats.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that do not match; a mask with a hole or an empty row; an entry under
            the mask that is not finite, or no log-probability; a ratio that overflows; clip not
            above 0.

    Example:
        A token made 1.5 times as likely, with an advantage of 1: beyond 1.2 nothing more is earned.

        >>> old, new = torch.tensor([[0.2]]).log(), torch.tensor([[0.3]]).log()
        >>> loss, stats = policy_loss(new, old, torch.ones(1, 1), torch.ones(1, 1))
        >>> loss, stats["clip_fraction"]
        (tensor(-1.2000), 1.0)

    Schulman et al. (arXiv 1707.06347), equation 7. Derived in lesson 03.
    """
    _check_all(response_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    _check_clip(clip)
    real = response_mask.bool()
    new, old, advantages = (
        upcast(x).masked_fill(~real, 0)
        for x in (logprobs, old_logprobs.detach(), advantages.detach())
    )
    check_logprobs("logprobs", new)
    check_logprobs("old_logprobs", old)
    log_ratio = new - old
    ratio = log_ratio.exp()
    _check_finite("the ratio of new to old", ratio, real)
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -_mean(torch.minimum(free, clipped), real)
    stats = {
        "ratio": ratio,
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
        "clip_fraction": (clipped < free).to(ratio),
        "entropy": -new,
    }
    return loss, {name: _mean(x.detach(), real).item() for name, x in stats.items()}


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip: float = 0.2,
) -> tuple[Tensor, dict[str, float]]:
    """The critic's clipped loss: half the squared error, and no reward for moving far at a time.

    L = ½ mean_t max((V_t − R_t)², (clip(V_t, V_old − ε, V_old + ε) − R_t)²)

    Args:
        values: `[B, T]`, of the critic that is trained.
        old_values: `[B, T]`, of the critic at the time of sampling; data.
        returns: `[B, T]`, from `gae`; data.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0. The mean is over its tokens.
        clip: ε, above 0, in units of the reward.

    Returns:
        The loss, a scalar that is differentiable with respect to `values`, and

        - `clip_fraction`: the share of tokens whose gradient the clip switched off.
        - `explained_variance`: 1 − var(R − V)/var(R): 1 for a perfect critic, 0 for one that knows
          the mean alone, below 0 for a worse one; NaN if all returns are equal.

    Raises:
        As `policy_loss`.

    Example:
        An old value of 0, a return of 1, and a new value of 0.5: the clip lets only 0.2 count.

        >>> new, old, target = (torch.tensor([[x]]) for x in (0.5, 0.0, 1.0))
        >>> value_loss(new, old, target, torch.ones(1, 1))[0]  # (0.2 - 1)² / 2
        tensor(0.3200)

    Huang et al. (arXiv 2403.17031), detail 19. Derived in lesson 03.
    """
    _check_all(response_mask, values=values, old_values=old_values, returns=returns)
    _check_clip(clip)
    real = response_mask.bool()
    new, old, target = (
        upcast(x).masked_fill(~real, 0) for x in (values, old_values.detach(), returns.detach())
    )
    free = (new - target).square()
    clipped = (new.clamp(old - clip, old + clip) - target).square()
    loss = _mean(torch.maximum(free, clipped), real) / 2
    error, spread = ((x[real]).var(correction=0) for x in (target - new.detach(), target))
    varied = target[real].max() > target[real].min()  # of equal ones the variance is rounding
    return loss, {
        "clip_fraction": _mean((clipped > free).to(new), real).item(),
        "explained_variance": (1 - error / spread).item() if varied else float("nan"),
    }


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

    updates: int = 30
    batch_size: int = 64
    minibatch_size: int = 32
    epochs: int = 2
    learning_rate: float = 1e-3
    beta: float = 0.1
    kl_kind: str = "k1"
    kl_in: str = "reward"
    target_kl: float | None = None
    stop_kl: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 1.0
    eos_penalty: float = 1.0
    temperature: float = 1.0
    response_length: int = 32
    max_grad_norm: float = 1.0
    save_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("updates", "batch_size", "minibatch_size", "epochs", "response_length")
        for name in (*counts, "save_every"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; give a whole number, at least 1")
        above_0 = ("learning_rate", "max_grad_norm", "temperature", "clip", "value_clip")
        optional = [name for name in ("target_kl", "stop_kl") if getattr(self, name) is not None]
        for name in (*above_0, *optional):
            self._check_range(name, 0, math.inf, "a finite number above 0", open_below=True)
        for name in ("beta", "eos_penalty"):
            self._check_range(name, 0, math.inf, "a finite number, 0 or above")
        for name in ("gamma", "lam"):
            self._check_range(name, 0, 1, "a number between 0 and 1")
        if self.kl_kind not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_kind is {self.kl_kind!r}; choose k1, k2 or k3")
        if self.kl_in not in ("reward", "loss"):
            raise ValueError(f"kl_in is {self.kl_in!r}; choose reward or loss")
        if self.kl_in == "loss" and self.kl_kind == "k1":
            raise ValueError(
                "kl_kind is 'k1' with kl_in='loss': its gradient is 0 on average, so it would hold "
                "nothing back; choose k2 or k3"
            )
        if self.target_kl is not None and self.beta == 0:
            raise ValueError("beta is 0, which no factor can move to a target_kl; begin above 0")
        if self.batch_size % self.minibatch_size:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be divided by minibatch_size "
                f"{self.minibatch_size}; give one that divides it"
            )

    def _check_range(
        self, name: str, low: float, high: float, what: str, open_below: bool = False
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and low <= value <= high and value < math.inf) or (
            open_below and value == low
        ):
            raise ValueError(f"{name} is {value!r}; give {what}")


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
    tokenizer: PreTrainedTokenizerBase,
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
    rollout = sample_responses(
        roles.use(role),
        tokenizer,
        prompts,
        config.response_length,
        temperature=config.temperature,
        seed=seed,
    )
    parts = _minibatches(rollout, config)
    ask = {
        "logprobs": lambda part: _logprobs(roles, role, rollout, part, config),
        "ref_logprobs": lambda part: _logprobs(roles, "reference", rollout, part, config),
        "values": lambda part: response_values(roles, "value", rollout, part),
        "scores": lambda part: score_tokens(
            roles, "reward", rollout.input_ids[part], rollout.attention_mask[part]
        ),
    }
    with torch.no_grad():
        known = {name: torch.cat([of(part) for part in parts]) for name, of in ask.items()}
    known["scores"] = known["scores"] - config.eos_penalty * (~rollout.finished)
    mask = rollout.response_mask
    price = beta if config.kl_in == "reward" else 0.0
    rewards = shape_rewards(
        known["scores"], known["logprobs"], known["ref_logprobs"], mask, price, config.kl_kind
    )
    advantages, returns = gae(rewards, known["values"], mask, config.gamma, config.lam)
    return Experience(
        prompts,
        rollout,
        rewards=rewards,
        advantages=whiten(advantages, mask),
        returns=returns,
        **known,
    )


def response_values(roles: Roles, role: str, rollout: Rollout, part: slice) -> Tensor:
    """The critic's value `[B, T]` of the state before each response token, of some rows.

    The state before token t is the prompt and the response up to t − 1, so its value is read at the
    token before: the same shift by one as that of the logits.
    """
    values = roles.values(role, rollout.input_ids[part], rollout.attention_mask[part])
    return values[:, -rollout.response_mask.shape[1] - 1 : -1]


def train_ppo(
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
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
    config = config or PPOConfig()
    if not isinstance(config, PPOConfig):
        raise TypeError(f"config is {config!r}: give a PPOConfig, such as PPOConfig(**settings).")
    prompts = prompts if isinstance(prompts, str) else list(prompts)  # a text would become letters
    _check_roles(roles)
    room = context_length(roles.base) - config.response_length
    encode_prompts(tokenizer, prompts, room)  # raises for what cannot be a prompt, or is too long
    if len(prompts) < config.batch_size:
        raise ValueError(
            f"there are {len(prompts)} prompts for a batch of {config.batch_size}; give more, or a "
            "smaller batch_size"
        )
    return _Run(roles, prompts, config, folder).updates(tokenizer)


class _Run:
    """Where a PPO run stands, and how that is kept on disk."""

    def __init__(
        self, roles: Roles, prompts: list[Prompt], config: PPOConfig, folder: Path | None
    ) -> None:
        self.roles, self.prompts, self.config = roles, prompts, config
        self.folder = None if folder is None else Path(folder).absolute()
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
        self.settings = {**asdict(config), "prompts": f"{len(prompts)} prompts, digest {digest}"}
        self.controller = AdaptiveKL(config.beta, config.target_kl) if config.target_kl else None
        self.beta, self.update, self.seconds = config.beta, 0, 0.0
        self.kept: int | None = None  # the update of the last save
        moments = {}
        if self.folder is not None:
            self.unfinished = self.folder.with_name(f"{self.folder.name}.unfinished")
            require_no_file(self.folder, self.unfinished)
            moments = self._resume()
        self.optimizers = {
            role: torch.optim.AdamW(
                roles.parameters(role).values(), lr=config.learning_rate, weight_decay=0.0
            )
            for role in TRAINED
        }
        self._restore(moments)

    def updates(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[PPOStats]:
        config, begun = self.config, time.perf_counter() - self.seconds
        if self.kept is None:
            self._save()  # the start, in case the first update is stopped half-way
        while self.update < config.updates:
            rng = random.Random(f"{config.seed}-{self.update}")
            prompts = rng.sample(self.prompts, config.batch_size)
            seed = rng.randrange(2**31)
            try:
                experience = collect_experience(
                    self.roles, tokenizer, prompts, config, self.beta, seed
                )
            except torch.cuda.OutOfMemoryError:  # a RuntimeError too, with a message of its own
                raise
            except (ValueError, RuntimeError) as error:  # the arguments were checked at the start
                raise FloatingPointError(f"{self._where('policy')}: {error}") from error
            learnt = self._learn(experience)
            stats = _report(self.update + 1, experience, self.beta, learnt)
            with finish_first():
                self.update += 1
                self.seconds = time.perf_counter() - begun
                if self.controller:
                    self.beta = self.controller.update(stats.kl)
                stop = config.stop_kl is not None and stats.kl > config.stop_kl
                if stop or self.update == config.updates:
                    self._finish()
                elif self.update % config.save_every == 0:
                    self._save()
            yield replace(stats, seconds=self.seconds)
            if stop:
                return

    def _learn(self, experience: Experience) -> dict[str, list[dict[str, float]]]:
        """All steps of an update; what each role's reported."""
        reports = {role: [] for role in TRAINED}
        for _ in range(self.config.epochs):
            for part in _minibatches(experience.rollout, self.config):
                for role, loss_of in (("policy", self._policy_loss), ("value", self._value_loss)):
                    reports[role].append(self._step(role, loss_of, experience, part))
        return reports

    def _policy_loss(self, experience: Experience, part: slice) -> tuple[Tensor, dict]:
        logprobs = _logprobs(self.roles, "policy", experience.rollout, part, self.config)
        old, advantages = experience.logprobs[part], experience.advantages[part]
        mask = experience.rollout.response_mask[part]
        loss, report = policy_loss(logprobs, old, advantages, mask, self.config.clip)
        if self.config.kl_in == "loss":
            padding, ref_logprobs = mask == 0, experience.ref_logprobs[part]
            pair = (x.masked_fill(padding, 0) for x in (logprobs, ref_logprobs))
            loss = loss + self.beta * _mean(kl_estimate(*pair, self.config.kl_kind), ~padding)
        return loss, report

    def _value_loss(self, experience: Experience, part: slice) -> tuple[Tensor, dict]:
        values = response_values(self.roles, "value", experience.rollout, part)
        old, returns = experience.values[part], experience.returns[part]
        mask = experience.rollout.response_mask[part]
        return value_loss(values, old, returns, mask, self.config.value_clip)

    def _step(
        self, role: str, loss_of: Callable, experience: Experience, part: slice
    ) -> dict[str, float]:
        """Use, forward, backward, step: a role is done with before the next is used."""
        model = self.roles.use(role).train()
        optimizer = self.optimizers[role]
        optimizer.zero_grad()
        try:
            loss, report = loss_of(experience, part)
        except ValueError as error:
            raise FloatingPointError(f"{self._where(role)}: {error}") from error
        self._check_finite(role, "loss", loss)
        parameters = self.roles.parameters(role).values()
        backward(loss, parameters, self.roles)
        norm = clip_grad_norm_(parameters, self.config.max_grad_norm)
        self._check_finite(role, "gradient norm", norm)
        optimizer.step()
        model.eval()
        return {"loss": loss.item(), "grad_norm": norm.item(), **report}

    def _check_finite(self, role: str, name: str, value: Tensor) -> None:
        if not value.isfinite():
            raise FloatingPointError(f"{self._where(role)}: the {name} is {value.item()}")

    def _where(self, role: str) -> str:
        kept = ""
        if self.kept is not None:
            kept = f"; update {self.kept} is kept in '{self.unfinished}'"
        return (
            f"update {self.update + 1} broke off at role {role!r}, with a learning_rate of "
            f"{self.config.learning_rate}, which may be too high{kept}"
        )

    def _save(self) -> None:
        if self.folder is not None and keep_two(self.unfinished, self.update, self._write):
            self.kept = self.update

    def _finish(self) -> None:
        if self.folder is None:
            return
        self.roles.save("policy", self.folder)
        if self.unfinished.exists():  # renamed first: a kill must not leave half of it
            done = self.unfinished.with_name(f"{self.folder.name}.done")
            shutil.rmtree(done, ignore_errors=True)
            os.replace(self.unfinished, done)
            shutil.rmtree(done, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        moments = {}
        for role in TRAINED:
            (folder / role).mkdir()
            self.roles.write(role, folder / role)
            state = adam_state(self.roles.parameters(role), self.optimizers[role])
            moments |= {f"{role}/{name}": tensor for name, tensor in state.items()}
        facts = {"update": self.update, "beta": self.beta, "seconds": self.seconds}
        metadata = {name: repr(value) for name, value in facts.items()}
        metadata["settings"] = json.dumps(self.settings)
        save_file(moments, folder / OPTIMIZER, metadata=metadata)

    def _resume(self) -> dict[str, Tensor]:
        """Load what the newest whole save holds; return the optimizers' moments."""
        found = newest_readable(self.unfinished, self._read)
        if found is None:
            return {}
        folder, (facts, moments) = found
        _check_same_settings(folder, json.loads(facts["settings"]), self.settings)
        for role in TRAINED:
            self.roles.load(role, folder / role, trainable=True)
        self.update = self.kept = int(facts["update"])
        self.beta, self.seconds = float(facts["beta"]), float(facts["seconds"])
        if self.controller:
            self.controller.beta = self.beta
        return moments

    def _read(self, folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Facts and moments of a save; raises if any of its files is missing or damaged."""
        for role in TRAINED:
            self.roles.check_folder(folder / role, head=role == "value")
        with safe_open(folder / OPTIMIZER, "pt") as file:
            return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}

    def _restore(self, moments: dict[str, Tensor]) -> None:
        steps = self.config.batch_size // self.config.minibatch_size * self.config.epochs
        for role in TRAINED if moments else ():
            prefix = f"{role}/"
            own = {k.removeprefix(prefix): t for k, t in moments.items() if k.startswith(prefix)}
            parameters = self.roles.parameters(role)
            restore_adam(parameters, self.optimizers[role], own, self.update * steps)


def _check_same_settings(folder: Path, saved: dict, ours: dict) -> None:
    if changed := [name for name in ours if ours[name] != saved.get(name)]:
        differences = "; ".join(f"{n}: {saved.get(n)} there, {ours[n]} here" for n in changed)
        raise ValueError(
            f"'{folder}' belongs to a run with other settings ({differences}); give those to go on "
            f"with it, or delete '{folder.parent}' to begin anew"
        )


def _check_roles(roles: Roles) -> None:
    for role in (*TRAINED, "reference", "reward"):
        if role not in roles.names:
            raise ValueError(
                f"there is no role {role!r}; there are {roles.names}; PPO needs policy, reference, "
                "reward and value: load or add it first"
            )
    for role in TRAINED:
        roles.parameters(role)  # raises for a frozen one
    for role in ("reference", "reward"):
        if roles.trainable(role):
            raise ValueError(f"role {role!r} is trainable; PPO needs it frozen: trainable=False")
    roles.require_head("value")
    require_reference(roles, "reward")
    if "policy" in roles.heads:
        raise ValueError("role 'policy' has a head, which PPO would not train; add one without")


def _logprobs(roles: Roles, role: str, rollout: Rollout, part: slice, config: PPOConfig) -> Tensor:
    ids, mask, length = (
        rollout.input_ids[part],
        rollout.attention_mask[part],
        rollout.response_mask.shape[1],
    )
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
        entropy=-_mean(experience.logprobs, mask.bool()).item(),
        length=mask.sum(-1).double().mean().item(),
        finished=rollout.finished.double().mean().item(),
        first_ratio=learnt["policy"][0]["ratio"],
        **means,
    )


def _mean(x: Tensor, real: Tensor) -> Tensor:
    """Mean over the tokens that count; what stands elsewhere, even NaN, changes nothing."""
    return x.masked_fill(~real, 0).sum() / real.sum()


def _check_clip(clip: float) -> None:
    if not in_range(clip, above=True):
        raise ValueError(f"clip is {clip}: it must be a finite number above 0; 0.2 is usual.")


def _check_all(response_mask: Tensor, **tensors: Tensor) -> None:
    """Raise unless the tensors fit a `[B, T]` mask of responses and are finite under it."""
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        _check_binary("response_mask", response_mask, tensor, name)
    if response_mask.dim() != 2 or not response_mask.numel():
        raise ValueError(f"response_mask has shape {list(response_mask.shape)}: it must be [B, T].")
    real = response_mask.bool()
    if (row := first_index(~real.any(-1))) is not None:
        raise ValueError(
            f"response_mask row {row[0]} is all zeros: a response has at least its EOS; drop it."
        )
    if (index := first_index(real[:, 1:] & ~real[:, :-1])) is not None:
        raise ValueError(
            f"response_mask row {index[0]} has a hole before column {index[1] + 1}: it must be 1 "
            "up to and including EOS, and 0 from there on."
        )
    for name, tensor in tensors.items():
        _check_finite(name, tensor, real)


def _check_binary(mask_name: str, mask: Tensor, tensor: Tensor, name: str) -> None:
    if mask.shape != tensor.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, {mask_name} {list(mask.shape)}: they must be "
            "equal."
        )
    check_binary(mask_name, mask)


def _check_finite(name: str, tensor: Tensor, real: Tensor) -> None:
    if (index := first_index(~tensor.isfinite() & real)) is not None:
        raise ValueError(
            f"{name} is {tensor[tuple(index)].item()} at {index}: look for weights that diverged, "
            "or a score that was never finite."
        )
