"""The laboratory of fairness: its judge, its callers, and short runs of its rows."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

import bench.fairness.__main__ as command
from bench.fairness import cost, lending, promises, report, rows, sharing, spreading, urgency
from bench.fairness.judging import fair_shares, fit, jain, least_in_any_window, quantile
from bench.fairness.ledger import POOL, Call, Ledger
from bench.fairness.oracle import Oracle, conserved
from bench.fairness.report import Cell
from bench.fairness.rows import ROWS, Row
from bench.fairness.setup import DIMENSIONS, PoolLimits
from bench.fairness.sources import Backlog, Kind, Stream, always, between, mean_between
from bench.lab.clock import EPOCH, SECOND, Clock
from bench.lab.rows import Bound
from bench.workloads import seeded
from paceline.engine.answers import Denied, Reason, Touched
from paceline.engine.dimensions import Window as LimitWindow

ROOT = Path(__file__).resolve().parents[2]
LIMITS = PoolLimits(600, 60_000)
"""10 requests and 1,000 tokens a second, for 60 s."""


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


# -- what is fair -----------------------------------------------------------------------------------------------------


def test_jain_of_known_vectors() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 2.0]) == pytest.approx(0.9)


def test_who_asks_for_little_gets_it_and_the_others_share_the_rest() -> None:
    shares = fair_shares({"a": (0.1, 0.0), "b": (0.5, 0.0), "c": (2.0, 0.0)}, {}, (1.0, 1.0))
    assert shares == pytest.approx({"a": 0.1, "b": 0.45, "c": 0.45})


def test_weights_divide_what_is_contended() -> None:
    asked = dict.fromkeys("abc", (5.0, 1.0))
    assert fair_shares(asked, {"a": 1, "b": 2, "c": 4}, (1.0, 1.0)) == pytest.approx(
        {"a": 1 / 7, "b": 2 / 7, "c": 4 / 7}
    )


def test_dominant_shares_are_those_of_the_published_example() -> None:
    # 9 processors and 18 GB; tasks of (1, 4) and of (3, 1): three of the one, two of the other.
    asked = {"a": (100 / 9, 400 / 18), "b": (300 / 9, 100 / 18)}
    assert fair_shares(asked, {}, (1.0, 1.0)) == pytest.approx({"a": 2 / 3, "b": 2 / 3})


def test_whom_a_full_dimension_does_not_touch_rises_on() -> None:
    asked = {"a": (3.0, 0.0), "b": (3.0, 0.0), "c": (0.0, 0.9)}
    assert fair_shares(asked, {}, (1.0, 1.0)) == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.9})


def test_quantiles_windows_and_lines() -> None:
    assert quantile(range(1, 101), 0.99) == 99
    assert math.isnan(quantile([], 0.5))
    events = [(0, 1.0), (10, 2.0), (11, 2.0), (30, 4.0)]
    assert least_in_any_window(events, 0, 40, 10) == 0.0
    assert least_in_any_window(events, 0, 40, 20) == 4.0
    assert least_in_any_window(events, 0, 40, 40) == 9.0
    assert fit([(1.0, 3.0), (2.0, 5.0), (3.0, 7.0)]) == pytest.approx((1.0, 2.0))


# -- the oracle -------------------------------------------------------------------------------------------------------


def oracle(fill: int = 0) -> Oracle:
    return Oracle({POOL: LIMITS}, fill, EPOCH)


def test_the_oracle_reports_a_call_that_waits_although_it_fits() -> None:
    judge = oracle()
    judge.waits("a", [(POOL, (1, 1_000))])
    judge.advance(EPOCH + 3 * SECOND)
    mark = judge.mark(POOL)
    assert mark.idle_us == 2 * SECOND
    assert mark.levels == (30.0, 3_000.0)


def test_the_oracle_lets_a_call_wait_that_does_not_fit() -> None:
    judge = oracle()
    judge.waits("a", [(POOL, (1, 5_000))])
    judge.waits("b", [(POOL, (1, 500))])
    judge.advance(EPOCH + 5 * SECOND)
    # The small one would have fitted: but who is first is not for the oracle to say.
    assert judge.mark(POOL).idle_us == 0
    judge.left("a")
    judge.advance(EPOCH + 6 * SECOND)
    assert judge.mark(POOL).idle_us == SECOND


def test_the_oracle_reports_refill_that_is_lost_beside_one_that_would_have_fitted() -> None:
    judge = oracle(fill=1_000)
    begin = judge.mark(POOL)
    judge.advance(EPOCH + 10 * SECOND)
    judge.waits("a", [(POOL, (1, 500))])
    judge.advance(EPOCH + 20 * SECOND)
    end = judge.mark(POOL)
    assert end.lost == pytest.approx((100.0, 10_000.0))
    found = conserved(LIMITS, begin, end)
    assert found["lost"] == pytest.approx(0.5)
    assert found["idle"] == pytest.approx(0.5)
    assert found["parked_s"] == pytest.approx(0.5 * 60, rel=0.2)


def test_a_bucket_that_is_full_while_the_other_one_binds_loses_nothing() -> None:
    judge = oracle(fill=1_000)
    judge.charge(POOL, (0, 60_000))
    judge.waits("a", [(POOL, (1, 30_000))])
    judge.waits("b", [(POOL, (1, 500))])
    judge.advance(EPOCH + 29 * SECOND)
    assert judge.mark(POOL).lost == (0.0, 0.0)


def test_what_is_given_back_is_there_again_but_not_above_the_burst() -> None:
    judge = oracle(fill=1_000)
    judge.charge(POOL, (1, 600))
    judge.charge(POOL, (0, -400))
    assert judge.mark(POOL).levels == (599.0, 59_800.0)
    judge.charge(POOL, (-1, -400))
    assert judge.mark(POOL).levels == (600.0, 60_000.0)


def busy(ledger: Ledger) -> None:
    for tenant, rate in (("a", 4.0), ("b", 2.0)):
        Stream(ledger, Kind(tenant, between(100, 2_000)), rate, seeded(5, tenant)).start()


def test_the_levels_of_the_oracle_are_those_of_the_engine() -> None:
    ledger = Ledger(Clock(), {POOL: LIMITS}, fill=500)
    busy(ledger)
    ledger.clock.until(EPOCH + 90 * SECOND)
    levels = ledger.mark().levels
    state = ledger.engine.state
    for place, dimension in enumerate(DIMENSIONS):
        bucket = state.buckets[state.addresses[POOL, "", dimension, LimitWindow.MINUTE]]
        assert bucket.level + bucket.refill(ledger.clock.now)[0] == pytest.approx(levels[place], abs=1.0)
    assert any(call.denied_at is not None for call in ledger.calls)
    assert all(call.held == call.needs for call in ledger.calls if call.granted_at is not None)


def test_what_was_not_sent_is_given_back_in_both() -> None:
    ledger = Ledger(Clock(), {POOL: LIMITS})

    def change(call: Call, chance: random.Random) -> None:
        call.unsent = chance.random() < 0.3

    Stream(ledger, Kind("a", between(100, 2_000)), 4.0, seeded(5, "a"), change).start()
    ledger.clock.until(EPOCH + 60 * SECOND)
    levels, state = ledger.mark().levels, ledger.engine.state
    bucket = state.buckets[state.addresses[POOL, "", DIMENSIONS[1], LimitWindow.MINUTE]]
    assert bucket.level + bucket.refill(ledger.clock.now)[0] == pytest.approx(levels[1], abs=1.0)
    assert bucket.released > 10_000


class _Late(Clock):
    """Wakes nobody before another 50 ms have passed."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "wake" and isinstance(value, int):
            value += 50_000
        super().__setattr__(name, value)


