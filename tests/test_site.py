"""The website's sources: they name every notebook, and no link in them leads nowhere."""

import re
import sys
from pathlib import Path

import build_notebooks as bn
import course_figures
import pytest
import site_pages

ROOT = bn.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def listed(page: str) -> list[str]:
    """What the toctrees of a page in docs/ name, without options."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    trees = re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for tree in trees for line in tree.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


@pytest.mark.parametrize("folder", ["notebooks", "exercises"])
def test_the_map_names_every_notebook(folder):
    built = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.ipynb")}
    assert built and built <= {target for _, _, target in site_pages.LINK.findall(README)}


def test_the_toctrees_name_every_folder_and_page():
    entries = listed("index.md")
    assert {"/notebooks/*", "/exercises/*"} <= set(entries)
    assert listed("solutions.md") == ["/solutions/*"]
    assert {path.stem for path in PAGES} - {"index"} <= set(entries)


@pytest.mark.parametrize("page", ["README.md", *NAMES])
def test_no_link_leads_nowhere(page):
    folder = (ROOT / page).parent
    links = site_pages.LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    files = {folder / target.partition("#")[0] for _, _, target in links if ":" not in target}
    waiting = {ROOT / name for name in site_pages.unbuilt(ROOT)}
    lost = {path.resolve() for path in files - {folder}} - waiting
    assert [path for path in lost if not path.exists()] == []


def test_readme_fits_and_sends_the_reader_to_every_page_of_reference():
    assert len(README.splitlines()) <= 120
    for page in ("glossary", "troubleshooting", "reference_runs", "speed", "contributors"):
        assert f"(docs/{page}.md)" in README


def test_the_first_page_is_readme_seen_from_its_folder():
    text = "[00](notebooks/00.ipynb) [G](docs/g.md) [a](https://b.c) ![f](x.png)"
    page = site_pages.home(f"{site_pages.INSET}\nend", text)
    links = "[00](../notebooks/00.ipynb) [G](../docs/g.md) [a](https://b.c) ![f](../x.png)"
    assert page == f"{links}\nend"
    assert site_pages.INSET in (ROOT / "docs/index.md").read_text(encoding="utf-8")


def test_a_notebook_that_is_not_built_is_named_and_not_linked(tmp_path):
    for name in ("notebooks/src/01_a.py", "solutions/src/01_a.py", "notebooks/01_a.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    missing = site_pages.unbuilt(tmp_path)
    assert missing == {"exercises/01_a.ipynb", "solutions/01_a.ipynb"}
    text = "[a](../notebooks/01_a.ipynb), [its exercise](../exercises/01_a.ipynb)"
    assert site_pages.unlinked(text, missing) == "[a](../notebooks/01_a.ipynb), its exercise"


def test_a_page_has_no_setup_and_its_figures_have_their_texts():
    images = [{"metadata": {"image/png": {"alt": alt}}} for alt in ("A line.", "A bar.")]
    code = {"cell_type": "code", "metadata": {}, "source": ["1"], "outputs": images}
    setup = {"cell_type": "code", "metadata": {}, "source": [bn.SETUP_LINE], "outputs": []}
    prose = {"cell_type": "markdown", "metadata": {}, "source": ["# T"]}
    nb = {"cells": [prose, setup, code]}
    page = site_pages.as_page(nb, set())
    assert [cell["source"] for cell in page["cells"]] == ["# T", ["1"]]
    assert page["cells"][1]["metadata"] == {"mystnb": {"image": {"alt": "A line.\nA bar."}}}
    assert len(nb["cells"]) == 3 and code["metadata"] == {}, "the argument must not change"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Σ |x_| · y*"], [r"Σ \|x\_\| · y\*"]),
        (["a_b stays"], ["a_b stays"]),
        (["`a*b`s of `{'p': [1]}`."], [r"``a*b``\ s of ``{'p': [1]}``."]),
        ([">>> f(*x)", "a*b", "", "c*"], [">>> f(*x)", "a*b", "", r"c\*"]),
        (["so:", "", "    f(*x)", "c*"], ["so::", "", "    f(*x)", r"c\*"]),
        (["Args:", "    x: y*"], ["Args:", r"    x: y\*"]),
    ],
)
def test_docstrings_keep_their_formulas(lines, expected):
    assert site_pages.rst_safe(lines) == expected


def test_the_tools_of_the_site_need_nothing_of_the_course():
    """`.venv-site` has neither torch nor jupytext."""
    text = Path(site_pages.__file__).read_text(encoding="utf-8")
    imported = re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE)
    assert imported and set(imported) <= sys.stdlib_module_names


@pytest.mark.parametrize("name", course_figures.FIGURES)
def test_the_five_figures_are_what_the_lessons_show(name):
    path = course_figures.FOLDER / f"{name}.png"
    assert path.read_bytes() == course_figures.copies()[path]


def test_a_figure_that_is_not_one_is_refused():
    picture = {"output_type": "display_data", "data": {"image/png": "aGk="}}
    picture["metadata"] = {"image/png": {"alt": "Two lines cross."}}
    cell = bn.nbformat.v4.new_code_cell("", outputs=[bn.nbformat.from_dict(picture)])
    nb = bn.nbformat.v4.new_notebook(cells=[cell])
    assert course_figures.figure(nb, "Two lines") == b"hi"
    with pytest.raises(ValueError, match="0 figures have an alt text that begins 'Three'"):
        course_figures.figure(nb, "Three")
