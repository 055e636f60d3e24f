"""Means with intervals for samples that are not independent: several questions about one video."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        mean: the mean.
        low: lower end; `mean` where there is nothing to estimate a spread from.
        high: upper end.
        n: samples.
        clusters: clusters of them.
    """

    mean: float
    low: float
    high: float
    n: int
    clusters: int

    def as_json(self) -> dict[str, Any]:
        """Return the fields, rounded to what a float tells."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Return the mean of `values` with an interval that is right for samples grouped into clusters.

    The variance is the cluster-robust one of a (weighted) mean: residuals are summed within each cluster before they
    are squared, with the factor C / (C - 1) for C clusters; the interval is that of a t distribution with C - 1 degrees
    of freedom (Miller, "Adding Error Bars to Evals", 2024, section 2.2).

    Args:
        values: of the samples.
        clusters: which cluster each belongs to.
        strata: the mean is the unweighted mean of the means of these groups; None: all samples weigh the same.
        bounds: least and largest possible value; the interval is cut there.

    Raises:
        ValueError: there are no samples, or the lists differ in length.
    """
    x = np.asarray(values, dtype=np.float64)
    groups = np.zeros(len(x), dtype=int) if strata is None else np.unique(_codes(strata), return_inverse=True)[1]
    if not len(x) == len(clusters) == len(groups) or len(x) == 0:
        raise ValueError(f"{len(x)} values, {len(clusters)} clusters and {len(groups)} strata")
    sizes = np.bincount(groups)
    means = np.bincount(groups, x) / sizes
    mean = float(means.mean())
    residuals = (x - means[groups]) / sizes[groups] / len(sizes)
    codes = _codes(clusters)
    count = int(codes.max()) + 1
    low = high = mean
    if count > 1:
        error = math.sqrt(float(np.square(np.bincount(codes, residuals)).sum()) * count / (count - 1))
        reach = t_quantile(0.975, count - 1) * error
        low, high = mean - reach, mean + reach
    if bounds is not None:
        if np.ptp(x) == 0:
            # No spread to estimate from: the exact (Clopper-Pearson) limit for as many equal draws as clusters.
            reach = (bounds[1] - bounds[0]) * (1 - 0.025 ** (1 / count))
            low, high = mean - reach, mean + reach
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, len(x), count)


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=int)


def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution.

    Exact for 1 and 2 degrees of freedom; else by Hill's expansion (1970), whose error is below 0.2 % from 3 on.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        a = 2 * probability - 1
        return a * math.sqrt(2 / (1 - a * a))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
