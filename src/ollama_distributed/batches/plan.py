"""What a batch is made of and how it goes on. Pure.

Source: OpenAI's API reference, "Batch" and "The request input object".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args

import msgspec

from ollama_distributed.base.batches import (
    FINAL,
    Batch,
    BatchAsk,
    BatchFault,
    BatchFaults,
    BatchStatus,
    Endpoint,
)
from ollama_distributed.base.errors import Conflict, Invalid
from ollama_distributed.base.identity import Identity, Role

ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
WINDOW_S = 24 * 3600.0
"""OpenAI's only `completion_window`, and the one that is taken where none is said."""
MOST_WINDOW_S = 14 * 24 * 3600.0
MOST_LINES = 50_000
MOST_LINE_BYTES = 4 * 1024 * 1024
"""As the body of a request that comes by itself."""
MOST_FAULTS = 100
"""Told of one file; whoever mends those may send it again."""
MOST_CUSTOM_ID = 512
MOST_METADATA, MOST_METADATA_KEY, MOST_METADATA_VALUE = 16, 64, 512
_WINDOW = re.compile(r"([1-9]\d{0,5})(m|h|d)", re.ASCII)
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose a file or batch is (`Identity.owner`). Kept with it, and never a secret."""

    team: str
    user: str = ""
    key: str
    """The key's id, or the role of who has none."""
    role: Role
    """For whoever asks; of what is kept, what it was then."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One request of an input file."""

    custom_id: str
    body: bytes
    model: str


