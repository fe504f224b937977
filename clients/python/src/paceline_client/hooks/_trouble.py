"""What goes wrong inside a hook: said once, counted, and kept from the application's call."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

log = logging.getLogger("paceline_client")

troubles: Final[Counter[str]] = Counter()
"""How often something of a kind went wrong in this process. The kinds are those named in the code of the hooks."""


def trouble(kind: str, error: BaseException) -> None:
    """Count it, and log the first of its kind with its trace."""
    troubles[kind] += 1
    if troubles[kind] == 1:
        log.warning(
            "paceline: a hook failed at %r; the call goes on without it. Said once.",
            kind,
            exc_info=(type(error), error, error.__traceback__),
        )
