"""Limits of control groups, the CPU's name, and GPUs, from files and doubles."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from tests.unit.hardware.nvml_double import NvmlDouble

from ollama_distributed.adapters.hardware.cgroup import Cgroups, Limit, cpu_used_s, memory_used_bytes
from ollama_distributed.adapters.hardware.description import cpu_model, usable_cores, usable_memory_bytes
from ollama_distributed.adapters.hardware.gpus import GpuUsage, open_nvml
from ollama_distributed.adapters.hardware.sampler import Meter
from ollama_distributed.state.records import Gpu


class Groups:
    """Files of control groups; `path` is the group that this process is in."""

    def __init__(self, folder: Path, path: str = "/") -> None:
        self.root = folder / "cgroup"
        self.own = folder / "own"
        self.own.write_text(f"12:cpuset:/old\n0::{path}\n")
        (self.root / path.strip("/")).mkdir(parents=True)

    def write(self, path: str = "", **files: str) -> Path:
        group = self.root / path
        for name, text in files.items():
            (group / name.replace("_", ".", 1)).write_text(text + "\n")
        return group

    def cgroups(self) -> Cgroups:
        return Cgroups(self.root, self.own)


def test_no_groups_no_limits(tmp_path: Path) -> None:
    cgroups = Cgroups(tmp_path / "none", tmp_path / "nor this")
    assert (cgroups.cpu(), cgroups.memory()) == (None, None)
    assert 1 <= usable_cores(cgroups) <= (psutil.cpu_count() or 1)
    assert usable_memory_bytes(cgroups) == psutil.virtual_memory().total


def test_the_limits_of_a_container(tmp_path: Path) -> None:
    groups = Groups(tmp_path)
    group = groups.write(cpu_max="150000 100000", memory_max="1073741824")
    cgroups = groups.cgroups()
    assert cgroups.cpu() == Limit(1.5, group)
    assert cgroups.memory() == Limit(1 << 30, group)
    assert usable_cores(cgroups) == 1
    assert usable_memory_bytes(cgroups) == 1 << 30


def test_the_tightest_level_counts(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "/system.slice/ours.service")
    groups.write("system.slice", cpu_max="400000 100000", memory_max="1000")
    groups.write("system.slice/ours.service", cpu_max="50000 100000", memory_max="2000")
    assert groups.cgroups().cpu() == Limit(0.5, groups.root / "system.slice/ours.service")
    assert groups.cgroups().memory() == Limit(1000, groups.root / "system.slice")
    assert usable_cores(groups.cgroups()) == 1


@pytest.mark.parametrize("quota", ["max 100000", "", "x y", "-1 100000", "100000 0", "100000"])
def test_what_is_no_quota_is_no_limit(tmp_path: Path, quota: str) -> None:
    groups = Groups(tmp_path)
    groups.write(cpu_max=quota, memory_max="max")
    assert (groups.cgroups().cpu(), groups.cgroups().memory()) == (None, None)


def test_a_path_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    groups = Groups(tmp_path)
    groups.own.write_text("0::/../elsewhere\n")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "memory.max").write_text("5\n")
    assert groups.cgroups().memory() is None


def test_what_a_group_has_used(tmp_path: Path) -> None:
    groups = Groups(tmp_path)
    group = groups.write(
        cpu_stat="usage_usec 2500000\nuser_usec 1",
        memory_current="900",
        memory_stat="anon 500\ninactive_file 300",
    )
    assert cpu_used_s(group) == 2.5
    assert memory_used_bytes(group) == 600
    assert (cpu_used_s(tmp_path), memory_used_bytes(tmp_path)) == (None, None)


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def test_the_load_of_a_container_is_against_its_own_limits(tmp_path: Path) -> None:
    groups, clock = Groups(tmp_path), Clock()
    total = psutil.virtual_memory().total
    groups.write(
        cpu_max="50000 100000",
        cpu_stat="usage_usec 1000000",
        memory_max=f"{total}",
        memory_current=f"{total - 1}",
    )
    meter = Meter(groups.cgroups(), clock)
    clock.now += 2.0
    groups.write(cpu_stat="usage_usec 1250000")  # 0.25 s in 2 s, of half a core
    usage = meter.read()
    assert usage.cpu == 0.25
    assert usage.memory == 1.0
    clock.now += 2.0
    groups.write(cpu_stat="usage_usec 9000000")
    assert meter.read().cpu == 1.0
    assert 0.0 <= meter.read().cpu <= 1.0  # no time has passed


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor : 0\nmodel name\t: AMD  EPYC 9R14\nmodel name : second\n", "AMD EPYC 9R14"),
        ("processor : 0\nHardware : BCM2711\n", "BCM2711"),
    ],
)
def test_the_name_of_the_cpu(tmp_path: Path, text: str, name: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert cpu_model(file, tmp_path / "none") == name


def test_the_name_of_a_board(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nBogoMIPS : 108.00\n")
    (tmp_path / "model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    assert cpu_model(tmp_path / "cpuinfo", tmp_path / "model") == "Raspberry Pi 5 Model B Rev 1.0"


def test_no_driver_no_gpus() -> None:
    assert open_nvml(NvmlDouble(driver=False)) is None


def test_gpus_are_described_and_measured() -> None:
    library = NvmlDouble()
    nvml = open_nvml(library)
    assert nvml is not None
    assert nvml.describe() == (
        Gpu(name="GPU 0", memory_bytes=100, driver="570.1"),
        Gpu(name="GPU 1", memory_bytes=300, driver="570.1"),
    )
    assert nvml.usage() == GpuUsage(busy=0.5, memory=0.25)
    nvml.close()
    assert library.open == 0


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    library = NvmlDouble(
        refusing=frozenset({"nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName"})
    )
    nvml = open_nvml(library)
    assert nvml is not None
    assert nvml.usage() == GpuUsage()
    assert nvml.describe()[0] == Gpu(name="NVIDIA GPU", memory_bytes=0, driver="570.1")


def test_a_driver_that_fails_while_it_is_opened_is_closed_again() -> None:
    library = NvmlDouble(refusing=frozenset({"nvmlDeviceGetCount"}))
    assert open_nvml(library) is None
    assert library.open == 0
