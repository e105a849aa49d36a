"""The memory of the node's own process, against what it may take: measured here, off every request.

Runners are other processes with a bound of their own (`memory_limit_mib`). What counts is memory that
the kernel cannot take back by itself: pages of mapped files (libraries) it can.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import psutil
import structlog

from ollama_distributed.adapters.hardware.cgroup import Cgroups
from ollama_distributed.adapters.hardware.description import usable_memory_bytes
from ollama_distributed.gateway.overload import Overload

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

POLL_S = 0.25
"""A loopback client fills the 512 MiB that all bodies may take in less than a second."""
TRIM_S = 5.0
"""Between two times that the allocator is asked to give back what is free: it walks all of it."""
LEAST_BYTES, SHARE = 1 << 30, 0.25
"""Of the memory of the machine or its container: the rest is for models. A node takes some 200 MiB, and
as much again for a thousand streams."""
STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def bound_of(set_mib: int, usable_bytes: int) -> int:
    """What the node's own process may take. `set_mib` 0: its share of what is there."""
    wanted = set_mib << 20 if set_mib else max(LEAST_BYTES, int(SHARE * usable_bytes))
    return min(wanted, usable_bytes)


def own_memory_bytes() -> int:
    """10 µs; four times a second is nothing."""
    try:
        _, resident, shared, *_ = map(int, STATM.read_bytes().split())
    except OSError:  # not Linux
        return int(psutil.Process().memory_info().rss)
    return (resident - shared) * _PAGE_BYTES


class MemoryWatch:
    """Tells `overload` what it measures."""

    def __init__(
        self,
        set_mib: int,
        *,
        usable_bytes: int | None = None,
        used: Callable[[], int] = own_memory_bytes,
    ) -> None:
        """`set_mib`: the setting. `usable_bytes`: memory of the machine, or of its container."""
        self.overload = Overload()
        self.kept: Sequence[Callable[[], None]] = ()
        """Let go of what is kept for clients that may come back."""
        self._usable_bytes = usable_memory_bytes(Cgroups()) if usable_bytes is None else usable_bytes
        self._used = used
        self.use(set_mib)

    def use(self, set_mib: int) -> None:
        """From now on."""
        self.bound_bytes = bound_of(set_mib, self._usable_bytes)

    async def run(self) -> None:
        """Until it is cancelled."""
        looks = 0
        while True:
            self.look()
            if self.overload.closing and looks % round(TRIM_S / POLL_S) == 0:
                await asyncio.to_thread(trim)
            looks = looks + 1 if self.overload.closing else 0
            await anyio.sleep(POLL_S)

    def look(self) -> None:
        used, overload = self._used(), self.overload
        if overload.measured(used, self.bound_bytes):
            tell = log.warning if overload.closing else log.info
            step, bound = overload.step.name.lower(), self.bound_bytes
            tell("memory.step", step=step, used_mib=used >> 20, bound_mib=bound >> 20)
        if overload.dropping:
            for forget in self.kept:
                forget()


def trim() -> None:
    """Give memory that was freed back to the kernel; glibc keeps it otherwise. Takes milliseconds, in
    which it holds up nobody but who allocates."""
    release = _malloc_trim()
    if release is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # musl, macOS
        return None
    return found
