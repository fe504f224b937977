"""Where our own level was, a moment ago: what a reading of the upstream's level is compared with.

The bounds of :mod:`paceline.engine.reconcile` hold whatever the errors of estimates are, and so are wide as soon as
much is in flight: a level anywhere inside stays, and near zero that means refusals. But a reading says more. Had our
books been right, it would have shown what they showed when it was taken; so the difference is our error of the moment,
whatever its cause. The instant is known only to lie between the grant of the call and the receipt of its headers, so
the reading is compared with all levels that we had meanwhile: only what none of them explains is corrected. The
difference is applied to the level of today; corrections made since then move the trail along, so that several
readings of the same error correct it once.

Only for dimensions that are charged when a call starts: our level is net of what is held, and the upstream's is not.
"""

from __future__ import annotations

from collections import deque

SLOT_US = 50_000
"""Levels are kept as the least and the most of a slot."""
MAX_SLOTS = 600
"""Half a minute of them, if there is something in each: about 60 kB. A reading that is older is compared with none."""
UNSEEN_US = 500_000
"""A call may take so long from its grant to the upstream: for a while our level is below what is read."""


class Trail:
    """The levels of one bucket, each less what its corrections were at that time."""

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: deque[tuple[int, int, int]] = deque(maxlen=MAX_SLOTS)

    def note(self, at: int, level: int) -> None:
        """The level (net of all corrections until then) was ``level`` at ``at``, no earlier than what was noted."""
        slots, slot = self._slots, at // SLOT_US
        if slots and slots[-1][0] >= slot:
            last, least, most = slots[-1]
            if not least <= level <= most:
                slots[-1] = (last, min(least, level), max(most, level))
        else:
            slots.append((slot, level, level))

    def between(self, since: int, until: int) -> tuple[int, int] | None:
        """The least and the most of the levels from ``since`` to ``until``; ``None``: not known.

        The neighbours of the span count as well, because between two of them the level only rises.
        """
        first, last = since // SLOT_US, until // SLOT_US
        slots = self._slots
        if not slots or slots[0][0] > first:
            return None
        least: int | None = None
        most: int | None = None
        for slot, low, high in reversed(slots):
            if slot > last + 1:
                continue
            least = low if least is None else min(least, low)
            most = high if most is None else max(most, high)
            if slot < first:
                break
        return None if least is None or most is None else (least, most)
