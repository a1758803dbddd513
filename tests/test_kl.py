"""KL divergence: the exact sum, and estimators held against it."""

import doctest
from math import inf, log, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from rlhf_helpers import kl as module
from rlhf_helpers.kl import AdaptiveKL, estimator_moments, exact_kl, kl_estimate
from rlhf_helpers.logprobs import token_logprobs

P = torch.tensor([0.5, 0.5], dtype=torch.float64)
Q = torch.tensor([0.25, 0.75], dtype=torch.float64)
KL_PQ = 0.5 * log(2) + 0.5 * log(2 / 3)  # 0.1438
KL_QP = 0.25 * log(1 / 2) + 0.75 * log(3 / 2)  # 0.1308


def random_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def expectation(weights: Tensor, logits_p: Tensor, logits_q: Tensor, kind: str) -> Tensor:
    """Exact mean of the estimator over tokens drawn with probability `weights`."""
    estimates = kl_estimate(logits_p.log_softmax(-1), logits_q.log_softmax(-1), kind)
    return (weights * estimates).sum(-1)


def test_doctests():
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# --- exact_kl ---


def test_exact_kl_by_hand():
    assert exact_kl(P.log(), Q.log()).item() == pytest.approx(KL_PQ, abs=1e-12)
    assert exact_kl(Q.log(), P.log()).item() == pytest.approx(KL_QP, abs=1e-12)
    assert abs(KL_PQ - KL_QP) > 0.01  # so the two lines above tell the directions apart


def test_exact_kl_of_a_batch_by_hand():
    logits_p = torch.tensor([[[1.0, 1.0, 2.0], [1.0, 1.0, 1.0]]]).log()
    logits_q = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]).log()
    expected = 2 * 0.25 * log(3 / 4) + 0.5 * log(3 / 2)
    torch.testing.assert_close(exact_kl(logits_p, logits_q), torch.tensor([[expected, 0.0]]))


def test_exact_kl_does_not_depend_on_the_offset_of_the_logits():
    torch.testing.assert_close(
        exact_kl(P.log() + 7, Q.log() - 3), torch.tensor(KL_PQ, dtype=torch.float64)
    )


def test_exact_kl_with_impossible_tokens():
    fair = torch.tensor([0.0, 0.0, -inf])
    certain = torch.tensor([0.0, -inf, -inf])
    assert exact_kl(certain, fair).item() == pytest.approx(log(2))  # p = 0: contributes 0
    assert exact_kl(fair, certain).item() == inf  # p > 0 where q = 0
    assert exact_kl(certain, certain).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_kl_matches_torch(dtype):
    logits_p = random_logits(3, 5, 11, seed=0, dtype=dtype)
    logits_q = random_logits(3, 5, 11, seed=1, dtype=dtype)
    expected = kl_divergence(Categorical(logits=logits_p), Categorical(logits=logits_q))
    result = exact_kl(logits_p, logits_q)
    assert result.dtype == dtype
    # It is made of log-probabilities, and those are rounded at the size of the logits.
    rounding = 8 * torch.finfo(dtype).eps * torch.stack([logits_p, logits_q]).abs().max().item()
    torch.testing.assert_close(result, expected, rtol=0, atol=rounding)


def test_exact_kl_computes_low_precision_in_float32():
    logits_p = random_logits(4, 11, seed=0).bfloat16()
    logits_q = random_logits(4, 11, seed=1).bfloat16()
    result = exact_kl(logits_p, logits_q)
    assert result.dtype == torch.float32
    assert torch.equal(result, exact_kl(logits_p.float(), logits_q.float()))


def test_exact_kl_gradient():
    logits_p = random_logits(2, 5, seed=0).requires_grad_()
    logits_q = random_logits(2, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(exact_kl, (logits_p, logits_q))


def test_exact_kl_gradient_with_an_impossible_token():
    # By hand: d KL / d z_q = q - p, and 0 for the tokens that neither can choose.
    logits_p = torch.cat([P.log(), torch.tensor([-inf])]).requires_grad_()
    logits_q = torch.cat([Q.log(), torch.tensor([-inf])]).requires_grad_()
    exact_kl(logits_p, logits_q).backward()
    expected = torch.tensor([-0.25, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(logits_q.grad, expected)
    # d KL / d z_p = p (log p/q - KL)
    first = 0.5 * (log(2) - KL_PQ)
    torch.testing.assert_close(
        logits_p.grad, torch.tensor([first, -first, 0.0], dtype=torch.float64)
    )


# --- kl_estimate ---


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [log(2), log(2 / 3)]),
        ("k2", [log(2) ** 2 / 2, log(3 / 2) ** 2 / 2]),
        ("k3", [1 / 2 - 1 + log(2), 3 / 2 - 1 - log(3 / 2)]),
    ],
)
def test_estimates_by_hand(kind, expected):
    estimates = kl_estimate(P.log(), Q.log(), kind)
    torch.testing.assert_close(estimates, torch.tensor(expected, dtype=torch.float64))


