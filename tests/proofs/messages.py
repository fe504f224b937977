"""Messages for the fuzz proof: valid ones, and what becomes of them when somebody does not mean well."""

from __future__ import annotations

import random
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from paceline_client.stubs import v1 as pb

COORDINATOR = {
    "Reserve": pb.ReserveRequest,
    "Commit": pb.CommitRequest,
    "Release": pb.ReleaseRequest,
    "Renew": pb.RenewRequest,
    "Observe": pb.ObserveRequest,
}
ADMIN = {
    "ListLedgers": pb.ListLedgersRequest,
    "GetLedger": pb.GetLedgerRequest,
    "ListPools": pb.ListPoolsRequest,
    "GetPool": pb.GetPoolRequest,
    "PausePool": pb.PausePoolRequest,
    "ResumePool": pb.ResumePoolRequest,
    "UpdateLimit": pb.UpdateLimitRequest,
    "SetMode": pb.SetModeRequest,
    "ListShares": pb.ListSharesRequest,
    "GetShare": pb.GetShareRequest,
    "UpdateShare": pb.UpdateShareRequest,
    "GetSpend": pb.GetSpendRequest,
    "ListReservations": pb.ListReservationsRequest,
    "GetReservation": pb.GetReservationRequest,
    "UpdateReservation": pb.UpdateReservationRequest,
    "CancelReservation": pb.CancelReservationRequest,
    "Explain": pb.ExplainRequest,
    "Watch": pb.WatchRequest,
}

MODELS = ("claude-sonnet-5", "claude-haiku-5-5", "claude-opus-5-5")
ACCOUNTS = ("main", "spare")
TENANTS = ("", "chat", "chat-2", "search", "research-7", "nobody")
POOLS = tuple(f"anthropic/{account}/{name}" for account in ACCOUNTS for name in ("sonnet-5", "haiku-5-5", "opus-5-5"))

_MANY = 70
_INTS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), -1_000_000, -2, -1, 0, 1, 2, 1_000_000_000, 1_000_000_001, (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), -1, 0, 1, 1 << 53, 315_576_000_001, 253_402_300_800, (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT64: (0, 1, 2, 1 << 31, 1 << 53, (1 << 63), (1 << 64) - 1),
    FieldDescriptor.TYPE_ENUM: (-(1 << 31), -1, 0, 1, 2, 3, 5, 6, 7, 8, 99, (1 << 31) - 1),
}
_HEADER_NAMES = (
    "anthropic-ratelimit-requests-limit",
    "anthropic-ratelimit-requests-remaining",
    "anthropic-ratelimit-requests-reset",
    "anthropic-ratelimit-input-tokens-limit",
    "anthropic-ratelimit-input-tokens-remaining",
    "anthropic-ratelimit-output-tokens-limit",
    "Anthropic-RateLimit-Output-Tokens-Reset",
    "retry-after",
    "retry-after-ms",
    "date",
    "x-ratelimit-limit-requests",
    "x-ratelimit-reset-tokens",
    "authorization",
    "x-api-key",
    "",
)
_HEADER_VALUES = (
    b"",
    b"0",
    b"-1",
    b"1",
    b"50",
    b"59999",
    b"60000",
    b"9" * 19,
    b"9" * 400,
    b"1e309",
    b"nan",
    b"inf",
    b"-inf",
    b"0x10",
    b" 7 ",
    b"\xff\xfe\x00",
    "٣".encode(),
    b"2026-13-45T99:99:99Z",
    b"9999-12-31T23:59:59Z",
    b"0001-01-01T00:00:00Z",
    b"Fri, 31 Dec 9999 23:59:59 GMT",
    b"6m0s",
    b"99999999999999999h",
)


@dataclass
class Grant:
    """A grant that somebody has received."""

    identity: str
    number: str
    context: bytes
    children: tuple[str, ...]


