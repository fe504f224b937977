"""A real server process on the loopback interface, which a proof may kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import grpc

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0
TERM_SECONDS = 20.0


class ServerDied(Exception):
    """The server ended by itself. The message has the end of its log."""


class ServerProcess:
    """``paceline serve`` over one store: a file, unless ``url`` says otherwise. ``module`` is run in its place with the
    same arguments; ``name`` tells the files of several servers in one folder apart."""

    def __init__(self, folder: Path, config: str, *, module: str = "", url: str = "", name: str = "") -> None:
        self.store = folder / "ledgers.db"
        self.url = url or f"embedded:{self.store}"
        self.log = folder / f"{name or 'server'}.log"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.starts = 0
        self._config = folder / f"{name or 'paceline'}.yaml"
        self._config.write_text(config)
        self._command = [sys.executable, "-m", module] if module else [str(Path(sys.executable).with_name("paceline"))]
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def spawn(self) -> None:
        """Start the process, without waiting for anything."""
        if self._log is None:
            self._log = self.log.open("ab")
        self.starts += 1
        self._process = subprocess.Popen(
            [
                *self._command,
                "serve",
                "--config",
                str(self._config),
                "--store",
                self.url,
                "--listen",
                self.address,
                "--metrics-listen",
                "off",
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")},
        )

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Return once it accepts connections. Raises :class:`ServerDied`."""
        deadline = time.monotonic() + seconds
        with grpc.insecure_channel(self.address, options=FAST_RECONNECT) as channel:
            ready = grpc.channel_ready_future(channel)
            while True:
                self.check()
                try:
                    ready.result(timeout=0.2)
                except grpc.FutureTimeoutError:
                    if time.monotonic() > deadline:
                        raise ServerDied(f"no connection within {seconds:.0f} s\n{self.tail()}") from None
                else:
                    return

    def start(self) -> None:
        self.spawn()
        self.wait_ready()

    def check(self) -> None:
        """Raises :class:`ServerDied` if it is not running."""
        if not self.running:
            code = None if self._process is None else self._process.returncode
            raise ServerDied(f"the server ended with code {code}\n{self.tail()}")

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that takes too long."""
        if self._process is None or not self.running:
            return
        self.terminate()
        try:
            self._process.wait(TERM_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()
        if self._log is not None:
            self._log.close()
            self._log = None

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


FAST_RECONNECT: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)
"""Options of a channel to a server that comes back at once."""
