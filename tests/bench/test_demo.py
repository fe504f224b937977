"""The demonstration: its processes, its result, its picture, and a small run of all of it."""

from __future__ import annotations

import asyncio
import io
import json
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

import msgspec
import psutil
import pytest
from rich.console import Console

from bench.demo import __main__ as command
from bench.demo import children
from bench.demo.books import Attempt, Mark
from bench.demo.children import ChildFailed, child
from bench.demo.figures import Figures, figures
from bench.demo.picture import picture
from bench.demo.report import faults, table
from bench.demo.settings import MODES, Settings
from bench.fleet.plan import Mode, Record
from paceline.config import load_config
from paceline.upstream.settings import config_of

MEASURES = {
    "limit_used",
    "accepted",
    "refused",
    "refused_per_1000",
    "first_attempt",
    "lost_interactive",
    "lost_batch",
    "wait_interactive_p50_s",
    "wait_interactive_p99_s",
    "jain",
}


def mark(at: float, calls: int, level: float) -> Mark:
    """A bucket of 100 tokens a second."""
    bucket = {"level_exact": level, "offered": 100.0 * at}
    buckets = {"input_tokens": bucket, "requests": {"level_exact": 500.0, "offered": 50.0 * at}}
    fields = {
        "now_us": int(at * 1e6),
        "calls": calls,
        "accepted": 0,
        "refused": 0,
        "groups": {"g": {"buckets": buckets}},
    }
    return msgspec.convert(fields, Mark)


def attempt(number: int, at: float, call: str, tenant: str, status: str, tokens: int) -> Attempt:
    return Attempt(
        id=call,
        number=number,
        at=int(at * 1e6),
        tenant=tenant,
        group="g",
        status=status,
        dimension="" if status == "accepted" else "input_tokens",
        input=tokens,
        cache_write=0,
        produced=3,
    )


def record(call: str, tenant: str, begun: float, sent: float, attempts: int, fate: str, tokens: int) -> Record:
    return Record(
        call=call,
        tenant=tenant,
        begun=begun,
        sent=sent,
        ended=sent + 1,
        attempts=attempts,
        fate=fate,
        input_tokens=tokens,
        output_tokens=3,
    )


RECORDS = [
    record("a", "chat-1", 100.0, 100.01, 1, "answered", 200),
    record("b", "chat-1", 101.0, 103.01, 2, "answered", 100),
    record("c", "batch-1", 100.0, 100.01, 1, "answered", 600),
    record("d", "batch-1", 102.0, 104.01, 2, "RateLimitError", 500),
]
ATTEMPTS = [
    attempt(4, 10.0, "before", "chat-1", "accepted", 999),
    attempt(5, 10.5, "a", "chat-1", "accepted", 200),
    attempt(6, 10.6, "c", "batch-1", "accepted", 600),
    attempt(7, 11.0, "b", "chat-1", "refused", 100),
    attempt(8, 12.0, "d", "batch-1", "refused", 500),
    attempt(9, 13.0, "b", "chat-1", "accepted", 100),
    attempt(10, 14.0, "d", "batch-1", "refused", 500),
    attempt(11, 20.5, "after", "batch-1", "accepted", 999),
]


def example() -> Figures:
    return figures(RECORDS, ATTEMPTS, mark(10.0, 4, -100.0), mark(20.0, 10, 0.0), {"chat-1"}, own_s=0.01)


def test_figures_of_a_window() -> None:
    found = example()
    assert found.limit_used == pytest.approx(900 / (1_000 - 100))
    assert (found.binding_dimension, found.accepted, found.refused) == ("input_tokens", 3, 3)
    assert found.refused_by == {"input_tokens": 3}
    assert (found.lost_interactive, found.lost_batch, found.first_attempt) == (0.0, 0.5, 0.5)
    assert found.wait_interactive_p50_s == pytest.approx(0.0)
    assert found.wait_interactive_p99_s == pytest.approx(2.0)
    assert found.demand_interactive == pytest.approx(0.3)
    assert (found.answered_batch, found.answered_batch_tokens) == (1, 603)
    # Chat had the 300 that it asked for, of 900; batch all the rest.
    assert found.least_served == pytest.approx(1.0)
    assert found.unmatched_attempts == 0
    assert found.timeline["interactive"][:4] == [200.0, 0.0, 0.0, 100.0]
    assert found.timeline["batch"][0] == 600.0
    assert sum(found.timeline["refused"]) == 3
    assert sum(found.timeline["interactive_wanted"]) == 300.0


