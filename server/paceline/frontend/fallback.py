"""Fallback shares: what each client process may use by itself while no server can be reached.

The shares of a pool that are handed out and have not expired add up to no more than its limit, in every dimension and
at every instant. A newer, smaller share does not free the older one before that expires, or before the client has
shown that the newer one arrived: by a report on a grant that came with it or after it.

Shares follow demand: what an instance was granted lately, beside a floor for everybody, so that idle processes do not
hold what busy ones need. A part of each limit is kept back for those that come next, and a first share is small, since
nothing is known yet of who else comes.

A server that starts knows nothing of what the one before it handed out: it gives no share of a ledger's pools before
the last of those has expired (:attr:`paceline.frontend.routing.Slot.is_sharing`). The clients still have them.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping

from paceline.engine.answers import Touched
from paceline.engine.dimensions import DAY_US, MINUTE_US, SECOND_US, UNLIMITED, Dimension, Window
from paceline.frontend.limits import FALLBACK_EXPIRY_US, MAX_FALLBACK_INSTANCES, MAX_FALLBACK_POOLS
from paceline_client.stubs import v1 as pb

_MONTH_US = 31 * DAY_US
_PER_MINUTE = {
    Window.NONE: 1,
    Window.MINUTE: 1,
    Window.DAY: DAY_US // MINUTE_US,
    Window.MONTH: _MONTH_US // MINUTE_US,
}
KEPT_BACK = 0.05
"""The part of a limit that nobody gets, so that a newcomer finds something until the others have shrunk."""
FLOOR = 0.1
"""The part of the rest that is split evenly."""
DEMAND_US = MINUTE_US
"""The weight of a grant falls to a third (1/e) in this time."""
SWEEP_US = SECOND_US
"""Those that have gone are looked for this often at most, however many come."""
_REBASE = 60.0
"""Weights are kept relative to an instant; it is moved once they have grown by e to this power."""

Amounts = dict[Dimension, int]


def per_minute(pool: str, touched: Touched) -> Amounts:
    """The limits of a pool as amounts per minute, or as the value of a gauge; of several windows, the tightest."""
    amounts: Amounts = {}
    for state in touched.dimensions:
        if state.pool == pool and not state.share and state.limit < UNLIMITED:
            amount = max(0, state.limit) // _PER_MINUTE[state.window]
            amounts[state.dimension] = min(amount, amounts.get(state.dimension, amount))
    return amounts


class _Share:
    """One share of one instance."""

    __slots__ = ("amounts", "standing", "until")

    def __init__(self, until: int, amounts: Amounts) -> None:
        self.until = until
        self.amounts = amounts
        self.standing = True
        """It has not been freed before its time."""


class _Given:
    """What one instance may hold: its unexpired shares, oldest first, and its demand."""

    __slots__ = ("arrived", "asked_at", "demand", "most", "shares")

    def __init__(self) -> None:
        self.shares: deque[_Share] = deque()
        self.most: Amounts = {}
        """The largest amounts among them: any of them may be the one in use."""
        self.demand: dict[Dimension, float] = {}
        self.asked_at = 0
        self.arrived = False
        """The client has shown that it has the newest."""


class _Pool:
    """The shares of one pool, by instance. ``out`` and ``demand`` are the sums over all."""

    __slots__ = ("base", "demand", "expiries", "given", "out", "swept_at")

    def __init__(self, now: int) -> None:
        self.given: OrderedDict[str, _Given] = OrderedDict()
        self.expiries: deque[tuple[_Share, str]] = deque()
        self.out: Amounts = {}
        self.demand: dict[Dimension, float] = {}
        self.base = now
        self.swept_at = now - SWEEP_US

    def expire(self, now: int) -> None:
        expiries = self.expiries
        while expiries and (expiries[0][0].until <= now or not expiries[0][0].standing):
            share, name = expiries.popleft()
            given = self.given.get(name)
            if share.standing and given is not None:
                share.standing = False
                given.shares.popleft()
                self.count(given)
                if not given.shares:
                    self.forget(name, given)

    def forget(self, name: str, given: _Given) -> None:
        del self.given[name]
        for dimension, weight in given.demand.items():
            self.demand[dimension] -= weight

    def count(self, given: _Given) -> None:
        """The shares of an instance have changed."""
        most: Amounts = {}
        for share in given.shares:
            for dimension, amount in share.amounts.items():
                most[dimension] = max(amount, most.get(dimension, 0))
        out = self.out
        for dimension in given.most.keys() | most.keys():
            out[dimension] = out.get(dimension, 0) + most.get(dimension, 0) - given.most.get(dimension, 0)
        given.most = most

    def weigh(self, now: int) -> float:
        """The weight of what is asked for now. Older weights need no decay: newer ones are larger."""
        exponent = (now - self.base) / DEMAND_US
        if exponent > _REBASE:
            scale = math.exp(-exponent)
            for given in self.given.values():
                given.demand = {dimension: weight * scale for dimension, weight in given.demand.items()}
            # Summed anew, so that roundings do not gather.
            self.demand = {}
            for given in self.given.values():
                for dimension, weight in given.demand.items():
                    self.demand[dimension] = self.demand.get(dimension, 0.0) + weight
            self.base = now
            return 1.0
        return math.exp(exponent)


class Fallback:
    """Hands out shares. ``clock`` is monotonic, in µs.

    Memory is bounded: ``MAX_FALLBACK_POOLS`` pools, ``MAX_FALLBACK_INSTANCES`` instances each, and three shares of one
    instance; beyond that there are no new shares until others expire.
    """

    def __init__(
        self, clock: Callable[[], int], *, expiry_us: int = FALLBACK_EXPIRY_US, most: int = MAX_FALLBACK_INSTANCES
    ) -> None:
        self._clock = clock
        self._expiry_us = expiry_us
        self._most = most
        self._pools: dict[str, _Pool] = {}

    def note(self, instance: str, name: str, charges: Iterable[tuple[Dimension, int]], count: int = 1) -> None:
        """``instance`` was granted ``count`` calls that hold ``charges`` each."""
        now = self._clock()
        pool = self._pool(name, now)
        given = None if pool is None else self._given(pool, instance, now)
        if pool is None or given is None:
            return
        weight = pool.weigh(now) * count
        given.asked_at = now
        mine, everybody = given.demand, pool.demand
        for dimension, amount in charges:
            heavier = amount * weight
            mine[dimension] = mine.get(dimension, 0.0) + heavier
            everybody[dimension] = everybody.get(dimension, 0.0) + heavier

    def take(self, instance: str, name: str, limits: Mapping[Dimension, int]) -> Amounts | None:
        """A new share of pool ``name`` for ``instance``, good for the expiry from now; ``None``: there is none."""
        now = self._clock()
        pool = self._pool(name, now)
        if pool is None:
            return None
        pool.expire(now)
        given = self._given(pool, instance, now)
        if given is None or len(given.shares) > 2:
            return None
        given.asked_at = now
        if given.shares and not given.arrived and now < given.shares[-1].until - self._expiry_us // 2:
            # Nothing shows that they arrive, as with clients without a session: the newest still stands.
            return None
        amounts: Amounts = {}
        for dimension, limit in limits.items():
            part = 1.0 / len(pool.given)
            demand = pool.demand.get(dimension, 0.0)
            if demand > 0.0:
                part = FLOOR * part + (1.0 - FLOOR) * given.demand.get(dimension, 0.0) / demand
            amount = int(limit * (1.0 - KEPT_BACK) * part)
            if not given.shares:
                amount = limit // (len(pool.given) + 1)
            others = pool.out.get(dimension, 0) - given.most.get(dimension, 0)
            amounts[dimension] = max(0, min(amount, limit - others))
        share = _Share(now + self._expiry_us, amounts)
        given.shares.append(share)
        given.arrived = False
        pool.expiries.append((share, instance))
        pool.count(given)
        return amounts

    def arrived(self, instance: str, name: str) -> None:
        """The newest share of ``instance`` is in its hands: it uses no older one any more."""
        pool = self._pools.get(name)
        given = None if pool is None else pool.given.get(instance)
        if pool is None or given is None:
            return
        given.arrived = True
        if len(given.shares) < 2:
            return
        while len(given.shares) > 1:
            given.shares.popleft().standing = False
        pool.count(given)
        pool.expire(self._clock())
        if len(pool.expiries) > 4 * len(pool.given) + 64:
            # Those that were freed early, behind one that stands.
            pool.expiries = deque(entry for entry in pool.expiries if entry[0].standing)

    def share(self, instance: str, pool: str, touched: Touched) -> pb.FallbackShare | None:
        """A new share, as callers get it."""
        amounts = self.take(instance, pool, per_minute(pool, touched))
        if amounts is None:
            return None
        message = pb.FallbackShare(pool=pool)
        for dimension, amount in amounts.items():
            message.amounts.add(dimension=int(dimension), per_minute=amount)
        message.expires_in.FromMicroseconds(self._expiry_us)
        return message

    def outstanding(self, name: str) -> Amounts:
        """What is handed out of a pool at this moment."""
        pool = self._pools.get(name)
        if pool is None:
            return {}
        pool.expire(self._clock())
        return {dimension: amount for dimension, amount in pool.out.items() if amount}

    def _pool(self, name: str, now: int) -> _Pool | None:
        pool = self._pools.get(name)
        if pool is None:
            if len(self._pools) >= MAX_FALLBACK_POOLS:
                self._sweep(now)
                if len(self._pools) >= MAX_FALLBACK_POOLS:
                    return None
            pool = self._pools[name] = _Pool(now)
        return pool

    def _given(self, pool: _Pool, instance: str, now: int) -> _Given | None:
        given = pool.given.get(instance)
        if given is None:
            if len(pool.given) >= self._most:
                self._forget_idle(pool, now)
                if len(pool.given) >= self._most:
                    return None
            given = pool.given[instance] = _Given()
            given.asked_at = now
        return given

    def _forget_idle(self, pool: _Pool, now: int) -> None:
        """Those that have no share, and have not asked for long."""
        pool.expire(now)
        if now < pool.swept_at + SWEEP_US:
            return
        pool.swept_at = now
        idle = now - self._expiry_us
        for name in [each for each, given in pool.given.items() if not given.shares and given.asked_at < idle]:
            pool.forget(name, pool.given[name])

    def _sweep(self, now: int) -> None:
        for name, pool in list(self._pools.items()):
            self._forget_idle(pool, now)
            if not pool.given:
                del self._pools[name]
