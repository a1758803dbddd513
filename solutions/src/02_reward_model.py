# %% [markdown]
# # 02 · Exercises: the reward model
#
# **Run time** under half a minute on two CPU cores · **Your time** about 40 minutes · **Before this**
# lesson 02
#
# You write two short functions of lesson 02 and a third that measures how good a model is. The check below each
# of them names the likely mistake; the cells after it use a reference version, so that Run All works with
# nothing filled in, or with a wrong answer; only an error in your code stops it. To compare with the solution,
# run `nbdiff-web exercises/02_reward_model.ipynb solutions/02_reward_model.ipynb` in the course's folder.

# %%
import torch
from torch import Tensor

from rlhf_helpers import checks
from rlhf_helpers.base import load_base
from rlhf_helpers.pocket import world
from rlhf_helpers.pocket.annotator import Annotator, ceiling
from rlhf_helpers.pocket.rubric import count_phrases, gold_reward
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import preference_dataset
from rlhf_helpers.stats import share_with_interval
from rlhf_helpers.text import encode_examples, load_tokenizer, pad_examples

# %%
preset = PRESETS["pocket"]  # always: every number below is about this model
torch.manual_seed(preset.seed)
tokenizer = load_tokenizer(preset)
pairs = preference_dataset(preset, "held_out")
print(f"{len(pairs)} pairs, such as {pairs[1]}")

# %% [markdown]
# These are not the pairs of the lesson: there is one for each held-out prompt, of answers written in the style
# of the base text, so that nothing has to be sampled. The annotator is the same.

# %% [markdown]
# ## 1 · The pairwise loss
#
# ●●○ · 15 minutes
#
# Bradley and Terry say that the chosen response wins with probability $\sigma(r_c - r_r)$. The loss is
# the mean surprise at $N$ choices, in nats:
#
# $$L = -\frac{1}{N} \sum_{i=1}^{N} \log \sigma(r_{c,i} - r_{r,i})$$
#
# By hand: rewards (1, 2) of the chosen and (1, 0) of the rejected have gaps 0 and 2, so
# $L = (0.693 + 0.127) / 2 = 0.410$. Loss and gradient must stay right, in float32, at gaps of ±200.


# %% tags=["nbval-check-output"]
def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean surprise at the choices, -log σ(chosen - rejected), in nats.

    Args:
        chosen, rejected: [N], float32, rewards of the preferred and of the other responses.

    Returns:
        A scalar tensor, differentiable with respect to both; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    ### END SOLUTION


checks.check_pairwise_loss(pairwise_loss)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Written as it stands, σ first and the logarithm second, the loss breaks where σ rounds to 0. Rewrite
# $-\log \sigma(\Delta)$ as $\log(1 + e^{-\Delta})$: for a very negative gap that is about $-\Delta$, a harmless
# number, though $e^{-\Delta}$ itself overflows. <code>torch.nn.functional</code> has functions that switch from
# one form to the other where needed.
# </details>

# %% [markdown]
# From here on we use the package's version, here beside the loss written in two steps, in float32.

# %%
from rlhf_helpers.reward import pairwise_loss


def two_steps(chosen, rejected):
    return -torch.sigmoid(chosen - rejected).log().mean()


def value_and_gradient(loss, gap):
    chosen = gap.clone().requires_grad_()
    value = loss(chosen, torch.zeros(1))
    return value.item(), *torch.autograd.grad(value, chosen)


# %% [markdown]
# <details><summary><b>Predict before you run.</b> At which of these gaps does the version in two steps
# fail, at the large positive or at the large negative ones?</summary>
#
# At the negative ones, where the model is badly wrong: σ rounds to 0 there and its logarithm is −∞. At
# the positive ones σ rounds to 1, and the loss to 0, which is nearly true.
# </details>

