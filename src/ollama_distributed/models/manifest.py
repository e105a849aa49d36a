"""Ollama's manifest and config JSON: read strictly, written as Ollama writes them.

A manifest names layers by digest and media type, its config blob says what the model
is. Both come from registries and shared disks, so sizes and counts are bounded.
Source: Ollama `manifest/manifest.go`, `types/model/config.go`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from ollama_distributed.base.codec import UNREADABLE
from ollama_distributed.base.errors import InvalidModel, InvalidName
from ollama_distributed.models.names import BlobId
from ollama_distributed.models.spec import StoredMessage

T = TypeVar("T")

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"

_IMAGE = "application/vnd.ollama.image."
MODEL = _IMAGE + "model"
ADAPTER = _IMAGE + "adapter"
PROJECTOR = _IMAGE + "projector"
TEMPLATE = _IMAGE + "template"
PROMPT = _IMAGE + "prompt"
"""The template's media type in manifests of 2023."""
SYSTEM = _IMAGE + "system"
PARAMS = _IMAGE + "params"
MESSAGES = _IMAGE + "messages"
LICENSE = _IMAGE + "license"
DRAFT = _IMAGE + "draft"
EMBED = _IMAGE + "embed"
"""Deprecated in 2023; ignored."""

_DIGEST = re.compile(rb"sha256[:-]([0-9a-f]{64})")

MAX_MANIFEST_BYTES = 4 << 20
"""A model in one file has about ten layers of 200 bytes; one layer per tensor, thousands."""
MAX_LAYERS = 16_384
MAX_CONFIG_BYTES = 1 << 20
MAX_TEXT_BYTES = 4 << 20
"""Of a template, system text, parameters, messages or license."""
MAX_BLOB_BYTES = 1 << 50
MAX_MODEL_BYTES = 1 << 53
"""What every reader of JSON takes exactly."""
MAX_NUMBER = (1 << 31) - 1
"""llama.cpp keeps a model's numbers in 32 bits."""


class Layer(msgspec.Struct, frozen=True, kw_only=True, rename={"media_type": "mediaType", "from_": "from"}):
    media_type: str
    digest: str
    size: int
    from_: str = ""
    """The model or file that it was taken from."""
    name: str = ""

    @property
    def blob(self) -> BlobId:
        return BlobId.parse(self.digest)


class Manifest(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename={"schema_version": "schemaVersion", "media_type": "mediaType"},
):
    schema_version: int = 2
    media_type: str = MANIFEST_TYPE
    config: Layer
    layers: tuple[Layer, ...] = ()

    @property
    def size_bytes(self) -> int:
        return self.config.size + sum(layer.size for layer in self.layers)

    def of_type(self, *media_types: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.media_type in media_types]

    def blobs(self) -> set[BlobId]:
        """Every blob that this manifest needs."""
        return {layer.blob for layer in (*self.layers, self.config)}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The config blob. Field order is the order on disk."""

    model_format: str = ""
    model_family: str = ""
    model_families: tuple[str, ...] | None = None
    model_type: str = ""
    """Shown as parameter size."""
    file_type: str = ""
    """Shown as quantisation level."""
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    remote_host: str = ""
    remote_model: str = ""
    capabilities: tuple[str, ...] = ()
    context_length: int = 0
    embedding_length: int = 0
    base_name: str = ""
    architecture: str = "amd64"
    os: str = "linux"


_ALWAYS_WRITTEN = frozenset(
    {"model_format", "model_family", "model_families", "model_type", "file_type", "architecture", "os"}
)


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        InvalidModel: not JSON, not of this shape, or over a limit.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidModel(f"manifest is {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are read")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except UNREADABLE as exc:
        raise InvalidModel(f"manifest is not valid: {exc}") from exc
    if manifest.schema_version != 2:
        raise InvalidModel(f"manifest has schema version {manifest.schema_version}; only 2 is known")
    if len(manifest.layers) > MAX_LAYERS:
        raise InvalidModel(f"manifest has {len(manifest.layers)} layers; at most {MAX_LAYERS} are read")
    for layer in (*manifest.layers, manifest.config):
        _check_layer(layer)
    if manifest.size_bytes > MAX_MODEL_BYTES:
        raise InvalidModel(f"manifest gives an impossible size, {manifest.size_bytes} bytes")
    return manifest


def named_blobs(data: bytes) -> set[BlobId]:
    """Every digest that a manifest names, also one that cannot be parsed: what may be needed stays."""
    found = {BlobId(digest.decode()) for digest in _DIGEST.findall(data)}
    if b"\\" in data:  # JSON may write any character as an escape
        with suppress(InvalidModel):
            found |= parse_manifest(data).blobs()
    return found


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as Ollama writes it: equal manifests give equal bytes."""
    return go_json(
        {
            "schemaVersion": manifest.schema_version,
            "mediaType": manifest.media_type,
            "config": _layer_fields(manifest.config),
            "layers": [_layer_fields(layer) for layer in manifest.layers],
        }
    )


def parse_config(data: bytes) -> ModelConfig:
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidModel(f"config is {len(data)} bytes; at most {MAX_CONFIG_BYTES} are read")
    try:
        config = msgspec.json.decode(data, type=ModelConfig)
    except UNREADABLE as exc:
        raise InvalidModel(f"config is not valid: {exc}") from exc
    for number in (config.context_length, config.embedding_length):
        if not 0 <= number <= MAX_NUMBER:
            raise InvalidModel(f"config gives the impossible length {number}")
    return config


def parse_parameters(data: bytes) -> dict[str, Any]:
    """The layer of parameters, as it is on the disk; `parameters.from_stored` types them.

    Raises:
        InvalidModel
    """
    return _decoded(data, dict[str, Any], "parameters")


def parse_messages(data: bytes) -> tuple[StoredMessage, ...]:
    """
    Raises:
        InvalidModel
    """
    return _decoded(data, tuple[StoredMessage, ...], "messages")


def _decoded(data: bytes, shape: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=shape)
    except UNREADABLE as exc:
        raise InvalidModel(f"the model's {what} layer is not valid: {exc}") from exc


def encode_config(config: ModelConfig) -> bytes:
    fields = msgspec.structs.asdict(config)
    return go_json({name: value for name, value in fields.items() if value or name in _ALWAYS_WRITTEN})


def go_json(value: Any) -> bytes:
    """JSON as Go's encoder writes it: one line, its end, and HTML's characters escaped."""
    text = msgspec.json.encode(value)
    for character, escape in ((b"&", b"\\u0026"), (b"<", b"\\u003c"), (b">", b"\\u003e")):
        text = text.replace(character, escape)
    return text.replace("\u2028".encode(), b"\\u2028").replace("\u2029".encode(), b"\\u2029") + b"\n"


def _layer_fields(layer: Layer) -> dict[str, Any]:
    fields: dict[str, Any] = {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
    if layer.from_:
        fields["from"] = layer.from_
    if layer.name:
        fields["name"] = layer.name
    return fields


def _check_layer(layer: Layer) -> None:
    try:
        BlobId.parse(layer.digest)
    except InvalidName as exc:
        raise InvalidModel("manifest names a layer by something that is no sha256 digest") from exc
    if not 0 <= layer.size <= MAX_BLOB_BYTES:
        raise InvalidModel(f"manifest gives layer {layer.digest} an impossible size, {layer.size}")
