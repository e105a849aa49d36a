"""One suite over both ways to the hot path: plain ASGI, and the fast protocol.

Real sockets, raw bytes: what a client sees must not depend on the adapter.
"""

import asyncio
import gc
import json

import pytest
from tests.gateway_bench import HELLO, gateway, request_bytes, serving, talking, until
from tests.limits import SOON_S

from ollama_distributed.base import errors as e
from ollama_distributed.base.inference import Delta, EmbedResult, Failed, Finished
from ollama_distributed.gateway.core import Exchange
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

GEN = {"model": "m", "prompt": "p"}


@pytest.fixture(params=["asgi", "fast"])
def adapter(request):
    return request.param


async def test_whole_answer_and_keep_alive(adapter):
    async with talking(ScriptedInference(HELLO), adapter) as client:
        for number in range(3):
            await client.post("/api/generate", {**GEN, "stream": False}, f"X-Request-Id: r-{number}")
            answer = await client.answer()
            assert answer.status == 200
            assert answer.json()["response"] == "Hello"
            assert answer.headers["x-request-id"] == f"r-{number}"
            assert "date" in answer.headers


async def test_an_answered_request_is_freed_at_once(adapter):
    """Its prompt may be 64 MiB: it must not wait for the garbage collector."""
    inference = ScriptedInference(HELLO)
    async with talking(inference, adapter) as client:
        gc.collect()
        gc.disable()
        try:
            for stream in (False, True):
                await client.post("/api/generate", {**GEN, "stream": stream})
                assert (await client.answer()).status == 200
                inference.generations.clear()
                await until(
                    lambda: not any(type(one) is Exchange for one in gc.get_objects()), "nothing holds it"
                )
        finally:
            gc.enable()


async def test_a_stream_arrives_piece_by_piece(adapter):
    inference = ScriptedInference(hold=True)
    async with serving(gateway(inference), adapter=adapter) as server, await server.connect() as client:
        await client.post("/api/generate", GEN)
        await until(lambda: bool(inference.generations), "the request opens")
        inference.generations[0].emit(Delta(text="a"))
        status, headers = await client.head()
        assert status == 200
        assert headers["content-type"] == "application/x-ndjson"
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
        assert json.loads(await client.chunk())["response"] == "a"
        inference.generations[0].emit(Delta(text="b"))
        assert json.loads(await client.chunk())["response"] == "b"
        inference.generations[0].emit(Finished(reason="stop"))
        assert json.loads(await client.chunk())["done"] is True
        assert await client.chunk() == b""
        await client.post("/api/generate", {**GEN, "stream": False})
        await until(lambda: len(inference.generations) == 2, "the connection goes on")


async def test_pieces_of_one_turn_are_chunks_of_their_own(adapter):
    """As with Ollama: there are clients that take a chunk for a line."""
    inference = ScriptedInference(hold=True)
    async with serving(gateway(inference), adapter=adapter) as server, await server.connect() as client:
        await client.post("/api/generate", GEN)
        await until(lambda: bool(inference.generations), "the request opens")
        generation = inference.generations[0]
        for burst in ("ab", "cde"):
            generation.emit(*(Delta(text=letter) for letter in burst))
            if burst == "ab":
                await client.head()
            for letter in burst:
                assert json.loads(await client.chunk())["response"] == letter
        generation.emit(Delta(text="f"), Finished(reason="stop"))
        assert json.loads(await client.chunk())["response"] == "f"
        assert json.loads(await client.chunk())["done"]
        assert await client.chunk() == b""


async def test_a_client_that_goes_away_in_the_turn_of_a_piece(adapter):
    inference = ScriptedInference(hold=True)
    async with serving(gateway(inference), adapter=adapter) as server:
        async with await server.connect() as client:
            await client.post("/api/generate", GEN)
            await until(lambda: bool(inference.generations), "the request opens")
            generation = inference.generations[0]
            client.writer.transport.abort()
            async with asyncio.timeout(SOON_S):
                while not generation.cancelled:
                    generation.emit(Delta(text="a"))
                    await asyncio.sleep(0)
        await until(lambda: not len(server.watch), "the connection is gone")


