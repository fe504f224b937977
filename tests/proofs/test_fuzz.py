"""A small run of the proof. ``make prove-fuzz`` is the whole."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.proofs.fuzz import prove, report

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.mark.timeout(120)
def test_no_message_breaks_the_server(tmp_path: Path) -> None:
    result = prove(2_000, secrets.randbits(32), tmp_path)
    print(report(result))
    assert result.passed, report(result)
    assert result.answers["grants"] > 50
    assert result.neighbours > 50
    assert result.quiet["refused"] > 50
