"""Chains in a folder: `<node>.jsonl`, one record a line, and `<node>.head`, which record was the last.

Implements `access.audit.ports.ChainDisk`; all work is done in threads, and what changes a file ends
though who asked for it is cancelled: the next change must not meet it. The head is written after the
record: it may be one behind after a crash, and is ahead only if records were cut off.
"""

from __future__ import annotations

import asyncio
import errno
import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from ollama_distributed.access.audit.chain import Checked, Head, check, decode, encode, head_of
from ollama_distributed.base.audit import AuditFilter, AuditRecord
from ollama_distributed.base.errors import DiskFull, Unavailable
from ollama_distributed.cluster.tasks import to_its_end

BLOCK_BYTES = 64 * 1024
_MODE = 0o600
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

R = TypeVar("R")


class AuditDisk:
    def __init__(self, root: Path) -> None:
        self._root = root

    async def head(self, node: str) -> Head:
        return await to_its_end(_apart(lambda: self._mended(node)))

    async def append(self, node: str, records: Sequence[AuditRecord]) -> None:
        await to_its_end(_apart(lambda: self._append(node, records)))

    async def nodes(self) -> Sequence[str]:
        return await _apart(lambda: sorted(path.stem for path in self._root.glob("*.jsonl")))

    async def page(self, nodes: Sequence[str], wanted: AuditFilter) -> Sequence[AuditRecord]:
        def look() -> list[AuditRecord]:
            streams = [self._newest_first(node) for node in nodes if wanted.node in ("", node)]
            found: list[AuditRecord] = []
            for record in heapq.merge(*streams, key=place, reverse=True):
                if record.at < wanted.since or len(found) > wanted.limit:
                    break
                if fits(record, wanted):
                    found.append(record)
            return found

        return await _apart(look)

    async def after(self, node: str, seq: int, most: int) -> Sequence[AuditRecord]:
        def look() -> list[AuditRecord]:
            found: list[AuditRecord] = []
            for record in self._newest_first(node):
                if record.seq <= seq:
                    break
                found.append(record)
            return found[::-1][:most]

        return await _apart(look)

    async def check(self, node: str, expect: Mapping[int, str]) -> Checked:
        def look() -> Checked:
            path = self._path(node)
            last = _read_head(self._head_path(node))
            if not path.exists():
                return check((), node=node, last=last, expect=expect)
            with path.open("rb") as file:
                # Half a line at the end is a write under way, or one that nobody was told of.
                lines = (line[:-1] for line in file if line.endswith(b"\n"))
                checked = check(lines, node=node, last=last, expect=expect)
            if last is None and not checked.fault:
                said = "the note of the last record is gone: records may have been cut off after this one"
                return Checked(head=checked.head, fault=said, fault_seq=checked.head.seq)
            return checked

        return await _apart(look)

    # ── in a thread ─────────────────────────────────────────────────────────────────

    def _mended(self, node: str) -> Head:
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(node)
        if not path.exists():
            if (_read_head(self._head_path(node)) or Head()).seq:
                raise Unavailable(f"{path} is gone; ollama-distributed audit verify tells what is left")
            return Head()
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            line = b""
            at = size
            while at > 0 and b"\n" not in line[:-1]:
                step = min(BLOCK_BYTES, at)
                at -= step
                file.seek(at)
                line = file.read(step) + line
                if not line.endswith(b"\n"):  # of a write that nobody was told of
                    kept = line.rfind(b"\n") + 1
                    if kept or not at:
                        file.truncate(at + kept)
                        line = line[:kept]
        if not line:
            return Head()
        record = decode(line[:-1].rpartition(b"\n")[2])
        if record is None:
            raise Unavailable(f"the last line of {path} is damaged; see ollama-distributed audit verify")
        return head_of(record)

    def _append(self, node: str, records: Sequence[AuditRecord]) -> None:
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(node)
        new = not path.exists()
        if new:
            _write_head(
                self._head_path(node), Head()
            )  # a chain without a note is a fault, from the first record on
        text = b"".join(encode(record) + b"\n" for record in records)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _MODE)
        try:
            before = os.fstat(file).st_size
            try:
                view = memoryview(text)
                while view:
                    view = view[os.write(file, view) :]
                os.fsync(file)
                if new:
                    _sync_folder(self._root)
                _write_head(self._head_path(node), head_of(records[-1]))
            except OSError:
                os.ftruncate(file, before)  # all of it or nothing
                raise
        finally:
            os.close(file)

    def _newest_first(self, node: str) -> Iterator[AuditRecord]:
        """What cannot be read is left out: `check` tells of it."""
        path = self._path(node)
        if not path.exists():
            return
        with path.open("rb") as file:
            at = file.seek(0, os.SEEK_END)
            rest = b""
            while at > 0:
                step = min(BLOCK_BYTES, at)
                at -= step
                file.seek(at)
                lines = (file.read(step) + rest).split(b"\n")
                rest = lines[0]
                for line in reversed(lines[1:]):
                    if line and (record := decode(line)) is not None:
                        yield record
            if rest and (record := decode(rest)) is not None:
                yield record

    def _path(self, node: str) -> Path:
        return self._root / f"{_plain(node)}.jsonl"

    def _head_path(self, node: str) -> Path:
        return self._root / f"{_plain(node)}.head"


def place(record: AuditRecord) -> tuple[float, str, int]:
    """Of a record among those of all nodes."""
    return record.at, record.node, record.seq


def fits(record: AuditRecord, wanted: AuditFilter) -> bool:
    if wanted.before:
        at, _, rest = wanted.before.partition(":")
        node, _, seq = rest.rpartition(":")
        try:
            if place(record) >= (float(at), node, int(seq)):
                return False
        except ValueError:
            return False
    return (
        record.at >= wanted.since
        and wanted.actor in ("", record.actor)
        and wanted.action.lower() in record.action.lower()
        and wanted.object in record.object
        and wanted.result in ("", record.result)
        and wanted.request_id in ("", record.request_id)
    )


def _plain(node: str) -> str:
    if not node or not all(c.isascii() and (c.isalnum() or c in "-_") for c in node):
        raise Unavailable("that is no node's id")
    return node


def _read_head(path: Path) -> Head | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Head)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError:
        return Head(seq=1, hash="")  # it was changed: no record can be that one


def _write_head(path: Path, head: Head) -> None:
    staged = path.with_name(f".{path.name}.new")
    file = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
    with os.fdopen(file, "wb") as out:
        out.write(msgspec.json.encode(head))
        out.flush()
        os.fsync(out.fileno())
    staged.replace(path)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


async def _apart(work: Callable[[], R]) -> R:
    try:
        return await asyncio.to_thread(work)
    except OSError as failure:
        kind = DiskFull if failure.errno in _NO_ROOM else Unavailable
        raise kind(f"the audit log cannot be used: {failure.strerror}") from failure
