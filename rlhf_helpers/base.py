"""One frozen base, its linear layers in NF4."""

import copy
from inspect import signature
from math import ceil
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from rlhf_helpers.hub import from_hub, load_pretrained, require_files
from rlhf_helpers.presets import Preset
from rlhf_helpers.validation import checked

NF4_BLOCK = 64  # weights that share one scale
SAFETENSORS, CONFIG = "model.safetensors", "adapter_config.json"
LINEAR = (nn.Linear, Conv1D)  # Conv1D is a linear layer, its weight transposed: GPT-2's
RANDOM = ("dropout", "pdrop", "dropout_prob", "layerdrop", "noise")  # how such settings end
ROWS = 1024  # the most rows of a tensor that a fingerprint reads
EXACT = 5e-4  # how far two devices' sums of the same weights may differ, in norms


@checked
def load_base(
    preset: Preset, quantized: bool | None = None, classifier: bool = False
) -> PreTrainedModel:
    """Load the preset's base model, frozen, without dropout, its linear layers in NF4.

    Embeddings, norms and the output layer stay unquantized, in the preset's `compute_dtype`. Only
    safetensors are read: nothing is unpickled, and no code of a model's author is run. On a GPU
    the bytes that the model needs are counted before any weights are read. On processors with
    AVX512-BF16, bitsandbytes would repack the 4-bit weights at the first forward without gradients,
    and LoRA gradients afterwards would be wrong; that fast path is switched off here.

    Args:
        preset: names the model, its device and how it computes.
        quantized: False keeps every weight unquantized; None does as the preset says.
        classifier: True gives the body a new linear layer to one score in place of the output
            layer, as TRL's RewardTrainer takes it.

    Returns:
        The model in eval mode, no parameter requiring gradients.

    Raises:
        FileNotFoundError: if a file of a local model is missing.
        ValueError: if a local model's weights are truncated or not in safetensors, its architecture
            is one on which roles would be wrong, a layer's width is no multiple of 64, or the
            preset asks for CUDA where there is none or too little memory.
        ConnectionError: if the model is a hub id and the hub cannot be reached, or refuses.

    Example:
        >>> base = load_base(load_preset("pocket"))        # doctest: +SKIP
        >>> sum(p.requires_grad for p in base.parameters())  # doctest: +SKIP
        0

    Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3. Lesson 01 derives NF4.
    """
    quantized = preset.quantized if quantized is None else quantized
    if preset.device == "cuda" and not torch.cuda.is_available():
        mend = "use preset 'pocket', or pass device='cpu' for a small model"
        raise ValueError(f"torch sees no CUDA device, as preset {preset.name!r} needs; {mend}")
    if preset.offline:
        _require_weights(Path(preset.model))
    config = load_pretrained(preset, AutoConfig.from_pretrained)
    _switch_off_dropout(config)
    _require_fit(config, preset.model, quantized)
    if preset.device == "cuda":
        _require_memory(config, preset, quantized)
    model = _load_weights(preset, config, quantized, classifier)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if preset.checkpointing:  # it works in training mode only, so sampling and scoring lose no time
        older = "gradient_checkpointing_enable"  # its name in older transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, older)
        enable({"use_reentrant": False})
    return model.requires_grad_(False).eval()


def _require_weights(folder: Path) -> None:
    """Raise unless a folder has a config and safetensors, in one file or in parts."""
    if (folder / CONFIG).is_file():
        mend = "give the folder of its base, and load the adapter with Roles.load"
        raise ValueError(f"'{folder}' holds an adapter ({CONFIG}); {mend}")
    require_files(folder, "config.json")
    index = folder / f"{SAFETENSORS}.index.json"
    whole, parts = (folder / SAFETENSORS).is_file(), index.is_file()
    if whole and parts:
        both = f"{SAFETENSORS} and {index.name}: weights of two models, perhaps"
        raise ValueError(f"'{folder}' has {both}; delete those that are older")
    if not (whole or parts) and any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"'{folder}' has its weights as pytorch_model.bin, which only unpickling can read, and "
            "that can run any code; get the model as safetensors, or convert it where you trust it"
        )
    if not parts:
        require_files(folder, SAFETENSORS)


