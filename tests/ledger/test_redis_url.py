"""URLs of Redis stores: what is read from them, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.ledger.journal import StoreError, StoreURLError
from paceline.ledger.redis import RedisStore, parse
from paceline.ledger.redis.settings import SCHEMES, Kind, Tls
from paceline.ledger.store import open_store


@pytest.mark.parametrize(
    ("url", "kind", "hosts", "db", "tls"),
    [
        ("redis://host", Kind.SINGLE, (("host", 6379),), 0, None),
        ("REDIS://host:1/", Kind.SINGLE, (("host", 1),), 0, None),
        ("redis://[::1]:7/3", Kind.SINGLE, (("::1", 7),), 3, None),
        ("valkey://host?db=4", Kind.SINGLE, (("host", 6379),), 4, None),
        ("rediss://host", Kind.SINGLE, (("host", 6379),), 0, Tls()),
        ("valkeys://host?ca=/ca.pem", Kind.SINGLE, (("host", 6379),), 0, Tls("/ca.pem")),
        ("redis+sentinel://a,b:2/svc", Kind.SENTINEL, (("a", 26379), ("b", 2)), 0, None),
        ("valkeys+sentinel://a/svc/2", Kind.SENTINEL, (("a", 26379),), 2, Tls()),
        ("rediss+cluster://a:1,b", Kind.CLUSTER, (("a", 1), ("b", 6379)), 0, Tls()),
        ("redis+cluster://a/0", Kind.CLUSTER, (("a", 6379),), 0, None),
    ],
)
def test_a_url_is_read(url: str, kind: Kind, hosts: tuple[tuple[str, int], ...], db: int, tls: Tls | None) -> None:
    settings = parse(url)
    assert (settings.kind, settings.hosts, settings.db, settings.tls) == (kind, hosts, db, tls)


def test_every_scheme_opens_a_shared_store() -> None:
    for scheme in SCHEMES:
        url = f"{scheme}:///run/redis.sock" if scheme == "unix" else f"{scheme}://host/"
        store = open_store(url + "svc" if "sentinel" in scheme else url)
        assert isinstance(store, RedisStore)
        assert store.shared


def test_the_rest_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(
        "redis+sentinel://us%40er:p%2F%3A%40@h/my%20svc?prefix=a.b&timeout_ms=500&connect_timeout_ms=100"
        "&sentinel_user=s&sentinel_password_env=SECRET_OF_SENTINELS"
    )
    assert settings.login.read() == ("us@er", "p/:@")
    assert (settings.service, settings.prefix) == ("my svc", "a.b")
    assert (settings.command_s, settings.connect_s) == (0.5, 0.1)
    with pytest.raises(StoreError, match="SECRET_OF_SENTINELS, which is not set"):
        settings.sentinel_login.read()
    monkeypatch.setenv("SECRET_OF_SENTINELS", "hunter2")
    assert settings.sentinel_login.read() == ("s", "hunter2")
    file = tmp_path / "password"
    settings = parse(f"unix:///run/redis.sock?user=u&password_file={file}")
    assert settings.path == "/run/redis.sock"
    with pytest.raises(StoreError, match="No such file"):
        settings.login.read()
    file.write_text("hunter2\n")
    assert settings.login.read() == ("u", "hunter2")


def test_a_password_is_not_shown() -> None:
    settings = parse("redis://user:hunter2@host")
    assert "hunter2" not in repr(settings) + str(settings) + settings.name
    assert settings.name == "redis host:6379"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis:host", "SCHEME://HOST"),
        ("redis://", "names no host"),
        ("redis:///0", "names no host"),
        ("redis://a,b", "names one host"),
        ("redis://host:0", "from 1 to 65535"),
        ("redis://host:99999", "from 1 to 65535"),
        ("redis://ho st", "not HOST"),
        ("redis://::1", "not HOST"),
        ("redis://user:hunter2?x@host", "name=value"),
        ("redis://user:hunter2#x@host", "%23"),
        ("redis://user:hunter2/x@host", "not HOST"),
        ("redis://:a?hunter2=b@host", "unknown store option:"),
        ("redis://host/x", "db is a whole number"),
        ("redis://host/0/1", "too many parts"),
        ("redis://host/1?db=1", "drop one"),
        ("redis://host?", "ends in '\\?'"),
        ("redis://host?tls=yes", "unknown store option 'tls'"),
        ("redis://host?db=1&db=2", "twice"),
        ("redis://host?prefix=", "is empty"),
        ("redis://host?prefix=a{b", "1 to 64 of letters"),
        ("redis://host?timeout_ms=0", "timeout_ms is a whole number from 10"),
        ("redis://host?ca=/x", "needs TLS"),
        ("rediss://host?cert=/x", "go together"),
        ("redis://host?sentinel_user=x", "needs Sentinel"),
        ("redis://u@host?user=v", "user is given twice"),
        ("redis://:hunter2@host?password_env=X", "password is given twice"),
        ("redis://host?password_env=X&password_file=/y", "can be one"),
        ("redis+sentinel://host", "names no service"),
        ("redis+sentinel:///svc", "names no host"),
        ("redis+cluster://host/1", "database 0 alone"),
        ("redis+cluster://" + ",".join(["h"] * 33), "more than 32 hosts"),
        ("unix://run/redis.sock", "absolute path"),
        ("unix:///", "absolute path"),
    ],
)
def test_a_wrong_url_says_what_is_right(url: str, says: str) -> None:
    with pytest.raises(StoreURLError, match=says) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
