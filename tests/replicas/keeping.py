"""``paceline``, whose journal in Redis keeps the records that a snapshot makes needless: they are to be counted."""

from __future__ import annotations

from typing import Any

from paceline.cli import main
from paceline.ledger.redis.commands import RedisCommands

_keep_snapshot = RedisCommands.keep_snapshot


async def _keep_all(self: RedisCommands, *arguments: Any, **named: Any) -> Any:
    if "keep_after" in named:
        named["keep_after"] = 0
    else:
        arguments = (*arguments[:-1], 0)
    return await _keep_snapshot(self, *arguments, **named)


def install() -> None:
    """From now on in this process."""
    setattr(RedisCommands, "keep_snapshot", _keep_all)  # noqa: B010 -- a method is replaced


if __name__ == "__main__":
    install()
    main()
