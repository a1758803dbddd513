"""The checks of lesson 04: one role after the other, shaped rewards, the bytes of four roles."""

import functools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from rlhf_helpers import losses
from rlhf_helpers.base import NF4_BLOCK
from rlhf_helpers.checks.changes import miscounted
from rlhf_helpers.checks.exercise import (
    NOT_ATTEMPTED,
    Exercise,
    call,
    check,
    each,
    same,
    texts,
    unattempted,
    wrapped,
)
from rlhf_helpers.checks.lesson_01 import ADAPTERS
from rlhf_helpers.checks.lesson_01 import SAY as SAY_01
from rlhf_helpers.checks.lesson_03 import drawn
from rlhf_helpers.memory import NF4_SUPERBLOCK
from rlhf_helpers.roles import Roles

SAY = texts("""
cut_off (place): nowhere where a response fills its row, as if it had no end
amount: the score is {}. It is paid once and in full; β is the price of a nat of the penalty,
    which every token pays, the last one too.
scaled_score (amount): multiplied by β
score_only_scaled (amount): multiplied by β, and the penalty is not
shared_out (amount): divided among the tokens
replaced (amount): put in place of the penalty at the last token, not added to it
order: {}. A backward pass adds to what is there, left over or not. For each role clear its
    gradients, head included, go backward once, and step once with its optimizer as it is.
no_backward (order): the loss of {role} gets no backward pass
backward_twice (order): there are two backward passes through {role} in one step
no_step (order): the optimizer of {role}, the one that was handed over, takes no step
steps_twice (order): the optimizer of {role} steps more than once in a call
step_first (order): {role} steps before its backward pass
cleared_between (order): the gradients of {role} are cleared between its backward pass and its step
not_cleared (order): the gradients of {role} are never cleared
cleared_last (order): the gradients of {role} are cleared after the step only
head_left (order): the gradient of the head of {role} is not cleared; those of its adapter are
unit: it is not in bytes, but in {}. Return bytes, and divide where you print.
thousands (unit): MB or GB; a GB is 10⁹ bytes
powers_of_two (unit): MiB or GiB; a GiB is 2³⁰ bytes, 7% more than a GB
roles: it is counted as if {}. The base is there once and frozen, and each role has an adapter; the
    shapes are those of one block, of which there are layers, and trains says who learns.
own_bases (roles): every role has a base of its own
no_adapters (roles): the adapters are left out
one_adapter (roles): all roles have one adapter, or all trained ones, or all frozen ones
trains_ignored (roles): there are always two trained roles and two frozen ones
one_block (roles): base or adapters are counted for one block
own_parts (roles): every role, or every trained or frozen one, has its own part of the base
by_name (roles): its name says whether a role is trained
by_place (roles): its place among the others says whether a role is trained
other_in_blocks (roles): what lies outside of the blocks is counted for each of them
equal_shapes_once (roles): layers of equal shape are counted once
term: the log-ratio is taken {}. Plain and with both signs it is log π - log π_ref, whose mean over
    what the policy samples is the KL.
third (term): as ρ - 1 - log ρ, the estimate k3 of lesson 05 and approx_kl in lesson 03
probabilities (term): as a difference of probabilities, not of logarithms
weighted (term): weighed with a probability, which the sampling has done already
no_reference (term): without the reference
quotient (term): as a quotient of logarithms, not as their difference
mean_of_batch (share): a mean over other responses or padding as well
everywhere (place): at every token
last_column (place): in the last column, be it padding or not
late (place): one column too late, behind the last real token
early (place): one token too early
first (place): at the first token
every_row (place): for every row at the last token of each
dropped: {} before the first backward pass. By then PEFT has switched requires_grad off for the role
    used first; autograd looks at that flag when it goes backward and drops its gradients without a
    word, and Roles raises an error. Be done with one role's backward pass before you use the next.
summed (dropped): the losses are added up, and one backward pass runs through both roles, both used
forwards_first (dropped): both forward passes come
not_used: the loss of {role} is computed as {active}. Whichever role was used last acts, whatever
    the loss is called; roles.use has to come before the loss, and it returns the model.
carried: the second backward pass runs through the first role's graph again, which is freed already.
    A total that is added to from role to role does that: call backward on each role's own loss.
frozen_role: {role} is asked for a loss, an optimizer or parameters, but it is frozen and has none.
    Go through the roles that have a loss, not through all that there are.
left_out: {role} learns nothing: its loss is not computed. Every role that has a loss gets a step.
model_cleared: it is the model's zero_grad. That clears the adapters of all roles at once, also
    gradients that a step still needs, and never the heads, which lie outside the model. Each role's
    optimizer knows what is its own.
unknown_order: the weights after three steps are not those of roles trained alone, and not in a way
    that this check has a name for. Compare what was done, in order, and look for anything that
    changes a loss, which may be negative, or a gradient, as clipping does:
thawed: the roles move as they should, but the base is left with requires_grad on. It is frozen and
    shared; with the flag on, each backward pass computes gradients of all of it too.
returned: the roles move as they should, but something is returned, and the caller was promised
    nothing. The step is in the weights.
retained: the second backward pass runs through the first role's graph once more. retain_graph keeps
    that graph from being freed, but its role is no longer the active one, and Roles raises an
    error. A total that is added to does that: call backward on each role's own loss.
names_written_in: it holds for a policy and a value model, but not for three roles of other names.
    Names, or their number, are written into the function: go through the roles that have a loss.
one_optimizer: the optimizer of {role} steps for both roles, and the other role never moves. Each
    role has an optimizer of its own, to be looked up by its name.
paired: the loss of {role} is followed by a step of {other}. Losses and optimizers are paired by
    their order, which need not be the same, or by a sorted one: look both up by the role's name.
clipped: the gradients of {role} are made smaller between the backward pass and the step, as by
    clipping. What is clipped here depends on which roles there are; none are to be clipped.
loss_changed: the loss of {role} is changed before its backward pass: its slope arrives {factor}. A
    loss may be negative, so that no clamp, abs or square fits it, and no number divides it.
wrong_sign: the penalty is paid out. A token that the policy likes better than the reference does
    must cost something: check the minus, and which of the two is subtracted from which.
place: the score stands {}. It is paid once for a response, at its own last real token, where the
    mask is 1 for the last time: of n tokens that one has the index n - 1.
share: every token pays {}. A token that left the reference has to pay for itself, and for no other.
at_the_end: the whole penalty is charged at the last token. The sum is right, but no token can see
    what it cost; each pays its own part, where it arises.
half_masked: one of the two log-probabilities is masked, the other is not; look at the brackets. At
    padding the other one is left over, and counts.
""")

