"""KL divergence between two policies: the exact sum, and estimates from sampled tokens."""

import math

import torch
from torch import Tensor

from rlhf_helpers.guards import check_softmax, in_range, refuse, upcast
from rlhf_helpers.kinds import Above, Distributions, Floating, LogProbs, OneOf, V
from rlhf_helpers.validation import checked

KINDS = ("k1", "k2", "k3")  # of `kl_estimate`


@checked
def exact_kl(logits_p: Floating[..., V], logits_q: Floating[..., V]) -> Tensor:
    """KL divergence KL(p‖q) at each position, summed over the whole vocabulary.

    KL(p‖q) = Σ_a p(a) (log p(a) − log q(a)), with p and q the softmax of the logits. A token with
    p(a) = 0 contributes 0; one with p(a) > 0 and q(a) = 0 makes the divergence infinite. It is not
    symmetric: the KL penalty of RLHF has the policy as p and the reference as q.

    This makes several tensors of the logits' size. It is the true value to hold estimates against
    where the vocabulary is small; for a large one, use `kl_estimate`.

    Args:
        logits_p: `[..., V]`, floating point; float16 and bfloat16 are computed in float32.
        logits_q: `[..., V]`, as `logits_p`, over the same vocabulary.

    Returns:
        `[...]` divergences in nats, at least 0 up to rounding, float32 (float64 if either input
        is), differentiable with respect to both.

    Raises:
        TypeError: logits not floating point.
        ValueError: shapes that differ, or logits without a softmax (NaN, +inf, or −inf only).

    Example:
        1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3 = 0.1438 one way round, and
        1/4 log 1/2 + 3/4 log 3/2 = 0.1308 the other.

        >>> logits_p = torch.tensor([0.5, 0.5]).log()
        >>> logits_q = torch.tensor([0.25, 0.75]).log()
        >>> exact_kl(logits_p, logits_q)
        tensor(0.1438)
        >>> exact_kl(logits_q, logits_p)
        tensor(0.1308)

    Kullback and Leibler, "On Information and Sufficiency" (1951), section 2. Derived in lesson 05.
    """
    logprobs_p, logprobs_q = upcast(logits_p).log_softmax(-1), upcast(logits_q).log_softmax(-1)
    check_softmax("logits_p", logprobs_p[..., 0])  # one bad logit makes its whole row NaN
    check_softmax("logits_q", logprobs_q[..., 0])
    # 0 * log 0 is 0, but 0 * -inf is NaN.
    log_ratio = (logprobs_p - logprobs_q).masked_fill(logprobs_p == -torch.inf, 0.0)
    return (logprobs_p.exp() * log_ratio).sum(-1)


@checked
def kl_estimate(
    logprobs: LogProbs[...],
    ref_logprobs: LogProbs[...],
    kind: OneOf[KINDS] = "k1",
) -> Tensor:
    """Estimate of KL(policy‖reference) from each token that the policy sampled.

    With r = log π_ref(a) − log π(a) and a sampled from the policy π:

    - k1 = −r: unbiased; may be negative, high variance.
    - k2 = r² / 2: never negative; biased, little when the two policies are close.
    - k3 = eʳ − 1 − r: unbiased and never negative.

    "Unbiased" is about the value and only for samples of π, the policy whose log-probabilities come
    first. The gradient is another matter: that of k1 is 0 on average, so it is a penalty to put in
    the reward and not a loss to differentiate.

    Args:
        logprobs: `[...]`, log-probabilities of the tokens under the policy that sampled them, in
            nats, floating point; float16 and bfloat16 are computed in float32.
        ref_logprobs: `[...]`, those of the same tokens under the reference, without gradient.
        kind: "k1", "k2" or "k3".

    Returns:
        `[...]` estimates in nats, one per token, float32 (float64 if either input is). Sum them
        over a response, under `response_mask`, for an estimate of the response's KL.

    Raises:
        TypeError: inputs not floating point.
        ValueError: shapes that differ, an unknown `kind`, NaN, a log-probability above 0 (more
            than rounding explains), one of −inf under the policy, which cannot have sampled it, or
            a reference that requires a gradient.

    Example:
        The policy gave 1/2 to both tokens, the reference 1/4 and 3/4: eʳ is 1/2 and 3/2. The
        averages of k1 and of k3 are 0.1438, the exact KL; that of k2 is 0.1612.

        >>> logprobs = torch.tensor([0.5, 0.5]).log()
        >>> ref_logprobs = torch.tensor([0.25, 0.75]).log()
        >>> kl_estimate(logprobs, ref_logprobs, "k1")  # log 2, log 2/3
        tensor([ 0.6931, -0.4055])
        >>> kl_estimate(logprobs, ref_logprobs, "k2")  # half of their squares
        tensor([0.2402, 0.0822])
        >>> kl_estimate(logprobs, ref_logprobs, "k3")  # -1/2 + log 2, 1/2 + log 2/3
        tensor([0.1931, 0.0945])

    Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html, where
    e^r is called r. Derived in lesson 05.
    """
    never = "the policy cannot have sampled a token of probability 0. Give its own"
    refuse("logprobs", logprobs, logprobs == -torch.inf, f"{never} log-probabilities first.")
    if ref_logprobs.requires_grad:
        mend = "compute it under torch.no_grad(), or pass ref_logprobs.detach()."
        raise ValueError(f"ref_logprobs requires a gradient, and the reference is frozen: {mend}")
    r = upcast(ref_logprobs) - upcast(logprobs)
    if kind == "k1":
        return -r
    if kind == "k2":
        return r.square() / 2
    return torch.expm1(r) - r  # exp(r) - 1 would lose a small r to rounding


