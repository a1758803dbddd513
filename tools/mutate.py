"""How many small faults in the package would the tests notice? A table, and a list of those not.

python tools/mutate.py [--at-most N] [MODULE ...]       such as: python tools/mutate.py dpo clicks

Needs mutmut (`pip install "mutmut>=3.8"`), which changes one operator, number, name or argument at
a time and runs the tests that reach it, the quick ones first. What only words an error is left as
it is. This takes hours for all modules. It works on copies of the repository in build/mutation, and
a second call goes on where the first was stopped. To see a mutant: `mutmut show NAME` in one of the
copies.

Tests that start processes of their own, as those of `parallel` do, reach mutants that mutmut does
not see them reach. So mutants of such a module are asked all of its own tests, up to a minute each.
With `--at-most N` that many of them are drawn, and the table counts no others.
"""

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutation"
TESTS = {  # of each module, beside its rows in test_bad_input.py
    "clicks": "clicks record_clicks",
    "clinic": "clinic record_clinic preflight",
    "dpo": "dpo dpo_parity",
    "kinds": "validation",
    "kl": "kl",
    "logprobs": "logprobs",
    "losses": "ppo group_advantages ppo_parity grpo_parity",
    "parallel": "parallel",
    "ppo": "ppo ppo_parity train_ppo train_groups",
    "reward": "reward",
    "rollout": "rollout",
    "sft": "sft",
    "stats": "stats",
    "text": "text outside_data data",
}
IN_PROCESSES = ("parallel",)
OPTIONS = [  # of pytest
    "--hypothesis-profile=ci",  # the same draws for every mutant
    "--deselect=tests/test_train_ppo.py::test_killed_runs_go_on_to_the_same_weights",
    "--deselect=tests/test_clinic.py::test_a_fault_can_be_read",  # the source is another here
]
NOTICED = ("killed", "timeout")
PATIENCE = 180  # seconds, for a mutant in whose processes one waits for ever
SETTINGS = """
[tool.mutmut]
source_paths = ["rlhf_helpers"]
only_mutate = ["rlhf_helpers/{module}.py"]
do_not_mutate_patterns = ['^ *raise ', '^ *f?"[^"]* [^"]*"[,)]*$']
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = {options}
also_copy = ["tools"]
process_isolation = "forkserver"
timeout_constant = 30.0  # seconds; a mutant may take (time of its tests + this) * 3
timeout_multiplier = 3.0
"""


def files_of(module: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in (*TESTS[module].split(), "bad_input")]


def prepare(folder: Path, module: str) -> None:
    """Copy what git knows, with mutmut's settings in pyproject.toml."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    path = folder / "rlhf_helpers" / f"{module}.py"
    path.write_text(undecorated(path.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copystat(ROOT / "rlhf_helpers" / path.name, path)
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(SETTINGS.format(module=module, tests=files_of(module), options=OPTIONS))


def undecorated(source: str) -> str:
    """`@checked` above a function as `name = checked(name)` below: mutmut leaves out the others."""
    lines, tree = source.splitlines(), ast.parse(source)
    nodes = [*tree.body, *(n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body)]
    for node in sorted(nodes, key=lambda node: -node.lineno):  # so that the lines above stay
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            made = node.name
            for decorator in reversed(node.decorator_list):
                made = f"{ast.unparse(decorator)}({made})"
            lines.insert(node.end_lineno, f"{' ' * node.col_offset}{node.name} = {made}")
            del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def python(
    folder: Path, *arguments: str, quiet: bool = True, limit: float | None = None, **variables: str
):
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command, environment = [sys.executable, "-m", *arguments], os.environ | offline | variables
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=quiet, text=True, timeout=limit
    )


def mutmut(folder: Path, *arguments: str, quiet: bool = False) -> str:
    """Run a command of mutmut in a folder; what it printed, if it was to be quiet."""
    done = python(folder, "mutmut", *arguments, quiet=quiet)
    if done.returncode:
        raise SystemExit(
            f"mutmut {arguments[0]} failed in {folder}; see above\n{done.stderr or ''}"
        )
    return done.stdout or ""


def fates(module: str, at_most: int) -> dict[str, str]:
    """The fate of each mutant: killed, survived, timeout, no tests, not checked."""
    folder = WORK / module
    prepare(folder, module)
    if module in IN_PROCESSES:
        python(folder, "mutmut", "run", "nothing", quiet=False)  # it makes them all and runs none
    else:
        mutmut(folder, "run")
    listed = mutmut(folder, "results", "--all", "true", quiet=True)
    found = dict(re.findall(r"^\s*(rlhf_helpers\.\S+): (.+)$", listed, re.MULTILINE))
    if module in IN_PROCESSES:
        if not found or alone(folder, module, "") != "survived":
            raise SystemExit(f"no mutants of {module} in {folder}, or its tests fail without one")
        drawn = random.Random(0).sample(sorted(found), min(at_most, len(found)))
        with ThreadPool(os.cpu_count()) as pool:
            asked = pool.imap(lambda name: alone(folder, module, name), drawn)
            found = dict(zip(drawn, tqdm(asked, total=len(drawn)), strict=True))
    return found


def alone(folder: Path, module: str, name: str) -> str:
    """The fate of a mutant if all tests of its module are run; their processes inherit its name."""
    tests = ["pytest", "-x", "-p", "no:cacheprovider", *OPTIONS, *files_of(module)[:-1]]
    try:
        done = python(folder / "mutants", *tests, limit=PATIENCE, MUTANT_UNDER_TEST=name)
    except subprocess.TimeoutExpired:
        return "timeout"
    return "survived" if done.returncode == 0 else "killed"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--at-most", type=int, default=sys.maxsize, metavar="N")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(TESTS):
        parser.error(f"{sorted(unknown)}: choose from {list(TESTS)}")
    modules = arguments.modules or list(TESTS)
    found = {module: fates(module, arguments.at_most) for module in modules}
    print(f"\n{'module':10}{'mutants':>9}{'noticed':>9}{'share':>8}")
    for module, fate_of in found.items():
        noticed = sum(fate in NOTICED for fate in fate_of.values())
        print(f"{module:10}{len(fate_of):9}{noticed:9}{noticed / len(fate_of):8.1%}")
    for fate_of in found.values():
        for name, fate in sorted(fate_of.items()):
            if fate not in NOTICED:
                print(f"{fate:12}{name}")


if __name__ == "__main__":
    main()
