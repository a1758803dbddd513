# %% [markdown]
# # 06 · Mend it with your own clicks
#
# **Run time** about three minutes on two CPU cores, and some five minutes of clicking if you like · **Before this**
# lesson 05 · **Next** lesson 07, the debugging clinic · **Exercise** `exercises/06_your_clicks.ipynb`
#
# After this lesson you will be able to
#
# - collect comparisons yourself, and say how far they can be trusted;
# - train a reward model on from where it was, without its forgetting what it knew;
# - mend a hacked reward, and say on which answers the labels have to be;
# - say why RLHF is run in rounds.

# %%
PRESET = "pocket"  # every number below is from this preset
CLICK_YOURSELF = False  # True: you are the annotator; False: a simulated one, so that Run All works

import csv
import json
import random
from itertools import cycle

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from rlhf_helpers import clicks_panel, notebook, plots, ppo, reward
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.clicks import Clicks, simulated
from rlhf_helpers.pocket import exam, rubric, world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.preferences import collect_preferences
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import load_gold, preference_dataset, prompt_dataset
from rlhf_helpers.stats import share_with_interval
from rlhf_helpers.text import load_tokenizer, readable

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer, gold = load_tokenizer(preset), load_gold(preset)
folder = preset.runs / preset.name / "clicks"
adapters = {name: find_adapter(preset, name) for name in ("sft", "reward")}
train, held_out = (list(prompt_dataset(preset, split)["prompt"]) for split in ("train", "held_out"))
lengths = preset.prompt_length + 8, 2 * preset.response_length  # of a prompt and an answer in a pair

# %% [markdown]
# ## A run that has gone wrong
#
# Lesson 05 ended with a hole. At a price of β = 0.01 for a nat the policy finds what the reward model overpays:
# answers full of courtesies that never end. The proxy rises, gold falls. A higher price keeps the policy away from the
# hole, but the hole stays. Who mends it? Nobody in the run can: the reward model is content. It takes somebody who
# *reads the answers*.
#
# So first we need the patient: twelve updates of PPO at β = 0.01, from SFT. It is kept in `runs/`, so that a session
# of clicks can go on another day with the same answers.


# %%
def four_roles(reward_folder):
    roles = Roles(load_base(preset))
    roles.load("reference", adapters["sft"])
    roles.load("reward", reward_folder)
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    return roles


def run_ppo(roles, updates, name):
    """PPO at the low price; what the updates reported."""
    settings = preset.ppo | {"updates": updates, "beta": 0.01, "seed": preset.seed}
    run = ppo.train_ppo(roles, tokenizer, train, ppo.PPOConfig(**settings))
    return list(tqdm(run, total=updates, desc=name, leave=False))


# %%
roles = four_roles(adapters["reward"])
if (folder / "hacked" / "adapter_config.json").is_file():
    print("the hacked policy is there from an earlier run")
    before = []
else:
    before = run_ppo(roles, 12, "hacking")
    roles.save("policy", folder / "hacked")
roles.load("hacked", folder / "hacked")

# %% [markdown]
# What it says, beside SFT, and what the reward model thinks of it (its unit is a standard deviation of SFT's own scores):


# %%
def answers(role, prompts, seed, roles=roles):
    length = preset.response_length
    return sample_responses(roles.use(role), tokenizer, prompts, length, seed=seed).texts


def scores(roles, prompts, texts):
    return reward.score_responses(roles, "reward", tokenizer, prompts, texts, *lengths)


shown = held_out[::200][:3]
for role in ("reference", "hacked"):
    texts = answers(role, shown, seed=3)
    for prompt, text, score in zip(shown, texts, scores(roles, shown, texts), strict=True):
        print(f"{score:5.2f}  {readable(prompt)}  {'SFT' if role == 'reference' else 'PPO'}: {text}")

# %% [markdown]
# ## You are the annotator
#
# Sixty prompts; to each one answer of the hacked policy and one of SFT, sides at random. You say which is better,
# with the mouse or the keys, and "cannot tell" if you cannot. Eight pairs come twice, with the sides exchanged.
# Every choice is saved before the next pair comes, in the columns `prompt`, `chosen`, `rejected` that you know from
# lesson 02; close the notebook and go on tomorrow.
#
# The pairs are written to a file as well: a session belongs to *these* answers.

