# %% [markdown]
# # 01 · Exercises: supervised fine-tuning in 4 bits
#
# **Run time** under half a minute on two CPU cores · **Your time** about 45 minutes · **Before this**
# lesson 01
#
# You write four short functions of lesson 01. The check below each of them names the likely mistake; the
# cells after it use a reference version, so that Run All works with nothing filled in, or with a wrong
# answer; only an error in your code stops it. To compare with the solution, run
# `nbdiff-web exercises/01_sft.ipynb solutions/01_sft.ipynb` in the course's folder.

# %%
from collections.abc import Sequence
from math import ceil, prod

import torch
from torch import Tensor

from rlhf_helpers import checks
from rlhf_helpers.base import load_base
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import sft_dataset
from rlhf_helpers.text import encode_examples, load_tokenizer, pad_examples

# %%
preset = PRESETS["pocket"]  # always: every number below is about this model
torch.manual_seed(preset.seed)
tokenizer = load_tokenizer(preset)

# %% [markdown]
# ## 1 · Mask the prompt
#
# ●○○ · 10 minutes
#
# Prompts fill the first P columns, padded on the left; responses follow, padded on the right. Label
# the response and nothing else; the shift by one belongs to the loss:
#
# `labels[b, t]` = `input_ids[b, t]` where t ≥ P and `attention_mask[b, t]` = 1, else −100.
#
# By hand, one row with P = 2, padding 0 and EOS 1:
#
# | t | 0 | 1 | 2 | 3 | 4 | 5 |
# |---|---|---|---|---|---|---|
# | `input_ids` | 0 | 6 | 8 | 9 | 1 | 0 |
# | `attention_mask` | 0 | 1 | 1 | 1 | 1 | 0 |
# | `labels` | −100 | −100 | 8 | 9 | 1 | −100 |


