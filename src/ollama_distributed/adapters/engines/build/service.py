"""Builds llama-server step by step, in a work folder that a later call goes on with.

    <engines>/<key>/llama-server, engine.json, build.log     finished: made by one rename
    <engines>/<key>.work/                                    source, objects; kept until finished
    <engines>/<key>.lock, <key>.log                          one build at a time; its log

`<engines>` is the folder `engines` of the cache, where `llamacpp.discover` looks too.

Whatever moment it is interrupted in, the next call starts at the first step that is not
done: the archive and the tree are renamed when whole, ninja knows what it has compiled.
The compilers inherit the lock, so a build that outlived its parent is not joined by a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import psutil

from ollama_distributed.adapters.engines.build import plan, source
from ollama_distributed.adapters.engines.build.toolchain import Toolchain, find_toolchain, write_wrappers
from ollama_distributed.adapters.engines.llamacpp.discover import BINARY_NAME, INFO_FILE, examine
from ollama_distributed.adapters.engines.llamacpp.selftest import self_test as test_program
from ollama_distributed.base.errors import Conflict, DiskFull, EngineError, Unsupported

PROGRAM = BINARY_NAME
_LOG = "build.log"
_KILL_AFTER_S = 5.0
"""A compiler that ignores SIGTERM for so long gets SIGKILL."""
_TAIL_LINES = 15
_LINE_BYTES = 4 * 1024 * 1024
"""Longest line of a tool: the link command names every object."""

SelfTest = Callable[[Path], Awaitable[None]]
"""Raises when the binary is not fit for use."""
Report = Callable[[plan.Progress], None]


class BuiltEngine(msgspec.Struct, frozen=True, kw_only=True):
    """A finished build; its `engine.json` is this."""

    path: str
    version: str
    instruction_set: str
    cpu: str
    options: tuple[str, ...]
    compiler: str
    sha256: str
    """Of the program."""
    built_at: float
    """Seconds since the Unix epoch."""
    took_s: float
    """Of the run that finished it."""


def this_cpu() -> plan.Cpu:
    """Raises `Unsupported` where `engine build` does not work."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        raise Unsupported(
            f"`engine build` is for Linux on x86-64 and ARM64, not {sys.platform} on {machine}; "
            "the engine from the wheel is used here"
        )
    kind: plan.Machine = "x86_64" if machine == "x86_64" else "aarch64"
    return plan.parse_cpuinfo(Path("/proc/cpuinfo").read_text(), kind)


def find_built(engines: Path, cpu: plan.Cpu) -> BuiltEngine | None:
    """The finished build for this CPU, if its file is whole. Reads 12 MB: not on the loop."""
    folder = engines / plan.cache_key(cpu)
    try:
        built = msgspec.json.decode((folder / INFO_FILE).read_bytes(), type=BuiltEngine)
        whole = _sha256(folder / PROGRAM) == built.sha256
    except (OSError, msgspec.DecodeError):
        return None
    return msgspec.structs.replace(built, path=str(folder / PROGRAM)) if whole else None


async def fit_for_use(program: Path) -> None:
    """The self-test of every llama-server: starts, loads a model, answers exactly, ends."""
    await test_program(await examine("built", program))


async def build(
    engines: Path,
    *,
    report: Report = lambda _: None,
    cpu: plan.Cpu | None = None,
    archive: Path | None = None,
    jobs: int | None = None,
    force: bool = False,
    self_test: SelfTest = fit_for_use,
    toolchain: Toolchain | None = None,
) -> BuiltEngine:
    """Build, or find what was built before. Cancel-safe: the tools end, the work folder stays.

    `archive`: the sdist, for machines without an index. `force`: build again.

    Raises:
        Conflict: another build for this CPU runs.
        Unavailable, Unsupported, DiskFull, DigestMismatch, Invalid: as the steps say.
        EngineError: a tool or the self-test failed; the message names the log.
    """
    cpu = cpu or this_cpu()
    if not force and (built := await asyncio.to_thread(find_built, engines, cpu)):
        report(plan.progress("done", f"it is there already: {built.path}"))
        return built
    toolchain = toolchain or find_toolchain()
    key = plan.cache_key(cpu)
    with _locked(engines / f"{key}.lock") as lock, (engines / f"{key}.log").open("ab") as log:
        work = _Build(engines, key, cpu, toolchain, lock, log, report)
        return await work.run(
            self_test, archive, plan.jobs(_cores(), psutil.virtual_memory().available, jobs)
        )


