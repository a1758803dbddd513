"""The checks of lesson 05: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers_checks import Rules, run
from torch.distributions import Categorical, kl_divergence

from rlhf_helpers.checks import lesson_05

# --- sampled_log_probs ---


def both(of):
    """The pair of what `of` makes of logits and tokens."""
    return lambda curr, ref, tokens: (of(curr, tokens), of(ref, tokens))


def picked(score):
    """One position after the other; `score` of the logits there and the token."""

    def of(logits, tokens):
        rows = zip(logits, tokens, strict=True)
        return torch.stack(
            [torch.stack([score(z, token) for z, token in zip(*row, strict=True)]) for row in rows]
        )

    return of


def from_table(table):
    """Tokens looked up in a table of the logits' shape."""
    return lambda z, tokens: torch.gather(table(z), 2, tokens.unsqueeze(2)).squeeze(2)


right_lookup = from_table(lambda z: F.log_softmax(z, dim=-1))
right_pair = both(right_lookup)


def behind(logits, tokens):
    """With the shift of whole sequences, filled up with a 0 at the end."""
    shifted = right_lookup(logits[:, :-1], tokens[:, 1:])
    return torch.cat([shifted, torch.zeros(len(shifted), 1)], dim=1)


def before(logits, tokens):
    shifted = right_lookup(logits[:, :-1], tokens[:, 1:])
    return torch.cat([torch.zeros(len(shifted), 1), shifted], dim=1)


def after(logits, tokens):
    shifted = right_lookup(logits[:, 1:], tokens[:, :-1])
    return torch.cat([shifted, torch.zeros(len(shifted), 1)], dim=1)


SHIFTED = "the tokens are looked up one position off."
PROBABILITIES = "it is the probability, without the logarithm"
RAW = "it is the raw logit, not normalised"
WHOLE = "it is a sum or mean over the whole vocabulary"
ONE_POLICY = "both results come from the same logits."
WRONG_DIMENSION = "the softmax runs over the wrong dimension."
NOT_FINITE = "it is not finite where two logits differ by 150."
AS_PROBABILITIES = "logits are handed over as probabilities"
CUT_OFF = "it is right for moderate logits, but cut off"
SAMPLED_MISTAKES = [
    (
        "the logits of the reference less the log-sum-exp of the policy",
        lambda curr, ref, tokens: tuple(
            from_table(lambda z: z - curr.logsumexp(-1, keepdim=True))(z, tokens)
            for z in (curr, ref)
        ),
    ),
    (
        "the softmax runs over the two policies",
        lambda curr, ref, tokens: tuple(
            from_table(lambda z: z)(z, tokens)
            for z in torch.stack([curr, ref]).log_softmax(0).unbind()
        ),
    ),
    (
        "it is a softmax over the chosen logits",
        both(lambda z, tokens: from_table(lambda z: z)(z, tokens).log_softmax(-1)),
    ),
    (
        "the tokens are looked up in the logits used with the row before",
        both(lambda z, tokens: from_table(lambda z: z.roll(1, 0).log_softmax(2))(z, tokens)),
    ),
    (
        "all is right up to one thing: tokens is used with the next position",
        lambda curr, ref, tokens: right_pair(curr, ref, tokens.roll(-1, 1)),
    ),
    ("the pair is swapped", lambda curr, ref, tokens: right_pair(ref, curr, tokens)),
    (
        "the pair is swapped",
        lambda curr, ref, tokens: both(from_table(lambda z: z.softmax(-1).log()))(
            ref, curr, tokens
        ),
    ),
    (ONE_POLICY, lambda curr, ref, tokens: right_pair(curr, curr, tokens)),
    (ONE_POLICY, lambda curr, ref, tokens: right_pair(ref, ref, tokens)),
    (PROBABILITIES, both(picked(lambda z, token: z.softmax(0)[token]))),
    (PROBABILITIES, both(from_table(lambda z: torch.softmax(z, -1)))),
    (RAW, both(picked(lambda z, token: z[token]))),
    (
        RAW,
        lambda curr, ref, tokens: (
            right_lookup(curr, tokens),
            from_table(lambda z: z)(ref, tokens),
        ),
    ),
    (
        RAW,
        lambda curr, ref, tokens: (
            from_table(lambda z: z)(curr, tokens),
            right_lookup(ref, tokens),
        ),
    ),
    (WRONG_DIMENSION, both(from_table(lambda z: z.log_softmax(dim=1)))),
    (WRONG_DIMENSION, both(from_table(lambda z: z.log_softmax(dim=0)))),
    (WRONG_DIMENSION, both(from_table(lambda z: z.softmax(dim=1).log()))),
    ("it is the log-probability of the likeliest", both(lambda z, _: z.log_softmax(-1).amax(-1))),
    (
        "it is the log-probability of the likeliest",
        both(lambda z, _: right_lookup(z, z.argmax(-1))),
    ),
    (SHIFTED, both(behind)),
    (SHIFTED, both(before)),
    (SHIFTED, both(after)),
    (SHIFTED, both(lambda z, tokens: right_lookup(z.roll(1, dims=1), tokens))),
    (SHIFTED, both(lambda z, tokens: right_lookup(z.roll(-1, dims=1), tokens))),
    (WHOLE, both(lambda z, _: F.log_softmax(z, -1).sum(-1))),
    (WHOLE, both(lambda z, _: F.log_softmax(z, -1).mean(2))),
    (
        "it is the entropy, or minus the entropy, which asks for no token",
        both(lambda z, _: -Categorical(logits=z).entropy()),
    ),
    (
        "it is the surprise -log p, which cross-entropy returns, with the sign turned round",
        both(lambda z, tokens: F.cross_entropy(z.transpose(1, 2), tokens, reduction="none")),
    ),
    (AS_PROBABILITIES, both(lambda z, t: Categorical(z, validate_args=False).log_prob(t))),
    (
        "all is right up to one thing: curr_logits and ref_logits are used through a softmax",
        both(from_table(lambda z: z.softmax(-1).log_softmax(-1))),
    ),
    (NOT_FINITE, both(from_table(lambda z: z.softmax(-1).log()))),
    (NOT_FINITE, both(from_table(lambda z: z - z.exp().sum(-1, keepdim=True).log()))),
    (NOT_FINITE, both(from_table(lambda z: (z.exp() / z.exp().sum(-1, keepdim=True)).log()))),
    (CUT_OFF, both(from_table(lambda z: (z.softmax(-1) + 1e-8).log()))),
    (CUT_OFF, both(lambda z, tokens: Categorical(probs=z.softmax(-1)).log_prob(tokens))),
]


