"""tools/build_notebooks.py and tools/run_course.py, on a course of one tiny lesson."""

import contextlib
import re
import shutil
import sys
from pathlib import Path

import build_notebooks as bn
import nbformat
import pytest
import run_course
from IPython.core.interactiveshell import InteractiveShell
from nbformat import v4

LESSON = """\
# %% [markdown]
# # A tiny lesson
# With one sentence.

# %%
# %matplotlib inline
import os

print(os.path.basename(os.getcwd()))

# %% [markdown]
# ## A number

# %% tags=["nbval-check-output", "headline"]
print("gold", 2 + 2)

# %%
from tqdm import tqdm
from tqdm.auto import tqdm as widget_bar

for _ in tqdm(range(3)):
    pass
for _ in widget_bar(range(3)):
    pass
"""

SOLUTION = '''\
# %% [markdown]
# # Tiny exercises

# %%
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION


# %% [markdown] tags=["solution"]
# Because two is two ones.

# %% tags=["nbval-check-output"]
try:
    print(double(3))
except NotImplementedError:
    print("not attempted yet")
'''

WARNING = """\
# %% [markdown]
# # A lesson with a warning

# %%
import warnings

from tqdm import tqdm

for step in tqdm(range(3)):
    if step == 1:
        warnings.warn("look here", stacklevel=1)
"""

FAILING = """\
# %% [markdown]
# # A lesson that fails

# %% tags=["headline"]
print("before")

# %%
1 / 0
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A course that was built once; tests that change files take ``course`` instead."""
    root = tmp_path_factory.mktemp("built")
    write(root / "notebooks/src/01_tiny.py", LESSON)
    write(root / "solutions/src/01_tiny.py", SOLUTION)
    assert bn.build(root) == []
    return root


@pytest.fixture
def course(built, tmp_path):
    """A copy of the built course."""
    return Path(shutil.copytree(built, tmp_path / "course"))


def code(source, outputs=(), tags=()):
    """An executed code cell."""
    cell = v4.new_code_cell(source, execution_count=1, outputs=list(outputs))
    if tags:
        cell.metadata["tags"] = list(tags)
    return cell


def stderr(text):
    return v4.new_output("stream", name="stderr", text=text)


def image(metadata=None):
    return v4.new_output("display_data", {"image/png": "AAAA"}, metadata=metadata or {})


def notebook(*cells):
    return v4.new_notebook(cells=list(cells))


def edit(path, change):
    """Apply ``change`` to the stored notebook, as a hand edit would."""
    nb = nbformat.read(path, as_version=4)
    change(nb)
    nbformat.write(nb, path)


# --- building ------------------------------------------------------------------------------


def test_build_executes_in_the_folder_of_the_notebook_and_keeps_outputs(built):
    nb = bn.read_notebook(built / "notebooks/01_tiny.ipynb")
    assert nb.cells[1].outputs[0].text == "notebooks\n"
    assert nb.cells[3].outputs[0].text == "gold 4\n"
    assert [c.execution_count for c in nb.cells if c.cell_type == "code"] == [1, 2, 3]


def test_source_tags_and_magics_reach_the_cells(built):
    nb = bn.read_notebook(built / "notebooks/01_tiny.ipynb")
    assert nb.cells[3].metadata == {"tags": ["nbval-check-output", "headline"]}
    assert nb.cells[1].source.startswith("%matplotlib inline\n")


def test_two_builds_give_the_same_files(course):
    files = sorted(course.rglob("*.ipynb"))
    before = [file.read_text() for file in files]
    assert len(files) == 3
    assert bn.build(course, force=True) == []
    assert [file.read_text() for file in files] == before


def test_cell_ids_are_valid_and_depend_on_name_and_position_only():
    assert bn.cell_id("01_sft", 7) == "01_sft-007"
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", bn.cell_id("é " * 60, 123))
    assert bn.cell_id("01_sft", 7) != bn.cell_id("01_sft", 8) != bn.cell_id("02_rm", 8)


