"""Makes a checked JSON schema into the one that is sent: closed, and with an end in sight. Pure.

JSON Schema lets an object have members that it does not name, a number any count of
digits, and any white space. A small model takes up each of these until its limit.
llama.cpp's own converter bounds them; llguidance, which the wheel has instead, does not.
Source: tried on llama.cpp b11549.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollama_distributed.adapters.engines.llamacpp.schema import (
    LARGEST,
    LISTS,
    MAPS,
    SCHEMAS,
    highest,
    is_spare,
    kinds_of,
    lowest,
)

LARGEST_UNASKED = 10**15
"""Where the schema names no bound: 15 digits, as llama.cpp's own converter has it."""
SMALLEST_STEP = 1e-9
"""Between two numbers; llguidance can bound decimals in no other way."""
SETTINGS: dict[str, Any] = {
    "lenient": True,
    "coerce_one_of": True,
    # Its white space, even with a pattern, may come again and again. One line then, as Python writes it.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""For llguidance; others ignore them. Not lenient, it would drop a schema for `oneOf` or
any keyword that it does not know."""
ANY = "any-json"
_OPENERS = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
_PLACES = {"anyOf", "oneOf", "allOf", "$ref"}
_SAYING = _PLACES | {"type", "const", "enum"}
_INFERRED = {
    **dict.fromkeys(("properties", "required", "patternProperties", "additionalProperties"), "object"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("pattern", "minLength", "maxLength", "format"), "string"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number"),
}
"""What a schema without a type means, as llama.cpp's own converter guesses."""


def guided(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema as the engine gets it."""
    return {**bounded(closed(schema)), "x-guidance": SETTINGS}


# ── closed ──────────────────────────────────────────────────────────────────────────


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, its objects without members that it does not name.

    As llama.cpp's own converter and Ollama have it. Where objects are composed they stay
    open, since each part would refuse the members of the others.
    """
    return dict(schema) if _composes(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = _mapped(schema, _closed)
    members = found.get("properties")
    if (
        isinstance(members, Mapping)
        and not _OPENERS & found.keys()
        and members.keys() >= set(found.get("required", ()))
    ):
        found["additionalProperties"] = False
    return found


def _composes(node: Any) -> bool:
    if isinstance(node, Mapping):
        composed = "allOf" in node or ("properties" in node and not _PLACES.isdisjoint(node))
        return composed or any(_composes(value) for value in node.values())
    return isinstance(node, list | tuple) and any(_composes(part) for part in node)


def _mapped(schema: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """A copy with each schema in it changed, without a pattern that its format replaces."""
    found = dict(schema)
    if is_spare(found):
        del found["pattern"]
    for key in SCHEMAS:
        if key in found:
            value = found[key]
            found[key] = [change(v) for v in value] if isinstance(value, list | tuple) else change(value)
    for key in LISTS:
        if key in found:
            found[key] = [change(part) for part in found[key]]
    for key in MAPS:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: change(part) for name, part in found[key].items()}
    return found


# ── bounded ─────────────────────────────────────────────────────────────────────────


def bounded(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, its numbers with an end; idempotent but for the definition of `ANY`."""
    if _composes(schema):
        found: dict[str, Any] = _with_ends(schema)  # parts that say nothing are there for others to say
        return found
    found = _explicit(schema)
    if _refers_to_any(found):
        found["$defs"] = {**found.get("$defs", {}), ANY: _any()}
    return found


def _with_ends(schema: Any) -> Any:
    return _ended(_mapped(schema, _with_ends)) if isinstance(schema, Mapping) else schema


def _explicit(schema: Any) -> Any:
    """Also says the type of what may be anything."""
    if schema is True:
        return _to_any()
    if not isinstance(schema, Mapping):
        return schema
    found = _mapped(schema, _explicit)
    if not _SAYING & found.keys():
        kind = next((_INFERRED[key] for key in found if key in _INFERRED), "")
        if not kind:
            return found | _to_any()
        found["type"] = kind
    kinds = kinds_of(found)
    if "array" in kinds and not {"items", "prefixItems"} & found.keys():
        found["items"] = _to_any()
    if "object" in kinds and not (_OPENERS | {"properties"}) & found.keys():
        found["additionalProperties"] = _to_any()
    return _ended(found)


def _ended(node: dict[str, Any]) -> dict[str, Any]:
    """A number within bounds. Narrower than asked for is still what was asked for."""
    kinds = kinds_of(node)
    if not {"number", "integer"} & set(kinds) or {"const", "enum"} & node.keys():
        return node
    low, high = lowest(node), highest(node)
    found = dict(node)
    if low is None or low < -LARGEST:
        found["minimum"] = -LARGEST_UNASKED if high is None or high > -LARGEST_UNASKED else -LARGEST
        found.pop("exclusiveMinimum", None)
    if high is None or high > LARGEST:
        found["maximum"] = LARGEST_UNASKED if low is None or low < LARGEST_UNASKED else LARGEST
        found.pop("exclusiveMaximum", None)
    if "number" in kinds and "multipleOf" not in found and _coarse(low, high):
        found["multipleOf"] = SMALLEST_STEP
    return found


def _coarse(low: float | None, high: float | None) -> bool:
    """Whether leaving out what is finer than the step leaves enough."""
    exact = all(bound is None or round(bound, 9) == bound for bound in (low, high))
    return exact and (low is None or high is None or high == low or high - low >= 1000 * SMALLEST_STEP)


def _any() -> dict[str, Any]:
    number = {"type": "number", **_ended({"type": "number"})}
    plain = [{"type": kind} for kind in ("string", "boolean", "null")]
    array = {"type": "array", "items": _to_any()}
    members = {"type": "object", "additionalProperties": _to_any()}
    return {"anyOf": [members, array, number, *plain]}


def _to_any() -> dict[str, Any]:
    return {"$ref": f"#/$defs/{ANY}"}


def _refers_to_any(node: Any) -> bool:
    if isinstance(node, Mapping):
        return node.get("$ref") == _to_any()["$ref"] or any(map(_refers_to_any, node.values()))
    return isinstance(node, list | tuple) and any(map(_refers_to_any, node))
