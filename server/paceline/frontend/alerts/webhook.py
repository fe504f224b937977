"""Posting alerts to a URL.

A thread of its own does it, with the standard library's HTTP client: none of the server's packages is one, a post once
in a while does not need more, and a thread that is stuck in the resolver delays neither the event loop nor its end, as
the loop's own threads would. Everything has a bound: what waits (the oldest is dropped), an attempt as a whole, the
number of attempts, and the end. TLS is verified against the system's authorities. Redirections are answers that failed.

The URL may hold a token: only its host is ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import http.client
import random
import socket
import ssl
import threading
from collections import deque
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple
from urllib.parse import urlsplit

import structlog

from paceline import __version__
from paceline.config import WebhookTarget

_log = structlog.get_logger(__name__)

MAX_QUEUED = 1_024
SIGNATURE = "Paceline-Signature"
"""``sha256=`` and the HMAC-SHA256 of the body under the secret, in hexadecimal."""
EVENT = "Paceline-Event"
"""The alert's id: the same in all attempts."""

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which another attempt may succeed."""
_LOG_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """Bounds. Seconds."""

    attempts: int = 5
    backoff: float = 1.0
    """Before the second attempt; twice as long before each further one, each with jitter of a half either way."""
    queued: int = MAX_QUEUED


@dataclass(slots=True)
class WebhookCounts:
    """Alerts by what became of them."""

    delivered: int = 0
    failed: int = 0
    dropped: int = 0
    """The queue was full, or the server ended."""


class _Item(NamedTuple):
    body: bytes
    event: str


class _Failed(Exception):
    """An attempt failed; the message says why and holds no part of the URL."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class Webhook:
    """Posts in the order of :meth:`post`, one at a time. ``tls``: another context than the system's."""

    def __init__(
        self, target: WebhookTarget, options: Options | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(target.url)
        self.host = parts.hostname or ""
        self.counts = WebhookCounts()
        self._is_tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._secret = target.secret
        self._timeout = target.timeout_us / 1e6
        self._options = Options() if options is None else options
        self._tls = tls
        self._changed = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._ends_at: float | None = None
        """When what is left is given up."""
        self._ended = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._logged_at = -_LOG_EVERY_S

    # -- on the event loop -------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Alerts that wait."""
        return len(self._queue)

    def post(self, body: bytes, event: str) -> None:
        """Have a JSON document posted. Never waits; of too many the oldest is dropped."""
        with self._changed:
            if self._ends_at is not None:
                self.counts.dropped += 1
                return
            if len(self._queue) >= self._options.queued:
                self._queue.popleft()
                self.counts.dropped += 1
            self._queue.append(_Item(body, event))
            if self._thread is None:
                loop = asyncio.get_running_loop()
                self._thread = threading.Thread(target=self._work, args=(loop,), name="webhook", daemon=True)
                self._thread.start()
            self._changed.notify()

    async def close(self, seconds: float) -> None:
        """Post what waits, each once, for at most so long."""
        with self._changed:
            self._ends_at = monotonic() + seconds
            self._changed.notify()
            if self._thread is None:
                return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        with self._changed:
            self.counts.dropped += len(self._queue)
            self._queue.clear()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with self._changed:
                while not self._queue and self._ends_at is None:
                    self._changed.wait()
                if not self._queue or self._is_over():
                    break
                item = self._queue.popleft()
            try:
                self._deliver(item)
            except Exception as error:  # what nobody thought of must not end the thread
                self._give_up(type(error).__name__, 1)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._ended.set)

    def _is_over(self) -> bool:
        return self._ends_at is not None and monotonic() >= self._ends_at

    def _deliver(self, item: _Item) -> None:
        backoff = self._options.backoff
        for attempt in range(1, self._options.attempts + 1):
            try:
                self._attempt(item)
            except _Failed as failed:
                with self._changed:
                    last = not failed.again or attempt == self._options.attempts or self._ends_at is not None
                    if not last:
                        pause = backoff * random.uniform(0.5, 1.5)
                        last = self._changed.wait_for(lambda: self._ends_at is not None, pause) and self._is_over()
                if last:
                    self._give_up(str(failed), attempt)
                    return
                backoff *= 2
            else:
                self.counts.delivered += 1
                return

    def _give_up(self, reason: str, attempts: int) -> None:
        self.counts.failed += 1
        if monotonic() - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = monotonic()
            counts = self.counts
            _log.warning(
                "alerts cannot be posted",
                host=self.host,
                reason=reason,
                attempts=attempts,
                failed=counts.failed,
                dropped=counts.dropped,
            )

    def _attempt(self, item: _Item) -> None:
        """Raises :class:`_Failed`."""
        until = monotonic() + self._timeout
        if self._ends_at is not None:
            until = min(until, self._ends_at)
        guard = _Guard(until)
        try:
            status = self._exchange(item, guard)
        except TimeoutError:
            raise _Failed("timed out", True) from None
        except ssl.SSLCertVerificationError as error:
            raise _Failed(f"the certificate is not good: {error.verify_message}", True) from None
        except (OSError, http.client.HTTPException) as error:
            if guard.cut:
                raise _Failed("timed out", True) from None
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise _Failed(str(reason), True) from None
        finally:
            guard.done()
        if 300 <= status < 400:
            raise _Failed(f"HTTP {status}: redirections are not followed", False)
        if not 200 <= status < 300:
            raise _Failed(f"HTTP {status}", status in _AGAIN)

    def _exchange(self, item: _Item, guard: _Guard) -> int:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"paceline/{__version__}",
            EVENT: item.event,
            "Connection": "close",
        }
        if self._secret:
            headers[SIGNATURE] = "sha256=" + hmac.new(self._secret, item.body, hashlib.sha256).hexdigest()
        connection = http.client.HTTPConnection(self.host, self._port)
        if self._is_tls:
            # So that the Host header leaves the usual port out.
            connection.default_port = 443
        try:
            connection.sock = self._connect(guard)
            connection.request("POST", self._path, item.body, headers)
            # What else the answer says is of no use, and may be endless.
            return connection.getresponse().status
        finally:
            connection.close()

    def _connect(self, guard: _Guard) -> socket.socket:
        last: OSError = TimeoutError()
        for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self._port, type=socket.SOCK_STREAM):
            found = guard.watch(socket.socket(family, kind, protocol))
            try:
                found.connect(address)
                if self._is_tls:
                    if self._tls is None:
                        self._tls = ssl.create_default_context()
                    # The guard has to know it before the handshake, which may drip as well.
                    shaken = self._tls.wrap_socket(found, server_hostname=self.host, do_handshake_on_connect=False)
                    found = guard.watch(shaken)
                    shaken.do_handshake()
                return found
            except OSError as error:
                found.close()
                last = error
        raise last


class _Guard:
    """Ends an attempt as a whole: timeouts of sockets are for one step each, and an answer may come byte by byte."""

    def __init__(self, until: float) -> None:
        self.cut = False
        self._until = until
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(max(0.0, until - monotonic()), self._shut)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, found: socket.socket) -> socket.socket:
        """Have a socket closed when the time is over. Raises ``TimeoutError`` if it is."""
        with self._lock:
            left = self._until - monotonic()
            if self.cut or left <= 0:
                found.close()
                raise TimeoutError
            found.settimeout(left)
            self._socket = found
        return found

    def done(self) -> None:
        """The attempt has ended."""
        self._timer.cancel()
        with self._lock:
            self._socket = None

    def _shut(self) -> None:
        with self._lock:
            self.cut = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
