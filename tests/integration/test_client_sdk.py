"""Both clients against a real loopback server: answers, streams, and every way it can go wrong."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from tests.integration.server_double import Asked, Double, Reply, closed_port_url, server_double
from tests.limits import SOON_S

import ollama_distributed
from ollama_distributed import client as sdk
from ollama_distributed.client import attempts

pytestmark = pytest.mark.integration

ASK = sdk.GenerateRequest(model="m", prompt="hi")
PIECES = [
    {"model": "m", "response": "Hel"},
    {"model": "m", "response": "lo"},
    {"model": "m", "response": "", "done": True, "done_reason": "stop", "eval_count": 2},
]


@pytest.fixture
def server() -> Iterator[Double]:
    with server_double() as double:
        yield double


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BASE_WAIT_S", 0.001)
    for name in ("OLLAMA_HOST", "OLLAMA_API_KEY", "OLLAMA_DISTRIBUTED_API_KEY"):
        monkeypatch.delenv(name, raising=False)


class Either:
    """Runs the same test on both clients: awaits and collects for the asyncio one."""

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind

    def __call__(self, use: Callable[[Any], Any], *args: Any, **settings: Any) -> Any:
        client = self.kind(*args, **settings)
        if isinstance(client, sdk.SyncClient):
            found = use(client)
            return list(found) if inspect.isgenerator(found) else found

        async def run() -> Any:
            found = use(client)
            if isinstance(found, AsyncGenerator):
                return [item async for item in found]
            return await found

        return asyncio.run(run())


@pytest.fixture(params=[sdk.Client, sdk.SyncClient], ids=["async", "sync"])
def either(request: pytest.FixtureRequest) -> Either:
    return Either(request.param)


def test_generate(server: Double, either: Either) -> None:
    server.on(
        "POST", "/api/v1/generate", Reply(body={"model": "m", "response": "hello", "done": True, "new": 1})
    )
    answer = either(lambda client: client.generate(ASK), server.url, api_key="odk_1")
    assert answer.response == "hello"
    assert server.asked[0].json == {"model": "m", "prompt": "hi"}
    assert server.asked[0].headers["authorization"] == "Bearer odk_1"
    assert server.asked[0].headers["content-type"] == "application/json"


def test_generate_stream(server: Double, either: Either) -> None:
    server.on("POST", "/api/v1/generate", Reply(lines=PIECES))
    pieces = either(lambda client: client.generate_stream(ASK), server.url)
    assert [piece.response for piece in pieces] == ["Hel", "lo", ""]
    assert pieces[-1].eval_count == 2
    assert server.asked[0].json["stream"] is True


def test_chat_and_its_stream(server: Double, either: Either) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    told = {"message": {"role": "assistant", "content": "", "tool_calls": [call]}, "done": True}
    server.on("POST", "/api/v1/chat", Reply(body=told), Reply(lines=[told]))
    ask = sdk.ChatRequest(
        model="m", messages=[sdk.Message(role="user", content="x", images=[b"abc"]), {"role": "user"}]
    )
    answer = either(lambda client: client.chat(ask), server.url)
    assert answer.message.tool_calls[0].function.arguments == {"x": 1}
    assert server.asked[0].json["messages"] == [
        {"role": "user", "content": "x", "images": ["YWJj"]},
        {"role": "user"},
    ]
    (piece,) = either(lambda client: client.chat_stream(ask), server.url)
    assert piece.done


def test_embeddings_and_rerank(server: Double, either: Either) -> None:
    server.on("POST", "/api/v1/embeddings", Reply(body={"embeddings": [[1.0, 0]], "prompt_eval_count": 3}))
    server.on("POST", "/v1/rerank", Reply(body={"results": [{"index": 1, "relevance_score": 0.9}]}))
    found = either(lambda c: c.embeddings(sdk.EmbeddingsRequest(model="m", input=["a"])), server.url)
    assert found.embeddings == [[1.0, 0.0]]
    ask = sdk.RerankRequest(model="m", query="q", documents=["a", "b"])
    assert either(lambda c: c.rerank(ask), server.url).results[0].index == 1


def test_models(server: Double, either: Either) -> None:
    info = {
        "digest": "ab",
        "size": 5,
        "modified_at": "2026-11-22T12:00:00.5Z",
        "details": {"family": "llama"},
    }
    server.on("GET", "/api/v1/models", Reply(body={"models": {"a:latest": info}}))
    server.on("GET", "/api/v1/models/u/a:latest", Reply(body={"name": "u/a:latest", **info}))
    server.on(
        "POST", "/api/show", Reply(body={"template": "t", "model_info": {"general.architecture": "llama"}})
    )
    server.on("POST", "/api/copy", Reply())
    server.on("DELETE", "/api/v1/models/a", Reply())
    server.on("GET", "/api/ps", Reply(body={"models": [{"name": "a", "size": 9, "size_vram": 3}]}))
    server.on("POST", "/api/generate", Reply(body={"done": True, "done_reason": "unload"}))
    server.on("GET", "/api/v1/version", Reply(body={"version": "0.1.0"}))
    server.on("GET", "/api/v1/health", Reply(body={"status": "ok"}))
    (listed,) = either(lambda c: c.models.list(), server.url)
    assert (listed.name, listed.details.family, listed.modified_at.year) == ("a:latest", "llama", 2026)
    assert either(lambda c: c.models.get("u/a:latest"), server.url).name == "u/a:latest"
    assert either(lambda c: c.models.show("a", verbose=True), server.url).template == "t"
    assert either(lambda c: c.models.copy("a", "b"), server.url) is None
    assert either(lambda c: c.models.delete("a"), server.url) is None
    assert either(lambda c: c.models.loaded(), server.url)[0].size_vram == 3
    assert either(lambda c: c.models.unload("a"), server.url) is None
    assert either(lambda c: c.version(), server.url).version == "0.1.0"
    assert either(lambda c: c.health(), server.url).status == "ok"
    assert {asked.path: asked.json for asked in server.asked if asked.body} == {
        "/api/show": {"model": "a", "verbose": True},
        "/api/copy": {"source": "a", "destination": "b"},
        "/api/generate": {"model": "a", "keep_alive": 0, "stream": False},
    }


def test_download_waits_for_the_pull(server: Double, either: Either) -> None:
    lines = [{"status": "pulling manifest"}, {"status": "success"}]
    server.on("POST", "/api/pull", Reply(lines=lines), Reply(lines=[{"error": "file does not exist"}]))
    assert either(lambda c: c.models.download("llama2"), server.url) is None
    assert server.asked[-1].json == {"model": "llama2"}
    with pytest.raises(sdk.ClientError, match="file does not exist"):
        either(lambda c: c.models.download("llama2"), server.url)


@pytest.mark.parametrize("verb", ["pull", "push"])
def test_pull_and_push_tell_each_line(server: Double, verb: str) -> None:
    told = {"status": f"{verb}ing 0123456789ab", "digest": "sha256:01", "total": 9, "completed": 4}
    server.on("POST", f"/api/{verb}", Reply(lines=[told, {"status": "success"}]))
    with sdk.SyncClient(server.url) as client:
        lines = list(getattr(client.models, verb)("a/b", insecure=True))
    assert [line.completed for line in lines] == [4, None]
    assert server.asked[-1].json == {"model": "a/b", "insecure": True}


def test_a_torn_pull_is_an_error(server: Double, either: Either) -> None:
    server.on("POST", "/api/pull", Reply(lines=[{"status": "pulling manifest"}]))
    with pytest.raises(sdk.ConnectionLost):
        either(lambda c: c.models.download("llama2"), server.url)


def test_start_download_does_not_wait(server: Double, either: Either) -> None:
    transfer = {"id": "t1", "model": "llama2", "state": "running"}
    server.on("POST", "/api/v1/models/llama2/download", Reply(body=transfer))
    assert either(lambda c: c.models.start_download("llama2"), server.url).id == "t1"


def test_create_with_a_blob(server: Double, either: Either, tmp_path: Path) -> None:
    data = b"G" * (1024 * 1024 + 17)
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    server.on("HEAD", f"/api/blobs/{digest}", Reply(404), Reply(200))
    server.on("POST", f"/api/blobs/{digest}", Reply(503, headers={"retry-after": "0"}), Reply(201))
    server.on("POST", "/api/create", Reply(lines=[{"status": "parsing GGUF"}, {"status": "success"}]))
    progress: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        progress.append((done, total))

    for source in (file, data):
        sent = either(lambda c, source=source: c.models.create_blob(source, on_progress=note), server.url)
        assert sent == digest
    posts = [asked for asked in server.asked if asked.method == "POST"]
    assert [asked.body == data for asked in posts] == [True, True], (
        "sent again after 503, never when it is there"
    )
    assert progress[-1] == (len(data), len(data))
    ask = sdk.CreateRequest(model="new", from_="old", files={"m.gguf": digest})
    lines = either(lambda c: c.models.create(ask), server.url)
    assert [line.status for line in lines] == ["parsing GGUF", "success"]
    assert server.asked[-1].json == {"model": "new", "from": "old", "files": {"m.gguf": digest}}


# ── what goes wrong ─────────────────────────────────────────────────────────────────


def test_no_server(either: Either) -> None:
    url = closed_port_url()
    with pytest.raises(sdk.ConnectionFailed, match=url):
        either(lambda c: c.generate(ASK), url, retries=1)


def test_fail_over_and_the_good_one_is_remembered(server: Double, either: Either) -> None:
    server.on("POST", "/api/v1/generate", Reply(body={"response": "x", "done": True}))
    with server_double() as ill:
        ill.on("POST", "/api/v1/generate", Reply(503, {"error": "draining"}))
        urls = [closed_port_url(), ill.url, server.url]
        client = either.kind(urls)
        for _ in range(2):
            found = client.generate(ASK)
            answer = asyncio.run(found) if inspect.iscoroutine(found) else found
            assert answer.response == "x"
        assert len(ill.asked) == 1
        assert len(server.asked) == 2


def test_fail_over_of_a_stream_before_its_first_byte(server: Double, either: Either) -> None:
    server.on("POST", "/api/v1/generate", Reply(lines=PIECES))
    with server_double() as ill:
        ill.on("POST", "/api/v1/generate", Reply(lines=[], drop=True))
        pieces = either(lambda c: c.generate_stream(ASK), [ill.url, server.url])
    assert "".join(piece.response for piece in pieces) == "Hello"


def test_retry_after_is_honoured(server: Double, either: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Reply(503, {"error": "server busy, please try again."}, {"retry-after": "1"})
    server.on("POST", "/api/v1/generate", busy, Reply(body={"response": "x", "done": True}))
    waits: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr("asyncio.sleep", sleep)
    monkeypatch.setattr("time.sleep", waits.append)
    assert either(lambda c: c.generate(ASK), server.url).response == "x"
    assert [wait >= 1.0 for wait in waits] == [True]


def test_an_error_is_typed_and_not_repeated(server: Double, either: Either) -> None:
    told = {"code": "model_not_found", "message": "model 'm' not found", "request_id": "r9"}
    server.on("POST", "/api/v1/generate", Reply(404, {"error": told}))
    with pytest.raises(sdk.ModelNotFound) as caught:
        either(lambda c: c.generate(ASK), server.url)
    assert (caught.value.status, caught.value.request_id) == (404, "r9")
    assert len(server.asked) == 1


def test_an_error_in_the_middle_of_a_stream(server: Double, either: Either) -> None:
    failed = {"error": {"code": "runner_died", "message": "the model's process ended", "retryable": True}}
    server.on("POST", "/api/v1/generate", Reply(lines=[PIECES[0], failed]))
    with pytest.raises(sdk.RunnerDied):
        either(lambda c: c.generate_stream(ASK), server.url)
    assert len(server.asked) == 1


@pytest.mark.parametrize("drop", [True, False], ids=["dropped", "ended"])
def test_a_stream_that_breaks_is_never_taken_for_whole(server: Double, either: Either, drop: bool) -> None:
    server.on("POST", "/api/v1/generate", Reply(lines=PIECES[:2], drop=drop))
    with pytest.raises(sdk.ConnectionLost):
        either(lambda c: c.generate_stream(ASK), server.url)
    assert len(server.asked) == 1


def test_a_connection_that_closes_unanswered(server: Double, either: Either) -> None:
    server.on("POST", "/api/v1/generate", Reply(drop=True), Reply(body={"response": "x", "done": True}))
    server.on("DELETE", "/api/v1/models/m", Reply(drop=True))
    assert either(lambda c: c.generate(ASK), server.url).response == "x"
    with pytest.raises(sdk.ConnectionLost):
        either(lambda c: c.models.delete("m"), server.url)
    assert server.paths().count("DELETE /api/v1/models/m") == 1, "a delete may have happened: not sent again"


def test_a_body_that_breaks(server: Double, either: Either) -> None:
    server.on("POST", "/api/v1/generate", Reply(body=b'{"resp', drop=True))
    with pytest.raises(sdk.ConnectionLost):
        either(lambda c: c.generate(ASK), server.url)
    assert len(server.asked) == 1


def test_silence_is_a_timeout(server: Double, either: Either) -> None:
    hold = Event()
    server.on("POST", "/api/v1/generate", Reply(lines=PIECES[:1], hold=hold))
    try:
        with pytest.raises(sdk.TimedOut):
            either(lambda c: c.generate_stream(ASK), server.url, timeout=0.2)
    finally:
        hold.set()


def test_a_foreign_answer(server: Double, either: Either) -> None:
    server.on("POST", "/api/v1/generate", Reply(body=b"<html>hello</html>"))
    with pytest.raises(sdk.BadAnswer, match="<html>"):
        either(lambda c: c.generate(ASK), server.url)


def test_a_redirect_never_gets_the_key(server: Double, either: Either) -> None:
    with server_double() as trap:
        server.on("POST", "/api/v1/generate", Reply(307, headers={"location": trap.url + "/api/v1/generate"}))
        with pytest.raises(sdk.BadAnswer):
            either(lambda c: c.generate(ASK), server.url, api_key="secret")
        assert trap.asked == []


def test_a_proxy_is_not_used_for_loopback(
    server: Double, either: Either, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", closed_port_url())
    server.on("GET", "/api/v1/health", Reply(body={"status": "ok"}))
    assert either(lambda c: c.health(), server.url).status == "ok"


def test_leaving_a_stream_hangs_up(server: Double) -> None:
    hold = Event()
    server.on("POST", "/api/v1/generate", Reply(lines=PIECES[:1], hold=hold))

    async def leave() -> None:
        async for _ in sdk.Client(server.url).generate_stream(ASK):
            break
        assert await asyncio.to_thread(server.hung_up.wait, SOON_S), "async"

    try:
        asyncio.run(leave())
        server.hung_up.clear()
        for _ in sdk.SyncClient(server.url).generate_stream(ASK):
            break
        assert server.hung_up.wait(SOON_S), "sync"
    finally:
        hold.set()


def test_connections_are_kept_only_inside_with(server: Double) -> None:
    server.on("GET", "/api/v1/health", Reply(body={"status": "ok"}))

    async def ask(client: sdk.Client) -> None:
        await client.health()
        await client.health()

    async def inside() -> None:
        async with sdk.Client(server.url) as client:
            await ask(client)

    asyncio.run(inside())
    assert server.connections == 1
    with sdk.SyncClient(server.url) as client:
        client.health()
        client.health()
    assert server.connections == 2
    outside = sdk.Client(server.url)
    asyncio.run(ask(outside))
    asyncio.run(ask(outside))  # another loop: nothing of the first one is left
    assert server.connections == 6


def test_the_environment_names_the_server(
    server: Double, either: Either, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(asked: Asked) -> Reply:
        return Reply(body={"version": asked.headers["authorization"]})

    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.port}")
    monkeypatch.setenv("OLLAMA_API_KEY", "from-env")
    server.on("GET", "/api/v1/version", version)
    assert either(lambda c: c.version()).version == "Bearer from-env"


# ── the package ─────────────────────────────────────────────────────────────────────


def test_the_seeds_example_runs_as_written(server: Double, capsys: pytest.CaptureFixture[str]) -> None:
    from ollama_distributed import Client, GenerateRequest

    server.on("POST", "/api/pull", Reply(lines=[{"status": "success"}]))
    server.on("POST", "/api/v1/generate", Reply(body={"response": "x", "done": True}), Reply(lines=PIECES))

    async def main() -> None:
        client = Client(base_url=server.url, api_key="your-api-key")
        await client.models.download("llama2")
        response = await client.generate(GenerateRequest(model="llama2", prompt="Explain quantum computing"))
        print("Generated text:", response.response)
        async for chunk in client.generate_stream(
            GenerateRequest(model="llama2", prompt="Write a poem", stream=True)
        ):
            print(chunk.response, end="", flush=True)

    asyncio.run(main())
    assert capsys.readouterr().out == "Generated text: x\nHello"


def test_every_name_of_the_sdk_is_the_packages() -> None:
    for name in sdk.__all__:
        assert getattr(ollama_distributed, name) is getattr(sdk, name)
    assert set(sdk.__all__) <= set(dir(ollama_distributed))
    with pytest.raises(AttributeError):
        ollama_distributed.Nothing  # noqa: B018


def test_importing_the_sdk_brings_nothing_of_the_node() -> None:
    code = (
        "import sys, ollama_distributed; assert 'ollama_distributed.client' not in sys.modules\n"
        "from ollama_distributed import Client, GenerateRequest, SyncClient; Client()\n"
        "ours = {m.split('.')[1] for m in sys.modules if m.startswith('ollama_distributed.')}\n"
        "assert ours <= {'client', '_version', 'base'}, ours\n"
        "heavy = {'httpx', 'asyncio', 'rich', 'typer', 'fastapi', 'uvicorn', 'pydantic', 'xllamacpp'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SOON_S)