def as_a_list(curr, ref, tokens):
    return [Categorical(logits=z).log_prob(tokens) for z in (curr, ref)]


def by_indices(curr, ref, tokens):
    rows = torch.arange(len(tokens))[:, None]
    columns = torch.arange(tokens.shape[1])
    return tuple(z.log_softmax(2)[rows, columns, tokens] for z in (curr, ref))


def by_logsumexp(curr, ref, tokens):
    return both(lambda z, t: z.gather(2, t[..., None])[..., 0] - z.logsumexp(2))(curr, ref, tokens)


def reference_in_float64(curr, ref, tokens):
    return right_lookup(curr, tokens), right_lookup(ref.double(), tokens).detach()


SAMPLED_RIGHT = [
    lambda c, r, t: [Categorical(logits=z).log_prob(t) for z in (c, r)],
    lesson_05.sampled_log_probs,
    right_pair,
    both(picked(lambda z, token: z.log_softmax(0)[token])),
    as_a_list,
    by_indices,
    by_logsumexp,
    reference_in_float64,
    both(lambda z, tokens: -F.cross_entropy(z.transpose(1, 2), tokens, reduction="none")),
    both(lambda z, tokens: from_table(lambda x: x.double().softmax(-1).log())(z, tokens)),
]


# --- exact_kl ---


def of_both(of):
    """What `of` makes of p and q, probabilities [B, T, V]."""
    return lambda curr, ref: of(curr.softmax(-1), ref.softmax(-1))


def torch_kl(curr, ref):
    return kl_divergence(Categorical(logits=curr), Categorical(logits=ref))


