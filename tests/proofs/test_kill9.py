"""A small run of the proof, and proof that it can fail. ``make prove-kill`` is the whole."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.proofs.kill9 import Result, judge, prove, recount_stored, report
from tests.proofs.recount import Stored, read_store

pytestmark = [pytest.mark.process, pytest.mark.slow]

_HEADER_BYTES = 64
"""Sequence number, epoch, two times, and the hash of the record before."""


Change = Callable[[list[Any]], None]
"""Changes the events of one record."""


def resealed(stored: Stored, change: Change) -> Stored:
    """The journal with other events, and a chain that is whole."""
    records = []
    previous = hashlib.sha256(b"paceline ledger\0" + stored.name.encode()).digest()
    for seq, data in stored.records:
        payloads = []
        for payload in msgspec.msgpack.decode(data[32 + _HEADER_BYTES :]):
            events = msgspec.msgpack.decode(payload)
            change(events)
            payloads.append(msgspec.msgpack.encode(events))
        body = data[32 : 32 + _HEADER_BYTES - 32] + previous + msgspec.msgpack.encode(payloads)
        previous = hashlib.sha256(body).digest()
        records.append((seq, previous + body))
    return Stored(stored.name, records, None, stored.epoch)


def once(kind: str, change: Callable[[list[Any], int], None]) -> Change:
    """Changes the hundredth event of a kind: the list of events of its record, and its place there."""
    seen = 0

    def changes(events: list[Any]) -> None:
        nonlocal seen
        for place, event in enumerate(events):
            if event[0] == kind and not (kind == "adv" and not event[2]):  # One that refilled nothing says nothing.
                seen += 1
                if seen == 100:
                    change(events, place)
                    return

    return changes


def cheaper(events: list[Any], place: int) -> None:
    """A settlement charges one less in its first dimension."""
    events[place][2][0] -= 1


def dropped(events: list[Any], place: int) -> None:
    del events[place]


def doubled(events: list[Any], place: int) -> None:
    events.insert(place, events[place])


CHANGES = (
    ("settle", cheaper),
    ("settle", dropped),
    ("settle", doubled),
    ("grant", dropped),
    ("grant", doubled),
    ("rel", dropped),
    ("adv", dropped),
    ("adv", doubled),
)


def faults_of(folder: Path, stored: list[Stored]) -> list[str]:
    result = Result(seed=0)
    recount_stored(stored, result)
    judge(sorted(folder.glob("client-*.jsonl")), result)
    return result.faults


@pytest.mark.timeout(200)
def test_nothing_acknowledged_is_lost_or_counted_twice(tmp_path: Path) -> None:
    result = prove(3, 1_500, secrets.randbits(32), tmp_path, limit_seconds=100)
    print(report(result))
    assert result.passed, report(result)
    assert sum(result.kills.values()) == 4
    assert result.pairs >= 1_500
    assert result.told.counts["settlements looked up"] >= 1_500

    # The same recount finds faults in a journal that is not what happened, though its chain be whole.
    stored = read_store(tmp_path / "ledgers.db", tmp_path)
    assert faults_of(tmp_path, [resealed(each, lambda events: None) for each in stored]) == []
    for kind, change in CHANGES:
        changed = [resealed(each, once(kind, change)) for each in stored]
        assert faults_of(tmp_path, changed), f"{change.__name__} {kind}"
    for each in stored:
        # The very last one may be that of a start, of which nobody was told.
        told = [place for place, record in enumerate(each.records) if b"settle" in record[-1]]
        del each.records[told[-1] :]
    assert faults_of(tmp_path, stored), "without the last records"


@pytest.mark.timeout(150)
def test_a_server_that_acknowledges_before_it_writes_is_caught(tmp_path: Path) -> None:
    result = prove(3, 400, secrets.randbits(32), tmp_path, module="tests.proofs.careless", limit_seconds=60)
    lost = [fault for fault in result.told.faults if "the journal" in fault]
    assert lost, report(result)
