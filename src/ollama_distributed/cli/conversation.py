"""The state of one chat in the REPL: what was said, and the settings that go with each message.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ollama_distributed.cli.problem import Problem
from ollama_distributed.client.wire import (
    ChatRequest,
    CreateRequest,
    Format,
    GenerateRequest,
    KeepAlive,
    Message,
    Think,
)
from ollama_distributed.models import parameters


@dataclass
class Conversation:
    model: str
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    format: Format | None = None
    think: Think | None = None
    keep_alive: KeepAlive | None = None
    vision: bool = False

    def loading(self) -> GenerateRequest:
        """Brings the model into memory, so that the first answer does not wait for it."""
        return GenerateRequest(model=self.model, keep_alive=self.keep_alive, options=self.options or None)

    def asking(self, text: str, images: Sequence[bytes] = ()) -> ChatRequest:
        """The request for one more message; nothing is remembered before `answered`."""
        head = [Message(role="system", content=self.system)] if self.system else []
        said = Message(role="user", content=text, images=list(images) or None)
        return ChatRequest(
            model=self.model,
            messages=[*head, *self.messages, said],
            format=self.format,
            think=self.think,
            keep_alive=self.keep_alive,
            options=self.options or None,
        )

    def answered(self, request: ChatRequest, text: str, thinking: str) -> None:
        """Remember the message and its answer (also one that was stopped in the middle)."""
        said = request.messages[-1]
        assert isinstance(said, Message)
        self.messages += [said, Message(role="assistant", content=text, thinking=thinking or None)]

    def set_parameter(self, name: str, values: Sequence[str]) -> None:
        """Typed as a Modelfile's PARAMETER would be. Raises `Invalid`."""
        rows = [(name, value) for value in (values if name == "stop" else [" ".join(values)])]
        self.options |= dict(parameters.from_text(rows))

    def saving(self, name: str) -> CreateRequest:
        """A model that begins where this conversation is. Images stay behind."""
        kept: list[Message | Mapping[str, Any]] = [
            Message(role=said.role, content=said.content) for said in self.messages
        ]
        return CreateRequest(
            model=name,
            from_=self.model,
            system=self.system or None,
            parameters=self.options or None,
            messages=kept or None,
        )


def format_of(text: str | None) -> Format | None:
    """`json`, or a JSON schema as text. Raises `Problem`."""
    if not text:
        return None
    if text == "json":
        return "json"
    import json

    try:
        schema = json.loads(text)
    except ValueError as exc:
        raise Problem("format: give json, or a JSON schema") from exc
    if not isinstance(schema, dict):
        raise Problem("format: a JSON schema is an object")
    return schema


def think_of(text: str | None) -> Think | None:
    """`true`, `false` or a level. Raises `Problem`."""
    match text:
        case None | "":
            return None
        case "true":
            return True
        case "false":
            return False
        case "low" | "medium" | "high" | "max":
            return text
    raise Problem("think: give true, false, low, medium, high or max")


def keep_alive_of(text: str | None) -> KeepAlive | None:
    """A duration (`5m`), or seconds as a number."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return text
