"""Build the course's notebooks from their text sources, one way: text to notebook.

    notebooks/src/NN_name.py  ->  notebooks/NN_name.ipynb   executed, outputs kept
    solutions/src/NN_name.py  ->  solutions/NN_name.ipynb   executed, outputs kept
                              ->  exercises/NN_name.ipynb   solutions cut out, no outputs

Sources are py:percent text. Edit a source, run ``python tools/build_notebooks.py build``, and
commit both files. ``check-sync`` fails where a notebook is not what its source gives, and
``style`` measures the rhythm of the lessons. Neither of the two runs a cell.
"""

import argparse
import ast
import copy
import os
import re
import shutil
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

COLAB = "https://colab.research.google.com"
SETUP_LINE = "# In Colab this installs the course; elsewhere it does nothing."
# Colab keeps its own torch: the package asks for no version of it.
SETUP = """\
import sys

if "google.colab" in sys.modules:
    %pip install --quiet "{name} @ git+{address}@{tag}\""""
# While the course has no address, from a wheel that the learner uploads.
SETUP_FROM_WHEEL = """\
import sys
from glob import glob

if "google.colab" in sys.modules:
    wheels = glob("{name}-*.whl") or sys.exit(
        "Upload {name}-*.whl, which `make wheel` writes, beside this notebook, or set "
        "the address of your copy of the course in pyproject.toml and run `make build`."
    )
    %pip install --quiet "{{max(wheels)}}\""""
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")
ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT = 600  # seconds
REMEDY = "Remedy: edit the source under src/, then run `make build` and commit both files."

NOTEBOOK_METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
# What jupytext and Jupyter note about a cell; it says nothing to a reader.
TRANSIENT_METADATA = {
    "lines_to_next_cell",
    "lines_to_end_of_cell_marker",
    "execution",
    "collapsed",
    "scrolled",
}
# An exercise has no outputs to compare and no results to report.
SOLUTION_ONLY_TAGS = {"solution", "nbval-check-output", "headline"}

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
ANY_MARKER = re.compile(r"^[\s#]*#[\s#]*(BEGIN|END)\s+SOLUTION", re.IGNORECASE)
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
# tqdm starts each state of a bar with \r: "50%|##  | 1/2 [00:01<00:01]" or "3it [00:01, 2it/s]".
PROGRESS_BAR = re.compile(
    r"\r[^\r\n]*?(\d+%\|[^|\r\n]*\||\d+\S* )[^\[\r\n]*\[\d+:\d+[^\]\r\n]*\](\x1b\[A)*"
)
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.~}-])/(?:root|home|tmp|work|Users)/[\w.~-]+|\b[A-Za-z]:\\+Users\b"
)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class BuildError(Exception):
    """A source or notebook that cannot be used; the message says where and why."""


class CellFailure(Exception):
    """A cell that raised, ran out of time or took its kernel down."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"cell {index}: {reason}")
        self.index = index
        self.reason = reason


@dataclass(frozen=True)
class Target:
    """One source and the notebooks that come from it."""

    source: Path
    notebook: Path
    exercise: Path | None = None


# --- finding and reading -------------------------------------------------------------------


def targets(root: Path) -> list[Target]:
    """Every source below ``root``, lessons first, each with what it builds."""
    lessons = sorted((root / "notebooks" / "src").glob("*.py"))
    solutions = sorted((root / "solutions" / "src").glob("*.py"))
    return [Target(p, root / "notebooks" / f"{p.stem}.ipynb") for p in lessons] + [
        Target(p, root / "solutions" / f"{p.stem}.ipynb", root / "exercises" / f"{p.stem}.ipynb")
        for p in solutions
    ]


def chosen(paths: Sequence[Path], names: Iterable[str]) -> set[str]:
    """The stems among ``paths`` that ``names`` ask for: all if there are none.

    A name is a stem (``01_sft``), its number (``01``) or a path ending in it.
    """
    stems = {path.stem for path in paths}
    found = set()
    for name in names:
        matches = {s for s in stems if Path(name).stem in (s, s.split("_")[0])}
        if not matches:
            raise BuildError(f"no notebook is called {name!r}; there are: {sorted(stems)}")
        found |= matches
    return found or stems


def read_source(path: Path) -> NotebookNode:
    """The notebook that a py:percent source describes, not executed."""
    text = path.read_text(encoding="utf-8")
    check_markers(text, path)
    nb = jupytext.reads(text, fmt="py:percent")
    root = path.parents[2]
    if (root / "pyproject.toml").is_file():
        stamp(nb, root, path.parents[1].name, path.stem)
    return canonical(nb, path.stem)


def read_notebook(path: Path) -> NotebookNode:
    """A stored notebook, as version 4."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        raise BuildError(f"{path.name} is not a readable notebook: {error}") from error


