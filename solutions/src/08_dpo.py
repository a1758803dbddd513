# %% [markdown]
# # 08 · Exercises: DPO
#
# **Run time** about a minute and a half on two CPU cores · **Your time** about 60 minutes · **Before this**
# lesson 08
#
# You write DPO's loss and the rewards that are hidden in it, use them to judge pairs, and find out from three logs
# which run had the wrong reference. The check below each function names the likely mistake; the cells after it go on
# with a reference version, so that Run All works with nothing filled in, or with a wrong answer; only an error in
# your code stops it. To compare with the solution, run `nbdiff-web exercises/08_dpo.ipynb solutions/08_dpo.ipynb` in
# the course's folder.

# %%
PRESET = "pocket"  # every number below is from this preset

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from rlhf_helpers import checks, dpo, notebook, reward
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.preferences import collect_preferences
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import preference_dataset, prompt_dataset
from rlhf_helpers.text import load_tokenizer, pad_examples

# %% [markdown]
# Four roles: the policy begins as a copy of its reference, the SFT adapter. The reward model of lesson 02 is there
# for comparison, and `base` is a new adapter: it has B = 0 and changes nothing, so it answers as the bare base does.

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer = load_tokenizer(preset)
roles = Roles(load_base(preset))
roles.load("reference", find_adapter(preset, "sft"))
roles.load("reward", find_adapter(preset, "reward"))
roles.add("policy", copy_of="reference")
roles.add("base", trainable=False)

# %% [markdown]
# And pairs, made as in lesson 02: answers of the SFT model, compared by the annotator. (With another preset they are
# pairs that people have judged.)

# %%
if preset.name == "pocket":
    prompts = list(prompt_dataset(preset)["prompt"])[::3]
    pairs = collect_preferences(roles.use("reference"), tokenizer, prompts, Annotator(), seed=1)
else:
    pairs = preference_dataset(preset)
    pairs = pairs.select(range(min(200, len(pairs))))
train, held_out = (
    reward.encode_pairs(tokenizer, rows, preset.prompt_length, preset.response_length)
    for rows in reward.split_by_prompt(pairs, share=1 / 4)
)
print(f"{len(train)} pairs to train on, {len(held_out)} held out, of other prompts")

# %% [markdown]
# ## 1 · The loss
#
# ●●○ · 15 minutes
#
# For each pair there are four log-probabilities of whole responses: of the chosen and of the rejected one, under the
# policy and under the reference. With
#
# $$h = \bigl[\log \pi(y_c|x) - \log \pi_{\text{ref}}(y_c|x)\bigr] - \bigl[\log \pi(y_r|x) - \log
# \pi_{\text{ref}}(y_r|x)\bigr]$$
#
# the loss of a pair is $-\log \sigma(\beta h)$, and that of a batch the mean over its pairs. No gradient goes to the
# reference, even if its log-probabilities come with a graph.
#
# By hand: the policy gives the chosen response 0.3 and the rejected one 0.2, the reference 0.1 and 0.2. Then $h =
# \log 3 - \log 1$; at β = 1 the predicted probability of the choice is $\sigma(\log 3) = \tfrac34$, and the loss
# $\log \tfrac43 = 0.288$.


# %% tags=["nbval-check-output"]
def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """Mean over the pairs of -log σ(β h).

    Args:
        chosen_logprobs, rejected_logprobs: [N], of whole responses under the policy, in nats.
        ref_chosen_logprobs, ref_rejected_logprobs: [N], of the same responses under the reference.
        beta: β, above 0.

    Returns:
        A scalar tensor, differentiable with respect to the policy's log-probabilities alone.
    """
    ### BEGIN SOLUTION
    ref_gap = (ref_chosen_logprobs - ref_rejected_logprobs).detach()
    h = (chosen_logprobs - rejected_logprobs) - ref_gap
    return -logsigmoid(beta * h).mean()
    ### END SOLUTION


checks.check_dpo_loss(dpo_loss)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Write h in one line, and mind the signs when you open the second bracket. The rest is the loss of lesson 02 with βh
# in the place of the gap, and the same advice holds: logarithm and σ in one step. The reference's numbers are data,
# and data has no graph: <code>detach</code>.
# </details>

# %% [markdown]
# From here on we use the package's version, on real pairs. The policy is still a copy.
#
# <details><summary><b>Predict before you run.</b> What is the loss at β = 0.1, and at β = 1? And what if the reference
# is the bare base?</summary>
#
# log 2 = 0.693 for any β and any pairs: all log-ratios are 0. With the base as the reference they are not, and the
# loss is some other number, which depends on β.
# </details>

# %%
from rlhf_helpers.dpo import dpo_loss, pair_logprobs

