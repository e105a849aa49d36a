"""The catalogue over a real store: create, copy, delete, show, and models made by others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog
from tests.limits import SOON_S

from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.base.errors import (
    BlobNotFound,
    DigestMismatch,
    Invalid,
    InvalidModel,
    InvalidName,
    ModelNotFound,
    OllamaDistributedError,
    Unavailable,
    Unsupported,
)
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.catalog.wire import CreateRequest, details
from ollama_distributed.models.gguf import Header
from ollama_distributed.models.modelfile import parse
from ollama_distributed.models.names import BlobId
from ollama_distributed.models.scripted import CHATML_TEMPLATE, TOOLS_TEMPLATE, scripted_model
from ollama_distributed.models.spec import Architecture, ModelSpec, RemoteModel, StoredMessage
from ollama_distributed.models.templates import RAW

pytestmark = pytest.mark.integration
MODEL = scripted_model("hello")
DIGEST = "sha256:" + hashlib.sha256(MODEL).hexdigest()


class FakeClock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def store(root: Path) -> Iterator[BlobStore]:
    made = BlobStore(root)
    yield made
    made.close()


@pytest.fixture
async def catalog(store: BlobStore, clock: FakeClock) -> Catalog:
    made = Catalog(store, clock=clock)
    await made.start()
    return made


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def made(catalog: Catalog, **fields: Any) -> list[str]:
    return [status.status async for status in catalog.create(CreateRequest(**fields))]


async def upload(catalog: Catalog, data: bytes = MODEL) -> str:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    await catalog.put_blob(digest, chunks(data))
    return digest


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def ollama_store(root: Path, name: str = "registry.ollama.ai/library/pulled/latest", **layers: bytes) -> str:
    """What `ollama pull` leaves, written without our code. Returns the manifest's digest."""

    def blob(data: bytes) -> dict[str, Any]:
        hex_ = hashlib.sha256(data).hexdigest()
        path = root / "blobs" / f"sha256-{hex_}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return {"digest": f"sha256:{hex_}", "size": len(data)}

    config = {
        "model_format": "gguf", "model_family": "llama", "model_families": ["llama"], "model_type": "1K",
        "file_type": "F32", "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            **blob(json.dumps(config).encode()),
        },
        "layers": [
            {"mediaType": f"application/vnd.ollama.image.{kind}", **blob(data)}
            for kind, data in ({"model": MODEL} | layers).items()
        ],
    }
    data = json.dumps(manifest).encode()
    path = root / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


async def test_create_from_a_file_then_everything_else(catalog: Catalog, root: Path) -> None:
    assert not await catalog.has_blob(DIGEST)
    assert await catalog.put_blob(DIGEST, chunks(MODEL))
    assert not await catalog.put_blob(DIGEST, chunks(MODEL))
    statuses = await made(
        catalog,
        model="Mario",
        files={"mario.gguf": DIGEST},
        system="You are Mario.",
        parameters={"temperature": 0.5, "stop": ["x"]},
        messages=[StoredMessage("user", "hi")],
        license="free",
    )
    assert statuses[:3] == [
        "parsing GGUF",
        "using autodetected template chatml",
        f"using existing layer {DIGEST}",
    ]
    assert statuses[-2:] == ["writing manifest", "success"]
    assert all(status.startswith("creating new layer sha256:") for status in statuses[3:-2])

    spec = await catalog.resolve("mario:LATEST")
    assert (spec.display, spec.system, spec.license) == ("Mario:latest", "You are Mario.", ("free",))
    assert spec.parameters == {"temperature": 0.5, "stop": ["x"]}
    assert spec.weights == str(root / "blobs" / DIGEST.replace(":", "-"))
    assert [one.display for one in catalog.list()] == ["Mario:latest"]
    assert details(spec).family == "llama"

    shown = await catalog.show("mario")
    again = parse(shown.modelfile)
    assert (again.sources, again.system) == ((spec.weights,), "You are Mario.")
    assert again.parameters == spec.parameters
    assert "temperature                    0.5" in shown.parameters
    assert shown.model_info["general.architecture"] == "llama"
    assert shown.model_info["tokenizer.ggml.tokens"] is None
    assert shown.tensors
    assert shown.capabilities[0] == "completion"
    assert (await catalog.show("mario", verbose=True)).model_info["tokenizer.ggml.tokens"]

    await catalog.copy("mario", "me/luigi:v1")
    assert (await catalog.resolve("me/luigi:v1")).digest == spec.digest
    await catalog.delete("MARIO")
    assert [one.display for one in catalog.list()] == ["me/luigi:v1"]
    assert (await catalog.resolve("me/luigi:v1")).system == "You are Mario."
    await catalog.delete("me/luigi:v1")
    assert catalog.list() == []
    assert files(root) == set()


