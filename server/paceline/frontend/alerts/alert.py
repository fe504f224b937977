"""One alert: as a value, as a message of ``Watch``, as JSON, and as a line of the log. No form of it holds a secret."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from paceline.engine.dimensions import UNLIMITED, Dimension, Window
from paceline_client.stubs import v1 as pb

FORM = 1
"""Version of the JSON. One that only adds fields keeps its number."""
_NANO = 1_000_000_000


class Kind(Enum):
    """What happened."""

    THRESHOLD = "threshold"
    CAP_REACHED = "cap_reached"
    LIMIT_MOVED = "limit_moved"


_MESSAGES = {
    Kind.THRESHOLD: pb.ALERT_KIND_THRESHOLD,
    Kind.CAP_REACHED: pb.ALERT_KIND_CAP_REACHED,
    Kind.LIMIT_MOVED: pb.ALERT_KIND_LIMIT_MOVED,
}
_UNITS = {
    Dimension.REQUESTS: "requests",
    Dimension.INPUT_TOKENS: "tokens",
    Dimension.OUTPUT_TOKENS: "tokens",
    Dimension.TOKENS: "tokens",
    Dimension.CONCURRENCY: "calls",
    Dimension.QUEUED_REQUESTS: "requests",
    Dimension.SPEND: "USD",
}
_PERIODS = {Window.MINUTE: " a minute", Window.DAY: " a day", Window.MONTH: " a month", Window.NONE: ""}


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that happened to a limit. Amounts in the dimension's unit (money: nano-dollars)."""

    kind: Kind
    ledger: str
    pool: str
    """Empty: a budget for money, over all pools."""
    share: str
    dimension: Dimension
    window: Window
    permille: int
    """The threshold in thousandths; zero: none."""
    used: int
    amount: int
    previous: int | None
    """The amount before, if that has changed; :data:`UNLIMITED` or more: there was no limit."""
    at: int
    """Ledger time in µs."""
    inherited: bool = False
    """It stood already when this process took the ledger over."""

    @property
    def id(self) -> str:
        """Of this very event, for whoever gets it twice."""
        parts = (
            self.ledger,
            self.kind.value,
            self.pool,
            self.share,
            int(self.dimension),
            int(self.window),
            self.permille,
            self.at,
        )
        return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()

    @property
    def name(self) -> str:
        """What it has in common with the alerts that take its place."""
        limit = f"{self.pool}\0{self.share}\0{int(self.dimension)}\0{int(self.window)}"
        return f"{self.ledger}\0{self.kind.value}\0{limit}\0{self.permille}"

    @property
    def text(self) -> str:
        """For people, in English."""
        what = f"{self.dimension.name.lower().replace('_', ' ')} of {self.whose}"
        amount = f"{self._spoken(self.amount)}{_PERIODS[self.window]}"
        if self.kind is Kind.LIMIT_MOVED:
            before = "none" if self.previous is None or self.previous >= UNLIMITED else self._spoken(self.previous)
            return f"{what}: the upstream's limit is {amount} now, it was {before}"
        part = f"{self.used / self.amount:.1%}" if self.amount else "all"
        used = f"{part} used ({self._spoken(self.used)} of {amount})"
        if self.kind is Kind.CAP_REACHED:
            return f"{what}: the cap is reached, calls are denied; {used}"
        return f"{what}: {used}, above the threshold of {self.permille / 10:g}%"

    @property
    def whose(self) -> str:
        """What the limit belongs to, for people."""
        scope = f"pool {self.pool}" if self.pool else f"account {self.ledger}"
        return f"share {self.share} in {scope}" if self.share else scope

    def message(self) -> pb.Alert:
        """As ``Watch`` shows it."""
        time = Timestamp()
        time.FromMicroseconds(self.at)
        found = pb.Alert(
            id=self.id,
            kind=_MESSAGES[self.kind],
            ledger=self.ledger,
            limit=pb.DimensionRef(
                pool=self.pool,
                share=self.share,
                dimension=pb.Dimension.ValueType(self.dimension),
                window=pb.Window.ValueType(self.window),
            ),
            threshold_permille=self.permille,
            used=self.used,
            amount=self.amount,
            time=time,
            inherited=self.inherited,
        )
        if self.previous is not None and self.previous < UNLIMITED:
            found.previous_amount = self.previous
        return found

    def fields(self) -> dict[str, object]:
        """What says everything: the fields of a line of the log, and with a few more those of the JSON."""
        previous = None if self.previous is None or self.previous >= UNLIMITED else self.shown(self.previous)
        time = Timestamp()
        time.FromMicroseconds(self.at)
        return {
            "id": self.id,
            "kind": self.kind.value,
            "ledger": self.ledger,
            "pool": self.pool,
            "share": self.share,
            "dimension": self.dimension.name.lower(),
            "window": self.window.name.lower(),
            "threshold": self.permille / 1_000 if self.permille else None,
            "used": self.shown(self.used),
            "amount": self.shown(self.amount),
            "previous_amount": previous,
            "unit": _UNITS[self.dimension],
            "time": time.ToJsonString(),
        }

    def json(self, server: str) -> bytes:
        """What is posted. ``server`` is the name of the one that says so."""
        return msgspec.json.encode({"version": FORM, **self.fields(), "server": server, "text": self.text})

    def shown(self, amount: int) -> float:
        """An amount in the unit that people see: money in dollars."""
        return amount / _NANO if self.dimension is Dimension.SPEND else amount

    def _spoken(self, amount: int) -> str:
        return f"${amount / _NANO:,.2f}" if self.dimension is Dimension.SPEND else f"{amount:,}"
