"""What is known of each API provider: data, and parsers of their response headers."""

from __future__ import annotations

from paceline.providers.catalogue import (
    AccountSetup,
    Catalogue,
    PoolSetup,
    Resolved,
    Target,
    Unknown,
    WorkspaceSetup,
)

__all__ = ["AccountSetup", "Catalogue", "PoolSetup", "Resolved", "Target", "Unknown", "WorkspaceSetup"]