def test_k1_is_the_default():
    assert torch.equal(kl_estimate(P.log(), Q.log()), kl_estimate(P.log(), Q.log(), "k1"))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_under_the_policy(kind):
    logits_p, logits_q = random_logits(20, 7, seed=0), random_logits(20, 7, seed=1)
    mean = expectation(logits_p.softmax(-1), logits_p, logits_q, kind)
    torch.testing.assert_close(mean, exact_kl(logits_p, logits_q), rtol=0, atol=1e-12)


def test_k2_is_biased_and_less_so_for_close_policies():
    by_hand = 0.5 * log(2) ** 2 / 2 + 0.5 * log(3 / 2) ** 2 / 2  # 0.1612, not 0.1438
    mean = expectation(P, P.log(), Q.log(), "k2")
    assert mean.item() == pytest.approx(by_hand, abs=1e-12)
    assert by_hand - KL_PQ > 0.01

    logits, direction = random_logits(7, seed=0), random_logits(7, seed=1)

    def relative_bias(distance: float) -> float:
        other = logits + distance * direction
        exact = exact_kl(logits, other)
        return ((expectation(logits.softmax(-1), logits, other, "k2") - exact) / exact).abs().item()

    assert relative_bias(1.0) > 0.05
    assert relative_bias(0.01) < relative_bias(1.0) / 10


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_swapped_arguments_give_something_else(kind):
    # The sign of r is easily flipped: k1 then estimates minus the KL.
    logits_p, logits_q = random_logits(7, seed=0), random_logits(7, seed=1)
    exact = exact_kl(logits_p, logits_q)
    estimates = kl_estimate(logits_q.log_softmax(-1), logits_p.log_softmax(-1), kind)
    wrong = (logits_p.softmax(-1) * estimates).sum()
    assert (wrong - exact).abs() > 0.1 * exact
    if kind == "k1":
        torch.testing.assert_close(wrong, -exact)


