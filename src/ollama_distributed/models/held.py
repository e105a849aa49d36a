"""A model as the replicated state carries it, made from what a node knows of it, and back."""

from __future__ import annotations

from typing import get_args

from ollama_distributed.base.errors import InvalidName
from ollama_distributed.models.names import ModelName, name_key
from ollama_distributed.models.spec import Architecture, Capability, ModelSpec
from ollama_distributed.state.records import HeldModel

_CAPABILITIES: tuple[Capability, ...] = get_args(Capability)


def held_model(spec: ModelSpec) -> HeldModel:
    """What a node writes of one of its models. The name is in the one form that is looked up."""
    architecture = spec.architecture
    return HeldModel(
        name=name_key(spec.name),
        display=spec.display,
        digest=spec.digest,
        size_bytes=spec.size_bytes,
        modified_at=spec.modified_at,
        family=architecture.name,
        families=spec.families,
        parameters=architecture.parameters,
        quantization=architecture.file_type,
        context_tokens=architecture.context_tokens,
        embedding_length=architecture.embedding_length,
        capabilities=tuple(one for one in _CAPABILITIES if one in spec.capabilities),
        weights_bytes=spec.weights_bytes,
        layers=architecture.layers,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        key_length=architecture.key_length,
        value_length=architecture.value_length,
        vocabulary=architecture.vocabulary,
        remote=spec.remote is not None,
    )


def spec_of(held: HeldModel) -> ModelSpec:
    """For lists only: it has no files here, so no engine can load it."""
    return ModelSpec(
        name=held.name,
        display=held.display,
        digest=held.digest,
        size_bytes=held.size_bytes,
        modified_at=held.modified_at,
        architecture=_architecture(held),
        weights_bytes=held.weights_bytes,
        families=held.families,
        capabilities=frozenset(one for one in _CAPABILITIES if one in held.capabilities),
    )


def spec_of_name(key: str) -> ModelSpec:
    """Of a model of which only the name is known yet."""
    try:
        display = ModelName.parse(key).display
    except InvalidName:
        display = key
    return spec_of(HeldModel(name=key, display=display, digest="", size_bytes=0, modified_at=0.0))


def _architecture(held: HeldModel) -> Architecture:
    return Architecture(
        name=held.family,
        layers=held.layers,
        context_tokens=held.context_tokens,
        embedding_length=held.embedding_length,
        heads=held.heads,
        kv_heads=held.kv_heads,
        key_length=held.key_length,
        value_length=held.value_length,
        parameters=held.parameters,
        file_type=held.quantization,
        vocabulary=held.vocabulary,
    )
