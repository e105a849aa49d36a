"""Why a request went where it went: headers, REST, and how the command line shows it."""

from __future__ import annotations

from pathlib import Path

import httpx
import msgspec
import pytest
from tests.failing_replicas import Replicas
from tests.gateway_bench import gateway
from typer.testing import CliRunner

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId
from ollama_distributed.base.routing import RouteDecision, RouteDecisions, RouteTimes
from ollama_distributed.cli import route_view
from ollama_distributed.cli.main import app as program
from ollama_distributed.cli.tables import Look
from ollama_distributed.client import route_calls
from ollama_distributed.serving.cluster import load_of
from ollama_distributed.testing.echo import EchoSettings

pytestmark = pytest.mark.anyio
SYSTEM = "You answer in one word. " * 200


class Nodes:
    """A gateway, and two nodes that hold the model in memory."""

    def __init__(self) -> None:
        self.replicas = Replicas(2, EchoSettings(answer="yes", prompt_cache=4), SystemClock(), seed=1)
        router = self.replicas.routers["g"]
        self.app = gateway(self.replicas.answers["g"], routing=router)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, client=("127.0.0.1", 1)), base_url="http://127.0.0.1"
        )

    async def warm(self) -> None:
        for replica in self.replicas.all.values():
            if replica.held:
                await replica.serving.preload("m")
            self.replicas.loads[replica.id] = load_of(
                replica.serving.loaded(), boot="b", queued=0, memory_free_bytes=0, draining=False
            )

    async def chat(self, text: str, request_id: str) -> httpx.Response:
        body = {"model": "m", "messages": self.messages(text)}
        headers = {"x-request-id": request_id}
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)

    def messages(self, text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]

    async def explain(self, **ask: object) -> httpx.Response:
        return await self.http.post("/api/v1/route/explain", json=ask)


@pytest.fixture
async def nodes() -> Nodes:
    made = Nodes()
    await made.warm()
    return made


async def test_an_answer_says_which_node_it_is_from_and_why(nodes: Nodes) -> None:
    first, second = await nodes.chat("one?", "r1"), await nodes.chat("two?", "r2")
    assert first.headers["x-ollama-route"] == "load"
    assert second.headers["x-ollama-route"] == "prefix"
    assert first.headers["x-ollama-node"] == second.headers["x-ollama-node"]
    usage = second.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0.9 * usage["prompt_tokens"]
    streamed = await nodes.http.post("/api/generate", json={"model": "m", "prompt": "x"})
    assert streamed.headers["x-ollama-route"] == "load"
    vectors = await nodes.http.post("/api/embed", json={"model": "m", "input": "x"})
    assert vectors.headers["x-ollama-route"] == "load"


async def test_explain_a_request_that_could_be_sent(nodes: Nodes) -> None:
    await nodes.chat("one?", "r1")
    found = msgspec.json.decode(
        (await nodes.explain(model="m", messages=nodes.messages("two?"))).content, type=RouteDecision
    )
    assert (found.reason, found.request_id, found.times) == ("prefix", "", None)
    best, other = found.candidates
    assert best.name == found.order[0]
    assert best.cached_tokens > 0 == other.cached_tokens
    for one in found.candidates:
        assert one.ttft_s == pytest.approx(one.hop_s + one.load_s + one.wait_s + one.read_s)
    text = route_view.decision_text(found, Look())
    assert "prefix: its cache holds the most of the prompt" in text
    assert "CACHED" in text
    # The same prompt in Ollama's words has the same beginning.
    same = (await nodes.explain(model="m", prompt="x", system=SYSTEM)).json()
    assert same["candidates"][0]["cached_tokens"] > 0


async def test_explain_a_recent_request_and_where_its_time_went(nodes: Nodes) -> None:
    answer = await nodes.chat("one?", "r1")
    found = msgspec.json.decode((await nodes.explain(request_id="r1")).content, type=RouteDecision)
    assert found.times is not None
    assert found.times.node == answer.headers["x-ollama-node"] == found.order[0]
    assert found.times.prompt_tokens == answer.json()["usage"]["prompt_tokens"]
    assert found.times.load_s + found.times.wait_s + found.times.prefill_s <= found.times.total_s
    assert "prefill" in route_view.decision_text(found, Look())
    assert (await nodes.explain(request_id="other")).status_code == 404


@pytest.mark.parametrize("ask", [{}, {"model": "m"}, {"model": "m", "prompt": "x", "messages": []}])
async def test_what_cannot_be_explained_is_refused(nodes: Nodes, ask: dict[str, object]) -> None:
    assert (await nodes.explain(**ask)).status_code == 400


async def test_two_teams_may_send_the_same_id(nodes: Nodes) -> None:
    """S-07: neither sees the other's choice, nor hides it."""
    for team, text in (("red", "one"), ("blue", "two words " * 20)):
        heard = nodes.replicas.ask(text=text, identity=Identity("user", KeyId(team), team))
        await heard.end()
    decisions = nodes.replicas.routers["g"].decisions
    for team, took_s in (("red", 1.0), ("blue", 2.0)):
        decisions.ended("r1", team, RouteTimes(node="g", total_s=took_s))
    red, blue = decisions.find("r1", "red"), decisions.find("r1", "blue")
    assert red is not None
    assert blue is not None
    assert red.times is not None
    assert red.times.total_s == 1.0
    assert red.prompt_tokens < blue.prompt_tokens
    assert decisions.find("r1", None) == blue, "the newest"
    assert decisions.find("r1", "green") is None


async def test_decisions_are_kept_and_replayed(nodes: Nodes, tmp_path: Path) -> None:
    for number in range(4):
        await nodes.chat(f"{number}?", f"r{number}")
    answer = await nodes.http.get("/api/v1/route/decisions", params={"limit": "3"})
    found = msgspec.json.decode(answer.content, type=RouteDecisions)
    assert [one.request_id for one in found.decisions] == ["r3", "r2", "r1"]
    assert "r3" in route_view.decisions_text(found, Look())
    assert (await nodes.http.get("/api/v1/route/decisions", params={"limit": "x"})).status_code == 400
    file = tmp_path / "decisions.jsonl"
    file.write_bytes(b"\n".join(msgspec.json.encode(one) for one in reversed(found.decisions)))
    run = CliRunner().invoke(program, ["--output", "json", "route", "replay", "--file", str(file)])
    assert run.exit_code == 0, run.output
    rows = {row["policy"]: row for row in msgspec.json.decode(run.stdout)}
    assert list(rows) == ["recorded", "prefix", "round-robin", "least-connections"]
    assert all(row["requests"] == 3 for row in rows.values())
    assert rows["prefix"]["read_tokens"] < rows["round-robin"]["read_tokens"]
    run = CliRunner().invoke(program, ["route", "replay", "--file", str(file), "--policy", "prefix"])
    assert "TOKENS READ" in run.stdout


async def test_the_sdk_asks_the_same(nodes: Nodes) -> None:
    await nodes.chat("one?", "r1")
    for call in (
        route_calls.explain("m", prompt="x", system=SYSTEM),
        route_calls.explain("m", messages=nodes.messages("two?")),
        route_calls.explain("m"),
        route_calls.explain(request_id="r1"),
        route_calls.decisions(1),
    ):
        answer = await nodes.http.request(call.method, call.path, content=call.body)
        assert answer.status_code == 200, answer.text
        assert isinstance(call.decode(answer.content), RouteDecision | RouteDecisions)


async def test_explain_a_model_that_nobody_has(nodes: Nodes) -> None:
    answer = await nodes.explain(model="nosuch", messages=nodes.messages("x"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
