"""The matrix for the Anthropic SDK."""

from __future__ import annotations

import pytest

from tests.hooks_matrix.application import MODES, Mode
from tests.hooks_matrix.judge import judge
from tests.hooks_matrix.sdk_anthropic import AnthropicSdk
from tests.hooks_matrix.situations import FORMS, SITUATIONS, Form, Situation, cells
from tests.hooks_matrix.world import Background

SDK = AnthropicSdk()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("situation", "form"), [pytest.param(*cell, id=f"{cell[0].name}-{cell[1]}") for cell in cells()]
)
def test_cell(background: Background, situation: Situation, form: Form, mode: Mode) -> None:
    judge(background, SDK, mode, form, situation)


def test_every_combination_is_a_cell_or_has_a_reason() -> None:
    for row in SITUATIONS:
        for form in FORMS:
            assert (form in row.marks) != bool(row.absent.get(form)), (row.name, form)
