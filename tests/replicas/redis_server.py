"""Real Redis servers on free ports of the loopback: one alone, with replicas, under Sentinel, or as a cluster.

Everything here blocks, for seconds at most; call it through ``asyncio.to_thread`` where the loop must go on. Nothing is
kept on the disk unless asked for. Each object is a context manager and ends what it has started, paused or not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.ports import free_port, free_ports

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")
START_SECONDS = 10.0
"""How long a server may take to answer after its start."""
SETTLE_SECONDS = 30.0
"""How long replicas, sentinels and clusters may take to find each other, and a failover."""


def need_redis() -> None:
    """Skip the test where no server is installed; in continuous integration, fail."""
    if BINARY is None:
        message = "needs redis-server (or valkey-server) on the path"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def until(condition: Callable[[], object], what: str, seconds: float = SETTLE_SECONDS) -> None:
    """Wait for ``condition``; an error of Redis counts as no. Fails the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    error: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (redis.RedisError, OSError) as caught:
            error = caught
        time.sleep(0.02)
    pytest.fail(f"not within {seconds:g} s: {what}" + (f" ({error})" if error else ""))


class RedisServer:
    """One process. ``options`` are settings by name, with ``-`` written ``_``; a value of ``None`` leaves one out."""

    def __init__(
        self, port: int | None = None, *, sentinel: str = "", files: dict[str, str] | None = None, **options: Any
    ) -> None:
        self.port = free_port() if port is None else port
        self.folder = Path(tempfile.mkdtemp(prefix="paceline-redis-"))
        for name, text in (files or {}).items():
            (self.folder / name).write_text(text)
        self._sentinel = sentinel
        defaults: dict[str, Any] = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "daemonize": "no",
            "logfile": str(self.folder / "log"),
        }
        if not sentinel:
            defaults |= {"save": '""', "appendonly": "no", "maxmemory_policy": "noeviction", "io_threads": 1}
        self._options = {name: value for name, value in (defaults | options).items() if value is not None}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start, or start again on the same port and folder. Returns once it answers."""
        assert BINARY is not None
        assert not self.running
        config = self.folder / "redis.conf"
        if not config.exists() or not self._sentinel:
            lines = [f"{name.replace('_', '-')} {value}" for name, value in self._options.items()]
            config.write_text("\n".join(lines) + "\n" + self._sentinel)
        command = [BINARY, str(config)] + (["--sentinel"] if self._sentinel else [])
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the server on port {self.port} did not start:\n{self.log[-2_000:]}")
            time.sleep(0.01)
        return self

    def _answers(self) -> bool:
        """Whether it takes connections, and has read its data. It may ask for a password; with TLS alone, only the
        first is known."""
        try:
            with socket.create_connection(("127.0.0.1", self.listening), 0.2) as probe:
                if not self.port:
                    return True
                probe.sendall(b"PING\r\n")
                return not probe.recv(64).startswith((b"-LOADING", b"-MASTERDOWN"))
        except OSError:
            return False

    @property
    def listening(self) -> int:
        """The port that is open: that of TLS if there is no other."""
        return self.port or int(self._options["tls_port"])

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[redis.Redis]:
        """A client of its own, which blocks, for at most a second a command."""
        settings: dict[str, Any] = {"port": self.listening, "protocol": 2, "retry": Retry(NoBackoff(), 0)}
        client = redis.Redis(**(settings | {"socket_timeout": 1, "socket_connect_timeout": 1} | options))
        try:
            yield client
        finally:
            client.close()

    def call(self, *command: Any) -> Any:
        """One command, by the default user."""
        with self.client() as client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]  # upstream has no types here

    def info(self, section: str) -> dict[str, Any]:
        with self.client() as client:
            info = client.info(section)
            assert isinstance(info, dict)
            return info

    def set(self, **settings: Any) -> None:
        """CONFIG SET."""
        for name, value in settings.items():
            self.call("CONFIG", "SET", name.replace("_", "-"), value)

    def pause(self) -> None:
        """Stop it as a whole, as a stuck machine would (SIGSTOP)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL. It can be started again."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: it writes what it is to keep."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(how)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process = None

    def close(self) -> None:
        """Kill it and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        if not self.running:
            try:
                self.start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Group:
    """Servers that start and end together."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def _build(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()


