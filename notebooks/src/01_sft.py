# %% [markdown]
# # 01 · Supervised fine-tuning, in 4 bits
#
# **Run time** about two minutes on two CPU cores · **Before this** lesson 00 · **Next** lesson 02, the
# reward model · **Exercise** `exercises/01_sft.ipynb`
#
# After this lesson you will be able to
#
# - put a demonstration into tokens and labels, so that the loss counts the response and its end;
# - quantize weights to 4 bits by hand, and say what that costs in error and saves in bytes;
# - train a LoRA adapter on a frozen 4-bit base, and save it;
# - recognise two classic mistakes by their signature in the numbers.

# %%
PRESET = "pocket"  # every number below is from this preset

import json
import warnings

import torch
from torch.distributions import Normal
from tqdm.auto import tqdm

from rlhf_helpers import notebook, plots, sft
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.pocket import exam, rubric
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import prompt_dataset, sft_dataset
from rlhf_helpers.stats import share_with_interval
from rlhf_helpers.text import (
    answer_text,
    as_messages,
    encode_examples,
    load_tokenizer,
    pad_examples,
    readable,
)

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer = load_tokenizer(preset)
base = load_base(preset)

# %% [markdown]
# ## Demonstrations
#
# Lesson 00 ended with a base model that ranks right answers first, yet says them in fewer than half of its
# draws, and then mostly goes on to play the user. **Supervised fine-tuning** (SFT) shows it the job: questions,
# each with a response to imitate. Ours were written in a hurry, like many real ones: about a third are wrong,
# on purpose, and none gives away a held-out fact.

# %%
demonstrations = sft_dataset(preset)
for row in demonstrations.select(range(4)):
    print(f"{readable(row['prompt']):40} {answer_text(row['completion'])}")
print(f"\n{len(demonstrations)} demonstrations")

# %% [markdown]
# How many are right? The rubric knows. (Cells that begin with "Pocket only" need it, or something else that
# only the pocket world has; with another preset they do nothing.)


# %%
# Pocket only
def share_right(rows):
    correct = [rubric.gold_reward(r["prompt"], r["completion"]).correct > 0 for r in rows]
    return sum(correct) / len(correct)


print(f"{share_right(demonstrations):.0%} of the demonstrations are right")

# %% [markdown]
# ## From a demonstration to tokens
#
# The *chat template* writes a conversation as one text, with role tokens: `<|user|>` begins a question,
# `<|assistant|>` a response, and `<|eos|>`, the end-of-sequence token, closes the response. The tokenizer
# carries the template. The prompt is everything up to and including `<|assistant|>`; what follows is what
# the model should learn to write. (Ġ is a leading space.)

# %% tags=["nbval-check-output"]
two = demonstrations.select([4, 28])
question, answer = two[0]["prompt"], answer_text(two[0]["completion"])
messages = [*as_messages(question), {"role": "assistant", "content": answer}]
print(tokenizer.apply_chat_template(messages, tokenize=False))
examples = encode_examples(tokenizer, two, preset.prompt_length, preset.response_length)
for example in examples:
    for part in ("prompt", "response"):
        print(f"{part:9}", tokenizer.convert_ids_to_tokens(example[part]))

# %% [markdown]
# The `<|eos|>` at the end is not decoration. To the model **EOS is an action** like any word: choosing it
# ends the response. What does the base choose after a complete answer?

# %%
# Pocket only
finished_answer = "<|user|> what does the duck say?<|assistant|> it says quack."
ids = tokenizer(finished_answer, return_tensors="pt")["input_ids"].to(base.device)
with torch.no_grad():
    top = base(ids).logits[0, -1].softmax(-1).topk(5)
names = tokenizer.convert_ids_to_tokens(top.indices.tolist())
fig = plots.bars(names, top.values.tolist(), "probability of the next token, base model")
likeliest = f"{names[0]} leads with {top.values[0]:.2f}"
alt = f"Bars of the base model's next-token probabilities after a complete answer: {likeliest}."
plots.show(fig, alt=alt)

# %% [markdown]
# On the pages it has read, an answer mostly gets a reply, so the base hands over to `<|user|>` and plays that
# user. This is one answer only; lesson 00 counted over all held-out prompts.

# %% [markdown]
# ## Labels: learn the response, not the prompt
#
# The rows of a batch must be equally long, so padding goes before short prompts and after short responses; then
# every response begins in the same column $P$, counted from 0. The *labels* say which tokens count: in the
# response, EOS included, a label is the token itself; on the prompt and on padding it is −100, which by
# convention means "ignore".

# %% tags=["nbval-check-output"]
IGNORE = -100


