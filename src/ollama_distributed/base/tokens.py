"""What flows from a runner to the decoder: the events of one generation, in order.

`serving/` (which runs engines) and `streams/` (which makes answers of their tokens) are on
one floor and never meet; this is their common language. An engine emits `EngineEvent`s;
serving puts `Prepared` (or `Skipped`) before them and passes them on as `SourceEvent`s.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.inference import Queued, TokenLogprob, ToolCall

# ── an answer that changes its runner ───────────────────────────────────────────────


class Left(msgspec.Struct, frozen=True):
    """A node that an answer went away from."""

    replica: str
    """As in `Prepared`."""
    stalled: bool = False
    """It said nothing any more, though the connection held: not to be asked again."""


class Resume(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that another runner began, to be gone on with (migration rules R1 and R4), or
    to be begun again elsewhere where `ids` is empty."""

    ids: tuple[int, ...] = ()
    """Emitted so far; generation goes on after them and none of them comes again."""
    said: bytes = b""
    """Their text, as the decoder was fed with it."""
    prompt_ids: tuple[int, ...] = ()
    prompt_text: str = ""
    """The prompt exactly as the first runner read it: ids where they are known, else its text."""
    model_digest: str = ""
    """Only a model with the same files, template and parameters may go on."""
    left: tuple[Left, ...] = ()
    """Nodes that it was on, the last one last."""
    deaths: int = 0
    """Runners that died under it."""


# ── what a runner emits ─────────────────────────────────────────────────────────────


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """The prompt is being read: of `total` tokens `processed` are done, `cached` were there."""

    total: int
    processed: int
    cached: int = 0


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """Generated tokens with their text. An engine without token ids leaves `ids` empty.

    Text may lag behind ids while a character is incomplete, never run ahead.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    raw: bytes = b""
    """In place of `text`, from an engine that gives bytes: may end inside a character."""


class ChatDelta(msgspec.Struct, frozen=True, tag="chat_delta"):
    """A piece of an answer that the engine's own chat parser took apart."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    pieces: int = 1
    """Of the engine that are joined in it, each most likely a token."""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    reason: Literal["stop", "length", "tool_calls"]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_s: float = 0.0
    completion_s: float = 0.0


MOST_TOKENS, MOST_S = 1 << 24, 1e6
"""Of one answer: more than any context holds, and eleven days."""


def counted(tokens: int) -> int:
    """What an engine says of its work is counted, paid for and measured by, and it may be wrong or lie."""
    return min(max(tokens, 0), MOST_TOKENS)


def plausible(done: Done) -> Done:
    """The same, within reason."""
    if (
        0 <= done.cached_tokens <= done.prompt_tokens <= MOST_TOKENS
        and 0 <= done.completion_tokens <= MOST_TOKENS
        and 0.0 <= done.prompt_s <= MOST_S
        and 0.0 <= done.completion_s <= MOST_S
    ):
        return done
    prompt_tokens = counted(done.prompt_tokens)
    return msgspec.structs.replace(
        done,
        prompt_tokens=prompt_tokens,
        cached_tokens=min(counted(done.cached_tokens), prompt_tokens),
        completion_tokens=counted(done.completion_tokens),
        prompt_s=min(max(0.0, done.prompt_s), MOST_S),  # in this order NaN is 0
        completion_s=min(max(0.0, done.completion_s), MOST_S),
    )


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """All of an answer that one node knows: enough for another to take it up."""

    prepared: Prepared
    ids: tuple[int, ...] = ()
    said: bytes = b""
    """As in `Resume`."""
    done: Done | None = None
    """It is complete."""


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    error: OllamaDistributedError


EngineEvent = Progress | Tokens | ChatDelta | Done | EngineFailed


class EngineSink(Protocol):
    """Called on the event loop; the last event is exactly one of `Done`, `EngineFailed`."""

    def __call__(self, event: EngineEvent, /) -> None: ...


# ── what serving puts before it ─────────────────────────────────────────────────────


class Prepared(msgspec.Struct, frozen=True, kw_only=True, tag="prepared"):
    """The model is loaded and the prompt is with the runner; what the decoder must know.

    May come again as long as no token came (the runner died, or the prompt was cut).
    """

    load_s: float = 0.0
    """From the request's start until the runner was there."""
    wait_s: float = 0.0
    """Of that, after the model was loaded: for a free slot."""
    stop: tuple[str, ...] = ()
    thinking_tags: tuple[str, str] | None = None
    """None: reasoning is not taken apart (the model has none, or `think` is false)."""
    starts_in_thinking: bool = False
    """The prompt already ends with the opening tag."""
    prompt_ids: tuple[int, ...] = ()
    """Token ids of the prompt, where they were asked for or the prompt was cut."""
    prompt_text: str = ""
    """The prompt as its runner read it, where the answer is resumable and has no `prompt_ids`."""
    model_digest: str = ""
    resumable: bool = False
    """Another runner may continue it from prompt + emitted ids (no grammar, no tools)."""
    node: str = ""
    """Name of the node whose runner it is; empty: this one."""
    replica: str = ""
    """That node's id; empty: this one."""
    route: str = ""
    """Why that node, in a word; empty: there was no choice."""
    after: int = 0
    """Tokens of other runners that this one goes on after (`Resume.ids`)."""


class Skipped(msgspec.Struct, frozen=True, kw_only=True, tag="skipped"):
    """Nothing is generated: only loaded, unloaded, or (`stop`) the prompt rendered. Last event."""

    reason: Literal["load", "unload", "stop"]
    load_s: float = 0.0
    rendered: str | None = None
    rendered_images: int = 0
    node: str = ""
    """As in `Prepared`."""


SourceEvent = Queued | Prepared | Skipped | EngineEvent
"""`Queued` comes before anything else only."""


class SourceSink(Protocol):
    """Called on the event loop; the last event is one of `Skipped`, `Done`, `EngineFailed`."""

    def __call__(self, event: SourceEvent, /) -> None: ...
