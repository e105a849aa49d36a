"""Prompt formats: what stands around each turn of a conversation.

A format writes its own Jinja template and the Go spellings in which Modelfiles give it.
Sources: the model makers' cards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec


class Turn(NamedTuple):
    before: str
    after: str


class Format(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    user: Turn
    assistant: Turn
    opening: str
    """What asks for the answer; comes last."""
    system: Turn
    system_place: Literal["turn", "before", "inside"] = "turn"
    """A turn of its own, or held back until the next user turn: before it or inside it."""
    no_system: str = ""
    """Stands inside a user turn that has no system text."""
    start: str = ""
    stops: tuple[str, ...] = ()

    def jinja(self) -> str:
        """The template. No BOS: as with Ollama's own templates, the tokenizer adds it."""
        if self.system_place == "turn":
            return (
                literal(self.start)
                + "{%- for message in messages -%}"
                + "{%- if message['role'] == 'system' -%}"
                + _around(self.system)
                + "{%- elif message['role'] == 'assistant' -%}"
                + _around(self.assistant)
                + "{%- else -%}"
                + _around(self.user)
                + "{%- endif -%}{%- endfor -%}"
                + "{%- if add_generation_prompt -%}"
                + literal(self.opening)
                + "{%- endif -%}"
            )
        held = _around(self.system, "held.text")
        inside = self.system_place == "inside"
        absent = "{%- else -%}" + literal(self.no_system) if self.no_system else ""
        system = "{%- if held.text -%}" + held + "{%- set held.text = '' -%}" + absent + "{%- endif -%}"
        return (
            "{%- set held = namespace(text='') -%}"
            + literal(self.start)
            + "{%- for message in messages -%}"
            + "{%- if message['role'] == 'system' -%}"
            + r"{%- set held.text = (held.text + '\n\n' if held.text else '') + message['content'] -%}"
            + "{%- elif message['role'] == 'assistant' -%}"
            + _around(self.assistant)
            + "{%- else -%}"
            + ("" if inside else system)
            + literal(self.user.before)
            + (system if inside else "")
            + "{{- message['content'] -}}"
            + literal(self.user.after)
            + "{%- endif -%}{%- endfor -%}"
            + "{%- if add_generation_prompt -%}"
            + literal(self.opening)
            + "{%- endif -%}"
        )

    def go_spellings(self) -> Iterator[str]:
        """The usual one-turn spellings: `{{ if .System }}...{{ .Prompt }}...{{ .Response }}`."""
        system = "{{ if .System }}" + self.system.before + "{{ .System }}" + self.system.after + "{{ end }}"
        prompt = "{{ .Prompt }}" + self.user.after
        match self.system_place:
            case "turn":
                turns = (
                    system + "{{ if .Prompt }}" + self.user.before + prompt + "{{ end }}",
                    system + self.user.before + prompt,
                )
            case "before":
                turns = (
                    system + "{{ if .Prompt }}" + self.user.before + prompt + "{{ end }}",
                    system + self.user.before + prompt,
                )
            case "inside":
                turns = (
                    self.user.before + system + prompt,
                    "{{ if .Prompt }}" + self.user.before + system + prompt + "{{ end }}",
                )
        for turn in turns:
            opened = self.start + turn + self.opening
            yield opened
            yield opened + "{{ .Response }}"
            yield opened + "{{ .Response }}" + self.assistant.after


def _around(turn: Turn, content: str = "message['content']") -> str:
    return literal(turn.before) + "{{- " + content + " -}}" + literal(turn.after)


def literal(text: str) -> str:
    """Literal text, free of Jinja's rules about blanks and lines."""
    if not text:
        return ""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "{{- '" + escaped + "' -}}"


def _by_role(before: str, after: str, opening: str, name: str, stops: tuple[str, ...]) -> Format:
    """A format that names the role in each turn; `@` stands for it."""

    def turn(role: str) -> Turn:
        return Turn(before.replace("@", role), after)

    return Format(
        name=name,
        system=turn("system"),
        user=turn("user"),
        assistant=turn("assistant"),
        opening=opening,
        stops=stops,
    )


