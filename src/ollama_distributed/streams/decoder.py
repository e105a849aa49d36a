"""Decides which tokens become which text (pure).

Token events in, `Delta`s out, in three steps: bytes become characters, stop sequences end
the text, reasoning tags split it. Text that may still turn out to be the beginning of a
stop sequence, a tag or a character is withheld; all of that state can be taken out and put
into another decoder (migration rule R3, `DecoderState`), so that another runner's tokens
continue the same answer.

The same tokens give the same text however they are cut into events:
- The stop sequence that is complete first ends the text; of two complete at the same
  character, the longer one. The text before it is delivered, itself and what follows not.
- Reasoning: white space, the opening tag, white space, the reasoning, the closing tag,
  white space, the answer; the white space goes with the tags. Text that begins otherwise
  is an answer from the start, and its white space stays (Ollama, `thinking/parser.go`).
"""

from __future__ import annotations

import codecs
from typing import Literal

import msgspec

from ollama_distributed.base.inference import Delta, TokenLogprob
from ollama_distributed.base.tokens import Tokens

Phase = Literal["opening", "before", "thinking", "after", "answer"]
"""Looking for the opening tag; white space after it; reasoning; white space after it; answer."""


class DecoderRules(msgspec.Struct, frozen=True, kw_only=True):
    """Fixed for one answer."""

    stop: tuple[str, ...] = ()
    thinking_tags: tuple[str, str] | None = None
    starts_in_thinking: bool = False


class Withheld(msgspec.Struct, frozen=True):
    """Logprobs whose text is not out yet, with the characters [start, end) of that text."""

    start: int
    end: int
    logprobs: tuple[TokenLogprob, ...]


