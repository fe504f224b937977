"""Who a call is for, and how long it may wait: what a hook was given, and what a block of code says instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, get_args

from paceline_client._model import Priority

DEFAULT_MAX_WAIT: Final = 60.0
"""For the turn of one attempt. Unit: seconds."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What is left out is empty or ``None``."""

    tenant: str = ""
    workspace: str = ""
    priority: Priority | None = None
    route: str = ""
    max_wait: float | None = None

    def __post_init__(self) -> None:
        # Here, where the caller made the mistake, and not at the first call, which a hook must not break.
        if self.priority is not None and self.priority not in get_args(Priority):
            raise ValueError(f"priority must be one of {', '.join(get_args(Priority))}, not {self.priority!r}")
        if self.max_wait is not None and not self.max_wait >= 0:
            raise ValueError("max_wait must not be negative")

    def over(self, other: Labels) -> Labels:
        """These, and where they say nothing, the others."""
        return Labels(
            self.tenant or other.tenant,
            self.workspace or other.workspace,
            self.priority or other.priority,
            self.route or other.route,
            other.max_wait if self.max_wait is None else self.max_wait,
        )


NONE: Final = Labels()
_current: ContextVar[Labels] = ContextVar("paceline labels", default=NONE)


def current() -> Labels:
    """Those of the block that the caller is in."""
    return _current.get()


@contextmanager
def labels(
    *,
    tenant: str = "",
    workspace: str = "",
    priority: Priority | None = None,
    route: str = "",
    max_wait: float | None = None,
) -> Iterator[None]:
    """Within the block, calls through any hook carry these instead of the hook's own.

    Blocks nest: what an inner one leaves out stays as it is. Tasks and threads see the labels of the context that they
    run in. ``max_wait`` is in seconds.
    """
    token = _current.set(Labels(tenant, workspace, priority, route, max_wait).over(_current.get()))
    try:
        yield
    finally:
        _current.reset(token)
