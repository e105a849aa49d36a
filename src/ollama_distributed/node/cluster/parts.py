"""What the cluster side of a node is made of: handed over once, by `node/`."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ports import Audit
from ollama_distributed.cluster.load import Load
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.node.cluster.keys import SharedKeys
from ollama_distributed.node.people.mirror import SharedPeople
from ollama_distributed.node.placing import Placing
from ollama_distributed.node.settings import Settings
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.serving.ports import EngineInfo
from ollama_distributed.state.records import Config, Deleted, Hardware, Rest


@dataclass(frozen=True, kw_only=True)
class Parts:
    settings: Settings
    node: NodeId
    started_at: float
    clock: Clock
    chance: random.Random
    api: tuple[str, ...]
    """URLs of this node's API that others may show."""
    engines: Sequence[EngineInfo]
    hardware: Callable[[], Hardware]
    """As far as it is known: the GPU driver may take a second to tell."""
    models: Callable[[], Sequence[ModelSpec]]
    loaded: Callable[[], Sequence[LoadedModel]]
    usage: Callable[[], Utilization]
    alerts: Callable[[], Sequence[Alert]]
    """What is wrong with this node's models, memory and disk."""
    load: Callable[[], Load]
    rest: Callable[[], Rest | None]
    """Why this node takes no work by its own policy; None: it does."""
    pool: PeerPool
    door: PeerDoor
    keys: SharedKeys
    people: SharedPeople
    placing: Placing
    clean: Callable[[Mapping[str, Deleted], float], Awaitable[None]]
    """Removes what was deleted in the whole cluster, but not what this node brought along at the
    given time (`catalog.versions.Cleaner`)."""
    audit: Audit
    state_changed: Callable[[], None]
    """Called after each change of the cluster's state, on the loop; it must be quick."""
    apply_config: Callable[[Config], None]
    """Called with each version of the cluster's config, also the first one."""

    @property
    def data_dir(self) -> Path:
        return self.settings.data_dir
