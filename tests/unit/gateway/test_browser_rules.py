"""What a browser may do here, whatever page it shows (S-10): Host, Origin, CORS, body types, CSRF tokens and
the headers of answers, at every route of the app, in process."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from importlib.resources import files

import pytest
from tests.access_world import exchanged
from tests.gateway_bench import HELLO, WALL, gateway
from tests.unit.access.test_matrix import REMOTE, World

from ollama_distributed.access.people import People, UserRecord, csrf_of, make_session
from ollama_distributed.base.batches import FileObject
from ollama_distributed.base.errors import Invalid
from ollama_distributed.gateway.origins import SitePolicy, host_name, is_loopback
from ollama_distributed.gateway.pages import ASSETS
from ollama_distributed.node.listeners import parse_address
from ollama_distributed.node.reach import sites_of
from ollama_distributed.node.settings import Settings
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

# ── Host ────────────────────────────────────────────────────────────────────────────

BINDS = ("127.0.0.1:8080", "0.0.0.0:8443", "[::]:8443")
HERE = (
    "localhost",
    "LOCALHOST:8080",
    "localhost.",
    "app.localhost",
    "127.0.0.1",
    "127.9.9.9:1",
    "[::1]:8443",
)
OWN = ("gpu1.lan", "GPU1.lan:8443", "gpu1.lan.", "192.0.2.7:8443", "[2001:db8::7]")
"""Advertised, so this node's own where other machines come in."""
NAMED = ("models.example", "Models.Example:443")
FOREIGN = (
    "evil.example",
    "evil.example:8080",
    "models.example.evil.example",
    "evil-models.example",
    "xmodels.example",
    "models.example@evil.example",
    "evil.example/models.example",
    "evil.example#models.example",
    "evil.example?localhost",
    "localhost.evil.example",
    "localhostx",
    "xlocalhost",
    "local host",
    "localhost,evil.example",
    "localhost:8080,evil.example",
    "localhost:80:80",
    "localhost:x",
    "localhost:999999",
    "localhost..",
    ".localhost.evil",
    "http://localhost",
    "127.0.0.1.evil.example",
    "127.0.0.1.nip.io",
    "rebound.test",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "0x7f000001",
    "0177.0.0.1",
    "127.0.0.1%00.evil.example",
    "0.0.0.0",
    "[::]",
    "[::ffff:10.0.0.1]",
    "[::1",
    "::1",
    "[::1%25lo]",
    "[fe80::1]",
    "10.0.0.1",
    "192.168.1.5:8443",
    "172.16.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.2.70",
    "[2001:db8::70]",
    "gpu1.lan.evil.example",
    "gpu1",
    "gpu10.lan",
    "gpu1_lan",
    "xn--lcalhost-54a",
    "loca\xadlhost",
    "\tlocalhost",
    "metadata.google.internal",
)


async def test_every_bind_answers_to_its_own_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"OLLAMA_DISTRIBUTED_{name.upper()}", raising=False)
    assert len({*HERE, *OWN, *NAMED, *FOREIGN}) >= 60
    for bind in BINDS:
        settings = Settings(
            listen=[bind],
            advertise=["gpu1.lan", "192.0.2.7", "2001:db8::7"],
            allowed_hosts=["models.example"],
        )
        app = gateway(ScriptedInference(HELLO), policy=sites_of(settings))
        secure = parse_address(bind).secure
        own = {*HERE, *NAMED, *(OWN if secure else ())}
        for host in (*HERE, *OWN, *NAMED, *FOREIGN):
            for peer in ("127.0.0.1", REMOTE):
                found = {}
                for method, path in (("POST", "/api/generate"), ("GET", "/api/tags"), ("GET", "/ui/")):
                    body = b'{"model":"m","prompt":"p","stream":false}'
                    scheme = "https" if secure else "http"
                    found[path], _, _ = await exchanged(
                        app, method, path, {"host": host}, peer=peer, scheme=scheme, body=body
                    )
                if host not in own:
                    assert set(found.values()) == {403}, (bind, host, peer, found)
                else:  # without a key only a person at this machine, by a name of this machine, gets in
                    local = not secure and peer == "127.0.0.1" and is_loopback(host_name(host))
                    kept = 200 if local else 401
                    assert found == {"/api/generate": kept, "/api/tags": kept, "/ui/": 200}, (
                        bind,
                        host,
                        peer,
                    )


def test_a_host_that_can_never_be_meant_is_refused() -> None:
    for host in (
        "*",
        "*.example",
        "https://models.example",
        "models.example:443",
        '["a.example"]',
        "a b",
        "müller.example",
    ):
        with pytest.raises(Invalid, match="not a host"):
            SitePolicy(hosts=[host])
    policy = SitePolicy(
        hosts=["Models.example.", "[2001:db8::7]", "2001:db8::8", "fe80::1%eth0", "gpu_1", ""]
    )
    for host in ("models.example:1", "[2001:db8::7]:1", "[2001:db8::8]", "gpu_1"):
        assert policy.check_host({"host": host}) is False


# ── other sites ─────────────────────────────────────────────────────────────────────

UI = "https://ui.example"


def asked_path(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "x", path)


