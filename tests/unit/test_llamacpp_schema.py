"""Schemas on their way to llama.cpp: what is refused, and what is sent in their place."""

from __future__ import annotations

import contextlib
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.llamacpp import schema
from ollama_distributed.adapters.engines.llamacpp.guidance import bounded, closed, guided
from ollama_distributed.adapters.engines.llamacpp.patterns import check_pattern
from ollama_distributed.adapters.engines.llamacpp.schema import (
    MOST_BYTES,
    MOST_OF_PATTERNS,
    check_schema,
    is_light,
)
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream, FormatStream
from ollama_distributed.base.errors import EngineError, Invalid
from ollama_distributed.base.tokens import Done, EngineEvent, EngineFailed

# ── refused ─────────────────────────────────────────────────────────────────────────

LOST_PATTERNS = [
    *(r"\bfoo\b", r"(a)\1", r"(?<=x)y", r"(?!a)b", r"(?=a)b", r"^a\Z", r"a^b", r"a$b", r"(a$)b", r"x(^a)"),
    *(r"^[^[]$", r"^(?>a)$", r"^\cA$", r"^\0$", r"^[\b]$", r"^\<$", r"^a{,3}$", r"^a{$", r"^[^]$"),
    *(r"^[a&&b]$", r"^\N{DIGIT ONE}$", r"^x(?#hi)$", r"^(?a:x)$", r"(", r"[", r"*", "a)", "(?P=n)", "\\"),
]
"""Each tried: the wheel drops the schema."""
KEPT_PATTERNS = [
    *(r"^a\z", r"\Aab$", r"^a|^b$", r"(^a$)|b", r"^\p{L}+$", r"^[\p{L}\d]+$", r"^(?i:abc)$", r"(?i)^abc$"),
    *(r"^[a\[]$", r"^(?<n>a)$", r"^(?P<n>a)$", r"^\/$", r"^\-$", r"^\u0041$", r"^\x41$", r"^a{3}$", r"^]$"),
    *(r"^[\w-]+$", r"^\d+(\.\d+)?$", r"^.{0,100}$", r"^(a|b)*?$", "", "^$", r"^[\s\S]*$", r'^[^"\\]{1,10}$'),
]
"""Each tried: the wheel keeps them."""


@pytest.mark.parametrize(
    "bomb",
    [
        {"properties": {f"a{number}": {"type": "string", "pattern": "^a{1,9}$"} for number in range(1500)}},
        {"enum": ["x" * 1000] * 70},
        {"description": "x" * MOST_BYTES},
        {"allOf": [{"$ref": "#/$defs/a"}] * 5000, "$defs": {"a": {"type": "string"}}},
    ],
    ids=["properties", "values", "text", "references"],
)
def test_a_schema_that_takes_long_to_read_is_refused_unread(bomb: dict[str, Any]) -> None:
    """S-15: it would stand in the way of whoever else asks the same runner."""
    with pytest.raises(Invalid, match="at most 65536"):
        check_schema(bomb)


def test_a_chain_of_references_is_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    links, looks = 1500, 0
    chain: dict[str, Any] = {str(link): {"$ref": f"#/$defs/{link + 1}"} for link in range(links)}
    look = schema._resolve

    def counted(reference: Any, root: Any) -> Any:
        nonlocal looks
        looks += 1
        return look(reference, root)

    monkeypatch.setattr(schema, "_resolve", counted)
    check_schema({"$defs": {**chain, str(links): True}})
    assert looks < 3 * links
    with pytest.raises(Invalid, match="refers to itself"):
        check_schema({"$defs": {**chain, str(links): {"$ref": "#/$defs/700"}}})
    with pytest.raises(Invalid, match="not inside"):
        check_schema({"$ref": ["#"]})


