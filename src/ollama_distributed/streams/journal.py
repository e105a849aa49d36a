"""What an answer must remember so that another source can continue it (rules R1 to R4), and so
that its client can take it up again."""

from __future__ import annotations

import io

from ollama_distributed.base.inference import InferenceRequest
from ollama_distributed.base.tokens import Done, Left, Prepared, Resume, Tokens, Written

MOST_IDS = 1 << 18
"""More emitted tokens than any context of today holds: 2 MiB of a list, then none is kept."""
_AS_BYTES = "surrogateescape"
"""Bytes that are no whole character survive in the text as lone surrogates."""


_NOT_PREPARED = Prepared()


class Journal:
    """Request, prompt, emitted token ids and their text, of one answer; bounded."""

    __slots__ = ("_prepared", "_said", "_whole", "done", "ids", "request", "resumable")

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.ids: list[int] = []
        self.done: Done | None = None
        """The answer is complete."""
        self.resumable = False
        """The source said so, and every token so far is here with its id."""
        self._prepared = _NOT_PREPARED
        self._said = io.StringIO()
        self._whole = True

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self._prepared.prompt_ids

    @property
    def model_digest(self) -> str:
        return self._prepared.model_digest

    def opened(self, by: Prepared) -> None:
        """A source begins the answer, from its first token."""
        self._prepared, self.resumable = by, by.resumable
        self._whole = True
        if self.ids:
            self.ids.clear()
            self._said = io.StringIO()

    def emitted(self, tokens: Tokens) -> None:
        ids = tokens.ids
        if ids and self._whole and len(self.ids) + len(ids) <= MOST_IDS:
            self.ids += ids
            self._said.write(tokens.text)
            if tokens.raw:
                self._said.write(tokens.raw.decode(errors=_AS_BYTES))
        elif ids or tokens.text or tokens.raw:
            # An engine without ids, or an answer without end: not to be continued.
            self.broken()

    def broken(self) -> None:
        """Something came that has no ids."""
        self._whole = self.resumable = False

    @property
    def context(self) -> tuple[int, ...]:
        """Prompt and answer, where they were asked for and are known."""
        if not (self.request.want_context and self.prompt_ids and self._whole):
            return ()
        return (*self.prompt_ids, *self.ids)

    @property
    def said(self) -> bytes:
        return self._said.getvalue().encode(errors=_AS_BYTES)

    def resume(self, left: tuple[Left, ...] = (), deaths: int = 0) -> Resume:
        """What another source needs to go on, or to begin again."""
        if not (self.resumable and self.ids):
            return Resume(left=left, deaths=deaths)
        return Resume(
            ids=tuple(self.ids),
            said=self.said,
            prompt_ids=self._prepared.prompt_ids,
            prompt_text=self._prepared.prompt_text,
            model_digest=self._prepared.model_digest,
            left=left,
            deaths=deaths,
        )

    def written(self) -> Written | None:
        """For who takes the answer up again; None: it cannot be."""
        if not (self._whole and self.resumable):
            return None
        return Written(prepared=self._prepared, ids=tuple(self.ids), said=self.said, done=self.done)

    def take(self, written: Written) -> None:
        """Begin where another journal was."""
        self.opened(written.prepared)
        self.ids += written.ids
        self._said.write(written.said.decode(errors=_AS_BYTES))
