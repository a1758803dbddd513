"""What `checked` makes of a signature; each kind's messages are rows of test_bad_input."""

import doctest
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from rlhf_helpers import validation
from rlhf_helpers.examine import Alarm
from rlhf_helpers.kinds import Above, B, Finite, Mask, OneOf, T, V, Whole
from rlhf_helpers.presets import Preset, load_preset
from rlhf_helpers.validation import checked


@checked
def called(
    x: Finite[B, T],
    mask: Mask[B, T] | None = None,
    logits: Finite[..., V] | None = None,
    count: Whole[1] = 1,
    most: Above[0, math.inf] = 1.0,
    kind: OneOf["a", "b"] = "a",  # noqa: F821
    free: str = "",
):
    return "called"


GOOD = torch.zeros(2, 3)


def test_the_examples():
    assert doctest.testmod(validation).failed == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mask": torch.ones(2, 3)},
        {"mask": None, "logits": torch.zeros(7)},
        {"logits": torch.zeros(2, 3, 4, 5)},
        {"count": 3, "most": math.inf, "kind": "b", "free": 3},
    ],
)
def test_what_fits_is_let_through(arguments):
    assert called(GOOD, **arguments) == "called"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": None}, "x must be a tensor, not None"),
        ({"x": torch.zeros(2, 3, 1)}, r"x has shape \[2, 3, 1\]: it must be \[B, T\]"),
        ({"mask": torch.ones(2, 4)}, r"mask has shape \[2, 4\], x \[2, 3\]: they must be equal"),
        ({"logits": torch.zeros(())}, r"logits has shape \[\]: it must be \[\.\.\., V\]"),
        ({"count": True}, "count is True: it must be a whole number, at least 1"),
        ({"count": None}, "count is None"),
        ({"most": True}, "most is True"),
        ({"most": math.nan}, "most is nan"),
        ({"most": 0}, "most is 0: it must be a finite number above 0"),
        ({"kind": "c"}, "kind is 'c': it must be one of 'a', 'b'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        called(**{"x": GOOD} | arguments)


def test_only_what_the_mask_counts_is_looked_at():
    x, mask = torch.tensor([[1.0, math.nan, 1.0]]), torch.tensor([[1, 0, 1]])
    assert called(x, mask) == "called"
    with pytest.raises(ValueError, match=r"^x is nan at \[0, 1\]"):
        called(x, 1 - mask)
    with pytest.raises(ValueError, match=r"^x is nan at \[0, 1\]"):
        called(x)


@checked
def plain(
    whether: bool = True,
    path: str | Path | None = None,
    act: Callable[[int], int] = abs,
    named: Mapping[str, int] | None = None,
    preset: Preset | None = None,
    one_of_two: Preset | Alarm | None = None,
    several: list[Preset] = (),
    model: torch.nn.Module | None = None,
) -> Preset:
    return "called"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"whether": False, "path": "a", "act": lambda x: x, "named": {"a": 1}},
        {"path": Path("a"), "preset": load_preset("pocket"), "model": torch.nn.Identity()},
        {"one_of_two": 3, "several": 3},  # what no single kind says
    ],
)
def test_what_fits_plain_annotations_is_let_through(arguments):
    assert plain(**arguments) == "called"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"whether": None}, ValueError, "whether is None: it must be one of True, False"),
        ({"whether": "no"}, ValueError, "whether is 'no': it must be one of True, False"),
        ({"path": 3}, TypeError, "path is 3: give a path"),
        ({"path": " "}, ValueError, "path is ' ': give a path"),
        ({"act": None}, TypeError, "act is None: give a function"),
        ({"named": [1]}, TypeError, r"named is \[1\]: give a dictionary"),
        ({"preset": "pocket"}, TypeError, r"preset is 'pocket': give load_preset\(\.\.\.\)"),
        ({"model": "a"}, TypeError, "model is 'a': give a model, as load_base"),
        ({"model": "a\nb" * 99}, TypeError, r"model is '[ab\\n]{97}…: give a model"),
    ],
)
def test_what_does_not_fit_plain_annotations_is_named(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        plain(**arguments)


def test_a_long_value_is_shown_on_one_line():
    with pytest.raises(TypeError, match=r"^preset is Sequential\( \(0\): Identity\(\) \): give"):
        plain(preset=torch.nn.Sequential(torch.nn.Identity()))
