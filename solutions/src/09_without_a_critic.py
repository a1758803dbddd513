# %% [markdown]
# # 09 · Exercises: without a critic
#
# **Run time** about half a minute on two CPU cores · **Your time** about 60 minutes · **Before this**
# lesson 09
#
# You write two of the three group advantages and GRPO's KL penalty, derive that penalty's gradient, and find out from
# the numbers of a run why nothing is learnt in it. The check below each function names the likely mistake; the cells
# after it go on with a reference version, so that Run All works with nothing filled in, or with a wrong answer; only an
# error in your code stops it. To compare with the solution, run `nbdiff-web exercises/09_without_a_critic.ipynb
# solutions/09_without_a_critic.ipynb` in the course's folder.

# %%
PRESET = "pocket"  # every number below is from this preset

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_helpers import checks, notebook, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import load_tokenizer

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer = load_tokenizer(preset)
prompts = list(prompt_dataset(preset)["prompt"])

# %% [markdown]
# ## 1 · Leave one out
#
# ●○○ · 10 minutes
#
# `scores` are `[B]`; those of one prompt stand side by side, `group_size` of them. The advantage of a response is its
# score less the mean of the *other* scores in its group.
#
# By hand: a group of 3, 1 and 2. The first response is compared with (1 + 2)/2 = 1.5, so it gets 1.5; the second with 2.5,
# so −1.5; the third with 2, so 0.


