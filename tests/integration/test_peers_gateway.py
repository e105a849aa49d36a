"""The API of a node that holds nothing, for models of other nodes: every dialect, lists, ps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.catalogues import Catalogues
from tests.gateway_bench import gateway, serving
from tests.hop_nodes import HopNode, cluster, until
from tests.limits import SOON_S

from ollama_distributed.gateway.ports import VersionInfo
from ollama_distributed.models.scripted import scripted_model
from ollama_distributed.serving.cluster import ClusterResidents, load_of
from ollama_distributed.state import keys as state_keys
from ollama_distributed.state.records import Holdings

pytestmark = pytest.mark.integration

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello there"}]}


@asynccontextmanager
async def api(node: HopNode) -> AsyncIterator[httpx.AsyncClient]:
    app = gateway(
        node.answers,
        catalog=Catalogues(node.nodes).add(node),
        residents=ClusterResidents(node.serving, node, node.id, node.state),
        version=VersionInfo(version="1", ollama="1", node=node.id, name=f"{node.id}-name"),
    )
    async with (
        serving(app, adapter="fast") as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=SOON_S) as client,
    ):
        yield client


async def test_every_dialect_answers_for_another_node(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a")
        await nodes.add("b", ("m",))
        async with api(a) as client:
            lines = (await client.post("/api/chat", json=CHAT)).text.splitlines()
            text = "".join(json.loads(line)["message"]["content"] for line in lines)
            assert "hello there" in text
            assert json.loads(lines[-1])["done"] is True
            answer = (
                await client.post("/api/generate", json={"model": "m", "prompt": "x y", "stream": False})
            ).json()
            assert "x y" in answer["response"]
            answer = (await client.post("/v1/chat/completions", json=CHAT)).json()
            assert "hello there" in answer["choices"][0]["message"]["content"]
            streamed = (await client.post("/v1/chat/completions", json={**CHAT, "stream": True})).text
            assert streamed.endswith("data: [DONE]\n\n")
            answer = (await client.post("/v1/messages", json={**CHAT, "max_tokens": 50})).json()
            assert "hello there" in answer["content"][0]["text"]
            answer = (await client.post("/api/embed", json={"model": "m", "input": ["a", "b"]})).json()
            assert len(answer["embeddings"]) == 2
            answer = (await client.post("/v1/messages/count_tokens", json={**CHAT, "max_tokens": 50})).json()
            assert answer["input_tokens"] > 0


async def test_every_answer_says_which_node_it_is_from(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a", ("own",))
        await nodes.add("b", ("m",))
        async with api(a) as client:
            for model, node in (("own", "a-name"), ("m", "b-name")):
                for path, body in (
                    ("/api/chat", CHAT),
                    ("/v1/chat/completions", CHAT),
                    ("/v1/chat/completions", {**CHAT, "stream": True}),
                    ("/api/generate", {"prompt": "x", "stream": False}),
                    ("/api/generate", {}),
                    ("/api/embed", {"input": "x"}),
                    ("/v1/rerank", {"query": "x", "documents": ["y"]}),
                ):
                    answer = await client.post(path, json={**body, "model": model})
                    assert (answer.status_code, answer.headers.get("x-ollama-node")) == (200, node), path
            assert "x-ollama-node" not in (await client.post("/api/chat", json={})).headers


async def test_errors_of_another_node_are_shaped_here(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        async with api(a) as client:
            answer = await client.post("/api/chat", json={**CHAT, "model": "none"})
            assert (answer.status_code, answer.json()) == (404, {"error": "model 'none' not found"})
            answer = await client.post("/api/chat", json={**CHAT, "think": True})
            assert answer.status_code == 400
            a.addresses[b.id] = ("127.0.0.1:1",)
            a.pool.drop(b.id, "test")
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 503
            assert "node b cannot be reached" in answer.json()["error"]["message"]


async def test_lists_are_of_the_cluster_and_show_comes_from_a_holder(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a", ("own", "both")), await nodes.add("b", ("m", "both"))
        held = nodes.state.nodes[b.id].holdings
        assert held is not None
        sized = tuple(
            msgspec.structs.replace(one, size_bytes=1000 + i, digest=f"{i:064x}", parameters=7_000_000)
            for i, one in enumerate(held.models)
        )
        nodes.write(state_keys.holdings(b.id), Holdings(node=b.id, models=sized))
        async with api(a) as client:
            rows = {row["name"]: row for row in (await client.get("/api/tags")).json()["models"]}
            assert sorted(rows) == ["both", "m", "own"]
            by_name = {one.display: one for one in sized}
            assert rows["m"]["size"] == by_name["m"].size_bytes
            assert rows["m"]["digest"] == by_name["m"].digest
            assert rows["m"]["details"]["parameter_size"] == "7M"
            assert rows["both"]["digest"] == max(by_name["both"].digest, a.catalog.list()[0].digest)
            assert sorted(row["id"] for row in (await client.get("/v1/models")).json()["data"]) == sorted(
                rows
            )
            assert sorted((await client.get("/api/v1/models")).json()["models"]) == sorted(rows)
            assert (await client.get("/api/v1/models/m")).json()["name"] == "m"
            assert (await client.get("/v1/models/m")).json()["id"] == "m"
            shown = (await client.post("/api/show", json={"model": "m"})).json()
            near = msgspec.to_builtins(await b.catalog.show("m"))
            assert shown["modelfile"] == near["modelfile"]
            assert (await client.post("/api/show", json={"model": "none"})).status_code == 404
            nodes.write(state_keys.holdings(b.id), Holdings(node=b.id))
            rows = {row["name"] for row in (await client.get("/api/tags")).json()["models"]}
            assert rows == {"both", "own"}


async def test_changes_of_what_others_hold(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a")
        await nodes.add("b", ("m",))
        async with api(a) as client:
            answer = await client.request("DELETE", "/api/delete", json={"model": "m"})
            assert answer.status_code == 400
            assert answer.json() == {"error": "m lives in another engine of b-name; delete it there"}
            answer = await client.delete("/api/v1/models/m")
            assert "delete it there" in answer.json()["error"]["message"]
            answer = await client.request("DELETE", "/api/delete", json={"model": "none"})
            assert (answer.status_code, answer.json()) == (404, {"error": "model 'none' not found"})
            answer = await client.post("/api/copy", json={"source": "m", "destination": "x"})
            assert "cannot be copied" in answer.json()["error"]
            answer = await client.post("/api/copy", json={"source": "none", "destination": "x"})
            assert answer.json() == {"error": 'model "none" not found'}


async def test_a_model_that_is_made_here_is_served_here(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        data = scripted_model("an exact answer")
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        async with api(a) as client:
            assert (await client.post(f"/api/blobs/{digest}", content=data)).status_code == 201
            made = await client.post("/api/create", json={"model": "mine", "files": {"m.gguf": digest}})
            assert '"success"' in made.text
            assert {row["name"] for row in (await client.get("/api/tags")).json()["models"]} == {
                "m",
                "mine:latest",
            }
            assert a.router.plan("mine").order == (a.id,)
            assert (await client.request("DELETE", "/api/delete", json={"model": "mine"})).status_code == 200
            assert a.router.plan("m").order == (b.id,)


async def test_ps_shows_others_from_their_reports(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a", ("own",)), await nodes.add("b", ("m",))

        def report(node: HopNode) -> Any:
            load = load_of(node.serving.loaded(), boot="x", queued=0, memory_free_bytes=1, draining=False)
            return msgspec.structs.replace(load, age_s=0.5)

        async with api(a) as client:
            for model in ("own", "m"):
                await client.post("/api/generate", json={"model": model, "prompt": "x", "stream": False})
            assert [row["name"] for row in (await client.get("/api/ps")).json()["models"]] == ["own"]
            assert b.id in a.asked  # looking makes it listen
            a.loads[b.id] = report(b)
            rows = {row["name"]: row for row in (await client.get("/api/ps")).json()["models"]}
            assert "node" not in rows["own"]
            assert rows["m"]["node"] == "b-name"
            assert rows["m"]["size"] == b.serving.loaded()[0].memory_bytes > 0
            assert rows["m"]["context_length"] == b.serving.loaded()[0].context_tokens
            assert rows["m"]["engine"]["name"] == "echo"
            assert rows["m"]["expires_at"] != rows["own"]["expires_at"]
            metrics = (await client.get("/metrics")).text
            assert "models_loaded 1" in metrics  # each node counts its own
            assert (await client.get("/api/v1/health")).json()["models_loaded"] == 1
            a.loads[b.id] = msgspec.structs.replace(report(b), age_s=60.0)
            assert [row["name"] for row in (await client.get("/api/ps")).json()["models"]] == ["own"]


async def test_a_client_that_goes_away_frees_the_slot_on_the_other_node(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = (
            await nodes.add("a"),
            await nodes.add("b", ("m",), echo={"tokens_per_s": 20.0, "hash_tokens": 20_000}),
        )
        async with api(a) as client:
            async with client.stream("POST", "/api/generate", json={"model": "m", "prompt": "x"}) as answer:
                async for _ in answer.aiter_lines():
                    break
                assert b.serving._jobs
            await until(lambda: not b.serving._jobs, "the free slot")
