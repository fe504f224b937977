"""A journal in a store that several processes share: :class:`~paceline.ledger.tenure.Tenure` over
:class:`~paceline.ledger.commands.Commands`."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable

import msgspec
import structlog

from paceline.ledger.clock import Clock, SystemClock
from paceline.ledger.commands import Commands, Stamped
from paceline.ledger.journal import (
    Beginning,
    Loaded,
    Mark,
    Record,
    StoreCorrupt,
    StoreError,
    StoreFenced,
    StoreUnavailable,
    StoreVersion,
    genesis,
)
from paceline.ledger.lease import Claim, Fenced, Head, Held, TooNew, same
from paceline.ledger.tail import Tail
from paceline.ledger.tenure import Deposed, Reassert, Refound, Tenure, Written

_log = structlog.get_logger("paceline.ledger")

_PAGE_RECORDS = 256
_PAGE_CHUNKS = 16
_MOST_VERDICTS = 8
"""So often in one append the store may say something new of its end."""

_pack_mark = msgspec.msgpack.Encoder().encode
_unpack_mark = msgspec.msgpack.Decoder(Mark).decode


class StoreHeld(StoreError):
    """Another process owns the ledger, for ``left_us`` more at least."""

    def __init__(self, message: str, head: Head, left_us: int) -> None:
        super().__init__(message)
        self.head = head
        self.left_us = left_us


class StoreDeposed(StoreFenced):
    """Another owner goes on. ``lost`` are acknowledged records that its journal may lack; ``all_lost``: or all."""

    def __init__(self, message: str, head: Head, lost: tuple[Record, ...], all_lost: bool = False) -> None:
        super().__init__(message)
        self.head = head
        self.lost = lost
        self.all_lost = all_lost


class StoreLost(StoreError):
    """The store has lost what was written, and needs a snapshot: :meth:`SharedJournal.refound`."""


class Terms(msgspec.Struct, frozen=True):
    """On what terms a process owns ledgers. Times in µs."""

    node: str
    address: str
    form: int
    """The newest form of journals that it reads and writes."""
    lease_us: int = 3_000_000
    lag_us: int = 1_000_000
    """How far the store's primary may be ahead of its replica, and how long it may go on beside a new one."""


class Bid(msgspec.Struct, frozen=True):
    """What a process knows when it wants to own a ledger."""

    depose: int = 0
    """The epoch of an owner that was found dead."""
    above: int = 0
    """The highest epoch that it knows of."""
    first_form: int = 0
    """The form in which to begin, if the store has nothing of the ledger; 0: the newest."""


class Known(msgspec.Struct, frozen=True):
    """Up to where a process has followed the journal."""

    seq: int
    hash: bytes
    tail: Tail


class Statistics:
    """Plain counters, for telemetry to read."""

    def __init__(self) -> None:
        self.reasserted = 0
        """Times that lost records were put back."""
        self.refounded = 0
        """Times that the books were put back whole."""
        self.renewals = 0


def too_new(ledger: str, head: Head, form: int) -> StoreVersion:
    """Why a process that reads up to ``form`` cannot own a ledger."""
    return StoreVersion(
        f"ledger {ledger!r} is of form {head.form}, and this version reads up to {form}: "
        "run a newer version; an upgrade that was finalized cannot be taken back"
    )


