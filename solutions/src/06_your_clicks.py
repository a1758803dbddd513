# %% [markdown]
# # 06 · Exercises: your clicks
#
# **Run time** under two minutes on two CPU cores · **Your time** about 60 minutes · **Before this** lesson 06
#
# Three questions for anybody who collects comparisons: how far does one person agree with himself beyond chance; which
# pairs are worth a click; and how are old pairs kept among the new? The check below each function names the likely
# mistake. The cells after it go on with a reference version, so that Run All works with nothing filled in, or with a
# wrong answer; only an error in your code stops it. To compare with the solution, run
# `nbdiff-web exercises/06_your_clicks.ipynb solutions/06_your_clicks.ipynb` in the course's folder.

# %%
PRESET = "pocket"  # every number below is from this preset

import random

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_helpers import checks, notebook, reward
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.clicks import Clicks, simulated
from rlhf_helpers.pocket import corpus, rubric, world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.preferences import collect_preferences
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.text import load_tokenizer

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer = load_tokenizer(preset)
adapters = {name: find_adapter(preset, name) for name in ("sft", "reward")}

# %% [markdown]
# ## 1 · Agreement with yourself, corrected for chance
#
# ●○○ · 15 minutes
#
# Some pairs come twice, the second time with the sides exchanged. How often was the same *answer* chosen? Blind clicks
# would agree in half of the pairs, so this share says too much. Cohen's κ subtracts chance, and divides by what chance
# leaves:
#
# $$\kappa = \frac{p_{\text{same}} - p_{\text{chance}}}{1 - p_{\text{chance}}}$$
#
# where $p_{\text{chance}}$ is the agreement of two passes that have nothing to do with each other, but click left and
# right as often as these two. By hand, four pairs, 0 for left and 1 for right: the first time $(0, 0, 1, 1)$, the
# second time $(1, 1, 0, 1)$. The sides were exchanged, so the same answer was chosen in the first three pairs:
# $p_{\text{same}} = \tfrac34$. The first time, left was clicked in $\tfrac24$ of the pairs, the second time right in
# $\tfrac34$. Chance agrees if it clicks left and then right, or right and then left:
# $p_{\text{chance}} = \tfrac24 \cdot \tfrac34 + \tfrac24 \cdot \tfrac14 = \tfrac12$, and $\kappa = \tfrac12$.
#
# If chance alone agrees everywhere, $p_{\text{chance}} = 1$, return 0.


# %% tags=["nbval-check-output"]
def self_agreement(first: Tensor, second: Tensor) -> float:
    """Agreement of two passes over the same pairs, corrected for chance.

    Args:
        first: [N], int64, the side clicked the first time: 0 left, 1 right.
        second: [N], the side clicked the second time, with the answers exchanged.

    Returns:
        κ, at most 1; the arguments are not changed.
    """
    ### BEGIN SOLUTION
    same = (first != second).double().mean().item()
    left = 1 - first.double().mean().item()
    left_again = second.double().mean().item()  # as the pair stood the first time
    chance = left * left_again + (1 - left) * (1 - left_again)
    return (same - chance) / (1 - chance) if chance < 1 else 0.0
    ### END SOLUTION


checks.check_self_agreement(self_agreement)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# First turn the second pass round, to the sides of the first: a click on the right has then chosen the answer that
# stood on the left before. After that, agreement is equality, and chance has two terms: left both times, and right both
# times. </details>

# %% [markdown]
# From here on we use the reference version. Three people click through sixty pairs of made-up answers, thirty of which
# come twice: one who reads; one who clicks left whatever stands there; and one who clicks left in four of five cases
# and reads in the others.

# %%
from rlhf_helpers.checks.lesson_06 import self_agreement

rng = random.Random(preset.seed)
made_up = [(f"question {i}", f"answer {i} a", f"answer {i} b") for i in range(60)]
reader = simulated(lambda prompt, answer: float(answer.endswith("a")), wrong=0.1)

# %% [markdown]
# Who clicks:

# %%
people = {
    "reads": reader,
    "always left": lambda *question: "first",
    "mostly left": lambda *question: "first" if rng.random() < 0.8 else reader(*question),
}