def write_notebook(nb: NotebookNode, path: Path) -> None:
    """Write ``nb`` so that an interruption leaves the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(notebook_text(nb), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def notebook_text(nb: NotebookNode) -> str:
    """The text of the .ipynb file, the same for equal notebooks."""
    nbformat.validate(nb)
    return nbformat.writes(nb, version=4).rstrip("\n") + "\n"


# --- what every notebook of the course begins with ------------------------------------------


def stamp(nb: NotebookNode, root: Path, folder: str, stem: str) -> None:
    """Add Colab's badge to the title, and after it the set-up for Colab and links, in place.

    Without an address in pyproject.toml there is no badge, and the set-up takes a wheel.
    """
    with (root / "pyproject.toml").open("rb") as file:
        table = tomllib.load(file)
    project, address = table["project"], course_address(table)
    name, tag = project["name"], f"v{project['version']}"
    if address:
        page = address.replace("https://github.com", f"{COLAB}/github")
        link = f"{page}/blob/{tag}/{folder}/{stem}.ipynb"
        nb.cells[0].source += f"\n\n[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"
        setup = SETUP.format(name=name, address=address, tag=tag)
    else:
        setup = SETUP_FROM_WHEEL.format(name=name)
    links = "**Go to** " + " · ".join(neighbours(root, folder, stem))
    first = nbformat.v4.new_code_cell(f"{SETUP_LINE}\n{setup}")
    nb.cells[1:1] = [first, nbformat.v4.new_markdown_cell(links)]


def course_address(table: Mapping) -> str:
    """The address of the course's repository in the table of pyproject.toml, "" if there is none.

    Raises BuildError if it is not that of a repository on GitHub, the one host that Colab opens.
    """
    address = table.get("tool", {}).get("course", {}).get("repository", "")
    if address and not ADDRESS.fullmatch(address):
        raise BuildError(
            f"pyproject.toml: [tool.course] repository is {address!r}; give "
            "https://github.com/<owner>/<name>, with nothing after it, or leave it empty"
        )
    return address


def neighbours(root: Path, folder: str, stem: str) -> list[str]:
    """Links from a notebook to its lesson and exercise, the lessons around it, and the glossary.

    Only the exercise leads to the solution: see `make_exercise`.
    """
    lessons, solutions = (
        sorted(path.stem for path in (root / name / "src").glob("*.py"))
        for name in ("notebooks", "solutions")
    )
    places = {"the previous lesson": ("notebooks", before(lessons, stem))}
    places["the lesson"] = ("notebooks", stem)
    if stem in solutions:
        places["its exercise"] = ("exercises", stem)
    places["the next lesson"] = ("notebooks", before(lessons[::-1], stem))
    links = [
        f"[{words}](../{place}/{name}.ipynb)"
        for words, (place, name) in places.items()
        if name and (place, name) != (folder, stem)
    ]
    return [*links, "[what the logs say](../docs/glossary.md)"]


def before(names: Sequence[str], name: str) -> str | None:
    """The one in front of it in the list, None at the start.

    >>> before(["00_start", "01_sft"], "01_sft")
    '00_start'
    """
    index = names.index(name)
    return names[index - 1] if index else None


# --- normal form ---------------------------------------------------------------------------


def cell_id(name: str, position: int) -> str:
    """An id that depends on nothing but the notebook's name and the cell's position."""
    slug = re.sub(r"[^a-zA-Z0-9_-]", "-", name)[:56]
    return f"{slug}-{position:03d}"


def canonical(nb: NotebookNode, name: str) -> NotebookNode:
    """A copy with stable ids and only the metadata that a reader needs."""
    nb = copy.deepcopy(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    for position, cell in enumerate(nb.cells):
        cell.id = cell_id(name, position)
        for key in TRANSIENT_METADATA & set(cell.metadata):
            del cell.metadata[key]
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs)
    return nb


def clean_outputs(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs with streams joined, and without progress bars and live widgets."""
    kept = []
    for output in join_streams(outputs):
        if output.get("name") == "stderr":
            output.text = strip_progress(output.text)
            if not output.text:
                continue
        if WIDGET_VIEW not in output.get("data", {}):
            kept.append(output)
    return join_streams(kept)  # what lay between two may have gone


