"""The newest records of a chain, kept to be put back into a store that loses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from paceline.ledger.journal import Record

TAIL_BYTES = 8 * 1024 * 1024
TAIL_RECORDS = 16_384
"""At most so much is kept, in payloads and in number; the newest record always is."""


class Tail:
    """Records that follow one another, oldest first."""

    __slots__ = ("_bytes", "_records")

    def __init__(self) -> None:
        self._records: deque[Record] = deque()
        self._bytes = 0

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def add(self, record: Record) -> None:
        """Keep the next record. One that is kept already is ignored; one that does not follow begins anew."""
        records = self._records
        if records:
            last = records[-1]
            if record.seq <= last.seq:
                return
            if record.previous != last.hash:
                self.clear()
        records.append(record)
        self._bytes += len(record.payload)
        while len(records) > 1 and (self._bytes > TAIL_BYTES or len(records) > TAIL_RECORDS):
            self._bytes -= len(records.popleft().payload)

    def clear(self) -> None:
        """Keep nothing."""
        self._records.clear()
        self._bytes = 0

    def after(self, seq: int, hash: bytes) -> tuple[Record, ...] | None:
        """The records behind the one of this number and hash; ``None``: it is not known here."""
        if not self._records:
            return None
        first = self._records[0]
        if (seq, hash) == (first.seq - 1, first.previous):
            return tuple(self._records)
        place = seq - first.seq
        if 0 <= place < len(self._records) and self._records[place].hash == hash:
            records = list(self._records)
            return tuple(records[place + 1 :])
        return None
