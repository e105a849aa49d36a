"""A model as the lists show it: one row for Ollama's tags, the seed's models and OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ollama_distributed.catalog.wire import ModelDetails, ShownModel, capabilities, details
from ollama_distributed.gateway.dialects.ollama_answer import timestamp
from ollama_distributed.models.spec import ModelSpec, StoredMessage
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.serving.ports import EngineInfo

_NEVER_S = 10_981_785_600.0
"""`expires_at` of a model that stays: the year 2318, as Ollama shows it."""


def rfc3339(epoch_s: float) -> str:
    return timestamp(epoch_s).decode("ascii")


class ModelRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model of `/api/tags` and `/api/v1/models`."""

    name: str
    model: str
    modified_at: str
    """RFC 3339, as all times of Ollama's."""
    size: int
    """Bytes."""
    digest: str
    details: ModelDetails
    capabilities: tuple[str, ...]
    remote_model: str = ""
    remote_host: str = ""


class TagsAnswer(msgspec.Struct, frozen=True):
    models: tuple[ModelRow, ...]


class ModelsAnswer(msgspec.Struct, frozen=True):
    models: dict[str, ModelRow]


def model_row(spec: ModelSpec) -> ModelRow:
    remote = spec.remote
    return ModelRow(
        name=spec.display,
        model=spec.display,
        modified_at=rfc3339(spec.modified_at),
        size=spec.size_bytes,
        digest=spec.digest,
        details=details(spec),
        capabilities=capabilities(spec),
        remote_model=remote.name if remote is not None else "",
        remote_host=remote.engine if remote is not None else "",
    )


def newest_first(specs: list[ModelSpec]) -> list[ModelSpec]:
    return sorted(specs, key=lambda spec: (-spec.modified_at, spec.display))


def _expiry_s(one: LoadedModel) -> float:
    """Never later than "never": clients do not read years of five digits."""
    return _NEVER_S if one.expires_at is None else min(one.expires_at, _NEVER_S)


class ResidentRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model of `/api/ps`; from `slots` on the fields are ours, Ollama's clients ignore them."""

    name: str
    model: str
    size: int
    """Bytes of memory, `size_vram` of them on GPUs."""
    digest: str
    details: ModelDetails
    expires_at: str
    size_vram: int
    context_length: int
    """Tokens of a slot."""
    slots: int
    slots_busy: int
    engine: EngineInfo
    node: str = ""
    """Name of the node that has it; left out: this one."""


class ResidentsAnswer(msgspec.Struct, frozen=True):
    models: tuple[ResidentRow, ...]


def resident_row(one: LoadedModel) -> ResidentRow:
    spec = one.spec
    return ResidentRow(
        name=spec.display,
        model=spec.display,
        size=one.memory_bytes,
        digest=spec.digest,
        details=details(spec),
        expires_at=rfc3339(_expiry_s(one)),
        size_vram=one.vram_bytes,
        context_length=one.context_tokens,
        slots=one.slots,
        slots_busy=one.slots_busy,
        engine=one.engine,
        node=one.node,
    )


def residents_answer(loaded: list[LoadedModel]) -> ResidentsAnswer:
    """Longest remaining time first, as Ollama sorts them."""
    rows = sorted(loaded, key=lambda one: -_expiry_s(one))
    return ResidentsAnswer(tuple(map(resident_row, rows)))


class ShowAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of `/api/show`; what is empty is left out, as in Ollama."""

    license: str = ""
    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    system: str = ""
    renderer: str = ""
    parser: str = ""
    messages: tuple[StoredMessage, ...] = ()
    remote_model: str = ""
    remote_host: str = ""
    projector_info: Mapping[str, Any] | None = None
    tensors: list[dict[str, Any]] = []
    capabilities: tuple[str, ...] = ()
    requires: str = ""
    details: ModelDetails
    model_info: Mapping[str, Any]
    modified_at: str


def show_answer(shown: ShownModel) -> ShowAnswer:
    return ShowAnswer(
        license=shown.license,
        modelfile=shown.modelfile,
        parameters=shown.parameters,
        template=shown.template,
        system=shown.system,
        renderer=shown.renderer,
        parser=shown.parser,
        messages=shown.messages,
        remote_model=shown.remote_model,
        remote_host=shown.remote_host,
        projector_info=shown.projector_info or None,
        tensors=shown.tensors,
        capabilities=shown.capabilities,
        requires=shown.requires,
        details=shown.details,
        model_info=shown.model_info,
        modified_at=rfc3339(shown.modified_at),
    )


def namespace(spec: ModelSpec) -> str:
    """The owner in OpenAI's lists: the middle part of `host/namespace/model:tag`."""
    parts = spec.name.split("/")
    return parts[1] if len(parts) == 3 else "library"
