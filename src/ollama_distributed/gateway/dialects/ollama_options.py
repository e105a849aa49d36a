"""Ollama's `options` object in Ollama's words: a wrong type names the option, an unknown one
is ignored. Numbers are JSON numbers: an integer option takes `1.0`, as it does in Ollama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import LoadOptions, Sampling
from ollama_distributed.models.parameters import check_stops

Kind = Literal["integer", "float32", "boolean", "array"]

SAMPLING: Mapping[str, Kind] = {
    "num_keep": "integer",
    "seed": "integer",
    "num_predict": "integer",
    "top_k": "integer",
    "top_p": "float32",
    "min_p": "float32",
    "typical_p": "float32",
    "repeat_last_n": "integer",
    "temperature": "float32",
    "repeat_penalty": "float32",
    "presence_penalty": "float32",
    "frequency_penalty": "float32",
    "stop": "array",
}
LOADING: Mapping[str, Kind] = {
    "num_ctx": "integer",
    "num_batch": "integer",
    "num_gpu": "integer",
    "main_gpu": "integer",
    "use_mmap": "boolean",
    "num_thread": "integer",
}
_IGNORED: Mapping[str, Kind] = {"draft_num_predict": "integer"}
_KINDS = {**SAMPLING, **LOADING, **_IGNORED}
_LEAST = {"num_ctx": 0, "num_batch": 1, "num_thread": 1}
"""Less means: as the server has it. A context of 0 has no room for an embedding's input; of an answer
it means the same as none."""
_INT64 = 2**63
_NO_SAMPLING = Sampling()
_NO_LOADING = LoadOptions()


def read_options(options: Mapping[str, Any] | None) -> tuple[Sampling, LoadOptions]:
    """Raises `Invalid`, naming the option."""
    if not options:
        return _NO_SAMPLING, _NO_LOADING
    sampling: dict[str, Any] = {}
    loading: dict[str, Any] = {}
    for name, value in options.items():
        kind = _KINDS.get(name)
        if kind is None or value is None:
            continue
        read = _read(name, kind, value)
        if name in SAMPLING:
            sampling[name] = read
        elif name in LOADING and read >= _LEAST.get(name, read):
            loading[name] = read
    return (
        Sampling(**sampling) if sampling else _NO_SAMPLING,
        LoadOptions(**loading) if loading else _NO_LOADING,
    )


def _read(name: str, kind: Kind, value: Any) -> Any:
    if kind == "array":
        if not isinstance(value, list):
            raise Invalid(f'option "{name}" must be of type array', param=name)
        if not all(isinstance(item, str) for item in value):
            raise Invalid(f'option "{name}" must be of an array of strings', param=name)
        texts = tuple(item for item in value if item)
        check_stops(name, texts)
        return texts
    if kind == "boolean":
        if not isinstance(value, bool):
            raise Invalid(f'option "{name}" must be of type boolean', param=name)
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float32":
        if not number:
            raise Invalid(f'option "{name}" must be of type float32', param=name)
        return float(value)
    if not number or not -_INT64 <= value < _INT64:
        raise Invalid(f'option "{name}" must be of type integer', param=name)
    return int(value)