async def test_create_from_a_model_inherits_and_replaces(catalog: Catalog, root: Path) -> None:
    await upload(catalog)
    await made(catalog, model="base", files={"m.gguf": DIGEST}, system="one", parameters={"top_k": 5})
    await made(catalog, model="child", from_="base", system="two", parameters={"top_p": 0.5})
    child = await catalog.resolve("child")
    assert child.parameters == {"top_k": 5, "top_p": 0.5, "stop": ["<|im_start|>", "<|im_end|>"]}
    assert (child.system, child.parent) == ("two", "base:latest")
    before = files(root)
    await made(catalog, model="child", from_="base", system="three")
    assert (await catalog.resolve("child")).system == "three"
    assert len(files(root)) == len(before) - 1, "layers that were replaced are collected"
    await catalog.delete("base")
    assert (await catalog.resolve("child")).weights_bytes == len(MODEL)
    await catalog.delete("child")
    assert files(root) == set()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, InvalidName, "invalid model name"),
        ({"model": "../x", "from_": "a"}, InvalidName, "invalid model name"),
        ({"model": "x"}, Invalid, "neither 'from' or 'files' was specified"),
        ({"model": "x", "files": {}}, Invalid, "no files provided to convert"),
        ({"model": "x", "from_": "nope"}, ModelNotFound, "model 'nope' not found"),
        ({"model": "x", "from_": "../.."}, InvalidName, "invalid model name"),
        ({"model": "x", "files": {"a.gguf": ""}}, InvalidName, "invalid digest format"),
        ({"model": "x", "files": {"../a.gguf": DIGEST}}, Invalid, "file path must be relative"),
        ({"model": "x", "files": {"a.gguf": "sha256:" + "0" * 64}}, BlobNotFound, "not found"),
        ({"model": "x", "files": {"a.safetensors": DIGEST}}, Unsupported, "convert it first"),
        ({"model": "x", "files": {"a.gguf": DIGEST}, "quantize": "q4_K_M"}, Unsupported, "cannot quantize"),
        ({"model": "x", "files": {"a.gguf": DIGEST}, "template": "{{ .Nope }}"}, InvalidModel, "TEMPLATE"),
        ({"model": "x", "files": {"a.gguf": DIGEST}, "parameters": {"top_k": "x"}}, Invalid, "top_k"),
        (
            {"model": "x", "files": {"a.gguf": DIGEST}, "adapters": {"b.gguf": DIGEST}},
            InvalidModel,
            "no adapter",
        ),
    ],
)  # fmt: skip
async def test_what_cannot_be_made_is_refused_before_anything_is_written(
    catalog: Catalog, root: Path, fields: dict[str, Any], error: type[OllamaDistributedError], message: str
) -> None:
    await upload(catalog)
    before = files(root)
    with pytest.raises(error, match=message):
        await made(catalog, **fields)
    assert files(root) == before
    assert catalog.list() == []


async def test_cve_2026_7482_a_lying_file_never_becomes_a_model(catalog: Catalog, root: Path) -> None:
    digest = await upload(catalog, MODEL[:-64])
    with pytest.raises(InvalidModel, match="past the end of the file"):
        await made(catalog, model="x", files={"a.gguf": digest})
    digest = await upload(catalog, b"PK\x03\x04 not a model at all")
    with pytest.raises(InvalidModel, match="supplied file was not in GGUF format"):
        await made(catalog, model="x", files={"a.gguf": digest})
    assert not (root / "manifests/registry.ollama.ai").exists()


