"""How frames travel between two processes. Real ones go over gRPC, simulated ones over a simulated network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol


class PeerRefused(Exception):
    """Nobody listens there: the process has ended, or was never there."""


class PeerUnreachable(Exception):
    """No answer in time, or one that says nothing of whether the process lives."""


class WireClosed(Exception):
    """The stream has ended. ``clean``: the other side closed it; else it broke."""

    def __init__(self, clean: bool) -> None:
        super().__init__("closed" if clean else "broken")
        self.clean = clean


class Wire(Protocol):
    """An ordered stream of frames in both directions. Used from one event loop."""

    def send(self, frame: bytes) -> None:
        """Send a frame, behind those before. Never blocks and never raises; a closed wire drops it."""
        ...

    @property
    def unsent(self) -> int:
        """Bytes that wait to be sent, for back-pressure."""
        ...

    async def receive(self) -> bytes:
        """The next frame. Raises :class:`WireClosed`."""
        ...

    def close(self) -> None:
        """End it; ``receive`` raises on both sides, also where it waits already."""
        ...


Accept = Callable[[Wire], Awaitable[None]]
"""Serves a wire until it returns."""


class Transport(Protocol):
    """Opens wires. ``address`` is as in :class:`paceline.ledger.commands.NodeInfo`."""

    async def connect(self, address: str, timeout: float) -> Wire:
        """Raises :class:`PeerRefused` or :class:`PeerUnreachable` within ``timeout`` seconds."""
        ...

    async def call(self, address: str, method: str, body: bytes, timeout: float) -> bytes:
        """One question to the process itself, such as an AdminService call. Raises as :meth:`connect`."""
        ...
