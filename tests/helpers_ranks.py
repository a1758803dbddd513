"""What ranks do in the tests of `parallel` and `ranks`, and one process to compare with.

As a script, for torchrun, it does the work on a rank: python helpers_ranks.py FOLDER.
"""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from test_train_ppo import PROMPTS, SETTINGS, new_roles, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_helpers import parallel, ppo, ranks
from rlhf_helpers.base import load_base
from rlhf_helpers.dpo import DPOConfig, train_dpo
from rlhf_helpers.losses import whiten
from rlhf_helpers.ppo import train_ppo
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.reward import RewardConfig, train_reward_model
from rlhf_helpers.roles import Roles
from rlhf_helpers.sft import SFTConfig, mask_prompt, train_sft
from rlhf_helpers.text import load_tokenizer

WORLD = 2
UPDATES = 3
CONFIG = replace(SETTINGS, updates=UPDATES, epochs=1, learning_rate=1e-3)
GROUPS = {"batch_size": 8, "minibatch_size": 4, "group_size": 2}
CONFIGS = {
    "ppo": CONFIG,
    "rloo": replace(CONFIG, advantages="rloo", mean_over="responses", **GROUPS),
    "grpo": replace(CONFIG, advantages="grpo", kl_in="loss", kl_kind="k3", **GROUPS),
}
POCKET = replace(CONFIG, response_length=16)
STEPS = {"steps": UPDATES, "batch_size": 4, "warmup_steps": 1, "eval_every": 2}
LOOPS = ("ppo", "rloo", "grpo", "pocket", "one_step", "unquantized", "sft", "reward", "dpo")
ENGINES = ("fsdp", "tensor", "pipeline")


def tiny_of(folder):
    return load_preset("pocket", model=str(folder / "tiny"))


def training(config):
    """The ranks' context, or that of the one process that must do the same."""
    if dist.is_initialized():
        return parallel.data_parallel()
    return parallel.sampled_as(WORLD, config)


