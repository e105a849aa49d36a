"""What the echo engine says: tokens, template, answers, tool calls, vectors. Pure.

Tokens are up to three bytes of UTF-8 packed into a number, so that any process can turn
ids into text again without a vocabulary, and an answer can be continued elsewhere. A
character of four bytes takes two tokens, as rare characters do in real models.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import (
    Format,
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest

MEDIA_MARKER = "<__media__>"
"""Stands for an image in a prompt; llama.cpp's default."""

_END = "<|end|>\n"
_ASSISTANT = "<|assistant|>\n"
_CALL = re.compile(r"^call (?P<name>[\w.-]+)\s*(?P<arguments>\{.*\})?\s*$", re.MULTILINE)
_TOKEN_BYTES = 3

# ── tokens ──────────────────────────────────────────────────────────────────────────


def chunks(data: bytes) -> Iterator[bytes]:
    """Cut UTF-8 into tokens. Where a token ended, the rest is cut the same way again."""
    start, size = 0, len(data)
    while start < size:
        end = min(start + _TOKEN_BYTES, size)
        if data[start] >= 0xF0:
            end = min(start + 2, size)
        else:
            while end < size and start + 1 < end and data[end] & 0xC0 == 0x80:
                end -= 1
        yield data[start:end]
        start = end


def token_id(chunk: bytes) -> int:
    return len(chunk) << 24 | int.from_bytes(chunk, "big")


def token_bytes(token: int) -> bytes:
    """Raises `Invalid` for a number that is no token."""
    size, value = token >> 24, token & 0xFFFFFF
    if not 1 <= size <= _TOKEN_BYTES or value >> 8 * size:
        raise Invalid(f"{token} is no token of the echo engine")
    return value.to_bytes(size, "big")


def tokenize(text: str) -> list[int]:
    return [token_id(chunk) for chunk in chunks(text.encode())]


def detokenize(ids: Sequence[int]) -> bytes:
    return b"".join(map(token_bytes, ids))


