"""Errors in every dialect's shape, and lines however they were cut."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base import errors as server_errors
from ollama_distributed.client import calls, errors, wire
from ollama_distributed.client.answers import Lines, StreamReader, error_of, retry_after_s

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC).timestamp()


def server_tree(root: type[Any] = server_errors.OllamaDistributedError) -> list[type[Any]]:
    return [root, *(found for child in root.__subclasses__() for found in server_tree(child))]


def test_each_error_of_the_server_has_its_class_here() -> None:
    for theirs in server_tree():
        if theirs.__module__ != server_errors.__name__:
            continue
        ours = errors.BY_CODE[theirs.code]
        assert ours.retryable == theirs.retryable, theirs.code
        parent: Any = theirs.__bases__[0]
        if parent is not Exception:
            assert issubclass(ours, errors.BY_CODE[parent.code]) or parent.code == "internal"


def body(told: Any) -> bytes:
    return json.dumps(told).encode()


@pytest.mark.parametrize(
    ("status", "data", "kind", "message"),
    [
        (404, body({"error": {"code": "model_not_found", "message": "no m"}}), errors.ModelNotFound, "no m"),
        (400, body({"error": {"code": "of the future", "message": "x"}}), errors.Invalid, "x"),
        (404, body({"error": "model 'm' not found"}), errors.ModelNotFound, "model 'm' not found"),
        (404, body({"error": "no such route"}), errors.NotFound, "no such route"),
        (
            503,
            body({"error": "server busy, please try again."}),
            errors.QueueFull,
            "server busy, please try again.",
        ),
        (
            400,
            body({"error": '"m" does not support thinking'}),
            errors.Unsupported,
            '"m" does not support thinking',
        ),
        (401, body({"error": {"message": "no key", "type": "x"}}), errors.Unauthenticated, "no key"),
        (403, b"", errors.ForeignHost, "the server does not know the host name that was used to reach it"),
        (502, b"<html>Bad\n Gateway</html>", errors.Unavailable, "HTTP 502: <html>Bad Gateway</html>"),
        (418, b"", errors.Invalid, "HTTP 418"),
        (599, b"[1]", errors.Internal, "HTTP 599: [1]"),
    ],
)
def test_an_error_in_each_shape(
    status: int, data: bytes, kind: type[errors.ClientError], message: str
) -> None:
    error = error_of(status, {}, data, now=NOW)
    assert type(error) is kind
    assert str(error) == message
    assert error.status == status


def test_an_error_carries_what_the_server_said_about_it() -> None:
    told = {"error": {"code": "engine_error", "message": "m", "retryable": True, "request_id": "r1"}}
    error = error_of(500, {"retry-after": "7", "x-request-id": "r2"}, body(told), now=NOW)
    assert (error.retryable, error.request_id, error.retry_after_s) == (True, "r1", 7.0)


def test_a_redirect_is_told_and_not_followed() -> None:
    error = error_of(302, {"location": "http://evil/"}, b"", now=NOW)
    assert isinstance(error, errors.BadAnswer)
    assert "http://evil/" in str(error)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("", None),
        ("3", 3.0),
        ("0", 0.0),
        ("Sun, 22 Nov 2026 12:00:05 GMT", 5.0),
        ("Sun, 22 Nov 2020 12:00:05 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("1e999", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    found = retry_after_s(value, now=NOW)
    assert found == seconds or (value == "1e999" and found == float("inf"))


@given(st.lists(st.binary(min_size=1).filter(lambda b: b"\n" not in b and b.strip()), max_size=8), st.data())
def test_lines_do_not_depend_on_how_they_were_cut(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(line + b"\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    reader = Lines()
    found: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        found += reader.feed(whole[start:end])
    assert found == lines
    assert reader.rest() == b""


def test_a_line_without_end_is_refused() -> None:
    reader = Lines(limit_bytes=10)
    with pytest.raises(errors.BadAnswer):
        list(reader.feed(b"x" * 11))


def reader() -> StreamReader[wire.GenerateResponse]:
    call = calls.generate(wire.GenerateRequest(model="m"), stream=True)
    assert call.done is not None
    return StreamReader(call.decode, call.done)


def test_an_error_line_comes_after_the_pieces_before_it() -> None:
    stream = reader()
    pieces = stream.feed(b'{"response":"a"}\n{"error":{"code":"runner_died","message":"gone"}}\n')
    assert next(pieces).response == "a"
    with pytest.raises(errors.RunnerDied, match="gone"):
        next(pieces)


def test_a_model_that_writes_the_word_error_is_no_error() -> None:
    assert [
        p.response for p in reader().feed(b'{"response":"{\\"error\\": 1}"}\n{"response":"\\"error\\""}\n')
    ] == [
        '{"error": 1}',
        '"error"',
    ]


@pytest.mark.parametrize("data", [b"", b'{"response":"a"}\n', b'{"response":"a"}\n{"resp'])
def test_a_torn_answer_never_looks_whole(data: bytes) -> None:
    stream = reader()
    list(stream.feed(data))
    with pytest.raises(errors.ConnectionLost):
        list(stream.finish())


def test_a_last_line_may_lack_its_end() -> None:
    stream = reader()
    assert list(stream.feed(b'{"done":true,"done_reason":"stop"}')) == []
    assert [piece.done_reason for piece in stream.finish()] == ["stop"]


@pytest.mark.parametrize("name", ["", "..", "a/../b", "a//b", "/a"])
def test_a_name_that_would_change_the_path_is_refused(name: str) -> None:
    with pytest.raises(errors.InvalidName):
        calls.get_model(name)


def test_names_travel_whole() -> None:
    assert calls.get_model("hf.co/user/repo:Q4 ?#").path == "/api/v1/models/hf.co/user/repo:Q4%20%3F%23"


def test_ollamas_shape_of_what_is_not_offered():
    error = error_of(501, {}, b'{"error": "pull is not available in this version"}', now=NOW)
    assert isinstance(error, errors.NotOffered)
    assert not error.retryable
