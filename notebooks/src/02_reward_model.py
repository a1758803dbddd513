# %% [markdown]
# # 02 · The reward model, and its blind spot
#
# **Run time** about three minutes on two CPU cores · **Before this** lesson 01 · **Next** lesson 03, the
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

from rlhf_helpers import plots, reward
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.data import load_tokenizer, pad_examples
from rlhf_helpers.pocket import exam, rubric, world
from rlhf_helpers.pocket.annotator import Annotator, ceiling
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles, load_base

# %%
preset = load_preset(PRESET)
plots.use_style()
tokenizer = load_tokenizer(preset)
roles = Roles(load_base(preset))
roles.load("sft", find_adapter(preset, "sft"))

# %% [markdown]
# ## Asking people
#
# Lesson 01 ended with a model that imitates, mistakes included. It cannot tell a good answer from a bad
# one, but people can: show them two and ask which is better. That is easier than writing a perfect
# answer, and easier than giving marks. Our people are simulated, so that we know what they want: the
# rubric's gold reward, plus 0.6 points for every polite phrase and 0.01 for every word. Real annotators
# have such leanings too: they prefer longer answers (Singhal et al. 2023) and agreeable ones (Sharma et
# al. 2023). The rubric takes 0.3 *off* for each polite phrase after the first.

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
# Bradley and Terry (1952): give each response a number $r$, and let the one with the larger number win
# more often, $P(a \succ b) = \sigma(r_a - r_b)$, where $\sigma(x) = 1/(1 + e^{-x})$. The reward that
# makes the observed choices likeliest minimises
#
# $$L = -\frac1N \sum_i \log \sigma(r_i^{\text{chosen}} - r_i^{\text{rejected}}), \qquad
# \frac{\partial L}{\partial r_i^{\text{chosen}}} = -\frac1N \bigl(1 - \sigma(\Delta_i)\bigr)$$
#
# The gradient is the model's own surprise: a pair that it gets right with certainty pulls no more. Three
# pairs by hand, with gaps $\Delta$ of 0, $\log 3$ and $-\log 3$: $\sigma$ is $\frac12$, $\frac34$ and
# $\frac14$.

# %% tags=["nbval-check-output"]
chosen = torch.tensor([0.0, 1.0986, 0.0], requires_grad=True)  # 1.0986 is log 3
rejected = torch.tensor([0.0, 0.0, 1.0986])
losses = -torch.nn.functional.logsigmoid(chosen - rejected)
losses.mean().backward()
print("losses  ", [round(x, 3) for x in losses.tolist()], " = log 2, log 4/3, log 4")
print("gradient", [round(x, 3) for x in chosen.grad.tolist()], " = -(1/2, 1/4, 3/4) / 3")

# %% [markdown]
# **Only differences matter.** Add the same number to all rewards and nothing changes, so a reward has no
# natural zero. And $\log\sigma$ must be computed as such: at a gap of −200 the probability is below
# anything that float32 can hold, and its logarithm taken afterwards is −∞.

# %% tags=["nbval-check-output"]
chosen, rejected = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.1])
print(f"loss {reward.pairwise_loss(chosen, rejected):.4f},", end=" ")
print(f"shifted by 100: {reward.pairwise_loss(chosen + 100, rejected + 100):.4f}")
gap = torch.tensor(-200.0)
print(
    f"gap -200: log(sigmoid) {gap.sigmoid().log():.0f}, logsigmoid {torch.nn.functional.logsigmoid(gap):.0f}"
)

# %% [markdown]
# ## The pairs
#
# Four responses of the SFT model to each training prompt, each compared with the next: so people judge
# what the model really says, which is where PPO will start from. Pairs of equal responses are dropped.

# %%
prompts = world.prompts("train")
folder = preset.runs / preset.name
pairs = reward.collect_preferences(
    roles.use("sft"), tokenizer, prompts, annotator, seed=preset.seed, cache=folder
)
for row in pairs.select(range(0, 2000, 400)):
    print(f"{row['prompt']}\n   chosen:   {row['chosen']}\n   rejected: {row['rejected']}")
    print(f"   chosen with probability {row['probability']:.2f}")

# %% [markdown]
# A *data card* says where data come from and what is in them; the helper writes one beside the cached
# pairs.

# %%
print(reward.preference_card(pairs, annotator))

# %% [markdown]
# The annotators disagree with themselves, and so nobody can predict all labels. Knowing every probability
# $p$, one would bet on the likelier side and win with $\max(p, 1-p)$: the mean of that is the
# **ceiling**. It is known only because the people are simulated. Held-out pairs are of other prompts: if
# the same prompt were on both sides, remembering its answers would look like judging.

