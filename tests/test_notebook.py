"""What a notebook does first."""

import matplotlib as mpl
import pytest
from IPython.core.interactiveshell import InteractiveShell

from rlhf_helpers import notebook
from rlhf_helpers.presets import load_preset

SKIPPED = "# Pocket only: it needs the rubric\nfound = 1"


@pytest.fixture
def shell(monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr("builtins.get_ipython", lambda: shell, raising=False)
    return shell


def gpu_preset():
    return load_preset("single_gpu", device="cpu", compute_dtype="float32")


def test_versions_device_and_preset_are_printed_and_the_style_is_set(capsys, pocket):
    mpl.rcdefaults()
    before = mpl.rcParams["axes.prop_cycle"]
    notebook.start(pocket)
    printed = capsys.readouterr().out
    assert "torch 2" in printed and "preset pocket, on CPU" in printed
    assert mpl.rcParams["axes.prop_cycle"] != before


def test_in_the_pocket_world_every_cell_runs(shell, pocket):
    notebook.start(pocket)
    shell.run_cell(SKIPPED)
    assert shell.user_ns["found"] == 1


def test_elsewhere_a_pocket_cell_says_that_it_does_nothing(shell, capsys):
    notebook.start(gpu_preset())
    assert shell.run_cell(SKIPPED).success
    assert "found" not in shell.user_ns
    assert "this cell does nothing with the preset 'single_gpu'" in capsys.readouterr().out
    shell.run_cell("other = 2  # Pocket only")
    assert shell.user_ns["other"] == 2


def test_the_last_preset_counts(shell, pocket):
    notebook.start(gpu_preset())
    notebook.start(pocket)
    shell.run_cell(SKIPPED)
    assert shell.user_ns["found"] == 1