@dataclass
class Maker:
    """Makes messages. It remembers what was granted, so that it can be misused."""

    rng: random.Random
    grants: deque[Grant] = field(default_factory=lambda: deque(maxlen=400))
    ids: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    tokens: deque[str] = field(default_factory=lambda: deque(maxlen=50))
    """Page tokens, etags, resume tokens."""

    # -- valid ------------------------------------------------------------------------------------------------------

    def id(self) -> str:
        number = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        self.ids.append(number)
        return number

    def known_id(self) -> str:
        """One that was used, and then maybe once more a new one."""
        if self.ids and self.rng.random() < 0.8:
            return self.rng.choice(self.ids)
        return self.id()

    def target(self) -> pb.Target:
        return pb.Target(provider="anthropic", account=self.rng.choice(ACCOUNTS), model=self.rng.choice(MODELS))

    def reserve(self, *, new: bool = True) -> pb.ReserveRequest:
        rng = self.rng
        request = pb.ReserveRequest(
            reservation_id=self.id() if new else self.known_id(),
            tenant=rng.choice(TENANTS),
            priority=rng.choice((0, 1, 2, 3)),  # type: ignore[arg-type] # numbers of the enum
            route=rng.choice(("", "summary", "é ü")),
        )
        for _ in range(rng.choice((1, 1, 1, 2))):
            candidate = request.candidates.add(target=self.target())
            candidate.estimate.input_tokens = rng.randint(0, 2_000)
            candidate.estimate.output_tokens = rng.randint(0, 500)
        request.hold.seconds = rng.randint(1, 3)
        request.max_wait.nanos = rng.choice((0, 0, 50_000_000))
        if rng.random() < 0.1:
            request.count = rng.randint(1, 5)
            request.allow_partial = rng.random() < 0.5
        return request

    def outcome(self) -> pb.Outcome:
        rng = self.rng
        outcome = pb.Outcome(disposition=rng.choice((1, 1, 1, 2, 3, 4, 5, 6)))  # type: ignore[arg-type] # numbers
        outcome.http_status = rng.choice((200, 200, 429, 500, 529))
        if rng.random() < 0.7:
            outcome.usage.input_tokens = rng.randint(0, 3_000)
            outcome.usage.output_tokens = rng.randint(0, 900)
        if rng.random() < 0.4:
            for _ in range(rng.randint(1, 4)):
                outcome.headers.add(name=rng.choice(_HEADER_NAMES), value=rng.choice(_HEADER_VALUES))
        if rng.random() < 0.3:
            outcome.header_age.nanos = rng.randint(0, 999_999_999)
        if rng.random() < 0.2:
            outcome.error.type = rng.choice(("rate_limit_error", "overloaded_error", "x", ""))
            outcome.error.message = rng.choice(
                ("This request would exceed your rate limit of 50 requests per minute", "(" * 200, "%s%n{0}", "é" * 500)
            )
            outcome.error.details = rng.choice((b"", b"{" * 300, b"\xff" * 40, b'{"error": {"retry_after": 1e999}}'))
        return outcome

    def grant(self) -> Grant | None:
        return self.rng.choice(self.grants) if self.grants else None

    def _named(self, identity: str) -> tuple[str, bytes]:
        """Id and context of a grant of ``identity``, or an id without context."""
        mine = [grant for grant in self.grants if grant.identity == identity]
        if mine and self.rng.random() < 0.7:
            grant = self.rng.choice(mine)
            number = self.rng.choice((grant.number, *grant.children))
            return number, grant.context if self.rng.random() < 0.7 else b""
        return self.known_id(), b""

    def valid(self, name: str, identity: str = "") -> Message:
        """A message that is well formed; whether it makes sense now is another question."""
        rng = self.rng
        number, context = self._named(identity)
        pool, ledger = rng.choice(POOLS), rng.choice(ACCOUNTS)
        page: dict[str, Any] = {"page_size": rng.choice((0, 1, 3, 1_000))}
        if self.tokens and rng.random() < 0.2:
            page["page_token"] = rng.choice(self.tokens)
        match name:
            case "Reserve":
                return self.reserve(new=rng.random() < 0.8)
            case "Commit":
                return pb.CommitRequest(reservation_id=number, context=context, outcome=self.outcome())
            case "Release":
                targets = [self.target() for _ in range(rng.choice((0, 1, 2)))]
                return pb.ReleaseRequest(reservation_id=number, context=context, targets=targets)
            case "Renew":
                request = pb.RenewRequest(reservation_id=number, context=context, output_tokens=rng.randint(0, 900))
                request.hold.seconds = rng.choice((0, 1, 3))
                if rng.random() < 0.5:
                    request.observation.CopyFrom(self.outcome())
                return request
            case "Observe":
                return pb.ObserveRequest(
                    observation_id=rng.choice(("", self.known_id())),
                    target=self.target(),
                    tenant=rng.choice(TENANTS),
                    outcome=self.outcome(),
                )
            case "ListLedgers":
                return pb.ListLedgersRequest(**page)
            case "GetLedger":
                return pb.GetLedgerRequest(name=ledger)
            case "ListPools":
                return pb.ListPoolsRequest(ledger=rng.choice(("", ledger)), **page)
            case "GetPool":
                return pb.GetPoolRequest(name=pool)
            case "PausePool":
                return pb.PausePoolRequest(name=pool, reason="fuzz")
            case "ResumePool":
                return pb.ResumePoolRequest(name=pool)
            case "UpdateLimit":
                limit = pb.DimensionRef(pool=pool, dimension=rng.choice((1, 2, 3)), window=2)  # type: ignore[arg-type]
                if rng.random() < 0.5:
                    return pb.UpdateLimitRequest(limit=limit, clear=True)
                return pb.UpdateLimitRequest(limit=limit, override=pb.LimitOverride(limit=rng.randint(0, 10**9)))
            case "SetMode":
                return pb.SetModeRequest(
                    ledger=ledger,
                    tenant=rng.choice(TENANTS),
                    mode=rng.choice((1, 2)),  # type: ignore[arg-type]
                )
            case "ListShares":
                return pb.ListSharesRequest(pool=rng.choice(("", pool)), **page)
            case "GetShare":
                return pb.GetShareRequest(ledger=ledger, name=rng.choice(("product", "product/chat")))
            case "UpdateShare":
                return pb.UpdateShareRequest(share=pb.Share(ledger=ledger, name="product/new"), allow_missing=True)
            case "GetSpend":
                return pb.GetSpendRequest(ledger=ledger, share=rng.choice(("", "product")))
            case "ListReservations":
                states = rng.sample(pb.ReservationState.values(), 2)
                return pb.ListReservationsRequest(ledger=rng.choice(("", ledger)), states=states, **page)
            case "GetReservation":
                return pb.GetReservationRequest(reservation_id=number)
            case "UpdateReservation":
                update = pb.UpdateReservationRequest(reservation_id=number)
                update.expires_in.seconds = rng.randint(0, 3)
                return update
            case "CancelReservation":
                return pb.CancelReservationRequest(reservation_id=number, not_sent=rng.random() < 0.5)
            case "Explain":
                return pb.ExplainRequest(reservation_id=number)
            case "Watch":
                return pb.WatchRequest(pools=rng.choice(((), (pool,))), reservations=rng.random() < 0.5)
            case _:
                raise ValueError(name)

    # -- not meant well -----------------------------------------------------------------------------------------------

    def bend(self, message: Message, times: int | None = None) -> None:
        """Change fields to values that no honest caller sends."""
        for _ in range(self.rng.randint(1, 4) if times is None else times):
            self._bend(message, 0)

    def _bend(self, message: Message, depth: int) -> None:
        rng = self.rng
        fields: Any = message.DESCRIPTOR.fields
        if not fields or depth > 6:
            return
        chosen: FieldDescriptor = rng.choice(fields)
        name = chosen.name
        if rng.random() < 0.1:
            message.ClearField(name)
            return
        value = getattr(message, name)
        if chosen.is_repeated:
            self._bend_list(chosen, value, depth)
        elif chosen.type == FieldDescriptor.TYPE_MESSAGE:
            value.SetInParent()
            kind = value.DESCRIPTOR.full_name
            if kind in ("google.protobuf.Duration", "google.protobuf.Timestamp"):
                value.seconds, value.nanos = self._seconds(), self._nanos()
            else:
                self._bend(value, depth + 1)
        else:
            setattr(message, name, self._scalar(chosen))

    def _bend_list(self, chosen: FieldDescriptor, value: Any, depth: int) -> None:
        rng = self.rng
        count = rng.choice((1, 1, 2, 17, _MANY))
        if chosen.type == FieldDescriptor.TYPE_MESSAGE:
            if len(value) and rng.random() < 0.6:
                self._bend(rng.choice(value), depth + 1)
                return
            for _ in range(count):
                added = value.add()
                if len(value) > 1:
                    added.CopyFrom(value[0])
                else:
                    self._bend(added, depth + 1)
        else:
            value.extend(self._scalar(chosen) for _ in range(count))

    def _seconds(self) -> int:
        return self.rng.choice(_INTS[FieldDescriptor.TYPE_INT64])

    def _nanos(self) -> int:
        return self.rng.choice((-(1 << 31), -999_999_999, -1, 0, 1, 999, 999_999_999, 1_000_000_000, (1 << 31) - 1))

    def _scalar(self, chosen: FieldDescriptor) -> Any:
        rng = self.rng
        if chosen.type in _INTS:
            return rng.choice(_INTS[chosen.type])
        if chosen.type == FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        if chosen.type == FieldDescriptor.TYPE_BYTES:
            return self._bytes()
        if chosen.type == FieldDescriptor.TYPE_STRING:
            return self._text()
        return rng.choice((float("nan"), float("inf"), -1.0, 1e308))

    def _text(self) -> str:
        rng = self.rng
        return rng.choice(
            (
                "",
                "\0",
                "x" * 129,
                "x" * 5_000,
                "é" * 128,
                "\u202eabc\u2066",
                "../../etc/passwd",
                "*",
                "[a-",
                "{0.__class__}%s",
                "anthropic",
                "main",
                "spare",
                f"account-{rng.randint(0, 40)}",
                f"model-{rng.randint(0, 400)}",
                "claude-sonnet-5",
                "product/chat",
                "🙂" * 40,
                "00000000-0000-0000-0000-000000000000",
                self.known_id().upper(),
                self.known_id()[:-1],
                rng.choice(POOLS),
                rng.choice(self.tokens) if self.tokens else "!",
                "1." + "9" * 30,
            )
        )

    def _bytes(self) -> bytes:
        rng = self.rng
        grant = self.grant()
        if grant is not None and rng.random() < 0.5:
            return self.forged(grant.context) if rng.random() < 0.5 else grant.context
        return rng.choice((b"", b"\x01", b"\x00" * 17, rng.randbytes(40), rng.randbytes(9_000), *_HEADER_VALUES))

    def forged(self, context: bytes) -> bytes:
        """A context that is not quite the one that was signed."""
        rng = self.rng
        changed = bytearray(context)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        if bytes(changed) == context:
            changed[0] ^= 0x80
        return bytes(changed)

    def garble(self, raw: bytes) -> bytes:
        """Change the encoding itself."""
        rng = self.rng
        changed = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(changed) + 1)
            match rng.randrange(7):
                case 0 if changed:
                    changed[place % len(changed)] ^= 1 << rng.randrange(8)
                case 1:
                    changed[place:place] = rng.randbytes(rng.randint(1, 8))
                case 2:
                    del changed[place : place + rng.randint(1, 8)]
                case 3:
                    del changed[place:]
                case 4:
                    changed += changed[place : place + 40]
                case 5:
                    changed[place:place] = b"\xff" * 11
                case _:
                    # A length that promises far too much, or a group that never ends.
                    changed[place:place] = rng.choice(
                        (b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 120, b"\x12\x80\x80\x80\x80\x08")
                    )
        return bytes(changed)

    def noise(self) -> bytes:
        """Bytes that never were a message."""
        rng = self.rng
        return rng.randbytes(rng.choice((0, 1, 2, 7, 30, 200, 3_000)))
