"""Nodes in one process over real mutual TLS: a request to one is answered by another."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.hop_nodes import HopNode, cluster, text_request, until
from tests.limits import SOON_S

from ollama_distributed.adapters import sockets
from ollama_distributed.adapters.peers import outlet, pool, wire
from ollama_distributed.adapters.peers.link import Link
from ollama_distributed.adapters.peers.rights import ROWS
from ollama_distributed.base.errors import (
    BodyTooLarge,
    Conflict,
    ContextExceeded,
    Forbidden,
    Internal,
    Malformed,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    OllamaDistributedError,
    QueueFull,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    EmbedRequest,
    Event,
    Failed,
    Finished,
    Generation,
    InferenceRequest,
    JsonObject,
    Message,
    Queued,
    RerankRequest,
    Sampling,
    Tool,
)
from ollama_distributed.base.tokens import EngineFailed, SourceEvent, SourceSink, Tokens
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.streams import failover

pytestmark = pytest.mark.integration


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who lost the only node that holds its model does not wait for it."""
    monkeypatch.setattr(failover, "PATIENCE_S", 0.0)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The loop that nodes run on; the suite of sources runs on Python's own."""
    return "asyncio", {"use_uvloop": True}


NAME = "registry.ollama.ai/library/m:latest"
LONG = {"hash_tokens": 2_000_000}
SLOW = {"tokens_per_s": 20.0, "hash_tokens": 20_000}
"""Not over by itself while a test waits."""


class Heard:
    """An answer as the gateway of `node` hears it."""

    def __init__(self, node: HopNode, request: InferenceRequest) -> None:
        self.events: list[Event] = []
        self.generation = node.answers.open(request, self.events.append)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def ended(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)

    async def end(self) -> Event:
        await until(lambda: self.ended, "the end")
        return self.events[-1]

    async def error(self) -> OllamaDistributedError:
        end = await self.end()
        assert isinstance(end, Failed), end
        return end.error

    async def whole(self) -> str:
        end = await self.end()
        assert isinstance(end, Finished), end
        return self.text


def embed(model: str, *inputs: str, **fields: Any) -> EmbedRequest:
    return EmbedRequest(
        request_id=RequestId("r1"), identity=Identity("local"), model=model, inputs=inputs, **fields
    )


def busy(node: HopNode) -> int:
    return sum(one.slots_busy for one in node.serving.loaded())


# ── answers ─────────────────────────────────────────────────────────────────────────


