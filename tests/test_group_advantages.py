"""Advantages without a critic, and the switches of the policy's loss: held against hand and sum.

The claim that leave-one-out is unbiased, and where a loss's average is not, is tested without any
sampling: over a vocabulary so small that every group of responses can be listed.
"""

import itertools
from math import e, exp, inf, log, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ppo import assert_close, mask_of, random_logprobs, random_values, rows

from rlhf_helpers.losses import (
    AVERAGES,
    GROUPED,
    RATIOS,
    average,
    equal_groups,
    group_advantages,
    policy_loss,
)

SCORES = st.floats(-100, 100).map(lambda x: round(x, 3))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def groups(draw, min_groups=1):
    """Scores, and the size of their groups."""
    size, count = draw(st.integers(2, 5)), draw(st.integers(min_groups, 4))
    return tensor(*draw(st.lists(SCORES, min_size=size * count, max_size=size * count))), size


# --- by hand ---

HAND = {
    "rloo": [1.5, -1.5, 0.0, -4.5, 1.5, 3.0],  # others' means 1.5, 2.5, 2 and 4.5, 2.5, 2
    "centred": [1.0, -1.0, 0.0, -3.0, 1.0, 2.0],
    "grpo": [1 / 1.0001, -1 / 1.0001, 0.0, *(x / (7**0.5 + 1e-4) for x in (-3, 1, 2))],
}


@pytest.mark.parametrize("kind", GROUPED)
def test_by_hand(kind):
    """Spreads, with n − 1 below: 1, and √((9 + 1 + 4) / 2) = √7."""
    scores = tensor(3, 1, 2, 0, 4, 5)
    assert_close(group_advantages(scores, 3, kind), tensor(*HAND[kind]))


def test_two_responses_are_each_others_baseline():
    assert_close(group_advantages(tensor(3, 1, -1, 4), 2), tensor(2, -2, -5, 5))
    assert_close(group_advantages(tensor(3, 1, -1, 4), 2, "centred"), tensor(1, -1, -2.5, 2.5))
    root = 2**0.5 / 2
    assert_close(
        group_advantages(tensor(3, 1, -1, 4), 2, "grpo"), tensor(root, -root, -root, root), 1e-3
    )


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6 + 0.1])
def test_a_group_without_variance_gives_exactly_0(kind, value):
    """A mean of three times 0.1 is not 0.1 in float32, and GRPO would divide that by 1e-4."""
    scores = torch.tensor([value] * 3 + [1.0, 2.0, 4.0])
    advantages = group_advantages(scores, 3, kind)
    assert advantages[:3].tolist() == [0, 0, 0]
    assert advantages[3:].abs().min() > 0.1
    assert equal_groups(scores, 3).tolist() == [True, False]


# --- properties ---


@settings(max_examples=50, deadline=None)
@given(groups(), SCORES)
def test_a_shift_of_a_group_changes_nothing(batch, shift):
    scores, size = batch
    for kind in ("rloo", "centred"):
        moved = group_advantages(scores + shift, size, kind)
        assert_close(moved, group_advantages(scores, size, kind), 1e-9)


