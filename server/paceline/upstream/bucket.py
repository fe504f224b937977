"""One dimension of one model group: a continuous token bucket in whole numbers.

The level is kept in *grains*: one token is :data:`GRAINS` of them, as many as a minute has microseconds. So a bucket of
``amount`` tokens per minute refills by exactly ``amount`` grains per microsecond: nothing is ever rounded, and no carry
is needed. It may go below zero (debt), never above the burst.

Traffic from outside (other users of the same key) is a drain of so many tokens per minute. Like any caller it is
refused while the level is not above zero: it takes what is there, and makes no debt. Microsecond by microsecond::

    level += amount;  taken = min(outside, max(0, level));  level = min(burst, level - taken)

:meth:`Bucket.advance` gives what that loop would, in closed form, so a result never depends on how often somebody
looked.

At every instant, in grains: ``level = start + refilled - charged - outside_taken + adjusted``.
"""

from __future__ import annotations

import msgspec

GRAINS = 60_000_000
"""Grains in one token, microseconds in a minute."""


class Bucket(msgspec.Struct, gc=False):
    """State of one bucket. ``amount`` and ``outside`` are tokens per minute; what ends in no unit is in grains."""

    amount: int
    burst_tokens: int
    at: int
    level: int
    start: int
    outside: int = 0
    refilled: int = 0
    charged: int = 0
    outside_taken: int = 0
    adjusted: int = 0
    offered: int = 0
    """What would have been refilled had the bucket never been full: the integral of the rate."""

    @classmethod
    def of(cls, now: int, amount: int, burst_tokens: int, level_tokens: int) -> Bucket:
        """A bucket at ``now`` (µs) that holds ``level_tokens``, at most its burst."""
        level = min(level_tokens, burst_tokens) * GRAINS
        return cls(amount, burst_tokens, now, level, level)

    @property
    def tokens(self) -> int:
        """The level in whole tokens, rounded down."""
        return self.level // GRAINS

    def advance(self, now: int) -> None:
        """Move to ``now`` (µs). An earlier instant changes nothing: time does not run backwards here."""
        steps = now - self.at
        if steps <= 0:
            return
        self.at = now
        self.offered += steps * self.amount
        before = self.level
        if self.outside:
            taken = self._drain(steps)
        else:
            self.level = min(self.burst_tokens * GRAINS, before + steps * self.amount)
            taken = 0
        self.outside_taken += taken
        self.refilled += self.level - before + taken

    def _drain(self, steps: int) -> int:
        """``steps`` microseconds with outside traffic. Returns what it took."""
        level, amount, outside, burst = self.level, self.amount, self.outside, self.burst_tokens * GRAINS
        taken = 0
        if level < 0:
            # In debt nobody is served until the level is above zero.
            whole = min(steps, -level // amount)
            level += whole * amount
            steps -= whole
            if steps and level < 0:
                level += amount
                taken = min(outside, level)
                level = min(burst, level - taken)
                steps -= 1
            if not steps:
                self.level = level
                return taken
        if outside <= amount:
            taken += steps * outside
            level = min(burst, level + steps * (amount - outside))
        else:
            fall = outside - amount
            full = min(steps, level // fall)
            taken += full * outside
            level -= full * fall
            if steps > full:
                # Less is left than it wants: it takes all there is, then all that is refilled.
                taken += level + (steps - full) * amount
                level = 0
        self.level = level
        return taken

    def charge(self, tokens: int) -> None:
        """Take ``tokens`` at the instant the bucket is at; negative gives back, up to the burst."""
        self.charged += tokens * GRAINS
        self.level -= tokens * GRAINS
        over = self.level - self.burst_tokens * GRAINS
        if over > 0:
            self.level -= over
            self.adjusted -= over

    def change(self, now: int, amount: int, burst_tokens: int) -> None:
        """New limits, at once. What is above the new burst is forfeited; nothing is granted."""
        self.advance(now)
        self.amount = amount
        self.burst_tokens = burst_tokens
        over = self.level - burst_tokens * GRAINS
        if over > 0:
            self.level -= over
            self.adjusted -= over

    def set_level(self, now: int, tokens: int) -> None:
        """Move the level, as an operator of the simulator."""
        self.advance(now)
        moved = min(tokens, self.burst_tokens) * GRAINS - self.level
        self.level += moved
        self.adjusted += moved

    def wait_us(self, tokens: int) -> int:
        """Microseconds of refill until ``tokens`` are there; nothing is known of traffic to come."""
        short = tokens * GRAINS - self.level
        return -(-short // self.amount) if short > 0 else 0

    def full_us(self) -> int:
        """Microseconds of refill until the bucket is full."""
        return self.wait_us(self.burst_tokens)
