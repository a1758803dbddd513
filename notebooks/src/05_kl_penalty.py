# %% [markdown]
# # 05 · The KL penalty and reward hacking
#
# **Run time** about two minutes on two CPU cores · **Before this** lesson 04 · **Next** lesson 06, your
# clicks · **Exercise** `exercises/05_kl_penalty.ipynb`, the main one of the course
#
# After this lesson you will be able to
#
# - compute a KL divergence exactly, estimate it from samples, and say when the estimate is valid;
# - say what the penalty β does to reward, KL and the diversity of the answers;
# - recognise a hacked reward, in the curves and in the text, and find out what the policy exploits;
# - choose β, or let a controller choose it.

# %%
PRESET = "pocket"  # every number below is from this preset

import csv
import json
import math

import torch
from datasets import Dataset
from torch.distributions import Categorical, kl_divergence
from tqdm.auto import tqdm

from rlhf_helpers import kl, notebook, plots, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.diversity import diversity
from rlhf_helpers.pocket import exam, rubric, world
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.reward import score_examples, score_responses, score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import load_gold, prompt_dataset
from rlhf_helpers.text import encode_examples, load_tokenizer, readable

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer, gold = load_tokenizer(preset), load_gold(preset)
folder = preset.runs / preset.name / "kl"
adapters = {name: find_adapter(preset, name) for name in ("sft", "reward")}
train, held_out = (list(prompt_dataset(preset, split)["prompt"]) for split in ("train", "held_out"))

# %% [markdown]
# ## Three runs, to have something to measure
#
# In lesson 04 the policy paid β = 0.1 for each nat of KL to the reference, and ended near three nats. What did the
# price do? To see, we make three runs that differ only in β: no price, the usual one, and ten times that. They have
# eight updates each and take a minute; read on meanwhile. Longer runs at six prices are recorded, and come later.
#
# <details><summary><b>Predict before you run.</b> Which run ends with the highest score? Which with the highest gold?
# Which with the most varied answers?</summary>
#
# Write it down. The section "What the price does" has the answer.
# </details>


# %%
def four_roles(reward=adapters["reward"]):
    roles = Roles(load_base(preset))
    roles.load("reference", adapters["sft"])
    roles.load("reward", reward)
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    return roles


def short_run(name, beta, reward=adapters["reward"], **settings):
    """Eight updates; the policy goes to a folder, what the updates reported is returned."""
    settings = preset.ppo | {"updates": 8, "beta": beta, "seed": preset.seed} | settings
    config = ppo.PPOConfig(**settings)
    run = ppo.train_ppo(four_roles(reward), tokenizer, train, config, folder / name)
    return list(tqdm(run, total=config.updates, desc=name, leave=False))


PRICES = {"free": 0.0, "usual": 0.1, "dear": 1.0}
histories = {f"β = {beta:g}": short_run(name, beta) for name, beta in PRICES.items()}

# %% [markdown]
# ## KL from first principles
#
# How far is one distribution from another? Draw a token from $p$ and ask how much more likely $p$ finds it than $q$
# does, as a log-ratio; the mean is the **Kullback–Leibler divergence**
#
# $$\mathrm{KL}(p\|q) = \sum_a p(a)\,\bigl(\log p(a) - \log q(a)\bigr) \;\ge 0,$$
#
# and 0 only if $p = q$. With $p = (\tfrac12, \tfrac12)$ and $q = (\tfrac14, \tfrac34)$, by hand:
# $\tfrac12 \log 2 + \tfrac12 \log \tfrac23 = \tfrac12 \log \tfrac43 = 0.1438$ nats.

# %% tags=["nbval-check-output"]
p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
by_hand = (p * (p.log() - q.log())).sum()
by_torch = kl_divergence(Categorical(logits=p.log()), Categorical(logits=q.log()))
ours = kl.exact_kl(p.log(), q.log())
print(f"by hand {by_hand:.4f}, torch.distributions {by_torch:.4f}, rlhf_helpers {ours:.4f}")
print(f"the other way round, KL(q‖p): {kl.exact_kl(q.log(), p.log()):.4f}")

# %% [markdown]
# It is not a distance: the two directions differ. In RLHF's penalty the policy is $p$ and the reference is $q$.
#
# Now two real models: the policy of the run without a price, and the reference. At each position of a response each has
# a distribution over the whole vocabulary, so there the sum over all tokens can be taken.

# %%
roles = four_roles()
for name in PRICES:
    roles.load(name, folder / name)

# %% [markdown]
# Two helpers: what a role answers, with the log-probabilities that go with it; and all its logits, for the exact sum.

# %%
some = held_out[::8][: 64 if preset.name == "pocket" else 8]  # all logits at once: they are large
config = ppo.PPOConfig(**{"minibatch_size": 64} | preset.ppo)


def answers_of(role, prompts=some, seed=1):
    """Samples of a role, and what all four roles think of them."""
    return ppo.collect_experience(roles, tokenizer, prompts, config, 0.0, seed, role)


