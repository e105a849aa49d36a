"""The settings of the models' disk, as types of fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ollama_distributed.base.amounts import amount_bytes
from ollama_distributed.node.durations import Duration

_LIVE: dict[str, Any] = {"live": True}
"""As `settings.LIVE`."""


def _amount(value: object) -> object:
    """Bytes, or what `amount_bytes` reads; empty: the default's rule."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value:
        amount_bytes(value, 1 << 40)
    return value


DiskQuota = Annotated[
    str,
    BeforeValidator(_amount),
    Field(
        description="Most that the files of the model store may take of the disk: an amount (500GB, 1.5TiB) "
        "or a share of the disk (80%). What is fetched asks for its room first; models that other nodes "
        "hold go when it is short, least recently used first. Unset: as much as the disk has.",
        json_schema_extra=_LIVE,
    ),
]
DiskLowWater = Annotated[
    str,
    BeforeValidator(_amount),
    Field(
        description="What of the disk models leave free for others, as an amount or a share. Unset: 2 GiB, "
        "or 5% of a disk below 40 GiB.",
        json_schema_extra=_LIVE,
    ),
]
ScrubEvery = Annotated[
    Duration,
    Field(
        ge=0,
        description="A file of a model is read again after so long to see whether the disk still has it "
        "right; 0: only when asked for (`node scrub`). 30 days: disks are rarely worse.",
        json_schema_extra=_LIVE,
    ),
]
ScrubRate = Annotated[
    float,
    Field(
        ge=0,
        description="How fast files are read again, MiB/s; 0: no limit. Slower while people wait for "
        "answers. 8 MiB/s is hardly noticed by a disk and reads 20 TB a month.",
        json_schema_extra=_LIVE,
    ),
]
