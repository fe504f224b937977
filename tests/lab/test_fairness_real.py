"""The rows of fairness with real processes: their judge, with series that must fail; their configuration; the table."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import bench.fairness.real.__main__ as command
from bench.fairness import report
from bench.fairness.ledger import Call, Ledger
from bench.fairness.real.replay import Replayed, Seen, replay
from bench.fairness.real.rows import BY_NAME, FIRST, ROWS, SECOND, Row
from bench.fairness.real.run import Ran, Say, config
from bench.fairness.rows import ROWS as VIRTUAL
from bench.fairness.setup import PoolLimits, Share
from bench.fairness.sources import Backlog, Stream
from bench.fairness.window import Figures, measure
from bench.lab.clock import EPOCH, Clock
from bench.lab.clock import SECOND as US
from bench.workloads import seeded
from paceline.config import load_config

LIMITS = PoolLimits(600, 60_000, 10)
"""10 requests and 1,000 tokens a second, for 10 s."""
FULL = 10_000


def seen(
    at: float,
    tokens: int = 1_000,
    granted: float | None = None,
    *,
    tenant: str = "a",
    pools: tuple[str, ...] = (FIRST,),
    pool: str = FIRST,
    settled: tuple[float, int] | None = None,
) -> Seen:
    """Instants in seconds."""
    made = Seen(f"{tenant}-{at}", tenant, tokens, 2, (tenant,), pools, 60 * US, US, round(at * US))
    if granted is not None:
        made.granted_at, made.pool, made.held = round(granted * US), pool, (1, tokens)
    if settled is not None:
        made.settled_at, made.settled = round(settled[0] * US), (1, settled[1])
    return made


def replayed(calls: Sequence[Seen], pools: Sequence[str] = (FIRST,), begin: float = 0, end: float = 10) -> Replayed:
    return replay(calls, dict.fromkeys(pools, LIMITS), 0, round(begin * US), round(end * US))


def missed(row: Row, figures: Figures) -> set[str]:
    return {bound.figure for bound in row.bounds if not bound.holds(figures[bound.figure])}


# -- waits beside a room ----------------------------------------------------------------------------------------------


def test_a_call_that_is_granted_when_it_fits_waits_beside_no_room() -> None:
    run = replayed([seen(0, FULL, 0), seen(1, 2_000, 2), seen(1.5, 2_000, 4)])
    assert run.waits == []
    assert run.late() == {"late_max_ms": 0.0, "late_p99_ms": 0.0}


def test_a_call_that_waits_although_it_fits_is_found() -> None:
    run = replayed([seen(0, FULL, 0), seen(1, 2_000, 2.4)])
    assert run.late()["late_max_ms"] == pytest.approx(400.0)
    # Another one that comes meanwhile, or something given back, does not make two waits of one.
    run = replayed([seen(0, FULL, 0), seen(1, 2_000, 2.6), seen(2.2, 100, 2.7)])
    assert max(run.waits) == pytest.approx(600_000)


def test_a_call_that_still_waits_at_the_end_is_found() -> None:
    assert replayed([seen(4, 2_000)]).waits == [6 * US]


def test_a_wait_for_two_models_counts_where_there_is_room() -> None:
    both = FIRST, SECOND
    run = replayed([seen(0, FULL, 0), seen(1, 5_000, 1.3, pools=both, pool=SECOND)], both)
    assert run.waits == [300_000]
    assert run.window.conserved()["idle"] == pytest.approx(0.03)


def test_what_is_given_back_makes_room() -> None:
    run = replayed([seen(0, FULL, 0, settled=(1, 4_000)), seen(0.5, 2_000, 2)])
    assert run.waits == [US]


def test_that_an_answer_was_late_hides_no_room() -> None:
    # Let go at the call, or at any time up to 0.4 s later: refill may have begun at once, and the next one had room.
    assert replayed([seen(0, FULL, 0.4), seen(1, 2_000, 2)]).waits == [400_000]
    run = replayed([seen(0, FULL, 0.4), seen(1, 2_000, 2.4)])
    assert run.waits == [400_000, 400_000]
    # Two that are on their way at the same time find the same refill once.
    run = replayed([seen(0, FULL // 2, 0.4), seen(0.1, FULL // 2, 0.4), seen(1, 2_000, 3)])
    assert run.waits == [400_000, US]


def test_only_waits_that_end_in_the_window_count() -> None:
    calls = [seen(0, FULL, 0), seen(1, 2_000, 3)]
    assert replayed(calls, begin=2, end=10).waits == [US]
    assert replayed(calls, begin=4, end=10).waits == []


# -- the same judge as that of the laboratory -------------------------------------------------------------------------


SECONDS = 36.0
"""Of a history; the first third is not measured."""


@functools.cache
def history(name: str, weighted: bool = True) -> tuple[tuple[Seen, ...], Figures]:
    """A row on the virtual clock: what its calls saw, and what the laboratory's own oracle says."""
    row = BY_NAME[name]
    shares = [Share(share, weight if weighted else 1) for share, weight in row.shares.items()]
    ledger = Ledger(Clock(), row.pools, shares, fill=1_000)
    for source in row.sources:
        chance = seeded(5, source.kind.tenant)
        if source.rate:
            Stream(ledger, source.kind, source.rate, chance).start()
        else:
            Backlog(ledger, source.kind, source.depth, chance).start()
    window = measure(ledger, SECONDS / 3, SECONDS * 2 / 3)
    figures = row.judge(Replayed(window, []))
    return tuple(as_seen(call, window.until) for call in ledger.calls), figures


