"""From the decoded body of a request to what it counts: tokens, bytes, prefixes in the cache, and directives.

How many tokens an answer has is decided by the caller, with ``paceline-sim:output=137`` in ``metadata.user_id``
(Anthropic) or ``user`` (OpenAI), or by the header ``x-paceline-output: 137``. Further words follow after commas:
``tool`` asks for an answer that calls the first tool.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from paceline.upstream.tokens import FOR_TOOLS, IMAGE, PER_MESSAGE, count

PREFIX = "paceline-sim:"


class BadRequest(ValueError):
    """The body is not what the API takes: the message says where."""


class Piece(msgspec.Struct, gc=False):
    """A part of the prompt that can be the end of a cached prefix."""

    tokens: int
    size: int
    images: int
    breakpoint: bool
    text: str


class Prompt(msgspec.Struct):
    """What a request asks."""

    model: str
    max_tokens: int | None
    stream: bool
    pieces: list[Piece]
    directive: str
    tool: str | None = None
    """The first tool's name."""
    include_usage: bool = False
    """OpenAI: the last chunk of a stream has the usage."""

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def images(self) -> int:
        return sum(piece.images for piece in self.pieces)


class Directive(msgspec.Struct, frozen=True):
    """What the caller wants to happen."""

    output: int | None = None
    tool: bool = False


def directive_of(text: str) -> Directive:
    """``output=137,tool``; a lone number is the output. Raises :class:`BadRequest`."""
    output, tool = None, False
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        figure = value if name == "output" else name if not value else ""
        if name == "tool" and not value:
            tool = True
        elif figure.isascii() and figure.isdigit() and len(figure) <= 9:
            output = int(figure)
        elif word.strip():
            raise BadRequest(f"{PREFIX}{text[:64]}: not a directive")
    return Directive(output, tool)


def _directive(value: object) -> str:
    return value[len(PREFIX) :] if isinstance(value, str) and value.startswith(PREFIX) else ""


def _model(body: Any) -> str:
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    model = body.get("model")
    if not isinstance(model, str) or not model or len(model) > 256:
        raise BadRequest("model: a name is required")
    return model


def _messages(body: Mapping[str, Any]) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: at least one message is required")
    return messages


def _bool(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}: true or false is wanted")
    return bool(value)


def _tokens(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**7):
        raise BadRequest(f"{name}: a whole number of at least 1 is wanted")
    return value


def _piece(text: str, extra: int = 0, mark: bool = False, images: int = 0) -> Piece:
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return Piece(count(text) + extra + images * IMAGE, size, images, mark, text)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _block(block: object, where: str, extra: int) -> Piece:
    """One block of content of any kind: what has no text of its own counts as its JSON."""
    if not isinstance(block, dict) or not isinstance(kind := block.get("type"), str):
        raise BadRequest(f"{where}: a block with a type is wanted")
    mark = block.get("cache_control") is not None
    if kind == "text":
        text = block.get("text")
        if not isinstance(text, str):
            raise BadRequest(f"{where}.text: a text is required")
        return _piece(text, extra, mark)
    if kind in {"image", "image_url", "input_image"}:
        # Its bytes only tell it from others, in the cache.
        found = _piece("", extra, mark, images=1)
        found.text = _json(block)
        return found
    return _piece(_json({name: value for name, value in block.items() if name != "cache_control"}), extra, mark)


def _content(content: object, where: str, extra: int = 0) -> Iterator[Piece]:
    if isinstance(content, str):
        yield _piece(content, extra)
    elif isinstance(content, list):
        for number, block in enumerate(content):
            yield _block(block, f"{where}.{number}", extra if not number else 0)
    else:
        raise BadRequest(f"{where}: a text or a list of blocks is wanted")


def _tool_pieces(body: Mapping[str, Any]) -> tuple[list[Piece], str | None]:
    tools = body.get("tools")
    if tools is None or tools == []:
        return [], None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRequest("tools: a list of definitions is wanted")
    pieces = [
        _piece(
            _json({name: value for name, value in tool.items() if name != "cache_control"}),
            FOR_TOOLS if not number else 0,
            tool.get("cache_control") is not None,
        )
        for number, tool in enumerate(tools)
    ]
    function = tools[0].get("function")
    name = function.get("name") if isinstance(function, dict) else tools[0].get("name")
    return pieces, name if isinstance(name, str) else "tool"


def _roles(messages: list[Any], allowed: frozenset[str]) -> None:
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in allowed:
            raise BadRequest(f"messages.{number}.role: one of {', '.join(sorted(allowed))} is wanted")