def test_an_engine_that_is_late_is_found_out() -> None:
    found = []
    for clock in (Clock(), _Late()):
        ledger = Ledger(clock, {POOL: LIMITS})
        Backlog(ledger, Kind("a", always(500)), 3, seeded(5, "a")).start()
        begin = ledger.mark()
        clock.until(EPOCH + 60 * SECOND)
        found.append(conserved(LIMITS, begin, ledger.mark())["idle"])
    assert found[0] == 0.0
    assert found[1] > 0.05


# -- who calls --------------------------------------------------------------------------------------------------------


def test_a_stream_comes_at_its_rate_whatever_is_answered() -> None:
    runs = []
    for limits in (LIMITS, PoolLimits(300, 30_000)):
        ledger = Ledger(Clock(), {POOL: limits})
        busy(ledger)
        ledger.clock.until(EPOCH + 150 * SECOND)
        runs.append([(call.key, call.offered_at, call.tokens, call.took_us) for call in ledger.calls])
    assert runs[0] == runs[1]
    assert len(runs[0]) == pytest.approx(6.0 * 150, rel=0.1)
    gaps = [b[1] - a[1] for a, b in pairwise(runs[0])]
    assert sum(gap > SECOND / 6 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.15)
    sizes = [tokens for _, _, tokens, _ in runs[0]]
    assert sum(sizes) / len(sizes) == pytest.approx(mean_between(100, 2_000), rel=0.1)
    assert 100 <= min(sizes) < max(sizes) <= 2_000


