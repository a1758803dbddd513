"""Saving that survives a kill or a Ctrl-C: whole folders, whole steps, Adam's state."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rlhf_helpers.presets import ASSETS, Preset

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's running means of g and g², as torch names them


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write to the folder that this yields; only when all is written does it become `folder`.

    A kill at any time leaves the old folder or the new one (between two renames the old one is
    `<folder>.old`), never a mixture. What is in the old folder and is not written again is gone.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "adapter"
        >>> with whole_folder(target) as new:
        ...     _ = (new / "weights").write_text("all of them")
        >>> [path.name for path in target.iterdir()]
        ['weights']
    """
    new, old = (folder.with_name(folder.name + end) for end in (".part", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def finish_first() -> Iterator[None]:
    """Hold a Ctrl-C (or the notebook's stop button) back until the block is done.

    For what must not stop half-way: an optimizer's step, a save. In a thread other than the main
    one, where Python delivers no such signal, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before):
        before(signal.SIGINT, None)  # Python's own raises KeyboardInterrupt


def find_adapter(preset: Preset, name: str) -> Path:
    """The folder of a trained adapter: the learner's own under `runs`, else the shipped one.

    Prints which of the two it is.

    Args:
        name: of the role, for example `sft`.

    Raises:
        FileNotFoundError: if there is neither, saying which lesson makes it.
    """
    own, shipped = preset.runs / preset.name / name, ASSETS / name
    if (own / "adapter_config.json").is_file():
        print(f"adapter {name!r}: your own, from {own}")
        return own
    if preset.name == "pocket" and (shipped / "adapter_config.json").is_file():
        print(f"adapter {name!r}: the reference that the course ships")
        return shipped
    raise FileNotFoundError(
        f"there is no adapter {name!r} of preset {preset.name!r} in {own}; run the lesson that "
        "trains it first (lesson 01 for sft), with the same PRESET"
    )


def adam_state(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Adam's two moments under `<moment>/<parameter name>`, to save as safetensors."""
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }


def restore_adam(
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    step: int,
) -> None:
    """Put what `adam_state` gave back, after `step` steps of the optimizer."""
    for name, parameter in parameters.items():
        moments = {m: tensors[f"{m}/{name}"].to(parameter.device) for m in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step))} | moments
