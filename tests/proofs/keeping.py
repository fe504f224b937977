"""``paceline``, but records that its journal trims after a snapshot are put aside first, so that they can be counted.

They go to a file beside the store. Nothing else is changed: they are then deleted as ever.
"""

from __future__ import annotations

import msgspec

from paceline.cli import main
from paceline.ledger.sqlite import SqliteJournal
from tests.proofs.recount import KEPT_SUFFIX

_trim = SqliteJournal._trim


def _keep_and_trim(journal: SqliteJournal, seq: int) -> bool:
    database = journal._store.database()
    rows = database.execute(
        "SELECT place, record FROM records WHERE place > ? AND place <= ? ORDER BY place",
        (journal._place(0), journal._place(seq)),
    ).fetchall()
    with open(f"{journal._store.path}{KEPT_SUFFIX}", "ab") as file:
        for place, record in rows:
            frame = msgspec.msgpack.encode((place, bytes(record)))
            file.write(len(frame).to_bytes(4, "big") + frame)
    return _trim(journal, seq)


def install() -> None:
    """From now on in this process."""
    setattr(SqliteJournal, "_trim", _keep_and_trim)  # noqa: B010 -- a method is replaced


if __name__ == "__main__":
    install()
    main()
