# %% [markdown]
# # 03 · Exercises: the mechanics of PPO
#
# **Run time** about ten seconds on two CPU cores · **Your time** about 60 minutes · **Before this**
# lesson 03
#
# You write the three functions that PPO rests on, and find the fault in each of three training logs. The
# check below each task names the likely mistake; the cells after it go on with a reference version, so
# that Run All works with nothing filled in, or with a wrong answer; only an error in your code stops it.
# To compare with the solution, run `nbdiff-web exercises/03_ppo_mechanics.ipynb
# solutions/03_ppo_mechanics.ipynb` in the course's folder.

# %%
import math

import torch
from torch import Tensor

from rlhf_helpers import checks
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.text import load_tokenizer

# %%
preset = PRESETS["pocket"]  # always: every number below is about this model
tokenizer = load_tokenizer(preset)
roles = Roles(load_base(preset))
roles.load("sft", find_adapter(preset, "sft"))

# %% [markdown]
# ## 1 · The log-probabilities of a response
#
# ●●○ · 10 minutes
#
# A batch has $B$ rows of $L$ tokens $x_0, \ldots, x_{L-1}$: a prompt, padded on the left, and a response
# of $T$ tokens at the end. A forward pass gives logits $z$ of shape $[B, L, V]$ over the $V$ tokens of
# the vocabulary. Those at position $t$ have seen $x_0, \ldots, x_t$, and predict $x_{t+1}$. So, for the
# last $T$ positions $t$,
#
# $$\log \pi(x_t \mid x_{<t}) = z_{t-1, x_t} - \log \sum_{v=1}^{V} e^{z_{t-1, v}}$$
#
# where $\pi$ is the policy, the model that writes. By hand: the row (0, 2, 1, 2) is one token of padding,
# a prompt of one token and a response of $T = 2$. At position 1 the logits are $(0, \log 2, 0)$, so token
# 1 had probability $2/4$; at position 2 they are $(\log 2, 0, 0)$, so token 2 had $1/4$. The result is
# $(\log \tfrac12, \log \tfrac14) = (-0.693, -1.386)$. The logits at position 3 are not needed.