def count_tokens(data: bytes) -> int:
    """As many as `chunks` gives; by arithmetic for ASCII, so that long prompts cost nothing."""
    return -(-len(data) // _TOKEN_BYTES) if data.isascii() else sum(1 for _ in chunks(data))


# ── prompt and answer ───────────────────────────────────────────────────────────────


def render(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
    """The prompt of a chat, with the assistant's turn opened."""
    parts = []
    if tools:
        listed = [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in tools]
        parts.append(f"<|tools|>\n{json.dumps(listed)}{_END}")
    for message in messages:
        calls = "".join(f"call {c.name} {c.arguments}\n" for c in message.tool_calls)
        images = MEDIA_MARKER * len(message.images)
        parts.append(f"<|{message.role}|>\n{images}{message.content}{calls}{_END}")
    return "".join(parts) + _ASSISTANT


def prompt_bytes(prompt: str | tuple[int, ...] | tuple[str | tuple[int, ...], ...]) -> tuple[bytes, bytes]:
    """The prompt as bytes, and what of the answer it already holds (ids after a text)."""
    if isinstance(prompt, str):
        return prompt.encode(), b""
    data, answered = b"", b""
    ids: list[int] = []
    for part in prompt:
        match part:
            case int():
                ids.append(part)
            case str():
                data, answered = data + answered + part.encode(), b""
            case _:
                answered += detokenize(part)
    return data + detokenize(ids) if ids else data, answered


def answer_to(request: CompletionRequest, *, fixed: str = "", hash_tokens: int = 0) -> tuple[bytes, bytes]:
    """The prompt and the answer's bytes that are still to come.

    The answer is `fixed` if set, else `hash_tokens` tokens derived from the prompt, else
    the last user or tool message, or the whole prompt where it is no chat; wrapped as
    JSON where a format asks for it.
    """
    prompt, answered = prompt_bytes(request.prompt)
    question = prompt
    opened = prompt.rfind(_ASSISTANT.encode())
    if opened >= 0:
        question = prompt[:opened]
        answered = prompt[opened + len(_ASSISTANT) :] + answered
    answer = _answer(question, request.format, fixed, hash_tokens)
    return prompt, answer.removeprefix(answered)


def _answer(question: bytes, form: Format | None, fixed: str, hash_tokens: int) -> bytes:
    if fixed:
        return fixed.encode()
    if hash_tokens:
        return _hash_text(question, hash_tokens)
    said = _last_turn(question.decode(errors="replace"))
    match form:
        case None:
            return said.encode()
        case JsonObject():
            return json.dumps({"echo": said}, ensure_ascii=False).encode()
        case JsonSchema(schema):
            return json.dumps(instance(schema), ensure_ascii=False).encode()


def _hash_text(question: bytes, tokens: int) -> bytes:
    """So many tokens of lower-case letters, with a space in each."""
    digest = hashlib.shake_128(question).digest(2 * tokens)
    return b"".join(
        bytes((32, 97 + digest[i] % 26, 97 + digest[i + 1] % 26)) for i in range(0, 2 * tokens, 2)
    )


def _last_turn(prompt: str) -> str:
    start = max(prompt.rfind("<|user|>\n"), prompt.rfind("<|tool|>\n"))
    if start < 0:
        return prompt
    turn = prompt[prompt.index("\n", start) + 1 :]
    return turn.split(_END, 1)[0].replace(MEDIA_MARKER, "")


def instance(schema: Mapping[str, Any]) -> Any:
    """A small value that fits a JSON schema of the common kinds."""
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for union in ("anyOf", "oneOf"):
        if schema.get(union):
            return instance(schema[union][0])
    kind = schema.get("type", "object" if "properties" in schema else "null")
    if isinstance(kind, list):
        kind = kind[0]
    match kind:
        case "object":
            return {name: instance(part) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [instance(schema.get("items", {}))] * int(schema.get("minItems", 0))
        case "string":
            return "x" * int(schema.get("minLength", 0))
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return False
        case _:
            return None


# ── chat with tools ─────────────────────────────────────────────────────────────────


def chat_answer(request: ChatRequest) -> str | tuple[ToolCall, ...]:
    """Each line `call NAME {arguments}` of the last user message calls a tool; system messages behind it,
    as agents send them, are passed over.

    `tool_choice` "required", or a tool's name, calls the (first) tool with small arguments
    that fit its schema when no line does. Anything else is echoed.
    """
    said = (message for message in reversed(request.messages) if message.role != "system")
    last = next(said, Message(role="user"))
    calls: list[tuple[str, str]] = []
    if request.tool_choice != "none" and last.role == "user":
        known = {tool.name for tool in request.tools}
        calls = [
            (found["name"], found["arguments"] or "{}")
            for found in _CALL.finditer(last.content)
            if found["name"] in known
        ]
        calls = calls or _forced(request.tools, request.tool_choice)
    if not calls:
        return last.content
    if not request.parallel_tool_calls:
        calls = calls[:1]
    return tuple(
        ToolCall(id=f"call_{i}_{name}", name=name, arguments=arguments, index=i)
        for i, (name, arguments) in enumerate(calls)
    )


def _forced(tools: Sequence[Tool], choice: ToolChoice) -> list[tuple[str, str]]:
    match choice:
        case NamedTool(name):
            chosen = [tool for tool in tools if tool.name == name]
        case "required":
            chosen = list(tools[:1])
        case _:
            chosen = []
    return [(tool.name, json.dumps(instance({"type": "object", **tool.parameters}))) for tool in chosen]


# ── vectors and scores ──────────────────────────────────────────────────────────────


def vector(text: str, dimensions: int) -> list[float]:
    """The sum of one ±1 vector per word: texts that share words are near each other."""
    total = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()) or [text]:
        bits = hashlib.shake_128(word.encode()).digest(-(-dimensions // 8))
        for i in range(dimensions):
            total[i] += 1.0 if bits[i // 8] >> i % 8 & 1 else -1.0
    return total


def relevance(query: str, document: str) -> float:
    """Words shared, over the geometric mean of the counts: 0..1."""
    left, right = set(re.findall(r"\w+", query.lower())), set(re.findall(r"\w+", document.lower()))
    return len(left & right) / math.sqrt(len(left) * len(right)) if left and right else 0.0
