# %% [markdown]
# # 10 · Beyond one GPU, with the engines that exist
#
# **Run time** about a minute on two CPU cores · **Before this** lessons 03, 04 and 09 ·
# **Exercise** `exercises/10_beyond_one_gpu.ipynb`
#
# After this lesson you will be able to
#
# - say what must be *equal* when work is shared by several processes, and check it on a laptop;
# - find the two means that go wrong first: whitening on each rank by itself, and a mean of means;
# - read what FSDP, tensor parallelism and a pipeline cut, and what they send for it;
# - start TRL's trainers on several processes, and say when to leave this course for other engines.

# %%
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import LlamaConfig

from rlhf_helpers import memory, notebook, parallel, plots
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.logprobs import token_logprobs
from rlhf_helpers.losses import whiten
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.ranks import spawn

# %%
preset = PRESETS["pocket"]  # always: every number below is about this model
notebook.start(preset)
LIMIT = 300  # seconds that two processes may take; then they are ended
torch.set_num_threads(1)  # as many as each of them has, so that sums are rounded alike

# %% [markdown]
# ## Ranks
#
# A job on many GPUs is many processes that run one program. Each has a number, its **rank**, and its own memory; what one
# knows of another was sent to it. The message that matters most is the **all-reduce**: each rank brings a tensor, and each
# gets the sum. On CPUs the library that carries it is gloo, on NVIDIA's GPUs it is NCCL; the program is the same.
#
# `spawn` starts such processes from a notebook, hands back what the function returned on each, and leaves none running. The
# function runs in another process, so it imports what it needs.


# %%
def greet(numbers):
    import torch.distributed as dist

    from rlhf_helpers.ranks import all_sum

    mine = numbers[dist.get_rank()]
    return f"rank {dist.get_rank()} of {dist.get_world_size()}: {mine}, in all {all_sum(mine)}"


# %%
print(*spawn(greet, 2, LIMIT, torch.tensor([3.0, 4.0])), sep="\n")

# %% [markdown]
# Two processes, two numbers, the same sum on both. Most of this lesson is made of such sums, and all of it of one question:
# *is the result what one process gives?*
#
# ## Two means that go wrong
#
# Rank 0 has an answer of three tokens, with losses of 1, 2 and 6; rank 1 has one of two tokens, with 5 and 4.
#
# <details><summary><b>Predict before you run.</b> Each rank takes the mean over its own tokens, and the two means are
# averaged, as data-parallel engines by default average gradients. What comes out, and what should?</summary>
#
# (3 + 4.5)/2 = 3.75, while the mean over all tokens is 18/5 = 3.6. A token of the short answer counts one and a half times
# as much as one of the long answer.
# </details>


# %%
def means(values, mask):
    import torch.distributed as dist

    from rlhf_helpers.losses import whiten
    from rlhf_helpers.parallel import mean_over_ranks, whiten_over_ranks
    from rlhf_helpers.ranks import all_sum

    x, real = values[dist.get_rank()], mask[dist.get_rank()]
    mean = x[real == 1].mean()
    of_means = all_sum(mean) / dist.get_world_size()
    averages = {"mean of means": of_means, "over all": mean_over_ranks(mean, real.sum())}
    whitened = {
        "each rank by itself": whiten(x, real),
        "over all ranks": whiten_over_ranks(x, real),
    }
    return averages, whitened


# %%
values = torch.tensor([[1.0, 2.0, 6.0, 0.0], [5.0, 4.0, 0.0, 0.0]])
mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
for rank, (averages, whitened) in enumerate(spawn(means, 2, LIMIT, values, mask)):
    print(f"rank {rank}:", {name: round(x.item(), 3) for name, x in averages.items()})
    for name, x in whitened.items():
        print(f"   whitened, {name:20}", [round(v, 2) for v in x[mask[rank] == 1].tolist()])
torch.testing.assert_close(whitened["over all ranks"], whiten(values, mask)[1])

