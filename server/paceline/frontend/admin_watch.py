"""Watching: what has changed of everything that is shown, found by comparing, for streams and for other processes.

A process that watches asks the owners of the other ledgers for what has changed there, as often as it looks at its own,
and keeps a copy. While nobody watches, nothing is looked at or asked. What an owner that has gone had shown stays until
the next one shows its own.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence

import msgspec
from google.protobuf.message import DecodeError

from paceline.frontend.admin_fleet import Fleet, Site
from paceline.frontend.errors import Code, Problem
from paceline.frontend.limits import ADMIN_TIMEOUT_US, MAX_LEDGERS, WATCH_INTERVAL_US
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable
from paceline_client.stubs import v1 as pb

CHANGES = "Admin.Changes"
"""The method of the peer service: what has changed of some ledgers that the process owns."""

_MAX_GONE = 20_000
_EVENTS_A_MESSAGE = 256
MAX_REMOTE_RESERVATIONS = 4_000
"""Open reservations of one ledger that are shown to another process that watches."""
_UNUSED_S = 60.0
_MAX_TRACKERS = 4 * MAX_LEDGERS

Watched = Callable[[str, bool], Iterator[tuple[str, pb.WatchEvent]]]
"""Everything of one ledger (empty: of all) that is here: names, which sort by kind, and events. With reservations?"""
LastState = Callable[[str], pb.WatchEvent | None]
"""Of a reservation that is no longer open, by its name."""
Resources = Callable[[bool], Iterable[tuple[str, pb.WatchEvent]]]


class TooOld(Exception):
    """A token that this tracker cannot go on from."""


class _Entry:
    __slots__ = ("encoded", "event", "revision")

    def __init__(self, revision: int, event: pb.WatchEvent, encoded: bytes) -> None:
        self.revision = revision
        self.event = event
        self.encoded = encoded


class Tracker:
    """The newest state of everything, each with the revision in which it changed.

    A token is the tracker's name and a revision. What has gone is kept for the last ``_MAX_GONE``.
    """

    def __init__(self, resources: Resources, last_state: LastState) -> None:
        self._resources = resources
        self._last_state = last_state
        self._name = secrets.token_hex(4)
        self.revision = 0
        self._entries: dict[str, _Entry] = {}
        self._gone: deque[tuple[int, str, pb.WatchEvent]] = deque()
        self._forgotten = 0
        """The newest revision of what was dropped from ``_gone``."""
        self._looked = 0.0

    def token(self, revision: int) -> str:
        """What :meth:`resume` understands."""
        return f"{self._name}.{revision}"

    def resume(self, token: str) -> int:
        """The revision of a token. Raises :class:`TooOld`."""
        name, _, revision = token.partition(".")
        if name != self._name or not revision.isdigit() or len(revision) > 18:
            raise TooOld
        self.check(int(revision))
        return int(revision)

    def check(self, revision: int) -> None:
        """Raises :class:`TooOld` if changes since ``revision`` are forgotten."""
        if not self._forgotten <= revision <= self.revision:
            raise TooOld

    def all(self) -> list[tuple[str, pb.WatchEvent]]:
        """Everything there is."""
        return [(name, entry.event) for name, entry in self._entries.items()]

    def since(self, revision: int) -> list[tuple[str, pb.WatchEvent]]:
        """What is new or has changed after ``revision``."""
        return [(name, entry.event) for name, entry in self._entries.items() if entry.revision > revision]

    def gone_since(self, revision: int) -> list[tuple[str, pb.WatchEvent]]:
        """What has gone after ``revision``: its last state, marked as removed or as ended."""
        return [(name, event) for at, name, event in self._gone if at > revision]

    def look(self, reservations: bool, *, force: bool = False, keep: frozenset[str] = frozenset()) -> None:
        """Find what has changed, not more often than eight times a second. What belongs to the ledgers in ``keep`` is
        not gone, only because it is not seen."""
        now = asyncio.get_running_loop().time()
        if not force and now - self._looked < WATCH_INTERVAL_US / 1e6 / 2:
            return
        self._looked = now
        revision = self.revision + 1
        changed = False
        left = dict.fromkeys(self._entries)
        for name, event in self._resources(reservations):
            left.pop(name, None)
            encoded = event.SerializeToString(deterministic=True)
            entry = self._entries.get(name)
            if entry is None or entry.encoded != encoded:
                event.time.GetCurrentTime()
                self._entries[name] = _Entry(revision, event, encoded)
                changed = True
        for name in left:
            if name.startswith("reservation\0") and not reservations:
                del self._entries[name]
                continue
            if ledger_of(name) in keep:
                continue
            self._remove(revision, name)
            changed = True
        if changed:
            self.revision = revision

    def _remove(self, revision: int, name: str) -> None:
        entry = self._entries.pop(name)
        event = self._last_state(name) if name.startswith("reservation\0") else None
        if event is None:
            event = pb.WatchEvent()
            event.CopyFrom(entry.event)
            event.removed = True
        event.time.GetCurrentTime()
        self._gone.append((revision, name, event))
        if len(self._gone) > _MAX_GONE:
            self._forgotten = self._gone.popleft()[0]


class Hub:
    """What all watches of this process share. A token that is too old is OUT_OF_RANGE."""

    def __init__(self, watched: Watched, last_state: LastState, elsewhere: Elsewhere | None) -> None:
        self._watched = watched
        self._last_state = last_state
        self._elsewhere = elsewhere
        self._tracker = Tracker(self._resources, self._last)
        self._with_reservations = 0

    async def follow(self, request: pb.WatchRequest, interval: float) -> AsyncGenerator[pb.WatchResponse, None]:
        """The snapshot, then changes, for one watch."""
        tracker = self._tracker
        if request.reservations:
            self._with_reservations += 1
        try:
            seen = None if not request.resume_token else tracker.resume(request.resume_token)
            await self._look(force=True)
            if seen is None:
                events = [event for _, event in tracker.all() if _wanted(event, request)]
                for part in _parts(events):
                    yield pb.WatchResponse(phase=pb.WATCH_PHASE_SNAPSHOT, events=part)
                seen = tracker.revision
                yield pb.WatchResponse(phase=pb.WATCH_PHASE_SNAPSHOT_END, resume_token=tracker.token(seen))
            while True:
                tracker.check(seen)
                found = [*tracker.since(seen), *tracker.gone_since(seen)]
                changed = [event for _, event in found if _wanted(event, request)]
                if tracker.revision > seen:
                    seen = tracker.revision
                    parts = list(_parts(changed))
                    for place, part in enumerate(parts):
                        token = tracker.token(seen) if place == len(parts) - 1 else ""
                        yield pb.WatchResponse(phase=pb.WATCH_PHASE_CHANGE, resume_token=token, events=part)
                await asyncio.sleep(interval)
                await self._look()
        except TooOld:
            raise Problem(
                Code.OUT_OF_RANGE, "resume_token: is too old, or of another server: start without one"
            ) from None
        finally:
            if request.reservations:
                self._with_reservations -= 1

    async def _look(self, force: bool = False) -> None:
        reservations = self._with_reservations > 0
        keep: frozenset[str] = frozenset()
        if self._elsewhere is not None:
            await self._elsewhere.refresh(reservations)
            keep = self._elsewhere.unseen()
        self._tracker.look(reservations, force=force, keep=keep)

    def _resources(self, reservations: bool) -> Iterator[tuple[str, pb.WatchEvent]]:
        if self._elsewhere is None:
            yield from self._watched("", reservations)
            return
        here: set[str] = set()
        read: set[str] = set()
        for name, event in self._watched("", reservations):
            ledger = ledger_of(name)
            here.add(ledger)
            if not name.startswith("ledger\0"):
                read.add(ledger)
            yield name, event
        yield from self._elsewhere.resources(here, read)

    def _last(self, name: str) -> pb.WatchEvent | None:
        found = self._last_state(name)
        return self._elsewhere.last_state(name) if found is None and self._elsewhere is not None else found


# -- between processes ------------------------------------------------------------------------------------------------


class ChangesAsk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one process asks the owner of some ledgers: each with the token of the answer before, or an empty one."""

    ledgers: list[tuple[str, str]]
    reservations: bool


