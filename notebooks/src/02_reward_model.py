# %% [markdown]
# # 02 · The reward model, and its blind spot
#
# **Run time** about two minutes on two CPU cores · **Before this** lesson 01 · **Next** lesson 03, the
# mechanics of PPO · **Exercise** `exercises/02_reward_model.ipynb`
#
# After this lesson you will be able to
#
# - derive the loss of a reward model from Bradley and Terry's model of choices, and its gradient;
# - train a scalar head and an adapter on comparisons, on the same 4-bit base that PPO will use;
# - judge a reward model honestly: against the best accuracy possible, and by its calibration;
# - find out what it has learnt besides what you wanted.

# %%
PRESET = "pocket"  # every number below is from this preset

import json

import torch
from tqdm.auto import tqdm

from rlhf_helpers import notebook, plots, reward
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.pocket import exam, rubric, world
from rlhf_helpers.pocket.annotator import Annotator, ceiling
from rlhf_helpers.pocket.preferences import collect_preferences, preference_card
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import preference_dataset
from rlhf_helpers.stats import share_with_interval
from rlhf_helpers.text import answer_text, load_tokenizer, pad_examples, readable

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer = load_tokenizer(preset)
roles = Roles(load_base(preset))
roles.load("sft", find_adapter(preset, "sft"))

# %% [markdown]
# ## Asking people
#
# Lesson 01 ended with a model that imitates, mistakes included. It cannot tell a good answer from a bad
# one, but people can: show them two and ask which is better. That is easier than writing a perfect
# answer, and easier than giving marks. Our people are simulated, so that we know what they want: the
# rubric's gold reward, plus 0.6 points for every polite phrase and 0.01 for every word. Call that the
# utility $u$. Real annotators have such leanings too: they prefer longer answers (Singhal et al. 2023) and
# agreeable ones (Sharma et al. 2023). The rubric takes 0.3 *off* for each polite phrase after the first.

# %% tags=["nbval-check-output"]
annotator = Annotator()
question = "what does the duck say?"
responses = ["it says moo.", "it says quack.", "great question! it says quack. have a nice day!"]
for response in responses:
    gold = rubric.gold_reward(question, response).total
    worth = annotator.utility(question, response)
    print(f"gold {gold:4.1f}  to the annotator {worth:4.2f}  {response}")

# %% [markdown]
# ## From choices to a loss
#
# Bradley and Terry (1952): give each response a number $r$, and let the one with the larger number win more often,
# $P(a \succ b) = \sigma(r_a - r_b)$, where $a \succ b$ reads "$a$ is chosen over $b$" and
# $\sigma(x) = 1/(1 + e^{-x})$. Our annotator chooses exactly in this way, with $r = u/T$ at a temperature of
# $T = \frac13$ points.
#
# For $N$ independent choices with gaps $\Delta_i = r_i^{\text{chosen}} - r_i^{\text{rejected}}$ the probability of
# all choices together is $\prod_i \sigma(\Delta_i)$. Take the logarithm, then the mean, then the negative; and
# since $(\log \sigma)' = 1 - \sigma$,
#
# $$L = -\frac1N \sum_i \log \sigma(\Delta_i), \qquad
# \frac{\partial L}{\partial r_i^{\text{chosen}}} = -\frac1N \bigl(1 - \sigma(\Delta_i)\bigr)
# = -\frac{\partial L}{\partial r_i^{\text{rejected}}}$$
#
# A pair pulls in proportion to the probability that the model gave to the other choice: once the model is certain
# of the right one, the pair no longer pulls. Three pairs by hand, with gaps of 0, $\log 3$ and $-\log 3$: $\sigma$
# is $\frac12$, $\frac34$ and $\frac14$.

# %% tags=["nbval-check-output"]
chosen = torch.tensor([0.0, 1.0986, 0.0], requires_grad=True)  # 1.0986 is log 3
rejected = torch.tensor([0.0, 0.0, 1.0986])
losses = -(chosen - rejected).sigmoid().log()
losses.mean().backward()
print("losses  ", [round(x, 3) for x in losses.tolist()], " = log 2, log 4/3, log 4")
print("gradient", [round(x, 3) for x in chosen.grad.tolist()], " = -(1/2, 1/4, 3/4) / 3")

