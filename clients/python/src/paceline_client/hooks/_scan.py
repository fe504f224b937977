"""Reads the usage out of a response body while it passes by, in bounded memory.

Nothing is held up: a scanner is shown each piece and keeps of it only what a line needs that is not complete yet. Of
the events of a stream the few that carry usage, an error or the end are parsed; of the others the length of the text
is taken, so that something is known of a stream that is cut off.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

from paceline_client._model import Usage
from paceline_client._outcome import UpstreamError, read_error, read_usage

MAX_LINE: Final = 65_536
"""Of a longer line, or body, only the beginning and the end are kept. Unit: bytes."""
HEAD: Final = 4_096
TAIL: Final = 32_768
"""Behind the usage stand at most 16 pairs of metadata, of half a kilobyte each. Unit: bytes."""
MAX_INFLATED: Final = 1 << 20
"""Of compressed data, decompressed at once. Unit: bytes."""
BYTES_PER_TOKEN: Final = 4
"""Of text that was produced. Rather too many: what is reported of an open call can only grow."""

_PARSED: Final = frozenset(
    {b"message_start", b"message_delta", b"error", b"response.completed", b"response.incomplete", b"response.failed"}
)
_LAST: Final = frozenset({b"message_stop", b"response.completed", b"response.incomplete"})
_SILENT: Final = frozenset({b"ping", b"content_block_start", b"content_block_stop"})
# Within a JSON text a quote is escaped, so this cannot stand in a string.
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
_MODEL: Final = re.compile(rb'"model"\s*:\s*"([^"\\]{1,256})"')
_TEXT: Final = re.compile(
    rb'"(?:text|partial_json|thinking|content|reasoning_content|arguments|refusal|delta)"\s*:\s*'
    rb'"((?:[^"\\]++|\\.)*+)'
)


class Scanner(Protocol):
    """Is shown a body, piece by piece."""

    @property
    def usage(self) -> Usage | None:
        """As the upstream has said it so far."""

    @property
    def model(self) -> str:
        """The model that answers. Empty: not known."""

    @property
    def error(self) -> UpstreamError | None:
        """The error in the midst of the stream."""

    @property
    def begun(self) -> bool:
        """The beginning of a stream has said what the input is; the output is still to come."""

    @property
    def complete(self) -> bool:
        """The answer was finished, whether or not more bytes follow."""

    def feed(self, data: bytes) -> None:
        """The next piece."""

    def end(self) -> None:
        """The body has ended as it should."""

    @property
    def produced(self) -> int | None:
        """Output so far, in part estimated. ``None``: nothing is known. Unit: tokens."""


class JsonBody:
    """A JSON body. It is read when it has ended."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.model = ""
        self.error: UpstreamError | None = None
        self.begun = False
        self.complete = False
        self._text = _Clipped()

    @property
    def produced(self) -> int | None:
        return None

    def feed(self, data: bytes) -> None:
        self._text.add(data)

    def end(self) -> None:
        self.complete = True
        head, tail = self._text.head, self._text.tail
        if head:
            self.usage, self.model = _read_ends(head, tail) if tail else _read_whole(head)


