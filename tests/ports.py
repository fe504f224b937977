"""Ports for servers of tests that run at the same time as others: in other workers, and in processes of their own."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# Below what Linux and macOS hand out for port 0 and for outgoing connections: nobody gets one of these by chance
# between our having looked and the server's start.
_FIRST: Final = 10_000
_COUNT: Final = 20_000
# Every process begins elsewhere: workers have neighbouring numbers.
_numbers = itertools.count(os.getpid() * 997)


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback interface that nobody uses now, for servers that bind them themselves."""
    found: list[int] = []
    for number in itertools.islice(_numbers, _COUNT):
        if len(found) == count:
            break
        port = _FIRST + number % _COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    assert len(found) == count, "no free port"
    return found


def free_port() -> int:
    """One of :func:`free_ports`."""
    (port,) = free_ports(1)
    return port


@contextmanager
def nobody() -> Iterator[str]:
    """An address where nobody listens: a connection is refused. Ours for as long as it lasts."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"
