"""Logs: structlog, as text for people or as one JSON object a line, on standard error. Secrets never get there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

REMOVED = "[removed]"

SECRET_WORDS = frozenset(
    {
        "authorization",
        "auth",
        "token",
        "tokens",
        "bearer",
        "secret",
        "secrets",
        "password",
        "passwd",
        "credential",
        "credentials",
        "cookie",
        "header",
        "headers",
        "metadata",
        "prompt",
        "prompts",
        "completion",
        "completions",
        "messages",
        "content",
        "body",
        "context",
    }
)
"""A key with one of these words is dropped, unless it is a count: see :func:`is_secret`."""
_SECRET_PAIRS = (("api", "key"), ("private", "key"), ("signing", "key"), ("access", "key"))
_MAX_DEPTH = 4


def is_secret(key: str, value: object = "") -> bool:
    """Whether what stands under ``key`` must not be logged. Numbers are no secrets: ``input_tokens=1200`` stays."""
    if isinstance(value, int | float):
        return False
    words = key.lower().replace("-", "_").replace(".", "_").split("_")
    joined = "".join(words)
    if any(first in words and second in words for first, second in _SECRET_PAIRS) or "apikey" in joined:
        return True
    return not SECRET_WORDS.isdisjoint(words)


def redact(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog: drops the values of secret keys, in nested mappings too."""
    for key in event:
        if key != "event":
            event[key] = REMOVED if is_secret(key, event[key]) else _cleaned(event[key], 0)
    return event


def _cleaned(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        if depth == _MAX_DEPTH:
            return REMOVED
        return {
            key: REMOVED if isinstance(key, str) and is_secret(key, each) else _cleaned(each, depth + 1)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return REMOVED if depth == _MAX_DEPTH else [_cleaned(each, depth + 1) for each in value]
    return value


def set_up_logging(form: LogFormat = "text", level: LogLevel = "info", stream: TextIO | None = None) -> None:
    """Send the logs of this process, those of libraries too, to ``stream`` (standard error)."""
    output = sys.stderr if stream is None else stream
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        redact,
    ]
    if form == "json":
        ending: list[structlog.typing.Processor] = [
            # Without the values of local variables, which may be anything.
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(sort_keys=True, default=repr),
        ]
    else:
        ending = [
            structlog.dev.ConsoleRenderer(
                colors=output.isatty(), exception_formatter=structlog.dev.plain_traceback, sort_keys=False
            )
        ]
    structlog.configure(
        processors=[*shared, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(output),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING if level == "info" else level.upper())
