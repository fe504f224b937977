"""What this front end accepts and keeps at most: written once, here. ``docs/limits.md`` is made from it."""

from __future__ import annotations

from typing import NamedTuple

from paceline.engine.dimensions import MINUTE_US, SECOND_US

# -- what one request may say -----------------------------------------------------------------------------------

MAX_TOKENS = 1_000_000_000
MAX_REQUESTS = 500_000
MAX_COUNT = 1_000
MAX_WAIT_US = 10 * MINUTE_US
MIN_HOLD_US = SECOND_US
MAX_HOLD_US = 60 * MINUTE_US
MAX_CANDIDATES = 16
MAX_RELEASE_TARGETS = 16
MAX_LABEL_CHARS = 128
MAX_TARGET_CHARS = 256
MAX_CONTEXT_BYTES = 8_192
MAX_HEADERS = 64
MAX_HEADER_NAME_CHARS = 128
MAX_HEADER_VALUE_BYTES = 4_096
MAX_HEADER_AGE_US = 24 * 60 * MINUTE_US
MAX_RETRY_AFTER_US = 31 * 24 * 60 * MINUTE_US
MAX_ERROR_MESSAGE_BYTES = 1_024
MAX_ERROR_DETAILS_BYTES = 4_096
MAX_PAGE_SIZE = 1_000
DEFAULT_PAGE_SIZE = 100
MAX_WATCH_NAMES = 64
MAX_PAUSE_REASON_CHARS = 256

# -- what is kept -----------------------------------------------------------------------------------------------

MAX_LEDGERS = 64
MAX_CACHED_TARGETS = 4_096
MAX_CACHED_SHARES = 16_384
MAX_CACHED_DURATIONS = 4_096
MAX_CACHED_SETTLEMENTS = 4_096
MAX_DEFINED_POOLS = 1_024
MAX_BATCH_ITEMS = 1_024
MAX_OPEN_ITEMS = 4_096
MAX_BUSY_ITEMS = 4_096
MAX_OUTBOX_BYTES = 4 * 1_024 * 1_024
MAX_RESPONSE_BYTES = 1_024 * 1_024
"""Of a batch of answers, but for its last one: clients take 4 MiB by default."""
MAX_SESSIONS = 1_024
MAX_SESSION_POOLS = 256
MAX_UNARY_CALLS = 10_000
MAX_ORPHANS = 20_000
MAX_PENDING = 16_000
MAX_PENDING_RESERVES = 12_000
MAX_FALLBACK_POOLS = 1_024
MAX_FALLBACK_INSTANCES = 10_000
MAX_SHARE_CLIENTS = 40_000
MAX_SHARE_ASKS = 512
"""Wishes for fallback shares in one message to the owner of a ledger."""
MAX_WATCHES = 64
MAX_STREAMS = 4_096


class Caps(NamedTuple):
    """The bounds of one request that the configuration can change."""

    candidates: int = MAX_CANDIDATES
    calls: int = MAX_COUNT
    label_chars: int = MAX_LABEL_CHARS
    headers: int = MAX_HEADERS
    header_value_bytes: int = MAX_HEADER_VALUE_BYTES
    error_message_bytes: int = MAX_ERROR_MESSAGE_BYTES
    error_details_bytes: int = MAX_ERROR_DETAILS_BYTES
    wait_us: int = MAX_WAIT_US
    """A longer ``max_wait``, up to ten minutes, counts as this."""
    default_hold_us: int = 5 * MINUTE_US
    hold_us: int = MAX_HOLD_US
    """A longer ``hold``, up to an hour, counts as this."""


DEFAULT_CAPS = Caps()

# -- times ------------------------------------------------------------------------------------------------------

DEADLINE_MARGIN_US = 50_000
ORPHAN_GRACE_US = SECOND_US
FALLBACK_EXPIRY_US = 10 * MINUTE_US
FALLBACK_GRACE_US = 10 * SECOND_US
"""How much later than it was made a fallback share may have reached its client."""
FALLBACK_REFRESH_US = 5 * SECOND_US
SHARE_ASK_INTERVAL_US = SECOND_US
SHARE_ASK_TIMEOUT_US = SECOND_US
ADMIN_TIMEOUT_US = 5 * SECOND_US
"""For another process to answer an AdminService call."""
SURRENDER_TIMEOUT_US = 2 * SECOND_US
WATCH_INTERVAL_US = 250_000
HELLO_TIMEOUT_US = 10 * SECOND_US
RETRY_SOON_US = 200_000


class Cap(NamedTuple):
    """One line of ``docs/limits.md``."""

    what: str
    value: str
    above: str


def _us(value: int) -> str:
    if value % MINUTE_US == 0:
        return f"{value // MINUTE_US} min"
    return f"{value // SECOND_US} s" if value % SECOND_US == 0 else f"{value // 1_000} ms"


