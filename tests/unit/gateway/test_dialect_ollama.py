"""Ollama's inference routes, field by field (`reference/ollama-api.md`, 3 to 6)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway_bench import HELLO, STAMP, USAGE, Bench

from ollama_distributed.base import errors as e
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    EmbedResult,
    Failed,
    Finished,
    JsonObject,
    JsonSchema,
    LoadOptions,
    Sampling,
    TextPrompt,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from ollama_distributed.testing.inference import ScriptedInference

COUNTS = {
    "total_duration": 500_000_000,
    "load_duration": 250_000_000,
    "prompt_eval_count": 7,
    "prompt_eval_cached_count": 0,
    "prompt_eval_duration": 125_000_000,
    "eval_count": 2,
    "eval_duration": 62_500_000,
}
BASE = {"model": "m", "created_at": STAMP}


def bench(*events, **extra):
    return Bench(ScriptedInference(events or HELLO, **extra))


def asked(path, body):
    one = bench()
    out = one.post(path, body)
    assert out.status == 200, out.body
    return one.inference.requests[0]


# ── answers ─────────────────────────────────────────────────────────────────────────


def test_generate_streams_lines():
    out = bench().post("/api/generate", {"model": "m", "prompt": "hi"})
    assert out.status == 200
    assert out.headers["content-type"] == "application/x-ndjson"
    assert out.lines() == [
        {**BASE, "response": "Hel", "done": False},
        {**BASE, "response": "lo", "done": False},
        {**BASE, "response": "", "done": True, "done_reason": "stop", **COUNTS},
    ]
    assert out.ended


def test_generate_whole():
    out = bench().post("/api/generate", {"model": "m", "prompt": "hi", "stream": False})
    assert out.headers["content-type"] == "application/json; charset=utf-8"
    assert int(out.headers["content-length"]) == len(out.body)
    assert out.json() == {**BASE, "response": "Hello", "done": True, "done_reason": "stop", **COUNTS}
    assert list(out.json())[:3] == ["model", "created_at", "response"]


def test_chat_streams_and_whole():
    messages = [{"role": "user", "content": "hi"}]
    lines = bench().post("/api/chat", {"model": "m", "messages": messages}).lines()
    assert lines[0] == {**BASE, "message": {"role": "assistant", "content": "Hel"}, "done": False}
    assert lines[-1] == {
        **BASE,
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        **COUNTS,
    }
    whole = bench().post("/api/chat", {"model": "m", "messages": messages, "stream": False}).json()
    assert whole["message"] == {"role": "assistant", "content": "Hello"}


def test_zero_counts_are_left_out_and_context_is_there():
    events = (Delta(text="x"), Finished(reason="length", context=(1, 2, 3)))
    last = bench(*events).post("/api/generate", {"model": "m", "prompt": "p"}).lines()[-1]
    assert last == {**BASE, "response": "", "done": True, "done_reason": "length", "context": [1, 2, 3]}


def test_thinking_and_logprobs():
    logprob = TokenLogprob("é", -0.5, "é".encode(), (TopLogprob("a", -1.0, b"a"),))
    events = (
        Delta(thinking="hm"),
        Delta(text="é", logprobs=(logprob,)),
        Finished(reason="stop"),
    )
    shown = [
        {
            "token": "é",
            "logprob": -0.5,
            "bytes": [195, 169],
            "top_logprobs": [{"token": "a", "logprob": -1.0, "bytes": [97]}],
        }
    ]
    lines = bench(*events).post("/api/generate", {"model": "m", "prompt": "p"}).lines()
    assert lines[0] == {**BASE, "response": "", "thinking": "hm", "done": False}
    assert lines[1] == {**BASE, "response": "é", "done": False, "logprobs": shown}
    chat = {"model": "m", "messages": [{"role": "user", "content": "p"}], "stream": False}
    whole = bench(*events).post("/api/chat", chat).json()
    assert whole["message"] == {"role": "assistant", "content": "é", "thinking": "hm"}
    assert whole["logprobs"] == shown


def test_a_tool_call_comes_whole_with_an_object():
    events = (
        Delta(tool_calls=(ToolCall(id="call_1", name="add", arguments='{"a":'),)),
        Delta(tool_calls=(ToolCall(id="", name="", arguments="1}"),)),
        Finished(reason="tool_calls"),
    )
    chat = {"model": "m", "messages": [{"role": "user", "content": "p"}]}
    call = {"id": "call_1", "function": {"index": 0, "name": "add", "arguments": {"a": 1}}}
    lines = bench(*events).post("/api/chat", chat).lines()
    assert lines == [
        {**BASE, "message": {"role": "assistant", "content": "", "tool_calls": [call]}, "done": False},
        {**BASE, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"},
    ]
    whole = bench(*events).post("/api/chat", {**chat, "stream": False}).json()
    assert whole["message"]["tool_calls"] == [call]


def test_tool_arguments_that_are_no_object_fail():
    events = (
        Delta(text="a", tool_calls=(ToolCall(id="c", name="add", arguments="[1"),)),
        Finished(reason="tool_calls"),
    )
    chat = {"model": "m", "messages": [{"role": "user", "content": "p"}]}
    out = bench(*events).post("/api/chat", chat)
    assert "arguments that are not a JSON object" in out.lines()[-1]["error"]
    assert out.ended
    assert bench(*events).post("/api/chat", {**chat, "stream": False}).status == 500


@pytest.mark.parametrize(("keep", "reason"), [(None, "load"), (0, "unload")])
def test_an_empty_prompt_loads_or_unloads(keep, reason):
    one = bench(Finished(reason=reason, usage=Usage(total_s=0.2, load_s=0.1)))
    out = one.post("/api/generate", {"model": "m", "keep_alive": keep})
    assert out.headers["content-type"].startswith("application/json")
    assert out.json() == {**BASE, "response": "", "done": True, "done_reason": reason}
    assert one.inference.requests[0].load_only
    chat = bench(Finished(reason=reason)).post(
        "/api/chat", {"model": "m", "messages": [], "keep_alive": keep}
    )
    assert chat.json() == {
        **BASE,
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": reason,
    }


def test_what_the_slot_had_kept_is_told():
    usage = Usage(prompt_tokens=9, cached_tokens=8, completion_tokens=1)
    said = (Delta(text="x"), Finished(reason="stop", usage=usage))
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert bench(*said).post("/api/chat", body).lines()[-1]["prompt_eval_cached_count"] == 8
    whole = bench(*said).post("/api/chat", {**body, "stream": False}).json()
    assert whole["prompt_eval_cached_count"] == 8


def test_render_only():
    finished = Finished(reason="stop", rendered="<|user|>hi", rendered_images=2)
    out = bench(finished).post("/api/generate", {"model": "m", "prompt": "hi", "_debug_render_only": True})
    assert out.json() == {
        **BASE,
        "response": "",
        "done": False,
        "_debug_info": {"rendered_template": "<|user|>hi", "image_count": 2},
    }


def test_embed_answers():
    result = EmbedResult(
        vectors=((0.5, -1.0), (0.25, 0.0)), usage=Usage(prompt_tokens=3, total_s=1.0, load_s=0.5)
    )
    one = bench(embedded=result)
    assert one.post("/api/embed", {"model": "m", "input": ["a", "b"]}).json() == {
        "model": "m",
        "embeddings": [[0.5, -1.0], [0.25, 0.0]],
        "total_duration": 1_000_000_000,
        "load_duration": 500_000_000,
        "prompt_eval_count": 3,
    }
    assert one.inference.requests[0].inputs == ("a", "b")
    assert one.inference.requests[0].normalize
    legacy = one.post("/api/embeddings", {"model": "m", "prompt": "a"})
    assert legacy.json() == {"embedding": [0.5, -1.0]}
    assert not one.inference.requests[1].normalize


def test_empty_embeddings_only_load():
    assert bench().post("/api/embed", {"model": "m"}).json() == {"model": "m", "embeddings": []}
    assert bench().post("/api/embed", {"model": "m", "input": ""}).json() == {"model": "m", "embeddings": []}
    assert bench().post("/api/embeddings", {"model": "m"}).json() == {"embedding": []}


# ── what is asked ───────────────────────────────────────────────────────────────────


def test_every_field_of_generate():
    request = asked(
        "/api/generate",
        {
            "model": "m",
            "prompt": "p",
            "suffix": "s",
            "images": ["aGk="],
            "system": "sys",
            "template": "t",
            "context": [1, 2],
            "format": {"type": "object"},
            "keep_alive": "5m",
            "options": {"temperature": 1, "top_k": 5.0, "stop": ["x", ""], "num_ctx": 2048, "new": 1},
            "think": "high",
            "truncate": False,
            "shift": False,
            "logprobs": True,
            "top_logprobs": 3,
            "unknown": {"a": 1},
        },
    )
    assert request.prompt == TextPrompt(
        text="p", suffix="s", system="sys", template="t", context=(1, 2), images=(b"hi",)
    )
    assert request.format == JsonSchema({"type": "object"})
    assert request.keep_alive_s == 300
    assert request.sampling == Sampling(temperature=1.0, top_k=5, stop=("x",))
    assert request.options == LoadOptions(num_ctx=2048)
    assert request.think == "high"
    assert not request.truncate
    assert not request.shift
    assert request.logprobs
    assert request.top_logprobs == 3
    assert request.want_context


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"num_ctx": 0, "num_batch": 0, "num_thread": 0, "num_gpu": 0}, LoadOptions(num_ctx=0, num_gpu=0)),
        ({"num_ctx": -1, "num_batch": -1, "num_gpu": -1}, LoadOptions(num_gpu=-1)),
    ],
)
def test_options_of_nothing(options: dict[str, int], read: LoadOptions) -> None:
    assert asked("/api/generate", {"model": "m", "options": options}).options == read


def test_null_means_absent():
    names = [
        "prompt",
        "suffix",
        "images",
        "system",
        "template",
        "context",
        "raw",
        "format",
        "keep_alive",
        "options",
        "think",
    ]
    request = asked("/api/generate", {"model": "m", **dict.fromkeys(names), "stream": False, "shift": None})
    assert request.prompt == TextPrompt(text="")
    assert request.truncate
    assert request.shift
    assert request.format is None
    assert request.keep_alive_s is None


def test_raw_wants_no_context():
    request = asked("/api/generate", {"model": "m", "prompt": "p", "raw": True})
    assert request.prompt.raw
    assert not request.want_context


def test_every_field_of_chat():
    request = asked(
        "/api/chat",
        {
            "model": "m",
            "messages": [
                {"role": "SYSTEM", "content": "s"},
                {"role": "user", "content": "u", "images": ["aGk="]},
                {
                    "role": "assistant",
                    "content": None,
                    "thinking": "t",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"b": 1, "a": [2]}}}],
                },
                {"role": "tool", "content": "r", "tool_name": "f", "tool_call_id": "1"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
                }
            ],
            "format": "json",
            "think": False,
        },
    )
    prompt = request.prompt
    assert isinstance(prompt, ChatPrompt)
    assert [one.role for one in prompt.messages] == ["system", "user", "assistant", "tool"]
    assert prompt.messages[1].images == (b"hi",)
    assert prompt.messages[2].tool_calls == (ToolCall(id="1", name="f", arguments='{"b":1,"a":[2]}'),)
    assert prompt.messages[3].tool_name == "f"
    assert prompt.tools[0].parameters == {"type": "object"}
    assert request.format == JsonObject()
    assert request.think is False


@pytest.mark.parametrize(
    ("value", "seconds"), [("5m", 300.0), ("-1m", -60.0), (-1, -1.0), (0, 0.0), (10, 10.0), ("1h30m", 5400.0)]
)
def test_keep_alive(value, seconds):
    assert asked("/api/generate", {"model": "m", "prompt": "p", "keep_alive": value}).keep_alive_s == seconds


# ── errors, in Ollama's words ───────────────────────────────────────────────────────

CHAT = {"model": "m", "messages": [{"role": "user", "content": "p"}]}
GEN = {"model": "m", "prompt": "p"}


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/generate", b"", 400, "missing request body"),
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/embed", b"", 400, "missing request body"),
        ("/api/embeddings", b"", 400, "missing request body"),
        ("/api/generate", b"{", 400, "invalid JSON"),
        ("/api/generate", b'{"model":"a","model":"b"}', 400, "twice"),
        ("/api/generate", {}, 404, "model '' not found"),
        ("/api/embed", {}, 404, "model '' not found"),
        ("/api/chat", {}, 400, "model is required"),
        ("/api/embeddings", {}, 400, "model is required"),
        ("/api/generate", {**GEN, "top_logprobs": 21}, 400, "top_logprobs must be between 0 and 20"),
        ("/api/chat", {**CHAT, "top_logprobs": -1}, 400, "top_logprobs must be between 0 and 20"),
        (
            "/api/generate",
            {**GEN, "raw": True, "system": "s"},
            400,
            "raw mode does not support template, system, or context",
        ),
        (
            "/api/generate",
            {**GEN, "format": "yaml"},
            400,
            'invalid format: "yaml"; expected "json" or a valid',
        ),
        ("/api/generate", {**GEN, "format": 5}, 400, "invalid format: 5"),
        ("/api/chat", {**CHAT, "think": "hard"}, 400, 'invalid think value: "hard"'),
        (
            "/api/generate",
            {**GEN, "options": {"temperature": "x"}},
            400,
            'option "temperature" must be of type float32',
        ),
        ("/api/generate", {**GEN, "options": {"top_k": True}}, 400, 'option "top_k" must be of type integer'),
        ("/api/generate", {**GEN, "options": {"seed": 1e300}}, 400, 'option "seed" must be of type integer'),
        ("/api/generate", {**GEN, "options": {"stop": "x"}}, 400, 'option "stop" must be of type array'),
        (
            "/api/generate",
            {**GEN, "options": {"stop": [1]}},
            400,
            'option "stop" must be of an array of strings',
        ),
        (
            "/api/generate",
            {**GEN, "options": {"use_mmap": 1}},
            400,
            'option "use_mmap" must be of type boolean',
        ),
        ("/api/generate", {**GEN, "keep_alive": "soon"}, 400, "keep_alive"),
        ("/api/generate", {**GEN, "model": 3}, 400, "model"),
        ("/api/generate", {**GEN, "images": ["%%"]}, 400, "images"),
        ("/api/chat", {"model": "m", "messages": [{"role": "robot"}]}, 400, "invalid role: robot"),
        ("/api/embed", {"model": "m", "input": [1]}, 400, "invalid input type"),
        ("/api/embed", {"model": "m", "input": {}}, 400, "invalid input type"),
    ],
)
def test_refusals(path, body, status, text):
    one = bench()
    out = one.post(path, body)
    assert out.status == status
    assert text in out.json()["error"]
    assert list(out.json()) == ["error"]
    assert one.inference.requests == []


def test_error_before_the_first_byte_has_its_status():
    out = bench(Failed(e.ModelNotFound("model 'm' not found"))).post("/api/generate", GEN)
    assert (out.status, out.json()) == (404, {"error": "model 'm' not found"})
    busy = bench(Failed(e.QueueFull("full"))).post("/api/chat", CHAT)
    assert busy.status == 503
    assert busy.json()["error"] == "server busy, please try again.  maximum pending requests exceeded"
    assert 1 <= int(busy.headers["retry-after"]) <= 10


def test_error_after_the_first_byte_is_the_last_line():
    out = bench(Delta(text="a"), Failed(e.RunnerDied("the runner ended"))).post("/api/generate", GEN)
    assert out.status == 200
    assert out.lines()[-1] == {"error": "the runner ended"}
    assert not any(line.get("done") for line in out.lines())


def test_a_missing_model_has_two_spellings():
    missing = e.ModelNotFound("model 'm' not found")
    one = bench(error=missing)
    assert one.post("/api/embed", {"model": "m", "input": "x"}).json() == {
        "error": 'model "m" not found, try pulling it first'
    }


def test_a_foreign_exception_is_hidden():
    class Broken(ScriptedInference):
        def open(self, request, sink):
            raise ValueError("secret 0xdeadbeef")

    out = Bench(Broken()).post("/api/generate", GEN)
    assert out.status == 500
    assert b"secret" not in out.body


# ── properties ──────────────────────────────────────────────────────────────────────


@given(st.lists(st.text(max_size=20), max_size=8), st.booleans())
def test_text_survives_every_encoder(pieces, chat):
    events = [*(Delta(text=piece) for piece in pieces), Finished(reason="stop", usage=USAGE)]
    path, body = ("/api/chat", CHAT) if chat else ("/api/generate", GEN)

    def text(row):
        return row["message"]["content"] if chat else row["response"]

    whole = bench(*events).post(path, {**body, "stream": False}).json()
    lines = bench(*events).post(path, body).lines()
    assert text(whole) == "".join(pieces) == "".join(map(text, lines))
    assert [line["done"] for line in lines] == [False] * len(pieces) + [True]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "prompt",
        "suffix",
        "images",
        "system",
        "template",
        "context",
        "raw",
        "format",
        "stream",
        "keep_alive",
        "options",
        "think",
        "messages",
        "tools",
        "truncate",
        "shift",
        "logprobs",
        "top_logprobs",
        "_debug_render_only",
        "input",
        "dimensions",
    ]
)


@given(
    path=st.sampled_from(["/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/api/v1/chat"]),
    body=st.dictionaries(FIELDS, JSON, max_size=5),
)
def test_any_body_is_answered_or_refused_with_400(path, body):
    """Never a 500: whatever JSON comes, it is understood or refused."""
    out = bench().post(path, json.dumps({"model": "m", **body}).encode())
    assert out.status in (200, 400)
    assert out.ended