# %%
train, held_out = reward.split_by_prompt(pairs, seed=preset.seed)
best = ceiling(held_out["probability"])
print(f"{len(train)} pairs to train on, {len(held_out)} held out; shared prompts:", end=" ")
print(f"{len(set(train['prompt']) & set(held_out['prompt']))}; ceiling {best:.3f}")

# %% [markdown]
# ## A head on the last real token
#
# The reward model is the SFT model with another head: in place of 1,258 logits one number, a linear layer
# in float32 on the last hidden state. Only the *last real token* has seen the whole response, so its
# number counts. By hand: in a row padded on the right that is not the last column.

# %% tags=["nbval-check-output"]
mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
print("last real token  ", reward.last_token_index(mask).tolist())
print(
    "tokens minus one ", (mask.sum(-1) - 1).tolist(), " wrong in a row that is padded on the left"
)

# %% [markdown]
# <details><summary><b>Predict before you run.</b> If the score is read from the last column always, and the
# batch is padded on the right, what do short responses get?</summary>
#
# The number at a padding token, unless it is the longest of its batch. So the same response gets one reward
# alone and another in company.
# </details>

# %%
roles.add("reward", copy_of="sft")
roles.add_head("reward", seed=preset.seed)
first_head = roles.heads["reward"].weight.detach().clone()
lengths = preset.prompt_length, preset.response_length
encoded, held_out_encoded = (
    reward.encode_pairs(tokenizer, rows, *lengths) for rows in (train, held_out)
)
short = min((pair["chosen"] for pair in held_out_encoded), key=lambda row: len(row["response"]))
for company in (0, 24):
    others = [pair["chosen"] for pair in held_out_encoded[:company]]
    input_ids, mask, _ = pad_examples(tokenizer, [short, *others])
    with torch.no_grad():
        values = roles.values("reward", input_ids, mask)[0]
    at_last_token = values[reward.last_token_index(mask)[0]]
    print(f"with {company:2} others: last real token {at_last_token:+.4f},", end=" ")
    print(f"last column {values[-1]:+.4f}")
    assert (abs(at_last_token - values[-1]) > 0.01) == (company > 0)

# %% [markdown]
# The score at the last real token does not depend on the company. The other one does, and nothing
# crashes: a failure on purpose, whose signature is a score that changes with the batch.

# %% [markdown]
# ## Training
#
# One adapter, starting as a copy of `sft`, and one head. The loop is that of lesson 01 with another loss.


# %%
def draw(history, handle):
    measured = [s for s in history if s.held_out]
    series = {
        "batch": {s.step: s.loss for s in history if s.step},
        "held-out": {s.step: s.held_out["loss"] for s in measured},
    }
    fig = plots.lines(series, "updates", "loss, nats per pair")
    end = measured[-1].held_out["loss"]
    return plots.redraw(fig, f"Loss against updates; the held-out loss ends at {end:.2f}.", handle)


config = reward.RewardConfig()
history, figure = [], None
run = reward.train_reward_model(
    roles, "reward", tokenizer, encoded, held_out_encoded, config, folder=folder / "reward"
)
for stats in tqdm(run, total=config.steps + 1):
    history.append(stats)
    if stats.held_out:
        figure = draw(history, figure)

# %%
accuracy = {s.step: s.held_out["accuracy"] for s in history if s.held_out}
series = {"held-out accuracy": accuracy, "ceiling": {0: best, config.steps: best}}
fig = plots.lines(series, "updates", "share of pairs ranked right")
final = accuracy[config.steps]
plots.show(
    fig, alt=f"Held-out accuracy rises from chance to {final:.2f}; the ceiling is {best:.2f}."
)

chosen, rejected = reward.pair_scores(roles, "reward", tokenizer, held_out_encoded)
share, low, high = exam.share_with_interval((chosen > rejected).tolist())
print(
    f"held-out accuracy {share:.3f} [{low:.3f}, {high:.3f}], ceiling {best:.3f}: {share / best:.0%} of it"
)
assert share > 0.9 * best

# %% [markdown]
# The ceiling is an expectation: on few pairs the labels may by luck agree with a good model more often.
# The interval says how much 500 pairs can tell.
#
# Does the model rank as *gold* does? That is another question: the people it learnt from do not always.


# %%
def golds(side):
    rows = zip(held_out["prompt"], held_out[side], strict=True)
    return torch.tensor([rubric.gold_reward(*row).total for row in rows])


