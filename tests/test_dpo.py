"""DPO: the loss, the implicit rewards, log-probabilities of responses, the loop."""

import doctest
import itertools
import math
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from helpers_training import facts, kept_in, names_in, reports_of, role_weights
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from test_reward import make_pairs
from test_roles import alone, assert_close, base_bits, fill, gradients, same, save_tiny
from test_sft import stop_in_the_consumer, stop_in_the_optimizer

from rlhf_helpers import dpo
from rlhf_helpers.base import load_base
from rlhf_helpers.dpo import (
    SIDES,
    DPOConfig,
    dpo_loss,
    implicit_rewards,
    pair_logprobs,
    sequence_logprobs,
    train_dpo,
)
from rlhf_helpers.reward import encode_pairs, pair_accuracy
from rlhf_helpers.roles import CONFIG, WEIGHTS, Roles
from rlhf_helpers.sft import SFTConfig
from rlhf_helpers.training import TrainConfig

NAN, INF = float("nan"), float("inf")
KINDS = ["sigmoid", "ipo"]


def logprobs(*shape, seed=0, dtype=torch.float64):
    """Random log-probabilities of whole responses."""
    generator = torch.Generator().manual_seed(seed)
    return -20 * torch.rand(*shape, dtype=dtype, generator=generator) - 1


def four(count=7, seed=0):
    """Chosen and rejected under the policy, then under the reference."""
    return [logprobs(count, seed=4 * seed + i) for i in range(4)]


def gaps(*values):
    """Arguments of `dpo_loss` whose h has these values."""
    h = torch.tensor(values, dtype=torch.float64)
    return [-90 + h * 0, -70 + h * 0, -90 - h / 2, -70 + h / 2]


def test_doctests():
    results = doctest.testmod(dpo)
    assert results.attempted > 0
    assert results.failed == 0


# --- dpo_loss ------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """Chosen ×3 and ×1/2, rejected ×1 and ×2: h = log 3 and log 1/4; β = 1 gives 3/4 and 1/5."""
    chosen, ref_chosen = torch.tensor([0.3, 0.1]).log(), torch.tensor([0.1, 0.2]).log()
    rejected, ref_rejected = torch.tensor([0.2, 0.6]).log(), torch.tensor([0.2, 0.3]).log()
    arguments = (chosen, rejected, ref_chosen, ref_rejected)
    expected = -(math.log(3 / 4) + math.log(1 / 5)) / 2
    assert dpo_loss(*arguments, beta=1.0).item() == pytest.approx(expected, rel=1e-6)
    # β = 1/2 halves the log-odds: √3/(1 + √3) and 1/3.
    expected = -(math.log(3**0.5 / (1 + 3**0.5)) + math.log(1 / 3)) / 2
    assert dpo_loss(*arguments, beta=0.5).item() == pytest.approx(expected, rel=1e-6)
    expected = -(math.log(3 / 4) * 0.9 + math.log(1 / 4) * 0.1) / 2
    expected -= (math.log(1 / 5) * 0.9 + math.log(4 / 5) * 0.1) / 2
    found = dpo_loss(*arguments, beta=1.0, label_smoothing=0.1).item()
    assert found == pytest.approx(expected, rel=1e-6)
    expected = ((math.log(3) - 1) ** 2 + (math.log(1 / 4) - 1) ** 2) / 2
    assert dpo_loss(*arguments, 0.5, "ipo").item() == pytest.approx(expected, rel=1e-6)
    expected = ((math.log(3) - 5) ** 2 + (math.log(1 / 4) - 5) ** 2) / 2 * 0.75
    expected += ((-math.log(3) - 5) ** 2 + (math.log(4) - 5) ** 2) / 2 * 0.25
    assert dpo_loss(*arguments, 0.1, "ipo", 0.25).item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_stable_where_the_policy_is_sure():
    far = [torch.tensor([x]) for x in (-1.0, -3000.0, -2001.0, -1000.0)]
    assert dpo_loss(*far, beta=1.0).item() == 0
    wrong = [far[1], far[0], far[3], far[2]]
    assert dpo_loss(*wrong, beta=1.0).item() == 4000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_gradient_is_right_in_float64(kind, smoothing):
    policy, ref = four()[:2], four()[2:]
    for tensor in policy:
        tensor.requires_grad_()

    def loss(*sides):
        return dpo_loss(*sides, *ref, 0.3, kind, smoothing)

    assert torch.autograd.gradcheck(loss, policy)


def test_the_gradient_is_the_weight_of_the_paper():
    """−β σ(r̂_rejected − r̂_chosen)/N on the chosen, and its opposite on the rejected."""
    sides = four()
    policy = [x.clone().requires_grad_() for x in sides[:2]]
    found = torch.autograd.grad(dpo_loss(*policy, *sides[2:], beta=0.3), policy)
    chosen, rejected = (
        implicit_rewards(new, old, 0.3) for new, old in zip(sides[:2], sides[2:], strict=True)
    )
    weight = torch.sigmoid(rejected - chosen)
    torch.testing.assert_close(found[0], -0.3 * weight / 7, rtol=1e-10, atol=0)
    torch.testing.assert_close(found[1], -found[0], rtol=1e-10, atol=0)


