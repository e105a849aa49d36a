"""Hostile and slow clients over real sockets (`reference/security.md`, 3); all bounded."""

import asyncio
import json
import socket
from contextlib import AsyncExitStack, ExitStack

import httpx
import pytest
from tests.gateway_bench import HELLO, gateway, request_bytes, serving, talking, until
from tests.limits import SOON_S

from ollama_distributed.base.inference import Delta, Finished
from ollama_distributed.gateway import protocol
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.node.listeners import allow_files
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

GEN = {"model": "m", "prompt": "p", "stream": False}
QUICK = Limits(
    header_deadline_s=0.3,
    body_deadline_s=0.6,
    body_rate_window_s=0.2,
    idle_s=0.4,
    reader_deadline_s=0.3,
)
"""The same rules in a hurry."""


@pytest.fixture(params=["asgi", "fast"])
def adapter(request):
    return request.param


def hello():
    return ScriptedInference(HELLO)


# ── smuggling and syntax ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: xchunked",
        "Content-Length : 5",
        "X: a\x00b",
    ],
)
async def test_two_readings_of_one_request_are_refused(adapter, fields):
    async with talking(hello(), adapter) as client:
        smuggled = request_bytes("GET", "/api/version")
        head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n"
        await client.send(head.encode("latin-1") + b"0\r\n\r\n" + smuggled)
        answer = await client.answer()
        assert answer.status == 400
        assert await client.closed(), "the smuggled request is never answered"


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\x00" * 64, b"SSH-2.0-x\r\n"]
)
async def test_what_is_not_http_is_400(adapter, junk):
    async with talking(hello(), adapter) as client:
        await client.send(junk)
        answer = await client.answer()
        assert answer.status == 400
        assert answer.json()["error"]["code"] == "malformed_body"
        assert await client.closed()


# ── head ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        ["X-Long: " + "a" * 20_000],
        [f"X-{number}: a" for number in range(100)],
        [f"X-{number}: {'a' * 400}" for number in range(60)],
    ],
)
async def test_large_heads_are_431(adapter, fields):
    async with talking(hello(), adapter) as client:
        await client.send(request_bytes("GET", "/api/version", b"", *fields))
        answer = await client.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (431, "headers_too_large")
        assert await client.closed()


async def test_a_long_url_is_431(adapter):
    async with talking(hello(), adapter) as client:
        await client.send(request_bytes("GET", "/api/version?" + "a" * 20_000))
        assert (await client.answer()).status == 431


async def test_a_field_without_end_is_431(adapter):
    async with talking(hello(), adapter) as client:
        await client.send(b"GET / HTTP/1.1\r\nX: ")
        answer = asyncio.ensure_future(client.answer())
        async with asyncio.timeout(SOON_S):
            while not answer.done():
                client.writer.write(b"a" * 1024)
                await asyncio.sleep(0.002)
        assert (await answer).status == 431