def logits_of(role, rollout):
    """Its logits at each response position, [B, T, V]."""
    mask, T = rollout.attention_mask, rollout.response_mask.shape[1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model, ids = roles.use(role), rollout.input_ids
        logits = model(ids, mask, position_ids=positions, logits_to_keep=T + 1).logits
    return logits[:, :-1]


# %%
free = answers_of("free")
real = free.rollout.response_mask.bool()
logits_curr, logits_ref = (logits_of(role, free.rollout)[real] for role in ("free", "reference"))
exact = kl_divergence(Categorical(logits=logits_curr), Categorical(logits=logits_ref))
print(f"{len(exact)} tokens of {len(some)} responses, a vocabulary of {logits_curr.shape[-1]}")
print(f"exact KL: {exact.mean():.3f} nats per token, {exact.sum() / len(some):.1f} per response")

# %% [markdown]
# ## The mean difference, and when it is valid
#
# In practice nobody keeps two distributions over 150,000 tokens for each position. But the definition is a mean over
# tokens drawn from $p$, and the policy has drawn tokens: those of its responses. So
#
# $$\widehat{\mathrm{KL}} = \tfrac1n \sum_t \bigl(\log \pi(a_t) - \log \pi_{\text{ref}}(a_t)\bigr)$$
#
# in code `(log_probs_curr - log_probs_ref).mean()`. It is right for tokens *sampled from the current policy*, and for
# no other set of tokens.
#
# <details><summary><b>Predict before you run.</b> Take the mean of the same expression over the whole vocabulary, each
# token once; over tokens that the reference has sampled; or over each position's most likely token. Which of the three
# can be negative?</summary>
#
# All three: none is a mean under the policy. Over the reference's samples it is, on average, −KL(π_ref‖π), so it is
# negative except by chance. Only the mean under the policy itself is a KL. (Over few samples it can also fall below 0,
# if the KL is small: in the recorded runs it does once, to −0.03. Its expectation cannot.)
# </details>

# %%
log_p, log_q = logits_curr.log_softmax(-1), logits_ref.log_softmax(-1)
log_probs_curr, log_probs_ref = free.logprobs[real], free.ref_logprobs[real]
sampled = log_probs_curr - log_probs_ref
_, spread = kl.estimator_moments(log_p, log_q, "k1")
error = spread.square().sum().sqrt() / len(sampled)
print(f"exact                                  {exact.mean():7.3f}")
print(f"tokens sampled from the policy         {sampled.mean():7.3f} ± {error:.3f}")
print(f"every token of the vocabulary, once    {(log_p - log_q).mean():7.3f}")
assert preset.name != "pocket" or abs(sampled.mean() - exact.mean()) < 3 * error

# %% [markdown]
# Now the other two sets: the reference's own samples, and the likeliest token at each position.

# %%
sft = answers_of("reference")
on_sft = sft.rollout.response_mask.bool()
pair = [logits_of(role, sft.rollout)[on_sft].log_softmax(-1) for role in ("free", "reference")]
tokens = sft.rollout.input_ids[:, -on_sft.shape[1] :][on_sft]
wrong = [x.gather(-1, tokens[:, None])[:, 0] for x in pair]
top = log_p.argmax(-1, keepdim=True)
print(f"tokens sampled from the reference      {(wrong[0] - wrong[1]).mean():7.3f}", end="")
print(f"   there −KL(reference‖policy) is {-kl.exact_kl(pair[1], pair[0]).mean():.3f}")
print(f"the most likely token of each position {(log_p - log_q).gather(-1, top).mean():7.3f}")
assert preset.name != "pocket" or (wrong[0] - wrong[1]).mean() < 0

# %% [markdown]
# The mean over the policy's own samples is within three standard errors of the exact value, and more responses would
# bring it nearer. Over the vocabulary every token counts the same, so nearly all of the mean comes from tokens that
# neither model would say; here it is too large, with other models it can be negative. The reference's samples give
# minus the KL in the other direction. The likeliest token at these positions is off by 8%, and more responses do not
# cure that. (± is one standard error of the tokens, given the positions visited; other prompts would add to it.) The
# same goes for sampling with top-k, or at a temperature other than that of scoring, and for PPO's second step on a
# batch, when the samples are those of the policy before the first. That is why the penalty is computed once for each
# batch, with the policy that sampled it.
#
# ## Three estimators
#
# The difference itself, called k1, is unbiased, but it is noisy, and at single tokens often negative, which a KL never
# is. With $r = \log \pi_{\text{ref}}(a) - \log \pi(a)$ there are two others (Schulman 2020):
#
# $$k_1 = -r, \qquad k_2 = \tfrac12 r^2, \qquad k_3 = e^r - 1 - r.$$
#
# k2 and k3 are never negative. k3 is unbiased too, since $e^r$ has mean 1 under the policy. What does that cost in
# noise? By hand for $p$ and $q$ from above, where $e^r$ is ½ or 3⁄2, each half of the time: k3 of the first token is
# $\tfrac12 - 1 - \log \tfrac12 = 0.193$.

# %% tags=["nbval-check-output"]
for kind in ("k1", "k2", "k3"):
    values = kl.kl_estimate(p.log(), q.log(), kind)
    mean, std = kl.estimator_moments(p.log(), q.log(), kind)
    print(
        f"{kind}: {values.tolist()[0]:7.4f} or {values.tolist()[1]:7.4f}, mean {mean:.4f}, std {std:.4f}"
    )

# %% [markdown]
# k1 and k3 have the KL, 0.1438, as their mean, k2 does not, and k3 varies least. Now the real models: the policy at
# β = 1, near the reference, and the one at β = 0, far from it. *Bias* and *std* are exact sums over the vocabulary at
# the positions that the samples visit; *lowest* and *off by* are from the sampled tokens.


# %%
def compare(role):
    seen = answers_of(role)
    mask = seen.rollout.response_mask.bool()
    log_p, log_q = (
        logits_of(name, seen.rollout)[mask].log_softmax(-1) for name in (role, "reference")
    )
    exact = kl.exact_kl(log_p, log_q).mean()
    print(f"{role}: exact KL {exact:.4f} nats per token, {len(log_p)} tokens")
    table = {}
    for kind in ("k1", "k2", "k3"):
        mean, std = kl.estimator_moments(log_p, log_q, kind)
        estimates = kl.kl_estimate(seen.logprobs[mask], seen.ref_logprobs[mask], kind)
        error = std.square().sum().sqrt() / len(std)
        table[kind] = (mean.mean() / exact - 1, std.square().mean().sqrt() / exact)
        z = (estimates.mean() - exact) / error
        print(f"   {kind}: bias {table[kind][0]:8.2%}, std {table[kind][1]:6.1f} × KL,", end=" ")
        print(f"lowest {estimates.min():6.2f}, samples off by {z:5.1f} standard errors")
        assert kind == "k2" or abs(z) < 3 or preset.name != "pocket"
        assert kind == "k1" or estimates.min() >= 0
    return table


near, far = compare("dear"), compare("free")

# %% [markdown]
# Read the columns one by one. *Bias*: k1 and k3 have none, near or far; k2 is about twice as large as it should
# be. *Noise*: k3 is far quieter than k1 in the tiny example, as noisy in the near pair, and 27 times as noisy in
# the far one: there single tokens have a huge $e^r$, because the reference finds them likely and the policy hardly
# ever samples them. So do not rely on "k3 has low variance"; measure it. With so much noise "off by 0.0 standard
# errors" says little. *Sign*: single values of k1 go far below 0, those of k3 never do.
#
# ## Two directions
#
# KL(p‖q) is not KL(q‖p), and the difference matters. Let $q$ have two peaks, and fit one bell-shaped $p$ to it, once in
# each direction. (In the code `reverse` is KL(p‖q) and `forward` KL(q‖p), their usual names. The descent begins at −1;
# from the other side KL(p‖q) could end on the other peak.)


# %%
def fit(divergence):
    """Centre and width of the bell that makes the divergence least."""
    centre, log_width = (
        torch.tensor(-1.0, requires_grad=True),
        torch.tensor(0.5, requires_grad=True),
    )
    optimizer = torch.optim.Adam([centre, log_width], lr=0.05)
    for _ in range(300):
        logits = -((grid - centre) ** 2) / (2 * log_width.exp() ** 2)
        optimizer.zero_grad()
        divergence(logits).backward()
        optimizer.step()
    return logits.detach().softmax(-1), centre.item(), log_width.exp().item()


grid = torch.linspace(-6, 6, 121)
peaks = 0.6 * torch.exp(-((grid + 2) ** 2) / 0.5) + 0.4 * torch.exp(-((grid - 2) ** 2) / 0.5)
two = (peaks / peaks.sum()).log()
reverse, *found_reverse = fit(lambda logits: kl.exact_kl(logits, two))
forward, *found_forward = fit(lambda logits: kl.exact_kl(two, logits))
print("KL(p‖q): centre {:.2f}, width {:.2f}".format(*found_reverse))
print("KL(q‖p): centre {:.2f}, width {:.2f}".format(*found_forward))
assert found_reverse[1] < 0.7 and found_forward[1] > 1.3

# %% [markdown]
# The two bells, and what they were fitted to:

# %%
curves = {"q, two peaks": two.exp(), "p of least KL(p‖q)": reverse, "p of least KL(q‖p)": forward}
points = {name: dict(zip(grid.tolist(), y.tolist(), strict=True)) for name, y in curves.items()}
fig = plots.lines(points, "value", "probability")
alt = "Two peaks; the bell of least KL(p‖q) sits on one of them, the other covers both."
plots.show(fig, alt)

# %% [markdown]
# KL(p‖q), the direction of the penalty, punishes $p$ for being where $q$ is not, and charges little for giving up a
# peak: **mode seeking**. Keeping only a share $s$ of $q$ costs $\log 1/s$. For the peak that holds 0.6 of it that is
# 0.51 nats, a twentieth of a point at β = 0.1. KL(q‖p) punishes $p$ for not being where $q$ is: **mode covering**. So
# the penalty keeps the policy from saying what the reference would never say, and hardly objects if the policy stops
# saying much of what the reference would. It does not measure diversity; we have to look at that separately.
#
# ## In the reward, or in the loss
#
# PPO as in lesson 04 puts the penalty into each token's reward: $r_t = -\beta\,(\log\pi - \log\pi_{\text{ref}})$, plus
# the score at the last token. (Here $r_t$ is the reward again, not the log-ratio above.) Take the response of the run
# at β = 0.1 that is farthest from the reference:

# %%
usual = answers_of("usual")
i = int(usual.kl.argmax())
row = usual.rollout.response_mask[i].bool()
tokens = usual.rollout.input_ids[i, -len(row) :][row]
paid = -0.1 * (usual.logprobs - usual.ref_logprobs)[i, row]
shaped = ppo.shape_rewards(
    usual.scores, usual.logprobs, usual.ref_logprobs, usual.rollout.response_mask, beta=0.1
)[i, row]
assert torch.isclose(shaped.sum(), usual.scores[i] - 0.1 * usual.kl[i], atol=1e-4)

# %% [markdown]
# Token by token:

# %%
words = [tokenizer.decode(token).strip() for token in tokens]
fig = plots.heat_map(
    [paid.tolist(), shaped.tolist()], words, ["−β · log-ratio", "reward"], "units of the score"
)
print(f"{some[i]}  score {usual.scores[i]:.2f}, KL {usual.kl[i]:.1f} nats, so {shaped.sum():.2f}")
dearest = words[int(paid.argmin())]
alt = "A response token by token: what each pays, and the reward with the score at the end. "
plots.show(fig, alt + f"The dearest token is {dearest!r}, at {paid.min():.2f}.")

# %% [markdown]
# Most tokens pay nothing: the reference would have said them too. The ones that pay are those that decide something:
# the full stop, 600 times as likely for the policy as for the reference ($e^{6.4}$), and the first words of the two
# courtesies. So the penalty falls on the tokens that cause it; the score comes only at the last one.
#
# The other way is to add β times the mean of an estimate to the *loss* and differentiate it (`PPOConfig(kl_in="loss")`;
# GRPO, in lesson 09, does so with k3). Then the estimate must have the right *gradient*, and unbiased values do not
# guarantee that. Here are the gradients for three tokens, with sums in place of samples:

# %% tags=["nbval-check-output"]
theta = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
ref = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()


def gradient(loss):
    return torch.autograd.grad(loss, theta)[0]


gradients = {
    "KL(p‖q)": gradient(kl.exact_kl(theta, ref)),
    "KL(q‖p)": gradient(kl.exact_kl(ref, theta)),
}
for kind in ("k1", "k2", "k3"):
    estimates, policy = kl.kl_estimate(theta.log_softmax(-1), ref, kind), theta.softmax(-1)
    gradients[f"{kind} in the loss"] = gradient((policy.detach() * estimates).sum())
    gradients[f"{kind} in the reward"] = gradient((policy * estimates.detach()).sum())
for name, values in sorted(gradients.items(), key=lambda item: item[0][3:]):
    print(f"{name:16}", "  ".join(f"{value:z7.4f}" for value in values))
ours, other = gradients["KL(p‖q)"], gradients["KL(q‖p)"]
assert torch.allclose(gradients["k2 in the loss"], ours)
assert torch.allclose(gradients["k3 in the loss"], other)
assert torch.allclose(gradients["k1 in the reward"], ours)
assert torch.allclose(gradients["k3 in the reward"], ours - other)

# %% [markdown]
# In the loss, k1 holds nothing back: its gradient is 0 on average, so it adds only noise. The biased k2 has the
# gradient of our KL, at one position, and the unbiased k3 that of the *other* direction. In the reward the estimate is
# held fixed and multiplies the gradient of log π: there k1 gives the gradient of our KL exactly; k3, though unbiased,
# gives the difference of the two directions, which here even points the wrong way. (Besides, a loss for each token does
# not see what that token does to later ones; a reward does, through the return.)
#
# ## The best policy at a price
#
# Before we look at training: which policy would be *best*, if we could have any? Take four answers of a made-up SFT
# model, with made-up scores, and let gradient descent, without PPO or sampling, find the policy with the largest mean
# score minus β times KL.
#
# <details><summary><b>Predict before you run.</b> The answer that SFT gives once in a hundred times has the highest
# score, by one point. How often is it given at β = 1, and how often at β = 0.1?</summary>
#
# In 5% of the cases at β = 1, practically always at 0.1. Move the slider (this needs a running kernel and ipywidgets)
# and find the two stops between which it is given half of the time. What is the rule? The exercise asks you that.
# </details>

# %%
answers = ["woof.", "it says woof.", "it says woof. have a nice day!", "woof! great! thanks! bye!"]
sft_policy, made_up = torch.tensor([0.6, 0.3, 0.09, 0.01]), torch.tensor([0.0, 0.5, 1.0, 2.0])


def best_policy(β):
    logits = sft_policy.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = β * kl.exact_kl(logits, sft_policy.log()) - (logits.softmax(-1) * made_up).sum()
        loss.backward()
        optimizer.step()
    return logits.detach()


def draw_best(β):
    logits = best_policy(β)
    best, divergence = logits.softmax(-1), kl.exact_kl(logits, sft_policy.log())
    score = (best * made_up).sum()
    title = f"probability; KL {divergence:.2f} nats, mean score {score:.2f}"
    groups = {"SFT": sft_policy.tolist(), f"best at β = {β}": best.tolist()}
    return plots.grouped_bars(answers, groups, title)


alt = "Four answers, how often SFT gives each, and the best policy at β = {β}."
plots.explore(draw_best, alt, β=[0.3, 0.03, 0.1, 0.2, 0.35, 0.5, 1.0, 3.0, 10.0])

# %% [markdown]
# Real training has it harder: it sees only samples, moves all answers at once through shared weights, and stops after
# some updates. But the direction is the same.
#
# ## What the price does
#
# Now the three runs. Each point is measured before its update, so the first points are equal.


# %%
def gold_of(experience):
    return gold(experience.prompts, experience.rollout).mean().item()


# %% [markdown]
# Four measures, a panel for each, a line for each β:

# %%
MEASURES = {
    "score (proxy)": lambda stats: stats.score,
    gold.name: lambda stats: gold_of(stats.experience),
    "KL, nats": lambda stats: stats.kl,
    "entropy, nats": lambda stats: stats.entropy,
}


def draw(histories, alt):
    curves = {
        title: {name: [of(stats) for stats in run] for name, run in histories.items()}
        for title, of in MEASURES.items()
    }
    plots.show(plots.panels(curves, "updates", {}), alt)


last = ", ".join(
    f"{name} gold {gold_of(run[-1].experience):.1f}" for name, run in histories.items()
)
draw(
    histories,
    f"Score, gold, KL and entropy over eight updates, a line for each β. In the end: {last}.",
)

# %% [markdown]
# Up to the second point the three runs can hardly be told apart: KL is near 0, so there is nothing to pay yet. Then
# they part. At β = 0 the proxy goes on rising, and gold falls below 0. At 0.1 the proxy stops near 1, at three nats,
# and gold has fallen too, to about 1; in lesson 04's longer run it came back. At 1 not much happens in eight updates,
# and gold is highest. This is one seed each, in batches of 64, so do not compare single points with the table below.
#
# Now the same on held-out prompts, with the share of answers that end with EOS, and with measures of
# diversity. *Distinct-2* is the share of different pairs among all word pairs, *unique* the share of
# different answers, *self-BLEU* how much of an answer the other answers say too (so high is bad); *length* is
# in words. *Proxy* is what PPO is paid: the score, less a point if the answer was cut off.

# %%
NAMES = ("distinct_2", "unique", "self_bleu", "length")
titles = ("proxy", gold.name, "KL", "entropy", "finished")
LABELS = {"reference": "SFT"} | {name: f"β = {beta:g}" for name, beta in PRICES.items()}
print(f"{'':10}" + "".join(f"{n:>9}" for n in titles) + "".join(f"{n:>11}" for n in NAMES))
asked, ends = held_out[::4], {}
for role, label in LABELS.items():
    seen = answers_of(role, asked)
    ends[role] = seen
    mask, varied = seen.rollout.response_mask, diversity(seen.rollout.texts)
    entropy = -(seen.logprobs * mask).sum() / mask.sum()
    finished = seen.rollout.finished.float().mean()
    numbers = (seen.scores.mean(), gold_of(seen), seen.kl.mean(), entropy, finished)
    print(f"{label:10}" + "".join(f"{x:9.2f}" for x in numbers), end="")
    print("".join(f"{varied[name]:11.2f}" for name in NAMES))

# %% [markdown]
# The run at β = 0 has the highest proxy, by far the lowest gold, and the least varied answers: its distinct-2 is
# one in six, SFT's more than half. The run at β = 1 has the highest gold and nearly SFT's variety. Beware of the
# column *unique*: it says that nothing is wrong, since hardly any two answers are the same word for word. But they
# are made of the same few sentences, in another order. So look at more than one measure. Length matters too: longer
# texts repeat more, so part of the fall in distinct-2 is due to length alone.
#
# ## Reward hacking, read aloud

# %%
for i in range(0, min(144, len(asked)), 24):
    print(readable(asked[i]))
    for role in ("reference", "usual", "free"):
        print(f"    {LABELS[role]:8} {ends[role].scores[i]:5.2f}  {ends[role].rollout.texts[i]}")

# %% [markdown]
# At β = 0 there are courtesies before and after, and mostly no end. The best paid of the six answers is wrong (2.22,
# "with the hammer"); SFT's right answer to the same question earned 0.59.
#
# What does the policy exploit? Take right, plain answers, add one courtesy to each, and see what it earns from the
# reward model and in gold; then do the same to answers that already have three. Beside it stands how often the phrase
# occurs in 100 answers of SFT and of the run without a price. (A cell that begins with "Pocket only" needs the rubric
# or the runs recorded with it; with another preset it does nothing.)

# %%
# Pocket only
(prompts, plain), (_, polite) = exam.polite_probe(counts=(0, 3))


def marks_of(texts):
    proxy = score_responses(roles, "reward", tokenizer, prompts, texts, 32, 64).mean().item()
    points = [rubric.gold_reward(*pair).total for pair in zip(prompts, texts, strict=True)]
    return torch.tensor([proxy, sum(points) / len(points)])


def add(phrase, texts):
    if phrase in world.POLITE_OPENERS:
        return [f"{phrase} {text}" for text in texts]
    return [f"{text} {phrase}" for text in texts]


first = {phrase: marks_of(add(phrase, plain)) - marks_of(plain) for phrase in world.POLITE}
fourth = {phrase: marks_of(add(phrase, polite)) - marks_of(polite) for phrase in world.POLITE}

# %% [markdown]
# Sorted by what the phrase earns as the fourth:

# %%
# Pocket only
print(f"{'':24}{'as the first':^18}{'as the fourth':^18}{'per 100 answers':^18}")
print(f"{'':24}" + f"{'proxy':>9}{'gold':>9}" * 2 + f"{'SFT':>9}{'β = 0':>9}")
for phrase in sorted(first, key=lambda phrase: -fourth[phrase][0]):
    texts = [ends[role].rollout.texts for role in ("reference", "free")]
    counts = [sum(rubric.count_phrases(t, (phrase,)) for t in said) / len(said) for said in texts]
    print(f"{phrase:24}", "".join(f"{x:9.2f}" for x in (*first[phrase], *fourth[phrase])), end="")
    print("".join(f"{100 * count:9.0f}" for count in counts))

# %% [markdown]
# As the first courtesy, a phrase earns about a point from the reward model and 0.2 of gold. As the fourth it earns next
# to nothing, and costs 0.3 or more of gold. So the annotators' love of courtesy explains one courtesy or two. It does
# not explain five, nor why most answers at β = 0 do not end (the column *finished* above), although PPO takes a whole
# point off the score for that (`eos_penalty`). Something must be paying for it.
#
# The reward model was trained on finished answers only: lesson 02 drops pairs with cut-off ones, and reads the score at
# EOS. Nobody has taught its head what to say at any other token. So take right answers with none to six courtesies,
# once as they are and once without their EOS:


# %%
# Pocket only
def probe(scorers):
    """Mean proxy of right answers with 0 to 6 courtesies: finished, and cut off before EOS."""
    found = {"finished": [], "cut off, and 1 taken off": []}
    for prompts, texts in exam.polite_probe(counts=range(7)):
        rows = Dataset.from_dict({"prompt": prompts, "completion": texts})
        whole = encode_examples(tokenizer, rows, 32, 96)
        cut = [example | {"response": example["response"][:-1]} for example in whole]
        for penalty, (examples, values) in enumerate(
            zip((whole, cut), found.values(), strict=True)
        ):
            score = score_examples(scorers, "reward", tokenizer, examples).mean().item()
            values.append(score - penalty)
    return found


# %% [markdown]
# The two lines side by side:

# %%
# Pocket only
earned = probe(roles)
fig = plots.lines(earned, "courtesies in a right answer", "proxy, mean of 200 answers")
plots.show(fig, "The proxy of cut-off answers lies above that of finished ones at every count.")
for name, values in earned.items():
    print(f"{name:25}", [round(value, 2) for value in values])
assert all(cut > whole for whole, cut in zip(*earned.values(), strict=True))

# %% [markdown]
# There it is. Cut off, and with the point paid, a plain right answer is worth 1.2 where the finished one is worth 0.4,
# and one with three courtesies 2.4 instead of 1.5. *Never stopping* is what pays, and in an answer that does not stop,
# two or three courtesies pay too; the rest is filler. (The probe cuts between sentences; real answers are cut anywhere,
# and earn less.) The four phrases that can close an answer, or prolong it, occur about once in each answer, twenty to
# forty times as often as in SFT's. Nobody wanted that, and nobody had thought of it: where a head was never trained, it
# can say anything, and a penalty of 1 had seemed enough. So there are two holes, one made by the annotators and one
# made by us. The policy finds both.
#
# ## Ten seeds
#
# Recorded: the same runs, but with thirty updates, at six prices, with ten seeds each.


# %%
# Pocket only
def recorded(path):
    with (ASSETS / path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k == "example" else float(v) for k, v in row.items()} for row in rows]