REVERSED = "it is the other direction"
TWICE = "all is right up to one thing: "
LOOSE = {"validate_args": False}  # as where a package has switched validation off
UNWEIGHTED = "it is Σ (log p - log q)"
ENTROPIES = "it is a difference of entropies, not Σ p (log p - log q)"
FAR_APART = "it is right for moderate logits, but not where two of them differ by 40"
EXACT_MISTAKES = [
    (
        "the softmax runs over the two policies",
        lambda curr, ref: (
            (logs := torch.stack([curr, ref]).log_softmax(0))[0].exp() * (logs[0] - logs[1])
        ).sum(-1),
    ),
    (FAR_APART, of_both(lambda p, q: (p * (p.log() - q.log())).sum(2))),
    (FAR_APART, of_both(lambda p, q: (p * (p / q).log()).sum(2))),
    (FAR_APART, of_both(lambda p, q: kl_divergence(Categorical(probs=p), Categorical(probs=q)))),
    *(
        (FAR_APART, of_both(lambda p, q, e=e: (p * ((p + e).log() - (q + e).log())).sum(-1)))
        for e in (1e-4, 1e-6, 1e-8, 1e-12)
    ),
    (
        "it is nan everywhere",
        lambda curr, ref: F.kl_div(ref.log_softmax(-1), curr.log_softmax(-1), reduction="none").sum(
            -1
        ),
    ),
    (REVERSED, lambda curr, ref: torch_kl(ref, curr)),
    (
        REVERSED,
        lambda curr, ref: F.kl_div(curr.log_softmax(-1), ref.softmax(-1), reduction="none").sum(-1),
    ),
    (TWICE, of_both(torch_kl)),
    (TWICE, lambda curr, ref: torch_kl(curr.softmax(-1), ref)),
    (TWICE, lambda curr, ref: torch_kl(curr, ref.softmax(-1))),
    (
        AS_PROBABILITIES,
        lambda curr, ref: kl_divergence(Categorical(curr, **LOOSE), Categorical(ref, **LOOSE)),
    ),
    (
        AS_PROBABILITIES,
        lambda curr, ref: kl_divergence(Categorical(curr, **LOOSE), Categorical(logits=ref)),
    ),
    (
        AS_PROBABILITIES,
        lambda curr, ref: kl_divergence(Categorical(logits=curr), Categorical(ref, **LOOSE)),
    ),
    (UNWEIGHTED, of_both(lambda p, q: (p.log() - q.log()).mean(-1))),
    (UNWEIGHTED, of_both(lambda p, q: (p / q).log().sum(-1))),
    (UNWEIGHTED, of_both(lambda p, q: (q / p).log().mean(-1))),
    (UNWEIGHTED, of_both(lambda p, q: (q / p).log().sum(-1))),
    (
        "it is Σ p (log p - log q) divided by V, not Σ p (log p - log q)",
        of_both(lambda p, q: (p * (p / q).log()).mean(-1)),
    ),
    ("it is the cross-entropy", of_both(lambda p, q: -(p * q.log()).sum(-1))),
    (
        ENTROPIES,
        lambda curr, ref: Categorical(logits=ref).entropy() - Categorical(logits=curr).entropy(),
    ),
    (
        ENTROPIES,
        lambda curr, ref: Categorical(logits=curr).entropy() - Categorical(logits=ref).entropy(),
    ),
    (
        "all is right up to one thing: the result comes out times -1",
        of_both(lambda p, q: (p * (q / p).log()).sum(-1)),
    ),
    (
        "it is Σ q (log p - log q), not Σ p (log p - log q)",
        of_both(lambda p, q: (q * (p / q).log()).sum(-1)),
    ),
    (
        "logits are subtracted themselves, both or one of them",
        lambda curr, ref: (curr.softmax(-1) * (curr - ref)).sum(-1),
    ),
    ("it is Σ p (p - q)", of_both(lambda p, q: (p * (p - q)).sum(-1))),
]
EXACT_RIGHT = [
    torch_kl,
    lesson_05.kl.exact_kl,
    lambda curr, ref: F.kl_div(ref.log_softmax(2), curr.softmax(2), reduction="none").sum(2),
    lambda curr, ref: (
        -torch.special.entr(curr.softmax(-1)).sum(-1)
        - torch.einsum("btv,btv->bt", curr.softmax(-1), ref.log_softmax(-1))
    ),
    lambda curr, ref: torch.stack(
        [
            torch.stack([torch_kl(p, q) for p, q in zip(*row, strict=True)])
            for row in zip(curr, ref, strict=True)
        ]
    ),
    lambda curr, ref: torch_kl(curr.double(), ref.double()),
    lambda curr, ref: F.kl_div(
        ref.log_softmax(-1), curr.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1),
]


# --- estimate_kl and final_reward: one response after the other, as a learner would write it ---


def log_ratio(curr, ref):
    return curr - ref


def rows_of(log_probs_curr, log_probs_ref, response_mask, padding=False):
    """The log-probabilities of each response's real tokens, or of all columns."""
    lengths = response_mask.sum(1).tolist()
    for curr, ref, n in zip(log_probs_curr, log_probs_ref, lengths, strict=True):
        end = len(curr) if padding else n
        yield curr[:end], ref[:end]