async def test_errors_have_ollamas_texts(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFound, match=r"^model 'x' not found$"):
        await catalog.resolve("x")
    with pytest.raises(ModelNotFound, match=r"^model '\.\./x' not found$"):
        await catalog.resolve("../x")
    with pytest.raises(ModelNotFound, match=r"^model 'x' not found$"):
        await catalog.delete("x")
    with pytest.raises(InvalidName, match=r'^name "\.\./x" is invalid$'):
        await catalog.delete("../x")
    with pytest.raises(ModelNotFound, match=r'^model "x" not found$'):
        await catalog.copy("x", "y")
    with pytest.raises(InvalidName, match=r'^source ":" is invalid$'):
        await catalog.copy(":", "y")
    with pytest.raises(InvalidName, match=r'^destination ":" is invalid$'):
        await catalog.copy("x", ":")
    with pytest.raises(InvalidName, match=r"^invalid digest format$"):
        await catalog.has_blob("sha256:../../etc/passwd")
    with pytest.raises(DigestMismatch, match=r'^digest mismatch, expected "sha256:'):
        await catalog.put_blob(DIGEST, chunks(b"other"))


async def test_an_existing_ollama_store_is_served(root: Path, store: BlobStore) -> None:
    digest = ollama_store(
        root,
        system=b"be kind",
        params=b'{"stop":["\\u003c|x|\\u003e"],"num_ctx":4096,"future":1}',
        template=b"{{ .Prompt }}",
        license=b"free",
    )
    catalog = Catalog(store)
    await catalog.start()
    spec = await catalog.resolve("pulled")
    assert (spec.digest, spec.system, spec.license) == (digest, "be kind", ("free",))
    assert spec.parameters == {"stop": ["<|x|>"], "num_ctx": 4096}
    assert spec.size_bytes > len(MODEL)
    await made(catalog, model="mine", from_="pulled")
    await catalog.delete("pulled")
    assert (await catalog.resolve("mine")).parameters == spec.parameters


async def test_models_of_another_program_appear_and_go(
    catalog: Catalog, root: Path, clock: FakeClock
) -> None:
    with pytest.raises(ModelNotFound):
        await catalog.resolve("pulled")
    ollama_store(root)
    assert (await catalog.resolve("pulled")).display == "pulled:latest"
    ollama_store(root, "registry.ollama.ai/library/Other/TAG")
    clock.now += 2
    assert (await catalog.resolve("other:tag")).display == "Other:TAG"
    ollama_store(root, "hf.co/me/third/q4")
    await catalog.refresh()
    assert len(catalog.list()) == 3
    (root / "manifests/hf.co/me/third/q4").unlink()
    await catalog.refresh()
    assert len(catalog.list()) == 2
    digest = ollama_store(root, system=b"changed")
    await catalog.refresh()
    assert (await catalog.resolve("pulled")).digest == digest


async def test_a_damaged_model_says_what_is_wrong_and_can_be_deleted(
    root: Path, store: BlobStore, clock: FakeClock
) -> None:
    ollama_store(root, "registry.ollama.ai/library/broken/latest", model=MODEL[:-64])
    ollama_store(root)
    ollama_store(root, "registry.ollama.ai/library/lora/latest", adapter=b"GGUF no adapter at all!!")
    (root / "manifests/registry.ollama.ai/library/junk").mkdir()
    (root / "manifests/registry.ollama.ai/library/junk/latest").write_bytes(b"{")
    catalog = Catalog(store, clock=clock)
    await catalog.start()
    assert [one.display for one in catalog.list()] == ["pulled:latest"]
    with pytest.raises(InvalidModel, match="past the end of the file"):
        await catalog.resolve("broken")
    with pytest.raises(InvalidModel, match="manifest is not valid"):
        await catalog.resolve("junk")
    with pytest.raises(InvalidModel, match="version"):
        await catalog.resolve("lora")
    await catalog.delete("broken")
    await catalog.delete("junk")
    with pytest.raises(ModelNotFound):
        await catalog.resolve("broken")


