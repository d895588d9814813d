"""Intervals that hold what they promise, and p-values of a known kind."""

import itertools
import math

import numpy as np
import pytest

from scaledown.evaluation.statistics import Difference, Estimate, difference, estimate


def test_interval_of_a_mean_is_that_of_the_normal_distribution_on_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2_000).tolist()
    found = estimate(values)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert found.n == 2_000
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_cover_the_truth_as_often_as_they_say(grouped: bool) -> None:
    """95 of 100; with questions that are alike within an article only where articles are resampled."""
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(100):
        articles = rng.normal(0.0, 1.0, 40)
        values = np.repeat(articles, 5) + rng.normal(0.0, 0.1, 200)
        found = estimate(
            values.tolist(), np.repeat(np.arange(40), 5).tolist() if grouped else None, seed=trial
        )
        covered += found.low < 0 < found.high
    if grouped:
        assert 89 <= covered <= 99
    else:
        assert covered < 80


def test_groups_weigh_by_their_questions() -> None:
    assert estimate([1, 1, 1, 0], ["a", "a", "a", "b"]).mean == 0.75


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    assert estimate(values, seed=3) == estimate(values, seed=3)
    assert estimate(values, seed=3) != estimate(values, seed=4)


def test_too_little_for_an_interval() -> None:
    assert estimate([0.5]) == (0.5, None, None, 1)
    assert estimate([0.25, 0.75], ["a", "a"]) == (0.5, None, None, 2)
    assert math.isnan(estimate([]).mean)
    assert difference([], []).p_value == 1


def test_a_system_does_not_differ_from_itself() -> None:
    values = np.random.default_rng(0).random(30).tolist()
    assert difference(values, values) == (0.0, 0.0, 0.0, 1.0, 30)


def test_p_value_of_few_pairs_is_the_share_of_all_swaps() -> None:
    one, other = [0.9, 0.7, 0.8, 0.6, 0.9, 0.2], [0.5, 0.6, 0.3, 0.7, 0.4, 0.1]
    pairs = np.subtract(one, other)
    swaps = [abs(np.dot(signs, pairs)) for signs in itertools.product((1, -1), repeat=len(pairs))]
    expected = np.mean([swapped >= abs(pairs.sum()) - 1e-12 for swapped in swaps])
    assert difference(one, other).p_value == pytest.approx(expected)


def test_p_value_is_the_same_in_both_directions() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.random(60).tolist(), rng.random(60).tolist()
    there, back = difference(one, other), difference(other, one)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.mean == -back.mean
    assert there.low == pytest.approx(-back.high, abs=0.01)


def test_p_values_of_equal_systems_are_small_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    small = [difference(rng.random(25).tolist(), rng.random(25).tolist()).p_value < 0.2 for _ in range(100)]
    assert 0.1 <= np.mean(small) <= 0.3


def test_a_clear_difference_is_one_and_a_repeated_question_is_none() -> None:
    rng = np.random.default_rng(3)
    worse = rng.random(40)
    assert difference((worse + 0.3).tolist(), worse.tolist()).p_value < 0.001
    # One lucky article asked about 40 times is one article.
    assert difference([1.0] * 40, [0.0] * 40, ["one"] * 40).p_value == 1


def test_values_and_groups_must_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        estimate([1.0, 2.0], ["a"])


def test_format_of_estimates_and_differences() -> None:
    assert str(Estimate(0.5, 0.25, 0.75, 9)) == "0.500 [0.250, 0.750]"
    assert str(Difference(-0.5, -0.75, 0.25, 0.04, 9)) == "-0.500 [-0.750, +0.250], p 0.040"
    assert [str(estimate([])), str(estimate([1])), str(difference([1], [0]))] == ["none", "1.000", "+1.000"]
