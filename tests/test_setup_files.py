"""environment.yml, pyproject.toml and constraints.txt name the same packages."""

import check_environment
import yaml
from packaging.requirements import Requirement

ROOT = check_environment.ROOT


def pip_lines() -> list[str]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    return next(d for d in environment["dependencies"] if isinstance(d, dict))["pip"]


def test_conda_environment_names_every_dependency_and_uses_the_constraints():
    options = [line for line in pip_lines() if line.startswith("-")]
    named = {line for line in pip_lines() if not line.startswith("-")}
    dependencies = {r.name for r in check_environment.needed(ROOT)} - {"rlhf_helpers"}
    assert options == ["-c constraints.txt", "-e .[dev]"]
    assert named <= dependencies
    project = check_environment.tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert {Requirement(d).name for d in project["project"]["dependencies"]} <= named


def test_this_environment_is_complete():
    assert check_environment.unmet(check_environment.needed(ROOT)) == []


def test_missing_and_other_versions_are_reported():
    wanted = [Requirement("no-such-package-here"), Requirement("pytest<1"), Requirement("pytest")]
    missing, other = check_environment.unmet(wanted)
    assert missing == "no-such-package-here is not installed"
    assert other.startswith("pytest<1 is wanted, ")
