"""What this machine drew, where it tells: RAPL counters of the processor packages, NVML's of GPUs.

Linux lets only root read RAPL unless an administrator says otherwise, and many virtual machines
have none; then nothing is measured. Reading blocks; callers use a worker thread.
"""

from __future__ import annotations

from pathlib import Path

from ollama_distributed.adapters.hardware.gpus import Nvml

POWERCAP = Path("/sys/class/powercap")
MICRO = 1e-6


class EnergyMeter:
    """`read` gives the joules since the last reading."""

    def __init__(self, gpus: Nvml | None = None, powercap: Path = POWERCAP) -> None:
        self._gpus = gpus
        self._zones: dict[Path, tuple[float, float]] = {}
        """Of each package: the counter's range and its last reading, joules."""
        self._gpu_j: float | None = None
        for zone in sorted(powercap.glob("intel-rapl:*")):
            # intel-rapl:0 is a package; intel-rapl:0:0 (cores, memory) is a part of one.
            if zone.name.count(":") != 1 or (range_j := _joules(zone / "max_energy_range_uj")) is None:
                continue
            if (now_j := _joules(zone / "energy_uj")) is not None:
                self._zones[zone] = (range_j, now_j)

    def read(self) -> float | None:
        """None: the machine does not tell."""
        found: list[float] = []
        for zone, (range_j, before_j) in self._zones.items():
            now_j = _joules(zone / "energy_uj")
            if now_j is None:
                continue
            self._zones[zone] = (range_j, now_j)
            found.append(now_j - before_j if now_j >= before_j else now_j + range_j - before_j)
        total = self._gpus.energy_j() if self._gpus is not None else None
        if total is not None:
            if self._gpu_j is not None and total >= self._gpu_j:
                found.append(total - self._gpu_j)
            self._gpu_j = total
        return sum(found) if found else None


def _joules(path: Path) -> float | None:
    try:
        return int(path.read_text()) * MICRO
    except (OSError, ValueError):
        return None