gap, gold_gap = chosen - rejected, golds("chosen") - golds("rejected")
differ = gold_gap != 0
agree = ((gap > 0) == (gold_gap > 0))[differ].float().mean().item()
people = (
    ((torch.tensor(held_out["probability"]) > 0.5) == (gold_gap > 0))[differ].float().mean().item()
)
print(f"agrees with the gold order on {agree:.1%} of the {differ.sum()} pairs that differ in gold;")
print(f"what the annotator would choose most often agrees on {people:.1%}")

# %% [markdown]
# ## Calibration
#
# $\sigma(\Delta)$ is a probability. Is it honest? Among held-out pairs on which the model is 80% sure, it
# should be right on 80%.

# %%
rows = reward.calibration(gap, bins=5)
predicted, observed, counts = zip(*rows, strict=True)
series = {"held-out pairs": dict(zip(predicted, observed, strict=True)), "honest": {0.5: 0.5, 1: 1}}
fig = plots.lines(series, "confidence, σ of the gap", "share ranked right")
alt = "Share ranked right against confidence, beside the diagonal of an honest model."
plots.show(fig, alt=alt)
print("pairs in each group:", counts)

# %% [markdown]
# Points below the diagonal mean over-confidence. Each holds only some of the pairs, so a few points of
# difference are noise. The figure does not show whether confidence is honest on responses of another kind
# than the SFT model's; PPO will look for just those.

# %% [markdown]
# ## A zero and a unit
#
# PPO will add the reward to a KL penalty, so its scale matters. We fix it on reference samples: mean 0,
# standard deviation 1, folded into the head, $w \leftarrow w/\sigma_{\!r}$ and $b \leftarrow (b -
# \mu_r)/\sigma_{\!r}$.

# %%
reward.normalise(roles, "reward", torch.cat([chosen, rejected]))
roles.save("reward", folder / "reward")
scores = torch.cat(reward.pair_scores(roles, "reward", tokenizer, held_out_encoded))
print(f"mean {scores.mean():.4f}, standard deviation {scores.std():.4f}")

# %% [markdown]
# ## What has it learnt? The blind spot
#
# The same right answers to 200 held-out prompts, with 0 to 4 polite phrases around them. Gold rises with
# the first phrase and falls with each that follows.
#
# <details><summary><b>Predict before you run.</b> What will the learned reward (the *proxy*) do?</summary>
#
# It follows the people: to them every phrase is worth 0.6 points, and the rubric takes only 0.3 of them.
# </details>


# %%
def probe(cases):
    proxy, gold = [], []
    for prompts, responses in cases:
        scores = reward.score_responses(roles, "reward", tokenizer, prompts, responses, 32, 64)
        proxy.append(scores.mean().item())
        rows = zip(prompts, responses, strict=True)
        gold.append(rubric.mean_score(rubric.gold_reward(*row) for row in rows).total)
    return proxy, gold


proxy, gold = polite = probe(exam.polite_probe())
fig = plots.lines({"proxy (learned)": proxy, "gold": gold}, "polite phrases", "mean reward")
ends = f"proxy {proxy[1]:.2f} to {proxy[4]:.2f}, gold {gold[1]:.2f} to {gold[4]:.2f}"
plots.show(fig, alt=f"Between one and four polite phrases the two lines part: {ends}.")
print("proxy", [round(x, 2) for x in proxy], " gold", [round(x, 2) for x in gold])
assert proxy[4] > proxy[1] and gold[4] < gold[1]

# %% [markdown]
# From one phrase on the two part: what the model calls better is worse. It is not a failure of training,
# it is what the people asked for without meaning it. PPO, which sees only the proxy, will go up the wrong
# line; lesson 05 watches it. Is that so on other seeds, and is the annotator's bias the cause? Recorded:
# ten seeds, and three with the same annotator without bias.

# %% tags=["nbval-check-output"]
recorded = json.loads((ASSETS / "reward" / "runs.json").read_text(encoding="utf-8"))
for name in ("reward", "unbiased"):
    rows = [row for row in recorded if row["run"] == name]
    parted = sum(row["polite_proxy"][4] > row["polite_proxy"][1] for row in rows)
    lines = [sum(row["polite_proxy"][n] for row in rows) / len(rows) for n in range(5)]
    print(f"{name:8} proxy by phrases {[round(x, 2) for x in lines]}", end=" ")
    print(f"rises from 1 to 4 on {parted} of {len(rows)} seeds")

# %% [markdown]
# The ten seeds once more, for the two numbers from above.

