"""The endpoints of the APIs: Messages, its token count, Chat Completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from paceline.upstream.account import Accepted, Account, Call, ModelGroup, Overloaded, Refused
from paceline.upstream.errors import anthropic_code, anthropic_error, anthropic_refusal, openai_error, openai_refusal
from paceline.upstream.headers import limit_headers, retry_headers
from paceline.upstream.http import wire
from paceline.upstream.http.pacing import Running
from paceline.upstream.prompt import BadRequest, Directive, Prompt, chat_prompt, directive_of, messages_prompt
from paceline.upstream.tokens import estimate

if TYPE_CHECKING:
    from paceline.upstream.http.server import Upstream

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
LABEL = 128
"""Characters of a label that are kept."""
OVERLOADED = "Overloaded"


class _Stop(Exception):
    """An answer that is not the model's."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


class _Stream(Protocol):
    def start(self) -> bytes: ...
    def piece(self, tokens: int) -> bytes: ...
    def end(self) -> bytes: ...


class _MessageStream:
    def __init__(self, call: Call, message_id: str, tool: str | None) -> None:
        self._call = call
        self._id = message_id
        self._tool = tool

    def start(self) -> bytes:
        return wire.message_start(self._call, self._id, self._tool)

    def piece(self, tokens: int) -> bytes:
        return wire.message_delta_text(tokens, self._tool is not None)

    def end(self) -> bytes:
        return wire.message_end(self._call, self._tool)


