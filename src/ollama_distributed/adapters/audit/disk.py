"""Chains in a folder: the files of their parts (`parts.py`), and `<node>.head`, which record was the last.

Implements `access.audit.ports.ChainDisk`; all work is done in threads, and what changes a file ends
though who asked for it is cancelled: the next change must not meet it. The head is written after the
record: it may be behind after a crash, and is ahead only if records were cut off.
"""

from __future__ import annotations

import asyncio
import errno
import heapq
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from ollama_distributed.access.audit.chain import PART, Checked, Head, check, decode, encode, head_of
from ollama_distributed.access.audit.ports import Part
from ollama_distributed.adapters.audit.parts import (
    first_of,
    lines_of,
    mend,
    newest_first,
    node_of,
    oldest_first,
    part_path,
    parts_of,
)
from ollama_distributed.adapters.durable import PRIVATE_FILE, replace_file, sync_folder
from ollama_distributed.base.audit import AuditFilter, AuditRecord
from ollama_distributed.base.errors import DiskFull, Unavailable
from ollama_distributed.cluster.tasks import to_its_end

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_SEE = "ollama-distributed audit verify tells what is left"

R = TypeVar("R")


class AuditDisk:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._changing = threading.Lock()
        """Who looks for half a line at the end must not meet one that is being written."""
        self._checking = threading.Lock()
        """No part goes from before who checks the chain. Taken before `_changing`."""
        self._read: dict[str, tuple[int, Path, int]] = {}
        """Of `after`: the record that was read last, and where the next one begins."""

    async def head(self, node: str) -> Head:
        return await to_its_end(_apart(lambda: self._alone(lambda: self._mended(node))))

    async def append(self, node: str, records: Sequence[AuditRecord]) -> None:
        await to_its_end(_apart(lambda: self._alone(lambda: self._append(node, records))))

    async def part(self, node: str) -> Part | None:
        def look() -> Part | None:
            for path in reversed(self._parts(node)):
                for record, _ in oldest_first(path):
                    return Part(path.stat().st_size, record.at)
            return None

        return await _apart(look)

    async def oldest(self, node: str) -> Head | None:
        return await _apart(lambda: self._oldest(node))

    async def remove_oldest(self, node: str, seq: int) -> None:
        def remove() -> None:
            with self._checking, self._changing:
                last = self._oldest(node)
                if last is not None and last.seq == seq:
                    self._parts(node)[0].unlink()

        await to_its_end(_apart(remove))

    async def remove(self, node: str) -> None:
        def remove() -> None:
            with self._checking, self._changing:
                for path in (*self._parts(node), self._head_path(node)):
                    path.unlink(missing_ok=True)

        await to_its_end(_apart(remove))

    async def nodes(self) -> Sequence[str]:
        return await _apart(lambda: sorted({node_of(path) for path in self._root.glob("*.jsonl")}))

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
        return await _apart(lambda: self._after(node, seq, most))

    async def check(self, node: str, expect: Mapping[int, str], due_before: float | None = None) -> Checked:
        def look() -> Checked:
            with self._checking:
                last = _read_head(self._head_path(node))  # first: the chain may grow meanwhile
                parts = self._parts(node)
                checked = check(lines_of(parts), node=node, last=last, expect=expect, due_before=due_before)
            if parts and last is None and not checked.fault:
                said = "the note of the last record is gone: records may have been cut off after this one"
                return msgspec.structs.replace(checked, fault=said, fault_seq=checked.head.seq)
            return checked

        return await _apart(look)

    # ── in a thread ─────────────────────────────────────────────────────────────────

    def _alone(self, work: Callable[[], R]) -> R:
        with self._changing:
            return work()

    def _mended(self, node: str) -> Head:
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        noted = _read_head(self._head_path(node)) or Head()
        found = Head()
        for path in reversed(self._parts(node)):
            line = mend(path)
            if line:
                record = decode(line)
                if record is None:
                    raise Unavailable(f"the last line of {path} is damaged; {_SEE}")
                found = head_of(record)
                break
            if first_of(path) > 1:
                path.unlink()  # begun, and nobody was told of it
        if found.seq < noted.seq:
            where = part_path(self._root, node, 1)
            raise Unavailable(f"records after {found.seq} of {where} and its parts are gone; {_SEE}")
        return found

    def _append(self, node: str, records: Sequence[AuditRecord]) -> None:
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        parts = self._parts(node)
        if not parts:
            # A chain without a note is a fault, from the first record on.
            _write_head(self._head_path(node), Head())
        starts = [at for at, record in enumerate(records) if at and record.action == PART]
        for begin, end in zip([0, *starts], [*starts, len(records)], strict=True):
            first = records[begin]
            if not parts or first.action == PART:
                parts.append(part_path(self._root, _plain(node), first.seq))
            self._extend(parts[-1], node, records[begin:end])

    def _extend(self, path: Path, node: str, records: Sequence[AuditRecord]) -> None:
        text = b"".join(encode(record) + b"\n" for record in records)
        new = not path.exists()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            before = os.fstat(file).st_size
            try:
                view = memoryview(text)
                while view:
                    view = view[os.write(file, view) :]
                os.fsync(file)
                if new:
                    sync_folder(self._root)
                _write_head(self._head_path(node), head_of(records[-1]))
            except OSError:
                os.ftruncate(file, before)  # all of it or nothing
                raise
        finally:
            os.close(file)

    def _oldest(self, node: str) -> Head | None:
        parts = self._parts(node)
        for record in newest_first(parts[0]) if len(parts) > 1 else ():
            # What was damaged at its end stays, for people to look at.
            return head_of(record) if record.seq == first_of(parts[1]) - 1 else None
        return None

    def _after(self, node: str, seq: int, most: int) -> list[AuditRecord]:
        parts = self._parts(node)
        parts = parts[max((at for at, path in enumerate(parts) if first_of(path) <= seq + 1), default=0) :]
        read, where, offset = self._read.get(node, (0, Path(), 0))
        if read != seq or not parts or where != parts[0]:
            offset = 0
        found: list[AuditRecord] = []
        for path in parts:
            for record, following in oldest_first(path, offset):
                if record.seq <= seq:
                    continue
                found.append(record)
                self._read[node] = (record.seq, path, following)
                if len(found) == most:
                    return found
            offset = 0
        return found

    def _newest_first(self, node: str) -> Iterator[AuditRecord]:
        for path in reversed(self._parts(node)):
            yield from newest_first(path)

    def _parts(self, node: str) -> list[Path]:
        return parts_of(self._root, _plain(node))

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
    replace_file(path, msgspec.json.encode(head))


async def _apart(work: Callable[[], R]) -> R:
    try:
        return await asyncio.to_thread(work)
    except OSError as failure:
        kind = DiskFull if failure.errno in _NO_ROOM else Unavailable
        raise kind(f"the audit log cannot be used: {failure.strerror}") from failure
