"""An upstream that answers byte for byte as it is told: for what a simulator of limits has no reason to do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

MODEL = "claude-sonnet-5"
USAGE = {
    "input_tokens": 12,
    "cache_creation_input_tokens": 2,
    "cache_read_input_tokens": 3,
    "output_tokens": 5,
}
HEADERS = {
    "anthropic-ratelimit-requests-limit": "50",
    "anthropic-ratelimit-requests-remaining": "49",
    "request-id": "req_1",
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": MODEL,
    "content": [{"type": "text", "text": "hello"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": USAGE,
}
OPENAI_USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 7,
    "total_tokens": 27,
    "prompt_tokens_details": {"cached_tokens": 4},
}
TEXT = "hello world "


class Exchange:
    """One request, and the way to answer it."""

    def __init__(self, path: str, headers: dict[str, str], body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.path = path
        self.headers = headers
        self.body = body
        self._writer = writer

    async def begin(self, status: int, content_type: str, length: int | None = None, /, **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-type: {content_type}", "connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in (HEADERS | headers).items()]
        lines.append("transfer-encoding: chunked" if length is None else f"content-length: {length}")
        self._writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        await self._writer.drain()

    async def chunk(self, data: bytes) -> None:
        self._writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self._writer.drain()

    async def finish(self) -> None:
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def json(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        await self.begin(status, "application/json", len(data), **headers)
        self._writer.write(data)
        await self._writer.drain()


Script = Callable[[Exchange], Coroutine[Any, Any, None]]


def event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()


START = event(
    "message_start",
    message={**MESSAGE, "content": [], "stop_reason": None, "usage": {**USAGE, "output_tokens": 1}},
) + event("content_block_start", index=0, content_block={"type": "text", "text": ""})
DELTA = event("content_block_delta", index=0, delta={"type": "text_delta", "text": TEXT})
END = (
    event("content_block_stop", index=0)
    + event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 15})
    + event("message_stop")
)
OVERLOADED = event("error", error={"type": "overloaded_error", "message": "Overloaded"})
WHOLE = START + DELTA * 4 + END


def chunk_of_chat(**fields: Any) -> bytes:
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-5-x", "usage": None} | fields
    return b"data: " + json.dumps(body).encode() + b"\n\n"


CHAT_DELTA = chunk_of_chat(choices=[{"index": 0, "delta": {"content": TEXT}, "finish_reason": None}])
CHAT_USAGE = chunk_of_chat(choices=[], usage=OPENAI_USAGE)
CHAT_DONE = b"data: [DONE]\n\n"


async def ordinary(exchange: Exchange) -> None:
    """What the path and the body ask for, with success."""
    if "/chat/completions" in exchange.path and exchange.body.get("stream"):
        await exchange.begin(200, "text/event-stream")
        options = exchange.body.get("stream_options") or {}
        end = CHAT_USAGE + CHAT_DONE if options.get("include_usage") else CHAT_DONE
        for piece in (CHAT_DELTA, CHAT_DELTA, CHAT_DELTA, CHAT_DELTA, end):
            await exchange.chunk(piece)
        await exchange.finish()
    elif "/chat/completions" in exchange.path:
        choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        body = {"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-5-x", "choices": [choice]}
        await exchange.json(200, body | {"usage": OPENAI_USAGE})
    elif "/embeddings" in exchange.path:
        data = [{"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}]
        usage = {"prompt_tokens": 6, "total_tokens": 6}
        await exchange.json(200, {"object": "list", "data": data, "model": "text-embedding-3", "usage": usage})
    elif exchange.path.startswith("/v1/messages/count_tokens"):
        await exchange.json(200, {"input_tokens": 9})
    elif exchange.body.get("stream"):
        await exchange.begin(200, "text/event-stream")
        for piece in (START, *[DELTA] * 4, END):
            await exchange.chunk(piece)
        await exchange.finish()
    else:
        await exchange.json(200, MESSAGE)


def refusing(status: int, kind: str, text: str, **headers: str) -> Script:
    async def script(exchange: Exchange) -> None:
        error = {"type": kind, "message": text, "details": {"error_code": "why"}}
        await exchange.json(status, {"type": "error", "error": error}, **headers)

    return script


def streaming(*pieces: bytes, cut: bool = False, then: threading.Event | None = None, **headers: str) -> Script:
    """Sends the pieces; then ends the body, or cuts the connection, or waits (``then``) and cuts it."""

    async def script(exchange: Exchange) -> None:
        await exchange.begin(200, "text/event-stream", None, **headers)
        for piece in pieces:
            await exchange.chunk(piece)
        if then is not None:
            await asyncio.to_thread(then.wait, 20)
        elif not cut:
            await exchange.finish()

    return script


class Stub:
    """Runs in a thread of its own. Each request takes the next script, or else the ordinary one."""

    def __init__(self) -> None:
        self.scripts: deque[Script] = deque()
        self.seen: list[Exchange] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._port = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = self._loop.create_task(self._answer(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
            }
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            exchange = Exchange(head[0].split()[1], headers, json.loads(body or b"{}"), writer)
            self.seen.append(exchange)
            script = self.scripts.popleft() if self.scripts else ordinary
            await script(exchange)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
