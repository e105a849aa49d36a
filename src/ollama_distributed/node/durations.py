"""Durations as people write them: Go's syntax, as Ollama has it, or a number of seconds."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def duration_s(value: object) -> object:
    """Seconds from `300`, `"300"`, `"5m"`, `"1h30m"`, `"-1"` (Go's duration syntax)."""
    if not isinstance(value, str):
        return value
    sign = -1.0 if value.strip().startswith("-") else 1.0
    body = value.strip().removeprefix("-" if sign < 0 else "+")
    if _NUMBER.fullmatch(body):
        return sign * float(body)
    parts = _PART.findall(body)
    if not parts or "".join(number + unit for number, unit in parts) != body:
        raise ValueError(f"{value!r} is not a duration; write seconds or e.g. 5m, 1h30m, -1")
    return sign * sum(float(number) * _UNIT_S[unit] for number, unit in parts)


Duration = Annotated[float, BeforeValidator(duration_s)]
