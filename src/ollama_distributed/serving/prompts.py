"""Decides what a runner is asked: capabilities, conversation, rendering, truncation.

The model's own template is applied by the engine (`Runner.apply_template`); this room puts
together the messages, and cuts what is too long. Error texts are Ollama's, since clients
match on them. Source: Ollama `server/routes.go`, `server/prompt.go`, `server/images.go`,
`llm/llama_server.go`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ollama_distributed.base.errors import ContextExceeded, Invalid, Unsupported
from ollama_distributed.base.inference import (
    ChatPrompt,
    InferenceRequest,
    Message,
    Sampling,
    TextPrompt,
    Think,
    TokensPrompt,
    Tool,
)
from ollama_distributed.models.spec import Capability, ModelSpec
from ollama_distributed.models.templates import known as templates
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, Runner
from ollama_distributed.serving.turns import with_one_system

OPEN_ENDED_CONTEXTS = 10
"""An answer without a limit ends after so many contexts (as Ollama): a model may never stop."""

_PLAIN_TEMPLATES = frozenset({"{{.Prompt}}", "{{.Prompt}}{{.Response}}"})
"""Go templates, white space taken out, that put the prompt as it is."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What one request comes to for a runner."""

    ask: CompletionRequest | ChatRequest
    rendered: str = ""
    """The prompt text; empty when it is token ids or the engine renders it."""
    ids: tuple[int, ...] = ()
    images: int = 0
    thinking_tags: tuple[str, str] | None = None

    @property
    def starts_in_thinking(self) -> bool:
        return self.thinking_tags is not None and self.rendered.rstrip().endswith(self.thinking_tags[0])


# ── may this model do it ────────────────────────────────────────────────────────────


def check(spec: ModelSpec, request: InferenceRequest) -> None:
    """Refuse what the model cannot do.

    Raises:
        Unsupported: in Ollama's words.
        Invalid: the request contradicts itself.
    """
    prompt, able = request.prompt, spec.capabilities
    if request.think and "thinking" not in able and not request.think_if_able:
        raise Unsupported(f'"{request.model}" does not support thinking')
    if isinstance(prompt, TextPrompt) and prompt.raw and (prompt.template or prompt.system or prompt.context):
        raise Invalid("raw mode does not support template, system, or context")
    if "completion" not in able:
        what = "chat" if isinstance(prompt, ChatPrompt) else "generate"
        raise Unsupported(f'"{request.model}" does not support {what}')
    needed: list[Capability] = []
    if isinstance(prompt, ChatPrompt):
        if prompt.tools and tools_of(prompt):
            needed.append("tools")
        for message in prompt.messages:
            if message.images:
                needed.append("vision")
                break
    elif isinstance(prompt, TextPrompt):
        if prompt.suffix:
            needed.append("insert")
        if prompt.images:
            needed.append("vision")
    if needed and (missing := [capability for capability in needed if capability not in able]):
        # Ollama joins several with newlines.
        raise Unsupported(f"{spec.name} does not support {chr(10).join(missing)}")


def thinking_of(spec: ModelSpec, request: InferenceRequest) -> Think | None:
    """What the template is told: on by default for a model that can."""
    if "thinking" not in spec.capabilities:
        return None
    return True if request.think is None else request.think


def with_template(spec: ModelSpec, prompt: TextPrompt | TokensPrompt | ChatPrompt) -> ModelSpec:
    """The model with the template that the request brings, which takes a load of its own.

    Raises:
        Unsupported: the template has no Jinja twin, or the model's own has none.
    """
    if isinstance(prompt, TokensPrompt) or (isinstance(prompt, TextPrompt) and puts_prompt_as_is(prompt)):
        return spec
    if isinstance(prompt, TextPrompt) and prompt.template:
        if spec.remote is not None:
            raise Unsupported(f"{spec.display} runs on another server, which has its own template")
        twin = templates.twin(prompt.template)
        if twin is None:
            raise Unsupported(templates.refusal(prompt.template))
        return msgspec.structs.replace(spec, chat_template=twin, template_problem="")
    if spec.template_problem:
        raise Unsupported(spec.template_problem)
    return spec


