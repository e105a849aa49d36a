"""Bundles over a real store: out and in again, from other nodes, hostile, cut short, without room."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.swarm_nodes import swarm

from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.base.errors import (
    Conflict,
    DigestMismatch,
    DiskFull,
    Invalid,
    InvalidModel,
    InvalidName,
    ModelNotFound,
    OllamaDistributedError,
    RegistryError,
    Unavailable,
)
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.distribution.bundles import Bundles
from ollama_distributed.distribution.disk_ports import Survey
from ollama_distributed.distribution.packing import READ_BYTES, Bundle
from ollama_distributed.distribution.room import Boundless, Limits, Rooms
from ollama_distributed.distribution.unpacking import Imported
from ollama_distributed.models.manifest import (
    CONFIG_TYPE,
    MODEL,
    SYSTEM,
    Layer,
    Manifest,
    ModelConfig,
    encode_config,
    encode_manifest,
)
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.scripted import scripted_model

pytestmark = pytest.mark.integration

CHUNK = 64 << 10
"""As an HTTP server gives a body."""
CONFIG = encode_config(ModelConfig(model_format="gguf", model_family="llama"))


def weights(seed: int = 1, more: int = 3 << 20) -> bytes:
    """A model that can be served, with so much behind it."""
    model: bytes = scripted_model("hello")
    return model + random.Random(seed).randbytes(more)


class Nobody:
    """No other node has anything."""

    async def manifest(self, name: ModelName, digest: str) -> bytes:
        raise ModelNotFound(f"no node has model '{name.display}' as {digest}")

    async def read(
        self, name: ModelName, digest: str, blob: BlobId, size: int
    ) -> AsyncGenerator[bytes | memoryview]:
        raise Unavailable(f"no node has {size} bytes of {blob} for {name} as {digest}")
        yield b""


class Node:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = BlobStore(folder)
        self.catalog = Catalog(self.store)
        self.bundles = Bundles(self.store, self.catalog, self.catalog.resolve, Nobody())

    async def hold(self, name: str, *contents: tuple[str, bytes]) -> bytes:
        """Put a model here; returns its manifest."""
        layers = []
        for kind, data in (*contents, (CONFIG_TYPE, CONFIG)):
            blob, _ = await self.store.put_bytes(data)
            layers.append(Layer(media_type=kind, digest=blob.digest, size=len(data)))
        manifest = encode_manifest(Manifest(config=layers[-1], layers=tuple(layers[:-1])))
        await self.catalog.adopt(ModelName.parse(name), manifest)
        return manifest

    async def take(
        self, data: bytes | Sequence[bytes], *, name: str = "", replace: bool = False
    ) -> Sequence[Imported]:
        parts = (
            [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)] if isinstance(data, bytes) else data
        )
        return await self.bundles.unpack(one_by_one(parts), name=name, replace=replace)

    async def pack(self, *names: str) -> bytes:
        return await whole(await self.bundles.pack(names))

    def weights(self, name: str) -> Path:
        spec = next(spec for spec in self.catalog.list() if spec.display.startswith(name))
        assert spec.weights is not None
        return Path(spec.weights)

    def content(self, name: str) -> bytes:
        return self.weights(name).read_bytes()

    def files(self) -> set[str]:
        """Of everything below the store."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


async def parts_of(bundle: Bundle) -> AsyncGenerator[bytes]:
    """Its bytes; fewer than it promises when it ends early."""
    got = 0
    async with aclosing(bundle.chunks()) as chunks:
        async for chunk in chunks:
            got += len(chunk)
            yield chunk
            assert got <= bundle.length
    assert got == bundle.length


async def whole(bundle: Bundle) -> bytes:
    return b"".join([part async for part in parts_of(bundle)])


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


