"""Schemas of bodies and answers, for the OpenAPI document: what is always sent is required.

A field with a default may be left out of a body. Of an answer it is left out only where the struct
omits defaults; clients made of the document should know that the others are always there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect

PREFIX = "#/components/schemas/"
Schema = dict[str, Any]


def schemas_of(
    bodies: Iterable[type[Any]], answers: Iterable[type[Any]]
) -> tuple[Mapping[type[Any], Schema], dict[str, Schema]]:
    """A reference for each of them, and what the references lead to."""
    bodies = list(dict.fromkeys(bodies))
    types = list(dict.fromkeys((*bodies, *answers)))
    found, components = msgspec.json.schema_components(types, ref_template=PREFIX + "{name}")
    references = dict(zip(types, found, strict=True))
    asked = set(_reached(components, [references[one] for one in bodies]))
    always = {one.cls.__name__: _always(one) for one in _structs(types)}
    for name, schema in components.items():
        fields: dict[str, Schema] = schema.get("properties", {})
        if name not in asked and (sent := always.get(name)):
            schema["required"] = [one for one in fields if one in sent or one in schema.get("required", ())]
        for field in fields.values():
            # Nothing is what an absent field means anyway, and of an answer there is nothing to choose.
            if name not in asked or not field.get("default"):
                field.pop("default", None)
            elif isinstance(field["default"], list | dict):  # which many generators cannot write
                field["description"] = f"Default: {msgspec.json.encode(field.pop('default')).decode()}"
    return references, components


def _reached(components: Mapping[str, Schema], begin: list[Any]) -> Iterator[str]:
    """Names of components that these schemas are made of."""
    waiting, seen = begin, set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            name = str(one.get("$ref", "")).removeprefix(PREFIX)
            if name and name not in seen:
                seen.add(name)
                yield name
                waiting.append(components[name])
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _always(struct: inspect.StructType) -> set[str]:
    """Names of fields that an answer has, whatever is in them."""
    omits = struct.cls.__struct_config__.omit_defaults
    return {one.encode_name for one in struct.fields if one.default is not msgspec.UNSET and not omits}


def _structs(types: Iterable[type[Any]]) -> Iterator[inspect.StructType]:
    """All structs that values of these types hold."""
    waiting: list[Any] = list(inspect.multi_type_info(types))
    seen: set[type[msgspec.Struct]] = set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, inspect.StructType):
            if one.cls in seen:
                continue
            seen.add(one.cls)
            yield one
        for name in one.__struct_fields__:
            value = getattr(one, name)
            inner = value if isinstance(value, tuple) else (value,)
            waiting += [part for part in inner if isinstance(part, inspect.Type | inspect.Field)]
