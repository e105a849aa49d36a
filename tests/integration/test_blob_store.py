"""The store on a real disk: complete or absent, never outside, Ollama's layout."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.limits import SOON_S

from ollama_distributed.adapters.blobs.folders import STAGING
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.base.errors import (
    BlobNotFound,
    DigestMismatch,
    DiskFull,
    InvalidModel,
    OllamaDistributedError,
    Unavailable,
)
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.scripted import scripted_model

pytestmark = pytest.mark.integration
NAME = ModelName.parse("me/model:tag")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    made = BlobStore(tmp_path / "models")
    yield made
    made.close()


def blob_of(data: bytes) -> BlobId:
    return BlobId(hashlib.sha256(data).hexdigest())


async def chunks(data: bytes, size: int = 1 << 16) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def test_a_blob_is_stored_once_under_ollamas_name(store: BlobStore, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    blob = blob_of(data)
    assert await store.put_blob(blob, chunks(data))
    assert not await store.put_blob(blob, chunks(data))
    assert files(tmp_path / "models") == [f"blobs/{blob.filename}"]
    assert await anyio.Path(store.blob_path(blob)).read_bytes() == data
    assert await store.blob_size(blob) == len(data)
    with pytest.raises(InvalidModel, match="at most"):
        await store.read_blob(blob, 10)


async def test_another_content_is_refused_and_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match='digest mismatch, expected "sha256:'):
        await store.put_blob(blob_of(b"this"), chunks(b"that"))
    assert files(tmp_path / "models") == []
    with pytest.raises(BlobNotFound):
        await store.read_blob(blob_of(b"this"), 10)


async def test_a_client_that_goes_away_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(2 << 20)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await store.put_blob(blob_of(b"x"), broken())
    assert files(tmp_path / "models") == []


async def test_equal_uploads_at_once_make_one_blob(store: BlobStore, tmp_path: Path) -> None:
    data = os.urandom(2 << 20)
    made: list[bool] = []

    async def put() -> None:
        made.append(await store.put_blob(blob_of(data), chunks(data)))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(put)
    assert sorted(made) == [False] * 7 + [True]
    assert files(tmp_path / "models") == [f"blobs/{blob_of(data).filename}"]


async def test_manifests_come_and_go_with_their_folders(store: BlobStore, tmp_path: Path) -> None:
    other = ModelName.parse("me/other")
    await store.write_manifest(NAME, b"one")
    await store.write_manifest(other, b"two")
    stamp = await store.write_manifest(NAME, b"three")
    found = await store.read_manifest(NAME)
    assert found is not None
    assert (found.data, found.stamp) == (b"three", stamp)
    assert set(await store.scan()) == {NAME, other}
    assert await store.delete_manifest(NAME)
    assert not await store.delete_manifest(NAME)
    assert await store.read_manifest(NAME) is None
    assert not (tmp_path / "models/manifests/registry.ollama.ai/me/model").exists()
    assert set(await store.scan()) == {other}


async def test_only_blobs_that_no_manifest_names_are_collected(store: BlobStore, tmp_path: Path) -> None:
    used, damaged, kept, free = [(await store.put_bytes(text))[0] for text in (b"1", b"2", b"3", b"4")]
    foreign = tmp_path / "models/blobs/sha256-partial-0"
    foreign.write_bytes(b"another program's download")
    await store.write_manifest(NAME, f'{{"layers":[{{"digest":"{used}"}}]}}'.encode())
    await store.write_manifest(ModelName.parse("damaged"), f"{{{damaged}".encode())
    assert await store.collect({used, damaged, kept, free}, {kept}) == [free]
    assert await store.blob_size(used) == 1
    assert await store.blob_size(free) is None
    assert foreign.exists()


@pytest.mark.parametrize("where", ["registry.ollama.ai", "registry.ollama.ai/me/model/tag"])
async def test_nothing_is_collected_while_a_manifest_may_hide_behind_a_link(
    store: BlobStore, tmp_path: Path, where: str
) -> None:
    """Ollama follows links under `manifests/`; we do not, so we cannot know what they need."""
    used = (await store.put_bytes(b"1"))[0]
    await store.write_manifest(NAME, str(used).encode())
    path = tmp_path / "models/manifests" / where
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    (tmp_path / "models/manifests/.DS_Store").write_bytes(b"a plain file is no reason to stop")
    assert await store.collect({used}, set()) == []
    path.unlink()
    assert await store.collect({used}, set()) == [used]


def test_leftovers_of_a_crash_are_removed_at_start(tmp_path: Path) -> None:
    root = tmp_path / "models"
    BlobStore(root).close()
    leftover, live = root / STAGING / "staged-dead", root / STAGING / "staged-live"
    for path in (leftover, live):
        path.write_bytes(b"half")
    partial = root / "blobs/sha256-abc-partial"
    partial.write_bytes(b"Ollama's own")
    with live.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        BlobStore(root).close()
    assert not leftover.exists()
    assert live.exists()
    assert partial.exists()


def test_a_killed_writer_leaves_no_blob_and_its_rest_is_removed(tmp_path: Path) -> None:
    script = (
        "import anyio, os, signal, sys; from pathlib import Path\n"
        "from ollama_distributed.adapters.blobs.store import BlobStore\n"
        "from ollama_distributed.models.names import BlobId\n"
        "async def chunks():\n"
        "    yield bytes(4 << 20)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "anyio.run(BlobStore(Path(sys.argv[1])).put_blob, BlobId('0' * 64), chunks())\n"
    )
    root = tmp_path / "models"
    died = subprocess.run([sys.executable, "-c", script, str(root)], check=False, timeout=60)
    assert died.returncode == -9
    assert len(files(root)) == 1
    BlobStore(root).close()
    assert files(root) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_a_full_disk_is_said_and_leaves_nothing(small_disk: Path) -> None:
    store = BlobStore(small_disk / "models")
    try:
        kept, _ = await store.put_bytes(b"kept")
        data = os.urandom(8 << 20)
        with pytest.raises(DiskFull, match="free some space"):
            await store.put_blob(blob_of(data), chunks(data))
        assert files(small_disk) == [f"models/blobs/{kept.filename}"]
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        with pytest.raises(DiskFull):
            await store.write_manifest(NAME, bytes(100_000))
        assert await store.read_manifest(NAME) is None
        assert await store.collect({kept}, set()) == [kept]
        filler.unlink()
        assert await store.put_blob(blob_of(b"x"), chunks(b"x"))
    finally:
        store.close()


async def test_links_in_the_store_lead_nowhere(store: BlobStore, tmp_path: Path) -> None:
    """Security table, rows A and B: a link in a shared store must not become a read or a write."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    blob = blob_of(b"secret")
    root = tmp_path / "models"
    (root / "blobs" / blob.filename).symlink_to(secret)
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "manifests/registry.ollama.ai").symlink_to(outside)
    with pytest.raises(BlobNotFound):
        await store.read_blob(blob, 100)
    assert await store.blob_size(blob) is None
    assert await store.read_manifest(NAME) is None
    with pytest.raises(Unavailable, match="cannot be used"):
        await store.write_manifest(NAME, b"x")
    assert await store.scan() == {}
    assert files(outside) == []
    assert secret.read_bytes() == b"secret"


