"""The settings of what usage costs and how long it is kept, as types of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import yaml
from pydantic import BeforeValidator, Field

from ollama_distributed.access.usage import Price
from ollama_distributed.node.durations import Duration

_LIVE: dict[str, Any] = {"live": True}
"""As `settings.LIVE`."""
DAY_S = 86400


def _prices(value: object) -> object:
    if isinstance(value, str):
        value = yaml.safe_load(value) if value.strip() else {}
    if isinstance(value, Mapping):
        try:
            for price in value.values():
                found = msgspec.convert(price, Price)
                if min(found.input, found.output, found.cached or 0.0) < 0:
                    raise ValueError("a price is 0 or more")
        except msgspec.ValidationError as wrong:
            raise ValueError(f"a price has input, output and cached, per million tokens: {wrong}") from wrong
    return value


Prices = Annotated[
    dict[str, dict[str, float]],
    BeforeValidator(_prices),
    Field(
        description="Price of one million tokens by model: pattern -> `input`, `output` and, where prompts "
        "that the cache held cost something else, `cached`; the first pattern that fits counts. E.g. "
        '`{"llama3*": {input: 0.1, output: 0.4}}`. Unset: nothing costs anything. A request costs what held '
        "when it ended.",
        json_schema_extra=_LIVE,
    ),
]
Currency = Annotated[
    str,
    Field(
        max_length=8, description="What prices are in; only shown. Unset: not said.", json_schema_extra=_LIVE
    ),
]
PowerWatts = Annotated[
    float,
    Field(
        ge=0,
        description="What this machine draws while it answers, watts, for estimates of energy where it does "
        "not tell itself (RAPL, NVML). 0: not estimated.",
    ),
]
KwhPrice = Annotated[
    float,
    Field(ge=0, description="Price of a kilowatt-hour, in `currency`.", json_schema_extra=_LIVE),
]
HoursKept = Annotated[
    Duration,
    Field(
        ge=DAY_S,
        description="Usage is kept by the hour for so long, then by the day. 31 days: a month can be looked "
        "at closely.",
    ),
]
UsageKept = Annotated[
    Duration,
    Field(
        ge=32 * DAY_S,
        description="Usage by the day is kept so long. 400 days: a year, and the same month of the last.",
    ),
]
