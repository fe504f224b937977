"""``PACELINE_DISABLED=1``: as if we were not there."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from typing import BinaryIO

import pytest

pytestmark = pytest.mark.process

PROGRAM = """
import asyncio, json, os, sys
import anthropic

def client(kind, with_us):
    extra = {}
    if with_us:
        from paceline_client.hooks.anthropic import PacelineMiddleware
        extra["middleware"] = [PacelineMiddleware(tenant="t", priority="batch", max_wait=5)]
    return kind(base_url=os.environ["UPSTREAM"], api_key="none", max_retries=0, **extra)

ASK = dict(model="claude-sonnet-5", max_tokens=16, messages=[{"role": "user", "content": "hello"}])

async def asynchronous(with_us):
    async with client(anthropic.AsyncAnthropic, with_us) as found:
        await found.messages.create(**ASK)

with_us = sys.argv[1] == "with"
asyncio.run(asynchronous(with_us))
with client(anthropic.Anthropic, with_us) as found:
    found.messages.create(**ASK)
if with_us:
    from paceline_client import Client
    with Client() as paceline, paceline.reserve(model="m") as grant:
        grant.commit_usage(input_tokens=1, output_tokens=1)
print(json.dumps({"grpc": any(name.split(".")[0] == "grpc" for name in sys.modules)}))
"""

ANSWER = json.dumps(
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-5",
        "content": [{"type": "text", "text": "hi"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 8, "output_tokens": 2},
    }
).encode()


SIGN = b"X-Stainless-Raw-Response: raw\r\n"
"""The SDK says so of every request that passes a middleware, whatever that does."""


class Recorder:
    """Answers every request with the same message, and keeps the requests as they came. Or only counts who comes."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            while head := self._head(lines):
                length = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
                self.requests.append(head + lines.read(length))
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
                    + ANSWER
                )

    @staticmethod
    def _head(lines: BinaryIO) -> bytes:
        head = b""
        while line := lines.readline():
            head += line
            if line == b"\r\n":
                return head
        return b""

    def close(self) -> None:
        self._socket.close()


def test_nothing_is_contacted_and_nothing_changes_on_the_wire() -> None:
    upstream, coordinator = Recorder(), Recorder()
    said = {}
    sent = {}
    try:
        for how in ("without", "with"):
            upstream.requests.clear()
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, how],
                env={
                    **os.environ,
                    "UPSTREAM": f"http://{upstream.address}",
                    "PACELINE_ADDRESS": coordinator.address,
                    "PACELINE_DISABLED": "1",
                },
                capture_output=True,
                text=True,
                timeout=40,
                check=True,
            )
            said[how] = json.loads(done.stdout)
            assert not done.stderr
            sent[how] = [request.replace(SIGN, b"") for request in upstream.requests]
    finally:
        upstream.close()
        coordinator.close()
    assert len(sent["without"]) == 2
    assert sent["with"] == sent["without"]
    assert said["with"] == {"grpc": False}
    assert coordinator.connections == 0
