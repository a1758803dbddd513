# %% [markdown]
# # 06 · Mend it with your own clicks
#
# **Run time** two to three minutes on two CPU cores, and five minutes of clicking if you like · **Before this** lesson
# 05 · **Next** lesson 07, the debugging clinic · **Exercise** `exercises/06_your_clicks.ipynb`
#
# After this lesson you will be able to
#
# - collect comparisons yourself, and say how far they can be trusted;
# - go on training a reward model, and see what it forgets;
# - mend a hacked reward model, and say on which answers a label pulls hardest;
# - say why RLHF is run in rounds.

# %%
PRESET = "pocket"  # every number below is from this preset
CLICK_YOURSELF = False  # True: you are the annotator; False: a simulated one, so that Run All works

import csv
import json
import random
import time
from itertools import cycle

import torch
from tqdm.auto import tqdm

from rlhf_helpers import clicks_panel, notebook, plots, ppo, reward
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.clicks import Clicks, simulated
from rlhf_helpers.clicks_file import RowFile
from rlhf_helpers.pocket import exam, rubric, world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.preferences import collect_preferences
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import load_gold, preference_dataset, prompt_dataset
from rlhf_helpers.stats import share_with_interval
from rlhf_helpers.text import answer_text, load_tokenizer, readable

# %%
preset, begun = load_preset(PRESET), time.perf_counter()
notebook.start(preset)
tokenizer, gold = load_tokenizer(preset), load_gold(preset)
folder = preset.runs / preset.name / "clicks"
adapters = {name: find_adapter(preset, name) for name in ("sft", "reward")}
train, held_out = (list(prompt_dataset(preset, split)["prompt"]) for split in ("train", "held_out"))
lengths = preset.prompt_length + 8, 2 * preset.response_length  # of a prompt, an answer in a pair

# %% [markdown]
# ## A run that has gone wrong
#
# Lesson 05 left a hole open. At a price of β = 0.01 per nat the policy finds what the reward model overpays: answers
# full of courtesies that never end. The proxy rises, gold falls. A higher price keeps the policy away from the hole,
# but does not mend it. Nothing in the run can: by the reward model's own numbers all is well. It takes somebody who
# *reads the answers*.
#
# First we need the patient: twelve updates of PPO from SFT, at β = 0.01.


# %%
def four_roles(reward_folder):
    roles = Roles(load_base(preset))
    roles.load("reference", adapters["sft"])
    roles.load("reward", reward_folder)
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    return roles


# %% [markdown]
# What we draw of each update, and the run itself, always with the same prompts and seed:


# %%
def watched(stats):
    """What to draw of an update."""
    marks = gold(stats.experience.prompts, stats.experience.rollout).mean().item()
    numbers = {"score (proxy)": stats.score, gold.name: marks, "KL, nats": stats.kl}
    return numbers | {"share finished": stats.finished}


def run_ppo(roles, updates, name):
    """PPO at the low price, always with the same prompts and seed; what to draw of each update."""
    settings = preset.ppo | {"updates": updates, "beta": 0.01, "seed": preset.seed}
    run = ppo.train_ppo(roles, tokenizer, train, ppo.PPOConfig(**settings))
    return [watched(stats) for stats in tqdm(run, total=updates, desc=name, leave=False)]


# %% [markdown]
# Policy and log are kept in `runs/`, so that you can go on clicking another day, on the same answers.

# %%
roles, log = four_roles(adapters["reward"]), RowFile(folder / "hacking.jsonl")
if (folder / "hacked" / "adapter_config.json").is_file():
    print("the hacked policy is there from an earlier run of this lesson")
else:
    log.write(run_ppo(roles, 12, "hacking"))
    roles.save("policy", folder / "hacked")
roles.load("hacked", folder / "hacked")
before = log.rows()
print(", ".join(f"{name} {before[0][name]:.2f} to {before[-1][name]:.2f}" for name in before[0]))

# %% [markdown]
# What does the policy say now? Two helpers: a role's answers, and the reward model's scores for them:


# %%
def answers(role, prompts, seed, roles=roles):
    length = preset.response_length
    return sample_responses(roles.use(role), tokenizer, list(prompts), length, seed=seed).texts


def scores(roles, prompts, texts):
    return reward.score_responses(roles, "reward", tokenizer, prompts, texts, *lengths)


# %% [markdown]
# Three prompts, each with SFT's answer and then the hacked policy's. The number is the score, in standard deviations of
# SFT's scores.

