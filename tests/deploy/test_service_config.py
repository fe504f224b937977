"""The published service config: gRPC takes it, and retries what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline_client.stubs import v1 as pb

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "clients" / "service_config.json").read_text(encoding="utf-8")
CONFIG = json.loads(TEXT)


class Flaky:
    """Fails with a status so many times."""

    def __init__(self, code: grpc.StatusCode, times: int) -> None:
        self.code = code
        self.times = times
        self.seen: list[str] = []

    def reserve(self, request: pb.ReserveRequest, context: grpc.ServicerContext) -> pb.ReserveResponse:
        self._serve(request.reservation_id, context)
        return pb.ReserveResponse(grant=pb.Grant())

    def observe(self, request: pb.ObserveRequest, context: grpc.ServicerContext) -> pb.ObserveResponse:
        self._serve("observe", context)
        return pb.ObserveResponse()

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "paceline.v1.CoordinatorService",
            {
                "Reserve": grpc.unary_unary_rpc_method_handler(
                    self.reserve, pb.ReserveRequest.FromString, pb.ReserveResponse.SerializeToString
                ),
                "Observe": grpc.unary_unary_rpc_method_handler(
                    self.observe, pb.ObserveRequest.FromString, pb.ObserveResponse.SerializeToString
                ),
            },
        )

    def _serve(self, what: str, context: grpc.ServicerContext) -> None:
        self.seen.append(what)
        if len(self.seen) <= self.times:
            context.abort(self.code, "not now")


@pytest.fixture
def flaky(request: pytest.FixtureRequest) -> Iterator[tuple[Flaky, pb.CoordinatorServiceStub]]:
    flaky = Flaky(*request.param)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((flaky.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    # The server here has no health service; gRPC then takes it for healthy.
    options: list[tuple[str, Any]] = [("grpc.service_config", TEXT), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield flaky, pb.CoordinatorServiceStub(channel)
    server.stop(None).wait(5)


@pytest.mark.parametrize("flaky", [(grpc.StatusCode.UNAVAILABLE, 2)], indirect=True)
def test_unavailable_is_tried_again_with_the_same_id(flaky: tuple[Flaky, pb.CoordinatorServiceStub]) -> None:
    servicer, stub = flaky
    stub.Reserve(pb.ReserveRequest(reservation_id="one"), timeout=20)
    assert servicer.seen == ["one"] * 3


@pytest.mark.parametrize("flaky", [(grpc.StatusCode.UNAVAILABLE, 100)], indirect=True)
def test_attempts_are_bounded(flaky: tuple[Flaky, pb.CoordinatorServiceStub]) -> None:
    servicer, stub = flaky
    with pytest.raises(grpc.RpcError):
        stub.Reserve(pb.ReserveRequest(reservation_id="one"), timeout=20)
    assert len(servicer.seen) == CONFIG["methodConfig"][0]["retryPolicy"]["maxAttempts"]


@pytest.mark.parametrize(
    "flaky", [(grpc.StatusCode.RESOURCE_EXHAUSTED, 1), (grpc.StatusCode.FAILED_PRECONDITION, 1)], indirect=True
)
def test_other_statuses_are_final(flaky: tuple[Flaky, pb.CoordinatorServiceStub]) -> None:
    servicer, stub = flaky
    with pytest.raises(grpc.RpcError):
        stub.Reserve(pb.ReserveRequest(reservation_id="one"), timeout=20)
    assert servicer.seen == ["one"]


@pytest.mark.parametrize("flaky", [(grpc.StatusCode.UNAVAILABLE, 1)], indirect=True)
def test_what_may_be_booked_twice_is_not_tried_again(flaky: tuple[Flaky, pb.CoordinatorServiceStub]) -> None:
    servicer, stub = flaky
    with pytest.raises(grpc.RpcError):
        stub.Observe(pb.ObserveRequest(), timeout=20)
    assert servicer.seen == ["observe"]


def test_names_are_those_of_the_contract() -> None:
    services = {
        service.full_name: set(service.methods_by_name)
        for module in (pb.ReserveRequest, pb.Pool)
        for service in module.DESCRIPTOR.file.services_by_name.values()
    }
    for method in CONFIG["methodConfig"]:
        for name in method["name"]:
            assert name.get("method", next(iter(services[name["service"]]))) in services[name["service"]]
        if "retryPolicy" in method:
            assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert CONFIG["healthCheckConfig"]["serviceName"] in services
