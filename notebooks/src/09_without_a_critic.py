# %% [markdown]
# # 09 · Without a critic: RLOO and GRPO, and TRL's own trainers
#
# **Run time** about a minute on two CPU cores · **Before this** lessons 03, 04 and 05 ·
# **Exercise** `exercises/09_without_a_critic.ipynb`
#
# After this lesson you will be able to
#
# - replace the critic by other answers to the same prompt, and say why that is unbiased and GRPO's division is not;
# - read Dr. GRPO, DAPO, GSPO and BNPO as settings of one loss;
# - train with TRL's GRPOTrainer and RLOOTrainer against a reward model of your own, from an SFT adapter, and take that reward
#   model along;
# - say what a reward that is a program improves, and what it leaves as it was.

# %%
PRESET = "pocket"  # every number below is from this preset

import csv
import itertools
import statistics
from collections import defaultdict
from dataclasses import replace

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig

from rlhf_helpers import losses, memory, notebook, plots, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import load_gold, prompt_dataset
from rlhf_helpers.text import load_tokenizer

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer, gold = load_tokenizer(preset), load_gold(preset)
prompts = list(prompt_dataset(preset)["prompt"])
roles = Roles(load_base(preset))
roles.load("reference", find_adapter(preset, "sft"))
roles.load("reward", find_adapter(preset, "reward"))
roles.add("policy", copy_of="reference")
print("roles:", ", ".join(roles.names))

# %% [markdown]
# Three roles; the critic of lesson 04 is missing.
#
# ## Other answers are the baseline
#
# A critic predicts the reward that is still to come. Its prediction is taken off, so that only what was better or worse
# than expected counts. This can be done without a network: sample several answers to one prompt, and take off the mean
# score of the *others*. With a group of $G$ answers that score $r_1 \dots r_G$,
#
# $$A_i = r_i - \frac{1}{G-1} \sum_{j \ne i} r_j.$$
#
# That is **RLOO**, REINFORCE with leave-one-out (Kool et al. 2019, Ahmadian et al. 2024). Every token of answer $i$ gets
# the same $A_i$.

# %% tags=["nbval-check-output"]
scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0, 5.0])  # three answers to each of two prompts
for kind in losses.GROUPED:
    print(f"{kind:8}", losses.group_advantages(scores, 3, kind).tolist())

# %% [markdown]
# By hand for the first answer: the others score 1 and 2, so it gets 3 − 1.5. `centred` takes off the mean of the whole
# group, the answer's own score included; the result is smaller by the factor $(G-1)/G$, in the same direction. `grpo`
# divides that by the group's standard deviation (here 1), plus $10^{-4}$, so that a group of equal scores gives 0 and
# not 0/0. The second prompt teaches nothing: all its answers are equally good.
#
# ## Why leaving one out is unbiased
#
# What is taken off $r_i$ does not depend on answer $i$, and $\mathbb{E}[b\,\nabla\log\pi(y_i)] = b\,\nabla\sum_y \pi(y)
# = 0$ for any such $b$. So the expected gradient is that of the expected score, whatever the size of the group. With
# only three possible answers you can check this by listing every group.

# %% tags=["nbval-check-output"]
logits = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)
r = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)


def slope(of):
    z = logits.clone().requires_grad_()
    return torch.autograd.grad(of(z.log_softmax(-1)), z)[0]


def expected(kind, G=3):
    """The gradient that a method takes, averaged over all groups with their probabilities."""
    total, p = torch.zeros(3, dtype=torch.float64), logits.softmax(-1)
    for group in itertools.product(range(3), repeat=G):
        drawn = list(group)
        A = losses.group_advantages(r[drawn], G, kind)
        total += p[drawn].prod() * slope(lambda logp, A=A, i=drawn: (A * logp[i]).mean())
    return total


truth = slope(lambda logp: (logp.exp() * r).sum())
for kind in losses.GROUPED:
    found = expected(kind)
    print(f"{kind:8}", [round(x, 4) for x in (found / truth).tolist()], "of the true gradient")