class SharedJournal:
    """One ledger's journal, as one process writes it. ``nonce`` makes 16 random bytes."""

    def __init__(
        self,
        ledger: str,
        commands: Commands,
        terms: Terms,
        *,
        clock: Clock | None = None,
        nonce: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self.ledger = ledger
        self.terms = terms
        self.tenure: Tenure | None = None
        self.statistics = Statistics()
        self._commands = commands
        self._clock: Clock = SystemClock() if clock is None else clock
        self._nonce = nonce
        self._lock = asyncio.Lock()
        """One append or renewal at a time."""
        self._flying: Record | None = None
        """Sent, and not known to be written."""
        self._found: Head | None = None
        """The head that a snapshot has to replace."""
        self._snapshots = 0
        self._whole: Head | None = None
        """Sent to put the books back whole, and not known to be written."""

    # -- taking over ----------------------------------------------------------------------------------------------

    async def take(self, bid: Bid | None = None, known: Known | None = None) -> Loaded:
        """Become the owner, and read what is there and not ``known``; what is known and not there is put back.

        Raises :class:`StoreHeld`, :class:`~paceline.ledger.journal.StoreVersion` and other
        :class:`~paceline.ledger.journal.StoreError`.
        """
        bid = Bid() if bid is None else bid
        terms = self.terms
        self.tenure = None
        claim = Claim(
            terms.node,
            terms.address,
            self._nonce(),
            terms.lease_us,
            await self._commands.lineage(),
            genesis(self.ledger),
            terms.form,
            bid.first_form or terms.form,
            bid.depose,
            terms.lag_us,
            bid.above,
        )
        sent_at = self._clock.monotonic()
        stamped = await self._acquire(claim)
        tenure = Tenure(stamped, sent_at, terms.lease_us)
        self.tenure = tenure
        loaded = await self._read(tenure, known)
        loaded.beginning = tenure.beginning
        return loaded

    async def _acquire(self, claim: Claim) -> Stamped:
        try:
            try:
                return await self._commands.acquire(self.ledger, claim)
            except StoreUnavailable:
                # Carried out or not: the same claim again does no harm.
                return await self._commands.acquire(self.ledger, claim)
        except Held as held:
            raise StoreHeld(f"ledger {self.ledger!r} is owned by {held.head.node}", held.head, held.left_us) from held
        except TooNew as error:
            raise too_new(self.ledger, error.head, claim.form) from error

    async def _read(self, tenure: Tenure, known: Known | None) -> Loaded:
        head = tenure.head
        if known is not None and known.seq > head.seq:
            behind = known.tail.after(head.seq, head.hash)
            if behind is not None:
                await self._bring(tenure, behind)
                return Loaded(head.epoch, None, (), None, self._pages(head, head.seq), form=head.form, resumed=True)
            if head.seq == 0:
                self._found = head
                tenure.head = msgspec.structs.replace(head, base_seq=known.seq, base_hash=known.hash)
                return Loaded(
                    head.epoch, None, (), None, self._pages(head, 0), form=head.form, resumed=True, is_empty=True
                )
        elif known is not None and known.seq >= head.snapshot_seq and await self._continues(head, known):
            return Loaded(head.epoch, None, (), None, self._pages(head, known.seq), form=head.form, resumed=True)
        mark, chunks = await self.snapshot_of(head)
        start = 0 if mark is None else mark.seq
        return Loaded(head.epoch, mark, chunks, check_of(head), self._pages(head, start), form=head.form)

    async def _bring(self, tenure: Tenure, records: tuple[Record, ...]) -> None:
        """The store has lost the last records of owners before, and this process has followed them."""
        head, last = tenure.head, records[-1]
        new = msgspec.structs.replace(
            head,
            seq=last.seq,
            hash=last.hash,
            at=last.at,
            written_at=head.written_at + (last.at - head.at) if head.written_at else head.confirmed_at,
            confirmed_at=0,
            until=tenure.lease_us,
            base_seq=last.seq,
            base_hash=last.hash,
        )
        sent_at = self._clock.monotonic()
        try:
            stamped = await self._commands.reassert(self.ledger, head, new, records)
        except Fenced as fenced:
            raise StoreUnavailable(f"ledger {self.ledger!r} changed while it was taken over; try again") from fenced
        tenure.reasserted(stamped, sent_at)
        if not head.seq:
            # The store had nothing, so that the claim was answered as that of a new ledger.
            tenure.beginning = Beginning(max(tenure.beginning.now, last.at), last.at, True, True)
        self.statistics.reasserted += 1
        _log.error("the store had lost records of the owner before; they were put back", ledger=self.ledger)

    async def _continues(self, head: Head, known: Known) -> bool:
        """Whether the last known record is in the journal. Its follower names it, or it is the last."""
        if known.seq == head.seq:
            return known.hash == head.hash
        records = await self._commands.read(self.ledger, known.seq, 1)
        return bool(records) and (records[0].seq, records[0].previous) == (known.seq + 1, known.hash)

    async def snapshot_of(self, head: Head) -> tuple[Mark | None, list[bytes]]:
        """The snapshot that counts. Raises :class:`~paceline.ledger.journal.StoreError`."""
        if not head.snapshot:
            return None, []
        chunks: list[bytes] = []
        while len(chunks) < head.snapshot_chunks:
            part = await self._commands.get_chunks(self.ledger, head.snapshot, len(chunks), _PAGE_CHUNKS)
            if not part:
                raise StoreUnavailable(f"ledger {self.ledger!r}: the snapshot went while it was read; read it again")
            chunks += part
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
            await asyncio.sleep(0)
        if digest.digest() != head.snapshot_digest or len(chunks) != head.snapshot_chunks:
            raise StoreCorrupt(f"ledger {self.ledger!r}: the snapshot at record {head.snapshot_seq} is damaged")
        return Mark(head.snapshot_seq, head.snapshot_at, head.snapshot_hash, head.snapshot_digest), chunks

    async def _pages(self, head: Head, after: int) -> AsyncIterator[list[Record]]:
        while after < head.seq:
            records = await self._commands.read(self.ledger, after, _PAGE_RECORDS)
            records = [record for record in records if record.seq <= head.seq]
            if not records or records[0].seq != after + 1:
                raise StoreCorrupt(f"ledger {self.ledger!r}: record {after + 1} is missing")
            yield records
            after = records[-1].seq
            if after == head.seq and records[-1].hash != head.hash:
                raise StoreCorrupt(f"ledger {self.ledger!r}: record {after} is not the one that was written last")

    # -- the owner's writes ---------------------------------------------------------------------------------------

    def is_fresh(self) -> bool:
        """Whether nobody else can have taken over: answers that changed nothing may leave."""
        return self.tenure is not None and self._clock.monotonic() < self.tenure.fresh_until

    @property
    def lease_age_us(self) -> int | None:
        """Since the last request was sent that confirmed the lease; ``None``: there is none."""
        return None if self.tenure is None else self._clock.monotonic() - self.tenure.confirmed_at

    async def append(self, record: Record) -> None:
        """Write one record; again, if it is not known whether it was written.

        Raises :class:`StoreDeposed`, :class:`StoreLost` and other :class:`~paceline.ledger.journal.StoreError`.
        """
        async with self._lock:
            tenure = self._in_office()
            head = tenure.head
            if head.lineage != await self._commands.lineage():
                # Whoever comes next need not fear that this primary lacks what was written to the one before.
                await self._renew(tenure)
                head = tenure.head
            self._flying = record
            for _ in range(_MOST_VERDICTS):
                if record.seq <= tenure.head.seq:
                    # In the books that were put back whole.
                    self._flying = None
                    return
                sent_at = self._clock.monotonic()
                try:
                    stamped = await self._commands.append(self.ledger, head.epoch, head.nonce, record, tenure.lease_us)
                except Fenced as fenced:
                    await self._reconcile(tenure, fenced.head)
                else:
                    tenure.confirmed(stamped, sent_at, record)
                    self._flying = None
                    return
            raise StoreUnavailable(f"ledger {self.ledger!r}: the store does not agree with itself")

    async def confirm(self) -> None:
        """Extend the lease. Raises as :meth:`append`."""
        async with self._lock:
            await self._renew(self._in_office())

    async def _renew(self, tenure: Tenure) -> None:
        for _ in range(_MOST_VERDICTS):
            head = tenure.head
            lineage = await self._commands.lineage()
            sent_at = self._clock.monotonic()
            try:
                stamped = await self._commands.renew(
                    self.ledger, head.epoch, head.nonce, head.seq, head.hash, lineage, tenure.lease_us
                )
            except Fenced as fenced:
                await self._reconcile(tenure, fenced.head)
            else:
                tenure.confirmed(stamped, sent_at)
                self.statistics.renewals += 1
                return
        raise StoreUnavailable(f"ledger {self.ledger!r}: the store does not agree with itself")

    async def _reconcile(self, tenure: Tenure, found: Head | None) -> None:
        """The store's journal ends elsewhere: mend that, so that what was refused can be tried again, or raise."""
        if found is not None and self._whole is not None and same(found, self._whole):
            self._whole = None
            tenure.refounded(Stamped(found, 0), tenure.confirmed_at)
            return
        verdict = tenure.refused(found, self._flying)
        if isinstance(verdict, Written):
            tenure.confirmed(Stamped(found, 0), tenure.confirmed_at, self._flying)
        elif isinstance(verdict, Reassert):
            await self._reassert(tenure, verdict)
        elif isinstance(verdict, Refound):
            self._found = found
            raise StoreLost(f"ledger {self.ledger!r}: the store has lost what was written; the books are put back")
        elif isinstance(verdict, Deposed):
            head = verdict.head
            raise StoreDeposed(
                f"ledger {self.ledger!r} has gone on with {head.node} in epoch {head.epoch}",
                head,
                verdict.lost,
                verdict.all_lost,
            )

    async def _reassert(self, tenure: Tenure, verdict: Reassert) -> None:
        lineage = await self._commands.lineage()
        new = msgspec.structs.replace(verdict.new, lineage=lineage)
        sent_at = self._clock.monotonic()
        try:
            stamped = await self._commands.reassert(self.ledger, verdict.expected, new, verdict.records)
        except Fenced:
            return  # asked again, the store says where it ends now
        tenure.reasserted(stamped, sent_at)
        self.statistics.reasserted += 1
        _log.error(
            "the store had lost acknowledged records; they were put back",
            ledger=self.ledger,
            records=len(verdict.records),
        )

    async def refound(self, mark: Mark, chunks: AsyncIterable[bytes]) -> None:
        """Put the books back whole, as they were at ``mark``, after :class:`StoreLost`. Raises as :meth:`append`."""
        async with self._lock:
            tenure = self._in_office()
            await self._hold(tenure)
            name, count, digest = await self._put(mark, chunks, held=tenure)
            mine = tenure.head
            new = msgspec.structs.replace(
                mine,
                seq=mark.seq,
                hash=mark.hash,
                at=mark.at,
                written_at=mine.written_at + (mark.at - mine.at) if mine.written_at else 0,
                confirmed_at=0,
                until=tenure.lease_us,
                lineage=await self._commands.lineage(),
                snapshot=name,
                snapshot_seq=mark.seq,
                snapshot_at=mark.at,
                snapshot_hash=mark.hash,
                snapshot_digest=digest,
                snapshot_chunks=count,
                check=b"",
                successor="",
            )
            self._whole = new
            sent_at = self._clock.monotonic()
            stamped = await self._replace(tenure, new)
            self._flying = self._whole = None
            tenure.refounded(stamped, sent_at)
            self.statistics.refounded += 1
            _log.error("the store had lost the ledger; its books were put back whole", ledger=self.ledger)

    async def _hold(self, tenure: Tenure) -> None:
        """Keep the place while the books are on their way: whoever finds it empty, or its lease ended, begins anew."""
        mine, found, origin = tenure.head, self._found, genesis(self.ledger)
        if found is None:
            found = Head(mine.epoch, b"", "", "", 0, origin, 0, 0, 0, 0, 0, origin, "", mine.form)
        new = msgspec.structs.replace(
            found,
            epoch=mine.epoch,
            nonce=mine.nonce,
            node=mine.node,
            address=mine.address,
            confirmed_at=0,
            until=tenure.lease_us,
            lineage=await self._commands.lineage(),
            successor="",
        )
        self._found = (await self._replace(tenure, new)).head

    async def _replace(self, tenure: Tenure, new: Head) -> Stamped:
        try:
            return await self._commands.reassert(self.ledger, self._found, new, ())
        except Fenced as fenced:
            await self._reconcile(tenure, fenced.head)
            raise StoreLost(f"ledger {self.ledger!r}: the store changed while the books were put back") from fenced

    # -- snapshots ------------------------------------------------------------------------------------------------

    async def write_snapshot(self, mark: Mark, chunks: AsyncIterable[bytes]) -> None:
        """Keep the state as it was at ``mark.seq``, then drop the records up to there and the snapshot before."""
        tenure = self._in_office()
        epoch, nonce = tenure.head.epoch, tenure.head.nonce
        name, count, digest = await self._put(mark, chunks)
        try:
            stamped = await self._commands.keep_snapshot(
                self.ledger, epoch, nonce, name, mark.seq, mark.at, mark.hash, digest, count, mark.seq
            )
        except Fenced as fenced:
            raise StoreFenced(f"ledger {self.ledger!r}: the snapshot is of an owner before") from fenced
        self._noted(stamped)

    async def _put(
        self, mark: Mark, chunks: AsyncIterable[bytes], held: Tenure | None = None
    ) -> tuple[str, int, bytes]:
        self._snapshots += 1
        tenure = self._in_office()
        name = f"{tenure.head.epoch}-{mark.seq}-{tenure.head.nonce[:4].hex()}-{self._snapshots}"
        digest = hashlib.sha256()
        count = 0
        held_at = self._clock.monotonic()
        async for chunk in chunks:
            if held is not None and self._clock.monotonic() - held_at >= held.lease_us // 4:
                held_at = self._clock.monotonic()
                await self._hold(held)
            digest.update(chunk)
            await self._commands.put_chunk(self.ledger, name, count, chunk)
            count += 1
        return name, count, digest.digest()

    async def write_check(self, mark: Mark) -> None:
        """Keep a lone mark in the place of the one before."""
        tenure = self._in_office()
        try:
            stamped = await self._commands.keep_check(
                self.ledger, tenure.head.epoch, tenure.head.nonce, _pack_mark(mark)
            )
        except Fenced as fenced:
            raise StoreFenced(f"ledger {self.ledger!r}: the mark is of an owner before") from fenced
        self._noted(stamped)

    async def finalize(self, form: int) -> None:
        """Let owners write ``form`` from now on."""
        async with self._lock:
            tenure = self._in_office()
            try:
                stamped = await self._commands.finalize(self.ledger, tenure.head.epoch, tenure.head.nonce, form)
            except Fenced as fenced:
                raise StoreFenced(f"ledger {self.ledger!r} has another owner, or a newer form") from fenced
            self._noted(stamped)

    def _noted(self, stamped: Stamped) -> None:
        """What the store keeps beside the records has changed; where they end is known better here."""
        head, tenure = stamped.head, self.tenure
        if head is None or tenure is None or tenure.head.nonce != head.nonce:
            return
        tenure.head = msgspec.structs.replace(
            tenure.head,
            form=head.form,
            snapshot=head.snapshot,
            snapshot_seq=head.snapshot_seq,
            snapshot_at=head.snapshot_at,
            snapshot_hash=head.snapshot_hash,
            snapshot_digest=head.snapshot_digest,
            snapshot_chunks=head.snapshot_chunks,
            check=head.check,
        )

    # -- letting go -----------------------------------------------------------------------------------------------

    async def release(self, successor: str = "") -> None:
        """Let ``successor`` take over at once (empty: anybody). Nothing is written after this.

        Raises :class:`~paceline.ledger.journal.StoreError`: then this process may still be the owner, and only it may
        know what the store has lost. It can go on, and learns from its next write whether it is.
        """
        async with self._lock:
            tenure, self.tenure = self.tenure, None
            if tenure is None:
                return
            head = tenure.head
            tenure.letting_go()
            try:
                await self._commands.release(
                    self.ledger, head.epoch, head.nonce, head.seq, head.hash, successor, tenure.lease_us
                )
            except BaseException as error:
                self.tenure = tenure
                if isinstance(error, Fenced):
                    raise StoreUnavailable(f"ledger {self.ledger!r} changed while it was let go") from error
                raise

    async def close(self) -> None:
        """Let go of the ledger, if it is still owned. The store stays open."""
        await self.release()

    def _in_office(self) -> Tenure:
        if self.tenure is None:
            raise StoreFenced(f"ledger {self.ledger!r} is not owned here: take it over before writing")
        return self.tenure


def check_of(head: Head) -> Mark | None:
    if not head.check:
        return None
    try:
        mark = _unpack_mark(head.check)
    except msgspec.MsgspecError:
        return None
    return mark if mark.seq > head.snapshot_seq else None