def test_half_precision_is_computed_in_float32():
    sides = [x.to(torch.bfloat16) for x in four()]
    found = dpo_loss(*sides, beta=0.1)
    assert found.dtype == torch.float32
    assert found == dpo_loss(*(x.float() for x in sides), beta=0.1)
    assert dpo_loss(*four(), beta=0.1).dtype == torch.float64


# --- properties ----------------------------------------------------------------------------


def total_gap(sides):
    chosen, rejected, ref_chosen, ref_rejected = sides
    return ((chosen - ref_chosen) - (rejected - ref_rejected)).mean().item()


def swapped(sides):
    chosen, rejected, ref_chosen, ref_rejected = sides
    return rejected, chosen, ref_rejected, ref_chosen


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_swapping_chosen_and_rejected_costs_the_margin(seed, smoothing):
    """log σ(x) − log σ(−x) = x, and (x − c)² − (x + c)² = −4 c x."""
    sides, agreed = four(seed=seed), 1 - 2 * smoothing
    price = {"sigmoid": 0.3, "ipo": 2 / 0.3}
    for kind in KINDS:
        options = {"beta": 0.3, "kind": kind, "label_smoothing": smoothing}
        difference = (dpo_loss(*swapped(sides), **options) - dpo_loss(*sides, **options)).item()
        expected = price[kind] * agreed * total_gap(sides)
        assert difference == pytest.approx(expected, rel=1e-9)
        assert abs(difference) > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_without_a_price_or_a_difference_the_loss_is_log_2(smoothing):
    options = {"label_smoothing": smoothing}
    sides = four()
    for beta in (1e-6, 1e-9):
        found = dpo_loss(*sides, beta=beta, **options).item()
        assert found == pytest.approx(math.log(2), abs=20 * beta)
    assert abs(dpo_loss(*sides, beta=0.1, **options).item() - math.log(2)) > 0.01
    same_policy = [*sides[:2], *sides[:2]]
    for beta in (0.01, 1.0, 100.0):
        found = dpo_loss(*same_policy, beta=beta, **options).item()
        assert found == pytest.approx(math.log(2), rel=1e-12)
        found = dpo_loss(*same_policy, beta=beta, kind="ipo", **options).item()
        assert found == pytest.approx(1 / (4 * beta**2), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_on_both_sides_cancels(kind):
    """A prompt's log Z; and whatever changes policy and reference alike."""
    sides, shift = four(), logprobs(7, seed=99)
    before = dpo_loss(*sides, 0.2, kind)
    for which in ((0, 1), (2, 3), (0, 2), (1, 3)):
        moved = [x + shift if i in which else x for i, x in enumerate(sides)]
        torch.testing.assert_close(dpo_loss(*moved, 0.2, kind), before, rtol=1e-10, atol=0)
    for which in ((0,), (1,), (0, 3)):
        moved = [x + shift if i in which else x for i, x in enumerate(sides)]
        assert abs(dpo_loss(*moved, 0.2, kind) - before) > 0.01


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_ipo_is_best_at_a_finite_gap(beta, smoothing):
    best = (1 - 2 * smoothing) / (2 * beta)
    h = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    zero = torch.full((1,), -50.0, dtype=torch.float64)
    loss = dpo_loss(zero + h, zero, zero, zero, beta, "ipo", smoothing)
    assert torch.autograd.grad(loss, h)[0].item() == pytest.approx(0, abs=1e-12)
    for other in (best - 0.1, best + 0.1):
        assert dpo_loss(*gaps(other), beta, "ipo", smoothing) > loss
    if smoothing == 0:
        assert loss.item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_smoothing_is_best_where_the_policy_bets_on_the_share_of_slips(beta, smoothing):
    """σ(β h) = 1 − ε; the loss is the entropy of ε there. Without smoothing it falls for ever."""
    best = math.log((1 - smoothing) / smoothing) / beta
    loss = dpo_loss(*gaps(best), beta, label_smoothing=smoothing).item()
    entropy = -sum(p * math.log(p) for p in (smoothing, 1 - smoothing))
    assert loss == pytest.approx(entropy, rel=1e-12)
    for other in (best - 0.1, best + 0.1):
        assert dpo_loss(*gaps(other), beta, label_smoothing=smoothing).item() > loss
        assert dpo_loss(*gaps(other), beta) > dpo_loss(*gaps(other + 0.1), beta)


def test_the_best_policy_has_the_true_rewards_as_implicit_ones():
    """π* ∝ π_ref exp(r/β) on four responses: r̂ = r less β log Z, the same for all of them."""
    ref = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    rewards = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    best = torch.log_softmax(ref + rewards / 0.5, dim=0)
    found = implicit_rewards(best, ref, beta=0.5)
    shift = found - rewards
    log_z = torch.logsumexp(ref + rewards / 0.5, dim=0)
    torch.testing.assert_close(shift, -0.5 * log_z.expand(4), rtol=1e-10, atol=0)


# --- arguments that cannot be right --------------------------------------------------------

NAMES = ["chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs"]


@pytest.mark.parametrize("number, name", list(enumerate(NAMES)))
@pytest.mark.parametrize(
    "bad, message",
    [(0.5, r"is 0.5 at \[1\].*never above 0"), (NAN, r"is nan at \[1\]"), (-INF, r"is -inf at")],
)
def test_what_is_no_log_probability_is_named(number, name, bad, message):
    sides = four()
    sides[number][1] = bad
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        dpo_loss(*sides, beta=0.1)
    if number in (0, 2):
        short = name.replace("chosen_", "")
        with pytest.raises(ValueError, match=f"^{short} {message}"):
            implicit_rewards(sides[0], sides[2], beta=0.1)


def test_rounding_above_0_is_no_mistake():
    sides = four()
    sides[0][1] = 1e-6
    assert dpo_loss(*sides, beta=0.1).isfinite()


@pytest.mark.parametrize("number, name", list(enumerate(NAMES)))
def test_shapes_and_types_that_do_not_fit_are_named(number, name):
    for bad in (logprobs(3), logprobs(7, 1), logprobs([])):
        sides = four()
        sides[number] = bad
        shapes = rf"\b{name} (has shape )?\[{', '.join(map(str, bad.shape))}\].*must be"
        with pytest.raises(ValueError, match=shapes):
            dpo_loss(*sides, beta=0.1)
    sides = four()
    sides[number] = torch.zeros(7, dtype=torch.int64)
    with pytest.raises(TypeError, match=f"{name} must be floating point"):
        dpo_loss(*sides, beta=0.1)


@pytest.mark.parametrize("shape", [[0], [2, 5], []])
def test_tokens_or_nothing_in_place_of_whole_responses_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[N\]"):
        dpo_loss(*(logprobs(shape) for _ in range(4)), beta=0.1)
    with pytest.raises(ValueError, match=r"must be \[N\]"):
        implicit_rewards(*(logprobs(shape) for _ in range(2)), beta=0.1)


@pytest.mark.parametrize("number", [2, 3])
def test_a_reference_with_a_gradient_is_refused(number):
    sides = four()
    sides[number].requires_grad_()
    with pytest.raises(ValueError, match=f"{NAMES[number]} requires gradients.*no_grad"):
        dpo_loss(*sides, beta=0.1)
    with pytest.raises(ValueError, match="ref_logprobs requires gradients.*no_grad"):
        implicit_rewards(sides[0], sides[number], beta=0.1)


BAD_SETTINGS = [
    ({"beta": 0.0}, "beta is 0.0: it must be a finite number above 0"),
    ({"beta": -0.1}, "beta is -0.1"),
    ({"beta": NAN}, "beta is nan"),
    ({"beta": INF}, "beta is inf"),
    ({"beta": "0.1"}, "beta is '0.1'"),
    ({"kind": "hinge"}, "kind is 'hinge': it must be one of"),
    ({"label_smoothing": 0.5}, "label_smoothing is 0.5: it must be between 0 and 0.499"),
    ({"label_smoothing": 0.9}, "label_smoothing is 0.9"),
    ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ({"label_smoothing": NAN}, "label_smoothing is nan"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*four(), **{"beta": 0.1} | settings)
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)
    if "beta" in settings:
        with pytest.raises(ValueError, match=message):
            implicit_rewards(*four()[:2], **settings)


def test_a_config_checks_what_all_loops_share():
    for settings, message in (
        ({"steps": 0}, "steps is 0: it must be a whole number"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"learning_rate": NAN}, "learning_rate is nan"),
        ({"steps": 10}, "warmup_steps is 10 of 10 steps; give fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            DPOConfig(**settings)
    assert DPOConfig(label_smoothing=0.499, beta=1, kind="ipo").rate(10) == 5e-4


# --- log-probabilities of responses --------------------------------------------------------

STEPS = 12
SETTINGS = DPOConfig(
    steps=STEPS,
    batch_size=4,
    learning_rate=0.02,
    warmup_steps=2,
    eval_every=5,
    save_every=4,
    beta=0.3,
)
TRAIN, HELD_OUT = make_pairs(40, 0), make_pairs(32, 1)
BOTH = ("policy", "reference")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=32)


def new_roles(preset, seed=5):
    """A reference that has learnt something, and a policy that is a copy of it."""
    roles = Roles(load_base(preset), rank=4, alpha=8)
    roles.add("reference", trainable=False)
    fill(roles.model, "reference", seed)
    roles.add("policy", copy_of="reference")
    return roles


@pytest.fixture(scope="module")
def fixed(tiny):
    """Roles that no test changes; the policy is not where it started."""
    roles = new_roles(tiny)
    fill(roles.model, "policy", 6)
    return roles


def logprob_alone(model, example):
    """One sequence without padding, by all of its logits: the response's tokens, EOS included."""
    prompt, response = example["prompt"], example["response"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows[torch.arange(len(response)), torch.tensor(response)].sum().item()


def test_a_responses_log_probability_is_the_sum_of_its_tokens(fixed, tokenizer):
    examples = [pair[side] for pair in TRAIN[:6] for side in SIDES]
    assert len({len(x["prompt"]) for x in examples}) > 2
    assert len({len(x["response"]) for x in examples}) > 2
    for role in BOTH:
        model = fixed.use(role)
        expected = [logprob_alone(model, example) for example in examples]
        found = sequence_logprobs(model, tokenizer, examples)
        assert found.detach().tolist() == pytest.approx(expected, abs=1e-4)
        assert found.requires_grad == (role == "policy")
        assert min(abs(a - b) for a, b in itertools.pairwise(sorted(expected))) > 1e-3


def test_what_padding_holds_changes_nothing(fixed, tokenizer, monkeypatch):
    examples = [pair[side] for pair in TRAIN[:4] for side in SIDES]
    ids, mask, prompt_length = dpo.pad_examples(tokenizer, examples)
    assert (mask[:, 0] == 0).any() and (mask[:, -1] == 0).any()
    noise = torch.randint(4, 60, ids.shape, generator=torch.Generator().manual_seed(0))
    model = fixed.use("policy")
    before = sequence_logprobs(model, tokenizer, examples)
    noisy = torch.where(mask == 1, ids, noise)
    monkeypatch.setattr(dpo, "pad_examples", lambda *_: (noisy, mask, prompt_length))
    assert torch.equal(sequence_logprobs(model, tokenizer, examples), before)
    noisy[0, prompt_length] = 5 if noisy[0, prompt_length] != 5 else 6  # a token that counts
    assert not torch.equal(sequence_logprobs(model, tokenizer, examples), before)


def test_only_positions_that_predict_a_response_get_logits(fixed, tokenizer):
    examples = [pair["chosen"] for pair in TRAIN[:6]]
    positions, head = [], fixed.base.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, given, made: positions.append(made[..., 0].numel()))
    sequence_logprobs(fixed.use("policy"), tokenizer, examples)
    hook.remove()
    assert positions == [6 * (1 + max(len(x["response"]) for x in examples))]


def test_pairs_keep_their_order_over_several_batches(fixed, tokenizer, monkeypatch):
    together = pair_logprobs(fixed, "policy", tokenizer, TRAIN)
    sizes = []

    def spy(model, tokenizer, examples):
        sizes.append(len(examples))
        return sequence_logprobs(model, tokenizer, examples)

    monkeypatch.setattr(dpo, "sequence_logprobs", spy)
    monkeypatch.setattr(dpo, "ROWS", 9)
    apart = pair_logprobs(fixed, "policy", tokenizer, TRAIN)
    assert sizes == [9] * 8 + [8]
    model = fixed.use("policy")
    for side, found, same_again in zip(SIDES, together, apart, strict=True):
        expected = [logprob_alone(model, pair[side]) for pair in TRAIN]
        assert found.tolist() == pytest.approx(expected, abs=1e-4)
        assert same_again.tolist() == pytest.approx(expected, abs=1e-4)
        assert not found.requires_grad


def test_rewards_and_their_accuracy(fixed, tokenizer):
    """`reward.pair_accuracy` takes implicit rewards as any others."""
    new, old = (pair_logprobs(fixed, role, tokenizer, TRAIN) for role in BOTH)
    chosen, rejected = (implicit_rewards(a, b, 0.3) for a, b in zip(new, old, strict=True))
    ranked = sum((a > b).item() for a, b in zip(chosen, rejected, strict=True)) / len(TRAIN)
    assert pair_accuracy(chosen, rejected) == pytest.approx(ranked)
    assert 0.1 < ranked < 0.9


# --- training ------------------------------------------------------------------------------


@pytest.fixture
def train(tiny, tokenizer):
    """Train the policy; in the ordinary case a fresh one on a fresh base."""

    def train(folder=None, roles=None, visit=None, **changes):
        roles = roles or new_roles(tiny)
        options = {"role": "policy", "reference": "reference", "config": SETTINGS}
        options |= {"pairs": TRAIN, "held_out": HELD_OUT} | changes
        run = train_dpo(roles, tokenizer=tokenizer, folder=folder, **options)
        return roles, reports_of(run, visit)

    return train


@pytest.fixture(scope="module")
def history(tiny, tokenizer):
    """A run that was never stopped: its report and its weights after each update."""
    roles = new_roles(tiny)
    run = train_dpo(roles, "policy", "reference", tokenizer, TRAIN, HELD_OUT, SETTINGS)
    return [(stats, roles.state("policy")) for stats in run]


def last(history):
    return history[-1][1]


def test_at_the_start_nothing_has_been_learnt(history):
    first = history[0][0]
    assert first.step == 0 and first.loss is None
    nothing = {"chosen_log_ratio": 0.0, "rejected_log_ratio": 0.0, "margin": 0.0}
    loss = pytest.approx(math.log(2), rel=1e-7)
    assert first.held_out == {"loss": loss, "accuracy": 0.5} | nothing
    assert history[1][0].loss == pytest.approx(math.log(2), rel=1e-5)


def test_the_policy_learns_what_is_preferred(tiny, tokenizer):
    roles = new_roles(tiny)
    config = replace(SETTINGS, steps=25, batch_size=16, warmup_steps=3, eval_every=25)
    run = train_dpo(roles, "policy", "reference", tokenizer, TRAIN, HELD_OUT, config)
    end = list(run)[-1].held_out
    new, old = (pair_logprobs(roles, role, tokenizer, HELD_OUT) for role in BOTH)
    chosen, rejected = (a - b for a, b in zip(new, old, strict=True))
    assert end["accuracy"] == pair_accuracy(chosen, rejected) > 0.85
    assert end["loss"] == dpo_loss(*new, *old, 0.3).item() < 0.45
    assert end["chosen_log_ratio"] == chosen.mean().item()
    assert end["rejected_log_ratio"] == rejected.mean().item()
    assert end["margin"] == pytest.approx(0.3 * (chosen - rejected).mean().item())


def test_the_held_out_numbers_by_hand(tiny, tokenizer, history):
    """Each sequence alone, under weights that a run has had after its fifth update."""
    roles = new_roles(tiny)
    with torch.no_grad():
        for name, parameter in roles.parameters("policy").items():
            parameter.copy_(history[5][1][name.replace(".policy.", ".")])
    ratios = {}
    for side in SIDES:
        new, old = (
            torch.tensor([logprob_alone(roles.use(role), pair[side]) for pair in HELD_OUT])
            for role in BOTH
        )
        ratios[side] = new - old
    margin = 0.3 * (ratios["chosen"] - ratios["rejected"])
    assert history[5][0].held_out == pytest.approx(
        {
            "loss": torch.log1p(torch.exp(-margin)).mean().item(),
            "accuracy": (margin > 0).double().mean().item(),
            "chosen_log_ratio": ratios["chosen"].mean().item(),
            "rejected_log_ratio": ratios["rejected"].mean().item(),
            "margin": margin.mean().item(),
        },
        abs=1e-4,
    )
    assert margin.abs().mean() > 0.01


def test_a_run_is_repeatable_bit_for_bit(train, history):
    torch.manual_seed(123)  # of no influence
    roles, stats = train()
    assert same(roles.state("policy"), last(history))
    assert facts(stats) == facts(s for s, _ in history)
    assert [s.step for s in stats if s.held_out] == [0, 5, 10, STEPS]
    assert not same(train(pairs=TRAIN[::-1])[0].state("policy"), last(history))


@pytest.mark.parametrize(
    "changes", [{"beta": 0.1}, {"kind": "ipo"}, {"label_smoothing": 0.2}], ids=str
)
def test_settings_reach_the_loss(train, history, changes):
    roles, stats = train(config=replace(SETTINGS, steps=3, **changes))
    start = {"beta": math.log(2), "kind": 1 / 0.36, "label_smoothing": math.log(2)}
    assert stats[0].held_out["loss"] == pytest.approx(start[next(iter(changes))], rel=1e-5)
    assert not same(roles.state("policy"), history[3][1])
    assert stats[2].grad_norm != history[2][0].grad_norm


def test_nothing_runs_before_the_first_report_is_drawn(tiny, tokenizer, monkeypatch):
    roles, asked = new_roles(tiny), []

    def spy(roles, role, *arguments):
        asked.append(role)
        return pair_logprobs(roles, role, *arguments)

    monkeypatch.setattr(dpo, "pair_logprobs", spy)
    run = train_dpo(roles, "policy", "reference", tokenizer, TRAIN, HELD_OUT, SETTINGS)
    assert asked == []
    assert next(run).step == 0
    assert same(roles.state("policy"), roles.state("reference"))
    list(run)
    # The reference once for each set, before all updates; then the policy at each measurement.
    assert asked == ["reference"] * 2 + ["policy"] * 4


def test_training_changes_nothing_else(tiny, train):
    roles = new_roles(tiny)
    roles.add("reward")
    fill(roles.model, "reward", 1)
    roles.add_head("reward", seed=1)
    roles.add("value", copy_of="reward")
    base = base_bits(roles.model)
    before = {name: role_weights(roles, name) for name in roles.names}
    roles.use("reward")
    train(roles=roles)
    assert same(base_bits(roles.model), base)
    for name in ("reference", "reward", "value"):
        assert same(role_weights(roles, name), before[name])
    assert not same(roles.state("policy"), before["policy"])
    assert not roles.model.training


def test_gradients_are_the_policys_own_and_no_other_roles(tiny, tokenizer):
    """Those of the third update, beside plain PEFT with the policy's adapter and nothing else."""
    roles = new_roles(tiny)
    roles.add("reward")
    roles.add_head("reward")
    roles.add("value", copy_of="reward")
    config = replace(SETTINGS, max_grad_norm=INF)
    run = train_dpo(roles, "policy", "reference", tokenizer, TRAIN, HELD_OUT, config)
    next(run), next(run), next(run)
    weights = roles.state("policy")
    next(run)
    with_gradients = [name for name, p in roles.model.named_parameters() if p.grad is not None]
    assert sorted(with_gradients) == sorted(roles.parameters("policy"))
    assert all(p.grad is None for head in roles.heads.values() for p in head.parameters())
    examples = [pair[side] for side in SIDES for pair in TRAIN[8:12]]
    model = alone(tiny, weights)
    with torch.no_grad():
        ref = sequence_logprobs(alone(tiny, roles.state("reference")), tokenizer, examples)
    own = sequence_logprobs(model, tokenizer, examples)
    dpo_loss(*own.split(4), *ref.split(4), beta=0.3).backward()
    assert_close(gradients(roles.model, "policy"), gradients(model, "default"))
    run.close()


# --- what cannot be trained ----------------------------------------------------------------


def one_more(rows, **sides):
    """A pair behind good ones, with changes to its sides."""
    changed = {side: TRAIN[0][side] | sides.get(side, {}) for side in SIDES}
    return [*rows[:2], changed]


EOS = 1
ROLES = [
    ({"role": "nobody"}, "there is no role 'nobody'"),
    ({"role": "reference"}, "role 'reference' is frozen"),
    ({"role": "judge"}, "role 'judge' has a head already; add another role, without"),
    ({"reference": "nobody"}, "there is no role 'nobody'; there are .*'judge'.*load"),
    ({"reference": "policy"}, "role 'policy' is trainable; add a copy of it with trainable=False"),
    (
        {"reference": "learner"},
        "role 'learner' is trainable; add a copy of it with trainable=False",
    ),
    ({"reference": "bare"}, "role 'bare' answers as the bare base, its adapter is still 0"),
    ({"reference": "other"}, "role 'policy' is no copy of 'other'.*copy_of='other'.*any_reference"),
    ({"role": "learner"}, "role 'learner' is no copy of 'reference'"),
]
PAIRS = [
    ([], "^{} is empty"),
    (["a pair"], r"{}\[0\] is 'a pair': give pairs from encode_pairs"),
    ([{"chosen": TRAIN[0]["chosen"]}], r"{}\[0\] is .*give pairs from encode_pairs"),
    (one_more(TRAIN, rejected=TRAIN[0]["chosen"]), r"{}\[2\] has two prompts, or equal responses"),
    (one_more(TRAIN, rejected={"prompt": [5]}), r"{}\[2\] has two prompts, or equal responses"),
    (one_more(TRAIN, chosen={"response": []}), r"chosen of {}\[2\] has no prompt, or .* EOS"),
    (one_more(TRAIN, rejected={"response": [7]}), r"rejected of {}\[2\] .* not end with EOS"),
    (one_more(TRAIN, rejected={"response": [64, EOS]}), r"rejected of {}\[2\] holds token id 64"),
    (
        one_more(TRAIN, **{side: {"prompt": [5] * 30} for side in SIDES}),
        r"{}\[2\] has \d+ tokens, more than the model's context of 32",
    ),
]


@pytest.fixture(scope="module")
def crowd(tiny):
    """Roles of which most cannot be trained, or not against each other. No test changes them."""
    roles = new_roles(tiny)
    roles.add("learner")
    fill(roles.model, "learner", 7)
    roles.add("judge", copy_of="reference")
    roles.add_head("judge")
    roles.add("other", copy_of="learner", trainable=False)
    roles.add("bare", trainable=False)
    return roles


def assert_refused(roles, train, folder, error, message, **changes):
    before = {name: roles.state(name) for name in roles.names}
    with pytest.raises(error, match=message):
        train(folder, roles=roles, **changes)
    assert all(same(roles.state(name), before[name]) for name in roles.names)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("changes, message", ROLES)
def test_roles_that_do_not_make_dpo_are_refused(crowd, train, changes, message, tmp_path):
    assert_refused(crowd, train, tmp_path / "dpo", ValueError, message, **changes)


@pytest.mark.parametrize("argument", ["pairs", "held_out"])
@pytest.mark.parametrize("rows, message", PAIRS)
def test_pairs_that_cannot_be_used_are_named(crowd, train, argument, rows, message, tmp_path):
    message = message.format(argument)
    assert_refused(crowd, train, tmp_path / "dpo", ValueError, message, **{argument: rows})


@pytest.mark.parametrize("config", [TrainConfig(steps=20), SFTConfig(), {"beta": 0.1}])
def test_settings_of_another_method_are_refused(crowd, train, config, tmp_path):
    message = "config is .*: give DPOConfig"
    assert_refused(crowd, train, tmp_path / "dpo", TypeError, message, config=config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rejected": "It says quack."}, "pair 0: chosen and rejected are both"),
        ({"chosen": ""}, "in column 'chosen', completion 0 is ''"),
        ({"rejected": "  "}, "in column 'rejected', completion 0 is '  '"),
        ({"prompt": "what does the duck say? " * 20}, "prompt 0 .*and the limit is 24"),
    ],
)
def test_texts_that_make_no_pair_are_named(tokenizer, change, message):
    row = {"prompt": "what does the duck say?", "chosen": "It says quack.", "rejected": "moo."}
    with pytest.raises(ValueError, match=message):
        encode_pairs(tokenizer, Dataset.from_list([row | change]), 24, 32)