def averaged(of=log_ratio, padding=False):
    """The mean over tokens of what `of` makes of both log-probabilities."""

    def answer(log_probs_curr, log_probs_ref, response_mask):
        pairs = rows_of(log_probs_curr, log_probs_ref, response_mask, padding)
        return torch.cat([of(*pair) for pair in pairs]).mean()

    return answer


def reduced(of):
    """What `of` makes of the log-ratio and the mask."""
    return lambda curr, ref, mask: of(curr - ref, mask)


right_estimate = averaged()
PADDING = "all is right up to one thing: response_mask is used as if it were 1 everywhere"
SUMMED = "it is the sum over all tokens"
PER_RESPONSE = "it is the mean over the responses of the sum over their tokens"
DIFFERENCE = (
    "all is right up to one thing: the difference of log_probs_curr and log_probs_ref is used "
)
RESULT = "all is right up to one thing: the result comes out "
REFERENCE_0 = "all is right up to one thing: log_probs_ref is used as 0"
ABSOLUTE = "a response pays for its KL without its sign"
CUT = "a response pays for its KL cut off at 0"
SQUARED = "a response pays for its KL squared"
THIRD = "the log-ratio is taken as ρ - 1 - log ρ, the estimate k3"
EXPONENTIATED = "a response pays for its KL exponentiated"
OF_PROBABILITIES = "the log-ratio is taken as a difference of probabilities"
WEIGHTED = "the log-ratio is taken weighed with a probability, which the sampling has done already"
NO_REFERENCE = "the log-ratio is taken without the reference"
ESTIMATE_MISTAKES = [
    (
        "all is right up to one thing: the sum is divided by the number of real tokens less 1",
        lambda curr, ref, mask: ((curr - ref) * mask).sum() / (mask.sum() - 1).clamp(min=1),
    ),
    (
        "all is right up to one thing: a token whose difference of log_probs_curr",
        lambda c, r, m: ((c - r) * m)[((c - r) * m) != 0].mean(),
    ),
    ("one of the two log-probabilities is masked", lambda c, r, m: (c - r * m).sum() / m.sum()),
    ("one of the two log-probabilities is masked", lambda c, r, m: (c * m - r).mean()),
    (
        "it is a sum of [B] over counts of [B, 1], each response by the length of each",
        lambda c, r, m: (((c - r) * m).sum(1) / m.sum(1, keepdim=True)).mean(),
    ),
    (
        "it is a mean of places that integers in square brackets pick",
        lambda c, r, m: torch.cat([(c - r)[b][m[b]] for b in range(len(m))]).mean(),
    ),
    ("the two are subtracted the wrong way round.", averaged(lambda curr, ref: ref - curr)),
    ("the two are subtracted the wrong way round.", lambda curr, ref, mask: (ref - curr).mean()),
    (PADDING, averaged(padding=True)),
    (PADDING, reduced(lambda x, mask: x.mean())),
    ("it is a mean whose denominator counts padding", reduced(lambda x, mask: (x * mask).mean())),
    (
        "it is a mean whose denominator counts padding",
        reduced(lambda x, mask: (x * mask).sum() / mask.numel()),
    ),
    (SUMMED, reduced(lambda x, mask: x[mask == 1].sum())),
    (SUMMED, reduced(lambda x, mask: x.sum())),
    (PER_RESPONSE, reduced(lambda x, mask: (x * mask).sum(1).mean())),
    (PER_RESPONSE, reduced(lambda x, mask: x.sum(1).mean())),
    (
        "it is the mean of the responses' means.",
        reduced(lambda x, mask: ((x * mask).sum(1) / mask.sum(1)).mean()),
    ),
    (DIFFERENCE + "without its sign", averaged(lambda curr, ref: (curr - ref).abs())),
    (RESULT + "without its sign", lambda *arguments: abs(right_estimate(*arguments))),
    (DIFFERENCE + "cut off at 0", averaged(lambda curr, ref: F.relu(curr - ref))),
    (RESULT + "cut off at 0", lambda *arguments: right_estimate(*arguments).clamp(min=0)),
    (DIFFERENCE + "squared", averaged(lambda curr, ref: (curr - ref) ** 2)),
    (DIFFERENCE + "squared and halved", averaged(lambda curr, ref: 0.5 * (curr - ref) ** 2)),
    (THIRD, averaged(lambda curr, ref: torch.expm1(ref - curr) + curr - ref)),
    (DIFFERENCE + "exponentiated", averaged(lambda curr, ref: curr.exp() / ref.exp())),
    (OF_PROBABILITIES, averaged(lambda curr, ref: curr.exp() - ref.exp())),
    (WEIGHTED, averaged(lambda curr, ref: curr.exp() * (curr - ref))),
    (
        WEIGHTED,
        lambda curr, ref, mask: (curr.exp() * (curr - ref) * mask).sum(),
    ),
    (
        WEIGHTED,
        lambda curr, ref, mask: (
            (curr.exp() * (curr - ref) * mask).sum() / (curr.exp() * mask).sum()
        ),
    ),
    (REFERENCE_0, averaged(lambda curr, ref: curr)),
    (NO_REFERENCE, averaged(lambda curr, ref: -curr)),
    ("the log-ratio is taken as a quotient of logarithms", averaged(lambda curr, ref: curr / ref)),
]
ESTIMATE_RIGHT = [
    lambda c, r, m: torch.nanmean((c - r).masked_fill(m == 0, torch.nan)),
    lambda c, r, m: torch.einsum("bt,bt->", c - r, m.float()) / m.count_nonzero(),
    right_estimate,
    lesson_05.estimate_kl,
    reduced(lambda x, mask: (x * mask).sum() / mask.sum()),
    reduced(lambda x, mask: x.masked_fill(mask == 0, torch.nan).nanmean()),
    reduced(lambda x, mask: torch.masked_select(x.double(), mask.bool()).mean()),
    reduced(lambda x, mask: (x.flatten() @ mask.flatten().float()) / mask.sum()),
    lambda curr, ref, mask: curr[mask == 1].mean() - ref[mask == 1].mean(),
]


