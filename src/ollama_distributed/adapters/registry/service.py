"""Registries as `distribution/` sees them: implements `distribution.ports.Registry`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from ollama_distributed.adapters.egress.client import EgressClient
from ollama_distributed.adapters.registry.download import Download
from ollama_distributed.adapters.registry.parts import is_answer_to, range_header
from ollama_distributed.adapters.registry.session import Session
from ollama_distributed.adapters.registry.signing import RequestSigner
from ollama_distributed.adapters.registry.sites import Sites
from ollama_distributed.adapters.registry.upload import Upload
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import ModelNotFound, RegistryError
from ollama_distributed.distribution.ports import Blobs, Partial, Told
from ollama_distributed.models.manifest import MANIFEST_TYPE, MAX_MANIFEST_BYTES, Layer
from ollama_distributed.models.names import BlobId, ModelName

OCI_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_SESSIONS = 256
"""Models whose tokens are kept; the oldest goes."""
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 16.0


class Registries:
    """`streams`: parts of one blob at once; `take`: the rate limit, awaited with each number of
    bytes that came; `sent`: hears of those that leave; `draw`: a number in [0, 1) for the jitter of
    retries."""

    def __init__(
        self,
        egress: EgressClient,
        sites: Sites,
        signer: RequestSigner,
        clock: Clock,
        *,
        streams: Callable[[], int],
        take: Callable[[int], Awaitable[None]],
        sent: Callable[[int], None] = lambda _: None,
        draw: Callable[[], float] = random.random,
        first_wait_s: float = _FIRST_WAIT_S,
    ) -> None:
        self._egress = egress
        self._sites = sites
        self._signer = signer
        self._clock = clock
        self._streams = streams
        self._take = take
        self._sent = sent
        self._draw = draw
        self._first_wait_s = first_wait_s
        self._sessions: dict[str, Session] = {}

    def check(self, name: ModelName) -> None:
        self._session(name)

    async def manifest(self, name: ModelName) -> bytes:
        session = self._session(name)
        accept = [("accept", f"{MANIFEST_TYPE}, {OCI_MANIFEST_TYPE}")]
        try:
            async with session.send("GET", session.url("manifests", name.tag), headers=accept) as response:
                data = await response.read(MAX_MANIFEST_BYTES)
                told = response.headers.get("docker-content-digest", "")
        except ModelNotFound as exc:
            raise ModelNotFound("pull model manifest: file does not exist") from exc
        if told.startswith("sha256:") and told != f"sha256:{hashlib.sha256(data).hexdigest()}":
            raise RegistryError(f"{session.root.site} sends a manifest that is not the one it names")
        return data

    async def fetch(self, name: ModelName, blob: BlobId, into: Partial) -> None:
        download = Download(
            self._session(name),
            self._egress,
            blob,
            into,
            streams=self._streams(),
            take=self._take,
            wait_s=self._wait_s,
        )
        try:
            await download.run()
        except ModelNotFound as exc:
            raise RegistryError(
                f"{name.host} does not have blob {blob.digest[:19]} of {name.display}"
            ) from exc

    def disproved(self, _name: ModelName, _blob: BlobId) -> bool:
        return False  # the registry has no other bytes

    async def read_part(self, name: ModelName, layer: Layer, begin: int, end: int) -> bytes:
        session = self._session(name)
        end = min(end, layer.size)
        if begin >= end:
            return b""
        found, url = bytearray(), session.url("blobs", layer.digest)
        async with session.send("GET", url, headers=[("range", range_header(begin, end))]) as response:
            told = response.headers.get("content-range", "")
            if response.status == 206 and not is_answer_to(begin, end, layer.size, told):
                raise RegistryError(
                    f"{response.url.site} sends other bytes than the ones that were asked for"
                )
            skip = begin if response.status == 200 else 0  # it has no ranges, and sends all
            async with aclosing(response.chunks()) as chunks:
                async for chunk in chunks:
                    found += chunk[skip:]
                    skip = max(0, skip - len(chunk))
                    if len(found) >= end - begin:
                        break
        return bytes(found[: end - begin])

    async def send(self, name: ModelName, layer: Layer, source: Blobs, told: Told) -> None:
        session = self._session(name)
        upload = Upload(session, self._egress, layer, source, told, wait_s=self._wait_s, sent=self._sent)
        await upload.run()

    async def send_manifest(self, name: ModelName, data: bytes) -> None:
        session = self._session(name)
        async with session.send(
            "PUT",
            session.url("manifests", name.tag),
            headers=[("content-type", MANIFEST_TYPE)],
            content=lambda: data,
        ):
            return

    def _session(self, name: ModelName) -> Session:
        """With the tokens that this model's last requests were given."""
        key = f"{name.scheme}://{name.host}/{name.namespace}/{name.model}".lower()
        session = self._sessions.get(key)
        if session is None or session.name.parts[:3] != name.parts[:3]:
            session = Session(name, self._egress, self._sites, self._signer, self._clock)
            self._sessions.pop(key, None)
            self._sessions[key] = session
            if len(self._sessions) > _SESSIONS:
                del self._sessions[next(iter(self._sessions))]
        return session

    def _wait_s(self, tries: int) -> float:
        """Doubling, with jitter: parts that failed together must not come back together."""
        return float(min(_MAX_WAIT_S, self._first_wait_s * 2 ** (tries - 1)) * (0.5 + self._draw()))
