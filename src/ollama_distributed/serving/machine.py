"""What this machine, or the container that it is for us, has for runners.

Containers are bounded by cgroups, which neither the count of cores nor the free memory of
the machine shows; more threads than the quota is slower than fewer (DESIGN.md, trap 1).
Source: the kernel's `cgroup-v2` documentation, `cpu.max`, `memory.max`, `memory.stat`.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
"""Of cgroup v2; inside a container that is the container's own. The files are not there at
the root of a machine, and not under cgroup v1, where the machine's own figures hold."""
MEMINFO = Path("/proc/meminfo")


class LocalMachine:
    """Implements `serving.ports.Machine`."""

    def __init__(self, cgroup: Path = CGROUP) -> None:
        self._cgroup = cgroup
        self._bounded = (cgroup / "memory.max").exists()

    def cores(self) -> int:
        logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        physical = psutil.cpu_count(logical=False) or logical
        return max(1, min(physical, logical, self._quota_cores() or logical))

    def memory_available_bytes(self) -> int:
        free = _available_bytes()
        if not self._bounded:
            return free
        limit, used = self._number("memory.max"), self._number("memory.current")
        if limit is None or used is None:
            return free
        # Files in the page cache count as used, but go when memory is asked for.
        return max(0, min(free, limit - used + self._cached_bytes()))

    def _quota_cores(self) -> int | None:
        """`cpu.max` is quota and period in µs, or `max`."""
        quota, _, period = (self._text("cpu.max") or "max").partition(" ")
        if not (quota.isdigit() and period.isdigit()):
            return None
        return max(1, int(quota) // max(int(period), 1))

    def _cached_bytes(self) -> int:
        for line in (self._text("memory.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file" and value.isdigit():
                return int(value)
        return 0

    def _number(self, name: str) -> int | None:
        text = self._text(name)
        return int(text) if text is not None and text.isdigit() else None

    def _text(self, name: str) -> str | None:
        try:
            return (self._cgroup / name).read_text().strip()
        except OSError:
            return None


def _available_bytes() -> int:
    """Asked for once a second, and the whole of `/proc/meminfo` takes psutil ten times as long."""
    try:
        with MEMINFO.open("rb", buffering=0) as file:
            _, _, rest = file.read(512).partition(b"\nMemAvailable:")
        return int(rest.split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError, ValueError):  # not Linux
        return int(psutil.virtual_memory().available)
