from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from paceline.ledger.journal import Store
from paceline.ledger.memory import MemoryStore
from tests.ledger.journal_kit import JournalKit


class TestMemory(JournalKit):
    @pytest.fixture
    async def store(self) -> AsyncIterator[Store]:
        store = MemoryStore()
        await store.open()
        yield store
        await store.close()
