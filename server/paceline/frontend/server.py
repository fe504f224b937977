"""A server: store, ledgers, services and health, from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

import paceline
from paceline.config import (
    Config,
    ConfigError,
    catalogue,
    definitions,
    node_name,
    token_hashes,
    webhook_target,
)
from paceline.config import Shares as TenantShares
from paceline.engine.engine import Caps as EngineCaps
from paceline.frontend import admin as administration
from paceline.frontend.admin_fleet import Fleet
from paceline.frontend.alerts import Alerts, Webhook
from paceline.frontend.audit_export import AuditExport
from paceline.frontend.auth import Authenticator, Identity
from paceline.frontend.context import META_KEY, Signer, new_key
from paceline.frontend.coordinator import SERVICE, Coordinator
from paceline.frontend.desk import Desk
from paceline.frontend.fallback import Fallback
from paceline.frontend.figures import figures, traffic
from paceline.frontend.fleet import FleetSlot
from paceline.frontend.ladders import ladders_of
from paceline.frontend.limits import (
    FALLBACK_EXPIRY_US,
    FALLBACK_GRACE_US,
    FALLBACK_REFRESH_US,
    MAX_COUNT,
    MAX_STREAMS,
    Caps,
)
from paceline.frontend.membership import SHARE, Alone, Guest, Host, Member, Membership, Tools, Worker, fleet_key
from paceline.frontend.peers.transport import PeerUnreachable
from paceline.frontend.places import Places
from paceline.frontend.replies import Replies
from paceline.frontend.requests import Requests
from paceline.frontend.routing import Router, Slot
from paceline.frontend.session import SessionCaps, Sessions
from paceline.frontend.shares import Shares
from paceline.ledger.commands import Commands
from paceline.ledger.errors import LedgerError
from paceline.ledger.journal import Store, StoreError, StoreUnavailable
from paceline.ledger.machine import EngineMachine
from paceline.ledger.store import open_store
from paceline.providers import Catalogue
from paceline.providers.headers import ALLOWED_HEADERS, FAMILIES, parse
from paceline.providers.tiers import Tiers
from paceline.telemetry import Endpoint, Figures
from paceline.telemetry.rotation import RotatingFile

_log = structlog.get_logger(__name__)

STORE_HEALTH = "store"
CONFIG_HEALTH = "config"
DRAINING_HEALTH = "draining"
"""Services of grpc.health.v1 beside those of gRPC: NOT_SERVING while a ledger's store is away; always SERVING once the
configuration was read; NOT_SERVING while draining."""

_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_LEAST_PING_MS = 5_000
_FLUSH_SECONDS = 0.5
"""For the last answers to leave."""
_STORE_SECONDS = 30.0
"""For so long a server that starts waits for a shared store that does not answer."""
_STORE_PAUSE_SECONDS = 1.0
_DRAIN_POLL_SECONDS = 0.02
_WEBHOOK_SECONDS = 2.0
"""For the last alerts to be posted."""
_AUDIT_SECONDS = 2.0
"""For the last decisions to be written."""
_ALONE_SECONDS = 1.0
"""Draining, with nobody there for so long: nobody comes back for what is granted."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class StartError(Exception):
    """The server cannot start. The message is one line: what, and what to do."""


