"""Whether a fleet kept its promises, by what its clients wrote down and by what stands in the store's journal.

The journal is counted by :mod:`tests.proofs.recount`, which knows nothing of the server's code.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from tests.proofs.answers import Told, compare
from tests.proofs.recount import Recount, Snapshot, Stored
from tests.replicas.fleet import LEDGER
from tests.replicas.logbook import Answered, as_line, read, told
from tests.replicas.redis_server import RedisServer

MINUTE_US = 60_000_000
PAGE = 512
RAN_AHEAD_US = 250_000
"""The ledger's time may run so far ahead of the clients' at a change of owner, for the store's clock is read over a
network."""

Connect = Callable[[], Any]
"""Gives a blocking client of redis-py, of a cluster or of one server."""


def to(server: RedisServer) -> Connect:
    """Connections to one server."""
    return lambda: redis.Redis(port=server.listening, socket_timeout=5, socket_connect_timeout=5)


def log_key(client: Any, ledger: str = LEDGER) -> bytes | None:
    """The name of the stream with the ledger's records."""
    keys = [key for key in client.scan_iter(_type="STREAM") if ledger.encode() in key]
    assert len(keys) <= 1, keys
    return keys[0] if keys else None


def entries(client: Any, key: bytes, after: int = 0) -> list[tuple[int, bytes]]:
    """At most :data:`PAGE` records behind number ``after``."""
    found = client.xrange(key, f"{after + 1}-0", "+", count=PAGE)
    return [(int(number.partition(b"-")[0]), next(iter(fields.values()))) for number, fields in found]


def read_log(client: Any, ledger: str = LEDGER, after: int = 0) -> list[tuple[int, bytes]]:
    """All records behind number ``after`` that the store holds now."""
    key = log_key(client, ledger)
    found: list[tuple[int, bytes]] = []
    while key is not None and (page := entries(client, key, found[-1][0] if found else after)):
        found += page
    return found


