"""What models cost: counts by hand, and against PEFT and bitsandbytes themselves."""

import doctest

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_helpers import memory
from rlhf_helpers.memory import lora_parameters, nf4_bytes


def test_doctests():
    results = doctest.testmod(memory)
    assert results.attempted > 0
    assert results.failed == 0


# --- lora_parameters ---


def test_lora_parameters_by_hand():
    assert lora_parameters([(3, 4)], 2) == 2 * 4 + 3 * 2
    assert lora_parameters([(3, 4), (3, 4), (5, 2)], 1) == 7 + 7 + 7
    assert lora_parameters([torch.Size([3, 4])], 2) == 14


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_lora_parameters_are_those_that_peft_trains(rank):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    assert len(set(shapes)) == 4  # key and value layers are narrower than query and output
    peft_model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    trainable, _ = peft_model.get_nb_trainable_parameters()
    assert lora_parameters(shapes, rank) == trainable


@pytest.mark.parametrize(
    ("shapes", "rank", "message"),
    [
        ([(3, 4)], 0, "rank is 0: .* at least 1"),
        ([(3, 4)], 2.0, r"rank is 2\.0: it must be a whole number"),
        ([(3, 4), (0, 4)], 2, r"shapes\[1\] is \(0, 4\).* 0: it must be"),
        ([(3, -4)], 2, r"shapes\[0\] is \(3, -4\).* -4: it must be"),
        ([(3, 4, 5)], 2, r"shapes\[0\] is \(3, 4, 5\): give \(out, in\)"),
        ([], 2, "shapes is empty: give"),
    ],
)
def test_lora_parameters_refuses_nonsense(shapes, rank, message):
    with pytest.raises(ValueError, match=message):
        lora_parameters(shapes, rank)


# --- nf4_bytes ---


def test_nf4_bytes_by_hand():
    assert nf4_bytes(1, double_quant=False) == 1 + 4
    assert nf4_bytes(1) == 1 + 1 + 4
    assert nf4_bytes(65, double_quant=False) == 33 + 2 * 4
    assert nf4_bytes(65) == 33 + 2 + 4
    assert nf4_bytes(16384) == 8192 + 256 + 4
    assert nf4_bytes(16385) == 8193 + 257 + 2 * 4


@pytest.mark.parametrize("blocks", [1, 7])
def test_bits_per_weight(blocks):
    weights = blocks * 64 * 256
    assert 8 * nf4_bytes(weights) / weights == 4 + 8 / 64 + 32 / (64 * 256)
    assert 8 * nf4_bytes(weights, double_quant=False) / weights == 4.5


@pytest.mark.parametrize("weights", [2, 62, 64, 100, 16384, 16386, 50002])
def test_nf4_bytes_are_those_that_bitsandbytes_keeps(weights):
    # Even numbers: version 0.49 fails on odd ones.
    x = torch.randn(weights, generator=torch.Generator().manual_seed(0))
    for double_quant in (False, True):
        codes, state = bnb.quantize_4bit(
            x, blocksize=64, quant_type="nf4", compress_statistics=double_quant
        )
        kept = [codes, state.absmax] + ([state.state2.absmax] if double_quant else [])
        assert nf4_bytes(weights, double_quant) == sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("weights", [0, -64, 64.0])
def test_nf4_bytes_refuses_nonsense(weights):
    with pytest.raises(ValueError, match=f"weights is {weights}: it must be a whole number"):
        nf4_bytes(weights)