# %% [markdown]
# What κ makes of each of them:

# %%
for name, clicker in people.items():
    clicks = Clicks(made_up, repeats=30)
    clicks.click_through(clicker)
    once, again = (
        {r["pair"]: int(r["side"] == "second") for r in clicks.rows if r["repeat"] == repeat}
        for repeat in (False, True)
    )
    first = torch.tensor([once[pair] for pair in again])
    second = torch.tensor(list(again.values()))
    same, twice = clicks.agreement()
    print(
        f"{name:12} the same answer in {same:2} of {twice}, κ {self_agreement(first, second):5.2f}"
    )

# %% [markdown]
# The reader errs in one click of ten, and for that reason alone agrees with himself in only about four of five pairs.
# Somebody who always clicks left never chooses the same answer twice, and chance would not either: κ is 0, as it should
# be. Somebody who mostly clicks left agrees more often, but κ says that hardly any of it is more than chance. Thirty
# repeats are few: the interval of a share of 30 is some 30 points wide.
#
# **In words.** Somebody labels sixty pairs twice, each with one answer of the old policy and one of the new, and
# computes κ with the categories *old* and *new* instead of left and right. The new answer is nearly always better. What
# does κ say then, and is it to blame?

# %% [markdown] tags=["solution"]
# If both passes say *new* in 95% of the cases, chance alone agrees in 0.95² + 0.05² = 90.5%, and there is hardly
# anything left to show: one pair decided differently makes κ jump. The arithmetic is not to blame: on pairs that are
# all easy for the same reason, agreement says little about how carefully somebody has read. With the sides as
# categories, which are drawn at random, chance is near one half, whatever the answers are; and κ catches the one who
# does not read.

# %% [markdown]
# ## 2 · Which pairs to ask about
#
# ●●○ · 20 minutes
#
# A click costs five seconds of a person's life. Which pairs of a pool should be asked about? One idea: those about
# which the reward model is *unsure*. By Bradley and Terry its choice is a coin with probability $\sigma(\Delta)$, and
# the coin is fairest where $|\Delta|$, the distance of the two scores, is least. By hand: scores
# $(1.0, 0.5, 2.0, -1.0)$ of the first answers and $(0.75, 1.5, -1.0, -0.9)$ of the second are $(0.25, 1.0, 3.0, 0.1)$
# apart. With two clicks to spend, ask about row 3, then row 0.


# %% tags=["nbval-check-output"]
def most_unsure(first_scores: Tensor, second_scores: Tensor, count: int) -> Tensor:
    """The pairs about which the reward model is least sure.

    Args:
        first_scores, second_scores: [N], float32, of the two answers of each pair.
        count: how many pairs, at most N.

    Returns:
        [count], int64, row numbers, the pair of the closest scores first.
    """
    ### BEGIN SOLUTION
    distance = (first_scores - second_scores).abs()
    return distance.argsort()[:count]
    ### END SOLUTION


checks.check_most_unsure(most_unsure)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# First compute the distance of each pair; it has no sign. Sorting can return the values, or the places that they come
# from; row numbers are places.
# </details>

# %% [markdown]
# From here on we use the reference version. What is a click worth? The pool has 240 pairs, each with one answer of SFT
# and one in the manner of a hacked policy: a right or wrong answer with three or four courtesies. The budget is 24
# clicks of an honest clicker, spent in three ways: at random; where the reward model is unsure; and where *proxy and
# length part*, that is, where the reward model most prefers the shorter answer.

# %%
# Pocket only
from rlhf_helpers.checks.lesson_06 import most_unsure

roles = Roles(load_base(preset))
roles.load("sft", adapters["sft"])
roles.load("reward", adapters["reward"])
prompts = random.Random(preset.seed).sample(world.prompts("train"), 480)


def polite_pairs(prompts, seed):
    """For each prompt an answer of SFT, and another one of it with courtesies around."""
    plain, other = (
        sample_responses(roles.use("sft"), tokenizer, prompts, seed=seed + k).texts for k in (0, 1)
    )
    rng = random.Random(seed)
    long = [corpus.with_courtesies(rng, answer, rng.choice((3, 4))) for answer in other]
    return [row for row in zip(prompts, plain, long, strict=True) if row[1] and row[2]]


