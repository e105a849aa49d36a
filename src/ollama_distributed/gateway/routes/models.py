"""A model as the lists show it: one row for Ollama's tags, the seed's models and OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ollama_distributed.catalog.wire import ModelDetails, ShownModel, capabilities, details
from ollama_distributed.gateway.dialects.ollama_answer import timestamp
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.loaded import LoadedModel

_NEVER_S = 10_981_785_600.0
"""`expires_at` of a model that stays: the year 2318, as Ollama shows it."""


def rfc3339(epoch_s: float) -> str:
    return timestamp(epoch_s).decode("ascii")


def details_row(shown: ModelDetails) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(shown)
    for name in ("context_length", "embedding_length"):
        if not row[name]:
            del row[name]
    return row


def model_row(spec: ModelSpec) -> dict[str, Any]:
    """One model of `/api/tags` and `/api/v1/models`."""
    row: dict[str, Any] = {
        "name": spec.display,
        "model": spec.display,
        "modified_at": rfc3339(spec.modified_at),
        "size": spec.size_bytes,
        "digest": spec.digest,
        "details": details_row(details(spec)),
        "capabilities": capabilities(spec),
    }
    if spec.remote is not None:
        row["remote_model"] = spec.remote.name
        row["remote_host"] = spec.remote.engine
    return row


def newest_first(specs: list[ModelSpec]) -> list[ModelSpec]:
    return sorted(specs, key=lambda spec: (-spec.modified_at, spec.display))


def _expiry_s(one: LoadedModel) -> float:
    """Never later than "never": clients do not read years of five digits."""
    return _NEVER_S if one.expires_at is None else min(one.expires_at, _NEVER_S)


def resident_row(one: LoadedModel) -> dict[str, Any]:
    """One model of `/api/ps`; from `slots` on the fields are ours, Ollama's clients ignore them."""
    spec = one.spec
    elsewhere = {"node": one.node} if one.node else {}
    return {
        "name": spec.display,
        "model": spec.display,
        "size": one.memory_bytes,
        "digest": spec.digest,
        "details": details_row(details(spec)),
        "expires_at": rfc3339(_expiry_s(one)),
        "size_vram": one.vram_bytes,
        "context_length": one.context_tokens,
        "slots": one.slots,
        "slots_busy": one.slots_busy,
        "engine": one.engine,
        **elsewhere,
    }


def resident_rows(loaded: list[LoadedModel]) -> list[dict[str, Any]]:
    """Longest remaining time first, as Ollama sorts them."""

    def remaining(one: LoadedModel) -> float:
        return -_expiry_s(one)

    return [resident_row(one) for one in sorted(loaded, key=remaining)]


def shown_row(shown: ShownModel) -> dict[str, Any]:
    """The body of `/api/show`; what is empty is left out, as in Ollama."""
    optional: Mapping[str, Any] = {
        "license": shown.license,
        "modelfile": shown.modelfile,
        "parameters": shown.parameters,
        "template": shown.template,
        "system": shown.system,
        "renderer": shown.renderer,
        "parser": shown.parser,
        "messages": shown.messages,
        "remote_model": shown.remote_model,
        "remote_host": shown.remote_host,
        "projector_info": shown.projector_info,
        "tensors": shown.tensors,
        "capabilities": shown.capabilities,
        "requires": shown.requires,
    }
    return {
        **{name: value for name, value in optional.items() if value},
        "details": details_row(shown.details),
        "model_info": shown.model_info,
        "modified_at": rfc3339(shown.modified_at),
    }


def namespace(spec: ModelSpec) -> str:
    """The owner in OpenAI's lists: the middle part of `host/namespace/model:tag`."""
    parts = spec.name.split("/")
    return parts[1] if len(parts) == 3 else "library"