def test_another_reference_is_taken_on_request(tiny, tokenizer, train):
    for reference in ("other", "bare"):
        roles = new_roles(tiny)
        roles.add("bare", trainable=False)
        roles.add("other", trainable=False)
        fill(roles.model, "other", 7)
        before = (
            pair_logprobs(roles, role, tokenizer, HELD_OUT)[0] for role in ("policy", reference)
        )
        expected = next(before) - next(before)
        config = replace(SETTINGS, steps=3)
        _, stats = train(roles=roles, reference=reference, config=config, any_reference=True)
        assert stats[0].held_out["chosen_log_ratio"] == expected.mean().item() != 0
        assert stats[0].held_out["accuracy"] != 0.5


def test_a_policy_that_has_learnt_cannot_begin_again(tiny, train):
    """As when a cell without a folder is run twice: the second run would not start at its β."""
    roles, _ = train()
    with pytest.raises(ValueError, match="role 'policy' is no copy of 'reference'"):
        train(roles=roles)


# --- on disk, and interrupted --------------------------------------------------------------


def break_the_loss(step, monkeypatch, breaking):
    """Do something else to the loss of the update after `step`."""
    calls = itertools.count()

    def loss(chosen, *arguments):
        value = dpo_loss(chosen, *arguments)
        update = chosen.requires_grad  # and no measurement
        return breaking(value) if update and next(calls) == step else value

    monkeypatch.setattr(dpo, "dpo_loss", loss)