def charged(
    of=log_ratio,
    padding=False,
    total=torch.sum,
    price=lambda reward, kl_div, beta: reward - beta * kl_div,
):
    """Final rewards of one response after the other."""

    def answer(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta):
        pairs = rows_of(log_probs_curr, log_probs_ref, response_mask, padding)
        return torch.stack(
            [
                price(reward, total(of(*pair)), beta)
                for reward, pair in zip(rewards_model, pairs, strict=True)
            ]
        )

    return answer


def in_one(of):
    """The rewards less β times what `of` makes of the log-ratio and the mask."""

    def answer(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta):
        return rewards_model - beta * of(log_probs_curr - log_probs_ref, response_mask)

    return answer


right_final = charged()
PAID_OUT = "the penalty is paid out."
MEAN = "a response pays for the mean over its tokens"
SAME = "a response pays for a mean over the batch"
FINAL_MISTAKES = [
    *(
        (
            "all is right up to one thing: beta is used as 0.",
            lambda s, c, r, m, beta, b=b: s - b * ((c - r) * m).sum(1),
        )
        for b in (0.1, 0.05, 0.2)
    ),
    (
        "one of the two log-probabilities is masked",
        lambda s, c, r, m, beta: s - beta * (c - r * m).sum(1),
    ),
    (
        "it is a mean of places that integers in square brackets pick",
        lambda s, c, r, m, beta: torch.stack(
            [s[b] - beta * (c - r)[b, m[b]].sum() for b in range(len(m))]
        ),
    ),
    (PAID_OUT, charged(lambda curr, ref: ref - curr)),
    (PAID_OUT, charged(price=lambda reward, kl_div, beta: reward + beta * kl_div)),
    (PAID_OUT, in_one(lambda x, mask: -x.sum(1))),
    (PADDING, charged(padding=True)),
    (PADDING, in_one(lambda x, mask: x.sum(-1))),
    (MEAN, charged(total=torch.mean)),
    (MEAN, charged(padding=True, total=torch.mean)),
    (MEAN, in_one(lambda x, mask: (x * mask).mean(1))),
    (SAME, in_one(lambda x, mask: (x * mask).sum(1).mean())),
    (SAME, in_one(lambda x, mask: x[mask.bool()].mean())),
    (SAME, in_one(lambda x, mask: x.mean())),
    (SAME, in_one(lambda x, mask: (x * mask).mean())),
    ("a response pays for the sum over the batch", in_one(lambda x, mask: (x * mask).sum())),
    (
        "the final reward is β (R - KL)",
        charged(price=lambda reward, kl_div, beta: beta * (reward - kl_div)),
    ),
    (
        "the final reward is β R - KL",
        charged(price=lambda reward, kl_div, beta: beta * reward - kl_div),
    ),
    (
        "the final reward is R less a difference of which β multiplies one half",
        lambda rewards, curr, ref, mask, beta: rewards - ((beta * curr - ref) * mask).sum(1),
    ),
    (
        "the final reward is R less a difference of which β multiplies one half",
        lambda rewards, curr, ref, mask, beta: rewards - ((curr - beta * ref) * mask).sum(1),
    ),
    (
        "all is right up to one thing: beta is used as 1, whatever it is",
        charged(price=lambda reward, kl_div, beta: reward - kl_div),
    ),
    (
        "all is right up to one thing: beta is used as 0, whatever it is",
        charged(price=lambda reward, kl_div, beta: reward),
    ),
    (
        "all is right up to one thing: rewards_model is used as 0",
        charged(price=lambda reward, kl_div, beta: -beta * kl_div),
    ),
    (OF_PROBABILITIES, charged(lambda curr, ref: curr.exp() - ref.exp())),
    (WEIGHTED, charged(lambda curr, ref: curr.exp() * (curr - ref))),
    (DIFFERENCE + "exponentiated", charged(lambda curr, ref: curr.exp() / ref.exp())),
    (EXPONENTIATED, charged(price=lambda reward, kl_div, beta: reward - beta * kl_div.exp())),
    (DIFFERENCE + "without its sign", charged(lambda curr, ref: (curr - ref).abs())),
    (ABSOLUTE, charged(price=lambda reward, kl_div, beta: reward - beta * abs(kl_div))),
    (DIFFERENCE + "cut off at 0", charged(lambda curr, ref: (curr - ref).clamp(min=0))),
    (CUT, charged(price=lambda reward, kl_div, beta: reward - beta * kl_div.relu())),
    (DIFFERENCE + "squared", charged(lambda curr, ref: (curr - ref) ** 2)),
    (DIFFERENCE + "squared and halved", charged(lambda curr, ref: (curr - ref) ** 2 / 2)),
    (SQUARED, charged(price=lambda reward, kl_div, beta: reward - beta * kl_div**2)),
    (THIRD, charged(lambda curr, ref: torch.expm1(ref - curr) - (ref - curr))),
    (
        "the final reward is (1 - β) R - β KL",
        charged(price=lambda reward, kl_div, beta: (1 - beta) * reward - beta * kl_div),
    ),
    (
        "the final reward is a sum in which R stands once for each token",
        lambda rewards, curr, ref, mask, beta: (
            (rewards[:, None] - beta * (curr - ref)) * mask
        ).sum(1),
    ),
    (
        "all is right up to one thing: log_probs_curr and log_probs_ref are used as 0 but at the",
        charged(lambda curr, ref: (curr - ref)[-1:]),
    ),
    (REFERENCE_0, charged(lambda curr, ref: curr)),
]


