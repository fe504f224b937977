"""A limit that is lower for usage that grew too fast, and that the upstream raises by a step at each turn of a minute.

What it allows is told with the refusal, or else assumed to be half of what was used in the last minute. The limit goes
there at once, the level to where the refused call fits after the wait that it was told; and then it climbs with the
upstream: at each turn of a minute by the step that two figures have shown. As long as none is known it climbs by a
half, which will be too much: the refusal then tells the step, at the price of a few calls once. A figure that has not
grown after the turn shows that this upstream's minutes turn later. Where refusals tell no figure it climbs by a
sixteenth, then by twice as much each minute, until the next one takes an eighth away.

A ramp that nothing has confirmed for ``TRUST_US`` climbs twice as fast each minute; if nobody uses the pool it ends
there. It also ends when the limit is reached that it had lowered.
"""

from __future__ import annotations

from msgspec.structs import replace

from paceline.engine.dimensions import MINUTE_US, SECOND_US
from paceline.engine.pressure import Ramp

TRUST_US = 10 * MINUTE_US
LATE_US = 200_000
"""How much later than the upstream's ours turn the minute."""
MOST_TURNS = 64
"""Minutes that are made up for one by one."""


def begun(bucket: int, full: int, full_burst: int, allowed: int, now: int, *, blind: bool) -> Ramp:
    """The first refusal, which allows ``allowed`` (≥ 1) per minute in a limit of ``full``."""
    turn = _turn_after(now, LATE_US)
    step = max(1, allowed // 16 if blind else allowed // 2)
    return Ramp(bucket, full, full_burst, allowed, now, now, step, blind, LATE_US, turn, blind)


def told(ramp: Ramp, amount: int, allowed: int | None, granted_at: int, now: int) -> tuple[Ramp, int]:
    """Another refusal, while our limit is ``amount``: the ramp, and the limit from now on."""
    ramp = replace(ramp, refused_at=now)
    if allowed is None:
        if granted_at < ramp.told_at:
            return ramp, amount
        lower = max(1, amount * 7 // 8)
        ramp = replace(ramp, told=lower, told_at=now, step=max(1, lower // 16), known=True, blind=True)
        return replace(ramp, next_at=_turn_after(now, ramp.phase)), lower
    turns = (now - ramp.phase) // MINUTE_US - (ramp.told_at - ramp.phase) // MINUTE_US
    if allowed == ramp.told and turns >= 1:
        if granted_at < ramp.told_at or amount <= allowed:
            return ramp, min(amount, allowed)
        latest = MINUTE_US - SECOND_US
        if ramp.phase >= latest:
            # It does not climb at all.
            ramp = replace(ramp, told_at=now, step=0, known=True, phase=LATE_US, blind=False)
            return replace(ramp, next_at=_turn_after(now, LATE_US)), allowed
        # The figure is from before the upstream's turn, which comes later than was thought.
        phase = min(latest, max(2 * (now % MINUTE_US), 2 * SECOND_US))
        return replace(ramp, phase=phase, next_at=_turn_after(now, phase)), allowed
    if allowed > ramp.told and turns >= 1:
        ramp = replace(ramp, step=max(1, (allowed - ramp.told) // turns), known=True, blind=False)
    elif allowed > ramp.told:
        # Within one minute of ours: its turn is between the two.
        ramp = replace(ramp, step=allowed - ramp.told, known=True, phase=max(LATE_US, now % MINUTE_US))
    ramp = replace(ramp, told=allowed, told_at=now, next_at=_turn_after(now, ramp.phase))
    return ramp, allowed


def climbed(ramp: Ramp, amount: int, now: int) -> tuple[Ramp, int]:
    """What a ramp and its limit of ``amount`` are at ``now``, after all turns until then. At ``full`` it is over."""
    turns = 0
    while ramp.next_at <= now and amount < ramp.full:
        turns += 1
        if turns > MOST_TURNS:
            return ramp, ramp.full
        step = ramp.step if ramp.known else max(1, amount // 2)
        if ramp.next_at - ramp.refused_at >= TRUST_US:
            step = max(2 * step, 1 + amount // 16)
        amount = min(ramp.full, amount + step)
        if ramp.blind:
            step = min(2 * step, max(1, amount // 2))
        ramp = replace(ramp, step=step, next_at=ramp.next_at + MINUTE_US)
    return ramp, amount


def _turn_after(now: int, phase: int) -> int:
    """The next time after ``now`` that is ``phase`` after the turn of a minute."""
    return now - (now - phase) % MINUTE_US + MINUTE_US
