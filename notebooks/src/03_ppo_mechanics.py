# %% [markdown]
# # 03 · PPO, the mechanics
#
# **Run time** under half a minute on two CPU cores · **Before this** lesson 02 · **Next** lesson 04, PPO with
# QLoRA adapters · **Exercise** `exercises/03_ppo_mechanics.ipynb`
#
# After this lesson you will be able to
#
# - say what state, action, trajectory and reward are when a language model learns from a reward;
# - compute log-probabilities, per-token rewards, advantages and both losses of PPO by hand, and in code;
# - say which two policies the ratio compares, and which two the KL;
# - find the faults in a short `ppo_step` that looks right.

# %%
from functools import partial

import torch
from torch.nn.functional import log_softmax

from rlhf_helpers import losses, plots
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.pocket import world
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.reward import score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.text import load_tokenizer

# %%
preset = PRESETS["pocket"]  # always: every number below is about this model
plots.use_style()
tokenizer = load_tokenizer(preset)
roles = Roles(load_base(preset))
roles.load("sft", find_adapter(preset, "sft"))
roles.load("reward", find_adapter(preset, "reward"))

# %% [markdown]
# ## A language model as an agent
#
# Reinforcement learning has its own words for what we already have. The **state** $s_t$ is the prompt and
# the response so far. The **action** $a_t$ is the next token, drawn from the **policy**
# $\pi(a_t \mid s_t)$, which is the model. A **trajectory** is a whole response, up to EOS or the length
# limit. The **reward** comes once, at its end, from the reward model; the next state is simply the state
# with the token appended. So a single number has to teach every token of a response, and everything below
# is about sharing it out well.

# %%
prompts = world.prompts("held_out")[::38]
rollout = sample_responses(roles.use("sft"), tokenizer, prompts, seed=3)
mask, T = rollout.response_mask, rollout.response_mask.shape[1]
P = rollout.input_ids.shape[1] - T  # the width of the padded prompts
with torch.no_grad():
    scores = score_tokens(roles, "reward", rollout.input_ids, rollout.attention_mask)
    logprobs = response_logprobs(roles.use("sft"), rollout.input_ids, rollout.attention_mask, T)
print(f"{len(prompts)} prompts, responses of up to {T} tokens")
for prompt, text, score in list(zip(prompts, rollout.texts, scores, strict=True))[:4]:
    print(f"score {score:+.2f}  {prompt} -> {text}")

# %% [markdown]
# ## The log-probability of a given token
#
# The logits at position $t$ describe token $t + 1$. So the log-probability of a response token is found one
# place *before* it: the first is read at the last token of the prompt, and what the model says after EOS is
# never read. By hand: a vocabulary of three, a prompt of one token, and a response of two tokens (2 and 1),
# to which the model gives 1/2 and 1/4.

