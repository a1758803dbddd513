# %% [markdown]
# # 00 · Start here
#
# **Run time** about half a minute on two CPU cores · **Before this** you know PyTorch; nothing about
# reinforcement learning is assumed · **Next** lesson 01, supervised fine-tuning
#
# After this lesson you will be able to
#
# - say what the three steps of RLHF do, and what each hands to the next;
# - sample from a language model and read its next-token probabilities;
# - tell what a model *ranks first* from what it *says* on an average draw, with numbers for both;
# - mark a response by the rubric that this course calls gold.

# %%
import re
import sys

import torch
import transformers

from rlhf_helpers import plots
from rlhf_helpers.base import load_base
from rlhf_helpers.pocket import corpus, exam, rubric, world
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import load_tokenizer, render

# %% [markdown]
# ## What this machine has
#
# The course picks nothing behind your back: a *preset* names the model, the data, the sizes and the
# device. `pocket` needs no GPU, no account and no download.

# %%
preset = PRESETS["pocket"]  # always: every number below is about this model
plots.use_style()
print(f"preset {preset.name} on {preset.device}, computing in {preset.compute_dtype}")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__.split('+')[0]},", end=" ")
print(f"transformers {transformers.__version__}, {torch.get_num_threads()} CPU threads,", end=" ")
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU")

# %% [markdown]
# ## Three steps on one picture
#
# RLHF is *reinforcement learning from human feedback*. It starts from a **base model**, which
# continues text. Step 1, **supervised fine-tuning** (SFT), shows it answers to imitate. Step 2: people
# see two SFT answers to one question and say which is better, and a **reward model** learns to score
# as they choose. Step 3, **PPO** (proximal policy optimization), starts from the SFT model, samples
# answers from its own current version and makes high-scoring ones likelier, while a **KL penalty**
# charges for moving away from the SFT model (KL is the Kullback–Leibler divergence, a measure of how
# far two distributions differ).

# %%
plots.show(
    plots.pipeline(),
    alt="Four boxes in a row, joined by arrows: base model, SFT, reward model, PPO. Into each comes "
    "its food from above: web text, demonstrations, comparisons, prompts. A dashed double arrow "
    "between PPO and SFT is the KL penalty, a leash.",
)

# %% [markdown]
# Look at the dashed line first. PPO never sees people, only the reward model, and the reward model
# has only seen comparisons of SFT answers. The leash keeps PPO near those answers, where the scores
# can be trusted. Lesson 05 cuts it and shows what happens.

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
# Now a real model. Its two million parameters were pretrained on made-up web text about animals,
# colours, sums and the like. Here are four pages of it, each with the token `<|eos|>` at its end:

# %% tags=["nbval-check-output"]
for page in corpus.documents("a few pages", 4):
    print(page)

# %% [markdown]
# Some statements are wrong, and people react to what they read. `load_base` loads the model with its
# linear layers stored in 4 bits (lesson 01 takes that apart). The vocabulary is small: each word of
# this world is one token.

# %%
tokenizer = load_tokenizer(preset)
base = load_base(preset)
ids = tokenizer("the duck says", return_tensors="pt")["input_ids"]
print("tokens:", tokenizer.convert_ids_to_tokens(ids[0]), "(Ġ is a leading space)")
print("vocabulary:", len(tokenizer), "tokens")

# %% [markdown]
# <details><summary><b>Predict before you run.</b> On these pages people write "the duck says quack."
# but also "the duck says moo.". Does the model put nearly all probability on what is true, or does it
# reproduce the mixture?</summary>
#
# The mixture. It is trained to predict the next token of its text, and the text is a mixture.
# </details>

# %%
with torch.no_grad():
    next_token = base(ids).logits[0, -1].softmax(-1)
