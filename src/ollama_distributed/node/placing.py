"""Placement on this node: what it has for models, and how it brings, runs and removes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, ModelNotFound, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.placement import PlacementFigures
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.exchange import MAX_PEERS, CopyAsk
from ollama_distributed.models.names import name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.node.settings import Settings
from ollama_distributed.placement.facts import Device, Rules
from ollama_distributed.placement.outcome import Plan
from ollama_distributed.placement.ports import Inventory, Mover
from ollama_distributed.placement.seen import Loading
from ollama_distributed.placement.wishes import Policy
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.serving.speeds import Speed
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Hardware, LoadedPlace, MeasuredSpeed

RULES = Rules(disk_low_bytes=0)
"""What must stay free of a disk is off the room that its node tells; what is surplus goes when the
disk's own care needs its room."""
DISK_S = 5.0
"""Between two looks at the disk: each reads the store's folders."""
MEMORY_STEP = 64 << 20
"""Memory of loaded models is said in steps, rounded up."""


class Placing:
    """What a life in a cluster needs to take part in placement. `mover` comes once all else of the
    node is built, and before its first life."""

    def __init__(self, settings: Settings) -> None:
        self.mover: Mover | None = None
        self.counts: Counter[tuple[str, str]] = Counter()
        """Tasks that ended since the start, by kind and outcome (`done`, `failed`)."""
        self.use(settings)

    def use(self, settings: Settings) -> None:
        """Settings that hold from now on."""
        self.policy = Policy(
            copies=settings.placement_copies,
            keep_alive_s=settings.keep_alive,
            grace_s=settings.placement_grace,
            loading=Loading(
                context_tokens=settings.context_length or Loading().context_tokens,
                slots=settings.num_parallel,
                kv_type=settings.kv_cache_type,
            ),
        )

    def figures(self, plan: Plan | None) -> PlacementFigures:
        """`plan`: the latest, of a node that leads."""
        return PlacementFigures(
            tasks=dict(self.counts),
            waiting=plan.waiting if plan is not None else None,
            short=len(plan.refusals) if plan is not None else None,
        )


class Models(Protocol):
    """The catalogue of this node (`catalog.service.Catalog`)."""

    def knows(self, name: str) -> bool: ...

    async def resolve(self, name: str) -> ModelSpec: ...


class Runs(Protocol):
    """What runs models here (`serving.service.Serving`)."""

    @property
    def budget_bytes(self) -> int: ...

    @property
    def seats(self) -> int: ...

    def loaded(self) -> list[LoadedModel]: ...

    def keep_alive(self, of: Mapping[str, float]) -> None: ...

    async def hold(self, name: str) -> None: ...

    def release(self, name: str) -> None: ...

    def retire(self, spec: ModelSpec) -> None: ...

    async def let_go(self, name: str) -> None: ...


class Copies(Protocol):
    """What comes to this node from others (`distribution.service.ModelTransfer`)."""

    async def copy_here(self, ask: CopyAsk) -> Transfer: ...

    async def ended(self, transfer_id: str) -> Transfer:
        """Wait until it is over."""
        ...


