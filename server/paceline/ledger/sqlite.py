"""Journals in one SQLite file, for a server that runs alone on its machine.

The file is in WAL mode, and locked for one process: by a lock file beside it, which names the holder, and by
SQLite's own exclusive lock. It must be on a local disk. Every call that blocks runs in one worker thread.

**Durability.** Killing the process, with any signal and at any moment, loses nothing that was acknowledged,
under either setting. They differ in what a power cut or a crash of the operating system may take:

``process`` (default)
    An append is one write into the page cache (``synchronous=NORMAL``): a power cut may take the last
    records, up to some tens of seconds of them, never a part of one, and never one from the middle. Median of
    an append of 2 kB: 20 µs, or 60 µs with the way to the worker thread and back.
``power``
    An append is on the disk when it is acknowledged (``synchronous=FULL``): 0.3 ms on a virtual machine with
    a fast disk (99 %: 0.8 to 8 ms), more on most others; every answer waits that much longer.

The default is ``process`` because the machine that loses power takes the callers' calls with it more often
than not, quotas refill within minutes, and the next response's headers correct what is left; paying
milliseconds on every answer for that is a bad bargain. Where the spend cap has to survive a power cut to the
cent, choose ``power``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import os
import sqlite3
import struct
import sys
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import structlog

from paceline.ledger.journal import (
    FORMAT,
    Chain,
    Loaded,
    Mark,
    Record,
    StoreCorrupt,
    StoreError,
    StoreFenced,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
    StoreVersion,
    genesis,
)
from paceline.ledger.worker import Worker

if sys.platform != "win32":
    import fcntl

APPLICATION_ID = 0x50414345
"""SQLite's ``application_id`` of our files: ``PACE``."""

