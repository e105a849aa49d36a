"""The fields that every dialect has beside its own: `options` (any Ollama option) and `keep_alive`.

The dialect's own field wins over the option of the same meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import LoadOptions, Sampling
from ollama_distributed.gateway.dialects.fields import INT_MAX
from ollama_distributed.gateway.dialects.ollama_options import read_options


def merged_options(options: Mapping[str, Any] | None, **own: Any) -> tuple[Sampling, LoadOptions]:
    """What is asked for: `own` (the dialect's fields; None is not asked for) before `options`."""
    if not options:
        seed = own.get("seed")
        if seed is not None and seed > INT_MAX:
            own["seed"] = seed & INT_MAX
        return Sampling(**own), _NO_LOADING
    sampling, loading = read_options(options)
    asked = {name: value for name, value in own.items() if value is not None}
    seed = asked.get("seed", sampling.seed)
    if seed is not None and seed > INT_MAX:
        asked["seed"] = seed & INT_MAX
    return msgspec.structs.replace(sampling, **asked), loading


_NO_LOADING = LoadOptions()
_DURATION = re.compile(
    r"(?P<sign>[-+]?)(?P<parts>(?:(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+|0)", re.ASCII
)
_PART = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?P<unit>ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_LONGEST_DURATION = 128
"""Characters."""
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_alive_s(value: str | float | None) -> float | None:
    """Seconds from Ollama's `keep_alive`: a number of seconds, or a Go duration (`5m`, `-1s`)."""
    if value is None or not isinstance(value, str):
        return None if value is None else float(value)
    match = _DURATION.fullmatch(value.strip()) if len(value) <= _LONGEST_DURATION else None
    if not match:
        raise Invalid(
            f'keep_alive must be seconds or a duration such as "5m" or "-1s", got "{value[:80]}"',
            param="keep_alive",
        )
    seconds = sum(float(part["number"]) * _UNIT_S[part["unit"]] for part in _PART.finditer(match["parts"]))
    return -seconds if match["sign"] == "-" else seconds
