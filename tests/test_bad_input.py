"""Bad input, row by row: what is given, which exception comes, and which words it must say.

A message names what was given and says how to mend it. To see all messages:

    HF_HUB_OFFLINE=1 python tests/test_bad_input.py
"""

import copy
import json
import os
import random
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict
from torch import inf, nan, ones, tensor, zeros
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_helpers
from rlhf_helpers import checks, clicks_panel, notebook, plots
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter, newest_readable, whole_folder
from rlhf_helpers.clicks import Clicks, simulated
from rlhf_helpers.clicks_file import RowFile
from rlhf_helpers.clicks_questions import usable_pairs
from rlhf_helpers.clinic import kl_sign, plant
from rlhf_helpers.diversity import distinct_n, diversity, mean_length, self_bleu, unique_share
from rlhf_helpers.dpo import (
    DPOConfig,
    dpo_loss,
    implicit_rewards,
    pair_logprobs,
    sequence_logprobs,
    train_dpo,
)
from rlhf_helpers.examine import TRL_GROUPS, TRL_PPO, examine, from_trl, log_row
from rlhf_helpers.kl import AdaptiveKL, estimator_moments, exact_kl, kl_estimate
from rlhf_helpers.logprobs import response_logprobs, token_entropy, token_logprobs
from rlhf_helpers.losses import (
    average,
    equal_groups,
    gae,
    group_advantages,
    policy_loss,
    shape_rewards,
    value_loss,
    whiten,
)
from rlhf_helpers.memory import (
    ModelSizes,
    activation_bytes,
    cache_bytes,
    logits_bytes,
    lora_parameters,
    measured_bytes,
    memory_table,
    model_sizes,
    nf4_bytes,
    parallel_table,
)
from rlhf_helpers.parallel import (
    Stage,
    data_parallel,
    mean_over_ranks,
    sampled_as,
    shard,
    share_of,
    whiten_over_ranks,
)
from rlhf_helpers.pocket import corpus, exam, rubric, world
from rlhf_helpers.pocket.annotator import Annotator, ceiling
from rlhf_helpers.pocket.preferences import collect_preferences
from rlhf_helpers.ppo import PPOConfig, collect_experience, train_ppo
from rlhf_helpers.preflight import preflight
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.ranks import all_max, all_sum, join, spawn, split_logprobs
from rlhf_helpers.reward import (
    RewardConfig,
    calibration,
    encode_pairs,
    last_token_index,
    normalise,
    pair_accuracy,
    pairwise_loss,
    score_responses,
    score_tokens,
    split_by_prompt,
    train_reward_model,
)
from rlhf_helpers.roles import CONFIG, HEAD, WEIGHTS, Roles
from rlhf_helpers.rollout import Rollout, sample_responses
from rlhf_helpers.sft import SFTConfig, held_out_loss, mask_prompt, sft_loss, train_sft
from rlhf_helpers.sources import (
    Judge,
    Rubric,
    load_gold,
    preference_dataset,
    prompt_dataset,
    sft_dataset,
)
from rlhf_helpers.stats import share_with_interval
from rlhf_helpers.text import encode_examples, encode_prompts, load_tokenizer, pad_examples
from rlhf_helpers.trl_rewards import export_reward_model, keep_float32, reward_function

CONTEXT = 64
DUCK, COW = "what does the duck say?", "what does the cow say?"
PAIR = {"prompt": [DUCK], "chosen": ["quack."], "rejected": ["moo."]}
LOGITS, TOKENS = zeros(2, 3, 5), zeros(2, 3).long()
LOGPROBS, MASK = zeros(2, 3) - 1, ones(2, 3)
IDS, REAL = ones(1, 6).long() * 5, ones(1, 6).long()
SFT = SFTConfig(steps=3, batch_size=2, warmup_steps=1, save_every=1)
PPO = PPOConfig(updates=2, batch_size=2, minibatch_size=2, response_length=4)
GROUPS = replace(PPO, advantages="rloo", group_size=2)
TALK = [(f"what is {n} plus 1?", f"{n + 1}.", "no idea.") for n in range(5)]


@dataclass
class World:
    """What the rows share: a tiny base, its tokenizer, roles on it, and a folder to write to."""

    folder: Path
    base: Path

    @cached_property
    def tokenizer(self):
        return load_tokenizer(load_preset("pocket"))

    @cached_property
    def model(self):
        return load_base(load_preset("pocket", model=str(self.base)), quantized=False)

    @property
    def path(self) -> Path:
        return self.folder / "saved"

    def preset(self, **changes):
        return load_preset("pocket", **{"model": str(self.base), "runs": self.folder} | changes)

    def empty_roles(self, **options):
        return Roles(load_base(self.preset()), **{"rank": 2, "alpha": 4} | options)

    def roles(self):
        """All that PPO needs; the policy has no head, the reference is frozen."""
        roles = self.empty_roles()
        for name, trains in (("policy", 1), ("reference", 0), ("value", 1), ("reward", 0)):
            roles.add(name, trainable=bool(trains))
        for name in ("value", "reward"):
            roles.add_head(name)
        normalise(roles, "reward", tensor([0.0, 1.0]))
        return roles

    def tokenizer_with(self, **changes):
        tokenizer = copy.deepcopy(self.tokenizer)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    def examples(self):
        return [{"prompt": [5], "response": [6, self.tokenizer.eos_token_id]}] * 3

    def pairs(self):
        worse = {"prompt": [5], "response": [7, self.tokenizer.eos_token_id]}
        return [{"chosen": example, "rejected": worse} for example in self.examples()]

    def sft(self, role="policy", **changes):
        given = {"examples": self.examples(), "held_out": self.examples(), "config": SFT} | changes
        return list(train_sft(self.roles(), role, self.tokenizer, **given))

    def reward(self, role="value", **changes):
        config = RewardConfig(steps=3, batch_size=2, warmup_steps=1)
        given = {"pairs": self.pairs(), "held_out": self.pairs(), "config": config} | changes
        return list(train_reward_model(self.roles(), role, self.tokenizer, **given))

    def dpo(self, role="policy", reference="reference", **changes):
        config = DPOConfig(steps=3, batch_size=2, warmup_steps=1)
        given = {"pairs": self.pairs(), "held_out": self.pairs(), "config": config}
        given |= {"tokenizer": self.tokenizer, "any_reference": True} | changes
        return list(train_dpo(self.roles(), role, reference, **given))

    def preflight(self, **changes):
        given = {"roles": self.roles(), "tokenizer": self.tokenizer, "prompts": [DUCK, COW]}
        return preflight(**given | {"config": PPO} | changes)

    def trained_by_trl(self):
        """A policy whose adapter has the name that TRL gives it."""
        roles = self.empty_roles()
        roles.add("default")
        return roles.model

    def scorer(self, **changes):
        """A reward model as TRL calls it."""
        given = {"roles": self.roles(), "tokenizer": self.tokenizer, "policy": self.model}
        with warnings.catch_warnings(action="ignore"):  # of a policy that begins as the bare base
            return reward_function(**given | changes)

    def clicks(self, pairs=TALK, name="clicks.jsonl", **changes):
        return Clicks(pairs, **{"path": self.folder / name, "repeats": 2} | changes)

    def ppo(self, roles=None, **changes):
        given = {"prompts": [DUCK, COW], "config": PPO} | changes
        return list(train_ppo(roles or self.roles(), self.tokenizer, **given))

    def sample(self, **changes):
        given = {"model": self.model, "tokenizer": self.tokenizer, "prompts": [DUCK]} | changes
        return sample_responses(**{"response_length": 4} | given)

    def pairs_of(self, **columns):
        return encode_pairs(self.tokenizer, Dataset.from_dict(PAIR | columns), 24, 32)

    def read(self, name="pairs.jsonl", split="train"):
        return preference_dataset(self.preset(), split, source=str(self.folder / name))


# What lies in the folder before a row's call.


