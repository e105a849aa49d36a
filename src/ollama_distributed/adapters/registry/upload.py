"""One blob to a registry: begun by POST, sent by PATCH, sealed by PUT.

A registry may take each PATCH itself, one after the other, or send it on to where it keeps
files (307); then the parts' checksums go along with the seal, as Ollama's registry wants it.
Source: Ollama `server/upload.go`; distribution specification, "Pushing blobs".
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable

import anyio
import structlog

from ollama_distributed.adapters.egress.client import EgressClient, Response
from ollama_distributed.adapters.egress.urls import Url, resolve
from ollama_distributed.adapters.registry.session import Session
from ollama_distributed.base.errors import DeadlineExceeded, ModelNotFound, RegistryError, Unavailable
from ollama_distributed.distribution.ports import Blobs, Told
from ollama_distributed.models.manifest import Layer
from ollama_distributed.models.names import ModelName

log = structlog.get_logger()

PART_BYTES = 100_000_000
MAX_PART_BYTES = 1_000_000_000
_PARTS = 16
_READ_BYTES = 1 << 20
TRIES = 6


class Upload:
    """Used once. `wait_s`: before the n-th try of a part, seconds. `sent`: hears of bytes that leave,
    also for the second time."""

    def __init__(
        self,
        session: Session,
        egress: EgressClient,
        layer: Layer,
        source: Blobs,
        told: Told,
        *,
        wait_s: Callable[[int], float],
        sent: Callable[[int], None] = lambda _: None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._session = session
        self._egress = egress
        self._layer = layer
        self._source = source
        self._told = told
        self._wait_s = wait_s
        self._sent = sent
        self._part_bytes = min(MAX_PART_BYTES, max(part_bytes, layer.size // _PARTS))
        self._sums: list[bytes] = []
        """Of the parts that were sent."""
        self._told_bytes = 0

    async def run(self) -> None:
        """Raises as `distribution.ports.Registry`."""
        tries = 0
        while True:
            self._take_back()
            try:
                if await self._is_there():
                    self._tell(self._layer.size)
                else:
                    await self._send()
            except (Unavailable, DeadlineExceeded) as exc:
                # How much of a part arrived is not known: an upload that broke off starts over.
                tries += 1
                if tries >= TRIES:
                    raise
                log.info("registry.upload_again", site=self._session.root.site, error=exc.message)
                await anyio.sleep(self._wait_s(tries))
            else:
                return

    async def _send(self) -> None:
        url = await self._begin()
        if url is None:  # mounted from another model of the same registry
            self._tell(self._layer.size)
            return
        self._sums.clear()
        size = self._layer.size
        for begin in range(0, size, self._part_bytes):
            url = await self._part(url, begin, min(begin + self._part_bytes, size))
        await self._seal(url)

    async def _is_there(self) -> bool:
        try:
            async with self._session.send("HEAD", self._session.url("blobs", self._layer.digest)):
                return True
        except ModelNotFound:
            return False

    async def _begin(self) -> Url | None:
        url = self._session.url("blobs", "uploads", "")
        if self._layer.from_:
            source = ModelName.parse(self._layer.from_)
            url = url.with_query(
                ("mount", self._layer.digest), ("from", f"{source.namespace}/{source.model}")
            )
        async with self._session.send("POST", url) as response:
            if response.status == 201:
                return None
            return _next(response)

    async def _part(self, url: Url, begin: int, end: int) -> Url:
        """Send [begin, end); returns where the next one goes."""
        told_before = self._told_bytes
        headers = [
            ("content-type", "application/octet-stream"),
            ("content-range", f"{begin}-{end - 1}"),
            ("x-redirect-uploads", "1"),
        ]
        part = _Part(self, begin, end)
        length = end - begin
        async with self._session.send(
            "PATCH", url, headers=headers, content=part.content, length=length
        ) as response:
            following = _next(response)
            store = _store(response) if response.status == 307 else None
            sent_by = response.url
        if store is not None:
            self._tell(told_before - self._told_bytes)
            content = part.content()
            async with self._egress.send(
                "PUT", store, headers=headers[:1], content=content, length=length, came_from=sent_by
            ) as response:
                if response.status >= 300:
                    raise Unavailable(f"{store.site} does not take a part: {response.status}")
        self._sums.append(part.checksum.digest())
        return following

    async def read(self, offset: int, length: int) -> bytes:
        """Of the blob, on its way out.

        Raises:
            RegistryError: the file is shorter than the manifest says.
        """
        data = await self._source.read_range(self._layer.blob, offset, length)
        if not data:
            raise RegistryError(f"blob {self._layer.digest} is shorter here than its manifest says")
        self._tell(len(data))
        self._sent(len(data))
        return data

    def _tell(self, count: int) -> None:
        self._told_bytes += count
        self._told(count)

    def _take_back(self) -> None:
        if self._told_bytes:
            self._tell(-self._told_bytes)

    async def _seal(self, url: Url) -> None:
        etag = f"{hashlib.md5(b''.join(self._sums), usedforsecurity=False).hexdigest()}-{len(self._sums)}"
        url = url.with_query(("digest", self._layer.digest), ("etag", etag))
        async with self._session.send("PUT", url, headers=[("content-type", "application/octet-stream")]):
            return


class _Part:
    """The bytes of one part, which may have to be sent more than once, and their checksum."""

    def __init__(self, upload: Upload, begin: int, end: int) -> None:
        self._upload = upload
        self._begin, self._end = begin, end
        self.checksum = hashlib.md5(usedforsecurity=False)

    def content(self) -> AsyncIterator[bytes]:
        self.checksum = hashlib.md5(usedforsecurity=False)
        return self._bytes(self.checksum)

    async def _bytes(self, checksum: hashlib._Hash) -> AsyncIterator[bytes]:
        at = self._begin
        while at < self._end:
            data = await self._upload.read(at, min(_READ_BYTES, self._end - at))
            await anyio.to_thread.run_sync(checksum.update, data)
            yield data
            at += len(data)


def _next(response: Response) -> Url:
    """Where the upload goes on."""
    location = response.headers.get("docker-upload-location") or response.headers.get("location")
    if not location:
        raise RegistryError(f"{response.url.site} does not say where the upload goes on")
    return resolve(response.url, location)


def _store(response: Response) -> Url:
    """Where a part is to be put instead (307)."""
    location = response.headers.get("location")
    if not location:
        raise RegistryError(f"{response.url.site} sends a part on to nowhere")
    return resolve(response.url, location)
