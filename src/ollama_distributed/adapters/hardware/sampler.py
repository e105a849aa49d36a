"""How busy this machine, or container, is: measured beside the work, read at once.

Files and the GPU driver are read in worker threads, so the event loop is never kept waiting;
a GPU driver that hangs costs its own figures only.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec
import psutil
import structlog

from ollama_distributed.adapters.hardware.cgroup import Cgroups, Limit, cpu_used_s, memory_used_bytes
from ollama_distributed.adapters.hardware.gpus import GpuUsage, Nvml, open_nvml
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.cluster import NodeUsage
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.tasks import end

SAMPLE_S = 1.0
"""As often as a heartbeat carries it."""
GPU_SAMPLE_S = 2.0
GPU_PATIENCE_S = 5.0
"""An answer of the driver takes a millisecond; after so long its figures are unknown."""

GPU_SILENT = "gpu.silent"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")


class Meter:
    """CPU and memory since the last reading; blocking, for one thread at a time."""

    def __init__(self, limits: Cgroups, clock: Clock) -> None:
        self._cpu_limit = limits.cpu()
        self._memory_limit = limits.memory()
        self._clock = clock
        self._machine = _machine_times()
        self._group = self._group_time(self._cpu_limit)

    def read(self) -> NodeUsage:
        return NodeUsage(cpu=_share(self._cpu()), memory=_share(self._memory()))

    def _cpu(self) -> float:
        before, self._machine = self._machine, _machine_times()
        total = self._machine[1] - before[1]
        busy = (self._machine[0] - before[0]) / total if total > 0 else 0.0
        if self._cpu_limit is None or self._group is None:
            return busy
        was, self._group = self._group, self._group_time(self._cpu_limit)
        if self._group is None or self._group[1] <= was[1]:
            return busy
        return (self._group[0] - was[0]) / (self._group[1] - was[1]) / self._cpu_limit.amount

    def _group_time(self, limit: Limit | None) -> tuple[float, float] | None:
        """Processor time of the group that is limited, and when."""
        used = None if limit is None else cpu_used_s(limit.group)
        return None if used is None else (used, self._clock.monotonic())

    def _memory(self) -> float:
        machine = psutil.virtual_memory()
        shares = [1.0 - machine.available / machine.total]
        limit = self._memory_limit
        if limit is not None and (used := memory_used_bytes(limit.group)) is not None:
            shares.append(used / limit.amount)
        # Whichever ends first: the machine's memory or the container's.
        return max(shares)


class Sampler:
    """An async context manager; inside, `usage` is at most a second or two old."""

    def __init__(
        self,
        *,
        clock: Clock,
        chance: random.Random,
        limits: Cgroups | None = None,
        open_gpus: Callable[[], Nvml | None] = open_nvml,
    ) -> None:
        self._limits = limits or Cgroups()
        self._clock = clock
        self._chance = chance
        self._open_gpus = open_gpus
        self._usage = NodeUsage()
        self._gpu = GpuUsage()
        self._threads = anyio.CapacityLimiter(1)
        self._gpu_thread = anyio.CapacityLimiter(1)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Sampler:
        meter = await anyio.to_thread.run_sync(
            partial(Meter, self._limits, self._clock), limiter=self._threads
        )
        await self._sample(meter)
        for name, work in (
            ("machine sampler", keep_going("sampler", partial(self._tick, meter), self._chance)),
            ("gpu sampler", keep_going("gpus", self._watch_gpus, self._chance)),
        ):
            self._tasks.append(asyncio.create_task(work, name=name))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end(self._tasks)

    def usage(self) -> NodeUsage:
        """The last figures; nothing is measured for it."""
        return msgspec.structs.replace(self._usage, gpu=self._gpu.busy, gpu_memory=self._gpu.memory)

    async def _tick(self, meter: Meter) -> None:
        await anyio.sleep(SAMPLE_S)
        await self._sample(meter)

    async def _sample(self, meter: Meter) -> None:
        self._usage = await anyio.to_thread.run_sync(meter.read, limiter=self._threads)

    async def _watch_gpus(self) -> None:
        nvml = await self._ask_gpus(self._open_gpus)
        if nvml is None:
            return await anyio.sleep_forever()
        try:
            while True:
                self._gpu = await self._ask_gpus(nvml.usage) or GpuUsage()
                await anyio.sleep(GPU_SAMPLE_S)
        finally:
            self._gpu = GpuUsage()
            await self._ask_gpus(nvml.close)

    async def _ask_gpus(self, question: Callable[[], T]) -> T | None:
        """None when the driver does not answer. Its thread is then left behind, and no other
        one is started before it is back."""
        with anyio.move_on_after(GPU_PATIENCE_S):
            return await anyio.to_thread.run_sync(question, limiter=self._gpu_thread, abandon_on_cancel=True)
        log.warning(GPU_SILENT, patience_s=GPU_PATIENCE_S)
        return None


def _machine_times() -> tuple[float, float]:
    """Busy and all processor seconds of the machine since its start."""
    times = psutil.cpu_times()
    # A guest's time is counted in `user` too; waiting for a disk is no work.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _share(value: float) -> float:
    return round(min(max(value, 0.0), 1.0), 4)
