"""Faults that stop no run of PPO and warn of nothing, each in the few lines that make it.

The trainer knows nothing of them. Each is a context manager that takes the roles of a run and, as
long as it is open, puts a function with a common mistake in the place of the right one:

    with plant("kl_sign", roles):
        history = list(train_ppo(roles, tokenizer, prompts, config))

`inspect.getsource(FAULTS["kl_sign"])` shows it. Afterwards all functions are the right ones again.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import torch
from transformers import GenerationConfig

from rlhf_helpers import ppo, reward, rollout
from rlhf_helpers.logprobs import token_logprobs
from rlhf_helpers.losses import gae, masked_mean, policy_loss, shape_rewards, whiten
from rlhf_helpers.ppo import policy_objective, role_logprobs
from rlhf_helpers.roles import Roles, ScalarHead
from rlhf_helpers.rollout import mask_after_eos
from rlhf_helpers.validation import checked

FAULTS: dict[str, Callable[[Roles], AbstractContextManager[None]]] = {}


def fault(planted: Callable[[Roles], Iterator[None]]) -> Callable:
    """Make it a context manager that `FAULTS` knows by its name."""
    FAULTS[planted.__name__] = contextmanager(checked(planted))
    return FAULTS[planted.__name__]


def plant(name: str, roles: Roles) -> AbstractContextManager[None]:
    """A context in which PPO on these roles has a fault.

    A run is a generator, and computes when it is drawn from: draw while the context is open.

    Args:
        name: of `FAULTS`.
        roles: those that the run is made with.

    Raises:
        TypeError: for what is no Roles.
        ValueError: for an unknown fault, the message lists all; for roles without a policy.

    Example:
        >>> plant("gremlins", roles=None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: there is no fault 'gremlins'; choose one of bare_prompt, generate_defaults, ...

    Lesson 07 plants each of them.
    """
    if name not in [*FAULTS]:
        raise ValueError(f"there is no fault {name!r}; choose one of {', '.join(FAULTS)}")
    context = FAULTS[name](roles)
    roles.require("policy")
    return context


# --- what is sampled, and what is scored ---------------------------------------------------


@fault
def bare_prompt(roles: Roles) -> Iterator[None]:
    """The question is sent as plain text, without the chat template or BOS."""

    def plain(tokenizer, prompts, prompt_length):
        options = {"add_special_tokens": False, "return_token_type_ids": False}
        return tokenizer(prompts, padding=True, return_tensors="pt", **options)

    with patch.object(rollout, "encode_prompts", plain):
        yield


@fault
def generate_defaults(roles: Roles) -> Iterator[None]:
    """Answers are sampled as chat models are, at temperature 0.7 from the 50 likeliest tokens.

    They are scored at temperature 1 and by all tokens.
    """

    def chatty(**settings):
        return GenerationConfig(**settings | {"temperature": 0.7, "top_k": 50})

    with patch.object(rollout, "GenerationConfig", chatty):
        yield


@fault
def one_token_off(roles: Roles) -> Iterator[None]:
    """The log-probability of a token is read from the logits at its own place, not one before."""

    def off(model, input_ids, attention_mask, length, temperature):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids, attention_mask, position_ids=positions).logits[:, -length:]
        return token_logprobs(logits, input_ids[:, -length:], temperature)

    with patch.object(ppo, "response_logprobs", off):
        yield


@fault
def eos_masked_out(roles: Roles) -> Iterator[None]:
    """The response mask is "not padding", and padding is EOS: so the EOS itself does not count."""

    def not_padding(tokens, eos):
        mask = mask_after_eos(tokens, eos) * (tokens != eos)
        mask[:, 0] = 1  # an empty answer would be an error
        return mask

    with patch.object(rollout, "mask_after_eos", not_padding):
        yield


# --- the reward and its price --------------------------------------------------------------


@fault
def score_at_padding(roles: Roles) -> Iterator[None]:
    """The score is read in the last column, where most rows have padding."""

    def last_column(attention_mask):
        rows, columns = attention_mask.shape
        return torch.full((rows,), columns - 1, device=attention_mask.device)

    with patch.object(reward, "last_token_index", last_column):
        yield


@fault
def lost_head(roles: Roles) -> Iterator[None]:
    """The reward model was saved without its head, and got a random one when it was loaded."""
    right = roles.require_head("reward")
    new = ScalarHead(right.in_features, seed=1).to(right.weight.device).requires_grad_(False)
    new.statistics = right.statistics
    with patch.dict(roles.heads, reward=new):
        yield


@fault
def swapped_labels(roles: Roles) -> Iterator[None]:
    """The reward model learnt from pairs with chosen and rejected exchanged: r has become −r."""
    turned = copy.deepcopy(roles.require_head("reward"))
    for weight in turned.parameters():
        weight.data.neg_()
    with patch.dict(roles.heads, reward=turned):
        yield


@fault
def kl_sign(roles: Roles) -> Iterator[None]:
    """The difference of the log-probabilities is taken the other way round."""

    def bonus(scores, logprobs, ref_logprobs, *rest):
        return shape_rewards(scores, ref_logprobs, logprobs, *rest)

    with patch.object(ppo, "shape_rewards", bonus):
        yield


@fault
def kl_without_gradient(roles: Roles) -> Iterator[None]:
    """KL is not in the reward but in the loss, computed from stored numbers: a constant."""

    def free(scores, logprobs, ref_logprobs, mask, beta, kind):
        return shape_rewards(scores, logprobs, ref_logprobs, mask, 0.0, kind)

    def with_kl(roles, experience, part, config, beta):
        loss, report = policy_objective(roles, experience, part, config, beta)
        kl = experience.logprobs[part] - experience.ref_logprobs[part]
        return loss + beta * masked_mean(kl, experience.rollout.response_mask[part].bool()), report

    with patch.object(ppo, "shape_rewards", free), patch.object(ppo, "policy_objective", with_kl):
        yield


# --- advantages and losses -----------------------------------------------------------------


@fault
def ratio_to_reference(roles: Roles) -> Iterator[None]:
    """The ratio is taken to the reference, not to the policy that sampled."""

    def to_reference(roles, experience, part, config, beta):
        logprobs = role_logprobs(roles, "policy", experience.rollout, part, config)
        old, advantages = experience.ref_logprobs[part], experience.advantages[part]
        mask = experience.rollout.response_mask[part]
        return policy_loss(logprobs, old, advantages, mask, config.clip)

    with patch.object(ppo, "policy_objective", to_reference):
        yield


@fault
def padding_whitened(roles: Roles) -> Iterator[None]:
    """Mean and spread of the advantages are taken over the padding too, whose advantages are 0."""

    def over_all(advantages, mask):
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    with patch.object(ppo, "whiten", over_all):
        yield


@fault
def whitened_returns(roles: Roles) -> Iterator[None]:
    """The critic is trained on whitened returns, and its values are used as if they were not."""

    def both(rewards, values, mask, *rest):
        advantages, returns = gae(rewards, values, mask, *rest)
        return advantages, whiten(returns, mask)

    with patch.object(ppo, "gae", both):
        yield


# --- the weights ---------------------------------------------------------------------------


@fault
def lost_gradient(roles: Roles) -> Iterator[None]:
    """Between the policy's forward and its backward pass the critic's adapter is switched on.

    PEFT then marks the policy's weights as frozen, and autograd drops their gradient.
    """

    def switched(roles, *rest):
        loss, report = policy_objective(roles, *rest)
        roles.model.base_model.set_adapter("value")
        return loss, report

    with patch.object(ppo, "policy_objective", switched):
        yield


@fault
def adapter_in_bfloat16(roles: Roles) -> Iterator[None]:
    """Policy and reference are held in bfloat16, in which a small step rounds to none at all.

    They are in float32 again afterwards, but stay rounded.
    """
    named = roles.model.named_parameters()
    weights = [p for name, p in named if ".policy." in name or ".reference." in name]
    for weight in weights:
        weight.data = weight.data.bfloat16()
    try:
        yield
    finally:
        for weight in weights:
            weight.data, weight.grad = weight.data.float(), None
