"""Folders and files of one store, reached so that nothing outside it can be touched.

Every path is a chain of single components opened relative to an open folder, with
O_NOFOLLOW: neither `..` nor a symbolic link leads out (security table, rows A and B).
The store's own folders may be links: where they lie is the owner's choice.
Blocking; the store calls it in worker threads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from ollama_distributed.base.errors import DiskFull, InvalidName, Unavailable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What file systems without hard links (exFAT, some network shares) answer."""
_UNUSABLE = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
)
"""The store is read-only or damaged, or a link or file lies where a folder should."""
_MINE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
STAGING = ".ollama-distributed"
"""Ours, beside Ollama's folders and on their file system: Ollama never looks into it, and
a file inside its `blobs/` would count as complete, or be pruned."""
PARTIAL = "partial-"
"""Begins the names of blobs that are being fetched, and of their journals (`partial.py`)."""
JOURNAL = ".journal"
"""Ends the names of the latter."""
DAMAGED = "damaged-"
"""Begins the names of blobs that were found to be something else than their names say."""
_KEEP_PARTIAL_S = 7 * 24 * 3600
"""A fetch that nobody took up again for a week is given up."""


class Folders:
    """Open descriptors of `blobs/`, `manifests/` and our staging folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        with translated(f"the model store {self.root}"):
            with contextlib.suppress(FileExistsError):  # a file: told when it is opened as a folder
                self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
            top = os.open(self.root, _FOLDER)
            try:
                self.blobs = _subfolder(top, "blobs", 0o755)
                self.manifests = _subfolder(top, "manifests", 0o755)
                self.staging = _subfolder(top, STAGING, 0o700)
            finally:
                os.close(top)

    def close(self) -> None:
        for folder in (self.blobs, self.manifests, self.staging):
            os.close(folder)

    @contextlib.contextmanager
    def staged(self) -> Iterator[Staged]:
        """A new file in staging; removed at the end unless it was placed."""
        staged = Staged(self.staging)
        try:
            yield staged
        finally:
            staged.discard()

    def clean_staging(self) -> int:
        """Remove what a crash left. Files of another live process are locked, and stay; so do
        half-fetched blobs that may still be taken up, and damaged ones."""
        removed = 0
        for name in listed(self.staging):
            if name.startswith(DAMAGED) or (name.startswith(PARTIAL) and self._may_go_on(name)):
                continue
            try:
                file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.staging)
            except OSError:
                continue  # a folder or a link: not ours
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                os.unlink(name, dir_fd=self.staging)
                removed += 1
            finally:
                os.close(file)
        return removed

    def _may_go_on(self, name: str) -> bool:
        found = regular_stat(self.staging, name)
        return found is not None and time.time() - found.st_mtime < _KEEP_PARTIAL_S

    def room_bytes(self) -> int:
        """Free for us on the store's disk."""
        with translated():
            found = os.fstatvfs(self.staging)
        return found.f_bavail * found.f_frsize

    @contextlib.contextmanager
    def below(self, folder: int, parts: tuple[str, ...], *, create: bool = False) -> Iterator[int]:
        """The folder at `parts` under `folder`. Raises FileNotFoundError when it is not there."""
        current = os.dup(folder)
        try:
            for part in parts:
                _check(part)
                if create:
                    with contextlib.suppress(FileExistsError):  # opened as a folder, or refused
                        os.mkdir(part, 0o755, dir_fd=current)
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=current)
                os.close(current)
                current = inner
            yield current
        finally:
            os.close(current)


