"""Accounts to ledgers: one owner for each account, made when it is first used.

What the configuration defines is submitted before anything else, and a pool just ahead of the first call to it. A
ledger that was read again from its journal may have lost what was not written: it is told everything again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import structlog

from paceline.engine.answers import Answer, Invalid
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import Dimension, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import DefinePool, Operation
from paceline.engine.state import State
from paceline.frontend.errors import refused, unavailable
from paceline.frontend.limits import MAX_DEFINED_POOLS, MAX_LEDGERS
from paceline.frontend.places import Destination
from paceline.ledger.errors import LedgerBusy, LedgerError, LedgerUnavailable
from paceline.ledger.journal import RETRYABLE, StoreError
from paceline.ledger.options import Phase
from paceline.ledger.owner import Owner

_log = structlog.get_logger(__name__)

_MOST_EARLY = 4_096
"""Operations kept for a ledger that is still being read."""
_START_BACKOFF_S = (0.05, 0.2, 1.0, 5.0)

Reply = Callable[[Answer | LedgerError], object]
MakeOwner = Callable[[str, Callable[[Phase], object]], Owner]
"""An owner of a ledger, not started; the second argument hears of its phases."""
SetupOf = Callable[[str], Sequence[Operation]]
"""What the configuration defines for an account."""


class Slot:
    """One ledger as this process sees it: its owner, and what that owner has been told to define.

    This one is of a ledger that is always owned here; :class:`~paceline.frontend.fleet.FleetSlot` follows one that
    moves.
    """

    def __init__(self, account: str, owner: Owner | None, setup: Sequence[Operation]) -> None:
        self.account = account
        self.local = owner
        """The owner, if it is in this process."""
        self.setup = tuple(setup)
        self.started = False
        self._defined: dict[str, DefinePool] = {}
        self._epoch = 0
        self._early: list[tuple[Operation, Reply]] = []

    @property
    def owner(self) -> Owner:
        """The owner. Raises :class:`~paceline.frontend.errors.Problem` if it is in another process."""
        owner = self.local
        if owner is None:
            raise unavailable(f"ledger {self.account!r} is not in this process now: ask again")
        return owner

    @property
    def is_remote(self) -> bool:
        """The owner is in another process, or nowhere: this process cannot look into the books."""
        return self.local is None

    @property
    def ready(self) -> bool:
        """The ledger decides."""
        owner = self.local
        return owner is not None and self.started and owner.phase in (Phase.SERVING, Phase.REPLAYING)

    @property
    def is_reachable(self) -> bool:
        """Callers get decisions, if not at this very moment."""
        return self.ready

    @property
    def away_us(self) -> int:
        """For how long nobody has decided, in µs; 0: somebody does, or is just beginning to."""
        return 0

    @property
    def engine(self) -> Engine | None:
        """The engine over the books of this moment; ``None`` before they were first read, and if they are not here."""
        owner = self.local
        decider = owner.engine if owner is not None and self.started else None
        return decider if isinstance(decider, Engine) else None

    def now(self) -> int | None:
        """Ledger time in µs; ``None``: not known."""
        return self.local.now() if self.local is not None and self.started else None

    def layout(self, pool: str) -> list[tuple[Dimension, Window]]:
        """A pool's own limits and the account's spend, in the order of the engine's charges; empty if not known."""
        state = self.state
        return [] if state is None else layout_of(state, pool)

    @property
    def state(self) -> State | None:
        """The books of this moment, ahead of the journal by what is being written."""
        engine = self.engine
        return None if engine is None else engine.state

    def knows(self, key: str) -> bool:
        """Whether the ledger has or had a reservation of this key, or a tombstone."""
        state = self.state
        return state is not None and (key in state.open or key in state.ended)

    def submit(self, operation: Operation, reply: Reply) -> None:
        """Pass an operation to the owner."""
        if not self.started:
            if len(self._early) < _MOST_EARLY:
                self._early.append((operation, reply))
            else:
                reply(LedgerBusy(f"ledger {self.account!r} is being read", 200_000))
            return
        owner = self.local
        if owner is None:
            reply(LedgerUnavailable(f"ledger {self.account!r} is not here"))
            return
        if self._epoch != owner.epoch:
            self._tell_all()
        owner.submit(operation, reply)

    def reserve(self, operation: Operation, choices: Iterable[tuple[int, Destination]], reply: Reply) -> None:
        """Pass an operation whose pools may be new."""
        if self.started and self._epoch != self.owner.epoch:
            self._tell_all()
        defined = self._defined
        for _, destination in choices:
            if defined.get(destination.pool) is not destination.definition:
                self.define(destination.definition)
        self.submit(operation, reply)

    def define(self, definition: DefinePool) -> None:
        """Have a pool defined before whatever is submitted next."""
        if len(self._defined) >= MAX_DEFINED_POOLS:
            self._defined.clear()
        self._defined[definition.pool] = definition
        self.submit(definition, self._was_defined)

    def forget_definitions(self) -> None:
        """Define pools again on their next use."""
        self._defined.clear()

    def prepare(self) -> None:
        """What the owner has to be told of definitions is submitted when this returns."""
        owner = self.local
        if owner is not None and self.started and self._epoch != owner.epoch:
            self._tell_all()

    def begin(self) -> None:
        """The owner serves: define, then pass on what came too early."""
        self.started = True
        self._tell_all()
        early, self._early = self._early, []
        for operation, reply in early:
            self.submit(operation, reply)

    def refuse_early(self, error: LedgerError) -> None:
        """The owner could not start: answer what waits for it."""
        early, self._early = self._early, []
        for _, reply in early:
            reply(error)

    def _tell_all(self) -> None:
        self._epoch = self.owner.epoch
        pools, self._defined = self._defined, {}
        for operation in self.setup:
            self.owner.submit(operation, self._was_defined)
        for definition in pools.values():
            self._defined[definition.pool] = definition
            self.owner.submit(definition, self._was_defined)

    def _was_defined(self, answer: Answer | LedgerError) -> None:
        if isinstance(answer, Invalid):
            _log.warning("definition refused", ledger=self.account, field=answer.field, message=answer.message)
            self._defined.clear()
        elif isinstance(answer, LedgerError):
            self._epoch = -1