assert torch.allclose(expected("rloo"), truth)

# %% [markdown]
# Leave-one-out has the true gradient, and `centred` two thirds of it in every coordinate, which a larger learning rate
# makes up for. GRPO's factor differs from coordinate to coordinate, so it points elsewhere.
#
# ## What the division does
#
# **GRPO** (Shao et al. 2024) divides by the spread of each group. Say that an answer scores 1 if it is right and 0 if
# it is wrong, and that $k$ of eight are right. Then the spread is about $\sqrt{p(1-p)}$ with $p = k/8$. Below, how hard
# one group pulls: the sum of $\lvert A_i \rvert$.

# %% tags=["nbval-check-output"]
for k in (0, 1, 2, 4, 7, 8):
    group = torch.tensor([1.0] * k + [0.0] * (8 - k))
    pull = {kind: losses.group_advantages(group, 8, kind).abs().sum() for kind in losses.GROUPED}
    print(f"{k} of 8 right:", ", ".join(f"{kind} {x:.2f}" for kind, x in pull.items()))

# %% [markdown]
# Without the division, a prompt that is answered right one time in eight pulls less than half as hard as one that is
# answered right half of the time; with it, two thirds as hard. So GRPO gives hard and easy prompts more weight. It also
# makes the scale of the scores irrelevant. (With scores other than 0 and 1 it amplifies noise as well: a group whose
# scores hardly differ pulls about as hard as any other.) Groups that are all right or all wrong do not pull at all,
# under any of the three. They cost as much to sample as others, so count them:

# %%
asked = [prompt for prompt in prompts[::8][:24] for _ in range(4)]
settings = {"advantages": "rloo", "ratio_of": "response", "mean_over": "responses"}
config = ppo.PPOConfig(**settings | {"group_size": 4, "seed": preset.seed} | preset.ppo)
seen = ppo.collect_experience(roles, tokenizer, asked, config, beta=0.1, seed=0)
flat = losses.equal_groups(seen.scores, 4).float().mean()
print(f"reward model: {flat:.0%} of {len(asked) // 4} groups are without variance")

# %%
# Pocket only
from rlhf_helpers.pocket import rubric


def verifier(prompts, rollout):
    """1 for an answer that says something right and nothing wrong, 0 for any other."""
    rows = zip(prompts, rollout.texts, rollout.finished.tolist(), strict=True)
    return torch.tensor([float(rubric.gold_reward(*row).correct > 0) for row in rows])


right = verifier(asked, seen.rollout)
print(f"verifier: {losses.equal_groups(right, 4).float().mean():.0%},", end=" ")
print(f"with {right.mean():.0%} of the answers right")

# %% [markdown]
# A reward model hardly ever gives a whole group the same score, unless the answers are the same. A program often does.
# Prompts of middling difficulty can help, a reward with more steps, or larger groups. None of them does where the policy
# always does what is paid for, or never.
#
# ## Long answers and short ones
#
# A loss is one number, averaged over many tokens in answers of unequal length, and there are three ways to average.
# Take an answer of one token with a loss of 4, and one of three tokens with a loss of 1 each:

# %% tags=["nbval-check-output"]
x = torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
for over, length in (("tokens", None), ("responses", None), ("length", 5)):
    value = losses.average(x, mask, over, length)
    (weight,) = torch.autograd.grad(value, x)
    weights = [round(w, 3) for w in weight[mask == 1].tolist()]
    print(f"mean over {over:9} {value:.2f}, weight of each token {weights}")