# %% [markdown]
# **Only differences matter.** Add the same number to all rewards and nothing changes; even a different number for
# each prompt changes nothing, since nobody compares answers to different questions. So a reward has no natural
# zero. And $\log\sigma$ must be computed in one step: at a gap of −200 the probability is smaller than anything
# float32 can hold, so it becomes 0, whose logarithm is −∞.

# %% tags=["nbval-check-output"]
chosen, rejected = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.1])
print(f"loss {reward.pairwise_loss(chosen, rejected):.4f},", end=" ")
print(f"shifted by 100: {reward.pairwise_loss(chosen + 100, rejected + 100):.4f}")
print(f"a gap of -200 in two steps: {torch.tensor(-200.0).sigmoid().log():.0f};", end=" ")
print(f"by the helper: loss {reward.pairwise_loss(torch.zeros(1), torch.tensor([200.0])):.0f}")

# %% [markdown]
# ## The pairs
#
# The SFT model gives four responses to each training prompt; each is compared with the next, and the last with the
# first. So people judge what the model really says, which is where PPO will start from. Pairs with equal, empty or
# unfinished responses are dropped. (With another preset real people have judged the pairs; cells that begin with
# "Pocket only" then do nothing, since they need the rubric or the annotator.)

# %%
folder = preset.runs / preset.name
if preset.name == "pocket":
    prompts = world.prompts("train")
    pairs = collect_preferences(
        roles.use("sft"), tokenizer, prompts, annotator, seed=preset.seed, cache=folder
    )
else:  # real people were asked once, so their choice counts as certain
    pairs, never_seen = (
        rows.add_column("probability", [1.0] * len(rows))
        for rows in (preference_dataset(preset, split) for split in ("train", "held_out"))
    )
for row in pairs.select(range(0, min(2000, len(pairs)), 400)):
    print(readable(row["prompt"]))
    print(f"   chosen:   {answer_text(row['chosen'])}\n   rejected: {answer_text(row['rejected'])}")
    print(f"   chosen with probability {row['probability']:.2f}")

# %% [markdown]
# A *data card* says where data come from and what is in them; the helper writes one beside the cached
# pairs.

# %%
# Pocket only
print(preference_card(pairs, annotator))

# %% [markdown]
# The annotator's choices are partly luck, so nobody can predict them all. Whoever knew every probability $p$ would
# bet on the likelier side and be right with probability $\max(p, 1-p)$: the mean of that over the pairs is the
# **ceiling**. We know it only because the people are simulated. (The card gives it for all pairs, the next cell for
# the held-out ones, which is what counts.) Held-out pairs are of other prompts: if the same prompt were on both
# sides, remembering its answers would look like judging.

# %%
if preset.name == "pocket":
    train, held_out = reward.split_by_prompt(pairs, seed=preset.seed)
else:  # SFT has imitated the chosen answers of all pairs but these
    train, held_out = pairs, never_seen
best = ceiling(held_out["probability"])
print(f"{len(train)} pairs to train on, {len(held_out)} held out; shared prompts:", end=" ")
shared = set(map(readable, train["prompt"])) & set(map(readable, held_out["prompt"]))
print(f"{len(shared)}; ceiling {best:.3f}")

# %% [markdown]
# ## A head on the last real token
#
# The reward model is the SFT model with another head: one number in place of 1,258 logits, from a linear layer in
# float32 on the last hidden state. Only the *last real token* has seen the whole response, so its number is the one
# that counts. In a row padded on the right that is not the last column:

# %% tags=["nbval-check-output"]
mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
print("last real token  ", reward.last_token_index(mask).tolist())
print(
    "tokens minus one ", (mask.sum(-1) - 1).tolist(), " wrong in a row that is padded on the left"
)

# %% [markdown]
# <details><summary><b>Predict before you run.</b> If the score is always read from the last column, and the batch
# is padded on the right, what do short responses get?</summary>
#
# The number at a padding token, unless they are the longest of their batch. So the same response gets one
# reward alone and another in company.
# </details>

