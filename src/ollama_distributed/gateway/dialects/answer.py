"""One answer put together from its deltas, for bodies that are sent whole.

`ToolCalls` also serves the streams: it says whether a fragment opens a call and gives
every call a place of its own, whatever indexes the engine used.
"""

from __future__ import annotations

from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import Delta, Finished, TokenLogprob, ToolCall


class Call:
    """A tool call as far as it has come."""

    __slots__ = ("_arguments", "id", "name", "place", "source_id")

    def __init__(self, place: int, source: ToolCall, call_id: str) -> None:
        self.place = place
        """0, 1, ... in order of appearance."""
        self.source_id = source.id
        self.id = call_id
        self.name = source.name
        self._arguments: list[str] = []

    @property
    def arguments(self) -> str:
        return "".join(self._arguments)

    def grow(self, fragment: str) -> None:
        self._arguments.append(fragment)


class ToolCalls:
    """The calls of one answer, in order of appearance."""

    __slots__ = ("_current", "_request_id", "calls")

    def __init__(self, request_id: RequestId | str) -> None:
        self.calls: list[Call] = []
        self._current: dict[int, Call] = {}
        self._request_id = request_id

    def add(self, fragment: ToolCall) -> tuple[Call, bool]:
        """The call that the fragment belongs to, and whether it opens it.

        A new index opens a call, and so does another id under a known index.
        """
        call = self._current.get(fragment.index)
        opens = call is None or bool(fragment.id and call.source_id and fragment.id != call.source_id)
        if call is None or opens:
            place = len(self.calls)
            call = Call(place, fragment, fragment.id or f"call_{self._request_id}_{place}")
            self.calls.append(call)
            self._current[fragment.index] = call
        call.grow(fragment.arguments)
        return call, opens


class Answer:
    __slots__ = ("_request_id", "_text", "_thinking", "_tool_calls", "finished", "logprobs")

    def __init__(self, request_id: RequestId | str) -> None:
        self._request_id = request_id
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._tool_calls: ToolCalls | None = None
        """Of most answers: none."""
        self.logprobs: list[TokenLogprob] = []
        self.finished: Finished | None = None

    def add(self, delta: Delta) -> None:
        if delta.text:
            self._text.append(delta.text)
        if delta.thinking:
            self._thinking.append(delta.thinking)
        for fragment in delta.tool_calls:
            if self._tool_calls is None:
                self._tool_calls = ToolCalls(self._request_id)
            self._tool_calls.add(fragment)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs)

    @property
    def calls(self) -> list[Call]:
        return [] if self._tool_calls is None else self._tool_calls.calls

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def thinking(self) -> str:
        return "".join(self._thinking)