# %% tags=["nbval-check-output"]
def token_logprobs(logits: Tensor, input_ids: Tensor, response_length: int) -> Tensor:
    """Log-probability of each token of the response, in nats.

    Args:
        logits: [B, L, V], float32, of whole sequences: those at t predict the token at t + 1.
        input_ids: [B, L], int64, prompts padded on the left, then responses.
        response_length: T, less than L; responses are the last T columns, padding included.

    Returns:
        [B, T], float32, differentiable with respect to the logits; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    logprobs = torch.log_softmax(logits[:, -response_length - 1 : -1], dim=-1)
    tokens = input_ids[:, -response_length:]
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)
    ### END SOLUTION


checks.check_token_logprobs(token_logprobs)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Cut out two windows of $T$ columns, one of the logits and one of the tokens; the first lies one column
# to the left of the second. Then <code>gather</code> along the vocabulary takes one entry for each token;
# the index needs as many dimensions as the tensor it reads from. Take logarithm and softmax at once.
# </details>

# %% [markdown]
# From here on we use the package's version, which leaves the windows to you. Here is a real response of
# the SFT model, with the logits of the whole row.

# %%
from rlhf_helpers.logprobs import response_logprobs, token_logprobs

model = roles.use("sft")
prompts = ["what does the duck say?"]
rollout = sample_responses(model, tokenizer, prompts, preset.response_length, seed=1)
batch = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask}
with torch.no_grad():
    logits = model(**batch).logits
T = rollout.response_mask.shape[1]
tokens = rollout.input_ids[:, -T:]
print(f"{rollout.texts[0]!r}: {T} tokens of {logits.shape[2]:,}, logits {list(logits.shape)}")

# %% [markdown]
# Nothing fails if you forget the shift: the windows still have the right length.

# %% [markdown]
# <details><summary><b>Predict before you run.</b> Without the shift each token is looked up at its own
# position, where the model has read it. Will the mean log-probability be higher or lower than with the
# shift? And than that of a blind guess among all tokens of the vocabulary?</summary>
#
# Lower than with the shift, and lower than a blind guess. The question has become "will the same token
# come a second time?", and in these sentences it almost never does. The model knows that, so it is surer
# of *not* seeing the token than somebody who knows nothing.
# </details>

# %%
right = token_logprobs(logits[:, -T - 1 : -1], tokens)
unshifted = token_logprobs(logits[:, -T:], tokens)
print("token        right   no shift")
for token, a, b in zip(tokens[0], right[0], unshifted[0], strict=True):
    print(f"{tokenizer.decode(token):10}{a:z8.2f} {b:z10.2f}")
print(f"{'mean':10}{right.mean():8.2f} {unshifted.mean():10.2f}", end="")
print(f"     a blind guess: {-math.log(logits.shape[2]):.2f}")
with torch.no_grad():
    torch.testing.assert_close(right, response_logprobs(model, **batch, response_length=T))

# %% [markdown]
# That is a symptom worth remembering. Over a model's own samples the mean log-probability is minus the
# entropy, apart from luck, and no entropy is above that of a blind guess: a model cannot find its own
# words that unlikely. The last line of the code makes sure that the package's `response_logprobs`, which
# calls the model itself, agrees with the windows you see.
#
# **In words.** PPO compares log-probabilities of the same tokens under two policies. If the shift is
# missing from both, the ratio before the first step is 1 and the KL is 0, as they should be. What would
# training do to the model?

# %% [markdown] tags=["solution"]
# It would raise, for every token of a good response, the probability that the token comes again right
# after itself. The sampled tokens were chosen at the position before, and the probabilities there would
# change only by accident. The model would learn to stutter after good answers. So no test of the ratio or
# of the KL finds this mistake; the mean log-probability does, and so does comparing one row by hand.

# %% [markdown]
# ## 2 · Advantages and returns
#
# ●●● · 20 minutes
#
# Token $t$ got the reward $r_t$; before it was chosen, the critic expected $V_t$ in all from there on.
# The *TD error* $\delta_t$ is the surprise at one step, the *advantage* $A_t$ a mix of the surprises from
# $t$ on, and the *return* $R_t$ the critic's target:
#
# $$\delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma\lambda\, A_{t+1}, \qquad
# R_t = A_t + V_t$$
#
# $\gamma$ is the price of time, $\lambda$ says how far ahead to look. After the last real token, EOS,
# there is no state: $V$ and $A$ are 0 from there on. By hand, with $\gamma = 1$ and $\lambda = 0.95$:
# rewards (0, 1) and values (0.5, 0.6) give $\delta = (0 + 0.6 - 0.5,\; 1 + 0 - 0.6) = (0.1, 0.4)$,
# $A = (0.1 + 0.95 \cdot 0.4,\; 0.4) = (0.48, 0.4)$ and $R = (0.98, 1)$.


# %% tags=["nbval-check-output"]
def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    Args:
        rewards, values: [B, T], float32, without gradient; at padding any finite numbers.
        response_mask: [B, T], int64, 1 up to and including EOS, then 0.
        gamma, lam: γ and λ, between 0 and 1.

    Returns:
        Advantages and returns, [B, T] each, float32, 0 at padding; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    rewards, values = rewards * response_mask, values * response_mask
    advantages = torch.zeros_like(values)
    next_value = next_advantage = 0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values
    ### END SOLUTION


checks.check_gae(gae)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Set rewards and values at padding to 0 before anything else: then the value after EOS is 0 by itself,
# and so is every TD error behind it. Go from the last column to the first, with all rows at once, and
# carry two things along: the value and the advantage of the column to the right.
# </details>

# %% [markdown]
# From here on we use the package's version. Take a critic that expects the same all the way, $V_t = 0.4$,
# and a response of six tokens whose reward, 1, comes at the end. With $\gamma = 1$ all TD errors are 0
# except the last, $1 - 0.4 = 0.6$. This shows how far back one surprise reaches.

# %% [markdown]
# <details><summary><b>Predict before you run.</b> Which tokens get an advantage with λ = 0, which with
# λ = 1, and what part of the 0.6 does the first token get with λ = 0.95?</summary>
#
# With λ = 0 the last token only, with λ = 1 all of them alike. With λ = 0.95 the surprise is multiplied
# by 0.95 for each step back: the first token gets $0.95^5 = 0.774$ of it, 0.464.
# </details>

# %% tags=["nbval-check-output"]
from rlhf_helpers.ppo import gae

rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
values, mask = torch.full((1, 6), 0.4), torch.ones(1, 6)
print("token t     ", *[f"{t:6}" for t in range(6)])
for lam in (0, 0.5, 0.95, 1):
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=lam)
    print(f"A, λ = {lam:<5}", *[f"{a:6.3f}" for a in advantages[0].tolist()])
    assert torch.allclose(advantages[0], 0.6 * lam ** torch.arange(5, -1, -1.0))

# %% [markdown]
# The reward of a response is paid at its EOS, so with λ = 0 the words that earned it learn nothing, until
# the critic has learnt to see the reward coming. With λ = 1 every token is praised alike, idle ones
# included. At 0.95 a surprise still has half its weight 13.5 tokens back, which is longer than most of
# the SFT model's answers.
#
# Now a critic that sees it coming: it expects 0.4 until the fourth token settles the matter, and knows
# from then on that the reward will be 1.

# %% [markdown]
# <details><summary><b>Predict before you run.</b> Which token has the largest advantage now? And what do
# the tokens after it get?</summary>
#
# The fourth, $t = 3$: between its value and the next one lies the jump of 0.6. The tokens after it get
# 0, whatever λ is: nothing surprising comes after them.
# </details>

# %% tags=["nbval-check-output"]
values = torch.tensor([[0.4, 0.4, 0.4, 0.4, 1.0, 1.0]])
print("token t     ", *[f"{t:6}" for t in range(6)])
for lam in (0, 0.5, 0.95, 1):
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=lam)
    print(f"A, λ = {lam:<5}", *[f"{a:6.3f}" for a in advantages[0].tolist()])
    assert advantages.argmax() == 3 or lam == 1

# %% [markdown]
# A critic that is right turns one reward for a whole response into praise for the token that earned it,
# and λ decides how much of that praise the earlier tokens share.
#
# **In words.** Lengthen a response by ten tokens of padding. What must happen to its advantages? Name one
# way of computing them in which something else happens.

# %% [markdown] tags=["solution"]
# Nothing: padding is how rows of different lengths fit into one tensor, and is no part of the response.
# But if the value after EOS is read from the padding, the last TD error is
# $r + \gamma V_{\text{pad}} - V$, and if the sums include the TD errors at padding, these flow into all
# earlier tokens. In both cases the same response gets other advantages in a batch with a longer one than
# alone. That makes a good test: compute a row alone and in company, with different numbers under the
# mask.

# %% [markdown]
# ## 3 · The clipped loss
#
# ●●○ · 15 minutes
#
# One batch of samples serves several steps, and from the second on the policy $\pi$ is no longer the
# policy $\pi_{\text{old}}$ that sampled. The *ratio* $\rho_t$ says how much likelier token $t$ has become.
# PPO's loss gives no credit for moving it further than $\epsilon$ from 1:
#
# $$\rho_t = \frac{\pi(x_t)}{\pi_{\text{old}}(x_t)}, \qquad
# L = -\operatorname{mean}_t\, \min\bigl(\rho_t A_t,\;
# \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)\, A_t\bigr)$$
#
# The mean is over all real tokens of the batch at once. By hand, with $\epsilon = 0.2$: three tokens
# had probability 0.2 each, and have 0.3, 0.1 and 0.3 now, so $\rho = (1.5, 0.5, 1.5)$. With
# $A = (1, 1, -1)$ the minima are $\min(1.5, 1.2) = 1.2$, $\min(0.5, 0.8) = 0.5$ and
# $\min(-1.5, -1.2) = -1.5$, and $L = -(1.2 + 0.5 - 1.5)/3 = -0.067$.


# %% tags=["nbval-check-output"]
def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, clip: float
) -> Tensor:
    """PPO's clipped loss.

    Args:
        logprobs, old_logprobs: [B, T], of the sampled tokens, under π and under π_old, in nats.
        advantages: [B, T]; at padding all three hold any finite numbers.
        response_mask: [B, T], int64, 1 up to and including EOS, then 0.
        clip: ε, above 0.

    Returns:
        A float32 scalar, differentiable with respect to logprobs; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    ratio = (logprobs - old_logprobs).masked_fill(response_mask == 0, 0).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    return -(gain * response_mask).sum() / response_mask.sum()
    ### END SOLUTION


