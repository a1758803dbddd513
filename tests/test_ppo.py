"""PPO's mechanics: token rewards, advantages, the clipped losses, held against hand and loop."""

import doctest
import re
from math import inf, isnan, log, nan, sqrt

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_helpers import losses as module
from rlhf_helpers.losses import gae, gae_weights, policy_loss, shape_rewards, value_loss, whiten

LENGTHS = (3, 1, 5)  # of the responses in the batch that several tests share
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


def random_values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_logprobs(*shape: int, seed: int) -> Tensor:
    return -random_values(*shape, seed=seed).abs()


def mask_of(lengths, width: int | None = None) -> Tensor:
    return (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).long()


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 1e-12):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


FUNCTIONS = {
    "shape_rewards": shape_rewards,
    "gae": gae,
    "whiten": whiten,
    "policy_loss": policy_loss,
    "value_loss": value_loss,
}


def arguments(name: str, lengths=LENGTHS, seed: int = 0) -> dict:
    """Good arguments: random float64, and among the ratios and values some beyond the clip."""
    mask = mask_of(lengths)
    shape = mask.shape
    logprobs = random_logprobs(*shape, seed=seed)
    values = random_values(*shape, seed=seed + 1)
    others = random_values(*shape, seed=seed + 2)
    if name == "shape_rewards":
        return {
            "scores": random_values(shape[0], seed=seed + 3),
            "logprobs": logprobs,
            "ref_logprobs": random_logprobs(*shape, seed=seed + 4),
            "response_mask": mask,
            "beta": 0.3,
        }
    if name == "gae":
        return {"rewards": values, "values": others, "response_mask": mask}
    if name == "whiten":
        return {"x": values, "mask": mask}
    if name == "policy_loss":
        return {
            "logprobs": logprobs,
            "old_logprobs": random_logprobs(*shape, seed=seed + 4),
            "advantages": values,
            "response_mask": mask,
        }
    return {
        "values": values,
        "old_values": values + others,
        "returns": random_values(*shape, seed=seed + 4),
        "response_mask": mask,
    }


PER_TOKEN = [  # each function's arguments that hold one value per token
    ("shape_rewards", "logprobs"),
    ("shape_rewards", "ref_logprobs"),
    ("gae", "rewards"),
    ("gae", "values"),
    ("whiten", "x"),
    ("policy_loss", "logprobs"),
    ("policy_loss", "old_logprobs"),
    ("policy_loss", "advantages"),
    ("value_loss", "values"),
    ("value_loss", "old_values"),
    ("value_loss", "returns"),
]
FLOATING = [*PER_TOKEN, ("shape_rewards", "scores")]
MASKS = {name: "mask" if name == "whiten" else "response_mask" for name in FUNCTIONS}
LEARNED = {"whiten": "x", "policy_loss": "logprobs", "value_loss": "values"}


def flat(result) -> list:
    """The tensors and statistics of a result, in one list."""
    if isinstance(result, Tensor):
        return [result]
    first, second = result
    return [first, *(second.values() if isinstance(second, dict) else [second])]


def assert_same(result, expected):
    for x, y in zip(flat(result), flat(expected), strict=True):
        same = torch.equal(x, y) if isinstance(x, Tensor) else x == y or (isnan(x) and isnan(y))
        assert same, f"{x} is not {y}"


@st.composite
def batches(draw, min_tokens: int = 1):
    """Lengths of some responses, the width of the batch they stand in, and a seed."""
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    assume(sum(lengths) >= min_tokens)
    width = max(lengths) + draw(st.integers(0, 3))
    return lengths, width, draw(st.integers(0, 2**20))


def test_doctests():
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# --- shape_rewards ---

# Two responses, of three tokens and of one. log π − log π_ref is 1, −0.5, 2 and −1.
SCORES = torch.tensor([3.0, -1.0], dtype=torch.float64)
LOGPROBS = rows([-1.0, -2.0, -0.5], [-3.0, -9.0, -9.0])
REF_LOGPROBS = rows([-2.0, -1.5, -2.5], [-2.0, -1.0, -1.0])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_rewards_by_hand():
    # β = 0.5: −0.5, 0.25, 3 − 1; and −1 + 0.5
    result = shape_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, beta=0.5)
    assert_close(result, rows([-0.5, 0.25, 2.0], [-0.5, 0.0, 0.0]))


def test_rewards_with_the_other_estimators_by_hand():
    # k2 is half of the squares of 1, −0.5, 2, −1: 0.5, 0.125, 2, 0.5
    result = shape_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, beta=0.5, kind="k2")
    assert_close(result, rows([-0.25, -0.0625, 2.0], [-1.25, 0.0, 0.0]))
    # k3 = e^r − 1 − r with r = log π_ref − log π = −1, 0.5, −2, 1
    e = torch.tensor(1.0, dtype=torch.float64).exp().item()
    k3 = [1 / e, e**0.5 - 1.5, e**-2 + 1], e - 2
    result = shape_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, beta=0.5, kind="k3")
    expected = [-0.5 * k3[0][0], -0.5 * k3[0][1], 3 - 0.5 * k3[0][2]]
    assert_close(result, rows(expected, [-1 - 0.5 * k3[1], 0.0, 0.0]))


