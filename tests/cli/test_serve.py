"""``paceline serve`` as a process: where its settings come from, what it says, how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cli.conftest import PACELINE, clean_environment, free_address

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]


class Running:
    """A server process, ready."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [PACELINE, "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(**environ),
        )
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline().strip()

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_when_told(number: int) -> None:
    address = free_address()
    running = Running("--listen", address)
    assert running.first == f"paceline 0.1.0 listens on {address}"
    code, err = running.stop(number)
    assert (code, "Traceback" in err) == (0, False)


def test_flag_over_environment_over_file(tmp_path: Path) -> None:
    file, by_file, by_variable, by_flag = tmp_path / "c.yaml", free_address(), free_address(), free_address()
    file.write_text(f"listen: {by_file}\nlog_format: json\n")
    running = Running(PACELINE_CONFIG=str(file))
    assert running.first.endswith(by_file)
    assert running.stop()[1].startswith("{")
    running = Running("--config", str(file), PACELINE_LISTEN=by_variable, PACELINE_LOG_FORMAT="text")
    assert running.first.endswith(by_variable)
    assert not running.stop()[1].startswith("{")
    running = Running("--config", str(file), "--listen", by_flag, PACELINE_LISTEN=by_variable)
    assert running.first.endswith(by_flag)
    running.stop()


def test_a_file_keeps_the_books(tmp_path: Path) -> None:
    store, address = f"embedded:{tmp_path / 'books.db'}", free_address()
    spend = ["reserve", "--address", address, "--model", "claude-sonnet-4-5", "--input-tokens", "1000"]
    running = Running("--listen", address, "--store", store)
    subprocess.run([PACELINE, *spend], check=True, capture_output=True, timeout=30, env=clean_environment())
    assert "nothing is kept" not in running.stop()[1]
    running = Running("--listen", address, "--store", store)
    pools = [PACELINE, "pools", "--address", address]
    done = subprocess.run(pools, check=True, capture_output=True, text=True, timeout=30, env=clean_environment())
    assert "anthropic/default/sonnet" in done.stdout
    running.stop()


def test_metrics_are_offered_where_asked() -> None:
    address, metrics = free_address(), free_address()
    running = Running("--listen", address, "--metrics-listen", metrics)
    reserve = ["reserve", "--address", address, "--model", "claude-sonnet-4-5", "--input-tokens", "1000"]
    subprocess.run([PACELINE, *reserve], check=True, capture_output=True, timeout=30, env=clean_environment())
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
        found = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.read().decode())
            for sample in family.samples
        }
    assert running.stop()[0] == 0
    (pool,) = [key[1] for key in found if key[0] == "paceline_grants_total"]
    assert found["paceline_grants_total", pool, "standard"] == 1
    assert found["paceline_wait_duration_seconds_count", pool, "standard"] == 1
    assert found["paceline_settlements_total", pool] == 1
    assert found["paceline_waiting", pool] == 0
    assert found["paceline_pool_state", pool, "open"] == 1
    assert found["paceline_pool_granted_total", pool, "input_tokens", "minute"] == 1000
    limit, level = (found[f"paceline_pool_{name}", pool, "input_tokens", "minute"] for name in ("limit", "level"))
    assert limit - 1000 <= level <= limit
    assert found["paceline_requests_total", "OK", "Reserve"] == found["paceline_requests_total", "Commit", "OK"] == 1
    assert found["paceline_ledger_serving", "default"] == 1
    assert found["paceline_journal_append_duration_seconds_count", "default"] >= 1
    assert found["paceline_journal_events_total", "default"] > 1
    assert found["paceline_spend_charged", "default"] > 0
    assert found["paceline_sessions",] == 0


@pytest.mark.parametrize("option", ["--listen", "--metrics-listen"])
def test_an_address_in_use(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["--listen", free_address(), option, address]
        done = subprocess.run(
            [PACELINE, "serve", *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env=clean_environment(),
            check=False,
        )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert address in line
    assert "Traceback" not in done.stderr
