"""POST /v1/responses: the answer, whole or as the ordered list of events.

One state machine makes both: the stream tells of each step, the body shows the end.
Reasoning, text and function calls are items of their own; text and reasoning close when
something else begins, calls at the end, for an engine may write several at once.
Source: OpenAI API reference "Responses streaming events".
"""

from __future__ import annotations

from typing import Any

from ollama_distributed.base.errors import Invalid, OllamaDistributedError, QueueFull
from ollama_distributed.base.inference import (
    Delta,
    Event,
    Failed,
    Finished,
    Sampling,
    TokenLogprob,
    ToolCall,
    Usage,
)
from ollama_distributed.gateway.dialects.answer import Call, ToolCalls
from ollama_distributed.gateway.dialects.contract import RequestContext
from ollama_distributed.gateway.dialects.openai_chat_answer import logprob_rows
from ollama_distributed.gateway.dialects.responses_request import ResponsesIn, offered_tools
from ollama_distributed.gateway.dialects.responses_tools import (
    choice_body,
    custom_text,
    customs,
    namespaces,
    tool_body,
)
from ollama_distributed.gateway.dialects.sse import CONTENT_TYPE, json_text, json_value, sse_event

Body = dict[str, Any]


class Item:
    """An output item: `reasoning`, `message`, `function_call` or `custom_tool_call`."""

    __slots__ = ("before_delta", "call", "id", "index", "kind", "logprobs", "namespace", "open", "text")

    def __init__(self, kind: str, index: int, item_id: str) -> None:
        self.kind = kind
        self.index = index
        self.id = item_id
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.call: Call | None = None
        self.namespace: str | None = None
        self.open = True
        self.before_delta = b""

    def body(self, status: str) -> Body:
        text = "".join(self.text)
        if self.kind == "reasoning":
            summary = [{"type": "summary_text", "text": text}] if text else []
            return {"id": self.id, "type": "reasoning", "status": status, "summary": summary}
        if self.kind == "message":
            content = [] if status == "in_progress" else [output_text(text, self.logprobs)]
            return {
                "id": self.id,
                "type": "message",
                "status": status,
                "role": "assistant",
                "content": content,
            }
        assert self.call is not None
        body = {
            "id": self.id,
            "type": self.kind,
            "status": status,
            "call_id": self.call.id,
            "name": self.call.name,
        }
        if self.kind == "custom_tool_call":
            body["input"] = custom_text(text) if text else ""
        else:
            body["arguments"] = text or ("" if status == "in_progress" else "{}")
        return body | {"namespace": self.namespace} if self.namespace else body


def output_text(text: str, logprobs: list[TokenLogprob]) -> Body:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprob_rows(logprobs)}


class Frame:
    """The `response` object around the output: what was asked, and how it stands.

    It has every field that Open Responses demands, also those that mean nothing here: clients
    check them.
    """

    def __init__(self, row: ResponsesIn, sampling: Sampling, context: RequestContext) -> None:
        self.id = f"resp_{context.request_id}"
        self._context = context
        reasoning = row.reasoning
        self._asked: Body = {
            "id": self.id,
            "object": "response",
            "created_at": int(context.now),
            "background": False,
            "frequency_penalty": sampling.frequency_penalty or 0.0,
            "instructions": row.instructions,
            "max_output_tokens": sampling.num_predict,
            "max_tool_calls": row.max_tool_calls,
            "metadata": row.metadata or {},
            "model": row.model,
            "parallel_tool_calls": row.parallel_tool_calls is not False,
            "presence_penalty": sampling.presence_penalty or 0.0,
            "previous_response_id": None,
            "prompt_cache_key": row.prompt_cache_key,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "safety_identifier": row.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": _format_body(row)},
            "tool_choice": choice_body(row.tool_choice),
            "tools": [tool_body(tool) for tool in row.tools or ()],
            "top_logprobs": row.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": row.truncation or "auto",
            "user": row.user,
        }

    def body(
        self,
        status: str,
        output: list[Body],
        usage: Usage | None = None,
        error: OllamaDistributedError | None = None,
    ) -> Body:
        return self._asked | {
            "status": status,
            "completed_at": int(self._context.wall() or self._context.now) if status == "completed" else None,
            "error": _error_body(error) if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": _usage_body(usage) if usage else None,
        }