def puts_prompt_as_is(prompt: TextPrompt) -> bool:
    """Whether no template is applied: raw, fill in the middle, or `{{ .Prompt }}`."""
    return prompt.raw or bool(prompt.suffix) or "".join((prompt.template or "").split()) in _PLAIN_TEMPLATES


# ── the conversation ────────────────────────────────────────────────────────────────


def conversation(spec: ModelSpec, prompt: ChatPrompt | TextPrompt) -> tuple[Message, ...]:
    """The messages for the template: the Modelfile's SYSTEM and MESSAGE rows come first."""
    messages = _conversation(spec, prompt)
    return with_one_system(messages) if spec.template_refuses else messages


def _conversation(spec: ModelSpec, prompt: ChatPrompt | TextPrompt) -> tuple[Message, ...]:
    if isinstance(prompt, ChatPrompt) and not (spec.messages or spec.system):
        return prompt.messages
    stored = tuple(Message(role=row.role, content=row.content) for row in spec.messages)
    if isinstance(prompt, ChatPrompt):
        messages = stored + prompt.messages
        if spec.system and not (prompt.messages and prompt.messages[0].role == "system"):
            messages = (Message(role="system", content=spec.system), *messages)
        return messages
    system = prompt.system or spec.system
    return (
        *((Message(role="system", content=system),) if system else ()),
        *(() if prompt.context else stored),
        Message(role="user", content=prompt.text, images=prompt.images),
    )


def without_oldest(messages: Sequence[Message], dropped: int) -> tuple[Message, ...]:
    """The conversation without its first `dropped` messages, of which system ones stay."""
    kept = tuple(message for message in messages[:dropped] if message.role == "system")
    return kept + tuple(messages[dropped:])


