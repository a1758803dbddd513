"""Saving that survives a kill or a Ctrl-C: whole folders, whole steps, optimizers."""

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from rlhf_helpers.base import CONFIG
from rlhf_helpers.presets import ASSETS, Preset
from rlhf_helpers.validation import checked

T = TypeVar("T")


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
    folder = Path(folder).absolute()
    require_no_file(folder)
    new = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    old = _set_aside(folder, ".old")
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside(folder: Path, end: str) -> Path:
    """Rename a folder, if it is there, to its name with an end."""
    aside = folder.with_name(folder.name + end)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    return aside


def require_no_file(*folders: Path) -> None:
    """Raise NotADirectoryError if a file is in the place of such a folder, or of one above it."""
    for folder in folders:
        if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
            mend = f"'{folder}' is to be a folder; give another path, or move the file away"
            raise NotADirectoryError(f"'{file}' is a file, and {mend}")


def require_own_folder(folder: Path) -> None:
    """Raise unless a saved role may take the place of all that is in a folder.

    Raises:
        ValueError: for one that holds something else, or in which this process works.
        NotADirectoryError: as `require_no_file`.
    """
    folder = Path(folder).absolute()
    require_no_file(folder)
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        inside.append("the notebook or script that runs")
    if inside and CONFIG not in inside:
        raise ValueError(
            f"'{folder}' holds {inside[0]!r} and no saved role, and saving one would replace all "
            f"that is in it; give a folder of its own, such as '{folder / 'policy'}'"
        )


def keep_two(folder: Path, number: int, write: Callable[[Path], None]) -> bool:
    """Save `write`'s files as `folder/update-<number>`, and delete all but the two newest saves.

    A save that fails, on a full disk for example, warns and leaves the earlier ones as they were.

    Args:
        write: puts its files into the folder that it is given.

    Returns:
        Whether it was saved.
    """
    try:
        with whole_folder(folder / f"update-{number:05}") as new:
            write(new)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder / f"update-{number:05}.part", ignore_errors=True)
        kept = next((path.name for path in _saves(folder)), "none")
        warnings.warn(
            f"update {number} could not be saved in '{folder}' ({error}); the newest save is "
            f"{kept}; make room, the run goes on",
            stacklevel=2,
        )
        return False
    for old in _saves(folder)[2:]:
        shutil.rmtree(old, ignore_errors=True)
    return True


def newest_readable(folder: Path, read: Callable[[Path], T]) -> tuple[Path, T] | None:
    """The newest save of `keep_two` that can be read, and what `read` gives; None if there is none.

    Prints which ones were passed over, and why.

    Raises:
        ValueError: if there are saves and none can be read.
    """
    last = None
    for path in _saves(folder):
        try:
            return path, read(path)
        except (OSError, SafetensorError, ValueError) as error:
            print(f"'{path}' cannot be read ({error}); going on from the save before it")
            last = error
    if last:
        raise ValueError(
            f"no save in '{folder}' can be read; delete the folder to begin anew ({last})"
        ) from last
    return None


def _saves(folder: Path) -> list[Path]:
    return sorted(folder.glob("update-?????"), reverse=True)


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


@checked
def find_adapter(preset: Preset, name: str) -> Path:
    """The folder of a trained adapter: the learner's own under `runs`, else the shipped one.

    Prints which of the two it is.

    Args:
        name: of the role, for example `sft`.

    Raises:
        FileNotFoundError: if there is neither, saying which lesson makes it.
    """
    own, shipped = (place / str(name) for place in (preset.runs / preset.name, ASSETS))
    # outside the pocket world an exercise takes what the lessons, beside it, have trained
    other = shipped if preset.name == "pocket" else Path("..") / "notebooks" / own
    for place in (own, other):
        if (place / CONFIG).is_file():
            origin = f"your own, from {place}"
            origin = "the reference that the course ships" if place == shipped else origin
            print(f"adapter {name!r}: {origin}")
            return place
    raise FileNotFoundError(
        f"there is no adapter {name!r} of preset {preset.name!r} in {own}; run the lesson that "
        "trains it first (01 for sft, 02 for reward and judge), with the same PRESET"
    )


def remove_folder(folder: Path) -> None:
    """Delete a folder, renamed first: a kill must not leave half of it under its name."""
    shutil.rmtree(_set_aside(folder, ".done"), ignore_errors=True)


def optimizer_tensors(optimizers: Mapping[str, Optimizer]) -> dict[str, Tensor]:
    """The states of optimizers as torch keeps them, `<name>/<parameter>/<entry>`, to be saved."""
    return {
        f"{name}/{number}/{entry}": tensor
        for name, optimizer in optimizers.items()
        for number, state in optimizer.state_dict()["state"].items()
        for entry, tensor in state.items()
    }


def restore_optimizers(optimizers: Mapping[str, Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put what `optimizer_tensors` gave back, into optimizers of the same parameters in order."""
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key in (key for key in tensors if key.startswith(f"{name}/")):
            _, number, entry = key.split("/")
            state.setdefault(int(number), {})[entry] = tensors[key]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
