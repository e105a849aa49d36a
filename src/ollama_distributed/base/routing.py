"""What the gateway and the SDK say to each other about the choice of a node for a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ollama_distributed.base.ids import NodeId

Policy = Literal["prefix", "round-robin", "least-connections"]
"""How a replica is chosen: by the time until the first token (`prefix`), in turn, or the one with
the fewest requests."""

POLICIES: tuple[Policy, ...] = ("prefix", "round-robin", "least-connections")


Circuit = Literal["closed", "half-open", "open"]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that could answer, and what was expected of it. Times in seconds."""

    node: NodeId
    name: str
    here: bool = False
    """It is the node that was asked."""
    loaded: bool = False
    """The model is in its memory."""
    slots: int = 0
    busy: int = 0
    queued: int = 0
    cached_tokens: int = 0
    """Of the prompt, those that its prefix cache is believed to hold."""
    read_tokens_per_s: float = 0.0
    hop_s: float = 0.0
    load_s: float = 0.0
    wait_s: float = 0.0
    read_s: float = 0.0
    ttft_s: float = 0.0
    """Until the first token: all of them together; what the choice goes by."""
    circuit: Circuit = "closed"
    """As this gateway has it when it is shown: `open`, the replica failed, stalled or became slow and is
    asked last until a probe goes well; `half-open`, it gets its share back."""
    circuit_reason: str = ""
    """Code of what opened it last: `unavailable`, `stalled`, `slow`, ..."""


class NotAsked(msgspec.Struct, frozen=True, kw_only=True):
    node: NodeId
    name: str
    reason: str


class RouteTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of an answer went."""

    node: str
    """Name of the node that answered last."""
    moves: int = 0
    """Times that it went on at another node."""
    load_s: float = 0.0
    """Until the model was in memory."""
    wait_s: float = 0.0
    """Then for a free slot."""
    prefill_s: float = 0.0
    """The prompt was read."""
    decode_s: float = 0.0
    """From the first token to the last."""
    total_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, those that were not read again."""
    completion_tokens: int = 0


class RouteDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One choice, with all that it was made of."""

    request_id: str = ""
    """Empty: nothing was sent (`explain` of a request body)."""
    at: float = 0.0
    """Seconds since the Unix epoch."""
    model: str
    gateway: str = ""
    """Name of the node that chose."""
    policy: Policy = "prefix"
    reason: str = ""
    """As in `X-Ollama-Route`."""
    prompt_tokens: int = 0
    """Estimated, as nothing is rendered for the choice; 0: it did not matter."""
    prefix: str = ""
    """A key of 16 hexadecimal digits for each KiB of the prompt, each made from the one before;
    they mean something to the gateway that made them only."""
    order: tuple[str, ...] = ()
    """Names of the nodes to ask, one after the other until one takes it."""
    candidates: tuple[Candidate, ...] = ()
    left_out: tuple[NotAsked, ...] = ()
    times: RouteTimes | None = None
    """None: it has not ended."""


class RouteDecisions(msgspec.Struct, frozen=True, kw_only=True):
    decisions: tuple[RouteDecision, ...] = ()
    """The latest that this gateway made, newest first."""
    kept: int = 0
    """So many are kept at most."""


class ExplainAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Either a recent request, or one that could be sent."""

    request_id: str = ""
    model: str = ""
    prompt: str | None = None
    system: str | None = None
    raw: bool = False
    messages: Sequence[Mapping[str, Any]] | None = None
    """As `/v1/chat/completions` takes them."""
    tools: Sequence[Mapping[str, Any]] | None = None