# %% tags=["nbval-check-output"]
def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """Each score less the mean of the others of its group.

    Args:
        scores: [B], floating point.
        group_size: responses to each prompt; divides B.

    Returns:
        [B]; the argument stays as it is.
    """
    ### BEGIN SOLUTION
    groups = scores.view(-1, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()
    ### END SOLUTION


checks.check_leave_one_out(leave_one_out)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Let each row be a group. The sum of the others is the sum of the row less the response's own score. How many others
# are there?
# </details>
#
# ## 2 · Divide by the spread
#
# ●○○ · 10 minutes
#
# GRPO takes off the mean of the *whole* group and divides by the group's standard deviation plus $10^{-4}$. The
# deviation has $G - 1$ in its denominator, as torch computes it. By hand: 3, 1 and 2 have the mean 2 and the deviation
# 1, so the advantages are nearly 1, −1 and 0.


# %% tags=["nbval-check-output"]
def grpo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Each score less the mean of its group, over the group's standard deviation plus 1e-4.

    Args:
        scores: [B], floating point.
        group_size: responses to each prompt; divides B.

    Returns:
        [B]; 0 in a group whose scores are all equal.
    """
    ### BEGIN SOLUTION
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()
    ### END SOLUTION


checks.check_grpo_advantages(grpo_advantages)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Without the $10^{-4}$ a group of equal scores is 0/0.
# </details>
#
# From here on we use the reference versions. Take three prompts: an easy one with a verifier's scores, one that was
# answered right half of the time, and one to which all answers are equally good, but for noise in the scores:

# %% tags=["nbval-check-output"]
from rlhf_helpers.checks.lesson_09 import grpo_advantages, leave_one_out

easy, even, noise = [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.500, 0.501, 0.499, 0.500]
scores = torch.tensor(easy + even + noise)
for name, advantages in (("leave-one-out", leave_one_out), ("GRPO", grpo_advantages)):
    for prompt, group in zip(
        ("easy", "even", "noise"), advantages(scores, 4).split(4), strict=True
    ):
        print(f"{name:14}{prompt:6}", [round(x, 4) for x in group.tolist()])

# %% [markdown]
# **In words.** By what factor does the division change each of the three? When is the third a danger?

# %% [markdown] tags=["solution"]
# By 1.5, 1.3 and about 800. So the easy prompt gains a little on the even one, as a hard one would, and a difference of
# a thousandth counts about as much as one between right and wrong. With a verifier this cannot happen, since a score is
# 0 or 1. With a reward model, scores nearly always differ a little, by chance or by the model's whims, and on every
# prompt that the policy already answers well it is then trained on just that. Leave-one-out gives such differences no
# more weight than they have in the score.

# %% [markdown]
# ## 3 · k3 in the loss
#
# ●●○ · 15 minutes
#
# GRPO adds β times a penalty to the loss, the mean of k3. Its paper averages it as its loss, over each response first;
# here, for simplicity, it is the mean over all response tokens of the batch (part 4 averages as the paper does):
#
# $$k_3 = e^{r} - 1 - r, \qquad r = \log \pi_{\text{ref}}(a_t) - \log \pi(a_t).$$
#
# By hand: the policy gave both tokens ½, the reference ¼ and ¾. Then $r$ is $\log \tfrac12$ and $\log \tfrac32$, k3 is
# 0.193 and 0.095, and the penalty 0.144. The gradient goes to the policy only, not to the reference.


# %% tags=["nbval-check-output"]
def k3_penalty(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """The mean of k3 over the response tokens.

    Args:
        logprobs: [B, T], of the sampled tokens under the policy, in nats.
        ref_logprobs: [B, T], of the same tokens under the reference; data.
        response_mask: [B, T], int64, 1 up to and including EOS, then 0.

    Returns:
        A scalar tensor, differentiable with respect to logprobs alone.
    """
    ### BEGIN SOLUTION
    r = ref_logprobs.detach() - logprobs
    k3 = r.exp() - 1 - r
    return (k3 * response_mask).sum() / response_mask.sum()
    ### END SOLUTION


checks.check_k3_penalty(k3_penalty)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Which way round is r? At a token that the policy likes better than the reference does, r is below 0.
# </details>
#
# From here on we use the reference version. Here is its gradient at three tokens, which the policy finds twice,
# equally and half as likely as the reference does (times 3, since the penalty is a mean over three tokens):

# %% tags=["nbval-check-output"]
from rlhf_helpers.checks.lesson_09 import k3_penalty

logprobs = torch.tensor([[0.5, 0.25, 0.125]]).log().requires_grad_()
ref_logprobs = torch.full((1, 3), 0.25).log()
penalty = k3_penalty(logprobs, ref_logprobs, torch.ones(1, 3, dtype=torch.long))
(gradient,) = torch.autograd.grad(penalty, logprobs)
print("3 × gradient:", ", ".join(f"{x:z.3f}" for x in (3 * gradient[0]).tolist()))

# %% [markdown]
# **In words.** Derive those three numbers. k1, whose value is $-r$, has the gradient 1 at every token. Why then does k1
# in the loss, on average, not hold the policy back, while k3 does?

# %% [markdown] tags=["solution"]
# The derivative of $r$ is −1, so that of k3 is $1 - e^{r}$: $1 - \tfrac12$, $1 - 1$ and $1 - 2$. A step downhill makes
# a token less likely if the policy likes it better than the reference does, and more likely if it likes it less. k1
# pushes every sampled token down by the same amount, and since $\mathbb{E}_\pi[\nabla \log \pi] = 0$, these pushes
# cancel on average. k3's push differs from token to token, and its mean is $-\mathbb{E}_\pi[e^{r} \nabla \log \pi]$,
# the gradient of $\mathrm{KL}(\pi_{\text{ref}} \| \pi)$: not that of the KL that was asked for, but one that is 0 in
# the same place.

# %% [markdown]
# ## 4 · A run in which nothing is learnt
#
# ●●○ · 15 minutes
#
# Users ask again and again why their reward does not move. A number to look at first is the share of groups that teach
# anything: those in which not all scores are equal.


# %% tags=["nbval-check-output"]
def teaching_share(scores: Tensor, group_size: int) -> float:
    """The share of groups in which not all scores are equal.

    Args:
        scores: [B].
        group_size: responses to each prompt; divides B.

    Returns:
        A number from 0 to 1.
    """
    ### BEGIN SOLUTION
    groups = scores.view(-1, group_size)
    differ = groups.max(dim=1).values > groups.min(dim=1).values
    return differ.float().mean().item()
    ### END SOLUTION


checks.check_teaching_share(teaching_share)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# A group teaches if its best score is above its worst.
# </details>
#
# From here on we use the reference version. Three short runs of the same loop follow, each from the same three roles:

# %%
from rlhf_helpers.checks.lesson_09 import teaching_share


def three_roles():
    roles = Roles(load_base(preset))
    roles.load("reference", find_adapter(preset, "sft"))
    roles.load("reward", find_adapter(preset, "reward"))
    roles.add("policy", copy_of="reference")
    return roles


# %% [markdown]
# Two rewards are programs: A pays for an answer that ends by itself, B for one of fewer than eight tokens. C is the
# reward model of lesson 02.


# %%
def ends(prompts, rollout):
    return rollout.finished.float()


def is_short(prompts, rollout):
    return (rollout.response_mask.sum(-1) < 8).float()


# %%
settings = {"advantages": "grpo", "group_size": 4, "mean_over": "responses", "updates": 3}
settings |= {"kl_in": "loss", "kl_kind": "k3", "eos_penalty": 0.0}
config = ppo.PPOConfig(seed=preset.seed, **preset.ppo | settings)
logs = {}
for name, reward_function in (("A", ends), ("B", is_short), ("C", None)):
    run = ppo.train_ppo(three_roles(), tokenizer, prompts, config, reward_function=reward_function)
    logs[name] = list(tqdm(run, total=config.updates, desc=name))

# %% [markdown]
# What each update reports, with the share of groups that teach beside it. Loss and gradient are means over the update's
# steps, of which only the first is at a ratio of 1, so that the loss is not exactly 0 even in the first update. Reward
# and KL are those of the samples, before any step:

# %%
print(f"{'':10}{'reward':>8}{'loss':>9}{'gradient':>10}{'KL':>7}{'teaching':>10}")
for name, rows in logs.items():
    for stats in rows:
        share = teaching_share(stats.experience.scores, config.group_size)
        print(f"{name} update {stats.update}{stats.score:8.2f}{stats.policy['loss']:9.4f}", end="")
        print(f"{stats.policy['grad_norm']:10.4f}{stats.kl:7.3f}{share:10.0%}")

# %% [markdown]
# **In words.** In one run hardly a weight moves. Which is it, and which two columns show it? (Three updates are too few
# for a reward to show it.) Would more updates help, or a higher learning rate? Which column looks best of all in that run,
# and which looks like the loss of 0 that is no fault? What would the columns be if the program paid for something that
# SFT never does? And what would you change?

# %% [markdown] tags=["solution"]
# A: no gradient, and no group that teaches. SFT's answers nearly all end by themselves, so nearly every group has four
# equal scores; now and then one may differ because an answer was cut off. Equal scores have advantages of 0, so there is
# no gradient, and a higher learning rate times 0 is 0; more updates only sample more of the same. The reward looks best
# of all: it is near its maximum, as after a successful run. If the program paid for something that SFT never does, the
# reward would stand at 0 and the other columns would be the same. The loss looks like the 0 that is no fault: it is near
# 0 in *every* run, the healthy ones too, since the advantages of a group sum to 0. What to change is the reward or the
# prompts: ask what is sometimes right and sometimes wrong, take larger groups, or leave out groups that teach nothing
# and sample others, as DAPO does.
