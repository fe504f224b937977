"""Between the plain values of this library and the messages of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.duration_pb2 import Duration

from paceline_client._errors import Denied
from paceline_client._model import Candidate, Headers, Limit, Priority, Settlement, Target, Usage
from paceline_client._outcome import CallOutcome
from paceline_client.stubs.paceline.v1 import common_pb2 as common
from paceline_client.stubs.paceline.v1 import coordinator_pb2 as pb
from paceline_client.stubs.paceline.v1 import outcome_pb2 as out

MAX_WAIT: Final = 600.0
"""The longest wait that the contract knows. Unit: seconds."""

_PRIORITIES: Final[dict[str, common.Priority.ValueType]] = {
    "interactive": common.PRIORITY_INTERACTIVE,
    "standard": common.PRIORITY_STANDARD,
    "batch": common.PRIORITY_BATCH,
}
_DISPOSITIONS: Final[dict[str | None, out.Disposition.ValueType]] = {
    None: out.DISPOSITION_UNSPECIFIED,
    "succeeded": out.DISPOSITION_SUCCEEDED,
    "rejected": out.DISPOSITION_REJECTED,
    "failed": out.DISPOSITION_FAILED,
    "aborted": out.DISPOSITION_ABORTED,
    "no_response": out.DISPOSITION_NO_RESPONSE,
    "not_sent": out.DISPOSITION_NOT_SENT,
}
_USAGE_KINDS: Final[dict[str, out.UsageKind.ValueType]] = {
    "": out.USAGE_KIND_UNSPECIFIED,
    "final": out.USAGE_KIND_FINAL,
    "partial": out.USAGE_KIND_PARTIAL,
    "missing": out.USAGE_KIND_MISSING,
}
DIMENSIONS: Final[dict[int, str]] = {
    value: name.removeprefix("DIMENSION_").lower() for name, value in common.Dimension.items()
}
_WINDOWS: Final[dict[int, str]] = {value: name.removeprefix("WINDOW_").lower() for name, value in common.Window.items()}
_REASONS: Final[dict[int, str]] = {
    value: name.removeprefix("DENIAL_REASON_").lower() for name, value in common.DenialReason.items()
}


def set_duration(duration: Duration, seconds: float) -> None:
    """Write seconds into a duration field."""
    nanos = max(0, round(seconds * 1e9))
    duration.seconds = nanos // 1_000_000_000
    duration.nanos = nanos % 1_000_000_000
    duration.SetInParent()  # zero is not the same as absent


def seconds(duration: Duration) -> float:
    """Read a duration field."""
    return duration.seconds + duration.nanos * 1e-9


def target_message(target: Target | Candidate) -> common.Target:
    """A target."""
    return common.Target(
        provider=target.provider,
        account=target.account,
        region=target.region,
        upstream_workspace=target.upstream_workspace,
        service_tier=target.service_tier,
        endpoint=target.endpoint,
        model=target.model,
    )


def target_of(message: common.Target) -> Target:
    """A target, read."""
    return Target(
        message.model,
        message.provider,
        message.account,
        message.region,
        message.upstream_workspace,
        message.service_tier,
        message.endpoint,
    )


def _estimate(candidate: Candidate) -> common.Estimate | None:
    if (
        candidate.input_tokens is None
        and candidate.output_tokens is None
        and candidate.max_output_tokens is None
        and candidate.cached_input_tokens is None
        and candidate.requests is None
    ):
        return None
    return common.Estimate(
        requests=candidate.requests,
        input_tokens=candidate.input_tokens,
        cached_input_tokens=candidate.cached_input_tokens,
        output_tokens=candidate.output_tokens,
        max_output_tokens=candidate.max_output_tokens,
    )


def reserve_request(
    reservation_id: str,
    candidates: Sequence[Candidate],
    *,
    ladder: str,
    tenant: str,
    workspace: str,
    priority: Priority | None,
    route: str,
    hold: float | None,
    count: int | None,
    allow_partial: bool,
) -> pb.ReserveRequest:
    """A Reserve. ``max_wait`` is set when it is sent. With a ladder the one candidate carries the estimate."""
    request = pb.ReserveRequest(
        reservation_id=reservation_id,
        tenant=tenant,
        workspace=workspace,
        priority=common.PRIORITY_UNSPECIFIED if priority is None else _PRIORITIES[priority],
        route=route,
        count=count,
        allow_partial=allow_partial,
    )
    if ladder:
        request.ladder = ladder
        estimate = _estimate(candidates[0])
        if estimate is not None:
            request.ladder_estimate.CopyFrom(estimate)
    else:
        for candidate in candidates:
            request.candidates.add(
                target=target_message(candidate),
                estimate=_estimate(candidate),
                min_output_tokens=candidate.min_output_tokens,
            )
    if hold is not None:
        set_duration(request.hold, hold)
    return request


def denied(answer: pb.ReserveResponse) -> Denied:
    """The denial in an answer."""
    denial = answer.denial
    ref = answer.binding_dimension if answer.HasField("binding_dimension") else None
    return Denied(
        _REASONS.get(denial.reason, "unspecified"),
        retry_after=seconds(denial.retry_after) if denial.HasField("retry_after") else None,
        pool=denial.pool,
        dimension=DIMENSIONS.get(ref.dimension, "") if ref is not None else "",
        share=ref.share if ref is not None else "",
        window=_WINDOWS.get(ref.window, "") if ref is not None else "",
        message=denial.message,
    )


def binding(answer: pb.ReserveResponse) -> str:
    """The dimension that bound. Empty: none."""
    return DIMENSIONS.get(answer.binding_dimension.dimension, "") if answer.HasField("binding_dimension") else ""


def limits(answer: pb.ReserveResponse) -> tuple[Limit, ...]:
    """The limits in an answer."""
    return tuple(
        Limit(
            each.pool,
            each.share,
            DIMENSIONS.get(each.dimension, ""),
            _WINDOWS.get(each.window, ""),
            each.limit if each.HasField("limit") else None,
            each.burst if each.HasField("burst") else None,
            each.level if each.HasField("level") else None,
            each.held,
        )
        for each in answer.dimensions
    )


def outcome_message(outcome: CallOutcome, headers: Headers) -> out.Outcome:
    """An outcome. The age of its headers is set when it is sent."""
    message = out.Outcome(
        disposition=_DISPOSITIONS[outcome.disposition],
        http_status=outcome.status,
        served_model=outcome.served_model[:256],
        usage_kind=_USAGE_KINDS[outcome.usage_kind],
    )
    for name, value in headers:
        message.headers.add(name=name, value=value)
    usage = outcome.usage
    if usage is not None:
        message.usage.CopyFrom(_usage(usage))
    error = outcome.error
    if error is not None:
        message.error.type = error.type
        message.error.code = error.code
        message.error.message = error.message
        message.error.details = error.details
        if error.retry_after is not None:
            set_duration(message.error.retry_after, error.retry_after)
    return message


def _usage(usage: Usage) -> out.Usage:
    return out.Usage(
        input_tokens=usage.input_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        output_tokens=usage.output_tokens,
    )


def settlement(answer: pb.CommitResponse) -> Settlement:
    """What was booked."""
    cost = answer.cost if answer.HasField("cost") else None
    charged: dict[str, int] = {}
    for each in answer.settlements:
        if not each.share:
            name = DIMENSIONS.get(each.dimension, str(each.dimension))
            charged[name] = max(each.charged, charged.get(name, 0))
    return Settlement(
        cost=None if cost is None else cost.units + cost.nanos * 1e-9,
        currency="" if cost is None else cost.currency_code,
        charged=charged,
        duplicate=answer.duplicate,
        late=answer.late,
        stale=answer.stale,
    )
