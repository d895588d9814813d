"""Means with confidence intervals, and tests of whether two systems differ by more than chance.

Questions about one article are not independent. With `groups`, articles are resampled instead of questions:
resampling questions would make the intervals too narrow.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 9_999
_MOST_NUMBERS: Final = 1 << 22  # numbers in memory at a time


class Estimate(NamedTuple):
    """A mean over `n` questions and its 95% interval, in the unit of the values.

    `low` and `high` are None if there are fewer than two groups.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        """`0.512 [0.463, 0.561]`."""
        if self.low is None:
            return f"{self.mean:.3f}" if self.n else "none"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Difference(NamedTuple):
    """A mean of paired differences over `n` questions, its 95% interval, and a two-sided p-value.

    `low` and `high` are None and the p-value is 1 if there are fewer than two groups.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float
    n: int

    def __str__(self) -> str:
        """`-0.012 [-0.040, +0.016], p 0.412`."""
        if self.low is None:
            return f"{self.mean:+.3f}" if self.n else "none"
        p_value = f"p {self.p_value:.3f}" if self.p_value >= 0.001 else "p < 0.001"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {p_value}"


def estimate(values: Sequence[float], groups: Sequence[Hashable] | None = None, *, seed: int = 0) -> Estimate:
    """Compute the mean of `values` and its percentile bootstrap interval (Efron 1979).

    Args:
        values: A value for each question.
        groups: The group of each question; without it each question is a group.
        seed: Seed of the resampling.

    Returns:
        The estimate; its mean is NaN if there are no values.
    """
    sums, counts = _by_group(values, groups)
    mean = float(sums.sum() / counts.sum()) if len(sums) else float("nan")
    if len(sums) < 2:
        return Estimate(mean, None, None, len(values))
    from scipy.stats import bootstrap

    found = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, _MOST_NUMBERS // len(sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), len(values))


def difference(
    one: Sequence[float],
    other: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Difference:
    """Compute how much better `one` is than `other` on the same questions.

    The p-value is that of a paired randomisation test (Fisher 1935; for retrieval Smucker et al. 2007). The
    test swaps the two systems group by group; the p-value is the share of swaps with a difference at least as
    large as the observed one. All swaps are tried if there are few, otherwise 9,999 random ones.

    Args:
        one: A value for each question, higher is better.
        other: The value of the other system for each question, in the same order.
        groups: The group of each question; without it each question is a group.
        seed: Seed of the resampling and of the swaps.

    Returns:
        The mean of `one - other`, with interval and p-value; the mean is NaN if there are no values.
    """
    pairs = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    found = estimate(pairs.tolist(), groups, seed=seed)
    sums, _ = _by_group(pairs.tolist(), groups)
    if len(sums) < 2:
        return Difference(*found[:3], 1.0, found.n)
    from scipy.stats import permutation_test

    p_value = permutation_test(
        (sums, np.zeros_like(sums)),
        lambda one, other, axis: (one - other).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _MOST_NUMBERS // len(sums)),
        rng=np.random.default_rng(seed),
    ).pvalue
    return Difference(*found[:3], float(p_value), found.n)


def _by_group(
    values: Sequence[float], groups: Sequence[Hashable] | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return sum and count of each group, in order of first appearance; without groups, of each value."""
    numbers: dict[Hashable, int] = {}
    keys = range(len(values)) if groups is None else groups
    places = [numbers.setdefault(key, len(numbers)) for _, key in zip(values, keys, strict=True)]
    sums, counts = np.zeros(len(numbers)), np.zeros(len(numbers))
    np.add.at(sums, places, values)
    np.add.at(counts, places, 1)
    return sums, counts
