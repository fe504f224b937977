"""The snippets of the README run, and what it says of defaults is so."""

from __future__ import annotations

import asyncio
import inspect
import re
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline_client import AsyncClient, Client, _client, _config, _core, _hub, _local, _outcome
from tests.client.fake import Fake

README = (Path(__file__).resolve().parents[2] / "clients" / "python" / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RESPONSE = SimpleNamespace(usage=SimpleNamespace(input_tokens=1, output_tokens=2), model="m")


@contextmanager
def stream(**call: object) -> Any:
    response = SimpleNamespace(headers={"retry-after": "1"})
    yield SimpleNamespace(response=response, text_stream=["a", "b"], get_final_message=lambda: RESPONSE)


async def create_async(**call: object) -> object:
    return RESPONSE


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0][:40])
def test_the_snippets_run(
    snippet: str,
    server: Fake,
    connect: Callable[..., Client],
    connect_async: Callable[..., AsyncClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline_client.Client", connect)
    monkeypatch.setattr("paceline_client.AsyncClient", connect_async)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    uses_async = "await" in snippet
    names: dict[str, Any] = {
        "anthropic": SimpleNamespace(
            messages=SimpleNamespace(create=create_async if uses_async else lambda **call: RESPONSE, stream=stream)
        ),
        "paceline": connect(),
        "call": {"model": "claude-sonnet-5"},
        "messages": [{"role": "user", "content": "Hello."}],
        "print": lambda text: None,
    }
    if uses_async:
        body = f"async def main():\n{textwrap.indent(snippet, '    ')}\n    await paceline.flush(10)\n"
        exec(compile(body, "README.md", "exec"), names)
        asyncio.run(names["main"]())
    else:
        exec(compile(snippet, "README.md", "exec"), names)
        assert names["paceline"].flush(10)
    for commit in server.items("commit"):
        assert commit.outcome.usage.output_tokens == 2
    assert bool(server.items("reserve")) == ("reserve" in snippet)
    assert len(server.items("commit")) == (10 if "reserve_many" in snippet else len(server.items("reserve")))


def test_the_options_are_all_there() -> None:
    parameters = set(inspect.signature(Client.__init__).parameters) - {"self"}
    table = README.split("## Options")[1]
    assert parameters == {name for name in parameters if f"`{name}`" in table}
    asked = README.split("## What to ask for")[1].split("## What a block means")[0]
    from paceline_client._plan import Ask

    # Of bulk and batch endpoints the docstrings tell.
    assert [name for name in Ask.__annotations__ if f"`{name}`" not in asked and f"`{name}=" not in asked] == [
        "requests"
    ]


def test_the_numbers_are_those_of_the_code() -> None:
    assert f"`budget` ({_config.DEFAULT_BUDGET} s)" in README
    assert f"| `{_config.DEFAULT_BUDGET}` |" in README
    assert f"| `{_config.DEFAULT_LOCAL_SCALE}` |" in README
    assert _config.DEFAULT_LOCAL_SCALE == 4 / 5
    assert _local.BURST == 1 / 4
    given = _local.BUILT_IN
    told = (
        f"{given['requests']} requests, {given['input_tokens']:,} input and {given['output_tokens']:,} output tokens "
        f"per minute and model, {given['concurrency']} at a time"
    )
    assert told in README
    assert f"`{_config.DEFAULT_ADDRESS}`" in README
    assert f"{_core.MAX_REPORTS:,} at most" in README
    assert _core.REPORT_MAX_AGE == 3_600
    assert _client.CLOSE_BUDGET == 2
    assert _hub.EXIT_BUDGET + _hub.JOIN_BUDGET <= 2
    assert {429, 503, 529} == _outcome._REJECTED