@pytest.mark.parametrize("name", ["pattern", "patternProperties"])
def test_patterns_of_a_schema_have_a_bound_together(name: str) -> None:
    half = "a" * (MOST_OF_PATTERNS // 2)

    def one(pattern: str) -> dict[str, Any]:
        return {"pattern": pattern} if name == "pattern" else {"patternProperties": {pattern: True}}

    check_schema({"anyOf": [one(half), one(half)]})
    with pytest.raises(Invalid, match="together"):
        check_schema({"anyOf": [one(half), one(half), one("a")]})


@pytest.mark.parametrize("pattern", LOST_PATTERNS)
def test_a_pattern_that_would_be_lost_is_refused(pattern: str) -> None:
    with pytest.raises(Invalid, match="pattern"):
        check_schema({"properties": {"a": {"type": "string", "pattern": pattern}}})
    with pytest.raises(Invalid):
        check_schema({"patternProperties": {pattern: True}})


@pytest.mark.parametrize("pattern", KEPT_PATTERNS)
def test_a_pattern_that_is_kept_is_taken(pattern: str) -> None:
    check_pattern(pattern)


@given(st.text("ab^$()[]{}|*+?\\dbpL,-3&:<!= ", max_size=12))
def test_a_pattern_is_taken_or_refused(pattern: str) -> None:
    """No other error escapes, whatever a client writes."""
    with contextlib.suppress(Invalid):
        check_pattern(pattern)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1}, "minimum"),
        ({"type": "number", "minimum": 1, "exclusiveMinimum": True, "maximum": 1}, "minimum"),
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "multiple"),
        ({"type": "integer", "minimum": 1.5, "maximum": 1.7}, "multiple"),
        ({"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 4}, "multiple"),
        ({"type": "integer", "minimum": 10**19}, "minimum"),
        ({"minimum": "x"}, "minimum"),
        ({"multipleOf": 0}, "multipleOf"),
        ({"multipleOf": -1}, "multipleOf"),
        ({"multipleOf": 1e-12}, "multipleOf"),
        ({"multipleOf": 5e9}, "multipleOf"),
        ({"minLength": 5, "maxLength": 2}, "minLength"),
        ({"minItems": 3, "maxItems": 1}, "minItems"),
        ({"minProperties": 3, "maxProperties": 1}, "minProperties"),
        ({"minLength": -1}, "minLength"),
        ({"minLength": None}, "minLength"),
        ({"enum": []}, "enum"),
        ({"enum": "abc"}, "enum"),
        ({"type": "integer", "enum": ["a"]}, "enum"),
        ({"type": "string", "const": 5}, "const"),
        ({"type": []}, "type"),
        ({"required": True}, "required"),
        ({"required": ["a", 5]}, "required"),
        ({"properties": {"a": False}, "required": ["a"]}, "required"),
        ({"required": ["z"], "additionalProperties": False}, "required"),
        ({"minProperties": 2, "additionalProperties": False}, "minProperties"),
        ({"properties": []}, "properties"),
        ({"properties": {"a": None}}, "schema"),
        ({"$defs": []}, r"\$defs"),
        ({"anyOf": []}, "anyOf"),
        ({"additionalProperties": "x"}, "schema"),
        ({"pattern": 5}, "pattern"),
        ({"format": 5}, "format"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "itself"),
    ],
    ids=str,
)
def test_what_nothing_fits_is_refused_by_name(schema: dict[str, Any], named: str) -> None:
    for whole in (
        schema,
        {"type": "object", "properties": {"x": schema}} if "$ref" not in str(schema) else schema,
    ):
        with pytest.raises(Invalid, match=named):
            check_schema(whole)


# ── sent ────────────────────────────────────────────────────────────────────────────

bounds = st.none() | st.integers(-(10**16) + 1, 10**16 - 1) | st.floats(-1e6, 1e6).map(lambda f: round(f, 6))


