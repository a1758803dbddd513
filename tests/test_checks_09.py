"""The checks of lesson 09: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import re
import statistics
from math import nan

import pytest
import torch
from helpers_checks import GradientRules, assert_mistake_is_named, run

from rlhf_helpers import checks
from rlhf_helpers.checks import lesson_09

NAMES = ("leave_one_out", "grpo_advantages", "k3_penalty", "teaching_share")


# --- advantages ---


def loop(value):
    """One response at a time: its score, the others' of its group, the whole group's, all."""

    def advantages(scores, group_size):
        found = []
        for i in range(len(scores)):
            start = i // group_size * group_size
            group = scores[start : start + group_size]
            others = torch.cat([group[: i - start], group[i - start + 1 :]])
            found.append(value(scores[i], others, group, scores))
        return torch.stack(found)

    return advantages


def strided(value):
    def advantages(scores, group_size):
        count = len(scores) // group_size
        found = [value(scores[i::count]) for i in range(count)]
        return torch.stack(found, 1).flatten()

    return advantages


def earlier(scores, group_size):
    found = []
    for group in scores.split(group_size):
        for i, score in enumerate(group):
            found.append(score - (group[:i].mean() if i else 0))
    return torch.stack(found)


def other_values(scores, group_size):
    """The others told from the own score by their value."""
    found = []
    for group in scores.split(group_size):
        for score in group:
            others = group[group != score]
            found.append(score - others.mean() if len(others) else torch.tensor(0.0))
    return torch.stack(found)


def other_prompts_alone(scores, group_size):
    """Of one group alone there are none."""
    sums = scores.view(-1, group_size).sum(1).repeat_interleave(group_size)
    return scores - (scores.sum() - sums) / (len(scores) - group_size)


def whitened_after(scores, group_size):
    advantages = right_leave_one_out(scores, group_size)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def place_in_batch(scores, group_size):
    """The own place looked for in the group is that in the batch."""
    found = []
    for i, score in enumerate(scores):
        start = i // group_size * group_size
        group = scores[start : start + group_size]
        others = [x for j, x in enumerate(group) if j != i]
        found.append(score - sum(others) / len(others))
    return torch.stack(found)


def laid_out(make):
    """With a number of each group written as often as needed, but not side by side."""

    def advantages(scores, group_size):
        groups = scores.view(-1, group_size)
        return make(scores, group_size, lambda of: of(groups).repeat(group_size))

    return advantages


BASELINE = "what is taken off the score is "
LOO_MISTAKES = [
    (BASELINE + "the mean of the whole group", loop(lambda r, o, g, s: r - g.mean())),
    (BASELINE + "the mean of the whole batch", loop(lambda r, o, g, s: r - s.mean())),
    (
        BASELINE + "the mean of all other responses",
        loop(lambda r, o, g, s: r - (s.sum() - r) / (len(s) - 1)),
    ),
    (BASELINE + "the sum of the others, not", loop(lambda r, o, g, s: r - o.sum())),
    (BASELINE + "the sum of the others divided", loop(lambda r, o, g, s: r - o.sum() / len(g))),
    (BASELINE + "the best of the others", loop(lambda r, o, g, s: r - o.max())),
    (BASELINE + "the worst of the others", loop(lambda r, o, g, s: r - o.min())),
    (BASELINE + "the median of the others", loop(lambda r, o, g, s: r - o.median())),
    (
        BASELINE + "the median of the others",
        loop(lambda r, o, g, s: r - statistics.median(o.tolist())),
    ),
    (BASELINE + "one other response alone", loop(lambda r, o, g, s: r - g[0])),
    (
        BASELINE + "one other response alone",
        lambda s, n: (s.view(-1, n) - s.view(-1, n).roll(1, 1)).flatten(),
    ),
    (BASELINE + "the mean of those that stand before", earlier),
    (
        BASELINE + "the sum of the whole group",
        loop(lambda r, o, g, s: r - g.sum() / (len(g) - 1)),
    ),
    (BASELINE + "the mean of those with another score", other_values),
    (
        BASELINE + "the mean of those with another score",
        loop(lambda r, o, g, s: r - g[g != r].mean()),  # NaN where there is none
    ),
    (
        BASELINE + "the mean of those with another score",
        loop(lambda r, o, g, s: r - g[g != r].sum() / max(len(g[g != r]), 1)),
    ),
    (
        BASELINE + "made of the responses at the same place",
        lambda s, n: (s.view(-1, n) - s.view(-1, n).mean(0)).flatten(),
    ),
    (
        BASELINE + "made of the responses at the same place",
        lambda s, n: (s.view(-1, n) - (s.view(-1, n).sum(0) - s.view(-1, n)) / (n - 1)).flatten(),
    ),
    (
        BASELINE + "the sum of all other responses",
        lambda s, n: s - (s.sum() - s) / (n - 1),
    ),
    (BASELINE + "the mean of the responses to the other", other_prompts_alone),
    (BASELINE + "the mean of the group without", loop(lambda r, o, g, s: r - g[1:].mean())),
    (BASELINE + "the mean of the group without", loop(lambda r, o, g, s: r - g[:-1].mean())),
    (BASELINE + "nothing at all", lambda scores, size: 1 * scores),
    (
        "the group size is taken for the number",
        lambda s, n: torch.cat([g - (g.sum() - g) / (len(g) - 1) for g in s.chunk(n)]),
    ),
    (
        "the group size is taken for the number",
        lambda s, n: (s.view(n, -1) * n - s.view(n, -1).sum(1)[:, None]).flatten() / (n - 1),
    ),
    (
        "responses to different prompts are compared",
        strided(lambda g: g - (g.sum() - g) / (len(g) - 1)),
    ),
    (
        "sums or means of the groups are laid out",
        laid_out(lambda s, n, of: s - (of(lambda g: g.sum(1)) - s) / (n - 1)),
    ),
    (
        "sums or means of the groups are laid out",
        laid_out(lambda s, n, of: s - of(lambda g: g.mean(1))),
    ),
    ("it is the mean of the others by itself", loop(lambda r, o, g, s: o.mean())),
    ("every sign is the wrong way round", loop(lambda r, o, g, s: o.mean() - r)),
    (
        "it is the score less the mean of the whole group, made smaller",
        loop(lambda r, o, g, s: (r - g.mean()) * (len(g) - 1) / len(g)),
    ),
    (
        "the advantages are right, but come out in another order",
        lambda s, n: lesson_09.leave_one_out(s, n).view(-1, n).T.flatten(),
    ),
    ("it is divided by a spread", loop(lambda r, o, g, s: (r - o.mean()) / (g.std() + 1e-4))),
    ("it is divided by a spread", loop(lambda r, o, g, s: (r - g.mean()) / (g.std() + 1e-4))),
    ("it is divided by a spread", whitened_after),
]


def right_leave_one_out(scores, group_size):
    groups = scores.reshape(-1, group_size)
    return (group_size * (groups - groups.mean(1, keepdim=True)) / (group_size - 1)).reshape(-1)


LOO_RIGHT = [
    right_leave_one_out,
    lesson_09.leave_one_out,
    loop(lambda r, o, g, s: r - o.mean()),
]


def columns(scores, group_size):
    groups = scores.view(-1, group_size)
    mean, spread = (
        groups.mean(0),
        groups.var(0, correction=0) * len(groups) / (len(groups) - 1 or nan),
    )
    return ((groups - mean) / (spread.sqrt() + 1e-4)).flatten()


def places(scores, group_size):
    order = scores.view(-1, group_size).argsort(1).argsort(1).float()
    return lesson_09.grpo_advantages(order.flatten(), group_size)


def flat_groups_kept(scores, group_size):
    groups = scores.view(-1, group_size)
    white = lesson_09.grpo_advantages(scores, group_size).view(-1, group_size)
    return torch.where(groups.std(1, keepdim=True) > 0, white, groups).flatten()


def ties_share(scores, group_size):
    """Right, but equal scores of a group share what one of them would get."""
    found = []
    white = lesson_09.grpo_advantages(scores, group_size)
    for group, of in zip(scores.split(group_size), white.split(group_size), strict=True):
        found += [x / (group == score).sum() for score, x in zip(group, of, strict=True)]
    return torch.stack(found)


def small_ones_equal(scores, group_size):
    groups = scores.view(-1, group_size)
    white = lesson_09.grpo_advantages(scores, group_size).view(-1, group_size)
    return torch.where(groups.std(1, keepdim=True) < 0.01, 0.0, white).flatten()


def of_squares(scores, group_size):
    """The variance as the mean of the squares less the square of the mean."""
    groups = scores.view(-1, group_size)
    mean = groups.mean(1, keepdim=True)
    variance = (groups.square().mean(1, keepdim=True) - mean.square()).clamp(min=0)
    spread = (variance * group_size / (group_size - 1)).sqrt()
    return ((groups - mean) / (spread + 1e-4)).flatten()


def as_count(scores, group_size):
    """With as many groups as a group has responses; NaN for one response, without a warning."""
    groups = scores.view(group_size, -1)
    centred = groups - groups.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (groups.shape[1] - 1)
    return (centred / (variance.sqrt() + 1e-4)).flatten()


NAN = "it gives NaN, which is no number: somewhere a mean or a spread is taken of no response"
PLACES = [
    ("leave_one_out", loop(lambda r, o, g, s: r - g[g > r].mean()), NAN),
    ("grpo_advantages", loop(lambda r, o, g, s: (r - g.mean()) / r.std(correction=0) * nan), NAN),
    ("leave_one_out", place_in_batch, "the first group comes out right, but not those behind it"),
    (
        "leave_one_out",  # brackets are missing
        loop(lambda r, o, g, s: r - (g.sum() - r / (len(g) - 1))),
        "it counts otherwise than the exercise. In this case the own score counts 0.5, and each of "
        "the others -1, where 1 and -0.5 are asked for.",
    ),
    (
        "leave_one_out",
        loop(lambda r, o, g, s: r - o.sum() / 2),  # as it is for three
        "it counts otherwise than the exercise. In this case the own score counts 1, and each of "
        "the others -0.5, where 1 and -1 are asked for.",
    ),
    (
        "grpo_advantages",
        loop(lambda r, o, g, s: (r - g.mean()) / (g.std().sqrt() + 1e-4)),
        "it is right but for what the score less the mean of its group is divided by. In this "
        "case, in group number 1 of it, that is 2.0",
    ),
    ("grpo_advantages", flat_groups_kept, "it is right but where all scores of a group are equal"),
    ("grpo_advantages", ties_share, "it is right but in groups in which some scores are equal"),
]
HAIR = "it is right where the scores of a group are far apart, but not where they differ by a "
HAIRS = [
    (loop(lambda r, o, g, s: (r - g.mean()) / (g.var() + 1e-4).sqrt()), "thousandth: there 1e-4 u"),
    (
        loop(lambda r, o, g, s: (r - g.mean()) / (g.std() + 1e-8)),
        "thousandth: there it shows that n",
    ),
    (
        loop(lambda r, o, g, s: ((r - g.mean()) / g.std()).nan_to_num(0)),
        "thousandth: there it shows that nothing",
    ),
    (
        loop(lambda r, o, g, s: (r - g.mean()) / (g.std() + 1e-5)),
        "thousandth: there it shows that it is another number",
    ),
    (small_ones_equal, "thousandth: there a group whose scores differ a little is taken"),
]

SPREAD = "the score less the mean of its group is "
GRPO_MISTAKES = [
    (SPREAD + "not divided at all", loop(lambda r, o, g, s: r - g.mean())),
    (
        SPREAD + "divided by the variance",
        loop(lambda r, o, g, s: (r - g.mean()) / (g.var() + 1e-4)),
    ),
    (
        SPREAD + "divided by the standard deviation of the whole",
        loop(lambda r, o, g, s: (r - g.mean()) / (s.std() + 1e-4)),
    ),
    (
        SPREAD + "divided by a standard deviation that divides",
        loop(lambda r, o, g, s: (r - g.mean()) / (g.std(correction=0) + 1e-4)),
    ),
    (
        SPREAD + "divided by the mean absolute",
        loop(lambda r, o, g, s: (r - g.mean()) / ((g - g.mean()).abs().mean() + 1e-4)),
    ),
    (
        SPREAD + "divided by the distance",
        loop(lambda r, o, g, s: (r - g.mean()) / (g.max() - g.min() + 1e-4)),
    ),
    (SPREAD + "multiplied with", loop(lambda r, o, g, s: (r - g.mean()) * g.std())),
    (
        "sums or means of the groups are laid out",
        laid_out(lambda s, n, of: (s - of(lambda g: g.mean(1))) / (of(lambda g: g.std(1)) + 1e-4)),
    ),
    ("mean and spread are those of", lambda s, n: (s - s.mean()) / (s.std() + 1e-4)),
    ("the mean on top is that", loop(lambda r, o, g, s: (r - o.mean()) / (g.std() + 1e-4))),
    ("where all scores of a group are equal", loop(lambda r, o, g, s: (r - g.mean()) / g.std())),
    ("every sign is the wrong way", loop(lambda r, o, g, s: (g.mean() - r) / (g.std() + 1e-4))),
    ("the mean that is taken off is", loop(lambda r, o, g, s: (r - s.mean()) / (g.std() + 1e-4))),
    (
        SPREAD + "divided by the root of the mean square",
        loop(lambda r, o, g, s: (r - g.mean()) / ((g**2).mean() ** 0.5 + 1e-4)),
    ),
    (
        "what is taken off the score is the median",
        loop(lambda r, o, g, s: (r - g.median()) / (g.std() + 1e-4)),
    ),
    (
        "what is taken off the score is the median",
        loop(lambda r, o, g, s: (r - statistics.median(g.tolist())) / (g.std() + 1e-4)),
    ),
    (
        "what is taken off the score is the lowest",
        loop(lambda r, o, g, s: (r - g.min()) / (g.max() - g.min() + 1e-4)),
    ),
    ("it is a softmax over the group", lambda s, n: s.view(-1, n).softmax(1).flatten()),
    ("scores are replaced by their places", places),
    (
        "it is divided by the standard deviation with much more",
        loop(lambda r, o, g, s: (r - g.mean()) / (g.std() + 0.01)),
    ),
    (
        "1e-4 is added to the difference",
        loop(lambda r, o, g, s: (r - g.mean() + 1e-4) / (g.std() + 1e-4)),
    ),
    (
        "the advantages are right, but come out in another order",
        lambda s, n: lesson_09.grpo_advantages(s, n).view(-1, n).T.flatten(),
    ),
    ("the scores are divided by the spread", loop(lambda r, o, g, s: r / (g.std() + 1e-4))),
    ("1e-4 is added to the quotient", loop(lambda r, o, g, s: (r - g.mean()) / g.std() + 1e-4)),
    ("the mean alone is divided", loop(lambda r, o, g, s: r - g.mean() / (g.std() + 1e-4))),
    ("the mean alone is divided", loop(lambda r, o, g, s: r - g.mean() / g.std() + 1e-4)),
    ("mean and spread run down the columns", columns),
    ("the group size is taken for the number", as_count),
    ("1e-4 is added to the difference", loop(lambda r, o, g, s: (r - g.mean() + 1e-4) / g.std())),
    (
        "the mean on top is that",
        loop(lambda r, o, g, s: (r - o.mean()) / (g.std(correction=0) + 1e-4)),
    ),
    (
        "responses to different prompts are compared",
        strided(lambda g: (g - g.mean()) / (g.std() + 1e-4)),
    ),
]
GRPO_RIGHT = [
    lesson_09.grpo_advantages,
    loop(lambda r, o, g, s: (r - g.mean()) / (g.std() + 1e-4)),
    lambda s, n: (
        (s.view(-1, n) - s.view(-1, n).mean(1)[:, None])
        .div(s.view(-1, n).std(1)[:, None] + 1e-4)
        .view(-1)
    ),
]


# --- k3 ---


def tokens(value):
    """The mean over the response tokens of something made of r."""

    def penalty(logprobs, ref_logprobs, response_mask):
        r = ref_logprobs.detach() - logprobs
        return value(r)[response_mask == 1].mean()

    return penalty


def averaged(by):
    def penalty(logprobs, ref_logprobs, response_mask):
        r = ref_logprobs.detach() - logprobs
        return by(torch.exp(r) - 1 - r, response_mask)

    return penalty


def with_reference(logprobs, ref_logprobs, mask):
    r = ref_logprobs - logprobs
    return ((r.exp() - 1 - r) * mask).sum() / mask.sum()


def without_policy(logprobs, ref_logprobs, mask):
    return with_reference(logprobs.detach(), ref_logprobs.detach(), mask)


def half_detached(logprobs, ref_logprobs, mask):
    """The ratio is data, and only r has a gradient."""
    r = ref_logprobs.detach() - logprobs
    return ((r.detach().exp() - 1 - r) * mask).sum() / mask.sum()


def policy_weighted(logprobs, ref_logprobs, mask):
    r = ref_logprobs - logprobs
    return (logprobs.exp() * (r.exp() - 1 - r) * mask).sum() / mask.sum()


def k1_weighted(logprobs, ref_logprobs, mask):
    k1 = logprobs.exp() * (logprobs - ref_logprobs)
    return (k1 * mask).sum() / mask.sum()


def kl_div(logprobs, ref_logprobs, mask):
    pointwise = torch.nn.functional.kl_div(
        logprobs, ref_logprobs, reduction="none", log_target=True
    )
    return (pointwise * mask).sum() / mask.sum()


def of_whole(logprobs, ref_logprobs, mask):
    r = ((ref_logprobs.detach() - logprobs) * mask).sum(1)
    return (r.exp() - 1 - r).mean()


def times_ratio(logprobs, ref_logprobs, mask):
    r = ref_logprobs.detach() - logprobs
    k3 = (logprobs - logprobs.detach()).exp() * (r.exp() - 1 - r)
    return (k3 * mask).sum() / mask.sum()


def without_eos(logprobs, ref_logprobs, mask):
    before = mask.clone()
    before[range(len(mask)), mask.sum(1) - 1] = 0
    return with_reference(logprobs, ref_logprobs.detach(), before)


def of_other_r(make):
    def penalty(logprobs, ref_logprobs, response_mask):
        r = make(logprobs, ref_logprobs.detach())
        return (r.exp() - 1 - r)[response_mask == 1].mean()

    return penalty


def detached_in_place(logprobs, ref_logprobs, mask):
    return with_reference(logprobs, ref_logprobs.detach_(), mask)


TOKEN = "each token contributes "
MEAN = "the tokens are brought together by "
K3_MISTAKES = [
    (TOKEN + "the k3 of the other direction", tokens(lambda r: (-r).exp() - 1 + r)),
    (TOKEN + "the k1 of lesson 05", tokens(lambda r: -r)),
    (TOKEN + "r itself", tokens(lambda r: r)),
    (TOKEN + "the k2 of lesson 05", tokens(lambda r: r**2 / 2)),
    (TOKEN + "the square of r", tokens(lambda r: r**2)),
    (TOKEN + "e to the minus r", tokens(lambda r: (-r).exp() - 1 - r)),
    (TOKEN + "e to the r alone", tokens(lambda r: r.exp())),
    (TOKEN + "e to the r less r", tokens(lambda r: r.exp() - r)),
    (TOKEN + "e to the r less 1, which", tokens(lambda r: r.exp() - 1)),
    (TOKEN + "e to the r, less 1, plus r", tokens(lambda r: r.exp() - 1 + r)),
    (TOKEN + "e to the r less 1 as a whole", tokens(lambda r: (r - 1).exp() - r)),
    (TOKEN + "a k3 whose r is the quotient", of_other_r(lambda p, q: q / p)),
    (TOKEN + "a k3 whose r is the difference", of_other_r(lambda p, q: q.exp() - p.exp())),
    (TOKEN + "a k3 whose r is the ratio", of_other_r(lambda p, q: q.exp() / p.exp())),
    ("all is right up to one thing: the result comes out as -1", tokens(lambda r: 0 * r - 1)),
    (
        "all is right up to one thing: the difference of logprobs and ref_logprobs is used clipped",
        tokens(lambda r: r.clamp(-5, 5).exp() - 1 - r.clamp(-5, 5)),
    ),
    (
        "all is right up to one thing: response_mask is used one column too far to the right",
        lambda p, q, m: with_reference(p, q.detach(), m.roll(1, 1)),
    ),
    (TOKEN + "k3 times the ratio", tokens(lambda r: (-r).exp() * (r.exp() - 1 - r))),
    ("r is summed over the tokens", of_whole),
    (TOKEN + "the size of r", tokens(lambda r: r.abs())),
    (TOKEN + "a k3 that is weighed", policy_weighted),
    (TOKEN + "k1 weighed", k1_weighted),
    (TOKEN + "what torch's kl_div makes", kl_div),
    (MEAN + "a mean that leaves out the last token", without_eos),
    (
        MEAN + "a mean that leaves out the first token",
        averaged(lambda k, m: k[:, 1:][m[:, 1:] == 1].mean()),
    ),
    (
        MEAN + "a mean over the positions",
        averaged(lambda k, m: ((k * m).sum(0) / m.sum(0).clamp(min=1)).mean()),
    ),
    (
        MEAN + "a mean over the padding",
        averaged(lambda k, m: (k * (1 - m)).sum() / (1 - m).sum().clamp(min=1)),
    ),
    (MEAN + "a sum over all positions", averaged(lambda k, m: k.sum() / m.sum())),
    (MEAN + "a mean over all positions", averaged(lambda k, m: k.mean())),
    (MEAN + "a sum over the response tokens divided", averaged(lambda k, m: (k * m).mean())),
    (
        MEAN + "a mean over the responses",
        averaged(lambda k, m: torch.stack([k[i][m[i] == 1].mean() for i in range(len(k))]).mean()),
    ),
    (MEAN + "a sum. Asked", averaged(lambda k, m: k[m == 1].sum())),
    (MEAN + "a sum over tokens divided", averaged(lambda k, m: k[m == 1].sum() / len(k))),
]
LOST = [
    (times_ratio, "the value is right, but the gradient is that of k3 times the ratio"),
    (with_reference, "the value is right, but a gradient reaches the reference"),
    (without_policy, "the values are right, but not the gradient: that with respect to logprobs"),
    (detached_in_place, "the values are right, but an argument is taken out of the graph"),
    (
        lambda p, q, m: with_reference(p.detach_(), q, m),
        "the values are right, but an argument is taken out of the graph in place",
    ),
    (half_detached, "the values are right, but not the gradient: that with respect to logprobs"),
]
K3_RIGHT = [
    lesson_09.k3_penalty,
    tokens(lambda r: r.exp() - 1 - r),
    averaged(lambda k, m: (k * m).sum() / m.sum()),
]


# --- groups that teach ---


def share(holds):
    """The share of the groups, as lists, for which something holds."""

    def count(scores, group_size):
        groups = [g.tolist() for g in scores.split(group_size)]
        return sum(map(holds, groups)) / len(groups)

    return count


def of_responses(scores, group_size):
    return sum(len(set(g.tolist())) > 1 for g in scores.split(group_size)) / len(scores)


def without_last(scores, group_size):
    """A range that ends one too early."""
    count = len(scores) // group_size
    groups = [scores[i * group_size : (i + 1) * group_size].tolist() for i in range(count - 1)]
    return sum(max(g) > min(g) for g in groups) / count


right_share = share(lambda g: max(g) > min(g))
TEACH = "it is "
SHARE_MISTAKES = [
    (TEACH + "the share of the groups in which all are equal", share(lambda g: len(set(g)) == 1)),
    (TEACH + "the share of the groups whose mean", share(lambda g: sum(g) != 0)),
    (TEACH + "the share of the groups in which something", share(lambda g: max(g) > 0)),
    (TEACH + "the share of the groups in which no two", share(lambda g: len(set(g)) == len(g))),
    (TEACH + "the share of the groups whose first", share(lambda g: g[0] != g[-1])),
    (TEACH + "1 if anything differs", lambda s, n: float(len(set(s.tolist())) > 1)),
    (
        TEACH + "a share of the responses",
        lambda s, n: sum(x != g[0] for g in s.split(n) for x in g).item() / len(s),
    ),
    (
        TEACH + "a share of the responses",
        lambda s, n: (s.view(-1, n) != s.view(-1, n).mean(1)[:, None]).float().mean(),
    ),
    (TEACH + "the share of the groups whose sum is above", share(lambda g: sum(g) > 0)),
    (TEACH + "the share of the groups that are not all", share(lambda g: set(g) != {1})),
    (TEACH + "the share of the groups that are not all", share(lambda g: sum(g) / len(g) < 1)),
    (TEACH + "0 whatever the scores", share(lambda g: abs(sum(g) - len(g) * sum(g) / len(g)) > 1)),
    (TEACH + "a share that has been rounded", lambda s, n: round(right_share(s, n), 2)),
    (TEACH + "the number of the groups divided", of_responses),
    (TEACH + "the share of the groups in which some score is not", share(any)),
    (TEACH + "the share of the groups whose mean lies", share(lambda g: 0 < sum(g) / len(g) < 1)),
    (TEACH + "a share to which the last group", without_last),
    (
        TEACH + "a share to which the first group",
        lambda s, n: share(lambda g: len(set(g)) > 1)(s[n:], n),
    ),
    (TEACH + "the share of the groups whose first two", share(lambda g: g[0] != g[1])),
    (TEACH + "the share of the groups that have scores", share(lambda g: min(g) <= 0 < max(g))),
    (TEACH + "the share of the groups that have scores", share(lambda g: min(g) < 0 < max(g))),
    (
        TEACH + "the share of the groups whose mean is not that",
        lambda s, n: (s.view(-1, n).mean(1) != s.mean()).float().mean(),
    ),
    (
        TEACH + "the mean of the groups' standard",
        lambda s, n: s.view(-1, n).std(1).mean().item(),
    ),
    (
        TEACH + "0 unless all groups teach",
        lambda s, n: sum(len(set(g.tolist())) > 1 for g in s.split(n)) // (len(s) // n),
    ),
    (
        TEACH + "a share of the responses",
        lambda s, n: ((s.view(-1, n) - s.view(-1, n).mean(1)[:, None]).abs() > 1e-6).float().mean(),
    ),
    (TEACH + "the share of scores in the batch", lambda s, n: (s[1:] != s[:-1]).float().mean()),
    (
        TEACH + "the share of the groups whose scores differ by more",
        share(lambda g: max(g) - min(g) > 0.01),
    ),
    (
        TEACH + "the share of the groups with a deviation",
        lambda s, n: sum(g.std() > 0 for g in s.split(n)) / (len(s) / n),
    ),
    (
        TEACH + "the share of the groups with a deviation",
        lambda s, n: sum((g != g.mean()).any() for g in s.split(n)) / (len(s) / n),
    ),
    (
        TEACH + "the number of the groups divided by the size",
        lambda s, n: sum(len(set(g.tolist())) > 1 for g in s.split(n)) / n,
    ),
    (TEACH + "1 if the first group teaches", lambda s, n: float(len(set(s[:n].tolist())) > 1)),
    (
        TEACH + "the number of different groups",
        lambda s, n: len({tuple(g.tolist()) for g in s.split(n)}) / (len(s) / n),
    ),
    (
        TEACH + "the share of the groups whose sum is neither",
        share(lambda g: sum(g) not in (0, len(g))),
    ),
    (TEACH + "the share of the groups with both", share(lambda g: 0 in g and 1 in g)),
    (
        TEACH + "the share of the groups in which some scores are",
        share(lambda g: len(set(g)) < len(g)),
    ),
    (
        TEACH + "the share of the groups in which not all scores are equal if",
        share(lambda g: len(set(g[1:])) > 1),
    ),
    (TEACH + "a share that has been rounded", lambda s, n: round(right_share(s, n))),
    (
        "all is right up to one thing: the result comes out as 1",
        share(lambda g: max(g) >= min(g)),
    ),
    (
        "responses to different prompts are thrown",
        lambda s, n: sum(len(g.unique()) > 1 for g in s.chunk(n)) / n,
    ),
    (
        "responses to different prompts are thrown",
        lambda s, n: sum(len(g.unique()) > 1 for g in s.view(-1, n).T) / n,
    ),
    (TEACH + "a number of groups", lambda s, n: sum(len(set(g.tolist())) > 1 for g in s.split(n))),
    (
        "responses to different prompts are thrown",
        lambda s, n: (s.view(n, -1).amax(0) > s.view(n, -1).amin(0)).float().mean(),
    ),
]
SHARE_RIGHT = [
    lesson_09.teaching_share,
    share(lambda g: len(set(g)) > 1),
    lambda s, n: torch.tensor([len(g.unique()) > 1 for g in s.split(n)]).float().mean(),
]

MISTAKES = [
    (name, answer, message)
    for name, rows in zip(
        NAMES, (LOO_MISTAKES, GRPO_MISTAKES, K3_MISTAKES, SHARE_MISTAKES), strict=True
    )
    for message, answer in rows
]
RIGHT = [
    (name, answer)
    for name, rows in zip(NAMES, (LOO_RIGHT, GRPO_RIGHT, K3_RIGHT, SHARE_RIGHT), strict=True)
    for answer in rows
]


@pytest.mark.parametrize(("answer", "message"), LOST)
def test_a_gradient_that_is_lost_or_goes_too_far_is_named(answer, message, capsys):
    assert run("k3_penalty", answer, capsys).startswith(f"k3_penalty: {message}")


@pytest.mark.parametrize(("name", "answer", "message"), PLACES)
def test_where_it_is_right_is_named(name, answer, message, capsys):
    assert_mistake_is_named(name, answer, message, capsys)


@pytest.mark.parametrize(("answer", "message"), HAIRS)
def test_what_is_added_to_a_small_spread_is_named(answer, message, capsys):
    """Another small number makes no difference to large spreads, where mistakes get their names."""
    printed = run("grpo_advantages", answer, capsys)
    assert printed.startswith(f"grpo_advantages: {HAIR}{message}")
    assert "scores tensor([0.5000, 0.5010, 0.4990, 0.5000])" in printed


def test_a_variance_that_rounding_spoils_is_named(capsys):
    printed = run("grpo_advantages", of_squares, capsys)
    assert printed.startswith("grpo_advantages: it is right but for scores that differ by a thou")
    assert "scores tensor([5.0000, 5.0010, 4.9990, 5.0000])" in printed


def test_a_deviation_that_is_not_0_is_named(capsys):
    """For torch takes another way to that of one row than to those of several."""
    printed = run("teaching_share", lambda s, n: (s.view(-1, n).std(1) > 0).float().mean(), capsys)
    assert printed.startswith("teaching_share: it is the share of the groups with a deviation")
    assert "scores tensor([0.9000, 0.9000, 0.9000])" in printed


def test_a_column_that_was_not_kept_gets_a_hint(capsys):
    def not_kept(scores, group_size):
        groups = scores.view(-1, group_size)
        return ((groups - groups.mean(1)) / (groups.std(1) + 1e-4)).flatten()

    with pytest.raises(RuntimeError, match="must match the size"):
        checks.check_grpo_advantages(not_kept)
    assert "kept as a column, it meets its own row" in capsys.readouterr().out


def scores_in_place(scores, group_size):
    scores -= scores.mean()
    return scores


def misspelt(scores, group_size):
    return scores.veiw(-1, group_size)


class TestRules(GradientRules):
    modules = (lesson_09,)
    exercises = (
        lesson_09.LEAVE_ONE_OUT,
        lesson_09.GRPO_ADVANTAGES,
        lesson_09.K3_PENALTY,
        lesson_09.TEACHING_SHARE,
    )
    lost = (("k3_penalty", LOST[0][0]),)
    mistakes = MISTAKES
    right = RIGHT
    other_kinds = (
        (
            "leave_one_out",
            lambda s, n: s.view(-1, n),
            "the result has shape [1, 3], expected is [3]",
        ),
        ("grpo_advantages", lambda s, n: s.tolist(), "it returned list"),
        ("k3_penalty", lambda p, q, m: (p - q) * m, "shape [1, 2], expected is []. A loss is one"),
        ("teaching_share", lambda s, n: s.view(-1, n).std(1) > 0, "it returned Tensor"),
    )
    in_place = (
        ("leave_one_out", scores_in_place, "scores"),
        ("grpo_advantages", scores_in_place, "scores"),
        ("k3_penalty", lambda p, q, m: (p.sub_(q) * m).sum(), "logprobs"),
        ("teaching_share", lambda s, n: s.zero_().sum().item(), "scores"),
    )
    unknown = (
        ("leave_one_out", lambda *x: lesson_09.leave_one_out(*x) - 7, ("group_size 3",)),
        ("grpo_advantages", lambda *x: lesson_09.grpo_advantages(*x) - 7, ("group_size 3",)),
        (
            "k3_penalty",
            lambda *x: lesson_09.k3_penalty(*x) - 7,
            ("response_mask tensor([[1, 1]])",),
        ),
        ("teaching_share", lambda *x: lesson_09.teaching_share(*x) - 7, ("expected 0.5",)),
    )
    failing = (
        (
            "leave_one_out",
            misspelt,
            AttributeError,
            "return scores.veiw(-1, group_size)",
            "group_size 3",
        ),
    )


def test_the_cases_by_hand():
    assert lesson_09.leave_one_out(*lesson_09._HAND).tolist() == [1.5, -1.5, 0]
    expected = (torch.tensor(2.0).log() - 0.5 + 0.5 - torch.tensor(1.5).log()) / 2
    torch.testing.assert_close(lesson_09.k3_penalty(*lesson_09._K3_CASES[0]), expected)
    assert lesson_09.teaching_share(*lesson_09._SHARE_CASES[1]) == pytest.approx(1 / 3)
    assert re.search("check_k3_penalty", " ".join(checks.__all__))