# %%
print("      ---two steps---- -----stable-----")
print("  gap     loss    slope     loss    slope    σ - 1")
for gap in torch.tensor([[-200.0], [-100], [-10], [-1], [0], [1], [10], [200]]):
    naive, stable = (value_and_gradient(loss, gap) for loss in (two_steps, pairwise_loss))
    numbers = (*naive, *stable, gap.sigmoid() - 1)
    print(f"{gap.item():5.0f}", *[f"{float(number):z8.3f}" for number in numbers], sep=" ")
    torch.testing.assert_close(stable[1], gap.sigmoid() - 1)

# %% [markdown]
# One NaN in the gradient ends a training run, and it comes from the very pair that has most to teach. The
# stable slope, the gradient with respect to the chosen reward, is −(1 − σ): close to −1 for a pair that is
# badly wrong, −½ for a tie, close to 0 for a pair that is settled.
#
# Accuracy asks only which reward is higher; the loss asks also by how much. Take the annotator's own
# utility, divide it by the annotator's temperature, and you have the true log-odds of each choice. What
# if they are scaled?

# %%
annotator = Annotator()


def rewards_by(score):
    sides = ("chosen", "rejected")
    return [torch.tensor([float(score(p["prompt"], p[s])) for p in pairs]) for s in sides]


# %% [markdown]
# <details><summary><b>Predict before you run.</b> The scale 1 is the true model of these labels. Is its
# loss 0? Is it the lowest?</summary>
#
# It is not 0, since the labels are drawn by chance and a true model is still surprised at times. It is
# the lowest, up to the luck of these draws. At scale 0 every pair is a tie, at log 2.
# </details>

# %%
chosen, rejected = rewards_by(annotator.utility)
for scale in (0, 0.25, 0.5, 1, 2, 4, 8):
    odds = scale / annotator.temperature
    print(f"scale {scale:<5} loss {pairwise_loss(odds * chosen, odds * rejected):.3f} nats")

# %% [markdown]
# All scales above 0 have the same accuracy, but very different losses. A model that is 8 times too sure of the
# right ranking loses more than one that says nothing at all: the few choices that go against it surprise it too
# much.
#
# **In words.** Add 5 to every reward, chosen and rejected. What happens to the loss, and what does that
# say about the number that a reward model gives to a single response?

# %% [markdown] tags=["solution"]
# Nothing: only gaps enter, so a constant cancels. The data therefore say nothing about where 0 is, and a
# reward of 3 alone is neither good nor bad. Whoever needs a zero must set one, as lesson 02 does when it
# shifts the rewards so that the SFT model's samples have mean 0.

# %% [markdown]
# ## 2 · The last real token
#
# ●○○ · 10 minutes
#
# The reward is read where the whole response has been seen: at the last real token, its EOS. Padding
# may stand on either side, or on both. For each row $b$ of the mask $m$,
#
# $$t_b = \max \{\, t : m_{b,t} = 1 \,\}$$
#
# By hand: (1, 1, 0) gives 1 and (0, 1, 1) gives 2.


# %% tags=["nbval-check-output"]
def last_token_index(attention_mask: Tensor) -> Tensor:
    """Column of the last real token of each row, whichever side the padding is on.

    Args:
        attention_mask: [B, L], 1 for a real token, 0 for padding; every row has a 1, and its
            1s stand side by side.

    Returns:
        [B], integers (int64): columns counted from 0.
    """
    ### BEGIN SOLUTION
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * columns).argmax(-1)
    ### END SOLUTION


checks.check_last_token_index(last_token_index)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# How many tokens are real does not say where they stand, so counting is not enough. Give every column its
# number, and let the mask set those at padding to 0: which column of a row has the largest number left? Or
# mirror the mask, and look for the first real token there. <code>argmax</code> takes an integer mask, but not
# booleans.
# </details>

# %% [markdown]
# From here on we use the package's version. Three real responses make a batch, padded in three ways: all on the
# left, all on the right, and as `pad_examples` does it, prompts on the left and responses on the right.

