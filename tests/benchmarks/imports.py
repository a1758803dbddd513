"""How long the package takes to import beyond torch and transformers: best of five, in seconds.

python tests/benchmarks/imports.py
"""

import subprocess
import sys

# transformers loads its classes when they are first named.
HEAVY = "import torch, transformers; from transformers import " + ", ".join(
    ["AutoModelForCausalLM", "BitsAndBytesConfig", "PreTrainedModel", "PreTrainedTokenizerFast"]
)
CORE = "from rlhf_helpers import data, kl, logprobs, ppo, presets, roles, rollout, sources"
WORLD = "from rlhf_helpers.pocket import annotator, corpus, exam, rubric, world"
PLOTS = "from rlhf_helpers import plots"
STAGES = {
    "torch and transformers": HEAVY,
    "import rlhf_helpers": "import rlhf_helpers",
    "all modules but plots": f"{CORE}; {WORLD}",
    "plots (matplotlib)": PLOTS,
}


def seconds() -> list[float]:
    """Import stage by stage in a fresh interpreter."""
    lines = ["import time"]
    for code in STAGES.values():
        lines += ["start = time.perf_counter()", code, "print(time.perf_counter() - start)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    runs = [seconds() for _ in range(5)]
    for name, values in zip(STAGES, zip(*runs, strict=True), strict=True):
        print(f"{name:25}{min(values):8.3f}")


if __name__ == "__main__":
    main()