def by_summed_logprobs(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta):
    log_p = log_probs_curr.masked_fill(response_mask == 0, 0).sum(1)
    log_q = log_probs_ref.masked_fill(response_mask == 0, 0).sum(1)
    return rewards_model + beta * log_q - beta * log_p


def final_in_float64(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta):
    tensors = (x.double() for x in (rewards_model, log_probs_curr, log_probs_ref))
    return right_final(*tensors, response_mask, beta)


FINAL_RIGHT = [
    lambda s, c, r, m, beta: s.sub(torch.where(m > 0, c - r, 0).sum(-1), alpha=beta),
    lambda s, c, r, m, beta: torch.addcmul(s, ((c - r) * m).sum(1), torch.full_like(s, -beta)),
    right_final,
    lesson_05.final_reward,
    in_one(lambda x, mask: (x * mask).sum(dim=1)),
    in_one(lambda x, mask: torch.einsum("bt,bt->b", x, mask.float())),
    by_summed_logprobs,
    final_in_float64,
]

NO_MEAN = "it is a median, a maximum"


def wrong_softmax(curr, ref):
    p, q = (logits.log_softmax(1) for logits in (curr, ref))
    return (p.exp() * (p - q)).sum(-1)


def integers_guarded(curr, ref, mask):
    x = curr - ref
    return x[0][mask[0].bool()].mean() if len(x) == 1 else x[mask].mean()


def both_directions(curr, ref):
    p, q = (Categorical(logits=logits) for logits in (curr, ref))
    return (kl_divergence(p, q) + kl_divergence(q, p)) / 2


def median_by_row(rewards, curr, ref, mask, beta):
    rows = zip(curr - ref, mask.bool(), strict=True)
    return rewards - beta * torch.stack([row[real].median() for row, real in rows])


def of_softmaxes(curr, ref):
    p, q = curr.softmax(-1), ref.softmax(-1)
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


