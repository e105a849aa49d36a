"""The ways to run llama.cpp that tests try: the wheel always, a binary where there is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ollama_distributed.adapters.engines.llamacpp.discover import examine, wheel
from ollama_distributed.adapters.engines.llamacpp.program import Program

BINARY = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
PROGRAMS = ["wheel", "binary"] if BINARY else ["wheel"]

_known: dict[str, Program] = {}


async def program_named(name: str) -> Program:
    """`wheel` or `binary`, examined once per session."""
    if name not in _known:
        _known[name] = await wheel() if name == "wheel" else await examine("binary", Path(str(BINARY)))
    return _known[name]