def raise_interrupt(_):
    raise KeyboardInterrupt


def stop_in_the_loss(step, monkeypatch):
    break_the_loss(step, monkeypatch, raise_interrupt)


def stop_in_backward(step, monkeypatch):
    def on_the_way(value):
        value.register_hook(raise_interrupt)
        return value

    break_the_loss(step, monkeypatch, on_the_way)


STOPS = [stop_in_the_loss, stop_in_backward, stop_in_the_optimizer, stop_in_the_consumer]


def interrupt(train, monkeypatch, folder, stop=stop_in_the_loss, step=7, **options):
    with monkeypatch.context() as patch:
        visit = stop(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train(folder, visit=visit, **options)


def weights_in(folder):
    """Of a finished adapter, or of the newest save of an unfinished run."""
    return load_file(kept_in(folder, "policy") / WEIGHTS)


def test_a_finished_run_is_in_its_folder(tiny, train, history, tmp_path):
    folder = tmp_path / "runs" / "dpo"
    train(folder)
    assert names_in(folder.parent) == ["dpo"]
    assert names_in(folder) == sorted([CONFIG, WEIGHTS])
    again = Roles(load_base(tiny), rank=4, alpha=8)
    again.load("policy", folder)
    assert same(again.state("policy"), last(history))


@pytest.mark.parametrize("same_roles", [False, True])
@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tiny, train, history, tmp_path, monkeypatch, stop, step, same_roles
):
    """In roles of a new process the policy is the reference's copy; in those at hand it is not."""
    folder, unfinished = tmp_path / "dpo", tmp_path / "dpo.unfinished"
    roles = new_roles(tiny)
    interrupt(train, monkeypatch, folder, stop, step, roles=roles)
    assert names_in(tmp_path) == ["dpo.unfinished"]
    assert same(weights_in(unfinished), history[step][1])
    model = PeftModel.from_pretrained(load_base(tiny), str(kept_in(unfinished, "policy")))
    assert same(get_peft_model_state_dict(model), history[step][1])
    assert not same(roles.state("policy"), roles.state("reference")) or step == 1
    roles, stats = train(folder, roles=roles if same_roles else None)
    assert facts(stats) == facts(s for s, _ in history)[step + 1 :]
    assert same(roles.state("policy"), last(history))
    assert same(weights_in(folder), last(history))
    assert names_in(tmp_path) == ["dpo"]