def test_a_backlog_always_waits_until_it_stops() -> None:
    ledger = Ledger(Clock(), {POOL: LIMITS})
    backlog = Backlog(ledger, Kind("a", always(500), max_wait_s=600.0), 4, seeded(5, "a"))
    backlog.start()
    for _ in range(20):
        ledger.clock.until(ledger.clock.now + SECOND)
        assert ledger.oracle.waiting(POOL) == 4
    backlog.stop()
    ledger.clock.until(ledger.clock.now + SECOND)
    assert ledger.oracle.waiting(POOL) == 0
    assert sum(call.granted_at is not None for call in ledger.calls) == 40


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "loose"),
    [
        ("demands", {"jain": 0.95, "below": 0.15}),
        ("dominant", {"apart": 0.15, "below": 0.15}),
        ("weights", {"off": 0.1}),
        ("claims", {"claim": 2.0}),
        ("lone", {}),
    ],
)
def test_a_short_run_wastes_nothing_and_is_about_fair(name: str, loose: dict[str, float]) -> None:
    row = row_of(name)
    figures = row.run(7, 0.05)
    for bound in row.bounds:
        wider = loose.get(bound.figure)
        least = wider if bound.least is not None and wider is not None else bound.least
        most = wider if bound.most is not None and wider is not None else bound.most
        assert Bound(bound.figure, least, most).holds(figures[bound.figure]), (bound, figures)
    assert set(row.shown) <= set(figures)


def test_the_same_seed_gives_the_same_figures() -> None:
    assert sharing.weights(3, 0.02) == sharing.weights(3, 0.02) != sharing.weights(4, 0.02)


@pytest.mark.parametrize("run", [urgency.flooded, urgency.pressed, lending.lending, spreading.candidates])
def test_every_other_row_runs_and_has_the_figures_of_its_bounds(run: rows.Run) -> None:
    row = next(row for row in ROWS if row.run is run)
    figures = run(7, 0.02)
    assert {bound.figure for bound in row.bounds} <= set(figures)
    assert not any(math.isnan(value) for value in figures.values())


def test_the_cost_is_measured_with_as_many_waiting_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "WAITERS", (10, 100))
    figures = cost.cost(7, 0.01)
    assert figures["us_10"] > 0 < figures["us_100"]
    queue = cost.Queue(50, 7)
    assert queue.fill()
    queue.decide(30)
    assert queue.decided >= 30
    assert len(queue.engine.waiters()) == 50


def test_how_far_a_guarantee_is_behind() -> None:
    rate = lending.GUARANTEE * lending.LIMITS.rate(1)

    def served(at_s: float, tokens: float) -> Call:
        return Call("", "owner", round(tokens), granted_at=EPOCH + int(at_s * SECOND))

    steady = [served(second + 0.5, rate) for second in range(10)]
    assert lending.lag_s(steady, EPOCH, EPOCH + 10 * SECOND) == 0.0
    late = [served(second + 3.5, rate) for second in range(7)]
    assert lending.lag_s(late, EPOCH, EPOCH + 10 * SECOND) == pytest.approx(2.6, abs=0.15)
    assert lending.lag_s([], EPOCH, EPOCH + 10 * SECOND) == pytest.approx(10.0, abs=0.5)


