"""Pools, shares and limits: how they come to be, and how an operator changes them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from paceline.engine import answers as an
from paceline.engine import events as ev
from paceline.engine import operations as op
from paceline.engine.answers import Answer
from paceline.engine.books import FULL, Books
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import UNLIMITED, WINDOW_US, Dimension, Limit, Window
from paceline.engine.pressure import Pressure
from paceline.engine.promised import over_promised
from paceline.engine.state import Share
from paceline.engine.terms import Terms


class Definitions:
    """Turns definitions into events."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._state = books.state

    def define(self, operation: op.Operation) -> Answer:
        """Carry out an administrative operation."""
        if isinstance(operation, op.DefinePool):
            return self._pool(operation)
        if isinstance(operation, op.DefineShare):
            return self._share(operation)
        if isinstance(operation, op.DefineSpend):
            amount = UNLIMITED if operation.cap is None else operation.cap
            self._set("", "", Limit(Dimension.SPEND, Window.MONTH, amount), FULL)
            return an.Done()
        if isinstance(operation, op.SetLimit):
            return self._override(operation)
        if isinstance(operation, op.SetMode):
            return self._set_mode(operation)
        if isinstance(operation, op.DefineModes):
            return self._configure_modes(operation)
        if isinstance(operation, op.DefineClasses):
            return self._classes(operation)
        if isinstance(operation, op.SetPaused):
            return self._pause(operation)
        raise TypeError(f"not an operation: {type(operation).__name__}")

    def _pool(self, operation: op.DefinePool) -> Answer:
        state = self._state
        name = operation.pool
        counted = {rule.dimension for rule in operation.profile.rules}
        for place, limit in enumerate(operation.limits):
            if limit.dimension not in counted or limit.dimension is Dimension.SPEND:
                return an.Invalid(f"limits[{place}].dimension", "is not counted by the pool's accounting profile")
        pool = state.pools.get(name)
        if pool is None and len(state.pools) >= self._books.caps.pools:
            return an.Invalid("pool", f"the ledger has its most pools ({self._books.caps.pools})", full=True)
        if len(state.buckets) + len(operation.limits) > self._books.caps.buckets:
            return an.Invalid("pool", f"the ledger has its most limits ({self._books.caps.buckets})", full=True)
        if pool is None or pool.profile != operation.profile or pool.learn is not operation.learn:
            self._books.emit(ev.PoolDefined(name, operation.profile, operation.learn))
            self._books.defined()
        for limit in operation.limits:
            self._set(name, "", limit, operation.fill, guessed=operation.guessed)
        self._lift_others(lambda bucket: bucket.pool == name and not bucket.share, operation.limits)
        return an.Done()

    def _share(self, operation: op.DefineShare) -> Answer:
        state = self._state
        share = state.shares.get(operation.share)
        if share is None and len(state.shares) >= self._books.caps.shares:
            return an.Invalid("share", f"the ledger has its most shares ({self._books.caps.shares})", full=True)
        terms = Terms(
            operation.caps, operation.weight, operation.guarantees, operation.cap_parts, operation.guarantee_parts
        )
        if operation.override:
            fault = over_promised(state, operation.share, terms)
            if fault is not None:
                return an.Invalid(f"share.{fault[0]}", fault[1])
        told = _told(share, operation, terms)
        if share == told:
            return an.Done()
        self._books.emit(ev.ShareDefined(*msgspec.structs.astuple(told)))
        if share is not None and share.terms == told.terms:
            return an.Done()
        self._books.defined()
        for number, bucket in enumerate(state.buckets):
            if bucket.share == operation.share:
                self._configure(number, self._cap(told, bucket))
        return an.Done()

    def _cap(self, share: Share, bucket: Bucket) -> Limit:
        """The cap of a share that a bucket stands for. What has none any more limits nothing, but goes on counting."""
        key = (bucket.dimension, bucket.window)
        for cap in share.caps:
            if (cap.dimension, cap.window) == key:
                return cap
        for part in share.cap_parts:
            if (part.dimension, part.window) == key:
                return self._books.part(bucket.pool, part) or Limit(*key, UNLIMITED)
        return Limit(*key, UNLIMITED)

    def _classes(self, operation: op.DefineClasses) -> Answer:
        if operation.classes != self._state.classes:
            self._books.emit(ev.ClassesDefined(operation.classes))
            self._books.defined()
        return an.Done()

    def _override(self, operation: op.SetLimit) -> Answer:
        limit = operation.limit
        if limit is not None and limit.dimension is not operation.dimension:
            return an.Invalid("limit.dimension", "is not the dimension to override")
        found = False
        for number, bucket in enumerate(self._state.buckets):
            if bucket.share or bucket.pool != operation.pool or bucket.dimension is not operation.dimension:
                continue
            if limit is not None and limit.window is not bucket.window:
                continue
            found = True
            bucket = self._books.advance(number)
            told = Limit(bucket.dimension, bucket.window, bucket.configured, bucket.configured_burst)
            self.move(number, told if limit is None else limit, learned=False, override=limit is not None)
        if not found:
            return an.Invalid("dimension", "the pool has no such limit")
        return an.Done()

    def _configure_modes(self, operation: op.DefineModes) -> Answer:
        configured = self._state.configured_modes
        told = {(pool, tenant): mode for pool, tenant, mode in operation.modes}
        if len(told) + len(self._state.modes) > self._books.caps.modes:
            return an.Invalid("modes", f"the ledger has its most modes ({self._books.caps.modes})", full=True)
        for pool, tenant in [address for address in configured if address not in told]:
            self._books.emit(ev.ModeSet(pool, tenant, None, configured=True))
        for (pool, tenant), mode in told.items():
            if configured.get((pool, tenant)) is not mode:
                self._books.emit(ev.ModeSet(pool, tenant, mode, configured=True))
        return an.Done()

    def _set_mode(self, operation: op.SetMode) -> Answer:
        modes, mode = self._state.modes, operation.mode
        if mode is not None and len(modes) >= self._books.caps.modes:
            return an.Invalid("tenant", f"the ledger has its most modes ({self._books.caps.modes})", full=True)
        if modes.get((operation.pool, operation.tenant)) is not mode:
            self._books.emit(ev.ModeSet(operation.pool, operation.tenant, mode))
        return an.Done()

    def _pause(self, operation: op.SetPaused) -> Answer:
        pool = self._state.pools.get(operation.pool)
        if pool is None:
            return an.Invalid("pool", "is not known here")
        if pool.paused is not operation.paused:
            self._books.emit(ev.PoolPaused(operation.pool, operation.paused))
        if not operation.paused and pool.blocked_until > self._state.at:
            self._books.emit(ev.PoolBlocked(operation.pool, 0, False))
        held = pool.pressure
        if not operation.paused and held is not None and (held.overload is not None or held.crowd is not None):
            # The operator knows better. A ramp goes on climbing.
            self._books.emit(ev.Pressed(operation.pool, Pressure(ramps=held.ramps) if held.ramps else None))
        return an.Done()

    def _set(self, scope: str, share: str, limit: Limit, fill: int, *, guessed: bool = False) -> None:
        number = self._state.addresses.get((scope, share, limit.dimension, limit.window))
        if number is None:
            self._books.add_bucket(scope, share, limit, fill, guessed=guessed)
        else:
            self._configure(number, limit)

    def _configure(self, number: int, limit: Limit) -> None:
        """Configuration says ``limit``: it rules if that is news, and no operator has overridden it."""
        bucket = self._state.buckets[number]
        if (bucket.configured, bucket.configured_burst) == (limit.amount, limit.capacity):
            return
        bucket = self._books.advance(number)
        kept = Limit(bucket.dimension, bucket.window, bucket.amount, bucket.burst) if bucket.override else limit
        self.move(number, kept, learned=False, override=bucket.override, configured=limit)

    def _lift_others(self, concerns: Callable[[Bucket], bool], limits: tuple[Limit, ...]) -> None:
        """What is no longer configured limits nothing any more, but goes on counting."""
        told = {(limit.dimension, limit.window) for limit in limits}
        for number, bucket in enumerate(self._state.buckets):
            if concerns(bucket) and (bucket.dimension, bucket.window) not in told:
                self._configure(number, Limit(bucket.dimension, bucket.window, UNLIMITED))

    def move(
        self, number: int, limit: Limit, *, learned: bool, override: bool, configured: Limit | None = None
    ) -> None:
        """Change a limit. The level stays, within the new burst; what is used of a month or a gauge stays used."""
        bucket = self._state.buckets[number]
        burst = limit.capacity
        shift = burst - bucket.burst if limit.window not in WINDOW_US else min(0, burst - bucket.level)
        before = bucket.amount, bucket.burst
        self._books.emit(
            ev.LimitMoved(
                number,
                limit.amount,
                burst,
                shift,
                learned,
                bucket.configured if configured is None else configured.amount,
                bucket.configured_burst if configured is None else configured.capacity,
                override,
            )
        )
        if bucket.pool and not bucket.share and before != (bucket.amount, bucket.burst):
            self._follow(bucket)

    def _follow(self, moved: Bucket) -> None:
        """Caps that are parts of a pool's limit go with it."""
        state = self._state
        for share in state.shares.values():
            for part in share.cap_parts:
                if (part.dimension, part.window) == (moved.dimension, moved.window):
                    number = state.addresses.get((moved.pool, share.name, part.dimension, part.window))
                    limit = self._books.part(moved.pool, part)
                    if number is not None and limit is not None:
                        self._configure(number, limit)


def _told(share: Share | None, operation: op.DefineShare, terms: Terms) -> Share:
    """A share as it is from now on. What an operator has set stays until an operator says what is configured."""
    name, override, configured = operation.share, operation.override, None
    if override and share is not None:
        configured = share.configured if share.override else share.terms
        override = terms != configured
    elif share is not None and share.override:
        terms, configured, override = share.terms, terms, share.terms != terms
    told = (terms.caps, terms.weight, terms.guarantees, terms.cap_parts, terms.guarantee_parts)
    return Share(name, *told, override, configured if override else None)
