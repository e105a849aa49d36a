"""The compiler and build tools that pip brings (extra `engine-build`), and their wrappers."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import msgspec

from ollama_distributed.base.errors import Unavailable

INSTALL = "pip install 'ollama-distributed[engine-build]'"

_WRAPPERS = {"cc": "cc", "c++": "c++", "ar": "ar", "ranlib": "ranlib"}
"""Program -> command of zig. CMake wants one file for each."""


class Toolchain(msgspec.Struct, frozen=True):
    cmake: tuple[str, ...]
    ninja: tuple[str, ...]
    zig: tuple[str, ...]
    version: str
    """Of the compiler."""


def find_toolchain() -> Toolchain:
    """The tools of this Python's environment.

    Raises:
        Unavailable: one is missing; the message says what to install.
    """
    missing = [name for name in ("cmake", "ninja", "ziglang") if find_spec(name) is None]
    if missing:
        raise Unavailable(f"`engine build` needs {', '.join(missing)}: {INSTALL}")
    return Toolchain(
        cmake=(sys.executable, "-m", "cmake"),
        ninja=(_ninja_program(),),
        zig=(sys.executable, "-m", "ziglang"),
        version=f"zig {importlib.metadata.version('ziglang')}",
    )


def _ninja_program() -> str:
    """CMake calls ninja itself, so it needs the program and not a module."""
    for file in importlib.metadata.files("ninja") or ():
        if file.name == "ninja":
            return str(Path(str(file.locate())).resolve())
    raise Unavailable(f"the package ninja holds no program: {INSTALL}")


def write_wrappers(toolchain: Toolchain, folder: Path) -> tuple[str, ...]:
    """One executable script for each tool, and the CMake options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in _WRAPPERS.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join((*toolchain.zig, command))} "$@"\n')
        script.chmod(0o755)
    return (
        f"-DCMAKE_C_COMPILER={folder / 'cc'}",
        f"-DCMAKE_CXX_COMPILER={folder / 'c++'}",
        f"-DCMAKE_AR={folder / 'ar'}",
        f"-DCMAKE_RANLIB={folder / 'ranlib'}",
        f"-DCMAKE_MAKE_PROGRAM={toolchain.ninja[0]}",
    )