def join_streams(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Pieces of stderr as one output, and of stdout where nothing else lies between them."""
    joined: list[NotebookNode] = []
    for output in copy.deepcopy(list(outputs)):
        name = output.get("name")
        candidates = joined if name == "stderr" else joined[-1:]
        earlier = [o for o in candidates if name and o.get("name") == name]
        if earlier:
            earlier[0].text += output.text
        else:
            joined.append(output)
    return joined


def strip_progress(text: str) -> str:
    """``text`` without tqdm's bars; "" if only they were there. Warnings stay.

    >>> strip_progress("\\r 50%|##   | 1/2 [00:01<00:01]UserWarning: x")
    'UserWarning: x'
    """
    rest = PROGRESS_BAR.sub("", text)
    return rest.replace("\r", "") if rest.strip() else ""


def strip_outputs(nb: NotebookNode) -> NotebookNode:
    """A copy as if it had never run."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def tags(cell: NotebookNode) -> list[str]:
    """The cell's tags."""
    return cell.metadata.get("tags", [])


# --- executing -----------------------------------------------------------------------------


def execute(
    nb: NotebookNode,
    folder: Path,
    timeout: int = CELL_TIMEOUT,
    on_cell: Callable[[int], object] = lambda index: None,
) -> None:
    """Run all cells of ``nb`` in place, in ``folder``; ``on_cell`` hears where it is.

    Raises CellFailure at the first cell that fails; the outputs so far stay in ``nb``.
    """
    current = 0

    def started(cell: NotebookNode, cell_index: int) -> None:
        nonlocal current
        current = cell_index
        on_cell(cell_index)

    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # the kernel's own messages break the bar
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=started,
    )
    try:
        client.execute(env=kernel_environment())
    except CellExecutionError as error:
        raise CellFailure(current, last_lines(error.traceback)) from error
    except CellTimeoutError as error:
        raise CellFailure(current, f"not done after {timeout} s") from error
    except DeadKernelError as error:
        raise CellFailure(current, "the kernel died (out of memory?)") from error


def follow(bar: tqdm, start: int = 0) -> Callable[[int], object]:
    """A callback that moves ``bar`` to a cell of the notebook whose cells begin at ``start``."""
    return lambda index: bar.update(start + index - bar.n)


def kernel_environment() -> dict[str, str]:
    """The environment of a kernel: inline figures, and no chatter from the debugger."""
    environment = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment.pop("MPLBACKEND", None)
    return environment


def last_lines(text: str, count: int = 8) -> str:
    """The end of a traceback, without colours."""
    return "\n".join(ANSI.sub("", text).strip().splitlines()[-count:])


# --- exercises -----------------------------------------------------------------------------


