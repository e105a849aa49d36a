"""Nodes n1, n2, ... each on a machine of its own, and what is done to them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import psutil

from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.lab import API_PORT, Machine, Network
from tests.limits import STRICT, limit_s
from tests.nodes import NodeProcess, environment

ANSWERS = {
    "shared": "Two nodes have this model, so that one of them may die and the other one answers.",
    "single": "Only one node has this model, and every other one gives its answer.",
}
HOLDERS = {"shared": ("n1", "n2"), "single": ("n3",)}
WELL_S = 150.0
"""For what must happen at all; what is measured has limits of its own."""
START_S = 3.0
"""A node's start, each by itself, on a quiet machine of two cores."""

_LEADS = re.compile(r"^\[\d+\] (\S+ \S+) \[INF\] .*new stream leader for '.* > KV_cfg'", re.MULTILINE)


async def until(met: Callable[[], Awaitable[object]], deadline_s: float, what: str) -> float:
    """Wait until `met` returns something true; the seconds that took."""
    began = time.monotonic()
    last: object = None
    while (took_s := time.monotonic() - began) < deadline_s:
        try:
            last = await met()
        except (httpx.HTTPError, KeyError) as error:
            last = error
        else:
            if last:
                return time.monotonic() - began
        await anyio.sleep(0.05)
    raise AssertionError(f"not within {deadline_s:g} s ({took_s:.1f}): {what}; last: {last!r}")


