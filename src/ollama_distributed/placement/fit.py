"""Says where a model fits before anything is downloaded or loaded, and how fast it would be.

Pure. Memory is that of `models.memory`. The speed follows from what was measured on the same
device: making a token reads all weights once, so tokens a second fall as weights grow (a mixture
of experts reads less and is faster than said here). `what_if` asks the planner of the live cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.memory import Fit, KvType, estimate, largest_fit
from ollama_distributed.models.spec import Architecture
from ollama_distributed.placement.facts import Device, Presence, Replica, size
from ollama_distributed.placement.outcome import Plan, Refusal
from ollama_distributed.placement.plan import Planner

Verdict: TypeAlias = Literal["fits", "unload", "smaller", "no"]
"""`unload`: once other models are gone; `smaller`: with less context or fewer slots."""

SpeedFrom: TypeAlias = Literal["measured", "estimated"]
"""With this model, or with one of another size."""
SAME_SIZE = 1.01
"""Weights of a size so near to another's are taken for the same: templates and licences count too."""

_DEVICES: tuple[Device, ...] = ("gpu", "cpu")
_BEST: Mapping[Verdict, int] = {"fits": 0, "unload": 1, "smaller": 2, "no": 3}


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on a node with some model."""

    device: Device
    weights_bytes: int
    tokens_per_s: float


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a node's memory."""

    model: str
    device: Device = "cpu"
    memory_bytes: int = 0
    busy: bool = False


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A node, as far as one more model is concerned. Free memory is None where nobody said it."""

    node: NodeId
    name: str = ""
    presence: Presence = "here"
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    gpu_bytes: int = 0
    gpu_free_bytes: int = 0
    disk_free_bytes: int | None = None
    """None: not known."""
    has_files: bool = False
    running: tuple[Running, ...] = ()
    speeds: tuple[Speed, ...] = ()


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A model, and how it is to be loaded."""

    architecture: Architecture
    weights_bytes: int
    """Files of model, projectors and adapters together."""
    size_bytes: int = 0
    """What a node has to fetch that has nothing of it."""
    context_tokens: int = 4096
    slots: int = 1
    kv_type: KvType = "f16"
    batch: int = 256


class Fitting(msgspec.Struct, frozen=True, kw_only=True):
    """How a model would be on one node."""

    node: NodeId
    name: str
    verdict: Verdict
    device: Device | None = None
    context_tokens: int = 0
    slots: int = 0
    memory_bytes: int = 0
    """It would take."""
    unload: tuple[str, ...] = ()
    """Models that have to go first."""
    tokens_per_s: float | None = None
    """Of one stream; None: nothing was measured there yet."""
    speed_from: SpeedFrom | None = None
    fetch_bytes: int = 0
    reason: str = ""


def fit(question: Question, machines: Iterable[Machine]) -> list[Fitting]:
    """One row a node, the best place first: by verdict, then by speed, then by name."""
    rows = [_on(question, machine) for machine in machines]
    return sorted(rows, key=lambda row: (_BEST[row.verdict], -(row.tokens_per_s or 0.0), row.name, row.node))


def _on(question: Question, machine: Machine) -> Fitting:
    obstacle = _unusable(question, machine)
    if obstacle:
        return _row(question, machine, "no", reason=obstacle)
    tried = [row for device in _DEVICES if (row := _on_device(question, machine, device)) is not None]
    if tried:
        return min(tried, key=lambda row: (_BEST[row.verdict], row.device != "gpu"))
    need = _need(question, question.slots, question.context_tokens)
    most = max(machine.memory_bytes, machine.gpu_bytes)
    return _row(question, machine, "no", reason=f"does not fit: needs {size(need)}, node has {size(most)}")


def _unusable(question: Question, machine: Machine) -> str:
    if machine.presence in ("away", "lost"):
        return "it is offline"
    if machine.presence == "leaving":
        return "it drains"
    if not (machine.memory_bytes or machine.gpu_bytes):
        return "it did not say yet what memory it has"
    free, fetch = machine.disk_free_bytes, _fetch(question, machine)
    if free is not None and fetch > free:
        return f"no room on its disk: needs {size(fetch)}, {size(free)} free"
    return ""


def _on_device(question: Question, machine: Machine, device: Device) -> Fitting | None:
    gpu = device == "gpu"
    total = machine.gpu_bytes if gpu else machine.memory_bytes
    free = machine.gpu_free_bytes if gpu else machine.memory_free_bytes
    whole = _need(question, question.slots, question.context_tokens)
    if whole <= free:
        return _row(question, machine, "fits", device=device, found=_asked(question))
    # Idle ones go first, and the largest: fewer have to.
    others = [one for one in machine.running if one.device == device]
    others.sort(key=lambda one: (one.busy, -one.memory_bytes, one.model))
    gone: list[str] = []
    for one in others:
        gone.append(one.model)
        free += one.memory_bytes
        if whole <= min(free, total):
            return _row(
                question, machine, "unload", device=device, found=_asked(question), unload=tuple(gone)
            )
    found = largest_fit(
        question.architecture,
        memory_bytes=min(free, total),
        weights_bytes=question.weights_bytes,
        context_tokens=question.context_tokens,
        slots=question.slots,
        kv_type=question.kv_type,
        batch=question.batch,
    )
    if found is None:
        return None
    return _row(question, machine, "smaller", device=device, found=found, unload=tuple(gone))


