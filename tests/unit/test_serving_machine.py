"""Cores and memory, with and without the limits of a container."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from ollama_distributed.serving.machine import LocalMachine


def container(folder: Path, **files: str) -> LocalMachine:
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")
    return LocalMachine(folder)


def test_the_machine_itself(tmp_path: Path) -> None:
    machine = LocalMachine(tmp_path)
    assert 1 <= machine.cores() <= (psutil.cpu_count() or 1)
    assert 0 < machine.memory_available_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("garbage", None)])
def test_a_quota_of_cores(tmp_path: Path, quota: str, cores: int | None) -> None:
    expected = LocalMachine(tmp_path).cores() if cores is None else cores
    assert container(tmp_path, cpu_max=quota).cores() == expected


def test_a_limit_of_memory_counts_what_is_cached_as_free(tmp_path: Path) -> None:
    machine = container(
        tmp_path, memory_max="1000", memory_current="900", memory_stat="anon 500\ninactive_file 300\nx 1"
    )
    assert machine.memory_available_bytes() == 400


def test_no_limit_of_memory(tmp_path: Path) -> None:
    machine = container(tmp_path, memory_max="max", memory_current="900")
    assert machine.memory_available_bytes() > 1 << 20
