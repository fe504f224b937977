"""From messages to the engine's operations. Every field is checked; what is wrong is named, never repeated.

This is the hot path: numbers are compared before they are looked at twice, ``HasField`` is asked only of zeros, and
whatever calls have in common (targets, shares) is looked up, not worked out again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from google.protobuf.duration_pb2 import Duration

from paceline.engine.accounting import Estimate, Usage, UsageKind
from paceline.engine.dimensions import Dimension
from paceline.engine.operations import (
    Candidate,
    Commit,
    Context,
    Disposition,
    Observation,
    Observe,
    Outcome,
    Priority,
    Release,
    Renew,
    Reserve,
)
from paceline.frontend.auth import Caller
from paceline.frontend.context import Signer
from paceline.frontend.errors import Problem, invalid, refused
from paceline.frontend.ladders import Ladders
from paceline.frontend.limits import (
    DEFAULT_CAPS,
    MAX_HEADER_AGE_US,
    MAX_HEADER_NAME_CHARS,
    MAX_HOLD_US,
    MAX_LABEL_CHARS,
    MAX_RELEASE_TARGETS,
    MAX_REQUESTS,
    MAX_RETRY_AFTER_US,
    MAX_TARGET_CHARS,
    MAX_TOKENS,
    MAX_WAIT_US,
    MIN_HOLD_US,
    Caps,
)
from paceline.frontend.places import Destination, Places
from paceline_client.stubs import v1 as pb

_UUID = re.compile("[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}").fullmatch
_PRIORITIES: Final = {int(priority): priority for priority in Priority}
_DISPOSITIONS: Final = {int(disposition): disposition for disposition in Disposition}
_NOTHING_KNOWN: Final = Estimate()
_TARGET_FIELDS: Final = (
    "provider",
    "account",
    "region",
    "upstream_workspace",
    "service_tier",
    "endpoint",
    "model",
)

Headers = list[tuple[str, bytes]]


class Reader(Protocol):
    """Reads what a response said of the limits: :func:`paceline.providers.headers.parse`."""

    def __call__(
        self,
        family: str,
        headers: Headers,
        http_status: int = 0,
        error_type: str = "",
        error_message: str = "",
        error_retry_after_us: int | None = None,
        age_us: int = 0,
        *,
        error_code: str = "",
        error_details: bytes = b"",
    ) -> Observation | None: ...


class Known(NamedTuple):
    """What is remembered of a grant. ``pool`` of ``None``: nothing; ``age_us``: how long ago it was granted."""

    pool: str | None
    age_us: int | None


Recall = Callable[[str, Context | None], Known]
"""What is known of the grant of a key, with or without its context."""


class Reservation(NamedTuple):
    """A checked Reserve: the operation, and for each of its candidates the caller's index and the destination."""

    operation: Reserve
    choices: tuple[tuple[int, Destination], ...]
    account: str | None
    """``None``: the candidates are over several accounts."""


def uuid_of(value: str, path: str) -> str:
    """A UUID in lower case."""
    if _UUID(value) is None:
        if not value:
            raise invalid(path, "is required: a UUID of the caller, new for each attempt")
        raise invalid(path, "is no UUID: write it in 36 characters, as 8-4-4-4-12 hexadecimal digits")
    return value.lower()


def duration_us(value: Duration, path: str, most: int, *, cut: bool = False) -> int:
    """A duration from zero to ``most`` in µs, rounded down. With ``cut`` a longer one counts as ``most``."""
    seconds, nanos = value.seconds, value.nanos
    if not seconds and not nanos:
        return 0
    if seconds < 0 or not 0 <= nanos <= 999_999_999:
        raise invalid(path, "is no duration from zero up: `seconds` and `nanos` must not be negative")
    us = seconds * 1_000_000 + nanos // 1_000
    if us > most:
        if cut:
            return most
        raise invalid(path, f"is too long: at most {most // 1_000_000} s")
    return us


def label(value: str, path: str, most: int = MAX_LABEL_CHARS) -> str:
    """A short name of the caller's own."""
    if value and (len(value) > most or not value.isprintable()):
        raise invalid(path, f"must be at most {most} printable characters")
    return value