async def test_a_fifo_in_the_store_does_not_hang(store: BlobStore, tmp_path: Path) -> None:
    blob = blob_of(b"x")
    os.mkfifo(tmp_path / "models/blobs" / blob.filename)
    with pytest.raises(BlobNotFound), anyio.fail_after(SOON_S):
        await store.read_blob(blob, 100)


async def test_headers_are_read_from_blobs(store: BlobStore) -> None:
    data = scripted_model("hello")
    await store.put_blob(blob_of(data), chunks(data))
    header = await store.read_header(blob_of(data))
    assert header.file_size == len(data)
    await store.put_blob(blob_of(b"GGUF"), chunks(b"GGUF"))
    with pytest.raises(InvalidModel, match="cut short"):
        await store.read_header(blob_of(b"GGUF"))


# S-01: whatever the name or digest, every path that is opened lies inside the store.
_opened: list[Any] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
        _opened.append(arguments[0])


sys.addaudithook(_audit)
hostile = st.one_of(
    st.text(max_size=300),
    st.text("./\\:@%\x00-_a", max_size=40),
    st.sampled_from(
        ["..", "../../etc/passwd", "a/../../b", "/etc/passwd", "CON", "%2e%2e/x", "a" * 300, "\uff0e\uff0e/x"]
    ),
    st.from_regex(r"[a-z]{1,5}(/[a-z.]{1,5}){0,4}(:[a-z0-9.]{1,5})?", fullmatch=True),
    st.from_regex(r"sha256[:-][0-9a-fA-F./]{60,68}", fullmatch=True),
)


def test_s01_no_name_or_digest_opens_anything_outside_the_store(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("s01") / "models"
    store = BlobStore(root)

    async def use(text: str) -> None:
        for parse in (ModelName.parse, BlobId.parse):
            try:
                made = parse(text)
            except OllamaDistributedError:
                continue
            if isinstance(made, ModelName):
                await store.read_manifest(made)
                await store.write_manifest(made, b"{}")
                await store.delete_manifest(made)
            else:
                await store.blob_size(made)
                try:
                    await store.read_blob(made, 10)
                except BlobNotFound:
                    continue

    async def use_all(texts: list[str]) -> None:
        for text in texts:
            await use(text)

    @settings(max_examples=100)
    @given(st.lists(hostile, min_size=1, max_size=10))
    def run(texts: list[str]) -> None:
        global _opened
        _opened = []
        try:
            anyio.run(use_all, texts)
            seen = _opened
        finally:
            _opened = None
        for path in seen:
            # Files are reached as one component relative to an open folder of the store.
            assert isinstance(path, str), path
            assert "/" not in path, path
            assert path not in ("..", ""), path

    try:
        run()
        assert {path.name for path in root.iterdir()} == {"blobs", "manifests", STAGING}
        assert files(root) == []
    finally:
        store.close()


async def test_a_large_upload_that_fails_is_removed_off_the_loop(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    unlink = os.unlink

    def noting(path: str, *, dir_fd: int | None = None) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", noting)
    with pytest.raises(DigestMismatch):
        await store.put_blob(BlobId("0" * 64), chunks(b"x" * 3_000_000))
    assert threads == [False]


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """Ollama's own service keeps its models where only its user may write."""
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(Unavailable, match=f"the model store {file} cannot be used: Not a directory$"):
        BlobStore(file)