def check_markers(text: str, path: Path) -> None:
    """Raise BuildError, naming file and line, unless each BEGIN has its END in the same cell."""
    opened = None
    for number, line in enumerate(text.splitlines(), start=1):
        new_cell = line.startswith("# %%")
        if opened and (new_cell or line.strip() == BEGIN):
            raise BuildError(f"{path}:{opened}: '{BEGIN}' has no '{END}' in its cell")
        if line.strip() == BEGIN:
            opened = number
        elif line.strip() == END:
            if not opened:
                raise BuildError(f"{path}:{number}: '{END}' without a '{BEGIN}' before it")
            opened = None
        elif ANY_MARKER.match(line):
            raise BuildError(f"{path}:{number}: write the marker as '{BEGIN}' or '{END}'")
    if opened:
        raise BuildError(f"{path}:{opened}: '{BEGIN}' has no '{END}' in its cell")


def make_exercise(solution: NotebookNode) -> NotebookNode:
    """The exercise of a solution: model answers and marked code cut out, no outputs.

    A markdown cell tagged ``solution`` becomes a place for the learner's answer. Cells keep their
    ids, so that a comparison of the two notebooks lines up.
    """
    nb = strip_outputs(solution)
    for cell in nb.cells[:3]:  # the stamp's links
        cell.source = cell.source.replace("/solutions/", "/exercises/")
        cell.source = cell.source.replace(
            "[its exercise](../exercises/", "[its solution](../solutions/"
        )
    for index, cell in enumerate(nb.cells):
        if "solution" in tags(cell):
            cell.source = "*Your answer here.*" if cell.cell_type == "markdown" else "..."
        elif cell.cell_type == "code" and BEGIN in cell.source:
            try:
                cell.source = cut_solutions(cell.source)
            except SyntaxError as error:
                raise BuildError(f"cell {index} is not valid Python: {error}") from error
        drop_tags(cell, SOLUTION_ONLY_TAGS)
    return nb


def drop_tags(cell: NotebookNode, unwanted: set[str]) -> None:
    """Remove ``unwanted`` from the cell's tags, in place."""
    left = [tag for tag in tags(cell) if tag not in unwanted]
    cell.metadata.pop("tags", None)
    if left:
        cell.metadata["tags"] = left


def cut_solutions(source: str) -> str:
    """``source`` with each marked block replaced by a stub.

    Inside a function the stub raises NotImplementedError, which the exercise's check reports as
    "not attempted yet"; elsewhere it is ``...``, so that the cell still runs.
    """
    functions = function_bodies(source)
    kept: list[str] = []
    block: list[int] | None = None  # numbers of the lines of code in the block being cut
    for number, line in enumerate(source.splitlines(), start=1):
        text = line.strip()
        if text == BEGIN:
            block, indent = [], line[: line.index("#")]
        elif text == END:
            inside = block and any(block[0] in body for body in functions)
            stub = "raise NotImplementedError" if inside else "..."
            kept += [f"{indent}# Your code here.", f"{indent}{stub}"]
            block = None
        elif block is None:
            kept.append(line)
        elif text and not text.startswith("#"):
            block.append(number)
    return "\n".join(kept)


