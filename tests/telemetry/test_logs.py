"""Logs: two forms, and no secrets in either."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from paceline.telemetry.logs import REMOVED, is_secret, set_up_logging

SECRET = "sk-ant-very-secret"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "key",
    [
        "authorization",
        "Authorization",
        "x-api-key",
        "api_key",
        "apiKey",
        "token",
        "bearer_token",
        "headers",
        "prompt",
        "request.headers",
        "system_prompt",
        "completion",
        "password",
        "set-cookie",
        "messages",
        "body",
        "signing_key",
    ],
)
def test_secrets_are_removed(form: str, key: str) -> None:
    out = io.StringIO()
    set_up_logging("json" if form == "json" else "text", "info", out)
    log = structlog.get_logger("x").bind(**{key: SECRET})
    log.warning("hello", nested={"deeper": [{key: SECRET}]}, pool="p")
    assert SECRET not in out.getvalue()
    assert REMOVED in out.getvalue()
    assert "hello" in out.getvalue()


def test_counts_are_no_secrets() -> None:
    assert not is_secret("input_tokens", 1200)
    assert not is_secret("pool", "anthropic/main/sonnet")
    assert not is_secret("authority", "example")
    assert is_secret("input_tokens", "sk-1")


def test_json_is_one_object_a_line() -> None:
    out = io.StringIO()
    set_up_logging("json", "info", out)
    structlog.get_logger("x").warning("two\nlines", number=1, thing=object)
    logging.getLogger("library").warning("from %s", "elsewhere")
    first, second = [json.loads(line) for line in out.getvalue().splitlines()]
    assert (first["event"], first["number"], first["level"]) == ("two\nlines", 1, "warning")
    assert second["event"] == "from elsewhere"
    assert {"timestamp", "level"} <= second.keys()


def test_tracebacks_hold_no_values() -> None:
    out = io.StringIO()
    set_up_logging("json", "info", out)
    key = SECRET
    try:
        raise ValueError(len(key))
    except ValueError:
        structlog.get_logger("x").exception("failed")
    assert SECRET not in out.getvalue()
    assert json.loads(out.getvalue())["exception"][0]["exc_type"] == "ValueError"


def test_levels() -> None:
    out = io.StringIO()
    set_up_logging("text", "error", out)
    structlog.get_logger("x").warning("quiet")
    logging.getLogger("library").warning("quiet")
    structlog.get_logger("x").error("loud")
    assert "quiet" not in out.getvalue()
    assert "loud" in out.getvalue()
    # Nobody looks at a file in colours.
    assert "\x1b[" not in out.getvalue()
