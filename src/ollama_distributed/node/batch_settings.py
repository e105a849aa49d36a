"""The settings of files and batches, as types of fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ollama_distributed.node.durations import Duration

BatchFile = Annotated[
    float,
    Field(gt=0, description="Most that a file for a batch may have, MiB. 200: as OpenAI has it."),
]
BatchDisk = Annotated[
    float,
    Field(
        gt=0,
        description="Most that all files of batches on this node may take together, results too, MiB. "
        "10 GiB: fifty of the largest.",
    ),
]
BatchKeep = Annotated[
    Duration,
    Field(
        gt=0,
        description="How long results of batches are kept, and batches that ended. 30 days, as OpenAI keeps "
        "them.",
    ),
]
