"""Bodies of errors, in each API's own shape and wording."""

from __future__ import annotations

from typing import Any

from paceline.upstream.account import RAMP, Refused

_WORDS = {
    "requests": "requests per minute",
    "input_tokens": "input tokens per minute",
    "output_tokens": "output tokens per minute",
    "tokens": "tokens per minute",
}
_SHORT = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


RAMP_CODE = "ramp_limit_exceeded"
"""Says in ``error.details.error_code`` that usage grew too fast. The code is as seen; the message is not."""


def anthropic_error(status: int, message: str, request_id: str, code: str = "") -> dict[str, Any]:
    """``{"type": "error", "error": {…}, "request_id": …}``; ``code`` goes into the error's details."""
    error: dict[str, Any] = {"type": _TYPES.get(status, "api_error"), "message": message}
    if code:
        error["details"] = {"error_code": code}
    return {"type": "error", "error": error, "request_id": request_id}


def anthropic_code(refused: Refused) -> str:
    """The code in the details of a 429; empty: it has none."""
    return RAMP_CODE if refused.dimension == RAMP else ""


def openai_error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``."""
    kind = {
        401: "invalid_request_error",
        429: "tokens" if "TPM" in message else "requests",
        503: "service_unavailable_error",
    }.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_refusal(refused: Refused, organization: str, model: str) -> str:
    """The message of a 429: it names the bucket that is short."""
    dimension = refused.dimension.removeprefix("forced ")
    if dimension == "concurrency":
        return (
            "Number of concurrent connections has exceeded your rate limit. "
            "Please try again later or contact sales to discuss your options for a rate limit increase."
        )
    if dimension == RAMP:
        return (
            f"Your organization's usage has grown too fast. You are currently allowed {refused.limit:,} input tokens "
            f"per minute, which rises each minute (org: {organization}, model: {model}). Please grow more slowly."
        )
    return (
        f"This request would exceed your organization's rate limit of {refused.limit:,} {_WORDS[dimension]} "
        f"(org: {organization}, model: {model}). See the response headers for current usage. "
        "Please reduce the prompt length or the maximum tokens requested, or try again later."
    )


def openai_refusal(refused: Refused, organization: str, model: str) -> str:
    """The message of a 429: limit, used, requested and how long to wait are only told here."""
    dimension = refused.dimension.removeprefix("forced ")
    if dimension not in _SHORT:
        return f"Too many concurrent requests for {model} in organization {organization}. Please try again later."
    # So that, as in real messages, wait = (used + requested - limit) / (limit / 60), whatever the burst.
    used = max(0, refused.limit - refused.level)
    wait = f"{refused.wait_us / 1_000_000:.3f}".rstrip("0").rstrip(".")
    text = f"{-(-refused.wait_us // 1_000)}ms" if refused.wait_us < 1_000_000 else f"{wait}s"
    return (
        f"Rate limit reached for {model} in organization {organization} on {_SHORT[dimension]}: "
        f"Limit {refused.limit}, Used {used}, Requested {refused.needed}. Please try again in {text}. "
        "Visit the documentation to learn more."
    )
