"""The loop that fine-tuning and reward modelling share: updates, reports, saving, going on."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from rlhf_helpers.checkpoints import (
    adam_state,
    finish_first,
    require_no_file,
    restore_adam,
    whole_folder,
)
from rlhf_helpers.roles import Roles
from rlhf_helpers.validation import in_range

OPTIMIZER = "optimizer.safetensors"
LOSS_SCALES = (2.0**10, 2.0**5, 1.0)  # powers of two, so that scaling rounds nothing
_OPEN: "WeakValueDictionary[Path, Run]" = WeakValueDictionary()  # runs that may still save


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        steps: updates; the examples are taken in their order, again from the start if need be.
        batch_size: examples in an update.
        learning_rate: the highest; it rises linearly from 0 and falls linearly to 0.
        warmup_steps: steps of the rise.
        max_grad_norm: longer gradients are scaled down to this length.
        eval_every: steps between two measurements on the held-out examples.
        save_every: steps between two saves of an unfinished run.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    eval_every: int = 25
    save_every: int = 50

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            rate = name in ("learning_rate", "max_grad_norm")
            number = in_range(value, above=True) or (name == "max_grad_norm" and value == math.inf)
            if not number or not (rate or isinstance(value, int)):
                whole = "" if rate else ", a whole one"
                raise ValueError(f"{name} is {value!r}; give a number above 0{whole}")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of {self.steps} steps; give fewer"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, as transformers' `linear` schedule: 0 at step 0.

        Example:
            >>> config = TrainConfig(steps=150, warmup_steps=10, learning_rate=0.002)
            >>> [config.rate(step) for step in (0, 5, 10, 80)]
            [0.0, 0.001, 0.002, 0.001]
        """
        rise = step / self.warmup_steps
        fall = (self.steps - step) / (self.steps - self.warmup_steps)
        return self.learning_rate * min(rise, fall)

    def batch(self, examples: list, step: int) -> list:
        """The examples of a step, in their order, again from the start after the last.

        Example:
            >>> TrainConfig(steps=20, batch_size=2).batch(["a", "b", "c"], step=1)
            ['c', 'a']
        """
        start = step * self.batch_size
        return [examples[(start + i) % len(examples)] for i in range(self.batch_size)]


@dataclass(frozen=True)
class TrainStats:
    """What one update reports.

    Attributes:
        step: how many updates are done; 0 is the report before the first, with no loss.
        loss: of the update's batch, before the update; in nats.
        held_out: what was measured on held-out examples after the update; empty where nothing was.
        grad_norm: before it was scaled down.
        learning_rate: of the update.
        seconds: since the run began, saved ones included.
    """

    step: int
    loss: float | None = None
    held_out: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    learning_rate: float = 0.0
    seconds: float = 0.0


def backward(loss: Tensor, parameters: Iterable[Parameter], roles: Roles) -> None:
    """A loss's gradients, as `loss.backward()` gives them; small ones survive a float16 base.

    float16 rounds what is below 3e-8 to 0, and gradients of a mean over many tokens are that small.
    Through such a base the loss is scaled up, and the gradients, in float32, down again; if they
    overflow, less is tried. Nothing needs to be kept between two steps.

    Micikevicius et al., mixed precision training (arXiv 1710.03740), section 3.2.
    """
    if roles.base.get_input_embeddings().weight.dtype != torch.float16:
        loss.backward()
        return
    parameters = list(parameters)
    for scale in LOSS_SCALES:
        for parameter in parameters:
            parameter.grad = None
        (loss * scale).backward(retain_graph=True)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if torch.stack([gradient.sum() for gradient in gradients]).isfinite().all():
            break
    for gradient in gradients:
        gradient /= scale


