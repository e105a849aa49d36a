"""What two nodes say to each other about inference: paths, bodies, frames.

A request is a POST whose body is one msgpack value. An answer is a sequence of frames, each a
length (4 bytes, big-endian) and so many bytes of msgpack:

    length 0                 the serving node lives and works (a loading model says nothing else)
    list of events           of a generation: those of one turn of the loop, in order
    `Rows`, then `Result`    of a question; `Rows` only where vectors are asked for
    `Refusal`                in place of what is missing; nothing follows

Structs are maps by field name and fields come with defaults only, so two versions of the
program understand each other. Pure.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from ollama_distributed.base.errors import BodyTooLarge, Invalid, OllamaDistributedError, Unavailable
from ollama_distributed.base.inference import InferenceRequest, Queued
from ollama_distributed.base.refusal import Refusal, error_of, refusal_of
from ollama_distributed.base.tokens import (
    ChatDelta,
    Done,
    EngineFailed,
    Prepared,
    Progress,
    Resume,
    Skipped,
    SourceEvent,
    Tokens,
    Written,
)

PREFIX = "/cluster/v1/"
GENERATE, EMBED, RERANK, COUNT_TOKENS = "generate", "embed", "rerank", "count_tokens"
SHOW, UNLOAD, WRITTEN, HANDED = "show", "unload", "written", "handed"
FRAMES_TYPE = "application/vnd.ollama-distributed.frames"

MAX_BODY_BYTES = 64 * 1024 * 1024
"""As large as the gateway takes a body; images travel as bytes here, without base64's third."""
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""The largest frame is a rendered prompt, which is no longer than its body."""
PING_S = 1.0
"""A node that works without a word says so this often."""
SILENT_S = 5.0
"""A node that said nothing for so long hangs or is cut off: its loop stood still for several
pings. A request that waits is tried elsewhere then, so longer is what clients wait."""
_LENGTH_BYTES = 4
PING = bytes(_LENGTH_BYTES)


class GenerateAsk(msgspec.Struct, frozen=True, kw_only=True):
    request: InferenceRequest
    resume: Resume | None = None
    hears_place: bool = False
    """Who asks understands `Queued`."""


class ShowAsk(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    verbose: bool = False


class WrittenAsk(msgspec.Struct, frozen=True, kw_only=True):
    request: InferenceRequest
    """As the client repeats it."""


class HandedAsk(msgspec.Struct, frozen=True, kw_only=True):
    request: InferenceRequest
    written: Written


class UnloadAsk(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class Rows(msgspec.Struct, frozen=True, tag="rows"):
    """Some vectors, in order: many at once would stop both loops for their coding."""

    rows: tuple[tuple[float, ...], ...]


class Result(msgspec.Struct, frozen=True, tag="result"):
    value: msgspec.Raw
    """The answer in msgpack; of an embedding only its usage."""


WireEvent: TypeAlias = Queued | Prepared | Skipped | Progress | Tokens | ChatDelta | Done | Refusal
Reply: TypeAlias = Rows | Result | Refusal

_encoder = msgspec.msgpack.Encoder()
_events = msgspec.msgpack.Decoder(list[WireEvent])
_reply: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(value: Any) -> bytes:
    """
    Raises:
        Invalid: a number has more than 64 bits, which msgpack cannot say.
    """
    try:
        return _encoder.encode(value)
    except OverflowError as failure:
        raise Invalid("a number in the request is too large (64 bits at most)") from failure


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


def payload(frame: bytes) -> bytes:
    """Of a whole one."""
    return frame[_LENGTH_BYTES:]


def events_frame(events: list[SourceEvent]) -> bytes:
    """Events of one turn of the loop."""
    last = events[-1]
    if type(last) is EngineFailed:
        return frame(encode([*events[:-1], refusal_of(last.error)]))
    return frame(encode(events))


def reply_frame(reply: Reply) -> bytes:
    return frame(encode(reply))


def refusal_frame(error: OllamaDistributedError) -> bytes:
    return reply_frame(refusal_of(error))


def decode_events(payload: bytes) -> list[SourceEvent]:
    """
    Raises:
        Unavailable: the other node speaks another language.
        OllamaDistributedError: the call was refused before it began.
    """
    if payload[0] >> 4 != 0x9 and payload[0] not in (0xDC, 0xDD):  # no msgpack array: refused
        reply = decode_reply(payload)
        raise error_of(reply) if isinstance(reply, Refusal) else _foreign()
    try:
        heard = _events.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        raise _foreign() from failure
    if heard and type(heard[-1]) is Refusal:
        return [*heard[:-1], EngineFailed(error_of(heard[-1]))]  # type: ignore[list-item]  # only the last is one
    return heard  # type: ignore[return-value]  # a refusal is always the last


def decode_reply(payload: bytes) -> Reply:
    """
    Raises:
        Unavailable: the other node speaks another language.
    """
    try:
        return _reply.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        raise _foreign() from failure


def too_large() -> BodyTooLarge:
    return BodyTooLarge(f"the request is larger than {MAX_BODY_BYTES // 1024**2} MiB")


def _foreign() -> Unavailable:
    return Unavailable("the other node's answer cannot be read; do both run versions that fit?")


class Frames:
    """Cuts a body into frames; pings are left out."""

    __slots__ = ("_buffer", "_needed")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = 0
        """Bytes until the frame that is under way is whole; what comes before is only kept."""

    def feed(self, data: bytes) -> list[bytes]:
        """
        Raises:
            Unavailable: a frame is longer than any that a node sends.
        """
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        frames: list[bytes] = []
        at, size, self._needed = 0, len(data), 0
        while size - at >= _LENGTH_BYTES:
            begin = at + _LENGTH_BYTES
            length = int.from_bytes(data[at:begin], "big")
            if length > MAX_FRAME_BYTES:
                raise Unavailable("the other node's answer has a frame that is too long")
            if begin + length > size:
                self._needed = _LENGTH_BYTES + length
                break
            if length:
                frames.append(data[begin : begin + length])
            at = begin + length
        if at < size:
            self._buffer += data[at:]
        return frames
