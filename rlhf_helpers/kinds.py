"""What an argument can be: the kinds that stand in signatures, which `validation.checked` reads.

Each kind is `typing.Annotated`, so a signature stays plain typing.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from rlhf_helpers.guards import first_index, in_range, refuse, shown, upcast

B, L, N, T, V = "BLNTV"  # batch, tokens with the prompt, pairs, response tokens, vocabulary
LOGPROB_TOLERANCE = 1e-4  # how far above 0 rounding may push a log-probability
SUM_TOLERANCE = 1e-3  # how far from 1 it may push the sum of a row of probabilities


class Kind:
    """What an argument must be; `Kind[...]` stands in a signature."""

    of: type = object

    def __init__(self, *spec) -> None:
        self.spec = spec

    def __class_getitem__(cls, spec):
        return Annotated[cls.of, cls(*(spec if isinstance(spec, tuple) else (spec,)))]


# --- numbers and words ---------------------------------------------------------------------


class Between(Kind):
    """A number from one bound to another: `Between[0, 1]`."""

    of = float
    words = "between {} and {}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of these."""
        return in_range(value, *self.spec)

    def check(self, name: str, value: object) -> None:
        """Raise ValueError, with the value and what to give instead."""
        if not self.fits(value):
            raise ValueError(
                f"{name} is {shown(value)}: it must be {self.words.format(*self.spec)}."
            )


class From(Between):
    """A finite number that is not below a bound: `From[0]`."""

    words = "a finite number, {} or above"


class Above(Between):
    """A finite number above a bound: `Above[0]`; `Above[0, math.inf]` takes infinity too."""

    words = "a finite number above {}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of these."""
        return in_range(value, self.spec[0], above=True) or value in self.spec[1:]


class Whole(Between):
    """A whole number, of at least a bound: `Whole[1]`."""

    of = int
    words = "a whole number, at least {}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of these."""
        return isinstance(value, int) and in_range(value, *self.spec)


class OneOf(Between):
    """One of some words: `OneOf["k1", "k2"]`."""

    of = str

    def __init__(self, *choices: str) -> None:
        super().__init__(*choices)
        self.words = f"one of {', '.join(map(repr, choices))}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of these."""
        return value in self.spec


# --- what stands for itself in a signature -------------------------------------------------


class Object(Kind):
    """An object of a class, or of several, and in words what to give."""

    def check(self, name: str, value: object) -> None:
        """Raise TypeError for another object."""
        wanted, words = self.spec
        if not isinstance(value, wanted):
            raise TypeError(f"{name} is {shown(value)}: give {words}.")


class Place(Object):
    """A path, or a text that is one."""

    def check(self, name: str, value: object) -> None:
        """Raise TypeError for what is no path, ValueError for an empty text."""
        super().check(name, value)
        if not os.fspath(value).strip():
            raise ValueError(f"{name} is {value!r}: give {self.spec[1]}.")


# Annotations that `checked` reads as kinds, beside the classes of this package.
PLAIN = {
    bool: OneOf(True, False),
    Path: Place((str, Path), "a path"),
    Callable: Object(Callable, "a function"),
    Mapping: Object(Mapping, "a dictionary"),
}
# Of classes that are not made by calling them, from wherever they are: what to give.
MADE_BY = {
    "Dataset": "a Dataset, as Dataset.from_list(rows)",
    "Figure": "a figure, as fig of fig, ax = plt.subplots()",
    "ModelSizes": "model_sizes(config)",
    "Module": "a model, as load_base(preset) or roles.use(name)",
    "PPOStats": "what train_ppo yields",
    "PreTrainedConfig": "a configuration, as AutoConfig.from_pretrained(model)",
    "PreTrainedModel": "load_base(preset)",
    "PreTrainedTokenizerBase": "load_tokenizer(preset)",
    "Preset": "load_preset(...)",
}


# --- tensors -------------------------------------------------------------------------------


class TensorKind(Kind):
    """A tensor with named dimensions, `[..., V]`; one name has one length in a call."""

    of = Tensor
    dtypes, wanted = None, ""  # any; else the dtypes, and what they are called

    def __str__(self) -> str:
        return f"[{', '.join('...' if dim is ... else dim for dim in self.spec)}]"

    def check(self, name: str, value: object) -> None:
        """Raise TypeError unless it is a tensor of such a dtype."""
        if not isinstance(value, Tensor):
            kind = "None" if value is None else type(value).__name__
            raise TypeError(f"{name} must be a tensor, not {kind}: convert with torch.tensor.")
        if self.dtypes and value.dtype not in self.dtypes:
            raise TypeError(f"{name} must be {self.wanted.format(value.dtype)}.")

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for an entry that cannot be; under a mask, if there is one."""


class Floating(TensorKind):
    """Floating-point numbers of any size."""

    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    wanted = "floating point, not {}: convert with .float()"


class Finite(Floating):
    """Floating-point numbers, neither NaN nor infinite."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for one that is not finite."""
        bad = ~value.isfinite() if mask is None else ~value.isfinite() & mask
        refuse(name, value, bad, "it must be finite; look for weights that diverged.")


class LogProbs(Floating):
    """Log-probabilities: not NaN, and not above 0 by more than rounding."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for one that is no log-probability; under a mask also for −inf."""
        if mask is not None:
            Finite.check_entries(self, name, value, mask)
            value = value.masked_fill(~mask, 0)
        refuse(name, value, value.isnan(), "look at the logits it was computed from.")
        never = "a log-probability is never above 0. Pass log-probabilities, not probabilities or"
        refuse(name, value, value > LOGPROB_TOLERANCE, f"{never} logits.")


class SampledLogProbs(LogProbs):
    """Log-probabilities of what was sampled, which are finite."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for −inf, or as `LogProbs` does."""
        super().check_entries(name, value, mask)
        why = "nothing that was sampled has probability 0; look for weights that diverged."
        refuse(name, value, value.isinf(), why)


class RefLogProbs(SampledLogProbs):
    """Those of a reference, which is fixed: without a gradient."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError if there is a gradient, or as `SampledLogProbs` does."""
        super().check_entries(name, value, mask)
        if value.requires_grad:
            raise ValueError(f"{name} requires gradients: compute it under torch.no_grad().")


class Distributions(LogProbs):
    """Log-probabilities of a whole vocabulary, in the last dimension."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for a row whose probabilities do not sum to 1."""
        sums = upcast(value.detach()).exp().sum(-1)
        bad = ~((sums - 1).abs() <= SUM_TOLERANCE)
        mend = "it must be 1. Take torch.log_softmax of the logits first."
        refuse(f"the sum of the probabilities of {name}", sums, bad, mend)
        super().check_entries(name, value, mask)


class Ids(TensorKind):
    """Token ids, int64."""

    dtypes, wanted = (torch.int64,), "int64, not {}: convert with .long()"


class Mask(TensorKind):
    """1 for what counts, else 0; in the last dimension at least one 1."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for another number, or a row without a 1."""
        refuse(name, value, (value != 0) & (value != 1), "only 0 and 1 may stand there.")
        if (row := first_index(~value.bool().any(-1))) not in (None, []):
            raise ValueError(f"{name} row {row[0]} is all zeros: drop this empty sequence.")


class Responses(Mask):
    """A mask of responses: 1 up to and including EOS, then 0."""

    def check_entries(self, name: str, value: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for a hole, or as `Mask` does."""
        super().check_entries(name, value, mask)
        holes = torch.nn.functional.pad(value[:, 1:] > value[:, :-1], (1, 0))
        refuse(name, value, holes, "a 0 stands before it. Give 1 up to and including EOS, then 0.")
