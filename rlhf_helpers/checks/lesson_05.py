"""The checks of lesson 05: log-probabilities under two policies, their KL, the final reward."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from rlhf_helpers import kl, logprobs
from rlhf_helpers.checks.exercise import (
    NO_MEAN,
    NO_MEANS,
    Exercise,
    check,
    check_pair,
    each,
    table,
    texts,
)
from rlhf_helpers.checks.lesson_03 import (
    LOOKUPS,
    NAIVE,
    OTHER_MEANS,
    drawn,
    further_fault,
    pick,
    token_mean,
)
from rlhf_helpers.checks.lesson_03 import SAY as SAY_03
from rlhf_helpers.checks.lesson_04 import (
    OTHER_LOG_RATIOS,
    case_of_odds,
)
from rlhf_helpers.checks.lesson_04 import SAY as SAY_04

SAY = texts("""
reward_scaled (price): β (R - KL)
reward_only (price): β R - KL
one_of_two (price): R less a difference of which β multiplies one half
shared_out (price): (1 - β) R - β KL
reward_at_each (price): a sum in which R stands once for each token
absolute (kl_of): its KL without its sign
clamped (kl_of): its KL cut off at 0 where it is negative
squared (kl_of): its KL squared, halved or not
exponentiated (kl_of): its KL exponentiated
mean (kl_of): the mean over its tokens
same_for_all (kl_of): a mean over the batch
batch_sum (kl_of): the sum over the batch
shifted: the tokens are looked up one position off. These logits are aligned already: those at
    position t predict the token at t, so there is no shift left to make.
logits_as_probs: logits are handed over as probabilities, which is how a Categorical takes its first
    argument. They may be negative and do not sum to 1; give them by their name, logits.
other_sum: the logits of {} less the log-sum-exp of {}. Each policy has a normaliser of its own, as
    it has logits of its own; what is copied from one line to the next keeps its names.
across: the softmax runs over the two policies, as where their logits are stacked. One distribution
    is over the vocabulary, for each policy by itself.
one_policy: both results come from the same logits. The tokens are the same, but the second result
    is what the reference thinks of them.
pair_swapped: the pair is swapped: log_probs_curr comes first, then log_probs_ref. Whatever is made
    of their difference would change its sign.
reversed: it is the other direction, KL(reference‖policy). The penalty weighs each token by how
    often the policy chooses it, so the policy stands first.
terms: it is {}, not Σ p (log p - log q). The KL is the mean of the log-ratio over what the policy
    samples: each token of the vocabulary counts with the probability p that the policy gives it.
not_normalised: logits are subtracted themselves, both or one of them. They are logarithms only up
    to a constant at each position, another one for each policy: take the log-softmax first.
far_apart: it is right for moderate logits, but not where two of them differ by 40 to 150: there a
    softmax loses digits or rounds to 0, and a logarithm, an ε, a clamp or a Categorical made of
    probabilities then does the rest. Take the logarithms straight from the logits.
log_of_log: it is nan everywhere, as a logarithm of numbers below 0 is: of logits, or of
    log-probabilities. kl_div takes its second argument for probabilities and makes the logarithm
    itself, unless log_target says that it is there already.
estimate_swapped: the two are subtracted the wrong way round. Over what the policy samples its own
    log-probability is the larger one on average, so that log_probs_ref is what is taken off.
kl_of: a response pays for {}. The KL of a response is the sum of the log-ratio over its own real
    tokens, and over nothing else.
price: the final reward is {}. It is R - β KL: R as it is, and β as the price of each nat.
paid_out: the penalty is paid out. A response that the policy likes better than the reference does
    must lose by it: check the minus, and which of the two is subtracted from which.
""")

# --- lesson 05: the log-probabilities under two policies -------------------------------------


def sampled_log_probs(
    curr_logits: Tensor, ref_logits: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the same sampled tokens under the current policy and the reference.

    Args:
        curr_logits, ref_logits: `[B, T, V]`, aligned: position t predicts `tokens[:, t]`.
        tokens: `[B, T]`, int64.

    Returns:
        `log_probs_curr` and `log_probs_ref`, `[B, T]` each, in nats.

    Derived in lesson 05.
    """
    log_probs_curr = logprobs.token_logprobs(curr_logits, tokens)
    log_probs_ref = logprobs.token_logprobs(ref_logits, tokens)
    return log_probs_curr, log_probs_ref