# %% [markdown]
# In the mean over *tokens* (lesson 03, DAPO) all tokens weigh the same, but how much depends on the other answers in
# the batch. In the mean over *responses* (GRPO) a token of a long answer weighs less, so a long wrong answer is
# punished less per token than a short one. With a constant *length* (Dr. GRPO) it is a sum, up to a constant factor.
# With a ratio for each token, only this sum has the gradient of the expected score (the package's tests check that,
# again by listing every group).
#
# ## One loss, many names
#
# The rest is the clipped loss of lesson 03, with two more switches: whether a ratio belongs to a token or to the whole
# answer, and whether the upper clip is the lower one. The methods that have names of their own in the literature are
# the rows of this table. `PPOConfig` takes the settings; each row is tested against TRL's own code, loss and gradient,
# to $10^{-6}$.
#
# | name | `advantages` | `mean_over` | `ratio_of` | clips | in TRL 1.16 |
# |---|---|---|---|---|---|
# | RLOO (Ahmadian et al. 2024) | `rloo` | `responses` | `response`: $\prod_t \rho_t$ | one | `RLOOTrainer` |
# | GRPO (Shao et al. 2024, eq. 3) | `grpo` | `responses` | `token` | one | `loss_type="grpo"` |
# | BNPO (TRL's name for the mean of lesson 03) | `grpo` | `tokens` | `token` | one | `loss_type="bnpo"` |
# | Dr. GRPO (Liu et al. 2025, section 3.2) | `centred` | `length` | `token` | one | `loss_type="dr_grpo"`, `scale_rewards="none"` |
# | DAPO (Yu et al. 2025, eq. 8) | `grpo` | `tokens` of the whole batch | `token` | two, 0.2 and 0.28 | `loss_type="dapo"`, `epsilon_high=0.28` |
# | GSPO (Zheng et al. 2025, eq. 5 and 7) | `grpo` | `responses` | `mean`: $(\prod_t \rho_t)^{1/\lvert y \rvert}$ | one, far smaller | `importance_sampling_level="sequence"`, `loss_type="grpo"` |
#
# (DAPO also samples until no group is without variance, which is not part of the loss. `tokens` averages over a
# minibatch; for a mean over the whole batch, use `length` with the batch's mean length.)
#
# If the action is the whole answer, its ratio should be that of the whole answer; then the mean over responses has the
# gradient of the expected score as well. But this ratio is a product of many numbers, and the clip cuts off all tokens
# of the answer at once:

# %% tags=["nbval-check-output"]
old = torch.tensor([[0.2, 0.3, 0.5, 0.4]]).log()
new = old + torch.tensor([[1.3, 1.1, 0.9, 1.2]]).log()
one = torch.ones(1, 4)
for ratio_of in losses.RATIOS:
    loss, stats = losses.policy_loss(new, old, one, one, ratio_of=ratio_of)
    print(f"{ratio_of:9} ratio {stats['ratio']:.3f}, loss {loss:.3f},", end=" ")
    print(f"{stats['clip_fraction']:.0%} of the tokens clipped")

# %% [markdown]
# ## A loss of 0 that is no fault
#
# <details><summary><b>Predict before you run.</b> Before the first step, with GRPO's advantages and mean: what is the loss,
# and what is its gradient?</summary>
#
# The ratio is 1, so an answer contributes its advantage, and the advantages of a group sum to 0. So the loss is 0. Its
# gradient is not: each answer contributes the gradient of its own log-probability, times its own advantage.
# </details>

# %%
changes = {"advantages": "grpo", "ratio_of": "token", "minibatch_size": config.batch_size}
first = replace(config, **changes)
seen = ppo.collect_experience(roles, tokenizer, asked[: config.batch_size], first, 0.1, seed=0)
whole = slice(0, config.batch_size)
loss, stats = ppo.policy_objective(roles, seen, whole, first, beta=0.1)
loss.backward()
norm = sum(p.grad.square().sum() for p in roles.parameters("policy").values()) ** 0.5
print(f"ratio {stats['ratio']:.3f}, loss {loss:z.6f}, length of the gradient {norm:.3f}")
roles.model.zero_grad()
assert abs(loss) < 1e-4 < norm

