"""Seconds of a PPO update of lesson 04: one process with two threads, two ranks with one each.

    python tests/benchmarks/two_ranks.py [--updates N] [--rounds N]

Both start from the shipped adapters and learn from as many responses; two ranks sample other ones,
since each has a seed of its own. Fresh processes, in turns; the first update of each is dropped.
Nothing else should run beside.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from rlhf_helpers.base import load_base
from rlhf_helpers.parallel import data_parallel
from rlhf_helpers.ppo import PPOConfig, train_ppo
from rlhf_helpers.presets import ASSETS, PRESETS
from rlhf_helpers.ranks import join
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import load_tokenizer

WAYS = {"one process": (1, 2), "two ranks": (2, 1)}  # processes, and threads of each
REPORT = "seconds of an update:"


def measure(updates: int) -> None:
    """Train, and let the first rank, or the only process, print the seconds of each update."""
    preset = PRESETS["pocket"]
    roles = Roles(load_base(preset))
    roles.load("reference", ASSETS / "sft")
    roles.load("reward", ASSETS / "reward")
    roles.add("policy", copy_of="reference")
    roles.add("value", copy_of="reward")
    prompts = list(prompt_dataset(preset)["prompt"])
    seconds, start = [], time.perf_counter()
    with ExitStack() as stack:
        if "RANK" in os.environ:
            stack.enter_context(join())
            stack.enter_context(data_parallel())
        for _ in train_ppo(roles, load_tokenizer(preset), prompts, PPOConfig(updates=updates + 1)):
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(REPORT, *seconds[1:])


def run(processes: int, threads: int, updates: int) -> list[float]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    command += [str(Path(__file__).resolve()), "--measure", "--updates", str(updates)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, text=True, check=True, stdout=subprocess.PIPE)
    (line,) = (x for x in done.stdout.splitlines() if x.startswith(REPORT))
    return [float(x) for x in line.removeprefix(REPORT).split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=6, help="that are measured, in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return measure(given.updates)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(given.rounds):
        for name, way in WAYS.items():
            seconds[name] += run(*way, given.updates)
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"{name:12} {median:6.2f} s an update ({min(found):.2f} to {max(found):.2f})")
    one, two = map(statistics.median, seconds.values())
    print(f"two ranks take {two / one:.2f} of the time of one process; torch {torch.__version__}")


if __name__ == "__main__":
    main()
