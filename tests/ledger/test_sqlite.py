# ruff: noqa: ASYNC240 -- the loop has nothing else to do
"""The SQLite store beyond what every journal must do: one server at a time, damage, no room, kill -9, other
versions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from paceline.engine.operations import Release
from paceline.ledger.errors import LedgerUnavailable
from paceline.ledger.journal import (
    Record,
    Store,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
    StoreVersion,
)
from paceline.ledger.options import OwnerOptions
from paceline.ledger.owner import Owner
from paceline.ledger.sqlite import Durability, SqliteJournal, SqliteStore
from tests.ledger.journal_kit import JournalKit, after, append_many, mark, read, stream
from tests.ledger.scripted import Machine, keys_of


class TestSqlite(JournalKit):
    @pytest.fixture(params=Durability)
    async def store(self, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
        self.last = SqliteStore(tmp_path / "store.db", request.param)
        await self.last.open()
        yield self.last
        await self.last.close()

    async def again(self, store: Store) -> Store:
        await store.close()
        self.last = SqliteStore(self.last.path, self.last.durability)
        await self.last.open()
        return self.last


@contextlib.asynccontextmanager
async def opened(path: Path, durability: Durability = Durability.PROCESS) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, durability)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


# -- one server at a time ------------------------------------------------------------------------------------


async def test_a_second_server_is_told_at_once_who_has_the_store(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path) as store:
        started = time.monotonic()
        with pytest.raises(StoreLocked) as caught:
            await SqliteStore(path).open()
        assert time.monotonic() - started < 1
        message = str(caught.value)
        assert str(path) in message
        assert f"process {os.getpid()}" in message
        assert "\n" not in message
        await append_many(store.journal("a"), "a", None, (await read(store.journal("a")))[0].epoch, 0)
        link = tmp_path / "link.db"
        link.symlink_to(path)
        with pytest.raises(StoreLocked):
            await SqliteStore(link).open()
    async with opened(path):
        pass


async def test_the_files_lock_holds_without_the_lock_file(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path):
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as other, pytest.raises(sqlite3.OperationalError):
            other.execute("SELECT * FROM ledgers").fetchall()
        hard = tmp_path / "hard.db"
        hard.hardlink_to(path)
        script = (
            "import asyncio, sys, pathlib; from paceline.ledger.sqlite import SqliteStore;"
            "asyncio.run(SqliteStore(pathlib.Path(sys.argv[1])).open())"
        )
        result = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", script, str(hard)], capture_output=True, text=True
        )
        assert "StoreLocked" in result.stderr


async def test_only_the_owner_of_the_file_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path) as store:
        await store.put_meta("key", b"secret")
        for file in tmp_path.iterdir():
            assert file.stat().st_mode & 0o077 == 0, file


# -- damage --------------------------------------------------------------------------------------------------


async def fill(path: Path) -> list[Record]:
    async with opened(path) as store:
        journal = store.journal("a")
        await read(journal)
        records = []
        last: Record | None = None
        for number in range(60):
            last = after("a", last, 1, bytes([number]) * 2_000)
            await journal.append(last)
            records.append(last)
        await journal.write_snapshot(mark(records[9]), stream([b"snapshot" * 4_000]))
    return records


async def test_every_flipped_byte_is_found_or_harmless(tmp_path: Path) -> None:
    """All that is read is what was written, or the store says that it is damaged, and which file."""
    path = tmp_path / "store.db"
    records = await fill(path)
    intact = path.read_bytes()
    random_ = random.Random(1)
    messages: list[str] = []
    for _ in range(250):
        place = random_.randrange(len(intact))
        damaged = bytearray(intact)
        damaged[place] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        try:
            async with opened(path) as store:
                loaded, tail = await read(store.journal("a"))
        except StoreError as error:
            messages.append(str(error))
        else:
            assert loaded.snapshot is not None
            assert b"".join(loaded.chunks) == b"snapshot" * 4_000
            assert tail == records[10:]
            assert loaded.epoch >= 1
    print(f"{len(messages)} of 250 flipped bytes were found, the others were harmless")
    assert len(messages) > 50
    assert all(str(path) in message for message in messages)


async def test_a_page_that_hides_its_last_entries_is_found(tmp_path: Path) -> None:
    """The last records must not vanish without a word: no hash would miss them."""
    path = tmp_path / "store.db"
    async with opened(path) as store:
        await read(store.journal("a"))
    async with opened(path) as store:
        journal = store.journal("a")
        records = await append_many(journal, "a", None, (await read(journal))[0].epoch, 60)
    intact = path.read_bytes()
    pages = [page for page in range(4_096, len(intact), 4_096) if intact[page] in (2, 5, 10, 13)]
    for page in pages:
        for bit in range(6):
            damaged = bytearray(intact)
            damaged[page + 4] ^= 1 << bit  # how many entries it has
            path.write_bytes(damaged)
            with contextlib.suppress(StoreCorrupt):
                async with opened(path) as store:
                    assert (await read(store.journal("a")))[1] == records


async def test_a_file_cut_short_is_found(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await fill(path)
    intact = path.read_bytes()
    for size in (100, 4_096, len(intact) // 2, len(intact) - 4_096, len(intact) - 1):
        path.write_bytes(intact[:size])
        with pytest.raises(StoreCorrupt, match=r"store\.db"):
            async with opened(path) as store:
                await read(store.journal("a"))


async def test_the_message_names_the_record(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await fill(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"\x20" * 1_000)
    data[place] ^= 1
    path.write_bytes(data)
    async with opened(path) as store:
        with pytest.raises(StoreCorrupt, match=r"store\.db, ledger 'a': record 33 is damaged .* backup"):
            await read(store.journal("a"))


@pytest.mark.parametrize("statement", ["DELETE FROM records WHERE place & 65535 = 40", "DELETE FROM chunks", "swap"])
async def test_what_is_missing_or_swapped_is_found(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "store.db"
    await fill(path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        if statement == "swap":
            rows = database.execute("SELECT place, record FROM records ORDER BY place LIMIT 2").fetchall()
            for (place, _), (_, record) in zip(rows, reversed(rows), strict=True):
                database.execute("UPDATE records SET record = ? WHERE place = ?", (record, place))
        else:
            database.execute(statement)
        database.commit()
    async with opened(path) as store:
        with pytest.raises(StoreCorrupt):
            await read(store.journal("a"))


async def test_a_damaged_end_of_the_wal_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, copy = tmp_path / "store.db", tmp_path / "copy.db"
    async with opened(path) as store:
        journal = store.journal("a")
        await read(journal)
        records = await append_many(journal, "a", None, 1, 50)
        copy.write_bytes(path.read_bytes())
        wal = bytearray(Path(f"{path}-wal").read_bytes())
    Path(f"{copy}-wal").write_bytes(wal)
    async with opened(copy) as store:
        assert (await read(store.journal("a")))[1] == records
    assert "damaged" not in capsys.readouterr().out
    wal[-2_000] ^= 1
    copy.write_bytes(path.read_bytes())
    path.unlink()
    async with opened(path) as store:  # an empty file of the same age
        copy.write_bytes(path.read_bytes())
    Path(f"{copy}-wal").write_bytes(wal)
    async with opened(copy) as store:
        tail = (await read(store.journal("a")))[1]
    assert tail == records[: len(tail)]
    assert len(tail) < len(records)
    assert "WAL is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0 and then something else" * 90])
async def test_other_files_are_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        await SqliteStore(path).open()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


async def test_somebody_elses_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE theirs (x)")
        database.commit()
    before = path.read_bytes()
    with pytest.raises(StoreCorrupt, match="not a Paceline store"):
        await SqliteStore(path).open()
    assert path.read_bytes() == before


async def test_a_newer_versions_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await fill(path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(StoreVersion, match="format 2"):
        await SqliteStore(path).open()


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="nowhere does not exist"):
        await SqliteStore(tmp_path / "nowhere" / "store.db").open()
    with pytest.raises(StoreUnavailable, match="is a directory"):
        await SqliteStore(tmp_path).open()


async def test_a_file_taken_away_is_noticed_and_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.ledger.sqlite.LOOK_SECONDS", 0.0)
    path = tmp_path / "store.db"
    async with opened(path) as store:
        journal = store.journal("a")
        await read(journal)
        (record,) = await append_many(journal, "a", None, 1, 1)
        path.rename(tmp_path / "elsewhere.db")
        with pytest.raises(StoreUnavailable, match="moved, replaced or deleted"):
            await append_many(journal, "a", record, 1, 1)
        with pytest.raises(StoreUnavailable, match="put it back"):
            await read(journal)
        assert not path.exists()
        (tmp_path / "elsewhere.db").rename(path)
        loaded, records = await read(journal)
        assert records == [record]
        await append_many(journal, "a", record, loaded.epoch, 1)


# -- no room -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


async def append_until_refused(journal: SqliteJournal, epoch: int, records: list[Record]) -> None:
    for _ in range(1_000):
        record = after("a", records[-1] if records else None, epoch, b"x" * 5_000)
        try:
            await journal.append(record)
        except StoreFull:
            return
        records.append(record)
    pytest.fail("there was room for everything")


async def test_a_full_disk_is_told_and_got_over(small_disk: Path) -> None:
    path = small_disk / "store.db"
    async with opened(path) as store:
        journal = store.journal("a")
        loaded, _ = await read(journal)
        records: list[Record] = []
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"b" * 300_000)
        await append_until_refused(journal, loaded.epoch, records)
        assert records
        with pytest.raises(StoreError):
            await journal.append(after("a", records[-1], loaded.epoch))
        ballast.unlink()
        loaded, tail = await read(journal)
        assert tail == records
        await append_many(journal, "a", records[-1], loaded.epoch, 3)


async def test_over_a_full_disk_an_owner_says_so_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    async with opened(small_disk / "store.db") as store:
        options = OwnerOptions(backoff_first_us=10_000, backoff_most_us=50_000)
        owner = Owner("a", store.journal("a"), machine=Machine(), options=options)
        await owner.start()
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"b" * 500_000)
        kept = 0
        for number in range(10_000):
            try:
                await asyncio.wait_for(owner.call(Release(f"{number} {'x' * 3_000}")), 5)
            except LedgerUnavailable:
                break
            kept += 1
        assert 0 < kept < 1_000
        for _ in range(20):
            with pytest.raises(LedgerUnavailable):
                await asyncio.wait_for(owner.call(Release(f"refused {'x' * 300_000}")), 5)
            await asyncio.sleep(0.01)
        assert "make room" in owner.statistics.last_error
        ballast.unlink()
        for _ in range(200):
            with contextlib.suppress(LedgerUnavailable):
                await owner.call(Release("after"))
                break
            await asyncio.sleep(0.02)
        keys = keys_of(owner)
        assert keys[-1] == "after"
        assert len(keys) in (kept + 1, kept + 2)
        await owner.stop(5)


async def test_a_limit_on_the_files_size_is_told_and_got_over(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path) as store:
        journal = store.journal("a")
        loaded, _ = await read(journal)
        records: list[Record] = []

        def limit(pages: int) -> None:
            store.database().execute(f"PRAGMA max_page_count = {pages}")

        await store.work(limit, 60)
        await append_until_refused(journal, loaded.epoch, records)
        loaded, tail = await read(journal)  # opens the file again, which lifts the limit
        assert tail == records
        await append_many(journal, "a", records[-1], loaded.epoch, 3)


async def test_writing_not_allowed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path) as store:
        journal = store.journal("a")
        loaded, _ = await read(journal)
        await store.work(lambda: store.database().execute("PRAGMA query_only = ON"))
        with pytest.raises(StoreFull, match="allow writing"):
            await append_many(journal, "a", None, loaded.epoch, 1)
        loaded, _ = await read(journal)
        await append_many(journal, "a", None, loaded.epoch, 1)


# -- kill -9 -------------------------------------------------------------------------------------------------

APPEND_FOR_EVER = """
import asyncio, os, pathlib, sys
from paceline.ledger.journal import Record, Mark, genesis
from paceline.ledger.sqlite import Durability, SqliteStore
async def chunks():
    for n in range(6):
        yield bytes(150_000)
