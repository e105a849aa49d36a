"""An answer that its client takes up again: after a lost connection, or at another gateway.

What was said is looked for here first, then at the nodes that hold the model, one of which
generated it. The rest comes as for any answer that goes on elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec
import structlog

from ollama_distributed.base.errors import Internal, NotFound, OllamaDistributedError
from ollama_distributed.base.inference import Delta, Event, Failed, InferenceRequest, Sink, Usage
from ollama_distributed.base.paced import Paced
from ollama_distributed.base.tokens import Written
from ollama_distributed.streams.answer import Answer
from ollama_distributed.streams.ports import Source

log = structlog.get_logger(__name__)


class Home(Protocol):
    """`streams.service.Answers`."""

    source: Source

    def answer(self, request: InferenceRequest, sink: Sink) -> Answer: ...

    def written(self, request: InferenceRequest) -> Written | None: ...


class Reattached(Paced[Answer]):
    """Implements `Generation`."""

    def __init__(self, home: Home, request: InferenceRequest, sink: Sink) -> None:
        super().__init__()
        self._home = home
        self._request = request
        self._sink = sink
        self._over = False
        self._looking = asyncio.get_running_loop().create_task(self._look(), name="re-attach")

    async def _look(self) -> None:
        """A task root: what goes wrong is the answer's end."""
        request = self._request
        try:
            written = self._home.written(request) or await self._home.source.written(request)
            if written is None:
                raise NotFound(f"no answer with the id {request.request_id} can be taken up; ask anew")
        except OllamaDistributedError as error:
            self._sink(Failed(error))
            return
        except Exception:
            log.exception("streams.reattach_defect", request_id=request.request_id)
            self._sink(Failed(Internal("internal error; the node's log has it under the request id")))
            return
        log.info("streams.reattached", request_id=request.request_id, tokens=len(written.ids))
        answer = self._home.answer(request, Rest(self._sink, request.resume_at or 0))
        self._stand_before(answer)
        answer.take_up(written)

    # ── Generation ──────────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        if self._generation is not None:
            self._generation.cancel()
        else:
            self._looking.cancel()

    def used(self) -> Usage:
        return self._generation.used() if self._generation is not None else Usage()


class Rest:
    """A sink for what the client does not have yet: after so many bytes of text."""

    def __init__(self, sink: Sink, has_bytes: int) -> None:
        self._sink = sink
        self._left = has_bytes

    def __call__(self, event: Event, /) -> None:
        if self._left and type(event) is Delta:
            event = msgspec.structs.replace(
                event, thinking=self._rest(event.thinking), text=self._rest(event.text)
            )
            if not (event.text or event.thinking or event.logprobs):
                return
        self._sink(event)

    def _rest(self, text: str) -> str:
        if not self._left:
            return text
        data = text.encode(errors="replace")
        dropped = min(self._left, len(data))
        self._left -= dropped
        return data[dropped:].decode(errors="ignore")