def mask_prompt(input_ids, attention_mask, prompt_length):
    labels = input_ids.clone()
    labels[:, :prompt_length] = IGNORE
    labels[attention_mask == 0] = IGNORE
    return labels


ids = torch.tensor([[5, 6, 7, 1, 0], [0, 6, 8, 9, 1]])  # 0 is padding, 1 is EOS, P = 2
mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
print(mask_prompt(ids, mask, prompt_length=2))

# %% [markdown]
# Check it by hand: row 1 keeps 7 and EOS, row 2 keeps 8, 9 and EOS. Now the two demonstrations from
# above. `pad_examples` pads them and returns $P$, the width of the prompt columns.

# %% tags=["nbval-check-output"]
input_ids, attention_mask, P = pad_examples(tokenizer, examples)
labels = mask_prompt(input_ids, attention_mask, P)
for row, label in zip(input_ids, labels, strict=True):
    tokens = tokenizer.convert_ids_to_tokens(row.tolist())
    learnt = [token for token, keep in zip(tokens, label != IGNORE, strict=True) if keep]
    print(f"P = {P}, of {len(tokens)} positions {len(learnt)} are learnt: {learnt}")
assert torch.equal(labels, sft.mask_prompt(input_ids, attention_mask, P))

# %% [markdown]
# ## The loss
#
# The loss is the mean *surprise* at the labelled tokens, −log of the probability $\pi$ that the model gives
# them (with the natural logarithm, so the unit is the *nat*):
#
# $$L = -\frac{1}{N} \sum_{(b,t):\ \text{label} \neq -100} \log \pi(y_{b,t} \mid x_b, y_{b,<t})$$
#
# where $x_b$ is a prompt, $y_{b,t}$ token $t$ of its response and $N$ the number of labels. The logits at one
# position predict the next token, so the labels are shifted by one against the logits. If all 4 tokens of a
# vocabulary are equally likely, the loss is $\log 4 \approx 1.386$, whatever the labels. Take labels
# $(-100, 2, 3)$, probability ½ for token 2 at position 0 and ½ for token 3 at position 1: both labels are
# predicted at ½, and the loss is $\log 2 \approx 0.693$. Without the shift you would get another number.


# %% tags=["nbval-check-output"]
def sft_loss(logits, labels):
    logprobs = logits[:, :-1].log_softmax(-1)  # position t predicts token t + 1
    targets = labels[:, 1:]
    counted = targets != IGNORE
    picked = logprobs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return -picked[counted].mean()


labels_by_hand = torch.tensor([[-100, 2, 3]])
half = torch.tensor([[[1, 1, 3, 1], [1, 1, 1, 3], [1, 1, 1, 1]]]).log()  # 3 of 6 is ½
print(f"all alike {sft_loss(torch.zeros(1, 3, 4), labels_by_hand):.3f}", end=", ")
print(f"½ for each label {sft_loss(half, labels_by_hand):.3f}")

# %% [markdown]
# Token by token on the real model: what in the first demonstration surprises the base?

# %%
batch = {"input_ids": input_ids.to(base.device), "attention_mask": attention_mask.to(base.device)}
with torch.no_grad():
    logits = base(**batch).logits.float().cpu()
    loss = sft_loss(logits, labels)
    surprise = -logits[0, :-1].log_softmax(-1).gather(-1, input_ids[0, 1:, None]).squeeze(-1)
counted = labels[0, 1:] != IGNORE
words = tokenizer.convert_ids_to_tokens(input_ids[0, 1:][counted].tolist())
fig = plots.bars(words, surprise[counted].tolist(), "−log probability under the base, in nats")
alt = ", ".join(f"{w} {s:.1f}" for w, s in zip(words, surprise[counted].tolist(), strict=True))
plots.show(fig, alt=f"One bar for each response token, the surprise of the base: {alt}.")
assert torch.allclose(loss, sft.sft_loss(logits, labels))

# %% [markdown]
# The long bars make up the loss: how to begin, what to answer, when to stop. A word that follows from those
# before has a bar near 0: nothing is left to learn there. Not every long bar can shrink: where several words
# are equally good, some surprise remains. This is one response only; we look at it again after training.

# %% [markdown]
# ## Four bits for a weight: NF4
#
# The base will not be trained, so it may be stored coarsely. **NF4** cuts a weight matrix into blocks of 64.
# For each block it keeps one scale, $s = \max |w_i|$, and for each weight the index of the nearest of 16
# *levels* $q_k$ in $[-1, 1]$; the weight comes back as $s\,q_k$. First by hand, with the four levels
# $-1, -\frac13, \frac13, 1$ and the block $(0.3, -1.2, 0.6, 0.1)$: $s = 1.2$, and $0.3 / 1.2 = 0.25$ is nearest
# to $\frac13$, so $0.3$ comes back as $0.4$.


