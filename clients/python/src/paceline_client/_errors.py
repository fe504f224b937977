"""What the library raises."""

from __future__ import annotations

from typing import Final

__all__ = ["CannotFit", "Denied", "PacelineError", "RequestRefused", "Unavailable", "UnmappedAccount"]

MAX_NAMED: Final = 10
"""Accounts that an error message lists."""


class PacelineError(Exception):
    """Every error of this library is one of these."""


class Denied(PacelineError):
    """The call may not be made now."""

    def __init__(
        self,
        reason: str,
        *,
        retry_after: float | None = None,
        pool: str = "",
        dimension: str = "",
        share: str = "",
        window: str = "",
        message: str = "",
        local: bool = False,
    ) -> None:
        self.reason = reason
        """Why: ``limit``, ``timeout``, ``queue_full``, ``too_large``, ``pool_closed``, ``pool_paused``, ``spend_cap``,
        ``released``, ``draining`` or ``blocked``."""
        self.retry_after = retry_after
        """When to come back, in seconds. ``None``: waiting does not help, or the time is not known."""
        self.pool = pool
        """Name of the pool that denies. Empty: none."""
        self.dimension = dimension
        """The dimension that binds, for example ``input_tokens``. Empty: not about a limit."""
        self.share = share
        """Name of the share that binds. Empty: the pool itself."""
        self.window = window
        """The window of the limit that binds: ``minute``, ``day``, ``month`` or ``none``. Empty: not about a limit."""
        self.message = message
        """For people."""
        self.local = local
        """Decided in this process, because no coordinator could be reached."""
        what = f"{reason}: {message}" if message else reason
        where = " ".join(part for part in (pool, share, dimension) if part)
        later = "" if retry_after is None else f", retry after {retry_after:.3g} s"
        super().__init__(f"{what}{f' ({where})' if where else ''}{later}")

    def __reduce__(self) -> tuple[object, ...]:
        return _denied, (
            self.reason,
            self.retry_after,
            self.pool,
            self.dimension,
            self.share,
            self.window,
            self.message,
            self.local,
        )


def _denied(
    reason: str,
    retry_after: float | None,
    pool: str,
    dimension: str,
    share: str,
    window: str,
    message: str,
    local: bool,
) -> Denied:
    return Denied(
        reason,
        retry_after=retry_after,
        pool=pool,
        dimension=dimension,
        share=share,
        window=window,
        message=message,
        local=local,
    )


class Unavailable(PacelineError):
    """No coordinator could be reached in time, and the policy is ``closed``."""


class RequestRefused(PacelineError):
    """The coordinator answered with an error: the request, or this caller's identity, is not valid."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        """Name of the gRPC status, for example ``INVALID_ARGUMENT``."""
        self.message = message
        super().__init__(code, message)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class UnmappedAccount(PacelineError, LookupError):
    """The grant is for an account for which the caller has named no key or client. It has been released."""

    def __init__(self, account: str, field: str, known: tuple[str, ...] = ()) -> None:
        self.account = account
        """Of the grant (its ``target.account``)."""
        self.field = field
        """The argument that lacks it: ``accounts``, or ``keys`` of a hook."""
        self.known = known
        """The accounts that it has."""
        super().__init__(account, field, known)

    def __str__(self) -> str:
        known = ", ".join(sorted(self.known)[:MAX_NAMED]) or "nothing"
        more = ", …" if len(self.known) > MAX_NAMED else ""
        return (
            f"the grant is for the account {self.account!r} (target.account), for which `{self.field}` has no entry; "
            f"it has {known}{more}. The reservation was released."
        )


class CannotFit(PacelineError, ValueError):
    """What must stay in a prompt is already larger than the room for it."""

    def __init__(self, needed: int, tokens: int) -> None:
        self.needed = needed
        """The estimate of what must stay. Unit: tokens."""
        self.tokens = tokens
        """The room. Unit: tokens."""
        super().__init__(needed, tokens)

    def __str__(self) -> str:
        return f"what must stay needs about {self.needed} tokens, and there is room for {self.tokens}"
