"""Lets models go from this node's disk: asks who else keeps them, then removes them here.

`eviction.py` decides; other nodes' copies are those of the replicated state, and each one that
counts has promised, right before, to stay.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from itertools import islice

import msgspec
import structlog

from ollama_distributed.base.amounts import size_text
from ollama_distributed.base.disk import Kept
from ollama_distributed.base.errors import Conflict, ModelNotFound, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.disk_ports import Disks, KeepAsk, Models
from ollama_distributed.distribution.eviction import (
    Attempt,
    Candidate,
    Leaving,
    choose,
    freed_bytes,
    spare,
    weight,
)
from ollama_distributed.distribution.uses import Uses
from ollama_distributed.models.names import BlobId, name_key
from ollama_distributed.models.stored import StoredModel
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import HeldModel

log = structlog.get_logger()

EVICTED = "disk.evicted"
RECENT_S = 60.0
"""A model that was asked for so lately may be on its way into memory."""
SPARE_ASKS = 3
"""Holders that are asked beyond those that are needed, when some cannot promise."""
AT_ONCE = 32
"""Models that are looked at before others get the loop: 1.5 ms where each has many holders."""
MOST_HOLDERS = 256
"""Looked at for each model; of thousands these are enough."""

_REFUSALS: dict[Kept, str] = {
    "loaded": "it is loaded; stop it first (ollama-distributed stop {model})",
    "moving": "it is on its way from or to another node (ollama-distributed transfers); try again later",
    "pinned": "it is pinned to this node; take the pin away first (ollama-distributed model unpin)",
    "placed": "the cluster's plan wants it on this node (ollama-distributed model place {model})",
}
_NOTHING: Kept = ""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """One model on this disk."""

    stored: StoredModel
    last_used: float
    kept: Kept
    others: tuple[NodeId, ...]
    """Online, with the same version; the heaviest first. Of many, some."""
    wanted: int
    """So many of them must stay."""
    spare: bool
    """Others are its keepers (`eviction.spare`)."""
    planned: bool
    """The cluster's plan has it here."""


