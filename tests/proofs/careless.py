"""``paceline``, broken on purpose: it acknowledges a record at once and writes it a moment later.

The proof that nothing is lost must fail with it: ``python -m tests.proofs.kill9 --module tests.proofs.careless``.
"""

from __future__ import annotations

import asyncio

from paceline.cli import main
from paceline.ledger.journal import Record
from paceline.ledger.sqlite import SqliteJournal
from tests.proofs import keeping

LATE_SECONDS = 0.2

_append = SqliteJournal.append
_pending: dict[SqliteJournal, asyncio.Queue[Record]] = {}
_writers: set[asyncio.Task[None]] = set()


async def _write(journal: SqliteJournal, queue: asyncio.Queue[Record]) -> None:
    while True:
        record = await queue.get()
        await asyncio.sleep(LATE_SECONDS)
        for each in [record, *(queue.get_nowait() for _ in range(queue.qsize()))]:
            await _append(journal, each)


async def _acknowledge_first(journal: SqliteJournal, record: Record) -> None:
    queue = _pending.get(journal)
    if queue is None:
        queue = _pending[journal] = asyncio.Queue()
        _writers.add(asyncio.create_task(_write(journal, queue)))
    queue.put_nowait(record)


if __name__ == "__main__":
    keeping.install()
    setattr(SqliteJournal, "append", _acknowledge_first)  # noqa: B010 -- the fault
    main()
