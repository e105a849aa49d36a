"""This node's memory for models: how much there is, and who has it.

State only; `plan.make_room` decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ollama_distributed.serving.holds import Holds
from ollama_distributed.serving.plan import Hall, Held
from ollama_distributed.serving.ports import Machine
from ollama_distributed.serving.residents import Resident
from ollama_distributed.serving.settings import ServingSettings


class Room:
    def __init__(self, machine: Machine, settings: ServingSettings) -> None:
        self._machine = machine
        self._settings = settings
        self._budget_bytes = 0

    def configure(self, settings: ServingSettings) -> None:
        self._settings = settings
        if settings.memory_limit_bytes:
            self._budget_bytes = settings.memory_limit_bytes

    def budget_bytes(self, *, empty: bool) -> int:
        """For all models together. Without a limit it is what is free while none is loaded (`empty`)."""
        if empty:
            limit = self._settings.memory_limit_bytes
            free = self._machine.memory_available_bytes() - self._settings.memory_reserve_bytes
            self._budget_bytes = limit or max(free, 0)
        return self._budget_bytes

    def hall(self, residents: Collection[Resident], holds: Holds, reserved: tuple[Held, ...]) -> Hall:
        """What runs now. `reserved`: by loads whose room is being cleared."""
        held = tuple(
            Held(
                key=r.key,
                memory_bytes=r.memory_bytes,
                last_used=r.last_used,
                busy=r.state == "loading" or r.active > 0,
                kept=r.key in holds,
            )
            for r in residents
            if r.state != "unloading"
        )
        return Hall(
            budget_bytes=self.budget_bytes(empty=not residents),
            max_loaded=self._settings.max_loaded_models,
            held=held + reserved,
        )

    def has(self, memory_bytes: int, residents: Iterable[Resident], reserved: Iterable[Held]) -> bool:
        """Whether so much more is free now: what is on its way out still has its memory."""
        if not memory_bytes:
            return True
        held = [r.memory_bytes for r in residents if r.memory_bytes]
        held += [h.memory_bytes for h in reserved]
        room = len(held) < self._settings.max_loaded_models
        return room and sum(held) + memory_bytes <= self._budget_bytes