def _switch_off_dropout(config: PreTrainedConfig) -> None:
    """Dropout, dropped layers or noise would make the policy differ from itself, in training."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _switch_off_dropout(value)
        elif isinstance(value, float) and name.endswith(RANDOM):
            setattr(config, name, 0.0)


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal language model on torch's "meta" device: shapes, and no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def _require_fit(config: PreTrainedConfig, name: str, quantized: bool) -> None:
    """Raise ValueError for a model on which the roles would be wrong, from its config alone."""
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored and not (quantized and stored.get("load_in_4bit")):
        method, mend = stored.get("quant_method"), "give the model as it was before"
        raise ValueError(f"{name!r} is quantized already ({method}); {mend}")
    reason = "is no causal model of text alone"
    if (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        and config.get_text_config(decoder=True) is config
    ):
        if (getattr(config, "pad_token_id", None) or 0) >= config.vocab_size:
            config.pad_token_id = None  # some name one that they have not; the tokenizer's counts
        model = from_hub(name, on_meta, config)
        reason = _misfit(model) or (_nf4_misfit(model) if quantized else None)
    if reason:
        raise ValueError(
            f"{name!r} is of type {config.model_type!r}, which {reason}; choose a dense causal "
            "language model, such as Qwen 2 or 3, Llama, Mistral or Gemma"
        )


def _nf4_misfit(model: PreTrainedModel) -> str | None:
    """Why a model's layers would not all be in NF4; None if they would."""
    needs = "needs quantized=False (RLHF_QUANTIZED=0)"
    for layer in model.modules():
        if isinstance(layer, LINEAR) and type(layer) not in LINEAR:
            return f"{needs}: it has layers of {type(layer).__name__}, that stays out of NF4"
    for name, (_, inputs) in linear_shapes(model).items():
        if inputs % NF4_BLOCK:
            return f"{needs}: {name} has {inputs} inputs, no multiple of {NF4_BLOCK}, NF4's block"
    return None


def _misfit(model: PreTrainedModel) -> str | None:
    """Why roles on such a model would be wrong; None if they are right."""
    modules = dict(model.named_modules())
    flags = [getattr(module, "is_causal", None) for module in modules.values()]
    flags += [getattr(model.config, "causal", None), not getattr(model.config, "prefix_lm", False)]
    if hasattr(model.config, "add_cross_attention"):  # the family of BERT
        flags.append(getattr(model.config, "is_decoder", None))
    if False in flags:
        return "sees the tokens that it is to predict"
    if model._is_stateful:
        return "keeps a recurrent state, into which left padding would go"
    if "logits_to_keep" not in signature(model.forward).parameters:
        return "gives no logits of the response alone (logits_to_keep)"
    for name, parameter in model.named_parameters():
        layer = modules[name.rpartition(".")[0]]
        if parameter.dim() > 1 and not isinstance(layer, (*LINEAR, nn.Embedding)):
            return f"has weights that neither NF4 nor adapters reach, as of experts ({name})"
    return None


def _require_memory(config, preset: Preset, quantized: bool) -> None:
    """Raise ValueError unless the weights and a fifth more fit the GPU's free memory."""
    needed = 1.2 * _weight_bytes(config, preset, quantized)
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch's own cache
    free = torch.cuda.mem_get_info()[0] + unused
    if needed > free:
        raise ValueError(
            f"{preset.model!r} needs {needed / 1e9:.1f} GB, its weights and a fifth more, and the "
            f"GPU has {free / 1e9:.1f} GB free; choose a smaller model or preset 'pocket', end "
            "what else uses the GPU, or, to train, give a smaller response_length or batch"
        )


def _weight_bytes(config, preset: Preset, quantized: bool) -> float:
    """Bytes of the weights on the device, from the configuration alone."""
    model = on_meta(config)
    linear = sum(outputs * inputs for outputs, inputs in linear_shapes(model).values())
    plain = getattr(torch, preset.compute_dtype).itemsize
    scale = 1 + 4 / 256 if preset.double_quant else 4  # bytes for each block
    each = 0.5 + scale / NF4_BLOCK if quantized else plain
    return linear * each + (model.num_parameters() - linear) * plain


def _load_weights(preset: Preset, config, quantized: bool, classifier: bool) -> PreTrainedModel:
    dtype = getattr(torch, preset.compute_dtype)
    options = {"config": config, "dtype": dtype, "device_map": {"": preset.device}}
    if quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=preset.double_quant,
            llm_int8_skip_modules=["score"] if classifier else None,
        )
    kind = AutoModelForCausalLM
    if classifier:
        config.num_labels, kind = 1, AutoModelForSequenceClassification
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, info = load_pretrained(preset, kind.from_pretrained, **options)
    foreign = [key for key in info["unexpected_keys"] if key.endswith("weight")]
    if not classifier and (wrong := [*info["missing_keys"], *foreign]):
        raise ValueError(
            f"the weights of {preset.model!r} do not fit its config.json: {wrong[0]} is missing or "
            f"has no place ({len(wrong)} in all); get all files of one model"
        )
    return model