# %%
if not (folder / "pairs.json").is_file():
    asked = random.Random(preset.seed).sample(train, min(80, len(train)))
    sides = answers("reference", asked, seed=1), answers("hacked", asked, seed=2)
    rows = [row for row in zip(asked, *sides, strict=True) if row[1] != row[2] and all(row)]
    (folder / "pairs.json").write_text(json.dumps(rows[:60]), encoding="utf-8")
pairs = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
print(f"{len(pairs)} pairs; one of them: {readable(pairs[0][0])}")
for text in sorted(pairs[0][1:]):
    print(f"   {text}")

# %% [markdown]
# An honest clicker for Run All: it knows how good each answer is, and takes the better one. In the pocket world that is
# the rubric's gold; with another preset, where nobody knows, a judge that PPO has not seen (lesson 02). Set
# `CLICK_YOURSELF = True` at the top, restart, and the cell below shows the panel instead. Click to the end, then run the
# cells below it.


# %%
def points(prompt, answer):
    """How good an answer is: gold, or the judge where there is none."""
    if preset.name == "pocket":
        return rubric.gold_reward(prompt, answer).total
    return reward.score_responses(
        gold.roles, "judge", tokenizer, [prompt], [answer], *lengths
    ).item()


honest = simulated(points)
clicks = Clicks(pairs, folder / ("mine.jsonl" if CLICK_YOURSELF else "simulated.jsonl"))
if CLICK_YOURSELF:
    clicks_panel.show(clicks)
else:
    print("Nobody is asked: a simulated honest clicker answers, who knows how good each answer is.")
    clicks.click_through(honest)
    print(clicks.progress())

# %% [markdown]
# <details><summary><b>Predict before you run.</b> How often will you agree with yourself on the eight pairs that come
# twice? Will you lean to the longer answer, to the politer one, to the left?</summary>
#
# The simulated clicker always agrees with itself and leans nowhere, by construction. People do not: in Stiennon et al.
# (2020) labellers agreed with the researchers on 77% of comparisons, and the researchers among themselves on 73%. That
# is why one asks twice.
# </details>

# %%
def told(what, hits):
    """A share of clicks with its 95% interval (Wilson, lesson 01)."""
    if not hits:
        return print(f"{what:44} no such pairs")
    share, low, high = share_with_interval(hits)
    print(f"{what:44} {share:4.0%} of {len(hits):2}   [{low:4.0%}, {high:4.0%}]")


same, twice = clicks.agreement()
decided = [row for row in clicks.rows if row["side"] and not row["repeat"]]
told("agreed with yourself", [True] * same + [False] * (twice - same))
told("the answer on the left chosen", [row["side"] == "first" for row in decided])
print(f"cannot tell: {sum(row['side'] is None for row in clicks.rows)} of {len(clicks.rows)}")

# %% [markdown]
# Agreement with yourself is *your* ceiling: no reward model can predict your choices better than you can repeat them. But
# look at the interval. Even eight of eight only says that it is probably above two thirds. Whoever always clicks left
# would agree with himself in none of the pairs, since the sides are exchanged; and by chance one agrees in half of them.
# What remains above chance is the first part of the exercise.
#
# In this world we can also ask what nobody can ask in life: are the labels right? And do they lean?


# %%
# Pocket only
def gold_gap(row):
    return points(row["prompt"], row["chosen"]) - points(row["prompt"], row["rejected"])


told("the answer with more gold chosen", [gold_gap(r) > 0 for r in decided if gold_gap(r)])
MEASURES = {"longer": lambda t: len(t.split())}
MEASURES["politer"] = lambda text: rubric.count_phrases(text, world.POLITE)
for name, of in MEASURES.items():
    more = [(r, of(r["chosen"]) - of(r["rejected"])) for r in decided]
    told(f"the {name} answer chosen", [gap > 0 for _, gap in more if gap])
    told("   what gold would have done there", [(gap > 0) == (gold_gap(r) > 0) for r, gap in more if gap])
    told("   the annotator of lesson 02", [
        (gap > 0) == (Annotator().utility(r["prompt"], r["chosen"]) > Annotator().utility(r["prompt"], r["rejected"]))
        for r, gap in more if gap
    ])

# %% [markdown]
# TEXT labels
#
# ## What the clicks tell the reward model
#
# A pair pulls at the reward model with $1 - \sigma(\Delta)$, the probability that it gave to the other choice (lesson 02).
# So a click teaches much where the reward model is *wrong*, and nearly nothing where it knew the answer. Here is how
# hard your clicks pull, and how hard as many clicks would pull on two answers of SFT.

