"""What the hooks of one SDK client share: who asks, for whom, and the way to the coordinator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from paceline_client._client import AsyncClient, Client
from paceline_client._errors import PacelineError, RequestRefused
from paceline_client._grant import Grant
from paceline_client._model import Candidate
from paceline_client._plan import Ask
from paceline_client.hooks._call import Attempt
from paceline_client.hooks._keys import Key, Keys
from paceline_client.hooks._labels import DEFAULT_MAX_WAIT, Labels, current
from paceline_client.hooks._size import Seen, Size
from paceline_client.hooks._trouble import refused, unreserved

_Either = TypeVar("_Either", Client, AsyncClient)

_seen = Seen()
"""Of the process: which client sent a prompt makes no difference to the cache upstream."""
os.register_at_fork(after_in_child=_seen.renew_lock)


class Session:
    """Gets the grants for the attempts of one SDK client."""

    def __init__(
        self,
        client: Client | AsyncClient | None,
        labels: Labels,
        target: Mapping[str, str],
        min_output_tokens: int | None,
        keys: Mapping[str, Key] | None = None,
    ) -> None:
        if min_output_tokens is not None and min_output_tokens < 0:
            raise ValueError("min_output_tokens must not be negative")
        if client is None:
            # Here, though it contacts nobody before the first call: a mistake in the environment must not show in the
            # application's calls.
            client = Client()
        elif not isinstance(client, (Client, AsyncClient)):
            raise TypeError(f"client must be a Client or an AsyncClient of paceline_client, not {client!r}")
        self.keys = Keys(keys, target.get("account", ""))
        self.seen = _seen
        self.min_output_tokens = min_output_tokens
        self._given = client
        self._labels = labels
        self._target = {name: value for name, value in target.items() if value}
        self._sync = client if isinstance(client, Client) else None
        self._async = client if isinstance(client, AsyncClient) else None

    @property
    def client(self) -> Client:
        """For threads."""
        if self._sync is None:
            self._sync = _alike(Client, self._given)
        return self._sync

    @property
    def async_client(self) -> AsyncClient:
        """For asyncio."""
        if self._async is None:
            self._async = _alike(AsyncClient, self._given)
        return self._async

    def begin(self, model: str, size: Size, timeout: float | None) -> Attempt | None:
        """Wait for the turn of one attempt. ``None``: it goes on without.

        Raises ``Denied``, and ``Unavailable`` and ``RequestRefused`` if the policy is ``closed``; ``UnmappedAccount``,
        and what the caller's function for a key raises.
        """
        try:
            attempt = Attempt(self.client.acquire(**self._ask(model, size, timeout)), size, self.seen)
        except RequestRefused as error:
            self._refused(error)
            return None
        except PacelineError:
            raise
        except Exception as error:
            unreserved("a reservation", error)
            return None
        # What goes wrong here is not kept from the caller: the call would be made with the key of another account.
        attempt.key = self.keys.choose(attempt.grant)
        return attempt

    async def begin_async(self, model: str, size: Size, timeout: float | None) -> Attempt | None:
        """The same."""
        try:
            attempt = Attempt(await self.async_client.acquire(**self._ask(model, size, timeout)), size, self.seen)
        except RequestRefused as error:
            self._refused(error)
            return None
        except PacelineError:
            raise
        except Exception as error:
            unreserved("a reservation", error)
            return None
        attempt.key = await self.keys.choose_async(attempt.grant)
        return attempt

    def lowered(self, grant: Grant, size: Size) -> int | None:
        """The bound of the output that the call must carry instead of its own. ``None``: its own stands."""
        bound, asked = grant.max_output_tokens, size.max_output_tokens
        return bound if bound is not None and asked is not None and bound < asked else None

    def _refused(self, error: RequestRefused) -> None:
        # A wrong token or a name that the server does not know is no fault of the call, which a hook must not break.
        if self._given._options.policy == "closed":
            raise error
        refused(error)

    def _ask(self, model: str, size: Size, timeout: float | None) -> Ask:
        who = current().over(self._labels)
        wait = DEFAULT_MAX_WAIT if who.max_wait is None else who.max_wait
        candidate = Candidate(
            model,
            input_tokens=size.input_tokens,
            cached_input_tokens=size.cached_tokens,
            max_output_tokens=size.max_output_tokens,
            min_output_tokens=self.min_output_tokens,
            **self._target,  # type: ignore[arg-type]
        )
        named = "account" in self._target or not self.keys
        return Ask(
            candidates=[candidate] if named else [replace(candidate, account=each) for each in self.keys.accounts],
            tenant=who.tenant,
            workspace=who.workspace,
            priority=who.priority,
            route=who.route,
            max_wait=wait if timeout is None else min(wait, max(0.0, timeout)),
        )


def seconds(timeout: object) -> float | None:
    """For how long a request may take, as an SDK has it: a number, or an object with a time for reading."""
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool):
        return float(timeout)
    read = getattr(timeout, "read", None)
    return float(read) if isinstance(read, (int, float)) else None


def _alike(kind: type[_Either], given: Client | AsyncClient) -> _Either:
    """A client of this kind, with all that the given one has, its connection included."""
    twin = kind.__new__(kind)
    twin.__dict__.update(given.__dict__)
    return twin
