"""The folder of one node's state: who it is, which keys it knows, that it runs alone.

node.json    id of this node, made on first start
keys.json    hashes of keys (never a secret)
admin.json   the first admin's key, url and CA, for the CLI on this machine (mode 0600)
lock         held while a node runs on this folder
run/         sockets and secrets of the runners, while they run
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from ollama_distributed.access.keys import KeyRecord, make_admin_key
from ollama_distributed.adapters.durable import PRIVATE_FILE, replace_file
from ollama_distributed.adapters.engines.llamacpp.process import MAX_RUNTIME_PATH
from ollama_distributed.base.codec import encode_pretty
from ollama_distributed.base.errors import Conflict, DiskFull, Invalid, Unavailable
from ollama_distributed.base.ids import NodeId, random_id

PRIVATE_DIR = 0o700

T = TypeVar("T", bound=msgspec.Struct)


class NodeFile(msgspec.Struct, frozen=True, kw_only=True):
    """`node.json`."""

    id: NodeId
    created_at: float


class KeysFile(msgspec.Struct, frozen=True, kw_only=True):
    """`keys.json`."""

    keys: tuple[KeyRecord, ...]


class AdminFile(msgspec.Struct, frozen=True, kw_only=True):
    """`admin.json`: how the CLI on this machine reaches the node as its admin."""

    url: str
    key: str
    ca: str | None = None
    """PEM of the cluster's CA; None where the URL has no TLS, or another CA's certificate."""


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


def in_use(data_dir: Path) -> bool:
    """Whether a node runs on the folder now."""
    try:
        file = os.open(data_dir / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


@contextmanager
def runtime(data_dir: Path) -> Iterator[Path]:
    """A private folder for the runners' sockets; first emptied of what a killed node left.

    Only while the data folder is locked. A UNIX socket's path is short: where the data
    folder's is too long, the folder lies in the system's temporary one.

    Raises:
        Unavailable: it cannot be made, or belongs to somebody else.
    """
    folder = data_dir.absolute() / "run"
    if len(os.fsencode(folder)) > MAX_RUNTIME_PATH:
        digest = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"odr-{os.getuid()}-{digest}"
    try:
        with suppress(FileExistsError):  # from the last start; whose it is is looked at next
            folder.mkdir(mode=PRIVATE_DIR)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise Unavailable(f"{folder} must be a folder of this user; move it away")
        folder.chmod(PRIVATE_DIR)
        for left in folder.iterdir():
            shutil.rmtree(left)
    except OSError as failure:
        raise Unavailable(f"the folder {folder} cannot be used: {failure.strerror}") from failure
    try:
        yield folder
    finally:
        with suppress(OSError):  # a runner that would not end still has its folder
            folder.rmdir()


def node_id(data_dir: Path, now: float) -> NodeId:
    """This node's id; made, kept and the same from then on."""
    path = data_dir / "node.json"
    known = read_file(path, NodeFile)
    if known is None:
        known = NodeFile(id=NodeId(random_id(12)), created_at=now)
        write_file(path, known)
    return known.id


def keys(data_dir: Path, url: str, now: float, name: str = "") -> tuple[KeyRecord, ...]:
    """The keys this node knows; the first start makes the admin's and `admin.json`.

    `url`, where the API listens now, is kept up to date in `admin.json`. `name`: the node's.
    """
    keys_path, admin_path = data_dir / "keys.json", data_dir / "admin.json"
    known = read_file(keys_path, KeysFile)
    admin = read_file(admin_path, AdminFile)
    if known is None:
        key, record = make_admin_key(now, name)
        known, admin = KeysFile(keys=(record,)), AdminFile(url=url, key=key)
        # admin.json first: a crash between the two leaves a key that the next start replaces,
        # never a record whose key nobody has.
        write_file(admin_path, admin)
        write_file(keys_path, known)
    elif admin is not None and admin.url != url:
        write_file(admin_path, msgspec.structs.replace(admin, url=url))
    return known.keys


def trust(data_dir: Path, ca: str) -> None:
    """Let the CLI on this machine trust this CA (PEM) when it speaks to the node."""
    path = data_dir / "admin.json"
    admin = read_file(path, AdminFile)
    if admin is not None and admin.ca != ca:
        write_file(path, msgspec.structs.replace(admin, ca=ca))


def write_file(path: Path, data: msgspec.Struct) -> None:
    """Replace `path` as a whole, readable by its owner only; durable when it returns."""
    write_bytes(path, encode_pretty(data))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_file`. Threads may write the same file at once: each writes all of it.

    Raises:
        DiskFull: it cannot be written; what was there stays.
    """
    try:
        replace_file(path, data)
    except OSError as failure:
        raise DiskFull(f"{path} cannot be written: {failure.strerror}") from failure


def read_file(path: Path, form: type[T]) -> T | None:
    """The file's content, or None when it is not there.

    Raises:
        Invalid: it is there and damaged; the message says what to do.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=form)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as failure:
        raise Invalid(
            f"{path} cannot be read ({failure}); restore it, or move it away to make a new one"
        ) from failure
