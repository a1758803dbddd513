"""The checks of lesson 05: log-probabilities under two policies, their KL, the final reward."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from rlhf_helpers import kl, logprobs, ppo
from rlhf_helpers.checks.exercise import EPSILONS, Exercise, check, check_pair
from rlhf_helpers.checks.lesson_03 import (
    CUT_OFF,
    GREEDY,
    NAIVE,
    NOT_FINITE,
    SURPRISE,
    WRONG_DIMENSION,
    drawn,
    pick,
    token_mean,
)
from rlhf_helpers.checks.lesson_04 import case_of_odds, last_token, mean_of_row

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
    check_pair(SAMPLED_LOG_PROBS, fn, ("log_probs_curr", "log_probs_ref"))


def _sampled_log_probs(curr_logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.stack(sampled_log_probs(curr_logits, ref_logits, tokens))


def _other_lookup(which: tuple[bool, bool], of: Callable, curr, ref, tokens) -> Tensor:
    """The pair with `of(logits, tokens)` for those of the two policies that `which` marks."""
    pair = zip((curr, ref), which, strict=True)
    return torch.stack(
        [of(z, tokens) if other else logprobs.token_logprobs(z, tokens) for z, other in pair]
    )


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


def _over_vocabulary(of: Callable, normalise: Callable, logits: Tensor, tokens: Tensor) -> Tensor:
    return of(normalise(logits, -1))


_HAND_CURR = torch.tensor([[[0.0, 0.6931, 0.0], [1.0986, 0.0, 0.0]]])  # 1/4 1/2 1/4, 3/5 1/5 1/5
_HAND_REF = torch.tensor([[[0.6931, 0.0, 0.0], [0.0, 0.0, 0.0]]])  # 1/2 1/4 1/4, 1/3 1/3 1/3
_SAMPLED_CASES = (
    (_HAND_CURR, _HAND_REF, torch.tensor([[1, 1]])),
    (
        drawn(2, 4, 5, seed=10),
        drawn(2, 4, 5, seed=11),
        torch.tensor([[3, 0, 4, 1], [2, 2, 0, 4]]),
    ),
    (drawn(3, 1, 4, seed=12), drawn(3, 1, 4, seed=13), torch.tensor([[1], [3], [0]])),
    (
        torch.tensor([[[150.0, 0.0], [0.0, 150.0]]]),
        torch.tensor([[[0.0, 150.0], [150.0, 0.0]]]),
        torch.tensor([[1, 1]]),  # log-probabilities of -150 and 0
    ),
)

_SHIFTED = (
    "the tokens are looked up one position off. These logits are aligned already: those at "
    "position t predict the token at t, so there is no shift left to make."
)
_PROBABILITIES = (
    "these are probabilities; the logarithm is missing. The KL is made of log-ratios, and only "
    "logarithms turn the product over the tokens into a sum."
)
_RAW_LOGITS = (
    "these are the raw logits of the tokens. A constant added to all logits at a position changes "
    "no probability, but would change the difference between two policies: normalise them."
)
_LOGITS_AS_PROBS = (
    "logits are handed over as probabilities, which is how a Categorical takes its first argument. "
    "They may be negative and do not sum to 1; give them by their name, logits."
)
_TWO_SOFTMAXES = (
    "there are two softmaxes, one on top of the other. The first gives numbers between 0 and 1, "
    "and to the second all tokens look nearly alike."
)
_WHOLE_VOCABULARY = (
    "the whole vocabulary is added up at each position. Only one token was sampled there, and its "
    "log-probability alone is asked for."
)
_NO_TOKENS = (
    "the sampled tokens are not used: it is the expected log-probability, minus the entropy. That "
    "is the mean over all samples; asked for is the one at hand."
)
_ONE_POLICY = (
    "both results come from the same logits. The tokens are the same, but the second result is "
    "what the reference thinks of them."
)
_PAIR_SWAPPED = (
    "the pair is swapped: log_probs_curr comes first, then log_probs_ref. Whatever is made of "
    "their difference would change its sign."
)
_LOOKUPS = (
    *(
        (of, message)
        for f in (torch.log_softmax, *NAIVE)
        for of, message in (
            *(
                (partial(_shifted, f, step, filled), _SHIFTED)
                for step in (1, -1)
                for filled in (True, False)
            ),
            (partial(_shifted_and_padded, f), _SHIFTED),
            (lambda z, tokens, f=f: -pick(f(z, -1), tokens), SURPRISE),
            (lambda z, tokens, f=f: pick(f(z, 0), tokens), WRONG_DIMENSION),
            (lambda z, tokens, f=f: pick(f(z, 1), tokens), WRONG_DIMENSION),
            (partial(_over_vocabulary, lambda x: x.amax(-1), f), GREEDY),
            (partial(_over_vocabulary, lambda x: x.sum(-1), f), _WHOLE_VOCABULARY),
            (partial(_over_vocabulary, lambda x: x.mean(-1), f), _WHOLE_VOCABULARY),
            (partial(_over_vocabulary, lambda x: (x.exp() * x).sum(-1), f), _NO_TOKENS),
        )
    ),
    *((lambda z, tokens, f=f: pick(f(z, -1), tokens), NOT_FINITE) for f in NAIVE),
    *(
        (
            lambda z, tokens, e=epsilon: logprobs.token_logprobs(z, tokens).clamp(min=math.log(e)),
            CUT_OFF,
        )
        for epsilon in EPSILONS
    ),
    (lambda z, tokens: pick(z.softmax(-1), tokens), _PROBABILITIES),
    (lambda z, tokens: _probs(z).log_prob(tokens), _LOGITS_AS_PROBS),
    (lambda z, tokens: pick(z, tokens), _RAW_LOGITS),
    (lambda z, tokens: pick(z.softmax(-1).log_softmax(-1), tokens), _TWO_SOFTMAXES),
)
_SAMPLED_MISTAKES = (
    *(
        (lambda curr, ref, tokens, f=f: _other_lookup((True, True), f, ref, curr, tokens), message)
        for f, message in (
            (logprobs.token_logprobs, _PAIR_SWAPPED),
            *((lambda z, tokens, f=f: pick(f(z, -1), tokens), _PAIR_SWAPPED) for f in NAIVE),
        )
    ),
    (lambda curr, ref, tokens: _sampled_log_probs(curr, curr, tokens), _ONE_POLICY),
    (lambda curr, ref, tokens: _sampled_log_probs(ref, ref, tokens), _ONE_POLICY),
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


_EQUAL = drawn(1, 2, 4, seed=16)
_EXACT_CASES = (
    (_HAND_CURR, _HAND_REF),
    (2 * drawn(2, 3, 4, seed=14), 2 * drawn(2, 3, 4, seed=15)),
    (drawn(3, 1, 5, seed=17), 2 * drawn(3, 1, 5, seed=18)),
    (_EQUAL, _EQUAL + 3),  # a constant changes no probability
)

_REVERSED = (
    "it is the other direction, KL(reference‖policy). The penalty weighs each token by how often "
    "the policy chooses it, so the policy stands first."
)
_SOFTMAX_AS_LOGITS = (
    "probabilities are handed over as logits. A Categorical made from logits applies the softmax "
    "itself; after a second one all tokens look nearly alike."
)
_UNWEIGHTED = (
    "each token of the vocabulary counts alike, whether the policy chooses it always or never. The "
    "KL is the mean of the log-ratio over what the policy samples: weigh it with p."
)
_AVERAGED = (
    "the weighted terms are averaged over the vocabulary, but the weights p make a mean already: "
    "add up. Divided by V the KL would shrink as the vocabulary grows."
)
_CROSS_ENTROPY = (
    "it is the cross-entropy -Σ p log q. That is not 0 where the two agree; the KL is what it "
    "exceeds the entropy of p by."
)
_ENTROPIES = (
    "it is a difference of two entropies. Two policies may be equally unsure about quite different "
    "tokens; the logarithms of both have to be weighed with the same p."
)
_NEGATIVE = (
    "the sign is turned round. A KL is never negative: the policy's own logarithm is larger on "
    "average over what it samples, so log q is subtracted from log p."
)
_REF_WEIGHTS = (
    "the log-ratio is weighed with q, how often the reference chooses a token. That is minus the "
    "KL of the other direction; weigh it with p."
)
_NOT_NORMALISED = (
    "the logits themselves are subtracted. They are logarithms only up to a constant at each "
    "position, another one for each policy: take the log-softmax first."
)
_OF_PROBABILITIES = (
    "probabilities are subtracted, not their logarithms. From 0.001 to 0.1 is a long way for the "
    "KL, and from 0.5 to 0.6 a short one."
)
_EXACT_MISTAKES = (
    (lambda curr, ref: _exact_kl(ref, curr), _REVERSED),
    (lambda curr, ref: _exact_kl(curr.softmax(-1), ref.softmax(-1)), _SOFTMAX_AS_LOGITS),
    (lambda curr, ref: _exact_kl(curr.softmax(-1), ref), _SOFTMAX_AS_LOGITS),
    (lambda curr, ref: _exact_kl(curr, ref.softmax(-1)), _SOFTMAX_AS_LOGITS),
    (lambda curr, ref: kl_divergence(_probs(curr), _probs(ref)), _LOGITS_AS_PROBS),
    (lambda curr, ref: kl_divergence(_probs(ref), _probs(curr)), _LOGITS_AS_PROBS),
    (lambda curr, ref: kl_divergence(_probs(curr), Categorical(logits=ref)), _LOGITS_AS_PROBS),
    (lambda curr, ref: kl_divergence(Categorical(logits=curr), _probs(ref)), _LOGITS_AS_PROBS),
    (lambda curr, ref: -_exact_kl(curr, ref), _NEGATIVE),
    *(
        (partial(_of_log_softmax, of), message)
        for of, message in (
            *(
                (lambda p, q, sign=sign, of=of: of(sign * (p - q), -1), _UNWEIGHTED)
                for sign in (1, -1)
                for of in (torch.mean, torch.sum)
            ),
            (lambda p, q: (p.exp() * (p - q)).mean(-1), _AVERAGED),
            (lambda p, q: -(p.exp() * q).sum(-1), _CROSS_ENTROPY),
            (lambda p, q: (p.exp() * p - q.exp() * q).sum(-1), _ENTROPIES),
            (lambda p, q: (q.exp() * q - p.exp() * p).sum(-1), _ENTROPIES),
            (lambda p, q: (q.exp() * (p - q)).sum(-1), _REF_WEIGHTS),
            (lambda p, q: (p.exp() * (p.exp() - q.exp())).sum(-1), _OF_PROBABILITIES),
        )
    ),
    (lambda curr, ref: (curr.softmax(-1) * (curr - ref)).sum(-1), _NOT_NORMALISED),
)
EXACT_KL = Exercise(
    "exact_kl",
    _exact_kl,
    _EXACT_CASES,
    _EXACT_MISTAKES,
    tested="one row and several, T = 1, policies that agree",
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
_ESTIMATE_CASES = (
    _HAND_PAIR,
    _pair_of_odds([[3.0, 2.5, 1.5, 0.2], [0.4, 2.0, 4.0, 0.8]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
    _pair_of_odds(
        [[0.5, 0.8, 2.0], [0.3, 1.5, 4.0], [1.0, 3.0, 2.0]], [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    ),  # an estimate below 0, and a token on which both agree
)

_ESTIMATE_SWAPPED = (
    "the two are subtracted the wrong way round. Over what the policy samples its own "
    "log-probability is the larger one on average, so that log_probs_ref is what is taken off."
)
_PADDING_COUNTS = (
    "padding counts. Nobody sampled those tokens, and their log-probabilities mean nothing; what "
    "tells padding from tokens?"
)
_WRONG_DENOMINATOR = (
    "padding is 0 in the sum, but counts in the denominator. The estimate would shrink with the "
    "amount of padding, which is chance: divide by the number of real tokens."
)
_SUMMED = (
    "it is the sum over all tokens of the batch, not their mean. It would grow with the batch; "
    "divide by the number of real tokens."
)
_PER_RESPONSE = (
    "the tokens of a response are added up, and only the responses averaged. Those are nats per "
    "response, which the reward needs later; here nats per token are asked for."
)
_MEAN_OF_MEANS = (
    "it is the mean of the responses' means. A token of a short response then weighs more than one "
    "of a long response; the mean here is over all real tokens of the batch at once."
)
_ABSOLUTE = (
    "an absolute value is taken. Some log-ratios are negative, and so may be their mean in a small "
    "sample; only with both signs are they the KL on average, else too much."
)
_CUT_AT_0 = (
    "what is negative is cut off at 0. The KL is never negative, but its estimate may be; to drop "
    "the low ones makes it too large on average."
)
_SQUARED = (
    "the log-ratio is squared. Half of that is the estimate k2, never negative and wrong on "
    "average; here the log-ratio itself is asked for, k1."
)
_THIRD = (
    "it is the estimate k3. It is right on average and never negative; here the log-ratio itself "
    "is asked for, k1."
)
_RATIO = (
    "it takes the ratio of the probabilities, not its logarithm. Where the two policies agree the "
    "ratio is 1, and the KL is 0."
)
_WEIGHTED = (
    "each token is weighed with its probability. The sampling has done that already: a likely "
    "token comes up often. Weights are for a sum over the whole vocabulary."
)
_NO_REFERENCE = (
    "the reference is missing. The mean log-probability of its own samples says how sure the "
    "policy is; how far it has gone shows only beside the reference."
)
_QUOTIENT = (
    "the log-probabilities are divided. The logarithm of a ratio is the difference of the "
    "logarithms."
)
_K3 = partial(_other_term, lambda curr, ref: (ref - curr).exp() - 1 - (ref - curr))
_ESTIMATE_MISTAKES = (
    (lambda curr, ref, mask: estimate_kl(ref, curr, mask), _ESTIMATE_SWAPPED),
    *(
        (partial(_other_mean, of), message)
        for of, message in (
            (lambda x, mask: -x.mean(), _ESTIMATE_SWAPPED),
            (lambda x, mask: x.mean(), _PADDING_COUNTS),
            (lambda x, mask: (x * mask).mean(), _WRONG_DENOMINATOR),
            (lambda x, mask: (x * mask).sum(), _SUMMED),
            (lambda x, mask: x.sum(), _SUMMED),
            (lambda x, mask: (x * mask).sum(1).mean(), _PER_RESPONSE),
            (lambda x, mask: x.sum(1).mean(), _PER_RESPONSE),
            (lambda x, mask: mean_of_row(x, mask).mean(), _MEAN_OF_MEANS),
            (lambda x, mask: token_mean(x, mask).abs(), _ABSOLUTE),
            (lambda x, mask: token_mean(x.abs(), mask), _ABSOLUTE),
            (lambda x, mask: token_mean(x, mask).clamp(min=0), _CUT_AT_0),
            (lambda x, mask: token_mean(x.clamp(min=0), mask), _CUT_AT_0),
            (lambda x, mask: token_mean(x.square(), mask), _SQUARED),
            (lambda x, mask: token_mean(x.square() / 2, mask), _SQUARED),
            (lambda x, mask: token_mean(x.exp(), mask), _RATIO),
        )
    ),
    *(
        (partial(_other_term, of), message)
        for of, message in (
            (lambda curr, ref: curr.exp() - ref.exp(), _OF_PROBABILITIES),
            (lambda curr, ref: curr.exp() * (curr - ref), _WEIGHTED),
            (lambda curr, ref: curr, _NO_REFERENCE),
            (lambda curr, ref: -curr, _NO_REFERENCE),
            (lambda curr, ref: curr / ref, _QUOTIENT),
        )
    ),
    (lambda curr, ref, mask: (curr.exp() * (curr - ref) * mask).sum(), _WEIGHTED),
    (lambda curr, ref, mask: token_mean(curr - ref, curr.exp() * mask), _WEIGHTED),
    (_K3, _THIRD),
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

    Derived in lesson 05; `ppo.shape_rewards` shares it out among the tokens.
    """
    rewards = ppo.shape_rewards(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta)
    return rewards.sum(-1)


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