# %% tags=["nbval-check-output"]
def quantize(block, levels):
    scale = block.abs().max()
    codes = (block[:, None] / scale - levels).abs().argmin(-1)
    return codes, levels[codes] * scale


four_levels = torch.tensor([-1, -1 / 3, 1 / 3, 1])
codes, restored = quantize(torch.tensor([0.3, -1.2, 0.6, 0.1]), four_levels)
print("codes", codes.tolist(), " back", [round(w, 2) for w in restored.tolist()])

# %% [markdown]
# The weights 0.3, 0.6 and 0.1 have all become 0.4: with few levels it matters where they lie. Trained
# weights look roughly *normal*, so the "NF" levels are quantiles of a normal distribution: eight above
# zero, seven below, and zero itself, scaled to $[-1, 1]$. On each side their probabilities are evenly spaced
# between ½ and an outermost one just below 1 (at 1 the quantile would be infinite).

# %%
outermost = 1 - (1 / 32 + 1 / 30) / 2  # half a step from 1, for 16 and for 15 steps, averaged
normal = Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
above = normal.icdf(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
below = -normal.icdf(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
levels = torch.cat([below, torch.zeros(1), above]).sort().values
levels = (levels / levels.max()).float()
print([round(level, 3) for level in levels.tolist()])

# %% [markdown]
# Now one real block of the base, as it was before quantization: by our function, and by `bitsandbytes`, the
# library that the loader uses.

# %%
# Pocket only
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

layer = "model.layers.0.self_attn.q_proj"
exact = load_base(preset, quantized=False).get_submodule(layer).weight.flatten()
block = exact[:64]
codes, ours = quantize(block, levels)
packed, state = quantize_4bit(block, blocksize=64, quant_type="nf4")
theirs = dequantize_4bit(packed, state)
their_codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).flatten()
print(f"codes equal: {(codes == their_codes).sum()} of 64;", end=" ")
print(f"largest difference between the values: {(ours - theirs).abs().max():.0e}")
assert torch.equal(codes, their_codes.long()) and torch.allclose(ours, theirs, atol=1e-6)

# %%
# Pocket only
order = block.argsort()
series = {"before": block[order].tolist(), "NF4": ours[order].tolist()}
fig = plots.lines(series, "the 64 weights of a block, sorted", "weight")
error = (ours - block).norm() / block.norm()
alt = "A smooth rising line of 64 sorted weights, and a staircase on it: low risers in the middle, "
plots.show(fig, alt=alt + f"high ones at both ends; relative error {error:.2f}.")
print(f"relative error of the block: ‖ŵ − w‖ / ‖w‖ = {error:.3f};", end=" ")
stored = base.get_submodule(layer).weight
whole = dequantize_4bit(stored.data, stored.quant_state).flatten()
print(f"of the whole layer: {(whole - exact).norm() / exact.norm():.3f}")

# %% [markdown]
# The levels lie close together near 0 and far apart at the ends. The weight of the largest size comes back
# exactly, since it is the scale. The figure does not show what the error does to the model's answers; the
# base's model card (`rlhf_helpers/assets/base/README.md`) has a table of the model with and without
# quantization.
#
# **Bits per weight.** 4 for the code and 32 for the scale, shared by 64 weights: $4 + 32/64 = 4.5$.
# *Double quantization* stores the scales in 8 bits, with one 32-bit constant for each 256 of
# them: $4 + 8/64 + 32/(64 \cdot 256) = 4.127$. The pocket preset leaves it off, so we expect 4.5.

# %%
# Pocket only
weight = base.get_submodule(layer).weight
bits = (
    8 * (weight.numel() + 4 * weight.quant_state.absmax.numel()) / weight.quant_state.shape.numel()
)
print(f"{layer}: {tuple(weight.quant_state.shape)} weights in {weight.numel()} bytes", end=" ")
print(f"and {weight.quant_state.absmax.numel()} scales: {bits:.3f} bits for each")
assert bits == 4.5

# %% [markdown]
# ## LoRA: train a small update beside a frozen weight
#
# 4-bit codes have no gradient. **LoRA** leaves $W$ alone and learns an update of low rank $r$ beside it; on a
# 4-bit base it is called **QLoRA**. The two matrices $A$ and $B$ of all layers together are an *adapter*:
#
# $$y = W x + \frac{\alpha}{r} B A x, \qquad A \in \mathbb{R}^{r \times \text{in}},\quad B \in \mathbb{R}^{\text{out} \times r}$$
#
# $A$ starts random and $B$ starts at 0, so the update starts at 0. The constant $\alpha$ is set beforehand; the
# update is scaled by $\alpha / r$, so that you can change $r$ and keep the learning rate. (In code $x$ is a
# row, so $Wx$ becomes `x @ W.T`.) By hand: $W$ the identity, $x = (2, 3)$, $r = 1$, $A = (1, 1)$, so $Ax = 5$.
# With $B = 0$, $y = x$. With $B = (1, 0)^\top$ and $\alpha = 2$: $y = (2 + 2 \cdot 5,\ 3) = (12, 3)$.


# %% tags=["nbval-check-output"]
def lora_forward(x, W, A, B, alpha):
    return x @ W.T + alpha / A.shape[0] * (x @ A.T @ B.T)


W, A, x = torch.eye(2), torch.tensor([[1.0, 1.0]]), torch.tensor([2.0, 3.0])
print("B = 0     ", lora_forward(x, W, A, torch.zeros(2, 1), alpha=2).tolist())
print("B = (1, 0)", lora_forward(x, W, A, torch.tensor([[1.0], [0.0]]), alpha=2).tolist())

# %% [markdown]
# `Roles` holds one frozen base and adds adapters to all of its linear layers but the last, through PEFT, the
# usual library for this. An adapter is a *role*: lesson 04 will put four on one base. First check: a new role
# answers exactly as the base does.
#
# <details><summary><b>The same in plain libraries</b>, to use elsewhere</summary>
#
# ```python
# from peft import LoraConfig, get_peft_model
# from transformers import AutoModelForCausalLM, BitsAndBytesConfig
#
# four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
# base = AutoModelForCausalLM.from_pretrained("a model", quantization_config=four_bits)
# lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
# model = get_peft_model(base, lora)
# ```
#
# The helper also guards against two things that go wrong unnoticed: a fast path of some CPUs that corrupts
# training, and switching adapters between forward and backward.
# </details>

# %%
with torch.no_grad():
    before = base(**batch).logits
roles = Roles(base, rank=16, alpha=32)
roles.add("practice", seed=preset.seed)
with torch.no_grad():
    after = roles.use("practice")(**batch).logits
trainable = sum(p.numel() for p in roles.parameters("practice").values())
print(f"logits unchanged: {torch.equal(before, after)}; trainable parameters: {trainable:,}")
assert torch.equal(before, after)

# %% [markdown]
# <details><summary><b>Predict before you run.</b> After the first backward pass, which of A and B have a
# gradient that is not 0?</summary>
#
# Only B. The gradient of A passes through B, which is 0; A begins to move at the second update. If both
# were 0, neither would ever move.
# </details>

# %%
logits = roles.use("practice")(**batch).logits
sft_loss(logits, labels.to(base.device)).backward()
for part in ("lora_A", "lora_B"):
    grads = [p.grad for name, p in roles.parameters("practice").items() if part in name]
    print(f"{part}: largest gradient {max(g.abs().max().item() for g in grads):.4f}")

# %% [markdown]
# ## The loop, written out
#
# The rest is nothing new: take a batch, label it, compute the loss, go backward, step. Ten updates:

# %%
config = sft.SFTConfig(**preset.sft)
train = encode_examples(tokenizer, demonstrations, preset.prompt_length, preset.response_length)
rate = config.learning_rate / 2  # half, since it has no warm-up here
optimizer = torch.optim.AdamW(roles.parameters("practice").values(), lr=rate)
for step in range(10):
    input_ids, mask, P = pad_examples(tokenizer, config.batch(train, step))
    labels = mask_prompt(input_ids, mask, P).to(base.device)
    optimizer.zero_grad()
    model = roles.use("practice")
    logits = model(input_ids.to(base.device), attention_mask=mask.to(base.device)).logits
    loss = sft_loss(logits, labels)
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.2f}", end=" ")