checks.check_policy_loss(policy_loss)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# You have the probabilities only as logarithms: what does a quotient become? Set the log-ratio at padding
# to 0 *before* you exponentiate; masking the product afterwards comes too late for the gradient. Build
# the two terms of the minimum one by one, and compare them token by token. The mean then leaves padding
# out: divide by the number of ones in the mask.
# </details>

# %% [markdown]
# From here on we use the package's version, which returns the loss and a few numbers to log. What does
# the loss *want*? Its slope with respect to a token's log-probability tells: gradient descent raises the
# log-probability where the slope is negative, and lowers it where it is positive. At 0 it lets go.

# %%
from rlhf_helpers.ppo import policy_loss


def slope(ratio: float, advantage: float) -> float:
    old = torch.tensor([[0.2]]).log()
    new = (old + math.log(ratio)).requires_grad_()
    loss, _ = policy_loss(new, old, torch.tensor([[advantage]]), torch.ones(1, 1), clip=0.2)
    return torch.autograd.grad(loss, new)[0].item()


# %% [markdown]
# <details><summary><b>Predict before you run.</b> For a good token, A = +1, at which ratios is the slope
# 0: below 0.8, above 1.2, or both? And for a bad one, A = −1?</summary>
#
# For the good one above 1.2 only, for the bad one below 0.8 only. On the other side, where the token has
# moved against its advantage, the minimum takes the unclipped term, and its slope brings the token back.
# </details>

