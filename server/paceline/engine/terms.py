"""What a share may and must get: as absolute amounts, or as parts of whatever the pool's own limits turn out to be."""

from __future__ import annotations

import msgspec

from paceline.engine.dimensions import UNLIMITED, Dimension, Limit, Window

WHOLE = 1_000
"""All of a limit, in thousandths."""


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``permille`` thousandths (0 to 1,000) of a pool's own limit of this dimension and window."""

    dimension: Dimension
    window: Window
    permille: int

    def of(self, limit: Limit) -> Limit:
        """That part of ``limit``, in amount and burst; at least 1 unit, unless the part or the limit is nothing."""
        if limit.amount >= UNLIMITED:
            return Limit(self.dimension, self.window, UNLIMITED)
        return Limit(self.dimension, self.window, self.share_of(limit.amount), self.share_of(limit.capacity))

    def share_of(self, amount: int) -> int:
        """That part of an amount, rounded down, and at least 1 if it is not zero."""
        return max(1, amount * self.permille // WHOLE) if amount > 0 and self.permille else 0


class Terms(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The settings of a share. Of a dimension and window there is an amount or a part, never both."""

    caps: tuple[Limit, ...] = ()
    weight: int = 1
    guarantees: tuple[Limit, ...] = ()
    """By the minute."""
    cap_parts: tuple[Part, ...] = ()
    guarantee_parts: tuple[Part, ...] = ()
    """By the minute."""
