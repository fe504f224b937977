"""The matrix for the OpenAI SDK, as far as its hook differs from the other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.hooks_matrix.application import MODES, Mode
from tests.hooks_matrix.judge import judge
from tests.hooks_matrix.sdk_openai import OpenAiSdk
from tests.hooks_matrix.situations import SITUATIONS, Form, Mark, Situation, cells
from tests.hooks_matrix.world import Background

ROWS = tuple(
    row
    for row in SITUATIONS
    if row.name
    in (
        "success",
        "429 then success",
        "429 until given up",
        "529",
        "mid-stream error",
        "cut off by the caller",
        "time-out before headers",
        "upstream gone",
        "connection dropped",
        "Paceline denies",
    )
)


def _uncounted(mark: Mark) -> Mark:
    return "uncounted" if mark == "final" else mark


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("situation", "form"), [pytest.param(*cell, id=f"{cell[0].name}-{cell[1]}") for cell in cells(ROWS)]
)
def test_cell(background: Background, situation: Situation, form: Form, mode: Mode) -> None:
    judge(background, OpenAiSdk(include_usage=True), mode, form, situation)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["success", "429 then success", "cut off by the caller"])
def test_stream_without_usage(background: Background, name: str, mode: Mode) -> None:
    (row,) = (row for row in ROWS if row.name == name)
    marks: dict[Form, tuple[Mark, ...]] = {"stream": tuple(map(_uncounted, row.marks["stream"]))}
    judge(background, OpenAiSdk(include_usage=False), mode, "stream", replace(row, marks=marks))
