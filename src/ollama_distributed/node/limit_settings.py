"""The settings of what one answer and the node's own process may take, as types of fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ollama_distributed.node.durations import Duration

_LIVE: dict[str, Any] = {"live": True}
"""As `settings.LIVE`."""

AnswerTimeout = Annotated[
    Duration,
    Field(
        ge=0,
        description="An answer has its slot for so long at most, seconds; what was said by then is the "
        "answer, which ends as one that reached its length. 0: no limit. An hour: a model without an end to "
        "its words is stopped, a slow one is not.",
        json_schema_extra=_LIVE,
    ),
]
NodeMemoryMib = Annotated[
    int,
    Field(
        ge=0,
        description="What the node's own process may take, MiB, without the runners of models. From 80 % on "
        "it keeps no connections alive, from 90 % on it refuses new requests, at 95 % it forgets answers "
        "that clients could take up again. 0: a quarter of the memory of the machine or its container, at "
        "least 1024.",
        json_schema_extra=_LIVE,
    ),
]