def text(name: str, content: str | bytes) -> Callable[[World], None]:
    def write(w: World) -> None:
        (w.folder / name).parent.mkdir(exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (w.folder / name).write_bytes(data)

    return write


def cut(name: str) -> Callable[[World], None]:
    """A saved role of which one file lost its end; "" cuts none."""

    def write(w: World) -> None:
        w.roles().save("value", w.path)
        if name:
            data = (w.path / name).read_bytes()
            (w.path / name).write_bytes(data[:100])

    return write


def lost(name: str) -> Callable[[World], None]:
    def write(w: World) -> None:
        w.roles().save("value", w.path)
        (w.path / name).unlink()

    return write


def of_another_base(w: World) -> None:
    roles = w.roles()
    with torch.no_grad():
        roles.base.get_input_embeddings().weight += 1
    roles.save("policy", w.path)


def clicked(change: Callable[[str], str] = str) -> Callable[[World], None]:
    """A session with one choice, its file then changed."""

    def write(w: World) -> None:
        w.clicks().record("first")
        path = w.folder / "clicks.jsonl"
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return write


def damaged_settings(content: str) -> Callable[[World], None]:
    def write(w: World) -> None:
        cut("")(w)
        (w.path / CONFIG).write_text(content, encoding="utf-8")

    return write


def assets(change: Callable[[Path], object]) -> Callable[[World], None]:
    """A copy of the shipped base with a change."""

    def write(w: World) -> None:
        shutil.copytree(ASSETS / "base", w.path)
        change(w.path)

    return write


def pad_with_eos(path: Path) -> None:
    settings = (path / "tokenizer_config.json").read_text(encoding="utf-8")
    settings = settings.replace('"<|pad|>"', '"<|eos|>"')
    (path / "tokenizer_config.json").write_text(settings, encoding="utf-8")


def stopped(kind: str, damage: str = "") -> Callable[[World], None]:
    """A run that was stopped after an update, one of its files then truncated."""

    def write(w: World) -> None:
        start = {"sft": train_sft, "ppo": train_ppo}[kind]
        given = ("policy", w.tokenizer, w.examples(), w.examples(), SFT)
        given = given if kind == "sft" else (w.tokenizer, [DUCK, COW], PPO)
        run = start(w.roles(), *given, folder=w.path)
        next(run)
        next(run) if kind == "sft" else None
        run.close()
        for file in (w.folder / "saved.unfinished").rglob(damage or "nothing"):
            file.write_bytes(b"cut off")

    return write


@dataclass(frozen=True)
class Row:
    name: str
    call: Callable[[World], object]
    given: str | tuple[str, ...]  # words that name what was given; {folder} is the row's folder
    mend: str | tuple[str, ...]
    before: Callable[[World], None] | None = None
    error: type[Exception] = ValueError

    def words(self, w: World) -> list[str]:
        parts = (p if isinstance(p, tuple) else (p,) for p in (self.given, self.mend))
        return [word.replace("{folder}", str(w.folder)) for part in parts for word in part]


def number_row(name: str, make: Callable[..., object], setting: str, bad: object, mend: str) -> Row:
    """A setting of a configuration that is no such number."""
    call = lambda w: make(**{setting: bad})  # noqa: E731
    return Row(name, call, f"{setting} is {bad!r}", mend)


def rewards_of(**changes):
    given = {"scores": zeros(2), "logprobs": LOGPROBS, "ref_logprobs": LOGPROBS}
    return shape_rewards(**given | {"response_mask": MASK, "beta": 0.1} | changes)


def advantages_of(**changes):
    return gae(**{"rewards": zeros(2, 3), "values": zeros(2, 3), "response_mask": MASK} | changes)


def policy_of(**changes):
    given = {"logprobs": LOGPROBS, "old_logprobs": LOGPROBS, "advantages": zeros(2, 3)}
    return policy_loss(**given | {"response_mask": MASK} | changes)


def critic_of(**changes):
    given = {"values": LOGPROBS, "old_values": LOGPROBS, "returns": zeros(2, 3)}
    return value_loss(**given | {"response_mask": MASK} | changes)


def adaptive(**changes):
    return AdaptiveKL(**{"beta": 0.1, "target": 3.0} | changes)


def without_cuda(preset):
    with patch("torch.cuda.is_available", return_value=False):
        return load_base(preset)


def with_environment(**variables):
    with patch.dict(os.environ, variables):
        return load_preset("pocket" if "RLHF_PRESET" in variables else "single_gpu")


def switch_before_backward(roles):
    loss = roles.use("policy")(input_ids=IDS).logits.sum()
    roles.use("value")
    loss.backward()


def dpo_of(**changes):
    sides = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    return dpo_loss(**dict.fromkeys(sides, zeros(2) - 1) | {"beta": 0.1} | changes)


def alone(act):
    """What a process does in a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return act()
    finally:
        dist.destroy_process_group()


def joined(**variables):
    with patch.dict(os.environ, variables):
        join().__enter__()


def method_of_a_class(w):
    return spawn(w.tokenizer.decode, 1, 9)


def rows_of(count=4, **columns):
    """A log of PPO in which only the KL is written down."""
    return [{"update": number, "kl": 0.0} | columns for number in range(1, count + 1)]


def second_panel(w):
    """Two panels on one file, of which the other clicks first."""
    clicks, path = w.clicks(), w.folder / "clicks.jsonl"
    known = path.read_bytes()
    path.write_bytes(known + b"\n")
    try:
        clicks.record("first")
    finally:
        path.write_bytes(known)


def within(w, act):
    """An act of a process that works in the row's folder."""
    with chdir(w.folder):
        return act()


def write_into(folder):
    with whole_folder(folder) as new:
        (new / "a").write_text("a")


def damaged(path):
    raise ValueError(f"{path.name} is damaged")


def judged(prompts):
    rollout = Rollout(IDS, REAL, REAL[:, 3:], ["quack."], tensor([True]))
    return Rubric()(prompts, rollout)


# The table: what is wrong, the call, what the message names, how it says to mend it.
# fmt: off
LOGPROB_ROWS = (
    Row("tokens of another shape than the logits",
        lambda w: token_logprobs(LOGITS, zeros(2, 4).long()),
        ("tokens has shape [2, 4]", "logits [2, 3, 5]"), "must be [...] and [..., V]"),
    Row("a temperature of 0 to score with",
        lambda w: token_logprobs(LOGITS, TOKENS, 0), "temperature is 0", "finite number above 0"),
    Row("a negative temperature for an entropy",
        lambda w: token_entropy(LOGITS, -1.0), "temperature is -1.0", "finite number above 0"),
    Row("a temperature of NaN",
        lambda w: response_logprobs(w.model, IDS, REAL, 3, nan), "temperature is nan",
        "finite number above 0"),
    Row("a temperature in words",
        lambda w: token_logprobs(LOGITS, TOKENS, "hot"), "temperature is 'hot'",
        "finite number above 0"),
    Row("integers for logits",
        lambda w: token_logprobs(LOGITS.long(), TOKENS), ("logits", "torch.int64"),
        "convert with .float()", error=TypeError),
    Row("integers for the logits of an entropy",
        lambda w: token_entropy(LOGITS.long()), ("logits", "torch.int64"), "convert with .float()",
        error=TypeError),
    Row("a list for logits",
        lambda w: token_logprobs([[0.5, 0.5]], tensor([0])), ("logits", "list"),
        "convert with torch.tensor", error=TypeError),
    Row("logits of no token",
        lambda w: token_entropy(zeros(0, 5)), "logits has shape [0, 5]", "must be [..., V]"),
    Row("logits of NaN",
        lambda w: token_logprobs(LOGITS * nan, TOKENS), ("logits at position [0, 0]", "NaN"),
        "Look for an overflow"),
    Row("logits that are all impossible",
        lambda w: token_entropy(LOGITS - inf), ("logits at position [0, 0]", "all -inf"),
        "weights that diverged"),
    Row("tokens as floats",
        lambda w: token_logprobs(LOGITS, TOKENS.float()), ("tokens", "torch.float32"),
        "convert with .long()", error=TypeError),
    Row("a token beyond the vocabulary",
        lambda w: token_logprobs(LOGITS, TOKENS + 5), ("tokens is 5 at [0, 0]", "from 0 to 4"),
        "Use the model's own tokenizer"),
    Row("labels of -100 where tokens belong",
        lambda w: token_logprobs(LOGITS, TOKENS - 100), "tokens is -100 at [0, 0]",
        "put the pad id and mask the result"),
    Row("a response of no token",
        lambda w: response_logprobs(w.model, IDS, REAL, 0), "response_length is 0",
        "at least 1"),
    Row("a response as long as the whole sequence",
        lambda w: response_logprobs(w.model, IDS, REAL, 6), "response_length is 6",
        "leave a prompt, so at most 5"),
    Row("half a token of response",
        lambda w: response_logprobs(w.model, IDS, REAL, 2.5), "response_length is 2.5",
        "a whole number"),
    Row("a single sequence without its batch",
        lambda w: response_logprobs(w.model, IDS[0], REAL[0], 2), "input_ids has shape [6]",
        "must be [B, L]"),
    Row("a prompt padded on the right",
        lambda w: response_logprobs(w.model, IDS, tensor([[1, 1, 0, 1, 1, 1]]), 3),
        "attention_mask column 2 is 0 at [0]", "Pad prompts on the left"),
    Row("a sequence of padding alone",
        lambda w: response_logprobs(w.model, IDS, REAL * 0, 3), "attention_mask row 0 is all zeros",
        "drop this empty sequence"),
    Row("an attention mask of twos",
        lambda w: response_logprobs(w.model, IDS, REAL * 2, 3), "attention_mask is 2 at [0, 0]",
        "only 0 and 1 may stand there"),
    Row("a sequence longer than the context",
        lambda w: response_logprobs(w.model, ones(1, 70).long(), ones(1, 70).long(), 3),
        ("in a row is 70 at [0]", f"is {CONTEXT} tokens"), "shorten the prompt or the response"),
    Row("an array for logits",
        lambda w: token_logprobs(LOGITS.numpy(), TOKENS), ("logits", "not ndarray"),
        "convert with torch.tensor", error=TypeError),
    Row("no attention mask",
        lambda w: response_logprobs(w.model, IDS, None, 3), ("attention_mask", "not None"),
        "must be a tensor", error=TypeError),
    Row("a model's name for a model",
        lambda w: response_logprobs("pocket", IDS, REAL, 3), "model is 'pocket'",
        "give a model, as load_base(preset)", error=TypeError),
)

KL_ROWS = (
    Row("two vocabularies to compare",
        lambda w: exact_kl(zeros(2, 5), zeros(2, 4)),
        ("logits_q has shape [2, 4]", "logits_p [2, 5]"), "must be equal"),
    Row("a reference with a logit of NaN",
        lambda w: exact_kl(zeros(2, 5), zeros(2, 5) * nan), "logits_q at position [0]",
        "Look for an overflow"),
    Row("log-probabilities of two lengths",
        lambda w: kl_estimate(LOGPROBS, LOGPROBS[:1]), ("ref_logprobs has shape [1, 3]", "[2, 3]"),
        "must be equal"),
    Row("an estimate that nobody has",
        lambda w: kl_estimate(LOGPROBS, LOGPROBS, "k4"), "kind is 'k4'", "one of 'k1', 'k2', 'k3'"),
    Row("probabilities for log-probabilities",
        lambda w: kl_estimate(LOGPROBS.exp(), LOGPROBS), ("logprobs is 0.3679", "never above 0"),
        "Pass log-probabilities"),
    Row("a log-probability of NaN under the reference",
        lambda w: kl_estimate(LOGPROBS, LOGPROBS * nan), "ref_logprobs is nan at [0, 0]",
        "look at the logits"),
    Row("a sampled token of probability 0",
        lambda w: kl_estimate(LOGPROBS - inf, LOGPROBS), "logprobs is -inf at [0, 0]",
        "Give its own log-probabilities first"),
    Row("a reference that would be trained",
        lambda w: kl_estimate(LOGPROBS, LOGPROBS.clone().requires_grad_()),
        "ref_logprobs requires a gradient", "torch.no_grad()"),
    Row("lists for log-probabilities",
        lambda w: kl_estimate([-1.0], [-1.0]), "logprobs must be a tensor, not list",
        "torch.tensor", error=TypeError),
    Row("logits where probabilities must sum to 1",
        lambda w: estimator_moments(zeros(2, 5), zeros(2, 5)), "of logprobs is 5 at [0]",
        "Take torch.log_softmax"),
    number_row("a controller that begins at 0", adaptive, "beta", 0, "above 0"),
    number_row("a controller with a negative target", adaptive, "target", -1, "above 0"),
    number_row("a controller without a target", adaptive, "target", None, "a finite number"),
    number_row("a controller with a gain of NaN", adaptive, "gain", nan, "a finite number"),
    number_row("a gain that turns the price negative", adaptive, "gain", 5, "give less than 5"),
    Row("a KL of NaN for the controller",
        lambda w: adaptive().update(nan), "kl is nan", "look for an update that diverged"),
    Row("a KL in words for the controller",
        lambda w: adaptive().update("3"), "kl is 3", "must be finite"),
    Row("several KLs for the controller",
        lambda w: adaptive().update(zeros(2)), "kl is tensor([0., 0.])", "must be finite"),
    Row("moments of an estimate that nobody has",
        lambda w: estimator_moments(zeros(1, 1), zeros(1, 1), "k0"), "kind is 'k0'",
        "one of 'k1', 'k2', 'k3'"),
    Row("a mask in place of the kind of estimate",
        lambda w: kl_estimate(LOGPROBS, LOGPROBS, MASK), "kind is tensor([[1., 1., 1.]",
        "one of 'k1', 'k2', 'k3'"),
    Row("whole numbers for the logits of a KL",
        lambda w: exact_kl(LOGITS.long(), LOGITS), ("logits_p", "torch.int64"),
        "convert with .float()", error=TypeError),
)

PPO_ROWS = (
    Row("more scores than responses",
        lambda w: rewards_of(scores=zeros(3)), ("scores [3]", "[2, 3]"),
        "must be [B, T] and [B]"),
    Row("scores as a list",
        lambda w: rewards_of(scores=[0.0, 1.0]), "scores must be a tensor, not list",
        "torch.tensor", error=TypeError),
    Row("scores as integers",
        lambda w: rewards_of(scores=tensor([0, 1])), ("scores", "torch.int64"),
        "convert with .float()", error=TypeError),
    Row("a score that is infinite",
        lambda w: rewards_of(scores=tensor([0.0, inf])), "scores is inf at [1]: it must be finite",
        "look for weights that diverged"),
    Row("a negative price of a nat",
        lambda w: rewards_of(beta=-1), "beta is -1", "a finite number, 0 or above"),
    Row("a price of a nat as text",
        lambda w: rewards_of(beta="0.1"), "beta is '0.1'", "a finite number"),
    Row("an unknown penalty",
        lambda w: rewards_of(kind="kl"), "kind is 'kl'", "one of 'k1', 'k2', 'k3'"),
    Row("a response mask with a hole",
        lambda w: rewards_of(response_mask=tensor([[1, 0, 1], [1, 1, 1]])),
        "response_mask is 1 at [0, 2]: a 0 stands before", "1 up to and including EOS"),
    Row("a response without a token",
        lambda w: rewards_of(response_mask=tensor([[1, 1, 1], [0, 0, 0]])),
        "response_mask row 1 is all zeros", "drop this"),
    Row("a response mask of twos",
        lambda w: advantages_of(response_mask=MASK * 2), "response_mask is 2 at [0, 0]",
        "only 0 and 1"),
    Row("values for one token too many",
        lambda w: advantages_of(values=zeros(2, 4)),
        ("values has shape [2, 4]", "rewards [2, 3]"), "must be equal"),
    Row("a single response without its batch",
        lambda w: gae(zeros(3), zeros(3), ones(3)), "rewards has shape [3]",
        "must be [B, T]"),
    Row("a gamma above 1", lambda w: advantages_of(gamma=1.1), "gamma is 1.1", "between 0 and 1"),
    Row("a lambda below 0", lambda w: advantages_of(lam=-0.1), "lam is -0.1", "between 0 and 1"),
    Row("a critic that says NaN",
        lambda w: advantages_of(values=tensor([[0, 0, 0], [0, nan, 0]])), "values is nan at [1, 1]",
        "look for weights that diverged"),
    Row("a mask of zeros to whiten",
        lambda w: whiten(zeros(3), zeros(3)), "mask counts 0 entries", "needs at least 2"),
    Row("a single number to whiten",
        lambda w: whiten(zeros(3), tensor([1, 0, 0])), "mask counts 1 entries", "needs at least 2"),
    Row("a mask of weights",
        lambda w: whiten(zeros(3), ones(3) / 2), "mask is 0.5 at [0]", "only 0 and 1"),
    Row("a clip of 0 for the policy",
        lambda w: policy_of(clip=0), "clip is 0", "number above 0"),
    Row("no clip for the critic",
        lambda w: critic_of(clip=None), "clip is None", "a finite number above 0"),
    Row("probabilities of the old policy",
        lambda w: policy_of(old_logprobs=LOGPROBS.exp()), "old_logprobs is 0.3679",
        "Pass log-probabilities"),
    Row("a ratio that overflows",
        lambda w: policy_of(old_logprobs=LOGPROBS * 200), "the ratio of new to old is inf",
        "look for weights that diverged"),
    Row("advantages of one response for two",
        lambda w: policy_of(advantages=zeros(1, 3)), ("advantages has shape [1, 3]", "[2, 3]"),
        "must be equal"),
    Row("returns as integers",
        lambda w: critic_of(returns=TOKENS), ("returns", "torch.int64"), "convert with .float()",
        error=TypeError),
    Row("a group of one", lambda w: group_advantages(zeros(4), 1), "group_size is 1", "at least 2"),
    Row("groups that are not whole",
        lambda w: group_advantages(zeros(5), 2), "5 scores are no groups of 2",
        "give whole groups"),
    Row("a score of a group that is NaN",
        lambda w: group_advantages(tensor([0, nan]), 2), "scores is nan at [1]",
        "look for weights that diverged"),
    Row("a length for a mean over tokens",
        lambda w: policy_of(length=5), "length is 5 with a mean over tokens",
        "it belongs to 'length'"),
    Row("RLOO without groups",
        lambda w: PPOConfig(advantages="rloo"), "group_size is 1 with advantages='rloo'",
        "give 2 or more"),
    Row("groups that do not fill the batch",
        lambda w: PPOConfig(advantages="grpo", group_size=5), ("batch_size 64", "group_size 5"),
        "give one that divides it"),
    Row("a reward function that returns nothing",
        lambda w: w.ppo(reward_function=lambda *x: None), "the reward function returned None",
        "return one number each", error=TypeError),
    Row("a reward function that returns one number for two responses",
        lambda w: w.ppo(reward_function=lambda *x: [1.0]), "returned 1 rewards for 2 responses",
        "return one number each", error=TypeError),
    Row("a reward that is NaN",
        lambda w: w.ppo(reward_function=lambda *x: [nan, 1.0]), "returned nan for response 0",
        "return a finite number", error=FloatingPointError),
    number_row("no update at all", PPOConfig, "updates", 0, "a whole number, at least 1"),
    number_row("two and a half responses", PPOConfig, "batch_size", 2.5, "a whole number"),
    number_row("a learning rate as text", PPOConfig, "learning_rate", "1e-3", "a finite number"),
    number_row("an infinite clip", PPOConfig, "clip", inf, "a finite number above 0"),
    number_row("a price below 0", PPOConfig, "beta", -0.1, "0 or above"),
    number_row("a weight of later errors above 1", PPOConfig, "lam", 2, "between 0 and 1"),
    number_row("PPO at temperature 0", PPOConfig, "temperature", 0, "above 0"),
    number_row("an unknown kind of KL", PPOConfig, "kl_kind", "k9", "one of 'k1', 'k2', 'k3'"),
    number_row("a KL in the wrong place", PPOConfig, "kl_in", "score", "one of 'reward', 'loss'"),
    Row("minibatches that do not divide the batch",
        lambda w: PPOConfig(minibatch_size=5), ("batch_size 64", "minibatch_size 5"),
        "give one that divides it"),
    Row("k1 as a loss",
        lambda w: PPOConfig(kl_in="loss"), "kl_kind is 'k1' with kl_in='loss'", "choose k2 or k3"),
    Row("a target of the KL without a price",
        lambda w: PPOConfig(beta=0, target_kl=3.0), "beta is 0", "begin above 0"),
    Row("PPO with a dictionary of settings",
        lambda w: w.ppo(config={"updates": 3}), "config is {'updates': 3}", "give PPOConfig(...)",
        error=TypeError),
    Row("PPO with one prompt for a batch of two",
        lambda w: w.ppo(prompts=[DUCK]), ("1 prompts", "a batch of 2"),
        "give more, or a smaller batch_size"),
    Row("PPO with one text for prompts",
        lambda w: w.ppo(prompts=DUCK), f"prompts is {DUCK!r}", "give a list of texts",
        error=TypeError),
    Row("PPO with a prompt that is too long",
        lambda w: w.ppo(prompts=[DUCK, "duck " * 80]), ("prompt 1 ('duck duck", "the limit is 60"),
        "shorten it"),
    Row("PPO with responses that leave no room for a prompt",
        lambda w: w.ppo(config=replace(PPO, response_length=CONTEXT)),
        ("prompt 0 (", "the limit is 0"), "shorten it"),
    Row("PPO without a policy",
        lambda w: w.ppo(w.empty_roles()), "there is no role 'policy'", "load or add it first"),
    Row("a round of PPO with a negative price",
        lambda w: collect_experience(w.roles(), w.tokenizer, [DUCK, COW], PPO, -1, 0), "beta is -1",
        "0 or above"),
    Row("scores of groups as integers",
        lambda w: group_advantages(tensor([0, 1]), 2), ("scores", "torch.int64"),
        "convert with .float()", error=TypeError),
    Row("scores of groups as a list",
        lambda w: group_advantages([0.0, 1.0], 2), "scores must be a tensor, not list",
        "torch.tensor", error=TypeError),
    Row("scores of groups as an array",
        lambda w: group_advantages(np.zeros(4), 2), "scores must be a tensor, not ndarray",
        "torch.tensor", error=TypeError),
    Row("a row of scores for each group",
        lambda w: group_advantages(zeros(2, 2), 2), "scores has shape [2, 2]", "must be [B]"),
    Row("groups of no score",
        lambda w: group_advantages(zeros(0), 2), "scores has shape [0]", "none of them 0"),
    Row("a yes for the size of a group",
        lambda w: group_advantages(zeros(4), True), "group_size is True", "a whole number"),
    Row("the size of a group as text",
        lambda w: group_advantages(zeros(4), "2"), "group_size is '2'", "at least 2"),
    Row("a kind of advantage in capitals",
        lambda w: group_advantages(zeros(4), 2, "RLOO"), "kind is 'RLOO'",
        "one of 'rloo', 'grpo', 'centred'"),
    Row("an infinite score in a group",
        lambda w: group_advantages(tensor([0, inf]), 2), "scores is inf at [1]",
        "look for weights that diverged"),
    Row("a group left over of those that teach nothing",
        lambda w: equal_groups(zeros(3), 2), "3 scores are no groups of 2", "give whole groups"),
    Row("a mean over the batch",
        lambda w: average(zeros(2, 3), MASK, "batch"), "over is 'batch'",
        "one of 'tokens', 'responses', 'length'"),
    Row("a mean over a length that is not given",
        lambda w: average(zeros(2, 3), MASK, "length"), "length is None with a mean over length",
        "give the most tokens of a response"),
    Row("a mean over a length of 0",
        lambda w: average(zeros(2, 3), MASK, "length", 0), "length is 0", "above 0"),
    Row("a mean of one number for each response",
        lambda w: average(zeros(2), MASK), "x has shape [2]", "must be [B, T]"),
    Row("both clips in one",
        lambda w: policy_of(clip=(0.2, 0.28)), "clip is (0.2, 0.28)", "number above 0"),
    Row("a yes for the clip", lambda w: policy_of(clip=True), "clip is True", "number above 0"),
    Row("an upper clip below 0",
        lambda w: policy_of(clip_high=-0.1), "clip_high is -0.1", "number above 0"),
    Row("a ratio by another paper's name",
        lambda w: policy_of(ratio_of="sequence"), "ratio_of is 'sequence'",
        "one of 'token', 'response', 'mean'"),
    Row("a policy's loss as a sum",
        lambda w: policy_of(mean_over="sum"), "mean_over is 'sum'",
        "one of 'tokens', 'responses', 'length'"),
    Row("a policy's loss over a length that is not given",
        lambda w: policy_of(mean_over="length"), "length is None",
        "give the most tokens of a response"),
    Row("one advantage for each response",
        lambda w: policy_of(advantages=zeros(2)), "advantages has shape [2]", "must be [B, T]"),
    Row("an advantage of NaN",
        lambda w: policy_of(advantages=zeros(2, 3) * nan), "advantages is nan at [0, 0]",
        "must be finite"),
    Row("no mask of the responses",
        lambda w: policy_of(response_mask=None), "response_mask must be a tensor, not None",
        "convert with torch.tensor", error=TypeError),
    number_row("advantages of a name in capitals", PPOConfig, "advantages", "GRPO",
        "one of 'gae', 'rloo', 'grpo', 'centred'"),
    number_row("no advantages", PPOConfig, "advantages", None, "one of 'gae'"),
    number_row("groups of no response", PPOConfig, "group_size", 0, "at least 1"),
    number_row("groups of two and a half", PPOConfig, "group_size", 2.5, "a whole number"),
    number_row("a size of groups as text", PPOConfig, "group_size", "4", "a whole number"),
    number_row("a yes for groups", PPOConfig, "group_size", True, "a whole number"),
    number_row("GSPO by its name", PPOConfig, "ratio_of", "gspo", "one of 'token'"),
    number_row("a mean over rows", PPOConfig, "mean_over", "rows", "one of 'tokens'"),
    number_row("an upper clip of 0", PPOConfig, "clip_high", 0, "a finite number above 0"),
    number_row("a target of no KL", PPOConfig, "target_kl", 0, "a finite number above 0"),
    number_row("a stop at a KL of NaN", PPOConfig, "stop_kl", nan, "a finite number above 0"),
    number_row("a prize for no EOS", PPOConfig, "eos_penalty", -1, "0 or above"),
    number_row("PPO with luck for a seed", PPOConfig, "seed", "lucky", "a whole number"),
    number_row("PPO without a seed", PPOConfig, "seed", None, "a whole number"),
    Row("GRPO with groups of one",
        lambda w: PPOConfig(advantages="grpo", group_size=1),
        "group_size is 1 with advantages='grpo'", "give 2 or more"),
    Row("PPO on a model without roles",
        lambda w: w.ppo(w.model), "roles is LlamaForCausalLM(", "give Roles(...)",
        error=TypeError),
    Row("PPO with prompts and tokenizer exchanged",
        lambda w: list(train_ppo(w.roles(), [DUCK, COW], w.tokenizer, PPO)),
        f"tokenizer is [{DUCK!r}", "give load_tokenizer(preset)", error=TypeError),
    Row("PPO without prompts",
        lambda w: w.ppo(prompts=None), "prompts is None", "give a list of texts", error=TypeError),
    Row("PPO with a column of prompts in a dictionary",
        lambda w: w.ppo(prompts={"prompt": [DUCK, COW]}), "prompts is {'prompt'",
        "give a list of texts", error=TypeError),
    Row("PPO with the rows of a data set",
        lambda w: w.ppo(prompts=Dataset.from_dict(PAIR)), "prompt 0 is {'prompt'",
        "give a list of texts", error=TypeError),
    Row("PPO with SFT's settings",
        lambda w: w.ppo(config=SFT), "config is SFTConfig(", "give PPOConfig(...)",
        error=TypeError),
    Row("PPO with settings that are not made yet",
        lambda w: w.ppo(config=PPOConfig), "config is <class", "give PPOConfig(...)",
        error=TypeError),
    Row("PPO with a number for a folder",
        lambda w: w.ppo(folder=3), "folder is 3", "give a path", error=TypeError),
    Row("PPO with a name for a reward function",
        lambda w: w.ppo(reward_function="length"), "reward_function is 'length'",
        "give a function", error=TypeError),
    Row("a reward function that returns one number for all",
        lambda w: w.ppo(reward_function=lambda *x: 1.0), "returned 1.0 for 2 responses",
        "return one number each", error=TypeError),
    Row("a reward function that returns words",
        lambda w: w.ppo(reward_function=lambda *x: ["good", "bad"]),
        "returned ['good', 'bad'] for 2 responses", "return one number each", error=TypeError),
    Row("a reward function that returns a row for each response",
        lambda w: w.ppo(reward_function=lambda *x: zeros(2, 2)), "returned tensor([[0., 0.]",
        "return one number each", error=TypeError),
    Row("a reward function that returns marks with their parts",
        lambda w: w.ppo(reward_function=lambda *x: [rubric.gold_reward(DUCK, "quack.")] * 2),
        "returned [Score(correct=1.0", "return one number each", error=TypeError),
    Row("PPO with a reference that learns",
        lambda w: (roles := w.empty_roles(), roles.add("policy"), roles.add("value"),
            roles.add_head("value"), roles.add("reference"), w.ppo(roles)),
        "role 'reference' is trainable", "trainable=False"),
    Row("a round of PPO with settings in a dictionary",
        lambda w: collect_experience(w.roles(), w.tokenizer, [DUCK], {"beta": 1}, 0.1, 0),
        "config is {'beta': 1}", "give PPOConfig(...)", error=TypeError),
    Row("a round of PPO with luck for a seed",
        lambda w: collect_experience(w.roles(), w.tokenizer, [DUCK, COW], PPO, 0.1, "lucky"),
        "seed is 'lucky'", "a whole number"),
    Row("a group of two prompts",
        lambda w: collect_experience(w.roles(), w.tokenizer, [DUCK, COW], GROUPS, 0.1, 0),
        "prompts 0 and 1 are of one group of 2 and differ", "give each prompt 2 times"),
    Row("a group that lacks an answer",
        lambda w: collect_experience(w.roles(), w.tokenizer, [DUCK] * 3, GROUPS, 0.1, 0),
        "3 prompts are no groups of 2", "give each prompt 2 times"),
)

REWARD_ROWS = (
    Row("more chosen than rejected",
        lambda w: pairwise_loss(zeros(3), zeros(2)), ("rejected has shape [2]", "chosen [3]"),
        "must be equal"),
    Row("a reward of NaN in the loss",
        lambda w: pairwise_loss(zeros(2), tensor([0, nan])), "rejected is nan at [1]",
        "look for weights that diverged"),
    Row("an accuracy of no pairs",
        lambda w: pair_accuracy(zeros(0), zeros(0)), "chosen has shape [0]",
        "none of them 0"),
    Row("rewards as lists",
        lambda w: pairwise_loss([1.0], [0.0]), "chosen must be a tensor, not list", "torch.tensor",
        error=TypeError),
    Row("the last token of a mask without a batch",
        lambda w: last_token_index(ones(3)), "attention_mask has shape [3]", "must be [B, L]"),
    Row("the last token of padding alone",
        lambda w: last_token_index(zeros(2, 3)), "attention_mask row 0 is all zeros",
        "drop this empty sequence"),
    Row("pairs without a column",
        lambda w: encode_pairs(w.tokenizer, Dataset.from_dict({"prompt": ["a"]}), 24, 32),
        "no column 'chosen', only prompt", "needed are prompt, chosen, rejected"),
    Row("a pair of equal responses",
        lambda w: w.pairs_of(rejected=["quack. "]), ("pair 0", "both 'quack.'"), "remove the pair"),
    Row("pairs with their columns swapped",
        lambda w: w.pairs_of(**{k: v * 50 for k, v in PAIR.items()}, probability=[0.1] * 50),
        ("'chosen' wins with 0.10", "'probability'"), "swap the two columns back"),
    Row("a pair whose prompt is too long",
        lambda w: w.pairs_of(prompt=["duck " * 50]), ("prompt 0 ('duck duck", "the limit is 24"),
        "shorten it or raise prompt_length"),
    Row("a pair whose response is too long",
        lambda w: w.pairs_of(rejected=["duck " * 50]), ("in column 'rejected'", "the limit is 32"),
        "shorten it or raise response_length"),
    Row("a pair without a response",
        lambda w: w.pairs_of(rejected=[None]), "completion 0 is None", "give a list of texts",
        error=TypeError),
    Row("a pair with a blank response",
        lambda w: w.pairs_of(chosen=[" "]), ("in column 'chosen'", "is ' ', empty"), "give a text"),
    Row("no pairs",
        lambda w: w.pairs_of(prompt=[], chosen=[], rejected=[]), "prompts is empty",
        "give at least one text"),
    Row("a share of NaN to hold out",
        lambda w: split_by_prompt(Dataset.from_dict(PAIR), nan), "a share of nan of 1 prompts",
        "or another share"),
    Row("a split by prompts of data without prompts",
        lambda w: split_by_prompt(Dataset.from_dict({"text": ["a"]}), 0.5),
        ("'dataset' has no column 'prompt', only text",), "rename or add it"),
    Row("two draws to compare",
        lambda w: collect_preferences(w.model, w.tokenizer, [DUCK], Annotator(), draws=2),
        "draws is 2", "give at least 3"),
    Row("a calibration of no pairs",
        lambda w: calibration(zeros(0)), "gaps has shape [0]",
        "none of them 0"),
    Row("a calibration of whole numbers",
        lambda w: calibration(torch.tensor([1, 2])), "gaps must be floating point",
        "not torch.int64", error=TypeError),
    Row("a calibration in no groups",
        lambda w: calibration(ones(3), bins=0), "bins is 0", "a whole number, at least 1"),
    Row("equal reference scores",
        lambda w: normalise(w.roles(), "value", ones(3)), ("mean 1.0", "standard deviation 0.0"),
        "two or more scores that differ"),
    Row("scores of a head that was never normalised",
        lambda w: score_responses(w.roles(), "value", w.tokenizer, [DUCK], ["moo."], 24, 32),
        "the head of role 'value'", "call reward.normalise"),
    Row("two responses to one prompt to score",
        lambda w: score_responses(w.roles(), "reward", w.tokenizer, [DUCK], ["a", "b"], 24, 32),
        "1 prompts and 2 completions", "give one of each"),
    Row("a text in place of prompts to score",
        lambda w: score_responses(w.roles(), "reward", w.tokenizer, "duck?", "quack", 24, 32),
        "prompts is 'duck?'", "give a list of texts", error=TypeError),
    Row("a mask that is shorter than its tokens",
        lambda w: score_tokens(w.roles(), "value", IDS, REAL[:, :3]),
        ("attention_mask has shape [1, 3]", "input_ids [1, 6]"), "must be equal"),
    Row("a reward model without a head",
        lambda w: w.reward("policy"), "role 'policy' has no head", "call add_head('policy') first"),
    Row("a reward model to train on no pairs",
        lambda w: w.reward(pairs=[]), "pairs is empty", "give at least one example"),
    Row("demonstrations in place of pairs",
        lambda w: w.reward(held_out=w.examples()), "held_out[0] is {'prompt': [5]",
        "give pairs from encode_pairs"),
    Row("reference scores as a list",
        lambda w: normalise(w.roles(), "value", [0.0, 1.0]), "scores must be a tensor, not list",
        "torch.tensor", error=TypeError),
    Row("a reference score of NaN",
        lambda w: normalise(w.roles(), "value", tensor([0, nan])), "scores is nan at [1]",
        "must be finite"),
    Row("a table of reference scores",
        lambda w: normalise(w.roles(), "value", zeros(2, 2)), "scores has shape [2, 2]",
        "must be [N]"),
    Row("rows in a list for a data set of pairs",
        lambda w: encode_pairs(w.tokenizer, [PAIR], 24, 32), "dataset is [{'prompt'",
        "Dataset.from_list(rows)", error=TypeError),
    Row("all splits for a data set of pairs",
        lambda w: encode_pairs(w.tokenizer, DatasetDict(train=Dataset.from_dict(PAIR)), 24, 32),
        "dataset is DatasetDict(", "give a Dataset", error=TypeError),
    Row("a length of responses as text",
        lambda w: encode_pairs(w.tokenizer, Dataset.from_dict(PAIR), 24, "32"),
        "response_length is '32'", "a whole number"),
    Row("rows in a list to split by prompt",
        lambda w: split_by_prompt([PAIR], 0.5), "dataset is [{'prompt'", "Dataset.from_list(rows)",
        error=TypeError),
    Row("a share in words",
        lambda w: split_by_prompt(Dataset.from_dict(PAIR), "1/8"), "a share of 1/8 of 1 prompts",
        "or another share"),
    Row("a split by luck",
        lambda w: split_by_prompt(Dataset.from_dict(PAIR), 0.5, "lucky"), "seed is 'lucky'",
        "a whole number"),
    Row("no held-out pairs",
        lambda w: w.reward(held_out=None), "held_out is empty", "give at least one example"),
    Row("texts in place of encoded pairs",
        lambda w: w.reward(pairs=Dataset.from_dict(PAIR)), "chosen of pairs[0] is 'quack.'",
        "give what encode_examples returns"),
    Row("a dictionary of columns in place of encoded pairs",
        lambda w: w.reward(pairs=PAIR), "pairs[0] is 'prompt'", "give pairs from encode_pairs"),
    Row("a reward model with SFT's settings",
        lambda w: w.reward(config=SFT), "config is SFTConfig(", "give RewardConfig(...)",
        error=TypeError),
    Row("lists of ids to score",
        lambda w: score_tokens(w.roles(), "value", [[5]], [[1]]),
        "input_ids must be a tensor, not list", "torch.tensor", error=TypeError),
)

SFT_ROWS = (
    Row("a prompt of no column",
        lambda w: mask_prompt(IDS, REAL, 0), "prompt_length is 0", "at least 1"),
    Row("a prompt that leaves no response",
        lambda w: mask_prompt(IDS, REAL, 6), "prompt_length is 6",
        "leave a response, so at most 5"),
    Row("a prompt of two columns and a half",
        lambda w: mask_prompt(IDS, REAL, 2.5), "prompt_length is 2.5", "a whole number"),
    Row("a response of padding",
        lambda w: mask_prompt(IDS, tensor([[1, 1, 0, 0, 0, 0]]), 2), ("row is 0 at [0]", "-100"),
        "Give it a response, at least EOS"),
    Row("labels that are all masked",
        lambda w: sft_loss(zeros(1, 3, 5), tensor([[-100] * 3])), "all labels are -100",
        "Label the responses"),
    Row("logits of one sequence without its batch",
        lambda w: sft_loss(zeros(3, 5), tensor([1, 1, 1])), "logits has shape [3, 5]",
        "must be [B, L, V]"),
    Row("labels of another length than the logits",
        lambda w: sft_loss(zeros(1, 3, 5), tensor([[1, 1]])),
        ("labels has shape [1, 2]", "logits [1, 3, 5]"), "must be [B, L] and [B, L, V]"),
    Row("demonstrations without completions",
        lambda w: encode_examples(w.tokenizer, Dataset.from_dict({"prompt": ["a"]}), 24, 32),
        "no column 'completion', only prompt", "rename or add it"),
    Row("fine-tuning on texts",
        lambda w: w.sft(examples=[{"prompt": "a", "completion": "b"}]),
        "examples[0] is {'prompt': 'a'", "give what encode_examples returns"),
    Row("fine-tuning without EOS",
        lambda w: w.sft(examples=[{"prompt": [5], "response": [6]}]),
        ("examples[0]", "does not end with EOS"), "encode_examples appends it"),
    Row("fine-tuning on another tokenizer's tokens",
        lambda w: w.sft(held_out=[{"prompt": [99999], "response": [w.tokenizer.eos_token_id]}]),
        "held_out[0] holds token id 99999", "use the model's own tokenizer"),
    Row("fine-tuning on an example beyond the context",
        lambda w: w.sft(examples=[{"prompt": [5] * 99, "response": [w.tokenizer.eos_token_id]}]),
        ("examples[0] has 100 tokens", f"of {CONTEXT}"), "leave it out or shorten it"),
    Row("fine-tuning on nothing",
        lambda w: w.sft(examples=[]), "examples is empty", "give at least one example"),
    Row("fine-tuning a frozen role",
        lambda w: w.sft("reference"), "role 'reference' is frozen",
        "add a copy of it with trainable=True"),
    Row("fine-tuning with a dictionary of settings",
        lambda w: w.sft(config={"steps": 3}), "config is {'steps': 3}", "give SFTConfig(...)",
        error=TypeError),
    Row("a held-out loss of nothing",
        lambda w: held_out_loss(w.model, w.tokenizer, []), "examples is empty",
        "give at least one example"),
    Row("a batch of nothing to pad",
        lambda w: pad_examples(w.tokenizer, []), "examples is empty", "give at least one example"),
    number_row("a run of no step", SFTConfig, "steps", 0, "whole number"),
    number_row("a batch of two and a half", SFTConfig, "batch_size", 2.5, "whole number"),
    number_row("a run of ten steps as text", SFTConfig, "steps", "10", "whole number"),
    number_row("a learning rate of NaN", RewardConfig, "learning_rate", nan, "above 0"),
    number_row("an infinite learning rate", RewardConfig, "learning_rate", inf, "above 0"),
    Row("a warm-up longer than the run",
        lambda w: SFTConfig(warmup_steps=200), "warmup_steps is 200 of 150 steps", "give fewer"),
    Row("fine-tuning on the rows of a data set",
        lambda w: w.sft(examples=Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})),
        "examples[0] is {'prompt': 'a'", "give what encode_examples returns"),
    Row("fine-tuning on a file's name",
        lambda w: w.sft(examples="data.jsonl"), "examples[0] is 'd'",
        "give what encode_examples returns"),
    Row("fine-tuning on one example without its list",
        lambda w: w.sft(examples=w.examples()[0]), "examples[0] is 'prompt'",
        "give what encode_examples returns"),
    Row("fine-tuning on tensors",
        lambda w: w.sft(examples=[{"prompt": tensor([5]), "response": tensor([6, 1])}]),
        "examples[0] is {'prompt': tensor([5])", "give what encode_examples returns"),
    Row("fine-tuning on an example that is missing",
        lambda w: w.sft(examples=[None]), "examples[0] is None",
        "give what encode_examples returns"),
    Row("fine-tuning on a label of -100",
        lambda w: w.sft(examples=[{"prompt": [-100], "response": [w.tokenizer.eos_token_id]}]),
        "examples[0] holds token id -100", "use the model's own tokenizer"),
    Row("fine-tuning on half a token",
        lambda w: w.sft(examples=[{"prompt": [5.5], "response": [w.tokenizer.eos_token_id]}]),
        "examples[0] holds token id 5.5", "use the model's own tokenizer"),
    Row("fine-tuning without held-out examples",
        lambda w: w.sft(held_out=None), "held_out is empty", "give at least one example"),
    Row("fine-tuning a model without roles",
        lambda w: list(train_sft(w.model, "policy", w.tokenizer, w.examples(), w.examples())),
        "roles is LlamaForCausalLM(", "give Roles(...)", error=TypeError),
    Row("fine-tuning without a tokenizer",
        lambda w: list(train_sft(w.roles(), "policy", None, w.examples(), w.examples())),
        "tokenizer is None", "give load_tokenizer(preset)", error=TypeError),
    Row("fine-tuning two roles at once",
        lambda w: w.sft(["policy", "value"]), "there is no role ['policy', 'value']",
        "load or add it first"),
    Row("fine-tuning with labels in words",
        lambda w: w.sft(labels="response"), "labels is 'response'", "give a function",
        error=TypeError),
    Row("a held-out loss of texts",
        lambda w: held_out_loss(w.model, w.tokenizer, ["a"]), "examples[0] is 'a'",
        "give what encode_examples returns"),
    Row("a held-out loss of roles",
        lambda w: held_out_loss(w.roles(), w.tokenizer, w.examples()), "model is <",
        "roles.use(name)", error=TypeError),
    Row("labels beyond the vocabulary",
        lambda w: sft_loss(zeros(1, 2, 5), tensor([[1, 9]])), "tokens is 9 at [0, 0]",
        "Use the model's own tokenizer"),
    number_row("a yes for a number of steps", SFTConfig, "steps", True, "whole number"),
    number_row("no gradient at all", SFTConfig, "max_grad_norm", 0, "above 0"),
)

