"""Which files a runner may reach, as Landlock rules.

Paths are looked at here, in the node; the child only opens them and asks the kernel. What is
allowed and why: ADR 28.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from enum import IntFlag
from pathlib import Path

Rule = tuple[str, int]
"""A path, and what may be done with it and all below it."""


class Access(IntFlag):
    """linux/landlock.h, LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15

    READ = READ_FILE | READ_DIR
    RUN = READ | EXECUTE
    DEVICE = READ | WRITE_FILE | IOCTL_DEV
    STORE = READ | WRITE_FILE | TRUNCATE | MAKE_REG | MAKE_DIR | REMOVE_FILE | REMOVE_DIR
    OWN = STORE | MAKE_SOCK


_SINCE = ((2, Access.REFER), (3, Access.TRUNCATE), (5, Access.IOCTL_DEV))
"""From which version of the interface on."""
_TCP_SINCE, _TCP = 4, 0b11
"""bind and connect"""
_SCOPES_SINCE, _SCOPES = 6, 0b11
"""abstract UNIX sockets and signals of processes outside"""

LIBRARIES = (
    *("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64"),
    *("/usr/local/lib", "/usr/local/lib64"),
    *("/nix/store", "/gnu/store", "/run/opengl-driver/lib"),
    *("/home/linuxbrew/.linuxbrew/lib", "/home/linuxbrew/.linuxbrew/Cellar"),
)  # fmt: skip
"""Where systems keep shared libraries, and nothing of a user's."""
_FACTS = (
    *("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/dev/random", "/dev/urandom", "/dev/zero"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm"),
    *("/sys/devices/system", "/sys/kernel/mm/transparent_hugepage"),
)
"""What libraries ask about the machine."""
_GPU_DEVICES = (
    *("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/dxg", "/dev/nvhost-*", "/dev/nvmap", "/dev/nvgpu"),
    *("/dev/accel", "/dev/mali*"),
)
"""NVIDIA; all that draw or compute through the kernel's DRM; AMD's compute; WSL; Jetson; others."""
_GPU_LIBRARIES = (
    *("/usr/local/cuda*", "/usr/local/nvidia", "/opt/cuda", "/opt/rocm*", "/opt/amdgpu", "/opt/intel"),
    *("/usr/share/vulkan", "/usr/share/glvnd", "/usr/share/drirc.d", "/usr/share/libdrm"),
    "/usr/share/nvidia",
    *("/etc/vulkan", "/etc/OpenCL", "/etc/glvnd", "/etc/nvidia", "/etc/drirc", "/run/opengl-driver"),
)  # fmt: skip
_GPU_FACTS = ("/proc", "/sys")
"""Drivers look for their modules, devices and memory all over. What `/proc` tells of other processes
beside their names stays closed: Landlock lets nobody look into a process outside."""
_GPU_WRITES = ("/proc/self/task",)
"""CUDA names its threads by writing to `comm` there and gives up (error 304) when it may not."""
_GPU_STORES = ("/dev/shm",)  # noqa: S108  # a place that the driver chose: `/dev/shm/cuda.*`, ROCm's `hsakmt_*`
_MOST_LIBRARIES = 512
"""Files of a folder that each get a rule; a llama-server has about twenty."""


def handled(version: int) -> dict[str, int]:
    """What a ruleset of this version of Landlock can forbid: files, TCP, signals and sockets."""
    new = sum(access for since, access in _SINCE if version < since)
    every = (Access.IOCTL_DEV << 1) - 1
    return {
        "files": every & ~new,
        "tcp": _TCP if version >= _TCP_SINCE else 0,
        "scopes": _SCOPES if version >= _SCOPES_SINCE else 0,
    }


def gpu_here() -> bool:
    """Whether this machine has device files of a GPU."""
    return bool(_found(_GPU_DEVICES))


def machine_rules(*, gpu: bool, programs: bool, kernels: str) -> Iterator[Rule]:
    """What every runner may reach. `programs`: one of the libraries' folders is where the loader of
    programs lies, so that a llama-server can be started. `kernels`: folder in which drivers keep
    what they compiled for the GPU."""
    libraries = Access.RUN if programs else Access.READ
    yield from _at(LIBRARIES, libraries)
    yield from _at(_FACTS, Access.READ)
    yield from _at(("/dev/null", "/dev/full"), Access.READ | Access.WRITE_FILE)
    if not programs:
        paths = sysconfig.get_paths()
        yield from _at({paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}, Access.READ)
    if gpu:
        yield from _at(_found(_GPU_DEVICES), Access.DEVICE)
        yield from _at(_found(_GPU_LIBRARIES), libraries)
        yield from _at(_GPU_FACTS, Access.READ)
        yield from _at(_GPU_WRITES, Access.WRITE_FILE)
        yield from _at((*_GPU_STORES, *([kernels] if kernels else ())), Access.STORE)


def program_rules(program: str) -> Iterator[Rule]:
    """A llama-server, and the libraries beside it or in the `lib` next to its folder."""
    real = Path(program).resolve()
    yield from _at((program, str(real)), Access.RUN)
    yield from library_rules((real.parent, real.parent.parent / "lib"))


def library_rules(folders: Iterable[Path]) -> Iterator[Rule]:
    """The libraries in these folders, file by file: a folder may be somebody's home."""
    for folder in folders:
        yield str(folder), int(Access.READ_DIR)
        files = sorted(folder.glob("*.so*"))[:_MOST_LIBRARIES]
        yield from _at((str(file.resolve()) for file in files), Access.READ)


def model_rules(files: Sequence[str], folder: str) -> Iterator[Rule]:
    """The model's own files, and the folder of the runner's socket."""
    yield from _at(filter(None, files), Access.READ_FILE)
    yield folder, int(Access.OWN)


def _found(patterns: Iterable[str]) -> list[str]:
    root = Path("/")
    return [str(path) for pattern in patterns for path in sorted(root.glob(pattern.removeprefix("/")))]


def _at(paths: Iterable[str], access: Access) -> Iterator[Rule]:
    for path in paths:
        yield path, int(access)
