"""Rows of the laboratory with real processes: what their figures say, and one short row of all of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench.demo.books import Attempt
from bench.demo.machine import Busy
from bench.lab.rows import ROWS as VIRTUAL
from bench.learning_sdk import report
from bench.learning_sdk.__main__ import prove
from bench.learning_sdk.figures import figures
from bench.learning_sdk.journal import Kept, Learned, Ruled
from bench.learning_sdk.report import about, result, table, write
from bench.learning_sdk.rows import LIMITS, ROWS, Event, Row
from bench.learning_sdk.run import Happened, Seen
from bench.learning_sdk.truth import Part, Sample
from paceline.config import load_config
from paceline.upstream.settings import config_of, scenario_of

SECOND = 1_000_000
OFFSET = 5 * SECOND
"""The ledger's time less the upstream's."""
BY_NAME = {row.name: row for row in ROWS}
HALF, WHOLE = LIMITS["input_tokens"] // 2, LIMITS["input_tokens"]


def sample(at: float, charged: float = 0.0, level: float = 0.0, rate: float = 100.0, refused: int = 0) -> Sample:
    """Seconds; tokens a second."""
    bucket = {"level_exact": level, "offered": rate * at, "charged": charged, "limit": round(60 * rate)}
    fields = {
        "now_us": round(at * SECOND),
        "calls": 0,
        "accepted": 100,
        "refused": refused,
        "groups": {"g": {"buckets": {"input_tokens": bucket}}},
    }
    return msgspec.convert(fields, Sample)


def attempt(at: float, status: str) -> Attempt:
    fields = {"id": "", "number": 1, "tenant": "", "group": "g", "dimension": "", "input": 1, "cache_write": 0}
    return msgspec.convert({**fields, "at": round(at * SECOND), "status": status, "produced": 1}, Attempt)


def seen(
    attempts: list[Attempt] | None = None,
    happened: list[Happened] | None = None,
    learned: Learned | None = None,
    samples: list[Sample] | None = None,
) -> Seen:
    return Seen(
        begun=0,
        start=sample(30, refused=2),
        end=sample(90),
        used={"input_tokens": Part(900, 1_100, 100, 800), "output_tokens": Part(900, 1_100, 100, 800)},
        attempts=attempts or [],
        samples=samples or [],
        happened=happened or [],
        learned=learned or Learned(),
        ledger_offset=OFFSET,
        records=[],
        busy=Busy((0.5, 0.25), {}),
        want={"server": 0.01},
    )


def ledger(seconds: float) -> int:
    """An instant of the upstream, in the ledger's time."""
    return round(seconds * SECOND) + OFFSET


def limits(at: float, part: float) -> Happened:
    return Happened(Event(0.0, "limits", part), round(at * SECOND), round(at * SECOND) + 1_000)


CHANGES = [limits(40, 0.5), limits(60, 1.0)]


def test_use_and_refusals() -> None:
    row = BY_NAME["unknown"]
    attempts = [attempt(31, "accepted")] * 500 + [attempt(32, "refused")]
    found = figures(row, seen(attempts, learned=Learned([Ruled(ledger(0.1), 5, 0), Ruled(ledger(1.5), WHOLE, 1)])))
    assert (found["used"], found["refused"], found["accepted"]) == (0.9, 2.0, 500)
    assert (found["refused_before"], found["limit_known_s"]) == (20.0, 1.5)
    assert figures(replace(row, binding="output_tokens"), seen())["used"] == 0.8, "what was produced in the window"


def test_readings_until_a_limit_rules() -> None:
    kept = [Kept(ledger(40.1), ledger(39.9)), Kept(ledger(40.2), ledger(40.15)), Kept(ledger(60.1), ledger(60.05))]
    # The reading that makes the limit rule is kept after it.
    ruled = [Ruled(ledger(40.2), HALF, 1), Ruled(ledger(60.2), WHOLE, 3)]
    found = figures(BY_NAME["changed"], seen(happened=CHANGES, learned=Learned(ruled, kept)))
    assert (found["readings_down"], found["readings_up"]) == (1, 2)
    found = figures(BY_NAME["changed"], seen(happened=CHANGES, learned=Learned(ruled[:1], kept)))
    assert math.isnan(found["readings_up"])


def test_a_refusal_is_avoidable_unless_the_ledger_could_not_know() -> None:
    learned = Learned([], [Kept(ledger(40.5), ledger(40.4)), Kept(ledger(60.5), ledger(60.4))])
    attempts = [attempt(at, "refused") for at in (39.9, 40.3, 40.6, 60.2, 70.0)]
    found = figures(BY_NAME["changed"], seen(attempts, CHANGES, learned))
    assert found["avoidable"] == 3, "before the change, and after what told of it"