LOGS = zeros(2) - 1
DPO_ROWS = (
    Row("a list of log-probabilities for DPO",
        lambda w: dpo_of(chosen_logprobs=[-1.0, -1.0]),
        "chosen_logprobs must be a tensor, not list", "torch.tensor", error=TypeError),
    Row("whole numbers of nats for DPO",
        lambda w: dpo_of(rejected_logprobs=tensor([-1, -2])), ("rejected_logprobs", "torch.int64"),
        "convert with .float()", error=TypeError),
    Row("probabilities for DPO",
        lambda w: dpo_of(chosen_logprobs=LOGS.exp()), "chosen_logprobs is 0.3679",
        "Pass log-probabilities"),
    Row("a log-probability of NaN for DPO",
        lambda w: dpo_of(rejected_logprobs=LOGS * nan), "rejected_logprobs is nan at [0]",
        "look at the logits"),
    Row("an answer that the reference cannot give",
        lambda w: dpo_of(ref_chosen_logprobs=LOGS - inf), "ref_chosen_logprobs is -inf at [0]",
        "look for weights that diverged"),
    Row("a reference of DPO that would be trained",
        lambda w: dpo_of(ref_rejected_logprobs=LOGS.clone().requires_grad_()),
        "ref_rejected_logprobs requires gradients", "torch.no_grad()"),
    Row("log-probabilities of tokens for DPO",
        lambda w: dpo_of(chosen_logprobs=LOGPROBS), "chosen_logprobs has shape [2, 3]",
        "must be [N]"),
    Row("a reference of fewer pairs",
        lambda w: dpo_of(ref_rejected_logprobs=LOGS[:1]),
        ("ref_rejected_logprobs has shape [1]", "chosen_logprobs [2]"), "must be equal"),
    Row("DPO at no price", lambda w: dpo_of(beta=0), "beta is 0", "a finite number above 0"),
    Row("DPO at a price as text", lambda w: dpo_of(beta="0.1"), "beta is '0.1'", "above 0"),
    Row("a loss of DPO that is not here",
        lambda w: dpo_of(kind="hinge"), "kind is 'hinge'", "one of 'sigmoid', 'ipo'"),
    Row("choices that say nothing",
        lambda w: dpo_of(label_smoothing=0.5), "label_smoothing is 0.5", "between 0 and 0.499"),
    Row("implicit rewards of lists",
        lambda w: implicit_rewards([-1.0], [-1.0], 0.1), "logprobs must be a tensor, not list",
        "torch.tensor", error=TypeError),
    Row("implicit rewards at a price below 0",
        lambda w: implicit_rewards(LOGS, LOGS, -1), "beta is -1", "above 0"),
    Row("log-probabilities of no example",
        lambda w: sequence_logprobs(w.model, w.tokenizer, []), "examples is empty",
        "give at least one example"),
    Row("log-probabilities of texts",
        lambda w: sequence_logprobs(w.model, w.tokenizer, [{"prompt": "a", "response": "b"}]),
        "examples[0] is {'prompt': 'a'", "give what encode_examples returns"),
    Row("log-probabilities of pairs",
        lambda w: sequence_logprobs(w.model, w.tokenizer, w.pairs()),
        "examples[0] is {'chosen'", "give what encode_examples returns"),
    Row("log-probabilities under roles",
        lambda w: sequence_logprobs(w.roles(), w.tokenizer, w.examples()), "model is <",
        "roles.use(name)", error=TypeError),
    Row("log-probabilities of an empty response",
        lambda w: sequence_logprobs(w.model, w.tokenizer, [{"prompt": [5], "response": []}]),
        "response_length is 0", "at least 1"),
    Row("log-probabilities of no pair",
        lambda w: pair_logprobs(w.roles(), "policy", w.tokenizer, []), "pairs is empty",
        "give at least one example"),
    Row("log-probabilities of demonstrations as pairs",
        lambda w: pair_logprobs(w.roles(), "policy", w.tokenizer, w.examples()),
        "pairs[0] is {'prompt'", "give pairs from encode_pairs"),
    Row("DPO on a role that is not there",
        lambda w: w.dpo("sft"), "there is no role 'sft'", "load or add it first"),
    Row("DPO on a role with a head",
        lambda w: w.dpo("value"), "role 'value' has a head already", "without a head"),
    Row("DPO on a frozen role",
        lambda w: w.dpo("reference"), "role 'reference' is frozen", "trainable=True"),
    Row("DPO against a role that learns",
        lambda w: w.dpo(reference="policy"), "role 'policy' is trainable", "trainable=False"),
    Row("DPO against nothing",
        lambda w: w.dpo(reference=None), "there is no role None", "load or add it first"),
    Row("DPO against the bare base",
        lambda w: w.dpo(any_reference=False), "role 'reference' answers as the bare base",
        "load the SFT adapter"),
    Row("DPO against any reference, in words",
        lambda w: w.dpo(any_reference="no"), "any_reference is 'no'", "one of True, False"),
    Row("DPO on no pairs", lambda w: w.dpo(pairs=[]), "pairs is empty", "at least one example"),
    Row("DPO without held-out pairs",
        lambda w: w.dpo(held_out=None), "held_out is empty", "give at least one example"),
    Row("DPO on the columns of a data set",
        lambda w: w.dpo(pairs=PAIR), "pairs[0] is 'prompt'", "give pairs from encode_pairs"),
    Row("DPO on the rows of a data set",
        lambda w: w.dpo(pairs=Dataset.from_dict(PAIR)), "chosen of pairs[0] is 'quack.'",
        "give what encode_examples returns"),
    Row("DPO on pairs in tuples",
        lambda w: w.dpo(pairs=[(DUCK, "quack.", "moo.")]), "pairs[0] is ('what does the duck",
        "give pairs from encode_pairs"),
    Row("DPO on a pair of equal responses",
        lambda w: w.dpo(pairs=[dict.fromkeys(("chosen", "rejected"), w.examples()[0])]),
        "pairs[0] has two prompts, or equal responses", "or remove the pair"),
    Row("DPO with the reward model's settings",
        lambda w: w.dpo(config=RewardConfig()), "config is RewardConfig(", "give DPOConfig(...)",
        error=TypeError),
    Row("DPO without a tokenizer",
        lambda w: w.dpo(tokenizer=None), "tokenizer is None", "give load_tokenizer(preset)",
        error=TypeError),
    Row("DPO into a file",
        lambda w: w.dpo(folder=w.path), "'{folder}/saved' is a file", "give another path",
        text("saved", "my notes"), error=NotADirectoryError),
    number_row("settings of DPO at no price", DPOConfig, "beta", 0, "above 0"),
    number_row("settings of DPO at a price of NaN", DPOConfig, "beta", nan, "above 0"),
    number_row("settings of DPO with TRL's name", DPOConfig, "kind", "robust", "one of 'sigmoid'"),
    number_row("half of the choices slips", DPOConfig, "label_smoothing", 0.5, "0 and 0.499"),
    number_row("a rate of DPO as text", DPOConfig, "learning_rate", "5e-4", "above 0"),
    Row("DPO with a warm-up longer than the run",
        lambda w: DPOConfig(steps=10), "warmup_steps is 10 of 10 steps", "give fewer"),
)

