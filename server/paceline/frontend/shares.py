"""Fallback shares as a front end sees them: it asks the owners of the ledgers, and hands on what they give.

The owner of a ledger keeps the accounts (:mod:`paceline.frontend.fallback`). Where that is this process it is asked at
once. Another one is asked once a second at most, for all clients and pools together: what was granted since, which
shares have arrived, who wants one. A share that has come goes out with the client's next grant. Until then, and if it
is wanted no more, nobody has it, and the owner hears so.

A share's life is counted from when it was asked for, so it ends here no later than in the owner's accounts.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import msgspec
import structlog

from paceline.engine.answers import Touched
from paceline.engine.dimensions import SECOND_US, Dimension
from paceline.frontend.fallback import Amounts, Fallback, per_minute
from paceline.frontend.limits import (
    FALLBACK_EXPIRY_US,
    MAX_SHARE_ASKS,
    MAX_SHARE_CLIENTS,
    SHARE_ASK_INTERVAL_US,
    SHARE_ASK_TIMEOUT_US,
    SURRENDER_TIMEOUT_US,
)
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable, Transport
from paceline_client.stubs import v1 as pb

RETRY_US = SECOND_US
"""After a share was not to be had, the same client does not ask for it again for so long."""
HELD_US = 30 * SECOND_US
"""A share that no grant has taken along in this time goes back."""
SWEEP_US = SECOND_US

_log = structlog.get_logger(__name__)


class Wish(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one instance, as one front end knows it, says of one pool."""

    instance: str
    pool: str
    charges: dict[int, int]
    """What its grants hold that the owner has not heard of."""
    known: int
    """The newest serial that the front end was told; 0: none."""
    arrived: int
    """The newest serial that the client has shown to have; 0: none new."""
    returned: int
    """A serial that was handed on to nobody; 0: none."""
    wanted: bool


