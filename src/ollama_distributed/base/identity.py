"""Who asks. Made once per request by `access/`, carried to every decision about it."""

from __future__ import annotations

from typing import Literal

import msgspec

from ollama_distributed.base.ids import KeyId

Role = Literal["admin", "local"]


class Identity(msgspec.Struct, frozen=True):
    """A caller whose key (or loopback address) was checked."""

    role: Role
    key_id: KeyId | None = None
    """None for the role `local`, which has no key."""
    team: str = "default"
