"""What a notebook does first: say where it runs, and leave out what only the pocket world has."""

import torch
import transformers

from rlhf_helpers import __version__, plots
from rlhf_helpers.presets import Preset
from rlhf_helpers.validation import checked

POCKET_ONLY = "# Pocket only"
_SKIPPED = 'print("About the generated world: this cell does nothing with the preset {!r}.")\n'


@checked
def start(preset: Preset) -> None:
    """Set the figures' style and print versions, device and preset.

    In another preset than `pocket`, cells that begin with the comment "# Pocket only" do nothing
    from then on: they need the rubric, the known facts or the recorded runs of the pocket world.
    """
    plots.use_style()
    versions = f"rlhf_helpers {__version__}, torch {torch.__version__}"
    print(f"{versions}, transformers {transformers.__version__}")
    device = torch.cuda.get_device_name() if preset.device == "cuda" else "CPU"
    print(f"preset {preset.name}, on {device}")
    try:
        shell = get_ipython()
    except NameError:  # a plain Python process has no cells
        return
    transforms = shell.input_transformers_cleanup
    transforms[:] = [f for f in transforms if not isinstance(f, LeaveOut)] + [LeaveOut(preset)]


class LeaveOut:
    """Replaces a cell's lines by a message if they need another preset."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset

    def __call__(self, lines: list[str]) -> list[str]:
        pocket_only = bool(lines) and lines[0].startswith(POCKET_ONLY)
        if pocket_only and self.preset.name != "pocket":
            return [_SKIPPED.format(self.preset.name)]
        return lines