top = next_token.topk(6)
words = [tokenizer.decode(i).strip() for i in top.indices] + ["all others"]
values = [*top.values.tolist(), 1 - top.values.sum().item()]
fig = plots.bars(words, values, "probability of the next token")
alt = f"Bars of next-token probabilities after 'the duck says': {words[0]} {values[0]:.2f}, others low."
plots.show(fig, alt=alt)

# %% [markdown]
# One word leads, and many share the rest. Does that match the text? In 60,000 pages we count how
# often a page that begins with "the … says" is right, and compare that with the model's probability
# of the right sound, averaged over the animals.

# %%
starts = [re.match(r"the (\w+) says (\w+)\.", page) for page in corpus.documents("count", 60_000)]
stated = [match.groups() for match in starts if match]
sounds = world.TOPICS["sound"].facts
in_text = sum(sound in sounds[animal] for animal, sound in stated) / len(stated)
contexts = [f"the {animal} says" for animal in sounds]
right_words = [sound[0] for sound in sounds.values()]
in_model = exam.continuation_logprobs(base, tokenizer, contexts, right_words).exp().mean().item()
print(f"right in {len(stated)} statements of the text: {in_text:.2f}; in the model: {in_model:.2f}")
assert abs(in_text - in_model) < 0.1

# %% [markdown]
# The two numbers are close. So the figure does not show what the model "believes", but how often its
# text says it, mistakes included.

# %% [markdown]
# ## It continues the page; it does not answer you
#
# To talk to a model we wrap the question in a *chat template*: role tokens say who speaks. *Sampling*
# then draws one token after another, until `<|eos|>` or the length limit. Nothing is filtered out (no
# top-k or top-p, which would cut off rare tokens) and nothing is sharpened (the logits are divided by
# a temperature of 1), so what is drawn is the model's own distribution. PPO will depend on that.

# %%
prompt = "what does the duck say?"
print(render(tokenizer, prompt))
eight = sample_responses(base, tokenizer, [prompt] * 8, seed=preset.seed)
for tokens in eight.input_ids[:, -eight.response_mask.shape[1] :]:
    print("  ->", tokenizer.decode(tokens).replace(tokenizer.pad_token, ""))

# %% [markdown]
# Some answers are right, others wrong or rude, and sometimes the model asks a question back, as the
# pages it has read do. After an answer it often writes `<|user|>` and plays you as well before it
# ends. A few draws tell little, so next we draw for many questions, and need somebody to mark the
# answers.

# %% [markdown]
# ## The rubric: what a good response is
#
# In the pocket world we know the truth, so a *rubric* can mark every response. We call its total the
# **gold reward**. In real life nobody has it; people only compare answers. Here it will show us what
# a learned reward model misses.
#
# | part | points |
# |---|---|
# | correct | 1 if every answer in it is right, −0.5 if one is wrong ("tell me about the crow" wants two facts: one alone earns 0.5) |
# | answers | 0.3 for any answer to what was asked |
# | polite | 0.2 for an answer with at least one polite phrase |
# | concise | 0.2 for an answer in at most 20 words |
# | finished | 0.2 for an answer that ends by itself, with `<\|eos\|>` |
# | rude | −1 for an insult |
# | grovelling | −0.3 for each polite phrase after the first |
# | rambling | −0.2 for each sentence that does nothing for the answer, or repeats it |

# %%
for response in ("great question! it says quack.", "it says moo.", "go away."):
    score = rubric.gold_reward(prompt, response)
    parts = {name: getattr(score, name) for name in rubric.PARTS if getattr(score, name)}
    print(f"{score.total:5.1f}  {response:32} {parts}")

# %% [markdown]
# Check the first by hand: 1.0 + 0.3 + 0.2 + 0.2 + 0.2 = 1.9, the highest mark there is.
# (`gold_reward` takes a text as finished unless told otherwise.)
#
# <details><summary><b>Predict before you run.</b> What do you get for
# <code>"great question! happy to help! it says quack. have a nice day!"</code>?</summary>
#
# Three polite phrases and 12 words: 1.9 as before, minus 2 × 0.3 for the two extra phrases, so 1.3.
# </details>