class ReplicatedRedis(_Group):
    """A primary with replicas, which follow it when this is entered."""

    def __init__(self, replicas: int = 1, **options: Any) -> None:
        super().__init__()
        self._options = {"repl_diskless_sync_delay": 0, "repl_ping_replica_period": 1} | options
        self._count = replicas
        self.primary: RedisServer
        self.replicas: list[RedisServer]

    @property
    def servers(self) -> list[RedisServer]:
        return [self.primary, *self.replicas]

    @property
    def url(self) -> str:
        return self.primary.url

    def _build(self) -> None:
        self.primary = self._stack.enter_context(RedisServer(**self._options))
        self.replicas = [
            self._stack.enter_context(RedisServer(replicaof=f"127.0.0.1 {self.primary.port}", **self._options))
            for _ in range(self._count)
        ]
        self.wait_for_replicas()

    def wait_for_replicas(self) -> None:
        for replica in self.replicas:
            until(
                lambda replica=replica: replica.info("replication")["master_link_status"] == "up",  # type: ignore[misc]
                "the replica follows",
            )


class SentinelRedis(ReplicatedRedis):
    """A primary with replicas, watched by sentinels that give it up after ``down_after_ms`` and two of which agree.

    :meth:`current` is the primary that the sentinels name.
    """

    service = "paceline"

    def __init__(self, replicas: int = 1, sentinels: int = 3, down_after_ms: int = 500, **options: Any) -> None:
        super().__init__(replicas, **options)
        self._sentinels = sentinels
        self._down_after_ms = down_after_ms
        self.sentinels: list[RedisServer]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.service}"

    def _build(self) -> None:
        super()._build()
        quorum = self._sentinels // 2 + 1
        watch = (
            f"sentinel monitor {self.service} 127.0.0.1 {self.primary.port} {quorum}\n"
            f"sentinel down-after-milliseconds {self.service} {self._down_after_ms}\n"
            f"sentinel failover-timeout {self.service} 2000\n"
        )
        self.sentinels = [self._stack.enter_context(RedisServer(sentinel=watch)) for _ in range(self._sentinels)]
        for sentinel in self.sentinels:
            until(lambda sentinel=sentinel: self._knows_all(sentinel), "the sentinels know each other")  # type: ignore[misc]

    def _knows_all(self, sentinel: RedisServer) -> bool:
        answer = sentinel.call("SENTINEL", "MASTER", self.service)
        state = answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))
        state = {str(_text(name)): _text(value) for name, value in state.items()}
        return int(state["num-other-sentinels"]) == self._sentinels - 1 and int(state["num-slaves"]) == self._count

    def current(self) -> RedisServer:
        """The primary as the first sentinel that answers names it."""
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.RedisError, OSError):
                _, port = sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
                return next(server for server in self.servers if server.port == int(port))
        pytest.fail("no sentinel answers")

    def agreed(self) -> RedisServer | None:
        """The primary that all sentinels name, if they agree, which may take seconds after a failover."""
        ports = {
            int(sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1]) for sentinel in self.sentinels
        }
        return next((server for server in self.servers if {server.port} == ports), None)

    def wait_for_failover(self, old: RedisServer) -> RedisServer:
        """The new primary, once there is one that takes writes."""
        until(
            lambda: self.current() is not old and self.current().info("replication")["role"] == "master",
            "the failover",
        )
        return self.current()


