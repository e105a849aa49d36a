"""This machine as it is: described, and measured without keeping the event loop waiting."""

from __future__ import annotations

import platform
import random
import threading
import time
from collections.abc import Callable

import anyio
import anyio.to_thread
import psutil
import pytest
from tests.limits import SOON_S
from tests.unit.hardware.nvml_double import NvmlDouble

from ollama_distributed.adapters.hardware import Sampler, describe, gpu_watch
from ollama_distributed.adapters.hardware import sampler as sampling
from ollama_distributed.adapters.hardware.gpus import Nvml, open_nvml
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.cluster.membership.utilization import Utilization

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


def sampler(library: NvmlDouble | None = None) -> Sampler:
    def open_gpus() -> Nvml | None:
        return open_nvml(library or NvmlDouble(driver=False))

    return Sampler(clock=SystemClock(), chance=random.Random(1), open_gpus=open_gpus)


def test_this_machine() -> None:
    hardware = describe()
    assert 1 <= hardware.cpus <= (psutil.cpu_count() or 1)
    assert 0 < hardware.memory_bytes <= psutil.virtual_memory().total
    assert hardware.system == f"{platform.system()} {platform.machine()}"
    assert hardware.cpu_model
    assert all(gpu.memory_bytes > 0 for gpu in hardware.gpus)


async def test_work_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SAMPLE_S", 0.2)
    async with sampler() as machine:
        first = machine.usage()
        assert 0.0 < first.memory < 1.0
        assert (first.gpu, first.gpu_memory) == (None, None)
        stop = time.monotonic() + SOON_S

        def work() -> None:
            while machine.usage().cpu < 1 / (psutil.cpu_count() or 1) / 2:
                assert time.monotonic() < stop, "a core's work does not show"
                sum(range(20_000))

        await anyio.to_thread.run_sync(work)


async def test_sampling_never_keeps_the_loop_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and the driver are read in other threads, each time."""
    monkeypatch.setattr(sampling, "SAMPLE_S", 0.01)
    monkeypatch.setattr(gpu_watch, "SAMPLE_S", 0.01)
    library, loops = NvmlDouble(), threading.current_thread()
    read_in: dict[str, list[threading.Thread]] = {"read": [], "nvmlDeviceGetUtilizationRates": []}

    def noting(name: str, read: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object) -> object:
            read_in[name].append(threading.current_thread())
            return read(*arguments)

        return noted

    for owner, name in zip((sampling.Meter, library), read_in, strict=True):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    async with sampler(library) as machine:
        await until(lambda: bool(machine.usage()) and all(len(threads) > 10 for threads in read_in.values()))
    assert loops not in {thread for threads in read_in.values() for thread in threads}


async def test_gpus_are_sampled_and_closed() -> None:
    library = NvmlDouble()
    async with sampler(library) as machine:
        seen: list[Utilization] = []

        def one() -> bool:
            seen.append(machine.usage())
            return seen[-1].gpu is not None

        await until(one)
        assert (seen[-1].gpu, seen[-1].gpu_memory) == (0.5, 0.25)
    assert library.open == 0


async def test_a_driver_that_hangs_costs_its_own_figures_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_watch, "PATIENCE_S", 0.3)
    monkeypatch.setattr(gpu_watch, "SAMPLE_S", 0.05)
    monkeypatch.setattr(gpu_watch, "CLOSE_S", 0.1)
    monkeypatch.setattr(sampling, "SAMPLE_S", 0.05)
    library = NvmlDouble()
    hang = library.hang = threading.Event()
    hang.set()
    try:
        async with sampler(library) as machine:
            await until(lambda: machine.usage().gpu == 0.5)
            hang.clear()
            await until(lambda: library.stuck == 1 and machine.usage().gpu is None)
            asked, before = library.asked, machine._usage
            await until(lambda: machine._usage is not before)  # the rest goes on
            assert library.asked == asked  # and nobody else waits in the driver
            hang.set()
            await until(lambda: machine.usage().gpu == 0.5)
            hang.clear()
            await until(lambda: machine.usage().gpu is None)
        # Closed in time, and its thread is gone once the driver answers.
    finally:
        hang.set()
    await until(lambda: library.open == 0)
    await until(lambda: not any(thread.name == "gpu watch" for thread in threading.enumerate()))


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON_S):
        while not condition():
            await anyio.sleep(0.01)
