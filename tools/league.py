"""Record the league of lesson 09, a run for each method and seed, and print its table.

    python tools/league.py                   # ten seeds of every method; goes on where it stopped
    python tools/league.py --part 1/2        # half of the runs; the other process takes 2/2
    python tools/league.py --methods rloo grpo --seeds 3
    python tools/league.py --timing          # seconds of PPO's loop with and without a critic
    python tools/league.py --table           # the table; the figure goes to runs/league.png

A row is a method at a seed, judged on the held-out prompts just as the ends of PPO's and DPO's runs
are. Rows of DPO, online DPO and PPO are read from what lessons 05 and 08 have recorded. All
methods that train without pairs sample as many answers as PPO does. Two processes may write at a
time: a row is added under a lock, and which of them makes a run is fixed by `--part`.
"""

import argparse
import csv
import fcntl
import itertools
import math
import random
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from record_dpo import STUDY as DPO_STUDY
from record_dpo import answered, on_held_out
from record_ppo import STUDY as PPO_STUDY
from record_ppo import fresh_roles, judged, read_csv, write_about
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import LlamaConfig, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_helpers import plots
from rlhf_helpers.base import load_base
from rlhf_helpers.losses import equal_groups
from rlhf_helpers.memory import memory_table, model_sizes
from rlhf_helpers.pocket import rubric, world
from rlhf_helpers.ppo import Experience, PPOConfig, collect_experience, train_ppo
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import Rollout
from rlhf_helpers.sft import SFTConfig, train_sft
from rlhf_helpers.text import load_tokenizer
from rlhf_helpers.trl_rewards import keep_float32, reward_function

OUT = ASSETS / "league"
FIGURE = Path(__file__).parents[1] / "runs" / "league.png"
DRAWN = ("SFT on the best", "DPO", "online DPO", "PPO", "RLOO", "GRPO", "GRPO, verifier")
AT_A_TIME = 1024  # answers that are sampled at a time, a multiple of every n
SAMPLES = PPOConfig.updates * PPOConfig.batch_size  # of a run of PPO, and of the others
BEST_OF, TIMES = 16, 6  # answers to each prompt of rejection sampling, passes over the best ones
NUMBERS = (
    "proxy gold correct polite kl entropy distinct_2 unique self_bleu length finished tokens"
).split()
COLUMNS = [
    "method",
    "seed",
    *NUMBERS,
    "flat_groups",
    "samples",
    "seconds",
    "cpu_seconds",
    "example",
]
CURVE = ["method", "seed", "update", "samples", "seconds", "cpu_seconds", "score", "kl", "gold"]
LLAMA_7B = LlamaConfig()  # its defaults are those of Llama-2-7B


# --- who scores, where it is not the reward model -------------------------------------------------


def verifier(prompts: list[str], rollout: Rollout) -> torch.Tensor:
    """1 for an answer that says something right and nothing wrong, 0 for any other: a program."""
    rows = zip(prompts, rollout.texts, rollout.finished.tolist(), strict=True)
    return torch.tensor([float(rubric.gold_reward(*row).correct > 0) for row in rows])


def coin(prompts: list[str], rollout: Rollout) -> torch.Tensor:
    """0 or 1 by chance, from the text alone: the verifier's control."""
    rows = zip(prompts, rollout.texts, strict=True)
    return torch.tensor([float(random.Random(str(row)).random() < 0.5) for row in rows])


# --- the methods ----------------------------------------------------------------------------------

GRPO = {"advantages": "grpo", "kl_in": "loss", "kl_kind": "k3", "mean_over": "responses"}
GROUPS = {"group_size": 4}
WHOLE = {"ratio_of": "response", "mean_over": "responses"}  # the response is the action
LOOPS = {  # settings of PPO's loop, and who scores
    "RLOO": (GROUPS | WHOLE | {"advantages": "rloo"}, None),
    "RLOO, tokens": (GROUPS | {"advantages": "rloo"}, None),
    "GRPO": (GROUPS | GRPO, None),
    "GRPO, verifier": (GROUPS | GRPO | {"eos_penalty": 0.0}, verifier),
    "GRPO, coin": (GROUPS | GRPO | {"eos_penalty": 0.0}, coin),
}