async def test_a_model_of_another_node_answers_as_if_it_were_here(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        for name in ("m", "M:LATEST", "library/m", NAME):
            far, near = (
                Heard(a, text_request(name, "hello there")),
                Heard(b, text_request(name, "hello there")),
            )
            assert await far.whole() == await near.whole() != ""
            assert [type(event) for event in far.events] == [type(event) for event in near.events]
            assert [event.node for heard in (far, near) for event in heard.events[:1]] == ["b-name", ""]  # type: ignore[union-attr]
        assert a.engine.loads == 0


async def test_a_request_says_for_whom_it_is_and_proves_it(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        asked = text_request("m")
        assert await Heard(a, asked).whole()
        assert b.believed == [asked.identity]
        signed, a.pool._say = a.pool._say, None
        assert isinstance(await Heard(a, asked).error(), Forbidden)
        a.pool._say = b.pool._say  # what another node says
        assert isinstance(await Heard(a, asked).error(), Forbidden)
        a.pool._say = signed
        assert await Heard(a, asked).whole()


async def test_chat_tools_thinking_and_images_survive(tmp_path: Path) -> None:
    image = bytes(range(256)) * 1000
    seen: list[InferenceRequest] = []
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        start = b.serving.start

        def watched(request: InferenceRequest, sink: SourceSink, ids: tuple[int, ...] = ()) -> Generation:
            seen.append(request)
            return start(request, sink, ids)

        b.serving.start = watched  # type: ignore[method-assign]
        asked = text_request("m")
        asked = msgspec.structs.replace(
            asked,
            prompt=ChatPrompt(
                messages=(Message(role="user", content='call weather {"city": "Rome"}'),),
                tools=(Tool(name="weather", parameters={"type": "object"}),),
            ),
            sampling=Sampling(seed=7, stop=("never",)),
        )
        heard = Heard(a, asked)
        end = await heard.end()
        assert isinstance(end, Finished)
        assert end.reason == "tool_calls"
        assert any(event.tool_calls for event in heard.events if isinstance(event, Delta))
        pictured = msgspec.structs.replace(
            asked, prompt=ChatPrompt(messages=(Message(role="user", content="x", images=(image,)),))
        )
        assert isinstance(await Heard(a, pictured).error(), Unsupported)
        assert seen == [asked, pictured]


async def test_vectors_scores_and_counts_are_the_same(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a")
        b = await nodes.add("b", ("m",), echo={"dimensions": 3000})
        many = embed("m", *(f"text {i}" for i in range(40)))  # several frames of rows
        assert (await a.router.embed(many)).vectors == (await b.router.embed(many)).vectors
        assert (await a.router.embed(embed("m"))).vectors == ()
        assert [(await node.router.embed(many)).node for node in (a, b)] == ["b-name", ""]
        ranked = RerankRequest(
            request_id=RequestId("r"),
            identity=Identity("local"),
            model="m",
            query="a b",
            documents=("a", "c"),
        )
        assert (await a.router.rerank(ranked)).scores == (await b.router.rerank(ranked)).scores
        counted = text_request("m", "one two three")
        assert await a.router.count_tokens(counted) == await b.router.count_tokens(counted) > 0


async def test_a_body_of_many_megabytes_arrives(tmp_path: Path) -> None:
    seen: list[InferenceRequest] = []
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))

        def start(request: InferenceRequest, sink: SourceSink, _ids: tuple[int, ...] = ()) -> Generation:
            seen.append(request)
            raise Conflict("seen")

        b.serving.start = start  # type: ignore[method-assign]
        asked = text_request("m", "x" * 40_000_000)
        assert isinstance(await Heard(a, asked).error(), Conflict)
        assert seen == [asked]
        too_large = text_request("m", "x" * (wire.MAX_BODY_BYTES + 1))
        assert isinstance(await Heard(a, too_large).error(), BodyTooLarge)


async def test_many_at_once_each_get_their_own(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a")
        await nodes.add("b", ("m",))
        answers = [Heard(a, text_request("m", f"number {i} of many")) for i in range(40)]
        for i, heard in enumerate(answers):
            assert f"number {i} of many" in await heard.whole()


# ── errors ──────────────────────────────────────────────────────────────────────────


async def test_errors_keep_their_class_and_fields(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a")
        await nodes.add("b", ("m",))
        small = text_request("m", "word " * 5000, truncate=False)
        error = await Heard(a, small).error()
        assert type(error) is ContextExceeded
        assert error.prompt_tokens > error.context_tokens > 0
        with pytest.raises(ContextExceeded):
            await a.router.embed(embed("m", "word " * 5000, truncate=False))
        assert isinstance(await Heard(a, text_request("nobody")).error(), ModelNotFound)
        assert (await Heard(a, text_request("nobody")).error()).message == "model 'nobody' not found"


async def test_a_defect_over_there_is_internal_and_says_where_to_look(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))

        def broken(*_: Any) -> Generation:
            raise RuntimeError("secret")

        b.serving.start = broken  # type: ignore[method-assign]
        error = await Heard(a, text_request("m")).error()
        assert isinstance(error, Internal)
        assert "secret" not in error.message
        assert "node b" in error.message


# ── cancel, backpressure, bounds ────────────────────────────────────────────────────


@pytest.mark.parametrize("echo", [{"load_s": 600.0}, SLOW], ids=["while it loads", "while it speaks"])
async def test_cancel_frees_the_slot(tmp_path: Path, echo: dict[str, Any]) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=echo)
        heard = Heard(a, text_request("m"))
        await until(lambda: b.serving._jobs, "the job over there")
        if "load_s" not in echo:
            await until(lambda: heard.text, "a word")
        heard.generation.cancel()
        await until(lambda: not b.serving._jobs, "the end of the job")
        assert busy(b) == 0
        assert not heard.ended


async def test_a_caller_that_is_gone_when_its_request_is_read(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=SLOW)
        started: list[Any] = []
        start = b.serving.start

        def watched(*args: Any) -> Generation:
            started.append(args)
            return start(*args)

        b.serving.start = watched  # type: ignore[method-assign]
        for delay in range(12):  # turns of the loop between the request and its caller's end
            generation = a.pool.start(b.id, text_request("m"), lambda event: None)
            await until(lambda: started or a.pool._roads[b.id].links, "a connection")
            for _ in range(delay):
                await asyncio.sleep(0)
            generation.cancel()
            await until(lambda: not (b.door._outlets or b.serving._jobs), "nothing runs")
        assert started


async def test_a_cancelled_question_ends_over_there(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo={"load_s": 600.0})
        task = asyncio.create_task(a.router.embed(embed("m", "x")))
        await until(lambda: b.serving.waiting, "the question over there")
        task.cancel()
        await until(lambda: not b.serving.waiting, "its end")
        assert task.cancelled()


async def test_who_waits_over_there_is_told_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=SLOW)
        request = text_request("m", sampling=Sampling(num_predict=20_000))
        running = []
        while not (running and b.serving.saturated):
            running.append(Heard(a, request))
            await until(lambda: busy(b) == len(running), "a slot")
        waits = Heard(a, text_request("m", sampling=Sampling(num_predict=1)))
        await until(lambda: waits.events, "its place")
        assert waits.events == [Queued(position=1, node="b-name")]

        old = wire.GenerateAsk(request=text_request("m", sampling=Sampling(num_predict=1)))
        monkeypatch.setattr(wire, "GenerateAsk", lambda **_: old)  # a caller of an older version
        unaware = Heard(a, text_request("m", sampling=Sampling(num_predict=1)))
        await until(lambda: b.serving.waiting == 2, "both wait")
        running.pop().generation.cancel()
        for heard in (waits, unaware):
            assert isinstance(await heard.end(), Finished)
        assert not any(isinstance(event, Queued) for event in unaware.events)
        for one in running:
            one.generation.cancel()


