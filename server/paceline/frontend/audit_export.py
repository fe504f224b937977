"""Writes the decisions of the ledgers that are owned here to the files of the audit.

It looks, ten times a second, at what is new in each owner's memory: a decision waits for nothing, and is not even
told. What is forgotten before it was looked at, or finds no place in the queue to the file, is dropped and counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence

from paceline.engine.audit import Audit, Record
from paceline.engine.bucket import Bucket
from paceline.frontend import audit
from paceline.frontend.routing import Slot
from paceline.telemetry.rotation import RotatingFile

LOOK_SECONDS = 0.1
MAX_BATCH = 2_000
"""Decisions that are handed to the file at once."""


class _Followed:
    """How far one owner's memory was read."""

    __slots__ = ("audit", "buckets", "next")

    def __init__(self, found: Audit, buckets: Sequence[Bucket]) -> None:
        self.audit = found
        self.buckets = buckets
        self.next = 0


class AuditExport:
    """Follows all ledgers that are owned here; ``slots`` are those of the process."""

    def __init__(self, slots: Callable[[], Iterable[Slot]], file: RotatingFile) -> None:
        self.file = file
        self.missed = 0
        """Decisions that were forgotten before they were looked at."""
        self._slots = slots
        self._followed: dict[str, _Followed] = {}
        """By ledger."""

    @property
    def dropped(self) -> int:
        """Decisions that were not written."""
        return self.missed + self.file.lost

    async def run(self) -> None:
        """Look, again and again."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Hand over what is new."""
        here: dict[str, _Followed] = {}
        for slot in list(self._slots()):
            engine = slot.engine
            followed = self._followed.get(slot.account)
            if engine is None:
                continue
            if followed is None or followed.audit is not engine.stats.audit:
                if followed is not None:
                    self._hand_over(slot.account, followed)
                followed = _Followed(engine.stats.audit, engine.state.buckets)
            here[slot.account] = followed
            self._hand_over(slot.account, followed)
        for account in self._followed.keys() - here.keys():
            # Its owner is elsewhere now.
            self._hand_over(account, self._followed[account])
        self._followed = here

    async def close(self, timeout: float) -> None:
        """Write what there is, for at most ``timeout`` seconds."""
        self.look()
        await asyncio.to_thread(self.file.close, timeout)

    def _hand_over(self, ledger: str, followed: _Followed) -> None:
        end = followed.audit.count
        while followed.next < end:
            first, records = followed.audit.since(followed.next, MAX_BATCH)
            self.missed += first - followed.next
            followed.next = first + len(records)
            if not records:
                return
            self.file.offer(len(records), _Lines(ledger, followed.buckets, records))


class _Lines:
    """Renders some records, when the file's thread asks for them."""

    __slots__ = ("_buckets", "_ledger", "_records")

    def __init__(self, ledger: str, buckets: Sequence[Bucket], records: list[Record]) -> None:
        self._ledger, self._buckets, self._records = ledger, buckets, records

    def __call__(self) -> Iterator[bytes]:
        for record in self._records:
            yield audit.encode(audit.entry_of(self._ledger, self._buckets, record))
