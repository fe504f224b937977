"""``paceline reserve``: one reservation from beginning to end, to try a server out."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

import typer
from google.protobuf.duration_pb2 import Duration

from paceline.cli.console import DENIED, leave, say, say_json, show, table
from paceline.cli.remote import (
    DEFAULT_ADDRESS,
    MAX_SECONDS,
    Address,
    AsJson,
    Remote,
    Seconds,
    TokenFile,
    as_dict,
    connect,
)
from paceline.cli.words import amount, dimension_word, enum_word, money, present, span, where, window_word
from paceline_client.stubs import v1 as pb

_PRIORITIES = {
    "interactive": pb.PRIORITY_INTERACTIVE,
    "standard": pb.PRIORITY_STANDARD,
    "batch": pb.PRIORITY_BATCH,
}


def reserve(
    model: Annotated[str, typer.Option(help="The model, as the API names it.")],
    input_tokens: Annotated[
        int | None, typer.Option(min=0, max=1_000_000_000, help="Expected input. Left out: learned.")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=0, max=1_000_000_000, help="Expected output. Left out: learned.")
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, max=1_000_000_000, help="The call's `max_tokens`.")
    ] = None,
    provider: Annotated[str, typer.Option(help="Empty: the server's default.")] = "",
    account: Annotated[str, typer.Option(help="Empty: the server's default.")] = "",
    tenant: Annotated[str, typer.Option(help="Who the call is for.")] = "",
    workspace: Annotated[str, typer.Option(help="The team's share.")] = "",
    route: Annotated[str, typer.Option(help="A label for calls of this kind.")] = "",
    priority: Annotated[Literal["interactive", "standard", "batch"], typer.Option()] = "standard",
    max_wait: Annotated[
        float, typer.Option(min=0, max=MAX_SECONDS, metavar="SECONDS", help="How long to wait for a turn.")
    ] = 0.0,
    then: Annotated[
        Literal["commit", "release"],
        typer.Option(help="What follows a grant: commit what was estimated as used, or give everything back."),
    ] = "commit",
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Annotated[str | None, typer.Option(envvar="PACELINE_TOKEN", hidden=True)] = None,
    timeout: Seconds = 10.0,
) -> None:
    """Reserve, then commit or release. No API is called.

    Exit code 0: granted; 3: denied; 2: an error.
    """
    request = pb.ReserveRequest(
        reservation_id=str(uuid.uuid4()),
        tenant=tenant,
        workspace=workspace,
        route=route,
        priority=_PRIORITIES[priority],
        max_wait=_duration(max_wait),
    )
    candidate = request.candidates.add(target=pb.Target(model=model, provider=provider, account=account))
    candidate.estimate.SetInParent()
    if input_tokens is not None:
        candidate.estimate.input_tokens = input_tokens
    if output_tokens is not None:
        candidate.estimate.output_tokens = output_tokens
    if max_output_tokens is not None:
        candidate.estimate.max_output_tokens = max_output_tokens

    with connect(address, token_file, token) as remote:
        stub = pb.CoordinatorServiceStub(remote.channel)
        answer = stub.Reserve(request, timeout=timeout + max_wait, metadata=remote.metadata)
        told: dict[str, object] = {"reservation_id": request.reservation_id, "reserve": as_dict(answer)}
        if not as_json:
            _say_decision(answer)
        if answer.WhichOneof("result") == "grant":
            if then == "commit":
                committed = _commit(remote, stub, request, answer.grant, timeout)
                told["commit"] = as_dict(committed)
                if not as_json:
                    _say_settlement(committed)
            else:
                released = stub.Release(
                    pb.ReleaseRequest(reservation_id=request.reservation_id, context=answer.grant.context),
                    timeout=timeout,
                    metadata=remote.metadata,
                )
                told["release"] = as_dict(released)
                if not as_json:
                    say("released: everything went back")
    if as_json:
        say_json(told)
    if answer.WhichOneof("result") != "grant":
        leave(DENIED)


def _commit(
    remote: Remote,
    stub: pb.CoordinatorServiceStub,
    request: pb.ReserveRequest,
    grant: pb.Grant,
    timeout: float,
) -> pb.CommitResponse:
    estimate = request.candidates[0].estimate
    outcome = pb.Outcome(disposition=pb.DISPOSITION_SUCCEEDED, http_status=200)
    if estimate.HasField("input_tokens") or estimate.HasField("output_tokens"):
        outcome.usage.SetInParent()
        if estimate.HasField("input_tokens"):
            outcome.usage.input_tokens = estimate.input_tokens
        if estimate.HasField("output_tokens"):
            outcome.usage.output_tokens = estimate.output_tokens
    return stub.Commit(
        pb.CommitRequest(reservation_id=request.reservation_id, context=grant.context, outcome=outcome),
        timeout=timeout,
        metadata=remote.metadata,
    )


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromMicroseconds(round(seconds * 1e6))
    return found


def _say_decision(answer: pb.ReserveResponse) -> None:
    if answer.WhichOneof("result") == "grant":
        grant = answer.grant
        waited = f"after {span(grant.waited)}" if grant.waited.ToMicroseconds() else "at once"
        most = f", at most {grant.max_output_tokens:,} output tokens" if grant.HasField("max_output_tokens") else ""
        say(f"granted {waited} in {grant.pool}{most}; the hold ends in {span(grant.expires_in)}")
    else:
        denial = answer.denial
        reason = enum_word(pb.DenialReason, "DENIAL_REASON_", denial.reason)
        back = f"; come back in {span(denial.retry_after)}" if denial.HasField("retry_after") else ""
        binds = ""
        if answer.HasField("binding_dimension"):
            limit = answer.binding_dimension
            binds = f", {dimension_word(limit.dimension)} of {where(limit.pool, limit.share)}"
        text = f": {denial.message}" if denial.message else ""
        say(f"denied ({reason}{binds}){text}{back}")
    if answer.HasField("observed_decision") and answer.observed_decision.reason:
        reason = enum_word(pb.DenialReason, "DENIAL_REASON_", answer.observed_decision.reason)
        say(f"observe mode: it would have been denied ({reason})")
    if answer.dimensions:
        content = table("limit of", "dimension", "window", "limit", "level", "held", right=("limit", "level", "held"))
        for state in answer.dimensions:
            content.add_row(
                where(state.pool, state.share) or "account",
                dimension_word(state.dimension),
                window_word(state.window),
                amount(state.dimension, present(state, "limit")),
                amount(state.dimension, present(state, "level")),
                amount(state.dimension, state.held),
            )
        show(content)


def _say_settlement(committed: pb.CommitResponse) -> None:
    charged = ", ".join(
        f"{amount(each.dimension, each.charged)} {dimension_word(each.dimension)}"
        for each in committed.settlements
        if not each.share and each.dimension != pb.DIMENSION_SPEND
    )
    cost = f"; cost {money(committed.cost)}" if committed.HasField("cost") else ""
    say(f"committed: {charged or 'nothing was charged'}{cost}")
