"""DPO against TRL's own DPOTrainer, run beside it: the same base, SFT adapter, pairs and order.

TRL gets a PeftModel with the SFT adapter, which it copies to an adapter "ref", its reference. Where
its conventions differ, the tests bridge that:

- It rounds what is trained on a 4-bit base to bfloat16: the exact weights are put back.
- Its `ipo` divides log-probabilities by the number of their tokens: `dpo_loss` gets them so.
- Its `sigmoid` knows no smoothing, its `robust` subtracts where we add. Both are made of the loss
  of a pair and of the same pair with its sides swapped, and the smoothed loss is put together from
  what its `sigmoid` gives for the two.

Single batches are compared in float64, on the base without quantization, but TRL's output layer and
the norms of the model round to float32; a whole run on the base in NF4.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from test_roles import fill
from torch.utils.data import SequentialSampler
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer

from rlhf_helpers.base import load_base
from rlhf_helpers.dpo import (
    SIDES,
    DPOConfig,
    dpo_loss,
    implicit_rewards,
    sequence_logprobs,
    train_dpo,
)
from rlhf_helpers.presets import ASSETS
from rlhf_helpers.reward import encode_pairs, split_by_prompt
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import preference_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing`:FutureWarning")

CONFIG = DPOConfig(
    steps=24, batch_size=8, learning_rate=2e-3, warmup_steps=4, beta=0.2, eval_every=24
)
HELD_OUT, BATCH = 64, 6
# Absolute for what is below 1, relative to the largest entry above it.
TOLERANCE = 1e-6
GRADIENTS = 1e-4  # of the largest entry of each weight's


class InOrder(DPOTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def as_messages(row):
    names = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {column: [{"role": name, "content": row[column]}] for column, name in names.items()}


@pytest.fixture(scope="module")
def data(pocket, tokenizer):
    """Generated pairs with short answers and clear choices, to train on and held out."""

    def clear(row):
        return row["probability"] > 0.8 and max(len(row[side].split()) for side in SIDES) < 16

    pairs = preference_dataset(pocket).filter(clear).select_columns(["prompt", *SIDES])
    train, held_out = split_by_prompt(pairs, share=1 / 5)
    texts = train.select(range(CONFIG.steps * CONFIG.batch_size)), held_out.select(range(HELD_OUT))
    return SimpleNamespace(texts=texts, pairs=[encode_pairs(tokenizer, x, 24, 32) for x in texts])


def our_roles(base):
    """The reference is the SFT adapter, the policy a copy of it."""
    roles = Roles(base)
    roles.load("reference", ASSETS / "sft")
    roles.add("policy", copy_of="reference")
    return roles


def trl_trainer(base, tokenizer, data, weights, folder):
    """TRL's trainer, given the SFT adapter; afterwards its policy gets exactly these weights."""
    settings = TRLConfig(
        output_dir=str(folder),
        beta=CONFIG.beta,
        max_steps=CONFIG.steps,
        per_device_train_batch_size=CONFIG.batch_size,
        per_device_eval_batch_size=HELD_OUT,
        learning_rate=CONFIG.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=CONFIG.warmup_steps,
        weight_decay=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = InOrder(
            model=PeftModel.from_pretrained(base, str(ASSETS / "sft"), is_trainable=True),
            args=settings,
            train_dataset=data.texts[0].map(as_messages),
            eval_dataset=data.texts[1].map(as_messages),
            processing_class=tokenizer,
        )
    trainer.remove_callback(transformers.PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(trainer.model, weights)
    return trainer


def assert_reference(trainer, roles):
    theirs = get_peft_model_state_dict(trainer.model, adapter_name="ref")
    ours = roles.state("reference")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())


# --- single batches, in float64 ---


@pytest.fixture(scope="module")
def exact(pocket, tokenizer, data, tmp_path_factory):
    """Our roles and TRL's trainer; both policies have learnt the same, away from the reference."""
    roles = our_roles(load_base(pocket, quantized=False))
    fill(roles.model, "policy", 3)
    weights, folder = roles.state("policy"), tmp_path_factory.mktemp("trl")
    trainer = trl_trainer(load_base(pocket, quantized=False), tokenizer, data, weights, folder)
    assert_reference(trainer, roles)
    roles.model.double()
    trainer.model.double()
    return roles, trainer


def trl_loss(trainer, rows, kind="sigmoid", swapped=False, label_smoothing=0.0):
    """What TRL's own step computes: the loss and the metrics that it would log."""
    names = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"} if swapped else {}
    examples = [{names.get(k, k): v for k, v in row.items()} for row in rows]
    trainer.loss_types, trainer.label_smoothing = [kind], label_smoothing
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def our_logprobs(roles, tokenizer, pairs):
    """Of the policy with gradient, then of the reference; chosen ones first."""
    examples = [pair[side] for side in SIDES for pair in pairs]
    with torch.no_grad():
        ref = sequence_logprobs(roles.use("reference"), tokenizer, examples)
    return sequence_logprobs(roles.use("policy"), tokenizer, examples), ref


def our_loss(roles, tokenizer, pairs, per_token=False, **options):
    sides = [x.split(len(pairs)) for x in our_logprobs(roles, tokenizer, pairs)]
    if per_token:
        counts = [torch.tensor([len(pair[s]["response"]) for pair in pairs]) for s in SIDES]
        sides = [[a / b for a, b in zip(side, counts, strict=True)] for side in sides]
    return dpo_loss(*sides[0], *sides[1], CONFIG.beta, **options)


def error(ours, theirs):
    return (torch.as_tensor(ours).detach() - torch.as_tensor(theirs).detach()).abs().max().item()


def close(ours, theirs):
    assert error(ours, theirs) < TOLERANCE * max(1, abs(theirs))


def test_the_tokens_are_trls(exact, data):
    _, trainer = exact
    for theirs, ours in zip((trainer.train_dataset, trainer.eval_dataset), data.pairs, strict=True):
        assert len(theirs) == len(ours) > 0
        for row, pair in zip(theirs, ours, strict=True):
            assert row["prompt_ids"] == pair["chosen"]["prompt"] == pair["rejected"]["prompt"]
            assert [row[f"{side}_ids"] for side in SIDES] == [pair[s]["response"] for s in SIDES]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_and_gradients_are_trls(exact, tokenizer, data, kind):
    roles, trainer = exact
    theirs, _ = trl_loss(trainer, trainer.train_dataset.select(range(BATCH)), kind)
    ours = our_loss(roles, tokenizer, data.pairs[0][:BATCH], kind == "ipo", kind=kind)
    assert abs(theirs.item() - {"sigmoid": 0.6931, "ipo": 6.25}[kind]) > 0.01  # not at the start
    close(ours.item(), theirs.item())
    trainer.model.zero_grad()
    theirs.backward()
    own = roles.parameters("policy")
    gradients = torch.autograd.grad(ours, list(own.values()))
    named = dict(trainer.model.named_parameters())
    assert len(own) == 4 * 7 * 2
    for name, gradient in zip(own, gradients, strict=True):
        theirs = named[name.replace(".policy.", ".default.")].grad
        largest = theirs.abs().max().item()
        assert 0 < largest < 1
        assert error(gradient, theirs) < min(TOLERANCE, GRADIENTS * largest), name


def test_smoothing_is_made_of_trls_loss_on_both_orders(exact, tokenizer, data):
    roles, trainer = exact
    rows = trainer.train_dataset.select(range(BATCH))
    ordered, swapped = (trl_loss(trainer, rows, swapped=x)[0].item() for x in (False, True))
    assert abs(ordered - swapped) > 0.01
    smoothed = our_loss(roles, tokenizer, data.pairs[0][:BATCH], label_smoothing=0.2).item()
    close(smoothed, 0.8 * ordered + 0.2 * swapped)
    robust, _ = trl_loss(trainer, rows, "robust", label_smoothing=0.2)
    close((0.8 * ordered - 0.2 * swapped) / 0.6, robust.item())


def test_rewards_are_trls(exact, tokenizer, data):
    roles, trainer = exact
    sides = our_logprobs(roles, tokenizer, data.pairs[0][:BATCH])
    logprobs, ref = (x.detach().split(BATCH) for x in sides)
    for side, new, old in zip(SIDES, logprobs, ref, strict=True):
        ours = implicit_rewards(new, old, CONFIG.beta)
        assert ours.abs().max() > 0.1
        for i, reward in enumerate(ours):
            _, logged = trl_loss(trainer, trainer.train_dataset.select([i]))
            close(reward.item(), logged[f"rewards/{side}"])
            close(new[i].item(), logged[f"logps/{side}"])


# --- a whole run ---


def test_a_whole_run_ends_where_trls_ends(pocket, tokenizer, data, tmp_path):
    roles = our_roles(load_base(pocket))
    weights = roles.state("reference")
    trainer = trl_trainer(load_base(pocket), tokenizer, data, weights, tmp_path)
    assert_reference(trainer, roles)
    stats = list(train_dpo(roles, "policy", "reference", tokenizer, *data.pairs, CONFIG))
    start, end = stats[0].held_out, stats[-1].held_out
    trl_start = trainer.evaluate()
    trainer.train()
    trl_end = trainer.evaluate()
    assert_reference(trainer, roles)
    learnt = start["loss"] - end["loss"]
    assert learnt > 0.1  # or the comparison would say nothing
    assert trl_start["eval_loss"] == pytest.approx(start["loss"], rel=1e-5)
    assert trl_end["eval_loss"] == pytest.approx(end["loss"], rel=0.03)
    assert trl_start["eval_loss"] - trl_end["eval_loss"] == pytest.approx(learnt, rel=0.03)
    assert trl_end["eval_rewards/margins"] == pytest.approx(end["margin"], rel=0.03)
    assert trl_end["eval_rewards/accuracies"] == pytest.approx(end["accuracy"], abs=0.02)
    for side in SIDES:
        ours = CONFIG.beta * end[f"{side}_log_ratio"]
        assert trl_end[f"eval_rewards/{side}"] == pytest.approx(ours, rel=0.03)
