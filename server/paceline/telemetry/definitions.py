"""The metrics: one table, from which the instruments and ``docs/metrics.md`` are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TypeVar

from paceline.engine.dimensions import UNLIMITED, Dimension
from paceline.telemetry.figures import (
    ALERT_KINDS,
    OWNER_CHANGES,
    POOL_STATES,
    POSTED,
    ROLES,
    Figures,
    Histogram,
    LedgerFigures,
    LimitFigures,
    RouteFigures,
)

NANO = 1_000_000_000

Labels = tuple[str, ...]
Row = tuple[Labels, float]
HistogramRow = tuple[Labels, Histogram]
E = TypeVar("E", bound=IntEnum)


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its OpenTelemetry name and unit, the names of its labels, and where its values come from."""

    name: str
    unit: str
    description: str
    labels: Labels
    read: Callable[[Figures], Iterable[Row]]
    kind: Kind = Kind.COUNTER

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        parts = [self.name.replace(".", "_")]
        if self.unit in _UNIT_SUFFIXES:
            parts.append(_UNIT_SUFFIXES[self.unit])
        if self.kind is Kind.COUNTER:
            parts.append("total")
        return "_".join(parts)


@dataclass(frozen=True, slots=True)
class HistogramMetric:
    """One histogram. Its cells were counted elsewhere."""

    name: str
    unit: str
    description: str
    labels: Labels
    read: Callable[[Figures], Iterable[HistogramRow]]
    kind: Kind = Kind.HISTOGRAM

    @property
    def exported(self) -> str:
        """The name that Prometheus sees, before ``_bucket``, ``_count`` and ``_sum``."""
        return f"{self.name.replace('.', '_')}_{_UNIT_SUFFIXES[self.unit]}"


_UNIT_SUFFIXES = {"s": "seconds", "By": "bytes"}


def word(value: IntEnum) -> str:
    """An enum's value as a label."""
    return value.name.lower()


def amount(dimension: Dimension, value: int) -> float:
    """In the unit that is shown: money in US dollars instead of nano-dollars."""
    return value / NANO if dimension is Dimension.SPEND else value


# -- where the values come from ---------------------------------------------------------------------------------------


def _by_pool(pick: Callable[[LedgerFigures], Mapping[str, int]]) -> Callable[[Figures], Iterator[Row]]:
    def read(figures: Figures) -> Iterator[Row]:
        for ledger in figures.ledgers:
            for pool, count in pick(ledger).items():
                yield (pool,), count

    return read


def _by_pool_and(pick: Callable[[LedgerFigures], Mapping[tuple[str, E], int]]) -> Callable[[Figures], Iterator[Row]]:
    def read(figures: Figures) -> Iterator[Row]:
        for ledger in figures.ledgers:
            for (pool, value), count in pick(ledger).items():
                yield (pool, word(value)), count

    return read


def _of_ledger(pick: Callable[[LedgerFigures], float]) -> Callable[[Figures], Iterator[Row]]:
    def read(figures: Figures) -> Iterator[Row]:
        for ledger in figures.ledgers:
            yield (ledger.name,), pick(ledger)

    return read


def _of_limit(pick: Callable[[LimitFigures], int], bounded: bool = False) -> Callable[[Figures], Iterator[Row]]:
    """By pool, dimension and window. ``bounded``: only where there is a limit, not where things are only counted."""

    def read(figures: Figures) -> Iterator[Row]:
        for ledger in figures.ledgers:
            for limit in ledger.limits:
                if limit.pool and not (bounded and limit.limit >= UNLIMITED):
                    dimension = limit.dimension
                    yield (limit.pool, word(dimension), word(limit.window)), amount(dimension, pick(limit))

    return read


def _of_spend(pick: Callable[[LimitFigures], int], bounded: bool = False) -> Callable[[Figures], Iterator[Row]]:
    def read(figures: Figures) -> Iterator[Row]:
        for ledger in figures.ledgers:
            for limit in ledger.limits:
                if not limit.pool and not (bounded and limit.limit >= UNLIMITED):
                    yield (ledger.name,), pick(limit) / NANO

    return read


def _pool_states(figures: Figures) -> Iterator[Row]:
    for ledger in figures.ledgers:
        for pool, now in ledger.pools.items():
            for state in POOL_STATES:
                yield (pool, state), float(state == now)


def _corrections(figures: Figures) -> Iterator[Row]:
    for ledger in figures.ledgers:
        for (pool, number), total in ledger.corrections.items():
            dimension = Dimension(number)
            yield (pool, word(dimension)), amount(dimension, total)


