"""Fixtures that several test files share."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub must fail, not wait

import pytest

from rlhf_helpers.base import load_base
from rlhf_helpers.presets import load_preset
from rlhf_helpers.text import load_tokenizer

pytest.register_assert_rewrite("helpers_checks")  # so that a failure in it shows its values


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_interrupts():
    """In a process that a script has put in the background it would be ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_preset_from_environment(monkeypatch):
    monkeypatch.delenv("RLHF_PRESET", raising=False)


@pytest.fixture(scope="session")
def pocket():
    return load_preset("pocket")


@pytest.fixture(scope="session")
def tokenizer(pocket):
    return load_tokenizer(pocket)


@pytest.fixture(scope="session")
def base(pocket):
    """The shipped base in NF4. Shared: no test may change it."""
    return load_base(pocket)
