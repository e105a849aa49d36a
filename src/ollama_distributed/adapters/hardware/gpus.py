"""NVIDIA GPUs through NVML, the driver's own library; none where there is no driver.

Every call may block (a GPU in trouble: for seconds), so callers use a worker thread. What one
GPU does not tell (MIG parts, virtual GPUs) is left out and does not hide the others.
"""

from __future__ import annotations

import importlib
from typing import Any

import msgspec
import structlog

from ollama_distributed.state.records import Gpu

GPUS_UNREADABLE = "gpus.unreadable"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class GpuUsage(msgspec.Struct, frozen=True):
    """Of all GPUs together, 0..1; None: they do not say."""

    busy: float | None = None
    memory: float | None = None


class Nvml:
    """The library, once opened; `close` it. `library` is `pynvml`, or a double of it."""

    def __init__(self, library: Any) -> None:
        self._nvml = library
        self._devices = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]

    def close(self) -> None:
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as exc:
            log.warning(GPUS_UNREADABLE, error=str(exc))

    def describe(self) -> tuple[Gpu, ...]:
        driver = _text(self._ask(self._nvml.nvmlSystemGetDriverVersion)) or ""
        gpus: list[Gpu] = []
        for device in self._devices:
            memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, device)
            gpus.append(
                Gpu(
                    name=_text(self._ask(self._nvml.nvmlDeviceGetName, device)) or "NVIDIA GPU",
                    memory_bytes=int(memory.total) if memory is not None else 0,
                    driver=driver,
                )
            )
        return tuple(gpus)

    def usage(self) -> GpuUsage:
        rates = [self._ask(self._nvml.nvmlDeviceGetUtilizationRates, device) for device in self._devices]
        busy = [float(rate.gpu) / 100.0 for rate in rates if rate is not None]
        memories = [self._ask(self._nvml.nvmlDeviceGetMemoryInfo, device) for device in self._devices]
        total = sum(int(memory.total) for memory in memories if memory is not None)
        used = sum(int(memory.used) for memory in memories if memory is not None)
        return GpuUsage(
            busy=sum(busy) / len(busy) if busy else None,
            memory=used / total if total else None,
        )

    def energy_j(self) -> float | None:
        """Drawn since the driver was loaded, by all together; None: they do not say."""
        told = [self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, device) for device in self._devices]
        known = [int(millijoules) for millijoules in told if millijoules is not None]
        return sum(known) / 1000.0 if known else None

    def _ask(self, question: Any, *arguments: Any) -> Any:
        """None where the driver does not say."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


def open_nvml(library: Any = None) -> Nvml | None:
    """None where no driver is there, or it does not work."""
    if library is None:
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return None
    try:
        library.nvmlInit()
    except library.NVMLError:
        return None  # the usual case: no NVIDIA driver on this machine
    try:
        return Nvml(library)
    except library.NVMLError as exc:
        log.warning(GPUS_UNREADABLE, error=str(exc))
        library.nvmlShutdown()
        return None


def _text(value: Any) -> str | None:
    """Older versions of the library answer with bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