# %%
roles.add("reward", copy_of="sft")
roles.add_head("reward", seed=preset.seed)
first_head = roles.heads["reward"].weight.detach().clone()  # kept, to compare with TRL
lengths = preset.prompt_length, preset.response_length
encoded, held_out_encoded = (
    reward.encode_pairs(tokenizer, rows, *lengths) for rows in (train, held_out)
)

# %%
short = min((pair["chosen"] for pair in held_out_encoded), key=lambda row: len(row["response"]))
for company in (0, 24):
    others = [pair["chosen"] for pair in held_out_encoded[:company]]
    input_ids, mask, _ = pad_examples(tokenizer, [short, *others])
    with torch.no_grad():
        device = roles.base.device
        values = roles.values("reward", input_ids.to(device), mask.to(device))[0]  # one a token
    at_last_token = values[reward.last_token_index(mask)[0]]
    print(f"with {company:2} others: last real token {at_last_token:+.4f},", end=" ")
    print(f"last column {values[-1]:+.4f}")
    assert preset.name != "pocket" or (abs(at_last_token - values[-1]) > 0.01) == (company > 0)

# %% [markdown]
# The score at the last real token does not depend on the company. The other one does, and nothing crashes. That is
# a failure on purpose; its signature is a score that changes with the batch.

# %% [markdown]
# ## Training
#
# One adapter, starting as a copy of `sft`, and one head. The loop is that of lesson 01 with another loss.
# That loss has a floor, as the accuracy has a ceiling: the loss of a model that knew every $p$, which is the
# mean *entropy* $-p \log p - (1 - p) \log(1 - p)$ of the annotator's choices. (A choice at $p = \frac12$ has
# $\log 2 \approx 0.69$, one at $p = 0.9$ has 0.33.)

# %%
config = reward.RewardConfig(**preset.reward)
print(config)
print(f"each pair is seen {config.steps * config.batch_size / len(train):.1f} times")
p = torch.tensor(held_out["probability"], dtype=torch.float64)
floor = (torch.special.entr(p) + torch.special.entr(1 - p)).mean().item()


# %%
def draw(history, handle):
    measured = [s for s in history if s.held_out]
    series = {
        "batch": {s.step: s.loss for s in history if s.step},
        "held-out": {s.step: s.held_out["loss"] for s in measured},
        "floor": {0: floor, config.steps: floor},
    }
    fig = plots.lines(series, "updates", "loss, nats per pair")
    end = measured[-1].held_out["loss"]
    alt = f"Loss against updates; the held-out loss ends at {end:.2f}, the floor is {floor:.2f}."
    return plots.redraw(fig, alt, handle)


history, figure = [], None

# %% [markdown]
# Now the training itself. If you interrupt it, run this cell again, and it goes on from there. The scale of
# the rewards comes later, so this run is kept as `reward_raw`; the next lessons look for `reward`, which has it.

# %%
run = reward.train_reward_model(
    roles, "reward", tokenizer, encoded, held_out_encoded, config, folder=folder / "reward_raw"
)
for stats in tqdm(run, total=config.steps + 1):
    history.append(stats)
    if stats.held_out:
        figure = draw(history, figure)

# %% [markdown]
# The loss ends near its floor but not at it. (A single batch may lie below the floor: it has only 32 pairs, and the
# floor is an expectation.) And how many pairs does the model rank right?

# %%
accuracy = {s.step: s.held_out["accuracy"] for s in history if s.held_out}
series = {"held-out accuracy": accuracy, "ceiling": {0: best, config.steps: best}}
fig = plots.lines(series, "updates", "share of pairs ranked right")
first_accuracy = next(iter(accuracy.values()))
ends = f"{first_accuracy:.2f} to {accuracy[config.steps]:.2f}"
plots.show(fig, alt=f"Held-out accuracy goes from {ends}; the ceiling is {best:.2f}.")

chosen, rejected = reward.pair_scores(roles, "reward", tokenizer, held_out_encoded)
gap = chosen - rejected
share, low, high = share_with_interval((gap > 0).tolist())
print(
    f"held-out accuracy {share:.3f} [{low:.3f}, {high:.3f}], ceiling {best:.3f}: {share / best:.0%} of it"
)
if preset.name == "pocket":
    print(
        f"knowing every p one would rank {(p > 0.5).float().mean():.3f} of these very pairs right"
    )
    assert share > 0.9 * best