# %% tags=["nbval-check-output"]
print("ratio   A = +1   A = -1")
for ratio in (0.5, 0.7, 0.79, 0.81, 0.9, 1.0, 1.1, 1.19, 1.21, 1.3, 1.5):
    good, bad = slope(ratio, 1.0), slope(ratio, -1.0)
    print(f"{ratio:5.2f} {good:z8.2f} {bad:z8.2f}")
    assert (good == 0) == (ratio > 1.2) and (bad == 0) == (ratio < 0.8)

# %% [markdown]
# The clip stops the push on a token that has already gone far enough in the direction its advantage asks
# for, and never stops the way back. Elsewhere the slope is −ρA, so a token that has become likelier also
# pulls harder.
#
# **In words.** Before the first step all ratios are 1, and advantages are usually whitened, shifted to
# mean 0. What is the loss then, and what is its gradient? What does that say about a plot of PPO's loss?

# %% [markdown] tags=["solution"]
# With ρ = 1 nothing is clipped and the loss is minus the mean advantage: 0. The gradient is not 0: each
# of the $N$ real tokens has the slope $-A_t/N$, which pushes good ones up and bad ones down. The value of
# the loss therefore says nothing about how good the policy is. It starts near 0 with every fresh batch,
# falls a little during the steps on it, and starts again. The reward and the KL show progress; the loss
# only carries the gradient.

# %% [markdown]
# ## 4 · Three logs
#
# ●●● · 15 minutes
#
# Four short runs of PPO on the pocket world, ten updates each, all with β = 0.1 and the same seed. One is
# healthy. In each of the other three, one line of the code was wrong; the runs are real. The columns:
#
# - `score`: mean reward of the samples, from the reward model; `kl`: to the reference, nats per response;
# - `length` in tokens, and `finished`, the share of responses that ended by themselves;
# - `first_ratio`: mean ratio in the first step of the update; `clip_fraction`: share of tokens clipped, over
#   all its steps; `approx_kl`: from the old to the new policy, nats per token;
# - `explained_variance`: of the critic.


# %%
def show(log):
    rows = checks.training_log(log)
    names = ["score", "kl", "length", "finished", "first_ratio", "clip_fraction", "approx_kl"]
    names.append("explained_variance")
    print(f"{log}\nupdate " + " ".join(f"{name:>13.13}" for name in names))
    for row in rows:
        print(f"{row['update']:6.0f} " + " ".join(f"{row[name]:13.3f}" for name in names))


for log in ("healthy", "A", "B", "C"):
    show(log)

# %% [markdown]
# These are the faults to choose from. Three of them are in the logs, one in each.

# %%
for fault, what in checks.FAULTS.items():
    print(f"{fault:17} {what}")

# %% tags=["nbval-check-output"]
answers = {"A": ..., "B": ..., "C": ...}
### BEGIN SOLUTION
answers = {"A": "penalty sign", "B": "reference ratio", "C": "fresh old"}
### END SOLUTION
checks.check_diagnosis(answers)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# Look at one column at a time, and ask what it has to be whatever the data are. What must the ratio be
# before anything has been learnt from a batch? Which number can be 0 throughout only if the new policy is
# always compared with itself? What would a penalty do to the column it is a price for? And compare the
# first row with that of the healthy run: a fault that leaves it unchanged does nothing while the KL is 0.
# </details>

# %% [markdown]
# (In the healthy run one number stands out: `approx_kl` of 0.13 in update 5. Probably a few tokens moved
# far in one step; the clip gives them no credit for it, and it does not happen again. In B the mean ratio
# of 15.8 in update 8 comes from two of 339 tokens, each more than a thousand times as likely as under the
# policy it is compared with: the largest ratios rule a mean.)
#
# **In words.** Which of the three would you have noticed from the score alone, with no healthy log beside it?

# %% [markdown] tags=["solution"]
# One of them at most, and not the worst. B does not learn: its score stays near where it began. But A has
# the highest score of all four, while its responses run to the length limit and its KL runs away; and C
# looks like the healthy run, because with few steps on each batch the clip has little to do. Its log only
# shows that the safety belt is off. Hence the habit: look at the columns whose value you know in advance.
