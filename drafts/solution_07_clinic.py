# %% [markdown]
# # 07 · Exercises: the debugging clinic
#
# **Run time** about a minute on two CPU cores · **Your time** about 50 minutes · **Before this** lesson 07
#
# Six patients to diagnose, and a trainer to mend. The checks name what speaks against a wrong answer. To compare with
# the solution, run `nbdiff-web exercises/07_clinic.ipynb solutions/07_clinic.ipynb` in the course's folder.

# %%
import torch

from rlhf_helpers import checks, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.examine import examine
from rlhf_helpers.pocket import world
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import load_tokenizer

# %% [markdown]
# ## 1 · Six patients
#
# ●●● · 25 minutes
#
# Six runs of thirty updates, with lesson 04's settings and a fault each, and seven illnesses too many to choose from. You get
# what you would have in life: the log, and ten answers of the last batch.

# %%
for name in "ABCDEF":
    rows, texts = checks.patient(name)
    print(name, *examine(rows), sep="\n  ")

# %%
rows, texts = checks.patient("A")
for row in rows[::5]:
    print({k: round(v, 2) for k, v in row.items()})
for text in texts:
    print(text["prompt"], "|", text["text"])

# %%
for illness, what in checks.illnesses().items():
    print(f"{illness:20} {what}")

# %%
answers = {"A": ..., "B": ..., "C": ..., "D": ..., "E": ..., "F": ...}
### BEGIN SOLUTION
answers = {
    "A": "moving_reference",
    "B": "eos_masked_out",
    "C": "kl_sign",
    "D": "swapped_labels",
    "E": "another_temperature",
    "F": "lost_gradient",
}
### END SOLUTION
checks.check_patients(answers)

# %% [markdown]
# ## 2 · A trainer to mend
#
# ●●○ · 20 minutes
#
# Three functions of a trainer, a mistake in each. Mend them until all checks of `preflight` hold.

# %%
def mask_after_eos(tokens, eos):
    """[B, T], 1 on every token up to and including the first EOS, 0 behind it."""
    mask = (tokens == eos).cumsum(-1) == 0
    ### BEGIN SOLUTION
    is_eos = (tokens == eos).long()
    mask = is_eos.cumsum(-1) - is_eos == 0
    ### END SOLUTION
    return mask.long()


def shape_rewards(scores, logprobs, ref_logprobs, mask, beta, kind="k1"):
    """[B, T], minus β times the log-ratio at each token, and the score at the last one."""
    kl = ref_logprobs - logprobs
    ### BEGIN SOLUTION
    kl = logprobs - ref_logprobs
    ### END SOLUTION
    rewards = -beta * kl * mask
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


def policy_objective(roles, experience, part, config, beta):
    """PPO's loss of some rows."""
    new = ppo.role_logprobs(roles, "policy", experience.rollout, part, config)
    old = experience.ref_logprobs[part]
    ### BEGIN SOLUTION
    old = experience.logprobs[part]
    ### END SOLUTION
    mask = experience.rollout.response_mask[part]
    return ppo.policy_loss(new, old, experience.advantages[part], mask, config.clip)


# %%
preset = PRESETS["pocket"]
tokenizer, roles = load_tokenizer(preset), Roles(load_base(preset))
roles.load("reference", find_adapter(preset, "sft"))
roles.load("reward", find_adapter(preset, "reward"))
roles.add("policy", copy_of="reference")
roles.add("value", copy_of="reward")
checks.check_mended(
    roles, tokenizer, world.prompts("train"), mask_after_eos, shape_rewards, policy_objective
)
