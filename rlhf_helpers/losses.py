"""What lessons 03 and 04 derive: rewards per token, advantages, the clipped losses."""

import torch
from torch import Tensor

from rlhf_helpers.guards import refuse, upcast
from rlhf_helpers.kinds import Above, B, Between, Finite, From, LogProbs, Mask, OneOf, Responses, T
from rlhf_helpers.kl import KINDS, kl_estimate
from rlhf_helpers.validation import checked

VARIANCE_EPSILON = 1e-8  # keeps whitening finite where all values are equal


@checked
def shape_rewards(
    scores: Finite[B],
    logprobs: LogProbs[B, T],
    ref_logprobs: LogProbs[B, T],
    response_mask: Responses[B, T],
    beta: From[0],
    kind: OneOf[KINDS] = "k1",
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
    mask = response_mask.bool()
    rewards = torch.zeros_like(upcast(logprobs + ref_logprobs + scores[:, None])).detach()
    if beta > 0:
        pair = (x.detach().masked_fill(~mask, 0) for x in (logprobs, ref_logprobs))
        rewards = rewards - beta * kl_estimate(*pair, kind)  # 0 at padding, where both are
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.detach().to(rewards.dtype)[:, None])


@checked
def gae(
    rewards: Finite[B, T],
    values: Finite[B, T],
    response_mask: Responses[B, T],
    gamma: Between[0, 1] = 1.0,
    lam: Between[0, 1] = 0.95,
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


@checked
def whiten(x: Finite[...], mask: Mask[...]) -> Tensor:
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
    real = mask.bool()
    if (count := int(real.sum())) < 2:
        raise ValueError(f"mask counts {count} entries: a spread needs at least 2.")
    values = upcast(x).masked_fill(~real, 0)
    variance, mean = torch.var_mean(values[real])
    return ((values - mean) * (variance + VARIANCE_EPSILON).rsqrt()).masked_fill(~real, 0)


@checked
def policy_loss(
    logprobs: LogProbs[B, T],
    old_logprobs: LogProbs[B, T],
    advantages: Finite[B, T],
    response_mask: Responses[B, T],
    clip: Above[0] = 0.2,
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
    real = response_mask.bool()
    data = old_logprobs.detach(), advantages.detach()
    new, old, advantages = (upcast(x).masked_fill(~real, 0) for x in (logprobs, *data))
    log_ratio = new - old
    ratio = log_ratio.exp()
    refuse("the ratio of new to old", ratio, ~ratio.isfinite(), "look for weights that diverged.")
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.minimum(free, clipped), real)
    stats = {
        "ratio": ratio,
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
        "clip_fraction": (clipped < free).to(ratio),
        "entropy": -new,
    }
    return loss, {name: masked_mean(x.detach(), real).item() for name, x in stats.items()}


@checked
def value_loss(
    values: Finite[B, T],
    old_values: Finite[B, T],
    returns: Finite[B, T],
    response_mask: Responses[B, T],
    clip: Above[0] = 0.2,
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
    real = response_mask.bool()
    data = old_values.detach(), returns.detach()
    new, old, target = (upcast(x).masked_fill(~real, 0) for x in (values, *data))
    free = (new - target).square()
    clipped = (new.clamp(old - clip, old + clip) - target).square()
    loss = masked_mean(torch.maximum(free, clipped), real) / 2
    error, spread = ((x[real]).var(correction=0) for x in (target - new.detach(), target))
    varied = target[real].max() > target[real].min()  # of equal ones the variance is rounding
    return loss, {
        "clip_fraction": masked_mean((clipped > free).to(new), real).item(),
        "explained_variance": (1 - error / spread).item() if varied else float("nan"),
    }


def masked_mean(x: Tensor, real: Tensor) -> Tensor:
    """Mean over the tokens that count; what stands elsewhere, even NaN, changes nothing."""
    return x.masked_fill(~real, 0).sum() / real.sum()