@settings(max_examples=50, deadline=None)
@given(groups())
def test_leave_one_out_is_the_score_less_the_mean_of_the_others(batch):
    scores, size = batch
    for i, advantage in enumerate(group_advantages(scores, size, "rloo").tolist()):
        start = i - i % size
        others = [scores[j].item() for j in range(start, start + size) if j != i]
        assert advantage == pytest.approx(scores[i].item() - sum(others) / (size - 1), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(groups(min_groups=2), st.sampled_from(GROUPED))
def test_groups_do_not_know_of_each_other_and_sum_to_0(batch, kind):
    scores, size = batch
    advantages = group_advantages(scores, size, kind)
    assert_close(advantages[:size], group_advantages(scores[:size], size, kind))
    assert_close(advantages.view(-1, size).sum(-1), torch.zeros(len(scores) // size).double(), 1e-9)


@settings(max_examples=50, deadline=None)
@given(groups(), st.sampled_from(GROUPED), st.randoms(use_true_random=False))
def test_the_order_within_a_group_does_not_matter(batch, kind, random):
    scores, size = batch
    order = [
        g * size + i for g in range(len(scores) // size) for i in random.sample(range(size), size)
    ]
    shuffled = group_advantages(scores[order], size, kind)
    assert_close(shuffled, group_advantages(scores, size, kind)[order], 1e-9)


def test_the_spread_gives_every_group_the_same_weight():
    scores = tensor(0, 1, 2, 0, 100, 200)
    plain, divided = (group_advantages(scores, 3, kind).view(2, 3) for kind in ("centred", "grpo"))
    assert_close(plain[1], 100 * plain[0])
    assert_close(divided[1], divided[0], 1e-3)


@pytest.mark.parametrize("kind", GROUPED)
def test_advantages_are_data_of_a_dtype_that_holds_them(kind):
    scores = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert group_advantages(scores, 2, kind).dtype == torch.float32
    assert not group_advantages(scores, 2, kind).requires_grad
    assert scores.tolist() == [1, 2]


# --- unbiased: every group of responses listed ---

# Tokens 0 (EOS), 1 and 2, at most two of them; the second depends on the first.
RESPONSES = [(0,), *itertools.product((1, 2), (0, 1, 2))]
REWARD = dict(zip(RESPONSES, (0.3, -1.0, 2.0, 0.5, 1.5, 0.1, -0.7), strict=True))
LOGITS = tensor(0.2, -0.4, 0.7, 1.1, 0.3, -0.6, -0.2, 0.9, 0.4).view(3, 3)  # start, after 1, 2
MOST = 2


def probability(logits, response):
    logprobs, states = logits.log_softmax(-1), (0, *response)
    return sum(logprobs[s, token] for s, token in zip(states, response, strict=False)).exp()


def gradient(of):
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(of(logits), logits)[0]


def true_gradient():
    """Of the expected reward: a sum over all seven responses."""
    return gradient(lambda z: sum(probability(z, y) * REWARD[y] for y in RESPONSES))


def loss_of(logits, group, kind, **switches):
    """The package's loss at the first step, where the ratio is 1, of one group of responses."""
    mask = mask_of([len(y) for y in group], MOST)
    padded = torch.tensor([(*y, 0)[:MOST] for y in group])
    states = torch.cat([torch.zeros(len(group), 1, dtype=torch.long), padded[:, :-1]], 1)
    logprobs = logits.log_softmax(-1)[states, padded]
    advantages = group_advantages(tensor(*(REWARD[y] for y in group)), len(group), kind)
    return policy_loss(
        logprobs, logprobs.detach(), advantages[:, None].expand(mask.shape), mask, **switches
    )[0]


def expected_gradient(size, kind, **switches):
    """Of minus the loss, over every group of that size, each with its probability."""
    with torch.no_grad():
        chance = {y: probability(LOGITS, y) for y in RESPONSES}
    total = torch.zeros_like(LOGITS)
    for group in itertools.product(RESPONSES, repeat=size):
        weight = torch.stack([chance[y] for y in group]).prod()
        total -= weight * gradient(lambda z, g=group: loss_of(z, g, kind, **switches))
    return total


CONSTANT = {"mean_over": "length", "length": MOST}


@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_is_unbiased(size):
    """A sum over tokens (a constant length): its expected gradient is that of the reward, / L."""
    found = expected_gradient(size, "rloo", **CONSTANT) * MOST
    assert_close(found, true_gradient(), 1e-12)
    assert true_gradient().abs().max() > 0.1


def test_so_is_the_ratio_of_whole_responses():
    found = expected_gradient(2, "rloo", ratio_of="response", mean_over="responses")
    assert_close(found, true_gradient(), 1e-12)


def test_less_the_own_mean_it_is_shorter_by_a_known_factor():
    found = expected_gradient(3, "centred", **CONSTANT) * MOST
    assert_close(found, true_gradient() * 2 / 3, 1e-12)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_divided_by_the_spread_it_points_elsewhere():
    found = expected_gradient(3, "grpo", **CONSTANT)
    assert cosine(found, true_gradient()) < 0.99


@pytest.mark.parametrize("mean_over", ["tokens", "responses"])
def test_averages_that_know_the_length_point_elsewhere(mean_over):
    found = expected_gradient(2, "rloo", mean_over=mean_over)
    assert cosine(found, true_gradient()) < 0.999  # exact: no chance in it


# --- averages, ratios and clips by hand ---


def test_averages_by_hand():
    x, mask = rows([4, nan, nan], [1, 2, 3]), mask_of([1, 3])
    assert average(x, mask).item() == 2.5
    assert average(x, mask, "responses").item() == 3
    assert average(x, mask, "length", 5.0).item() == pytest.approx((4 / 5 + 6 / 5) / 2)


def test_responses_of_one_length_have_one_average():
    x, mask = random_values(3, 4, seed=0), mask_of([4, 4, 4])
    expected = x.mean()
    for over, length in (("tokens", None), ("responses", None), ("length", 4)):
        assert_close(average(x, mask, over, length), expected)


def two_tokens(ratios, advantage, **switches):
    """The loss of a response whose tokens have these ratios, and its gradient."""
    old = rows([0.2, 0.3]).log()
    new = (old + rows(list(ratios)).log()).requires_grad_()
    loss, stats = policy_loss(
        new, old, torch.full((1, 2), advantage).double(), mask_of([2]), **switches
    )
    return loss.item(), torch.autograd.grad(loss, new)[0][0].tolist(), stats


@pytest.mark.parametrize(
    ("ratio_of", "loss", "slope"),
    [
        ("token", -(1.1 + 0.95) / 2, [-0.55, -0.475]),
        ("response", -1.1 * 0.95, [-1.1 * 0.95] * 2),  # d(ρ₁ρ₂)/d log ρ₁ is ρ₁ρ₂
        ("mean", -((1.1 * 0.95) ** 0.5), [-((1.1 * 0.95) ** 0.5) / 2] * 2),
    ],
)
def test_ratios_by_hand(ratio_of, loss, slope):
    found, gradient, _ = two_tokens((1.1, 0.95), 1.0, ratio_of=ratio_of)
    assert found == pytest.approx(loss) and gradient == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio_of", "clipped"), [("token", 0.5), ("response", 1.0), ("mean", 0.0)]
)
def test_what_is_clipped_depends_on_the_ratio(ratio_of, clipped):
    """1.3 · 1.05 = 1.365, its root 1.168, with a clip of 0.2."""
    _, slope, stats = two_tokens((1.3, 1.05), 1.0, ratio_of=ratio_of)
    assert stats["clip_fraction"] == clipped
    assert [x == 0 for x in slope] == [clipped > 0, clipped == 1]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.25, 1.0, -1.25),  # below 1 + 0.28
        (1.4, 1.0, -1.28),
        (0.7, -1.0, 0.8),  # the lower clip is still 0.2
        (1.4, -1.0, 1.4),  # nothing holds back from mending what turned out worse
    ],
)
def test_two_clips_by_hand(ratio, advantage, loss):
    found, _, _ = two_tokens((ratio, ratio), advantage, clip=0.2, clip_high=0.28)
    assert found == pytest.approx(loss)


