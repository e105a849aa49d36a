"""Chooses the llama.cpp to run: configured > built > on PATH > the wheel.

Each candidate must pass the self-test; what was refused, and why, is told. A verdict is
kept in `cache_dir` per path, modification time and size, so that a start costs it once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from ollama_distributed.adapters.engines.llamacpp.binary import flags_in
from ollama_distributed.adapters.engines.llamacpp.launch import scrubbed
from ollama_distributed.adapters.engines.llamacpp.process import private_folder, run_task
from ollama_distributed.adapters.engines.llamacpp.program import (
    Program,
    Variant,
    binary_version,
    instruction_set,
)
from ollama_distributed.adapters.engines.llamacpp.sandbox.files import gpu_here
from ollama_distributed.adapters.engines.llamacpp.sandbox.plan import NO_SANDBOX, Mode, Sandbox
from ollama_distributed.adapters.engines.llamacpp.selftest import self_test
from ollama_distributed.base.errors import EngineError, LoadFailed

BINARY_NAME = "llama-server"
BUILT_GLOB = "*/llama-server"
"""`engine build` keeps each build in a folder of its own in the cache directory."""
INFO_FILE = "engine.json"
"""Beside a finished build: what it was built for."""
VERDICTS_FILE = "self-tests.json"
QUESTION_S = 30.0
"""For `--help` and `--version`."""


class Verdict(msgspec.Struct, frozen=True):
    path: str
    modified_ns: int
    size: int
    program: Program | None
    refusal: str = ""
    sandbox: str = ""
    """In which it was tested."""


class BuildInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of `engine.json`."""

    version: str
    instruction_set: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """A candidate that is not used."""

    path: str
    reason: str


class Choice(msgspec.Struct, frozen=True):
    program: Program
    refused: tuple[Refusal, ...] = ()


async def choose(
    *,
    configured: Path | None = None,
    cache_dir: Path | None = None,
    runtime_dir: Path | None = None,
    search_path: str | None = None,
    sandbox: Mode = "auto",
) -> Choice:
    """The best program that works in this sandbox; with `auto` one that works outside only comes as
    such (`Program.caged`).

    `cache_dir`: where `engine build` keeps its builds (one folder each) and this its verdicts (None:
    neither). `search_path`: None for PATH; empty for no search.

    Raises:
        LoadFailed: the configured binary is no good (a wish is never silently dropped), or
            nothing works.
    """
    verdicts = await asyncio.to_thread(_read_verdicts, cache_dir)
    refused: list[Refusal] = []
    for variant, path in await asyncio.to_thread(_candidates, configured, cache_dir, search_path):
        verdict = await _judge(variant, path, verdicts, runtime_dir, sandbox)
        if verdict.path in verdicts or verdict.modified_ns:
            verdicts[verdict.path] = verdict
        if verdict.program is not None:
            await asyncio.to_thread(_write_verdicts, cache_dir, verdicts)
            return Choice(verdict.program, tuple(refused))
        refused.append(Refusal(str(path), verdict.refusal))
        if path == configured:
            raise LoadFailed(f"the configured llama-server {path} cannot be used: {verdict.refusal}")
    await asyncio.to_thread(_write_verdicts, cache_dir, verdicts)
    return Choice(await wheel(sandbox), tuple(refused))


async def wheel(sandbox: Mode = "auto") -> Program:
    """The wheel, asked in a child process: importing it here would bind its threads to us.

    On a machine with a GPU it is asked outside of the sandbox first (which also wakes the driver, whose
    device files the first that asks makes); `auto` goes without one in which it sees less.

    Raises:
        LoadFailed: it is not installed or does not run on this machine, or in this sandbox.
    """
    gpu = await asyncio.to_thread(gpu_here)
    if sandbox == "off":
        return await _asked("off", gpu=gpu)
    free = await _asked("off", gpu=gpu) if gpu else None
    try:
        held = await _asked(sandbox, gpu=gpu)
    except LoadFailed:
        if sandbox == "on":
            raise
        free = free or await _asked("off", gpu=gpu)
        return msgspec.structs.replace(free, caged=False)
    if free is not None and free.devices != held.devices:
        if sandbox == "on":
            raise LoadFailed(
                f"with `engine_sandbox: on` llama.cpp sees {', '.join(held.devices) or 'no GPU'}, and "
                f"{', '.join(free.devices)} without; `auto` goes without a sandbox then"
            )
        return msgspec.structs.replace(free, caged=False)
    return held


async def _asked(sandbox: Mode, *, gpu: bool) -> Program:
    held = Sandbox(sandbox, gpu=gpu)
    folder = await asyncio.to_thread(private_folder, None)
    try:
        task = {"task": "info", "cage": held.cage(folder)}
        text = await run_task(folder, task, deadline_s=QUESTION_S)
        facts = msgspec.json.decode(text)
    except (LoadFailed, msgspec.DecodeError) as exc:
        raise LoadFailed(f"the llama.cpp wheel (xllamacpp) does not run here: {exc}") from exc
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    return Program(
        variant="wheel",
        version=f"xllamacpp {facts['version']}",
        instruction_set=instruction_set(facts["system"]),
        devices=tuple(facts["devices"]),
    )


