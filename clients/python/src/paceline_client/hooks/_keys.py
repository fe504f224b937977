"""The caller's own API keys, one for each account that a call may be granted on. They stay in this process."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping

from paceline_client._grant import Grant

Key = str | Callable[[], str] | Callable[[], Awaitable[str]]
"""An API key, or a function that fetches it when it is needed; with an async SDK client it may be awaitable."""


class Bearer(str):
    """The value of an ``Authorization`` header that is not shown where the headers of a request are logged."""

    __slots__ = ()

    def __new__(cls, key: str) -> Bearer:
        """For this key."""
        return super().__new__(cls, f"Bearer {key}")

    def __repr__(self) -> str:
        return "'<redacted>'"


class Keys:
    """Neither shown nor sent to the coordinator: of a key only the name of its account is."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Mapping[str, Key] | None, account: str) -> None:
        """``account``: the only one that is asked for. Empty: any of them, in the order of the keys."""
        self._keys = None if keys is None else dict(keys)
        if self._keys is None:
            return
        if not self._keys:
            raise ValueError("keys has no entry: name an account, and its key")
        for name, key in self._keys.items():
            if not name or not isinstance(name, str):
                raise ValueError("keys: each entry needs the name of an account")
            if not callable(key):
                _check(name, key)
        if account and account not in self._keys:
            raise ValueError(f"keys has no entry for the account {account!r}")

    def __bool__(self) -> bool:
        return self._keys is not None

    def __repr__(self) -> str:
        return f"<Keys {', '.join(self._keys or ())}>"

    @property
    def accounts(self) -> tuple[str, ...]:
        """In order of preference."""
        return tuple(self._keys or ())

    def choose(self, grant: Grant) -> str | None:
        """The key for the granted account. ``None``: that of the SDK client.

        Raises ``UnmappedAccount``, and what the caller's function raises; then the grant is released.
        """
        if self._keys is None:
            return None
        found = grant._choose(self._keys, "keys")
        try:
            key = found() if callable(found) else found
            if inspect.isawaitable(key):
                if inspect.iscoroutine(key):
                    key.close()
                raise TypeError(
                    f"keys: that of {grant.target.account!r} is awaitable, and this SDK client is not async"
                )
            return _check(grant.target.account, key)
        except BaseException:
            grant.release()
            raise

    async def choose_async(self, grant: Grant) -> str | None:
        """The same."""
        if self._keys is None:
            return None
        found = grant._choose(self._keys, "keys")
        try:
            key = found() if callable(found) else found
            return _check(grant.target.account, await key if inspect.isawaitable(key) else key)
        except BaseException:
            grant.release()
            raise


def _check(account: str, key: object) -> str:
    if not isinstance(key, str) or not key:
        # Without the key itself, which may be one of another type.
        raise TypeError(f"keys: that of {account!r} is no text, or empty")
    return key
