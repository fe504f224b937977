"""What the metrics are made of: plain figures of one moment, which whoever owns the counters fills in.

Telemetry knows neither the ledgers nor the front end. The server hands it a function that copies what it counts into
these types; that function runs on the server's event loop, and only when somebody reads the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.engine.answers import Reason
from paceline.engine.dimensions import Dimension, Window
from paceline.engine.operations import Priority, Refusal

PoolState = str
"""One of :data:`POOL_STATES`."""
POOL_STATES: tuple[PoolState, ...] = ("open", "blocked", "closed", "paused")
Role = str
"""One of :data:`ROLES`."""
ROLES: tuple[Role, ...] = ("owner", "standby", "front_end")
ALERT_KINDS = ("threshold", "cap_reached", "limit_moved")
POSTED = ("delivered", "failed", "dropped")
OWNER_CHANGES = ("acquired", "took_over", "handed_over", "deposed", "reasserted")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in cells between rising bounds, one more cell than bounds, and the sum of what was counted. Seconds."""

    bounds: Sequence[float]
    cells: Sequence[int]
    sum: float


@dataclass(frozen=True, slots=True)
class LimitFigures:
    """One dimension of a pool, or of the account: amounts as :class:`~paceline.engine.bucket.Bucket` has them."""

    pool: str
    """Empty: the account's spend."""
    dimension: Dimension
    window: Window
    limit: int
    burst: int
    level: int
    """Refilled to the moment of the figures."""
    held: int
    granted: int
    charged: int
    adjusted: int


@dataclass(frozen=True, slots=True)
class JournalFigures:
    """What the owner of a ledger counted since its start."""

    operations: int = 0
    batches: int = 0
    busy: int = 0
    unavailable: int = 0
    faults: int = 0
    events: int = 0
    written_bytes: int = 0
    append_failures: int = 0
    append_latency: Histogram | None = None
    loads: int = 0
    load_seconds: float = 0.0
    snapshots: int = 0
    snapshot_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LedgerFigures:
    """One ledger: the engine's counters, its limits and its journal."""

    name: str
    serving: bool
    unanswered: int = 0
    open_reservations: int = 0
    journal: JournalFigures = JournalFigures()
    grants: Mapping[tuple[str, Priority], int] = field(default_factory=dict)
    denials: Mapping[tuple[str, Reason], int] = field(default_factory=dict)
    would_deny: Mapping[tuple[str, Reason], int] = field(default_factory=dict)
    would_wait: Mapping[str, int] = field(default_factory=dict)
    settlements: Mapping[str, int] = field(default_factory=dict)
    expiries: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[tuple[str, Refusal], int] = field(default_factory=dict)
    corrections: Mapping[tuple[str, int], int] = field(default_factory=dict)
    waits: Mapping[tuple[str, Priority], Histogram] = field(default_factory=dict)
    waiting: Mapping[str, int] = field(default_factory=dict)
    pools: Mapping[str, PoolState] = field(default_factory=dict)
    limits: Sequence[LimitFigures] = ()
    """Of pools and of the account, not of shares."""


@dataclass(frozen=True, slots=True)
class RouteFigures:
    """One ledger as this process sees it, whoever owns it."""

    name: str
    role: Role
    epoch: int = 0
    pending: int = 0
    """Operations that came here and have no answer yet."""
    resent: int = 0
    shed: int = 0
    poisoned: int = 0
    lease_age: float | None = None
    """Seconds since the store confirmed the lease; ``None``: not owned here, or without a lease."""
    renewals: int = 0


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """What a process among others counted since its start."""

    nodes: int = 0
    """Processes that live, this one included."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """By one of :data:`OWNER_CHANGES`."""
    lost_records: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the front end counted."""

    requests: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Unary calls that ended, by method and status."""
    items: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Items of sessions that were answered, by operation and status."""
    sessions_opened: int = 0
    sessions: int = 0
    """Open now."""
    watches: int = 0
    """Open now."""


@dataclass(frozen=True, slots=True)
class AlertFigures:
    """Alerts of the ledgers that are owned here, since the start of the process."""

    told: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """By ledger and kind."""
    posted: Mapping[str, int] = field(default_factory=dict)
    """By one of :data:`POSTED`. Empty: there is no webhook."""
    queued: int = 0


@dataclass(frozen=True, slots=True)
class AuditFigures:
    """Decisions for the files of the audit, since the start of the process."""

    written: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything, at one moment."""

    ledgers: Sequence[LedgerFigures] = ()
    """Those that are owned here."""
    traffic: Traffic = field(default_factory=Traffic)
    routes: Sequence[RouteFigures] = ()
    fleet: FleetFigures | None = None
    """``None``: no other process owns ledgers of this store."""
    alerts: AlertFigures = field(default_factory=AlertFigures)
    audit: AuditFigures | None = None
    """``None``: no file is configured."""