_ANTHROPIC_ROLES = frozenset({"user", "assistant", "system"})
_OPENAI_ROLES = frozenset({"user", "assistant", "system", "developer", "tool", "function"})


def messages_prompt(body: Any, counting: bool = False) -> Prompt:
    """A body of ``POST /v1/messages``; ``counting``: of ``count_tokens``. Raises :class:`BadRequest`."""
    model = _model(body)
    max_tokens = _tokens(body, "max_tokens")
    if max_tokens is None and not counting:
        raise BadRequest("max_tokens: Field required")
    messages = _messages(body)
    _roles(messages, _ANTHROPIC_ROLES)
    # The order of the real prompt, which decides what a prefix is.
    pieces, tool = _tool_pieces(body)
    if (system := body.get("system")) is not None:
        pieces.extend(_content(system, "system"))
    for number, message in enumerate(messages):
        pieces.extend(_content(message.get("content"), f"messages.{number}.content", PER_MESSAGE))
    metadata = body.get("metadata")
    return Prompt(
        model=model,
        max_tokens=max_tokens,
        stream=_bool(body, "stream"),
        pieces=pieces,
        directive=_directive(metadata.get("user_id") if isinstance(metadata, dict) else None),
        tool=tool,
    )


def chat_prompt(body: Any) -> Prompt:
    """A body of ``POST /v1/chat/completions``. Raises :class:`BadRequest`."""
    model = _model(body)
    messages = _messages(body)
    _roles(messages, _OPENAI_ROLES)
    max_tokens = _tokens(body, "max_completion_tokens")
    pieces, tool = _tool_pieces(body)
    for number, message in enumerate(messages):
        content = message.get("content")
        if content is None and message["role"] == "assistant":
            content = _json(message.get("tool_calls"))
        pieces.extend(_content(content, f"messages.{number}.content", PER_MESSAGE))
    options = body.get("stream_options")
    return Prompt(
        model=model,
        max_tokens=_tokens(body, "max_tokens") if max_tokens is None else max_tokens,
        stream=_bool(body, "stream"),
        pieces=pieces,
        directive=_directive(body.get("user")),
        tool=tool,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


class Split(msgspec.Struct, frozen=True):
    """The input of a call by how it counts."""

    input: int
    cache_read: int
    cache_write: int
    size: int
    """Bytes that are neither read nor known from the cache."""
    images: int
    keys: tuple[tuple[bytes, int], ...]
    """What the call leaves in the cache, if it is let in."""


class PrefixCache:
    """Prefixes of prompts seen a short while ago, the least recently used forgotten first.

    A prefix ends at a block with ``cache_control``. The longest known one is read, what lies between it and the last
    such block is written, the rest is plain input. Looking does not change it: a call that is refused caches nothing.
    """

    def __init__(self, seconds: float, minimum: int, entries: int) -> None:
        self._keep_us = round(seconds * 1_000_000)
        self._minimum = minimum
        self._entries = entries
        self._until: OrderedDict[bytes, int] = OrderedDict()

    def look(self, now: int, prompt: Prompt) -> Split:
        """How the prompt would count at ``now`` (µs)."""
        pieces = prompt.pieces
        last = max((number for number, piece in enumerate(pieces) if piece.breakpoint), default=-1)
        if last < 0:
            return Split(prompt.tokens, 0, 0, prompt.size, prompt.images, ())
        digest = hashlib.blake2b(prompt.model.encode("utf-8", "surrogatepass"), digest_size=16)
        tokens = size = images = 0
        read = read_size = read_images = 0
        keys: list[tuple[bytes, int]] = []
        for piece in pieces[: last + 1]:
            digest.update(piece.text.encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
            tokens += piece.tokens
            size += piece.size
            images += piece.images
            if tokens < self._minimum:
                continue
            key = digest.digest()
            hit = self._until.get(key, -1) >= now
            if hit:
                read, read_size, read_images = tokens, size, images
            # A hit is kept alive wherever it ends; a new prefix is kept where the caller asked for it.
            if hit or piece.breakpoint:
                keys.append((key, now + self._keep_us))
        write = tokens - read if tokens >= self._minimum else 0
        return Split(
            input=prompt.tokens - read - write,
            cache_read=read,
            cache_write=write,
            size=prompt.size - read_size,
            images=prompt.images - read_images,
            keys=tuple(keys),
        )

    def keep(self, split: Split) -> None:
        """The call was let in: its prefixes are in the cache from now on."""
        for key, until in split.keys:
            self._until[key] = until
            self._until.move_to_end(key)
        while len(self._until) > self._entries:
            self._until.popitem(last=False)