async def test_a_paused_reader_stops_the_engine_and_nothing_is_lost(tmp_path: Path) -> None:
    tokens = 30_000
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo={"hash_tokens": tokens})
        request = text_request(
            "m", sampling=Sampling(num_predict=tokens), logprobs=True, top_logprobs=20
        )  # some 1.5 KB a token: more than the sockets hold
        heard = Heard(a, request)
        await until(lambda: len(heard.events) > 10, "words")
        heard.generation.pause()
        (job,) = b.serving._jobs
        await until(lambda: job._paused, "the pause over there")
        before = len(heard.events)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(heard.events) == before
        heard.generation.resume()
        await until(lambda: heard.ended, "the end")
        end = heard.events[-1]
        assert isinstance(end, Finished), end
        assert end.usage.completion_tokens == tokens
        assert len(a.pool._roads[b.id].free) == 1  # and the connection is good for the next


async def test_a_peer_that_reads_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "READER_DEADLINE_S", 0.5)
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=LONG)
        _reader, writer = await asyncio.open_connection(
            "127.0.0.1", b.address.port, ssl=a.tls.client(), limit=1024
        )
        ask = wire.GenerateAsk(request=text_request("m", sampling=Sampling(num_predict=2_000_000)))
        assert a.pool._say is not None
        writer.write(pool.message(wire.GENERATE, ask, a.pool._say(ask.request.identity)))
        await until(lambda: b.serving._jobs, "the job")
        (running,) = b.door._outlets
        most = 0

        def given_up() -> bool:
            nonlocal most
            most = max(most, len(running._events))
            return not b.serving._jobs

        await until(given_up, "its end")
        assert most <= 4 * outlet.MOST_WAITING
        await until(lambda: not b.door._outlets, "the end of the call")
        writer.transport.abort()
        with contextlib.suppress(OSError):  # uvloop never ends a loop that is closed before the connection
            await writer.wait_closed()


async def test_the_kernel_is_more_patient_with_a_slow_reader_than_we_are(tmp_path: Path) -> None:
    """A shut window counts as silence to TCP_USER_TIMEOUT: it would cut an answer whose client
    only pauses."""
    assert sockets.SERVER_UNHEARD_S > outlet.READER_DEADLINE_S
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=SLOW)
        heard = Heard(a, text_request("m"))
        await until(lambda: heard.text, "a word")
        (link,) = a.pool._roads[b.id].links
        assert link.transport is not None
        calling = link.transport.get_extra_info("socket")
        unheard_ms = calling.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert unheard_ms == sockets.CALLER_UNHEARD_S * 1000
        heard.generation.cancel()


