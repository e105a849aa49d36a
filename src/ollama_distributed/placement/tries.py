"""When a node does a task: not again and again what fails, is done, or is undone by requests.

Pure: `now` is of a monotonic clock. A task that failed runs again after a pause that doubles. One
that is done, and still asked for, is done again after a while: by then the leader has seen what came
of it. A model that was loaded for the plan and had to go for requests counts as a failure: else plan
and requests would load and unload in turns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import msgspec

from ollama_distributed.state.records import FailedTask, Task

AGAIN_S = (5.0, 300.0)
"""First and longest pause after a task that failed."""
FORGET_S = 60.0
"""A failure is forgotten so long after the task could have run again and nobody asked for it."""
REDO_S = 3.0
"""After which a task that is done and still asked for is done again."""
STAY_S = 120.0
"""A model that is loaded for so long was not loaded in vain."""
MAX_REASON = 500
DISPLACED = "it was stopped, or requests for other models took its place"

Key: TypeAlias = tuple[str, str]
"""Kind and model."""


def key_of(task: Task) -> Key:
    return task.kind, task.model


class _Failure(msgspec.Struct, frozen=True):
    said: FailedTask
    until: float
    """It may run again then."""
    pause_s: float


class Tries:
    def __init__(self) -> None:
        self._failed: dict[Key, _Failure] = {}
        self._done: dict[Key, tuple[Task, float]] = {}
        """What was done and when, as long as it is asked for."""
        self._loaded: dict[str, float] = {}
        """When models were loaded for the plan, and not unloaded for it since."""
        self._displaced: dict[str, int] = {}

    def asked(self, wanted: Mapping[Key, Task], now: float) -> None:
        """These are to be done now, and no others."""
        # A task that runs is asked for no more, so its failure outlives the asking.
        for key in [key for key, known in self._failed.items() if now > known.until + FORGET_S]:
            del self._failed[key]
        self._done = {key: known for key, known in self._done.items() if wanted.get(key) == known[0]}
        for model in [model for model, at in self._loaded.items() if now >= at + STAY_S]:
            del self._loaded[model]
            self._displaced.pop(model, None)

    def rests(self, task: Task, now: float) -> bool:
        """It is not to be done yet."""
        failure, done = self._failed.get(key_of(task)), self._done.get(key_of(task))
        return (failure is not None and now < failure.until) or (done is not None and now < done[1] + REDO_S)

    def undone(self, task: Task, loaded: Collection[str]) -> bool:
        """It asks for a model that was loaded a moment ago and is not among `loaded` any more."""
        return task.kind == "load" and task.model in self._loaded and task.model not in loaded

    def displaced(self, task: Task, now: float, wall: float) -> float:
        """Requests took its place. The pause, s."""
        self._loaded.pop(task.model, None)
        count = self._displaced[task.model] = self._displaced.get(task.model, 0) + 1
        pause_s = min(AGAIN_S[0] * 2.0 ** (count - 1), AGAIN_S[1])
        return self._fail(task, DISPLACED, now, wall, count, pause_s)

    def failed(self, task: Task, reason: str, now: float, wall: float) -> float:
        """The pause before it runs again, s. `wall`: seconds since the Unix epoch."""
        before = self._failed.get(key_of(task))
        pause_s = min(2 * before.pause_s, AGAIN_S[1]) if before else AGAIN_S[0]
        return self._fail(task, reason, now, wall, before.said.tries + 1 if before else 1, pause_s)

    def _fail(self, task: Task, reason: str, now: float, wall: float, tries: int, pause_s: float) -> float:
        said = FailedTask(kind=task.kind, model=task.model, reason=reason[:MAX_REASON], at=wall, tries=tries)
        self._failed[key_of(task)] = _Failure(said, now + pause_s, pause_s)
        return pause_s

    def done(self, task: Task, now: float) -> None:
        self._failed.pop(key_of(task), None)
        self._done[key_of(task)] = task, now
        if task.kind == "load":
            self._loaded.setdefault(task.model, now)
        elif task.kind == "unload":
            self._loaded.pop(task.model, None)

    def rows(self) -> tuple[FailedTask, ...]:
        return tuple(self._failed[key].said for key in sorted(self._failed))