def test_rewards_without_a_penalty_are_the_scores_at_the_last_tokens():
    result = shape_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, beta=0)
    assert torch.equal(result, rows([0.0, 0.0, 3.0], [-1.0, 0.0, 0.0]))


def test_without_a_price_the_penalty_is_not_computed(monkeypatch):
    def refuse_to_compute(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(module, "kl_estimate", refuse_to_compute)
    logprobs = LOGPROBS.bfloat16()
    result = shape_rewards(SCORES.float(), logprobs, logprobs, MASK, beta=0.0)
    assert torch.equal(result, torch.tensor([[0.0, 0.0, 3.0], [-1.0, 0.0, 0.0]]))
    assert result.dtype == torch.float32
    with pytest.raises(AssertionError, match="computed"):
        shape_rewards(SCORES.float(), logprobs, logprobs, MASK, beta=0.1)


def test_the_penalty_lowers_the_reward_of_what_the_reference_finds_unlikely():
    policy, reference = torch.tensor([[0.8]]).log(), torch.tensor([[0.1]]).log()
    score, mask = torch.zeros(1), torch.ones(1, 1)
    assert shape_rewards(score, policy, reference, mask, beta=0.1).item() < 0
    assert shape_rewards(score, reference, policy, mask, beta=0.1).item() > 0


@settings(deadline=None)
@given(batches(), st.floats(0, 10), st.sampled_from(["k1", "k2", "k3"]))
def test_rewards_sum_to_the_score_less_the_price_of_the_kl(batch, beta, kind):
    lengths, width, seed = batch
    mask, scores = mask_of(lengths, width), random_values(len(lengths), seed=seed)
    logprobs = random_logprobs(*mask.shape, seed=seed + 1)
    ref_logprobs = random_logprobs(*mask.shape, seed=seed + 2)
    result = shape_rewards(scores, logprobs, ref_logprobs, mask, beta, kind)
    r = ref_logprobs - logprobs
    kl = {"k1": -r, "k2": r**2 / 2, "k3": r.exp() - 1 - r}[kind]
    assert_close(result.sum(-1), scores - beta * (kl * mask).sum(-1))
    assert torch.equal(result * (1 - mask), torch.zeros_like(result))


@settings(deadline=None)
@given(batches())
def test_the_score_falls_on_the_last_real_token_alone(batch):
    lengths, width, seed = batch
    mask, logprobs = mask_of(lengths, width), random_logprobs(len(lengths), width, seed=seed)
    ref_logprobs = random_logprobs(len(lengths), width, seed=seed + 1)
    low = shape_rewards(torch.zeros(len(lengths)), logprobs, ref_logprobs, mask, 0.1)
    high = shape_rewards(torch.ones(len(lengths)), logprobs, ref_logprobs, mask, 0.1)
    expected = torch.zeros_like(high)
    for row, length in enumerate(lengths):
        expected[row, length - 1] = 1
    assert_close(high - low, expected)


# --- gae ---


def test_gae_by_hand():
    # γ = 0.5, λ = 0.8: γλ = 0.4. The 99 and 77 are padding.
    # Row 0: δ = (1 + 0.5·1 − 0.5, 0 + 0.5·2 − 1, 4 − 2) = (1, 0, 2)
    #        A_2 = 2, A_1 = 0 + 0.4·2 = 0.8, A_0 = 1 + 0.4·0.8 = 1.32
    # Row 1: δ = (0 + 0.5·2 − 1, 3 − 2) = (0, 1); A_1 = 1, A_0 = 0.4
    rewards = rows([1.0, 0.0, 4.0], [0.0, 3.0, 99.0])
    values = rows([0.5, 1.0, 2.0], [1.0, 2.0, 77.0])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.8)
    assert_close(advantages, rows([1.32, 0.8, 2.0], [0.4, 1.0, 0.0]))
    assert_close(returns, rows([1.82, 1.8, 4.0], [1.4, 3.0, 0.0]))


def test_gae_has_the_defaults_of_its_signature():
    given_, default = arguments("gae"), gae(**arguments("gae"))
    assert_same(default, gae(**given_, gamma=1.0, lam=0.95))


def gae_by_loop(rewards: Tensor, values: Tensor, lengths, gamma: float, lam: float) -> Tensor:
    """Advantages by the recursion A_t = δ_t + γλ A_{t+1}, one token at a time, from the last."""
    advantages = torch.zeros_like(values)
    for row, length in enumerate(lengths):
        advantage = next_value = 0.0
        for t in reversed(range(length)):
            value = values[row, t].item()
            delta = rewards[row, t].item() + gamma * next_value - value
            advantage = delta + gamma * lam * advantage
            next_value = value
            advantages[row, t] = advantage
    return advantages


UNIT = st.floats(0, 1)


@settings(deadline=None)
@given(batches(), UNIT, UNIT)
def test_gae_equals_a_loop(batch, gamma, lam):
    lengths, width, seed = batch
    mask = mask_of(lengths, width)
    rewards, values = (random_values(*mask.shape, seed=s) for s in (seed, seed + 1))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = gae_by_loop(rewards, values, lengths, gamma, lam)
    assert_close(advantages, expected)
    assert_close(returns, (expected + values) * mask)
    assert_close(returns, (advantages + values) * mask)
    assert not (advantages * (1 - mask)).any()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.5, 0.5)])
