"""What two samples tell about each other by their ranks: no distribution is assumed."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import msgspec


def mann_whitney(one: Sequence[float], two: Sequence[float]) -> float:
    """Two-sided p by the normal approximation, corrected for ties."""
    ranks = _ranks([*one, *two])
    n, m = len(one), len(two)
    u = sum(ranks[value] for value in one) - n * (n + 1) / 2
    counts = Counter([*one, *two])
    ties = sum(c**3 - c for c in counts.values()) / ((n + m) * (n + m - 1))
    spread = math.sqrt(n * m / 12 * (n + m + 1 - ties))
    return math.erfc(abs(u - n * m / 2) / spread / math.sqrt(2)) if spread else 1.0


class Auc(msgspec.Struct, frozen=True):
    """How well a figure tells two classes apart: 0.5 by chance, 1 always."""

    value: float
    low: float
    """Lower and upper end of the 95 % interval."""
    high: float


def auc(positive: Sequence[float], negative: Sequence[float]) -> Auc:
    """Whether the positive have the larger figures; the interval by DeLong's variance.

    Source: DeLong, DeLong, Clarke-Pearson 1988 (Biometrics 44, 837), by midranks as Sun and Xu 2014.
    """
    n, m = len(positive), len(negative)
    both, of_positive, of_negative = _ranks([*positive, *negative]), _ranks(positive), _ranks(negative)
    above = [(both[value] - of_positive[value]) / m for value in positive]
    below = [1 - (both[value] - of_negative[value]) / n for value in negative]
    value = statistics.fmean(above)
    half = 1.96 * math.sqrt(statistics.variance(above) / n + statistics.variance(below) / m)
    return Auc(value, max(value - half, 0.0), min(value + half, 1.0))


def _ranks(values: Sequence[float]) -> dict[float, float]:
    """Value -> its rank, from 1; of equal ones the middle."""
    counts, before, ranks = Counter(values), 0, {}
    for value in sorted(counts):
        ranks[value] = before + (counts[value] + 1) / 2
        before += counts[value]
    return ranks