@given(st.sampled_from(["number", "integer"]), bounds, bounds, st.integers(-(10**16), 10**16))
def test_a_bounded_number_is_narrower_and_not_empty(
    kind: str, low: float | None, high: float | None, value: int
) -> None:
    schema: dict[str, Any] = {"type": kind}
    schema |= {} if low is None else {"minimum": low}
    schema |= {} if high is None else {"maximum": high}
    try:
        check_schema(schema)
    except Invalid:
        return
    sent = bounded(schema)
    assert sent["minimum"] <= sent["maximum"]
    if jsonschema.Draft202012Validator({k: v for k, v in sent.items() if k != "multipleOf"}).is_valid(value):
        jsonschema.validate(value, schema)
    check_schema({k: v for k, v in sent.items() if k != "multipleOf"})


def test_anything_is_spelled_out() -> None:
    sent = guided({"type": "object", "properties": {"a": {}, "b": True, "c": {"type": "array"}}})
    anything = {"$ref": "#/$defs/any-json"}
    assert sent["properties"] == {"a": anything, "b": anything, "c": {"type": "array", "items": anything}}
    check_schema(sent)
    assert "$defs" not in guided({"type": "object", "properties": {"a": {"type": "string"}}})


def test_a_pattern_that_its_format_replaces_is_left_out() -> None:
    """As zod writes an e-mail address."""
    address = {"type": "string", "format": "email", "pattern": r"^(?!\.)[a-z.]+@[a-z]+$"}
    check_schema({"properties": {"a": address}})
    assert guided({"properties": {"a": address}})["properties"]["a"] == {"type": "string", "format": "email"}
    kept = {**address, "pattern": "^[a-z]+@x$"}
    assert guided({"properties": {"a": kept}})["properties"]["a"] == kept
    with pytest.raises(Invalid):
        check_schema({**address, "format": "phone"})


def test_a_type_is_inferred_as_llama_cpp_does() -> None:
    assert guided({"properties": {"a": {"minLength": 2}}})["type"] == "object"
    assert guided({"properties": {"a": {"minLength": 2}}})["properties"]["a"]["type"] == "string"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "null"}}, "required": ["b"]},
        {"properties": {"a": {"type": "null"}}, "anyOf": [{"properties": {"b": {"type": "null"}}}]},
    ],
)
def test_an_object_whose_members_are_named_elsewhere_stays_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


# ── the net below ───────────────────────────────────────────────────────────────────


def end_of(*texts: str, stop_type: str = "eos") -> EngineEvent:
    stream = FormatStream(CompletionStream())
    for i, text in enumerate(texts):
        stream.feed(msgspec.json.encode({"content": text, "tokens": [i + 7], "tokens_predicted": i + 1}))
    return stream.feed(
        msgspec.json.encode({"stop": True, "stop_type": stop_type, "tokens_predicted": len(texts)})
    )[-1]


def test_free_text_under_a_format_fails_at_its_end() -> None:
    end = end_of("Hello", " there")
    assert isinstance(end, EngineFailed)
    assert isinstance(end.error, EngineError)


@pytest.mark.parametrize(
    "texts", [('{"a": ', "1}"), (' "x"\n',), ("9" * 5000,), ('"\\ud800"',), ("[" * 100_000,)]
)
def test_json_passes(texts: tuple[str, ...]) -> None:
    assert isinstance(end_of(*texts), Done)


def test_json_that_was_cut_off_passes() -> None:
    assert isinstance(end_of('{"a"', stop_type="limit"), Done)


# ── how long it takes ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("schema", "light"),
    [
        ({"type": "object", "properties": {"a": {"type": "string", "description": "x" * 10_000}}}, True),
        ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(40)}}, True),
        ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100)}}, False),
        ({"enum": list(range(101))}, False),
        ({"items": {"pattern": "^a$"}}, False),
        ({"patternProperties": {"^a": True}}, False),
    ],
    ids=["long text", "small", "many members", "many values", "pattern", "pattern of names"],
)
def test_the_loop_waits_for_light_schemas_only(schema: dict[str, Any], light: bool) -> None:
    assert is_light(schema) is light
