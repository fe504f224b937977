"""Asking the sentinels for the primary: all of them, since after a failover some know it seconds before the others."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

_GRACE_S = 0.25
"""How long those that are late are waited for, once more than half have answered."""


class Sentinels(Sentinel):
    """A primary's address is the one with the highest configuration epoch, which only a majority can raise."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Bounded by the time-outs of the connections. Raises ``MasterNotFoundError``, or why all refuse."""
        pending = {asyncio.ensure_future(_ask(sentinel, service_name)) for sentinel in self.sentinels}
        majority = len(pending) // 2 + 1
        answers: list[tuple[int, str, int]] = []
        refused: RedisError | None = None
        try:
            while pending:
                grace = _GRACE_S if len(answers) >= majority else None
                done, pending = await asyncio.wait(pending, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for answer in (task.result() for task in done):
                    if isinstance(answer, RedisError):
                        refused = answer
                    elif answer is not None:
                        answers.append(answer)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if not answers and refused is not None:
            raise refused
        if not answers:
            raise MasterNotFoundError(f"no sentinel names a primary for {service_name!r}")
        _, host, port = max(answers, key=lambda answer: answer[0])
        return host, port


async def _ask(sentinel: Any, service: str) -> tuple[int, str, int] | RedisError | None:
    """One sentinel's epoch, host and port; ``None`` if it does not answer, or does not know; or why it refuses."""
    try:
        state = await sentinel.execute_command("SENTINEL", "MASTER", service)
        # Asked last: during a failover this is ahead of the state.
        address = await sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
    except (AuthenticationError, NoPermissionError) as error:
        return error
    except (RedisError, OSError, TimeoutError):
        return None
    if not address:
        return None
    fields = dict(zip(state[::2], state[1::2], strict=False))
    return int(fields.get(b"config-epoch", 0)), _text(address[0]), int(address[1])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
