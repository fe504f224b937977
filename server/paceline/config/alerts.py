"""Alerts in the configuration: thresholds, and where to post what happens. Secrets stand in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from paceline.config.document import ConfigError
from paceline.config.fields import duration
from paceline.engine.dimensions import SECOND_US
from paceline.providers.schema import Strict

MAX_THRESHOLDS = 8
_LEAST, _MOST = 0.1, 1.0
_MAX_URL_CHARS = 2_048


def threshold(value: object) -> int:
    """Thousandths, from a part of one like ``0.8``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("is not a part of the amount; write a number like 0.8")
    if not _LEAST <= value <= _MOST:
        raise ValueError(f"must be from {_LEAST} to {_MOST:g}; write a part of the amount, like 0.8 for 80 %")
    return round(value * 1_000)


def _thresholds(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(values) > MAX_THRESHOLDS:
        raise ValueError(f"has {len(values)} entries; at most {MAX_THRESHOLDS} are allowed")
    if len(set(values)) != len(values):
        raise ValueError("has an entry twice; keep each once")
    return tuple(sorted(values))


def webhook_url(value: str) -> str:
    """``https://HOST/PATH``. The message never repeats the URL: it may hold a token."""
    form = "write https://HOST/PATH"
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(f"has characters that no URL has; {form}")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError(f"is no URL; {form}") from None
    if parts.scheme not in ("https", "http") or not parts.hostname or port == 0:
        raise ValueError(f"is no URL to post to; {form}")
    if "@" in parts.netloc:
        raise ValueError("names a user; remove it: what is posted is signed with the secret of secret_env")
    if parts.fragment:
        raise ValueError("has a part after #, which is never sent; remove it")
    return value


Threshold = Annotated[
    int, BeforeValidator(threshold, json_schema_input_type=Annotated[float, Field(ge=_LEAST, le=_MOST)])
]
"""A part of a limit; thousandths inside."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
"""The name of an environment variable."""
PostDuration = Annotated[
    int,
    BeforeValidator(partial(duration, least=SECOND_US // 10, most=60 * SECOND_US), json_schema_input_type=float | str),
]
"""100 ms to a minute, in µs."""


class WebhookSpec(Strict):
    """Where each alert is posted, as JSON."""

    url: Annotated[str, Field(max_length=_MAX_URL_CHARS), AfterValidator(webhook_url)] | None = Field(
        default=None, repr=False
    )
    """`https://HOST/PATH`. Redirections are not followed."""
    url_env: Variable | None = None
    """In place of `url`: an environment variable that holds it, if the URL itself is a secret."""
    secret_env: Variable | None = None
    """An environment variable that holds the secret with which what is posted is signed."""
    timeout_us: PostDuration = Field(default=5 * SECOND_US, alias="timeout")
    """For one attempt, from the connection to the answer's status."""


class AlertsSpec(Strict):
    """What operators are told of without asking: in the log, in `Watch`, and by a webhook."""

    thresholds: Annotated[tuple[Threshold, ...], AfterValidator(_thresholds)] = Field(
        default=(800,), json_schema_extra={"default": [0.8]}
    )
    """Parts of every limit, from 0.1 to 1: an alert each time that one is reached. Empty: none."""
    webhook: WebhookSpec | None = None


class WebhookTarget(NamedTuple):
    """Where to post, and with what to sign."""

    url: str
    secret: bytes
    """Empty: nothing is signed."""
    timeout_us: int


def webhook_target(spec: AlertsSpec, environ: Mapping[str, str] | None = None) -> WebhookTarget | None:
    """The webhook, with what stands in the environment; ``None``: there is none.

    Raises :class:`ConfigError`; its lines hold neither the secret nor the URL.
    """
    hook = spec.webhook
    if hook is None:
        return None
    environ = os.environ if environ is None else environ
    errors: list[str] = []
    url, secret = hook.url or "", ""
    if hook.url_env is not None:
        url = environ.get(hook.url_env, "").strip()
        where = f"alerts.webhook.url_env: environment variable {hook.url_env}"
        if not url:
            errors.append(f"{where} holds no URL; set it")
        else:
            try:
                webhook_url(url)
            except ValueError as error:
                errors.append(f"{where} {error}")
            if len(url) > _MAX_URL_CHARS:
                errors.append(f"{where} holds a URL that is too long; {_MAX_URL_CHARS} characters are allowed")
    if hook.secret_env is not None:
        secret = environ.get(hook.secret_env, "").strip()
        if not secret:
            where = f"alerts.webhook.secret_env: environment variable {hook.secret_env}"
            errors.append(f"{where} holds no secret; set it, or remove the field")
    if errors:
        raise ConfigError(errors)
    return WebhookTarget(url, secret.encode(), hook.timeout_us)
