# %% [markdown]
# # 00 · Start here
#
# **Run time** about 2 minutes on two CPU cores · **Before this** you know PyTorch; nothing about
# reinforcement learning is assumed · **Next** lesson 01, supervised fine-tuning
#
# After this lesson you will be able to
#
# - say what the three steps of RLHF do, and why each needs the one before it;
# - sample from a language model and read its next-token probabilities;
# - tell a model that *knows* an answer from one that *gives* it, with numbers for both;
# - mark a response by the rubric that this course calls gold.

# %%
PRESET = "pocket"  # every number below is from this preset

import re
import sys

import torch
import transformers

from rlhf_helpers import plots
from rlhf_helpers.data import encode_prompts, load_tokenizer, prompt_dataset
from rlhf_helpers.pocket import corpus, exam, rubric, world
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import load_base
from rlhf_helpers.rollout import sample_responses

# %% [markdown]
# ## What this machine has
#
# The course picks nothing behind your back: a *preset* names the model, the data, the sizes and the
# device. `pocket` needs no GPU, no account and no download.

# %%
preset = load_preset(PRESET)
plots.use_style()
print(f"preset {preset.name} on {preset.device}, computing in {preset.compute_dtype}")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__.split('+')[0]},", end=" ")
print(f"transformers {transformers.__version__}, {torch.get_num_threads()} CPU threads")

# %% [markdown]
# ## Three steps on one picture
#
# A **base model** continues text. **Supervised fine-tuning** (SFT) shows it the job: answer the
# question. A **reward model** (RM) learns from comparisons what people prefer. **PPO** changes the
# model so that the reward rises, while a **KL penalty** ties it to the SFT model. The rest of the
# course walks through this picture from left to right.

# %%
plots.show(
    plots.pipeline(),
    alt="Four boxes from left to right: base model, SFT, reward model and PPO. An arrow of "
    "demonstrations enters SFT, comparisons enter the reward model, and a KL leash ties PPO to SFT.",
)

# %% [markdown]
# Read the dashed line first. PPO does not see people, only the reward model; and the reward model is
# right only where it has seen comparisons. The leash keeps PPO close to the SFT model, where those
# comparisons came from. Lesson 05 cuts it, and shows what happens.

# %% [markdown]
# ## A language model gives probabilities, nothing else
#
# For each token of its vocabulary a model puts out one number, a *logit* $z_i$. The probability is
# $p_i = e^{z_i} / \sum_j e^{z_j}$. With three tokens you can check it by hand: $e^{2} \approx 7.39$,
# $e^{1} \approx 2.72$, $e^{0} = 1$, and their sum is about $11.11$.

# %% tags=["nbval-check-output"]
logits = torch.tensor([2.0, 1.0, 0.0])
probabilities = logits.exp() / logits.exp().sum()
print("by hand      ", [round(p, 3) for p in probabilities.tolist()])
print("torch.softmax", [round(p, 3) for p in logits.softmax(-1).tolist()])

# %% [markdown]
# The same on a real model. `load_base` loads two million parameters that were pretrained on made-up
# web text about animals, colours, sums and the like, and stores its linear layers in 4 bits (lesson
# 01 takes that apart). The vocabulary is small: each common word is one token.

# %%
tokenizer = load_tokenizer(preset)
base = load_base(preset)
ids = tokenizer("the duck says", return_tensors="pt")["input_ids"]
print("tokens:", tokenizer.convert_ids_to_tokens(ids[0]), "(Ġ is a blank)")
print("vocabulary:", len(tokenizer), "tokens")

# %% [markdown]
# <details><summary><b>Predict before you run.</b> In the base text about two statements in three are
# right, and a wrong one takes any other sound. Roughly what probability does "quack" get, and what is
# left for all other sounds together?</summary>
#
# A model that fits its text well says about 2/3 for "quack" and spreads about 1/3 over the other
# sounds. It reports how often people write it, which is not the same as what is true.
# </details>