class Evictions:
    """`loaded`: keys of models in memory, or on their way there. `moving`: blobs that are on their way
    from or to this node. `whole`: all files of a model are on the disk now."""

    def __init__(
        self,
        me: NodeId,
        models: Models,
        uses: Uses,
        others: Disks,
        state: Callable[[], ClusterState],
        *,
        loaded: Callable[[], Collection[str]],
        moving: Callable[[], Collection[BlobId]],
        unload: Callable[[str], Awaitable[None]],
        whole: Callable[[StoredModel], Awaitable[bool]],
    ) -> None:
        self._me = me
        self._models = models
        self._uses = uses
        self._others = others
        self._state = state
        self._loaded = loaded
        self._moving = moving
        self._unload = unload
        self._whole = whole
        self._leaving = Leaving(me)
        self.evictions = 0
        self.evicted_bytes = 0

    # ── what there is ───────────────────────────────────────────────────────────────

    async def standings(self) -> list[Standing]:
        """Every model on this disk, in the order in which they would go."""
        found: list[Standing] = []
        models = self._models.stored()
        for begin in range(0, len(models), AT_ONCE):
            found += self._look(models[begin : begin + AT_ONCE])
            await asyncio.sleep(0)
        return sorted(found, key=lambda one: (one.planned, one.last_used, one.stored.key))

    def spare_bytes(self, standings: Sequence[Standing]) -> int:
        """What may become free here without any other node's giving way, or the plan's: room that
        plans may count on."""
        free = [one for one in standings if one.kept in ("", "recent") and one.spare and not one.planned]
        return self._freed(free, standings)

    def evictable_bytes(self, standings: Sequence[Standing]) -> int:
        return self._freed([one for one in standings if not one.kept], standings)

    def frees(self, standings: Sequence[Standing]) -> dict[str, int]:
        """By `key`: what no other model needs."""
        users = Counter(blob for one in standings for blob in one.stored.blobs)
        return {
            one.stored.key: sum(size for blob, size in one.stored.blobs.items() if users[blob] == 1)
            for one in standings
        }

    # ── letting go ──────────────────────────────────────────────────────────────────

    async def free(self, need_bytes: int) -> int:
        """Let the least recently used go until so many bytes are free; nothing, unless that can
        be reached. Returns what became free."""
        refused: set[str] = set()
        held = dict[str, Attempt]()
        try:
            while True:
                standings = await self.standings()
                may = {one.stored.key: one for one in standings if not one.kept or one.stored.key in held}
                chosen = choose(
                    [_candidate(one) for key, one in may.items() if key not in refused],
                    _blobs(
                        [one for one in standings if one.stored.key not in may or one.stored.key in refused]
                    ),
                    need_bytes,
                )
                unasked = [key for key in chosen if key not in held]
                if not unasked:
                    break
                asked = await asyncio.gather(*(self._asked(may[key]) for key in unasked))
                for key, attempt in zip(unasked, asked, strict=True):
                    if attempt is None:
                        refused.add(key)
                    else:
                        held[key] = attempt
            return sum([await self._drop(held[key], may[key]) for key in chosen])
        finally:
            for attempt in held.values():
                self._leaving.end(attempt)

    async def drop(self, name: str, digest: str) -> None:
        """Let this model go, in whatever version, because the plan wants it here no more. `digest`: of
        the version that somebody else must keep.

        Raises:
            Conflict: nobody promises that, or it is in use.
        """
        one = self._find(name)
        if one is not None and one.kept == "loaded":
            await self._unload(name)
            one = self._find(name)
        if one is None:
            return
        display = one.stored.name.display
        if one.kept in ("loaded", "moving"):
            raise Conflict(f"{display} stays: {_REFUSALS[one.kept].format(model=display)}")
        there = msgspec.structs.replace(one.stored, digest=digest)
        attempt = await self._promised(there, self.holders(there), 1)
        if attempt is None:
            raise Conflict(f"{display} stays: no other node that is online promised to keep it")
        try:
            await self._drop(attempt, one)
        finally:
            self._leaving.end(attempt)

    async def evict(self, name: str, *, last_copy: bool = False) -> int:
        """Let this model go now. `last_copy`: even if nobody else holds it. Returns what became free.

        Raises:
            ModelNotFound: it is not here.
            Conflict: it must stay; says why, and what to do.
        """
        one = self._find(name)
        if one is None:
            raise ModelNotFound(f"model '{name}' is not on this node's disk")
        display = one.stored.name.display
        if one.stored.lacking:
            raise Conflict(f"{display} is damaged: delete it (rm), or fetch it again (pull)")
        if one.kept in _REFUSALS:
            raise Conflict(f"{display} stays: {_REFUSALS[one.kept].format(model=display)}")
        if one.planned and not last_copy:
            raise Conflict(
                f"{display} stays: the cluster keeps copies on nodes with room, and would bring it back; "
                f"say how many are wanted (ollama-distributed model replicas {display} 1)"
            )
        if one.kept == "last" and not last_copy:
            raise Conflict(f"{display} stays: {self._lack(one)}")
        attempt = await self._promised(one.stored, one.others, 0 if last_copy else one.wanted)
        if attempt is None:
            raise Conflict(f"{display} stays: no node that holds it could promise to keep it; try again")
        try:
            if not last_copy and self._again(one):
                raise Conflict(f"{display} stays: it came into use just now")
            return await self._drop(attempt, one)
        finally:
            self._leaving.end(attempt)

    def holders(self, stored: StoredModel) -> Sequence[NodeId]:
        """Other nodes that are online and hold this version; of many, some."""
        state = self._state()
        return self._online(state, state.models.get(stored.key, {}), stored.digest, 1)

    async def promise(self, by: NodeId, ask: KeepAsk) -> bool:
        """Whether this node keeps its copy, now that `by` lets its own go."""
        mine = self._copy(ask)
        if mine is None or not await self._whole(mine):
            return False
        return self._leaving.promise(by, ask.model, ask.digest, holds=self._copy(ask) is not None)

    # ── inside ──────────────────────────────────────────────────────────────────────

    def _copy(self, ask: KeepAsk) -> StoredModel | None:
        """What is here to be promised. A node that drains is about to give its copies away."""
        known = self._state().nodes.get(self._me)
        if known is not None and known.drained:
            return None
        mine = next((one for one in self._models.stored() if one.key == ask.model), None)
        return mine if mine is not None and mine.digest == ask.digest and not mine.lacking else None

    def _find(self, name: str) -> Standing | None:
        key = name_key(name)
        found = self._look([one for one in self._models.stored() if one.key == key])
        return found[0] if found else None

    def _look(self, models: Sequence[StoredModel]) -> list[Standing]:
        state, loaded, moving = self._state(), self._loaded(), self._moving()
        return [self._standing(state, one, loaded, moving) for one in models]

    def _standing(
        self,
        state: ClusterState,
        stored: StoredModel,
        loaded: Collection[str],
        moving: Collection[BlobId],
    ) -> Standing:
        held: Mapping[NodeId, HeldModel] = state.models.get(stored.key, {})
        desired = state.desired.get(stored.key)
        least = desired and (desired.min if desired.replicas is None else desired.replicas)
        wanted = max(1, least or 0)
        others = self._online(state, held, stored.digest, wanted)
        planned, kept = self._planned(state, stored.key), _NOTHING
        if stored.key in loaded:
            kept = "loaded"
        elif stored.largest in moving:  # small ones (licenses, templates) are of many models
            kept = "moving"
        elif desired is not None and self._me in desired.pins:
            kept = "pinned"
        elif planned and desired is not None:
            kept = "placed"
        elif len(others) < wanted or stored.lacking:
            kept = "last"
        elif self._uses.recently(stored.key, RECENT_S):
            kept = "recent"
        return Standing(
            stored=stored,
            last_used=self._uses.last_used(stored.key),
            kept=kept,
            others=tuple(sorted(others, key=lambda node: weight(stored.digest, node), reverse=True)),
            wanted=wanted,
            spare=spare(self._me, stored.digest, others, copies=wanted),
            planned=planned,
        )

    def _online(
        self, state: ClusterState, held: Mapping[NodeId, HeldModel], digest: str, wanted: int
    ) -> list[NodeId]:
        """Holders of this version; of many as many as it takes to know that enough of them are
        heavier, and a few to ask."""
        found: list[NodeId] = []
        mine, heavier = weight(digest, self._me), 0
        for node, model in islice(held.items(), MOST_HOLDERS):
            known = state.nodes.get(node)
            if node == self._me or model.digest != digest or known is None or known.status != "online":
                continue
            found.append(node)
            heavier += weight(digest, node) > mine
            if heavier >= wanted and len(found) >= wanted + SPARE_ASKS:
                break
        return found

    def _planned(self, state: ClusterState, key: str) -> bool:
        known = state.nodes.get(self._me)
        assigned = known.assigned if known is not None else None
        return assigned is not None and (
            any(one.model == key for one in assigned.models)
            or any(task.model == key and task.kind in ("fetch", "load") for task in assigned.tasks)
        )

    def _lack(self, one: Standing) -> str:
        command = "copy it first (model distribute), or give --last-copy if it may be lost"
        if not one.others:
            return f"no other node that is online holds this version; {command}"
        return f"{one.wanted} other nodes are to hold it and {len(one.others)} do; {command}"

    def _again(self, one: Standing) -> bool:
        """It came into use since it was looked at."""
        now = self._find(one.stored.key)
        if now is None or now.stored.digest != one.stored.digest:
            return True
        return now.kept in _REFUSALS or (now.kept == "recent" and one.kept != "recent")

    async def _asked(self, one: Standing) -> Attempt | None:
        return await self._promised(one.stored, one.others, one.wanted)

    async def _promised(self, stored: StoredModel, others: Sequence[NodeId], copies: int) -> Attempt | None:
        """To be ended by the caller. None: it cannot go."""
        attempt = self._leaving.begin(stored.key, stored.digest, copies)
        if attempt is None:
            return None
        try:
            ask = KeepAsk(model=stored.key, digest=stored.digest)
            for node in others[: copies + SPARE_ASKS]:
                if len(attempt.promised) >= copies or attempt.given_up:
                    break
                try:
                    if await self._others.keep(node, ask):
                        attempt.promised.add(node)
                except OllamaDistributedError as exc:
                    log.info("disk.holder_not_asked", model=stored.key, node=node, error=exc.message)
        except BaseException:
            self._leaving.end(attempt)
            raise
        if attempt.given_up or len(attempt.promised) < copies:
            self._leaving.end(attempt)
            return None
        return attempt

    async def _drop(self, attempt: Attempt, one: Standing) -> int:
        """What became free; 0: it came into use, or is gone already."""
        if attempt.copies and self._again(one):
            return 0
        if not self._leaving.settle(attempt):
            return 0
        others = {
            blob for model in self._models.stored() if model.key != one.stored.key for blob in model.blobs
        }
        freed = sum(size for blob, size in one.stored.blobs.items() if blob not in others)
        try:
            await self._models.delete(str(one.stored.name))
        except ModelNotFound:
            return 0
        self.evictions += 1
        self.evicted_bytes += freed
        log.info(
            EVICTED,
            model=one.stored.name.display,
            freed=size_text(freed),
            kept_by=sorted(attempt.promised),
            last_used=round(one.last_used),
        )
        return freed

    def _freed(self, going: Sequence[Standing], standings: Sequence[Standing]) -> int:
        keys = {one.stored.key for one in going}
        return freed_bytes(
            map(_candidate, going), _blobs([one for one in standings if one.stored.key not in keys])
        )


def _candidate(one: Standing) -> Candidate:
    sizes = {blob.hex: size for blob, size in one.stored.blobs.items()}
    return Candidate(model=one.stored.key, blobs=sizes, last_used=one.last_used, planned=one.planned)


def _blobs(standings: Sequence[Standing]) -> frozenset[str]:
    return frozenset(blob.hex for one in standings for blob in one.stored.blobs)
