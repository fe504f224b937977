"""One owner's time in office: what it may still say, and what to do when the store disagrees. Pure: no I/O, no clock.

:class:`Tenure` follows the journal from the owner's side. It keeps the newest acknowledged records, because a store
that fails over to a replica may have lost them: if what is left there is a prefix of this owner's own chain they are
put back, and nobody was harmed. If somebody else has written meanwhile, this owner is deposed, and what only it knows
is handed to the winner (:mod:`paceline.engine.adoption`).

Times are monotonic µs of this process (``sent_at``), the store's own µs (in heads), or ledger time where it says so.
"""

from __future__ import annotations

import msgspec

from paceline.ledger.commands import Stamped
from paceline.ledger.journal import Beginning, Record
from paceline.ledger.lease import Head
from paceline.ledger.tail import Tail

_SAFETY = 0.75
"""The part of a lease in which answers leave without asking the store again."""


class Written(msgspec.Struct, frozen=True):
    """The store has what was to be written: an answer was lost, not the record."""


class Unchanged(msgspec.Struct, frozen=True):
    """The journal ends where this owner believes: whatever was refused may be tried again."""


class Reassert(msgspec.Struct, frozen=True):
    """The store lost ``records``, and nobody else wrote: put them back in the place of ``expected``."""

    expected: Head
    new: Head
    records: tuple[Record, ...]


class Refound(msgspec.Struct, frozen=True):
    """The store lost more than is kept here: it needs a snapshot of the books in the place of ``expected``."""

    expected: Head | None


class Deposed(msgspec.Struct, frozen=True):
    """Another owner goes on. ``lost`` are acknowledged records that its journal may lack; ``all_lost``: it began behind
    none of ours that is kept here, and may lack everything."""

    head: Head
    lost: tuple[Record, ...]
    all_lost: bool = False


Verdict = Written | Unchanged | Reassert | Refound | Deposed


class Tenure:
    """An epoch, from its acquisition on."""

    def __init__(self, stamped: Stamped, sent_at: int, lease_us: int) -> None:
        head = stamped.head
        if head is None:
            raise ValueError("an acquisition answers with a head")
        self.head = head
        """As the store had it when it last answered."""
        self.lease_us = lease_us
        self.confirmed_at = sent_at
        """When the last request was sent that the store has granted."""
        self.beginning = _beginning(stamped, head)
        self.tail = Tail()
        """The newest records that the journal has, those of owners before included."""
        self._let_go_at = -1
        """The last record's number when this owner tried to let go."""

    @property
    def fresh_until(self) -> int:
        """Until then nobody else can have taken over, but by an owner's death that was seen."""
        if self.head.seq <= self._let_go_at:
            # The request may still arrive. Behind another record the store refuses it.
            return 0
        return self.confirmed_at + int(self.lease_us * _SAFETY)

    def confirmed(self, stamped: Stamped, sent_at: int, record: Record | None = None) -> None:
        """The store granted a renewal, or took ``record``."""
        if stamped.head is not None:
            self.head = stamped.head
        self.confirmed_at = max(self.confirmed_at, sent_at)
        if record is not None:
            self.tail.add(record)

    def letting_go(self) -> None:
        """The store is asked to let another owner take over at once."""
        self._let_go_at = self.head.seq

    def refused(self, found: Head | None, flying: Record | None = None) -> Verdict:
        """The store's journal does not end where this owner's does. ``flying`` was sent and not acknowledged."""
        mine = self.head
        if found is None:
            return Refound(None)
        own = found.nonce == mine.nonce and found.epoch == mine.epoch
        if own and flying is not None and (found.seq, found.hash) == (flying.seq, flying.hash):
            return Written()
        if own and (found.seq, found.hash) == (mine.seq, mine.hash):
            return Unchanged()
        if not own and found.epoch >= mine.epoch:
            return self._deposed(found, flying)
        behind = self._behind(found)
        if behind is not None:
            kept = msgspec.structs.replace(
                found,
                epoch=mine.epoch,
                nonce=mine.nonce,
                node=mine.node,
                address=mine.address,
                seq=mine.seq,
                hash=mine.hash,
                at=mine.at,
                written_at=mine.written_at or found.written_at,
                base_seq=mine.base_seq,
                base_hash=mine.base_hash,
                confirmed_at=0,
                until=self.lease_us,
                form=max(mine.form, found.form),
                successor="",
            )
            return Reassert(found, kept, behind)
        if found.seq < mine.seq:
            return Refound(found)
        return Deposed(found, tuple(self.tail), all_lost=True)

    def reasserted(self, stamped: Stamped, sent_at: int) -> None:
        """What was lost is back."""
        if stamped.head is not None:
            self.head = stamped.head
        self.confirmed_at = max(self.confirmed_at, sent_at)

    def refounded(self, stamped: Stamped, sent_at: int) -> None:
        """The store has a snapshot of everything."""
        self.tail.clear()
        self.reasserted(stamped, sent_at)

    def _behind(self, found: Head) -> tuple[Record, ...] | None:
        """The records after ``found``'s, if that is in this owner's chain."""
        if (found.seq, found.hash) == (self.head.seq, self.head.hash):
            return ()
        return self.tail.after(found.seq, found.hash) if found.seq < self.head.seq else None

    def _deposed(self, winner: Head, flying: Record | None) -> Deposed:
        """What the winner cannot have: acknowledged records that are not below its own."""
        base = (winner.base_seq, winner.base_hash)
        if base == (self.head.seq, self.head.hash) or (flying is not None and base == (flying.seq, flying.hash)):
            return Deposed(winner, ())
        behind = self.tail.after(*base)
        if behind is not None:
            return Deposed(winner, behind)
        # Unknown what it began with: it takes over only what it does not know.
        return Deposed(winner, tuple(self.tail), all_lost=winner.base_seq <= self.head.seq)


def _beginning(stamped: Stamped, head: Head) -> Beginning:
    before = stamped.before
    if before is None or before.seq == 0:
        return Beginning(max(stamped.now, head.at), None, False)
    # Of books that were put back whole, no record may have been written to this store.
    written_at = before.written_at or before.confirmed_at
    elapsed = max(0, stamped.now - written_at)
    # A claim that was sent again is answered without the head before it: then the worst is taken to be true.
    again = before.nonce == head.nonce
    alive = 0 if again else max(0, before.confirmed_at - written_at)
    seen_until = before.at + min(alive, elapsed)
    return Beginning(
        before.at + elapsed, seen_until, again or before.lineage != head.lineage, not again and not before.successor
    )