class World:
    """Up with `found`; end it with `end`."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.folder = folder
        self.network = network
        self._machines = {f"n{machine.number}": machine for machine in network.machines}
        self._env = environment(folder, {"OLLAMA_DISTRIBUTED_MDNS": "false"})
        self._running: dict[str, NodeProcess] = {}
        self._ended: list[NodeProcess] = []
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._stopped: list[psutil.Process] = []
        self.cluster = ""
        self.unwell = ""
        """Why `well` said no last."""
        self._starts_s: list[float] = []

    @property
    def pace(self) -> float:
        """How many times slower than `START_S` this machine started the nodes; at least 1."""
        return max(1.0, statistics.median(self._starts_s) / START_S)

    def limit_s(self, promised_s: float) -> float:
        """The promise itself if strict; elsewhere what tells late from never, at this pace."""
        return promised_s if STRICT else self.pace * limit_s(promised_s)

    @property
    def names(self) -> list[str]:
        return sorted(self._running)

    def machine(self, name: str) -> Machine:
        return self._machines[name]

    def machines(self, names: Iterable[str]) -> list[Machine]:
        return [self._machines[name] for name in names]

    def __getitem__(self, name: str) -> NodeProcess:
        return self._running[name]

    def name_of(self, node: str) -> str:
        return next(name for name, process in self._running.items() if process.id == node)

    # ── life ────────────────────────────────────────────────────────────────────────

    async def found(self, count: int) -> None:
        """Nodes n1 ... as voters, with the models where `HOLDERS` says."""
        await self.start("n1", ("serve",))
        await self.join([f"n{number}" for number in range(2, count + 1)])
        for model, holders in HOLDERS.items():
            for holder in holders:
                await self._add_model(holder, model)
        self.cluster = (await self.status("n1"))["cluster"]
        await self.grown(count)

    async def join(self, names: Sequence[str]) -> None:
        ask = {"uses": len(names), "role": "server", "ttl_s": 600}
        made: list[str] = []

        async def given() -> bool:
            made.append((await self.call("n1", "POST", "/api/v1/cluster/tokens", json=ask))["token"])
            return True

        await until(given, WELL_S, "a token: refused while the cluster begins, or elects")
        for name in names:
            await self.start(name, ("join", made[0]))

    async def grown(self, voters: int) -> float:
        async def met() -> bool:
            return len((await self.status("n1"))["voters"]) == voters and await self.well()

        return await until(met, WELL_S, f"{voters} voters, and all well")

    async def start(self, name: str, command: Sequence[str] = ("serve",)) -> None:
        """Start a node, or start it again; returns when it is ready."""
        machine = self._machines[name]
        where = ("--cluster-listen", machine.address, "--advertise", machine.address)
        arguments = ("--name", name, "--listen", f"127.0.0.1:{API_PORT}", *where)

        def started() -> NodeProcess:
            data_dir = self.folder / name
            return NodeProcess(data_dir, arguments, self._env, command, prefix=machine.prefix())

        began = time.monotonic()
        self._running[name] = await anyio.to_thread.run_sync(started)
        self._starts_s.append(time.monotonic() - began)
        if name not in self._clients:
            headers = {"Authorization": f"Bearer {self.key(name)}"}
            self._clients[name] = machine.async_http(30.0, headers)

    def kill(self, *names: str) -> None:
        """SIGKILL to whole nodes, at one moment; what they started dies with them."""
        for name in names:
            self._running[name].process.send_signal(signal.SIGKILL)
        for name in names:
            self._running[name].kill()

    async def repair(self) -> None:
        """Undo whatever a scenario left behind, and wait until all is well."""
        self.resume()
        self.network.heal()
        for name, node in list(self._running.items()):
            if node.process.poll() is not None:
                await self.start(name)
        await until(self.well, WELL_S, "all well after repairs")

    async def end(self) -> None:
        self.resume()
        for client in self._clients.values():
            await client.aclose()
        for node in self._running.values():
            node.tell_to_stop()
        for node in self._running.values():
            await anyio.to_thread.run_sync(node.stop)

    # ── harm ────────────────────────────────────────────────────────────────────────

    def suspend(self, process: psutil.Process) -> None:
        process.suspend()
        self._stopped.append(process)

    def resume(self) -> None:
        while self._stopped:
            process = self._stopped.pop()
            if process.is_running():
                process.resume()

    def stream_leader(self) -> str:
        """Whose nats-server leads the state's stream, as their logs say."""
        found: list[tuple[str, str]] = []
        for name in self._running:
            log = self.folder / name / "nats" / self.cluster / "nats-server.log"
            times = _LEADS.findall(log.read_text(errors="replace")) if log.exists() else []
            found += [(at, name) for at in times[-1:]]
        assert found, "no nats-server says that it leads"
        return max(found)[1]

    # ── asking ──────────────────────────────────────────────────────────────────────

    def key(self, name: str) -> str:
        key: str = json.loads((self.folder / name / "admin.json").read_text())["key"]
        return key

    async def call(self, name: str, method: str, path: str, **options: Any) -> Any:
        answer = await self._clients[name].request(method, path, **options)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    async def status(self, name: str) -> Any:
        return await self.call(name, "GET", "/api/v1/cluster/status")

    async def leader(self, ask: str = "n1") -> str:
        """The name of the node that leads, as `ask` knows it."""

        async def known() -> bool:
            return bool((await self.status(ask))["leader"]["leader"])

        await until(known, WELL_S, f"{ask} knows a leader")
        return self.name_of((await self.status(ask))["leader"]["leader"])

    async def well(self) -> bool:
        """Each node says so, of all nodes, and they name the same leader."""
        found = await asyncio.gather(*map(self.status, self.names))
        leaders: dict[str, int] = {}
        for name, status in zip(self.names, found, strict=True):
            leader = status["leader"]
            leaders[f"{leader['leader']} in {leader['epoch']}"] = 1
            if status["status"] != "ok" or status["nodes"] != {"online": len(found)}:
                self.unwell = f"{name}: {status['status']} {status['nodes']} {status['reasons']}"
                return False
        if len(leaders) > 1:
            self.unwell = f"leaders: {', '.join(leaders)}"
        return len(leaders) == 1

    async def _add_model(self, name: str, model: str) -> None:
        gguf = scripted_model(ANSWERS[model], chat_template=CHATML_TEMPLATE)
        digest = f"sha256:{hashlib.sha256(gguf).hexdigest()}"
        await self.call(name, "POST", f"/api/blobs/{digest}", content=gguf)
        made = {"model": model, "files": {f"{model}.gguf": digest}, "stream": False}
        await self.call(name, "POST", "/api/create", json=made)


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        os.kill(pid, 0)
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
