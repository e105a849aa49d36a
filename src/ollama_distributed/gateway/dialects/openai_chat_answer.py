"""POST /v1/chat/completions: the answer, whole or as server-sent events.

A text delta is constant bytes around one JSON string. Reasoning goes out under both names
that clients read: `reasoning` (Ollama, vLLM, OpenRouter) and `reasoning_content` (DeepSeek).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ollama_distributed.base.inference import (
    Delta,
    Event,
    Failed,
    Finished,
    Opened,
    TokenLogprob,
    Usage,
)
from ollama_distributed.gateway.dialects.answer import Answer, ToolCalls
from ollama_distributed.gateway.dialects.contract import RequestContext
from ollama_distributed.gateway.dialects.openai_errors import error_body
from ollama_distributed.gateway.dialects.sse import CONTENT_TYPE, DONE, json_text, json_value

FINGERPRINT = "fp_ollama_distributed"
NO_USAGE_YET = b'"usage":null,'
"""In each chunk before the last one, where the usage is asked for."""


def usage_body(usages: list[Usage], prompts: int = 1) -> dict[str, Any]:
    """Totals of all choices. A prompt counts once, however many choices it has."""
    used = usages[0] if len(usages) == 1 else _total(usages, max(len(usages) // prompts, 1))
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
    }


def _total(usages: list[Usage], per_prompt: int) -> Usage:
    first_of_each = usages[::per_prompt]
    return Usage(
        prompt_tokens=sum(u.prompt_tokens for u in first_of_each),
        cached_tokens=sum(u.cached_tokens for u in first_of_each),
        completion_tokens=sum(u.completion_tokens for u in usages),
        reasoning_tokens=sum(u.reasoning_tokens for u in usages),
    )


def logprob_rows(rows: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            "token": row.token,
            "logprob": row.logprob,
            "bytes": list(row.bytes),
            "top_logprobs": [
                {"token": top.token, "logprob": top.logprob, "bytes": list(top.bytes)} for top in row.top
            ],
        }
        for row in rows
    ]


def logprobs_body(rows: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    return {"content": logprob_rows(rows), "refusal": None} if rows else None


def finish_reason(finished: Finished, *, called: bool, legacy: bool) -> str:
    if called and finished.reason != "length":
        return "function_call" if legacy else "tool_calls"
    return "length" if finished.reason == "length" else "stop"


class ChatBody:
    """The whole `chat.completion`, once every choice has finished."""

    content_type = "application/json"

    def __init__(self, context: RequestContext, model: str, count: int, *, legacy: bool = False) -> None:
        self._context = context
        self._model = model
        self._legacy = legacy
        self._answers = [
            Answer(f"{context.request_id}-{i}" if i else context.request_id) for i in range(count)
        ]
        self._open = count

    def feed(self, index: int, event: Event) -> bytes:
        answer = self._answers[index]
        if isinstance(event, Delta):
            answer.add(event)
        elif isinstance(event, Finished):
            answer.finished = event
            self._open -= 1
            if not self._open:
                return self._whole()
        return b""

    def _whole(self) -> bytes:
        return json_value(
            {
                "id": f"chatcmpl-{self._context.request_id}",
                "object": "chat.completion",
                "created": int(self._context.now),
                "model": self._model,
                "system_fingerprint": FINGERPRINT,
                "choices": [self._choice(i, answer) for i, answer in enumerate(self._answers)],
                "usage": usage_body([a.finished.usage for a in self._answers if a.finished]),
            }
        )

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finished is not None
        calls = answer.calls
        text = answer.text
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if calls else ""),
            "refusal": None,
        }
        if answer.thinking:
            message["reasoning"] = message["reasoning_content"] = answer.thinking
        if calls and self._legacy:
            message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments or "{}"}
        elif calls:
            message["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": c.arguments or "{}"},
                }
                for c in calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs_body(answer.logprobs),
            "finish_reason": finish_reason(answer.finished, called=bool(calls), legacy=self._legacy),
        }


class _Choice:
    """One choice of a stream."""

    __slots__ = ("before_text", "begun", "calls", "finished", "head", "usage")

    def __init__(self, head: bytes, index: int, request_id: str) -> None:
        self.head = head + b'"choices":[{"index":%d,"delta":{' % index
        self.before_text = self.head + b'"content":'
        self.begun = False
        self.finished = False
        self.calls = ToolCalls(f"{request_id}-{index}" if index else request_id)
        self.usage = Usage()


_AFTER_DELTA = b'},"logprobs":null,"finish_reason":null}]}\n\n'


class ChatStream:
    """`chat.completion.chunk` events: the role, the deltas, the finish, the usage, `[DONE]`."""

    content_type = CONTENT_TYPE

    def __init__(
        self,
        context: RequestContext,
        model: str,
        count: int,
        *,
        with_usage: bool = False,
        legacy: bool = False,
    ) -> None:
        self._head = (
            b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":%d,"model":%b,'
            b'"system_fingerprint":"%b",'
            % (context.request_id.encode(), int(context.now), json_text(model), FINGERPRINT.encode())
        )
        head = self._head + NO_USAGE_YET if with_usage else self._head
        self._choices = [_Choice(head, i, context.request_id) for i in range(count)]
        self._request_id = context.request_id
        self._open = count
        self._with_usage = with_usage
        self._legacy = legacy

    def feed(self, index: int, event: Event) -> bytes:
        if not self._open:
            return b""
        choice = self._choices[index]
        if type(event) is Delta:
            if choice.begun and event.text and not (event.thinking or event.tool_calls or event.logprobs):
                return choice.before_text + json_text(event.text) + _AFTER_DELTA
            return self._delta(choice, event)
        if isinstance(event, Opened):
            return self._begin(choice)
        if isinstance(event, Failed):
            self._open = 0
            return b"data: " + error_body(event.error) + b"\n\n"
        assert isinstance(event, Finished)
        return self._finish(choice, event)

    def _begin(self, choice: _Choice) -> bytes:
        if choice.begun:
            return b""
        choice.begun = True
        return choice.head + b'"role":"assistant","content":""' + _AFTER_DELTA

    def _delta(self, choice: _Choice, delta: Delta) -> bytes:
        parts = [self._begin(choice)]
        if delta.thinking:
            thinking = json_text(delta.thinking)
            parts += (
                choice.head, b'"reasoning":', thinking, b',"reasoning_content":', thinking, _AFTER_DELTA,
            )  # fmt: skip
        if delta.text or delta.logprobs:
            parts += (choice.before_text, json_text(delta.text))
            parts.append(_with_logprobs(delta) if delta.logprobs else _AFTER_DELTA)
        for fragment in delta.tool_calls:
            call, opens = choice.calls.add(fragment)
            function: dict[str, Any] = {"arguments": fragment.arguments}
            if opens:
                function["name"] = call.name
            if self._legacy:
                if call.place:
                    continue  # the older form has room for one call only
                body: dict[str, Any] = {"function_call": function}
            else:
                row: dict[str, Any] = {"index": call.place, "function": function}
                if opens:
                    row |= {"id": call.id, "type": "function"}
                body = {"tool_calls": [row]}
            parts += (choice.head, json_value(body)[1:-1], _AFTER_DELTA)
        return b"".join(parts)

    def _finish(self, choice: _Choice, event: Finished) -> bytes:
        if choice.finished:
            return b""
        choice.finished = True
        choice.usage = event.usage
        reason = finish_reason(event, called=bool(choice.calls.calls), legacy=self._legacy)
        parts = [
            self._begin(choice),
            choice.head,
            b'},"logprobs":null,"finish_reason":"',
            reason.encode(),
            b'"}]}\n\n',
        ]
        self._open -= 1
        if not self._open:
            if self._with_usage:
                usage = json_value(usage_body([c.usage for c in self._choices]))
                parts += (self._head, b'"choices":[],"usage":', usage, b"}\n\n")
            parts.append(DONE)
        return b"".join(parts)


def _with_logprobs(delta: Delta) -> bytes:
    return b'},"logprobs":' + json_value(logprobs_body(delta.logprobs)) + b',"finish_reason":null}]}\n\n'
