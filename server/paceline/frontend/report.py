"""The counts of :mod:`paceline.engine.hindsight` as AdminService shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from paceline.engine.hindsight import HINDSIGHT_BOUNDS_US, Fate, Row, Upstream
from paceline.engine.operations import Mode
from paceline.frontend.replies import REASONS
from paceline.frontend.routing import Slot
from paceline.frontend.view import timestamp
from paceline_client.stubs import v1 as pb

_FATES = {
    Fate.AT_ONCE: pb.DECISION_AT_ONCE,
    Fate.WAITED: pb.DECISION_WAITED,
    Fate.DENIED: pb.DECISION_DENIED,
    Fate.UNKNOWN: pb.DECISION_UNKNOWN,
}
_MODES = {Mode.ENFORCE: pb.MODE_ENFORCE, Mode.OBSERVE: pb.MODE_OBSERVE, None: pb.MODE_UNSPECIFIED}

Key = tuple[str, str, bool, str, int]
"""Ledger, pool, whether it is that of the other tenants, tenant, mode."""


def keys(slots: Iterable[Slot], pool: str, tenant: str, by_tenant: bool) -> dict[Key, list[Row]]:
    """The rows that belong together, in the order of the reports."""
    found: dict[Key, list[Row]] = {}
    for slot in slots:
        if slot.engine is None:
            continue
        for where, who, mode, row in slot.engine.stats.hindsight.rows():
            if (pool and where != pool) or (tenant and who != tenant):
                continue
            name, others = (tenant, False) if not by_tenant else (who or "", who is None)
            found.setdefault((slot.account, where, others, name, int(_MODES[mode])), []).append(row)
    return dict(sorted(found.items()))


def report(slot: Slot, key: Key, rows: list[Row]) -> pb.Report:
    """One report, of several tenants or of one."""
    ledger, pool, others, tenant, mode = key
    message = pb.Report(ledger=ledger, pool=pool, tenant=tenant, other_tenants=others, mode=pb.Mode.ValueType(mode))
    engine = slot.engine
    since = None if engine is None else engine.stats.hindsight.since
    if since is not None:
        message.start_time.CopyFrom(timestamp(since))
    message.decisions.extend(_decisions(rows))
    _denials(message, rows)
    _waits(message, rows)
    return message


def _decisions(rows: list[Row]) -> Iterator[pb.DecisionReport]:
    for fate in Fate:
        counts = [sum(row.outcomes[fate][upstream] for row in rows) for upstream in Upstream]
        calls = sum(row.decided[fate] for row in rows)
        if calls or any(counts):
            yield pb.DecisionReport(
                decision=_FATES[fate],
                calls=calls,
                accepted=counts[Upstream.ACCEPTED],
                refused=counts[Upstream.REFUSED],
                overloaded=counts[Upstream.OVERLOADED],
                failed=counts[Upstream.FAILED],
                unknown=counts[Upstream.UNKNOWN],
            )


def _denials(message: pb.Report, rows: list[Row]) -> None:
    found: dict[tuple[int, int], int] = {}
    for row in rows:
        for (reason, dimension), count in row.denials.items():
            why = int(REASONS[reason]), 0 if dimension is None else int(dimension)
            found[why] = found.get(why, 0) + count
    for (reason_number, number), count in sorted(found.items(), key=lambda each: (-each[1], each[0])):
        message.denials.add(
            reason=pb.DenialReason.ValueType(reason_number), dimension=pb.Dimension.ValueType(number), calls=count
        )


def _waits(message: pb.Report, rows: list[Row]) -> None:
    for place in range(len(HINDSIGHT_BOUNDS_US) + 1):
        count = sum(row.waits[place] for row in rows)
        if count:
            cell = message.waits.cells.add(calls=count)
            if place < len(HINDSIGHT_BOUNDS_US):
                cell.up_to.FromMicroseconds(HINDSIGHT_BOUNDS_US[place])
    if message.HasField("waits"):
        message.waits.total.FromMicroseconds(sum(row.wait_sum_us for row in rows))
        message.waits.longest.FromMicroseconds(max(row.worst_wait_us for row in rows))
