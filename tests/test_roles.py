"""The loader of the frozen 4-bit base."""

import os
import shutil
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_helpers import roles
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import load_base


def save_tiny(folder, **sizes):
    config = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    } | sizes
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return load_preset("pocket", model=str(folder))


def test_the_base_is_frozen_quantized_and_silent(base):
    linear = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linear) == 4 * 7  # q, k, v, o, gate, up and down in each of four layers
    assert all(m.weight.quant_state.quant_type == "nf4" for m in linear)
    assert not base.training
    assert not any(p.requires_grad for p in base.parameters())
    assert base.get_output_embeddings().weight.dtype == torch.float32


def test_quantized_and_unquantized_agree_roughly(pocket, base, tokenizer):
    exact = load_base(pocket, quantized=False)
    ids = tokenizer("the duck says", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = exact(ids).logits[0, -1].log_softmax(-1)
        q = base(ids).logits[0, -1].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum().item()
    assert 0 < divergence < 0.5  # close, and not the same


def lora_gradients(model, ids, forward_before):
    """Gradients of fresh LoRA adapters, optionally after a forward without gradients."""
    torch.manual_seed(0)
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=names))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if forward_before:
        peft_model.eval()
        with torch.no_grad():
            peft_model(input_ids=ids)
    peft_model.train()
    peft_model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in peft_model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_forward_without_gradients_leaves_later_gradients_right(tmp_path, rows):
    """Without the loader's guard, CPUs with AVX512-BF16 give LoRA gradients that are far off."""
    preset = save_tiny(tmp_path, hidden_size=128, intermediate_size=256)
    ids = torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(0))
    clean, after = (lora_gradients(load_base(preset), ids, before) for before in (False, True))
    assert len(clean) == 2 * 2 * 4
    for a, b in zip(clean, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_guard_covers_every_4bit_layer(tmp_path):
    """On any processor: what bitsandbytes would set on one with AVX512-BF16 is set back."""
    model = load_base(save_tiny(tmp_path))
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert layers
    for layer in layers:
        assert layer.support_avx512bf16_for_cpu is False
        layer.support_avx512bf16_for_cpu = True
    roles._switch_off_repacking(model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_double_quantization_is_an_option(tmp_path):
    preset = save_tiny(tmp_path)
    for double in (False, True):
        model = load_base(load_preset("pocket", model=preset.model, double_quant=double))
        states = [m.weight.quant_state for m in model.modules() if hasattr(m, "compute_dtype")]
        assert states
        assert all(state.nested is double for state in states)


def test_a_width_that_is_no_multiple_of_the_block_is_named(tmp_path):
    preset = save_tiny(tmp_path, intermediate_size=96)
    with pytest.raises(ValueError, match="intermediate_size of .* is 96, no multiple of 64"):
        load_base(preset)
    assert load_base(preset, quantized=False) is not None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, pocket, name):
    shutil.copytree(pocket.model, tmp_path / "base")
    (tmp_path / "base" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; reinstall"):
        load_base(load_preset("pocket", model=str(tmp_path / "base")))


def test_a_truncated_config_is_named(tmp_path, pocket):
    shutil.copytree(pocket.model, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"archi', encoding="utf-8")
    with pytest.raises(ValueError, match="truncated or damaged.*reinstall"):
        load_base(load_preset("pocket", model=str(tmp_path / "base")))


def test_a_missing_folder_never_asks_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_base(load_preset("pocket", model=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights_are_named(tmp_path, pocket, keep):
    shutil.copytree(pocket.model, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    data = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_base(load_preset("pocket", model=str(tmp_path / "base")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="torch sees no CUDA device.*'pocket'"):
        load_base(load_preset("single_gpu", model=str(tmp_path)))


def test_an_unreachable_hub_names_the_local_folder():
    with pytest.raises(ConnectionError, match="'nobody/nothing' is no local path.*local folder"):
        load_base(load_preset("single_gpu", model="nobody/nothing", device="cpu"))


def test_the_single_gpu_preset_loads_a_local_folder_of_another_architecture(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    preset = load_preset("single_gpu", model=str(tmp_path), device="cpu", compute_dtype="float32")
    model = load_base(preset)
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_pocket_never_opens_a_connection():
    """Load and sample in a process in which every connection raises."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "socket.create_connection = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from rlhf_helpers.presets import load_preset\n"
        "from rlhf_helpers.data import load_tokenizer, sft_dataset\n"
        "from rlhf_helpers.roles import load_base\n"
        "from rlhf_helpers.rollout import sample_responses\n"
        "p = load_preset('pocket')\n"
        "sft_dataset(p)\n"
        "r = sample_responses(load_base(p), load_tokenizer(p), ['what is hot?'], 4)\n"
        "print(len(r.texts))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE",)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