class ClusterRedis(_Group):
    """A cluster: ``primaries`` with the slots shared evenly, and the first ``replicas`` of them with a replica each."""

    def __init__(self, primaries: int = 3, replicas: int = 3, node_timeout_ms: int = 500, **options: Any) -> None:
        super().__init__()
        assert replicas <= primaries
        self._primaries, self._replicas = primaries, replicas
        self._options: dict[str, Any] = {
            "cluster_enabled": "yes",
            "cluster_node_timeout": node_timeout_ms,
            "cluster_replica_validity_factor": 0,
            "repl_diskless_sync_delay": 0,
            "repl_ping_replica_period": 1,
        } | options
        self.nodes: list[RedisServer] = []

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:3])

    def _build(self) -> None:
        ports = free_ports(2 * (self._primaries + self._replicas))
        for port, bus in zip(ports[::2], ports[1::2], strict=True):
            self.nodes.append(self._stack.enter_context(RedisServer(port, cluster_port=bus, **self._options)))
        for number, node in enumerate(self.nodes[: self._primaries]):
            first, last = (16_384 * n // self._primaries for n in (number, number + 1))
            node.call("CLUSTER", "ADDSLOTSRANGE", first, last - 1)
            node.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for port, bus in zip(ports[2::2], ports[3::2], strict=True):
            self.nodes[0].call("CLUSTER", "MEET", "127.0.0.1", port, bus)
        for node in self.nodes:
            until(lambda node=node: self._known(node) == len(self.nodes), "the nodes know each other")  # type: ignore[misc]
        for primary, replica in zip(self.nodes, self.nodes[self._primaries :], strict=False):
            replica.call("CLUSTER", "REPLICATE", _text(primary.call("CLUSTER", "MYID")))
        for node in self.nodes:
            until(lambda node=node: self._whole(node), "the cluster is whole")  # type: ignore[misc]
        for replica in self.nodes[self._primaries :]:
            until(
                lambda replica=replica: replica.info("replication")["master_link_status"] == "up",  # type: ignore[misc]
                "the replica follows",
            )

    @staticmethod
    def _state(node: RedisServer) -> dict[str, str]:
        answer = node.call("CLUSTER", "INFO")
        if isinstance(answer, dict):
            return {str(_text(name)): str(_text(value)) for name, value in answer.items()}
        return dict(line.split(":", 1) for line in _text(answer).split())

    def _known(self, node: RedisServer) -> int:
        return int(self._state(node)["cluster_known_nodes"])

    def _whole(self, node: RedisServer) -> bool:
        state = self._state(node)
        roles = [self._role(other) for other in self.nodes]
        return (
            state["cluster_state"] == "ok"
            and int(state["cluster_slots_assigned"]) == 16_384
            and roles.count("slave") == self._replicas
        )

    @staticmethod
    def _role(node: RedisServer) -> str:
        return str(node.info("replication")["role"])

    def owner(self, key: str) -> RedisServer:
        """The primary that holds ``key``, as the first node that knows sees it."""
        owner = self._owner(key)
        assert owner is not None, f"no node holds {key!r}"
        return owner

    def _owner(self, key: str) -> RedisServer | None:
        for node in self.nodes:
            if not node.running:
                continue
            with contextlib.suppress(redis.RedisError, OSError):
                slot = int(node.call("CLUSTER", "KEYSLOT", key))
                for line in _lines(node):
                    fields = line.split()
                    if "master" not in fields[2] or "fail" in fields[2].split(","):
                        continue
                    for span in fields[8:]:
                        first, _, last = span.partition("-")
                        if not span.startswith("[") and int(first) <= slot <= int(last or first):
                            port = int(fields[1].split("@")[0].rpartition(":")[2])
                            return next(other for other in self.nodes if other.port == port)
        return None

    def wait_for_failover(self, old: RedisServer, key: str) -> RedisServer:
        """The new primary of ``key``, once the cluster is whole again without ``old``."""

        def done() -> bool:
            new = self._owner(key)
            return new is not None and new is not old and self._state(new)["cluster_state"] == "ok"

        until(done, "the failover")
        return self.owner(key)


def _lines(node: RedisServer) -> list[str]:
    with node.client() as client:
        client.response_callbacks.clear()
        answer = client.execute_command("CLUSTER", "NODES")  # type: ignore[no-untyped-call]  # as above
        return [line for line in _text(answer).splitlines() if line]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