@checked
def estimator_moments(
    logprobs: Distributions[..., V], ref_logprobs: Distributions[..., V], kind: OneOf[KINDS] = "k1"
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of an estimate over all tokens that the policy could sample.

    μ = Σ_a π(a) k(a), σ² = Σ_a π(a) (k(a) − μ)²

    The mean is exact, so μ − KL(π‖π_ref) is the estimate's bias, and n samples have a standard
    error of σ/√n.

    Args:
        logprobs: `[..., V]`, of *every* token of the vocabulary under the policy, in nats.
        ref_logprobs: `[..., V]`, under the reference.
        kind: "k1", "k2" or "k3", see `kl_estimate`.

    Returns:
        Two tensors `[...]` in nats, float32 (float64 if either input is).

    Raises:
        TypeError, ValueError: as `kl_estimate`; and for log-probabilities whose probabilities do
            not sum to 1, as logits would.

    Example:
        k1 is log 2 or log 2/3, each with probability 1/2: around 0.1438, half of log 3 each way.

        >>> logprobs = torch.tensor([0.5, 0.5]).log()
        >>> ref_logprobs = torch.tensor([0.25, 0.75]).log()
        >>> mean, std = estimator_moments(logprobs, ref_logprobs)
        >>> round(mean.item(), 4), round(std.item(), 4)
        (0.1438, 0.5493)

    Derived in lesson 05.
    """
    values = kl_estimate(logprobs, ref_logprobs, kind)
    probabilities = upcast(logprobs).exp()
    mean = (probabilities * values).sum(-1)
    variance = (probabilities * (values - mean[..., None]).square()).sum(-1)
    return mean, variance.sqrt()


class AdaptiveKL:
    """A controller that moves β so that the KL comes near a target.

    β ← β (1 + K · clip(KL/target − 1, −0.2, 0.2)), after each update.

    Args:
        beta: β to begin with; above 0, since a factor cannot move 0.
        target: of the KL, in nats per response; above 0.
        gain: K, below 5. Ziegler et al. take 0.1, for thousands of updates; a run of some dozens
            needs more.

    Attributes:
        beta: β now.

    Raises:
        ValueError: for a number that is not finite and above 0, or a gain that is too large; of
            `update`, for a KL that is not finite.

    Example:
        KL is twice the target, which counts as 0.2 too much.

        >>> round(AdaptiveKL(beta=0.1, target=3.0, gain=0.5).update(6.0), 6)
        0.11

    Ziegler et al. (arXiv 1909.08593), section 2.2. Derived in lesson 05.
    """

    @checked
    def __init__(self, beta: Above[0], target: Above[0], gain: Above[0] = 0.5) -> None:
        if gain >= 5:
            raise ValueError(f"gain is {gain}: give less than 5, or β would fall to 0 or below.")
        self.beta, self.target, self.gain = beta, target, gain

    def update(self, kl: float) -> float:
        """Move β by what one update's KL, in nats per response, says; return it."""
        if not in_range(kl, low=-math.inf, above=True):
            raise ValueError(f"kl is {kl}: it must be finite; look for an update that diverged.")
        error = max(-0.2, min(0.2, kl / self.target - 1))
        self.beta *= 1 + self.gain * error
        return self.beta
