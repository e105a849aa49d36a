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


_VERSION = re.compile(r"version: *(?:b?(\d+)|(\S+))(?: *\((\w+)\))?")


def binary_version(text: str) -> str:
    """`b11669` out of `version: 11669 (abc1234)`; empty when it does not say."""
    found = _VERSION.search(text)
    if not found:
        return ""
    return f"b{found[1]}" if found[1] else found[2]
