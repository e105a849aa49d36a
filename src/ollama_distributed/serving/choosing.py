"""Which engine loads a model, and in what room (`plan.make_room` decides).

Changes nothing: the fleet does what was decided, and asks again when something has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ollama_distributed.base.errors import LoadFailed, NoCapacity
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.holds import Holds
from ollama_distributed.serving.options import Shape, plan_of
from ollama_distributed.serving.plan import Held, Load, Wait, make_room, sizes_of
from ollama_distributed.serving.ports import Engine
from ollama_distributed.serving.quarantine import Quarantine
from ollama_distributed.serving.residents import Resident, load_key
from ollama_distributed.serving.room import Room
from ollama_distributed.serving.sizes import Estimate, what_fits


class Choice:
    def __init__(
        self, engines: Sequence[Engine], room: Room, holds: Holds, quarantine: Quarantine, estimate: Estimate
    ) -> None:
        """`engines` in order of preference."""
        self._engines = tuple(engines)
        self._room = room
        self._holds = holds
        self._quarantine = quarantine
        self._estimate = estimate

    def of(
        self,
        spec: ModelSpec,
        shape: Shape,
        residents: Collection[Resident],
        reserved: tuple[Held, ...] = (),
    ) -> tuple[Load | Wait, Engine]:
        """What has to happen for it beside `residents`. `reserved`: by loads whose room is being cleared.

        Raises:
            Quarantined: it crashed too often.
            LoadFailed: no engine here can load it.
            NoCapacity: it does not fit, whatever goes for it.
        """
        self._quarantine.check(load_key(spec), spec)
        engine = next((engine for engine in self._engines if engine.can_load(spec)), None)
        if engine is None:
            raise LoadFailed(f"no engine on this node can load {spec.display}")
        hall = self._room.hall(residents, self._holds, reserved)

        def size(slots: int) -> int:
            return self._estimate(spec, plan_of(shape, slots=slots, threads=1))

        try:
            return make_room(hall, sizes_of(shape.slots, size), name=spec.display), engine
        except NoCapacity as error:
            raise NoCapacity(f"{error.message}; {what_fits(spec, shape, hall.budget_bytes)}") from None