def _format_body(row: ResponsesIn) -> Body:
    form = row.text.format if row.text else None
    if form is None or form.type != "json_schema":
        return {"type": form.type if form else "text"}
    return {"type": "json_schema", "name": form.name, "schema": form.schema, "strict": form.strict}


def _usage_body(usage: Usage) -> Body:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _error_body(error: OllamaDistributedError) -> Body:
    """`code` is of OpenAI's closed list, `type` is our own code."""
    code = "server_error"
    if isinstance(error, QueueFull):
        code = "rate_limit_exceeded"
    elif isinstance(error, Invalid):
        code = "invalid_prompt"
    return {"code": code, "message": error.message, "type": error.code}


class ResponseStream:
    """The events, each with the next `sequence_number`."""

    content_type = CONTENT_TYPE

    def __init__(self, row: ResponsesIn, sampling: Sampling, context: RequestContext) -> None:
        self._frame = Frame(row, sampling, context)
        tools = offered_tools(row)
        self._namespaces = namespaces(tools)
        self._customs = customs(tools)
        self._request_id = context.request_id
        self._items: list[Item] = []
        self._current: Item | None = None
        self._calls = ToolCalls(context.request_id)
        self._call_items: list[Item] = []
        self._number = 0
        self._begun = False
        self._ended = False
        self.final: Body | None = None
        """The response as it stands after the last event."""

    def feed(self, index: int, event: Event) -> bytes:  # noqa: ARG002 - one request only
        if self._ended:
            return b""
        if type(event) is Delta:
            current = self._current
            if (
                current is not None
                and current.kind == "message"
                and event.text
                and not (event.thinking or event.tool_calls or event.logprobs)
            ):
                current.text.append(event.text)
                return self._text_delta(current, event.text, b"[]")
            return self._begin() + self._delta(event)
        if isinstance(event, Finished):
            return self._finish(event)
        if isinstance(event, Failed):
            return self._fail(event.error)
        return self._begin()

    # ── one event ──

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, **fields, "sequence_number": self._number}
        self._number += 1
        return sse_event(kind, body)

    def _text_delta(self, item: Item, text: str, logprobs: bytes) -> bytes:
        number = self._number
        self._number = number + 1
        return b'%b%b,"logprobs":%b,"sequence_number":%d}\n\n' % (
            item.before_delta, json_text(text), logprobs, number,
        )  # fmt: skip

    def _plain_delta(self, item: Item, text: str) -> bytes:
        number = self._number
        self._number = number + 1
        return b'%b%b,"sequence_number":%d}\n\n' % (item.before_delta, json_text(text), number)

    # ── the parts of an answer ──

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        response = self._frame.body("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _delta(self, delta: Delta) -> bytes:
        parts: list[bytes] = []
        if delta.thinking:
            item = self._open("reasoning", parts)
            item.text.append(delta.thinking)
            parts.append(self._plain_delta(item, delta.thinking))
        if delta.text or delta.logprobs:
            item = self._open("message", parts)
            item.text.append(delta.text)
            item.logprobs.extend(delta.logprobs)
            parts.append(self._text_delta(item, delta.text, json_value(logprob_rows(delta.logprobs))))
        for fragment in delta.tool_calls:
            parts.append(self._call(fragment, parts))
        return b"".join(parts)

    def _open(self, kind: str, parts: list[bytes]) -> Item:
        """The open item of this kind; a new one closes what was open."""
        if self._current is not None and self._current.kind == kind:
            return self._current
        self._close_current(parts)
        index = len(self._items)
        prefix = "rs" if kind == "reasoning" else "msg"
        item = Item(kind, index, f"{prefix}_{self._request_id}_{index}")
        self._items.append(item)
        self._current = item
        where = b'"item_id":%b,"output_index":%d' % (json_text(item.id), index)
        parts.append(
            self._event("response.output_item.added", output_index=index, item=item.body("in_progress"))
        )
        at = {"item_id": item.id, "output_index": index}
        if kind == "reasoning":
            item.before_delta = _before(
                "response.reasoning_summary_text.delta", where + b',"summary_index":0'
            )
            parts.append(
                self._event(
                    "response.reasoning_summary_part.added",
                    **at,
                    summary_index=0,
                    part={"type": "summary_text", "text": ""},
                )
            )
        else:
            item.before_delta = _before("response.output_text.delta", where + b',"content_index":0')
            parts.append(
                self._event("response.content_part.added", **at, content_index=0, part=output_text("", []))
            )
        return item

    def _call(self, fragment: ToolCall, parts: list[bytes]) -> bytes:
        call, opens = self._calls.add(fragment)
        if opens:
            self._close_current(parts)
            index = len(self._items)
            custom = call.name in self._customs
            kind, prefix = ("custom_tool_call", "ctc") if custom else ("function_call", "fc")
            item = Item(kind, index, f"{prefix}_{self._request_id}_{index}")
            item.call = call
            item.namespace = self._namespaces.get(call.name)
            where = b'"item_id":%b,"output_index":%d' % (json_text(item.id), index)
            item.before_delta = _before(_CALL_DELTA[kind], where)
            self._items.append(item)
            self._call_items.append(item)
            parts.append(
                self._event("response.output_item.added", output_index=index, item=item.body("in_progress"))
            )
        item = self._call_items[call.place]
        if not fragment.arguments:
            return b""
        item.text.append(fragment.arguments)
        if item.kind == "custom_tool_call":
            return b""  # its text lies inside the arguments, told when they are whole
        return self._plain_delta(item, fragment.arguments)

    def _close_current(self, parts: list[bytes]) -> None:
        if self._current is not None:
            parts.append(self._close(self._current, "completed"))
            self._current = None

    def _close(self, item: Item, status: str) -> bytes:
        item.open = False
        at = {"item_id": item.id, "output_index": item.index}
        text = "".join(item.text)
        body = item.body(status)
        if item.kind == "reasoning":
            part = {"type": "summary_text", "text": text}
            done = self._event(
                "response.reasoning_summary_text.done", **at, summary_index=0, text=text
            ) + self._event("response.reasoning_summary_part.done", **at, summary_index=0, part=part)
        elif item.kind == "message":
            rows = logprob_rows(item.logprobs)
            done = self._event(
                "response.output_text.done", **at, content_index=0, text=text, logprobs=rows
            ) + self._event(
                "response.content_part.done", **at, content_index=0, part=output_text(text, item.logprobs)
            )
        elif item.kind == "custom_tool_call":
            done = self._plain_delta(item, body["input"]) + self._event(
                "response.custom_tool_call_input.done", **at, input=body["input"]
            )
        else:
            done = self._event("response.function_call_arguments.done", **at, arguments=body["arguments"])
        return done + self._event("response.output_item.done", output_index=item.index, item=body)

    def _finish(self, event: Finished) -> bytes:
        self._ended = True
        status = "incomplete" if event.reason == "length" else "completed"
        parts = [self._begin()]
        if not self._items:
            self._open("message", parts)  # an empty answer is a message with an empty text
        statuses = ["completed" if not item.open else status for item in self._items]
        parts += [self._close(item, status) for item in self._items if item.open]
        output = [item.body(done) for item, done in zip(self._items, statuses, strict=True)]
        self.final = self._frame.body(status, output, event.usage)
        parts.append(self._event(f"response.{status}", response=self.final))
        return b"".join(parts)

    def _fail(self, error: OllamaDistributedError) -> bytes:
        self._ended = True
        output = [item.body("incomplete" if item.open else "completed") for item in self._items]
        response = self._frame.body("failed", output, error=error)
        return self._begin() + self._event("response.failed", response=response)


_CALL_DELTA = {
    "function_call": "response.function_call_arguments.delta",
    "custom_tool_call": "response.custom_tool_call_input.delta",
}


def _before(kind: str, where: bytes) -> bytes:
    return b'event: %b\ndata: {"type":"%b",%b,"delta":' % (kind.encode(), kind.encode(), where)


class ResponseBody:
    """The whole `response`: what the stream's last event would show."""

    content_type = "application/json"

    def __init__(self, row: ResponsesIn, sampling: Sampling, context: RequestContext) -> None:
        self._stream = ResponseStream(row, sampling, context)

    def feed(self, index: int, event: Event) -> bytes:
        self._stream.feed(index, event)
        final, self._stream.final = self._stream.final, None
        return json_value(final) if final is not None else b""
