"""What several processes change in the training loops, and cuts of a model over processes.

The loops know nothing of it. `data_parallel` puts, for as long as it is open, functions that speak
with the other ranks in the place of some of `training`, `ppo`, `sft`, `reward` and `dpo`: those
that take a mean, share out a batch, or save. The rest computes on its rows as ever.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf_helpers import dpo, ppo, reward, sft, training
from rlhf_helpers.dpo import dpo_loss
from rlhf_helpers.guards import upcast
from rlhf_helpers.kinds import Finite, Floating, Mask, Whole
from rlhf_helpers.losses import GROUPED, VARIANCE_EPSILON, value_loss
from rlhf_helpers.ppo import (
    Experience,
    PPOConfig,
    collect_experience,
    policy_objective,
    update_stats,
)
from rlhf_helpers.ranks import all_max, all_sum, require_group
from rlhf_helpers.reward import pairwise_loss
from rlhf_helpers.rollout import Rollout, sample_responses
from rlhf_helpers.sft import label_logprobs, mask_prompt
from rlhf_helpers.training import Run, TrainConfig, backward
from rlhf_helpers.validation import checked

ROW_MEANS = ("score", "kl", "length", "finished")  # of an update's report: means over responses
one_process_batch = TrainConfig.batch


@contextmanager
def data_parallel() -> Iterator[None]:
    """Inside, the ranks of a group train one model together, each on its rows of every batch.

    PPO, SFT, the reward model and DPO then do what one process does with the whole batch: the
    settings are those of the whole; each rank samples, and learns from, its equal share of the rows
    of each minibatch. Means are over the tokens (or rows) of all ranks, also where these differ in
    number: whitened advantages, losses, gradients, reports. Rank 0 alone saves; all go on from its
    save, with as many ranks. Each rank needs a base and roles of its own, with equal weights.

    A run computes when it is drawn from: draw while the context is open, on all ranks alike.

    Raises:
        RuntimeError: in a process that is in no group.
        ValueError: when a run begins: for rows that cannot be shared equally, groups that would be
            split (without a critic), ranks with other settings, data or weights, or an unfinished
            run of another number of ranks.

    Example:
        A script for `torchrun --nproc_per_node 2 script.py`:

        >>> with ranks.join(), data_parallel():  # doctest: +SKIP
        ...     for stats in train_ppo(roles, tokenizer, prompts, config, folder):
        ...         if dist.get_rank() == 0:
        ...             print(stats.update, stats.score, stats.kl)

    Lesson 10 derives it.
    """
    require_group()
    with ExitStack() as stack:
        for owner, name, new in REPLACED:
            stack.enter_context(patch.object(owner, name, new))
        yield


class RankRun(Run):
    """A run that all ranks make together; rank 0 keeps it on disk."""

    def __init__(self, roles, trained, config, folder, settings: Mapping[str, object]) -> None:
        _check_shares(config, _world())
        dist.barrier()  # rank 0 may still be saving the run before
        super().__init__(roles, trained, config, folder, settings | {"ranks": _world()})
        _check_equal(self)
        if dist.get_rank():
            self.folder = None  # read, but never written to


def _world() -> int:
    return dist.get_world_size()


def _check_shares(config: TrainConfig | PPOConfig, count: int) -> None:
    """Each step's rows must fall into as many equal shares, of whole groups."""
    name = "minibatch_size" if isinstance(config, PPOConfig) else "batch_size"
    size = getattr(config, name)
    if size % count:
        raise ValueError(
            f"{name} is {size}, which {count} ranks cannot share equally; give a multiple of "
            f"{count}, or start another number of ranks"
        )
    grouped = getattr(config, "advantages", "gae") in GROUPED
    if grouped and size // count % config.group_size:
        raise ValueError(
            f"{count} ranks would have {size // count} rows of a minibatch each, which splits "
            f"groups of {config.group_size}; give a minibatch_size that is a multiple of "
            f"{count * config.group_size}"
        )


def _check_equal(run: Run) -> None:
    """Raise on all ranks unless they have the same settings, data and weights."""
    said = {"settings or data": json.dumps(run.settings, sort_keys=True)}
    roles = run.roles
    said |= {f"weights of role {name!r}": roles.digest(name) for name in roles.names}
    said |= {
        f"head of role {name!r}": repr(save(h.state_dict())) for name, h in roles.heads.items()
    }
    short = [hashlib.sha256(text.encode()).digest()[:7] for text in said.values()]
    own = torch.tensor([int.from_bytes(x) for x in short], device=roles.base.device)
    everyone = [torch.empty_like(own) for _ in range(_world())]
    dist.all_gather(everyone, own)
    for rank, other in enumerate(everyone):
        if differ := (other != everyone[0]).nonzero().flatten().tolist():
            raise ValueError(
                f"rank {rank} has other {[*said][differ[0]]} than rank 0; give all ranks the same "
                "ones, from the same files"
            )


