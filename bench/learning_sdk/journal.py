"""What a server that has ended had learned, and when, by its journal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench.lab.coordinator import DIMENSIONS
from paceline.engine import events as ev
from paceline.engine.dimensions import Window
from paceline.engine.state import State
from paceline.ledger.machine import EngineMachine
from paceline.ledger.store import open_store

LEDGER = "default"
_payloads = msgspec.msgpack.Decoder(list[bytes])


@dataclass(frozen=True, slots=True)
class Ruled:
    """A limit ruled from ``at`` on, µs of the ledger's time; ``after`` readings had been kept by then."""

    at: int
    amount: int
    after: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A reading that the ledger kept: when, and of when its figures were; µs of the ledger's time."""

    at: int
    until: int


@dataclass(slots=True)
class Learned:
    """Of one limit of the pool: what ruled, and the readings of it, oldest first."""

    ruled: list[Ruled] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)
    """When calls were made that nobody had granted, for want of a coordinator that answers; µs of the ledger's time."""
    whole: bool = True
    """Else a snapshot has taken the place of the journal's beginning, as when a server ends in order: what was learned
    before is missing here."""


async def learned(store: Path, dimension: str) -> Learned:
    """Everything about one limit, of a server that has ended."""
    machine = EngineMachine()
    found = Learned()
    opened = open_store(f"embedded:{store}")
    await opened.open()
    try:
        loaded = await opened.journal(LEDGER).load()
        found.whole = loaded.snapshot is None
        state = machine.empty(LEDGER) if found.whole else machine.restore(LEDGER, loaded.chunks)
        async for page in loaded.pages:
            for record in page:
                for payload in _payloads.decode(record.payload):
                    for event in machine.decode(payload):
                        state.apply(event)
                        _note(found, state, event, dimension)
    finally:
        await opened.close()
    return found


def _note(found: Learned, state: State, event: ev.Event, dimension: str) -> None:
    """``event`` is the newest of ``state``."""
    if isinstance(event, ev.Booked):
        found.alone.append(event.granted_at)
        return
    if isinstance(event, ev.BucketAdded):
        number = len(state.buckets) - 1
    elif isinstance(event, ev.LimitMoved | ev.ReadingKept):
        number = event.bucket
    else:
        return
    bucket = state.buckets[number]
    if not bucket.pool or bucket.share or (bucket.dimension, bucket.window) != (DIMENSIONS[dimension], Window.MINUTE):
        return
    if not isinstance(event, ev.ReadingKept):
        found.ruled.append(Ruled(state.at, bucket.amount, len(found.kept)))
    elif event.constraint is not None:
        found.kept.append(Kept(state.at, event.constraint.until))
