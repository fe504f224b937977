"""Fallback shares: what each client process may use by itself while no server can be reached.

The shares of a pool that are handed out and have not expired add up to no more than its limit, in every dimension and
at every instant. A newer, smaller share does not free the older one before that expires: it may not have arrived.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from paceline.engine.answers import Touched
from paceline.engine.dimensions import DAY_US, MINUTE_US, UNLIMITED, Dimension, Window
from paceline.frontend.limits import FALLBACK_EXPIRY_US, MAX_FALLBACK_INSTANCES, MAX_FALLBACK_POOLS
from paceline_client.stubs import v1 as pb

_MONTH_US = 31 * DAY_US
_PER_MINUTE = {
    Window.NONE: 1,
    Window.MINUTE: 1,
    Window.DAY: DAY_US // MINUTE_US,
    Window.MONTH: _MONTH_US // MINUTE_US,
}

Amounts = dict[Dimension, int]


def per_minute(pool: str, touched: Touched) -> Amounts:
    """The limits of a pool as amounts per minute, or as the value of a gauge; of several windows, the tightest."""
    amounts: Amounts = {}
    for state in touched.dimensions:
        if state.pool == pool and not state.share and state.limit < UNLIMITED:
            amount = max(0, state.limit) // _PER_MINUTE[state.window]
            amounts[state.dimension] = min(amount, amounts.get(state.dimension, amount))
    return amounts


class _Given:
    """What one instance may hold: its unexpired shares, oldest first, with their expiry."""

    __slots__ = ("shares",)

    def __init__(self) -> None:
        self.shares: list[tuple[int, Amounts]] = []

    def expire(self, now: int) -> None:
        self.shares = [share for share in self.shares if share[0] > now]

    def most(self, dimension: Dimension) -> int:
        """The largest amount among the unexpired: any of them may be the one in use."""
        return max((amounts.get(dimension, 0) for _, amounts in self.shares), default=0)


class _Pool:
    """The shares of one pool, by instance, the one renewed longest ago first."""

    __slots__ = ("given",)

    def __init__(self) -> None:
        self.given: OrderedDict[str, _Given] = OrderedDict()

    def expire(self, now: int) -> None:
        for name in list(self.given):
            given = self.given[name]
            given.expire(now)
            if given.shares:
                # The others were renewed later, but an older share of theirs may have expired.
                continue
            del self.given[name]


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

    def take(self, instance: str, name: str, limits: Mapping[Dimension, int]) -> Amounts | None:
        """A new share of pool ``name`` for ``instance``, good for the expiry from now; ``None``: there is none."""
        now = self._clock()
        pool = self._pools.get(name)
        if pool is None:
            if len(self._pools) >= MAX_FALLBACK_POOLS:
                self._sweep(now)
                if len(self._pools) >= MAX_FALLBACK_POOLS:
                    return None
            pool = self._pools[name] = _Pool()
        pool.expire(now)
        given = pool.given.get(instance)
        if given is None:
            if len(pool.given) >= self._most:
                return None
            given = _Given()
        elif len(given.shares) > 2:
            # Asked for again and again: the newest still stands.
            return None
        count = len(pool.given) + (instance not in pool.given)
        amounts: Amounts = {}
        for dimension, limit in limits.items():
            # Room is left for those who come next: half for the first, an eighth once there are many.
            fair = limit // (count + max(1, count // 8))
            others = sum(each.most(dimension) for each in pool.given.values() if each is not given)
            amounts[dimension] = max(0, min(fair, limit - others))
        given.shares.append((now + self._expiry_us, amounts))
        pool.given[instance] = given
        pool.given.move_to_end(instance)
        return amounts

    def share(self, instance: str, pool: str, touched: Touched) -> pb.FallbackShare | None:
        """The same, as callers get it."""
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
        sums: Amounts = {}
        for given in pool.given.values():
            for dimension in {each for _, amounts in given.shares for each in amounts}:
                sums[dimension] = sums.get(dimension, 0) + given.most(dimension)
        return sums

    def _sweep(self, now: int) -> None:
        for name, pool in list(self._pools.items()):
            pool.expire(now)
            if not pool.given:
                del self._pools[name]
