"""Files and batches in a folder. Implements `batches.ports.Disk`; all work is done in threads, and
what changes a file ends though who asked for it is cancelled: the file must not be closed under it.

    files/<id>.json    whose it is, its name and size; written last: no file is there without
    files/<id>.data    its bytes
    work/<batch>/      batch.json, and output.jsonl and errors.jsonl while it is worked on

A result is one line, written and synced before it counts. A node that is killed may leave half a
line at the end: it is cut off when the batch goes on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from ollama_distributed.adapters.durable import replace_file, sync_folder
from ollama_distributed.base.errors import BodyTooLarge, DiskFull, Internal, NotFound
from ollama_distributed.batches.plan import MOST_LINE_BYTES
from ollama_distributed.batches.ports import Which
from ollama_distributed.batches.records import BatchRecord, Done, FileRecord, Result
from ollama_distributed.cluster.tasks import to_its_end

WRITE_BYTES = 1024 * 1024
SOME_LINES, SOME_BYTES = 256, 1024 * 1024
"""Of a file that is read line by line, at a time."""
RESERVE_BYTES, RESERVE_SHARE = 1 << 30, 0.02
"""Left free on the file system, whichever is less: what else this node writes must go on."""
_MODE = 0o600

T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R")

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Written(msgspec.Struct, frozen=True):
    """What is read of a result again."""

    custom_id: str


_results = msgspec.json.Decoder(_Written)


class BatchDisk:
    def __init__(self, root: Path) -> None:
        self._files = root / "files"
        self._work = root / "work"

    # ── files ───────────────────────────────────────────────────────────────────────

    async def files(self) -> Sequence[FileRecord]:
        return await _apart(self._load_files)

    def _load_files(self) -> list[FileRecord]:
        self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._work.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[FileRecord] = []
        whole: set[str] = set()
        for path in sorted(self._files.glob("*.json")):
            record = _read(path, FileRecord)
            if record is not None and self._data(record.file.id).exists():
                found.append(record)
                whole.add(record.file.id)
        for path in self._files.iterdir():
            if path.suffix == ".new" or (path.suffix == ".data" and path.stem not in whole):
                path.unlink()
        return found

    async def receive(self, file_id: str, chunks: AsyncIterator[bytes], *, most_bytes: int) -> int:
        path = self._data(file_id)
        file = await _apart(
            partial(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        )
        size = 0
        try:
            pending = bytearray()
            async for chunk in chunks:
                size += len(chunk)
                if size > most_bytes:
                    raise BodyTooLarge(f"a file has at most {most_bytes} bytes")
                pending += chunk
                if len(pending) >= WRITE_BYTES:
                    data, pending = bytes(pending), bytearray()
                    await to_its_end(_apart(partial(_write_some, file, data)))
            await to_its_end(_apart(partial(_write_some, file, bytes(pending))))
            await to_its_end(_apart(partial(os.fsync, file)))
        finally:
            os.close(file)
        return size

    async def keep(self, record: FileRecord) -> None:
        await to_its_end(
            _apart(partial(replace_file, self._about(record.file.id), msgspec.json.encode(record)))
        )

    async def discard(self, file_id: str) -> None:
        await to_its_end(_apart(partial(self._remove, file_id)))

    async def delete(self, file_id: str) -> None:
        await to_its_end(_apart(partial(self._remove, file_id)))

    def _remove(self, file_id: str) -> None:
        self._about(file_id).unlink(missing_ok=True)
        self._data(file_id).unlink(missing_ok=True)

    async def read(self, file_id: str, offset: int, length: int) -> bytes:
        def read() -> bytes:
            with self._data(file_id).open("rb") as file:
                file.seek(offset)
                return file.read(length)

        return await _apart(read)

    async def lines(self, file_id: str) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        offset, number = 0, 1
        while True:
            some, offset = await _apart(partial(_some_lines, self._data(file_id), offset, number))
            if not some:
                return
            number += len(some)
            yield some

    # ── batches ─────────────────────────────────────────────────────────────────────

    async def batches(self) -> Sequence[BatchRecord]:
        def load() -> list[BatchRecord]:
            self._work.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = [_read(folder / "batch.json", BatchRecord) for folder in sorted(self._work.iterdir())]
            return [record for record in found if record is not None]

        return await _apart(load)

    async def save(self, record: BatchRecord) -> None:
        def save() -> None:
            folder = self._work / record.batch.id
            folder.mkdir(mode=0o700, exist_ok=True)
            replace_file(folder / "batch.json", msgspec.json.encode(record))
            sync_folder(self._work)

        await to_its_end(_apart(save))

    async def forget(self, batch_id: str) -> None:
        await _apart(partial(shutil.rmtree, self._work / batch_id, ignore_errors=True))

    async def done(self, batch_id: str) -> Done:
        def look() -> Done:
            folder = self._work / batch_id
            return Done(
                completed=frozenset(_whole_lines(folder / "output.jsonl")),
                failed=frozenset(_whole_lines(folder / "errors.jsonl")),
            )

        return await to_its_end(_apart(look))

    async def append(self, batch_id: str, results: Iterable[Result]) -> None:
        taken = list(results)

        def append() -> None:
            for which, name in ((False, "output.jsonl"), (True, "errors.jsonl")):
                text = b"".join(
                    msgspec.json.encode(result) + b"\n" for result in taken if result.failed is which
                )
                if text:
                    _append(self._work / batch_id / name, text)

        await to_its_end(_apart(append))

    async def publish(self, batch_id: str, which: Which, record: FileRecord) -> FileRecord | None:
        def publish() -> FileRecord | None:
            source, target = self._work / batch_id / f"{which}.jsonl", self._data(record.file.id)
            if not source.exists():
                return None
            target.unlink(missing_ok=True)  # an earlier try broke off
            os.link(source, target)
            size = target.stat().st_size
            whole = msgspec.structs.replace(record, file=msgspec.structs.replace(record.file, bytes=size))
            replace_file(self._about(record.file.id), msgspec.json.encode(whole))
            source.unlink()
            return whole

        return await to_its_end(_apart(publish))

    def _about(self, file_id: str) -> Path:
        return self._files / f"{file_id}.json"

    def _data(self, file_id: str) -> Path:
        return self._files / f"{file_id}.data"


async def _apart(work: Callable[[], R]) -> R:
    """In a thread; the system's errors in our words."""
    try:
        return await asyncio.to_thread(work)
    except FileNotFoundError as failure:
        raise NotFound("the file is gone") from failure
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise DiskFull(f"batches cannot be written: {failure.strerror}") from failure
        raise Internal(f"batches cannot be kept: {failure.strerror}") from failure


