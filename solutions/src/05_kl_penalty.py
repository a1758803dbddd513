# %% [markdown]
# # 05 · Exercises: the KL penalty
#
# **Run time** about two minutes on two CPU cores · **Your time** about 90 minutes · **Before this**
# lesson 05
#
# You write the KL penalty from its parts: the log-probabilities under two policies, the exact KL, its estimate from
# samples, the final reward. Then you train at three prices per nat and see what they do to the variety of the
# answers. The check below each function names the likely mistake; the cells after it go on with a reference version,
# so that Run All works with nothing filled in, or with a wrong answer; only an error in your code stops it. To
# compare with the solution, run `nbdiff-web exercises/05_kl_penalty.ipynb solutions/05_kl_penalty.ipynb` in the
# course's folder.

# %%
PRESET = "pocket"  # every number below is from this preset
UPDATES = 8  # of each of the three runs in part 5, about two seconds an update

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_helpers import checks, diversity, notebook, plots, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.presets import load_preset
from rlhf_helpers.reward import score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import load_tokenizer, readable

# %% [markdown]
# In parts 1 to 4 nothing is trained. There the current policy is the SFT model, and its reference the pretrained
# base: a new adapter has B = 0 and changes nothing.

# %%
preset = load_preset(PRESET)
notebook.start(preset)
tokenizer = load_tokenizer(preset)
adapters = {name: find_adapter(preset, name) for name in ("sft", "reward")}
roles = Roles(load_base(preset))
roles.load("sft", adapters["sft"])
roles.load("reward", adapters["reward"])
roles.add("base", trainable=False)

# %% [markdown]
# The policy answers 120 prompts that it has never seen.

# %%
train, held_out = (list(prompt_dataset(preset, split)["prompt"]) for split in ("train", "held_out"))
asked = held_out[::5][: 120 if preset.name == "pocket" else 24]
rollout = sample_responses(roles.use("sft"), tokenizer, asked, preset.response_length, seed=1)

# %% [markdown]
# Both models read the same responses. `response_logits` returns the logits that belong to the response's tokens,
# already shifted by one position: those at $t$ predict token $t$ of the response.

# %%
mask, T = rollout.response_mask, rollout.response_mask.shape[1]
tokens, real = rollout.input_ids[:, -T:], rollout.response_mask.bool()


def response_logits(role: str) -> Tensor:
    batch = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask}
    position_ids = (rollout.attention_mask.cumsum(-1) - 1).clamp(min=0)
    model = roles.use(role)
    return model(**batch, position_ids=position_ids, logits_to_keep=T + 1).logits[:, :-1]


with torch.no_grad():
    curr_logits, ref_logits = response_logits("sft"), response_logits("base")
print(f"tokens {list(tokens.shape)}, {real.sum()} of them real; logits {list(curr_logits.shape)}")

# %% [markdown]
# ## 1 · Two policies, the same tokens
#
# ●○○ · 10 minutes
#
# The current policy $\pi$ has sampled the tokens $x_t$. Its reference $\pi_{\text{ref}}$ is asked about the same
# tokens: what probability would it have given to what the policy said? At each position a log-softmax over the $V$
# tokens of the vocabulary turns the logits $z$ into log-probabilities, and we keep the one of the token at hand:
#
# $$\log \pi(x_t) = z_{t, x_t} - \log \sum_{v=1}^{V} e^{z_{t, v}}$$
#
# By hand: three tokens, two positions, and token 1 was sampled at both. The policy's logits $(0, \log 2, 0)$ and
# $(\log 3, 0, 0)$ are the probabilities $(\tfrac14, \tfrac12, \tfrac14)$ and $(\tfrac35, \tfrac15, \tfrac15)$; the
# reference's $(\log 2, 0, 0)$ and $(0, 0, 0)$ are $(\tfrac12, \tfrac14, \tfrac14)$ and
# $(\tfrac13, \tfrac13, \tfrac13)$. So `log_probs_curr` is $(\log \tfrac12, \log \tfrac15) = (-0.693, -1.609)$ and
# `log_probs_ref` is $(\log \tfrac14, \log \tfrac13) = (-1.386, -1.099)$. You will use these numbers up to part 4.