def cut(ids: Sequence[int], context_tokens: int, num_keep: int) -> tuple[int, ...]:
    """Too many tokens cut to fit: the first `num_keep` stay, then room is made for an answer.

    Half of what is not kept is given to the answer, as the first context shift would.
    """
    if len(ids) < context_tokens:
        return tuple(ids)
    keep = min(len(ids) if num_keep < 0 else num_keep, context_tokens - 1)
    limit = context_tokens - max((context_tokens - keep) // 2, 1)
    return (*ids[:keep], *ids[keep + len(ids) - limit :])


def cut_to_fit(ids: Sequence[int], context_tokens: int, sampling: Sampling) -> tuple[int, ...]:
    """As `cut`; how many of the first stay is the request's, or else as many as Ollama keeps."""
    return cut(ids, context_tokens, 4 if sampling.num_keep is None else sampling.num_keep)


def bounded(sampling: Sampling, context_tokens: int, emitted: int) -> Sampling:
    """With a number to predict that ends, less what an earlier runner emitted already."""
    most, wanted = OPEN_ENDED_CONTEXTS * context_tokens, sampling.num_predict
    if wanted is None or not 0 <= wanted <= most:
        wanted = most
    left = wanted - emitted if wanted > emitted else 0
    return msgspec.structs.replace(sampling, num_predict=left)


# ── with the runner ─────────────────────────────────────────────────────────────────


def prepared_by_engine(
    runner: Runner, spec: ModelSpec, request: InferenceRequest, sampling: Sampling
) -> Prompt | None:
    """Of a chat that the engine renders and takes apart; None: `prepare` has to render it."""
    prompt = request.prompt
    if not isinstance(prompt, ChatPrompt) or request.render_only:
        return None
    if not (tools_of(prompt) or (spec.remote is not None and not runner.renders)):
        return None
    return _parsed_by_engine(spec, request, sampling, conversation(spec, prompt))


async def prepare(runner: Runner, spec: ModelSpec, request: InferenceRequest, sampling: Sampling) -> Prompt:
    """Render the request for this runner. Raises what the runner raises."""
    prompt = request.prompt
    if isinstance(prompt, TokensPrompt):
        return Prompt(ask=completion(request, sampling, prompt.ids), ids=prompt.ids)
    if isinstance(prompt, ChatPrompt):
        return await _prepare_chat(runner, spec, request, sampling, conversation(spec, prompt))
    if prompt.suffix:
        ask = completion(request, sampling, prompt.text, suffix=prompt.suffix)
        return Prompt(ask=ask, rendered=prompt.text)
    thinking, text = thinking_of(spec, request), prompt.text
    ids: tuple[int, ...] = ()
    if not puts_prompt_as_is(prompt):
        messages = conversation(spec, prompt)
        rendered = await _rendered(runner, spec, request, messages)
        if rendered is None:
            return _parsed_by_engine(spec, request, sampling, messages)
        text, ids = rendered
    if not ids and (prompt.context or (request.want_context and not prompt.images)):
        # These ids go to the runner too, so that the text is not taken apart twice.
        try:
            ids = (*prompt.context, *await runner.tokenize(text, add_special=not prompt.context))
        except Unsupported:
            # A server elsewhere without such a route: the answer has no context to go on from.
            if spec.remote is None or prompt.context:
                raise
    thinking_tags = tags(spec, thinking)
    return Prompt(
        ask=completion(request, sampling, ids or text, images=prompt.images, thinking_tags=thinking_tags),
        rendered=text,
        ids=ids,
        images=len(prompt.images),
        thinking_tags=thinking_tags,
    )


async def shorten(
    runner: Runner, spec: ModelSpec, request: InferenceRequest, sampling: Sampling, prompt: Prompt
) -> Prompt:
    """A prompt that was too long, cut to fit: a chat without its oldest messages, then tokens.

    Raises:
        ContextExceeded: it cannot be cut (images, tools, fill in the middle), or no cut is enough.
    """
    if isinstance(request.prompt, ChatPrompt):
        return await _shorten_chat(runner, spec, request, sampling)
    return await _cut(runner, request, sampling, prompt)


async def _cut(runner: Runner, request: InferenceRequest, sampling: Sampling, prompt: Prompt) -> Prompt:
    context_tokens = runner.plan.context_tokens
    fills = isinstance(request.prompt, TextPrompt) and request.prompt.suffix
    if prompt.images or fills or isinstance(prompt.ask, ChatRequest):
        raise ContextExceeded(
            f"the last message, or the text, is longer than the context of {context_tokens} tokens; what has "
            "images, tools or a suffix is not cut",
            context_tokens=context_tokens,
        )
    ids = prompt.ids or await runner.tokenize(prompt.rendered)
    shorter = cut_to_fit(ids, context_tokens, sampling)
    ask = completion(request, sampling, shorter, thinking_tags=prompt.thinking_tags)
    return msgspec.structs.replace(prompt, ask=ask, ids=shorter)


async def _shorten_chat(
    runner: Runner, spec: ModelSpec, request: InferenceRequest, sampling: Sampling
) -> Prompt:
    """Drop as few of the oldest messages as are enough; the last one stays, and is cut as a text is if it
    is too long by itself (as by Ollama)."""
    assert isinstance(request.prompt, ChatPrompt)
    messages, tools = conversation(spec, request.prompt), tools_of(request.prompt)
    thinking = thinking_of(spec, request)

    async def fits(dropped: int) -> bool:
        text = await runner.apply_template(without_oldest(messages, dropped), tools, thinking)
        return len(await runner.tokenize(text)) < runner.plan.context_tokens

    low, high = 1, len(messages) - 1
    if high < 1 or not await fits(high):
        last = without_oldest(messages, max(high, 0))
        return await _cut(
            runner, request, sampling, await _prepare_chat(runner, spec, request, sampling, last)
        )
    while low < high:
        middle = (low + high) // 2
        if await fits(middle):
            high = middle
        else:
            low = middle + 1
    return await _prepare_chat(runner, spec, request, sampling, without_oldest(messages, high))


async def _prepare_chat(
    runner: Runner,
    spec: ModelSpec,
    request: InferenceRequest,
    sampling: Sampling,
    messages: tuple[Message, ...],
) -> Prompt:
    prompt = request.prompt
    assert isinstance(prompt, ChatPrompt)
    tools = tools_of(prompt)
    if not request.render_only and (tools or (spec.remote is not None and not runner.renders)):
        return _parsed_by_engine(spec, request, sampling, messages)
    rendered = await _rendered(runner, spec, request, messages, tools)
    if rendered is None:
        return _parsed_by_engine(spec, request, sampling, messages)
    text, ids = rendered
    images, thinking_tags = _images(messages), tags(spec, thinking_of(spec, request))
    return Prompt(
        ask=completion(request, sampling, ids or text, images=images, thinking_tags=thinking_tags),
        rendered=text,
        ids=ids,
        images=len(images),
        thinking_tags=thinking_tags,
    )


async def _rendered(
    runner: Runner,
    spec: ModelSpec,
    request: InferenceRequest,
    messages: tuple[Message, ...],
    tools: tuple[Tool, ...] = (),
) -> tuple[str, tuple[int, ...]] | None:
    """The prompt as text, or as ids where nothing else is asked of it and the engine has those sooner;
    None for a server elsewhere that renders chats but does not show how."""
    thinking, prompt = thinking_of(spec, request), request.prompt
    goes_on = isinstance(prompt, TextPrompt) and prompt.context
    try:
        if not (request.render_only or goes_on or _images(messages) or tags(spec, thinking)):
            ids = await runner.template_ids(messages, tools, thinking)
            if ids is not None:
                return "", ids
        return await runner.apply_template(messages, tools, thinking), ()
    except Unsupported:
        if spec.remote is None or request.render_only:
            raise
        return None


def _parsed_by_engine(
    spec: ModelSpec, request: InferenceRequest, sampling: Sampling, messages: tuple[Message, ...]
) -> Prompt:
    """A chat that the engine renders and takes apart itself; it cannot be continued elsewhere."""
    chat = request.prompt if isinstance(request.prompt, ChatPrompt) else None
    ask = ChatRequest(
        messages=messages,
        tools=tools_of(chat) if chat else (),
        tool_choice=chat.tool_choice if chat else "none",
        parallel_tool_calls=chat.parallel_tool_calls if chat else True,
        sampling=sampling,
        format=request.format,
        think=thinking_of(spec, request),
        top_logprobs=request.top_logprobs if request.logprobs else None,
        whole=request.whole,
        together=not sampling.stop,
        tenant=request.identity.tenant,
    )
    return Prompt(ask=ask, images=len(_images(messages)))


def _images(messages: tuple[Message, ...]) -> tuple[bytes, ...]:
    return tuple([image for message in messages for image in message.images])


def request_images(request: InferenceRequest) -> tuple[bytes, ...]:
    match request.prompt:
        case TextPrompt(images=images):
            return images
        case ChatPrompt(messages=messages):
            return _images(messages)
        case TokensPrompt():
            return ()


def tools_of(prompt: ChatPrompt) -> tuple[Tool, ...]:
    """The tools that the model may call."""
    return () if prompt.tool_choice == "none" else prompt.tools


def completion(
    request: InferenceRequest,
    sampling: Sampling,
    prompt: str | tuple[int, ...] | tuple[str | tuple[int, ...], ...],
    *,
    images: tuple[bytes, ...] = (),
    suffix: str = "",
    thinking_tags: tuple[str, str] | None = None,
) -> CompletionRequest:
    """What a runner is asked that renders nothing itself. `thinking_tags`: that are taken apart."""
    return CompletionRequest(
        prompt=prompt,
        images=images,
        suffix=suffix,
        sampling=sampling,
        format=request.format,
        top_logprobs=request.top_logprobs if request.logprobs else None,
        # -2: until the context is full, which is where sliding it would go on.
        shift=request.shift and request.sampling.num_predict != -2,
        together=not sampling.stop and thinking_tags is None,
        tenant=request.identity.tenant,
    )


def tags(spec: ModelSpec, thinking: Think | None) -> tuple[str, str] | None:
    """Tags to take apart; without thinking Ollama leaves a stray block in the text, so do we."""
    return spec.thinking_tags if thinking else None
