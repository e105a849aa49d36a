"""GET /v1/models and /v1/models/{model} as Anthropic's clients read them, who say so by `anthropic-version`.

Source: Anthropic API reference "List models". The list is one whole page.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

VERSION_HEADER = "anthropic-version"
"""Every client of Anthropic's sends it, none of OpenAI's does."""


class AnthropicModel(msgspec.Struct, frozen=True):
    id: str
    display_name: str
    created_at: str
    """RFC 3339."""
    type: str = "model"


class AnthropicModelList(msgspec.Struct, frozen=True):
    data: list[AnthropicModel]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def anthropic_model(name: str, created: float) -> AnthropicModel:
    """`created`: seconds since the Unix epoch."""
    at = datetime.fromtimestamp(int(created), UTC)
    return AnthropicModel(name, name, at.isoformat().replace("+00:00", "Z"))


def anthropic_models(rows: Sequence[AnthropicModel]) -> AnthropicModelList:
    return AnthropicModelList(list(rows), rows[0].id if rows else None, rows[-1].id if rows else None)