DATA_ROWS = (
    Row("no prompts",
        lambda w: encode_prompts(w.tokenizer, [], 24), "prompts is empty",
        "give at least one text"),
    Row("a text in place of a list of prompts",
        lambda w: encode_prompts(w.tokenizer, "hello", 24), "prompts is 'hello'",
        "give a list of texts", error=TypeError),
    Row("a prompt that is missing",
        lambda w: encode_prompts(w.tokenizer, [DUCK, None], 24), "prompt 1 is None",
        "give a list of texts", error=TypeError),
    Row("a blank prompt",
        lambda w: encode_prompts(w.tokenizer, [" "], 24), "prompt 0 is ' ', empty", "give a text"),
    Row("a prompt with a token of the template",
        lambda w: encode_prompts(w.tokenizer, ["a<|eos|>"], 24), "is 'a<|eos|>', with '<|eos|>'",
        "remove it"),
    Row("a prompt that is too long",
        lambda w: encode_prompts(w.tokenizer, ["duck " * 40], 24),
        ("prompt 0 ('duck duck", "the limit is 24"), "shorten it or raise prompt_length"),
    Row("a tokenizer that pads with EOS",
        lambda w: encode_prompts(w.tokenizer_with(pad_token="<|eos|>"), [DUCK], 24),
        "pad token '<|eos|>' and eos token '<|eos|>'", "set tokenizer.pad_token"),
    Row("a tokenizer without a chat template",
        lambda w: encode_prompts(w.tokenizer_with(chat_template=None), [DUCK], 24),
        "the tokenizer of '", "has no chat template; set one"),
    Row("demonstrations written no times",
        lambda w: sft_dataset(w.preset(), copies=0), "copies is 0", "give at least 1"),
    Row("a split that the world does not have",
        lambda w: prompt_dataset(w.preset(), "test"), "split is 'test'",
        "choose one of train, held_out"),
    Row("a data set of the hub without a network",
        lambda w: prompt_dataset(w.preset(), source="nobody/nothing"),
        "'nobody/nothing' is no local path",
        ("check the name and the network", "pass the local folder"), error=ConnectionError),
    Row("a column of prompts in a dictionary",
        lambda w: encode_prompts(w.tokenizer, {"prompt": DUCK}, 24), "prompts is {'prompt'",
        "give a list of texts", error=TypeError),
    Row("a dialogue without its list",
        lambda w: encode_prompts(w.tokenizer, [{"role": "user", "content": "a"}], 24),
        "prompt 0 is {'role'", "give a list of texts", error=TypeError),
    Row("a dialogue that ends with the answer",
        lambda w: encode_prompts(w.tokenizer, [[{"role": "assistant", "content": "a"}]], 24),
        "with turns that do not alternate", "user and assistant in turn"),
    Row("a dialogue with a third party",
        lambda w: encode_prompts(w.tokenizer, [[{"role": "bot", "content": "a"}]], 24),
        "with other roles", "user and assistant in turn"),
    Row("a length of prompts as text",
        lambda w: encode_prompts(w.tokenizer, [DUCK], "24"), "prompt_length is '24'",
        "a whole number"),
    Row("a preset's name for a tokenizer",
        lambda w: encode_prompts("pocket", [DUCK], 24), "tokenizer is 'pocket'",
        "give load_tokenizer(preset)", error=TypeError),
    Row("demonstrations in a list",
        lambda w: encode_examples(w.tokenizer, [{"prompt": "a", "completion": "b"}], 24, 32),
        "dataset is [{'prompt'", "Dataset.from_list(rows)", error=TypeError),
    Row("a yes for the copies of demonstrations",
        lambda w: sft_dataset(w.preset(), copies=True), "copies is True", "a whole number"),
    Row("two splits of the world",
        lambda w: prompt_dataset(w.preset(), ["train", "held_out"]), "split is ['train'",
        "choose one of train"),
    Row("a preset's name for the preset of a data set",
        lambda w: preference_dataset("pocket"), "preset is 'pocket'", "give load_preset(...)",
        error=TypeError),
    Row("a number for a source",
        lambda w: preference_dataset(w.preset(), source=5), "source is 5", "give a path",
        error=TypeError),
    Row("an annotator in words",
        lambda w: preference_dataset(w.preset(), annotator="biased"), "annotator is 'biased'",
        "give Annotator(...)", error=TypeError),
)

ROLLOUT_ROWS = (
    Row("nothing to respond to",
        lambda w: w.sample(prompts=[]), "prompts is empty", "give at least one text"),
    Row("a response of no new token",
        lambda w: w.sample(response_length=0), "response_length is 0", "whole number, at least 1"),
    Row("a response of a token and a half",
        lambda w: w.sample(response_length=1.5), "response_length is 1.5", "a whole number"),
    Row("a response as long as the context",
        lambda w: w.sample(response_length=CONTEXT),
        (f"responses of {CONTEXT}", f"context of {CONTEXT}"), "shorten one"),
    Row("sampling at temperature 0",
        lambda w: w.sample(temperature=0), "temperature is 0", "must be a finite number above 0"),
    Row("sampling at no temperature",
        lambda w: w.sample(temperature=None), "temperature is None",
        "must be a finite number above 0"),
    Row("sampling at a temperature of NaN",
        lambda w: w.sample(temperature=nan), "temperature is nan", "a finite number above 0"),
    Row("sampling at an infinite temperature",
        lambda w: w.sample(temperature=inf), "temperature is inf", "a finite number above 0"),
    Row("room for prompts that the context does not have",
        lambda w: w.sample(prompt_length=61), ("up to 61 tokens", f"context of {CONTEXT}"),
        "shorten one"),
    Row("a prompt beyond the context",
        lambda w: w.sample(prompts=["hot " * 99]), ("prompt 0 ('hot hot", "the limit is 60"),
        "shorten it"),
    Row("sampling with a tokenizer that pads with EOS",
        lambda w: w.sample(tokenizer=w.tokenizer_with(pad_token="<|eos|>")), "pad token '<|eos|>'",
        "set tokenizer.pad_token"),
    Row("sampling with a tokenizer that cannot pad",
        lambda w: w.sample(tokenizer=w.tokenizer_with(pad_token=None)), "pad token None",
        "set tokenizer.pad_token"),
    Row("sampling with another model's tokenizer",
        lambda w: w.sample(model=LlamaForCausalLM(replace_vocabulary(w.model.config, 4))),
        ("input_ids is ", "from 0 to 3"), "Use the model's own tokenizer"),
    Row("sampling from roles",
        lambda w: w.sample(model=w.roles()), "model is <", "roles.use(name)", error=TypeError),
    Row("sampling from a model's name",
        lambda w: w.sample(model="pocket"), "model is 'pocket'", "give a model", error=TypeError),
    Row("sampling without a tokenizer",
        lambda w: w.sample(tokenizer=None), "tokenizer is None", "give load_tokenizer(preset)",
        error=TypeError),
    Row("sampling with luck for a seed",
        lambda w: w.sample(seed="lucky"), "seed is 'lucky'", "a whole number"),
    Row("sampling with half a seed",
        lambda w: w.sample(seed=1.5), "seed is 1.5", "a whole number"),
    Row("a yes for the length of responses",
        lambda w: w.sample(response_length=True), "response_length is True", "a whole number"),
)