@pytest.mark.parametrize("first", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
async def test_a_slow_head_is_408(adapter, first):
    async with talking(hello(), adapter, QUICK) as client:
        await client.send(first)
        answer = await client.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (408, "request_timeout")
        assert await client.closed()


async def test_a_trickled_head_is_408_too(adapter):
    async with talking(hello(), adapter, QUICK) as client:
        answer = asyncio.ensure_future(client.answer())
        async with asyncio.timeout(SOON_S):
            for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1000:
                if answer.done():
                    break
                client.writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
        assert (await answer).status == 408


# ── body ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/api/generate", "/api/show"])
async def test_a_body_that_does_not_come_is_408(adapter, path):
    async with talking(hello(), adapter, QUICK) as client:
        await client.send(request_bytes("POST", path, b"x" * 1000)[:-900])
        assert (await client.answer()).status == 408
        assert await client.closed()


async def test_a_body_that_comes_too_slowly_is_408(adapter):
    async with talking(hello(), adapter, QUICK) as client:
        await client.send(request_bytes("POST", "/api/generate", b"x" * 1000)[:-1000])
        answer = asyncio.ensure_future(client.answer())
        async with asyncio.timeout(SOON_S):
            while not answer.done():
                client.writer.write(b"x")
                await asyncio.sleep(0.03)
        assert (await answer).status == 408


@pytest.mark.parametrize(
    ("path", "limit"), [("/api/embed", 4 << 20), ("/api/generate", 64 << 20), ("/api/show", 4 << 20)]
)
async def test_a_large_body_is_refused_before_it_is_read(adapter, path, limit):
    inference = hello()
    async with talking(inference, adapter) as client:
        await client.send(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {limit + 1}\r\n\r\n".encode()
        )
        answer = await client.answer()
        assert answer.status == 413
        assert answer.headers["connection"] == "close"
        assert await client.closed()
        assert inference.requests == []


async def test_an_endless_chunked_body_is_413(adapter):
    limits = Limits(body_bytes=65_536)
    async with talking(hello(), adapter, limits) as client:
        await client.send(
            b"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        answer = asyncio.ensure_future(client.answer())
        for _ in range(100):
            if answer.done():
                break
            client.writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            await asyncio.sleep(0.005)
        assert (await answer).status == 413


async def test_compressed_bodies_are_415(adapter):
    async with serving(gateway(hello()), adapter=adapter) as server:
        for encoding in ("gzip", "zstd", "br", "deflate", "gzip, gzip"):
            for path in ("/api/generate", "/v1/chat/completions", "/api/show", "/v1/responses"):
                async with await server.connect() as client:
                    await client.post(path, b"\x1f\x8b\x08", f"Content-Encoding: {encoding}")
                    assert (await client.answer()).status == 415, (path, encoding)


BAD_JSON = (b"[" * 5000, b'{"a":1,"a":2}', b'{"a":NaN}', b"{", b"\xff\xfe", b'{"a":' + b"1" * 30 + b"}")


async def test_bad_json_is_400_in_every_dialect(adapter):
    inference = hello()
    async with serving(gateway(inference), adapter=adapter) as server, await server.connect() as client:
        for path in ("/api/generate", "/api/show", "/v1/messages", "/v1/embeddings", "/api/v1/chat"):
            for body in BAD_JSON:
                await client.post(path, body)
                answer = await client.answer()
                assert answer.status == 400, (path, body)
                assert "error" in answer.json()
    assert inference.requests == []


# ── browsers ────────────────────────────────────────────────────────────────────────


FOREIGN = (
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1.nip.io",
    "2130706433",
    "0x7f.0.0.1",
    "192.168.1.5",
    "169.254.169.254",
    "0.0.0.0",
    "[::ffff:10.0.0.1]",
    "localhost@evil.example",
    "localhost evil",
    "",
    "xn--lcalhost-54a",
)


async def test_foreign_hosts_are_403(adapter):
    targets = ("POST /api/generate", "DELETE /api/delete", "GET /api/tags", "GET /", "GET /healthz")
    async with serving(gateway(hello()), adapter=adapter) as server:
        for host in FOREIGN:
            for target in targets:
                async with await server.connect() as client:
                    head = f"{target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n"
                    await client.send(head.encode())
                    assert (await client.answer()).status == 403, (target, host)


@pytest.mark.parametrize("hosts", ["", "Host: localhost\r\nHost: evil.example\r\n"])
async def test_no_host_and_two_hosts_are_400(adapter, hosts):
    for path in ("/api/generate", "/api/version"):
        async with talking(hello(), adapter) as client:
            await client.send(f"POST {path} HTTP/1.1\r\n{hosts}Content-Length: 0\r\n\r\n".encode())
            assert (await client.answer()).status == 400


BROWSERS = (
    (["Content-Type: application/x-www-form-urlencoded"], 200),  # curl -d
    (["Content-Type: text/plain"], 200),
    ([], 200),
    (["Origin: http://localhost:3000", "Content-Type: application/json"], 200),
    (["Origin: tauri://localhost", "Content-Type: application/json"], 200),
    (["Origin: http://127.0.0.1:8080", "Content-Type: text/plain"], 415),
    (["Origin: http://localhost", "Content-Type: application/x-www-form-urlencoded"], 415),
    (["Sec-Fetch-Site: same-origin", "Content-Type: text/plain"], 415),
    (["Sec-Fetch-Site: same-origin"], 415),
    (["Sec-Fetch-Site: cross-site", "Content-Type: application/json"], 403),
    (["Origin: https://evil.example", "Content-Type: application/json"], 403),
    (["Origin: null", "Content-Type: application/json"], 403),
    (["Origin: http://localhost.evil.example", "Content-Type: application/json"], 403),
    (
        ["Origin: https://evil.example", "Sec-Fetch-Site: same-origin", "Content-Type: application/json"],
        403,
    ),
)


@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions"])
async def test_what_a_browser_may_send(adapter, path):
    chat = {"model": "m", "messages": [{"role": "user", "content": "p"}]}
    async with serving(gateway(hello()), adapter=adapter) as server:
        for fields, status in BROWSERS:
            async with await server.connect() as client:
                await client.post(path, GEN if path == "/api/generate" else chat, *fields)
                answer = await client.answer()
                assert answer.status == status, fields
                assert answer.headers.get("access-control-allow-origin") != "*"


async def test_a_foreign_preflight_is_403(adapter):
    async with talking(hello(), adapter) as client:
        await client.send(
            request_bytes(
                "OPTIONS",
                "/api/generate",
                b"",
                "Origin: https://evil.example",
                "Access-Control-Request-Method: POST",
            )
        )
        answer = await client.answer()
        assert answer.status == 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "field",
    [
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Server: proxy",
        "X-Forwarded-Port: 443",
        "Forwarded: for=127.0.0.1",
        "Via: 1.1 proxy",
        "X-Real-IP: 127.0.0.1",
    ],
)
@pytest.mark.parametrize("path", ["/api/generate", "/api/version"])
async def test_behind_a_proxy_nobody_is_local(adapter, path, field):
    async with talking(hello(), adapter) as client:
        await client.send(request_bytes("POST" if path == "/api/generate" else "GET", path, b"{}", field))
        answer = await client.answer()
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"


# ── connections ─────────────────────────────────────────────────────────────────────


async def test_an_idle_connection_is_closed(adapter):
    async with talking(hello(), adapter, Limits(idle_s=0.4)) as client:
        await client.post("/api/generate", GEN)
        assert (await client.answer()).status == 200
        assert await client.closed()


async def test_more_connections_than_allowed_are_503(adapter):
    limits = Limits(connections=8, header_deadline_s=2 * SOON_S)  # nobody is cut for saying nothing
    app = gateway(hello(), limits=limits)
    async with serving(app, adapter=adapter, limits=limits) as server:
        clients = [await server.connect() for _ in range(limits.connections)]
        await until(lambda: len(server.watch) == limits.connections, "all are accepted")
        async with await server.connect() as late:
            assert (await late.answer()).status == 503
            assert await late.closed()
        for client in clients:
            async with client:
                pass
        await until(lambda: len(server.watch) == 0, "their places are free")
        async with await server.connect() as again:
            await again.post("/api/generate", GEN)
            assert (await again.answer()).status == 200


async def test_one_stranger_does_not_take_all_places(adapter, monkeypatch):
    """Half of them at most, and then a few: who has shown who it is finds others."""
    monkeypatch.setattr(protocol, "origin_of", lambda _: "10.0.0.9")
    limits = Limits(connections=8, strangers=2, header_deadline_s=2 * SOON_S, idle_s=2 * SOON_S)
    app = gateway(hello(), limits=limits)
    async with serving(app, adapter=adapter, limits=limits) as server, AsyncExitStack() as stack:

        async def silent():
            return await stack.enter_async_context(await server.connect())

        strangers = [await silent() for _ in range(4)]
        await until(lambda: len(server.watch) == 4, "there was room")
        late = await silent()
        assert (await late.answer()).status == 503
        await until(lambda: len(server.watch) == 4, "it is gone")
        for number, client in enumerate(strangers):  # routes of both kinds
            method, path = ("POST", "/api/generate") if number % 2 else ("GET", "/api/version")
            await client.send(request_bytes(method, path, json.dumps(GEN).encode() if number % 2 else b""))
            assert (await client.answer()).status == 200
        for _ in range(2):
            await silent()
        await until(lambda: len(server.watch) == 6, "those four are known")
        assert (await (await silent()).answer()).status == 503


async def test_a_reader_that_stops_is_cut_and_its_slot_freed(adapter):
    inference = ScriptedInference(hold=True)
    app = gateway(inference, limits=QUICK)
    async with serving(app, adapter=adapter, limits=QUICK) as server:
        sock = socket.create_connection(("127.0.0.1", server.port))
        with sock:
            sock.sendall(
                request_bytes("POST", "/api/generate", json.dumps({"model": "m", "prompt": "p"}).encode())
            )
            await until(lambda: bool(inference.generations), "the request opens")
            generation = inference.generations[0]
            sent = 0
            async with asyncio.timeout(SOON_S):
                while not generation.paused:
                    generation.emit(Delta(text="x" * 65_536))
                    sent += 65_536
                    assert sent < 64 << 20
                    await asyncio.sleep(0)
            await until(lambda: generation.cancelled > 0, "the slot is freed")


async def test_refused_connections_are_counted():
    app = gateway(hello())
    async with serving(app, adapter="fast") as server:
        async with await server.connect() as client:
            await client.send(b"\x00" * 64)
            assert (await client.answer()).status == 400
        async with await server.connect() as client:
            await client.send(request_bytes("GET", "/metrics"))
            text = (await client.answer()).body.decode()
    assert 'requests_total{route="connection",outcome="error",status="400"} 1' in text


SLOW = (
    b"",
    b"GET / HTTP/1.1\r\nHost: ",
    b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n{",
)
"""Says nothing; a head, a body that does not come on."""


@pytest.mark.parametrize(("adapter", "sockets"), [("asgi", 200), ("fast", 2000)])
async def test_slow_clients_do_not_disturb_a_good_one(adapter, sockets):
    """`make accept-slow-clients` has them trickle, and measures."""
    sockets = min(sockets, allow_files() // 2 - 200)  # both ends are here
    limits = Limits(header_deadline_s=2 * SOON_S, body_deadline_s=2 * SOON_S, body_rate_bytes_s=0)
    inference = hello()
    async with serving(gateway(inference, limits=limits), adapter=adapter, limits=limits) as server:
        with ExitStack() as stack:
            for number in range(sockets):
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                slow.sendall(SLOW[number % len(SLOW)])
                if number % 50 == 0:
                    await asyncio.sleep(0)
            await until(lambda: len(server.watch) == sockets, "all are held")
            async with await server.connect() as good:
                async with asyncio.timeout(SOON_S):
                    for _ in range(20):
                        await good.post("/api/generate", GEN)
                        assert (await good.answer()).status == 200
            assert len(server.watch) >= sockets, "nobody was cut for that"
        await until(lambda: len(server.watch) == 0, "their places are free")
    assert len(inference.requests) == 20


# ── refused while the client still sends ────────────────────────────────────────────


REFUSED = (
    ("/api/embed", {}, 413),
    ("/api/show", {}, 413),
    ("/api/embed", {"content-encoding": "gzip"}, 415),
    ("/api/embed", {"host": "evil.example"}, 403),
    ("/api/embed", {f"x-{number}": "a" for number in range(100)}, 431),
)


@pytest.mark.parametrize(("path", "fields", "status"), REFUSED)
async def test_an_ordinary_client_that_still_sends_gets_the_answer(adapter, path, fields, status):
    """A socket closed with unread bytes answers with a reset, and the answer is lost."""
    async with serving(gateway(hello()), adapter=adapter) as server:
        url = f"http://127.0.0.1:{server.port}{path}"
        async with httpx.AsyncClient(timeout=SOON_S) as client:
            for _ in range(3):
                answer = await client.post(url, content=b"x" * (24 << 20), headers=fields)
                assert answer.status_code == status
                assert answer.json()["error"]
        await until(lambda: len(server.watch) == 0, "no connection lingers")


async def test_a_client_that_sends_for_ever_is_cut(adapter):
    limits = Limits(body_bytes=1024, linger_s=0.3)
    app = gateway(hello(), limits=limits)
    async with serving(app, adapter=adapter, limits=limits) as server, await server.connect() as client:
        await client.send(request_bytes("POST", "/api/embed", b"x" * 2000)[:-1000])
        assert (await client.answer()).status == 413
        async with asyncio.timeout(SOON_S):
            while len(server.watch):
                client.writer.write(b"x")
                await asyncio.sleep(0.01)


async def test_a_client_that_sends_too_much_after_a_refusal_is_cut(adapter):
    limits = Limits(body_bytes=1024, linger_s=60, linger_bytes=1 << 20)
    app = gateway(hello(), limits=limits)
    async with serving(app, adapter=adapter, limits=limits) as server, await server.connect() as client:
        await client.send(request_bytes("POST", "/api/embed", b"x" * (8 << 20))[: 1 << 12])
        assert (await client.answer()).status == 413
        client.writer.write(b"x" * (2 << 20))
        await until(lambda: len(server.watch) == 0, "it is cut")


async def test_a_request_behind_the_last_is_never_run(adapter):
    inference = hello()
    body = json.dumps(GEN).encode()
    async with talking(inference, adapter) as client:
        await client.send(
            request_bytes("POST", "/api/generate", b"{}", "Content-Encoding: gzip")
            + request_bytes("POST", "/api/generate", body)
            + request_bytes("DELETE", "/api/delete", b'{"model":"m"}')
        )
        assert (await client.answer()).status == 415
        assert await client.closed()
    assert inference.requests == []


# ── other ways to say two things in one request ─────────────────────────────────────


@pytest.mark.parametrize(
    "trailer", ["Host: evil.example", "Content-Encoding: gzip", "Authorization: Bearer odk_x", "Via: 1.1 x"]
)
@pytest.mark.parametrize("path", ["/api/generate", "/api/show"])
async def test_a_trailer_is_not_a_header(adapter, path, trailer):
    body = json.dumps({**GEN, "model": 3 if path == "/api/show" else "m"}).encode()
    async with talking(hello(), adapter) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.send(
            head.encode() + b"%x\r\n%b\r\n0\r\n%b\r\n\r\n" % (len(body), body, trailer.encode())
        )
        assert (await client.answer()).status == (400 if path == "/api/show" else 200)


async def test_endless_trailers_are_refused(adapter):
    async with talking(hello(), adapter) as client:
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.send(head + b"1\r\nx\r\n0\r\n" + b"X: aaaaaaaa\r\n" * 4000)
        assert (await client.answer()).status == 431


async def test_a_client_that_pipelines_and_goes_away_frees_its_slot(adapter):
    """The one that runs is not the last that was read."""
    inference = ScriptedInference(hold=True)
    body = b'{"model":"m","prompt":"p"}'
    async with serving(gateway(inference), adapter=adapter) as server, await server.connect() as client:
        await client.send(request_bytes("POST", "/api/generate", body) * 3)
        await until(lambda: len(inference.generations) == 1, "the first opens")
        inference.generations[0].emit(Delta(text="a"), Finished(reason="stop"))
        await client.answer()
        await until(lambda: len(inference.generations) == 2, "the second opens")
        inference.generations[1].emit(Delta(text="a"))
        await client.head()
        client.writer.transport.abort()
        async with asyncio.timeout(SOON_S):
            while not inference.generations[1].cancelled:
                inference.generations[1].emit(Delta(text="a"))
                await asyncio.sleep(0.005)
    assert len(inference.generations) == 2
