"""A store in Redis or Valkey that several processes share."""

from __future__ import annotations

from paceline.ledger.journal import Journal, StoreError
from paceline.ledger.redis.checks import Finding, look
from paceline.ledger.redis.client import Client
from paceline.ledger.redis.commands import RedisCommands
from paceline.ledger.redis.settings import Settings


class RedisStore:
    """A :class:`paceline.ledger.journal.Store` of which many may be open at once: who owns a ledger is up to leases.

    ``checks`` is what was found at the last :meth:`open`.
    """

    shared = True

    def __init__(self, settings: Settings) -> None:
        self.name = settings.name
        self.settings = settings
        self.checks: list[Finding] = []
        self._client = Client(settings)
        self.commands = RedisCommands(self._client, settings.prefix)

    async def open(self) -> None:
        """Connect and look at the store's settings. Raises :class:`StoreError` if it cannot be used as it is set."""
        try:
            self._client.open()
            primaries = await self.commands.connect()
            self.checks = await look(self._client, self.settings, primaries)
            refused = [finding.text for finding in self.checks if finding.level == "refuse"]
            if refused:
                raise StoreError("; ".join(refused))
        except BaseException:
            await self._client.close()
            raise

    def journal(self, ledger: str) -> Journal:
        """Raises ``NotImplementedError``: the journals of a shared store are made from its :attr:`commands`."""
        raise NotImplementedError("a shared store's journals are made from its commands")

    async def ledgers(self) -> list[str]:
        """The names of the ledgers that the store holds, sorted."""
        return await self.commands.ledgers()

    async def get_meta(self, key: str) -> bytes | None:
        """A small value kept for the whole store."""
        return await self.commands.get_meta(key)

    async def put_meta(self, key: str, value: bytes) -> None:
        """Keep a small value, unless another process was first: read it back to know which one counts."""
        await self.commands.put_meta(key, value)

    async def close(self) -> None:
        """Let the connections go. Never raises; takes seconds at most."""
        await self._client.close()
