"""The audit in the configuration: where decisions are written."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from paceline.config.limits import MIB
from paceline.providers.schema import Strict

_MAX_PATH_CHARS = 4_096


def _path(value: str) -> str:
    if not value.isprintable():
        raise ValueError("has characters that no path should have")
    if value.endswith("/"):
        raise ValueError("names a directory; write the path of a file")
    return value


class AuditSpec(Strict):
    """Decisions written to files, as lines of JSON: grants, denials, waits, settlements, releases, expiries."""

    path: Annotated[str, Field(max_length=_MAX_PATH_CHARS), AfterValidator(_path)] = ""
    """The file; each server needs its own. Its directory must be there. Empty: nothing is written."""
    max_bytes: Annotated[int, Field(strict=True, ge=64 * 1024, le=64 * 1024 * MIB)] = 100 * MIB
    """A file that would be larger is set aside, as `PATH.1`, and a new one begun."""
    files: Annotated[int, Field(strict=True, ge=1, le=1_000)] = 10
    """Files in all; the oldest is removed."""