# %% [markdown]
# Users report "loss 0" as a bug again and again. It tells you nothing; watch the reward, the KL, and the share of
# groups without variance.
#
# ## KL in the reward, or in the loss
#
# RLOO takes β times the KL of the whole answer off its score, before the group is compared (`kl_in="reward"`, k1). GRPO
# adds β times the mean of k3 to the loss (`kl_in="loss"`), averaged as the loss is. In lesson 05 k3 was unbiased *as a
# number*, but as a loss it had the gradient of the other direction's KL. To see why, let $r = \log\pi_{\text{ref}} -
# \log\pi$: at a sampled token the gradient of $k_3$ is $(1 - e^{r})\,\nabla\log\pi$. Averaged over the policy's
# samples:

# %% tags=["nbval-check-output"]
ref = torch.tensor([0.0, 0.8, -0.4], dtype=torch.float64).log_softmax(-1)
p = logits.softmax(-1)


def k3(logp):
    return (ref - logp).exp() - 1 - (ref - logp)


true_slope = slope(lambda logp: (logp.exp() * (logp - ref)).sum())
other_way = slope(lambda logp: (ref.exp() * (ref - logp)).sum())
in_loss = slope(lambda logp: (p * k3(logp)).sum())  # p: the samples are data
with_ratio = slope(lambda logp: (p * (logp - p.log()).exp() * k3(logp)).sum())
shown = {"KL(π‖ref)": true_slope, "KL(ref‖π)": other_way}
shown |= {"k3 in the loss": in_loss, "k3 times the ratio": with_ratio}
for name, value in shown.items():
    print(f"{name:20}", [round(v, 4) for v in value.tolist()])
assert torch.allclose(in_loss, other_way) and torch.allclose(with_ratio, true_slope)

# %% [markdown]
# k3 in the loss has the gradient of the KL *in the other direction*. Near the reference the two agree; far from it they
# do not. Multiplied by the ratio (TRL's `use_bias_correction_kl`, on by default in 1.16) it has the right one.
#
# ## Three roles: what is saved

# %%
known = {"this base": roles.base.config, "Llama-2-7B": LlamaConfig()}  # its defaults are 7B's
for name, model in known.items():
    sizes = memory.model_sizes(model)
    for critic in (True, False):
        rows = memory.memory_table(sizes, critic=critic)
        ways = ", ".join(
            f"{way} {sum(x.total for x in part) / 1e9:.3f}" for way, part in rows.items()
        )
        print(f"{name}, GB: {ways}")

# %% [markdown]
# Of four full models the critic takes more than two fifths of the memory, since it is trained. With adapters on one NF4
# base of 7B it takes about an eighth. Groups cost variety instead: the 64 answers of an update go to 16 prompts, not to
# 64.
#
# ## A short run
#
# The same `train_ppo` as in lesson 04, with the settings of the table's row RLOO, and no `value` role.

# %%
short = replace(config, updates=8)
history = []
for stats in tqdm(ppo.train_ppo(roles, tokenizer, prompts, short), total=short.updates):
    marks = gold(stats.experience.prompts, stats.experience.rollout).mean().item()
    history.append((stats, marks))
series = {"proxy": [s.score for s, _ in history], gold.name: [g for _, g in history]}
updates = [s.update for s, _ in history]
curves = {name: dict(zip(updates, values, strict=True)) for name, values in series.items()}
fig = plots.lines(curves, "update", "mean of the sampled answers")
ends = ", ".join(f"{name} from {v[0]:.2f} to {v[-1]:.2f}" for name, v in series.items())
plots.show(fig, f"Proxy and {gold.name} over {short.updates} updates of RLOO: {ends}.")

# %%
for stats, marks in history[:: short.updates - 1]:
    print(f"update {stats.update}: proxy {stats.score:.2f}, {gold.name} {marks:.2f},", end=" ")
    print(f"KL {stats.kl:.2f}, first ratio {stats.first_ratio:.3f}, finished {stats.finished:.0%}")
assert history[0][0].kl == 0 and history[0][0].first_ratio == 1
assert preset.name != "pocket" or history[-1][0].score > history[0][0].score

