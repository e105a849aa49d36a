"""A blob that is being fetched: its bytes so far, and a journal of which they are.

    partial-<hex>           the bytes, at their places; the rest is a hole
    partial-<hex>.journal   "size N", then a line "begin end" for each run of bytes that is here

A run is written down only after its bytes are on the disk (fdatasync), so that neither a kill
nor a power cut makes the journal tell of bytes that are not there. Bytes that came but were
not written down are fetched again: `NOTE_BYTES`, twice at most. What lies wrong in spite of all that
is found by the digest, and then everything goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import anyio

from ollama_distributed.adapters.blobs.folders import (
    JOURNAL,
    NO_LINKS,
    PARTIAL,
    Folders,
    regular_stat,
    translated,
)
from ollama_distributed.adapters.blobs.runs import Runs
from ollama_distributed.base.errors import BlobNotFound, Conflict, DigestMismatch, DiskFull
from ollama_distributed.models.names import BlobId

T = TypeVar("T")


class InThread(Protocol):
    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


NOTE_BYTES = 4 << 20
"""Between two notes: a kill costs so much, or twice if one was under way; and an fdatasync is due 250
times a GB."""
_HASH_BYTES = 4 << 20
_MAXJOURNAL_BYTES = 64 << 20
"""One line per `NOTE_BYTES`: a journal of this size would tell of terabytes."""


class PartialFile:
    """Implements `distribution.ports.Partial`. The blocking parts run where `in_thread`
    says."""

    def __init__(self, folders: Folders, blob: BlobId, size: int, in_thread: InThread) -> None:
        """To be opened before all else, and closed in any case."""
        self.size = size
        self._folders = folders
        self._blob = blob
        self._name = PARTIAL + blob.hex
        self._in_thread = in_thread
        self._noting = anyio.Lock()
        self._closing = threading.Lock()
        self._data = self._journal = -1
        self._runs = Runs()
        self._fresh = Runs()
        """Came since the last note."""
        self.resumed = False

    def open(self) -> None:
        """Blocking. Raises as `distribution.ports.Blobs.partial`."""
        self._data = self._open(self._name)
        try:
            self._journal = self._open(self._name + JOURNAL)
            self._runs = self._read_journal()
            self._check_room()
            with translated():
                os.ftruncate(self._data, self.size)
        except BaseException:
            self._close()
            raise
        self.resumed = bool(self._runs.total)

    # ── on the loop ─────────────────────────────────────────────────────────────────

    @property
    def here(self) -> int:
        return self._runs.total

    def missing(self) -> list[tuple[int, int]]:
        return self._runs.gaps(self.size)

    async def write(self, offset: int, *data: bytes | memoryview) -> None:
        end = offset + sum(map(len, data))
        if offset < 0 or end > self.size:
            raise DigestMismatch(f"blob {self._blob} has {self.size} bytes; more were sent")

        def put() -> None:
            at = offset
            with translated():
                for part in data:
                    view = memoryview(part)
                    while view:
                        done = os.pwrite(self._data, view, at)
                        view, at = view[done:], at + done

        await self._in_thread(put)
        self._runs.add(offset, end)
        self._fresh.add(offset, end)
        if self._fresh.total >= NOTE_BYTES:
            await self.note()

    async def read(self, offset: int, length: int) -> bytes:
        def get() -> bytes:
            with self._closing:  # its number may be another file's as soon as it is closed
                if self._data < 0:
                    raise BlobNotFound(f'blob "{self._blob}" is not being fetched any more')
                file = os.dup(self._data)
            try:
                with translated():
                    return os.pread(file, length, offset)
            finally:
                os.close(file)

        return await self._in_thread(get)

    async def note(self) -> None:
        """Write down what came since the last time."""
        async with self._noting:
            fresh, self._fresh = self._fresh, Runs()
            if not fresh.total:
                return

            def write_down() -> None:
                with translated():
                    os.fdatasync(self._data)
                    _append(self._journal, "".join(f"{begin} {end}\n" for begin, end in fresh))

            await self._in_thread(write_down)

    async def finish(self) -> None:
        def finish() -> None:
            digest = hashlib.sha256()
            with translated():
                at = 0
                while at < self.size:
                    data = os.pread(self._data, _HASH_BYTES, at)
                    if not data:
                        break
                    digest.update(data)
                    at += len(data)
            if digest.hexdigest() != self._blob.hex:
                self._remove()
                raise DigestMismatch(
                    "digest mismatch, file must be downloaded again: "
                    f"want {self._blob.digest}, got sha256:{digest.hexdigest()}"
                )
            self._place()

        gaps = self.missing()
        assert not gaps, f"blob {self._blob} is not whole: {gaps[:3]}"
        await self._in_thread(finish)

    async def discard(self) -> None:
        await self._in_thread(self._remove)

    async def close(self) -> None:
        """What is here stays, for the next fetch, unless it was placed or removed."""
        try:
            if self._journal >= 0:
                await self.note()
        finally:
            await self._in_thread(self._close)

    # ── in a thread ─────────────────────────────────────────────────────────────────

    def _open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with translated():
            file = os.open(name, flags, 0o644, dir_fd=self._folders.staging)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who waited for the lock may hold a file that has become the blob itself by now.
            named = regular_stat(self._folders.staging, name)
            if named is None or named.st_ino != os.fstat(file).st_ino:
                raise BlockingIOError
        except BlockingIOError as exc:
            os.close(file)
            raise Conflict(f"another program fetches {self._blob} into this store already") from exc
        return file

    def _read_journal(self) -> Runs:
        """What is here, as far as it can be trusted; else everything starts over."""
        with translated():
            held = os.fstat(self._data).st_size
            text = os.pread(self._journal, _MAXJOURNAL_BYTES, 0)
            whole = text[: text.rfind(b"\n") + 1]  # the last line may be torn
            runs = _parse(whole, self.size) if held == self.size else None
            if runs is None:
                os.ftruncate(self._data, 0)
                whole, runs = f"size {self.size}\n".encode(), Runs()
                os.ftruncate(self._journal, 0)
                _append(self._journal, whole.decode())
            elif len(whole) < len(text):
                os.ftruncate(self._journal, len(whole))
        return runs

    def _check_room(self) -> None:
        room = self._folders.room_bytes()
        need = self.size - self._runs.total
        if need > room:
            if not self._runs.total:
                self._remove()
            raise DiskFull(
                f"no space left for blob {self._blob.digest[:19]}: {need} bytes are needed, {room} are free; "
                "free some space and try again"
            )

    def _place(self) -> None:
        with translated():
            os.fsync(self._data)
            # As `folders.Staged.place_new`. Something there already is the same content, from elsewhere.
            here, there = self._folders.staging, self._folders.blobs
            try:
                os.link(self._name, self._blob.filename, src_dir_fd=here, dst_dir_fd=there)
            except FileExistsError:
                pass
            except OSError as exc:
                if exc.errno not in NO_LINKS:
                    raise
                os.rename(self._name, self._blob.filename, src_dir_fd=here, dst_dir_fd=there)
            os.fsync(there)
        self._remove()

    def _remove(self) -> None:
        for name in (self._name + JOURNAL, self._name):
            with contextlib.suppress(FileNotFoundError):  # renamed into its place
                os.unlink(name, dir_fd=self._folders.staging)
        self._close()

    def _close(self) -> None:
        with self._closing:
            for file in (self._data, self._journal):
                if file >= 0:
                    os.close(file)
            self._data = self._journal = -1


def _append(file: int, text: str) -> None:
    os.lseek(file, 0, os.SEEK_END)
    data = memoryview(text.encode())
    while data:
        data = data[os.write(file, data) :]


def _parse(journal: bytes, size: int) -> Runs | None:
    """None: it tells of something else, or is damaged."""
    head, *lines = journal.decode("ascii", "replace").splitlines() or [""]
    if head != f"size {size}":
        return None
    runs = Runs()
    for line in lines:
        begin, _, end = line.partition(" ")
        if not (begin.isdecimal() and end.isdecimal() and int(begin) < int(end) <= size):
            return None
        runs.add(int(begin), int(end))
    return runs
