# %% [markdown]
# # 04 · Exercises: PPO with QLoRA adapters
#
# **Run time** about half a minute on two CPU cores · **Your time** about 50 minutes · **Before this**
# lesson 04
#
# You train two roles on one base in the safe order, shape the reward of each token, and predict what four
# roles cost in memory. The check below each function names the likely mistake; the cells after it go on
# with a reference version, so that Run All works with nothing filled in, or with a wrong answer; only an
# error in your code stops it. To compare with the solution, run
# `nbdiff-web exercises/04_ppo_qlora.ipynb solutions/04_ppo_qlora.ipynb` in the course's folder.

# %%
import warnings

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from rlhf_helpers import checks, memory
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.text import load_tokenizer

# %%
preset = PRESETS["pocket"]  # always: every number below is about this model
tokenizer = load_tokenizer(preset)
roles = Roles(load_base(preset))
roles.load("reference", find_adapter(preset, "sft"))
roles.load("reward", find_adapter(preset, "reward"))
roles.add("policy", copy_of="reference")
roles.add("value", copy_of="reward")

# %% [markdown]
# ## 1 · One role after the other
#
# ●●○ · 20 minutes
#
# First in plain PEFT, without `Roles`: a tiny model with two adapters, `policy` and `value`, which share no
# trained weight.

# %%
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks so
from peft import LoraConfig, get_peft_model

sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
tiny = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(LlamaForCausalLM(tiny), lora, adapter_name="policy")
model.add_adapter("value", lora)

# %% [markdown]
# Each role gets a forward pass and some loss, and we count the matrices that have a gradient afterwards.


# %%
def loss_as(role: str) -> Tensor:
    model.set_adapter(role)
    return model(torch.tensor([[3, 14, 15, 9]])).logits.square().mean()


def report(order: str) -> None:
    for role in ("policy", "value"):
        own = [p for name, p in model.named_parameters() if f".{role}." in name]
        print(f"{order:12} {role:7} {sum(p.grad is not None for p in own)} of {len(own)}")
    model.zero_grad()


# %% [markdown]
# <details><summary><b>Predict before you run.</b> Both forward passes, then one backward pass through the
# sum of the losses, as one does with two separate models. Each adapter has 28 matrices. How many of them
# get a gradient in each role, and does PEFT warn?</summary>
#
# The role that was used last gets all 28, the other none, and PEFT does not warn.
# </details>

# %% tags=["nbval-check-output"]
(loss_as("policy") + loss_as("value")).backward()
report("together")
loss_as("policy").backward()
loss_as("value").backward()
report("in turn")

# %% [markdown]
# The policy would never learn, and the loss that you log for it would look as usual. The safe order, which
# also keeps only one graph in memory, is: use a role, compute its loss, go backward, and only then use the
# next role. Write it. Two optimizers, one for each role, may step right away or at the end; no weight
# belongs to both.


# %% tags=["nbval-check-output"]
def train_step(roles, losses, optimizers) -> None:
    """One step of every trained role on its own loss.

    Args:
        roles: as in the lesson; `roles.use(role)` makes a role the active one and returns the model.
        losses: for each role that is trained, and no other, a function: it takes the model, which
            acts as that role, and returns the loss, a scalar tensor; it may be negative.
        optimizers: for the same roles, an optimizer of that role's parameters, head included.

    Gradients that are there before the call do not count, and none are clipped. Nothing is returned.
    """
    ### BEGIN SOLUTION
    for role, loss_of in losses.items():
        optimizers[role].zero_grad()
        loss = loss_of(roles.use(role))
        loss.backward()
        optimizers[role].step()
    ### END SOLUTION


checks.check_train_step(train_step)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# One loop over the roles that have a loss. A backward pass *adds* to the gradients that are there, so
# clear a role's gradients before its backward pass, and never between that pass and its step.
# </details>

# %% [markdown]
# From here on we use the reference version. Now the four roles of the pocket world, on a few responses of
# the policy. The losses are stand-ins that fit on a line: the policy learns to repeat what it said, the
# critic to say 0 everywhere.

# %%
from rlhf_helpers.checks.lesson_04 import train_step

prompts = ["what does the duck say?", "where does the frog live?"]
rollout = sample_responses(roles.use("policy"), tokenizer, prompts, seed=1)
batch = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask}
real, T = rollout.response_mask.bool(), rollout.response_mask.shape[1]

