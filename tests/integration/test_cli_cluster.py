"""`cluster`, `node` and `config` against the real gateway over the fake cluster."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from tests.cluster_server import ClusterServer, cluster_server
from tests.limits import SOON_S
from typer.testing import CliRunner, Result

from ollama_distributed.base.cluster import ConfigAsk
from ollama_distributed.cli.main import app
from ollama_distributed.testing.fake_cluster import FakeCluster

pytestmark = pytest.mark.integration

PROGRAM = [sys.executable, "-m", "ollama_distributed"]
DEADLINE_S = SOON_S
Run = Callable[..., Result]


@pytest.fixture
def server() -> Iterator[ClusterServer]:
    with cluster_server(FakeCluster("alpha", "beta", "gamma", "delta", now=time.time)) as running:
        yield running


@pytest.fixture(autouse=True)
def _environment(server: ClusterServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_DISTRIBUTED_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    monkeypatch.setenv("OLLAMA_API_KEY", server.key)
    monkeypatch.delenv("OLLAMA_DISTRIBUTED_API_KEY", raising=False)


@pytest.fixture
def run() -> Run:
    def invoke(*arguments: str, ok: bool = True) -> Result:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert (result.exit_code == 0) == ok, result.output
        return result

    return invoke


# ── cluster ─────────────────────────────────────────────────────────────────────────


def test_status(run: Run) -> None:
    text = run("cluster", "status").stdout
    assert "Status          ok\n" in text
    assert "voter,leader" in text
    assert json.loads(run("cluster", "status", "-o", "json").stdout)["nodes"] == {"online": 4}
    assert yaml.safe_load(run("--output", "yaml", "cluster", "status").stdout)["status"] == "ok"


def test_leader(server: ClusterServer, run: Run) -> None:
    told = run("cluster", "leader").stdout
    assert re.fullmatch(r"alpha, for (9\d|1[01]\d)s \(term 3\)\n", told), "90 s, and what it takes"
    server.cluster.quorum = False
    result = run("cluster", "leader", ok=False)
    assert "nobody leads now" in result.stderr
    assert "cluster status" in result.stderr


def test_a_token_is_a_command_to_type(run: Run) -> None:
    result = run("cluster", "token", "create", "--uses", "2", "--ttl", "1h", "--allow-host", "10.0.0.1")
    assert result.stdout == "ollama-distributed join odj_t1_secret\n"
    assert "becomes a node: it runs models" in result.stderr
    assert "Good for 2 machines" in result.stderr
    assert re.search(r"\(in (60|59)m\)", result.stderr), "an hour, less what the command takes"
    assert "token revoke t1" in result.stderr
    made = json.loads(run("cluster", "token", "create", "--role", "server", "-o", "json").stdout)
    assert (made["role"], made["uses"]) == ("server", 1)


def test_tokens_are_listed_and_revoked(run: Run) -> None:
    run("cluster", "token", "create")
    run("cluster", "token", "create")
    assert "revoked 't1'" in run("cluster", "token", "revoke", "t1").stderr
    assert [row["id"] for row in json.loads(run("cluster", "token", "list", "-o", "json").stdout)] == ["t2"]
    assert "revoked" in run("cluster", "token", "list", "--all").stdout
    assert "its id is in" in run("cluster", "token", "revoke", "odj_t2_secret", ok=False).stderr
    assert "there is no token" in run("cluster", "token", "revoke", "t9", ok=False).stderr


@pytest.mark.parametrize(
    "arguments", [("--role", "king"), ("--ttl", "soon"), ("--uses", "0")], ids=["role", "ttl", "uses"]
)
def test_a_token_asked_for_wrongly(run: Run, arguments: tuple[str, ...]) -> None:
    assert run("cluster", "token", "create", *arguments, ok=False).exit_code == 2


def test_leave_asks_first(server: ClusterServer, run: Run) -> None:
    refused = run("cluster", "leave", ok=False)
    assert "The other 3 nodes go on without it" in refused.stderr
    assert "add --yes" in refused.stderr
    assert not server.cluster.left
    assert "alpha left cluster" in run("cluster", "leave", "--yes").stderr
    assert server.cluster.left


def test_join(run: Run) -> None:
    assert "let it leave first" in run("cluster", "join", "odj_1", ok=False).stderr
    with cluster_server(FakeCluster("alpha")) as alone:
        result = run("--host", alone.url, "--api-key", alone.key, "cluster", "join", "odj_1")
    assert "of 2 nodes" in result.stderr


def test_replace_a_voter(server: ClusterServer, run: Run) -> None:
    assert "still lives" in run("cluster", "voter", "replace", "gamma", "--yes", ok=False).stderr
    server.cluster.set("gamma", status="offline")
    assert "gamma (offline)" in run("cluster", "voter", "replace", "gamma", ok=False).stderr
    told = run("cluster", "voter", "replace", "gamma", "delta", "--yes").stderr
    assert "the voters are alpha, beta, delta now" in told


# ── node ────────────────────────────────────────────────────────────────────────────


def test_nodes(run: Run) -> None:
    header, *rows = run("node", "list").stdout.splitlines()
    assert header.split()[:4] == ["NAME", "STATUS", "ROLE", "CPU"]
    assert [row.split()[0] for row in rows] == ["alpha", "beta", "delta", "gamma"]
    assert json.loads(run("node", "ls", "-o", "json").stdout)[1]["usage"]["cpu"] == 25.0
    assert "Engines          llama.cpp b1 (wheel, AVX2)\n" in run("node", "show", "beta").stdout
    assert json.loads(run("node", "show", "beta", "-o", "json").stdout)["id"] == "beta-id"


def test_drain_undrain_label_remove(server: ClusterServer, run: Run) -> None:
    assert "beta drains" in run("node", "drain", "beta", "gamma-id").stderr
    assert json.loads(run("node", "undrain", "beta", "-o", "json").stdout)["status"] == "online"
    assert "labels of beta: rack=7, zone=a" in run("node", "label", "beta", "zone=a", "rack=7").stderr
    assert "labels of beta: zone=a" in run("node", "label", "beta", "rack-").stderr
    assert run("node", "label", "beta", "rack", ok=False).exit_code == 2
    assert "add --yes" in run("node", "remove", "delta", ok=False).stderr
    assert "online" in run("node", "remove", "delta", "--yes", ok=False).stderr
    assert "removed delta" in run("node", "remove", "delta", "--yes", "--force").stderr
    assert "delta-id" not in server.cluster.rows


def test_a_name_that_is_wrong(run: Run) -> None:
    assert "did you mean beta" in run("node", "drain", "beat", ok=False).stderr


def test_no_quorum_says_where_to_look(server: ClusterServer, run: Run) -> None:
    server.cluster.quorum = False
    told = run("node", "drain", "beta", ok=False).stderr
    assert "no majority" in told
    assert "cluster status" in told
    assert "no quorum" in run("cluster", "status").stdout


def test_without_the_admins_key(run: Run) -> None:
    assert "admin" in run("--api-key", "", "node", "drain", "beta", ok=False).stderr
    assert run("--api-key", "", "node", "list").exit_code == 0


def test_names_of_nodes_are_completed(server: ClusterServer) -> None:
    env = {
        **os.environ,
        "_OLLAMA_DISTRIBUTED_COMPLETE": "complete_bash",
        "COMP_WORDS": "ollama-distributed node drain ",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(PROGRAM, env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.stdout.split() == ["alpha", "beta", "delta", "gamma"]


# ── config ──────────────────────────────────────────────────────────────────────────


def test_config(run: Run) -> None:
    assert "sets nothing" in run("config", "get").stdout
    told = run("config", "set", "keep_alive=10m", "num_parallel=8", "-m", "busy").stderr
    assert "num_parallel: (each node's own) -> 8" in told
    assert "version 1 holds on all nodes now" in told
    assert run("config", "get", "keep_alive").stdout == "10m\n"
    assert json.loads(run("config", "get", "num_parallel", "-o", "json").stdout) == 8
    assert "uses its own" in run("config", "get", "nothing", ok=False).stderr
    assert "at version 1 now" in run("config", "set", "a=1", "--if-version", "0", ok=False).stderr
    assert run("config", "set", "keep_alive", ok=False).exit_code == 2
    assert "keep_alive: 10m -> (each node's own)" in run("config", "unset", "keep_alive").stderr
    assert "nothing was changed" in run("config", "unset", "keep_alive", ok=False).stderr
    assert "busy" in run("config", "history").stdout
    assert "add --yes" in run("config", "rollback", "1", ok=False).stderr
    assert "there are: 2, 1" in run("config", "rollback", "7", ok=False).stderr
    assert "keep_alive: (each node's own) -> 10m" in run("config", "rollback", "1", "--yes").stderr
    assert "nothing was changed" in run("config", "rollback", "1").stderr


# ── watching ────────────────────────────────────────────────────────────────────────


class Watched:
    """A command that goes on; its output so far."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self.text = ""

    def until(self, text: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            try:
                self.text += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # a terminal whose program ended
                raise AssertionError(self.text) from None

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(DEADLINE_S)


@contextmanager
def watched(*arguments: str, terminal: bool = False) -> Iterator[Watched]:
    reading, writing = pty.openpty() if terminal else os.pipe()
    env = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": "120",
        "LINES": "40",
        "PYTHONIOENCODING": "utf8",
    }
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stdout=writing, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=env
    )
    os.close(writing)
    os.set_blocking(reading, True)
    try:
        yield Watched(process, reading)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(DEADLINE_S)
        os.close(reading)


