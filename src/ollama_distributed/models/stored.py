"""A model as it lies on this node's disk."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ollama_distributed.models.manifest import Manifest
from ollama_distributed.models.names import BlobId, ModelName


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    name: ModelName
    key: str
    """Of the name, as in the replicated state."""
    digest: str
    """Of its manifest."""
    blobs: Mapping[BlobId, int]
    """Bytes of each, as the manifest says."""
    modified_at: float
    """Of its manifest, seconds since the Unix epoch."""
    lacking: str = ""
    """Why it cannot be served: files of it are missing, or were damaged. Empty: it can."""

    @property
    def largest(self) -> BlobId:
        return max(self.blobs, key=lambda blob: (self.blobs[blob], blob))

    @property
    def size_bytes(self) -> int:
        return sum(self.blobs.values())


def sizes_of(manifest: Manifest) -> dict[BlobId, int]:
    return {layer.blob: layer.size for layer in (*manifest.layers, manifest.config)}
