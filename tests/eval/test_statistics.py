"""Means with intervals, against textbook values and simulations."""

import math

import numpy as np
import pytest

from hicom.eval.statistics import clustered_mean, t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)],
)
def test_t_quantile(degrees: int, expected: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=2e-3)


def test_independent_samples_have_the_textbook_interval() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    found = clustered_mean(values, range(5))
    error = np.std(values, ddof=1) / math.sqrt(5)
    assert found.mean == pytest.approx(0.6)
    assert found.high - found.mean == pytest.approx(t_quantile(0.975, 4) * error)
    assert (found.n, found.clusters) == (5, 5)


def test_copies_of_a_sample_add_nothing() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    once = clustered_mean(values, range(5))
    thrice = clustered_mean(values * 3, [*range(5)] * 3)
    assert (thrice.low, thrice.high) == (pytest.approx(once.low), pytest.approx(once.high))


def test_strata_weigh_the_same_whatever_their_size() -> None:
    values = [1.0] * 9 + [0.0]
    found = clustered_mean(values, range(10), ["many"] * 9 + ["few"])
    assert found.mean == pytest.approx(0.5)


def test_intervals_hold_the_true_mean_19_times_of_20() -> None:
    rng = np.random.default_rng(0)
    hits, runs = 0, 1000
    for _ in range(runs):
        videos = rng.normal(0, 1, 40)
        clusters = np.repeat(np.arange(40), rng.integers(1, 6, 40))
        values = videos[clusters] + rng.normal(0, 0.5, len(clusters))
        found = clustered_mean(values, clusters.tolist())
        hits += found.low <= 0 <= found.high
    assert 0.92 <= hits / runs <= 0.97
    # As if all were independent, the interval is far too short.


def test_bounds_cut_the_interval_and_a_single_cluster_has_none() -> None:
    found = clustered_mean([100.0, 100.0, 0.0], [0, 1, 2], bounds=(0, 100))
    assert (found.low, found.high) == (0, 100)
    # Three of three right, yet the truth may well be below 100.
    right = clustered_mean([100.0] * 6, [0, 0, 1, 1, 2, 2], bounds=(0, 100))
    assert (right.low, right.high) == (pytest.approx(100 * 0.025 ** (1 / 3)), 100)
    alone = clustered_mean([1.0, 0.0], ["a", "a"])
    assert (alone.low, alone.mean, alone.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], [1, 2])])
def test_wrong_lists(values: list[float], clusters: list[int]) -> None:
    with pytest.raises(ValueError, match="clusters"):
        clustered_mean(values, clusters)
