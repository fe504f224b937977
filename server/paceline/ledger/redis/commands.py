"""The commands of a shared store, each one script in Redis."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from paceline.ledger.commands import NodeInfo, Nodes, Stamped
from paceline.ledger.journal import Record, StoreCorrupt, StoreError, StoreUnavailable
from paceline.ledger.lease import Claim, Fenced, Head, Held, TooNew
from paceline.ledger.redis import scripts
from paceline.ledger.redis.client import Client, Primary
from paceline.ledger.redis.scripts import Script

CHUNK_SECONDS = 3_600
"""How long a part of a snapshot is kept that does not count yet."""
MOST = 1 << 53
"""Numbers must be below: in the store's scripts they are doubles."""

_FIELDS = Head.__struct_fields__
"""In the order of ``lua/_head.lua``."""
_KINDS = tuple(field.type for field in msgspec.structs.fields(Head))


class RedisCommands:
    """:class:`paceline.ledger.commands.Commands` over Redis. :meth:`connect` first.

    A ledger's keys share one hash tag, so they live on one node of a cluster::

        {paceline:LEDGER}:head            a hash: the head
        {paceline:LEDGER}:log             a stream: records under SEQ-0
        {paceline:LEDGER}:snapshot:NAME   a hash: parts by number
        {paceline}:ledgers, :nodes, :alive, :meta
    """

    def __init__(self, client: Client, prefix: str = "paceline") -> None:
        self._client = client
        self._prefix = prefix
        self._primaries: list[Primary] = []
        self._lineage = ""
        self._failures = 0

    # --- which primary ------------------------------------------------------------------------------------------

    async def connect(self) -> list[Primary]:
        """Find the primary, or all of a cluster, and remember who they are."""
        failures = self._client.failures
        primaries = await self._client.primaries()
        known = {primary.address: primary for primary in self._primaries}
        # One that is away is taken for the one it was: a claim that reaches another is refused by the script.
        primaries = [primary if primary.info else known.get(primary.address, primary) for primary in primaries]
        self._primaries = primaries
        self._failures = failures
        identities = sorted(primary.identity for primary in primaries)
        if len(identities) == 1:
            self._lineage = identities[0]
        else:
            self._lineage = hashlib.sha256("\n".join(identities).encode()).hexdigest()[:40]
        return primaries

    async def lineage(self) -> str:
        if not self._lineage or self._failures != self._client.failures:
            await self.connect()
        return self._lineage

    # --- a ledger -----------------------------------------------------------------------------------------------

    async def head(self, ledger: str) -> Stamped:
        return await self._stamped(scripts.HEAD, [self._key(ledger, "head")])

    async def acquire(self, ledger: str, claim: Claim) -> Stamped:
        if claim.lineage != await self.lineage():
            raise StoreUnavailable(
                f"{self._client.name}: the primary has changed since the claim was made: claim again"
            )
        key = self._key(ledger, "head")
        primary = self._client.identity_for(self._primaries, key)
        # Listed first: a name without a ledger does no harm, a ledger without its name would not be found.
        await self._client.call("SADD", self._shared("ledgers"), ledger)
        return await self._stamped(
            scripts.ACQUIRE,
            [key],
            claim.node,
            claim.address,
            claim.nonce,
            _int(claim.lease_us),
            claim.lineage,
            claim.genesis,
            _int(claim.form),
            _int(claim.first_form),
            _int(claim.depose),
            _int(claim.lag_us),
            _int(claim.above),
            primary,
        )

    async def append(self, ledger: str, epoch: int, nonce: bytes, record: Record, lease_us: int) -> Stamped:
        return await self._stamped(
            scripts.APPEND,
            [self._key(ledger, "head"), self._key(ledger, "log")],
            _int(epoch),
            nonce,
            _int(record.seq),
            record.previous,
            record.hash,
            _int(record.at),
            _int(lease_us),
            record.pack(),
        )

    async def renew(
        self, ledger: str, epoch: int, nonce: bytes, seq: int, hash: bytes, lineage: str, lease_us: int
    ) -> Stamped:
        return await self._stamped(
            scripts.RENEW,
            [self._key(ledger, "head")],
            _int(epoch),
            nonce,
            _int(seq),
            hash,
            lineage,
            _int(lease_us),
        )

    async def release(
        self, ledger: str, epoch: int, nonce: bytes, seq: int, hash: bytes, successor: str, grace_us: int
    ) -> Stamped:
        return await self._stamped(
            scripts.RELEASE,
            [self._key(ledger, "head")],
            _int(epoch),
            nonce,
            _int(seq),
            hash,
            successor,
            _int(grace_us),
        )

    async def reassert(self, ledger: str, expected: Head | None, new: Head, records: Sequence[Record]) -> Stamped:
        """See the protocol. The records ascend by one, and end with the new head's; else ``ValueError``."""
        _check_run(expected, new, records)
        before: tuple[bytes | str | int, ...] = ("0", "", "", "", "")
        if expected is not None:
            before = ("1", _int(expected.epoch), expected.nonce, _int(expected.seq), expected.hash)
        behind: list[bytes | str | int] = []
        for record in records:
            behind += (_int(record.seq), record.pack())
        return await self._stamped(
            scripts.REASSERT,
            [self._key(ledger, "head"), self._key(ledger, "log"), self._snapshot(ledger, new.snapshot)],
            *before,
            *_values(new),
            *behind,
            bulk=True,
        )

    async def read(self, ledger: str, after: int, count: int, most_bytes: int = 4_194_304) -> list[Record]:
        packed: list[bytes] = await self._client.run(
            scripts.READ, [self._key(ledger, "log")], _int(after), _int(count), _int(most_bytes), bulk=True
        )
        records = []
        for data in packed:
            try:
                records.append(Record.unpack(data))
            except ValueError as error:
                raise StoreCorrupt(
                    f"{self._client.name}: ledger {ledger}: {error}, behind record "
                    f"{records[-1].seq if records else after}: restore the store from a backup"
                ) from None
        return records

    async def put_chunk(self, ledger: str, snapshot: str, index: int, chunk: bytes) -> None:
        keys = [self._key(ledger, "head"), self._snapshot(ledger, snapshot)]
        await self._client.run(scripts.PUT_CHUNK, keys, snapshot, _int(index), chunk, CHUNK_SECONDS, bulk=True)

    async def get_chunks(self, ledger: str, snapshot: str, start: int, count: int) -> list[bytes]:
        if count < 1:
            return []
        wanted = range(start, start + count)
        chunks = await self._client.call("HMGET", self._snapshot(ledger, snapshot), *wanted, bulk=True)
        found: list[bytes] = []
        for chunk in chunks:
            if chunk is None:
                break
            found.append(chunk)
        return found

    async def keep_snapshot(
        self,
        ledger: str,
        epoch: int,
        nonce: bytes,
        name: str,
        seq: int,
        at: int,
        hash: bytes,
        digest: bytes,
        chunks: int,
        keep_after: int,
    ) -> Stamped:
        """See the protocol. Also raises ``StoreUnavailable`` if the store has lost parts of the snapshot meanwhile."""
        if keep_after > seq:
            raise ValueError("records behind the snapshot must be kept")
        return await self._stamped(
            scripts.KEEP_SNAPSHOT,
            [self._key(ledger, "head"), self._key(ledger, "log"), self._snapshot(ledger, name)],
            _int(epoch),
            nonce,
            name,
            _int(seq),
            _int(at),
            hash,
            digest,
            _int(chunks),
            _int(keep_after),
            bulk=True,
        )

    async def keep_check(self, ledger: str, epoch: int, nonce: bytes, check: bytes) -> Stamped:
        return await self._stamped(scripts.KEEP_CHECK, [self._key(ledger, "head")], _int(epoch), nonce, check)

    async def finalize(self, ledger: str, epoch: int, nonce: bytes, form: int) -> Stamped:
        return await self._stamped(scripts.FINALIZE, [self._key(ledger, "head")], _int(epoch), nonce, _int(form))

    # --- the store ----------------------------------------------------------------------------------------------

    async def announce(self, node: NodeInfo, ttl_us: int) -> Nodes:
        """See the protocol. Also looks whether the primary is still the one it was."""
        keys = [self._shared("nodes"), self._shared("alive"), self._shared("ledgers")]
        packed = msgspec.msgpack.encode(node)
        now, pairs, ledgers = await self._client.run(scripts.ANNOUNCE, keys, node.node, packed, _int(ttl_us))
        await self.connect()
        nodes = {}
        for name, data in zip(pairs[::2], pairs[1::2], strict=True):
            try:
                nodes[name.decode()] = msgspec.msgpack.decode(data, type=NodeInfo)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # of a version that says it otherwise
        return Nodes(nodes, int(now), tuple(sorted(name.decode() for name in ledgers)))

    async def ledgers(self) -> list[str]:
        return sorted(name.decode() for name in await self._client.call("SMEMBERS", self._shared("ledgers")))

    async def get_meta(self, key: str) -> bytes | None:
        value: bytes | None = await self._client.call("HGET", self._shared("meta"), key)
        return value

    async def put_meta(self, key: str, value: bytes) -> bytes:
        kept: bytes = await self._client.run(scripts.PUT_META, [self._shared("meta")], key, value)
        return kept

    # --- in between ---------------------------------------------------------------------------------------------

    def _key(self, ledger: str, what: str) -> str:
        return f"{{{self._prefix}:{quote(ledger, safe='')}}}:{what}"

    def _snapshot(self, ledger: str, name: str) -> str:
        return self._key(ledger, f"snapshot:{name}")

    def _shared(self, what: str) -> str:
        return f"{{{self._prefix}}}:{what}"

    async def _stamped(
        self, script: Script, keys: Sequence[str], *args: bytes | str | int, bulk: bool = False
    ) -> Stamped:
        answer = await self._client.run(script, keys, *args, bulk=bulk)
        try:
            what, now, head = answer[0], int(answer[1]), _head(answer[2])
        except (ValueError, TypeError, IndexError):
            raise StoreCorrupt(f"{self._client.name}: {keys[0]} is not a head that this version knows") from None
        if what == b"ok":
            return Stamped(head, now, _head(answer[3]) if len(answer) > 3 else None)
        if what == b"fenced":
            raise Fenced(head)
        if what == b"gone":
            raise StoreUnavailable(f"{self._client.name}: parts of the snapshot are gone: write it again")
        if what == b"moved":
            self._lineage = ""
            raise StoreUnavailable(f"{self._client.name}: another primary is in charge now: claim again")
        if head is not None and what == b"held":
            raise Held(head, int(answer[3]))
        if head is not None and what == b"new":
            raise TooNew(head)
        raise StoreError(f"{self._client.name}: {script.name} answered {what!r}")