class Staged:
    """A file that is being written. Locked, so that no other process takes it for a leftover."""

    def __init__(self, folder: int) -> None:
        self._folder = folder
        self._name = f"staged-{secrets.token_hex(12)}"
        with translated():
            self._file = os.open(
                self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=folder
            )
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._placed = False

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with translated():
            while view:
                view = view[os.write(self._file, view) :]

    def date(self, modified_at: float) -> None:
        """Seconds since the Unix epoch. Read again, it is the same number."""
        whole = int(modified_at)
        nanoseconds = whole * 10**9 + round((modified_at - whole) * 1e9)
        with translated():
            os.utime(self._file, ns=(nanoseconds, nanoseconds))

    def place(self, folder: int, name: str) -> os.stat_result:
        """Make it durable and complete under its final name, replacing what is there."""
        _check(name)
        with translated():
            os.fsync(self._file)
            os.rename(self._name, name, src_dir_fd=self._folder, dst_dir_fd=folder)
            self._placed = True
            os.fsync(folder)
            return os.fstat(self._file)

    def place_new(self, folder: int, name: str) -> bool:
        """As `place`, but never replaces. False: something is there already."""
        _check(name)
        with translated():
            os.fsync(self._file)
            try:
                os.link(self._name, name, src_dir_fd=self._folder, dst_dir_fd=folder)
            except FileExistsError:
                return False
            except OSError as exc:
                if exc.errno not in NO_LINKS:
                    raise
                # Such a file system cannot say who came first; the content is the same either way.
                os.rename(self._name, name, src_dir_fd=self._folder, dst_dir_fd=folder)
                self._placed = True
            os.fsync(folder)
        return True

    def discard(self) -> None:
        """Close; remove unless it was placed. Idempotent."""
        if self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        if not self._placed:
            with contextlib.suppress(FileNotFoundError):  # somebody tidied up by hand
                os.unlink(self._name, dir_fd=self._folder)


@contextlib.contextmanager
def translated(what: str = "the model store") -> Iterator[None]:
    """Errors of the disk as errors of ours."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise DiskFull("the disk of the model store is full; free some space and try again") from exc
        if exc.errno in _UNUSABLE:
            mine = "; the node's user must be able to write there" if exc.errno in _MINE else ""
            raise Unavailable(f"{what} cannot be used: {os.strerror(exc.errno)}{mine}") from exc
        raise


def listed(folder: int) -> list[str]:
    """Names in an open folder. Reopened first: two threads must not share one position in it."""
    again = os.open(".", _FOLDER, dir_fd=folder)
    try:
        return os.listdir(again)  # noqa: PTH208 (a descriptor has no path)
    finally:
        os.close(again)


def open_file(folder: int, name: str) -> int:
    """Open a regular file for reading. Raises FileNotFoundError for anything else."""
    _check(name)
    # O_NONBLOCK: a FIFO in a shared store must not hang the thread.
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise FileNotFoundError(errno.ENOENT, "no regular file", name) from exc
        raise
    try:
        if not _regular(os.fstat(file)):
            raise FileNotFoundError(errno.ENOENT, "no regular file", name)
    except BaseException:
        os.close(file)
        raise
    return file


def regular_stat(folder: int, name: str) -> os.stat_result | None:
    """Of a regular file; None for anything else, also for a link."""
    _check(name)
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found if _regular(found) else None


def harmless(folder: int, name: str) -> bool:
    """What was not found as expected is no manifest of Ollama's either: it is gone, or a plain
    file where folders are, or a folder where files are; but no link, which Ollama would follow."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return True
    return _regular(found) or (found.st_mode & 0o170000) == 0o040000


def _regular(found: os.stat_result) -> bool:
    return (found.st_mode & 0o170000) == 0o100000


def _subfolder(parent: int, name: str, mode: int) -> int:
    with contextlib.suppress(FileExistsError):  # opened as a folder, or refused
        os.mkdir(name, mode, dir_fd=parent)
    return os.open(name, _FOLDER, dir_fd=parent)


def _check(part: str) -> None:
    """The last line of defence: names come from `ModelName` and `BlobId`, which allow less."""
    if not part or part in (".", "..") or "/" in part or "\x00" in part or len(part) > 255:
        raise InvalidName("invalid model name")
