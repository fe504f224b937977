"""The server's configuration: its form, its checks, and what follows from it."""

from __future__ import annotations

from paceline.config.alerts import WebhookTarget, webhook_target
from paceline.config.document import ConfigError
from paceline.config.limits import ServerLimits
from paceline.config.load import Report, check, load_config, token_hashes
from paceline.config.model import CandidateSpec, Config, IdentitySpec
from paceline.config.peers import node_name, peer_address
from paceline.config.translate import Shares, catalogue, definitions, expand_ladder

__all__ = [
    "CandidateSpec",
    "Config",
    "ConfigError",
    "IdentitySpec",
    "Report",
    "ServerLimits",
    "Shares",
    "WebhookTarget",
    "catalogue",
    "check",
    "definitions",
    "expand_ladder",
    "load_config",
    "node_name",
    "peer_address",
    "token_hashes",
    "webhook_target",
]
