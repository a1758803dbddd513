"""Telling bases apart: rounding is forgiven, a merged adapter is not."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rlhf_helpers import base as base_module
from rlhf_helpers.base import fingerprint, load_base, same_base
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import BASE, WEIGHTS, Roles

FORMS = {
    f"{dtype}, {kind}": {"compute_dtype": dtype, "double_quant": kind == "double", "kind": kind}
    for dtype in ("float32", "bfloat16", "float16")
    for kind in ("none", "plain", "double")
}
IDS = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))


def loaded(form, model=None):
    settings = {name: value for name, value in FORMS[form].items() if name != "kind"}
    preset = load_preset("pocket", **settings)
    preset = replace(preset, model=str(model)) if model else preset
    return load_base(preset, quantized=FORMS[form]["kind"] != "none")


@pytest.fixture(scope="module")
def prints():
    """The pocket base's fingerprint in every form."""
    return {form: fingerprint(loaded(form)) for form in FORMS}


def merged(adapter, folder, scale=1.0):
    """The pocket base with a part of an adapter merged in, saved as a model of its own."""
    model = PeftModel.from_pretrained(loaded("float32, none"), str(adapter))
    for module in model.modules():
        if isinstance(factors := getattr(module, "scaling", None), dict):
            module.scaling = {name: factor * scale for name, factor in factors.items()}
    model.merge_and_unload().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_one_base_is_itself_in_every_form(prints, first, second):
    assert same_base(prints[first], prints[second])
    assert prints[first]["dtype"] == first.split(",")[0]
    assert prints[first]["quantization"] == FORMS[first]["kind"]


def test_a_fingerprint_covers_every_tensor(base, prints):
    found = prints["float32, plain"]
    names = [name for name, _ in base.named_parameters()]
    assert len(found["linear"]) + len(found["other"]) == len(names)
    plain = loaded("float32, none")
    before = fingerprint(plain)
    for name, parameter in plain.named_parameters():
        with torch.no_grad():
            parameter += (
                2e-3 * torch.randn_like(parameter) * parameter.norm() / parameter.numel() ** 0.5
            )
        after = fingerprint(plain)
        assert not same_base(before, after), name
        before = after


def test_numbers_by_hand():
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    one, four = torch.tensor(1.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    for k, number in enumerate(base_module._numbers(weight)[1:], 1):
        expected = 3 * 2 * torch.cos(k * one) ** 2 + 4 * 2 * torch.cos(k * four) ** 2
        assert number == pytest.approx(expected.item() / 2, rel=1e-5)
    assert base_module._numbers(weight)[0] == 2.5
    assert base_module._numbers(weight.bfloat16()) == base_module._numbers(weight)
    long = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    assert base_module._numbers(long) == base_module._numbers(long[::5])  # at most 1024 rows


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("form", FORMS)
def test_a_merged_adapter_makes_another_base(prints, tmp_path, scale, form):
    """In the same form; the SFT adapter's |ΔW| is a tenth of |W|, so 0.01 is a thousandth."""
    folder = merged(ASSETS / "sft", tmp_path, scale)
    assert not same_base(fingerprint(loaded(form, folder)), prints[form])


@pytest.mark.parametrize(
    "first, second",
    [("float32, none", "bfloat16, none"), ("float32, plain", "float32, double")],
)
def test_a_tenth_of_the_sft_adapter_is_seen_between_forms(prints, tmp_path, first, second):
    folder = merged(ASSETS / "sft", tmp_path, 0.1)
    assert not same_base(fingerprint(loaded(first, folder)), prints[second])
    assert not same_base(fingerprint(loaded(second, folder)), prints[first])


@pytest.mark.parametrize("quantized", [True, False])
def test_a_merged_adapter_of_a_very_short_run_makes_another_base(tmp_path, quantized):
    """Three steps of 1e-4."""
    preset = load_preset("pocket")
    roles = Roles(load_base(preset, quantized=quantized))
    roles.add("policy")
    optimizer = torch.optim.Adam(roles.parameters("policy").values(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        roles.use("policy")(IDS, labels=IDS).loss.backward()
        optimizer.step()
    roles.save("policy", tmp_path / "adapter")
    folder = merged(tmp_path / "adapter", tmp_path / "model")
    other = Roles(load_base(replace(preset, model=str(folder)), quantized=quantized))
    with pytest.raises(ValueError, match="trained on another base .* with an adapter merged in"):
        other.load("policy", tmp_path / "adapter")
    assert other.names == []


@pytest.mark.parametrize("trained, used", [(True, False), (False, True)])
def test_an_adapter_moves_between_nf4_and_unquantized(tmp_path, trained, used):
    preset = load_preset("pocket")
    roles = Roles(load_base(preset, quantized=trained))
    roles.add("policy")
    roles.save("policy", tmp_path / "adapter")
    other = Roles(load_base(preset, quantized=used))
    other.load("policy", tmp_path / "adapter")
    state = roles.state("policy")
    assert all(torch.equal(t, state[name]) for name, t in other.state("policy").items())


def test_adapters_that_are_there_and_active_change_no_fingerprint(base, prints):
    roles = Roles(copy.deepcopy(base))
    roles.add("policy")
    roles.add("value")
    assert fingerprint(roles.base) == prints["float32, plain"]


def rewrite(folder, metadata):
    weights = load_file(folder / WEIGHTS)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt", **metadata})


def test_a_damaged_fingerprint_is_refused(tmp_path):
    roles = Roles(load_base(load_preset("pocket")))
    roles.add("policy")
    roles.save("policy", tmp_path / "adapter")
    rewrite(tmp_path / "adapter", {BASE: "{"})
    with pytest.raises(ValueError, match="cannot be read"):
        roles.load("policy", tmp_path / "adapter")
    rewrite(tmp_path / "adapter", {BASE: json.dumps({"linear": [], "other": []})})
    with pytest.raises(ValueError, match="trained on another base"):
        roles.load("policy", tmp_path / "adapter")