class NodeMover:
    """Implements `placement.ports.Mover`. `room`: bytes that may still come to the disk; `drop`:
    unloads and removes a model of this node, if others keep the version of the given digest."""

    def __init__(
        self,
        *,
        models: Models,
        runs: Runs,
        copies: Copies,
        drop: Callable[[str, str], Awaitable[None]],
        room: Callable[[], Awaitable[int]],
        state: Callable[[], ClusterState],
        hardware: Callable[[], Hardware],
        speeds: Callable[[], Sequence[Speed]],
        has_gpu: bool,
        clock: Clock,
    ) -> None:
        self._models = models
        self._runs = runs
        self._copies = copies
        self._drop = drop
        self._room = room
        self._state = state
        self._hardware = hardware
        self._speeds = speeds
        self._has_gpu = has_gpu
        self._clock = clock
        self._looked: tuple[float, int] = (float("-inf"), 0)
        """At the disk: when, and the room that was there."""

    # ── what is here ────────────────────────────────────────────────────────────────

    async def inventory(self) -> Inventory:
        wanted = self._state().desired
        self._runs.keep_alive(
            {name: one.keep_alive_s for name, one in wanted.items() if one.keep_alive_s is not None}
        )
        loaded: dict[str, LoadedPlace] = {}
        for row in self._runs.loaded():
            names = dict.fromkeys((name_key(row.spec.name), *row.held))
            now = [name for name in names if await self._is_now(name, row.spec)]
            if not now:
                self._runs.retire(row.spec)  # another version has the name: nobody asks for this one
            for name in row.held:
                if name not in now:
                    self._runs.release(name)
            for number, name in enumerate(now):
                loaded.setdefault(name, _place(name, row, first=not number))
        return Inventory(
            memory_bytes=self._runs.budget_bytes,
            gpu_bytes=sum(gpu.memory_bytes for gpu in self._hardware().gpus) if self._has_gpu else 0,
            seats=self._runs.seats,
            disk_free_bytes=await self._room_now(),
            speeds=tuple(
                MeasuredSpeed(
                    device=one.device,
                    weights_bytes=one.weights_bytes,
                    tokens_per_s=round(one.tokens_per_s, 1),
                )
                for one in self._speeds()
            ),
            loaded=tuple(loaded[name] for name in sorted(loaded)),
        )

    async def _room_now(self) -> int:
        now = self._clock.monotonic()
        if now - self._looked[0] >= DISK_S:
            self._looked = now, await self._room()
        return self._looked[1]

    async def _is_now(self, name: str, spec: ModelSpec) -> bool:
        """Whether the name's files here are those that are loaded."""
        if not self._models.knows(name):
            return False
        try:
            known = await self._models.resolve(name)
        except OllamaDistributedError:
            return False
        return (known.weights, known.remote) == (spec.weights, spec.remote)

    # ── `Mover` ─────────────────────────────────────────────────────────────────────

    async def fetch(self, model: str, digest: str, holders: Sequence[NodeId]) -> None:
        if await self._digest(model) == digest:
            return
        name = self._spelled(model, holders)
        ask = CopyAsk(name=name, sources=tuple(holders)[:MAX_PEERS], digest=digest)
        ended = await self._copies.ended((await self._copies.copy_here(ask)).id)
        if ended.state == "failed":
            raise Unavailable(ended.error)
        if await self._digest(model) != digest:
            raise Unavailable(f"the copy ended as {ended.state}, and another version of it is here")

    async def load(self, model: str, device: Device) -> None:  # noqa: ARG002  # the engine finds it alike
        await self._runs.hold(model)

    async def unload(self, model: str) -> None:
        await self._runs.let_go(model)

    async def delete(self, model: str) -> None:
        if not await self._digest(model):
            return
        current = self._state().current(model)
        if current is None:
            raise Conflict("nobody says which version counts: it stays")
        await self._drop(model, current.digest)

    async def _digest(self, model: str) -> str:
        """Of what is here; empty: nothing."""
        try:
            return (await self._models.resolve(model)).digest
        except ModelNotFound:
            return ""

    def _spelled(self, model: str, holders: Sequence[NodeId]) -> str:
        """As its holders write it: names keep their capitals on their way."""
        held = self._state().models.get(model)
        return next((held[node].display for node in holders if held and node in held), model)


def _place(name: str, row: LoadedModel, *, first: bool) -> LoadedPlace:
    """Names that share a runner share its memory: the first has it."""
    taken = -(-row.reserved_bytes // MEMORY_STEP) * MEMORY_STEP
    return LoadedPlace(
        model=name,
        device="gpu" if row.vram_bytes else "cpu",
        memory_bytes=taken if first else 0,
        held=name in row.held,
    )
