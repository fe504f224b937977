"""What is fair, and how far a service is from it. Shares are dominant shares: parts of a limit, the largest of all."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

_HALVINGS = 100


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1 ÷ their number if one has all.

    R. Jain, D. Chiu, W. Hawe: A quantitative measure of fairness and discrimination (1984).
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else math.nan


def fair_shares(
    demands: Mapping[str, Sequence[float]], weights: Mapping[str, float], capacity: Sequence[float]
) -> dict[str, float]:
    """The dominant share of each by weighted max-min: progressive filling over several dimensions.

    ``demands`` are what each asks for, by dimension, in parts of the limit; ``capacity`` is what there is, in the same
    parts. All rise together, by their weights, each along its own demand, until that is met or a dimension that it uses
    is full. A. Ghodsi and others: Dominant resource fairness (2011).
    """
    fixed: dict[str, float] = {name: 0.0 for name, demand in demands.items() if not max(demand)}
    while len(fixed) < len(demands):
        rising = {name: weights.get(name, 1.0) for name in demands if name not in fixed}
        high = max(max(demands[name]) / weight for name, weight in rising.items())
        if not _over(fixed | _risen(high, rising, demands), demands, capacity):
            return fixed | _risen(high, rising, demands)
        low = 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            over = _over(fixed | _risen(middle, rising, demands), demands, capacity)
            low, high = (low, middle) if over else (middle, high)
        full = _over(fixed | _risen(high, rising, demands), demands, capacity)
        found = _risen(low, rising, demands)
        fixed |= {name: share for name, share in found.items() if any(demands[name][place] for place in full)}
    return fixed


def _risen(level: float, rising: Mapping[str, float], demands: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The shares of those that rise, at this level of their weights."""
    return {name: min(max(demands[name]), weight * level) for name, weight in rising.items()}


def _over(shares: Mapping[str, float], demands: Mapping[str, Sequence[float]], capacity: Sequence[float]) -> list[int]:
    """The dimensions of which these shares use more than there is."""
    found = []
    for place, most in enumerate(capacity):
        used = sum(
            share * demands[name][place] / max(demands[name]) for name, share in shares.items() if max(demands[name])
        )
        if used > most * (1 + 1e-12):
            found.append(place)
    return found


def quantile(values: Iterable[float], part: float) -> float:
    """The least value that ``part`` of all do not exceed; not a number if there is none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


def least_in_any_window(events: Sequence[tuple[int, float]], begin: int, end: int, window: int) -> float:
    """The least sum of ``events`` (instant, amount; in order) over any half-open window that lies in [begin, end)."""
    instants = [at for at, _ in events]
    sums = [0.0]
    for _, amount in events:
        sums.append(sums[-1] + amount)
    # Of all windows with the same sum the first begins at the beginning or just after an event.
    starts = [begin, *(at + 1 for at in instants)]
    return min(
        sums[bisect_left(instants, start + window)] - sums[bisect_left(instants, start)]
        for start in starts
        if begin <= start <= end - window
    )


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The line by least squares: its value at zero, and its slope."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return mean_y - slope * mean_x, slope
