"""A generation that stands before another one, and passes its reader's pace on to it."""

from __future__ import annotations

from typing import Generic, TypeVar

from ollama_distributed.base.inference import Generation

_Behind = TypeVar("_Behind", bound=Generation)


class Paced(Generic[_Behind]):
    """The one behind may come later, and the next may take its place: while the reader is slow, it
    begins paused."""

    __slots__ = ("_generation", "_paused")

    def __init__(self) -> None:
        self._generation: _Behind | None = None
        """The one behind, now."""
        self._paused = False

    def pause(self) -> None:
        self._paused = True
        if self._generation is not None:
            self._generation.pause()

    def resume(self) -> None:
        self._paused = False
        if self._generation is not None:
            self._generation.resume()

    def _stand_before(self, generation: _Behind) -> None:
        self._generation = generation
        if self._paused:
            generation.pause()