class Recorder:
    """Follows a ledger's journal while the servers write and trim it, in a thread. A context manager."""

    def __init__(self, connect: Connect, ledger: str = LEDGER, interval: float = 0.05) -> None:
        self.records: dict[int, bytes] = {}
        self.rewritten = 0
        """Records that another one came in the place of."""
        self.seen: dict[int, int] = {}
        """By epoch: monotonic µs when its first record was seen."""
        self._connect = connect
        self._ledger = ledger
        self._interval = interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._last = 0

    def _run(self) -> None:
        client: Any = None
        key: bytes | None = None
        while True:
            ending = self._end.is_set()
            try:
                if client is None:
                    client = self._connect()
                if key is None:
                    key = log_key(client, self._ledger)
                while key is not None and self._page(client, key):
                    pass
            except (redis.RedisError, OSError):
                with contextlib.suppress(redis.RedisError, OSError):
                    if client is not None:
                        client.close()
                client = None
            if ending:
                if client is not None:
                    client.close()
                return
            self._end.wait(self._interval)

    def _page(self, client: Any, key: bytes) -> bool:
        found = entries(client, key, self._last)
        for number, record in found:
            if self.records.setdefault(number, record) != record:
                self.rewritten += 1
                self.records[number] = record
            epoch = int.from_bytes(record[40:48], "big")
            self.seen.setdefault(epoch, time.monotonic_ns() // 1_000)
            self._last = number
        return len(found) == PAGE

    def stored(self) -> Stored:
        """What was written, from the first record on."""
        return Stored(self._ledger, sorted(self.records.items()), None, max(self.seen, default=0))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Once more, and then no more."""
        self._end.set()
        self._thread.join(30)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def snapshot(client: Any, ledger: str = LEDGER) -> Snapshot | None:
    """The snapshot that counts."""
    heads = [key for key in client.scan_iter(_type="HASH") if ledger.encode() in key]
    for key in heads:
        fields = client.hgetall(key)
        if fields.get(b"snapshot"):
            name = fields[b"snapshot"]
            parts = [each for each in heads if each.endswith(name) and each != key]
            chunks = client.hgetall(parts[0])
            ordered = [chunks[number] for number in sorted(chunks, key=int)]
            return Snapshot(int(fields[b"snapshot_seq"]), ordered)
    return None


@dataclass
class Judgement:
    """What was compared, and what is wrong."""

    recount: Recount
    told: Told
    counts: Counter[str]
    """Entries in the clients' logs, by kind."""
    entries: list[Answered]
    faults: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        return self.counts["commit"]


def count(stored: Stored) -> Recount:
    """The books, counted from the records."""
    recount = Recount(stored.name)
    recount.follow(stored)
    recount.check()
    return recount


def judge(logs: Iterable[Path], stored: Stored, *, may_fail: bool = False) -> Judgement:
    """Hold every answer against the journal. ``may_fail``: calls that got no answer are counted, and are no fault."""
    recount = count(stored)
    found = list(read(logs))
    lines = [line for line in map(as_line, found) if line is not None]
    compared = compare(lines, {recount.name: recount})
    judgement = Judgement(recount, compared, Counter(entry.kind for entry in found), found)
    judgement.faults += recount.faults + compared.faults
    failed = [entry for entry in found if entry.kind == "failed"]
    if failed and not may_fail:
        judgement.faults.append(f"{len(failed)} calls failed: {failed[0].what}")
    if not any(entry.kind == "grant" for entry in found):
        judgement.faults.append("no call was granted: nothing was proved")
    return judgement


def conserved(judgement: Judgement) -> list[str]:
    """Whether what clients were told they were charged, and what nobody was told of, is what the journal charges."""
    recount, compared = judgement.recount, judgement.told
    faults = []
    settled = {f"anonymous/{entry.id}" for entry in judgement.entries if entry.kind == "commit"}
    rest: Counter[tuple[str, int]] = Counter()
    for key, call in recount.calls.items():
        if key not in settled:
            for dimension, amount in recount.own(call, call.charges).items():
                rest[call.pool, dimension] += amount
    for bucket in recount.buckets:
        if bucket.share or not bucket.pool:
            continue
        address = bucket.pool, bucket.dimension
        counted = compared.settled[recount.name, *address] + rest[address]
        if counted != bucket.charged:
            faults.append(f"{bucket.name()}: charged {bucket.charged}, the clients' own count is {counted}")
    return faults


def over_granted(grants: Iterable[tuple[int, int]], amount: int, burst: int) -> str:
    """Whether in any window more was granted than the burst and what refills in it; empty: never.

    ``grants``: time in µs and tokens. It is a bucket, full at the first of them, in exact integers.
    """
    level = burst * MINUTE_US
    last: int | None = None
    for at, tokens in sorted(grants):
        if last is not None:
            level = min(burst * MINUTE_US, level + amount * (at - last))
        last = at
        level -= tokens * MINUTE_US
        if level < 0:
            return f"at {at} µs {-level / MINUTE_US:.6f} tokens more were granted than there can have been"
    return ""


def never_over(judgement: Judgement, limits: dict[int, tuple[int, int]]) -> list[str]:
    """:func:`over_granted` for each dimension (amount, burst), by the clients' logs and by the journal.

    Only for calls that use what they hold: what is given back may be granted again.
    """
    faults = []
    by_client: dict[int, dict[str, tuple[int, int]]] = {dimension: {} for dimension in limits}
    for entry in judgement.entries:
        if entry.kind == "grant":
            fields = told(entry.context)
            for dimension, tokens in fields[7]:
                if dimension in limits:
                    by_client[dimension][entry.id] = (fields[6], tokens)
    recount = judgement.recount
    for dimension, (amount, burst) in limits.items():
        journal = [
            (call.granted_at, recount.own(call, call.first)[dimension])
            for call in recount.calls.values()
            if call.state != "booked"
        ]
        for name, grants in (("the clients", list(by_client[dimension].values())), ("the journal", journal)):
            if wrong := over_granted(grants, amount, burst):
                faults.append(f"dimension {dimension}, by {name}: {wrong}")
    ahead = ran_ahead(judgement.entries)
    if ahead > RAN_AHEAD_US:
        faults.append(f"the ledger's time ran ahead of the clients' by {ahead / 1e3:.0f} ms")
    return faults


def ran_ahead(found: Iterable[Answered]) -> int:
    """How far the ledger's time surely ran ahead of the clients', µs: a grant is decided while it is asked for."""
    granted = sorted(
        (entry.answered, told(entry.context)[6] - entry.answered, told(entry.context)[6] - entry.asked)
        for entry in found
        if entry.kind == "grant"
    )
    most = 0
    highest = None
    for _, low, high in granted:
        if highest is not None:
            most = max(most, low - highest)
        highest = high if highest is None else min(highest, high)
    return most


# -- how long callers waited --------------------------------------------------------------------------------------


@dataclass
class Interruption:
    """What the callers saw of one change of owner. Times in µs."""

    at: int
    """When it was done to the fleet."""
    gap: int
    """The longest time around it without any answer to a Reserve or a Commit."""
    restored: int
    """From the deed to the end of that gap."""
    touched: list[int]
    """How long those calls waited that were open at any instant of the gap."""


def interruptions(found: Sequence[Answered], deeds: Sequence[int], within: int = 6_000_000) -> list[Interruption]:
    """By the deeds' times. A gap is looked for from just before a deed until ``within`` after it, or the next one."""
    answers = sorted(entry for entry in map(_span, found) if entry is not None)
    ends = sorted(end for _, end in answers)
    result = []
    for deed, following in zip(deeds, [*deeds[1:], deeds[-1] + 2 * within], strict=True) if deeds else ():
        limit = min(deed + within, following - 50_000)
        start = bisect.bisect_left(ends, deed - 50_000)
        last = ends[max(0, start - 1)]
        gap, gap_start, gap_end = 0, deed, deed
        for end in ends[start:]:
            if last > limit:
                break
            if end - last > gap and end > deed:
                gap, gap_start, gap_end = end - last, last, end
            last = end
        touched = [end - asked for asked, end in answers if asked < gap_end and end >= gap_start and end > deed]
        result.append(Interruption(deed, gap, gap_end - deed, touched))
    return result


def _span(entry: Answered) -> tuple[int, int] | None:
    return (entry.asked, entry.answered) if entry.kind in ("grant", "commit", "denial", "failed") else None


def quiet_median(found: Iterable[Answered], deeds: Sequence[int], margin: int = 3_000_000) -> float:
    """The median wait away from the deeds, µs."""
    spans = [span for span in map(_span, found) if span is not None]
    quiet = [end - asked for asked, end in spans if all(not -500_000 < asked - deed < margin for deed in deeds)]
    return statistics.median(quiet) if quiet else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent lie at or below."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
