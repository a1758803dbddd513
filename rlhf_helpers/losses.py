"""What lessons 03 and 09 derive: rewards per token, advantages, the clipped losses."""

import torch
from torch import Tensor

from rlhf_helpers.guards import refuse, upcast
from rlhf_helpers.kinds import (
    Above,
    B,
    Between,
    Finite,
    Floating,
    From,
    LogProbs,
    Mask,
    OneOf,
    Responses,
    T,
    Whole,
)
from rlhf_helpers.kl import KINDS, kl_estimate
from rlhf_helpers.validation import checked

VARIANCE_EPSILON = 1e-8  # keeps whitening finite where all values are equal
SPREAD_EPSILON = 1e-4  # added to a group's spread, as in TRL
GROUPED = ("rloo", "grpo", "centred")  # advantages of groups
AVERAGES = ("tokens", "responses", "length")
RATIOS = ("token", "response", "mean")


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
def group_advantages(
    scores: Finite[B], group_size: Whole[2], kind: OneOf[GROUPED] = "rloo"
) -> Tensor:
    """Advantages without a critic: several responses to one prompt are each other's baseline.

    With r_1 … r_G the scores of a group, m their mean and s their standard deviation (unbiased):

    - `rloo`: r_i − mean of the *others*, Σ_{j ≠ i} r_j / (G − 1). What is taken off does not depend
      on response i, so the gradient of the expected score stays unbiased.
    - `centred`: r_i − m, which is (G − 1)/G of that: the same direction, a shorter step.
    - `grpo`: (r_i − m)/(s + 1e−4). Every group gets the same weight, however little its responses
      differ; the gradient is no longer that of the expected score.

    Args:
        scores: `[B]`, floating point, one for each response; those of a prompt stand side by side.
        group_size: G, responses to each prompt, at least 2.
        kind: "rloo", "grpo" or "centred".

    Returns:
        `[B]`, float32 (float64 if the scores are); 0 in a group whose scores are all equal. No
        gradient: advantages are data.

    Raises:
        TypeError: scores that are not floating point.
        ValueError: a score that is not finite, a group size below 2 or that does not divide B, or
            an unknown kind.

    Example:
        The first prompt gets 3, 1 and 2: the others' means are 1.5, 2.5 and 2. The second teaches
        nothing.

        >>> scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0, 5.0])
        >>> group_advantages(scores, 3)
        tensor([ 1.5000, -1.5000,  0.0000,  0.0000,  0.0000,  0.0000])
        >>> group_advantages(scores, 3, "centred")
        tensor([ 1., -1.,  0.,  0.,  0.,  0.])
        >>> group_advantages(scores, 3, "grpo")
        tensor([ 0.9999, -0.9999,  0.0000,  0.0000,  0.0000,  0.0000])

    `rloo`: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al.
    (arXiv 2402.14740), where it has this name. `grpo`: Shao et al. (arXiv 2402.03300), section
    4.1.2. `centred`: Liu et al. (arXiv 2503.20783), section 3.2. Derived in lesson 09.
    """
    flat = equal_groups(scores, group_size)
    groups = upcast(scores.detach()).view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if kind == "rloo":
        advantages = advantages * (group_size / (group_size - 1))
    elif kind == "grpo":
        advantages = advantages / (groups.std(-1, keepdim=True) + SPREAD_EPSILON)
    return advantages.masked_fill(flat[:, None], 0).flatten()  # where all are equal: not rounding