# --- who has which rows ----------------------------------------------------------------------


@checked
def share_of(rows: Whole[1], together: Whole[1], world_size: Whole[1], rank: Whole[0]) -> list[int]:
    """Which rows of a batch a rank has: an equal part of each minibatch.

    Args:
        rows: of the whole batch.
        together: rows of a minibatch; a multiple of `world_size` that divides `rows`.
        rank: from 0, below `world_size`.

    Raises:
        ValueError: for numbers that are not so.

    Example:
        Eight rows in minibatches of four, on two ranks:

        >>> share_of(8, together=4, world_size=2, rank=0)
        [0, 1, 4, 5]
        >>> share_of(8, together=4, world_size=2, rank=1)
        [2, 3, 6, 7]
    """
    if rows % together or together % world_size or rank >= world_size:
        raise ValueError(
            f"rank {rank} of {world_size} has no equal share of {rows} rows, {together} together; "
            "give a multiple of world_size that divides the rows, and a rank below it"
        )
    shares = torch.arange(rows).view(-1, world_size, together // world_size)
    return shares[:, rank].flatten().tolist()


def _share_of_batch(config: TrainConfig, examples: Sequence, step: int) -> list:
    batch = one_process_batch(config, examples, step)
    return [batch[i] for i in share_of(len(batch), len(batch), _world(), dist.get_rank())]


def _share_of_minibatches(rollout: Rollout, config: PPOConfig) -> list[slice]:
    size = config.minibatch_size // _world()
    return [slice(start, start + size) for start in range(0, len(rollout.texts), size)]


def _collect_share(roles, tokenizer, prompts: list, config, beta, seed: int, *rest):
    """A rank's rows of an update, sampled with a seed of its own."""
    rank = dist.get_rank()
    mine = share_of(len(prompts), config.minibatch_size, _world(), rank)
    asked = [prompts[i] for i in mine]
    return collect_experience(roles, tokenizer, asked, config, beta, seed + rank, *rest)


# --- means over all ranks --------------------------------------------------------------------


@checked
def mean_over_ranks(loss: Floating[...], count: Tensor | int) -> Tensor:
    """The mean over what all ranks have, from each rank's mean over as many as it has.

    L = Σ_r (n_r / Σ n) L_r. Its value is that of all, its gradient this rank's part of that of all:
    the gradients are to be summed over the ranks, not averaged.

    Args:
        loss: a scalar, the mean over this rank's tokens or rows.
        count: n_r, how many those are.

    Raises:
        TypeError: for a loss that is no floating-point tensor.
        RuntimeError: in a process that is in no group.

    Example:
        Rank 0 has three tokens with a mean of 1, rank 1 one token with 5: 8/4 on both. The mean of
        the two means would be 3.
    """
    part = loss * (count / all_sum(torch.as_tensor(count, device=loss.device).to(loss)))
    return all_sum(part.detach()) + (part - part.detach())


def _mean(value: float, count: Tensor) -> float:
    """`mean_over_ranks` of a number that is reported."""
    value = torch.tensor(value, dtype=torch.float64, device=count.device)
    return mean_over_ranks(value, count).item()


@checked
def whiten_over_ranks(x: Finite[...], mask: Mask[...]) -> Tensor:
    """`losses.whiten` with the mean and the variance over the entries of all ranks.

    Two messages: Σ 1 and Σ x, then Σ (x − μ)². A rank alone would call its best tokens good, though
    another's worst may be better.

    Raises:
        As `losses.whiten`; RuntimeError in a process that is in no group.
    """
    require_group()
    real = mask.bool()
    mean, variance = _moments(x[real])
    whitened = (x - mean) * (variance + VARIANCE_EPSILON).rsqrt()
    return whitened.masked_fill(~real, 0).to(upcast(x).dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, in float64, of the numbers that all ranks have."""
    x = x.double()
    count, total = all_sum(torch.stack([torch.ones_like(x).sum(), x.sum()]))
    if count < 2:
        raise ValueError("mask counts 1 entry on all ranks: a spread needs at least 2.")
    mean = total / count
    return mean, all_sum((x - mean).square().sum()) / (count - 1)


def _policy_objective(roles, experience: Experience, part: slice, config, beta: float):
    loss, report = policy_objective(roles, experience, part, config, beta)
    mask = experience.rollout.response_mask[part]
    tokens, rows = mask.sum(), torch.tensor(len(mask), device=mask.device)
    loss = mean_over_ranks(loss, tokens if config.mean_over == "tokens" else rows)
    return loss, {name: _mean(value, tokens) for name, value in report.items()}


def _value_loss(values, old_values, returns, response_mask, clip):
    loss, report = value_loss(values, old_values, returns, response_mask, clip)
    real = response_mask.bool()
    target = returns[real]
    error, spread = _moments(target - values.detach()[real])[1], _moments(target)[1]
    lowest, highest = -all_max(-target.min()), all_max(target.max())
    explained = (1 - error / spread).item() if highest > lowest else float("nan")
    shares = {"clip_fraction": _mean(report["clip_fraction"], real.sum())}
    return mean_over_ranks(loss, real.sum()), shares | {"explained_variance": explained}


def _update_stats(update: int, experience: Experience, beta: float, learnt: dict):
    stats = update_stats(update, experience, beta, learnt)
    mask = experience.rollout.response_mask
    rows = torch.tensor(len(mask), device=mask.device)
    means = {name: _mean(getattr(stats, name), rows) for name in ROW_MEANS}
    return replace(stats, **means, entropy=_mean(stats.entropy, mask.sum()))


def _backward(loss: Tensor, parameters: Sequence[nn.Parameter], roles) -> None:
    """The gradients of all ranks' losses, summed; one message."""
    backward(loss, parameters, roles)
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = all_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _of_trained(loss: Tensor, count: int) -> Tensor:
    """Over all ranks where it is to be learnt from; held-out examples each rank has in full."""
    return mean_over_ranks(loss, count) if loss.requires_grad else loss


def _sft_loss(model, tokenizer, examples: list[dict], labels: sft.Labels = mask_prompt):
    logprobs = label_logprobs(model, tokenizer, examples, labels)
    return _of_trained(-logprobs.mean(), len(logprobs))


def _pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    return _of_trained(pairwise_loss(chosen, rejected), len(chosen))


def _dpo_loss(chosen: Tensor, *rest) -> Tensor:
    return _of_trained(dpo_loss(chosen, *rest), len(chosen))


REPLACED = (
    *((module, "Run", RankRun) for module in (ppo, sft, reward, dpo)),
    (training, "backward", _backward),
    (TrainConfig, "batch", _share_of_batch),
    (ppo, "collect_experience", _collect_share),
    (ppo, "minibatches", _share_of_minibatches),
    (ppo, "whiten", whiten_over_ranks),
    (ppo, "policy_objective", _policy_objective),
    (ppo, "value_loss", _value_loss),
    (ppo, "update_stats", _update_stats),
    (sft, "batch_loss", _sft_loss),
    (reward, "pairwise_loss", _pairwise_loss),
    (dpo, "dpo_loss", _dpo_loss),
)


# --- one process that does the same, to compare with -----------------------------------------


@contextmanager
@checked
def sampled_as(world_size: Whole[1], config: PPOConfig) -> Iterator[None]:
    """Inside, one process samples PPO's responses part by part, as so many ranks would.

    All else of the run is as ever, on the whole batch: what it computes, `data_parallel` must too.

    Args:
        world_size: ranks; must divide the minibatch.
        config: of the run.

    Raises:
        TypeError: for other settings than PPO's.
        ValueError: when it opens, for rows that such ranks cannot share, as in `data_parallel`.
    """
    _check_shares(config, world_size)

    def sample(model, tokenizer, prompts, length, *, seed, **options) -> Rollout:
        rows = len(prompts), config.minibatch_size, world_size
        shares = [share_of(*rows, rank) for rank in range(world_size)]
        asked = [[prompts[i] for i in share] for share in shares]
        parts = [
            sample_responses(model, tokenizer, part, length, seed=seed + rank, **options)
            for rank, part in enumerate(asked)
        ]
        return _joined(parts, torch.tensor(shares).flatten().argsort(), tokenizer.pad_token_id)

    with patch.object(ppo, "sample_responses", sample):
        yield


def _joined(parts: list[Rollout], order: Tensor, padding: int) -> Rollout:
    """Rollouts in one, padded to the longest prompt and the longest response, in another order."""
    lengths = [part.response_mask.shape[1] for part in parts]
    prompts = [part.input_ids.shape[1] - n for part, n in zip(parts, lengths, strict=True)]

    def wide(name: str, left: bool = True, value: int = 0) -> Tensor:
        rows = [
            pad(getattr(part, name), (left * (max(prompts) - p), max(lengths) - n), value=value)
            for part, p, n in zip(parts, prompts, lengths, strict=True)
        ]
        return torch.cat(rows)[order]

    texts = [text for part in parts for text in part.texts]
    return Rollout(
        input_ids=wide("input_ids", value=padding),
        attention_mask=wide("attention_mask"),
        response_mask=wide("response_mask", left=False),
        texts=[texts[i] for i in order],
        finished=torch.cat([part.finished for part in parts])[order],
    )


# --- the base cut up -------------------------------------------------------------------------


@checked
def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Cut every weight of a model over the ranks, by torch's FSDP2: a layer is whole while it runs.

    Each rank keeps 1/W of all weights, gradients and optimizer states. Before a layer's forward and
    backward pass its weights are gathered, afterwards its gradients are averaged and cut again.
    Averaged: where ranks have other numbers of tokens, use `mean_over_ranks` and multiply by W.

    Args:
        model: unquantized; changed in place, and returned. Build the optimizer afterwards.

    Raises:
        ValueError: for a base in NF4, whose weights are packed bytes that only bitsandbytes reads.
        RuntimeError: in a process that is in no group.

    Rajbhandari et al., ZeRO (arXiv 1910.02054), section 5.3. Lesson 10 uses it.
    """
    require_group()
    if packed := [n for n, p in model.named_parameters() if hasattr(p, "quant_state")]:
        raise ValueError(
            f"{packed[0]} and {len(packed) - 1} other weights are in NF4, packed bytes that cannot "
            "be cut; load the base with load_preset(..., quantized=False)"
        )
    mesh = init_device_mesh(model.device.type, (_world(),))
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Stage(nn.Module):
    """Some layers of a Llama-like model: a part of a pipeline, each on a rank of its own.

    The first turns token ids `[B, L]` into hidden states `[B, L, d]`, the last those into logits
    `[B, L, V]`; sequences are without padding.

    Args:
        model: its layers are used, not copied.
        index: of this stage, from 0.
        count: of stages, at most as many as there are layers.

    Raises:
        ValueError: for an output layer that is tied to the embeddings: two ranks would train them
            apart; for a stage that is none of as many, or more of them than layers.
    """

    @checked
    def __init__(self, model: PreTrainedModel, index: Whole[0], count: Whole[1]) -> None:
        super().__init__()
        if model.lm_head.weight is model.get_input_embeddings().weight:
            raise ValueError(
                "the output layer is tied to the embeddings, which stand on another stage; give it "
                "weights of its own first"
            )
        body, depth = model.model, len(model.model.layers)
        if not index < count <= depth:
            raise ValueError(
                f"stage {index} of {count} is none of a model of {depth} layers; give an index "
                f"below the count, and at most {depth} stages"
            )
        bounds = [depth * i // count for i in range(count + 1)]
        self.first = body.embed_tokens if index == 0 else None
        self.layers = body.layers[bounds[index] : bounds[index + 1]]
        self.rotary = body.rotary_emb
        self.last = nn.Sequential(body.norm, model.lm_head) if index == count - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Token ids or hidden states in, hidden states or logits out."""
        hidden = self.first(x) if self.first else x
        positions = torch.arange(x.shape[1], device=x.device)[None]
        turns = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_ids=positions, position_embeddings=turns)
        return self.last(hidden) if self.last else hidden


def passes(module: nn.Module) -> list[str]:
    """A list that grows as a module runs: F1 is its first forward pass, B1 the backward pass to it.

    Clear it to begin again.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> order = passes(layer)
        >>> first, second = layer(torch.ones(1)), layer(torch.ones(1))
        >>> second.backward(), first.backward()
        (None, None)
        >>> order
        ['F1', 'F2', 'B2', 'B1']
    """
    order: list[str] = []

    def note(module, inputs, output: Tensor) -> None:
        number = 1 + sum(step.startswith("F") for step in order)
        order.append(f"F{number}")
        if output.requires_grad:
            output.register_hook(lambda gradient: order.append(f"B{number}"))

    module.register_forward_hook(note)
    return order
