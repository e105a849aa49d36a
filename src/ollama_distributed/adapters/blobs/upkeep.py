"""Looking after the store's disk: what lies there, what may go, whether it still is what it was.

Blocking; the store calls it in worker threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from ollama_distributed.adapters.blobs.folders import (
    DAMAGED,
    JOURNAL,
    PARTIAL,
    Folders,
    listed,
    open_file,
    regular_stat,
    translated,
)
from ollama_distributed.base.errors import InvalidName
from ollama_distributed.distribution.disk_ports import StoredFile, Survey
from ollama_distributed.models.names import BlobId

_BLOCK_BYTES = 512
"""Unit of `st_blocks` (POSIX)."""


def survey(folders: Folders) -> Survey:
    """One look at everything; a few µs a file."""
    blobs, partials, damaged = (
        dict[BlobId, StoredFile](),
        dict[BlobId, StoredFile](),
        dict[BlobId, StoredFile](),
    )
    other = 0
    for name, found in _files(folders.blobs):
        blob = _blob(name.removeprefix("sha256-")) if name.startswith("sha256-") else None
        if blob is not None:
            blobs[blob] = StoredFile(found.st_size, found.st_mtime)
        else:
            other += found.st_blocks * _BLOCK_BYTES
    for name, found in _files(folders.staging):
        here = StoredFile(found.st_blocks * _BLOCK_BYTES, found.st_mtime)
        if (blob := _blob(name.removeprefix(PARTIAL))) is not None and name.startswith(PARTIAL):
            partials[blob] = here
        elif (blob := _blob(name.removeprefix(DAMAGED))) is not None and name.startswith(DAMAGED):
            damaged[blob] = here
        else:
            other += here.size_bytes
    disk = os.fstatvfs(folders.staging)
    return Survey(
        total_bytes=disk.f_blocks * disk.f_frsize,
        free_bytes=disk.f_bavail * disk.f_frsize,
        blobs=blobs,
        partials=partials,
        damaged=damaged,
        other_bytes=other,
    )


def drop_partial(folders: Folders, blob: BlobId) -> bool:
    """False: somebody fetches it, or it is not there."""
    name = PARTIAL + blob.hex
    try:
        file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folders.staging)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        for one in (name + JOURNAL, name):
            with contextlib.suppress(FileNotFoundError):  # a crash came between the two
                os.unlink(one, dir_fd=folders.staging)
        return True
    finally:
        os.close(file)


def take_away(folders: Folders, blob: BlobId) -> None:
    """Nobody finds the blob any more; the file is kept, for whoever wants to look into it."""
    with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
        os.rename(blob.filename, DAMAGED + blob.hex, src_dir_fd=folders.blobs, dst_dir_fd=folders.staging)
    os.fsync(folders.blobs)
    os.fsync(folders.staging)


def drop_damaged(folders: Folders, blob: BlobId) -> bool:
    try:
        os.unlink(DAMAGED + blob.hex, dir_fd=folders.staging)
    except FileNotFoundError:
        return False
    return True


def open_cold(folders: Folders, blob: BlobId) -> int:
    """Open a blob so that its bytes come from the disk, not from memory where they may still be
    right. Raises FileNotFoundError."""
    file = open_file(folders.blobs, blob.filename)
    forget_pages(file, 0, 0)
    return file


def forget_pages(file: int, offset: int, length: int) -> None:
    """What was read need not stay in memory; what a runner maps does."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with translated():
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)


def _files(folder: int) -> list[tuple[str, os.stat_result]]:
    known = ((name, regular_stat(folder, name)) for name in listed(folder))
    return [(name, found) for name, found in known if found is not None]


def _blob(hex_: str) -> BlobId | None:
    try:
        return BlobId(hex_)
    except InvalidName:
        return None