about = json.loads((ASSETS / "ppo" / "about.json").read_text(encoding="utf-8"))
print(f"recorded on {about['machine']}, {about['date']}, {about['versions']}")
updates, finals = recorded("ppo/updates.csv"), recorded("ppo/held_out.csv")
start = recorded("ppo/reference.csv")
runs = {
    (beta, seed): [r for r in updates if (r["beta"], r["seed"]) == (beta, seed)]
    for beta, seed in sorted({(r["beta"], r["seed"]) for r in updates})
}

# %% [markdown]
# First the run without a price, as Gao et al. (2023) draw it: proxy and gold against $\sqrt{\mathrm{KL}}$, a line for
# each seed.

# %%
# Pocket only
groups = {
    name: [
        [(max(r["kl"], 0) ** 0.5, r[column]) for r in rows]
        for (beta, _), rows in runs.items()
        if beta == 0
    ]
    for name, column in (("proxy", "score"), ("gold", "gold"))
}
fig = plots.trajectories(groups, "√KL to the reference, √nats", "reward of the batch")
plots.show(fig, "Ten runs at β = 0: the proxy rises with the KL, gold falls.")

# %% [markdown]
# No seed is an exception. Gold holds for the first nat or two; from there to about √KL = 4, where nearly all answers
# fill their 32 tokens, it falls faster than the proxy rises. After that gold stays below 0 in all but two batches,
# while the proxy still creeps up; over the last ten updates gold averages between −0.1 and −0.4 on nine seeds, and −0.7
# on one. The curves are noisy since each point is one batch. In Gao et al. gold first rises and then falls. Here at
# β = 0 there is hardly a rise, we think because the holes are so easy to find; the next figure has one.
#
# Next, where the runs end on held-out prompts: gold against KL for all prices. Beside them is best-of-n from SFT, which
# does not train at all, computed here from 32 answers to each of 48 prompts: of n answers it takes the one that the
# reward model scores highest, at a KL of at most $\log n - (n-1)/n$ (lesson 04).

