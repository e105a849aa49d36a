"""Pushes: to docker-registry in parts and by mounting, and to a registry that sends parts on (307)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from tests.integration.test_registry_pull import Node, big_model, node
from tests.registries import Answer, Asked, DebianRegistry, RegistryDouble, debian_registry

from ollama_distributed.adapters.egress.client import EgressClient, Site
from ollama_distributed.adapters.egress.urls import parse_url
from ollama_distributed.adapters.registry import service
from ollama_distributed.adapters.registry.upload import Upload
from ollama_distributed.base.errors import Forbidden, RegistryError, Unavailable
from ollama_distributed.distribution.ports import Status
from ollama_distributed.models.manifest import MODEL, Layer, encode_manifest, parse_manifest
from ollama_distributed.models.names import ModelName

pytestmark = pytest.mark.integration

PART = 1 << 20


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "Upload", functools.partial(Upload, part_bytes=PART))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Method and URL of every request that leaves."""
    seen: list[tuple[str, str]] = []
    usual = EgressClient.send

    def noting(self: EgressClient, method: str, url: object, **how: object) -> object:
        seen.append((method, str(url)))
        return usual(self, method, url, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(EgressClient, "send", noting)
    return seen


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRegistry]:
    with debian_registry(tmp_path_factory.mktemp("debian")) as registry:
        yield registry


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def has(one: Node, name: str, content: bytes, *, from_: str = "") -> Layer:
    """Put a model into a node's store; returns its large layer."""
    layer = Layer(media_type=MODEL, digest="", size=len(content), from_=from_)
    layer = msgspec.structs.replace(layer, digest=f"sha256:{hashlib.sha256(content).hexdigest()}")
    double = RegistryDouble()
    manifest = double.add("me/x:v1", content)
    for digest, data in double.blobs.items():
        await one.catalog.put_blob(digest, chunks(data))
    await one.catalog.adopt(
        ModelName.parse(name), encode_manifest(msgspec.structs.replace(manifest, layers=(layer,)))
    )
    return layer


async def pushed(one: Node, name: str) -> list[Status]:
    async with aclosing(one.pulls.push(name)) as lines:
        return [line async for line in lines]


@asynccontextmanager
async def at(folder: Path, host: str, **site: object) -> AsyncIterator[Node]:
    place = RegistryDouble()
    place.port = int(host.rpartition(":")[2])
    async with node(folder, place, **site) as one:
        yield one


# ── Debian's ────────────────────────────────────────────────────────────────────────


