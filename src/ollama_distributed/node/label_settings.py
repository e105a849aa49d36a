"""The setting of a node's labels, as a type of field."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.labels import check_node_label


def _pairs(value: object) -> object:
    """`k=v,k2=v2`, or a list of `k=v`."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list):
        return value
    pairs = [str(item).partition("=") for item in value]
    if any(not sign for _, sign, _ in pairs):
        raise ValueError("write each label as NAME=VALUE")
    return {name.strip(): text.strip() for name, _, text in pairs}


def _fit_labels(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        try:
            check_node_label(name, text)
        except Invalid as refused:
            raise ValueError(refused.message) from refused
    return value


NodeLabels = Annotated[
    dict[str, str],
    BeforeValidator(_pairs),
    AfterValidator(_fit_labels),
    Field(description="Labels of this node, e.g. `zone: a`. Operators may overrule them (`node label`)."),
]
