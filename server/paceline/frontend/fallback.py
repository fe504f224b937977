"""Fallback shares: what each client process may use by itself while no server can be reached.

The shares of a pool that are handed out and have not expired add up to no more than its limit, in every dimension and
at every instant. A newer, smaller share does not free the older one before that expires, or before the client has
shown that the newer one arrived: by a report on a grant that came with it or after it.

Shares follow demand: what an instance was granted lately, beside a floor for everybody, so that idle processes do not
hold what busy ones need. A part of each limit is kept back for those that come next, and a first share is small, since
nothing is known yet of who else comes.

The owner of a ledger hands out the shares of its pools, and it alone, whichever server a client is connected to
(:mod:`paceline.frontend.shares` is the front ends' side). A new owner takes over the accounts of the one before it, if
that one still lives and has given them to nobody else. Otherwise it knows nothing of what is out: it gives no share
before the last of those has expired, since the clients still have them.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from paceline.engine.answers import Touched
from paceline.engine.dimensions import DAY_US, MINUTE_US, SECOND_US, UNLIMITED, Dimension, Window
from paceline.engine.state import State
from paceline.frontend.limits import (
    FALLBACK_EXPIRY_US,
    FALLBACK_GRACE_US,
    MAX_FALLBACK_INSTANCES,
    MAX_FALLBACK_POOLS,
    MAX_LEDGERS,
)

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

MAX_SURRENDERED = 20_000
"""Accounts of instances, over all pools of a ledger, that are handed to the next owner; with more, it has to wait."""

_MOST_TENURES = 4 * MAX_LEDGERS
_SERIAL_BITS = 32

Amounts = dict[Dimension, int]


def per_minute(pool: str, touched: Touched) -> Amounts:
    """The limits of a pool as amounts per minute, or as the value of a gauge; of several windows, the tightest."""
    amounts: Amounts = {}
    for state in touched.dimensions:
        if state.pool == pool and not state.share and state.limit < UNLIMITED:
            amount = max(0, state.limit) // _PER_MINUTE[state.window]
            amounts[state.dimension] = min(amount, amounts.get(state.dimension, amount))
    return amounts


def pool_limits(state: State, pool: str) -> Amounts | None:
    """The same from the books; ``None``: they have no such pool."""
    found = state.pools.get(pool)
    if found is None:
        return None
    amounts: Amounts = {}
    for number in found.buckets:
        bucket = state.buckets[number]
        if bucket.amount < UNLIMITED:
            amount = max(0, bucket.amount) // _PER_MINUTE[bucket.window]
            amounts[bucket.dimension] = min(amount, amounts.get(bucket.dimension, amount))
    return amounts


def blind_us(inherited_at: int | None, now: int, lease_us: int) -> int:
    """How long a new owner that knows nothing of the shares of the one before has to wait.

    ``inherited_at`` is the last ledger time of the owner before (``None``: there was none), ``now`` the present one.
    """
    if inherited_at is None:
        return 0
    return max(0, inherited_at + FALLBACK_EXPIRY_US + FALLBACK_GRACE_US + lease_us - now)


class Share(msgspec.Struct, gc=False):
    """One share of one instance."""

    serial: int
    """Not that of any other share of this ledger."""
    until: int
    """On this process's clock, µs."""
    amounts: Amounts
    standing: bool = True
    """It has not been freed before its time."""
    arrived: bool = False
    """The client has shown that it has it."""
    repeated: bool = False
    """It was answered more than once, so that no front end can tell that no client has it."""


class _Given:
    """What one instance may hold: its unexpired shares, oldest first, and its demand."""

    __slots__ = ("asked_at", "demand", "most", "shares")

    def __init__(self) -> None:
        self.shares: deque[Share] = deque()
        self.most: Amounts = {}
        """The largest amounts among them: any of them may be the one in use."""
        self.demand: dict[Dimension, float] = {}
        self.asked_at = 0


class _Tenure:
    """The time in which this process shares out a ledger's pools."""

    __slots__ = ("epoch", "frozen", "sharing_at", "surrendered_to")

    def __init__(self, epoch: int, sharing_at: int) -> None:
        self.epoch = epoch
        self.sharing_at = sharing_at
        self.frozen = False
        """Another process is the owner."""
        self.surrendered_to = ""


class _GivenState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    instance: str
    demand: dict[int, float]
    shares: list[tuple[int, int, dict[int, int], bool]]
    """Serial, µs left, amounts, whether it has arrived."""


class _PoolState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    name: str
    given: list[_GivenState]


