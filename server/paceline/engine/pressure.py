"""How hard an upstream may be pressed: refusals that are not about budget.

An **overload** (529, 503, an error in mid-stream) bounds the calls in flight, as a congestion window does (additive
increase, multiplicative decrease, slow start: RFC 5681; the cut by the part that failed: RFC 8257). Evidence is counted
in windows, and calls granted before the last cut count no more, so that one round trip cuts once:

- at least 3/8 of a window refused (four calls or more): a quarter of what is in flight stays. At one call in flight
  what passes is a probe; after a bad one nothing passes for a while, twice as long after the next, at most as long as
  16 calls used to take, and ``LONGEST_GAP_US``;
- 1/8 to 3/8: half of the refused part is cut; less costs nothing;
- a good window: three times as many up to what was in flight before, then an eighth more. It is dropped at twice what
  was in flight before and is now.

Upstream's silence is good news as well: a call that has not been refused in twice the time that refusals took counts as
a good window. ``OVERLOAD_LAPSE_US`` after the last refusal nothing is left of it, whatever happened. Whoever is in
flight stays; though old calls take all the room there is, a probe passes every ``LONGEST_GAP_US`` at the latest.

A refusal for **concurrency** is sharper: what was in flight without the refused call is what is allowed. The bound is
tried from time to time while it binds, seldom where that fails, in steps that triple where it does not, and lapses.

All is a function of the state and of the time; nothing here changes anything. Times are in µs of ledger time, limits in
calls in flight. It costs the same whatever number of calls is in flight.
"""

from __future__ import annotations

import msgspec

from paceline.engine.dimensions import MINUTE_US, SECOND_US

WINDOW_US = (SECOND_US, 6 * SECOND_US)
"""Evidence is judged after three times what a refusal takes, between these; or at ``ENOUGH`` that are the most of it.

Sooner, the refusals of what was granted last could not have come."""
ENOUGH = 8
LEAST = 4
"""Fewer refusals are no episode, however few calls there are."""
HEAVY = 3
"""Eighths of a window: so many refused are an episode, and less than one is noise."""
GAP_CALLS = 16
"""Probes of an episode are at most so much rarer than calls were before."""
SHORTEST_GAP_US = SECOND_US
LONGEST_GAP_US = 10 * SECOND_US
PATIENCE_US = (SECOND_US, 5 * SECOND_US)
"""The least and the most of the time without an answer that counts as a good one."""
OVERLOAD_LAPSE_US = MINUTE_US
"""An overload that nothing confirms is over after this."""
CROWD_LAPSE_US = 10 * MINUTE_US
"""So is a bound on concurrency."""
CROWD_WAIT_US = (3 * SECOND_US, 160 * SECOND_US)
"""The bound on concurrency is tried after the first of these; twice as long after each failure, up to the other."""
QUOTA_PROBE_US = 5 * MINUTE_US
"""A pool without quota is closed for so long; then one call may try."""
_MOST_SILENT = 64


class Overload(msgspec.Struct, array_like=True, gc=False):
    """An overload in force. ``limit`` is of :func:`limit_at`: use that."""

    limit: int
    goal: int
    """What was in flight when it began: up to there the limit triples."""
    gap: int
    """The longest time between probes."""
    took: int
    """The least time in which a refusal came."""
    cut_at: int
    """The last cut: how calls granted before it end says nothing any more."""
    since: int
    """When this window began."""
    refused_at: int
    """The last refusal."""
    bad: int = 0
    """Refused in this window."""
    sent: int = 0
    """Granted in this window."""
    first_at: int = 0
    """The first grant since the last change (0: none)."""
    last_at: int = 0
    """The last grant."""
    failures: int = 0
    """Probes that failed in a row."""
    opens_at: int = 0
    """Nothing is granted before."""

    def note_grant(self, at: int) -> None:
        """A call was granted at ``at``."""
        self.sent += 1
        self.first_at = self.first_at or at
        self.last_at = at