# %% tags=["nbval-check-output"]
def sampled_log_probs(
    curr_logits: Tensor, ref_logits: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens under both policies, in nats.

    Args:
        curr_logits, ref_logits: [B, T, V], float32, aligned: position t predicts tokens[:, t].
        tokens: [B, T], int64, sampled from the current policy.

    Returns:
        log_probs_curr and log_probs_ref, [B, T] each; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    index = tokens[..., None]
    log_probs_curr = curr_logits.log_softmax(dim=-1).gather(-1, index).squeeze(-1)
    log_probs_ref = ref_logits.log_softmax(dim=-1).gather(-1, index).squeeze(-1)
    return log_probs_curr, log_probs_ref
    ### END SOLUTION


checks.check_sampled_log_probs(sampled_log_probs)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# The same two steps for both. Take logarithm and softmax at once, over the last dimension. Then <code>gather</code>
# along that dimension takes one entry for each token; its index needs as many dimensions as the tensor it reads from.
# </details>

# %% [markdown]
# From here on we use the reference version. Here is one response token by token.

# %% [markdown]
# <details><summary><b>Predict before you run.</b> The tokens are the policy's own choice. Will the reference's mean
# log-probability of them be lower than the policy's? And that of every single token?</summary>
#
# The mean will, apart from luck: the mean difference is an estimate of the KL, which is never negative. A single
# token may well be likelier under the reference.
# </details>

# %%
from rlhf_helpers.checks.lesson_05 import sampled_log_probs

log_probs_curr, log_probs_ref = sampled_log_probs(curr_logits, ref_logits, tokens)
some = len(asked) // 5
print(f"{readable(asked[some])}\ntoken        current   reference   difference")
for t in range(mask[some].sum()):
    pair = log_probs_curr[some, t], log_probs_ref[some, t]
    print(f"{tokenizer.decode(tokens[some, t]).strip():10}", end="")
    print(f"{pair[0]:z10.2f}{pair[1]:z12.2f}{pair[0] - pair[1]:z13.2f}")
print(f"all:     {log_probs_curr[real].mean():9.2f}{log_probs_ref[real].mean():12.2f}")
assert preset.name != "pocket" or log_probs_curr[real].mean() > log_probs_ref[real].mean()

# %% [markdown]
# The two models agree about nearly every word. What tells them apart is the last token, EOS: stopping after the
# answer is what SFT has taught.
#
# **In words.** Somebody lets the policy and the reference each sample its own answers, takes the mean
# log-probability of each model's answers under that model, and subtracts. What does that measure? Could it be 0
# for two policies that differ?

# %% [markdown] tags=["solution"]
# A model's mean log-probability of its own samples is minus its entropy, so the difference is one of two entropies:
# how much surer the one is than the other. It is 0 for two policies that are equally sure of quite different things,
# say one that always says yes and one that always says no. The KL asks both models about the *same* tokens, and
# those two would be infinitely far apart.

# %% [markdown]
# ## 2 · The exact KL
#
# ●○○ · 10 minutes
#
# The KL divergence of the policy from its reference is the mean of the log-ratio over what the policy samples. Where
# the vocabulary is small that mean can be taken exactly, at each position over all its tokens $v$:
#
# $$\mathrm{KL}(\pi \,\|\, \pi_{\text{ref}}) = \sum_{v=1}^{V} \pi(v)\,
# \bigl(\log \pi(v) - \log \pi_{\text{ref}}(v)\bigr)$$
#
# `torch.distributions` has it: `Categorical(logits=...)` makes a distribution over the last dimension, and
# `kl_divergence` takes two of them. By hand, with the numbers of part 1: $\tfrac14 \log \tfrac12 + \tfrac12 \log 2 +
# \tfrac14 \log 1 = \tfrac14 \log 2 = 0.173$ at the first position, and $\tfrac35 \log \tfrac95 + 2 \cdot \tfrac15 \log
# \tfrac35 = 0.353 - 0.204 = 0.148$ at the second. The other direction, $\mathrm{KL}(\pi_{\text{ref}} \,\|\, \pi)$, is
# the same at the first by the symmetry of these numbers, and 0.145 at the second.

# %% tags=["nbval-check-output"]
from torch.distributions import Categorical, kl_divergence


def exact_kl(curr_logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(current policy ‖ reference) at each position, in nats.

    Args:
        curr_logits, ref_logits: [B, T, V], float32, any logits.

    Returns:
        [B, T]; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    return kl_divergence(Categorical(logits=curr_logits), Categorical(logits=ref_logits))
    ### END SOLUTION


checks.check_exact_kl(exact_kl)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# It is one line. A Categorical takes its numbers by name, as <code>logits</code> or as <code>probs</code>; ours are
# logits. Which of the two distributions is the one that samples? That one comes first.
# </details>

# %% [markdown]
# From here on we use the package's version. The same response as before, with the KL in both directions at each
# position: how far the policies are apart there, whatever token was sampled.

# %% [markdown]
# <details><summary><b>Predict before you run.</b> Where SFT stops, the base would rather go on. Which direction is the
# larger one there: KL(SFT‖base) or KL(base‖SFT)?</summary>
#
# KL(base‖SFT). SFT mostly stops; the base mostly goes on, and gives stopping a small probability, but not a tiny one.
# What the base would say next, SFT finds unlikely, and many of the words nearly impossible: their log-ratios are
# huge.
# </details>

# %%
from rlhf_helpers.kl import exact_kl

exact, reverse = exact_kl(curr_logits, ref_logits), exact_kl(ref_logits, curr_logits)
print("token      log-ratio   KL(SFT‖base)   KL(base‖SFT)")
for t in range(mask[some].sum()):
    log_ratio = log_probs_curr[some, t] - log_probs_ref[some, t]
    print(f"{tokenizer.decode(tokens[some, t]).strip():10}", end="")
    print(f"{log_ratio:z10.2f}{exact[some, t]:z15.2f}{reverse[some, t]:z15.2f}")
print(f"mean of all responses    {exact[real].mean():10.2f}{reverse[real].mean():15.2f}")
assert preset.name != "pocket" or reverse[real].mean() > 2 * exact[real].mean()

# %% [markdown]
# The log-ratio belongs to one token and may have either sign. The KL belongs to the position; it is never negative,
# and where the two models agree it is 0. Look at "have": a sentence has just ended, and there SFT stops with a
# probability of 83%, the base with 12%, so the KL is large. This sample went on, with a word that both find unlikely.
#
# **In words.** A penalty should keep the policy from saying what the reference would never say. Which direction does
# that, and what does the other one punish?

# %% [markdown] tags=["solution"]
# $\mathrm{KL}(\pi \,\|\, \pi_{\text{ref}})$ is weighted by what the policy says: a token that the policy says often
# and the reference never makes it huge. It hardly minds if the policy leaves out half of what the reference says; a
# reference that says $k$ things equally often and a policy that has settled on one of them are $\log k$ apart. The
# other direction is weighted by what the reference says: it punishes the policy for leaving things out, and hardly
# for adding something of its own. RLHF takes the first, so the penalty by itself lets the policy become narrow;
# remember that in part 5. It is also the one that can be estimated from the policy's samples, which we have.

# %% [markdown]
# ## 3 · The estimate, and when it is valid
#
# ●●○ · 20 minutes
#
# With 152,000 tokens in the vocabulary the sum at each position is expensive, and keeps two tensors the size of the
# logits in memory. But the KL is a mean over the policy's samples, and those we have. So the code that you will meet
# most often is `kl_div = (log_probs_curr - log_probs_ref).mean()`, over the $N$ real tokens of the batch, padding
# left out:
#
# $$\mathrm{KL} \approx \frac{1}{N} \sum_{t\ \text{real}} \bigl(\log \pi(x_t) - \log \pi_{\text{ref}}(x_t)\bigr)$$
#
# By hand, with the numbers of part 1 and one token of padding behind them: the log-ratios are
# $(\log 2, \log \tfrac35) = (0.693, -0.511)$, and the estimate is $(0.693 - 0.511)/2 = 0.091$. The exact KL at these
# two positions was 0.161 in the mean: two tokens are a small sample.


# %% tags=["nbval-check-output"]
def estimate_kl(log_probs_curr: Tensor, log_probs_ref: Tensor, response_mask: Tensor) -> Tensor:
    """Estimate of KL(current policy ‖ reference), in nats per token.

    Args:
        log_probs_curr, log_probs_ref: [B, T], of the tokens that the current policy sampled; at
            padding any finite numbers.
        response_mask: [B, T], int64, 1 up to and including EOS, then 0.

    Returns:
        A scalar tensor, the mean over all real tokens; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    kl_div = (log_probs_curr - log_probs_ref)[response_mask.bool()].mean()
    return kl_div
    ### END SOLUTION


checks.check_estimate_kl(estimate_kl)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# A boolean tensor as an index picks the entries where it is true, from all rows, into one long row. The mask becomes
# such a tensor when its zeros and ones are turned into booleans.
# </details>

# %% [markdown]
# From here on we use the reference version. Is the estimate right? At each position of the responses we know the exact
# KL, so we can keep the positions and vary the way in which the *token* there is chosen: the one of the response,
# which the policy sampled; another one drawn from the policy; one drawn from the reference; the policy's likeliest;
# one of its likeliest two, as top-k sampling with $k = 2$ would draw it.

# %%
from rlhf_helpers.checks.lesson_05 import estimate_kl

torch.manual_seed(preset.seed)
top = curr_logits.topk(2)
of_two = Categorical(logits=top.values).sample()[..., None]
ways = {
    "as in the responses": tokens,
    "drawn from the policy": Categorical(logits=curr_logits).sample(),
    "from the reference": Categorical(logits=ref_logits).sample(),
    "the likeliest": curr_logits.argmax(-1),
    "one of the likeliest two": top.indices.gather(-1, of_two).squeeze(-1),
}

# %% [markdown]
# If the token is drawn from the policy, the mean log-ratio at a position is the exact KL. So the errors have mean 0,
# and the standard error of the estimate is their standard deviation divided by $\sqrt N$.
#
# <details><summary><b>Predict before you run.</b> The exact mean is 0.27. Which of the five estimates lie within two
# or three standard errors of it? Which are too large, and which is negative?</summary>
#
# The first two are right. With tokens from the reference it is negative: they are mostly those that the reference
# finds likelier than the policy does. The likeliest token, and one of the likeliest two, give too much: greedy choice
# picks what SFT is sure of, and leaves out the rare tokens with a negative log-ratio.
# </details>

# %%
print(f"{'token':26}{'estimate':>8}{'error':>8}{'standard error':>16}")
off = {}  # in standard errors
for name, chosen in ways.items():
    pair = sampled_log_probs(curr_logits, ref_logits, chosen)
    errors = (pair[0] - pair[1] - exact)[real]
    standard_error = errors.std() / len(errors) ** 0.5
    off[name] = (errors.mean() / standard_error).item()
    print(f"{name:26}{estimate_kl(*pair, mask):8.3f}{errors.mean():z8.3f}{standard_error:16.3f}")
print(f"{'exact KL(SFT‖base)':26}{exact[real].mean():8.3f}")
if preset.name == "pocket":
    assert abs(off["as in the responses"]) < 4 and abs(off["drawn from the policy"]) < 4
    assert off["from the reference"] < -6
    assert off["the likeliest"] > 6 and off["one of the likeliest two"] > 6

# %% [markdown]
# The same line of code, five numbers, and only two of them estimate our KL. What is the negative one? With tokens
# from the reference the mean of $\log \pi_{\text{ref}} - \log \pi$ is an estimate of the KL in the other direction,
# so ours is minus that. And here is the mean over the vocabulary, which some code takes, with whole tensors of
# logits:

# %%
pair = sampled_log_probs(curr_logits, ref_logits, ways["from the reference"])
errors = (pair[0] - pair[1] + reverse)[real]
print(
    f"from the reference {estimate_kl(*pair, mask):.3f}, -KL(base‖SFT) {-reverse[real].mean():.3f}"
)
assert preset.name != "pocket" or errors.mean().abs() < 4 * errors.std() / len(errors) ** 0.5
log_ratios = curr_logits.log_softmax(-1) - ref_logits.log_softmax(-1)  # [B, T, V]
for name, x in (("SFT, base", log_ratios), ("base, SFT", -log_ratios)):
    print(f"{name}: mean over the vocabulary {x[real].mean():z.3f}")
assert preset.name != "pocket" or not 0.5 < log_ratios[real].mean() / exact[real].mean() < 2

# %% [markdown]
# The mean over the vocabulary gives each of 1,258 tokens the same weight, though nearly all are tokens that neither
# model would say. Swap the models and it changes sign, so one of the two numbers is negative: that is no KL.
#
# **In words.** When is `(log_probs_curr - log_probs_ref).mean()` an estimate of the KL? Say what must hold of the
# tokens, and whether it still holds at the second step of PPO on the same batch.

# %% [markdown] tags=["solution"]
# When each position's token was drawn from the very policy whose log-probabilities come first: with temperature 1 (or
# with the temperature that is also used for scoring), without top-k, top-p or greedy choice; when both
# log-probabilities are of that token; and when the mean is over real tokens only. Then each log-ratio has the exact
# KL as its mean, and single values or small batches may still be negative. From the second step on the tokens are
# those of the policy before the step, no longer of the current one. If the step was small the estimate is a little
# off, if it was large it is wrong, and it may be negative in the mean. So PPO takes the KL of its penalty at the time
# of sampling, as `collect_experience` does.

# %% [markdown]
# ## 4 · The final reward
#
# ●●○ · 15 minutes
#
# The reward model gives the whole response $y$ a reward, from which the policy pays $\beta$ for each nat. The KL of a
# *response* is the log-ratio of its probability, the sum over its real tokens:
#
# $$R_{\text{final}} = R_{\text{model}} - \beta \cdot \mathrm{KL}, \qquad \mathrm{KL} = \sum_{t\ \text{real}}
# \bigl(\log \pi(x_t) - \log \pi_{\text{ref}}(x_t)\bigr) = \log \frac{\pi(y)}{\pi_{\text{ref}}(y)}$$
#
# By hand, with the numbers of part 1, a reward of 2 and $\beta = 0.1$: the KL is $0.693 - 0.511 = 0.182$ nats and
# the final reward $2 - 0.1 \cdot 0.182 = 1.982$.


# %% tags=["nbval-check-output"]
def final_reward(
    rewards_model: Tensor,
    log_probs_curr: Tensor,
    log_probs_ref: Tensor,
    response_mask: Tensor,
    beta: float,
) -> Tensor:
    """Reward of each response, less the price of its KL.

    Args:
        rewards_model: [B], float32, what the reward model says.
        log_probs_curr, log_probs_ref: [B, T], in nats; at padding any finite numbers.
        response_mask: [B, T], int64, 1 up to and including EOS, then 0.
        beta: β, at least 0.

    Returns:
        [B]; the arguments stay as they are.
    """
    ### BEGIN SOLUTION
    kl_div = ((log_probs_curr - log_probs_ref) * response_mask).sum(dim=1)
    return rewards_model - beta * kl_div
    ### END SOLUTION


checks.check_final_reward(final_reward)

# %% [markdown]
# <details><summary><b>Hint</b></summary>
#
# The log-ratio of every token first, then 0 at padding: multiply by the mask, or select with `response_mask.bool()`
# (the mask holds integers, and integers in square brackets are row numbers). Which dimension has the tokens of one
# response? The sum over it leaves one number for each response, as many as there are rewards.
# </details>

# %% [markdown]
# From here on we use the reference version.
#
# <details><summary><b>Predict before you run.</b> In part 3 the estimate was 0.26 nats per token, and a response has
# 8.8 tokens on average. By how much does β = 0.1 lower the mean reward? And β = 1?</summary>
#
# By 0.1 · 0.26 · 8.8 = 0.23, and by 2.3. Mind the units: a KL per token and one per response differ by a factor of
# the length, and so does what a β is worth.
# </details>

# %%
from rlhf_helpers.checks.lesson_05 import final_reward

with torch.no_grad():
    rewards_model = score_tokens(roles, "reward", rollout.input_ids, rollout.attention_mask)
arguments = (log_probs_curr, log_probs_ref, mask)
final = {beta: final_reward(rewards_model, *arguments, beta) for beta in (0.1, 1.0)}
print("reward    KL   final, β = 0.1   β = 1   response")
for i in range(0, len(asked), len(asked) // 10):
    kl_div = rewards_model[i] - final[1.0][i]
    print(f"{rewards_model[i]:6.2f}{kl_div:6.2f}{final[0.1][i]:z17.2f}", end="")
    print(f"{final[1.0][i]:8.2f}   {rollout.texts[i]}")
falls = [(rewards_model - final[beta]).mean().item() for beta in final]
print(f"the mean falls by {falls[0]:.2f} at β = 0.1 and by {falls[1]:.2f} at β = 1")
assert abs(falls[0] - 0.1 * estimate_kl(*arguments) * real.sum() / len(mask)) < 1e-4

# %% [markdown]
# PPO wants a reward for each token, and lesson 03 shared this one out: each token pays its own part, and the last one
# gets the score. Summed over a response, that gives the final reward again:

# %%
per_token = ppo.shape_rewards(rewards_model, *arguments, beta=0.1)
torch.testing.assert_close(per_token.sum(1), final[0.1])
print("token rewards", [round(reward, 2) for reward in per_token[0][real[0]].tolist()], end=" ")
print(f"sum {per_token[0].sum():z.2f}, final reward {final[0.1][0]:z.2f}")

# %% [markdown]
# **In words.** Which policy has the largest mean final reward? Take one prompt with two possible answers that the
# reference finds equally likely, with rewards 1 and 2. By what factor does the best policy prefer the second at
# β = 1, at β = 0.1, at β = 0.01? (Write the mean of $R - \beta \log(\pi/\pi_{\text{ref}})$ as minus β times a KL,
# plus a constant: take −β out of the bracket, and $e^{R/\beta}$ into the denominator. What makes that denominator sum
# to 1?)

# %% [markdown] tags=["solution"]
# $R - \beta \log \frac{\pi}{\pi_{\text{ref}}} = -\beta \log \frac{\pi}{\pi_{\text{ref}}\, e^{R/\beta}}$. Let $\pi^*$
# be $\pi_{\text{ref}}\, e^{R/\beta}$ divided by its sum $Z$. Then the mean over $\pi$ is
# $-\beta\, \mathrm{KL}(\pi \,\|\, \pi^*) + \beta \log Z$, largest where that KL is 0: for $\pi = \pi^*$ (Rafailov et
# al. 2023, arXiv 2305.18290, equation 4). The second answer is $e^{1/\beta}$ times as likely: 2.7 times at β = 1,
# 22,026 times at 0.1, and $2.7 \cdot 10^{43}$ times at 0.01. So β says how much a small difference in reward matters.
# With a large β the best policy is nearly the reference itself; with a small one it nearly always gives the one
# answer that the reward model likes best.

# %% [markdown]
# ## 5 · Three prices
#
# ●●○ · 35 minutes
#
# Now with training: the four roles of lesson 04, where SFT is the *reference* and the policy begins as a copy of it.
# Three runs that differ only in β: 0.01, 0.1 and 1.0. After each the policy answers the 120 prompts above, and we
# measure how varied its answers are: the entropy of its tokens; *distinct-2*, the share of different pairs of words
# among all pairs; the share of different answers; and *self-BLEU*, how much of an answer the others say too, which is
# high where variety is low.
#
# **Predict, and write it down before you run:** at which β is the KL largest, and about how large is it? At which is
# the score highest? What happens to the variety of the answers as β falls, and what will they look like at 0.01?

# %% [markdown] tags=["solution"]
# A prediction, from part 4: the KL and the score are largest at β = 0.01, the KL perhaps 10 nats or more; at β = 1
# the policy stays near SFT, with less than one nat. Variety falls with β: at 0.01 all answers move to what the reward
# model likes best, and since it likes courtesies (lesson 02) they will be full of them, alike whatever the question.


# %%
def four_roles() -> Roles:
    roles = Roles(load_base(preset))
    roles.load("reference", adapters["sft"])
    roles.load("reward", adapters["reward"])
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    return roles


# %% [markdown]
# We keep each run's history and its four roles, with the policy as it is after the last update.

# %%
histories, trained = {}, {}
for beta in (0.01, 0.1, 1.0):
    trained[beta] = four_roles()
    settings = preset.ppo | {"updates": UPDATES, "beta": beta, "seed": preset.seed}
    run = ppo.train_ppo(trained[beta], tokenizer, train, ppo.PPOConfig(**settings))
    histories[beta] = list(tqdm(run, total=UPDATES, desc=f"β = {beta}"))

# %% [markdown]
# Score, KL and entropy of each update's samples, before anything was learnt from them: all three lines start from SFT.

# %%
quantities = {"score": "score", "kl": "KL, nats", "entropy": "entropy, nats per token"}
curves = {
    label: {
        f"β = {beta}": [getattr(stats, name) for stats in run] for beta, run in histories.items()
    }
    for name, label in quantities.items()
}
last = {label: [round(run[-1], 2) for run in runs.values()] for label, runs in curves.items()}
alt = f"Score, KL and entropy over the updates, a line for each β. In the last update: {last}."
plots.show(plots.panels(curves, "updates", {}), alt=alt)

# %% [markdown]
# Up to the second point the price makes no visible difference: there is hardly any KL to pay for. Then the lines
# part. At β = 0.01 score and KL go on rising, and entropy falls; at 0.1 the KL stops at about three nats; at 1.0 it
# never reaches half a nat. Each point is a different batch of 64 prompts.
#
# Now all of them answer the same 120 prompts, one sample each, with SFT beside them.


# %%
def answers(roles: Roles, role: str) -> ppo.Experience:
    config = ppo.PPOConfig(seed=preset.seed, **preset.ppo)
    return ppo.collect_experience(roles, tokenizer, asked, config, beta=0.0, seed=1, role=role)


def measure(experience: ppo.Experience) -> dict[str, float]:
    real = experience.rollout.response_mask.bool()
    return {
        "score": experience.scores.mean().item(),
        "KL": experience.kl.mean().item(),
        "entropy": -experience.logprobs[real].mean().item(),
        **diversity.diversity(experience.rollout.texts),
    }


# %%
after = {"SFT": answers(trained[0.1], "reference")}
after |= {f"β = {beta}": answers(roles, "policy") for beta, roles in trained.items()}
measured = {name: measure(experience) for name, experience in after.items()}
print(" " * 9 + "".join(f"{name:>11}" for name in measured["SFT"]))
for name, numbers in measured.items():
    print(f"{name:9}" + "".join(f"{number:11.2f}" for number in numbers.values()))

# %% [markdown]
# (Length is in words.) What the text claims about β, asserted:

# %%
# Pocket only
low, middle, high = (measured[f"β = {beta}"] for beta in trained)
assert low["KL"] > middle["KL"] > high["KL"]
assert low["distinct_2"] < middle["distinct_2"] < high["distinct_2"]
assert low["entropy"] < high["entropy"] and low["self_bleu"] > high["self_bleu"]

# %%
rows = {"distinct-2": "distinct_2", "different answers": "unique", "self-BLEU": "self_bleu"}
groups = {name: [numbers[key] for key in rows.values()] for name, numbers in measured.items()}
fig = plots.grouped_bars(list(rows), groups, "share, or BLEU from 0 to 1")
pairs = ", ".join(f"{values[0]:.2f} for {name}" for name, values in groups.items())
plots.show(fig, alt=f"Diversity for SFT and three β. Distinct-2 is {pairs}.")

# %% [markdown]
# At β = 0.01 distinct-2 is a third of SFT's, and self-BLEU nearly twice as high; at 1.0 both are close to SFT's. The
# share of different answers shows nothing of it: at any β, hardly two are the same word for word. Distinct-2 is also
# lower for longer texts, since they repeat more; so look at self-BLEU and at the entropy as well.
#
# And as always: read them. Four prompts, all four models.

# %%
for i in range(0, len(asked), len(asked) // 4):
    print(readable(asked[i]))
    for name, experience in after.items():
        print(f"   {name:9} {experience.rollout.texts[i]}")

# %% [markdown]
# **In words.**
#
# - How does β affect the diversity of the answers, and why? Go back to the best policy of part 4.
# - Compare with your prediction: what did you not expect?
# - Which of the three would you ship, and what would you want to know that neither table nor figure shows?

# %% [markdown] tags=["solution"]
# *Diversity.* The smaller β, the less diverse. The best policy is the reference reweighted by $e^{R/\beta}$: a small
# β turns small differences in reward into large factors, so that nearly all probability goes to the few answers that
# the reward model likes best, and these are alike, since it likes the same things in all of them. At β = 0.01 the
# entropy is 0.38 nats per token and distinct-2 0.18; SFT has 0.57 and 0.54. At β = 1 they are 0.58 and 0.51, nearly
# as diverse as SFT. The KL goes the other way: 16, 2.7 and 0.1 nats. The penalty does not ask for diversity; it asks
# to stay near a reference that is diverse. KL(policy‖reference) allows a policy to narrow, at the price of $\log k$
# nats for settling on one of $k$ equally likely answers.
#
# *Against the prediction.* At 0.01 the KL is well above 10 nats, for a score of 1.6; at 0.1 two thirds of the gain in
# score come for a sixth of the nats. The share of different answers does not fall at all: the answers are put
# together from the same courtesies, always in another order. And at 0.01 most of those printed above do not end: they
# are cut off at 32 tokens, although each pays a point for that. Lesson 05 shows why.
#
# *To ship.* Of these three 0.1: two thirds of the gain in score (1.1 of 1.7) for 2.7 nats, and still varied. But the
# score is the proxy. What is missing is whether the answers are *right*: gold in the pocket world (lesson 05 draws
# it), people's judgement outside of it. A second seed is missing too: these are three runs of 8 updates, one for each
# β.