class _LedgerState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The accounts of a ledger at one moment. All times are durations."""

    blind_us: int
    """For so long there may be shares out of which these accounts know nothing."""
    pools: list[_PoolState]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_LedgerState).decode


class _Pool:
    """The shares of one pool, by instance. ``out`` and ``demand`` are the sums over all."""

    __slots__ = ("base", "demand", "expiries", "given", "ledger", "out", "swept_at")

    def __init__(self, now: int, ledger: str) -> None:
        self.ledger = ledger
        self.given: OrderedDict[str, _Given] = OrderedDict()
        self.expiries: deque[tuple[Share, str]] = deque()
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

    def state(self, now: int) -> Iterator[_GivenState]:
        """The accounts of all instances at this moment."""
        weight = self.weigh(now)
        for instance, given in self.given.items():
            shares = [
                (
                    share.serial,
                    share.until - now,
                    {int(key): value for key, value in share.amounts.items()},
                    share.arrived,
                )
                for share in given.shares
            ]
            yield _GivenState(instance, {int(key): value / weight for key, value in given.demand.items()}, shares)

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


def _restored(found: _PoolState, ledger: str, now: int) -> _Pool:
    """Accounts of another process on this one's clock. Raises :class:`ValueError` for an unknown dimension."""
    pool = _Pool(now, ledger)
    expiries: list[tuple[Share, str]] = []
    for each in found.given:
        given = pool.given[each.instance] = _Given()
        given.asked_at = now
        given.demand = {Dimension(key): weight for key, weight in each.demand.items()}
        for dimension, weight in given.demand.items():
            pool.demand[dimension] = pool.demand.get(dimension, 0.0) + weight
        for serial, left_us, amounts, arrived in each.shares:
            # Another answer with it may be on its way: it counts as given more than once.
            known = {Dimension(key): amount for key, amount in amounts.items()}
            share = Share(serial, now + left_us, known, arrived=arrived, repeated=True)
            given.shares.append(share)
            expiries.append((share, each.instance))
        pool.count(given)
    expiries.sort(key=lambda entry: entry[0].until)
    pool.expiries.extend(expiries)
    return pool