class Server:
    """One server process. ``environ`` is where tokens may stand."""

    def __init__(
        self,
        config: Config,
        *,
        store: Store | None = None,
        environ: dict[str, str] | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.config = config
        self.worker = worker
        """Which of several processes on one address this is."""
        self.address = ""
        """Where it listens, once it does."""
        self.store = open_store(config.store) if store is None else store
        self.shared = bool(getattr(self.store, "shared", False))
        """Several processes may have the store open."""
        self.node = node_name(config) + ("" if worker is None else f"-{worker.index}")
        self._is_guest = worker is not None and worker.index > 0 and not self.shared
        environ = dict(os.environ) if environ is None else environ
        self.authenticator = Authenticator(_identities(config, environ))
        target = webhook_target(config.alerts, environ)
        webhook = None if target is None else Webhook(target)
        self.alerts = Alerts(lambda: self.router.slots.values(), config.alerts.thresholds, webhook, self.node)
        self.catalogue = catalogue(config, on_unknown=_unknown)
        self.health = HealthServicer()
        self.draining = False
        self.router: Router
        self.desk: Desk
        self.sessions: Sessions
        self.coordinator: Coordinator
        self.admin: administration.Admin
        self.fallback: Fallback
        self.shares: Shares
        self.membership: Membership
        self.metrics: Endpoint | None = None
        self.audit: AuditExport | None = None
        """Writes decisions to files, if any are configured."""
        self._seen = 0.0
        """When somebody was last connected, while draining."""
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._health_task: asyncio.Task[None] | None = None

    # -- start --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the store, read the ledgers, listen. Raises :class:`StartError`; nothing is left open then."""
        where = probe(self.config.listen) if self.worker is None else self.worker.listen
        try:
            if not self._is_guest:
                await self._open_store()
        except StoreError as error:
            raise StartError(str(error)) from error
        try:
            accounts = await self._assemble()
            await self.membership.start(accounts)
            self._server = self._listen(where, self.config.limits.max_message_bytes)
            await self._server.start()
            self._offer_metrics()
            self._open_audit()
        except (StoreError, LedgerError, StartError, PeerUnreachable) as error:
            await self._undo()
            raise StartError(str(error)) from error
        except RuntimeError as error:
            await self._undo()
            raise StartError(f"cannot listen for other servers: {error}; choose another `peer_listen`") from error
        except BaseException:
            await self._undo()
            raise
        self._spawn(self._refresh())
        self._spawn(self.alerts.run())
        if self.audit is not None:
            self._spawn(self.audit.run())
        self._spawn(self.shares.run(self._ask_shares))
        self._health_changed()
        if self.authenticator.open and not _is_local(self.config.listen):
            _log.warning(
                "ANYBODY WHO REACHES THIS PORT MAY USE AND ADMINISTER THIS SERVER: no identities are configured, and "
                "it listens beyond this machine",
                listen=self.config.listen,
            )

    async def _open_store(self) -> None:
        """Open the store; one that is shared may be starting too, and is waited for. Raises :class:`StoreError`."""
        until = time.monotonic() + (_STORE_SECONDS if self.shared else 0)
        while True:
            try:
                await self.store.open()
                return
            except StoreUnavailable as error:
                if time.monotonic() >= until:
                    raise
                _log.warning("the store is away, and is waited for", error=str(error), seconds=_STORE_SECONDS)
            await asyncio.sleep(_STORE_PAUSE_SECONDS)

    async def _assemble(self) -> list[str]:
        """Make everything; the ledgers to begin with."""
        config, limits = self.config, self.config.limits
        accounts = list(config.accounts)
        places = Places(self.catalogue, TenantShares(config).shares_of, default_family=_family_of(self.catalogue))
        ladders = ladders_of(config, places)
        machine = EngineMachine(
            EngineCaps(
                ended=limits.max_remembered,
                memory_us=limits.remember_us,
                waiters=limits.max_queue,
                waiters_per_tenant=limits.max_queue_per_tenant,
                open=limits.max_open_reservations,
                pools=limits.max_pools,
            ),
            unseen_us=FALLBACK_EXPIRY_US + FALLBACK_GRACE_US,
        )
        self.fallback = Fallback(lambda: time.monotonic_ns() // 1_000, node=self.node)
        tools = Tools(
            config,
            machine,
            lambda account: definitions(config, self.catalogue, account),
            self.fallback,
            self._phase_changed,
        )
        self.membership, key, known = await self._join(tools)
        accounts += known
        self.router = self.membership.router
        signer = Signer(key)
        requests = Requests(places, signer, parse, ALLOWED_HEADERS, ladders=ladders, caps=_caps(config))
        self.desk = Desk(requests, Replies(signer, self.router.layout_of), self.router)
        self.shares = Shares(lambda: time.monotonic_ns() // 1_000, self.fallback, self.membership.place)
        self.sessions = Sessions(
            self.desk,
            self.authenticator,
            self.shares,
            server_version=paceline.__version__,
            header_names=ALLOWED_HEADERS,
            caps=SessionCaps(
                sessions=limits.max_sessions,
                batch_bytes=limits.max_message_bytes,
                open_items=limits.max_session_in_flight,
            ),
        )
        self.coordinator = Coordinator(self.desk, self.sessions, self.authenticator, self.shares)
        membership = self.membership
        fleet: Fleet | None = None
        if membership.transport is not None:
            fleet = Fleet(membership.node, membership, membership.transport, machine.form)
        tiers = Tiers(self.catalogue.spec, self.catalogue.accounts)
        self.admin = administration.Admin(
            self.router, self.authenticator, places, self._provider_of, fleet, tiers, self.alerts.watched, requests
        )
        membership.methods.update(self.admin.peer_handlers())
        return accounts

    async def _join(self, tools: Tools) -> tuple[Membership, bytes, list[str]]:
        """This process's part, the key that signs contexts, and ledgers that are there already."""
        worker, store = self.worker, self.store
        if self._is_guest and worker is not None:
            guest = Guest(tools, worker)
            begun = await guest.begin()
            return guest, begun.signing_key, begun.ledgers
        if self.shared:
            commands: Commands = store.commands  # type: ignore[attr-defined]
            signing_key = await commands.put_meta(META_KEY, new_key())
            listen = _peer_listen(self.config.peer_listen, worker)
            number = 0 if worker is None else worker.index
            member = Member(tools, commands, self.node, await fleet_key(commands), listen, number)
            return member, signing_key, []
        key = await store.get_meta(META_KEY)
        if key is None:
            key = new_key()
            await store.put_meta(META_KEY, key)
        return Alone(tools, store) if worker is None else Host(tools, store, worker, key), key, []

    async def _ask_shares(self, ledger: str, body: bytes) -> bytes:
        slot = self.router.slots.get(ledger)
        answer = await slot.ask(SHARE, body) if isinstance(slot, FleetSlot) else None
        return b"" if answer is None else answer

    def _offer_metrics(self) -> None:
        listen = self.config.metrics_listen
        if listen == "off":
            return
        if self.worker is not None:
            listen = _nth(listen, self.worker.index)
        try:
            self.metrics = Endpoint(listen, self.figures)
        except OSError as error:
            remedy = "choose another address in `metrics_listen`, or off"
            raise StartError(f"cannot offer metrics on {listen}: {error.strerror}; {remedy}") from None

    def _open_audit(self) -> None:
        spec = self.config.audit
        if not spec.path:
            return
        path = Path(spec.path)
        if self.worker is not None and self.worker.index:
            path = path.with_name(f"{path.stem}-{self.worker.index}{path.suffix}")
        try:
            file = RotatingFile(path, spec.max_bytes, spec.files)
        except OSError as error:
            raise StartError(
                f"cannot write the audit to {path}: {error.strerror}; choose another `audit.path`, or remove it"
            ) from None
        self.audit = AuditExport(lambda: self.router.slots.values(), file)

    def figures(self) -> Figures:
        """What the metrics show."""
        counted = traffic(self.coordinator, self.sessions, self.admin)
        return figures(self.router.slots.values(), counted, self.membership.keeper, self.alerts, self.audit)

    def _provider_of(self, account: str) -> str:
        setup = self.catalogue.accounts.get(account)
        return self.config.defaults.provider if setup is None else setup.provider

    def _listen(self, where: str, most: int) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                # Two servers on one port would each have a part of the callers, which is what workers want.
                ("grpc.so_reuseport", 0 if self.worker is None else 1),
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_MS),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", _LEAST_PING_MS),
            )
        )
        server.add_generic_rpc_handlers((self.coordinator.handler(), self.admin.handler()))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        names = (SERVICE, administration.SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        try:
            port = server.add_insecure_port(where)
        except RuntimeError:
            raise StartError(f"cannot listen on {self.config.listen}: choose another address in `listen`") from None
        host = where.rpartition(":")[0]
        self.address = where if where.startswith("unix:") else f"{host}:{port}"
        return server

    async def _undo(self) -> None:
        if self.metrics is not None:
            await self.metrics.close()
        if self._server is not None:
            await self._server.stop(None)
        with contextlib.suppress(AttributeError):
            await self.membership.stop(0)
        await self.store.close()

    # -- while it runs --------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _refresh(self) -> None:
        """Fallback shares go out again before they expire."""
        while True:
            await asyncio.sleep(FALLBACK_REFRESH_US / 1e6)
            self.sessions.refresh_shares()

    def _phase_changed(self, slot: Slot) -> None:
        self.alerts.heard(slot)
        if self._server is not None:
            self._health_changed()

    def _health_changed(self) -> None:
        if self._health_task is None or self._health_task.done():
            self._health_task = self._spawn(self._tell_health())

    async def _tell_health(self) -> None:
        # One turn later: several ledgers change together.
        await asyncio.sleep(0)
        slots = list(self.router.slots.values())
        store = not slots or any(slot.is_reachable for slot in slots)
        serving = store and not self.draining
        states = {
            "": serving,
            SERVICE: serving,
            administration.SERVICE: store,
            STORE_HEALTH: all(slot.is_reachable for slot in slots),
            CONFIG_HEALTH: True,
            DRAINING_HEALTH: not self.draining,
        }
        for name, good in states.items():
            await self.health.set(name, _SERVING if good else _NOT_SERVING)

    # -- stop -----------------------------------------------------------------------------------------------------

    async def stop(self, drain_timeout: float | None = None) -> None:
        """Drain for at most ``drain_timeout`` seconds (``None``: as configured), then stop.

        New Reserves are denied; what is granted may be committed. It ends early once nothing is left to do: no item
        without an answer, and nothing granted or nobody connected for a moment.
        """
        limit = self.config.limits.drain_timeout_us / 1e6 if drain_timeout is None else drain_timeout
        self._seen = time.monotonic()
        deadline = self._seen + limit
        self.draining = self.desk.draining = True
        await self._tell_health()
        self.sessions.drain(int(limit * 1e6))
        await self.alerts.look()
        await self.membership.leave(limit)
        await _until(lambda: not self._busy(), deadline)
        await self.alerts.look()
        self.desk.spreads.withdrawals.close()
        await self.membership.stop(max(0.5, deadline - time.monotonic()))
        await _until(
            lambda: not self.sessions.pending and not self.coordinator.running, time.monotonic() + _FLUSH_SECONDS
        )
        self.admin.close()
        if self.alerts.webhook is not None:
            await self.alerts.webhook.close(_WEBHOOK_SECONDS)
        if self.metrics is not None:
            await self.metrics.close()
        if self._server is not None:
            await self._server.stop(_FLUSH_SECONDS)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.audit is not None:
            await self.audit.close(_AUDIT_SECONDS)
        await self.store.close()

    def _busy(self) -> bool:
        now = time.monotonic()
        if self.sessions.running or self.coordinator.running or self.membership.visitors:
            self._seen = now
        # Guests cannot go on without their host: they end first.
        if self.sessions.pending or self.coordinator.running or self.membership.visitors:
            return True
        return now - self._seen <= _ALONE_SECONDS and self.membership.has_grants


async def _until(done: Callable[[], bool], deadline: float) -> None:
    while not done() and time.monotonic() < deadline:  # noqa: ASYNC110 -- what is waited for is spread over many objects
        await asyncio.sleep(_DRAIN_POLL_SECONDS)


async def serve(config: Config, ready: Callable[[str], object] | None = None, worker: Worker | None = None) -> None:
    """Run a server until SIGTERM or SIGINT. Raises :class:`StartError`. ``ready`` hears of the address."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    try:
        server = Server(config, worker=worker)
    except (StoreError, ConfigError) as error:
        raise StartError("; ".join(error.lines) if isinstance(error, ConfigError) else str(error)) from error
    if worker is not None:
        _follow_parent(loop, stop)
    starting = asyncio.create_task(server.start())
    told = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, told), return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.wait((starting,))
        return
    await starting
    _calm_collector()
    if ready is not None:
        ready(server.address)
    await stop.wait()
    _log.info("draining", seconds=config.limits.drain_timeout_us / 1e6)
    await server.stop()


def _follow_parent(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Stop once the parent is gone: it holds the other end of standard input."""
    held = sys.stdin.fileno()

    def closed() -> None:
        loop.remove_reader(held)
        stop.set()

    loop.add_reader(held, closed)


def run(config: Config, worker: Worker | None = None) -> int:
    """Run a server; the exit code: 0 after a drain, 2 if it could not start."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(config, _announce, worker))
    except StartError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"error: {line}\n")
        return 2
    return 0


def _calm_collector() -> None:
    """What the server keeps lives long and makes no cycles: look for those seldom, and never at what came with it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _announce(address: str) -> None:
    sys.stdout.write(f"paceline {paceline.__version__} listens on {address}\n")
    sys.stdout.flush()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _identities(config: Config, environ: dict[str, str]) -> list[Identity]:
    found = []
    for digest, spec in token_hashes(config, environ).items():
        tenants = None if "*" in spec.tenants else spec.tenants
        workspaces = None if "*" in spec.workspaces else spec.workspaces
        found.append(
            Identity(
                name=spec.name,
                digests=(digest,),
                tenants=tenants,
                workspaces=workspaces,
                calls="call" in spec.roles,
                teaches="teach" in spec.roles,
                admin="admin" in spec.roles,
                tenant=_only(tenants),
                workspace=_only(workspaces),
            )
        )
    return found


def _only(names: tuple[str, ...] | None) -> str:
    """The default where there is no choice."""
    return names[0] if names is not None and len(names) == 1 and "*" not in names[0] else ""


def _caps(config: Config) -> Caps:
    limits = config.limits
    return Caps(
        candidates=limits.max_candidates,
        calls=min(limits.max_bulk, MAX_COUNT),
        label_chars=limits.max_label_length,
        headers=limits.max_headers,
        header_value_bytes=limits.max_header_bytes,
        error_message_bytes=limits.max_error_message_bytes,
        error_details_bytes=limits.max_error_details_bytes,
        wait_us=limits.max_wait_us,
        default_hold_us=limits.default_hold_us,
        hold_us=limits.max_hold_us,
    )


def _family_of(known: Catalogue) -> Callable[[str], str]:
    """The header family of a pool that this process has not resolved yet, by its name."""

    def family(pool: str) -> str:
        provider = known.spec.providers.get(pool.partition("/")[0])
        if provider is None:
            return ""
        tier = pool.partition(";service_tier=")[2].partition("@")[0]
        service = provider.service_tiers.get(tier)
        found = (service.header_family if service is not None else None) or provider.header_family
        return found if found in FAMILIES else ""

    return family


def _unknown(what: object) -> None:
    model = getattr(what, "model", "")
    _log.warning(
        "unknown model: cautious limits, no price" if model else "too many unknown models: they share one pool",
        account=getattr(what, "account", ""),
        provider=getattr(what, "provider", ""),
        model=model,
        pool=getattr(what, "pool", ""),
    )


def _is_local(listen: str) -> bool:
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _nth(address: str, index: int) -> str:
    """The address of one of several processes: each has a port of its own, one after the other."""
    host, _, port = address.rpartition(":")
    return address if port in ("", "0") or not port.isdigit() else f"{host}:{int(port) + index}"


def _peer_listen(address: str, worker: Worker | None) -> str:
    if worker is None:
        return address
    return f"{address}.{worker.index}" if address.startswith("unix:") else _nth(address, worker.index)


def probe(listen: str) -> str:
    """The address for gRPC, if it is free. gRPC itself would say why it is not on lines of its own.

    Raises :class:`StartError`.
    """
    taken = f"cannot listen on {listen}: {{}}; stop what uses it, or choose another address in `listen`"
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:").removeprefix("//")
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                _probe_socket(path, taken)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StartError(taken.format(error.strerror)) from None
        return f"unix:{path}"
    host, _, port = listen.rpartition(":")
    bare = host.strip("[]")
    try:
        found = socket.getaddrinfo(bare or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(taken.format(error.strerror)) from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise StartError(taken.format(error.strerror)) from None
    return listen


def _probe_socket(path: str, taken: str) -> None:
    """Raises :class:`StartError` if somebody listens on the socket; else it is a leftover, and goes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise StartError(taken.format("another process listens there"))
