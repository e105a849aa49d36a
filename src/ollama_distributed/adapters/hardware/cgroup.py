"""The limits of the control groups that this process is in, and what they have used.

Inside a container the groups' root is the container's own; on a machine a service manager may
have put us some levels down, and each level limits. Source: the kernel's `cgroup-v2`
documentation, `cpu.max`, `cpu.stat`, `memory.max`, `memory.stat`. No v2, or not Linux: no limits.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


class Limit(msgspec.Struct, frozen=True):
    """The tightest one, and the folder of the group that has it."""

    amount: float
    group: Path


class Cgroups:
    def __init__(self, root: Path = ROOT, own: Path = OWN) -> None:
        self._levels = _levels(root, own)

    def cpu(self) -> Limit | None:
        """In cores: 1.5 is one and a half."""
        limits = [Limit(cores, level) for level in self._levels if (cores := _quota_cores(level))]
        return min(limits, key=lambda limit: limit.amount, default=None)

    def memory(self) -> Limit | None:
        """In bytes."""
        limits = [Limit(size, level) for level in self._levels if (size := _number(level / "memory.max"))]
        return min(limits, key=lambda limit: limit.amount, default=None)


def cpu_used_s(group: Path) -> float | None:
    """Processor time of the group since it was made."""
    used = _fields(group / "cpu.stat").get("usage_usec")
    return None if used is None else used / 1e6


def memory_used_bytes(group: Path) -> int | None:
    """Without what the page cache gives back when memory is asked for."""
    used = _number(group / "memory.current")
    if used is None:
        return None
    return max(0, used - _fields(group / "memory.stat").get("inactive_file", 0))


def _levels(root: Path, own: Path) -> list[Path]:
    """The group's folder and all above it that are there."""
    for line in (_text(own) or "").splitlines():
        number, _, path = line.partition("::")
        parts = [part for part in path.split("/") if part]
        if number == "0" and ".." not in parts:
            folders = [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
            return [folder for folder in folders if folder.is_dir()]
    return [root]


def _quota_cores(group: Path) -> float | None:
    """`cpu.max` is quota and period in µs, or `max`."""
    quota, _, period = (_text(group / "cpu.max") or "max").partition(" ")
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None
    return int(quota) / int(period)


def _fields(file: Path) -> dict[str, int]:
    fields: dict[str, int] = {}
    for line in (_text(file) or "").splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            fields[name] = int(value)
    return fields


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text is not None and text.isdigit() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
