"""Books that earlier versions wrote are read: stopped in order (a snapshot), and killed (records after it).

The files of ``data/`` hold 60 calls of 5,000 tokens of input each: of three, one is open and two have settled at 4,000.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from paceline.engine.dimensions import Dimension
from paceline.engine.operations import Release
from paceline.engine.state import State
from paceline.ledger.clock import ManualClock
from paceline.ledger.owner import Owner
from paceline.ledger.sqlite import SqliteStore

DATA = Path(__file__).parent / "data"
RECORDED_AT = 1_795_305_600_000_000
"""The wall clock stands at midnight before the files were written: a ledger's time never runs backwards, so that the
holds in them are as old as when they were written, on whatever day this runs."""


def unpacked(file: Path, folder: Path) -> Path:
    path = folder / "books.db"
    path.write_bytes(gzip.decompress(file.read_bytes()))
    return path


@pytest.mark.parametrize("file", sorted(DATA.glob("*.db.gz")), ids=lambda file: file.name.removesuffix(".db.gz"))
async def test_books_of_the_version_before(file: Path, tmp_path: Path) -> None:
    path = unpacked(file, tmp_path)
    for opened in (20, 19):
        # Again from what this version has written.
        store = SqliteStore(path)
        await store.open()
        owner = Owner("default", store.journal("default"), clock=ManualClock(wall=RECORDED_AT))
        await owner.start()
        state = owner._books
        assert isinstance(state, State)
        (tokens,) = (each for each in state.buckets if each.dimension is Dimension.INPUT_TOKENS and not each.share)
        assert (len(state.open), tokens.held, tokens.settled) == (opened, opened * 5_000, 40 * 5_000)
        assert tokens.charged == opened * 5_000 + 40 * 4_000
        assert tokens.level == tokens.refilled - tokens.charged + tokens.adjusted
        await owner.call(Release(next(iter(state.open))))
        await owner.stop(1)
        await store.close()
