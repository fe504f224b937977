"""Whatever is sent, the answer is INVALID_ARGUMENT with the field at fault, and the server goes on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from paceline.config import Config, Shares, catalogue
from paceline.frontend.auth import Caller as Identified
from paceline.frontend.auth import Identity
from paceline.frontend.context import Signer, new_key
from paceline.frontend.errors import Code, Problem
from paceline.frontend.places import Places
from paceline.frontend.requests import Known, Requests
from paceline.providers.headers import ALLOWED_HEADERS, parse
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import (
    MODEL,
    POOL,
    Caller,
    bad_request,
    details,
    new_id,
    reserve,
    succeeded,
)

SECRET = "nobody-elses-business-0123456789"
COORDINATOR = "paceline.v1.CoordinatorService"
ADMIN = "paceline.v1.AdminService"
KINDS: dict[str, Any] = {
    "Reserve": pb.ReserveRequest,
    "Commit": pb.CommitRequest,
    "Release": pb.ReleaseRequest,
    "Renew": pb.RenewRequest,
    "Observe": pb.ObserveRequest,
}
ADMIN_KINDS: dict[str, Any] = {
    method.name: getattr(pb, method.input_type.name)
    for method in pb.WatchRequest.DESCRIPTOR.file.services_by_name["AdminService"].methods
}

Change = Callable[[Any], object]


def candidate(message: Any) -> Any:
    return message.candidates[0]


def estimate(message: Any) -> Any:
    return message.candidates[0].estimate


def without_usage(message: Any) -> None:
    message.outcome.ClearField("usage")
    message.outcome.usage_kind = pb.USAGE_KIND_FINAL


def headers(message: Any, count: int) -> None:
    for _ in range(count):
        message.outcome.headers.add(name="date", value=b"x")


RESERVE: list[tuple[str, Change]] = [
    ("reservation_id", lambda m: m.ClearField("reservation_id")),
    ("reservation_id", lambda m: setattr(m, "reservation_id", "1234")),
    ("reservation_id", lambda m: setattr(m, "reservation_id", "g" * 36)),
    ("reservation_id", lambda m: setattr(m, "reservation_id", new_id().replace("-", ""))),
    ("reservation_id", lambda m: setattr(m, "reservation_id", " " + new_id()[1:])),
    ("reservation_id", lambda m: setattr(m, "reservation_id", new_id() + "\n")),
    ("candidates", lambda m: m.ClearField("candidates")),
    ("candidates", lambda m: m.candidates.extend([m.candidates[0]] * 16)),
    ("candidates[0].target.model", lambda m: candidate(m).ClearField("target")),
    ("candidates[0].target.model", lambda m: setattr(candidate(m).target, "model", "x" * 257)),
    ("candidates[0].target.model", lambda m: setattr(candidate(m).target, "model", "a\nb")),
    ("candidates[0].target.region", lambda m: setattr(candidate(m).target, "region", "\x00")),
    ("candidates[1].target.model", lambda m: m.candidates.add()),
    ("candidates[0].estimate.input_tokens", lambda m: setattr(estimate(m), "input_tokens", -1)),
    ("candidates[0].estimate.input_tokens", lambda m: setattr(estimate(m), "input_tokens", 1_000_000_001)),
    ("candidates[0].estimate.cached_input_tokens", lambda m: setattr(estimate(m), "cached_input_tokens", -5)),
    ("candidates[0].estimate.output_tokens", lambda m: setattr(estimate(m), "output_tokens", -(2**31))),
    ("candidates[0].estimate.output_tokens", lambda m: setattr(estimate(m), "output_tokens", 101)),
    ("candidates[0].estimate.max_output_tokens", lambda m: setattr(estimate(m), "max_output_tokens", 2**31 - 1)),
    ("candidates[0].estimate.requests", lambda m: setattr(estimate(m), "requests", 500_001)),
    ("candidates[0].min_output_tokens", lambda m: setattr(candidate(m), "min_output_tokens", 0)),
    ("candidates[0].min_output_tokens", lambda m: setattr(candidate(m), "min_output_tokens", -1)),
    ("candidates[0].min_output_tokens", lambda m: setattr(candidate(m), "min_output_tokens", 101)),
    ("ladder", lambda m: setattr(m, "ladder", "both")),
    ("tenant", lambda m: setattr(m, "tenant", "x" * 129)),
    ("workspace", lambda m: setattr(m, "workspace", "a\tb")),
    ("route", lambda m: setattr(m, "route", "x" * 129)),
    ("route", lambda m: setattr(m, "route", "\u202e")),
    ("priority", lambda m: setattr(m, "priority", 4)),
    ("priority", lambda m: setattr(m, "priority", -1)),
    ("max_wait", lambda m: setattr(m.max_wait, "seconds", 601)),
    ("max_wait", lambda m: setattr(m.max_wait, "seconds", -1)),
    ("max_wait", lambda m: setattr(m.max_wait, "nanos", -1)),
    ("max_wait", lambda m: setattr(m.max_wait, "nanos", 1_000_000_000)),
    ("max_wait", lambda m: setattr(m.max_wait, "seconds", 2**62)),
    ("hold", lambda m: setattr(m.hold, "nanos", 1_000)),
    ("hold", lambda m: setattr(m.hold, "seconds", 3_601)),
    ("hold", lambda m: setattr(m.hold, "seconds", -(2**63))),
    ("count", lambda m: setattr(m, "count", 0)),
    ("count", lambda m: setattr(m, "count", -1)),
    ("count", lambda m: setattr(m, "count", 10_001)),
]
COMMIT: list[tuple[str, Change]] = [
    ("reservation_id", lambda m: setattr(m, "reservation_id", "x")),
    ("context", lambda m: setattr(m, "context", b"forged")),
    ("context", lambda m: setattr(m, "context", b"\x01" * 10_000)),
    ("outcome", lambda m: m.ClearField("outcome")),
    ("outcome.disposition", lambda m: setattr(m.outcome, "disposition", 0)),
    ("outcome.disposition", lambda m: setattr(m.outcome, "disposition", 7)),
    ("outcome.http_status", lambda m: setattr(m.outcome, "http_status", 0)),
    ("outcome.http_status", lambda m: setattr(m.outcome, "http_status", 99)),
    ("outcome.http_status", lambda m: setattr(m.outcome, "http_status", 600)),
    ("outcome.usage_kind", lambda m: setattr(m.outcome, "usage_kind", 4)),
    ("outcome.usage", without_usage),
    ("outcome.usage.input_tokens", lambda m: setattr(m.outcome.usage, "input_tokens", -1)),
    ("outcome.usage.cache_read_tokens", lambda m: setattr(m.outcome.usage, "cache_read_tokens", -1)),
    ("outcome.usage.cache_write_tokens", lambda m: setattr(m.outcome.usage, "cache_write_tokens", 2**31 - 1)),
    ("outcome.usage.output_tokens", lambda m: setattr(m.outcome.usage, "output_tokens", 1_000_000_001)),
    ("outcome.headers", lambda m: headers(m, 65)),
    ("outcome.headers[0].name", lambda m: m.outcome.headers.add(name="x" * 129)),
    ("outcome.headers[0].value", lambda m: m.outcome.headers.add(name="x", value=b"x" * 4_097)),
    ("outcome.header_age", lambda m: setattr(m.outcome.header_age, "seconds", -1)),
    ("outcome.error.type", lambda m: setattr(m.outcome.error, "type", "x" * 129)),
    ("outcome.error.code", lambda m: setattr(m.outcome.error, "code", "x" * 129)),
    ("outcome.error.message", lambda m: setattr(m.outcome.error, "message", "x" * 1_025)),
    ("outcome.error.message", lambda m: setattr(m.outcome.error, "message", "ü" * 600)),
    ("outcome.error.details", lambda m: setattr(m.outcome.error, "details", b"x" * 4_097)),
    ("outcome.error.retry_after", lambda m: setattr(m.outcome.error.retry_after, "seconds", -1)),
    ("outcome.served_model", lambda m: setattr(m.outcome, "served_model", "x" * 257)),
]
RELEASE: list[tuple[str, Change]] = [
    ("reservation_id", lambda m: m.ClearField("reservation_id")),
    ("context", lambda m: setattr(m, "context", b"\x01forged")),
    ("targets", lambda m: m.targets.extend([pb.Target(model=MODEL)] * 17)),
    ("targets[1].model", lambda m: m.targets.extend([pb.Target(model=MODEL), pb.Target()])),
]
RENEW: list[tuple[str, Change]] = [
    ("reservation_id", lambda m: m.ClearField("reservation_id")),
    ("context", lambda m: setattr(m, "context", b"forged")),
    ("output_tokens", lambda m: setattr(m, "output_tokens", -1)),
    ("hold", lambda m: setattr(m.hold, "nanos", 5_000)),
    ("hold", lambda m: setattr(m.hold, "seconds", 3_601)),
    ("observation.disposition", lambda m: setattr(m.observation, "disposition", 9)),
    ("observation.usage.output_tokens", lambda m: setattr(m.observation.usage, "output_tokens", -1)),
    ("observation.http_status", lambda m: setattr(m.observation, "http_status", 1)),
]
OBSERVE: list[tuple[str, Change]] = [
    ("observation_id", lambda m: setattr(m, "observation_id", "x")),
    ("target.model", lambda m: m.ClearField("target")),
    ("outcome", lambda m: m.ClearField("outcome")),
    ("tenant", lambda m: setattr(m, "tenant", "x" * 129)),
    ("route", lambda m: setattr(m, "route", "x" * 129)),
]
TABLES: dict[str, list[tuple[str, Change]]] = {
    "Reserve": RESERVE,
    "Commit": COMMIT,
    "Release": RELEASE,
    "Renew": RENEW,
    "Observe": OBSERVE,
}
CASES = [(method, field, change) for method, table in TABLES.items() for field, change in table]


def good(method: str) -> Message:
    if method == "Reserve":
        return reserve()
    if method == "Commit":
        return pb.CommitRequest(reservation_id=new_id(), outcome=succeeded())
    if method == "Release":
        return pb.ReleaseRequest(reservation_id=new_id())
    if method == "Renew":
        return pb.RenewRequest(reservation_id=new_id())
    return pb.ObserveRequest(target=pb.Target(model=MODEL), outcome=succeeded())


def requests() -> Requests:
    config = Config()
    places = Places(catalogue(config), Shares(config).shares_of)
    return Requests(places, Signer(new_key()), parse, ALLOWED_HEADERS)


def decode(decoder: Requests, method: str, message: Any) -> object:
    caller = Identified(Identity("somebody"))
    if method == "Reserve":
        return decoder.reserve(message, caller)
    if method == "Release":
        return decoder.release(message, caller)
    if method == "Observe":
        return decoder.observe(message, caller)
    call = decoder.commit if method == "Commit" else decoder.renew
    return call(message, caller, lambda *_: Known(POOL, 1_000_000))


@pytest.mark.parametrize(
    ("method", "field", "change"), CASES, ids=[f"{m}-{f}-{i}" for i, (m, f, _) in enumerate(CASES)]
)
def test_the_field_is_named(method: str, field: str, change: Change) -> None:
    decoder = requests()
    message = good(method)
    decode(decoder, method, message)
    change(message)
    with pytest.raises(Problem) as caught:
        decode(decoder, method, message)
    problem = caught.value
    assert problem.code is Code.INVALID_ARGUMENT
    assert [each for each, _ in problem.violations] == [field]
    assert problem.message.startswith(field)
    assert len(problem.message) < 200


@pytest.mark.parametrize("method", TABLES)
async def test_over_the_wire(caller: Caller, method: str) -> None:
    for field, change in TABLES[method]:
        message: Any = good(method)
        change(message)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.raw(COORDINATOR, method, message.SerializeToString())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, field
        status = details(caught.value)
        assert status.message == caught.value.details()
        assert [violation.field for violation in bad_request(status).field_violations] == [field]


async def test_nothing_sent_comes_back(caller: Caller) -> None:
    request = reserve(tenant=SECRET * 20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.reserve(request)
    assert SECRET not in (caught.value.details() or "")
    outcome = succeeded()
    outcome.headers.add(name="authorization", value=SECRET.encode() * 500)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.coordinator.Commit(pb.CommitRequest(reservation_id=new_id(), outcome=outcome))
    assert SECRET not in (caught.value.details() or "")


def test_headers_that_are_not_wanted_are_dropped() -> None:
    seen: list[Any] = []

    def reader(family: str, headers: Any, *_: Any, **__: Any) -> None:
        seen.append((family, list(headers)))

    config = Config()
    places = Places(catalogue(config), Shares(config).shares_of, default_family=lambda _: "anthropic")
    decoder = Requests(places, Signer(new_key()), reader, ALLOWED_HEADERS)
    message = pb.CommitRequest(reservation_id=new_id(), outcome=succeeded())
    message.outcome.headers.add(name="Authorization", value=SECRET.encode())
    message.outcome.headers.add(name="x-api-key", value=SECRET.encode())
    message.outcome.headers.add(name="Retry-After", value=b"3")
    message.outcome.headers.add(name="RETRY-AFTER", value=b"4")
    decode(decoder, "Commit", message)
    assert seen == [("anthropic", [("retry-after", b"3"), ("retry-after", b"4")])]


def test_who_may_not_teach_teaches_nothing() -> None:
    decoder = requests()
    message = pb.CommitRequest(reservation_id=new_id(), outcome=succeeded())
    message.outcome.http_status = 429
    message.outcome.headers.add(name="retry-after", value=b"3")
    known = lambda *_: Known(POOL, 1_000_000)  # noqa: E731
    taught = decoder.commit(message, Identified(Identity("somebody")), known)
    assert taught.outcome.observation is not None
    untaught = decoder.commit(message, Identified(Identity("somebody", teaches=False)), known)
    assert untaught.outcome.observation is None
    assert untaught.outcome.usage == taught.outcome.usage


# -- garbage ----------------------------------------------------------------------------------------------------


def garbage(kind: Any, seed: int) -> bytes:
    """Bytes that are no message of this kind."""
    chance = random.Random(seed)
    while True:
        data = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 60)))
        try:
            kind.FromString(data)
        except DecodeError:
            return data


@pytest.mark.parametrize("method", KINDS)
async def test_garbage(caller: Caller, method: str) -> None:
    for seed in range(20):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.raw(COORDINATOR, method, garbage(KINDS[method], seed))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await caller.reserve()).HasField("grant")


@pytest.mark.parametrize("method", [name for name in ADMIN_KINDS if name != "Watch"])
async def test_garbage_to_administration(caller: Caller, method: str) -> None:
    for seed in range(5):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.raw(ADMIN, method, garbage(ADMIN_KINDS[method], seed))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_garbage_to_the_streams(caller: Caller) -> None:
    data = garbage(pb.SessionRequest, 1)
    for method in ("Session", "Watch"):
        service = COORDINATOR if method == "Session" else ADMIN
        if method == "Session":
            call: Any = caller.channel.stream_stream(f"/{service}/{method}")()
            await call.write(data)
        else:
            watch: Any = caller.channel.unary_stream(f"/{service}/{method}")
            call = watch(garbage(pb.WatchRequest, 1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


ALLOWED_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def accept(decoder: Requests, method: str, message: Any) -> None:
    """Decode, or fail as callers may see it."""
    code = None
    try:
        decode(decoder, method, message)
    except Problem as problem:
        code = problem.code
    assert code is None or code in ALLOWED_CODES


@given(method=st.sampled_from(list(KINDS)), data=st.binary(max_size=200))
def test_no_bytes_are_unexpected(method: str, data: bytes) -> None:
    decoder = requests()
    try:
        message = KINDS[method].FromString(data)
    except DecodeError:
        return
    accept(decoder, method, message)


@given(data=st.data(), method=st.sampled_from(list(KINDS)))
def test_no_message_is_unexpected(data: st.DataObject, method: str) -> None:
    message: Any = good(method)
    for _ in range(data.draw(st.integers(1, 4))):
        scramble(data, message)
    accept(requests(), method, message)


def scramble(data: st.DataObject, message: Any) -> None:
    """Set some field somewhere to something."""
    field = data.draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
    if field.message_type is not None:
        if field.is_repeated:
            scramble(data, getattr(message, field.name).add())
        else:
            scramble(data, getattr(message, field.name))
        return
    if field.enum_type is not None:
        value: Any = data.draw(st.integers(-(2**31), 2**31 - 1))
    elif field.cpp_type == field.CPPTYPE_STRING:
        value = data.draw(st.binary(max_size=50) if field.type == field.TYPE_BYTES else st.text(max_size=200))
    elif field.cpp_type == field.CPPTYPE_BOOL:
        value = data.draw(st.booleans())
    elif field.cpp_type == field.CPPTYPE_INT64:
        value = data.draw(st.integers(-(2**63), 2**63 - 1))
    else:
        value = data.draw(st.integers(-(2**31), 2**31 - 1))
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)
