"""Say whether this Python has what the course needs, at the versions it is tested with.

Reads pyproject.toml (with its extras, but not that of the site, which has a place of its own) and
constraints.txt. Exit status 1, and a line for each package that is missing or of another version,
if something has to be installed.
"""

import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def needed(root: Path) -> list[Requirement]:
    """The dependencies, those of the extras, and the pinned versions."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], extras["lab"], extras["dev"]]
    pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    groups.append([line for line in pins if line.strip() and not line.startswith("#")])
    own = Requirement(project["name"])
    return [own, *(Requirement(line) for group in groups for line in group)]


def unmet(requirements: Iterable[Requirement]) -> list[str]:
    """What is missing or has another version."""
    found = []
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"{requirement} is not installed")
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                found.append(f"{requirement} is wanted, {version} is installed")
    return found


def main() -> int:
    """Print what is unmet; 0 if nothing is."""
    found = unmet(needed(ROOT))
    print("\n".join(found) or "the environment is complete")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