def test_watching_nodes_in_a_terminal(server: ClusterServer) -> None:
    with watched("node", "list", "--watch", "--every", "0.1", terminal=True) as seen:
        seen.until("● online")
        server.cluster.set("beta", status="offline", reason="no heartbeat for 8 s")
        seen.until("beta: no heartbeat for 8 s")
        assert "\x1b[31m" in seen.text
        assert seen.interrupt() == 0


def test_watching_nodes_in_a_pipe_prints_what_changes(server: ClusterServer) -> None:
    with watched("node", "list", "--watch", "--every", "0.1") as seen:
        seen.until("gamma  online")
        server.cluster.set("beta", status="draining")
        seen.until("beta  draining")
        del server.cluster.rows["delta-id"]
        seen.until("delta  gone")
        assert "\x1b" not in seen.text
        assert seen.text.count("alpha") == 1, "what did not change is not told again"
        assert seen.interrupt() == 0


def test_watching_as_json_is_one_document_a_line(server: ClusterServer) -> None:
    with watched("cluster", "status", "--watch", "--every", "0.1", "-o", "json") as seen:
        seen.until('"status":"ok"')
        server.cluster.set("beta", status="offline")
        seen.until('"status":"degraded"')
        assert json.loads(seen.text.splitlines()[0])["nodes"] == {"online": 4}


