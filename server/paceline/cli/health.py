"""``paceline health``: for container health checks and scripts that wait for a server."""

from __future__ import annotations

import time
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2

from paceline.cli.console import UNHEALTHY, error_line, leave, say
from paceline.cli.remote import DEFAULT_ADDRESS, Address, Seconds, connect, in_words

_PAUSE_S = 0.1


def health(
    service: Annotated[
        str,
        typer.Option(help="One service: a gRPC one by its full name, or store, config, draining. Empty: the server."),
    ] = "",
    wait: Annotated[
        float, typer.Option(min=0, max=600, metavar="SECONDS", help="Ask again, for so long, until it serves.")
    ] = 0.0,
    address: Address = DEFAULT_ADDRESS,
    timeout: Seconds = 3.0,
) -> None:
    """Ask a server whether it serves. Exit code 0: yes; 1: no, or no answer."""
    until = time.monotonic() + wait
    with connect(address, None, None) as remote:
        check = remote.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        request = health_pb2.HealthCheckRequest(service=service)
        while True:
            try:
                status = check(request, timeout=timeout, wait_for_ready=wait > 0).status
                word = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
                found = "" if status == health_pb2.HealthCheckResponse.SERVING else f"{address} is {word}"
            except grpc.RpcError as error:
                found = in_words(error, address)
            if not found:
                say("SERVING")
                return
            if time.monotonic() + _PAUSE_S >= until:
                error_line(found)
                leave(UNHEALTHY)
            time.sleep(_PAUSE_S)
