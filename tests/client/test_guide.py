"""The snippets of the client's page in the documentation run, and what it says of defaults is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline_client import Client, Step, _gather, _merge, _steps, fit_prompt
from paceline_client.stubs import v1 as pb
from tests.client.fake import Fake, granted

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "clients-python.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
RESPONSE = SimpleNamespace(usage=SimpleNamespace(input_tokens=1, output_tokens=2), model="m")


def client() -> SimpleNamespace:
    return SimpleNamespace(messages=SimpleNamespace(create=lambda **call: RESPONSE))


def on_main(request: pb.ReserveRequest) -> pb.ReserveResponse:
    response = granted(request)
    response.grant.target.account = "main"
    return response


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: re.sub(r"\W+", " ", snippet)[:40])
def test_the_snippets_run(
    snippet: str, server: Fake, connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("anthropic")
    monkeypatch.setenv("PACELINE_ADDRESS", server.address)
    server.on_reserve = on_main
    shown: list[object] = []
    items = ["a", "b", "c"]
    names: dict[str, Any] = {
        "anthropic": client(),
        "client_a": client(),
        "client_b": client(),
        "paceline": connect(),
        "call": {"model": "claude-sonnet-5"},
        "messages": [{"role": "user", "content": "Hello."}],
        "fit_prompt": fit_prompt,
        "texts": items,
        "items": items,
        "read_lines": lambda response: ["label"],
        "vault": SimpleNamespace(read=str),
        "print": lambda *words: shown.extend(words),
    }
    exec(compile(snippet, "clients-python.md", "exec"), names)
    assert names["paceline"].flush(10)
    if "hook" in snippet:
        return
    assert server.items("reserve")
    committed = server.items("commit")
    assert [each.outcome.usage.output_tokens for each in committed] == [2] * len(committed)
    assert committed
    if "answer" in names:
        assert (names["answer"].step, names["answer"].value) == (0, RESPONSE)
    if "labels" in names:
        assert names["labels"] == ["label"] * 3
    if "print" in snippet:
        assert shown == [0, RESPONSE]
    if "reserve_many" in snippet:
        assert (len(committed), len(server.items("release"))) == (3, 7)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 6


def test_the_numbers_are_those_of_the_code() -> None:
    for said in (
        f"| {_merge.MAX_ITEMS}, {_merge.MAX_TOKENS:,} |",
        f"| {_merge.MAX_DELAY} |",
        f"| {_merge.MAX_CALLS} |",
        f"| {_merge.MAX_WAITING:,} |",
    ):
        assert said in GUIDE
    assert _gather.SCARCE == 1 / 4
    assert all(f"`{name}`" in GUIDE for name in _gather.PER_CALL)
    assert all(f"`{name}`" in GUIDE for name in Step.__dataclass_fields__)
    assert {"released"} == _steps._FINAL