def test_a_killed_run_goes_on_from_its_last_save(train, history, tmp_path):
    """A kill runs no cleanup: what is on disk in the middle of a run must do."""
    moment = tmp_path / "moment" / "dpo.unfinished"

    def visit(stats):
        if stats.step == 11:
            shutil.copytree(tmp_path / "run" / "dpo.unfinished", moment)

    train(tmp_path / "run" / "dpo", visit=visit)
    assert same(weights_in(moment), history[8][1])
    roles, stats = train(moment.with_name("dpo"))
    assert facts(stats) == facts(s for s, _ in history)[9:]
    assert same(roles.state("policy"), last(history))


def test_a_run_left_early_is_kept(tiny, tokenizer, train, history, tmp_path):
    arguments = ("policy", "reference", tokenizer, TRAIN, HELD_OUT, SETTINGS)
    for stats in train_dpo(new_roles(tiny), *arguments, folder=tmp_path / "dpo"):
        if stats.step == 5:
            break
    assert names_in(tmp_path) == ["dpo.unfinished"]
    assert same(train(tmp_path / "dpo")[0].state("policy"), last(history))


def test_a_run_stopped_before_its_first_update_begins_again(
    tiny, train, history, tmp_path, monkeypatch
):
    roles = new_roles(tiny)
    interrupt(train, monkeypatch, tmp_path / "dpo", stop_in_backward, 0, roles=roles)
    assert list(tmp_path.iterdir()) == []
    _, stats = train(tmp_path / "dpo", roles=roles)
    assert facts(stats) == facts(s for s, _ in history)
    assert same(roles.state("policy"), last(history))


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_goes_on_only_with_its_own_reference(
    tiny, train, history, tmp_path, monkeypatch, step
):
    """Whatever the policy that is at hand: its own is on disk."""
    folder = tmp_path / "dpo"
    interrupt(train, monkeypatch, folder, step=step)
    message = "belongs to a run with other settings .*reference: weights .* there, weights .* here"
    for any_reference in (False, True):
        with pytest.raises(ValueError, match=message):
            train(folder, roles=new_roles(tiny, seed=8), any_reference=any_reference)
    roles = new_roles(tiny)
    fill(roles.model, "policy", 9)  # what is on disk counts
    assert same(train(folder, roles=roles)[0].state("policy"), last(history))