def layout_of(state: State, pool: str) -> list[tuple[Dimension, Window]]:
    """A pool's own limits and the account's spend, in the order of the engine's charges; empty if there is no such."""
    found = state.pools.get(pool)
    if found is None:
        return []
    counted = {rule.dimension for rule in found.profile.rules}
    buckets = (state.buckets[number] for number in found.buckets)
    layout = [(bucket.dimension, bucket.window) for bucket in buckets if bucket.dimension in counted]
    return [*layout, (Dimension.SPEND, Window.MONTH)]


class Found(NamedTuple):
    """A reservation that some ledger knows. ``pool`` of ``None``: it was never granted."""

    slot: Slot
    pool: str | None
    age_us: int | None
    """How long ago it was granted."""
    ended: bool

    @property
    def withdrawn(self) -> bool:
        """Nothing stands under this id: it was given back, or released before it was granted."""
        return self.ended and self.age_us is None

    @property
    def rank(self) -> int:
        """Which of several ledgers an id belongs to: the one where it is open, else where it was called under."""
        return 0 if self.withdrawn else 1 if self.ended else 2


class Inquiry(NamedTuple):
    """What the ledgers say of an id."""

    found: tuple[Found, ...]
    waiting: tuple[Slot, ...]
    """Somebody waits there under this id."""
    silent: tuple[Slot, ...]
    """Those that could not be asked."""

    @property
    def best(self) -> Found | None:
        """Where it belongs: one that is withdrawn in some ledgers may stand in another."""
        return max(self.found, key=_rank, default=None)


def _rank(found: Found) -> int:
    return found.rank