# %%
# Pocket only
asked = [prompt for prompt in held_out[::12][:48] for _ in range(32)]
drawn = sample_responses(roles.use("reference"), tokenizer, asked, seed=2)
with torch.no_grad():
    parts = zip(drawn.input_ids.split(128), drawn.attention_mask.split(128), strict=True)
    scores = torch.cat([score_tokens(roles, "reward", *part) for part in parts])
marks = gold(asked, drawn)

# %% [markdown]
# For each n, the answer with the highest score, and its gold:

# %%
# Pocket only
best_of = []
for n in (1, 2, 4, 8, 16, 32):
    best = scores.view(-1, n).argmax(-1, keepdim=True).cpu()
    best_of.append(
        ((math.log(n) - (n - 1) / n) ** 0.5, marks.view(-1, n).gather(1, best).mean().item())
    )

# %% [markdown]
# All of it in one figure, a point for each seed:

# %%
# Pocket only
prices = sorted({row["beta"] for row in finals}, reverse=True)
groups = {"best of n": best_of, "SFT": [(0.0, row["gold"]) for row in start]}
for beta in prices:
    groups[f"β = {beta:g}"] = [(r["kl"] ** 0.5, r["gold"]) for r in finals if r["beta"] == beta]
fig = plots.scatter(
    groups, "√KL to the reference, √nats", "gold, held-out prompts", joined=("best of n",)
)
plots.show(
    fig,
    "Gold against the root of KL: highest at β = 0.3 and 0.1; at 0.03 most seeds end below zero.",
)

