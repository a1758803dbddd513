"""Make the files that the package ships: tokenizer, base model, reference adapters.

    python tools/train_assets.py base       # about 40 minutes on two cores, resumes if stopped
    python tools/train_assets.py card       # measure the shipped base and write its model card
    python tools/train_assets.py sft        # the SFT adapter, and ten seeds of lesson 01 (minutes)
    python tools/train_assets.py reward     # the reward adapter and head, ten seeds of lesson 02
    python tools/train_assets.py unbiased   # the same from an annotator without bias, for lesson 05

Everything is deterministic from the seed: the text, its order, the initial weights.
"""

import argparse
import json
import os
import re
import time
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_helpers import reward, sft
from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import optimizer_tensors, restore_optimizers, whole_folder
from rlhf_helpers.pocket import corpus, exam, rubric, world
from rlhf_helpers.pocket.annotator import Annotator, ceiling
from rlhf_helpers.pocket.preferences import collect_preferences
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import sft_dataset
from rlhf_helpers.text import encode_examples, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "rlhf_helpers" / "assets"
SEED = 0
CONTEXT = 128  # tokens a row in pretraining; the model itself accepts MAX_CONTEXT
MAX_CONTEXT = 256
ROWS = 32
STEPS = 7000
WARMUP = 200
PEAK_LR = 2e-3
SAVE_EVERY = 250
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|> {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|> {{ message['content'] }}<|eos|>"
    "{% else %}{{ raise_exception('only user and assistant speak here') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word of the world is one token."""
    special = [corpus.PAD, corpus.EOS, corpus.USER, corpus.ASSISTANT]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,  # an upper bound: merging stops when each word is one token
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((re.sub(r"<\|\w+\|>", " ", d) for d in documents), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=corpus.PAD,
        eos_token=corpus.EOS,
        additional_special_tokens=[corpus.USER, corpus.ASSISTANT],
        model_max_length=MAX_CONTEXT,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of two million parameters with random weights; widths are multiples of 64 for NF4."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batch(tokenizer: PreTrainedTokenizerFast, name: str, rows: int) -> torch.Tensor:
    """Token ids [rows, CONTEXT]; each row begins with a new document and is cut at the end."""
    documents = corpus.documents(name, rows * 10)
    filled, row = [], []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        row += ids
        if len(row) >= CONTEXT:
            filled.append(row[:CONTEXT])
            row = []
        if len(filled) == rows:
            return torch.tensor(filled)
    raise ValueError(
        f"{len(documents)} documents fill only {len(filled)} of {rows} rows: ask for more"
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return PEAK_LR * min((step + 1) / WARMUP, max(0.0, (steps - step) / (steps - WARMUP)))


def save_atomically(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write safetensors beside the target, then rename: a kill leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=metadata)
    os.replace(part, path)


def training_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Weights by parameter name, and the optimizer's state."""
    parameters = dict(model.named_parameters())
    weights = {f"weight/{name}": p.detach() for name, p in parameters.items()}
    return weights | optimizer_tensors({"adam": optimizer})


def resume(model, optimizer, path: Path, steps: int) -> tuple[int, float]:
    """Load a saved state of the same run; return the next step and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as saved:
        facts = saved.metadata()
        tensors = {key: saved.get_tensor(key) for key in saved.keys()}
    if facts.get("steps") != str(steps):
        raise ValueError(f"{path} is of a run of other length; remove it, or give its --steps")
    step, parameters = int(facts["step"]), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight/{name}"])
    restore_optimizers({"adam": optimizer}, tensors)
    return step, float(facts["seconds"])


@torch.no_grad()
def held_out_loss(model, tokenizer) -> float:
    """Mean loss in nats per token on 128 rows that training never drew."""
    ids = batch(tokenizer, "held-out", 128)
    return model(input_ids=ids, labels=ids).loss.item()


def pretrain(tokenizer, work: Path, steps: int = STEPS) -> tuple[LlamaForCausalLM, dict]:
    """Pretrain, saving every SAVE_EVERY steps under `work`; go on from what is there."""
    if steps <= WARMUP:
        raise ValueError(f"steps is {steps}; give more than the {WARMUP} of the warm-up")
    model = new_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    first, seconds = resume(model, optimizer, work / "state.safetensors", steps)
    start = time.perf_counter() - seconds
    log = (work / "log.jsonl").open("a", encoding="utf-8")
    for step in tqdm(range(first, steps), initial=first, total=steps, desc="pretraining"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids = batch(tokenizer, f"base-{SEED}-{step}", ROWS)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            metadata = {"step": str(step + 1), "steps": str(steps), "seconds": str(seconds)}
            save_atomically(training_state(model, optimizer), work / "state.safetensors", metadata)
            print(
                json.dumps({"step": step + 1, "loss": loss.item(), "s": seconds}),
                file=log,
                flush=True,
            )
    return model, {"steps": steps, "minutes": round((time.perf_counter() - start) / 60, 1)}


def make_base(work: Path, out: Path, steps: int) -> None:
    """Train tokenizer and model and write them to `out`."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    tokenizer = train_tokenizer(corpus.documents("tokenizer", 30_000))
    model, facts = pretrain(tokenizer, work, steps)
    facts |= {"held_out_loss": round(held_out_loss(model, tokenizer), 4)}
    model.to(torch.float16).save_pretrained(out)  # half the size; loading casts it back
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def measure(model, tokenizer) -> dict[str, str]:
    """The four promises about the base, measured: fluent, knows, judges, is no assistant."""
    known = exam.known_facts(model, tokenizer)
    facts = sum(len(topic.facts) for topic in world.TOPICS.values())
    judged = exam.verdicts(model, tokenizer)
    prompts = world.prompts("held_out")
    rollout = sample_responses(model, tokenizer, prompts, seed=SEED)
    finished = rollout.finished.tolist()
    styles = [exam.style(*row) for row in zip(prompts, rollout.texts, finished, strict=True)]
    fluency = world.fluency(exam.sampled_pages(model, tokenizer))
    return {
        "sampled sentences that are grammatical": f"{fluency:.1%}",
        f"facts known, of {facts}": f"{exam.known_share(known):.1%}",
        **{f"{name} judged as such": f"{value:.1%}" for name, value in judged.items()},
        **{
            f"held-out prompts: {name}": f"{styles.count(name) / len(styles):.1%}"
            for name in exam.STYLES
        },
    }


def write_card(out: Path) -> None:
    """Measure the base in `out`, unquantized and in NF4, print the numbers and write the card."""
    preset = load_preset("pocket", model=str(out))
    tokenizer = load_tokenizer(preset)
    columns = [measure(load_base(preset, quantized=q), tokenizer) for q in (False, True)]
    rows = [f"| {name} | {columns[0][name]} | {columns[1][name]} |" for name in columns[0]]
    training = json.loads((out / "training.json").read_text(encoding="utf-8"))
    text = CARD.format(
        table="\n".join(rows),
        parameters=f"{load_base(preset, quantized=False).num_parameters():,}",
        vocabulary=len(tokenizer),
        tokens=f"{training['steps'] * ROWS * CONTEXT / 1e6:.0f}",
        seed=SEED,
        **training,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    print(text)


CARD = """\
# The pocket base model

A Llama of {parameters} parameters (4 layers, width 192, {vocabulary} byte-level BPE tokens, context
256), pretrained from random weights on text that `rlhf_helpers.pocket.corpus` generates. No text,
weights or data of anybody else are in it. Made by `python tools/train_assets.py base`, measured by
`python tools/train_assets.py card`. Licence: Apache-2.0.

**Training.** {steps} steps, {tokens} million tokens, AdamW, bfloat16 autocast, {minutes} minutes
on two CPU cores, seed {seed}; held-out loss {held_out_loss} nats per token. Stored in float16.

| measured | unquantized | NF4 |
|---|---|---|
{table}

Facts: the right plain statement is more probable than each wrong one. Judged: after an answer, the
fitting one of "yes, that is right." and "no, that is wrong." is the likelier. Held-out prompts: one
response to each, sampled at temperature 1, by the classes of `rlhf_helpers.pocket.exam`.

**Honest limits.** It knows nothing outside its few hundred facts and cannot reason; sums are learnt
by heart. Its text is rude and wrong in places, on purpose. It is for this course and nothing else.
"""


def judge(model, tokenizer, seed: int) -> dict[str, float]:
    """Shares and gold of one response to each held-out prompt."""
    prompts = world.prompts("held_out")
    rollout = sample_responses(model, tokenizer, prompts, seed=seed)
    rows = list(zip(prompts, rollout.texts, rollout.finished.tolist(), strict=True))
    scores = [rubric.gold_reward(*row) for row in rows]
    return {
        "answers": sum(exam.answers_question(p, text) for p, text, _ in rows) / len(rows),
        "right": sum(score.correct > 0 for score in scores) / len(rows),
        "finished": sum(finished for *_, finished in rows) / len(rows),
        "gold": rubric.mean_score(scores).total,
    }


def forget_eos(input_ids, attention_mask, prompt_length):
    """Labels without EOS, a failure of lesson 01."""
    labels = sft.mask_prompt(input_ids, attention_mask, prompt_length)
    return labels.masked_fill(input_ids == eos_token_id(), sft.IGNORE)


@cache
def eos_token_id() -> int:
    """Of the pocket tokenizer."""
    return load_tokenizer(load_preset("pocket")).eos_token_id


def prompt_too(input_ids, attention_mask, prompt_length):
    """Labels on the prompt as well, a failure of lesson 01."""
    return input_ids.masked_fill(attention_mask == 0, sft.IGNORE)


# Name of a run in lesson 01: its settings and its labels.
SFT_RUNS = {
    "sft": (sft.SFTConfig(), sft.mask_prompt),
    "right labels": (sft.SFTConfig(steps=60, eval_every=10), sft.mask_prompt),
    "prompt too": (sft.SFTConfig(steps=60, eval_every=10), prompt_too),
    "no EOS": (sft.SFTConfig(steps=60, eval_every=10), forget_eos),
}


def record_sft(name: str, seed: int, save_to: Path | None = None) -> dict:
    """One run of lesson 01 with its own data, order, initial adapter and samples."""
    config, labels = SFT_RUNS[name]
    preset = load_preset("pocket", seed=seed)
    tokenizer, roles = load_tokenizer(preset), Roles(load_base(preset))
    roles.add("sft", seed=seed)
    lengths = preset.prompt_length, preset.response_length
    train = encode_examples(tokenizer, sft_dataset(preset), *lengths)
    written = sft_dataset(load_preset("pocket"), "held_out", copies=1)  # the same for every seed
    held_out = encode_examples(tokenizer, written, *lengths)
    before = judge(roles.use("sft"), tokenizer, seed) if name == "sft" else {}
    reports = list(sft.train_sft(roles, "sft", tokenizer, train, held_out, config, labels))
    if save_to:
        roles.save("sft", save_to)
    losses = {s.step: round(s.held_out["loss"], 4) for s in reports if s.held_out}
    row = {"run": name, "seed": seed, "seconds": round(reports[-1].seconds, 1)}
    row |= {f"{key} before": round(value, 4) for key, value in before.items()}
    row |= {k: round(v, 4) for k, v in judge(roles.use("sft"), tokenizer, seed).items()}
    return row | {"held_out_loss": losses}


def make_sft(out: Path, seeds: int) -> None:
    """The reference adapter, of seed 0, and the record of all runs beside it."""
    with whole_folder(out) as new:
        runs = [(name, seed) for name in SFT_RUNS for seed in range(seeds)]
        rows = []
        for name, seed in tqdm(runs, desc="sft"):
            save_to = new / "adapter" if (name, seed) == ("sft", 0) else None
            rows.append(record_sft(name, seed, save_to))
        for file in (new / "adapter").iterdir():
            file.rename(new / file.name)
        (new / "adapter").rmdir()
        (new / "runs.json").write_text(json_lines(rows), encoding="utf-8")
        (new / "README.md").write_text(sft_card(rows), encoding="utf-8")


def spread(values: list[float]) -> str:
    """Mean and range, such as "0.96 (0.95 to 0.98)"."""
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def sft_card(rows: list[dict]) -> str:
    """The adapter's card: how it was made, and the spread over seeds."""
    table = []
    for name, (config, _) in SFT_RUNS.items():
        runs = [row for row in rows if row["run"] == name]
        losses = [row["held_out_loss"][config.steps] for row in runs]
        columns = [spread(losses)] + [
            spread([row[key] for row in runs]) for key in ("answers", "right", "finished", "gold")
        ]
        table.append(f"| {name}, {config.steps} steps | " + " | ".join(columns) + " |")
    first = [row for row in rows if row["run"] == "sft"]
    before = [
        spread([row[f"{k} before"] for row in first])
        for k in ("answers", "right", "finished", "gold")
    ]
    table.insert(0, "| base | | " + " | ".join(before) + " |")
    return SFT_CARD.format(table="\n".join(table), seeds=len(first))


SFT_CARD = """\
# The reference SFT adapter of the pocket world

A LoRA adapter (rank 16, α 32, all linear layers but the last) in PEFT's own format, for the pocket
base in NF4. Trained as in lesson 01, seed 0, on generated demonstrations. Made by
`python tools/train_assets.py sft`. Licence: Apache-2.0.

Mean and range over {seeds} seeds, each with its own demonstrations, initial adapter and samples:
one response to each of 598 held-out prompts. `prompt too` and `no EOS` are the two failures of
lesson 01, `right labels` the run that they compare with. Every single run is in `runs.json`.

| run | held-out loss | answers the question | right | finished | gold |
|---|---|---|---|---|---|
{table}
"""


def collect(seed: int, annotator: Annotator):
    """Roles with the shipped SFT adapter, and pairs of its responses, as in lesson 02."""
    preset = load_preset("pocket", seed=seed)
    tokenizer, roles = load_tokenizer(preset), Roles(load_base(preset))
    roles.load("sft", ASSETS / "sft")
    prompts = world.prompts("train")
    pairs = collect_preferences(
        roles.use("sft"),
        tokenizer,
        prompts,
        annotator,
        seed=seed,
        cache=ROOT / "runs" / "assets" / "preferences",
    )
    return tokenizer, roles, pairs


def train_on(tokenizer, roles, train, held_out, seed: int) -> dict:
    """Train role `reward` from the SFT adapter on pairs; return its accuracies."""
    lengths = load_preset("pocket").prompt_length, load_preset("pocket").response_length
    encoded = [reward.encode_pairs(tokenizer, pairs, *lengths) for pairs in (train, held_out)]
    roles.add("reward", copy_of="sft")
    roles.add_head("reward", seed=seed)
    config = reward.RewardConfig(eval_every=reward.RewardConfig.steps)
    *_, last = reward.train_reward_model(roles, "reward", tokenizer, *encoded, config)
    chosen, rejected = reward.pair_scores(roles, "reward", tokenizer, encoded[1])
    shown = reward.pair_scores(roles, "reward", tokenizer, encoded[0][:512])
    reward.normalise(roles, "reward", torch.cat([chosen, rejected]))
    gaps = [
        rubric.gold_reward(row["prompt"], row["chosen"]).total
        - rubric.gold_reward(row["prompt"], row["rejected"]).total
        for row in held_out
    ]
    gold, right = torch.tensor(gaps), (chosen > rejected)
    return {
        "accuracy": round(last.held_out["accuracy"], 4),
        "train_accuracy": round(reward.pair_accuracy(*shown), 4),
        "ceiling": round(ceiling(held_out["probability"]), 4),
        "gold_agreement": round((right == (gold > 0))[gold != 0].float().mean().item(), 4),
        "seconds": round(last.seconds, 1),
    }


def record_reward(annotator: Annotator, seed: int, save_to: Path | None = None) -> dict:
    """One run of lesson 02: accuracies, and both probes."""
    tokenizer, roles, pairs = collect(seed, annotator)
    row = train_on(tokenizer, roles, *reward.split_by_prompt(pairs, seed=seed), seed)
    if save_to:
        roles.save("reward", save_to)
    for name, make in (("polite", exam.polite_probe), ("length", exam.length_probe)):
        proxy, gold = [], []
        for prompts, responses in make():
            scores = reward.score_responses(roles, "reward", tokenizer, prompts, responses, 32, 64)
            proxy.append(round(scores.mean().item(), 4))
            marks = [rubric.gold_reward(*pair) for pair in zip(prompts, responses, strict=True)]
            gold.append(round(rubric.mean_score(marks).total, 4))
        row |= {f"{name}_proxy": proxy, f"{name}_gold": gold}
    return row


def record_sizes(seed: int) -> list[dict]:
    """The study of lesson 02: the same number of updates on more and more pairs."""
    rows = []
    for size in (64, 256, 1024, 3072):
        tokenizer, roles, pairs = collect(seed, Annotator())
        train, held_out = reward.split_by_prompt(pairs, seed=seed)
        row = train_on(tokenizer, roles, train.select(range(size)), held_out, seed)
        rows.append({"run": "size", "seed": seed, "pairs": size, **row})
    return rows


def make_reward(out: Path, seeds: int) -> None:
    """The reference reward adapter and head, of seed 0, and the record of all runs beside it."""
    annotators = {"reward": (Annotator(), seeds), "unbiased": (Annotator().unbiased(), 3)}
    with whole_folder(out) as new:
        rows = []
        for name, (annotator, count) in annotators.items():
            for seed in tqdm(range(min(count, seeds)), desc=name):
                save_to = new / "adapter" if (name, seed) == ("reward", 0) else None
                rows.append({"run": name, "seed": seed, **record_reward(annotator, seed, save_to)})
                (new / "runs.json").write_text(json_lines(rows), encoding="utf-8")
        for seed in tqdm(range(min(3, seeds)), desc="sizes"):
            rows += record_sizes(seed)
        for file in (new / "adapter").iterdir():
            file.rename(new / file.name)
        (new / "adapter").rmdir()
        (new / "runs.json").write_text(json_lines(rows), encoding="utf-8")
        (new / "README.md").write_text(reward_card(rows), encoding="utf-8")


def reward_card(rows: list[dict]) -> str:
    """The adapter's card: how it was made, and the spread over seeds."""
    table = []
    for name in ("reward", "unbiased"):
        runs = [row for row in rows if row["run"] == name]
        columns = [spread([row[k] for row in runs]) for k in ("accuracy", "ceiling")]
        columns.append(spread([row["accuracy"] / row["ceiling"] for row in runs]))
        columns.append(spread([row["gold_agreement"] for row in runs]))
        rise = [row["polite_proxy"][4] - row["polite_proxy"][1] for row in runs]
        table.append(f"| {name}, {len(runs)} seeds | {' | '.join(columns)} | {spread(rise)} |")
    return REWARD_CARD.format(table="\n".join(table))


REWARD_CARD = """\
# The reference reward model of the pocket world

A LoRA adapter in PEFT's own format and a scalar head (`head.safetensors`), for the pocket base in
NF4. It starts from the reference SFT adapter and is trained as in lesson 02, seed 0, on pairs of
its responses labelled by a simulated annotator. Rewards are normalised on held-out responses. Made
by `python tools/train_assets.py reward`. Licence: Apache-2.0.

| run | held-out accuracy | ceiling | accuracy / ceiling | gold order | 4 polite phrases less 1 |
|---|---|---|---|---|---|
{table}

Mean and range over seeds. `unbiased` is the same annotator without a leaning to politeness and
length. The last column is the difference in reward of the same right answers with four polite
phrases and with one: gold falls by 0.97. Every single run, and the study of sizes, is in
`runs.json`.

**Known blind spots.** It pays for grovelling, because its annotators do. What rambling is worth to
it is chance, because the pairs hardly hold any.
"""


def make_unbiased(out: Path, _: int) -> None:
    """The reward adapter and head that an annotator without bias gives, of seed 0."""
    with whole_folder(out) as new:
        row = record_reward(Annotator().unbiased(), 0, new)
        card = UNBIASED_CARD.format(**row, rise=row["polite_proxy"][4] - row["polite_proxy"][1])
        (new / "README.md").write_text(card, encoding="utf-8")


UNBIASED_CARD = """\
# The reward model of an annotator without bias

As the reference reward model in `../reward`, but the annotator leans neither to politeness nor to
length: the control of lesson 05. Made by `python tools/train_assets.py unbiased`, seed 0. Licence:
Apache-2.0.

Held-out accuracy {accuracy:.3f}, where {ceiling:.3f} is the most there is; {gold_agreement:.1%} of
pairs in gold's order. The same right answers with four polite phrases earn {rise:+.2f} against one.
"""


def json_lines(rows: list[dict]) -> str:
    """A JSON list with one row on each line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f"[\n{lines}\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("asset", choices=["base", "card", "sft", "reward", "unbiased"])
    parser.add_argument("--steps", type=int, default=STEPS, help="of the base's pretraining")
    parser.add_argument("--seeds", type=int, default=10, help="runs to record beside an adapter")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "assets" / "base")
    parser.add_argument(
        "--out", type=Path, help="where to write; the package's assets if not given"
    )
    args = parser.parse_args()
    folders = {"unbiased": "reward_unbiased"}
    makers = {"sft": make_sft, "reward": make_reward, "unbiased": make_unbiased}
    if make := makers.get(args.asset):
        make(args.out or ASSETS / folders.get(args.asset, args.asset), args.seeds)
        return
    if args.asset == "base":
        make_base(args.work, args.out or ASSETS / "base", args.steps)
    write_card(args.out or ASSETS / "base")


if __name__ == "__main__":
    main()
