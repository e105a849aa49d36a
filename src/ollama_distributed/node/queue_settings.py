"""The settings of the queue of requests, as types of fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

_LIVE: dict[str, Any] = {"live": True}
"""As `settings.LIVE`."""

MaxQueue = Annotated[
    int,
    Field(
        ge=1,
        description="Most requests that wait; the next is refused, or takes the place of a less urgent one "
        "or of the key that holds most. 512 as in Ollama.",
        json_schema_extra=_LIVE,
    ),
]
QueuePerModel = Annotated[
    int,
    Field(
        ge=0,
        description="Most requests that wait for one model; 0: `max_queue`.",
        json_schema_extra=_LIVE,
    ),
]
QueuePerTeam = Annotated[
    int,
    Field(
        ge=0,
        description="Most requests of one team that wait; 0: `max_queue`, since a team gives way when "
        "others need the places.",
        json_schema_extra=_LIVE,
    ),
]
QueuePerKey = Annotated[
    int,
    Field(
        ge=0,
        description="Most requests of one key that wait; 0: `max_queue`, for the same reason.",
        json_schema_extra=_LIVE,
    ),
]