class Fallback:
    """Hands out the shares of the ledgers that this process owns. ``clock`` is monotonic, in µs.

    Memory is bounded: ``MAX_FALLBACK_POOLS`` pools, ``MAX_FALLBACK_INSTANCES`` instances each, and three shares of one
    instance; beyond that there are no new shares until others expire.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        *,
        node: str = "",
        expiry_us: int = FALLBACK_EXPIRY_US,
        most: int = MAX_FALLBACK_INSTANCES,
    ) -> None:
        self.node = node
        self._clock = clock
        self._expiry_us = expiry_us
        self._most = most
        self._pools: dict[str, _Pool] = {}
        self._tenures: dict[str, _Tenure] = {}
        self._serials = 0

    # -- ledgers --------------------------------------------------------------------------------------------------

    def begin(self, ledger: str, epoch: int, wait_us: int, before: str = "") -> bool:
        """This process has become the owner under ``epoch``, after node ``before``. ``False``: nothing is known of
        what is out, and nothing is given for ``wait_us``, unless :meth:`adopt` brings it (:func:`blind_us`)."""
        now = self._clock()
        tenure = self._tenures.get(ledger)
        if tenure is not None and tenure.epoch == epoch:
            tenure.frozen = bool(tenure.surrendered_to)
            return self.is_sharing(ledger)
        if tenure is not None and before == self.node and tenure.epoch == epoch - 1 and not tenure.surrendered_to:
            # It follows itself: the accounts are those of what is out.
            tenure.epoch, tenure.frozen = epoch, False
            return True
        self._drop(ledger)
        if len(self._tenures) >= _MOST_TENURES:
            for name in [name for name, each in self._tenures.items() if each.frozen]:
                self._drop(name)
        self._tenures[ledger] = _Tenure(epoch, now + wait_us)
        return wait_us <= 0

    def freeze(self, ledger: str) -> None:
        """This process owns it no more. The accounts stay, for the next owner to fetch."""
        tenure = self._tenures.get(ledger)
        if tenure is not None:
            tenure.frozen = True

    def is_sharing(self, ledger: str) -> bool:
        """Whether shares may be handed out now, as far as the accounts tell; the lease is another matter."""
        tenure = self._tenures.get(ledger)
        return tenure is not None and not tenure.frozen and self._clock() >= tenure.sharing_at

    def surrender(self, ledger: str, epoch: int, node: str) -> bytes | None:
        """The accounts, for ``node``, the owner under ``epoch``; ``None``: they are not here, or would not suffice.

        Nothing is handed out from here afterwards. They go to one node only, which may ask again.
        """
        tenure = self._tenures.get(ledger)
        if tenure is None or tenure.epoch >= epoch:
            return None
        tenure.frozen = True
        if tenure.epoch != epoch - 1 or tenure.surrendered_to not in ("", node):
            return None
        now = self._clock()
        pools = [(name, pool) for name, pool in self._pools.items() if pool.ledger == ledger]
        for _, pool in pools:
            pool.expire(now)
        if sum(len(pool.given) for _, pool in pools) > MAX_SURRENDERED:
            return None
        tenure.surrendered_to = node
        blind = max(0, tenure.sharing_at - now)
        return _encode(_LedgerState(blind, [_PoolState(name, list(pool.state(now))) for name, pool in pools]))

    def adopt(self, ledger: str, epoch: int, accounts: bytes) -> bool:
        """Go on with the accounts of the owner before; whether they could be used."""
        tenure = self._tenures.get(ledger)
        if tenure is None or tenure.frozen or tenure.epoch != epoch or self.is_sharing(ledger):
            return False
        try:
            found = _decode(accounts)
            pools = [(each.name, _restored(each, ledger, self._clock())) for each in found.pools]
        except (msgspec.DecodeError, ValueError):
            return False
        if len(self._pools) + len(pools) > MAX_FALLBACK_POOLS:
            return False
        self._pools.update(pools)
        tenure.sharing_at = self._clock() + max(0, found.blind_us)
        return True

    def _drop(self, ledger: str) -> None:
        self._tenures.pop(ledger, None)
        for name in [name for name, pool in self._pools.items() if pool.ledger == ledger]:
            del self._pools[name]

    # -- shares ---------------------------------------------------------------------------------------------------

    def note(
        self, instance: str, name: str, charges: Iterable[tuple[Dimension, int]], count: int = 1, *, ledger: str = ""
    ) -> None:
        """``instance`` was granted ``count`` calls that hold ``charges`` each."""
        now = self._clock()
        pool = self._pool(name, now, ledger)
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

    def take(
        self, instance: str, name: str, limits: Mapping[Dimension, int], *, ledger: str = "", known: int | None = None
    ) -> Share | None:
        """A new share of pool ``name`` for ``instance``, good for the expiry from now; ``None``: there is none.

        While nothing shows that the newest has arrived there is no other one. A front end that has not heard of it,
        since its serial is not the ``known`` one, is told it again.
        """
        now = self._clock()
        pool = self._pool(name, now, ledger)
        if pool is None:
            return None
        pool.expire(now)
        given = self._given(pool, instance, now)
        if given is None:
            return None
        given.asked_at = now
        newest = given.shares[-1] if given.shares else None
        if newest is not None and not newest.arrived and now < newest.until - self._expiry_us // 2:
            if known is None or known == newest.serial:
                # Nothing shows that they arrive, as with clients without a session.
                return None
            newest.repeated = True
            return newest
        if len(given.shares) > 2:
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
        self._serials += 1
        tenure = self._tenures.get(ledger)
        serial = ((0 if tenure is None else tenure.epoch) << _SERIAL_BITS) + self._serials
        share = Share(serial, now + self._expiry_us, amounts)
        given.shares.append(share)
        pool.expiries.append((share, instance))
        pool.count(given)
        return share

    def arrived(self, instance: str, name: str, serial: int) -> None:
        """This share of ``instance`` is in its hands: it uses no older one any more."""
        pool = self._pools.get(name)
        given = None if pool is None else pool.given.get(instance)
        if pool is None or given is None or all(share.serial != serial for share in given.shares):
            return
        older = 0
        while given.shares[0].serial != serial:
            given.shares.popleft().standing = False
            older += 1
        given.shares[0].arrived = True
        if older:
            self._freed(pool, given)

    def returned(self, instance: str, name: str, serial: int) -> None:
        """The front end that was given this share has passed it to nobody, and never will."""
        pool = self._pools.get(name)
        given = None if pool is None else pool.given.get(instance)
        if pool is None or given is None:
            return
        for share in given.shares:
            if share.serial == serial and not share.repeated and not share.arrived:
                given.shares.remove(share)
                share.standing = False
                self._freed(pool, given)
                if not given.shares and pool.given.get(instance) is given:
                    # As after an expiry: whoever holds nothing is not counted among those that share.
                    pool.forget(instance, given)
                return

    def left_us(self, share: Share) -> int:
        """Of a share's life."""
        return share.until - self._clock()

    def _freed(self, pool: _Pool, given: _Given) -> None:
        pool.count(given)
        pool.expire(self._clock())
        if len(pool.expiries) > 4 * len(pool.given) + 64:
            # Those that were freed early, behind one that stands.
            pool.expiries = deque(entry for entry in pool.expiries if entry[0].standing)

    def outstanding(self, name: str) -> Amounts:
        """What is handed out of a pool at this moment."""
        pool = self._pools.get(name)
        if pool is None:
            return {}
        pool.expire(self._clock())
        return {dimension: amount for dimension, amount in pool.out.items() if amount}

    def _pool(self, name: str, now: int, ledger: str) -> _Pool | None:
        pool = self._pools.get(name)
        if pool is None:
            if len(self._pools) >= MAX_FALLBACK_POOLS:
                self._sweep(now)
                if len(self._pools) >= MAX_FALLBACK_POOLS:
                    return None
            pool = self._pools[name] = _Pool(now, ledger)
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
