# %% [markdown]
# # 07 · Exercises: the debugging clinic
#
# **Run time** about half a minute on two CPU cores · **Your time** about 50 minutes · **Before this** lesson 07
#
# Six patients to diagnose, and a trainer to mend. The checks say what speaks against a wrong answer; Run All works with
# nothing filled in. To compare with the solution, run `nbdiff-web exercises/07_clinic.ipynb solutions/07_clinic.ipynb`
# in the course's folder.

# %%
from rlhf_helpers import checks, notebook, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.examine import examine
from rlhf_helpers.pocket import world
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import load_tokenizer

preset = PRESETS["pocket"]  # always: the patients are recorded runs of it
notebook.start(preset)

# %% [markdown]
# ## 1 · Six patients
#
# ●●● · 25 minutes
#
# Six recorded runs of thirty updates, with lesson 04's settings and one fault each, and a run without a fault, all with
# the same seed. You get what you would have in life: the log, and ten answers of the last batch. First, what `examine`
# says:

# %%
for name in "ABCDEF":
    rows, texts = checks.patient(name)
    print(name, *(str(alarm)[:98] for alarm in examine(rows)), sep="\n  ")

# %% [markdown]
# An alarm is where to begin looking, not a diagnosis: one fault trips several, and several faults trip the same one.
# The first and the last row of each log, beside those of the healthy run:

# %%
logs = {name: checks.patient(name)[0] for name in ("healthy", *"ABCDEF")}
names = [name for name in logs["A"][0] if name not in ("update", "approx_kl")]
for when in (0, -1):
    print(f"update {logs['A'][when]['update']:.0f}\n{'':18}" + "".join(f"{log:>9}" for log in logs))
    for name in names:
        print(f"{name:18}" + "".join(f"{rows[when][name]:9.3f}" for rows in logs.values()))
lowest = [min(row["kl"] for row in rows) for rows in logs.values()]
print("of all updates\n" + f"{'lowest kl':18}" + "".join(f"{kl:9.3f}" for kl in lowest))

# %% [markdown]
# And what the policies say, five answers each; change the 5 to read all ten:

# %%
for name in ("healthy", *"ABCDEF"):
    print(name)
    for row in checks.patient(name)[1][:5]:
        print(f"  {row['prompt'][:38]:38} {row['text'][:56]}")

# %% [markdown]
# Choose from these: eight illnesses, two more than there are patients, and `healthy`. The name on the left is the
# answer to fill in.

# %%
for illness, what in checks.ILLNESSES.items():
    print(f"{illness:20} {what}")

# %% tags=["nbval-check-output"]
answers = {"A": ..., "B": ..., "C": ..., "D": ..., "E": ..., "F": ...}
### BEGIN SOLUTION
answers = {
    "A": "one_token_off",
    "B": "eos_masked_out",
    "C": "kl_sign",
    "D": "swapped_labels",
    "E": "generate_defaults",
    "F": "lost_gradient",
}
### END SOLUTION
checks.check_patients(answers)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# At the first update nothing has been learnt yet, and all runs have the same seed. Which columns must then be equal to
# the healthy run's, whatever the trainer does afterwards? If one is not, the fault is in what that column is computed
# from. If all are, look for what grows, or does not move at all. In the log of one patient nothing is odd but a sign.
# </details>

# %% [markdown]
# **In words.** In which two logs is `kl` below 0 in some updates? (See the last line of the table.) KL cannot be
# negative in the mean; what makes its estimate so there? And why does no number in the log of patient D show that its
# answers are bad?