# %% tags=["nbval-check-output"]
tokens = torch.tensor([[0, 2, 1]])
probabilities = torch.tensor([[[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]])
logits = probabilities.log()
shifted = log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
unshifted = log_softmax(logits[:, 1:], -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
print("probability of the response, shifted:  ", shifted.exp().tolist())
print("and with the shift forgotten:          ", [round(p, 3) for p in unshifted.exp()[0].tolist()])

# %% [markdown]
# On real responses a forgotten shift is easy to see if you look: the model finds the words it wrote itself
# next to impossible.

# %%
with torch.no_grad():
    logits = roles.use("sft")(rollout.input_ids, attention_mask=rollout.attention_mask).logits
response = rollout.input_ids[:, -T:, None]
wrong = log_softmax(logits[:, -T:], -1).gather(-1, response).squeeze(-1)
real = mask.bool()
print(
    f"mean log-probability {logprobs[real].mean():.2f}, unshifted {wrong[real].mean():.2f},",
    end=" ",
)
print(f"of a blind guess {-torch.tensor(len(tokenizer)).log():.2f}")
assert logprobs[real].mean() > -1.5 and wrong[real].mean() < -5

# %% [markdown]
# ## Policy gradient, and what one step too large does
#
# The plain idea (REINFORCE, Williams 1992) is to make each sampled action likelier in proportion to how
# well it turned out, $L = -\frac1N \sum_i A_i \log \pi(a_i)$. The **advantage** $A$ is the reward minus
# what was to be expected (the code also divides by the batch's standard deviation; more on that below).
# This is right for one small step on fresh samples. But samples are expensive, and we would like to take
# several steps on each batch; after the first, the samples are those of an older policy.
#
# A problem small enough to repeat often: one state, ten actions ("arms"), each with a mean reward between 0
# and 1 and noise of 1; batches of 32; eight steps on each batch, of a size chosen to be too large. A
# hundred runs go side by side, one in each row.


# %%
def play(loss_of, steps=8, rate=4.0, batches=40, runs=100):
    """Mean reward [runs, 1 + batches] of the policy, of arms with means from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    means = torch.linspace(0, 1, 10)
    preferences, curves = torch.zeros(runs, 10), [means.mean().expand(runs)]
    for _ in range(batches):
        old = log_softmax(preferences, 1)
        actions = old.exp().multinomial(32, replacement=True, generator=generator)
        rewards = means[actions] + torch.randn(runs, 32, generator=generator)
        A = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
        for _ in range(steps):
            preferences.requires_grad_()
            new = log_softmax(preferences, 1).gather(1, actions)
            loss = runs * loss_of(new, old.gather(1, actions), A)  # each run a step of its own
            (gradient,) = torch.autograd.grad(loss, preferences)
            preferences = (preferences - rate * gradient).detach()
        curves.append(preferences.softmax(1) @ means)
    return torch.stack(curves, 1)


# %% [markdown]
# Three losses: REINFORCE as it stands; the same with each sample weighted by the **ratio** of the new to
# the old probability, $\rho = \pi(a)/\pi_{\text{old}}(a)$, which corrects for samples of an older policy;
# and PPO, which clips that ratio.

# %%
objectives = {
    "REINFORCE": lambda new, old, A: -(A * new).mean(),
    "ratio": lambda new, old, A: -(A * (new - old).exp()).mean(),
    "PPO": lambda new, old, A: losses.policy_loss(new, old, A, torch.ones_like(A))[0],
}
runs = {name: play(loss) for name, loss in objectives.items()}
series = {name: curves.mean(0).tolist() for name, curves in runs.items()}
fig = plots.lines(series, "batches", "mean reward, of 100 runs")
ends = ", ".join(f"{name} {curve[-1]:.2f}" for name, curve in series.items())
plots.show(fig, alt=f"Mean reward against batches, mean of 100 runs. At the end: {ends}.")

# %%
found = {name: int((curves[:, -1] > 0.95).sum()) for name, curves in runs.items()}
for name, curves in runs.items():
    print(
        f"{name:10} above 0.95 in {found[name]:2} of 100 runs, the worst ends at {curves[:, -1].min():.2f}"
    )
small = [play(loss, rate=0.1)[:, -1].mean().item() for loss in objectives.values()]
print("steps of a fortieth of the size: mean", [round(x, 3) for x in small])
once = play(objectives["PPO"], steps=1)
print(f"one step on each batch: {(once[:, -1] > 0.95).sum()};", end=" ")
print(f"as the ratio without clip: {torch.equal(once, play(objectives['ratio'], steps=1))}")
quarter = [play(objectives["PPO"], steps, rate=1.0)[:, 10].mean().item() for steps in (8, 1)]
print(
    "steps of a quarter of the size, mean after 10 batches: PPO with eight on each batch", end=" "
)
print(f"{quarter[0]:.2f}, with one {quarter[1]:.2f}")
assert found["PPO"] > found["REINFORCE"] > found["ratio"] and quarter[0] > quarter[1] + 0.1

# %% [markdown]
# The second-best arm has a mean of 0.89, so a run above 0.95 mostly plays the best one. Without the clip,
# eight steps on 32 lucky or unlucky samples can throw the policy onto a poor arm; from then on it samples
# nothing else and never learns better. The unclipped ratio does worst. It is right on average for a policy
# that does not depend on these samples; but on a lucky rare arm it can grow to $1/\pi_{\text{old}}$. The
# clip is slower at first and safer, but not safe: PPO too can settle on a lesser arm. With steps a fortieth
# of the size the three hardly differ, and none has arrived yet; with a single step on each batch the ratio
# is always 1, and the clip does nothing. At the full size eight steps are no better than a single one,
# which already goes far; at a quarter of it they are better, as the last line shows. That is what the clip
# is for: several steps on expensive samples, at less risk.

# %% [markdown]
# ## The clip
#
# $$L = -\frac1N \sum_t \min\bigl(\rho_t A_t,\ \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_t\bigr),
# \qquad \rho_t = \frac{\pi(a_t \mid s_t)}{\pi_{\text{old}}(a_t \mid s_t)}$$
#
# The sum runs over all response tokens of the batch, and $\epsilon$ is 0.2 here. $\pi_{\text{old}}$ is the
# policy that **sampled** the batch; it changes with every batch. (The reference, which never changes, comes
# in with the reward.)
#
# <details><summary><b>Predict before you run.</b> $A = 1$ and the ratio is 1.5. Which way does gradient
# descent push the token's log-probability? And for $A = -1$ at the same ratio?</summary>
#
# For $A = 1$ nowhere: the token is already more than 20% likelier, enough for this batch. For $A = -1$
# down: the token is bad and has become likelier, so the min keeps the unclipped term, which pulls it back.
# </details>


# %%
def objective_and_slope(ratio, advantage, epsilon):
    one, old = torch.ones(1, 1), torch.tensor([[0.5]]).log()
    new = (old + torch.tensor(ratio).log()).requires_grad_()
    loss, _ = losses.policy_loss(new, old, advantage * one, one, clip=epsilon)
    (slope,) = torch.autograd.grad(loss, new)
    return -loss.item(), -slope.item() / ratio  # with respect to the ratio


def draw_clip(advantage, ε):
    ratios = [0.505 + 0.01 * i for i in range(100)]
    points = zip(*[objective_and_slope(ratio, advantage, ε) for ratio in ratios], strict=True)
    series = {
        name: dict(zip(ratios, column, strict=True))
        for name, column in zip(("objective", "its slope"), points, strict=True)
    }
    x, y = f"ratio ρ, for an advantage of {advantage}", "objective, and its slope by ρ"
    return plots.lines(series, x, y)


for advantage, flat in ((1, "above 1 + ε"), (-1, "below 1 − ε")):
    alt = f"Advantage {advantage}, ε = {{ε}}: the objective is flat, its slope 0, {flat}."
    plots.explore(partial(draw_clip, advantage), alt, ε=[0.2, 0.05, 0.1, 0.4])

# %% [markdown]
# The clip is one-sided on purpose: it takes away the gain from going further in the right direction, but
# never blocks the way back. It does not keep the ratio between 0.8 and 1.2: another token's gradient can
# still push it out, and a single large step can jump the fence. (With a running kernel and ipywidgets,
# sliders change ε.)
#
# ## The reward of each token
#
# The score comes at the last token. PPO for language models also charges each token a price: β times the
# log-ratio of the policy that sampled to the **reference**, the SFT model:
#
# $$r_t = -\beta \log \frac{\pi_{\text{old}}(a_t \mid s_t)}{\pi_{\text{ref}}(a_t \mid s_t)} + [t \text{ is the last}] \cdot \text{score}$$
#
# As long as the policy is the reference, the price is 0; lesson 05 is about it. By hand, three tokens and a
# score of 2: the policy finds the first token twice as likely as the reference does, and the last half as
# likely.

# %% tags=["nbval-check-output"]
policy, reference = torch.tensor([[0.5, 0.2, 0.3]]).log(), torch.tensor([[0.25, 0.2, 0.6]]).log()
rewards = losses.shape_rewards(torch.tensor([2.0]), policy, reference, torch.ones(1, 3), beta=0.1)
print([round(x, 4) for x in rewards[0].tolist()], "= -0.1 log 2, 0, 2 + 0.1 log 2")

# %% [markdown]
# ## The critic, TD errors, GAE
#
# A second model, the **critic**, predicts at each state what reward is still to come: $V(s_t)$. If the
# critic is right, a token that raises the prediction is a good one, and a token that lowers it a bad one.
# The **TD error** (temporal difference) measures that: $\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)$. After
# the last token there is no state, so $V = 0$; we do the same where a response is cut off at the length
# limit. A discount γ below 1 would make late rewards count less; here γ = 1. Four tokens by hand, with the
# reward 1 at the end:

# %% tags=["nbval-check-output"]
rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
values = torch.tensor([[0.2, 0.6, 0.5, 0.9]])
next_values = torch.tensor([[0.6, 0.5, 0.9, 0.0]])
deltas = rewards + next_values - values
print("TD errors", [round(x, 2) for x in deltas[0].tolist()])

# %% [markdown]
# The first token raised hopes from 0.2 to 0.6, and the second lowered them a little. If the critic is
# right, that is all we need. If it is not, later errors tell more. GAE (generalised advantage estimation,
# Schulman et al. 2016) mixes them, with one more factor λ for each step further on:
#
# $$A_t = \delta_t + \gamma\lambda\,\delta_{t+1} + (\gamma\lambda)^2 \delta_{t+2} + \dots
# \qquad R_t = A_t + V(s_t)$$
#
# The return $R_t$ is what the critic will be trained to predict. By hand, from the last token backwards,
# with λ = 0.5:

# %% tags=["nbval-check-output"]
advantage, by_hand = 0.0, []
for delta in reversed(deltas[0].tolist()):
    advantage = delta + 0.5 * advantage
    by_hand.insert(0, round(advantage, 4))
print("λ = 0.5, by hand   ", by_hand)
for lam in (0.5, 0.0, 1.0):
    advantages, returns = losses.gae(rewards, values, torch.ones(1, 4), lam=lam)
    print(f"λ = {lam}: advantages", [round(x, 4) for x in advantages[0].tolist()], end=" ")
    print("returns", [round(x, 4) for x in returns[0].tolist()])

# %% [markdown]
# λ = 0 trusts the critic: the TD error alone. λ = 1 trusts the outcome: the return is 1 everywhere,
# whatever the critic said. For any λ the loop over tokens equals one product with a triangle of weights,
# and that is how the helper computes it.

# %%
weights = losses.gae_weights(8, 0.7)
columns, rows = [f"A at {t}" for t in range(8)], [f"δ at {t}" for t in range(8)]
fig = plots.heat_map(weights.tolist(), columns, rows, "weight")
alt = "A triangle: a TD error weighs 1 at its own token, and 0.7 of that with each token before."
plots.show(fig, alt=alt)
by_matrix = deltas @ losses.gae_weights(4, 0.5).float()
print("advantages as a product:", [round(x, 4) for x in by_matrix[0].tolist()])

# %% [markdown]
# Each column holds the weights of one advantage. An error never counts for a later token: a token cannot be
# praised for what was written before it.
#
# The same on real responses. For now the reward model itself serves as the critic: it has never seen an
# unfinished response, but it will give an opinion.

# %%
beta = 0.1
with torch.no_grad():
    ids, attention = rollout.input_ids, rollout.attention_mask
    values = roles.values("reward", ids, attention)[:, P - 1 : -1]
rewards = losses.shape_rewards(
    scores, logprobs, logprobs, mask, beta
)  # the policy is the reference
advantages, returns = losses.gae(rewards, values, mask, gamma=1.0, lam=0.95)
best = int(scores.argmax())
words = tokenizer.convert_ids_to_tokens(ids[best, P:][real[best]].tolist())
print(prompts[best])
for t, word in enumerate(words[:3]):
    before = tokenizer.decode(ids[best, P + t - 1])
    print(
        f"a_{t} is {word!r}: logits and value are read at {before!r}, column {P + t - 1} of {P + T}"
    )

# %%
names = ["log π(a)", "value V(s)", "reward r", "advantage A", "return R"]
quantities = (logprobs, values, rewards, advantages, returns)
table = [quantity[best][real[best]].tolist() for quantity in quantities]
fig = plots.heat_map(
    table, [word.replace("Ġ", "") for word in words], names, "nats; standard deviations"
)
alt = "One column for each token of a response; rows for log-probability, value, reward, advantage, return. "
plots.show(fig, alt=alt + "The reward is 0 but for the last token; the advantages are not.")

# %% [markdown]
# This is the map of all indices. Each column holds the numbers of one token $a_t$: its log-probability and
# the value of the state *before* it, both read at the token before; its reward; its advantage, which is its
# share of the praise; and the return, which is value plus advantage. The first row is in nats, the others
# in standard deviations of the reward model. The policy here is still the reference, so the only reward is
# the score. Even in the best response of the batch most tokens are blamed: this critic has never judged
# half a sentence, and expects too much of most.
#
# ## The critic's loss, and whitening
#
# The critic minimises half the squared error to the returns, clipped in the same spirit: where its value
# has moved by more than $\epsilon_V$ since the time of sampling, the larger of two errors counts,
#
# $$L_V = \frac1{2N} \sum_t \max\bigl((V_t - R_t)^2,\ (\operatorname{clip}(V_t, V_t^{\text{old}} \pm \epsilon_V) - R_t)^2\bigr)$$
#
# By hand, with $\epsilon_V = 0.2$: the critic said 0, the return is 1, and now it says 0.1, 0.2, 0.5 or
# −0.5. Beyond 0.2 there is nothing more to gain; a move the wrong way counts in full.

# %% tags=["nbval-check-output"]
old, target, one = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
for value in (0.1, 0.2, 0.5, -0.5):
    loss, stats = losses.value_loss(torch.tensor([[value]]), old, target, one, clip=0.2)
    print(f"says {value:4}: loss {loss:.3f}, clipped {stats['clip_fraction']:.0%}")

# %% [markdown]
# **Whitening**: before they are used, the batch's advantages are shifted and scaled to mean 0 and standard
# deviation 1, so that the size of a step does not depend on the unit of the reward. The *returns* are left
# as they are: the critic has to predict them, and if they were whitened, its values and the rewards would
# have different units next time.
#
# How good is the critic? The **explained variance** is
# $1 - \operatorname{Var}(R - V)/\operatorname{Var}(R)$: 1 for a perfect critic, 0 for one that always says
# the same, below 0 for one that is worse still. It is blind to a constant error, so we print the mean of
# $R - V$ beside it. (With λ below 1 the returns contain the values, so the critic is partly judged against
# itself.)

# %%
white = losses.whiten(advantages, mask)
for name, numbers in (("advantages", advantages[real]), ("whitened", white[real])):
    print(f"{name:10} mean {numbers.mean():+.3f}, standard deviation {numbers.std():.3f}")
untrained = losses.value_loss(values, values, returns, mask)[1]["explained_variance"]
print(f"explained variance of the untrained critic {untrained:.2f},", end=" ")
print(f"mean of R - V {(returns - values)[real].mean():.2f}")

# %% [markdown]
# ## An audit
#
# A short `ppo_step` is easy to write, and easy to get wrong. This one, in our own words, has four faults
# that are found in the wild, and invites one more (number 4 below). It runs and returns a loss.


# %%
def ppo_step(logprobs, ref_logprobs, score, epsilon=0.2):
    ratio = (logprobs - ref_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio, clipped).mean()


# %% [markdown]
# We try it on the responses from above, with the raw base model as the reference, so that policy and
# reference differ, as they will after some updates.

# %%
roles.add("base")  # a fresh adapter changes nothing
with torch.no_grad():
    base_logprobs = response_logprobs(roles.use("base"), ids, attention, T)

loss, doubled = (ppo_step(logprobs, base_logprobs, s) for s in (scores, 2 * scores))
print(f"loss {loss:.4f}; with all scores doubled {doubled:.4f}")

# %% [markdown]
# **Fault 1: the reward is not used.** The function takes it and forgets it, so the loss only asks responses
# to become likelier than under the reference, whatever they say. Mend: multiply by the score.


# %%
def with_reward(logprobs, ref_logprobs, score, epsilon=0.2):
    A, ratio = score[:, None], (logprobs - ref_logprobs).exp()
    return -torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A).mean()


loss, doubled = (with_reward(logprobs, base_logprobs, s) for s in (scores, 2 * scores))
print(f"loss {loss:.4f}, with all scores doubled {doubled:.4f}")
nudged = torch.where(real, logprobs, logprobs - 1)
print(
    f"with the padding's log-probabilities lowered by 1 {with_reward(nudged, base_logprobs, scores):.4f}"
)

# %% [markdown]
# **Fault 2: padding counts.** What stands after EOS changes the loss, though nobody wrote it; here it is
# about half of the batch. Mend: take the mean over the response mask.


# %%
def with_mask(logprobs, ref_logprobs, score, mask, epsilon=0.2):
    A, ratio = score[:, None], (logprobs - ref_logprobs).exp()
    objective = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
    return -(objective * mask).sum() / mask.sum()


loss, lowered = (with_mask(these, base_logprobs, scores, mask) for these in (logprobs, nudged))
print(f"{1 - mask.float().mean():.0%} padding; loss {loss:.4f}, with padding lowered {lowered:.4f}")
ratio = (logprobs - base_logprobs).exp()[real]
outside = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
print(f"mean ratio {ratio.mean():.2f}, outside of the clip {outside:.0%}, before the first step")

# %% [markdown]
# **Fault 3: the ratio is taken against the reference.** Nothing has been learnt from this batch yet, so
# every ratio should be 1. Instead many lie outside the clip, and the distance to the *reference* now
# decides what may be learnt from. Mend: compare with the policy that sampled, and let the reference enter
# where it belongs, through the reward.

# %%
A = scores[:, None] * mask.float()
loss, stats = losses.policy_loss(logprobs, logprobs, A, mask)
print(f"mean ratio {stats['ratio']}, clipped {stats['clip_fraction']:.0%}, loss {loss:.4f}")
priced = losses.shape_rewards(scores, logprobs, base_logprobs, mask, beta=0.1)
A = priced.sum(-1, keepdim=True) * mask.float()
loss, _ = losses.policy_loss(logprobs, logprobs, A, mask)
print(f"with the price of KL in the reward: loss {loss:.4f}")

# %% [markdown]
# **Fault 4: the old log-probabilities are not kept.** The function has no argument for them, so whoever
# mends fault 3 in a hurry compares with `logprobs.detach()`. In the first step it makes no difference
# whether they were kept from sampling or are computed anew. After one real step, on a copy of the policy,
# it does:

# %%
roles.add("policy", copy_of="sft")
optimizer = torch.optim.Adam(roles.parameters("policy").values(), lr=1e-3)
new = response_logprobs(roles.use("policy"), ids, attention, T)
losses.policy_loss(new, logprobs, A, mask)[0].backward()
optimizer.step()
with torch.no_grad():
    new = response_logprobs(roles.use("policy"), ids, attention, T)
for name, old in (("kept", logprobs), ("computed anew", new)):
    _, stats = losses.policy_loss(new, old, A, mask)
    print(f"old {name:13}: mean ratio {stats['ratio']:.3f}, clipped {stats['clip_fraction']:.0%}")

# %% [markdown]
# Computed anew, the ratio is always 1, and the clip never does anything. Mend: compute them once per batch,
# and keep them.
#
# **Fault 5: no advantages.** Every token of a response gets the same weight, the whole outcome, and there
# is no baseline. Like REINFORCE, this is right on average, but needlessly noisy. Mend: GAE with the critic,
# whitened. How many responses have tokens of both signs?

# %%
shared, targets = losses.gae(priced, values, mask, gamma=1.0, lam=0.95)
versions = {"the outcome": A, "GAE": shared, "GAE, whitened": losses.whiten(shared, mask)}
for name, numbers in versions.items():
    positive = [(row[keep] > 0).float().mean() for row, keep in zip(numbers, real, strict=True)]
    both = sum(bool(0 < share < 1) for share in positive)
    loss, _ = losses.policy_loss(logprobs, logprobs, numbers, mask)
    print(f"{name:14} loss {loss:+.4f}, tokens of both signs in {both} of {len(prompts)} responses")

# %% [markdown]
# Without whitening this critic blames nearly everything, since it expects too much. And with an explained
# variance below 0 there is no sign that its praise and blame *within* a response are more than noise; the
# next lesson trains it. In the first step the loss is minus the mean of the whitened advantages, 0: what
# matters is its gradient.
#
# ## The whole update
#
# ```
# sample a response to each prompt of the batch                      policy
# once per batch, without gradients:
#     scores, at the last token                                      reward model
#     old log-probs, reference log-probs, old values                 policy, reference, critic
#     rewards     = -beta * (old - reference), + score at the end
#     advantages, returns = GAE(rewards, old values);  advantages whitened
# for each of a few epochs, for each minibatch:
#     new log-probs -> policy loss (ratio to old)   -> backward, step   policy
#     new values    -> value loss (to the returns)  -> backward, step   critic
# sample again: the old policy is now the one just trained
# ```
#
# Usual numbers: β 0.1 here (0.01 to 0.1 elsewhere), γ = 1, λ = 0.95, ε = 0.2, two to four epochs. The
# reference and the reward model never change. In our set-up the two losses share no weights, so each has an
# optimizer of its own and there is no coefficient between them. (Some programs subtract a multiple of the
# entropy from the loss, a bonus for variety; this one does not.)
#
# ## Sanity first
#
# Before any run, look at the first step. The policy is a copy of the reference and nothing has been learnt
# from the batch, so two numbers must be *exactly* right: every ratio is 1, and the KL is 0. (KL here is the
# mean over responses of $\sum_t \log \pi/\pi_{\text{ref}}$; `approx_kl`: the mean over tokens of
# $\rho - 1 - \log \rho$, an estimate of how far the new policy is from the old.)

# %%
roles.add("fresh", copy_of="sft")
with torch.no_grad():
    new = response_logprobs(roles.use("fresh"), ids, attention, T)
    cold = response_logprobs(roles.use("fresh"), ids, attention, T, temperature=0.7)
for name, scored in (("as it should be", new), ("the new one scored at temperature 0.7", cold)):
    _, stats = losses.policy_loss(scored, logprobs, losses.whiten(shared, mask), mask)
    kl = (scored - logprobs)[real].sum().item() / len(prompts)
    print(f"{name}: ratio {stats['ratio']:.4f}, clipped {stats['clip_fraction']:.0%}, KL {kl:.4f}")
assert torch.equal(new, logprobs)

# %% [markdown]
# (A KL clearly below 0 is itself a sign of a fault: the samples are not from the policy that scores them.)
# This test shows what differs between the two scorings: a temperature, a shift, dropout. It does not show
# what both share: a shift missing in both, or a *sampler* with settings other than the scorer's. For that,
# compare the mean surprise at the samples with the mean entropy of the distributions they should come from;
# on average they are equal.

# %%
from rlhf_helpers.logprobs import token_entropy

for temperature in (1.0, 0.5):
    drawn = sample_responses(
        roles.use("fresh"), tokenizer, prompts, seed=1, temperature=temperature
    )
    tokens, counted = drawn.input_ids, drawn.response_mask.bool()
    width = counted.shape[1]
    with torch.no_grad():
        scored = response_logprobs(roles.use("fresh"), tokens, drawn.attention_mask, width)
        logits = roles.model(tokens, attention_mask=drawn.attention_mask).logits[:, -width - 1 : -1]
    entropy = token_entropy(logits)[counted].mean()
    print(
        f"sampled at {temperature}: surprise {-scored[counted].mean():.2f}, entropy {entropy:.2f}"
    )

# %% [markdown]
# The last line is a failure on purpose. Nothing crashes, and all ratios would be 1, since the old
# log-probabilities come from the same scorer; yet the samples are not those of the policy that is being
# trained. On 16 prompts the two numbers also differ by luck: try other seeds to see by how much.
#
# ## The numbers of this lesson

# %% tags=["headline"]
print(f"explained variance of an untrained critic {untrained:.2f}; arms above 0.95:", end=" ")
print(", ".join(f"{name} {count}" for name, count in found.items()), "of 100 runs")

# %% [markdown]
# ## Recap
#
# - Each response token is an action; the reward comes at the end, and GAE shares it out with the help of a
#   critic.
# - The ratio compares the new policy with the one that sampled; the KL compares it with the reference.
# - The clip takes away the gain from going too far on one batch; the mask keeps padding out of everything.
# - In the first step of every update each ratio is 1; in the first update of a run the KL to the reference is 0 too.
#
# **Further reading.** Schulman et al. 2017 (arXiv 1707.06347), equation 7: the clip. Schulman et al. 2016 (arXiv
# 1506.02438), equation 16: GAE. Ziegler et al. 2019 (arXiv 1909.08593), equation 2: the KL in the reward.
# Huang et al. 2024 (arXiv 2403.17031): the details that matter, one by one.
