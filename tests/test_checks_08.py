"""The checks of lesson 08: every known mistake is named, every right answer passes.

The answers, wrong and right, are written here as a learner would write them.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers_checks import UNNAMED, GradientRules, run

from rlhf_helpers import checks, dpo
from rlhf_helpers.checks import lesson_08

# --- dpo_loss ---


def right_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    ref = (ref_chosen - ref_rejected).detach()
    return F.softplus(-beta * (chosen - rejected - ref)).mean()


def of_gap(of):
    """Something made of h and β."""
    return lambda c, r, ref_c, ref_r, beta: of((c - ref_c.detach()) - (r - ref_r.detach()), beta)


def with_gap(gap):
    """The loss with something else for h."""
    return lambda c, r, ref_c, ref_r, beta: (
        -F.logsigmoid(beta * gap(c, r, ref_c.detach(), ref_r.detach())).mean()
    )


def with_gap_in_two_steps(gap):
    return lambda c, r, ref_c, ref_r, beta: (
        -torch.log(torch.sigmoid(beta * gap(c, r, ref_c, ref_r))).mean()
    )


OUTSIDE = "β stands outside of the logarithm"
LOSS_MISTAKES = [
    ("h is made of the policy alone", with_gap(lambda c, r, p, q: c - r)),
    ("h is made of the policy alone", with_gap_in_two_steps(lambda c, r, p, q: c - r)),
    ("h is made of the reference alone", with_gap(lambda c, r, p, q: p - q)),
    (
        "h is made without the reference's log-probability of the rejected",
        with_gap(lambda c, r, p, q: c - p - r),
    ),
    (
        "h is made without the reference's log-probability of the chosen",
        with_gap(lambda c, r, p, q: c - r + q),
    ),
    ("h is the log-ratio of the chosen response alone", with_gap(lambda c, r, p, q: c - p)),
    ("h is that of the rejected response alone", with_gap(lambda c, r, p, q: r - q)),
    ("h is that of the rejected response alone", with_gap(lambda c, r, p, q: q - r)),
    ("h is the sum of the two log-ratios", with_gap(lambda c, r, p, q: c - p + r - q)),
    ("h is made with the sign of the reference", with_gap(lambda c, r, p, q: c + p - r - q)),
    ("h is made with one of the reference's", with_gap(lambda c, r, p, q: c - p - r - q)),
    ("h is made with one of the reference's", with_gap(lambda c, r, p, q: c + p - (r - q))),
    ("h is made of probabilities", with_gap(lambda c, r, p, q: (c - p).exp() - (r - q).exp())),
    (
        "h is made of probabilities",
        with_gap(lambda c, r, p, q: c.exp() / p.exp() - r.exp() / q.exp()),
    ),
    (
        "h is made of probabilities",
        with_gap(lambda c, r, p, q: c.exp() - p.exp() - r.exp() + q.exp()),
    ),
    ("h is made without its sign", with_gap(lambda c, r, p, q: (c - p - r + q).abs())),
    ("h is made of quotients", with_gap(lambda c, r, p, q: c / p - r / q)),
    ("it is the loss of -h", with_gap(lambda c, r, p, q: (p - c) - (q - r))),
    (
        "it is the loss of -h",
        lambda c, r, p, q, beta: right_loss(r, c, q, p, beta),
    ),
    ("it is the loss of -h", of_gap(lambda h, beta: F.softplus(beta * h).mean())),
    (
        "it is the loss of -h",
        lambda c, r, p, q, beta: -F.logsigmoid(beta * ((p - q) - (c - r))).mean(),
    ),
    (OUTSIDE, of_gap(lambda h, beta: -beta * F.logsigmoid(h).mean())),
    (OUTSIDE, of_gap(lambda h, beta: -beta * h.sigmoid().log().mean())),
    (OUTSIDE, of_gap(lambda h, beta: -F.logsigmoid(h).mean() / beta)),
    ("β is not used", of_gap(lambda h, beta: F.softplus(-h).mean())),
    ("β divides h", of_gap(lambda h, beta: F.softplus(-h / beta).mean())),
    (
        "β multiplies one half of h",
        lambda c, r, p, q, beta: -F.logsigmoid(beta * (c - p) - (r - q)).mean(),
    ),
    (
        "β multiplies one half of h",
        lambda c, r, p, q, beta: -F.logsigmoid(beta * (c - r) - (p - q)).mean(),
    ),
    (
        "β multiplies the reference's half of h",
        lambda c, r, p, q, beta: -F.logsigmoid(c - r - beta * (p - q)).mean(),
    ),
    (
        "β multiplies the first of the four",
        lambda c, r, p, q, beta: -F.logsigmoid(beta * c - p - r + q).mean(),
    ),
    ("the loss of a pair is taken as a σ", of_gap(lambda h, beta: -(beta * h).sigmoid().mean())),
    (
        "the loss of a pair is taken as a σ",
        of_gap(lambda h, beta: (1 - (beta * h).sigmoid()).mean() - 1),
    ),
    (
        "the loss of a pair is taken as log σ(βh)",
        of_gap(lambda h, beta: F.logsigmoid(beta * h).mean()),
    ),
    (
        "the loss of a pair is taken as log σ(-βh)",
        of_gap(lambda h, beta: F.logsigmoid(-beta * h).mean()),
    ),
    ("the loss of a pair is taken as the gap", of_gap(lambda h, beta: -(beta * h).mean())),
    ("the loss of a pair is taken as the gap", of_gap(lambda h, beta: beta * h.mean())),
    ("the loss of a pair is taken as a hinge", of_gap(lambda h, b: F.relu(1 - b * h).mean())),
    ("the loss of a pair is taken as a hinge", of_gap(lambda h, b: F.relu(-b * h).mean())),
    (
        "the loss of a pair is taken as a mean of both choices",
        of_gap(lambda h, b: (0.9 * F.softplus(-b * h) + 0.1 * F.softplus(b * h)).mean()),
    ),
    (
        "the loss of a pair is taken as the square of IPO",
        of_gap(lambda h, beta: ((h - 0.5 / beta) ** 2).mean()),
    ),
    (
        "the loss of a pair is taken as two surprises",
        lambda c, r, p, q, beta: (F.softplus(-beta * (c - p)) + F.softplus(beta * (r - q))).mean(),
    ),
    (
        "the loss of a pair is taken as two surprises",
        lambda c, r, p, q, beta: (
            F.logsigmoid(beta * (r - q)) - F.logsigmoid(beta * (c - p))
        ).mean(),
    ),
    ("it is a sum over the pairs", of_gap(lambda h, beta: F.softplus(-beta * h).sum())),
    ("σ is averaged over the batch", of_gap(lambda h, b: -torch.sigmoid(b * h).mean().log())),
    ("the gaps are averaged", of_gap(lambda h, beta: F.softplus(-beta * h.mean()))),
    ("it is not finite", of_gap(lambda h, beta: -torch.log(torch.sigmoid(beta * h)).mean())),
    ("it is not finite", of_gap(lambda h, beta: (1 + (-beta * h).exp()).log().mean())),
    (
        "log-probabilities are exponentiated",
        with_gap(lambda c, r, p, q: torch.log(c.exp() / p.exp()) - torch.log(r.exp() / q.exp())),
    ),
    (
        "it is right for moderate gaps, but cut off",
        of_gap(lambda h, beta: -torch.log(torch.sigmoid(beta * h) + 1e-8).mean()),
    ),
    (
        "it is right for moderate gaps, but cut off",
        of_gap(lambda h, beta: F.softplus(-(beta * h).clamp(-50, 50)).mean()),
    ),
    (
        "it is a median",
        of_gap(lambda h, beta: F.softplus(-beta * h).median()),
    ),
]


def lets_the_reference_learn(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -F.logsigmoid(beta * (chosen - ref_chosen - rejected + ref_rejected)).mean()


def nothing_learns(*arguments):
    return right_loss(*arguments).detach()


def only_the_chosen_learn(chosen, rejected, ref_chosen, ref_rejected, beta):
    return right_loss(chosen, rejected.detach(), ref_chosen, ref_rejected, beta)


def detached_in_place(chosen, rejected, ref_chosen, ref_rejected, beta):
    ref_chosen.detach_()
    return right_loss(chosen, rejected, ref_chosen, ref_rejected, beta)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (detached_in_place, "the values are right, but an argument is taken out of the graph"),
        (lets_the_reference_learn, "the values are right, but a gradient reaches the reference."),
        (nothing_learns, "the values are right, but not the gradients of the policy"),
        (only_the_chosen_learn, "the values are right, but not the gradients of the policy"),
    ],
)
def test_wrong_gradients_are_named(answer, message, capsys):
    assert run("dpo_loss", answer, capsys).startswith(f"dpo_loss: {message}")


def in_float64(*arguments):
    return right_loss(*(x.double() for x in arguments[:4]), arguments[4])


def by_lesson_02(chosen, rejected, ref_chosen, ref_rejected, beta):
    from rlhf_helpers.reward import pairwise_loss

    with torch.no_grad():
        ref = ref_chosen - ref_rejected
    return pairwise_loss(beta * (chosen - rejected), beta * ref)


LOSS_RIGHT = [
    right_loss,
    dpo.dpo_loss,
    in_float64,
    by_lesson_02,
    of_gap(lambda h, beta: F.softplus(-beta * h).mean()),
    of_gap(lambda h, beta: torch.logaddexp(torch.zeros(len(h)), -beta * h).mean()),
    of_gap(lambda h, beta: sum(F.softplus(-beta * x) for x in h) / len(h)),
]

# --- implicit_rewards ---


def right_rewards(logprobs, ref_logprobs, response_mask, beta):
    return beta * ((logprobs - ref_logprobs) * response_mask).sum(dim=1)


def of_ratio(of):
    """β times what is made of the log-ratios and the mask."""
    return lambda p, q, mask, beta: beta * of(p - q, mask)


def first_real(mask):
    return mask.argmax(1)


def last_real(mask):
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)


def rows(of):
    """Row by row: the log-ratios, the first response token, the last one."""

    def all_rows(x, mask):
        places = zip(x, first_real(mask), last_real(mask), strict=True)
        return torch.stack([of(row, a, b) for row, a, b in places])

    return of_ratio(all_rows)


GETS = "a response gets "
REWARD_MISTAKES = [
    (GETS + "the mean over its tokens", of_ratio(lambda x, m: (x * m).sum(1) / m.sum(1))),
    (GETS + "the mean over all columns", of_ratio(lambda x, m: (x * m).mean(1))),
    (GETS + "the mean over all columns", of_ratio(lambda x, m: x.mean(1))),
    (GETS + "its prompt's tokens too", rows(lambda x, a, b: x[: b + 1].sum())),
    (GETS + "the padding behind it too", rows(lambda x, a, b: x[a:].sum())),
    (GETS + "everything in its row", of_ratio(lambda x, m: x.sum(1))),
    (GETS + "what is not its own", of_ratio(lambda x, m: (x * (m == 0)).sum(1))),
    (
        GETS + "as many columns as it has tokens, but counted",
        of_ratio(lambda x, m: torch.stack([y[: k.sum()].sum() for y, k in zip(x, m, strict=True)])),
    ),
    (
        GETS + "as many columns as it has tokens, but the last",
        of_ratio(
            lambda x, m: torch.stack([y[-k.sum() :].sum() for y, k in zip(x, m, strict=True)])
        ),
    ),
    (GETS + "ρ - 1 - log ρ", of_ratio(lambda x, m: (((-x).exp() - 1 + x) * m).sum(1))),
    (GETS + "all but its last token", rows(lambda x, a, b: x[a:b].sum())),
    (
        GETS + "all but the row's last column",
        of_ratio(lambda x, m: (x[:, :-1] * m[:, :-1]).sum(1)),
    ),
    (GETS + "its last token alone", rows(lambda x, a, b: x[b])),
    (GETS + "its first token alone", rows(lambda x, a, b: x[a])),
    (
        GETS + "a mean over the batch",
        of_ratio(lambda x, m: (x * m).sum(1).mean().repeat(len(x))),
    ),
    (GETS + "a sum over the batch", of_ratio(lambda x, m: (x * m).sum().repeat(len(x)))),
    (GETS + "the policy's log-probability", lambda p, q, m, beta: beta * (p * m).sum(1)),
    (GETS + "the reference's log-probability", lambda p, q, m, beta: beta * (q * m).sum(1)),
    (
        GETS + "the log-ratio of the reference to the policy",
        lambda p, q, m, beta: right_rewards(q, p, m, beta),
    ),
    (GETS + "a ratio of probabilities", of_ratio(lambda x, m: (x * m).sum(1).exp())),
    (GETS + "a ratio of probabilities", of_ratio(lambda x, m: (x.exp() * m).sum(1))),
    (
        GETS + "a quotient of logarithms",
        lambda p, q, m, beta: beta * (p * m).sum(1) / (q * m).sum(1),
    ),
    (GETS + "log-ratios without their signs", of_ratio(lambda x, m: (x.abs() * m).sum(1))),
    (GETS + "squares of log-ratios", of_ratio(lambda x, m: (x**2 * m).sum(1) / 2)),
    (
        GETS + "log-ratios weighed with probabilities",
        lambda p, q, m, beta: beta * (p.exp() * (p - q) * m).sum(1),
    ),
    (
        GETS + "one log-probability that is masked",
        lambda p, q, m, beta: beta * (p * m - q).sum(1),
    ),
    (
        GETS + "one log-probability that is masked",
        lambda p, q, m, beta: beta * (p - q * m).sum(1),
    ),
    (GETS + "the log-ratio itself", lambda p, q, m, beta: ((p - q) * m).sum(1)),
    (GETS + "the log-ratio divided by β", lambda p, q, m, beta: ((p - q) * m).sum(1) / beta),
    (
        GETS + "a difference of which β multiplies one half",
        lambda p, q, m, beta: ((beta * p - q) * m).sum(1),
    ),
    (
        GETS + "the reward less a KL",
        lambda p, q, m, beta: (p * m).sum(1) - beta * ((p - q) * m).sum(1),
    ),
]
REWARD_RIGHT = [
    right_rewards,
    lesson_08.implicit_rewards,
    rows(lambda x, a, b: x[a : b + 1].sum()),
    of_ratio(lambda x, m: x.masked_fill(m == 0, 0).sum(-1)),
    of_ratio(lambda x, m: torch.einsum("bl,bl->b", x, m.float())),
    lambda p, q, m, beta: (beta * (p * m) - beta * (q * m)).sum(1),
]

MISTAKES = [
    *(("dpo_loss", answer, message) for message, answer in LOSS_MISTAKES),
    *(("implicit_rewards", answer, message) for message, answer in REWARD_MISTAKES),
]
RIGHT = [
    *(("dpo_loss", answer) for answer in LOSS_RIGHT),
    *(("implicit_rewards", answer) for answer in REWARD_RIGHT),
]


# --- the rules ---


def chosen_in_place(chosen, rejected, ref_chosen, ref_rejected, beta):
    with torch.no_grad():
        chosen -= ref_chosen
    return right_loss(chosen, rejected, 0 * ref_chosen, ref_rejected, beta)


def logprobs_in_place(logprobs, ref_logprobs, response_mask, beta):
    logprobs -= ref_logprobs
    return beta * (logprobs * response_mask).sum(1)


def clamped(chosen, rejected, ref_chosen, ref_rejected, beta):
    ratios = chosen - ref_chosen.detach(), rejected - ref_rejected.detach()
    first, second = (x.clamp(-10, 10) for x in ratios)
    return F.softplus(-beta * (first - second)).mean()


@pytest.mark.parametrize(
    ("name", "answer", "empty"),
    [
        ("dpo_loss", clamped, "where beta is 0"),  # log 2 there, whatever h is
        ("implicit_rewards", lambda *x: right_rewards(*x) + x[-1], "it is right but"),  # nowhere
    ],
)
def test_nothing_is_said_that_holds_of_every_answer(name, answer, empty, capsys):
    printed = run(name, answer, capsys)
    assert empty not in printed and UNNAMED in printed


def misspelt(chosen, rejected, ref_chosen, ref_rejected, beta):
    return F.logsigmod(chosen)


def by_numpy(chosen, rejected, ref_chosen, ref_rejected, beta):
    h = (chosen - rejected).numpy() - (ref_chosen - ref_rejected).numpy()
    return F.softplus(-beta * torch.tensor(h)).mean()


@pytest.mark.parametrize(
    ("mask_of", "where"),
    [
        (lambda m: m.roll(-1, 1), "one column too far to the left"),
        (lambda m: F.pad(m[:, 1:], (0, 1)), "one column too far to the left"),
        (lambda m: m.roll(1, 1), "one column too far to the right"),
        (lambda m: F.pad(m[:, :-1], (1, 0)), "one column too far to the right"),
        (lambda m: (m + m.roll(1, 1) * (m.cumsum(1) > 0)).clamp(max=1), "with one 1 too many"),
        (lambda m: m * (m.cumsum(1) > 1), "with one 1 too few, without the first"),
    ],
)
def test_a_mask_that_stands_elsewhere_is_not_taken_for_a_shorter_one(mask_of, where, capsys):
    printed = run(
        "implicit_rewards", lambda p, q, m, beta: right_rewards(p, q, mask_of(m), beta), capsys
    )
    assert f"all is right up to one thing: response_mask is used {where}" in printed


class TestRules(GradientRules):
    modules = (lesson_08,)
    exercises = (lesson_08.DPO_LOSS, lesson_08.IMPLICIT_REWARDS)
    lost = (("dpo_loss", nothing_learns),)
    mistakes = MISTAKES
    right = RIGHT
    other_kinds = (
        ("dpo_loss", of_gap(lambda h, beta: F.softplus(-beta * h)), "shape [1], expected is []"),
        ("dpo_loss", lambda *x: right_loss(*x).item(), "it returned float 0.28"),
        (
            "implicit_rewards",
            of_ratio(lambda x, m: x * m),
            "shape [1, 4], expected is [1]. It is one number for each response",
        ),
        ("implicit_rewards", of_ratio(lambda x, m: (x * m).sum()), "shape [], expected is [1]"),
        ("implicit_rewards", lambda *x: right_rewards(*x).tolist(), "it returned list"),
    )
    in_place = (
        ("dpo_loss", chosen_in_place, "chosen_logprobs"),
        ("implicit_rewards", logprobs_in_place, "logprobs"),
    )
    unknown = (
        ("dpo_loss", lambda *x: right_loss(*x) - 7, ("beta 1.0", "expected tensor(0.2877")),
        (
            "implicit_rewards",
            lambda *x: right_rewards(*x) * torch.nan,
            ("it gives NaN", "beta 1.0", "yours tensor([nan])", "expected tensor([1.0986])"),
        ),
    )
    failing = (
        ("dpo_loss", misspelt, AttributeError, "return F.logsigmod(chosen)", "beta 1.0"),
        ("dpo_loss", by_numpy, RuntimeError, "h = (chosen - rejected).numpy()", "beta 1.0"),
    )


def test_the_reference_version_of_the_rewards_knows_prompt_and_padding():
    """By hand: ratios 2 and 3/2 on the response, others on prompt and padding; β = 1."""
    case = lesson_08._REWARD_CASES[0]
    torch.testing.assert_close(lesson_08.implicit_rewards(*case), torch.tensor([3.0]).log())


# --- the three logs ---

ANSWERS = {"A": "second round", "B": "bare base", "C": "copy"}


def verdicts(answers, capsys):
    checks.check_origins(answers)
    return capsys.readouterr().out.splitlines()


def test_the_right_origins_are_correct(capsys):
    lines = verdicts(ANSWERS, capsys)
    assert [line[:12] for line in lines] == ["A: correct, ", "B: correct, ", "C: correct, "]


@pytest.mark.parametrize(
    ("log", "origin"), [(x, o) for x in ANSWERS for o in checks.ORIGINS if ANSWERS[x] != o]
)
def test_a_wrong_origin_meets_evidence_against_it(log, origin, capsys):
    line = next(x for x in verdicts(ANSWERS | {log: origin}, capsys) if x.startswith(log))
    assert line.startswith(f"{log}: it is not that {checks.ORIGINS[origin]}. Then ")
    assert "{" not in line
    rows = checks.dpo_log(log)
    for place, name in re.findall(r"{(start|end)_(\w+)}", lesson_08._EVIDENCE[origin]):
        assert f"{rows[0 if place == 'start' else -1][name]:.3g}" in line


def test_what_speaks_against_a_wrong_origin_is_so():
    """The facts that the evidence appeals to, in the recorded logs."""
    first, last = ({log: checks.dpo_log(log)[i] for log in ANSWERS} for i in (0, -1))
    assert {row["step"] for row in first.values()} == {0}
    assert first["C"]["chosen_log_ratio"] == first["C"]["rejected_log_ratio"] == 0
    assert first["C"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert first["B"]["chosen_log_ratio"] > 0.5 and first["B"]["rejected_log_ratio"] > 0.5
    assert first["A"]["rejected_log_ratio"] < first["A"]["chosen_log_ratio"] < 0
    assert first["A"]["accuracy"] > 0.7 > first["B"]["accuracy"]
    for log in ANSWERS:
        assert last[log]["accuracy"] > 0.6 and first[log]["loss"] > 0.3


def test_unattempted_and_unknown_origins_say_so(capsys):
    lines = verdicts({"A": ..., "B": "gremlins", "C": "copy"}, capsys)
    assert lines[0] == "A: not attempted yet."
    assert lines[1].startswith("B: 'gremlins' is none of the list; choose from ['copy', ")


def test_a_missing_log_is_an_error():
    with pytest.raises(ValueError, match="no answer for log 'B'"):
        checks.check_origins({"A": "copy", "C": "copy"})
    with pytest.raises(ValueError, match="no log 'D'"):
        checks.dpo_log("D")
