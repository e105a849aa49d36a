"""The table of Ollama's options: names, types, and how they are read and printed.

Values come from a Modelfile (text), from `create` (JSON) and from stored layers (JSON
that Go wrote). Errors name the option. Source: Ollama `api/types.go`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ollama_distributed.base.errors import Invalid

Type = Literal["int", "float", "bool", "strings"]

OPTIONS: Mapping[str, Type] = {
    "num_keep": "int",
    "seed": "int",
    "num_predict": "int",
    "top_k": "int",
    "top_p": "float",
    "min_p": "float",
    "typical_p": "float",
    "repeat_last_n": "int",
    "temperature": "float",
    "repeat_penalty": "float",
    "presence_penalty": "float",
    "frequency_penalty": "float",
    "stop": "strings",
    "num_ctx": "int",
    "num_batch": "int",
    "num_gpu": "int",
    "main_gpu": "int",
    "use_mmap": "bool",
    "num_thread": "int",
    "draft_num_predict": "int",
}

DEPRECATED = frozenset(
    {
        "penalize_newline",
        "low_vram",
        "f16_kv",
        "logits_all",
        "vocab_only",
        "use_mlock",
        "mirostat",
        "mirostat_tau",
        "mirostat_eta",
        "tfs_z",
        "numa",
    }
)
"""Options of older Modelfiles; taken without an error and dropped, as Ollama does."""

_TYPE_NAMES: Mapping[Type, str] = {
    "int": "integer",
    "float": "float32",
    "bool": "boolean",
    "strings": "array",
}
_MAX_INT = (1 << 63) - 1
MAX_STOPS = 64
MAX_STOPS_CHARS = 4096
"""Of all together. Each is looked for in every piece of an answer, and what may be the beginning of one is
kept back: with these bounds a token costs a millisecond at the worst."""
_BOOLS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}


def check_stops(name: str, texts: Sequence[str]) -> None:
    """
    Raises:
        Invalid: more, or longer ones, than an answer can be searched for.
    """
    if len(texts) > MAX_STOPS:
        raise Invalid(f"{name} takes at most {MAX_STOPS} texts, got {len(texts)}", param=name)
    if sum(map(len, texts)) > MAX_STOPS_CHARS:
        raise Invalid(f"the texts of {name} have at most {MAX_STOPS_CHARS} characters together", param=name)


def from_text(rows: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Type the PARAMETER rows of a Modelfile; `stop` gathers, others keep their last value.

    Raises:
        Invalid: an unknown option, or a value of the wrong type.
    """
    typed: dict[str, Any] = {}
    for name, text in rows:
        if name in DEPRECATED:
            continue
        kind = OPTIONS.get(name)
        if kind is None:
            raise Invalid(f"unknown parameter '{name}'")
        if kind == "strings":
            typed.setdefault(name, []).append(text)
            check_stops(name, typed[name])
        else:
            typed[name] = _scalar_from_text(name, kind, text)
    return typed


def from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Type the `parameters` of a create request.

    Raises:
        Invalid: an unknown option, or a value of the wrong type.
    """
    typed: dict[str, Any] = {}
    for name, value in values.items():
        if name in DEPRECATED or value is None:
            continue
        if name not in OPTIONS:
            raise Invalid(f"unknown parameter '{name}'")
        typed[name] = option(name, value)
    return typed


def from_stored(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Type the parameters of a stored layer, which another version may have written.

    Options that we do not know or cannot read are left out; their names come back too.
    """
    typed: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in values.items():
        try:
            typed.update(from_json({name: value}))
        except Invalid:
            left_out.append(name)
    return typed, left_out


def option(name: str, value: Any) -> Any:
    """Check one option's JSON value and give it its type.

    Raises:
        Invalid: `option "temperature" must be of type float32`.
    """
    kind = OPTIONS[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "float" and number and math.isfinite(value):
        return float(value)
    if kind == "int" and number and math.isfinite(value) and abs(value) <= _MAX_INT:
        return int(value)
    if kind == "strings":
        # Ollama takes a list only; its Python client sends one text as it is.
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple):
            if not all(isinstance(item, str) for item in items):
                raise Invalid(f'option "{name}" must be of an array of strings')
            check_stops(name, items)
            return list(items)
    raise Invalid(f'option "{name}" must be of type {_TYPE_NAMES[kind]}')


def lines(parameters: Mapping[str, Any]) -> str:
    """The `parameters` text of /api/show: one option a line, values in column 31."""
    return "\n".join(
        f"{name:<30} {_go_quoted(item) if isinstance(item, str) else text(item)}"
        for name, item in rows(parameters)
    )


def rows(parameters: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """One row for each value, in the order of names."""
    return [
        (name, item)
        for name, value in sorted(parameters.items())
        for item in (value if isinstance(value, list | tuple) else [value])
    ]


def text(value: Any) -> str:
    """A value as a Modelfile writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


def _scalar_from_text(name: str, kind: Type, value: str) -> Any:
    try:
        if kind == "int":
            number = int(value)
            if abs(number) > _MAX_INT or not value.isascii() or "_" in value:
                raise ValueError
            return number
        if kind == "float":
            real = float(value)
            if not math.isfinite(real) or not value.isascii() or "_" in value:
                raise ValueError
            return real
        return _BOOLS[value]
    except (ValueError, KeyError):
        raise Invalid(f"invalid {kind} value [{value}] for parameter '{name}'") from None


_GO_ESCAPES = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    "\\": r"\\",
    '"': r"\"",
}


def _go_quoted(value: str) -> str:
    def escaped(character: str) -> str:
        if character in _GO_ESCAPES:
            return _GO_ESCAPES[character]
        if character.isprintable():
            return character
        code = ord(character)
        if code < 0x80:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + "".join(escaped(character) for character in value) + '"'
