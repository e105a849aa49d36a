"""The settings of how long audit records are kept, as types of fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ollama_distributed.node.durations import Duration

AuditKept = Annotated[
    Duration,
    Field(
        ge=0,
        description="Audit records are kept so long at least, own ones and copies of other nodes'; 0: for "
        "ever. 400 days: a year, and what is asked about it a month later.",
    ),
]
AuditPartMib = Annotated[
    float,
    Field(
        gt=0,
        description="A new file of the audit chain begins at this size, MiB, or after 30 days; old ones are "
        "removed as a whole. 16: some 40,000 records, and few files.",
    ),
]
