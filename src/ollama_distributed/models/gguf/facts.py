"""What a GGUF header says about its model: numbers, kind, pooling, template, capabilities.

Numbers that a runner divides by are checked here (block and head counts of 0 crashed
Ollama: CVE-2024-8063, CVE-2025-0317). Capabilities follow Ollama's `server/images.go`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models.gguf.header import Array, Header, Value, is_uint
from ollama_distributed.models.gguf.types import file_type_name
from ollama_distributed.models.spec import Architecture, Capability

Kind = Literal["model", "adapter", "projector"]
Pooling = Literal["", "none", "mean", "cls", "last", "rank"]

_ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_POOLINGS: dict[int, Pooling] = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
_MAX_LAYERS = 4_096
_MAX_NUMBER = (1 << 31) - 1
"""llama.cpp keeps these numbers in 32 bits."""

_ENCODERS = frozenset({"bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3"})
"""Architectures that can only embed, also when a converter forgot the pooling type."""

_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)

_FILL_IN_KEYS = (
    ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"),
    ("tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"),
    ("tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"),
)
"""Fill in the middle needs one of each row."""


def kind_of(header: Header) -> Kind:
    """Whether the file is a model, a LoRA adapter or a projector of images or sound."""
    stated = header.metadata.get("general.type")
    if stated == "adapter":
        return "adapter"
    if stated in ("projector", "mmproj"):
        return "projector"
    name = architecture_name(header)
    blocks = header.metadata.get(f"{name}.block_count")
    has_blocks = is_uint(blocks) and blocks != 0
    if not has_blocks and (name == "clip" or f"{name}.vision.block_count" in header.metadata):
        return "projector"
    return "model"


def architecture_name(header: Header) -> str:
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or not _ARCHITECTURE.match(name):
        raise InvalidModel("GGUF metadata lacks a valid general.architecture")
    return name


def architecture_of(header: Header) -> Architecture:
    """The numbers of a model that decide memory and limits.

    Raises:
        InvalidModel: a number that the runner needs is missing, of the wrong type or absurd.
    """
    found = numbers_of(header)
    if not header.tensors:
        raise InvalidModel("GGUF file holds no tensors")
    return found


def numbers_of(header: Header) -> Architecture:
    """As `architecture_of`, of a header whose tensors were not read."""
    name = architecture_name(header)
    layers = _number(header, f"{name}.block_count")
    if not 0 < layers <= _MAX_LAYERS:
        raise InvalidModel(f"GGUF metadata gives {layers} blocks ({name}.block_count)")
    split = header.metadata.get("split.count")
    if isinstance(split, int) and split > 1:
        raise InvalidModel(
            f"GGUF file is one of {split} parts; merge them first with `llama-gguf-split --merge`"
        )
    embedding = _number(header, f"{name}.embedding_length")
    heads = _number(header, f"{name}.attention.head_count")
    kv_heads = _number(header, f"{name}.attention.head_count_kv", default=heads)
    head_length = embedding // heads if heads else 0
    return Architecture(
        name=name,
        layers=layers,
        context_tokens=_number(header, f"{name}.context_length"),
        embedding_length=embedding,
        heads=heads,
        kv_heads=kv_heads,
        key_length=_number(header, f"{name}.attention.key_length", default=head_length),
        value_length=_number(header, f"{name}.attention.value_length", default=head_length),
        parameters=parameter_count(header),
        file_type=file_type_name(_number(header, "general.file_type", default=-1)),
        vocabulary=_vocabulary(header, name),
    )


def tells_numbers(metadata: Mapping[str, Value]) -> bool:
    """Whether `numbers_of` would find all in this beginning of the metadata. Converters write a
    model's own numbers before its vocabulary, the first array that is long."""
    name = metadata.get("general.architecture")
    needed = ("block_count", "embedding_length", "attention.head_count", "context_length")
    return "tokenizer.ggml.tokens" in metadata and all(f"{name}.{key}" in metadata for key in needed)


def parameter_count(header: Header) -> int:
    stated = header.metadata.get("general.parameter_count")
    if isinstance(stated, int) and not isinstance(stated, bool) and stated > 0:
        return stated
    return sum(tensor.elements for tensor in header.tensors)


def pooling_of(header: Header) -> Pooling:
    """How token vectors become one; empty for models that complete."""
    name = architecture_name(header)
    stated = header.metadata.get(f"{name}.pooling_type")
    if stated is None:
        return "mean" if name in _ENCODERS else ""
    if not isinstance(stated, int) or stated not in _POOLINGS:
        raise InvalidModel(f"GGUF metadata gives the unknown pooling type {stated!r}")
    return _POOLINGS[stated]


def chat_template_of(header: Header) -> str:
    """The Jinja template in the file; empty when there is none."""
    template = header.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise InvalidModel("GGUF tokenizer.chat_template is no text")
    return template


def capabilities_of(
    header: Header, *, chat_template: str, go_template: str = "", projectors: tuple[Header, ...] = ()
) -> frozenset[Capability]:
    """What the model can do, by its header, templates and projectors.

    `chat_template` is the Jinja that will be used, `go_template` the Modelfile's TEMPLATE.
    """
    name = architecture_name(header)
    found: set[Capability] = set()
    pooling = pooling_of(header)
    if pooling == "rank":
        found.add("rerank")
    elif pooling:
        found.add("embedding")
    else:
        found.add("completion")
        if "tools" in chat_template or "tool_call" in chat_template:
            found.add("tools")
        if thinking_tags_of(chat_template) or "enable_thinking" in chat_template:
            found.add("thinking")
        if ".Suffix" in go_template or all(
            any(is_uint(header.metadata.get(key)) for key in row) for row in _FILL_IN_KEYS
        ):
            found.add("insert")
    if projectors or f"{name}.vision.block_count" in header.metadata:
        found.add("vision")
    if f"{name}.audio.block_count" in header.metadata or any(_hears(header) for header in projectors):
        found.add("audio")
    return frozenset(found)


def thinking_tags_of(chat_template: str) -> tuple[str, str] | None:
    """Opening and closing tag of the reasoning that this template knows."""
    for opening, closing in _THINKING_TAGS:
        if closing in chat_template and (
            opening in chat_template
            # Templates that cut old reasoning off name the closing tag only.
            or f"split('{closing}')" in chat_template
            or f'split("{closing}")' in chat_template
        ):
            return opening, closing
    return None


def _hears(projector: Header) -> bool:
    return any(
        value is True and key.rpartition(".")[2] == "has_audio_encoder"
        for key, value in projector.metadata.items()
    )


def _vocabulary(header: Header, name: str) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Array):
        return tokens.length
    return _number(header, f"{name}.vocab_size", default=0)


def _number(header: Header, key: str, default: int = 0) -> int:
    """A number of the header. Of one per layer the largest: memory must do for all."""
    value: Value | None = header.metadata.get(key)
    if value is None:
        return default
    if isinstance(value, Array):
        numbers = [item for item in value.values or () if isinstance(item, int)]
        if len(numbers) != value.length or not numbers:
            raise InvalidModel(f"GGUF metadata {key!r} is no number")
        value = max(numbers)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidModel(f"GGUF metadata {key!r} is no number")
    if not 0 <= value <= _MAX_NUMBER:
        raise InvalidModel(f"GGUF metadata {key!r} has the impossible value {value}")
    return value