# %%
asked = [prompt for prompt, *_ in pairs]
drawn = zip(asked, answers("reference", asked, seed=4), answers("reference", asked, seed=5), strict=True)
at_home = Clicks([row for row in drawn if all(row)], repeats=0)
at_home.click_through(honest)


def pulls(rows):
    sides = [[row[side] for row in rows] for side in ("prompt", "chosen", "rejected")]
    sides = [[s if isinstance(s, str) else s[-1]["content"] for s in side] if k else side for k, side in enumerate(sides)]
    return 1 - (scores(roles, sides[0], sides[1]) - scores(roles, sides[0], sides[2])).sigmoid()


pulled = {"policy against SFT": pulls(decided)}
pulled["SFT against SFT"] = pulls([row for row in at_home.rows if row["side"]])
for name, pull in pulled.items():
    print(f"{name:20} {len(pull):2} clicks, mean pull {pull.mean():.2f},", end=" ")
    print(f"the reward model would have chosen otherwise in {(pull > 0.5).float().mean():.0%}")

# %% [markdown]
# TEXT pulls
#
# ## Training on, with a replay
#
# Sixty pairs alone would be learnt by heart in a few steps, and what the four thousand of lesson 02 have taught would
# fade: nothing in the new loss asks for it. So half of each batch are old pairs. By hand, with three new pairs, five
# old ones, batches of four:


# %% tags=["nbval-check-output"]
def batches(new, old, replay, steps, size):
    """Pairs for all steps, the same share of old ones in each batch."""
    again = round(replay * size)
    shares = (cycle(new), size - again), (cycle(old), again)
    return [next(source) for _ in range(steps) for source, n in shares for _ in range(n)]


by_hand = batches(["new 1", "new 2", "new 3"], ["a", "b", "c", "d", "e"], 0.5, steps=3, size=4)
for step in range(3):
    print(by_hand[4 * step : 4 * step + 4])

# %% [markdown]
# The old pairs are SFT's answers and the annotator's choices, collected as in lesson 02, from a part of its prompts.
# The learning rate is a third of the one it was trained with: it is to be moved, not made anew. Afterwards its scores
# are normalised again on SFT's answers, so that β keeps its meaning.

# %%
if preset.name == "pocket":
    old = collect_preferences(
        roles.use("reference"), tokenizer, train[::12], Annotator(), seed=preset.seed, cache=folder
    )
else:
    old = preference_dataset(preset)
    old = old.select(range(min(400, len(old))))
old_pairs = reward.encode_pairs(tokenizer, old, *lengths)
new_pairs = reward.encode_pairs(tokenizer, clicks.preferences(), *lengths)
print(f"{len(new_pairs)} new pairs, {len(old_pairs)} old ones")


# %%
def train_on(start, new, name, replay=0.5, steps=40, size=16):
    """The reward model in a folder, trained on with new pairs; the folder of the result."""
    roles = Roles(load_base(preset))
    roles.load("reward", start, trainable=True)
    rate = 0.3 * reward.RewardConfig(**preset.reward).learning_rate
    settings = {"steps": steps, "batch_size": size, "learning_rate": rate, "eval_every": steps}
    config = reward.RewardConfig(**preset.reward | settings)
    rows = batches(new, old_pairs, replay, steps, size)
    run = reward.train_reward_model(roles, "reward", tokenizer, rows, new, config)
    *_, last = tqdm(run, total=steps + 1, desc=name, leave=False)
    said = torch.cat(reward.pair_scores(roles, "reward", tokenizer, old_pairs))
    reward.normalise(roles, "reward", said)
    roles.save("reward", folder / name)
    print(f"{name}: ranks {last.held_out['accuracy']:.0%} of your clicks as you did")
    return folder / name


models = {"before": adapters["reward"]}
models["your clicks, replay"] = train_on(models["before"], new_pairs, "mended")
models["your clicks alone"] = train_on(models["before"], new_pairs, "no_replay", replay=0)

# %% [markdown]
# <details><summary><b>Predict before you run.</b> The probe of lesson 02: the same right answers with none to four
# courtesies around them. The reward model paid for the first ones and took nothing off for more. What will it do
# after your clicks?</summary>
#
# The hacked answers are full of courtesies, and you have mostly chosen the others. So courtesies should now cost
# something. It might also throw out the first one, which gold likes: a reward model has no rubric, only examples.
# </details>


