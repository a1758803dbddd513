# %% [markdown]
# # 07 · The debugging clinic: runs that are broken and do not say so
#
# **Run time** about a minute on two CPU cores · **Before this** lessons 04 and 05 · **Next** lesson 08,
# DPO · **Exercise** `exercises/07_clinic.ipynb`
#
# After this lesson you will be able to
#
# - name the numbers of a PPO run that are known beforehand, whatever the data are;
# - check a trainer in seconds before its run, and a log during the run or after it, your own or TRL's;
# - say which faults no number shows, and what to read then.

# %%
PRESET = "pocket"  # every number below is from this preset

import csv
import inspect
from collections import defaultdict
from contextlib import nullcontext

import torch

from rlhf_helpers import clinic, notebook, plots, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.examine import examine, from_trl, log_row
from rlhf_helpers.kl import kl_estimate
from rlhf_helpers.losses import gae, whiten
from rlhf_helpers.preflight import preflight
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import load_tokenizer

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer, prompts = load_tokenizer(preset), list(prompt_dataset(preset)["prompt"])
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
# An ordinary program with a fault crashes, or its tests fail. A program that learns does neither: it learns something
# else, or nothing, and draws curves of that. Here are fourteen faults that are easily made in RLHF code. Each was
# planted in the course's own trainer and run for thirty updates with lesson 04's settings and three seeds, beside three
# runs without a fault. The runs are recorded:


# %%
# Pocket only
def read(name, folder="clinic"):
    with (ASSETS / folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(row):
    words = ("fault", "seed", "example")
    return {k: float(v) for k, v in row.items() if k not in words}


runs, ends = defaultdict(list), {}
for row in read("updates"):
    runs[row["fault"], row["seed"]].append(numbers(row))
for row in read("held_out"):
    ends[row["fault"], row["seed"]] = numbers(row)
faults = list(dict.fromkeys(fault for fault, _ in ends))
stories = {name: inspect.getdoc(fault).splitlines()[0] for name, fault in clinic.FAULTS.items()}

# %% [markdown]
# How many of them ran to the end, and how many warnings there were:

# %%
# Pocket only
for fault in faults:
    of = [key for key in ends if key[0] == fault]
    whole, said = sum(len(runs[key]) == 30 for key in of), sum(ends[key]["warnings"] for key in of)
    print(f"{fault:20} {whole} of {len(of)} runs, {said:.0f} warnings")
    print(f"    {stories.get(fault, 'Nothing is wrong.')}")
assert all(len(rows) == 30 for rows in runs.values())
assert all(end["warnings"] == 0 for end in ends.values())

# %% [markdown]
# Not one of these runs stopped or said a word. And each fault is only a few lines. This is how one is made:

# %%
print(inspect.getsource(clinic.kl_sign))

# %% [markdown]
# The trainer itself knows nothing of it. While the `with` block is open it finds the wrong function in place of the
# right one; afterwards all is as it was.
#
# <details><summary><b>Predict before you run.</b> The sign of the KL penalty is wrong. What does the score do, compared
# with that of a healthy run? And which number would you look at to find the fault?</summary>
#
# The score still rises: nothing holds the policy back, and it is even paid for leaving. So the score is the last place
# to look. KL shows the fault.
# </details>

# %%
options = {"batch_size": 32, "minibatch_size": 16} | preset.ppo
config = ppo.PPOConfig(**options | {"updates": 8, "seed": preset.seed})
live = {}
for fault in ("healthy", "kl_sign"):
    roles = four_roles()
    with clinic.plant(fault, roles) if fault != "healthy" else nullcontext():
        live[fault] = list(ppo.train_ppo(roles, tokenizer, prompts, config))
for name in ("score", "kl"):
    print(f"{name:5}", {f: [round(getattr(s, name), 1) for s in h] for f, h in live.items()})
assert preset.name != "pocket" or live["kl_sign"][-1].kl > 1.5 * live["healthy"][-1].kl

# %% [markdown]
# (Add a name to the tuple and run the cell again: any fault in the list will do.)

# %% [markdown]
# ## Numbers that are known beforehand
#
# There is no right value for a score. For some other numbers there is one. The first you know from lesson 05: **KL is
# not negative in the mean**, if its samples come from the policy. Three tokens by hand, with full sums instead of
# samples:

# %% tags=["nbval-check-output"]
policy, reference = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.3, 0.6, 0.1])
k1 = kl_estimate(policy.log(), reference.log())
print("log π − log π_ref of each token ", [round(x, 3) + 0.0 for x in k1.tolist()])
print(f"mean over the policy's samples    {(policy * k1).sum():+.3f}")
print(f"the difference turned round       {-(policy * k1).sum():+.3f}")
print(f"mean over another one's samples   {(reference * k1).sum():+.3f}")

