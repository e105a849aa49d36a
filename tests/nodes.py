"""Whole nodes for tests: started as a user starts them, stopped without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

READY_S = 60.0
STOP_S = 30.0
LOG_TAIL = 12_000


class NodeProcess:
    """A running `ollama-distributed serve`; `url` answers when it is made.

    Raises:
        AssertionError: it did not become ready; the log is in the message.
    """

    def __init__(self, data_dir: Path, arguments: Sequence[str], env: dict[str, str]) -> None:
        self.data_dir = data_dir
        self.log_file = data_dir.parent / f"{data_dir.name}.log"
        command = [
            sys.executable,
            "-m",
            "ollama_distributed",
            "serve",
            "--data-dir",
            str(data_dir),
            *arguments,
        ]
        self._log = self.log_file.open("wb")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, env=env, text=True)
        self.stdout_lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(READY_S) or not self.stdout_lines:
            self.kill()
            raise AssertionError(f"the node did not become ready:\n{self.log()}")
        ready = self.stdout_lines[-1].split()
        self.url = ready[1]
        self.id = ready[2].removeprefix("node=")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.stdout_lines.append(line.rstrip())
            if line.startswith("ready "):
                self._ready.set()
        self._ready.set()

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")[-LOG_TAIL:]

    @property
    def pid(self) -> int:
        return self.process.pid

    def http(self, timeout_s: float = 60.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s)

    def stop(self) -> int:
        """SIGTERM, as a service manager does; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_S)
        self._reader.join(STOP_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()


@contextmanager
def running_node(
    data_dir: Path, *arguments: str, env: dict[str, str] | None = None, listen: str = "127.0.0.1:0"
) -> Iterator[NodeProcess]:
    """A node on a free port of loopback; its exit status must be 0 unless it was killed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    clean |= {
        "XDG_CACHE_HOME": str(data_dir.parent / "cache"),
        "OLLAMA_DISTRIBUTED_ENGINE": "wheel",
        **(env or {}),
    }
    node = NodeProcess(data_dir, ["--listen", listen, *arguments], clean)
    try:
        yield node
    finally:
        status = node.stop()
    assert status in (0, -signal.SIGKILL), f"the node ended with {status}:\n{node.log()}"