async def test_error_before_and_after_the_first_byte(adapter):
    missing = ScriptedInference([Failed(e.ModelNotFound("model 'm' not found"))])
    async with serving(gateway(missing), adapter=adapter) as server, await server.connect() as client:
        await client.post("/api/generate", GEN)
        answer = await client.answer()
        assert (answer.status, answer.json()) == (404, {"error": "model 'm' not found"})
    died = ScriptedInference([Delta(text="a"), Failed(e.RunnerDied("gone"))])
    async with serving(gateway(died), adapter=adapter) as server, await server.connect() as client:
        await client.post("/api/generate", GEN)
        answer = await client.answer()
        assert answer.status == 200
        assert json.loads(answer.body.splitlines()[-1]) == {"error": "gone"}


async def test_a_client_that_goes_away_frees_its_slot(adapter):
    inference = ScriptedInference(hold=True)
    async with serving(gateway(inference), adapter=adapter) as server:
        async with await server.connect() as client:
            await client.post("/api/generate", GEN)
            await until(lambda: bool(inference.generations), "the request opens")
            inference.generations[0].emit(Delta(text="a"))
            await client.head()
        await until(lambda: inference.generations[0].cancelled > 0, "the generation is cancelled")
        inference.generations[0].emit(Delta(text="late"))


async def test_a_client_that_goes_away_before_the_first_byte(adapter):
    inference = ScriptedInference(hold=True)
    async with serving(gateway(inference), adapter=adapter) as server:
        async with await server.connect() as client:
            await client.post(
                "/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "p"}]}
            )
            await until(lambda: bool(inference.generations), "the request opens")
        await until(lambda: inference.generations[0].cancelled > 0, "the generation is cancelled")


async def test_a_slow_reader_pauses_its_generation(adapter):
    inference = ScriptedInference(hold=True)
    limits = Limits(stream_buffer_bytes=64 * 1024)
    app = gateway(inference, limits=limits)
    async with serving(app, adapter=adapter, limits=limits) as server, await server.connect() as client:
        await client.post("/api/generate", GEN)
        await until(lambda: bool(inference.generations), "the request opens")
        generation = inference.generations[0]
        sent = 0
        async with asyncio.timeout(SOON_S):
            while not generation.paused:
                generation.emit(Delta(text="x" * 65_536))
                sent += 65_536
                assert sent < 64 * 1024 * 1024
                await asyncio.sleep(0)
        got = 0
        await client.head()
        while generation.paused:
            got += len(await client.chunk())
        generation.emit(Finished(reason="stop"))
        while piece := await client.chunk():
            got += len(piece)
        assert got > sent


async def test_questions_with_one_answer(adapter):
    inference = ScriptedInference(embedded=EmbedResult(vectors=((1.0,),)))
    async with serving(gateway(inference), adapter=adapter) as server, await server.connect() as client:
        await client.post("/api/embed", {"model": "m", "input": "x"})
        assert (await client.answer()).json() == {"model": "m", "embeddings": [[1.0]]}
        await client.post("/v1/embeddings", {"model": "m", "input": "x"})
        assert (await client.answer()).json()["data"][0]["embedding"] == [1.0]


async def test_pipelined_requests_are_answered_in_order(adapter):
    inference = ScriptedInference(HELLO)
    body = json.dumps({**GEN, "stream": False}).encode()
    async with serving(gateway(inference), adapter=adapter) as server, await server.connect() as client:
        await client.send(
            request_bytes("POST", "/api/generate", body, "X-Request-Id: one")
            + request_bytes("GET", "/api/version", b"", "X-Request-Id: two")
            + request_bytes("POST", "/api/generate", body, "X-Request-Id: three")
        )
        answers = [await client.answer() for _ in range(3)]
        assert [answer.headers["x-request-id"] for answer in answers] == ["one", "two", "three"]
        assert answers[1].json()["version"] == "0.32.15"


async def test_pipelined_behind_a_running_stream(adapter):
    inference = ScriptedInference(hold=True)
    body = json.dumps(GEN).encode()
    async with serving(gateway(inference), adapter=adapter) as server, await server.connect() as client:
        await client.send(request_bytes("POST", "/api/generate", body) * 2)
        for number in range(2):
            await until(lambda n=number: len(inference.generations) == n + 1, "the request opens")
            inference.generations[number].emit(Delta(text=str(number)), Finished(reason="stop"))
            answer = await client.answer()
            assert json.loads(answer.body.splitlines()[0])["response"] == str(number)


