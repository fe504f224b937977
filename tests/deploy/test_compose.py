"""The Compose file: valid, confined, and what it mounts and configures is there and fits together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from paceline import __version__
from paceline.config import load_config
from tests.deploy.tooling import ROOT, module_file
from tests.ports import free_ports

FILE = ROOT / "deploy" / "compose.yaml"
FOLDER = FILE.parent
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
CONFIG = load_config(FOLDER / "compose" / "paceline.yaml", {})


def validator() -> jsonschema.protocols.Validator:
    return jsonschema.Draft7Validator(module_file("compose"))


def test_is_valid() -> None:
    validator().validate(COMPOSE)


def test_the_validator_notices() -> None:
    wrong = {**COMPOSE, "services": {"server": {**SERVICES["server"], "port": ["1:1"]}}}
    with pytest.raises(jsonschema.ValidationError):
        validator().validate(wrong)


@pytest.mark.parametrize("name", SERVICES)
def test_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    # Ours have a user of their own in the image.
    assert service["image"].startswith("paceline") or int(service["user"].split(":")[0]) > 0
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:")
    tag = service["image"].partition(":")[2]
    assert re.fullmatch(r"v?\d+\.\d+\.\d+(-\w+)?", tag)
    assert tag == __version__ or not service["image"].startswith("paceline")


@pytest.mark.parametrize("name", SERVICES)
def test_what_it_mounts_and_builds_is_there(name: str) -> None:
    service = SERVICES[name]
    for mount in service.get("volumes", ()):
        source = mount.split(":")[0]
        if source.startswith("."):
            assert (FOLDER / source).is_file()
            assert mount.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]
    build = service.get("build")
    if build is not None:
        assert (FOLDER / build["context"] / build["dockerfile"]).is_file()
    assert set(service.get("depends_on", ())) <= SERVICES.keys()


def test_the_servers_configuration_fits() -> None:
    server = SERVICES["server"]
    assert CONFIG.store == "redis://redis:6379/0"
    assert server["ports"] == [f"127.0.0.1:7133-7135:{CONFIG.listen.rpartition(':')[2]}"]
    assert int(server["stop_grace_period"].removesuffix("s")) > CONFIG.limits.drain_timeout_us / 1e6 + 5
    assert not CONFIG.peer_listen.startswith("127.")
    # The image says otherwise, and an empty variable counts for none.
    assert server["environment"]["PACELINE_STORE"] == ""
    (job,) = yaml.safe_load((FOLDER / "compose" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    (target,) = job["dns_sd_configs"]
    assert target == {"names": ["server"], "type": "A", "port": int(CONFIG.metrics_listen.rpartition(":")[2])}


def test_the_simulator_s_image_is_locked_to_what_is_tested() -> None:
    def pins(name: str) -> dict[str, str]:
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))

    assert "aiohttp" in pins("upstream.txt")
    assert pins("upstream.txt").items() <= pins("dev.txt").items()
    assert "!requirements/upstream.txt" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="hadolint is not locked for Windows")
def test_hadolint() -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "hadolint"),
            "--no-color",
            # The base is the image that Compose has just built.
            "--ignore=DL3006",
            str(FOLDER / "compose" / "upstream.Dockerfile"),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running(*arguments: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "paceline", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        # It says where it listens once it does.
        assert process.stdout.readline()
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait(5)
            process.stdout.close()


@pytest.mark.process
def test_the_fleet_calls_and_commits() -> None:
    coordinator, metrics, simulator = free_ports(3)
    limits = [argument for argument in SERVICES["upstream"]["command"] if argument.startswith("--limit")]
    with ExitStack() as stack:
        addresses = (f"--listen=127.0.0.1:{coordinator}", f"--metrics-listen=127.0.0.1:{metrics}")
        stack.enter_context(running("serve", *addresses))
        stack.enter_context(running("upstream", "--host=127.0.0.1", f"--port={simulator}", *limits))
        done = subprocess.run(
            [sys.executable, str(FOLDER / "compose" / "fleet.py")],
            env={
                **os.environ,
                "UPSTREAM": f"http://127.0.0.1:{simulator}",
                "PACELINE_ADDRESS": f"127.0.0.1:{coordinator}",
                "PACELINE_POLICY": "closed",
                "SECONDS": "2",
                "CALLERS": "4",
            },
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        # The client warns of calls whose usage nobody reported.
        assert done.stderr == ""
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as answer:
            figures = answer.read().decode()
    fates = json.loads(done.stdout.splitlines()[-1])
    settled = re.findall(r"^paceline_settlements_total\{.*\} ([\d.]+)$", figures, re.MULTILINE)
    assert fates == {"answered": sum(map(float, settled))}
