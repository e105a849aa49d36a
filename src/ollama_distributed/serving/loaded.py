"""What is told of the models in this node's memory: to people (`ps`), to placement, to other nodes."""

from __future__ import annotations

import msgspec

from ollama_distributed.base.clock import Clock
from ollama_distributed.cluster.load import ModelLoad
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.fleet import Fleet
from ollama_distributed.serving.plan import expires_at
from ollama_distributed.serving.ports import EngineInfo
from ollama_distributed.serving.residents import Resident
from ollama_distributed.serving.speeds import Speeds


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `ps`."""

    name: str
    """Short form."""
    spec: ModelSpec
    memory_bytes: int
    vram_bytes: int
    """All of it when the engine sees a GPU and layers may go there, else 0."""
    context_tokens: int
    slots: int
    slots_busy: int
    expires_at: float | None
    """Seconds since the Unix epoch; None: never."""
    engine: EngineInfo
    node: str = ""
    """Name of the node that has it in memory; empty: this one."""
    queued: int = 0
    """Requests that wait for it."""
    used_at: float = 0.0
    """When the last request ended, or now; seconds since the Unix epoch."""
    tokens_per_s: float = 0.0
    """Of one answer alone, as measured; 0: not yet."""
    read_tokens_per_s: float = 0.0
    """Of a prompt, as measured; 0: not yet."""
    life: int = 0
    """Another number after each load."""
    reserved_bytes: int = 0
    """Memory that it counts for when another is to be loaded."""
    held: tuple[str, ...] = ()
    """Names under which placement keeps it here."""


def loaded_models(fleet: Fleet, speeds: Speeds, clock: Clock) -> list[LoadedModel]:
    """Longest remaining time first, as Ollama lists them."""
    models = [_row(resident, fleet, speeds, clock) for resident in _ready(fleet)]
    return sorted(models, key=lambda m: (-(m.expires_at or float("inf")), m.name))


def load_of(key: str, fleet: Fleet, speeds: Speeds) -> ModelLoad | None:
    """What the model of this `name_key` has to do here; None: it is not loaded."""
    for resident in _ready(fleet):
        if resident.spec.name.lower() == key:
            return ModelLoad(
                name=key,
                slots=resident.plan.slots,
                busy=resident.slots_busy,
                queued=fleet.queued(resident.key),
                read_tokens_per_s=speeds.reads(resident.device, resident.spec.weights_bytes),
                life=resident.life,
            )
    return None


def _ready(fleet: Fleet) -> list[Resident]:
    return [resident for resident in fleet.residents if resident.state == "ready"]


def _row(resident: Resident, fleet: Fleet, speeds: Speeds, clock: Clock) -> LoadedModel:
    assert resident.runner is not None
    now = clock.monotonic()
    since = now if resident.active else resident.last_used
    expires = None if resident.key in fleet.holds else expires_at(since, resident.keep_alive_s)
    memory_bytes, size = resident.runner.memory_bytes, resident.spec.weights_bytes
    return LoadedModel(
        name=resident.spec.display,
        spec=resident.spec,
        memory_bytes=memory_bytes,
        vram_bytes=memory_bytes if resident.on_gpu else 0,
        context_tokens=resident.plan.context_tokens,
        slots=resident.plan.slots,
        slots_busy=resident.slots_busy,
        expires_at=None if expires is None else clock.time() + (expires - now),
        engine=resident.runner.info,
        queued=fleet.queued(resident.key),
        used_at=clock.time() - (now - since),
        tokens_per_s=speeds.of(resident.device, size),
        read_tokens_per_s=speeds.reads(resident.device, size),
        life=resident.life,
        reserved_bytes=resident.memory_bytes,
        held=fleet.holds.names(resident.key),
    )
