"""A sink that keeps what an engine emits and notes every breach of the order of events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ollama_distributed.base.inference import ToolCall
from ollama_distributed.serving.ports import ChatDelta, Done, EngineEvent, EngineFailed, Progress, Tokens

DEADLINE_S = 60.0
"""For one answer of a tiny model on a busy machine."""


class Recording:
    """`EngineSink` of one answer. `breaches` stays empty while the engine keeps its contract."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.breaches: list[str] = []
        self.cancelled = False
        self._last: Done | EngineFailed | None = None
        self._changed = asyncio.Event()

    def __call__(self, event: EngineEvent, /) -> None:
        if self.cancelled:
            self.breaches.append(f"{event!r} came after cancel")
        if self._last is not None:
            self.breaches.append(f"{event!r} came after {self._last!r}")
        if isinstance(event, Progress):
            if any(isinstance(e, Tokens | ChatDelta) for e in self.events):
                self.breaches.append("progress of the prompt came after the first token")
            if not 0 <= event.processed <= event.total:
                self.breaches.append(f"{event!r} is out of bounds")
        if isinstance(event, Done | EngineFailed):
            self._last = event
        self.events.append(event)
        self._changed.set()

    # ── waiting ─────────────────────────────────────────────────────────────────────

    async def end(self) -> Done | EngineFailed:
        """The last event. Fails by deadline, or on a breach."""
        await self._until(lambda: self._last is not None, "no last event")
        await asyncio.sleep(0)  # a second last event would come at once
        assert not self.breaches, self.breaches
        assert self._last is not None
        return self._last

    async def done(self) -> Done:
        last = await self.end()
        assert isinstance(last, Done), f"failed: {last.error!r}"
        return last

    async def failed(self) -> EngineFailed:
        last = await self.end()
        assert isinstance(last, EngineFailed), f"ended well: {last!r}"
        return last

    async def pieces(self, count: int) -> None:
        """Until so many events with tokens came."""
        await self._until(
            lambda: (
                sum(isinstance(e, Tokens | ChatDelta) for e in self.events) >= count or self._last is not None
            ),
            f"fewer than {count} tokens",
        )
        assert self._last is None, f"ended before {count} tokens: {self._last!r}"

    async def quiet(self, for_s: float) -> None:
        """Until nothing came for so long."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), for_s)
                except TimeoutError:
                    return

    async def _until(self, met: Callable[[], bool], otherwise: str) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not met():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{otherwise} within {DEADLINE_S:g} s; got {self.events[-5:]!r}") from None

    # ── what came ───────────────────────────────────────────────────────────────────

    @property
    def text(self) -> str:
        """All text; where the engine gave bytes, those decoded."""
        said = (e for e in self.events if isinstance(e, Tokens | ChatDelta))
        data = b"".join(e.text.encode() + (e.raw if isinstance(e, Tokens) else b"") for e in said)
        return data.decode(errors="replace")

    @property
    def thinking(self) -> str:
        return "".join(e.thinking for e in self.events if isinstance(e, ChatDelta))

    @property
    def ids(self) -> list[int]:
        return [i for e in self.events if isinstance(e, Tokens) for i in e.ids]

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls put together from their fragments."""
        calls: dict[int, ToolCall] = {}
        for event in self.events:
            for part in event.tool_calls if isinstance(event, ChatDelta) else ():
                so_far = calls.get(part.index, ToolCall(id="", name="", arguments="", index=part.index))
                calls[part.index] = ToolCall(
                    id=part.id or so_far.id,
                    name=part.name or so_far.name,
                    arguments=so_far.arguments + part.arguments,
                    index=part.index,
                )
        return [calls[index] for index in sorted(calls)]
