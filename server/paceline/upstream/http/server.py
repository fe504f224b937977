"""The simulator as an HTTP server.

In tests, on their own loop::

    async with Upstream.start(Config(...)) as up:
        client = anthropic.AsyncAnthropic(base_url=up.url, api_key="any")

Beside the APIs it answers, without a key:

=====================  ==========================================================================
``GET /sim/truth``     totals, levels, the scenario
``GET /sim/calls``     the log after ``?since=N``, at most ``&limit=M`` entries
``POST /sim/scenario`` change fields of :class:`~paceline.upstream.settings.Scenario`
``POST /sim/reset``    start anew: ``{"config": {…}, "scenario": {…}}``, both optional
``POST /sim/mark``     ``{"name": …}``: remember the levels of now
``GET /sim/used``      ``?from=NAME&to=NAME``: how much of each limit was used between two marks
=====================  ==========================================================================

Keys are only looked at for being there; none is kept or logged. It is meant for loopback: whoever can reach it can
change it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from paceline.upstream.account import Account
from paceline.upstream.errors import anthropic_error
from paceline.upstream.http import wire
from paceline.upstream.http.calls import JSON, Exchange
from paceline.upstream.http.pacing import Pacer
from paceline.upstream.prompt import PrefixCache
from paceline.upstream.settings import Config, Scenario, SettingsError, check, config_of, scenario_of
from paceline.upstream.truth import Mark, limit_used, mark, page, report

MAX_BODY = 32 * 2**20
"""Bytes of a request, as the real API has it."""
MAX_MARKS = 10_000
MAX_PAGE = 10_000
PAGE = 1_000
GRACE_SECONDS = 1.0
"""How long a stopping server waits for running calls."""

Handler = Callable[[web.BaseRequest], Any]


class Upstream:
    """A running simulator. ``clock`` gives nanoseconds that do not run backwards."""

    def __init__(
        self,
        config: Config | None = None,
        scenario: Scenario | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        epoch_ns: int | None = None,
    ) -> None:
        self._clock = clock
        self.epoch = ((time.time_ns() - clock()) if epoch_ns is None else epoch_ns) // 1_000
        """Wall time, µs, at zero of the clock."""
        self.config = config or Config()
        self.account: Account
        self.cache: PrefixCache
        self.marks: dict[str, Mark]
        self.invalid: int
        """Requests with no call in them: 400, 401, 404, 413."""
        self._serial = 0
        self._date = (0, "")
        self._runner: web.ServerRunner | None = None
        self._port = 0
        self._host = ""
        self.pacer = Pacer(self.now)
        self.reset(self.config, scenario)
        self._routes: dict[tuple[str, str], Handler] = {
            ("POST", "/v1/messages"): lambda request: Exchange(self, request, "anthropic").answer(),
            ("POST", "/v1/messages/count_tokens"): lambda request: Exchange(self, request, "anthropic").count(),
            ("POST", "/v1/chat/completions"): lambda request: Exchange(self, request, "openai").answer(),
            ("POST", "/chat/completions"): lambda request: Exchange(self, request, "openai").answer(),
            ("GET", "/sim/truth"): self._truth,
            ("GET", "/sim/calls"): self._calls,
            ("GET", "/sim/used"): self._used,
            ("POST", "/sim/scenario"): self._scenario,
            ("POST", "/sim/reset"): self._reset,
            ("POST", "/sim/mark"): self._mark,
        }

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        config: Config | None = None,
        scenario: Scenario | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
        epoch_ns: int | None = None,
    ) -> AsyncIterator[Upstream]:
        """A simulator on this loop, stopped at the end of the block. Raises ``OSError`` if it cannot listen."""
        found = cls(config, scenario, clock, epoch_ns)
        await found.listen(host, port)
        try:
            yield found
        finally:
            await found.close()

    @property
    def url(self) -> str:
        """Where it listens. OpenAI's clients want ``url + "/v1"``."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    @property
    def scenario(self) -> Scenario:
        """What goes wrong now; change it with :meth:`change`."""
        return self.account.scenario

    @property
    def truth(self) -> dict[str, Any]:
        """The same as ``GET /sim/truth``."""
        return {**report(self.account, self.now()), "invalid": self.invalid, "epoch_us": self.epoch}

    def now(self) -> int:
        """Microseconds of the clock."""
        return self._clock() // 1_000

    def wall_seconds(self) -> int:
        """The wall clock as the simulator has it."""
        return (self.epoch + self.now()) // 1_000_000

    def http_date(self) -> str:
        """The ``date`` header."""
        second = self.wall_seconds()
        if self._date[0] != second:
            self._date = second, formatdate(second, usegmt=True)
        return self._date[1]

    def serial(self) -> int:
        """Numbers of responses, from 1."""
        self._serial += 1
        return self._serial

    def change(self, **fields: Any) -> None:
        """Change the scenario. Raises :class:`SettingsError`."""
        self.account.change(self.now(), **fields)

    def mark(self, name: str) -> Mark:
        """Remember the levels of now under a name; the same name again replaces it."""
        if name not in self.marks and len(self.marks) >= MAX_MARKS:
            raise SettingsError(f"name: there are {MAX_MARKS} marks already")
        self.marks[name] = found = mark(self.account, self.now())
        return found

    def reset(self, config: Config, scenario: Scenario | None = None) -> None:
        """Fresh buckets, log and cache. Calls that run go on with the old ones."""
        check(config)
        account = Account(self.now(), config, random.Random(config.seed), scenario)
        self.config = config
        self.account = account
        self.cache = PrefixCache(config.cache_seconds, config.cache_minimum, config.cache_entries)
        self.marks = {}
        self.invalid = 0

    async def listen(self, host: str, port: int) -> None:
        """Accept connections."""
        server = web.Server(
            self._handle,
            request_factory=_request,
            # A client that goes cancels its handler: that is how a call without a stream learns of it.
            handler_cancellation=True,
            access_log=None,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=GRACE_SECONDS)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, backlog=4_096).start()
        address = self._runner.addresses[0]
        self._host, self._port = str(address[0]), int(address[1])

    async def close(self) -> None:
        """Stop; calls that run have :data:`GRACE_SECONDS`."""
        if self._runner is not None:
            await self._runner.cleanup()
        self.pacer.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        handler = self._routes.get((request.method, path))
        if handler is None:
            known = any(path == one for _, one in self._routes)
            body = anthropic_error(405 if known else 404, "Method Not Allowed" if known else "Not Found", "")
            return _json(405 if known else 404, body)
        try:
            return cast(web.StreamResponse, await handler(request))
        except SettingsError as error:
            return _json(400, {"error": str(error)})

    async def _truth(self, request: web.BaseRequest) -> web.StreamResponse:
        return _json(200, self.truth)

    async def _calls(self, request: web.BaseRequest) -> web.StreamResponse:
        since = _number(request, "since", 0, 2**62)
        limit = _number(request, "limit", PAGE, MAX_PAGE)
        return _json(200, page(self.account, since, limit))

    async def _used(self, request: web.BaseRequest) -> web.StreamResponse:
        ends = []
        for field in ("from", "to"):
            name = request.query.get(field, "")
            if name not in self.marks:
                raise SettingsError(f"{field}: there is no mark {name[:64]!r}")
            ends.append(self.marks[name])
        try:
            found = limit_used(self.account, *ends)
        except LookupError as error:
            raise SettingsError(f"from: {error}") from None
        return _json(
            200,
            {
                group: {
                    name: {**msgspec.structs.asdict(one), "part": one.part, "net": one.net}
                    for name, one in dimensions.items()
                }
                for group, dimensions in found.items()
            },
        )

    async def _scenario(self, request: web.BaseRequest) -> web.StreamResponse:
        self.account.apply(self.now(), await _fields(request))
        return _json(200, self.account.scenario)

    async def _reset(self, request: web.BaseRequest) -> web.StreamResponse:
        fields = await _fields(request)
        for name, value in fields.items():
            if name not in {"config", "scenario"}:
                raise SettingsError(f"{name}: there is no such field")
            if not isinstance(value, dict):
                raise SettingsError(f"{name}: an object is wanted")
        config = config_of(fields["config"]) if "config" in fields else self.config
        self.reset(config, scenario_of(fields.get("scenario", {})))
        return _json(200, self.truth)

    async def _mark(self, request: web.BaseRequest) -> web.StreamResponse:
        fields = await _fields(request)
        name = fields.get("name")
        if not isinstance(name, str) or not 1 <= len(name) <= 256:
            raise SettingsError("name: a text of 1 to 256 characters is wanted")
        if unknown := sorted(set(fields) - {"name"}):
            raise SettingsError(f"{unknown[0]}: there is no such field")
        self.mark(name)
        return _json(200, {"name": name, **self.truth})


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    return web.BaseRequest(
        message, payload, protocol, writer, task, asyncio.get_running_loop(), client_max_size=MAX_BODY
    )


async def _fields(request: web.BaseRequest) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(await request.read() or b"{}")
    except msgspec.DecodeError as error:
        raise SettingsError(f"the body: {error}") from None
    if not isinstance(found, dict):
        raise SettingsError("the body: an object is wanted")
    return found


def _number(request: web.BaseRequest, name: str, default: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise SettingsError(f"{name}: a whole number is wanted")
    return min(int(text), most)


def _json(status: int, body: Any) -> web.StreamResponse:
    return web.Response(status=status, body=wire.encode(body), content_type=JSON)