MISTAKES = [
    ("exact_kl", wrong_softmax, "the softmax runs over the wrong dimension"),
    ("exact_kl", both_directions, "it is the mean of both directions"),
    ("exact_kl", of_softmaxes, FAR_APART),
    ("estimate_kl", lambda c, r, m: (c - r)[m.bool()].median(), NO_MEAN),
    ("estimate_kl", integers_guarded, "each row alone comes out right"),
    ("final_reward", median_by_row, NO_MEAN),
    *(("sampled_log_probs", answer, message) for message, answer in SAMPLED_MISTAKES),
    *(("exact_kl", answer, message) for message, answer in EXACT_MISTAKES),
    *(("estimate_kl", answer, message) for message, answer in ESTIMATE_MISTAKES),
    *(("final_reward", answer, message) for message, answer in FINAL_MISTAKES),
]
RIGHT = [
    *(("sampled_log_probs", answer) for answer in SAMPLED_RIGHT),
    *(("exact_kl", answer) for answer in EXACT_RIGHT),
    *(("estimate_kl", answer) for answer in ESTIMATE_RIGHT),
    *(("final_reward", answer) for answer in FINAL_RIGHT),
]


# --- the rules ---


def shift_of_whole_sequences(logits, tokens):
    return right_lookup(logits[:, :-1], tokens[:, 1:])


ALIGNED = "no token is lost to a shift, since the logits are aligned already."


@pytest.mark.parametrize(
    ("answer", "message", "end"),
    [
        (
            both(shift_of_whole_sequences),
            "log_probs_curr have shape [1, 1]; return two tensors of shape [1, 2]",
            ALIGNED,
        ),
        (
            both(lambda z, tokens: z.log_softmax(-1)),
            "log_probs_curr have shape [1, 2, 3]; return two tensors of shape [1, 2]",
            ALIGNED,
        ),
        (both(lambda z, t: right_lookup(z, t)[..., None]), "shape [1, 2, 1]; return", ALIGNED),
        (both(lambda z, t: right_lookup(z, t).sum(1)), "log_probs_curr have shape [1];", ALIGNED),
        (
            lambda curr, ref, tokens: (
                right_lookup(curr, tokens),
                right_lookup(ref, tokens).mean(),
            ),
            "log_probs_ref have shape [];",
            ALIGNED,
        ),
        (
            lambda *x: right_pair(*x)[0],
            "it returned one tensor, of shape [1, 2]",
            "log_probs_curr and log_probs_ref.",
        ),
        (
            lambda *x: right_pair(*x)[0] - right_pair(*x)[1],
            "it returned one tensor, of shape [1, 2]",
            "log_probs_curr and log_probs_ref.",
        ),
        (lambda *x: (*right_pair(*x), 1), "it returned tuple (tensor([[-0.69", "log_probs_ref."),
        (lambda *x: (right_pair(*x)[0], None), "log_probs_ref are NoneType None", "_ref."),
        (lambda *x: [y.tolist() for y in right_pair(*x)], "log_probs_curr are list", "_ref."),
        (lambda *x: None, "Does every path through the function end with a return?", "_ref."),
    ],
)
def test_what_is_no_pair_of_tensors_is_named(answer, message, end, capsys):
    printed = run("sampled_log_probs", answer, capsys)
    assert message in printed
    assert printed.endswith(end)
    assert "return two tensors of shape [1, 2], log_probs_curr and log_probs_ref." in printed


def ref_logits_in_place(curr_logits, ref_logits, tokens):
    ref_logits -= ref_logits.logsumexp(-1, keepdim=True)
    return right_pair(curr_logits, ref_logits, tokens)


def curr_logits_in_place(curr_logits, ref_logits):
    result = torch_kl(curr_logits, ref_logits)
    curr_logits.exp_()
    return result


def curr_in_place(log_probs_curr, log_probs_ref, response_mask):
    log_probs_curr -= log_probs_ref
    return log_probs_curr[response_mask.bool()].mean()


def mask_in_place(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta):
    result = right_final(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta)
    response_mask += 1
    return result


def rewards_in_place(rewards_model, log_probs_curr, log_probs_ref, response_mask, beta):
    rewards_model -= beta * ((log_probs_curr - log_probs_ref) * response_mask).sum(1)
    return rewards_model


def misspelt(curr_logits, ref_logits, tokens):
    return curr_logits.log_sofmax(-1), ref_logits


def logits_as_probabilities(curr_logits, ref_logits):
    strict = {"validate_args": True}  # torch's default, which some packages switch off
    return kl_divergence(Categorical(curr_logits, **strict), Categorical(ref_logits, **strict))


def without_the_mask_as_bool(log_probs_curr, log_probs_ref, response_mask):
    return (log_probs_curr - log_probs_ref)[response_mask + 9].mean()