# %% [markdown]
# In the right mean each rank's mean is weighted by its number of tokens, $L = \sum_r \frac{n_r}{\sum_s n_s} L_r$, so the
# ranks first tell each other $n_r$. Whitening (take the numbers for advantages) needs two more sums, $\sum x$ and then
# $\sum (x - \mu)^2$. Look at rank 1: by itself it calls its 4 the worst there is, and pushes it down nearly as hard as rank
# 0 its 1. Over all ranks a 4 is above average.
#
# Neither mistake stops a run or shows in a log. The first makes the tokens louder on ranks that have few of them, the
# second measures each rank with its own ruler.
#
# ## PPO on two ranks
#
# **Data parallel**: each rank has the whole model and a share of the rows. Little changes. The rows of each minibatch are
# shared out; each rank samples its own answers, with its own seed; advantages are whitened over all ranks; a rank's loss is
# weighted by its share of the tokens; gradients are *summed* before they are clipped; reports are means over all ranks;
# only rank 0 saves. `parallel.data_parallel` swaps in functions that do this, as the clinic of lesson 07 did with faults:

# %%
for owner, name, new in parallel.REPLACED:
    owner = owner.__name__.removeprefix("rlhf_helpers.")
    print(f"{owner + '.' + name:24} → {new.__name__}")


# %%
def train(adapters, settings, together):
    """Three updates from the shipped adapters; on a rank, or in one process as all ranks."""
    from rlhf_helpers import parallel, ppo
    from rlhf_helpers.base import load_base
    from rlhf_helpers.presets import PRESETS
    from rlhf_helpers.roles import Roles
    from rlhf_helpers.sources import prompt_dataset
    from rlhf_helpers.text import load_tokenizer

    preset, config = PRESETS["pocket"], ppo.PPOConfig(**settings)
    roles = Roles(load_base(preset))
    for role, folder in adapters.items():
        roles.load(role, folder)
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    way = parallel.data_parallel() if together else parallel.sampled_as(2, config)
    prompts = list(prompt_dataset(preset)["prompt"])
    with way:
        history = list(ppo.train_ppo(roles, load_tokenizer(preset), prompts, config))
    rows = [(s.score, s.kl, s.policy["loss"], s.policy["grad_norm"]) for s in history]
    texts = history[0].experience.rollout.texts
    return rows, texts, {role: roles.state(role) for role in roles.names}


# %%
adapters = {"reference": str(find_adapter(preset, "sft"))}
adapters["reward"] = str(find_adapter(preset, "reward"))
settings = {"updates": 3, "batch_size": 16, "minibatch_size": 8, "epochs": 1, "seed": 0}
rows, _, one = train(adapters, settings, False)
ranks = spawn(train, 2, LIMIT, adapters, settings, True)
print(f"{'':10}{'reward':>9}{'KL':>9}{'loss':>11}{'gradient':>10}")
for update, pair in enumerate(zip(rows, ranks[0][0], strict=True), 1):
    for name, (score, kl, loss, norm) in zip(("one", "two"), pair, strict=True):
        print(f"{update} {name:8}{score:9.5f}{kl:9.5f}{loss:11.7f}{norm:10.6f}")


# %%
def trained(states, roles=("policy", "value")):
    """All weights of two adapters in a row."""
    return torch.cat([x.flatten() for role in roles for x in states[role].values()])


two = ranks[0][2]
learnt = (trained(one) - trained(one, roles=("reference", "reward"))).abs()
difference = (trained(one) - trained(two)).abs()
apart, worst = difference.square().mean().sqrt().item(), difference.max().item()
near = (difference < 1e-6).float().mean().item()
print(f"{len(learnt):,} weights of policy and critic, moved by up to {learnt.max().item():.0e};")
print(
    f"one process and two: {apart:.1e} apart (root mean square), {near:.2%} of the weights", end=" "
)
print(f"by less than 1e-6, the worst by {worst:.0e}")
same = torch.equal(trained(two), trained(ranks[1][2]))
print("the two ranks' weights are", "the same bits" if same else "not the same")
for rank, (_, texts, _) in enumerate(ranks):
    print(f"rank {rank} sampled", texts[:2])