def test_metadata_is_normal_and_widgets_are_gone(built):
    path = built / "notebooks/01_tiny.ipynb"
    nb = bn.read_notebook(path)
    assert nb.metadata == bn.NOTEBOOK_METADATA
    assert "widget" not in "".join(str(cell.get("outputs")) for cell in nb.cells)
    assert nb.cells[4].outputs == []  # two progress bars, one of them a widget


def test_canonical_drops_widgets_versions_and_timing():
    cell = code("1")
    cell.metadata = {"execution": {"iopub.status.busy": "now"}, "lines_to_next_cell": 2}
    nb = notebook(cell)
    nb.metadata = {"widgets": {"state": {}}, "language_info": {"version": "3.11.7"}}
    clean = bn.canonical(nb, "x")
    assert clean.metadata == bn.NOTEBOOK_METADATA
    assert clean.cells[0].metadata == {}
    assert "widgets" in nb.metadata, "the argument must not change"


def test_build_skips_what_is_in_sync_and_forces_on_request(course, capsys):
    bn.build(course, ["01"])
    assert "notebooks/01_tiny.ipynb is in sync" in capsys.readouterr().out
    write(course / "solutions/src/01_tiny.py", SOLUTION.replace("print(double(3))", "double(3)"))
    bn.build(course)
    out = capsys.readouterr().out
    assert "notebooks/01_tiny.ipynb is in sync" in out
    assert "built solutions/01_tiny.ipynb" in out


def test_new_prose_keeps_the_outputs_and_new_code_does_not(course, capsys, monkeypatch):
    runs = []
    monkeypatch.setattr(bn, "execute", lambda nb, *arguments: runs.append(nb))
    path = course / "notebooks/01_tiny.ipynb"
    outputs = [c.get("outputs") for c in bn.read_notebook(path).cells]
    longer = LESSON.replace("With one sentence.", "With two. And another.")
    write(course / "notebooks/src/01_tiny.py", longer + "\n# %% [markdown]\n# The end.\n")
    assert bn.build(course, ["01_tiny"]) == []
    assert "only prose changed" in capsys.readouterr().out and runs == []
    cells = bn.read_notebook(path).cells
    assert [c.get("outputs") for c in cells] == [*outputs, None]
    assert "With two." in cells[0].source and cells[-1].source == "The end."
    write(course / "notebooks/src/01_tiny.py", longer.replace("2 + 2", "2 + 3"))
    bn.build(course, ["01_tiny"])
    assert len(runs) == 1


def test_a_failing_cell_is_reported_and_the_old_notebook_stays(course):
    path = course / "notebooks/01_tiny.ipynb"
    before = path.read_text()
    write(course / "notebooks/src/01_tiny.py", FAILING)
    (problem,) = bn.build(course, ["01_tiny"])
    assert "notebooks/01_tiny.ipynb: cell 2" in problem
    assert "ZeroDivisionError" in problem
    assert path.read_text() == before


def test_a_cell_that_takes_too_long_is_reported(tmp_path):
    nb = notebook(code("import time; time.sleep(60)"))
    with pytest.raises(bn.CellFailure, match="cell 0: not done after 1 s"):
        bn.execute(nb, tmp_path, timeout=1)


