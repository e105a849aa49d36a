"""A way to run llama.cpp on this machine: the wheel, or a llama-server binary."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from ollama_distributed.serving.ports import EngineInfo

Variant = Literal["wheel", "binary", "built"]

_ON = re.compile(r"(\w+) = 1")
_SHOWN = (
    *("AVX", "AVX2", "AVX_VNNI", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8"),
    *("NEON", "DOTPROD", "MATMUL_INT8", "SVE", "SME", "RISCV_V", "VSX", "ACCELERATE"),
)
"""Of what llama.cpp lists, the parts that decide its speed."""


class Program(msgspec.Struct, frozen=True, kw_only=True):
    variant: Variant
    version: str
    path: str = ""
    """Of the binary; empty for the wheel."""
    flags: frozenset[str] = frozenset()
    """What the binary's help names."""
    instruction_set: str = ""
    devices: tuple[str, ...] = ()
    caged: bool = True
    """False: outside a sandbox it works, inside not."""

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            name="llama.cpp",
            variant=self.variant,
            version=self.version,
            instruction_set=self.instruction_set,
            devices=self.devices,
        )


def instruction_set(system_info: str) -> str:
    """`AVX2 FMA` out of llama.cpp's `CPU : SSE3 = 1 | AVX2 = 1 | ...`."""
    on = set(_ON.findall(system_info))
    return " ".join(name for name in _SHOWN if name in on and not (name == "AVX" and "AVX2" in on))


_BUILD = re.compile(r"\(build (\d+)|version: *b?(\d+)\b(?!\.)")
_NAMED = re.compile(r"version: *([\w.-]+)")


def binary_version(text: str) -> str:
    """`b11669` out of `version: 11669 (abc1234)` or `version: 0.6.0 (build 11669, ...)`; its
    name where the build has no number; empty when it does not say."""
    build = _BUILD.search(text)
    number = int(build[1] or build[2]) if build else 0
    if number:
        return f"b{number}"
    named = _NAMED.search(text)
    return named[1] if named else ""