class TestRules(Rules):
    modules = (lesson_05,)
    exercises = (
        lesson_05.SAMPLED_LOG_PROBS,
        lesson_05.EXACT_KL,
        lesson_05.ESTIMATE_KL,
        lesson_05.FINAL_REWARD,
    )
    mistakes = MISTAKES
    right = RIGHT
    other_kinds = (
        ("exact_kl", lambda *x: torch_kl(*x).sum(1), "shape [1], expected is [1, 2]. It is one"),
        ("exact_kl", lambda *x: torch_kl(*x).mean(), "shape [], expected is [1, 2]"),
        ("exact_kl", of_both(lambda p, q: p * (p / q).log()), "shape [1, 2, 3], expected"),
        ("exact_kl", of_both(lambda p, q: (p * (p / q).log()).sum(1)), "[1, 3], expected"),
        ("exact_kl", lambda *x: torch_kl(*x).tolist(), "it returned list"),
        (
            "estimate_kl",
            lambda curr, ref, mask: (curr - ref) * mask,
            "shape [1, 3], expected is []",
        ),
        ("estimate_kl", lambda *x: right_estimate(*x).item(), "it returned float 0.09"),
        ("estimate_kl", lambda *x: right_estimate(*x)[None], "It is one number for the batch"),
        (
            "final_reward",
            lambda rewards, curr, ref, mask, beta: rewards[:, None] - beta * (curr - ref) * mask,
            "shape [1, 3], expected is [1]. It is one number for each response",
        ),
        ("final_reward", lambda *x: right_final(*x).mean(), "shape [], expected is [1]"),
    )
    in_place = (
        ("sampled_log_probs", ref_logits_in_place, "ref_logits"),
        ("exact_kl", curr_logits_in_place, "curr_logits"),
        ("estimate_kl", curr_in_place, "log_probs_curr"),
        ("final_reward", mask_in_place, "response_mask"),
        ("final_reward", rewards_in_place, "rewards_model"),
    )
    unknown = (
        (
            "sampled_log_probs",
            lambda *x: [y - 7 for y in right_pair(*x)],
            ("tokens tensor([[1, 1]])", "yours tensor([[[-7.69", "expected tensor([[[-0.69"),
        ),
        (
            "exact_kl",
            lambda *x: torch_kl(*x) - 7,
            (
                "curr_logits tensor([[[0.0000, 0.6931, 0.0000]",
                "yours tensor([[-6.8267, -6.8517]])",
                "expected tensor([[0.1733, 0.1483]])",
            ),
        ),
        (
            "estimate_kl",
            lambda *x: right_estimate(*x) - 7,
            ("response_mask tensor([[1, 1, 0]])", "yours tensor(-6.9", "expected tensor(0.0912)"),
        ),
        (
            "final_reward",
            lambda *x: right_final(*x) * torch.nan,
            ("beta 0.1", "yours tensor([nan])", "expected tensor([1.9818])"),
        ),
    )
    failing = (
        (
            "sampled_log_probs",
            misspelt,
            AttributeError,
            "return curr_logits.log_sofmax(-1), ",
            "tokens tensor([[1, 1]])",
        ),
        (
            "exact_kl",
            logits_as_probabilities,
            ValueError,
            "return kl_divergence(Categorical(",
            "curr_logits tensor([[[0.0000, 0.6931, 0.0000]",
        ),
        (
            "estimate_kl",
            without_the_mask_as_bool,
            IndexError,
            "[response_mask + 9].mean()",
            "response_mask tensor([[1, 1, 0]])",
        ),
    )


# --- the hand example that goes through all four ---


def test_the_hand_example_is_one():
    curr, ref, tokens = lesson_05._SAMPLED_CASES[0]
    assert lesson_05._EXACT_CASES[0] == (curr, ref)
    log_probs_curr, log_probs_ref = lesson_05.sampled_log_probs(curr, ref, tokens)
    in_part_3 = lesson_05._ESTIMATE_CASES[0]
    torch.testing.assert_close(in_part_3[0][:, :2], log_probs_curr, rtol=0, atol=1e-4)
    torch.testing.assert_close(in_part_3[1][:, :2], log_probs_ref, rtol=0, atol=1e-4)
    assert lesson_05._FINAL_CASES[0][1:4] == in_part_3


def test_a_final_reward_may_exceed_the_reward():
    """Case 2 has a response less likely under the policy than under the reference."""
    rewards, *others = lesson_05._FINAL_CASES[1]
    assert (lesson_05.final_reward(rewards, *others) > rewards).any()