def test_the_loss_before_the_first_step_is_0_where_each_response_counts_the_same():
    """And no fault: its gradient is not 0."""
    new = random_logprobs(4, 5, seed=1).requires_grad_()
    mask = mask_of([1, 5, 2, 3])
    advantages = group_advantages(random_values(4, seed=2), 2)[:, None].expand(4, 5)
    for switches in ({"mean_over": "responses"}, {"mean_over": "responses", "ratio_of": "mean"}):
        loss, stats = policy_loss(new, new.detach(), advantages, mask, **switches)
        assert abs(loss.item()) < 1e-12 and stats["ratio"] == pytest.approx(1)
        assert torch.autograd.grad(loss, new)[0].abs().max() > 0.01
    assert abs(policy_loss(new, new.detach(), advantages, mask)[0].item()) > 0.1


# --- gradients and padding, for every switch ---

SWITCHES = [
    {"ratio_of": ratio_of, "mean_over": over, "length": 7.0 if over == "length" else None}
    for ratio_of in RATIOS
    for over in AVERAGES
]


@pytest.mark.parametrize("switches", SWITCHES)
def test_gradients_are_those_of_differences(switches):
    mask = mask_of([3, 1, 5, 2])
    old = random_logprobs(4, 5, seed=3)
    new = (old - 0.3 * random_values(4, 5, seed=4).abs()).requires_grad_()
    advantages = group_advantages(random_values(4, seed=5), 2)[:, None].expand(4, 5)

    def loss(x):
        return policy_loss(x, old, advantages, mask, 0.2, 0.28, **switches)[0]

    assert torch.autograd.gradcheck(loss, new)
    assert torch.autograd.grad(loss(new), new)[0][mask == 0].abs().max() == 0


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("junk", [nan, inf, -1e9])
def test_padding_changes_nothing(switches, junk):
    mask = mask_of([3, 1, 5])
    tensors = [random_logprobs(3, 5, seed=s) for s in (6, 7)] + [random_values(3, 5, seed=8)]
    clean = policy_loss(*tensors, mask, **switches)
    dirty = policy_loss(*(x.masked_fill(mask == 0, junk) for x in tensors), mask, **switches)
    assert clean[0] == dirty[0] and clean[1] == dirty[1]


