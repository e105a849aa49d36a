"""How busy this machine, or container, is: measured beside the work, read at once.

Files and the GPU driver are read in threads, so the event loop is never kept waiting.
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

from ollama_distributed.adapters.hardware.cgroup import Cgroups, Limit, cpu_used_s, memory_used_bytes
from ollama_distributed.adapters.hardware.gpu_watch import GpuWatch
from ollama_distributed.adapters.hardware.gpus import Nvml, open_nvml
from ollama_distributed.base.clock import Clock
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.cluster.tasks import end

SAMPLE_S = 1.0
"""As often as a heartbeat carries it."""

T = TypeVar("T")


class Meter:
    """CPU and memory since the last reading; blocking, for one thread at a time."""

    def __init__(self, limits: Cgroups, clock: Clock) -> None:
        self._cpu_limit = limits.cpu()
        self._memory_limit = limits.memory()
        self._clock = clock
        self._machine = _machine_times()
        self._group = self._group_time(self._cpu_limit)

    def read(self) -> Utilization:
        return Utilization(cpu=_share(self._cpu()), memory=_share(self._memory()))

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
    """An async context manager; inside, `usage` is a second or two old."""

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
        self._usage = Utilization()
        self._gpus = GpuWatch(open_gpus, clock)
        self._thread = anyio.CapacityLimiter(1)
        self._sampling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Sampler:
        meter = await self._aside(partial(Meter, self._limits, self._clock))
        self._usage = await self._aside(meter.read)
        self._gpus.start()
        work = keep_going("sampler", partial(self._sample, meter), self._chance)
        self._sampling = asyncio.create_task(work, name="sampler")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._sampling is not None
        await end([self._sampling])
        await self._aside(self._gpus.stop)

    def usage(self) -> Utilization:
        """The last figures; nothing is measured for it."""
        gpus = self._gpus.usage()
        return msgspec.structs.replace(self._usage, gpu=gpus.busy, gpu_memory=gpus.memory)

    async def _sample(self, meter: Meter) -> None:
        await anyio.sleep(SAMPLE_S)
        self._usage = await self._aside(meter.read)

    async def _aside(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._thread)


def _machine_times() -> tuple[float, float]:
    """Busy and all processor seconds of the machine since its start."""
    times = psutil.cpu_times()
    # A guest's time is counted in `user` too; waiting for a disk is no work.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _share(value: float) -> float:
    return round(min(max(value, 0.0), 1.0), 4)