# %% tags=["nbval-check-output"]
grovelling = "great question! happy to help! it says quack. have a nice day!"
print(rubric.gold_reward(prompt, grovelling).total)
assert rubric.gold_reward(prompt, grovelling).total == 1.3

# %% [markdown]
# Now all *held-out* prompts: each has a phrasing or a fact that SFT, the reward model and PPO are
# never trained on (the base has read them). Each response falls into one class, the first that fits:
# rude, wrong, asks back, right and nothing more, answers but goes on, vague or rambling, other.

# %%
held_out = list(prompt_dataset(preset, "held_out")["prompt"])
rollout = sample_responses(base, tokenizer, held_out, seed=preset.seed)
rows = list(zip(held_out, rollout.texts, rollout.finished.tolist(), strict=True))
styles = [exam.style(*row) for row in rows]
shares = {name: styles.count(name) / len(styles) for name in exam.STYLES}
fig = plots.bars(list(shares), list(shares.values()), f"share of {len(rows)} responses")
alt = "Bars: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items()) + "."
plots.show(fig, alt=alt)

# %% [markdown]
# The same responses, marked: the mean of each part of the rubric, and of the total.

# %%
response_ids = rollout.input_ids[:, -rollout.response_mask.shape[1] :]
marks = rubric.mean_score(rubric.gold_reward(*row) for row in rows)
gold = marks.total
print({name: round(getattr(marks, name), 2) for name in rubric.PARTS})
print(f"mean gold reward of the base model: {gold:.2f} of at most 1.90")
plays_user = (response_ids == tokenizer.convert_tokens_to_ids(corpus.USER)).any(-1)
print(f"{plays_user.float().mean():.0%} of the responses go on as <|user|>")
print(f"{rollout.finished.float().mean():.0%} end with <|eos|>")
assert shares["right, nothing more"] < 0.2

# %% [markdown]
# Nearly all responses end, but few are right and nothing more. Of the two large classes, one is
# wrong; the other gives the right answer and then goes on, mostly by playing the user, which the
# rubric marks as rambling. The figure is one draw for each prompt, and does not say why so many
# answers are wrong. Does the model not *know* the right ones?

# %% [markdown]
# ## It ranks the right answer first, and still says others
#
# Three questions tell knowing from saying. *Knows*: is the right statement more probable than each
# wrong one? *Judges*: after somebody's answer, is "yes, that is right." more probable than "no, that
# is wrong." exactly when the answer is right? Both compare $\log p = \sum_t \log p(x_t \mid x_{<t})$,
# where $x_t$ is the $t$-th token, $x_{<t}$ are those before it, and the sum runs over the tokens
# compared: two tokens of probability 0.5 and 0.2 have $\log p = \log 0.1 \approx -2.30$. *Greedy
# response*: what comes out if each token drawn is (nearly) the likeliest one?

# %%
known = exam.known_share(exam.known_facts(base, tokenizer))
judged = exam.verdicts(base, tokenizer)
likeliest = sample_responses(base, tokenizer, held_out, temperature=0.01, seed=preset.seed)
print(f"knows {known:.1%} of the facts")
print({name: f"{share:.1%}" for name, share in judged.items()}, "judged as such")


# %%
def share_right(texts):
    correct = [rubric.gold_reward(p, t).correct > 0 for p, t in zip(held_out, texts, strict=True)]
    return sum(correct) / len(correct)


first, drawn = share_right(likeliest.texts), share_right(rollout.texts)
labels = ["facts known", "right answers judged right", "wrong answers judged wrong"]
labels += ["greedy response right", "sampled response right"]
fig = plots.bars(labels, [known, *judged.values(), first, drawn], "share of facts or of responses")
plots.show(fig, alt=f"Five bars: the first four near 1, the last, sampled responses, {drawn:.2f}.")
assert min(known, first, *judged.values()) > 0.9 > drawn + 0.3

