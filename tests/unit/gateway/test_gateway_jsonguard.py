import json
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import Malformed
from ollama_distributed.gateway.jsonguard import JsonGuard
from ollama_distributed.gateway.limits import KIB, MIB, Limits

GUARD = JsonGuard(Limits())
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def check(body: bytes, max_string: int = 2 * MIB) -> None:
    GUARD.check(body, max_string=max_string)


@given(VALUES)
def test_ordinary_json_passes(value):
    check(json.dumps(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode())


@given(st.binary(max_size=200))
def test_bytes_pass_or_are_malformed_and_what_passes_is_json(body):
    try:
        check(body)
    except Malformed:
        return
    json.loads(body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"x":{"a":1,"\\u0061":2}}', "twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b"[" * 65 + b"]" * 65, "deeper"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "deeper"),
        (b"[" * 100_000 + b"]" * 100_000, "deeper"),
        (b"[" + b"1," * 100_001 + b"1]", "values"),
        (b'{"a":' + b"9" * 20 + b"}", "digits"),
        (b'{"a":-' + b"9" * 20 + b"}", "digits"),
        (b'{"a":', "invalid JSON"),
        (b"", "invalid JSON"),
        (b"{} {}", "invalid JSON"),
        (b'{"a":"\xff"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "invalid JSON"),
    ],
)
def test_refused(body, words):
    with pytest.raises(Malformed, match=words):
        check(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 64 + b"]" * 64,
        b'{"a":-' + b"9" * 19 + b"}",
        b"[" + b"1," * 99_998 + b"1]",
        json.dumps({"prompt": ",{[" * 200_000}).encode(),
        json.dumps({"prompt": '\\"' * 200_000}).encode(),
    ],
)
def test_at_the_limit_passes(body):
    check(body)


def test_long_strings():
    body = json.dumps({"images": ["x" * (3 * KIB)]}).encode()
    check(body, max_string=3 * KIB)
    with pytest.raises(Malformed, match="longer"):
        check(body, max_string=3 * KIB - 1)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 4_000_000,
        b"[" + b"1," * 2_000_000 + b"1]",
        b"[" + b'"",' * 1_300_000 + b"1]",
        b"[" + b'"\\\\",' * 700_000 + b"1]",
        b"{" + b'"a":1,' * 99_000 + b'"a":1}',
        b'{"a":"' + b'\\"' * 1_500_000 + b'"',
    ],
)
def test_a_hostile_4_mib_body_is_refused_soon(body):
    """At most thrice the time of the largest ordinary one: a ratio, as the machine is shared."""
    ordinary = b"[" + b"1," * 99_998 + b"1]"
    took, least = [], []
    for _ in range(3):
        start = time.thread_time()
        check(ordinary)
        least.append(time.thread_time() - start)
        start = time.thread_time()
        with pytest.raises(Malformed):
            check(body)
        took.append(time.thread_time() - start)
    assert min(took) < 3 * min(least)


@given(VALUES)
def test_what_passes_is_read_alike_by_the_dialects_decoder(value):
    body = msgspec.json.encode(value)
    try:
        check(body)
    except Malformed:
        return
    assert msgspec.json.decode(body) == json.loads(body)


LONG = "QUJD" * (40 * KIB)
"""160 KiB of base64: long enough to be cut."""
JUNK = st.sampled_from(
    ['"', "\\", "\\n", "\\u0041", ",", "[", "]", "{", "}", ":", " ", "1", "\x00", "é", "=="]
)


@given(
    st.integers(0, len(LONG) + 30),
    JUNK,
    st.sampled_from(["", "x", '"', '","', '":"', "data:image/png;base64,"]),
)
def test_long_strings_are_judged_as_if_they_were_read_whole(at, junk, prefix):
    body = '{"a":[1,"' + prefix + LONG + '"],"b":"' + LONG + '","c":[]}'
    body = body[:at] + junk + body[at:]
    try:
        json.loads(body, object_pairs_hook=_unique_or_fail)
    except ValueError:
        wanted = False
    else:
        wanted = True
    try:
        check(body.encode())
        msgspec.json.decode(body.encode())  # the dialect's decoder is the second reader
    except (Malformed, msgspec.DecodeError):
        assert not wanted
    else:
        assert wanted


def _unique_or_fail(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("twice")
    return dict(pairs)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"' + LONG + '":1,"' + LONG + '":2}', "twice"),
        ('{"' + LONG + '"  :1,"' + LONG + '"\n:2}', "twice"),
        ("[" + "1" * 200_000 + "]", "digits"),
        ('["a",' + "1," * 99_999 + '1,"b"]', "values"),
        ('["' + LONG + '"' + LONG + '"a"]', "invalid JSON"),
    ],
)
def test_what_is_long_is_not_overlooked(body, words):
    with pytest.raises(Malformed, match=words):
        check(body.encode())


def test_a_long_string_beside_a_longer_one():
    check(json.dumps(["a" * (2 * MIB), "b" * MIB]).encode())
    with pytest.raises(Malformed, match="longer"):
        check(json.dumps(["b" * MIB, "a" * (2 * MIB + 1)]).encode())
    with pytest.raises(Malformed, match="longer"):  # not plain, so it is read whole
        check(json.dumps(["b" * MIB, "\n" + "a" * (2 * MIB)]).encode())
