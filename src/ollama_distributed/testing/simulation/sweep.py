"""What is wrong now, in a cluster where all faults are healed: nothing, soon."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ollama_distributed.state import keys
from ollama_distributed.state.codec import decode
from ollama_distributed.state.records import Config, Member
from ollama_distributed.testing.simulation.comparing import differing
from ollama_distributed.testing.simulation.engine import WatchedEngine
from ollama_distributed.testing.simulation.node import SimulatedNode
from ollama_distributed.testing.simulation.rules import Rules


class Problem(msgspec.Struct, frozen=True):
    what: str
    held: bool = False
    """A node that flapped is held back on purpose, for a while."""


def problems(nodes: Sequence[SimulatedNode], engine: WatchedEngine, rules: Rules) -> list[Problem]:
    """Of `nodes`, which are all that there should be, up unless they left for good."""
    found = [Problem(what) for what in _leadership(nodes)]
    for node in nodes:
        found += _member(node, engine, rules)
    found += [Problem(what) for what in _views(nodes, engine)]
    return found or [Problem(what) for what in _contents(nodes, engine)]


def _leadership(nodes: Sequence[SimulatedNode]) -> list[str]:
    leaders = [node.id for node in nodes if node.leads]
    if len(leaders) != 1:
        return [f"{len(leaders)} nodes lead"]
    lives = [(node.id, node.life) for node in nodes if node.life is not None]
    return [
        f"{node} takes {life.consensus.get_leader()} for the leader"
        for node, life in lives
        if life.consensus.get_leader() != leaders[0]
    ]


def _views(nodes: Sequence[SimulatedNode], engine: WatchedEngine) -> list[str]:
    """Every mirror is up to date, and every node applies the cluster's config."""
    entry = engine.entries.get(keys.CONFIG)
    config = decode(entry.value, Config) if entry else Config()
    found = []
    for node in nodes:
        if node.life is None:
            found += [] if node.gone else [f"{node.id} is not up"]
            continue
        state, applied = node.life.mirror.state, node.life.config.current
        if state.revision != engine.revision:
            found.append(f"{node.id} shows revision {state.revision} of {engine.revision}")
        if applied != config:
            found.append(f"{node.id} applies config {applied.version} of {config.version}")
    return found


def _contents(nodes: Sequence[SimulatedNode], engine: WatchedEngine) -> list[str]:
    """Every mirror shows what the engine has."""
    looked: set[int] = set()
    found = []
    for node in nodes:
        if node.life is not None and id(node.life.mirror.state.raw) not in looked:
            state = node.life.mirror.state
            looked.add(id(state.raw))
            if (wrong := differing(state, engine)) is not None:
                found.append(f"{node.id} shows another {wrong}")
    return found


def _member(node: SimulatedNode, engine: WatchedEngine, rules: Rules) -> list[Problem]:
    if node.gone:
        left = [key for key in keys.of_node(node.id) if key in engine.entries]
        return [Problem(f"{node.id} was removed, but {key} is there") for key in left]
    entry = engine.entries.get(keys.member(node.id))
    member = decode(entry.value, Member) if entry else None
    if member is not None and (member.status, member.boot) == ("online", node.boot):
        return []
    status = f"{member.status} ({member.reason}) as {member.boot}" if member else "in no record"
    return [Problem(f"{node.id} is up as {node.boot} and {status}", held=rules.held(node.id))]
