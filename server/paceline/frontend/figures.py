"""What a server counts, as telemetry wants it: copied on the event loop, when somebody reads the metrics."""

from __future__ import annotations

from collections.abc import Iterable

from paceline.engine.bucket import Bucket
from paceline.engine.engine import Engine
from paceline.engine.state import Pool, State
from paceline.engine.stats import WAIT_BOUNDS_US
from paceline.frontend import desk as kinds
from paceline.frontend.admin import Admin
from paceline.frontend.alerts import Alerts
from paceline.frontend.audit_export import AuditExport
from paceline.frontend.coordinator import Coordinator
from paceline.frontend.fleet import FleetSlot
from paceline.frontend.routing import Slot
from paceline.frontend.session import Sessions
from paceline.ledger.keeper import Keeper
from paceline.ledger.options import LATENCY_BUCKETS, Statistics
from paceline.telemetry import (
    AlertFigures,
    AuditFigures,
    Figures,
    FleetFigures,
    Histogram,
    JournalFigures,
    LedgerFigures,
    LimitFigures,
    RouteFigures,
    Traffic,
)

_OPERATIONS = {
    kinds.RESERVE: "reserve",
    kinds.COMMIT: "commit",
    kinds.RELEASE: "release",
    kinds.RENEW: "renew",
    kinds.OBSERVE: "observe",
}
_WAIT_BOUNDS = tuple(bound / 1e6 for bound in WAIT_BOUNDS_US)
_APPEND_BOUNDS = tuple((1 << power) / 1e6 for power in range(LATENCY_BUCKETS - 1))


def figures(
    slots: Iterable[Slot],
    traffic: Traffic,
    keeper: Keeper | None = None,
    alerts: Alerts | None = None,
    audit: AuditExport | None = None,
) -> Figures:
    """Everything, at this moment. ``keeper``: ledgers move between this process and others."""
    slots = list(slots)
    return Figures(
        # What others own, they show themselves.
        [_ledger(slot) for slot in slots if not slot.is_remote],
        traffic,
        [_route(slot, keeper) for slot in slots],
        None if keeper is None else _fleet(keeper, slots),
        AlertFigures() if alerts is None else _alerts(alerts),
        None if audit is None else AuditFigures(audit.file.written, audit.dropped),
    )


def traffic(coordinator: Coordinator, sessions: Sessions, admin: Admin) -> Traffic:
    """What came in."""
    tally = sessions.tally
    items = {(name, "OK"): tally.answered[number] for number, name in _OPERATIONS.items() if tally.answered[number]}
    failed = {(_OPERATIONS.get(number, "other"), status): count for (number, status), count in tally.failed.items()}
    return Traffic(
        requests={**coordinator.requests, **admin.requests},
        items=items | failed,
        sessions_opened=sessions.opened,
        sessions=len(sessions.running),
        watches=admin.watching,
    )


def _ledger(slot: Slot) -> LedgerFigures:
    owner, engine = slot.owner, slot.engine
    journal = _journal(owner.statistics)
    if engine is None:
        return LedgerFigures(slot.account, slot.ready, owner.waiting, journal=journal)
    state, stats, now = engine.state, engine.stats, owner.now()
    return LedgerFigures(
        name=slot.account,
        serving=slot.ready,
        unanswered=owner.waiting,
        open_reservations=len(state.open),
        journal=journal,
        grants=dict(stats.grants),
        denials=dict(stats.denials),
        would_deny=dict(stats.would_deny),
        would_wait=dict(stats.would_wait),
        settlements=dict(stats.settlements),
        expiries=dict(stats.expiries),
        refusals=dict(stats.refusals),
        corrections=dict(stats.corrections),
        waits={
            address: Histogram(_WAIT_BOUNDS, tuple(cells), stats.wait_sum_us[address] / 1e6)
            for address, cells in stats.waits.items()
        },
        waiting=_waiting(engine),
        pools={name: _state(pool, now) for name, pool in state.pools.items()},
        limits=[_limit(bucket, now) for bucket in _buckets(state)],
    )