@pytest.mark.parametrize("stands_still_s", [0.0, 2.0])
async def test_a_node_that_only_loads_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stands_still_s: float
) -> None:
    """Nor by one that stood still itself, and heard nobody meanwhile."""
    monkeypatch.setattr(wire, "PING_S", 0.1)
    monkeypatch.setattr(wire, "SILENT_S", 1.6)
    monkeypatch.setattr("ollama_distributed.adapters.peers.door.TICK_S", 0.05)
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a")
        await nodes.add("b", ("m",), echo={"load_s": 3.0})
        asyncio.get_running_loop().call_later(1.0, time.sleep, stands_still_s)
        heard = Heard(a, text_request("m"))
        embedded = await a.router.embed(embed("m", "x"))
        assert len(embedded.vectors) == 1
        assert await heard.whole()


# ── connections ─────────────────────────────────────────────────────────────────────


async def test_connections_are_kept_and_used_again(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        for _ in range(10):
            await Heard(a, text_request("m")).whole()
            await a.router.embed(embed("m", "x"))
        (link,) = a.pool._roads[b.id].links
        assert link.calls == 20


class Opened:
    """Counts the connections that a pool opens."""

    def __init__(self, of: pool.PeerPool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.all = 0
        self._open = of._connect
        monkeypatch.setattr(of, "_connect", self._counted)

    async def _counted(self, node: NodeId, address: str) -> Link:
        self.now, self.all = self.now + 1, self.all + 1
        self.most = max(self.most, self.now)
        try:
            return await self._open(node, address)
        finally:
            self.now -= 1


async def test_few_connections_are_opened_at_a_time_and_one_that_is_free_is_taken_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path) as nodes:
        a, _ = await nodes.add("a"), await nodes.add("b", ("m",))
        opened = Opened(a.pool, monkeypatch)
        for heard in [Heard(a, text_request("m", "hello")) for _ in range(100)]:
            assert await heard.whole()
        assert opened.most <= pool.MAX_OPENING
        assert opened.all < 100


async def test_who_waits_for_a_connection_to_a_node_that_is_away_hears_it_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, connect_s=1.0) as nodes, Listening(hang) as hanging:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        a.addresses[b.id] = (hanging,)
        opened = Opened(a.pool, monkeypatch)
        for heard in [Heard(a, text_request("m")) for _ in range(5 * pool.MAX_OPENING)]:
            assert isinstance(await heard.error(), Unavailable)
        assert opened.all == pool.MAX_OPENING


async def test_a_connection_that_went_stale_costs_the_client_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        await Heard(a, text_request("m")).whole()
        (link,) = a.pool._roads[b.id].links

        class Dead:
            """The other side closed it; the news of it is still under way."""

            def write(self, data: bytes) -> None:
                asyncio.get_running_loop().call_soon(link.connection_lost, ConnectionResetError())

            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

        transport = link._transport
        link._transport = Dead()  # type: ignore[assignment]
        assert await Heard(a, text_request("m")).whole()
        assert link not in a.pool._roads[b.id].links


async def test_old_and_idle_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        await Heard(a, text_request("m")).whole()
        (first,) = a.pool._roads[b.id].links
        monkeypatch.setattr(pool, "AGE_S", -1.0)
        await Heard(a, text_request("m")).whole()
        assert first not in a.pool._roads[b.id].links
        monkeypatch.setattr(pool, "IDLE_S", 0.0)
        await until(lambda: not a.pool._roads, "the end of what is idle")


