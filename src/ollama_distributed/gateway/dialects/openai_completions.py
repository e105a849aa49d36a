"""POST /v1/completions: one text, or many, continued.

As in Ollama the model's template is applied to a text prompt, unless the extension
`raw: true` asks for the plain text; token ids are always used as they are.
Source: OpenAI API reference "Create completion".
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid, Unsupported
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    Delta,
    Event,
    Failed,
    Finished,
    InferenceRequest,
    TextPrompt,
    TokenLogprob,
    TokensPrompt,
    Usage,
)
from ollama_distributed.gateway.dialects.answer import Answer
from ollama_distributed.gateway.dialects.contract import Generate, RequestContext
from ollama_distributed.gateway.dialects.fields import INT_MAX, decode, need_model, within
from ollama_distributed.gateway.dialects.openai_chat_answer import FINGERPRINT, NO_USAGE_YET, usage_body
from ollama_distributed.gateway.dialects.openai_errors import error_body
from ollama_distributed.gateway.dialects.openai_sampling import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    ServerFields,
    StreamOptions,
    choices,
    max_tokens,
    sampling,
)
from ollama_distributed.gateway.dialects.options import keep_alive_s
from ollama_distributed.gateway.dialects.sse import CONTENT_TYPE, DONE, json_text, json_value


class CompletionIn(ServerFields, frozen=True, kw_only=True):
    model: str | None = None
    prompt: str | list[str | int | list[int]] | None = None
    suffix: str | None = None
    echo: bool | None = None
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    logprobs: int | None = None
    raw: bool | None = None


_DECODER = msgspec.json.Decoder(CompletionIn)

Prompt = str | tuple[int, ...]


def token_ids(param: str, row: list[Any]) -> tuple[int, ...]:
    for token in row:
        if not isinstance(token, int) or not 0 <= token <= INT_MAX:
            raise Invalid(f"{param} must hold token ids only", param=param)
    return tuple(row)


def text_or_tokens(param: str, value: str | list[Any] | None) -> tuple[Prompt, ...]:
    """A text, texts, token ids, or lists of token ids; at least one, none of them empty."""
    if value is None:
        raise Invalid(f"{param} is required", param=param)
    if isinstance(value, str):
        return (value,)
    if not value:
        raise Invalid(f"{param} must not be empty", param=param)
    if isinstance(value[0], int):
        return (token_ids(param, value),)
    found: list[Prompt] = []
    for i, row in enumerate(value):
        if isinstance(row, str):
            found.append(row)
        elif isinstance(row, list) and row:
            found.append(token_ids(f"{param}[{i}]", row))
        else:
            raise Invalid(f"{param}[{i}] must be a text or a list of token ids", param=f"{param}[{i}]")
    return tuple(found)


def parse_completion(body: bytes, context: RequestContext) -> Generate:
    row = decode(body, _DECODER)
    prompts = text_or_tokens("prompt", row.prompt)
    count = within("n", row.n, 1, MAX_CHOICES) or 1
    _check(row, prompts, count)
    requests = _requests(row, context, prompts, count)
    model = requests[0].model
    echoed = [
        prompt if row.echo and isinstance(prompt, str) else "" for prompt in prompts for _ in range(count)
    ]
    if row.stream:
        usage = bool(row.stream_options and row.stream_options.include_usage)
        stream = CompletionStream(context, model, echoed, len(prompts), with_usage=usage)
        return Generate(requests, stream, stream=True)
    return Generate(requests, CompletionBody(context, model, echoed, len(prompts)), stream=False)


def _check(row: CompletionIn, prompts: tuple[Prompt, ...], count: int) -> None:
    """Refuse what this server does not do, rather than do something else."""
    if row.best_of is not None and row.best_of != count:
        raise Unsupported("best_of is supported only when it equals n", param="best_of")
    if len(prompts) * count > MAX_CHOICES:
        raise Invalid(f"prompt times n must be at most {MAX_CHOICES}, got {len(prompts) * count}", param="n")
    if row.echo and row.logprobs is not None:
        raise Unsupported("echo with logprobs is not supported: the prompt is not scored", param="echo")
    for name in ("echo", "suffix"):
        if getattr(row, name) and not all(isinstance(prompt, str) for prompt in prompts):
            raise Unsupported(f"{name} needs a text prompt", param=name)


def _requests(
    row: CompletionIn, context: RequestContext, prompts: tuple[Prompt, ...], count: int
) -> tuple[InferenceRequest, ...]:
    """`count` requests for each prompt, in the order of the choices."""
    drawn, loading = sampling(
        row,
        num_predict=max_tokens("max_tokens", row.max_tokens),
        bias=row.logit_bias,
        beside=row.beside(),
    )
    logprobs = within("logprobs", row.logprobs, 0, MAX_TOP_LOGPROBS)
    first = InferenceRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=need_model(row.model),
        prompt=_prompt(row, prompts[0]),
        sampling=drawn,
        options=loading,
        think=False,  # the answer is one text: reasoning would have no place in it
        keep_alive_s=keep_alive_s(row.keep_alive),
        logprobs=logprobs is not None,
        top_logprobs=logprobs or 0,
    )
    found = list(choices(first, count))
    for i, prompt in enumerate(prompts[1:], start=1):
        name = RequestId(f"{context.request_id}-p{i}")
        found += choices(msgspec.structs.replace(first, request_id=name, prompt=_prompt(row, prompt)), count)
    return tuple(found)


def _prompt(row: CompletionIn, prompt: Prompt) -> TextPrompt | TokensPrompt:
    if isinstance(prompt, str):
        return TextPrompt(text=prompt, suffix=row.suffix or "", raw=bool(row.raw))
    return TokensPrompt(ids=prompt)


# ── the answer ──────────────────────────────────────────────────────────────────────


def _reason(event: Finished) -> str:
    return "length" if event.reason == "length" else "stop"


def logprobs_body(rows: list[TokenLogprob] | tuple[TokenLogprob, ...], offset: int) -> dict[str, Any] | None:
    """The older form: parallel lists. `offset`: characters that went before.

    The token itself is always among the likeliest: `logprobs` + 1 of them where it was none.
    """
    if not rows:
        return None
    offsets: list[int] = []
    for row in rows:
        offsets.append(offset)
        offset += len(row.token)
    return {
        "tokens": [row.token for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [
            {top.token: top.logprob for top in row.top} | {row.token: row.logprob} for row in rows
        ]
        if any(row.top for row in rows)
        else None,
        "text_offset": offsets,
    }


class CompletionBody:
    content_type = "application/json"

    def __init__(self, context: RequestContext, model: str, echoed: list[str], prompts: int) -> None:
        self._context = context
        self._model = model
        self._echoed = echoed
        self._prompts = prompts
        self._answers = [Answer(context.request_id) for _ in echoed]
        self._open = len(echoed)

    def feed(self, index: int, event: Event) -> bytes:
        if isinstance(event, Delta):
            self._answers[index].add(event)
        elif isinstance(event, Finished):
            self._answers[index].finished = event
            self._open -= 1
            if not self._open:
                return self._whole()
        return b""

    def _whole(self) -> bytes:
        rows = []
        usages: list[Usage] = []
        for index, (answer, echoed) in enumerate(zip(self._answers, self._echoed, strict=True)):
            assert answer.finished is not None
            usages.append(answer.finished.usage)
            rows.append(
                {
                    "text": echoed + answer.text,
                    "index": index,
                    "logprobs": logprobs_body(answer.logprobs, 0),
                    "finish_reason": _reason(answer.finished),
                }
            )
        return json_value(
            {
                "id": f"cmpl-{self._context.request_id}",
                "object": "text_completion",
                "created": int(self._context.now),
                "model": self._model,
                "system_fingerprint": FINGERPRINT,
                "choices": rows,
                "usage": usage_body(usages, self._prompts),
            }
        )


class CompletionStream:
    content_type = CONTENT_TYPE

    def __init__(
        self,
        context: RequestContext,
        model: str,
        echoed: list[str],
        prompts: int,
        *,
        with_usage: bool = False,
    ) -> None:
        self._head = (
            b'data: {"id":"cmpl-%b","object":"text_completion","created":%d,"model":%b,'
            b'"system_fingerprint":"%b",'
            % (context.request_id.encode(), int(context.now), json_text(model), FINGERPRINT.encode())
        )
        head = self._head + NO_USAGE_YET if with_usage else self._head
        self._before = [head + b'"choices":[{"index":%d,"text":' % i for i in range(len(echoed))]
        self._echo = list(echoed)
        self._offsets = [0] * len(echoed)
        self._usages: list[Usage | None] = [None] * len(echoed)
        self._prompts = prompts
        self._open = len(echoed)
        self._with_usage = with_usage

    def feed(self, index: int, event: Event) -> bytes:
        if not self._open:
            return b""
        if isinstance(event, Failed):
            self._open = 0
            return b"data: " + error_body(event.error) + b"\n\n"
        if isinstance(event, Finished):
            return self._finish(index, event)
        text = event.text if isinstance(event, Delta) else ""
        if self._echo[index]:
            text, self._echo[index] = self._echo[index] + text, ""
        rows = event.logprobs if isinstance(event, Delta) else ()
        if not text and not rows:
            return b""
        logprobs = b"null"
        if rows:
            logprobs = json_value(logprobs_body(rows, self._offsets[index]))
            self._offsets[index] += sum(len(row.token) for row in rows)
        return b"".join(
            (self._before[index], json_text(text), b',"logprobs":', logprobs, b',"finish_reason":null}]}\n\n')
        )

    def _finish(self, index: int, event: Finished) -> bytes:
        if self._usages[index] is not None:
            return b""
        self._usages[index] = event.usage
        text, self._echo[index] = self._echo[index], ""
        reason = _reason(event).encode()
        parts = [
            self._before[index],
            json_text(text),
            b',"logprobs":null,"finish_reason":"',
            reason,
            b'"}]}\n\n',
        ]
        self._open -= 1
        if not self._open:
            if self._with_usage:
                usage = json_value(usage_body([u for u in self._usages if u is not None], self._prompts))
                parts += (self._head, b'"choices":[],"usage":', usage, b"}\n\n")
            parts.append(DONE)
        return b"".join(parts)