# %%
shown = held_out[:: max(1, len(held_out) // 3)][:3]
texts = {role: answers(role, shown, seed=3) for role in ("reference", "hacked")}
for i, prompt in enumerate(shown):
    print(readable(prompt))
    for said in texts.values():
        print(f"   {scores(roles, [prompt], said[i : i + 1]).item():5.2f}  {said[i]}")

# %% [markdown]
# ## You are the annotator
#
# Sixty prompts, each with one answer of the hacked policy and one of SFT, sides at random. With the mouse or the keys
# you say which is better, or "cannot tell". Eight pairs come a second time, with the sides exchanged. Each choice is
# saved before the next pair comes, in lesson 02's columns `prompt`, `chosen` and `rejected`, so you can close the
# notebook and go on tomorrow. The pairs are saved too, since your clicks are about exactly these answers.

# %%
file = RowFile(folder / "pairs.jsonl")
if not file.rows():
    asked = random.Random(preset.seed).sample(train, min(80, len(train)))
    sides = answers("reference", asked, seed=1), answers("hacked", asked, seed=2)
    drawn = [row for row in zip(asked, *sides, strict=True) if row[1] != row[2] and all(row)]
    file.write([{"prompt": p, "SFT": a, "hacked": b} for p, a, b in drawn[:60]])
pairs = [tuple(row.values()) for row in file.rows()]
print(f"{len(pairs)} pairs; the first: {readable(pairs[0][0])}")
for text in sorted(pairs[0][1:]):
    print(f"   {text}")

# %% [markdown]
# For Run All there is a simulated, honest clicker: it knows how good each answer is and takes the better one. In the
# pocket world the rubric's gold says what is better; with another preset the judge of lesson 02 does, which PPO has not
# seen. Like you, the clicker sees only the text, so an answer that was cut off counts as finished. To click yourself,
# set `CLICK_YOURSELF = True` at the top, run the cells down to the panel, click to the end, and then run the cells
# below it.


# %%
def points(prompt, answer):
    """How good an answer is: gold, or what the judge says where there is none."""
    if preset.name == "pocket":
        return rubric.gold_reward(prompt, answer).total
    one = [prompt], [answer]
    return reward.score_responses(gold.roles, "judge", tokenizer, *one, *lengths).item()


# %% [markdown]
# And the session, with one file for you and another for the simulated clicker:

# %%
honest = simulated(points)
clicks = Clicks(pairs, folder / ("mine.jsonl" if CLICK_YOURSELF else "simulated.jsonl"))
if CLICK_YOURSELF:
    clicks_panel.show(clicks)
else:
    print("Nobody is asked: a simulated honest clicker answers, who knows how good each answer is.")
    clicks.click_through(honest)
    print(clicks.progress())

# %% [markdown]
# ## Whose labels are these?
#
# <details><summary><b>Predict before you run.</b> How often will you agree with yourself on the eight pairs that come
# twice? Will you lean towards the longer answer, the politer one, the left one?</summary>
#
# The simulated clicker always agrees with itself and has no leanings, by construction. People differ: in Stiennon et
# al. (2020) labellers agreed with the researchers in 77% of comparisons, and the researchers with each other in 73%.
# How often *you* agree with yourself, you can only find out by being asked twice.
# </details>


# %%
def told(what, hits):
    """A share of trials with its 95% interval by Wilson."""
    share, low, high = share_with_interval(hits) if hits else (float("nan"),) * 3
    print(f"{what:36} {share:4.0%} of {len(hits):3}   [{low:4.0%}, {high:4.0%}]")


labels = clicks.preferences()  # says so if there are too few
same, twice = clicks.agreement()
decided = [row for row in clicks.rows if row["side"] and not row["repeat"]]
told("agreed with yourself", [True] * same + [False] * (twice - same))
told("chose the answer on the left", [row["side"] == "first" for row in decided])
print(f"cannot tell: {sum(row['side'] is None for row in clicks.rows)} of {len(clicks.rows)}")

# %% [markdown]
# Agreement with yourself says how much can be learnt from you. Somebody who errs in one click of ten agrees with
# himself in $0.9^2 + 0.1^2 = 82\%$ of the pairs, and even a perfect model predicts only 90% of his clicks. But look at
# the interval: eight of eight only says that the share is probably above two thirds. Since the sides are exchanged,
# somebody who always clicks left never agrees with himself, and somebody who clicks blindly agrees in half of the
# pairs; how much is left above chance is the first part of the exercise. Sixty clicks do not say much about a
# preference for the left either: the interval contains one half, and much else.
#
# In this world we can ask what nobody can ask in life: are the labels right? And do they favour longer or politer
# answers? Below the lines about longer and politer answers stands what gold, and what the annotator of lesson 02, would
# choose on the same pairs.


# %%
# Pocket only
def gap(row, worth):
    """By how much the chosen answer is ahead."""
    return worth(row["prompt"], row["chosen"]) - worth(row["prompt"], row["rejected"])


def words(prompt, answer):
    return len(answer.split())


def courtesies(prompt, answer):
    return rubric.count_phrases(answer, world.POLITE)


# %% [markdown]
# With intervals, as above:

# %%
# Pocket only
told("chose the answer with more gold", [gap(r, points) > 0 for r in decided if gap(r, points)])
for name, of in {"longer": words, "politer": courtesies}.items():
    differ = [row for row in decided if gap(row, of)]
    told(f"chose the {name} one", [gap(row, of) > 0 for row in differ])
    for who, worth in {"gold": points, "the annotator": Annotator().utility}.items():
        told(f"   {who} would", [gap(row, of) * gap(row, worth) > 0 for row in differ])

# %% [markdown]
# Compare each "chose" line with the "gold would" line below it. (The simulated clicker is gold, so the two must agree;
# yours need not.) Choosing the shorter answer in seven of ten pairs is not a bias: gold does the same, on the same
# pairs. A bias is a *difference* between you and the truth, and in life there is no "gold would" line. The annotator of
# lesson 02, from whose labels the reward model learnt, would have chosen the longer answer, and the politer one, in
# nine of ten. (That gold prefers some hacked answers is no slip: as a table below shows, they are right more often than
# SFT's. What ruins them is what stands around the facts.)
#
# ## What a click tells the reward model
#
# A pair pulls at the reward model with $1 - \sigma(\Delta)$ (lesson 02). By hand: 0.5 where it cannot tell, and
# $1 - \sigma(2) = 0.12$ where it is right and already rather sure. So a click teaches most where the reward model is
# *wrong*. How hard do these clicks pull, and how hard would clicks on pairs of SFT answers?

# %%
asked = [prompt for prompt, *_ in pairs]
two = answers("reference", asked, seed=4), answers("reference", asked, seed=5)
at_home = Clicks(list(zip(asked, *two, strict=True)), repeats=0)
at_home.click_through(honest)


def pulls(rows):
    asked = [row["prompt"] for row in rows]
    sides = [[answer_text(row[side]) for row in rows] for side in ("chosen", "rejected")]
    chosen, rejected = (scores(roles, asked, texts) for texts in sides)
    return 1 - (chosen - rejected).sigmoid()


# %% [markdown]
# The pull of each click, before anything is learnt from it:

# %%
pulled = {"policy and SFT": pulls(decided), "SFT twice": pulls(list(at_home.preferences()))}
for name, pull in pulled.items():
    print(f"{name:15} {len(pull):2} clicks, mean pull {pull.mean():.2f};", end=" ")
    print(f"the reward model would choose otherwise in {(pull > 0.5).float().mean():.0%}")
means = [pull.mean() for pull in pulled.values()]
assert CLICK_YOURSELF or preset.name != "pocket" or means[0] > 1.5 * means[1]

# %% [markdown]
# On pairs of SFT answers the reward model is nearly always right: it was trained on such pairs. (Many of these pairs
# cannot be decided at all, since both answers have the same gold.) With the policy's answers it is wrong more often
# than right: PPO has gone where it errs, and that is what hacking is. So clicks pull hardest *where the policy now is*.
# Whether clicks on SFT's own pairs would mend anything is another question, which these numbers do not answer.
#
# ## Training on, with a replay
#
# Sixty pairs are few, and nothing in their loss asks the reward model to keep what the 3,572 pairs of lesson 02 taught
# it. So half of each batch is old pairs, a **replay**. By hand, with three new pairs, five old ones and batches of
# four:


# %% tags=["nbval-check-output"]
def batches(new, old, replay, steps, size):
    """Pairs for all steps, with the same share of old ones in each batch."""
    again = round(replay * size)
    shares = (cycle(new), size - again), (cycle(old), again)
    return [next(source) for _ in range(steps) for source, n in shares for _ in range(n)]


by_hand = batches(["new 1", "new 2", "new 3"], ["a", "b", "c", "d", "e"], 0.5, steps=3, size=4)
for step in range(3):
    print(by_hand[4 * step : 4 * step + 4])

# %% [markdown]
# The old pairs are SFT's answers to every twelfth prompt of lesson 02, with the annotator's choices, collected as
# there. About as many pairs of other prompts are kept apart, to see what is forgotten.


# %%
def annotated(first):
    """Pairs of every twelfth prompt from the first on, as people have judged them."""
    if preset.name == "pocket":
        sft, those = roles.use("reference"), train[first::12]
        rows = collect_preferences(
            sft, tokenizer, those, Annotator(), seed=preset.seed, cache=folder
        )
    else:
        rows = preference_dataset(preset)
        rows = rows.select(range(first, min(first + 4800, len(rows)), 12))
    return reward.encode_pairs(tokenizer, rows, *lengths)


# %% [markdown]
# As tokens, and the clicks with them:

# %%
old_pairs, unseen = annotated(0), annotated(6)
new_pairs = reward.encode_pairs(tokenizer, labels, *lengths)
print(f"{len(new_pairs)} new pairs, {len(old_pairs)} old ones, {len(unseen)} kept apart")

# %% [markdown]
# Forty steps at 0.3 times the learning rate of lesson 02: the reward model should move, not start over. Then its scores
# are normalised again on SFT's answers, so that β keeps its meaning.


# %%
def train_on(start, new, name, replay=0.5, steps=40, size=16):
    """Train the reward model in a folder on with new pairs; returns the folder of the result."""
    roles = Roles(load_base(preset))
    roles.load("reward", start, trainable=True)
    rate = 0.3 * reward.RewardConfig(**preset.reward).learning_rate
    settings = {"steps": steps, "batch_size": size, "learning_rate": rate, "eval_every": steps}
    config = reward.RewardConfig(**preset.reward | settings)
    rows = batches(new, old_pairs, replay, steps, size)
    run = reward.train_reward_model(roles, "reward", tokenizer, rows, new, config)
    begin, *_, end = tqdm(run, total=steps + 1, desc=name, leave=False)
    said = torch.cat(reward.pair_scores(roles, "reward", tokenizer, old_pairs))
    reward.normalise(roles, "reward", said)
    roles.save("reward", folder / name)
    before, after = (stats.held_out["accuracy"] for stats in (begin, end))
    print(f"{name}: agrees with {before:.0%} of the clicks before, {after:.0%} after")
    return folder / name


# %% [markdown]
# Once with the replay, and once on the clicks alone:

# %%
models = {"before": adapters["reward"]}
models["clicks and replay"] = train_on(models["before"], new_pairs, "mended")
models["clicks alone"] = train_on(models["before"], new_pairs, "alone", replay=0)

# %% [markdown]
# <details><summary><b>Predict before you run.</b> The probe of lesson 02: the same right answers with none to four
# courtesies around them. The reward model paid for the first two and took nothing off for more. What will it do after
# the clicks?</summary>
#
# The hacked answers are full of courtesies, and the clicks mostly chose the others. So courtesies should cost something
# now. The first one, which gold likes, might be thrown out as well: a reward model has no rubric, only examples.
# </details>

# %%
# Pocket only
probe = exam.polite_probe()
loaded = {name: Roles(load_base(preset)) for name in models}
for name, path in models.items():
    loaded[name].load("reward", path)
marks = [[points(*row) for row in zip(*texts, strict=True)] for texts in probe]

# %% [markdown]
# The mean of gold, and of each reward model's scores:

# %%
# Pocket only
curves = {"gold": [sum(row) / len(row) for row in marks]}
for name, its_roles in loaded.items():
    curves[name] = [scores(its_roles, *texts).mean().item() for texts in probe]
fig = plots.lines(curves, "courtesies in a right answer", "mean of 200 answers")
ends = "; ".join(f"{name} {values[1]:.1f} to {values[4]:.1f}" for name, values in curves.items())
plots.show(fig, f"Gold and three reward models, from one courtesy to four: {ends}.")
for name, values in curves.items():
    print(f"{name:18}", [round(value, 2) for value in values])
falls = {name: values[1] - values[4] for name, values in curves.items()}
assert CLICK_YOURSELF or falls["before"] < 0
assert CLICK_YOURSELF or falls["clicks and replay"] > 0.2

# %% [markdown]
# Before the clicks, each of the first two courtesies was paid for, and more cost nothing. After them, the curve has the
# *shape* of gold's: the first courtesy earns something, and every further one costs. Nobody told the reward model that
# rule; it has only seen some sixty choices. (Compare shapes, not heights: gold is in points, a score in standard
# deviations of SFT's scores.) The probe shows one hole. It cannot show that there is no other.
#
# And what has been forgotten? The table has three shares. *SFT twice*: of pairs of SFT answers to a held-out prompt,
# different in gold, the share that the reward model ranks as gold does. *Hacked and SFT*: the same with one answer of
# the hacked policy, which is what the clicks were for. *Annotator*: of the annotator's choices kept apart above, the
# share that the reward model would make too.


# %%
# Pocket only
def agreement(its_roles, prompts, first, second):
    """Share of pairs of answers, different in gold, that are ranked as gold ranks them."""
    rows = [(p, a, b) for p, a, b in zip(prompts, first, second, strict=True) if a and b]
    gaps = torch.tensor([points(p, b) - points(p, a) for p, a, b in rows])
    asked, *sides = map(list, zip(*rows, strict=True))
    proxy = scores(its_roles, asked, sides[1]) - scores(its_roles, asked, sides[0])
    return ((proxy > 0) == (gaps > 0))[gaps != 0].float().mean().item()


# %% [markdown]
# The answers are sampled once, so that all three reward models judge the same ones:

# %%
# Pocket only
half = held_out[::2]
said = {"SFT": answers("reference", half, 6), "hacked": answers("hacked", half, 8)}
said["again"] = answers("reference", half, 7)

# %% [markdown]
# The three shares for each reward model:

# %%
# Pocket only
agreed = {}
for name, its_roles in loaded.items():
    agreed[name] = [agreement(its_roles, half, said["SFT"], said[k]) for k in ("again", "hacked")]
    chosen, rejected = reward.pair_scores(its_roles, "reward", tokenizer, unseen)
    agreed[name].append(reward.pair_accuracy(chosen, rejected))
    print(
        f"{name:18} SFT twice {agreed[name][0]:.2f}, hacked and SFT {agreed[name][1]:.2f},", end=""
    )
    print(f" annotator {agreed[name][2]:.2f}")
assert CLICK_YOURSELF or agreed["clicks and replay"][1] > agreed["before"][1] + 0.2
for name in ("clicks and replay", "clicks alone"):
    assert CLICK_YOURSELF or agreed[name][0] > agreed["before"][0] - 0.05

# %% [markdown]
# Where the policy now is, both new reward models judge far better than before. With the replay or without, this measure
# shows no loss on SFT's own answers. So by these measures forty small steps forget nothing, and the replay costs a
# little of the cure: 0.81 instead of 0.86. (The last column counts the annotator's choices, bias included. A reward
# model that has lost the bias must disagree with some of them, so a fall there is not damage in itself.) This is one
# seed and an honest clicker, and no policy is trained here on the reward model without replay.
#
# ## The same run again
#
# Everything is as in the first run: it starts from SFT, with the same prompts, the same seed and the same price of
# 0.01. Only the reward model is another one, and with it the critic, which starts as its copy. And the run takes
# fifteen updates instead of twelve, to give a second fall time to begin.

# %%
mended = four_roles(models["clicks and replay"])
after = run_ppo(mended, 15, "mending")
print(f"from nothing to here {(time.perf_counter() - begun) / 60:.1f} minutes")

# %% [markdown]
# Both runs, each scored by the reward model that it was trained with:

# %%
logs = {"before the clicks": before, "after": after}
panels = {title: {k: [row[title] for row in log] for k, log in logs.items()} for title in after[0]}
last = ", ".join(
    f"{log[-1][gold.name]:.1f} and {log[-1]['share finished']:.0%} {name}"
    for name, log in logs.items()
)
alt = f"Score, gold, KL and share finished over the updates. In the end gold and finished: {last}."
plots.show(plots.panels(panels, "updates", {}), alt)

# %% [markdown]
# In the old run the score climbs while gold falls below 0, and in the end hardly any answer is finished. In the new run
# gold ends above where it began, nearly all answers are finished, and at the same price the policy stays far nearer to
# SFT. (The two scores are in units of two reward models: compare their shapes, not their heights.)
#
# On held-out prompts:

# %%
config = ppo.PPOConfig(**{"minibatch_size": 64} | preset.ppo)
some = held_out[::3] if preset.name == "pocket" else held_out[:16]
ends, table = {}, {}


def measured(name, its_roles, role):
    """Answers to held-out prompts, and what is to be said of them."""
    options = {"seed": 9, "role": role}
    seen = ends[name] = ppo.collect_experience(its_roles, tokenizer, some, config, 0.0, **options)
    marks, finished = gold(some, seen.rollout), seen.rollout.finished.float()
    numbers = {"proxy": seen.scores, gold.name: marks, "KL": seen.kl, "finished": finished}
    table[name] = {k: v.mean().item() for k, v in numbers.items()}
    print(f"{name:7}" + "".join(f"  {k} {v:5.2f}" for k, v in table[name].items()))


# %% [markdown]
# SFT, the hacked policy and the cured one:

# %%
measured("SFT", roles, "reference")
measured("hacked", roles, "hacked")
measured("cured", mended, "policy")

# %% [markdown]
# Read some of them:

# %%
for i in range(0, len(some), len(some) // 4):
    print(readable(some[i]))
    for name, seen in ends.items():
        print(f"   {name:7} {seen.scores[i]:5.2f}  {seen.rollout.texts[i]}")

# %% [markdown]
# How many are right? (The rubric counts an answer as right if it states the fact and no wrong one.)


# %%
# Pocket only
def right(seen):
    return [
        rubric.gold_reward(*row).correct > 0 for row in zip(some, seen.rollout.texts, strict=True)
    ]


for name, seen in ends.items():
    told(f"{name}: right", right(seen))
if not CLICK_YOURSELF:
    assert table["hacked"]["gold"] < 0 < table["SFT"]["gold"] < table["cured"]["gold"]
    assert table["hacked"]["finished"] < 0.2 and table["cured"]["finished"] > 0.95

# %% [markdown]
# The cured policy has more gold than SFT, and its answers end. The hacked policy had more right answers than SFT; the
# cured one keeps that gain, and leaves out what ruined it. The clicks need not have taught it facts: the reward model
# ranked SFT's answers well before them (0.90) and hardly better after (0.91), so what has changed is mostly the price
# of courtesies. Not every answer has improved: SFT's sample has the driver of the bus right; in the other two it is a
# trout. And the table does not show that no hole is left. These were fifteen updates; a longer run may find another,
# and then somebody has to click again.
#
# ## Ten seeds
#
# One run is only one run. So all of this was recorded with ten seeds for the prompts, all samples and the clicker.
# Besides sixty honest clicks there are fewer and more of them; *careless* clickers, who are wrong one time in five;
# *biased* ones, who click as the annotators of lesson 02 do; and honest clicks on pairs in which SFT wrote both
# answers. All runs begin from the course's one SFT model and one reward model; how much those matter is not measured.


# %%
# Pocket only
def recorded(name):
    with (ASSETS / "clicks" / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = ("row", "policy", "pairs", "clicker", "example")
    return [{k: v if k in texts else float(v) for k, v in row.items()} for row in rows]


about = json.loads((ASSETS / "clicks" / "about.json").read_text(encoding="utf-8"))
print(f"recorded on {about['machine']}, {about['date']}, {about['versions']}")

# %% [markdown]
# The measurements before the clicks and after, by row and seed:

# %%
# Pocket only
start, study = {"SFT": {}, "hacked": {}}, {}
for row in recorded("before.csv"):
    start[row["policy"]][int(row["seed"])] = row
for row in sorted(recorded("after.csv"), key=lambda row: (row["clicker"], row["clicks"])):
    study.setdefault(row["row"], {})[int(row["seed"])] = row

# %% [markdown]
# Means over the seeds, and for gold the range as well. *On SFT* is the reward model's agreement with gold on pairs of
# SFT answers, as above; *on hacked*, on pairs with one answer of the hacked policy. (The rows "SFT" and "hacked" have
# the same reward model, the one before the clicks.) *Above* counts the seeds on which gold is above SFT's; *up*, those
# on which the share of right answers is at least ten points above SFT's.

# %% tags=["nbval-check-output"]
# Pocket only
NAMES = {"gold": "gold", "correct": "correct", "finished": "finished", "kl": "kl"}
NAMES |= {"agreement": "on SFT", "agreement_hacked": "on hacked"}
print(f"{'':16}seeds" + "".join(f"{n:>10}" for n in NAMES.values()) + "   gold from, to  above  up")
for name, rows in (start | study).items():
    means = [sum(row[k] for row in rows.values()) / len(rows) for k in NAMES]
    golds = [row["gold"] for row in rows.values()]
    print(f"{name:16}{len(rows):5}" + "".join(f"{mean:10.3f}" for mean in means), end="")
    sft = [(row, start["SFT"][seed]) for seed, row in rows.items()]
    above = sum(row["gold"] > base["gold"] for row, base in sft)
    up = sum(row["correct"] >= base["correct"] + 0.1 for row, base in sft)
    print(f"{min(golds):9.2f}{max(golds):6.2f}{above:7}{up:4}")

# %% [markdown]
# With sixty honest clicks on pairs with an answer of the policy, gold ends above SFT's on all ten seeds, and the share
# of right answers at least ten points above SFT's. The hacked policy had that second gain on nine seeds already, so
# most of it is PPO's doing, and the cure keeps it. What the cure adds is all the rest: the answers end. The reward
# model judges pairs of SFT answers as well as before, and pairs with a hacked answer far better.
#
# **Where you click** matters more than how often. Sixty honest clicks on pairs of SFT answers leave gold about where
# SFT is, and above it on only 2 of 10 seeds, at a KL of seven nats; on pairs with a hacked answer the reward model
# agrees with gold hardly more often than before. SFT's answers do not contain what has to be learnt. (Nearly all of
# these policies' answers do end again; the table does not say why.) Twelve clicks where the policy is do more.
#
# **Who clicks** matters as much. Careless clickers, wrong one time in five, mend the model on 9 seeds of 10; on the
# other one gold stays far below SFT's. More such clicks do not make it safe: with 120, the policy is hacked as before
# on one seed of ten. With biased clickers gold stays below SFT's on every seed. Nearly all of their answers end, but
# are nearly twice as long as with honest clickers: the love of courtesies dug one of the holes, and these clicks dig
# on.
#
# Without the replay, on three seeds, the policy stays nearer to SFT and ends with a little less gold than with it; what
# the reward model knows of SFT's answers has hardly suffered.
#
# The same as a figure, a point for each seed (the groups are moved sideways a little, to be told apart):

# %%
# Pocket only
KINDS = {
    "honest": "honest",
    "careless": "careless",
    "biased": "biased",
    "sft": "honest, SFT's pairs",
}
groups = {
    label: [
        (row["clicks"] * 1.04**place, row["gold"])
        for name, rows in study.items()
        for row in rows.values()
        if name.startswith(f"{kind}-")
    ]
    for place, (kind, label) in enumerate(KINDS.items())
}
fig = plots.scatter(groups, "decided clicks", "gold, held-out prompts")
ax = fig.axes[0]
ax.set_xscale("log")
ax.set_xticks([12, 24, 60, 120], ["12", "24", "60", "120"])
ax.minorticks_off()
sft_gold = sum(row["gold"] for row in start["SFT"].values()) / len(start["SFT"])
ax.axhline(sft_gold, color="0.4", ls="--", lw=1)
ax.annotate("SFT", (35, sft_gold), xytext=(0, 3), textcoords="offset points", color="0.3")
plots.show(
    fig,
    "Gold against clicks: honest ones lie above SFT from twelve on; careless ones scatter, one is "
    "below zero; biased ones and those on SFT's pairs lie mostly below SFT.",
)

# %% [markdown]
# So in this world a few honest clicks are enough: twelve, on each of ten seeds; from 24 on the points hardly rise. But
# this is one wide hole, and the pairs are full of it. Do not carry the number over to a hole that is rare.
#
# ## Rounds
#
# The cure has moved the policy by three nats, and nobody has clicked on *its* answers yet. So RLHF goes in rounds:
# collect comparisons on the newest policy, train the reward model and the policy again, and so on. Bai et al. (2022,
# section 4.5) put new policies before the annotators week by week, Ouyang et al. (2022) describe the same loop, and
# Ziegler et al. (2019) already collected labels while the policy was training. Here are sixty more honest clicks, on
# three seeds, each between an answer of the cured policy and one of SFT; the pairs of the first round are replayed with
# the old ones:

# %% tags=["nbval-check-output"]
# Pocket only
for seed, row in study["second-round-60"].items():
    first, names = study["honest-60"][seed], ("gold", "correct", "kl")
    moved = ", ".join(f"{name} {first[name]:.2f} to {row[name]:.2f}" for name in names)
    print(f"seed {seed}: {moved}; {row['asked']:.0f} pairs asked")

# %% [markdown]
# Gold is higher on two seeds and lower on one: three seeds show no dependable gain. The first round had closed the
# hole. The answers are now more often equally good, so more pairs are undecided: it took 65 to 70 questions to get
# sixty clicks, 60 to 62 before. What a round is worth once the policy has found something new, these runs do not show.
#
# ## Teach it a taste of your own
#
# So far gold was the aim. It need not be. Say you want no courtesies at all, though the rubric pays for one; or short
# answers; or whatever you like. Forty clicks on answers of the cured policy and of SFT, forty more steps for the mended
# reward model, and twelve updates from SFT. Here a rule clicks; with `CLICK_YOURSELF = True` a panel opens instead:
# stop after about forty, and run the cells below.
#
# <details><summary><b>Predict before you run.</b> Will it drop the courtesies? What will that do to gold, and to the share
# of right answers?</summary>
#
# Gold should fall by the 0.2 that one courtesy earns, wherever the policy had one. The facts are another matter: no
# click asked for them or against them, but the old pairs, half of each batch, do ask for them. </details>

# %%
# Pocket only
TASTES = {
    "no courtesies": lambda prompt, answer: -courtesies(prompt, answer),
    "short": lambda prompt, answer: -words(prompt, answer),
}
taste = "no courtesies"  # or "short", or a rule of your own

# %% [markdown]
# Who clicks:

# %%
# Pocket only
asked = random.Random(preset.seed + 1).sample(train, 120)
now = answers("policy", asked, 1, mended), answers("reference", asked, 2)
wanted = Clicks(list(zip(asked, *now, strict=True)), repeats=0)
if CLICK_YOURSELF:
    clicks_panel.show(wanted)
else:
    wanted.click_through(simulated(TASTES[taste]), limit=50)

# %% [markdown]
# The first forty that were decided:

# %%
# Pocket only
liked = wanted.preferences()
liked = liked.select(range(min(40, len(liked))))
print(f"{len(liked)} clicks for {taste!r}")

# %% [markdown]
# Train the reward model, then the policy, and measure:

# %%
# Pocket only
pairs_liked = reward.encode_pairs(tokenizer, liked, *lengths)
tasteful = four_roles(train_on(models["clicks and replay"], pairs_liked, "taste"))
run_ppo(tasteful, 12, "your taste")
measured("taste", tasteful, "policy")

# %% [markdown]
# Words and courtesies in an answer, on average:

# %%
# Pocket only
for name, seen in ends.items():
    rows = list(zip(some, seen.rollout.texts, strict=True))
    for what, of in {"words": words, "courtesies": courtesies}.items():
        table[name][what] = sum(of(*row) for row in rows) / len(rows)
    print(
        f"{name:7} words {table[name]['words']:5.1f}, courtesies {table[name]['courtesies']:.2f};",
        end=" ",
    )
    print(f"gold {table[name]['gold']:.2f}, right {sum(right(seen)) / len(rows):.0%}")
assert CLICK_YOURSELF or table["taste"]["courtesies"] < table["cured"]["courtesies"] / 2

# %% [markdown]
# The cured policy went up to one courtesy an answer, from SFT's 0.23; this one, which began from SFT too, has gone down
# to 0.10. Gold is 0.11 below the cured policy's, and about as many answers are right: the policy now serves the
# clicker, not the rubric. The mechanism is that of the cure, and of the hole: a reward model learns what is clicked.
# Whose clicks those are is not a technical question.
#
# Forty clicks can teach a trait on the surface, which most pairs show and which the model can already leave out.
# Whether they could teach a fact, or a rule with exceptions ("courtesies only for those who say please"), was not
# tried; hardly any pair would show it. Nobody has looked at what else they changed, beyond the columns above. And this
# is one seed.
#
# ## The number to take along

# %% tags=["headline"]
# Pocket only
sixty = study["honest-60"].values()
ahead = sum(row["gold"] > start["SFT"][int(row["seed"])]["gold"] for row in sixty)
golds = {"hacked": start["hacked"].values(), "SFT": start["SFT"].values(), "cured": sixty}
mean = {name: sum(row["gold"] for row in rows) / len(rows) for name, rows in golds.items()}
print(f"60 honest clicks, {len(sixty)} seeds: gold {mean['hacked']:.2f} before,", end=" ")
print(f"{mean['cured']:.2f} after (SFT {mean['SFT']:.2f}); above SFT on {ahead} of {len(sixty)}")

# %% [markdown]
# ## Recap
#
# - Clicks pull hardest where the policy now is: there the reward model is wrong.
# - Go on training the reward model from where it was; mix in old pairs, normalise again, and measure what was
#   forgotten.
# - Ask some pairs twice: where you do not agree with yourself, nobody can learn from you.
# - A reward model learns what is clicked, bias and taste included.
# - The cure holds where somebody has looked. That is why RLHF goes in rounds.
#
# The hole is mended because somebody read the answers. The first run was broken in a way that its score did not show.
# Lesson 07 collects other such runs, and what finds them.
#
# **Further reading.** Bai et al. 2022 (arXiv 2204.05862), section 4.5: rounds with people. Ouyang et al. 2022 (arXiv
# 2203.02155), section 3: comparisons, and doing it again. Ziegler et al. 2019 (arXiv 1909.08593): labels collected
# while the policy learns, and what labellers' shortcuts led to. Stiennon et al. 2020 (arXiv 2009.01325), appendix C:
# how people agree.
