"""Modelfiles and parameters: Ollama's quoting, types, and printed forms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.base.errors import Invalid, InvalidModel
from ollama_distributed.models import parameters
from ollama_distributed.models.modelfile import (
    Command,
    generated,
    parse,
    parse_commands,
    print_commands,
)
from ollama_distributed.models.spec import StoredMessage

FULL = '''
# a comment
FROM ./model.gguf
from projector.gguf
ADAPTER ./lora.gguf
PARAMETER temperature 0.7
parameter stop <|im_end|>
PARAMETER stop "two words"
PARAMETER num_ctx 4096
TEMPLATE """{{ .System }}
# not a comment
{{ .Prompt }}"""
SYSTEM """
You are "Mario".
"""
LICENSE """one"""
LICENSE two
MESSAGE user Is it raining?
MESSAGE assistant """yes:
no"""
REQUIRES v0.14.0
RENDERER qwen3
'''


def test_a_whole_modelfile() -> None:
    file = parse(FULL.replace("\n", "\r\n"))
    assert file.sources == ("./model.gguf", "projector.gguf")
    assert file.adapters == ("./lora.gguf",)
    assert file.parameters == {"temperature": 0.7, "stop": ["<|im_end|>", "two words"], "num_ctx": 4096}
    assert file.template == "{{ .System }}\n# not a comment\n{{ .Prompt }}"
    assert file.system == '\nYou are "Mario".\n'
    assert file.license == ("one", "two")
    assert file.messages == (
        StoredMessage("user", "Is it raining?"),
        StoredMessage("assistant", "yes:\nno"),
    )
    assert (file.requires, file.renderer) == ("0.14.0", "qwen3")


@pytest.mark.parametrize(
    ("source", "argument"),
    [
        ("FROM a", "a"),
        ("FROM  a  ", "a"),
        ("\tFROM\ta", "a"),
        ("\ufeffFROM a", "a"),
        ('FROM "a b"', "a b"),
        ('FROM """a\nb"""', "a\nb"),
        ('FROM "a\n b"', "a\n b"),
        ("FROM a # b", "a # b"),
        ("FROM a\u200bb", "ab"),
        ("FROM a'b", "a'b"),
        ('FROM ""', ""),
    ],
)
def test_quoting(source: str, argument: str) -> None:
    assert parse_commands(source) == [Command("from", argument)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no FROM line"),
        ("SYSTEM x", "no FROM line"),
        ("FROM a\nNOPE x", r"\(line 2\): command must be one of"),
        ("FROM", r"\(line 1\): FROM has no argument"),
        ('FROM a\nSYSTEM """x\ny', r"\(line 2\): quotes are opened"),
        ("FROM a\nMESSAGE tool x", r"\(line 2\): message role must be one of"),
        ("FROM a\nPARAMETER nope 1", "unknown parameter 'nope'"),
        ("FROM a\nPARAMETER top_k x", r"invalid int value \[x\] for parameter 'top_k'"),
        ("FROM a\nPARAMETER top_p nan", r"invalid float value \[nan\]"),
        ("FROM a\nPARAMETER use_mmap maybe", r"invalid bool value \[maybe\]"),
        ("FROM a\nPARAMETER stop", r"PARAMETER takes a name and a value"),
        ("FROM a\nPARAMETER st-op 1", r"PARAMETER takes a name and a value"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(source: str, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        parse(source)


def test_tabs_inside_an_argument_stay() -> None:
    assert parse_commands("FROM a\nMESSAGE\tuser\tone\ttwo")[1] == Command("message", "one\ttwo", "user")
    assert parse_commands('FROM a\nMESSAGE user "\t"')[1] == Command("message", "\t", "user")


def test_deprecated_parameters_are_dropped() -> None:
    assert parse("FROM a\nPARAMETER mirostat 2").parameters == {}


printable = st.text(
    st.characters(exclude_categories=["C", "Z"], include_characters=" \n\t"), max_size=60
).filter(lambda value: '"""' not in value and not value.endswith('"') and not value.startswith('"'))
commands = st.one_of(
    st.builds(Command, st.sampled_from(["license", "template", "system", "adapter", "parser"]), printable),
    st.builds(Command, st.just("message"), printable, st.sampled_from(["system", "user", "assistant"])),
    st.builds(Command, st.just("parameter"), printable, st.sampled_from(["stop", "temperature"])),
)


@settings(max_examples=500)
@given(st.lists(commands, max_size=6))
def test_what_is_printed_reads_back(rows: list[Command]) -> None:
    rows = [Command("from", "base"), *rows]
    assert parse_commands(print_commands(rows)) == rows


@given(st.text(max_size=300))
def test_any_text_is_a_modelfile_or_refused(source: str) -> None:
    try:
        parse(source)
    except InvalidModel:
        return


@pytest.mark.parametrize("end", ['"""', '"""  ', '""""""', '"', '"""\t'])
@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"])
def test_a_stored_text_never_becomes_a_command(end: str, line: str) -> None:
    """Whoever makes a model chooses its texts; whoever prints its Modelfile and uses it trusts them."""
    text = f'be "kind"{end}{line}FROM evil{line}PARAMETER num_ctx 1'
    shown = generated(display="x", weights=["/w"], system=text, licenses=[text])
    assert [command.name for command in parse_commands(shown)] == ["from", "system", "license"]
    assert parse(shown).system == text.replace("\r\n", "\n").replace("\r", "\n")


def test_quotes_that_are_closed_lines_later() -> None:
    source = 'FROM a\nSYSTEM """x  \n""\n\n y """  \nLICENSE "\n"\n'
    assert parse_commands(source)[1:] == [Command("system", 'x  \n""\n\n y '), Command("license", "\n")]


def test_the_generated_modelfile() -> None:
    shown = generated(
        display="x:latest",
        weights=["/blobs/sha256-1", "/blobs/sha256-2"],
        template="{{ .Prompt }}",
        system="be\nkind",
        options={"stop": ["a", "b"], "temperature": 0.5, "num_ctx": 4096},
        licenses=["free"],
        messages=[StoredMessage("user", "hi there")],
    )
    assert shown == (
        '# Modelfile generated by "ollama show"\n'
        "# To build a new Modelfile based on this, replace FROM with:\n"
        "# FROM x:latest\n\n"
        "FROM /blobs/sha256-1\n"
        "FROM /blobs/sha256-2\n"
        "TEMPLATE {{ .Prompt }}\n"
        'SYSTEM "be\nkind"\n'
        "PARAMETER num_ctx 4096\n"
        "PARAMETER stop a\n"
        "PARAMETER stop b\n"
        "PARAMETER temperature 0.5\n"
        "LICENSE free\n"
        "MESSAGE user hi there\n"
    )
    assert parse(shown).parameters == {"num_ctx": 4096, "stop": ["a", "b"], "temperature": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", "hot", 'option "temperature" must be of type float32'),
        ("num_ctx", "4k", 'option "num_ctx" must be of type integer'),
        ("num_ctx", True, 'option "num_ctx" must be of type integer'),
        ("num_ctx", float("inf"), 'option "num_ctx" must be of type integer'),
        ("use_mmap", 1, 'option "use_mmap" must be of type boolean'),
        ("stop", 5, 'option "stop" must be of type array'),
        ("stop", [5], 'option "stop" must be of an array of strings'),
        ("nope", 1, "unknown parameter 'nope'"),
    ],
)
def test_options_of_the_wrong_type_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        parameters.from_json({name: value})


def test_json_options_get_their_types() -> None:
    typed = parameters.from_json({"num_ctx": 4096.0, "temperature": 1, "stop": "x", "seed": None})
    assert typed == {"num_ctx": 4096, "temperature": 1.0, "stop": ["x"]}
    assert isinstance(typed["num_ctx"], int)
    assert isinstance(typed["temperature"], float)


def test_stored_options_of_other_versions_are_left_out_by_name() -> None:
    assert parameters.from_stored({"num_ctx": 1, "future": 2, "top_k": "x"}) == (
        {"num_ctx": 1},
        ["future", "top_k"],
    )


def test_parameter_lines_as_show_prints_them() -> None:
    assert parameters.lines({"stop": ["a\n", '"'], "temperature": 1.0, "num_ctx": 8}) == (
        "num_ctx                        8\n"
        'stop                           "a\\n"\n'
        'stop                           "\\""\n'
        "temperature                    1"
    )
