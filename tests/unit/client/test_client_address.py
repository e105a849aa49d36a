"""`OLLAMA_HOST` and base URLs in all their forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.client import address


@pytest.mark.parametrize(
    ("text", "url"),
    [
        # ollama/ollama envconfig/config_test.go TestHost, and what a client makes of "every interface"
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":1234", "http://127.0.0.1:1234"),
        ("1.2.3.4:1234", "http://1.2.3.4:1234"),
        ("example.com", "http://example.com:11434"),
        ("example.com:1234", "http://example.com:1234"),
        ("example.com:0", "http://example.com:11434"),
        ("example.com:70000", "http://example.com:11434"),
        (":66000", "http://127.0.0.1:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::1]:1337", "http://[::1]:1337"),
        ("[0001:002:003:0004::1]:1337", "http://[1:2:3:4::1]:1337"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("http://1.2.3.4:4321", "http://1.2.3.4:4321"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("HTTPS://example.com/ollama/", "https://example.com:443/ollama"),
        ("example.com/ollama", "http://example.com:11434/ollama"),
        ("http://example.com:8080/?x=1#y", "http://example.com:8080"),
        (' "1.2.3.4" ', "http://1.2.3.4:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("[::]:8080", "http://[::1]:8080"),
        ("localhost", "http://localhost:11434"),
    ],
)
def test_every_form_of_an_address(text: str, url: str) -> None:
    assert address.base_url(text) == url


@pytest.mark.parametrize(
    "text", ["0.0.0.0", "0.0.0.0:11434", "http://0.0.0.0:8080/", "::", "[::]:11434", "'0.0.0.0'"]
)
def test_every_interface_is_told_from_an_address(text: str) -> None:
    assert address.is_everywhere(text)
    for other in ("127.0.0.1", "gpu1:0", "[::1]:11434", "", ":11434", "http://gpu1", "1.0.0.0:1"):
        assert not address.is_everywhere(other)


@pytest.mark.parametrize("text", ["ftp://x", "unix:///run/x.sock", "http://user:secret@host"])
def test_an_address_that_cannot_be_used_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        address.base_url(text)
    assert "secret" not in str(refused.value)


@given(st.text(max_size=40))
def test_any_text_gives_a_url_or_a_refusal(text: str) -> None:
    try:
        url = address.base_url(text)
    except ValueError:
        return
    assert url.startswith(("http://", "https://"))
    assert not url.endswith("/")


def test_the_environment_is_used_when_nothing_is_given() -> None:
    assert address.base_urls(None, {}) == ("http://127.0.0.1:8080",)
    assert address.base_urls(None, {"OLLAMA_HOST": "box:1"}) == ("http://box:1",)
    assert address.base_urls("there:2", {"OLLAMA_HOST": "box:1"}) == ("http://there:2",)
    assert address.base_urls(["a:1", "b:1", "a:1"], {}) == ("http://a:1", "http://b:1")
    with pytest.raises(ValueError):
        address.base_urls([], {})


def test_which_key_is_sent() -> None:
    both = {"OLLAMA_API_KEY": "theirs", "OLLAMA_DISTRIBUTED_API_KEY": "ours"}
    assert address.api_key(None, both) == "ours"
    assert address.api_key(None, {"OLLAMA_API_KEY": "theirs"}) == "theirs"
    assert address.api_key("given", both) == "given"
    assert address.api_key("", both) is None
    assert address.api_key(None, {}) is None
    with pytest.raises(ValueError):
        address.api_key("a\r\nx-evil: 1", {})


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "http://127.9.9.9:1"]
)
def test_loopback_is_told_by_spelling(url: str) -> None:
    assert address.is_loopback(url)
    assert not address.is_loopback("http://127.0.0.1.example.com:1")
