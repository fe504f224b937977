"""The commands, in this process: what they print, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline import __version__
from paceline.cli import _run
from paceline.config import Config
from tests.cli.conftest import free_address

MODEL = "claude-sonnet-4-5"


class Said:
    """Exit code and output of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def is_error(self, *parts: str) -> None:
        """One line on standard error, exit code 2, and nothing else."""
        assert (self.code, self.out) == (2, "")
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        for part in parts:
            assert part in self.err


class Command:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> Said:
        self.capsys.readouterr()
        code = _run(list(arguments))
        captured = self.capsys.readouterr()
        return Said(code, captured.out, captured.err)


@pytest.fixture
def paceline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name in ("ADDRESS", "TOKEN", "TOKEN_FILE", "CONFIG", "LISTEN", "STORE", "LOG_FORMAT", "METRICS_LISTEN"):
        monkeypatch.delenv(f"PACELINE_{name}", raising=False)
    return Command(capsys)


# -- without a server -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(paceline: Command, arguments: list[str]) -> None:
    said = paceline(*arguments)
    assert said.code == 0
    assert said.out.startswith(f"paceline {__version__} (Python 3.")


def test_help(paceline: Command) -> None:
    alone, asked = paceline(), paceline("--help")
    assert (alone.code, alone.out) == (asked.code, asked.out) == (0, asked.out)
    for command in ("serve", "config", "reserve", "pools", "limits", "advise", "ledgers", "health", "version"):
        assert f"  {command}" in alone.out
    text = " ".join(paceline("serve", "--help").out.split())
    config = Config()
    for field in ("listen", "store", "metrics_listen", "log_format", "log_level"):
        assert f"[env var: PACELINE_{field.upper()}; default: {getattr(config, field)}]" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nope"], ["nope"]),
        (["serve", "--nope"], ["--nope"]),
        (["serve", "--log-format", "xml"], ["--log-format"]),
        (["serve", "--listen", "nowhere"], ["--listen", "port"]),
        (["serve", "--store", "floppy:x"], ["--store", "embedded:PATH"]),
        (["serve", "--metrics-listen", "127.0.0.1:7133x"], ["--metrics-listen"]),
        (["serve", "--config", "/does/not/exist.yaml"], ["/does/not/exist.yaml", "check the path"]),
        (["reserve"], ["--model"]),
        (["reserve", "--model", MODEL, "--input-tokens", "-1"], ["--input-tokens"]),
        (["pools", "--token-file", "/does/not/exist"], ["--token-file", "No such file"]),
    ],
)
def test_mistakes(paceline: Command, arguments: list[str], parts: list[str]) -> None:
    paceline(*arguments).is_error(*parts)