def test_the_defaults_are_the_loss_of_lesson_03():
    mask = mask_of([3, 1, 5])
    new, old, advantages = (random_logprobs(3, 5, seed=s) for s in (9, 10, 11))
    ratio = (new - old).exp()
    kept = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[mask == 1]
    assert_close(policy_loss(new, old, advantages, mask)[0], -kept.mean())


# --- bad input ---


@pytest.mark.parametrize("size", [1, 0, -2, 2.0, "2", None, True])
def test_a_group_of_one_is_refused(size):
    for function in (group_advantages, equal_groups):
        with pytest.raises(
            ValueError, match="group_size is .*: it must be a whole number, at least 2"
        ):
            function(tensor(1, 2), size)


def test_groups_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match="5 scores are no groups of 2: give whole groups"):
        group_advantages(tensor(1, 2, 3, 4, 5), 2)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_score_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=rf"scores is {bad} at \[2\]: it must be finite"):
        group_advantages(tensor(1, 2, bad, 4), 2)


def test_scores_must_be_one_number_for_each_response():
    with pytest.raises(ValueError, match=r"scores has shape \[2, 2\]: it must be \[B\]"):
        group_advantages(tensor(1, 2, 3, 4).view(2, 2), 2)
    with pytest.raises(TypeError, match="scores must be floating point"):
        group_advantages(torch.tensor([1, 2]), 2)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind is 'gspo': it must be one of 'rloo', 'grpo', "):
        group_advantages(tensor(1, 2), 2, "gspo")


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"ratio_of": "sequence"}, "ratio_of is 'sequence': it must be one of 'token', 'response'"),
        ({"mean_over": "groups"}, "mean_over is 'groups': it must be one of 'tokens', "),
        ({"mean_over": "length"}, "length is None with a mean over length"),
        ({"length": 5}, "length is 5 with a mean over tokens: it belongs to 'length'"),
        ({"mean_over": "length", "length": 0}, "length is 0: it must be a finite number above 0"),
        ({"clip_high": 0}, "clip_high is 0: it must be a finite number above 0"),
    ],
)
def test_bad_switches_are_refused(switches, message):
    one = -torch.ones(1, 2)
    with pytest.raises(ValueError, match=message):
        policy_loss(one, one, one, mask_of([2]), **switches)


def test_a_ratio_of_a_whole_response_may_overflow():
    """Ten tokens that are e^100 times as likely each: their product is no number."""
    new, old = torch.zeros(1, 10), torch.full((1, 10), -100.0)
    arguments = (new, old, torch.ones(1, 10), mask_of([10]))
    with pytest.raises(ValueError, match="the ratio of new to old is inf at"):
        policy_loss(*arguments, ratio_of="response")
    small = torch.full((1, 10), -0.5)
    loss, _ = policy_loss(new, small, -torch.ones(1, 10), mask_of([10]), ratio_of="response")
    assert loss.item() == pytest.approx(exp(5)) and log(e) == 1