# %%
from rlhf_helpers.reward import last_token_index

rows = pairs.select([89, 273, 135]).rename_column("chosen", "completion")
examples = encode_examples(tokenizer, rows, preset.prompt_length, preset.response_length)
whole = {"input_ids": [example["prompt"] + example["response"] for example in examples]}
batches = {
    side: tokenizer.pad(whole, padding_side=side, return_tensors="pt").values()
    for side in ("left", "right")
}
batches["both"] = pad_examples(tokenizer, examples)[:2]
for number, row in enumerate(rows):
    print(f"row {number}: {row['prompt']} {row['completion']}")

# %% [markdown]
# Which token does each rule pick, row by row? Two of the rules are common habits, each right for one kind of
# padding.

# %%
rules = {
    "count - 1": lambda mask: mask.sum(-1) - 1,
    "last column": lambda mask: torch.full((len(mask),), mask.shape[1] - 1),
    "last real": last_token_index,
}

# %% [markdown]
# <details><summary><b>Predict before you run.</b> For each of the two habits: under which paddings does
# it find EOS in all three rows?</summary>
#
# Counting finds it under right padding only, the last column under left padding only. With padding on
# both sides neither does: counting is right in the row with the longest prompt, the last column in the
# row with the longest response.
# </details>

# %%
print(f"{'':28}", *[f"row {number}    " for number in range(3)])
for side, (input_ids, mask) in batches.items():
    for name, rule in rules.items():
        picked = input_ids.gather(1, rule(mask)[:, None]).squeeze(1)
        words = [tokenizer.decode(token).strip() for token in picked]
        print(f"padding {side:6} {name:12}", *[f"{word:10}" for word in words])
    assert (picked == tokenizer.eos_token_id).all()

# %% [markdown]
# A wrong pick raises no error. The model would be trained and used with rewards read off some word in the
# middle, or off padding. So test it: the reward of a response must not depend on where its padding stands. Here
# is the second response of the batch, with a fresh head, untrained.

# %%
roles = Roles(load_base(preset))
roles.add("reward")
roles.add_head("reward")
with torch.no_grad():
    values = {side: roles.values("reward", *batch) for side, batch in batches.items()}

# %% [markdown]
# The last real token gives it the same reward all three times; the habits do not:

# %%
for name, rule in rules.items():
    picked = {side: values[side][1, rule(mask)[1]].item() for side, (_, mask) in batches.items()}
    print(f"{name:12}", *[f"   {side} {reward:6.3f}" for side, reward in picked.items()])
torch.testing.assert_close(picked["left"], picked["both"], rtol=1e-3, atol=1e-3)
torch.testing.assert_close(picked["right"], picked["both"], rtol=1e-3, atol=1e-3)

# %% [markdown]
# **In words.** Why the last token, and not the mean of the head's values over all tokens of the response?

# %% [markdown] tags=["solution"]
# Under causal attention a token's hidden state knows only the token itself and what stands before it. The first
# token of a response knows nothing of the rest; only the last one has seen all of it, and that the response
# ends there. A mean would mix in values that were given before a mistake or an insult was written. The network
# could learn to live with that, but the last position already has everything the mean has.

# %% [markdown]
# ## 3 · Accuracy on held-out pairs
#
# ●○○ · 15 minutes
#
# The accuracy of a reward model is the share of pairs in which the chosen response has the higher
# reward. A tie counts half, which is what guessing would earn:
#
# $$A = \frac{1}{N} \sum_{i=1}^{N} \begin{cases} 1 & r_{c,i} > r_{r,i} \\ \tfrac12 & r_{c,i} = r_{r,i} \\ 0
# & r_{c,i} < r_{r,i} \end{cases}$$
#
# By hand: rewards (2, 1, 3, 0) of the chosen and (1, 1, 0.5, 3) of the rejected give
# $A = (1 + \tfrac12 + 1 + 0)/4 = 0.625$.