# %% [markdown]
# The helper's `train_sft` is this loop, plus a learning rate that rises and falls, gradients clipped to norm 1,
# no weight decay, the loss on held-out prompts, and saving. It is a generator: it yields after every update, so
# that we can draw while it runs. (The learning rate, 2e-3, is about ten times what larger models take; the rank
# and α are common values. None of them was tuned.)

# %%
written = sft_dataset(preset, "held_out", copies=1)
held_out = encode_examples(tokenizer, written, preset.prompt_length, preset.response_length)
folder = preset.runs / preset.name / "sft"
roles.add("sft", seed=preset.seed)
loss_before = sft.held_out_loss(roles.use("sft"), tokenizer, held_out)  # B = 0: the base
print(f"{config}\nheld-out loss of the base {loss_before:.3f}")


# %%
def draw(history, handle):
    train_loss = {s.step: s.loss for s in history if s.step}
    measured = {s.step: s.held_out["loss"] for s in history if s.held_out}
    series = {"batch": train_loss, "held-out": measured}
    fig = plots.lines(series, "updates", "loss, nats per token")
    first, *_, last = [*measured.values(), measured[max(measured)]]
    alt = f"Loss against updates: held-out falls from {first:.2f} to {last:.2f}; batches scatter round it."
    return plots.redraw(fig, alt, handle)