# %%
losses = {
    "policy": lambda model: -response_logprobs(model, **batch, response_length=T)[real].mean(),
    # reads the head through roles; the argument is not needed
    "value": lambda model: roles.values("value", **batch).square().mean(),
}
trained = {role: list(roles.parameters(role).values()) for role in losses}
optimizers = {role: torch.optim.Adam(trained[role], lr=0.001) for role in losses}

# %% [markdown]
# <details><summary><b>Predict before you run.</b> Three steps of Adam at a learning rate of 0.001. Which of
# the four roles move, and how far at most does a weight go?</summary>
#
# Policy and value, by about 0.003: Adam's steps are at most about as long as the learning rate. The
# reference and the reward model do not move at all, though the policy began as a copy of the one and the
# critic as a copy of the other, and all four share a base.
# </details>

# %%
before = {role: roles.state(role) for role in roles.names}
for _ in range(3):
    train_step(roles, losses, optimizers)
for role in roles.names:
    after = roles.state(role)
    moved = max((after[key] - before[role][key]).abs().max().item() for key in after)
    print(f"{role:10} largest change of a weight: {moved:.4f}")
    assert (moved > 0) == (role in losses)

# %% [markdown]
# And the wrong order, with `Roles`? It watches over every backward pass:

# %% tags=["nbval-check-output"]
policy_loss = losses["policy"](roles.use("policy"))
value_loss = losses["value"](roles.use("value"))
try:
    (policy_loss + value_loss).backward()
except RuntimeError as error:
    print(f"RuntimeError: {error}")

# %% [markdown]
# **In words.** Policy and value share no trained weight, and PyTorch keeps the graph of each forward pass.
# Why does the policy get no gradient when the backward pass comes after the switch? What does a switch
# change besides the adapter that computes, and when does autograd look at that?

# %% [markdown] tags=["solution"]
# Because of `requires_grad`. One adapter is active at a time, and PEFT switches `requires_grad` off for all
# others. The graph of the policy's forward pass is still there, and gradients flow through it; but autograd
# looks at the flag in the backward pass, and at the leaves, the policy's A and B, it is off by then: the
# gradient is dropped without a word. With activation checkpointing it is worse: the forward pass is
# computed again, through whichever adapter is active then, so that gradients can be wrong instead of
# missing.

# %% [markdown]
# ## 2 · The reward of each token
#
# ●●○ · 15 minutes
#
# The reward model gives a whole response one score $s$. PPO needs a reward for each token $x_t$. The policy
# $\pi$ pays at every token for leaving the reference $\pi_{\text{ref}}$, at a price of $\beta$ for each
# nat; at the last real token, EOS if the response has ended, the score is added:
#
# $$r_t = -\beta\,\bigl(\log \pi(x_t) - \log \pi_{\text{ref}}(x_t)\bigr) + [t \text{ is last}]\; s$$
#
# where $[\ldots]$ is 1 if that is true and 0 if not. By hand, with $\beta = 0.1$ and $s = 2$: two tokens
# had probability $(0.5, 0.2)$ under the policy and $(0.25, 0.4)$ under the reference, and one token of
# padding follows. The log-ratios are $(\log 2, -\log 2) = (0.693, -0.693)$, so
# $r = (-0.069,\; 0.069 + 2,\; 0) = (-0.069, 2.069, 0)$: the second token gets something back.