def as_seen(call: Call, until: int) -> Seen:
    kept = Seen(call.key, call.tenant, call.tokens, call.priority, call.shares, call.pools, call.max_wait_us,
                call.took_us, call.offered_at, call.granted_at, call.denied_at, call.pool)  # fmt: skip
    if call.granted_at is not None:
        kept.held = kept.settled = 1, call.tokens
        kept.settled_at = call.granted_at + call.took_us if call.granted_at + call.took_us < until else None
    return kept


def again(row: Row, calls: Sequence[Seen]) -> Figures:
    begin, end = (EPOCH + round(seconds * US) for seconds in (SECONDS / 3, SECONDS))
    return {**row.judge(replay(calls, row.pools, EPOCH, begin, end)), "faults": 0.0}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_the_laboratory_saw_is_judged_alike(row: Row) -> None:
    calls, figures = history(row.name)
    found = again(row, calls)
    assert found == pytest.approx({**figures, "faults": 0.0}, abs=1e-4)
    # In so short a time one call makes some hundredths of what a small tenant asks for.
    assert missed(row, found) <= {"below"}, found
    assert found.get("below", 0.0) < 0.1


# -- series that must fail --------------------------------------------------------------------------------------------


def test_shares_without_their_weights_miss_the_bound() -> None:
    row = BY_NAME["weights"]
    calls, _ = history(row.name, weighted=False)
    found = again(row, calls)
    assert missed(row, found) == {"off"}
    assert found["off"] > 0.5


def test_a_tenant_that_is_served_late_misses_the_bound() -> None:
    row = BY_NAME["demands"]
    calls, _ = history(row.name)
    # Who waits is denied: that nobody takes what is left is not the matter here.
    told = [each if each.granted_at else denied(each) for each in calls]
    assert missed(row, again(row, told)) <= {"below"}
    few = [denied(each) if each.tenant == "t64" and index % 2 else each for index, each in enumerate(told)]
    assert {"below", "used"} <= missed(row, again(row, few))
    none = [denied(each) if each.tenant == "t128" else each for each in told]
    assert "jain" in missed(row, again(row, none))


def test_interactive_calls_that_wait_and_a_batch_that_starves_miss_the_bounds() -> None:
    row = BY_NAME["batch"]
    calls, _ = history(row.name)
    late = [
        replace_grant(each, each.granted_at + 300_000) if each.granted_at and each.priority == 1 else each
        for each in calls
    ]
    assert "wait_p99_ms" in missed(row, again(row, late))
    starved = [replace_grant(each, None) if each.priority == 3 else each for each in calls]
    assert {"minimum", "used"} <= missed(row, again(row, starved))


def test_calls_that_wait_for_the_first_model_alone_miss_the_bounds() -> None:
    row = BY_NAME["candidates"]
    calls, _ = history(row.name)
    alone = [replace_grant(each, None) if each.pool == SECOND else each for each in calls]
    assert {"used", "late_max_ms", "parked_s"} <= missed(row, again(row, alone))


def denied(each: Seen) -> Seen:
    """The call, denied at once."""
    found = replace_grant(each, None)
    found.denied_at = found.offered_at
    return found


def replace_grant(each: Seen, granted_at: int | None) -> Seen:
    """The call, granted at another time or never."""
    if granted_at is None:
        return Seen(each.key, each.tenant, each.tokens, each.priority, each.shares, each.pools, each.max_wait_us,
                    each.took_us, each.offered_at)  # fmt: skip
    moved = granted_at - (each.granted_at or 0)
    settled_at = each.settled_at and each.settled_at + moved
    return Seen(each.key, each.tenant, each.tokens, each.priority, each.shares, each.pools, each.max_wait_us,
                each.took_us, each.offered_at, granted_at, None, each.pool, each.held, settled_at,
                each.settled)  # fmt: skip