_PAID_OUT = (
    "the penalty is paid out. A response that the policy likes better than the reference does must "
    "lose by it: check the minus, and which of the two is subtracted from which."
)
_PADDING_CHARGED = (
    "padding is charged. Nobody sampled those tokens, and a short response would pay for what "
    "stands behind its end."
)
_MEAN = (
    "it is the mean of the log-ratio over a response, not the sum. The log-ratio of a whole "
    "response is the sum over its tokens; with the mean, a long response could go far for little."
)
_SAME_FOR_ALL = (
    "all responses pay the same, the mean over the batch. Then the penalty moves no response "
    "against another, and nothing is learnt from it: each pays for its own tokens."
)
_BATCH_SUM = (
    "each response pays for the whole batch. The sum runs over its own tokens only, along the "
    "second dimension."
)
_REWARD_SCALED = (
    "the reward is multiplied by β too. β is the price of a nat; with both scaled it changes "
    "nothing in which response is better."
)
_REWARD_ONLY = (
    "β has changed sides: it multiplies the reward, and the KL is left without it. β is the price "
    "of a nat."
)
_ONE_OF_TWO = (
    "β multiplies one of the two log-probabilities only; look at the brackets. Where policy and "
    "reference agree nothing would cancel, and the penalty would not be 0."
)
_NO_BETA = (
    "the KL is not multiplied by β: a nat costs 1, whatever the price is. At β = 0 only the reward "
    "may remain."
)
_NO_PENALTY = (
    "there is no penalty at all, only the reward. What keeps the policy near the reference then?"
)
_NO_REWARD = (
    "there is no reward, only the penalty. The best that the policy could do is to stay where it "
    "is; take the penalty off the reward."
)
_REWARD_AT_EACH = (
    "the reward is counted once for every token. It is given once, for the whole response."
)
_SHARED_OUT = (
    "the reward is multiplied by 1 − β. β is the price of a nat, not a share: take β times the KL "
    "off the reward, and leave the reward as it is."
)
_LAST_ONLY = (
    "only the last token pays. The score is known there, but every token of the response has its "
    "part in the KL."
)
_FINAL_MISTAKES = (
    *(
        (partial(_other_kl, of), message)
        for of, message in (
            (lambda curr, ref, mask: _row_sum(ref - curr, mask), _PAID_OUT),
            (lambda curr, ref, mask: (ref - curr).sum(1), _PAID_OUT),
            (lambda curr, ref, mask: (curr - ref).sum(1), _PADDING_CHARGED),
            (lambda curr, ref, mask: mean_of_row(curr - ref, mask)[:, 0], _MEAN),
            (lambda curr, ref, mask: ((curr - ref) * mask).mean(1), _MEAN),
            (lambda curr, ref, mask: (curr - ref).mean(1), _MEAN),
            (lambda curr, ref, mask: _row_sum(curr - ref, mask).mean(), _SAME_FOR_ALL),
            (lambda curr, ref, mask: token_mean(curr - ref, mask), _SAME_FOR_ALL),
            (lambda curr, ref, mask: (curr - ref).mean(), _SAME_FOR_ALL),
            (lambda curr, ref, mask: ((curr - ref) * mask).mean(), _SAME_FOR_ALL),
            (lambda curr, ref, mask: ((curr - ref) * mask).sum(), _BATCH_SUM),
            (lambda curr, ref, mask: _row_sum(curr.exp() - ref.exp(), mask), _OF_PROBABILITIES),
            (lambda curr, ref, mask: _row_sum(curr.exp() * (curr - ref), mask), _WEIGHTED),
            (lambda curr, ref, mask: _row_sum((curr - ref).exp(), mask), _RATIO),
            (lambda curr, ref, mask: _row_sum(curr - ref, mask).exp(), _RATIO),
            (lambda curr, ref, mask: _row_sum((curr - ref).abs(), mask), _ABSOLUTE),
            (lambda curr, ref, mask: _row_sum(curr - ref, mask).abs(), _ABSOLUTE),
            (lambda curr, ref, mask: _row_sum(curr - ref, mask).clamp(min=0), _CUT_AT_0),
            (lambda curr, ref, mask: _row_sum((curr - ref).clamp(min=0), mask), _CUT_AT_0),
            (lambda curr, ref, mask: _row_sum((curr - ref).square(), mask), _SQUARED),
            (lambda curr, ref, mask: _row_sum((curr - ref).square() / 2, mask), _SQUARED),
            (lambda curr, ref, mask: _row_sum(curr - ref, mask).square(), _SQUARED),
            (lambda curr, ref, mask: _row_sum((ref - curr).exp() - 1 - ref + curr, mask), _THIRD),
            (lambda curr, ref, mask: _row_sum(curr - ref, last_token(mask)), _LAST_ONLY),
            (lambda curr, ref, mask: 0 * curr[:, 0], _NO_PENALTY),
            (lambda curr, ref, mask: _row_sum(curr, mask), _NO_REFERENCE),
        )
    ),
    *(
        (partial(_other_price, of), message)
        for of, message in (
            (lambda rewards, kl, beta: beta * (rewards - kl), _REWARD_SCALED),
            (lambda rewards, kl, beta: beta * rewards - kl, _REWARD_ONLY),
            (lambda rewards, kl, beta: rewards - kl, _NO_BETA),
            (lambda rewards, kl, beta: -beta * kl, _NO_REWARD),
            (lambda rewards, kl, beta: (1 - beta) * rewards - beta * kl, _SHARED_OUT),
        )
    ),
    *(
        (lambda r, curr, ref, mask, beta, of=of: r - _row_sum(of(curr, ref, beta), mask), message)
        for of, message in (
            (lambda curr, ref, beta: beta * curr - ref, _ONE_OF_TWO),
            (lambda curr, ref, beta: curr - beta * ref, _ONE_OF_TWO),
        )
    ),
    (
        lambda r, curr, ref, mask, beta: _row_sum(r[:, None] - beta * (curr - ref), mask),
        _REWARD_AT_EACH,
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