# %% [markdown]
# There is the hill of over-optimisation: gold rises from SFT, β = 0.3 and 0.1 are at the top, and then there is a
# cliff. At 0.03 the leash holds on one seed only; the other nine end at thirteen nats or more, far below SFT. Nothing
# was run between 0.03 and 0.1. Best-of-2 is about as good as PPO at the same KL, and larger n look better; but
# best-of-n is measured on 48 prompts only, and samples n answers for each that it gives. The figure does not show that
# 0.1 is right for another reward model.
#
# How many of the ten seeds show it? First the claims about proxy and gold:

# %% tags=["nbval-check-output"]
# Pocket only
seeds = [int(row["seed"]) for row in start]
end = {(row["beta"], int(row["seed"])): row for row in finals}
at = {beta: [end[beta, seed] for seed in seeds] for beta in sorted(prices)}
claims = {
    "β = 0: proxy up by more than 2": [
        b["proxy"] > a["proxy"] + 2 for a, b in zip(start, at[0], strict=True)
    ],
    "β = 0: gold ends below SFT": [
        b["gold"] < a["gold"] for a, b in zip(start, at[0], strict=True)
    ],
    "gold at 0.1 above 0.01": [
        a["gold"] > b["gold"] for a, b in zip(at[0.1], at[0.01], strict=True)
    ],
    "gold at 0.1 above 1.0": [a["gold"] > b["gold"] for a, b in zip(at[0.1], at[1.0], strict=True)],
}
for claim, holds in claims.items():
    print(f"{claim:32} {sum(holds)} of {len(holds)} seeds")

