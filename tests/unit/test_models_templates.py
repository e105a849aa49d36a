"""Which Go templates are known, and which twin they get. (Rendering: integration tests.)"""

from __future__ import annotations

import pytest

from ollama_distributed.models.templates import PASSTHROUGH, RAW, detect, of_a_model, refusal, twin
from ollama_distributed.models.templates.formats import FORMATS, Format
from ollama_distributed.models.templates.known import name_of, normalised

CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
GEMMA = """<start_of_turn>user
{{ if .System }}{{ .System }}
{{ end }}{{ .Prompt }}<end_of_turn>
<start_of_turn>model
{{ .Response }}<end_of_turn>
"""


@pytest.mark.parametrize(("template", "name"), [(CHATML, "chatml"), (GEMMA, "gemma-instruct")])
def test_usual_spellings_are_known(template: str, name: str) -> None:
    for spelling in (
        template,
        template.replace("\n", "\r\n"),
        f"\n{template}\n",
        template.replace("{{ ", "{{"),
    ):
        assert name_of(spelling) == name
        assert twin(spelling) == next(known for known in FORMATS if known.name == name).jinja()


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_a_formats_own_spellings_give_a_twin_that_renders_alike(known: Format) -> None:
    for spelling in known.go_spellings():
        found = next(one for one in FORMATS if one.name == name_of(spelling))
        assert (found.user, found.opening, found.system) == (known.user, known.opening, known.system)


def test_the_passthrough_has_the_raw_twin() -> None:
    assert twin(PASSTHROUGH) == twin("{{.Prompt}}") == RAW


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ range .Messages }}{{ .Content }}{{ end }}",
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{{ .Prompt",
        "{{ .Prompt }} {{ .Suffix }}",
        "{{ if .Tools }}x{{ end }}{{ .Prompt }}",
        "{{ if .System }}{{ .Prompt }}",
        "{{ .Prompt }}{{ end }}",
        "{{ if .System }}a{{ else }}b{{ else }}c{{ end }}",
        "{{ .Prompt | printf }}",
        '{{ if eq .System "x" }}a{{ end }}',
        "{{ if and }}a{{ end }}",
        "{{ if not .System .Prompt }}a{{ end }}",
        "{{ if (.System }}a{{ end }}",
        "{{ if }}a{{ end }}",
        "{{ }}",
        "{{ if .System }}" * 21 + "{{ end }}" * 21,
        "{{ if " + "(" * 21 + ".System" + ")" * 21 + " }}{{ end }}",
    ],
)
def test_anything_else_is_refused_and_the_refusal_says_what_to_do(template: str) -> None:
    assert twin(template) is None
    assert of_a_model(template) is None
    assert "Leave TEMPLATE out" in refusal(template)
    assert "chatml" in refusal(template)


@pytest.mark.parametrize(
    "template",
    [
        "hello",
        "{{ .Prompt }}!",
        CHATML.replace("assistant", "bot"),
        CHATML.replace("<|im_start|>user\n", "<|im_start|>user"),
    ],
)
def test_what_only_a_model_may_have(template: str) -> None:
    assert twin(template) is None, "a request's own is of a closed set"
    assert of_a_model(template)


def test_blanks_that_go_prints_are_kept_apart() -> None:
    assert normalised("a  b {{-  if   x }}\nc") == "a  b {{- if x }}\nc"


def test_stops_are_texts_that_the_template_writes() -> None:
    assert detect("x<|im_start|>y<|im_end|>") == ("chatml", ("<|im_start|>", "<|im_end|>"))
    assert detect("x<|im_start|>y") == ("chatml", ("<|im_start|>",))
    assert detect("{{ messages }}") == ("", ())