# %% [markdown] tags=["solution"]
# The estimate is the mean of $\log \pi - \log \pi_{\text{ref}}$ over the tokens that were sampled. It estimates a KL
# only if all of them come from π. If they come from another distribution (another temperature, top-k, a model that has
# been updated in between), or if the number that is called $\log \pi$ is not that of the token, the mean can have any
# sign. (By chance, too, it can fall below 0 while the policy is still close to the reference.) In A the numbers are not
# those of its tokens. B leaves out a token because of what it is, EOS: what is left is a mean under no policy.
#
# Patient D was trained on a reward with the opposite sign. The trainer raises that score, as it should, and every
# number it reports is about that score. What is wrong is the goal, and no log says what the goal should have been; only
# somebody who reads the answers, or a few dozen pairs beside their scores, can see it.

# %% [markdown]
# ## 2 · A trainer to mend
#
# ●●○ · 20 minutes
#
# Three functions of somebody's trainer, with a mistake in each. All of them run; none warns.


# %%
def mask_after_eos(tokens, eos):
    """[B, T], int64: 1 on every token up to and including the first EOS, 0 behind it."""
    return ((tokens == eos).cumsum(-1) == 0).long()


def shape_rewards(scores, logprobs, ref_logprobs, mask, beta, kind="k1"):
    """[B, T]: minus β times the log-ratio at each token, and the score [B] at the last one."""
    rewards = -beta * (ref_logprobs - logprobs) * mask
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


def policy_objective(roles, experience, part, config, beta):
    """PPO's loss on some rows, and what it reports."""
    new = ppo.role_logprobs(roles, "policy", experience.rollout, part, config)
    mask = experience.rollout.response_mask[part]
    old, advantages = experience.ref_logprobs[part], experience.advantages[part]
    return ppo.policy_loss(new, old, advantages, mask, config.clip)


# %% [markdown]
# The roles, and what the check says of the trainer as it is. It first looks at each function by itself, the mask before
# the others, and stops at what it finds there. Then it runs `preflight` on a trainer with the three functions, which
# takes ten seconds or more.

# %%
tokenizer, roles = load_tokenizer(preset), Roles(load_base(preset))
roles.load("reference", find_adapter(preset, "sft"))
roles.load("reward", find_adapter(preset, "reward"))
roles.add("policy", copy_of="reference")
roles.add("value", copy_of="reward")
world_prompts = world.prompts("train")
checks.check_mended(
    roles, tokenizer, world_prompts, mask_after_eos, shape_rewards, policy_objective
)

# %% [markdown]
# Write the functions anew, one at a time: run the check, and let it tell you what is next. One mistake can fail several
# of its tests, so begin with the first that it names. (`help(ppo.Experience)` says what an `experience` holds.)


# %%
### BEGIN SOLUTION
def mask_after_eos(tokens, eos):
    is_eos = (tokens == eos).long()
    return (is_eos.cumsum(-1) - is_eos == 0).long()


def shape_rewards(scores, logprobs, ref_logprobs, mask, beta, kind="k1"):
    rewards = -beta * (logprobs - ref_logprobs) * mask
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


def policy_objective(roles, experience, part, config, beta):
    new = ppo.role_logprobs(roles, "policy", experience.rollout, part, config)
    mask = experience.rollout.response_mask[part]
    old, advantages = experience.logprobs[part], experience.advantages[part]
    return ppo.policy_loss(new, old, advantages, mask, config.clip)


### END SOLUTION
checks.check_mended(
    roles, tokenizer, world_prompts, mask_after_eos, shape_rewards, policy_objective
)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# The mask: what is `cumsum` at the EOS itself? The reward: a token that the policy likes better than the reference does
# has to cost something. The ratio: before the first step of an update it is 1 for every token, in *every* update.
# </details>

# %% [markdown]
# **In words.** `first ratio is 1` holds in the first update even for the broken `policy_objective`. Why, and what does
# that say about checks that are made only once, at the start?

# %% [markdown] tags=["solution"]
# In the first update policy and reference are equal, so a ratio to the reference is 1 as well. The fault shows as soon
# as the policy has moved. So such a check belongs in every update, or at least after some steps, which is why
# `preflight` takes some. Each update's `first_ratio` is in the log.
