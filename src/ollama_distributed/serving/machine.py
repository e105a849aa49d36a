"""What this machine has for runners."""

from __future__ import annotations

import os

import psutil


class LocalMachine:
    """Implements `serving.ports.Machine` on the machine itself.

    Containers are given memory and cores by cgroup or affinity; affinity is honoured here,
    a memory limit by the setting `memory_limit_mib`.
    """

    def cores(self) -> int:
        logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        physical = psutil.cpu_count(logical=False) or logical
        return max(1, min(physical, logical))

    def memory_available_bytes(self) -> int:
        return int(psutil.virtual_memory().available)