class _Build:
    """One run of the steps, under the lock."""

    def __init__(
        self,
        engines: Path,
        key: str,
        cpu: plan.Cpu,
        toolchain: Toolchain,
        lock: int,
        log: BinaryIO,
        report: Report,
    ) -> None:
        self._folder = engines / key
        self._work = engines / f"{key}.work"
        self._log_path = engines / f"{key}.log"
        self._cpu = cpu
        self._toolchain = toolchain
        self._lock = lock
        self._log = log
        self._report = report
        self._started_at = time.monotonic()

    async def run(self, self_test: SelfTest, archive: Path | None, jobs: int) -> BuiltEngine:
        self._work.mkdir(exist_ok=True)
        self._check_disk()
        tree = self._work / "source"
        if not tree.exists():
            archive = archive or await self._fetch()
            await asyncio.to_thread(source.check, archive)
            self._say("unpack", archive.name)
            await asyncio.to_thread(source.unpack, archive, tree)
        objects = self._work / "objects"
        self._say("configure", f"{plan.instruction_set(self._cpu)} on {self._cpu.model}")
        wrappers = write_wrappers(self._toolchain, self._work / "tools")
        options = plan.cmake_options(self._cpu)
        await self._tool(
            "configure",
            [*self._toolchain.cmake, "-S", str(tree), "-B", str(objects), "-G", "Ninja", *wrappers, *options],
        )
        self._say("compile", f"with {jobs} at once")
        await self._tool("compile", [*self._toolchain.ninja, "-C", str(objects), f"-j{jobs}", PROGRAM])
        program = objects / "bin" / PROGRAM
        self._say("self-test", str(program))
        try:
            await self_test(program)
        except Exception as exc:
            raise EngineError(
                f"the program was built but failed its self-test, so it is not used: {exc}. "
                f"Log: {self._log_path}"
            ) from exc
        self._say("install", str(self._folder))
        built = await asyncio.to_thread(self._install, program, options)
        self._say("done", built.path)
        return built

    def _say(self, step: plan.Step, message: str) -> None:
        self._log.write(f"== {step}: {message}\n".encode())
        self._log.flush()
        self._report(plan.progress(step, message))

    def _check_disk(self) -> None:
        here = sum(f.stat().st_blocks * 512 for f in self._work.rglob("*") if f.is_file())
        needed = plan.NEEDED_DISK_BYTES - here
        free = shutil.disk_usage(self._work).free
        if free < needed:
            raise DiskFull(
                f"`engine build` needs {needed / 1e9:.1f} GB more in {self._work}; "
                f"{free / 1e9:.1f} GB are free"
            )

    async def _fetch(self) -> Path:
        self._say("source", f"{plan.SOURCE_PACKAGE} {plan.SOURCE_VERSION}")
        return await source.download(self._work)

    # ── tools ───────────────────────────────────────────────────────────────────────

    async def _tool(self, step: plan.Step, argv: Sequence[str]) -> None:
        nice = shutil.which("nice")
        process = await asyncio.create_subprocess_exec(
            *((nice, "-n", "10") if nice else ()),
            *argv,
            env=self._environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(self._lock,),
            limit=_LINE_BYTES,
        )
        tail: list[str] = []
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                self._log.write(line)
                text = line.decode(errors="replace").rstrip()
                tail = [*tail[1 - _TAIL_LINES :], text]
                if made := plan.compile_progress(text) if step == "compile" else plan.progress(step, text):
                    self._report(made)
            await process.wait()
        finally:
            if process.returncode is None:
                await asyncio.shield(_end(process))
            self._log.flush()
        if process.returncode:
            raise EngineError(
                f"`engine build` failed in the step {step} with status {process.returncode}. Run it "
                f"again to go on; to begin anew delete {self._work}. Log: {self._log_path}. "
                "It ended with:\n" + "\n".join(tail)
            )

    def _environment(self) -> dict[str, str]:
        """No CFLAGS, CC or the like: the key must say all that shapes the program."""
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "VIRTUAL_ENV") if name in os.environ
        }
        cache = str(self._work / "zig")
        return {**kept, "LC_ALL": "C", "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}

    # ── the end ─────────────────────────────────────────────────────────────────────

    def _install(self, program: Path, options: tuple[str, ...]) -> BuiltEngine:
        built = BuiltEngine(
            path=str(self._folder / PROGRAM),
            version=f"b{plan.SOURCE_VERSION.rpartition('.')[2]}",
            instruction_set=plan.instruction_set(self._cpu),
            cpu=self._cpu.model,
            options=options,
            compiler=self._toolchain.version,
            sha256=_sha256(program),
            built_at=time.time(),
            took_s=round(time.monotonic() - self._started_at, 1),
        )
        staged = self._work / "install"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        shutil.copy2(program, staged / PROGRAM)
        (staged / PROGRAM).chmod(0o755)
        (staged / INFO_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(built), indent=2) + b"\n")
        shutil.copy2(self._log_path, staged / _LOG)
        for file in staged.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if self._folder.exists():  # built again by wish, or damaged
            replaced = self._work / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            self._folder.rename(replaced)
        staged.rename(self._folder)
        shutil.rmtree(self._work, ignore_errors=True)
        self._log_path.unlink()
        remove_older(self._folder, built)
        return built


def remove_older(folder: Path, built: BuiltEngine) -> None:
    """Delete the builds beside `folder` that it replaces: for the same CPU and instruction set.

    A home folder may be shared, so builds for other CPUs stay. What runs from a deleted
    program goes on; a node that chose it needs a restart, as it does to take the new one.
    """
    for info in folder.parent.glob(f"*/{INFO_FILE}"):
        try:
            other = msgspec.json.decode(info.read_bytes(), type=BuiltEngine)
        except (OSError, msgspec.DecodeError):
            continue  # not ours, or of a version that we do not know
        if info.parent != folder and (other.cpu, other.instruction_set) == (built.cpu, built.instruction_set):
            shutil.rmtree(info.parent, ignore_errors=True)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a tool with all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, sign)
        with contextlib.suppress(TimeoutError):  # then the next signal
            async with asyncio.timeout(_KILL_AFTER_S):
                await process.wait()
                return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Conflict(f"another `engine build` for this CPU is at work ({path})") from exc
        yield lock
    finally:
        os.close(lock)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
