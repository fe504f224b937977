"""``paceline serve --workers``: several processes on one address, over one embedded store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from paceline_client.stubs import v1 as pb
from tests.cli.conftest import PACELINE, clean_environment, free_address
from tests.frontend.harness import commit, reserve, succeeded
from tests.replicas.redis_server import RedisServer, need_redis

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

CONFIG = """
accounts:
  default:
    tier: build
    pools:
      sonnet-4: {requests: 100000, input_tokens: 10000000, output_tokens: 10000000}
limits: {drain_timeout: 5s}
"""


class Workers:
    """A parent and its workers."""

    def __init__(self, *arguments: str, count: int = 3) -> None:
        self.process = subprocess.Popen(
            [PACELINE, "serve", "--workers", str(count), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline().strip()
        self.address = self.first.rpartition(" ")[2]

    def children(self) -> dict[int, int]:
        """Process ids by worker."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                if (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(self.process.pid):
                    environ = (entry / "environ").read_bytes().split(b"\0")
                    told = next(each for each in environ if each.startswith(b"PACELINE_WORKER="))
                    found[int(told.partition(b'"index":')[2].split(b",")[0])] = int(entry.name)
        return found

    def stop(self) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, err = self.process.communicate(timeout=40)
        return self.process.returncode, err


@contextlib.contextmanager
def running(tmp_path: Path, *arguments: str, count: int = 3) -> Iterator[Workers]:
    file = tmp_path / "paceline.yaml"
    file.write_text(CONFIG)
    workers = Workers("--config", str(file), "--listen", "127.0.0.1:0", *arguments, count=count)
    try:
        yield workers
    finally:
        if workers.process.poll() is None:
            workers.stop()


class Caller:
    """A client with one connection of its own, hence at one worker."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
        )
        self.coordinator: Any = pb.CoordinatorServiceStub(self.channel)
        self.admin: Any = pb.AdminServiceStub(self.channel)

    def pair(self) -> tuple[pb.ReserveRequest, pb.ReserveResponse, pb.CommitResponse]:
        request = reserve()
        granted = self.coordinator.Reserve(request, timeout=10, wait_for_ready=True)
        assert granted.WhichOneof("result") == "grant", granted
        settled = self.coordinator.Commit(commit(request, granted.grant.context), timeout=10, wait_for_ready=True)
        return request, granted, settled


def again(call: Callable[[], Any], timeout: float = 3) -> Any:
    """Repeat a call while connections to a dead process break.

    A process has several listening sockets, which the kernel closes one after the other: who comes back at once may
    be taken in by one that is about to go.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() >= deadline:
                raise


def until(condition: Callable[[], Any], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_every_worker_answers_for_the_one_ledger(tmp_path: Path) -> None:
    with running(tmp_path, "--store", f"embedded:{tmp_path / 'books.db'}") as workers:
        assert workers.first.startswith("paceline 0.1.0 listens on 127.0.0.1:")
        assert sorted(workers.children()) == [0, 1, 2]
        callers = [Caller(workers.address) for _ in range(12)]
        for caller in callers:
            _, _, settled = caller.pair()
            assert [(each.dimension, each.window, each.charged) for each in settled.settlements[:3]] == [
                (pb.DIMENSION_REQUESTS, pb.WINDOW_MINUTE, 1),
                (pb.DIMENSION_INPUT_TOKENS, pb.WINDOW_MINUTE, 90),
                (pb.DIMENSION_OUTPUT_TOKENS, pb.WINDOW_MINUTE, 80),
            ]
            assert not settled.late
        # Without a context, through another worker or the same one.
        request = reserve()
        callers[0].coordinator.Reserve(request, timeout=10)
        bare = pb.CommitRequest(reservation_id=request.reservation_id, outcome=succeeded())
        told = [caller.coordinator.Commit(bare, timeout=10) for caller in callers[1:]]
        assert [each.duplicate for each in told] == [False] + [True] * 10
        code, err = workers.stop()
    assert code == 0, err
    assert "Traceback" not in err


def test_nothing_acknowledged_is_lost_when_the_first_worker_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, "--store", f"embedded:{tmp_path / 'books.db'}") as workers:
        callers = [Caller(workers.address) for _ in range(12)]
        for caller in callers:
            caller.pair()
        open_ = []
        for caller in callers:
            request = reserve()
            open_.append((request, caller.coordinator.Reserve(request, timeout=10)))
        before = workers.children()
        os.kill(before[0], signal.SIGKILL)
        # Calls at workers that live wait for the first one to come back; those of connections that broke are repeated.
        for (request, granted), caller in zip(open_, callers, strict=True):
            ask = commit(request, granted.grant.context)
            settled = again(lambda caller=caller, ask=ask: caller.coordinator.Commit(ask, timeout=15))  # type: ignore[misc]
            assert not settled.late
            assert not settled.stale
        until(lambda: len(workers.children()) == 3)
        after = workers.children()
        assert after[0] != before[0]
        assert (after[1], after[2]) == (before[1], before[2])
        for caller in callers:
            caller.pair()
        code, err = workers.stop()
    assert code == 0, err