REQUEST_CAPS = (
    Cap("tokens, each field", f"{MAX_TOKENS:,}", "INVALID_ARGUMENT"),
    Cap("`estimate.requests`", f"{MAX_REQUESTS:,}", "INVALID_ARGUMENT"),
    Cap("`count`", f"{MAX_COUNT:,}", "INVALID_ARGUMENT"),
    Cap("`max_wait`", _us(MAX_WAIT_US), "INVALID_ARGUMENT"),
    Cap("`hold`", f"{_us(MIN_HOLD_US)} … {_us(MAX_HOLD_US)}", "INVALID_ARGUMENT"),
    Cap("candidates of a Reserve", f"{MAX_CANDIDATES}", "INVALID_ARGUMENT"),
    Cap("`targets` of a Release", f"{MAX_RELEASE_TARGETS}", "INVALID_ARGUMENT"),
    Cap("route, tenant, workspace, ladder", f"{MAX_LABEL_CHARS} printable characters", "INVALID_ARGUMENT"),
    Cap("each field of a target", f"{MAX_TARGET_CHARS} printable characters", "INVALID_ARGUMENT"),
    Cap("`context`", f"{MAX_CONTEXT_BYTES:,} bytes", "INVALID_ARGUMENT"),
    Cap("response headers of an outcome", f"{MAX_HEADERS}", "INVALID_ARGUMENT"),
    Cap("name of a header", f"{MAX_HEADER_NAME_CHARS} characters", "INVALID_ARGUMENT"),
    Cap("value of a header", f"{MAX_HEADER_VALUE_BYTES:,} bytes", "INVALID_ARGUMENT"),
    Cap("header that is not on the list", "—", "dropped, never kept"),
    Cap("`header_age`", _us(MAX_HEADER_AGE_US), "counts as that"),
    Cap("`error.type`, `error.code`", f"{MAX_LABEL_CHARS} characters", "INVALID_ARGUMENT"),
    Cap("`error.message`", f"{MAX_ERROR_MESSAGE_BYTES:,} bytes", "INVALID_ARGUMENT"),
    Cap("`error.details`", f"{MAX_ERROR_DETAILS_BYTES:,} bytes", "INVALID_ARGUMENT"),
    Cap("`page_size`", f"{MAX_PAGE_SIZE:,}", "counts as that"),
)

KEPT_CAPS = (
    Cap("ledgers (accounts) of one server", f"{MAX_LEDGERS}", "FAILED_PRECONDITION for a new account"),
    Cap("pools defined, each ledger", f"{MAX_DEFINED_POOLS:,}", "defined again on their next use"),
    Cap("items of one batch", f"{MAX_BATCH_ITEMS:,}", "the session ends with RESOURCE_EXHAUSTED"),
    Cap("waiting items of one session", f"{MAX_OPEN_ITEMS:,}", "the item fails with RESOURCE_EXHAUSTED"),
    Cap("items of one session on their way to the books", f"{MAX_BUSY_ITEMS:,}", "the session is not read meanwhile"),
    Cap(
        "unsent answers of one session", f"{MAX_OUTBOX_BYTES // 1024 // 1024} MiB", "the session is not read meanwhile"
    ),
    Cap("sessions of one server", f"{MAX_SESSIONS:,}", "RESOURCE_EXHAUSTED"),
    Cap("unary calls in progress", f"{MAX_UNARY_CALLS:,}", "RESOURCE_EXHAUSTED"),
    Cap(
        "operations of one ledger without an answer, where ledgers move",
        f"{MAX_PENDING:,}, of which Reserves {MAX_PENDING_RESERVES:,}",
        "RESOURCE_EXHAUSTED",
    ),
    Cap("watches of one server", f"{MAX_WATCHES}", "RESOURCE_EXHAUSTED"),
    Cap("undelivered grants kept for a retry", f"{MAX_ORPHANS:,}", "released at once"),
    Cap("how long they are kept", _us(ORPHAN_GRACE_US), "released"),
    Cap("client instances with fallback shares, each pool", f"{MAX_FALLBACK_INSTANCES:,}", "no share for new ones"),
    Cap("pairs of client and pool with fallback shares", f"{MAX_SHARE_CLIENTS:,}", "no share for new ones"),
    Cap("life of a fallback share", _us(FALLBACK_EXPIRY_US), "expires"),
)


def markdown() -> str:
    """``docs/limits.md``."""
    lines = [
        "# Limits",
        "",
        "What a server accepts and keeps at most, unless its configuration (`limits`) says otherwise. Made from",
        "`paceline.frontend.limits`; a test compares them.",
    ]
    for title, caps in (("One request", REQUEST_CAPS), ("One server", KEPT_CAPS)):
        lines += ["", f"## {title}", "", "| what | at most | above it |", "|---|---|---|"]
        lines += [f"| {cap.what} | {cap.value} | {cap.above} |" for cap in caps]
    return "\n".join(lines) + "\n"
