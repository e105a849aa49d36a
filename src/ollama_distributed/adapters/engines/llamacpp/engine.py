"""The llama.cpp engine: loads models into runner processes (`serving/ports.py`)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from ollama_distributed.adapters.engines.intake import PACE_S, Intake, intake
from ollama_distributed.adapters.engines.llamacpp import binary
from ollama_distributed.adapters.engines.llamacpp.launch import CACHE_RAM_MIB, RunnerParams, runner_params
from ollama_distributed.adapters.engines.llamacpp.process import (
    SOCKET_NAME,
    RunnerProcess,
    exec_task,
    new_secret,
    private_folder,
    serve_task,
)
from ollama_distributed.adapters.engines.llamacpp.program import Program
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
from ollama_distributed.adapters.engines.llamacpp.sandbox.plan import Mode, Sandbox
from ollama_distributed.adapters.engines.llamacpp.threads import Computing, can_tell
from ollama_distributed.adapters.engines.llamacpp.vocabulary import Fragments, read_fragments
from ollama_distributed.base.errors import LoadFailed, OllamaDistributedError, Unavailable
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import EngineInfo, LoadPlan

LOAD_DEADLINE_S = 1_800.0
"""A 400 GB model from a slow disk."""
LOAD_STALL_S = 60.0
"""Neither CPU time nor memory moves for so long: a dead network disk, a hung driver."""


class LlamaCppEngine:
    """One way to run llama.cpp; see `discover.choose` for which."""

    def __init__(
        self,
        program: Program,
        *,
        runtime_dir: Path | None = None,
        load_deadline_s: float = LOAD_DEADLINE_S,
        load_stall_s: float = LOAD_STALL_S,
        cache_ram_mib: int = CACHE_RAM_MIB,
        copies: Callable[[], bool] = lambda: True,
        pace_s: float = PACE_S,
        sandbox: Mode = "auto",
        kernels_dir: Path | None = None,
    ) -> None:
        """`runtime_dir`: where the runners' private folders go (None: the system's temporary
        folder). `cache_ram_mib`: prompts kept in memory by each runner, where `copies` allows it when
        it is loaded: tenants would share them. `pace_s`: as `intake.Intake` says; 0: each token by
        itself. `sandbox`: as `Sandbox` says. `kernels_dir`: where a GPU's drivers may keep what they
        compiled.

        Raises:
            LoadFailed: the sandbox cannot be had.
        """
        self.program = program
        self._runtime_dir = runtime_dir
        self._load_deadline_s = load_deadline_s
        self._load_stall_s = load_stall_s
        self._cache_ram_mib = cache_ram_mib
        self._copies = copies
        self._pace_s = pace_s
        self.sandbox = Sandbox(
            sandbox if program.caged or sandbox == "on" else "off",
            program=program.path,
            gpu=bool(program.devices),
            kernels=kernels_dir,
        )
        self._intake: Intake | None = None
        self._runners: set[LlamaCppRunner] = set()
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(self.program.info, sandbox=self.sandbox.kept)

    def can_load(self, model: ModelSpec) -> bool:
        return model.remote is None and bool(model.weights)

    async def load(
        self, model: ModelSpec, plan: LoadPlan, on_progress: Callable[[float], None] | None = None
    ) -> LlamaCppRunner:
        """Start a runner and wait until it answers. Cancel-safe: a cancelled load is ended.

        Raises:
            LoadFailed: with llama.cpp's own reason.
            Unsupported: the model cannot run here.
        """
        if self._closed:
            raise Unavailable("the engine is shutting down")
        folder = private_folder(self._runtime_dir)
        process: RunnerProcess | None = None
        try:
            params = runner_params(
                model,
                plan,
                socket=str(folder / SOCKET_NAME),
                api_key=new_secret(),
                gpu=bool(self.program.devices),
                cache_ram_mib=self._cache_ram_mib if self._copies() else 0,
            )
            process = self._started(folder, params)
            fragments = asyncio.create_task(_fragments(model), name="read a vocabulary")
            try:
                await process.wait_ready(
                    deadline_s=self._load_deadline_s,
                    stall_s=self._load_stall_s,
                    on_progress=_fraction(model, on_progress),
                )
            except LoadFailed as exc:
                raise LoadFailed(f"cannot load {model.display}: {exc.message}") from exc
            finally:
                known = await fragments
            computing = await self._computing(process.pid, plan)
            if on_progress is not None:
                on_progress(1.0)
        except BaseException:
            if process is not None:
                await process.stop(grace_s=0.0)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self._intake is None:
            self._intake = intake(self._pace_s)
        runner = LlamaCppRunner(
            process,
            plan=plan,
            info=self.info,
            params=params,
            fragments=known,
            on_gone=self._runners.discard,
            intake=self._intake,
            computing=computing,
        )
        self._runners.add(runner)
        return runner

    async def close(self) -> None:
        """End all runners."""
        self._closed = True
        await asyncio.gather(*(runner.unload(grace_s=1.0) for runner in list(self._runners)))
        if self._intake is not None:
            self._intake.close()

    async def _computing(self, pid: int, plan: LoadPlan) -> Computing | None:
        """None where a GPU computes, or the system does not tell."""
        if (self.program.devices and plan.gpu_layers != 0) or not can_tell(pid):
            return None
        return await asyncio.to_thread(Computing, pid)

    def _started(self, folder: Path, params: RunnerParams) -> RunnerProcess:
        cage = self.sandbox.cage(folder, (params.model, params.projector, *params.loras))
        environment = self.sandbox.environment(folder)
        try:
            if self.program.variant == "wheel":
                return RunnerProcess(folder, serve_task(msgspec.to_builtins(params), cage), environment)
            argv = binary.argv(self.program.path, params, str(folder), self.program.flags)
            _write_private(folder, binary.files_of(params))
            return RunnerProcess(folder, exec_task(argv, cage), environment)
        except OSError as exc:
            raise LoadFailed(f"cannot start a runner: {exc.strerror or exc}") from exc


def _write_private(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(text, encoding="utf-8")


async def _fragments(model: ModelSpec) -> Fragments | None:
    if model.pooling:  # it generates nothing
        return None
    try:
        return await asyncio.to_thread(read_fragments, model.weights)
    except (OllamaDistributedError, OSError):
        # llama.cpp's own reason, which it is about to give, tells more.
        return None


def _fraction(model: ModelSpec, on_progress: Callable[[float], None] | None) -> Callable[[int], None] | None:
    """Progress as resident bytes over the file's: an estimate that never falls and is never quite 1."""
    if on_progress is None:
        return None
    report, whole, most = on_progress, max(model.weights_bytes, 1), 0

    def told(resident: int) -> None:
        nonlocal most
        most = max(most, resident)  # the launcher's own memory goes when a llama-server takes its place
        report(min(most / whole, 0.99))

    return told
