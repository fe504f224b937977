"""Who this process is among those that share a store, and where they reach it."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from urllib.parse import urlsplit

from paceline.config.fields import WILDCARDS
from paceline.config.model import Config

_MOST_HOST_CHARS = 100


def node_name(config: Config) -> str:
    """The configured name; without one, that of the machine with a random part, another one at each call."""
    if config.node:
        return config.node
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("-._")[:_MOST_HOST_CHARS] or "node"
    return f"{host}-{secrets.token_hex(3)}"


def peer_address(config: Config, port: int, listen: str = "", worker: int = 0) -> str:
    """What the others are told, once this process listens for them on ``port``, or on the socket ``listen``.

    Of several workers on one machine, ``worker`` is the number: each has a port, or a socket, of its own.
    """
    if config.peer_advertise:
        host, given = _parts(config.peer_advertise)
        return _joined(host, given + worker if given else port)
    if config.peer_listen.startswith("unix:"):
        return listen or config.peer_listen
    host, _ = _parts(config.peer_listen)
    return _joined(socket.gethostname() if host in WILDCARDS else host, port)


def _parts(address: str) -> tuple[str, int]:
    try:
        return str(ipaddress.ip_address(address)), 0
    except ValueError:
        parts = urlsplit(f"//{address}")
        return parts.hostname or "", parts.port or 0


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
