"""One running answer of a remote server: as the runner's `Call`, with other framing and errors."""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.adapters.engines.framing import Lines, ServerSentEvents
from ollama_distributed.adapters.engines.http import Address, Exchange, Headers, request
from ollama_distributed.adapters.engines.llamacpp.calls import EventParser
from ollama_distributed.base.errors import EngineError, OllamaDistributedError
from ollama_distributed.base.tokens import Done, EngineEvent, EngineFailed, EngineSink

_MAX_ERROR_BODY_BYTES = 1_048_576

ErrorReader = Callable[[int, bytes], OllamaDistributedError]
"""Status and body of a refusal -> our error."""


class RemoteCall:
    """A `Generation`. The sink gets exactly one last event, unless it is cancelled."""

    def __init__(
        self,
        sink: EngineSink,
        *,
        framing: Lines | ServerSentEvents,
        parser: EventParser,
        read_error: ErrorReader,
        on_over: Callable[[RemoteCall], None],
        on_lost: Callable[[RemoteCall, OllamaDistributedError], None],
    ) -> None:
        """`on_lost`: the connection broke; the owner answers with `fail`, when it knows why."""
        self._sink = sink
        self._framing = framing
        self._parser = parser
        self._read_error = read_error
        self._on_over = on_over
        self._on_lost = on_lost
        self._exchange: Exchange | None = None
        self._status = 200
        self._error_body = bytearray()
        self._paused = False
        self._over = False

    def send(self, address: Address, path: str, body: bytes, headers: Headers) -> None:
        if self._over:
            return
        self._exchange = request(
            address,
            "POST",
            path,
            headers=headers,
            body=body,
            on_head=self._head,
            on_body=self._body,
            on_end=self._ended,
            on_error=self._broken,
        )
        if self._paused:
            self._exchange.pause()

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

    def fail(self, error: OllamaDistributedError) -> None:
        self._emit(EngineFailed(error))

    # ── from the connection ─────────────────────────────────────────────────────────

    def _head(self, status: int, _headers: Headers) -> None:
        self._status = status

    def _body(self, data: bytes) -> None:
        if self._status >= 400:
            self._error_body += data[: _MAX_ERROR_BODY_BYTES - len(self._error_body)]
            return
        try:
            for record in self._framing.feed(data):
                for event in self._parser.feed(record) if record else ():
                    self._emit(event)
        except OllamaDistributedError as exc:
            self.fail(exc)

    def _ended(self) -> None:
        if self._status >= 400:
            self.fail(self._read_error(self._status, bytes(self._error_body)))
        else:
            self.fail(EngineError("the engine ended its answer without saying why"))

    def _broken(self, error: OllamaDistributedError) -> None:
        if not self._over:
            self._on_lost(self, error)

    def _emit(self, event: EngineEvent) -> None:
        if self._over:
            return
        if isinstance(event, Done | EngineFailed):
            self._end()
        self._sink(event)

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        if self._exchange is not None:
            self._exchange.cancel()
        self._on_over(self)