history, figure = [], None

# %% [markdown]
# Now the training itself. If you interrupt it, run this cell again, and it goes on from there.

# %%
run = sft.train_sft(roles, "sft", tokenizer, train, held_out, config, folder=folder)
for stats in tqdm(run, total=config.steps + 1):
    history.append(stats)
    if stats.held_out:
        figure = draw(history, figure)

# %%
measured = [s.held_out["loss"] for s in history if s.held_out]
print(f"{history[-1].step} updates in {history[-1].seconds:.0f} s, held-out loss", end=" ")
print(f"{loss_before:.3f} -> {measured[-1]:.3f} nats per token")
assert preset.name != "pocket" or measured[-1] < loss_before - 0.1

# %% [markdown]
# Most of the fall comes in the first 25 updates; after that the curve is nearly flat, and well above 0. It has
# to be: each prompt is answered in one of several wordings chosen at random, and about a third of the answers
# are wrong, again at random. Neither can be predicted. The figure does not show whether the responses are
# better. For that we must read them, and mark them.

# %% [markdown]
# ## Before and after
#
# We sample one response to each held-out prompt, from the base and from the `sft` role. (Role tokens are not
# printed: where an answer before SFT seems to change its mind, `<|user|>` has begun to speak.)

# %%
prompts = list(prompt_dataset(preset, "held_out")["prompt"])


def respond(model):
    rollout = sample_responses(model, tokenizer, prompts, preset.response_length, seed=preset.seed)
    return list(zip(prompts, rollout.texts, rollout.finished.tolist(), strict=True))


roles.add("untrained", trainable=False)  # B = 0: the base
rows_before, rows_after = respond(roles.use("untrained")), respond(roles.use("sft"))
for i in range(0, len(prompts), 120):
    print(f"{readable(prompts[i])}\n   before: {rows_before[i][1]}\n   after:  {rows_after[i][1]}")

# %% [markdown]
# The rubric of lesson 00 marks both.
#
# <details><summary><b>Predict before you run.</b> The responses now have the right form, but some are wrong.
# Which parts of the rubric do you expect to rise most? And how many answers will be right, if about two thirds
# of the demonstrations are?</summary>
#
# Rambling ends. Correctness rises too, because the demonstrations are right more often than the chats of
# the base's text (41% in lesson 00), but not beyond the demonstrations: SFT imitates, mistakes included.
# </details>


# %%
# Pocket only
def marks_of(rows):
    return rubric.mean_score(rubric.gold_reward(*row) for row in rows)


marks_before, marks_after = marks_of(rows_before), marks_of(rows_after)
groups = {
    "before": [getattr(marks_before, part) for part in rubric.PARTS] + [marks_before.total],
    "after": [getattr(marks_after, part) for part in rubric.PARTS] + [marks_after.total],
}
fig = plots.grouped_bars([*rubric.PARTS, "total (gold)"], groups, "mean points")
alt = "Mean points by part of the rubric, before and after SFT; the total rises from "
alt += f"{marks_before.total:.2f} "
plots.show(
    fig, alt=alt + f"to {marks_after.total:.2f}, rambling falls to {marks_after.rambling:.2f}."
)


# %%
# Pocket only
def share(rows, test):
    mean, low, high = share_with_interval([test(*row) for row in rows])
    return f"{mean:.0%} [{low:.0%}, {high:.0%}]"


tests = {
    "answers the question": lambda p, text, _: exam.answers_question(p, text),
    "right": lambda *row: rubric.gold_reward(*row).correct > 0,
    "right, nothing more": lambda *row: exam.style(*row) == "right, nothing more",
}
for name, test in tests.items():
    print(f"{name:33} before {share(rows_before, test):16} after {share(rows_after, test)}")
print(f"right in the held-out demonstrations: {share_right(written):.0%}")
right_after = sum(tests["right"](*row) for row in rows_after) / len(rows_after)
assert marks_after.total > marks_before.total + 0.3 and right_after < 0.7

# %% [markdown]
# Two parts make up most of the gain: more correct answers, and no more rambling. In brackets are 95% intervals
# (Wilson's) for the share that very many draws from this model would give. They say nothing about another
# training run. So here are ten, each with its own demonstrations, initial adapter and samples, recorded by
# `tools/train_assets.py sft` when the shipped adapter was made.

