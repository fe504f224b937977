"""Connections to the store: one server, what the sentinels name, or a cluster. Every call ends within its budget.

Nothing is sent again behind the caller's back, but for what the store has certainly not carried out: a script that it
did not know, a command that another node is to have (``MOVED``), and a write that a former primary refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection as TcpConnection
from redis.asyncio.connection import ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    ConnectionError,
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from paceline.ledger.journal import StoreError, StoreFull, StoreUnavailable
from paceline.ledger.redis.scripts import Script
from paceline.ledger.redis.sentinel import Sentinels
from paceline.ledger.redis.settings import Kind, Settings

LANES = 48
"""Small commands at a time; more wait, within their budget."""
BULK_LANES = 4
"""Commands at a time that carry much: parts of snapshots, pages of records. They never hold up the small ones."""
_CLOSE_S = 2.0

_FULL = {
    "OOM": "it is out of memory: raise maxmemory, or make room",
    "READONLY": "it is a read-only replica: name the primary, or use redis+sentinel:// or redis+cluster://",
    "NOREPLICAS": "fewer replicas follow than min-replicas-to-write asks for: bring them back, or lower it",
    "MISCONF": "it cannot write to its disk and therefore refuses: see its log, make room on the disk",
}
_AWAY = {
    "LOADING": "it is reading its data after a start: wait",
    "BUSY": "a script of somebody else blocks it",
    "MASTERDOWN": "it is a replica without a primary",
    "CLUSTERDOWN": "the cluster is not whole: see CLUSTER NODES",
    "TRYAGAIN": "the cluster is moving keys",
}


class Primary:
    """A server that takes writes, by what its INFO said when it was last read; empty: it is away."""

    __slots__ = ("address", "info")

    def __init__(self, address: str, info: dict[str, Any]) -> None:
        self.address = address
        self.info = info

    @property
    def identity(self) -> str:
        """Another one after a restart, a failover, or after an hour without the replicas that there were."""
        return f"{str(self.info.get('run_id', ''))[:20]}/{str(self.info.get('master_replid', ''))[:20]}"


class Client:
    """Scripts and commands for the primary that holds a key.

    Every failure is a :class:`StoreError` of one line, without secrets; ``failures`` counts those after which another
    primary may be in charge.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lanes = asyncio.Semaphore(LANES)
        self._bulk = asyncio.Semaphore(BULK_LANES)
        self._single: Any = None  # redis.asyncio.Redis, whose execute_command has no types
        self._cluster: RedisCluster | None = None
        self._sentinels: list[Redis] = []
        self.failures = 0

    @property
    def name(self) -> str:
        return self._settings.name

    def open(self) -> None:
        """Make ready; connects with the first command. Raises :class:`StoreError` for files that cannot be read."""
        settings = self._settings
        user, password = settings.login.read()
        options: dict[str, Any] = {
            "username": user,
            "password": password,
            "socket_connect_timeout": settings.connect_s,
            # Below the budget of a command: what redis-py learns from a server's silence is lost if it is cut off.
            "socket_timeout": settings.command_s * 0.8,
            "socket_keepalive": True,
            "protocol": 2,
            "driver_info": None,
        }
        secure = self._tls()
        if settings.kind is Kind.CLUSTER:
            self._cluster = RedisCluster(
                startup_nodes=[ClusterNode(host, port) for host, port in settings.hosts],
                require_full_coverage=False,
                max_connections=LANES + BULK_LANES + 4,
                retry=Retry(NoBackoff(), 0),
                ssl=settings.tls is not None,
                **secure,
                **options,
            )
            return
        options |= {"db": settings.db, "retry": Retry(NoBackoff(), 0), "max_connections": LANES + BULK_LANES + 4}
        if settings.kind is Kind.SENTINEL:
            user, password = settings.sentinel_login.read()
            share = settings.command_s * 0.4
            sentinel: Any = cast(Any, Sentinels)(
                settings.hosts,
                sentinel_kwargs={
                    "username": user,
                    "password": password,
                    # One that is away must leave time for the command itself.
                    "socket_connect_timeout": min(settings.connect_s, share),
                    "socket_timeout": share,
                    "protocol": 2,
                    "driver_info": None,
                    "retry": Retry(NoBackoff(), 0),
                    "ssl": settings.tls is not None,
                    **secure,
                },
                ssl=settings.tls is not None,
                **secure,
                **options,
            )
            self._sentinels = list(sentinel.sentinels)
            self._single = cast(Redis, sentinel.master_for(settings.service))
            return
        kind: type[Any] = TcpConnection
        if settings.path:
            kind = UnixDomainSocketConnection
            del options["socket_keepalive"]
            options["path"] = settings.path
        else:
            (options["host"], options["port"]), *_ = settings.hosts
            if settings.tls is not None:
                kind = SSLConnection
                options |= secure
        self._single = Redis.from_pool(ConnectionPool(connection_class=kind, **options))

    def _tls(self) -> dict[str, Any]:
        """The options of TLS, whose files are tried here: later, their errors would look like a server's."""
        tls = self._settings.tls
        if tls is None:
            return {}
        try:
            context = ssl.create_default_context(cafile=tls.ca or None)
            if tls.cert:
                context.load_cert_chain(tls.cert, tls.key)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or "not a file of this kind"
            named = ", ".join(path for path in (tls.ca, tls.cert, tls.key) if path)
            raise StoreError(f"{self.name}: cannot use the files for TLS ({named}): {reason}") from None
        return {
            "ssl_ca_certs": tls.ca or None,
            "ssl_certfile": tls.cert or None,
            "ssl_keyfile": tls.key or None,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
        }

    async def close(self) -> None:
        """Let the connections go. Never raises; takes seconds at most."""
        clients: list[Any] = [*self._sentinels, self._single, self._cluster]
        closing = [client.aclose for client in clients if client is not None]
        if self._cluster is not None:
            # After a failure the cluster's client takes itself for closed, and leaves its connections open.
            manager = self._cluster.nodes_manager
            closing += [manager.aclose, partial(manager.aclose, "startup_nodes")]
        self._single = self._cluster = None
        self._sentinels = []
        for close in closing:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CLOSE_S):
                    await close()

    async def run(self, script: Script, keys: Sequence[str], *args: bytes | str | int, bulk: bool = False) -> Any:
        """Run a script; its answer, strings as bytes."""
        return await self._bounded(script.name, self._script(script, keys, args), self._bulk if bulk else self._lanes)

    async def call(self, *command: bytes | str | int, bulk: bool = False) -> Any:
        """Run a command of one key; its answer as it is on the wire, strings as bytes."""
        return await self._bounded(str(command[0]), self._send(*command), self._bulk if bulk else self._lanes)

    async def primaries(self) -> list[Primary]:
        """Those that there are, as they are now: one, or the cluster's, some of which may be away and tell nothing."""
        return cast(list[Primary], await self._bounded("INFO", self._primaries(), self._lanes))

    async def config(self, primary: Primary, name: str) -> str | None:
        """A setting of a primary; ``None``: it does not tell."""
        try:
            answer = await self._bounded("CONFIG", self._config(primary, name), self._lanes)
        except StoreUnavailable:
            raise
        except StoreError:
            return None
        pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=False)
        return next((_text(value) for _, value in pairs), None)

    def identity_for(self, primaries: Sequence[Primary], key: str) -> str:
        """The identity of the primary that holds ``key``, as far as known; else empty."""
        if self._cluster is None:
            return primaries[0].identity if primaries else ""
        try:
            node = self._cluster.get_node_from_key(key)
        except (RedisError, RedisClusterException):
            return ""
        address = "" if node is None else str(node.name)
        return next((primary.identity for primary in primaries if primary.address == address), "")

    # --- one call -----------------------------------------------------------------------------------------------

    async def _bounded(self, what: str, work: Any, lane: asyncio.Semaphore) -> Any:
        task = asyncio.current_task()
        cancelled = 0 if task is None else task.cancelling()
        try:
            async with asyncio.timeout(self._settings.command_s), lane:
                answer = await work
            if task is not None and task.cancelling() > cancelled:
                # wait_for of Python 3.11, which redis-py uses, loses a cancellation that comes with the result.
                raise asyncio.CancelledError
            return answer
        except (RedisError, RedisClusterException, TimeoutError, OSError) as error:
            raise await self._failed(what, error) from None
        finally:
            work.close()

    async def _script(self, script: Script, keys: Sequence[str], args: Sequence[bytes | str | int]) -> Any:
        try:
            return await self._send("EVALSHA", script.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await self._send("EVAL", script.text, len(keys), *keys, *args)

    async def _send(self, *command: bytes | str | int) -> Any:
        try:
            return await self._send_once(*command)
        except RedisError as error:
            # A former primary. With redis-py's sentinel connections this is a ConnectionError of this text.
            if not self._rediscovers(error):
                raise
        await self._let_go()
        return await self._send_once(*command)

    async def _send_once(self, *command: bytes | str | int) -> Any:
        if self._single is not None:
            return await self._single.execute_command(*command)
        if self._cluster is not None:
            return await self._cluster.execute_command(*command)
        raise ConnectionError("the store is closed")

    def _rediscovers(self, error: RedisError) -> bool:
        if self._settings.kind is Kind.SINGLE:
            return False
        return "READONLY" in str(error) or "previous master is now a slave" in str(error) or _code(error) == "READONLY"

    async def _let_go(self) -> None:
        """Forget who the primary was. Commands in flight elsewhere go on."""
        if self._cluster is not None:
            await self._cluster.aclose()
        elif self._single is not None:
            await self._single.connection_pool.disconnect(inuse_connections=False)

    async def _primaries(self) -> list[Primary]:
        if self._single is not None:
            if self._settings.kind is Kind.SENTINEL:
                # While a former primary lives, its connections work, and what they write is lost. Sentinels that are
                # away do not matter as long as there is a connection.
                with contextlib.suppress(RedisError, OSError):
                    await self._single.connection_pool.get_master_address()
            return [Primary(self.name, await self._single.execute_command("INFO"))]
        if self._cluster is None:
            raise ConnectionError("the store is closed")
        await self._cluster.initialize()
        nodes = self._cluster.get_primaries()
        if not nodes:
            raise ClusterDownError("no primary is known")
        answers = await asyncio.gather(
            *(self._cluster.execute_command("INFO", target_nodes=node) for node in nodes), return_exceptions=True
        )
        if all(isinstance(answer, BaseException) for answer in answers):
            raise cast(BaseException, answers[0])
        primaries = []
        for node, answer in zip(nodes, answers, strict=True):
            info = answer.get(node.name, answer) if isinstance(answer, dict) else {}
            primaries.append(Primary(str(node.name), cast(dict[str, Any], info)))
        return primaries

    async def _config(self, primary: Primary, name: str) -> Any:
        if self._single is not None:
            return await self._single.execute_command("CONFIG GET", name)
        if self._cluster is None:
            raise ConnectionError("the store is closed")
        node = self._cluster.get_node(node_name=primary.address)
        if node is None:
            raise ConnectionError("the node has gone")
        answer = await self._cluster.execute_command("CONFIG GET", name, target_nodes=node)
        return answer.get(primary.address, answer)

    # --- failures -----------------------------------------------------------------------------------------------

    async def _failed(self, what: str, error: Exception) -> StoreError:
        """The error to raise; and after it a new look at who the primary is."""
        told = self._translate(what, error)
        if isinstance(told, StoreUnavailable | StoreFull):
            self.failures += 1
        if isinstance(told, StoreUnavailable) and self._settings.kind is Kind.SENTINEL:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CLOSE_S):
                    await self._let_go()
        return told

    def _translate(self, what: str, error: Exception) -> StoreError:
        name = self.name
        if isinstance(error, RedisClusterException) and (inner := _refusal(error)) is not None:
            return self._translate("CLUSTER SLOTS", inner)
        if isinstance(error, AuthenticationError):
            return StoreError(f"{name} refuses the user or password: check the URL, its password_file or password_env")
        if isinstance(error, NoPermissionError) or _code(error) == "NOPERM":
            return StoreError(
                f"{name} does not let this user run {what} ({_line(error)}): give it the rights of docs/redis.md"
            )
        code = _code(error)
        if code in _FULL:
            return StoreFull(f"{name} refuses to write: {_FULL[code]}")
        if code in _AWAY or isinstance(error, ClusterDownError):
            return StoreUnavailable(f"{name} is not ready: {_AWAY.get(code, _AWAY['CLUSTERDOWN'])}")
        if isinstance(error, MasterNotFoundError):
            return StoreUnavailable(
                f"{name}: no sentinel names a primary for {self._settings.service!r}: check the name, and that they run"
            )
        if isinstance(error, ResponseError):
            return StoreError(f"{name} failed to run {what}: {_line(error)}")
        if isinstance(error, ConnectionError | RedisClusterException | OSError) and (told := _tls_trouble(str(error))):
            return StoreError(f"{name}: {told}")
        if isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError":
            return StoreUnavailable(
                f"{name} has not answered {what} within {self._settings.command_s:g} s: it may have been carried out"
            )
        if isinstance(error, ConnectionError | RedisClusterException | OSError):
            return StoreUnavailable(f"{name} cannot be reached: {_line(error)}")
        return StoreUnavailable(f"{name} failed at {what}: {_line(error)}")


