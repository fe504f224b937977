from __future__ import annotations

from pathlib import Path

import pytest

from paceline.ledger.journal import StoreURLError
from paceline.ledger.memory import MemoryStore
from paceline.ledger.sqlite import Durability, SqliteStore
from paceline.ledger.store import open_store


def test_nothing_is_kept_without_a_path() -> None:
    assert isinstance(open_store("embedded:"), MemoryStore)


@pytest.mark.parametrize(
    ("url", "path", "durability"),
    [
        ("embedded:paceline.db", "paceline.db", Durability.PROCESS),
        ("embedded:./a/b.db", "a/b.db", Durability.PROCESS),
        ("embedded:/var/lib/p.db", "/var/lib/p.db", Durability.PROCESS),
        ("EMBEDDED:///var/lib/p.db", "/var/lib/p.db", Durability.PROCESS),
        ("embedded:/var/a%20b%3F.db", "/var/a b?.db", Durability.PROCESS),
        ("embedded:p.db?durability=process", "p.db", Durability.PROCESS),
        ("embedded:p.db?durability=power", "p.db", Durability.POWER),
    ],
)
def test_a_path_is_a_file(url: str, path: str, durability: Durability) -> None:
    store = open_store(url)
    assert isinstance(store, SqliteStore)
    assert store.path == Path(path)
    assert store.durability is durability


def test_home_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/rider")
    store = open_store("embedded:~/p.db")
    assert isinstance(store, SqliteStore)
    assert store.path == Path("/home/rider/p.db")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "embedded:PATH"),
        ("p.db", "embedded:PATH"),
        ("sqlite:p.db", "embedded:PATH"),
        ("redis:hunter2@host", "SCHEME://HOST"),
        ("embedded://host/p.db", "no host"),
        ("embedded:p.db?", "ends in '\\?'"),
        ("embedded:p.db?durability", "name=value"),
        ("embedded:p.db?durability=", "process or power"),
        ("embedded:p.db?durability=disk", "not 'disk'"),
        ("embedded:p.db?sync=off", "unknown store option 'sync'"),
        ("embedded:?durability=power", "needs a file"),
        ("embedded:a%00b", "zero byte"),
    ],
)
def test_a_wrong_url_says_what_is_right(url: str, says: str) -> None:
    with pytest.raises(StoreURLError, match=says) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
