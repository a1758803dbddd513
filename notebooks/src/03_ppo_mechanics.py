# %% [markdown]
# # 03 · PPO, the mechanics
#
# **Run time** about one minute on two CPU cores · **Before this** lesson 02 · **Next** lesson 04, PPO with
# QLoRA adapters · **Exercise** `exercises/03_ppo_mechanics.ipynb`
#
# After this lesson you will be able to
#
# - say what state, action, trajectory and reward are when a language model learns from a reward;
# - compute log-probabilities, per-token rewards, advantages and both losses of PPO by hand, and in code;
# - say which two policies the ratio compares, and which two the KL;
# - find the faults in a short `ppo_step` that looks right.

# %%
PRESET = "pocket"  # every number below is from this preset

import torch
from torch.nn.functional import log_softmax

from rlhf_helpers import plots, ppo
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.data import load_tokenizer
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.pocket import world
from rlhf_helpers.presets import load_preset
from rlhf_helpers.reward import score_tokens
from rlhf_helpers.roles import Roles, load_base
from rlhf_helpers.rollout import sample_responses

# %%
preset = load_preset(PRESET)
plots.use_style()
tokenizer = load_tokenizer(preset)
roles = Roles(load_base(preset))
roles.load("sft", find_adapter(preset, "sft"))
roles.load("reward", find_adapter(preset, "reward"))

# %% [markdown]
# ## A language model as an agent
#
# Reinforcement learning has its own words for what we have. The **state** $s_t$ is the prompt and the
# response so far. The **action** $a_t$ is the next token, drawn from the **policy** $\pi(a_t \mid s_t)$:
# the model. A **trajectory** is a whole response, up to EOS. The **reward** comes once, at its end, from
# the reward model; the next state is simply the state with the token appended. So one number has to
# teach all tokens of a response, and everything below is about sharing it out well.

# %%
prompts = world.prompts("held_out")[::40][:16]
rollout = sample_responses(roles.use("sft"), tokenizer, prompts, seed=3)
mask, T = rollout.response_mask, rollout.response_mask.shape[1]
P = rollout.input_ids.shape[1] - T
with torch.no_grad():
    scores = score_tokens(roles, "reward", rollout.input_ids, rollout.attention_mask)
    logprobs = response_logprobs(roles.use("sft"), rollout.input_ids, rollout.attention_mask, T)
for prompt, text, score in list(zip(prompts, rollout.texts, scores, strict=True))[:4]:
    print(f"score {score:+.2f}  {prompt} -> {text}")

# %% [markdown]
# ## The log-probability of a given token
#
# The logits at position $t$ are the distribution of token $t + 1$. So the log-probability of a response
# token stands one place *before* it: the first is read at the last token of the prompt, and what the
# model says after EOS is read nowhere. By hand: a vocabulary of three, a prompt of one token, a response
# of two (tokens 2 and 1). The model gives them 1/2 and 1/4.

