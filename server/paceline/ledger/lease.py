"""The rules of a shared journal's head: who may write, and what may follow. Pure; the store's scripts do the same.

Several processes may want to write one ledger's journal. The store keeps, beside the records, one :class:`Head`: the
last record, the **epoch** and the random **nonce** of the owner that may append the next, and until when its **lease**
runs. The lease is for liveness alone: it says when others may try. Safety rests on the comparison that every write
makes: a record is accepted only from the head's epoch and nonce, behind the head's record, by number and by hash.

Each function takes a head (``None``: there is none) and the store's own time in µs, and gives the head that the store
has to write, with its answer; or raises :class:`Refused`, and nothing is written. ``ledger/redis/lua`` holds the same
rules as scripts; one test kit compares the two.
"""

from __future__ import annotations

import msgspec


class Head(msgspec.Struct, frozen=True, gc=False):
    """Where a shared journal ends, and who may go on. Times are the store's, in µs; ``at`` is ledger time."""

    epoch: int
    nonce: bytes
    """Random, 16 bytes: two owners that reach one epoch number over two primaries differ in it."""
    node: str
    """The owner's process."""
    address: str
    """Where its peers reach it; empty: nowhere."""
    seq: int
    hash: bytes
    """Of the last record."""
    at: int
    """Ledger time of the last record."""
    written_at: int
    """When the last record was written."""
    confirmed_at: int
    """When the owner was last known to live: its last append, renewal or acquisition."""
    until: int
    """The lease's end."""
    base_seq: int
    base_hash: bytes
    """The last record before this epoch."""
    lineage: str
    """The store's primary in whose life the owner took over, or confirmed last."""
    form: int
    """The form of events and dumps that the ledger's owners may write; raised by an operator alone."""
    successor: str = ""
    """The node that may take over before ``until``, because the owner has let go."""
    snapshot: str = ""
    """Name of the snapshot that counts; empty: none."""
    snapshot_seq: int = 0
    snapshot_at: int = 0
    snapshot_hash: bytes = b""
    snapshot_digest: bytes = b""
    snapshot_chunks: int = 0
    check: bytes = b""
    """A lone :class:`~paceline.ledger.journal.Mark`, packed; empty: none. Opaque here."""


class Claim(msgspec.Struct, frozen=True, gc=False):
    """What a process says that wants to own a ledger."""

    node: str
    address: str
    nonce: bytes
    lease_us: int
    lineage: str
    """The store's primary as this process sees it."""
    genesis: bytes
    """The hash before the first record."""
    form: int
    """The newest form that it reads and writes."""
    first_form: int
    """The form of a ledger that it makes."""
    depose: int = 0
    """The epoch that it has found dead (its connection was refused): that lease need not be waited for."""
    lag_us: int = 0
    """How far the primary before may have been ahead of this one, and how long it may have gone on."""
    above: int = 0
    """The highest epoch that it knows of: a store that has gone back must not begin an epoch again."""


class Held(Exception):
    """Nothing was written: ``head`` is another owner's, whose lease runs for ``left_us`` more."""

    def __init__(self, head: Head, left_us: int) -> None:
        super().__init__(f"epoch {head.epoch} of {head.node}, for {left_us} µs more")
        self.head = head
        self.left_us = left_us


class TooNew(Exception):
    """Nothing was written: the journal is of form ``head.form``, which the claimant does not read."""

    def __init__(self, head: Head) -> None:
        super().__init__(f"form {head.form}")
        self.head = head


class Fenced(Exception):
    """Nothing was written: the journal ends elsewhere, or is another owner's. ``head`` of ``None``: it is empty."""

    def __init__(self, head: Head | None) -> None:
        super().__init__("no head" if head is None else f"epoch {head.epoch} of {head.node}, record {head.seq}")
        self.head = head


Refused = Held | TooNew | Fenced


def acquire(head: Head | None, claim: Claim, now: int) -> Head:
    """Become the owner, under the next epoch. Raises :class:`Held` or :class:`TooNew`.

    The same claim again (its nonce tells) is answered by the head as it is, so that a lost answer does no harm.
    """
    if head is None:
        return Head(
            epoch=claim.above + 1,
            nonce=claim.nonce,
            node=claim.node,
            address=claim.address,
            seq=0,
            hash=claim.genesis,
            at=0,
            written_at=0,
            confirmed_at=now,
            until=now + claim.lease_us,
            base_seq=0,
            base_hash=claim.genesis,
            lineage=claim.lineage,
            form=claim.first_form,
        )
    if head.nonce == claim.nonce:
        return head
    if head.form > claim.form:
        raise TooNew(head)
    free_at = head.until
    if head.lineage == claim.lineage:
        if head.successor:
            if head.successor == claim.node:
                free_at = now
        elif claim.depose and claim.depose == head.epoch:
            free_at = now
    else:
        # The owner may have renewed its lease, or written, with the primary before.
        free_at += claim.lag_us
    if now < free_at:
        raise Held(head, free_at - now)
    return msgspec.structs.replace(
        head,
        epoch=max(head.epoch, claim.above) + 1,
        nonce=claim.nonce,
        node=claim.node,
        address=claim.address,
        confirmed_at=now,
        until=now + claim.lease_us,
        base_seq=head.seq,
        base_hash=head.hash,
        lineage=claim.lineage,
        successor="",
    )