def function_bodies(source: str) -> list[range]:
    """The line numbers of each function's body."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        range(node.body[0].lineno, node.end_lineno + 1)
        for node in ast.walk(parse_cell(source))
        if isinstance(node, functions)
    ]


def parse_cell(source: str) -> ast.Module:
    """The syntax tree of a cell, which may hold magics."""
    return ast.parse(TransformerManager().transform_cell(source))


# --- building ------------------------------------------------------------------------------


def build(
    root: Path, names: Sequence[str] = (), force: bool = False, timeout: int = CELL_TIMEOUT
) -> list[str]:
    """Build what is not in sync (or all, with ``force``); return what went wrong."""
    problems = []
    todo = targets(root)
    stems = chosen([t.source for t in todo], names)
    for target in (t for t in todo if t.source.stem in stems):
        label = target.notebook.relative_to(root).as_posix()
        try:
            if not force and notebook_problems(target) and rewrite_prose(target):
                print(f"{label}: only prose changed, its outputs stay")
            elif force or notebook_problems(target):
                seconds = build_notebook(target, timeout)
                print(f"built {label} in {seconds:.0f} s")
            else:
                print(f"{label} is in sync")
            build_exercise(target)
            problems += [f"{label}: {problem}" for problem in notebook_problems(target)]
        except (BuildError, CellFailure) as error:
            problems.append(f"{label}: {error}")
    return problems


def build_notebook(target: Target, timeout: int) -> float:
    """Execute the source and write its notebook; a failing cell leaves the old one in place."""
    nb, folder = read_source(target.source), target.notebook.parent
    start = time.perf_counter()
    with cold(folder), tqdm(total=len(nb.cells), desc=target.source.stem, unit="cell") as bar:
        execute(nb, folder, timeout, follow(bar))
        follow(bar)(len(nb.cells))
    write_notebook(canonical(nb, target.source.stem), target.notebook)
    return time.perf_counter() - start


@contextmanager
def cold(folder: Path) -> Iterator[None]:
    """Without what earlier notebooks left in ``folder/runs``, so that no output depends on it."""
    runs, aside = folder / "runs", folder / ".runs-of-yours"
    if runs.exists():
        runs.rename(aside)
    try:
        yield
    finally:
        shutil.rmtree(runs, ignore_errors=True)
        if aside.exists():
            aside.rename(runs)


def rewrite_prose(target: Target) -> bool:
    """Write the notebook with the outputs that it has, if no code changed and they are clean.

    The set-up for Colab counts as prose: no output depends on it.
    """
    nb = read_source(target.source)
    old = read_notebook(target.notebook) if target.notebook.exists() else nb
    new_code, old_code = ([c for c in n.cells if c.cell_type == "code"] for n in (nb, old))
    if [(what_runs(c), tags(c)) for c in new_code] != [(what_runs(c), tags(c)) for c in old_code]:
        return False
    for new, kept in zip(new_code, old_code, strict=True):
        new.outputs, new.execution_count = kept.outputs, kept.execution_count
    if output_problems(nb):
        return False
    write_notebook(nb, target.notebook)
    return True


def what_runs(cell: NotebookNode) -> str:
    """The code of a cell, as far as it runs outside Colab: the set-up does nothing there."""
    return SETUP_LINE if cell.source.startswith(SETUP_LINE) else cell.source


def build_exercise(target: Target) -> None:
    """Write the exercise of a solution, if it changed."""
    if target.exercise and exercise_problems(target):
        write_notebook(make_exercise(read_source(target.source)), target.exercise)


# --- checking ------------------------------------------------------------------------------


def check_sync(root: Path) -> list[str]:
    """What is not as the sources give it, one line per fault; nothing is executed."""
    found = []
    for target in targets(root):
        pairs = [(target.notebook, notebook_problems), (target.exercise, exercise_problems)]
        for path, problems in pairs:
            if path is None:
                continue
            label = path.relative_to(root).as_posix()
            try:
                found += [f"{label}: {problem}" for problem in problems(target)]
            except BuildError as error:
                found.append(f"{label}: {error}")
    return found + orphans(root)


def notebook_problems(target: Target) -> list[str]:
    """How a lesson or solution differs from its source, and what is wrong with its outputs."""
    expected = read_source(target.source)
    if not target.notebook.exists():
        return ["is missing"]
    try:
        actual = read_notebook(target.notebook)
    except BuildError as error:
        return [str(error)]
    return differences(expected, actual) + output_problems(actual)


def exercise_problems(target: Target) -> list[str]:
    """Whether the exercise is not exactly what its solution generates."""
    expected = notebook_text(make_exercise(read_source(target.source)))
    if not target.exercise.exists():
        return ["is missing"]
    if target.exercise.read_text(encoding="utf-8") != expected:
        return ["is not what its solution generates"]
    return []


def orphans(root: Path) -> list[str]:
    """Notebooks that no source builds."""
    built = {path for t in targets(root) for path in (t.notebook, t.exercise)}
    folders = ("notebooks", "solutions", "exercises")
    there = [path for folder in folders for path in sorted((root / folder).glob("*.ipynb"))]
    return [
        f"{path.relative_to(root).as_posix()}: has no source; delete it or restore the source"
        for path in there
        if path not in built
    ]


def differences(expected: NotebookNode, actual: NotebookNode) -> list[str]:
    """Where two notebooks differ, outputs aside."""
    found = []
    if expected.metadata != actual.metadata:
        found.append("notebook metadata differs")
    if len(expected.cells) != len(actual.cells):
        found.append(f"has {len(actual.cells)} cells, its source gives {len(expected.cells)}")
    for index, (want, got) in enumerate(zip(expected.cells, actual.cells, strict=False)):
        fields = ("cell_type", "id", "source", "metadata")
        differing = [field for field in fields if want.get(field) != got.get(field)]
        if differing:
            found.append(f"cell {index}: differs from src/ in {', '.join(differing)}")
    return found


def output_problems(nb: NotebookNode) -> list[str]:
    """What should not be in the outputs of a notebook that readers see."""
    found = []
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and cell.source.strip():
            found += [f"cell {index}: {problem}" for problem in cell_problems(cell)]
    return found


def cell_problems(cell: NotebookNode) -> list[str]:
    """What is wrong with the outputs of one code cell."""
    found = []
    if cell.execution_count is None:
        found.append("was not executed")
    errors = [o.ename for o in cell.outputs if o.output_type == "error"]
    if errors and "raises-exception" not in tags(cell):
        found.append(f"has an error output ({errors[0]})")
    if not errors and "raises-exception" in tags(cell):
        found.append("is tagged raises-exception and raises nothing")
    if "nbval-check-output" in tags(cell) and not cell.outputs:
        found.append("is tagged nbval-check-output and has no output to compare")
    clean = clean_outputs(cell.outputs)
    if clean != cell.outputs:
        found.append("keeps a progress bar, a live widget or a divided stream; build it again")
    for output in clean:
        if output.get("name") == "stderr":
            found.append(f"has a warning on stderr: {shorten(output.text)}")
    path = ABSOLUTE_PATH.search("\n".join(map(output_text, cell.outputs)))
    if path:
        found.append(f"shows an absolute path in its output: {path[0]}")
    return found


def output_text(output: NotebookNode) -> str:
    """All text of an output: a stream, a traceback, or what is not an image in its data."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [str(v) for mime, v in data.items() if mime not in ("image/png", "image/jpeg")]
    return ANSI.sub("", "\n".join(parts))