PAGE_RECORDS = 256
GROUP_BYTES = 256 * 1024
"""How much of a snapshot goes into one transaction, between which appends may pass."""
TRIM_RECORDS = 512
CLOSE_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""How often to see whether the file is still where it was."""
_SEQ_BITS = 40
_SEQ_MOST = (1 << _SEQ_BITS) - 1
_WAL_BYTES_MOST = 64 * 1024 * 1024

_SCHEMA = """
-- sealed: a hash over the row, and the row's content
CREATE TABLE meta (key BLOB PRIMARY KEY, sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE ledgers (id INTEGER PRIMARY KEY, sealed BLOB NOT NULL);
-- place: the ledger's id << 40 | the record's sequence number
CREATE TABLE records (place INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE chunks (
    ledger INTEGER NOT NULL, generation INTEGER NOT NULL, number INTEGER NOT NULL, chunk BLOB NOT NULL,
    UNIQUE (ledger, generation, number)
);
"""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})

_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_MISMATCH,
        # What we ask is always the same, so it is the schema or the content that is wrong:
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_CONSTRAINT,
    }
)
"""SQLite's primary result codes that mean a damaged file."""

P = ParamSpec("P")
T = TypeVar("T")

_log = structlog.get_logger("paceline.ledger")


class Durability(Enum):
    """What an acknowledged append survives, beside the death of the process."""

    PROCESS = "process"
    POWER = "power"


class _Ledger(msgspec.Struct, frozen=True, array_like=True):
    """A ledger's row. ``generation`` is that of the snapshot's chunks."""

    id: int
    name: str
    epoch: int = 0
    generation: int = 0
    snapshot: Mark | None = None
    check: Mark | None = None


_encode_row = msgspec.msgpack.Encoder().encode
_decode_row = msgspec.msgpack.Decoder(_Ledger).decode


class SqliteJournal:
    """A :class:`~paceline.ledger.journal.Journal` in a :class:`SqliteStore`."""

    def __init__(self, store: SqliteStore, ledger: str) -> None:
        self._store = store
        self._ledger = ledger
        self._row = _Ledger(0, ledger)
        self._loads = 0
        self._generation = 0
        """Of the snapshot that was begun last."""
        self._chain: Chain | None = None
        """Only the worker looks at it; ``None`` until loaded, and after a failure until loaded again."""

    async def load(self) -> Loaded:
        self._loads += 1
        load = self._loads
        row, chunks, chain = await self._store.work(self._take)
        return Loaded(row.epoch, row.snapshot, chunks, row.check, self._pages(load, chain))

    async def _pages(self, load: int, chain: Chain) -> AsyncIterator[list[Record]]:
        while page := await self._store.work(self._page, load, chain):
            yield page

    async def append(self, record: Record) -> None:
        await self._store.work(self._append, record)

    async def write_snapshot(self, mark: Mark, chunks: AsyncIterable[bytes]) -> None:
        work = self._store.work
        digest = hashlib.sha256()
        group: list[bytes] = []
        size = number = 0
        generation = await work(self._begin_snapshot, mark)
        try:
            async for chunk in chunks:
                digest.update(chunk)
                group.append(chunk)
                size += len(chunk)
                if size >= GROUP_BYTES:
                    await work(self._write_chunks, generation, number, group)
                    number += len(group)
                    group, size = [], 0
            await work(self._write_chunks, generation, number, group)
            await work(self._end_snapshot, Mark(mark.seq, mark.at, mark.hash, digest.digest()), generation)
        except BaseException:
            with contextlib.suppress(StoreError):
                self._store.post(lambda: self._abandon(generation))
            raise
        while await work(self._trim, mark.seq):
            pass

    async def write_check(self, mark: Mark) -> None:
        await self._store.work(self._write_check, mark)

    async def close(self) -> None:
        with contextlib.suppress(StoreError):
            await self._store.work(self._forget)

    # -- in the worker thread --------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._chain = None

    def _take(self) -> tuple[_Ledger, list[bytes], Chain]:
        self._chain = None
        database = self._store.database(fresh=True)
        rows = self._store.rows()
        row = next((row for row in rows if row.name == self._ledger), None)
        if row is None:
            row = _Ledger(max((row.id for row in rows), default=0) + 1, self._ledger)
        check = row.check if row.snapshot is None or row.check is None or row.check.seq > row.snapshot.seq else None
        self._row = row = msgspec.structs.replace(row, epoch=row.epoch + 1, check=check)
        self._store.write_row(row)
        chain = Chain(self._title(), row.epoch, 0, genesis(self._ledger))
        chunks: list[bytes] = []
        if row.snapshot is not None:
            chain.seq, chain.hash = row.snapshot.seq, row.snapshot.hash
            digest = hashlib.sha256()
            for (chunk,) in database.execute(
                "SELECT COALESCE(CAST(chunk AS BLOB), x'') FROM chunks WHERE ledger = ? AND generation = ? "
                "ORDER BY number",
                (row.id, row.generation),
            ):
                chunks.append(chunk)
                digest.update(chunk)
            if digest.digest() != row.snapshot.digest:
                raise self._corrupt(f"the snapshot at record {chain.seq}", "its content is not what was written")
        return row, chunks, chain

    def _page(self, load: int, chain: Chain) -> list[Record]:
        if load != self._loads:
            raise StoreFenced(f"{self._title()} was loaded again meanwhile")
        rows = (
            self._store.database()
            .execute(
                "SELECT COALESCE(CAST(record AS BLOB), x'') FROM records WHERE place > ? AND place <= ? "
                "ORDER BY place LIMIT ?",
                (self._place(chain.seq), self._place(_SEQ_MOST), PAGE_RECORDS),
            )
            .fetchall()
        )
        page: list[Record] = []
        try:
            for (data,) in rows:
                record = Record.unpack(data)
                chain.follow(record)
                if record.epoch >= chain.epoch:
                    raise ValueError("its epoch is yet to come")
                page.append(record)
        except ValueError as error:
            raise self._corrupt(f"record {chain.seq + 1}", str(error)) from error
        if not page:
            self._chain = chain
        return page

    def _append(self, record: Record) -> None:
        chain = self._loaded()
        if not chain.admit(record):
            return
        if record.seq > _SEQ_MOST:
            raise StoreFull(f"{self._title()} has no sequence number left")
        self._chain = None  # until it is known to be written
        self._store.database().execute(
            "INSERT INTO records (place, record) VALUES (?, ?)", (self._place(record.seq), record.pack())
        )
        chain.follow(record)
        self._chain = chain

    def _begin_snapshot(self, mark: Mark) -> int:
        """The generation under which to write the chunks."""
        self._expect(mark)
        self._drop_chunks()
        self._generation = max(self._generation, self._row.generation) + 1
        return self._generation

    def _write_chunks(self, generation: int, number: int, group: list[bytes]) -> None:
        self._loaded()
        self._expect_generation(generation)
        with self._store.transaction() as database:
            database.executemany(
                "INSERT INTO chunks (ledger, generation, number, chunk) VALUES (?, ?, ?, ?)",
                [(self._row.id, generation, number + place, chunk) for place, chunk in enumerate(group)],
            )

    def _end_snapshot(self, mark: Mark, generation: int) -> None:
        self._expect(mark)
        self._expect_generation(generation)
        self._write_row(msgspec.structs.replace(self._row, snapshot=mark, generation=generation))

    def _expect_generation(self, generation: int) -> None:
        if generation != self._generation:
            raise StoreFenced(f"{self._title()}: another snapshot was begun meanwhile")

    def _abandon(self, generation: int) -> None:
        if generation == self._generation:
            self._drop_chunks()

    def _write_check(self, mark: Mark) -> None:
        self._expect(mark)
        self._write_row(msgspec.structs.replace(self._row, check=mark))

    def _write_row(self, row: _Ledger) -> None:
        self._store.write_row(row)
        self._row = row

    def _trim(self, seq: int) -> bool:
        """Delete some of what the snapshot at ``seq`` stands for. Whether there may be more."""
        self._loaded()
        gone = (
            self._store.database()
            .execute(
                "DELETE FROM records WHERE place IN (SELECT place FROM records WHERE place > ? AND place <= ? "
                "ORDER BY place LIMIT ?)",
                (self._place(0), self._place(seq), TRIM_RECORDS),
            )
            .rowcount
        )
        return bool(gone) or self._drop_some_chunks()

    def _drop_chunks(self) -> None:
        while self._drop_some_chunks():
            pass

    def _drop_some_chunks(self) -> bool:
        """Delete some of the chunks that are not the current snapshot's. Whether there may be more."""
        gone = (
            self._store.database()
            .execute(
                "DELETE FROM chunks WHERE rowid IN "
                "(SELECT rowid FROM chunks WHERE ledger = ? AND generation <> ? LIMIT 16)",
                (self._row.id, self._row.generation),
            )
            .rowcount
        )
        return bool(gone)

    def _expect(self, mark: Mark) -> None:
        """Check that ``mark`` is of a record of this chain."""
        chain = self._loaded()
        if (mark.seq, mark.hash) == (chain.seq, chain.hash):
            return
        row = (
            self._store.database()
            .execute("SELECT record FROM records WHERE place = ?", (self._place(mark.seq),))
            .fetchall()
        )
        if not row or Record.unpack(row[0][0]).hash != mark.hash:
            raise StoreFenced(f"{self._title()}: record {mark.seq} is not the one that was marked")

    def _loaded(self) -> Chain:
        if self._chain is None:
            raise StoreUnavailable(f"{self._title()} must be loaded again, after a failure or another load")
        return self._chain

    def _place(self, seq: int) -> int:
        return self._row.id << _SEQ_BITS | seq

    def _title(self) -> str:
        return f"{self._store.name}, ledger {self._ledger!r}"

    def _corrupt(self, what: str, why: str) -> StoreCorrupt:
        return StoreCorrupt(
            f"{self._title()}: {what} is damaged ({why}): restore the file from a backup, or move it away to "
            "start with empty books"
        )


class SqliteStore:
    """A :class:`~paceline.ledger.journal.Store` in the SQLite file ``path``, which is made, readable by its
    owner only, if it is not there."""

    def __init__(self, path: Path, durability: Durability = Durability.PROCESS) -> None:
        self.path = path
        self.durability = durability
        self.name = str(path)
        self._worker: Worker | None = None
        self._database: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._inode: tuple[int, int] | None = None
        self._failed = False
        self._look_at = 0.0

    async def open(self) -> None:
        self._worker = Worker("paceline-store")
        try:
            await self._guarded(self._worker.call(self._open))
        except BaseException:
            await self.close()
            raise

    def journal(self, ledger: str) -> SqliteJournal:
        return SqliteJournal(self, ledger)

    async def ledgers(self) -> list[str]:
        def read() -> list[str]:
            return sorted(row.name for row in self.rows())

        return await self.work(read)

    async def get_meta(self, key: str) -> bytes | None:
        def read() -> bytes | None:
            # All of them, so that a damaged key is not taken for a missing one.
            rows = (
                self.database()
                .execute("SELECT COALESCE(CAST(key AS BLOB), x''), COALESCE(CAST(sealed AS BLOB), x'') FROM meta")
                .fetchall()
            )
            return {name: self._unsealed(sealed, name) for name, sealed in rows}.get(key.encode())

        return await self.work(read)

    async def put_meta(self, key: str, value: bytes) -> None:
        name = key.encode()

        def write() -> None:
            database = self.database()
            database.execute("PRAGMA synchronous = FULL")
            try:
                database.execute(
                    "INSERT OR REPLACE INTO meta (key, sealed) VALUES (?, ?)", (name, _sealed(value, name))
                )
            finally:
                database.execute(f"PRAGMA synchronous = {self._synchronous()}")

        await self.work(write)

    async def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        closing = worker.call(self._close)
        worker.end()
        done, _ = await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        if not done:
            _log.warning("store does not close: its disk hangs", store=self.name)
        elif (error := closing.exception()) is not None:
            _log.warning("store closed with an error", store=self.name, error=str(error))

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` in the worker; its SQLite errors become :class:`StoreError`."""
        if self._worker is None:
            raise StoreUnavailable(f"{self.name} is not open")
        return await self._guarded(self._worker.call(function, *args, **kwargs))

    def post(self, function: Callable[[], object]) -> None:
        """Run ``function`` in the worker, whatever comes of it."""
        if self._worker is None:
            raise StoreUnavailable(f"{self.name} is not open")
        self._worker.call(function).add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _guarded(self, future: asyncio.Future[T]) -> T:
        try:
            return await future
        except (sqlite3.Error, OSError, UnicodeError) as error:
            raise self._translated(error) from error

    # -- in the worker thread --------------------------------------------------------------------------------

    def database(self, *, fresh: bool = False) -> sqlite3.Connection:
        """The connection. With ``fresh``, one that is opened again if the last call failed."""
        if fresh and self._failed:
            self._connect(make=False)
        if fresh:
            self._look_at = 0.0
        if self._database is None:
            raise StoreUnavailable(f"{self.name} is not open")
        if (now := time.monotonic()) >= self._look_at and self._identity() != self._inode:
            self._failed = True
            raise StoreUnavailable(f"{self.name} was moved, replaced or deleted while in use: put it back")
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
        return self._database

    def rows(self) -> list[_Ledger]:
        """All ledgers. Raises :class:`StoreCorrupt` also if there is a trace of one that is not there."""
        database = self.database()
        rows = []
        for id_, sealed in database.execute(
            "SELECT id, COALESCE(CAST(sealed AS BLOB), x'') FROM ledgers NOT INDEXED"
        ).fetchall():
            row = _decode_row(self._unsealed(sealed, b"ledger"))
            if row.id != id_:
                raise self._damaged("a ledger's row is not where it was written")
            rows.append(row)
        known = {row.id for row in rows}
        (last,) = database.execute("SELECT max(place) FROM records").fetchone()
        traces = {id_ for (id_,) in database.execute("SELECT DISTINCT ledger FROM chunks")}
        if not (traces | (set() if last is None else {last >> _SEQ_BITS})) <= known:
            raise self._damaged("a ledger's row is missing")
        return rows

    def write_row(self, row: _Ledger) -> None:
        """Write a ledger's row, new or not."""
        self.database().execute(
            "INSERT OR REPLACE INTO ledgers (id, sealed) VALUES (?, ?)",
            (row.id, _sealed(_encode_row(row), b"ledger")),
        )

    def _unsealed(self, sealed: bytes, name: bytes) -> bytes:
        content = sealed[32:]
        if _sealed(content, name) != sealed:
            raise self._damaged("a row's hash does not match its content")
        return content

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing."""
        database = self.database()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
            raise

    def _open(self) -> None:
        parent = self.path.parent
        if not parent.is_dir():
            raise StoreUnavailable(f"{self.name}: the directory {parent} does not exist: make it first")
        if self.path.is_dir():
            raise StoreUnavailable(f"{self.name} is a directory: name a file in it")
        self._take_lock()
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        self._connect(make=True)

    def _take_lock(self) -> None:
        if sys.platform == "win32":
            return  # SQLite's own lock holds alone
        path = Path(f"{self.path.resolve()}.lock")
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise self._locked(f"process {holder}" if holder.isdecimal() else "another process") from None
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        with contextlib.suppress(OSError):  # a full disk: then it names nobody
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def _connect(self, *, make: bool) -> None:
        self._disconnect()
        if not make and self._identity() != self._inode:
            raise StoreUnavailable(f"{self.name} was moved, replaced or deleted while in use: put it back")
        promised = _commit_frames(Path(f"{self.path}-wal"))
        database = sqlite3.connect(self.path, timeout=0.0, isolation_level=None)
        try:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA trusted_schema = OFF")
            database.execute("PRAGMA cell_size_check = ON")
            (application,), (version,), (pages,) = (
                database.execute(f"PRAGMA {name}").fetchone()
                for name in ("application_id", "user_version", "page_count")
            )
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application not in (0, APPLICATION_ID) or (tables and application == 0):
                raise StoreCorrupt(f"{self.name} is not a Paceline store: name another file; nothing was changed")
            if version > FORMAT:
                raise StoreVersion(
                    f"{self.name} has format {version}, and this version reads up to {FORMAT}: run the "
                    "version that wrote it, or a later one"
                )
            # The rest of the header and the schema are made in one transaction.
            if (tables or application or version or pages > 1) and (
                version != FORMAT or application != APPLICATION_ID or _schema(database) != _expected_schema()
            ):
                raise self._damaged("its schema is not what was written")
            database.execute("PRAGMA auto_vacuum = NONE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"PRAGMA synchronous = {self._synchronous()}")
            database.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_MOST}")
            database.execute("PRAGMA secure_delete = OFF")
            # Reads the WAL, and takes the exclusive lock.
            _, frames, _ = database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if frames < promised:
                _log.error(
                    "the end of the store's WAL is damaged and was dropped: expected after a power cut",
                    store=self.name,
                    lost_pages=promised - max(frames, 0),
                )
            # Finds what the hashes cannot: a last record that seems never to have been. About 1 ms a MB.
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise self._damaged(" ".join(str(found).split()))
            if not tables:
                database.executescript(
                    f"BEGIN; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID}; "
                    f"PRAGMA user_version = {FORMAT}; COMMIT;"
                )
        except BaseException:
            database.close()
            raise
        self._database = database
        self._inode = self._identity()
        self._failed = False

    def _disconnect(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def _close(self) -> None:
        try:
            self._disconnect()
        finally:
            lock, self._lock = self._lock, None
            if lock is not None:
                os.close(lock)

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _synchronous(self) -> str:
        return "FULL" if self.durability is Durability.POWER else "NORMAL"

    # -- errors ----------------------------------------------------------------------------------------------

    def _locked(self, by: str) -> StoreLocked:
        return StoreLocked(f"{self.name} is in use by {by}: stop that server, or give this one a file of its own")

    def _damaged(self, why: str) -> StoreCorrupt:
        return StoreCorrupt(
            f"{self.name} is damaged ({why}): restore it from a backup, or move it away to start with empty books"
        )

    def _translated(self, error: sqlite3.Error | OSError | UnicodeError) -> StoreError:
        self._failed = True
        if isinstance(error, UnicodeError):
            return self._damaged("a text is not UTF-8")
        if isinstance(error, OSError):
            if error.errno in _NO_ROOM:
                return StoreFull(f"{self.name} cannot be written ({error.strerror}): make room, or allow writing")
            return StoreUnavailable(f"{self.name}: {error.strerror or type(error).__name__}")
        code = getattr(error, "sqlite_errorcode", None)
        primary = code & 0xFF if isinstance(code, int) else None
        if primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
            return StoreFull(f"{self.name} cannot be written ({error}): make room, or allow writing")
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return self._locked("another process")
        if primary in _DAMAGE:
            return self._damaged(str(error))
        return StoreUnavailable(f"{self.name}: {error}")


def _schema(database: sqlite3.Connection) -> list[tuple[object, ...]]:
    return database.execute("SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master ORDER BY name").fetchall()


@functools.cache
def _expected_schema() -> list[tuple[object, ...]]:
    """With the pages where the tables begin: a table that begins elsewhere would look empty."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("PRAGMA auto_vacuum = NONE")
        database.executescript(_SCHEMA)
        return _schema(database)


def _sealed(content: bytes, name: bytes) -> bytes:
    return hashlib.sha256(len(name).to_bytes(4, "big") + name + content).digest() + content


def _commit_frames(wal: Path) -> int:
    """How many frames a WAL holds up to the last that ends a transaction, by their salts and without their
    checksums.

    SQLite drops, without a word, everything from the first frame whose checksum is wrong.
    """
    header, frame = struct.Struct(">8I"), struct.Struct(">4I")
    last = 0
    with contextlib.suppress(FileNotFoundError), wal.open("rb") as file:
        start = file.read(header.size)
        if len(start) < header.size:
            return 0
        _, _, page_bytes, _, *salts, _, _ = header.unpack(start)
        number = 0
        while True:
            file.seek(header.size + number * (24 + page_bytes))
            data = file.read(frame.size)
            if len(data) < frame.size:
                break
            _, pages_after_commit, *frame_salts = frame.unpack(data)
            if frame_salts != salts:
                break
            number += 1
            if pages_after_commit:
                last = number
    return last
