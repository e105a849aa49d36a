"""Admission's records where coordination may be away: it then refuses, and says so."""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.cluster.identity.ports import Records
from ollama_distributed.cluster.ports import Entry


class LateRecords:
    """`cluster.identity.ports.Records` of whichever connection there is now."""

    def __init__(self, now: Callable[[], Records | None]) -> None:
        self._now = now

    async def get(self, key: str) -> Entry | None:
        return await self._records().get(key)

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        return await self._records().put(key, value, revision=revision)

    def _records(self) -> Records:
        records = self._now()
        if records is None:
            raise Unavailable("coordination is not up on this server; try again in a moment")
        return records
