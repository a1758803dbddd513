"""How long GAE takes: best of many, in milliseconds, beside a pass over the same memory and a loop.

python tests/benchmarks/gae.py
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_helpers.losses import gae

ROWS, TOKENS = 64, 512
GAMMA, LAM = 1.0, 0.95
REPEATS = 300


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one token after another from the last to the first; no input is checked."""
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def milliseconds(function: Callable, *arguments: Tensor) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(*arguments)
        best = min(best, time.perf_counter() - start)
    return best * 1000


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, ROWS, TOKENS, generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (ROWS, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).float()
    arguments = (rewards, values, mask)
    for ours, theirs in zip(gae(*arguments, GAMMA, LAM), loop(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    times = {
        "rewards + values": milliseconds(torch.add, rewards, values),
        "gae": milliseconds(lambda *x: gae(*x, GAMMA, LAM), *arguments),
        "loop over tokens": milliseconds(loop, *arguments),
    }
    print(f"[{ROWS}, {TOKENS}] float32, {torch.get_num_threads()} threads")
    for name, value in times.items():
        print(f"{name:20}{value:9.4f} ms{value / times['rewards + values']:9.1f} passes")


if __name__ == "__main__":
    main()