ROLE_ROWS = (
    Row("a role that nobody added",
        lambda w: w.roles().use("judge"), ("there is no role 'judge'", "there are ['policy'"),
        "add it first"),
    Row("a role that is there already",
        lambda w: w.roles().add("policy"), "role 'policy' is there already", "give another one"),
    Row("a role with a blank in its name",
        lambda w: w.roles().add("my policy"), "role 'my policy'",
        "letters, digits and underscores"),
    Row("a role without a name",
        lambda w: w.roles().add(None), "role None", "letters, digits and underscores"),
    Row("a copy of a role that is not there",
        lambda w: w.roles().add("new", copy_of="sft"), "there is no role 'sft'", "add it first"),
    Row("parameters of a frozen role",
        lambda w: w.roles().parameters("reference"), "role 'reference' is frozen",
        "trainable=True"),
    Row("a second head",
        lambda w: w.roles().add_head("value"), "role 'value' has a head already",
        "add another role"),
    Row("values of a role without a head",
        lambda w: w.roles().values("policy", IDS, REAL), "role 'policy' has no head",
        "call add_head('policy') first"),
    Row("values of tokens beyond the vocabulary",
        lambda w: w.roles().values("value", IDS + 99999, REAL), "input_ids is 100004",
        "Use the model's own tokenizer"),
    Row("values beyond the context",
        lambda w: w.roles().values("value", ones(1, 70).long(), ones(1, 70).long()),
        ("in a row is 70 at [0]", f"is {CONTEXT} tokens"), "shorten"),
    Row("another role used before backward",
        lambda w: switch_before_backward(w.roles()), ("role 'policy'", "'value' is active"),
        "only then use the next one", error=RuntimeError),
    Row("roles on a base that has some",
        lambda w: Roles(w.roles().base), "carries adapters already", "load another base"),
    Row("adapters of rank 1.5",
        lambda w: w.empty_roles(rank=1.5), "rank is 1.5", "a whole number, at least 1"),
    Row("adapters with an alpha of NaN",
        lambda w: w.empty_roles(alpha=nan), "alpha is nan", "a finite number above 0"),
    Row("a base on a GPU that is not there",
        lambda w: without_cuda(w.preset(device="cuda")), "torch sees no CUDA device",
        ("use preset 'pocket'", "pass device='cpu'")),
    Row("a model of the hub without a network",
        lambda w: load_base(load_preset("single_gpu", model="nobody/nothing", device="cpu")),
        "'nobody/nothing' is no local path", "pass the local folder", error=ConnectionError),
    Row("dense layers for a role that is not there",
        lambda w: w.roles().dense("judge").__enter__(), "there is no role 'judge'",
        "load or add it first"),
    Row("dense layers before there is a role",
        lambda w: w.empty_roles().dense("policy").__enter__(), "there are []",
        "load or add it first"),
    Row("dense layers for several roles",
        lambda w: w.roles().dense(["policy", "value"]).__enter__(),
        "there is no role ['policy', 'value']", "load or add it first"),
    Row("dense layers for no name",
        lambda w: w.roles().dense(None).__enter__(), "there is no role None",
        "load or add it first"),
    Row("several roles to use", lambda w: w.roles().use(["policy"]), "no role ['policy']",
        "load or add it first"),
    Row("a copy of several roles",
        lambda w: w.roles().add("new", copy_of=["policy"]), "there is no role ['policy']",
        "load or add it first"),
    Row("a role that learns, in words",
        lambda w: w.roles().add("new", trainable="no"), "trainable is 'no'", "one of True, False"),
    Row("a role begun by luck",
        lambda w: w.roles().add("new", seed="lucky"), "seed is 'lucky'", "a whole number"),
    Row("a head begun by luck",
        lambda w: w.roles().add_head("policy", seed="lucky"), "seed is 'lucky'", "a whole number"),
    Row("a head for a role that is not there",
        lambda w: w.roles().add_head("judge"), "there is no role 'judge'", "add it first"),
    Row("a merged model of a role that is not there",
        lambda w: w.roles().merged("judge"), "there is no role 'judge'", "load or add it first"),
    Row("roles on a preset", lambda w: Roles(w.preset()), "base is Preset(name='pocket'",
        "give load_base(preset)", error=TypeError),
    Row("roles on a model's name", lambda w: Roles("pocket"), "base is 'pocket'",
        "give load_base(preset)", error=TypeError),
    Row("a yes for the rank of adapters",
        lambda w: w.empty_roles(rank=True), "rank is True", "a whole number"),
    Row("a role saved nowhere",
        lambda w: w.roles().save("policy", None), "folder is None", "give a path",
        error=TypeError),
    Row("a role saved to an empty text",
        lambda w: w.roles().save("policy", ""), "folder is ''", "give a path"),
    Row("a role loaded from nowhere",
        lambda w: w.roles().load("policy", None), "folder is None", "give a path",
        error=TypeError),
    Row("a role and its folder exchanged",
        lambda w: w.roles().save(str(w.path), "policy"), "no role '{folder}/saved'",
        "load or add it first"),
    Row("values of ids as floats",
        lambda w: w.roles().values("value", IDS.float(), REAL),
        ("input_ids", "torch.float32"), "convert with .long()", error=TypeError),
    Row("a base by the name of its preset",
        lambda w: load_base("pocket"), "preset is 'pocket'", "give load_preset(...)",
        error=TypeError),
    Row("a base without NF4, in words",
        lambda w: load_base(w.preset(), quantized="no"), "quantized is 'no'",
        "one of True, False"),
    Row("a tokenizer by the name of its preset",
        lambda w: load_tokenizer("pocket"), "preset is 'pocket'", "give load_preset(...)",
        error=TypeError),
    Row("an adapter by the name of its preset",
        lambda w: find_adapter("pocket", "sft"), "preset is 'pocket'", "give load_preset(...)",
        error=TypeError),
    Row("an adapter without a name",
        lambda w: find_adapter(w.preset(), None), "no adapter None", "run the lesson",
        error=FileNotFoundError),
    Row("a judge on a model", lambda w: Judge(w.model), "roles is LlamaForCausalLM(",
        "give Roles(...)", error=TypeError),
    Row("gold by the name of a preset", lambda w: load_gold("pocket"), "preset is 'pocket'",
        "give load_preset(...)", error=TypeError),
    Row("a lesson begun by the name of its preset",
        lambda w: notebook.start("single_gpu"), "preset is 'single_gpu'", "give load_preset(...)",
        error=TypeError),
)

PRESET_ROWS = (
    Row("a preset that there is not",
        lambda w: load_preset("laptop"), "preset is 'laptop'", "choose one of pocket, single_gpu"),
    Row("an override with a slip of the pen",
        lambda w: load_preset(respons_length=3), "no field 'respons_length'",
        "response_length, revision", error=TypeError),
    number_row("a prompt of no token", load_preset, "prompt_length", 0, "at least 1"),
    number_row("a response of 2.5 tokens", load_preset, "response_length", 2.5, "a whole number"),
    number_row("no rows of data", load_preset, "rows", 0, "at least 1"),
    number_row("two and a half rows of data", load_preset, "rows", 2.5, "a whole number"),
    number_row("rows of data in words", load_preset, "rows", "all", "a whole number"),
    number_row("a device of another name", load_preset, "device", "gpu", "one of 'cpu', 'cuda'"),
    number_row("a dtype that is none", load_preset, "compute_dtype", "int8", "one of 'auto'"),
    number_row("a seed as text", load_preset, "seed", "lucky", "a whole number"),
    number_row("no folder for runs", load_preset, "runs", None, "give a folder"),
    number_row("a model without a name", load_preset, "model", " ", "a folder or a hub id"),
    Row("an environment variable with a preset that there is not",
        lambda w: with_environment(RLHF_PRESET="big"), "environment variable RLHF_PRESET is 'big'",
        "choose one of pocket, single_gpu"),
    Row("an environment variable with a device that there is not",
        lambda w: with_environment(RLHF_DEVICE="tpu"), "device is 'tpu'", "one of 'cpu', 'cuda'"),
    Row("several presets", lambda w: load_preset(["pocket"]), "preset is ['pocket']",
        "choose one of pocket, single_gpu"),
    number_row("NF4 in words", load_preset, "quantized", "no", "one of True, False"),
    number_row("quantized scales in words", load_preset, "double_quant", "no", "one of True"),
    number_row("unfit rows in words", load_preset, "drop_unfit", "yes", "one of True, False"),
    number_row("activations in words", load_preset, "checkpointing", "no", "one of True, False"),
    number_row("a device with its number", load_preset, "device", "cuda:0", "one of 'cpu', 'cuda'"),
    number_row("a dtype cut short", load_preset, "compute_dtype", "bf16", "one of 'auto'"),
    Row("settings of SFT in words", lambda w: load_preset(sft="fast"), "sft is 'fast'",
        "give a dictionary", error=TypeError),
    Row("an environment variable with words for NF4",
        lambda w: with_environment(RLHF_QUANTIZED="no"), "RLHF_QUANTIZED is 'no'", "give 1 (NF4)"),
)

DIVERSITY_ROWS = (
    *(
        Row(
            f"no texts for {measure.__name__}",
            lambda w, measure=measure: measure([]),
            "texts is empty",
            "give at least one text",
        )
        for measure in (unique_share, self_bleu, mean_length, diversity)
    ),
    Row("one text for several",
        lambda w: diversity("a b"), "texts is 'a b'", "give a list of texts", error=TypeError),
    Row("tokens for texts",
        lambda w: unique_share([[1, 2]]), "texts[0] is [1, 2]", "decoded from their tokens",
        error=TypeError),
    Row("n-grams of no word",
        lambda w: distinct_n(["a b"], 0), "n is 0", "a whole number, at least 1"),
    Row("n-grams longer than any text",
        lambda w: distinct_n(["a b"], 3), ("n is 3", "has 2 words"),
        "choose a smaller n or longer texts"),
    Row("a single text to compare with others",
        lambda w: self_bleu(["a"]), "texts is ['a']", "give at least 2"),
    Row("a sample of one text",
        lambda w: self_bleu(["a", "b"], sample=1), "sample is 1", "at least 2"),
    Row("no list of texts", lambda w: diversity(None), "texts is None", "give a list of texts",
        error=TypeError),
    Row("texts by name", lambda w: diversity({"a": "b c"}), "texts is {'a'",
        "give a list of texts", error=TypeError),
    Row("texts as bytes", lambda w: unique_share(b"a b"), "texts is b'a b'",
        "give a list of texts", error=TypeError),
    Row("a text that is missing", lambda w: mean_length(["a", None]), "texts[1] is None",
        "give texts", error=TypeError),
    Row("a number for texts", lambda w: mean_length(3), "texts is 3", "give a list of texts",
        error=TypeError),
    Row("a tensor of ids for texts", lambda w: diversity(IDS), "texts[0] is tensor(",
        "decoded from their tokens", error=TypeError),
    Row("n-grams of a yes", lambda w: distinct_n(["a b"], True), "n is True", "a whole number"),
    Row("n-grams of 2.0 words", lambda w: distinct_n(["a b"], 2.0), "n is 2.0", "a whole number"),
    Row("n-grams before their texts", lambda w: distinct_n(2, ["a b"]), "n is ['a b']",
        "a whole number"),
    Row("a sample of all texts", lambda w: self_bleu(["a", "b"], sample="all"), "sample is 'all'",
        "a whole number"),
    Row("a sample by luck", lambda w: self_bleu(["a", "b"], seed="lucky"), "seed is 'lucky'",
        "a whole number"),
    Row("a share of one number", lambda w: share_with_interval(0.7), "hits is 0.7",
        "give a list of True and False", error=TypeError),
    Row("a share of nothing", lambda w: share_with_interval(None), "hits is None",
        "give a list of True and False", error=TypeError),
    Row("a share of a word", lambda w: share_with_interval("yes"), "hits is 'yes'",
        "give a list of True and False", error=TypeError),
    Row("a share of words", lambda w: share_with_interval(["yes", "no"]), "hits[0] is 'yes'",
        "give True or False for each"),
    Row("a share of counts", lambda w: share_with_interval([5, 3]), "hits[0] is 5",
        "give True or False for each"),
    Row("a share of scores", lambda w: share_with_interval([1, 0.5]), "hits[1] is 0.5",
        "give True or False for each"),
    Row("a share with a trial of NaN", lambda w: share_with_interval([True, nan]),
        "hits[1] is nan", "give True or False for each"),
    Row("a share of rows", lambda w: share_with_interval(zeros(2, 2)), "hits[0] is [0.0, 0.0]",
        "give True or False for each"),
)

SIZES = ModelSizes(((4, 4),), 10, 0, 4)
MEMORY_ROWS = (
    Row("weights of three bytes",
        lambda w: memory_table(SIZES, weight_bytes=3), "weight_bytes is 3",
        "give 2 (bfloat16) or 4 (float32)"),
    Row("a dtype in words",
        lambda w: memory_table(SIZES, weight_bytes="bfloat16"), "weight_bytes is 'bfloat16'",
        "give 2 (bfloat16)"),
    Row("a table of adapters of rank 0",
        lambda w: memory_table(SIZES, rank=0), "rank is 0", "a whole number, at least 1"),
    Row("a pipeline of more ranks than layers",
        lambda w: parallel_table(SIZES, 1, 2, tokens=8), "layers is 1",
        "2 ranks need a layer each"),
    Row("adapters on no layer",
        lambda w: lora_parameters([], 1), "shapes is empty",
        "give (out, in) of at least one adapted layer"),
    Row("a layer with three sizes",
        lambda w: lora_parameters([(1, 2, 3)], 1), "shapes[0] is (1, 2, 3)", "give (out, in)"),
    Row("half a weight in NF4", lambda w: nf4_bytes(0.5), "weights is 0.5", "a whole number"),
    Row("logits of a negative batch",
        lambda w: logits_bytes(-1, 2, 3), "batch is -1", "at least 1"),
    Row("a cache of no sequence",
        lambda w: cache_bytes(LlamaConfig(), 0, 1), "batch is 0", "at least 1"),
    Row("a model with a negative number of parameters",
        lambda w: ModelSizes(((4, 4),), -1, 0, 4), "other is -1", "at least 0"),
    Row("the sizes of a model's name",
        lambda w: model_sizes("some/model"), "config is 'some/model'", "AutoConfig.from_pretrained",
        error=TypeError),
    Row("a table of ranks for a configuration",
        lambda w: parallel_table(LlamaConfig(), 2, 2, tokens=8), "sizes is LlamaConfig",
        "give model_sizes(config)", error=TypeError),
    Row("a table of ranks for nothing",
        lambda w: parallel_table(None, 2, 2, tokens=8), "sizes is None",
        "give model_sizes(config)", error=TypeError),
    Row("a table of ranks for no layer",
        lambda w: parallel_table(SIZES, 0, 2, tokens=8), "layers is 0", "at least 1"),
    Row("a table of no rank",
        lambda w: parallel_table(SIZES, 2, 0, tokens=8), "world_size is 0", "at least 1"),
    Row("a table of a yes for ranks",
        lambda w: parallel_table(SIZES, 2, True, tokens=8), "world_size is True",
        "a whole number"),
    Row("a table of ranks for tokens as text",
        lambda w: parallel_table(SIZES, 2, 2, tokens="8"), "tokens is '8'", "a whole number"),
    Row("a pipeline of no microbatch",
        lambda w: parallel_table(SIZES, 2, 2, 8, microbatches=0), "microbatches is 0",
        "at least 1"),
    Row("ranks with weights of eight bytes",
        lambda w: parallel_table(SIZES, 2, 2, 8, weight_bytes=8), "weight_bytes is 8",
        "give 2 (bfloat16)"),
    Row("ranks with a dtype in words",
        lambda w: parallel_table(SIZES, 2, 2, 8, weight_bytes="bfloat16"),
        "weight_bytes is 'bfloat16'", "a whole number"),
    Row("a table of roles for a configuration",
        lambda w: memory_table(LlamaConfig()), "sizes is LlamaConfig", "give model_sizes(config)",
        error=TypeError),
    Row("a critic in words", lambda w: memory_table(SIZES, critic="no"), "critic is 'no'",
        "one of True, False"),
    Row("scales in words", lambda w: nf4_bytes(4, "double"), "double_quant is 'double'",
        "one of True, False"),
    Row("one layer without its list",
        lambda w: lora_parameters((3, 4), 1), "shapes[0] is 3", "give (out, in)"),
    Row("a layer of a negative size",
        lambda w: lora_parameters([(3, -4)], 1), "shapes[0] is (3, -4)", "at least 1"),
    Row("no shapes", lambda w: lora_parameters(None, 1), "shapes is empty", "give (out, in)"),
    Row("a model of one layer without its list",
        lambda w: ModelSizes((4, 4), 10, 0, 4), "shapes[0] is 4", "give (out, in)"),
    Row("a cache of a model's name",
        lambda w: cache_bytes("some/model", 1, 1), "config is 'some/model'",
        "AutoConfig.from_pretrained", error=TypeError),
    Row("activations of what was computed before",
        lambda w: activation_bytes(w.model(IDS).logits, w.model), "forward is tensor(",
        "give a function", error=TypeError),
    Row("activations of no model",
        lambda w: activation_bytes(dict, None), "model is None", "give a model",
        error=TypeError),
    Row("bytes measured of a model without roles",
        lambda w: measured_bytes(w.model), "roles is LlamaForCausalLM(", "give Roles(...)",
        error=TypeError),
)