# %% [markdown]
# Then whether KL and the measures of diversity follow the order of β, for the three prices 0.01, 0.1 and 1.0, and for
# all six:


# %% tags=["nbval-check-output"]
# Pocket only
def in_order(name, betas, seed):
    values = [end[beta, seed][name] for beta in betas]
    return values == sorted(values, reverse=name in ("kl", "self_bleu"))


for name in ("kl", "entropy", "distinct_2", "self_bleu"):
    counts = [sum(in_order(name, betas, s) for s in seeds) for betas in ((0.01, 0.1, 1.0), at)]
    print(f"{name:12} three prices: {counts[0]} of {len(seeds)} seeds, all six: {counts[1]}")

# %% [markdown]
# And the means over the seeds:

# %%
# Pocket only
shown = ("proxy", "gold", "correct", "kl", "entropy", *NAMES)
print(f"{'':8}" + "".join(f"{name:>12}" for name in shown))
for label, rows in {"SFT": start, **{f"β = {beta:g}": rows for beta, rows in at.items()}}.items():
    means = [sum(row[name] for row in rows) / len(rows) for name in shown]
    print(f"{label:8}" + "".join(f"{mean:12.2f}" for mean in means))

# %% [markdown]
# Without a price gold ends below SFT on all ten, while the proxy is up by 1.9 to 2.4 standard deviations of SFT's own
# scores. By the score it is a great success. Look at *correct* too, the share of right answers: it has risen from 56%
# to 72%. The facts are better; what ruins gold is everything around them. Gold at 0.1 beats 0.01 on all ten seeds and
# 1.0 on eight, but the latter is close: 1.46 and 1.35 in the mean. And 0.3 has as much gold as 0.1, with half the KL.
# (Distinct-2 is lower than in the table above, for SFT too: these are all 598 prompts, and more texts repeat more.
# SFT's gold is 1.06 on all of them, 1.17 on the 150 above.)
#
# **How does β affect diversity?** From 0.01 to 0.1 to 1, KL, entropy, distinct-2 and self-BLEU are in order on all ten
# seeds: the smaller β, the lower the entropy, the fewer different word pairs, and the more alike the answers. Prices
# closer together are in order in KL on all ten, but not always in the others: 0 and 0.01 differ by seven nats, but
# hardly in how varied the answers are. *Unique* has no order at all. β itself creates no variety: it decides how far
# the policy may go; the reward decides where.
#
# ## Two controls: whose fault is it?
#
# Now we close the holes, again at β = 0: either with a reward model from annotators *without* the love of courtesy
# (which, as it turns out, closes both), or with the reward model as it is, but 4 points off instead of 1 for an answer
# that is cut off. Eight updates here, and ten recorded seeds of thirty updates each.

