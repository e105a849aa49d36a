"""When a node leaves its machine to the owner, as types of fields."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field

from ollama_distributed.node.durations import Duration
from ollama_distributed.node.polite.plan import Policy, parse_hours

_LIVE: dict[str, Any] = {"live": True}
"""As `settings.LIVE`."""


def _hours(text: str) -> str:
    parse_hours(text)
    return text


PoliteHours = Annotated[
    str,
    AfterValidator(_hours),
    Field(
        description="When this node takes work, by its machine's time zone: spans of hours, e.g. "
        "22:00-07:00, 12:00-13:00. Outside of them it rests: it takes no new requests, running answers "
        "end or move within `drain_timeout`, and its models are unloaded; it comes back by itself. "
        "Unset: always.",
        json_schema_extra=_LIVE,
    ),
]
PoliteOwner = Annotated[
    Duration,
    Field(
        ge=0,
        description="Rest until nobody has used a terminal or a desktop of the machine for so long, "
        "seconds or e.g. 10m; 0: whoever is at it does not matter, since most nodes are servers. Terminals "
        "are seen everywhere, desktops where they tell logind (GNOME, KDE).",
        json_schema_extra=_LIVE,
    ),
]
PoliteBattery = Annotated[
    bool, Field(description="Rest while the machine runs on its battery.", json_schema_extra=_LIVE)
]
PoliteCpu = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Rest while other programs use more than this share of the processor (0.5: half of all "
        "cores) for half a minute, until they have used two thirds of that or less for two minutes; 0: as "
        "much as they like.",
        json_schema_extra=_LIVE,
    ),
]


class Fields(Protocol):
    """Of `Settings`."""

    polite_hours: str
    polite_owner: float
    polite_battery: bool
    polite_cpu: float


def policy_of(settings: Fields) -> Policy:
    return Policy(
        hours=parse_hours(settings.polite_hours),
        owner_idle_s=settings.polite_owner,
        battery=settings.polite_battery,
        cpu=settings.polite_cpu,
    )