def _write_some(file: int, data: bytes) -> None:
    about = os.fstatvfs(file)
    free, total = about.f_bavail * about.f_frsize, about.f_blocks * about.f_frsize
    if free - len(data) < min(RESERVE_BYTES, int(total * RESERVE_SHARE)):
        raise DiskFull("the disk is nearly full; delete files or models first")
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _read(path: Path, form: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=form)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as failure:
        log.warning("batch.record_unreadable", path=str(path), error=str(failure))
        return None


def _append(path: Path, text: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _MODE)
    try:
        before = os.fstat(file).st_size
        try:
            _write_some(file, text)
            os.fsync(file)
        except (OSError, DiskFull):
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)


def _whole_lines(path: Path) -> list[str]:
    """The `custom_id` of each; half a line at the end is cut off."""
    found: list[str] = []
    try:
        with path.open("r+b") as file:
            end = 0
            for line in file:
                try:
                    custom_id = _results.decode(line).custom_id
                except msgspec.MsgspecError:
                    custom_id = ""
                if not custom_id or not line.endswith(b"\n"):
                    file.truncate(end)  # what comes after it is asked again
                    break
                end += len(line)
                found.append(custom_id)
    except FileNotFoundError:
        pass
    return found


def _some_lines(path: Path, offset: int, number: int) -> tuple[list[tuple[int, bytes]], int]:
    """Lines from `offset` on, and where the next one begins."""
    some: list[tuple[int, bytes]] = []
    taken = 0
    with path.open("rb") as file:
        file.seek(offset)
        while len(some) < SOME_LINES and taken < SOME_BYTES:
            line = file.readline(MOST_LINE_BYTES + 2)
            if not line:
                break
            rest = line
            while len(rest) == MOST_LINE_BYTES + 2 and not rest.endswith(b"\n"):
                rest = file.readline(MOST_LINE_BYTES + 2)
            some.append((number + len(some), line.removesuffix(b"\n").removesuffix(b"\r")))
            taken += len(line)
        return some, file.tell()
