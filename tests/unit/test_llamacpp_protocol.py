"""What we send to llama-server and what we make of its events."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.llamacpp.binary import argv, files_of, flags_in
from ollama_distributed.adapters.engines.llamacpp.chat import (
    ChatStream,
    calls_schema,
    chat_body,
    message_value,
    parse_calls,
    template_body,
)
from ollama_distributed.adapters.engines.llamacpp.enforced import EnforcedCalls, WantedCalls
from ollama_distributed.adapters.engines.llamacpp.guidance import closed
from ollama_distributed.adapters.engines.llamacpp.launch import (
    RUNNER_ENVIRONMENT,
    RunnerParams,
    runner_params,
    scrubbed,
)
from ollama_distributed.adapters.engines.llamacpp.program import binary_version, instruction_set
from ollama_distributed.adapters.engines.llamacpp.protocol import (
    completion_body,
    error_of_body,
    metric,
    prompt_value,
)
from ollama_distributed.adapters.engines.llamacpp.schema import check_schema
from ollama_distributed.adapters.engines.llamacpp.stderr import Tail, reason
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream
from ollama_distributed.adapters.engines.llamacpp.vocabulary import Fragments, ends_incomplete, fragments_of
from ollama_distributed.base.errors import (
    ContextExceeded,
    EngineError,
    Invalid,
    LoadFailed,
    OllamaDistributedError,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.inference import (
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    Sampling,
    Tool,
    ToolCall,
)
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, Progress, Tokens
from ollama_distributed.models.spec import Architecture, ModelSpec
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, LoadPlan

# ── the allow-list (security table S-13) ────────────────────────────────────────────

ALLOWED = {
    *("prompt", "stream", "return_progress", "return_tokens", "cache_prompt", "samplers", "n_probs"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_last_n", "repeat_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "n_predict", "n_keep", "logit_bias"),
    *("ignore_eos", "json_schema", "grammar", "input_prefix", "input_suffix"),
}
ALLOWED_CHAT = (ALLOWED - {"prompt", "n_predict", "return_tokens", "n_probs"}) | {
    *("messages", "tools", "max_tokens", "stream_options", "parallel_tool_calls", "response_format"),
    *("logprobs", "top_logprobs", "chat_template_kwargs", "add_generation_prompt"),
}
ALWAYS = {"stream": True, "return_progress": True, "cache_prompt": True}

number = st.none() | st.floats(-1e6, 1e6)
count = st.none() | st.integers(-5, 10**7)
samplings = st.builds(
    Sampling,
    temperature=number,
    top_k=count,
    top_p=number,
    min_p=number,
    typical_p=number,
    repeat_last_n=count,
    repeat_penalty=number,
    presence_penalty=number,
    frequency_penalty=number,
    seed=count,
    num_predict=count,
    num_keep=count,
    logit_bias=st.none() | st.dictionaries(st.integers(0, 99).map(str), st.floats(-200, 200)),
    ignore_eos=st.none() | st.booleans(),
)
prompts = st.text() | st.lists(st.integers(0, 99)).map(tuple) | st.lists(
    st.text() | st.lists(st.integers(0, 99)).map(tuple)
).map(tuple)  # fmt: skip
schemas = st.sampled_from([JsonObject(), JsonSchema({}), JsonSchema({"type": "string"}), None])
tops = st.none() | st.integers(0, 20)


@given(st.builds(CompletionRequest, prompt=prompts, sampling=samplings, format=schemas, top_logprobs=tops))
def test_a_completion_says_nothing_but_what_is_allowed(request: CompletionRequest) -> None:
    """S-13, CVE-2026-107183."""
    body = completion_body(request, context_tokens=4096)
    assert set(body) <= ALLOWED
    assert ALWAYS.items() <= body.items()
    assert body["return_tokens"] is True
    msgspec.json.decode(msgspec.json.encode(body))
    assert 0 <= body.get("repeat_last_n", 0) <= 4096
    assert body.get("n_predict", -1) >= -1


names = st.text(min_size=1, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.dictionaries(names, v)
)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=st.text(),
    images=st.lists(st.binary(max_size=5), max_size=2).map(tuple),
    thinking=st.text(),
    tool_calls=st.lists(st.builds(ToolCall, id=names, name=names, arguments=names), max_size=2).map(tuple),
)
tools = st.builds(Tool, name=names, description=st.text(), parameters=st.dictionaries(names, values))


@settings(max_examples=40)
@given(
    st.builds(
        ChatRequest,
        messages=st.lists(messages, max_size=3).map(tuple),
        tools=st.lists(tools, max_size=3).map(tuple),
        tool_choice=st.sampled_from(["auto", "none"]),
        sampling=samplings,
        format=schemas,
        think=st.sampled_from([None, True, False, "low", "max"]),
        top_logprobs=tops,
    )
)
def test_a_chat_says_nothing_but_what_is_allowed(request: ChatRequest) -> None:
    if request.tools and request.tool_choice != "none" and request.top_logprobs is not None:
        with pytest.raises(Unsupported, match="logprobs"):
            chat_body(request, context_tokens=4096)
        return
    body = chat_body(request, context_tokens=4096)
    assert set(body) <= ALLOWED_CHAT
    assert ALWAYS.items() <= body.items()
    assert ("tools" in body) == (request.tool_choice != "none" and bool(request.tools))
    msgspec.json.encode(body)


@given(st.lists(st.text() | st.lists(st.integers(0, 99), min_size=1).map(tuple)).map(tuple))
def test_a_mixed_prompt_never_looks_like_several(prompt: tuple[str | tuple[int, ...], ...]) -> None:
    value = prompt_value(prompt)
    if isinstance(value, list):
        assert any(isinstance(part, int) for part in value)
        assert [p for p in value if isinstance(p, int)] == [
            i for p in prompt if isinstance(p, tuple) for i in p
        ]
    text = value if isinstance(value, str) else "".join(p for p in value if isinstance(p, str))
    assert text == "".join(p for p in prompt if isinstance(p, str))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=math.nan),
        Sampling(top_p=math.inf),
        Sampling(logit_bias={"a": 1.0}),
        Sampling(logit_bias={"1": math.nan}),
        Sampling(logit_bias={"-1": 1.0}),
    ],
)
def test_a_value_that_json_or_the_engine_cannot_take_is_refused(sampling: Sampling) -> None:
    with pytest.raises(Invalid):
        completion_body(CompletionRequest(prompt="x", sampling=sampling), context_tokens=64)


def test_fill_in_the_middle_and_images_have_their_own_shapes() -> None:
    middle = completion_body(CompletionRequest(prompt="a", suffix="b"), context_tokens=64)
    assert (middle["input_prefix"], middle["input_suffix"], middle["prompt"]) == ("a", "b", "")
    seen = completion_body(CompletionRequest(prompt="<m>", images=(b"png",)), context_tokens=64)
    assert seen["prompt"] == {"prompt_string": "<m>", "multimodal_data": ["cG5n"]}
    with pytest.raises(Invalid):
        completion_body(CompletionRequest(prompt=(1, 2), suffix="b"), context_tokens=64)
    with pytest.raises(Invalid):
        completion_body(CompletionRequest(prompt=(1, 2), images=(b"png",)), context_tokens=64)


def test_thinking_and_images_in_messages() -> None:
    body = template_body((Message(role="user", content="hi", images=(b"x",)),), think="max")
    assert body["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "high"}
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/")
    assert text == {"type": "text", "text": "hi"}
    answer = message_value(Message(role="tool", content="3", tool_name="add", tool_call_id="c1"))
    assert (answer["name"], answer["tool_call_id"]) == ("add", "c1")


# ── events of a completion ──────────────────────────────────────────────────────────


def chunk(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


def test_progress_tokens_and_the_end() -> None:
    stream = CompletionStream(top_logprobs=1)
    progress = {"total": 4, "cache": 1, "processed": 4, "time_ms": 3}
    assert stream.feed(chunk(content="", tokens=[0], prompt_progress=progress)) == [Progress(4, 4, 1)]
    top = {"id": 7, "token": "a", "bytes": [97], "logprob": -3.4e38}
    probability = {"id": 7, "token": "a", "bytes": [97], "logprob": None, "top_logprobs": [top, top]}
    (event,) = stream.feed(
        chunk(content="a", tokens=[7], tokens_predicted=1, completion_probabilities=[probability])
    )
    assert isinstance(event, Tokens)
    assert (event.ids, event.text) == ((7,), "a")
    assert event.logprobs[0].logprob == event.logprobs[0].top[0].logprob == -9999.0
    assert len(event.logprobs[0].top) == 1
    assert stream.feed(chunk(content="", tokens=[2], tokens_predicted=2)) == []  # held: it may be the end
    timings = {"cache_n": 1, "prompt_ms": 1500.0, "predicted_ms": 500.0}
    (done,) = stream.feed(
        chunk(stop=True, stop_type="eos", tokens_predicted=2, tokens_evaluated=4, timings=timings)
    )
    assert done == Done(
        reason="stop", prompt_tokens=4, cached_tokens=1, completion_tokens=2, prompt_s=1.5, completion_s=0.5
    )
    assert stream.feed(b"[DONE]") == []


def test_a_silent_token_that_is_not_the_end_is_given_out() -> None:
    stream = CompletionStream()
    stream.feed(chunk(content="", tokens=[5], tokens_predicted=1))
    assert stream.feed(chunk(content="x", tokens=[6], tokens_predicted=2)) == [Tokens((5, 6), "x")]
    stream.feed(chunk(content="", tokens=[7], tokens_predicted=3))
    tokens, done = stream.feed(chunk(stop=True, stop_type="limit", tokens_predicted=3))
    assert tokens == Tokens((7,), "")
    assert isinstance(done, Done)
    assert done.reason == "length"


def event(**fields: Any) -> bytes:
    return b"data: " + chunk(**fields) + b"\n\n"


def test_the_short_way_reads_tokens_as_the_long_one_does() -> None:
    plain: list[dict[str, Any]] = [
        {"index": 0, "content": "a", "tokens": [7], "stop": False, "tokens_predicted": 1},
        {"index": 0, "content": "é\n", "tokens": [9], "stop": False, "tokens_predicted": 2},
    ]
    both, short, long = CompletionStream(), CompletionStream(), CompletionStream()
    for fields in plain:
        assert short.tokens(event(**fields), True) == long.feed(chunk(**fields))
    together = b"".join(event(**fields) for fields in plain)
    assert both.tokens(together, True) == [Tokens((7, 9), "aé\n")]
    assert CompletionStream().tokens(together, False) == [Tokens((7,), "a"), Tokens((9,), "é\n")]
    last, next_ = plain[-1] | {"tokens_predicted": 3}, plain[-1] | {"tokens_predicted": 4}
    changes: tuple[dict[str, Any], ...] = (
        {"content": ""},
        {"tokens": []},
        {"tokens": [1, 2]},
        {"tokens_predicted": 4},  # a token was kept back
        {"stop": True},
        {"completion_probabilities": [{"token": "a"}]},
        {"prompt_progress": {"total": 1, "processed": 1}, "content": ""},
    )
    for other in (
        b"data: " + chunk(**last) + b"\n",  # not complete
        event(**last)[:-1] + event(**next_),  # one event of two lines
        event(**last) + event(**last),
        b"data: [DONE]\n\n",
        b": comment\n\n",
        *(event(**(last | changed)) for changed in changes),
        *(event(**last) + event(**(next_ | changed)) for changed in changes[:3]),
        event(**last) + event(stop=True, stop_type="eos", tokens_predicted=3),
        event(**last) + b"data: [DONE]\n\n",
        event(**last).replace("é".encode(), b"\xff"),
        event(error={"message": "boom"}),
    ):
        for joins in (False, True):
            assert short.tokens(other, joins) is None
    assert short.tokens(event(**last) + event(**next_), True) == [Tokens((9, 9), "é\né\n")]
    assert CompletionStream(stop_at_tokens=9).tokens(event(**plain[0]), True) is None
    held = CompletionStream()
    held.feed(chunk(content="", tokens=[5], tokens_predicted=1))
    assert held.tokens(event(content="x", tokens=[6], tokens_predicted=2), True) is None


def test_a_context_that_must_not_slide_ends_the_answer() -> None:
    stream = CompletionStream(stop_at_tokens=10)
    assert len(stream.feed(chunk(content="a", tokens=[1], tokens_predicted=1, tokens_evaluated=7))) == 1
    _, done = stream.feed(chunk(content="b", tokens=[1], tokens_predicted=2, tokens_evaluated=7))
    assert isinstance(done, Done)
    assert (done.reason, done.completion_tokens) == ("length", 2)


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b'{"tokens":"x"}', b'{"content":1}', b"\xff", b'{"error":{"message":"\xff"}}'],
)
def test_an_event_of_another_protocol_is_an_error(data: bytes) -> None:
    for stream in (CompletionStream(), ChatStream(), EnforcedCalls()):
        try:
            stream.feed(data)
        except EngineError:
            continue
        assert data == b'{"tokens":"x"}' or data == b'{"content":1}'  # unknown fields of a chat


def test_an_error_in_the_stream_ends_it() -> None:
    for stream in (CompletionStream(), ChatStream(), EnforcedCalls()):
        (event,) = stream.feed(chunk(error={"code": 500, "message": "boom", "type": "server_error"}))
        assert isinstance(event, EngineFailed)
        assert event.error.message == "boom"


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 8}, ContextExceeded),
        (
            500,
            {
                "type": "server_error",
                "message": "input (600 tokens) is too large to process. increase the physical batch size "
                "(current batch size: 512)",
            },
            ContextExceeded,
        ),
        (400, {"type": "invalid_request_error", "message": "m"}, Invalid),
        (500, {"type": "server_error", "message": '"json_schema": bad'}, Invalid),
        (501, {"type": "not_supported_error", "message": "m"}, Unsupported),
        (500, {"type": "server_error", "message": "image input is not supported - hint: x"}, Unsupported),
        (503, {"type": "unavailable_error", "message": "m"}, Unavailable),
        (401, {"type": "authentication_error", "message": "m"}, EngineError),
        (500, {}, EngineError),
    ],
)
def test_error_bodies(status: int, error: dict[str, Any], kind: type[OllamaDistributedError]) -> None:
    found = error_of_body(status, chunk(error=error))
    assert type(found) is kind
    if isinstance(found, ContextExceeded):
        assert found.prompt_tokens > found.context_tokens > 0
    assert type(error_of_body(status, b"<html>")) is EngineError


def test_metrics_text() -> None:
    text = "# HELP x\nllamacpp:predicted_tokens_seconds 12.5\nllamacpp:n nan-ish\n"
    assert metric(text, "predicted_tokens_seconds") == 12.5
    assert metric(text, "absent") == metric(text, "n") == 0.0


# ── tokens that the server withholds ────────────────────────────────────────────────

BYTES = {1000 + b: bytes([b]) for b in range(0x80, 0x100)}
MERGES = {5000: b" \xf0\x9f", 5001: b"\xf0\x9f", 5002: b"\x98\x80", 5003: b"\x9f\x98"}


@given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=1))
def test_byte_tokens_of_any_character_are_found(character: str) -> None:
    raw = character.encode()
    *withheld, last = (1000 + b for b in raw)
    assert Fragments(BYTES).withheld(len(withheld), character, last) == tuple(withheld)


def test_merged_pieces_are_found_in_the_order_of_their_merges() -> None:
    fragments = Fragments(BYTES | MERGES)
    assert fragments.withheld(1, " \U0001f600", 5002) == (5000,)
    assert fragments.withheld(1, "\U0001f600", 5002) == (5001,)
    # `f0 9f | 98` and `f0 | 9f 98` are both two tokens: the earlier merge wins
    assert fragments.withheld(2, "\U0001f600", 1000 + 0x80) == (5001, 1000 + 0x98)


def test_what_cannot_be_known_is_not_guessed() -> None:
    fragments = Fragments(BYTES)
    assert fragments.withheld(2, "\U0001f600", 1000 + 0x80) is None  # three are missing, not two
    assert fragments.withheld(1, "\ufffd", 1000 + 0x80) is None
    assert fragments.withheld(3, "\U0001f600", 42) is None
    assert fragments.withheld(10**6, "\U0001f600", 1000 + 0x80) is None
    stream = CompletionStream(fragments=fragments)
    (event,) = stream.feed(chunk(content="\ufffd", tokens=[7], tokens_predicted=3))
    assert event == Tokens((7,), "\ufffd")


@pytest.mark.parametrize("faces", [200, 20_000])
def test_a_vocabulary_made_to_be_searched_for_ever(faces: int) -> None:
    """S-03: sixty tokens at each cut, eight cuts, and no end to the ways of writing a text with them."""
    face = "\U0001f600".encode()
    pieces = {count: (face[3:] + face[:3]) * count for count in range(1, 61)}
    fragments = Fragments(pieces | {1000: face[3:], 2000: face[:3]})
    assert fragments.withheld(8, "\U0001f600" * faces, 1000) is None
    assert fragments.withheld(1, "\U0001f600", 1000) == (2000,), "what can be found still is"


def test_pieces_of_both_kinds_of_vocabulary() -> None:
    assert fragments_of("llama", ["<unk>", "<0xF0>", "<0x41>", "\u2581a", "<0x9F>#3"], [2, 6, 6, 1, 6]) == {
        1: b"\xf0",
        4: b"\x9f",
    }
    # GPT-2 writes bytes as printable characters: `Ġ` is a space, `ð` 0xF0, `Ł` 0x9F, `é` 0xE9.
    assert fragments_of(
        "gpt2", ["a", "\u0120a", "\u0120\u00f0\u0141", "\u00c3\u00a9", "\u4e2d"], [1] * 5
    ) == {2: b" \xf0\x9f"}


@given(st.binary(max_size=6))
def test_incomplete_is_what_the_server_means(data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as exc:
        cut = exc.reason == "unexpected end of data"
        assert not cut or ends_incomplete(data)
    else:
        assert not ends_incomplete(data)


# ── tool calls ──────────────────────────────────────────────────────────────────────

ADD = Tool(
    name="add",
    parameters={
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/n"}},
        "$defs": {"n": {"type": "integer"}},
    },
)
STOP = Tool(name="stop")


def chat(choice: Any, *, parallel: bool = True) -> ChatRequest:
    return ChatRequest(messages=(), tools=(ADD, STOP), tool_choice=choice, parallel_tool_calls=parallel)


def test_the_schema_of_a_required_tool_follows_its_references() -> None:
    schema = calls_schema(chat("required"))
    assert schema["$defs"]["tool0"]["properties"]["x"]["$ref"] == "#/$defs/tool0/$defs/n"
    assert schema["minItems"] == 1
    check_schema(schema)
    named = calls_schema(chat(NamedTool("stop")))
    assert named["properties"]["name"] == {"const": "stop"}
    assert calls_schema(chat("required", parallel=False))["anyOf"]


def test_a_tool_that_is_not_there_cannot_be_required() -> None:
    with pytest.raises(Invalid, match="'nope'"):
        calls_schema(chat(NamedTool("nope")))
    with pytest.raises(Invalid):
        calls_schema(msgspec.structs.replace(chat("required"), tools=()))


def test_enforced_calls_come_whole_before_the_end() -> None:
    stream = EnforcedCalls()
    assert stream.feed(chunk(content='[{"name":"add",', tokens=[1], tokens_predicted=1)) == []
    assert stream.feed(chunk(content='"arguments":{"x":1}}]', tokens=[2], tokens_predicted=2)) == []
    delta, done = stream.feed(chunk(stop=True, stop_type="eos", tokens_predicted=2))
    assert isinstance(delta, ChatDelta)
    (call,) = delta.tool_calls
    assert (call.name, call.arguments) == ("add", '{"x":1}')
    assert call.id
    assert isinstance(done, Done)
    assert done.reason == "tool_calls"


def test_enforced_calls_that_are_cut_off() -> None:
    stream = EnforcedCalls()
    stream.feed(chunk(content='{"name":', tokens=[1], tokens_predicted=1))
    (done,) = stream.feed(chunk(stop=True, stop_type="limit", tokens_predicted=1))
    assert isinstance(done, Done)
    assert done.reason == "length"
    with pytest.raises(EngineError):
        parse_calls('{"name":', lambda: "c")


def test_a_chat_stream_with_thoughts_and_calls() -> None:
    stream = ChatStream()

    def delta(finish: str | None = None, **fields: Any) -> bytes:
        return chunk(choices=[{"delta": fields, "finish_reason": finish}])

    assert stream.feed(delta(role="assistant", content=None)) == []
    assert stream.feed(delta(reasoning_content="hm")) == [ChatDelta(thinking="hm")]
    (event,) = stream.feed(
        delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}])
    )
    assert event == ChatDelta(tool_calls=(ToolCall(id="c", name="f", arguments="{"),))
    assert stream.feed(delta("tool_calls")) == []
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
    assert stream.feed(chunk(choices=[], usage=usage)) == []
    (done,) = stream.feed(b"[DONE]")
    assert done == Done(reason="tool_calls", prompt_tokens=5, cached_tokens=3, completion_tokens=2)


# ── schemas ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "blah"},
        {"$ref": "#/nowhere"},
        {"$ref": "http://evil.example/s.json"},
        {"properties": {"a": {"anyOf": [{"type": "strin"}]}}},
        {"items": {"pattern": "("}},
        {"properties": {"a": 3}},
    ],
)
def test_a_schema_that_would_be_ignored_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        check_schema(schema)


def test_our_settings_for_the_grammar_win() -> None:
    request = CompletionRequest(prompt="x", format=JsonSchema({"x-guidance": {"lenient": False}}))
    schema = completion_body(request, context_tokens=64)["json_schema"]
    assert schema["x-guidance"]["lenient"] is True


def test_a_deep_schema_is_refused_and_a_plain_one_is_not() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"items": deep}
    with pytest.raises(Invalid):
        check_schema(deep)
    check_schema({"type": ["string", "null"], "$defs": {"a/b": True}, "anyOf": [{"$ref": "#/$defs/a~1b"}]})


# ── starting ────────────────────────────────────────────────────────────────────────

HELP = """
-m, --model FNAME    -a, --alias NAME    --host HOST    --port PORT    --api-key-file FNAME
--api-key KEY    -c, --ctx-size N    -np, --parallel N    -t, --threads N    -tb, --threads-batch N
--threads-http N    -b, --batch-size N    -ub, --ubatch-size N    -ctk, --cache-type-k TYPE
-ctv, --cache-type-v TYPE    -cram, --cache-ram N    --metrics    --slots, --no-slots    --jinja, --no-jinja
--webui, --no-webui    -ngl, --gpu-layers N    -fa, --flash-attn    --context-shift, --no-context-shift
--mmproj FILE    --lora FNAME    --reranking    --embeddings    --pooling    --chat-template-file FNAME
--no-mmap    --slot-save-path PATH    --props    --tools    --rpc    --media-path PATH
"""


DANGEROUS = frozenset(
    {
        *("--rpc", "--slots", "--slot-save-path", "--props", "--tools", "--agent", "--media-path", "--path"),
        *("--sleep-idle-seconds", "--ui", "--webui", "--ui-mcp-proxy", "--mcp-servers-config", "--api-key"),
        *("--model-url", "--hf-repo", "--hf-token", "--models-dir", "--chat-template", "--log-file"),
        *("--chat-template-kwargs", "--override-kv", "--lookup-cache-dynamic", "--api-prefix"),
    }
)
"""Of llama-server's flags: others' code, files, networks, prompts, or a secret for all to see."""


def model(**fields: Any) -> ModelSpec:
    architecture = Architecture(
        name="llama",
        layers=1,
        context_tokens=512,
        embedding_length=1,
        heads=1,
        kv_heads=1,
        key_length=1,
        value_length=1,
        parameters=1,
        file_type="F16",
    )
    return ModelSpec(
        **{
            "name": "n",
            "display": "d",
            "digest": "0",
            "size_bytes": 1,
            "modified_at": 0.0,
            "architecture": architecture,
            "weights": "/m.gguf",
            **fields,
        }
    )


def params(plan: LoadPlan | None = None, **fields: Any) -> RunnerParams:
    return runner_params(
        model(**fields),
        plan or LoadPlan(slots=3, context_tokens=100, threads=2),
        socket="/r/r.sock",
        api_key="canary",
    )


@given(
    st.builds(
        LoadPlan,
        slots=st.integers(1, 8),
        context_tokens=st.integers(1, 10**6),
        threads=st.integers(1, 64),
        batch=st.integers(-1, 10**6),
        gpu_layers=st.integers(-1, 99),
        use_mmap=st.booleans(),
        kv_type=st.sampled_from(["f16", "q8_0", "q4_0"]),
        flash_attention=st.sampled_from([None, True, False]),
    ),
    st.sampled_from(["", "mean", "rank"]),
    st.sampled_from(["", "{{ canary-template }}"]),
)
def test_a_command_line_is_typed_and_holds_no_secret(plan: LoadPlan, pooling: Any, template: str) -> None:
    """S-13, S-11; the binary knows every dangerous flag there is."""
    given_params = params(plan, pooling=pooling, chat_template=template, projectors=("/p.gguf",))
    words = argv("/bin/llama-server", given_params, "/r", flags_in(HELP) | DANGEROUS)
    assert "canary" not in " ".join(words)
    flags = {word for word in words if word.startswith("--")}
    assert not flags & DANGEROUS
    assert {"--no-slots", "--no-webui", "--api-key-file"} <= flags
    assert words[words.index("--ctx-size") + 1] == str(plan.slots * plan.context_tokens)
    assert "canary\n" in files_of(given_params).values()


def test_threads_without_work_leave_the_core() -> None:
    words = argv("/bin/llama-server", params(), "/r", flags_in(HELP + "--poll <0...100>"))
    assert words[words.index("--poll") + 1] == "0"
    assert "--poll" not in argv("/bin/llama-server", params(), "/r", flags_in(HELP))


def test_a_binary_that_lacks_a_needed_flag_is_refused() -> None:
    for flag in ("--no-slots", "--no-webui", "--api-key-file", "--cache-ram"):
        flags = flags_in(HELP) - {flag}
        with pytest.raises(LoadFailed):
            argv("/bin/llama-server", params(), "/r", flags)


def test_an_embedding_models_step_holds_its_whole_input() -> None:
    embedding = params(LoadPlan(slots=2, context_tokens=4096, threads=1), pooling="mean")
    assert embedding.batch == embedding.ubatch == 512  # the trained context
    assert params(LoadPlan(slots=2, context_tokens=300, threads=1), pooling="mean").ubatch == 300


@pytest.mark.parametrize("fields", [{"weights": ""}, {"projectors": ("/a", "/b")}])
def test_a_model_that_cannot_run_here_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        params(**fields)


def test_the_environment_is_an_allow_list() -> None:
    kept = scrubbed({"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x", "LD_PRELOAD": "x", "PYTHONPATH": "x"})
    assert kept == {"PATH": "/bin"} | RUNNER_ENVIRONMENT


# ── what programs say ───────────────────────────────────────────────────────────────


def test_the_reason_of_a_failure() -> None:
    log = (
        "0.00.012.108 E gguf_init_from_reader: invalid magic characters: 'PK', expected 'GGUF'\n"
        "0.00.012.245 E llama_model_load: error loading model: llama_model_loader: failed to load /m\n"
    )
    assert reason(log) == "invalid magic characters: 'PK', expected 'GGUF'"
    assert reason("a\n/src/x/llama-model.cpp:13: GGML_ASSERT(n > 0) failed at 0x7f0011223344\n") == (
        "llama-model.cpp:13: GGML_ASSERT(n > 0) failed at 0x…"
    )
    assert reason("llama_model_load: error loading model: unknown model architecture: 'x'") == (
        "unknown model architecture: 'x'"
    )
    assert reason("init: failed to parse:\n bad\n") == "failed to parse: bad"
    assert reason("all is well\n") == ""


@given(st.lists(st.binary(max_size=40)), st.integers(1, 50))
def test_the_tail_keeps_the_end(parts: list[bytes], limit: int) -> None:
    tail = Tail(limit)
    for part in parts:
        tail.feed(part)
    assert tail.text() == b"".join(parts)[-limit:].decode("utf-8", "replace")


def test_what_programs_say_about_themselves() -> None:
    assert (
        instruction_set("CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | AVX512 = 0 | AMX_INT8 = 1 |")
        == "AVX2 AMX_INT8"
    )
    assert binary_version("version: 11669 (abc123)\nbuilt with clang") == "b11669"
    assert binary_version("version: 0.6.0-dev (build 11669, commit x)") == "b11669"
    assert binary_version("version: 0.6.0-dev (build 0, commit unknown)") == "0.6.0-dev"
    assert binary_version("nothing") == ""


# ── schemas are closed ──────────────────────────────────────────────────────────────


def test_objects_take_no_members_that_the_schema_does_not_name() -> None:
    inner = {"type": "object", "properties": {"properties": {"type": "string"}}}
    schema = {
        "type": "object",
        "properties": {"a": inner, "b": {"type": "array", "items": inner}, "c": {"$ref": "#/$defs/d"}},
        "$defs": {"d": {"anyOf": [inner, {"type": "null"}]}},
    }
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "type": "object",
        "properties": {"a": shut, "b": {"type": "array", "items": shut}, "c": {"$ref": "#/$defs/d"}},
        "$defs": {"d": {"anyOf": [shut, {"type": "null"}]}},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
    ],
)
def test_what_says_otherwise_stays_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


# ── wanted calls ────────────────────────────────────────────────────────────────────


def chat_event(finish: str | None = None, **delta: Any) -> bytes:
    return msgspec.json.encode({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def wanted(*events: bytes) -> tuple[list[EngineEvent], int]:
    """What is passed on, and how often it refused."""
    refusals: list[None] = []
    stream = WantedCalls(lambda: refusals.append(None))
    return [event for data in events for event in stream.feed(data)], len(refusals)


CALL = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}


def test_a_model_that_calls_is_left_alone() -> None:
    events, refusals = wanted(
        chat_event(reasoning_content="hm"),
        chat_event(content="\n"),
        chat_event(tool_calls=[CALL]),
        chat_event(content="after"),
        chat_event("tool_calls"),
        b"[DONE]",
    )
    assert refusals == 0
    assert [e.thinking for e in events if isinstance(e, ChatDelta) and e.thinking] == ["hm"]
    assert [c.name for e in events if isinstance(e, ChatDelta) for c in e.tool_calls] == ["f"]
    assert isinstance(events[-1], Done)


@pytest.mark.parametrize("talk", [[chat_event(content="I would rather")], [chat_event("stop"), b"[DONE]"]])
def test_a_model_that_talks_instead_refuses_once_and_is_heard_no_more(talk: list[bytes]) -> None:
    events, refusals = wanted(*talk, chat_event(content=" talk"), chat_event(tool_calls=[CALL]), b"[DONE]")
    assert refusals == 1
    assert not any(
        isinstance(e, Done) or (isinstance(e, ChatDelta) and (e.text or e.tool_calls)) for e in events
    )
