"""Opening a store from its URL.

=============================================  ============================================================
``embedded:``                                  keeps nothing past the process
``embedded:PATH``                              a SQLite file, made if it is not there
``embedded:PATH?durability=process|power``     what survives: see :mod:`paceline.ledger.sqlite`
``redis://HOST`` and more                      shared: see :mod:`paceline.ledger.redis.settings`
=============================================  ============================================================
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, unquote

from paceline.ledger.journal import Store, StoreURLError
from paceline.ledger.memory import MemoryStore
from paceline.ledger.redis import SCHEMES, RedisStore, parse
from paceline.ledger.sqlite import Durability, SqliteStore

_FORMS = "use embedded:PATH for a file, embedded: to keep nothing, or redis://HOST to share it"


def open_store(url: str) -> Store:
    """The store that ``url`` names. Touches nothing yet: call its ``open()``.

    Raises :class:`~paceline.ledger.journal.StoreURLError`. The message repeats no more of the URL than its
    scheme, since the rest may hold a password.
    """
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower()
    if scheme in SCHEMES:
        return RedisStore(parse(url))
    if not colon or scheme != "embedded":
        raise StoreURLError(f"the store's URL is not one this version knows: {_FORMS}")
    path, question, query = rest.partition("?")
    if path.startswith("//") and not path.startswith("///"):
        raise StoreURLError(f"an embedded store has no host: {_FORMS}")
    path = unquote(path.removeprefix("//"))
    if "\0" in path:
        raise StoreURLError("the path of an embedded store holds a zero byte")
    durability = Durability.PROCESS
    if question and not query:
        raise StoreURLError("the store's URL ends in '?': name an option, such as durability=power, or drop it")
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise StoreURLError("the store's options must be written name=value, joined by '&'") from None
    for name, value in options:
        if name != "durability":
            raise StoreURLError(f"unknown store option {name!r}: there is durability=process|power")
        try:
            durability = Durability(value)
        except ValueError:
            raise StoreURLError(f"durability is process or power, not {value!r}") from None
    if not path:
        if options:
            raise StoreURLError("durability needs a file: use embedded:PATH?durability=...")
        return MemoryStore()
    return SqliteStore(Path(path).expanduser(), durability)