def look_up(state: State, key: str, now: int) -> tuple[str | None, int | None, bool] | None:
    """Pool, age and whether it has ended, of a reservation or tombstone; ``None``: it is not known."""
    opened = state.open.get(key)
    if opened is not None:
        return opened.pool, max(0, now - opened.granted_at), False
    ended = state.ended.get(key)
    if ended is None:
        return None
    granted_at = ended.granted_at
    return ended.pool, None if granted_at is None else max(0, now - granted_at), True


Standing = tuple[str | None, int | None, bool]
"""Of :class:`Found`, without the ledger. No pool, and not ended: it waits."""


def stands(engine: Engine, key: str, now: int) -> Standing | None:
    """As :func:`look_up`, of what still stands: a grant that was given back has no age, a bulk grant is open as long as
    one of its calls is, and those that wait are told of too."""
    state = engine.state
    found = look_up(state, key, now)
    ended = state.ended.get(key)
    if found is None:
        return None if engine.waiters().get(key) is None else (None, None, False)
    if ended is None or ended.granted_at is None:
        return found
    kind = ended.kind
    if kind is EndKind.TOGETHER:
        if any(child in state.open for child in ended.keys):
            return found[0], found[1], False
        kinds = {each.kind for child in ended.keys if (each := state.ended.get(child)) is not None}
        kind = EndKind.RELEASED if kinds == {EndKind.RELEASED} else kind
    return (found[0], None, True) if kind is EndKind.RELEASED else found


def summed(told: Iterable[tuple[Slot, Standing | None]], silent: Sequence[Slot]) -> Inquiry:
    """What each ledger has told, and those that have not."""
    found: list[Found] = []
    waiting: list[Slot] = []
    for slot, standing in told:
        if standing is None:
            continue
        each = Found(slot, *standing)
        if each.pool is None and not each.ended:
            waiting.append(slot)
        else:
            found.append(each)
    return Inquiry(tuple(found), tuple(waiting), tuple(silent))


def _found(slot: Slot, key: str) -> Found | None:
    engine = slot.engine
    found = None if engine is None else stands(engine, key, slot.now() or 0)
    return None if found is None else Found(slot, *found)


def _beats(slot: Slot, other: Slot, key: str) -> bool:
    one, two = _found(slot, key), _found(other, key)
    return two is None or (one is not None and one.rank > two.rank)