def test_an_unknown_name_is_an_error(course):
    with pytest.raises(bn.BuildError, match=r"'07_nothing'; there are: \['01_tiny'\]"):
        bn.build(course, ["07_nothing"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_build_begins_without_the_runs_of_others_and_gives_them_back(tmp_path, fails):
    runs = tmp_path / "runs"
    (runs / "mine").mkdir(parents=True)
    with contextlib.suppress(ZeroDivisionError), bn.cold(tmp_path):
        assert not runs.exists()
        (runs / "new").mkdir(parents=True)
        1 / (not fails)
    assert [path.name for path in runs.iterdir()] == ["mine"]


def test_an_interrupted_write_leaves_the_old_notebook(course, monkeypatch):
    path = course / "notebooks/01_tiny.ipynb"
    before = path.read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bn.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bn.write_notebook(bn.canonical(notebook(code("1")), "x"), path)
    assert path.read_text() == before


# --- the address of the course --------------------------------------------------------------

PROJECT = """\
[project]
name = "rlhf_helpers"
version = "0.1.0"
[tool.course]
repository = "{}"
"""
ADDRESS = "https://github.com/somebody/course"


def stamped(root, address):
    """The built notebook of `root`, a copy of the tiny course, after the address became this."""
    write(root / "pyproject.toml", PROJECT.format(address))
    assert bn.build(root) == []
    return bn.read_notebook(root / "notebooks/01_tiny.ipynb")


def in_colab(source, folder, monkeypatch):
    """What a set-up cell asks pip for when it runs in `folder`, as in Colab."""
    asked = []
    shell = InteractiveShell()
    shell.register_magic_function(asked.append, magic_name="pip")
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.chdir(folder)
    shell.run_cell(source).raise_error()
    return asked


def test_without_an_address_no_notebook_names_one(course):
    nb = stamped(course, "")
    texts = [path.read_text() for path in sorted(course.glob("*/*.ipynb"))]
    assert len(texts) == 3
    assert not any("http" in text or "badge" in text for text in texts)
    assert "pip install" in nb.cells[1].source


def test_with_an_address_badge_and_setup_name_it(course):
    nb = stamped(course, ADDRESS)
    colab = "https://colab.research.google.com/github/somebody/course/blob/v0.1.0"
    assert f"({colab}/notebooks/01_tiny.ipynb)" in nb.cells[0].source
    assert f'"rlhf_helpers @ git+{ADDRESS}@v0.1.0"' in nb.cells[1].source
    exercise = bn.read_notebook(course / "exercises/01_tiny.ipynb")
    assert f"({colab}/exercises/01_tiny.ipynb)" in exercise.cells[0].source


def test_another_address_keeps_the_outputs(course, monkeypatch):
    before = stamped(course, "")
    monkeypatch.setattr(bn, "execute", lambda *arguments: pytest.fail("executed"))
    after = stamped(course, ADDRESS)
    assert before.cells[1].source != after.cells[1].source
    assert [c.get("outputs") for c in after.cells] == [c.get("outputs") for c in before.cells]
    assert bn.check_sync(course) == []


@pytest.mark.parametrize(
    "address", ["http://github.com/a/b", "https://github.com/a", f"{ADDRESS}/", "a/b"]
)
def test_an_address_that_colab_cannot_open_is_refused(course, address):
    write(course / "pyproject.toml", PROJECT.format(address))
    with pytest.raises(bn.BuildError, match=re.escape(repr(address))):
        bn.read_source(course / "notebooks/src/01_tiny.py")


def test_setup_with_an_address_installs_from_it(course, tmp_path, monkeypatch):
    source = stamped(course, ADDRESS).cells[1].source
    asked = in_colab(source, tmp_path, monkeypatch)
    assert asked == [f'install --quiet "rlhf_helpers @ git+{ADDRESS}@v0.1.0"']


def test_setup_without_an_address_installs_the_uploaded_wheel(course, tmp_path, monkeypatch):
    source = stamped(course, "").cells[1].source
    wheel = write(tmp_path / "my files" / "rlhf_helpers-0.1.0-py3-none-any.whl", "")
    asked = in_colab(source, wheel.parent, monkeypatch)
    assert asked == [f'install --quiet "{wheel.name}"']


def test_setup_without_address_and_wheel_says_what_to_do(course, tmp_path, monkeypatch):
    source = stamped(course, "").cells[1].source
    with pytest.raises(SystemExit, match=r"Upload rlhf_helpers-\*.whl.*or set the address"):
        in_colab(source, tmp_path, monkeypatch)


# --- stderr --------------------------------------------------------------------------------

BAR = "\r  0%|          | 0/2 [00:00<?, ?it/s]\rstep:  50%|#####     | 1/2 [00:01<00:01, loss=0.3]"


@pytest.mark.parametrize(
    "text",
    [
        BAR,
        BAR + "\n",
        "\r0it [00:00, ?it/s]\r12it [00:01, 9.8it/s]\n",
        BAR + "\n\r in: 5%|# | 1/20 [00:00<?]\x1b[A",
    ],
)
def test_progress_bars_are_dropped(text):
    assert bn.clean_outputs([stderr(text)]) == []


def test_a_bar_that_comes_in_pieces_is_dropped():
    pieces = [
        stderr("\r 50%|##"),
        v4.new_output("stream", text="loss\n"),
        stderr("  | 1/2 [00:01]"),
    ]
    assert [o.text for o in bn.clean_outputs(pieces)] == ["loss\n"]


@pytest.mark.parametrize("text", ["{}UserWarning: x\n", "UserWarning: x\n{}", "{}\nUserWarning: x"])
def test_warnings_between_bars_are_kept(text):
    (output,) = bn.clean_outputs([stderr(text.format(BAR))])
    assert output.text.strip() == "UserWarning: x"


def test_a_warning_during_a_real_bar_is_kept_and_reported(tmp_path):
    write(tmp_path / "notebooks/src/01_warning.py", WARNING)
    (problem,) = [p for p in bn.build(tmp_path) if "stderr" in p]
    assert "cell 1: has a warning on stderr" in problem
    nb = bn.read_notebook(tmp_path / "notebooks/01_warning.ipynb")
    text = "".join(o.text for o in nb.cells[1].outputs)
    assert "look here" in text and "it/s" not in text
    assert any("stderr" in p for p in bn.check_sync(tmp_path))


# --- exercises -----------------------------------------------------------------------------


def test_exercise_has_stubs_no_outputs_no_answers_and_the_ids_of_the_solution(built):
    exercise = bn.read_notebook(built / "exercises/01_tiny.ipynb")
    solution = bn.read_notebook(built / "solutions/01_tiny.ipynb")
    assert exercise.cells[1].source == (
        'def double(x):\n    """Twice x."""\n    # Your code here.\n    raise NotImplementedError'
    )
    assert exercise.cells[2].source == "*Your answer here.*"
    assert [c.id for c in exercise.cells] == [c.id for c in solution.cells]
    assert all(c.outputs == [] for c in exercise.cells if c.cell_type == "code")
    assert all("tags" not in c.metadata for c in exercise.cells)
    assert "SOLUTION" not in (built / "exercises/01_tiny.ipynb").read_text()
    assert "### BEGIN SOLUTION" in solution.cells[1].source
    assert solution.cells[3].outputs[0].text == "6\n"


def test_an_exercise_runs_unattempted(built, tmp_path):
    exercise = bn.read_notebook(built / "exercises/01_tiny.ipynb")
    bn.execute(exercise, tmp_path)
    assert exercise.cells[3].outputs[0].text == "not attempted yet\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "def f(xs):\n    for x in xs:\n        ### BEGIN SOLUTION\n        use(x)\n"
            "        ### END SOLUTION\n    return xs",
            "def f(xs):\n    for x in xs:\n        # Your code here.\n"
            "        raise NotImplementedError\n    return xs",
        ),
        (
            "class A:\n    def f(\n        self,\n    ) -> int:\n        ### BEGIN SOLUTION\n"
            "        # one\n        return 1\n        ### END SOLUTION",
            "class A:\n    def f(\n        self,\n    ) -> int:\n        # Your code here.\n"
            "        raise NotImplementedError",
        ),
        (
            "for x in [1]:\n    ### BEGIN SOLUTION\n    print(x)\n    ### END SOLUTION",
            "for x in [1]:\n    # Your code here.\n    ...",
        ),
        (
            "%pip list\n### BEGIN SOLUTION\ndef f():\n    return 1\n### END SOLUTION",
            "%pip list\n# Your code here.\n...",
        ),
        (
            "### BEGIN SOLUTION\na = 1\n### END SOLUTION\nb = 2\n### BEGIN SOLUTION\nc = 3\n"
            "### END SOLUTION",
            "# Your code here.\n...\nb = 2\n# Your code here.\n...",
        ),
    ],
    ids=["loop in function", "method", "loop at top level", "whole function", "two blocks"],
)
def test_cut_solutions(source, expected):
    assert bn.cut_solutions(source) == expected