class EventStream:
    """Server-sent events of Anthropic's messages, or of OpenAI's chat completions and responses."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.model = ""
        self.error: UpstreamError | None = None
        self.begun = False
        self.complete = False
        self._event = b""
        self._rest = b""
        self._long: _Clipped | None = None
        self._text_bytes = 0
        """Of text since the last count of the upstream."""

    @property
    def produced(self) -> int | None:
        known = None if self.usage is None else self.usage.output_tokens
        if known is None and not self._text_bytes:
            return None
        return (known or 0) + self._text_bytes // BYTES_PER_TOKEN

    def feed(self, data: bytes) -> None:
        if self._long is not None:
            end = data.find(b"\n")
            self._long.add(data if end < 0 else data[:end])
            if end < 0:
                return
            long, self._long = self._long, None
            self._clipped(long)
            data = data[end + 1 :]
        lines = (self._rest + data if self._rest else data).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if len(line) <= MAX_LINE:
                self._line(line)
            else:
                self._clipped(_Clipped(line))
        if len(rest) > MAX_LINE:
            self._long, rest = _Clipped(rest), b""
        self._rest = rest

    def end(self) -> None:
        rest, self._rest = self._rest, b""
        if rest:
            self._line(rest)

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data(line)
        elif line.startswith(b"event:"):
            self._event = line[6:].strip()
        elif not line or line == b"\r":
            self._event = b""

    def _data(self, line: bytes) -> None:
        event = self._event
        if event in _PARSED:
            self._parse(line, event)
        elif not event:
            # Chat completions name no events; and a proxy may have dropped the names.
            if line.startswith((b"data: [DONE]", b"data:[DONE]")) or b'"message_stop"' in line[:64]:
                self.complete = True
            elif b'"error"' in line[:64] or _USAGE.search(line) is not None:
                self._parse(line, event)
            else:
                self._count(line)
        elif event in _LAST:
            self.complete = True
        elif event not in _SILENT and event.endswith((b"_delta", b".delta")):
            self._count(line)

    def _count(self, line: bytes) -> None:
        if not self.model and (named := _MODEL.search(line)) is not None:
            self.model = named[1].decode("utf-8", "replace")
        found = _TEXT.search(line, max(0, line.find(b'"delta"')))
        if found is not None:
            self._text_bytes += found.end(1) - found.start(1)

    def _parse(self, line: bytes, event: bytes) -> None:
        body = json.loads(line[5:])
        if not isinstance(body, Mapping):
            return
        inner = body.get("response")
        holder = inner if isinstance(inner, Mapping) else body
        if holder.get("error"):
            # Only this: a response that failed also holds what it had produced.
            self.error = read_error({"error": holder["error"]})
        message = body.get("message")
        model = (message if isinstance(message, Mapping) else holder).get("model")
        if isinstance(model, str):
            self.model = model
        self._merge(read_usage(body))
        if body.get("type") == "message_start":
            self.begun = self.usage is not None
        if event in _LAST:
            self.complete = True

    def _clipped(self, line: _Clipped) -> None:
        """A line of which the middle is not there."""
        if not line.head.startswith(b"data:"):
            return
        if self._event in _PARSED:
            usage, model = _read_ends(line.head, line.tail)
            self._merge(usage)
            self.model = self.model or model
        elif self._event not in _SILENT and (not self._event or self._event.endswith((b"_delta", b".delta"))):
            self._text_bytes += line.length
        if self._event in _LAST:
            self.complete = True

    def _merge(self, new: Usage | None) -> None:
        """Later counts replace earlier ones; what they leave out stays."""
        if new is None or not new.known:
            return
        if new.output_tokens is not None:
            self._text_bytes = 0
        old = self.usage
        self.usage = new if old is None else replace(old, **dict(_known(new)))


class Inflated:
    """A scanner of a compressed body. ``encoding`` is ``gzip`` or ``deflate``."""

    def __init__(self, scanner: Scanner, encoding: str) -> None:
        self._scanner = scanner
        # Some servers send the bare format under the name of the one with a header: the first two bytes tell.
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16) if encoding == "gzip" else None
        self._first = b""

    def feed(self, data: bytes) -> None:
        inflate = self._inflate
        if inflate is None:
            data = self._first + data
            if len(data) < 2:
                self._first = data
                return
            has_header = data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0
            inflate = self._inflate = zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
        while data:
            self._scanner.feed(inflate.decompress(data, MAX_INFLATED))
            data = inflate.unconsumed_tail

    def end(self) -> None:
        if self._inflate is not None:
            self._scanner.feed(self._inflate.flush())
        self._scanner.end()

    @property
    def usage(self) -> Usage | None:
        return self._scanner.usage

    @property
    def model(self) -> str:
        return self._scanner.model

    @property
    def error(self) -> UpstreamError | None:
        return self._scanner.error

    @property
    def begun(self) -> bool:
        return self._scanner.begun

    @property
    def complete(self) -> bool:
        return self._scanner.complete

    @property
    def produced(self) -> int | None:
        return self._scanner.produced


class _Clipped:
    """A text of any length. Up to a bound all of it is kept, beyond that its beginning and its end."""

    __slots__ = ("_end", "_new", "_pieces", "_start", "length")

    def __init__(self, text: bytes = b"") -> None:
        self.length = 0
        self._start = b""
        """Set when the bound is passed."""
        self._end = b""
        self._pieces: list[bytes] = []
        self._new = 0
        """Bytes in the pieces."""
        self.add(text)

    def add(self, data: bytes) -> None:
        """The next piece."""
        self.length += len(data)
        self._new += len(data)
        self._pieces.append(data)
        if self.length > MAX_LINE and (not self._start or self._new > TAIL):
            text = self._end + b"".join(self._pieces)
            self._start = self._start or text[:HEAD]
            self._end = text[-TAIL:]
            self._pieces = []
            self._new = 0

    @property
    def head(self) -> bytes:
        """All of it, or the beginning."""
        return self._start or b"".join(self._pieces)

    @property
    def tail(self) -> bytes:
        """The end. Empty: the head is all there is."""
        return (self._end + b"".join(self._pieces))[-TAIL:] if self._start else b""


def scanner(content_type: str, encoding: str) -> Scanner | None:
    """The one for a response with these headers. ``None``: such a body cannot be read here."""
    kind = content_type.partition(";")[0].strip().lower()
    found: Scanner
    if kind == "text/event-stream":
        found = EventStream()
    elif kind.endswith("json"):
        found = JsonBody()
    else:
        return None
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return found
    return Inflated(found, encoding) if encoding in ("gzip", "deflate") else None


def read_body(body: bytes) -> tuple[Usage | None, str]:
    """The usage and the model in a whole JSON text. Raises :class:`ValueError` when it is something else."""
    if len(body) > MAX_LINE:
        # Such as megabytes of embeddings, which the SDK parses and nobody need parse twice.
        usage, model = _read_ends(body[:HEAD], body[-TAIL:])
        if usage is not None:
            return usage, model
    return _read_whole(body)


def _read_whole(text: bytes) -> tuple[Usage | None, str]:
    body = json.loads(text)
    model = body.get("model") if isinstance(body, Mapping) else None
    return read_usage(body), model if isinstance(model, str) else ""


def _read_ends(head: bytes, tail: bytes) -> tuple[Usage | None, str]:
    named = _MODEL.search(head) or _MODEL.search(tail)
    usage: Usage | None = None
    # The last: earlier ones may belong to something within the answer.
    for found in _USAGE.finditer(tail):
        try:
            value, _ = _DECODER.raw_decode(tail[found.end() :].decode("utf-8", "replace"))
        except ValueError:
            continue
        usage = read_usage(value) or usage
    return usage, "" if named is None else named[1].decode("utf-8", "replace")


_DECODER: Final = json.JSONDecoder()


def _known(usage: Usage) -> Iterator[tuple[str, Any]]:
    for name in ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens"):
        value = getattr(usage, name)
        if value is not None:
            yield name, value
