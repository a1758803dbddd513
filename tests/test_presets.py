"""Presets: what is chosen, what can be overridden, what is refused."""

import doctest
import subprocess
import sys

import pytest

from rlhf_helpers import presets
from rlhf_helpers.presets import load_preset


def test_docstring_examples():
    result = doctest.testmod(presets)
    assert result.attempted > 0
    assert result.failed == 0


def test_pocket_is_the_default_and_is_offline():
    preset = load_preset()
    assert preset.name == "pocket"
    assert preset.offline
    assert preset.data is None


def test_environment_goes_before_the_name(monkeypatch):
    monkeypatch.setenv("RLHF_PRESET", "single_gpu")
    assert load_preset("pocket").name == "single_gpu"


def test_overrides_reach_every_field(tmp_path):
    preset = load_preset("single_gpu", model=str(tmp_path), device="cpu", seed=7)
    assert (preset.offline, preset.device, preset.seed) == (True, "cpu", 7)


@pytest.mark.parametrize("name", ["pockt", "POCKET"])
def test_an_unknown_preset_is_named(name):
    with pytest.raises(ValueError, match=f"preset is '{name}'; choose one of pocket, single_gpu"):
        load_preset(name)


def test_a_mistyped_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("RLHF_PRESET", "singlegpu")
    with pytest.raises(ValueError, match="environment variable RLHF_PRESET is 'singlegpu'"):
        load_preset("pocket")


def test_an_unknown_field_is_named():
    with pytest.raises(TypeError, match="no field 'respons_length'; it has .*response_length"):
        load_preset(respons_length=3)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="prompt_length is 0"):
        load_preset(prompt_length=0)
    with pytest.raises(ValueError, match="response_length is 2.5"):
        load_preset(response_length=2.5)
    with pytest.raises(ValueError, match="device is 'gpu'; choose cpu or cuda"):
        load_preset(device="gpu")
    with pytest.raises(ValueError, match="compute_dtype is 'int8'"):
        load_preset(compute_dtype="int8")


def test_importing_the_package_loads_nothing_heavy():
    code = "import rlhf_helpers, sys; print([m for m in ('torch', 'datasets') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