async def one_by_one(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(0)
        yield part


@asynccontextmanager
async def at(folder: Path) -> AsyncIterator[Node]:
    node = Node(folder)
    await node.catalog.start()
    try:
        yield node
    finally:
        node.store.close()


@pytest.fixture
async def maker(tmp_path: Path) -> AsyncIterator[Node]:
    """Holds `a` and `b:v1`, which share their weights, and `c` of its own."""
    async with at(tmp_path / "maker") as node:
        await node.hold("a", (MODEL, weights()))
        await node.hold("me/b:v1", (MODEL, weights()), (SYSTEM, b"Be brief."))
        await node.hold("reg:5000/x/c", (MODEL, weights(2, 10_000)))
        yield node


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with at(tmp_path / "node") as node:
        yield node


# ── there and back ──────────────────────────────────────────────────────────────────


async def test_there_and_back(maker: Node, node: Node) -> None:
    data = await maker.pack("a", "me/b:v1", "reg:5000/x/c", "A")
    assert data == await maker.pack("a", "me/b:v1", "reg:5000/x/c"), "the same models, the same bytes"
    assert len(data) < 2 * len(weights()), "shared weights are in it once"
    done = await node.take(data)
    assert [(one.name, one.state) for one in done] == [
        ("a:latest", "imported"),
        ("me/b:v1", "imported"),
        ("reg:5000/x/c:latest", "imported"),
    ]
    assert node.files() == maker.files()
    for name in ("a", "me/b:v1", "reg:5000/x/c"):
        mine, theirs = await node.catalog.resolve(name), await maker.catalog.resolve(name)
        assert (mine.digest, mine.system, mine.size_bytes) == (
            theirs.digest,
            theirs.system,
            theirs.size_bytes,
        )
    assert {one.digest for one in done} == {spec.digest for spec in maker.catalog.list()}
    assert await node.pack("a", "me/b:v1", "reg:5000/x/c") == data


async def test_the_library_s_tarfile_and_the_layout_agree(maker: Node) -> None:
    data = await maker.pack("a")
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        files = {info.name: reader.extractfile(info).read() for info in reader}  # type: ignore[union-attr]
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (row,) = json.loads(files["index.json"])["manifests"]
    manifest = files["blobs/sha256/" + row["digest"].removeprefix("sha256:")]
    assert len(manifest) == row["size"]
    for name, content in files.items():
        if name.startswith("blobs/sha256/"):
            assert hashlib.sha256(content).hexdigest() == name.rpartition("/")[2]


async def test_what_is_here_is_not_asked_for(maker: Node, node: Node) -> None:
    """All blobs are here: a bundle of the small files alone is enough, and nothing is written."""
    data = await maker.pack("a")
    await node.take(data)
    before = {path: (node.folder / path).stat().st_mtime_ns for path in node.files()}
    thin = without_blobs(data, 4 << 10)
    assert len(thin) < 20_000
    (again,) = await node.take(thin)
    assert again.state == "unchanged"
    assert {path: (node.folder / path).stat().st_mtime_ns for path in node.files()} == before
    (again,) = await node.take(data)
    assert again.state == "unchanged"
    (other,) = await node.take(thin, name="second:v2")
    assert (other.name, other.state) == ("second:v2", "imported")


def without_blobs(data: bytes, most: int) -> bytes:
    """The bundle without its large files."""
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        return rebuilt([(info.name, reader.extractfile(info).read()) for info in reader if info.size <= most])  # type: ignore[union-attr]


def unpacked(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        return [(info.name, reader.extractfile(info).read()) for info in reader]  # type: ignore[union-attr]


def rebuilt(files: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as writer:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            writer.addfile(info, io.BytesIO(content))
    return out.getvalue()


async def test_files_in_the_order_of_other_programs(maker: Node, node: Node) -> None:
    """Index and layout last, names with a leading dot: `tar -C layout -cf x .`"""
    files = [(f"./{name}", content) for name, content in sorted(unpacked(await maker.pack("a", "me/b:v1")))]
    assert files[-1][0] == "./oci-layout"
    done = await node.take(rebuilt(files, tarfile.GNU_FORMAT))
    assert [one.state for one in done] == ["imported", "imported"]
    manifests = {one.digest for one in done}
    assert not [path for path in node.files() if path.rpartition("sha256-")[2] in manifests]
    assert [spec.digest for spec in node.catalog.list()]


async def test_a_name_of_another_model(maker: Node, node: Node) -> None:
    data = await maker.pack("a")
    await node.hold("a", (MODEL, weights(9, 1000)))
    before = node.files()
    with pytest.raises(Conflict, match="is there already"):
        await node.take(data)
    assert node.files() == before
    (one,) = await node.take(data, name="me/new:v1")
    assert one.name == "me/new:v1"
    (one,) = await node.take(data, replace=True)
    assert one.state == "replaced"
    assert not any(blob.endswith(hashlib.sha256(weights(9, 1000)).hexdigest()) for blob in node.files())
    with pytest.raises(Invalid, match="holds 2 models"):
        await node.take(await maker.pack("a", "me/b:v1"), name="x")
    with pytest.raises(InvalidName):
        await node.take(data, name="../x")


async def test_a_bundle_that_names_nothing(maker: Node, node: Node) -> None:
    files = dict(unpacked(await maker.pack("a")))
    index = json.loads(files["index.json"])
    index["manifests"][0]["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    files["index.json"] = json.dumps(index).encode()
    data = rebuilt(list(files.items()))
    with pytest.raises(InvalidModel, match="give it a name"):
        await node.take(data)
    assert node.files() == set()
    assert (await node.take(data, name="a"))[0].name == "a:latest"


async def test_what_is_not_here(node: Node) -> None:
    with pytest.raises(ModelNotFound):
        await node.bundles.pack(["nothing"])
    with pytest.raises(ModelNotFound):
        await node.bundles.pack(["../x"])
    with pytest.raises(Invalid, match="1 to 1024"):
        await node.bundles.pack([])


async def test_a_damaged_blob_ends_the_file_early(maker: Node) -> None:
    damage(maker.weights("a"), READ_BYTES + 5)
    bundle = await maker.bundles.pack(["a"])
    got: list[bytes] = []

    async def read() -> None:
        async for part in parts_of(bundle):
            got.insert(0, part)

    with pytest.raises(DigestMismatch, match="damaged where it lies"):
        await read()
    assert len(weights()) < sum(map(len, got)) < bundle.length


async def test_blobs_stay_while_they_leave(maker: Node) -> None:
    bundle = await maker.bundles.pack(["reg:5000/x/c"])
    first = True
    async for _ in parts_of(bundle):
        if first:
            await maker.catalog.delete("reg:5000/x/c")
        first = False
    assert not first


# ── hostile, broken ─────────────────────────────────────────────────────────────────


async def refused(
    node: Node, data: bytes | Sequence[bytes], kind: type[OllamaDistributedError], says: str
) -> None:
    before = node.files()
    with pytest.raises(kind, match=says):
        await node.take(data)
    assert node.files() == before, "nothing stays"
    assert [spec for spec in node.catalog.list() if "evil" in spec.name] == []


async def test_cut_short_anywhere(maker: Node, node: Node) -> None:
    data = await maker.pack("reg:5000/x/c")
    end = len(data.rstrip(b"\0"))
    chance = random.Random(5)
    for keep in (0, 1, 511, 512, 1024, 2000, *(chance.randrange(end) for _ in range(12))):
        await refused(node, data[:keep], InvalidModel, "cut short|lacks|no oci-layout|no index.json")


async def test_wrong_bytes_anywhere(maker: Node, node: Node) -> None:
    """Whichever byte is another one, nothing wrong becomes visible."""
    data = bytearray(await maker.pack("reg:5000/x/c"))
    files = unpacked(bytes(data))
    chance = random.Random(6)
    for name, content in files:
        begin = bytes(data).index(content)
        at = begin + chance.randrange(len(content))
        kept = data[at]
        data[at] ^= 0x20
        try:
            done = await node.take(bytes(data))
        except OllamaDistributedError:
            assert node.files() == set(), name
        else:  # a letter of a name, or of an annotation's key
            assert name == "index.json"
            for one in done:
                await node.catalog.delete(one.name)
        data[at] = kept


def named_blob(content: bytes, digest: str | None = None) -> tuple[str, bytes]:
    return (f"blobs/sha256/{digest or hashlib.sha256(content).hexdigest()}", content)


def evil(model: bytes, *, size: int | None = None, extra: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """A bundle as `pack` writes it, of a model called evil."""
    blob = BlobId(hashlib.sha256(model).hexdigest())
    config = BlobId(hashlib.sha256(CONFIG).hexdigest())
    manifest = encode_manifest(
        Manifest(
            config=Layer(media_type=CONFIG_TYPE, digest=config.digest, size=len(CONFIG)),
            layers=(Layer(media_type=MODEL, digest=blob.digest, size=len(model) if size is None else size),),
        )
    )
    row = {
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "digest": "sha256:" + hashlib.sha256(manifest).hexdigest(),
        "size": len(manifest),
        "annotations": {"io.containerd.image.name": "evil"},
    }
    return rebuilt(
        [
            ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
            ("index.json", json.dumps({"schemaVersion": 2, "manifests": [row]}).encode()),
            named_blob(manifest),
            named_blob(CONFIG),
            *extra,
            named_blob(model),
        ]
    )


async def test_archives_that_attack(node: Node) -> None:
    """CVE-2024-45436, CVE-2024-6868 and their kind: names that lead outside, links, devices."""
    good = scripted_model("x")
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as writer:
        link = tarfile.TarInfo("blobs/sha256")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        writer.addfile(link)
    await refused(node, out.getvalue(), InvalidModel, "symbolic link")
    for name in ("../../evil", "/etc/cron.d/evil", "blobs/sha256/../../../evil", "blobs/sha256/"):
        says = "no plain name|named by no digest"
        data = evil(good, extra=[(name + "x", b"x")])
        if name == "blobs/sha256/":
            says = "named by no digest"
        await refused(node, data, InvalidModel, says)
    outside = {path.name for path in node.folder.parent.iterdir()}
    assert "evil" not in outside


async def test_bundles_that_lie(node: Node) -> None:
    good = scripted_model("x")
    await refused(node, evil(good, size=len(good) + 1), InvalidModel, "they should be")
    wrong = named_blob(b"something else", hashlib.sha256(b"x").hexdigest())
    await refused(node, evil(good, extra=[wrong, wrong]), InvalidModel, "twice")
    await refused(node, evil(b"no model at all" * 100), InvalidModel, "GGUF")
    files = unpacked(evil(good))
    swapped = [(name, good[:-1] + b"x") if content == good else (name, content) for name, content in files]
    await refused(node, rebuilt(swapped), DigestMismatch, "digest mismatch")
    lacking = [(name, content) for name, content in files if content != good]
    await refused(node, rebuilt(lacking), InvalidModel, "lacks blob")
    await refused(
        node, rebuilt([file for file in files if file[0] != "oci-layout"]), InvalidModel, "no oci-l"
    )
    await refused(
        node, rebuilt([file for file in files if file[0] != "index.json"]), InvalidModel, "no index"
    )
    await refused(node, rebuilt([*files, files[1]]), InvalidModel, "two files index.json")
    manifest = next(file for file in files if file[1].startswith(b'{"schemaVersion":2,"mediaType"'))
    others = [file for file in files if file != manifest]
    await refused(node, rebuilt(others), InvalidModel, "lacks manifest")
    changed = (manifest[0], manifest[1].replace(b"model", b"modle"))
    await refused(node, rebuilt([*files[:2], changed, *others[2:]]), InvalidModel, "another content")


async def test_a_second_model_that_cannot_be_served_takes_the_first_with_it(maker: Node, node: Node) -> None:
    good, bad = unpacked(await maker.pack("reg:5000/x/c")), unpacked(evil(b"no model at all" * 100))
    index = [json.loads(files[1][1]) for files in (good, bad)]
    index[0]["manifests"] += index[1]["manifests"]
    both = dict([*good, *bad]) | {"index.json": json.dumps(index[0]).encode()}
    await refused(node, rebuilt(list(both.items())), InvalidModel, "GGUF")


async def test_a_disk_that_fills_while_names_are_written(
    maker: Node, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second name cannot be written: the first is taken back, what it replaced too."""
    await node.hold("a", (MODEL, weights(9, 1000)))
    before = node.files()
    usual, written = node.store.write_manifest, []

    async def write(name: ModelName, *what: Any) -> object:
        written.append(name)
        if len(written) == 2:
            raise DiskFull("the disk of the model store is full")
        return await usual(name, *what)

    monkeypatch.setattr(node.store, "write_manifest", write)
    data = await maker.pack("a", "me/b:v1")
    with pytest.raises(DiskFull):
        await node.take(data, replace=True)
    assert node.files() == before
    assert (await node.catalog.resolve("a")).weights_bytes == len(weights(9, 1000))


async def test_no_room(maker: Node, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the large files come; a disk that fills up in the middle leaves nothing."""
    data = await maker.pack("a")
    asked: list[bytes] = []

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(data), CHUNK):
            asked.append(data[at : at + CHUNK])
            yield asked[-1]

    async def nothing_to_let_go(_need: int, _survey: Survey) -> bool:
        return False

    async def no_reason() -> str:
        return ""

    quota = Limits(quota_bytes=3 << 20)
    node.store.use(Rooms(node.store.survey, lambda _: quota, nothing_to_let_go, no_reason))
    with pytest.raises(DiskFull, match="no space left"):
        await node.bundles.unpack(parts())
    assert len(asked) == 1
    node.store.use(Boundless())
    assert node.files() == set()

    usual, count = os.write, 0

    def write(file: int, view: memoryview) -> int:
        nonlocal count
        count += len(view)
        if count > 2 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return usual(file, view)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(DiskFull):
        await node.take(data)
    monkeypatch.undo()
    assert node.files() == set()


async def test_who_goes_away_leaves_nothing(maker: Node, node: Node) -> None:
    data = await maker.pack("a")
    stuck = asyncio.Event()

    async def parts() -> AsyncIterator[bytes]:
        yield data[: 2 << 20]
        stuck.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(node.bundles.unpack(parts()))
    await stuck.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert node.files() == set()


async def test_two_at_once_are_one(maker: Node, node: Node) -> None:
    data = await maker.pack("a")
    one, two = await asyncio.gather(node.take(data), node.take(data))
    assert {one[0].state, two[0].state} <= {"imported", "unchanged"}
    assert (await node.catalog.resolve("a")).digest == one[0].digest
    assert await node.pack("a") == data


async def test_a_failed_import_takes_nothing_from_others(maker: Node, node: Node) -> None:
    """A blob that came with it is needed by another model by the time it fails."""
    files = unpacked(await maker.pack("a"))
    data = rebuilt([*files, ("blobs/sha256/none", b"x")])
    unused = len(data) - len(rebuilt(files[-1:])) // 2

    async def parts() -> AsyncIterator[bytes]:
        yield data[:unused]
        yield data[unused : data.rindex(b"blobs/sha256/none")]
        await node.hold("other", (MODEL, weights()))
        yield data[data.rindex(b"blobs/sha256/none") :]

    with pytest.raises(InvalidModel, match="named by no digest"):
        await node.bundles.unpack(parts())
    assert (await node.catalog.resolve("other")).weights_bytes == len(weights())
    assert (await node.pack("other"))[:10] == b"oci-layout"


# ── what other nodes hold ───────────────────────────────────────────────────────────


async def test_models_of_other_nodes_are_passed_on(tmp_path: Path) -> None:
    """Nothing of them stays on the node that is asked."""
    async with swarm(tmp_path) as nodes, at(tmp_path / "there") as there:
        a, b, c = await nodes.add("a"), await nodes.add("b"), await nodes.add("c")
        content = await a.hold("big", 5)
        await b.hold("big", 5)
        data = await whole(await c.bundles.pack(["big"]))
        assert (c.blobs(), c.staged()) == (set(), set())
        await there.take(data)
        assert there.content("big") == content
        with pytest.raises(ModelNotFound):
            await c.bundles.pack(["nothing"])


async def test_a_holder_that_lies_in_the_middle_is_left_for_another(tmp_path: Path) -> None:
    async with swarm(tmp_path) as nodes, at(tmp_path / "there") as there:
        a, b, c = await nodes.add("a"), await nodes.add("b"), await nodes.add("c")
        content = await a.hold("big", 6)
        await b.hold("big", 6)
        got: list[bytes] = []
        lying = False
        async for part in parts_of(await c.bundles.pack(["big"])):
            got.append(part)
            if sum(map(len, got)) > 2 << 20 and not lying:
                lying = True
                zero(a.folder / "blobs")
        await there.take(got)
        assert there.content("big") == content


async def test_all_holders_lie(tmp_path: Path) -> None:
    async with swarm(tmp_path) as nodes:
        a, c = await nodes.add("a"), await nodes.add("c")
        await a.hold("big", 3)
        bundle = await c.bundles.pack(["big"])
        zero(a.folder / "blobs")
        with pytest.raises((DigestMismatch, RegistryError)):
            await whole(bundle)


def zero(folder: Path) -> None:
    """Make all files nothing but zeros, as long as they are."""
    for path in folder.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
