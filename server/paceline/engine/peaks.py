"""How high a level stood since any past grant: what limits refunds (see :mod:`paceline.engine.bucket`).

Each lowering of the level pushes the level before it, under the ordinal of that lowering. A peak hides all smaller ones
before it, so what is kept falls from the oldest to the newest, and the first one after a grant is the highest since.
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec

MAX_PEAKS = 128


class Peaks(msgspec.Struct, array_like=True):
    """A stack of peaks. ``ordinals`` rise; ``levels``, to each of which ``lift`` is to be added, fall."""

    ordinals: list[int] = msgspec.field(default_factory=list)
    levels: list[int] = msgspec.field(default_factory=list)
    lift: int = 0

    def push(self, ordinal: int, level: int) -> None:
        """The level stood at ``level`` before the lowering ``ordinal``, the newest."""
        ordinals, levels = self.ordinals, self.levels
        lifted = level - self.lift
        while levels and levels[-1] <= lifted:
            ordinals.pop()
            levels.pop()
        if not levels:
            self.lift, lifted = 0, level
        ordinals.append(ordinal)
        levels.append(lifted)
        if len(levels) > MAX_PEAKS:
            self._coarsen()

    def since(self, ordinal: int) -> int | None:
        """The highest peak after ``ordinal``."""
        first = bisect_right(self.ordinals, ordinal)
        return self.levels[first] + self.lift if first < len(self.levels) else None

    def raise_since(self, ordinal: int, amount: int) -> None:
        """Rewrite history: after ``ordinal`` the level was higher by ``amount``."""
        ordinals, levels = self.ordinals, self.levels
        first, count = bisect_right(ordinals, ordinal), len(levels)
        if first == count:
            return
        # Of the two parts the shorter one is walked; `lift` moves the other.
        if first <= count // 2:
            self.lift += amount
            if first:
                levels[:first] = [level - amount for level in levels[:first]]
        else:
            levels[first:] = [level + amount for level in levels[first:]]
        hidden = first
        while hidden and levels[hidden - 1] <= levels[first]:
            hidden -= 1
        if hidden < first:
            del ordinals[hidden:first], levels[hidden:first]

    def clear(self) -> None:
        """Forget all."""
        self.ordinals.clear()
        self.levels.clear()
        self.lift = 0

    def _coarsen(self) -> None:
        """Halve the stack, overstating peaks by at most a 64th of their range (a refund then credits less)."""
        levels = self.levels
        grain = max(1, (levels[0] - levels[-1]) * 2 // MAX_PEAKS)
        ordinals_kept, levels_kept = [self.ordinals[0]], [levels[0]]
        for ordinal, level in zip(self.ordinals[1:], levels[1:], strict=True):
            if levels_kept[-1] - level < grain:
                ordinals_kept[-1] = ordinal
            else:
                ordinals_kept.append(ordinal)
                levels_kept.append(level)
        self.ordinals, self.levels = ordinals_kept, levels_kept
