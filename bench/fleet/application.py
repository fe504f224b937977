"""The application in a caller process: one call of the official SDK, and what became of it.

Nothing here knows of limits. The modes differ in the client that is handed in, and in nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anthropic
import httpx2
from anthropic.types import MessageParam, MetadataParam

from bench.fleet.plan import CALL_HEADER, TENANT_HEADER, Plan, Record, retries
from bench.workloads import Size
from paceline.upstream.tokens import PER_MESSAGE, text_of


@dataclass(slots=True)
class _Sending:
    """What the transport has seen of one call."""

    sent: float | None = None
    attempts: int = 0


class Application:
    """Calls in the name of one tenant. Not thread-safe; bound to one event loop."""

    def __init__(self, plan: Plan, client: anthropic.AsyncAnthropic, sending: dict[str, _Sending]) -> None:
        self._plan = plan
        self._client = client
        self._sending = sending

    async def call(self, size: Size, start: float) -> Record:
        """One call, from building its prompt to the complete answer or the deadline. Never raises but when cancelled.

        ``start`` (0 to 1) says where in the filler the prompt begins. When it is cancelled the record says ``cut``,
        and the cancellation ends here: this is only done when the run is over.
        """
        name = str(uuid.uuid4())
        seen = self._sending[name] = _Sending()
        messages: list[MessageParam] = [{"role": "user", "content": _prompt(size.input, start)}]
        begun = time.monotonic()
        fate = "answered"
        try:
            async with asyncio.timeout(self._plan.deadline_s):
                await self._ask(name, messages, size.output)
        except TimeoutError:
            fate = "deadline"
        except asyncio.CancelledError:
            fate = "cut"
        except (anthropic.AnthropicError, httpx2.HTTPError) as error:
            fate = type(error).__name__
        except Exception as error:
            # An application would fail here too; the run must show it, not die of it.
            fate = f"{type(error).__module__}.{type(error).__name__}"
        finally:
            del self._sending[name]
        return Record(
            call=name,
            tenant=self._plan.tenant,
            begun=begun,
            sent=seen.sent,
            ended=time.monotonic(),
            attempts=seen.attempts,
            fate=fate,
            input_tokens=size.input,
            output_tokens=size.output,
        )

    async def _ask(self, name: str, messages: list[MessageParam], output: int) -> None:
        headers = {CALL_HEADER: name, TENANT_HEADER: self._plan.tenant}
        create = self._client.messages.create
        # Tells the simulator how long the answer is: only a real model decides that for itself.
        metadata: MetadataParam = {"user_id": f"paceline-sim:output={output}"}
        if not self._plan.stream:
            answer = await create(
                model=self._plan.model,
                max_tokens=self._plan.max_tokens,
                messages=messages,
                metadata=metadata,
                extra_headers=headers,
            )
            complete = answer.stop_reason is not None
        else:
            complete = False
            async with await create(
                model=self._plan.model,
                max_tokens=self._plan.max_tokens,
                messages=messages,
                metadata=metadata,
                extra_headers=headers,
                stream=True,
            ) as stream:
                async for event in stream:
                    complete = complete or event.type == "message_stop"
        if not complete:
            raise IncompleteAnswer


class IncompleteAnswer(anthropic.AnthropicError):
    """The answer ended without saying so."""


@contextlib.asynccontextmanager
async def application(plan: Plan) -> AsyncIterator[Application]:
    """The application of a plan, in the plan's mode; its client is closed at the end."""
    async with _client(plan, plan.coordinator if plan.mode == "paceline" else None) as (client, sending):
        yield Application(plan, client, sending)


async def own_time(plan: Plan, calls: int) -> list[float]:
    """Seconds from the call to the first byte sent, for ``calls`` calls one by one, without coordinator or load."""
    taken = []
    async with _client(plan, None) as (client, sending):
        bare = Application(plan, client, sending)
        for _ in range(calls + 1):
            record = await bare.call(Size(100, 0, 1), 0.0)
            if record.sent is None or not record.answered:
                raise RuntimeError(f"a call without load failed: {record.fate}")
            taken.append(record.sent - record.begun)
    # The first one opens the connection and fills the SDK's caches.
    return taken[1:]


@contextlib.asynccontextmanager
async def _client(
    plan: Plan, coordinator: str | None
) -> AsyncIterator[tuple[anthropic.AsyncAnthropic, dict[str, _Sending]]]:
    sending: dict[str, _Sending] = {}

    async def before_sending(request: httpx2.Request) -> None:
        # The transport calls this for each attempt, after everything that the SDK, or a middleware in it, waits for.
        seen = sending.get(request.headers.get(CALL_HEADER, ""))
        if seen is not None:
            seen.sent = time.monotonic()
            seen.attempts += 1

    async with contextlib.AsyncExitStack() as stack:
        middleware: list[anthropic.Middleware] = []
        if coordinator is not None:
            # Only here, so that the other modes load nothing of it.
            from paceline_client import AsyncClient
            from paceline_client.hooks.anthropic import PacelineMiddleware

            paceline = await stack.enter_async_context(AsyncClient(coordinator))
            middleware.append(
                PacelineMiddleware(paceline, tenant=plan.tenant, priority=plan.priority, max_wait=plan.deadline_s)
            )
        client = anthropic.AsyncAnthropic(
            api_key="not-a-key",
            base_url=plan.upstream,
            max_retries=retries(plan.mode),
            http_client=anthropic.DefaultAsyncHttpxClient(event_hooks={"request": [before_sending]}),
            middleware=middleware,
        )
        yield await stack.enter_async_context(client), sending


def _prompt(tokens: int, start: float) -> str:
    return text_of(max(1, tokens - PER_MESSAGE), _At(start))


class _At:
    """A fixed place in the filler."""

    def __init__(self, place: float) -> None:
        self._place = place

    def random(self) -> float:
        return self._place

    def lognormvariate(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        raise NotImplementedError