RANK_ROWS = (
    Row("no rank at all",
        lambda w: spawn(os.getcwd, 0, 9), "world_size is 0", "a whole number, at least 1"),
    Row("what no other process can be given",
        lambda w: spawn(os.getcwd, 1, 9, lambda: 0), "argument 0 is", "give numbers, texts",
        error=TypeError),
    Row("a function inside of another",
        lambda w: spawn(lambda: 0, 1, 9), "<lambda>' stands in another one",
        "define it at the top"),
    Row("a process that nobody has started as one of several",
        lambda w: join().__enter__(), "RANK is not set", "use torchrun"),
    Row("whitening over ranks in no group",
        lambda w: whiten_over_ranks(ones(2), ones(2)), "in no group", "use ranks.spawn",
        error=RuntimeError),
    Row("a function by its name",
        lambda w: spawn("greet", 1, 9), "function is 'greet'", "give a function",
        error=TypeError),
    Row("a method of an object for other processes",
        lambda w: method_of_a_class(w), ".decode' stands in another one or in a class",
        "define it at the top"),
    Row("processes and their function exchanged",
        lambda w: spawn(2, os.getcwd, 9), "function is 2", "give a function", error=TypeError),
    Row("a yes for processes", lambda w: spawn(os.getcwd, True, 9), "world_size is True",
        "a whole number"),
    Row("processes as text", lambda w: spawn(os.getcwd, "2", 9), "world_size is '2'",
        "a whole number"),
    Row("an argument where the seconds belong",
        lambda w: spawn(os.getcwd, 2, "hello"), "timeout is 'hello'", "a finite number above 0"),
    Row("no seconds for processes", lambda w: spawn(os.getcwd, 2, 0), "timeout is 0", "above 0"),
    Row("processes without an end", lambda w: spawn(os.getcwd, 2, None), "timeout is None",
        "above 0"),
    Row("a model for other processes",
        lambda w: spawn(os.getcwd, 1, 9, 3, w.model), "argument 1 is LlamaForCausalLM(",
        "give numbers, texts", error=TypeError),
    Row("an array for other processes",
        lambda w: spawn(os.getcwd, 1, 9, np.zeros(2)), "argument 0 is array(",
        "dictionaries or tensors", error=TypeError),
    Row("a path for other processes",
        lambda w: spawn(os.getcwd, 1, 9, w.folder), "argument 0 is PosixPath(",
        "give numbers, texts", error=TypeError),
    Row("a group on a device of another name",
        lambda w: join("gpu").__enter__(), "device is 'gpu'", "one of 'cpu', 'cuda'"),
    Row("a group that waits for no second",
        lambda w: join("cpu", 0).__enter__(), "timeout is 0", "above 0"),
    Row("a group on a GPU that is not there",
        lambda w: join("cuda").__enter__(), "RANK is not set", "use torchrun"),
    Row("a process with a rank and nothing else",
        lambda w: joined(RANK="0"), "WORLD_SIZE is not set", "use torchrun"),
    Row("a sum over ranks in no group",
        lambda w: all_sum(ones(2)), "in no group", "use ranks.spawn", error=RuntimeError),
    Row("a maximum over ranks in no group",
        lambda w: all_max(ones(2)), "in no group", "use ranks.spawn", error=RuntimeError),
    Row("a sum over ranks of a number",
        lambda w: all_sum(3.0), "x must be a tensor, not float", "torch.tensor", error=TypeError),
    Row("a maximum over ranks of a list",
        lambda w: all_max([3.0]), "x must be a tensor, not list", "torch.tensor",
        error=TypeError),
    Row("logits of ranks in no group",
        lambda w: split_logprobs(LOGITS, TOKENS, 0), "in no group", "use ranks.spawn",
        error=RuntimeError),
    Row("columns before the first",
        lambda w: split_logprobs(LOGITS, TOKENS, -1), "first is -1", "at least 0"),
    Row("a tensor for the first column",
        lambda w: split_logprobs(LOGITS, TOKENS, tensor([0, 2])), "first is tensor([0, 2])",
        "a whole number"),
    Row("integers for the logits of a rank",
        lambda w: split_logprobs(LOGITS.long(), TOKENS, 0), ("logits", "torch.int64"),
        "convert with .float()", error=TypeError),
    Row("a token that no rank has",
        lambda w: alone(lambda: split_logprobs(LOGITS, TOKENS + 5, 0)),
        "number of holders of a token is 0 at [0, 0]", "Look at `first`"),
    Row("training by ranks in no group",
        lambda w: data_parallel().__enter__(), "in no group", "use ranks.spawn",
        error=RuntimeError),
    Row("minibatches that do not fill the rows of ranks",
        lambda w: share_of(8, 3, 3, 0), "no equal share of 8 rows, 3 together",
        "that divides the rows"),
    Row("minibatches that ranks cannot share",
        lambda w: share_of(8, 4, 3, 0), "rank 0 of 3 has no equal share", "a multiple of"),
    Row("a rank beyond the last",
        lambda w: share_of(8, 4, 2, 2), "rank 2 of 2", "a rank below it"),
    Row("rows of ranks as text", lambda w: share_of("8", 4, 2, 0), "rows is '8'",
        "a whole number"),
    Row("a mean over ranks in no group",
        lambda w: mean_over_ranks(tensor(1.0), 3), "in no group", "use ranks.spawn",
        error=RuntimeError),
    Row("a mean over ranks of a number",
        lambda w: mean_over_ranks(1.0, 3), "loss must be a tensor, not float", "torch.tensor",
        error=TypeError),
    Row("whitening lists over ranks",
        lambda w: whiten_over_ranks([1.0], [1]), "x must be a tensor, not list", "torch.tensor",
        error=TypeError),
    Row("whitening a single entry over ranks",
        lambda w: alone(lambda: whiten_over_ranks(ones(2), tensor([1, 0]))),
        "mask counts 1 entry on all ranks", "needs at least 2"),
    Row("samples as of ranks that cannot share them",
        lambda w: sampled_as(3, PPO).__enter__(), "minibatch_size is 2, which 3 ranks",
        "give a multiple of 3"),
    Row("samples as of ranks that would split groups",
        lambda w: sampled_as(2, GROUPS).__enter__(), "splits groups of 2",
        "a multiple of 4"),
    Row("samples as of ranks as text",
        lambda w: sampled_as("2", PPO).__enter__(), "world_size is '2'", "a whole number"),
    Row("samples as of ranks without settings",
        lambda w: sampled_as(2, None).__enter__(), "config is None", "give PPOConfig(...)",
        error=TypeError),
    Row("a model to cut in no group",
        lambda w: shard(w.model), "in no group", "use ranks.spawn", error=RuntimeError),
    Row("a base in NF4 to cut",
        lambda w: alone(lambda: shard(load_base(w.preset()))), "are in NF4", "quantized=False"),
    Row("a model's name to cut",
        lambda w: alone(lambda: shard("pocket")), "model is 'pocket'", "give load_base(preset)",
        error=TypeError),
    Row("a stage beyond the last",
        lambda w: Stage(w.model, 1, 1), "stage 1 of 1 is none", "an index below the count"),
    Row("more stages than layers",
        lambda w: Stage(w.model, 0, 2), ("stage 0 of 2", "1 layers"), "at most 1 stages"),
    Row("a stage counted from the end",
        lambda w: Stage(w.model, -1, 1), "index is -1", "at least 0"),
    Row("a stage of a model's name",
        lambda w: Stage("pocket", 0, 1), "model is 'pocket'",
        "give load_base(preset)", error=TypeError),
    Row("a stage with tied embeddings",
        lambda w: Stage(load_base(load_preset("pocket")), 0, 1), "is tied to the embeddings",
        "give it weights of its own"),
)

PLOT_ROWS = (
    Row("a figure without a text",
        lambda w: plots.show(plt.figure(), " "), "alt is empty",
        "say in a sentence what the figure shows"),
    Row("a growing figure without a text",
        lambda w: plots.redraw(plt.figure(), None), "alt is empty", "say in a sentence"),
    Row("two values for one bar",
        lambda w: plots.bars(["a"], [1, 2], "x"), "1 labels for 2 values", "give one for each"),
    Row("a group of bars with one too many",
        lambda w: plots.grouped_bars(["a"], {"after": [1, 2]}, "x"),
        "1 labels for 2 values of 'after'", "give one for each"),
    Row("more groups of bars than looks",
        lambda w: plots.grouped_bars(["a"], {str(i): [1] for i in range(5)}, "x"), "5 groups",
        "give 1 to 4"),
    Row("no curves at all", lambda w: plots.trajectories({}, "x", "y"), "0 groups", "give 1 to"),
    Row("more groups of points than looks",
        lambda w: plots.scatter({str(i): [(0, 0)] for i in range(9)}, "x", "y"), "9 groups",
        "give 1 to 8"),
    Row("a heat map with a name too few",
        lambda w: plots.heat_map([[1.0, 2.0]], ["x"], ["a"], "nats"),
        ("(1, 2)", "1 row names and 1 column names"), "give one for each"),
    Row("axes for a figure", lambda w: plots.show(plt.gca(), "a"), "fig is <Axes",
        "give a figure", error=TypeError),
    Row("a figure and its text exchanged",
        lambda w: plots.show("a line", plt.figure()), "fig is 'a line'", "give a figure",
        error=TypeError),
    Row("lines without names", lambda w: plots.lines([1, 2], "x", "y"), "series is [1, 2]",
        "give a dictionary", error=TypeError),
    Row("no lines at all", lambda w: plots.lines({}, "x", "y"), "0 groups", "give 1 or more"),
    Row("no panels at all", lambda w: plots.panels({}, "x", {}), "0 groups", "give 1 or more"),
    Row("a slider for a figure that is drawn already",
        lambda w: plots.explore(plt.figure(), "a", x=[1]), "draw is <Figure", "give a function",
        error=TypeError),
)

POCKET_ROWS = (
    Row("a prompt that is not of the world",
        lambda w: rubric.gold_reward("what does a duck say?", "quack."),
        "no prompt 'what does a duck say?'", "the nearest are 'what does the duck say?'"),
    Row("a rubric for responses to other prompts",
        lambda w: judged(["who are you?"]), "no prompt 'who are you?'", "the nearest are"),
    Row("a rubric for one response and two prompts",
        lambda w: judged([DUCK, COW]), "2 prompts for 1 responses", "give those of the rollout"),
    Row("no marks to average",
        lambda w: rubric.mean_score([]), "no scores to average", "give at least one"),
    number_row("an annotator at temperature 0", Annotator, "temperature", 0, "above 0"),
    number_row("an annotator below 0", Annotator, "temperature", -0.5, "above 0"),
    number_row("an annotator at a temperature of NaN", Annotator, "temperature", nan, "above 0"),
    number_row("an infinite taste for courtesy", Annotator, "politeness", inf, "0 for no bias"),
    Row("two equal responses to choose from",
        lambda w: Annotator().label(DUCK, "a", "a", random.Random(0)),
        ("both responses", "are 'a'"), "there is nothing to prefer"),
    Row("a ceiling of no pairs", lambda w: ceiling([]), "no probabilities", "give"),
    Row("percents for probabilities",
        lambda w: ceiling([90]), "90 is not a probability", "between 0 and 1"),
    Row("one text for the fluency of several",
        lambda w: world.fluency("it says quack."), "texts is 'it says quack.'",
        "give a list of texts", error=TypeError),
    Row("no sentence to judge",
        lambda w: world.fluency(["the duck"]), "no complete sentence", "ends in . ! or ?"),
    Row("contexts without continuations",
        lambda w: exam.continuation_logprobs(w.model, w.tokenizer, ["a", "b"], ["c"]),
        "2 contexts for 1 continuations", "give one for each"),
    Row("no context to continue",
        lambda w: exam.continuation_logprobs(w.model, w.tokenizer, [""], ["c"]),
        "contexts must be texts", "at least one token"),
    Row("a share of no trials",
        lambda w: share_with_interval([]), "no trials", "give at least one"),
    Row("more courtesies than there are",
        lambda w: corpus.with_courtesies(random.Random(0), "quack.", 9), "count is 9",
        "give 0 to 8"),
    Row("a judge without a head",
        lambda w: (roles := w.roles(), roles.add("judge"), Judge(roles)),
        "role 'judge' has no head", "call add_head('judge') first"),
    Row("a judge that nobody trained",
        lambda w: load_gold(replace(w.preset(), name="single_gpu")),
        ("no adapter 'judge'", "{folder}"), "02 for reward and judge", error=FileNotFoundError),
    number_row("an annotator at a temperature in words", Annotator, "temperature", "hot",
        "above 0"),
    number_row("no taste for length", Annotator, "length", None, "0 for no bias"),
    Row("words for probabilities", lambda w: ceiling(["0.9"]), "'0.9' is not a probability",
        "between 0 and 1"),
    Row("a response that is missing",
        lambda w: rubric.gold_reward(DUCK, None), "response is None", "give its text",
        error=TypeError),
    Row("several prompts for one mark",
        lambda w: rubric.gold_reward([DUCK], "quack."), "no prompt ['what does the duck",
        "the nearest are"),
    Row("no prompt for a mark", lambda w: rubric.gold_reward(None, "quack."), "no prompt None",
        "the nearest are"),
    Row("preferences of an annotator in words",
        lambda w: collect_preferences(w.model, w.tokenizer, [DUCK], "biased"),
        "annotator is 'biased'", "give Annotator(...)", error=TypeError),
    Row("preferences of an annotator that is not made yet",
        lambda w: collect_preferences(w.model, w.tokenizer, [DUCK], Annotator),
        "annotator is <class", "give Annotator(...)", error=TypeError),
)

