"""What goes wrong inside a hook: said once, counted, and kept from the application's call."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

from paceline_client._errors import RequestRefused

log = logging.getLogger("paceline_client")

troubles: Final[Counter[str]] = Counter()
"""How often something of a kind went wrong in this process. The kinds are those named in the code of the hooks."""
uncoordinated: Final[Counter[str]] = Counter()
"""How many calls of this process went on without a reservation that they should have had, by the reason."""


def trouble(kind: str, error: BaseException) -> None:
    """Count it, and log the first of its kind with its trace."""
    troubles[kind] += 1
    if troubles[kind] == 1:
        log.warning(
            "paceline: a hook failed at %r; the call goes on without it. Said once.",
            kind,
            exc_info=(type(error), error, error.__traceback__),
        )


def unreserved(kind: str, error: BaseException) -> None:
    """The same, of what leaves a call without a reservation."""
    uncoordinated[kind] += 1
    trouble(kind, error)


def refused(error: RequestRefused) -> None:
    """The coordinator does not accept the reservation, and the call goes on without. Logs the first with each code."""
    uncoordinated[error.code] += 1
    if uncoordinated[error.code] == 1:
        log.warning(
            "paceline: the coordinator refuses a reservation of a hook (%s); this call, and all like it, are made "
            "UNCOORDINATED. Said once for %s.",
            error,
            error.code,
        )


def counts() -> dict[str, int]:
    """For the statistics of a client."""
    return {"hook_troubles": sum(troubles.values()), "uncoordinated": sum(uncoordinated.values())}