class Requests:
    """Decodes for one server. Keeps nothing but what it was given."""

    def __init__(
        self,
        places: Places,
        signer: Signer,
        reader: Reader,
        allowed: frozenset[str],
        *,
        ladders: Ladders | None = None,
        caps: Caps = DEFAULT_CAPS,
    ) -> None:
        self._places = places
        self._signer = signer
        self._read = reader
        self._allowed = allowed
        self._ladders = Ladders() if ladders is None else ladders
        self._caps = caps
        self._hold_us = caps.default_hold_us
        self._max_hold_us = caps.hold_us
        self._max_wait_us = caps.wait_us
        self._max_count = caps.calls
        self._max_label = caps.label_chars

    def label(self, value: str, path: str) -> str:
        """A short name of the caller's own."""
        return label(value, path, self._max_label) if value else value

    # -- reserve ------------------------------------------------------------------------------------------------

    def reserve(self, message: pb.ReserveRequest, caller: Caller, wait_cap_us: int | None = None) -> Reservation:
        """A Reserve. It waits no longer than ``wait_cap_us``. Raises :class:`Problem`."""
        key = caller.prefix + uuid_of(message.reservation_id, "reservation_id")
        tenant, shares = self._whose(message.tenant, message.workspace, caller)
        priority = message.priority
        if priority:
            urgency = _PRIORITIES.get(priority)
            if urgency is None:
                raise invalid("priority", "is not known: use INTERACTIVE, STANDARD or BATCH")
        else:
            urgency = caller.priority
        ladder = message.ladder
        listed = message.candidates
        account: str | None
        if ladder:
            candidates, choices, account = self._from_ladder(ladder, message, tenant, urgency, shares)
        elif len(listed) == 1:
            one = listed[0]
            destination = self._target(one.target, "candidates[0].target")
            smallest = one.min_output_tokens
            size = self._estimate(one.estimate, "candidates[0].estimate")
            account = destination.account
            if smallest or one.HasField("min_output_tokens"):
                candidates, choices, account = self._several(listed, shares)
            else:
                candidates = (Candidate(destination.pool, shares, size, destination.prices),)
                choices = destination.alone
        else:
            candidates, choices, account = self._several(listed, shares)
        observed = message.observe_only
        if observed:
            # Its caller makes the call there, whatever is granted.
            candidates, choices, account = candidates[:1], choices[:1], choices[0][1].account
        wait = min(duration_us(message.max_wait, "max_wait", MAX_WAIT_US), self._max_wait_us)
        if wait_cap_us is not None and wait > wait_cap_us:
            wait = max(0, wait_cap_us)
        hold = duration_us(message.hold, "hold", MAX_HOLD_US)
        if not hold:
            hold = self._hold_us
        elif hold < MIN_HOLD_US:
            raise invalid("hold", f"is too short: at least {MIN_HOLD_US // 1_000_000} s, or leave it empty")
        elif hold > self._max_hold_us:
            hold = self._max_hold_us
        count = message.count
        if not 1 < count <= self._max_count:
            if count != 1 and (count or message.HasField("count")):
                raise invalid("count", f"must be from 1 to {self._max_count:,}")
            count = 1
        operation = Reserve(
            key,
            candidates,
            tenant,
            self.label(message.route, "route"),
            urgency,
            wait,
            hold,
            count,
            message.allow_partial if count > 1 else False,
            observed=observed,
        )
        return Reservation(operation, choices, account)

    def _several(
        self, listed: Sequence[pb.Candidate], shares: tuple[str, ...]
    ) -> tuple[tuple[Candidate, ...], tuple[tuple[int, Destination], ...], str | None]:
        if not listed:
            raise invalid("candidates", "is required: at least one candidate, or the name of a ladder")
        if len(listed) > self._caps.candidates:
            raise invalid("candidates", f"has too many entries: at most {self._caps.candidates}")
        rungs = []
        for place, each in enumerate(listed):
            path = f"candidates[{place}]"
            size = self._estimate(each.estimate, path + ".estimate")
            destination = self._target(each.target, path + ".target")
            smallest = self._smallest(each, size, path)
            rungs.append((destination, size, smallest))
        return _climb(rungs, shares)

    def _smallest(self, candidate: pb.Candidate, size: Estimate, path: str) -> int | None:
        smallest = candidate.min_output_tokens
        if not smallest and not candidate.HasField("min_output_tokens"):
            return None
        path += ".min_output_tokens"
        if not 1 <= smallest <= MAX_TOKENS:
            raise invalid(path, f"must be from 1 to {MAX_TOKENS:,}")
        if size.max_output_tokens is not None and smallest > size.max_output_tokens:
            raise invalid(path, "must not be above estimate.max_output_tokens")
        return smallest

    def _from_ladder(
        self, name: str, message: pb.ReserveRequest, tenant: str, priority: Priority, shares: tuple[str, ...]
    ) -> tuple[tuple[Candidate, ...], tuple[tuple[int, Destination], ...], str | None]:
        if message.candidates:
            raise invalid("ladder", "excludes candidates: give one of the two")
        ladder = self._ladders.find(self.label(name, "ladder"), tenant, priority)
        if ladder is None:
            raise refused("ladder", "no ladder of this name is configured: name one that is, or give candidates")
        given = self._estimate(message.ladder_estimate, "ladder_estimate")
        rungs = [(destination, _over(given, size), least) for destination, size, least in ladder.rungs]
        return _climb(rungs, shares)

    def _whose(self, tenant: str, workspace: str, caller: Caller) -> tuple[str, tuple[str, ...]]:
        """Tenant and shares."""
        tenant = tenant or caller.tenant
        workspace = workspace or caller.workspace
        shares = self._places.cached_shares.get((caller.identity, tenant, workspace))
        if shares is None:
            shares = self._places.shares(caller, self.label(tenant, "tenant"), self.label(workspace, "workspace"))
        return tenant, shares

    def _target(self, target: pb.Target, path: str) -> Destination:
        raw = target.SerializeToString()
        destination = self._places.cached_targets.get(raw)
        if destination is None:
            check_target(target, path)
            destination = self._places.destination(raw, target, path)
        return destination

    def _estimate(self, estimate: pb.Estimate, path: str) -> Estimate:
        requests: int | None = estimate.requests
        tokens: int | None = estimate.input_tokens
        cached: int | None = estimate.cached_input_tokens
        output: int | None = estimate.output_tokens
        largest: int | None = estimate.max_output_tokens
        if requests:
            if not 0 < requests <= MAX_REQUESTS:
                raise _range(path + ".requests", requests, MAX_REQUESTS)
        elif not estimate.HasField("requests"):
            requests = None
        if tokens:
            if not 0 < tokens <= MAX_TOKENS:
                raise _range(path + ".input_tokens", tokens, MAX_TOKENS)
        elif not estimate.HasField("input_tokens"):
            tokens = None
        if cached:
            if not 0 < cached <= MAX_TOKENS:
                raise _range(path + ".cached_input_tokens", cached, MAX_TOKENS)
        elif not estimate.HasField("cached_input_tokens"):
            cached = None
        if output:
            if not 0 < output <= MAX_TOKENS:
                raise _range(path + ".output_tokens", output, MAX_TOKENS)
        elif not estimate.HasField("output_tokens"):
            output = None
        if largest:
            if not 0 < largest <= MAX_TOKENS:
                raise _range(path + ".max_output_tokens", largest, MAX_TOKENS)
            if output is not None and output > largest:
                raise invalid(path + ".output_tokens", "must not be above max_output_tokens")
        elif not estimate.HasField("max_output_tokens"):
            largest = None
        return Estimate(requests, tokens, cached, output, largest)

    # -- after the call -----------------------------------------------------------------------------------------

    def context(self, sealed: bytes, key: str) -> Context | None:
        """The context of a request; empty is none."""
        return self._signer.open(sealed, key) if sealed else None

    def commit(self, message: pb.CommitRequest, caller: Caller, recall: Recall) -> Commit:
        """A Commit."""
        key = caller.prefix + uuid_of(message.reservation_id, "reservation_id")
        sealed = message.context
        context = self._signer.open(sealed, key) if sealed else None
        if not message.HasField("outcome"):
            raise invalid("outcome", "is required: what became of the call")
        return Commit(key, self._outcome(message.outcome, caller, recall, key, context), context)

    def release(self, message: pb.ReleaseRequest, caller: Caller) -> tuple[Release, tuple[str, ...]]:
        """A Release, and the accounts of the targets that it names."""
        key = caller.prefix + uuid_of(message.reservation_id, "reservation_id")
        context = self.context(message.context, key)
        targets = message.targets
        if len(targets) > MAX_RELEASE_TARGETS:
            raise invalid("targets", f"has too many entries: at most {MAX_RELEASE_TARGETS}")
        accounts = dict.fromkeys(
            self._target(target, f"targets[{place}]").account for place, target in enumerate(targets)
        )
        return Release(key, context), tuple(accounts)

    def renew(self, message: pb.RenewRequest, caller: Caller, recall: Recall) -> Renew:
        """A Renew."""
        key = caller.prefix + uuid_of(message.reservation_id, "reservation_id")
        context = self.context(message.context, key)
        hold: int | None = self._hold_us
        if message.HasField("hold"):
            hold = duration_us(message.hold, "hold", MAX_HOLD_US)
            if not hold:
                hold = None
            elif hold < MIN_HOLD_US:
                raise invalid(
                    "hold", f"is too short: zero keeps the expiry, else at least {MIN_HOLD_US // 1_000_000} s"
                )
            else:
                hold = min(hold, self._max_hold_us)
        output = _optional_output(message, "output_tokens")
        observation = usage = None
        if message.HasField("observation"):
            observation, usage = self._early(message.observation, caller, recall, key, context)
        return Renew(key, context, hold, output, observation, usage)

    def observe(self, message: pb.ObserveRequest, caller: Caller) -> tuple[Observe, Destination]:
        """An Observe."""
        key = ""
        if message.observation_id:
            key = caller.prefix + uuid_of(message.observation_id, "observation_id")
        destination = self._target(message.target, "target")
        tenant, shares = self._whose(message.tenant, message.workspace, caller)
        if not message.HasField("outcome"):
            raise invalid("outcome", "is required: what became of the call")
        known = Known(destination.pool, None)
        outcome = self._outcome(message.outcome, caller, lambda *_: known, key, None)
        candidate = Candidate(destination.pool, shares, _NOTHING_KNOWN, destination.prices)
        age = 0
        if message.outcome.HasField("header_age"):
            age = duration_us(message.outcome.header_age, "outcome.header_age", MAX_HEADER_AGE_US, cut=True)
        return Observe(candidate, outcome, tenant, self.label(message.route, "route"), key, age), destination

    def _outcome(
        self, message: pb.Outcome, caller: Caller, recall: Recall, key: str, context: Context | None
    ) -> Outcome:
        path = "outcome"
        disposition = _DISPOSITIONS.get(message.disposition)
        if disposition is None:
            raise invalid(path + ".disposition", "is required: how the call ended, one of the values of Disposition")
        kind = message.usage_kind
        if not 0 <= kind <= 3:
            raise invalid(path + ".usage_kind", "is not known: use FINAL, PARTIAL or MISSING, or leave it unspecified")
        usage: Usage | None = None
        unknown: tuple[str, ...] = ()
        known = UsageKind.MISSING
        if kind != pb.USAGE_KIND_MISSING:
            if message.HasField("usage"):
                final = kind == pb.USAGE_KIND_FINAL or (not kind and disposition is Disposition.SUCCEEDED)
                usage, unknown = self._usage(message.usage, path + ".usage", context)
                known = UsageKind.FINAL if final and not unknown else UsageKind.PARTIAL
            elif kind:
                raise invalid(path + ".usage", "is required with usage_kind FINAL or PARTIAL")
        observation = self._observation(message, path, caller, recall, key, context)
        return Outcome(disposition, usage, known, observation, unknown)

    def _usage(self, usage: pb.Usage, path: str, context: Context | None) -> tuple[Usage, tuple[str, ...]]:
        """The usage, and the names of what is missing.

        What is missing counts as it was estimated; of a call that the ledger has forgotten, as its context says.
        """
        tokens = usage.input_tokens
        read = usage.cache_read_tokens
        write = usage.cache_write_tokens
        output = usage.output_tokens
        if not (
            0 <= tokens <= MAX_TOKENS
            and 0 <= read <= MAX_TOKENS
            and 0 <= write <= MAX_TOKENS
            and 0 <= output <= MAX_TOKENS
        ):
            for name in ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens"):
                if not 0 <= getattr(usage, name) <= MAX_TOKENS:
                    raise _range(f"{path}.{name}", getattr(usage, name), MAX_TOKENS)
        unknown: tuple[str, ...] = ()
        if not tokens and not read and not write and not usage.HasField("input_tokens"):
            tokens, unknown = _held(context, Dimension.INPUT_TOKENS), ("input_tokens", "cache_read_tokens")
        if not output and not usage.HasField("output_tokens"):
            output, unknown = _held(context, Dimension.OUTPUT_TOKENS), (*unknown, "output_tokens")
        return Usage(1, tokens, read, write, output), unknown

    def _early(
        self, message: pb.Outcome, caller: Caller, recall: Recall, key: str, context: Context | None
    ) -> tuple[Observation | None, Usage | None]:
        """What Renew reports of a call in progress, and what that says of its input.

        The output of a usage is not output so far: a stream begins by naming one token, whatever will come.
        """
        path = "observation"
        number = message.disposition
        if number and number not in _DISPOSITIONS:
            raise invalid(path + ".disposition", "is not known: leave it unspecified while the call is in progress")
        known: Usage | None = None
        if message.HasField("usage"):
            usage, unknown = self._usage(message.usage, path + ".usage", None)
            if "input_tokens" not in unknown:
                known = Usage(1, usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens)
        return self._observation(message, path, caller, recall, key, context), known

    def _observation(
        self,
        message: pb.Outcome,
        path: str,
        caller: Caller,
        recall: Recall,
        key: str,
        context: Context | None,
    ) -> Observation | None:
        status = message.http_status
        if not 100 <= status <= 599 and (status or message.HasField("http_status")):
            raise invalid(path + ".http_status", "must be from 100 to 599, or absent")
        listed = message.headers
        headers: Headers = []
        if listed:
            if len(listed) > self._caps.headers:
                raise invalid(path + ".headers", f"has too many entries: at most {self._caps.headers}")
            allowed = self._allowed
            most = self._caps.header_value_bytes
            for place, header in enumerate(listed):
                name = header.name
                if len(name) > MAX_HEADER_NAME_CHARS:
                    raise invalid(f"{path}.headers[{place}].name", f"is too long: at most {MAX_HEADER_NAME_CHARS}")
                value = header.value
                if len(value) > most:
                    raise invalid(f"{path}.headers[{place}].value", f"is too long: at most {most:,} bytes")
                name = name.lower()
                if name in allowed:
                    headers.append((name, value))
        served = message.served_model
        if served and (len(served) > MAX_TARGET_CHARS or not served.isprintable()):
            raise invalid(path + ".served_model", f"must be at most {MAX_TARGET_CHARS} printable characters")
        age: int | None = None
        if message.HasField("header_age"):
            age = duration_us(message.header_age, path + ".header_age", MAX_HEADER_AGE_US, cut=True)
        failed = message.HasField("error")
        if failed:
            error = message.error
            check_error(error, path + ".error", self._caps)
        if not caller.teaches or not (headers or failed or status >= 400):
            return None
        pool = None if context is None else context.pool
        if pool is None or age is None:
            pool, since_grant = recall(key, context)
            if pool is None:
                return None
            if age is None:
                # As old as the call may be.
                age = min(since_grant or 0, MAX_HEADER_AGE_US)
        if not failed:
            return self._read(self._places.family(pool), headers, status, "", "", None, age)
        error = message.error
        retry: int | None = None
        if error.HasField("retry_after"):
            retry = duration_us(error.retry_after, path + ".error.retry_after", MAX_RETRY_AFTER_US, cut=True)
        return self._read(
            self._places.family(pool),
            headers,
            status,
            error.type,
            error.message,
            retry,
            age,
            error_code=error.code,
            error_details=error.details,
        )