def test_how_soon_a_limit_is_used_again() -> None:
    restart = Happened(Event(0.0, "kill"), 40 * SECOND, 42 * SECOND, 41 * SECOND)
    # Nothing until 45 s, then all that comes: what was saved up stays.
    samples = [sample(at / 2, max(0.0, 100.0 * (at / 2 - 45)), level=0.0) for at in range(60, 240)]
    attempts = [attempt(at, "refused") for at in (39, 41, 43, 101, 103)]
    found = figures(BY_NAME["restart-kill"], seen(attempts, [restart], samples=samples))
    assert (found["refused_after"], found["ending_s"], found["away_s"]) == (3, 1, 1)
    assert found["used_again_s"] == 2.5
    idle = figures(BY_NAME["restart-kill"], seen([], [restart], samples=[sample(at / 2) for at in range(60, 240)]))
    assert math.isnan(idle["used_again_s"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_rows_can_be_run(row: Row, tmp_path: Path) -> None:
    config_of(row.upstream_config(1))
    scenario_of(row.scenario())
    path = tmp_path / "paceline.yaml"
    path.write_text(row.server_config())
    load_config(path)
    assert ("1400000" in row.server_config()) == (row.told and row.binding == "input_tokens")
    plans = row.plans(1, "u", "c")
    assert {plan.mode for plan in plans} == {"paceline"}
    assert sum(plan.workers for plan in plans) > 10
    assert max((event.at_s for event in row.events), default=0.0) < row.window_s


def test_the_bounds_are_those_of_the_virtual_rows() -> None:
    virtual = {row.name: row.bounds for row in VIRTUAL}
    for row in ROWS:
        assert row.bounds == virtual[row.name.removesuffix("-kill").removesuffix("-terminate")]


def test_a_row_that_falls_short_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = BY_NAME["unknown"]
    rest = {"refused_by": {}, "fates": {}, "busy_cores": [0.9], "busy_processes": {}, "want": {"a": 0.2}, "failed": []}
    good = {"used": 0.97, "refused": 1.0, "accepted": 900.0, "refusals": 1.0, "refused_before": 0.0}
    good |= {"alone": 3.0, "refusals_before": 0.0, "limit_known_s": math.nan, "busiest_core": 0.9, "want": 0.2}
    reached, short = result(row, 7, good, **rest), result(row, 7, {**good, "used": 0.969}, **rest)
    assert reached.reached
    assert short.missed == ["used"]
    assert not result(row, 7, good, **{**rest, "failed": ["chat-0 ended early"]}).reached
    assert "96.9 % ≥ 97 %" in table(ROWS, [short])
    assert "short of: used" in table(ROWS, [short])
    assert "nobody had granted: 3" in table(ROWS, [short])
    assert "not valid; short of: used" in table(ROWS, [short])
    assert "Every row reaches" in about([reached])
    assert "Short of a bound: limits unknown" in about([short])
    document = tmp_path / "learning.md"
    document.write_text("before <!-- sdk table -->old<!-- /sdk table --> after <!-- table -->kept<!-- /table -->")
    monkeypatch.setattr(report, "DOCUMENT", document)
    write(table(ROWS, [reached]))
    assert re.fullmatch(
        r"before <!-- sdk table -->\n\n\| case (.|\n)*\n\n<!-- /sdk table --> after <!-- table -->kept<!-- /table -->",
        document.read_text(),
    )


SHORT = replace(
    BY_NAME["changed"],
    name="short",
    initial=0.02,
    warmup_s=3.0,
    window_s=7.0,
    events=(Event(1.0, "limits", 0.5), Event(4.0, "kill"),),
    bounds=(),
)  # fmt: skip


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_short_row_from_start_to_end(tmp_path: Path) -> None:
    said: list[str] = []
    (done,) = prove([SHORT], 3, tmp_path, said.append)
    print("\n".join(said))
    assert done.reached, "no process did anything wrong"
    figures_of = done.figures
    assert (figures_of["accepted"] or 0) > 20
    # So short a window is as much a matter of what was left over at its ends.
    assert 0.2 < (figures_of["used"] or 0) < 1.2
    assert 1 <= (figures_of["readings_down"] or 0) <= 5
    assert 0 < (figures_of["away_s"] or 0) < 30
    assert done.fates.get("answered", 0) > 10
    assert (tmp_path / "result.json").exists()
