"""The simulator behind HTTP. Needs the extra ``paceline[upstream]``."""

from __future__ import annotations

from paceline.upstream.http.server import Upstream

__all__ = ["Upstream"]
