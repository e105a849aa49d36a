"""Models in one file, out and in: `packing` and `unpacking` as one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from ollama_distributed.distribution.packing import Bundle, Elsewhere, Packing, Resolve
from ollama_distributed.distribution.ports import Library, Store
from ollama_distributed.distribution.unpacking import Imported, Unpacking


class Bundles:
    """Implements `gateway.ports.Bundles`."""

    def __init__(self, store: Store, library: Library, resolve: Resolve, elsewhere: Elsewhere) -> None:
        self._packing = Packing(store, library, resolve, elsewhere)
        self._unpacking = Unpacking(store, library, resolve)

    async def pack(self, names: Sequence[str]) -> Bundle:
        return await self._packing.pack(names)

    async def unpack(
        self, chunks: AsyncIterator[bytes], *, name: str = "", replace: bool = False
    ) -> Sequence[Imported]:
        return await self._unpacking.unpack(chunks, name=name, replace=replace)
