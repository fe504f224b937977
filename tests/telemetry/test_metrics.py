"""The metrics as Prometheus reads them: from a real endpoint, through the parser of its client."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from paceline.engine.answers import Reason
from paceline.engine.dimensions import UNLIMITED, Dimension, Window
from paceline.engine.operations import Priority, Refusal
from paceline.telemetry import (
    AlertFigures,
    AuditFigures,
    Endpoint,
    Figures,
    FleetFigures,
    Histogram,
    JournalFigures,
    LedgerFigures,
    LimitFigures,
    RouteFigures,
    Traffic,
)
from paceline.telemetry.definitions import LABELS, METRICS
from paceline.telemetry.document import markdown
from paceline.telemetry.endpoint import MAX_CONNECTIONS
from paceline.telemetry.metrics import MAX_POOLS, OTHER

ROOT = Path(__file__).resolve().parents[2]
SONNET = "anthropic/main/sonnet"

LEDGER = LedgerFigures(
    name="main",
    serving=True,
    unanswered=3,
    open_reservations=2,
    journal=JournalFigures(
        operations=10, busy=1, written_bytes=4096, append_latency=Histogram((0.001, 0.01), (4, 2, 1), 0.5), loads=1
    ),
    grants={(SONNET, Priority.INTERACTIVE): 7, (SONNET, Priority.BATCH): 1},
    denials={(SONNET, Reason.TOO_LARGE): 2},
    would_deny={(SONNET, Reason.LIMIT): 4},
    would_wait={SONNET: 5},
    settlements={SONNET: 6},
    expiries={SONNET: 1},
    refusals={(SONNET, Refusal.OVERLOAD): 3},
    corrections={(SONNET, Dimension.INPUT_TOKENS): 900},
    waits={(SONNET, Priority.INTERACTIVE): Histogram((0.5, 1.0), (3, 2, 2), 12.5)},
    waiting={SONNET: 2},
    pools={SONNET: "blocked"},
    limits=(
        LimitFigures(SONNET, Dimension.INPUT_TOKENS, Window.MINUTE, 30_000, 40_000, -50, 10, 1_000, 990, -7),
        LimitFigures(SONNET, Dimension.CONCURRENCY, Window.NONE, UNLIMITED, UNLIMITED, UNLIMITED, 4, 8, 4, 0),
        LimitFigures("", Dimension.SPEND, Window.MONTH, 5_000_000_000, 5_000_000_000, 4_000_000_000, 0, 0, 10**9, 0),
    ),
)
FIGURES = Figures(
    (LEDGER,),
    Traffic({("Reserve", "OK"): 9, ("Commit", "UNAVAILABLE"): 1}, {("reserve", "OK"): 5}, 2, 1),
    (
        RouteFigures("main", "owner", 7, 3, lease_age=0.25, renewals=11),
        RouteFigures("other", "standby", 4, 5, resent=6, shed=8, poisoned=1),
    ),
    FleetFigures(3, {"acquired": 2, "took_over": 1, "reasserted": 4}, 9),
    AlertFigures({("main", "threshold"): 3}, {"delivered": 2, "failed": 0, "dropped": 1}, 4),
    AuditFigures(70, 2),
)


class Source:
    """Figures that a test can change."""

    def __init__(self) -> None:
        self.figures = FIGURES
        self.threads: set[int] = set()

    def __call__(self) -> Figures:
        self.threads.add(threading.get_ident())
        return self.figures


@pytest.fixture
async def served() -> AsyncIterator[tuple[Source, Endpoint]]:
    source = Source()
    endpoint = Endpoint("127.0.0.1:0", source)
    yield source, endpoint
    await endpoint.close()


def get(port: int, path: str = "/metrics", accept: str = "", method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers={"Accept": accept} if accept else {})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read().decode()
    finally:
        connection.close()


async def scrape(endpoint: Endpoint) -> dict[str, Metric]:
    status, _, text = await asyncio.to_thread(get, endpoint.port)
    assert status == 200
    return {family.name: family for family in parse_text(text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    for family in families.values():
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    raise AssertionError(f"no {name} with {labels}")


async def test_values_and_labels(served: tuple[Source, Endpoint]) -> None:
    source, endpoint = served
    found = await scrape(endpoint)
    assert value(found, "paceline_grants_total", pool=SONNET, priority="interactive") == 7
    assert value(found, "paceline_denials_total", pool=SONNET, reason="too_large") == 2
    assert value(found, "paceline_would_deny_total", pool=SONNET, reason="limit") == 4
    assert value(found, "paceline_upstream_refusals_total", pool=SONNET, cause="overload") == 3
    limit = {"pool": SONNET, "dimension": "input_tokens", "window": "minute"}
    assert value(found, "paceline_pool_limit", **limit) == 30_000
    assert value(found, "paceline_pool_level", **limit) == -50
    assert value(found, "paceline_pool_adjusted", **limit) == -7
    assert value(found, "paceline_pool_state", pool=SONNET, state="blocked") == 1
    assert value(found, "paceline_pool_state", pool=SONNET, state="open") == 0
    assert value(found, "paceline_spend_left", ledger="main") == 4
    assert value(found, "paceline_spend_charged", ledger="main") == 1
    assert value(found, "paceline_requests_total", rpc="Commit", status="UNAVAILABLE") == 1
    assert value(found, "paceline_journal_written_bytes_total", ledger="main") == 4096
    assert value(found, "paceline_sessions") == 1
    # The figures are copied where the counters live.
    assert source.threads == {threading.get_ident()}


async def test_what_is_only_counted_has_no_limit(served: tuple[Source, Endpoint]) -> None:
    found = await scrape(served[1])
    counted = {"pool": SONNET, "dimension": "concurrency", "window": "none"}
    assert value(found, "paceline_pool_held", **counted) == 4
    assert all(sample.labels != counted for sample in found["paceline_pool_limit"].samples)
    assert all(sample.labels != counted for sample in found["paceline_pool_level"].samples)


async def test_histograms_are_cumulative(served: tuple[Source, Endpoint]) -> None:
    found = await scrape(served[1])
    name, labels = "paceline_wait_duration_seconds", {"pool": SONNET, "priority": "interactive"}
    assert [value(found, f"{name}_bucket", le=bound, **labels) for bound in ("0.5", "1.0", "+Inf")] == [3, 5, 7]
    assert value(found, f"{name}_count", **labels) == 7
    assert value(found, f"{name}_sum", **labels) == 12.5
    assert found[name].type == "histogram"


async def test_owners_and_the_ways_to_them(served: tuple[Source, Endpoint]) -> None:
    source, endpoint = served
    found = await scrape(endpoint)
    roles = {("main", "owner"): 1, ("main", "standby"): 0, ("other", "owner"): 0, ("other", "standby"): 1}
    for (ledger, role), expected in roles.items():
        assert value(found, "paceline_ledger_role", ledger=ledger, role=role) == expected
    assert value(found, "paceline_ledger_epoch", ledger="other") == 4
    assert value(found, "paceline_lease_age_seconds", ledger="main") == 0.25
    assert [sample.labels["ledger"] for sample in found["paceline_lease_age_seconds"].samples] == ["main"]
    assert value(found, "paceline_lease_renewals_total", ledger="main") == 11
    assert value(found, "paceline_ledger_pending", ledger="other") == 5
    assert value(found, "paceline_ledger_resent_total", ledger="other") == 6
    assert value(found, "paceline_ledger_shed_total", ledger="other") == 8
    assert value(found, "paceline_ledger_poisoned_total", ledger="other") == 1
    assert value(found, "paceline_owner_changes_total", change="took_over") == 1
    assert value(found, "paceline_owner_changes_total", change="deposed") == 0
    assert value(found, "paceline_store_lost_total") == 9
    assert value(found, "paceline_nodes") == 3
    source.figures = replace(FIGURES, fleet=None, routes=())
    alone = await scrape(endpoint)
    # What has been seen once keeps no stale value.
    assert "paceline_nodes" not in alone
    assert "paceline_ledger_epoch" not in alone


async def test_audit(served: tuple[Source, Endpoint]) -> None:
    source, endpoint = served
    found = await scrape(endpoint)
    assert value(found, "paceline_audit_decisions_total", written="yes") == 70
    assert value(found, "paceline_audit_decisions_total", written="dropped") == 2
    source.figures = replace(FIGURES, audit=None)
    assert "paceline_audit" not in await scrape(endpoint)


async def test_alerts(served: tuple[Source, Endpoint]) -> None:
    source, endpoint = served
    found = await scrape(endpoint)
    assert value(found, "paceline_alerts_total", ledger="main", kind="threshold") == 3
    assert value(found, "paceline_webhook_alerts_total", result="delivered") == 2
    assert value(found, "paceline_webhook_alerts_total", result="failed") == 0
    assert value(found, "paceline_webhook_alerts_total", result="dropped") == 1
    assert value(found, "paceline_webhook_queued") == 4
    source.figures = replace(FIGURES, alerts=AlertFigures())
    without = await scrape(endpoint)
    assert "paceline_webhook_queued" not in without
    assert "paceline_webhook_alerts" not in without


async def test_a_later_reading_shows_later_figures(served: tuple[Source, Endpoint]) -> None:
    source, endpoint = served
    await scrape(endpoint)
    source.figures = Figures((replace(LEDGER, grants={(SONNET, Priority.INTERACTIVE): 8}, pools={}, waits={}),))
    found = await scrape(endpoint)
    assert value(found, "paceline_grants_total", pool=SONNET, priority="interactive") == 8
    assert "paceline_pool_state" not in found


async def test_the_table_says_what_is_exported(served: tuple[Source, Endpoint]) -> None:
    found = await scrape(served[1])
    own = {name: family for name, family in found.items() if name.startswith("paceline_")}
    expected = {metric.exported.removesuffix("_total"): metric for metric in METRICS}
    assert {name.removesuffix("_total") for name in own} == expected.keys()
    for name, family in own.items():
        metric = expected[name.removesuffix("_total")]
        assert family.type == metric.kind.value
        assert family.documentation == metric.description
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(metric.labels)
    assert {label for metric in METRICS for label in metric.labels} == LABELS.keys()


async def test_pools_are_bounded(served: tuple[Source, Endpoint]) -> None:
    source, endpoint = served
    names = [f"pool-{number:04}" for number in range(MAX_POOLS + 50)]
    waits = Histogram((1.0,), (1, 2), 4.0)
    source.figures = Figures(
        (
            LedgerFigures(
                "main",
                True,
                grants={(name, Priority.BATCH): 2 for name in names},
                waits={(name, Priority.BATCH): waits for name in names},
                waiting=dict.fromkeys(names, 1),
            ),
        )
    )
    for _ in range(2):
        found = await scrape(endpoint)
        assert len(found["paceline_grants"].samples) == MAX_POOLS + 1
        assert value(found, "paceline_grants_total", pool=OTHER, priority="batch") == 100
        assert value(found, "paceline_wait_duration_seconds_count", pool=OTHER, priority="batch") == 150
        assert len(found["paceline_waiting"].samples) == MAX_POOLS


async def test_openmetrics(served: tuple[Source, Endpoint]) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    status, content_type, text = await asyncio.to_thread(get, served[1].port, "/metrics", accept)
    assert (status, content_type.partition(";")[0]) == (200, "application/openmetrics-text")
    families: list[Metric] = list(parse_openmetrics(text))  # type: ignore[no-untyped-call]  # published without types
    found = {family.name: family for family in families}
    assert value(found, "paceline_grants_total", pool=SONNET, priority="batch") == 1


async def test_other_paths_and_methods(served: tuple[Source, Endpoint]) -> None:
    port = served[1].port
    assert (await asyncio.to_thread(get, port, "/"))[0] == 404
    status, _, body = await asyncio.to_thread(get, port, "/metrics?x=1", "", "HEAD")
    assert (status, body) == (200, "")
    assert (await asyncio.to_thread(get, port, "/metrics", "", "POST"))[0] == 501


async def test_a_failure_is_an_answer_too(served: tuple[Source, Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    _, endpoint = served

    def fail(accept: str) -> tuple[str, bytes]:
        raise ValueError("secret")

    monkeypatch.setattr(endpoint, "page", fail)
    status, _, body = await asyncio.to_thread(get, endpoint.port)
    assert status == 500
    assert "secret" not in body


async def test_a_busy_server_says_so(served: tuple[Source, Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.telemetry.endpoint.COLLECT_TIMEOUT_S", 0.05)
    asked = asyncio.get_running_loop().run_in_executor(None, get, served[1].port)
    await asyncio.sleep(0)
    threading.Event().wait(0.5)  # the event loop does nothing else
    assert (await asked)[0] in (200, 503)
    assert (await asyncio.to_thread(get, served[1].port))[0] == 200


async def test_readers_are_bounded(served: tuple[Source, Endpoint]) -> None:
    _, endpoint = served
    for _ in range(MAX_CONNECTIONS):
        assert endpoint.enter()
    assert (await asyncio.to_thread(get, endpoint.port))[0] == 503
    for _ in range(MAX_CONNECTIONS):
        endpoint.leave()
    assert (await asyncio.to_thread(get, endpoint.port))[0] == 200


async def test_an_address_in_use_is_an_error(served: tuple[Source, Endpoint]) -> None:
    with pytest.raises(OSError, match="in use"):
        Endpoint(f"127.0.0.1:{served[1].port}", Figures)


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m paceline.telemetry.document docs/metrics.md"
