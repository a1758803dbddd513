"""How many small faults in the package would the tests notice? A table, and a list of those not.

python tools/mutate.py [MODULE ...]       such as: python tools/mutate.py kl logprobs

Needs mutmut (`pip install "mutmut>=3.8"`), which changes one operator, number, name or argument at
a time and runs the tests that reach it. This takes hours for all modules. It works on copies of the
repository in build/mutation, and a second call goes on where the first was stopped. The slow tests
of the PPO loop are asked only about mutants that the others let live. To see a mutant: `mutmut show
NAME` in one of the copies.

Tests that start processes of their own cannot see a mutant, and are left out.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutation"
MODULES = ("kl", "logprobs", "ppo", "reward", "sft")
QUICK = [*MODULES, "ppo_parity", "bad_input"]
SLOW = [*MODULES, "ppo_parity", "train_ppo"]
APART = "tests/test_train_ppo.py::test_killed_runs_go_on_to_the_same_weights"
SETTINGS = """
[tool.mutmut]
source_paths = ["rlhf_helpers"]
only_mutate = [{modules}]
pytest_add_cli_args_test_selection = [{tests}]
pytest_add_cli_args = ["--deselect", "{apart}"]
also_copy = ["tools"]
process_isolation = "forkserver"
timeout_constant = 60.0
"""


def quoted(pattern: str, names: list[str]) -> str:
    return ", ".join(f'"{pattern.format(name)}"' for name in names)


def prepare(folder: Path, modules: list[str], tests: list[str]) -> None:
    """Copy what git knows, with mutmut's settings in pyproject.toml."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        paths = quoted("rlhf_helpers/{}.py", modules), quoted("tests/test_{}.py", tests)
        file.write(SETTINGS.format(modules=paths[0], tests=paths[1], apart=APART))


def mutmut(folder: Path, *arguments: str, quiet: bool = False) -> str:
    """Run a command of mutmut in a folder; what it printed, if it was to be quiet."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    environment = os.environ | offline
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=quiet, text=True)
    if done.returncode:
        raise SystemExit(
            f"mutmut {arguments[0]} failed in {folder}; see above\n{done.stderr or ''}"
        )
    return done.stdout or ""


def results(folder: Path) -> dict[str, str]:
    """The fate of each mutant: killed, survived, timeout, no tests, not checked."""
    listed = mutmut(folder, "results", "--all", "true", quiet=True)
    return dict(re.findall(r"^\s*(rlhf_helpers\.\S+): (.+)$", listed, re.MULTILINE))


def fates(modules: list[str]) -> dict[str, str]:
    quick, slow = WORK / "quick", WORK / "slow"
    prepare(quick, modules, QUICK)
    mutmut(quick, "run")
    found = results(quick)
    alive = [name for name, fate in found.items() if fate not in ("killed", "timeout")]
    if alive:
        prepare(slow, modules, SLOW)
        mutmut(slow, "run", *alive)
        found |= {name: fate for name, fate in results(slow).items() if name in alive}
    return found


def main() -> None:
    modules = sys.argv[1:] or list(MODULES)
    if unknown := set(modules) - set(MODULES):
        raise SystemExit(f"{sorted(unknown)}: choose from {list(MODULES)}")
    found = fates(modules)
    print(f"\n{'module':10}{'mutants':>9}{'noticed':>9}{'share':>8}")
    for module in modules:
        count = Counter(fate for name, fate in found.items() if name.split(".")[1] == module)
        noticed = count["killed"] + count["timeout"]
        print(f"{module:10}{count.total():9}{noticed:9}{noticed / count.total():8.1%}")
    for name, fate in sorted(found.items()):
        if fate not in ("killed", "timeout"):
            print(f"{fate:12}{name}")


if __name__ == "__main__":
    main()
