"""Why a ledger has no answer to an operation."""

from __future__ import annotations


class LedgerError(Exception):
    """Why an operation has no answer. It may be sent again as it is.

    ``retry_after_us``: when that makes sense. One instance may be handed to many callers: look at it, do not
    raise it.
    """

    def __init__(self, message: str, retry_after_us: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_us = retry_after_us


class LedgerBusy(LedgerError):
    """Too many operations are queued; nothing was decided."""


class LedgerUnavailable(LedgerError):
    """The journal is away. The operation may or may not be in the books."""


class LedgerMoved(LedgerUnavailable):
    """Another process owns the ledger now, or soon. The operation may or may not be in the books."""


class LedgerDraining(LedgerError):
    """The owner is stopping; nothing was decided."""


class LedgerFault(LedgerError):
    """The engine failed on this very operation, which left no trace. Sending it again will not help."""


class LedgerStopped(LedgerUnavailable):
    """The ledger stopped for good: what is journalled cannot be folded, or the engine fails by itself."""