def test_the_least_served_of_all_tenants_is_one_that_wants_little() -> None:
    attempts = [each for each in ATTEMPTS if each.number != 9]
    found = figures(RECORDS, attempts, mark(10.0, 4, -100.0), mark(20.0, 10, 0.0), {"chat-1"}, own_s=0.0)
    assert found.least_served == pytest.approx(200 / 300)
    assert found.least_served_tenant == "chat-1"
    assert found.jain == 1.0, "which says nothing of it"


def test_an_attempt_that_only_one_side_saw_is_counted() -> None:
    found = figures(RECORDS, ATTEMPTS[:-2], mark(10.0, 4, 0.0), mark(20.0, 10, 0.0), {"chat-1"}, own_s=0.0)
    assert found.unmatched_attempts == 1


def test_what_makes_a_result_not_valid() -> None:
    settings = Settings(seed=1)
    good = msgspec.structs.replace(example(), accepted=2_500, busiest_core=0.85)
    assert faults(settings, {"paceline": good}) == []
    for change, words in (
        ({"busiest_core": 0.86}, "busy"),
        ({"accepted": 1_999}, "fewer than"),
        ({"unmatched_attempts": 100}, "disagree"),
        ({"demand_interactive": 0.5}, "half or more"),
        ({"fates": {"interactive": {"cut": 1}, "batch": {}}}, "cut"),
    ):
        (fault,) = faults(settings, {"paceline": msgspec.structs.replace(good, **change)})
        assert words in fault


def test_the_picture_stands_alone_and_says_what_the_table_says() -> None:
    results = dict.fromkeys(MODES, example())
    drawn = picture(Settings(seed=1), results)
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("100.0%") == 3
    assert "prefers-color-scheme: dark" in drawn
    assert "not valid" in drawn, "three calls are no result"
    for outside in ("href", "url(", "@import", "<script"):
        assert outside not in drawn
    rows = printed(results)
    assert "1,000.0" in rows["refused per 1,000"]
    assert "50.0%" in rows["chat: first attempt"]
    assert "1 (0.00 M)" in rows["batch answered (tokens)"]
    assert "1.00 (" in rows["least served ÷ fair share"]
    assert any("binding: input tokens;" in row for row in rows.values())


def printed(results: Mapping[Mode, Figures]) -> dict[str, str]:
    """The lines of the table by the name of the row (of the caption: by itself)."""
    file = io.StringIO()
    Console(file=file, width=120).print(table(Settings(seed=1), results))
    lines = [line.strip("│ ") for line in file.getvalue().splitlines()]
    return {line.partition("│")[0].strip(): line for line in lines}


def test_a_caption_names_the_binding_dimension_of_each_mode_where_they_differ() -> None:
    other = msgspec.structs.replace(example(), binding_dimension="requests")
    rows = printed({"alone": other, "paceline": example()})
    assert any("binding: requests (alone), input tokens (Paceline)" in row for row in rows.values())


def test_a_mode_without_any_answer_is_drawn_too_and_nothing_of_it_is_good_that_is_not_known() -> None:
    nothing = figures([], [], mark(10.0, 4, 0.0), mark(20.0, 4, 0.0), {"chat-1"}, own_s=0.0)
    results = dict.fromkeys(MODES, nothing)
    root = ElementTree.fromstring(picture(Settings(seed=1), results))
    unknown = [each for each in root.iter("{http://www.w3.org/2000/svg}text") if each.text == "–"]
    # The wait and the refusals per accepted call, in each mode.
    assert [each.get("class") for each in unknown] == ["value bad"] * 6
    rows = printed(results)
    for name in ("refused per 1,000", "chat wait, p99", "Jain's index", "least served ÷ fair share"):
        assert rows[name].count("–") == 3


