"""Starts, watches and ends one runner process.

The child is started from the loop's own thread: its PR_SET_PDEATHSIG fires when the
*thread* that started it ends, and a worker thread ends long before the node does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from ollama_distributed.adapters.engines.fetch import fetch
from ollama_distributed.adapters.engines.http import UnixAddress
from ollama_distributed.adapters.engines.llamacpp import stderr
from ollama_distributed.adapters.engines.llamacpp.launch import Guard, scrubbed
from ollama_distributed.base.errors import LoadFailed, OllamaDistributedError

RUNNER = Path(__file__).with_name("runner.py")
SOCKET_NAME = "r.sock"
MAX_SOCKET_PATH = 103
"""Bytes: macOS's limit, Linux has 107."""
MAX_RUNTIME_PATH = MAX_SOCKET_PATH - len("/run-????????/") - len(SOCKET_NAME)
"""Bytes of a folder in which the runners' private folders can be."""
POLL_S = 0.005
"""First wait between two looks at a starting runner; doubles up to 16 times that."""
STDERR_PAUSE_S = 0.05
"""Between two reads of what it says: llama-server writes some 25 lines a request, one at a time, and each
would wake the loop. A pipe holds 64 KiB meanwhile."""
KILL_WAIT_S = 5.0
"""How long the kernel may take to end a killed process that holds much memory."""


def private_folder(parent: Path | None) -> Path:
    """A new folder that only we may enter, short enough for a socket's path."""
    if parent is not None and len(os.fsencode(parent)) <= MAX_RUNTIME_PATH:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    return Path(tempfile.mkdtemp(prefix="odr-"))


def new_secret() -> str:
    return secrets.token_urlsafe(32)


