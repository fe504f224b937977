"""Several processes on one address: a parent starts them, starts dead ones again, and ends them all.

Each listens on the same port, and the kernel deals connections out. Over a store that several processes may have open
each owns ledgers of its own. An embedded store is the first worker's, which owns all ledgers; the others pass
everything to it over a socket in a private directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

import paceline
from paceline.frontend.membership import Worker
from paceline.frontend.peers.rpc import new_key
from paceline.frontend.server import StartError, probe

_log = structlog.get_logger(__name__)

VARIABLE = "PACELINE_WORKER"
"""Tells a worker which one it is. Set by the parent alone."""
MAX_WORKERS = 64
_START_SECONDS = 60.0
_BACKOFF_SECONDS = 0.1
_BACKOFF_MOST_SECONDS = 5.0
_SETTLED_SECONDS = 10.0
"""A worker that lived so long is started again at once."""
_MARGIN_SECONDS = 5.0
"""Beyond the drain timeout, before a worker is killed."""
_KEY_FILE = "key"


class _Told(msgspec.Struct, frozen=True):
    """The variable's content."""

    index: int
    count: int
    generation: int
    directory: str
    listen: str


def worker_of(environ: Mapping[str, str]) -> Worker | None:
    """Which worker this process is; ``None``: it is none. Raises :class:`~paceline.frontend.server.StartError`."""
    given = environ.get(VARIABLE)
    if given is None:
        return None
    try:
        told = msgspec.json.decode(given, type=_Told)
        key = (Path(told.directory) / _KEY_FILE).read_bytes()
    except (msgspec.DecodeError, OSError):
        raise StartError(f"{VARIABLE} is set by --workers alone: unset it") from None
    return Worker(told.index, told.count, told.generation, told.directory, key, told.listen)


class _Child:
    """One worker, from start to start."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.generation = 0
        self.process: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        self.was_ready = False


class Parent:
    """Keeps ``count`` workers alive. ``command`` starts one; ``listen`` is ``HOST:PORT``."""

    def __init__(self, count: int, listen: str, command: Sequence[str], drain_seconds: float) -> None:
        self._count = count
        self._listen = listen
        self._command = tuple(command)
        self._drain_seconds = drain_seconds
        self._directory = ""
        self._stopping = asyncio.Event()
        self._failed = False

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; the exit code. Raises :class:`~paceline.frontend.server.StartError`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        with reserve_port(self._listen) as address:
            self._directory = tempfile.mkdtemp(prefix="paceline-")
            try:
                return await self._run(address)
            finally:
                shutil.rmtree(self._directory, ignore_errors=True)

    async def _run(self, address: str) -> int:
        key = os.open(f"{self._directory}/{_KEY_FILE}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(key, "wb") as file:
            file.write(new_key())
        children = [_Child(index) for index in range(self._count)]
        keeping = [asyncio.create_task(self._keep(child, address)) for child in children]
        everybody = asyncio.gather(*(child.ready.wait() for child in children))
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((everybody, stopped), timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if everybody.done():
            sys.stdout.write(f"paceline {paceline.__version__} listens on {address}\n")
            sys.stdout.flush()
        else:
            everybody.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await everybody
            self._failed = self._failed or not self._stopping.is_set()
            self._stopping.set()
        await stopped
        await self._end(children, keeping)
        return 2 if self._failed else 0

    async def _keep(self, child: _Child, address: str) -> None:
        backoff = _BACKOFF_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._once(child, address)
            if self._stopping.is_set():
                return
            if not child.was_ready and code == 2:
                # It said why, and the next one would say the same.
                self._failed = True
                self._stopping.set()
                return
            backoff = _BACKOFF_SECONDS if time.monotonic() - began > _SETTLED_SECONDS else backoff
            _log.error("worker ended, and is started again", worker=child.index, code=code, after_seconds=backoff)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff):
                    await self._stopping.wait()
            backoff = min(2 * backoff, _BACKOFF_MOST_SECONDS)
            child.generation += 1

    async def _once(self, child: _Child, address: str) -> int:
        told = _Told(child.index, self._count, child.generation, self._directory, address)
        process = await asyncio.create_subprocess_exec(
            *self._command,
            # Its end tells the worker that the parent is gone.
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {VARIABLE: msgspec.json.encode(told).decode()},
            # Signals of a terminal reach the parent alone, which passes them on.
            start_new_session=True,
        )
        child.process = process
        out = process.stdout
        if out is not None and await out.readline():
            child.was_ready = True
            child.ready.set()
            while await out.readline():
                pass
        return await process.wait()

    async def _end(self, children: Sequence[_Child], keeping: Sequence[asyncio.Task[None]]) -> None:
        for child in children:
            _signal(child, signal.SIGTERM)
        _, late = await asyncio.wait(keeping, timeout=self._drain_seconds + _MARGIN_SECONDS)
        if late:
            _log.error("workers did not end in time", workers=len(late))
            for child in children:
                _signal(child, signal.SIGKILL)
            await asyncio.wait(late, timeout=_MARGIN_SECONDS)


def _signal(child: _Child, number: signal.Signals) -> None:
    process = child.process
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


@contextlib.contextmanager
def reserve_port(listen: str) -> Iterator[str]:
    """Hold ``HOST:PORT`` for the workers, which listen on it together. Gives the address with the port that it became.

    Raises :class:`~paceline.frontend.server.StartError`.
    """
    if listen.startswith("unix:"):
        raise StartError("several workers cannot listen on one socket file: give HOST:PORT in `listen`")
    probe(listen)
    host, _, port = listen.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind(address)
        except OSError as error:
            raise StartError(f"cannot listen on {listen}: {error.strerror}") from None
        yield f"{host}:{held.getsockname()[1]}"


def run_workers(count: int, listen: str, arguments: Sequence[str], drain_seconds: float) -> int:
    """Run ``count`` workers, each started as this program with ``arguments``; the exit code."""
    try:
        with asyncio.Runner() as runner:
            command = (sys.executable, "-m", "paceline", *arguments)
            return runner.run(Parent(count, listen, command, drain_seconds).run())
    except StartError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"error: {line}\n")
        return 2
