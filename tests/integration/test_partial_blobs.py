"""Half-fetched blobs: what a crash leaves, what is believed of it, and what is not."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_distributed.adapters.blobs import partial as partials
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.base.errors import Conflict, DigestMismatch, DiskFull, OllamaDistributedError
from ollama_distributed.models.names import BlobId

pytestmark = pytest.mark.integration

CONTENT = random.Random(1).randbytes(100_000)
BLOB = BlobId(hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore(tmp_path)
    yield store
    store.close()


def staging(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".ollama-distributed").iterdir())


def journal(root: Path) -> Path:
    return root / ".ollama-distributed" / f"partial-{BLOB.hex}.journal"


async def fill(store: BlobStore, begin: int = 0, end: int = len(CONTENT)) -> None:
    async with store.partial(BLOB, len(CONTENT)) as coming:
        await coming.write(begin, CONTENT[begin:end])


async def test_what_came_is_there_the_next_time(store: BlobStore, tmp_path: Path) -> None:
    await fill(store, 10, 40_000)
    await fill(store, 50_000, 60_000)
    again = BlobStore(tmp_path)
    async with again.partial(BLOB, len(CONTENT)) as coming:
        assert coming.resumed
        assert coming.here == 39_990 + 10_000
        assert coming.missing() == [(0, 10), (40_000, 50_000), (60_000, len(CONTENT))]
        assert await again.blob_size(BLOB) is None, "nobody sees it yet"
        for begin, end in coming.missing():
            await coming.write(begin, CONTENT[begin:end])
        await coming.finish()
    assert await again.read_blob(BLOB, 1 << 20) == CONTENT
    assert await again.read_range(BLOB, 99_990, 100) == CONTENT[99_990:]
    assert staging(tmp_path) == []
    again.close()


async def test_wrong_bytes_go(store: BlobStore, tmp_path: Path) -> None:
    async with store.partial(BLOB, len(CONTENT)) as coming:
        await coming.write(0, CONTENT[:-1] + b"!")
        with pytest.raises(DigestMismatch, match="must be downloaded again"):
            await coming.finish()
    assert staging(tmp_path) == []
    assert await store.blob_size(BLOB) is None


async def test_a_blob_of_no_bytes(store: BlobStore) -> None:
    empty = BlobId(hashlib.sha256(b"").hexdigest())
    async with store.partial(empty, 0) as coming:
        assert coming.missing() == []
        await coming.finish()
    assert await store.blob_size(empty) == 0


async def test_more_than_the_blob_has_is_refused(store: BlobStore) -> None:
    async with store.partial(BLOB, len(CONTENT)) as coming:
        for offset in (-1, 1, len(CONTENT)):
            with pytest.raises(DigestMismatch):
                await coming.write(offset, CONTENT)


async def test_two_at_once_are_refused(store: BlobStore, tmp_path: Path) -> None:
    other = BlobStore(tmp_path)
    async with store.partial(BLOB, len(CONTENT)):
        for one in (store, other):
            with pytest.raises(Conflict, match="already"):
                async with one.partial(BLOB, len(CONTENT)):
                    pass
    other.close()


async def test_somebody_else_brought_it_meanwhile(store: BlobStore, tmp_path: Path) -> None:
    async with store.partial(BLOB, len(CONTENT)) as coming:
        await coming.write(0, CONTENT)
        await store.put_bytes(CONTENT)
        await coming.finish()
    assert await store.read_blob(BLOB, 1 << 20) == CONTENT
    assert staging(tmp_path) == []


# ── what a journal may say ──────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "here"),
    [
        (b"size 100000\n0 50000\n", 50_000),
        (b"size 100000\n0 50000\n60000 70000", 50_000),
        (b"size 100000\n0 50000\n60000 7", 50_000),
        (b"size 100000\n", 0),
        (b"size 100000", 0),
        (b"", 0),
        (b"size 99999\n0 50000\n", 0),
        (b"size 100000\n0 100001\n", 0),
        (b"size 100000\n5 5\n", 0),
        (b"size 100000\n-5 5\n", 0),
        (b"size 100000\nx y\n", 0),
        (b"\xff\xfe\x00\n", 0),
    ],
)
async def test_journals(store: BlobStore, tmp_path: Path, text: bytes, here: int) -> None:
    await fill(store)
    journal(tmp_path).write_bytes(text)
    async with store.partial(BLOB, len(CONTENT)) as coming:
        assert coming.here == here
        for begin, end in coming.missing():
            await coming.write(begin, CONTENT[begin:end])
    async with store.partial(BLOB, len(CONTENT)) as coming:
        assert coming.missing() == [], "the journal was put in order"
        await coming.finish()


async def test_a_file_of_another_length_is_not_believed(store: BlobStore, tmp_path: Path) -> None:
    await fill(store)
    journal(tmp_path).with_suffix("").write_bytes(CONTENT[:500])
    async with store.partial(BLOB, len(CONTENT)) as coming:
        assert coming.here == 0


async def test_a_lying_journal_is_found_out(store: BlobStore, tmp_path: Path) -> None:
    await fill(store, 0, 10)
    journal(tmp_path).write_text(f"size {len(CONTENT)}\n0 {len(CONTENT)}\n")
    async with store.partial(BLOB, len(CONTENT)) as coming:
        with pytest.raises(DigestMismatch):
            await coming.finish()
    assert await store.blob_size(BLOB) is None
    assert staging(tmp_path) == []


spans = st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 30_000)), max_size=6)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spans, st.integers(0, 400))
def test_any_cut_of_the_journal_is_sound(tmp_path: Path, writes: list[tuple[int, int]], cut: int) -> None:
    """As after a power cut: the journal ends somewhere, and never tells of more than is there."""

    async def check() -> None:
        store = BlobStore(tmp_path)
        for begin, length in writes:
            await fill(store, begin, min(begin + length, len(CONTENT)))
        if journal(tmp_path).exists():
            os.truncate(journal(tmp_path), min(cut, journal(tmp_path).stat().st_size))
        async with store.partial(BLOB, len(CONTENT)) as coming:
            for begin, end in coming.missing():
                await coming.write(begin, CONTENT[begin:end])
            await coming.finish()
        assert await store.read_blob(BLOB, 1 << 20) == CONTENT
        await store.collect([BLOB], [])
        store.close()

    anyio.run(check)


# ── what stays, and how long ────────────────────────────────────────────────────────


async def test_a_start_keeps_what_may_go_on(store: BlobStore, tmp_path: Path) -> None:
    await fill(store, 0, 10)
    kept = staging(tmp_path)
    assert len(kept) == 2
    BlobStore(tmp_path).close()
    assert staging(tmp_path) == kept
    long_ago = time.time() - 8 * 24 * 3600
    for name in kept:
        os.utime(tmp_path / ".ollama-distributed" / name, (long_ago, long_ago))
    BlobStore(tmp_path).close()
    assert staging(tmp_path) == []


async def test_a_start_leaves_alone_what_another_program_fetches(store: BlobStore, tmp_path: Path) -> None:
    async with store.partial(BLOB, len(CONTENT)):
        long_ago = time.time() - 8 * 24 * 3600
        for name in staging(tmp_path):
            os.utime(tmp_path / ".ollama-distributed" / name, (long_ago, long_ago))
        BlobStore(tmp_path).close()
        assert len(staging(tmp_path)) == 2


# ── no room ─────────────────────────────────────────────────────────────────────────


async def test_too_little_room_is_said_before(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store._folders, "room_bytes", lambda: 99_999)
    with pytest.raises(DiskFull, match="no space left"):
        async with store.partial(BLOB, len(CONTENT)):
            pass
    assert staging(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_a_disk_that_fills_up_meanwhile(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partials, "NOTE_BYTES", 1 << 20)
    store = BlobStore(small_disk)
    size = 3 << 20
    blob = BlobId("a" * 64)
    try:
        async with store.partial(blob, size) as coming:
            await coming.write(0, bytes(1 << 20))
            (small_disk / "filler").write_bytes(bytes(2 << 20))
            with pytest.raises(DiskFull):
                await coming.write(1 << 20, bytes(2 << 20))
            assert coming.here == 1 << 20, "what did not fit does not count"
            await coming.discard()
        assert staging(small_disk) == []
        with pytest.raises(OllamaDistributedError):
            async with store.partial(blob, size):
                pass
        assert staging(small_disk) == []
    finally:
        store.close()