policy, reference, base = (
    pair_logprobs(roles, role, tokenizer, held_out) for role in ("policy", "reference", "base")
)
for name, fixed in (("SFT adapter", reference), ("bare base", base)):
    losses = ", ".join(f"{dpo_loss(*policy, *fixed, beta):.4f} at β = {beta}" for beta in (0.1, 1))
    print(f"reference the {name}: loss {losses}")
assert abs(dpo_loss(*policy, *reference, 0.1) - 0.6931) < 1e-4
assert preset.name != "pocket" or abs(dpo_loss(*policy, *base, 0.1) - 0.6931) > 1e-3

# %% [markdown]
# **In words.** A loss of 0.693 in the first row of a log: what does it show, and what does it not?

# %% [markdown] tags=["solution"]
# It shows that policy and reference gave the same log-probabilities to these responses, so that the policy began as
# a copy of whatever the reference is (or that the two are one and the same model, which would stay at 0.693 for
# ever). It does not show that the reference is the *right* one: had the policy begun as a fresh adapter on the bare
# base, with the bare base as its reference, the loss would be log 2 as well. Nor does it say anything about the
# sides: swap chosen and rejected, and it is still log 2.

# %% [markdown]
# ## 2 · Implicit rewards
#
# ●●○ · 15 minutes
#
# A policy that DPO has trained carries its reward model with it: $\hat r(x, y) = \beta \log \frac{\pi(y|x)}
# {\pi_{\text{ref}}(y|x)}$. Now compute it from the tokens. A model returns log-probabilities for all tokens of a row:
# prompt, response, padding. Those of the response, EOS included, are marked by 1 in `response_mask`; the
# log-probability of the response is their *sum*.
#
# By hand: a prompt of one token, a response of two, one token of padding. The policy finds the two tokens of the
# response 2 times and $\tfrac32$ times as likely as the reference does; with β = 1 the reward is
# $\log 2 + \log \tfrac32 = \log 3 = 1.099$, whatever stands at prompt and padding.


# %% tags=["nbval-check-output"]
def implicit_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """β times the log-ratio of each whole response.

    Args:
        logprobs, ref_logprobs: [B, L], of prompt, response and padding, in nats.
        response_mask: [B, L], int64, 1 on the tokens of the response, EOS included, else 0.
        beta: β, above 0.

    Returns:
        [B]; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    log_ratios = (logprobs - ref_logprobs) * response_mask
    return beta * log_ratios.sum(dim=1)
    ### END SOLUTION


checks.check_implicit_rewards(implicit_rewards)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Take the log-ratio of every token first, then 0 wherever the mask is 0. Which dimension has the tokens of one
# response?
# </details>

# %% [markdown]
# From here on we use the package's version. First the policy has to learn something: thirty steps of DPO.

# %%
config = dpo.DPOConfig(**{"steps": 30, "warmup_steps": 3, "eval_every": 10} | preset.dpo)
run = dpo.train_dpo(roles, "policy", "reference", tokenizer, train, held_out, config)
for stats in tqdm(run, total=config.steps + 1):
    if stats.held_out:
        print(f"step {stats.step:2}", {k: round(v, 3) for k, v in stats.held_out.items()})

# %% [markdown]
# Here are its implicit rewards for one pair, token by token: the tokens' log-ratios, times β, add up to the reward.

# %%
from rlhf_helpers.checks.lesson_08 import implicit_rewards


def token_logprobs(role, examples):
    """Log-probabilities of the tokens under a role, 0 at the prompt; and the response's mask."""
    ids, mask, P = pad_examples(tokenizer, examples)
    ids, mask = ids.to(roles.base.device), mask.to(roles.base.device)
    response_mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= P)
    with torch.no_grad():
        logprobs = response_logprobs(roles.use(role), ids, mask, ids.shape[1] - P)
    filled = torch.nn.functional.pad(logprobs, (P, 0))  # nobody asks about the prompt
    return filled, response_mask


pair = [held_out[0][side] for side in dpo.SIDES]
curr, mask = token_logprobs("policy", pair)
ref, _ = token_logprobs("reference", pair)
for i, example in enumerate(pair):
    worth = (config.beta * (curr - ref)[i])[mask[i] == 1].tolist()
    words = [tokenizer.decode(token).strip() for token in example["response"]]
    print("  ".join(f"{word} {x:+.2f}" for word, x in zip(words, worth, strict=True)))
rewards = implicit_rewards(curr, ref, mask, config.beta)
print("implicit rewards:", [round(x, 2) for x in rewards.tolist()])

# %% [markdown]
# The words are worth next to nothing: both models would have said them. Nearly all of the reward is at EOS, and alike
# in both answers: the policy has become less ready to stop. That does not tell the two answers apart; by a hair this
# pair is even ranked the wrong way round.
#
# Now the judge as a whole: on how many held-out pairs does it side with the annotator, and on how many with the
# reward model of lesson 02, which was trained on more than three times as many pairs, and on most of these prompts
# too?

