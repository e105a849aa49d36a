"""Reads files again, slowly, to see whether they still are what their names say.

A file that is not is taken away before anyone else reads it; the models that need it are fetched
again from nodes that hold them, and cannot be used here until then. What was not read for
`every_s` is read at a low rate; who asks has everything read now. Answers to people come first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.disk import ScrubRow
from ollama_distributed.base.errors import BlobNotFound, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.disk_ports import Disk, Models, StoredFile
from ollama_distributed.distribution.pace import Pace
from ollama_distributed.distribution.uses import Uses
from ollama_distributed.models.names import BlobId
from ollama_distributed.models.stored import StoredModel

log = structlog.get_logger()

CORRUPT, REPAIRED, NOT_REPAIRED = "disk.file_corrupt", "disk.model_repaired", "disk.model_not_repaired"
LOOK_S = 60.0
"""Between two looks for files that are due, and for holders of damaged models."""
BUSY_S = 0.5
"""While people wait for words, so long between two looks whether they still do."""
MOST_BUSY_S = 20.0
"""After so long another part is read in any case (4 MiB): a node that is never idle gets its turn."""


class Pacing(msgspec.Struct, frozen=True, kw_only=True):
    every_s: float = 0.0
    """A file is read again after so long; 0: never by itself."""
    bytes_per_s: float = 0.0
    """0: no limit."""


Holding = Callable[[StoredModel], Sequence[NodeId]]
"""Other nodes that are online and hold this version."""
Fetch = Callable[[StoredModel, Sequence[NodeId]], Awaitable[None]]
"""Bring what is missing of a model from these nodes; done when it returns."""


class Scrubber:
    """`busy`: people wait for answers now. `warm`: blobs that are in use, which are not cold."""

    def __init__(
        self,
        disk: Disk,
        models: Models,
        uses: Uses,
        clock: Clock,
        pacing: Pacing,
        *,
        busy: Callable[[], bool],
        warm: Callable[[], Collection[BlobId]],
        holding: Holding,
        fetch: Fetch,
    ) -> None:
        self._disk = disk
        self._models = models
        self._uses = uses
        self._clock = clock
        self._pacing = pacing
        self._pace = Pace(clock, pacing.bytes_per_s)
        self._busy = busy
        self._warm = warm
        self._holding = holding
        self._fetch = fetch
        self._wake = anyio.Event()
        self.row = ScrubRow()
        self.scrubbed_bytes = 0
        self.corrupt = 0
        self.repaired = 0

    def use(self, pacing: Pacing) -> None:
        """From now on."""
        self._pacing = pacing
        self._pace.limit(pacing.bytes_per_s)

    def ask(self) -> ScrubRow:
        """Have every file read, from now on and not slowed down but by people's requests. Nothing
        if that is under way."""
        if not (self.row.running and self.row.asked):
            self.row = ScrubRow(running=True, asked=True, began_at=self._clock.time())
            self._wake.set()
        return self.row

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.step()
            except OllamaDistributedError as exc:
                log.warning("disk.scrub_failed", error=exc.message)
                self._ended()
            if not self.row.running:
                with anyio.move_on_after(LOOK_S):
                    await self._wake.wait()
            self._wake = anyio.Event()

    async def step(self) -> None:
        """Make whole what is damaged, if that can be done by now; then read what is due, or asked
        for."""
        await self.mend()
        survey = await self._disk.survey()
        asked = self.row.running and self.row.asked
        due = self._order(survey.blobs.items()) if asked else self._due(survey.blobs)
        if not due:
            self._ended()
            return
        began_at = self.row.began_at if asked else self._clock.time()
        self.row = ScrubRow(
            running=True, asked=asked, total_bytes=sum(size for _, size in due), began_at=began_at
        )
        for blob, _ in due:
            await self._check(blob)
            if self.row.asked != asked:
                return  # somebody wants everything read: begin anew
        self._ended()

    async def mend(self) -> None:
        """Fetch damaged models again, where somebody holds them."""
        survey = await self._disk.survey()
        for model in [one for one in self._models.stored() if one.lacking]:
            if not model.blobs.keys() - survey.blobs.keys():
                await self._models.recheck(model.blobs)  # it came by another way
                continue
            holders = self._holding(model)
            if not holders:
                continue
            try:
                await self._fetch(model, holders)
                await self._models.recheck(model.blobs)
            except OllamaDistributedError as exc:
                log.warning(NOT_REPAIRED, model=model.name.display, error=exc.message)
                continue
            self.repaired += 1
            log.info(REPAIRED, model=model.name.display)
        here = (await self._disk.survey()).blobs
        for blob in [one for one in survey.damaged if one in here]:
            await self._disk.drop_leftover("damaged", blob)

    # ── inside ──────────────────────────────────────────────────────────────────────

    def _due(self, blobs: Mapping[BlobId, StoredFile]) -> list[tuple[BlobId, int]]:
        if not self._pacing.every_s:
            return []
        before, warm = self._clock.time() - self._pacing.every_s, set(self._warm())
        return self._order(
            (blob, file)
            for blob, file in blobs.items()
            if blob not in warm and self._uses.last_checked(blob, file.modified_at) < before
        )

    def _order(self, blobs: Iterable[tuple[BlobId, StoredFile]]) -> list[tuple[BlobId, int]]:
        """Those that were checked longest ago first."""
        found = sorted(
            (self._uses.last_checked(blob, file.modified_at), blob, file.size_bytes) for blob, file in blobs
        )
        return [(blob, size) for _, blob, size in found]

    async def _check(self, blob: BlobId) -> None:
        try:
            found = await self._disk.digest(blob, self._read)
            if found != blob.hex:
                # Once more: memory may have erred, not the disk.
                found = await self._disk.digest(blob, self._read_again)
        except BlobNotFound:
            return  # it was deleted meanwhile
        self._change(files=self.row.files + 1)
        if found == blob.hex:
            self._uses.checked(blob)
        else:
            await self._damaged(blob, found)

    async def _damaged(self, blob: BlobId, found: str) -> None:
        await self._disk.take_away(blob)
        models = await self._models.recheck([blob])
        self.corrupt += 1
        self._change(corrupt=self.row.corrupt + 1)
        log.error(
            CORRUPT,
            blob=blob.digest,
            found=f"sha256:{found}" if found else "cannot be read",
            models=[one.name.display for one in models],
        )
        await self.mend()

    async def _read(self, count: int) -> None:
        self.scrubbed_bytes += count
        self._change(done_bytes=self.row.done_bytes + count)
        await self._read_again(count)

    async def _read_again(self, count: int) -> None:
        """Wait until the next part may be read."""
        with anyio.move_on_after(MOST_BUSY_S):
            while self._busy():  # noqa: ASYNC110  (nobody tells when the last of them has an answer)
                await anyio.sleep(BUSY_S)
        if not self.row.asked:
            await self._pace.take(count)

    def _change(self, **fields: int) -> None:
        self.row = msgspec.structs.replace(self.row, **fields)

    def _ended(self) -> None:
        if self.row.running:
            self.row = msgspec.structs.replace(self.row, running=False, ended_at=self._clock.time())
