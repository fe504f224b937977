"""A server in a process of its own, for benchmarks: on a free port, pinned to one core if asked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

_START_SECONDS = 20.0


class Running(NamedTuple):
    """Where the server listens, and its process."""

    address: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """CPU time that the server has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def server(store: str, config: Path | None = None, core: int | None = None) -> Iterator[Running]:
    """Run ``paceline serve``; it is stopped at the end. ``core`` pins it there."""
    command = [sys.executable, "-m", "paceline", "serve", "--listen", "127.0.0.1:0", "--store", store]
    if config is not None:
        command += ["--config", str(config)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        yield Running(_address(child), _pinned(child.pid, core))
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _address(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        line = child.stdout.readline()
        if not line:
            break
        if "listens on" in line:
            return line.split()[-1]
    raise RuntimeError("the server did not start")


def _pinned(pid: int, core: int | None) -> psutil.Process:
    process = psutil.Process(pid)
    if core is not None:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {core})
    return process