def check_target(target: pb.Target, path: str) -> None:
    """Check a target that is seen for the first time. Raises :class:`Problem`."""
    if not target.model:
        raise invalid(path + ".model", "is required: the model as named in the API call")
    for name in _TARGET_FIELDS:
        value = getattr(target, name)
        if len(value) > MAX_TARGET_CHARS or not value.isprintable():
            raise invalid(f"{path}.{name}", f"must be at most {MAX_TARGET_CHARS} printable characters")


def check_error(error: pb.UpstreamError, path: str, caps: Caps = DEFAULT_CAPS) -> None:
    """Check an upstream's error. Raises :class:`Problem`."""
    if len(error.type) > MAX_LABEL_CHARS:
        raise invalid(path + ".type", f"is too long: at most {MAX_LABEL_CHARS} characters")
    if len(error.code) > MAX_LABEL_CHARS:
        raise invalid(path + ".code", f"is too long: at most {MAX_LABEL_CHARS} characters")
    message = error.message
    if len(message) > caps.error_message_bytes or len(message.encode()) > caps.error_message_bytes:
        raise invalid(path + ".message", f"is too long: at most {caps.error_message_bytes:,} bytes; cut it")
    if len(error.details) > caps.error_details_bytes:
        raise invalid(path + ".details", f"is too long: at most {caps.error_details_bytes:,} bytes; cut it")
    if error.HasField("retry_after"):
        duration_us(error.retry_after, path + ".retry_after", MAX_RETRY_AFTER_US, cut=True)


