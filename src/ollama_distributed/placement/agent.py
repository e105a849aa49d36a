"""A node does what the leader assigned to it, and says how far it is.

Tasks come from the node's `assign.<id>` record. Each runs once at a time; one that failed runs
again after a pause that doubles, as long as the leader still asks for it. What the node has and
does goes into its `nodes.<id>.placed` record, from which the leader plans on.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import assert_never

import anyio
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.ports import Coordination
from ollama_distributed.cluster.tasks import end
from ollama_distributed.placement.ports import Inventory, Mover
from ollama_distributed.placement.seen import files
from ollama_distributed.placement.tries import DISPLACED, Key, Tries, key_of
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import MeasuredSpeed, Placed, Task

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

DONE = "placement.done"
FAILED = "placement.failed"

LOOK_S = 1.0
"""The inventory is compared with what was said of it so often."""
DISK_STEP = 1 << 30
MEMORY_STEP = 256 << 20
"""A figure is said again when it is wrong by so much, or by a sixteenth: each byte would be a write
for the whole cluster."""
SPEED_STEP = 0.2
"""Of a measured speed, likewise."""


class PlacementAgent:
    """An async context manager; inside, it works."""

    def __init__(
        self,
        coordination: Coordination,
        mirror: Mirror,
        mover: Mover,
        *,
        node: NodeId,
        clock: Clock,
        chance: random.Random,
        counts: Counter[tuple[str, str]] | None = None,
    ) -> None:
        """`counts`: of tasks that ended, by kind and outcome (`done`, `failed`)."""
        self._coordination = coordination
        self._mirror = mirror
        self._mover = mover
        self._node = node
        self._clock = clock
        self._chance = chance
        self._running: dict[Key, tuple[Task, asyncio.Task[None]]] = {}
        self._tries = Tries()
        self._loaded: frozenset[str] = frozenset()
        """Models, as of the last inventory."""
        self._epoch = 0
        self._news = anyio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._counts: Counter[tuple[str, str]] = Counter() if counts is None else counts

    async def __aenter__(self) -> PlacementAgent:
        self._forget = self._mirror.on_change(self._changed)
        work = keep_going("placement agent", self._step, self._chance)
        self._loop = asyncio.create_task(work, name=f"placement agent of {self._node}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._forget()
        assert self._loop is not None
        await end([self._loop, *(running for _, running in self._running.values())])

    def _changed(self, before: ClusterState, after: ClusterState) -> None:
        if before.nodes.get(self._node) is not after.nodes.get(self._node):
            self._news.set()

    async def _step(self) -> None:
        with anyio.move_on_after(LOOK_S):
            await self._news.wait()
        self._news = anyio.Event()
        if not self._mirror.ready:
            return
        self._begin()
        await self._tell()

    def _begin(self) -> None:
        own = self._mirror.state.nodes.get(self._node)
        assigned = own.assigned if own is not None else None
        if assigned is None or assigned.epoch < self._epoch:
            return
        self._epoch = assigned.epoch
        wanted = {key_of(task): task for task in assigned.tasks}
        now = self._clock.monotonic()
        self._tries.asked(wanted, now)
        for key, task in wanted.items():
            if key in self._running or self._tries.rests(task, now):
                continue
            if self._tries.undone(task, self._loaded):
                self._fail(task, DISPLACED, self._tries.displaced(task, now, self._clock.time()))
                continue
            running = asyncio.create_task(self._run(key, task), name=f"{task.kind} {task.model}")
            self._running[key] = (task, running)

    async def _run(self, key: Key, task: Task) -> None:
        began = self._clock.monotonic()
        try:
            await self._do(task)
        except OllamaDistributedError as exc:
            self._failed(task, exc.message)
        except Exception as exc:  # the task's root: one that fails ends neither the agent nor the node
            log.exception(FAILED, kind=task.kind, model=task.model)
            self._failed(task, f"{type(exc).__name__}: {exc}")
        else:
            self._tries.done(task, self._clock.monotonic())
            self._counts[task.kind, "done"] += 1
            took_s = round(self._clock.monotonic() - began, 3)
            log.info(DONE, kind=task.kind, model=task.model, reason=task.reason, took_s=took_s)
        finally:
            self._running.pop(key, None)
            self._news.set()

    def _failed(self, task: Task, reason: str) -> None:
        self._fail(
            task, reason, self._tries.failed(task, reason, self._clock.monotonic(), self._clock.time())
        )

    def _fail(self, task: Task, reason: str, pause_s: float) -> None:
        self._counts[task.kind, "failed"] += 1
        log.warning(FAILED, kind=task.kind, model=task.model, error=reason, again_in_s=pause_s)

    async def _do(self, task: Task) -> None:
        match task.kind:
            case "fetch":
                await self._mover.fetch(task.model, task.digest, task.holders)
            case "load":
                await self._mover.load(task.model, task.device)
            case "unload":
                await self._mover.unload(task.model)
            case "delete":
                await self._mover.delete(task.model)
            case _:
                assert_never(task.kind)

    # ── what the node has and does ──────────────────────────────────────────────────

    async def _tell(self) -> None:
        own = self._mirror.state.nodes.get(self._node)
        if own is None or own.advert is None:
            return  # not of the cluster yet, or no more
        placed = self._placed(await self._mover.inventory(), own.placed)
        if placed == own.placed:
            return
        key = keys.placed(self._node)
        with suppress(Conflict):  # the mirror shows it soon; then again
            revision = await self._coordination.put(
                key, encode(placed), revision=self._mirror.state.revision_of(key)
            )
            with anyio.move_on_after(LOOK_S):
                await self._mirror.reach(revision)

    def _placed(self, inventory: Inventory, before: Placed | None) -> Placed:
        self._loaded = frozenset(one.model for one in inventory.loaded)
        tasks = [task for task, _ in self._running.values()]
        said = before or Placed(node=self._node)
        # Plans take off what is on its way.
        coming = sum(task.size_bytes for task in tasks if task.kind == "fetch")
        return Placed(
            node=self._node,
            memory_bytes=_steady(said.memory_bytes, inventory.memory_bytes, MEMORY_STEP),
            gpu_bytes=inventory.gpu_bytes,
            seats=inventory.seats,
            disk_free_bytes=_steady(said.disk_free_bytes, inventory.disk_free_bytes + coming, DISK_STEP),
            speeds=_speeds(said.speeds, inventory.speeds),
            loaded=tuple(sorted(inventory.loaded, key=lambda one: one.model)),
            fetching=tuple(sorted({files(t.model, t.digest) for t in tasks if t.kind == "fetch"})),
            loading=tuple(sorted(task.model for task in tasks if task.kind == "load")),
            failed=self._tries.rows(),
        )


def _steady(said: int, now: int, step: int) -> int:
    """What was said stays as long as so much is there, and not a step more; what falls is said
    with some room below."""
    step = max(step, said // 16)
    if now < said:
        return max(0, now - step // 2)
    return said if said and now < said + step else now


def _speeds(said: Iterable[MeasuredSpeed], now: Iterable[MeasuredSpeed]) -> tuple[MeasuredSpeed, ...]:
    """What was said stays as long as it is nearly right."""
    before = {(one.device, one.weights_bytes): one for one in said}
    rows = []
    for one in sorted(now, key=lambda one: (one.device, one.weights_bytes)):
        known = before.get((one.device, one.weights_bytes))
        near = (
            known is not None and abs(known.tokens_per_s - one.tokens_per_s) < SPEED_STEP * known.tokens_per_s
        )
        rows.append(known if known is not None and near else one)
    return tuple(rows)
