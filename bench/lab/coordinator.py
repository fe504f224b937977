"""The coordinator: the real engine on a virtual clock, with delays in front of it, and a restart when one is wanted."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from bench.lab.clock import Clock
from bench.lab.setting import MODEL, TIER, Setting
from paceline.engine.answers import Answer, Granted
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.operations import Commit, Observation, Operation, Renew, Reserve
from paceline.engine.state import Pool
from paceline.frontend.limits import FALLBACK_EXPIRY_US, FALLBACK_GRACE_US
from paceline.ledger.machine import EngineMachine
from paceline.providers.catalogue import AccountSetup, Catalogue, PoolSetup, Target

DIMENSIONS = {
    "requests": Dimension.REQUESTS,
    "input_tokens": Dimension.INPUT_TOKENS,
    "output_tokens": Dimension.OUTPUT_TOKENS,
}
_LEDGER = "default"
_BACK_S = 0.05
"""Callers come back to a coordinator that serves again within so long."""

Reply = Callable[[Answer, int], None]
"""Takes the answer, and the instant of the newest observation that the ledger had when it decided (0: none)."""


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One report that reached the ledger: when, of when its figures were, and what limit then ruled."""

    at: int
    taken: int
    ruling: int


@dataclass(slots=True)
class _Asked:
    operation: Operation
    reply: Reply | None
    since: int


class Coordinator:
    """Answers operations. ``known`` is the instant, at the upstream, of the newest observation that it has."""

    def __init__(self, clock: Clock, setting: Setting, chance: random.Random) -> None:
        self._clock = clock
        self._setting = setting
        self._chance = chance
        self.resolved = catalogue_of(setting.told if setting.told is not None else setting.limits).resolve(
            Target(model=MODEL)
        )
        self._machine = EngineMachine(unseen_us=FALLBACK_EXPIRY_US + FALLBACK_GRACE_US)
        self.state = self._machine.empty(_LEDGER)
        self.engine = self._machine.decider(_LEDGER, self.state)
        self.known = 0
        self.readings: list[Reading] = []
        self.settled: dict[str, int] = {}
        """Reported ends by route."""
        self.restarted_at: int | None = None
        """When it last began to serve again."""
        self._asked: dict[int, _Asked] = {}
        self._routes: dict[str, str] = {}
        self._serial = 0
        self._away: list[tuple[Operation, Reply | None, int, int]] | None = None
        clock.awake = self._step
        self._step(self.resolved.definition)

    def send(self, operation: Operation, reply: Reply | None = None, taken: int = 0, late_s: float = 0.0) -> None:
        """Send one, which arrives after the delay of the net. ``taken``: when the figures in it were the upstream's."""
        since = self._clock.now
        self._clock.after(late_s + self.delay(), lambda: self._take(operation, reply, taken, since))

    def delay(self) -> float:
        """One way between a caller and whom it calls, in seconds."""
        return self._chance.uniform(*self._setting.delay_s)

    def pool(self) -> Pool:
        """What the ledger says of the pool."""
        return self.state.pools[self.resolved.pool]

    def number(self, dimension: str) -> int:
        """The bucket of a dimension."""
        return self.state.addresses[self.resolved.pool, "", DIMENSIONS[dimension], Window.MINUTE]

    def bucket(self, dimension: str) -> Bucket:
        """What the ledger says of one limit, as it is written down: its level is of its own ``at``."""
        return self.state.buckets[self.number(dimension)]

    def level(self, dimension: str) -> int:
        """The level at this instant, net of what is held."""
        bucket = self.bucket(dimension)
        return bucket.level + bucket.refill(self._clock.now)[0]

    def restart(self, away_s: float) -> None:
        """Stop now; after ``away_s`` go on with what is in the journal. Waiters are forgotten, and come back."""
        self._away = []
        self._clock.wake = None
        chunks = list(self.state.dump())

        def back() -> None:
            self.state = self._machine.restore(_LEDGER, chunks)
            self.engine = self._machine.decider(_LEDGER, self.state)
            missed, self._away = self._away or [], None
            asked, self._asked = list(self._asked.values()), {}
            self.restarted_at = self._clock.now
            self._step()
            for one in asked:
                self._later(one.operation, one.reply, 0, one.since)
            for operation, reply, taken, since in missed:
                self._later(operation, reply, taken, since)

        self._clock.after(away_s, back)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _later(self, operation: Operation, reply: Reply | None, taken: int, since: int) -> None:
        wait = self._chance.uniform(0.0, _BACK_S)
        self._clock.after(wait, lambda: self._take(operation, reply, taken, since))

    def _take(self, operation: Operation, reply: Reply | None, taken: int, since: int) -> None:
        if self._away is not None:
            self._away.append((operation, reply, taken, since))
            return
        if isinstance(operation, Reserve) and self.restarted_at is not None and since < self.restarted_at:
            waited = self._clock.now - since
            operation = msgspec.structs.replace(
                operation, waited_us=waited, max_wait_us=max(0, operation.max_wait_us - waited)
            )
        if taken and taken > self.known:
            self.known = taken
        self._step(operation, reply=reply, since=since)
        if taken and _readings(operation):
            ruling = self.bucket(self._setting.binding).amount
            self.readings.append(Reading(self._clock.now, taken, ruling))

    def _step(self, operation: Operation | None = None, reply: Reply | None = None, since: int = 0) -> None:
        tickets: list[tuple[int, Operation]] = []
        if operation is not None:
            self._serial += 1
            tickets.append((self._serial, operation))
            self._note(operation)
            if reply is not None:
                self._asked[self._serial] = _Asked(operation, reply, since)
        step = self.engine.step(self._clock.now, tickets)
        self._clock.wake = step.wake_at
        for ticket, answer in step.answers:
            asked = self._asked.pop(ticket, None)
            if asked is None or asked.reply is None:
                continue
            if isinstance(answer, Granted) and isinstance(asked.operation, Reserve):
                self._routes[asked.operation.key] = asked.operation.route
            self._reply(asked.reply, answer, self.known)

    def _reply(self, reply: Reply, answer: Answer, known: int) -> None:
        self._clock.after(self.delay(), lambda: reply(answer, known))

    def _note(self, operation: Operation) -> None:
        if isinstance(operation, Commit):
            route = self._routes.pop(operation.key, None)
            if route is not None and operation.outcome.usage is not None:
                self.settled[route] = self.settled.get(route, 0) + 1


def _readings(operation: Operation) -> bool:
    observation: Observation | None = None
    if isinstance(operation, Commit):
        observation = operation.outcome.observation
    elif isinstance(operation, Renew):
        observation = operation.observation
    return observation is not None and bool(observation.readings)


def catalogue_of(told: Mapping[str, int]) -> Catalogue:
    """A catalogue whose operator has said these limits; empty: nothing, not even the tier."""
    if not told:
        return Catalogue(accounts={_LEDGER: AccountSetup("anthropic")})
    limits = {DIMENSIONS[name]: (Limit(DIMENSIONS[name], Window.MINUTE, amount),) for name, amount in told.items()}
    setup = AccountSetup("anthropic", tier=TIER, pools={"fable-5": PoolSetup(limits)})
    return Catalogue(accounts={_LEDGER: setup})
