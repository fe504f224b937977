"""The limited quantities of a pool, and how their limits are stated."""

from __future__ import annotations

from enum import IntEnum

import msgspec

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
DAY_US = 86_400 * SECOND_US

UNLIMITED = 1 << 60
"""Amount of a limit that only counts: larger than any real one, small enough for 64-bit sums."""


class Dimension(IntEnum):
    """A limited quantity. The numbers are those of ``paceline.v1.Dimension`` and are journalled."""

    REQUESTS = 1
    INPUT_TOKENS = 2
    OUTPUT_TOKENS = 3
    TOKENS = 4
    CONCURRENCY = 5
    QUEUED_REQUESTS = 6
    SPEND = 7
    """Money, in nano-dollars (1e-9 USD)."""


class Window(IntEnum):
    """Over what a limit counts. ``NONE`` is a gauge: what is held comes back when the call ends."""

    NONE = 1
    MINUTE = 2
    DAY = 3
    MONTH = 4
    """A calendar month in UTC: nothing refills until the month turns."""


WINDOW_US = {Window.MINUTE: MINUTE_US, Window.DAY: DAY_US}
"""Length of the windows that refill continuously, in microseconds."""

BUDGETS = frozenset({Window.DAY, Window.MONTH})
"""Windows of limits that are used up slowly, and for which nobody waits."""

GAUGES = frozenset({Dimension.CONCURRENCY, Dimension.QUEUED_REQUESTS})


class Limit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One limit: at most ``amount`` of ``dimension`` per ``window``, saved up to ``burst``.

    ``burst`` of ``None`` means a full window's amount. Units: requests, tokens, calls in flight or nano-dollars.
    """

    dimension: Dimension
    window: Window
    amount: int
    burst: int | None = None

    @property
    def capacity(self) -> int:
        """The most that can be saved up."""
        return self.amount if self.burst is None else self.burst
