"""What goes wrong, as callers see it: a status, the field at fault and the remedy. Never what they had sent."""

from __future__ import annotations

import secrets
import traceback
from typing import TypeAlias

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2

from paceline.frontend import limits
from paceline_client.stubs.google_types import error_details_pb2, status_pb2

Code: TypeAlias = grpc.StatusCode
Violations: TypeAlias = tuple[tuple[str, str], ...]

_log = structlog.get_logger(__name__)

_MAX_FRAMES = 12
DETAILS_KEY = "grpc-status-details-bin"


class Problem(Exception):
    """An operation that fails. The message is for people: what is wrong and what to do."""

    def __init__(
        self, code: Code, message: str, violations: Violations = (), retry_after_us: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after_us = retry_after_us

    def status(self) -> status_pb2.Status:
        """As a ``google.rpc.Status`` with its details."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        if self.violations:
            detail = error_details_pb2.BadRequest()
            for field, description in self.violations:
                detail.field_violations.add(field=field, description=description)
            status.details.append(_packed(detail))
        if self.retry_after_us is not None:
            delay = duration_pb2.Duration()
            delay.FromMicroseconds(self.retry_after_us)
            status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        return status

    async def abort(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """End the rpc with it. Does not return."""
        metadata: tuple[tuple[str, bytes], ...] = ()
        if self.violations or self.retry_after_us is not None:
            metadata = ((DETAILS_KEY, self.status().SerializeToString()),)
        await context.abort(self.code, self.message, metadata)


def _packed(message: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def invalid(field: str, what: str) -> Problem:
    """INVALID_ARGUMENT for one field."""
    return Problem(Code.INVALID_ARGUMENT, f"{field}: {what}", ((field, what),))


def undecodable() -> Problem:
    """INVALID_ARGUMENT for bytes that are no message."""
    what = "the message cannot be decoded: send it as the contract (paceline.v1) has it"
    return Problem(Code.INVALID_ARGUMENT, what, (("", what),))


def refused(field: str, what: str) -> Problem:
    """FAILED_PRECONDITION for one field."""
    return Problem(Code.FAILED_PRECONDITION, f"{field}: {what}", ((field, what),))


def forbidden(what: str) -> Problem:
    """PERMISSION_DENIED."""
    return Problem(Code.PERMISSION_DENIED, what)


def exhausted(what: str, retry_after_us: int = limits.RETRY_SOON_US) -> Problem:
    """RESOURCE_EXHAUSTED: this server protects itself."""
    return Problem(Code.RESOURCE_EXHAUSTED, what, (), retry_after_us)


def unavailable(what: str) -> Problem:
    """UNAVAILABLE: the store or the owner is away."""
    return Problem(Code.UNAVAILABLE, what)


def missing(what: str) -> Problem:
    """NOT_FOUND."""
    return Problem(Code.NOT_FOUND, what)


def _frames(error: BaseException) -> list[str]:
    """Where it happened. No messages and no values: they may repeat what a caller sent, or its token."""
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]


def unexpected(where: str, error: BaseException) -> Problem:
    """A defect of ours: logged under a reference number, which is all that the caller sees of it."""
    reference = secrets.token_hex(4)
    _log.error("unexpected error", where=where, reference=reference, kind=type(error).__name__, frames=_frames(error))
    return Problem(
        Code.ABORTED,
        f"this server failed at the request (reference {reference}); if it happens again, report that number",
    )