def linear_shapes(base: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every layer that gets an adapter: all linear ones but the last."""
    last = base.get_output_embeddings()
    layers = {n: m for n, m in base.named_modules() if isinstance(m, LINEAR) and m is not last}
    return {
        name: (m.nf, m.nx) if isinstance(m, Conv1D) else (m.out_features, m.in_features)
        for name, m in layers.items()
    }


def hidden_width(base: PreTrainedModel) -> int:
    """Of the last hidden state, which the output layer and scalar heads read.

    A few models, such as OPT-350m, have another `hidden_size` inside.
    """
    return base.get_output_embeddings().weight.shape[1]


def fingerprint(base: PreTrainedModel) -> dict[str, object]:
    """A few numbers of every weight tensor, which tell a base from others.

    Of W `[out, in]` its norm |W|, and for k = 1 to 4 the sum Σ cos(k (i+1)²) W_ij cos(k (j+1)²),
    all divided by the root of W's size; of a long W every second, third, … row is enough, since a
    merged adapter changes all. Rounding and merged adapters change |W| little; but the
    signs of the sums' terms look random, so that each sum moves about as far as W does, |ΔW|.

    Returns:
        `dtype` and `quantization`, and the numbers of the `linear` layers' weights and of the
        `other` tensors, in the order of the model.
    """
    layers = {f"{name}.weight" for name in linear_shapes(base)}
    turned = {f"{n}.weight" for n, layer in base.named_modules() if isinstance(layer, Conv1D)}
    found = {"dtype": str(base.dtype).removeprefix("torch."), "quantization": "none"}
    found |= {"linear": [], "other": []}
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        if name in turned:
            weight = weight.T  # as NF4 has it
        if state := getattr(weight, "quant_state", None):
            found["quantization"] = "double" if state.nested else "plain"
            weight = dequantize_4bit(weight.data, state)
        found["linear" if name in layers else "other"].append(_numbers(weight.detach()))
    return found


def _numbers(weight: Tensor) -> list[float]:
    rows = weight.reshape(len(weight) if weight.dim() > 1 else 1, -1)
    rows = rows[:: ceil(len(rows) / ROWS)].float()
    left, right = (_waves(size).to(weight.device) for size in rows.shape)
    numbers = torch.cat([rows.norm()[None], ((rows @ right) * left).sum(0)])
    return [float(f"{number:.6g}") for number in (numbers / rows.numel() ** 0.5).tolist()]


def _waves(size: int) -> Tensor:
    """√2 cos(k i²) for i = 1 to size and k = 1 to 4, `[size, 4]`: of mean square 1."""
    squares = torch.arange(1, size + 1, dtype=torch.float64) ** 2
    return (2**0.5 * torch.cos(squares[:, None] * torch.arange(1, 5))).float()


def same_base(first: dict, second: dict) -> bool:
    """Whether two fingerprints are of one base, possibly in other dtypes or quantized otherwise.

    In one form, a merged adapter whose |ΔW| is a thousandth of |W| is told apart. Between bfloat16
    and float32 about a hundredth is needed; between NF4 and no quantization half of |W| in a linear
    layer, since NF4's own rounding moves weights by a tenth.
    """
    for kind in ("linear", "other"):
        if [len(row) for row in first[kind]] != [len(row) for row in second[kind]]:
            return False
        a, b = (torch.tensor(side[kind]).reshape(-1, 5) for side in (first, second))
        limit = _rounding(first, second, kind == "linear") * b[:, :1].clamp(min=1e-12)
        if not ((a - b).abs() <= limit).all():
            return False
    return True


def _rounding(first: dict, second: dict, linear: bool) -> float:
    """How far rounding may move a fingerprint's number, in norms: at least 6 standard deviations.

    Measured on the pocket base: 0.22 ε between dtypes, 0.21 √ε between dtypes rounded to NF4, 0.003
    for double quantization and 0.09 between NF4 and none.
    """
    dtypes = {first["dtype"], second["dtype"]}
    eps = max(torch.finfo(getattr(torch, name)).eps for name in dtypes) if len(dtypes) > 1 else 0
    forms = {first["quantization"], second["quantization"]}
    if not linear or forms == {"none"}:
        return EXACT + 1.5 * eps
    if "none" in forms:
        return 0.5
    return EXACT + 1.5 * eps**0.5 + 0.02 * (len(forms) - 1)
