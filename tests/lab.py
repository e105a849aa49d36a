"""A small network of its own for whole nodes: one namespace per machine, a router between them.

Cuts are made in the router, silently and one way at a time (`ip rule … blackhole`), as a
broken switch does: no reset, no error, packets just do not arrive. Needs root and iproute2;
where they are missing `available()` says why.

Machine i has the address 10.77.i.2 and its own loopback. From outside, its loopback is
reached through a relay that listens on a UNIX socket (`Machine.http`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import httpx

from tests.limits import SOON_S

API_PORT = 8080
_API = f"http://127.0.0.1:{API_PORT}"
RELAY_READY_S = SOON_S

_RELAY = """
import asyncio, sys

async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def serve(reader, writer):
    try:
        there = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    except OSError:
        writer.close()
        return
    await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

async def main():
    server = await asyncio.start_unix_server(serve, sys.argv[1])
    await server.serve_forever()

asyncio.run(main())
"""


def available() -> str:
    """Empty where namespaces can be made; else the reason why not."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if shutil.which("ip") is None:
        return "needs iproute2"
    probe = subprocess.run(
        ["ip", "netns", "add", f"od-probe-{os.getpid()}"], capture_output=True, check=False
    )
    if probe.returncode != 0:
        return f"no network namespaces here: {probe.stderr.decode().strip()}"
    ip("netns", "del", f"od-probe-{os.getpid()}")
    return ""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Machine:
    """One namespace."""

    def __init__(self, network: Network, number: int) -> None:
        self.number = number
        self.namespace = f"{network.prefix}-{number}"
        self.wire = f"{network.prefix}r{number}"
        """The router's end of its cable."""
        self.address = f"10.77.{number}.2"
        self.socket = network.folder / f"{number}.sock"
        self._relay: subprocess.Popen[bytes] | None = None

    def prefix(self) -> list[str]:
        """Words that run a command on this machine."""
        return ["ip", "netns", "exec", self.namespace]

    def http(self, timeout_s: float = 30.0, headers: dict[str, str] | None = None) -> httpx.Client:
        """A client of the API on this machine's loopback."""
        transport = httpx.HTTPTransport(uds=str(self.reach()))
        return httpx.Client(base_url=_API, transport=transport, timeout=timeout_s, headers=headers)

    def async_http(self, timeout_s: float = 30.0, headers: dict[str, str] | None = None) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=str(self.reach()))
        return httpx.AsyncClient(base_url=_API, transport=transport, timeout=timeout_s, headers=headers)

    def reach(self) -> Path:
        """The UNIX socket before this machine's loopback. Idempotent."""
        if self._relay is None:
            self._relay = subprocess.Popen(
                [*self.prefix(), sys.executable, "-c", _RELAY, str(self.socket), str(API_PORT)]
            )
            deadline = time.monotonic() + RELAY_READY_S
            while not self.socket.exists():
                assert self._relay.poll() is None, "the relay ended"
                assert time.monotonic() < deadline, "the relay does not come up"
                time.sleep(0.01)
        return self.socket

    def close(self) -> None:
        if self._relay is not None:
            self._relay.send_signal(signal.SIGKILL)
            self._relay.wait(10)


class Network:
    """`machines` and the cuts between them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.prefix = f"od{os.getpid() % 100_000}"
        self.router = f"{self.prefix}-r"
        self.machines = [Machine(self, number) for number in range(1, count + 1)]
        self._cut: list[list[str]] = []

    def up(self) -> None:
        ip("netns", "add", self.router)
        ip("-n", self.router, "link", "set", "lo", "up")
        for machine in self.machines:
            ip("netns", "add", machine.namespace)
            ip("link", "add", machine.wire, "netns", self.router, "type", "veth", "peer", "eth0", "netns",
               machine.namespace)  # fmt: skip
            gateway = f"10.77.{machine.number}.1"
            ip("-n", self.router, "addr", "add", f"{gateway}/24", "dev", machine.wire)
            ip("-n", self.router, "link", "set", machine.wire, "up")
            ip("-n", machine.namespace, "link", "set", "lo", "up")
            ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            ip("-n", machine.namespace, "link", "set", "eth0", "up")
            ip("-n", machine.namespace, "route", "add", "default", "via", gateway)
        words = ["ip", "netns", "exec", self.router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1"]
        subprocess.run(words, check=True)

    def down(self) -> None:
        for machine in self.machines:
            machine.close()
        for name in (self.router, *(machine.namespace for machine in self.machines)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def cut_one_way(self, source: Machine, target: Machine) -> None:
        """Nothing that `source` sends reaches `target` any more."""
        words = ["iif", source.wire, "to", f"{target.address}/32", "blackhole"]
        ip("-n", self.router, "rule", "add", *words)
        self._cut.append(words)

    def split(self, *groups: Sequence[Machine]) -> None:
        """No packet passes from one group to another."""
        for here, there in permutations(groups, 2):
            for source in here:
                for target in there:
                    self.cut_one_way(source, target)

    def heal(self) -> None:
        while self._cut:
            ip("-n", self.router, "rule", "del", *self._cut.pop())


@contextmanager
def network(folder: Path, count: int) -> Iterator[Network]:
    made = Network(folder, count)
    try:
        made.up()
        yield made
    finally:
        made.down()
