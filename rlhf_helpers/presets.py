"""Presets: which model, data, sizes and device a notebook runs on, in one frozen record."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Preset:
    """Everything that differs between a laptop and a GPU.

    Args:
        name: `pocket` or `single_gpu`.
        model: a local folder in the hub's layout, or a hub id.
        revision: the hub revision of the model, None for a local folder.
        data: None for the generated pocket world, or a hub id, a local folder or a local file.
        data_dir: the folder inside a hub data set, if it has several.
        device: where the model lives, `cpu` or `cuda`.
        compute_dtype: in which 4-bit layers compute: `float32`, `bfloat16` or `float16`.
        double_quant: whether the quantization constants are quantized too.
        prompt_length: the longest prompt, in tokens, chat template included.
        response_length: the longest response, in tokens.
        seed: of everything that is drawn at random.
        runs: the folder for what the learner makes.
    """

    name: str
    model: str
    revision: str | None = None
    data: str | None = None
    data_dir: str | None = None
    device: str = "cpu"
    compute_dtype: str = "float32"
    double_quant: bool = False
    prompt_length: int = 24
    response_length: int = 32
    seed: int = 0
    runs: Path = Path("runs")

    def __post_init__(self) -> None:
        for name in ("prompt_length", "response_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a whole number of tokens, at least 1")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; choose cpu or cuda")
        if self.compute_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"compute_dtype is {self.compute_dtype!r}; choose float32, bfloat16 or float16"
            )

    @property
    def offline(self) -> bool:
        """Whether the model is a local folder, so that the hub is never asked."""
        return self.name == "pocket" or Path(self.model).is_dir()


PRESETS = {
    "pocket": Preset(name="pocket", model=str(ASSETS / "base")),
    "single_gpu": Preset(
        name="single_gpu",
        model="Qwen/Qwen2.5-0.5B",
        data="Anthropic/hh-rlhf",
        data_dir="helpful-base",
        device="cuda",
        compute_dtype="bfloat16",
        double_quant=True,
        prompt_length=128,
        response_length=64,
    ),
}


def load_preset(name: str | None = None, **overrides) -> Preset:
    """The preset to run with.

    Args:
        name: `pocket` or `single_gpu`; None means `pocket`. The environment variable RLHF_PRESET,
            where set, goes before it, so that one setting moves every notebook.
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
    if chosen not in PRESETS:
        origin = "environment variable RLHF_PRESET is" if from_environment else "preset is"
        raise ValueError(f"{origin} {chosen!r}; choose one of {', '.join(PRESETS)}")
    known = {field.name for field in fields(Preset)}
    if unknown := sorted(set(overrides) - known):
        raise TypeError(f"a preset has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return replace(PRESETS[chosen], **overrides)
