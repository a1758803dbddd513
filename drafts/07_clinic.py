# %% [markdown]
# # 07 · The debugging clinic: runs that are broken and do not say so
#
# **Run time** about two minutes on two CPU cores · **Before this** lessons 04 and 05 · **Next** lesson 08, DPO ·
# **Exercise** `exercises/07_clinic.ipynb`
#
# After this lesson you will be able to
#
# - name the numbers of a PPO run that must be exact, whatever the data are;
# - check a trainer before its run, in seconds, and a log after it;
# - say which faults no number shows, and what to read then.

# %%
PRESET = "pocket"  # every number below is from this preset

import csv
import inspect
from collections import defaultdict

import torch

from rlhf_helpers import clinic, notebook, plots, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.examine import examine, log_row
from rlhf_helpers.pocket import world
from rlhf_helpers.preflight import preflight
from rlhf_helpers.presets import ASSETS, PRESETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import load_tokenizer

# %%
preset = PRESETS[PRESET]
notebook.start(preset)
tokenizer, prompts = load_tokenizer(preset), world.prompts("train")
adapters = {name: find_adapter(preset, name) for name in ("sft", "reward")}


def four_roles():
    roles = Roles(load_base(preset))
    roles.load("reference", adapters["sft"])
    roles.load("reward", adapters["reward"])
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    return roles


# %% [markdown]
# ## Nothing stops
#
# A program with a fault usually crashes, or its tests fail. A learning program does neither: it learns something,
# or nothing, and draws curves of it. Below are faults of the kind that fill the issue trackers of RLHF libraries,
# each planted in the course's own trainer, with lesson 04's settings, and run for thirty updates. The runs are recorded.