async def main():
    store = SqliteStore(pathlib.Path(sys.argv[1]), Durability(sys.argv[2]))
    await store.open()
    journal = store.journal("a")
    loaded = await journal.load()
    seq, last = (loaded.snapshot.seq, loaded.snapshot.hash) if loaded.snapshot else (0, genesis("a"))
    async for page in loaded.pages:
        seq, last = page[-1].seq, page[-1].hash
    snapshot = None
    while True:
        record = Record.sealed(seq + 1, loaded.epoch, seq, 0, last, b"%d" % seq * 50)
        await journal.append(record)
        seq, last = record.seq, record.hash
        os.write(1, b"%d\\n" % seq)
        if seq % 300 == 0 and (snapshot is None or snapshot.done()):
            snapshot = asyncio.create_task(journal.write_snapshot(Mark(seq, seq, last, b""), chunks()))
asyncio.run(main())
"""


@pytest.mark.process
@pytest.mark.parametrize("durability", Durability)
async def test_killed_while_appending_nothing_acknowledged_is_lost(tmp_path: Path, durability: Durability) -> None:
    path = tmp_path / "store.db"
    random_ = random.Random(7)
    acknowledged = 0
    for round_ in range(6):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", APPEND_FOR_EVER, str(path), durability.value, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        await process.stdout.readline()
        reading = asyncio.create_task(process.stdout.read())
        await asyncio.sleep(random_.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        lines = (await reading).split(b"\n")
        await process.wait()
        acknowledged = max(acknowledged, int(lines[-2]) if len(lines) > 1 else 0)
        async with opened(path, durability) as store:
            loaded, tail = await read(store.journal("a"))
        last = tail[-1].seq if tail else loaded.snapshot.seq if loaded.snapshot else 0
        assert acknowledged <= last <= acknowledged + 1, f"round {round_}"
        acknowledged = last
    print(f"{acknowledged} records in 6 lives")


# -- how long it takes ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("durability", Durability)
async def test_how_long_an_append_takes(tmp_path: Path, durability: Durability) -> None:
    async with opened(tmp_path / "store.db", durability) as store:
        journal = store.journal("a")
        await read(journal)
        last: Record | None = None
        times = []
        for _ in range(2_000):
            last = after("a", last, 1, b"p" * 2_000)
            started = time.perf_counter()
            await journal.append(last)
            times.append(time.perf_counter() - started)
    async with opened(tmp_path / "store.db", durability) as store:
        _, tail = await read(store.journal("a"))
    assert len(tail) == len(times)
    assert tail[-1] == last
    times.sort()
    print(
        f"append of 2 kB, durability={durability.value}: mean {sum(times) / len(times) * 1e6:.0f}, "
        f"median {times[1_000] * 1e6:.0f}, 99 % {times[1_980] * 1e6:.0f} µs, thread hop included"
    )


@pytest.mark.slow
async def test_how_long_reading_100_000_records_takes(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path) as store:
        journal = store.journal("a")
        await read(journal)
        records = await append_many(journal, "a", None, 1, 100_000)
    async with opened(path) as store:
        started = time.perf_counter()
        _, tail = await read(store.journal("a"))
        took = time.perf_counter() - started
    assert tail == records
    print(f"100,000 records read and verified in {took:.2f} s")