# %% tags=["nbval-check-output"]
def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """The reward of each token: the KL penalty everywhere, the score at the last real token.

    Args:
        scores: [B], float32, one for each response.
        logprobs, ref_logprobs: [B, T], of the sampled tokens, in nats; at padding any finite
            numbers. Without gradient, as scores.
        response_mask: [B, T], int64, 1 up to and including EOS, then 0.
        beta: β, at least 0.

    Returns:
        [B, T], 0 at padding; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    rewards = -beta * (logprobs - ref_logprobs) * response_mask
    last = response_mask.sum(dim=1) - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards
    ### END SOLUTION


checks.check_shape_rewards(shape_rewards)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# First the penalty for all tokens at once, then set padding to 0. Where is the last real token of a row?
# The mask has a 1 for each token from the front; count them. Then one index for each row and one for each
# column picks one entry of every row.
# </details>

# %% [markdown]
# From here on we use the package's version. What would the SFT model pay if it were the policy and the
# pretrained base its reference? A new adapter has B = 0 and answers as the base does.

# %%
from rlhf_helpers.ppo import shape_rewards

roles.add("base", trainable=False)
rollout = sample_responses(roles.use("reference"), tokenizer, prompts * 32, seed=1)
batch = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask}
mask, T = rollout.response_mask, rollout.response_mask.shape[1]
with torch.no_grad():
    sft = response_logprobs(roles.use("reference"), **batch, response_length=T)
    base = response_logprobs(roles.use("base"), **batch, response_length=T)

# %% [markdown]
# <details><summary><b>Predict before you run.</b> Which token of a response pays the most: the first word,
# the word that answers the question, or EOS?</summary>
#
# EOS, by far. The base has seen text that goes on after a sentence; stopping after the answer is what SFT
# has taught. The words themselves are nearly as likely under the base.
# </details>

# %%
rewards = shape_rewards(torch.ones(len(mask)), sft, base, mask, beta=0.1)
print("token        SFT    base   log-ratio   reward (score 1, β = 0.1)")
for t in range(int(mask[0].sum())):
    token = tokenizer.decode(rollout.input_ids[0, t - T]).strip()
    ratio = (sft - base)[0, t]
    print(f"{token:8}{sft[0, t]:z8.2f}{base[0, t]:z8.2f}{ratio:z12.2f}{rewards[0, t]:z9.3f}")

# %% [markdown]
# That is one response. Of what all 64 pay, how much is paid at the last token?

# %%
log_ratio = (sft - base) * mask
last = mask.cumsum(1) == mask.sum(1, keepdim=True)
share = log_ratio[last & mask.bool()].sum() / log_ratio.sum()
print(f"{share:.0%} of {log_ratio.sum() / len(mask):.1f} nats per response")
assert share > 0.5

# %% [markdown]
# So SFT is not far from the base, and nearly all of the distance is one thing: SFT stops. The last token
# gets the score as well, and the two must be added: had the score *replaced* the penalty there, most of the
# KL would have been free.
#
# **In words.** A token that the reference likes better than the policy does gets something back. (The mean
# of the log-ratio over samples of the policy is the KL to the reference, which is never negative; lesson
# 05.) Can a policy earn something with the penalty alone, by choosing such tokens?

# %% [markdown] tags=["solution"]
# Not on average. To choose a token often is to give it a high probability; the tokens that pay something
# back are those that the policy seldom samples. Over its own samples the mean of the log-ratio is the KL,
# which is never negative, and 0 only where policy and reference agree. Single tokens and single responses
# can earn something, by luck; the expected penalty is a cost.

# %% [markdown]
# ## 3 · What four roles cost
#
# ●●○ · 15 minutes
#
# There is one base, frozen. Its $N$ weights in linear layers are in NF4 with double quantization, 4.127
# bits each; the $M$ others (embeddings, norms and biases) take 2 bytes each. Each role has an adapter of
# rank $r$ on all linear layers, A of $r \times \text{in}$ and B of $\text{out} \times r$: $L$ parameters in
# float32. A trained role needs 16 bytes for each of them (weight, gradient and Adam's two moments), a
# frozen one 4.
#
# $$\text{bytes} = \frac{4.127}{8} N + 2 M + (16\, n_{\text{trained}} + 4\, n_{\text{frozen}})\, L,
# \qquad L = r \sum_{\text{layers}} (\text{in} + \text{out})$$
#
# By hand: one layer of 64 × 64, 100 other weights, rank 1, a trained policy and a frozen reference.
# $N = 4096$ takes 2113 bytes, $M$ takes 200, and with $L = 64 + 64 = 128$ the adapters take
# $(16 + 4) \cdot 128 = 2560$: 4873 bytes. Scalar heads, a few thousand parameters, are left out.


# %% tags=["nbval-check-output"]
def predict_bytes(shapes: list, layers: int, other: int, rank: int, trains: dict) -> float:
    """Bytes of the base and of all roles' adapters, gradients and moments, within 5%.

    Args:
        shapes: (out, in) of each linear layer of one block.
        layers: blocks of the model, all alike.
        other: M, the weights outside of linear layers.
        rank: r.
        trains: for each role whether it is trained, such as {"policy": True, "reference": False}.
    """
    ### BEGIN SOLUTION
    weights = layers * sum(outputs * inputs for outputs, inputs in shapes)
    adapter = layers * sum(rank * (outputs + inputs) for outputs, inputs in shapes)
    adapters = sum(16 if trained else 4 for trained in trains.values()) * adapter
    return 4.127 / 8 * weights + 2 * other + adapters
    ### END SOLUTION


checks.check_predict_bytes(predict_bytes)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Name three numbers first: the weights of all linear layers, the parameters of one adapter, and what a
# parameter of each role costs, added up. Note that the shapes are those of one block. The check allows 5%:
# the scales of NF4 make up 3%, so 4 bits would do; 4.5, without double quantization, would not.
# </details>

# %% [markdown]
# From here on we use the reference version. A model of 1.5 billion parameters, with the sizes of
# Qwen2.5-1.5B: width 1536, 28 blocks, 12 heads, 2 of keys and values, and 151,936 tokens, whose embeddings
# serve as the output layer too.

# %%
from rlhf_helpers.checks.lesson_04 import predict_bytes

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMES += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")


def qwen_sizes(*numbers) -> memory.ModelSizes:
    return memory.model_sizes(Qwen2Config(**dict(zip(NAMES, numbers, strict=True))))


sizes = qwen_sizes(1536, 8960, 28, 12, 2, 151_936, True)

# %% [markdown]
# <details><summary><b>Predict before you run.</b> Four full models take 56 GB. What do four roles of rank
# 16 on one NF4 base take, to the nearest GB? And which takes more, the base's linear layers in NF4 or all
# four adapters?</summary>
#
# 2 GB. The linear layers, 1.3 billion weights at half a byte, take 0.7 GB; the adapters, 18 million
# parameters at 2 · 16 + 2 · 4 = 40 bytes, also 0.7, a little more. The embeddings take another 0.5.
# </details>

# %% tags=["nbval-check-output"]
trains = {"policy": True, "reference": False, "reward": False, "value": True}
predicted = predict_bytes(sizes.shapes[:7], 28, sizes.other, rank=16, trains=trains)
exact = sum(row.total for row in memory.memory_table(sizes, rank=16)["LoRA on 1 NF4 base"])
print(f"{sizes.parameters:,} parameters")
print(f"predicted {predicted / 1e9:.3f} GB, memory_table {exact / 1e9:.3f} GB")
assert abs(predicted / exact - 1) < 0.05

# %% [markdown]
# Which of the four ways fit into 15 GB, about what a T4 has? We add two other sizes of the same family.
#
# <details><summary><b>Predict before you run.</b> For the smallest model, which way does not fit? For the
# largest, which one does?</summary>
#
# Four full models do not fit even at 0.5B. At 7B only the NF4 base does: a single base in 16 bits takes 15
# GB for its weights alone.
# </details>

# %% tags=["nbval-check-output"]
small = qwen_sizes(896, 4864, 24, 14, 2, 151_936, True)
large = qwen_sizes(3584, 18944, 28, 28, 4, 152_064, False)
tables = [memory.memory_table(each, rank=16) for each in (small, sizes, large)]
print(f"{'GB':20}{'0.5B':>8} {'1.5B':>8} {'7B':>8}")
for way in tables[0]:
    totals = [sum(row.total for row in table[way]) / 1e9 for table in tables]
    print(f"{way:20}" + "".join(f"{x:8.1f}{' *'[x > 15]}" for x in totals).rstrip())
print("* more than 15 GB")

# %% [markdown]
# Four full models take 22, 30 and 37 times what the last line does: in a larger model the adapters are a
# smaller part, and sharing and four bits save more.
#
# **In words.** The 1.5B model with four bases takes 13 of 15 GB. Would you start PPO that way, with 8
# responses of 512 tokens in each step?

# %% [markdown] tags=["solution"]
# No. The table holds only what is there all the time. Logits of one such batch, in float32, are 8 · 512 ·
# 151,936 numbers of 4 bytes: 2.5 GB, more than the 1.9 GB that are left, and the log-softmax and its
# gradient are tensors of the same size. Activations and the cache of keys and values come on top. On one NF4 base
# there are 13 GB left for all of that.
