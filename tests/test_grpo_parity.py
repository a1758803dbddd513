"""Advantages and loss against TRL's GRPOTrainer and RLOOTrainer, their code on random input.

Both trainers are built on the pocket model; what they would ask of models is then given to them:
log-probabilities, rewards and completions, all random and in float64. What runs is TRL's code from
the rewards to the advantages (`_generate_and_score_completions`) and from the log-probabilities to
the loss (`_compute_loss`). Where its conventions differ, the tests bridge that:

- It adds its KL, always k3, to the loss of each token before the average; we add the average.
  Its default multiplies that KL with the ratio (`use_bias_correction_kl`); here this is off, but in
  one test, which does the same to ours.
- `dapo` divides by the tokens of *all* minibatches that one generation is cut into: that is our
  constant length, with the mean length of the whole batch. Of a single minibatch it is our mean
  over tokens, as `bnpo` is.
- RLOO's ratio is that of whole responses, its average one over responses; its KL is k1, summed, in
  the reward.
"""

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_helpers.base import load_base
from rlhf_helpers.kl import kl_estimate
from rlhf_helpers.losses import average, group_advantages, policy_loss, shape_rewards
from rlhf_helpers.presets import ASSETS

TOLERANCE = 1e-6
SIZE, GROUPS, WIDTH, LONGEST = 4, 3, 9, 16
LENGTHS = (3, 9, 1, 5, 2, 2, 8, 4, 7, 1, 6, 9)
CLIPS = (0.2, 0.28)


def trainer_of(kind, config, pocket, tokenizer, folder):
    settings = config(
        output_dir=str(folder),
        num_generations=SIZE,
        per_device_train_batch_size=SIZE * GROUPS,
        max_completion_length=LONGEST,
        beta=0.1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_base(pocket, quantized=False)
        return kind(
            model=PeftModel.from_pretrained(base, str(ASSETS / "sft"), is_trainable=True),
            reward_funcs=lambda prompts, **columns: [0.0] * len(prompts),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 12),
            processing_class=tokenizer,
        )


