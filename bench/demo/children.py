"""Processes that a run starts: their lines, their end. Every wait is bounded, and none outlives the run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import psutil

START_S = 30.0
STOP_S = 8.0
LINE_BYTES = 4 * 1024 * 1024
_TAIL_BYTES = 2_000


class ChildFailed(Exception):
    """A process did not do its part; the message says which, and the last of what it wrote."""


class Child:
    """A running process. What it writes to its standard output is read always, so that it never blocks on it."""

    def __init__(self, name: str, process: Process, log: Path, on_line: Callable[[bytes], None] | None) -> None:
        self.name = name
        self._process = process
        self._log = log
        self._on_line = on_line
        self._lines: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1_000)
        self.usage = psutil.Process(process.pid)
        self._reader = asyncio.create_task(self._read())

    @property
    def running(self) -> bool:
        """It has not ended."""
        return self._process.returncode is None

    async def line_with(self, text: str, timeout: float = START_S) -> str:
        """The next line that contains ``text``. Raises :class:`ChildFailed`."""
        try:
            async with asyncio.timeout(timeout):
                while line := await self._lines.get():
                    if text.encode() in line:
                        return line.decode().strip()
        except TimeoutError:
            raise self.failed(f"said nothing of {text!r} within {timeout:.0f} s") from None
        raise self.failed("ended early")

    async def tell(self, line: bytes) -> None:
        """Write one line to its standard input. Raises :class:`ChildFailed`."""
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(line + b"\n")
            async with asyncio.timeout(START_S):
                await pipe.drain()
        except (OSError, TimeoutError):
            raise self.failed("takes no orders") from None

    async def ended(self, timeout: float) -> int:
        """Its exit status. Raises :class:`ChildFailed` if it is still there after ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                status = await self._process.wait()
                await self._reader
                return status
        except TimeoutError:
            raise self.failed(f"did not end within {timeout:.0f} s") from None

    async def stop(self) -> None:
        """End it: politely, then not. Returns when it is gone."""
        for force in (signal.SIGTERM, signal.SIGKILL):
            if not self.running:
                break
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(force)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()
        self._reader.cancel()
        await asyncio.wait({self._reader}, timeout=1.0)

    def failed(self, what: str) -> ChildFailed:
        """An error that says what this process did wrong, with the end of its log."""
        status = self._process.returncode
        ended = "" if status is None else f" (exit status {status})"
        with contextlib.suppress(OSError):
            tail = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
            if tail:
                return ChildFailed(f"{self.name} {what}{ended}; the end of {self._log}:\n{tail}")
        return ChildFailed(f"{self.name} {what}{ended}")

    async def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        while line := await pipe.readline():
            if self._on_line is not None:
                self._on_line(line)
            else:
                with contextlib.suppress(asyncio.QueueFull):
                    self._lines.put_nowait(line)
        with contextlib.suppress(asyncio.QueueFull):
            self._lines.put_nowait(b"")


@contextlib.asynccontextmanager
async def child(
    name: str, module: str, arguments: Sequence[str], logs: Path, on_line: Callable[[bytes], None] | None = None
) -> AsyncIterator[Child]:
    """Run ``python -m module``; what it writes to its standard error goes to a file in ``logs``. Stopped at the end."""
    log = logs / f"{name}.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=PIPE if on_line is not None else DEVNULL,
            stdout=PIPE,
            stderr=errors,
            limit=LINE_BYTES,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    running = Child(name, process, log, on_line)
    try:
        yield running
    finally:
        await running.stop()
