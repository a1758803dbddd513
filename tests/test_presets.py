"""Presets: what is chosen, what can be overridden, what is refused."""

import doctest
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rlhf_helpers import presets
from rlhf_helpers.presets import load_preset


@pytest.fixture(autouse=True)
def _no_sources_from_environment(monkeypatch):
    for name in ("RLHF_MODEL", "RLHF_DATA", "RLHF_QUANTIZED"):
        monkeypatch.delenv(name, raising=False)


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


def test_the_environment_names_model_and_data_of_single_gpu(monkeypatch):
    monkeypatch.setenv("RLHF_MODEL", "my/model")
    monkeypatch.setenv("RLHF_DATA", "my/pairs")
    preset = load_preset("single_gpu", device="cpu")
    assert (preset.model, preset.data) == ("my/model", "my/pairs")
    preset = load_preset("single_gpu", device="cpu", model="other", data="pairs.jsonl")
    assert (preset.model, preset.data) == ("other", "pairs.jsonl")
    monkeypatch.setenv("RLHF_PRESET", "single_gpu")
    assert load_preset("pocket", device="cpu").model == "my/model"


def test_the_environment_never_moves_pocket_off_its_model(monkeypatch):
    expected = load_preset("pocket")
    monkeypatch.setenv("RLHF_MODEL", "my/model")
    monkeypatch.setenv("RLHF_DATA", "my/pairs")
    assert load_preset() == load_preset("pocket") == expected
    monkeypatch.setenv("RLHF_PRESET", "pocket")
    assert load_preset("single_gpu") == expected


def test_empty_variables_count_as_unset(monkeypatch):
    expected = load_preset("single_gpu")
    monkeypatch.setenv("RLHF_MODEL", "")
    monkeypatch.setenv("RLHF_DATA", "")
    assert load_preset("single_gpu") == expected


def test_a_revision_and_a_folder_belong_to_the_default_ids(monkeypatch):
    pinned = replace(presets.PRESETS["single_gpu"], revision="abc")
    monkeypatch.setitem(presets.PRESETS, "single_gpu", pinned)
    assert load_preset("single_gpu").revision == "abc"
    assert load_preset("single_gpu").data_dir == "helpful-base"
    assert load_preset("single_gpu", model=pinned.model).revision == "abc"
    other = load_preset("single_gpu", model="my/model", data="my/pairs")
    assert (other.revision, other.data_dir, other.data_revision) == (None, None, None)
    given = load_preset("single_gpu", model="a/b", data="c/d", revision="v2", data_dir="train")
    assert (given.revision, given.data_dir) == ("v2", "train")
    monkeypatch.setenv("RLHF_MODEL", "my/model")
    assert load_preset("single_gpu").revision is None
    assert load_preset("single_gpu").data_dir == "helpful-base"


@pytest.mark.parametrize(
    "device, capability, expected",
    [
        ("cpu", None, "float32"),
        ("cpu", (9, 0), "float32"),
        ("cuda", None, "bfloat16"),
        ("cuda", (7, 5), "float16"),
        ("cuda", (8, 0), "bfloat16"),
        ("cuda", (9, 0), "bfloat16"),
    ],
)
def test_the_dtype_follows_the_device(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert load_preset("single_gpu", device=device).compute_dtype == expected
    given = load_preset("single_gpu", device=device, compute_dtype="float16")
    assert given.compute_dtype == "float16"


def test_only_single_gpu_leaves_rows_out():
    pocket, gpu = load_preset("pocket"), load_preset("single_gpu")
    assert (pocket.drop_unfit, pocket.rows) == (False, None)
    assert (gpu.drop_unfit, gpu.rows) == (True, 4000)


def test_importing_the_package_loads_nothing_heavy():
    code = "import rlhf_helpers, sys; print([m for m in ('torch', 'datasets') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_what_comes_from_the_hub_by_default_is_pinned():
    preset = load_preset("single_gpu")
    assert len(preset.revision) == len(preset.data_revision) == 40


@pytest.mark.parametrize("value, expected", [("0", False), ("1", True), ("", True)])
def test_the_environment_says_whether_single_gpu_is_quantized(monkeypatch, value, expected):
    monkeypatch.setenv("RLHF_QUANTIZED", value)
    assert load_preset("single_gpu", device="cpu").quantized is expected
    assert load_preset("single_gpu", device="cpu", quantized=not expected).quantized is not expected
    assert load_preset("pocket").quantized is True  # as with the other variables
    assert load_preset("pocket", quantized=False).quantized is False


@pytest.mark.parametrize("value", ["no", "False", "2", "4", " 1"])
def test_another_value_of_quantized_is_named(monkeypatch, value):
    monkeypatch.setenv("RLHF_QUANTIZED", value)
    with pytest.raises(ValueError, match=f"RLHF_QUANTIZED is '{value}'; give 1 .* 0"):
        load_preset("single_gpu", device="cpu")
    assert load_preset("pocket").quantized
    with pytest.raises(ValueError, match="quantized is '1': it must be one of True, False"):
        load_preset("pocket", quantized="1")
