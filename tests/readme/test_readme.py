"""The README does what it says: its commands are run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
SHELL = [line.split("  #")[0].strip() for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
HOOK, BLOCK = (body for kind, body in BLOCKS if kind == "python")
INLINE = re.findall(r"`((?:make|paceline) [^`\n]+)`", README)
SERVE = ".venv/bin/paceline serve"
UPSTREAM = ".venv/bin/paceline upstream --port 7180"
REPORT = ".venv/bin/paceline report"
GRPCURL = ROOT / "build" / "contract" / "grpcurl"


def run(command: str, seconds: float = 120, folder: Path = ROOT, **environ: str) -> str:
    """Run a line of the README in a shell; its output."""
    path = f"{GRPCURL}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not listen")


def started(command: str, port: int) -> Iterator[None]:
    """A command of the README that runs until it is stopped."""
    process = subprocess.Popen([*command.split()], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(40)


@pytest.fixture(scope="module")
def served() -> Iterator[None]:
    """The README's server, on its own port."""
    yield from started(SERVE, 7133)


@pytest.fixture(scope="module")
def simulated() -> Iterator[None]:
    """The README's upstream, on its own port."""
    yield from started(UPSTREAM, 7180)


def python(lines: str, **environ: str) -> str:
    """Run lines of Python that may not warn; their output."""
    done = subprocess.run(
        [ROOT / ".venv" / "bin" / "python", "-W", "error", "-"],
        input=lines,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_command_is_known_here() -> None:
    assert SHELL[:5] == ["make demo", "make test", "make env", SERVE, UPSTREAM]
    assert [" ".join(line.split()[:2]) for line in SHELL[5:]] == [
        "grpcurl -plaintext",
        ".venv/bin/paceline pools",
        ".venv/bin/paceline limits",
        ".venv/bin/paceline advise",
        REPORT,
    ]
    told = {" ".join(line.split()[:2]) for line in INLINE}
    assert told == {"paceline serve", "paceline config"}


@pytest.mark.timeout(300)
def test_the_environment_is_made() -> None:
    run("make env", 280)


@pytest.mark.process
@pytest.mark.xdist_group("port-7133")
def test_the_python_lines(served: None) -> None:
    assert len(BLOCK.strip().splitlines()) == 5
    python(BLOCK + "assert not grant.local, 'no server was asked'\npaceline.close()\n")


@pytest.mark.process
@pytest.mark.xdist_group("port-7133")
def test_the_hook_and_the_report(served: None, simulated: None) -> None:
    assert len(HOOK.strip().splitlines()) == 5
    (address,) = re.findall(r"ANTHROPIC_BASE_URL=(\S+)", README)
    upstream = {"ANTHROPIC_BASE_URL": address, "ANTHROPIC_API_KEY": "any"}
    assert "output_tokens=" in python(HOOK, **upstream)
    assert "output_tokens=" in python(HOOK, **upstream, PACELINE_MODE="observe")
    modes = {row["mode"] for row in json.loads(run(f"{REPORT} --tenant search --json"))}
    assert modes == {"MODE_ENFORCE", "MODE_OBSERVE"}


@pytest.mark.process
@pytest.mark.xdist_group("port-7133")
@pytest.mark.timeout(400)
def test_the_grpcurl_line_and_the_pools(served: None) -> None:
    if shutil.which("grpcurl", path=f"{GRPCURL}{os.pathsep}{os.environ['PATH']}") is None:
        if shutil.which("go") is None and os.environ.get("CI") != "true":
            pytest.skip("grpcurl is not installed, and no Go to build it with")
        run(
            f"go build -o {GRPCURL / 'grpcurl'} github.com/fullstorydev/grpcurl/cmd/grpcurl",
            380,
            ROOT / "tests/contract/go",
        )
    answer = json.loads(run(SHELL[5], 30))
    assert answer["grant"]["pool"] == "anthropic/default/sonnet-5"
    assert "sonnet-5" in run(SHELL[6], 30, COLUMNS="200")


@pytest.mark.process
@pytest.mark.xdist_group("port-7133")
def test_the_limits_and_the_advice(served: None) -> None:
    python(BLOCK + "paceline.close()\n")
    limits, advise = SHELL[7:9]
    assert "anthropic/default/sonnet-5 · open" in run(limits, 30)
    assert "nothing to advise: only " in run(advise, 30)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_demo() -> None:
    assert "limit used" in run("make demo DEMO_SECONDS=4", 150)


def test_make_test_is_what_ci_runs() -> None:
    assert "pytest" in run("make -n test")
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")


@pytest.mark.process
def test_adoption_with_a_file(tmp_path: Path) -> None:
    """The first two steps of adoption: a file for the books, a checked configuration in observe mode."""
    paceline = ROOT / ".venv" / "bin" / "paceline"
    assert "paceline serve --store embedded:paceline.db --config paceline.yaml" in INLINE
    (mode,) = re.findall(r"`(modes: \{[^`]+\})`", README)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "paceline.yaml").write_text(f"listen: 127.0.0.1:{port}\n{mode}\n")
    run(f"{paceline} config check paceline.yaml", 30, tmp_path)
    run(f"{paceline} config check {ROOT}/docs/config.example.yaml", 30, tmp_path)
    process = subprocess.Popen(
        [paceline, "serve", "--store", "embedded:paceline.db", "--config", "paceline.yaml"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    assert (tmp_path / "paceline.db").exists()


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