async def test_names_that_differ_by_case_stay_one_model(catalog: Catalog, root: Path) -> None:
    await upload(catalog)
    await made(catalog, model="Me/Model:One", files={"m.gguf": DIGEST})
    await made(catalog, model="ME/model:ONE", from_="me/model:one", system="x")
    await made(catalog, model="me/MODEL:Two", from_="me/model:one")
    assert {one.display for one in catalog.list()} == {"Me/Model:One", "Me/Model:Two"}
    assert (await catalog.resolve("me/model:one")).system == "x"
    with pytest.raises(InvalidName):
        await catalog.copy("me/model:one", "sha256:" + "0" * 64)


async def test_unknown_go_templates_of_a_stored_model(root: Path, store: BlobStore) -> None:
    bare = scripted_model("hello", chat_template="")
    ollama_store(root, model=bare, template=b"{{ .Unknown }}")
    ollama_store(root, "registry.ollama.ai/library/plain/latest", model=bare)
    catalog = Catalog(store)
    await catalog.start()
    assert "TEMPLATE is not one that this server knows" in (await catalog.resolve("pulled")).template_problem
    assert (await catalog.show("pulled")).template == "{{ .Unknown }}"
    plain = await catalog.resolve("plain")
    assert (plain.chat_template, plain.template_problem) == (RAW, "")


async def test_a_simple_go_template_goes_before_the_files_own_that_offers_no_more(
    root: Path, store: BlobStore
) -> None:
    ollama_store(root, model=scripted_model("hello"), template=b"[{{ .Prompt }}]")
    able = scripted_model("hello", chat_template=TOOLS_TEMPLATE)
    ollama_store(root, "registry.ollama.ai/library/able/latest", model=able, template=b"[{{ .Prompt }}]")
    catalog = Catalog(store)
    await catalog.start()
    assert "'['" in (await catalog.resolve("pulled")).chat_template
    own = await catalog.resolve("able")
    assert (own.chat_template, own.template_problem) == ("", "")
    assert "tools" in own.capabilities


async def test_a_template_that_refuses_some_conversations_is_known(root: Path, store: BlobStore) -> None:
    strict = scripted_model("hello", chat_template="{% if false %}{{ raise_exception('no') }}{% endif %}hi")
    ollama_store(root, model=strict)
    ollama_store(root, "registry.ollama.ai/library/plain/latest", model=scripted_model("hello"))
    catalog = Catalog(store)
    await catalog.start()
    assert (await catalog.resolve("pulled")).template_refuses
    assert not (await catalog.resolve("plain")).template_refuses


async def test_a_stored_template_that_the_files_own_replaces_is_told(root: Path, store: BlobStore) -> None:
    ollama_store(root, model=scripted_model("hello"), template=b"{{ .Unknown }}")
    catalog = Catalog(store)
    with structlog.testing.capture_logs() as logs:
        await catalog.start()
    assert [e["model"] for e in logs if e["event"] == "catalog.template_not_used"] == ["pulled:latest"]
    shown = await catalog.show("pulled")
    assert shown.template == CHATML_TEMPLATE
    assert "{{ .Unknown }}" in shown.modelfile


async def test_a_create_that_is_left_half_way_leaves_nothing(catalog: Catalog, root: Path) -> None:
    await upload(catalog)
    before = files(root)
    statuses = catalog.create(CreateRequest(model="x", files={"m.gguf": DIGEST}, system="never used"))
    async for status in statuses:
        if status.status.startswith("creating new layer"):
            break
    assert files(root) != before
    await statuses.aclose()  # type: ignore[attr-defined]
    assert files(root) == before


async def test_creates_and_deletes_at_once_never_lose_a_shared_blob(catalog: Catalog) -> None:
    await upload(catalog)
    await made(catalog, model="base", files={"m.gguf": DIGEST}, system="shared")

    async def work(index: int) -> None:
        for _ in range(3):
            await made(catalog, model=f"m{index}", from_="base", system="same text for all")
            if index % 2:
                await catalog.delete(f"m{index}")

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for index in range(6):
                group.start_soon(work, index)
    for spec in catalog.list():
        assert (await catalog.show(spec.name)).spec.digest == spec.digest
        if spec.display != "base:latest":
            assert spec.system == "same text for all"