def sampled_mean(sampler: Tensor, logits_p: Tensor, logits_q: Tensor, kind: str):
    """Mean and standard error of the estimator over 20,000 tokens drawn from `sampler`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(sampler.softmax(-1), 20_000, replacement=True, generator=generator)
    estimates = kl_estimate(
        token_logprobs(logits_p.expand(20_000, -1), tokens),
        token_logprobs(logits_q.expand(20_000, -1), tokens),
        kind,
    )
    return estimates.mean(), estimates.std() / 20_000**0.5


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_samples_must_come_from_the_policy(kind):
    logits_p, logits_q = random_logits(7, seed=0), random_logits(7, seed=1)
    exact = exact_kl(logits_p, logits_q)
    mean, error = sampled_mean(logits_p, logits_p, logits_q, kind)
    assert (mean - exact).abs() < 4 * error
    assert error < 0.05 * exact  # the line above is not true for want of precision
    wrong_mean, wrong_error = sampled_mean(logits_q, logits_p, logits_q, kind)
    assert (wrong_mean - exact).abs() > 20 * wrong_error


@settings(deadline=None)
@given(st.floats(-50, 0), st.floats(-50, 0))
def test_k2_and_k3_are_never_negative(logprob, ref_logprob):
    pair = (torch.tensor([x], dtype=torch.float64) for x in (logprob, ref_logprob))
    logprobs, ref_logprobs = pair
    rounding = torch.finfo(torch.float64).eps * (logprobs - ref_logprobs).abs()
    for kind in ("k2", "k3"):
        assert (kl_estimate(logprobs, ref_logprobs, kind) >= -rounding).all()


@settings(deadline=None)
@given(st.floats(1e-12, 1e-5), st.sampled_from([1, -1]))
def test_k3_keeps_its_digits_for_close_policies(size, sign):
    # log-probabilities near 0, so that their difference is r exactly
    r = torch.tensor([size], dtype=torch.float64)
    zero = torch.zeros_like(r)
    logprobs, ref_logprobs = (-r, zero) if sign > 0 else (zero, -r)
    rounding = torch.finfo(torch.float64).eps * r  # exp(r) - 1 - r is off by eps itself
    error = (kl_estimate(logprobs, ref_logprobs, "k3") - r * r / 2 - sign * r**3 / 6).abs()
    assert (error <= rounding).all()


def test_equal_policies_have_no_divergence():
    logprobs = random_logits(3, 4, 7, seed=0).log_softmax(-1)
    for kind in ("k1", "k2", "k3"):
        assert torch.equal(kl_estimate(logprobs, logprobs, kind), torch.zeros_like(logprobs))


def test_a_token_impossible_under_the_reference_costs_infinitely_much():
    for kind in ("k1", "k2", "k3"):
        estimate = kl_estimate(torch.tensor([-1.0]), torch.tensor([-inf]), kind)
        assert estimate.item() == inf


def test_estimates_of_low_precision_are_computed_in_float32():
    logprobs, ref_logprobs = P.log().bfloat16(), Q.log().bfloat16()
    result = kl_estimate(logprobs, ref_logprobs, "k3")
    assert result.dtype == torch.float32
    assert torch.equal(result, kl_estimate(logprobs.float(), ref_logprobs.float(), "k3"))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimates_gradient(kind):
    logprobs = random_logits(2, 3, seed=0).abs().neg().requires_grad_()
    ref_logprobs = random_logits(2, 3, seed=1).abs().neg()
    assert torch.autograd.gradcheck(lambda p: kl_estimate(p, ref_logprobs, kind), logprobs)


def test_gradient_of_k1_is_zero_on_average():
    logits_p = random_logits(7, seed=0).requires_grad_()
    weights = logits_p.detach().softmax(-1)  # sampled tokens carry no gradient
    mean = expectation(weights, logits_p, random_logits(7, seed=1), "k1")
    (gradient,) = torch.autograd.grad(mean, logits_p)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


# --- bad input ---


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("name", ["logits_p", "logits_q"])
def test_exact_kl_names_bad_logits(name, bad):
    logits = {"logits_p": torch.zeros(2, 3, 5), "logits_q": torch.zeros(2, 3, 5)}
    logits[name][1, 2, 4] = bad
    with pytest.raises(ValueError, match=rf"{name} at position \[1, 2\] .* NaN or \+inf"):
        exact_kl(**logits)


@pytest.mark.parametrize(
    ("logits_p", "logits_q", "error", "message"),
    [
        (
            torch.zeros(2, 5),
            torch.zeros(2, 6),
            ValueError,
            r"logits_q has shape \[2, 6\], logits_p \[2, 5\]",
        ),
        (
            torch.zeros(2, 5),
            torch.zeros(1, 5),
            ValueError,
            r"logits_q has shape \[1, 5\], logits_p \[2, 5\]",
        ),
        (torch.zeros(5).long(), torch.zeros(5), TypeError, r"logits_p .* not torch\.int64"),
        (torch.zeros(5), torch.zeros(5).long(), TypeError, r"logits_q .* not torch\.int64"),
        (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, r"logits_p has shape \[2, 0\]"),
    ],
)
def test_exact_kl_names_bad_input(logits_p, logits_q, error, message):
    with pytest.raises(error, match=message):
        exact_kl(logits_p, logits_q)


GOOD = torch.tensor([[-1.0, -2.0]])


@pytest.mark.parametrize(
    ("logprobs", "ref_logprobs", "error", "message"),
    [
        (GOOD, GOOD[0], ValueError, r"ref_logprobs has shape \[2\], logprobs \[1, 2\]"),
        (GOOD.long(), GOOD, TypeError, r"logprobs must be floating point, not torch\.int64"),
        (GOOD, GOOD.long(), TypeError, r"ref_logprobs must be floating point"),
        (torch.tensor([[-1.0, 0.25]]), GOOD, ValueError, r"^logprobs is 0\.25 at \[0, 1\]"),
        (GOOD, torch.tensor([[0.5, -1.0]]), ValueError, r"^ref_logprobs is 0\.5 at \[0, 0\]"),
        (torch.tensor([[-1.0, nan]]), GOOD, ValueError, r"^logprobs is nan at \[0, 1\]"),
        (GOOD, torch.tensor([[nan, -1.0]]), ValueError, r"^ref_logprobs is nan at \[0, 0\]"),
        (torch.tensor([[-inf, -1.0]]), GOOD, ValueError, r"logprobs is -inf at \[0, 0\]"),
    ],
)
def test_kl_estimate_names_bad_input(logprobs, ref_logprobs, error, message):
    with pytest.raises(error, match=message):
        kl_estimate(logprobs, ref_logprobs)


def test_rounding_above_zero_is_accepted():
    assert kl_estimate(torch.tensor([5e-5]), torch.tensor([0.0])).item() == pytest.approx(5e-5)


@pytest.mark.parametrize("kind", ["k4", "", "K1", None])
def test_unknown_kind_is_named(kind):
    with pytest.raises(ValueError, match=rf"kind is {kind!r}: it must be one of 'k1', 'k2', 'k3'"):
        kl_estimate(GOOD, GOOD, kind)


# --- AdaptiveKL ---


def test_the_controller_moves_beta_towards_the_target_and_not_too_fast():
    controller = AdaptiveKL(beta=0.1, target=4.0, gain=0.5)
    assert controller.update(4.0) == pytest.approx(0.1)  # on target: stays
    assert controller.update(4.4) == pytest.approx(0.1 * 1.05)  # 0.1 too much, times the gain
    assert controller.update(400.0) == pytest.approx(0.1 * 1.05 * 1.1)  # cut off at 0.2
    assert controller.update(0.0) == pytest.approx(0.1 * 1.05 * 1.1 * 0.9)
    assert controller.beta == pytest.approx(0.1 * 1.05 * 1.1 * 0.9)


@pytest.mark.parametrize("name", ["beta", "target", "gain"])
@pytest.mark.parametrize("value", [0, -1.0, nan, inf])
def test_the_controller_refuses_numbers_that_are_not_above_0(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        AdaptiveKL(**{"beta": 0.1, "target": 4.0} | {name: value})


@pytest.mark.parametrize("kl", [nan, inf, -inf])
def test_the_controller_refuses_a_kl_that_is_not_finite(kl):
    with pytest.raises(ValueError, match=f"kl is {kl}"):
        AdaptiveKL(0.1, 4.0).update(kl)


# --- the exact moments of the estimates ---------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("k1", log(4 / 3) / 2, log(3) / 2),
        ("k2", (log(2) ** 2 + log(1.5) ** 2) / 4, (log(2) ** 2 - log(1.5) ** 2) / 4),
        ("k3", log(4 / 3) / 2, abs((-0.5 + log(2)) - (0.5 - log(1.5))) / 2),
    ],
)
def test_moments_by_hand(kind, mean, std):
    got = estimator_moments(P.log(), Q.log(), kind)
    assert [x.item() for x in got] == pytest.approx([mean, std])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_moments_are_those_of_samples(kind):
    logits_p, logits_q = random_logits(3, 6, seed=0), random_logits(3, 6, seed=1)
    mean, std = estimator_moments(logits_p.log_softmax(-1), logits_q.log_softmax(-1), kind)
    for row in range(3):
        sampler = torch.distributions.Categorical(logits=logits_p[row])
        with torch.random.fork_rng():
            torch.manual_seed(row)
            tokens = sampler.sample((20_000,))
        pair = (x[row].log_softmax(-1)[tokens] for x in (logits_p, logits_q))
        values = kl_estimate(*pair, kind)
        assert abs(values.mean() - mean[row]) < 4 * std[row] / 20_000**0.5
        assert values.std().item() == pytest.approx(std[row].item(), rel=0.1)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_of_k1_and_k3_is_the_exact_divergence(kind):
    logits_p, logits_q = random_logits(4, 9, seed=2), random_logits(4, 9, seed=3)
    mean, _ = estimator_moments(logits_p.log_softmax(-1), logits_q.log_softmax(-1), kind)
    torch.testing.assert_close(mean, exact_kl(logits_p, logits_q))


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([-1.0, -2.0]), "is 0.5032"),  # logits that happen to be below 0
        (torch.tensor([0.5, 0.5]), "is 3.297"),  # probabilities
        (torch.tensor([nan, -1.0]), "is nan"),
        (torch.tensor([[0.5, 0.5], [0.5, 0.6]]).log(), r"is 1.1 at \[1\]"),
    ],
)
def test_log_probabilities_that_do_not_sum_to_one_are_named(name, bad, message):
    good = {"logprobs": Q.log().expand(bad.shape), "ref_logprobs": P.log().expand(bad.shape)}
    with pytest.raises(ValueError, match=f"probabilities of {name} {message}"):
        estimator_moments(**good | {name: bad})
