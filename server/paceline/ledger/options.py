"""What an owner is made with, and what it shows: its bounds, its phases, its counters."""

from __future__ import annotations

from enum import Enum

import msgspec


class Phase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    REPLAYING = "replaying"
    """The engine failed: its last batch is being decided again, one operation at a time."""
    RECOVERING = "recovering"
    """The journal is away, or being read again."""
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"
    """Stopped for good by :attr:`Owner.failure`."""
    DEPOSED = "deposed"
    """Another process owns the ledger. This owner is not used again."""


class OwnerOptions(msgspec.Struct, frozen=True):
    """Bounds of an owner. Times in µs of the clock."""

    batch_operations: int = 256
    """Operations decided in one step, which is one turn of the event loop: about 25 µs each."""
    record_operations: int = 2_048
    """Operations decided ahead, into the record behind the one in flight. At most one batch more."""
    inbox_operations: int = 16_384
    """Operations waiting to be decided; more are told :class:`LedgerBusy`, Reserves at three quarters of it."""
    append_timeout_us: int = 3_000_000
    """An append that takes longer counts as failed."""
    backoff_first_us: int = 50_000
    backoff_most_us: int = 5_000_000
    """Between attempts to load the ledger again, doubling from the first to the most, until an append
    succeeds."""
    snapshot_events: int = 250_000
    snapshot_bytes: int = 64 * 1024 * 1024
    """A snapshot is written after so many events or journal bytes (at least twice the last snapshot's
    size)."""
    check_events: int = 100_000
    """A digest of the books is journalled after so many events; replay is checked against the newest."""
    dump_share: float = 0.2
    """The part of the event loop's time that a snapshot or digest may take."""
    idle_faults: int = 3
    """So many failures of the engine without an operation stop the ledger."""
    spacing_us: int = 2_500
    """Between the beginnings of two appends to a shared store: what comes sooner goes with the next one. Each costs the
    store and this process as much as some dozen operations; a caller who is alone waits for none."""
    gather_us: int = 150_000
    """For so long a new owner of a shared ledger lets the waiters of the one before come back before it serves any, so
    that they keep their places."""
    held_us: int = 5_000_000
    """A change of owner within this time was waited for by all callers: no call was made meanwhile without a grant."""
    unseen_us: int = 0
    """For how long callers may go on by themselves after that."""


LATENCY_BUCKETS = 28


class Statistics:
    """Plain counters since the start, for telemetry to read."""

    def __init__(self) -> None:
        self.operations = 0
        """Taken into a batch."""
        self.batches = 0
        self.answers = 0
        self.busy = 0
        """Refused with :class:`LedgerBusy`."""
        self.unavailable = 0
        """Answered with :class:`LedgerUnavailable`."""
        self.faults = 0
        """Answered with :class:`LedgerFault`."""
        self.appends = 0
        self.events = 0
        self.journal_bytes = 0
        self.append_us = 0
        """Sum of the time from handing a record to the journal to its acknowledgement."""
        self.append_us_histogram = [0] * LATENCY_BUCKETS
        """Entry ``i`` counts appends that took less than ``2**i`` µs, and not less than half of that."""
        self.append_failures = 0
        self.loads = 0
        """Times that the ledger was read from the journal, the first included."""
        self.load_us = 0
        """How long the last one took."""
        self.replayed_events = 0
        """Folded after the snapshot in the last one."""
        self.snapshots = 0
        self.snapshot_bytes = 0
        """Size of the last one."""
        self.last_error = ""
        """The last failure of the journal or the engine, in one line without contents of operations."""
