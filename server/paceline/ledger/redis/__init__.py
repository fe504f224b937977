"""The shared store in Redis or Valkey: one server, under Sentinel, or a cluster."""

from paceline.ledger.redis.checks import Finding
from paceline.ledger.redis.commands import RedisCommands
from paceline.ledger.redis.settings import SCHEMES, Settings, parse
from paceline.ledger.redis.store import RedisStore

__all__ = ["SCHEMES", "Finding", "RedisCommands", "RedisStore", "Settings", "parse"]