assert apart < 1e-6 and same

# %%
fig, ax = plt.subplots(figsize=(7, 2.6))
edges = torch.logspace(-11, -2, 55).tolist()
for x, colour, name in (
    (learnt, "orange", "moved by three updates"),
    (difference, "blue", "one process and two, apart"),
):
    ax.hist(x.clamp(min=edges[0]), edges, color=plots.COLOURS[colour], alpha=0.7, label=name)
ax.set(xscale="log", xlabel="absolute difference of a weight", ylabel="weights")
ax.legend(loc="upper center")
plots.show(
    fig,
    f"Histograms on a logarithmic axis: training moves most weights by about {learnt.median():.0e}; "
    f"one process and two differ by about {difference.median():.0e}, and at most by {worst:.0e}.",
)

# %% [markdown]
# One process that samples the same answers and learns from the whole batch gets the same numbers, up to rounding: sums
# are taken in another order. (The bar at the left edge is no difference at all, or next to none.) The weights that
# differ most had a first gradient of $10^{-8}$ or so, where others have $10^{-4}$, and rounding is a good part of it:
# Adam divides each entry by its own size, and so turns a rounding error of $10^{-9}$ into a visible part of a step of
# $10^{-3}$ (a test looks these weights up). In float64 the difference is gone (a test holds it to $10^{-9}$). Equality
# is the claim, and the way to debug such a trainer: **first make it equal, then make it fast.**
#
# What was sent for each optimizer step: one sum of the *adapters'* gradients, and a few single numbers. The base is frozen
# and needs no message at all, which is why QLoRA is cheap to run in parallel. On real machines `torchrun` starts the
# processes, each with its own GPU:
#
# ```python
# # script.py, for torchrun --nproc_per_node 8 script.py
# with ranks.join("cuda"), parallel.data_parallel():
#     for stats in train_ppo(roles, tokenizer, prompts, config, folder):
#         ...
# ```
#
# On two cores this gains nothing: two ranks with one thread each took 6% longer than one process with two threads
# ([Speed](../docs/speed.md)). Eight GPUs are another matter, which this course has not measured.
#
# SFT, the reward model and DPO share PPO's engine, and run on several ranks in the same way. Without a critic (lesson 09) a
# group of answers must stay on one rank, or its mean would have to be sent too; settings that split a group are refused.
#
# ## When the model does not fit: FSDP
#
# Data parallel keeps everything on each rank. For full fine-tuning of Llama-2-7B that is 16 bytes for each of 6.7 billion
# parameters, 108 GB. **FSDP** (ZeRO stage 3) cuts every tensor into $W$ parts, one for each rank. Before a layer runs, its
# weights are gathered; afterwards they are dropped; its gradients are summed, and each rank keeps its part. The engine is
# torch's own (`fully_shard`). It cannot cut NF4 as this base stores it, in packed bytes, so here the base is unquantized.
#
# <details><summary><b>Predict before you run.</b> This base has four layers, each of which is gathered before forward
# and again before backward; embeddings and norm are one group, which is gathered once. How many all-gathers is that,
# and how many reduce-scatters (gradients summed into parts)?</summary>
#
# 4 + 4 + 1 = 9, and 5.
# </details>


