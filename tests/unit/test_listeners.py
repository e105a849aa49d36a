"""Addresses of the API: TLS off loopback, taken ports are said."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator

import pytest

from ollama_distributed.base.errors import Conflict, Invalid
from ollama_distributed.node.listeners import (
    MOST_FILES,
    Address,
    allow_files,
    bind,
    bind_all,
    bound,
    parse_address,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080)),
        ("[::1]:80", Address("::1", 80)),
        (":9", Address("127.0.0.1", 9)),
        ("localhost:0", Address("localhost", 0)),
        ("localhost", Address("localhost", 8080)),
        ("[::1]", Address("::1", 8080)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["0.0.0.0:8080", "[::]:8080", "192.168.1.4:80", "example.org:80", "0:80", "8.8.8.8"]
)
def test_what_others_reach_has_tls(text: str) -> None:
    address = parse_address(text)
    assert address.secure
    assert address.url.startswith("https://")


@pytest.mark.parametrize("text", ["127.0.0.1:8080", "[::1]:80", "localhost", "127.7.7.7:1"])
def test_loopback_is_plain(text: str) -> None:
    assert parse_address(text).url.startswith("http://")


@pytest.mark.parametrize("text", ["127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:", "127.0.0.1:-1", "8081"])
def test_a_wrong_port_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="HOST:PORT"):
        parse_address(text)


@pytest.fixture
def taken() -> Iterator[Address]:
    listener = bind(Address("127.0.0.1", 0))
    try:
        yield bound(listener)
    finally:
        listener.close()


def close(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def test_a_chosen_port_that_is_taken_is_an_error(taken: Address) -> None:
    with pytest.raises(Conflict, match="taken by another program"):
        bind_all(["127.0.0.1:0", str(taken)], chosen=True)


def test_a_default_port_that_is_taken_moves_or_is_left_out(taken: Address) -> None:
    moved = bind_all([str(taken)], chosen=False)
    left_out = bind_all(["127.0.0.1:0", str(taken)], chosen=False)
    try:
        assert bound(moved[0]).port not in (0, taken.port)
        assert len(left_out) == 1
    finally:
        close(moved + left_out)


@pytest.mark.parametrize(
    ("soft", "hard", "allowed"),
    [
        (1024, 20_000, 20_000),
        (1024, 1_048_576, MOST_FILES),
        (1024, resource.RLIM_INFINITY, MOST_FILES),
        (100_000, 200_000, 100_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_a_node_opens_as_many_files_as_it_may(
    soft: int, hard: int, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert allow_files() == allowed
    assert limits[-1] == (allowed, hard)
