"""Record the runs that lesson 07 examines: each fault of the clinic, and none, for three seeds.

    python tools/record_clinic.py preflight    # what the checks before a run find
    python tools/record_clinic.py runs         # thirty updates of each fault, and ten answers
    python tools/record_clinic.py gather       # the files of the assets, from what is there

Each run has a file of its own, so a study that is stopped goes on where it was, and several
processes can share it: `runs --faults kl_sign lost_head` here, other faults there.
"""

import argparse
import json
import os
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import record_ppo
from record_ppo import write_csv
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
WORK = Path(__file__).parents[1] / "runs" / "clinic"
HEALTHY = "healthy"
TEXTS = 10  # answers of the last batch that are kept


def with_fault(name: str, roles):
    return nullcontext() if name == HEALTHY else plant(name, roles)


def one_run(fault: str, config: PPOConfig) -> dict[str, list[dict]]:
    """The log of a run, answers of its last batch, and how the policy does on held-out prompts.

    The last is measured without the fault: it is the policy's autopsy, not its sampler's.
    """
    roles, tokenizer = record_ppo.fresh_roles(), load_tokenizer(load_preset("pocket"))
    rows = []
    with warnings.catch_warnings(record=True) as warned, with_fault(fault, roles):
        warnings.simplefilter("always")
        for stats in ppo.train_ppo(roles, tokenizer, world.prompts("train"), config):
            numbers = {name: round(value, 6) for name, value in log_row(stats).items()}
            marks = record_ppo.judged(stats.experience)
            rows.append(numbers | {k: marks[k] for k in ("gold", "correct", "distinct_2")})
    last = stats.experience
    answers = zip(last.prompts, last.rollout.texts, last.rollout.finished.tolist(), strict=True)
    texts = [{"prompt": p, "text": t, "finished": int(f)} for p, t, f in answers][:TEXTS]
    facts = {"seconds": round(stats.seconds, 1), "warnings": len(warned)}
    return {
        "updates": rows,
        "texts": texts,
        "held_out": [record_ppo.held_out(roles, config, "policy") | facts],
    }


def checked(fault: str) -> dict[str, list[dict]]:
    """What `preflight` finds with a fault."""
    roles, tokenizer = record_ppo.fresh_roles(), load_tokenizer(load_preset("pocket"))
    began = time.perf_counter()
    with with_fault(fault, roles):
        found = preflight(roles, tokenizer, world.prompts("train"))
    seconds = round(time.perf_counter() - began, 1)
    return {
        "preflight": [
            {"check": f.name, "passed": int(f.passed), "seen": f.seen, "seconds": seconds}
            for f in found
        ]
    }


def keep(path: Path, found: dict[str, list[dict]]) -> None:
    """Write what a run has left, as a whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def record_runs(work: Path, faults: list[str], seeds: int, **settings) -> None:
    """Each run that has no file yet, the first seed of every fault first."""
    work.mkdir(parents=True, exist_ok=True)
    for fault, seed in tqdm([(fault, seed) for seed in range(seeds) for fault in faults]):
        path = work / f"{fault}-{seed}.json"
        if not path.is_file():
            keep(path, one_run(fault, PPOConfig(seed=seed, **settings)))


def record_preflight(work: Path, faults: list[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for fault in tqdm(faults):
        path = work / f"{fault}-preflight.json"
        if not path.is_file():
            keep(path, checked(fault))


def gather(work: Path, out: Path) -> None:
    """Logs in `updates.csv`, texts in `texts.csv`, ends in `held_out.csv`, `preflight.csv`."""
    tables: dict[str, list[dict]] = {}
    for fault in (HEALTHY, *FAULTS):
        for path in sorted(work.glob(f"{fault}-*.json")):
            seed = path.stem.removeprefix(f"{fault}-")
            for table, rows in json.loads(path.read_text(encoding="utf-8")).items():
                run = {"fault": fault} | ({"seed": seed} if table != "preflight" else {})
                tables.setdefault(table, []).extend(run | row for row in rows)
    out.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        write_csv(out / f"{table}.csv", rows)
    record_ppo.write_about(out / "about.json", PPOConfig())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["runs", "preflight", "gather"])
    parser.add_argument("--faults", nargs="+", choices=[HEALTHY, *FAULTS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=PPOConfig.updates, help="fewer, to try it")
    parser.add_argument("--work", type=Path, default=WORK, help="where each run has its file")
    parser.add_argument("--out", type=Path, default=OUT, help="the package's assets if not given")
    args = parser.parse_args()
    faults = args.faults or [HEALTHY, *FAULTS]
    if args.what == "runs":
        record_runs(args.work, faults, args.seeds, updates=args.updates)
    elif args.what == "preflight":
        record_preflight(args.work, faults)
    else:
        gather(args.work, args.out)


if __name__ == "__main__":
    main()
