"""Each bad file of the corpus gives exactly the lines that stand beside it, and never an exception or a secret."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paceline.config import ConfigError, check, load_config

BAD = Path(__file__).parent / "bad"
FILES = sorted(file.name for file in BAD.glob("*.yaml"))


def test_the_corpus_is_there() -> None:
    assert len(FILES) >= 25
    assert {Path(name).stem for name in FILES} == {file.stem for file in BAD.glob("*.expected")}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_in_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD)
    with pytest.raises(ConfigError) as refused:
        load_config(name, {})
    lines = refused.value.lines
    assert lines == (BAD / name).with_suffix(".expected").read_text("utf-8").splitlines()
    assert check(name, {}) == (tuple(lines), ())
    for line in lines:
        assert re.fullmatch(r"[\w./-]+\.yaml:\d+: \S.*: .*[;,?].*", line), line
        assert "hunter2" not in line
