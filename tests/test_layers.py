"""The floors of the package: the table in docs/contributors.md holds.

A module imports only from those before it in the table, also within a function, and only `sources`
imports the pocket world.
"""

import ast
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_helpers"
WORLD, BRIDGE = "pocket", "sources"


def floors(page: str) -> list[str]:
    """The modules in the order of the table of floors, from its first column."""
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


def modules(package: Path) -> set[str]:
    found = (path for path in package.iterdir() if path.name != "__init__.py")
    return {p.stem for p in found if p.suffix == ".py" or (p / "__init__.py").is_file()}


def imports(path: Path, package: Path) -> list[tuple[int, str]]:
    """Line and module, at the top of the package, of every import from within the package."""
    here = path.relative_to(package.parent).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            before = here[: len(here) - node.level + 1] if node.level else ()
            origin = ".".join([*before, *filter(None, [node.module])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = (name.split(".") for name in names)
        found += [(node.lineno, p[1]) for p in parts if p[0] == package.name and len(p) > 1]
    return found


def offences(package: Path, order: list[str]) -> list[str]:
    """Imports against the table, each as file:line: import."""
    known, found = modules(package), []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").parts[0]
        if module == "__init__":
            allowed = set()
        else:
            allowed = set(order[: order.index(module) + 1])
        if module not in (WORLD, BRIDGE):
            allowed.discard(WORLD)
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [
            f"{path.relative_to(package.parent)}:{line}: {lines[line - 1].strip()}"
            for line, name in imports(path, package)
            if name in known - allowed
        ]
    return found


ORDER = floors((ROOT / "docs" / "contributors.md").read_text(encoding="utf-8"))


def test_the_table_names_every_module_once():
    assert len(ORDER) == len(set(ORDER)) > 20
    assert set(ORDER) == modules(PACKAGE)


def test_the_package_names_its_modules_in_the_order_of_the_table():
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
    assert re.findall(r"`(\w+)`", text) == ORDER


def test_no_import_runs_upwards():
    assert not (found := offences(PACKAGE, ORDER)), "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("text.py", "from rlhf_helpers.roles import Roles"),
        ("text.py", "import rlhf_helpers.ppo"),
        ("hub.py", "from rlhf_helpers import presets, sft"),
        ("kl.py", "from .data import read_dataset"),
        ("reward.py", "from rlhf_helpers.pocket.rubric import gold_reward"),
        ("checks/lesson_01.py", "from rlhf_helpers import pocket"),
        ("pocket/world.py", "from rlhf_helpers.sources import load_gold"),
        ("pocket/world.py", "from ..sources import load_gold"),
        ("ppo.py", "def late():\n    from rlhf_helpers.sources import load_gold"),
        ("__init__.py", "from rlhf_helpers import presets"),
    ],
)
def test_a_planted_offence_is_found(tmp_path, file, line):
    package = tmp_path / "rlhf_helpers"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    path = package / file
    text = path.read_text(encoding="utf-8")
    path.write_text(f"{text}\n\n{line}\n", encoding="utf-8")
    number = len(path.read_text(encoding="utf-8").splitlines())
    expected = f"rlhf_helpers/{file}:{number}: {line.splitlines()[-1].strip()}"
    assert offences(package, ORDER) == [expected]