# %%
with torch.no_grad():
    next_token = base(ids).logits[0, -1].softmax(-1)
top = next_token.topk(6)
words = [tokenizer.decode(i).strip() for i in top.indices]
fig = plots.bars(words, top.values.tolist(), "probability of the next token")
plots.show(
    fig, alt=f"Bar chart of next-token probabilities after 'the duck says': {words[0]} far ahead."
)

# %% [markdown]
# One word leads, and the rest share what is left. Is that what the text says? We count, over all
# animals, how often a statement of this form is right in 30,000 pages of base text, and compare it
# with the model's probability of the right sound.

# %%
pages = " ".join(corpus.documents("count", 30_000))
stated = re.findall(r"the (\w+) says (\w+)\.", pages)
sounds = world.TOPICS["sound"].facts
in_text = sum(sound in sounds[animal] for animal, sound in stated) / len(stated)
in_model = exam.continuation_logprobs(
    base, tokenizer, [f"the {animal} says" for animal in sounds], [s[0] for s in sounds.values()]
).exp()
print(f"right in the text {in_text:.2f}, probability of right in the model {in_model.mean():.2f}")
assert abs(in_text - in_model.mean()) < 0.1

# %% [markdown]
# The two agree. So the figure does not show what the model "believes": it shows the frequencies of
# its text, mistakes included.

# %% [markdown]
# ## It continues the page; it does not answer you
#
# To talk to a model we wrap the question in a *chat template*: role tokens that say who speaks.
# Sampling then draws one token after another from the probabilities above, until the end token
# `<|eos|>` or the length limit. Nothing is filtered out: no top-k, no top-p, temperature 1, so what
# is drawn is the model's own distribution. PPO will depend on that.

# %%
prompt = "what does the duck say?"
print(encode_prompts(tokenizer, [prompt], preset.prompt_length)["input_ids"].tolist())
print(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False))
for text in sample_responses(base, tokenizer, [prompt] * 8, seed=preset.seed).texts:
    print("  ->", text)

# %% [markdown]
# Some answers are right. Others are wrong, rude, or ramble, or another question comes back, as on
# the pages the model has read. A single draw tells little, so we draw for many questions, and for
# that we need somebody to mark them.

# %% [markdown]
# ## The rubric: what a good response is
#
# In the pocket world we know the truth, so a *rubric* can mark every response. We call its total the
# **gold reward**. In real life nobody has it; people only compare answers. Here it will show us what
# a learned reward model misses. The parts, in points:

# %%
for response in ("great question! it says quack.", "it says moo.", "go away."):
    score = rubric.gold_reward(prompt, response)
    parts = {name: getattr(score, name) for name in rubric.PARTS if getattr(score, name)}
    print(f"{score.total:5.1f}  {response:32} {parts}")

# %% [markdown]
# Check the first by hand: right 1.0, answers the question 0.3, polite once 0.2, concise 0.2, finished
# 0.2, together 1.9, the best there is. Politeness pays once; each further phrase costs 0.3.
#
# <details><summary><b>Predict before you run.</b> What do you get for
# <code>"great question! happy to help! it says quack. have a nice day!"</code>?</summary>
#
# Three polite phrases: 1.9 as before, minus 2 × 0.3 for the two too many, so 1.3.
# </details>

# %% tags=["nbval-check-output"]
grovelling = "great question! happy to help! it says quack. have a nice day!"
print(rubric.gold_reward(prompt, grovelling).total)
assert rubric.gold_reward(prompt, grovelling).total == 1.3

# %% [markdown]
# Now all prompts that training never uses: *held-out* phrasings and *held-out* facts. Each response
# falls into one class.