# %%
def fsdp(ids, counted):
    """Loss and gradient of the base on a rank's rows, with everything cut in two."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import CommDebugMode

    from rlhf_helpers import parallel
    from rlhf_helpers.base import load_base
    from rlhf_helpers.logprobs import token_logprobs
    from rlhf_helpers.presets import PRESETS

    base = load_base(PRESETS["pocket"], quantized=False).requires_grad_(True)
    whole, rank = sum(p.numel() for p in base.parameters()), dist.get_rank()
    model, size = parallel.shard(base), dist.get_world_size()
    ids, counted = ids.chunk(size)[rank], counted.chunk(size)[rank]
    with CommDebugMode() as said:
        logprobs = token_logprobs(model(ids).logits[:, :-1], ids[:, 1:])
        loss = -(logprobs * counted).sum() / counted.sum()
        loss = parallel.mean_over_ranks(loss, counted.sum())
        (size * loss).backward()  # the engine averages gradients; ours are to be summed
    kept = sum(p.to_local().numel() for p in model.parameters())
    sent = {str(name).split(".")[-1]: n for name, n in said.get_comm_counts().items()}
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"kept": kept / whole, "sent": sent, "loss": loss.item(), "gradients": gradients}


# %%
generator = torch.Generator().manual_seed(0)
ids = torch.randint(4, 1258, (4, 12), generator=generator)
counted = (torch.arange(11) < torch.tensor([[11], [9], [4], [2]])).float()  # 20 tokens and 6
base = load_base(preset, quantized=False).requires_grad_(True)
logprobs = token_logprobs(base(ids).logits[:, :-1], ids[:, 1:])
loss = -(logprobs * counted).sum() / counted.sum()
loss.backward()
exact = {name: p.grad.clone() for name, p in base.named_parameters()}


# %%
def apart_from_one(gradients):
    """The largest difference to one process, relative to the largest entry of the tensor."""
    pairs = ((g, exact[name]) for name, g in gradients.items())
    return max(((g - e).abs().max() / e.abs().max()).item() for g, e in pairs)


# %%
found = spawn(fsdp, 2, LIMIT, ids, counted)[0]
print(
    f"one process: loss {loss:.6f}; two, each with {found['kept']:.0%}: {found['loss']:.6f};",
    end=" ",
)
print(f"gradients {apart_from_one(found['gradients']):.1e} apart")
print("messages:", found["sent"])
assert apart_from_one(found["gradients"]) < 1e-5
assert found["sent"]["_allgather_base_"] == 9 and found["sent"]["_reduce_scatter_base_"] == 5

# %% [markdown]
# The two all-reduces are ours, of the number of tokens and of the loss. The engine *averages* gradients over ranks: with 20
# tokens on one and 6 on the other that would be the mean of means again, hence the factor `size` in the code.
#
# ## Cutting a matrix: tensor parallelism
#
# The arithmetic of a layer can be cut as well. In $y = W_2\,f(W_1 x)$, the MLP of a transformer, give each rank some *rows
# of $W_1$*, so that it computes some of the inner numbers, and the *columns of $W_2$* that read just those. Nothing is sent
# in between; at the end one all-reduce sums the ranks' parts of $y$. Attention is cut by heads; this base has three, which
# two ranks cannot share equally, so here only the MLP is cut. torch names the cuts after $W^\top$: the first is *colwise*,
# the second *rowwise*.
#
# The output layer is cut along the vocabulary, and then **no rank has all logits**. But a log-probability needs them all:
#
# $$\log \pi(a) = z_a - m - \log \sum_v e^{z_v - m}, \qquad m = \max_v z_v.$$
#
# The maximum and the sum are taken over all ranks; $z_a$ is on one rank, and the others contribute 0.


# %%
def split(hidden, tokens):
    """The MLP of the first layer by torch's engine, then log-probabilities from half a vocabulary."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from rlhf_helpers.base import load_base
    from rlhf_helpers.presets import PRESETS
    from rlhf_helpers.ranks import split_logprobs

    base = load_base(PRESETS["pocket"], quantized=False)
    mlp, mesh = base.model.layers[0].mlp, init_device_mesh("cpu", (2,))
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
    mlp = parallelize_module(mlp, mesh, plan | {"down_proj": RowwiseParallel()})
    with CommDebugMode() as said:
        y = mlp(hidden).clone()  # the engine's own tensor waits for the sum when it is read
    weight = base.lm_head.weight.chunk(2)[dist.get_rank()]  # half of the vocabulary
    logits = y @ weight.T
    logprobs = split_logprobs(logits, tokens, first=dist.get_rank() * len(weight))
    sent = {str(name).split(".")[-1]: n for name, n in said.get_comm_counts().items()}
    return {"y": y, "sent": sent, "logits": tuple(logits.shape), "logprobs": logprobs}