FORMATS: tuple[Format, ...] = (
    _by_role(
        "<|im_start|>@\n",
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        "chatml",
        ("<|im_start|>", "<|im_end|>"),
    ),
    _by_role(
        "<|start_header_id|>@<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "llama3-instruct",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    _by_role("<|@|>\n", "</s>\n", "<|assistant|>\n", "zephyr", ("<|system|>", "</s>", "<|user|>")),
    _by_role("<|@|>\n", "<|end|>\n", "<|assistant|>\n", "phi-3", ("<|end|>", "<|system|>", "<|user|>")),
    _by_role("<start_@>", "<end_message>", "<start_assistant>", "alfred", ("<start_user>", "<end_message>")),
    Format(
        name="openchat",
        system=Turn("GPT4 Correct System: ", "<|end_of_turn|>"),
        user=Turn("GPT4 Correct User: ", "<|end_of_turn|>"),
        assistant=Turn("GPT4 Correct Assistant: ", "<|end_of_turn|>"),
        opening="GPT4 Correct Assistant:",
        stops=("<|end_of_turn|>",),
    ),
    Format(
        name="chatqa",
        system=Turn("System: ", "\n\n"),
        user=Turn("User: ", "\n\n"),
        assistant=Turn("Assistant: ", "\n\n"),
        opening="Assistant:",
        stops=("System:", "User:", "Assistant:"),
    ),
    Format(
        name="codellama-70b-instruct",
        system=Turn("Source: system\n\n ", " <step> "),
        user=Turn("Source: user\n\n ", " <step> "),
        assistant=Turn("Source: assistant\n\n ", " <step> "),
        opening="Source: assistant\nDestination: user\n\n ",
        stops=("Source:", "Destination:", "<step>"),
    ),
    Format(
        name="falcon-instruct",
        system=Turn("System: ", "\n"),
        user=Turn("User:\n", "\n"),
        assistant=Turn("Falcon:\n", "\n"),
        opening="Falcon:\n",
        stops=("User:", "Falcon:"),
    ),
    Format(
        name="granite-instruct",
        system=Turn("System:\n", "\n\n"),
        user=Turn("Question:\n", "\n\n"),
        assistant=Turn("Answer:\n", "\n\n"),
        opening="Answer:\n",
        stops=("System:", "Question:", "Answer:"),
    ),
    Format(
        name="solar-instruct",
        system=Turn("### System:\n", "\n\n"),
        user=Turn("### User:\n", "\n\n"),
        assistant=Turn("### Assistant:\n", "</s>\n\n"),
        opening="### Assistant:\n",
        stops=("### System:", "### User:", "### Assistant:"),
    ),
    Format(
        name="deepseek",
        system=Turn("", "\n\n"),
        user=Turn("User: ", "\n\n"),
        assistant=Turn("Assistant: ", "<｜end▁of▁sentence｜>"),  # noqa: RUF001 (the token is spelled so)
        opening="Assistant:",
        stops=("User:", "Assistant:"),
    ),
    Format(
        name="mistral-instruct",
        start="[INST] ",
        system=Turn("", "\n\n"),
        user=Turn("", "[/INST]"),
        assistant=Turn(" ", "</s>[INST] "),
        opening="",
        stops=("[INST]", "[/INST]"),
    ),
    Format(
        name="mixtral",
        system=Turn("", " "),
        system_place="inside",
        user=Turn("[INST] ", " [/INST]"),
        assistant=Turn(" ", ""),
        opening=" ",
        stops=("[INST]", "[/INST]"),
    ),
    Format(
        name="llama2-chat",
        start="[INST] ",
        system=Turn("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_place="inside",
        no_system="<<SYS>><</SYS>>\n\n",
        user=Turn("", " [/INST]"),
        assistant=Turn(" ", "</s><s>[INST] "),
        opening="",
        stops=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    Format(
        name="gemma-instruct",
        system=Turn("", "\n"),
        system_place="inside",
        user=Turn("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=Turn("<start_of_turn>model\n", "<end_of_turn>\n"),
        opening="<start_of_turn>model\n",
        stops=("<start_of_turn>", "<end_of_turn>"),
    ),
    Format(
        name="gemma3",
        system=Turn("<start_of_turn>user\n", "<end_of_turn>\n"),
        user=Turn("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=Turn("<start_of_turn>model\n", "<end_of_turn>\n"),
        opening="<start_of_turn>model\n",
        stops=("<end_of_turn>",),
    ),
    Format(
        name="gemma3-instruct",
        system=Turn("", "\n\n"),
        system_place="inside",
        user=Turn("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=Turn("<start_of_turn>model\n", "<end_of_turn>\n"),
        opening="<start_of_turn>model\n",
        stops=("<end_of_turn>",),
    ),
    Format(
        name="alpaca",
        system=Turn("", "\n\n"),
        system_place="before",
        user=Turn("### Instruction:\n", "\n\n"),
        assistant=Turn("### Response:\n", "\n\n"),
        opening="### Response:\n",
        stops=("### Instruction:", "### Response:"),
    ),
    Format(
        name="magicoder",
        system=Turn("", "\n\n"),
        system_place="before",
        user=Turn("@@ Instruction\n", "\n\n"),
        assistant=Turn("@@ Response\n", "\n\n"),
        opening="@@ Response\n",
        stops=("@@ Instruction", "@@ Response"),
    ),
    Format(
        name="starcoder2-instruct",
        system=Turn("", "\n\n"),
        system_place="before",
        user=Turn("### Instruction\n", "\n\n"),
        assistant=Turn("### Response\n", "<|endoftext|>\n\n"),
        opening="### Response\n",
        stops=("### Instruction", "### Response", "<|endoftext|>"),
    ),
    Format(
        name="vicuna",
        system=Turn("", "\n\n"),
        system_place="before",
        user=Turn("USER: ", "\n"),
        assistant=Turn("ASSISTANT: ", "</s>\n"),
        opening="ASSISTANT:",
        stops=("USER:", "ASSISTANT:"),
    ),
    Format(
        name="command-r",
        system=Turn("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        user=Turn("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        assistant=Turn("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        opening="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        stops=("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    ),
)
