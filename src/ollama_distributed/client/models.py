"""`client.models` of `Client`: the models of the server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ollama_distributed.base.disk import EvictAnswer
from ollama_distributed.client import calls, wire
from ollama_distributed.client.blobs import OnProgress, Upload
from ollama_distributed.client.bundles import BundleUpload, Target
from ollama_distributed.client.cluster import ModelPlaces

if TYPE_CHECKING:
    from ollama_distributed.client.aio import Client


class Models(ModelPlaces):
    """The models of the server: `client.models`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._run = client._run

    async def list(self) -> Sequence[wire.ModelInfo]:
        return named((await self._run(calls.list_models())).models)

    async def get(self, name: str) -> wire.ModelInfo:
        return await self._run(calls.get_model(name))

    async def show(
        self,
        name: str,
        *,
        verbose: bool = False,
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> wire.ShowResponse:
        """All about a model: template, parameters, licence, the GGUF's metadata."""
        return await self._run(calls.show_model(name, verbose=verbose, system=system, options=options))

    def create(self, request: wire.CreateRequest) -> AsyncGenerator[wire.Progress]:
        """Make a model; the lines tell what the server does. Run the loop to its end."""
        return self._client._stream(calls.create_model(request))

    async def copy(self, source: str, destination: str) -> None:
        await self._run(calls.copy_model(source, destination))

    async def delete(self, name: str) -> None:
        await self._run(calls.delete_model(name))

    def pull(self, name: str, *, insecure: bool = False) -> AsyncGenerator[wire.Progress]:
        """Have the server fetch a model from its registry; the lines tell how far it is.

        Leaving the loop early ends the fetch, unless others wait for it too; what came is kept
        for the next time.
        """
        return self._client._stream(calls.pull_model(name, insecure=insecure))

    def push(self, name: str, *, insecure: bool = False) -> AsyncGenerator[wire.Progress]:
        """Have the server send a model to its registry. Run the loop to its end."""
        return self._client._stream(calls.push_model(name, insecure=insecure))

    async def download(self, name: str) -> None:
        """Have the server fetch a model from its registry, and wait until it is there."""
        async for _ in self.pull(name):
            pass

    async def start_download(self, name: str) -> wire.Transfer:
        """Have the server fetch a model, without waiting for it."""
        return await self._run(calls.start_download(name))

    async def distribute(self, name: str, nodes: Sequence[str] = ()) -> Sequence[wire.Transfer]:
        """Have these nodes (ids or names) fetch a model from those that have it; none named: every
        living node that lacks it. One transfer for each; what could not begin is `failed`."""
        return (await self._run(calls.distribute_model(name, nodes))).transfers

    async def status(self, name: str) -> wire.ModelStatus:
        """On which nodes a model is, in which versions, and its transfers."""
        return await self._run(calls.model_status(name))

    async def copies(self) -> Sequence[wire.ModelStatus]:
        """On which nodes every model of the cluster is."""
        return (await self._run(calls.list_copies())).models

    async def remove(
        self, name: str, nodes: Sequence[str], *, last_copy: bool = False
    ) -> Sequence[EvictAnswer]:
        """Delete the copies of these nodes (ids or names); `Conflict` says why one must stay.
        `last_copy`: even if no other node holds it. `delete` removes the model everywhere."""
        if not nodes:
            raise ValueError("nodes: name at least one; `delete` removes a model everywhere")
        return (await self._run(calls.remove_copies(name, nodes, last_copy=last_copy))).removed

    async def transfers(self) -> Sequence[wire.Transfer]:
        """Models on their way to any node, and those that arrived lately; newest first."""
        return (await self._run(calls.list_transfers())).transfers

    async def transfer(self, transfer_id: str) -> wire.Transfer:
        return await self._run(calls.get_transfer(transfer_id))

    async def cancel_transfer(self, transfer_id: str) -> wire.Transfer:
        """End it; what came is kept for the next time."""
        return await self._run(calls.cancel_transfer(transfer_id))

    async def has_blob(self, digest: str) -> bool:
        return await self._run(calls.has_blob(digest))

    async def create_blob(
        self, source: bytes | str | Path, *, digest: str | None = None, on_progress: OnProgress | None = None
    ) -> str:
        """Send a file (or bytes) that the server does not have yet; its digest, for `create`."""
        import asyncio

        upload = Upload(source, on_progress)
        if digest is None:
            digest = await asyncio.to_thread(upload.digest)
        if not await self.has_blob(digest):
            await self._run(calls.put_blob(digest), upload)
        return digest

    async def export_bundle(
        self,
        names: str | Sequence[str],
        to: str | Path | BinaryIO,
        *,
        on_progress: OnProgress | None = None,
    ) -> int:
        """Write models into one file, for a cluster that reaches no registry. Returns its bytes.

        What the models share is in it once. A file of this name is replaced when all is there.
        """
        call = calls.export_models([names] if isinstance(names, str) else names)
        return await self._client._save(call, Target(to, on_progress))

    async def import_bundle(
        self,
        source: str | Path | BinaryIO,
        *,
        name: str | None = None,
        replace: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Sequence[wire.ImportedModel]:
        """Bring the models of such a file to the server: all of them or none. Files that it has
        already are not sent.

        Args:
            name: what the bundle's one model is to be called.
            replace: other models of the same names.
        """
        import asyncio

        upload = await asyncio.to_thread(BundleUpload, source, on_progress)
        upload.skip([digest for digest in upload.large() if await self.has_blob(digest)])
        return (await self._run(calls.import_bundle(name, replace=replace), upload)).models

    async def loaded(self) -> Sequence[wire.LoadedModel]:
        """The models in memory now."""
        return (await self._run(calls.loaded_models())).models

    async def unload(self, name: str) -> None:
        await self._run(calls.unload_model(name))


def named(models: Mapping[str, wire.ModelInfo]) -> list[wire.ModelInfo]:
    """The rows of `{"models": {name: info}}`, each with its name."""
    for name, info in models.items():
        info.name = info.name or name
    return [*models.values()]
