"""docs/failures.md: every row names a test, or a proof, that there is."""

from __future__ import annotations

import re
from pathlib import Path

from tests.proofs.process import ROOT

PAGE = ROOT / "docs" / "failures.md"


def rows() -> list[str]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [line for line in lines if not line.startswith(("|---", "| what happens"))]


def test_every_row_names_a_test_that_there_is() -> None:
    makefile = (ROOT / "Makefile").read_text()
    folder = Path(__file__).parent
    name = ""
    seen = set()
    for row in rows():
        last = row.rstrip("| ").rpartition("|")[2]
        if target := re.search(r"`make ([a-z-]+)`", last):
            assert f"\n{target[1]}: env" in makefile, row
            continue
        found = re.search(r"`(?P<file>test_\w+\.py|…)::(?P<test>test_\w+)(\[(?P<case>[^\]]+)\])?`", last)
        assert found, row
        name = name if found["file"] == "…" else found["file"]
        text = (folder / name).read_text()
        assert f"def {found['test']}(" in text, row
        assert not found["case"] or f'"{found["case"]}"' in text, row
        seen.add(found["test"])
    written = {
        test
        for path in folder.glob("test_failures_*.py")
        for test in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M)
    }
    assert seen == written, "every test of a failure has its row"