def _asked(question: Question) -> Fit:
    need = estimate(
        question.architecture,
        weights_bytes=question.weights_bytes,
        context_tokens=question.context_tokens,
        slots=question.slots,
        kv_type=question.kv_type,
        batch=question.batch,
    )
    return Fit(slots=question.slots, context_tokens=question.context_tokens, need=need)


def _need(question: Question, slots: int, context_tokens: int) -> int:
    asked = msgspec.structs.replace(question, slots=slots, context_tokens=context_tokens)
    return _asked(asked).need.total_bytes


def _fetch(question: Question, machine: Machine) -> int:
    return 0 if machine.has_files else question.size_bytes


def _row(
    question: Question,
    machine: Machine,
    verdict: Verdict,
    *,
    device: Device | None = None,
    found: Fit | None = None,
    unload: tuple[str, ...] = (),
    reason: str = "",
) -> Fitting:
    speed = expected_speed(machine.speeds, device, question.weights_bytes) if device else None
    return Fitting(
        node=machine.node,
        name=machine.name or machine.node,
        verdict=verdict,
        device=device,
        context_tokens=found.context_tokens if found else 0,
        slots=found.slots if found else 0,
        memory_bytes=found.need.total_bytes if found else 0,
        unload=unload,
        tokens_per_s=speed[0] if speed else None,
        speed_from=speed[1] if speed else None,
        fetch_bytes=_fetch(question, machine),
        reason=reason,
    )


def expected_speed(
    speeds: Iterable[Speed], device: Device, weights_bytes: int
) -> tuple[float, SpeedFrom] | None:
    """Tokens a second of one stream, from the measurement with the weights nearest in size."""
    known = [s for s in speeds if s.device == device and s.weights_bytes > 0 and s.tokens_per_s > 0]
    if not known or weights_bytes <= 0:
        return None

    def apart(speed: Speed) -> tuple[float, float]:
        ratio = speed.weights_bytes / weights_bytes
        return (max(ratio, 1 / ratio), -speed.tokens_per_s)

    nearest = min(known, key=apart)
    found = nearest.tokens_per_s * nearest.weights_bytes / weights_bytes
    return found, "measured" if apart(nearest)[0] <= SAME_SIZE else "estimated"


# ── what if ─────────────────────────────────────────────────────────────────────────


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """One model's places before and after."""

    model: str
    gone: tuple[Replica, ...]
    new: tuple[Replica, ...]

    @property
    def loads(self) -> list[NodeId]:
        """Nodes that have its files and are to have it in memory, too."""
        cold = {replica.node for replica in self.gone if not replica.warm}
        return [replica.node for replica in self.new if replica.warm and replica.node in cold]


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    lost: tuple[NodeId, ...]
    moved: tuple[Changed, ...] = ()
    no_longer: tuple[Refusal, ...] = ()
    """What fits now and would not."""
    last_copies: tuple[str, ...] = ()
    """Models of which no copy would be left, wanted anywhere or not. Sorted."""


def what_if(planner: Planner, lose: Iterable[NodeId], held: Mapping[str, Iterable[NodeId]]) -> WhatIf:
    """What would come of losing these nodes for good. The planner is as before afterwards.
    `held`: nodes by every model that there is."""
    lost = tuple(sorted(set(lose)))
    before = planner.plan()
    sites = {node: planner.sites[node] for node in lost if node in planner.sites}
    try:
        for site in sites.values():
            planner.put_site(msgspec.structs.replace(site, presence="lost"))
        after = planner.plan()
    finally:
        for site in sites.values():
            planner.put_site(site)
    living = {node for node, site in planner.sites.items() if site.presence != "lost"} - set(lost)
    return WhatIf(
        lost=lost,
        moved=tuple(_changed(before, after)),
        no_longer=tuple(_no_longer(before, after)),
        last_copies=tuple(sorted(model for model, nodes in held.items() if not living.intersection(nodes))),
    )


def _changed(before: Plan, after: Plan) -> Iterable[Changed]:
    for model in after.assignments.differences(before.assignments):
        old = {replica.node: replica for replica in before.assignments.get(model, ())}
        new = {replica.node: replica for replica in after.assignments.get(model, ())}
        yield Changed(
            model=model,
            gone=tuple(old[node] for node in sorted(old) if new.get(node) != old[node]),
            new=tuple(new[node] for node in sorted(new) if old.get(node) != new[node]),
        )


def _no_longer(before: Plan, after: Plan) -> Iterable[Refusal]:
    known = {refusal.model: refusal for refusal in before.refusals}
    for refusal in after.refusals:
        old = known.get(refusal.model)
        if old is None or refusal.copies > old.copies or refusal.warm > old.warm:
            yield refusal
