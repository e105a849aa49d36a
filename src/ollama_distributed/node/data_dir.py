"""The folder of one node's state: who it is, which keys it knows, that it runs alone.

node.json    id and name of this node, made on first start
keys.json    hashes of keys (never a secret)
admin.json   the first admin's key, url and CA, for the CLI on this machine (mode 0600)
lock         held while a node runs on this folder
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ollama_distributed.access.keys import KeyRecord, make_admin_key
from ollama_distributed.base.codec import encode_pretty
from ollama_distributed.base.errors import Conflict, DiskFull, Invalid, Unavailable
from ollama_distributed.base.ids import NodeId, random_id

PRIVATE_DIR = 0o700
PRIVATE_FILE = 0o600


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Hold the folder for this process.

    Raises:
        Conflict: another node runs on it.
        Unavailable: the folder cannot be made or written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=PRIVATE_DIR)
        file = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError as failure:
        raise Unavailable(f"the data folder {data_dir} cannot be used: {failure.strerror}") from failure
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            raise Conflict(
                f"a node runs already on {data_dir}; stop it, or start this one with another --data-dir"
            ) from failure
        yield
    finally:
        os.close(file)


def write_private(path: Path, data: dict[str, Any]) -> None:
    """Replace `path` as a whole, readable by its owner only; durable when it returns."""
    staged = path.with_name(f".{path.name}.new")
    try:
        file = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE_FILE)
        with os.fdopen(file, "wb") as out:
            out.write(encode_pretty(data))
            out.flush()
            os.fsync(out.fileno())
        staged.replace(path)
    except OSError as failure:
        staged.unlink(missing_ok=True)
        raise DiskFull(f"{path} cannot be written: {failure.strerror}") from failure


def read_private(path: Path) -> dict[str, Any] | None:
    """The file's content, or None when it is not there.

    Raises:
        Invalid: it is there and damaged; the message says what to do.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as failure:
        raise Invalid(
            f"{path} cannot be read ({failure}); restore it, or move it away to make a new one"
        ) from failure