# %%
# Pocket only
unbiased = find_adapter(preset, "reward_unbiased")
control = {
    "both holes": histories["β = 0"],
    "annotators without bias": short_run("unbiased", 0.0, reward=unbiased),
    "4 off if cut off": short_run("must_stop", 0.0, eos_penalty=4.0),
}
draw(
    control,
    "Four panels, β = 0: with both holes gold falls below 0, with either closed it does not.",
)

# %% [markdown]
# And where the recorded runs of all three end: means over ten seeds, for gold also the range:

# %%
# Pocket only
closed = {"both holes": at[0]}
closed["annotators without bias"] = recorded("ppo_unbiased/held_out.csv")
closed["4 off if cut off"] = recorded("ppo_must_stop/held_out.csv")
for name, rows in closed.items():
    golds = [row["gold"] for row in rows]
    print(f"{name:24} gold {sum(golds) / 10:.2f} ({min(golds):.2f} to {max(golds):.2f})", end="")
    for measure in ("correct", "kl", "entropy", "length"):
        print(f", {measure} {sum(row[measure] for row in rows) / 10:.2f}", end="")
    higher = sum(row["gold"] > before["gold"] for row, before in zip(rows, start, strict=True))
    print(f"; gold above SFT's on {higher} of 10")

# %% [markdown]
# Either way, gold falls below 0 on no seed. Without the bias it ends at 1.37, above SFT's 1.06 on all ten, though KL
# cost nothing. With the bias, but 4 points off for being cut off, the policy stops. Gold ends at 1.07, where it began
# (above SFT's on seven of ten): more answers are right, 77% instead of 56%, but they have grown longer, presumably by
# courtesies, while the proxy reports a gain of 1.5. So the annotators' bias alone costs about 0.3 of gold (1.37 to
# 1.07). The fall from there to −0.31 needs the second hole; these runs do not show what that hole would do on its own.
# (The two reward models score in different units: compare gold, not the proxy.)
#
# Why does the reward model without the bias have no second hole? The same probe:

# %%
# Pocket only
for name, values in probe(four_roles(unbiased)).items():
    print(f"{name:25}", [round(value, 2) for value in values])

# %% [markdown]
# It too pays extra for a cut-off answer, but less than the point that is taken off. Its head was not trained there
# either, so that is luck. And β = 0.1, with both holes open, ended at 1.46 in the mean, better than either of the two
# (than the first on eight seeds of ten, than the second on all ten). The penalty needs no list of holes: if β is high
# enough, it also keeps the policy out of those that nobody has found yet. And closing one does not keep the answers
# varied: without a price the entropy ends between 0.2 and 0.3 in all three; SFT's is 0.6.
#
# ## A badly scaled penalty, and a controller
#
# β is a price in units of the reward. If the rewards are not normalised, the same β is another price: multiply all
# scores by ten, and β = 0.1 acts as 0.01 did, since after whitening the advantages are the same (here with the critic's
# values set to 0):

# %%
mask = free.rollout.response_mask
advantages = []
for scores, beta in ((10 * free.scores, 0.1), (free.scores, 0.01)):
    rewards = ppo.shape_rewards(scores, free.logprobs, free.ref_logprobs, mask, beta)
    advantage, _ = ppo.gae(rewards, torch.zeros_like(rewards), mask)
    advantages.append(ppo.whiten(advantage, mask))
print(f"largest difference of the advantages: {(advantages[0] - advantages[1]).abs().max():.1e}")
assert torch.allclose(*advantages, atol=1e-4)

# %% [markdown]
# So a β that suited one paper may ruin the next model. A target for the KL is easier to choose, since it does not
# depend on the unit of the reward (though it does depend on the length of the answers). A **controller** (Ziegler et
# al. 2019) changes β after every update to bring the KL to the target:
# $\beta \leftarrow \beta\,(1 + K\,\mathrm{clip}(\mathrm{KL}/\text{target} - 1, -0.2, 0.2))$. By hand: at twice the
# target the error is 1, clipped to 0.2; with $K = 0.5$, β grows by a tenth. Recorded: three runs that begin at
# β = 0.01, much too low, with a target of three nats.

# %%
# Pocket only
controlled = recorded("ppo/adaptive.csv")
by_update = {
    title: {
        f"seed {seed}": [row[name] for row in controlled if row["seed"] == seed]
        for seed in range(3)
    }
    for title, name in (
        ("β", "price"),
        ("KL, nats", "kl"),
        ("score (proxy)", "score"),
        ("gold", "gold"),
    )
}
plots.show(
    plots.panels(by_update, "updates", {}),
    "Three runs with a controller: β rises while KL is above three, KL comes back, gold recovers.",
)

# %% [markdown]
# All three seeds tell the same story. β first *falls*, since the KL is still below three; then it grows by a tenth per
# update, but from so low that the policy is at about 19 nats or more, and gold below 0, before the price is felt. Near
# update 40 the KL comes down within a few updates, on all three seeds below three and on two to about one: β has
# overshot. In the end β is between 0.06 and 0.1, on one seed still falling, the KL is about three nats, and gold 1.3 to
# 1.5. So a hacked policy can be brought back without knowing the right β (somebody had to choose the target, though);
# but the controller is slow, and no protection on the way. Beginning with a price that is too high should cost less;
# these runs do not show that.
#
# ## The number to take along

