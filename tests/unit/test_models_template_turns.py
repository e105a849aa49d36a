"""Go templates of one turn in Jinja, against Ollama's `Execute`, read anew."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.models.templates import of_a_model
from ollama_distributed.models.templates.turns import translated

Said = tuple[str, str]
SYSTEM, HI = ("system", "Be kind."), ("user", "Hi")
HELLO, BYE = ("assistant", "Hello!"), ("user", "Bye")
TALKS: dict[str, Sequence[Said]] = {
    "prompt": (HI,),
    "system": (SYSTEM, HI),
    "turns": (SYSTEM, HI, HELLO, BYE),
    "late system": (HI, HELLO, SYSTEM, BYE),
    "two of a role": (SYSTEM, ("system", "Be short."), HI, ("user", "Ho"), HELLO, ("assistant", "Ha"), BYE),
    "tool": (HI, HELLO, ("tool", "sunny"), BYE),
}


def rendered(template: str, talk: Sequence[Said]) -> str:
    jinja = translated(template)
    assert jinja is not None
    messages = [{"role": role, "content": text} for role, text in talk]
    return jinja2.Environment().from_string(jinja).render(messages=messages, add_generation_prompt=True)


def executed(turn: str, opened: str, talk: Sequence[Said]) -> str:
    """Ollama's loop: `turn` is the template in Python's braces, `opened` what stands before the response."""
    joined: list[list[str]] = []
    for role, text in talk:
        if joined and joined[-1][0] == role != "tool":
            joined[-1][1] += "\n\n" + text
        else:
            joined.append([role, text])
    said, held = "", {"system": "", "user": "", "assistant": ""}
    for role, text in joined:
        if (role == "system" and (held["user"] or held["assistant"])) or (
            role == "user" and held["assistant"]
        ):
            said += turn.format(**held)
            held = dict.fromkeys(held, "")
        if role in held:
            held[role] = text
    return said + opened.format(**held)


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_turns_are_rendered_as_ollama_does(talk: Sequence[Said]) -> None:
    template = "S:{{ .System }} U:{{ .Prompt }} A:{{ .Response }};\n"
    assert rendered(template, talk) == executed(
        "S:{system} U:{user} A:{assistant};\n", "S:{system} U:{user} A:{assistant}", talk
    )


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_a_template_without_a_response_ends_with_it(talk: Sequence[Said]) -> None:
    expected = executed("<{user}>{assistant}", "<{user}>{assistant}", talk)
    assert rendered("<{{ .Prompt }}>", talk) == expected


@pytest.mark.parametrize(
    ("template", "prompt", "both"),
    [
        ("Template", "Template", "Template"),
        ("{{ if .System }}[{{ .System }}]{{ end }}{{ .Prompt }}!", "Hi!", "[Be kind.]Hi!"),
        ("{{ if .System }}a{{ else }}b{{ end }}", "b", "a"),
        ("{{ if .Response }}r{{ else if .System }}s{{ else }}p{{ end }}", "p", "s"),
        ("{{ if and .System .Prompt }}both{{ end }}", "", "both"),
        ("{{ if or .System (not .Prompt) }}yes{{ else }}no{{ end }}", "no", "yes"),
        ("{{ if not (and .System .Prompt) }}one{{ end }}", "one", ""),
        ("a \n{{- .Prompt -}}\n b", "aHib", "aHib"),
        ("a {{.Prompt}} b\r\n", "a Hi b\n", "a Hi b\n"),
        ("'{{ .Prompt }}' \\n }} {# x", "'Hi' \\n }} {# x", "'Hi' \\n }} {# x"),
        ("{{ .Prompt }}A:{{ .Response }}<end>", "HiA:", "HiA:"),
        ("{{ if .Prompt }}{{ .Prompt }}>{{ .Response }}<{{ end }}<<", "Hi>", "Hi>"),
    ],
)
def test_what_go_makes_of_one_turn(template: str, prompt: str, both: str) -> None:
    assert rendered(template, (HI,)) == prompt
    assert rendered(template, (SYSTEM, HI)) == both


def test_what_is_neither_known_nor_jinja_is_translated() -> None:
    assert of_a_model("{{ .Prompt }}!") == translated("{{ .Prompt }}!")
    assert of_a_model("{% for message in messages %}{{ .Prompt }}{% endfor %}") is None


@given(st.text(alphabet="{}-%#'\\ \n.aSystemPrompt", max_size=40))
def test_any_text_is_read_or_not_and_what_is_read_can_be_rendered(template: str) -> None:
    if translated(template) is not None:
        rendered(template, (SYSTEM, HI))
