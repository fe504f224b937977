"""What is encoded by hand is what the generated classes read; contexts are ours and nobody else's."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.accounting import Prices
from paceline.engine.answers import (
    Committed,
    Denied,
    DimensionState,
    Granted,
    Reason,
    Released,
    Renewed,
    Touched,
    Would,
)
from paceline.engine.dimensions import UNLIMITED, Dimension, Window
from paceline.engine.keys import child_keys
from paceline.engine.operations import NO_PRICES, Context, DefinePool
from paceline.frontend import limits, wire
from paceline.frontend.context import TAG_BYTES, Signer, new_key
from paceline.frontend.errors import Code, Problem
from paceline.frontend.places import Destination
from paceline.frontend.replies import Replies
from paceline.providers import Resolved
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import MODEL, POOL

KEY = "anonymous/" + str(uuid.UUID(int=7))
LAYOUT = [
    (Dimension.REQUESTS, Window.MINUTE),
    (Dimension.INPUT_TOKENS, Window.MINUTE),
    (Dimension.INPUT_TOKENS, Window.DAY),
    (Dimension.SPEND, Window.MONTH),
]

amounts = st.integers(-(2**62), 2**62)
counts = st.integers(0, 2**60)


def destination() -> Destination:
    catalogue_definition = DefinePool(POOL, None, ())  # type: ignore[arg-type] # never looked at
    resolved = Resolved(
        account="default",
        provider="anthropic",
        pool=POOL,
        definition=catalogue_definition,
        prices=NO_PRICES,
        priced=True,
        header_family="anthropic",
        unknown=False,
        known_account=True,
    )
    return Destination(resolved, catalogue_definition, pb.Target(model=MODEL, region="eu"))


def context_of(key: str = KEY, count: int = 1, charges: tuple[tuple[Dimension, int], ...] = ()) -> Context:
    return Context(
        "default", key, POOL, ("team",), "acme", "chat", 1_800_000_000_000_000, charges, Prices(1, 2, 3, 4), count
    )


@given(st.integers(-(2**63), 2**63 - 1))
def test_varints_are_those_of_int64(value: int) -> None:
    message = pb.DimensionState(level=value)
    assert message.SerializeToString() == b"\x38" + wire.varint(value)


@given(st.integers(0, 10**15))
def test_durations(us: int) -> None:
    message = pb.Grant()
    message.expires_in.FromMicroseconds(us)
    assert wire.duration(4, us) == message.SerializeToString()


@given(
    index=st.integers(0, 300),
    expires=st.integers(0, 10**10),
    waited=st.integers(0, 10**9),
    most=st.integers(0, 10**9),
    level=amounts,
    held=counts,
    unlimited=st.booleans(),
    observed=st.sampled_from([None, Would(), Would(None, 5_000), Would(Reason.LIMIT)]),
)
def test_grants(
    index: int, expires: int, waited: int, most: int, level: int, held: int, unlimited: bool, observed: Would | None
) -> None:
    limit = UNLIMITED if unlimited else 1_000
    states = (
        DimensionState(POOL, "", Dimension.REQUESTS, Window.MINUTE, limit, limit, level, held),
        DimensionState(POOL, "team", Dimension.TOKENS, Window.DAY, 7, 9, 8, 0),
    )
    touched = Touched(Dimension.TOKENS, states)
    signer = Signer(new_key())
    replies = Replies(signer, lambda *_: LAYOUT)
    to = destination()
    answer = Granted((KEY,), 0, expires, waited, most, context_of(), touched, observed)
    encoded = replies.granted(answer, ((index, to),), len("anonymous/"))
    message = pb.ReserveResponse.FromString(encoded)
    grant = message.grant
    assert grant.candidate_index == index
    assert grant.target == to.target
    assert grant.target.provider == "anthropic"
    assert grant.max_output_tokens == most
    assert grant.HasField("max_output_tokens")
    assert grant.HasField("expires_in")
    assert grant.HasField("waited")
    assert grant.expires_in.ToMicroseconds() == expires
    assert grant.waited.ToMicroseconds() == waited
    assert grant.pool == POOL
    assert not grant.child_reservation_ids
    assert signer.open(grant.context, KEY) == answer.context
    assert [state.held for state in message.dimensions] == [held, 0]
    assert message.dimensions[0].HasField("limit") is not unlimited
    assert unlimited or message.dimensions[0].level == level
    assert message.dimensions[1].share == "team"
    assert message.HasField("binding_dimension") is bool(waited)
    if waited:
        assert message.binding_dimension.dimension == pb.DIMENSION_TOKENS
        assert message.binding_dimension.share == "team"
    elif observed is not None:
        assert message.HasField("observed_decision")
        assert message.observed_decision.reason == (observed.reason or 0)
    # A message of the same fields is the same message: nothing stands there that no field explains.
    assert pb.ReserveResponse.FromString(message.SerializeToString()) == message
    assert not message.fallback_shares


def test_a_bulk_grant_names_its_children() -> None:
    replies = Replies(Signer(new_key()), lambda *_: LAYOUT)
    keys = child_keys(KEY, 3)
    answer = Granted(keys, 0, 1, 0, 1, context_of(count=3), Touched(None, ()))
    message = pb.ReserveResponse.FromString(replies.granted(answer, ((0, destination()),), len("anonymous/")))
    assert [f"anonymous/{each}" for each in message.grant.child_reservation_ids] == list(keys)


@pytest.mark.parametrize("reason", list(Reason))
def test_denials(reason: Reason) -> None:
    state = DimensionState(POOL, "", Dimension.REQUESTS, Window.MINUTE, 60, 60, 0, 60)
    denied = Denied(reason, POOL, Dimension.REQUESTS, 1_500_000, Touched(Dimension.REQUESTS, (state,)))
    message = pb.ReserveResponse.FromString(Replies(Signer(new_key()), lambda *_: LAYOUT).denied(denied))
    assert pb.DenialReason.Name(message.denial.reason) == f"DENIAL_REASON_{reason.name}"
    assert message.denial.retry_after.ToMicroseconds() == 1_500_000
    assert message.denial.message
    assert message.binding_dimension.pool == POOL
    assert message.dimensions[0].held == 60


@given(
    charges=st.tuples(counts, counts, counts, counts),
    held=st.tuples(counts, counts, counts, counts),
    cost=st.integers(0, 10**15),
    known=st.booleans(),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    priced=st.booleans(),
)
def test_settlements(
    charges: tuple[int, int, int, int],
    held: tuple[int, int, int, int],
    cost: int,
    known: bool,
    flags: tuple[bool, bool, bool],
    priced: bool,
) -> None:
    dimensions = [dimension for dimension, _ in LAYOUT]
    answer = Committed(tuple(zip(dimensions, charges, strict=True)), cost, *flags)
    context = context_of(charges=tuple(zip(dimensions, held, strict=True))) if known else None
    replies = Replies(Signer(new_key()), lambda *_: LAYOUT)
    message = pb.CommitResponse.FromString(replies.committed(answer, "default", POOL, context, priced))
    assert [each.charged for each in message.settlements] == list(charges)
    assert [each.held for each in message.settlements] == (list(held) if known else [0, 0, 0, 0])
    assert [each.window for each in message.settlements] == [int(window) for _, window in LAYOUT]
    assert [each.pool for each in message.settlements] == [POOL, POOL, POOL, ""]
    assert (message.duplicate, message.late, message.stale) == flags
    assert message.HasField("cost") is (priced and not flags[2])
    if message.HasField("cost"):
        assert message.cost.units * 10**9 + message.cost.nanos == cost
        assert message.cost.currency_code == "USD"
    assert pb.CommitResponse.FromString(message.SerializeToString()) == message


def test_the_other_answers() -> None:
    replies = Replies(Signer(new_key()), lambda *_: LAYOUT)
    released = pb.ReleaseResponse.FromString(replies.released(Released(tombstone=True)))
    assert released == pb.ReleaseResponse(tombstone=True)
    renewed = pb.RenewResponse.FromString(replies.renewed(Renewed(2_000_000)))
    assert renewed.expires_in.seconds == 2
    ended = pb.RenewResponse.FromString(replies.renewed(Renewed(ended=True)))
    assert ended == pb.RenewResponse(ended=True)


# -- contexts ---------------------------------------------------------------------------------------------------


def refused(signer: Signer, sealed: bytes, key: str = KEY) -> Problem:
    with pytest.raises(Problem) as caught:
        signer.open(sealed, key)
    problem = caught.value
    assert problem.code is Code.INVALID_ARGUMENT
    assert problem.violations[0][0] == "context"
    return problem


def test_a_context_comes_back() -> None:
    signer = Signer(new_key())
    assert signer.open(signer.seal(context_of()), KEY) == context_of()


def test_it_is_an_hmac_of_sha256() -> None:
    import hashlib
    import hmac

    key = new_key()
    sealed = Signer(key).seal(context_of())
    assert hmac.new(key, sealed[:-TAG_BYTES], hashlib.sha256).digest()[:TAG_BYTES] == sealed[-TAG_BYTES:]


@given(st.integers(0), st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, change: int) -> None:
    signer = Signer(new_key())
    sealed = bytearray(signer.seal(context_of()))
    sealed[place % len(sealed)] ^= change
    refused(signer, bytes(sealed))


@given(st.integers(0, 400))
def test_nor_cut(length: int) -> None:
    signer = Signer(new_key())
    sealed = signer.seal(context_of())
    refused(signer, sealed[: length % len(sealed)])
    refused(signer, sealed + b"\0")


@given(st.binary(max_size=400))
def test_garbage_is_no_context(data: bytes) -> None:
    refused(Signer(new_key()), data)


def test_another_server_and_another_identity() -> None:
    sealed = Signer(new_key()).seal(context_of())
    refused(Signer(new_key()), sealed)
    signer = Signer(new_key())
    sealed = signer.seal(context_of())
    other = "somebody/" + KEY.rpartition("/")[2]
    assert "another reservation" in refused(signer, sealed, other).message


def test_an_older_key_still_opens() -> None:
    old = new_key()
    sealed = Signer(old).seal(context_of())
    assert Signer(new_key(), old).open(sealed, KEY) == context_of()
    with pytest.raises(ValueError, match="bytes"):
        Signer(b"short")


def test_the_children_of_a_bulk_grant_share_it() -> None:
    signer = Signer(new_key())
    sealed = signer.seal(context_of(count=3))
    for child in child_keys(KEY, 3):
        assert signer.open(sealed, child).key == KEY
    assert signer.open(sealed, KEY).count == 3
    refused(signer, sealed, child_keys("anonymous/" + str(uuid.UUID(int=8)), 3)[0])


def test_the_table_of_limits_is_up_to_date() -> None:
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "limits.md"
    assert page.read_text(encoding="utf-8") == limits.markdown()
