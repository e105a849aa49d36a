"""Reading a request body: typed JSON, and messages that name the field at fault.

Pure. Bodies decode straight into structs; a field that a struct does not know is
ignored, so nothing a client invents reaches a runner.
"""

from __future__ import annotations

import binascii
import math
import re
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from ollama_distributed.base.errors import Invalid, Malformed, MissingBody
from ollama_distributed.models.parameters import check_stops

T = TypeVar("T")
N = TypeVar("N", int, float)

INT_MAX = 2**31 - 1
"""The engine's integers are 32 bits wide."""
SEED_MAX = 2**63 - 1
"""Clients send 64-bit seeds; what the engine gets is folded to 31 bits."""

_AT = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_TYPES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_EXPECTED = re.compile(r"^Expected `(?P<wanted>[a-z| ]+)`, got `(?P<got>[a-z]+)`$")


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a body.

    Raises:
        MissingBody: it is empty.
        Malformed: it is not JSON.
        Invalid: a field has the wrong type; the message and `param` name it.
    """
    if not body:
        raise MissingBody("missing request body")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise _wrong_type(str(exc)) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Malformed(f"The body is not valid JSON: {exc}") from exc


def _wrong_type(text: str) -> Invalid:
    """msgspec's message in the words of JSON."""
    at = _AT.match(text)
    what, path = (at["what"], at["path"]) if at else (text, "")
    expected = _EXPECTED.match(what)
    if expected:
        wanted = [_TYPES.get(name, name) for name in expected["wanted"].split(" | ") if name != "null"]
        what = f"expected {' or '.join(wanted)}, got {_TYPES.get(expected['got'], expected['got'])}"
    return Invalid(f"{path}: {what}" if path else what, param=path or None)


def need_model(model: str | None) -> str:
    if not model:
        raise Invalid("model is required", param="model")
    return model


def within(param: str, value: N | None, low: N, high: N) -> N | None:
    """`value` when it lies in low..high (both included) or is None; else a clear refusal."""
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        raise Invalid(f"{param} must be between {low} and {high}, got {value}", param=param)
    return value


def stops(param: str, value: str | list[str] | None) -> tuple[str, ...] | None:
    """Stop texts; empty ones, which would stop at once, are dropped."""
    if value is None:
        return None
    texts = tuple(text for text in ([value] if isinstance(value, str) else value) if text)
    check_stops(param, texts)
    return texts or None


def decode_base64(param: str, text: str) -> bytes:
    try:
        data = b"".join(_base64_pieces(text))
    except ValueError as exc:
        raise Invalid(f"{param} is not valid base64: {exc}", param=param) from exc
    if not data:
        raise Invalid(f"{param} is empty", param=param)
    return data


_BASE64_PIECE = 256 * 1024
"""Characters decoded in one go, a multiple of four: other threads get their turn in between."""


def _base64_pieces(text: str) -> Iterator[bytes]:
    for at in range(0, len(text), _BASE64_PIECE):
        piece = text[at : at + _BASE64_PIECE]
        if piece.endswith("=") and at + _BASE64_PIECE < len(text):
            raise ValueError("Excess data after padding")
        yield binascii.a2b_base64(piece, strict_mode=True)


_DATA_URI = re.compile(r"data:(?P<type>[\w.+-]*(?:/[\w.+-]*)?)(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
_LONGEST_HEAD = 256
"""Of a data URI, up to the comma: nobody's is longer, and an image has megabytes to search in."""
IMAGE_TYPES = frozenset({"image/jpeg", "image/jpg", "image/png", "image/webp", "image/gif"})


def image_from_uri(param: str, uri: str) -> bytes:
    """An image from `data:image/…;base64,…`. Others are refused: this server fetches no URL."""
    head = _DATA_URI.match(uri, 0, _LONGEST_HEAD)
    if not head:
        raise Invalid(
            f"{param} must be a base64 data URI (data:image/png;base64,...); no image is fetched from a URL",
            param=param,
        )
    if head["type"] and head["type"].lower() not in IMAGE_TYPES:
        raise Invalid(f"{param} has the unsupported type {head['type']}", param=param)
    return decode_base64(param, uri[head.end() :])


def json_arguments(param: str, arguments: object) -> str:
    """The arguments of an earlier tool call as JSON text; the model's template needs an object."""
    if not isinstance(arguments, str):
        return msgspec.json.encode(arguments).decode() if isinstance(arguments, dict) else "{}"
    if not arguments.strip():
        return "{}"
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise Invalid(f"{param} is not valid JSON: {exc}", param=param) from exc
    if not isinstance(value, dict):
        raise Invalid(f"{param} must be the JSON text of an object", param=param)
    return arguments
