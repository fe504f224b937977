"""How busy the machine was: a run that wants for processor time measures that, and not what it is about."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from bench.demo.children import Child


@dataclass(frozen=True, slots=True)
class Busy:
    """Parts of a core, over a window."""

    cores: tuple[float, ...]
    processes: Mapping[str, float]

    @property
    def busiest(self) -> float:
        """The busiest core, or the process that filled most of one: one that moves between cores hides in both."""
        return max((*self.cores, *self.processes.values()), default=0.0)


class Meter:
    """Starts when it is made."""

    def __init__(self, children: list[Child]) -> None:
        self._children = children
        self._began = time.monotonic()
        self._cores = _cores()
        self._used = {child.name: _used(child) for child in children}

    def read(self) -> Busy:
        """Since the start."""
        seconds = max(1e-3, time.monotonic() - self._began)
        cores = []
        for (busy, total), (busy_before, total_before) in zip(_cores(), self._cores, strict=True):
            cores.append((busy - busy_before) / max(1e-3, total - total_before))
        processes = {child.name: (_used(child) - self._used[child.name]) / seconds for child in self._children}
        return Busy(tuple(cores), processes)


def _cores() -> list[tuple[float, float]]:
    found = []
    for core in psutil.cpu_times(percpu=True):
        # Guest time is part of user time already.
        total = sum(core) - getattr(core, "guest", 0.0) - getattr(core, "guest_nice", 0.0)
        found.append((total - core.idle - getattr(core, "iowait", 0.0), total))
    return found


def _used(child: Child) -> float:
    try:
        times = child.usage.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