def _route(slot: Slot, keeper: Keeper | None) -> RouteFigures:
    owner = slot.local
    journal = None if keeper is None else keeper.journal(slot.account)
    lease_age = None
    if journal is not None and journal.lease_age_us is not None:
        lease_age = journal.lease_age_us / 1e6
    role = "owner"
    if owner is None:
        role = "standby" if keeper is not None and slot.account in keeper.info.warm else "front_end"
    if not isinstance(slot, FleetSlot):
        epoch, pending = (0, 0) if owner is None else (owner.epoch, owner.waiting)
        return RouteFigures(slot.account, role, epoch, pending)
    return RouteFigures(
        name=slot.account,
        role=role,
        epoch=slot.epoch,
        pending=slot.pending,
        resent=slot.resent,
        shed=slot.shed,
        poisoned=slot.poisoned,
        lease_age=lease_age,
        renewals=0 if journal is None else journal.statistics.renewals,
    )


def _fleet(keeper: Keeper, slots: Iterable[Slot]) -> FleetFigures:
    counted = keeper.statistics
    reasserted = counted.reasserted
    for slot in slots:
        journal = keeper.journal(slot.account)
        if journal is not None:
            # The keeper counts those of owners that are gone.
            reasserted += journal.statistics.reasserted + journal.statistics.refounded
    changes = {
        "acquired": counted.acquisitions,
        "took_over": counted.take_overs,
        "handed_over": counted.hand_overs,
        "deposed": counted.deposed,
        "reasserted": reasserted,
    }
    return FleetFigures(len(keeper.nodes()), changes, counted.lost_records)


def _alerts(alerts: Alerts) -> AlertFigures:
    webhook = alerts.webhook
    if webhook is None:
        return AlertFigures(dict(alerts.counts))
    counts = webhook.counts
    posted = {"delivered": counts.delivered, "failed": counts.failed, "dropped": counts.dropped}
    return AlertFigures(dict(alerts.counts), posted, webhook.queued)


def _waiting(engine: Engine) -> dict[str, int]:
    """With a zero where nobody waits: a series that ends says nothing."""
    return dict.fromkeys(engine.state.pools, 0) | engine.waiting()


def _buckets(state: State) -> Iterable[Bucket]:
    """Those of pools and of the account. Shares have no bound."""
    for pool in state.pools.values():
        for number in pool.buckets:
            yield state.buckets[number]
    for (pool_name, share, *_), number in state.addresses.items():
        if not pool_name and not share:
            yield state.buckets[number]


def _state(pool: Pool, now: int) -> str:
    if pool.paused:
        return "paused"
    if pool.blocked_until > now:
        return "closed" if pool.closed else "blocked"
    return "open"


def _limit(bucket: Bucket, now: int) -> LimitFigures:
    refilled, _ = bucket.refill(max(now, bucket.at))
    return LimitFigures(
        pool=bucket.pool,
        dimension=bucket.dimension,
        window=bucket.window,
        limit=bucket.amount,
        burst=bucket.burst,
        level=bucket.level + refilled,
        held=bucket.held,
        granted=bucket.granted,
        charged=bucket.charged,
        adjusted=bucket.adjusted,
    )


def _journal(statistics: Statistics) -> JournalFigures:
    return JournalFigures(
        operations=statistics.operations,
        batches=statistics.batches,
        busy=statistics.busy,
        unavailable=statistics.unavailable,
        faults=statistics.faults,
        events=statistics.events,
        written_bytes=statistics.journal_bytes,
        append_failures=statistics.append_failures,
        append_latency=Histogram(_APPEND_BOUNDS, tuple(statistics.append_us_histogram), statistics.append_us / 1e6),
        loads=statistics.loads,
        load_seconds=statistics.load_us / 1e6,
        snapshots=statistics.snapshots,
        snapshot_bytes=statistics.snapshot_bytes,
    )
