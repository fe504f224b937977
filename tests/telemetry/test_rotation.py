"""Lines in rotated files: all are there and whole, nobody waits, and what is lost is counted."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.telemetry.rotation import MAX_BATCHES, RotatingFile


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def test_full_files_are_set_aside_and_the_oldest_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = RotatingFile(path, 100, 3)
    for number in range(12):
        assert file.offer(1, lambda number=number: [b"%039d" % number])  # type: ignore[misc]
    file.close(5)
    assert (file.written, file.lost) == (12, 0)
    # Two lines of 40 bytes fit.
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.1", "a.jsonl.2"]
    found = [line for name in ("a.jsonl.2", "a.jsonl.1", "a.jsonl") for line in lines_of(tmp_path / name)]
    assert [int(line) for line in found] == [6, 7, 8, 9, 10, 11]
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_one_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = RotatingFile(path, 100, 1)
    for number in range(5):
        file.offer(1, lambda number=number: [b"%039d" % number])  # type: ignore[misc]
    file.close(5)
    assert [int(line) for line in lines_of(path)] == [4]
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_a_crash_cut_short_spoils_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"whole\ncut sho")
    file = RotatingFile(path, 1_000, 3)
    file.offer(1, lambda: [b"next"])
    file.close(5)
    assert lines_of(path) == [b"whole", b"cut sho", b"next"]


def test_a_slow_disk_holds_up_nobody_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    going, begun = threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        begun.set()
        going.wait(10)
        yield b"first"

    path = tmp_path / "a.jsonl"
    file = RotatingFile(path, 1_000_000, 2)
    assert file.offer(1, slow)
    assert begun.wait(10)
    taken = [file.offer(3, lambda: [b"x", b"y", b"z"]) for _ in range(MAX_BATCHES + 5)]
    assert taken == [True] * MAX_BATCHES + [False] * 5
    assert file.lost == 15
    going.set()
    file.close(10)
    assert (file.written, file.lost) == (1 + 3 * MAX_BATCHES, 15)
    assert len(lines_of(path)) == file.written


def test_a_disk_that_refuses_loses_lines_and_goes_on_later(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    path = folder / "a.jsonl"
    file = RotatingFile(path, 64, 2)
    file.offer(1, lambda: [b"%039d" % 1])
    while not file.written:
        pass
    path.unlink()
    folder.rmdir()
    done = threading.Event()

    def last() -> Iterator[bytes]:
        yield b"%039d" % 2
        done.set()

    file.offer(1, last)
    while not file.lost:
        pass
    folder.mkdir()
    file.offer(1, lambda: [b"%039d" % 3])
    file.close(10)
    assert (file.written, file.lost) == (2, 1)
    assert [int(line) for line in lines_of(path)] == [3]


def test_a_place_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        RotatingFile(tmp_path / "none" / "a.jsonl", 1_000, 2)
