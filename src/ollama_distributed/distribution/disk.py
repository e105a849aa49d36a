"""The disk that a node's models are on: how full it may be, what goes when room is needed, and
what is told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.disk import DiskAnswer, DiskFigures, Kept, ModelOnDisk
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.disk_ports import Disk, Leftover, Models, StoredFile, Survey
from ollama_distributed.distribution.evicting import Evictions, Standing
from ollama_distributed.distribution.room import Limits, Rooms
from ollama_distributed.distribution.scrub import Scrubber
from ollama_distributed.distribution.uses import Uses, UsesRecord
from ollama_distributed.models.names import BlobId
from ollama_distributed.state.cluster import ClusterState

log = structlog.get_logger()

ABOVE, NOT_KEPT = "disk.above_limits", "disk.uses_not_written"
LOOK_S = 15.0
"""Between two looks at the disk: other programs fill it too."""
WRITE_S = 60.0
"""Between two writings of what was used when."""
STRAY_S = 24 * 3600.0
"""A file that no model names is left to whoever brought it for so long: an upload waits for its
`create`, and another program may be about to name it."""

_WHY: dict[Kept, str] = {
    "loaded": "loaded",
    "recent": "just used",
    "moving": "on their way",
    "pinned": "pinned here",
    "placed": "placed here",
    "last": "the last copy",
}


class Above(NamedTuple):
    """More is on the disk than its limits allow, and nothing may go."""

    why: str
    """Empty, or what stays: `; of the models here stay: 1 loaded`."""
    since: float
    """Seconds since the Unix epoch."""


class NodeDisk:
    """`limits`: of a disk that was looked at; asked anew each time. `write`: keeps a record over
    restarts."""

    def __init__(
        self,
        me: NodeId,
        disk: Disk,
        models: Models,
        uses: Uses,
        evictions: Evictions,
        scrubber: Scrubber,
        *,
        state: Callable[[], ClusterState],
        limits: Callable[[Survey], Limits],
        write: Callable[[UsesRecord], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._me = me
        self._disk = disk
        self._models = models
        self._state = state
        self._limits = limits
        self._write = write
        self._clock = clock
        self.uses = uses
        self.evictions = evictions
        self.scrubber = scrubber
        self.rooms = Rooms(disk.survey, limits, self._make, self._why)
        self._figures = DiskFigures()
        self.above: Above | None = None
        self._written_at = clock.monotonic()

    async def start(self) -> None:
        """Look at it for the first time."""
        self.uses.found(self._models.stored())
        self._told(await self._disk.survey(), await self.evictions.standings())

    async def run(self) -> None:
        """Keep an eye on it until cancelled; what was used when is written down at the end too."""
        try:
            while True:
                await anyio.sleep(LOOK_S)
                try:
                    await self._look()
                except (OllamaDistributedError, OSError) as exc:
                    log.warning("disk.not_looked_at", error=str(exc))
        finally:
            with anyio.CancelScope(shield=True):
                await self._keep()

    # ── for placing models ──────────────────────────────────────────────────────────

    async def room_bytes(self) -> int:
        """What may still come to this disk: within quota and low-water mark (neither is to be taken
        off again), what is on its way taken off, and what other nodes keep anyway counted as free.
        """
        survey, standings = await self._disk.survey(), await self.evictions.standings()
        idle = sum(file.size_bytes for blob, file in survey.partials.items() if blob not in self._claimed)
        idle += sum(file.size_bytes for file in survey.damaged.values())
        return max(0, self._left(survey) + self.evictions.spare_bytes(standings) + idle)

    # ── for people ──────────────────────────────────────────────────────────────────

    def figures(self) -> DiskFigures:
        """Counts as of now, amounts as of the last look some seconds ago. Touches no disk."""
        return msgspec.structs.replace(self._figures, **self._counts())

    async def answer(self) -> DiskAnswer:
        survey, standings = await self._disk.survey(), await self.evictions.standings()
        frees = self.evictions.frees(standings)
        state = self._state()
        named = {blob for one in standings for blob in one.stored.blobs}
        me = state.nodes.get(self._me)
        return DiskAnswer(
            **msgspec.structs.asdict(self._told(survey, standings)),
            node=self._me,
            name=me.name if me is not None else self._me,
            partial_bytes=sum(file.size_bytes for file in survey.partials.values()),
            damaged_bytes=sum(file.size_bytes for file in survey.damaged.values()),
            other_bytes=survey.other_bytes
            + sum(file.size_bytes for blob, file in survey.blobs.items() if blob not in named),
            models=tuple(_row(one, frees[one.stored.key], state) for one in standings),
            scrub=self.scrubber.row,
        )

    # ── inside ──────────────────────────────────────────────────────────────────────

    def _told(self, survey: Survey, standings: Sequence[Standing]) -> DiskFigures:
        limits = self._limits(survey)
        self._figures = DiskFigures(
            total_bytes=survey.total_bytes,
            free_bytes=survey.free_bytes,
            used_bytes=survey.used_bytes,
            quota_bytes=limits.quota_bytes,
            low_water_bytes=limits.low_water_bytes,
            coming_bytes=self.rooms.taken(survey),
            room_bytes=max(0, self._left(survey)),
            evictable_bytes=self.evictions.evictable_bytes(standings),
            **self._counts(),
        )
        return self._figures

    def _counts(self) -> dict[str, int]:
        return {
            "hits": self.uses.hits,
            "misses": self.uses.misses,
            "evictions": self.evictions.evictions,
            "evicted_bytes": self.evictions.evicted_bytes,
            "refused": self.rooms.refused,
            "scrubbed_bytes": self.scrubber.scrubbed_bytes,
            "corrupt": self.scrubber.corrupt,
            "repaired": self.scrubber.repaired,
        }

    def _left(self, survey: Survey) -> int:
        return self._limits(survey).left(survey) - self.rooms.taken(survey)

    @property
    def _claimed(self) -> dict[BlobId, int]:
        return self.rooms.claimed()

    async def _look(self) -> None:
        within = await self.rooms.restore()
        if within:
            self.above = None
        elif self.above is None:
            self.above = Above(await self._why(), self._clock.time())
            log.warning(ABOVE, why=self.above.why.removeprefix("; "))
        survey = await self._disk.survey()
        self._told(survey, await self.evictions.standings())
        self.uses.keep({one.key for one in self._models.stored()}, survey.blobs.keys())
        if self._clock.monotonic() - self._written_at >= WRITE_S:
            await self._keep()

    async def _keep(self) -> None:
        self._written_at = self._clock.monotonic()
        if not self.uses.changed:
            return
        try:
            await self._write(self.uses.record())
        except OllamaDistributedError as exc:
            self.uses.changed = True
            log.warning(NOT_KEPT, error=exc.message)

    async def _make(self, need: int, survey: Survey) -> bool:
        """Leftovers first, then models; see `room.Rooms`."""
        freed = await self._drop_leftovers(need, survey)
        return freed > 0 or await self.evictions.free(need) > 0

    async def _drop_leftovers(self, need: int, survey: Survey) -> int:
        """Damaged files, then half-fetched ones that nobody fetches now, then files that nobody
        named; the oldest of each first, until there is enough."""
        freed, claimed = 0, self._claimed
        kinds: Mapping[Leftover, Mapping[BlobId, StoredFile]] = {
            "damaged": survey.damaged,
            "partial": survey.partials,
        }
        for kind, files in kinds.items():
            for blob, file in sorted(files.items(), key=lambda one: one[1].modified_at):
                if freed >= need:
                    return freed
                if blob not in claimed and await self._disk.drop_leftover(kind, blob):
                    log.info("disk.leftover_dropped", kind=kind, blob=blob.digest)
                    freed += file.size_bytes
        if freed < need:
            strays = self._strays(survey)
            await self._models.forget(strays)
            here = (await self._disk.survey()).blobs if strays else {}
            freed += sum(survey.blobs[blob].size_bytes for blob in strays if blob not in here)
        return freed

    def _strays(self, survey: Survey) -> list[BlobId]:
        named = {blob for one in self._models.stored() for blob in one.blobs}
        before = self._clock.time() - STRAY_S
        return [
            blob for blob, file in survey.blobs.items() if blob not in named and file.modified_at < before
        ]

    async def _why(self) -> str:
        """Which models stay: `; of the models here stay: 2 the last copy, 1 loaded`."""
        counts = Counter(one.kept for one in await self.evictions.standings() if one.kept)
        kinds = ", ".join(f"{count} {_WHY[kept]}" for kept, count in counts.most_common())
        return f"; of the models here stay: {kinds}" if kinds else ""


def _row(one: Standing, frees_bytes: int, state: ClusterState) -> ModelOnDisk:
    return ModelOnDisk(
        model=one.stored.name.display,
        size_bytes=one.stored.size_bytes,
        frees_bytes=frees_bytes,
        last_used=one.last_used,
        kept=one.kept,
        others=tuple(state.nodes[node].name for node in one.others if node in state.nodes),
        damaged=one.stored.lacking,
    )
