"""What the catalogue takes and gives: create requests, statuses, the answer of show.

Field names are Ollama's; a dialect encodes these as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ollama_distributed.models.gguf import human_number
from ollama_distributed.models.spec import ModelSpec, StoredMessage


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """Body of `POST /api/create`, without `stream`."""

    model: str = ""
    name: str = ""
    """Older spelling of `model`."""
    from_: str = ""
    files: Mapping[str, str] | None = None
    """Relative file name -> digest of an uploaded blob."""
    adapters: Mapping[str, str] | None = None
    draft_files: Mapping[str, str] | None = None
    template: str = ""
    system: str = ""
    license: str | list[str] | None = None
    parameters: Mapping[str, Any] | None = None
    messages: list[StoredMessage] | None = None
    quantize: str = ""
    quantization: str = ""
    """Older spelling of `quantize`."""
    draft_quantize: str = ""
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    remote_host: str = ""
    info: Mapping[str, Any] | None = None

    @property
    def target(self) -> str:
        return self.model or self.name


class CreateStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One NDJSON line of create."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


class ModelDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`details` of tags, ps and show; a length of 0 is not known, and left out."""

    parent_model: str
    format: str
    family: str
    families: tuple[str, ...] | None
    parameter_size: str
    quantization_level: str
    context_length: int = 0
    embedding_length: int = 0


class ShownModel(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of `POST /api/show`."""

    spec: ModelSpec
    details: ModelDetails
    license: str
    modelfile: str
    parameters: str
    template: str
    system: str
    renderer: str
    parser: str
    messages: tuple[StoredMessage, ...]
    model_info: Mapping[str, Any]
    projector_info: Mapping[str, Any] | None
    tensors: list[dict[str, Any]]
    capabilities: tuple[str, ...]
    modified_at: float
    """Seconds since the Unix epoch."""
    requires: str
    remote_model: str = ""
    remote_host: str = ""


_CAPABILITY_ORDER = (
    "completion", "embedding", "rerank", "vision", "audio", "tools", "insert", "thinking",
)  # fmt: skip


def capabilities(spec: ModelSpec) -> tuple[str, ...]:
    """In a fixed order, for people and golden files."""
    return tuple(name for name in _CAPABILITY_ORDER if name in spec.capabilities)


def details(spec: ModelSpec) -> ModelDetails:
    architecture = spec.architecture
    return ModelDetails(
        parent_model=spec.parent,
        format="" if spec.remote else "gguf",
        family=architecture.name,
        families=spec.families or ((architecture.name,) if architecture.name else None),
        parameter_size=human_number(architecture.parameters) if architecture.parameters else "",
        quantization_level=architecture.file_type,
        context_length=architecture.context_tokens,
        embedding_length=architecture.embedding_length,
    )
