"""A model as the rest of the node sees it: resolved, ready to be loaded.

Made from a manifest and the GGUF headers of its blobs by `catalog/`; never changes.
A new manifest under the same name is a new `ModelSpec` with another digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Capability = Literal["completion", "tools", "insert", "vision", "embedding", "thinking", "audio", "rerank"]


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a GGUF header that decide memory and limits."""

    name: str
    """`general.architecture`: llama, gemma3, bert, ..."""
    layers: int
    context_tokens: int
    """Trained context length; 0 when the header does not say."""
    embedding_length: int
    heads: int
    kv_heads: int
    key_length: int
    value_length: int
    parameters: int
    """Count of weights."""
    file_type: str
    """Quantisation as Ollama prints it: F16, Q4_K_M, ..."""
    vocabulary: int = 0
    """Tokens that the model knows; 0 when the header does not say."""


class StoredMessage(msgspec.Struct, frozen=True):
    """A MESSAGE row of a Modelfile; put before the client's messages."""

    role: Literal["system", "user", "assistant"]
    content: str


class RemoteModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model served by another engine on this machine (vLLM, SGLang, Ollama, llama-server)."""

    engine: str
    """Name of the configured engine."""
    name: str
    """The model's name over there."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    """Canonical full name `host/namespace/model:tag`."""
    display: str
    """The short form that people see: default parts dropped."""
    digest: str
    """sha256 of the manifest, 64 hex digits, no prefix."""
    size_bytes: int
    modified_at: float
    """Seconds since the Unix epoch."""
    architecture: Architecture
    weights: str = ""
    """Absolute path of the GGUF blob; empty for a remote model."""
    weights_bytes: int = 0
    projectors: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    """Absolute paths of LoRA GGUF blobs."""
    remote: RemoteModel | None = None
    chat_template: str = ""
    """Jinja that replaces the GGUF's own; empty: the GGUF's own."""
    template: str = ""
    """The Modelfile TEMPLATE (Go syntax) as stored, for `show`; never rendered by us."""
    template_problem: str = ""
    """Why `template` cannot be rendered: chats and templated prompts are refused with this."""
    template_refuses: bool = False
    """The template that is used refuses some conversations (`raise_exception`)."""
    system: str = ""
    messages: tuple[StoredMessage, ...] = ()
    parameters: Mapping[str, Any] = {}
    """PARAMETER rows, typed; `stop` is a list."""
    license: tuple[str, ...] = ()
    capabilities: frozenset[Capability] = frozenset({"completion"})
    families: tuple[str, ...] = ()
    parent: str = ""
    pooling: Literal["", "none", "mean", "cls", "last", "rank"] = ""
    """`<arch>.pooling_type` of the header; not empty for embedding and rerank models."""
    thinking_tags: tuple[str, str] | None = None
    """Opening and closing tag of the reasoning, e.g. ("<think>", "</think>")."""
    requires: str = ""