def test_a_solution_that_is_not_python_is_an_error():
    broken = "### BEGIN SOLUTION\ndef f(:\n### END SOLUTION"
    with pytest.raises(bn.BuildError, match="cell 1 is not valid Python"):
        bn.make_exercise(notebook(code("1"), code(broken)))


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        (["# %%", bn.BEGIN, "x = 1"], 2, "has no"),
        (["# %%", "x = 1", bn.END], 3, "without a"),
        (["# %%", bn.BEGIN, bn.BEGIN, bn.END], 2, "has no"),
        (["# %%", bn.BEGIN, "# %%", bn.END], 2, "has no"),
        (["# %%", "## BEGIN SOLUTION", "x = 1", bn.END], 2, "write the marker as"),
        (["# %%", bn.BEGIN, "x = 1", "### end solution"], 4, "write the marker as"),
    ],
)
def test_marker_errors_name_file_and_line(tmp_path, lines, line, message):
    source = write(tmp_path / "solutions/src/01_x.py", "\n".join(lines))
    with pytest.raises(bn.BuildError, match=rf"01_x\.py:{line}: .*{message}"):
        bn.read_source(source)


# --- check-sync ----------------------------------------------------------------------------


def test_a_fresh_build_is_in_sync(course, capsys):
    assert bn.check_sync(course) == []
    assert bn.main(["check-sync"], course) == 0


