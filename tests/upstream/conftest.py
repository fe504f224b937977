"""What the tests of the simulator share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from paceline.upstream import Call, Config, Group, Scenario

MODEL = "claude-opus-5"
QUICK = Scenario(first_byte_ms=0, tokens_per_second=0)
"""Answers come at once."""


def config(requests: int = 100, coming: int = 10_000, going: int = 5_000, **more: Any) -> Config:
    """One group of Anthropic's and one of OpenAI's."""
    return Config(
        groups=(
            Group(
                name="claude",
                models=("claude-*",),
                limits={"requests": requests, "input_tokens": coming, "output_tokens": going},
            ),
            Group(name="gpt", models=("gpt-*",), api="openai", limits={"requests": requests, "tokens": coming}),
        ),
        **more,
    )


def call(estimate: int = 100, true: int | None = None, model: str = MODEL, **more: Any) -> Call:
    return Call(id="c", model=model, estimate=estimate, input=estimate if true is None else true, **more)


class Clock:
    """Time in a test's hands."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def __call__(self) -> int:
        return self.ns

    def forward(self, seconds: float) -> None:
        self.ns += round(seconds * 1_000_000_000)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that happens soon."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the simulator has no such event
            await asyncio.sleep(0.005)
