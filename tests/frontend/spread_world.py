"""Ledgers and front ends on a clock that stands until it is told: real engines, and a network that delays and loses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from random import Random
from typing import Any, cast

from paceline.engine.accounting import Estimate, Profile, Rule
from paceline.engine.answers import Answer, Granted
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import Candidate, DefinePool, Operation, Release, Reserve, SetPaused
from paceline.frontend.errors import Problem
from paceline.frontend.fleet import aged
from paceline.frontend.requests import Reservation
from paceline.frontend.routing import Inquiry, Router, Slot, Standing, stands, summed
from paceline.frontend.spread import Spread, Spreads
from paceline.ledger.clock import ManualClock, Timer
from paceline.ledger.errors import LedgerError, LedgerUnavailable

POOL = "pool"
KEPT_US = 5_000_000
"""For how long a front end keeps operations for a ledger that is away."""
Reply = Callable[[Answer | LedgerError], object]


class Ledger:
    """One ledger: ``requests`` a minute, all of them at once. Its waiters die with its owner, its books do not."""

    def __init__(self, clock: ManualClock, name: str, requests: int) -> None:
        self.clock = clock
        self.name = name
        self.away_since: int | None = None
        self.mute = False
        """The owner is stopped: it answers nothing, and nobody knows."""
        self.unheard: list[Callable[[], None]] = []
        self.tickets = 0
        self.replies: dict[int, Reply] = {}
        self.engine = Engine(name)
        rule = Rule(Dimension.REQUESTS, hold_requests=1_000, settle_requests=1_000)
        limit = Limit(Dimension.REQUESTS, Window.MINUTE, requests)
        self.decide(DefinePool(POOL, Profile("one", (rule,)), (limit,)), lambda _: None)

    def decide(self, operation: Operation, reply: Reply) -> None:
        self.tickets += 1
        self.replies[self.tickets] = reply
        self.step([(self.tickets, operation)])

    def step(self, operations: list[tuple[int, Operation]]) -> None:
        engine = self.engine
        step = engine.step(self.clock.monotonic(), operations)
        for ticket, answer in step.answers:
            self.replies.pop(ticket)(answer)
        if step.wake_at is not None:
            self.clock.call_at(step.wake_at, lambda: self.step([]) if self.engine is engine and self.up else None)

    @property
    def up(self) -> bool:
        return self.away_since is None and not self.mute

    def lose_owner(self) -> None:
        if self.away_since is None:
            self.away_since = self.clock.monotonic()
            self.replies.clear()

    def new_owner(self) -> None:
        if self.away_since is not None:
            self.away_since = None
            self.engine = Engine(self.name, self.engine.state)
            if self.up:
                self.step([])

    def speak(self) -> None:
        self.mute = False
        unheard, self.unheard = self.unheard, []
        for message in unheard:
            message()
        if self.up:
            self.step([])

    @property
    def open(self) -> list[str]:
        return list(self.engine.state.open)

    @property
    def waiting(self) -> int:
        return len(self.engine.waiters())


class FarSlot(Slot):
    """A ledger as a front end sees it: it keeps what has no answer, and brings it to the next owner."""

    def __init__(self, front: FrontEnd, ledger: Ledger) -> None:
        super().__init__(ledger.name, None, ())
        self.front = front
        self.ledger = ledger
        self.asked: list[Operation] = []
        self._pending: dict[int, tuple[Operation, Reply, int]] = {}
        self._numbers = 0

    @property
    def ready(self) -> bool:
        return self.ledger.away_since is None

    @property
    def away_us(self) -> int:
        since = self.ledger.away_since
        return 0 if since is None else self.front.clock.monotonic() - since

    def submit(self, operation: Operation, reply: Reply) -> None:
        self.asked.append(operation)
        self._numbers += 1
        number = self._numbers
        self._pending[number] = (operation, reply, self.front.clock.monotonic())
        if self.ready:
            self._send(number)
        elif self.away_us >= KEPT_US:
            self._settle(number, LedgerUnavailable("away"))
        else:
            self._keep(number)

    def reserve(self, operation: Operation, choices: Iterable[object], reply: Reply) -> None:
        self.submit(operation, reply)

    def resend(self) -> None:
        """There is a new owner."""
        for number in list(self._pending):
            self._send(number)

    def _keep(self, number: int) -> None:
        """Nobody decides: wait for the next owner, but not for ever."""

        def over() -> None:
            if not self.ready:
                self._settle(number, LedgerUnavailable("away"))

        self.front.clock.call_at(self.front.clock.monotonic() + KEPT_US, over)

    def _send(self, number: int) -> None:
        ledger, front = self.ledger, self.front
        operation, _, at = self._pending[number]
        engine = ledger.engine

        def arrive() -> None:
            if ledger.mute:
                ledger.unheard.append(arrive)
            elif ledger.engine is engine and ledger.up:
                elapsed = front.clock.monotonic() - at
                ledger.decide(aged(operation, elapsed) if elapsed > 50_000 else operation, answered)

        def answered(answer: Answer | LedgerError) -> None:
            front.clock.call_at(front.clock.monotonic() + front.delay(), lambda: back(answer))

        def back(answer: Answer | LedgerError) -> None:
            if ledger.engine is engine and ledger.away_since is None:
                self._settle(number, answer)
            elif number in self._pending:
                self._keep(number)

        front.clock.call_at(front.clock.monotonic() + front.delay(), arrive)

    def _settle(self, number: int, answer: Answer | LedgerError) -> None:
        found = self._pending.pop(number, None)
        if found is not None and not self.front.crashed:
            found[1](answer)


class FarRouter:
    """What :class:`Spreads` needs of a router, every ledger being owned elsewhere."""

    is_spread = False
    closed = False

    def __init__(self, front: FrontEnd, ledgers: Iterable[Ledger]) -> None:
        self.slots: dict[str, FarSlot] = {ledger.name: FarSlot(front, ledger) for ledger in ledgers}

    def slot(self, account: str, path: str) -> FarSlot:
        return self.slots[account]

    def look(self, key: str) -> Inquiry:
        """At once, though a real one takes a round trip."""
        told: list[tuple[Slot, Standing | None]] = []
        silent: list[Slot] = []
        for slot in self.slots.values():
            if slot.ledger.up:
                told.append((slot, stands(slot.ledger.engine, key, slot.front.clock.monotonic())))
            else:
                silent.append(slot)
        return summed(told, silent)

    async def inquire(self, key: str, timeout_us: int, unasked: Collection[str] = ()) -> Inquiry:
        return self.look(key)


class Place:
    """A destination."""

    def __init__(self, account: str) -> None:
        self.account = account


class Ask:
    """A caller of one Reserve, and what it got."""

    def __init__(self, front: FrontEnd, key: str, accounts: Iterable[str], wait_us: int) -> None:
        self.slot: Slot | None = None
        self.choices: tuple[tuple[int, Any], ...] = ()
        self.spread: Spread | None = None
        self.answers: list[Answer | LedgerError | Problem] = []
        self.accounts = tuple(accounts)
        self.front = front
        self.key = key
        self.at = front.clock.monotonic()
        self.took = -1
        choices = tuple((index, cast(Any, Place(account))) for index, account in enumerate(self.accounts))
        candidate = Candidate(POOL, estimate=Estimate(requests=1))
        operation = Reserve(key, (candidate,) * len(choices), max_wait_us=wait_us, hold_us=600_000_000)
        try:
            front.spreads.start(self, Reservation(operation, choices, None))
        except Problem as problem:
            self.refused(problem)

    def reserved(self, answer: Answer | LedgerError) -> None:
        self.took = self.front.clock.monotonic() - self.at
        self.answers.append(answer)

    def refused(self, problem: Problem) -> None:
        self.took = self.front.clock.monotonic() - self.at
        self.answers.append(problem)

    @property
    def answer(self) -> Answer | LedgerError | Problem | None:
        assert len(self.answers) < 2, "answered twice"
        return self.answers[0] if self.answers else None

    @property
    def granted_by(self) -> str | None:
        return self.slot.account if isinstance(self.answer, Granted) and self.slot is not None else None


class OwnTime:
    """The clock of one process, which ends with it."""

    def __init__(self, front: FrontEnd, clock: ManualClock) -> None:
        self.monotonic = clock.monotonic
        self.wall = clock.wall
        self.sleep_until = clock.sleep_until
        self._front = front
        self._clock = clock

    def call_at(self, when: int, callback: Callable[[], object]) -> Timer:
        return self._clock.call_at(when, lambda: None if self._front.crashed else callback())


class FrontEnd:
    """One server process; ``delay`` makes the µs that a message takes."""

    def __init__(self, clock: ManualClock, ledgers: Iterable[Ledger], delay: Callable[[], int]) -> None:
        self.clock = clock
        self.delay = delay
        self.crashed = False
        self.router = FarRouter(self, ledgers)
        self.spreads = Spreads(cast(Router, self.router), OwnTime(self, clock))


class World:
    """``ledgers``: by name, how many calls each takes at once, and by the minute."""

    def __init__(self, ledgers: dict[str, int], *, fronts: int = 1, seed: int | None = None) -> None:
        self.clock = ManualClock()
        self.random = Random(seed)
        self.ledgers = {name: Ledger(self.clock, name, requests) for name, requests in ledgers.items()}
        delay = (lambda: 1_000) if seed is None else (lambda: self.random.randint(100, 20_000))
        self.fronts = [FrontEnd(self.clock, self.ledgers.values(), delay) for _ in range(fronts)]

    def ask(self, key: str, wait_s: float = 0, accounts: Iterable[str] = (), front: int = 0) -> Ask:
        return Ask(self.fronts[front], key, accounts or self.ledgers, int(wait_s * 1e6))

    def fill(self, name: str) -> None:
        """Use the ledger up."""
        ledger = self.ledgers[name]
        for number in range(10_000):
            got: list[Any] = []
            ledger.decide(Reserve(f"{name}-{number}", (Candidate(POOL, estimate=Estimate(requests=1)),)), got.append)
            if not isinstance(got[0], Granted):
                return

    def free(self, name: str) -> None:
        """Give one call back."""
        ledger = self.ledgers[name]
        key = next(key for key in ledger.open if key.startswith(name))
        ledger.decide(Release(key), lambda _: None)

    def pause(self, name: str, paused: bool = True) -> None:
        self.ledgers[name].decide(SetPaused(POOL, paused), lambda _: None)

    def lose(self, name: str) -> None:
        self.ledgers[name].lose_owner()

    def find(self, name: str) -> None:
        """A new owner, if there is none."""
        if self.ledgers[name].away_since is None:
            return
        self.ledgers[name].new_owner()
        for front in self.fronts:
            if not front.crashed:
                front.router.slots[name].resend()

    def run(self, seconds: float) -> None:
        self.clock.advance(int(seconds * 1e6))

    def holders(self, key: str) -> list[str]:
        return [name for name, ledger in self.ledgers.items() if key in ledger.open]
