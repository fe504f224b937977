"""An HTTP server on this machine's loopback that says what it got, for what the server under test posts."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from paceline.config import WebhookTarget


class Got(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """An HTTP server that answers with the next of ``statuses``, then with 204."""

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.statuses: list[int] = []
        self.pause = 0.0
        self.drip = False
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append(Got("POST", self.path, dict(self.headers.items()), body))
                time.sleep(receiver.pause)
                status = receiver.statuses.pop(0) if receiver.statuses else 204
                if receiver.drip:
                    self.drip_out()
                    return
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"http://127.0.0.1:{receiver.port}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def drip_out(self) -> None:
                try:
                    for byte in b"HTTP/1.1 200 OK\r\n" + b"X-Slow: 1\r\n" * 50:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.1)
                except OSError:
                    pass

            def do_GET(self) -> None:
                receiver.got.append(Got("GET", self.path, {}, b""))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def target(self, path: str = "/hook?token=hunter2", secret: bytes = b"s3cret", timeout: float = 5) -> WebhookTarget:
        return WebhookTarget(f"http://127.0.0.1:{self.port}{path}", secret, int(timeout * 1e6))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()
