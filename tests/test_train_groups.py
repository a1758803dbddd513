"""PPO's loop without a critic: groups of responses, three roles, and a reward that is a program."""

from dataclasses import replace

import pytest
import torch
from test_roles import same
from test_train_ppo import PROMPTS, SETTINGS, facts, interrupt, new_roles, save_talker, weights

from rlhf_helpers import ppo
from rlhf_helpers.kl import kl_estimate
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.losses import GROUPED, average, group_advantages, policy_loss, shape_rewards
from rlhf_helpers.memory import ModelSizes, memory_table
from rlhf_helpers.ppo import PPOConfig, collect_experience, train_ppo
from rlhf_helpers.reward import check_rewards

CONFIG = replace(SETTINGS, batch_size=6, minibatch_size=3, advantages="rloo", group_size=3)
ASKED = [prompt for prompt in PROMPTS[:4] for _ in range(3)]
NAN = float("nan")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return save_talker(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


def three_roles(preset):
    """Without role `value`."""
    roles = new_roles(preset)
    roles.model.delete_adapter("value")
    roles.heads.pop("value")
    roles._trainable.pop("value")
    assert roles.names == ["policy", "reference", "reward"]
    return roles


@pytest.fixture
def train(tiny, tokenizer):
    def train(folder=None, roles=None, visit=None, config=CONFIG, **options):
        roles = roles or three_roles(tiny)
        stats = []
        for report in train_ppo(roles, tokenizer, PROMPTS, config, folder, **options):
            stats.append(report)
            if visit:
                visit(report)
        return roles, stats

    return train


def collected(roles, tokenizer, config, prompts=ASKED, beta=0.3, **options):
    with torch.no_grad():
        for parameter in roles.parameters("policy").values():
            parameter.mul_(3)  # away from the reference
    return collect_experience(roles, tokenizer, prompts, config, beta, 3, **options)


# --- settings ---


@pytest.mark.parametrize("kind", GROUPED)
def test_without_a_critic_a_group_has_at_least_two(kind):
    message = f"group_size is 1 with advantages='{kind}': .* others to its prompt; give 2 or more"
    with pytest.raises(ValueError, match=message):
        PPOConfig(advantages=kind)
    assert PPOConfig(advantages=kind, group_size=2).trained == ("policy",)
    assert PPOConfig(group_size=2).trained == ("policy", "value")


def test_groups_fill_the_batch():
    with pytest.raises(ValueError, match="batch_size 64 cannot be divided by group_size 5"):
        PPOConfig(advantages="rloo", group_size=5)


@pytest.mark.parametrize(
    "name, value",
    [
        ("advantages", "dpo"),
        ("group_size", 0),
        ("group_size", 2.0),
        ("clip_high", 0.0),
        ("clip_high", NAN),
        ("ratio_of", "sequence"),
        ("mean_over", "batch"),
    ],
)
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        PPOConfig(**{"group_size": 4, name: value})


# --- experience ---


@pytest.mark.parametrize("kind", GROUPED)
def test_advantages_are_the_pure_functions(tiny, tokenizer, kind):
    one = collected(three_roles(tiny), tokenizer, replace(CONFIG, advantages=kind))
    mask = one.rollout.response_mask
    rewards = shape_rewards(one.scores, one.logprobs, one.ref_logprobs, mask, 0.3)
    whole = group_advantages(one.scores - 0.3 * one.kl, 3, kind)  # the response's KL
    torch.testing.assert_close(one.rewards, rewards)
    torch.testing.assert_close(one.advantages, whole[:, None] * mask, rtol=1e-4, atol=1e-5)
    assert one.values is None and one.returns is None
    assert one.kl.abs().max() > 0.1 and whole.abs().max() > 0.1
    assert not one.advantages.requires_grad


def test_with_the_penalty_in_the_loss_the_scores_alone_are_compared(tiny, tokenizer):
    config = replace(CONFIG, kl_in="loss", kl_kind="k3", advantages="grpo")
    one = collected(three_roles(tiny), tokenizer, config)
    expected = group_advantages(one.scores, 3, "grpo")[:, None] * one.rollout.response_mask
    assert torch.equal(one.advantages, expected)


def test_minibatches_may_split_groups(tiny, tokenizer):
    """Advantages are computed on the whole batch before."""
    found = [
        collected(three_roles(tiny), tokenizer, replace(CONFIG, minibatch_size=size)).advantages
        for size in (2, 6)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_groups_of_different_prompts_are_refused(tiny, tokenizer):
    roles, mixed = three_roles(tiny), [*ASKED[:4], PROMPTS[3], *ASKED[5:]]
    message = "prompts 3 and 4 are of one group of 3 and differ: 'how are you.', 'the cow'; give"
    with pytest.raises(ValueError, match=message):
        collect_experience(roles, tokenizer, mixed, CONFIG, 0.1, 0)
    with pytest.raises(ValueError, match="prompts 0 and 1 are of one group of 3 and differ"):
        collect_experience(roles, tokenizer, PROMPTS[:6], CONFIG, 0.1, 0)
    with pytest.raises(ValueError, match="4 prompts are no groups of 3"):
        collect_experience(roles, tokenizer, [*ASKED[:3], "the cow"], CONFIG, 0.1, 0)


# --- the loop ---


def test_three_roles_are_enough_and_each_prompt_comes_group_size_times(train):
    roles, stats = train()
    assert roles.names == ["policy", "reference", "reward"]
    for report in stats:
        first, second = report.experience.prompts[:3], report.experience.prompts[3:]
        assert len(set(first)) == len(set(second)) == 1 and first != second
        assert len(set(report.experience.rollout.texts[:3])) > 1
        assert report.value == {} and report.first_ratio == 1
        assert report.policy["grad_norm"] > 0
    assert stats[0].kl == 0


def test_a_critic_that_is_there_is_not_touched(tiny, train):
    roles = new_roles(tiny)
    before = weights(roles, roles.names)
    train(roles=roles)
    after = weights(roles, roles.names)
    changed = {key.split("/")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"policy"}
    alone, _ = train()
    assert same(weights(alone, ["policy"]), weights(roles, ["policy"]))


def test_with_a_critic_groups_are_only_asked(tiny, tokenizer, train):
    """Several responses to a prompt, and GAE."""
    config = replace(CONFIG, advantages="gae")
    _, stats = train(roles=new_roles(tiny), config=config)
    assert len(set(stats[0].experience.prompts[:3])) == 1
    assert stats[0].experience.returns is not None and stats[0].value["loss"] > 0
    with pytest.raises(ValueError, match="there is no role 'value'"):
        train(config=config)


SWITCHES = [
    {"mean_over": "responses"},
    {"mean_over": "length"},
    {"ratio_of": "mean", "mean_over": "responses"},
    {"ratio_of": "response", "mean_over": "responses", "clip_high": 0.5},
]


@pytest.mark.parametrize("switches", SWITCHES)
def test_every_switch_reaches_the_loss_and_the_penalty_in_it(tiny, train, switches):
    """Each step's loss of the first update, made again from its functions; two steps, so ρ ≠ 1."""
    config = replace(CONFIG, updates=1, epochs=1, minibatch_size=3, beta=0.5, advantages="grpo")
    config = replace(config, kl_in="loss", kl_kind="k3", max_grad_norm=1.0, **switches)
    _, (stats,) = train(config=config)
    one, roles, losses = stats.experience, three_roles(tiny), []
    adam = torch.optim.Adam(roles.parameters("policy").values(), lr=config.learning_rate)
    mask, averaging = one.rollout.response_mask, config.averaging
    for part in (slice(0, 3), slice(3, 6)):
        batch = one.rollout.input_ids[part], one.rollout.attention_mask[part], mask.shape[1]
        new = response_logprobs(roles.use("policy"), *batch)
        arguments = new, one.logprobs[part], one.advantages[part], mask[part]
        options = {k: v for k, v in switches.items() if k != "mean_over"}
        loss, _ = policy_loss(*arguments, **options, mean_over=averaging[0], length=averaging[1])
        padding = mask[part] == 0
        pair = (x.masked_fill(padding, 0) for x in (new, one.ref_logprobs[part]))
        loss = loss + 0.5 * average(kl_estimate(*pair, "k3"), mask[part], *averaging)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(roles.parameters("policy").values(), 1.0)
        adam.step()
        losses.append(loss.item())
    assert stats.policy["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5, abs=1e-7)
    assert averaging == (switches["mean_over"], 6 if switches["mean_over"] == "length" else None)


def test_the_same_run_twice_is_the_same_and_goes_on_when_stopped(
    tiny, train, tmp_path, monkeypatch
):
    roles, stats = train()
    interrupt(train, monkeypatch, tmp_path / "policy", update=2)
    on, rest = train(tmp_path / "policy")
    assert facts(rest) == facts(stats[2:])
    assert same(weights(on, ["policy"]), weights(roles, ["policy"]))


@pytest.mark.parametrize("kind", GROUPED)
def test_the_policy_learns_what_is_paid_for(train, kind):
    def pay(prompts, rollout):
        return rollout.finished.double() * 2 - 1

    config = replace(CONFIG, updates=8, batch_size=24, minibatch_size=12, learning_rate=0.005)
    config = replace(config, beta=0.0, eos_penalty=0.0, advantages=kind, group_size=4)
    _, stats = train(config=config, reward_function=pay)
    scores = [report.score for report in stats]
    assert scores[0] < 0.5 and sum(scores[-3:]) / 3 > scores[0] + 0.4, scores


# --- a program as the reward ---


def test_a_reward_function_takes_the_place_of_the_reward_model(tiny, tokenizer, train):
    roles = three_roles(tiny)
    roles._trainable.pop("reward")  # not even there
    seen = []

    def count(prompts, rollout):
        seen.append((prompts, rollout.texts))
        return [float(len(text)) for text in rollout.texts]

    _, stats = train(roles=roles, reward_function=count)
    for report, (prompts, texts) in zip(stats, seen, strict=True):
        one = report.experience
        assert prompts == one.prompts and texts == one.rollout.texts
        lengths = torch.tensor([float(len(text)) for text in texts])
        assert torch.equal(one.scores, lengths - (~one.rollout.finished).float())


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "returned None for 6 responses; return one number each"),
        ([1.0] * 5, TypeError, "returned 5 rewards for 6 responses"),
        (torch.ones(7), TypeError, "returned 7 rewards for 6 responses"),
        ([1.0, 2.0, NAN, 1.0, 1.0, 1.0], FloatingPointError, "returned nan for response 2"),
        ([1.0, None, 2.0, 1.0, 1.0, 1.0], FloatingPointError, "returned None for response 1"),
        (torch.full((6,), float("inf")), FloatingPointError, "returned inf for response 0"),
    ],
)
def test_a_reward_function_that_returns_no_rewards_is_named(
    tiny, train, tmp_path, returned, error, message
):
    roles = three_roles(tiny)
    before = weights(roles, ["policy"])
    with pytest.raises(error, match=f"the reward function {message}"):
        train(tmp_path / "policy", roles, reward_function=lambda *x: returned)
    assert same(weights(roles, ["policy"]), before)
    with pytest.raises(error, match=message):
        check_rewards(returned, 6)