async def test_no_route_lets_another_site_in() -> None:
    world = World()
    world.app.use(SitePolicy(origins=[UI]))
    admin = {"authorization": f"Bearer {world.keys['admin']}"}
    for method, path, _ in world.routes():
        asked = asked_path(path)
        for evil in (
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"sec-fetch-site": "cross-site"},
        ):
            for wanted in ("", "POST"):
                preflight = {"access-control-request-method": wanted} if wanted else {}
                status, headers, _ = await exchanged(
                    world.app, "OPTIONS" if wanted else method, asked, {**admin, **evil, **preflight}
                )
                assert status == 403, (method, path, evil, status)
                assert "access-control-allow-origin" not in headers
        _, headers, _ = await exchanged(world.app, method, asked, {**admin, "origin": UI})
        assert headers["access-control-allow-origin"] == UI, (method, path)
        assert "origin" in headers["vary"]
        assert "access-control-allow-credentials" not in headers, "a session's cookie is for our own pages"
        _, headers, _ = await exchanged(world.app, method, asked, admin)
        assert not any(name.startswith("access-control-") for name in headers)


async def test_forms_change_nothing() -> None:
    """A form's types need no preflight: from a browser none of them is read."""
    world = World()
    hot = [(route.method, route.path) for route in world.app.hot.routes()]
    cold = [(route.method, route.path) for route in world.app.cold_routes if route.body is not None]
    assert len(cold) > 20
    kinds = (
        "text/plain",
        "text/plain;application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
    )
    for method, path in (*hot, *cold):
        for kind in kinds:
            for browser in ({"origin": "http://127.0.0.1:8080"}, {"sec-fetch-site": "same-origin"}):
                headers = {"authorization": f"Bearer {world.keys['admin']}", "content-type": kind, **browser}
                status, _, _ = await exchanged(world.app, method, asked_path(path), headers)
                assert status == 415, (method, path, kind, status)


async def test_a_session_changes_nothing_without_its_csrf_token() -> None:
    world = World()
    people = People(wall=lambda: WALL)
    world.authenticator.know(people)
    people.users["ann"] = UserRecord(name="ann", role="admin")
    token, record = make_session(people.users["ann"], now=WALL, address="", agent="")
    other, _ = make_session(people.users["ann"], now=WALL, address="", agent="")
    people.sessions[record.id] = record
    cookie = {"cookie": f"od_session={token}", "sec-fetch-site": "same-origin"}
    for method, path, right in world.routes():
        if right is None:
            continue
        asked = asked_path(path)
        wrongs = ("", csrf_of(other), csrf_of(token)[:-1], csrf_of(token).swapcase(), token)
        for wrong in wrongs if path == "/api/v1/keys" else wrongs[:1]:
            status, _, _ = await exchanged(
                world.app, method, asked, {**cookie, "x-csrf-token": wrong}, peer=REMOTE
            )
            assert (status == 403) == (method not in ("GET", "HEAD")), (method, path, status)
        right_one = {**cookie, "x-csrf-token": csrf_of(token)}
        status, _, _ = await exchanged(world.app, method, asked, right_one, peer=REMOTE)
        assert status not in (401, 403), (method, path, status)


# ── what is answered ────────────────────────────────────────────────────────────────


async def test_no_answer_is_taken_for_more_than_it_is() -> None:
    world = World()
    hot = {route.path for route in world.app.hot.routes()}
    pages = 0
    for method, path, _ in world.routes():
        for accept in ("*/*", "text/html"):
            for key in (world.keys["admin"], ""):
                headers = {"authorization": f"Bearer {key}" if key else "", "accept": accept}
                status, told, body = await exchanged(
                    world.app, method, asked_path(path), headers, peer=REMOTE
                )
                assert told["x-content-type-options"] == "nosniff", (method, path, status)
                if told.get("content-type", "").startswith("text/html"):
                    pages += 1
                    check_page(told, body.decode())
                elif path not in hot:
                    policy = told["content-security-policy"]
                    if not path.startswith("/ui/"):
                        assert policy == "default-src 'none'; frame-ancestors 'none'", (method, path)
                    assert told["cross-origin-resource-policy"] == "same-origin"
    assert pages >= 8


def check_page(headers: dict[str, str], page: str) -> None:
    policy = headers["content-security-policy"]
    assert {"default-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "object-src 'none'"} <= set(
        policy.split("; ")
    )
    assert "unsafe" not in policy
    assert "*" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=\"/ui/)|<style|\son\w+=|\sstyle=|javascript:", page)
    assert not re.search(r"(src|href|action)=[\"']?(https?:)?//", page)
    assert page.startswith("<!doctype html>")
    assert '<html lang="en">' in page


class OneFile:
    """What batches keep, as far as this test goes: somebody's page."""

    async def content(self, _identity: object, _file: str) -> tuple[FileObject, AsyncIterator[bytes]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"<script>"

        return FileObject(id="f", bytes=8, created_at=0, filename="x.html", purpose="batch"), pieces()


async def test_what_somebody_sent_comes_as_a_download() -> None:
    app = gateway(ScriptedInference(HELLO), batches=OneFile())
    status, told, body = await exchanged(app, "GET", "/v1/files/f/content", {"accept": "text/html"})
    assert (status, body) == (200, b"<script>")
    assert told["content-disposition"] == "attachment"
    assert told["content-type"].startswith("application/jsonl")
    assert (told["x-content-type-options"], told["content-security-policy"][:18]) == (
        "nosniff",
        "default-src 'none'",
    )


def test_what_pages_load_stays_here_and_writes_text_only() -> None:
    folder = files("ollama_distributed.gateway").joinpath("ui")
    assert {one.name for one in folder.iterdir()} == {*ASSETS, "sign-in.html", "account.html"}
    for name in ASSETS:
        text = folder.joinpath(name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|url\(", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|localStorage", text
        )
    script = folder.joinpath("sign-in.js").read_text("utf-8")
    assert json.dumps({"cookie": True})[1:-1].replace('"', "") in script, "no token is ever seen by a script"
