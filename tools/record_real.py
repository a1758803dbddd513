"""Record a real model on real comparisons: SFT, reward model, judge, PPO at two prices.

    RLHF_MODEL=... RLHF_DATA=... RLHF_DEVICE=cpu python tools/record_real.py runs/real

Stages that are done are not done again, and one that is stopped goes on. The folder then holds
`numbers.csv` (a line for each number, with a 95% interval where it is a mean or a share),
`updates.csv` (PPO's logs), `about.json`, and the adapters. No text of the data is written.
"""

import argparse
import datetime
import json
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from record_ppo import read_csv, versions, write_csv
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_helpers import ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.presets import Preset, load_preset
from rlhf_helpers.reward import (
    RewardConfig,
    encode_pairs,
    normalise,
    pair_scores,
    train_reward_model,
)
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import Rollout
from rlhf_helpers.sft import SFTConfig, held_out_loss, train_sft
from rlhf_helpers.sources import Judge, preference_dataset, prompt_dataset, sft_dataset
from rlhf_helpers.stats import share_with_interval
from rlhf_helpers.text import encode_examples, load_tokenizer

SCORERS = {"reward": "train", "judge": "judge"}  # a role, and the half of the pairs it learns from


def record(preset: Preset, out: Path, betas: list[float], prompts: int) -> None:
    """All stages.

    Args:
        prompts: how many held-out prompts each policy answers at the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_about(out / "about.json", preset)
    tokenizer = load_tokenizer(preset)
    if not done(out, "sft"):
        fine_tune(preset, out, tokenizer)
    for number, (role, half) in enumerate(SCORERS.items()):
        if not done(out, role):
            compare(preset, out, tokenizer, role, half, seed=preset.seed + number)
    asked = list(prompt_dataset(preset, "held_out")["prompt"])[:prompts]
    if not done(out, "answers of SFT"):
        roles = four_roles(preset, out)
        examine(roles, tokenizer, asked, preset, out, "reference", "answers of SFT")
    for beta in betas:
        if not done(out, f"answers at beta {beta}"):
            optimise(preset, out, tokenizer, beta, asked)


def fine_tune(preset: Preset, out: Path, tokenizer) -> None:
    """SFT on the chosen answers of the training prompts."""
    config = SFTConfig(**preset.sft)
    lengths = preset.prompt_length, preset.response_length
    examples, held_out = (
        encode_examples(tokenizer, sft_dataset(preset, split), *lengths)
        for split in ("train", "held_out")
    )
    roles = Roles(load_base(preset))
    roles.add("sft")
    before = held_out_loss(roles.use("sft"), tokenizer, held_out)
    steps = train_sft(roles, "sft", tokenizer, examples, held_out, config, folder=out / "sft")
    last = list(tqdm(steps, total=config.steps + 1, desc="SFT"))[-1]
    numbers = {
        "examples": len(examples),
        "held-out examples": len(held_out),
        "steps": config.steps,
        "held-out loss before": before,
        "held-out loss": last.held_out["loss"],
    }
    keep(out, "sft", numbers, last.seconds)


def compare(preset: Preset, out: Path, tokenizer, role: str, half: str, seed: int) -> None:
    """A reward model on one half of the pairs; no role has met the held-out prompts."""
    config = RewardConfig(**preset.reward)
    lengths = preset.prompt_length, preset.response_length
    pairs, held_out = (
        encode_pairs(tokenizer, preference_dataset(preset, split), *lengths)
        for split in (half, "held_out")
    )
    roles = Roles(load_base(preset))
    roles.load("sft", out / "sft")
    roles.add(role, copy_of="sft")
    roles.add_head(role, seed=seed)
    folder = out / f"{role}.trained"
    steps = train_reward_model(roles, role, tokenizer, pairs, held_out, config, folder)
    seconds = list(tqdm(steps, total=config.steps + 1, desc=role))[-1].seconds
    numbers = {"pairs": len(pairs), "steps": config.steps}
    for name, rows in {"held-out accuracy": held_out, "training accuracy": pairs[:200]}.items():
        chosen, rejected = pair_scores(roles, role, tokenizer, rows)
        numbers[name] = (*share_with_interval((chosen > rejected).tolist()), len(rows))
        if rows is held_out:
            normalise(roles, role, torch.cat([chosen, rejected]))
    roles.save(role, out / role)
    keep(out, role, numbers, seconds)


def four_roles(preset: Preset, out: Path) -> Roles:
    """PPO's roles and the judge, on one base."""
    roles = Roles(load_base(preset))
    roles.load("reference", out / "sft")
    roles.add("policy", copy_of="reference")
    roles.load("reward", out / "reward")
    roles.add("value", copy_of="reward")
    roles.load("judge", out / "judge")
    return roles


