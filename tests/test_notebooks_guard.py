"""The course's own notebooks; and that each guard here would notice the fault it is for."""

import shutil
import tomllib
from pathlib import Path

import build_notebooks as bn
import nbformat
import pytest

FOLDERS = ("notebooks", "solutions", "exercises")


def stored(root: Path = bn.ROOT) -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((root / folder).glob("*.ipynb"))]


def compared_cells(path: Path) -> list[nbformat.NotebookNode]:
    """The cells whose output nbval compares."""
    return [cell for cell in bn.read_notebook(path).cells if "nbval-check-output" in bn.tags(cell)]


def without_output(root: Path) -> list[str]:
    """Cells that nbval is to compare, and for which it would compare nothing."""
    cells = [cell for path in stored(root) for cell in compared_cells(path)]
    return [cell.id for cell in cells if not cell.get("outputs")]


def style_failures(root: Path) -> list[str]:
    return [
        fault for path in stored(root) for fault in bn.style_report(bn.read_notebook(path)).failures
    ]


@pytest.fixture
def broken(tmp_path):
    """A copy of the course's notebooks and sources, to be broken."""
    for folder in FOLDERS:
        if (bn.ROOT / folder).exists():
            shutil.copytree(bn.ROOT / folder, tmp_path / folder)
    shutil.copy(bn.ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def change_first_lesson(root: Path, change) -> None:
    path = stored(root)[0]
    nb = bn.read_notebook(path)
    change(nb)
    nbformat.write(nb, path)


def test_there_is_something_to_guard():
    assert stored(), "no notebooks; run `make build`"
    assert any(compared_cells(path) for path in stored()), "no cell is tagged nbval-check-output"


def test_every_notebook_is_what_its_source_gives():
    assert bn.check_sync(bn.ROOT) == []


def test_no_notebook_and_no_page_names_a_repository_that_is_not_ours():
    table = tomllib.loads((bn.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert bn.course_address(table) == "", "the course is shipped without an address"
    pages = [*stored(), bn.ROOT / "README.md", *(bn.ROOT / "docs").glob("*.md")]
    texts = {path: path.read_text(encoding="utf-8") for path in pages}
    assert [p for p, text in texts.items() if "git+http" in text or "colab-badge" in text] == []


def test_every_compared_cell_has_an_output():
    assert without_output(bn.ROOT) == []


def test_every_notebook_has_the_course_style():
    assert style_failures(bn.ROOT) == []


def test_drift_would_be_noticed(broken):
    change_first_lesson(broken, lambda nb: nb.cells[0].update(source="# Another title"))
    name = stored(broken)[0].name
    assert f"notebooks/{name}: cell 0: differs from src/ in source" in bn.check_sync(broken)


def test_missing_outputs_would_be_noticed(broken):
    path = next(path for path in stored(broken) if compared_cells(path))
    nbformat.write(bn.strip_outputs(bn.read_notebook(path)), path)
    assert without_output(broken) == [cell.id for cell in compared_cells(path)] != []


def test_bad_style_would_be_noticed(broken):
    change_first_lesson(broken, lambda nb: nb.cells.pop(0))
    assert any("title" in failure for failure in style_failures(broken))