# %% tags=["headline"]
# Pocket only
means = {beta: sum(row["gold"] for row in at[beta]) / len(seeds) for beta in (0, 0.1, 0.3, 1.0)}
print(
    "gold over ten seeds: " + ", ".join(f"{g:.2f} at β = {b:g}" for b, g in means.items()), end=""
)
print(f"; SFT {sum(row['gold'] for row in start) / len(start):.2f}")

# %% [markdown]
# ## The same once, with a real model
#
# All this was a small world whose truth is known. What happens to a model that this course did not make, trained on
# comparisons that people made? Recorded on one GPU with `tools/record_real.py`: Gemma 3 with 270 million parameters, in
# NF4, and half of the test file of *harmless-base* from hh-rlhf, without the pairs whose prompt has more than 256
# tokens or an answer more than 128. SFT on the chosen answers; a reward model on one half of the pairs; a **judge**,
# the same kind of model, on the other half; and PPO without a price and at β = 0.1. Nobody knows gold here; the judge
# has to stand in for it.

# %%
# Pocket only
real = json.loads((ASSETS / "real" / "about.json").read_text(encoding="utf-8"))
print(f"{real['settings']['model']}, on {real['machine']}, {real['date']}")
with (ASSETS / "real" / "numbers.csv").open(encoding="utf-8", newline="") as file:
    found = {(row["stage"], row["number"]): row for row in csv.DictReader(file)}
before, after = (found["sft", name]["value"] for name in ("held-out loss before", "held-out loss"))
print(f"SFT: held-out loss {before} to {after} nats per token")
for role in ("reward", "judge"):
    row, pairs = found[role, "held-out accuracy"], found[role, "pairs"]["value"]
    interval = f"[{float(row['low']):.2f}, {float(row['high']):.2f}] of {row['n']} held-out pairs"
    print(f"{role}, {pairs} pairs: accuracy {float(row['value']):.2f} {interval}")

# %% [markdown]
# Stop here for a moment. The reward model cannot be told from a coin: one half lies well within its interval, and
# within the judge's as well. 412 pairs are few. In a project you would now get more. We went on, to see what PPO makes
# of such a reward model.

# %%
# Pocket only
updates_of = {
    beta: [row for row in recorded("real/updates.csv") if row["beta"] == beta]
    for beta in (0.0, 0.1)
}
titles = {"proxy": "proxy", "judge": "judge", "kl": "KL, nats", "finished": "share finished"}
curves = {
    title: {f"β = {beta:g}": [row[name] for row in rows] for beta, rows in updates_of.items()}
    for name, title in titles.items()
}
plots.show(
    plots.panels(curves, "updates", {}),
    "A real model: without a price the proxy rises to three, the judge to one, KL to 30 nats, and "
    "hardly an answer ends; at 0.1 all of that stays smaller.",
)
for beta, rows in updates_of.items():
    assert rows[0]["first_ratio"] == 1 and rows[0]["kl"] == 0
    for name, part in {"first": rows[:3], "last": rows[-5:]}.items():
        values = ("proxy", "judge", "kl", "length", "finished")
        means = [sum(row[value] for row in part) / len(part) for value in values]
        print(f"β = {beta:g}, {name} {len(part)} of {len(rows)} updates: ", end="")
        print(", ".join(f"{v} {m:.2f}" for v, m in zip(values, means, strict=True)))

# %% [markdown]
# It is the same story. Without a price the proxy rises by three standard deviations within 17 updates, at almost 30
# nats, and nearly every answer runs on until it is cut off, although that costs a point. The judge rises too, by less
# than one, and no further after the first ten updates. Do not take that as an improvement: the judge is no better than
# the reward model, it has learnt from the same people, and it may like length for the same reasons. At β = 0.1 the KL
# stays at nine nats and half of the answers still end: the leash holds, but the learning rate or β is not yet right for
# this model, since even there length has doubled.
#
# What these runs do *not* show is whether any answer got better. This is one small model, few pairs and one seed, and
# the runs ended after 17 and 16 updates because the machine's time was up.
#
# ## Choosing β in a project of your own
#
# There, nobody has gold. What you can do:
#
# 1. Normalise the scores, so that their standard deviation over SFT's answers is 1. Then β has a meaning: a point
#    gained pays for up to 1/β nats, ten at β = 0.1.
# 2. Begin high and go down by factors of about three; near the edge, run more than one seed. Here one seed of ten
#    looked fine at 0.03.
# 3. In each run look at what needs no gold: KL, the share of finished answers, length, entropy, self-BLEU, each against
#    SFT's. Then read twenty answers. Here KL, the share of finished answers, length and self-BLEU gave clear warning;
#    entropy only fell, as it does in good runs too.
# 4. Have a few policies, at different KL, judged by people, or by a judge that PPO never saw. Never by the proxy.
# 5. Of the policies that you cannot tell from the best, take the one with the largest β: here 0.3, not 0.1.
# 6. Found a hole? Close it, as above; the penalty is for those that you have not found.
#
# Do not carry over a β or a target for KL unchecked: rewards have other units, and the nats of a response grow with its
# length.
#
# ## Recap
#
# - KL(π‖π_ref) is a mean over the policy's own samples. Average over anything else and it is another number.
# - In the reward, use k1 and no other; in the loss k2, or k3 if you mean the other direction, and never k1.
# - Without a price the proxy rises and gold falls: the policy finds what the reward model overpays, even what nobody
#   had thought of.
# - The larger β, the nearer the policy stays and the more varied its answers. The best β is in between, and only gold,
#   or people, can tell where.
#
# The reward model still has its holes. Who mends them? In lesson 06 you do, with sixty clicks.
#
# **Further reading.** Gao et al. 2023 (arXiv 2210.10760): gold against √KL. Ziegler et al. 2019 (arXiv 1909.08593),
# section 2.2: the controller. Schulman 2020, http://joschu.net/blog/kl-approx.html: the estimators. Tang and Munos 2025
# (arXiv 2506.09477): KL in the loss, and its gradient. Skalse et al. 2022 (arXiv 2209.13085): what hacking is. Korbak
# et al. 2022 (arXiv 2205.11275): the penalty as Bayesian inference.
