"""How long processes wanted a core and had none: what a busy machine does to a run, whoever keeps it busy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path


class Want:
    """Starts when it is made. ``processes``: name → process id."""

    def __init__(self, processes: Mapping[str, int]) -> None:
        self._processes = dict(processes)
        self._began = time.monotonic()
        self._before = {name: _waited_s(number) for name, number in self._processes.items()}

    def read(self) -> dict[str, float]:
        """By process: the part of the time since the start in which its main thread could run and did not. Those that
        have ended, and all where the system does not tell, are missing."""
        seconds = max(1e-3, time.monotonic() - self._began)
        found = {}
        for name, number in self._processes.items():
            before, now = self._before[name], _waited_s(number)
            if before is not None and now is not None:
                found[name] = (now - before) / seconds
        return found


def _waited_s(number: int) -> float | None:
    """Seconds on the run queue since it began. ``None``: it has ended, or this is not Linux."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{number}/schedstat").read_text().split()[1]) / 1e9
    return None
