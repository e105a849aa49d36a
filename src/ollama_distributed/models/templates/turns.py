"""Go templates of one turn, written down in Jinja: what Modelfiles wrote before there was `.Messages`.

Such a template has `.System`, `.Prompt` and `.Response`, texts, and `if`, rendered once for each turn of
the conversation, the last time only as far as the response (Ollama's `template.Execute`). What else Go can do
is not read here: None, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ollama_distributed.models.templates.formats import literal

_FIELDS = {".System": "turn.system", ".Prompt": "turn.prompt", ".Response": "turn.response"}
_BLANKS = " \t\r\n"
"""What a `-` at a brace takes away beside it (Go's `text/template`)."""
_WORDS = re.compile(r"[()]|[^\s()]+")
_DEEPEST = 20
"""Ifs and brackets in each other. Templates have two or three; the renderer walks them by recursion."""
_ADDED = "{{- turn.response -}}"
"""What Ollama puts at the end of a template that does not say where the response stands."""
_EMPTY = "{%- set turn.system = '' -%}{%- set turn.prompt = '' -%}{%- set turn.response = '' -%}"


class _Action(NamedTuple):
    words: list[str]


class _If(NamedTuple):
    condition: str
    then: list[_Node]
    otherwise: list[_Node]


_Node = str | _If
"""Jinja as it is, or a branch."""


class _Unread(Exception):
    """This is not one of the templates that are read here."""


def translated(go_template: str) -> str | None:
    """The Jinja that renders conversations as Ollama would with this template; None when it is not read."""
    try:
        nodes = _Reader(_split(go_template)).whole()
    except _Unread:
        return None
    if not _responds(nodes):
        nodes = [*nodes, _ADDED]
    body, opened = _jinja(nodes), _jinja(_until_response(nodes)[0])
    changes = "(role == 'system' and (turn.prompt or turn.response)) or (role == 'user' and turn.response)"
    return (
        "{%- set turn = namespace(system='', prompt='', response='', role='') -%}"
        "{%- for message in messages -%}{%- set role = message['role'] -%}"
        f"{{%- if role != turn.role and ({changes}) -%}}{body}{_EMPTY}{{%- endif -%}}"
        + "".join(_take(role, name) for role, name in _ROLES)
        + "{%- set turn.role = role -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{opened}{{%- else -%}}{body}{{%- endif -%}}"
    )


_ROLES = (("system", "turn.system"), ("user", "turn.prompt"), ("assistant", "turn.response"))


def _take(role: str, name: str) -> str:
    """One that follows another of its role is joined to it."""
    return (
        f"{{%- if role == '{role}' -%}}{{%- if turn.role == role -%}}"
        f"{{%- set {name} = {name} + '\\n\\n' + message['content'] -%}}"
        f"{{%- else -%}}{{%- set {name} = message['content'] -%}}{{%- endif -%}}{{%- endif -%}}"
    )


# ── reading ─────────────────────────────────────────────────────────────────────────


def _split(text: str) -> Iterator[str | _Action]:
    """Texts, and actions between braces; blanks beside a `-` are gone."""
    text, at, trim = text.replace("\r\n", "\n"), 0, False
    if "{%" in text:
        raise _Unread  # somebody's Jinja, which is a mere text to Go
    while (start := text.find("{{", at)) >= 0:
        if (end := text.find("}}", start + 2)) < 0:
            raise _Unread
        inner, before = text[start + 2 : end], text[at:start]
        left = inner[:1] == "-" and inner[1:2] in tuple(_BLANKS)
        right = inner[-1:] == "-" and inner[-2:-1] in tuple(_BLANKS)
        before = before.lstrip(_BLANKS) if trim else before
        yield before.rstrip(_BLANKS) if left else before
        inner = inner[1:] if left else inner
        yield _Action(_WORDS.findall(inner[:-1] if right else inner))
        at, trim = end + 2, right
    yield text[at:].lstrip(_BLANKS) if trim else text[at:]


class _Reader:
    """Texts and actions to nodes."""

    def __init__(self, parts: Iterator[str | _Action]) -> None:
        self._parts = parts

    def whole(self) -> list[_Node]:
        nodes, ended = self._list(0)
        if ended:
            raise _Unread
        return nodes

    def _list(self, depth: int) -> tuple[list[_Node], list[str]]:
        """As far as an `else` or `end`, which comes second; empty: the end of the template."""
        if depth > _DEEPEST:
            raise _Unread
        nodes: list[_Node] = []
        for part in self._parts:
            if isinstance(part, str):
                nodes.append(literal(part))
                continue
            match part.words:
                case ["if", *condition]:
                    nodes.append(self._if(condition, depth + 1))
                case ["else", *_] | ["end"]:
                    return nodes, part.words
                case [field] if field in _FIELDS:
                    nodes.append("{{- " + _FIELDS[field] + " -}}")
                case _:
                    raise _Unread
        return nodes, []

    def _if(self, words: Sequence[str], depth: int) -> _If:
        condition = _condition(words)
        then, ended = self._list(depth)
        match ended:
            case ["end"]:
                return _If(condition, then, [])
            case ["else"]:
                otherwise, ended = self._list(depth)
                if ended != ["end"]:
                    raise _Unread
                return _If(condition, then, otherwise)
            case ["else", "if", *words]:
                return _If(condition, then, [self._if(words, depth + 1)])
        raise _Unread


def _condition(words: Sequence[str]) -> str:
    """`.System`, `not .System`, `and .System (or .Prompt .Response)`, as Jinja."""
    left = list(reversed(words))
    made = _call(left, 0)
    if left:
        raise _Unread
    return made


def _call(left: list[str], depth: int) -> str:
    """A function with what it is given, or a single value. Takes its words from the end of `left`."""
    if not left or depth > _DEEPEST:
        raise _Unread
    if left[-1] not in ("and", "or", "not"):
        return _value(left, depth)
    name, values = left.pop(), []
    while left and left[-1] != ")":
        values.append(_value(left, depth))
    if not values or (name == "not" and len(values) != 1):
        raise _Unread
    return f"(not {values[0]})" if name == "not" else "(" + f" {name} ".join(values) + ")"


def _value(left: list[str], depth: int) -> str:
    word = left.pop()
    if word in _FIELDS:
        return _FIELDS[word]
    if word != "(":
        raise _Unread
    made = _call(left, depth + 1)
    if not left or left.pop() != ")":
        raise _Unread
    return made


# ── writing ─────────────────────────────────────────────────────────────────────────

_RESPONSE = "{{- turn.response -}}"


def _responds(nodes: Sequence[_Node]) -> bool:
    """Whether it says the response, or asks for it."""
    return any(
        node == _RESPONSE
        if isinstance(node, str)
        else "turn.response" in node.condition or _responds(node.then) or _responds(node.otherwise)
        for node in nodes
    )


def _until_response(nodes: Sequence[_Node]) -> tuple[list[_Node], bool]:
    """What stands as far as the first response, in whatever branch; whether there was one."""
    kept: list[_Node] = []
    for node in nodes:
        if isinstance(node, str):
            kept.append(node)
            if node == _RESPONSE:
                return kept, True
            continue
        then, found = _until_response(node.then)
        otherwise, found = ([], True) if found else _until_response(node.otherwise)
        kept.append(_If(node.condition, then, otherwise))
        if found:
            return kept, True
    return kept, False


def _jinja(nodes: Sequence[_Node]) -> str:
    return "".join(
        node
        if isinstance(node, str)
        else f"{{%- if {node.condition} -%}}{_jinja(node.then)}"
        f"{{%- else -%}}{_jinja(node.otherwise)}{{%- endif -%}}"
        for node in nodes
    )
