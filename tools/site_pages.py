"""What the website shows of notebooks, pages and docstrings; `docs/conf.py` uses it.

Plain functions from text to text, without Sphinx, so that the tests need none.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path

SETUP_LINE = "# In Colab this installs the course"
INSET = "<!-- README -->"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(`+[^`]+`+)")


def home(page: str, readme: str) -> str:
    """The first page: README, its links as seen from `docs/`, in place of a comment.

    >>> home("<!-- README -->", "[00](notebooks/00.ipynb) [G](docs/g.md) [a](https://b.c)")
    '[00](../notebooks/00.ipynb) [G](../docs/g.md) [a](https://b.c)'
    """

    def moved(link: re.Match) -> str:
        image, words, target = link.groups()
        target = target if re.match(r"\w+:|#", target) else f"../{target}"
        return f"{image}[{words}]({target})"

    return page.replace(INSET, LINK.sub(moved, readme))


def unbuilt(root: Path) -> set[str]:
    """Notebooks, as folder/name, that have a source and are not there yet."""
    lessons = {f"notebooks/{path.stem}.ipynb" for path in (root / "notebooks/src").glob("*.py")}
    stems = [path.stem for path in (root / "solutions/src").glob("*.py")]
    pairs = {f"{folder}/{stem}.ipynb" for folder in ("exercises", "solutions") for stem in stems}
    return {name for name in lessons | pairs if not (root / name).is_file()}


def unlinked(text: str, missing: set[str]) -> str:
    """The text with the words alone where a link leads to a notebook that is not there.

    >>> unlinked("[07](../notebooks/07_clinic.ipynb) [g](g.md)", {"notebooks/07_clinic.ipynb"})
    '07 [g](g.md)'
    """
    return LINK.sub(lambda m: m[2] if m[3].removeprefix("../") in missing else m[0], text)


def as_page(nb: dict, missing: set[str]) -> dict:
    """A notebook without its set-up for Colab, with alt texts where MyST-NB looks for them."""
    nb = copy.deepcopy(nb)
    nb["cells"] = [c for c in nb["cells"] if not "".join(c["source"]).startswith(SETUP_LINE)]
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = unlinked("".join(cell["source"]), missing)
        elif alts := [image["alt"] for image in map(image_metadata, cell["outputs"]) if image]:
            cell["metadata"]["mystnb"] = {"image": {"alt": "\n".join(alts)}}
    return nb


def image_metadata(output: dict) -> dict:
    """What an output says of its image, empty if it has none."""
    return output.get("metadata", {}).get("image/png", {})


def rst_safe(lines: Sequence[str]) -> list[str]:
    r"""A docstring's lines in which reStructuredText finds no markup but code.

    Examples and what is set in after a colon and a blank line stay as they are.

    >>> rst_safe(["Σ |x_| * `a*b`s", ">>> f(*x)"])
    ['Σ \\|x\\_\\| \\* ``a*b``\\ s', '>>> f(*x)']
    """
    safe, example, block = [], False, None
    for number, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        if block is not None and line.strip() and depth <= block:
            block = None
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if example or block is not None:
            safe.append(line)
            continue
        safe.append(escaped(line))
        if line.endswith(":") and opens_block(lines[number + 1 : number + 3], depth):
            safe[-1] += ":"
            block = depth
    return safe


def opens_block(following: Sequence[str], depth: int) -> bool:
    """Whether a blank line comes, and then one that is set in by more than ``depth``."""
    blank = len(following) == 2 and not following[0].strip()
    return blank and following[1].startswith(" " * (depth + 1))


def escaped(line: str) -> str:
    """Prose with its stars, bars and last underscores escaped, and `code` as ``code``."""
    parts = CODE.split(line)
    parts[::2] = [re.sub(r"(\*|\||_(?!\w))", r"\\\1", part) for part in parts[::2]]
    for index in range(1, len(parts), 2):
        plural = r"\ " if re.match(r"\w", parts[index + 1]) else ""
        parts[index] = f"``{parts[index].strip('`')}``{plural}"
    return "".join(parts)