# %% tags=["nbval-check-output"]
tokens = torch.tensor([[0, 2, 1]])
probabilities = torch.tensor([[[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]])
logits = probabilities.log()
shifted = log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
unshifted = log_softmax(logits[:, 1:], -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
print("probability of the response, shifted:  ", shifted.exp().tolist())
print("and with the shift forgotten:          ", [round(p, 3) for p in unshifted.exp()[0].tolist()])

# %% [markdown]
# On real responses the forgotten shift is easy to see, if one looks: the model that wrote the text finds
# its own words next to impossible.

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
# The plain idea (Williams 1992, REINFORCE): make each sampled action likelier in proportion to how good it
# turned out, $L = -\frac1N \sum_i A_i \log \pi(a_i)$, with the **advantage** $A$: the reward, less what was to be
# expected. It is right for one small step on fresh samples. But samples are dear, and we would like to
# take several steps on each batch; after the first, the samples are those of an older policy.
#
# A problem small enough to repeat often: one state, ten actions ("arms"), each with a mean reward between
# 0 and 1 and noise of 1; batches of 32; eight steps, of a size chosen to be too large, on each batch.


# %%
def play(loss_of, seed, steps, rate=4.0, batches=40):
    """Mean reward of the policy after each batch, of arms whose best has mean 1."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.linspace(0, 1, 10)
    preferences = torch.zeros(10, requires_grad=True)
    curve = []
    for _ in range(batches):
        old = log_softmax(preferences.detach(), 0)
        actions = old.exp().multinomial(32, replacement=True, generator=generator)
        rewards = means[actions] + torch.randn(32, generator=generator)
        for _ in range(steps):
            new = log_softmax(preferences, 0)[actions]
            loss = loss_of(new, old[actions], ppo.whiten(rewards, ones))
            (gradient,) = torch.autograd.grad(loss, preferences)
            preferences = (preferences - rate * gradient).detach().requires_grad_()
        curve.append((preferences.softmax(0) @ means).item())
    return curve


# %% [markdown]
# Three losses: REINFORCE as it stands; the same with each sample weighted by the **ratio** of the new to
# the old probability, $\rho = \pi(a)/\pi_{\text{old}}(a)$, which is what old samples ask for; and PPO, which
# clips that ratio.

# %%
ones = torch.ones(32)
losses = {
    "REINFORCE": lambda new, old, A: -(A * new).mean(),
    "ratio": lambda new, old, A: -(A * (new - old).exp()).mean(),
    "PPO": lambda new, old, A: ppo.policy_loss(new[None], old[None], A[None], ones[None])[0],
}
runs = {name: [play(loss, seed, 8) for seed in range(10)] for name, loss in losses.items()}
series = {name: torch.tensor(curves).mean(0).tolist() for name, curves in runs.items()}
fig = plots.lines(series, "batches", "mean reward, of 10 seeds")
ends = ", ".join(f"{name} {curve[-1]:.2f}" for name, curve in series.items())
plots.show(fig, alt=f"Mean reward against batches, mean of ten seeds. At the end: {ends}.")
for name, curves in runs.items():
    last = sorted(curve[-1] for curve in curves)
    found = sum(x > 0.95 for x in last)
    spread = f"ends at {last[0]:.2f} to {last[-1]:.2f}"
    print(f"{name:10} is above 0.95 on {found:2} of 10 seeds, {spread}")
once = [play(losses["PPO"], seed, 1)[-1] for seed in range(10)]
same = once == [play(losses["ratio"], seed, 1)[-1] for seed in range(10)]
print(f"one step on each batch: above 0.95 on {sum(x > 0.95 for x in once)}; PPO as ratio: {same}")
assert sum(c[-1] > 0.95 for c in runs["PPO"]) > sum(c[-1] > 0.95 for c in runs["ratio"])

# %% [markdown]
# Without the clip the policy can throw itself, in eight steps on 32 lucky or unlucky samples, onto a poor
# arm; then it samples nothing else, and never learns better. The clip costs speed at first and makes the
# end safe. With a single step on each batch the ratio is 1 throughout and the clip does nothing. The
# figure shows one step size, at which the difference is large; with small steps all three get there.

# %% [markdown]
# ## The clip
#
# $$L = -\frac1N \sum_t \min\bigl(\rho_t A_t,\ \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_t\bigr),
# \qquad \rho_t = \frac{\pi(a_t \mid s_t)}{\pi_{\text{old}}(a_t \mid s_t)}$$
#
# The sum is over all response tokens of the batch, $\epsilon$ is 0.2 here. $\pi_{\text{old}}$ is the policy that
# **sampled**; it moves on with every batch. (The reference, which never moves, comes in with the reward.)
#
# <details><summary><b>Predict before you run.</b> $A = 1$ and the ratio is 1.5. What is the gradient? And for
# $A = -1$ at the same ratio?</summary>
#
# For $A = 1$ it is 0: the token is likelier by more than 20% already, enough for this batch. For $A = -1$ it
# is not: the token is bad and has become likelier, so the min keeps the unclipped term, which pulls it back.
# </details>


# %%
def objective_and_slope(ratio, advantage):
    one, old = torch.ones(1, 1), torch.tensor([[0.5]]).log()
    new = (old + torch.tensor(ratio).log()).requires_grad_()
    loss, _ = ppo.policy_loss(new, old, advantage * one, one)
    (slope,) = torch.autograd.grad(loss, new)
    return -loss.item(), -slope.item() / ratio  # by the ratio, not by its logarithm


ratios = [0.505 + 0.01 * i for i in range(100)]
for advantage in (1, -1):
    points = [objective_and_slope(ratio, advantage) for ratio in ratios]
    objective, slope = (
        dict(zip(ratios, column, strict=True)) for column in zip(*points, strict=True)
    )
    series = {"objective": objective, "its slope": slope}
    fig = plots.lines(series, f"ratio ρ, for an advantage of {advantage}", "per token")
    flat = "above 1.2" if advantage > 0 else "below 0.8"
    plots.show(fig, alt=f"Advantage {advantage}: the objective is flat, its slope 0, {flat}.")

# %% [markdown]
# The clip is one-sided on purpose: it takes away the reward for going further in the right direction, and
# never the way back. It does not keep the ratio inside 0.8 to 1.2: another token's gradient can still push
# it out, and a single large step can jump the fence.
#
# ## The reward of each token
#
# The score comes at the last token. To it PPO for language models adds a price on every token: β times
# the log-ratio to the **reference**, the SFT model. Lesson 05 is about that price. By hand: three tokens, of
# which the policy finds the first twice as likely as the reference, the last half as likely; a score of 2.

# %% tags=["nbval-check-output"]
policy, reference = torch.tensor([[0.5, 0.2, 0.3]]).log(), torch.tensor([[0.25, 0.2, 0.6]]).log()
rewards = ppo.shape_rewards(torch.tensor([2.0]), policy, reference, torch.ones(1, 3), beta=0.1)
print([round(x, 4) for x in rewards[0].tolist()], "= -0.1 log 2, 0, 2 + 0.1 log 2")

# %% [markdown]
# ## The critic, TD errors, GAE
#
# A second model, the **critic**, predicts at each state what reward is still to come: $V(s_t)$. A token that
# changes the prediction is a good or a bad one: the **TD error** is
# $\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)$, and after EOS there is no state, so $V = 0$. A discount γ below 1
# would make late rewards count less; here γ = 1. Four tokens by hand, with the reward 1 at the end:

# %% tags=["nbval-check-output"]
rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
values = torch.tensor([[0.2, 0.6, 0.5, 0.9]])
next_values = torch.tensor([[0.6, 0.5, 0.9, 0.0]])
deltas = rewards + next_values - values
print("TD errors", [round(x, 2) for x in deltas[0].tolist()])

# %% [markdown]
# The first token raised the hopes from 0.2 to 0.6, and the second lowered them a little. If the critic is
# right, that is all one needs. If it is not, the errors that follow say more. GAE (generalised advantage
# estimation, Schulman et al. 2016) mixes them, each further one counting λ times less:
#
# $$A_t = \delta_t + \gamma\lambda\,\delta_{t+1} + (\gamma\lambda)^2 \delta_{t+2} + \dots
# \qquad R_t = A_t + V(s_t)$$
#
# The return $R_t$ is what the critic will be trained to predict. Backwards, by hand, with λ = 0.5:

# %% tags=["nbval-check-output"]
advantage, by_hand = 0.0, []
for delta in reversed(deltas[0].tolist()):
    advantage = delta + 0.5 * advantage
    by_hand.insert(0, round(advantage, 4))
print("λ = 0.5, by hand   ", by_hand)
for lam in (0.5, 0.0, 1.0):
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 4), lam=lam)
    print(f"λ = {lam}: advantages", [round(x, 4) for x in advantages[0].tolist()], end=" ")
    print("returns", [round(x, 4) for x in returns[0].tolist()])

# %% [markdown]
# λ = 0 trusts the critic: the TD error alone. λ = 1 trusts the outcome: the return is 1 everywhere, whatever
# the critic said. In between, the loop over tokens is one product with a triangle of weights, and that is
# how the helper computes it.

# %%
weights = ppo.gae_weights(8, 0.7)
columns, rows = [f"A at {t}" for t in range(8)], [f"δ at {t}" for t in range(8)]
fig = plots.heat_map(weights.tolist(), columns, rows, "weight")
alt = "A triangle: a TD error weighs 1 at its own token and 0.7 times less with each token before."
plots.show(fig, alt=alt)
by_matrix = deltas @ ppo.gae_weights(4, 0.5).float()
print("advantages as a product:", [round(x, 4) for x in by_matrix[0].tolist()])

# %% [markdown]
# Each column holds the weights of one advantage. No error is counted for tokens that came after it: a
# token cannot be praised for what was written before.
#
# The same on real responses. The critic is, for now, a copy of the reward model: it has never seen an
# unfinished response, but it has an opinion.

# %%
beta = 0.1
with torch.no_grad():
    ids, attention = rollout.input_ids, rollout.attention_mask
    values = roles.values("reward", ids, attention)[:, P - 1 : -1]
rewards = ppo.shape_rewards(scores, logprobs, logprobs, mask, beta)  # the policy is the reference
advantages, returns = ppo.gae(rewards, values, mask)
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
    table, [word.replace("Ġ", "") for word in words], names, "nats, or standard deviations"
)
alt = "One column for each token of a response; rows for log-probability, value, reward, advantage, return. "
plots.show(fig, alt=alt + "The reward is 0 but for the last token; the advantages are not.")

# %% [markdown]
# This is the map of all indices. In each column stand the numbers of one token $a_t$: its log-probability
# and the value of the state *before* it, both read at the token before; its reward; its share of the
# praise. The policy here is still the reference, so the only reward is the score. Before the critic has
# been trained the shares mean little: it judges half a sentence as if it were a whole one.
#
# ## The critic's loss, and whitening
#
# The critic minimises half the squared error to the returns, clipped in the same spirit: within a batch it
# may move its prediction by at most 0.2 for credit. By hand: it said 0, the return is 1, and it says now 0.1,
# 0.2 and 0.5.

# %% tags=["nbval-check-output"]
old, target, one = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
for value in (0.1, 0.2, 0.5):
    loss, stats = ppo.value_loss(torch.tensor([[value]]), old, target, one)
    print(f"says {value}: loss {loss:.3f}, clipped {stats['clip_fraction']:.0%}")

# %% [markdown]
# **Whitening**: before they are used, the batch's advantages are shifted and scaled to mean 0 and standard
# deviation 1, so that the size of a step does not depend on the unit of the reward. The *returns* are not:
# the critic has to predict them as they are, or next time its values and the rewards have different units.

# %%
white = ppo.whiten(advantages, mask)
print(
    f"advantages: mean {advantages[real].mean():+.3f}, standard deviation {advantages[real].std():.3f}"
)
print(f"whitened:   mean {white[real].mean():+.3f}, standard deviation {white[real].std():.3f}")
_, stats = ppo.value_loss(values, values, returns, mask)
print(
    f"the untrained critic explains {stats['explained_variance']:.0%} of the variance of the returns"
)

# %% [markdown]
# ## An audit
#
# Short `ppo_step` functions circulate in tutorials, and most of them look like this one, written here in
# our own words. It runs and returns a loss. Five things are wrong with it.


# %%
def ppo_step(logprobs, ref_logprobs, score, epsilon=0.2):
    ratio = (logprobs - ref_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio, clipped).mean()


# %% [markdown]
# We try it on the responses from above. As the reference it gets the raw base model, so that policy and
# reference differ, as they will after some updates.

# %%
roles.add("base")  # a fresh adapter changes nothing
with torch.no_grad():
    base_logprobs = response_logprobs(roles.use("base"), ids, attention, T)

first = ppo_step(logprobs, base_logprobs, scores)
print(
    f"loss {first:.4f}; with all scores doubled {ppo_step(logprobs, base_logprobs, 2 * scores):.4f}"
)

# %% [markdown]
# **Fault 1: the reward is not used.** The function takes it and forgets it; there is no advantage at all, and so
# the loss only asks to become likelier than the reference, whatever was said. Mend: weigh with the score.


# %%
def with_reward(logprobs, ref_logprobs, score, epsilon=0.2):
    A, ratio = score[:, None], (logprobs - ref_logprobs).exp()
    return -torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A).mean()


print(f"loss {with_reward(logprobs, base_logprobs, scores):.4f},", end=" ")
print(f"with all scores doubled {with_reward(logprobs, base_logprobs, 2 * scores):.4f}")
nudged = torch.where(real, logprobs, logprobs - 1)
print(
    f"with the log-probabilities at padding lowered by 1 {with_reward(nudged, base_logprobs, scores):.4f}"
)

# %% [markdown]
# **Fault 2: padding counts.** What stands behind EOS changes the loss, though nobody wrote it: here
# that is nearly half of the batch. Mend: the mean over the response mask.


# %%
def with_mask(logprobs, ref_logprobs, score, mask, epsilon=0.2):
    A, ratio = score[:, None], (logprobs - ref_logprobs).exp()
    objective = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
    return -(objective * mask).sum() / mask.sum()


print(f"{1 - mask.float().mean():.0%} of the positions are padding")
for name, these in (("as it is", logprobs), ("padding lowered", nudged)):
    print(f"loss {with_mask(these, base_logprobs, scores, mask):.4f}, {name}")
ratio = (logprobs - base_logprobs).exp()[real]
outside = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
print(f"mean ratio {ratio.mean():.2f}, outside of the clip {outside:.0%}, before the first step")

# %% [markdown]
# **Faults 3 and 4: the ratio is taken against the reference, and the old log-probabilities are not kept.** Nothing
# has been learnt from this batch yet, so every ratio should be 1. Instead many lie outside of the clip, which
# now decides by the distance to the *reference* what may be learnt from. Mend: keep the log-probabilities of
# the policy that sampled, compare with those, and let the reference enter through the reward.


# %%
def with_old(logprobs, old_logprobs, rewards, mask):
    return ppo.policy_loss(
        logprobs, old_logprobs, rewards.sum(-1, keepdim=True) * mask.float(), mask
    )


rewards = ppo.shape_rewards(scores, logprobs, base_logprobs, mask, beta)
loss, stats = with_old(logprobs, logprobs, rewards, mask)
print(f"loss {loss:.4f}, mean ratio {stats['ratio']}, clipped {stats['clip_fraction']:.0%}")
print(f"KL penalty {beta * (logprobs - base_logprobs)[real].sum() / len(scores):.3f} per response")
blamed = (rewards.sum(-1) > 0).float().mean()
print(f"{blamed:.0%} of the responses have all of their tokens praised, the others all blamed")

# %% [markdown]
# **Fault 5: no critic.** Each token of a response gets the same weight, its share in the outcome or not. Mend:
# advantages by GAE, whitened.

# %%
advantages, returns = ppo.gae(rewards, values, mask)
white = ppo.whiten(advantages, mask)
loss, stats = ppo.policy_loss(logprobs, logprobs, white, mask)
mixed = [(row[keep] > 0).float().mean().item() for row, keep in zip(white, real, strict=True)]
both = sum(0 < share < 1 for share in mixed) / len(mixed)
print(f"loss {loss:.4f}; {both:.0%} of the responses have praised and blamed tokens")

# %% [markdown]
# That is PPO as lesson 04 runs it, but for the steps. At the first step its loss is minus the mean of the
# whitened advantages, so 0; what matters is the gradient.
#
# ## Sanity first
#
# Before any run, look at the first step. The policy is a copy of the reference and nothing has been learnt
# from the batch, so two numbers must be *exactly* right: every ratio 1, the KL 0. A sampling setting that
# the scoring does not share, a shift in one of two places, dropout: each shows here, before it costs an hour.

# %%
roles.add("policy", copy_of="sft")
with torch.no_grad():
    new = response_logprobs(roles.use("policy"), ids, attention, T)
_, stats = ppo.policy_loss(new, logprobs, white, mask)
kl = (new - logprobs)[real].sum().item()
print(f"ratio {stats['ratio']}, KL {kl}, approximate KL {stats['approx_kl']}")
assert stats["ratio"] == 1 and kl == 0
hot = response_logprobs(roles.use("policy"), ids, attention, T, temperature=0.7).detach()
_, stats = ppo.policy_loss(hot, logprobs, white, mask)
print(
    f"scored at another temperature than sampled: ratio {stats['ratio']:.3f}, clipped {stats['clip_fraction']:.0%}"
)

# %% [markdown]
# The last line is a failure on purpose: nothing crashes, and the clip silently switches off part of the batch.
#
# ## The numbers that the next lesson starts from

# %% tags=["headline"]
untrained = ppo.value_loss(values, values, returns, mask)[1]["explained_variance"]
print(f"explained variance of an untrained critic {untrained:.2f}; bandit above 0.95:", end=" ")
print(f"PPO {sum(c[-1] > 0.95 for c in runs['PPO'])},", end=" ")
print(f"unclipped {sum(c[-1] > 0.95 for c in runs['ratio'])} of 10 seeds")

# %% [markdown]
# ## Recap
#
# - Each response token is an action; the reward comes at the end, and GAE shares it out by means of a critic.
# - The ratio compares the new policy with the one that sampled; the KL compares it with the reference.
# - The clip takes away the reward for going too far on one batch; the mask keeps padding out of everything.
# - On the first step the ratio is 1 and the KL 0, exactly.
#
# **Further reading.** Schulman et al. 2017 (arXiv 1707.06347), equation 7: the clip. Schulman et al. 2016 (arXiv
# 1506.02438), equation 16: GAE. Ziegler et al. 2019 (arXiv 1909.08593), equation 2: the KL in the reward.
# Huang et al. 2024 (arXiv 2403.17031): the details that matter, one by one.
