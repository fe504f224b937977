"""A fault proxy for TCP: Toxiproxy, built from its Go module at the version that ``toxiproxy_module/go.mod`` pins.

It stands between the servers and Redis, and does what a network does: delays, drops all bytes of one direction while
the connection stays up, resets, refuses. The kernel's own means (network namespaces, netem) need rights that a test
runner may not have.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.ports import free_port
from tests.proofs.process import ROOT

MODULE = Path(__file__).with_name("toxiproxy_module")
BINARY = ROOT / "build" / "toxiproxy" / "toxiproxy-server"
PACKAGE = "github.com/Shopify/toxiproxy/v2/cmd/server"
BUILD_SECONDS = 300
START_SECONDS = 10.0

Direction = Literal["upstream", "downstream"]
"""``upstream``: what the servers send to Redis; ``downstream``: what Redis answers."""


def build() -> Path:
    """The proxy's binary, compiled at the first use. Skips the test where Go is missing, and fails it in CI."""
    if shutil.which("go") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("the fault proxy is built with go, which is not installed")
        pytest.skip("the fault proxy is built with go, which is not installed")
    BINARY.parent.mkdir(parents=True, exist_ok=True)
    with (BINARY.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pinned = MODULE / "go.sum"
        if BINARY.exists() and BINARY.stat().st_mtime > pinned.stat().st_mtime:
            return BINARY
        environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"}
        command = ["go", "build", "-o", str(BINARY), PACKAGE]
        subprocess.run(command, cwd=MODULE, env=environment, check=True, timeout=BUILD_SECONDS)
        os.utime(BINARY)
    return BINARY


class Proxy:
    """One listening port in front of one address."""

    def __init__(self, control: str, name: str, target: str) -> None:
        self._control = control
        self._name = name
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._ask("POST", "/proxies", {"name": name, "listen": self.address, "upstream": target, "enabled": True})

    def slow(self, milliseconds: int, jitter: int = 0) -> None:
        """Delay what is sent and what is answered, each by half of ``milliseconds``."""
        for direction in ("upstream", "downstream"):
            attributes = {"latency": milliseconds // 2, "jitter": jitter // 2}
            self._toxic("latency", direction, attributes)

    def cut(self, direction: Direction) -> None:
        """Let everything of one direction vanish; connections stay up, old and new ones."""
        self._toxic("timeout", direction, {"timeout": 0})

    def black_hole(self) -> None:
        """Let everything vanish, both ways."""
        self.cut("upstream")
        self.cut("downstream")

    def reset(self) -> None:
        """Break every connection with a reset, and every new one, until :meth:`heal`."""
        self._toxic("reset_peer", "downstream", {"timeout": 0})

    def refuse(self) -> None:
        """Close the port and all its connections, until :meth:`heal`."""
        self._ask("POST", f"/proxies/{self._name}", {"enabled": False})

    def heal(self) -> None:
        """No fault from now on. What was held back by :meth:`cut` is lost, and its connections are closed."""
        for toxic in self._ask("GET", f"/proxies/{self._name}/toxics"):
            self._ask("DELETE", f"/proxies/{self._name}/toxics/{toxic['name']}")
        self._ask("POST", f"/proxies/{self._name}", {"enabled": True})

    def _toxic(self, kind: str, direction: str, attributes: dict[str, int]) -> None:
        body = {"type": kind, "stream": direction, "name": f"{kind}-{direction}", "attributes": attributes}
        self._ask("POST", f"/proxies/{self._name}/toxics", body)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self._control}{path}", data=data, method=method)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=10) as answer:
            content = answer.read()
        return json.loads(content) if content else None


class Toxiproxy:
    """The proxy's process. Its proxies are made with :meth:`proxy`."""

    def __init__(self) -> None:
        binary = build()
        port = free_port()
        self._control = f"127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [str(binary), "-host", "127.0.0.1", "-port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"LOG_LEVEL": "error"},
        )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://{self._control}/version", timeout=1):
                    return
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.close()
                    raise RuntimeError("the fault proxy did not start") from None
                time.sleep(0.02)

    def proxy(self, name: str, target: str) -> Proxy:
        """A proxy in front of ``target``, ``HOST:PORT``."""
        return Proxy(self._control, name, target)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def toxiproxy() -> Iterator[Toxiproxy]:
    """A running proxy, gone at the end."""
    process = Toxiproxy()
    try:
        yield process
    finally:
        process.close()