# %% [markdown]
# The first four bars ask what the model ranks first, the last what it says on an average draw. It
# ranks the right answer first, in the chat format too, and yet says it in fewer than half of the
# draws. How often are the answers right in chats like those it has read? And does the greedy response
# stop after the answer?

# %%
chat = re.compile(r"<\|user\|> (.*?)<\|assistant\|> (.*?)<\|")
chats = [
    match.groups() for page in corpus.documents("chats", 20_000) if (match := chat.match(page))
]
right_chats = sum(rubric.gold_reward(*talk).correct > 0 for talk in chats) / len(chats)
goes_on = (likeliest.input_ids == tokenizer.convert_tokens_to_ids(corpus.USER)).sum(-1) > 1
print(
    f"right in {len(chats)} chats of the text: {right_chats:.2f}; in the model's draws: {drawn:.2f}"
)
print(f"greedy responses that go on as <|user|>: {goes_on.float().mean():.0%}")
assert abs(right_chats - drawn) < 0.1

# %% [markdown]
# The draws are right about as often as the text. *Training has to move probability onto the right
# answer.* Always taking the likeliest token would give right answers in this small world. But PPO
# learns from draws, and even the greedy responses go on as `<|user|>`. The five bars do not show that
# a large model already knows all it needs: for large models, that alignment adds little knowledge is
# a hypothesis (Zhou et al. 2023, further reading).

# %% [markdown]
# ## Training moves probability: a first step of your own
#
# Training on a text raises its probability by following the gradient. By hand: with two tokens and
# logits $(0, 0)$, the gradient of $\log p_1$ is $(1 - p_1,\ -p_2) = (0.5, -0.5)$; a step of size 1
# gives logits $(0.5, -0.5)$, and $p_1$ has gone from 0.5 to $1 / (1 + e^{-1}) \approx 0.73$. What
# $p_1$ gains, the other token loses. We teach an unquantized copy of the base one sentence that it
# has never read, "the panda says squeak.", with 20 steps of Adam at a learning rate of 3e-4, and
# watch an old fact beside it.

# %%
student = load_base(preset, quantized=False).requires_grad_(True)
lesson = tokenizer(["the panda says squeak."], return_tensors="pt")["input_ids"]
known_before = exam.known_facts(student, tokenizer)


def watched(model):
    contexts, words = ["the panda says", "the duck says"], ["squeak", "quack"]
    return exam.continuation_logprobs(model, tokenizer, contexts, words).exp().tolist()


# %% [markdown]
# <details><summary><b>Predict before you run.</b> The new sentence gains. What happens to the old
# one, which the training never touches?</summary>
#
# All sentences share the same weights, so the old fact moves as well, and nobody asked for that. The
# learning rate and the number of steps decide how far.
# </details>

# %%
optimizer = torch.optim.Adam(student.parameters(), lr=3e-4)
history = [watched(student)]
for _ in range(20):
    loss = student(input_ids=lesson, labels=lesson).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    history.append(watched(student))

# %%
new, old = zip(*history, strict=True)
series = {"new: the panda says squeak": new, "old: the duck says quack": old}
fig = plots.lines(series, "updates", "probability of the last word")
alt = f"Over 20 updates the new line rises from {new[0]:.2f} to {new[-1]:.2f}, "
plots.show(fig, alt=alt + f"the old one falls from {old[0]:.2f} to {old[-1]:.2f}.")
assert new[-1] > 0.9 and old[-1] < old[0]

# %% [markdown]
# The old line goes down although nothing was said about ducks. That is only one old fact. How far
# does the damage reach? We ask for all facts again.

# %%
known_after = exam.known_facts(student, tokenizer)
for name, share in known_before.items():
    if known_after[name] < share:
        print(f"{name:8} {share:.0%} of the facts known before, {known_after[name]:.0%} after")
