"""The pure parts of the registry client: challenges, parts, signatures, sites; runs of bytes."""

from __future__ import annotations

import base64
import hashlib
import itertools
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.blobs.runs import Runs
from ollama_distributed.adapters.egress.urls import parse_url
from ollama_distributed.adapters.registry.challenge import Challenge, parse_challenge
from ollama_distributed.adapters.registry.parts import MAX_PART_BYTES, MIN_PART_BYTES, cut, is_answer_to
from ollama_distributed.adapters.registry.signing import RequestSigner
from ollama_distributed.adapters.registry.sites import RegistrySite, Sites
from ollama_distributed.base.errors import Forbidden, Invalid
from ollama_distributed.models.names import ModelName


@pytest.mark.parametrize(
    ("header", "challenge"),
    [
        (
            'Bearer realm="https://ollama.com/token",service="ollama.com",scope="repository:a/b:pull"',
            Challenge("bearer", "https://ollama.com/token", "ollama.com", ("repository:a/b:pull",)),
        ),
        (
            'bearer Realm = "https://x/t" , scope="repository:a/b:pull,push registry:catalog:*"',
            Challenge("bearer", "https://x/t", "", ("repository:a/b:pull,push", "registry:catalog:*")),
        ),
        (r'Bearer realm="a\"b", realm="c"', Challenge("bearer", 'a"b')),
        ('Basic realm="Registry Realm"', Challenge("basic", "Registry Realm")),
        ("Basic", Challenge("basic")),
        ("Bearer realm=plain", Challenge("bearer", "plain")),
        ("Negotiate abc", None),
        ("", None),
        ("Bearer", None),
        ("Basic " + "x" * 5000, None),
    ],
)
def test_challenges(header: str, challenge: Challenge | None) -> None:
    assert parse_challenge(header) == challenge


@given(st.text(max_size=200))
def test_any_challenge_is_read_or_refused(header: str) -> None:
    parse_challenge(header)
    parse_challenge(f'Bearer realm="{header}')


gaps = st.lists(st.integers(0, 400 << 20), max_size=8, unique=True).map(
    lambda cuts: list(zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False))
)


@given(gaps, st.integers(1, 64))
def test_parts_cover_exactly_what_is_missing(missing: list[tuple[int, int]], streams: int) -> None:
    parts = cut(missing, streams)
    assert all(0 < end - begin <= MAX_PART_BYTES for begin, end in parts)
    joined = Runs()
    for begin, end in parts:
        before = joined.total
        joined.add(begin, end)
        assert joined.total == before + end - begin, "no byte is asked for twice"
    expected = Runs()
    for begin, end in missing:
        expected.add(begin, end)
    assert list(joined) == list(expected)


def test_a_small_blob_is_one_part() -> None:
    assert cut([(0, 10)], 8) == [(0, 10)]
    assert cut([(0, MIN_PART_BYTES + 1)], 8) == [(0, MIN_PART_BYTES), (MIN_PART_BYTES, MIN_PART_BYTES + 1)]
    assert cut([], 8) == []


@pytest.mark.parametrize(
    ("header", "right"),
    [
        ("bytes 10-19/100", True),
        ("BYTES 10-19/*", True),
        ("bytes 10-18/100", False),
        ("bytes 0-19/100", False),
        ("bytes 10-19/99", False),
        ("bytes */100", False),
        ("", False),
        ("items 10-19/100", False),
        ("bytes 10-19/100, bytes 0-1/100", False),
    ],
)
def test_a_range_must_be_the_one_that_was_asked_for(header: str, right: bool) -> None:
    assert is_answer_to(10, 20, 100, header) is right


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30))
def test_runs_are_a_set_of_bytes(spans: list[tuple[int, int]]) -> None:
    runs, twin = Runs(), set[int]()
    for begin, end in spans:
        runs.add(begin, end)
        twin |= set(range(begin, end))
    assert runs.total == len(twin)
    assert {at for begin, end in runs for at in range(begin, end)} == twin
    assert {at for begin, end in runs.gaps(64) for at in range(begin, end)} == set(range(64)) - twin
    listed = list(runs)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(listed))


def test_a_key_is_made_once_and_signs_as_ollama_does(tmp_path: Path) -> None:
    file = tmp_path / "registry_key"
    signer = RequestSigner(file)
    url = "https://ollama.com/token?nonce=x&scope=a&service=b&ts=1"
    public, _, signature = signer.sign("GET", url).partition(":")
    assert file.stat().st_mode & 0o777 == 0o600
    assert signer.public_key() == f"ssh-ed25519 {public}"
    empty = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()
    key = load_ssh_public_key(f"ssh-ed25519 {public}".encode())
    key.verify(base64.b64decode(signature), f"GET,{url},{empty}".encode())  # type: ignore[union-attr, call-arg]
    assert RequestSigner(file).public_key() == signer.public_key()
    assert [path.name for path in tmp_path.iterdir()] == ["registry_key"]


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("nothing")
    with pytest.raises(Invalid, match="no SSH key"):
        RequestSigner(tmp_path / "key").sign("GET", "https://x/")


def test_only_registries_of_the_settings_are_asked() -> None:
    sites = Sites(
        [
            RegistrySite(host="registry.lan:5000", insecure=True),
            RegistrySite(host="plain.lan", insecure=True),
            RegistrySite(host="safe.example:5443", auth_hosts=("auth.example",)),
            RegistrySite(host="registry.ollama.ai", username="me", password="secret"),
        ]
    )

    def root(name: str) -> str:
        return str(sites.of(ModelName.parse(name))[1])

    assert root("registry.lan:5000/a/b") == "http://registry.lan:5000/"
    assert root("http://Registry.LAN:5000/a/b") == "http://registry.lan:5000/"
    assert root("plain.lan/a/b") == "http://plain.lan/"
    assert root("safe.example:5443/a/b:c") == "https://safe.example:5443/"
    assert root("smollm2:135m") == "https://registry.ollama.ai/"
    assert root("hf.co/a/b:Q4_K_M") == "https://hf.co/"
    assert sites.of(ModelName.parse("x"))[0].username == "me", "a named site replaces the built-in one"
    for name in (
        "evil.example/a/b",
        "registry.lan/a/b",
        "registry.lan:5001/a/b",
        "safe.example/a/b",
        "http://safe.example:5443/a/b",
        "http://x",
        "http://registry.ollama.ai/library/x",
        "file://registry.lan:5000/a/b",
        "registry.lan:5000:1/a/b",
        "127.0.0.1/a/b",
    ):
        with pytest.raises(Forbidden):
            root(name if name != "http://x" else "http://hf.co/a/x")
    safe = sites.of(ModelName.parse("safe.example:5443/a/b"))[0]
    for realm, right in (
        ("https://safe.example:5443/token", True),
        ("https://auth.example/token", True),
        ("https://safe.example/token", False),
        ("https://evil.example/token", False),
        ("https://auth.example:444/token", False),
    ):
        assert sites.may_give_tokens(safe, parse_url(realm)) is right
    with pytest.raises(Invalid, match="registries"):
        Sites([RegistrySite(host="https://x/")])
