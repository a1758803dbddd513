"""Record the PPO runs that lessons 04 and 05 and exercise 03 show.

    python tools/record_ppo.py study --betas 0.1     # ten seeds of lesson 04
    python tools/record_ppo.py study                 # ten seeds at each β of lesson 05
    python tools/record_ppo.py control               # the same at β = 0, an annotator without bias
    python tools/record_ppo.py must_stop             # the same, a cut-off answer costs 4, not 1
    python tools/record_ppo.py adaptive              # three seeds with a controller of β
    python tools/record_ppo.py logs                  # three runs with a bug each, and one without
    python tools/record_ppo.py figure                # README's figure, from the study

A study that is stopped goes on where it was: runs that are in the file are not made again.
"""

import argparse
import csv
import datetime
import json
import os
import platform
from pathlib import Path
from unittest.mock import patch

import bitsandbytes
import peft
import torch
import transformers
from tqdm.auto import tqdm

from rlhf_helpers import plots, ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.diversity import diversity
from rlhf_helpers.pocket import rubric, world
from rlhf_helpers.ppo import Experience, PPOConfig, PPOStats
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import load_tokenizer

STUDY = ASSETS / "ppo"
CONTROL = ASSETS / "ppo_unbiased"
MUST_STOP = ASSETS / "ppo_must_stop"
LOGS = ASSETS / "ppo_logs"
FIGURE = Path(__file__).parents[1] / ".github" / "proxy_and_gold.png"
BETAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)


def fresh_roles(reward: Path = ASSETS / "reward") -> Roles:
    """The four roles of lesson 04, from the shipped adapters."""
    roles = Roles(load_base(load_preset("pocket")))
    roles.load("reference", ASSETS / "sft")
    roles.load("reward", reward)
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    return roles


def judged(experience: Experience) -> dict[str, float]:
    """What the rubric says of sampled responses, and the proxy and KL beside it."""
    texts, finished = experience.rollout.texts, experience.rollout.finished.tolist()
    marks = [
        rubric.gold_reward(*row) for row in zip(experience.prompts, texts, finished, strict=True)
    ]
    numbers = {
        "proxy": experience.scores.mean().item(),
        "gold": rubric.mean_score(marks).total,
        "correct": sum(mark.correct > 0 for mark in marks) / len(marks),
        "kl": experience.kl.mean().item(),
        "entropy": -_mean(experience.logprobs, experience.rollout.response_mask),
        **diversity(texts),
    }
    return {name: round(value, 4) for name, value in numbers.items()}


def _mean(x: torch.Tensor, mask: torch.Tensor) -> float:
    return ((x * mask).sum() / mask.sum()).item()


def reported(stats: PPOStats) -> dict[str, float]:
    """One line of a log."""
    numbers = {
        "score": stats.score,
        "kl": stats.kl,
        "entropy": stats.entropy,
        "length": stats.length,
        "finished": stats.finished,
        "first_ratio": stats.first_ratio,
        "ratio": stats.policy["ratio"],
        "clip_fraction": stats.policy["clip_fraction"],
        "approx_kl": stats.policy["approx_kl"],
        "explained_variance": stats.value["explained_variance"],
        "value_loss": stats.value["loss"],
    }
    return {"update": stats.update} | {name: round(value, 4) for name, value in numbers.items()}


def one_run(config: PPOConfig, reward: Path) -> tuple[list[dict], dict]:
    """The log of a run, and how the finished policy does on the held-out prompts."""
    roles, tokenizer = fresh_roles(reward), load_tokenizer(load_preset("pocket"))
    rows = []
    for stats in ppo.train_ppo(roles, tokenizer, world.prompts("train"), config):
        marks = judged(stats.experience)
        rows.append(reported(stats) | {k: marks[k] for k in ("gold", "correct", "distinct_2")})
    end = held_out(roles, config, "policy")
    return rows, end | {"seconds": round(stats.seconds, 1)}


def on_held_out(roles: Roles, config: PPOConfig, role: str) -> Experience:
    """What a role answers to the held-out prompts, and what all roles say of it."""
    prompts, tokenizer = world.prompts("held_out"), load_tokenizer(load_preset("pocket"))
    return ppo.collect_experience(roles, tokenizer, prompts, config, config.beta, config.seed, role)


def held_out(roles: Roles, config: PPOConfig, role: str) -> dict:
    """How a role does on the held-out prompts, and its answer to the first."""
    experience = on_held_out(roles, config, role)
    return judged(experience) | {"example": experience.rollout.texts[0]}


def record_reference(out: Path, reward: Path, seeds: int) -> None:
    """What every run began from, on the held-out prompts, in `reference.csv`."""
    if len(read_csv(out / "reference.csv")) >= seeds:
        return
    roles = fresh_roles(reward)
    rows = [
        {"seed": seed} | held_out(roles, PPOConfig(seed=seed), "reference") for seed in range(seeds)
    ]
    write_csv(out / "reference.csv", rows)


