"""What an answer took and how much it was: the engine's figures where it says them, else what was
seen from here. With several sources one after the other they are of all of them together."""

from __future__ import annotations

import msgspec

from ollama_distributed.base.inference import Finished, Usage
from ollama_distributed.base.tokens import Done, Skipped
from ollama_distributed.streams.decoder import Decoder


class Account:
    """Times are a monotonic clock's, in seconds."""

    __slots__ = (
        "before",
        "cached_tokens",
        "first_s",
        "had",
        "load_s",
        "prepared_s",
        "prompt_tokens",
        "started_s",
        "wait_s",
    )

    def __init__(self, now: float) -> None:
        self.started_s = now
        self.load_s = self.wait_s = 0.0
        self.prepared_s = 0.0
        self.first_s = 0.0
        """When the first token came; 0: not yet."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.before = 0
        """Tokens that came from sources before the one at work."""
        self.had: int | None = None
        """Of an answer that was taken up: tokens that the request before had."""

    def spent(self, usage: Usage) -> Usage:
        """Without what another request had, with which it was counted."""
        if self.had is None:
            return usage
        rest = max(usage.completion_tokens - self.had, 0)
        return msgspec.structs.replace(usage, prompt_tokens=0, cached_tokens=0, completion_tokens=rest)

    def done(self, seen: Decoder) -> Done:
        """Of an answer that was ended from here."""
        return Done(
            reason="length",
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=seen.completion_tokens,
        )

    def skipped(self, event: Skipped, now: float) -> Finished:
        return Finished(
            reason=event.reason,
            usage=Usage(load_s=event.load_s, total_s=now - self.started_s),
            rendered=event.rendered,
            rendered_images=event.rendered_images,
        )

    def usage(self, now: float, seen: Decoder, done: Done | None) -> Usage:
        first = self.first_s or now
        prompt_tokens, cached_tokens = self.prompt_tokens, self.cached_tokens
        completion_tokens = seen.completion_tokens
        prompt_s, completion_s = first - (self.prepared_s or self.started_s), now - first
        if done is not None and self.before:
            # To this source a part of the answer was prompt.
            prompt_tokens = prompt_tokens or max(done.prompt_tokens - self.before, 0)
            completion_tokens = self.before + done.completion_tokens
        elif done is not None:
            prompt_tokens = done.prompt_tokens or prompt_tokens
            cached_tokens = done.cached_tokens or cached_tokens
            completion_tokens = done.completion_tokens or completion_tokens
            prompt_s, completion_s = done.prompt_s or prompt_s, done.completion_s or completion_s
        return Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=min(cached_tokens, prompt_tokens),  # it may have been said by Progress, and more
            completion_tokens=completion_tokens,
            reasoning_tokens=seen.reasoning_tokens,
            total_s=now - self.started_s,
            load_s=self.load_s,
            wait_s=self.wait_s,
            prompt_s=prompt_s,
            completion_s=completion_s,
        )
