"""The checks of lesson 03: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers_checks import GradientRules, run

from rlhf_helpers.checks import FAULTS, check_diagnosis, lesson_03
from rlhf_helpers.losses import gae as package_gae

OVERWRITTEN = "the values are right, but the backward pass fails"
GRADIENT = "the values are right, but not the gradient: that with respect to"
DTYPE = "the values are right, but the dtype is torch.float64; return torch.float32"


def in_float64(answer):
    def other(*arguments):
        return answer(
            *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments)
        )

    return other


# --- token_logprobs, wrong ---


def by_loops(score):
    """The right positions, one after the other; `score` of the logits there and the token."""

    def answer(logits, input_ids, response_length):
        rows = []
        for z, ids in zip(logits, input_ids, strict=True):
            start = len(ids) - response_length
            rows.append(torch.stack([score(z[t - 1], ids[t]) for t in range(start, len(ids))]))
        return torch.stack(rows)

    return answer


def looked_up(shift, drop=0):
    """Log-probabilities of tokens by positions counted from the front, `shift` columns back."""

    def answer(logits, input_ids, response_length):
        length = input_ids.shape[1] - drop
        logp = F.log_softmax(logits, dim=-1)
        rows = torch.arange(len(input_ids))
        columns = range(length - response_length, length)
        picked = [logp[rows, (t - shift) % len(logits[0]), input_ids[:, t]] for t in columns]
        return torch.stack(picked, dim=1)

    return answer


def unshifted_by_cross_entropy(logits, input_ids, response_length):
    loss = F.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none")
    return -loss[:, -response_length:]


def prompt_tokens_naively(logits, input_ids, response_length):
    probabilities = torch.softmax(logits[:, :response_length], dim=-1)
    tokens = input_ids[:, :response_length].unsqueeze(-1)
    return probabilities.gather(2, tokens).squeeze(2).log()


def tokens_shifted_instead(logits, input_ids, response_length):
    logp = logits[:, -response_length:].log_softmax(-1)
    ids = input_ids[:, -response_length - 1 : -1]
    return torch.gather(logp, 2, ids.unsqueeze(2)).squeeze(2)


def shifted_then_cut_at_the_front(logits, input_ids, response_length):
    logp = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    return logp[:, :response_length]


def surprises(logits, input_ids, response_length):
    flat = logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(flat, input_ids[:, 1:].flatten(), reduction="none")
    return loss.view(len(input_ids), -1)[:, -response_length:]


def over_positions(logits, input_ids, response_length):
    logp = logits.log_softmax(dim=1)[:, :-1]
    return logp.gather(2, input_ids[:, 1:, None])[:, -response_length:, 0]


def over_response_positions(logits, input_ids, response_length):
    window = logits[:, -response_length - 1 : -1]
    shares = window.exp() / window.exp().sum(1, keepdim=True)
    return shares.gather(2, input_ids[:, -response_length:, None])[..., 0].log()


def stable_over_response_positions(logits, input_ids, response_length):
    window = logits[:, -response_length - 1 : -1]
    window = window - window.logsumexp(1, keepdim=True)
    return window.gather(2, input_ids[:, -response_length:, None])[..., 0]


def over_rows(logits, input_ids, response_length):
    logp = F.log_softmax(logits[:, -response_length - 1 : -1], 0)
    return logp.gather(2, input_ids[:, -response_length:, None])[..., 0]


@torch.no_grad()
def scores_without_grad(logits, input_ids, response_length):
    return looked_up(1)(logits, input_ids, response_length)


def overwritten(logits, input_ids, response_length):
    window = logits[:, -response_length - 1 : -1].clone()
    window -= window.logsumexp(-1, keepdim=True)  # whose backward pass needs the window
    return window.gather(2, input_ids[:, -response_length:, None])[..., 0]


def shifted_by(level):
    """Logits less `level(logits)`, then the formula as it stands."""

    def answer(logits, input_ids, response_length):
        z = logits[:, -response_length - 1 : -1]
        z = z - level(z)
        logp = z - z.exp().sum(-1, keepdim=True).log()
        return logp.gather(2, input_ids[:, -response_length:, None])[..., 0]

    return answer


UNSHIFTED = "a token is looked up at its own position"
OTHER_WAY = "a token is looked up one position to the right"
NOT_FINITE = "it is not finite where two logits differ by 150."
CUT_OFF = "it is right for moderate logits, but cut off"
TWICE = "a token is looked up two positions to the left"
START = "a token is looked up at the beginning of the sequence"
DIMENSION = "the softmax runs over the wrong dimension."
FAR_APART = "it does not hold where two logits differ by 800"
GREEDY = "it is the log-probability of the likeliest token"
TOKEN_MISTAKES = [
    (
        "it is a softmax over the chosen logits",
        lambda z, ids, n: z[:, -n - 1 : -1].gather(2, ids[:, -n:, None]).squeeze(2).log_softmax(-1),
    ),
    (
        "the tokens are looked up in the logits used with rows and positions mixed",
        lambda z, ids, n: (
            z[:, -n - 1 : -1]
            .log_softmax(2)
            .transpose(0, 1)
            .reshape(len(ids), n, -1)
            .gather(2, ids[:, -n:, None])
            .squeeze(2)
        ),
    ),
    (
        "it is right but where input_ids is 0; there it gives 0",
        lambda z, ids, n: (
            z[:, -n - 1 : -1].log_softmax(2).gather(2, ids[:, -n:, None]).squeeze(2)
            * (ids[:, -n:] != 0)
        ),
    ),
    (
        "all is right up to one thing: logits is used with the row before in place of its own",
        lambda z, ids, n: (
            z.roll(1, 0)[:, -n:].log_softmax(2).gather(2, ids[:, -n:, None]).squeeze(2)
        ),
    ),
    (UNSHIFTED, looked_up(0)),
    (UNSHIFTED, unshifted_by_cross_entropy),
    (UNSHIFTED, looked_up(0, drop=1)),
    (OTHER_WAY, looked_up(-1)),
    (OTHER_WAY, tokens_shifted_instead),
    (TWICE, looked_up(2)),
    (
        "a token is looked up well, but in a window",
        looked_up(1, drop=1),
    ),
    (START, shifted_then_cut_at_the_front),
    (START, prompt_tokens_naively),
    (GREEDY, by_loops(lambda z, token: z.max() - z.logsumexp(0))),
    (GREEDY, by_loops(lambda z, token: z.softmax(0).max().log())),
    (
        "it is the surprise -log p, which cross-entropy returns, with the sign turned round",
        surprises,
    ),
    (
        "it is the surprise -log p, which cross-entropy returns, with the sign turned round",
        by_loops(lambda z, token: -z.softmax(0)[token].log()),
    ),
    (DIMENSION, over_positions),
    (DIMENSION, over_response_positions),
    (DIMENSION, stable_over_response_positions),
    (DIMENSION, over_rows),
    (NOT_FINITE, by_loops(lambda z, token: z.softmax(0)[token].log())),
    (NOT_FINITE, by_loops(lambda z, token: z[token] - z.exp().sum().log())),
    (NOT_FINITE, by_loops(lambda z, token: (z.exp() / z.exp().sum())[token].log())),
    (CUT_OFF, by_loops(lambda z, token: (z.softmax(0)[token] + 1e-8).log())),
    (CUT_OFF, by_loops(lambda z, token: z.softmax(0)[token].clamp(min=1e-10).log())),
    *((CUT_OFF, by_loops(lambda z, k, e=e: z.log_softmax(0)[k].clamp(min=e))) for e in (-20, -100)),
    (FAR_APART, shifted_by(torch.max)),
    (FAR_APART, shifted_by(lambda z: z.amax((1, 2), keepdim=True))),
    (FAR_APART, shifted_by(lambda z: z.mean(-1, keepdim=True))),
    (FAR_APART, lambda z, ids, t: looked_up(1)(z.clamp(-100, 200), ids, t)),
    (FAR_APART, by_loops(lambda z, token: z.double().softmax(0)[token].log().float())),
    (DTYPE, in_float64(looked_up(1))),
    (
        "all is right up to one thing: the result comes out times 1.443",
        by_loops(lambda z, token: z.double().softmax(0)[token].log2()),
    ),
    (
        "it is the probability, without the logarithm",
        by_loops(lambda z, token: z.softmax(0)[token]),
    ),
    ("it is the raw logit, not normalised", by_loops(lambda z, token: z[token])),
    (
        "it is the logarithm of the logit, which is one already",
        by_loops(lambda z, token: torch.log(z[token])),
    ),
    (
        "all is right up to one thing: logits is used through a softmax",
        by_loops(lambda z, token: z.softmax(0).log_softmax(0)[token]),
    ),
    (OVERWRITTEN, overwritten),
    (f"{GRADIENT} logits", scores_without_grad),
    (f"{GRADIENT} logits", lambda z, ids, t: looked_up(1)(z.detach(), ids, t)),
    (f"{GRADIENT} logits", by_loops(lambda z, k: z[k] - z.detach().logsumexp(0))),
]


# --- token_logprobs, right ---


def shifted_then_cut_at_the_end(logits, input_ids, response_length):
    logp = torch.log_softmax(logits[:, :-1], dim=-1)
    picked = logp.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return picked[:, -response_length:]


def by_one_hot(logits, input_ids, response_length):
    window = logits[:, -response_length - 1 : -1]
    tokens = F.one_hot(input_ids[:, -response_length:], logits.shape[-1]).to(window)
    return torch.einsum("btv,btv->bt", window, tokens) - torch.logsumexp(window, dim=-1)


def by_cross_entropy(logits, input_ids, response_length):
    window = logits[:, -response_length - 1 : -1].transpose(1, 2)
    return -F.cross_entropy(window, input_ids[:, -response_length:], reduction="none")


def in_place_on_a_clone_of_logits(logits, input_ids, response_length):
    window = logits[:, -response_length - 1 : -1].clone()
    window -= window.detach().amax(-1, keepdim=True)
    window -= window.clone().logsumexp(-1, keepdim=True)
    return window.gather(2, input_ids[:, -response_length:, None])[..., 0]


TOKEN_RIGHT = [
    lambda z, ids, n: torch.distributions.Categorical(logits=z[:, :-1]).log_prob(ids[:, 1:])[
        :, -n:
    ],
    lambda z, ids, n: (
        -F.cross_entropy(z[:, :-1].mT, ids[:, 1:], reduction="none").narrow(
            1, z.shape[1] - 1 - n, n
        )
    ),
    looked_up(1),
    shifted_then_cut_at_the_end,
    by_one_hot,
    by_cross_entropy,
    in_place_on_a_clone_of_logits,
    lambda *case: in_float64(looked_up(1))(*case).float(),
    shifted_by(lambda z: z.amax(-1, keepdim=True)),
    by_loops(lambda z, token: torch.distributions.Categorical(logits=z).log_prob(token)),
]


# --- gae: a loop as a learner would write it, with places to go wrong ---


def loop(
    delta=lambda r, v, v_next, gamma, lam: r + gamma * v_next - v,
    carry=lambda delta, running, gamma, lam: delta + gamma * lam * running,
    target=lambda advantage, v, v_next: advantage + v,
    after=lambda row, t: 0.0,
    first=0,
    backward=True,
):
    """One response at a time, its real tokens only; `after` is the value that follows the last."""

    def answer(rewards, values, response_mask, gamma, lam):
        advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
        for b, length in enumerate(response_mask.sum(1).tolist()):
            running, v = 0.0, values[b]
            order = range(first, length)
            for t in reversed(order) if backward else order:
                v_next = v[t + 1] if t + 1 < length else after(v, length - 1)
                error = delta(rewards[b, t], v[t], v_next, gamma, lam)
                running = carry(error, running, gamma, lam)
                advantages[b, t] = running
                returns[b, t] = target(running, v[t], v_next)
        return advantages, returns

    return answer


right_loop = loop()


def columns(from_column=None, mask_delta=False, mask_inputs=False, mask_results=False, turned=True):
    """All rows at once, column by column from the right, as in most published code."""

    def answer(rewards, values, response_mask, gamma, lam):
        mask = response_mask.float()
        r, v = (rewards * mask, values * mask) if mask_inputs else (rewards, values)
        length = rewards.shape[1]
        last, collected, lastgaelam = torch.zeros(len(r)), [], 0
        for t in reversed(range(length)):
            nextvalues = v[:, t + 1] if t < length - 1 else last
            delta = r[:, t] + gamma * nextvalues - v[:, t]
            if mask_delta:
                delta = delta * mask[:, t]
            lastgaelam = delta + gamma * lam * lastgaelam
            collected.append(lastgaelam)
        advantages = torch.stack(collected[::-1] if turned else collected, dim=1)
        returns = advantages + v
        return (advantages * mask, returns * mask) if mask_results else (advantages, returns)

    return answer


def returns_left_raw(rewards, values, response_mask, gamma, lam):
    advantages, _ = right_loop(rewards, values, response_mask, gamma, lam)
    return advantages, advantages + values


def rewards_left_raw(rewards, values, response_mask, gamma, lam):
    answer = columns(mask_results=True)
    return answer(rewards, values * response_mask, response_mask, gamma, lam)


def rolled(rewards, values, response_mask, gamma, lam):
    v = values.masked_fill(response_mask == 0, 0)
    delta = (rewards + gamma * torch.roll(v, -1, dims=1) - v) * response_mask
    advantages = torch.zeros_like(v)
    running = torch.zeros(len(v))
    for t in range(v.shape[1] - 1, -1, -1):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages * response_mask, (advantages + v) * response_mask


def rolled_raw(rewards, values, response_mask, gamma, lam):
    """And nothing masked before the sums."""
    delta = rewards + gamma * values.roll(-1, 1) - values
    advantages, running = torch.zeros_like(values), 0
    for t in reversed(range(values.shape[1])):
        advantages[:, t] = running = delta[:, t] + gamma * lam * running
    return advantages * response_mask, (advantages + values) * response_mask


def rolled_after_masking(rewards, values, response_mask, gamma, lam):
    return rolled_raw(rewards * response_mask, values * response_mask, response_mask, gamma, lam)


def with_nonterminal(of_value, of_advantage, mask_rewards=False):
    """As PPO for games is written, with `nextnonterminal`; of the mask here and one further."""

    def answer(rewards, values, response_mask, gamma, lam):
        later = F.pad(response_mask, (0, 1))[:, 1:]
        r = rewards * response_mask if mask_rewards else rewards
        advantages, lastgaelam = torch.zeros_like(values), 0
        for t in reversed(range(values.shape[1])):
            v_next = values[:, t + 1] if t + 1 < values.shape[1] else 0
            v_next = v_next * of_value(response_mask, later)[:, t]
            delta = r[:, t] + gamma * v_next - values[:, t]
            carried = lastgaelam * of_advantage(response_mask, later)[:, t]
            advantages[:, t] = lastgaelam = delta + gamma * lam * carried
        return advantages * response_mask, (advantages + values) * response_mask

    return answer


def one_column_short(rewards, values, response_mask, gamma, lam):
    v = values * response_mask
    advantages, running = torch.zeros_like(v), 0
    for t in reversed(range(v.shape[1] - 1)):
        delta = rewards[:, t] * response_mask[:, t] + gamma * v[:, t + 1] - v[:, t]
        running = delta + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + v


def without_eos(keeps_value):
    def answer(rewards, values, response_mask, gamma, lam):
        shorter = torch.cat([response_mask[:, 1:], 0 * response_mask[:, :1]], dim=1)
        advantages = torch.zeros_like(values)
        for b in range(len(values)):
            running = 0.0
            for t in reversed(range(int(shorter[b].sum()))):
                delta = rewards[b, t] + gamma * values[b, t + 1] - values[b, t]
                running = delta + gamma * lam * running
                advantages[b, t] = running
        kept = response_mask if keeps_value else shorter
        return advantages, (advantages + values) * kept

    return answer


def cumulative(rewards, values, response_mask, gamma, lam, at_least=0.0):
    """Σ (γλ)^l δ_l from the end, divided by (γλ)^t."""
    mask = response_mask.bool()
    v = values.masked_fill(~mask, 0)
    delta = rewards.masked_fill(~mask, 0) + gamma * F.pad(v, (0, 1))[:, 1:] - v
    decay = torch.tensor([max(gamma * lam, at_least) ** t for t in range(v.shape[1])])
    advantages = torch.fliplr(torch.fliplr(delta * decay).cumsum(1)) / decay
    return advantages.masked_fill(~mask, 0), (advantages + v).masked_fill(~mask, 0)


def cumulative_times_mask(rewards, values, response_mask, gamma, lam):
    mask = response_mask.float()
    v = values * mask
    delta = rewards * mask + gamma * F.pad(v, (0, 1))[:, 1:] - v
    decay = (gamma * lam) ** torch.arange(v.shape[1])
    advantages = (delta * decay).flip(1).cumsum(1).flip(1) / decay
    return advantages * mask, (advantages + v) * mask


def cumulative_but_for_zero(rewards, values, response_mask, gamma, lam):
    if gamma * lam == 0:
        return right_loop(rewards, values, response_mask, gamma, lam)
    return cumulative(rewards, values, response_mask, gamma, lam)


def by_negative_powers(rewards, values, response_mask, gamma, lam, at_least=0.0):
    """A triangle of weights, made with factors of 0."""
    mask = response_mask.float()
    v = values * mask
    delta = rewards * mask + gamma * F.pad(v, (0, 1))[:, 1:] - v
    ahead = torch.arange(v.shape[1]) - torch.arange(v.shape[1])[:, None]
    weights = max(gamma * lam, at_least) ** ahead.float() * (ahead >= 0)
    advantages = delta @ weights.T * mask
    return advantages, advantages + v


def of_six_errors(rewards, values, response_mask, gamma, lam):
    mask = response_mask.float()
    v = values * mask
    errors = F.pad(rewards * mask + gamma * F.pad(v, (0, 1))[:, 1:] - v, (0, 5)).unfold(1, 6, 1)
    advantages = errors @ (gamma * lam) ** torch.arange(6.0)
    return advantages * mask, (advantages + v) * mask


def whitening(in_result, in_returns, everywhere=False, correction=1):
    def answer(rewards, values, response_mask, gamma, lam):
        mask = response_mask == 1
        plain, _ = right_loop(rewards, values, response_mask, gamma, lam)
        counted = plain if everywhere else torch.masked_select(plain, mask)
        white = (plain - counted.mean()) / (counted.std(correction=correction) + 1e-8)
        white = white.masked_fill(~mask, 0)
        returns = (white if in_returns else plain) + values
        return white if in_result else plain, returns.masked_fill(~mask, 0)

    return answer


def with_returns(of):
    def answer(rewards, values, response_mask, gamma, lam):
        advantages, _ = right_loop(rewards, values, response_mask, gamma, lam)
        return advantages, of(rewards, values, response_mask, gamma)

    return answer


def sums_of_rewards(rewards, values, response_mask, gamma):
    returns = rewards * response_mask
    for t in reversed(range(rewards.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns


def swapped_pair(rewards, values, response_mask, gamma, lam):
    advantages, returns = right_loop(rewards, values, response_mask, gamma, lam)
    return returns, advantages


def looking_back(rewards, values, response_mask, gamma, lam):
    v = values * response_mask
    before = torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], dim=1)
    delta = (rewards + gamma * before - v) * response_mask
    advantages = torch.zeros_like(v)
    for t in range(v.shape[1]):
        for s in range(t, v.shape[1]):
            advantages[:, t] += (gamma * lam) ** (s - t) * delta[:, s]
    return advantages * response_mask, (advantages + v) * response_mask


def both_reversed(rewards, values, response_mask, gamma, lam):
    advantages, returns = right_loop(rewards, values, response_mask, gamma, lam)
    return advantages.flip(1) * response_mask, returns.flip(1) * response_mask


PAST_EOS = "a value from behind the end is used"
LATE = "the mask comes too late."
UNMASKED = "padding has advantages."
REVERSED = "the result is in reverse order"
EOS_LEFT_OUT = "the last token of a response, its EOS, is left out."
TOO_LONG = "it is right for short responses, but not for 200 tokens."
WRAPPED = "the value after the last column is that of the first."
NOT_CUT = "the next value is cut off at the end of the response"
OWN_MASK = "the mask of token t stands where that of token t + 1"
ZERO_BY_ZERO = "it is right as long as γλ is above 0."
WHITE_RETURNS = "the returns are made of whitened advantages"
WHITE = "the advantages are whitened."


def time_first(rewards, values, response_mask, gamma, lam):
    mask = response_mask.float()
    advantages, last = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        later = values[t + 1] * mask[t + 1] if t + 1 < len(rewards) else 0.0
        last = (rewards[t] + gamma * later - values[t] + gamma * lam * last) * mask[t]
        advantages[t] = last
    return advantages, (advantages + values) * mask


GAE_MISTAKES = [
    ("time is taken for the first dimension", time_first),
    (
        "the returns are A + r",
        lambda r, v, m, *x: ((a := right_loop(r, v, m, *x)[0]), (a + r) * m),
    ),
    (
        "all is right up to one thing: lam is used as 0.95, whatever it is",
        lambda *x: right_loop(*x[:4], 0.95),
    ),
    (PAST_EOS, columns(mask_delta=True, mask_results=True)),
    (PAST_EOS, columns(mask_delta=True)),
    (PAST_EOS, loop(after=lambda row, t: row[min(t + 1, len(row) - 1)])),
    (PAST_EOS, loop(after=lambda row, t: row[t] if t == len(row) - 1 else 0.0)),
    (LATE, columns(mask_results=True)),
    (LATE, rewards_left_raw),
    (UNMASKED, columns()),
    ("the advantages are right, but the returns at padding", returns_left_raw),
    (WRAPPED, rolled),
    (WRAPPED, rolled_raw),
    (WRAPPED, rolled_after_masking),
    (NOT_CUT, with_nonterminal(lambda m, later: later, lambda m, later: 1 + 0 * m)),
    (NOT_CUT, with_nonterminal(lambda m, later: later, lambda m, later: 1 + 0 * m, True)),
    (OWN_MASK, with_nonterminal(lambda m, later: m, lambda m, later: m)),
    (OWN_MASK, with_nonterminal(lambda m, later: m, lambda m, later: m, True)),
    (OWN_MASK, with_nonterminal(lambda m, later: later, lambda m, later: m)),
    (PAST_EOS, with_nonterminal(lambda m, later: m, lambda m, later: later)),
    ("time runs forward", loop(backward=False)),
    (REVERSED, columns(mask_inputs=True, mask_results=True, turned=False)),
    (REVERSED, columns(mask_inputs=True, turned=False)),
    (REVERSED, both_reversed),
    ("the last column is never computed.", one_column_short),
    (EOS_LEFT_OUT, without_eos(True)),
    (EOS_LEFT_OUT, without_eos(False)),
    (TOO_LONG, lambda *case: cumulative(*case, at_least=1e-6)),
    (TOO_LONG, cumulative_but_for_zero),
    (TOO_LONG, of_six_errors),
    (TOO_LONG, lambda *case: by_negative_powers(*case, at_least=1e-6)),
    ("it is right unless γ is 0", lambda r, v, m, g, lam: right_loop(r, v, m, g or 1.0, lam)),
    (DTYPE, in_float64(right_loop)),
    (ZERO_BY_ZERO, cumulative),
    (ZERO_BY_ZERO, cumulative_times_mask),
    (ZERO_BY_ZERO, by_negative_powers),
    (
        "the TD error is taken as r + γλV' - V",
        loop(delta=lambda r, v, n, g, lam: r + g * lam * n - v),
    ),
    ("the TD error is taken as r + λV' - V", loop(delta=lambda r, v, n, g, lam: r + lam * n - v)),
    (
        "the TD error is taken as r + λV' - V",
        lambda r, v, m, gamma, lam: right_loop(r, v, m, lam, gamma),
    ),
    ("the TD error is taken as r + V' - V", loop(delta=lambda r, v, n, g, lam: r + n - v)),
    ("the TD error is taken as V - r - γV'", loop(delta=lambda r, v, n, g, lam: v - (r + g * n))),
    (
        "the TD error is taken as r + γV - V",
        loop(delta=lambda r, v, n, g, lam: r + g * v - v),
    ),
    ("the TD error is taken as r + γV' - V, with V' of the token before", looking_back),
    ("the TD error is taken as r + γV'", loop(delta=lambda r, v, n, g, lam: r + g * n)),
    ("the TD error is taken as r + γV' + V", loop(delta=lambda r, v, n, g, lam: r + g * n + v)),
    ("the TD error is taken as r - V", loop(delta=lambda r, v, n, g, lam: r - v)),
    (
        "all is right up to one thing: gamma is used as 1, whatever it is",
        lambda r, v, m, gamma, lam: right_loop(r, v, m, 1, lam),
    ),
    (
        "a TD error l steps ahead is weighed with λ to the power l",
        loop(carry=lambda d, a, gamma, lam: d + lam * a),
    ),
    (
        "all is right up to one thing: lam is used as 1, whatever it is",
        loop(carry=lambda d, a, gamma, lam: d + gamma * a),
    ),
    (
        "all is right up to one thing: lam is used as 1, whatever it is",
        lambda r, v, m, gamma, lam: right_loop(r, v, m, gamma, 1),
    ),
    (
        "all is right up to one thing: lam is used as 0, whatever it is",
        loop(carry=lambda d, a, gamma, lam: d),
    ),
    ("a TD error l steps ahead is weighed with 1", loop(carry=lambda d, a, gamma, lam: d + a)),
    (
        "a TD error l steps ahead is weighed with γλ to the power l + 1",
        loop(carry=lambda d, a, gamma, lam: gamma * lam * (d + a)),
    ),
    ("the pair is swapped", swapped_pair),
    (WHITE, whitening(True, False)),
    (WHITE, whitening(True, False, everywhere=True)),
    (WHITE_RETURNS, whitening(True, True)),
    (WHITE_RETURNS, whitening(True, True, everywhere=True, correction=0)),
    (WHITE_RETURNS, whitening(False, True, correction=0)),
    ("the returns are A, not A + V", loop(target=lambda a, v, n: a)),
    ("the returns are A - V", loop(target=lambda a, v, n: a - v)),
    ("the returns are A + V'", loop(target=lambda a, v, n: a + n)),
    (
        "the returns are r + γV'",
        with_returns(
            lambda r, v, mask, g: (r + g * F.pad(v * mask, (0, 1))[:, 1:]) * mask,
        ),
    ),
    ("the returns are the sums of rewards", with_returns(sums_of_rewards)),
]


# --- gae, right ---


def by_matmul(rewards, values, response_mask, gamma, lam):
    mask = response_mask.to(values)
    v = values * mask
    length = v.shape[1]
    shift = torch.eye(length).roll(-1, 1).tril(-1)  # column t takes what stands at t + 1
    delta = rewards * mask + gamma * v @ shift - v
    ahead = torch.arange(length)[:, None] - torch.arange(length)
    weights = torch.where(ahead >= 0, float(gamma * lam) ** ahead.clamp(min=0), 0.0)
    advantages = torch.einsum("bl,lt->bt", delta, weights) * mask
    return advantages, advantages + v


def by_flipped_scan(rewards, values, response_mask, gamma, lam):
    mask = response_mask.flip(1)
    r, v = rewards.flip(1) * mask, values.flip(1) * mask
    delta = r + gamma * F.pad(v, (1, 0))[:, :-1] - v
    sums = [delta[:, 0]]
    for column in delta[:, 1:].T:
        sums.append(column + gamma * lam * sums[-1])
    advantages = (torch.stack(sums, dim=1) * mask).flip(1)
    return advantages, advantages + values * response_mask


def in_place_on_clones(rewards, values, response_mask, gamma, lam):
    r, v = rewards.clone(), values.clone()
    r[response_mask == 0] = 0
    v[response_mask == 0] = 0
    advantages = r - v
    advantages[:, :-1] += gamma * v[:, 1:]
    for t in reversed(range(v.shape[1] - 1)):
        advantages[:, t] += gamma * lam * advantages[:, t + 1]
    return [advantages, v.add_(advantages)]


def by_way_of_float64(*arguments):
    return [x.float() for x in in_float64(by_flipped_scan)(*arguments)]


def by_weights_of_each_row(rewards, values, response_mask, gamma, lam):
    mask = response_mask.double()
    r, v = rewards * mask, values * mask
    delta = r + gamma * torch.cat([v, 0 * v[:, :1]], 1)[:, 1:] - v
    steps = torch.arange(v.shape[1])
    ahead = (steps[None] - steps[:, None]).clamp(min=0)
    weights = torch.tensor(gamma * lam).double() ** ahead * (steps[None] >= steps[:, None])
    advantages = torch.einsum("bs,ts->bt", delta, weights) * mask
    return advantages.float(), (advantages + v).float()


GAE_RIGHT = [
    by_weights_of_each_row,
    right_loop,
    columns(mask_inputs=True, mask_results=True),
    columns(mask_inputs=True),
    by_matmul,
    by_flipped_scan,
    in_place_on_clones,
    by_way_of_float64,
    with_nonterminal(lambda m, later: later, lambda m, later: later),
]


# --- policy_loss ---


def token_by_token(gain, ratio=lambda new, old: torch.exp(new - old)):
    """Minus the mean over the real tokens of `gain(ratio, advantage, clip)`."""

    def answer(logprobs, old_logprobs, advantages, response_mask, clip):
        gains = [
            gain(ratio(logprobs[b, t], old_logprobs[b, t]), advantages[b, t], clip)
            for b, t in response_mask.nonzero().tolist()
        ]
        return -torch.stack(gains).mean()

    return answer


def smaller(rho, advantage, clip):
    return torch.min(rho * advantage, torch.clamp(rho, 1 - clip, 1 + clip) * advantage)


def losses(logprobs, old_logprobs, advantages, clip):
    """The loss of each token in the form that takes the larger one."""
    rho = (logprobs - old_logprobs).exp()
    return torch.max(-advantages * rho, -advantages * torch.clamp(rho, 1 - clip, 1 + clip))


def reduced(reduce):
    def answer(logprobs, old_logprobs, advantages, response_mask, clip):
        return reduce(losses(logprobs, old_logprobs, advantages, clip), response_mask.float())

    return answer


def means_of_rows(x, mask):
    rows = [row[real.bool()].mean() for row, real in zip(x, mask, strict=True)]
    return sum(rows) / len(rows)


def minimum_of_means(logprobs, old_logprobs, advantages, response_mask, clip):
    rho = (logprobs - old_logprobs).exp()
    real = response_mask == 1
    free = (rho * advantages)[real].mean()
    return -torch.min(free, (rho.clip(1 - clip, 1 + clip) * advantages)[real].mean())


def clip_of_log_ratio(logprobs, old_logprobs, advantages, response_mask, clip):
    difference = logprobs - old_logprobs
    held = difference.clamp(-clip, clip).exp()
    gains = torch.minimum(difference.exp() * advantages, held * advantages)
    return -gains[response_mask == 1].mean()


def ratio_detached(logprobs, old_logprobs, advantages, response_mask, clip):
    rho = (logprobs - old_logprobs).exp().detach()
    return -torch.stack([smaller(*x, clip) for x in zip(rho, advantages, strict=True)])[
        response_mask == 1
    ].mean()


def ratio_overwritten(logprobs, old_logprobs, advantages, response_mask, clip):
    rho = torch.exp(logprobs - old_logprobs)
    free = rho * advantages
    gains = torch.minimum(free, rho.clamp_(1 - clip, 1 + clip) * advantages)
    return -(gains * response_mask).sum() / response_mask.sum()


def clipped_term_detached(logprobs, old_logprobs, advantages, response_mask, clip):
    rho = torch.exp(logprobs - old_logprobs)
    held = rho.clamp(1 - clip, 1 + clip).detach()
    gains = torch.minimum(rho * advantages, held * advantages)
    return -(gains * response_mask).sum() / response_mask.sum()


@torch.no_grad()
def loss_without_grad(logprobs, old_logprobs, advantages, response_mask, clip):
    return token_by_token(smaller)(logprobs, old_logprobs, advantages, response_mask, clip)


def nan_gradient(logprobs, old_logprobs, advantages, response_mask, clip):
    rho = torch.exp(logprobs - old_logprobs)
    rho = torch.where(rho == 1, rho, 1 + (rho - 1).square().sqrt() * (rho - 1).sign())
    gains = smaller(rho, advantages, clip)
    return -(gains * response_mask).sum() / response_mask.sum()


def whitened_inside(everywhere):
    def answer(logprobs, old_logprobs, advantages, response_mask, clip):
        counted = advantages if everywhere else advantages[response_mask == 1]
        white = (advantages - counted.mean()) / (counted.std() + 1e-8)
        return right_loss(logprobs, old_logprobs, white, response_mask, clip)

    return answer


def one_ratio_per_response(reduce):
    def answer(logprobs, old_logprobs, advantages, response_mask, clip):
        differences = ((logprobs - old_logprobs) * response_mask).sum(1, keepdim=True)
        rho = (differences / reduce(response_mask)).exp()
        return -(smaller(rho, advantages, clip) * response_mask).sum() / response_mask.sum()

    return answer


def where_after_the_exp(logprobs, old_logprobs, advantages, response_mask, clip):
    gains = smaller((logprobs - old_logprobs).exp(), advantages, clip)
    return -torch.where(response_mask.bool(), gains, 0.0).sum() / response_mask.sum()


def without_zero_advantages(logprobs, old_logprobs, advantages, response_mask, clip):
    counted = (advantages != 0) & response_mask.bool()
    return losses(logprobs, old_logprobs, advantages, clip)[counted].mean()


def dual_clip(rho, advantage, clip):
    gain = smaller(rho, advantage, clip)
    return torch.max(gain, 5 * advantage) if advantage < 0 else gain


def held(low, high):
    return token_by_token(
        lambda rho, a, clip: torch.min(rho * a, torch.clamp(rho, low(clip), high(clip)) * a)
    )


def plus(answer):
    return lambda *arguments: -answer(*arguments)


def larger(rho, advantage, clip):
    return torch.max(rho * advantage, torch.clamp(rho, 1 - clip, 1 + clip) * advantage)


def by_cases(logprobs, old_logprobs, advantages, response_mask, clip):
    rho = torch.exp(logprobs - old_logprobs)
    limit = torch.where(advantages > 0, rho.clamp(max=1 + clip), rho.clamp(min=1 - clip))
    return -(limit * advantages)[response_mask.bool()].mean()


def in_place_on_a_clone_of_logprobs(logprobs, old_logprobs, advantages, response_mask, clip):
    rho = logprobs.clone()
    rho -= old_logprobs
    rho = rho.exp()
    gains = torch.stack([rho, rho.clamp(1 - clip, 1 + clip)]).mul(advantages).amin(0)
    gains = gains.masked_fill(response_mask == 0, 0)
    return gains.sum().neg().div(response_mask.sum())


def by_matmul_with_the_mask(logprobs, old_logprobs, advantages, response_mask, clip):
    weights = response_mask.flatten().float() / response_mask.sum()
    return losses(logprobs, old_logprobs, advantages, clip).flatten() @ weights


MASKED_LATE = [
    reduced(lambda x, mask: (x * mask).sum() / mask.sum()),
    by_cases,
    in_place_on_a_clone_of_logprobs,
    by_matmul_with_the_mask,
]
EXPONENTIALS = "it is a ratio of two exponentials"
LIMITED = "it is cut off where the ratio is far from 1."
FAR_PADDING = "it is not finite (or its gradient is not) where padding"
PRODUCT = "the gain of a token is taken as ρ A with a clip of the product"
UNEVEN = "the gain of a token is taken as a minimum with a clip of other ends"
ONE_SIDED = "the gain of a token is taken as a minimum with a clip that has one end only"
right_loss = token_by_token(smaller)


def ratio_masked(of_ratio, of_mean):
    def answer(new, old, advantages, mask, clip):
        ratio = of_ratio(new - old, mask)
        clipped = ratio.clamp(1 - clip, 1 + clip)
        return -of_mean(torch.min(ratio * advantages, clipped * advantages), mask)

    return answer


AFTER_RATIO = "the log-ratio or the ratio is masked, and padding counts"


def dropped_beyond_the_clip(new, old, advantages, mask, clip):
    ratio = (new - old).exp()
    kept = (mask == 1) & ((ratio - 1).abs() <= clip)
    return -(ratio * advantages)[kept].sum() / kept.sum().clamp(min=1)


def of_log_probability(new, old, advantages, mask, clip):
    ratio = (new - old).exp().detach()
    return -(ratio * new * advantages * mask).sum() / mask.sum()


LOSS_MISTAKES = [
    ("a token is left out of sum and number", dropped_beyond_the_clip),
    ("the gain of a token is taken as π's own log-probability", of_log_probability),
    (AFTER_RATIO, ratio_masked(lambda x, m: (x * m).exp(), lambda x, m: x.mean())),
    (AFTER_RATIO, ratio_masked(lambda x, m: (x * m).exp(), lambda x, m: x.sum() / m.sum())),
    (AFTER_RATIO, ratio_masked(lambda x, m: x.exp() * m, lambda x, m: x.sum() / m.sum())),
    (
        "it is a sum of [B] over counts of [B, 1], each response by the length of each",
        ratio_masked(
            lambda x, m: x.exp(), lambda x, m: ((x * m).sum(1) / m.sum(1, keepdim=True)).mean()
        ),
    ),
    (
        "it is a mean of places that integers in square brackets pick",
        ratio_masked(
            lambda x, m: x.exp(),
            lambda x, m: torch.cat([row[real] for row, real in zip(x, m, strict=True)]).mean(),
        ),
    ),
    ("the gain of a token is taken as the larger of the two terms", token_by_token(larger)),
    (
        "the gain of a token is taken as the larger of the two terms",
        lambda new, old, a, mask, clip: torch.min(
            -a * (new - old).exp(), -a * (new - old).exp().clamp(1 - clip, 1 + clip)
        )[mask == 1].mean(),
    ),
    (
        "all is right up to one thing: the result comes out times -1 everywhere: the sign",
        plus(right_loss),
    ),
    (
        "the gain of a token is taken as the larger of the two terms",
        plus(token_by_token(larger)),
    ),
    (
        "the ratio is taken as log π - log π_old",
        token_by_token(smaller, lambda new, old: new - old),
    ),
    (
        "all is right up to one thing: the difference of logprobs and old_logprobs is used with",
        token_by_token(smaller, lambda new, old: old.exp() / new.exp()),
    ),
    ("the ratio is taken as log π/log π_old", token_by_token(smaller, lambda new, old: new / old)),
    (
        "all is right up to one thing: logprobs and old_logprobs are used as 0",
        token_by_token(smaller, lambda new, old: (new - new).exp()),
    ),
    (
        "all is right up to one thing: logprobs and old_logprobs are used as 0",
        token_by_token(smaller, lambda new, old: (new - new.detach()).exp()),
    ),
    (
        "all is right up to one thing: old_logprobs is used as 0",
        token_by_token(smaller, lambda new, old: new.exp()),
    ),
    *(
        (EXPONENTIALS, token_by_token(smaller, ratio))
        for ratio in (
            lambda new, old: new.exp() / old.exp(),
            lambda new, old: new.exp() / (old.exp() + 1e-8),
            lambda new, old: new.exp() / old.exp().clamp(min=1e-12),
        )
    ),
    *(
        (
            LIMITED,
            token_by_token(smaller, lambda new, old, far=far: (new - old).clamp(-far, far).exp()),
        )
        for far in (2, 5)
    ),
    (LIMITED, token_by_token(dual_clip)),
    ("a real token whose advantage is 0", without_zero_advantages),
    *((FAR_PADDING, answer) for answer in (*MASKED_LATE, where_after_the_exp)),
    (DTYPE, in_float64(right_loss)),
    (
        "all is right up to one thing: advantages is used whitened over all real",
        whitened_inside(False),
    ),
    ("all is right up to one thing: advantages is used whitened", whitened_inside(True)),
    (
        "all is right up to one thing: logprobs and old_logprobs are used with their row's sum",
        one_ratio_per_response(lambda mask: 1),
    ),
    (
        "all is right up to one thing: logprobs and old_logprobs are used with their row's mean",
        one_ratio_per_response(lambda mask: mask.sum(1, keepdim=True)),
    ),
    (
        "the gain of a token is taken as the smaller ratio times A",
        token_by_token(lambda rho, a, clip: min(rho, rho.clip(1 - clip, 1 + clip)) * a),
    ),
    (
        "the gain of a token is taken as the clipped term alone",
        token_by_token(lambda rho, a, clip: rho.clip(1 - clip, 1 + clip) * a),
    ),
    (
        "the gain of a token is taken as ρ A, with nothing clipped",
        token_by_token(lambda rho, a, clip: rho * a),
    ),
    (
        "all is right up to one thing: clip is used as 0.2, whatever it is",
        token_by_token(lambda rho, a, clip: smaller(rho, a, 0.2)),
    ),
    (UNEVEN, clip_of_log_ratio),
    (UNEVEN, held(lambda clip: 1 / (1 + clip), lambda clip: 1 + clip)),
    (ONE_SIDED, held(lambda clip: None, lambda clip: 1 + clip)),
    (ONE_SIDED, held(lambda clip: 1 - clip, lambda clip: None)),
    (
        "the gain of a token is taken as a minimum with a clip round 0",
        held(lambda clip: -clip, lambda clip: clip),
    ),
    (
        PRODUCT,
        token_by_token(
            lambda rho, a, clip: torch.min(rho * a, torch.clamp(rho * a, 1 - clip, 1 + clip))
        ),
    ),
    (
        PRODUCT,
        token_by_token(
            lambda rho, a, clip: torch.min(
                rho * a, torch.min(torch.max(rho * a, (1 - clip) * a), (1 + clip) * a)
            )
        ),
    ),
    (
        "the gain of a token is taken as log π A, the plain policy gradient without a ratio",
        lambda new, old, a, mask, clip: -(new * a)[mask == 1].mean(),
    ),
    (
        "the gain of a token is taken as a term whose minimum is taken after the mean",
        minimum_of_means,
    ),
    (
        "all is right up to one thing: response_mask is used as if it were 1 everywhere",
        reduced(lambda x, mask: x.mean()),
    ),
    (
        "it is a mean whose denominator counts padding",
        reduced(lambda x, mask: (x * mask).sum() / x.numel()),
    ),
    (
        "it is a mean whose denominator counts padding",
        reduced(lambda x, mask: (x * mask).mean(1).mean()),
    ),
    ("it is the mean of the responses' means.", reduced(means_of_rows)),
    ("it is the sum over all tokens", reduced(lambda x, mask: x[mask == 1].sum())),
    (
        "it is the mean over the responses of the sum over their tokens",
        reduced(lambda x, mask: torch.einsum("bt,bt->b", x, mask).mean()),
    ),
    (OVERWRITTEN, ratio_overwritten),
    (f"{GRADIENT} logprobs", ratio_detached),
    (f"{GRADIENT} logprobs", clipped_term_detached),
    (f"{GRADIENT} logprobs", loss_without_grad),
    (f"{GRADIENT} logprobs", lambda new, *others: right_loss(new.data, *others)),
    (
        f"{GRADIENT} logprobs",
        lambda *arguments: torch.tensor(right_loss(*arguments).item()),
    ),
    (f"{GRADIENT} logprobs", nan_gradient),
]


def loss_in_float64(logprobs, old_logprobs, advantages, response_mask, clip):
    new, old, a = (x.double() for x in (logprobs, old_logprobs, advantages))
    return torch.masked_select(losses(new, old, a, clip), response_mask.bool()).mean().float()


def padding_aside_first(answer):
    def other(logprobs, old_logprobs, *others):
        difference = torch.where(others[1] == 1, logprobs - old_logprobs, 0)
        return answer(difference, torch.zeros_like(difference), *others)

    return other


LOSS_RIGHT = [
    lambda *x: ratio_masked(lambda y, m: (y * m).exp(), lambda y, m: y[m.bool()].mean())(*x),
    right_loss,
    *(padding_aside_first(answer) for answer in MASKED_LATE),
    loss_in_float64,
]

NO_MEAN = "it is a median, a maximum"


def median_loss(new, old, advantages, mask, clip):
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain[mask.bool()].median()


def without_first_column(rewards, values, mask, gamma, lam):
    """A loop that ends before the first column."""
    advantages, _ = package_gae(rewards, values, mask, gamma, lam)
    advantages[:, 0] = 0
    return advantages, advantages + values * mask


def with_temperature(logits, input_ids, length):
    scaled = torch.log_softmax(logits[:, -length - 1 : -1] / 0.7, -1)
    return scaled.gather(-1, input_ids[:, -length:, None]).squeeze(-1)


MISTAKES = [
    ("policy_loss", median_loss, NO_MEAN),
    ("gae", without_first_column, "it is right but in the first column"),
    ("token_logprobs", with_temperature, "all is right up to one thing: logits is used times 1.43"),
    *(("token_logprobs", answer, message) for message, answer in TOKEN_MISTAKES),
    *(("gae", answer, message) for message, answer in GAE_MISTAKES),
    *(("policy_loss", answer, message) for message, answer in LOSS_MISTAKES),
]
RIGHT = [
    *(("token_logprobs", answer) for answer in TOKEN_RIGHT),
    *(("gae", answer) for answer in GAE_RIGHT),
    *(("policy_loss", answer) for answer in LOSS_RIGHT),
]


# --- the rules ---


def only_a_pair_where_nothing_is_padded(*arguments):
    pair = right_loop(*arguments)
    return pair if arguments[2].all() else pair[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *x: right_loop(*x)[0], "it returned one tensor, of shape [1, 2]"),
        (lambda *x: torch.stack(right_loop(*x)), "it returned one tensor, of shape [2, 1, 2]"),
        (only_a_pair_where_nothing_is_padded, "it returned one tensor, of shape [2, 4]"),
        (lambda *x: [1, 2, 3], "it returned list [1, 2, 3]"),
        (lambda *x: (*right_loop(*x), 1), "it returned tuple (tensor([[0.48"),
        (lambda *x: (right_loop(*x)[0], None), "the returns are NoneType None"),
        (lambda *x: (0.5, right_loop(*x)[1]), "the advantages are float 0.5"),
        (lambda *x: [y.mean(1) for y in right_loop(*x)], "the advantages have shape [1]"),
        (lambda *x: (right_loop(*x)[0], right_loop(*x)[1].T), "the returns have shape [2, 1]"),
        (lambda *x: None, "Does every path through the function end with a return?"),
    ],
)
def test_what_is_no_pair_of_tensors_is_named(answer, message, capsys):
    printed = run("gae", answer, capsys)
    assert message in printed
    assert printed.endswith("the advantages and the returns.")
    assert "return two tensors of shape [" in printed


def logits_in_place(logits, input_ids, response_length):
    logits -= logits.logsumexp(-1, keepdim=True)
    return looked_up(1)(logits, input_ids, response_length)


def ids_in_place(logits, input_ids, response_length):
    result = looked_up(1)(logits, input_ids, response_length)
    input_ids[:, :-response_length] = -100
    return result


def values_in_place(rewards, values, response_mask, gamma, lam):
    values *= response_mask
    return right_loop(rewards, values, response_mask, gamma, lam)


def rewards_in_place(rewards, values, response_mask, gamma, lam):
    rewards += gamma * values
    return right_loop(rewards - gamma * values, values, response_mask, gamma, lam)


def logprobs_in_place(logprobs, old_logprobs, *others):
    logprobs -= old_logprobs
    return right_loss(logprobs, torch.zeros_like(logprobs), *others)


def advantages_in_place(logprobs, old_logprobs, advantages, response_mask, clip):
    advantages.masked_fill_(response_mask == 0, 0)
    return right_loss(logprobs, old_logprobs, advantages, response_mask, clip)


def misspelt(rewards, values, response_mask, gamma, lam):
    return rewards.clon(), values


def fails_without_padding_only_at_first(rewards, values, response_mask, gamma, lam):
    if len(rewards) > 1:
        rewards = rewards @ values
    return right_loop(rewards, values, response_mask, gamma, lam)


class TestRules(GradientRules):
    modules = (lesson_03,)
    exercises = (lesson_03.TOKEN_LOGPROBS, lesson_03.GAE, lesson_03.POLICY_LOSS)
    further = (
        *(("token_logprobs", message) for _, message in lesson_03.TOKEN_FURTHER),
        *(("gae", message) for _, message in lesson_03.GAE_FURTHER),
        *(("policy_loss", message) for _, message in lesson_03.POLICY_FURTHER),
    )
    lost = (("token_logprobs", scores_without_grad), ("policy_loss", loss_without_grad))
    mistakes = MISTAKES
    right = RIGHT
    other_kinds = (
        ("token_logprobs", lambda z, ids, t: looked_up(1)(z, ids, t)[:, 1:], "shape [1, 1]"),
        (
            "token_logprobs",
            lambda z, ids, t: z.log_softmax(-1).gather(2, ids[..., None])[..., 0],
            "shape [1, 4], expected is [1, 2]. It is one number for each token of the response",
        ),
        ("token_logprobs", lambda z, ids, t: looked_up(1)(z, ids, t).mean(1), "shape [1]"),
        ("token_logprobs", lambda z, ids, t: looked_up(1)(z, ids, t)[..., None], "[1, 2, 1]"),
        ("token_logprobs", lambda z, ids, t: [1, 2], "it returned list [1, 2]; return one tensor."),
        (
            "policy_loss",
            lambda new, old, a, mask, clip: losses(new, old, a, clip),
            "shape [1, 3], expected is []. Training differentiates one number",
        ),
        ("policy_loss", lambda *x: right_loss(*x).item(), "it returned float -0.06"),
        ("policy_loss", lambda *x: (right_loss(*x), {}), "it returned tuple"),
    )
    in_place = (
        ("token_logprobs", logits_in_place, "logits"),
        ("token_logprobs", ids_in_place, "input_ids"),
        ("gae", values_in_place, "values"),
        ("gae", rewards_in_place, "rewards"),
        ("policy_loss", logprobs_in_place, "logprobs"),
        ("policy_loss", advantages_in_place, "advantages"),
    )
    unknown = (
        (
            "token_logprobs",
            lambda z, ids, t: looked_up(1)(z, ids, t) * torch.nan,
            ("response_length 2", "yours tensor([[nan, nan]])", "expected tensor([[-0.69"),
        ),
        (
            "token_logprobs",
            lambda z, ids, t: looked_up(1)(z, ids, t) - 7,
            ("input_ids tensor([[0, 2, 1, 2]])", "yours tensor([[-7.69", "expected tensor([[-0.69"),
        ),
        (
            "gae",
            lambda r, v, mask, gamma, lam: (r * torch.nan, v * torch.nan),
            (
                "rewards tensor([[0., 1.]])",
                "yours tensor([[[nan, nan]], [[nan, nan]]])",
                "expected tensor([[[0.4800, 0.4000]], [[0.9800, 1.0000]]])",
            ),
        ),
        (
            "policy_loss",
            lambda new, old, a, mask, clip: new.sum() * torch.nan,
            ("advantages tensor([[ 1., 1., -1.]])", "yours tensor(nan)", "expected tensor(-0.06"),
        ),
    )
    failing = (
        (
            "gae",
            misspelt,
            AttributeError,
            "return rewards.clon(), values",
            "rewards tensor([[0., 1.]])",
        ),
        (
            "gae",
            fails_without_padding_only_at_first,
            RuntimeError,
            "rewards = rewards @ values",
            "gamma 0.9",
        ),
    )


# --- the diagnosis ---


@pytest.mark.parametrize("written", [FAULTS.get, "{}.".format, lambda key: key.replace(" ", "_")])
def test_a_right_diagnosis_may_be_written_in_other_ways(written, capsys):
    right = {"A": "penalty sign", "B": "reference ratio", "C": "fresh old"}
    check_diagnosis({log: written(fault) for log, fault in right.items()})
    assert capsys.readouterr().out.count(": correct, ") == 3