class Exchange:
    """One request and its response. Keeps to the account that was in force when it came, whatever is reset since."""

    def __init__(self, upstream: Upstream, request: web.BaseRequest, api: str) -> None:
        self._upstream = upstream
        self._account: Account = upstream.account
        self._cache = upstream.cache
        self._request = request
        self._api = api
        self._serial = upstream.serial()
        self._id = f"req_{self._serial:024d}"

    async def answer(self) -> web.StreamResponse:
        """Handle a call of the model."""
        try:
            prompt, group, directive = await self._read(messages_prompt if self._api == "anthropic" else chat_prompt)
        except _Stop as stop:
            self._upstream.invalid += 1
            return self._error(stop)
        call = self._call(prompt, group, directive)
        split = self._cache.look(self._upstream.now(), prompt)
        call.input, call.cache_read, call.cache_write = split.input, split.cache_read, split.cache_write
        includes = self._account.config.estimate_includes_cached
        size, images = (prompt.size, prompt.images) if includes else (split.size, split.images)
        assumed = estimate(size, images)
        call.estimate = assumed if self._api == "anthropic" else max(call.max_tokens or 0, assumed)

        outcome = self._account.arrive(self._upstream.now(), call)
        if isinstance(outcome, Overloaded):
            return self._overloaded()
        if isinstance(outcome, Refused):
            return self._refused(outcome, group, call)
        self._cache.keep(split)
        tool = (prompt.tool or "tool") if directive.tool and prompt.tool else None
        try:
            if prompt.stream:
                return await self._stream(call, group, outcome, tool, prompt.include_usage)
            return await self._whole(call, group, outcome, tool)
        except asyncio.CancelledError:
            self._account.ended(self._upstream.now(), call, "gone")
            raise
        except ConnectionError:
            self._account.ended(self._upstream.now(), call, "gone")
            return web.Response()  # To nobody.

    async def count(self) -> web.StreamResponse:
        """Handle ``count_tokens``: free, and limited by nothing here."""
        try:
            prompt, _, _ = await self._read(lambda body: messages_prompt(body, counting=True))
        except _Stop as stop:
            self._upstream.invalid += 1
            return self._error(stop)
        return self._respond(200, wire.encode({"input_tokens": prompt.tokens}), {})

    async def _read(self, parse: Callable[[object], Prompt]) -> tuple[Prompt, ModelGroup, Directive]:
        headers = self._request.headers
        if not headers.get("x-api-key") and not headers.get("authorization", "").removeprefix("Bearer").strip():
            missing = "x-api-key header is required" if self._api == "anthropic" else "You didn't provide an API key."
            raise _Stop(401, missing)
        try:
            body = await self._request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _Stop(413, "Request exceeds the maximum size") from None
        try:
            prompt = parse(msgspec.json.decode(body))
            directive = directive_of(headers.get("x-paceline-output") or prompt.directive)
        except (BadRequest, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _Stop(400, str(error), param=str(error).partition(":")[0]) from None
        group = self._account.group_of(prompt.model)
        if group is None or group.api != self._api:
            if self._api == "anthropic":
                raise _Stop(404, f"model: {prompt.model}")
            raise _Stop(404, f"The model `{prompt.model}` does not exist", "model_not_found", "model")
        return prompt, group, directive

    def _call(self, prompt: Prompt, group: ModelGroup, directive: Directive) -> Call:
        headers = self._request.headers
        config = self._account.config
        output = directive.output
        if output is None:
            output = max(1, int(self._account.chance.lognormvariate(config.output_mu, config.output_sigma)))
        if prompt.max_tokens is not None:
            output = min(output, prompt.max_tokens)
        return Call(
            id=headers.get("x-paceline-call", self._id)[:LABEL],
            model=prompt.model,
            estimate=0,
            input=0,
            output=output,
            max_tokens=prompt.max_tokens,
            tenant=headers.get("x-paceline-tenant", "")[:LABEL],
            stream=prompt.stream,
        )

    async def _whole(self, call: Call, group: ModelGroup, fate: Accepted, tool: str | None) -> web.StreamResponse:
        upstream, account, scenario = self._upstream, self._account, self._account.scenario
        if scenario.first_byte_ms:
            await asyncio.sleep(scenario.first_byte_ms / 1_000)
        account.started(upstream.now(), call)
        target = call.output if fate.drop_after is None else min(call.output, fate.drop_after)
        if scenario.tokens_per_second and target:
            loop = asyncio.get_running_loop()
            running = Running(account, call, loop.time(), scenario.tokens_per_second, target)
            upstream.pacer.add(running)
            try:
                await asyncio.sleep(target / scenario.tokens_per_second)
            except asyncio.CancelledError:
                running.settle(loop.time(), upstream.now())
                raise
            finally:
                upstream.pacer.remove(running)
        now = upstream.now()
        account.produced(now, call, target - call.produced)
        if fate.drop_after is not None:
            return self._drop(call)
        account.ended(now, call, "finished")
        if self._api == "anthropic":
            body = wire.message(call, f"{self._serial:024d}", tool)
        else:
            body = wire.completion(call, f"{self._serial:024d}", upstream.wall_seconds(), tool)
        return self._respond(200, body, limit_headers(account, group, now, upstream.epoch))

    async def _stream(
        self, call: Call, group: ModelGroup, fate: Accepted, tool: str | None, include_usage: bool
    ) -> web.StreamResponse:
        upstream, account, scenario = self._upstream, self._account, self._account.scenario
        if scenario.first_byte_ms:
            await asyncio.sleep(scenario.first_byte_ms / 1_000)
        now = upstream.now()
        account.started(now, call)
        headers = self._headers(limit_headers(account, group, now, upstream.epoch), EVENTS)
        headers["cache-control"] = "no-cache"
        response = web.StreamResponse(status=200, headers=headers)
        await response.prepare(self._request)
        message_id = f"{self._serial:024d}"
        stream: _Stream
        if self._api == "anthropic":
            stream = _MessageStream(call, message_id, tool)
        else:
            stream = wire.ChatStream(call, message_id, upstream.wall_seconds(), tool, include_usage)
        await response.write(stream.start())

        stops = [after for after in (fate.error_after, fate.drop_after) if after is not None]
        target = min([call.output, *stops])
        loop = asyncio.get_running_loop()
        running = Running(account, call, loop.time(), scenario.tokens_per_second, target)
        while call.produced < target:
            if running.speed:
                # Until the next piece is due; a slow answer has pieces of one token.
                due_at = running.began + (call.produced + 1) / running.speed
                await asyncio.sleep(max(scenario.chunk_ms / 1_000, due_at - loop.time()))
            before = call.produced
            running.settle(loop.time(), upstream.now())
            if call.produced > before:
                await response.write(stream.piece(call.produced - before))
        if fate.drop_after is not None and call.produced >= min(fate.drop_after, call.output):
            return self._drop(call)
        if fate.error_after is not None:
            account.ended(upstream.now(), call, "error")
            await response.write(self._stream_error())
        else:
            account.ended(upstream.now(), call, "finished")
            await response.write(stream.end())
        await response.write_eof()
        return response

    def _stream_error(self) -> bytes:
        if self._api == "anthropic":
            return wire.event("error", anthropic_error(529, OVERLOADED, self._id))
        return wire.data(openai_error(503, "The server is overloaded.", code="server_is_overloaded"))

    def _drop(self, call: Call) -> web.StreamResponse:
        self._account.ended(self._upstream.now(), call, "dropped")
        if self._request.transport is not None:
            self._request.transport.abort()
        return web.Response()  # To nobody.

    def _refused(self, refused: Refused, group: ModelGroup, call: Call) -> web.StreamResponse:
        account = self._account
        headers = limit_headers(account, group, self._upstream.now(), self._upstream.epoch)
        headers |= retry_headers(refused, self._api)
        organization = account.config.organization
        if self._api == "anthropic":
            message = anthropic_refusal(refused, organization, call.model)
            return self._error(_Stop(429, message, anthropic_code(refused)), headers)
        message = openai_refusal(refused, organization, call.model)
        return self._error(_Stop(429, message, "rate_limit_exceeded"), headers)

    def _overloaded(self) -> web.StreamResponse:
        if self._api == "anthropic":
            return self._error(_Stop(529, OVERLOADED), {"x-should-retry": "true"})
        return self._error(_Stop(503, "The server is overloaded.", "server_is_overloaded"), {})

    def _error(self, stop: _Stop, headers: dict[str, str] | None = None) -> web.StreamResponse:
        if self._api == "anthropic":
            body = anthropic_error(stop.status, stop.message, self._id, stop.code or "")
        else:
            body = openai_error(stop.status, stop.message, stop.param, stop.code)
        return self._respond(stop.status, wire.encode(body), headers or {})

    def _respond(self, status: int, body: bytes, headers: dict[str, str]) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=self._headers(headers, JSON))

    def _headers(self, headers: dict[str, str], content_type: str) -> CIMultiDict[str]:
        found = CIMultiDict(headers)
        found["content-type"] = content_type
        found["date"] = self._upstream.http_date()
        if self._api == "anthropic":
            found["request-id"] = self._id
            found["anthropic-organization-id"] = self._account.config.organization
        else:
            found["x-request-id"] = self._id
            found["openai-organization"] = self._account.config.organization
        return found