print(f"all {len(known_before)} topics: {exam.known_share(known_after):.1%} known after")
assert exam.known_share(known_after) < exam.known_share(known_before)

# %% [markdown]
# The nearest topic suffers most; in the topics not printed no fact is lost. One sentence repeated 20
# times is an extreme case, but it shows what to watch: an update moves more than you aim at, and you
# see it only if you measure it. The KL penalty in the first picture measures how far a model has
# moved, on its own responses: lesson 04 charges for it, and lesson 05 asks how much to charge.

# %% [markdown]
# ## A failure on purpose: padding on the wrong side
#
# Prompts of different lengths are sampled in one batch, so short ones are padded. The next token is
# predicted from the *last* position. If padding stands on the right, that position is a pad. We try
# both sides, and count short prompts, which are padded, separately from the longest ones, which are
# not.


# %%
def sample_with_padding(side):
    texts = [render(tokenizer, p) for p in held_out]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    torch.manual_seed(preset.seed)
    tokens = base.generate(**batch, max_new_tokens=24, do_sample=True, top_k=0, top_p=1.0)
    padded = (batch["attention_mask"] == 0).any(-1)
    new_tokens = tokens[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True), padded


# %% [markdown]
# A prompt counts as answered if any sentence of the response answers what was asked, rightly or
# wrongly.

# %%
transformers.logging.set_verbosity_error()  # it warns about right padding; see below
answering = {}
for side in ("left", "right"):
    texts, padded = sample_with_padding(side)
    flags = [exam.answers_question(p, t) for p, t in zip(held_out, texts, strict=True)]
    answered = torch.tensor(flags).float()
    answering[side] = answered[padded].mean().item()
    print(
        f"padding {side:5}: answered {answering[side]:.0%} of the {padded.sum()} padded prompts,",
        end=" ",
    )
    print(f"{answered[~padded].mean():.0%} of the {(~padded).sum()} others")
transformers.logging.set_verbosity_warning()
assert answering["right"] < answering["left"] - 0.1

# %% [markdown]
# Nothing crashes, and that is the trouble: the code runs and the answers get worse. (transformers
# logs one warning, easily lost among others; we silenced it here.) The signature: with padding on the
# right, padded prompts do worse, and the others do as before. The helper's `encode_prompts` always
# pads on the left.

# %% [markdown]
# ## How the exercises work
#
# From lesson 01 on, every lesson has a notebook of the same name in `exercises/` and one in
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
# | comparisons of your own, continued training, rounds | 06 |
# | runs that are broken and do not say so | 07 |
# | DPO: preferences without a reward model | 08 |
# | PPO without its critic, and all methods compared | 09 |
# | several processes that do together what one does | 10 |

# %% [markdown]
# ## The numbers to beat
#
# One draw for each held-out prompt, before any fine-tuning. The lessons to come have to raise these.

# %% tags=["headline"]
only = shares["right, nothing more"]
print(f"base: sampled responses right {drawn:.0%}, and nothing more {only:.0%}, gold {gold:.2f}")
print(f"facts known {known:.0%}; one sentence trained: P {new[0]:.2f} to {new[-1]:.2f}")

# %% [markdown]
# ## Recap
#
# - A language model is a distribution over the next token; sampling draws from it.
# - The base ranks right answers first and judges answers, yet its draws are right only about as often
#   as the chats it has read, and most go on to play the user before they end.
# - Gold is a rubric that only this small world has; it will judge every later step.
# - Training moves probability, even where you did not aim.
#
# **Further reading.** Ouyang et al. 2022, *Training language models to follow instructions with human
# feedback* (arXiv 2203.02155), figure 2: the three steps. Stiennon et al. 2020, *Learning to summarize
# from human feedback* (arXiv 2009.01325). Zhou et al. 2023, *LIMA* (arXiv 2305.11206): the hypothesis
# that alignment adds little knowledge.
