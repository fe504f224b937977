"""The books of a server that has stopped, folded from its journal."""

from __future__ import annotations

from pathlib import Path

import msgspec

from paceline.engine.dimensions import Dimension, Window
from paceline.ledger.machine import EngineMachine
from paceline.ledger.store import open_store

_payloads = msgspec.msgpack.Decoder(list[bytes])


async def charged(store: Path, ledger: str) -> tuple[dict[str, int], int]:
    """What all calls were charged, by dimension of the pools, and the number of calls still open."""
    opened = open_store(f"embedded:{store}")
    await opened.open()
    try:
        loaded = await opened.journal(ledger).load()
        machine = EngineMachine()
        state = machine.empty(ledger) if loaded.snapshot is None else machine.restore(ledger, loaded.chunks)
        async for page in loaded.pages:
            for record in page:
                for payload in _payloads.decode(record.payload):
                    for event in machine.decode(payload):
                        state.apply(event)
    finally:
        await opened.close()
    sums: dict[str, int] = {}
    for bucket in state.buckets:
        if bucket.pool and not bucket.share and bucket.window is Window.MINUTE:
            name = Dimension(bucket.dimension).name.lower()
            sums[name] = sums.get(name, 0) + bucket.charged
    return sums, len(state.open)
