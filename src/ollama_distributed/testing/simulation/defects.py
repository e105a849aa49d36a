"""Hears of defects in background loops, which log them and go on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

from ollama_distributed.base.errors import OllamaDistributedError


@contextmanager
def watching_logs() -> Iterator[list[str]]:
    """Inside, logs are not shown; exceptions that are no errors of ours come into the list."""
    defects: list[str] = []

    def watch(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        error = _error_of(event.get("exc_info"))
        if error is not None and not isinstance(error, OllamaDistributedError):
            defects.append(f"{event.get('event')} {event.get('loop', '')}: {error!r}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(
        processors=[watch],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    try:
        yield defects
    finally:
        structlog.configure(**before)


def _error_of(exc_info: Any) -> BaseException | None:
    match exc_info:
        case BaseException():
            return exc_info
        case (_, BaseException() as error, _):
            return error
        case True:
            return sys.exc_info()[1]
        case _:
            return None