def _rejections(figures: Figures) -> Iterator[Row]:
    for ledger in figures.ledgers:
        journal = ledger.journal
        yield (ledger.name, "busy"), journal.busy
        yield (ledger.name, "unavailable"), journal.unavailable
        yield (ledger.name, "fault"), journal.faults


def _waits(figures: Figures) -> Iterator[HistogramRow]:
    for ledger in figures.ledgers:
        for (pool, priority), histogram in ledger.waits.items():
            yield (pool, word(priority)), histogram


def _appends(figures: Figures) -> Iterator[HistogramRow]:
    for ledger in figures.ledgers:
        if ledger.journal.append_latency is not None:
            yield (ledger.name,), ledger.journal.append_latency


def _of_route(pick: Callable[[RouteFigures], float | None]) -> Callable[[Figures], Iterator[Row]]:
    def read(figures: Figures) -> Iterator[Row]:
        for route in figures.routes:
            found = pick(route)
            if found is not None:
                yield (route.name,), found

    return read


def _roles(figures: Figures) -> Iterator[Row]:
    for route in figures.routes:
        for role in ROLES:
            yield (route.name, role), float(role == route.role)


def _owner_changes(figures: Figures) -> Iterator[Row]:
    if figures.fleet is not None:
        for change in OWNER_CHANGES:
            yield (change,), figures.fleet.changes.get(change, 0)


# -- the table --------------------------------------------------------------------------------------------------------

_LIMIT_LABELS = ("pool", "dimension", "window")

