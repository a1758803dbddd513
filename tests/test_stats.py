"""Shares with their intervals."""

import doctest

import pytest

from rlhf_helpers import stats
from rlhf_helpers.stats import share_with_interval


def test_the_example_in_the_docstring_holds():
    result = doctest.testmod(stats)
    assert result.attempted > 0 and result.failed == 0


def test_the_interval_is_wilsons():
    for hits, n, low, high in ((0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1)):
        interval = share_with_interval([True] * hits + [False] * (n - hits))
        assert interval == pytest.approx((hits / n, low, high), abs=1e-4)
    with pytest.raises(ValueError, match="no trials"):
        share_with_interval([])