def check_sampled_log_probs(fn: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Check the learner's `sampled_log_probs(curr_logits, ref_logits, tokens)`.

    Where it shows a result, log_probs_curr stands first and log_probs_ref below.

    Args:
        fn: returns two tensors `[B, T]`, as `sampled_log_probs` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_sampled_log_probs(sampled_log_probs)
        sampled_log_probs: correct. Tested: one row and several, T = 1, logits of 0 and 150.
    """
    check_pair(SAMPLED_LOG_PROBS, fn)


def _sampled_log_probs(curr_logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.stack(sampled_log_probs(curr_logits, ref_logits, tokens))


def _other_lookup(which: tuple[bool, bool], of: Callable, curr, ref, tokens) -> Tensor:
    """The pair with `of(logits, tokens)` for those of the two policies that `which` marks."""
    pair = zip((curr, ref), which, strict=True)
    return torch.stack(
        [of(z, tokens) if other else logprobs.token_logprobs(z, tokens) for z, other in pair]
    )


def _normalised_by(which: tuple[int, int], *case) -> Tensor:
    """The pair with the logarithms of the sums of those policies, by number."""
    sums = [z.logsumexp(-1, keepdim=True) for z in case[:2]]
    return torch.stack([pick(z - sums[k], case[2]) for z, k in zip(case[:2], which, strict=True)])


def _across(curr: Tensor, ref: Tensor, tokens: Tensor) -> Tensor:
    return torch.stack([pick(z, tokens) for z in torch.stack([curr, ref]).log_softmax(0)])


def _shifted(normalise: Callable, step: int, filled: bool, logits: Tensor, tokens: Tensor):
    """Each token looked up `step` positions on; what has no position is 0, or rolled round."""
    result = pick(normalise(logits, -1).roll(-step, 1), tokens)
    if filled:
        result[:, 0 if step < 0 else -1] = 0
    return result


def _shifted_and_padded(normalise: Callable, logits: Tensor, tokens: Tensor) -> Tensor:
    """As `_shifted` by -1, with the 0 behind the last token in place of before the first."""
    return torch.nn.functional.pad(_shifted(normalise, -1, True, logits, tokens)[:, 1:], (0, 1))


def _probs(logits: Tensor) -> Categorical:
    """Logits taken for probabilities; without a complaint, as where a package switched it off."""
    return Categorical(probs=logits, validate_args=False)


_HAND_CURR = torch.tensor([[[0.0, 0.6931, 0.0], [1.0986, 0.0, 0.0]]])  # 1/4 1/2 1/4, 3/5 1/5 1/5
_HAND_REF = torch.tensor([[[0.6931, 0.0, 0.0], [0.0, 0.0, 0.0]]])  # 1/2 1/4 1/4, 1/3 1/3 1/3
_SAMPLED_CASES = (
    (_HAND_CURR, _HAND_REF, torch.tensor([[1, 1]])),
    (drawn(2, 4, 5, seed=10), drawn(2, 4, 5, seed=11), torch.tensor([[3, 0, 4, 1], [2, 2, 0, 4]])),
    (drawn(3, 1, 4, seed=12), drawn(3, 1, 4, seed=13), torch.tensor([[1], [3], [0]])),
    (
        torch.tensor([[[150.0, 0.0], [0.0, 150.0]]]),
        torch.tensor([[[0.0, 150.0], [150.0, 0.0]]]),
        torch.tensor([[1, 1]]),  # log-probabilities of -150 and 0
    ),
)

_LOOKUPS = (
    *(
        (of, message)
        for f in (torch.log_softmax, *NAIVE)
        for of, message in (
            *(
                (partial(_shifted, f, step, filled), SAY.shifted)
                for step in (1, -1)
                for filled in (True, False)
            ),
            (partial(_shifted_and_padded, f), SAY.shifted),
        )
    ),
    (lambda z, tokens: _probs(z).log_prob(tokens), SAY.logits_as_probs),
    *LOOKUPS,
)
_SAMPLED_MISTAKES = (
    *table(
        lambda f, curr, ref, tokens: _other_lookup((True, True), f, ref, curr, tokens),
        (logprobs.token_logprobs, SAY.pair_swapped),
        *((lambda z, tokens, f=f: pick(f(z, -1), tokens), SAY.pair_swapped) for f in NAIVE),
    ),
    *table(
        _normalised_by,
        ((0, 0), SAY.other_sum.format("the reference", "the policy")),
        ((1, 1), SAY.other_sum.format("the policy", "the reference")),
        ((1, 0), SAY.other_sum.format("each policy", "the other")),
    ),
    (_across, SAY.across),
    *each(SAY.one_policy, lambda k, *case: _sampled_log_probs(case[k], case[k], case[2]), 0, 1),
    *(
        (partial(_other_lookup, which, of), message)
        for of, message in _LOOKUPS
        for which in ((True, True), (True, False), (False, True))
    ),
)
SAMPLED_LOG_PROBS = Exercise(
    "sampled_log_probs",
    _sampled_log_probs,
    _SAMPLED_CASES,
    _SAMPLED_MISTAKES,
    tested="one row and several, T = 1, logits of 0 and 150",
    parts=("log_probs_curr", "log_probs_ref"),
    shape_hint="It is one number for each sampled token: one of the V at its position, not all of "
    "them, and no token is lost to a shift, since the logits are aligned already.",
)


# --- lesson 05: the exact KL -----------------------------------------------------------------


def check_exact_kl(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check the learner's `exact_kl(curr_logits, ref_logits)`.

    Args:
        fn: returns `[B, T]`, as `rlhf_helpers.kl.exact_kl` does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_exact_kl(kl.exact_kl)
        exact_kl: correct. Tested: one row and several, T = 1, policies that agree.
    """
    check(EXACT_KL, fn)


def _exact_kl(curr_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return kl.exact_kl(curr_logits, ref_logits)


def _of_log_softmax(of: Callable, curr: Tensor, ref: Tensor) -> Tensor:
    """What `of` makes of log p and log q, `[B, T, V]`."""
    return of(curr.log_softmax(-1), ref.log_softmax(-1))


def _exact_by(logs: Tensor) -> Tensor:
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1)


def _with_epsilon(p: Tensor, q: Tensor, epsilon: float) -> Tensor:
    return (p * ((p + epsilon) / (q + epsilon)).log()).sum(-1)


def _to_the_middle(p: Tensor, q: Tensor) -> Tensor:
    """KL from the first to the mean of both."""
    return (p.exp() * (p - ((p.exp() + q.exp()) / 2).log())).sum(-1)


_EQUAL = drawn(1, 2, 4, seed=16)
_EXACT_CASES = (
    (_HAND_CURR, _HAND_REF),
    (2 * drawn(2, 3, 4, seed=14), 2 * drawn(2, 3, 4, seed=15)),
    (drawn(3, 1, 5, seed=17), 2 * drawn(3, 1, 5, seed=18)),
    (_EQUAL, _EQUAL + 3),  # a constant changes no probability
)

# float32 still has numbers that small, and a Categorical is right
_GAP_OF_100 = (torch.tensor([[[100.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 100.0, 0.0]]]))
_EXACT_FURTHER = (
    (
        (
            torch.tensor([[[0.0, 150.0, 0.0], [40.0, 0.0, 20.0]]]),
            torch.tensor([[[0.0, 0.0, 0.0], [0.0, 40.0, 0.0]]]),
        ),
        SAY.far_apart,
    ),
    (_GAP_OF_100, SAY.far_apart),
)
_SUMS = (  # of log p and log q
    *(
        (how, lambda p, q, of=of, k=k: k * of(p - q, -1))
        for how, of in (("Σ (log p - log q)/V", torch.mean), ("Σ (log p - log q)", torch.sum))
        for k in (1, -1)
    ),
    ("the largest log p - log q", lambda p, q: (p - q).amax(-1)),
    ("Σ p (log p - log q) divided by V", lambda p, q: (p.exp() * (p - q)).mean(-1)),
    ("Σ p |log p - log q|", lambda p, q: (p.exp() * (p - q).abs()).sum(-1)),
    ("Σ p (log p - log q)²", lambda p, q: (p.exp() * (p - q).square()).sum(-1)),
    ("Σ p (log p - log q)²/2", lambda p, q: (p.exp() * (p - q).square()).sum(-1) / 2),
    ("Σ p (p - q)", lambda p, q: (p.exp() * (p.exp() - q.exp())).sum(-1)),
    ("Σ q (log p - log q)", lambda p, q: (q.exp() * (p - q)).sum(-1)),
    ("the cross-entropy -Σ p log q", lambda p, q: -(p.exp() * q).sum(-1)),
    ("the entropy -Σ p log p", lambda p, q: -(p.exp() * p).sum(-1)),
    *(
        ("a difference of entropies", lambda p, q, k=k: k * (p.exp() * p - q.exp() * q).sum(-1))
        for k in (1, -1)
    ),
    *(
        (how, lambda p, q, k=k: k * ((p.exp() - q.exp()) * (p - q)).sum(-1))
        for how, k in (("the sum of both directions", 1), ("the mean of both directions", 0.5))
    ),
    (
        "the mean of both directions to the middle, as in Jensen and Shannon's divergence",
        lambda p, q: (_to_the_middle(p, q) + _to_the_middle(q, p)) / 2,
    ),
)
_EXACT_MISTAKES = (
    (lambda curr, ref: _exact_kl(ref, curr), SAY.reversed),
    (lambda curr, ref: kl_divergence(_probs(curr), _probs(ref)), SAY.logits_as_probs),
    (lambda curr, ref: kl_divergence(_probs(ref), _probs(curr)), SAY.logits_as_probs),
    (lambda curr, ref: kl_divergence(_probs(curr), Categorical(logits=ref)), SAY.logits_as_probs),
    (lambda curr, ref: kl_divergence(Categorical(logits=curr), _probs(ref)), SAY.logits_as_probs),
    *table(
        _of_log_softmax,
        (lambda p, q: p.sum(-1) * math.nan, SAY.log_of_log),
        *each(SAY.far_apart, lambda e, p, q: _with_epsilon(p.exp(), q.exp(), e), 1e-3, 1e-4, 1e-5),
        *((of, SAY.terms.format(how)) for how, of in _SUMS),
    ),
    *each(
        SAY.not_normalised,
        lambda of, curr, ref: (curr.softmax(-1) * of(curr, ref)).sum(-1),
        lambda curr, ref: curr - ref,
        lambda curr, ref: curr.log_softmax(-1) - ref,
        lambda curr, ref: curr - ref.log_softmax(-1),
    ),
    *each(
        SAY_03.wrong_dimension,
        lambda d, curr, ref: (curr.softmax(d) * (curr.log_softmax(d) - ref.log_softmax(d))).sum(-1),
        0,
        1,
    ),
    (lambda curr, ref: _exact_by(torch.stack([curr, ref]).log_softmax(0)), SAY.across),
)
EXACT_KL = Exercise(
    "exact_kl",
    _exact_kl,
    _EXACT_CASES,
    _EXACT_MISTAKES,
    tested="one row and several, T = 1, policies that agree",
    further=lambda fn: further_fault(EXACT_KL, _EXACT_FURTHER, fn, gradient=False, dtype=False),
    shape_hint="It is one number for each position: summed over the vocabulary, and over nothing "
    "else.",
)


# --- lesson 05: the estimate from sampled tokens ---------------------------------------------


def estimate_kl(log_probs_curr: Tensor, log_probs_ref: Tensor, response_mask: Tensor) -> Tensor:
    """Estimate of the KL per token: the mean of the log-ratio over all real tokens of the batch.

    Args:
        log_probs_curr: `[B, T]`, of the tokens under the policy that sampled them, in nats.
        log_probs_ref: `[B, T]`, of the same tokens under the reference.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0.

    Returns:
        A scalar tensor, in nats per token.

    Derived in lesson 05.
    """
    real = response_mask.bool()
    return kl.kl_estimate(log_probs_curr[real], log_probs_ref[real]).mean()


def check_estimate_kl(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Check the learner's `estimate_kl(log_probs_curr, log_probs_ref, response_mask)`.

    Args:
        fn: returns a scalar tensor, as `estimate_kl` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_estimate_kl(estimate_kl)
        estimate_kl: correct. Tested: padding, full rows, an estimate below 0.
    """
    check(ESTIMATE_KL, fn)


def _other_term(of: Callable, curr: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens of something else than the log-ratio."""
    return token_mean(of(curr, ref), mask)


def _other_mean(of: Callable, curr: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """Another mean of the log-ratio."""
    return of(curr - ref, mask)


def _pair_of_odds(ratios: list, mask: list) -> tuple:
    return case_of_odds([], ratios, mask, 0.0)[1:4]


_HAND_PAIR = (
    torch.tensor([[0.5, 0.2, 0.9]]).log(),  # 0.9 is padding
    torch.tensor([[0.25, 1 / 3, 0.3]]).log(),
    torch.tensor([[1, 1, 0]]),
)
_ENDS = torch.tensor([[2], [5], [1]])
_ESTIMATE_CASES = (
    _HAND_PAIR,
    _pair_of_odds([[3.0, 2.5, 1.5, 0.2], [0.4, 2.0, 4.0, 0.8]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
    _pair_of_odds(
        [[0.5, 0.8, 2.0], [0.3, 1.5, 4.0], [1.0, 3.0, 2.0]], [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    ),  # an estimate below 0, and a token on which both agree
    (-drawn(3, 5, seed=20).abs(), -drawn(3, 5, seed=21).abs(), (torch.arange(5) < _ENDS).long()),
    (-drawn(2, 3, seed=22).abs(), -drawn(2, 3, seed=23).abs(), torch.ones(2, 3).long()),
)

_ESTIMATE_MISTAKES = (
    (lambda curr, ref, mask: estimate_kl(ref, curr, mask), SAY.estimate_swapped),
    *table(
        _other_mean,
        (lambda x, mask: -x.mean(), SAY.estimate_swapped),
        *OTHER_MEANS,
    ),
    *((partial(_other_term, of), message) for of, message in OTHER_LOG_RATIOS),
    (lambda curr, ref, mask: token_mean(curr - ref, curr.exp() * mask), SAY_04.weighted),
    (lambda curr, ref, mask: (curr.exp() * (curr - ref) * mask).sum(), SAY_04.weighted),
    *(
        (lambda curr, ref, mask, of=of, n=n: of(curr, ref, mask) / n(mask), SAY_04.half_masked)
        for of in (
            lambda curr, ref, mask: (curr - ref * mask).sum(),
            lambda curr, ref, mask: (curr * mask - ref).sum(),
        )
        for n in (lambda mask: mask.sum(), lambda mask: mask.numel())
    ),
)
ESTIMATE_KL = Exercise(
    "estimate_kl",
    estimate_kl,
    _ESTIMATE_CASES,
    _ESTIMATE_MISTAKES,
    tested="padding, full rows, an estimate below 0",
    shape_hint="It is one number for the batch, the mean over all real tokens.",
)


# --- lesson 05: the final reward -------------------------------------------------------------


def final_reward(
    rewards_model: Tensor,
    log_probs_curr: Tensor,
    log_probs_ref: Tensor,
    response_mask: Tensor,
    beta: float,
) -> Tensor:
    """The reward of each response less β times its KL, the sum of the log-ratio over its tokens.

    Args:
        rewards_model: `[B]`, from the reward model.
        log_probs_curr, log_probs_ref: `[B, T]`, in nats.
        response_mask: `[B, T]`, 1 up to and including EOS, then 0.
        beta: β, at least 0.

    Returns:
        `[B]`.

    Derived in lesson 05; `losses.shape_rewards` shares it out among the tokens.
    """
    return rewards_model - beta * ((log_probs_curr - log_probs_ref) * response_mask).sum(-1)


def check_final_reward(fn: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check `final_reward(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta)`.

    Args:
        fn: returns `[B]`, as `final_reward` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_final_reward(final_reward)
        final_reward: correct. Tested: padding, a response of EOS alone, β of 0 to 2, KL below 0.
    """
    check(FINAL_REWARD, fn)


def _row_sum(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(1)


def _by_row(of: Callable, x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([of(row[real]) for row, real in zip(x, mask.bool(), strict=True)])


def _other_kl(of: Callable, rewards, curr, ref, mask, beta) -> Tensor:
    """The final reward with another KL, of both log-probabilities and the mask."""
    return rewards - beta * of(curr, ref, mask)


def _other_price(of: Callable, rewards, curr, ref, mask, beta) -> Tensor:
    """The final reward with β elsewhere, of the rewards, the right KL and β."""
    return of(rewards, _row_sum(curr - ref, mask), beta)


_FINAL_CASES = (
    (torch.tensor([2.0]), *_HAND_PAIR, 0.1),
    case_of_odds(
        [1.5, -2.0, 0.5],
        [[3.0, 0.5, 1.5, 2.0], [0.25, 2.0, 1.2, 0.4], [1.25, 3.0, 0.2, 0.7]],
        [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
        0.5,
    ),
    case_of_odds(
        [-1.0, 3.0],
        [[2.0, 1.5, 3.0, 0.4, 5.0], [4.0, 0.6, 2.5, 1.1, 0.3]],
        [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]],
        2.0,
    ),
    case_of_odds([0.7], [[2.0, 0.5, 3.0]], [[1, 1, 0]], 0.0),
)

_FINAL_MISTAKES = (
    *table(
        _other_kl,
        (lambda curr, ref, mask: _row_sum(ref - curr, mask), SAY.paid_out),
        (lambda curr, ref, mask: (ref - curr).sum(1), SAY.paid_out),
        (lambda curr, ref, mask: _row_sum(curr - ref, mask) / mask.sum(1), SAY.mean),
        (lambda curr, ref, mask: ((curr - ref) * mask).mean(1), SAY.mean),
        (lambda curr, ref, mask: (curr - ref).mean(1), SAY.mean),
        (lambda curr, ref, mask: _row_sum(curr - ref, mask).mean(), SAY.same_for_all),
        (lambda curr, ref, mask: token_mean(curr - ref, mask), SAY.same_for_all),
        (lambda curr, ref, mask: (curr - ref).mean(), SAY.same_for_all),
        (lambda curr, ref, mask: ((curr - ref) * mask).mean(), SAY.same_for_all),
        (lambda curr, ref, mask: ((curr - ref) * mask).sum(), SAY.batch_sum),
        *table(lambda of, curr, ref, mask: _row_sum(of(curr, ref), mask), *OTHER_LOG_RATIOS),
        *table(
            lambda of, curr, ref, mask: of(_row_sum(curr - ref, mask)),
            (torch.abs, SAY.absolute),
            (lambda x: x.clamp(min=0), SAY.clamped),
            (torch.square, SAY.squared),
            (lambda x: x.square() / 2, SAY.squared),
            (torch.exp, SAY.exponentiated),
        ),
        (lambda curr, ref, mask: (curr - ref * mask).sum(1), SAY_04.half_masked),
        (lambda curr, ref, mask: (curr * mask - ref).sum(1), SAY_04.half_masked),
        (lambda curr, ref, mask: (curr - ref).gather(1, mask).sum(1), SAY_03.integer_mask),
        *each(NO_MEAN, lambda of, curr, ref, mask: _by_row(of, curr - ref, mask), *NO_MEANS),
    ),
    *table(
        _other_price,
        (lambda rewards, kl, beta: beta * (rewards - kl), SAY.reward_scaled),
        (lambda rewards, kl, beta: beta * rewards - kl, SAY.reward_only),
        (lambda rewards, kl, beta: (1 - beta) * rewards - beta * kl, SAY.shared_out),
    ),
    *table(
        lambda of, r, curr, ref, mask, beta: r - _row_sum(of(curr, ref, beta), mask),
        (lambda curr, ref, beta: beta * curr - ref, SAY.one_of_two),
        (lambda curr, ref, beta: curr - beta * ref, SAY.one_of_two),
    ),
    *(
        (lambda r, *case, of=of: (of(case[2]) - 1) * r + final_reward(r, *case), SAY.reward_at_each)
        for of in (lambda mask: mask.sum(1), lambda mask: mask.shape[1])
    ),
)
FINAL_REWARD = Exercise(
    "final_reward",
    final_reward,
    _FINAL_CASES,
    _FINAL_MISTAKES,
    tested="padding, a response of EOS alone, β of 0 to 2, KL below 0",
    shape_hint="It is one number for each response: what its tokens pay is added up.",
)
