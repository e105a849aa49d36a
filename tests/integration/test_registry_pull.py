"""Pulls in one process: a real store and catalogue, a registry that does as it is told."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.limits import SOON_S
from tests.registries import Answer, Asked, RegistryDouble, ranged

from ollama_distributed.adapters.blobs import partial as partials
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.egress.client import EgressClient, Patience
from ollama_distributed.adapters.registry import download, parts
from ollama_distributed.adapters.registry.service import Registries
from ollama_distributed.adapters.registry.signing import RequestSigner
from ollama_distributed.adapters.registry.sites import RegistrySite, Sites
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import (
    DiskFull,
    Forbidden,
    ModelNotFound,
    OllamaDistributedError,
    RegistryError,
    Unauthenticated,
    Unavailable,
)
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.distribution.downloads import Downloads
from ollama_distributed.distribution.ports import Status
from ollama_distributed.distribution.pulls import Pulls
from ollama_distributed.models.scripted import scripted_model

pytestmark = pytest.mark.integration

DEADLINE_S = SOON_S
PART = 1 << 20


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file of a few MB has many."""
    monkeypatch.setattr(parts, "MIN_PART_BYTES", PART)
    monkeypatch.setattr(parts, "MAX_PART_BYTES", PART)
    monkeypatch.setattr(partials, "NOTE_BYTES", PART // 2)
    monkeypatch.setattr(download, "_WRITE_BYTES", PART // 16)


def big_model(megabytes: int = 6) -> bytes:
    """A model that can be served, with so much behind it that it has several parts."""
    model: bytes = scripted_model("hello")
    return model + random.Random(7).randbytes(megabytes << 20)


class Node:
    """What a node has of all this."""

    def __init__(self, folder: Path, store: BlobStore, catalog: Catalog, pulls: Pulls) -> None:
        self.folder = folder
        self.store = store
        self.catalog = catalog
        self.pulls = pulls

    async def pull(self, name: str) -> list[Status]:
        async with asyncio.timeout(DEADLINE_S):
            return [status async for status in self.pulls.pull(name)]

    def files(self) -> set[str]:
        """Names of everything in blobs/ and staging/."""
        return {
            path.name for part in ("blobs", ".ollama-distributed") for path in (self.folder / part).iterdir()
        }


@asynccontextmanager
async def node(
    folder: Path, server: RegistryDouble, *, streams: int = 4, patience: Patience | None = None, **site: Any
) -> AsyncIterator[Node]:
    async with AsyncExitStack() as stack:
        sites = Sites([RegistrySite(host=server.host, **{"insecure": True, "private": True, **site})])
        egress = await stack.enter_async_context(
            EgressClient(sites.for_egress(), patience=patience or Patience())
        )

        async def take(_: int) -> None:
            return

        registries = Registries(
            egress,
            sites,
            RequestSigner(folder.parent / "key"),
            SystemClock(),
            streams=lambda: streams,
            take=take,
            first_wait_s=0.01,
        )
        store = BlobStore(folder)
        stack.callback(store.close)
        catalog = Catalog(store)
        await catalog.start()
        pulls = await stack.enter_async_context(Pulls(registries, store, catalog, tick_s=0.01))
        yield Node(folder, store, catalog, pulls)


@pytest.fixture
async def server() -> AsyncIterator[RegistryDouble]:
    async with RegistryDouble().listening() as double:
        yield double


async def until(met: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not met():
            await asyncio.sleep(0.005)


# ── as it should be ─────────────────────────────────────────────────────────────────


async def test_a_pull_in_ollamas_words(tmp_path: Path, server: RegistryDouble) -> None:
    content = big_model()
    manifest = server.add("me/big:v1", content, license=b"MIT", system=b"Be brief.")
    async with node(tmp_path / "store", server) as one:
        lines = await one.pull(f"{server.host}/me/big:v1")
        assert (await one.catalog.resolve(f"{server.host}/me/big:v1")).system == "Be brief."
    words = list(dict.fromkeys(line.status for line in lines))
    blobs = [layer.digest for layer in (*manifest.layers, manifest.config)]
    assert words == [
        "pulling manifest",
        *(f"pulling {digest[7:19]}" for digest in blobs),
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    for digest, size in ((layer.digest, layer.size) for layer in (*manifest.layers, manifest.config)):
        of_it = [line for line in lines if line.digest == digest]
        assert [line.completed for line in of_it] == sorted(line.completed for line in of_it)
        assert of_it[-1] == Status(
            status=f"pulling {digest[7:19]}", digest=digest, total=size, completed=size
        )
        assert server.sent[digest] == size, "each byte once"
    path = tmp_path / "store/blobs" / blobs[0].replace(":", "-")
    assert path.read_bytes() == content
    stored = tmp_path / "store/manifests" / server.host / "me/big/v1"
    assert stored.read_bytes() == server.manifests["me/big:v1"]
    assert not list((tmp_path / "store/.ollama-distributed").iterdir())
    asked = [one for one in server.asked if blobs[0] in one.path]
    assert len(asked) == 7
    assert all("range" in one.headers for one in asked)


async def test_what_is_here_is_not_fetched(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/a:1", big_model(1), license=b"MIT")
    async with node(tmp_path / "store", server) as one:
        await one.pull(f"{server.host}/me/a:1")
        before = dict(server.sent)
        server.add("me/a:2", big_model(1), license=b"MIT", system=b"new")
        lines = await one.pull(f"{server.host}/me/a:2")
    assert {
        digest: count for digest, count in server.sent.items() if digest not in before and len(digest) > 9
    }
    model = hashlib.sha256(big_model(1)).hexdigest()
    here = [line for line in lines if line.digest == f"sha256:{model}"]
    assert [(line.total, line.completed) for line in here] == [(len(big_model(1)),) * 2]
    assert server.sent[f"sha256:{model}"] == len(big_model(1))


async def test_a_newer_version_removes_what_only_the_old_one_used(
    tmp_path: Path, server: RegistryDouble
) -> None:
    old = server.add("me/a:1", big_model(1), system=b"old")
    async with node(tmp_path / "store", server) as one:
        await one.pull(f"{server.host}/me/a:1")
        server.add("me/a:1", big_model(1), system=b"new")
        lines = await one.pull(f"{server.host}/me/a:1")
        assert [line.status for line in lines[-3:]] == [
            "writing manifest",
            "removing unused layers",
            "success",
        ]
        assert old.layers[1].blob.filename not in one.files()
        assert old.layers[0].blob.filename in one.files()


async def test_two_who_ask_get_one_download(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    server.hook = lambda asked: (
        ranged(server.blobs[manifest.layers[0].digest], asked)._replace(pause_s=0.01)
        if manifest.layers[0].digest in asked.path
        else None
    )
    name = f"{server.host}/me/big:v1"
    async with node(tmp_path / "store", server) as one:
        both = await asyncio.gather(one.pull(name), one.pull(name.upper()))
    for lines in both:
        assert lines[-1].status == "success"
        assert len([line for line in lines if line.digest == manifest.layers[0].digest]) > 2
    assert server.sent[manifest.layers[0].digest] == manifest.layers[0].size
    assert len([path for path in server.paths() if "/manifests/" in path]) == 1


async def test_a_blob_of_two_models_is_one_fetch(tmp_path: Path, server: RegistryDouble) -> None:
    first = server.add("me/a:1", big_model(), system=b"one")
    server.add("me/b:1", big_model(), system=b"two")
    async with node(tmp_path / "store", server) as one:
        await asyncio.gather(one.pull(f"{server.host}/me/a:1"), one.pull(f"{server.host}/me/b:1"))
        assert {spec.display for spec in one.catalog.list()} == {
            f"{server.host}/me/a:1",
            f"{server.host}/me/b:1",
        }
    assert server.sent[first.layers[0].digest] == first.layers[0].size


async def test_a_server_without_ranges(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    digest = manifest.layers[0].digest
    server.hook = lambda asked: Answer(200, server.blobs[digest]) if digest in asked.path else None
    async with node(tmp_path / "store", server) as one:
        assert (await one.pull(f"{server.host}/me/big:v1"))[-1].status == "success"


async def test_blobs_lie_elsewhere(tmp_path: Path, server: RegistryDouble) -> None:
    """The registry is asked once per blob; credentials do not go to where the blobs lie."""
    manifest = server.add("me/big:v1", big_model())
    async with RegistryDouble().listening() as cdn:
        cdn.blobs = server.blobs
        server.hook = lambda asked: (
            Answer(
                307, headers={"location": f"http://{cdn.host}/blobs/{asked.path.rpartition('/')[2]}?sign=x"}
            )
            if "/blobs/" in asked.path
            else None
        )
        cdn.hook = lambda asked: ranged(cdn.blobs[asked.path.rpartition("/")[2].split("?")[0]], asked)
        server_wants_key(server)
        auth = {"auth_hosts": (cdn.host,), "username": "me", "password": "pass"}
        async with node(tmp_path / "store", server, **auth) as one:
            assert (await one.pull(f"{server.host}/me/big:v1"))[-1].status == "success"
    assert all("authorization" not in asked.headers for asked in cdn.asked)
    of_model = [path for path in server.paths() if manifest.layers[0].digest in path]
    assert len(of_model) == 1
    assert len([path for path in cdn.paths() if manifest.layers[0].digest in path]) == 7


async def test_an_address_that_wore_out_is_asked_for_again(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    digest = manifest.layers[0].digest
    async with RegistryDouble().listening() as cdn:
        tickets = 0

        def redirect(asked: Asked) -> Answer | None:
            nonlocal tickets
            if digest not in asked.path:
                return None
            tickets += 1
            return Answer(307, headers={"location": f"http://{cdn.host}/{tickets}"})

        used: dict[str, int] = {}

        def twice(asked: Asked) -> Answer:
            used[asked.path] = used.get(asked.path, 0) + 1
            return Answer(403, b"expired") if used[asked.path] > 2 else ranged(server.blobs[digest], asked)

        server.hook, cdn.hook = redirect, twice
        async with node(tmp_path / "store", server, streams=1, auth_hosts=(cdn.host,)) as one:
            assert (await one.pull(f"{server.host}/me/big:v1"))[-1].status == "success"
    assert tickets == 4


# ── it goes on ──────────────────────────────────────────────────────────────────────


async def test_parts_that_break_off_go_on(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    digest = manifest.layers[0].digest
    chance = random.Random(3)

    def torn(asked: Asked) -> Answer | None:
        if digest not in asked.path:
            return None
        match chance.randrange(8):
            case 0:
                return Answer(503, b"busy")
            case 1:
                return Answer(500, b"")
            case 2:
                return ranged(server.blobs[digest], asked)._replace(cut=chance.randrange(1, PART))
        return None

    server.hook = torn
    async with node(tmp_path / "store", server) as one:
        assert (await one.pull(f"{server.host}/me/big:v1"))[-1].status == "success"
    lost = server.sent[digest] - manifest.layers[0].size
    assert lost < 10 * (64 << 10), "what came before a break is not fetched again"


async def test_who_leaves_keeps_what_came_and_the_fetch_ends(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    digest = manifest.layers[0].digest
    go_on = asyncio.Event()

    async def half(asked: Asked) -> Answer | None:
        if digest in asked.path and server.sent.get(digest, 0) >= manifest.layers[0].size // 2:
            await go_on.wait()
        return None

    server.hook = half
    name = f"{server.host}/me/big:v1"
    async with node(tmp_path / "store", server) as one:
        async with aclosing(one.pulls.pull(name)) as lines:
            async for line in lines:
                if line.completed >= 2 * PART:
                    break
        await until(lambda: server.open == 0 or go_on.set())
        server.hook = lambda _: None
        sent = server.sent[digest]
        assert not [blob for blob in one.files() if blob.startswith("sha256-")]
        assert (await one.pull(name))[-1].status == "success"
    assert server.sent[digest] - sent < manifest.layers[0].size - PART


async def test_one_of_two_leaves(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    name = f"{server.host}/me/big:v1"
    async with node(tmp_path / "store", server) as one:
        stays = asyncio.create_task(one.pull(name))
        async with aclosing(one.pulls.pull(name)) as lines:
            await anext(lines)
        assert (await stays)[-1].status == "success"
    assert server.sent[manifest.layers[0].digest] == manifest.layers[0].size


async def test_a_stop_keeps_what_came(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    digest = manifest.layers[0].digest
    server.hook = lambda asked: (
        ranged(server.blobs[digest], asked)._replace(pause_s=0.01) if digest in asked.path else None
    )
    name = f"{server.host}/me/big:v1"
    async with node(tmp_path / "store", server) as one:
        pulling = asyncio.create_task(one.pull(name))
        await until(lambda: server.sent.get(digest, 0) > 3 * PART)
    with pytest.raises(Unavailable, match="shutting down"):
        await pulling
    sent = server.sent[digest]
    async with node(tmp_path / "store", server) as again:
        assert (await again.pull(name))[-1].status == "success"
    assert server.sent[digest] - sent <= manifest.layers[0].size - 2 * PART


# ── lies ────────────────────────────────────────────────────────────────────────────


async def refused(one: Node, name: str, error: type[OllamaDistributedError], text: str | None = None) -> None:
    with pytest.raises(error, match=text):
        await one.pull(name)
    assert one.files() == set(), "nothing is left"
    assert one.catalog.list() == []


async def test_wrong_bytes(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    digest = manifest.layers[0].digest
    server.blobs[digest] = server.blobs[digest][:-1] + b"!"
    async with node(tmp_path / "store", server) as one:
        await refused(
            one, f"{server.host}/me/big:v1", RegistryError, "digest mismatch, file must be downloaded"
        )


async def test_wrong_bytes_of_an_earlier_fetch_go(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    blob = manifest.layers[0].blob
    async with node(tmp_path / "store", server) as one:
        async with one.store.partial(blob, manifest.layers[0].size) as half:
            await half.write(0, b"\0" * (2 * PART))
        assert (await one.pull(f"{server.host}/me/big:v1"))[-1].status == "success"
        assert await one.store.blob_size(blob) == manifest.layers[0].size


@pytest.mark.parametrize(
    ("lie", "error", "text"),
    [
        (lambda right: right._replace(body=right.body + b"more", headers={}), RegistryError, "other bytes"),
        (lambda right: right._replace(body=right.body[:-1]), RegistryError, "bytes for a blob"),
        (lambda right: right._replace(body=right.body + b"x", length=-1, cut=1 << 30), RegistryError, "more"),
        (lambda right: right._replace(body=right.body[:-9], length=-1, cut=1 << 30), Unavailable, "early"),
        (
            lambda right: right._replace(headers={"content-range": "bytes 0-1/2"}),
            RegistryError,
            "other bytes",
        ),
        (lambda right: right._replace(status=204), RegistryError, "answers 204"),
        (lambda right: Answer(416), RegistryError, "416"),
        (lambda right: Answer(404), RegistryError, "does not have blob"),
        (lambda right: Answer(401), Unauthenticated, "not known here"),
        (lambda right: Answer(403, b"no"), Forbidden, "403: no"),
        (lambda right: Answer(307, headers={"location": "http://169.254.169.254/"}), Forbidden, "may not be"),
        (lambda right: Answer(307, headers={"location": "file:///etc/shadow"}), Forbidden, "no plain http"),
        (
            lambda right: right._replace(headers={**right.headers, "content-encoding": "gzip"}),
            RegistryError,
            "compressed",
        ),
    ],
)
async def test_answers_to_another_question(
    tmp_path: Path,
    server: RegistryDouble,
    lie: Callable[[Answer], Answer],
    error: type[OllamaDistributedError],
    text: str,
) -> None:
    manifest = server.add("me/big:v1", big_model(2))
    digest = manifest.layers[0].digest

    def lying(asked: Asked) -> Answer | None:
        return lie(server.usual(asked)) if digest in asked.path else None

    server.hook = lying
    async with node(tmp_path / "store", server, streams=2) as one:
        with pytest.raises(error, match=text):
            await one.pull(f"{server.host}/me/big:v1")
        assert not [blob for blob in one.files() if blob.startswith("sha256-")]
        assert one.catalog.list() == []


async def test_a_manifest_that_lies_about_sizes(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model(1))
    right = server.manifests["me/big:v1"]
    size = str(manifest.layers[0].size).encode()
    for wrong in (b"5", str(manifest.layers[0].size + 1).encode()):
        server.manifests["me/big:v1"] = right.replace(size, wrong)
        async with node(tmp_path / "store", server) as one:
            with pytest.raises(RegistryError):
                await one.pull(f"{server.host}/me/big:v1")
            assert one.catalog.list() == []


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"schemaVersion":1}',
        b'{"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:../../x","size":1},"layers":[]}',
        b'{"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256-' + b"0" * 64 + b'","size":-1}}',
        b" " * (5 << 20),
    ],
)
async def test_what_is_no_manifest(tmp_path: Path, server: RegistryDouble, manifest: bytes) -> None:
    server.manifests["me/a:1"] = manifest
    async with node(tmp_path / "store", server) as one:
        await refused(one, f"{server.host}/me/a:1", RegistryError)


async def test_a_manifest_with_another_digest(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/a:1", big_model(1))
    server.hook = lambda asked: (
        Answer(200, server.manifests["me/a:1"], {"docker-content-digest": f"sha256:{'0' * 64}"})
        if "/manifests/" in asked.path
        else None
    )
    async with node(tmp_path / "store", server) as one:
        await refused(one, f"{server.host}/me/a:1", RegistryError, "not the one it names")


async def test_a_model_that_cannot_be_served_leaves_nothing(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/a:1", b"this is no GGUF file at all")
    async with node(tmp_path / "store", server) as one:
        await refused(one, f"{server.host}/me/a:1", OllamaDistributedError, "GGUF")


async def test_a_model_that_cannot_be_served_does_not_replace_the_one_that_can(
    tmp_path: Path, server: RegistryDouble
) -> None:
    server.add("me/a:1", big_model(1))
    async with node(tmp_path / "store", server) as one:
        await one.pull(f"{server.host}/me/a:1")
        server.add("me/a:1", b"this is no GGUF file at all")
        with pytest.raises(OllamaDistributedError, match="GGUF"):
            await one.pull(f"{server.host}/me/a:1")
        assert (await one.catalog.resolve(f"{server.host}/me/a:1")).size_bytes > 1 << 20


async def test_unknown_models_and_registries(tmp_path: Path, server: RegistryDouble) -> None:
    async with node(tmp_path / "store", server) as one:
        await refused(
            one, f"{server.host}/me/none", ModelNotFound, "pull model manifest: file does not exist"
        )
        await refused(one, "evil.example/a/b", Forbidden, "add `{host: evil.example}` to `registries`")
    async with node(tmp_path / "store", server, insecure=False) as other:
        await refused(other, f"http://{server.host}/me/none", Forbidden, "insecure protocol http")
    async with node(tmp_path / "store", server, private=False) as third:
        await refused(third, f"{server.host}/me/none", Forbidden, "`private: true`")
    assert len(server.asked) == 1


async def test_no_room(tmp_path: Path, server: RegistryDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("me/big:v1", big_model(), license=b"MIT")
    async with node(tmp_path / "store", server) as one:
        monkeypatch.setattr(one.store._folders, "room_bytes", lambda: PART)
        await refused(one, f"{server.host}/me/big:v1", DiskFull, "no space left")


# ── who may ─────────────────────────────────────────────────────────────────────────


def server_wants_key(server: RegistryDouble, realm: str = "") -> None:
    """From now on only with a token, which the registry itself gives to `me`."""
    before = server.hook

    def hook(asked: Asked) -> Any:
        if asked.path.startswith("/token"):
            right = asked.headers.get("authorization", "").startswith("Basic bWU6cGFzcw")
            return Answer(200, b'{"token":"t0ken"}') if right else Answer(401, b"who?")
        if asked.headers.get("authorization") != "Bearer t0ken":
            where = realm or f"http://{server.host}/token"
            challenge = f'Bearer realm="{where}",service="test",scope="repository:me/big:pull"'
            return Answer(401, headers={"www-authenticate": challenge})
        return before(asked)

    server.hook = hook


async def test_a_token_is_got_once_and_used(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/big:v1", big_model())
    server_wants_key(server)
    async with node(tmp_path / "store", server, username="me", password="pass") as one:
        assert (await one.pull(f"{server.host}/me/big:v1"))[-1].status == "success"
    tokens = [path for path in server.paths() if path.startswith("/token")]
    assert tokens == ["/token?service=test&scope=repository%3Ame%2Fbig%3Apull"]


async def test_a_wrong_password_is_told(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/big:v1", big_model())
    server_wants_key(server)
    async with node(tmp_path / "store", server, username="me", password="wrong") as one:
        await refused(one, f"{server.host}/me/big:v1", Unauthenticated, "unauthorized: access denied")


async def test_no_credentials_go_to_a_realm_elsewhere(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/big:v1", big_model())
    async with RegistryDouble().listening() as thief:
        for realm in (f"http://{thief.host}/token", "https://evil.example/token", "file:///x", "x"):
            server.hook = lambda _: None
            server_wants_key(server, realm)
            async with node(tmp_path / "store", server, username="me", password="pass") as one:
                await refused(one, f"{server.host}/me/big:v1", Forbidden)
    assert thief.asked == []


async def test_a_realm_elsewhere_that_is_configured(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/big:v1", big_model(1))
    async with RegistryDouble().listening() as auth:
        auth.hook = lambda _: Answer(200, b'{"access_token":"t0ken"}')
        server_wants_key(server, f"http://{auth.host}/token")
        site = {"username": "me", "password": "pass", "auth_hosts": (auth.host,)}
        async with node(tmp_path / "store", server, **site) as one:
            assert (await one.pull(f"{server.host}/me/big:v1"))[-1].status == "success"
    assert len(auth.asked) == 1


async def test_a_signed_request_for_a_token(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/big:v1", big_model(1))
    server_wants_key(server)
    inner = server.hook

    def hook(asked: Asked) -> Any:
        if asked.path.startswith("/token"):
            public = RequestSigner(tmp_path / "key").public_key().split()[1]
            right = asked.headers.get("authorization", "").startswith(f"{public}:")
            return Answer(200, b'{"token":"t0ken"}') if right else Answer(401)
        return inner(asked)

    server.hook = hook
    async with node(tmp_path / "store", server, signed=True) as one:
        assert (await one.pull(f"{server.host}/me/big:v1"))[-1].status == "success"
    token = next(path for path in server.paths() if path.startswith("/token"))
    names = [pair.split("=")[0] for pair in token.partition("?")[2].split("&")]
    assert names == ["nonce", "scope", "service", "ts"]


# ── downloads by id ─────────────────────────────────────────────────────────────────


async def test_downloads_go_on_without_anybody(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/big:v1", big_model())
    name = f"{server.host}/me/big:v1"
    async with (
        node(tmp_path / "store", server) as one,
        Downloads(one.pulls.pull, one.pulls.check, SystemClock()) as downloads,
    ):
        started = downloads.start(name)
        assert downloads.start(name).id == started.id
        await until(lambda: downloads.get(started.id).state != "running")
        done = downloads.get(started.id)
        assert (done.state, done.status, done.error) == ("done", "success", "")
        assert done.total == done.completed == manifest.size_bytes
        missing = downloads.start(f"{server.host}/me/none")
        await until(lambda: downloads.get(missing.id).state == "failed")
        assert downloads.get(missing.id).code == "model_not_found"
        with pytest.raises(Forbidden):
            downloads.start("evil.example/a/b")

        server.add("me/slow:v1", big_model(3))
        server.hook = lambda asked: server.usual(asked)._replace(pause_s=1) if "blobs" in asked.path else None
        slow = downloads.start(f"{server.host}/me/slow:v1")
        await until(lambda: server.open)
        downloads.cancel(slow.id)
        await until(lambda: downloads.get(slow.id).state == "cancelled")
        assert [one.id for one in downloads.list()] == [slow.id, missing.id, started.id]
