"""The alerts of the ledgers that this process owns: looks at them, and tells the log, the webhook and ``Watch``.

The owner of a ledger looks, so each alert is told once in a fleet, whichever servers its callers are connected to.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

import structlog

from paceline.frontend.alerts.alert import Alert, Kind
from paceline.frontend.alerts.lookout import Lookout
from paceline.frontend.alerts.webhook import Webhook
from paceline.frontend.routing import Slot
from paceline_client.stubs import v1 as pb

_log = structlog.get_logger(__name__)

LOOK_S = 1.0
_LEAST_BETWEEN_S = 0.95
_MOST_BETWEEN_S = 10.0
_PART = 0.1
"""Of the event loop's time, for looking: with very many limits in use, looks are further apart."""
MAX_WATCHED = 4_096
"""Alerts of one ledger that ``Watch`` shows."""

_LINES = {
    Kind.THRESHOLD: "threshold reached",
    Kind.CAP_REACHED: "cap reached: calls are denied",
    Kind.LIMIT_MOVED: "the upstream's limit has moved",
}


class Alerts:
    """Looks about once a second. ``slots`` are this process's ledgers, ``server`` its name. Thresholds: thousandths."""

    def __init__(
        self,
        slots: Callable[[], Iterable[Slot]],
        thresholds: tuple[int, ...],
        webhook: Webhook | None = None,
        server: str = "",
    ) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """Alerts that were told, by ledger and kind."""
        self.webhook = webhook
        self._slots = slots
        self._thresholds = thresholds
        self._server = server
        self._lookouts: dict[str, Lookout] = {}
        """Never more than there are ledgers."""
        self._looking = asyncio.Lock()

    # -- from outside ----------------------------------------------------------------------------------------------

    def heard(self, slot: Slot) -> None:
        """A ledger begins to decide here, or no more: what its books say now is what was told before."""
        engine, now = slot.engine, slot.now()
        if slot.is_remote:
            self._lookouts.pop(slot.account, None)
        elif engine is not None and slot.ready and now is not None:
            lookout = self._lookouts.get(slot.account)
            if lookout is None:
                self._lookouts[slot.account] = Lookout(slot.account, self._thresholds, engine.state, engine.stats, now)
            elif lookout.state is not engine.state:
                lookout.follow(engine.state, engine.stats)

    def watched(self, ledger: str) -> Iterator[tuple[str, pb.WatchEvent]]:
        """What stands in one ledger, as ``Watch`` shows it: names and events."""
        lookout = self._lookouts.get(ledger)
        for alert in () if lookout is None else lookout.alerts(MAX_WATCHED):
            yield f"alert\0{alert.name}", pb.WatchEvent(alert=alert.message())

    async def run(self) -> None:
        """Look until cancelled."""
        pause = LOOK_S
        while True:
            await asyncio.sleep(pause)
            began = perf_counter()
            try:
                busy = await self.look()
            except Exception:
                # The books do not depend on it, and the next look begins anew.
                _log.exception("looking for alerts failed")
                pause = _MOST_BETWEEN_S
                continue
            pause = max(_LEAST_BETWEEN_S, LOOK_S - (perf_counter() - began), busy / _PART)
            pause = min(pause, _MOST_BETWEEN_S)

    async def look(self) -> float:
        """Look once at every ledger that is owned here; the seconds that this took of the event loop."""
        busy = 0.0
        async with self._looking:
            slots = list(self._slots())
            for account in self._lookouts.keys() - {slot.account for slot in slots}:
                del self._lookouts[account]
            for slot in slots:
                busy += await self._look_at(slot)
        return busy

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _look_at(self, slot: Slot) -> float:
        self.heard(slot)
        lookout = self._lookouts.get(slot.account)
        if lookout is None or not slot.ready:
            return 0.0
        latest = 0

        def now() -> int:
            nonlocal latest
            latest = max(latest, slot.now() or 0)
            return latest

        state, inherited, busy = lookout.state, 0, 0.0
        began = perf_counter()
        for found in lookout.look(now):
            inherited += sum(alert.inherited for alert in found)
            self._tell([alert for alert in found if not alert.inherited])
            busy += perf_counter() - began
            await asyncio.sleep(0)
            if slot.state is not state or lookout.state is not state:
                break
            began = perf_counter()
        if inherited:
            _log.info(
                "thresholds were reached before this server took the ledger", ledger=slot.account, count=inherited
            )
        return busy

    def _tell(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            self.counts[alert.ledger, alert.kind.value] += 1
            log = _log.info if alert.kind is Kind.LIMIT_MOVED else _log.warning
            log(_LINES[alert.kind], **alert.fields())
            if self.webhook is not None:
                self.webhook.post(alert.json(self._server), alert.id)