def _climb(
    rungs: Sequence[tuple[Destination, Estimate, int | None]], shares: tuple[str, ...]
) -> tuple[tuple[Candidate, ...], tuple[tuple[int, Destination], ...], str | None]:
    """Candidates of the engine. One that accepts less output becomes two: in full, and at the least."""
    candidates: list[Candidate] = []
    choices: list[tuple[int, Destination]] = []
    for place, (destination, size, smallest) in enumerate(rungs):
        candidates.append(Candidate(destination.pool, shares, size, destination.prices))
        choices.append((place, destination))
        largest = size.max_output_tokens
        if smallest is not None and (largest is None or smallest < largest):
            output = None if size.output_tokens is None else min(size.output_tokens, smallest)
            least = Estimate(size.requests, size.input_tokens, size.cached_input_tokens, output, smallest)
            candidates.append(Candidate(destination.pool, shares, least, destination.prices))
            choices.append((place, destination))
    accounts = {destination.account for _, destination in choices}
    return tuple(candidates), tuple(choices), accounts.pop() if len(accounts) == 1 else None


def _over(given: Estimate, known: Estimate) -> Estimate:
    """What the caller says goes before what the ladder says."""
    return Estimate(
        *(
            ladder if said is None else said
            for said, ladder in (
                (given.requests, known.requests),
                (given.input_tokens, known.input_tokens),
                (given.cached_input_tokens, known.cached_input_tokens),
                (given.output_tokens, known.output_tokens),
                (given.max_output_tokens, known.max_output_tokens),
            )
        )
    )


def _optional_output(message: pb.RenewRequest, path: str) -> int | None:
    value = message.output_tokens
    if not 0 <= value <= MAX_TOKENS:
        raise _range(path, value, MAX_TOKENS)
    return value if value or message.HasField("output_tokens") else None


def _range(path: str, value: int, most: int) -> Problem:
    return invalid(path, "must not be negative" if value < 0 else f"is too large: at most {most:,}")


def _held(context: Context | None, dimension: Dimension) -> int:
    if context is not None:
        for each, amount in context.charges:
            if each is dimension:
                return amount
    return 0
