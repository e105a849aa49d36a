"""OpenAI completions, embeddings and model lists."""

from __future__ import annotations

import base64
import json
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._models import construct_type
from openai.types import Completion, CreateEmbeddingResponse, Model

from ollama_distributed.base.errors import Invalid, RunnerDied
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    Delta,
    EmbedResult,
    Event,
    Failed,
    Finished,
    Opened,
    TextPrompt,
    TokenLogprob,
    TokensPrompt,
    TopLogprob,
    Usage,
)
from ollama_distributed.gateway.dialects.contract import Embed, Generate, RequestContext
from ollama_distributed.gateway.dialects.openai_completions import parse_completion
from ollama_distributed.gateway.dialects.openai_embeddings import parse_embeddings
from ollama_distributed.gateway.dialects.openai_models import render_model, render_models

CONTEXT = RequestContext(request_id=RequestId("r1"), identity=Identity("local"), now=1_700_000_000.5)
USAGE = Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=5)


def parse(**fields: Any) -> Generate:
    return parse_completion(json.dumps({"model": "m", "prompt": "Once"} | fields).encode(), CONTEXT)


def embed(**fields: Any) -> Embed:
    return parse_embeddings(json.dumps({"model": "m"} | fields).encode(), CONTEXT)


def rows(stream: bytes) -> list[Any]:
    *blocks, done = stream.decode().split("\n\n")[:-1]
    assert done == "data: [DONE]"
    # As the client does: it builds without validation, since chunks have no finish_reason yet.
    return [construct_type(type_=Completion, value=json.loads(block[len("data: ") :])) for block in blocks]


# ── completions ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [TextPrompt(text="a")]),
        (["a", "b"], [TextPrompt(text="a"), TextPrompt(text="b")]),
        ([1, 2], [TokensPrompt(ids=(1, 2))]),
        ([[1], [2, 3]], [TokensPrompt(ids=(1,)), TokensPrompt(ids=(2, 3))]),
        (["a", [1]], [TextPrompt(text="a"), TokensPrompt(ids=(1,))]),
    ],
)
def test_prompts(prompt: object, expected: list[object]) -> None:
    asked = parse(prompt=prompt).requests
    assert [request.prompt for request in asked] == expected
    assert len({request.request_id for request in asked}) == len(asked)


def test_n_of_each_prompt() -> None:
    asked = parse(prompt=["a", "b"], n=2, seed=1, best_of=2).requests
    assert [(r.prompt, r.sampling.seed) for r in asked] == [
        (TextPrompt(text="a"), 1),
        (TextPrompt(text="a"), 2),
        (TextPrompt(text="b"), 1),
        (TextPrompt(text="b"), 2),
    ]


def test_suffix_raw_and_defaults() -> None:
    request = parse(suffix="end", raw=True, max_tokens=3, logprobs=2).requests[0]
    assert request.prompt == TextPrompt(text="Once", suffix="end", raw=True)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.num_predict) == (
        1.0,
        1.0,
        3,
    )
    assert (request.logprobs, request.top_logprobs) == (True, 2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1]}, "echo"),
        ({"suffix": "x", "prompt": [1]}, "suffix"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_a_whole_completion_with_logprobs_and_usage_per_prompt() -> None:
    call = parse(prompt=["a", "b"], n=2, logprobs=1)
    token = TokenLogprob("xy", -1.0, b"xy", (TopLogprob("q", -2.0, b"q"),))
    out = b""
    for index in range(4):
        out += call.encoder.feed(index, Delta(text="xyxy", logprobs=(token, token)))
        out += call.encoder.feed(index, Finished(reason="stop", usage=USAGE))
    answer = Completion.model_validate_json(out, strict=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["xy", "xy"]
    assert logprobs.text_offset == [0, 2]
    assert logprobs.top_logprobs == [{"q": -2.0, "xy": -1.0}] * 2, "what was drawn is always among them"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 20)


def test_text_offsets_run_on_through_a_stream() -> None:
    call = parse(stream=True, logprobs=0)
    token = TokenLogprob("xy", -1.0, b"xy")
    out = b"".join(call.encoder.feed(0, Delta(text="xy", logprobs=(token,))) for _ in range(3))
    found = [json.loads(block[6:])["choices"][0]["logprobs"] for block in out.decode().split("\n\n")[:-1]]
    assert [row["text_offset"] for row in found] == [[0], [2], [4]]
    assert found[0]["top_logprobs"] is None


@settings(deadline=None)  # a busy machine is not a defect
@given(
    st.lists(st.builds(Delta, text=st.text(max_size=6), thinking=st.text(max_size=3)), max_size=8),
    st.sampled_from(["stop", "length"]),
    st.booleans(),
)
def test_stream_and_whole_agree(deltas: list[Delta], reason: Any, echo: bool) -> None:
    events: list[Event] = [Opened(), *deltas, Finished(reason=reason, usage=USAGE)]
    body = parse(echo=echo).encoder
    whole = Completion.model_validate_json(b"".join(body.feed(0, event) for event in events), strict=True)
    stream = parse(echo=echo, stream=True, stream_options={"include_usage": True}).encoder
    sent = b"".join(stream.feed(0, event) for event in events)
    assert sent.count(b'"usage":null') == sent.count(b"data: {") - 1, "all chunks but the last"
    *chunks, last = rows(sent)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.choices[0].text == ("Once" if echo else "") + "".join(delta.text for delta in deltas)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage


def test_a_failure_ends_the_stream() -> None:
    call = parse(stream=True)
    out = call.encoder.feed(0, Delta(text="a")) + call.encoder.feed(0, Failed(RunnerDied("gone")))
    assert json.loads(out.decode().split("\n\n")[1][6:])["error"]["code"] == "runner_died"
    assert call.encoder.feed(0, Delta(text="late")) == b""


# ── embeddings ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given_input", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2]], ((1,), (2,)))],
)
def test_embedding_inputs(given_input: object, expected: tuple[object, ...]) -> None:
    request = embed(input=given_input, dimensions=8, options={"num_ctx": 64}, keep_alive=-1).request
    assert request.inputs == expected
    assert (request.dimensions, request.options.num_ctx, request.keep_alive_s) == (8, 64, -1)


@settings(deadline=None)  # a busy machine is not a defect
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_both_encodings_carry_the_same_numbers(vector: list[float]) -> None:
    result = EmbedResult(vectors=(tuple(vector),), usage=Usage(prompt_tokens=4))
    plain = CreateEmbeddingResponse.model_validate_json(embed(input="a").encode(result), strict=True)
    assert plain.data[0].embedding == vector
    assert plain.usage.total_tokens == 4
    packed = json.loads(embed(input="a", encoding_format="base64").encode(result))["data"][0]["embedding"]
    numbers = array("f")
    numbers.frombytes(base64.b64decode(packed))
    assert list(numbers) == vector


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": 5}, "input"),
    ],
)
def test_embedding_refusals(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as caught:
        embed(**fields)
    assert caught.value.param == param


# ── models ──────────────────────────────────────────────────────────────────────────


def test_model_lists() -> None:
    listed = json.loads(render_models([("a:latest", 12.9, "library"), ("b", 1, "me")]))
    assert listed["object"] == "list"
    first, _ = [Model.model_validate(row, strict=True) for row in listed["data"]]
    assert (first.id, first.created, first.owned_by) == ("a:latest", 12, "library")
    assert json.loads(render_model("a:latest", 12.9, "library")) == listed["data"][0]
    assert json.loads(render_models([])) == {"object": "list", "data": []}
