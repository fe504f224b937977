"""gRPC, imported so that a process that forks keeps working, and the channels of this library.

The synchronous stack is used on purpose, for asyncio too. Measured, it answers as fast as ``grpc.aio`` when items
travel in batches; it serves any number of event loops and threads over one stream; and a process that uses it can
fork, which one that uses ``grpc.aio`` cannot.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from pathlib import Path
from typing import Final

if "grpc" not in sys.modules:
    # Read once, when grpc is imported. Without it a child that uses gRPC hangs or aborts.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

import grpc

from paceline_client._config import Endpoint

__all__ = ["anchor", "grpc", "is_fork_supported", "metadata", "open_channel", "threads_of_grpc"]

KEEPALIVE: Final = 10.0
KEEPALIVE_TIMEOUT: Final = 5.0
"""A connection is taken for dead that does not answer for so long. Unit: seconds."""
MAX_MESSAGE_BYTES: Final = 16 * 1_024 * 1_024

_OPTIONS: Final = (
    # Each channel has its own connection, so that a new session may find another server.
    ("grpc.use_local_subchannel_pool", 1),
    # A name may have several addresses: each session tries them in another order.
    ("grpc.service_config", '{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}'),
    ("grpc.keepalive_time_ms", int(KEEPALIVE * 1e3)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT * 1e3)),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
)

_anchor: grpc.Channel | None = None


def anchor() -> None:
    """Keep gRPC itself from being shut down and started again, which a fork may fall into the middle of."""
    global _anchor
    if _anchor is None:
        _anchor = grpc.insecure_channel("127.0.0.1:9", options=_OPTIONS)


def is_fork_supported() -> bool:
    """Whether a child of this process can use gRPC."""
    enabled = getattr(importlib.import_module("grpc._cython.cygrpc"), "is_fork_support_enabled", None)
    return bool(enabled()) if callable(enabled) else False


def open_channel(endpoint: Endpoint, address: str) -> grpc.Channel:
    """A channel with a connection of its own, to one of the endpoint's addresses."""
    if not endpoint.tls:
        return grpc.insecure_channel(address, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(endpoint.ca_file),
        private_key=_read(endpoint.key_file),
        certificate_chain=_read(endpoint.cert_file),
    )
    return grpc.secure_channel(address, credentials, options=_OPTIONS)


def metadata(endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
    """The identity of the caller."""
    return (("authorization", f"Bearer {endpoint.token}"),) if endpoint.token else ()


def threads_of_grpc() -> set[threading.Thread]:
    """The threads in which gRPC serves channels and calls."""
    found = set()
    for thread in threading.enumerate():
        module = getattr(getattr(thread, "_target", None), "__module__", None) or ""
        if module.startswith("grpc."):
            found.add(thread)
    return found


def _read(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None
