"""A double of `pynvml`, with as many GPUs as asked for and what each of them refuses."""

from __future__ import annotations

import threading
from types import SimpleNamespace


class NvmlDouble:
    """`refusing`: names of functions that answer as a virtual GPU does."""

    class NVMLError(Exception):
        pass

    def __init__(
        self,
        memories: tuple[tuple[int, int], ...] = ((100, 25), (300, 75)),
        *,
        driver: bool = True,
        refusing: frozenset[str] = frozenset(),
    ) -> None:
        self.open = 0
        self.asked = 0
        self._memories = memories
        self._driver = driver
        self._refusing = refusing
        self.hang: threading.Event | None = None
        """Usage is answered once this is set."""
        self.stuck = 0
        """Threads that wait for that."""

    def _answer(self, name: str) -> None:
        assert self.open == 1, "asked while closed"
        if name in self._refusing:
            raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:  # noqa: N802  # the library's name
        if not self._driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._answer("nvmlShutdown")
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._answer("nvmlDeviceGetCount")
        return len(self._memories)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        self._answer("nvmlSystemGetDriverVersion")
        return b"570.1"

    def nvmlDeviceGetName(self, device: int) -> str:  # noqa: N802
        self._answer("nvmlDeviceGetName")
        return f"GPU {device}"

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:  # noqa: N802
        self._answer("nvmlDeviceGetMemoryInfo")
        total, used = self._memories[device]
        return SimpleNamespace(total=total, used=used)

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:  # noqa: N802
        self.asked += 1
        if self.hang is not None and not self.hang.is_set():
            self.stuck += 1
            self.hang.wait(120)
            self.stuck -= 1
        self._answer("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=40 + 20 * device)