class _LineIn(msgspec.Struct, frozen=True, kw_only=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _BodyIn(msgspec.Struct, frozen=True, kw_only=True):
    model: str = ""
    stream: bool | None = None


_lines = msgspec.json.Decoder(_LineIn)
_bodies = msgspec.json.Decoder(_BodyIn)


def owner_of(identity: Identity) -> Owner:
    team, user, key = identity.owner
    return Owner(team=team, user=user, key=key, role=identity.role)


def may_see(owner: Owner, asking: Owner) -> bool:
    """A person's own, a key's own, and all for whoever administers."""
    if asking.role == "admin":
        return True
    if owner.team != asking.team or owner.user != asking.user:
        return False
    return bool(owner.user) or owner.key == asking.key


# ── what is asked ───────────────────────────────────────────────────────────────────


def window_s(text: str) -> float:
    """Seconds of a `completion_window`: minutes, hours or days.

    Raises:
        Invalid: it is none, or longer than two weeks.
    """
    match = _WINDOW.fullmatch(text)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= MOST_WINDOW_S:
        raise Invalid(
            "completion_window is a time like 24h, of at most 14d (30m, 24h, 7d)", param="completion_window"
        )
    return seconds


def check_ask(ask: BatchAsk) -> float:
    """The window of a batch that may be made, seconds.

    Raises:
        Invalid: what cannot be; the message names the field.
    """
    if ask.endpoint not in ENDPOINTS:
        raise Invalid(f"endpoint must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    _check_metadata(ask.metadata or {})
    return window_s(ask.completion_window)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MOST_METADATA:
        raise Invalid(f"metadata has at most {MOST_METADATA} entries", param="metadata")
    for name, value in metadata.items():
        if len(name) > MOST_METADATA_KEY or len(value) > MOST_METADATA_VALUE:
            raise Invalid(
                f"metadata: a name has at most {MOST_METADATA_KEY} characters, a value {MOST_METADATA_VALUE}",
                param="metadata",
            )


# ── the input file ──────────────────────────────────────────────────────────────────


def read_line(data: bytes, endpoint: str) -> Line | BatchFault:
    """One line, without its place: the caller adds that to a fault."""
    try:
        line = _lines.decode(data)
        body = _bodies.decode(line.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:
        broken = not isinstance(failure, msgspec.ValidationError)
        return BatchFault(
            code="invalid_json_line" if broken else "invalid_request",
            message="This line is not parseable as valid JSON."
            if broken
            else f"a line has custom_id, method, url and body, as OpenAI has it: {failure}",
        )
    if line.method != "POST":
        return BatchFault(code="invalid_method", message="method must be POST", param="method")
    if line.url != endpoint:
        said = f"The URL provided for this request does not match the batch endpoint {endpoint}."
        return BatchFault(code="mismatched_url", message=said, param="url")
    if not 0 < len(line.custom_id) <= MOST_CUSTOM_ID:
        said = f"custom_id has 1 to {MOST_CUSTOM_ID} characters"
        return BatchFault(code="invalid_custom_id", message=said, param="custom_id")
    if not body.model:
        return BatchFault(code="missing_model", message="body.model is missing", param="body.model")
    if body.stream:
        return BatchFault(code="invalid_stream", message="a batch does not stream", param="body.stream")
    return Line(custom_id=line.custom_id, body=bytes(line.body), model=body.model)


class Judge:
    """Reads an input file line by line and keeps what is wrong with it."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._seen: set[str] = set()
        self.faults: list[BatchFault] = []
        self.lines = 0
        """Without empty ones."""

    @property
    def enough(self) -> bool:
        """It need not be read on."""
        return len(self.faults) >= MOST_FAULTS or self.lines > MOST_LINES

    def take(self, number: int, data: bytes) -> None:
        if not data.strip():
            return
        self.lines += 1
        if self.lines > MOST_LINES:
            said = f"a batch has at most {MOST_LINES} requests"
            self.faults.append(BatchFault(code="too_many_tasks", message=said))
            return
        if len(data) > MOST_LINE_BYTES:
            said = f"a line has at most {MOST_LINE_BYTES} bytes"
            self.faults.append(BatchFault(code="line_too_long", message=said, line=number))
            return
        line = read_line(data, self._endpoint)
        if isinstance(line, BatchFault):
            self.faults.append(msgspec.structs.replace(line, line=number))
        elif line.custom_id in self._seen:
            said = f"The custom_id for this request is a duplicate of another request: {line.custom_id[:80]}"
            self.faults.append(
                BatchFault(code="duplicate_custom_id", message=said, line=number, param="custom_id")
            )
        else:
            self._seen.add(line.custom_id)

    def verdict(self) -> BatchFaults | None:
        if not self.lines:
            return BatchFaults(data=(BatchFault(code="empty_file", message="The input file is empty."),))
        return BatchFaults(data=tuple(self.faults[:MOST_FAULTS])) if self.faults else None


# ── how it goes on ──────────────────────────────────────────────────────────────────


def moved(batch: Batch, status: BatchStatus, now: float) -> Batch:
    """The batch in its next status, with the time of it.

    Raises:
        Conflict: it cannot get there from where it is.
    """
    if status not in _NEXT[batch.status]:
        raise Conflict(f"the batch is {batch.status} and cannot become {status}")
    return msgspec.structs.replace(batch, status=status, **{f"{status}_at": int(now)})


_NEXT: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    "validating": frozenset({"in_progress", "failed", "cancelling", "expired"}),
    "in_progress": frozenset({"finalizing", "cancelling", "expired", "failed"}),
    "finalizing": frozenset({"completed", "failed"}),
    "cancelling": frozenset({"cancelled"}),
    **dict.fromkeys(FINAL, frozenset[BatchStatus]()),
}
"""Status -> those that may follow."""


# ── how many at once ────────────────────────────────────────────────────────────────


class Seats(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model in the whole cluster, as it was said last."""

    slots: int = 0
    """0: it is nowhere in memory, or nobody has said."""
    busy: int = 0
    queued: int = 0


STARVED_S = 60.0
"""A batch that got no seat for so long sends one line to the queue, where it grows older."""


def lanes(seats: Seats, mine: int, waited_s: float) -> int:
    """How many lines may run at once; `mine` run now, and `waited_s` went by since one began.

    Only what others leave free, and of several slots one stays free for who comes next: an answer
    that somebody waits for begins without waiting for a line to end.
    """
    if not seats.slots:
        return 1
    others = max(0, seats.busy + seats.queued - mine)
    reserve = 1 if seats.slots > 1 else 0
    free = max(0, seats.slots - reserve - others)
    return max(free, 1) if waited_s >= STARVED_S else free
