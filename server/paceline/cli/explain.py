"""``paceline explain``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated
from uuid import UUID

import grpc
import msgspec
import typer

from paceline.cli.console import CommandError, say, say_json
from paceline.cli.remote import DEFAULT_ADDRESS, Address, AsJson, Seconds, TokenFile, as_dict, connect
from paceline.cli.words import enum_word, span
from paceline.frontend import audit
from paceline_client.stubs import v1 as pb

_UNKNOWN = {grpc.StatusCode.NOT_FOUND}


def explain(
    reservation: Annotated[str, typer.Argument(metavar="ID", help="The reservation id, as its caller gave it.")],
    identity: Annotated[
        str, typer.Option(help="The identity of its caller. Empty: any, if only one uses the id.")
    ] = "",
    files: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FILE", help="Read this file of the audit, not a server. May be repeated."),
    ] = None,
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Annotated[str | None, typer.Option(envvar="PACELINE_TOKEN", hidden=True)] = None,
    timeout: Seconds = 10.0,
) -> None:
    """Say why a call waits, was granted or was denied: what bound, how many come first, and when its turn is."""
    try:
        number = str(UUID(reservation))
    except ValueError:
        raise CommandError(f"{reservation!r} is no reservation id: it is a UUID, as the caller gave it") from None
    if files:
        found = _from_files(files, number, identity)
    else:
        with connect(address, token_file, token) as remote:
            method = pb.AdminServiceStub(remote.channel).Explain
            request = pb.ExplainRequest(reservation_id=number, identity=identity)
            try:
                found = method(request, timeout=timeout, metadata=remote.metadata)
            except grpc.RpcError as error:
                if getattr(error, "code", lambda: None)() in _UNKNOWN:
                    raise CommandError(
                        f"{address} knows nothing of {number}: it is not on the books, nor among the newest decisions; "
                        "older ones are in the files of the audit, if there are any (--from FILE)"
                    ) from None
                raise
    if as_json:
        say_json(as_dict(found))
        return
    for line in _lines(found):
        say(line)


def _from_files(files: Iterable[Path], number: str, identity: str) -> pb.ExplainResponse:
    """What the files say of a reservation. Raises :class:`CommandError`."""
    found: list[audit.Entry] = []
    for path in files:
        try:
            with path.open("rb") as lines:
                found += [entry for entry in _entries(path, lines, number) if audit.names(entry, number, identity)]
        except OSError as error:
            raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    if not found:
        raise CommandError(f"nothing of {number} in {', '.join(map(str, files))}: is it in an older file?")
    who = sorted({entry.identity for entry in found})
    if len(who) > 1:
        raise CommandError(f"several identities use this id: name one with --identity ({', '.join(who)})")
    found.sort(key=lambda entry: entry.time)
    return audit.history(found)


def _entries(path: Path, lines: Iterable[bytes], number: str) -> Iterator[audit.Entry]:
    wanted = number.encode()
    for place, line in enumerate(lines, start=1):
        if wanted not in line:
            continue
        try:
            yield audit.decode(line)
        except msgspec.DecodeError:
            # Being written, or cut short by a crash.
            sys.stderr.write(f"warning: {path} has no decision in line {place}, which is passed over\n")


def _lines(found: pb.ExplainResponse) -> Iterator[str]:
    known = found.reservation
    state = enum_word(pb.ReservationState, "RESERVATION_STATE_", known.state)
    if known.state == pb.RESERVATION_STATE_UNSPECIFIED:
        state = "denied" if found.decision.HasField("denial") else "not known"
    parts = [known.reservation_id, state, known.pool]
    parts += [f"{name} {value}" for name in ("identity", "tenant", "workspace") if (value := getattr(known, name))]
    if known.priority:
        parts.append(enum_word(pb.Priority, "PRIORITY_", known.priority))
    yield " · ".join(filter(None, parts))
    for step in found.steps:
        at = step.time.ToDatetime().isoformat(" ", "milliseconds") if step.HasField("time") else "now"
        yield f"  {at:<23}  {step.message}"
    if found.decision.HasField("denial") and found.decision.denial.HasField("retry_after"):
        yield f"  it was told to come back in {span(found.decision.denial.retry_after)}"