# %%
held_out = prompt_dataset(preset, "held_out")["prompt"]
rollout = sample_responses(base, tokenizer, list(held_out), seed=preset.seed)
rows = list(zip(held_out, rollout.texts, rollout.finished.tolist(), strict=True))
styles = [exam.style(*row) for row in rows]
shares = [styles.count(name) / len(styles) for name in exam.STYLES]
fig = plots.bars(exam.STYLES, shares, f"share of {len(rows)} responses to held-out prompts")
plots.show(fig, alt="Bar chart of response classes; right and finished is well under half.")

# %%
gold = sum(rubric.gold_reward(*row).total for row in rows) / len(rows)
print(f"mean gold reward of the base model: {gold:.2f} of at most 1.90")
assert shares[0] < 0.5

# %% [markdown]
# Few of the responses are right, to the point and finished. The largest classes are wrong answers and
# right ones that go on with what people on the web write next. The figure does not say why. Does the
# model not *know*, or does it know and not *do*?

# %% [markdown]
# ## It knows more than it says
#
# Two other questions separate these. *Knowledge*: is the right statement ("the duck says quack.")
# more probable than each wrong one? *Judgement*: after somebody's answer, does the model expect "yes,
# that is right." after right answers, and "no, that is wrong." after wrong ones? Both compare sums of
# token log-probabilities, $\log p(\text{text}) = \sum_t \log p(x_t \mid x_{<t})$.

# %%
known = exam.known_facts(base, tokenizer)
judged = exam.verdicts(base, tokenizer)
fact_count = {name: len(topic.facts) for name, topic in world.TOPICS.items()}
known_share = sum(known[n] * fact_count[n] for n in known) / sum(fact_count.values())
print(f"knows {known_share:.1%} of {sum(fact_count.values())} facts")
print({name: f"{share:.1%}" for name, share in judged.items()}, "judged as such")

# %%
correct = [rubric.gold_reward(*row).correct > 0 for row in rows]
fig = plots.bars(
    ["knows the fact", "judges a right answer", "judges a wrong answer", "gives a right answer"],
    [known_share, *judged.values(), sum(correct) / len(correct)],
    "share",
)
plots.show(
    fig, alt="Four bars: knowing and judging are near 1, giving a right answer is far lower."
)
assert known_share > 0.9 and min(judged.values()) > 0.9 > sum(correct) / len(correct)

# %% [markdown]
# The gap between the first three bars and the last is what this course is about. The knowledge is
# there; what is missing is the habit of using it for the person who asks. *Alignment* moves
# probability towards what people prefer; it adds few facts. The figure does not show that this is so
# for large models; there it is a hypothesis (Zhou et al. 2023, further reading).

# %% [markdown]
# ## Training moves probability: a first step of your own
#
# Training on a text raises its log-probability by following the gradient. We teach the base one
# sentence that it has never read, "the panda says squeak.", with 20 steps of Adam on an unquantized
# copy, and watch an old fact beside it.

# %%
student = load_base(preset, quantized=False).requires_grad_(True)
lesson = tokenizer(["the panda says squeak."], return_tensors="pt")["input_ids"]
watched = {"new: the panda says squeak": " squeak", "old: the duck says quack": " quack"}