# %%
# Pocket only
probe = exam.polite_probe()
curves = {
    "gold": [
        rubric.mean_score(rubric.gold_reward(*row) for row in zip(*texts, strict=True)).total
        for texts in probe
    ]
}
loaded = {name: four_roles(path) for name, path in models.items()}
for name, its_roles in loaded.items():
    curves[name] = [scores(its_roles, *texts).mean().item() for texts in probe]
fig = plots.lines(curves, "courtesies in a right answer", "mean of 200 answers")
shapes = "; ".join(f"{name} {values[1]:.1f} to {values[4]:.1f}" for name, values in curves.items())
plots.show(fig, f"Gold and three reward models from one to four courtesies: {shapes}.")

# %% [markdown]
# TEXT probe
#
# And what has it forgotten? *Agreement* is the share of pairs of answers to a held-out prompt, different in gold,
# that the reward model ranks as gold does. Of two answers of SFT that is what it could do before; of one answer of SFT
# and one of the hacked policy it is what your clicks were for.


# %%
# Pocket only
def agreement(its_roles, first, second):
    rows = zip(some, first, second, strict=True)
    rows = [(p, *sorted((a, b), key=lambda t: points(p, t))) for p, a, b in rows if a and b]
    asked, worse, better = zip(*[row for row in rows if points(*row[:2]) < points(row[0], row[2])], strict=True)
    gaps = scores(its_roles, asked, better) - scores(its_roles, asked, worse)
    return reward.pair_accuracy(gaps, torch.zeros(len(gaps)))


some = held_out[::2]
said = {"SFT": answers("reference", some, 6), "SFT again": answers("reference", some, 7)}
said["hacked"] = answers("hacked", some, 8)
agreed = {}
for name, its_roles in loaded.items():
    agreed[name] = [agreement(its_roles, said["SFT"], said[other]) for other in ("SFT again", "hacked")]
    print(f"{name:20} two of SFT {agreed[name][0]:.2f}, SFT against hacked {agreed[name][1]:.2f}")

# %% [markdown]
# TEXT forgetting
#
# ## The same run again
#
# Everything as at the beginning: from SFT, the same prompts, the same seed, the same price of 0.01. Only the reward
# model is another, and the critic, which starts from it.

# %%
mended = four_roles(models["your clicks, replay"])
after = run_ppo(mended, 15, "mending")


# %%
def curve_of(history):
    return {
        "score (proxy)": [s.score for s in history],
        gold.name: [gold(s.experience.prompts, s.experience.rollout).mean().item() for s in history],
        "KL, nats": [s.kl for s in history],
        "share finished": [s.finished for s in history],
    }


runs = {"before your clicks": before, "after": after}
found = {name: curve_of(history) for name, history in runs.items() if history}
panels = {title: {name: curves[title] for name, curves in found.items()} for title in found["after"]}
ends = "; ".join(f"{name}: gold {c[gold.name][-1]:.1f}, finished {c['share finished'][-1]:.0%}" for name, c in found.items())
plots.show(plots.panels(panels, "updates", {}), f"Four panels, two runs. In the end {ends}.")

# %% [markdown]
# TEXT curves
#
# On held-out prompts, where each policy is scored by the reward model that it was trained on:

# %%
config = ppo.PPOConfig(**{"minibatch_size": 64} | preset.ppo)
some = held_out[::4] if preset.name == "pocket" else held_out[:16]
ends = {}
for name, its_roles, role in (
    ("SFT", roles, "reference"), ("hacked", roles, "hacked"), ("cured", mended, "policy")
):
    ends[name] = ppo.collect_experience(its_roles, tokenizer, some, config, 0.0, seed=9, role=role)
table = {}
for name, seen in ends.items():
    marks, finished = gold(some, seen.rollout), seen.rollout.finished.float()
    numbers = {"proxy": seen.scores, gold.name: marks, "KL": seen.kl, "finished": finished}
    table[name] = {k: v.mean().item() for k, v in numbers.items()}
    print(f"{name:7}" + "".join(f"  {k} {v:5.2f}" for k, v in table[name].items()))