class Crowd(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A bound on the calls in flight that a refusal for concurrency has shown."""

    limit: int
    step: int
    """By how much it grows next."""
    wait: int
    """How long after ``changed_at`` it grows."""
    backoff: int
    """``wait`` after the last failure."""
    changed_at: int
    refused_at: int


class Ramp(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A limit that is lower for usage that grew too fast, and climbs: see :mod:`paceline.engine.ramp`."""

    bucket: int
    full: int
    full_burst: int
    """The limit as it was before."""
    told: int
    """What was allowed when it was last heard of."""
    told_at: int
    refused_at: int
    step: int
    """By how much it climbs each minute."""
    known: bool
    """``step`` was measured, not guessed."""
    phase: int
    """How long after the turn of a minute it climbs."""
    next_at: int
    """When it climbs next."""
    blind: bool = False
    """Refusals do not tell what is allowed: each step that was not refused is followed by twice as large a one."""


class Pressure(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is in force in one pool."""

    overload: Overload | None = None
    crowd: Crowd | None = None
    ramps: tuple[Ramp, ...] = ()
    """At most one for each limit of the pool."""

    def copy(self) -> Pressure:
        """One that shares nothing that changes."""
        if self.overload is None:
            return self
        return Pressure(msgspec.structs.replace(self.overload), self.crowd, self.ramps)


# -- what may pass ---------------------------------------------------------------------------------------------------


def room(pressure: Pressure, open_calls: int, now: int) -> int | None:
    """How many calls may pass at ``now``; ``None``: any number."""
    most: int | None = None
    crowd, overload = pressure.crowd, pressure.overload
    if crowd is not None and now < crowd.refused_at + CROWD_LAPSE_US:
        most = max(0, crowd.limit - open_calls)
    if overload is not None and now < overload.refused_at + OVERLOAD_LAPSE_US:
        free = _free(overload, open_calls, now)
        most = free if most is None else min(most, free)
    return most


def overloaded(pressure: Pressure, open_calls: int, now: int, count: int = 1) -> bool:
    """Whether an overload keeps ``count`` calls from passing."""
    overload = pressure.overload
    in_force = overload is not None and now < overload.refused_at + OVERLOAD_LAPSE_US
    return in_force and overload is not None and _free(overload, open_calls, now) < count


def pressed(pressure: Pressure, now: int) -> str:
    """What is in force at ``now``, in words; empty: nothing is."""
    crowd, overload = pressure.crowd, pressure.overload
    found = []
    if overload is not None and now < overload.refused_at + OVERLOAD_LAPSE_US:
        found.append(f"overloaded upstream: at most {limit_at(overload, now):,} calls in flight")
    if crowd is not None and now < crowd.refused_at + CROWD_LAPSE_US:
        found.append(f"concurrency refused: at most {crowd.limit:,} calls in flight")
    if pressure.ramps:
        found.append("usage grew too fast: the limit climbs again")
    return "; ".join(found)


def room_at(pressure: Pressure, open_calls: int, now: int, count: int = 1) -> int:
    """When ``count`` calls may pass if nothing happens until then: no call ends, nothing is heard."""
    crowd, overload = pressure.crowd, pressure.overload
    at = now
    if crowd is not None and crowd.limit - open_calls < count:
        at = max(at, crowd.refused_at + CROWD_LAPSE_US)
    if overload is not None and _free(overload, open_calls, now) < count:
        lapses = overload.refused_at + OVERLOAD_LAPSE_US
        times = [lapses]
        if count == 1:
            times.append(max(overload.opens_at, overload.last_at + _between_probes(overload)))
        if limit_at(overload, overload.opens_at) - open_calls >= count:
            times.append(overload.opens_at)
        elif overload.first_at:
            silent = 0
            while silent < _MOST_SILENT and _limit_after(overload, silent) - open_calls < count:
                silent += 1
            times.append(max(overload.opens_at, overload.first_at + silent * patience(overload)))
        at = max(at, min(times))
    return at


def _free(overload: Overload, open_calls: int, now: int) -> int:
    if now < overload.opens_at:
        return 0
    free = limit_at(overload, now) - open_calls
    if free <= 0:
        return 1 if now >= overload.last_at + _between_probes(overload) else 0
    return free


def limit_at(overload: Overload, now: int) -> int:
    """The most calls in flight at ``now``."""
    if not overload.first_at:
        return overload.limit
    return _limit_after(overload, (now - overload.first_at) // patience(overload))


def _limit_after(overload: Overload, times: int) -> int:
    """The limit when nothing was heard for so many times what a refusal takes."""
    limit = overload.limit
    if times <= 0:
        return limit
    if limit < overload.goal:
        doublings = min(times, (-(-overload.goal // limit) - 1).bit_length())
        limit = min(overload.goal, limit << doublings)
        times -= doublings
    return limit + times * max(1, limit // 8)


def window(overload: Overload) -> int:
    """How long evidence is gathered."""
    least, most = WINDOW_US
    return max(least, min(most, 3 * overload.took))


def patience(overload: Overload) -> int:
    """After so long without an answer a call counts as accepted."""
    least, most = PATIENCE_US
    return max(least, min(most, 2 * overload.took))


def gap(overload: Overload) -> int:
    """The time from a probe that failed to the next: longer after each."""
    return overload.gap >> max(0, 3 - overload.failures)


def _between_probes(overload: Overload) -> int:
    """The time between probes of which nothing was heard yet."""
    return max(gap(overload), patience(overload))


# -- overload --------------------------------------------------------------------------------------------------------


def longest_gap(between_calls: int) -> int:
    """``gap`` for a pool whose calls used to come ``between_calls`` µs apart."""
    return max(SHORTEST_GAP_US, min(LONGEST_GAP_US, GAP_CALLS * between_calls))


def overloaded_first(open_calls: int, between_calls: int, took: int, now: int) -> Overload:
    """The first refusal. It costs nothing yet."""
    goal = max(1, open_calls)
    return Overload(2 * goal, goal, longest_gap(between_calls), took, 0, now, now, 1)


def overloaded_again(
    overload: Overload, open_calls: int, granted_at: int, retry_after_us: int | None, now: int
) -> Overload:
    """Another refusal, of a call granted at ``granted_at``; ``open_calls`` are in flight besides."""
    noted = msgspec.structs.replace(overload, refused_at=max(now, overload.refused_at))
    if granted_at < overload.cut_at:
        return noted
    noted.took = min(overload.took, now - granted_at)
    noted.bad += 1
    # The silence is broken, and what it had allowed was too much.
    noted.first_at = 0
    limit = limit_at(noted, now)
    some = noted.bad >= min(ENOUGH, max(LEAST, limit))
    heavy = 8 * noted.bad >= HEAVY * max(noted.sent, noted.bad)
    if limit == 1 or (heavy and some) or now - noted.since >= window(noted):
        return _judged(noted, limit, open_calls, retry_after_us, now, lenient=False)
    return noted


def accepted(overload: Overload, open_calls: int, granted_at: int, now: int) -> Overload | None:
    """A call granted at ``granted_at`` was accepted. ``None``: nothing is left of the overload."""
    if granted_at < overload.since and not overload.bad:
        return overload
    if granted_at < overload.cut_at or now < overload.opens_at:
        return overload
    limit = limit_at(overload, now)
    if overload.bad:
        if now - overload.since < window(overload):
            return overload
        return _judged(overload, limit, open_calls, None, now, lenient=True)
    return _raised(overload, limit, open_calls, now)


def _judged(
    overload: Overload, limit: int, open_calls: int, retry_after_us: int | None, now: int, *, lenient: bool
) -> Overload:
    """A window with refusals has ended. ``lenient``: by an answer that was good, so that a single refusal is none."""
    bad, sent = overload.bad, max(overload.sent, overload.bad)
    if (lenient and bad < 2) or (limit > 1 and 8 * bad < sent):
        raised = _raised(overload, limit, open_calls, now)
        # One that has just refused is not over.
        return msgspec.structs.replace(overload, since=now, bad=0, sent=0) if raised is None else raised
    flying = max(1, min(limit, open_calls + 1))
    cut = msgspec.structs.replace(overload, cut_at=now, since=now, bad=0, sent=0, first_at=0)
    if limit > 1 and 8 * bad < HEAVY * sent:
        cut.limit = max(1, flying - -(-flying * bad // (2 * sent)))
        # It is no episode, which would end as it began: from now on it climbs slowly.
        cut.goal = max(cut.limit, overload.goal * 7 // 8)
        return cut
    cut.limit = max(1, flying // 4)
    if cut.limit == 1:
        cut.failures = min(3, overload.failures + 1)
        wanted = 0 if retry_after_us is None else min(retry_after_us, LONGEST_GAP_US)
        cut.opens_at = now + max(gap(cut), wanted)
    return cut


def _raised(overload: Overload, limit: int, open_calls: int, now: int) -> Overload | None:
    """``None``: it binds no more."""
    limit = min(overload.goal, 3 * limit) if limit < overload.goal else limit + max(1, limit // 8)
    if limit >= 2 * max(overload.goal, open_calls):
        return None
    return msgspec.structs.replace(overload, limit=limit, since=now, bad=0, sent=0, first_at=0, failures=0, opens_at=0)


# -- concurrency -----------------------------------------------------------------------------------------------------


def crowded(crowd: Crowd | None, open_calls: int, granted_at: int, now: int) -> Crowd:
    """A call was refused because too many were in flight; ``open_calls`` are besides it."""
    least, most = CROWD_WAIT_US
    open_calls = max(1, open_calls)
    if crowd is None:
        return Crowd(open_calls, 1, least, least, now, now)
    limit = min(crowd.limit, open_calls)
    if granted_at < crowd.changed_at:
        return msgspec.structs.replace(crowd, limit=limit, refused_at=now)
    backoff = min(most, 2 * crowd.backoff)
    return Crowd(limit, 1, backoff, backoff, now, now)


def uncrowded(crowd: Crowd, open_calls: int, granted_at: int, now: int) -> Crowd:
    """A call granted at ``granted_at`` was accepted; ``open_calls`` are in flight with it."""
    if granted_at < crowd.changed_at or now < crowd.changed_at + crowd.wait or open_calls < crowd.limit:
        return crowd
    limit = crowd.limit + crowd.step
    step = min(3 * crowd.step, 2 * limit)
    return msgspec.structs.replace(crowd, limit=limit, step=step, wait=SECOND_US, changed_at=now)
