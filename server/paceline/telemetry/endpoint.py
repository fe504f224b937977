"""The HTTP endpoint that Prometheus reads: ``GET /metrics``.

It has threads of its own. The figures are copied on the event loop, where the counters live, in one piece; the rest of
the work is done in the thread of the request, one request at a time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import structlog
from prometheus_client.exposition import choose_encoder

from paceline.telemetry.figures import Figures
from paceline.telemetry.metrics import Metrics

MAX_CONNECTIONS = 8
"""More are told 503."""
CONNECTION_TIMEOUT_S = 10.0
"""A connection that says nothing for so long is closed."""
COLLECT_TIMEOUT_S = 5.0
"""If the event loop is busy for longer, the answer is 503."""

_log = structlog.get_logger("paceline.telemetry")


class Endpoint:
    """Serves the metrics. ``address`` is ``HOST:PORT``; ``figures`` is called on the running event loop.

    Raises :class:`OSError` if the address cannot be used.
    """

    def __init__(self, address: str, figures: Callable[[], Figures]) -> None:
        self._loop = asyncio.get_running_loop()
        self._figures = figures
        self._metrics = Metrics()
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        parts = urlsplit(f"//{address}")
        self._server = _Server((parts.hostname or "", parts.port or 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port in use, also if the address said 0."""
        return self._server.server_port

    async def close(self) -> None:
        """Stop serving. A request under way is not waited for."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()
        self._metrics.close()

    def page(self, accept: str) -> tuple[str, bytes]:
        """Content type and text of the metrics. Raises :class:`TimeoutError` if the event loop does not answer."""
        copied: concurrent.futures.Future[Figures] = concurrent.futures.Future()

        def copy() -> None:
            if copied.set_running_or_notify_cancel():
                try:
                    copied.set_result(self._figures())
                except Exception as error:
                    copied.set_exception(error)

        self._loop.call_soon_threadsafe(copy)
        try:
            figures = copied.result(COLLECT_TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            copied.cancel()
            raise TimeoutError("the server is too busy to be read") from None
        encode, content_type = choose_encoder(accept)
        with self._lock:
            self._metrics.update(figures)
            return content_type, encode(self._metrics.registry)

    def enter(self) -> bool:
        """Whether there is a place for one more connection."""
        return self._places.acquire(blocking=False)

    def leave(self) -> None:
        """A connection has ended."""
        self._places.release()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Requests hang on for their own time-out at most, and nobody waits for them.
    block_on_close = False

    def __init__(self, address: tuple[str, int], endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The base class looks up the host's name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is nobody's concern."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CONNECTION_TIMEOUT_S
    server_version = "paceline"
    sys_version = ""

    def do_GET(self) -> None:
        endpoint = self.server.endpoint
        if self.path.partition("?")[0] != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"only /metrics is here\n")
        elif not endpoint.enter():
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", b"too many readers\n")
        else:
            try:
                content_type, body = endpoint.page(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, content_type, body)
            except TimeoutError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", f"{error}\n".encode())
            except RuntimeError:
                # The event loop is closed: the server is going.
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", b"going away\n")
            except Exception as error:
                _log.error("metrics cannot be collected", exc_info=error)
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", b"failed; see the log\n")
            finally:
                endpoint.leave()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