def test_variables_are_named_when_they_are_wrong(paceline: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_LISTEN", "nowhere")
    paceline("serve").is_error("PACELINE_LISTEN: listen:")


def test_no_secret_of_a_store_is_shown(paceline: Command) -> None:
    said = paceline("serve", "--store", "floppy://user:hunter2@host/0")
    said.is_error("--store")
    assert "hunter2" not in said.err


def test_config_check(paceline: Command, tmp_path: Path) -> None:
    file = tmp_path / "paceline.yaml"
    file.write_text("listen: 127.0.0.1:7133\n")
    said = paceline("config", "check", str(file))
    assert (said.code, said.out, said.err) == (0, f"{file}: ok\n", "")

    file.write_text("ladders:\n  chat:\n    - model: nobody-knows-me\n")
    said = paceline("config", "check", str(file))
    assert said.code == 0
    assert said.out.splitlines()[0].startswith(f"note: {file}:3: ladders.chat[0].model:")
    assert said.out.splitlines()[1] == f"{file}: ok"

    file.write_text("lisen: x\nlog_format: xml\n")
    said = paceline("config", "check", str(file))
    assert said.code == 2
    assert [line.partition(": ")[0] for line in said.out.splitlines()] == [f"{file}:1", f"{file}:2"]
    assert "did you mean 'listen'?" in said.out


def test_config_schema(paceline: Command) -> None:
    assert json.loads(paceline("config", "schema").out)["title"] == "Config"


def test_nobody_there(paceline: Command) -> None:
    address = free_address()
    paceline("pools", "--address", address).is_error(address, "no server answers")
    paceline("reserve", "--model", MODEL, "--address", address).is_error("paceline serve")
    said = paceline("health", "--address", address)
    assert said.code == 1
    assert said.err.count("\n") == 1


def test_what_is_unexpected_is_one_line_too(paceline: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("paceline.cli.config.check_config", fail)
    paceline("config", "check", "x").is_error("ZeroDivisionError", "PACELINE_TRACEBACK=1")
    monkeypatch.setenv("PACELINE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        paceline("config", "check", "x")


# -- with a server ----------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_health(paceline: Command, address: str) -> None:
    said = paceline("health", "--address", address)
    assert (said.code, said.out) == (0, "SERVING\n")
    for service in ("store", "config", "draining", "paceline.v1.CoordinatorService"):
        assert paceline("health", "--address", address, "--service", service).code == 0
    assert paceline("health", "--address", address, "--service", "nope").code == 1


@pytest.mark.process
def test_reserve_and_commit(paceline: Command, address: str) -> None:
    said = paceline(
        *("reserve", "--address", address, "--model", MODEL, "--input-tokens", "1200", "--output-tokens", "300"),
        *("--priority", "interactive", "--tenant", "acme", "--route", "chat"),
    )
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("granted at once in anthropic/default/sonnet")
    assert any("input_tokens" in line and "minute" in line for line in lines)
    assert lines[-1].startswith("committed: ")
    assert "1,200 input_tokens" in lines[-1]
    assert "300 output_tokens" in lines[-1]


@pytest.mark.process
def test_reserve_and_release(paceline: Command, address: str) -> None:
    said = paceline("reserve", "--address", address, "--model", MODEL, "--then", "release", "--json")
    told = json.loads(said.out)
    assert said.code == 0
    assert told["reserve"]["grant"]["target"]["model"] == MODEL
    assert told["release"] == {"released": True}
    assert "commit" not in told


@pytest.mark.process
def test_denied(paceline: Command, address: str) -> None:
    # The default limits are a guess, which makes no lone call impossible: it takes all there is.
    large = ("reserve", "--address", address, "--model", "claude-opus-4-1", "--input-tokens", "100000000")
    paceline(*large)
    said = paceline(*large)
    assert said.code == 3
    assert said.out.startswith("denied (limit, input_tokens of anthropic/default/")
    assert "; come back in " in said.out.splitlines()[0]
    assert said.err == ""
    told = json.loads(paceline(*large, "--json").out)
    assert told["reserve"]["denial"]["reason"] == "DENIAL_REASON_LIMIT"
    assert told.keys() == {"reservation_id", "reserve"}


@pytest.mark.process
def test_of_several_servers_the_first_that_answers_is_asked(paceline: Command, address: str) -> None:
    gone = free_address()
    assert paceline("health", "--address", f"{gone},{address}").out == "SERVING\n"
    assert paceline("health", "--address", f"{address}, {gone}").out == "SERVING\n"
    paceline("pools", "--address", f"{gone},{gone}").is_error(f"no server answers at {gone}")


@pytest.mark.process
def test_pools(paceline: Command, address: str) -> None:
    paceline("reserve", "--address", address, "--model", MODEL)
    said = paceline("pools", "--address", address)
    header, *rows = said.out.splitlines()
    assert header.split() == [
        "pool",
        "state",
        "dimension",
        "window",
        "limit",
        "burst",
        "level",
        "held",
        "source",
        "waiting",
    ]
    assert any(row.startswith("anthropic/default/sonnet") for row in rows)
    assert any("input_tokens" in row for row in rows)
    pools = json.loads(paceline("pools", "--address", address, "--json").out)
    assert {limit["state"]["dimension"] for limit in pools[0]["limits"]} >= {"DIMENSION_REQUESTS"}


@pytest.mark.process
@pytest.mark.process
def test_ledgers(paceline: Command, address: str) -> None:
    assert paceline("reserve", "--model", MODEL, "--address", address).code == 0
    said = paceline("ledgers", "--address", address)
    assert said.code == 0
    head, *rows = said.out.splitlines()
    assert head.split() == ["ledger", "state", "owner", "epoch", "form", "sequence", "open", "waiting", "reason"]
    assert any(row.split()[:2] == ["default", "ready"] for row in rows)
    said = paceline("ledgers", "--json", "--address", address)
    assert [each["name"] for each in json.loads(said.out)] == [row.split()[0] for row in rows]


@pytest.mark.process
def test_ledgers_of_a_server_alone_stay_where_they_are(paceline: Command, address: str) -> None:
    assert paceline("reserve", "--model", MODEL, "--address", address).code == 0
    for arguments in (["finalize"], ["finalize", "default"], ["hand-over", "default"]):
        paceline("ledgers", *arguments, "--address", address).is_error("FAILED_PRECONDITION", "one server alone")
    paceline("ledgers", "hand-over", "nobody", "--to", "x", "--address", address).is_error("NOT_FOUND")
    paceline("ledgers", "hand-over").is_error("LEDGER")


def test_errors_of_the_server(paceline: Command, address: str) -> None:
    paceline("pools", "--address", address, "--ledger", "nope").is_error("NOT_FOUND")
