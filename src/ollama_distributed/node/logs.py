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
from collections import deque
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import msgspec
import structlog

BATCH_S = 0.02
"""Lines of so long are written at once; a person does not see the delay."""
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
            self._stream.write("\n".join(batch) + "\n")
            self._stream.flush()


def ascii_json(event: Any, **_: Any) -> str:
    """One line in ASCII: control, bidi and other unusual characters are escaped."""
    fast = msgspec.json.encode(event, enc_hook=str)
    return fast.decode("ascii") if fast.isascii() else json.dumps(event, default=str)


def cut_long_fields(_: object, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str) and len(value) > FIELD_BOUND:
            event[name] = value[:FIELD_BOUND] + "…"
    return event


def say_less(_: object, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """For people: fields that say nothing are left out, and the rest keep their order."""
    return {name: value for name, value in event.items() if value not in (None, "", 0, [], ())}


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

    last: list[Any] = [say_less] if console else [structlog.processors.format_exc_info]
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