def shorten(text: str, width: int = 90) -> str:
    """The text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


# --- style ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """The rhythm of one notebook; ``failures`` must be mended, ``warnings`` considered."""

    prose_to_code: float
    median_lines: float
    longest_lines: int
    failures: list[str]
    warnings: list[str]


def style_report(nb: NotebookNode) -> Style:
    """Measure a notebook against the course's style."""
    lines = [len(what_runs(c).splitlines()) for c in nb.cells if c.cell_type == "code"]
    prose = sum(c.cell_type == "markdown" for c in nb.cells)
    ratio = prose / max(len(lines), 1)
    median, longest = statistics.median(lines or [0]), max(lines or [0])
    failures = heading_faults(nb) + figure_faults(nb) + path_faults(nb)
    if median > 10:
        failures.append(f"the median code cell has {median:g} lines; at most 10")
    if longest > 30:
        failures.append(f"the longest code cell has {longest} lines; at most 30")
    warnings = []
    if not 1.3 <= ratio <= 2.5:
        warnings.append(f"{ratio:.1f} prose cells to a code cell; about 1.3 to 2.5")
    if longest_code_run(nb) > 2:
        warnings.append(f"{longest_code_run(nb)} code cells in a row; at most 2")
    return Style(ratio, median, longest, failures, warnings)