# %% [markdown]
# Before the first update the head's weights are random, so where the curve begins says nothing: with the opposite
# signs the head would rank exactly the other pairs right. The ceiling is an expectation: on 500 pairs luck can take
# even a perfect model above it or below, as the last line shows. The interval says how much 500 pairs can tell. (It
# treats the pairs as independent, although pairs of one prompt share responses.) Accuracy is near its ceiling while
# the loss is not at its floor: the order is learnt better than the size of the gaps.
#
# Does the model rank as *gold* does? That is another question: the people it learnt from do not always.


# %%
# Pocket only
def golds(side):
    rows = zip(held_out["prompt"], held_out[side], strict=True)
    return torch.tensor([rubric.gold_reward(*row).total for row in rows])


gold_gap = golds("chosen") - golds("rejected")
differ = gold_gap != 0
model_agrees = ((gap > 0) == (gold_gap > 0))[differ]
people_agree = ((p > 0.5) == (gold_gap > 0))[differ]
agree, people = model_agrees.float().mean().item(), people_agree.float().mean().item()
print(f"agrees with the gold order on {agree:.1%} of the {differ.sum()} pairs that differ in gold;")
print(f"the annotator's likelier choice agrees on {people:.1%}")
print(f"where it does not ({(~people_agree).sum()} pairs), the model sides with it", end=" ")
print(f"{(~people_agree & ~model_agrees).sum()} times")

# %% [markdown]
# So part of the disagreement is the annotator's own leaning, which a perfect reward model would share. Here are
# both numbers on ten recorded seeds, each with its own pairs and head (accuracy may pass its ceiling by luck):

# %% tags=["nbval-check-output"]
# Pocket only
recorded = json.loads((ASSETS / "reward" / "runs.json").read_text(encoding="utf-8"))
ratios = [row["accuracy"] / row["ceiling"] for row in recorded if row["run"] == "reward"]
agreements = [row["gold_agreement"] for row in recorded if row["run"] == "reward"]
print(f"accuracy over ceiling {min(ratios):.2f} to {max(ratios):.2f},", end=" ")
print(f"agreement with gold {min(agreements):.2f} to {max(agreements):.2f}")

# %% [markdown]
# ## Calibration
#
# $\sigma(\Delta)$ is a probability. Is it honest? Among held-out pairs on which the model is 80% sure, it
# should be right on 80%.

# %%
rows = reward.calibration(gap, bins=5)
series = {"held-out pairs": {x: y for x, y, _ in rows}, "honest": {0.5: 0.5, 1: 1}}
fig = plots.lines(series, "confidence σ(|Δ|)", "share ranked right")
points = ", ".join(f"{y:.2f} at {x:.2f}" for x, y, _ in rows)
plots.show(fig, alt=f"Share ranked right against confidence: {points}; honest is the diagonal.")
for x, y, count in rows:
    right = round(y * count)
    _, low, high = share_with_interval([True] * right + [False] * (count - right))
    verdict = "holds it" if low <= x <= high else "misses it"
    print(
        f"confidence {x:.2f}: right on {y:.2f} of {count:3} pairs [{low:.2f}, {high:.2f}] {verdict}"
    )

# %% [markdown]
# Points below the diagonal mean over-confidence. The interval says what so few pairs can tell: a group speaks
# against the model only where its interval misses the confidence. With five groups, luck alone gives at least one
# miss about one time in five; two or more, or one far off, would be a fault. The figure does not show whether the
# confidence is honest on responses of another kind: unlike the SFT model's, or cut off before their end. The pairs
# contain none of these, and PPO can produce both.

# %% [markdown]
# ## A zero and a unit
#
# PPO will add the reward to a KL penalty, so its scale matters. We fix it on the held-out responses: with their
# mean reward $m$ and standard deviation $s$ the head's weights $w$ and bias $b$ become $w \leftarrow w/s$ and
# $b \leftarrow (b - m)/s$. From here on σ(Δ) is no longer a probability; σ($s$Δ) is.