@pytest.fixture(scope="module")
def grpo(pocket, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    trainer = trainer_of(GRPOTrainer, GRPOConfig, pocket, tokenizer, folder)
    trainer.args.use_bias_correction_kl = False
    return trainer


@pytest.fixture(scope="module")
def rloo(pocket, tokenizer, tmp_path_factory):
    return trainer_of(RLOOTrainer, RLOOConfig, pocket, tokenizer, tmp_path_factory.mktemp("rloo"))


def drawn(seed):
    """Random numbers of one batch: three groups of four responses, one of them without variance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    old = -normal(len(LENGTHS), WIDTH).abs() - 0.5
    scores = 2 * normal(len(LENGTHS)) + 1
    scores[SIZE : 2 * SIZE] = 0.7
    return SimpleNamespace(
        mask=mask,
        old=old,
        new=(old + 0.25 * normal(*mask.shape)).clamp(max=-1e-3),
        ref=(old + 0.4 * normal(*mask.shape)).clamp(max=-1e-3),
        scores=scores,
    )


def close(ours, theirs):
    error = (ours.detach() - theirs.detach()).abs().max().item()
    assert error < TOLERANCE * max(1, theirs.abs().max().item())


# --- advantages ---


def trl_advantages(trainer, batch, tokenizer, monkeypatch):
    """What its own step makes of these rewards, and of these log-probabilities."""
    word, end = tokenizer("cow")["input_ids"][0], tokenizer.eos_token_id
    completions = [[word] * (n - 1) + [end] for n in LENGTHS]
    texts = ["cow"] * len(LENGTHS)
    made = ([[word]] * len(LENGTHS), completions)
    if isinstance(trainer, GRPOTrainer):
        made = (*made, None, texts, None, {}, None, [])
    else:
        made = (*made, texts)
    asked = []

    def logprobs(model, *arguments, **options):  # RLOO asks the policy, then the reference
        asked.append(model)
        return (batch.old if len(asked) == 1 else batch.ref), None, None

    monkeypatch.setattr(trainer, "_generate", lambda prompts: made)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *x: batch.scores[:, None].clone())
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", logprobs)
    monkeypatch.setattr(trainer, "reward_weights", torch.ones(1, dtype=torch.float64))
    trainer.model.train()
    rows = [{"prompt": "a"} for _ in LENGTHS]
    advantages = trainer._generate_and_score_completions(rows)["advantages"]
    assert advantages.dtype == torch.float64
    return advantages


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "scale"), [("grpo", "group"), ("centred", "none")])
def test_grpos_advantages_are_trls(grpo, tokenizer, monkeypatch, kind, scale, seed):
    batch = drawn(seed)
    monkeypatch.setattr(grpo, "scale_rewards", scale)
    theirs = trl_advantages(grpo, batch, tokenizer, monkeypatch)
    close(group_advantages(batch.scores, SIZE, kind), theirs)
    assert theirs.abs().max() > 0.5 and theirs[SIZE : 2 * SIZE].abs().max() < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloos_advantages_are_trls(rloo, tokenizer, monkeypatch, beta, seed):
    batch = drawn(seed)
    monkeypatch.setattr(rloo, "beta", beta)
    theirs = trl_advantages(rloo, batch, tokenizer, monkeypatch)
    rewards = shape_rewards(batch.scores, batch.old, batch.ref, batch.mask, beta)
    close(group_advantages(rewards.sum(-1), SIZE, "rloo"), theirs)
    without = group_advantages(batch.scores, SIZE, "rloo")
    assert ((without - theirs).abs().max() > 0.01) == (beta > 0)


# --- losses ---


def trl_loss(trainer, batch, advantages, rows, monkeypatch, **settings):
    """Its own loss of some rows, and the gradient with respect to the new log-probabilities."""
    new = batch.new[rows].clone().requires_grad_()
    zeros = torch.zeros(len(new), 1, dtype=torch.long)
    for name, value in settings.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *arguments, **options: (new, torch.zeros_like(new), None),
    )
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 1, raising=False)
    mask = batch.mask[rows]
    inputs = {
        "prompt_ids": zeros,
        "prompt_mask": zeros + 1,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages[rows],
        "old_per_token_logps": batch.old[rows],
        "old_logps": (batch.old * batch.mask).sum(-1)[rows],
        "ref_per_token_logps": batch.ref[rows],
        "num_items_in_batch": batch.mask.sum(),
    }
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, torch.autograd.grad(loss, new)[0]


def our_loss(batch, advantages, rows, beta=0.0, mean_over="tokens", length=None, **switches):
    new = batch.new[rows].clone().requires_grad_()
    mask, averaging = batch.mask[rows], {"mean_over": mean_over, "length": length}
    whole = advantages[rows, None].expand(mask.shape)
    loss, stats = policy_loss(new, batch.old[rows], whole, mask, **switches, **averaging)
    if beta:
        loss = loss + beta * average(
            kl_estimate(new, batch.ref[rows], "k3"), mask, mean_over, length
        )
    return loss, torch.autograd.grad(loss, new)[0], stats


def same(ours, theirs):
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])
    assert theirs[0].dtype == torch.float64
    assert theirs[1].abs().max() > 1e-3


LOSS_TYPES = {
    "grpo": {"mean_over": "responses"},
    "bnpo": {"mean_over": "tokens"},
    "dr_grpo": {"mean_over": "length", "length": LONGEST},
    "dapo": {"mean_over": "tokens"},
}
ALL = slice(None)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("clips", [(0.2, 0.2), CLIPS])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpos_loss_and_gradient_are_trls(grpo, monkeypatch, loss_type, level, clips, beta, seed):
    batch = drawn(seed)
    advantages = group_advantages(batch.scores, SIZE, "grpo")
    settings = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_low": clips[0],
        "epsilon_high": clips[1],
        "beta": beta,
    }
    monkeypatch.setattr(grpo.args, "steps_per_generation", 1)
    theirs = trl_loss(grpo, batch, advantages, ALL, monkeypatch, **settings)
    ratio_of = {"token": "token", "sequence": "mean"}[level]
    switches = {"clip": clips[0], "clip_high": clips[1], "ratio_of": ratio_of}
    ours = our_loss(batch, advantages, ALL, beta, **switches, **LOSS_TYPES[loss_type])
    same(ours, theirs)
    assert ours[2]["clip_fraction"] > 0.05 or level == "sequence"


def test_trls_default_multiplies_the_kl_with_the_ratio(grpo, monkeypatch):
    """`use_bias_correction_kl`: another gradient, even where the ratio is 1."""
    batch = drawn(0)
    advantages = group_advantages(batch.scores, SIZE, "grpo")
    monkeypatch.setattr(grpo.args, "use_bias_correction_kl", True)
    settings = {"loss_type": "bnpo", "importance_sampling_level": "token", "beta": 0.2}
    settings |= {"epsilon_low": 0.2, "epsilon_high": 0.2}
    theirs = trl_loss(grpo, batch, advantages, ALL, monkeypatch, **settings)
    new = batch.new.clone().requires_grad_()
    loss, _ = policy_loss(new, batch.old, advantages[:, None].expand(new.shape), batch.mask)
    loss = loss + 0.2 * average(
        kl_estimate(new, batch.ref, "k3") * (new - batch.old).exp(), batch.mask
    )
    same((loss, torch.autograd.grad(loss, new)[0]), theirs)


def test_the_switches_make_a_difference():
    """Else one setting could pass for another: all losses of one batch differ."""
    batch = drawn(0)
    advantages = group_advantages(batch.scores, SIZE, "grpo")
    settings = [
        {"ratio_of": ratio_of, "clip_high": high} | LOSS_TYPES[x]
        for x in ("grpo", "bnpo", "dr_grpo")
        for ratio_of, high in (("token", 0.2), ("token", 0.28), ("mean", 0.2), ("response", 0.2))
    ]
    found = sorted(our_loss(batch, advantages, ALL, **switches)[0].item() for switches in settings)
    assert min(b - a for a, b in itertools.pairwise(found)) > 100 * TOLERANCE


@pytest.mark.parametrize("seed", range(2))
def test_dapo_of_several_minibatches_is_a_constant_length(grpo, monkeypatch, seed):
    batch = drawn(seed)
    advantages = group_advantages(batch.scores, SIZE, "grpo")
    monkeypatch.setattr(grpo.args, "steps_per_generation", 3)
    settings = {"loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.2}
    settings |= {"epsilon_low": CLIPS[0], "epsilon_high": CLIPS[1]}
    mean_length = batch.mask.sum().item() / len(LENGTHS)
    for start in (0, 4, 8):
        rows = slice(start, start + 4)
        theirs = trl_loss(grpo, batch, advantages, rows, monkeypatch, **settings)
        ours = our_loss(
            batch, advantages, rows, 0.2, "length", mean_length, clip=CLIPS[0], clip_high=CLIPS[1]
        )
        close(ours[0], theirs[0])
        close(ours[1], theirs[1])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("clips", [(0.2, 0.2), CLIPS])
def test_rloos_loss_and_gradient_are_trls(rloo, monkeypatch, clips, seed):
    batch = drawn(seed)
    advantages = group_advantages(batch.scores, SIZE, "rloo")
    settings = {"epsilon_low": clips[0], "epsilon_high": clips[1]}
    theirs = trl_loss(rloo, batch, advantages, ALL, monkeypatch, **settings)
    switches = {"clip": clips[0], "clip_high": clips[1], "ratio_of": "response"}
    same(our_loss(batch, advantages, ALL, mean_over="responses", **switches), theirs)
