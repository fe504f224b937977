"""Every row of the table runs, measures what it says, and can miss its bounds. Cells are too short to mean anything."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench.lab import cases, learning, report
from bench.lab.measure import Cell, cell, steadiness
from bench.lab.rows import ROWS, Bound, Row
from bench.lab.run import Run, Sample
from bench.lab.setting import Setting

NAMES = [row.name for row in ROWS]
ROOT = Path(__file__).resolve().parents[2]


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def short(name: str) -> Row:
    """The row with hardly any warm-up, on a tenth of the load."""
    row = row_of(name)

    def build(accepted: int, seed: int) -> Setting:
        setting = row.build(accepted, seed)
        fewer = tuple(replace(source, workers=-(-source.workers // 10)) for source in setting.all_sources())
        return replace(setting, warmup_s=2.0, settled_calls=min(10, setting.settled_calls), sources=fewer)

    return replace(row, build=build)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_runs_and_has_the_figures_of_its_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "AFTER_S", 15.0)
    done = cell(short(name), 100, 7)
    assert done.figures["accepted"] > 20
    for bound in row_of(name).bounds:
        assert bound.figure in done.figures
        assert bound.figure in report._NAMES
    for figure in row_of(name).shown:
        assert figure in done.figures
        assert figure in report._NAMES


def test_the_same_seed_is_the_same_cell() -> None:
    first, second, other = (cell(short("outside-20"), 100, seed) for seed in (7, 7, 8))
    assert first.figures == second.figures
    assert first.figures != other.figures


def test_a_cell_has_about_the_calls_that_were_asked_for() -> None:
    assert 500 <= cell(row_of("headers-absent"), 500, 7).figures["accepted"] <= 700


def test_bounds_hold_from_one_side() -> None:
    assert Bound("used", least=0.9).holds(0.9)
    assert not Bound("used", least=0.9).holds(0.89)
    assert Bound("refused", most=1).holds(1)
    assert not Bound("refused", most=1).holds(1.01)
    assert not Bound("open_s", most=10).holds(math.nan)


def test_rows_cover_the_table_and_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)
    wanted = (
        "unknown changed outside-20 outside-50 estimates-none estimates-x3 estimates-d3 reasoning-60 reasoning-10 "
        "cached-0 cached-80 cached-96 burst-1 overload ramp headers-absent headers-late restart bursty-60 bursty-10 "
        "silence"
    )
    assert set(wanted.split()) <= set(NAMES)


# -- steadiness ------------------------------------------------------------------------------------------------------


def sample(at: float, wrong: int, charged: int) -> Sample:
    """Of a limit of 6,000 a minute with a burst of as much."""
    return Sample(
        at=at, level=1_000 + wrong, true_level=1_000, outstanding=0, limit=6_000, true_limit=6_000, burst=6_000,
        true_burst=6_000, outside=0, true_outside=0, blocked=False, waiting=0, charged=charged,
        offered=round(100 * at), outside_taken=0, attempts=0, accepted=0, refused=0,
    )  # fmt: skip


@pytest.fixture
def quiet() -> Run:
    return Run(Setting(seed=1, window_s=120.0))


def test_a_level_that_swings_across_the_truth_oscillates(quiet: Run) -> None:
    quiet.samples = [sample(at, 400 if at % 20 < 10 else -400, 100 * at) for at in range(121)]
    found = steadiness(quiet)
    assert found["swings"] * 2 == 11
    assert found["oscillates"] == 1


def test_a_level_that_is_off_by_less_than_a_twentieth_of_the_burst_does_not(quiet: Run) -> None:
    quiet.samples = [sample(at, 290 if at % 20 < 10 else -290, 100 * at) for at in range(121)]
    assert steadiness(quiet)["oscillates"] == 0


def test_use_that_varies_more_and_more_oscillates(quiet: Run) -> None:
    charged, samples = 0, []
    for at in range(121):
        samples.append(sample(at, 0, charged))
        charged += 100 + round((at // 60 * 50 + 5) * (1 if at % 10 < 5 else -1))
    quiet.samples = samples
    found = steadiness(quiet)
    assert found["growing"] > 1.5
    assert found["oscillates"] == 1


# -- the command and the document ------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_cell(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "estimates-x3", "changed", "--accepted", "100", "--seeds", "1", "--seed", "3"]
    learning.main([*arguments, "--processes", "1"])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out[:2]] == ["changed", "estimates-x3"]
    assert out[-1].startswith("2 cells")


def test_an_unknown_row_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert learning.main(["--rows", "nothing"]) == 2
    assert "no such row" in capsys.readouterr().err


def made(name: str, seed: int, **figures: float) -> Cell:
    row = row_of(name)
    all_figures = {
        "used": 0.99,
        "refused": 0.5,
        "accepted": 10_000.0,
        "swings": 0.0,
        "refused_before": 0.0,
        "oscillates": 0.0,
        **figures,
    }
    missed = [bound.figure for bound in row.bounds if not bound.holds(all_figures[bound.figure])]
    return Cell(name, seed, all_figures, {}, missed, 1.0)


def test_the_table_has_the_median_and_the_worst_and_says_what_fell_short() -> None:
    row = row_of("headers-late")
    text = report.table([row], [made(row.name, seed, used=used) for seed, used in enumerate((0.99, 0.97, 0.94))])
    assert "97 % (94 %) ≥ 95 %" in text
    assert "short of: used" in text
    assert "Fell short:" in text
    assert "with 1 of 3 seeds" in text
    text = report.table([row], [made(row.name, seed) for seed in range(3)])
    assert "Every row reaches its bounds" in text


def test_figures_without_a_bound_stand_beside_the_others() -> None:
    row = row_of("wrong-block")
    text = report.table([row], [made(row.name, 1, open_s=2.0, shut_s=291.0)])
    assert "seconds until open: 2 (2) ≤ 10; counted from the beginning: 291 (291)" in text


def test_the_document_is_written_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "learning.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "DOCUMENT", document)
    done = cell(short("changed"), 100, 7, keep=True)
    report.write([row_of("changed")], [done])
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    drawn = (tmp_path / "learning" / "changed.svg").read_text()
    assert drawn.startswith("<svg")
    assert "seed 7" in drawn
    assert drawn.count('class="event"') >= 3 * 5


def test_the_document_has_the_markers_and_its_commands_name_rows() -> None:
    text = report.DOCUMENT.read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    asked = re.findall(r"--rows ([a-z0-9 -]+?) --", text)
    assert asked
    for name in " ".join(asked).split():
        assert any(known.startswith(name) for known in NAMES)
    assert "\nlab-learning: env ## " in (ROOT / "Makefile").read_text()
