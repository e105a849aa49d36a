"""Watching the configuration over both adapters: events, heartbeats, and how it ends."""

import json

import pytest
from tests.gateway_bench import HELLO, gateway, request_bytes, serving, until

from ollama_distributed.base.cluster import ConfigAsk
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.gateway import watching
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

WATCH = request_bytes("GET", "/api/v1/config/watch")


@pytest.fixture(params=["asgi", "fast"])
def adapter(request):
    return request.param


@pytest.fixture
def cluster():
    return FakeCluster("alpha")


def app_over(cluster, ready=lambda: True):
    return gateway(ScriptedInference(HELLO), cluster=cluster, ready=ready)


async def put(cluster, **values):
    await cluster.put_config(ConfigAsk(values=values), actor="k")


def version_of(event):
    lines = event.decode().splitlines()
    assert lines[1] == "event: config"
    config = json.loads(lines[2].removeprefix("data: "))
    assert lines[0] == f"id: {config['version']}"
    return config["version"]


async def test_each_version_is_one_event(adapter, cluster):
    async with serving(app_over(cluster), adapter=adapter) as server, await server.connect() as client:
        await client.send(WATCH)
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
        assert version_of(await client.chunk()) == 0
        for version in (1, 2):
            await put(cluster, keep_alive=f"{version}m")
            assert version_of(await client.chunk()) == version
        assert cluster.watchers == 1


async def test_a_client_that_goes_away_ends_its_watch(adapter, cluster):
    async with serving(app_over(cluster), adapter=adapter) as server:
        async with await server.connect() as client:
            await client.send(WATCH)
            await client.head()
            await client.chunk()
            assert cluster.watchers == 1
        await until(lambda: cluster.watchers == 0, "the watch ends")


async def test_silence_is_filled(adapter, cluster, monkeypatch):
    monkeypatch.setattr(watching.Watchers.__init__, "__kwdefaults__", {"most": 2, "heartbeat_s": 0.02})
    async with serving(app_over(cluster), adapter=adapter) as server, await server.connect() as client:
        await client.send(WATCH)
        await client.head()
        await client.chunk()
        assert (await client.chunk()).startswith(b": ")
        await put(cluster, keep_alive="1m")
        while (chunk := await client.chunk()).startswith(b": "):
            pass
        assert version_of(chunk) == 1


async def test_too_many_watchers_are_refused(adapter, cluster, monkeypatch):
    monkeypatch.setattr(watching.Watchers.__init__, "__kwdefaults__", {"most": 1, "heartbeat_s": 9.0})
    async with serving(app_over(cluster), adapter=adapter) as server:
        async with await server.connect() as first:
            await first.send(WATCH)
            await first.head()
            await first.chunk()
            async with await server.connect() as second:
                await second.send(WATCH)
                refused = await second.answer()
                assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
        await until(lambda: cluster.watchers == 0, "the first watch ends")
        async with await server.connect() as third:
            await third.send(WATCH)
            assert (await third.head())[0] == 200


async def test_a_node_that_stops_lets_its_watchers_go(adapter, cluster):
    ready = [True]
    app = app_over(cluster, ready=lambda: ready[0])
    async with serving(app, adapter=adapter) as server, await server.connect() as client:
        await client.send(WATCH)
        await client.head()
        await client.chunk()
        ready[0] = False
        assert await client.chunk() == b""
        await until(lambda: cluster.watchers == 0, "the watch ends")


async def test_a_source_that_fails_ends_with_an_error_event(adapter):
    class Failing(FakeCluster):
        async def watch_config(self):
            yield self.config()
            raise Unavailable("the mirror is gone")

    async with serving(app_over(Failing("alpha")), adapter=adapter) as server:
        async with await server.connect() as client:
            await client.send(WATCH)
            answer = await client.answer()
        last = answer.body.decode().strip().split("\n\n")[-1].splitlines()
        assert last[0] == "event: error"
        assert json.loads(last[1].removeprefix("data: "))["error"]["message"] == "the mirror is gone"