OTHER = [
    {"pairs": TRAIN[:-1]},
    {"config": replace(SETTINGS, learning_rate=0.01)},
    {"config": replace(SETTINGS, beta=0.1)},
    {"config": replace(SETTINGS, kind="ipo")},
    {"config": replace(SETTINGS, label_smoothing=0.1)},
]


def test_an_unfinished_run_with_other_settings_is_kept(tiny, train, history, tmp_path, monkeypatch):
    folder = tmp_path / "dpo"
    interrupt(train, monkeypatch, folder)
    roles = new_roles(tiny)
    roles.add("student", copy_of="reference")
    with pytest.raises(ValueError, match="other settings .role: policy there, student here"):
        train(folder, roles=roles, role="student")
    for changes in OTHER:
        with pytest.raises(ValueError, match="update-00007' belongs to a run with other settings"):
            train(folder, **changes)
    assert same(train(folder)[0].state("policy"), last(history))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_end_the_run_before_their_update(
    train, history, tmp_path, monkeypatch, where
):
    def in_the_gradient(value):
        value.register_hook(lambda gradient: gradient * NAN)
        return value

    breaking = {"loss": lambda value: value * NAN, "gradient": in_the_gradient}[where]
    with monkeypatch.context() as patch:
        break_the_loss(7, patch, breaking)
        message = "broke off at role 'policy' after 7 updates.*update 7 is kept"
        with pytest.raises(FloatingPointError, match=message):
            train(tmp_path / "dpo")
    assert same(weights_in(tmp_path / "dpo.unfinished"), history[7][1])
    assert same(train(tmp_path / "dpo")[0].state("policy"), last(history))