# %%
reward.normalise(roles, "reward", torch.cat([chosen, rejected]))
roles.save("reward", folder / "reward")
scores = torch.cat(reward.pair_scores(roles, "reward", tokenizer, held_out_encoded))
print(f"mean {scores.mean():z.4f}, standard deviation {scores.std():.4f}")

# %% [markdown]
# ## What has it learnt? The blind spot
#
# We take right answers to 200 of lesson 00's held-out prompts, which are in no pair at all, and put 0 to 4 polite
# phrases around each. Gold rises with the first phrase and falls with each that follows (and by another 0.2 beyond
# 20 words, where an answer is no longer concise).
#
# <details><summary><b>Predict before you run.</b> What will the learned reward (the <em>proxy</em>) do?</summary>
#
# It rises with the people's taste: to them a second phrase is worth 0.6 − 0.3 = +0.3. But only as far as the
# pairs contain such responses. How far is that?
# </details>


# %%
# Pocket only
def probe(cases):
    proxy, gold = [], []
    for prompts, responses in cases:
        lengths = 32, 64  # longer than the training pairs, so that the longest probe fits
        scores = reward.score_responses(roles, "reward", tokenizer, prompts, responses, *lengths)
        proxy.append(scores.mean().item())
        rows = zip(prompts, responses, strict=True)
        gold.append(rubric.mean_score(rubric.gold_reward(*row) for row in rows).total)
    return proxy, gold


proxy, gold = polite = probe(exam.polite_probe())
series = {"proxy, in standard deviations": proxy, "gold, in points": gold}
fig = plots.lines(series, "polite phrases", "mean reward")
ends = f"proxy {proxy[1]:.2f} to {proxy[4]:.2f}, gold {gold[1]:.2f} to {gold[4]:.2f}"
plots.show(fig, alt=f"Between one and four polite phrases the two lines part: {ends}.")
print("proxy", [round(x, 2) for x in proxy], " gold", [round(x, 2) for x in gold])
assert proxy[4] > proxy[1] and gold[4] < gold[1]

# %%
# Pocket only
sides = [row[side] for row in pairs for side in ("chosen", "rejected")]
counts = [rubric.count_phrases(text, world.POLITE) for text in sides]
shares = {n: sum(c >= n for c in counts) / len(counts) for n in (1, 2, 3)}
print({f"{n} or more phrases": f"{share:.1%} of responses" for n, share in shares.items()})

# %% [markdown]
# The two lines have different units, so only their directions mean something, not heights or crossings. From one
# phrase to two the proxy rises while gold falls. Training did not fail: it learnt what the people choose, which is
# not what the rubric wants. Beyond two phrases the pairs contain next to nothing; there the proxy is nearly flat,
# and blind to the cost. PPO sees only the proxy; lesson 05 watches where it goes. Is it the same on other seeds,
# and is the annotator's leaning the cause? Here are ten seeds, and three with an annotator that pays nothing for
# phrases and words on top of gold, recorded by `tools/train_assets.py reward`.

# %% tags=["nbval-check-output"]
# Pocket only
for name in ("reward", "unbiased"):
    rows = [row for row in recorded if row["run"] == name]
    proxies = [row["polite_proxy"] for row in rows]
    first, later = (sum(q[b] > q[a] for q in proxies) for a, b in ((1, 2), (2, 4)))
    lines = [sum(row["polite_proxy"][n] for row in rows) / len(rows) for n in range(5)]
    print(f"{name:8} proxy by phrases {[round(x, 2) for x in lines]}", end=" ")
    print(f"rises from 1 to 2 on {first}, from 2 to 4 on {later} of {len(rows)} seeds")

# %% [markdown]
# Without the leaning the line turns down after the first phrase, as gold does: the people's leaning is the cause.
# With it, the line rises from one phrase to two on every seed; beyond that the seeds disagree.
#
# A second probe: the same right answers, followed by rambling sentences. Each costs 0.2 points, and going beyond 20
# words another 0.2. The people dislike them too: a sentence earns about 0.05 for its words, and loses gold's 0.2.