def test_gae_equals_a_loop_for_long_responses(gamma, lam):
    lengths = (700, 1, 350)
    mask = mask_of(lengths)
    rewards, values = (random_values(*mask.shape, seed=s) for s in (0, 1))
    advantages, _ = gae(rewards, values, mask, gamma, lam)
    assert_close(advantages, gae_by_loop(rewards, values, lengths, gamma, lam))


@settings(deadline=None)
@given(batches())
def test_without_any_decay_the_advantage_is_what_is_still_to_come_less_the_value(batch):
    lengths, width, seed = batch
    mask = mask_of(lengths, width)
    rewards, values = (random_values(*mask.shape, seed=s) for s in (seed, seed + 1))
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(-1).cumsum(-1).flip(-1) * mask
    assert_close(advantages, (to_go - values) * mask)
    assert_close(returns, to_go)


@settings(deadline=None)
@given(batches(), UNIT)
def test_with_lam_0_the_advantage_is_the_td_error(batch, gamma):
    lengths, width, seed = batch
    mask = mask_of(lengths, width)
    rewards, values = (random_values(*mask.shape, seed=s) for s in (seed, seed + 1))
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=0.0)
    next_values = torch.zeros_like(values)
    next_values[:, :-1] = (values * mask)[:, 1:]
    assert_close(advantages, (rewards + gamma * next_values - values) * mask)


def test_a_perfect_critic_leaves_no_advantage():
    # one reward of 2 at the end, known from the start
    rewards, values = rows([0.0, 0.0, 2.0]), rows([2.0, 2.0, 2.0])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.7)
    assert torch.equal(advantages, torch.zeros_like(rewards))
    assert torch.equal(returns, values)


