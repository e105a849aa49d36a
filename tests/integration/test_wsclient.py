"""`WSClient` on a socket: the developer guide's program, and what it does when things go wrong."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.gateway_bench import HELLO, WALL, Server, gateway, serving, until

from ollama_distributed import WSClient, WSMessage
from ollama_distributed.access.keys import make_key
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.cluster import NodeUsage
from ollama_distributed.client import errors
from ollama_distributed.client.address import socket_base
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference

GUIDE = """
from ollama_distributed import WSClient
import asyncio

async def monitor_cluster():
    async with WSClient("ws://localhost:8080/api/v1/ws") as ws:
        # Subscribe to metrics
        await ws.subscribe("metrics")
        await ws.subscribe("alerts")
        
        async for message in ws.listen():
            if message.type == "metrics":
                handle_metrics(message.data)
            elif message.type == "alerts":
                handle_alert(message.data)

def handle_metrics(metrics):
    cpu_usage = metrics.get("cpu_usage", 0)
    memory_usage = metrics.get("memory_usage", 0)
    
    print(f"CPU: {cpu_usage:.1f}%, Memory: {memory_usage:.1f}%")
    
    if cpu_usage > 80:
        print("⚠️  High CPU usage detected!")

def handle_alert(alert):
    level = alert.get("level", "info")
    message = alert.get("message", "")
    
    icon = {"error": "❌", "warning": "⚠️", "info": "ℹ️"}.get(level, "📢")
    print(f"{icon} {level.upper()}: {message}")

if __name__ == "__main__":
    asyncio.run(monitor_cluster())
"""  # noqa: W293, RUF001  # as the guide has it
"""Word for word."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are asked often."""
    from ollama_distributed.gateway.events import channels, hub

    real: Callable[..., channels.Channel] = channels.Channel

    def often(*args: Any) -> channels.Channel:
        return real(*args[:5], 0.02)

    monkeypatch.setattr(channels, "Channel", often)
    monkeypatch.setattr(hub, "FIRST_S", 30.0)


@asynccontextmanager
async def world(cluster: FakeCluster, port: int = 0, **extra: Any) -> AsyncIterator[Server]:
    async with serving(
        gateway(ScriptedInference(HELLO), cluster=cluster, **extra), adapter="fast", port=port
    ) as server:
        yield server


def client(server: Server, key: str = "") -> WSClient:
    return WSClient(f"ws://127.0.0.1:{server.port}/api/v1/ws", api_key=key)


async def _next(messages: AsyncIterator[WSMessage]) -> tuple[str, str, str]:
    async with asyncio.timeout(30):
        message = await anext(messages)
    return message.type, message.event, message.data.get("name", "")


async def test_the_guides_program_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = FakeCluster("alpha", "beta")
    async with world(cluster) as server:
        program: dict[str, Any] = {"__name__": "monitor"}
        exec(compile(GUIDE.replace("8080", str(server.port)), "guide", "exec"), program)
        running = asyncio.create_task(program["monitor_cluster"]())
        told = ""

        def printed(text: str) -> bool:
            nonlocal told
            told += capsys.readouterr().out
            return text in told

        await until(lambda: printed("CPU: 0.0%, Memory: 50.0%"), "figures of a node")
        cluster.set("alpha", usage=NodeUsage(cpu=93.0, memory=51.0, age_s=0.1))
        await until(lambda: printed("CPU: 93.0%, Memory: 51.0%\n⚠️  High CPU"), "that it is busy")
        cluster.set("beta", status="offline")
        await until(lambda: printed("❌ ERROR: beta does not answer: see to it, or remove it\n"), "an alert")
        cluster.set("beta", status="online")
        await until(
            lambda: printed("ℹ️ INFO: over: beta does not answer"),  # noqa: RUF001  # the guide's sign
            "its end",
        )
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await until(lambda: len(server.watch) == 0, "it hung up")


async def test_what_one_subscribes_to_and_no_more() -> None:
    cluster = FakeCluster("alpha", "beta", "gamma")
    async with world(cluster) as server, client(server) as ws:
        messages = ws.listen()
        await ws.subscribe("nodes", "beta")
        await ws.subscribe("nodes", "gamma")
        names = {await _next(messages) for _ in range(2)}
        assert names == {("nodes", "now", "beta"), ("nodes", "now", "gamma")}
        await ws.unsubscribe("nodes", "gamma")
        cluster.set("gamma", reason="nobody listens")
        await ws.subscribe("alerts")
        assert await _next(messages) == ("nodes", "now", "beta"), "it is told anew"
        cluster.set("beta", status="suspect")
        assert {await _next(messages), await _next(messages)} == {
            ("nodes", "changed", "beta"),
            ("alerts", "changed", "beta"),
        }


async def test_through_a_restart_and_what_was_over_meanwhile() -> None:
    cluster = FakeCluster("alpha", "beta")
    cluster.set("beta", status="offline")
    async with world(cluster) as server:
        port = server.port
        ws = await client(server).__aenter__()
        await ws.subscribe("alerts")
        messages = ws.listen()
        assert await _next(messages) == ("alerts", "now", "beta")
    cluster.set("beta", status="online")
    async with world(cluster, port):
        async with asyncio.timeout(30):
            last = await anext(messages)
        assert (last.event, last.data["level"]) == ("gone", "info")
        assert last.data["message"].startswith("over: beta does not answer")
        waiting = asyncio.ensure_future(anext(messages, None))
        await ws.aclose()
        assert await waiting is None, "who listens is done when it is closed"
        with pytest.raises(errors.ConnectionLost, match="closed"):
            await ws.subscribe("alerts")


async def test_what_one_may_not_follow() -> None:
    key, record = make_key("user", now=0.0)
    viewer_key, viewer = make_key("viewer", now=0.0)
    authenticator = Authenticator((), require_key=True, wall=lambda: WALL)
    authenticator.share({record.id: record, viewer.id: viewer}, {})
    cluster = FakeCluster("alpha")
    async with world(cluster, authenticator=authenticator) as server:
        with pytest.raises(errors.Unauthenticated):
            await client(server).__aenter__()
        async with client(server, viewer_key) as ws:
            with pytest.raises(errors.NotFound, match="transfers"):
                await ws.subscribe("transfers")  # of a node that has none
            with pytest.raises(ValueError, match="alerts"):
                await ws.subscribe("nothing")
            listening = asyncio.ensure_future(anext(ws.listen()))
            await ws.subscribe("nodes")
            assert (await listening).type == "nodes"
        async with client(server, key) as ws:
            with pytest.raises(errors.Forbidden):
                await ws.subscribe("alerts")


@pytest.mark.parametrize(
    "url", ["ws://h:1/api/v1/ws", "ws://h:1", "http://h:1/", "WS://h:1/api/v1/ws/"], ids=str
)
def test_where_it_is(url: str) -> None:
    assert socket_base(url) == "http://h:1"


def test_with_tls_and_below_a_path() -> None:
    assert socket_base("wss://h/gpu/api/v1/ws") == "https://h:443/gpu"


def test_a_programs_import_brings_nothing_of_the_node() -> None:
    code = (
        "import sys; from ollama_distributed import WSClient; WSClient(); "
        "print([m for m in sys.modules if m.startswith('ollama_distributed.') and m.split('.')[1] "
        "not in ('base', 'client', '_version')], 'websockets' in sys.modules, 'httpx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] False False"
