"""Lines to a file that is set aside when it is full, written by a thread of its own: nobody waits for the disk."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from queue import Full, Queue
from typing import Final

import structlog

_log = structlog.get_logger(__name__)

MAX_BATCHES: Final = 32
"""Batches that wait to be written; more are dropped."""
_PIECE = 16
"""Lines that are rendered before other threads get their turn: about 200 µs."""
_WARN_SECONDS = 60.0

Batch = tuple[int, Callable[[], Iterable[bytes]]]
"""How many lines, and what renders them, each without its end."""


class RotatingFile:
    """One file and those set aside: ``PATH``, ``PATH.1`` (the next newest), and so on, ``files`` in all.

    ``offer`` never waits: what the disk does not take in time, or refuses, is dropped and counted.
    """

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        """Raises :class:`OSError` if the file cannot be opened."""
        self.written = 0
        """Lines."""
        self.dropped = 0
        """Lines that had no place, or that the disk refused."""
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._queue: Queue[Batch | None] = Queue(MAX_BATCHES)
        self._refused = 0
        """Of ``dropped``: counted in the thread."""
        self._warned = float("-inf")
        self._size = 0
        self._fd = -1
        self._open()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def offer(self, count: int, render: Callable[[], Iterable[bytes]]) -> bool:
        """Have ``count`` lines written; false if there is no place for them. ``render`` is called in another thread."""
        try:
            self._queue.put_nowait((count, render))
        except Full:
            self.dropped += count
            return False
        return True

    @property
    def lost(self) -> int:
        """All lines that were dropped."""
        return self.dropped + self._refused

    def close(self, timeout: float) -> None:
        """Write what is offered, for at most ``timeout`` seconds. Blocks."""
        until = time.monotonic() + timeout
        with contextlib.suppress(Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(max(0.0, until - time.monotonic()))

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            self._write(*batch)
        if self._fd >= 0:
            os.close(self._fd)

    def _write(self, count: int, render: Callable[[], Iterable[bytes]]) -> None:
        left = count
        try:
            lines = iter(render())
            while piece := [line + b"\n" for line in islice(lines, _PIECE)]:
                self._put(piece)
                left -= len(piece)
                self.written += len(piece)
                # Others need not wait until the interpreter takes the turn away.
                time.sleep(0)
        except Exception as error:
            self._refused += left
            self._warn(error)

    def _put(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        if self._fd < 0:
            self._open()
        if self._size and self._size + len(data) > self._max_bytes:
            self._rotate()
        try:
            rest = memoryview(data)
            while rest:
                done = os.write(self._fd, rest)
                self._size += done
                rest = rest[done:]
        except OSError:
            os.close(self._fd)
            self._fd = -1
            raise

    def _open(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            # A crash cut the last line short.
            size += os.write(fd, b"\n")
        self._fd, self._size = fd, size

    def _rotate(self) -> None:
        os.close(self._fd)
        self._fd = -1
        for number in range(self._files - 1, 0, -1):
            source = self._aside(number - 1)
            if source.exists():
                source.replace(self._aside(number))
        if self._files == 1:
            self._path.unlink(missing_ok=True)
        self._open()

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _warn(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._warned >= _WARN_SECONDS:
            self._warned = now
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            _log.warning("the audit cannot be written; its lines are dropped", path=str(self._path), error=reason)