# %% tags=["nbval-check-output"]
# Pocket only
recorded = json.loads((ASSETS / "sft" / "runs.json").read_text(encoding="utf-8"))
ten = [run for run in recorded if run["run"] == "sft"]
for key in ("answers", "right", "gold"):
    line = []
    for column in (f"{key} before", key):
        values = [run[column] for run in ten]
        line.append(f"{sum(values) / len(ten):.2f} ({min(values):.2f} to {max(values):.2f})")
    print(f"{key:8} before {line[0]}   after {line[1]}")
assert all(run["gold"] > run["gold before"] + 0.3 for run in ten) and len(ten) == 10

# %% [markdown]
# Mean and range over the ten runs. The model now answers and stops. But it is right no more often than the
# people it copied, although lesson 00 showed that the base ranks the right answer first. *Imitation cannot
# prefer one answer to another.* That is what lessons 02 to 05 are for. And the tokens that surprised the base
# above?


# %%
def surprise_of(role):
    with torch.no_grad():
        logits = roles.use(role)(first_ids, attention_mask=first_mask).logits[0, P - 1 : -1]
    logprobs = logits.float().log_softmax(-1).gather(-1, first_ids[0, P:, None])
    return (-logprobs.squeeze(-1)).tolist()


first_ids, first_mask, P = pad_examples(tokenizer, examples[:1])
first_ids, first_mask = first_ids.to(base.device), first_mask.to(base.device)
words = tokenizer.convert_ids_to_tokens(first_ids[0, P:].tolist())
groups = {"before": surprise_of("untrained"), "after": surprise_of("sft")}
fig = plots.grouped_bars(words, groups, "−log probability, in nats")
ends = f"{groups['before'][-1]:.2f} to {groups['after'][-1]:.2f}"
plots.show(
    fig, alt=f"Surprise at each token of one response, before and after SFT; EOS falls from {ends}."
)

# %% [markdown]
# Stopping has become likely: the last token hardly surprises the model. How to begin and what to answer stay
# open, since the demonstrations disagree about both.

# %% [markdown]
# ## What the adapter learnt
#
# An update $\frac{\alpha}{r} B A$ has rank at most $r = 16$: of the 192 singular values of this layer's
# update, 176 must be 0. How large are they beside those of $W$? We take the layer quantized above.

# %%
# Pocket only
adapter = roles.state("sft")
prefix = f"base_model.model.{layer}"
update = (
    roles.alpha
    / roles.rank
    * adapter[f"{prefix}.lora_B.weight"]
    @ adapter[f"{prefix}.lora_A.weight"]
)
spectra = {
    "W": torch.linalg.svdvals(exact.view(192, 192)).tolist(),
    "update": torch.linalg.svdvals(update).tolist(),
}
numbered = {name: dict(enumerate(values[:32], 1)) for name, values in spectra.items()}
fig = plots.lines(numbered, "number of the singular value", "singular value")
alt = "Singular values of W fall slowly; those of the update fall to zero after number 16."
plots.show(fig, alt=alt)
squares = [value**2 for value in spectra["update"]]
print(
    f"the first 4 of 16 hold {sum(squares[:4]) / sum(squares):.0%} of the update's squares;",
    end=" ",
)
print(f"number 17 is {spectra['update'][16]:.0e}, beside W's {spectra['W'][16]:.1f}")

# %% [markdown]
# The update's singular values end where they must, after number 16. A few directions carry most of it, and the
# largest value is small beside the largest of $W$. The figure is about one layer, and does not show that 16 is
# the best rank.

# %% [markdown]
# ## Two failures on purpose
#
# **Forget EOS.** Many pipelines pad with EOS and then ignore every pad in the labels; the real EOS goes with
# them. **Train on the prompt too.** Leave the prompt's tokens in the labels. Each mistake is one line of code;
# we train 60 updates with each, and with the right labels. (By hand: a prompt of 11 tokens and a response of 6
# have 6 labels. With the prompt left in they have 16, and 10 of these are the prompt's: nothing predicts the
# first token.)


# %%
def forget_eos(input_ids, attention_mask, prompt_length):
    labels = sft.mask_prompt(input_ids, attention_mask, prompt_length)
    return labels.masked_fill(input_ids == tokenizer.eos_token_id, IGNORE)


def prompt_too(input_ids, attention_mask, prompt_length):
    return input_ids.masked_fill(attention_mask == 0, IGNORE)