class DecoderState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a decoder remembers, for another decoder with the same rules."""

    phase: Phase
    raw: bytes = b""
    """Bytes of a character that is not complete."""
    maybe_stop: str = ""
    """Withheld: a stop sequence may begin here."""
    maybe_tag: str = ""
    """Withheld: a tag may begin here."""
    fed: int = 0
    """Characters fed so far."""
    withheld: tuple[Withheld, ...] = ()
    stopped: str | None = None
    completion_tokens: int = 0
    reasoning_tokens: int = 0


_FIRST: dict[Phase, DecoderState] = {
    phase: DecoderState(phase=phase) for phase in ("opening", "before", "answer")
}
"""Of decoders that were fed nothing."""


class Decoder:
    """One answer's decoder. Once `stopped` is set, nothing more comes out."""

    __slots__ = (
        "_fed",
        "_maybe_stop",
        "_maybe_tag",
        "_phase",
        "_raw",
        "_stop_starts",
        "_stops",
        "_tags",
        "_withheld",
        "completion_tokens",
        "reasoning_tokens",
        "stopped",
    )

    def __init__(self, rules: DecoderRules, state: DecoderState | None = None) -> None:
        self._stops: tuple[str, ...] = ()
        self._stop_starts: tuple[str, ...] = ()
        if rules.stop:
            self._stops = tuple(stop for stop in rules.stop if stop)
            self._stop_starts = tuple({stop[0]: None for stop in self._stops})
        self._tags = rules.thinking_tags or ("", "")
        if state is None:
            state = _FIRST[_first_phase(rules)]
        self._phase: Phase = state.phase
        self._raw = state.raw
        self._maybe_stop = state.maybe_stop
        self._maybe_tag = state.maybe_tag
        self._fed = state.fed
        self._withheld = list(state.withheld)
        self.stopped = state.stopped
        self.completion_tokens = state.completion_tokens
        self.reasoning_tokens = state.reasoning_tokens

    def snapshot(self) -> DecoderState:
        return DecoderState(
            phase=self._phase,
            raw=self._raw,
            maybe_stop=self._maybe_stop,
            maybe_tag=self._maybe_tag,
            fed=self._fed,
            withheld=tuple(self._withheld),
            stopped=self.stopped,
            completion_tokens=self.completion_tokens,
            reasoning_tokens=self.reasoning_tokens,
        )

    def feed(self, tokens: Tokens) -> Delta | None:
        """The text that these tokens let out, if any."""
        if self.stopped is not None:
            return None
        text, logprobs = tokens.text, tokens.logprobs
        # An engine without ids sends an event a token; logprobs, where asked for, count exactly.
        count = len(tokens.ids) or len(logprobs) or (1 if text or tokens.raw else 0)
        self.completion_tokens += count
        if (
            self._phase == "answer"
            and not (self._maybe_stop or self._raw or tokens.raw)
            and not (self._stops and self._may_stop(text))
        ):
            # The common path of a long answer: nothing is withheld, nothing may begin.
            self._fed += len(text)
            return Delta(text=text, logprobs=logprobs) if text or logprobs else None
        if tokens.raw or self._raw:
            text += self._characters(tokens.raw)
        delta = self._advance(text, logprobs, last=False)
        if self._phase != "answer":
            # The token that begins the answer belongs to it, the tags to the reasoning.
            self.reasoning_tokens += count
        return delta

    def finish(self) -> Delta | None:
        """The generation is over: what was withheld is text after all."""
        if self.stopped is not None:
            return None
        if self._phase == "answer" and not (self._raw or self._maybe_stop or self._withheld):
            return None
        rest = self._raw.decode("utf-8", "replace")
        self._raw = b""
        return self._advance(rest, (), last=True)

    # ── the three steps ─────────────────────────────────────────────────────────────

    def _characters(self, raw: bytes) -> str:
        data = self._raw + raw
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._raw = data[used:]
        return text

    def _advance(self, text: str, logprobs: tuple[TokenLogprob, ...], *, last: bool) -> Delta | None:
        start = self._fed
        self._fed += len(text)
        if logprobs:
            self._withheld.append(Withheld(start, self._fed, logprobs))
        clear = self._until_stop(self._maybe_stop + text, last=last)
        answer, thinking = self._split(clear, last=last or self.stopped is not None)
        released = self._released() if self._withheld else ()
        if answer or thinking or released:
            return Delta(text=answer, thinking=thinking, logprobs=released)
        return None

    def _may_stop(self, text: str) -> bool:
        for start in self._stop_starts:  # noqa: SIM110 - a third of the time of any(), for each token
            if start in text:
                return True
        return False

    def _until_stop(self, text: str, *, last: bool) -> str:
        """The part of `text` that no stop sequence can claim; the rest is withheld or dropped."""
        self._maybe_stop = ""
        if not (self._stops and self._may_stop(text)):
            return text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # First complete wins; at the same end the smaller start is the longer sequence.
            _, at, self.stopped = min(found)
            dropped = len(text) - at
            self._withheld = [w for w in self._withheld if w.start < self._fed - dropped]
            self._fed -= dropped
            return text[:at]
        held = 0 if last else max(overlap(text, stop) for stop in self._stops)
        if held:
            self._maybe_stop = text[-held:]
            return text[:-held]
        return text

    def _split(self, text: str, *, last: bool) -> tuple[str, str]:
        """(answer, reasoning) in `text`; moves through the phases."""
        if self._phase == "answer":
            return text, ""
        opening, closing = self._tags
        text = self._maybe_tag + text
        self._maybe_tag = ""
        thinking = ""
        if self._phase == "opening":
            trimmed = text.lstrip()
            if not trimmed.startswith(opening):
                if opening.startswith(trimmed) and not last:
                    self._maybe_tag = text
                    return "", ""
                self._phase, self.reasoning_tokens = "answer", 0
                return text, ""
            text = trimmed[len(opening) :]
            self._phase = "before"
        if self._phase == "before":
            text = text.lstrip()
            if not text:
                return "", ""
            self._phase = "thinking"
        if self._phase == "thinking":
            thinking, found, text = text.partition(closing)
            if not found:
                held = 0 if last else overlap(thinking, closing)
                if held:
                    self._maybe_tag = thinking[-held:]
                    thinking = thinking[:-held]
                return "", thinking
            self._phase = "after"
        text = text.lstrip()
        if text:
            self._phase = "answer"
        return text, thinking

    def _released(self) -> tuple[TokenLogprob, ...]:
        """Logprobs of the text that is out, in order."""
        out = self._fed - len(self._maybe_stop) - len(self._maybe_tag)
        ready = 0
        # After a stop, a token that also holds text before the stop sequence ends beyond it.
        while ready < len(self._withheld) and (self.stopped or self._withheld[ready].end <= out):
            ready += 1
        released = tuple(one for w in self._withheld[:ready] for one in w.logprobs)
        del self._withheld[:ready]
        return released


def overlap(text: str, sequence: str) -> int:
    """Length of the longest end of `text` that is a beginning of `sequence`, less than all of it."""
    for length in range(min(len(sequence) - 1, len(text)), 0, -1):
        if text.endswith(sequence[:length]):
            return length
    return 0


def _first_phase(rules: DecoderRules) -> Phase:
    if rules.thinking_tags is None:
        return "answer"
    return "before" if rules.starts_in_thinking else "opening"