def test_a_guest_that_dies_is_started_again(tmp_path: Path) -> None:
    with running(tmp_path, count=2) as workers:
        before = workers.children()
        os.kill(before[1], signal.SIGKILL)
        until(lambda: workers.children().get(1) not in (None, before[1]))
        assert workers.children()[0] == before[0]
        Caller(workers.address).pair()


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    with running(tmp_path, count=2) as workers:
        pids = list(workers.children().values())
        assert len(pids) == 2
        workers.process.kill()
        workers.process.communicate(timeout=10)
        until(lambda: not any(_lives(pid) for pid in pids))


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def two_ports() -> int:
    """The first of two ports in a row that were free a moment ago."""
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            with socket.create_server(("127.0.0.1", port + 1)):
                return port
    raise AssertionError("no two ports in a row are free")


def test_metrics_of_each_worker_have_a_port(tmp_path: Path) -> None:
    port = two_ports()
    with running(tmp_path, "--metrics-listen", f"127.0.0.1:{port}", count=2) as workers:
        assert workers.address, workers.stop()
        for number in range(2):
            with socket.create_connection(("127.0.0.1", port + number), timeout=5):
                pass


@pytest.mark.parametrize("what", ["taken", "socket", "other workers"])
def test_what_cannot_be_listened_on_is_said_once(what: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        if what == "taken":
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
        elif what == "socket":
            listen = f"unix:{tmp_path / 'paceline.sock'}"
        else:
            listen = stack.enter_context(running(tmp_path, count=2)).address
        done = subprocess.run(
            [PACELINE, "serve", "--workers", "2", "--listen", listen],
            capture_output=True,
            text=True,
            timeout=60,
            env=clean_environment(),
            check=False,
        )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert listen.partition(":")[2] in line or what == "socket"


def test_the_variable_is_the_parents(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "paceline", "serve", "--listen", free_address()],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(PACELINE_WORKER="1"),
        check=False,
    )
    assert done.returncode == 2
    assert "PACELINE_WORKER" in done.stderr


@pytest.mark.redis
def test_over_a_shared_store_each_worker_owns_for_itself(tmp_path: Path) -> None:
    need_redis()
    with RedisServer() as redis, running(tmp_path, "--store", redis.url, count=2) as workers:
        callers = [Caller(workers.address) for _ in range(6)]
        for caller in callers:
            until(lambda caller=caller: _serves(caller))  # type: ignore[misc]
            caller.pair()
        before = workers.children()
        for index in (0, 1):
            # Whichever of the two owns the ledger, the other one takes over.
            os.kill(before[index], signal.SIGKILL)
            for caller in callers:
                again(caller.pair)
            until(lambda index=index: workers.children().get(index) not in (None, before[index]))  # type: ignore[misc]
            until(lambda: all(_serves(Caller(workers.address)) for _ in range(6)))
        code, err = workers.stop()
    assert code == 0, err
    assert "Traceback" not in err


def _serves(caller: Caller) -> bool:
    check = caller.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        answer = check(health_pb2.HealthCheckRequest(), timeout=2, wait_for_ready=True)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
