"""What two nodes say to each other survives the wire, in whatever pieces it comes."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.peers import wire
from ollama_distributed.base.errors import (
    Conflict,
    ContextExceeded,
    EngineError,
    Internal,
    Invalid,
    OllamaDistributedError,
    QueueFull,
    RunnerDied,
    Unavailable,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    InferenceRequest,
    JsonSchema,
    LoadOptions,
    Message,
    NamedTool,
    Sampling,
    TextPrompt,
    TokenLogprob,
    TokensPrompt,
    Tool,
    ToolCall,
    TopLogprob,
)
from ollama_distributed.base.refusal import Refusal, error_of, refusal_of
from ollama_distributed.base.tokens import (
    ChatDelta,
    Done,
    EngineFailed,
    Left,
    Prepared,
    Progress,
    Resume,
    Skipped,
    SourceEvent,
    Tokens,
)

CALL = ToolCall(id="c1", name="f", arguments='{"a": 1}', index=2)
LOGPROB = TokenLogprob("a", -0.5, b"\xe2\x82", (TopLogprob("b", -1.5, b"b"),))

requests = st.builds(
    InferenceRequest,
    request_id=st.text(max_size=8).map(RequestId),
    identity=st.sampled_from([Identity("local"), Identity("admin", KeyId("k"), "t")]),
    model=st.text(max_size=8),
    prompt=st.sampled_from(
        [
            TextPrompt(text="é\0", images=(b"\x00\xff",), context=(1, 2)),
            TokensPrompt(ids=(3, 2**40)),
            ChatPrompt(
                messages=(Message(role="user", content="x", images=(b"i",), tool_calls=(CALL,)),),
                tools=(Tool(name="f", parameters={"type": "object", "properties": {"a": [1, None, 2.5]}}),),
                tool_choice=NamedTool("f"),
            ),
            ChatPrompt(messages=(), tool_choice="required"),
        ]
    ),
    sampling=st.sampled_from([Sampling(), Sampling(seed=-1, stop=("a", "b"), logit_bias={"1": -5.0})]),
    options=st.sampled_from([LoadOptions(), LoadOptions(num_ctx=64, use_mmap=False)]),
    format=st.sampled_from([None, JsonSchema({"type": "string"})]),
    think=st.sampled_from([None, True, False, "high"]),
    keep_alive_s=st.none() | st.floats(-1, 1e6),
    logprobs=st.booleans(),
)
events: st.SearchStrategy[SourceEvent] = st.one_of(
    st.builds(
        Tokens, st.tuples(st.integers(0, 2**31)), st.text(max_size=5), st.just((LOGPROB,)), st.binary()
    ),
    st.builds(Progress, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    st.builds(ChatDelta, text=st.text(max_size=5), tool_calls=st.just((CALL,))),
    st.builds(Prepared, load_s=st.floats(0, 9), stop=st.just(("x",)), thinking_tags=st.just(("<t>", "</t>"))),
)
lasts: st.SearchStrategy[SourceEvent] = st.sampled_from(
    [
        Done(reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=2, prompt_s=0.5),
        Skipped(reason="load", rendered="x"),
    ]
)


@given(requests, st.lists(st.integers(0, 9)).map(tuple))
def test_a_request_comes_as_it_was(request: InferenceRequest, ids: tuple[int, ...]) -> None:
    resume = Resume(ids=ids, prompt_text="p", model_digest="d", left=(Left("n1", stalled=True),))
    data = wire.encode(wire.GenerateAsk(request=request, resume=resume))
    heard = msgspec.msgpack.decode(data, type=wire.GenerateAsk)
    assert (heard.request, heard.resume) == (request, resume)


@given(st.lists(st.lists(events, min_size=1), min_size=1), lasts, st.data())
def test_events_come_in_order_whatever_the_pieces(
    turns: list[list[SourceEvent]], last: SourceEvent, data: st.DataObject
) -> None:
    stream = b"".join(wire.events_frame(turn) + wire.PING for turn in turns) + wire.events_frame([last])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    frames, heard = wire.Frames(), list[SourceEvent]()
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        for payload in frames.feed(stream[begin:end]):
            heard += wire.decode_events(payload)
    assert heard == [*(event for turn in turns for event in turn), last]


def test_a_failure_is_the_last_event() -> None:
    error = ContextExceeded("too long", prompt_tokens=9, context_tokens=8)
    frame = wire.events_frame([Progress(1, 1), EngineFailed(error)])
    first, last = wire.decode_events(frame[4:])
    assert first == Progress(1, 1)
    assert isinstance(last, EngineFailed)
    assert type(last.error) is ContextExceeded
    assert (last.error.message, last.error.prompt_tokens, last.error.context_tokens) == ("too long", 9, 8)


def test_a_call_that_never_began_raises_what_it_was_refused_with() -> None:
    with pytest.raises(QueueFull) as refused:
        wire.decode_events(wire.refusal_frame(QueueFull("full", retry_after_s=7.5))[4:])
    assert refused.value.retry_after_s == 7.5


@pytest.mark.parametrize(
    "payload", [b"\xc1", b"\x91\xc1", b"\x91\x81\xa4type\xa4what", b"\x80", b"\x91\xa1\xff"]
)
def test_another_language_is_unavailable(payload: bytes) -> None:
    with pytest.raises(Unavailable, match="versions"):
        wire.decode_events(payload)
    with pytest.raises(Unavailable, match="versions"):
        wire.decode_reply(payload)


def test_a_frame_has_a_bound() -> None:
    with pytest.raises(Unavailable, match="too long"):
        wire.Frames().feed(struct.pack(">I", wire.MAX_FRAME_BYTES + 1))


def test_a_large_frame_in_many_pieces_is_not_copied_again_and_again() -> None:
    """Kept as it comes, and looked at once: else 64 MiB in 16 KiB pieces would be 128 GiB of copies."""
    size, frames, found = 32 * 1024 * 1024, wire.Frames(), list[bytes]()
    stream = wire.frame(bytes(size))
    for at in range(0, len(stream), 16_384):
        found += frames.feed(stream[at : at + 16_384])
    assert [len(payload) for payload in found] == [size]


def test_a_number_that_does_not_fit_is_the_clients_mistake() -> None:
    with pytest.raises(Invalid, match="64 bits"):
        wire.encode({"schema": {"maximum": 2**70}})


def _all_errors(
    kind: type[OllamaDistributedError] = OllamaDistributedError,
) -> list[type[OllamaDistributedError]]:
    return [kind, *(below for one in kind.__subclasses__() for below in _all_errors(one))]


@pytest.mark.parametrize("kind", _all_errors())
def test_every_error_keeps_its_class_and_text(kind: type[OllamaDistributedError]) -> None:
    error = error_of(msgspec.msgpack.decode(msgspec.msgpack.encode(refusal_of(kind("why"))), type=Refusal))
    expected = Internal if kind is OllamaDistributedError else kind  # both are `internal`
    assert (type(error) in (kind, expected), error.message, error.code) == (True, "why", kind.code)


def test_fields_of_errors_survive() -> None:
    conflict = error_of(refusal_of(Conflict("moved", revision=12)))
    assert isinstance(conflict, Conflict)
    assert conflict.revision == 12
    invalid = error_of(refusal_of(Invalid("bad", param="messages[0]")))
    assert isinstance(invalid, Invalid)
    assert invalid.param == "messages[0]"


def test_an_unknown_code_keeps_its_retryability() -> None:
    assert isinstance(error_of(Refusal(code="new", message="m", retryable=True)), Unavailable)
    assert type(error_of(Refusal(code="new", message="m"))) is EngineError
    assert not hasattr(error_of(Refusal(code=RunnerDied.code, message="m", details={"evil": 1})), "evil")
