"""Refuses JSON schemas that llama.cpp would ignore without a word. Pure.

The wheel compiles schemas with llguidance; one that does not compile is logged, and the
answer is then not constrained at all. So what it cannot take is refused here: values of
the wrong kind, bounds that nothing fits, references that lead nowhere, patterns.
Source: JSON Schema 2020-12; tried on llama.cpp b11549 with LLAMA_LLGUIDANCE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import msgspec

from ollama_distributed.adapters.engines.llamacpp.patterns import check_pattern
from ollama_distributed.base.errors import Invalid

TYPES = frozenset({"null", "boolean", "object", "array", "number", "integer", "string"})
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
"""Which llguidance knows."""
MAX_DEPTH = 64
MOST_BYTES = 64 * 1024
"""As JSON. Compiling so much takes less than a second of a runner that answers others too
(`reference/security.md`, 3)."""
MOST_OF_PATTERNS = 2048
"""Characters of all patterns together: they take longest to check, 3 us each."""
MOST_LIGHT = 100
"""Values of a schema that the event loop may wait for."""
LARGEST = 10**16 - 1
"""Of a number's bounds. llguidance counts in 64 bits; llama.cpp's own converter hangs at a
bound of 17 digits, and takes all memory (b11549)."""
SCHEMAS = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
_COUNTS = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def is_light(schema: Mapping[str, Any]) -> bool:
    """Whether checking it, and making it into what is sent, takes less than about a millisecond: 10 us
    a value, and more a letter of a pattern."""
    left: list[Any] = [schema]
    seen = 0
    while left:
        part = left.pop()
        if not isinstance(part, Mapping | list | tuple):
            continue
        seen += len(part)
        if seen > MOST_LIGHT or "pattern" in part or "patternProperties" in part:
            return False
        left += part.values() if isinstance(part, Mapping) else part
    return True


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises:
    Invalid: the schema cannot be kept.
    """
    size = len(msgspec.json.encode(schema))
    if size > MOST_BYTES:
        raise Invalid(f"format: the schema has {size} bytes as JSON; at most {MOST_BYTES} are taken")
    _check(schema, _Whole(schema), 0)