def test_cells_are_the_same_in_several_processes() -> None:
    row = row_of("demands")
    several = list(command.run_all([row], [3, 4], 0.01, 2))
    alone = list(command.run_all([row], [3, 4], 0.01, 1))
    assert sorted(one.seed for one in several) == [3, 4]
    assert {one.seed: one.figures for one in several} == {one.seed: one.figures for one in alone}


# -- promises ---------------------------------------------------------------------------------------------------------


def place(granted_s: float | None, promised_s: float | None, patience_s: float = 10.0) -> Call:
    return Call(
        "",
        "a",
        1,
        max_wait_us=int(patience_s * SECOND),
        granted_at=None if granted_s is None else int(granted_s * SECOND),
        placed=True,
        promised_by=None if promised_s is None else int(promised_s * SECOND),
    )


def test_which_promises_are_kept() -> None:
    kept = promises.kept([place(1, 2), place(3, 2), place(None, 2), place(4, None), place(None, 20)])
    assert kept["kept"] == pytest.approx(1 / 4)
    assert kept["early"] == pytest.approx(1 / 5)
    assert kept["ahead"] == pytest.approx(2.0)


def test_without_promises_nothing_is_measured() -> None:
    assert math.isnan(promises.kept([place(1, None)])["kept"])
    withdrawn = place(None, None)
    withdrawn.denial = Denied(Reason.RELEASED, POOL, None, None, Touched())
    assert promises.kept([withdrawn, place(1, 2)])["places"] == 1


def test_a_denial_is_judged_by_the_same_history_with_the_call_let_wait() -> None:
    ledger = promises.history(5, {})
    ledger.clock.until(EPOCH + 40 * SECOND)
    denied = [call for call in ledger.calls if call.denied_at == call.offered_at]
    assert denied
    again = promises.history(5, {denied[0].key: 7_200 * SECOND})
    again.clock.until(EPOCH + 40 * SECOND)
    same = next(call for call in again.calls if call.key == denied[0].key)
    assert same.placed
    assert (same.offered_at, same.tokens) == (denied[0].offered_at, denied[0].tokens)
    assert [call.key for call in again.calls] == [call.key for call in ledger.calls]


# -- the report -------------------------------------------------------------------------------------------------------


ROW = Row("some", "Some case", lambda seed, part: {"jain": 0.5 + seed, "used": 1.0}, (Bound("jain", least=0.98),))


def test_the_table_says_what_falls_short_and_what_is_not_measured() -> None:
    cells = [Cell("some", 1, {"jain": 0.99}, (), 1.0), Cell("some", 2, {"jain": 0.97}, ("jain",), 1.0)]
    line = report.table([ROW], cells).splitlines()[2]
    assert "Jain: 0.98 (0.97) ≥ 0.98" in line
    assert line.endswith("| short of: Jain |")
    line = report.table([ROW], [Cell("some", 1, {"jain": math.nan}, ("jain",), 1.0)]).splitlines()[2]
    assert line.endswith("| not measured: Jain |")


def test_every_figure_has_a_name_and_every_row_is_explained() -> None:
    for row in ROWS:
        assert {bound.figure for bound in row.bounds} | set(row.shown) <= set(report._NAMES)
    text = report.DOCUMENT.read_text()
    for row in ROWS:
        assert f"| {row.case} |" in text, row.case


def test_the_table_is_written_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "fairness.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    figures = {f"us_{waiters}": 10.0 + place for place, waiters in enumerate(cost.WAITERS)}
    cells = [Cell("cost", seed, {"growth": 0.5, "exponent": 0.1, **figures}, (), 1.0) for seed in (1, 2)]
    report.write(ROWS, cells, document)
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    drawn = (tmp_path / "fairness" / "cost.svg").read_text()
    assert len(re.findall("<circle", drawn)) == 2 * len(cost.WAITERS)


def test_the_command_ends_with_one_if_a_bound_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ROWS", (ROW,))
    assert command.main(["--seed", "0", "--seeds", "2", "--processes", "1"]) == 1
    assert "1 short of a bound" in capsys.readouterr().out
    assert command.main(["--seed", "1", "--seeds", "1", "--processes", "1"]) == 0
    assert command.main(["--rows", "none"]) == 2
    assert command.main(["--write", "--part", "0.1"]) == 2