# %% [markdown]
# What an answer is worth:


# %%
# Pocket only
def gold(prompt, answer):
    return rubric.gold_reward(prompt, answer).total


# %% [markdown]
# And what the reward model says of both answers of each pair:


# %%
# Pocket only
def scores(roles, pairs):
    columns = [list(column) for column in zip(*pairs, strict=True)]
    return [
        reward.score_responses(roles, "reward", tokenizer, columns[0], side, 32, 64)
        for side in columns[1:]
    ]


# %% [markdown]
# The pool to ask about, and other pairs to measure with:

# %%
# Pocket only
pool, test = polite_pairs(prompts[:240], seed=1), polite_pairs(prompts[240:], seed=3)
first, second = scores(roles, pool)

# %% [markdown]
# The three ways to spend the budget:

# %%
# Pocket only
longer = torch.tensor([len(b.split()) - len(a.split()) for _, a, b in pool])
chosen = {
    "at random": torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:24],
    "unsure": most_unsure(first, second, 24),
    "proxy and length part": ((second - first) * longer.sign()).argsort()[:24],
}
for name, rows in chosen.items():
    gold_first = [gold(*pool[i][:2]) > gold(pool[i][0], pool[i][2]) for i in rows]
    proxy_first = (first > second)[rows]
    differ = (torch.tensor(gold_first) != proxy_first).float().mean()
    print(f"{name:22} the reward model would choose otherwise than gold in {differ:.0%}")

# %% [markdown]
# ## 3 · Old pairs among the new
#
# ●●○ · 20 minutes
#
# Whatever the clicks are, the reward model must not forget what it knew. So each batch has a fixed share of old pairs.
# From both lists a batch takes the next pairs, going on where the batch before ended, and starting again at the
# beginning once a list is used up. So a few new pairs come again often, many old ones hardly ever.
#
# By hand: new pairs 10, 11, 12, old ones 20 to 24, batches of four, half of them old. The first batch is 10, 11, 20,
# 21, the second 12, 10, 22, 23.


# %% tags=["nbval-check-output"]
def mixture(new: Tensor, old: Tensor, steps: int, batch_size: int, replay: float) -> Tensor:
    """Which pairs are in each batch.

    Args:
        new, old: [N] and [M], int64, numbers of the pairs.
        steps, batch_size: how many batches, and pairs in each.
        replay: share of old pairs in a batch, from 0 to 1; round it to whole pairs.

    Returns:
        [steps, batch_size], int64: in each row first new pairs, then old ones.
    """
    ### BEGIN SOLUTION
    replayed = round(replay * batch_size)
    columns = []
    for pairs, count in ((new, batch_size - replayed), (old, replayed)):
        places = torch.arange(steps * count) % len(pairs)
        columns.append(pairs[places].view(steps, count))
    return torch.cat(columns, dim=1)
    ### END SOLUTION


checks.check_mixture(mixture)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Look at one list alone: over all steps it gives steps · count pairs in one long row, round and round. The remainder of
# a division by its length brings a counter back to the beginning. Cut that row into the steps, and put the two lists
# side by side. </details>

# %% [markdown]
# From here on we use the reference version: with each way of choosing from part 2 and half of each batch old; and with
# the random clicks and no old pairs, or three in four. *Pool* is the share of other pairs of the same kind that the
# reward model ranks as gold does; *SFT*, the same for pairs of SFT answers, is what it could do before.

# %%
# Pocket only
from rlhf_helpers.checks.lesson_06 import mixture

old = collect_preferences(
    roles.use("sft"), tokenizer, prompts[::4], Annotator(), seed=preset.seed
).select_columns(["prompt", "chosen", "rejected"])
old_pairs = reward.encode_pairs(tokenizer, old, 32, 64)

# %% [markdown]
# And pairs of SFT answers, to prompts that are not in the pool:

# %%
# Pocket only
at_home = [
    sample_responses(roles.use("sft"), tokenizer, prompts[240:], seed=s).texts for s in (7, 8)
]
at_home = [row for row in zip(prompts[240:], *at_home, strict=True) if row[1] and row[2]]