# %% [markdown]
# <details><summary><b>Predict before you run.</b> What will the held-out loss (over the response, EOS
# included) do in each of the two? And the responses?</summary>
#
# Without EOS labels the loss first falls, as the words improve, and then rises, because of EOS: responses run
# on. With the prompt in the labels the response is still learnt, but part of every gradient goes to predicting
# questions.
# </details>

# %%
short = sft.SFTConfig(**preset.sft | {"steps": 60, "eval_every": 10})
choices = {"right": sft.mask_prompt, "prompt too": prompt_too, "no EOS": forget_eos}
batch_losses, curves, judged = {}, {}, {}
for name, labels in choices.items():
    role = name.replace(" ", "_")
    roles.add(role, seed=preset.seed)
    run = sft.train_sft(roles, role, tokenizer, train, held_out, short, labels)
    reports = list(tqdm(run, total=short.steps + 1, desc=name))
    batch_losses[name] = sum(s.loss for s in reports[-20:]) / 20
    curves[name] = {s.step: s.held_out["loss"] for s in reports if s.held_out}
    judged[name] = respond(roles.use(role))

# %%
fig = plots.lines(curves, "updates", "held-out loss, nats per token")
ends = ", ".join(f"{name} ends at {list(curve.values())[-1]:.2f}" for name, curve in curves.items())
plots.show(fig, alt=f"Three curves of held-out loss over 60 updates: {ends}.")
judged["the base"] = rows_before
batch_losses["the base"], curves["the base"] = float("nan"), {60: loss_before}
print(f"{'labels':12}{'loss shown':>11}{'held out':>10}{'finished':>10}{'words':>7}")
for name, rows in judged.items():
    finished = sum(row[2] for row in rows) / len(rows)
    words = sum(len(row[1].split()) for row in rows) / len(rows)
    print(f"{name:12}{batch_losses[name]:11.2f}{curves[name][60]:10.3f}", end="")
    print(f"{finished:10.0%}{words:7.1f}")
print("without EOS:", judged["no EOS"][0][1])

# %% [markdown]
# And by the rubric:

# %%
# Pocket only
golds = {name: marks_of(rows).total for name, rows in judged.items()}
print("gold: " + ", ".join(f"{name} {gold:.2f}" for name, gold in golds.items()))
assert curves["no EOS"][60] > curves["right"][60] + 0.2
assert golds["no EOS"] < golds["right"] - 0.5
assert curves["prompt too"][10] > curves["right"][10]

# %% [markdown]
# "Loss shown" is the mean over the last 20 batches, with the run's own labels: the number you would look at.
# The base itself ended nearly all of its draws, so without EOS labels the model has *unlearnt* how to stop.
# Why? After a full stop, the only labels left are those of responses that go on. How many labels are lost
# there? (The 0% below holds by definition.)


# %%
# Pocket only
def after_full_stop(labels_of):
    followed = []
    for start in range(0, 960, 32):
        input_ids, attention_mask, P = pad_examples(tokenizer, train[start : start + 32])
        labels = labels_of(input_ids, attention_mask, P)[:, 1:]
        stops = torch.isin(input_ids[:, :-1], full_stops) & (labels != IGNORE)
        followed.append(labels[stops] == tokenizer.eos_token_id)
    return torch.cat(followed).float().mean()


full_stops = torch.tensor(tokenizer.convert_tokens_to_ids([".", "!"]))
for name in ("right", "no EOS"):
    print(f"{name:8} EOS is {after_full_stop(choices[name]):.0%} of the labels after a full stop")

# %% [markdown]
# **Signature of a forgotten EOS:** the loss you look at falls as it should (EOS is not in it), while responses
# grow towards the length limit, 32 tokens here. Always count finished responses.
#
# **Signature of training on the prompt:** the loss shown is another quantity, since it averages over the
# question as well; do not compare it with that of other runs. The held-out curve is the right run's, but for a
# small gap at update 10. Does it cost gold? Ten recorded seeds again:

# %% tags=["nbval-check-output"]
# Pocket only
by_run = {(run["run"], run["seed"]): run for run in recorded}
for failure in ("prompt too", "no EOS"):
    gaps = [
        by_run["right labels", seed]["gold"] - by_run[failure, seed]["gold"] for seed in range(10)
    ]
    print(f"{failure:10} gold lower on {sum(gap > 0 for gap in gaps)} of 10 seeds,", end=" ")
    print(f"by {sum(gaps) / 10:.2f} ({min(gaps):.2f} to {max(gaps):.2f})")

# %% [markdown]
# The prompt in the labels costs a hundredth of a point here, next to nothing; a forgotten EOS costs more than
# 100 times as much. With long prompts and short responses more of each gradient would go to the prompt; these
# runs do not test that.

