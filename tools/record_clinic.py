"""Record the runs that lesson 07 examines: each fault of the clinic, and none, for three seeds.

    python tools/record_clinic.py preflight    # what the checks before a run find, seconds each
    python tools/record_clinic.py runs         # thirty updates of each fault, and ten answers

What is stopped goes on where it was: runs that are in the files are not made again.
"""

import argparse
import warnings
from contextlib import nullcontext
from pathlib import Path

import record_ppo
from record_ppo import read_csv, write_csv
from tqdm.auto import tqdm

from rlhf_helpers import ppo
from rlhf_helpers.clinic import FAULTS, plant
from rlhf_helpers.examine import log_row
from rlhf_helpers.pocket import world
from rlhf_helpers.ppo import PPOConfig
from rlhf_helpers.preflight import preflight
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.text import load_tokenizer

OUT = ASSETS / "clinic"
HEALTHY = "healthy"
TEXTS = 10  # answers of the last batch that are kept


def with_fault(name: str, roles):
    return nullcontext() if name == HEALTHY else plant(name, roles)


def one_run(fault: str, config: PPOConfig) -> tuple[list[dict], list[dict], dict]:
    """The log of a run, answers of its last batch, and how the policy does on held-out prompts.

    The last is measured without the fault: it is the policy's autopsy, not its sampler's.
    """
    roles, tokenizer = record_ppo.fresh_roles(), load_tokenizer(load_preset("pocket"))
    rows = []
    with warnings.catch_warnings(record=True) as warned, with_fault(fault, roles):
        warnings.simplefilter("always")
        for stats in ppo.train_ppo(roles, tokenizer, world.prompts("train"), config):
            numbers = {k: round(v, 6) for k, v in log_row(stats).items()}
            marks = record_ppo.judged(stats.experience)
            rows.append(numbers | {k: marks[k] for k in ("gold", "correct", "distinct_2")})
    last = stats.experience
    pairs = zip(last.prompts, last.rollout.texts, last.rollout.finished.tolist(), strict=True)
    texts = [{"prompt": p, "text": t, "finished": int(f)} for p, t, f in pairs][:TEXTS]
    end = record_ppo.held_out(roles, config, "policy")
    return rows, texts, end | {"seconds": round(stats.seconds, 1), "warnings": len(warned)}


def record_runs(out: Path, faults: list[str], seeds: int, **settings) -> None:
    """Logs in `updates.csv`, answers in `texts.csv`, the ends in `held_out.csv`."""
    out.mkdir(parents=True, exist_ok=True)
    made = {(row["fault"], row["seed"]) for row in read_csv(out / "held_out.csv")}
    wanted = [(fault, seed) for seed in range(seeds) for fault in faults]
    for fault, seed in tqdm([run for run in wanted if (run[0], str(run[1])) not in made]):
        config = PPOConfig(seed=seed, **settings)
        rows, texts, end = one_run(fault, config)
        # The end is written last: a run without it is made again.
        for name, found in (("updates", rows), ("texts", texts), ("held_out", [end])):
            replace_rows(out / f"{name}.csv", {"fault": fault, "seed": seed}, found)
        record_ppo.write_about(out / "about.json", config)


def record_preflight(out: Path, faults: list[str]) -> None:
    """What `preflight` finds with each fault, in `preflight.csv`."""
    out.mkdir(parents=True, exist_ok=True)
    made = {row["fault"] for row in read_csv(out / "preflight.csv")}
    for fault in tqdm([name for name in faults if name not in made]):
        roles, tokenizer = record_ppo.fresh_roles(), load_tokenizer(load_preset("pocket"))
        with with_fault(fault, roles):
            found = preflight(roles, tokenizer, world.prompts("train"))
        rows = [{"check": f.name, "passed": int(f.passed), "seen": f.seen} for f in found]
        replace_rows(out / "preflight.csv", {"fault": fault}, rows)


def replace_rows(path: Path, key: dict, rows: list[dict]) -> None:
    """Put rows into a file, in place of those that have the same key."""
    same = {name: str(value) for name, value in key.items()}
    kept = [row for row in read_csv(path) if any(row[name] != same[name] for name in same)]
    write_csv(path, kept + [key | row for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["runs", "preflight"])
    parser.add_argument("--faults", nargs="+", choices=[HEALTHY, *FAULTS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT, help="the package's assets if not given")
    args = parser.parse_args()
    faults = args.faults or [HEALTHY, *FAULTS]
    if args.what == "runs":
        record_runs(args.out, faults, args.seeds)
    else:
        record_preflight(args.out, faults)


if __name__ == "__main__":
    main()
