"""GET /v1/models and /v1/models/{model}: the bodies. A missing one is `ModelNotFound`."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Model(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    owned_by: str


class ModelList(msgspec.Struct, frozen=True):
    object: str
    data: list[Model]


def model_row(name: str, created: float, owner: str) -> Model:
    """`created`: seconds since the Unix epoch; `owner`: the name's namespace."""
    return Model(id=name, object="model", created=int(created), owned_by=owner)


def render_model(name: str, created: float, owner: str) -> bytes:
    return msgspec.json.encode(model_row(name, created, owner))


def render_models(rows: Iterable[tuple[str, float, str]]) -> bytes:
    """`rows`: (name, created, owner)."""
    return msgspec.json.encode(ModelList("list", [model_row(*row) for row in rows]))
