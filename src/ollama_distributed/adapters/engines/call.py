"""One running answer of an engine over HTTP: the request, its events, its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from ollama_distributed.adapters.engines.framing import ServerSentEvents, Whole
from ollama_distributed.adapters.engines.http import Exchange, Route
from ollama_distributed.adapters.engines.intake import Intake
from ollama_distributed.base.errors import EngineError, Internal, OllamaDistributedError
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, EngineSink, Tokens

log = structlog.get_logger(__name__)

MAX_ERROR_BODY_BYTES = 1_048_576

_encode = msgspec.json.Encoder().encode
_DEFECT = "internal error; the node's log has it"

ErrorReader = Callable[[int, bytes], OllamaDistributedError]
"""Status and body of a refusal -> our error."""


class Framing(Protocol):
    """Cuts a body into records: lines, or server-sent events."""

    held_bytes: int
    """Of the record that is not complete."""

    def feed(self, data: bytes, /) -> list[bytes]: ...


class EventParser(Protocol):
    """Turns a record into engine events."""

    def feed(self, data: bytes, /) -> list[EngineEvent]: ...


ReadTokens = Callable[[bytes, bool], Sequence[Tokens | ChatDelta] | None]
"""An `EventParser` may have it as `tokens`, a shorter way for what nearly all of an answer is: a piece
of the body, not cut yet, that is whole events with text and nothing else. The second argument: whether
they may be told together. None: it is something else, for `feed`."""


class Call:
    """A `Generation`. The sink gets exactly one last event, unless it is cancelled."""

    def __init__(
        self,
        sink: EngineSink,
        on_over: Callable[[Call], None],
        on_lost: Callable[[Call, OllamaDistributedError], None],
        *,
        read_error: ErrorReader,
        framing: Callable[[], Framing] = ServerSentEvents,
        intake: Intake | None = None,
        joins: bool = False,
    ) -> None:
        """`joins`: tokens that came together may be told together.

        `on_over`: it ended or was cancelled. `on_lost`: its connection broke; the owner
        answers with `fail`, when it knows why. `intake`: reads what follows the first token."""
        self._sink = sink
        self._on_over = on_over
        self._on_lost = on_lost
        self._read_error = read_error
        self._intake = intake
        self._joins = joins
        self._make_framing = framing
        self._framing = framing()
        self._exchange: Exchange | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._parser: EventParser | None = None
        self._read: ReadTokens | None = None
        self._error_body = bytearray()
        self._paused = False
        self._over = False
        self.whole = False
        """It had its whole answer."""

    # ── the caller's side (`Generation`) ────────────────────────────────────────────

    def cancel(self) -> None:
        self._end()

    def pause(self) -> None:
        self._paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume(self) -> None:
        self._paused = False
        if self._exchange is not None:
            self._exchange.resume()

    # ── the runner's side ───────────────────────────────────────────────────────────

    def begin(self, step: Callable[[], None]) -> None:
        """As `prepare`, for what need not wait for anything."""
        error: OllamaDistributedError | None = None
        try:
            step()
        except OllamaDistributedError as exc:
            error = exc
        except Exception:
            log.exception("engines.call_defect")
            error = Internal(_DEFECT)
        if error is not None:  # the caller has not yet got what it would cancel
            asyncio.get_running_loop().call_soon(self.fail, error)

    def prepare(self, steps: Callable[[], Awaitable[None]]) -> None:
        """Run `steps`, which ends in `send`; its errors end the call."""

        async def run() -> None:
            try:
                await steps()
            except OllamaDistributedError as exc:
                self.fail(exc)
            except Exception:
                # Nobody waits for this task: without a last event the stream would hang.
                log.exception("engines.call_defect")
                self.fail(Internal(_DEFECT))

        self._preparing = asyncio.get_running_loop().create_task(run(), name="prepare an answer")

    def send(self, route: Route, body: Mapping[str, Any], parser: EventParser) -> None:
        if self._over:
            return
        self._parser = parser
        self._read = getattr(parser, "tokens", None)
        self._exchange = route.send(
            _encode(body),
            on_body=self._body,
            on_end=self._ended,
            on_error=self._broken,
        )
        if self._paused:
            self._exchange.pause()

    def again(self, steps: Callable[[], Awaitable[None]]) -> None:
        """Drop the answer that runs and begin another in its place."""
        if self._over:
            return
        if self._exchange is not None:
            self._exchange.cancel()
        self._framing = self._make_framing()
        self._error_body.clear()
        self.prepare(steps)

    def fail(self, error: OllamaDistributedError) -> None:
        self._emit(EngineFailed(error))

    # ── from the connection ─────────────────────────────────────────────────────────

    def _body(self, data: bytes) -> None:
        read = self._read
        if (
            read is not None
            and not self._framing.held_bytes
            and (events := read(data, self._joins)) is not None
        ):
            for event in events:
                if not self._over:
                    self._sink(event)
            if self._intake is not None:
                self._share(self._intake)
            return
        if self._refused:
            self._error_body += data[: MAX_ERROR_BODY_BYTES - len(self._error_body)]
            return
        try:
            if records := self._framing.feed(data):
                self._hear(records)
        except OllamaDistributedError as exc:
            self.fail(exc)

    def _hear(self, records: list[bytes]) -> None:
        """Raises what the parser raises, after what came before that."""
        assert self._parser is not None
        events: list[EngineEvent] = []
        try:
            for record in records:
                if record:
                    events += self._parser.feed(record)
        finally:
            self._tell(together(events) if self._joins and len(events) > 1 else events)

    def _tell(self, events: list[EngineEvent]) -> None:
        for event in events:
            if (type(event) is Tokens or type(event) is ChatDelta) and not self._over:
                self._sink(event)
                if self._intake is not None:
                    self._share(self._intake)
            else:
                self._emit(event)

    def _share(self, intake: Intake) -> None:
        self._intake = None
        if self._exchange is not None:
            self._exchange.read_by(intake)

    def _ended(self) -> None:
        exchange = self._exchange
        if self._refused and exchange is not None:
            self.fail(self._read_error(exchange.status, bytes(self._error_body)))
            return
        if type(self._framing) is Whole:
            self._answer_whole(self._framing.rest())
        if not self._over:
            self.fail(EngineError("the engine ended its answer without saying why"))

    def _answer_whole(self, data: bytes) -> None:
        try:
            self._hear([data])
        except OllamaDistributedError as exc:
            self.fail(exc)

    @property
    def _refused(self) -> bool:
        return self._exchange is not None and self._exchange.status >= 400

    def _broken(self, error: OllamaDistributedError) -> None:
        if not self._over:
            self._on_lost(self, error)

    def _emit(self, event: EngineEvent) -> None:
        if self._over:
            return
        if type(event) is Done or type(event) is EngineFailed:
            self._end(complete=type(event) is Done)
        self._sink(event)

    def _end(self, *, complete: bool = False) -> None:
        """`complete`: the server has said its last word, or is about to."""
        if self._over:
            return
        self._over, self.whole = True, complete
        if self._preparing is not None and self._preparing is not asyncio.current_task():
            self._preparing.cancel()
        # It holds this in its turn, and with this all that the request was: both would be left to the
        # collector.
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            pass
        elif complete:
            exchange.leave()
        else:
            exchange.cancel()
        self._on_over(self)


def together(events: list[EngineEvent]) -> list[EngineEvent]:
    """Text that came in one read as one event: what follows costs as much for one token as for ten.
    Nothing is joined with an event that says more than text and ids."""
    found: list[EngineEvent] = []
    texts: list[str] = []
    ids: tuple[int, ...] = ()
    pieces = 0
    kind: type[Tokens | ChatDelta] | None = None

    def close() -> None:
        if kind is Tokens:
            found.append(Tokens(ids, "".join(texts)))
        elif kind is ChatDelta:
            found.append(ChatDelta(text="".join(texts), pieces=pieces))
        texts.clear()

    for event in events:
        if type(event) is ChatDelta and not (event.thinking or event.tool_calls or event.logprobs):
            if kind is not ChatDelta:
                close()
                kind, pieces = ChatDelta, 0
            pieces += event.pieces
            texts.append(event.text)
        elif type(event) is Tokens and event.ids and not (event.raw or event.logprobs):
            # Of tokens without ids the events are counted.
            if kind is not Tokens:
                close()
                kind, ids = Tokens, ()
            ids += event.ids
            texts.append(event.text)
        else:
            close()
            kind = None
            found.append(event)
    close()
    return found
