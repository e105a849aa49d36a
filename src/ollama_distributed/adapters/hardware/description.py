"""What this machine, or the container that it is for us, consists of."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import psutil

from ollama_distributed.adapters.hardware.cgroup import Cgroups
from ollama_distributed.adapters.hardware.gpus import open_nvml
from ollama_distributed.serving.machine import LocalMachine
from ollama_distributed.state.records import Gpu, Hardware

CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")
"""On ARM boards, whose cpuinfo names no model."""
SYSCTL_S = 2.0


def describe(cgroups: Cgroups | None = None) -> Hardware:
    """Reads files and asks the GPU driver, up to a second or so: run it in a worker thread."""
    limits = cgroups or Cgroups()
    return Hardware(
        cpus=usable_cores(limits),
        cpu_model=cpu_model(),
        memory_bytes=usable_memory_bytes(limits),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.machine()}",
    )


def usable_cores(limits: Cgroups) -> int:
    cores, quota = LocalMachine().cores(), limits.cpu()
    return cores if quota is None else max(1, min(cores, int(quota.amount)))


def usable_memory_bytes(limits: Cgroups) -> int:
    total, limit = int(psutil.virtual_memory().total), limits.memory()
    return total if limit is None else min(total, int(limit.amount))


def cpu_model(cpuinfo: Path = CPUINFO, board: Path = BOARD) -> str:
    """As the maker calls it; empty where nobody says."""
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string")
    for line in _text(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Hardware", "cpu model") and value.strip():
            return " ".join(value.split())
    return _text(board).strip("\0 \n") or platform.processor()


def _gpus() -> tuple[Gpu, ...]:
    nvml = open_nvml()
    if nvml is None:
        return ()
    try:
        return nvml.describe()
    finally:
        nvml.close()


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=SYSCTL_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return platform.processor()
    return done.stdout.strip()


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
