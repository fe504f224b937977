"""Grants: what the caller holds while it makes its API call, and how it says what became of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, overload

from paceline_client._errors import Denied, UnmappedAccount
from paceline_client._model import Headers, HeaderSource, Limit, Settlement, Target, Usage
from paceline_client._outcome import CallOutcome, UsageKind, from_exception, from_response

if TYPE_CHECKING:
    from paceline_client._core import Timer
    from paceline_client._local import LocalGrant
    from paceline_client._send import Account
    from paceline_client.stubs.paceline.v1.coordinator_pb2 import ReserveResponse

__all__ = ["Grant", "GrantBatch"]

A = TypeVar("A")


class Grant:
    """The permission for one API call.

    No method blocks, waits or raises for want of a coordinator: reports are sent in the background. Each grant ends
    once; what comes after its end changes nothing.
    """

    __slots__ = (
        "__weakref__",
        "_account",
        "_answer",
        "_context",
        "_ended",
        "_header_time",
        "_instance",
        "_local",
        "_not_sent",
        "_output",
        "_reported",
        "_status",
        "_timer",
        "candidate_index",
        "denial",
        "expires_at",
        "local",
        "max_output_tokens",
        "pool",
        "reservation_id",
        "settlement",
        "target",
        "waited",
    )

    def __init__(
        self,
        account: Account | None,
        *,
        reservation_id: str = "",
        candidate_index: int = 0,
        target: Target,
        max_output_tokens: int | None = None,
        pool: str = "",
        expires_at: float = float("inf"),
        waited: float = 0.0,
        context: bytes = b"",
        local: bool = False,
        local_grant: LocalGrant | None = None,
        denial: Denied | None = None,
        answer: ReserveResponse | None = None,
    ) -> None:
        self.reservation_id = reservation_id
        self.candidate_index = candidate_index
        """Which of the candidates, from 0."""
        self.target = target
        """Where the call goes."""
        self.max_output_tokens = max_output_tokens
        """The bound that the API call must carry. ``None``: the caller's own."""
        self.pool = pool
        """Name of the pool. Empty: not known."""
        self.expires_at = expires_at
        """When the hold ends, on the clock of :func:`time.monotonic`. Long calls are renewed by themselves."""
        self.waited = waited
        """How long the call waited for its turn. Unit: seconds."""
        self.local = local
        """Granted by the policy of this process, because no coordinator could be reached."""
        self.denial = denial
        """Only with ``raise_on_denial=False``: why there is no grant. ``None``: it is granted."""
        self.settlement: Settlement | None = None
        """What the server booked, once it has said so."""
        self._account = account
        self._answer = answer
        self._context = context
        self._local = local_grant
        self._instance = "" if account is None else account.hub.instance
        self._ended = denial is not None
        self._not_sent = False
        self._output: int | None = None
        self._reported: Headers | None = None
        self._status: int | None = None
        self._header_time: float | None = None
        self._timer: Timer | None = None

    def __bool__(self) -> bool:
        return self.denial is None

    def __repr__(self) -> str:
        what = "ended" if self._ended else "open"
        return f"<Grant {self.reservation_id or 'disabled'} {self.target.model} {what}>"

    @property
    def fields(self) -> dict[str, str | int | float | bool | None]:
        """What there is to say of the grant, in plain values, for logs and traces."""
        return {
            "reservation_id": self.reservation_id,
            "candidate_index": self.candidate_index,
            "provider": self.target.provider,
            "model": self.target.model,
            "pool": self.pool,
            "max_output_tokens": self.max_output_tokens,
            "waited": self.waited,
            "local": self.local,
            "denied": None if self.denial is None else self.denial.reason,
        }

    @property
    def binding(self) -> str:
        """The dimension of the limit that the call waited for. Empty: it did not wait, or nobody has said."""
        if self._answer is None:
            return ""
        from paceline_client._wire import binding

        return binding(self._answer)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits that the call touches, as they were when it was granted. Empty: no coordinator has said."""
        if self._answer is None:
            return ()
        from paceline_client._wire import limits

        return limits(self._answer)

    def choose(self, accounts: Mapping[str, A]) -> A:
        """The caller's own API key or SDK client for the account that was granted.

        Where nobody has named an account (a client that is disabled, no coordinator) it is the first. Raises
        :class:`~paceline_client.UnmappedAccount` for an account that is missing, and releases the grant.
        """
        return self._choose(accounts, "accounts")

    @property
    def ended(self) -> bool:
        """Committed or released."""
        return self._ended

    # -- during the call ----------------------------------------------------------------------------------------

    def report(
        self, headers: HeaderSource | None = None, status: int | None = None, *, usage: Usage | None = None
    ) -> None:
        """The response headers are here. Call it before the body is read: they go to the coordinator at once.

        ``usage``: what the beginning of a stream says of it, such as the exact size of the input. It may come with the
        headers or in a call of its own, after them. ``status`` is 200 unless given, now or before.
        """
        account = self._account
        if account is None or self._stale:
            return
        hub = account.hub
        now = hub.clock()
        chosen: Headers = []
        if status is not None or self._status is None:
            self._status = 200 if status is None else status
        if headers is not None or self._reported is None:
            self._header_time = now
            self._reported = chosen = hub.headers.select(headers)
        self._not_sent = False
        if self.local:
            return
        observed = CallOutcome(None, self._status, usage=usage, usage_kind="" if usage is None else "partial")
        account.report(self, observed, chosen, now)

    def progress(self, output_tokens: int) -> None:
        """So many tokens have been produced so far, a running total. It goes along with the next renewal."""
        if self._output is None or output_tokens > self._output:
            self._output = output_tokens

    def not_sent(self) -> None:
        """The call was not sent, and will not be: however the block ends, everything goes back."""
        self._not_sent = True

    # -- after it -------------------------------------------------------------------------------------------------

    def commit(self, response: object = None) -> None:
        """The call has succeeded. Takes the response of an SDK, parsed or raw, or a dict with ``usage``."""
        if self._account is None:
            self._ended = True
        elif not self._ended:
            self._settle(
                CallOutcome("succeeded", self._status, usage_kind="missing")
                if response is None
                else from_response(response)
            )

    def commit_usage(
        self,
        *,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        cache_read_tokens: int | None = None,
        cache_write_tokens: int | None = None,
        headers: HeaderSource | None = None,
        status: int = 200,
        served_model: str = "",
        partial: bool = False,
    ) -> None:
        """The call has succeeded, with this usage. ``input_tokens`` are those outside the cache."""
        if status >= 400:
            self._settle(from_response({"status_code": status}) if headers is None else _refusal(status, headers))
            return
        usage = Usage(input_tokens, cache_read_tokens, cache_write_tokens, output_tokens)
        kind: UsageKind = "missing" if not usage.known else "partial" if partial else "final"
        self._settle(
            CallOutcome(
                "succeeded",
                status,
                headers,
                usage=usage if usage.known else None,
                usage_kind=kind,
                served_model=served_model,
            )
        )

    def commit_error(self, error: BaseException) -> None:
        """The call has raised ``error``. A block does this by itself."""
        self._settle(from_exception(error, started=self._reported is not None))

    def release(self) -> None:
        """The call was not made: everything goes back."""
        self._settle(CallOutcome("not_sent"))

    # -- as a block -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Grant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        if self._ended:
            return
        if self._account is None:
            self._ended = True
        elif self._not_sent:
            self.release()
        elif error is not None:
            self.commit_error(error)
        else:
            self._account.hub.warn(
                "usage missing",
                "paceline: a call ended without grant.commit(response): its estimate is booked instead of its usage",
            )
            self._settle(CallOutcome("succeeded", self._status, usage_kind="missing"))

    # -- inside -------------------------------------------------------------------------------------------------

    def _choose(self, accounts: Mapping[str, A], field: str) -> A:
        account = self.target.account
        if account in accounts:
            return accounts[account]
        if not account and accounts:
            return next(iter(accounts.values()))
        self.release()
        raise UnmappedAccount(account, field, tuple(accounts))

    @property
    def _stale(self) -> bool:
        """Ended, or belonging to the parent of this process."""
        account = self._account
        return self._ended or account is None or account.hub.instance != self._instance

    def _settle(self, outcome: CallOutcome) -> None:
        if self._stale:
            self._ended = True
            return
        account = self._account
        if account is None:
            return
        self._ended = True
        hub = account.hub
        now = hub.clock()
        if outcome.usage is None and self._output is not None and outcome.disposition != "not_sent":
            outcome.usage = Usage(output_tokens=self._output)
            outcome.usage_kind = "partial"
        elif outcome.usage is None and outcome.disposition in ("aborted", "no_response"):
            outcome.usage_kind = "missing"
        if outcome.status is None:
            outcome.status = self._status
        headers = hub.headers.select(outcome.headers)
        header_time: float | None = now if headers else None
        reported = self._reported
        if reported is not None and (not headers or headers == reported):
            # They have been sent already; a local grant has had no way to.
            headers = reported if self.local else []
            header_time = self._header_time if headers else None
        timer, self._timer = self._timer, None
        if self.local:
            if self._local is not None:
                hub.local.end(self._local, outcome.usage, now, sent=outcome.disposition != "not_sent")
            if outcome.disposition != "not_sent":
                account.observe(self.target, outcome, headers, header_time)
        elif outcome.disposition == "not_sent":
            account.release(self.reservation_id, self._context, timer=timer)
        else:
            account.commit(self, outcome, headers, header_time, timer)


class GrantBatch(Sequence[Grant]):
    """The permissions for several equal API calls.

    A grant counts as used from the moment it is taken out, by an index or a loop. When the block ends, used ones that
    were not committed count as any grant whose block ends so, and those that were never taken are released.
    """

    def __init__(self, grants: Sequence[Grant], denial: Denied | None = None) -> None:
        self.denial = denial
        """Only with ``raise_on_denial=False``: why there is no grant. ``None``: there is at least one."""
        self._grants = tuple(grants)
        self._taken: dict[str, Grant] = {}

    def __len__(self) -> int:
        return len(self._grants)

    @overload
    def __getitem__(self, index: int) -> Grant: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Grant]: ...
    def __getitem__(self, index: int | slice) -> Grant | Sequence[Grant]:
        if isinstance(index, slice):
            return [self._take(grant) for grant in self._grants[index]]
        return self._take(self._grants[index])

    def __iter__(self) -> Iterator[Grant]:
        for grant in self._grants:
            yield self._take(grant)

    def release(self) -> None:
        """Release whatever has not ended."""
        for grant in self._grants:
            grant.release()

    def _take(self, grant: Grant) -> Grant:
        self._taken.pop(grant.reservation_id, None)
        self._taken[grant.reservation_id] = grant
        return grant

    def __enter__(self) -> GrantBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        last = next(reversed(self._taken.values()), None)
        for grant in self._grants:
            if grant.reservation_id not in self._taken:
                grant.release()
            elif error is not None and grant is not last and isinstance(error, Exception):
                # The error is that of the last one; how far the others had come is not known.
                if not grant.ended:
                    grant._settle(CallOutcome("no_response"))
            else:
                grant._leave(error)


def _refusal(status: int, headers: HeaderSource) -> CallOutcome:
    outcome = from_response({"status_code": status})
    outcome.headers = headers
    return outcome
