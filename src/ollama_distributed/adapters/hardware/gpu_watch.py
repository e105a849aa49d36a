"""Asks the GPU driver every few seconds, in a thread of its own.

A driver may hang for good when a GPU fails. So the thread is a daemon, which the program's end
does not wait for, and there is never a second one; figures that it does not renew expire.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import structlog

from ollama_distributed.adapters.hardware.gpus import GpuUsage, Nvml
from ollama_distributed.base.clock import Clock

SAMPLE_S = 2.0
PATIENCE_S = 5.0
"""An answer of the driver takes a millisecond; figures so old are none."""
CLOSE_S = 1.0

GPU_SILENT = "gpu.silent"
GPU_WATCH_FAILED = "gpu.watch_failed"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Reading(msgspec.Struct, frozen=True):
    usage: GpuUsage
    at: float


class GpuWatch:
    """`start`, read `usage` from any thread, `stop`."""

    def __init__(self, open_gpus: Callable[[], Nvml | None], clock: Clock) -> None:
        self._open = open_gpus
        self._clock = clock
        self._reading = _Reading(GpuUsage(), clock.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Blocks for `CLOSE_S` at most: run it in a worker thread."""
        self._stop.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning(GPU_SILENT, patience_s=CLOSE_S)

    def usage(self) -> GpuUsage:
        reading = self._reading
        return reading.usage if self._clock.monotonic() - reading.at <= PATIENCE_S else GpuUsage()

    def _run(self) -> None:
        try:
            nvml = self._open()
            if nvml is None:
                return
            try:
                while not self._stop.is_set():
                    self._reading = _Reading(nvml.usage(), self._clock.monotonic())
                    self._stop.wait(SAMPLE_S)
            finally:
                nvml.close()
        except Exception:  # a thread's root: the node goes on without these figures
            log.exception(GPU_WATCH_FAILED)
