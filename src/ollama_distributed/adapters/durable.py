"""Small private files that are replaced as a whole: after a power cut there is the old content or the new."""

from __future__ import annotations

import os
import threading
from pathlib import Path

PRIVATE_FILE = 0o600
"""Secrets and what people asked lie in such files."""

_STRIPES = tuple(threading.Lock() for _ in range(16))
"""Threads may replace the same file at once: each writes all of it. Files that share a lock wait for each
other, which costs one write to the disk."""


def replace_file(path: Path, data: bytes) -> None:
    """Durable when it returns; readable by its owner only, from its first byte on. Blocking.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    staged = path.with_name(f".{path.name}.new")
    with _STRIPES[hash(path) % len(_STRIPES)]:
        try:
            staged.unlink(missing_ok=True)  # left by a crash, perhaps with another mode
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(staged, flags, PRIVATE_FILE), "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            staged.replace(path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Files made in it, renamed and removed stay so."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
