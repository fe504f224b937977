"""The newest decisions of a ledger, and why they were taken. Not part of the books.

Soft: it is not journalled, and begins anew with every owner. What calls said or were answered is not in it, nor are
credentials: names, amounts and times only. It holds what was decided, which a store that fails may yet undo.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from enum import IntEnum
from typing import Final

import msgspec

from paceline.engine.answers import Reason, Would
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import Dimension
from paceline.engine.operations import Priority, Reserve
from paceline.engine.queue import Option

MAX_RECORDS: Final = 20_000
"""Decisions of one ledger that are remembered; about 500 bytes each. Beyond it the oldest is forgotten."""


class Kind(IntEnum):
    """What was decided."""

    GRANTED = 1
    DENIED = 2
    WAITING = 3
    """It began to wait."""
    SETTLED = 4
    RELEASED = 5
    """Given back, or withdrawn while it waited."""
    EXPIRED = 6


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One decision. ``amounts`` and ``levels`` go with ``buckets``."""

    at: int
    """Ledger time, in µs."""
    kind: Kind
    key: str
    pool: str
    shares: tuple[str, ...] = ()
    tenant: str = ""
    route: str = ""
    priority: Priority | None = None
    index: int | None = None
    """The candidate; of a denial, the one that could have been served first."""
    count: int = 1
    """Calls: of a denial or a wait, that must fit together; of a grant, that were granted."""
    buckets: tuple[int, ...] = ()
    amounts: tuple[int, ...] = ()
    """What each call holds, or would hold; of an end, what was charged in all."""
    levels: tuple[int | None, ...] = ()
    """What was left in the dimension that bound, when it was denied or began to wait; of others ``None``."""
    ahead: int = 0
    """Calls that came before it, as was estimated when it was denied or began to wait."""
    wait_us: int | None = None
    """GRANTED: how long it waited. DENIED: until it would have had its turn. WAITING: until it is expected to have."""
    reason: Reason | None = None
    binding: Dimension | None = None
    """What bound."""
    keys: tuple[str, ...] = ()
    """The calls of a bulk grant."""
    observed: bool = False
    """Nothing was enforced: ``reason``, ``binding`` and ``wait_us`` say what would have been done."""
    cost: int = 0
    """Of an end. Unit: nano-dollars."""


class Audit:
    """A ring of records, numbered from zero."""

    def __init__(self, most: int = MAX_RECORDS) -> None:
        self.count = 0
        """Records so far: the number of the next one."""
        self._most = most
        self._ring: list[Record] = []

    def note(self, record: Record) -> None:
        """Remember a decision."""
        if len(self._ring) < self._most:
            self._ring.append(record)
        elif self._most:
            self._ring[self.count % self._most] = record
        self.count += 1

    def since(self, number: int, most: int) -> tuple[int, list[Record]]:
        """Up to ``most`` records from that number on, or from the oldest that is there; and the number of the first."""
        first = max(number, self.count - len(self._ring))
        last = min(self.count, first + most)
        if first >= last:
            return first, []
        start, end = first % self._most, last % self._most
        if start < end:
            return first, self._ring[start:end]
        return first, self._ring[start:] + self._ring[:end]

    def of(self, keys: Set[str]) -> list[Record]:
        """What was decided of these, oldest first. Looks at every record."""
        start = self.count % self._most if self._most and len(self._ring) == self._most else 0
        found = [
            (place, record)
            for place, record in enumerate(self._ring)
            if record.key in keys or (record.keys and not keys.isdisjoint(record.keys))
        ]
        found.sort(key=lambda each: (each[0] - start) % max(1, self._most))
        return [record for _, record in found]

    # -- what is decided --------------------------------------------------------------------------------------------

    def granted(
        self, now: int, operation: Reserve, option: Option, keys: tuple[str, ...], waited: int, would: Would | None
    ) -> None:
        """Calls were granted, after a wait of ``waited`` µs."""
        reason = binding = None
        if would is not None:
            reason, binding, waited = would.reason, would.binding, max(waited, would.wait_us)
        self.note(
            Record(
                now,
                Kind.GRANTED,
                operation.key,
                option.pool,
                option.shares,
                operation.tenant,
                operation.route,
                operation.priority,
                option.index,
                len(keys),
                option.buckets,
                option.holds,
                (),
                0,
                waited,
                reason,
                binding,
                keys if operation.count > 1 else (),
                would is not None,
            )
        )

    def turned_down(
        self,
        now: int,
        kind: Kind,
        operation: Reserve,
        option: Option,
        buckets: Sequence[Bucket],
        wait_us: int | None,
        reason: Reason | None,
        binding: Dimension | None,
    ) -> None:
        """A Reserve was denied, or began to wait. ``buckets``: those of the ledger."""
        self.note(
            Record(
                now,
                kind,
                operation.key,
                option.pool,
                option.shares,
                operation.tenant,
                operation.route,
                operation.priority,
                option.index,
                option.count,
                option.buckets,
                option.holds,
                tuple(
                    [
                        found.level + found.refill(now)[0] if (found := buckets[number]).dimension is binding else None
                        for number in option.buckets
                    ]
                ),
                option.before,
                wait_us,
                reason,
                binding,
            )
        )

    def ended(
        self,
        now: int,
        kind: Kind,
        key: str,
        pool: str,
        shares: tuple[str, ...] = (),
        tenant: str = "",
        buckets: tuple[int, ...] = (),
        charges: tuple[int, ...] = (),
        cost: int = 0,
    ) -> None:
        """A call was settled or released, or its hold expired."""
        self.note(Record(now, kind, key, pool, shares, tenant, buckets=buckets, amounts=charges, cost=cost))
