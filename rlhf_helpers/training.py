"""The engine of every training run: steps, reports, saving, going on."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from rlhf_helpers import checkpoints
from rlhf_helpers.checkpoints import finish_first
from rlhf_helpers.kinds import Above, Whole
from rlhf_helpers.roles import Roles, read_safetensors
from rlhf_helpers.validation import check_fields

OPTIMIZER = "optimizer.safetensors"
KEPT = ("settings", "facts", "step", "seconds")  # with them, of a run that is saved
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

    steps: Whole[1]
    batch_size: Whole[1] = 32
    learning_rate: Above[0] = 1e-3
    warmup_steps: Whole[1] = 10
    max_grad_norm: Above[0, math.inf] = 1.0
    eval_every: Whole[1] = 25
    save_every: Whole[1] = 50

    def __post_init__(self) -> None:
        check_fields(self)
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


def backward(loss: Tensor, parameters: Sequence[Parameter], roles: Roles) -> None:
    """A loss's gradients, as `loss.backward()` gives them; small ones survive a float16 base.

    float16 rounds what is below 3e-8 to 0, and gradients of a mean over many tokens are that small.
    Through such a base the loss is scaled up, and the gradients, in float32, down again; if they
    overflow, less is tried. Nothing needs to be kept between two steps.

    Micikevicius et al., mixed precision training (arXiv 1710.03740), section 3.2.
    """
    if roles.base.get_input_embeddings().weight.dtype != torch.float16:
        loss.backward()
        return
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
    """A training run: its optimizers, where it stands, and how that is kept on disk.

    With a `folder`, a run that stops early is kept in `<folder>.unfinished`, as its two newest
    saves; a new Run of the same settings goes on from there. The finished role goes to `folder`.
    What is special to a method is its loss, and what it reports:

        for step in run.left():
            roles.use(role).train()
            norm = run.gradients(role, loss_of(step))
            with run.whole_step():
                run.apply(role)

    Args:
        trained: the roles that learn, each with an optimizer of its own; the first is the result.
        config: with `steps`, `save_every`, `max_grad_norm`, and `rate(step)`.
        settings: by name, what else the result depends on, the data for example.

    Attributes:
        step: updates that are done.
        facts: numbers that belong to where the run stands, such as an adapted β; kept with it.

    Raises:
        ValueError: if a role cannot be trained, or an unfinished run has other settings or is
            damaged.
        NotADirectoryError: if a file is in the place of the folder.
    """

    def __init__(
        self,
        roles: Roles,
        trained: Sequence[str],
        config: "TrainConfig",
        folder: Path | None,
        settings: Mapping[str, object],
    ) -> None:
        self.roles, self.trained, self.config = roles, tuple(trained), config
        self.settings = json.loads(json.dumps({**asdict(config), **settings}))
        self.step, self.seconds, self.facts = 0, 0.0, {}
        self.saved: int | None = None
        self.ended = False
        self._dirty = False  # weights have moved since the last whole step
        self._closing = False  # a step is being made whole
        self.folder = self.unfinished = None
        for role in self.trained:
            roles.require(role, trainable=True)
        tensors = {} if folder is None else self._resume(Path(folder).absolute())
        self.optimizers = {
            role: torch.optim.AdamW(roles.parameters(role).values(), weight_decay=0.0)
            for role in trained
        }
        checkpoints.restore_optimizers(self.optimizers, tensors)

    def left(self) -> Iterator[int]:
        """The steps that are left; however the loop over them ends, a whole step is kept."""
        self._begun = time.perf_counter() - self.seconds
        try:
            while self.step < self.config.steps and not self.ended:
                yield self.step
        finally:
            with finish_first():
                self.save()

    def gradients(self, role: str, loss: Tensor) -> float:
        """Compute a loss's gradients, scale them down to `max_grad_norm`, and return their length.

        Raises:
            FloatingPointError: if loss or gradient is not finite.
        """
        optimizer = self.optimizers[role]
        optimizer.zero_grad()  # an interrupted step may have left gradients
        parameters = optimizer.param_groups[0]["params"]
        with self.diverging(role):
            _check_finite("loss", loss)
            backward(loss, parameters, self.roles)
            norm = clip_grad_norm_(parameters, self.config.max_grad_norm)
            _check_finite("gradient norm", norm)
        return norm.item()

    def apply(self, role: str) -> None:
        """An optimizer's step; one of several that make a step, unless inside of `whole_step`."""
        if self.saved is None and not self._closing:
            self.save(start=True)  # to go back to, if this step stops half-way
        self._dirty = True
        for group in self.optimizers[role].param_groups:
            group["lr"] = self.config.rate(self.step)
        self.optimizers[role].step()
        self.roles.model.eval()

    @contextmanager
    def whole_step(self, last: bool = False) -> Iterator[None]:
        """What makes a step whole; a Ctrl-C waits until it is counted and, if due, saved.

        Args:
            last: the run ends here, though steps are left.
        """
        with finish_first():
            self._closing = True
            yield
            self.step += 1
            self._dirty = self._closing = False
            self.seconds = time.perf_counter() - self._begun
            self.ended = last or self.step == self.config.steps
            if self.ended or self.step % self.config.save_every == 0:
                self.save()

    def save(self, start: bool = False) -> None:
        """Keep the last whole step, if that is not done and there is a folder to keep it in."""
        nothing_done = self.step == 0 and not start
        if self.folder is None or self._dirty or self.step == self.saved or nothing_done:
            return
        if self.ended:
            self.roles.save(self.trained[0], self.folder)
            checkpoints.remove_folder(self.unfinished)
        elif not checkpoints.keep_two(self.unfinished, self.step, self._write):
            return
        self.saved = self.step

    @contextmanager
    def diverging(self, role: str, *others: type[Exception]) -> Iterator[None]:
        """Let a ValueError inside end the run, as one whose numbers diverged at that role.

        The arguments were checked at the start: what is refused in here was computed. The last
        whole step is kept.

        Args:
            others: further kinds of exceptions that end it so.
        """
        try:
            yield
        except torch.cuda.OutOfMemoryError:  # a RuntimeError too, with a message of its own
            raise
        except (ValueError, *others) as error:
            self.save()
            place = self.folder if self.ended else self.unfinished
            kept = "" if self.saved is None else f"; update {self.saved} is kept in '{place}'"
            rate = f"a learning_rate of {self.config.learning_rate}, which may be too high"
            raise FloatingPointError(
                f"the run broke off at role {role!r} after {self.step} updates, with {rate}{kept}: "
                f"{error}"
            ) from error

    def _take_over(self) -> None:
        """Let an earlier run to the same folder, stopped but still in memory, save a last time."""
        if earlier := _OPEN.get(self.folder):
            if not earlier.ended:
                earlier.save()
            earlier.folder = None
        _OPEN[self.folder] = self

    def _write(self, folder: Path) -> None:
        for role in self.trained:
            (folder / role).mkdir()
            self.roles.write(role, folder / role)
        metadata = {name: json.dumps(getattr(self, name)) for name in KEPT}
        tensors = checkpoints.optimizer_tensors(self.optimizers)
        save_file(tensors, folder / OPTIMIZER, metadata=metadata)

    def _read(self, folder: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
        """What a save says and its tensors; raises if any of its files is missing or damaged."""
        tensors, metadata = read_safetensors(folder / OPTIMIZER)
        facts = {name: json.loads(metadata[name]) for name in KEPT}
        if facts["settings"] == self.settings:  # else its roles may be others too
            for role in self.trained:
                self.roles.check_folder(folder / role, head=role in self.roles.heads)
        return facts, tensors

    def _resume(self, folder: Path) -> dict[str, Tensor]:
        """Load what the newest whole save holds; return the optimizers' tensors."""
        self.folder, self.unfinished = folder, folder.with_name(f"{folder.name}.unfinished")
        checkpoints.require_own_folder(self.folder)
        checkpoints.require_no_file(self.unfinished)
        self._take_over()
        found = checkpoints.newest_readable(self.unfinished, self._read)
        if found is None:
            return {}
        folder, (facts, tensors) = found
        self._check_settings(folder, facts["settings"])
        for role in self.trained:
            self.roles.load(role, folder / role, trainable=True)
        self.step = self.saved = facts["step"]
        self.seconds, self.facts = facts["seconds"], facts["facts"]
        return tensors

    def _check_settings(self, folder: Path, saved: dict[str, object]) -> None:
        both = {n: (saved.get(n), self.settings.get(n)) for n in saved | self.settings}
        if changed := [f"{n}: {a} there, {b} here" for n, (a, b) in both.items() if a != b]:
            raise ValueError(
                f"'{folder}' belongs to a run with other settings ({'; '.join(changed)}); give "
                f"those to go on with it, or delete '{folder.parent}' to begin anew"
            )


def fit(
    run: Run, loss_of: Callable[[int], Tensor], measure: Callable[[], Mapping[str, float]]
) -> Iterator[TrainStats]:
    """Train one role, an optimizer step for each item drawn.

    Args:
        loss_of: the loss of a step's batch, a scalar.
        measure: what to report of the held-out examples.

    Yields:
        `TrainStats`, the first before any update.

    Raises:
        FloatingPointError: if loss or gradient is not finite, or `loss_of` or `measure` refuses
            numbers that it computed (ValueError); the state before is kept.
    """
    (role,), config = run.trained, run.config
    if run.step == 0:
        run.roles.use(role)
        yield TrainStats(0, held_out=measure())
    for step in run.left():
        run.roles.use(role).train()
        with run.diverging(role):
            loss = loss_of(step)
        norm = run.gradients(role, loss)
        with run.whole_step():
            run.apply(role)
        due = run.step % config.eval_every == 0 or run.ended
        with run.diverging(role):
            held_out = measure() if due else {}
        yield TrainStats(run.step, loss.item(), held_out, norm, config.rate(step), run.seconds)


def _check_finite(name: str, value: Tensor) -> None:
    if not value.isfinite():
        raise ValueError(f"the {name} is {value.item()}")


def digest(rows: Sequence) -> str:
    """Data in a few words, by which a run knows its own again."""
    text = json.dumps(list(rows))
    return f"{len(rows)} rows, digest {hashlib.sha256(text.encode()).hexdigest()[:16]}"
