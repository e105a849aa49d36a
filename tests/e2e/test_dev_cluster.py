"""`make dev-cluster`: three nodes become one cluster, stop without a trace, start again as they were."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.limits import SOON_S

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.untraced, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
TOGETHER_S = 4 * SOON_S
STOP_S = 2 * SOON_S
"""It gives its nodes 45 s, and what they leave behind 10 more."""


class DevCluster:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._together = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("Ctrl-C stops them all"):
                self._together.set()
        self._together.set()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait(self) -> None:
        assert self._together.wait(TOGETHER_S), self.text
        assert self.process.poll() is None, self.text

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(STOP_S)
        self._reader.join(STOP_S)
        return status


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def dev_cluster(folder: Path) -> Iterator[DevCluster]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    env |= {"OLLAMA_DISTRIBUTED_ENGINE": "wheel", "XDG_CACHE_HOME": str(folder.parent / "cache")}
    process = subprocess.Popen(
        [
            sys.executable,
            "tools/dev_cluster.py",
            "--no-model",
            "--folder",
            str(folder),
            "--port",
            str(free_port()),
        ],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    cluster = DevCluster(process)
    try:
        yield cluster
    finally:
        if process.poll() is None:
            cluster.stop()
        assert process.stdout is not None
        process.stdout.close()


def ask(folder: Path, node: str, *command: str) -> str:
    done = asked(folder, node, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(folder: Path, node: str, *command: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    return subprocess.run(
        [sys.executable, "-m", "ollama_distributed", "--data-dir", str(folder / node), *command],
        env=env,
        capture_output=True,
        text=True,
        timeout=SOON_S,
        check=False,
    )


def until_ok(folder: Path, node: str) -> dict[str, object]:
    """The status as this node sees it, once all are online."""
    deadline = time.monotonic() + SOON_S
    while True:
        # It waits 5 s for an answer, which a machine that starts three nodes may not have by then.
        looked = asked(folder, node, "cluster", "status", "-o", "json")
        status: dict[str, object] = {} if looked.returncode else json.loads(looked.stdout)
        if status.get("nodes") == {"online": 3} and status["status"] == "ok":
            return status
        assert time.monotonic() < deadline, status or looked.stderr


def test_three_nodes_from_nothing_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "dev"
    with dev_cluster(folder) as first:
        first.wait()
        assert re.search(r"^3 nodes, one cluster, up in \d+", first.text, re.MULTILINE)
        clusters = {until_ok(folder, f"node{n}")["cluster"] for n in (1, 2, 3)}
        assert len(clusters) == 1
        deadline = time.monotonic() + SOON_S
        # While one voter becomes three, changes are refused, or in doubt: one looks, and repeats.
        while (label := asked(folder, "node2", "node", "label", "node3", "zone=a")).returncode:
            assert time.monotonic() < deadline, label.stderr
        below = first.tree()
        assert len(below) >= 4, "three nodes and a coordination server"
        assert first.stop() == 0, first.text
        assert "stopped cleanly" in first.lines[-1]
        assert not [process for process in below if process.is_running()], first.text
    with dev_cluster(folder) as second:
        second.wait()
        assert until_ok(folder, "node2")["cluster"] in clusters
        shown = json.loads(ask(folder, "node1", "node", "show", "node3", "-o", "json"))
        assert shown["labels"] == {"zone": "a"}
        assert "join" not in second.text
        assert second.stop() == 0, second.text


def test_a_reader_that_is_gone_stops_nothing() -> None:
    """A closed terminal: the nodes must be taken down all the same."""
    reading, writing = os.pipe()
    os.close(reading)
    script = "import dev_cluster; dev_cluster.say('one'); dev_cluster.say('two'); raise SystemExit(7)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=writing, env=env, timeout=SOON_S, check=False
    )
    os.close(writing)
    assert done.returncode == 7
