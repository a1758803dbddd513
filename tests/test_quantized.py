"""Four bits are optional: a preset may keep its base unquantized."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig

from rlhf_helpers import base as base_module
from rlhf_helpers.base import load_base
from rlhf_helpers.memory import measured_bytes, memory_table, model_sizes
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles

WAYS = {True: "LoRA on 1 NF4 base", False: "LoRA on 1 base"}


def layers_in_nf4(base):
    return sum(isinstance(module, bnb.nn.Linear4bit) for module in base.modules())


@pytest.mark.parametrize("preset_says", [True, False])
@pytest.mark.parametrize("keyword", [None, True, False])
def test_a_keyword_goes_before_the_preset(preset_says, keyword):
    preset = load_preset("pocket", quantized=preset_says)
    quantized = preset_says if keyword is None else keyword
    assert bool(layers_in_nf4(load_base(preset, quantized=keyword))) is quantized


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantized", [True, False])
def test_bytes_are_counted_as_they_are(quantized, dtype):
    preset = load_preset("pocket", quantized=quantized, compute_dtype=dtype)
    roles = Roles(load_base(preset))
    roles.add("policy")
    roles.add_head("policy")
    width = getattr(torch, dtype).itemsize
    config = AutoConfig.from_pretrained(preset.model)
    rows = memory_table(model_sizes(config), double_quant=False, weight_bytes=width)
    measured = measured_bytes(roles)
    base = sum(measured["base"].values())
    assert rows[WAYS[quantized]][0].weights == pytest.approx(base, rel=0.02 if quantized else 0)
    assert base_module._weight_bytes(config, preset, quantized) == pytest.approx(base, rel=0.02)
    learns = roles.parameters("policy").values()
    assert {parameter.dtype for parameter in learns} == {torch.float32}
    assert roles.base.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_gpu_is_asked_for_what_the_preset_needs(monkeypatch, quantized):
    """Room for NF4, and not for 16 bits."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(base_module, "_require_memory", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(base_module, "_load_weights", lambda *given: torch.nn.Linear(1, 1))
    load_base(load_preset("pocket", device="cuda", quantized=quantized))
    assert asked == [quantized]


def test_a_width_that_nf4_cannot_cut_is_no_matter_without_it(tmp_path):
    from test_roles import save_tiny

    preset = save_tiny(tmp_path / "odd", intermediate_size=96)
    with pytest.raises(ValueError, match="RLHF_QUANTIZED=0.*down_proj has 96 inputs"):
        load_base(preset)
    assert layers_in_nf4(load_base(preset, quantized=False)) == 0
