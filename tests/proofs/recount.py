"""The books of a ledger, counted again from its journal by other means than the engine's own fold.

Nothing of ``paceline`` is imported: records, events and snapshots are read as the MessagePack that they are. Each
refill is computed anew, each sum is kept twice (as columns of a bucket, and from the table of all calls), and whatever
does not agree becomes a fault: one line that says where.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import struct
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

MINUTE, DAY, MONTH = 2, 3, 4
WINDOW_US = {MINUTE: 60_000_000, DAY: 86_400_000_000}
NAMES = (
    "",
    "requests",
    "input tokens",
    "output tokens",
    "tokens",
    "calls in progress",
    "queued requests",
    "nano-dollars",
)
SPEND = 7
MOST_FAULTS = 50

_HEADER = struct.Struct(">QQQQ32s")
_SEQ_BITS = 40

_unpack = msgspec.msgpack.Decoder().decode

KEPT_SUFFIX = "-kept"
"""Of the file beside a store to which :mod:`tests.proofs.keeping` puts what is trimmed."""


def _kept(store: Path) -> list[tuple[int, bytes]]:
    """Records put aside, by place. The last one may be cut short, by a kill; it is in the store still."""
    path = store.with_name(store.name + KEPT_SUFFIX)
    data = path.read_bytes() if path.exists() else b""
    found: list[tuple[int, bytes]] = []
    start = 0
    while start + 4 <= len(data):
        end = start + 4 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            break
        place, record = _unpack(data[start + 4 : end])
        found.append((place, record))
        start = end
    return found


@dataclass
class Snapshot:
    seq: int
    chunks: list[bytes]


@dataclass
class Stored:
    """What a store holds of one ledger: records by sequence number, and the snapshot."""

    name: str
    records: list[tuple[int, bytes]]
    snapshot: Snapshot | None
    epoch: int


def read_store(store: Path, scratch: Path, after: dict[str, int] | None = None) -> list[Stored]:
    """The ledgers of a store whose server is dead, from a copy, so that the next server finds what the last one left.

    ``after``: by ledger, the sequence number from which records are wanted.
    """
    copy = scratch / "copy.db"
    for suffix in ("", "-wal"):
        target = copy.with_name(copy.name + suffix)
        target.unlink(missing_ok=True)
        source = store.with_name(store.name + suffix)
        if source.exists():
            shutil.copyfile(source, target)
    kept = _kept(store)
    database = sqlite3.connect(copy)
    try:
        found = []
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        if "ledgers" not in tables:
            return []
        for id_, sealed in database.execute("SELECT id, sealed FROM ledgers").fetchall():
            _, name, epoch, generation, mark, _ = _unpack(bytes(sealed)[32:])
            first = (after or {}).get(name, 0)
            bounds = (id_ << _SEQ_BITS | first, id_ << _SEQ_BITS | (1 << _SEQ_BITS) - 1)
            query = "SELECT place, record FROM records WHERE place >= ? AND place <= ?"
            rows = {place: bytes(data) for place, data in [*kept, *database.execute(query, bounds)]}
            records = [
                (place & (1 << _SEQ_BITS) - 1, rows[place]) for place in sorted(rows) if bounds[0] <= place <= bounds[1]
            ]
            snapshot = None
            if mark is not None:
                chunks = database.execute(
                    "SELECT chunk FROM chunks WHERE ledger = ? AND generation = ? ORDER BY number", (id_, generation)
                )
                snapshot = Snapshot(mark["seq"], [bytes(chunk) for (chunk,) in chunks])
            found.append(Stored(name, records, snapshot, epoch))
        return found
    finally:
        database.close()


@dataclass(slots=True)
class Bucket:
    """Columns of one dimension."""

    pool: str
    share: str
    dimension: int
    window: int
    amount: int
    burst: int
    at: int
    level: int
    carry: int = 0
    held: int = 0
    refilled: int = 0
    charged: int = 0
    adjusted: int = 0
    granted: int = 0
    settled: int = 0
    released: int = 0
    expired: int = 0
    lost: int = 0
    """Refill that found no place or was withheld, and that no late call has made up for. Not a column of the books."""
    outside: int = 0
    """What others take of the refill, by the journal. Nor this."""
    foreseen: int = 0
    """What is taken off the level for what open calls have produced beyond their holds. Nor this: it is in adjusted."""

    def due(self, now: int) -> tuple[int, int]:
        """What refills until ``now``, and the remainder."""
        room = self.burst - self.level
        if self.window == MONTH:
            before, after = (datetime.fromtimestamp(at / 1e6, UTC) for at in (self.at, now))
            turned = (before.year, before.month) != (after.year, after.month)
            return (max(0, room - self.held), 0) if turned else (0, 0)
        if self.window not in WINDOW_US or room <= 0:
            return 0, 0
        refilled, carry = divmod(self.carry + (self.amount - self.outside) * (now - self.at), WINDOW_US[self.window])
        return (refilled, carry) if refilled < room else (room, 0)

    def columns(self) -> tuple[int, ...]:
        return (
            self.level,
            self.carry,
            self.held,
            self.refilled,
            self.charged,
            self.adjusted,
            self.granted,
            self.settled,
            self.released,
            self.expired,
        )

    def name(self) -> str:
        share = f" [{self.share}]" if self.share else ""
        return f"{self.pool or 'all pools'}{share} {NAMES[self.dimension]}"


@dataclass(slots=True)
class Call:
    """One reservation, from its grant to its end. ``charges`` are its holds as long as it is open."""

    pool: str
    shares: tuple[str, ...]
    buckets: tuple[int, ...]
    holds: tuple[int, ...]
    charges: tuple[int, ...]
    granted_at: int
    first: tuple[int, ...] = ()
    """Its holds at the grant."""
    prices: tuple[int, ...] = ()
    state: str = "open"
    replaced: bool = False
    cost: int = 0


@dataclass
class Recount:
    """One ledger."""

    name: str
    at: int = 0
    seq: int = 0
    hash: bytes = b""
    epochs: set[int] = field(default_factory=set)
    buckets: list[Bucket] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    together: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tombstones: set[str] = field(default_factory=set)
    forgotten: int = 0
    anonymous: list[tuple[tuple[int, ...], tuple[int, ...], int]] = field(default_factory=list)
    """Observed without an id: buckets, charges, cost."""
    kinds: Counter[str] = field(default_factory=Counter)
    snapshots: int = 0
    faults: list[str] = field(default_factory=list)
    _compared: int = -1

    def __post_init__(self) -> None:
        self.hash = hashlib.sha256(b"paceline ledger\0" + self.name.encode()).digest()

    def fault(self, text: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(f"ledger {self.name}, record {self.seq}: {text}")

    # -- records --------------------------------------------------------------------------------------------------

    def follow(self, stored: Stored) -> None:
        """Fold what is new. A record that was read before must be there still, unchanged."""
        snapshot = stored.snapshot
        known = self.seq
        if snapshot is not None and snapshot.seq == known:
            self._compare(snapshot)
        for seq, data in stored.records:
            seal, body = data[:32], data[32:]
            if hashlib.sha256(body).digest() != seal:
                self.fault(f"record {seq} is damaged")
                return
            if seq == known and known and seal != self.hash:
                self.fault(f"record {seq} was read before, with another content")
            if seq <= known:
                continue
            number, epoch, at, _, previous = _HEADER.unpack_from(body)
            if number != seq or seq != self.seq + 1 or previous != self.hash:
                self.fault(f"record {seq} does not follow record {self.seq}")
                return
            self.seq, self.hash = seq, seal
            if self.epochs and epoch < max(self.epochs):
                self.fault(f"epoch {epoch} after {max(self.epochs)}")
            self.epochs.add(epoch)
            if at < self.at:
                self.fault("ledger time ran backwards")
            before = self.at
            for payload in _unpack(body[_HEADER.size :]):
                for event in _unpack(payload):
                    self._fold(event)
            if self.at < before:
                self.fault("ledger time ran backwards")
            if snapshot is not None and snapshot.seq == seq:
                self._compare(snapshot)
        if known and stored.records and stored.records[-1][0] < known:
            self.fault(f"record {known} was read before, and is gone")
        if known and not stored.records:
            self.fault(f"record {known} was read before, and the journal is empty")

    def _compare(self, snapshot: Snapshot) -> None:
        """The server's snapshot, against this count at the same record."""
        if self._compared == snapshot.seq:
            return
        self._compared = snapshot.seq
        self.snapshots += 1
        _, name, at, _, _, buckets, *_ = _unpack(snapshot.chunks[0])
        if name != self.name or at != self.at:
            self.fault("the snapshot is of another ledger or time")
        if [tuple(each[7:17]) for each in buckets] != [bucket.columns() for bucket in self.buckets]:
            self.fault("the snapshot's columns are not those of the journal")
        opened: set[str] = set()
        ended: dict[str, tuple[int, ...]] = {}
        for chunk in snapshot.chunks[1:]:
            tag, entries = _unpack(chunk)
            if tag == "open":
                opened.update(entry[0] for entry in entries)
            elif tag == "ended":
                ended.update({key: tuple(entry[5]) for key, entry in entries if entry[0] in (1, 2, 3)})
        if opened != {key for key, call in self.calls.items() if call.state == "open"}:
            self.fault("the snapshot's open reservations are not those of the journal")
        if not self.forgotten and ended != {
            key: call.charges for key, call in self.calls.items() if call.state != "open"
        }:
            self.fault("the snapshot's ended reservations are not those of the journal")

    # -- events ---------------------------------------------------------------------------------------------------

    def _fold(self, event: list[Any]) -> None:
        kind = event[0]
        self.kinds[kind] += 1
        handler = getattr(self, f"_on_{kind}", None)
        if handler is not None:
            handler(*event[1:])

    def _on_at(self, at: int) -> None:
        # Within a record it may go back: a grant that another owner made, and that was lost, counts from then.
        self.at = at

    def _on_bkt(
        self, pool: str, share: str, dimension: int, window: int, amount: int, burst: int, level: int, *_: object
    ) -> None:
        self.buckets.append(Bucket(pool, share, dimension, window, amount, burst, self.at, level, refilled=level))

    def _on_adv(self, number: int, refilled: int, carry: int, lost: int = 0) -> None:
        bucket = self.buckets[number]
        if lost:
            rate = bucket.amount - bucket.outside
            due = (bucket.carry + rate * (self.at - bucket.at)) // WINDOW_US.get(bucket.window, 1)
            if bucket.window not in WINDOW_US or refilled + lost != due:
                self.fault(f"{bucket.name()} refilled {refilled} and lost {lost}, due were {due}")
            bucket.lost += lost
        if bucket.due(self.at) != (refilled, carry):
            self.fault(f"{bucket.name()} refilled {refilled} (rest {carry}), due were {bucket.due(self.at)}")
        bucket.at = self.at
        bucket.level += refilled
        bucket.refilled += refilled
        bucket.carry = carry
        self._bounded(bucket)

    def _on_held(self, number: int, since: int, until: int, refilled: int, carry: int, lost: int) -> None:
        bucket = self.buckets[number]
        most = bucket.amount * (until - since) // WINDOW_US[bucket.window]
        if bucket.due(since) != (refilled, carry) or not bucket.at <= since <= until <= self.at or lost > most:
            self.fault(f"{bucket.name()} refilled {refilled} (rest {carry}) before an absence that cost {lost}")
        bucket.at = until
        bucket.level += refilled
        bucket.refilled += refilled
        bucket.carry = carry
        bucket.lost += lost
        self._bounded(bucket)

    def _on_lim(
        self,
        number: int,
        amount: int,
        burst: int,
        adjusted: int,
        *_: object,
    ) -> None:
        bucket = self.buckets[number]
        if amount < bucket.amount:
            bucket.outside = bucket.outside * amount // bucket.amount
        bucket.outside = min(bucket.outside, amount * 95 // 100)
        bucket.amount, bucket.burst, bucket.carry = amount, burst, 0
        bucket.level += adjusted
        bucket.adjusted += adjusted

    def _on_fix(self, number: int, adjusted: int) -> None:
        bucket = self.buckets[number]
        bucket.level += adjusted
        bucket.adjusted += adjusted
        if adjusted >= 0 and bucket.level >= bucket.burst:
            bucket.carry = 0
        self._bounded(bucket)

    def _on_out(self, number: int, rate: int) -> None:
        self.buckets[number].outside = rate

    def _on_ahead(self, number: int, amount: int) -> None:
        bucket = self.buckets[number]
        moved = bucket.foreseen - amount
        if moved > 0:
            moved = min(moved, max(0, bucket.burst - bucket.level))
        bucket.foreseen = amount
        self._on_fix(number, moved)

    def _on_grant(
        self,
        key: str,
        pool: str,
        shares: list[str],
        _tenant: str,
        _route: str,
        _priority: int,
        buckets: list[int],
        holds: list[int],
        _overs: list[int],
        _sizes: list[int],
        prices: list[int],
        *_: object,
    ) -> None:
        if key in self.calls or key in self.tombstones or key in self.together:
            self.fault(f"{key} was granted twice, or after it had been withdrawn")
            return
        self.calls[key] = Call(
            pool, tuple(shares), tuple(buckets), tuple(holds), tuple(holds), self.at, tuple(holds), tuple(prices)
        )
        for number, hold in zip(buckets, holds, strict=True):
            self._hold(self.buckets[number], hold)

    def _hold(self, bucket: Bucket, more: int) -> None:
        bucket.level -= more
        bucket.charged += more
        bucket.held += more
        bucket.granted += more

    def _on_bulk(self, key: str, keys: list[str]) -> None:
        if key in self.together or key in self.calls or len(set(keys)) != len(keys):
            self.fault(f"the bulk request {key} was granted twice")
        self.together[key] = tuple(keys)

    def _on_renew(
        self, key: str, _expires_at: int, _output: int | None, holds: list[int], _overs: list[int], *_: object
    ) -> None:
        call = self._open_call(key, "renewed")
        if call is None:
            return
        for number, old, new in zip(call.buckets, call.holds, holds, strict=True):
            if new < old:
                self.fault(f"{key} was renewed with a smaller hold")
            self._hold(self.buckets[number], new - old)
        call.holds = call.charges = tuple(holds)

    def _on_settle(
        self, key: str, charges: list[int], forfeits: list[int], _overs: list[int], cost: int, *_: object
    ) -> None:
        self._end(key, "settled", charges, forfeits, cost)

    def _on_exp(
        self, key: str, charges: list[int], forfeits: list[int], _overs: list[int], cost: int, *_: object
    ) -> None:
        self._end(key, "expired", charges, forfeits, cost)

    def _on_rel(self, key: str, forfeits: list[int], *_: object) -> None:
        self._end(key, "released", [0] * len(forfeits), forfeits, 0)

    def _open_call(self, key: str, what: str) -> Call | None:
        call = self.calls.get(key)
        if call is None or call.state != "open":
            self.fault(f"{key} was {what}, but is {'unknown' if call is None else call.state}")
            return None
        return call

    def _end(self, key: str, state: str, charges: list[int], forfeits: list[int], cost: int) -> None:
        call = self._open_call(key, state)
        if call is None:
            return
        call.state, call.cost = state, cost
        for number, hold, charge, forfeit in zip(call.buckets, call.holds, charges, forfeits, strict=True):
            bucket = self.buckets[number]
            bucket.held -= hold
            setattr(bucket, state, getattr(bucket, state) + hold)
            self._recharge(bucket, hold, charge, forfeit)
        call.charges = tuple(charges)

    def _recharge(self, bucket: Bucket, old: int, new: int, forfeit: int) -> None:
        if not 0 <= forfeit <= max(0, old - new):
            self.fault(f"{bucket.name()}: {forfeit} forfeited of {old - new}")
        bucket.charged += new - old
        bucket.level += old - new - forfeit
        bucket.refilled -= forfeit
        if new < old and bucket.level >= bucket.burst:
            bucket.carry = 0  # a full bucket saves nothing up
        self._bounded(bucket)

    def _on_late(
        self, key: str, charges: list[int], forfeits: list[int], _overs: list[int], cost: int, *_: object
    ) -> None:
        call = self.calls.get(key)
        if call is None or call.state not in ("expired", "released") or call.replaced:
            self.fault(f"{key} was replaced, but is {'unknown' if call is None else call.state}")
            return
        for number, old, new, forfeit in zip(call.buckets, call.charges, charges, forfeits, strict=True):
            self._recharge(self.buckets[number], old, new, forfeit)
        call.charges, call.cost, call.replaced = tuple(charges), cost, True

    def _on_book(
        self,
        key: str,
        pool: str,
        shares: list[str],
        buckets: list[int],
        charges: list[int],
        _overs: list[int],
        granted_at: int,
        cost: int,
        _made_at: int | None = None,
        absorbed: tuple[int, ...] = (),
        *_: object,
    ) -> None:
        if key and key in self.calls:
            self.fault(f"{key} was booked, but is {self.calls[key].state}")
        for number, charge, back in zip(buckets, charges, absorbed or [0] * len(buckets), strict=True):
            bucket = self.buckets[number]
            if not 0 <= back <= min(charge, bucket.lost):
                self.fault(f"{bucket.name()}: losses of {bucket.lost} made up for {back} of {charge}")
            bucket.lost -= back
            bucket.refilled += back
            bucket.level -= charge - back
            bucket.charged += charge
            bucket.granted += charge
            bucket.settled += charge
        if key:
            held = tuple(charges)
            self.calls[key] = Call(
                pool, tuple(shares), tuple(buckets), held, held, granted_at, state="booked", cost=cost
            )
        else:
            self.anonymous.append((tuple(buckets), tuple(charges), cost))

    def _on_tomb(self, key: str) -> None:
        if key in self.calls or key in self.tombstones:
            self.fault(f"{key} became a tombstone, but was known")
        self.tombstones.add(key)

    def _on_forget(self, count: int) -> None:
        self.forgotten += count

    def _bounded(self, bucket: Bucket) -> None:
        if bucket.level > bucket.burst:
            self.fault(f"{bucket.name()}: level {bucket.level} above the burst {bucket.burst}")

    # -- sums -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare the columns with the table of calls."""
        count = len(self.buckets)
        held, charged, granted, settled, released, expired = ([0] * count for _ in range(6))
        spend = next(
            (i for i, each in enumerate(self.buckets) if (each.pool, each.share, each.dimension) == ("", "", 7)), -1
        )
        cost = held_cost = 0
        by_state = {"settled": settled, "booked": settled, "released": released, "expired": expired, "open": held}
        for call in self.calls.values():
            column = by_state[call.state]
            for number, hold, charge in zip(call.buckets, call.holds, call.charges, strict=True):
                column[number] += hold
                granted[number] += hold
                charged[number] += charge
                if number == spend and call.state == "open":
                    held_cost += hold
            cost += call.cost
        for buckets, charges, its_cost in self.anonymous:
            for number, charge in zip(buckets, charges, strict=True):
                settled[number] += charge
                granted[number] += charge
                charged[number] += charge
            cost += its_cost
        for number, bucket in enumerate(self.buckets):
            counted = {
                "level = refilled - charged + adjusted": (
                    bucket.level,
                    bucket.refilled - bucket.charged + bucket.adjusted,
                ),
                "granted = settled + released + expired + held": (
                    bucket.granted,
                    bucket.settled + bucket.released + bucket.expired + bucket.held,
                ),
                "held": (bucket.held, held[number]),
                "charged": (bucket.charged, charged[number]),
                "granted": (bucket.granted, granted[number]),
                "settled": (bucket.settled, settled[number]),
                "released": (bucket.released, released[number]),
                "expired": (bucket.expired, expired[number]),
            }
            for what, (kept, recounted) in counted.items():
                if kept != recounted:
                    self.fault(f"{bucket.name()}: {what}: {kept} against {recounted}")
            self._bounded(bucket)
        if spend >= 0 and self.buckets[spend].charged != cost + held_cost:
            self.fault(f"spend: charged {self.buckets[spend].charged}, the calls cost {cost} and hold {held_cost}")
        for key, keys in self.together.items():
            if missing := [child for child in keys if child not in self.calls]:
                self.fault(f"the bulk grant {key} has {len(missing)} calls that were never granted")

    def own(self, call: Call, amounts: tuple[int, ...]) -> dict[int, int]:
        """The amounts by dimension in the pool's own limits and the account's spend, as answers state them."""
        return {
            self.buckets[number].dimension: amount
            for number, amount in zip(call.buckets, amounts, strict=True)
            if not self.buckets[number].share
        }

    def count(self, state: str) -> int:
        return sum(call.state == state for call in self.calls.values())