def test_a_run_goes_on_with_its_own_kind_of_reward(train, tmp_path, monkeypatch):
    def ones(prompts, rollout):
        return [float(i) for i in range(len(prompts))]

    interrupt(train, monkeypatch, tmp_path / "policy", update=2, reward_function=ones)
    with pytest.raises(ValueError, match="reward_function: .*ones there, None here"):
        train(tmp_path / "policy")
    train(tmp_path / "policy", reward_function=ones)


# --- memory ---


def test_the_table_of_three_roles_is_that_of_four_without_the_critic():
    sizes = ModelSizes(shapes=((64, 64), (128, 64)), other=100, output=50, width=64)
    four, three = (memory_table(sizes, rank=2, critic=critic) for critic in (True, False))
    assert list(three) == [
        "3 full models",
        "LoRA on 3 bases",
        "LoRA on 1 base",
        "LoRA on 1 NF4 base",
    ]
    for with_critic, without in zip(four.values(), three.values(), strict=True):
        assert [row for row in with_critic if row.role != "value"] == without
        assert len(without) in (3, 4) and without[-1].role == "reward"


def test_before_the_first_step_the_average_over_responses_is_0(train):
    """The loss that users report as a fault: 0, with a gradient that is not."""
    config = replace(CONFIG, updates=1, epochs=1, minibatch_size=6, mean_over="responses")
    _, (stats,) = train(config=config)
    assert abs(stats.policy["loss"]) < 1e-6 < stats.policy["grad_norm"]


def test_the_names_are_those_of_the_losses():
    assert ppo.ADVANTAGES == ("gae", *GROUPED)