# %% [markdown]
# By hand: $(0.6 - 0.3)\ln 2 = 0.208$. So a KL that stays below 0 has one of two causes: the difference is taken the
# wrong way round, or the tokens were not drawn from the policy that is scored.
#
# The second: **the last return is the last reward**. At the last token $A = r - V$, whatever γ and λ are, so
# $R = A + V = r$. The third: advantages that were whitened have **mean 0 and spread 1** over the real tokens. Take an
# answer of three tokens with a score of 2, and one of two with a score of −1:

# %% tags=["nbval-check-output"]
mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
rewards = torch.tensor([[0.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
values = torch.tensor([[0.5, 0.2, 0.9], [0.1, -0.3, 0.0]])
advantages, returns = gae(rewards, values, mask)
last = mask.sum(-1, keepdim=True) - 1
white, padded = whiten(advantages, mask), (advantages - advantages.mean()) / advantages.std()
for name, x in (("last reward", rewards.gather(1, last)), ("last return", returns.gather(1, last))):
    print(f"{name:12}", [round(v, 3) for v in x.flatten().tolist()])
for name, x in (("whitened", white), ("with padding", padded)):
    std, mean = torch.std_mean(x[mask == 1])
    print(f"{name:12} {round(mean.item(), 3) + 0.0:.3f} ± {std:.3f}")

# %% [markdown]
# If the padding takes part in the whitening, the mean over the real tokens is not 0: a bias that has nothing to do with
# how good an answer was. That is a number worth watching; the loss is not.

# %% [markdown]
# ## First aid: checks before a run
#
# Other numbers are known before the first step. The policy *is* the reference, so KL is exactly 0; the policy that is
# trained *is* the one that sampled, so the ratio is exactly 1; a score does not depend on what an answer is batched
# with. And some behaviour is known: a single prompt can be overfitted, and a high price of KL brings the policy back to
# the reference. `preflight` tries all of this, with the very functions that the run will call, and leaves every weight
# as it was.

# %%
findings = preflight(four_roles(), tokenizer, prompts)
print(*findings, sep="\n")
assert preset.name != "pocket" or all(finding.passed for finding in findings)

# %% [markdown]
# The same on a trainer that reads the log-probabilities one token off:

# %%
roles = four_roles()
with clinic.plant("one_token_off", roles):
    failed = [finding for finding in preflight(roles, tokenizer, prompts) if not finding.passed]
print(*failed, sep="\n")
assert "scored as it was sampled" in {finding.name for finding in failed}

# %% [markdown]
# The first ratio and the first KL do *not* show this fault: both are differences of two log-probabilities that are off
# in the same way. What shows it is a comparison with the sampler's own log-probabilities. So one exact number is not
# enough; it takes several, each about another part of the trainer.
#
# What `preflight` finds for each fault, recorded:

# %%
# Pocket only
caught = defaultdict(list)
for row in read("preflight"):
    if row["passed"] == "0":
        caught[row["fault"]].append(row["check"])
for fault in faults:
    print(f"{fault:20} {', '.join(caught[fault]) or '-'}")
assert not caught["healthy"]

# %% [markdown]
# Twelve of the fourteen are found before the run begins, and the names of the checks say where to look. Two slip
# through. `swapped_labels` is no fault of the trainer, which trains well, towards the wrong thing. And
# `adapter_in_bfloat16` is hardly a fault at this learning rate; the next section shows at which it is one.

# %% [markdown]
# ## A step that rounds to nothing
#
# At this course's learning rate an adapter in bfloat16 passes. A model of billions of weights is often trained at 1e-5
# or less, and then something happens that no curve shows. bfloat16 has only eight bits for a number's digits:

# %% tags=["nbval-check-output"]
weight = torch.tensor(0.1, dtype=torch.bfloat16)
for step in (1e-3, 1e-4, 1e-5):
    moved = weight + torch.tensor(step, dtype=torch.bfloat16)
    print(f"{weight.item():.6f} + {step:g} = {moved.item():.6f}")

# %% [markdown]
# Between 0.0625 and 0.125 neighbouring numbers are 0.0005 apart, and a step of less than half of that is lost. Adam's
# first step is as long as the learning rate, however large the gradient is. So the gradient is there, its norm looks
# healthy, and the weights stay:

# %%
for rate in (1e-3, 1e-5):
    roles, slow = four_roles(), ppo.PPOConfig(**preset.ppo | {"learning_rate": rate})
    with clinic.plant("adapter_in_bfloat16", roles):
        found = {finding.name: finding for finding in preflight(roles, tokenizer, prompts, slow)}
    print(f"learning rate {rate:g}: {found['a step moves every weight'].seen} where they were")
assert not found["a step moves every weight"].passed

# %% [markdown]
# That is why in lesson 04 the base is in 4 bits, but what is trained is in float32.

# %% [markdown]
# ## During the run: what must stay in its band
#
# `examine` reads a history or a log. It says "broken" for what cannot happen in a sound run, and "look" for what can
# happen, but is a reason to read answers and code. Its bands are those of lesson 04 and two more, for `finished` and
# `approx_kl`; [what the logs say](../docs/glossary.md) lists them.

# %%
for fault, history in live.items():
    print(fault, *examine(history, config.response_length), sep="\n  ")
print(sorted(log_row(live["healthy"][-1])))

# %% [markdown]
# It also takes TRL's logs, `trainer.state.log_history`. Five rows in the columns of TRL 1.12's PPO (1.12 was the last
# release with a PPO trainer), with made-up numbers:

# %% tags=["nbval-check-output"]
log = [
    {
        "objective/scores": 0.1 * i,
        "objective/kl": -0.4 * i,
        "policy/entropy_avg": 0.5,
        "policy/clipfrac_avg": 0.01,
        "policy/approxkl_avg": 0.002,
    }
    for i in range(5)
]
for alarm in examine(from_trl(log)):
    print(alarm)

# %% [markdown]
# ## Which alarm for which fault
#
# All recorded runs, examined:

# %%
# Pocket only
signals = defaultdict(lambda: defaultdict(set))
for (fault, seed), rows in runs.items():
    for alarm in examine(rows):
        signals[fault][f"{alarm.quantity}, {alarm.severity}"].add(seed)
columns = {column for found in signals.values() for column in found}
columns = sorted(columns, key=lambda column: (column.endswith("look"), column))  # the grave first
seeds = {fault: sum(name == fault for name, _ in runs) for fault in faults}
table = [[len(signals[fault][column]) / seeds[fault] for column in columns] for fault in faults]
fig = plots.heat_map(table, columns, faults, "share of seeds with the alarm")
tripped = {fault: [c for c in columns if signals[fault][c]] for fault in faults}
strong = [f"{fault}: {', '.join(found) or 'none'}" for fault, found in tripped.items()]
plots.show(fig, alt=f"Which alarms each fault trips, as the share of seeds. {'; '.join(strong)}.")
assert not any(signals["healthy"].values())

# %% [markdown]
# Lesson 05 recorded ten more healthy runs, at β = 0.1. How many of them trip an alarm?

# %%
# Pocket only
others = defaultdict(list)
for row in read("updates", "ppo"):
    if row["beta"] == "0.1":
        others[row["seed"]].append(numbers(row))
false_alarms = sum(bool(examine(rows)) for rows in others.values())
print(f"{false_alarms} of {len(others)}")
assert false_alarms == 0 and len(others) == 10

# %% [markdown]
# Now read the figure by columns. An alarm that says "broken" nearly always points at one place: a first ratio that is
# not 1, advantages that are not whitened, returns that do not come out, a gradient of 0. (Only a broken `kl` has two
# causes here: a policy that does not move, and a mask that leaves out EOS.) "Look" is less precise. A score that does
# not begin near 0 has four causes here: what is sampled (`bare_prompt`), what is counted (`eos_masked_out`), where the
# score is read (`score_at_padding`), and who reads it (`lost_head`). (The same column has scores that hardly rise:
# `lost_gradient`, `one_token_off`.) A large KL has two: a penalty of the wrong sign, which pays for every nat, so that
# KL grows into the hundreds; and one without a gradient, where it stays near thirty.
#
# And by rows: two faults trip something on some seeds only. The `approx_kl` alarm on one run of `swapped_labels` says
# that its steps are large, which is true, and nothing about what is wrong.

# %% [markdown]
# ## The autopsy
#
# So far gold has not been used. Now it is: what did each fault cost on held-out prompts, and was it found without gold?


# %%
# Pocket only
def rise(rows):
    """How far the score has risen, from the first three updates to the last three."""
    start, end = (sum(row["score"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    return end - start


heads = f"{'preflight':>9} {'examine':>8} {'gold':>15} {'correct':>8} {'KL':>6} {'rise':>6}"
print(f"{'fault':20} {heads}")
found_by = {}
for fault in faults:
    of = [end for (name, _), end in ends.items() if name == fault]
    golds = sorted(end["gold"] for end in of)
    correct, kl = (sum(end[k] for end in of) / len(of) for k in ("correct", "kl"))
    alarmed = len(set().union(*signals[fault].values()))  # seeds
    found_by[fault] = (bool(caught[fault]), alarmed == len(of))
    before, during = "found" if caught[fault] else "-", f"{alarmed} of {len(of)}"
    span = f"{golds[0]:.2f} to {golds[-1]:.2f}"
    least = min(rise(rows) for (name, _), rows in runs.items() if name == fault)
    print(f"{fault:20} {before:>9} {during:>8} {span:>15} {correct:8.0%} {kl:6.1f} {least:6.2f}")

# %% [markdown]
# (The last column is how far the score rose, on the seed on which it rose least.) And the faults that neither
# `preflight` finds, nor `examine` on every seed:

# %%
# Pocket only
missed = [fault for fault, found in found_by.items() if not any(found) and fault != "healthy"]
print("missed:", ", ".join(missed) or "none")
assert not any(found_by["healthy"])
assert sum(map(any, found_by.values())) >= 10

# %% [markdown]
# A fault and its price are two things. The two penalties that do not hold the policy back end below 0, with answers
# that mostly run to the limit. `lost_gradient` ends where SFT began, since its policy never moves; `one_token_off` and
# `lost_head` end lower: all that training for nothing. Three faults cost nothing: padding in the whitening, whitened
# returns, and a score read at padding; the runs of the last two even end above the healthy ones. Three more,
# `bare_prompt`, `generate_defaults` and `adapter_in_bfloat16`, cost less than 0.1. So a good result does not prove that
# the code is right: with another model, rate or length the same four lines may ruin the run. And a fault need not look
# bad: under ten of the fourteen the score rose by more than 0.3 on every seed.
#
# `swapped_labels` is by far the costlier of the two that nothing finds. No check of the trainer can find it: the
# trainer does what it is told, and the score rises. A reward that is the opposite of what was wanted is a number like
# any other. So there is one thing left to do.

# %% [markdown]
# ## Read ten answers

# %%
# Pocket only
for row in read("texts"):
    if row["fault"] in ("healthy", "swapped_labels") and row["seed"] == "0":
        print(f"{row['fault']:15} {row['prompt'][:36]:36} {row['text'][:60]}")

# %% [markdown]
# Two plus six is four, the camel lives in the pond. Ten seconds of reading show what no number in the log does.

# %% [markdown]
# ## An order of examination
#
# 1. `preflight`, on the CPU if need be: what it finds never becomes a run.
# 2. The first row of the log: first ratio 1, first KL 0, score near 0.
# 3. The sign of KL, and whether it moves at all.
# 4. The bands: which number leaves its own and stays outside, and from which update on.
# 5. Ten answers, read aloud; beside them those that the reward model likes best and least.
# 6. What no log can say: is the score what you wanted? Compare a few dozen pairs by hand (lesson 06).

# %% [markdown]
# ## The numbers to take along

# %% tags=["headline"]
# Pocket only
count, before = (sum(map(of, found_by.values())) for of in (any, lambda found: found[0]))
print(f"{count} of {len(faults) - 1} faults found without gold, {before} before the run,", end=" ")
print(f"no alarm on {seeds['healthy'] + len(others)} healthy runs; none of the runs warned")

# %% [markdown]
# ## Recap
#
# - A broken run learns something else, and says nothing.
# - Know the numbers that must be exact, and check them first; it takes several.
# - An alarm finds a fault; silence does not prove that there is none.
# - A run that is trained towards the wrong goal looks healthy. Read the answers.
#
# PPO has many parts that can go wrong: four roles, a sampler, a critic. DPO, in lesson 08, has fewer, and one fault of
# its own.
#
# **Further reading.** Huang et al. 2024 (arXiv 2403.17031): the details of PPO for language models, most of which are a
# fault if left out. Henderson et al. 2018 (arXiv 1709.06560): why a single seed shows nothing. Karpathy 2019, *A Recipe
# for Training Neural Networks*: overfit one batch first.
