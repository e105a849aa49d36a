"""Logs that never block the event loop: one line an event, written by one thread.

JSON lines unless a person looks. When the reader of the pipe stalls, lines are dropped
and the count is logged later; the node goes on.
"""

from __future__ import annotations

import atexit
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import msgspec
import structlog

from ollama_distributed.gateway.summary import Summary

REQUEST = "gateway.request"
BATCH_S = 0.1
"""Lines of so long are written at once; a person hardly sees the delay. Each batch wakes the thread,
which then wants the interpreter."""
LINES_BOUND = 10_000
"""Lines that may wait for the writer; about 3 MB."""
FIELD_BOUND = 8_192
"""Characters of one field; a longer one is cut (log injection, `reference/security.md` §3)."""


class Threshold:
    """Drops events below a level that may change while the node runs."""

    _least = logging.INFO

    def use(self, level: str) -> None:
        self._least = _number(level)
        # Libraries tell much at `debug` that is not ours to say.
        logging.getLogger().setLevel(max(self._least, logging.INFO))

    def hides(self, level: int) -> bool:
        return level < self._least

    def __call__(self, _: object, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        if structlog.processors.NAME_TO_LEVEL.get(method, logging.CRITICAL) < self._least:
            raise structlog.DropEvent
        return event


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


threshold = Threshold()
"""Of this process, as structlog's configuration is."""


class LineWriter:
    """A bounded buffer before a stream, emptied by one thread in batches.

    A line costs the event loop an append; waking a thread for each would cost it 100 µs.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        if len(self._lines) >= LINES_BOUND:
            self._dropped += 1
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what waits, for at most `timeout_s`."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._closing.wait(BATCH_S)
            self._wake.clear()
            try:
                self._write_all()
            except (OSError, ValueError):  # the terminal or pipe is gone: nobody can be told
                return
            if self._closing.is_set() and not self._lines:
                return

    def _write_all(self) -> None:
        batch = [self._lines.popleft() for _ in range(len(self._lines))]
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            batch.append(f"{dropped} log lines were dropped: the reader was too slow")
        if batch:
            # JSON leaves DEL as it is.
            self._stream.write("\n".join(batch).replace("\x7f", "\\u007f") + "\n")
            self._stream.flush()


def ascii_json(event: Any, **_: Any) -> str:
    """One line in ASCII: control, bidi and other unusual characters are escaped."""
    fast = msgspec.json.encode(event, enc_hook=str)
    return fast.decode("ascii") if fast.isascii() else json.dumps(event, default=str)


class _RequestLine(msgspec.Struct):
    """Field by field what structlog would make of it."""

    request_id: str
    method: str
    route: str
    status: int
    outcome: str
    error: str
    took_s: float
    first_byte_s: float | None
    bytes_out: int
    model: str
    node: str
    moves: int
    role: str
    key_id: str
    prompt_tokens: int
    completion_tokens: int
    timestamp: str
    level: str = "info"
    event: str = REQUEST


def _to_microseconds(seconds: float) -> float:
    """Seconds without what is finer; a third of the time of `round`."""
    return int(seconds * 1e6 + 0.5) / 1e6


class RequestLog:
    """The line of each request that ended. It is the one line of the hot path: as JSON it is made
    without structlog, which would take six times as long."""

    def __init__(self) -> None:
        self._writer: LineWriter | None = None
        self._encode = msgspec.json.Encoder().encode
        self._log: Any = None
        self._second = 0
        self._date = ""

    def use(self, writer: LineWriter | None) -> None:
        """`writer`: takes JSON lines; None: structlog has its way."""
        self._writer, self._log = writer, None

    def __call__(self, summary: Summary) -> None:
        if threshold.hides(logging.INFO):
            return
        usage = summary.usage
        line = _RequestLine(
            summary.request_id,
            summary.method,
            summary.route,
            summary.status,
            summary.outcome,
            summary.error_code,
            _to_microseconds(summary.took_s),
            None if summary.first_byte_s is None else _to_microseconds(summary.first_byte_s),
            summary.bytes_out,
            summary.model[:FIELD_BOUND],
            summary.node,
            summary.moves,
            summary.role,
            summary.key_id,
            usage.prompt_tokens if usage is not None else 0,
            usage.completion_tokens if usage is not None else 0,
            self._now() if self._writer is not None else "",
        )
        if self._writer is None:
            if self._log is None:
                self._log = structlog.get_logger(__name__).bind()
            self._log.info(REQUEST, **{name: getattr(line, name) for name in _FIELDS})
            return
        text = self._encode(line)
        self._writer.write(text.decode("ascii") if text.isascii() else ascii_json(msgspec.to_builtins(line)))

    def _now(self) -> str:
        """UTC, as structlog writes it."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second, self._date = second, time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._date}{int((now - second) * 1e6):06d}Z"


_FIELDS = tuple(
    name for name in _RequestLine.__struct_fields__ if name not in ("timestamp", "level", "event")
)

requests = RequestLog()
"""Of this process, as `threshold`."""


def cut_long_fields(_: object, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str) and len(value) > FIELD_BOUND:
            event[name] = value[:FIELD_BOUND] + "…"
    return event


def say_less(_: object, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """For people: fields that say nothing are left out, and the rest keep their order."""
    return {name: value for name, value in event.items() if value not in (None, "", 0, [], ())}


def say_plainly(_: object, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """For a terminal: what others wrote begins no line, moves no cursor and turns no text around."""
    return {
        name: json.dumps(value)[1:-1] if isinstance(value, str) and not value.isprintable() else value
        for name, value in event.items()
    }


def configure(
    level: str, style: Literal["auto", "json", "console"], stream: TextIO = sys.stderr
) -> LineWriter:
    """Send structlog and the libraries' stdlib logs to `stream`; returns the writer to close."""
    writer = LineWriter(stream)
    atexit.register(writer.close)
    console = style == "console" or (style == "auto" and stream.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), sort_keys=False)
        if console
        else structlog.processors.JSONRenderer(serializer=ascii_json)
    )
    threshold.use(level)
    requests.use(None if console else writer)
    shared: list[Any] = [
        threshold,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        cut_long_fields,
    ]

    class Logger:
        """What structlog calls at the end of its chain."""

        def msg(self, line: str) -> None:
            writer.write(line)

        debug = info = warning = error = critical = fatal = exception = log = msg

    last: list[Any] = [say_less, say_plainly] if console else [structlog.processors.format_exc_info]
    structlog.configure(
        processors=[*shared, *last, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=lambda *_: Logger(),
        cache_logger_on_first_use=True,
    )

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log = structlog.get_logger(record.name)
            log.log(record.levelno, record.getMessage(), exc_info=record.exc_info or None)

    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what it does, the node says itself
    # Said by Python's streams each time that a connection to the bus ends; it changes nothing.
    logging.getLogger("asyncio").addFilter(lambda record: "eof_received()" not in str(record.msg))
    root = logging.getLogger()
    root.handlers[:] = [Handler()]
    return writer