class RunnerProcess:
    """A child process with its private folder; both are gone after `stop()`."""

    def __init__(self, folder: Path, task: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Starts it; must run on the loop's thread. The task's guard is filled in. `environment`: beside
        what is passed on of ours."""
        self.folder = folder
        self.address = UnixAddress(str(folder / SOCKET_NAME))
        self._loop = asyncio.get_running_loop()
        self._tail = stderr.Tail()
        self._callbacks: list[Callable[[int], None]] = []
        self._stopping = False
        self._removal: asyncio.Task[None] | None = None
        self.exited: asyncio.Future[int] = self._loop.create_future()
        """Its return code; negative: the signal that ended it."""
        guard = {**msgspec.to_builtins(Guard(parent_pid=os.getpid())), **task.get("guard", {})}
        self._popen = subprocess.Popen(
            [sys.executable, "-I", str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=scrubbed(os.environ) | dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        assert self._popen.stderr is not None
        os.set_blocking(self._popen.stderr.fileno(), False)
        self._hearing: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._popen.stderr.fileno(), self._hear)
        self._watch_exit()
        # A template can be larger than the pipe's buffer: never written on the loop.
        data = msgspec.json.encode({**task, "guard": guard})
        self._feeder = threading.Thread(target=self._feed, args=(data,), name="runner stdin", daemon=True)
        self._feeder.start()

    # ── facts ───────────────────────────────────────────────────────────────────────

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    @property
    def stopping(self) -> bool:
        """It was told to end, so its death is no failure."""
        return self._stopping

    @property
    def memory_bytes(self) -> int:
        """Resident memory; 0 when it is gone."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss) if self.alive else 0
        except psutil.Error:
            return 0

    def reason(self) -> str:
        """What its stderr says about its end; empty when nothing."""
        return stderr.reason(self._tail.text())

    def how_it_ended(self) -> str:
        ending = stderr.end_of(self.exited.result()) if self.exited.done() else "still running"
        reason = self.reason()
        return f"{reason} ({ending})" if reason else ending

    def on_exit(self, callback: Callable[[int], None]) -> None:
        """Call back with the return code, at once when it is gone already."""
        if self.exited.done():
            self._loop.call_soon(callback, self.exited.result())
        else:
            self._callbacks.append(callback)

    # ── start ───────────────────────────────────────────────────────────────────────

    async def wait_ready(
        self, *, deadline_s: float, stall_s: float, on_progress: Callable[[int], None] | None = None
    ) -> None:
        """Until `/health` says that the model is loaded. `on_progress` gets resident bytes.

        Raises:
            LoadFailed: it ended, took longer than `deadline_s`, or did nothing (no CPU time
                used, no memory added) for `stall_s`.
        """
        started_at = moved_at = self._loop.time()
        activity: tuple[int, float] = (0, 0.0)
        wait_s = POLL_S
        while True:
            if self.exited.done():
                raise LoadFailed(self.how_it_ended())
            if await self._healthy():
                await asyncio.to_thread(os.chmod, self.address.path, 0o600)
                return
            now = self._loop.time()
            current = self._activity()
            if current != activity:
                activity, moved_at = current, now
                if on_progress is not None:
                    on_progress(current[0])
            if now - started_at > deadline_s:
                raise LoadFailed(f"not loaded within {deadline_s:g} s")
            if now - moved_at > stall_s:
                raise LoadFailed(f"the load stands still for {stall_s:g} s")
            await asyncio.wait([self.exited], timeout=wait_s)
            wait_s = min(wait_s * 1.5, 16 * POLL_S)

    async def _healthy(self) -> bool:
        try:
            return (await fetch(self.address, "GET", "/health", deadline_s=2.0)).status == 200
        except OllamaDistributedError:  # no socket yet
            return False

    def _activity(self) -> tuple[int, float]:
        try:
            process = psutil.Process(self.pid)
            times = process.cpu_times()
            return int(process.memory_info().rss), times.user + times.system
        except psutil.Error:
            return 0, 0.0

    def _feed(self, data: bytes) -> None:
        assert self._popen.stdin is not None
        # It died before it read all; the exit watcher tells.
        with contextlib.suppress(BrokenPipeError), self._popen.stdin as pipe:
            pipe.write(data)

    # ── end ─────────────────────────────────────────────────────────────────────────

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, after `grace_s` SIGKILL; then nothing of it is left. Idempotent; when
        cancelled it kills at once."""
        self._stopping = True
        try:
            if self.alive and grace_s > 0:
                self._signal(signal.SIGTERM)
                await asyncio.wait([self.exited], timeout=grace_s)
        finally:
            self._signal(signal.SIGKILL)
            await asyncio.shield(self._buried())

    def kill(self) -> None:
        """SIGKILL, without waiting; `stop()` still has to be called."""
        self._signal(signal.SIGKILL)

    async def _buried(self) -> None:
        await asyncio.wait([self.exited], timeout=KILL_WAIT_S)
        if self._removal is not None:
            await self._removal

    def _signal(self, number: signal.Signals) -> None:
        # The whole session: a binary may have started helpers of its own.
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _watch_exit(self) -> None:
        """A pidfd becomes readable when the process ends; elsewhere a thread waits."""
        if hasattr(os, "pidfd_open"):
            self._pidfd = os.pidfd_open(self.pid)
            self._loop.add_reader(self._pidfd, self._ended)
        else:  # pragma: no cover  # macOS
            waiter = threading.Thread(target=self._wait_in_thread, name="runner exit", daemon=True)
            waiter.start()

    def _wait_in_thread(self) -> None:  # pragma: no cover  # macOS
        self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        if hasattr(os, "pidfd_open"):
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        returncode = self._popen.wait()
        self._read_stderr()
        self._close_stderr()
        self._removal = self._loop.create_task(self._remove_folder(), name="remove a runner's folder")
        self.exited.set_result(returncode)
        for callback in self._callbacks:
            callback(returncode)
        self._callbacks.clear()

    async def _remove_folder(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    def _hear(self) -> None:
        """It says something: it is read a little later, with what follows."""
        assert self._popen.stderr is not None
        self._loop.remove_reader(self._popen.stderr.fileno())
        self._hearing = self._loop.call_later(STDERR_PAUSE_S, self._heard)

    def _heard(self) -> None:
        assert self._popen.stderr is not None
        if self._read_stderr():
            self._loop.add_reader(self._popen.stderr.fileno(), self._hear)

    def _read_stderr(self) -> bool:
        """All there is now; whether more may come."""
        pipe = self._popen.stderr
        assert pipe is not None
        while not pipe.closed:
            try:
                data = os.read(pipe.fileno(), 65_536)
            except BlockingIOError:
                return True
            if not data:
                self._close_stderr()
            self._tail.feed(data)
        return False

    def _close_stderr(self) -> None:
        pipe = self._popen.stderr
        assert pipe is not None
        if not pipe.closed:
            if self._hearing is not None:
                self._hearing.cancel()
            self._loop.remove_reader(pipe.fileno())
            pipe.close()


async def run_task(folder: Path, task: Mapping[str, Any], *, deadline_s: float) -> bytes:
    """Run a task of `runner.py` that prints and ends; its stdout.

    Raises:
        LoadFailed: it failed or took longer than `deadline_s`.
    """

    def run() -> bytes:
        guard = msgspec.to_builtins(Guard(parent_pid=os.getpid()))
        done = subprocess.run(
            [sys.executable, "-I", str(RUNNER)],
            input=msgspec.json.encode({**task, "guard": guard}),
            capture_output=True,
            env=scrubbed(os.environ),
            cwd=folder,
            timeout=deadline_s,
            check=False,
        )
        if done.returncode != 0:
            text = done.stderr[-stderr.TAIL_BYTES :].decode("utf-8", "replace")
            raise LoadFailed(stderr.reason(text) or stderr.end_of(done.returncode))
        return done.stdout

    try:
        return await asyncio.to_thread(run)
    except (subprocess.TimeoutExpired, OSError) as exc:
        raise LoadFailed(str(exc)) from exc


def serve_task(params: Mapping[str, Any], cage: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"task": "serve", "params": params, "cage": cage}


def exec_task(argv: list[str], cage: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"task": "exec", "argv": argv, "cage": cage}