def _int(number: int) -> int:
    if not 0 <= number < MOST:
        raise ValueError(f"{number} is not from 0 to 2^53")
    return number


def _values(head: Head) -> list[bytes | str | int]:
    values: list[bytes | str | int] = []
    for name in _FIELDS:
        value = getattr(head, name)
        values.append(_int(value) if isinstance(value, int) else value)
    return values


def _head(values: Sequence[Any] | None) -> Head | None:
    """From the fields' values. Raises ``ValueError`` or ``TypeError`` if they are not a head's."""
    if values is None:
        return None
    if None in values:
        raise ValueError("a field is missing")
    fields: list[Any] = [
        int(value) if kind is int else value.decode() if kind is str else value
        for value, kind in zip(values, _KINDS, strict=True)
    ]
    return Head(*fields)


def _check_run(expected: Head | None, new: Head, records: Sequence[Record]) -> None:
    seq = records[0].seq - 1 if records else new.seq
    if expected is not None and new.snapshot == expected.snapshot and seq != expected.seq:
        raise ValueError("the records do not begin behind the head that they follow")
    for record in records:
        if record.seq != seq + 1:
            raise ValueError("the records do not ascend by one")
        seq = record.seq
    if seq != new.seq:
        raise ValueError("the records do not end with the head's")