# %%
hidden = torch.randn(2, 5, 192, generator=generator)
tokens = torch.randint(0, 1258, (2, 5), generator=generator)
with torch.no_grad():
    y = base.model.layers[0].mlp(hidden)
    logits = base.lm_head(y)
found = spawn(split, 2, LIMIT, hidden, tokens)[0]
apart_tp = (found["logprobs"] - token_logprobs(logits, tokens)).abs().max().item()
print(f"MLP {(found['y'] - y).abs().max().item():.1e} apart; messages {found['sent']}")
print(f"logits {tuple(logits.shape)} in one process, {found['logits']} on a rank;", end=" ")
print(f"log-probabilities {apart_tp:.1e} apart")
torch.testing.assert_close(found["y"], y, rtol=1e-5, atol=1e-5)
assert apart_tp < 1e-5

# %% [markdown]
# What happens without the shared maximum? Each rank would take off its own, and the sums would not be of the same thing.
# And what if every rank brings a logit, not only the one that has the token's? Here both are done wrong on purpose, in
# one process, step by step: two tokens on each rank, the one asked for on the second.

# %% tags=["nbval-check-output"]
z = torch.tensor([[1.0, 2.0], [6.0, 4.0]])  # a row for each rank; asked for is the 4
own = (z - z.amax(-1, keepdim=True)).exp().sum(-1)  # each less its own maximum
wrong = 4 - z.amax() - own.sum().log()
right = z.flatten().log_softmax(-1)[3]
everywhere = right + z[0, 1]  # rank 0 adds the logit that it has at that column
print(f"right {right:.3f}, own maxima {wrong:.3f}, a logit from every rank {everywhere:.3f}")

# %% [markdown]
# Both wrong numbers are below 0 and look like log-probabilities. Only a comparison with one process gives them away.
#
# ## Cutting the depth: a pipeline
#
# Rank 0 has the first layers, rank 1 the others; hidden states go forward, their gradients back. With the batch in one
# piece one rank would always wait, so it is cut into microbatches. **1F1B** (one forward, one backward): a stage that
# can go backward does so before its next forward, and so holds the activations of only a few microbatches. In this base
# the output layer shares the weights of the embeddings. Two ranks cannot share a tensor, so the output layer first gets
# a copy of its own. In training both gradients would have to be summed at every step, as they are below, or the copies
# would drift apart.


# %%
def pipeline(ids, counted, microbatches):
    """Two stages on two ranks, by torch's schedule; what each did, in which order."""
    import torch
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    from rlhf_helpers import base, parallel, presets

    model = base.load_base(presets.PRESETS["pocket"], quantized=False).requires_grad_(True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    rank = dist.get_rank()
    part = parallel.Stage(model, rank, 2)
    order = parallel.passes(part)

    def share(logits, target):
        """A row's part of the mean over the tokens of all rows."""
        row, real = target.split([ids.shape[1], counted.shape[1]], -1)
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, row[:, 1:, None])[..., 0]
        return -(logprobs * real).sum() / counted.sum()

    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, microbatches, loss_fn=share, scale_grads=False)
    losses, target = [], torch.cat([ids, counted.long()], -1)
    for _ in range(2):  # in its first step the engine also tries out the shapes, with any numbers
        part.zero_grad()
        order.clear()
        schedule.step(ids) if rank == 0 else schedule.step(target=target, losses=losses)
    names = {id(p): name for name, p in model.named_parameters()}
    gradients = {names[id(p)]: p.grad for p in part.parameters()}
    return {"loss": sum(x.item() for x in losses), "order": order, "gradients": gradients}