@pytest.mark.parametrize(
    ("length", "decay", "expected"),
    [
        (1, 0.3, [[1.0]]),
        (3, 0.0, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
        (3, 1.0, [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]),
        (3, 0.1, [[1.0, 0.0, 0.0], [0.1, 1.0, 0.0], [0.01, 0.1, 1.0]]),
    ],
)
def test_weights_by_hand(length, decay, expected):
    assert_close(gae_weights(length, decay), rows(*expected))


def test_weights_are_exact_and_finite_for_a_long_response():
    weights = gae_weights(2000, 1e-3)  # 0.001 ** 1999 is 0, and 0.001 ** -1999 would be inf
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    assert torch.equal(weights, weights.tril())
    assert torch.equal(weights.diagonal(), torch.ones(2000, dtype=torch.float64))


# --- rows ---


@settings(deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_rows_are_independent(batch, random):
    lengths, width, seed = batch
    count = len(lengths)
    chosen = random.sample(
        range(count), random.randint(1, count)
    )  # in another order, some left out
    mask = mask_of(lengths, width)
    scores = random_values(count, seed=seed)
    logprobs, ref_logprobs = (random_logprobs(count, width, seed=seed + s) for s in (1, 2))
    values = random_values(count, width, seed=seed + 3)
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    assert_close(
        shape_rewards(scores[chosen], logprobs[chosen], ref_logprobs[chosen], mask[chosen], 0.3),
        rewards[chosen],
    )
    for part, whole in zip(
        gae(rewards[chosen], values[chosen], mask[chosen]), gae(rewards, values, mask), strict=True
    ):
        assert_close(part, whole[chosen])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_padding_changes_nothing(name):
    good = arguments(name)
    wide = {
        key: torch.cat([x, torch.zeros(len(LENGTHS), 2).to(x)], -1)
        if isinstance(x, Tensor) and x.dim() == 2
        else x
        for key, x in good.items()
    }
    for narrow_part, wide_part in zip(
        flat(FUNCTIONS[name](**good)), flat(FUNCTIONS[name](**wide)), strict=True
    ):
        if isinstance(narrow_part, Tensor) and narrow_part.dim() == 2:
            assert not wide_part[:, max(LENGTHS) :].any()
            assert_close(wide_part[:, : max(LENGTHS)], narrow_part)
        else:
            assert float(wide_part) == pytest.approx(float(narrow_part), abs=1e-12)


# --- whiten ---


def test_whitening_by_hand():
    # 1, 3 and 8 count: mean 4, unbiased variance (9 + 1 + 16) / 2 = 13
    result = whiten(rows([1.0, 3.0], [8.0, 77.0]), torch.tensor([[1, 1], [1, 0]]))
    assert_close(result, rows([-3.0, -1.0], [4.0, 0.0]) / sqrt(13), 1e-8)


def test_whitening_of_a_tiny_spread_by_hand():
    # mean 1e-4, variance 2e-8, and 1e-8 is added to it under the root
    result = whiten(rows([0.0, 2e-4]), torch.ones(1, 2))
    assert_close(result, rows([-1e-4, 1e-4]) / sqrt(3e-8), 1e-12)


@pytest.mark.parametrize("value", [0.0, 2.0, 0.1, -1e6])
def test_whitening_of_equal_values_is_finite(value):
    result = whiten(torch.full((2, 4), value, dtype=torch.float64), torch.ones(2, 4))
    assert_close(result, torch.zeros_like(result), 1e-5)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_whitening_takes_any_shape_and_a_mask_with_holes(shape):
    x = torch.tensor([99.0, 1.0, 99.0, 3.0, 8.0, 99.0], dtype=torch.float64)
    expected = torch.tensor([0.0, -3.0, 0.0, -1.0, 4.0, 0.0], dtype=torch.float64) / sqrt(13)
    mask = torch.tensor([0, 1, 0, 1, 1, 0])
    assert_close(whiten(x.view(shape), mask.view(shape)), expected.view(shape), 1e-8)


@settings(deadline=None)
@given(batches(min_tokens=3), st.floats(-100, 100), st.floats(0.1, 100))
def test_whitening_gives_mean_0_and_deviation_1_whatever_the_shift_and_scale(batch, shift, scale):
    lengths, width, seed = batch
    mask = mask_of(lengths, width)
    x = random_values(*mask.shape, seed=seed)
    assume(x[mask.bool()].std() > 0.1)
    result = whiten(x, mask)
    real = result[mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-9)
    assert real.std().item() == pytest.approx(1, abs=1e-6)  # the 1e-8 takes a little
    assert not (result * (1 - mask)).any()
    assert_close(whiten(x + shift, mask), result, 1e-9)
    assert_close(whiten(scale * x, mask), result, 2e-4)  # x / 10 is where the 1e-8 tells most


# --- policy_loss ---


def one_token(ratio: float, advantage: float, **options):
    """Loss, its gradient with respect to the log-probability, and statistics, of one token."""
    logprobs = rows([log(0.5 * ratio)]).requires_grad_()
    loss, stats = policy_loss(
        logprobs, rows([log(0.5)]), rows([advantage]), torch.ones(1, 1), **options
    )
    loss.backward()
    return loss.item(), logprobs.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # d(−ρ A)/d log π = −ρ A where the clip is not active, and 0 where it is
        (0.5, 2.0, -1.0, -1.0, 0.0),  # below, and should rise: min(1, 1.6)
        (1.1, 2.0, -2.2, -2.2, 0.0),  # inside
        (1.5, 2.0, -2.4, 0.0, 1.0),  # above, and has risen enough: min(3, 2.4)
        (0.5, -2.0, 1.6, 0.0, 1.0),  # below, and has fallen enough: min(−1, −1.6)
        (1.1, -2.0, 2.2, 2.2, 0.0),  # inside
        (1.5, -2.0, 3.0, 3.0, 0.0),  # above, and should fall: min(−3, −2.4)
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, gradient, clipped):
    result = one_token(ratio, advantage)
    assert result[:2] == pytest.approx((loss, gradient), abs=1e-12)
    assert result[2]["clip_fraction"] == clipped
    assert result[2]["ratio"] == pytest.approx(ratio)
    assert result[2]["approx_kl"] == pytest.approx(ratio - 1 - log(ratio))
    assert result[2]["entropy"] == pytest.approx(-log(0.5 * ratio))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(1.1, 2.0, -2.1, 0.0), (1.02, 2.0, -2.04, -2.04), (0.9, -2.0, 1.9, 0.0)],
)
def test_policy_loss_with_another_clip_by_hand(ratio, advantage, loss, gradient):
    assert one_token(ratio, advantage, clip=0.05)[:2] == pytest.approx((loss, gradient), abs=1e-12)


def test_policy_loss_is_a_mean_over_tokens_by_hand():
    # Ratios 0.5 and 1.1 with A = 2 and −1; in the second row 1.5 with A = 2, and padding.
    # L = −(1 − 1.1 + 2.4) / 3, and not the mean over four places or of the rows' means.
    ratios, old = rows([0.5, 1.1], [1.5, 0.9]), torch.full((2, 2), 0.25).double()
    advantages, mask = rows([2.0, -1.0], [2.0, 7.0]), torch.tensor([[1, 1], [1, 0]])
    logprobs = (old * ratios).log().requires_grad_()
    loss, stats = policy_loss(logprobs, old.log(), advantages, mask)
    loss.backward()
    assert loss.item() == pytest.approx(-2.3 / 3)
    assert_close(logprobs.grad, rows([-1.0 / 3, 1.1 / 3], [0.0, 0.0]))
    assert stats == pytest.approx(
        {
            "ratio": 3.1 / 3,
            "approx_kl": (3.1 - 3 - log(0.5 * 1.1 * 1.5)) / 3,
            "clip_fraction": 1 / 3,
            "entropy": -(3 * log(0.25) + log(0.5 * 1.1 * 1.5)) / 3,
        }
    )


@settings(deadline=None)
@given(batches(), st.floats(0.01, 0.9), st.floats(0.1, 5), st.floats(0.01, 3))
def test_nothing_is_earned_beyond_the_clip(batch, clip, advantage, excess):
    lengths, width, seed = batch
    mask = mask_of(lengths, width)
    old = random_logprobs(*mask.shape, seed=seed) - 5
    for sign, bound in ((1, 1 + clip), (-1, 1 - clip)):
        new = (old + log(bound) + sign * excess).requires_grad_()
        loss, stats = policy_loss(new, old, torch.full_like(old, sign * advantage), mask, clip)
        loss.backward()
        assert loss.item() == pytest.approx(-sign * bound * advantage)
        assert not new.grad.any()
        assert stats["clip_fraction"] == 1