def test_the_upstreams_estimate_is_not_the_truth_times_a_constant() -> None:
    assert config_of(Settings(seed=1).upstream_config(0.2)).estimate_spread == 0.1


def test_the_operators_configuration_is_sound_and_is_the_limit(tmp_path: Path) -> None:
    settings = Settings(seed=1)
    path = tmp_path / "paceline.yaml"
    path.write_text(settings.server_config())
    load_config(path)
    assert settings.tier in path.read_text()


@pytest.fixture
def misbehaves(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that children can run: the parameter is its code."""
    (tmp_path / "misbehaves.py").write_text(request.param)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(children, "STOP_S", 0.5)


@pytest.mark.process
@pytest.mark.parametrize("misbehaves", ["raise SystemExit('the dog ate it')"], indirect=True)
async def test_a_child_that_ends_early_is_named_with_its_last_words(misbehaves: None, tmp_path: Path) -> None:
    async with child("worker", "misbehaves", [], tmp_path) as running:
        with pytest.raises(ChildFailed, match=r"(?s)worker ended early.*the dog ate it"):
            await running.line_with("ready", 10.0)


DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"


@pytest.mark.process
@pytest.mark.parametrize("misbehaves", [DEAF], indirect=True)
async def test_a_child_that_hangs_is_killed(misbehaves: None, tmp_path: Path) -> None:
    async with child("worker", "misbehaves", [], tmp_path) as running:
        await running.line_with("up", 10.0)
        with pytest.raises(ChildFailed, match="did not end within"):
            await running.ended(0.1)
        pid, began = running.usage.pid, time.monotonic()
    assert time.monotonic() - began < 5
    assert not psutil.pid_exists(pid)


@pytest.mark.process
@pytest.mark.parametrize("misbehaves", ["import time; time.sleep(60)"], indirect=True)
async def test_a_child_that_says_nothing_is_not_waited_for(misbehaves: None, tmp_path: Path) -> None:
    async with child("worker", "misbehaves", [], tmp_path) as running:
        with pytest.raises(ChildFailed, match="said nothing of 'ready'"):
            await running.line_with("ready", 0.2)


SMALL = Settings(
    seed=11,
    window_s=2.5,
    warmup_s=1.0,
    deadline_s=3.5,
    limits={"requests": 4_000, "input_tokens": 600_000, "output_tokens": 800_000},
    initial=0.02,
    chats=2,
    jobs=1,
    workers=15,
    quiet_mean_s=2.0,
    burst_mean_s=1.1,
)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_small_demonstration_from_start_to_end(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    drawing = tmp_path / "picture.svg"
    assert command.demonstrate(SMALL, tmp_path / "demo", drawing, console) == 0
    found = json.loads((tmp_path / "demo" / "result.json").read_text())
    for mode in MODES:
        figures_of = found[mode]
        assert figures_of.keys() >= MEASURES
        assert figures_of["accepted"] > 10
        assert figures_of["offered_interactive"] > 5
        assert figures_of["offered_batch"] > 5
        assert 0.3 < figures_of["limit_used"] < 1.1
        assert figures_of["unmatched_attempts"] <= 2
        assert 0 < figures_of["sdk_own_s"] < 0.1
    assert found["alone"]["refused"] > 0
    # The same calls in each mode, but for one or two at the edges of the window.
    wanted = [sum(found[mode]["timeline"]["interactive_wanted"]) for mode in MODES]
    assert max(wanted) == pytest.approx(min(wanted), rel=0.15)
    assert found["seed"] == 11
    assert found["versions"]["anthropic"]
    assert (tmp_path / "demo" / "result.svg").read_text() == drawing.read_text()
    assert not [each for each in psutil.Process().children(recursive=True) if "bench.fleet" in each.cmdline()]


@pytest.mark.process
async def test_a_process_that_fails_ends_the_run_with_a_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Settings, "server_config", lambda self: "accounts: {default: {tier: no-such-tier}}\n")
    monkeypatch.setattr(command, "MODES", ("paceline",))
    status = await asyncio.to_thread(command.demonstrate, SMALL, tmp_path, None, Console(file=io.StringIO()))
    assert status == 1
    error = capsys.readouterr().err
    assert "paceline ended early" in error
    assert "no-such-tier" in error
