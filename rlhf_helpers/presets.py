"""Presets: which model, data, sizes and device a notebook runs on, in one frozen record."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from rlhf_helpers.kinds import OneOf, Whole
from rlhf_helpers.validation import check_fields

ASSETS = Path(__file__).parent / "assets"
DEVICES, DTYPES = ("cpu", "cuda"), ("auto", "float32", "bfloat16", "float16")
ENVIRONMENT = ("model", "data", "device", "quantized")  # set by RLHF_MODEL and so on


@dataclass(frozen=True)
class Preset:
    """Everything that differs between a laptop and a GPU.

    Args:
        name: `pocket` or `single_gpu`.
        model: a local folder in the hub's layout, or a hub id.
        revision: the hub revision of the model, None for a local folder.
        data: None for the generated pocket world, or a hub id, a local folder or a local file.
        data_dir: the folder inside a hub data set, if it has several.
        data_revision: the hub revision of the data, None for what is not from the hub.
        device: where the model lives, `cpu` or `cuda`.
        compute_dtype: in which 4-bit layers compute: `float32`, `bfloat16` or `float16`; `auto`
            lets `load_preset` choose what the device can do.
        quantized: whether the base's linear layers are in NF4; False keeps them in `compute_dtype`.
        double_quant: whether the quantization constants are quantized too.
        prompt_length: the longest prompt, in tokens, chat template included.
        response_length: the longest response, in tokens.
        sft, reward, dpo, ppo: settings of `SFTConfig`, `RewardConfig`, `DPOConfig` and `PPOConfig`
            that differ from their defaults, which are the pocket model's.
        drop_unfit: whether rows of outside data that cannot be used are left out and counted; False
            refuses the data for one such row.
        checkpointing: whether training computes activations twice to keep fewer of them.
        rows: the most rows of outside data that are used; None for all.
        seed: of everything that is drawn at random.
        runs: the folder for what the learner makes.
    """

    name: str
    model: str
    revision: str | None = None
    data: str | None = None
    data_dir: str | None = None
    data_revision: str | None = None
    device: OneOf[DEVICES] = "cpu"
    compute_dtype: OneOf[DTYPES] = "float32"
    quantized: bool = True
    double_quant: bool = False
    prompt_length: Whole[1] = 24
    response_length: Whole[1] = 32
    sft: Mapping[str, object] = field(default_factory=dict)
    reward: Mapping[str, object] = field(default_factory=dict)
    dpo: Mapping[str, object] = field(default_factory=dict)
    ppo: Mapping[str, object] = field(default_factory=dict)
    checkpointing: bool = False
    drop_unfit: bool = False
    rows: Whole[1] | None = None
    seed: Whole[0] = 0
    runs: Path = Path("runs")

    def __post_init__(self) -> None:
        for name, kind in (("model", str), ("data", str), ("runs", Path)):  # text and path will do
            value = getattr(self, name)
            if name == "data" and value is None:
                continue
            if not isinstance(value, str | Path) or not str(value).strip():
                what = "a folder" if name == "runs" else "a folder or a hub id"
                raise ValueError(f"{name} is {value!r}; give {what}")
            object.__setattr__(self, name, kind(os.path.expanduser(value)))
        check_fields(self)

    @property
    def offline(self) -> bool:
        """Whether the model is a local folder, so that the hub is not asked for it."""
        return self.name == "pocket" or Path(self.model).is_dir()


PRESETS = {
    "pocket": Preset(name="pocket", model=str(ASSETS / "base")),
    "single_gpu": Preset(
        name="single_gpu",
        model="Qwen/Qwen2.5-0.5B",
        revision="060db6499f32faf8b98477b0a26969ef7d8b9987",
        data="Anthropic/hh-rlhf",
        data_dir="helpful-base",
        data_revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        device="cuda",
        compute_dtype="auto",
        double_quant=True,
        prompt_length=256,
        response_length=64,
        drop_unfit=True,
        rows=4000,
        sft={"batch_size": 16, "learning_rate": 2e-4},
        reward={"batch_size": 16, "learning_rate": 1e-4},
        dpo={"batch_size": 16, "learning_rate": 2e-5},
        ppo={"minibatch_size": 16, "learning_rate": 5e-5, "response_length": 64},
    ),
}


def load_preset(name: str | None = None, **overrides) -> Preset:
    """The preset to run with.

    The environment variables RLHF_MODEL, RLHF_DATA, RLHF_DEVICE and RLHF_QUANTIZED (0 or 1) replace
    those fields of `single_gpu`; `pocket` never follows them. A keyword goes before them. The
    revisions and
    `data_dir` belong to the preset's own model and data: with others they are None unless given.

    Args:
        name: `pocket` or `single_gpu`; None means `pocket`. The environment variable RLHF_PRESET,
            where set, overrides it, so that one setting moves every notebook.
        **overrides: any field of `Preset`, for example `response_length=16`.

    Raises:
        ValueError: for an unknown preset, naming the environment variable if it came from there.
        TypeError: for an override that is no field of `Preset`.

    Example:
        >>> load_preset("pocket", response_length=16).response_length
        16
    """
    from_environment = os.environ.get("RLHF_PRESET")
    chosen = from_environment or name or "pocket"
    if chosen not in [*PRESETS]:  # a list, say, is in no dictionary
        origin = "environment variable RLHF_PRESET is" if from_environment else "preset is"
        raise ValueError(f"{origin} {chosen!r}; choose one of {', '.join(PRESETS)}")
    known = {field.name for field in fields(Preset)}
    if unknown := sorted(set(overrides) - known):
        raise TypeError(f"a preset has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if chosen == "single_gpu":
        overrides = _from_environment() | overrides
    preset = PRESETS[chosen]
    details = {"revision": "model", "data_dir": "data", "data_revision": "data"}
    for detail, source in details.items():
        default = getattr(preset, source)
        if overrides.get(source, default) != default:
            overrides.setdefault(detail, None)
    preset = replace(preset, **overrides)
    if preset.compute_dtype == "auto":
        preset = replace(preset, compute_dtype=_best_dtype(preset.device))
    return preset


def _from_environment() -> dict[str, str | bool]:
    variables = {name: os.environ.get(f"RLHF_{name.upper()}") for name in ENVIRONMENT}
    found: dict[str, str | bool] = {name: value for name, value in variables.items() if value}
    if (quantized := found.get("quantized", "1")) not in ("0", "1"):
        raise ValueError(f"environment variable RLHF_QUANTIZED is {quantized!r}; give 1 (NF4) or 0")
    return found | {"quantized": quantized == "1"} if "quantized" in found else found


def _best_dtype(device: str) -> str:
    """bfloat16 on GPUs that compute in it natively, float16 on older ones, float32 on a CPU."""
    if device == "cpu":
        return "float32"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        return "float16"
    return "bfloat16"