class LedgerChanges(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What has changed of one ledger since a token. Names with encoded events."""

    ledger: str
    token: str
    whole: bool
    """Everything there is: what is not in it has gone."""
    events: list[tuple[str, bytes]]
    gone: list[tuple[str, bytes]]


class ChangesAnswer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Ledgers that are not owned there are left out."""

    ledgers: list[LedgerChanges]


_encode = msgspec.msgpack.Encoder().encode
_decode_ask = msgspec.msgpack.Decoder(ChangesAsk).decode
_decode_answer = msgspec.msgpack.Decoder(ChangesAnswer).decode


class Trackers:
    """What other processes watch of the ledgers here: a tracker for each, while somebody asks."""

    def __init__(self, watched: Watched, last_state: LastState) -> None:
        self._watched = watched
        self._last_state = last_state
        self._trackers: dict[tuple[str, bool], tuple[Tracker, float]] = {}

    def serve(self, body: bytes) -> bytes:
        """The answer to a :class:`ChangesAsk`. Raises :class:`msgspec.DecodeError`."""
        ask = _decode_ask(body)
        now = asyncio.get_running_loop().time()
        for key in [key for key, (_, used_at) in self._trackers.items() if used_at < now - _UNUSED_S]:
            del self._trackers[key]
        answers = (self._changes(ledger, token, ask.reservations, now) for ledger, token in ask.ledgers[:MAX_LEDGERS])
        return _encode(ChangesAnswer([answer for answer in answers if answer is not None]))

    def _changes(self, ledger: str, token: str, reservations: bool, now: float) -> LedgerChanges | None:
        if next(self._watched(ledger, False), None) is None:
            self._trackers.pop((ledger, reservations), None)
            return None
        found = self._trackers.get((ledger, reservations))
        if found is None and len(self._trackers) >= _MAX_TRACKERS:
            return None
        tracker = Tracker(lambda with_them: self._bounded(ledger, with_them), self._last_state)
        if found is not None:
            tracker = found[0]
        self._trackers[ledger, reservations] = (tracker, now)
        tracker.look(reservations, force=found is None)
        try:
            seen = tracker.resume(token)
        except TooOld:
            return LedgerChanges(ledger, tracker.token(tracker.revision), True, _packed(tracker.all()), [])
        changed, gone = tracker.since(seen), tracker.gone_since(seen)
        return LedgerChanges(ledger, tracker.token(tracker.revision), False, _packed(changed), _packed(gone))

    def _bounded(self, ledger: str, reservations: bool) -> Iterator[tuple[str, pb.WatchEvent]]:
        left = MAX_REMOTE_RESERVATIONS
        for name, event in self._watched(ledger, reservations):
            if name.startswith("reservation\0"):
                if left == 0:
                    return
                left -= 1
            yield name, event


class _Copy:
    """What the owner of one ledger has shown."""

    def __init__(self) -> None:
        self.site = Site("")
        self.token = ""
        self.lost = True
        """Its owner does not answer now."""
        self.events: dict[str, pb.WatchEvent] = {}
        self.ended: dict[str, pb.WatchEvent] = {}
        """Reservations that ended and were not looked at since, by name."""


class Elsewhere:
    """Copies of what the owners of other ledgers show."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._copies: dict[str, _Copy] = {}
        self._lock = asyncio.Lock()
        self._refreshed = 0.0

    async def refresh(self, reservations: bool) -> None:
        """Ask all owners for what is new, not more often than eight times a second."""
        async with self._lock:
            now = asyncio.get_running_loop().time()
            if now - self._refreshed < WATCH_INTERVAL_US / 1e6 / 2:
                return
            keeper = self._fleet.keeper
            known = keeper.ledgers()
            for ledger in self._copies.keys() - set(known):
                del self._copies[ledger]
            sites: dict[Site, list[str]] = {}
            for ledger in known:
                seat = keeper.where(ledger)
                if seat.owner is not None:
                    continue
                copy = self._copies.setdefault(ledger, _Copy())
                if not reservations:
                    copy.ended.clear()
                if seat.address and seat.node != self._fleet.node:
                    sites.setdefault(Site(seat.node, seat.address), []).append(ledger)
                else:
                    copy.lost = True
            await asyncio.gather(*(self._ask(site, ledgers, reservations) for site, ledgers in sites.items()))
            self._refreshed = asyncio.get_running_loop().time()

    async def _ask(self, site: Site, ledgers: list[str], reservations: bool) -> None:
        asked: list[tuple[str, str]] = []
        for ledger in ledgers:
            copy = self._copies[ledger]
            if copy.site != site:
                copy.site, copy.token = site, ""
            copy.lost = True
            asked.append((ledger, copy.token))
        body = _encode(ChangesAsk(asked, reservations))
        try:
            answer = await self._fleet.transport.call(site.address, CHANGES, body, ADMIN_TIMEOUT_US / 1e6)
            for changes in _decode_answer(answer).ledgers:
                if changes.ledger in ledgers:
                    _take(self._copies[changes.ledger], changes)
        except (PeerRefused, PeerUnreachable, msgspec.DecodeError, DecodeError):
            # What was shown last stays.
            return

    def unseen(self) -> frozenset[str]:
        """Ledgers of which nothing was ever shown here, since their owners do not answer."""
        return frozenset(ledger for ledger, copy in self._copies.items() if not copy.token)

    def resources(self, here: set[str], read: set[str]) -> Iterator[tuple[str, pb.WatchEvent]]:
        """Everything that is not here, and what the last owner showed of ledgers ``here`` that are not ``read`` yet."""
        for ledger in read & self._copies.keys():
            del self._copies[ledger]
        for ledger, copy in self._copies.items():
            if copy.lost and ledger not in here:
                yield f"ledger\0{ledger}", pb.WatchEvent(ledger=self._fleet.lost(ledger, "its owner does not answer"))
            for name, event in copy.events.items():
                if not name.startswith("ledger\0") or not (copy.lost or ledger in here):
                    own = pb.WatchEvent()
                    own.CopyFrom(event)
                    yield name, own

    def last_state(self, name: str) -> pb.WatchEvent | None:
        """A reservation that has ended elsewhere."""
        copy = self._copies.get(ledger_of(name))
        return None if copy is None else copy.ended.pop(name, None)


def _take(copy: _Copy, changes: LedgerChanges) -> None:
    copy.token, copy.lost = changes.token, False
    if changes.whole:
        copy.events.clear()
    for name, body in changes.gone:
        event = pb.WatchEvent.FromString(body)
        copy.events.pop(name, None)
        if not event.removed and len(copy.ended) < _MAX_GONE:
            copy.ended[name] = event
    for name, body in changes.events:
        event = pb.WatchEvent.FromString(body)
        event.ClearField("time")
        copy.events[name] = event


def ledger_of(name: str) -> str:
    """The ledger of a watched name."""
    return name.split("\0", 2)[1]


def _packed(events: Iterable[tuple[str, pb.WatchEvent]]) -> list[tuple[str, bytes]]:
    return [(name, event.SerializeToString()) for name, event in events]


def _wanted(event: pb.WatchEvent, request: pb.WatchRequest) -> bool:
    kind = event.WhichOneof("resource")
    ledger, pool = "", ""
    if kind == "ledger":
        ledger = event.ledger.name
    elif kind == "pool":
        ledger, pool = event.pool.ledger, event.pool.name
    elif kind == "share":
        ledger, pool = event.share.ledger, event.share.pool
    elif kind == "mode":
        ledger, pool = event.mode.ledger, event.mode.pool
    elif kind == "reservation":
        if not request.reservations:
            return False
        ledger, pool = event.reservation.ledger, event.reservation.pool
    elif kind == "alert":
        ledger, pool = event.alert.ledger, event.alert.limit.pool
    if request.ledgers and ledger not in request.ledgers:
        return False
    return not request.pools or not pool or pool in request.pools


def _parts(events: Sequence[pb.WatchEvent]) -> Iterator[Sequence[pb.WatchEvent]]:
    for start in range(0, len(events), _EVENTS_A_MESSAGE):
        yield events[start : start + _EVENTS_A_MESSAGE]
