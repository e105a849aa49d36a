"""What an answer must remember so that another source can continue it (rules R1 to R4)."""

from __future__ import annotations

from ollama_distributed.base.inference import InferenceRequest
from ollama_distributed.base.tokens import Left, Prepared, Resume

MOST_IDS = 1 << 18
"""More emitted tokens than any context of today holds: 2 MiB of a list, then none is kept."""


class Journal:
    """Request, prompt and emitted token ids of one answer; bounded."""

    __slots__ = ("_whole", "ids", "model_digest", "prompt_ids", "prompt_text", "request", "resumable")

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.ids: list[int] = []
        self.prompt_ids: tuple[int, ...] = ()
        self.prompt_text = ""
        self.model_digest = ""
        self.resumable = False
        """The source said so, and every token so far is here with its id."""
        self._whole = True

    def opened(self, by: Prepared) -> None:
        """A source begins the answer, from its first token."""
        self.ids.clear()
        self.prompt_ids, self.prompt_text = by.prompt_ids, by.prompt_text
        self.model_digest, self.resumable = by.model_digest, by.resumable
        self._whole = True

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

    def resume(self, left: tuple[Left, ...], deaths: int) -> Resume:
        """What another source needs to go on, or to begin again."""
        if not (self.resumable and self.ids):
            return Resume(left=left, deaths=deaths)
        return Resume(
            ids=tuple(self.ids),
            prompt_ids=self.prompt_ids,
            prompt_text=self.prompt_text,
            model_digest=self.model_digest,
            left=left,
            deaths=deaths,
        )