# %%
stages = spawn(pipeline, 2, LIMIT, ids, counted, 4)
gradients = stages[0]["gradients"] | stages[1]["gradients"]
gradients["model.embed_tokens.weight"] += gradients.pop("lm_head.weight")  # one tensor in the base
print(f"loss {stages[1]['loss']:.6f}, gradients {apart_from_one(gradients):.1e} apart")
for rank, stage in enumerate(stages):
    print(f"rank {rank}:", *stage["order"])
assert gradients.keys() == exact.keys() and apart_from_one(gradients) < 1e-5


# %% [markdown]
# The order that was seen, drawn on a clock on which a forward and a backward step take one tick each (in practice a
# backward takes about two). A step begins when its rank is done with the one before, and has what it needs from the other
# rank.


# %%
def timetable(orders):
    """The tick at which each step begins, for each rank."""
    begun, queues, tick = [{}, {}], [list(order) for order in orders], 0
    while any(queues):
        for rank, queue in enumerate(queues):
            received = queue and (queue[0][0] == "F") == (rank == 1)  # from the other rank
            if queue and (not received or begun[1 - rank].get(queue[0], tick) < tick):
                begun[rank][queue.pop(0)] = tick
        tick += 1
    return begun


# %%
begun = timetable([stage["order"] for stage in stages])
ticks = 1 + max(tick for steps in begun for tick in steps.values())
idle = 1 - sum(map(len, begun)) / (2 * ticks)
fig, ax = plt.subplots(figsize=(7, 1.8))
for rank, steps in enumerate(begun):
    for step, tick in steps.items():
        colour = plots.COLOURS["sky" if step[0] == "F" else "orange"]
        ax.barh(rank, 1, left=tick, color=colour, edgecolor="black")
        ax.text(tick + 0.5, rank, step, ha="center", va="center")
ax.set(yticks=[0, 1], yticklabels=["rank 0", "rank 1"], xlabel="ticks", ylim=(1.5, -0.5))
ax.grid(visible=False)
plots.show(
    fig, f"Four microbatches through two stages in {ticks} ticks; {idle:.0%} of them are idle."
)
world, batches = len(stages), 4
formula = (world - 1) / (batches + world - 1)
print(f"idle: {idle:.0%}; (W − 1)/(k + W − 1) = {formula:.0%}")
assert abs(idle - formula) < 1e-9

# %% [markdown]
# The blank space is the **bubble**. With $W$ stages and $k$ microbatches it is $(W-1)/(k+W-1)$ of the time: more
# microbatches make it smaller, more stages make it larger.
#
# ## What it costs, counted
#
# The table is for full fine-tuning of Llama-2-7B and of a 70B model in bfloat16 on eight GPUs, with 16,384 tokens in a
# step. DDP is plain data parallel; ZeRO-2 also cuts gradients and optimizer, but not the weights; TP and PP are the
# last two cuts. In an all-reduce of $x$ bytes a rank sends at least $2x(W-1)/W$. TP has four all-reduces in each layer,
# two of them forward, and four more for embeddings, output layer and log-probabilities. PP has eight microbatches, each
# sent on and its gradient back; its row is the rank with the embeddings or the output layer.

# %%
wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
wide |= {"num_attention_heads": 64, "num_key_value_heads": 8}
for name, config in (("7B", LlamaConfig()), ("70B", LlamaConfig(**wide))):
    sizes = memory.model_sizes(config)
    table = memory.parallel_table(sizes, config.num_hidden_layers, 8, tokens=16384)
    print(
        f"{name}, {sizes.parameters / 1e9:.1f}B parameters   GB on a rank  messages  GB sent in a step"
    )
    for row in table:
        print(f"  {row.way:24}{row.total / 1e9:14.1f}{row.messages:10}{row.sent / 1e9:14.1f}")