class _Whole:
    """What is checked, and what was seen of it: one look at each thing, however often it is named."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        self.followed: set[str] = set()
        """References that lead to a schema."""
        self._letters = 0

    def count(self, pattern: object) -> None:
        self._letters += len(pattern) if isinstance(pattern, str) else 0
        if self._letters > MOST_OF_PATTERNS:
            raise Invalid(
                f"format: the patterns of the schema have more than {MOST_OF_PATTERNS} characters together"
            )


def _check(node: Any, whole: _Whole, depth: int) -> None:
    if isinstance(node, bool):
        return
    if not isinstance(node, Mapping):
        raise Invalid(f"format: a schema is an object, not {str(node)[:40]!r}")
    if depth > MAX_DEPTH:
        raise Invalid(f"format: the schema is nested deeper than {MAX_DEPTH}")
    kinds = kinds_of(node)
    if "$ref" in node:
        _follow(node["$ref"], whole)
    if "pattern" in node:
        whole.count(node["pattern"])
        if not is_spare(node):
            check_pattern(node["pattern"])
    if not isinstance(node.get("format", ""), str):
        raise _wrong("format", "a string", node["format"])
    _check_values(node, kinds)
    _check_counts(node)
    _check_numbers(node, kinds)
    for part in _parts(node):
        _check(part, whole, depth + 1)
    _check_members(node, whole)


def kinds_of(node: Mapping[str, Any]) -> Sequence[str]:
    """The types that a schema names; none: it names none.

    Raises:
        Invalid: there is no such type.
    """
    if "type" not in node:
        return ()
    named = node["type"]
    kinds = named if isinstance(named, list | tuple) else [named]
    if not kinds:
        raise _wrong("type", "a type or a list of them", named)
    for kind in kinds:
        if not isinstance(kind, str) or kind not in TYPES:
            raise Invalid(f"format: the schema has the unknown type {str(kind)[:40]!r}")
    return kinds


def is_spare(node: Mapping[str, Any]) -> bool:
    """Whether the pattern cannot be kept but the format beside it says the same: zod writes
    an e-mail address with look-ahead."""
    if node.get("format") not in FORMATS or not isinstance(node.get("pattern"), str):
        return False
    try:
        check_pattern(node["pattern"])
    except Invalid:
        return True
    return False


def _parts(node: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for key in SCHEMAS:
        if key in node:
            value = node[key]  # `items` was a list before 2020
            parts += value if key == "items" and isinstance(value, list | tuple) else [value]
    for key in LISTS:
        if key in node:
            if not isinstance(node[key], list | tuple) or not (node[key] or key == "prefixItems"):
                raise _wrong(key, "a list of schemas", node[key])
            parts += node[key]
    for key in MAPS:
        if key in node:
            if not isinstance(node[key], Mapping):
                raise _wrong(key, "an object of schemas", node[key])
            parts += node[key].values()
    return parts


def _wrong(key: str, wanted: str, value: object) -> Invalid:
    return Invalid(f"format: {key} must be {wanted}, not {str(value)[:40]!r}")


# ── values ──────────────────────────────────────────────────────────────────────────


def _check_values(node: Mapping[str, Any], kinds: Sequence[str]) -> None:
    if "enum" in node:
        values = node["enum"]
        if not isinstance(values, list | tuple) or not values:
            raise _wrong("enum", "a list of values", values)
        if kinds and not any(_is_a(value, kinds) for value in values):
            raise Invalid(f"format: no value of enum is of the type {'/'.join(kinds)}")
    if "const" in node and kinds and not _is_a(node["const"], kinds):
        raise Invalid(f"format: const {str(node['const'])[:40]!r} is not of the type {'/'.join(kinds)}")


def _is_a(value: object, kinds: Sequence[str]) -> bool:
    match value:
        case None:
            return "null" in kinds
        case bool():
            return "boolean" in kinds
        case int():
            return "integer" in kinds or "number" in kinds
        case float():
            return "number" in kinds or ("integer" in kinds and value.is_integer())
        case str():
            return "string" in kinds
        case Mapping():
            return "object" in kinds
        case _:
            return "array" in kinds


def _check_counts(node: Mapping[str, Any]) -> None:
    for low, high in _COUNTS:
        for key in (low, high):
            count = node.get(key, 0)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise _wrong(key, "a whole number of at least 0", count)
        if high in node and node.get(low, 0) > node[high]:
            raise Invalid(f"format: {low} {node[low]} is more than {high} {node[high]}")


# ── numbers ─────────────────────────────────────────────────────────────────────────


def _check_numbers(node: Mapping[str, Any], kinds: Sequence[str]) -> None:
    for key in _BOUNDS:
        value = node.get(key, 0)
        draft_4 = key.startswith("exclusive") and isinstance(value, bool)
        if not draft_4 and not _is_number(value):
            raise _wrong(key, "a number", value)
    low, high = lowest(node), highest(node)
    if low is not None and high is not None:
        open_ended = low == high and any(_excluding(node, key) for key in ("Minimum", "Maximum"))
        if low > high or open_ended:
            raise Invalid(f"format: no number is between minimum {low:g} and maximum {high:g}")
    if (low is not None and low > LARGEST) or (high is not None and high < -LARGEST):
        raise Invalid(f"format: the numbers between minimum and maximum are beyond {LARGEST}")
    whole = "integer" in kinds and "number" not in kinds
    if "multipleOf" in node:
        step = node["multipleOf"]
        if not _is_number(step) or step <= 0 or not _is_short(step):
            raise _wrong("multipleOf", "above 0, below 4e9 and of at most 10 decimals", step)
        _check_steps(node, step)
    elif whole:
        _check_steps(node, 1)


def _check_steps(node: Mapping[str, Any], step: float) -> None:
    low, high = lowest(node), highest(node)
    if low is None or high is None:
        return
    first = math.ceil(low / step)
    last = math.floor(high / step)
    first += _excluding(node, "Minimum") and first * step == low
    last -= _excluding(node, "Maximum") and last * step == high
    if first > last:
        raise Invalid(f"format: no multiple of {step:g} is between minimum {low:g} and maximum {high:g}")


def lowest(node: Mapping[str, Any]) -> float | None:
    return max(_bounds(node, "minimum", "exclusiveMinimum"), default=None)


def highest(node: Mapping[str, Any]) -> float | None:
    return min(_bounds(node, "maximum", "exclusiveMaximum"), default=None)


def _bounds(node: Mapping[str, Any], *keys: str) -> list[float]:
    return [node[key] for key in keys if key in node and not isinstance(node[key], bool)]


def _excluding(node: Mapping[str, Any], side: str) -> bool:
    exclusive, plain = node.get(f"exclusive{side}"), node.get(side.lower())
    if isinstance(exclusive, bool) or exclusive is None:
        return bool(exclusive)
    return plain is None or (exclusive >= plain if side == "Minimum" else exclusive <= plain)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_short(step: float) -> bool:
    """As llguidance counts decimals: in binary, until nothing is left."""
    for _ in range(11):
        if step % 1 == 0:
            return step < 2**32
        step *= 10
    return False


# ── members ─────────────────────────────────────────────────────────────────────────


def _check_members(node: Mapping[str, Any], whole: _Whole) -> None:
    required = node.get("required", ())
    if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
        raise _wrong("required", "a list of names", required)
    for pattern in node.get("patternProperties", {}):
        whole.count(pattern)
        check_pattern(pattern)
    members = node.get("properties", {})
    shut = node.get("additionalProperties") is False and "patternProperties" not in node
    for name in required:
        if members.get(name, not shut) is False:
            raise Invalid(f"format: required names {name[:40]!r}, which the schema does not admit")
    if shut and node.get("minProperties", 0) > len(members):
        raise Invalid(f"format: minProperties {node['minProperties']} is more than the properties")


# ── references ──────────────────────────────────────────────────────────────────────


def _follow(reference: Any, whole: _Whole) -> None:
    """To what is no mere reference itself."""
    seen: set[str] = set()
    while True:
        at = _resolve(reference, whole.root)
        if reference in seen:
            break
        seen.add(reference)
        if reference in whole.followed or not isinstance(at, Mapping) or "$ref" not in at:
            whole.followed |= seen
            return
        reference = at["$ref"]
    raise Invalid(f"format: the schema refers to {reference[:80]!r}, which refers to itself")


def _resolve(reference: Any, root: Mapping[str, Any]) -> Any:
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
    return at
