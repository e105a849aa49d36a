"""Refuses JSON schemas that llama.cpp would ignore without a word, and closes objects. Pure.

The wheel compiles schemas with llguidance; one that does not compile is logged, and the
answer is then not constrained at all. So what it cannot take is refused here: unknown
types, references that lead nowhere or to the network, patterns that do not compile.
Source: JSON Schema 2020-12; llama.cpp b11549 with LLAMA_LLGUIDANCE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from ollama_distributed.base.errors import Invalid

TYPES = frozenset({"null", "boolean", "object", "array", "number", "integer", "string"})
MAX_DEPTH = 64
_SCHEMAS = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_OPENERS = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
_MAPS = ("properties", "patternProperties", "$defs", "definitions")


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises:
    Invalid: the schema cannot be kept.
    """
    _check(schema, schema, 0)


def _check(node: Any, root: Mapping[str, Any], depth: int) -> None:
    if isinstance(node, bool):
        return
    if not isinstance(node, Mapping):
        raise Invalid(f"format: a schema is an object, not {str(node)[:40]!r}")
    if depth > MAX_DEPTH:
        raise Invalid(f"format: the schema is nested deeper than {MAX_DEPTH}")
    kinds = node.get("type", [])
    for kind in kinds if isinstance(kinds, list | tuple) else [kinds]:
        if kind not in TYPES:
            raise Invalid(f"format: the schema has the unknown type {str(kind)[:40]!r}")
    if "$ref" in node:
        _resolve(node["$ref"], root)
    if "pattern" in node:
        _check_pattern(node["pattern"])
    for key in _SCHEMAS:
        if isinstance(node.get(key), Mapping):
            _check(node[key], root, depth + 1)
    for key in _LISTS:
        for part in node.get(key, ()):
            _check(part, root, depth + 1)
    for key in _MAPS:
        for part in node.get(key, {}).values():
            _check(part, root, depth + 1)


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, its objects without members that it does not name.

    As llama.cpp's own converter and Ollama have it; JSON Schema itself would let a model
    add members until its limit. Where `allOf` composes objects they stay open, since each
    part would refuse the members of the others.
    """
    return dict(schema) if _mentions(schema, "allOf") else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in _SCHEMAS:
        if key in found:
            found[key] = _closed(found[key])
    for key in _LISTS:
        if key in found:
            found[key] = [_closed(part) for part in found[key]]
    for key in _MAPS:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _closed(part) for name, part in found[key].items()}
    if isinstance(found.get("properties"), Mapping) and not _OPENERS & found.keys():
        found["additionalProperties"] = False
    return found


def _mentions(node: Any, key: str) -> bool:
    if isinstance(node, Mapping):
        return key in node or any(_mentions(value, key) for value in node.values())
    return isinstance(node, list | tuple) and any(_mentions(part, key) for part in node)


def _resolve(reference: Any, root: Mapping[str, Any]) -> None:
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise Invalid(f"format: the schema refers to {str(reference)[:80]!r}, which is not inside it")
    at: Any = root
    for part in reference[1:].split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(at, Mapping) and key in at:
            at = at[key]
        elif isinstance(at, list | tuple) and key.isdigit() and int(key) < len(at):
            at = at[int(key)]
        else:
            raise Invalid(f"format: the schema refers to {reference[:80]!r}, which is not there")


def _check_pattern(pattern: Any) -> None:
    try:
        re.compile(str(pattern))
    except (re.error, RecursionError, OverflowError) as exc:
        raise Invalid(f"format: the pattern {str(pattern)[:80]!r} does not compile") from exc