# %% [markdown]
# Compare the rows, but do not read them as seconds: no speed is claimed here, and a message inside a machine is not one
# between two machines. DDP of 70B fits on no GPU. FSDP needs an eighth of that on each, still more than the 80 GB of a
# large GPU: take more of them. It sends half as much again as DDP, whatever the batch. Tensor parallelism sends
# *activations*, in the middle of each layer, while the rank has nothing else to do: keep it inside a machine. A pipeline
# sends least, and waits. Large runs combine them: tensor parallel inside a machine, pipeline or FSDP across machines, data
# parallel on top.
#
# And the four roles of PPO on an NF4 base? For 7B lesson 04 counted 5.5 GB, without activations. They fit on one GPU, so
# nothing has to be cut, and data parallel is enough.
#
# ## The engines
#
# All this exists, maintained by others. TRL's trainers run under `accelerate launch`, and a configuration file says how the
# work is shared. The course's reward model comes along as in lesson 09, whole in each process. `tools/train_trl.py` is that
# lesson's set-up as a script:
#
# | how | command |
# |---|---|
# | one process | `python tools/train_trl.py` |
# | two CPU processes | `accelerate launch --config_file tools/accelerate/two_cpus.yaml tools/train_trl.py` |
# | four GPUs, DeepSpeed ZeRO-2 | the same with `deepspeed_zero2.yaml` and `--preset single_gpu` |
# | four GPUs, FSDP | the same with `fsdp.yaml`, `--preset single_gpu --unquantized` |
#
# The first two run here. The files of the other two pass accelerate's parser, but have not been run; `single_gpu` needs the
# adapters that lessons 01 and 02 train with it. A trap on CPUs: `accelerate launch --cpu --num_processes 2` starts *one*
# process and says nothing.

# %%
tools = Path("../tools")
if (tools / "train_trl.py").is_file():
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [
        "--config_file",
        str(tools / "accelerate/two_cpus.yaml"),
        str(tools / "train_trl.py"),
    ]
    command += ["--steps", "2", "--rows", "8", "--out", str(preset.runs / preset.name / "trl_two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
else:
    print("the tools are in the course's repository; clone it to run this cell")

# %% [markdown]
# **verl** and **OpenRLHF** go further; they need GPUs, and were not run here. Most of the time in RLHF goes into sampling,
# so they sample with an inference engine (vLLM, SGLang) that has its own copy of the policy; after each update the new
# weights are *sent over*. This raises a new question of equality: the engine's log-probabilities differ a little from the
# trainer's, and the ratio of the first step is no longer 1. Recompute them in the trainer, as this course has done since
# lesson 04, or correct for it. Both also place the roles: on which GPUs policy, reference and reward model stand, and who
# waits for whom.
#
# ## The number to take along

# %% tags=["headline"]
print(
    f"two ranks against one process: PPO's weights {apart:.0e} apart after three updates,", end=" "
)
print(f"split log-probabilities {apart_tp:.0e}; bubble {idle:.0%}")

# %% [markdown]
# ## Recap
#
# - Several processes must give what one gives. Make a run equal before you make it fast.
# - Means are over all ranks' tokens: send the counts. Whiten over all ranks.
# - FSDP cuts storage and gathers it again; tensor parallelism cuts the arithmetic; a pipeline cuts the depth. Each has its
#   own kind of message to pay for it.
# - No rank needs all logits: one maximum and two sums are enough.
# - An engine's default is a mean over *ranks*, and a launcher may start fewer processes than you asked for. Print how many.
#
# **Further reading.** Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), sections 3, 5 and 7. Shoeybi et al. 2019,
# Megatron-LM (arXiv 1909.08053), section 3: columns, then rows, and the split vocabulary. Narayanan et al. 2021 (arXiv
# 2104.04473), section 2: 1F1B and the bubble, which they measure against the ideal time, $(W-1)/k$. Sheng et al. 2024,
# HybridFlow (arXiv 2409.19256), which is verl. Hu et al. 2024, OpenRLHF (arXiv 2405.11143).
