"""Models in one file, for clusters that reach no registry: an OCI image layout in a tar archive.

    oci-layout                 {"imageLayoutVersion":"1.0.0"}
    index.json                 one descriptor for each name, with the name in its annotations
    blobs/sha256/<hex>         manifests, configs, layers; each once, however many names need it

What a registry holds of a model is in it byte for byte, so oras copies it to one and back.
The small files come first: who reads it as a stream knows what is to come. Pure.
Source: OCI image specification, "Image Layout" and "Image Index".
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ollama_distributed.base.codec import UNREADABLE
from ollama_distributed.base.errors import InvalidModel, InvalidName
from ollama_distributed.models import tar
from ollama_distributed.models.manifest import MANIFEST_TYPE, MAX_MANIFEST_BYTES, parse_manifest
from ollama_distributed.models.names import BlobId, ModelName

MEDIA_TYPE = "application/x-tar"
LAYOUT = "oci-layout"
INDEX = "index.json"
BLOBS = "blobs/sha256/"
FULL_NAME = "io.containerd.image.name"
"""Annotation with the whole name, as containerd and Docker write it."""
REF_NAME = "org.opencontainers.image.ref.name"
"""By this oras names an image of a layout: the tag, as long as only one model has it."""

MAX_SMALL_BYTES = 1 << 20
"""Of oci-layout and index.json; a descriptor takes about 400."""
MAX_MODELS = 1024
MAX_MANIFESTS_BYTES = 32 << 20
"""Of all manifests together, which are kept in memory."""

_LAYOUT_TEXT = b'{"imageLayoutVersion":"1.0.0"}'
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_MANIFEST_TYPES = frozenset({MANIFEST_TYPE, "application/vnd.oci.image.manifest.v1+json", ""})


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a bundle: its bytes, or the blob that has them."""

    name: str
    size: int
    content: bytes | BlobId


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A model that an index names."""

    name: ModelName | None
    """None: the bundle does not say."""
    manifest: BlobId
    size: int


class _Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename={"media_type": "mediaType"}):
    media_type: str = ""
    digest: str
    size: int
    annotations: Mapping[str, str] = {}


class _Index(msgspec.Struct, frozen=True, kw_only=True, rename={"schema_version": "schemaVersion"}):
    schema_version: int = 2
    manifests: tuple[_Descriptor, ...] = ()


class _Layout(msgspec.Struct, frozen=True, kw_only=True, rename={"version": "imageLayoutVersion"}):
    version: str


def digest_of(data: bytes) -> BlobId:
    return BlobId(hashlib.sha256(data).hexdigest())


def pieces(models: Sequence[tuple[ModelName, bytes]]) -> list[Piece]:
    """The files of a bundle with these models, in order; each with its manifest as stored.

    Raises:
        InvalidModel: a manifest is not valid.
    """
    found: dict[str, Piece] = {}

    def add(name: str, content: bytes | BlobId, size: int) -> None:
        found.setdefault(name, Piece(name=name, size=size, content=content))

    index = _index(models)
    add(LAYOUT, _LAYOUT_TEXT, len(_LAYOUT_TEXT))
    add(INDEX, index, len(index))
    for _, data in models:
        add(BLOBS + digest_of(data).hex, data, len(data))
    parsed = [parse_manifest(data) for _, data in models]
    for layer in (
        *(manifest.config for manifest in parsed),
        *(layer for manifest in parsed for layer in manifest.layers),
    ):
        add(BLOBS + layer.blob.hex, layer.blob, layer.size)
    return list(found.values())


def length(found: Sequence[Piece]) -> int:
    """Bytes of the whole file."""
    return tar.length((piece.name, piece.size) for piece in found)


def read_layout(data: bytes) -> None:
    layout: _Layout = _decoded(data, _Layout, LAYOUT)
    if not layout.version.startswith("1."):
        raise InvalidModel(f"the bundle has version {layout.version[:20]!r} of the OCI layout; 1 is read")


def read_index(data: bytes) -> list[Listed]:
    """
    Raises:
        InvalidModel: not valid, too many, or of a kind that holds no models.
    """
    index: _Index = _decoded(data, _Index, INDEX)
    if not index.manifests:
        raise InvalidModel("the bundle holds no model")
    if len(index.manifests) > MAX_MODELS:
        raise InvalidModel(f"the bundle holds over {MAX_MODELS} models")
    found = [_listed(descriptor) for descriptor in index.manifests]
    if sum({listed.manifest: listed.size for listed in found}.values()) > MAX_MANIFESTS_BYTES:
        raise InvalidModel(f"the bundle's manifests are over {MAX_MANIFESTS_BYTES >> 20} MiB together")
    return found


def _listed(descriptor: _Descriptor) -> Listed:
    if descriptor.media_type not in _MANIFEST_TYPES:
        raise InvalidModel(f"the bundle's index names a {descriptor.media_type[:80]!r}, which is no model")
    try:
        blob = BlobId.parse(descriptor.digest)
    except InvalidName as exc:
        raise InvalidModel("the bundle's index names a manifest by something that is no digest") from exc
    if not 0 < descriptor.size <= MAX_MANIFEST_BYTES:
        raise InvalidModel(f"the bundle's index gives a manifest an impossible size, {descriptor.size}")
    return Listed(name=_name(descriptor.annotations), manifest=blob, size=descriptor.size)


def _name(annotations: Mapping[str, str]) -> ModelName | None:
    text = annotations.get(FULL_NAME) or annotations.get(REF_NAME, "")
    if FULL_NAME not in annotations and not ("/" in text or ":" in text):
        return None  # a tag alone
    try:
        return ModelName.from_parts(ModelName.parse(text).parts)
    except InvalidName as exc:
        raise InvalidModel(f"the bundle calls a model {text[:80]!r}, which is no name of a model") from exc


def _index(models: Sequence[tuple[ModelName, bytes]]) -> bytes:
    tags = Counter(name.tag for name, _ in models)
    rows: list[dict[str, Any]] = [
        {
            "mediaType": parse_manifest(data).media_type,
            "digest": digest_of(data).digest,
            "size": len(data),
            "annotations": {
                FULL_NAME: str(name),
                REF_NAME: name.tag if tags[name.tag] == 1 else str(name),
            },
        }
        for name, data in models
    ]
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": rows})


def _decoded(data: bytes, shape: Any, name: str) -> Any:
    try:
        return msgspec.json.decode(data, type=shape)
    except UNREADABLE as exc:
        raise InvalidModel(f"the bundle's {name} is not valid: {exc}") from exc