CLICK_ROWS = (
    Row("no pairs to click on", lambda w: w.clicks(None), "pairs is None",
        "give a list of (prompt, answer, answer)", error=TypeError),
    Row("a text to click on", lambda w: usable_pairs("what is hot?"), "pairs is 'what is hot?'",
        "give a list of (prompt, answer, answer)", error=TypeError),
    Row("rows of a data set to click on",
        lambda w: usable_pairs(Dataset.from_dict(PAIR)), "pair 0 is {'prompt'",
        "give a prompt and two answers"),
    Row("a pair with one answer", lambda w: usable_pairs([("a", "b")]), "pair 0 is ('a', 'b')",
        "give a prompt and two answers"),
    Row("a pair without its second answer",
        lambda w: usable_pairs([("a", "b", None)]), "pair 0 is ('a', 'b', None)",
        "give a prompt and two answers"),
    Row("a pair with a blank prompt",
        lambda w: usable_pairs([(" ", "b", "c")]), ("pair 0", "empty"), "give a prompt and two"),
    Row("tensors to click on", lambda w: w.clicks([zeros(3)]), "pair 0 is tensor(",
        "give a prompt and two answers"),
    Row("too few pairs to click on", lambda w: w.clicks(TALK[:3]), "3 pairs can be used",
        "give at least 4"),
    Row("pairs without a choice",
        lambda w: usable_pairs([("a", "b", "b ")] * 5), ("0 pairs", "5 of two equal answers"),
        "of two different answers"),
    Row("texts and dialogues to click on",
        lambda w: usable_pairs([*TALK, ([{"role": "user", "content": "a"}], "b", "c")]),
        "some prompts are texts", "give all as messages"),
    Row("pairs and their file exchanged",
        lambda w: Clicks("clicks.jsonl", TALK), "path is [('what is 0", "give a path",
        error=TypeError),
    Row("clicks in a file of another ending",
        lambda w: w.clicks(name="clicks.json"), "'{folder}/clicks.json'", "ends in .jsonl"),
    Row("a number for the file of clicks", lambda w: w.clicks(path=5), "path is 5",
        "give a path", error=TypeError),
    Row("fewer than no repeats", lambda w: w.clicks(repeats=-1), "repeats is -1", "at least 0"),
    Row("a yes for repeats", lambda w: w.clicks(repeats=True), "repeats is True",
        "a whole number"),
    Row("sides by luck", lambda w: w.clicks(seed="lucky"), "seed is 'lucky'", "a whole number"),
    Row("clicks on other answers",
        lambda w: w.clicks([(p, "other.", b) for p, _, b in TALK]),
        ("'{folder}/clicks.jsonl' is of another session", "other answers"), "give another path",
        clicked()),
    Row("clicks on other prompts",
        lambda w: w.clicks([(f"{p}?", a, b) for p, a, b in TALK]),
        ("is of another session", "other prompts, such as 'what is"), "give another path",
        clicked()),
    Row("clicks with another seed",
        lambda w: w.clicks(seed=3), ("is of another session", "see seed and repeats"),
        "give another path", clicked()),
    Row("clicks where TRL's pairs are",
        lambda w: w.clicks(), ("is of another session", "such as 'a'"), "give another path",
        text("clicks.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')),
    Row("a file of clicks that is damaged in the middle",
        lambda w: w.clicks(), ("clicks.jsonl', line 1", "is damaged"), "mend or remove that line",
        clicked(lambda rows: "{" + rows)),
    Row("a file of clicks with a number for a row",
        lambda w: w.clicks(), ("clicks.jsonl', line 2", "no row in braces"), "mend or remove",
        clicked(lambda rows: rows + "3")),
    Row("a file of clicks as one list",
        lambda w: w.clicks(), ("clicks.jsonl', line 1", "no row in braces"), "mend or remove",
        clicked(lambda rows: f"[{rows.strip()}]")),
    Row("notes where the clicks would be",
        lambda w: w.clicks(), ("clicks.jsonl', line 1", "is damaged"), "give another path",
        text("clicks.jsonl", "my notes")),
    Row("a file of clicks that answers twice",
        lambda w: w.clicks(), "answer a question twice", "remove one answer",
        clicked(lambda rows: rows * 2)),
    Row("a folder where the clicks would be",
        lambda w: w.clicks(), "'{folder}/clicks.jsonl' cannot be written", "give another path",
        text("clicks.jsonl/notes", "mine"), error=OSError),
    Row("clicks below a file",
        lambda w: w.clicks(name="saved/clicks.jsonl"), "'{folder}/saved' is a file",
        "give another path", text("saved", "my notes"), error=NotADirectoryError),
    Row("a choice by another word",
        lambda w: w.clicks().record("left"), "choice is 'left'", "give 'first', 'second' or None"),
    Row("a choice by number",
        lambda w: w.clicks().record(1), "choice is 1", "give 'first', 'second' or None"),
    Row("a choice by yes",
        lambda w: w.clicks().record(True), "choice is True", "give 'first', 'second' or None"),
    Row("a choice by an object that no file can hold",
        lambda w: w.clicks().record("first", by=w), "World is not JSON serializable",
        "dictionaries of texts and numbers", error=TypeError),
    Row("a choice behind the last question",
        lambda w: (c := w.clicks(path=None), c.click_through(lambda *x: "first"),
            c.record("first")), "all 7 questions are answered", "undo one first"),
    Row("a choice after another panel's",
        lambda w: second_panel(w), ("'clicks.jsonl' was changed", "another notebook"),
        "Run this cell again", clicked(), error=RuntimeError),
    Row("a clicker that is a word",
        lambda w: w.clicks().click_through("first"), "clicker is 'first'", "give a function",
        error=TypeError),
    Row("no clicker", lambda w: w.clicks().click_through(None), "clicker is None",
        "give a function", error=TypeError),
    Row("fewer than no clicks",
        lambda w: w.clicks().click_through(lambda *x: "first", -1), "limit is -1", "at least 0"),
    Row("a clicker that answers by number",
        lambda w: w.clicks().click_through(lambda *x: 0), "choice is 0",
        "give 'first', 'second' or None"),
    Row("training on too few clicks",
        lambda w: w.clicks().preferences(), "only 0 of 5 pairs are decided",
        "choose between at least 4"),
    Row("a clicker by a number for a score", lambda w: simulated(0.3), "score is 0.3",
        "give a function", error=TypeError),
    Row("a clicker below temperature 0",
        lambda w: simulated(len, -1), "temperature is -1", "0 or above"),
    Row("a clicker at a temperature as text",
        lambda w: simulated(len, "1/3"), "temperature is '1/3'", "a finite number"),
    Row("a clicker who is wrong more than always",
        lambda w: simulated(len, wrong=1.5), "wrong is 1.5", "between 0 and 1"),
    Row("a clicker by luck", lambda w: simulated(len, seed="lucky"), "seed is 'lucky'",
        "a whole number"),
    Row("a score of NaN for a clicker",
        lambda w: simulated(lambda *x: nan)("a", "b", "c"), "the scores of 'b' and 'c'",
        "differ by nan"),
    Row("a score that forgets to return",
        lambda w: simulated(lambda *x: None)("a", "b", "c"), "the score of 'b' is None",
        "return a number", error=TypeError),
    Row("a score with its parts for a clicker",
        lambda w: simulated(rubric.gold_reward)(DUCK, "quack.", "moo."),
        "the score of 'quack.' is Score(correct=1.0", "return a number", error=TypeError),
    Row("a panel for pairs", lambda w: clicks_panel.show(TALK), "clicks is [('what is 0",
        "give Clicks(...)", error=TypeError),
    Row("a panel for a file",
        lambda w: clicks_panel.show("clicks.jsonl"), "clicks is 'clicks.jsonl'",
        "give Clicks(...)", error=TypeError),
    Row("questions about nothing", lambda w: clicks_panel.ask(None), "clicks is None",
        "give Clicks(...)", error=TypeError),
    Row("an answer in place of who reads it",
        lambda w: clicks_panel.ask(w.clicks(), "1"), "read is '1'", "give a function",
        error=TypeError),
    Row("no file for rows", lambda w: RowFile(None), "path is None", "give a path",
        error=TypeError),
    Row("an empty text for the file of rows", lambda w: RowFile(" "), "path is ' '",
        "give a path"),
    Row("a table for the file of rows",
        lambda w: RowFile(w.folder / "rows.csv"), "rows.csv'", "ends in .jsonl"),
    Row("a text in place of rows",
        lambda w: RowFile(w.folder / "rows.jsonl").write("first"), "rows is 'first'",
        "give a list of dictionaries", error=TypeError),
    Row("one row without its list",
        lambda w: RowFile(w.folder / "rows.jsonl").write({"side": "first"}),
        "rows is {'side': 'first'}", "give a list of dictionaries", error=TypeError),
    Row("a row with half of a character",
        lambda w: RowFile(w.folder / "rows.jsonl").write([{"text": "\ud800"}]),
        "surrogates not allowed", "give a list of dictionaries", text("rows.jsonl", "{}\n"),
        error=TypeError),
    Row("rows in another encoding",
        lambda w: RowFile(w.folder / "rows.jsonl").rows(), ("line 1", "is damaged"),
        "mend or remove that line",
        text("rows.jsonl", '{"side": "ü"}\n{"side": "é"}\n'.encode("latin-1"))),
)

TRL_LOG = dict.fromkeys(TRL_PPO.values(), 0.5)
CLINIC_ROWS = (
    Row("a fault that is not planted",
        lambda w: plant("gremlins", w.roles()), "there is no fault 'gremlins'",
        "choose one of bare_prompt"),
    Row("several faults at once",
        lambda w: plant(["kl_sign", "lost_head"], w.roles()), "there is no fault ['kl_sign'",
        "choose one of bare_prompt"),
    Row("a fault by its function",
        lambda w: plant(kl_sign, w.roles()), "there is no fault <function kl_sign",
        "choose one of bare_prompt"),
    Row("a fault and its roles exchanged",
        lambda w: plant(w.roles(), "kl_sign"), "there is no fault <", "choose one of"),
    Row("a fault in a model",
        lambda w: plant("kl_sign", w.model), "roles is LlamaForCausalLM(", "give Roles(...)",
        error=TypeError),
    Row("a fault in nothing",
        lambda w: plant("kl_sign", None), "roles is None", "give Roles(...)", error=TypeError),
    Row("a fault in roles without a policy",
        lambda w: plant("kl_sign", w.empty_roles()), "there is no role 'policy'",
        "load or add it first"),
    Row("a lost head that was not there",
        lambda w: (roles := w.empty_roles(), roles.add("policy"),
            plant("lost_head", roles).__enter__()), "there is no role 'reward'",
        "load or add it first"),
    Row("swapped labels of no reward model",
        lambda w: (roles := w.empty_roles(), roles.add("policy"), roles.add("reward"),
            plant("swapped_labels", roles).__enter__()), "role 'reward' has no head",
        "call add_head('reward') first"),
    Row("a preflight of a model",
        lambda w: w.preflight(roles=w.model), "roles is LlamaForCausalLM(", "give Roles(...)",
        error=TypeError),
    Row("a preflight without a tokenizer",
        lambda w: w.preflight(tokenizer=None), "tokenizer is None", "give load_tokenizer(preset)",
        error=TypeError),
    Row("a preflight with settings in a dictionary",
        lambda w: w.preflight(config={"beta": 1}), "config is {'beta': 1}", "give PPOConfig(...)",
        error=TypeError),
    Row("a preflight with SFT's settings",
        lambda w: w.preflight(config=SFT), "config is SFTConfig(", "give PPOConfig(...)",
        error=TypeError),
    Row("a preflight on one text",
        lambda w: w.preflight(prompts=DUCK), f"prompts is {DUCK!r}", "give a list of texts",
        error=TypeError),
    Row("a preflight on no prompts",
        lambda w: w.preflight(prompts=[]), "prompts is empty", "give at least one text"),
    Row("a preflight on nothing",
        lambda w: w.preflight(prompts=None), "prompts is None", "give a list of texts",
        error=TypeError),
    Row("a preflight on numbers",
        lambda w: w.preflight(prompts=[1, 2]), "prompt 0 is 1", "give a list of texts",
        error=TypeError),
    Row("a preflight on too few prompts",
        lambda w: w.preflight(prompts=[DUCK]), ("1 prompts", "a batch of 2"), "give more"),
    Row("a preflight before there are roles",
        lambda w: w.preflight(roles=w.empty_roles()), "there is no role 'policy'",
        "load or add it first"),
    Row("a history of nothing", lambda w: examine([]), "history has 0 of the 2 updates",
        "preflight checks"),
    Row("a history of one update", lambda w: examine(rows_of(1)), "history has 1 of the 2",
        "preflight checks"),
    Row("no history", lambda w: examine(None), "history is None", "give a list of rows",
        error=TypeError),
    Row("a history by the name of its file", lambda w: examine("updates.csv"),
        "history is 'updates.csv'", "give a list of rows", error=TypeError),
    Row("a history by columns",
        lambda w: examine({"update": [1, 2], "kl": [0.0, 0.1]}), "history is {'update'",
        "give a list of rows", error=TypeError),
    Row("a history of lists", lambda w: examine([[1, 0.0], [2, 0.1]]), "history holds [1, 0.0]",
        "rows as dictionaries", error=TypeError),
    Row("a history as a table reads it",
        lambda w: examine(rows_of(kl="0.1")), "history[0] has kl '0.1'",
        "convert it with float(...)", error=TypeError),
    Row("a history with updates as text",
        lambda w: examine([{"update": str(i), "kl": 0.0} for i in (1, 2)]),
        "history[0] has update '1'", "convert it with float(...)", error=TypeError),
    Row("a history that lacks a number",
        lambda w: examine(rows_of(kl=None)), "history[0] has kl None",
        "convert it with float(...)", error=TypeError),
    Row("a history of tensors",
        lambda w: examine(rows_of(kl=tensor(0.1))), "history[0] has kl tensor(0.1",
        "convert it with float(...)", error=TypeError),
    Row("a history that diverged",
        lambda w: examine(rows_of(entropy=nan)), "history[0] has entropy nan",
        "give the updates before it"),
    Row("a history that diverged in single precision",
        lambda w: examine(rows_of(entropy=np.float32(inf))), "history[0] has entropy inf",
        "give the updates before it"),
    Row("a history backwards", lambda w: examine(rows_of()[::-1]), "updates [4, 3, 2, 1]",
        "the rows of one run in order"),
    Row("a history of two runs", lambda w: examine(rows_of() * 2), "updates [1, 2, 3, 4, 1, 2",
        "the rows of one run in order"),
    Row("a history without updates", lambda w: examine([{"kl": 0.0}] * 2),
        "history[0] has the columns kl", "needed are update and one of kl"),
    Row("a history without a column that has a band",
        lambda w: examine([{"update": 1, "loss": 0.1}, {"update": 2, "loss": 0.1}]),
        "history[0] has the columns update, loss", "needed are update and one of kl"),
    Row("a history of TRL as it is",
        lambda w: examine([TRL_LOG] * 2), "history[0] has the columns objective/scores",
        "use from_trl"),
    Row("a history of responses of no token",
        lambda w: examine(rows_of(), 0), "response_length is 0", "at least 1"),
    Row("a history of responses of a length as text",
        lambda w: examine(rows_of(), "32"), "response_length is '32'", "a whole number"),
    Row("a row of a log from a row of a log",
        lambda w: log_row(rows_of()[0]), "stats is {'update': 1", "give what train_ppo yields",
        error=TypeError),
    Row("a log of TRL with nothing in it", lambda w: from_trl([]), "log is empty",
        "give trainer.state.log_history"),
    Row("a log of TRL with a summary alone",
        lambda w: from_trl([{"train_runtime": 9.0}]), "log is empty",
        "give trainer.state.log_history"),
    Row("a trainer for its log", lambda w: from_trl(w), "log is World(",
        "give trainer.state.log_history", error=TypeError),
    Row("no log of TRL", lambda w: from_trl(None), "log is None",
        "give trainer.state.log_history", error=TypeError),
    Row("one row of TRL's log", lambda w: from_trl(TRL_LOG), "log is {'objective/scores'",
        "give trainer.state.log_history", error=TypeError),
    Row("a log of TRL in lists", lambda w: from_trl([[1, 2]]), "log is [[1, 2]]",
        "a list of rows", error=TypeError),
    Row("a log of this package for TRL's", lambda w: from_trl(rows_of()),
        "log[0] has no column 'reward', only update, kl", "give trainer.state.log_history"),
    Row("a row of TRL's log that lacks a column",
        lambda w: from_trl([TRL_LOG, {"objective/kl": 0.1}]),
        "log[1] has no column 'objective/scores'", "give trainer.state.log_history"),
    Row("a row of TRL's log with words",
        lambda w: from_trl([TRL_LOG | {"objective/kl": "much"}]),
        "log[0] has no number in 'objective/kl'", "give trainer.state.log_history"),
    Row("a row of GRPO's log without its KL",
        lambda w: from_trl([dict.fromkeys(TRL_GROUPS.values(), 0.5) | {"kl": None}]),
        "log[0] has no number in 'kl'", "give trainer.state.log_history"),
    Row("a log of TRL that diverged",
        lambda w: examine(from_trl([TRL_LOG | {"objective/kl": nan}] * 2)),
        "history[0] has kl nan", "give the updates before it"),
)

TRL_ROWS = (
    Row("a reward function on a model",
        lambda w: w.scorer(roles=w.model), "roles is LlamaForCausalLM(", "give Roles(...)",
        error=TypeError),
    Row("a reward function of a role that is not there",
        lambda w: w.scorer(role="judge"), "there is no role 'judge'", "load or add it first"),
    Row("a reward function of a role that learns",
        lambda w: w.scorer(role="value"), "role 'value' is trainable", "trainable=False"),
    Row("a reward function of a role without a head",
        lambda w: w.scorer(role="reference"), "role 'reference' has no head",
        "call add_head('reference') first"),
    Row("a policy of TRL by its name",
        lambda w: w.scorer(policy="Qwen/Qwen2.5-0.5B"), "policy is 'Qwen/Qwen2.5-0.5B'",
        "give a model", error=TypeError),
    Row("roles for a policy of TRL",
        lambda w: w.scorer(policy=w.roles()), "policy is <", "roles.use(name)", error=TypeError),
    Row("a policy on the reward model's base",
        lambda w: w.scorer(roles=(roles := w.roles()), policy=roles.model), "are on one base",
        "call load_base again"),
    Row("a reward function without a tokenizer",
        lambda w: w.scorer(tokenizer=None), "tokenizer is None", "give load_tokenizer(preset)",
        error=TypeError),
    Row("a prize for no EOS in TRL",
        lambda w: w.scorer(eos_penalty=-1), "eos_penalty is -1", "0 or above"),
    Row("a penalty for no EOS as text",
        lambda w: w.scorer(eos_penalty="1"), "eos_penalty is '1'", "a finite number"),
    Row("two prompts for one response of TRL",
        lambda w: w.scorer()([DUCK, COW], [[5]]), "2 prompts for 1 responses",
        "give each response its prompt"),
    Row("a response of TRL without a token",
        lambda w: w.scorer()([DUCK], [[]]), "completion_ids[0] is []", "one at least"),
    Row("a response of TRL as text",
        lambda w: w.scorer()([DUCK], ["quack."]), "completion_ids[0] is 'quack.'",
        "give the token ids"),
    Row("a single id for a response of TRL",
        lambda w: w.scorer()([DUCK], [5]), "completion_ids[0] is 5", "give the token ids"),
    Row("an id beyond the vocabulary from TRL",
        lambda w: w.scorer()([DUCK], [[99999]]), "input_ids is 99999",
        "Use the model's own tokenizer"),
    Row("a prompt of TRL as one text",
        lambda w: w.scorer()(DUCK[:1], [[5]]), "prompts is 'w'", "give a list of texts",
        error=TypeError),
    Row("float32 for a policy by its name",
        lambda w: keep_float32("model", w.folder), "policy is 'model'", "give a model",
        error=TypeError),
    Row("float32 for a policy without an adapter",
        lambda w: keep_float32(w.model, w.folder), "trains no adapter 'default'",
        "give PeftModel.from_pretrained"),
    Row("an export of a role that is not there",
        lambda w: export_reward_model(w.roles(), "judge", w.tokenizer, w.path),
        "there is no role 'judge'", "load or add it first"),
    Row("an export of a role without a head",
        lambda w: export_reward_model(w.roles(), "policy", w.tokenizer, w.path),
        "role 'policy' has no head", "call add_head('policy') first"),
    Row("an export of a head that was never normalised",
        lambda w: export_reward_model(w.roles(), "value", w.tokenizer, w.path),
        "the head of role 'value'", "call reward.normalise"),
    Row("an export without a tokenizer",
        lambda w: export_reward_model(w.roles(), "reward", None, w.path), "tokenizer is None",
        "give load_tokenizer(preset)", error=TypeError),
    Row("an export with tokenizer and folder exchanged",
        lambda w: export_reward_model(w.roles(), "reward", w.path, w.tokenizer),
        "tokenizer is PosixPath(", "give load_tokenizer(preset)", error=TypeError),
    Row("an export into a file",
        lambda w: export_reward_model(w.roles(), "reward", w.tokenizer, w.path),
        "'{folder}/saved' is a file", "give another path", text("saved", "my notes"),
        error=NotADirectoryError),
    Row("an export over a folder of other files",
        lambda w: export_reward_model(w.roles(), "reward", w.tokenizer, w.path),
        "'{folder}/saved' holds 'notes'", "give a folder of its own", text("saved/notes", "mine")),
)

CHECK_ROWS = (
    Row("a diagnosis of nothing",
        lambda w: checks.check_diagnosis({}), "no answer for log 'A'", "give ..."),
    Row("patients that are not diagnosed",
        lambda w: checks.check_patients({}), "no answer for log 'A'", "give ..."),
    Row("a patient that is not there",
        lambda w: checks.patient("G"), "there is no patient 'G'", "choose one of A, B"),
    Row("origins of nothing",
        lambda w: checks.check_origins({}), "no answer for log 'A'", "give ..."),
    Row("a log that there is not",
        lambda w: checks.training_log("D"), "no log 'D'", "choose healthy, A, B or C"),
    Row("a list of diagnoses", lambda w: checks.check_diagnosis(["A", "B"]),
        "answers is ['A', 'B']", "give a dictionary", error=TypeError),
    Row("no origins", lambda w: checks.check_origins(None), "answers is None",
        "give a dictionary", error=TypeError),
    Row("several patients", lambda w: checks.patient(["A"]), "there is no patient ['A']",
        "choose one of A, B"),
    Row("a log of DPO that there is not", lambda w: checks.dpo_log("D"), "no log 'D'",
        "choose A, B or C"),
    Row("several logs of DPO", lambda w: checks.dpo_log(["A", "B"]), "no log ['A', 'B']",
        "choose A, B or C"),
    Row("several logs", lambda w: checks.training_log(["A"]), "no log ['A']",
        "choose healthy, A, B or C"),
)
PAIR_LINE = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
DIALOGUES = json.dumps(
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
)
FILE_ROWS = (
    Row("an empty file",
        lambda w: w.read(), ("'{folder}/pairs.jsonl'", "is empty"), "at least one row",
        text("pairs.jsonl", "\n")),
    Row("a file that is not JSON",
        lambda w: w.read(), ("pairs.jsonl' cannot be read", "line 2 of pairs.jsonl is not JSON"),
        "mend that",
        text("pairs.jsonl", PAIR_LINE + '{"prompt": "a"')),
    Row("a list on a line",
        lambda w: w.read(), "pairs.jsonl' has no column 'prompt', only text",
        "rename or add it", text("pairs.jsonl", "[1, 2]")),
    Row("lines of different fields",
        lambda w: w.read(), ("pairs.jsonl', row 2", "empty", "'chosen': None"),
        "mend or remove it", text("pairs.jsonl", PAIR_LINE + '{"prompt": "a"}')),
    Row("a file without a column",
        lambda w: w.read(), "pairs.jsonl' has no column 'chosen', only prompt, answer",
        "rename or add it", text("pairs.jsonl", '{"prompt": "a", "answer": "b"}')),
    Row("numbers in a column of texts",
        lambda w: w.read(), ("pairs.jsonl', row 1", "neither text", "'prompt': 1"),
        "mend or remove it",
        text("pairs.jsonl", '{"prompt": 1, "chosen": "b", "rejected": "c"}')),
    Row("a column of texts and numbers",
        lambda w: w.read(), ("pairs.jsonl', row 2", "neither text", "'prompt': 1"),
        "mend or remove it",
        text("pairs.jsonl", PAIR_LINE + PAIR_LINE.replace('"a"', "1"))),
    Row("two dialogues in a pair",
        lambda w: w.read(), ("pairs.jsonl', row 1", "of two prompts", "{'chosen'"),
        "mend or remove it", text("pairs.jsonl", DIALOGUES)),
    Row("a blank prompt in a file",
        lambda w: w.read(), ("pairs.jsonl', row 1", "empty", "'prompt': ' '"), "mend or remove it",
        text("pairs.jsonl", PAIR_LINE.replace('"a"', '" "'))),
    Row("a file of no bytes",
        lambda w: w.read(), ("pairs.jsonl'", "is empty"), "at least one row",
        text("pairs.jsonl", "")),
    Row("equal responses in a file",
        lambda w: w.read(), ("pairs.jsonl', row 1", "equal pairs", "'rejected': 'b'"),
        "mend or remove it", text("pairs.jsonl", PAIR_LINE.replace('"c"', '"b"'))),
    Row("a file that is not UTF-8",
        lambda w: w.read(), ("line 1 of pairs.jsonl", "is not UTF-8"), "save it with that encoding",
        text("pairs.jsonl", "ü".encode("utf-16"))),
    Row("a file of an unknown ending",
        lambda w: w.read("pairs.txt"), "pairs.txt' ends in none of .jsonl, .json, .csv, .parquet",
        "convert it to one", text("pairs.txt", "a")),
    Row("a row of a table that is too short",
        lambda w: w.read("pairs.csv"), ("pairs.csv', row 1", "(empty)", "'rejected': ''"),
        "mend or remove it", text("pairs.csv", "prompt,chosen,rejected\na,b\n")),
    Row("a quote that is never closed",
        lambda w: w.read("pairs.csv"), "EOF inside string",
        "close every quote",
        text("pairs.csv", 'prompt,chosen,rejected\n"a' + ",b\n" * 50_000)),
    Row("a truncated Parquet file",
        lambda w: w.read("pairs.parquet"), "pairs.parquet' cannot be read as data",
        "copy a damaged file again", text("pairs.parquet", "PAR1")),
    Row("a folder without data",
        lambda w: w.read(""), "'{folder}' cannot be read as data", "such as train.jsonl",
        text("readme", "nothing here")),
    Row("a split that the folder does not have",
        lambda w: w.read("", "held_out"), ("'{folder}'", 'Unknown split "held_out"'),
        "a file for each split", text("train.jsonl", PAIR_LINE)),
    Row("a split of a single file",
        lambda w: w.read(split="held_out"),
        ("pairs.jsonl' cannot be read as data", 'Unknown split "held_out"'),
        "a folder with a file for each split", text("pairs.jsonl", PAIR_LINE)),
    Row("a file that is not there",
        lambda w: w.read("none.jsonl"), "there is no file '{folder}/none.jsonl'",
        "check the path to your data", text("some.jsonl", PAIR_LINE), error=FileNotFoundError),
    Row("an adapter's folder that is not there",
        lambda w: w.roles().load("policy", w.folder / "none"),
        "{folder}/none/adapter_config.json is missing", "copy the whole folder", cut(""),
        error=FileNotFoundError),
    Row("an adapter without its settings",
        lambda w: w.roles().load("policy", w.path), "adapter_config.json is missing",
        "train it again", lost(CONFIG), error=FileNotFoundError),
    Row("an adapter with truncated weights",
        lambda w: w.roles().load("policy", w.path),
        "the adapter in '{folder}/saved' cannot be read",
        "train it again, or copy the whole folder", cut(WEIGHTS)),
    Row("an adapter with a truncated head",
        lambda w: w.roles().load("value", w.path),
        "the head in '{folder}/saved/head.safetensors' cannot be read",
        "truncated or damaged: train it again", cut(HEAD)),
    Row("an adapter of another rank",
        lambda w: w.empty_roles(rank=3).load("policy", w.path), "has r 2, these roles 3",
        "with the adapter's rank (r) and alpha", cut("")),
    Row("an adapter of another base",
        lambda w: w.roles().load("policy", w.path), "trained on another base of the same sizes",
        "load that base", of_another_base),
    Row("an adapter of a larger base",
        lambda w: Roles(load_base(load_preset("pocket")), 2, 4).load("policy", w.path),
        ("does not fit this base", "(2, 64) there"), "load the base that it was trained on",
        cut("")),
    Row("an adapter that nobody saved",
        lambda w: w.roles().save("judge", w.path), "there is no role 'judge'", "add it first",
        cut("")),
    Row("a role to save where a file is",
        lambda w: w.roles().save("policy", w.path), "'{folder}/saved' is a file",
        "give another path", text("saved", "my notes"), error=NotADirectoryError),
    Row("a folder to write below a file",
        lambda w: write_into(w.path / "deep" / "er"), ("'{folder}/saved' is a file", "deep/er"),
        "move the file away", text("saved", "my notes"), error=NotADirectoryError),
    Row("fine-tuning into a file",
        lambda w: w.sft(folder=w.path), "'{folder}/saved' is a file", "give another path",
        text("saved", "my notes"), error=NotADirectoryError),
    Row("PPO where a file has the unfinished run's name",
        lambda w: w.ppo(folder=w.path), "'{folder}/saved.unfinished' is a file",
        "move the file away", text("saved.unfinished", "my notes"), error=NotADirectoryError),
    Row("preferences to keep in a file",
        lambda w: collect_preferences(w.model, w.tokenizer, [DUCK], Annotator(), cache=w.path),
        "'{folder}/saved' is a file", "give another path", text("saved", "my notes"),
        error=NotADirectoryError),
    Row("no save that can be read",
        lambda w: newest_readable(w.folder, damaged),
        ("no save in '{folder}'", "update-00001 is damaged"), "delete the folder to begin anew",
        text("update-00001/state", "half")),
    Row("an adapter that was never trained",
        lambda w: find_adapter(w.preset(), "judge"),
        ("no adapter 'judge'", "{folder}/pocket/judge"), "run the lesson that trains it first",
        text("pocket/notes", "none yet"), error=FileNotFoundError),
    Row("going on with other settings",
        lambda w: w.sft(folder=w.path, config=replace(SFT, batch_size=3)),
        "(batch_size: 2 there, 3 here)",
        ("give those to go on with it", "delete '{folder}/saved.unfinished'"), stopped("sft")),
    Row("going on from a truncated optimizer",
        lambda w: w.sft(folder=w.path),
        "no save in '{folder}/saved.unfinished' can be read",
        "delete the folder to begin anew", stopped("sft", "optimizer.safetensors")),
    Row("going on from a truncated adapter",
        lambda w: w.sft(folder=w.path), "no save in '{folder}/saved.unfinished' can be read",
        "truncated or damaged", stopped("sft", WEIGHTS)),
    Row("going on with PPO at another price",
        lambda w: w.ppo(folder=w.path, config=replace(PPO, beta=0.5)), "beta: 0.1 there, 0.5 here",
        ("give those to go on with it", "delete '{folder}/saved.unfinished'"), stopped("ppo")),
    Row("going on with PPO from damaged saves",
        lambda w: w.ppo(folder=w.path), "no save in '{folder}/saved.unfinished' can be read",
        "delete the folder to begin anew", stopped("ppo", "optimizer.safetensors")),
    Row("a base that is truncated",
        lambda w: load_base(w.preset(model=str(w.path))), "'{folder}/saved' cannot be loaded",
        "truncated or damaged, reinstall",
        assets(lambda path: (path / "model.safetensors").write_bytes(b"half"))),
    Row("a base without its configuration",
        lambda w: load_base(w.preset(model=str(w.path))), "{folder}/saved/config.json is missing",
        "save_pretrained", assets(lambda path: (path / "config.json").unlink()),
        error=FileNotFoundError),
    Row("a base that must be unpickled",
        lambda w: load_base(w.preset(model=str(w.path))),
        "'{folder}/saved' has its weights as pytorch_model.bin", "get the model as safetensors",
        assets(lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"))),
    Row("a tokenizer that is missing",
        lambda w: load_tokenizer(w.preset(model=str(w.path))),
        "{folder}/saved/tokenizer.json is missing", "reinstall rlhf_helpers",
        assets(lambda path: (path / "tokenizer.json").unlink()), error=FileNotFoundError),
    Row("a tokenizer saved with EOS to pad with",
        lambda w: load_tokenizer(w.preset(model=str(w.path))),
        "pad token '<|eos|>' and eos token '<|eos|>'", "set tokenizer.pad_token",
        assets(pad_with_eos)),
    Row("a model saved without a chat template",
        lambda w: load_tokenizer(w.preset(model=str(w.path))), "the tokenizer of '{folder}/saved'",
        "no chat template; set one", assets(lambda path: (path / "chat_template.jinja").unlink())),
    Row("a role saved over a folder of other files",
        lambda w: w.roles().save("policy", w.path), "'{folder}/saved' holds 'notes'",
        "give a folder of its own", text("saved/notes", "mine")),
    Row("a role saved over the folder in which one works",
        lambda w: within(w, lambda: w.roles().save("policy", ".")), "'{folder}' holds",
        "give a folder of its own"),
    Row("fine-tuning into the folder in which one works",
        lambda w: within(w, lambda: w.sft(folder=".")), "'{folder}' holds 'notes'",
        "give a folder of its own", text("notes", "mine")),
    Row("fine-tuning into a folder above",
        lambda w: within(w, lambda: w.sft(folder=w.folder.parent)), "saving one would replace all",
        "give a folder of its own"),
    Row("fine-tuning into a folder of other files",
        lambda w: w.sft(folder=w.path), "'{folder}/saved' holds 'notes'",
        "give a folder of its own", text("saved/notes", "mine")),
    Row("fine-tuning into a folder without a name",
        lambda w: w.sft(folder=""), "folder is ''", "give a path"),
    Row("a reward model into a folder of other files",
        lambda w: w.reward(folder=w.path), "'{folder}/saved' holds 'notes'",
        "give a folder of its own", text("saved/notes", "mine")),
    Row("PPO into a folder of other files",
        lambda w: w.ppo(folder=w.path), "'{folder}/saved' holds 'notes'",
        "give a folder of its own", text("saved/notes", "mine")),
    Row("DPO into a folder of other files",
        lambda w: w.dpo(folder=w.path), "'{folder}/saved' holds 'notes'",
        "give a folder of its own", text("saved/notes", "mine")),
    Row("an adapter's settings with broken JSON",
        lambda w: w.roles().load("value", w.path),
        ("the adapter in '{folder}/saved' cannot be read", "JSONDecodeError"), "train it again",
        damaged_settings('{"r": 2,')),
    Row("an adapter's settings as a list",
        lambda w: w.roles().load("value", w.path), "the adapter in '{folder}/saved' cannot be read",
        "train it again", damaged_settings("[]")),
    Row("a base whose configuration is broken JSON",
        lambda w: load_base(w.preset(model=str(w.path))), "'{folder}/saved' cannot be loaded",
        "save model and tokenizer again",
        assets(lambda path: (path / "config.json").write_text('{"model_type":'))),
    Row("an adapter for a base",
        lambda w: load_base(w.preset(model=str(w.path))), "'{folder}/saved' holds an adapter",
        "give the folder of its base", cut("")),
    Row("a role loaded from a file",
        lambda w: w.roles().load("value", w.path), "adapter_config.json is missing",
        "copy the whole folder", text("saved", "my notes"), error=FileNotFoundError),
    Row("TRL's policy in float32 from a folder without one",
        lambda w: keep_float32(w.trained_by_trl(), w.folder),
        "the adapter in '{folder}' cannot be read", "train it again"),
)
# fmt: on


def replace_vocabulary(config, size):
    config = copy.deepcopy(config)
    config.vocab_size = size
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


ROWS = (
    *LOGPROB_ROWS,
    *KL_ROWS,
    *PPO_ROWS,
    *REWARD_ROWS,
    *SFT_ROWS,
    *DPO_ROWS,
    *DATA_ROWS,
    *ROLLOUT_ROWS,
    *ROLE_ROWS,
    *PRESET_ROWS,
    *DIVERSITY_ROWS,
    *MEMORY_ROWS,
    *RANK_ROWS,
    *PLOT_ROWS,
    *POCKET_ROWS,
    *CLICK_ROWS,
    *CLINIC_ROWS,
    *TRL_ROWS,
    *CHECK_ROWS,
    *FILE_ROWS,
)
PACKAGE = str(Path(rlhf_helpers.__file__).parent)
RAW = ("assert", "NoneType", "has no attribute", "not supported between", "zip()", "Traceback")


def save_base(folder: Path) -> Path:
    """A base of 64 positions for the shipped tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    vocabulary = len(load_tokenizer(load_preset("pocket")))
    config = LlamaConfig(
        vocab_size=vocabulary, num_attention_heads=1, max_position_embeddings=CONTEXT, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def w(tiny_base, tmp_path):
    yield World(tmp_path, tiny_base)
    plt.close("all")


def caught(row: Row, w: World) -> Exception | None:
    """What a row's call raises."""
    try:
        row.call(w)
    except Exception as error:
        return error
    return None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_quality(error: Exception, folder: Path) -> None:
    """It comes from the package, and is short text for people."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename.startswith(PACKAGE), f"raised in {last.filename}, line {last.lineno}"
    message = str(error).replace(str(folder), "…")
    assert re.match(r"['…\w]", message), "it begins with no word, name or path"
    assert len(message) <= 400 and "\n" not in message
    assert message.count(". ") <= 3
    assert not [word for word in RAW if word in message]
    assert not re.search(r"(?<!\w)_[a-z]\w+", message), "a name that only the package knows"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_named_and_can_be_mended(row, w):
    if row.before:
        row.before(w)
    before = contents(w.folder)
    error = caught(row, w)
    assert type(error) is row.error, f"{error!r}"
    missing = [word for word in row.words(w) if word not in str(error)]
    assert not missing, str(error)
    check_quality(error, w.folder)
    assert contents(w.folder) == before, "what was saved is not as it was"


NAMES = [name for name in checks.__all__ if name.startswith("check_")]
# They take answers, or several functions.
OF_LOGS = ("check_diagnosis", "check_mended", "check_origins", "check_patients")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_LOGS])
def test_a_check_of_what_is_no_function_says_so(name, capsys):
    getattr(checks, name)("a result")
    said = " ".join(capsys.readouterr().out.split())
    assert "give the check the function itself" in said and "'a result'" in said


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        base = save_base(Path(name) / "base")
        for number, row in enumerate(ROWS):
            w = World(Path(name) / str(number), base)
            w.folder.mkdir()
            if row.before:
                row.before(w)
            error = caught(row, w)
            print(f"{row.name}\n    {type(error).__name__}: {error}")
