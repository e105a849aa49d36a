"""Looks at a model in its registry, before anything is fetched: the manifest, and the beginning of
its weights, as far as that tells what its memory follows from."""

from __future__ import annotations

import hashlib

import structlog
from anyio import to_thread

from ollama_distributed.base.errors import InvalidModel, RegistryError
from ollama_distributed.distribution.ports import Registry
from ollama_distributed.models import manifest as media
from ollama_distributed.models.gguf import Header, NeedMore, numbers_of, read_header, tells_numbers
from ollama_distributed.models.manifest import Layer, parse_manifest
from ollama_distributed.models.names import ModelName
from ollama_distributed.models.spec import ModelSpec

log = structlog.get_logger()

STEPS = (64 << 10, 512 << 10, 4 << 20, 16 << 20)
"""First bytes to have until the numbers are there: as a rule they stand in the first, before the
vocabulary; the last holds the vocabularies of all models that are known."""


class Looking:
    """Implements `placement.ports.Outside`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def look(self, name: str) -> tuple[ModelSpec, int]:
        """What a model is, and how many bytes were read for that.

        Raises:
            InvalidName: the name is none.
            Forbidden, Unauthenticated, Unavailable, RegistryError: its registry cannot be asked.
            ModelNotFound: the registry has no such model.
            InvalidModel: nodes could not run it.
        """
        target = ModelName.parse(name)
        self._registry.check(target)
        data = await self._registry.manifest(target)
        try:
            manifest = parse_manifest(data)
        except InvalidModel as exc:
            raise RegistryError(f"{target.host} sends no manifest of a model: {exc.message}") from exc
        models = manifest.of_type(media.MODEL)
        if not models:
            raise InvalidModel(f"{target.display} holds no model in one GGUF file")
        header, count = await self._header(target, models[0])
        numbers = numbers_of(header)
        log.info("distribution.looked", model=target.display, bytes=len(data) + count)
        spec = ModelSpec(
            name=str(target),
            display=target.display,
            digest=hashlib.sha256(data).hexdigest(),
            size_bytes=manifest.size_bytes,
            modified_at=0.0,
            architecture=numbers,
            weights_bytes=models[0].size,
        )
        return spec, len(data) + count

    async def _header(self, name: ModelName, layer: Layer) -> tuple[Header, int]:
        """As far as it was read, and how many bytes that took."""
        found = b""
        for step in STEPS:
            found += await self._registry.read_part(name, layer, len(found), step)
            try:
                header = await to_thread.run_sync(_read, found, layer.size)
            except NeedMore:
                if len(found) < min(step, layer.size):
                    raise RegistryError(f"{name.host} ends its answer early") from None
            else:
                return header, len(found)
        raise InvalidModel(
            f"the header of {name.display} does not tell its numbers in {STEPS[-1] >> 20} MiB; pull it"
        )


def _read(data: bytes, size: int) -> Header:
    """Blocking: a vocabulary that has to be walked takes 30 ms."""
    return read_header(data, size, enough=tells_numbers)