# %%
for i in range(0, len(some), len(some) // 4):
    print(readable(some[i]))
    for name, seen in ends.items():
        print(f"   {name:7} {seen.scores[i]:5.2f}  {seen.rollout.texts[i]}")

# %%
# Pocket only
def correct(seen):
    rows = zip(some, seen.rollout.texts, strict=True)
    return [rubric.gold_reward(*row).correct > 0 for row in rows]


for name, seen in ends.items():
    told(f"{name}: right answers", correct(seen))
if not CLICK_YOURSELF:
    assert table["hacked"]["gold"] < 0 < table["SFT"]["gold"] < table["cured"]["gold"]
    assert table["cured"]["finished"] > 0.95 > 0.2 > table["hacked"]["finished"]

# %% [markdown]
# TEXT results
#
# ## Ten seeds, and other clickers
#
# One run is one run. Recorded: the same with ten seeds, the hacked policy of each seed made once, and then other clicks.
# In every row the clicker decides as many pairs as it says; *careless* is one in five wrong, *biased* has the leaning
# of the annotators of lesson 02; *SFT pairs* are clicks on two answers of SFT.


# %%
# Pocket only
def recorded(name):
    with (ASSETS / "clicks" / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    words = ("row", "policy", "pairs", "clicker", "example")
    return [{k: v if k in words else float(v) for k, v in row.items()} for row in rows]


start = {(row["policy"], int(row["seed"])): row for row in recorded("before.csv")}
study = {}
for row in recorded("after.csv"):
    study.setdefault(row["row"], {})[int(row["seed"])] = row

# %% [markdown]
# TEXT study intro

# %%
# Pocket only
print(f"{'':17}{'seeds':>6}{'gold (least, most)':>20}{'correct':>9}{'ended':>7}{'KL':>6}{'agreement':>11}")


def line(name, rows):
    mean = {k: sum(r[k] for r in rows) / len(rows) for k in ("gold", "correct", "finished", "kl", "agreement")}
    golds = [row["gold"] for row in rows]
    print(f"{name:17}{len(rows):6}{mean['gold']:8.2f} ({min(golds):5.2f},{max(golds):5.2f})", end="")
    print(f"{mean['correct']:9.0%}{mean['finished']:7.0%}{mean['kl']:6.1f}{mean['agreement']:11.3f}")


for policy in ("SFT", "hacked"):
    line(policy, [row for (name, _), row in start.items() if name == policy])
for name, rows in study.items():
    line(name, list(rows.values()))

# %%
# Pocket only
NAMES = {"hacked": "before"} | {name: name for name in study}
groups = {"SFT": [(row["correct"], row["gold"]) for (p, _), row in start.items() if p == "SFT"]}
groups["hacked"] = [(row["correct"], row["gold"]) for (p, _), row in start.items() if p == "hacked"]
for name in list(study)[:6]:
    groups[name] = [(row["correct"], row["gold"]) for row in study[name].values()]
fig = plots.scatter(groups, "share of right answers, held-out prompts", "gold, held-out prompts")
plots.show(fig, "Gold against right answers, a point a seed.")

# %% [markdown]
# ## Teach it a taste of your own

# %% [markdown]
# TEXT taste


# %%
# Pocket only
TASTES = {
    "short": lambda prompt, answer: -len(answer.split()),
    "no courtesies": lambda prompt, answer: -rubric.count_phrases(answer, world.POLITE),
}
taste = "no courtesies"  # or "short", or a rule of your own, or your own clicks
asked = random.Random(preset.seed + 1).sample(train, 120)
now = answers("policy", asked, 1, mended), answers("policy", asked, 2, mended)
wanted = Clicks(list(zip(asked, *now, strict=True)), repeats=0)
for _ in wanted.questions:
    if sum(row["side"] is not None for row in wanted.rows) < 40:
        wanted.click_through(simulated(TASTES[taste]), limit=1)
liked = wanted.preferences()
print(f"{len(liked)} clicks for {taste!r}; {len(wanted.rows)} pairs asked")

# %%
# Pocket only
taught = train_on(models["your clicks, replay"], reward.encode_pairs(tokenizer, liked, *lengths), "taste")
tasteful = four_roles(taught)
history = run_ppo(tasteful, 12, "your taste")
ends["taste"] = ppo.collect_experience(tasteful, tokenizer, some, config, 0.0, seed=9, role="policy")
for name, seen in ends.items():
    kept = [sum(map(of, seen.rollout.texts)) / len(some) for of in MEASURES.values()]
    print(f"{name:7} words {kept[0]:5.1f}  courtesies {kept[1]:5.2f}", end="  ")
    print(f"gold {gold(some, seen.rollout).mean():5.2f}  right {sum(correct(seen)) / len(some):.0%}")

# %% [markdown]
# ## The number to take along

# %% tags=["headline"]
# Pocket only
print("headline")

# %% [markdown]
# ## Recap
#
# **Further reading.**
