"""A header as `/api/show` lists it: `model_info`, tensors, and sizes for people.

Source: Ollama `server/routes.go`, `format/format.go`.
"""

from __future__ import annotations

import math
from typing import Any

from ollama_distributed.models.gguf.facts import parameter_count
from ollama_distributed.models.gguf.header import Array, Header, Value

_HIDDEN = frozenset({"general.name", "tokenizer.chat_template"})
"""Shown elsewhere: the name is in the request, the template has a field of its own."""


def model_info(header: Header, *, verbose: bool = False) -> dict[str, Any]:
    """Metadata as JSON; arrays are null unless `verbose` (and the header was read so)."""
    info = {
        key: _plain(value, verbose=verbose)
        for key, value in sorted(header.metadata.items())
        if key not in _HIDDEN
    }
    info["general.parameter_count"] = parameter_count(header)
    return info


def tensor_list(header: Header) -> list[dict[str, Any]]:
    return [
        {"name": tensor.name, "type": tensor.type.name, "shape": list(tensor.shape)}
        for tensor in header.tensors
    ]


def human_number(count: int) -> str:
    """134515008 -> 134.52M, 8030261248 -> 8.0B, as Ollama prints a model's size."""
    if count >= 10**9:
        return f"{count // 10**9}B" if count % 10**9 == 0 else f"{count / 10**9:.1f}B"
    if count >= 10**6:
        return f"{count // 10**6}M" if count % 10**6 == 0 else f"{count / 10**6:.2f}M"
    if count >= 1_000:
        return f"{count / 1_000:.0f}K"
    return str(count)


def _plain(value: Value, *, verbose: bool) -> Any:
    if isinstance(value, Array):
        if not verbose or value.values is None:
            return None
        return [_finite(item) for item in value.values]
    return _finite(value)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
