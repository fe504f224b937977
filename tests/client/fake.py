"""A coordinator that does as it is told."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import status_pb2

Answer = pb.ReserveResponse | status_pb2.Status | None
HOLD = 60.0


def granted(
    request: pb.ReserveRequest, *, hold: float = HOLD, waited: float = 0.0, **fields: Any
) -> pb.ReserveResponse:
    """A grant of the first candidate."""
    answer = pb.ReserveResponse()
    grant = answer.grant
    if request.candidates:
        grant.target.CopyFrom(request.candidates[0].target)
    else:
        grant.target.model = "of-the-ladder"
    grant.pool = f"pool/{grant.target.model}"
    grant.context = b"context of " + request.reservation_id.encode()
    grant.expires_in.FromNanoseconds(int(hold * 1e9))
    grant.waited.FromNanoseconds(int(waited * 1e9))
    for number in range(request.count if request.count > 1 else 0):
        grant.child_reservation_ids.append(f"{request.reservation_id[:-4]}{number:04d}")
    for name, value in fields.items():
        setattr(grant, name, value)
    return answer


def denied(
    reason: pb.DenialReason.ValueType = pb.DENIAL_REASON_LIMIT, retry_after: float | None = None
) -> pb.ReserveResponse:
    """A denial."""
    answer = pb.ReserveResponse()
    answer.denial.reason = reason
    answer.denial.pool = "pool/x"
    answer.denial.message = "for people"
    if retry_after is not None:
        answer.denial.retry_after.FromNanoseconds(int(retry_after * 1e9))
    answer.binding_dimension.dimension = pb.DIMENSION_INPUT_TOKENS
    answer.binding_dimension.window = pb.WINDOW_MINUTE
    return answer


def share(
    pool: str, per_minute: dict[pb.Dimension.ValueType, int], *, expires_in: float = 60, model: str = ""
) -> pb.FallbackShare:
    """A fallback share."""
    message = pb.FallbackShare(pool=pool)
    for dimension, amount in per_minute.items():
        message.amounts.add(dimension=dimension, per_minute=amount)
    message.expires_in.FromNanoseconds(int(expires_in * 1e9))
    if model:
        message.targets.add(model=model)
    return message


class Stream:
    """One stream, as the fake sees it."""

    def __init__(self, hello: pb.Hello) -> None:
        self.hello = hello
        self.out: queue.SimpleQueue[pb.SessionResponse | grpc.StatusCode | None] = queue.SimpleQueue()
        self.open: dict[int, pb.RequestItem] = {}
        self.ended = threading.Event()
        self.mute = False
        """As that of the server, for this one."""

    def send(self, *items: pb.ResponseItem) -> None:
        self.out.put(pb.SessionResponse(batch=pb.ResponseBatch(items=items)))


class Fake(pb.CoordinatorServiceServicer):
    """Records what it gets, and answers by ``on_reserve`` (by default with a grant)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sessions: list[Stream] = []
        self.batches: list[list[pb.RequestItem]] = []
        self.unary: list[str] = []
        self.tokens: set[str] = set()
        self.on_reserve: Callable[[pb.ReserveRequest], Answer] = granted
        self.on_report: Callable[[str, Any], status_pb2.Status | None] = lambda what, request: None
        self.mute = False
        """Nothing is answered."""
        self.refuse: grpc.StatusCode | None = None
        """Sessions are refused."""
        self.welcome = pb.Welcome(server_version="fake", protocol_version=1)
        self.welcome_delay = 0.0
        self.grants: Counter[str] = Counter()
        self.decided: dict[str, pb.ReserveResponse] = {}
        self.settlement = pb.CommitResponse()
        self.server: grpc.Server | None = None
        self.port = 0

    # -- life ---------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> Fake:
        self.server = grpc.server(
            ThreadPoolExecutor(64),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ],
        )
        pb.add_CoordinatorServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        assert self.port
        self.server.start()
        return self

    def stop(self) -> None:
        self.break_sessions()
        if self.server is not None:
            self.server.stop(0).wait(5)
            self.server = None

    def break_sessions(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        with self.lock:
            sessions, self.sessions = self.sessions, []
        for session in sessions:
            session.out.put(code)

    def drain(self, grace: float = 5.0) -> Stream:
        message = pb.SessionResponse()
        message.drain.grace.FromNanoseconds(int(grace * 1e9))
        with self.lock:
            session = self.sessions.pop()
        session.out.put(message)
        return session

    # -- what came ----------------------------------------------------------------------------------------------

    def items(self, what: str) -> list[Any]:
        """The operations of a kind, in order of arrival."""
        with self.lock:
            return [getattr(item, what) for batch in self.batches for item in batch if item.WhichOneof("op") == what]

    def wait_for(self, what: str, count: int = 1, timeout: float = 10.0) -> list[Any]:
        """Wait until so many have come."""
        until(lambda: len(self.items(what)) >= count, timeout, lambda: f"{len(self.items(what))} of {count} {what}")
        return self.items(what)

    # -- the service ----------------------------------------------------------------------------------------------

    def Session(
        self, request_iterator: Iterator[pb.SessionRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SessionResponse]:
        self.tokens.update(str(v) for k, v in context.invocation_metadata() if k == "authorization")
        if self.refuse is not None:
            context.abort(self.refuse, "refused by the script")
        first = next(request_iterator)
        assert first.WhichOneof("message") == "hello"
        time.sleep(self.welcome_delay)
        session = Stream(first.hello)
        yield pb.SessionResponse(welcome=self.welcome)
        with self.lock:
            self.sessions.append(session)

        def read() -> None:
            try:
                for message in request_iterator:
                    self._batch(session, message)
            except grpc.RpcError:
                pass
            finally:
                session.ended.set()
                session.out.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            message = session.out.get()
            if message is None:
                return
            if isinstance(message, grpc.StatusCode):
                context.abort(message, "broken by the script")
            yield message

    def _batch(self, session: Stream, message: pb.SessionRequest) -> None:
        answers = []
        with self.lock:
            self.batches.append(list(message.batch.items))
        for item in message.batch.items:
            session.open[item.number] = item
            if not self.mute and not session.mute:
                answer = self._item(item)
                if answer is not None:
                    del session.open[item.number]
                    answers.append(answer)
        if answers:
            session.send(*answers)

    def _item(self, item: pb.RequestItem) -> pb.ResponseItem | None:
        what = item.WhichOneof("op")
        assert what is not None
        request = getattr(item, what)
        answer = pb.ResponseItem(number=item.number)
        result = self.answer(what, request)
        if result is None:
            return None
        if isinstance(result, status_pb2.Status):
            answer.error.CopyFrom(result)
        else:
            getattr(answer, what).CopyFrom(result)
        return answer

    def answer(self, what: str, request: Any) -> Any:
        """The result of one operation. ``None``: not now."""
        if what == "reserve":
            known = self.decided.get(request.reservation_id)
            if known is not None:
                return known
            result = self.on_reserve(request)
            if isinstance(result, pb.ReserveResponse) and result.HasField("grant"):
                with self.lock:
                    self.grants[request.reservation_id] += 1
                    self.decided[request.reservation_id] = result
            return result
        refused = self.on_report(what, request)
        if refused is not None:
            return refused
        if what == "commit":
            return self.settlement
        if what == "renew":
            renewed = pb.RenewResponse()
            renewed.expires_in.FromNanoseconds(int(HOLD * 1e9))
            return renewed
        return pb.ReleaseResponse(released=True) if what == "release" else pb.ObserveResponse()

    def _unary(self, what: str, request: Any, context: grpc.ServicerContext) -> Any:
        with self.lock:
            self.unary.append(what)
            item = pb.RequestItem()
            getattr(item, what).CopyFrom(request)
            self.batches.append([item])
        result = self.answer(what, request)
        if isinstance(result, status_pb2.Status):
            code = next(each for each in grpc.StatusCode if each.value[0] == result.code)
            context.abort(code, result.message)
        return result

    def Reserve(self, request: pb.ReserveRequest, context: grpc.ServicerContext) -> pb.ReserveResponse:
        return self._unary("reserve", request, context)  # type: ignore[no-any-return]

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:
        return self._unary("commit", request, context)  # type: ignore[no-any-return]

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseResponse:
        return self._unary("release", request, context)  # type: ignore[no-any-return]

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewResponse:
        return self._unary("renew", request, context)  # type: ignore[no-any-return]

    def Observe(self, request: pb.ObserveRequest, context: grpc.ServicerContext) -> pb.ObserveResponse:
        return self._unary("observe", request, context)  # type: ignore[no-any-return]


def until(condition: Callable[[], bool], timeout: float = 10.0, what: Callable[[], str] = lambda: "") -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in time {what()}"
        time.sleep(0.002)