async def test_a_large_blob_goes_in_parts(
    tmp_path: Path, debian: DebianRegistry, sent: list[tuple[str, str]]
) -> None:
    name = f"{debian.host}/parts/big:v1"
    async with at(tmp_path / "store", debian.host) as one:
        layer = await has(one, name, big_model())
        lines = await pushed(one, name)
        assert lines[-1].status == "success"
        told = [line.completed for line in lines if line.digest == layer.digest]
        assert told == sorted(told)
        assert told[-1] == layer.size
        parts = [url for method, url in sent if method == "PATCH"]
        assert len(parts) == 1 + -(-layer.size // PART)  # and one of the config
        before = one.folder / "blobs" / layer.blob.filename
        content = before.read_bytes()
    async with at(tmp_path / "other", debian.host) as other:
        await other.pull(name)
        assert (other.folder / "blobs" / layer.blob.filename).read_bytes() == content


async def test_what_another_model_there_has_is_mounted(
    tmp_path: Path, debian: DebianRegistry, sent: list[tuple[str, str]]
) -> None:
    first, second = f"{debian.host}/mount/first:v1", f"{debian.host}/mount/second:v1"
    content = big_model(2)
    async with at(tmp_path / "store", debian.host) as one:
        await has(one, first, content)
        await pushed(one, first)
        sent.clear()
        layer = await has(one, second, content, from_=first)
        lines = await pushed(one, second)
        assert lines[-1].status == "success"
        assert (
            Status(
                status=f"pushing {layer.blob.hex[:12]}",
                digest=layer.digest,
                total=layer.size,
                completed=layer.size,
            )
            in lines
        )
        asked = [url for method, url in sent if method == "POST"]
        assert any("mount=sha256" in url and "from=mount%2Ffirst" in url for url in asked)
        assert len([url for method, url in sent if method == "PATCH"]) == 1, "only the config was sent"
    async with at(tmp_path / "other", debian.host) as other:
        assert (await other.pull(second))[-1].status == "success"


async def test_what_cannot_be_mounted_is_sent(
    tmp_path: Path, debian: DebianRegistry, sent: list[tuple[str, str]]
) -> None:
    """The layer names a model that the registry does not have."""
    name = f"{debian.host}/mount/third:v1"
    async with at(tmp_path / "store", debian.host) as one:
        await has(one, name, big_model(1), from_=f"{debian.host}/mount/nowhere:v1")
        assert (await pushed(one, name))[-1].status == "success"
    assert len([url for method, url in sent if method == "PATCH"]) > 1


# ── one that sends parts on ─────────────────────────────────────────────────────────


class Redirecting:
    """A registry that takes no bytes itself: each PATCH is sent on to `store`, as Ollama's does."""

    def __init__(self, registry: RegistryDouble, store: RegistryDouble) -> None:
        self.registry, self.store = registry, store
        registry.hook, store.hook = self.registry_answers, self.store_answers
        self.uploads = 0
        self.parts: dict[str, bytes] = {}
        """Path at the store -> content."""
        self.sealed: dict[str, str] = {}
        """Digest -> etag."""
        self.refuse = 0
        """So many parts more are answered 503 by the store."""

    def registry_answers(self, asked: Asked) -> Answer | None:
        parts = urlsplit(asked.path)
        match asked.method:
            case "HEAD":
                return Answer(404)
            case "POST":
                self.uploads += 1
                return Answer(202, headers={"location": f"/v2/up/{self.uploads}/0"})
            case "PATCH":
                *_, upload, part = parts.path.split("/")
                here = f"/v2/up/{upload}/{int(part) + 1}"
                there = f"http://{self.store.host}/{upload}/{part}?signature=x"
                return Answer(307, headers={"location": there, "docker-upload-location": here})
            case "PUT" if "/up/" in parts.path:
                query = parse_qs(parts.query)
                self.sealed[query["digest"][0]] = query["etag"][0]
                return Answer(201)
            case "PUT":
                self.registry.manifests["pushed"] = asked.body
                return Answer(201)
        return None

    def store_answers(self, asked: Asked) -> Answer:
        if self.refuse:
            self.refuse -= 1
            return Answer(503)
        self.parts[urlsplit(asked.path).path] = asked.body
        return Answer(200)


@asynccontextmanager
async def redirecting() -> AsyncIterator[Redirecting]:
    async with RegistryDouble().listening() as registry, RegistryDouble().listening() as store:
        yield Redirecting(registry, store)


def etag(content: bytes) -> str:
    sums = [hashlib.md5(content[begin : begin + PART]).digest() for begin in range(0, len(content), PART)]
    return f"{hashlib.md5(b''.join(sums)).hexdigest()}-{len(sums)}"


async def test_parts_go_where_the_registry_sends_them(tmp_path: Path) -> None:
    async with redirecting() as there:
        host = there.registry.host
        async with at(
            tmp_path / "store", host, auth_hosts=(there.store.host,), username="me", password="pass"
        ) as one:
            content = big_model(2)
            layer = await has(one, f"{host}/me/x:v1", content)
            lines = await pushed(one, f"{host}/me/x:v1")
        assert lines[-1].status == "success"
        told = [line.completed for line in lines if line.digest == layer.digest]
        assert told[-1] == layer.size
        upload = min(path.split("/")[1] for path in there.parts)
        stored = [there.parts[f"/{upload}/{part}"] for part in range(-(-layer.size // PART))]
        assert b"".join(stored) == content
        assert there.sealed[layer.digest] == etag(content)
        assert all("authorization" not in asked.headers for asked in there.store.asked)
        assert all(asked.headers["content-length"] == str(len(asked.body)) for asked in there.store.asked)
        assert parse_manifest(there.registry.manifests["pushed"]).layers == (layer,)


async def test_a_store_that_takes_no_part_is_tried_again(tmp_path: Path) -> None:
    async with redirecting() as there:
        host = there.registry.host
        async with at(tmp_path / "store", host, auth_hosts=(there.store.host,)) as one:
            layer = await has(one, f"{host}/me/x:v1", big_model(2))
            there.refuse = 2
            lines = await pushed(one, f"{host}/me/x:v1")
            assert lines[-1].status == "success"
            assert [line.completed for line in lines if line.digest == layer.digest][-1] == layer.size
            assert there.uploads == 4  # three of the model, one of the config
            there.refuse = 1000
            with pytest.raises(Unavailable, match="does not take a part: 503"):
                await pushed(one, f"{host}/me/x:v1")


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("http://169.254.169.254/latest", Forbidden),
        ("http://127.0.0.1:1/", Forbidden),
        ("file:///etc/passwd", Forbidden),
        ("", RegistryError),
    ],
)
async def test_parts_are_sent_nowhere_else(tmp_path: Path, location: str, error: type[Exception]) -> None:
    async with redirecting() as there:
        usual = there.registry.hook
        there.registry.hook = lambda asked: (
            Answer(307, headers={"location": location, "docker-upload-location": "/v2/up/1/1"})
            if asked.method == "PATCH"
            else usual(asked)
        )
        host = there.registry.host
        async with at(tmp_path / "store", host) as one:
            await has(one, f"{host}/me/x:v1", big_model(1))
            with pytest.raises(error):
                await pushed(one, f"{host}/me/x:v1")
        assert there.store.asked == []


async def test_a_public_registry_sends_no_upload_into_a_private_network() -> None:
    """It names a private registry of the settings as the place for a part."""
    async with RegistryDouble().listening() as private:
        known = Site(host="127.0.0.1", port=private.port, insecure=True, private=True)
        async with EgressClient([known]) as client:
            with pytest.raises(Forbidden, match=r"registry\.ollama\.ai sends us to the private"):
                async with client.send(
                    "PUT",
                    parse_url(f"http://{private.host}/v2/a/b"),
                    content=b"x",
                    came_from=parse_url("https://registry.ollama.ai/v2/"),
                ):
                    pass
        assert private.asked == []
