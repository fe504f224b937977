"""``paceline upstream`` as a process: starts, serves, stops."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import anthropic
import pytest

PACELINE = str(Path(sys.executable).parent / "paceline")
READY = "paceline upstream: listening on "

pytestmark = pytest.mark.process


class Running:
    """A simulator, ready."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [PACELINE, "upstream", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line.startswith(READY), line
        self.url = line.removeprefix(READY)

    def truth(self) -> Any:
        with urllib.request.urlopen(f"{self.url}/sim/truth", timeout=10) as response:
            return json.load(response)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


def test_serves_with_its_options_and_stops_on_sigterm() -> None:
    running = Running(
        *("--limit", "requests=50", "--limit", "input_tokens=2000", "--limit", "tokens=900"),
        *("--burst-seconds", "30", "--initial", "0.2", "--seed", "7"),
        *("--scenario", "first_byte_ms=0", "--scenario", "tokens_per_second=100"),
    )
    try:
        assert running.url.startswith("http://127.0.0.1:")
        buckets = {
            (name, dimension): (bucket["limit"], bucket["burst"], bucket["start"])
            for name, group in running.truth()["groups"].items()
            for dimension, bucket in group["buckets"].items()
        }
        assert buckets == {
            ("claude", "requests"): (50, 25, 5),
            ("claude", "input_tokens"): (2_000, 1_000, 200),
            ("claude", "output_tokens"): (400_000, 200_000, 40_000),
            ("gpt", "requests"): (50, 25, 5),
            ("gpt", "tokens"): (900, 450, 90),
        }
        with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as client:
            ask: dict[str, Any] = {
                "model": "claude-opus-5",
                "max_tokens": 9_999,
                "messages": [{"role": "user", "content": "hello"}],
            }
            headers = {"x-paceline-output": "7"}
            assert client.messages.create(**ask, extra_headers=headers).usage.output_tokens == 7
            # Stopping does not wait for an answer that takes minutes.
            with client.messages.create(**ask, stream=True, extra_headers={"x-paceline-output": "9999"}) as stream:
                next(iter(stream))
                code, out, err = running.stop()
        assert (code, out, err) == (0, "", "")
    finally:
        running.process.kill()
        running.process.wait()


def test_file_and_groups_and_sigint(tmp_path: Path) -> None:
    file = tmp_path / "up.yaml"
    file.write_text("config: {initial: 0.5}\nscenario: {headers: false}\n")
    running = Running(
        *("--config", str(file), "--model-group", "o:gpt-5*,gpt-6:requests=3,tokens=9"),
        *("--model-group", "c:claude-opus-5:requests=3,input_tokens=9,output_tokens=8"),
    )
    try:
        truth = running.truth()
        assert {name: (group["api"], group["models"]) for name, group in truth["groups"].items()} == {
            "o": ("openai", ["gpt-5*", "gpt-6"]),
            "c": ("anthropic", ["claude-opus-5"]),
        }
        assert truth["scenario"]["headers"] is False
        assert truth["groups"]["o"]["buckets"]["tokens"]["start"] == 4
        assert running.stop(signal.SIGINT) == (0, "", "")
    finally:
        running.process.kill()
        running.process.wait()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--limit", "cats=3"], "--limit cats=3: there is no such dimension"),
        (["--limit", "requests=0"], "limits"),
        (["--initial", "2"], "initial"),
        (["--scenario", "what=1"], "what: there is no such field"),
        (["--model-group", "a:b"], "--model-group a:b"),
        (["--config", "/nonexistent"], "/nonexistent"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1:0"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    from paceline.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["upstream", *arguments])
    told = capsys.readouterr()
    assert stopped.value.code == 2
    assert named in told.err
    assert (told.err.count("\n"), told.out) == (1, "")


def test_without_aiohttp_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from paceline.cli import main

    for name in [
        name for name in sys.modules if name.split(".")[0] == "aiohttp" or name.startswith("paceline.upstream.http")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(SystemExit):
        main(["upstream"])
    assert capsys.readouterr().err == "error: the simulator needs aiohttp: pip install 'paceline[upstream]'\n"
