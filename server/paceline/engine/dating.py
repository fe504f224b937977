"""Of when a reading is: of the start of its call, of the end, or of any time between.

Some upstreams write down what is left when they let a call in, others when they send the answer. Nobody says which, so
a reading is compared with all levels that our books had while its call was under way (:mod:`paceline.engine.trail`). Of
a call that took seconds that explains nearly any reading: an error as large as our level has moved meanwhile stays. But
over many calls the readings themselves tell: as long as our books are right in the mean, the levels of the right
instant are nearer to what is read than those of the wrong one. If they are twice as near, it is taken.

Soft state. What no reading tells apart stays as wide as it was.
"""

from __future__ import annotations

from paceline.engine.trail import UNSEEN_US, Span, Trail

NEAR_US = 250_000
"""How long messages between the upstream, a caller and the ledger are under way, nearly always."""
FADE = 64
"""About so many readings are remembered."""
FEW = 32
"""Fewer tell nothing."""
BETTER = 2
"""The mean distance from what is read is smaller by this factor at the right instant."""


class Dating:
    """What the readings of one limit have told. Sums of distances, in the unit of the limit, faded."""

    __slots__ = ("_count", "_end", "_start")

    def __init__(self) -> None:
        self._count = 0
        self._start = self._end = 0

    def narrowed(
        self, trail: Trail, low: int | None, high: int | None, since: int, until: int, corrected: int
    ) -> tuple[int, int, int]:
        """Between which instants a reading of ``[low, high]`` is, of a call under way from ``since`` to ``until``; and
        for how long before a call may have been granted that had not arrived.

        ``corrected`` is what the levels of the trail are below our levels. Takes the reading into account.
        """
        if until - since <= 2 * NEAR_US:
            return since, until, UNSEEN_US
        first, last = (since, since + NEAR_US), (until - NEAR_US, until)
        start, end = trail.between(*first), trail.between(*last)
        if start is not None and end is not None and low is not None and high is not None:
            self._start += _distance(start, low - corrected, high - corrected) - self._start // FADE
            self._end += _distance(end, low - corrected, high - corrected) - self._end // FADE
            self._count = min(FEW, self._count + 1)
        if self._count < FEW:
            return since, until, UNSEEN_US
        if self._end * BETTER < self._start:
            return *last, NEAR_US
        if self._start * BETTER < self._end:
            return *first, NEAR_US
        return since, until, UNSEEN_US


def _distance(span: Span, low: int, high: int) -> int:
    """From what is read to the farthest of the levels: a span explains no more by being wide."""
    return max(abs(high - span.least), abs(span.most - low))
