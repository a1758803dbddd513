"""Run all lessons, without a browser, and print what each one found.

    python tools/run_course.py                        # all lessons
    python tools/run_course.py 04 05 --cells 10       # two, and which of their cells take longest
    python tools/run_course.py --folders exercises solutions --cells 10

The notebooks stay as they are; the executed copies go to ``runs/course/``. A lesson that fails
does not stop the ones after it. Exit status 1 if any failed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from build_notebooks import (
    CELL_TIMEOUT,
    ROOT,
    BuildError,
    CellFailure,
    canonical,
    chosen,
    execute,
    follow,
    read_notebook,
    strip_outputs,
    tags,
    write_notebook,
)
from nbformat import NotebookNode
from tqdm import tqdm

FOLDERS = ("notebooks", "exercises", "solutions")


@dataclass(frozen=True)
class Outcome:
    """How one lesson went."""

    lesson: str
    minutes: float
    headline: str
    failure: CellFailure | None = None
    failing_source: str = ""
    cells: tuple[tuple[float, int, str], ...] = ()  # seconds, number, source of those that ran

    @property
    def result(self) -> str:
        """ "ok", or where it failed."""
        return f"error in cell {self.failure.index}" if self.failure else "ok"


def find_lessons(
    root: Path, names: Sequence[str], folders: Sequence[str] = ("notebooks",)
) -> list[Path]:
    """The notebooks to run, in order."""
    paths = [path for folder in folders for path in sorted((root / folder).glob("*.ipynb"))]
    if not paths:
        raise BuildError(f"there are no notebooks in {', '.join(folders)}; run `make build` first")
    stems = chosen(paths, names)
    return [path for path in paths if path.stem in stems]


def title(path: Path) -> str:
    """``01_sft`` for a lesson, ``exercises/01_sft`` for another notebook."""
    folder = path.parent.name
    return path.stem if folder == "notebooks" else f"{folder}/{path.stem}"


def run_lesson(
    path: Path, copy_to: Path, timeout: int, on_cell: Callable[[int], object]
) -> Outcome:
    """Execute one lesson in its own folder, and keep the executed copy, failed or not."""
    nb = strip_outputs(read_notebook(path))
    start, failure = time.perf_counter(), None
    try:
        execute(nb, path.parent, timeout, on_cell)
    except CellFailure as error:
        failure = error
    minutes = (time.perf_counter() - start) / 60
    write_notebook(canonical(nb, path.stem), copy_to)
    source = nb.cells[failure.index].source if failure else ""
    return Outcome(title(path), minutes, headline(nb), failure, source, timed(nb))


def timed(nb: NotebookNode) -> tuple[tuple[float, int, str], ...]:
    """Seconds, number and source of the cells that ran through, by the kernel's own messages."""
    found = []
    for index, cell in enumerate(nb.cells):
        times = cell.metadata.get("execution", {})
        if "shell.execute_reply" in times:
            since, until = (
                datetime.fromisoformat(times[name].replace("Z", "+00:00"))
                for name in ("iopub.execute_input", "shell.execute_reply")
            )
            found.append(((until - since).total_seconds(), index, cell.source))
    return tuple(found)


def headline(nb: NotebookNode) -> str:
    """What the cells tagged ``headline`` printed."""
    outputs = [o for c in nb.cells if "headline" in tags(c) for o in c.get("outputs", [])]
    return "\n".join(filter(None, (printed(output).strip() for output in outputs)))


def printed(output: NotebookNode) -> str:
    """The text of an output as a reader sees it; "" for a figure or an error."""
    data = output.get("data", {})
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    return "" if "image/png" in data else data.get("text/plain", "")


def run_course(
    root: Path, names: Sequence[str], timeout: int, folders: Sequence[str] = ("notebooks",)
) -> list[Outcome]:
    """Run the lessons one after the other, under one progress bar over all their cells."""
    outcomes = []
    lessons = find_lessons(root, names, folders)
    sizes = [len(read_notebook(path).cells) for path in lessons]
    with tqdm(total=sum(sizes), unit="cell") as bar:
        for number, path in enumerate(lessons):
            before = sum(sizes[:number])
            bar.set_description(title(path))
            copy_to = root / "runs" / "course" / f"{title(path)}.ipynb"
            move = follow(bar, before)
            outcomes.append(run_lesson(path, copy_to, timeout, move))
            move(sizes[number])
    return outcomes


def failure_report(outcome: Outcome) -> str:
    """The cell that failed and the end of its traceback."""
    rule = "-" * 72
    parts = [f"{outcome.lesson}: {outcome.result}", rule, outcome.failing_source, rule]
    return "\n".join([*parts, outcome.failure.reason, ""])


def table(outcomes: Sequence[Outcome]) -> str:
    """The closing table; a headline of several lines stays in its column."""
    rows = [("lesson", "minutes", "result", "headline numbers")]
    for o in outcomes:
        first, *more = o.headline.splitlines() or [""]
        rows.append((o.lesson, f"{o.minutes:.1f}", o.result, first))
        rows += [("", "", "", line) for line in more]
    ok = sum(o.failure is None for o in outcomes)
    minutes = sum(o.minutes for o in outcomes)
    rows.append(("total", f"{minutes:.1f}", f"{ok} of {len(outcomes)} ok", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def dearest(outcomes: Sequence[Outcome], count: int) -> str:
    """The cells that took longest, of all notebooks that ran, with their first lines of code."""
    cells = [(seconds, o.lesson, i, code) for o in outcomes for seconds, i, code in o.cells]
    lines = []
    for seconds, lesson, index, source in sorted(cells, reverse=True)[:count]:
        code = [line for line in source.splitlines() if line and line[0] not in "#%"]
        lines.append(f"{seconds:6.1f} s  {lesson}, cell {index}: {''.join(code[:1]):.70}")
    total, left = sum(cell[0] for cell in cells), sum(sorted(cell[0] for cell in cells)[:-count])
    return "\n".join([*lines, f"{left:6.1f} s  all other cells, of {total:.1f} s in all"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("names", nargs="*", help="such as 01_sft or 01; all if none")
    result.add_argument("--folders", nargs="+", default=["notebooks"], choices=FOLDERS)
    result.add_argument("--cells", type=int, default=0, help="how many of the dearest to list")
    result.add_argument("--timeout", type=int, default=CELL_TIMEOUT, help="seconds for a cell")
    return result


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the course; 0 if every lesson ran through."""
    options = parser().parse_args(arguments)
    try:
        outcomes = run_course(root, options.names, options.timeout, options.folders)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    failed = [outcome for outcome in outcomes if outcome.failure]
    for outcome in failed:
        print(failure_report(outcome))
    print(table(outcomes))
    if options.cells > 0:
        print(dearest(outcomes, options.cells))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
