"""What an answer must remember so that another source could continue it (rules R1 to R4)."""

from __future__ import annotations

from ollama_distributed.base.inference import InferenceRequest

MOST_IDS = 1 << 18
"""More emitted tokens than any context of today holds: 2 MiB of a list, then none is kept."""


class Journal:
    """Request and emitted token ids of one answer; bounded."""

    __slots__ = ("_whole", "ids", "model_digest", "request", "resumable")

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.ids: list[int] = []
        self.model_digest = ""
        self.resumable = False
        """The source said so, and every token so far is here with its id."""
        self._whole = True

    def opened(self, *, model_digest: str, resumable: bool) -> None:
        self.model_digest = model_digest
        self.resumable = resumable and self._whole

    def emitted(self, ids: tuple[int, ...], text: str) -> None:
        if ids and len(self.ids) + len(ids) <= MOST_IDS and self._whole:
            self.ids += ids
        elif ids or text:
            # An engine without ids, or an answer without end: not to be continued.
            self._whole = self.resumable = False

    @property
    def complete(self) -> bool:
        """`ids` are all that was emitted."""
        return self._whole
