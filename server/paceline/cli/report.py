"""``paceline report``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import typer
from google.protobuf.duration_pb2 import Duration

from paceline.cli.console import say, show, table
from paceline.cli.listing import pages, show_each
from paceline.cli.remote import DEFAULT_ADDRESS, Address, AsJson, Seconds, TokenFile, connect
from paceline.cli.words import dimension_word, enum_word, span
from paceline_client.stubs import v1 as pb

_TITLES: Final = {
    pb.MODE_OBSERVE: "observed: every call was made; what Paceline would have done with it",
    pb.MODE_ENFORCE: "enforced: what Paceline did",
    pb.MODE_UNSPECIFIED: "made without a decision that is still known",
}
_WOULD: Final = {
    pb.DECISION_AT_ONCE: "gone at once",
    pb.DECISION_WAITED: "waited",
    pb.DECISION_DENIED: "been denied",
    pb.DECISION_UNKNOWN: "not known",
}
_DID: Final = _WOULD | {pb.DECISION_AT_ONCE: "went at once", pb.DECISION_DENIED: "were denied"}
_COLUMNS: Final = ("calls", "decided", "accepted", "refused", "overloaded", "failed", "unknown")


def report(
    ledger: Annotated[str, typer.Option(help="Only pools of this ledger. Empty: of all.")] = "",
    pool: Annotated[str, typer.Option(help="Only this pool. Empty: all.")] = "",
    tenant: Annotated[str, typer.Option(help="Only calls of this tenant. Empty: of all.")] = "",
    by_tenant: Annotated[bool, typer.Option("--by-tenant", help="A report for each tenant.")] = False,
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Annotated[str | None, typer.Option(envvar="PACELINE_TOKEN", hidden=True)] = None,
    timeout: Seconds = 10.0,
) -> None:
    """Compare what was decided, or in observe mode would have been, with what the upstream refused."""
    request = pb.GetReportRequest(ledger=ledger, pool=pool, tenant=tenant, by_tenant=by_tenant)
    with connect(address, token_file, token) as remote:
        method = pb.AdminServiceStub(remote.channel).GetReport
        found = [each for page in pages(remote, method, request, timeout) for each in page.reports]
    show_each(found, as_json, "no calls yet", _show)


def _show(found: pb.Report) -> None:
    whose = "other tenants" if found.other_tenants else f"tenant {found.tenant}" if found.tenant else ""
    since = found.start_time.ToDatetime().isoformat(" ", "seconds")
    say(f"{' · '.join(filter(None, (found.pool, whose)))} · since {since} UTC")
    say(f"  {_TITLES.get(found.mode, 'of a mode not known here')}")
    words = _WOULD if found.mode == pb.MODE_OBSERVE else _DID
    content = table(*_COLUMNS, right=_COLUMNS[1:])
    for each in found.decisions:
        content.add_row("  " + words.get(each.decision, str(each.decision)), *_counts(each))
    show(content)
    for line in _lines(found):
        say(f"  {line}")


def _counts(each: pb.DecisionReport) -> Iterator[str]:
    for count in (each.calls, each.accepted, each.refused, each.overloaded, each.failed, each.unknown):
        yield f"{count:,}"


def _lines(found: pb.Report) -> Iterator[str]:
    """What the figures mean."""
    observed = found.mode == pb.MODE_OBSERVE
    if found.waits.cells:
        waits, would = found.waits, "would have been" if observed else "were"
        middle, most = (quantile(waits, part) for part in (0.5, 0.99))
        yield f"waits {would}: p50 up to {middle}, p99 up to {most}, longest {span(waits.longest)}"
    for denial in found.denials:
        reason = enum_word(pb.DenialReason, "DENIAL_REASON_", denial.reason)
        limit = f" ({dimension_word(denial.dimension)})" if denial.dimension else ""
        yield f"{'would have been denied' if observed else 'denied'}: {denial.calls:,} for {reason}{limit}"
    for what, name in (("refused", "refusals by the upstream"), ("overloaded", "overloads of the upstream")):
        total, held, passed = comparison(found, what)
        if not total:
            yield f"no {name}"
        elif observed:
            yield f"of {total:,} {name}, {held:,} were calls that Paceline would have held back;"
            yield f"  {passed:,} it would have let through"
        elif found.mode == pb.MODE_ENFORCE:
            yield f"{total:,} {name}, of calls that Paceline let through"


def comparison(found: pb.Report, what: str) -> tuple[int, int, int]:
    """Of calls that ended so upstream: all, those that would have waited or been denied, and those that would not."""
    counts = {each.decision: int(getattr(each, what)) for each in found.decisions}
    held = counts.get(pb.DECISION_WAITED, 0) + counts.get(pb.DECISION_DENIED, 0)
    return sum(counts.values()), held, counts.get(pb.DECISION_AT_ONCE, 0)


def quantile(waits: pb.WaitReport, part: float) -> str:
    """An upper bound of a quantile: the end of the cell in which it lies, or the longest wait, if that is shorter."""
    left = part * sum(cell.calls for cell in waits.cells)
    for cell in waits.cells:
        left -= cell.calls
        if left <= 0:
            if cell.HasField("up_to") and _us(cell.up_to) < _us(waits.longest):
                return span(cell.up_to)
            break
    return span(waits.longest)


def _us(duration: Duration) -> int:
    return duration.seconds * 1_000_000 + duration.nanos // 1_000