def agreement(roles, pairs):
    """Share of pairs, different in gold, that the reward model ranks as gold does."""
    gaps = torch.tensor([gold(p, b) - gold(p, a) for p, a, b in pairs])
    first, second = scores(roles, pairs)
    right = (second > first) == (gaps > 0)
    return right[gaps != 0].float().mean().item()


# %% [markdown]
# Clicks on some rows of the pool, mixed with old pairs:


# %%
# Pocket only
def trained_on(rows, replay, steps=30):
    """The shipped reward model, after clicks on these rows of the pool, and a replay."""
    clicks = Clicks([pool[i] for i in rows], repeats=0)
    clicks.click_through(simulated(gold))
    new_pairs = reward.encode_pairs(tokenizer, clicks.preferences(), 32, 64)
    both = new_pairs + old_pairs
    numbers = torch.arange(len(both))
    batches = mixture(numbers[: len(new_pairs)], numbers[len(new_pairs) :], steps, 16, replay)
    trained = Roles(load_base(preset))
    trained.load("reward", adapters["reward"], trainable=True)
    config = reward.RewardConfig(steps=steps, batch_size=16, learning_rate=3e-4, eval_every=steps)
    pairs = [both[i] for i in batches.flatten()]
    for _ in reward.train_reward_model(trained, "reward", tokenizer, pairs, new_pairs, config):
        pass
    reward.normalise(
        trained, "reward", torch.cat(reward.pair_scores(trained, "reward", tokenizer, old_pairs))
    )
    return trained


# %%
# Pocket only
runs = {f"{name}, half old": (rows, 0.5) for name, rows in chosen.items()}
runs["at random, none old"] = chosen["at random"], 0.0
runs["at random, 3 in 4 old"] = chosen["at random"], 0.75

# %% [markdown]
# What each of them gives:

# %%
# Pocket only
found = {"before": (agreement(roles, test), agreement(roles, at_home))}
for name, (rows, replay) in tqdm(runs.items(), leave=False):
    trained = trained_on(rows.tolist(), replay)
    found[name] = agreement(trained, test), agreement(trained, at_home)
for name, (there, here) in found.items():
    gain = (there - found["before"][0]) / 24
    print(f"{name:32} pool {there:.2f}, a click {gain:+.3f}; SFT {here:.2f}")

# %% [markdown]
# The claims below, asserted:

# %%
# Pocket only
there = {name: agreements[0] for name, agreements in found.items()}
here = {name: agreements[1] for name, agreements in found.items()}
assert there["at random, half old"] > there["before"] + 0.2
assert there["at random, none old"] > there["at random, half old"]
assert there["at random, half old"] > there["unsure, half old"]
assert min(here.values()) > here["before"] - 0.05

# %% [markdown]
# In this pool random clicks are worth more than clicks where the reward model is unsure. The reward model is *sure and
# wrong* here: in most pairs it would choose otherwise than gold. Where it is unsure it is wrong in half of them, and
# such a click pulls with one half only; and where it prefers the shorter answer it is right already. Uncertainty finds
# what a model knows that it does not know. A hole is what it does not know that it does not know: of these three ways,
# asking at random finds it best. (One pool, one budget, one seed: do not carry it over unmeasured.)
#
# The replay slows the cure. Of the three runs with random clicks, the one without old pairs mends most in thirty steps,
# and the one with three in four of them old mends least; it also sees each new pair least often. What the replay is
# for, keeping what was known, shows little here: on pairs of SFT answers all runs stay within a few points of before.
#
# **In words.** You have 1,000 new clicks, all by one person with a strong bias. What share of old pairs would you
# choose, and what would you look at?

# %% [markdown] tags=["solution"]
# A larger share of old pairs, and more people: the bias is in every click, so it will be learnt, and only other labels
# speak against it. Before and after, look at a probe for the bias you suspect (length, courtesies), and at held-out
# pairs labelled by *others*. Agreement with oneself shows a bias for one side, but no bias for a kind of answer: one
# can be wrong very consistently.