class Given(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One share for one instance."""

    instance: str
    pool: str
    serial: int
    left_us: int
    """Of its life."""
    amounts: dict[int, int]


class ShareAsk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a front end asks the owner of a ledger. At most ``MAX_SHARE_ASKS`` wishes."""

    wishes: tuple[Wish, ...]


class ShareAnswer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The shares that there are."""

    given: tuple[Given, ...]


_encode = msgspec.msgpack.Encoder().encode
_decode_ask = msgspec.msgpack.Decoder(ShareAsk).decode
LimitsOf = Callable[[str], Amounts | None]
_decode_answer = msgspec.msgpack.Decoder(ShareAnswer).decode


def serve_ask(fallback: Fallback, ledger: str, body: bytes, limits_of: LimitsOf, *, leads: bool) -> bytes:
    """The owner's answer to a :class:`ShareAsk`: a :class:`ShareAnswer`. ``limits_of`` tells a pool's limits, ``None``
    if there is no such pool; ``leads`` says that the lease was confirmed a moment ago: else there are no shares.

    Raises :class:`msgspec.DecodeError` or :class:`ValueError` for what is no ask.
    """
    given: list[Given] = []
    sharing = leads and fallback.is_sharing(ledger)
    for wish in _decode_ask(body).wishes[:MAX_SHARE_ASKS]:
        limits = limits_of(wish.pool)
        if limits is None:
            continue
        instance, pool = wish.instance, wish.pool
        if wish.charges:
            charges = [(Dimension(key), amount) for key, amount in wish.charges.items()]
            fallback.note(instance, pool, charges, ledger=ledger)
        if wish.arrived:
            fallback.arrived(instance, pool, wish.arrived)
        if wish.returned:
            fallback.returned(instance, pool, wish.returned)
        if wish.wanted and sharing:
            share = fallback.take(instance, pool, limits, ledger=ledger, known=wish.known)
            if share is not None:
                amounts = {int(key): amount for key, amount in share.amounts.items()}
                given.append(Given(instance, pool, share.serial, fallback.left_us(share), amounts))
    return _encode(ShareAnswer(tuple(given)))


SURRENDER = "Shares.Surrender"
"""The method that gives a ledger's accounts to its next owner."""


class SurrenderAsk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Says ``node``, the owner of ``ledger`` under ``epoch``, to the owner before."""

    ledger: str
    epoch: int
    node: str


_decode_surrender = msgspec.msgpack.Decoder(SurrenderAsk).decode


async def inherit(
    fallback: Fallback, transport: Transport, ledger: str, epoch: int, wait_us: int, before: tuple[str, str]
) -> bool:
    """Become the one who shares out ``ledger``, after ``before`` (node and address; empty: nobody), which is asked for
    its accounts. ``wait_us`` is that of :func:`~paceline.frontend.fallback.blind_us`. Whether there are shares at once.

    Ends within :data:`~paceline.frontend.limits.SURRENDER_TIMEOUT_US`.
    """
    node, address = before
    if fallback.begin(ledger, epoch, wait_us, node) or not address or node == fallback.node:
        return fallback.is_sharing(ledger)
    body = _encode(SurrenderAsk(ledger, epoch, fallback.node))
    try:
        accounts = await transport.call(address, SURRENDER, body, SURRENDER_TIMEOUT_US / 1e6)
    except (PeerRefused, PeerUnreachable):
        return False
    return bool(accounts) and fallback.adopt(ledger, epoch, accounts) and fallback.is_sharing(ledger)


def serve_surrender(fallback: Fallback, body: bytes) -> bytes:
    """The answer of the owner before: the accounts, or nothing. Raises :class:`msgspec.DecodeError`."""
    ask = _decode_surrender(body)
    return fallback.surrender(ask.ledger, ask.epoch, ask.node) or b""


class Place(Protocol):
    """Where a ledger is, as this front end sees it."""

    def is_local(self, ledger: str) -> bool:
        """Its owner is in this process."""
        ...

    def leads(self, ledger: str) -> bool:
        """Its owner is in this process, under a lease confirmed a moment ago."""
        ...


class _Entry:
    """One instance and one pool."""

    __slots__ = ("arrived", "at_hand", "charges", "delivered", "known", "ledger", "retry_at", "used_at", "wanted")

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger
        self.charges: Amounts = {}
        self.at_hand: _AtHand | None = None
        self.known = 0
        self.delivered = 0
        """The serial that went out last."""
        self.arrived = 0
        """The serial to report."""
        self.wanted = False
        self.retry_at = 0
        self.used_at = 0


class _AtHand(msgspec.Struct, frozen=True, gc=False):
    serial: int
    until: int
    amounts: Amounts


_Key = tuple[str, str]


class Shares:
    """What sessions and unary calls ask for shares. ``clock`` is monotonic, in µs.

    At most ``MAX_SHARE_CLIENTS`` pairs of a client and a pool are kept; beyond that there is no share for new ones
    until others have been silent for the life of a share.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        fallback: Fallback,
        place: Place,
        *,
        expiry_us: int = FALLBACK_EXPIRY_US,
        most: int = MAX_SHARE_CLIENTS,
    ) -> None:
        self._clock = clock
        self._fallback = fallback
        self._place = place
        self._expiry_us = expiry_us
        self._most = most
        self._entries: dict[_Key, _Entry] = {}
        self._swept_at = clock() - SWEEP_US
        self._held: deque[tuple[int, _Key, int]] = deque()
        """When a share at hand goes back, whose, and its serial."""
        self._telling: dict[str, dict[_Key, int]] = {}
        """By ledger: what has something to tell its owner, with the serial to return."""

    # -- what sinks call ------------------------------------------------------------------------------------------

    def note(
        self, instance: str, ledger: str, pool: str, charges: Iterable[tuple[Dimension, int]], count: int = 1
    ) -> None:
        """``instance`` was granted ``count`` calls that hold ``charges`` each."""
        if self._place.is_local(ledger):
            self._fallback.note(instance, pool, charges, count, ledger=ledger)
            return
        entry = self._entry(instance, ledger, pool)
        if entry is not None:
            sums = entry.charges
            for dimension, amount in charges:
                sums[dimension] = sums.get(dimension, 0) + amount * count

    def share(self, instance: str, ledger: str, pool: str, touched: Touched) -> pb.FallbackShare | None:
        """A share to send with this grant; ``None``: there is none at hand, and the next grant may ask again."""
        entry = self._entry(instance, ledger, pool)
        now = self._clock()
        if entry is None or now < entry.retry_at:
            return None
        entry.ledger = ledger
        found = entry.at_hand
        if found is not None:
            entry.at_hand = None
            if found.until > now:
                entry.delivered = found.serial
                return _message(pool, found.amounts, found.until - now)
        if self._place.is_local(ledger):
            if self._place.leads(ledger) and self._fallback.is_sharing(ledger):
                share = self._fallback.take(instance, pool, per_minute(pool, touched), ledger=ledger, known=entry.known)
                if share is not None:
                    entry.known = entry.delivered = share.serial
                    return _message(pool, share.amounts, share.until - now)
            entry.retry_at = now + RETRY_US
            return None
        entry.wanted = True
        self._tell(entry, (instance, pool))
        return None

    def arrived(self, instance: str, pool: str) -> None:
        """``instance`` has shown that it has the share that was sent last."""
        key = (instance, pool)
        entry = self._entries.get(key)
        if entry is None or not entry.delivered:
            return
        if self._place.is_local(entry.ledger):
            self._fallback.arrived(instance, pool, entry.delivered)
        else:
            entry.arrived = entry.delivered
            self._tell(entry, key)

    # -- what goes to the owners ------------------------------------------------------------------------------------

    async def run(self, ask: Callable[[str, bytes], Awaitable[bytes]]) -> None:
        """Ask the owners, once a second. ``ask`` takes a ledger and a :class:`ShareAsk`, and may raise anything."""
        while True:
            await asyncio.sleep(SHARE_ASK_INTERVAL_US / 1e6)
            asks = self.asks()
            await asyncio.gather(*(self._ask(ask, ledger, body) for ledger, body in asks))

    async def _ask(self, ask: Callable[[str, bytes], Awaitable[bytes]], ledger: str, body: bytes) -> None:
        sent_at = self._clock()
        try:
            async with asyncio.timeout(SHARE_ASK_TIMEOUT_US / 1e6):
                answer = await ask(ledger, body)
            self.answered(ledger, body, sent_at, answer)
        except Exception as error:
            # The wishes stand, and go out again.
            _log.debug("fallback shares were not answered", ledger=ledger, error=type(error).__name__)

    def asks(self) -> list[tuple[str, bytes]]:
        """What there is to ask now, by ledger."""
        self._return_unused()
        found: list[tuple[str, bytes]] = []
        for ledger, keys in list(self._telling.items()):
            if self._place.is_local(ledger):
                if self._fallback.is_sharing(ledger):
                    del self._telling[ledger]
                    self._tell_here(keys)
                continue
            wishes: list[Wish] = []
            for key, returned in list(keys.items()):
                if len(wishes) >= MAX_SHARE_ASKS:
                    break
                entry = self._entries.get(key)
                if entry is None or entry.ledger != ledger:
                    del keys[key]
                    continue
                charges = {int(dimension): amount for dimension, amount in entry.charges.items()}
                # Heard twice or never, they only shift the weights a little.
                entry.charges = {}
                wishes.append(Wish(*key, charges, entry.known, entry.arrived, returned, entry.wanted))
            if wishes:
                found.append((ledger, _encode(ShareAsk(tuple(wishes)))))
            elif not keys:
                del self._telling[ledger]
        return found

    def _tell_here(self, keys: dict[_Key, int]) -> None:
        """Their ledger has moved here. What is wanted is asked for with the next grant."""
        for (instance, pool), returned in keys.items():
            entry = self._entries.get((instance, pool))
            if entry is not None and entry.arrived:
                self._fallback.arrived(instance, pool, entry.arrived)
                entry.arrived = 0
            if returned:
                self._fallback.returned(instance, pool, returned)

    def answered(self, ledger: str, asked: bytes, sent_at: int, answer: bytes) -> None:
        """Take an owner's answer to ``asked``, which was sent at ``sent_at``. Raises :class:`msgspec.DecodeError`."""
        now = self._clock()
        given = _decode_answer(answer).given
        keys = self._telling.get(ledger, {})
        for wish in _decode_ask(asked).wishes:
            key = (wish.instance, wish.pool)
            entry = self._entries.get(key)
            if entry is None:
                keys.pop(key, None)
                continue
            if entry.arrived == wish.arrived:
                entry.arrived = 0
            if wish.wanted:
                entry.wanted = False
                entry.retry_at = now + RETRY_US
            if keys.get(key, 0) == wish.returned:
                keys[key] = 0
            if not (entry.arrived or entry.wanted or keys.get(key)):
                keys.pop(key, None)
        for each in given:
            key = (each.instance, each.pool)
            entry = self._entries.get(key)
            if entry is None or entry.at_hand is not None or each.serial == entry.delivered:
                continue
            amounts = {Dimension(dimension): amount for dimension, amount in each.amounts.items()}
            entry.at_hand = _AtHand(each.serial, sent_at + each.left_us, amounts)
            entry.known = each.serial
            entry.retry_at = 0
            self._held.append((now + HELD_US, key, each.serial))

    def _return_unused(self) -> None:
        now = self._clock()
        held = self._held
        while held and held[0][0] <= now:
            _, key, serial = held.popleft()
            entry = self._entries.get(key)
            if entry is not None and entry.at_hand is not None and entry.at_hand.serial == serial:
                entry.at_hand = None
                self._telling.setdefault(entry.ledger, {})[key] = serial

    def _tell(self, entry: _Entry, key: _Key) -> None:
        self._telling.setdefault(entry.ledger, {}).setdefault(key, 0)

    def _entry(self, instance: str, ledger: str, pool: str) -> _Entry | None:
        key = (instance, pool)
        entry = self._entries.get(key)
        now = self._clock()
        if entry is None:
            if len(self._entries) >= self._most:
                self._sweep(now)
                if len(self._entries) >= self._most:
                    return None
            entry = self._entries[key] = _Entry(ledger)
        entry.used_at = now
        return entry

    def _sweep(self, now: int) -> None:
        if now < self._swept_at + SWEEP_US:
            return
        self._swept_at = now
        idle = now - self._expiry_us
        for key in [key for key, entry in self._entries.items() if entry.used_at < idle]:
            del self._entries[key]


def _message(pool: str, amounts: Amounts, left_us: int) -> pb.FallbackShare:
    """A share as callers get it."""
    message = pb.FallbackShare(pool=pool)
    for dimension, amount in amounts.items():
        message.amounts.add(dimension=int(dimension), per_minute=amount)
    message.expires_in.FromMicroseconds(left_us)
    return message
