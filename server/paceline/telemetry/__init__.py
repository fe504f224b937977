"""What a server tells of itself: metrics and logs.

The server fills :class:`Figures` when :class:`Endpoint` asks for them.
:mod:`paceline.telemetry.definitions` is the table of the metrics.
"""

from __future__ import annotations

from paceline.telemetry.endpoint import Endpoint
from paceline.telemetry.figures import (
    AlertFigures,
    AuditFigures,
    Figures,
    FleetFigures,
    Histogram,
    JournalFigures,
    LedgerFigures,
    LimitFigures,
    RouteFigures,
    Traffic,
)
from paceline.telemetry.logs import set_up_logging

__all__ = [
    "AlertFigures",
    "AuditFigures",
    "Endpoint",
    "Figures",
    "FleetFigures",
    "Histogram",
    "JournalFigures",
    "LedgerFigures",
    "LimitFigures",
    "RouteFigures",
    "Traffic",
    "set_up_logging",
]
