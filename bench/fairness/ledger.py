"""The real engine on a virtual clock, with an oracle that watches what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.fairness.oracle import Mark, Needs, Oracle
from bench.fairness.setup import DIMENSIONS, PoolLimits, Share, define_classes, define_pool, define_share
from bench.lab.clock import SECOND, Clock
from paceline.engine.accounting import Estimate, Usage, UsageKind
from paceline.engine.answers import Answer, Committed, Denied, Granted, Invalid, Released
from paceline.engine.engine import Caps, Engine
from paceline.engine.operations import (
    Candidate,
    Commit,
    Disposition,
    Operation,
    Outcome,
    Priority,
    Release,
    Reserve,
)
from paceline.engine.state import State

POOL = "model"
_LEDGER = "laboratory"


@dataclass(slots=True, eq=False)
class Call:
    """One call and what became of it; instants in µs of the clock.

    It needs one request and ``tokens`` tokens, in whichever of ``pools`` serves it. One that is ``unsent`` is given
    back after ``took_us`` instead of being settled.
    """

    key: str
    tenant: str
    tokens: int
    priority: Priority = Priority.STANDARD
    shares: tuple[str, ...] = ()
    pools: tuple[str, ...] = (POOL,)
    max_wait_us: int = 60 * SECOND
    took_us: int = SECOND
    count: int = 1
    """Calls in bulk, of ``tokens`` each; the number after the last slash of ``key`` is then a UUID."""
    unsent: bool = False
    done: Callable[[Call], None] = lambda call: None
    """Called when it is granted or denied."""
    offered_at: int = 0
    granted_at: int | None = None
    denied_at: int | None = None
    pool: str = ""
    held: Needs = ()
    each: Needs = ()
    """What each of its calls held when they were granted."""
    keys: tuple[str, ...] = ()
    """Of the reservations that were granted."""
    placed: bool = False
    """It was let wait."""
    promised_by: int | None = None
    """By when it would be served, as it was told when it began to wait."""
    denial: Denied | None = None

    @property
    def needs(self) -> Needs:
        """By dimension."""
        return self.count, self.tokens * self.count

    @property
    def deadline(self) -> int:
        """Until when it waits."""
        return self.offered_at + self.max_wait_us

    @property
    def waited_us(self) -> int | None:
        """From being offered to being granted."""
        return None if self.granted_at is None else self.granted_at - self.offered_at


@dataclass(slots=True)
class Ledger:
    """One ledger. Starts with its pools ``fill`` thousandths full.

    ``patience``: by key, another ``max_wait_us`` than the call would give.
    """

    clock: Clock
    pools: Mapping[str, PoolLimits]
    shares: Sequence[Share] = ()
    fill: int = 0
    caps: Caps = field(default_factory=Caps)
    patience: Mapping[str, int] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    """All that were offered, in that order."""
    promises: bool = False
    """Ask by when each call that waits will be served."""
    engine: Engine = field(init=False)
    oracle: Oracle = field(init=False)
    _asked: dict[int, tuple[Operation, Call]] = field(default_factory=dict)
    _serial: int = 0

    def __post_init__(self) -> None:
        self.engine = Engine(_LEDGER, State(_LEDGER), self.caps)
        self.oracle = Oracle(self.pools, self.fill, self.clock.now)
        self.clock.awake = self._wake
        limits = next(iter(self.pools.values()))
        definitions: list[Operation] = [define_pool(name, each, self.fill) for name, each in self.pools.items()]
        definitions += define_classes()
        definitions += [define_share(share, limits) for share in self.shares]
        answers = self.engine.step(self.clock.now, list(enumerate(definitions, -len(definitions)))).answers
        refused = [answer for _, answer in answers if isinstance(answer, Invalid)]
        if refused:
            raise RuntimeError(f"the engine refuses a definition: {refused[0]}")

    def offer(self, call: Call) -> None:
        """Reserve for it; the answer, at once or later, is written into it."""
        call.offered_at = self.clock.now
        self.calls.append(call)
        call.max_wait_us = self.patience.get(call.key, call.max_wait_us)
        estimate = Estimate(1, call.tokens, 0, 0, 0)
        candidates = tuple(Candidate(pool, call.shares, estimate) for pool in call.pools)
        reserve = Reserve(
            call.key,
            candidates,
            tenant=call.tenant,
            priority=call.priority,
            max_wait_us=call.max_wait_us,
            count=call.count,
        )
        ticket = self._step(reserve, call)
        if ticket in self._asked:
            call.placed = True
            self.oracle.waits(call.key, [(pool, call.needs) for pool in call.pools])
            if self.promises:
                self._note_promise(call)

    def withdraw(self, call: Call) -> None:
        """Take back one that waits."""
        if call.granted_at is None and call.denied_at is None:
            self._step(Release(call.key), call)

    def mark(self, pool: str = POOL) -> Mark:
        """The oracle's books of now."""
        self.oracle.advance(self.clock.now)
        return self.oracle.mark(pool)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _note_promise(self, call: Call) -> None:
        pending = self.engine.waiters().get(call.key)
        call.promised_by = getattr(pending, "expected_by", None)

    def _wake(self) -> None:
        self._step()

    def _step(self, operation: Operation | None = None, call: Call | None = None) -> int:
        """One step of the engine; the ticket of the operation (without one: zero)."""
        self.oracle.advance(self.clock.now)
        tickets: list[tuple[int, Operation]] = []
        if operation is not None and call is not None:
            self._serial += 1
            self._asked[self._serial] = operation, call
            tickets.append((self._serial, operation))
        step = self.engine.step(self.clock.now, tickets)
        self.clock.wake = step.wake_at
        for ticket, answer in step.answers:
            self._answered(*self._asked.pop(ticket), answer)
        return tickets[0][0] if tickets else 0

    def _answered(self, operation: Operation, call: Call, answer: Answer) -> None:
        if isinstance(answer, Granted):
            charges = dict(answer.context.charges)
            call.granted_at, call.pool = self.clock.now, answer.context.pool
            call.keys, call.each = answer.keys, tuple(charges.get(dimension, 0) for dimension in DIMENSIONS)
            call.held = tuple(hold * len(answer.keys) for hold in call.each)
            self.oracle.left(call.key)
            self.oracle.charge(call.pool, call.held)
            self.clock.at(self.clock.now + call.took_us, lambda: self._end(call))
            # Not at once: who is told of it may offer the next one, and a step is under way.
            self.clock.at(self.clock.now, lambda: call.done(call))
        elif isinstance(answer, Denied):
            call.denied_at, call.denial = self.clock.now, answer
            self.oracle.left(call.key)
            self.clock.at(self.clock.now, lambda: call.done(call))
        elif isinstance(answer, Committed):
            final = dict(answer.charges)
            self._correct(call, tuple(final.get(dimension, 0) for dimension in DIMENSIONS))
        elif isinstance(answer, Released):
            if call.granted_at is not None:
                self._correct(call, (0,) * len(DIMENSIONS))
        else:
            raise RuntimeError(f"the engine refuses {type(operation).__name__}: {answer}")

    def _correct(self, call: Call, one: Needs) -> None:
        """One of its calls has taken so much in the end."""
        final = tuple(
            map(sum, zip(call.held, (now - was for now, was in zip(one, call.each, strict=True)), strict=True))
        )
        self.oracle.charge(call.pool, tuple(now - was for now, was in zip(final, call.held, strict=True)))
        call.held = final

    def _end(self, call: Call) -> None:
        if call.unsent:
            self._step(Release(call.key), call)
            return
        usage = Usage(1, call.tokens)
        for key in call.keys:
            self._step(Commit(key, Outcome(Disposition.SUCCEEDED, usage, UsageKind.FINAL)), call)
