"""The shared ledgers of one process: which it owns, which it follows, and where the others are.

For every ledger a task looks at the journal's head, now and then: as the first heir it follows the journal closely, so
that it can go on within milliseconds; as another one it only watches the lease. What to do is decided by
:mod:`paceline.ledger.succession`, and what is safe by the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable, Sequence

import msgspec
import structlog

from paceline.engine.operations import Operation
from paceline.ledger.clock import Clock, SystemClock
from paceline.ledger.commands import Commands, NodeInfo
from paceline.ledger.errors import LedgerError
from paceline.ledger.fold import Fold, Share, Unfoldable
from paceline.ledger.journal import StoreError, StoreVersion
from paceline.ledger.lease import Head
from paceline.ledger.machine import Machine
from paceline.ledger.options import OwnerOptions, Phase
from paceline.ledger.owner import Owner
from paceline.ledger.shared import Bid, SharedJournal, StoreHeld, Terms, check_of, too_new
from paceline.ledger.succession import due, heirs, ranking
from paceline.ledger.tasks import halt

_log = structlog.get_logger("paceline.ledger")

MAX_LEDGERS = 256
"""Looked after by one process; more are left to others."""
_READ_RECORDS = 256
_YOUNGER_US = 5_000_000
"""By so much a process began later than one that it leaves the first look at unknown ledgers to."""


class Where(msgspec.Struct, frozen=True):
    """Where a ledger is, as this process knows. ``owner``: it is here. An empty ``address``: nobody knows."""

    epoch: int = 0
    node: str = ""
    address: str = ""
    owner: Owner | None = None
    era: str = ""
    """The store's primary under which that owner took over. In a new era an epoch may be lower than one before."""


class KeeperOptions(msgspec.Struct, frozen=True):
    """Times in µs."""

    announce_us: int = 500_000
    announce_ttl_us: int = 3_000_000
    close_look_us: int = 100_000
    """Between looks at a ledger that this process would take over next, or that has no owner."""
    urgent_look_us: int = 10_000
    urgent_us: int = 500_000
    """For so long, and so often, after the owner has said that it hands over to this process."""
    far_look_us: int = 1_000_000
    retry_us: int = 200_000
    """After the store has failed."""
    refusal_us: int = 5_000_000
    """After a journal that cannot be read."""
    warm_us: int = 2_000_000
    """For so long at least, if its time allows, an owner that drains waits for somebody to be warm."""
    balance_us: int = 10_000_000
    settled_us: int = 20_000_000
    """A process that is younger is not given ledgers for balance."""
    follow_share: float = 0.5
    """The part of a core that reading a snapshot may take while the ledger has an owner who lives."""
    hand_over_s: float = 5.0
    gap: int = 2
    """By so many ledgers an owner has more than the one that is preferred before it gives one away."""


class Statistics:
    """Plain counters, for telemetry to read."""

    def __init__(self) -> None:
        self.acquisitions = 0
        self.take_overs = 0
        """Of those, from an owner that had not let go."""
        self.hand_overs = 0
        self.deposed = 0
        self.lost_records = 0
        """Acknowledged records that a store had lost, handed to the winner."""
        self.reasserted = 0
        """Times that lost records were put back, in owners that are gone."""


class _Entry:
    """One ledger."""

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger
        self.where = Where()
        self.owner: Owner | None = None
        self.journal: SharedJournal | None = None
        self.fold: Fold | None = None
        self.warm = False
        self.vacant = False
        """When it was last seen, it was nobody's, or to be this process's."""
        self.dead: tuple[int, int] | None = None
        """An epoch whose owner was found dead, and when (monotonic µs)."""
        self.highest = 0
        """Of the epochs that were seen."""
        self.form = 0
        """Of the journal, when it was last seen."""
        self.refused_form = 0
        """The form because of which it was said that this version cannot own it."""
        self.leased_until = 0
        """When the lease ends that was seen last, in monotonic µs."""
        self.empty_since: int | None = None
        """Since when the store has had nothing of this ledger, in its own time (µs)."""
        self.empty_at = ""
        """The store's primary of which that is known."""
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.not_before = 0
        """Monotonic µs; the journal could not be read before."""
        self.balance_at = 0
        self.urgent_until = 0
        """Monotonic µs: this process is about to own the ledger."""