def test_watching_the_config(server: ClusterServer) -> None:
    with watched("config", "watch") as seen:
        seen.until("version 0")
        server.do(server.cluster.put_config(ConfigAsk(values={"keep_alive": "9m"}), actor="k"))
        seen.until("keep_alive: (each node's own) -> 9m")
        assert seen.interrupt() == 0


def test_a_watch_waits_for_a_server_that_is_away() -> None:
    with cluster_server(FakeCluster("alpha")) as first:
        asked = ("--host", first.url, "--api-key", first.key, "node", "list", "--watch", "--every", "0.1")
        with watched(*asked, terminal=True) as seen:
            seen.until("alpha")
            first.stop()
            seen.until("no answer for")
            assert seen.interrupt() == 0


def test_watching_the_config_goes_on_when_its_server_was_away() -> None:
    """The next watch tells what changed meanwhile, and only that."""
    with cluster_server(FakeCluster("alpha")) as first:
        port = int(first.url.rpartition(":")[2])
        with watched("--host", first.url, "--api-key", "", "config", "watch") as seen:
            seen.until("version 0")
            first.stop()
            with cluster_server(FakeCluster("alpha"), port=port) as second:
                second.do(second.cluster.put_config(ConfigAsk(values={"max_queue": 9}), actor="k"))
                seen.until("max_queue: (each node's own) -> 9")
                assert seen.text.count("version 0") == 1
                assert seen.interrupt() == 0
