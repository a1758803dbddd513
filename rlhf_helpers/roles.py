"""The frozen 4-bit base that every role of RLHF shares."""

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from rlhf_helpers.data import from_hub, require_files
from rlhf_helpers.presets import Preset

NF4_BLOCK = 64  # weights that share one scale


def load_base(preset: Preset, quantized: bool = True) -> PreTrainedModel:
    """Load the preset's base model, frozen, without dropout, its linear layers in NF4.

    Embeddings, norms and the output layer stay unquantized (float32 on the CPU). On processors
    with AVX512-BF16, bitsandbytes would repack the 4-bit weights at the first forward without
    gradients, and LoRA gradients afterwards would be wrong; that fast path is switched off here.

    Args:
        preset: names the model, its device and how it computes.
        quantized: False keeps every weight unquantized, to compare with.

    Returns:
        The model in eval mode, no parameter requiring gradients.

    Raises:
        FileNotFoundError: if a file of a local model is missing.
        ValueError: if a local model's weights are truncated, a layer's width is no multiple of 64,
            or the preset asks for CUDA where there is none.
        ConnectionError: if the model is a hub id and the hub cannot be reached.

    Example:
        >>> base = load_base(load_preset("pocket"))        # doctest: +SKIP
        >>> sum(p.requires_grad for p in base.parameters())  # doctest: +SKIP
        0

    Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3. Lesson 01 derives NF4.
    """
    if preset.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"preset {preset.name!r} runs on CUDA, and torch sees no CUDA device here; use preset "
            "'pocket', or pass device='cpu' for a small model"
        )
    if preset.offline:
        require_files(Path(preset.model), "config.json", "model.safetensors")
    options = {"revision": preset.revision, "local_files_only": preset.offline}
    config = from_hub(preset.model, AutoConfig.from_pretrained, preset.model, **options)
    if quantized:
        _require_blocks(config, preset.model)
        options["quantization_config"] = _nf4(preset)
    model = _load_weights(preset, config, options)
    _switch_off_repacking(model)
    return model.requires_grad_(False).eval()


def _nf4(preset: Preset) -> BitsAndBytesConfig:
    # bitsandbytes announces an optional kernel package at import; the course does not use it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, preset.compute_dtype),
        bnb_4bit_use_double_quant=preset.double_quant,
    )


def _require_blocks(config, name: str) -> None:
    for width in ("hidden_size", "intermediate_size"):
        size = getattr(config, width, NF4_BLOCK)  # some architectures have other names
        if size % NF4_BLOCK:
            raise ValueError(
                f"{width} of {name!r} is {size}, no multiple of {NF4_BLOCK}: NF4 quantizes in "
                f"blocks of {NF4_BLOCK} weights; choose another model or quantized=False"
            )


def _load_weights(preset: Preset, config, options: dict) -> PreTrainedModel:
    load = AutoModelForCausalLM.from_pretrained
    options |= {
        "config": config,
        "dtype": getattr(torch, preset.compute_dtype),
        "device_map": {"": preset.device},
    }
    return from_hub(preset.model, load, preset.model, **options)


def _switch_off_repacking(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