@checked
def equal_groups(scores: Finite[B], group_size: Whole[2]) -> Tensor:
    """Which groups teach nothing, since all their responses have one score; `[B / G]`, bool.

    Raises:
        As `group_advantages`.

    Example:
        >>> equal_groups(torch.tensor([1.0, 2.0, 0.5, 0.5]), 2)
        tensor([False,  True])
    """
    if len(scores) % group_size:
        raise ValueError(
            f"{len(scores)} scores are no groups of {group_size}: give whole groups, those of a "
            "prompt side by side."
        )
    groups = scores.view(-1, group_size)
    return groups.amax(-1) == groups.amin(-1)


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
    clip_high: Above[0] | None = None,
    ratio_of: OneOf[RATIOS] = "token",
    mean_over: OneOf[AVERAGES] = "tokens",
    length: Above[0] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """PPO's clipped loss: raise what turned out better than expected, but not far at a time.

    ρ_t = π(a_t) / π_old(a_t), L = −mean_t min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t)

    The ratio is to the policy that *sampled*, not to the reference. What lesson 09 meets under many
    names is this loss with other switches.

    Args:
        logprobs: `[B, T]`, of the sampled tokens under the policy that is trained, in nats.
        old_logprobs: `[B, T]`, under the policy that sampled; data, no gradient goes there.
        advantages: `[B, T]`; data.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0. The mean is over its tokens.
        clip: ε, above 0.
        clip_high: another ε for ratios above 1; None for the same.
        ratio_of: `token`: ρ_t as above. `response`: every token of a response gets the ratio of the
            whole, the product of its ρ_t. `mean`: their geometric mean, (Π ρ_t)^(1/|y|).
        mean_over: see `average`.
        length: of `average`, for `mean_over="length"`.

    Returns:
        The loss, a scalar that is differentiable with respect to `logprobs`, and

        - `ratio`: the mean of ρ; 1 before the first step.
        - `approx_kl`: the mean of ρ − 1 − log ρ, an estimate of KL(π_old‖π) in nats per token; of
          the tokens' own ratios in any case.
        - `clip_fraction`: the share of tokens whose gradient the clip switched off.
        - `entropy`: the mean of −log π(a), the estimate from the sampled tokens, in nats.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that do not match; a mask with a hole or an empty row; an entry under
            the mask that is not finite, or no log-probability; a ratio that overflows; clip not
            above 0; an unknown switch, or a length without `mean_over="length"`.

    Example:
        A token made 1.5 times as likely, with an advantage of 1: beyond 1.2 nothing more is earned.

        >>> old, new = torch.tensor([[0.2]]).log(), torch.tensor([[0.3]]).log()
        >>> loss, stats = policy_loss(new, old, torch.ones(1, 1), torch.ones(1, 1))
        >>> loss, stats["clip_fraction"]
        (tensor(-1.2000), 1.0)

        Beside a token that did not move, the response's geometric mean is √1.5 = 1.2247; it is
        not clipped from above at 1.28.

        >>> old, new = torch.tensor([[0.2, 0.5]]).log(), torch.tensor([[0.3, 0.5]]).log()
        >>> one = torch.ones(1, 2)
        >>> policy_loss(new, old, one, one, clip_high=0.28, ratio_of="mean")[0]
        tensor(-1.2247)

    Schulman et al. (arXiv 1707.06347), equation 7. Two clips: DAPO (arXiv 2503.14476), equation 8;
    the geometric mean: GSPO (arXiv 2507.18071), equations 5 and 7. Derived in lessons 03 and 09.
    """
    real = response_mask.bool()
    data = old_logprobs.detach(), advantages.detach()
    new, old, advantages = (upcast(x).masked_fill(~real, 0) for x in (logprobs, *data))
    log_ratio = new - old
    ratio = _ratio(log_ratio, real, ratio_of)
    refuse("the ratio of new to old", ratio, ~ratio.isfinite(), "look for weights that diverged.")
    high = 1 + (clip if clip_high is None else clip_high)
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, high) * advantages
    loss = -average(torch.minimum(free, clipped), response_mask, mean_over, length)
    stats = {
        "ratio": ratio,
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
        "clip_fraction": (clipped < free).to(ratio),
        "entropy": -new,
    }
    return loss, {name: masked_mean(x.detach(), real).item() for name, x in stats.items()}


def _ratio(log_ratio: Tensor, real: Tensor, of: str) -> Tensor:
    """Of new to old `[B, T]`; that of a response stands at each of its tokens."""
    if of != "token":
        whole = log_ratio.sum(-1, keepdim=True)
        log_ratio = (whole / real.sum(-1, keepdim=True) if of == "mean" else whole) * real
    return log_ratio.exp()


@checked
def average(
    x: Floating[B, T],
    response_mask: Responses[B, T],
    over: OneOf[AVERAGES] = "tokens",
    length: Above[0] | None = None,
) -> Tensor:
    """One number for a batch of responses of unequal lengths |y|, from one for each token.

    - `tokens`: Σ_i Σ_t x_it / Σ_i |y_i|. Each token counts the same, so a long response counts
      more. It depends on who else is in the batch.
    - `responses`: (1/B) Σ_i (1/|y_i|) Σ_t x_it. Each response counts the same, so a token of a long
      one counts less.
    - `length`: (1/B) Σ_i (1/L) Σ_t x_it with a constant L: a sum over tokens, up to the scale.

    Args:
        x: `[B, T]`, floating point; what stands where the mask is 0, even NaN, changes nothing.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0.
        over: "tokens", "responses" or "length".
        length: L, above 0, the most tokens of a response for example; for "length" alone.

    Returns:
        A scalar, differentiable with respect to `x`.

    Raises:
        TypeError: `x` not floating point.
        ValueError: shapes that do not match, a mask with a hole or an empty row, another `over`, a
            length that is not above 0, missing, or given where it is not used.

    Example:
        A response of one token with 4, and one of three tokens with 1 each: 7/4, (4 + 1)/2, and
        (4/5 + 3/5)/2.

        >>> x = torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        >>> mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
        >>> average(x, mask), average(x, mask, "responses"), average(x, mask, "length", length=5)
        (tensor(1.7500), tensor(2.5000), tensor(0.7000))

    `tokens`: DAPO (arXiv 2503.14476), equation 8; `responses`: GRPO (arXiv 2402.03300), equation 3;
    `length`: Dr. GRPO (arXiv 2503.20783), appendix A. Derived in lesson 09.
    """
    if (over == "length") != (length is not None):
        mend = "give the most tokens of a response" if length is None else "it belongs to 'length'"
        raise ValueError(f"length is {length!r} with a mean over {over}: {mend}.")
    real = response_mask.bool()
    if over == "tokens":
        return masked_mean(x, real)
    sums = x.masked_fill(~real, 0).sum(-1)
    return (sums / (real.sum(-1) if over == "responses" else length)).mean()


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
