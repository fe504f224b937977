"""Alerts: what operators want to be told of without asking, and the ways to them."""

from paceline.frontend.alerts.alert import Alert, Kind
from paceline.frontend.alerts.alerts import Alerts
from paceline.frontend.alerts.webhook import Webhook

__all__ = ["Alert", "Alerts", "Kind", "Webhook"]