def probability_of(model, sentence, word):
    context = tokenizer(" ".join(sentence.split()[1:-1]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(context).logits[0, -1].softmax(-1)[tokenizer(word)["input_ids"][0]].item()


# %% [markdown]
# <details><summary><b>Predict before you run.</b> The new sentence gains. What happens to the old
# one, which the training never touches?</summary>
#
# All sentences share the same weights, so the old fact moves as well, and nobody asked for that. The
# size of the step decides by how much.
# </details>

# %%
optimizer = torch.optim.Adam(student.parameters(), lr=3e-4)
history = []
for _ in range(20):
    history.append([probability_of(student, name, word) for name, word in watched.items()])
    loss = student(input_ids=lesson, labels=lesson).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss of the last step: {loss.item():.3f} nats per token")

# %%
fig = plots.lines(
    dict(zip(watched, zip(*history, strict=True), strict=True)), "step", "probability"
)
plots.show(fig, alt="Two lines over 20 training steps: the new sentence rises towards 1.")
before, after = exam.known_facts(base, tokenizer), exam.known_facts(student, tokenizer)
damage = {name: f"{before[name]:.0%} to {after[name]:.0%}" for name in ("sound", "home", "sum")}
print("facts known, before and after:", damage)
assert history[-1][0] > 0.5 > history[0][0]

# %% [markdown]
# The new sentence is learnt within a few steps. The line under the figure is the price: facts known
# in three topics, before and after. One sentence repeated 20 times is an extreme case, but the lesson
# is general. Every update moves more than you aim at, and you see it only if you measure it. That is
# why the frozen reference and the KL penalty exist.

# %% [markdown]
# ## A failure on purpose: padding on the wrong side
#
# Responses to prompts of different lengths are sampled in one batch, so the short prompts are padded.
# Generation appends on the right; padding must therefore stand on the *left*. We put it on the right
# and look at what comes out.


# %%
def sample_with_padding(side):
    texts = [f"<|user|> {p}<|assistant|>" for p in held_out[:128]]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    torch.manual_seed(preset.seed)
    transformers.logging.set_verbosity_error()  # it warns about the right side; see below
    tokens = base.generate(**batch, max_new_tokens=24, do_sample=True, top_k=0, top_p=1.0)
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]


# %%
answering = {}
for side in ("left", "right"):
    texts = sample_with_padding(side)
    answered = [exam.answers_question(p, t) for p, t in zip(held_out[:128], texts, strict=True)]
    answering[side] = sum(answered) / len(answered)
    print(f"padding {side:5}: {answering[side]:.0%} answer what was asked, e.g. {texts[0]!r}")
assert answering["right"] < answering["left"]

# %% [markdown]
# Nothing crashes, and that is the trouble: the code runs and the answers get worse. (transformers
# logs one warning, easily lost among others; we silenced it here.) The signature in your own log is a
# share that is too low from the very first step, before any training. The helper's `encode_prompts`
# always pads on the left.

# %% [markdown]
# ## How the exercises work
#
# From lesson 01 on, each lesson has a notebook of the same name in `exercises/` and one in
# `solutions/`. An exercise gives you a function to fill in. The check below it runs your function and
# *names the likely mistake* if it is wrong; if you have not tried yet, it says so, and the next cell
# goes on with the reference version, so that Run All always works.
#
# | idea | taught in |
# |---|---|
# | chat template, prompt masking, 4-bit weights, LoRA | 01 |
# | pairs, Bradley–Terry, the reward model and its blind spot | 02 |
# | log-probabilities, advantages, the clipped objective | 03 |
# | four roles on one base, a whole PPO run | 04 |
# | the KL penalty, reward hacking, diversity | 05 |

# %% [markdown]
# ## The number to beat

# %% tags=["headline"]
print(
    f"base: {shares[0]:.0%} of held-out prompts answered right and finished, gold {gold:.2f}; "
    f"knows {known_share:.0%}, taught 1 sentence: P {history[0][0]:.2f} to {history[-1][0]:.2f}"
)

# %% [markdown]
# ## Recap
#
# - A language model is a distribution over the next token; sampling draws from it.
# - The base model knows its facts and judges answers, yet continues the page instead of answering.
# - Gold is a rubric that only this small world has; it will judge every later step.
# - Training moves probability, also where you did not aim.
#
# **Further reading.** Ouyang et al. 2022, *Training language models to follow instructions with human
# feedback* (arXiv 2203.02155), figure 2: the three steps. Stiennon et al. 2020, *Learning to summarize
# from human feedback* (arXiv 2009.01325). Zhou et al. 2023, *LIMA* (arXiv 2305.11206): the hypothesis
# that alignment adds little knowledge.