def _code(error: Exception) -> str:
    """The store's word for an error. Before Redis 7 a script's error wraps it; redis-py's own types drop it."""
    named = {
        "ReadOnlyError": "READONLY",
        "OutOfMemoryError": "OOM",
        "BusyLoadingError": "LOADING",
        "ClusterDownError": "CLUSTERDOWN",
        "MasterDownError": "MASTERDOWN",
        "TryAgainError": "TRYAGAIN",
    }.get(type(error).__name__)
    if named is not None:
        return named
    text = str(error)
    if not isinstance(error, ResponseError):
        return ""
    first = text.split(" ", 1)[0].lstrip("-")
    if first in _FULL or first in _AWAY or first == "NOPERM":
        return first
    if "Error running script" in text:
        return next((code for code in (*_FULL, *_AWAY, "NOPERM") if f"-{code} " in text or f": {code} " in text), "")
    return ""


def _refusal(error: BaseException | None) -> Exception | None:
    """What a node said, if that is why redis-py could not find its way in a cluster."""
    while error is not None:
        if isinstance(error, AuthenticationError | ResponseError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _tls_trouble(text: str) -> str:
    """What to do about a handshake that failed over a certificate; empty if it was something else."""
    text = text.lower()
    if "certificate verify failed" in text or "certificate_verify_failed" in text:
        return "its certificate is not trusted: check the option ca, and the host's name in it"
    if "certificate" in text and "alert" in text:
        return "it does not accept this side's certificate: check the options cert and key"
    return ""


def _line(error: Exception) -> str:
    """An error's text on one line, bounded."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