def study(
    out: Path, betas: list[float], seeds: int, reward: Path = ASSETS / "reward", **settings
) -> None:
    """Runs at each β and seed; the logs in `updates.csv`, the ends in `held_out.csv`."""
    out.mkdir(parents=True, exist_ok=True)
    record_reference(out, reward, seeds)
    ends = read_csv(out / "held_out.csv")
    made = {(float(row["beta"]), int(row["seed"])) for row in ends}
    wanted = [(beta, seed) for seed in range(seeds) for beta in betas]
    for beta, seed in tqdm([run for run in wanted if run not in made], desc="runs"):
        config = PPOConfig(beta=beta, seed=seed, **settings)
        rows, end = one_run(config, reward)
        run = {"beta": beta, "seed": seed}
        # The end is written last: a run without it is made again.
        kept = [
            row
            for row in read_csv(out / "updates.csv")
            if (float(row["beta"]), int(row["seed"])) != (beta, seed)
        ]
        write_csv(out / "updates.csv", kept + [run | row for row in rows])
        ends.append(run | end)
        write_csv(out / "held_out.csv", ends)
        write_about(out / "about.json", config)


def adaptive(out: Path, seeds: int = 3) -> None:
    """Runs that begin with a β far too small, and have a controller; in `adaptive.csv`."""
    rows = read_csv(out / "adaptive.csv")
    for seed in tqdm(range(seeds), desc="controlled runs"):
        if any(int(row["seed"]) == seed for row in rows):
            continue
        config = PPOConfig(updates=60, beta=0.01, target_kl=3.0, seed=seed)
        roles, tokenizer = fresh_roles(), load_tokenizer(load_preset("pocket"))
        for stats in ppo.train_ppo(roles, tokenizer, world.prompts("train"), config):
            gold = judged(stats.experience)["gold"]
            numbers = reported(stats) | {"price": round(stats.beta, 5), "gold": gold}
            rows.append({"seed": seed} | numbers)
        write_csv(out / "adaptive.csv", rows)


def read_csv(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Replace the file as a whole."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def versions() -> dict[str, str]:
    """Of the libraries that decide what a run computes."""
    libraries = (torch, transformers, peft, bitsandbytes)
    return {library.__name__: library.__version__ for library in libraries}


def write_about(path: Path, config: PPOConfig) -> None:
    """On what machine, with which versions and when the runs were made."""
    about = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "config": {k: v for k, v in vars(config).items() if k not in ("beta", "seed")},
    }
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


# --- runs with a bug, for the exercise of lesson 03 -----------------------------------------------


def ratio_to_reference(roles, experience, part, config, beta):
    logprobs = ppo.role_logprobs(roles, "policy", experience.rollout, part, config)
    mask = experience.rollout.response_mask[part]
    return ppo.policy_loss(
        logprobs, experience.ref_logprobs[part], experience.advantages[part], mask, config.clip
    )


def old_taken_anew(roles, experience, part, config, beta):
    logprobs = ppo.role_logprobs(roles, "policy", experience.rollout, part, config)
    mask = experience.rollout.response_mask[part]
    return ppo.policy_loss(
        logprobs, logprobs.detach(), experience.advantages[part], mask, config.clip
    )


def penalty_as_bonus(scores, logprobs, ref_logprobs, mask, beta, kind="k1"):
    return SHAPE_REWARDS(scores, ref_logprobs, logprobs, mask, beta, kind)


SHAPE_REWARDS = ppo.shape_rewards
BUGS = {
    "healthy": (ppo, "shape_rewards", SHAPE_REWARDS),
    "A": (ppo, "shape_rewards", penalty_as_bonus),
    "B": (ppo, "policy_objective", ratio_to_reference),
    "C": (ppo, "policy_objective", old_taken_anew),
}


def record_logs(out: Path) -> None:
    """A short run without a bug, and three with one each."""
    out.mkdir(parents=True, exist_ok=True)
    for name, bug in tqdm(BUGS.items(), desc="logs"):
        with patch.object(*bug):
            rows, _ = one_run(PPOConfig(updates=10), ASSETS / "reward")
        hidden = ("gold", "correct", "distinct_2")  # in real life nobody has them
        write_csv(
            out / f"{name}.csv", [{k: v for k, v in row.items() if k not in hidden} for row in rows]
        )


def draw_figure(out: Path) -> None:
    """Proxy and gold against the distance from the reference, for each run without a price."""
    runs: dict[str, list[dict]] = {}
    for row in read_csv(STUDY / "updates.csv"):
        if float(row["beta"]) == 0:
            runs.setdefault(row["seed"], []).append(row)
    names = {"what it is trained on: the learned reward": "score", "the true reward": "gold"}
    groups = {
        name: [[(float(r["kl"]) ** 0.5, float(r[column])) for r in rows] for rows in runs.values()]
        for name, column in names.items()
    }
    plots.use_style()
    x = "distance from the start: √KL, √nats"
    plots.trajectories(groups, x, "mean reward").savefig(out, dpi=110)


KINDS = {
    "study": lambda args: study(args.out or STUDY, args.betas, args.seeds),
    "control": lambda args: study(
        args.out or CONTROL, [0.0], args.seeds, ASSETS / "reward_unbiased"
    ),
    "must_stop": lambda args: study(args.out or MUST_STOP, [0.0], args.seeds, eos_penalty=4.0),
    "adaptive": lambda args: adaptive(args.out or STUDY),
    "logs": lambda args: record_logs(args.out or LOGS),
    "figure": lambda args: draw_figure(args.out or FIGURE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=list(KINDS))
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="the package's assets if not given")
    args = parser.parse_args()
    KINDS[args.what](args)


if __name__ == "__main__":
    main()