async def test_deleting_the_base_in_the_middle_of_a_create_takes_nothing_from_it(catalog: Catalog) -> None:
    """The weights are shared (pinned while the create runs), and so is a text (stored again)."""
    await upload(catalog)
    await made(catalog, model="base", files={"m.gguf": DIGEST}, system="shared")
    deleted = False
    async for status in catalog.create(CreateRequest(model="child", from_="base", system="shared")):
        if status.status == "writing manifest":
            await catalog.delete("base")
            deleted = True
    assert deleted
    child = await catalog.resolve("child")
    assert (child.system, child.weights_bytes) == ("shared", len(MODEL))
    assert await catalog.has_blob(DIGEST)


class Remote:
    def __init__(self) -> None:
        self.specs: list[ModelSpec] = []
        self.away = False

    async def models(self) -> list[ModelSpec]:
        if self.away:
            raise Unavailable("away")
        return self.specs


async def test_models_of_other_engines_are_listed_too(store: BlobStore) -> None:
    def spec(name: str) -> ModelSpec:
        return ModelSpec(
            name=name,
            display=name,
            digest="0" * 64,
            size_bytes=0,
            modified_at=0.0,
            architecture=Architecture(
                name="", layers=0, context_tokens=0, embedding_length=0, heads=0, kv_heads=0,
                key_length=0, value_length=0, parameters=0, file_type="",
            ),
            remote=RemoteModel(engine="vllm", name=name),
        )  # fmt: skip

    remote = Remote()
    remote.specs = [spec("Qwen/Qwen3-8B"), spec("mine"), spec("odd/deep/name/of/vllm")]
    catalog = Catalog(store, remotes=[remote])
    await catalog.start()
    assert (await catalog.resolve("qwen/qwen3-8b")).remote == RemoteModel(engine="vllm", name="Qwen/Qwen3-8B")
    assert (await catalog.resolve("odd/deep/name/of/vllm")).remote
    assert (await catalog.show("mine")).remote_host == "vllm"
    with pytest.raises(Unsupported, match="delete it there"):
        await catalog.delete("mine")
    await upload(catalog)
    await made(catalog, model="mine", files={"m.gguf": DIGEST})
    assert (await catalog.resolve("mine")).remote is None
    assert len(catalog.list()) == 3
    remote.away = True
    await catalog.refresh()
    assert len(catalog.list()) == 3
    remote.away, remote.specs = False, []
    await catalog.refresh()
    assert [one.display for one in catalog.list()] == ["mine:latest"]


async def test_run_keeps_the_index_fresh(store: BlobStore, root: Path) -> None:
    changed = anyio.Event()
    catalog = Catalog(store, on_change=changed.set)
    with anyio.fail_after(SOON_S):
        async with anyio.create_task_group() as group:
            group.start_soon(catalog.run, 0.01)
            ollama_store(root)
            await changed.wait()
            group.cancel_scope.cancel()
    assert [one.display for one in catalog.list()] == ["pulled:latest"]


async def test_a_refresh_that_reads_an_old_manifest_does_not_bring_it_back(
    catalog: Catalog, store: BlobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is deleted while a refresh reads it: it stays deleted."""
    await upload(catalog)
    await made(catalog, model="m", files={"m.gguf": DIGEST})
    manifest = root / "manifests/registry.ollama.ai/library/m/latest"
    os.utime(manifest, (1.0, 1.0))  # so that the refresh reads it again
    reading, go_on, deleted = anyio.Event(), anyio.Event(), anyio.Event()
    read_header = store.read_header

    async def slow(blob: BlobId, *, verbose: bool = False) -> Header:
        header = await read_header(blob, verbose=verbose)
        reading.set()
        await go_on.wait()
        return header

    async def delete() -> None:
        await catalog.delete("m")
        deleted.set()

    monkeypatch.setattr(store, "read_header", slow)
    with anyio.fail_after(SOON_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(catalog.refresh)
            await reading.wait()
            tasks.start_soon(delete)
            # Deleted, or waiting for its turn.
            while not deleted.is_set() and not catalog._writing.statistics().tasks_waiting:
                await anyio.lowlevel.checkpoint()
            go_on.set()
    assert catalog.list() == []
    with pytest.raises(ModelNotFound):
        await catalog.resolve("m")
