"""Makes conversations that strict chat templates take. Pure.

Many templates refuse a system message that is not the first (Qwen 3.5, Gemma, Mistral), while agents send
several of them, also behind the user's words (Claude Code, Codex). Ollama's own renderers take them anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ollama_distributed.base.inference import Message


def with_one_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same words, with one system message at most, at the beginning.

    A later one goes to the end of the user's message before it, or to the beginning of the one behind it:
    such templates refuse two messages of the user's in a row as well. Else it becomes one of the user's.
    """
    found: list[Message] = []
    made = False
    """The last one is the system's words as the user's, who has said nothing there yet."""
    for message in messages:
        last = found[-1] if found else None
        if last is not None and made and message.role == "user":
            found[-1], made = msgspec.structs.replace(message, content=_both(last, message)), False
        elif message.role != "system" or last is None:
            found.append(message)
            made = False
        elif last.role == "user" or (last.role == "system" and len(found) == 1):
            found[-1] = msgspec.structs.replace(last, content=_both(last, message))
        else:
            found.append(msgspec.structs.replace(message, role="user"))
            made = True
    return tuple(found)


def _both(one: Message, other: Message) -> str:
    return "\n\n".join(text for text in (one.content, other.content) if text)