EDITS = {
    "source": (lambda nb: nb.cells[3].update(source="print(5)"), "cell 3: .* in source"),
    "id": (lambda nb: nb.cells[3].update(id="other"), "cell 3: .* in id"),
    "tags": (lambda nb: nb.cells[3].metadata.update(tags=["x"]), "cell 3: .* in metadata"),
    "type": (lambda nb: nb.cells.__setitem__(0, code("1")), "cell 0: .* in cell_type"),
    "one cell less": (lambda nb: nb.cells.pop(), "has 4 cells, its source gives 5"),
    "widgets": (lambda nb: nb.metadata.update(widgets={}), "notebook metadata differs"),
    "not executed": (lambda nb: nb.cells[1].update(execution_count=None), "was not executed"),
    "error": (
        lambda nb: nb.cells[1].outputs.append(v4.new_output("error", ename="KeyError")),
        r"has an error output \(KeyError\)",
    ),
    "warning": (lambda nb: nb.cells[1].outputs.append(stderr("careful")), "stderr: careful"),
    "bar": (lambda nb: nb.cells[1].outputs.append(stderr(BAR)), "keeps a progress bar"),
    "path": (
        lambda nb: nb.cells[1].outputs.append(v4.new_output("stream", text="in /home/me/x")),
        "absolute path in its output: /home/me",
    ),
    "no output": (lambda nb: nb.cells[3].update(outputs=[]), "has no output to compare"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_notebook_is_reported(course, kind):
    change, message = EDITS[kind]
    edit(course / "notebooks/01_tiny.ipynb", change)
    problems = bn.check_sync(course)
    assert any(re.search(f"^notebooks/01_tiny.ipynb: .*{message}", p) for p in problems), problems


def test_an_edited_source_is_reported_for_notebook_and_exercise(course):
    write(course / "solutions/src/01_tiny.py", SOLUTION.replace("Twice x.", "Two x."))
    assert bn.check_sync(course) == [
        "solutions/01_tiny.ipynb: cell 1: differs from src/ in source",
        "exercises/01_tiny.ipynb: is not what its solution generates",
    ]


def test_a_run_exercise_is_reported(course):
    edit(course / "exercises/01_tiny.ipynb", lambda nb: nb.cells[1].update(execution_count=1))
    (problem,) = bn.check_sync(course)
    assert problem == "exercises/01_tiny.ipynb: is not what its solution generates"


@pytest.mark.parametrize("folder", ["notebooks", "solutions", "exercises"])
def test_a_missing_notebook_is_reported(course, folder):
    (course / folder / "01_tiny.ipynb").unlink()
    assert bn.check_sync(course) == [f"{folder}/01_tiny.ipynb: is missing"]


@pytest.mark.parametrize("folder", ["notebooks", "solutions", "exercises"])
def test_a_notebook_without_source_is_reported(course, folder):
    shutil.copy(course / folder / "01_tiny.ipynb", course / folder / "99_old.ipynb")
    (problem,) = bn.check_sync(course)
    assert problem.startswith(f"{folder}/99_old.ipynb: has no source")


def test_a_truncated_notebook_is_reported(course):
    path = course / "notebooks/01_tiny.ipynb"
    path.write_text(path.read_text()[:100])
    (problem,) = bn.check_sync(course)
    assert "01_tiny.ipynb is not a readable notebook" in problem


def test_check_sync_exits_with_the_list_and_a_remedy(course, capsys):
    (course / "exercises/01_tiny.ipynb").unlink()
    assert bn.main(["check-sync"], course) == 1
    err = capsys.readouterr().err
    assert "exercises/01_tiny.ipynb: is missing" in err
    assert "make build" in err


def test_a_tag_for_an_expected_error_needs_the_error():
    error = v4.new_output("error", ename="ValueError")
    assert bn.cell_problems(code("f()", [error], ["raises-exception"])) == []
    (problem,) = bn.cell_problems(code("f()", [], ["raises-exception"]))
    assert "raises nothing" in problem


@pytest.mark.parametrize(
    "text", ["/root/a", "x=/tmp/a", "file:///home/me", "'/work/x'", "/Users/me", r"C:\Users\me"]
)
def test_absolute_paths_are_found(text):
    assert bn.ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize("text", ["runs/tmp/a", "https://a.org/home/x", "~/work/x", "at home/work"])
def test_other_paths_are_not(text):
    assert not bn.ABSOLUTE_PATH.search(text)


# --- style ---------------------------------------------------------------------------------

TITLE = v4.new_markdown_cell("# Title")
PROSE = v4.new_markdown_cell("Some words.")


def test_a_good_notebook_has_no_faults():
    nb = notebook(TITLE, v4.new_markdown_cell("## Part\n### Detail\n## Part"), code("1"))
    style = bn.style_report(nb)
    assert (style.failures, style.warnings) == ([], [])
    assert (style.prose_to_code, style.median_lines, style.longest_lines) == (2, 1, 1)


FAULTS = {
    "no title": ([PROSE, code("1")], "does not start with the title"),
    "code first": ([code("1"), TITLE], "does not start with the title"),
    "empty": ([], "does not start with the title"),
    "jump": ([TITLE, v4.new_markdown_cell("### Deep")], "cell 1: heading jumps .* ### Deep"),
    "long cell": ([TITLE, code("1"), code("1"), code("1\n" * 31)], "longest code cell has 31"),
    "median": ([TITLE, code("1\n" * 11)], "median code cell has 11"),
    "no alt": ([TITLE, code("plot()", [image()])], "cell 1: a figure has no alt"),
    "empty alt": ([TITLE, code("plots.show(fig, alt='')", [image()])], "no alt text"),
    "path in source": ([TITLE, code("open('/tmp/x')")], "cell 1: absolute path: /tmp/x"),
    "path in prose": ([TITLE, v4.new_markdown_cell("see /home/me")], "absolute path: /home/me"),
    "path in output": (
        [TITLE, code("1", [v4.new_output("execute_result", {"text/plain": "/root/x"})])],
        "absolute path: /root/x",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_style_finds_each_fault(kind):
    cells, message = FAULTS[kind]
    failures = bn.style_report(notebook(*cells)).failures
    assert any(re.search(message, failure) for failure in failures), failures


@pytest.mark.parametrize(
    "cell",
    [
        code("plots.show(fig, alt='gold rises')", [image()]),
        code("%matplotlib inline\nshow(fig, alt=f'{x}')", [image()]),
        code("plot()", [image({"alt": "gold rises"})]),
        code("plot()", [image({"image/png": {"alt": "gold rises"}})]),
    ],
)
def test_alt_text_is_seen(cell):
    assert bn.style_report(notebook(TITLE, cell)).failures == []


def test_headings_in_code_fences_do_not_count():
    fence = v4.new_markdown_cell("```bash\n#### a comment\n```")
    assert bn.style_report(notebook(TITLE, fence)).failures == []


def test_rhythm_is_a_warning():
    style = bn.style_report(notebook(TITLE, code("1"), code("2"), code("3")))
    assert style.failures == []
    assert [w.split(";")[0] for w in style.warnings] == [
        "0.3 prose cells to a code cell",
        "3 code cells in a row",
    ]


def test_style_command_fails_on_failures_only(course, capsys):
    assert bn.main(["style"], course) == 0
    assert re.search(r"notebooks/01_tiny.ipynb +0.7 +", capsys.readouterr().out)
    edit(course / "notebooks/01_tiny.ipynb", lambda nb: nb.cells.pop(0))
    assert bn.main(["style"], course) == 1
    assert "does not start with the title" in capsys.readouterr().err


# --- run_course ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(built, tmp_path_factory):
    """A course whose first lesson fails; the second is well."""
    root = Path(shutil.copytree(built, tmp_path_factory.mktemp("ran") / "course"))
    failing = bn.read_source(write(root / "notebooks/src/00_failing.py", FAILING))
    bn.write_notebook(failing, root / "notebooks/00_failing.ipynb")
    return root


def test_course_goes_on_after_a_failure_and_says_what_failed(ran, capsys):
    before = {p: p.read_bytes() for p in (ran / "notebooks").glob("*.ipynb")}
    assert run_course.main([], ran) == 1
    out = capsys.readouterr().out
    assert "1 / 0" in out and "ZeroDivisionError: division by zero" in out
    assert re.search(r"^00_failing +\d\.\d  error in cell 2  before$", out, re.MULTILINE)
    assert re.search(r"^01_tiny +\d\.\d  ok +gold 4$", out, re.MULTILINE)
    assert re.search(r"^total +\d\.\d  1 of 2 ok$", out.splitlines()[-1])
    assert {p: p.read_bytes() for p in (ran / "notebooks").glob("*.ipynb")} == before
    executed = bn.read_notebook(ran / "runs/course/01_tiny.ipynb")
    assert executed.cells[3].outputs[0].text == "gold 4\n"


def test_course_of_chosen_lessons(ran, capsys):
    assert run_course.main(["01"], ran) == 0
    captured = capsys.readouterr()
    assert "00_failing" not in captured.out
    assert "01_tiny: 100%" in captured.err and "5/5" in captured.err


def test_course_names_the_cells_that_took_longest(ran, capsys):
    slow = "# %% [markdown]\n# # Slow\n\n# %%\n# wait\nimport time\n\ntime.sleep(1)\n"
    nb = bn.read_source(write(ran / "solutions/src/02_slow.py", slow))
    bn.write_notebook(nb, ran / "solutions/02_slow.ipynb")
    assert run_course.main(["--folders", "solutions", "--cells", "1"], ran) == 0
    *_, first, rest = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +1\.\d s  solutions/02_slow, cell 1: import time", first)
    assert re.fullmatch(r" +[\d.]+ s  all other cells, of [\d.]+ s in all", rest)
    assert (ran / "runs/course/solutions/02_slow.ipynb").is_file()


def test_course_without_lessons_or_with_unknown_ones_is_an_error(tmp_path, ran, capsys):
    assert run_course.main([], tmp_path) == 1
    assert run_course.main(["07"], ran) == 1
    err = capsys.readouterr().err
    assert "no notebooks in notebooks" in err and "no notebook is called '07'" in err


def test_headlines_are_text_not_figures():
    outputs = [
        v4.new_output("stream", text="gold 1.2\n"),
        v4.new_output("execute_result", {"text/plain": "0.9"}),
        v4.new_output("display_data", {"image/png": "AA", "text/plain": "<Figure>"}),
        stderr("careful"),
    ]
    nb = notebook(code("f()", outputs, ["headline"]), code("g()", outputs[:1]))
    assert run_course.headline(nb) == "gold 1.2\n0.9"


def test_table_keeps_several_headline_lines_in_their_column():
    outcomes = [run_course.Outcome("01_sft", 1.25, "a 1\nb 2"), run_course.Outcome("02", 2.5, "")]
    lines = run_course.table(outcomes).splitlines()
    assert lines[2].index("a 1") == lines[3].index("b 2")
    assert lines[-1].split() == ["total", "3.8", "2", "of", "2", "ok"]