# %%
def read(name):
    with (ASSETS / "clinic" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(row):
    text = ("fault", "prompt", "text", "example", "check", "seen")
    return {k: v if k in text else float(v) for k, v in row.items()}


runs = defaultdict(list)
for row in map(numbers, read("updates")):
    runs[row.pop("fault"), int(row.pop("seed"))].append(row)
ends = {(row["fault"], int(row["seed"])): numbers(row) for row in read("held_out")}
faults = list(dict.fromkeys(fault for fault, _ in ends))
for fault in faults:
    story = inspect.getdoc(clinic.FAULTS[fault]).splitlines()[0] if fault != "healthy" else ""
    warned = sum(end["warnings"] for (name, _), end in ends.items() if name == fault)
    print(f"{fault:20} {warned:.0f} warnings  {story}")
assert all(end["warnings"] == 0 and len(runs[key]) == 30 for key, end in ends.items())

# %% [markdown]
# Not one of these runs has stopped or said a word. Each fault is a few lines. This is how one is planted:

# %%
print(inspect.getsource(clinic.kl_sign))

# %% [markdown]
# The trainer itself knows nothing of it. Inside of the `with` block the trainer finds the wrong function in the place of
# the right one; afterwards all is as it was.
#
# <details><summary><b>Predict before you run.</b> The sign of the KL penalty is wrong. What does the score do, beside that
# of a healthy run? And what would you look at to find the fault?</summary>
#
# The score rises, faster than in the healthy run: nothing holds the policy back, and it is even paid for leaving. So the
# score is the last place to look at. KL shows it.
# </details>

# %%
config = ppo.PPOConfig(updates=8, batch_size=32, minibatch_size=16, seed=preset.seed)
live = {}
for fault in ("healthy", "kl_sign"):
    roles = four_roles()
    with clinic.plant(fault, roles) if fault != "healthy" else torch.enable_grad():
        live[fault] = list(ppo.train_ppo(roles, tokenizer, prompts, config))
for name, column in (("score", "score"), ("KL, nats", "kl")):
    print(name, {f: [round(getattr(s, column), 1) for s in h] for f, h in live.items()})

# %% [markdown]
# (Change the name in the tuple and run the cell again: each fault of the list is there.)
#
# ## First aid: what can be checked before a run
#
# Some numbers are known beforehand. Before the first step the policy *is* the reference, so KL is exactly 0; the
# policy that is trained *is* the one that sampled, so the ratio is exactly 1; a score does not depend on padding. And
# some behaviour is known: one prompt can be overfitted, and a heavy price of KL calls the policy back. `preflight` tries
# it all, with the very functions that the run will call, and leaves no weight changed.

# %%
print(*preflight(four_roles(), tokenizer, prompts), sep="\n")

# %% [markdown]
# And on a trainer that reads the log-probabilities one token off:

# %%
roles = four_roles()
with clinic.plant("one_token_off", roles):
    print(*[finding for finding in preflight(roles, tokenizer, prompts) if not finding.passed], sep="\n")

# %% [markdown]
# Ratio and KL do *not* show this fault: both are differences of two log-probabilities that are off in the same way. What shows it
# is a comparison with the sampler's own log-probabilities.
#
# The same for all faults, recorded:

# %%
caught = defaultdict(list)
for row in read("preflight"):
    if row["passed"] == "0":
        caught[row["fault"]].append(row["check"])
for fault in faults:
    print(f"{fault:20} {', '.join(caught[fault]) or '-'}")
assert not caught["healthy"]

# %% [markdown]
# One fault passes all checks: the adapter in bfloat16. With this lesson's learning rate there is nothing to find; a
# language model of billions of weights is trained at 1e-5 or less. Between 0.0625 and 0.125 the numbers of bfloat16 are
# 0.0005 apart, and Adam's first step is as long as the learning rate. Which steps round to none?

# %%
for rate in (1e-3, 1e-4, 1e-5):
    roles, config = four_roles(), ppo.PPOConfig(learning_rate=rate)
    with clinic.plant("adapter_in_bfloat16", roles):
        (step,) = [f for f in preflight(roles, tokenizer, prompts, config) if "every weight" in f.name]
    print(rate, step)

# %% [markdown]
# ## During the run: what must stay in a band
#
# `examine` reads the log. "broken" is what cannot be in a run that is as it should be; "look" is what can, and is worth a look
# at answers and code. Its bands are those of lesson 04.

# %%
for alarm in examine(live["kl_sign"]):
    print(alarm)

# %%
signals = defaultdict(dict)
for (fault, seed), rows in runs.items():
    for alarm in examine(rows):
        signals[fault].setdefault((alarm.severity, alarm.quantity), set()).add(seed)
columns = sorted({column for found in signals.values() for column in found})
seeds = {fault: sum(name == fault for name, _ in runs) for fault in faults}
table = [[len(signals[f].get(c, ())) / seeds[f] for c in columns] for f in faults]
fig = plots.heat_map(
    table, [f"{quantity}, {severity}" for severity, quantity in columns], faults, "share of seeds"
)
plots.show(fig, alt="Which alarms each fault trips, as the share of its seeds.")
assert not signals["healthy"]

# %% [markdown]
# ## Which faults nothing finds
#
# Gold has not been used so far. Now the autopsy.

# %%
print(f"{'fault':20} {'preflight':>10} {'examine':>8} {'gold':>12} {'correct':>8} {'KL':>6}")
found_by = {}
for fault in faults:
    rows = [end for (name, _), end in ends.items() if name == fault]
    gold, correct, kl = (sum(r[k] for r in rows) / len(rows) for k in ("gold", "correct", "kl"))
    found_by[fault] = (bool(caught[fault]), bool(signals[fault]))
    marks = ["found" if found else "-" for found in found_by[fault]]
    print(f"{fault:20} {marks[0]:>10} {marks[1]:>8} {gold:12.2f} {correct:8.0%} {kl:6.1f}")
missed = [fault for fault, found in found_by.items() if not any(found) and fault != "healthy"]
print("found by neither:", missed)
assert sum(map(any, found_by.values())) >= 10

# %% [markdown]
# ## Read ten answers

# %%
for row in read("texts"):
    if row["fault"] in ("eos_masked_out", "lost_head") and row["seed"] == "0":
        print(f"{row['fault']:15} {row['prompt'][:34]:34} {row['text'][:60]}")

# %% [markdown]
# ## An order of examination
#
# 1. `preflight`: half of all faults are gone before the run.
# 2. The first row of the log: first ratio 1, first KL 0, score near 0.
# 3. The sign of KL, and whether it moves at all.
# 4. The bands, where a number stays outside.
# 5. Ten answers, read aloud; beside them the ten that the reward model likes best, and least.
# 6. What no log can say: is the score what you wanted? Compare a few dozen pairs by hand (lesson 06).

# %% [markdown]
# ## The numbers that the next lesson starts from

# %% tags=["headline"]
count = len(found_by) - 1
print(f"{sum(map(any, found_by.values()))} of {count} faults found without gold,", end=" ")
print(f"{sum(p for p, _ in found_by.values())} of them before the run; none of them warned")

# %% [markdown]
# ## Recap
#
# - A broken run learns something else, and says nothing.
# - Know the numbers that must be exact; check them first, always.
# - Alarms find a fault; they do not prove its absence.