# %% [markdown]
# Each update draws 16 other prompts, so the curves are rough.
#
# ## In production: TRL's trainers
#
# TRL has no PPO any more; GRPOTrainer and RLOOTrainer are what it maintains. They take a reward *function*. Ours scores
# token ids, on a base of its own. Why not hand over the reward model itself? TRL would give it text without special
# tokens, so that it could not see whether EOS came. And the policy has to start from the **SFT adapter**, not from a
# fresh one: otherwise TRL's reference is the bare base.

# %%
import warnings

from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from rlhf_helpers.trl_rewards import keep_float32, reward_function

warnings.filterwarnings("ignore", ".*gradient_checkpointing`", FutureWarning)  # of the libraries

# %% [markdown]
# First, a policy that you should not give it: the bare base.

# %%
judge = Roles(load_base(preset))
judge.load("reward", find_adapter(preset, "reward"))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    reward_function(judge, tokenizer, load_base(preset))  # broken on purpose
print(caught[-1].message)

# %% [markdown]
# Now the SFT adapter. The function scores a response with its EOS, and the same one cut off before it:

# %%
sft = find_adapter(preset, "sft")
policy = PeftModel.from_pretrained(load_base(preset), str(sft), is_trainable=True)
score = reward_function(judge, tokenizer, policy)
words = tokenizer("the duck says quack.")["input_ids"]
both = {"with EOS": [*words, tokenizer.eos_token_id], "without": words}
for name, ids in both.items():
    print(f"{name:9} {score(prompts=['what does the duck say?'], completion_ids=[ids])[0]:.2f}")

# %% [markdown]
# Without EOS the reward model reads its number at a token that ended no response in training, so the number means
# nothing; here it is the higher one, even though `reward_function` takes a point off for the missing EOS. The text of
# the two is the same.
#
# These settings make TRL's run like ours; the comments name the defaults that would surprise you. For a GPU and a real
# model, change the lines under *machine*.

# %%
args = GRPOConfig(
    output_dir=str(preset.runs / preset.name / "trl"),
    # machine
    use_cpu=preset.device == "cpu",
    bf16=False,  # default: on; CPUs and T4 compute in other types
    gradient_checkpointing=False,  # default: on, which costs a second forward pass
    # as our loop
    num_generations=4,  # default: 8
    per_device_train_batch_size=config.minibatch_size,
    steps_per_generation=config.batch_size // config.minibatch_size,
    num_iterations=config.epochs,  # default: 1, each sample used once
    max_steps=8,  # optimizer steps: two updates of ours
    learning_rate=config.learning_rate,  # default: 1e-6, for all weights of a large model
    lr_scheduler_type="constant",
    max_completion_length=preset.response_length,
    beta=0.1,  # as our loop; default: 0, no KL at all, and no reference is kept
    loss_type="grpo",  # as in GRPO's paper; default: "dapo"
    use_bias_correction_kl=False,  # default: on, see above
    report_to="none",
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
)

# %% [markdown]
# Prompts are given as messages: TRL applies the chat template to messages, and leaves plain text as it is. On a 4-bit
# base TRL rounds what it trains to bfloat16; `keep_float32` puts the adapter back in float32.

# %%
messages = [{"prompt": [{"role": "user", "content": text}]} for text in prompts]
trainer = GRPOTrainer(
    policy,
    reward_funcs=score,
    args=args,
    train_dataset=Dataset.from_list(messages),
    processing_class=tokenizer,
)
trainer.remove_callback(PrinterCallback)
keep_float32(trainer.model, sft)
_ = trainer.train()

# %%
sampled = [row for row in trainer.state.log_history if "reward" in row]
for row in sampled:
    print(f"reward {row['reward']:.2f}, KL per token {row['kl']:.4f},", end=" ")
    print(f"{row['frac_reward_zero_std']:.0%} of the groups without variance,", end=" ")
    print(f"{1 - row['completions/clipped_ratio']:.0%} finished")

