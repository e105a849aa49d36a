"""How much of a sandbox a runner gets, and what its process is told to give up."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ollama_distributed.adapters.engines.llamacpp.sandbox.calls import SECCOMP, call_filter
from ollama_distributed.adapters.engines.llamacpp.sandbox.files import (
    Rule,
    handled,
    library_rules,
    machine_rules,
    model_rules,
    program_rules,
)
from ollama_distributed.adapters.engines.llamacpp.sandbox.kernel import Kernel, kernel
from ollama_distributed.base.errors import LoadFailed

Mode = Literal["auto", "on", "off"]
NO_SANDBOX = "none"

KEPT_CAPABILITIES = (2, 14)
"""CAP_DAC_READ_SEARCH and CAP_IPC_LOCK (linux/capability.h), of a node that runs as root: a store of
models may belong to another user, and drivers pin memory."""
MOST_WRITTEN_BYTES = 64 << 20
"""Of one file, by a runner without a GPU: it has nothing to write, and could fill the disk."""


class Sandbox:
    """For the runners of one program."""

    def __init__(
        self, mode: Mode, *, program: str = "", gpu: bool = False, kernels: Path | None = None,
        known: Kernel | None = None,
    ) -> None:  # fmt: skip
        """`auto`: as much as this kernel gives; `on`: all of it or no runner; `off`: nothing is given up.

        `program`: path of a llama-server; empty: the wheel. `gpu`: it sees one. `kernels`: folder in
        which the GPU's drivers may keep what they compiled. `known`: instead of this machine's kernel.

        Raises:
            LoadFailed: `on`, and the kernel cannot.
        """
        self._program = program
        self._gpu = gpu
        self._kernels = "" if kernels is None else str(kernels)
        given = kernel() if known is None else known
        if mode == "on" and not (given.landlock and given.seccomp):
            raise LoadFailed(
                "the setting `engine_sandbox: on` wants Landlock and seccomp, and this machine lacks "
                f"{_lacks(given)}; `auto` takes what there is"
            )
        self._kernel = Kernel(0, "") if mode == "off" else given
        self._rules = self._rules_of_all() if self._kernel.landlock else []
        machine = self._kernel.seccomp
        self._calls = list(call_filter(machine, programs=bool(program))) if machine else []

    @property
    def kept(self) -> str:
        """In words: what holds a runner back."""
        if not self._kernel.landlock and not self._kernel.seccomp:
            return NO_SANDBOX
        files = f"files (Landlock {self._kernel.landlock})" if self._kernel.landlock else ""
        return ", ".join(filter(None, (files, "calls (seccomp)" if self._kernel.seccomp else "")))

    @property
    def mark(self) -> str:
        """Other rules have another: what was found to work in one cage is not known of the next version's."""
        what = (handled(self._kernel.landlock), self._rules, self._calls)
        return f"{zlib.crc32(repr(what).encode()):08x}"

    @property
    def lacks(self) -> str:
        """What this machine cannot hold back; empty: nothing."""
        return _lacks(self._kernel)

    def cage(self, folder: Path, files: Sequence[str] = ()) -> dict[str, Any] | None:
        """What the process is told to give up (`runner.confine`), for its private folder and these files
        of a model; None: nothing."""
        if not self._kernel.landlock and not self._kernel.seccomp:
            return None
        landlock = {
            **handled(self._kernel.landlock),
            "rules": [*self._rules, *model_rules(files, str(folder))],
        }
        calls = {"seccomp": SECCOMP.get(self._kernel.seccomp), "instructions": self._calls}
        return {
            "landlock": landlock if self._kernel.landlock else None,
            "calls": calls if self._kernel.seccomp else None,
            "capabilities": sum(1 << one for one in KEPT_CAPABILITIES),
            "written_bytes": None if self._gpu else MOST_WRITTEN_BYTES,
        }

    def environment(self, folder: Path) -> dict[str, str]:
        """Where the libraries of a caged runner put what they write."""
        if not self._kernel.landlock:
            return {}
        kernels = self._kernels or str(folder)
        return {
            "TMPDIR": str(folder),
            "XDG_CACHE_HOME": kernels,
            "CUDA_CACHE_PATH": f"{kernels}/cuda",
            "MESA_SHADER_CACHE_DIR": kernels,
        }

    def _rules_of_all(self) -> list[Rule]:
        if self._kernels and self._gpu:
            Path(self._kernels).mkdir(mode=0o700, parents=True, exist_ok=True)
        searched = os.environ.get("LD_LIBRARY_PATH", "").split(":")
        return [
            *machine_rules(gpu=self._gpu, programs=bool(self._program), kernels=self._kernels),
            *library_rules(map(Path, filter(None, searched))),
            *(program_rules(self._program) if self._program else ()),
        ]


def _lacks(given: Kernel) -> str:
    return " and ".join(
        name for name, there in (("Landlock", given.landlock), ("seccomp", given.seccomp)) if not there
    )
