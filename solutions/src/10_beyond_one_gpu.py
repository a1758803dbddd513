# %% [markdown]
# # 10 · Exercises: beyond one GPU
#
# **Run time** about half a minute on two CPU cores · **Your time** about 60 minutes · **Before this**
# lesson 10
#
# You write what the ranks of a group must tell each other so that together they compute what one process does, and you
# count what they hold and send. The check below each function names the likely mistake; the cells after it go on with a
# reference version, so that Run All works with nothing filled in, or with a wrong answer; only an error in your code
# stops it. To compare with the solution, run `nbdiff-web exercises/10_beyond_one_gpu.ipynb
# solutions/10_beyond_one_gpu.ipynb` in the course's folder.

# %%
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_helpers import checks, notebook
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.ranks import spawn

# %%
preset = PRESETS["pocket"]  # always: every number below is about this model
notebook.start(preset)

# %% [markdown]
# ## 1 · Whitening over ranks
#
# ●●○ · 15 minutes
#
# Your function runs on every rank, each with its own entries `x` `[N]` and their mask. `all_sum(value)` takes a number or a
# tensor from each rank and gives the sum to all of them; all ranks must call it equally often, in the same order. To
# whiten, take off the mean of *all* entries that count, and divide by $\sqrt{s^2 + 10^{-8}}$, with $s^2$ their unbiased
# variance.
#
# By hand: rank 0 has 1, 2 and 6, rank 1 has 5 and 1. These five have the sum 15 and the mean 3; the squares around it are
# 4, 1, 9, 4 and 4, so $s^2 = 22/4 = 5.5$, and the 6 becomes $3/\sqrt{5.5} = 1.279$.