def append(
    head: Head | None,
    epoch: int,
    nonce: bytes,
    seq: int,
    previous: bytes,
    hash: bytes,
    at: int,
    lease_us: int,
    now: int,
) -> tuple[Head, bool]:
    """Accept record ``seq``, which follows ``previous``. ``False``: it is there already, an identical resend.

    Extends the lease. Raises :class:`Fenced`.
    """
    if head is None or head.epoch != epoch or head.nonce != nonce:
        raise Fenced(head)
    if head.seq == seq and head.hash == hash:
        return msgspec.structs.replace(head, confirmed_at=now, until=now + lease_us), False
    if head.seq + 1 != seq or head.hash != previous:
        raise Fenced(head)
    return (
        msgspec.structs.replace(
            head, seq=seq, hash=hash, at=at, written_at=now, confirmed_at=now, until=now + lease_us, successor=""
        ),
        True,
    )


def renew(
    head: Head | None, epoch: int, nonce: bytes, seq: int, hash: bytes, lineage: str, lease_us: int, now: int
) -> Head:
    """Extend the lease without a record, if the journal ends where the owner believes. Raises :class:`Fenced`.

    ``lineage`` is the primary that the owner now writes to, after a failover another one than before.
    """
    if head is None or head.epoch != epoch or head.nonce != nonce or head.seq != seq or head.hash != hash:
        raise Fenced(head)
    return msgspec.structs.replace(head, confirmed_at=now, until=now + lease_us, lineage=lineage, successor="")


def release(
    head: Head | None, epoch: int, nonce: bytes, seq: int, hash: bytes, successor: str, grace_us: int, now: int
) -> Head:
    """Let go. ``successor`` may take over at once, anybody else after ``grace_us``; empty: anybody at once.

    The epoch and nonce stay: no record of this owner is accepted any more only once another one has taken over, so the
    owner itself must write nothing after this. Raises :class:`Fenced`.
    """
    if head is None or head.epoch != epoch or head.nonce != nonce or head.seq != seq or head.hash != hash:
        raise Fenced(head)
    return msgspec.structs.replace(head, until=now + (grace_us if successor else 0), successor=successor)


def reassert(
    head: Head | None,
    expected: Head | None,
    new: Head,
    now: int,
) -> Head:
    """Put back what a failover of the store has lost: ``new`` takes the place of ``expected``, and the records that
    lie between go behind it. Raises :class:`Fenced` if the head is not ``expected`` by epoch, nonce, number and hash.
    """
    if not same(head, expected):
        raise Fenced(head)
    return msgspec.structs.replace(new, confirmed_at=now, until=now + (new.until - new.confirmed_at))


def same(one: Head | None, other: Head | None) -> bool:
    """Whether two heads are of one owner, at one record."""
    if one is None or other is None:
        return one is other
    return (one.epoch, one.nonce, one.seq, one.hash) == (other.epoch, other.nonce, other.seq, other.hash)


def keep_snapshot(
    head: Head | None, epoch: int, nonce: bytes, name: str, seq: int, at: int, hash: bytes, digest: bytes, chunks: int
) -> Head:
    """Let a snapshot whose chunks are written count from now on. Raises :class:`Fenced`."""
    if head is None or head.epoch != epoch or head.nonce != nonce or seq > head.seq or seq < head.snapshot_seq:
        raise Fenced(head)
    return msgspec.structs.replace(
        head,
        snapshot=name,
        snapshot_seq=seq,
        snapshot_at=at,
        snapshot_hash=hash,
        snapshot_digest=digest,
        snapshot_chunks=chunks,
    )


def keep_check(head: Head | None, epoch: int, nonce: bytes, check: bytes) -> Head:
    """Keep a lone mark. Raises :class:`Fenced`."""
    if head is None or head.epoch != epoch or head.nonce != nonce:
        raise Fenced(head)
    return msgspec.structs.replace(head, check=check)


def finalize(head: Head | None, epoch: int, nonce: bytes, form: int) -> Head:
    """Let owners write form ``form`` from now on; there is no way back. Raises :class:`Fenced`."""
    if head is None or head.epoch != epoch or head.nonce != nonce or form < head.form:
        raise Fenced(head)
    return msgspec.structs.replace(head, form=form)
