"""What responses say of the limits, in each API's own spelling. ``epoch`` (µs) turns the account's clock into dates."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

from paceline.upstream.account import Account, ModelGroup, Refused
from paceline.upstream.bucket import Bucket

_KINDS = (("requests", "requests"), ("input-tokens", "input_tokens"), ("output-tokens", "output_tokens"))
_SECOND = 1_000_000


def _stems(kind: str) -> tuple[str, str, str]:
    stem = f"anthropic-ratelimit-{kind}"
    return f"{stem}-limit", f"{stem}-remaining", f"{stem}-reset"


def _older(kind: str) -> tuple[str, str, str]:
    return f"x-ratelimit-limit-{kind}", f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}"


_NAMES = {
    spelling: {kind: make(kind) for kind in ("requests", "input-tokens", "output-tokens", "tokens")}
    for spelling, make in (("current", _stems), ("older", _older))
}


@lru_cache(maxsize=4_096)
def _date(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def rounded(tokens: int, to: int) -> int:
    """To the nearest multiple; a half goes up."""
    return (2 * tokens + to) // (2 * to) * to


def _remaining(bucket: Bucket, kind: str, account: Account) -> int:
    left = max(0, bucket.tokens)
    return left if kind == "requests" else rounded(left, account.config.token_rounding)


def limit_headers(account: Account, group: ModelGroup, now: int, epoch: int) -> dict[str, str]:
    """The headers about limits at ``now``; none if the scenario leaves them out."""
    if not account.scenario.headers:
        return {}
    account.advance(now, group)
    return _anthropic(account, group, epoch) if group.api == "anthropic" else _openai(group)


def _anthropic(account: Account, group: ModelGroup, epoch: int) -> dict[str, str]:
    names = _NAMES[account.scenario.spelling]
    found: dict[str, str] = {}
    shown: dict[str, tuple[int, int, int]] = {}
    for kind, dimension in _KINDS:
        bucket = group.buckets[dimension]
        # Rounded up: at the second that is named, the bucket is full.
        reset = -(-(epoch + account.now + bucket.full_us()) // _SECOND)
        shown[kind] = bucket.amount, _remaining(bucket, kind, account), reset
    coming, going = shown["input-tokens"], shown["output-tokens"]
    if account.config.tokens_header == "sum":
        shown["tokens"] = coming[0] + going[0], coming[1] + going[1], max(coming[2], going[2])
    else:
        shown["tokens"] = min(coming, going, key=lambda one: one[1] / one[0])
    for kind, (limit, remaining, reset) in shown.items():
        limit_name, remaining_name, reset_name = names[kind]
        found[limit_name] = str(limit)
        found[remaining_name] = str(remaining)
        found[reset_name] = _date(reset)
    return found


def _openai(group: ModelGroup) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in ("requests", "tokens"):
        bucket = group.buckets[kind]
        found[f"x-ratelimit-limit-{kind}"] = str(bucket.amount)
        found[f"x-ratelimit-remaining-{kind}"] = str(max(0, bucket.tokens))
        found[f"x-ratelimit-reset-{kind}"] = go_duration(bucket.full_us())
    return found


def go_duration(us: int) -> str:
    """As Go prints durations, in milliseconds rounded up: ``17ms``, ``1s``, ``1m26.4s``, ``6m0s``."""
    total = -(-us // 1_000)
    if total < 1_000:
        return f"{total}ms" if total else "0s"
    seconds, ms = divmod(total, 1_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{seconds}.{ms:03d}".rstrip("0").rstrip(".") + "s" if ms else f"{seconds}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def retry_headers(refused: Refused, api: str) -> dict[str, str]:
    """When to come back; OpenAI says it in milliseconds too."""
    if refused.retry_after is None:
        return {}
    found = {"retry-after": str(refused.retry_after)}
    if api == "openai":
        found["retry-after-ms"] = str(max(1, -(-refused.wait_us // 1_000)))
    return found