def loop(out: Path, method: str, seed: int, updates: int = PPOConfig.updates) -> dict:
    """PPO's loop with this method's settings; its updates go to `curves.csv`."""
    settings, scorer = LOOPS[method]
    config = PPOConfig(updates=updates, seed=seed, **settings)
    roles, tokenizer = fresh_roles(), load_tokenizer(load_preset("pocket"))
    clock, flat, curve = Clock(), [], []
    run = train_ppo(roles, tokenizer, world.prompts("train"), config, reward_function=scorer)
    for stats in run:
        taken = clock.taken()
        flat.append(equal_groups(stats.experience.scores, config.group_size).double().mean().item())
        numbers = {"score": stats.score, "kl": stats.kl, "gold": judged(stats.experience)["gold"]}
        samples = stats.update * config.batch_size
        row = {"method": method, "seed": seed, "update": stats.update, "samples": samples}
        curve.append(row | taken | {name: round(x, 4) for name, x in numbers.items()})
    for row in curve:  # only of a run that came to its end
        add_row(out / "curves.csv", row, CURVE)
    write_about(out / "about.json", config)
    made = {"samples": samples, "flat_groups": round(sum(flat) / len(flat), 4)}
    return ends(roles, seed) | made | taken


def trl(out: Path, method: str, seed: int, updates: int = PPOConfig.updates) -> dict:
    """The same run by one of TRL's trainers, from the same adapter, judged as all others."""
    roles, tokenizer, clock = fresh_roles(), load_tokenizer(load_preset("pocket")), Clock()
    base = load_base(load_preset("pocket"))
    policy = PeftModel.from_pretrained(base, str(ASSETS / "sft"), is_trainable=True)
    judge = Roles(load_base(load_preset("pocket")))
    judge.load("reward", ASSETS / "reward")
    rows = [{"prompt": [{"role": "user", "content": x}]} for x in world.prompts("train")]
    with tempfile.TemporaryDirectory() as folder:
        trainer = (RLOOTrainer if method.startswith("RLOO") else GRPOTrainer)(
            policy,
            reward_funcs=reward_function(judge, tokenizer, policy),
            args=trl_settings(method, PPOConfig(updates=updates, seed=seed, **GROUPS), folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        keep_float32(trainer.model, ASSETS / "sft")
        trainer.train()
    taken = clock.taken()
    weights = get_peft_model_state_dict(trainer.model, adapter_name="default")
    set_peft_model_state_dict(roles.model, weights, adapter_name="policy")
    return ends(roles, seed) | {"samples": updates * PPOConfig.batch_size} | taken


def trl_settings(method: str, config: PPOConfig, folder: str) -> RLOOConfig | GRPOConfig:
    """PPO's settings in TRL's words; optimizer steps are counted there, not updates."""
    kind, own = RLOOConfig, {}
    if method.startswith("GRPO"):
        kind, own = GRPOConfig, {"loss_type": "grpo", "use_bias_correction_kl": False}
    parts = config.batch_size // config.minibatch_size
    return kind(
        output_dir=folder,
        max_steps=config.updates * config.epochs * parts,
        per_device_train_batch_size=config.minibatch_size,
        steps_per_generation=parts,
        num_iterations=config.epochs,
        num_generations=config.group_size,
        max_completion_length=config.response_length,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        beta=config.beta,
        epsilon=config.clip,
        max_grad_norm=config.max_grad_norm,
        temperature=config.temperature,
        seed=config.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own,
    )


def best_of(out: Path, method: str, seed: int, count: int | None = None) -> dict:
    """Of n answers of SFT to each held-out prompt the one that the reward model likes best."""
    n, clock = int(method.split("-")[-1]), Clock()
    prompts = world.prompts("held_out")[:count]
    experience = sampled(fresh_roles(), prompts, n, seed)
    best = picked(experience, experience.scores.view(-1, n).argmax(-1))
    numbers = marked(best)
    # At most that far: the policy of best-of-n has no log-probabilities of its own.
    far = {"kl": round(math.log(n) - (n - 1) / n, 4), "entropy": ""}
    return numbers | far | {"samples": n * len(prompts)} | clock.taken()


def sft_on(out: Path, method: str, seed: int, prompts: int = SAMPLES // BEST_OF) -> dict:
    """SFT again, on the best of 16 answers to each of some prompts, or on one by chance."""
    roles, clock = fresh_roles(), Clock()
    asked = random.Random(f"league-{seed}").sample(world.prompts("train"), prompts)
    experience = sampled(roles, asked, BEST_OF, seed)
    scores = experience.scores.view(-1, BEST_OF)
    chance = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    chosen = picked(experience, (chance if method.endswith("random") else scores).argmax(-1))
    examples = encoded(chosen)
    size = min(SFTConfig.batch_size, len(examples))
    steps = max(2, TIMES * len(examples) // size)
    config = SFTConfig(steps=steps, batch_size=size, learning_rate=5e-4, warmup_steps=1)
    tokenizer = load_tokenizer(load_preset("pocket"))
    list(train_sft(roles, "policy", tokenizer, examples, examples[:1], config))
    return ends(roles, seed) | {"samples": BEST_OF * prompts} | clock.taken()


def sampled(roles: Roles, prompts: list[str], n: int, seed: int) -> Experience:
    """n answers of SFT to each prompt, scored; in parts, or the cache would take gigabytes."""
    config = PPOConfig(batch_size=AT_A_TIME, group_size=n, advantages="rloo")
    asked = [prompt for prompt in prompts for _ in range(n)]
    parts = [asked[start : start + AT_A_TIME] for start in range(0, len(asked), AT_A_TIME)]
    arguments = load_tokenizer(load_preset("pocket")), config, config.beta
    return joined(
        [
            collect_experience(
                roles, arguments[0], part, *arguments[1:], seed + 1000 * i, "reference"
            )
            for i, part in enumerate(parts)
        ]
    )


def joined(parts: list[Experience]) -> Experience:
    """One batch of several, padded to the widest prompt and the longest response."""
    masks = [(one.rollout.attention_mask, one.rollout.response_mask) for one in parts]
    length = max(mask.shape[1] for _, mask in masks)
    width = max(whole.shape[1] - mask.shape[1] for whole, mask in masks)

    def wide(tensor: torch.Tensor, own: int) -> torch.Tensor:
        if tensor.dim() == 1:
            return tensor
        prompt = tensor.shape[1] - own
        return pad(tensor, (width - prompt if prompt else 0, length - own))

    def together(values: list):
        if not isinstance(values[0], torch.Tensor):
            return None if values[0] is None else [x for value in values for x in value]
        sizes = [mask.shape[1] for _, mask in masks]
        return torch.cat([wide(x, own) for x, own in zip(values, sizes, strict=True)])

    rollout = {k: together([vars(one.rollout)[k] for one in parts]) for k in vars(parts[0].rollout)}
    rest = {k: together([vars(one)[k] for one in parts]) for k in vars(parts[0]) if k != "rollout"}
    return Experience(rollout=Rollout(**rollout), **rest)


def picked(experience: Experience, column: torch.Tensor) -> Experience:
    """One answer to each prompt, from its column."""
    n = len(experience.prompts) // len(column)
    rows = torch.arange(len(column)) * n + column.cpu()

    def of(value):
        return value[rows] if isinstance(value, torch.Tensor) else [value[i] for i in rows]

    rollout = Rollout(**{name: of(value) for name, value in vars(experience.rollout).items()})
    whole = {k: v for k, v in vars(experience).items() if k != "rollout" and v is not None}
    missing = dict.fromkeys(set(vars(experience)) - set(whole) - {"rollout"})
    return Experience(rollout=rollout, **{k: of(v) for k, v in whole.items()}, **missing)


def encoded(experience: Experience) -> list[dict]:
    """As demonstrations: token ids; those that were cut off, and so have no EOS, are left out."""
    width, examples = experience.rollout.response_mask.shape[1], []
    rows = zip(
        *(getattr(experience.rollout, x) for x in ("input_ids", "attention_mask")), strict=True
    )
    for (ids, mask), finished in zip(rows, experience.rollout.finished.tolist(), strict=True):
        parts = (slice(None, -width), slice(-width, None))
        prompt, response = (ids[part][mask[part].bool()].tolist() for part in parts)
        if finished:
            examples.append({"prompt": prompt, "response": response})
    return examples


def ends(roles: Roles, seed: int, role: str = "policy") -> dict:
    """How a role does on the held-out prompts, judged as the ends of PPO's and DPO's runs are."""
    return marked(on_held_out(roles, PPOConfig(seed=seed), role))


def marked(experience: Experience) -> dict:
    """What the rubric says of answers, and the share of polite ones."""
    rollout = experience.rollout
    rows = zip(experience.prompts, rollout.texts, rollout.finished.tolist(), strict=True)
    polite = [rubric.gold_reward(*row).polite > 0 for row in rows]
    return answered(experience) | {"polite": round(sum(polite) / len(polite), 4)}


def start(out: Path, method: str, seed: int) -> dict:
    """SFT, from which all others begin."""
    return ends(fresh_roles(), seed, "reference") | {"samples": 0}


def recorded(folder: Path, file: str, samples: int, **run: object) -> Callable[..., dict]:
    """A row that another lesson has recorded: the one of this seed for which all of `run` holds."""

    def read(out: Path, method: str, seed: int) -> dict | None:
        for row in read_csv(folder / file):
            same = (row[k] == str(v) for k, v in (run | {"seed": seed}).items())
            if all(same):
                return {"samples": samples} | {k: v for k, v in row.items() if k in COLUMNS}
        return None

    return read


DPO = {"run": "dpo", "beta": 0.1}
PAIRED = 4 * len(world.prompts("train"))  # answers that lesson 02's pairs are made of
SECOND = DPO | {"run": "second_reward"}
Make = Callable[..., dict | None]
# How a row is made, and what stands in memory then, beside base and reference.
METHODS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "SFT": (start, ()),
    "best-of-4": (best_of, ("reward",)),
    "best-of-16": (best_of, ("reward",)),
    "SFT on the best": (sft_on, ("policy", "reward")),
    "SFT on random": (sft_on, ("policy",)),
    "DPO": (recorded(DPO_STUDY, "held_out.csv", PAIRED, **DPO), ("policy",)),
    "online DPO": (
        recorded(DPO_STUDY, "held_out.csv", 2 * PAIRED, **SECOND),
        ("policy", "reward"),
    ),
    "PPO": (
        recorded(PPO_STUDY, "held_out.csv", SAMPLES, beta=0.1),
        ("policy", "reward", "value"),
    ),
    "RLOO": (loop, ("policy", "reward")),
    "RLOO, tokens": (loop, ("policy", "reward")),
    "RLOO by TRL": (trl, ("policy", "reward")),
    "GRPO": (loop, ("policy", "reward")),
    "GRPO by TRL": (trl, ("policy", "reward")),
    "GRPO, verifier": (loop, ("policy",)),
    "GRPO, coin": (loop, ("policy",)),
}


class Clock:
    """Seconds on the wall, and those of this process, whatever else the machine had to do."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def taken(self) -> dict[str, float]:
        now = time.perf_counter(), time.process_time()
        wall, own = (round(b - a, 1) for a, b in zip(self.began, now, strict=True))
        return {"seconds": wall, "cpu_seconds": own}


# --- recording ------------------------------------------------------------------------------------


def plan(methods: list[str], seeds: int, part: tuple[int, int] = (1, 1)) -> list[tuple[str, int]]:
    """All runs, seeds outside, so that every method has a few early; of those one process's.

    Example:
        >>> plan(["SFT", "RLOO"], seeds=2, part=(2, 2))
        [('RLOO', 0), ('RLOO', 1)]
    """
    runs = [(method, seed) for seed in range(seeds) for method in methods]
    return runs[part[0] - 1 :: part[1]]


def record(out: Path, runs: list[tuple[str, int]], **sizes: dict) -> None:
    """Make the runs that have no row; `sizes` are options by kind of method, for a short try."""
    out.mkdir(parents=True, exist_ok=True)
    for method, seed in tqdm(runs, desc="league"):
        made = {(row["method"], int(row["seed"])) for row in read_csv(out / "league.csv")}
        if (method, seed) in made:
            continue
        make, _ = METHODS[method]
        row = make(out, method, seed, **sizes.get(make.__name__, {}))
        if row is None:
            tqdm.write(f"{method}, seed {seed}: not recorded yet by its lesson")
            continue
        add_row(out / "league.csv", {"method": method, "seed": seed} | row, COLUMNS)


def add_row(path: Path, row: dict, columns: list[str]) -> None:
    """Append a row, the header first if there is none; another process may do so at the time."""
    with path.open("a", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(
            file, columns, restval="", extrasaction="ignore", lineterminator="\n"
        )
        if file.seek(0, 2) == 0:
            writer.writeheader()
        writer.writerow(row)


def time_loops(out: Path, turns: int, updates: int) -> None:
    """Seconds of a few updates of each loop, turn by turn: compare within one file alone."""
    out.mkdir(parents=True, exist_ok=True)
    prompts, tokenizer = world.prompts("train"), load_tokenizer(load_preset("pocket"))
    loops = {"PPO": ({}, None)} | {k: LOOPS[k] for k in ("RLOO", "GRPO", "GRPO, verifier")}
    for turn, (method, (settings, scorer)) in itertools.product(range(turns), loops.items()):
        roles, config = fresh_roles(), PPOConfig(updates=updates, **settings)
        clock = Clock()
        list(train_ppo(roles, tokenizer, prompts, config, reward_function=scorer))
        row = {"method": method, "turn": turn, "updates": updates} | clock.taken()
        add_row(out / "timing.csv", row, list(row))


# --- table and figure -----------------------------------------------------------------------------


@cache
def gigabytes(method: str) -> float:
    """What the roles of a method take in training at 7B: one NF4 base, LoRA of rank 16."""
    rows = {r.role: r.total for r in memory_table(model_sizes(LLAMA_7B))["LoRA on 1 NF4 base"]}
    return sum(rows[role] for role in ("base", "reference", *METHODS[method][1])) / 1e9


def rows_by_method(out: Path) -> dict[str, list[dict]]:
    """Rows as numbers, methods in the order of the plan, seeds in theirs; one row for each run."""
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    runs = {(row["method"], int(row["seed"])): row for row in read_csv(out / "league.csv")}
    for _, row in sorted(runs.items(), key=lambda run: run[0][1]):
        numbers = {k: float(v) for k, v in row.items() if k not in ("method", "example") and v}
        found[row["method"]].append(numbers)
    return {method: rows for method, rows in found.items() if rows}


def mean(rows: list[dict], name: str) -> float:
    known = [row[name] for row in rows if name in row]
    return sum(known) / len(known) if known else math.nan


def table(out: Path) -> str:
    """Means over the seeds, and the range of gold; the last column counts seeds 0.3 above SFT."""
    shown = {
        "gold": 2,
        "correct": 2,
        "polite": 2,
        "kl": 2,
        "proxy": 2,
        "distinct_2": 2,
        "self_bleu": 2,
    }
    shown |= {"finished": 2, "flat_groups": 2, "samples": 0, "cpu_seconds": 0}
    methods = rows_by_method(out)
    start = {row["seed"]: row["gold"] for row in methods.get("SFT", [])}
    lines = [
        f"{'':16}{'runs':>5}"
        + "".join(f"{name:>12}" for name in shown)
        + f"{'GB at 7B':>10}   gold, range      +0.3"
    ]
    for method, rows in methods.items():
        cells = "".join(f"{mean(rows, name):12.{digits}f}" for name, digits in shown.items())
        golds = [row["gold"] for row in rows]
        pairs = [row["gold"] - start[row["seed"]] for row in rows if row["seed"] in start]
        above = f"{sum(x >= 0.3 for x in pairs)} of {len(pairs)}"
        span = f"{min(golds):5.2f} to {max(golds):5.2f}"
        lines.append(f"{method:16}{len(rows):5}{cells}{gigabytes(method):10.1f}   {span}   {above}")
    return "\n".join(lines)


def draw(out: Path, path: Path) -> None:
    """Gold against √KL, a point for each run and a hull for each method; SFT is best of one."""
    plots.use_style()
    groups: dict[str, list] = {}
    for method, rows in rows_by_method(out).items():
        if method in DRAWN or method == "SFT" or "best-" in method:
            name = "best of 1, 4, 16" if method == "SFT" or "best-" in method else method
            points = [(max(row["kl"], 0) ** 0.5, row["gold"]) for row in rows]
            groups.setdefault(name, []).extend(points)
    figure = plots.scatter(groups, "√KL to SFT, √nats", "gold, held-out prompts", hulls=True)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def part_of(text: str) -> tuple[int, int]:
    one, count = (int(x) for x in text.split("/"))
    if not 1 <= one <= count:
        raise argparse.ArgumentTypeError(f"{text}: give 1/2 or 2/2, for example")
    return one, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", choices=list(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--part", type=part_of, default=(1, 1), help="as 1/2")
    parser.add_argument("--timing", action="store_true", help="time the loops, with nothing beside")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    parser.add_argument("--out", type=Path, default=OUT, help="the package's assets if not given")
    args = parser.parse_args()
    if args.timing:
        time_loops(args.out, turns=2, updates=8)
    elif not args.table:
        record(args.out, plan(args.methods, args.seeds, args.part))
    if (args.out / "league.csv").is_file():
        print(table(args.out))
        draw(args.out, FIGURE)


if __name__ == "__main__":
    main()