# --- lesson 04: one role after the other -----------------------------------------------------

_TRAINED = ("policy", "value")
_OTHERS = ("actor", "critic", "sft")  # trained roles of other names, and another number
_FROZEN = ("reference", "reward")
_CALLS = 3  # so that gradients can pile up


def train_step(
    roles: Roles,
    losses: Mapping[str, Callable[[nn.Module], Tensor]],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> None:
    """One step of every trained role on its own loss, one role after the other.

    Args:
        roles: one base with an adapter for each role.
        losses: for each role that learns, a function of the model that acts as it.
        optimizers: for the same roles.

    Derived in lesson 04.
    """
    for role, loss_of in losses.items():
        optimizers[role].zero_grad()
        loss_of(roles.use(role)).backward()
        optimizers[role].step()


def check_train_step(fn: Callable[[Roles, Mapping, Mapping], None]) -> None:
    """Check the learner's `train_step(roles, losses, optimizers)`.

    It runs on a small imitation of `Roles` that notes each use, loss, backward pass, zero_grad and
    step, and loses gradients as PEFT does. Right is what moves every role as if it were alone,
    leaves the base frozen and returns nothing; the notes serve to name what went wrong.

    Args:
        fn: takes roles, and for each trained role a loss, a function of the model, and an
            optimizer.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_train_step(train_step)
        train_step: correct. Tested: 3 steps of two roles, a head, a negative loss, old gradients.
    """
    print(wrapped(f"{TRAIN_STEP.name}: {_step_verdict(fn)}"))


def _step_verdict(fn: Callable) -> str:
    if fn is ...:
        return NOT_ATTEMPTED
    if not callable(fn):
        return f"give the check the function itself, not a result; it got {fn!r}."
    recorder = _Recorder()
    fault = _run(recorder, fn)
    if not fault and not same(recorder.weights(), _expected_weights()):
        fault = _order_fault(recorder.calls[0]) or SAY.unknown_order
    fault = fault or _lucky_fault(recorder.log) or _names_fault(fn)
    fault = fault or (SAY.thawed if recorder.model.base.requires_grad else recorder.returned)
    if fault in ("", NOT_ATTEMPTED):
        return fault or f"correct{_both_graphs(recorder.log)}. Tested: {TRAIN_STEP.tested}."
    return f"{fault}\n{_sequence('yours', recorder.calls[0])}\n{_sequence('expected', _steps())}"


def _run(recorder: "_Recorder", fn: Callable) -> str:
    """Call `fn` a few times; the fault that an exception shows, "" if nothing was raised."""
    named = []

    @functools.wraps(fn)  # so that the check finds the learner's code
    def guarded(*arguments):
        try:
            return fn(*arguments)
        except Exception as error:
            named.append(_raised_fault(recorder.log, error))
            if not named[-1]:
                raise

    for _ in range(_CALLS):
        recorder.calls.append([])
        with _Passes(recorder):
            result = call(TRAIN_STEP, guarded, recorder.arguments())
        if result is ... or named:
            return unattempted(fn) if result is ... else named[0]
        recorder.returned = "" if result is None else SAY.returned
    return ""


def _lucky_fault(log: Sequence["_Event"]) -> str:
    """What the imitation lets pass, and real roles and optimizers do not."""
    if any(event.what == "backward" and event.role != event.active for event in log):
        return SAY.retained
    idle = [role for role in _TRAINED if not _places(log, "step", role)]
    return SAY.no_step.format(role=idle[0]) if idle else ""


def _names_fault(fn: Callable) -> str:
    """Whether it holds for other roles too."""
    recorder = _Recorder(_OTHERS)
    try:
        for _ in range(_CALLS):
            recorder.calls.append([])
            fn(*recorder.arguments())
        right = same(recorder.weights(), _expected_weights(_OTHERS))
    except Exception:  # a name or a number that is not there
        right = False
    return "" if right else SAY.names_written_in


class _Event(NamedTuple):
    what: str
    role: str
    active: str


class _Recorder:
    """An imitation of `Roles` with two weights for each role; it notes what is done with it."""

    def __init__(self, trained: tuple[str, ...] = _TRAINED) -> None:
        self.trained = trained
        self.calls: list[list[_Event]] = []
        self.returned = ""  # what to say about it
        self.active = "reward"  # the role that scored the responses acted last
        self.model = _Model(self)
        self.heads = {trained[1]: Parameter(torch.tensor([0.25, 0.5]))}
        self.losses = _OfTrained(self, {role: _Loss(self, role) for role in trained})
        backwards = reversed(trained)  # so that the order does not tell which is whose
        self.optimizers = _OfTrained(self, {role: _SGD(self, role) for role in backwards})
        for parameter in (p for role in trained for p in self.parameters(role).values()):
            parameter.grad = torch.full_like(parameter, 3.0)  # left over from elsewhere

    def __repr__(self) -> str:
        return f"Roles({', '.join(self.names)})"

    @property
    def log(self) -> list[_Event]:
        return self.calls[-1]

    @property
    def names(self) -> list[str]:
        return [*self.trained, *_FROZEN]

    def note(self, what: str, role: str = "") -> None:
        if self.calls:
            self.log.append(_Event(what, role, self.active))

    def use(self, name: str) -> nn.Module:
        if name not in self.names:
            raise ValueError(f"there is no role {name!r}; there are {self.names}; add it first")
        self.active = name
        self.note("use", name)
        return self.model

    def parameters(self, name: str) -> dict[str, Parameter]:
        if name not in self.trained:
            self.note("frozen", name)
            raise ValueError(f"role {name!r} is frozen; add a copy of it with trainable=True")
        head = {"head": self.heads[name]} if name in self.heads else {}
        return {"adapter": self.model.adapters[name], **head}

    def arguments(self) -> tuple:
        return self, self.losses, self.optimizers

    def weights(self) -> Tensor:
        adapters = [self.model.adapters[role] for role in self.names]
        return torch.stack([*adapters, *self.heads.values()])

    def backward(self, role: str, gradient: Tensor) -> Tensor:
        self.note("backward", role)
        return gradient if role == self.active else torch.zeros_like(gradient)

    def note_left_over(self, role: str) -> None:
        """Note the gradients that a backward pass which begins now would add to."""
        for name, parameter in self.parameters(role).items():
            if parameter.grad is not None and parameter.grad.any():
                self.note(f"{name} left", role)


class _Model(nn.Module):
    """What `use` returns: it answers with the weights of the active role."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.base = Parameter(torch.zeros(2), requires_grad=False)
        self.adapters = nn.ParameterDict(
            {
                role: Parameter(torch.tensor(start), requires_grad=role in recorder.trained)
                for role, start in zip(recorder.names, cycle(([0.5, -0.25], [0.75, 0.5])))
            }
        )
        self.recorder = recorder

    def forward(self) -> Tensor:
        role = self.recorder.active
        output = self.base + self.adapters[role]
        if output.requires_grad:
            output.register_hook(partial(self.recorder.backward, role))
        return output

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.recorder.note("model.zero_grad")
        super().zero_grad(set_to_none)


class _Loss:
    """Half the squared distance of the role's weights, and its head's, from a target far away.

    So gradients are longer than what is usually clipped. The policy's loss is negative.
    """

    def __init__(self, recorder: _Recorder, role: str) -> None:
        self.recorder, self.role = recorder, role

    def __repr__(self) -> str:
        return f"<loss of {self.role}>"

    def __call__(self, model: nn.Module) -> Tensor:
        self.recorder.note("loss", self.role)
        off = model() + self.recorder.heads.get(self.role, 0) - 20
        loss = 0.5 * off.square().sum() - (1000 if self.role == self.recorder.trained[0] else 0)
        if loss.requires_grad:
            loss.register_hook(self.arrives)
        return loss

    def arrives(self, gradient: Tensor) -> None:
        self.recorder.note_left_over(self.role)
        if gradient != 1:
            self.recorder.note(f"times {float(gradient):.3g}", self.role)


class _SGD:
    def __init__(self, recorder: _Recorder, role: str) -> None:
        self.recorder, self.role = recorder, role
        self.param_groups = [{"params": list(recorder.parameters(role).values()), "lr": 0.2}]
        self.made = {}  # gradients as the last backward pass left them
        for parameter in self.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(
                lambda p: self.made.update({p: p.grad.clone()})
            )

    def __repr__(self) -> str:
        return f"<optimizer of {self.role}>"

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.recorder.note("zero_grad", self.role)
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else closure()
        self.recorder.note("step", self.role)
        own = self.param_groups[0]["params"]
        if any(
            p.grad is not None and (p.grad.abs() < self.made.get(p, 0 * p).abs() - 1e-4).any()
            for p in own
        ):
            self.recorder.note("smaller", self.role)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data -= self.param_groups[0]["lr"] * parameter.grad
        return loss


class _OfTrained(dict):
    """Something for each trained role; it notes a question for that of a frozen one."""

    def __init__(self, recorder: _Recorder, items: dict) -> None:
        super().__init__(items)
        self.recorder = recorder

    def __missing__(self, role: str) -> None:
        if role in self.recorder.names:
            self.recorder.note("frozen", role)
        raise KeyError(role)

    def __reduce__(self) -> tuple:
        return type(self), (self.recorder, dict(self))


class _Passes(TorchFunctionMode):
    """Notes each call of `backward`, which may go through several roles."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.backward:
            self.recorder.note("pass")
        return func(*args, **(kwargs or {}))


def _expected_weights(trained: tuple[str, ...] = _TRAINED) -> Tensor:
    recorder = _Recorder(trained)
    for _ in range(_CALLS):
        train_step(*recorder.arguments())
    return recorder.weights()


def _steps() -> list[_Event]:
    recorder = _Recorder()
    recorder.calls.append([])
    train_step(*recorder.arguments())
    return recorder.log


def _sequence(whose: str, events: Sequence[_Event]) -> str:
    """The events of one call on a few lines."""
    hidden = ("pass", "frozen", "adapter left", "head left", "smaller")
    seen = (e for e in events if e.what not in hidden and not e.what.startswith("times"))
    phrases = [_phrase(event) for event in seen]
    text = ", ".join(phrase.replace(" ", "~") for phrase in phrases) or "nothing"
    first, other = f"  {whose:10}", " " * 12
    filled = textwrap.fill(text, 100, initial_indent=first, subsequent_indent=other)
    return filled.replace("~", " ")  # so that a phrase stays on one line


def _phrase(event: _Event) -> str:
    if event.what == "loss" and event.role != event.active:
        return f"loss {event.role} computed as {event.active}"
    if event.what == "backward" and event.role != event.active:
        return f"backward {event.role} while {event.active} is active"
    return f"{event.what} {event.role}".rstrip()


def _raised_fault(log: Sequence[_Event], error: Exception) -> str:
    """The mistake that led to the exception, "" if it has no name."""
    for event in log:
        if event.what == "frozen":
            return SAY.frozen_role.format(role=event.role)
    if isinstance(error, RuntimeError):
        if "second time" in str(error):
            return SAY.carried
        return next(_not_used(log), "")
    return ""


def _not_used(log: Sequence[_Event]) -> Iterator[str]:
    for event in log:
        if event.what == "loss" and event.role != event.active:
            yield SAY.not_used.format(role=event.role, active=event.active)


def _order_fault(log: Sequence[_Event]) -> str:
    """What is wrong with one call, "" if nothing has a name."""
    for role in _TRAINED:
        if not _places(log, "loss", role):
            return SAY.left_out.format(role=role)
    if fault := next(_not_used(log), ""):
        return fault
    if any(event.what == "backward" and event.role != event.active for event in log):
        return SAY.summed if len(_places(log, "pass", "")) == 1 else SAY.forwards_first
    cleared = {event.role for event in log if event.what == "zero_grad"}
    if _places(log, "model.zero_grad", "") and cleared != set(_TRAINED):
        return SAY.model_cleared
    steps, backward = ([e.role for e in log if e.what == what] for what in ("step", "backward"))
    if len(steps) > 1 and len(set(steps)) == 1 and set(backward) == set(_TRAINED):
        return SAY.one_optimizer.format(role=steps[0])
    order = [(e.what, e.role) for e in log if e.what in ("step", "backward")]
    if [what for what, _ in order] == ["backward", "step"] * 2 and order[0][1] != order[1][1]:
        return SAY.paired.format(role=order[0][1], other=order[1][1])
    return next(filter(None, (_role_fault(log, role) for role in _TRAINED)), "")


def _role_fault(log: Sequence[_Event], role: str) -> str:
    backward, steps = _places(log, "backward", role), _places(log, "step", role)
    cleared = _places(log, "zero_grad", role)
    if not backward:
        return SAY.no_backward.format(role=role)
    if len(backward) > 1:
        return SAY.backward_twice.format(role=role)
    if not steps:
        return SAY.no_step.format(role=role)
    if len(steps) > 1:
        return SAY.steps_twice.format(role=role)
    if steps[0] < backward[0]:
        return SAY.step_first.format(role=role)
    if any(backward[0] < place < steps[0] for place in cleared):
        return SAY.cleared_between.format(role=role)
    if _places(log, "adapter left", role):
        return (SAY.cleared_last if cleared else SAY.not_cleared).format(role=role)
    if factor := next((e.what for e in log if e.what.startswith("times") and e.role == role), ""):
        return SAY.loss_changed.format(role=role, factor=factor)
    if _places(log, "smaller", role):
        return SAY.clipped.format(role=role)
    return SAY.head_left.format(role=role) if _places(log, "head left", role) else ""


def _both_graphs(log: Sequence[_Event]) -> str:
    """What a right answer is told that has two graphs in memory."""
    first = [event for event in log if event.what in ("loss", "backward")][:2]
    if {event.what for event in first} != {"loss"} or first[0].role == first[1].role:
        return ""
    return (
        ", but both graphs are in memory at once: the second forward pass comes before the first "
        "backward pass"
    )


def _places(log: Sequence[_Event], what: str, role: str) -> list[int]:
    return [place for place, e in enumerate(log) if e.what == what and e.role == role]


TRAIN_STEP = Exercise(
    "train_step",
    train_step,
    (),
    (),
    tested="3 steps of two roles, a head, a negative loss, old gradients",
)


# --- lesson 04: the reward of each token -----------------------------------------------------


def check_shape_rewards(fn: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check the learner's `shape_rewards(scores, logprobs, ref_logprobs, response_mask, beta)`.

    Args:
        fn: returns `[B, T]`, as `rlhf_helpers.losses.shape_rewards` with k1 does.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_shape_rewards(losses.shape_rewards)
        shape_rewards: correct. Tested: padding, full rows, EOS alone, β 0 to 1, log-ratios of ±8.
    """
    check(SHAPE_REWARDS, fn)


def _shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    return losses.shape_rewards(scores, logprobs, ref_logprobs, response_mask, beta)


def last_token(mask: Tensor) -> Tensor:
    """1 at the last real token of each row."""
    return mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))


def _at(mask: Tensor, step: int, at_end: Callable) -> Tensor:
    """1 `step` columns behind the last real token; `at_end` of place and length says where else."""
    length = mask.shape[1]
    places = at_end(mask.sum(1, keepdim=True) - 1 + step, length)
    return (torch.arange(length) == places).long()


def _column(number: int | Tensor, mask: Tensor) -> Tensor:
    one = torch.zeros_like(mask)
    one[:, number] = 1
    return one


def _other_penalty(of: Callable, scores, new, ref, mask, beta) -> Tensor:
    """The score at the right place, with another penalty of log-probabilities, mask and β."""
    return scores[:, None] * last_token(mask) - of(new, ref, mask, beta)


def _other_place(place: Callable, scores, new, ref, mask, beta) -> Tensor:
    """The right penalty, with the score where `place(mask)` says, and so often."""
    return scores[:, None] * place(mask) - beta * (new - ref) * mask


def _unmasked(place: Callable, sign: int, scores, new, ref, mask, beta) -> Tensor:
    """The penalty at padding too."""
    return scores[:, None] * place(mask) - sign * beta * (new - ref)


def _in_place_of_penalty(place: Callable, scores, new, ref, mask, beta) -> Tensor:
    """The score instead of the penalty at its token."""
    one = place(mask)
    return torch.where(one.bool(), scores[:, None], -beta * (new - ref) * mask)


def case_of_odds(scores: list, ratios: list, mask: list, beta: float) -> tuple:
    """A case of given ratios π/π_ref."""
    ratio = torch.tensor(ratios)
    ref = torch.linspace(0.05, 0.2, ratio.numel()).reshape(ratio.shape)
    return torch.tensor(scores), (ref * ratio).log(), ref.log(), torch.tensor(mask), beta


_REWARD_CASES = (
    (
        torch.tensor([2.0]),
        torch.tensor([[0.5, 0.2, 0.9]]).log(),  # 0.9 is padding
        torch.tensor([[0.25, 0.4, 0.3]]).log(),
        torch.tensor([[1, 1, 0]]),
        0.1,
    ),
    case_of_odds(
        [1.5, -2.0, 0.5],
        [[3.0, 0.5, 1.5, 2.0], [0.25, 2.0, 4.0, 0.4], [1.25, 3.0, 0.2, 0.7]],
        [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
        0.5,
    ),
    (
        torch.tensor([-1.0, 3.0]),
        -drawn(2, 6, seed=4).abs(),
        -drawn(2, 6, seed=5).abs(),
        torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]),
        0.2,
    ),
    case_of_odds([0.7], [[2.0, 0.5, 3.0]], [[1, 1, 0]], 0.0),
    (  # numbers that a clamp would cut off
        torch.tensor([6.0, -6.0]),
        torch.tensor([[-0.5, -9.0, -1.0], [-9.0, -0.5, -1.0]]),
        torch.tensor([[-8.5, -1.0, -1.0], [-1.0, -8.5, -1.0]]),
        torch.tensor([[1, 1, 0], [1, 1, 1]]),
        1.0,
    ),
)

OTHER_LOG_RATIOS = (
    (lambda new, ref: (ref - new).exp() - 1 - (ref - new), SAY.third),
    (lambda new, ref: new.exp() - ref.exp(), SAY.probabilities),
    (lambda new, ref: new.exp() * (new - ref), SAY.weighted),
    (lambda new, ref: -new, SAY.no_reference),
    (lambda new, ref: new / ref, SAY.quotient),
)
_REWARD_MISTAKES = (
    (partial(_other_penalty, lambda new, ref, m, b: b * (ref - new) * m), SAY.wrong_sign),
    (partial(_other_place, lambda mask: mask), SAY.everywhere),
    (partial(_other_place, torch.ones_like), SAY.everywhere),
    (partial(_other_place, lambda mask: _column(-1, mask)), SAY.last_column),
    (partial(_other_place, lambda mask: _column(-1, mask) * mask), SAY.last_column),
    *(
        (partial(other, lambda mask, step=step, end=end: _at(mask, step, end)), message)
        for other in (_other_place, _in_place_of_penalty)
        for step, message in ((1, SAY.late), (-1, SAY.early))
        for end in (lambda x, n: x.clamp(0, n - 1), lambda x, n: x, lambda x, n: x % n)
    ),
    (partial(_unmasked, torch.ones_like, 1), SAY.everywhere),
    (partial(_unmasked, last_token, -1), SAY.wrong_sign),
    (partial(_unmasked, lambda mask: _column(-1, mask), -1), SAY.wrong_sign),
    *(
        (partial(_other_penalty, lambda *x, of=of: x[3] * of(*x[:3]) * x[2]), message)
        for of, message in (
            *((lambda new, ref, m, f=f: f(new, ref), message) for f, message in OTHER_LOG_RATIOS),
            (lambda new, ref, m: ((new - ref) * m).mean(), SAY.mean_of_batch),
            (
                lambda new, ref, m: ((new - ref) * m).sum(1, keepdim=True) * last_token(m),
                SAY.at_the_end,
            ),
        )
    ),
    (lambda s, new, ref, m, b: _shape_rewards(b * s, new, ref, m, b), SAY.scaled_score),
    (lambda s, new, ref, m, b: _shape_rewards(b * s, new, ref, m, 1.0), SAY.score_only_scaled),
    (partial(_in_place_of_penalty, last_token), SAY.replaced),
    (partial(_in_place_of_penalty, lambda mask: _column(-1, mask)), SAY.last_column),
    *each(
        SAY.half_masked,
        _other_penalty,
        lambda new, ref, m, b: b * (new - ref * m),
        lambda new, ref, m, b: b * (new * m - ref),
    ),
    (partial(_other_place, lambda mask: last_token(mask) * (1 - mask[:, -1:])), SAY.cut_off),
    (partial(_other_place, lambda mask: _column(0, mask)), SAY.first),
    (partial(_other_place, lambda mask: mask / mask.sum(1, keepdim=True)), SAY.shared_out),
    (partial(_other_place, lambda mask: _column(mask.sum(1) - 1, mask)), SAY.every_row),
    (lambda s, new, ref, m, b: s @ last_token(m).float() - b * (new - ref) * m, SAY.every_row),
)
SHAPE_REWARDS = Exercise(
    "shape_rewards",
    _shape_rewards,
    _REWARD_CASES,
    _REWARD_MISTAKES,
    tested="padding, full rows, EOS alone, β 0 to 1, log-ratios of ±8",
    shape_hint="It is one number for each token of each response.",
)


# --- lesson 04: the bytes of four roles ------------------------------------------------------

_NF4_BITS = 4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * NF4_SUPERBLOCK)


def predict_bytes(
    shapes: Sequence[tuple[int, int]], layers: int, other: int, rank: int, trains: dict[str, bool]
) -> float:
    """Bytes of adapters on one NF4 base, from a model's sizes.

    Args:
        shapes: (out, in) of the linear layers of one block.
        layers: blocks of the model.
        other: weights outside of them, embeddings, norms and biases.
        rank: of the adapters on all of these linear layers.
        trains: for each role whether it is trained.

    Returns:
        The bytes, without scalar heads and what grows with the batch; `memory.memory_table` has it
        exactly.

    Derived in lesson 04.
    """
    linear = layers * sum(outputs * inputs for outputs, inputs in shapes)
    adapter = layers * rank * sum(outputs + inputs for outputs, inputs in shapes)
    adapters = sum(16 if trained else 4 for trained in trains.values()) * adapter
    return _NF4_BITS / 8 * linear + 2 * other + adapters


def check_predict_bytes(fn: Callable[[Sequence, int, int, int, dict], float]) -> None:
    """Check the learner's `predict_bytes(shapes, layers, other, rank, trains)`.

    A prediction within 5% passes, so scales may be forgotten (3%), and rounding does not matter.

    Args:
        fn: returns a number of bytes, as `predict_bytes` of this module.

    Raises:
        Exception: whatever `fn` raises, after a report of the call and the line.

    Example:
        >>> check_predict_bytes(predict_bytes)
        predict_bytes: correct. Tested: ranks 1 to 256, 2 to 5 roles, 0 to 3 trained, within 5%.
    """
    check(PREDICT_BYTES, fn)


def _near(result: float, expected: float, tolerance: float = 0.05) -> bool:
    return abs(result / expected - 1) <= tolerance


def _nearest_mistake(results: Sequence[float]) -> str:
    """The message of the mistake whose results are nearest, or what is counted wrongly."""
    cases = PREDICT_BYTES.cases
    for tolerance in (0.001, 0.01, 0.04):
        for wrong, message in _BYTES_MISTAKES:
            made = (wrong(*case) for case in cases)
            if all(_near(x, y, tolerance) for x, y in zip(results, made, strict=True)):
                return message
    return miscounted(_COUNTS, [_terms(*case) for case in cases], results, within=0.005)


def _terms(shapes, layers: int, other: int, rank: int, trains: Mapping[str, bool]) -> list[float]:
    """What the counts are multiplied by; bits as bytes."""
    linear, adapter = layers * sum(o * i for o, i in shapes), layers * _a_and_b(shapes, rank)
    trained = sum(trains.values())
    return [linear / 8, other, trained * adapter, (len(trains) - trained) * adapter]


def _a_and_b(shapes, rank: int) -> float:
    return rank * sum(outputs + inputs for outputs, inputs in shapes)


def _once(trains: Mapping) -> int:
    return 1


def _told(told: Callable, trains: Mapping) -> int:
    """16 for each role that `told` says is trained, by number, name and how many, and else 4."""
    return sum(16 if told(i, name, len(trains)) else 4 for i, name in enumerate(trains))


def _other_count(
    shapes,
    layers,
    other,
    rank,
    trains,
    *,
    of_adapter: Callable = _a_and_b,
    base_times: tuple[Callable, Callable] = (_once, _once),
    of_roles: Callable = lambda trains: sum(16 if on else 4 for on in trains.values()),
    blocks: tuple[bool, bool] = (True, True),
    picks: tuple[Callable, Callable] = (list, list),
) -> float:
    """The prediction with one thing counted otherwise."""
    in_base, in_adapters = (layers if counted else 1 for counted in blocks)
    of_base, of_adapters = (pick(shapes) for pick in picks)
    base = _NF4_BITS / 8 * in_base * sum(outputs * inputs for outputs, inputs in of_base)
    adapters = of_roles(trains) * in_adapters * of_adapter(of_adapters, rank)
    return base_times[0](trains) * base + base_times[1](trains) * 2 * other + adapters


_COUNTS = (
    ("bits of a weight in a linear layer", _NF4_BITS, "a code, and a little for the scales"),
    ("bytes of a weight outside of those", 2, "16 bits, not quantized"),
    ("bytes of a trained parameter", 16, "a float32 each for weight, gradient and two moments"),
    ("bytes of a frozen role's parameter", 4, "a float32 for the weight, and nothing is learnt"),
)
_FOUR = {"policy": True, "reference": False, "reward": False, "value": True}
_ATTENTION = ((1536, 1536), (256, 1536), (256, 1536), (1536, 1536))  # Qwen2.5-1.5B's
_MLP = ((8960, 1536), (8960, 1536), (1536, 8960))
_BYTES_CASES = (
    ([(64, 64)], 1, 100, 1, {"policy": True, "reference": False}),
    ([*_ATTENTION, *_MLP], 28, 233_518_592, 16, _FOUR),
    ([(4096, 4096), (11008, 4096)], 32, 1_000_000, 1, _FOUR),  # nearly all of it is the base
    ([(1024, 512), (2048, 512)], 4, 10_000, 256, _FOUR | {"reward": True}),
    ([(512, 1024)], 2, 10_000, 128, {"policy": True, "reference": False, "reward": False}),
    ([(256, 256), (256, 1024)], 2, 50_000_000, 8, _FOUR),  # nearly all of it is embeddings
    ([(512, 512)] * 3, 2, 10_000, 256, dict.fromkeys((*_FOUR, "sft"), False) | {"policy": True}),
    ([(512, 512)], 2, 10_000, 256, dict.fromkeys(("policy", "value"), True)),
    ([(512, 512)], 2, 10_000, 256, dict.fromkeys(("reference", "reward"), False)),
)

_BYTES_MISTAKES = (
    (
        lambda shapes, layers, other, *rest: predict_bytes(shapes, layers, layers * other, *rest),
        SAY.other_in_blocks,
    ),
    (partial(_other_count, base_times=(len, len)), SAY.own_bases),
    *(
        (partial(_other_count, base_times=times), SAY.own_parts)
        for of in (len, lambda trains: sum(trains.values()), lambda t: len(t) - sum(t.values()))
        for times in ((of, _once), (_once, of), (of, of))
        if times != (len, len)
    ),
    *(
        (partial(_other_count, of_roles=partial(_told, told)), message)
        for told, message in (
            *((lambda i, name, n, k=k: name in k, SAY.by_name) for k in (_TRAINED, _TRAINED[:1])),
            (lambda i, name, n: name not in _FROZEN, SAY.by_name),
            *((lambda i, name, n, k=k: i < k, SAY.by_place) for k in (1, 2)),
            *((lambda i, name, n, k=k: i >= n - k, SAY.by_place) for k in (1, 2)),
            (lambda i, name, n: i in (0, n - 1), SAY.by_place),
        )
    ),
    (partial(_other_count, of_roles=lambda trains: 0), SAY.no_adapters),
    *(
        (partial(_other_count, of_roles=of), SAY.one_adapter)
        for of in (
            lambda trains: 16,
            lambda trains: 16 * sum(trains.values()) + 4 * (not all(trains.values())),
            lambda trains: 16 * any(trains.values()) + 4 * list(trains.values()).count(False),
        )
    ),
    (partial(_other_count, of_roles=lambda trains: 40), SAY.trains_ignored),
    *(
        (
            partial(_other_count, of_adapter=lambda x, rank, of=of: sum(of(*s, rank) for s in x)),
            SAY_01.of_a_layer.format(how),
        )
        for how, of in ADAPTERS
    ),
    *(
        (partial(_other_count, picks=picks), message)
        for pick, message in (
            (set, SAY.equal_shapes_once),
            (lambda shapes: shapes[1:], SAY_01.layer_left_out.format("first")),
            (lambda shapes: shapes[:-1], SAY_01.layer_left_out.format("last")),
        )
        for picks in ((pick, pick), (pick, list), (list, pick))
    ),
    *(
        (partial(_other_count, blocks=blocks), SAY.one_block)
        for blocks in ((False, True), (True, False), (False, False))
    ),
    *(
        (lambda *case, unit=unit: predict_bytes(*case) / unit, message)
        for power in (2, 3)
        for unit, message in ((1000**power, SAY.thousands), (1024**power, SAY.powers_of_two))
    ),
)
PREDICT_BYTES = Exercise(
    "predict_bytes",
    predict_bytes,
    _BYTES_CASES,
    mistakes=(),  # they are rounded, as the learner's are
    tested="ranks 1 to 256, 2 to 5 roles, 0 to 3 trained, within 5%",
    general=_nearest_mistake,
    equal=_near,
)