# %%
examples = [pair[side] for side in dpo.SIDES for pair in held_out]
curr, mask = token_logprobs("policy", examples)
ref, _ = token_logprobs("reference", examples)
implicit = implicit_rewards(curr, ref, mask, config.beta).split(len(held_out))
explicit = reward.pair_scores(roles, "reward", tokenizer, held_out)
right = {
    "implicit rewards": reward.pair_accuracy(*implicit),
    "reward model": reward.pair_accuracy(*explicit),
}
for name, share in right.items():
    print(f"{name:17} {share:.2f} of {len(held_out)} pairs ranked as chosen")
agree = ((implicit[0] > implicit[1]).cpu() == (explicit[0] > explicit[1])).float().mean()
print(f"they agree on {agree:.2f}")
assert preset.name != "pocket" or right["implicit rewards"] > 0.6

# %% [markdown]
# **In words.** `train_dpo` reports an accuracy of 0.5 before the first step. Why exactly that? (How does an accuracy
# count a tie?) And what would a mean over tokens in place of the sum do to a pair of a short and a long answer?

# %% [markdown] tags=["solution"]
# The policy is a copy, so all implicit rewards are 0: every pair is a tie, and a tie counts half (exercise 02). With
# a mean over tokens the reward of a long answer would be divided by a larger number, so that the same log-ratio is
# worth less there; that is another method (it is called length-normalised DPO), and its β multiplies nats per token,
# not nats per response. The derivation needs the sum, since the policy's probability of a response is the product
# over its tokens.

# %% [markdown]
# ## 3 · Three logs
#
# ●●● · 15 minutes
#
# Three recorded runs of DPO at β = 0.1 on the pocket world, measured on the same held-out pairs of lesson 02: `loss`,
# `accuracy` of the implicit rewards, mean log-ratio of chosen and rejected answers in nats, and `margin`, β times their
# difference. All of them ran to the end, and in all of them the loss fell. In one the reference was wrong.

# %%
logs = {name: checks.dpo_log(name) for name in "ABC"}
names = [name for name in logs["A"][0] if name != "step"]
for log, rows in logs.items():
    print(f"{log}\nstep " + " ".join(f"{name:>18}" for name in names))
    for row in rows:
        print(f"{row['step']:4.0f} " + " ".join(f"{row[name]:18.3f}" for name in names))

# %% [markdown]
# These are the stories to choose from, one for each log.

# %%
for origin, what in checks.ORIGINS.items():
    print(f"{origin:14} {what}")

# %% tags=["nbval-check-output"]
answers = {"A": ..., "B": ..., "C": ...}
### BEGIN SOLUTION
answers = {"A": "second round", "B": "bare base", "C": "copy"}
### END SOLUTION
checks.check_origins(answers)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Only the first row of each log is needed. What must stand there if policy and reference are one and the same model?
# The pairs are answers of the SFT model, with all their mistakes. Which model finds them likelier, SFT or the bare
# base, and is that so for chosen answers only? And what kind of policy ranks pairs right before its first step?
# </details>

# %% [markdown]
# How far away is the wrong reference? The mean log-ratio of responses *sampled from SFT* estimates a KL (lesson 05),
# and the responses of the pairs, both sides together, are nearly such samples. Here are the numbers for the pairs above:

# %%
# Pocket only
gaps = [(a - b).mean().item() for a, b in zip(reference, base, strict=True)]
first = [logs["B"][0][f"{side}_log_ratio"] for side in dpo.SIDES]
print(f"log SFT − log base: chosen {gaps[0]:.2f}, rejected {gaps[1]:.2f} nats per response")
print(f"log B before step 1: chosen {first[0]:.2f}, rejected {first[1]:.2f}")
assert max(abs(a - b) for a, b in zip(gaps, first, strict=True)) < 0.5

# %% [markdown]
# **In words.** Nothing crashed in that run, and its loss fell. What was wrong with it, in terms of the objective? And
# where does the mistake come from in practice?

# %% [markdown] tags=["solution"]
# DPO's objective is reward minus β KL to the *reference*. With the bare base there, the policy pays for having learnt
# to be an assistant, and every pair is judged with an offset that has nothing to do with the annotator: how much more
# SFT raised the one answer than the other. That offset changes how hard each pair pulls: a little at a small β, a lot
# at a large one. In a run as short as this the results hardly differ (lesson 08), so only the first row gives it
# away. In practice the mistake is one line: with adapters, "the reference is the model with the adapter switched off"
# is right if the policy's adapter is *new*, and wrong if the SFT model was an adapter and the policy goes on from it.
# Libraries that copy the given adapter to one called "ref" avoid it; those that only switch adapters off do not.