async def test_another_node_at_the_address_is_not_spoken_to(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b, c = await nodes.add("a"), await nodes.add("b", ("m",)), await nodes.add("c")
        a.addresses[b.id] = (c.hop,)
        error = await Heard(a, text_request("m")).error()
        assert isinstance(error, Unavailable)
        assert "node c answered" in error.message
        a.addresses[b.id] = (c.hop, "127.0.0.1:1", b.hop)  # the next address is tried
        assert await Heard(a, text_request("m")).whole()


@pytest.mark.usefixtures("impatient")
async def test_a_node_that_was_removed_is_refused_and_its_work_ended(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=SLOW)
        heard = Heard(a, text_request("m"))
        await until(lambda: heard.text, "a word")
        b.door.drop(a.id)
        assert isinstance(await heard.error(), Unavailable)
        assert not b.serving._jobs
        a.pool.drop(b.id, "removed")
        assert b.id not in a.pool._roads

        def refuse(peer: Peer) -> None:
            raise Forbidden(f"node {peer.node} was removed from the cluster")

        b.listener._check_peer = refuse
        error = await Heard(a, text_request("m")).error()
        assert isinstance(error, Unavailable)  # not the client's fault
        assert "was removed" in error.message


@pytest.mark.usefixtures("impatient")
async def test_closing_ends_what_runs_on_both_sides(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=SLOW)
        one, two = Heard(a, text_request("m")), Heard(a, text_request("m"))
        await until(lambda: one.text and two.text, "words")
        await b.door.close()
        assert "node b is shutting down" in (await one.error()).message
        assert isinstance(await Heard(a, text_request("m")).error(), Unavailable)
        await a.pool.close()
        assert two.ended
        assert isinstance(await Heard(a, text_request("m")).error(), Unavailable)


async def test_a_node_that_stops_lets_answers_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a")
        b = await nodes.add("b", ("m",), echo={"tokens_per_s": 50.0, "hash_tokens": 40})
        heard = Heard(a, text_request("m"))
        await until(lambda: heard.text, "a word")
        closing = asyncio.create_task(b.door.close(drain_s=30.0))
        await until(lambda: b.door._closed, "the beginning of the end")
        assert "shutting down" in (await Heard(a, text_request("m")).error()).message
        assert isinstance(await heard.end(), Finished)
        async with asyncio.timeout(SOON_S):
            await closing


# ── which node ──────────────────────────────────────────────────────────────────────


class Listening:
    """A port that takes connections and does `then` with them."""

    def __init__(self, then: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> None:
        self._then = then

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._then, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def test_a_node_that_is_away_is_passed_over_in_silence(tmp_path: Path) -> None:
    async with cluster(tmp_path, connect_s=1.0) as nodes, Listening(hang) as hanging:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        await nodes.add("c", ("m",))
        for away in ("127.0.0.1:1", hanging, "nonsense"):
            a.addresses[b.id] = (away,)
            for _ in range(4):  # whichever the dice choose first
                heard = Heard(a, text_request("m"))
                assert await heard.whole()
            a.pool.drop(b.id, "test")


@pytest.mark.usefixtures("impatient")
async def test_the_only_node_that_dies_in_the_middle_fails_the_answer(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=SLOW)
        heard = Heard(a, text_request("m"))
        await until(lambda: heard.text, "a word")
        for link in list(a.pool._roads[b.id].links):
            assert link.transport is not None
            link.transport.abort()
        error = await heard.error()
        assert isinstance(error, Unavailable)
        assert "node b" in error.message
        await until(lambda: not b.serving._jobs, "the end over there")


async def test_an_answer_goes_on_at_another_node_and_is_taken_up_at_a_third(tmp_path: Path) -> None:
    echo = {"answer": "Gr\u00fc\u00dfe \U0001f600 und mehr " * 40, "tokens_per_s": 200.0}
    async with cluster(tmp_path) as nodes:
        a, b, c = await nodes.add("a"), await nodes.add("b", ("m",), echo=echo), await nodes.add("c")
        heard = Heard(a, text_request("m"))
        await until(lambda: heard.text, "a word")
        d = await nodes.add("d", ("m",), echo=echo)
        for link in list(a.pool._roads[b.id].links):
            assert link.transport is not None
            link.transport.abort()
        await until(lambda: d.serving._jobs, "another node")
        before = len(heard.text)
        await until(lambda: len(heard.text) > before + 10, "more words")
        await a.pool.close()  # the gateway dies
        has = heard.text
        rest = Heard(c, text_request("m", resume_at=len(has.encode())))
        assert has + await rest.whole() == echo["answer"]
        assert isinstance(await Heard(c, text_request("m", "else", resume_at=0)).error(), NotFound)


async def test_a_node_that_falls_silent_before_a_word_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "PING_S", 600.0)
    monkeypatch.setattr(wire, "SILENT_S", 1.0)
    async with cluster(tmp_path) as nodes:
        a, b, c = await nodes.add("a"), await nodes.add("b", ("m",)), await nodes.add("c", ("m",))
        silent: list[SourceSink] = []

        class Stopped:
            def cancel(self) -> None: ...

            pause = resume = cancel

        def mute(_request: InferenceRequest, sink: SourceSink, _ids: tuple[int, ...] = ()) -> Generation:
            silent.append(sink)
            return Stopped()

        b.serving.start = mute  # type: ignore[method-assign]
        nodes.status(c, "suspect")  # so that b is asked first
        assert await Heard(a, text_request("m")).whole()
        assert len(silent) == 1


async def test_refusals_of_one_node_lead_to_another_and_questions_too(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b, c = await nodes.add("a"), await nodes.add("b", ("m",)), await nodes.add("c", ("m",))
        nodes.status(c, "suspect")

        async def full(_request: EmbedRequest) -> Any:
            raise QueueFull("full", retry_after_s=3.0)

        b.serving.embed = full  # type: ignore[method-assign]
        assert len((await a.router.embed(embed("m", "x"))).vectors) == 1
        c.serving.embed = full  # type: ignore[method-assign]
        with pytest.raises(QueueFull) as refused:
            await a.router.embed(embed("m", "x"))
        assert refused.value.retry_after_s == 3.0


async def test_a_full_node_sends_its_own_clients_elsewhere(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a", ("m",), echo={"crash_on_load": True})
        b = await nodes.add("b", ("m",))
        assert await Heard(a, text_request("m")).whole()
        assert (a.engine.loads, b.engine.loads) == (1, 1)


async def test_a_draining_node_takes_no_work_and_sends_its_own_away(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a", ("m",)), await nodes.add("b", ("m",))
        nodes.drain(a)
        assert await Heard(a, text_request("m")).whole()
        assert (a.engine.loads, b.engine.loads) == (0, 1)
        nodes.drain(a, drain=False)
        nodes.drain(b)
        assert a.router.plan("m").order == (a.id, b.id)
        with pytest.raises(Unavailable, match="draining"):
            await a.pool.embed(b.id, embed("m", "x"))
        heard: list[SourceEvent] = []
        a.pool.start(b.id, text_request("m"), heard.append)
        await until(lambda: heard, "the refusal")
        assert isinstance(heard[0], EngineFailed)
        assert heard[0].error.retryable
        assert (await a.pool.show(b.id, "m")).spec.display == "m"  # it is no work


async def test_a_draining_node_hands_on_what_can_go_on_elsewhere(tmp_path: Path) -> None:
    echo = {"answer": "here and there " * 40, "tokens_per_s": 200.0}
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",), echo=echo)
        heard, bound = Heard(a, text_request("m")), Heard(a, text_request("m", format=JsonObject()))
        await until(lambda: heard.text and bound.text, "words")
        nodes.drain(b)
        assert b.door.move(lambda _: False) == 0, "nobody else has it"
        c = await nodes.add("c", ("m",), echo=echo)
        assert b.door.move(lambda model: model == "m") == 1, "a grammar cannot go"
        assert await heard.whole() == echo["answer"]
        await bound.whole()
        assert (b.engine.loads, c.engine.loads) == (1, 1)


async def test_a_node_that_all_others_call_offline_is_still_tried(tmp_path: Path) -> None:
    """Static stability: the state is the last that is known, and may be old."""
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        nodes.status(b, "offline")
        assert await Heard(a, text_request("m")).whole()


async def test_holdings_that_are_old_end_in_the_usual_words(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        b.catalog._remotes.specs = {}
        error = await Heard(a, text_request("m")).error()
        assert (type(error), error.message) == (ModelNotFound, "model 'm' not found")


async def test_load_reports_are_asked_for_and_decide(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b, c = await nodes.add("a"), await nodes.add("b", ("m",)), await nodes.add("c", ("m",))

        def load(taken: int) -> Load:
            return Load(models=(ModelLoad(name=NAME, slots=2, busy=taken),), age_s=0.1)

        a.loads = {b.id: load(2), c.id: load(0)}
        assert {a.router.plan("m").order[0] for _ in range(20)} == {c.id}
        a.loads = {b.id: load(0), c.id: load(2)}
        assert {a.router.plan("m").order[0] for _ in range(20)} == {b.id}
        a.loads = {b.id: msgspec.structs.replace(load(0), age_s=99.0), c.id: load(2)}
        assert len({a.router.plan("m").order[0] for _ in range(20)}) == 1  # too old: as if it said nothing
        assert set(a.asked) == {b.id, c.id}


async def test_stop_takes_a_model_out_of_every_memory(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b, c = await nodes.add("a"), await nodes.add("b", ("m",)), await nodes.add("c", ("m",))
        for node in (b, c):
            assert await Heard(node, text_request("m")).whole()
            a.loads[node.id] = Load(models=(ModelLoad(name=NAME, slots=1),), age_s=0.1)
        heard = Heard(a, text_request("m", "", load_only=True, keep_alive_s=0))
        end = await heard.end()
        assert isinstance(end, Finished)
        assert end.reason == "unload"
        await until(lambda: not (b.serving.loaded() or c.serving.loaded()), "empty memories")


# ── the door ────────────────────────────────────────────────────────────────────────


class Knock(msgspec.Struct, frozen=True):
    text: str


async def test_routes_can_be_added_and_kept_for_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROWS, "test/knock", "servers")  # type: ignore[arg-type]  # read-only but here
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b")  # a is a server, b is not

        async def knock(peer: Peer, body: Knock) -> Knock:
            if body.text == "conflict":
                raise Conflict("stands elsewhere", revision=9)
            return Knock(f"{peer.node} said {body.text}")

        for node in (a, b):
            node.door.add("test/knock", knock, Knock)
        assert await a.pool.ask(b.id, "test/knock", Knock("hi"), Knock, deadline_s=5) == Knock("a said hi")
        with pytest.raises(Forbidden, match="server"):
            await b.pool.ask(a.id, "test/knock", Knock("hi"), Knock, deadline_s=5)
        with pytest.raises(Conflict) as moved:
            await a.pool.ask(b.id, "test/knock", Knock("conflict"), Knock, deadline_s=5)
        assert moved.value.revision == 9
        with pytest.raises(Unavailable, match="versions"):
            await a.pool.ask(b.id, "test/knock", Knock("hi"), int, deadline_s=5)
        with pytest.raises(NotFound, match="older version"):
            await a.pool.ask(b.id, "test/none", Knock("hi"), Knock, deadline_s=5)
        with pytest.raises(Malformed):
            await a.pool.ask(b.id, wire.SHOW, Knock("hi"), Knock, deadline_s=5)
        with pytest.raises(ValueError, match="two handlers"):
            a.door.add(wire.SHOW, knock, Knock)
        with pytest.raises(LookupError, match="no row"):
            a.door.add("test/new", knock, Knock)


async def raw(node: HopNode, context: ssl.SSLContext, request: bytes) -> bytes:
    async with asyncio.timeout(SOON_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", node.address.port, ssl=context)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return await reader.readexactly(size)
        finally:
            writer.transport.abort()


@pytest.mark.parametrize(
    ("request_head", "error"),
    [
        (b"GET /cluster/v1/generate HTTP/1.1\r\nhost: x\r\n\r\n", MethodNotAllowed),
        (b"POST /cluster/v1/generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", Malformed),
        (b"POST /cluster/v1/embed HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n", BodyTooLarge),
        (b"POST /cluster/v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n\xc1", Malformed),
        (b"POST /cluster/v1/generate HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n", Malformed),
    ],
)
async def test_what_no_node_would_send_is_refused(
    tmp_path: Path, request_head: bytes, error: type[OllamaDistributedError]
) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        body = await raw(b, a.tls.client(), request_head)
        with pytest.raises(error):
            wire.decode_events(body[4:])


async def test_tokens_of_one_turn_leave_in_one_frame(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))

        class Burst:
            def cancel(self) -> None: ...

            pause = resume = cancel

        def start(_request: InferenceRequest, sink: SourceSink, _ids: tuple[int, ...] = ()) -> Generation:
            for i in range(10):
                asyncio.get_running_loop().call_soon(sink, Tokens((i,), f"{i}"))
            asyncio.get_running_loop().call_soon(sink, EngineFailed(Conflict("the end")))
            return Burst()

        b.serving.start = start  # type: ignore[method-assign]
        heard: list[SourceEvent] = []
        frames: list[bytes] = []

        class Counted(wire.Frames):
            __slots__ = ()

            def feed(self, data: bytes) -> list[bytes]:
                found = super().feed(data)
                frames.extend(found)
                return found

        generation = a.pool.start(b.id, text_request("m"), heard.append)
        generation._frames = Counted()
        await until(lambda: heard and isinstance(heard[-1], EngineFailed), "the end")
        assert len(heard) == 11
        assert len(frames) <= 2