class Router:
    """The local ledgers. ``on_change`` hears of every change of a ledger's phase."""

    is_spread = False
    """Some ledgers may be owned elsewhere: :meth:`known` is not the last word, :meth:`locate` is."""

    def __init__(
        self,
        make_owner: MakeOwner,
        setup_of: SetupOf,
        *,
        most: int = MAX_LEDGERS,
        on_change: Callable[[Slot], object] | None = None,
        on_begin: Callable[[Slot], object] | None = None,
    ) -> None:
        """``on_begin`` hears of each ledger once, when it begins to serve."""
        self.slots: dict[str, Slot] = {}
        self.closed = False
        self._on_begin = on_begin
        self._make_owner = make_owner
        self._setup_of = setup_of
        self._most = most
        self._on_change = on_change
        self._starting: dict[str, asyncio.Task[None]] = {}

    async def open(self, accounts: Iterable[str]) -> None:
        """Start these ledgers. Raises :class:`~paceline.ledger.journal.StoreError` or
        :class:`~paceline.ledger.errors.LedgerStopped` if one cannot be read."""
        for account in accounts:
            if account not in self.slots:
                slot = self._make(account)
                await slot.owner.start()
                self._begin(slot)

    def slot(self, account: str, path: str = "target.account") -> Slot:
        """The ledger of an account. Raises :class:`~paceline.frontend.errors.Problem` if there are too many."""
        slot = self.slots.get(account)
        if slot is None:
            if len(self.slots) >= self._most or self.closed:
                raise refused(path, f"is new, and this server has its most accounts ({self._most})")
            slot = self._make(account)
            self._starting[account] = asyncio.create_task(self._start(slot))
        return slot

    def known(self, key: str) -> Slot | None:
        """The local ledger that a reservation of this key belongs to, or that has a tombstone of it."""
        best: Slot | None = None
        for slot in self.slots.values():
            state = slot.state
            if state is None:
                continue
            if key in state.open:
                return slot
            if key in state.ended and (best is None or _beats(slot, best, key)):
                best = slot
        if best is None or not self.is_spread:
            return best
        found = _found(best, key)
        # It may stand in a ledger that is owned elsewhere.
        return None if found is None or found.withdrawn else best

    def look(self, key: str) -> Inquiry:
        """What the ledgers that are owned here say of a reservation."""
        told: list[tuple[Slot, Standing | None]] = []
        silent: list[Slot] = []
        for slot in self.slots.values():
            engine = slot.engine
            if engine is None:
                silent.append(slot)
            else:
                told.append((slot, stands(engine, key, slot.now() or 0)))
        return summed(told, silent)

    async def inquire(self, key: str, timeout_us: int, unasked: Container[str] = ()) -> Inquiry:
        """What all ledgers say of a reservation, wherever they are owned, if they can be asked within ``timeout_us``.

        The owners of the accounts ``unasked`` do not answer now.
        """
        return self.look(key)

    async def locate(self, key: str) -> Found | None:
        """The ledger that a reservation belongs to, wherever it is owned. Raises
        :class:`~paceline.frontend.errors.Problem` if one that may know it cannot be asked in time."""
        return self.look(key).best

    def layout_of(self, ledger: str, pool: str) -> list[tuple[Dimension, Window]]:
        """A pool's own limits and the account's spend, in the order of the engine's charges; empty if not known."""
        slot = self.slots.get(ledger)
        return [] if slot is None else slot.layout(pool)

    def ready(self) -> Iterator[Slot]:
        """The ledgers that have books to look at."""
        return (slot for slot in self.slots.values() if slot.state is not None)

    async def stop(self, drain_timeout: float) -> None:
        """Stop every owner."""
        self.closed = True
        for task in self._starting.values():
            task.cancel()
        if self._starting:
            await asyncio.wait(self._starting.values())
        for slot in self.slots.values():
            slot.refuse_early(LedgerUnavailable("the server is stopping"))
        if self.slots:
            await asyncio.gather(*(slot.owner.stop(drain_timeout) for slot in self.slots.values()))

    def _make(self, account: str) -> Slot:
        def heard(_: Phase) -> None:
            if self._on_change is not None:
                self._on_change(slot)

        owner = self._make_owner(account, heard)
        slot = self.slots[account] = Slot(account, owner, self._setup_of(account))
        return slot

    def prepare(self, ledger: str) -> None:
        """What this process has to define at a ledger that it owns is submitted when this returns."""
        slot = self.slots.get(ledger)
        if slot is not None:
            slot.prepare()

    def _begin(self, slot: Slot) -> None:
        slot.begin()
        if self._on_begin is not None:
            self._on_begin(slot)

    async def _start(self, slot: Slot) -> None:
        attempt = 0
        try:
            while True:
                try:
                    await slot.owner.start()
                    self._begin(slot)
                    return
                except RETRYABLE as error:
                    slot.refuse_early(LedgerUnavailable(f"the store of ledger {slot.account!r} is away", 200_000))
                    _log.error("ledger cannot start", ledger=slot.account, error=str(error))
                    await asyncio.sleep(_START_BACKOFF_S[min(attempt, len(_START_BACKOFF_S) - 1)])
                    attempt += 1
        except (StoreError, LedgerError) as error:
            slot.refuse_early(LedgerUnavailable(f"ledger {slot.account!r} cannot be read"))
            _log.critical("ledger cannot start", ledger=slot.account, error=str(error))
            self.slots.pop(slot.account, None)
        finally:
            self._starting.pop(slot.account, None)
