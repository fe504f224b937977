"""The clients: one for threads, one for asyncio, with one behaviour."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack

from paceline_client._config import DEFAULT_BUDGET, DEFAULT_LOCAL_SCALE, Options, Transport, options
from paceline_client._errors import Denied, Unavailable
from paceline_client._grant import Grant, GrantBatch
from paceline_client._model import HeaderSource, Mode, Policy, Priority, Target, Usage
from paceline_client._outcome import CallOutcome, from_exception, from_response
from paceline_client._plan import Ask, Plan, plan
from paceline_client._steps import Answer, Local, Step, Turn, Walk

if TYPE_CHECKING:
    from paceline_client._desk import Decision, Desk
    from paceline_client._send import Submit

__all__ = ["AsyncClient", "AsyncReservation", "AsyncReservations", "Client", "Reservation", "Reservations"]

T = TypeVar("T")

CLOSE_BUDGET: Final = 2.0
"""For the last reports of a client that is closed. Unit: seconds."""
FLUSH_POLL: Final = 0.005


class _Base:
    """What both clients share."""

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        policy: Policy | None = None,
        disabled: bool | None = None,
        mode: Mode | None = None,
        tenant: str = "",
        workspace: str = "",
        priority: Priority | None = None,
        route: str = "",
        budget: float = DEFAULT_BUDGET,
        local_scale: float = DEFAULT_LOCAL_SCALE,
        transport: Transport = "session",
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
    ) -> None:
        """See the README for the options and their variables in the environment.

        Nothing is contacted before the first call.
        """
        self._options: Options = options(
            address=address,
            token=token,
            policy=policy,
            disabled=disabled,
            mode=mode,
            transport=transport,
            budget=budget,
            local_scale=local_scale,
            tenant=tenant,
            workspace=workspace,
            priority=priority,
            route=route,
            ca_file=ca_file,
            cert_file=cert_file,
            key_file=key_file,
        )
        self._closed = False
        self._desk: Desk | None = None
        if not self._options.disabled:
            # Here, so that one that is disabled does not even load gRPC.
            from paceline_client._desk import Desk as desk
            from paceline_client._hub import join

            self._desk = desk(join(self._options.endpoint), self._options)

    @property
    def disabled(self) -> bool:
        """Nothing is contacted, and everything granted at once."""
        return self._options.disabled

    def statistics(self) -> dict[str, int | float | bool | None]:
        """What goes on between this process and the coordinator, for debugging."""
        if self._desk is None:
            return {}
        # It is of the standard library only, and needs no SDK.
        from paceline_client.hooks._trouble import counts

        return {**self._desk.hub.statistics(), **counts()}

    def __repr__(self) -> str:
        where = "disabled" if self.disabled else self._options.endpoint.address
        return f"<{type(self).__name__} {where}>"

    def _plan(self, ask: Ask, count: int | None = None, allow_partial: bool = False) -> Plan:
        if self._closed:
            raise RuntimeError("the client is closed")
        return plan(ask, self._options, count, allow_partial)

    def _observe(
        self,
        desk: Desk,
        submit: Submit,
        target: Target,
        who: tuple[str, str, str],
        response: object,
        error: BaseException | None,
        usage: Usage,
        headers: HeaderSource | None,
        status: int | None,
    ) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")
        if error is not None:
            outcome = from_exception(error, started=headers is not None)
        elif response is not None:
            outcome = from_response(response)
        elif status is not None and status >= 400:
            outcome = from_response({"status_code": status})
        else:
            outcome = CallOutcome("succeeded", 200 if status is None else status)
        if usage.known:
            outcome.usage, outcome.usage_kind = usage, ""
        if headers is not None:
            outcome.headers = headers
        hub = desk.hub
        chosen = hub.headers.select(outcome.headers)
        desk.account(submit, *who).observe(target, outcome, chosen, hub.clock() if chosen else None)


def _granted(asked: Plan, decision: Decision) -> Grant:
    if not isinstance(decision, Denied):
        return decision[0]
    if asked.raise_on_denial:
        raise decision
    return Grant(None, target=asked.candidates[0].target, pool=decision.pool, denial=decision)


def _batch(asked: Plan, decision: Decision) -> GrantBatch:
    if not isinstance(decision, Denied):
        return GrantBatch(decision)
    if asked.raise_on_denial:
        raise decision
    return GrantBatch((), decision)


def _disabled(asked: Plan) -> list[Grant]:
    target = asked.candidates[0].target
    return [Grant(None, reservation_id=f"disabled-{n}", target=target) for n in range(asked.count or 1)]


class Client(_Base):
    """Coordinates the calls of this process with those of the fleet. For threads; they may share one.

    All clients of a process that talk to the same address share one connection.
    """

    def reserve(self, **ask: Unpack[Ask]) -> Reservation:
        """A block that begins with a grant and ends with the outcome of the call.

        On entry it waits for its turn, at most ``max_wait``, and raises :class:`~paceline_client.Denied` if the call
        may not be made. The README says what each way out of the block means.
        """
        return Reservation(self, self._plan(ask))

    def reserve_many(self, count: int, *, allow_partial: bool = False, **ask: Unpack[Ask]) -> Reservations:
        """The same for several equal calls: all or none, or with ``allow_partial`` as many as fit."""
        return Reservations(self, self._plan(ask, count, allow_partial))

    def acquire(self, **ask: Unpack[Ask]) -> Grant:
        """A grant without a block. The caller commits or releases it."""
        asked = self._plan(ask)
        return _granted(asked, self._decide(asked))

    def call(
        self,
        send: Callable[[Turn], T],
        *,
        prompt: object = None,
        steps: Sequence[Step | Local] = (),
        accounts: Mapping[str, Any] | None = None,
        **ask: Unpack[Ask],
    ) -> Answer[T]:
        """Make a call in the first way that is granted: as asked for, or else by the first of the steps.

        ``send`` gets the turn, makes the call and returns the SDK's response, which is committed unless ``send`` has
        committed itself. It is called once at most: after an error of the call itself no other step is taken.
        ``max_wait`` holds for all steps together. A denial leads to the next step; so does an ``Unavailable``. When
        none is left, the last one is raised. ``prompt`` is handed to ``send``, and its size estimated unless given.
        ``accounts`` has the caller's own SDK client or key for each account; ``turn.client`` is that of the grant.
        """
        walk = Walk(self._plan(ask), prompt, steps, accounts)
        while (asked := walk.asked()) is not None:
            decision: Decision | Unavailable
            try:
                decision = self._decide(asked)
            except Unavailable as error:
                decision = error
            turn = walk.turn(decision)
            if turn is not None:
                with turn.grant as grant:
                    value = send(turn)
                    if not grant.ended:
                        grant.commit(value)
                return walk.answer(value, turn)
        return walk.answer(walk.local(), None)

    def observe(
        self,
        model: str,
        response: object = None,
        *,
        provider: str = "",
        account: str = "",
        region: str = "",
        upstream_workspace: str = "",
        service_tier: str = "",
        endpoint: str = "",
        tenant: str = "",
        workspace: str = "",
        route: str = "",
        error: BaseException | None = None,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        cache_read_tokens: int | None = None,
        cache_write_tokens: int | None = None,
        headers: HeaderSource | None = None,
        status: int | None = None,
    ) -> None:
        """Report a call that was made without a grant, so that it teaches and is booked. Does not wait."""
        desk = self._desk
        if desk is not None:
            self._observe(
                desk,
                desk.hub.submit,
                Target(model, provider, account, region, upstream_workspace, service_tier, endpoint),
                (tenant, workspace, route),
                response,
                error,
                Usage(input_tokens, cache_read_tokens, cache_write_tokens, output_tokens),
                headers,
                status,
            )

    def flush(self, timeout: float = CLOSE_BUDGET) -> bool:
        """Wait until every report of this process is acknowledged. Whether it is."""
        return True if self._desk is None else self._desk.hub.flush(timeout)

    def close(self, timeout: float = CLOSE_BUDGET) -> None:
        """Send what is left, and end. The end of the interpreter does the same."""
        if not self._closed:
            self._closed = True
            if self._desk is not None:
                from paceline_client._hub import leave

                leave(self._desk.hub, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decide(self, asked: Plan) -> Decision:
        desk = self._desk
        if desk is None:
            return _disabled(asked)
        submit = desk.hub.submit
        if desk.goes_ahead:
            return desk.ahead(asked, submit)
        while True:
            operation = desk.operation(asked)
            call = desk.hub.call()
            operation.waiter = call
            try:
                submit(operation)
                call.wait()
            except BaseException:
                desk.withdraw(asked, submit, operation)
                raise
            decision = desk.decide(asked, submit, operation)
            if decision is not None:
                return decision
            result: Decision | None = None
            flow = desk.without(asked, submit, operation.created)
            try:
                while True:
                    time.sleep(next(flow))
            except StopIteration as stop:
                result = stop.value
            finally:
                flow.close()
            if result is not None:
                return result
            asked = desk.rest(asked, operation)


class AsyncClient(_Base):
    """The same for asyncio: the same arguments, awaited. Event loops may share one."""

    def reserve(self, **ask: Unpack[Ask]) -> AsyncReservation:
        """A block (``async with``) that begins with a grant and ends with the outcome of the call.

        On entry it waits for its turn, at most ``max_wait``, and raises :class:`~paceline_client.Denied` if the call
        may not be made. The README says what each way out of the block means.
        """
        return AsyncReservation(self, self._plan(ask))

    def reserve_many(self, count: int, *, allow_partial: bool = False, **ask: Unpack[Ask]) -> AsyncReservations:
        """The same for several equal calls: all or none, or with ``allow_partial`` as many as fit."""
        return AsyncReservations(self, self._plan(ask, count, allow_partial))

    async def acquire(self, **ask: Unpack[Ask]) -> Grant:
        """A grant without a block. The caller commits or releases it."""
        asked = self._plan(ask)
        return _granted(asked, await self._decide(asked))

    async def call(
        self,
        send: Callable[[Turn], Awaitable[T]],
        *,
        prompt: object = None,
        steps: Sequence[Step | Local] = (),
        accounts: Mapping[str, Any] | None = None,
        **ask: Unpack[Ask],
    ) -> Answer[T]:
        """Make a call in the first way that is granted: as asked for, or else by the first of the steps.

        As :meth:`Client.call`; ``send`` is awaited, and so is a local answer that is awaitable.
        """
        walk = Walk(self._plan(ask), prompt, steps, accounts)
        while (asked := walk.asked()) is not None:
            decision: Decision | Unavailable
            try:
                decision = await self._decide(asked)
            except Unavailable as error:
                decision = error
            turn = walk.turn(decision)
            if turn is not None:
                with turn.grant as grant:
                    value = await send(turn)
                    if not grant.ended:
                        grant.commit(value)
                return walk.answer(value, turn)
        answer = walk.local()
        return walk.answer(await answer if inspect.isawaitable(answer) else answer, None)

    def observe(
        self,
        model: str,
        response: object = None,
        *,
        provider: str = "",
        account: str = "",
        region: str = "",
        upstream_workspace: str = "",
        service_tier: str = "",
        endpoint: str = "",
        tenant: str = "",
        workspace: str = "",
        route: str = "",
        error: BaseException | None = None,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        cache_read_tokens: int | None = None,
        cache_write_tokens: int | None = None,
        headers: HeaderSource | None = None,
        status: int | None = None,
    ) -> None:
        """Report a call that was made without a grant, so that it teaches and is booked. Does not wait."""
        desk = self._desk
        if desk is not None:
            self._observe(
                desk,
                desk.hub.port().submit,
                Target(model, provider, account, region, upstream_workspace, service_tier, endpoint),
                (tenant, workspace, route),
                response,
                error,
                Usage(input_tokens, cache_read_tokens, cache_write_tokens, output_tokens),
                headers,
                status,
            )

    async def flush(self, timeout: float = CLOSE_BUDGET) -> bool:
        """Wait until every report of this process is acknowledged. Whether it is."""
        return True if self._desk is None else await self._flush(timeout, hopeless=True)

    async def aclose(self, timeout: float = CLOSE_BUDGET) -> None:
        """Send what is left, and end. The end of the interpreter does the same."""
        if not self._closed:
            self._closed = True
            if self._desk is not None:
                from paceline_client._hub import leave

                await self._flush(timeout, hopeless=False)
                # Joins threads that have been told to end.
                await asyncio.to_thread(leave, self._desk.hub, 0.0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _flush(self, timeout: float, *, hopeless: bool) -> bool:
        if self._desk is None:
            return True
        hub = self._desk.hub
        hub.port().flush()
        deadline = time.monotonic() + timeout
        while not hub.flush(0.0, hopeless=hopeless):
            if time.monotonic() >= deadline or (not hopeless and hub.is_hopeless):
                return False
            await asyncio.sleep(FLUSH_POLL)
        return True

    async def _decide(self, asked: Plan) -> Decision:
        desk = self._desk
        if desk is None:
            return _disabled(asked)
        port = desk.hub.port()
        submit = port.submit
        if desk.goes_ahead:
            return desk.ahead(asked, submit)
        while True:
            operation = desk.operation(asked)
            call = port.waiter()
            operation.waiter = call
            try:
                submit(operation)
                await call.future
            except BaseException:
                desk.withdraw(asked, submit, operation)
                raise
            decision = desk.decide(asked, submit, operation)
            if decision is not None:
                return decision
            result: Decision | None = None
            flow = desk.without(asked, submit, operation.created)
            try:
                while True:  # noqa: ASYNC110 - for turns, which are computed, not signalled
                    await asyncio.sleep(next(flow))
            except StopIteration as stop:
                result = stop.value
            finally:
                flow.close()
            if result is not None:
                return result
            asked = desk.rest(asked, operation)


class Reservation:
    """What :meth:`Client.reserve` returns: use it with ``with``."""

    __slots__ = ("_client", "_grant", "_plan")

    def __init__(self, client: Client, asked: Plan) -> None:
        self._client = client
        self._plan = asked
        self._grant: Grant | None = None

    def __enter__(self) -> Grant:
        self._grant = _granted(self._plan, self._client._decide(self._plan))
        return self._grant

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        grant, self._grant = self._grant, None
        if grant is not None:
            grant._leave(error)


class Reservations:
    """What :meth:`Client.reserve_many` returns: use it with ``with``."""

    __slots__ = ("_client", "_grants", "_plan")

    def __init__(self, client: Client, asked: Plan) -> None:
        self._client = client
        self._plan = asked
        self._grants: GrantBatch | None = None

    def __enter__(self) -> GrantBatch:
        self._grants = _batch(self._plan, self._client._decide(self._plan))
        return self._grants

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        grants, self._grants = self._grants, None
        if grants is not None:
            grants._leave(error)


class AsyncReservation:
    """What :meth:`AsyncClient.reserve` returns: use it with ``async with``."""

    __slots__ = ("_client", "_grant", "_plan")

    def __init__(self, client: AsyncClient, asked: Plan) -> None:
        self._client = client
        self._plan = asked
        self._grant: Grant | None = None

    async def __aenter__(self) -> Grant:
        self._grant = _granted(self._plan, await self._client._decide(self._plan))
        return self._grant

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        grant, self._grant = self._grant, None
        if grant is not None:
            grant._leave(error)


class AsyncReservations:
    """What :meth:`AsyncClient.reserve_many` returns: use it with ``async with``."""

    __slots__ = ("_client", "_grants", "_plan")

    def __init__(self, client: AsyncClient, asked: Plan) -> None:
        self._client = client
        self._plan = asked
        self._grants: GrantBatch | None = None

    async def __aenter__(self) -> GrantBatch:
        self._grants = _batch(self._plan, await self._client._decide(self._plan))
        return self._grants

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        grants, self._grants = self._grants, None
        if grants is not None:
            grants._leave(error)