# %% [markdown]
# ## The same run with TRL
#
# TRL is the usual library for training language models after pretraining. We give its `SFTTrainer` the same
# base, the same adapter at the start, the same data in the same order, the same schedule. With columns of
# prompts and completions it masks the prompt, as we do. Two things need care: the trainer shuffles, and it
# casts adapters on a quantized base to bfloat16; we keep the order and cast back (the random $A$ has been
# rounded on the way).

# %%
# Pocket only
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer


class InOrder(SFTTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def in_messages(row):
    roles = {"prompt": "user", "completion": "assistant"}
    return {column: [{"role": role, "content": row[column]}] for column, role in roles.items()}


# %% [markdown]
# The settings are those of our run. Checkpoints, logs and progress bars are switched off, and so are two
# defaults that save memory on a GPU: bfloat16 and gradient checkpointing.

# %%
# Pocket only
warnings.filterwarnings("ignore", "`gradient_checkpointing`", FutureWarning)  # a name that changes
settings = SFTConfig(
    output_dir=str(preset.runs / preset.name / "trl"),
    max_steps=config.steps,
    per_device_train_batch_size=config.batch_size,
    per_device_eval_batch_size=128,
    learning_rate=config.learning_rate,
    lr_scheduler_type="linear",
    warmup_steps=config.warmup_steps,
    weight_decay=0.0,
    eval_strategy="steps",
    eval_steps=config.eval_every,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=preset.device == "cpu",
    bf16=False,
    gradient_checkpointing=False,
)

# %%
# Pocket only
roles.add("trl", seed=preset.seed)
trainer = InOrder(
    model=roles.use("trl"),
    args=settings,
    train_dataset=demonstrations.map(in_messages),
    eval_dataset=written.map(in_messages),
    processing_class=tokenizer,
)
trainer.remove_callback(PrinterCallback)
for parameter in roles.parameters("trl").values():
    parameter.data = parameter.data.float()
outcome = trainer.train()

# %%
# Pocket only
theirs = {h["step"]: h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h}
ours = {s.step: s.held_out["loss"] for s in history if s.step in theirs}
fig = plots.lines({"ours": ours, "TRL": theirs}, "updates", "held-out loss, nats per token")
alt = "Two held-out loss curves that lie on each other: "
plots.show(
    fig, alt=alt + f"ours ends at {ours[config.steps]:.3f}, TRL at {theirs[config.steps]:.3f}."
)
theirs_measured = sft.held_out_loss(roles.use("trl"), tokenizer, held_out)
ratio = theirs_measured / measured[-1] - 1
print(f"final held-out loss: ours {measured[-1]:.4f}, TRL {theirs_measured:.4f} ({ratio:z.2%})")
assert abs(ratio) < 0.03

# %% [markdown]
# The curves lie on top of each other: the library does what we wrote out. (The small gap in the figure comes
# from how TRL averages over batches; measured alike, both end at the same number.) From here on we keep our own
# loop, since TRL no longer has one for PPO.

# %% [markdown]
# ## What later lessons load
#
# The adapter is in `runs/`, in PEFT's own format. Later lessons take yours if it is there, and otherwise the
# one that the course ships. Beside a base of two million parameters an adapter of rank 16 is not small; beside
# a 7B model it is less than one percent (the exercise counts both).

# %%
found = find_adapter(preset, "sft")
for path in sorted(found.iterdir()):
    print(f"{path.name:28}{path.stat().st_size / 1024:8.0f} KiB")

# %% tags=["headline"]
print(f"held-out loss {loss_before:.3f} -> {measured[-1]:.3f}")

# %% tags=["headline"]
# Pocket only
print(f"TRL {theirs_measured:.3f}; gold {marks_before.total:.2f} -> {marks_after.total:.2f} of 1.9")
print(f"answers the question: {share(rows_before, tests['answers the question'])}", end=" ")
print(f"-> {share(rows_after, tests['answers the question'])}; no EOS: gold {golds['no EOS']:.2f}")

# %% [markdown]
# ## Recap
#
# - Labels decide what is learnt: the response and its EOS, nothing else.
# - NF4 takes 4.5 bits for a weight (4.127 with double quantization), at a relative error near a tenth.
# - LoRA trains a small update; with $B = 0$ it starts exactly at the base.
# - SFT copies its demonstrations: their form, and their share of mistakes. Which of several plausible answers
#   is *better*, it cannot say.
#
# **Further reading.** Ouyang et al. 2022 (arXiv 2203.02155), section 3.5: SFT as the first step.
# Hu et al. 2021, *LoRA* (arXiv 2106.09685), equation 3. Dettmers et al. 2023, *QLoRA* (arXiv 2305.14314),
# section 3 and appendix E for the levels.
