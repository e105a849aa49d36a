"""What a person reads whose setting cannot be used: which one, what is wrong, and what was meant. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

NO_SETTINGS = frozenset({"api_key"})
"""Of our variables of the environment: the SDK and the command line read them."""


MOST_CHARS = 80
"""Of a name that is no setting: a request may bring one of megabytes, which takes a second to compare."""


def unknown_setting(name: str, known: Collection[str]) -> str:
    name = name[:MOST_CHARS]
    near = difflib.get_close_matches(name.lower(), known, 2)
    hint = f"did you mean {' or '.join(near)}?" if near else "all of them are in docs/settings.md"
    return f"there is no setting {name!r}; {hint}"


def problems(failure: ValidationError, known: Collection[str]) -> list[str]:
    """One for each setting that is wrong."""
    return [_problem(error, known) for error in failure.errors(include_url=False)]


def wrong_value(error: Mapping[str, Any]) -> str:
    """What is wrong with a value, without pydantic's own beginning."""
    return str(error["msg"]).removeprefix("Value error, ")


def _problem(error: Mapping[str, Any], known: Collection[str]) -> str:
    place = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden" and len(place) == 1:
        return unknown_setting(place[0], known)
    return f"{'.'.join(place) or 'settings'}: {wrong_value(error)}"


def unknown_variables(names: Iterable[str], prefix: str, known: Collection[str]) -> list[str]:
    """A sentence for each variable of the environment that looks like a setting and is none."""
    told = []
    for name in sorted(names):
        field = name[len(prefix) :].lower()
        if not name.upper().startswith(prefix) or field in known or field in NO_SETTINGS:
            continue
        near = difflib.get_close_matches(field, known, 1)
        hint = f"; did you mean {prefix}{near[0].upper()}?" if near else ""
        told.append(f"{name} is ignored: there is no such setting{hint}")
    return told
