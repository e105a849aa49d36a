"""`client.files` and `client.batches`: for both clients."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ollama_distributed.base.batches import FileObject
from ollama_distributed.client import batch_calls as calls
from ollama_distributed.client.blobs import OnProgress, Upload
from ollama_distributed.client.bundles import Target
from ollama_distributed.client.groups import Group, SyncGroup, run, run_sync


class FormUpload(Upload):
    """A file as the form that `POST /v1/files` takes."""

    def __init__(
        self,
        source: bytes | str | Path,
        filename: str,
        expires_after_s: int | None,
        on_progress: OnProgress | None,
    ) -> None:
        super().__init__(source, on_progress)
        self.boundary = secrets.token_hex(24)
        fields = {"purpose": "batch"}
        if expires_after_s is not None:
            fields |= {
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": str(expires_after_s),
            }
        head = "".join(self._part(f'name="{name}"') + value + "\r\n" for name, value in fields.items())
        plain = "".join(c if c.isprintable() and c not in '"\\' else "_" for c in filename)
        self._head = (head + self._part(f'name="file"; filename="{plain}"')).encode()
        self._tail = f"\r\n--{self.boundary}--\r\n".encode()
        self.content_bytes = self.size_bytes
        self.size_bytes += len(self._head) + len(self._tail)

    def chunks(self) -> Iterator[bytes]:
        yield self._head
        done = 0
        for chunk in self._raw():
            yield chunk
            done += len(chunk)
            if self._on_progress is not None:
                self._on_progress(done, self.content_bytes)
        yield self._tail

    def _part(self, about: str) -> str:
        return f"--{self.boundary}\r\nContent-Disposition: form-data; {about}\r\n\r\n"


def form(
    source: bytes | str | Path,
    filename: str | None,
    expires_after_s: int | None,
    on_progress: OnProgress | None,
) -> FormUpload:
    named = filename or ("requests.jsonl" if isinstance(source, bytes) else Path(source).name)
    return FormUpload(source, named, expires_after_s, on_progress)


class Files(Group):
    """Requests and results of batches: `client.files`."""

    list = run(calls.list_files)
    get = run(calls.get_file)
    delete = run(calls.delete_file)
    content = run(calls.file_content)

    async def upload(
        self,
        source: bytes | str | Path,
        *,
        filename: str | None = None,
        expires_after_s: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> FileObject:
        """Send the requests of a batch: one JSON object a line, as OpenAI has it."""
        upload = form(source, filename, expires_after_s, on_progress)
        return await self._client._run(calls.upload_file(upload.boundary), upload)

    async def save(
        self, file_id: str, to: str | Path | BinaryIO, *, on_progress: OnProgress | None = None
    ) -> int:
        """Write a file's content as it comes; its bytes."""
        return await self._client._save(calls.file_content(file_id), Target(to, on_progress))


class Batches(Group):
    """Requests that nobody waits for, answered in idle slots: `client.batches`."""

    create = run(calls.create_batch)
    list = run(calls.list_batches)
    get = run(calls.get_batch)
    cancel = run(calls.cancel_batch)


class SyncFiles(SyncGroup):
    """Requests and results of batches: `client.files`."""

    list = run_sync(calls.list_files)
    get = run_sync(calls.get_file)
    delete = run_sync(calls.delete_file)
    content = run_sync(calls.file_content)

    def upload(
        self,
        source: bytes | str | Path,
        *,
        filename: str | None = None,
        expires_after_s: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> FileObject:
        """Send the requests of a batch: one JSON object a line, as OpenAI has it."""
        upload = form(source, filename, expires_after_s, on_progress)
        return self._client._run(calls.upload_file(upload.boundary), upload)

    def save(self, file_id: str, to: str | Path | BinaryIO, *, on_progress: OnProgress | None = None) -> int:
        """Write a file's content as it comes; its bytes."""
        return self._client._save(calls.file_content(file_id), Target(to, on_progress))


class SyncBatches(SyncGroup):
    """Requests that nobody waits for, answered in idle slots: `client.batches`."""

    create = run_sync(calls.create_batch)
    list = run_sync(calls.list_batches)
    get = run_sync(calls.get_batch)
    cancel = run_sync(calls.cancel_batch)