class Run:
    """Where a run stands, and how that is kept on disk.

    With a `folder`, a run that stops early is kept in `<folder>.unfinished`; a new Run of the same
    settings goes on from there. The finished adapter goes to `folder`.

    Args:
        role: a trainable role of `roles`.
        settings: anything JSON can hold that the result depends on, the data for example.

    Raises:
        TypeError: for a `config` that is no TrainConfig.
        ValueError: if the role cannot be trained, or an unfinished run has other settings.
        NotADirectoryError: if a file is in the place of the folder.
    """

    def __init__(
        self, roles: Roles, role: str, config: TrainConfig, folder: Path | None, settings: object
    ) -> None:
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config is {config!r}: give an SFTConfig or RewardConfig of settings.")
        self.roles, self.role, self.config = roles, role, config
        self.folder = None if folder is None else Path(folder).absolute()
        text = json.dumps([role, asdict(config), settings])
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.parameters = roles.parameters(role)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=0.0)
        self.step = self.saved = 0
        self.seconds = 0.0
        if self.folder is not None:
            self.unfinished = self.folder.with_name(f"{self.folder.name}.unfinished")
            require_no_file(self.folder, self.unfinished)
            self._take_over()
            if self.unfinished.exists():
                self._resume()

    def updates(
        self, loss_of: Callable[[int], Tensor], measure: Callable[[], Mapping[str, float]]
    ) -> Iterator[TrainStats]:
        """Do the steps that are left, one for each item drawn.

        Args:
            loss_of: the loss of a step's batch, a scalar.
            measure: what to report of the held-out examples.

        Yields:
            `TrainStats`, the first before any update.

        Raises:
            FloatingPointError: if loss or gradient is not finite; the state before is kept.
        """
        config, begun = self.config, time.perf_counter() - self.seconds
        try:
            if self.step == 0:
                self.roles.use(self.role)
                yield TrainStats(0, held_out=measure())
            while self.step < config.steps:
                model = self.roles.use(self.role).train()
                self.optimizer.zero_grad()  # an interrupted step may have left gradients
                loss = loss_of(self.step)
                self.check_finite("loss", loss)
                backward(loss, self.parameters.values(), self.roles)
                with finish_first():
                    rate, norm = self._update()
                    self.seconds = time.perf_counter() - begun
                    if self.step % config.save_every == 0:
                        self.save()
                model.eval()
                due = self.step % config.eval_every == 0 or self.step == config.steps
                held_out = measure() if due else {}
                yield TrainStats(self.step, loss.item(), held_out, norm, rate, self.seconds)
        finally:
            with finish_first():
                self.save()

    def save(self) -> None:
        """Keep what is done since the last save, if there is a folder to keep it in."""
        if self.folder is None or self.step == self.saved:
            return
        if self.step == self.config.steps:
            self.roles.save(self.role, self.folder)
            shutil.rmtree(self.unfinished, ignore_errors=True)
        else:
            facts = {"step": self.step, "seconds": self.seconds, "digest": self.digest}
            moments = adam_state(self.parameters, self.optimizer)
            with whole_folder(self.unfinished) as new:
                self.roles.write(self.role, new)
                metadata = {name: str(value) for name, value in facts.items()}
                save_file(moments, new / OPTIMIZER, metadata=metadata)
        self.saved = self.step

    def _update(self) -> tuple[float, float]:
        rate = self.config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.check_finite("gradient norm", norm)
        self.optimizer.step()
        self.step += 1
        return rate, norm.item()

    def check_finite(self, name: str, value: Tensor) -> None:
        """Raise FloatingPointError, which says where the run stands, unless a number is finite."""
        if not value.isfinite():
            raise FloatingPointError(
                f"the {name} of step {self.step + 1} is {value.item()}; lower the learning_rate of "
                f"{self.config.learning_rate}, or look for examples that do not belong"
            )

    def _take_over(self) -> None:
        """Let an earlier run to the same folder, stopped but still in memory, save a last time."""
        if earlier := _OPEN.get(self.folder):
            earlier.save()
            earlier.folder = None
        _OPEN[self.folder] = self

    def _resume(self) -> None:
        try:
            with safe_open(self.unfinished / OPTIMIZER, "pt") as file:
                facts = file.metadata()
                moments = {key: file.get_tensor(key) for key in file.keys()}
        except Exception as error:
            raise ValueError(
                f"the unfinished run in '{self.unfinished}' cannot be read ({error}); delete the "
                "folder to begin anew"
            ) from error
        if facts["digest"] != self.digest:
            raise ValueError(
                f"'{self.unfinished}' holds {facts['step']} steps of a run with other settings or "
                "data; give those to go on with it, or delete the folder to begin anew"
            )
        self.roles.load(self.role, self.unfinished, trainable=True)
        self.parameters = self.roles.parameters(self.role)
        self.step = self.saved = int(facts["step"])
        self.seconds = float(facts["seconds"])
        restore_adam(self.parameters, self.optimizer, moments, self.step)
