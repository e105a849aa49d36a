"""Texts of strangers that regular expressions search for ever: one request, or one model, would stop a node.

Each is as large as it may come; a search that goes back over it never ends.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.llamacpp import stderr
from ollama_distributed.base.errors import Invalid
from ollama_distributed.gateway.dialects.fields import image_from_uri, stops
from ollama_distributed.gateway.dialects.ollama_options import read_options
from ollama_distributed.gateway.dialects.options import keep_alive_s
from ollama_distributed.gateway.multipart import _BOUNDARY, _PARAMETER
from ollama_distributed.gateway.origins import SitePolicy, host_name
from ollama_distributed.models import parameters
from ollama_distributed.models.templates import known

MANY = 200_000


@pytest.mark.parametrize("part", ["a", "a/", ";a=", ";a=b"])
def test_an_image_that_is_no_image(part: str) -> None:
    with pytest.raises(Invalid):
        image_from_uri("image_url", "data:a" + part * MANY + ";base64")


def test_an_image_is_one_whatever_it_says_before() -> None:
    for head in ("data:image/png;base64,", "data:;base64,", "data:image/png;charset=x;a=b;base64,"):
        assert image_from_uri("image_url", head + "aGk=") == b"hi"


@pytest.mark.parametrize("part", ["1", "1.", "1s", "-"])
def test_a_duration_that_is_none(part: str) -> None:
    with pytest.raises(Invalid) as told:
        keep_alive_s(part * MANY)
    assert len(told.value.message) < 400


@pytest.mark.parametrize("part", [" ", "{{ ", "{{-", "{{ a ", "- "])
def test_a_template_of_braces_and_blanks(part: str) -> None:
    text = "{{" + part * MANY
    for whole in (text, text + "b }}"):
        assert known.name_of(whole) is None
        assert known.twin(whole) is None
        assert known.refusal(whole)
        assert known.normalised(whole[: known.LONGEST])


@given(st.lists(st.sampled_from(["{{", "}}", "-", " ", "\n", "a", "\r\n"]), max_size=10).map("".join))
def test_blanks_in_actions_are_one_and_nothing_else_changes(text: str) -> None:
    once = known.normalised(text)
    assert known.normalised(once) == once
    assert "".join(once.split()) == "".join(text.split())


@pytest.mark.parametrize("part", ["a", "a/", "/", "a.", "x.cpp:", "a "])
def test_the_last_words_of_a_runner(part: str) -> None:
    assert len(stderr.reason("error: " + part * stderr.TAIL_BYTES)) <= stderr.MAX_REASON_CHARS


def test_a_path_in_the_last_words_is_cut() -> None:
    assert stderr.reason("GGML_ASSERT at /home/me/llama.cpp/src/x.cpp:12 of a/b.h:3") == (
        "GGML_ASSERT at x.cpp:12 of b.h:3"
    )


@pytest.mark.parametrize(
    "search",
    [
        lambda: _PARAMETER.findall('form-data; name="' + '\\"' * 4096),
        lambda: _PARAMETER.findall("; " * 4096),
        lambda: _BOUNDARY.search(";" + " " * 16_384),
        lambda: host_name("a." * 8192 + "!"),
        lambda: SitePolicy().allows_origin("http://" + "a" * 16_384 + ":", "x"),
    ],
    ids=["escapes", "semicolons", "boundary", "host", "origin"],
)
def test_what_headers_may_hold(search: Callable[[], object]) -> None:
    assert not search()


LONG = "a" * parameters.MAX_STOPS_CHARS


@pytest.mark.parametrize("texts", [["x"] * 65, [LONG + "b"], [LONG[:2100] + "b", LONG[:2100] + "c"]])
def test_stop_texts_that_every_token_would_be_compared_with(texts: list[str]) -> None:
    """Of 64 with 20,000 letters each, a token took the loop four seconds."""
    for read in (
        lambda: read_options({"stop": texts}),
        lambda: stops("stop", texts),
        lambda: parameters.from_text([("stop", text) for text in texts]),
        lambda: parameters.from_json({"stop": texts}),
    ):
        with pytest.raises(Invalid):
            read()
    assert parameters.from_stored({"stop": texts}) == ({}, ["stop"])  # of a model from elsewhere
    assert stops("stop", [LONG]) == (LONG,)
    assert read_options({"stop": [LONG]})[0].stop == (LONG,)