# %% [markdown]
# Two updates only show that it runs. Runs of thirty are recorded, of our loop and of TRL's trainers, from the same
# adapter and with the same settings. (`RLOO, tokens` is our loop with the ratio and the mean of lesson 03, both by
# token.)


# %%
# Pocket only
def read(name, folder="league"):
    with (ASSETS / folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


league = defaultdict(list)
for row in read("league"):
    league[row["method"]].append(row)


def of(method, column):
    """What the runs of a method have in a column."""
    return [float(row[column]) for row in league[method] if row[column]]


def mean(method, column):
    return statistics.fmean(of(method, column))


for method in ("RLOO", "RLOO by TRL", "RLOO, tokens", "GRPO", "GRPO by TRL"):
    found = of(method, "gold")
    print(f"{method:13}{len(found):3} runs, gold {mean(method, 'gold'):.2f}", end=" ")
    print(f"({min(found):.2f} to {max(found):.2f}), proxy {mean(method, 'proxy'):.2f},", end=" ")
    print(f"KL {mean(method, 'kl'):.1f}, {mean(method, 'cpu_seconds') / 60:.1f} min of one core")

# %% [markdown]
# For RLOO and GRPO alike, TRL reaches the same gold as our loop: the two differ by less than the seeds do. (TRL's GRPO
# ends 0.4 nats farther from SFT, though.) And what looks like bookkeeping matters: `RLOO, tokens` has the same
# advantages, but with its mean over tokens the gradient is not that of the expected score, and it ends 0.07 lower.
#
# ## The reward model, to take along
#
# Other libraries do not know our roles and heads. `export_reward_model` writes adapter, head and tokenizer into a
# folder, with a README that has the lines to load them:

# %%
from rlhf_helpers.reward import score_examples
from rlhf_helpers.text import encode_examples
from rlhf_helpers.trl_rewards import export_reward_model

folder, ours = preset.runs / preset.name / "reward_model", Roles(load_base(preset, quantized=False))
ours.load("reward", find_adapter(preset, "reward"))
export_reward_model(ours, "reward", tokenizer, folder)
print(*sorted(path.name for path in folder.iterdir()))

# %% [markdown]
# Here are those lines, which need only transformers and PEFT. Three answers are scored by our roles, and by the loaded
# model with padding on either side:

# %%
import transformers

transformers.logging.set_verbosity_error()  # it reports that the classifier's head is new
model = transformers.AutoModelForSequenceClassification.from_pretrained(
    preset.model, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
)
transformers.logging.set_verbosity_warning()
model.score = torch.nn.Linear(model.config.hidden_size, 1)
model = PeftModel.from_pretrained(model, str(folder)).eval()

texts = {
    "prompt": ["what does the duck say?"] * 3,
    "completion": ["quack.", "it says quack.", "moo!"],
}
examples = encode_examples(tokenizer, Dataset.from_dict(texts), 64, 64)
expected = score_examples(ours, "reward", tokenizer, examples)
print(f"{'roles':6}", [round(x, 4) for x in expected.tolist()])
for side in ("left", "right"):
    ids = [example["prompt"] + example["response"] for example in examples]
    rows = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        found = model(rows["input_ids"], rows["attention_mask"]).logits[:, 0]
    print(f"{side:6}", [round(x, 4) for x in found.tolist()])
    assert preset.name != "pocket" or torch.allclose(found, expected, atol=1e-5)

# %% [markdown]
# ## A reward that is a program
#
# The verifier above knows one thing, whether an answer is right. It needs no pairs, no people and no reward model, and
# courtesies do not impress it. `train_ppo(..., reward_function=verifier)` trains on it. Its control, a coin, gives
# points by chance.

# %%
# Pocket only
taught = Roles(load_base(preset))
taught.load("reference", sft)
taught.add("policy", copy_of="reference")
checked = replace(short, updates=4, eos_penalty=0.0)
runs = ppo.train_ppo(taught, tokenizer, prompts, checked, reward_function=verifier)
for stats in runs:
    flat = losses.equal_groups(stats.experience.scores, 4).float().mean()
    print(f"update {stats.update}: right {stats.score:.0%}, {flat:.0%} of groups silent")

# %% [markdown]
# Recorded runs of thirty updates:

# %%
# Pocket only
print(f"{'':15}{'correct':>9}{'polite':>9}{'gold':>7}{'tokens':>8}{'KL':>7}{'silent groups':>15}")
for method in ("SFT", "GRPO", "GRPO, verifier", "GRPO, coin"):
    silent = f"{mean(method, 'flat_groups'):.0%}" if of(method, "flat_groups") else "-"
    print(f"{method:15}{mean(method, 'correct'):9.0%}{mean(method, 'polite'):9.0%}", end="")
    print(
        f"{mean(method, 'gold'):7.2f}{mean(method, 'tokens'):8.1f}{mean(method, 'kl'):7.2f}", end=""
    )
    print(f"{silent:>15}")

# %% [markdown]
# What the program asks for goes up: nearly as many answers are right as after PPO (82%, in the next table), at less KL.
# What it does not ask for does not rise with it: answers stay as short as they were, and fewer are polite. A third of
# the groups teach nothing. The coin teaches nothing: its policy moves too, but on eight seeds of ten fewer of
# its answers are right than SFT's, and gold falls. KL by itself is no sign of learning.
#
# ## The league
#
# All methods of this course, on the same base, judged by the same rubric on the same held-out prompts. The methods that
# train without pairs all sample 1,920 answers. `python tools/league.py --table` prints all columns.

# %%
# Pocket only
start = {row["seed"]: float(row["gold"]) for row in league["SFT"]}
print(f"{'':16}{'runs':>5}{'answers':>8}{'gold':>6}{'lowest':>8}{'highest':>8}", end="")
print(f"{'correct':>9}{'KL':>5}{'+0.3':>10}")
for method in league:
    found = of(method, "gold")
    gains = [float(row["gold"]) - start[row["seed"]] for row in league[method]]
    far = f"{sum(gain >= 0.3 for gain in gains)} of {len(gains)}"
    print(
        f"{method:16}{len(found):5}{mean(method, 'samples'):8.0f}{mean(method, 'gold'):6.2f}",
        end="",
    )
    print(f"{min(found):8.2f}{max(found):8.2f}{mean(method, 'correct'):9.0%}", end="")
    print(f"{mean(method, 'kl'):5.1f}{far:>10}")

# %% [markdown]
# (*answers*: those sampled for training; for best-of-n, those to the held-out prompts. The last column counts the seeds
# on which a method is at least 0.3 above SFT in gold. The KL of best-of-n is its bound, $\log n - (n-1)/n$.) The same
# as a figure:

# %%
# Pocket only
shown = ("SFT", "best-of-4", "best-of-16", "SFT on the best", "DPO", "PPO", "RLOO", "GRPO")
shown += ("GRPO, verifier",)
groups = {}
for method in shown:
    points = zip(of(method, "kl"), of(method, "gold"), strict=True)
    name = "best of 1, 4, 16" if method in shown[:3] else method
    groups.setdefault(name, []).extend((max(kl, 0) ** 0.5, marks) for kl, marks in points)
fig = plots.scatter(groups, "√KL to SFT, √nats", "gold, held-out prompts", hulls=True)
means = ", ".join(f"{method} {mean(method, 'gold'):.2f}" for method in shown)
plots.show(
    fig, f"Gold against √KL, a point for each run and a hull for each method. Means: {means}."
)

# %% [markdown]
# The best is not trained at all: **best-of-n** stands above every trained policy, and nearer to SFT than PPO, RLOO and
# GRPO. The reward model judges SFT's own answers well, and best-of-n asks it about no others. The price is that each
# answer costs 4 or 16 samples and scores, for as long as the model is used. Training on the best of 16 instead (*SFT on
# the best*, 120 examples) keeps little of the gain: 60% right, not 98%.
#
# Among the trained policies **PPO and RLOO** lead, and are level. The critic of lesson 04 buys nothing here: answers
# are short, the score comes at the end, and three other answers to the same prompt predict it as well. **GRPO** gains
# less, at more KL. Its formula suggests one reason: as the answers of a group become alike, the division amplifies
# their differences, while the price of KL stays the same. (GRPO also differs in its ratio, in its estimate of KL and in
# where that enters; the table cannot tell these apart.) **DPO** gains little at β = 0.1, from twice as many answers
# (1.22 at β = 1, lesson 08), and a second round, *online DPO*, takes that away again.
#
# All this is for one base, a few hundred facts, short answers, and one learning rate, which was chosen for PPO.
# Elsewhere the order may be different. What carries over is how the table was made: equal samples where there are no
# pairs, held-out prompts, ten seeds, KL beside gold, and a control. (Online DPO, which lesson 08 recorded, has three.)
#
# ## At equal minutes
#
# Without a critic an update is cheaper: there is one adapter less to train and to run. So PPO makes fewer updates in
# the same time. The times were measured with the methods taking turns on one machine; the gold is that of the answers
# sampled in the last three updates (training prompts, mean over all seeds):


# %%
# Pocket only
def curve(rows, method):
    """Gold in each update, the mean over seeds."""
    found = defaultdict(list)
    for row in rows:
        if row.get("method", "PPO") == method and row.get("beta", "0.1") == "0.1":
            found[int(row["update"])].append(float(row["gold"]))
    return [statistics.fmean(found[update]) for update in sorted(found)]


cost = defaultdict(list)
for row in read("timing"):
    cost[row["method"]].append(float(row["cpu_seconds"]) / float(row["updates"]))
critic = curve(read("updates", "ppo"), "PPO")
for method in ("RLOO", "GRPO"):
    share = statistics.fmean(cost[method]) / statistics.fmean(cost["PPO"])
    without, made = curve(read("curves"), method), round(30 * share)
    print(f"{method}: {share:.2f} of the time of PPO's update. In thirty of its updates", end=" ")
    print(f"gold {statistics.fmean(without[-3:]):.2f};", end=" ")
    print(f"PPO, {made} updates in that time, {statistics.fmean(critic[made - 3 : made]):.2f}")

# %% [markdown]
# At equal samples RLOO was level with PPO. At equal minutes it is 0.1 ahead: that is what leaving out the critic buys.
# GRPO is not ahead of PPO even so.
#
# ## The number to take along

# %% tags=["headline"]
# Pocket only
for method in ("RLOO", "GRPO"):
    gains = [float(row["gold"]) - start[row["seed"]] for row in league[method]]
    found = f"{sum(gain >= 0.3 for gain in gains)} of {len(gains)} seeds"
    print(
        f"{method}: gold {mean('SFT', 'gold'):.2f} to {mean(method, 'gold'):.2f}, +0.3 on {found}",
        end="; ",
    )
print(f"PPO {mean('PPO', 'gold'):.2f}, DPO {mean('DPO', 'gold'):.2f}")

# %% [markdown]
# ## Recap
#
# - Other answers to a prompt are a baseline without a network. Leaving one out keeps the gradient unbiased; dividing by
#   the spread gives easy and hard prompts more weight, and changes the objective.
# - A group without variance teaches nothing. Count them.
# - The names are settings: which advantage, which mean, which ratio, one clip or two.
# - k3 in the loss has the gradient of the KL in the other direction, unless it is multiplied by the ratio.
# - TRL's trainers must be given three things: the SFT adapter as the policy, a reward function on token ids, and a β
#   above 0.
#
# **Further reading.** Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!". Ahmadian et al.
# 2024 (arXiv 2402.14740): RLOO for language models. Shao et al. 2024 (arXiv 2402.03300), equations 3 and 4:
# GRPO and its k3. Liu et al. 2025 (arXiv 2503.20783), section 3: what its two divisions do. Yu et al. 2025 (arXiv
# 2503.14476): DAPO. Zheng et al. 2025 (arXiv 2507.18071): GSPO.