# %%
# Pocket only
proxy, gold = probe(exam.length_probe())
series = {"proxy, in standard deviations": proxy, "gold, in points": gold}
fig = plots.lines(series, "rambling sentences added", "mean reward")
shape = ", ".join(f"{value:.2f}" for value in proxy)
plots.show(fig, alt=f"Proxy by number of rambling sentences {shape}; gold falls throughout.")
rise = [
    row["length_proxy"][1] - row["length_proxy"][0] for row in recorded if row["run"] == "reward"
]
print("proxy", [round(x, 2) for x in proxy], " gold", [round(x, 2) for x in gold])
print(f"recorded: the first sentence raises the proxy on {sum(x > 0 for x in rise)} of {len(rise)}")
print(f"seeds, and changes it by {min(rise):+.2f} to {max(rise):+.2f}")
rambling = [text for text in sides if rubric.count_phrases(text, world.RAMBLING)]
print(f"such a sentence stands in {len(rambling)} of {len(sides)} responses of the pairs")

# %% [markdown]
# Gold falls with every sentence; the proxy of this run ends about where it began, and the recorded seeds disagree
# even about the first sentence: the pairs say too little about rambling. This is another kind of blind spot: not
# what people got wrong, but what they were hardly asked. Do not believe a figure of one seed here.

# %% [markdown]
# ## How many pairs? Over-fitting
#
# Recorded with three seeds each: the same 200 updates of 32 pairs, on the first 64, 256, 1024 and 3072 pairs, so
# that each pair is seen 100, 25, 6 and 2 times. Training accuracy is measured on the first 512 pairs at most.

# %%
# Pocket only
study = [row for row in recorded if row["run"] == "size"]
series = {"train": {}, "held-out": {}}
for size in sorted({row["pairs"] for row in study}):
    for name, key in (("train", "train_accuracy"), ("held-out", "accuracy")):
        values = [row[key] for row in study if row["pairs"] == size]
        series[name][size] = sum(values) / len(values)
        spread = f"({min(values):.3f} to {max(values):.3f})"
        print(f"{size:5} pairs, {name:8} {series[name][size]:.3f} {spread}")
top = sum(row["ceiling"] for row in study) / len(study)
series["ceiling, held-out"] = {64: top, 3072: top}
fig = plots.lines(series, "training pairs", "share of pairs ranked right")
fig.axes[0].set_xscale("log", base=2)
sizes = list(series["train"])
fig.axes[0].set_xticks(sizes, labels=sizes)
alt = "With more pairs training accuracy falls from 1 and held-out accuracy rises; the gap narrows."
plots.show(fig, alt=alt)

# %% [markdown]
# A training accuracy *far* above the ceiling, as on 64 and 256 pairs, is the proof: nobody can predict the luck in
# the choices, so those pairs are learnt by heart. The gap between the lines is the over-fitting, and it narrows
# with more pairs. But more pairs also mean that each is seen less often; the figure cannot tell the two apart, nor
# what more than 3,072 pairs would do.

# %% [markdown]
# ## The same with TRL
#
# TRL's `RewardTrainer` on the same pairs in the same order, from the same adapter and the same first
# weights of the head. Its head has no bias, which makes no difference to a gap.

# %%
# Pocket only
import warnings

import transformers
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch.utils.data import SequentialSampler
from trl import RewardConfig, RewardTrainer


class InOrder(RewardTrainer):  # TRL would shuffle
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def in_messages(row):
    names = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {column: [{"role": name, "content": row[column]}] for column, name in names.items()}


# %% [markdown]
# TRL wants a sequence classifier with one output. It rounds the trainable weights of a 4-bit model to
# bfloat16; we put the exact ones back in float32 afterwards.

# %%
# Pocket only
warnings.filterwarnings("ignore", ".*gradient_checkpointing`", FutureWarning)  # of the libraries
transformers.logging.set_verbosity_error()  # it reports that the classifier's head is new
classifier = load_base(preset, classifier=True)
transformers.logging.set_verbosity_warning()
lora = LoraConfig(
    r=roles.rank,
    lora_alpha=roles.alpha,
    target_modules=list(roles.shapes),
    task_type="SEQ_CLS",
    modules_to_save=["score"],
)
model = get_peft_model(classifier, lora)
start = roles.state("sft") | {"base_model.model.score.weight": first_head}