def test_measurements_that_diverge_end_the_run(train, history, tmp_path, monkeypatch):
    """As losses do; the update before them is whole."""
    calls = itertools.count()

    def diverged(roles, role, *arguments):
        sides = pair_logprobs(roles, role, *arguments)
        broken = role == "policy" and next(calls) == 1
        return [side - INF for side in sides] if broken else sides

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "pair_logprobs", diverged)
        message = "'policy' after 5 updates.*update 5 is kept in .*: chosen_logprobs is"
        with pytest.raises(FloatingPointError, match=message):
            train(tmp_path / "dpo")
    assert same(weights_in(tmp_path / "dpo.unfinished"), history[5][1])
    assert same(train(tmp_path / "dpo")[0].state("policy"), last(history))


def test_log_probabilities_that_diverge_end_the_run(train, history, tmp_path, monkeypatch):
    calls = itertools.count()

    def diverged(model, tokenizer, examples):
        value = sequence_logprobs(model, tokenizer, examples)
        return value - INF if value.requires_grad and next(calls) == 7 else value

    monkeypatch.setattr(dpo, "sequence_logprobs", diverged)
    with pytest.raises(FloatingPointError, match="after 7 updates.*chosen_logprobs is -inf at"):
        train(tmp_path / "dpo")
    assert same(weights_in(tmp_path / "dpo.unfinished"), history[7][1])
