"""What a request's head says of its turn, and how an answer tells where it waited.

A request may ask for a class below its own, for a wait with an end, and to be told its place while
it waits. None of that costs a request anything that asks for none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec

from ollama_distributed.base.errors import Forbidden, Invalid
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.inference import EmbedRequest, InferenceRequest, Queued, RerankRequest
from ollama_distributed.base.priority import PRIORITIES, Priority
from ollama_distributed.gateway.dialects import sse
from ollama_distributed.gateway.dialects.contract import Call, Generate

PRIORITY, TIMEOUT, PROGRESS = "x-ollama-priority", "x-request-timeout", "x-ollama-progress"
LONGEST_S = 86_400.0
"""Nobody waits longer for a slot."""


Shed = Callable[[Identity, "Turn"], None]
"""Raises `QueueFull` where every request like that would be refused, whatever its model."""


class Turn(msgspec.Struct, frozen=True):
    """How a request is to wait."""

    priority: Priority = "normal"
    within_s: float | None = None
    progress: bool = False


USUAL = Turn()


def turn_of(headers: Mapping[str, str], identity: Identity) -> Turn:
    """
    Raises:
        Invalid: a header has no value that it may have.
        Forbidden: the class is above that of the key.
    """
    asked, highest = headers.get(PRIORITY), identity.priority
    if asked is None and highest != "batch" and TIMEOUT not in headers and PROGRESS not in headers:
        return USUAL
    priority = _priority(asked, highest)
    return Turn(
        priority, _seconds(headers.get(TIMEOUT)), headers.get(PROGRESS, "0") not in ("", "0", "false")
    )


def _priority(asked: str | None, highest: Priority) -> Priority:
    if asked is None:
        return "batch" if highest == "batch" else "normal"
    for priority in PRIORITIES:
        if priority == asked.strip().lower():
            if PRIORITIES.index(priority) < PRIORITIES.index(highest):
                raise Forbidden(
                    f"requests of this key may have the class {highest!r} at most, not {priority!r}"
                )
            return priority
    raise Invalid(f"{PRIORITY} is one of {', '.join(PRIORITIES)}")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text.strip().removesuffix("s"))
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds <= LONGEST_S:
        raise Invalid(f"{TIMEOUT} is a number of seconds, above 0 and at most {LONGEST_S:g}")
    return seconds


def with_turn(call: Call, turn: Turn) -> Call:
    """The same call, with its requests waiting like that."""
    if turn is USUAL:
        return call
    if isinstance(call, Generate):
        requests = tuple(_waiting(one, turn) for one in call.requests)
        return msgspec.structs.replace(call, requests=requests)
    request = call.request
    waiting = _waiting(request, turn) if isinstance(request, InferenceRequest) else _asking(request, turn)
    return msgspec.structs.replace(call, request=waiting)


def _waiting(request: InferenceRequest, turn: Turn) -> InferenceRequest:
    return msgspec.structs.replace(
        request, priority=turn.priority, within_s=turn.within_s, progress=turn.progress
    )


def _asking(request: EmbedRequest | RerankRequest, turn: Turn) -> EmbedRequest | RerankRequest:
    return msgspec.structs.replace(request, priority=turn.priority, within_s=turn.within_s)


def place_headers(place: Queued) -> list[tuple[bytes, bytes]]:
    """Where it stood when it began to wait, for the head of an answer."""
    headers = [(b"x-queue-position", b"%d" % place.position)]
    if place.eta_s is not None:
        headers.append((b"x-queue-eta", b"%.1f" % place.eta_s))
    return headers


def place_comment(place: Queued) -> bytes:
    """For a stream of server-sent events, whose clients leave comments out."""
    eta = "" if place.eta_s is None else f" eta_s={place.eta_s:.1f}"
    return sse.comment(f"queue position={place.position}{eta}")