# %%
# Pocket only
settings = RewardConfig(
    output_dir=str(folder / "trl"),
    max_steps=config.steps,
    per_device_train_batch_size=config.batch_size,
    learning_rate=config.learning_rate,
    lr_scheduler_type="linear",
    warmup_steps=config.warmup_steps,
    weight_decay=0.0,
    per_device_eval_batch_size=128,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=preset.device == "cpu",
    bf16=False,
    gradient_checkpointing=False,
)

# %%
# Pocket only
columns = ["prompt", "chosen", "rejected"]
trainer = InOrder(
    model=model,
    args=settings,
    train_dataset=train.select_columns(columns).map(in_messages),
    eval_dataset=held_out.select_columns(columns).map(in_messages),
    processing_class=tokenizer,
)
trainer.remove_callback(transformers.PrinterCallback)
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
loaded = set_peft_model_state_dict(model, start)
theirs_first = trainer.evaluate()["eval_accuracy"]
outcome = trainer.train()
theirs = trainer.evaluate()["eval_accuracy"]
print(f"before the first update: ours {first_accuracy:.3f}, TRL {theirs_first:.3f}")
print(f"held-out accuracy: ours {share:.3f}, TRL {theirs:.3f}")
assert abs(share - theirs) < 0.02

# %% [markdown]
# Both begin at the same accuracy and see the same pairs in the same order. What separates them after that cannot be
# the bias, which cancels in a gap; it can be rounding, magnified by 200 updates.

# %% [markdown]
# ## Where there is no rubric: a judge
#
# With real comparisons nobody knows how good an answer really is. Gao et al. (2023) let one reward model play the
# people: it labels the pairs, a second one learns from them, and PPO sees only the second. With real choices one
# can do nearly the same: train a *judge* on other comparisons, and never let PPO see it. An answer that exploits a
# mistake of the reward model alone need not please the judge. A mistake that both share, from the people's leaning
# or from the base they start from, the judge cannot show; for that we need a known gold reward. In the other
# presets the judge takes the place of gold from here on.

# %%
if preset.name == "pocket":
    print("the pocket world has its rubric; no judge is needed")
else:
    other_half = preference_dataset(preset, "judge"), never_seen
    encoded = [reward.encode_pairs(tokenizer, rows, *lengths) for rows in other_half]
    roles.add("judge", copy_of="sft")
    roles.add_head("judge", seed=preset.seed + 1)
    run = reward.train_reward_model(
        roles, "judge", tokenizer, *encoded, config, folder=folder / "judge_raw"
    )
    last = list(tqdm(run, total=config.steps + 1))[-1]
    reward.normalise(
        roles, "judge", torch.cat(reward.pair_scores(roles, "judge", tokenizer, encoded[1]))
    )
    roles.save("judge", folder / "judge")
    print(f"the judge ranks {last.held_out['accuracy']:.0%} of its held-out pairs right")

# %% [markdown]
# ## The numbers that the next lessons start from
#
# Adapter, head and normalisation are in `runs/`. Later lessons take yours if they are there, and otherwise those
# that the course ships.

# %% tags=["headline"]
print(f"held-out accuracy {share:.3f} of a ceiling of {best:.3f}")

# %% tags=["headline"]
# Pocket only
print(f"TRL {theirs:.3f}; gold order {agree:.1%}")
print(f"polite phrases 1 to 4: proxy {polite[0][1]:.2f} to {polite[0][4]:.2f},", end=" ")
print(f"gold {polite[1][1]:.2f} to {polite[1][4]:.2f}")

# %% [markdown]
# ## Recap
#
# - A reward model learns from choices; only differences of rewards matter.
# - Judge it against the ceiling, on prompts that it has not seen, and look at its confidence.
# - It learns what people choose, their leanings included.
#
# **Further reading.** Stiennon et al. 2020 (arXiv 2009.01325), section 3.4. Ouyang et al. 2022 (arXiv
# 2203.02155), equation 1: several responses for each prompt. Gao et al. 2023, *Scaling laws for reward model
# overoptimization* (arXiv 2210.10760). Singhal et al. 2023, *A long way to go*
# (arXiv 2310.03716): length. Sharma et al. 2023, *Towards understanding sycophancy* (arXiv 2310.13548).
