"""What every journal must do. A store's tests inherit :class:`JournalKit` and say how to make a store."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Iterable

import pytest

from paceline.ledger.journal import Journal, Loaded, Mark, Record, Store, StoreError, StoreFenced, genesis


async def read(journal: Journal) -> tuple[Loaded, list[Record]]:
    """Load a journal to its end."""
    loaded = await journal.load()
    return loaded, [record async for page in loaded.pages for record in page]


def after(
    ledger: str, last: Record | Mark | None, epoch: int, payload: bytes = b"payload", at: int | None = None
) -> Record:
    """The record that follows ``last``."""
    seq, previous = (0, genesis(ledger)) if last is None else (last.seq, last.hash)
    return Record.sealed(seq + 1, epoch, 1_000 * (seq + 1) if at is None else at, 7, previous, payload)


async def append_many(journal: Journal, ledger: str, last: Record | None, epoch: int, count: int) -> list[Record]:
    """Append ``count`` records after ``last``."""
    records = []
    for _ in range(count):
        last = after(ledger, last, epoch, f"payload {0 if last is None else last.seq}".encode())
        await journal.append(last)
        records.append(last)
    return records


async def stream(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def mark(record: Record, digest: bytes = b"d" * 32) -> Mark:
    return Mark(record.seq, record.at, record.hash, digest)


class JournalKit:
    """The tests. ``store`` is open; ``again`` lets it go and opens it anew, if it keeps anything at all."""

    @pytest.fixture
    async def store(self) -> Store:
        raise NotImplementedError

    async def again(self, store: Store) -> Store:
        return store

    async def test_a_new_ledger_is_empty(self, store: Store) -> None:
        loaded, records = await read(store.journal("a"))
        assert (loaded.epoch, loaded.snapshot, list(loaded.chunks), loaded.check) == (1, None, [], None)
        assert records == []

    async def test_records_come_back_in_order_and_whole(self, store: Store) -> None:
        journal = store.journal("a")
        await read(journal)
        written = await append_many(journal, "a", None, 1, 600)
        for payload in (b"", b"\0" * 5, bytes(range(256)) * 12_000):
            written.append(after("a", written[-1], 1, payload))
            await journal.append(written[-1])
        await journal.close()
        store = await self.again(store)
        loaded, records = await read(store.journal("a"))
        assert loaded.epoch == 2
        assert records == written

    async def test_an_identical_resend_is_accepted_once(self, store: Store) -> None:
        journal = store.journal("a")
        await read(journal)
        (record,) = await append_many(journal, "a", None, 1, 1)
        await journal.append(record)
        _, records = await read(journal)
        assert records == [record]

    @pytest.mark.parametrize(
        "case", ["gap", "same sequence", "other chain", "old epoch", "coming epoch", "other ledger"]
    )
    async def test_what_does_not_follow_is_fenced_off(self, store: Store, case: str) -> None:
        journal = store.journal("a")
        await read(journal)
        await read(journal)
        first, second = await append_many(journal, "a", None, 2, 2)
        wrong = {
            "gap": Record.sealed(4, 2, 9, 7, second.hash, b"x"),
            "same sequence": after("a", first, 2, b"x"),
            "other chain": Record.sealed(3, 2, 9, 7, first.hash, b"x"),
            "old epoch": after("a", second, 1, b"x"),
            "coming epoch": after("a", second, 3, b"x"),
            "other ledger": after("b", None, 2, b"x"),
        }[case]
        with pytest.raises(StoreFenced):
            await journal.append(wrong)
        third = after("a", second, 2)
        await journal.append(third)
        assert (await read(journal))[1] == [first, second, third]

    async def test_nothing_is_appended_before_all_is_read(self, store: Store) -> None:
        journal = store.journal("a")
        await read(journal)
        (record,) = await append_many(journal, "a", None, 1, 1)
        loaded = await journal.load()
        with pytest.raises(StoreError):
            await journal.append(after("a", record, loaded.epoch))
        assert [r async for page in loaded.pages for r in page] == [record]
        await journal.append(after("a", record, loaded.epoch))

    async def test_ledgers_do_not_touch_each_other(self, store: Store) -> None:
        journals = {name: store.journal(name) for name in ("a", "b", "a/b", "ä")}
        written = {}
        for number, (name, journal) in enumerate(journals.items()):
            await read(journal)
            written[name] = await append_many(journal, name, None, 1, 3 + number)
        await journals["a"].write_snapshot(mark(written["a"][-1]), stream([b"state of a"]))
        assert await store.ledgers() == sorted(journals)
        for name in ("b", "a/b", "ä"):
            loaded, records = await read(journals[name])
            assert (records, loaded.snapshot) == (written[name], None)
        assert (await read(journals["a"]))[1] == []

    async def test_a_snapshot_takes_the_place_of_the_records_before_it(self, store: Store) -> None:
        journal = store.journal("a")
        await read(journal)
        records = await append_many(journal, "a", None, 1, 700)
        chunks = [bytes([n % 256]) * 100_000 for n in range(12)] + [b""]
        await journal.write_snapshot(mark(records[649]), stream(chunks))
        more = await append_many(journal, "a", records[-1], 1, 2)
        store = await self.again(store)
        journal = store.journal("a")
        loaded, tail = await read(journal)
        assert list(loaded.chunks) == chunks
        assert loaded.snapshot == mark(records[649], hashlib.sha256(b"".join(chunks)).digest())
        assert tail == records[650:] + more
        # the next one, at the very end
        await journal.write_snapshot(mark(more[-1]), stream([b"x"]))
        loaded, tail = await read(journal)
        assert (list(loaded.chunks), tail) == ([b"x"], [])
        await append_many(journal, "a", more[-1], loaded.epoch, 1)

    async def test_appends_pass_while_a_snapshot_is_written(self, store: Store) -> None:
        journal = store.journal("a")
        await read(journal)
        records = await append_many(journal, "a", None, 1, 10)
        at = records[-1]

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(8):
                yield b"c" * 200_000
                records.extend(await append_many(journal, "a", records[-1], 1, 1))

        await journal.write_snapshot(mark(at), chunks())
        loaded, tail = await read(journal)
        assert len(loaded.chunks) == 8
        assert tail == records[10:]

    async def test_a_snapshot_that_fails_leaves_no_trace(self, store: Store) -> None:
        journal = store.journal("a")
        await read(journal)
        records = await append_many(journal, "a", None, 1, 4)
        await journal.write_snapshot(mark(records[0]), stream([b"first"]))

        async def chunks() -> AsyncIterator[bytes]:
            yield b"c" * 1_000_000
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError):
            await journal.write_snapshot(mark(records[2]), chunks())
        for _ in range(2):
            loaded, tail = await read(journal)
            assert (list(loaded.chunks), tail) == ([b"first"], records[1:])
            await journal.close()
            store = await self.again(store)
            journal = store.journal("a")

    async def test_marks_of_other_records_are_refused(self, store: Store) -> None:
        journal = store.journal("a")
        await read(journal)
        records = await append_many(journal, "a", None, 1, 2)
        for wrong in (
            Mark(2, 9, records[0].hash, b""),
            Mark(3, 9, records[1].hash, b""),
            Mark(0, 0, genesis("a"), b""),
        ):
            with pytest.raises(StoreFenced):
                await journal.write_snapshot(wrong, stream([b"x"]))
            with pytest.raises(StoreFenced):
                await journal.write_check(wrong)
        loaded, tail = await read(journal)
        assert (loaded.snapshot, loaded.check, tail) == (None, None, records)

    async def test_the_newest_lone_mark_is_kept_until_a_snapshot_passes_it(self, store: Store) -> None:
        journal = store.journal("a")
        await read(journal)
        records = await append_many(journal, "a", None, 1, 5)
        await journal.write_check(mark(records[1], b"1" * 32))
        await journal.write_check(mark(records[3], b"2" * 32))
        assert (await read(journal))[0].check == mark(records[3], b"2" * 32)
        await journal.write_snapshot(mark(records[2]), stream([b"x"]))
        assert (await read(journal))[0].check == mark(records[3], b"2" * 32)
        await journal.write_snapshot(mark(records[3]), stream([b"x"]))
        assert (await read(journal))[0].check is None

    async def test_small_values_are_kept(self, store: Store) -> None:
        assert await store.get_meta("key") is None
        await store.put_meta("key", b"\0one")
        await store.put_meta("other", b"")
        await store.put_meta("key", b"two")
        store = await self.again(store)
        assert (await store.get_meta("key"), await store.get_meta("other")) == (b"two", b"")

    @pytest.mark.parametrize("seed", range(8))
    async def test_any_history_reads_as_it_was_written(self, store: Store, seed: int) -> None:
        random_ = random.Random(seed)
        journal = store.journal("a")
        loaded, _ = await read(journal)
        records: list[Record] = []
        state = None
        for _ in range(60):
            choice = random_.random()
            if choice < 0.7:
                last = records[-1] if records else None
                records += await append_many(journal, "a", last, loaded.epoch, random_.randint(1, 30))
            elif choice < 0.85 and records:
                state = random_.choice(records[-40:]) if state is None else records[-1]
                await journal.write_snapshot(mark(state), stream([str(state.seq).encode()]))
            else:
                if random_.random() < 0.5:
                    store = await self.again(store)
                    journal = store.journal("a")
                before = loaded.epoch
                loaded, tail = await read(journal)
                assert loaded.epoch == before + 1
                assert tail == records[0 if state is None else state.seq :]
                assert list(loaded.chunks) == ([] if state is None else [str(state.seq).encode()])