async def examine(variant: Variant, path: Path) -> Program:
    """What a binary says about itself; it is not tested yet.

    Raises:
        LoadFailed: it does not run.
    """
    help_text = await _output(path, "--help")
    version = binary_version(await _output(path, "--version"))
    built = await asyncio.to_thread(_build_info, path)
    devices = await _devices(path, help_text)
    return Program(
        variant=variant,
        path=str(path),
        version=(built.version if built else "") or version or "unknown",
        flags=flags_in(help_text),
        instruction_set=built.instruction_set if built else "",
        devices=devices,
    )


# ── inside ──────────────────────────────────────────────────────────────────────────


def _candidates(
    configured: Path | None, cache_dir: Path | None, search_path: str | None
) -> list[tuple[Variant, Path]]:
    found: list[tuple[Variant, Path]] = []
    if configured is not None:
        found.append(("binary", configured))
    if cache_dir is not None:
        builds = [p for p in cache_dir.glob(BUILT_GLOB) if (p.parent / INFO_FILE).exists()]
        found += [("built", p) for p in sorted(builds, key=lambda p: p.stat().st_mtime, reverse=True)]
    if search_path != "":
        on_path = shutil.which(BINARY_NAME, path=search_path)
        if on_path:
            found.append(("binary", Path(on_path)))
    return found


async def _judge(
    variant: Variant, path: Path, verdicts: dict[str, Verdict], runtime_dir: Path | None, sandbox: Mode
) -> Verdict:
    try:
        facts = await asyncio.to_thread(path.stat)
    except OSError as exc:
        return Verdict(str(path), 0, 0, None, f"cannot be read: {exc.strerror}")
    cage = await asyncio.to_thread(Sandbox, sandbox, program=str(path))
    tested_in = f"{sandbox}: {cage.kept}, {cage.mark}"
    known = verdicts.get(str(path))
    if known and (known.modified_ns, known.size, known.sandbox) == (
        facts.st_mtime_ns, facts.st_size, tested_in,
    ):  # fmt: skip
        return known
    program, refusal = None, ""
    try:
        program = await proven(await examine(variant, path), runtime_dir=runtime_dir, sandbox=sandbox)
    except EngineError as exc:
        refusal = exc.message
    return Verdict(str(path), facts.st_mtime_ns, facts.st_size, program, refusal, tested_in)


async def proven(program: Program, *, runtime_dir: Path | None = None, sandbox: Mode = "auto") -> Program:
    """The program as it works: with `auto` perhaps outside a sandbox only.

    Raises:
        EngineError: it does not.
    """
    try:
        await self_test(program, runtime_dir=runtime_dir, sandbox=sandbox)
    except EngineError:
        if sandbox != "auto" or Sandbox(sandbox).kept == NO_SANDBOX:
            raise
        # Its libraries may lie where the sandbox does not let it look.
        await self_test(program, runtime_dir=runtime_dir, sandbox="off")
        return msgspec.structs.replace(program, caged=False)
    return program


async def _output(path: Path, *arguments: str) -> str:
    def run() -> str:
        done = subprocess.run(
            [str(path), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=scrubbed(os.environ),
            timeout=QUESTION_S,
            check=False,
        )
        if done.returncode != 0:
            raise LoadFailed(f"`{path.name} {' '.join(arguments)}` failed (status {done.returncode})")
        return (done.stdout + done.stderr).decode("utf-8", "replace")

    try:
        return await asyncio.to_thread(run)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise LoadFailed(f"it does not run: {exc}") from exc


async def _devices(path: Path, help_text: str) -> tuple[str, ...]:
    """GPUs, from lines such as `  CUDA0: NVIDIA H200 (143167 MiB, 142000 MiB free)`."""
    if "--list-devices" not in help_text:
        return ()
    with contextlib.suppress(LoadFailed):  # whether it runs at all the probe says
        lines = (await _output(path, "--list-devices")).partition("Available devices")[2].splitlines()
        return tuple(line.partition(":")[2].partition("(")[0].strip() for line in lines[1:] if ":" in line)
    return ()


def _build_info(path: Path) -> BuildInfo | None:
    try:
        return msgspec.json.decode((path.parent / INFO_FILE).read_bytes(), type=BuildInfo)
    except (OSError, msgspec.DecodeError):
        return None


def _read_verdicts(cache_dir: Path | None) -> dict[str, Verdict]:
    if cache_dir is None:
        return {}
    try:
        return msgspec.json.decode((cache_dir / VERDICTS_FILE).read_bytes(), type=dict[str, Verdict])
    except (OSError, msgspec.DecodeError):  # none yet, or of another version: test again
        return {}


def _write_verdicts(cache_dir: Path | None, verdicts: dict[str, Verdict]) -> None:
    if cache_dir is None or not verdicts:
        return
    # A cache: when it cannot be kept, the next start tests again.
    with contextlib.suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = cache_dir / f".{VERDICTS_FILE}.{os.getpid()}"
        temporary.write_bytes(msgspec.json.encode(verdicts))
        temporary.replace(cache_dir / VERDICTS_FILE)