# %% tags=["nbval-check-output"]
def pair_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Share of pairs whose chosen response has the higher reward; a tie counts half.

    Args:
        chosen, rejected: [N], rewards of the preferred and of the other responses.

    Returns:
        A number between 0 and 1.
    """
    ### BEGIN SOLUTION
    wins, ties = (chosen > rejected).float(), (chosen == rejected).float()
    return (wins + 0.5 * ties).mean().item()
    ### END SOLUTION


checks.check_pair_accuracy(pair_accuracy)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Two comparisons give two boolean tensors, wins and ties. PyTorch takes no mean of booleans:
# <code>.float()</code> makes them 0 and 1, and the outcome of each pair is a weighted sum of the two. What is
# left is a mean: over how many pairs?
# </details>

# %% [markdown]
# From here on we use the package's version. Here are six "reward models" that nobody trained, on the held-out
# pairs. The interval is Wilson's at 95%, as in lesson 01. It treats each pair as won or lost; a tie, which
# always counts half, varies less, so with many ties the interval is too wide rather than too narrow.

# %%
from rlhf_helpers.reward import pair_accuracy

models = {
    "the same for all": lambda prompt, response: 0,
    "fewer words": lambda prompt, response: -len(response.split()),
    "not rude": lambda prompt, response: -count_phrases(response, world.RUDE),
    "polite phrases": lambda prompt, response: count_phrases(response, world.POLITE),
    "gold rubric": lambda prompt, response: gold_reward(prompt, response).total,
    "annotator's utility": annotator.utility,
}

# %% [markdown]
# <details><summary><b>Predict before you run.</b> Which is the best of the first four? And does the gold
# rubric, which defines what a good answer is, reach the ceiling?</summary>
#
# The fourth, but none of them comes near the rubric. The rubric stays below the ceiling: the labels come
# from an annotator who likes politeness and length more than the rubric does.
# </details>

# %%
print("                      accuracy        95%       ties")
for name, score in models.items():
    chosen, rejected = rewards_by(score)
    accuracy, ties = pair_accuracy(chosen, rejected), (chosen == rejected).float().mean()
    right = round(accuracy * len(pairs))
    _, low, high = share_with_interval([True] * right + [False] * (len(pairs) - right))
    print(f"{name:22}{accuracy:7.3f}    {low:.3f}-{high:.3f}   {ties:5.1%}")
print(f"{'ceiling':22}{ceiling(list(pairs['probability'])):7.3f}")

# %% [markdown]
# How ties are counted decides what you read here. "Not rude" says nothing about four pairs in five: with ties
# counted as wrong it would get 0.149, as right 0.973. The rubric falls short of the ceiling because it does not
# see what the annotator adds for phrases and words. And why does "fewer words" do worse than guessing?

# %%
chosen, rejected = rewards_by(models["fewer words"])
equal = torch.eq(*rewards_by(models["polite phrases"]))
for name, kept in {"equally many polite phrases": equal, "more on one side": ~equal}.items():
    accuracy = pair_accuracy(chosen[kept], rejected[kept])
    print(f"{name:28} {kept.sum()} pairs, accuracy of fewer words {accuracy:.3f}")

# %% [markdown]
# Mostly because polite phrases are made of words: where both answers have equally many phrases, it does about
# as well as guessing.
#
# **In words.** The ceiling is the best accuracy that any model can expect on such labels, and the
# annotator's own utility lies above it here. Is that a mistake?

# %% [markdown] tags=["solution"]
# No. The ceiling is an expectation, the mean of max(p, 1 − p) over the pairs: what the best model gets on
# average over many draws of the labels. These labels are one draw, and with 598 pairs luck moves the result by
# one or two percentage points either way; the interval, too, contains the ceiling. A model well above the
# ceiling on many more pairs would be a sign that training pairs have leaked into the held-out ones.
