"""Logs that never block the event loop: one line an event, written by one thread.

JSON lines unless a person looks. When the reader of the pipe stalls, lines are dropped
and the count is logged later; the node goes on.
"""

from __future__ import annotations

import atexit
import logging
import queue
import sys
import threading
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog

LINES_BOUND = 10_000
"""Lines that may wait for the writer; about 3 MB."""
FIELD_BOUND = 8_192
"""Characters of one field; a longer one is cut (log injection, `reference/security.md` §3)."""


class LineWriter:
    """A bounded queue before a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_BOUND)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what waits, for at most `timeout_s`."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                line = f"{line}\n{dropped} log lines were dropped: the reader was too slow"
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # the terminal or pipe is gone: nobody can be told
                return


def cut_long_fields(_: object, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str) and len(value) > FIELD_BOUND:
            event[name] = value[:FIELD_BOUND] + "…"
    return event


def configure(
    level: str, style: Literal["auto", "json", "console"], stream: TextIO = sys.stderr
) -> LineWriter:
    """Send structlog and the libraries' stdlib logs to `stream`; returns the writer to close."""
    writer = LineWriter(stream)
    atexit.register(writer.close)
    console = style == "console" or (style == "auto" and stream.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty())
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=True)
    )
    shared: list[Any] = [
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

    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, renderer]
        if not console
        else [*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: Logger(),
        cache_logger_on_first_use=True,
    )

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log = structlog.get_logger(record.name)
            log.log(record.levelno, record.getMessage(), exc_info=record.exc_info or None)

    root = logging.getLogger()
    root.handlers[:] = [Handler()]
    root.setLevel(max(getattr(logging, level.upper()), logging.INFO))
    return writer