def gradients(roles, names):
    found = {f"{n}/{k}": p.grad for n in names for k, p in roles.parameters(n).items()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


# --- the course's loops ----------------------------------------------------------------------


def numbers(stats):
    """What an update reports, but for its samples and the time."""
    report = {n: getattr(stats, n) for n in ("score", "kl", "beta", "entropy", "length")}
    report |= {"finished": stats.finished, "first_ratio": stats.first_ratio}
    both = (("policy", stats.policy), ("value", stats.value))
    return report | {f"{role}/{n}": x for role, part in both for n, x in part.items()}


def length(prompts, rollout):
    """A reward that is exact in any precision."""
    return rollout.response_mask.sum(-1)


def ppo_run(roles, config, folder=None, stop=None, reward_function=None):
    tokenizer = load_tokenizer(load_preset("pocket"))
    found = {"reports": []}
    with training(config):
        run = train_ppo(roles, tokenizer, PROMPTS, config, folder, reward_function)
        for stats in run:
            found["reports"].append(numbers(stats))
            found["texts"] = stats.experience.rollout.texts
            if stats.update == stop:
                run.close()
                break
    found["gradients"] = gradients(roles, config.trained)
    return found | {"weights": weights(roles, config.trained)}


def pocket_roles():
    roles = Roles(load_base(load_preset("pocket")))
    roles.load("reference", ASSETS / "sft")
    roles.load("reward", ASSETS / "reward")
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    return roles


def examples(count, seed=0):
    """Responses of very unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 20, (count,), generator=generator).tolist()
    ids = [torch.randint(4, 1000, (n,), generator=generator).tolist() for n in sizes]
    return [{"prompt": row[:1], "response": [*row[1:], 1]} for row in ids]


def pairs(count):
    sides = zip(examples(count), examples(count, seed=1), strict=True)
    return [{"chosen": c, "rejected": r | {"prompt": c["prompt"]}} for c, r in sides]


def all_but_last(input_ids, attention_mask, prompt_length):
    """Labels that are not `train_sft`'s own: a response without its EOS."""
    labels = mask_prompt(input_ids, attention_mask, prompt_length)
    return labels.masked_fill(attention_mask.cumsum(1) == attention_mask.sum(1, keepdim=True), -100)


def steps_of(method, roles):
    tokenizer = load_tokenizer(load_preset("pocket"))
    if method == "sft":
        rows = examples(10)
        config = SFTConfig(**STEPS)
        return train_sft(roles, "policy", tokenizer, rows, rows[:3], config, labels=all_but_last)
    data = pairs(10)
    if method == "reward":
        return train_reward_model(roles, "value", tokenizer, data, data[:3], RewardConfig(**STEPS))
    config = DPOConfig(**STEPS)
    return train_dpo(roles, "policy", "reference", tokenizer, data, data[:3], config)


def loop(name, folder):
    """Losses, gradients of the last step, and weights of a run by one of the course's loops."""
    tiny = tiny_of(folder)
    if name in CONFIGS:
        return ppo_run(new_roles(tiny), CONFIGS[name])
    if name == "pocket":
        return ppo_run(pocket_roles(), POCKET)
    if name == "one_step":
        one = replace(POCKET, updates=1, minibatch_size=POCKET.batch_size)
        return ppo_run(pocket_roles(), one)
    if name == "unquantized":
        base = load_preset("pocket", model=str(folder / "tiny"), quantized=False)
        return ppo_run(new_roles(base), replace(CONFIG, updates=1))
    if name == "double":
        roles = new_roles(load_preset("pocket", model=str(folder / "tiny"), quantized=False))
        roles.model.double()
        return ppo_run(roles, CONFIGS["rloo"], reward_function=length)
    roles, role = new_roles(tiny), "value" if name == "reward" else "policy"
    with parallel.data_parallel() if dist.is_initialized() else contextlib.nullcontext():
        stats = list(steps_of(name, roles))
    reports = [{"loss": s.loss or 0.0, "norm": s.grad_norm or 0.0, **s.held_out} for s in stats]
    found = {"reports": reports, "gradients": gradients(roles, (role,))}
    return found | {"weights": weights(roles, (role,))}


# --- torch's engines -------------------------------------------------------------------------


def model_of(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def batch_of(step):
    """Four rows; the first two, which are rank 0's, have 12 tokens that count, the others 5."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 40, (4, 8), generator=generator)
    counted = torch.zeros(4, 7)
    for row, length in enumerate((7, 5, 4, 1)):
        counted[row, :length] = 1
    return ids, counted


def token_loss(logits, ids, counted):
    """Without a check of the logits: a pipeline's engine tries its shapes out with any numbers."""
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(logprobs * counted).sum() / counted.sum()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_of(model):
    named = list(model.named_parameters())
    found = {"gradients": {n: whole(p.grad).detach().clone() for n, p in named}}
    return found | {"weights": {n: whole(p).detach().clone() for n, p in named}}


def one_process():
    """Three updates of a small model with the whole batch."""
    model, losses = model_of(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(UPDATES):
        ids, counted = batch_of(step)
        optimizer.zero_grad()
        loss = token_loss(model(ids).logits, ids, counted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses} | state_of(model)


def fsdp():
    model, losses, rank = parallel.shard(model_of()), [], dist.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(UPDATES):
        ids, counted = (x[2 * rank : 2 * rank + 2] for x in batch_of(step))
        optimizer.zero_grad()
        with CommDebugMode() as said:
            loss = token_loss(model(ids).logits, ids, counted)
            loss = parallel.mean_over_ranks(loss, counted.sum())
            (WORLD * loss).backward()  # the engine averages
        optimizer.step()
        losses.append(loss.item())
    local = sum(p.to_local().numel() for p in model.parameters())
    counts = {str(name).split(".")[-1]: n for name, n in said.get_comm_counts().items()}
    return {"losses": losses, "local": local, "messages": counts} | state_of(model)


CUTS = {"gate_proj": ColwiseParallel, "up_proj": ColwiseParallel, "down_proj": RowwiseParallel}
CUTS = {f"mlp.{name}": style for name, style in CUTS.items()}
CUTS |= {f"self_attn.{x}_proj": ColwiseParallel for x in "qkv"}
CUTS |= {"self_attn.o_proj": RowwiseParallel}


def tensor():
    """Both layers by torch's engine, the vocabulary by `split_logprobs`."""
    model, losses, rank = model_of(), [], dist.get_rank()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {name: style() for name, style in CUTS.items()})
    width = model.config.vocab_size // WORLD
    mine = nn.Parameter(model.lm_head.weight[rank * width : (rank + 1) * width].detach().clone())
    model.lm_head.requires_grad_(False)
    optimizer = torch.optim.SGD(
        [*(p for p in model.parameters() if p.requires_grad), mine], lr=0.1, momentum=0.9
    )
    for step in range(UPDATES):
        ids, counted = batch_of(step)
        optimizer.zero_grad()
        hidden = _ToAll.apply(model.model(ids).last_hidden_state[:, :-1])
        logprobs = ranks.split_logprobs(hidden @ mine.T, ids[:, 1:], first=rank * width)
        loss = -(logprobs * counted).sum() / counted.sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.lm_head.weight.grad = _gathered(mine.grad)
    model.lm_head.weight.data = _gathered(mine.data)
    return {"losses": losses} | state_of(model)


class _ToAll(torch.autograd.Function):
    """The same on all ranks; the gradient is the sum of what each rank's columns give back."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, upstream):
        return ranks.all_sum(upstream)


def _gathered(part):
    parts = [torch.empty_like(part) for _ in range(WORLD)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def pipeline():
    """Two stages, a layer each, and as many microbatches as rows."""
    rank, losses, model = dist.get_rank(), [], model_of()
    part = parallel.Stage(model, rank, WORLD)
    schedule = None
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9)
    for step in range(UPDATES):
        ids, counted = batch_of(step)

        def share(logits, target, counted=counted):
            """A row's part of the mean over all tokens; its target is ids and which count."""
            tokens, real = target[..., :8].long(), target[..., 8:]
            return token_loss(logits, tokens, real) * real.sum() / counted.sum()

        schedule = Schedule1F1B(
            PipelineStage(part, rank, WORLD, torch.device("cpu")),
            n_microbatches=4,
            loss_fn=share,
            scale_grads=False,
        )
        optimizer.zero_grad()
        said = []
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=torch.cat([ids.float(), counted], 1), losses=said)
        optimizer.step()
        losses.append(sum(x.item() for x in said))
    names = {id(p): n for n, p in model.named_parameters()}
    own = [(names[id(p)], p) for p in part.parameters()]
    found = {"gradients": {n: p.grad.clone() for n, p in own}}
    return found | {"losses": losses, "weights": {n: p.detach().clone() for n, p in own}}


# --- sums, and what is refused ---------------------------------------------------------------


def shares():
    """Whitening, a mean, and split log-probabilities, of unequal parts."""
    rank = dist.get_rank()
    values, mask = parts()
    x, real = values[rank], mask[rank]
    loss = (x[real == 1].square()).mean().requires_grad_()
    logits, tokens = vocabulary()
    mine = logits.split([3, 5], -1)[rank].clone().requires_grad_()
    logprobs = ranks.split_logprobs(mine, tokens, first=3 * rank, temperature=0.7)
    (logprobs * torch.arange(6.0).view(2, 3)).sum().backward()
    with parallel.data_parallel():
        returns = torch.full_like(x, 2)[None]
        _, of_equal = ppo.value_loss(x[None], x[None], returns, real[None], 0.2)
    return {
        "level": parallel.whiten_over_ranks(torch.full_like(x, 2), real),
        "explained": of_equal["explained_variance"],
        "whitened": parallel.whiten_over_ranks(x, real),
        "alone": whiten(x, real),
        "mean": parallel.mean_over_ranks(loss, real.sum()).item(),
        "logprobs": logprobs.detach(),
        "gradient": mine.grad,
        "refused": refused(lambda: ranks.split_logprobs(mine, tokens, first=0)),
    }


def parts():
    """Of two ranks: three entries that count, and two."""
    values = torch.tensor([[1.0, 2.0, 6.0, 9.0], [5.0, 4.0, 7.0, 7.0]])
    return values, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, generator=generator) * 3 + 200  # e^200 is no float32
    return logits, torch.tensor([[0, 2, 3], [7, 5, 1]])


