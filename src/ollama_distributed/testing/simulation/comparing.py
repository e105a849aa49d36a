"""What was written or is shown, against what was meant or is stored. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.ports import Entry
from ollama_distributed.state import keys
from ollama_distributed.state.changes import Change, RollbackConfig, SetConfig, SetDrain, SetLabels
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import decode
from ollama_distributed.state.records import Config, Intent

R = TypeVar("R", bound=msgspec.Struct)


class Stored(Protocol):
    """The coordination engine's own state."""

    entries: dict[str, Entry]
    revision: int


def differing(state: ClusterState, engine: Stored) -> str | None:
    """A key that the state shows otherwise than the engine has it."""
    known = {key: entry for key, entry in engine.entries.items() if keys.subject(key) is not None}
    for key, entry in known.items():
        if state.raw.get(key) != (entry.value, entry.revision):
            return key
    return next((key for key in state.raw if key not in known), None)


def follows(change: Change, after: Mapping[str, bytes | None], before: Mapping[str, Entry | None]) -> bool:
    """Whether what was written is what the change says, on top of what was there."""
    match change:
        case SetConfig(values=values, base=base):
            new = _record(after.get(keys.CONFIG), Config)
            return new is not None and new.values == values and _next(new, base, before)
        case RollbackConfig(base=base):
            new = _record(after.get(keys.CONFIG), Config)
            return new is not None and _next(new, base, before)
        case SetDrain(node=node, drain=drain):
            said, was = _intents(node, after, before)
            return said is not None and (said.drain, _set(said)) == (drain, _set(was))
        case SetLabels(node=node, labels=labels):
            said, was = _intents(node, after, before)
            wanted = {name: value for name, value in {**was.labels, **labels}.items() if value is not None}
            return said is not None and (said.drain, _set(said)) == (was.drain, wanted)
        case _:
            return True


def _next(new: Config, base: int, before: Mapping[str, Entry | None]) -> bool:
    entry = before.get(keys.CONFIG)
    old = _record(entry.value if entry else None, Config) or Config()
    return new.version == base + 1 == old.version + 1


def _intents(
    node: NodeId, after: Mapping[str, bytes | None], before: Mapping[str, Entry | None]
) -> tuple[Intent | None, Intent]:
    entry = before.get(keys.intent(node))
    was = _record(entry.value if entry else None, Intent) or Intent(node=node)
    return _record(after.get(keys.intent(node)), Intent), was


def _set(intent: Intent) -> dict[str, str]:
    return {name: value for name, value in intent.labels.items() if value is not None}


def _record(value: bytes | None, kind: type[R]) -> R | None:
    return None if value is None else decode(value, kind)
