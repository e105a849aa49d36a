"""Whole nodes for tests: started as a user starts them, stopped without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

from ollama_distributed.base.ids import NodeRole
from ollama_distributed.client.errors import ClientError
from ollama_distributed.client.sync import SyncClient
from tests.limits import SOON_S

T = TypeVar("T")

READY_S = SOON_S
CLI_S = SOON_S
STOP_S = SOON_S
LOG_TAIL = 12_000


class NodeProcess:
    """A running `ollama-distributed serve` or `join TOKEN`; `url` answers when it is made.

    Raises:
        AssertionError: it did not become ready; the log is in the message.
    """

    def __init__(
        self,
        data_dir: Path,
        arguments: Sequence[str],
        env: dict[str, str],
        command: Sequence[str] = ("serve",),
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix`: words before the program's, e.g. those of another network namespace."""
        self.data_dir = data_dir
        self.env = env
        self._told = False
        self.log_file = data_dir.parent / f"{data_dir.name}.log"
        line = [
            *prefix,
            sys.executable,
            "-m",
            "ollama_distributed",
            *command,
            "--data-dir",
            str(data_dir),
            *arguments,
        ]
        self._log = self.log_file.open("ab")
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=self._log, env=env, text=True)
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

    def logs(self, event: str) -> bool:
        """Wait until the log tells it: lines are written in batches, a little later.

        Raises:
            AssertionError: it did not.
        """
        return until(lambda: event in self.log_file.read_text(), SOON_S, f"{event} in the log")

    @property
    def pid(self) -> int:
        return self.process.pid

    def http(self, timeout_s: float = 60.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s)

    def admin(self, timeout_s: float = 60.0) -> SyncClient:
        """Our SDK, as the node's admin; close it with `with`."""
        key = json.loads((self.data_dir / "admin.json").read_text())["key"]
        return SyncClient(self.url, key, timeout=timeout_s, retries=0)

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the program on this node's machine."""
        line = [sys.executable, "-m", "ollama_distributed", "--data-dir", str(self.data_dir), *arguments]
        return subprocess.run(
            line,
            capture_output=True,
            text=True,
            check=check,
            timeout=CLI_S,
            env=self.env,
            stdin=subprocess.DEVNULL,
        )

    def child(self, name: str) -> psutil.Process:
        """The node's child process of this name, e.g. `nats-server`."""

        def found() -> list[psutil.Process]:
            children = psutil.Process(self.pid).children(recursive=True)
            return [child for child in children if child.name() == name]

        return until(found, SOON_S, f"a child called {name}")[0]

    def tell_to_stop(self) -> None:
        """SIGTERM, as a service manager does; once, since a second one cuts running answers."""
        if not self._told and self.process.poll() is None:
            self._told = True
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Stop it in good order; returns the exit status."""
        self.tell_to_stop()
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


def environment(folder: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    """Of a node whose other folders are in `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    return clean | {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OLLAMA_DISTRIBUTED_ENGINE": "wheel",
        # Models stay where a test puts them, unless it is about placement.
        "OLLAMA_DISTRIBUTED_PLACEMENT_COPIES": "1",
        **(env or {}),
    }


@contextmanager
def running_node(
    data_dir: Path,
    *arguments: str,
    env: dict[str, str] | None = None,
    listen: str = "127.0.0.1:0",
    command: Sequence[str] = ("serve",),
) -> Iterator[NodeProcess]:
    """A node on a free port of loopback; its exit status must be 0 unless it was killed."""
    node = NodeProcess(data_dir, ["--listen", listen, *arguments], environment(data_dir.parent, env), command)
    try:
        yield node
    finally:
        status = node.stop()
    assert status in (0, -signal.SIGKILL), f"the node ended with {status}:\n{node.log()}"


class Nodes:
    """Nodes n1, n2, ... in one folder, made to join each other; all end with the context."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._env = {"OLLAMA_DISTRIBUTED_MDNS": "false", **(env or {})}
        self._stack = ExitStack()
        self._started: dict[str, NodeProcess] = {}

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *exc: object) -> None:
        # All are told first: a voter that stops alone waits for the others.
        for node in self._started.values():
            node.tell_to_stop()
        self._stack.close()

    def __getitem__(self, name: str) -> NodeProcess:
        return self._started[name]

    def serve(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> NodeProcess:
        """Start a node, or start it again."""
        return self.start(name, ("serve",), arguments, env)

    def join(self, name: str, to: str, *arguments: str, role: NodeRole | None = None) -> NodeProcess:
        """Start a fresh node that joins the cluster of the node `to`."""
        return self.start(name, ("join", self.token(to, role=role)), arguments)

    def token(self, to: str, *, uses: int = 1, role: NodeRole | None = None) -> str:
        """To join the cluster of the node `to`: refused while that begins, or its voters change."""
        with self[to].admin() as client:
            made = until(lambda: client.cluster.create_token(role=role, uses=uses), SOON_S, "a token")
        return made.token

    def start(
        self,
        name: str,
        command: Sequence[str],
        arguments: Sequence[str],
        env: dict[str, str] | None = None,
    ) -> NodeProcess:
        args = ("--name", name, "--cluster-listen", "127.0.0.1", *arguments)
        node = self._stack.enter_context(
            running_node(self.folder / name, *args, env=self._env | (env or {}), command=command)
        )
        self._started[name] = node
        return node


def until(met: Callable[[], T], deadline_s: float, what: str) -> T:
    """What `met` returns, once that is true; errors of a node that is away count as not met."""
    end = time.monotonic() + deadline_s
    last: object = None
    while time.monotonic() < end:
        try:
            last = met()
        except (ClientError, httpx.HTTPError) as error:
            last = error
        else:
            if last:
                return last
        time.sleep(0.05)
    raise AssertionError(f"not within {deadline_s:g} s: {what}; last: {last!r}")
