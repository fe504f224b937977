"""The fault proxy does what the tests believe it does."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.replicas.toxiproxy import Proxy, toxiproxy

pytestmark = [pytest.mark.process, pytest.mark.timeout(320)]


class Echo(socketserver.BaseRequestHandler):
    """Answers every byte with itself."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(4096):
                self.server.seen.extend(data)  # type: ignore[attr-defined]
                self.request.sendall(data)


@pytest.fixture
def echo() -> Iterator[tuple[Proxy, bytearray]]:
    with toxiproxy() as control, socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        server.seen = seen = bytearray()  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield control.proxy("echo", f"127.0.0.1:{server.server_address[1]}"), seen
        finally:
            server.shutdown()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=1)


def repeat(line: socket.socket, times: int) -> None:
    for _ in range(times):
        line.sendall(b"one")
        time.sleep(0.01)


def test_without_faults_bytes_pass(echo: tuple[Proxy, bytearray]) -> None:
    with connect(echo[0]) as line:
        line.sendall(b"one")
        assert line.recv(16) == b"one"


def test_latency_is_added_to_a_round_trip_and_taken_away(echo: tuple[Proxy, bytearray]) -> None:
    proxy, _ = echo
    with connect(proxy) as line:
        proxy.slow(200)
        began = time.monotonic()
        line.sendall(b"one")
        assert line.recv(16) == b"one"
        assert 0.19 < time.monotonic() - began < 0.9
        proxy.heal()
        began = time.monotonic()
        line.sendall(b"two")
        assert line.recv(16) == b"two"
        assert time.monotonic() - began < 0.15


@pytest.mark.parametrize("direction", ["upstream", "downstream"])
def test_one_way_is_cut_and_the_connection_stays(echo: tuple[Proxy, bytearray], direction: str) -> None:
    proxy, seen = echo
    with connect(proxy) as line:
        line.sendall(b"one")
        assert line.recv(16) == b"one"
        proxy.cut(direction)  # type: ignore[arg-type]
        line.sendall(b"two")
        line.settimeout(0.3)
        with pytest.raises(TimeoutError):
            line.recv(16)
        assert bytes(seen) == (b"one" if direction == "upstream" else b"onetwo")
    proxy.heal()
    with connect(proxy) as line:
        line.sendall(b"new")
        assert line.recv(16) == b"new"


def test_connections_are_reset_and_refused(echo: tuple[Proxy, bytearray]) -> None:
    proxy, _ = echo
    with connect(proxy) as line:
        proxy.reset()
        # An old connection may be closed in order; a new one is reset.
        with contextlib.suppress(ConnectionError):
            line.sendall(b"one")
            assert not line.recv(16)
    with connect(proxy) as line, pytest.raises(ConnectionError):
        repeat(line, 10)
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as line:
        line.sendall(b"new")
        assert line.recv(16) == b"new"