def heading_faults(nb: NotebookNode) -> list[str]:
    """A first cell without the title, and levels that jump, as from ## to ####."""
    first = nb.cells[0] if nb.cells else None
    if not first or first.cell_type != "markdown" or not first.source.startswith("# "):
        return ["the first cell does not start with the title (# ...)"]
    found, level = [], 1
    for index, cell in enumerate(nb.cells):
        for heading in headings(cell):
            depth = len(heading) - len(heading.lstrip("#"))
            if depth > level + 1:
                found.append(f"cell {index}: heading jumps from level {level}: {heading}")
            level = depth
    return found


def headings(cell: NotebookNode) -> list[str]:
    """The headings of a markdown cell, code fences left out."""
    if cell.cell_type != "markdown":
        return []
    prose = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#{1,6} .*", prose, flags=re.MULTILINE)


def figure_faults(nb: NotebookNode) -> list[str]:
    """Figures that a screen reader cannot tell."""
    return [
        f"cell {index}: a figure has no alt text; use plots.show(fig, alt=...)"
        for index, cell in enumerate(nb.cells)
        if cell.cell_type == "code"
        and any(lacks_alt(output) for output in cell.outputs)
        and not shows_with_alt(cell.source)
    ]


def lacks_alt(output: NotebookNode) -> bool:
    """Whether the output is an image without alt text in its metadata."""
    metadata = output.get("metadata", {})
    alt = metadata.get("alt") or metadata.get("image/png", {}).get("alt")
    return "image/png" in output.get("data", {}) and not alt


def shows_with_alt(source: str) -> bool:
    """Whether the code calls ``show(..., alt=...)`` with something other than ""."""
    calls = [node for node in ast.walk(parse_cell(source)) if isinstance(node, ast.Call)]
    shows = [c for c in calls if ast.unparse(c.func).split(".")[-1] == "show"]
    given = [k.value for c in shows for k in c.keywords if k.arg == "alt"]
    return any(not isinstance(v, ast.Constant) or v.value for v in given)


def path_faults(nb: NotebookNode) -> list[str]:
    """Absolute paths in sources and outputs: they exist on one machine only."""
    found = []
    for index, cell in enumerate(nb.cells):
        texts = [cell.source, *map(output_text, cell.get("outputs", []))]
        path = ABSOLUTE_PATH.search("\n".join(texts))
        if path:
            found.append(f"cell {index}: absolute path: {path[0]}")
    return found


def longest_code_run(nb: NotebookNode) -> int:
    """How many code cells follow each other without a word between them."""
    longest = run = 0
    for cell in nb.cells:
        run = run + 1 if cell.cell_type == "code" else 0
        longest = max(longest, run)
    return longest


def check_style(root: Path) -> list[str]:
    """Print a line per lesson and solution with its warnings; return the hard failures."""
    found = []
    print(f"{'notebook':<36}{'prose:code':>11}{'median':>8}{'longest':>9}")
    for path in [t.notebook for t in targets(root) if t.notebook.exists()]:
        label = path.relative_to(root).as_posix()
        style = style_report(read_notebook(path))
        numbers = f"{style.prose_to_code:>11.1f}{style.median_lines:>8g}{style.longest_lines:>9}"
        print(f"{label:<36}{numbers}")
        for warning in style.warnings:
            print(f"    warning: {warning}")
        found += [f"{label}: {failure}" for failure in style.failures]
    return found


# --- command line --------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = result.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="execute sources and write the notebooks")
    builder.add_argument("names", nargs="*", help="such as 01_sft or 01; all if none")
    builder.add_argument("--force", action="store_true", help="also those already in sync")
    builder.add_argument("--timeout", type=int, default=CELL_TIMEOUT, help="seconds for a cell")
    commands.add_parser("check-sync", help="fail where a notebook is not what its source gives")
    commands.add_parser("style", help="measure the notebooks against the course's style")
    return result


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run one command; 0 if all is well."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "build":
            problems = build(root, options.names, options.force, options.timeout)
        elif options.command == "check-sync":
            problems = check_sync(root)
        else:
            problems = check_style(root)
    except BuildError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and options.command == "check-sync":
        print(REMEDY, file=sys.stderr)
    if not problems:
        print(f"{options.command}: all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
