"""Where models are, off some nodes, and what `/metrics` says of those on their way."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from tests.gateway_bench import gateway

from ollama_distributed.base.disk import EvictAnswer
from ollama_distributed.base.errors import Conflict, ModelNotFound
from ollama_distributed.base.pieces import PieceFigures
from ollama_distributed.base.transfers import TransferFigures
from ollama_distributed.client import calls
from ollama_distributed.client.calls import Call
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.service import ModelPlace, ModelStatus
from ollama_distributed.testing.inference import ScriptedInference


class Moves:
    def __init__(self) -> None:
        self.removed: list[tuple[str, list[str], bool]] = []

    async def get_status(self, name: str) -> ModelStatus:
        if name != "me/x:v1":
            raise ModelNotFound(f"model '{name}' not found on any node")
        place = ModelPlace(node="n1", name="one", status="online", digest="ab", size=7, current=False)
        return ModelStatus(
            model=name, nodes=(place,), transfers=(Transfer(id="n2.t", model=name, state="running"),)
        )

    def list(self) -> Sequence[ModelStatus]:
        return [ModelStatus(model="me/x:v1")]

    async def remove(
        self, name: str, nodes: Sequence[str] = (), *, last_copy: bool = False
    ) -> Sequence[EvictAnswer]:
        self.removed.append((name, list(nodes), last_copy))
        if "stays" in nodes:
            raise Conflict("it is the last copy")
        return [EvictAnswer(model=name, node=node, name=node, freed_bytes=5) for node in nodes]

    def figures(self) -> PieceFigures:
        return PieceFigures(sent_bytes=11, received_bytes=12, again=3, lies=1, received_per_s=1234.5)


class Transfers:
    def figures(self) -> TransferFigures:
        return TransferFigures(
            received_bytes=21, sent_bytes=22, running={"pull": 2}, ended={("copy", "failed"): 4}
        )


@pytest.fixture
async def moves() -> Moves:
    return Moves()


@pytest.fixture
async def http(moves: Moves) -> AsyncIterator[httpx.AsyncClient]:
    app = gateway(ScriptedInference([]), moves=moves, transfers=Transfers())
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client
    await app.close()


async def ask(http: httpx.AsyncClient, call: Call[Any]) -> Any:
    answer = await http.request(call.method, call.path, content=call.body)
    assert answer.status_code == 200, answer.text
    return call.decode(answer.content)


async def test_where_models_are(http: httpx.AsyncClient) -> None:
    status = await ask(http, calls.model_status("me/x:v1"))
    assert (status.nodes[0].name, status.nodes[0].current, status.transfers[0].id) == ("one", False, "n2.t")
    assert [one.model for one in (await ask(http, calls.list_copies())).models] == ["me/x:v1"]
    assert (await http.get("/api/v1/models/nothing/status")).status_code == 404


async def test_copies_are_removed_from_the_nodes_that_are_named(
    http: httpx.AsyncClient, moves: Moves
) -> None:
    gone = await ask(http, calls.remove_copies("me/x:v1", ["a", "b"], last_copy=True))
    assert [one.node for one in gone.removed] == ["a", "b"]
    answer = await http.delete("/api/v1/models/me/x:v1?nodes=a, b,&nodes=c")
    assert answer.json()["removed"][2]["freed_bytes"] == 5
    assert moves.removed == [("me/x:v1", ["a", "b"], True), ("me/x:v1", ["a", "b", "c"], False)]
    refused = await http.delete("/api/v1/models/me/x:v1?nodes=stays")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert (await http.delete("/api/v1/models/x?nodes=a&last_copy=perhaps")).status_code == 400


async def test_metrics_of_what_is_on_its_way(http: httpx.AsyncClient) -> None:
    text = (await http.get("/metrics")).text
    values = dict(
        re.findall(r"^ollama_distributed_((?:registry|pieces|transfer)\S*) (\S+)$", text, re.MULTILINE)
    )
    assert values["registry_received_bytes_total"] == "21"
    assert values["registry_sent_bytes_total"] == "22"
    assert values["pieces_again_total"] == "3"
    assert values['transfers_running{kind="pull"}'] == "2"
    assert values['transfers_running{kind="copy"}'] == "0"
    assert values['transfers_total{kind="copy",outcome="failed"}'] == "4"
    assert values['transfers_total{kind="pull",outcome="done"}'] == "0"
    assert values['transfer_bytes_per_second{kind="peer",direction="in"}'] == "1234"
