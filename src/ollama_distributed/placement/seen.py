"""The replicated state as the planner and `fit` see it.

Pure. Nodes tell their holdings by model, so a model is one blob here, as large as all its files:
its manifest's digest and its name, since a node that has the same files under another name does
not answer to this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import Load
from ollama_distributed.models.held import spec_of
from ollama_distributed.models.memory import RUNNER_BYTES, KvType, estimate
from ollama_distributed.models.spec import Architecture
from ollama_distributed.placement.facts import GRACE_S, Blob, Loaded, Need, Presence, Site, Wish, presence
from ollama_distributed.placement.fit import Machine, Running, Speed
from ollama_distributed.state.cluster import ClusterState, NodeState
from ollama_distributed.state.records import Desired, HeldModel, Placed

GIVEN_UP = 3
"""After so many failures in a row a model is tried on other nodes; the failures are forgotten soon."""


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """How the nodes load models when nobody says otherwise (`serving.options.Rules`)."""

    context_tokens: int = 4096
    slots: int = 4
    kv_type: KvType = "f16"
    batch: int = 256


def presence_of(node: NodeState, now: float, grace_s: float = GRACE_S) -> Presence:
    """`now`: seconds since the Unix epoch."""
    member = node.member
    status = member.status if member is not None else "joining"
    away_s = now - member.since if member is not None else 0.0
    return presence(
        status, offline_for_s=away_s, draining=node.drained, grace_s=grace_s, rests=node.rest is not None
    )


def files(model: str, digest: str) -> str:
    """The planner's blob for a version of a model. `model`: canonical full name."""
    return f"{digest} {model}"


def digest_of(blob: str) -> str:
    return blob.partition(" ")[0]


def site_of(node: NodeState, placed: Placed, here: Presence) -> Site:
    held = [one for one in node.holdings.models if not one.remote] if node.holdings else []
    failed = [one for one in placed.failed if one.tries >= GIVEN_UP]
    return Site(
        node=node.id,
        name=node.name,
        presence=here,
        labels=node.labels,
        memory_bytes=placed.memory_bytes,
        gpu_bytes=placed.gpu_bytes,
        seats=placed.seats,
        disk_free_bytes=placed.disk_free_bytes,
        speed=_speed_class(placed),
        blobs=frozenset(files(one.name, one.digest) for one in held),
        named=frozenset(one.name for one in held),
        arriving=frozenset(placed.fetching),
        loaded={one.model: Loaded(one.device, one.memory_bytes, one.held) for one in placed.loaded},
        loading=frozenset(placed.loading),
        no_fetch=frozenset(one.model for one in failed if one.kind == "fetch"),
        no_load=frozenset(one.model for one in failed if one.kind == "load"),
    )


def _speed_class(placed: Placed) -> int:
    """Doublings of what it reads of weights in a second, over 1 GB: nodes of one class are alike."""
    rates = [speed.weights_bytes * speed.tokens_per_s for speed in placed.speeds]
    return max(0, 1 + math.floor(math.log2(max(rates) / 1e9))) if rates and max(rates) > 0 else 0


def placed_of(node: NodeState, load: Load | None) -> Placed | None:
    """What a node said of itself for placing; else what its hardware and its load report tell.
    None: nothing is known of it. Its disk is then taken to have room for anything."""
    if node.placed is not None:
        return node.placed
    if node.advert is None:
        return None
    hardware = node.advert.hardware
    machine = machine_of(node, load, presence="here", digest="")
    return Placed(
        node=node.id,
        memory_bytes=machine.memory_free_bytes
        + sum(one.memory_bytes for one in machine.running if one.device == "cpu"),
        gpu_bytes=sum(gpu.memory_bytes for gpu in hardware.gpus),
        disk_free_bytes=1 << 60,
    )


def machine_of(node: NodeState, load: Load | None, *, presence: Presence, digest: str) -> Machine:
    """A node for `fit`. Without a load report all of its memory counts as free."""
    hardware = node.advert.hardware if node.advert else None
    memory = hardware.memory_bytes if hardware else 0
    gpu = sum(one.memory_bytes for one in hardware.gpus) if hardware else 0
    models = load.models if load is not None else ()
    sizes = {held.name: held.size_bytes for held in node.holdings.models} if node.holdings else {}
    speeds = [
        Speed(device=s.device, weights_bytes=s.weights_bytes, tokens_per_s=s.tokens_per_s)
        for s in (node.placed.speeds if node.placed else ())
    ]
    speeds += [
        Speed(
            device="gpu" if one.vram_bytes else "cpu",
            weights_bytes=sizes.get(one.name, 0),
            tokens_per_s=one.tokens_per_s,
        )
        for one in models
    ]
    return Machine(
        node=node.id,
        name=node.name,
        presence=presence,
        memory_bytes=memory,
        memory_free_bytes=min(load.memory_free_bytes, memory) if load is not None else memory,
        gpu_bytes=gpu,
        gpu_free_bytes=max(0, gpu - sum(one.vram_bytes for one in models)),
        disk_free_bytes=node.placed.disk_free_bytes if node.placed else None,
        has_files=any(held.digest == digest for held in (node.holdings.models if node.holdings else ())),
        running=tuple(
            Running(
                model=one.name,
                device="gpu" if one.vram_bytes else "cpu",
                memory_bytes=one.vram_bytes or one.memory_bytes,
                busy=one.busy > 0,
            )
            for one in models
        ),
        speeds=tuple(speeds),
    )


def need_of(architecture: Architecture, size_bytes: int, loading: Loading) -> Need:
    """Of a loaded replica. Where a node of an older version said too little, its files and a runner:
    a lower bound."""
    context = loading.context_tokens
    if architecture.context_tokens:
        context = min(context, architecture.context_tokens)
    need = estimate(
        architecture,
        weights_bytes=size_bytes,
        context_tokens=context,
        slots=loading.slots,
        kv_type=loading.kv_type,
        batch=loading.batch,
    )
    return Need(
        memory_bytes=need.total_bytes,
        gpu_bytes=need.total_bytes - need.runner_bytes + RUNNER_BYTES,
        host_bytes=need.runner_bytes,
    )


def content(state: ClusterState, desired: Desired) -> HeldModel | None:
    """What is to be placed: the version that is wanted, or the one that counts. None: there is
    nothing that could be copied."""
    held: Mapping[NodeId, HeldModel] = state.models.get(desired.model, {})
    if desired.digest:
        return next((one for one in held.values() if one.digest == desired.digest and not one.remote), None)
    current = state.current(desired.model)
    return current if current is not None and not current.remote else None


def wish_of(desired: Desired, held: HeldModel, counts: tuple[int, int], loading: Loading) -> Wish:
    """`counts`: copies and loaded replicas (`demand.wanted`)."""
    return Wish(
        model=desired.model,
        display=held.display,
        blobs=(Blob(files(held.name, held.digest), held.size_bytes),),
        need=need_of(spec_of(held).architecture, held.size_bytes, loading),
        copies=counts[0],
        warm=counts[1],
        hold=desired.preload,
        labels=desired.labels,
        pins=desired.pins,
        keep=desired.keep,
        priority=desired.priority,
    )