def optimise(preset: Preset, out: Path, tokenizer, beta: float, asked: list) -> None:
    """PPO at one price; each update's batch is judged too."""
    config = ppo.PPOConfig(**preset.ppo | {"beta": beta, "seed": preset.seed})
    roles, stage = four_roles(preset, out), f"answers at beta {beta}"
    if not (out / f"policy-{beta}").is_dir():
        judge = Judge(roles)
        prompts = list(prompt_dataset(preset, "train")["prompt"])
        run = ppo.train_ppo(roles, tokenizer, prompts, config, folder=out / f"policy-{beta}")
        for stats in tqdm(run, total=config.updates, desc=f"PPO, beta {beta}"):
            rows = [
                row
                for row in read_csv(out / "updates.csv")
                if (float(row["beta"]), int(row["update"])) != (beta, stats.update)
            ]
            judged = judge(stats.experience.prompts, stats.experience.rollout).mean().item()
            write_csv(out / "updates.csv", [*rows, logged(stats, beta, judged)])
    roles.load("policy", out / f"policy-{beta}", trainable=True)
    log = [row for row in read_csv(out / "updates.csv") if float(row["beta"]) == beta]
    seconds = max((float(row["seconds"]) for row in log), default=0.0)
    examine(roles, tokenizer, asked, preset, out, "policy", stage, seconds, beta)


def logged(stats: ppo.PPOStats, beta: float, judged: float) -> dict:
    """An update as a line of `updates.csv`."""
    numbers = {name: getattr(stats, name) for name in ("kl", "entropy", "length", "finished")}
    numbers |= {"first_ratio": stats.first_ratio, "seconds": stats.seconds}
    row = {"beta": beta, "update": stats.update, "proxy": stats.score, "judge": judged} | numbers
    return {name: round(value, 4) for name, value in row.items()}


def examine(roles, tokenizer, asked, preset, out, role, stage, seconds=0.0, beta=0.0) -> None:
    """How a role answers held-out prompts: the same prompts and seed for all."""
    config = ppo.PPOConfig(**preset.ppo | {"beta": beta, "seed": preset.seed})
    judge, parts = Judge(roles), list(batches(asked, config.minibatch_size))
    found = {name: [] for name in ("proxy", "judge", "KL", "length", "finished")}
    for i, part in enumerate(tqdm(parts, desc=stage)):
        experience = ppo.collect_experience(roles, tokenizer, part, config, 0.0, i, role)
        rollout: Rollout = experience.rollout
        found["proxy"].append(experience.scores)
        found["judge"].append(judge(part, rollout))
        found["KL"].append(experience.kl)
        found["length"].append(rollout.response_mask.sum(-1))
        found["finished"].append(rollout.finished)
    numbers = {name: mean_with_interval(torch.cat(x).cpu()) for name, x in found.items()}
    keep(out, stage, numbers, seconds)


def batches(rows: list, size: int) -> Iterator[list]:
    """Rows by `size`, what is left over at the end too."""
    yield from (rows[start : start + size] for start in range(0, len(rows), size))


def mean_with_interval(x: Tensor) -> tuple[float, float, float, int]:
    """Mean, both ends of its 95% interval over prompts, their number; for shares Wilson's."""
    if x.dtype == torch.bool:
        return (*share_with_interval(x.tolist()), len(x))
    x = x.double()
    mean, error = x.mean().item(), 1.96 * (x.std() / len(x) ** 0.5).item()
    return mean, mean - error, mean + error, len(x)


def done(out: Path, stage: str) -> bool:
    """Whether the numbers of a stage are kept."""
    return any(row["stage"] == stage for row in read_csv(out / "numbers.csv"))


def keep(out: Path, stage: str, numbers: dict, seconds: float) -> None:
    """Add a stage's numbers to `numbers.csv`; written last, so that a stage is whole or undone."""
    rows = [row for row in read_csv(out / "numbers.csv") if row["stage"] != stage]
    numbers |= {"minutes": seconds / 60, "peak memory, GB": peak_bytes() / 1e9}
    for name, value in numbers.items():
        value, low, high, n = value if isinstance(value, tuple) else (value, None, None, None)
        ends = ["" if end is None else round(end, 4) for end in (low, high)]
        row = {"stage": stage, "number": name, "value": round(value, 4), "low": ends[0]}
        rows.append(row | {"high": ends[1], "n": "" if n is None else n})
    write_csv(out / "numbers.csv", rows)


def peak_bytes() -> int:
    """The most memory that this process has had, of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_about(path: Path, preset: Preset) -> None:
    """Settings, machine, versions and date; of local files and folders only the names."""
    settings = asdict(preset) | {"runs": ""}
    for name in ("model", "data"):
        if settings[name] and Path(settings[name]).exists():
            settings[name] = Path(settings[name]).name
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    about = {
        "machine": ", ".join(
            [*gpu, f"{os.cpu_count()} CPU cores", platform.machine(), platform.system()]
        ),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "settings": settings,
    }
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts at the end")
    parser.add_argument("--preset", default="single_gpu")
    parser.add_argument("--set", default="{}", help="fields of the preset, as JSON")
    args = parser.parse_args()
    record(load_preset(args.preset, **json.loads(args.set)), args.out, args.betas, args.prompts)


if __name__ == "__main__":
    main()
