"""How large a request is, from its body, in one pass; and which part of it the upstream's cache probably holds.

A prompt with ``cache_control`` is taken for cached as far as this process has sent the same beginning before, with
success, within the life of the cache: the first time it is uncached input. What was seen is known by a hash.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from paceline_client._estimate import MESSAGE, TOOLS, Scale, characters_per_token

MAX_SEEN: Final = 4_096
"""Beginnings of prompts that are remembered."""
CACHE_LIFE: Final = 300.0
LONG_CACHE_LIFE: Final = 3_600.0
"""Unit: seconds."""
SMALLEST_CACHED: Final = 1_024
"""The upstream caches no shorter beginning. Unit: tokens."""

Mark = tuple[int, float]
"""The hash of a beginning, and how long it will be cached from its last use."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of one request. Unit: tokens."""

    input_tokens: int
    cached_tokens: int | None = None
    """In addition to the others. ``None``: nothing is marked for the cache."""
    max_output_tokens: int | None = None
    marks: tuple[Mark, ...] = ()


class Seen:
    """The beginnings of prompts that the upstream's cache should hold. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._until: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, mark: int) -> bool:
        until = self._until.get(mark)
        return until is not None and self._clock() < until

    def renew_lock(self) -> None:
        """In the child of a fork: a thread that held it has stayed in the parent."""
        self._lock = threading.Lock()

    def add(self, marks: Sequence[Mark]) -> None:
        """They were written, or read, just now."""
        now = self._clock()
        with self._lock:
            for mark, life in marks:
                self._until[mark] = now + life
                self._until.move_to_end(mark)
            while len(self._until) > MAX_SEEN:
                self._until.popitem(last=False)


def of_messages(body: Mapping[str, Any], seen: Seen) -> Size:
    """Of a request of Anthropic's Messages API."""
    model = str(body.get("model", ""))
    scale = Scale(characters_per_token(model))
    bound = _count(body.get("max_tokens"))
    if not _is_marked(body):
        return Size(_whole(scale.request(body)), None, bound)
    total = cached = 0.0
    key = hash(model)
    marks: list[Mark] = []
    pending: list[tuple[int, float]] = []
    for text, tokens, control in _parts(body, scale):
        total += tokens
        key = hash((key, text))
        pending.append((key, total))
        if control is not None and total >= SMALLEST_CACHED:
            marks.append((key, LONG_CACHE_LIFE if control.get("ttl") == "1h" else CACHE_LIFE))
            # The upstream, too, looks for what was marked in an earlier request and no longer is.
            cached = next((at for each, at in reversed(pending) if each in seen), cached)
            pending.clear()
    return Size(_whole(total - cached), _whole(cached), bound, tuple(marks))


def of_completion(body: Mapping[str, Any]) -> Size:
    """Of a request of OpenAI's chat completions or responses."""
    scale = Scale(characters_per_token(str(body.get("model", ""))))
    bound = next(
        (
            count
            for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")
            if (count := _count(body.get(name))) is not None
        ),
        None,
    )
    if bound is not None:
        bound = min(bound * (_count(body.get("n")) or 1), 0x7FFFFFFF)
    return Size(_whole(scale.request(body)), None, bound)


def of_embeddings(body: Mapping[str, Any]) -> Size:
    """Of a request of OpenAI's embeddings: a text or its tokens, or a list of such."""
    scale = Scale(characters_per_token(str(body.get("model", ""))))

    def weigh(value: object) -> float:
        if isinstance(value, str):
            return scale.content(value)
        if isinstance(value, Sequence):
            return float(len(value)) if value and isinstance(value[0], int) else sum(map(weigh, value), 0.0)
        return 0.0

    return Size(_whole(weigh(body.get("input"))), None, 0)


def _is_marked(body: Mapping[str, Any]) -> bool:
    if body.get("cache_control"):
        return True
    if any(_control(each) for each in _list(body.get("system"))):
        return True
    if any(_control(each) for each in _list(body.get("tools"))):
        return True
    for message in reversed(_list(body.get("messages"))):
        content = message.get("content") if isinstance(message, Mapping) else None
        if any(_control(each) for each in _list(content)):
            return True
    return False


def _parts(body: Mapping[str, Any], scale: Scale) -> Iterator[tuple[str, float, Mapping[str, Any] | None]]:
    """The text, the tokens and the mark of each part, in the order in which the upstream reads and caches them."""
    tools = _list(body.get("tools"))
    for number, tool in enumerate(tools):
        text = _text(tool)
        yield text, scale.json(text) + (0 if number else TOOLS), _control(tool)
    last: tuple[str, float, Mapping[str, Any] | None] | None = None
    for role, content in _messages(body):
        frame = float(MESSAGE)
        for block in [content] if isinstance(content, str) else _list(content):
            if last is not None:
                yield last
            last = f"{role}:{_text(block)}", scale.block(block) + frame, _control(block)
            frame = 0.0
    if last is not None:
        # A mark of the whole request stands for one on its last part.
        control = body.get("cache_control")
        yield last[0], last[1], last[2] or (control if isinstance(control, Mapping) else None)


def _messages(body: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    if body.get("system"):
        yield "system", body["system"]
    for message in _list(body.get("messages")):
        if isinstance(message, Mapping):
            yield str(message.get("role")), message.get("content")


def _text(block: object) -> str:
    if isinstance(block, str):
        return block
    if not isinstance(block, Mapping):
        return str(block)
    text = block.get("text")
    if isinstance(text, str) and block.get("type") == "text":
        return text
    return json.dumps({key: value for key, value in block.items() if key != "cache_control"}, default=str)


def _control(block: object) -> Mapping[str, Any] | None:
    found = block.get("cache_control") if isinstance(block, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _count(value: object) -> int | None:
    return min(value, 0x7FFFFFFF) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _whole(tokens: float) -> int:
    return min(math.ceil(tokens - 1e-9), 0x7FFFFFFF)