# %% tags=["nbval-check-output"]
def mask_prompt(input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
    """Labels of the response, EOS included; -100 at the prompt and at padding.

    Args:
        input_ids: [B, P + T], token ids.
        attention_mask: [B, P + T], 1 for a real token, 0 for padding.
        prompt_length: P, the columns that hold the prompts.

    Returns:
        labels, [B, P + T], int64 as the tokens; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    labels[attention_mask == 0] = -100
    return labels
    ### END SOLUTION


checks.check_mask_prompt(mask_prompt)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Two kinds of positions are left out, and each of the two other arguments tells you about one kind. Start
# from a copy of the tokens. One kind is a block of columns, the other is wherever a condition holds;
# PyTorch lets you assign to both. Do you need to know which token is padding, or EOS?
# </details>

# %% [markdown]
# From here on we use the package's version. Two real demonstrations make a batch; a dot stands for an
# ignored label.
#
# <details><summary><b>Predict before you run.</b> Which is the first token with a label, and which the
# last?</summary>
#
# The first is the one right after <code>&lt;|assistant|&gt;</code>, which itself belongs to the prompt.
# The last is <code>&lt;|eos|&gt;</code>, in both rows.
# </details>

# %%
from rlhf_helpers.sft import mask_prompt

rows = sft_dataset(preset).select([4, 6])
examples = encode_examples(tokenizer, rows, preset.prompt_length, preset.response_length)
input_ids, attention_mask, prompt_length = pad_examples(tokenizer, examples)
labels = mask_prompt(input_ids, attention_mask, prompt_length)
for tokens, targets in zip(input_ids, labels, strict=True):
    print("tokens", *[tokenizer.decode(t).strip() for t in tokens])
    print("labels", *["·" if t < 0 else tokenizer.decode(t).strip() for t in targets], end="\n\n")
assert (labels == tokenizer.eos_token_id).sum() == len(rows)

# %% [markdown]
# **In words.** Somebody masks `<|eos|>` together with the padding. The loss falls as before. What do
# the responses look like, and why?

# %% [markdown] tags=["solution"]
# Many do not end. EOS is an action: the model chooses it, or does not. Without its label no gradient ever
# says that a response is over. Worse, the labels that are left after a full stop are all those of
# responses that go on, so the model even unlearns what the base knew. The loss cannot show this, since the
# position where it would show is the one left out.

# %% [markdown]
# ## 2 · The LoRA forward pass
#
# ●●○ · 15 minutes
#
# A frozen linear layer with weight $W$ gets an adapter of two small matrices, $A$ with $r$ rows and $B$
# with $r$ columns (this $B$ is not the batch size):
#
# $$y = x W^\top + \frac{\alpha}{r} \, x A^\top B^\top$$
#
# By hand: $x = (1, 2, 3)$, $W = (1, 0, 1)$, $A$ picks the first two entries of $x$, $B = (1, 1)$,
# $\alpha = 6$. Then $r = 2$ and $y = 4 + 3 \cdot (1 + 2) = 13$. Gradients must reach $A$, $B$ and $x$
# (the layers below need it).


# %% tags=["nbval-check-output"]
def lora_forward(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    """A linear layer with its LoRA adapter.

    Args:
        x: [..., in], with any number of dimensions in front.
        weight: W, [out, in], frozen.
        lora_A: A, [r, in].
        lora_B: B, [out, r].
        alpha: α; the update is scaled by α/r.

    Returns:
        y, [..., out].
    """
    ### BEGIN SOLUTION
    rank = lora_A.shape[0]
    update = x @ lora_A.T @ lora_B.T
    return x @ weight.T + alpha / rank * update
    ### END SOLUTION


checks.check_lora_forward(lora_forward)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Write the shape under each factor: [..., in] times [in, r] times [r, out]. Neither $A$ nor $B$ is stored
# the way it is needed, and of their two dimensions one is always $r$. The product works for any number of
# dimensions in front as long as you only touch the last.
# </details>

# %% [markdown]
# From here on we use PEFT's own layer, which `Roles` builds into the base in place of a linear one (the
# base is unquantized here, so that nothing is rounded). PEFT draws $A$ at random and sets $B$ to 0.
#
# <details><summary><b>Predict before you run.</b> Suppose it were the other way round, $A = 0$ and $B$
# random. Which of the two would then get a gradient in the first backward pass?</summary>
#
# $A$, and not $B$: the gradient of each is multiplied by the other. The cell shows PEFT's way round: $B$
# gets a gradient and $A$ does not, until the first update has moved $B$.
# </details>

# %%
roles = Roles(load_base(preset, quantized=False).float(), rank=16, alpha=32)
roles.add("sft")
layer = roles.base.model.layers[0].mlp.down_proj
lora_A, lora_B = layer.lora_A["sft"].weight, layer.lora_B["sft"].weight
x = torch.randn(2, layer.in_features, device=roles.base.device)
y = layer(x)
assert torch.equal(y, layer.base_layer(x))
y.square().sum().backward()
print(f"largest gradient: A {lora_A.grad.abs().max():.3g}, B {lora_B.grad.abs().max():.3g}")
assert not lora_A.grad.any() and lora_B.grad.any()

# %% [markdown]
# Now with a random $B$. The update that PEFT adds to the weight has the weight's shape, and its rank
# is $r$.

# %%
with torch.no_grad():
    lora_B.normal_(std=0.1)
    y = layer(x)
    delta = layer.get_delta_weight("sft")
torch.testing.assert_close(y, x @ (layer.base_layer.weight + delta).T, rtol=1e-4, atol=1e-4)
print(f"update {list(delta.shape)}, rank {torch.linalg.matrix_rank(delta).item()}")

# %% [markdown]
# Your own function should give the same `y` as the cell above from the same tensors. Call it and compare
# with `torch.testing.assert_close`; the frozen weight is `layer.base_layer.weight`, and α is `roles.alpha`.
# The order of the sums differs, so allow `rtol=1e-4, atol=1e-4`.

# %%
### BEGIN SOLUTION
mine = lora_forward(x, layer.base_layer.weight, lora_A, lora_B, roles.alpha)
torch.testing.assert_close(mine, y, rtol=1e-4, atol=1e-4)
### END SOLUTION

# %% [markdown]
# **In words.** $B$ starts at 0 so that step 0 changes nothing. Why is $A$ not 0 as well?

# %% [markdown] tags=["solution"]
# Then neither would ever move. Up to the factor $\alpha/r$ the gradient of $B$ is (gradient of
# $y$)$^\top x A^\top$, and that of $A$ is $B^\top$(gradient of $y$)$^\top x$: each contains the other
# matrix as a factor. With both at 0 both gradients are 0, at every step. One of the two has to be
# random, and it does not matter much which.

# %% [markdown]
# ## 3 · Count what is trained, and what is stored
#
# ●○○ · 20 minutes
#
# First the adapters. Each adapted layer of shape (out, in) gets an $A$ of shape $(r, \text{in})$ and a
# $B$ of shape $(\text{out}, r)$, without biases. How many parameters are trained? By hand: one layer
# of shape (3, 4) at rank 2 gives 8 + 6 = 14.


# %% tags=["nbval-check-output"]
def lora_parameters(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Trainable parameters of the adapters of all these layers.

    Args:
        shapes: (out, in) of each adapted layer.
        rank: r.
    """
    ### BEGIN SOLUTION
    return sum(rank * (outputs + inputs) for outputs, inputs in shapes)
    ### END SOLUTION


checks.check_lora_parameters(lora_parameters)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Count the entries of each of the two matrices for one layer, then add over the layers. The layer's own
# weight is frozen.
# </details>

# %% [markdown]
# Now the base: one tensor of $n$ weights in NF4. A weight is a 4-bit code, two to a byte. Each block of
# 64 weights has a scale, a float32; under double quantization the scale has 8 bits, and every 256
# *scales* have one float32 constant. Round up at each level: an odd last code takes a byte, part of a
# block a scale, part of 256 scales a constant. By hand, $n = 128$: 64 bytes of codes and 2 scales, so $64 + 8 = 72$ bytes plain and
# $64 + 2 + 4 = 70$ with double quantization.


# %% tags=["nbval-check-output"]
def nf4_bytes(weights: int, double_quant: bool = True) -> int:
    """Bytes of one tensor in NF4: codes, scales, and the constants of quantized scales.

    Args:
        weights: n, the entries of the tensor.
        double_quant: whether the scales are quantized as well.
    """
    ### BEGIN SOLUTION
    codes, scales = ceil(weights / 2), ceil(weights / 64)
    if not double_quant:
        return codes + 4 * scales
    return codes + scales + 4 * ceil(scales / 256)
    ### END SOLUTION


checks.check_nf4_bytes(nf4_bytes)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Name three numbers first, each rounded up: bytes of codes, number of scales, number of constants. The
# third is counted from the second, not from the weights. Only then multiply by bytes: how many has a
# float32, how many an 8-bit number?
# </details>

# %% [markdown]
# From here on we use the package's versions. First the parameters: do they agree with those that PEFT
# trains, with an adapter on every linear layer but the last?

# %%
from rlhf_helpers.memory import lora_parameters, nf4_bytes

roles = Roles(load_base(preset), rank=16)
roles.add("sft")
shapes = list(roles.shapes.values())
trained = sum(p.numel() for p in roles.parameters("sft").values())
print(f"{trained:,} parameters trained in {len(shapes)} layers")
assert trained == lora_parameters(shapes, 16)

# %% [markdown]
# And do the bytes agree with those that bitsandbytes holds for the same layers?

# %%
stored = 0
for weight in (p for p in roles.base.parameters() if hasattr(p, "quant_state")):
    state = weight.quant_state
    scales = [state.absmax] + ([state.state2.absmax] if state.nested else [])
    stored += weight.nbytes + sum(tensor.nbytes for tensor in scales)
print(f"{stored:,} bytes of 4-bit layers, double quantization: {preset.double_quant}")
assert stored == sum(nf4_bytes(prod(shape), preset.double_quant) for shape in shapes)

# %% [markdown]
# The same for the linear layers of Llama-2-7B: in each of 32 blocks query, key, value and output
# (4096 × 4096), gate and up (11008 × 4096) and down (4096 × 11008).
#
# <details><summary><b>Predict before you run.</b> Rank 16 in both models. Is the share of weights that is
# trained about the same in both? If not, in which is it larger?</summary>
#
# It is larger in the small one. The adapters grow with the width of a layer, the weights with its
# square, so at a fixed rank the share falls as models grow.
# </details>

# %%
block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
print("model           weights     trained   share   fp16 (MB)   NF4 (MB)")
for name, layers in {"this base": shapes, "Llama-2-7B": block * 32}.items():
    weights, trained = sum(map(prod, layers)), lora_parameters(layers, 16)
    nf4 = sum(nf4_bytes(prod(shape)) for shape in layers)
    print(f"{name:10} {weights:>12,} {trained:>11,} {trained / weights:7.2%}", end=" ")
    print(f"{2 * weights / 1e6:11.2f} {nf4 / 1e6:10.2f}")

# %% [markdown]
# With 4.127 bits per weight instead of 16, the 7B layers take 3.3 GB instead of 13. The table leaves out
# what stays unquantized (embeddings, norms, the output layer), the optimizer's state and the activations;
# lesson 04 adds them.
#
# **In words.** Four bits per weight are enough for the base. Why not store the adapters in NF4 too?

# %% [markdown] tags=["solution"]
# They are trained. An update moves a weight by a small fraction of its size, and the 16 codes of a
# block lie much further apart than that: rounding to the nearest code would undo nearly every step.
# The frozen base never takes a step, so it is rounded only once. And there is little to save: at 7B the
# adapters hold less than one percent of the parameters.