async def test_chunked_request_body(adapter):
    async with talking(ScriptedInference(HELLO), adapter) as client:
        body = json.dumps({**GEN, "stream": False}).encode()
        pieces = b"".join(
            b"%x\r\n%b\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7)
        )
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.send(head + pieces + b"0\r\n\r\n")
        assert (await client.answer()).json()["response"] == "Hello"


async def test_large_bodies_and_small_ones_in_order(adapter):
    """Large ones are read in a thread."""
    inference = ScriptedInference(HELLO)
    async with talking(inference, adapter) as client:
        for number in range(4):
            size = 500_000 if number % 2 == 0 else 5
            await client.post("/api/generate", {**GEN, "system": "x" * size, "stream": False})
            assert (await client.answer()).json()["response"] == "Hello"
        await client.post("/api/generate", {**GEN, "system": 3, "suffix": "x" * 500_000})
        assert (await client.answer()).status == 400
        await client.post("/api/show", {"model": 3, "system": "x" * 500_000})
        assert (await client.answer()).status == 400
    assert [len(request.prompt.system) for request in inference.requests] == [500_000, 5, 500_000, 5]


async def test_expect_continue(adapter):
    async with talking(ScriptedInference(HELLO), adapter) as client:
        body = json.dumps({**GEN, "stream": False}).encode()
        whole = request_bytes("POST", "/api/generate", body, "Expect: 100-continue")
        await client.send(whole[: -len(body)])
        assert (await client.head())[0] == 100
        await client.send(body)
        assert (await client.answer()).status == 200


async def test_http_1_0_gets_no_chunks(adapter):
    if adapter == "asgi":
        pytest.skip("uvicorn itself sends chunks to HTTP/1.0; the fast protocol is what nodes run")
    async with talking(ScriptedInference(HELLO), adapter) as client:
        body = json.dumps(GEN).encode()
        await client.send(request_bytes("POST", "/api/generate", body).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        status, headers = await client.head()
        assert status == 200
        assert "transfer-encoding" not in headers
        rest = await client.reader.read()
        assert [json.loads(line)["response"] for line in rest.splitlines()] == ["Hel", "lo", ""]


async def test_wrong_method_head_and_preflight(adapter):
    async with serving(gateway(ScriptedInference(HELLO)), adapter=adapter) as server:
        async with await server.connect() as client:
            await client.send(request_bytes("GET", "/api/generate"))
            answer = await client.answer()
            assert (answer.status, answer.headers["allow"]) == (405, "POST")
        async with await server.connect() as client:
            await client.send(request_bytes("HEAD", "/"))
            assert (await client.head())[0] == 200
            await client.send(
                request_bytes(
                    "OPTIONS",
                    "/api/chat",
                    b"",
                    "Origin: http://localhost:3000",
                    "Access-Control-Request-Method: POST",
                )
            )
            status, headers = await client.head()
            assert status == 204
            assert headers["access-control-allow-origin"] == "http://localhost:3000"
            await client.post(
                "/api/generate",
                {**GEN, "stream": False},
                "Origin: http://localhost:3000",
                "Content-Type: application/json",
            )
            assert (await client.answer()).headers["access-control-allow-origin"] == "http://localhost:3000"


async def test_an_offer_to_upgrade_is_ignored(adapter):
    async with talking(ScriptedInference(HELLO), adapter) as client:
        await client.send(
            request_bytes("GET", "/api/version", b"", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
        )
        assert (await client.answer()).status == 200


async def test_shutdown_lets_a_running_answer_end(adapter):
    inference = ScriptedInference(hold=True)
    async with serving(gateway(inference), adapter=adapter) as server, await server.connect() as client:
        async with await server.connect() as idle:
            await client.post("/api/generate", GEN)
            await until(lambda: bool(inference.generations), "the request opens")
            inference.generations[0].emit(Delta(text="a"))
            server.server.should_exit = True
            assert await idle.closed()
        inference.generations[0].emit(Delta(text="b"), Finished(reason="stop"))
        answer = await client.answer()
        assert [json.loads(line)["response"] for line in answer.body.splitlines()] == ["a", "b", ""]
        assert await client.closed()