METRICS: tuple[Metric | HistogramMetric, ...] = (
    # decisions
    Metric(
        "paceline.grants",
        "{call}",
        "Calls that were granted.",
        ("pool", "priority"),
        _by_pool_and(lambda ledger: ledger.grants),
    ),
    Metric(
        "paceline.denials",
        "{call}",
        "Reservations that were denied, by reason.",
        ("pool", "reason"),
        _by_pool_and(lambda ledger: ledger.denials),
    ),
    Metric(
        "paceline.would.deny",
        "{call}",
        "In observe mode: calls that enforce mode would have denied, by reason.",
        ("pool", "reason"),
        _by_pool_and(lambda ledger: ledger.would_deny),
    ),
    Metric(
        "paceline.would.wait",
        "{call}",
        "In observe mode: calls that would have waited in enforce mode, and then been granted.",
        ("pool",),
        _by_pool(lambda ledger: ledger.would_wait),
    ),
    HistogramMetric(
        "paceline.wait.duration",
        "s",
        "How long granted calls had waited for their turn.",
        ("pool", "priority"),
        _waits,
    ),
    Metric(
        "paceline.waiting",
        "{call}",
        "Calls that wait for their turn now.",
        ("pool",),
        _by_pool(lambda ledger: ledger.waiting),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.settlements",
        "{call}",
        "Calls whose outcome was reported.",
        ("pool",),
        _by_pool(lambda ledger: ledger.settlements),
    ),
    Metric(
        "paceline.expiries",
        "{call}",
        "Holds that ended at their expiry, without an outcome.",
        ("pool",),
        _by_pool(lambda ledger: ledger.expiries),
    ),
    Metric(
        "paceline.upstream.refusals",
        "{call}",
        "Calls that the upstream refused, as callers reported it, by cause.",
        ("pool", "cause"),
        _by_pool_and(lambda ledger: ledger.refusals),
    ),
    # limits
    Metric(
        "paceline.pool.limit",
        "{unit}",
        "The limit in force, per window. Absent where there is none.",
        _LIMIT_LABELS,
        _of_limit(lambda limit: limit.limit, bounded=True),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.pool.burst",
        "{unit}",
        "The largest level. Absent where there is no limit.",
        _LIMIT_LABELS,
        _of_limit(lambda limit: limit.burst, bounded=True),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.pool.level",
        "{unit}",
        "What is left now, net of open holds; below zero: debt. Absent where there is no limit.",
        _LIMIT_LABELS,
        _of_limit(lambda limit: limit.level, bounded=True),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.pool.held",
        "{unit}",
        "The sum of the open holds.",
        _LIMIT_LABELS,
        _of_limit(lambda limit: limit.held),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.pool.granted",
        "{unit}",
        "The sum of all holds that were granted, since the ledger began.",
        _LIMIT_LABELS,
        _of_limit(lambda limit: limit.granted),
    ),
    Metric(
        "paceline.pool.charged",
        "{unit}",
        "The sum of all charges since the ledger began, open holds included. Falls when a call used less than it held.",
        _LIMIT_LABELS,
        _of_limit(lambda limit: limit.charged),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.pool.adjusted",
        "{unit}",
        "What readings of response headers have corrected in all, with the sign of the change of the level.",
        _LIMIT_LABELS,
        _of_limit(lambda limit: limit.adjusted),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.pool.corrections",
        "{unit}",
        "The same corrections without their signs: how far the books and the upstream have been apart.",
        ("pool", "dimension"),
        _corrections,
    ),
    Metric(
        "paceline.pool.state",
        "1",
        "1 for the state that the pool is in, 0 for the others.",
        ("pool", "state"),
        _pool_states,
        Kind.GAUGE,
    ),
    # money
    Metric(
        "paceline.spend.limit",
        "{USD}",
        "The account's spend cap for the month. Absent where there is none.",
        ("ledger",),
        _of_spend(lambda limit: limit.limit, bounded=True),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.spend.left",
        "{USD}",
        "What is left of the cap this month, net of open holds. Absent where there is none.",
        ("ledger",),
        _of_spend(lambda limit: limit.level, bounded=True),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.spend.held",
        "{USD}",
        "What open holds may still cost.",
        ("ledger",),
        _of_spend(lambda limit: limit.held),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.spend.charged",
        "{USD}",
        "What all calls have cost since the ledger began, open holds included.",
        ("ledger",),
        _of_spend(lambda limit: limit.charged),
        Kind.GAUGE,
    ),
    # ledgers and their journals
    Metric(
        "paceline.ledger.serving",
        "1",
        "1 while the ledger decides here, else 0.",
        ("ledger",),
        _of_ledger(lambda ledger: float(ledger.serving)),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.ledger.reservations",
        "{reservation}",
        "Open reservations.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.open_reservations),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.ledger.unanswered",
        "{operation}",
        "Operations without an answer now, calls that wait included.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.unanswered),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.ledger.operations",
        "{operation}",
        "Operations that were decided.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.operations),
    ),
    Metric(
        "paceline.ledger.batches",
        "{batch}",
        "Batches in which they were decided.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.batches),
    ),
    Metric(
        "paceline.ledger.rejections",
        "{operation}",
        "Operations without a decision: too many at once, the journal away, or a fault of the engine.",
        ("ledger", "reason"),
        _rejections,
    ),
    Metric(
        "paceline.ledger.loads",
        "{load}",
        "Times that the ledger was read from its journal.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.loads),
    ),
    Metric(
        "paceline.ledger.load.duration",
        "s",
        "How long the last of them took.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.load_seconds),
        Kind.GAUGE,
    ),
    HistogramMetric(
        "paceline.journal.append.duration",
        "s",
        "From handing a record to the journal to its acknowledgement.",
        ("ledger",),
        _appends,
    ),
    Metric(
        "paceline.journal.append.failures",
        "{append}",
        "Appends that failed.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.append_failures),
    ),
    Metric(
        "paceline.journal.events",
        "{event}",
        "Events that were journalled.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.events),
    ),
    Metric(
        "paceline.journal.written",
        "By",
        "Bytes that were journalled.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.written_bytes),
    ),
    Metric(
        "paceline.journal.snapshots",
        "{snapshot}",
        "Snapshots that were written.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.snapshots),
    ),
    Metric(
        "paceline.journal.snapshot.size",
        "By",
        "Size of the last of them.",
        ("ledger",),
        _of_ledger(lambda ledger: ledger.journal.snapshot_bytes),
        Kind.GAUGE,
    ),
    # owners and the ways to them
    Metric(
        "paceline.ledger.role",
        "1",
        "1 for the part that this process has: it owns the ledger, is ready to own it, or only passes operations on.",
        ("ledger", "role"),
        _roles,
        Kind.GAUGE,
    ),
    Metric(
        "paceline.ledger.epoch",
        "{epoch}",
        "Number of the ownership that this process knows of. It grows with every new owner.",
        ("ledger",),
        _of_route(lambda route: route.epoch),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.lease.age",
        "s",
        "Since the store confirmed the lease. Above the lease, another process may own the ledger. Absent where there "
        "is none.",
        ("ledger",),
        _of_route(lambda route: route.lease_age),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.lease.renewals",
        "{renewal}",
        "Renewals of the lease without a record, by the owner of now. Each is a round trip to the store.",
        ("ledger",),
        _of_route(lambda route: None if route.lease_age is None else route.renewals),
    ),
    Metric(
        "paceline.ledger.pending",
        "{operation}",
        "Operations that came to this process and have no answer yet, calls that wait included.",
        ("ledger",),
        _of_route(lambda route: route.pending),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.ledger.resent",
        "{operation}",
        "Operations that this process sent again, since an owner or the way to it was lost.",
        ("ledger",),
        _of_route(lambda route: route.resent),
    ),
    Metric(
        "paceline.ledger.shed",
        "{operation}",
        "Reservations that this process refused, because too many waited here for the owner.",
        ("ledger",),
        _of_route(lambda route: route.shed),
    ),
    Metric(
        "paceline.ledger.poisoned",
        "{operation}",
        "Operations that this process gave up, since two owners ended while they were with them.",
        ("ledger",),
        _of_route(lambda route: route.poisoned),
    ),
    Metric(
        "paceline.owner.changes",
        "{change}",
        "Changes of owner that this process took part in. `acquired` counts those that it `took_over` too.",
        ("change",),
        _owner_changes,
    ),
    Metric(
        "paceline.store.lost",
        "{record}",
        "Acknowledged records that the store had lost to another owner, and that this process told that owner.",
        (),
        lambda figures: () if figures.fleet is None else (((), figures.fleet.lost_records),),
    ),
    Metric(
        "paceline.nodes",
        "{server}",
        "Servers that share the store and live, as this one sees them.",
        (),
        lambda figures: () if figures.fleet is None else (((), figures.fleet.nodes),),
        Kind.GAUGE,
    ),
    # alerts
    Metric(
        "paceline.alerts",
        "{alert}",
        "Alerts that were told: a threshold or a cap was reached, or the upstream moved a limit.",
        ("ledger", "kind"),
        lambda figures: figures.alerts.told.items(),
    ),
    Metric(
        "paceline.webhook.alerts",
        "{alert}",
        "Alerts by what became of them at the webhook; dropped are those for which the queue had no place. Absent "
        "without a webhook.",
        ("result",),
        lambda figures: (((result,), count) for result, count in figures.alerts.posted.items()),
    ),
    Metric(
        "paceline.webhook.queued",
        "{alert}",
        "Alerts that wait to be posted. Absent without a webhook.",
        (),
        lambda figures: (((), figures.alerts.queued),) if figures.alerts.posted else (),
        Kind.GAUGE,
    ),
    # audit
    Metric(
        "paceline.audit.decisions",
        "{decision}",
        "Decisions by what became of them in the files of the audit; dropped are those that the disk did not take in "
        "time. Absent without such files.",
        ("written",),
        lambda figures: (
            () if figures.audit is None else ((("yes",), figures.audit.written), (("dropped",), figures.audit.dropped))
        ),
    ),
    # the front end
    Metric(
        "paceline.requests",
        "{request}",
        "Unary calls that ended, by method and gRPC status.",
        ("rpc", "status"),
        lambda figures: figures.traffic.requests.items(),
    ),
    Metric(
        "paceline.session.items",
        "{item}",
        "Items of sessions that were answered, by operation and gRPC status.",
        ("operation", "status"),
        lambda figures: figures.traffic.items.items(),
    ),
    Metric(
        "paceline.session.opened",
        "{session}",
        "Sessions that were opened.",
        (),
        lambda figures: (((), figures.traffic.sessions_opened),),
    ),
    Metric(
        "paceline.sessions",
        "{session}",
        "Sessions that are open now.",
        (),
        lambda figures: (((), figures.traffic.sessions),),
        Kind.GAUGE,
    ),
    Metric(
        "paceline.watches",
        "{watch}",
        "Watch streams that are open now.",
        (),
        lambda figures: (((), figures.traffic.watches),),
        Kind.GAUGE,
    ),
)

LABELS = {
    "pool": "the pool, up to the bound below",
    "ledger": "the account's ledger; at most 64",
    "priority": "interactive, standard, batch",
    "reason": "of a denial: that of `DenialReason`; of a rejection: busy, unavailable, fault",
    "role": ", ".join(ROLES),
    "change": ", ".join(OWNER_CHANGES),
    "cause": "budget, overload, spend, ramp, concurrency, no_quota, other",
    "dimension": "requests, input_tokens, output_tokens, tokens, concurrency, queued_requests, spend",
    "window": "minute, day, month, or none for a gauge",
    "state": ", ".join(POOL_STATES),
    "rpc": "a method of the contract",
    "operation": "reserve, commit, release, renew, observe",
    "status": "a gRPC status, like OK or UNAVAILABLE",
    "kind": ", ".join(ALERT_KINDS),
    "result": ", ".join(POSTED),
    "written": "yes, dropped",
}
"""What each label says. Tenants, routes, shares and ids are never labels: there is no bound to them."""