# %% tags=["nbval-check-output"]
def whiten_over_ranks(x: Tensor, mask: Tensor, all_sum: Callable) -> Tensor:
    """This rank's entries, whitened with mean and variance over all ranks.

    Args:
        x: [N], floating point.
        mask: [N], int64, 1 where an entry counts, at least one on each rank.
        all_sum: the sum over all ranks of a number or a tensor.

    Returns:
        [N], 0 where the mask is 0; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    real = mask.bool()
    count, total = all_sum(real.sum()), all_sum(x[real].sum())
    centred = (x - total / count).masked_fill(~real, 0)
    variance = all_sum(centred.square().sum()) / (count - 1)
    return centred / (variance + 1e-8).sqrt()
    ### END SOLUTION


checks.check_whiten_over_ranks(whiten_over_ranks)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# How many are there in all, and what is their sum? Only then can the squares be summed, around the mean of all.
# </details>
#
# **In words.** One round of messages could do it, $\sum 1$, $\sum x$ and $\sum x^2$ at once. Why is that a bad idea in
# float32 for numbers with a large mean and a small spread?

# %% [markdown] tags=["solution"]
# The variance is then the difference of two large numbers that are nearly equal, $\sum x^2/n$ and $\mu^2$. With values
# around 1,000 and a spread of 0.1 the squares are about a million, where float32 has steps of 0.06, and the variance is
# 0.01: what is left is rounding error, and may be below 0. A second round costs one more message, and no more numbers.

# %% [markdown]
# ## 2 · A log-softmax over a split vocabulary
#
# ●●● · 20 minutes
#
# Each rank has the logits `[T, V/W]` of its columns; `first` is the id of the first of them. The ids in `tokens` `[T]` are
# of the whole vocabulary, the same on all ranks. `all_max` works like `all_sum`, and the order of all calls together must
# be the same on all ranks. All of them return the same `[T]`:
#
# $$\log \pi(a) = z_a - m - \log \sum_v e^{z_v - m}, \qquad m = \max_v z_v.$$
#
# By hand: rank 0 has the logits 1 and 2, rank 1 has 6 and 4, and the token is 3, the last. So $m = 6$, the sum is
# $e^{-5} + e^{-4} + 1 + e^{-2} = 1.160$, and $4 - 6 - \log 1.160 = -2.149$.


# %% tags=["nbval-check-output"]
def split_logprobs(
    logits: Tensor, tokens: Tensor, first: int, all_max: Callable, all_sum: Callable
) -> Tensor:
    """Log-probabilities of tokens of the whole vocabulary, the same on all ranks.

    Args:
        logits: [T, V/W], this rank's columns.
        tokens: [T], int64.
        first: id of this rank's first column.
        all_max, all_sum: the maximum and the sum over all ranks, entry by entry.

    Returns:
        [T], in nats.
    """
    ### BEGIN SOLUTION
    top = all_max(logits.max(dim=-1).values)
    total = all_sum((logits - top[:, None]).exp().sum(dim=-1))
    width = logits.shape[-1]
    here = (tokens >= first) & (tokens < first + width)
    column = (tokens - first).clamp(0, width - 1)
    own = logits.gather(-1, column[:, None])[:, 0] * here
    return all_sum(own) - top - total.log()
    ### END SOLUTION


checks.check_split_logprobs(split_logprobs)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Which ranks have the token's logit? What must the others bring to the sum?
# </details>
#
# From here on we use the package's version, on two real processes, each with half of a vocabulary of 1,258:

# %%
logits = torch.randn(3, 1258, generator=torch.Generator().manual_seed(0)) * 4
tokens = torch.tensor([7, 628, 1257])


# %%
def halves(logits, tokens):
    import torch.distributed as dist

    from rlhf_helpers.ranks import split_logprobs

    rank, half = dist.get_rank(), logits.shape[-1] // 2
    return split_logprobs(logits[:, rank * half : (rank + 1) * half], tokens, first=rank * half)


# %%
whole = logits.log_softmax(-1)[range(3), tokens]
for rank, found in enumerate(spawn(halves, 2, 600, logits, tokens)):
    print(f"rank {rank}: at most {(found - whole).abs().max().item():.1e} from one process")
    assert torch.allclose(found, whole, atol=1e-5)

# %% [markdown]
# **In words.** The gradient of $\log \pi(a)$ with respect to a logit $z_v$ is $1[v = a] - \pi(v)$. What does a rank need
# for its own columns, and how many further messages does a backward pass that is written by this formula take?

# %% [markdown] tags=["solution"]
# It needs $\pi(v) = e^{z_v - m}/S$ for its columns, with $m$ and the sum $S$ known from the forward pass, and whether $a$
# is one of them. So no further message. (One comes later: the hidden states were the same on all ranks, and their gradient
# is the sum of what each rank's columns give back.)

# %% [markdown]
# ## 3 · What a rank holds
#
# ●○○ · 10 minutes
#
# Full fine-tuning in bfloat16 with Adam: for each parameter 2 bytes of weight, 2 of gradient, and 12 of the optimizer (two
# moments in float32 and a float32 copy of the weight). ZeRO cuts them by the number of ranks, in stages: 1, the optimizer;
# 2, the gradients as well; 3, also the weights (that is FSDP). Stage 0 is DDP, which cuts nothing.
#
# By hand: 800 parameters on four ranks in stage 2 are $2 \cdot 800 + (2 + 12) \cdot 800/4 = 4{,}400$ bytes.


# %% tags=["nbval-check-output"]
def rank_bytes(parameters: int, world_size: int, stage: int) -> float:
    """Bytes that one rank holds.

    Args:
        parameters: of the model.
        world_size: how many ranks there are.
        stage: of ZeRO, 0 to 3.

    Returns:
        A number of bytes.
    """
    ### BEGIN SOLUTION
    weights, gradients, optimizer = 2 * parameters, 2 * parameters, 12 * parameters
    if stage >= 1:
        optimizer /= world_size
    if stage >= 2:
        gradients /= world_size
    if stage >= 3:
        weights /= world_size
    return weights + gradients + optimizer
    ### END SOLUTION


checks.check_rank_bytes(rank_bytes)

# %% [markdown]
# ## 4 · What a rank sends
#
# ●●○ · 10 minutes
#
# To sum a tensor of $x$ bytes into parts, one on each rank, a rank sends what it has of every part but its own: $x(W-1)/W$.
# Gathering a whole from its parts takes as much, and an all-reduce is one of each. `weights` are the bytes of all weights;
# the gradients have as many.
#
# - Stages 0, 1 and 2: one all-reduce of the gradients, or, at the same price, the gradients summed into parts and the new
#   weights gathered.
# - Stage 3: the weights are gathered before forward, and again before backward; the gradients are summed into parts. (The
#   lesson's table has a little less, since what is outside of the layers is gathered once.)
#
# By hand: 800 bytes on four ranks are $2 \cdot 800 \cdot 3/4 = 1{,}200$ in stage 0, and 1,800 in stage 3.


# %% tags=["nbval-check-output"]
def sent_bytes(weights: int, world_size: int, stage: int) -> float:
    """Bytes that one rank sends in a step.

    Args:
        weights: bytes of all weights.
        world_size: how many ranks there are.
        stage: of ZeRO, 0 to 3.

    Returns:
        A number of bytes.
    """
    ### BEGIN SOLUTION
    passes = 3 if stage == 3 else 2
    return passes * weights * (world_size - 1) / world_size
    ### END SOLUTION


checks.check_sent_bytes(sent_bytes)

# %% [markdown]
# From here on we use the reference versions, for a model of 7B:

# %% tags=["nbval-check-output"]
from rlhf_helpers.checks.lesson_10 import rank_bytes, sent_bytes

parameters = 7_000_000_000
print("GB        " + "".join(f"{f'{ranks} ranks':>18}" for ranks in (2, 8, 64)))
for stage in range(4):
    row = [
        (rank_bytes(parameters, w, stage), sent_bytes(2 * parameters, w, stage)) for w in (2, 8, 64)
    ]
    print(f"stage {stage}:  " + "".join(f"{h / 1e9:8.1f}, sent{s / 1e9:5.1f}" for h, s in row))

# %% [markdown]
# **In words.** You have eight GPUs of 80 GB. Which stage do you take for full fine-tuning of 7B, and why? Is there one for
# 70B? And what for the course's own way, four roles as adapters on one NF4 base of 7B, which takes 5.5 GB?

# %% [markdown] tags=["solution"]
# 7B: stage 0 needs 112 GB and does not fit; stage 1 takes 38.5 GB and stage 2 26 GB, and neither sends more than stage 0.
# So stage 2, which leaves the most room for activations at that price; stage 3 would send half as much again to free 12 GB
# more. 70B in stage 3 is 140 GB on each of eight, and does not fit either: take more GPUs, or adapters. The roles on NF4
# fit on each GPU as they are: data parallel, where only the adapters' gradients are sent.