class Keeper:
    """Looks after the ledgers of one process, in one event loop.

    ``on_change`` hears of every change of :meth:`where` and of the phase of an owner here; ``on_testimony`` gets what a
    deposed owner has to tell the ledger's next one, wherever that is; ``on_leaving`` hears of a successor, by ledger,
    process and address, just before an owner here lets go.
    """

    def __init__(
        self,
        info: NodeInfo,
        commands: Commands,
        machine: Machine,
        terms: Terms,
        *,
        on_change: Callable[[str], object],
        on_testimony: Callable[[str, Sequence[Operation]], object] = lambda _ledger, _told: None,
        on_leaving: Callable[[str, str, str], object] = lambda _ledger, _node, _address: None,
        clock: Clock | None = None,
        options: KeeperOptions | None = None,
        owner_options: OwnerOptions | None = None,
        nonce: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self.info = info
        self.statistics = Statistics()
        self._commands = commands
        self._machine = machine
        self._terms = terms
        self._on_change = on_change
        self._on_testimony = on_testimony
        self._on_leaving = on_leaving
        self._clock: Clock = SystemClock() if clock is None else clock
        self._options = KeeperOptions() if options is None else options
        self._owner_options = OwnerOptions() if owner_options is None else owner_options
        self._nonce = nonce
        self._entries: dict[str, _Entry] = {}
        self._nodes: dict[str, NodeInfo] = {}
        self._announcing: asyncio.Task[None] | None = None
        self._dissolving: set[asyncio.Task[None]] = set()
        """Books that nobody needs any more. They end by themselves."""
        self._closed = False
        self._born = self._clock.monotonic()
        self._primary = ("", 0)
        """The store's primary, and when it was first seen (monotonic µs)."""

    # -- for front ends -------------------------------------------------------------------------------------------

    def where(self, ledger: str) -> Where:
        """Where a ledger is."""
        entry = self._entries.get(ledger)
        return Where() if entry is None else entry.where

    def want(self, ledger: str) -> None:
        """Look after a ledger, which may be new."""
        if ledger not in self._entries and len(self._entries) < MAX_LEDGERS and not self._closed:
            entry = self._entries[ledger] = _Entry(ledger)
            entry.task = asyncio.create_task(self._keep(entry))

    def suspect(self, ledger: str, epoch: int) -> None:
        """The owner of that epoch refuses connections: it is dead, and its lease need not be waited for."""
        entry = self._entries.get(ledger)
        if entry is not None and entry.owner is None and (entry.dead is None or entry.dead[0] != epoch):
            entry.dead = (epoch, self._clock.monotonic())
            entry.wake.set()

    def hint(self, ledger: str, epoch: int, node: str, address: str) -> None:
        """A peer says where the ledger is, or that it is to be here. An epoch that is not newer says nothing."""
        entry = self._entries.get(ledger)
        if entry is None or entry.owner is not None:
            return
        if node == self.info.node:
            entry.urgent_until = self._clock.monotonic() + self._options.urgent_us
            entry.wake.set()
        elif epoch > entry.where.epoch:
            self._place(entry, Where(epoch, node, address, None, entry.where.era))

    def nodes(self) -> dict[str, NodeInfo]:
        """The processes that live, this one included."""
        return dict(self._nodes)

    def ledgers(self) -> list[str]:
        """All ledgers that this process knows of, sorted."""
        return sorted(self._entries)

    def journal(self, ledger: str) -> SharedJournal | None:
        """The journal of an owner that is here."""
        entry = self._entries.get(ledger)
        return None if entry is None or entry.owner is None else entry.journal

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self, ledgers: Iterable[str] = ()) -> None:
        """Announce this process, and look after these ledgers and all that the store has.

        Raises :class:`~paceline.ledger.journal.StoreError`.
        """
        await self._announce()
        for ledger in ledgers:
            self.want(ledger)
        self._announcing = asyncio.create_task(self._announce_on())

    async def stop(self, drain_timeout: float) -> None:
        """Hand over what is owned, in at most ``drain_timeout`` seconds and a little, and leave."""
        deadline = self._clock.monotonic() + int(drain_timeout * 1e6)
        self._closed = True
        self.info = msgspec.structs.replace(self.info, ready=False)
        with contextlib.suppress(StoreError):
            await self._announce()
        # A take-over that is under way ends first, one way or the other.
        await halt([entry.task for entry in self._entries.values() if entry.owner is None])
        owned = [entry for entry in self._entries.values() if entry.owner is not None]
        await asyncio.gather(*(self._leave(entry, deadline) for entry in owned))
        await halt([self._announcing, *(entry.task for entry in self._entries.values())])
        # Of those that were being handed over until now.
        await asyncio.gather(*(entry.owner.stop(0) for entry in owned if entry.owner is not None))
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._commands.announce(self.info, 0)

    async def _announce_on(self) -> None:
        while True:
            await self._clock.sleep_until(self._clock.monotonic() + self._options.announce_us)
            with contextlib.suppress(StoreError):
                await self._announce()

    async def _announce(self) -> None:
        entries = self._entries.values()
        self.info = msgspec.structs.replace(
            self.info,
            ledgers=sum(entry.owner is not None for entry in entries),
            warm=tuple(entry.ledger for entry in entries if entry.warm),
        )
        found = await self._commands.announce(self.info, self._options.announce_ttl_us)
        self._nodes = found.nodes
        for ledger in found.ledgers:
            self.want(ledger)

    # -- one ledger -----------------------------------------------------------------------------------------------

    async def _keep(self, entry: _Entry) -> None:
        while True:
            entry.wake.clear()
            try:
                pause = await self._look(entry) if entry.owner is None else await self._look_after(entry, entry.owner)
            except StoreError as error:
                _log.info("the store is away", ledger=entry.ledger, error=str(error))
                pause = self._options.retry_us
            except Exception as error:
                _log.error("ledger cannot be looked after", ledger=entry.ledger, error=type(error).__name__)
                pause = self._options.refusal_us
            woken = asyncio.create_task(entry.wake.wait())
            slept = asyncio.create_task(self._clock.sleep_until(self._clock.monotonic() + pause))
            try:
                await asyncio.wait((woken, slept), return_when=asyncio.FIRST_COMPLETED)
            finally:
                woken.cancel()
                slept.cancel()

    async def _look(self, entry: _Entry) -> int:
        """Look at a ledger of others, and take it if it is time. How long not to look again (µs)."""
        options = self._options
        stamped = await self._commands.head(entry.ledger)
        head, now = stamped.head, stamped.now
        lineage = await self._commands.lineage()
        if head is None:
            if entry.empty_since is None or entry.empty_at != lineage:
                # Between two primaries without it an owner may have put it back, and died.
                entry.empty_since, entry.empty_at = now, lineage
            entry.empty_since = min(now, entry.empty_since)
        else:
            entry.empty_since = None
            entry.form = head.form
            entry.leased_until = self._clock.monotonic() + max(0, head.until - now)
            self._seen(entry, head)
        if self._closed:
            return options.far_look_us
        if head is not None and head.form > self._terms.form:
            self._keep_fold(entry, None)
            if entry.refused_form != head.form:
                entry.refused_form = head.form
                error = too_new(entry.ledger, head, self._terms.form)
                _log.critical("ledger cannot be owned here", ledger=entry.ledger, error=str(error))
            return options.far_look_us
        me = self.info.node
        order = self._order(entry, "" if head is None else head.node, 0 if head is None else head.form)
        rank = order.index(me) if me in order else len(order)
        chosen = head is not None and head.successor == me
        entry.vacant = head is None or chosen or head.until <= now
        # Whoever is warm stays so until one that comes before it is.
        before = any(self._is_warm(entry, node) for node in order[:rank])
        if head is not None and (rank == 0 or chosen or (entry.fold is not None and not before)):
            await self._follow(entry, head)
        elif head is not None and entry.fold is not None and not head.successor:
            # While it is being handed over, the one who comes next may have been counted among the others.
            self._keep_fold(entry, None)
        if head is None:
            # Whoever has followed the ledger can put it back.
            rank = 0 if entry.fold is not None else rank + 1
        elif me in order:
            rank = sorted(order, key=lambda node: not self._is_warm(entry, node)).index(me)
        dead_since = None
        if head is not None and entry.dead is not None and entry.dead[0] == head.epoch:
            dead_since = now - max(0, self._clock.monotonic() - entry.dead[1])
        if lineage != self._primary[0]:
            self._primary = lineage, self._clock.monotonic()
        at, depose = due(
            head,
            now,
            me,
            rank,
            lineage=lineage,
            lag_us=self._terms.lag_us,
            dead_since=dead_since,
            vacant_at=self._vacant_at(entry, now),
            primary_since=now - (self._clock.monotonic() - self._primary[1]),
        )
        if at <= now and self._clock.monotonic() >= entry.not_before:
            await self._take(entry, depose)
            return 0 if entry.owner is not None else options.close_look_us
        if self._clock.monotonic() < entry.urgent_until:
            return options.urgent_look_us
        close = rank == 0 or entry.fold is not None or head is None or dead_since is not None
        near = options.close_look_us if close else options.far_look_us
        if head is not None and head.until > now:
            # Whoever takes it then should be found at once.
            near = min(near, head.until - now + options.urgent_look_us)
        return min(near, max(options.urgent_look_us, at - now))

    def _order(self, entry: _Entry, owner: str, form: int) -> list[str]:
        return heirs(entry.ledger, self._nodes, owner, form, self._clock.wall())

    def _is_warm(self, entry: _Entry, node: str) -> bool:
        return entry.warm if node == self.info.node else entry.ledger in self._nodes[node].warm

    def _vacant_at(self, entry: _Entry, now: int) -> int:
        """When a ledger of which the store has nothing is nobody's (the store's time, µs)."""
        empty_since = 0 if entry.empty_since is None else entry.empty_since
        # An owner that lives puts its books back with its next renewal; this process may have been held up itself.
        patience = self._terms.lease_us + self._terms.lag_us
        if not entry.highest:
            # Whoever was here before may know of a ledger that the store has lost.
            young = any(node.started_at < self.info.started_at - _YOUNGER_US for node in self._nodes.values())
            born = now - (self._clock.monotonic() - self._born)
            return max(empty_since, born + patience) if young else empty_since
        if entry.dead is not None and entry.dead[0] == entry.where.epoch:
            return empty_since
        # The clock of another store may be another one: what was seen before is counted from now on.
        leased = now + entry.leased_until + self._terms.lag_us - self._clock.monotonic()
        return max(empty_since + patience, leased)

    async def _look_after(self, entry: _Entry, owner: Owner) -> int:
        """Look after an owner that is here."""
        if owner.phase in (Phase.DEPOSED, Phase.STOPPED, Phase.FAILED):
            self._ended(entry, owner)
            return 0 if owner.phase is not Phase.FAILED else self._options.refusal_us
        now = self._clock.monotonic()
        if now >= entry.balance_at and not self._closed:
            entry.balance_at = now + self._options.balance_us
            preferred = self._preferred(entry)
            if preferred:
                await self.hand_over(entry.ledger, preferred)
        return self._options.far_look_us

    def _preferred(self, entry: _Entry) -> str:
        """A process that should rather own this ledger, and has fewer; empty: none."""
        order = ranking(entry.ledger, self._nodes.values())
        first = self._nodes.get(order[0]) if order else None
        if first is None or first.node == self.info.node or entry.ledger not in first.warm:
            return ""
        mine = sum(each.owner is not None for each in self._entries.values())
        settled = self._clock.wall() - first.started_at >= self._options.settled_us
        return first.node if settled and mine >= first.ledgers + self._options.gap else ""

    async def _take(self, entry: _Entry, depose: int) -> None:
        journal = self._new_journal(entry)

        def heard(_: Phase) -> None:
            entry.wake.set()
            self._on_change(entry.ledger)

        owner = Owner(
            entry.ledger,
            journal,
            machine=self._machine,
            clock=self._clock,
            options=self._owner_options,
            on_phase=heard,
        )
        fold, entry.fold, entry.warm = entry.fold, None, False
        try:
            await owner.start(fold, Bid(depose, entry.highest, self._first_form(entry)))
        except StoreHeld as held:
            entry.fold = fold
            self._seen(entry, held.head)
            return
        except (LedgerError, StoreVersion) as error:
            entry.not_before = self._clock.monotonic() + self._options.refusal_us
            _log.critical("ledger cannot be owned here", ledger=entry.ledger, error=str(error))
            with contextlib.suppress(StoreError):
                await journal.release()
            return
        except StoreError:
            # It may hold what the store has lost.
            entry.fold = fold
            raise
        if self._closed:
            await owner.stop(0.5)
            return
        entry.owner, entry.journal = owner, journal
        entry.dead = None
        entry.balance_at = self._clock.monotonic() + self._options.balance_us
        self.statistics.acquisitions += 1
        if owner.took_over:
            self.statistics.take_overs += 1
        _log.info("owns ledger", ledger=entry.ledger, epoch=owner.epoch, deposed=depose or None)
        era = "" if journal.tenure is None else journal.tenure.head.lineage
        self._place(entry, Where(owner.epoch, self.info.node, self.info.address, owner, era))

    def _first_form(self, entry: _Entry) -> int:
        """What every process can read, if the store has nothing of the ledger."""
        return entry.form or min((node.form for node in self._nodes.values()), default=self._terms.form)

    def _ended(self, entry: _Entry, owner: Owner) -> None:
        """An owner here is no owner any more."""
        journal, entry.owner, entry.journal = entry.journal, None, None
        if journal is not None:
            self.statistics.reasserted += journal.statistics.reasserted + journal.statistics.refounded
        if owner.phase is Phase.DEPOSED:
            self.statistics.deposed += 1
        if owner.phase is Phase.FAILED:
            entry.not_before = self._clock.monotonic() + self._options.refusal_us
        if entry.where.owner is owner:
            self._place(entry, Where(owner.epoch, era=entry.where.era))
        if owner.testimony:
            self.statistics.lost_records += len(owner.testimony)
            self._on_testimony(entry.ledger, owner.testimony)

    # -- following ------------------------------------------------------------------------------------------------

    async def _follow(self, entry: _Entry, head: Head) -> None:
        """Bring the books that this process keeps of another's ledger up to its head."""
        if self._clock.monotonic() < entry.not_before:
            return
        fold = entry.fold
        try:
            if fold is None or fold.seq < head.snapshot_seq:
                fold = await self._restored(entry, head)
            elif fold.snapshot_seq < head.snapshot_seq:
                # What was folded is in it, but for what came while it was written: as an owner this process need not
                # begin with another one.
                fold.snapshot_seq, fold.events, fold.size = head.snapshot_seq, 0, 0
            while fold.seq < head.seq:
                records = await self._commands.read(entry.ledger, fold.seq, _READ_RECORDS)
                records = [record for record in records if record.seq <= head.seq]
                if not records or (records[0].seq, records[0].previous) != (fold.seq + 1, fold.hash):
                    break
                mark = check_of(head)
                fold.check = mark if mark is not None and mark.seq > fold.seq else None
                await fold.follow(records)
        except Unfoldable as error:
            _log.warning("cannot follow ledger", ledger=entry.ledger, error=str(error))
            self._keep_fold(entry, None)
            entry.not_before = self._clock.monotonic() + self._options.retry_us
            return
        except StoreError as error:
            # What was read stays: should owner and store be lost together, it may be all that is left.
            _log.warning("cannot follow ledger", ledger=entry.ledger, error=str(error))
            self._keep_fold(entry, fold)
            return
        # Elsewhere: the store has dropped what was to be read. Ahead: it has lost what was read, which can be put back.
        # A store that has nothing takes it whole.
        ahead = fold.seq > head.seq and (not head.seq or fold.tail.after(head.seq, head.hash) is not None)
        self._keep_fold(entry, fold, ahead or (fold.seq, fold.hash) == (head.seq, head.hash))
        if not entry.warm:
            self._keep_fold(entry, None)

    def _keep_fold(self, entry: _Entry, fold: Fold | None, warm: bool = False) -> None:
        """Books to follow with, in the place of those before, which go."""
        old, entry.fold, entry.warm = entry.fold, fold, warm
        if old is not None and old is not fold:
            task = asyncio.create_task(old.dissolve())
            self._dissolving.add(task)
            task.add_done_callback(self._dissolving.discard)

    def _new_journal(self, entry: _Entry) -> SharedJournal:
        return SharedJournal(entry.ledger, self._commands, self._terms, clock=self._clock, nonce=self._nonce)

    async def _restored(self, entry: _Entry, head: Head) -> Fold:
        fold = Fold(entry.ledger, self._machine, self._clock)
        fold.share = self._share(entry)
        mark, chunks = await self._new_journal(entry).snapshot_of(head)
        if mark is not None:
            await fold.restore(mark, chunks)
        return fold

    def _share(self, entry: _Entry) -> Share:
        """Reading a snapshot takes seconds: it makes place for calls as long as nobody waits for its end."""

        def share() -> float | None:
            dead = entry.dead is not None and entry.dead[0] == entry.where.epoch
            needed = entry.vacant or dead or self._clock.monotonic() < entry.urgent_until
            there = self._nodes.get(entry.where.node)
            if not needed and there is not None and not there.ready:
                # It leaves, and serves on until somebody is warm: another one may be, and needs the core.
                others = self._nodes.keys() - {self.info.node, there.node}
                needed = not any(self._is_warm(entry, node) for node in others)
            return None if needed else self._options.follow_share

        return share

    # -- handing over ---------------------------------------------------------------------------------------------

    async def hand_over(self, ledger: str, node: str = "") -> str:
        """Give a ledger that is owned here to ``node`` (empty: the first heir). Returns to which; empty: to nobody, and
        it stays here."""
        entry = self._entries.get(ledger)
        owner = None if entry is None else entry.owner
        if entry is None or owner is None or owner.phase is not Phase.SERVING:
            return ""
        node = node or await self._heir(entry, owner)
        there = self._nodes.get(node)
        if there is None or not there.ready or there.form < (owner.form or 0):
            return ""
        self._on_leaving(ledger, node, there.address)
        try:
            await owner.hand_over(node, self._options.hand_over_s)
        except StoreError as error:
            _log.warning("the store could not be told of a hand-over", ledger=ledger, error=str(error))
        if owner.is_living:
            return ""
        self.statistics.hand_overs += 1
        self._ended(entry, owner)
        self._place(entry, Where(owner.epoch, node, there.address, None, entry.where.era))
        if owner.left is not None and not self._closed:
            owner.left.share = self._share(entry)
            self._keep_fold(entry, owner.left)
        entry.wake.set()
        return node

    async def _heir(self, entry: _Entry, owner: Owner) -> str:
        """The first heir that is warm, waited for; if there is none for long, the first. Empty: there is nobody."""
        until = self._clock.monotonic() + int(self._options.hand_over_s * 1e6)
        while owner.phase is Phase.SERVING:
            order = self._order(entry, self.info.node, owner.form or 0)
            node = next((each for each in order if self._is_warm(entry, each)), "")
            if node or not order:
                return node
            if self._clock.monotonic() >= until:
                return order[0]
            await self._clock.sleep_until(self._clock.monotonic() + self._options.close_look_us)
        return ""

    async def _leave(self, entry: _Entry, deadline: int) -> None:
        """Hand one ledger over before this process ends: at once, if somebody is warm."""
        owner = entry.owner
        while owner is not None and owner.phase is Phase.DRAINING and self._clock.monotonic() < deadline:
            # It is being handed over already.
            await self._clock.sleep_until(self._clock.monotonic() + self._options.close_look_us)
        # Somebody cold would have callers wait while it reads; until it is late, this one serves on.
        patient_until = min(deadline, self._clock.monotonic() + self._options.warm_us)
        last = max(patient_until, deadline - int(self._options.hand_over_s * 1e6))
        while owner is not None and owner.phase is Phase.SERVING:
            order = self._order(entry, self.info.node, owner.form or 0)
            is_last = self._clock.monotonic() >= last
            if not order:
                break
            if (is_last or self._is_warm(entry, order[0])) and await self.hand_over(entry.ledger, order[0]):
                return
            if is_last:
                break
            await self._clock.sleep_until(self._clock.monotonic() + self._options.close_look_us)
            with contextlib.suppress(StoreError):
                await self._announce()
        if owner is not None:
            await owner.stop(max(0.5, (deadline - self._clock.monotonic()) / 1e6))
            self._ended(entry, owner)

    # -- places ---------------------------------------------------------------------------------------------------

    def _seen(self, entry: _Entry, head: Head) -> None:
        """What the store says of a ledger that is not owned here."""
        node, address = head.node, head.address
        if head.successor and head.successor in self._nodes:
            node, address = head.successor, self._nodes[head.successor].address
        elif head.node == self.info.node:
            node = address = ""
        found = Where(head.epoch, node, address, None, head.lineage)
        if entry.owner is None and found != entry.where:
            self._place(entry, found)

    def _place(self, entry: _Entry, where: Where) -> None:
        if where != entry.where or where.owner is not entry.where.owner:
            if where.era != entry.where.era:
                # There the same epoch may be another owner's.
                entry.dead = None
            entry.where = where
            entry.highest = max(entry.highest, where.epoch)
            self._on_change(entry.ledger)