@settings(deadline=None)
@given(batches(), st.floats(0.01, 0.9), st.floats(0.1, 5))
def test_the_loss_is_never_below_what_the_clip_allows(batch, clip, advantage):
    lengths, width, seed = batch
    mask = mask_of(lengths, width)
    new, old = (random_logprobs(*mask.shape, seed=s) for s in (seed, seed + 1))
    loss, _ = policy_loss(new, old, torch.full_like(old, advantage), mask, clip)
    assert loss.item() >= -(1 + clip) * advantage - 1e-12
    loss, _ = policy_loss(new, old, torch.full_like(old, -advantage), mask, clip)
    assert loss.item() >= (1 - clip) * advantage - 1e-12


@settings(deadline=None)
@given(batches(), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_before_the_first_step_nothing_has_moved(batch, dtype):
    lengths, width, seed = batch
    mask = mask_of(lengths, width)
    logprobs = random_logprobs(*mask.shape, seed=seed).to(dtype).requires_grad_()
    advantages = random_values(*mask.shape, seed=seed + 1)
    loss, stats = policy_loss(logprobs, logprobs.detach().clone(), advantages, mask)
    assert stats["ratio"] == 1
    assert stats["approx_kl"] == 0
    assert stats["clip_fraction"] == 0
    assert loss.item() == pytest.approx(-advantages[mask.bool()].mean().item(), abs=1e-12)
    loss.backward()  # −A / n: the policy gradient
    tolerance = torch.finfo(dtype).eps * 4
    assert_close(logprobs.grad.double(), -advantages * mask / mask.sum(), tolerance)


def test_approx_kl_keeps_its_digits_for_close_policies():
    # ρ − 1 − log ρ is x²/2 for a small log ρ = x, which rounding of ρ − 1 in float32 would swamp
    x = torch.tensor([[1e-4]])
    _, stats = policy_loss(torch.zeros(1, 1), -x, torch.ones(1, 1), torch.ones(1, 1))
    assert stats["approx_kl"] == pytest.approx(0.5e-8, rel=0.02)


def test_the_share_of_clipped_tokens_leaves_out_those_without_an_advantage():
    assert one_token(1.5, 0.0)[1:2] == (0.0,)
    assert one_token(1.5, 0.0)[2]["clip_fraction"] == 0


# --- value_loss ---


def one_value(new: float, old: float, target: float, **options):
    values = rows([new]).requires_grad_()
    loss, stats = value_loss(values, rows([old]), rows([target]), torch.ones(1, 1), **options)
    loss.backward()
    return loss.item(), values.grad.item(), stats["clip_fraction"]


@pytest.mark.parametrize(
    ("new", "old", "target", "loss", "gradient", "clipped"),
    [
        # free: (V − R)² / 2 with the gradient V − R
        (0.1, 0.0, 1.0, 0.405, -0.9, 0.0),  # inside the clip
        (0.5, 0.0, 1.0, 0.32, 0.0, 1.0),  # beyond, towards R: 0.2 counts, 0.8² / 2
        (-0.5, 0.0, 1.0, 1.125, -1.5, 0.0),  # beyond, away from R: 1.5² / 2, not 1.2² / 2
        (-0.5, 0.0, -1.0, 0.32, 0.0, 1.0),  # the same below
        (0.5, 0.0, 0.125, 0.0703125, 0.375, 0.0),  # past R: 0.375² / 2, not 0.075² / 2
        (3.5, 3.0, 4.0, 0.32, 0.0, 1.0),  # about an old value that is not 0
    ],
)
def test_value_loss_by_hand(new, old, target, loss, gradient, clipped):
    assert one_value(new, old, target) == pytest.approx((loss, gradient, clipped), abs=1e-12)


def test_value_loss_with_another_clip_by_hand():
    assert one_value(0.5, 0.0, 1.0, clip=1.0) == pytest.approx((0.125, -0.5, 0.0))
    assert one_value(0.5, 0.0, 1.0, clip=0.25) == pytest.approx((0.28125, 0.0, 1.0))


def test_value_loss_is_a_mean_over_tokens_by_hand():
    # Old values 0. Token by token: 0.5 for 1, clipped: 0.8² / 2; −0.5 for 1: 1.5² / 2; 0.1 for 1:
    # 0.9² / 2; the last is padding.
    values = rows([0.5, -0.5], [0.1, 40.0]).requires_grad_()
    returns, mask = rows([1.0, 1.0], [1.0, 50.0]), torch.tensor([[1, 1], [1, 0]])
    loss, stats = value_loss(values, torch.zeros_like(returns), returns, mask)
    loss.backward()
    assert loss.item() == pytest.approx((0.32 + 1.125 + 0.405) / 3)
    assert_close(values.grad, rows([0.0, -0.5], [-0.3, 0.0]))
    assert stats["clip_fraction"] == pytest.approx(1 / 3)


@settings(deadline=None)
@given(batches(), st.floats(0.01, 2))
def test_the_value_loss_is_never_below_the_squared_error(batch, clip):
    lengths, width, seed = batch
    mask = mask_of(lengths, width)
    new, old, target = (random_values(*mask.shape, seed=seed + s) for s in range(3))
    loss, _ = value_loss(new, old, target, mask, clip)
    squared = (new - target)[mask.bool()].square().mean() / 2
    assert loss.item() >= squared.item() - 1e-12
    loss, stats = value_loss(new, new, target, mask, clip)  # before the first step
    assert loss.item() == pytest.approx(squared.item(), abs=1e-12)
    assert stats["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 9.0], 1.0),  # perfect; the last is padding
        ([2.0, 3.0, 4.0, 9.0], 1.0),  # off by a constant, which a variance does not see
        ([7.0, 7.0, 7.0, 9.0], 0.0),  # constant
        ([3.0, 2.0, 1.0, 9.0], -3.0),  # R − V = −2, 0, 2: four times the variance of R
        ([1.5, 2.0, 2.5, 9.0], 0.75),  # R − V = −0.5, 0, 0.5: a quarter of it
    ],
)
def test_explained_variance_by_hand(values, expected):
    returns, mask = rows([1.0, 2.0, 3.0, -50.0]), torch.tensor([[1, 1, 1, 0]])
    _, stats = value_loss(rows(values), torch.zeros(1, 4).double(), returns, mask)
    assert stats["explained_variance"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_explained_variance_of_equal_returns_is_nan(length):
    values, returns = random_values(2, length, seed=0), torch.full((2, length), 0.5).double()
    _, stats = value_loss(values, values, returns, torch.ones(2, length))
    assert isnan(stats["explained_variance"])


# --- gradients ---


def test_policy_loss_gradient():
    mask = mask_of(LENGTHS)
    old = random_logprobs(*mask.shape, seed=0) - 1
    # ratios well below, inside and well above the clip in turn, so that none is at a kink
    steps = torch.tensor([-0.5, 0.1, 0.5, -0.1, 0.7], dtype=torch.float64)
    new = (old + steps + 0.01 * random_values(*mask.shape, seed=1)).requires_grad_()
    for sign in (1, -1):
        advantages = sign * (random_values(*mask.shape, seed=2).abs() + 0.1)
        assert torch.autograd.gradcheck(
            lambda x, a=advantages: policy_loss(x, old, a, mask)[0], new
        )


def test_value_loss_gradient():
    mask = mask_of(LENGTHS)
    old = random_values(*mask.shape, seed=0)
    steps = torch.tensor([-0.5, 0.1, 0.5, -0.1, 0.7], dtype=torch.float64)
    new = (old + steps + 0.01 * random_values(*mask.shape, seed=1)).requires_grad_()
    for sign in (1, -1):
        target = old + sign * (random_values(*mask.shape, seed=2).abs() + 2)
        assert torch.autograd.gradcheck(lambda x, r=target: value_loss(x, old, r, mask)[0], new)


def test_whitening_gradient():
    x = random_values(3, 5, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: whiten(x, mask_of(LENGTHS)), x)


@pytest.mark.parametrize("name", ["shape_rewards", "gae"])
def test_rewards_and_advantages_carry_no_gradient(name):
    good = arguments(name)
    for x in good.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    for result in flat(FUNCTIONS[name](**good)):
        assert not result.requires_grad
        assert result.grad_fn is None


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_gradients_go_nowhere_but_to_what_is_trained(name):
    good = arguments(name)
    floating = {k: x.requires_grad_() for k, x in good.items() if x.is_floating_point()}
    loss, stats = FUNCTIONS[name](**good)
    loss.backward()
    assert {k for k, x in floating.items() if x.grad is not None} == {LEARNED[name]}
    assert floating[LEARNED[name]].grad.any()
    assert all(isinstance(x, float) for x in stats.values())


# --- masks ---

JUNK = [nan, inf, -inf, 1e30, -1e30]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(("name", "argument"), PER_TOKEN)
def test_what_stands_under_a_zero_of_the_mask_changes_nothing(name, argument, junk):
    good, bad = arguments(name), arguments(name)
    padding = good[MASKS[name]] == 0
    bad[argument] = bad[argument].masked_fill(padding, junk)
    learned = LEARNED.get(name)
    if learned:
        for given_ in (good, bad):
            given_[learned].requires_grad_()
    expected, result = FUNCTIONS[name](**good), FUNCTIONS[name](**bad)
    assert_same(result, expected)
    if learned:
        weights = random_values(*padding.shape, seed=9)  # whitened values sum to a constant, 0
        for outcome in (expected, result):
            (outcome * weights if name == "whiten" else outcome[0]).sum().backward()
        gradient = bad[learned].grad
        assert gradient.isfinite().all()
        assert not gradient[padding].any()
        assert torch.equal(gradient, good[learned].grad)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_padding_changes_no_kind_of_penalty(kind, beta, junk):
    good, bad = ({**arguments("shape_rewards"), "beta": beta, "kind": kind} for _ in range(2))
    for argument in ("logprobs", "ref_logprobs"):
        bad[argument] = bad[argument].masked_fill(bad["response_mask"] == 0, junk)
    assert torch.equal(shape_rewards(**bad), shape_rewards(**good))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_of_any_type_work(name, dtype):
    good = arguments(name)
    expected = FUNCTIONS[name](**good)
    assert good[MASKS[name]].dtype == torch.long
    assert_same(FUNCTIONS[name](**{**good, MASKS[name]: good[MASKS[name]].to(dtype)}), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_mutated(name):
    good = arguments(name)
    before = {k: x.clone() if isinstance(x, Tensor) else x for k, x in good.items()}
    FUNCTIONS[name](**good)
    for key, x in good.items():
        assert torch.equal(x, before[key]) if isinstance(x, Tensor) else x == before[key]


@pytest.mark.parametrize("name", ["shape_rewards", "gae", "whiten"])
def test_results_are_new_tensors(name):
    good = arguments(name, lengths=(4, 4))  # no padding, so nothing need be overwritten
    before = {k: x.clone() for k, x in good.items() if isinstance(x, Tensor)}
    for result in flat(FUNCTIONS[name](**good)):
        result.fill_(123.0)
    for key, x in before.items():
        assert torch.equal(good[key], x)


# --- dtypes and devices ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_low_precision_is_computed_in_float32(name, dtype):
    low = {
        k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in arguments(name).items()
    }
    single = {k: x.float() if isinstance(x, Tensor) else x for k, x in low.items()}
    result, expected = FUNCTIONS[name](**low), FUNCTIONS[name](**single)
    for x, y in zip(flat(result), flat(expected), strict=True):
        if isinstance(x, Tensor):
            assert x.dtype == torch.float32
            assert torch.equal(x, y)
    if name in ("policy_loss", "value_loss"):
        for key in set(result[1]) - {"entropy"}:
            assert result[1][key] == expected[1][key]


@pytest.mark.parametrize(("name", "argument"), PER_TOKEN)
def test_float64_in_any_argument_gives_float64(name, argument):
    single = {
        k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in arguments(name).items()
    }
    for x in flat(FUNCTIONS[name](**single)):
        assert not isinstance(x, Tensor) or x.dtype == torch.float32
    double = {**single, argument: single[argument].double()}
    for x in flat(FUNCTIONS[name](**double)):
        assert not isinstance(x, Tensor) or x.dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_stay_on_the_device(name, device):
    good = arguments(name)
    moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in good.items()}
    expected, result = FUNCTIONS[name](**good), FUNCTIONS[name](**moved)
    for x, y in zip(flat(result), flat(expected), strict=True):
        if isinstance(x, Tensor):
            assert x.device.type == device
            assert_close(x.cpu(), y)
        else:
            assert x == pytest.approx(y)


def test_losses_are_scalars_and_statistics_are_named():
    loss, stats = policy_loss(**arguments("policy_loss"))
    assert loss.shape == ()
    assert list(stats) == ["ratio", "approx_kl", "clip_fraction", "entropy"]
    loss, stats = value_loss(**arguments("value_loss"))
    assert loss.shape == ()
    assert list(stats) == ["clip_fraction", "explained_variance"]


# --- bad input ---

PER_RESPONSE = [(n, a) for n, a in PER_TOKEN if n != "whiten"]
ON_RESPONSES = [name for name in FUNCTIONS if name != "whiten"]


def refuse(name: str, error: type[Exception], message: str, **changes):
    with pytest.raises(error, match=message):
        FUNCTIONS[name](**{**arguments(name), **changes})


@pytest.mark.parametrize(("name", "argument"), FLOATING)
def test_tensors_that_are_not_floating_point_are_named(name, argument):
    for dtype in (torch.long, torch.bool):
        message = rf"^{argument} must be floating point, not {dtype}:"
        refuse(name, TypeError, message, **{argument: arguments(name)[argument].to(dtype)})


@pytest.mark.parametrize(("name", "argument"), PER_TOKEN)
def test_shapes_that_do_not_match_are_named(name, argument):
    for shape in ([3, 4], [1, 5], [3, 1], [5], [3, 5, 1]):
        alone = rf"{argument} has shape {re.escape(str(shape))}: it must be \[B, T\]"
        beside = rf"\b{argument} (has shape )?{re.escape(str(shape))}.*must be (equal|\[B)"
        message = f"{alone}|{beside}"
        refuse(name, ValueError, message, **{argument: -torch.ones(shape)})


@pytest.mark.parametrize("shape", [[2], [4], [3, 1], [1], []])
def test_scores_that_do_not_match_are_named(shape):
    message = rf"\bscores (has shape )?{re.escape(str(shape))}.* must be .*\[B\]"
    refuse("shape_rewards", ValueError, message, scores=torch.ones(shape))


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize(("name", "argument"), PER_TOKEN)
def test_entries_that_are_not_finite_are_named(name, argument, bad):
    tensor = arguments(name)[argument]
    tensor[2, 4] = bad  # the last token of the longest response
    refuse(name, ValueError, rf"^{argument} is {bad} at \[2, 4\]", **{argument: tensor})


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_scores_that_are_not_finite_are_named(bad):
    scores = torch.tensor([1.0, bad, 2.0])
    refuse(
        "shape_rewards", ValueError, rf"^scores is {bad} at \[1\]: it must be finite", scores=scores
    )


@pytest.mark.parametrize("name", ON_RESPONSES)
def test_a_mask_with_an_empty_row_is_named(name):
    mask = arguments(name)["response_mask"]
    mask[1] = 0
    refuse(name, ValueError, r"^response_mask row 1 is all zeros", response_mask=mask)


@pytest.mark.parametrize("name", ON_RESPONSES)
def test_a_mask_with_a_hole_is_named(name):
    mask = arguments(name)["response_mask"]
    mask[2] = torch.tensor([1, 1, 0, 1, 1])
    refuse(
        name,
        ValueError,
        r"^response_mask is 1.* at \[2, 3\]: a 0 stands before",
        response_mask=mask,
    )
    mask[2] = torch.tensor([0, 1, 1, 1, 1])  # padded on the left
    refuse(
        name,
        ValueError,
        r"^response_mask is 1.* at \[2, 1\]: a 0 stands before",
        response_mask=mask,
    )


@pytest.mark.parametrize("bad", [2.0, -1.0, 0.5, nan, inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_of_anything_but_0_and_1_is_named(name, bad):
    mask = arguments(name)[MASKS[name]].double()
    mask[2, 3] = bad
    message = rf"^{MASKS[name]} is {bad:g} at \[2, 3\]"
    refuse(name, ValueError, message, **{MASKS[name]: mask})


@pytest.mark.parametrize("shape", [[4], [0, 5], [3, 0], [0], [2, 3, 4], []])
@pytest.mark.parametrize("name", ON_RESPONSES)
def test_a_mask_that_is_not_of_responses_is_named(name, shape):
    good = arguments(name)
    changes = {k: -torch.ones(shape) for n, k in PER_RESPONSE if n == name}
    if name == "shape_rewards":
        changes["scores"] = torch.ones(shape[:1])
    message = r"^\w+ has shape .*: it must be \[B(, T)?\], none of them 0"
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](**{**good, **changes, "response_mask": torch.ones(shape)})


@pytest.mark.parametrize("bad", [0, 0.0, -0.2, nan, inf])
@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_a_clip_that_is_not_above_0_is_named(name, bad):
    refuse(name, ValueError, rf"^clip is {bad}: it must be a finite number above 0", clip=bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, nan, inf, -inf])
@pytest.mark.parametrize("argument", ["gamma", "lam"])
def test_a_discount_out_of_range_is_named(argument, bad):
    message = rf"^{argument} is {bad}: it must be between 0 and 1"
    refuse("gae", ValueError, message, **{argument: bad})


@pytest.mark.parametrize("bad", [-0.1, nan, inf, -inf])
def test_a_bad_beta_is_named(bad):
    refuse("shape_rewards", ValueError, rf"^beta is {bad}: it must be a finite number", beta=bad)


def test_what_the_estimate_of_the_kl_refuses_is_refused():
    refuse("shape_rewards", ValueError, r"kind is 'k4'", kind="k4")
    ref_logprobs = arguments("shape_rewards")["ref_logprobs"]
    ref_logprobs[2, 4] = 0.5
    refuse(
        "shape_rewards", ValueError, r"^ref_logprobs is 0\.5 at \[2, 4\]", ref_logprobs=ref_logprobs
    )


def test_whitening_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^mask row 0 is all zeros"):
        whiten(torch.ones(2, 3), torch.zeros(2, 3))


# --- rounding, low precision, overflow ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropy_of_low_precision_is_computed_in_float32(dtype):
    # 10,000 tokens of about 7.7 nats: their sum is above what float16 can hold
    logprobs = (0.1 * random_values(20, 500, seed=0) - 7.7).to(dtype)
    ones = torch.ones(20, 500)
    _, stats = policy_loss(logprobs, logprobs, ones, ones)
    _, expected = policy_loss(logprobs.float(), logprobs.float(), ones, ones)
    assert stats["entropy"] == expected["entropy"]


def test_explained_variance_of_equal_returns_is_nan_whatever_the_rounding():
    values, returns = torch.arange(7.0)[None], torch.full((1, 7), 0.1)
    _, stats = value_loss(values, values, returns, torch.ones(1, 7))
    assert isnan(stats["explained_variance"])


def test_no_value_inside_the_clip_counts_as_clipped():
    new, old, target = (torch.tensor([[x]]) for x in (0.001, 0.1, 0.0))
    _, stats = value_loss(new, old, target, torch.ones(1, 1))
    assert stats["clip_fraction"] == 0


def test_gae_is_float32_under_autocast():
    given_ = {k: x.float() for k, x in arguments("gae").items()}
    expected = gae(**given_)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = gae(**given_)
    assert [x.dtype for x in result] == [torch.float32, torch.float32]
    assert_same(result, expected)


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs"])
def test_probabilities_are_no_log_probabilities(name):
    given_ = {"logprobs": torch.tensor([[-1.0]]), "old_logprobs": torch.tensor([[-1.0]])}
    given_[name] = torch.tensor([[0.3]])
    with pytest.raises(ValueError, match=f"{name} is 0.3 at"):
        policy_loss(**given_, advantages=torch.ones(1, 1), response_mask=torch.ones(1, 1))