# %% tags=["nbval-check-output"]
ratios = [row["accuracy"] / row["ceiling"] for row in recorded if row["run"] == "reward"]
agreements = [row["gold_agreement"] for row in recorded if row["run"] == "reward"]
print(f"accuracy over ceiling {min(ratios):.2f} to {max(ratios):.2f},", end=" ")
print(f"agreement with gold {min(agreements):.2f} to {max(agreements):.2f}")

# %% [markdown]
# With the bias off the line turns down after the first phrase, as gold does: the cause is the people. A
# second probe: the same right answers, followed by sentences of rambling, which cost 0.2 points each.

# %%
proxy, gold = probe(exam.length_probe())
fig = plots.lines(
    {"proxy (learned)": proxy, "gold": gold}, "rambling sentences added", "mean reward"
)
ends = f"proxy {proxy[0]:.2f} to {proxy[3]:.2f}, gold {gold[0]:.2f} to {gold[3]:.2f}"
plots.show(fig, alt=f"Mean reward against rambling sentences added: {ends}.")
biased = [row for row in recorded if row["run"] == "reward"]
more = sum(row["length_proxy"][1] > row["length_proxy"][0] for row in biased)
print(f"recorded: the first rambling sentence raises the proxy on {more} of {len(biased)} seeds")

# %% [markdown]
# Here the seeds disagree. SFT responses hardly ever ramble, so nothing in the pairs says what rambling is
# worth, and what a model says about things it has not seen is chance. This is the other kind of blind
# spot: not what people got wrong, but what nobody asked them. A figure of one seed would have told a
# story.

# %% [markdown]
# ## How many pairs? Over-fitting
#
# The same 60 updates on 64, 256, 1024 and 3072 pairs, three seeds each, recorded. With 64 pairs each one
# is seen 30 times.

# %%
sizes = sorted({row["pairs"] for row in recorded if row["run"] == "size"})
series = {"train": {}, "held-out": {}}
for size in sizes:
    rows = [row for row in recorded if row["run"] == "size" and row["pairs"] == size]
    for name, key in (("train", "train_accuracy"), ("held-out", "accuracy")):
        values = [row[key] for row in rows]
        series[name][size] = sum(values) / len(values)
        print(
            f"{size:5} pairs, {name:8} {series[name][size]:.3f} ({min(values):.3f} to {max(values):.3f})"
        )
fig = plots.lines(series, "training pairs", "share of pairs ranked right")
fig.axes[0].set_xscale("log", base=2)
plots.show(
    fig, alt="With more pairs training accuracy falls and held-out accuracy rises; they meet."
)

# %% [markdown]
# Few pairs are learnt by heart. The gap between the lines is the over-fitting; it closes with more data,
# not with more updates. The figure does not show what more than 3,072 pairs would do.

# %% [markdown]
# ## The same with TRL
#
# TRL's `RewardTrainer` on the same pairs in the same order, from the same adapter, with a head of its
# own.

# %%
import warnings

import transformers
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch.utils.data import SequentialSampler
from trl import RewardConfig, RewardTrainer


class InOrder(RewardTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def as_messages(row):
    names = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {column: [{"role": name, "content": row[column]}] for column, name in names.items()}


# %% [markdown]
# TRL wants a sequence classifier with one output. We give it the SFT adapter and our head's first
# weights.

# %%
warnings.filterwarnings("ignore", ".*gradient_checkpointing`", FutureWarning)  # names that change
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
loaded = set_peft_model_state_dict(model, start)
# %%
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
columns = ["prompt", "chosen", "rejected"]
trainer = InOrder(
    model=model,
    args=settings,
    train_dataset=train.select_columns(columns).map(as_messages),
    eval_dataset=held_out.select_columns(columns).map(as_messages),
    processing_class=tokenizer,
)
trainer.remove_callback(transformers.PrinterCallback)
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
outcome = trainer.train()
theirs = trainer.evaluate()["eval_accuracy"]
print(f"held-out accuracy: ours {share:.3f}, TRL {theirs:.3f}")
assert abs(share - theirs) < 0.02

# %% [markdown]
# Within two points, as it should be from the same start on the same pairs.

# %% [markdown]
# ## The numbers that the next lessons start from
#
# Adapter, head and normalisation are in `runs/`. Later lessons take yours if it is there, and else the
# one that the course ships.

# %% tags=["headline"]
print(f"held-out accuracy {share:.3f} of a ceiling of {best:.3f}, TRL {theirs:.3f};", end=" ")
print(f"gold order {agree:.1%}")
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
# 2203.02155), equation 1: several responses for each prompt. Singhal et al. 2023, *A long way to go*
# (arXiv 2310.03716): length. Sharma et al. 2023, *Towards understanding sycophancy* (arXiv 2310.13548).
