"""Several servers over one Redis, as processes of this machine, and client processes that use them.

Everything blocks, for bounded times. Nothing here imports the server's code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2

from paceline_client.stubs import v1 as pb
from tests.proofs.process import FAST_RECONNECT, ROOT, ServerDied, ServerProcess

LEDGER = "default"
MODEL = "claude-sonnet-5"
POOL = "sonnet-5"
KEEPING = "tests.replicas.keeping"
"""``paceline``, whose journal keeps what it would trim."""
READY_SECONDS = 30.0
CLIENT_END_SECONDS = 60.0

AMPLE = {"requests": 100_000_000, "input_tokens": 1_000_000_000_000, "output_tokens": 1_000_000_000_000}
"""Limits a minute that no load here reaches."""


def pool_config(limits: dict[str, Any], more: str = "") -> str:
    """A server's configuration with one pool, full at the start, whose limits no header changes."""
    return f"""
log_level: info
accounts:
  {LEDGER}:
    provider: anthropic
    monthly_spend_cap: unlimited
    pools:
      {POOL}: {json.dumps(limits | {"learn": False})}
defaults: {{initial_fill: 1.0}}
{more}
"""


class Server(ServerProcess):
    """One server of a fleet."""

    def __init__(self, folder: Path, number: int, config: str, url: str, module: str = "") -> None:
        self.number = number
        self.name = f"s{number}"
        self.paused = False
        super().__init__(folder, f"node: {self.name}\n{config}", module=module, url=url, name=self.name)

    def healthy(self, timeout: float = 1.0) -> bool:
        """Whether it says that it serves."""
        with grpc.insecure_channel(self.address, options=FAST_RECONNECT) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            try:
                answer = check(health_pb2.HealthCheckRequest(), timeout=timeout)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_healthy(self, seconds: float = READY_SECONDS) -> None:
        """Raises :class:`~tests.proofs.process.ServerDied`."""
        deadline = time.monotonic() + seconds
        while not self.healthy():
            self.check()
            if time.monotonic() > deadline:
                raise ServerDied(f"{self.name} does not serve within {seconds:.0f} s\n{self.tail()}")
            time.sleep(0.05)

    def ledgers(self, timeout: float = 1.0) -> list[pb.Ledger]:
        """What it says of the ledgers; nothing if it does not answer."""
        with grpc.insecure_channel(self.address, options=FAST_RECONNECT) as channel:
            try:
                return list(pb.AdminServiceStub(channel).ListLedgers(pb.ListLedgersRequest(), timeout=timeout).ledgers)
            except grpc.RpcError:
                return []

    def hand_over(self, ledger: str = LEDGER, node: str = "", timeout: float = 10.0) -> str:
        """Have a ledger handed over, by an administrator who asks this server. The node that may take it."""
        with grpc.insecure_channel(self.address, options=FAST_RECONNECT) as channel:
            request = pb.HandOverLedgerRequest(ledger=ledger, node=node)
            return str(pb.AdminServiceStub(channel).HandOverLedger(request, timeout=timeout).node)

    def pause(self) -> None:
        """SIGSTOP: it stands still, with its connections open."""
        os.kill(self.pid, signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self.paused = False

    def wait_end(self, seconds: float) -> int:
        """The exit code, after :meth:`terminate`. Raises ``TimeoutExpired``."""
        assert self._process is not None
        return self._process.wait(seconds)

    def spawn(self) -> None:
        self.paused = False
        super().spawn()


class Fleet:
    """``count`` servers. ``urls``: the store's, one for all or one for each; ``own``: lines of each one's own
    configuration; ``module`` is run in the place of ``paceline`` (empty: that itself)."""

    def __init__(
        self,
        folder: Path,
        count: int,
        config: str,
        urls: str | Sequence[str],
        *,
        module: str = KEEPING,
        own: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        each = [urls] * count if isinstance(urls, str) else urls
        self.servers = [
            Server(
                folder,
                number,
                (f"{own[number]}\n" if own else "") + config,
                each[number],
                module,
            )
            for number in range(count)
        ]

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    def start(self) -> None:
        """All at once. Returns when all are healthy."""
        for server in self.servers:
            server.spawn()
        for server in self.servers:
            server.wait_healthy()

    def awake(self) -> list[Server]:
        return [server for server in self.servers if server.running and not server.paused]

    def ledger(self, name: str = LEDGER) -> pb.Ledger | None:
        """The ledger as the server sees it that knows of the highest epoch."""
        found = [ledger for server in self.awake() for ledger in server.ledgers() if ledger.name == name]
        return max(found, key=lambda ledger: ledger.epoch, default=None)

    def epoch(self, name: str = LEDGER) -> int:
        """The highest that anybody knows of; 0: none."""
        found = self.ledger(name)
        return 0 if found is None else found.epoch

    def owner(self, ledger: str = LEDGER) -> Server | None:
        """Who owns it, as far as those know who can be asked."""
        found = self.ledger(ledger)
        if found is None:
            return None
        return next((server for server in self.servers if server.name == found.owner), None)

    def wait_owner(self, ledger: str = LEDGER, *, but: Server | None = None, seconds: float = READY_SECONDS) -> Server:
        """The owner, once there is one (another one than ``but``) that serves."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.owner(ledger)
            if found is not None and found is not but:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"nobody owns {ledger} within {seconds:.0f} s:\n{self.tails()}")
            time.sleep(0.05)

    def tails(self, lines: int = 15) -> str:
        """The ends of all logs."""
        return "\n".join(f"--- {server.name}\n{server.tail(lines)}" for server in self.servers)

    def faults(self) -> list[str]:
        """What no server should ever log: tracebacks, and errors of the event loop."""
        found = []
        for server in self.servers:
            text = server.log.read_text(errors="replace") if server.log.exists() else ""
            for word in ("Traceback (most recent call last)", "was never retrieved", "never awaited"):
                if word in text:
                    at = text.index(word)
                    found.append(f"{server.name} logged: {text[max(0, at - 200) : at + 1_500]}")
        return found

    def close(self) -> None:
        for server in self.servers:
            with contextlib.suppress(OSError, AssertionError):
                if server.paused:
                    server.resume()
            server.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Clients:
    """Processes of :mod:`tests.replicas.traffic`. ``options`` are its options, with ``-`` written ``_``."""

    def __init__(self, folder: Path, addresses: Sequence[str], *, seed: int, count: int = 1, **options: Any) -> None:
        self.logs = [folder / f"client-{seed}-{number}.log" for number in range(count)]
        self.progress: list[dict[str, Any]] = [{} for _ in range(count)]
        self.history: list[tuple[int, int]] = []
        """Monotonic µs, and pairs of all."""
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []
        more = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        for number, log in enumerate(self.logs):
            command = [sys.executable, "-m", "tests.replicas.traffic", "--addresses", ",".join(addresses)]
            command += ["--log", str(log), "--seed", str(seed * 100 + number), *more]
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            thread = threading.Thread(target=self._read, args=(number, process), daemon=True)
            thread.start()
            self._processes.append(process)
            self._threads.append(thread)

    def _read(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.progress[number] = found = json.loads(line)
            if len(self.history) < 1_000_000:
                self.history.append((found["at"], self.pairs))

    @property
    def pairs(self) -> int:
        return sum(each.get("pairs", 0) for each in self.progress)

    @property
    def open(self) -> int:
        """Calls in progress."""
        return sum(each.get("open", 0) for each in self.progress)

    @property
    def counts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for each in self.progress:
            total.update(each.get("counts", {}))
        return total

    @property
    def notes(self) -> Counter[str]:
        """What went wrong on the way, how often."""
        total: Counter[str] = Counter()
        for each in self.progress:
            total.update(each.get("notes", {}))
        return total

    def rate(self, calls_per_second: float) -> None:
        """So many new calls a second, in all."""
        self._say(f"rate {calls_per_second / len(self._processes)}")

    def callers(self, count: int) -> None:
        """So many callers, in all, each of whom calls again when its call is over."""
        parts = len(self._processes)
        for number, process in enumerate(self._processes):
            self._tell(process, f"callers {count // parts + (number < count % parts)}")

    def _say(self, line: str) -> None:
        for process in self._processes:
            self._tell(process, line)

    @staticmethod
    def _tell(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
        """Until ``condition``; raises ``AssertionError`` after so many seconds, or if a process has ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [process.poll() for process in self._processes if process.poll() is not None]
            assert not ended, f"a client ended with code {ended}"
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}; {self.progress}"
            time.sleep(0.02)

    def flowing(self, pairs: int = 50) -> None:
        """Until so many more pairs are done."""
        goal = self.pairs + pairs
        self.wait(lambda: self.pairs >= goal, f"{pairs} more pairs")

    def stop(self) -> list[Path]:
        """No new calls; wait until those in progress are over. The logs."""
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    self._tell(process, "stop")
        for number, process in enumerate(self._processes):
            code = process.wait(CLIENT_END_SECONDS)
            self._threads[number].join(5)
            assert code == 0, f"client {number} ended with code {code}"
            assert self.progress[number].get("end"), f"client {number} did not end well"
        return self.logs

    def close(self) -> None:
        for number, process in enumerate(self._processes):
            if process.poll() is None:
                process.kill()
            process.wait()
            self._threads[number].join(5)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
