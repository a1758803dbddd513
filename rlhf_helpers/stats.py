"""Shares of a sample, and how sure one can be of them."""

import math
from collections.abc import Iterable, Sequence

from rlhf_helpers.guards import shown


def share_with_interval(hits: Sequence[bool]) -> tuple[float, float, float]:
    """The share of hits among independent trials, and its 95% confidence interval (Wilson's).

    With p = hits/n and z = 1.96 the interval is (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).
    It says where the share would settle with very many trials, not what another training run gives.

    Returns:
        share, lower end, upper end.

    Raises:
        TypeError: for what is no list.
        ValueError: if there are no trials, or one that is neither a hit nor a miss.

    Example:
        >>> [round(x, 3) for x in share_with_interval([True] * 50 + [False] * 50)]
        [0.5, 0.404, 0.596]

    Wilson 1927, Journal of the American Statistical Association 22, page 209.
    """
    if isinstance(hits, str) or not isinstance(hits, Iterable):
        raise TypeError(f"hits is {shown(hits)}: give a list of True and False")
    hits = [hit.tolist() if hasattr(hit, "tolist") else hit for hit in hits]  # of a tensor
    if not (n := len(hits)):
        raise ValueError("no trials to take a share of: give at least one")
    if bad := [i for i, hit in enumerate(hits) if hit not in (True, False)]:
        raise ValueError(f"hits[{bad[0]}] is {shown(hits[bad[0]])}: give True or False for each")
    z = 1.96
    p = sum(hits) / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