def refused(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def bad_input(folder):
    tiny = tiny_of(folder)
    other = new_roles(tiny)
    if dist.get_rank():
        next(iter(other.parameters("value").values())).data[0] += 1
    return {
        "odd": refused(lambda: ppo_run(new_roles(tiny), replace(CONFIG, minibatch_size=1))),
        "groups": refused(
            lambda: ppo_run(new_roles(tiny), replace(CONFIGS["rloo"], minibatch_size=2))
        ),
        "weights": refused(lambda: ppo_run(other, CONFIG)),
        "nf4": refused(lambda: parallel.shard(load_base(tiny))),
        "ranks": refused(lambda: ppo_run(new_roles(tiny), CONFIG, folder=folder / "alone")),
    }


def resumed(folder):
    """Stopped after the first update, and gone on from rank 0's save."""
    ppo_run(new_roles(tiny_of(folder)), CONFIG, folder=folder / "run", stop=1)
    dist.barrier()
    files = sorted(path.name for path in (folder / "run.unfinished").iterdir())
    found = ppo_run(new_roles(tiny_of(folder)), CONFIG, folder=folder / "run")
    return {"files": files, "weights": found["weights"]}


def work(folder):
    """All that needs two ranks, in one go: it is the start of a process that takes the time."""
    rank = dist.get_rank()
    found = {name: loop(name, folder) for name in (*LOOPS, "double")}
    found |= {"shares": shares(), "bad": bad_input(folder), "resumed": resumed(folder)}
    found |= {"fsdp": fsdp(), "tensor": tensor(), "pipeline": pipeline()}
    torch.save(found, folder / f"found-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks.join():
        work(Path(sys.argv[1]))
