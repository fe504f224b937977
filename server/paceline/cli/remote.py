"""Talking to a server: the options that say where and who, the channel, and errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from paceline.cli.console import CommandError
from paceline.config import Config

DEFAULT_ADDRESS: str = Config.model_fields["listen"].default
MAX_SECONDS = 600.0
_FIND_SECONDS = 1.0
"""For each of several servers to be reached."""

Address = Annotated[
    str,
    typer.Option(
        envvar="PACELINE_ADDRESS",
        metavar="HOST:PORT",
        help="Where the server listens. `unix:PATH` works too. Of several, divided by commas, the first that answers.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="PACELINE_TOKEN_FILE",
        metavar="FILE",
        help="File with the token of an identity. The variable PACELINE_TOKEN can hold the token instead.",
    ),
]
Seconds = Annotated[
    float, typer.Option(min=0.01, max=MAX_SECONDS, metavar="SECONDS", help="How long an answer may take.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_REMEDIES = {
    grpc.StatusCode.UNAUTHENTICATED: "set PACELINE_TOKEN, or --token-file",
    grpc.StatusCode.UNIMPLEMENTED: "is that a Paceline server, and of this version?",
}


class Remote:
    """A connection to a server. ``metadata`` goes with every call."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self.channel = channel
        self.metadata = metadata


@contextmanager
def connect(address: str, token_file: Path | None, token: str | None) -> Iterator[Remote]:
    """A connection; what fails over it becomes a :class:`CommandError`."""
    try:
        bearer = token_file.read_text(encoding="utf-8") if token_file is not None else token or ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise CommandError(f"--token-file {token_file} cannot be read: {reason}") from None
    bearer = bearer.strip()
    if not (bearer.isascii() and bearer.isprintable()):
        raise CommandError("the token has characters that a token cannot have")
    metadata = (("authorization", f"Bearer {bearer}"),) if bearer else ()
    where = _answering(address)
    with _channel(where) as channel:
        try:
            yield Remote(channel, metadata)
        except grpc.RpcError as error:
            raise CommandError(in_words(error, where)) from None


def _answering(addresses: str) -> str:
    """The first of several addresses where something answers; if none does, the last."""
    *others, last = [address.strip() for address in addresses.split(",")]
    for address in others:
        with _channel(address) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=_FIND_SECONDS)
            except grpc.FutureTimeoutError:
                continue
            return address
    return last


def _channel(address: str) -> grpc.Channel:
    # A proxy of the environment would be asked for the server.
    return grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),))


def in_words(error: grpc.RpcError, address: str) -> str:
    """One line about a failed call."""
    # What grpc raises is both; its types do not say so.
    call = cast(grpc.Call, cast(object, error))
    code, details = call.code(), call.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and ("connect" in details or not details):
        return f"no server answers at {address}: start one with `paceline serve`, or set --address"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer from {address} in time: set a longer --timeout"
    remedy = _REMEDIES.get(code)
    text = f"{address} answers {code.name}" + (f": {details}" if details else "")
    return f"{text} ({remedy})" if remedy else text


def as_dict(message: Message) -> dict[str, object]:
    """A message as JSON has it, with the names of the contract."""
    return dict(MessageToDict(message, preserving_proto_field_name=True))