# -- configuration, command, table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_servers_take_the_configuration(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "paceline.yaml"
    path.write_text(config(row))
    load_config(path)
    text = path.read_text()
    assert all(f'"{name}-*"' in text for name in row.shares)
    assert all(f'"amount": {limits.tokens}' in text for limits in row.pools.values())


def test_every_figure_has_a_name_and_every_row_is_one_of_the_laboratory() -> None:
    for row in ROWS:
        assert {bound.figure for bound in row.bounds} | set(row.shown) <= set(report._NAMES)
        same = next(each for each in VIRTUAL if each.name == row.name)
        assert same.case == row.case
        real = {bound.figure: bound for bound in row.bounds}
        # Idle is never nothing where answers take their time; another bound stands for it.
        assert all(real[bound.figure] == bound for bound in same.bounds if bound.figure != "idle")
    text = report.DOCUMENT.read_text()
    assert all(marker in text for marker in command.MARKERS)


def fake(figures: Figures, want: float = 0.0, faults: Sequence[str] = ()) -> tuple[Row, Ran]:
    row = replace(BY_NAME["candidates"], judge=lambda run: figures)
    return row, Ran(replayed([seen(0, 1_000, 0)]), list(faults), {"s0": want})


GOOD = {"used": 0.99, "late_max_ms": 20.0, "late_p99_ms": 5.0, "lost": 0.0, "idle": 0.03, "parked_s": 0.0}


@pytest.mark.parametrize(
    ("figures", "want", "faults", "runs", "code"),
    [
        (GOOD, 0.5, (), 1, 0),
        ({**GOOD, "used": 0.96}, 0.0, (), 1, 1),
        ({**GOOD, "late_max_ms": 400.0}, 0.5, (), 2, 1),
        (GOOD, 0.0, ("Traceback",), 1, 1),
    ],
    ids=["reached", "short", "not valid", "error"],
)
def test_the_command_ends_with_one_if_a_bound_is_missed(
    figures: Figures,
    want: float,
    faults: Sequence[str],
    runs: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row, ran = fake(figures, want, faults)
    made: list[int] = []

    def run(row: Row, seed: int, part: float, say: Say) -> Ran:
        made.append(seed)
        return ran

    monkeypatch.setattr(command, "ROWS", (row,))
    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert command.main(["--seed", "3", "--output", str(tmp_path)]) == code
    assert made == [3] * runs
    kept = command.load(tmp_path)
    assert [(each.cell.seed, each.runs, bool(each.cell.missed)) for each in kept] == [(3, runs, bool(code))]
    assert ("| short of" in capsys.readouterr().out) == bool(code)


def test_a_run_that_fails_is_short_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(row: Row, seed: int, part: float, say: Say) -> Ran:
        raise AssertionError("a client ended with code [1]")

    monkeypatch.setattr(command, "run", run)
    row = BY_NAME["weights"]
    done = command.cell(row, 3, 1.0, lambda line: None)
    assert set(done.missed) == {bound.figure for bound in row.bounds}
    assert math.isnan(done.figures["off"])
    assert "not measured: off the weights by" in command.table([row], [command.Kept(done)])


def test_the_table_is_written_between_its_own_markers(tmp_path: Path) -> None:
    document = tmp_path / "fairness.md"
    document.write_text(f"{report.BEGIN}\nlab\n{report.END}\n{command.MARKERS[0]}\nold\n{command.MARKERS[1]}\nafter\n")
    command.write("new\n", document)
    assert document.read_text().split() == [
        *report.BEGIN.split(), "lab", *report.END.split(),
        *command.MARKERS[0].split(), "new", *command.MARKERS[1].split(), "after",
    ]  # fmt: skip


def test_a_row_that_is_run_again_takes_the_place_of_the_earlier_run(tmp_path: Path) -> None:
    for seed, granted in ((1, 10.0), (2, 20.0), (1, 30.0)):
        command.keep(
            command.Kept(report.Cell("weights", seed, {"granted": granted, "off": math.nan}, (), 1.0)), tmp_path
        )
    kept = [(each.cell.seed, each.cell.figures["granted"]) for each in command.load(tmp_path)]
    assert kept == [(2, 20.0), (1, 30.0)]


def test_what_cannot_be_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--rows", "none"]) == 2
    assert command.main(["--write", "--part", "0.1"]) == 2
    assert "only whole runs" in capsys.readouterr().err
