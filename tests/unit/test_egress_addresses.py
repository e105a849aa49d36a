"""Which addresses and URLs a request may go to: a corpus of tricks, none of which may pass."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.egress.addresses import is_public, is_reachable
from ollama_distributed.adapters.egress.client import EgressClient, Site
from ollama_distributed.adapters.egress.urls import Url, parse_host, parse_url, resolve
from ollama_distributed.base.errors import Forbidden

PRIVATE = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.1.2.3
169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1
192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.255
240.0.0.1 255.255.255.255 168.63.129.16
:: ::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::7f00:1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b::a00:1
64:ff9b:1::808:808 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:10::1 2001:20::1 2001:db8::1
2002:7f00:1:: 2002:a9fe:a9fe::1 2002:808:808::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fd12:3456::1
fe80::1 fe80::1%1 fec0::1 ff02::1 ff0e::1 4000::1
""".split()  # noqa: SIM905
PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1 169.253.255.255
172.15.255.255 172.32.0.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 223.255.255.255
2606:4700::1111 2a00:1450:4001::1 2001:4860:4860::8888 64:ff9b::808:808
""".split()  # noqa: SIM905


@pytest.mark.parametrize("text", PRIVATE)
def test_set_apart_addresses_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are(text: str) -> None:
    assert is_public(ip_address(text))
    assert is_reachable(ip_address(text))


@given(st.ip_addresses(v=4))
def test_public_is_never_more_than_python_thinks(address: IPv4Address) -> None:
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast


@given(st.ip_addresses(v=4))
def test_an_address_inside_another_is_no_way_around(address: IPv4Address) -> None:
    bits = int(address)
    assert is_public(IPv6Address((0x64FF9B << 96) | bits)) == is_public(address)
    assert not is_public(IPv6Address((0xFFFF << 32) | bits))
    assert not is_public(IPv6Address((0x2002 << 112) | (bits << 80)))
    assert is_reachable(IPv6Address((0xFFFF << 32) | bits)) == is_reachable(address)


@pytest.mark.parametrize("text", ["10.0.0.1", "127.0.0.1", "192.168.1.1", "100.64.1.1", "::1", "fd12::1"])
def test_private_networks_can_be_configured(text: str) -> None:
    assert is_reachable(ip_address(text))


NEVER = """
169.254.169.254 0.0.0.0 0.1.1.1 224.0.0.1 255.255.255.255 :: fe80::1 fe80::1%2 ff02::1 fd00:ec2::254
100.100.100.200 192.0.0.192 168.63.129.16 ::ffff:169.254.169.254 64:ff9b::a9fe:a9fe
""".split()  # noqa: SIM905


@pytest.mark.parametrize("text", NEVER)
def test_metadata_services_never_can(text: str) -> None:
    assert not is_reachable(ip_address(text))


# ruff: noqa: RUF001
BAD_URLS = r"""
file:///etc/passwd
FILE:///etc/passwd
ftp://registry.ollama.ai/x
gopher://127.0.0.1:6379/_x
dict://127.0.0.1:11211/
ldap://127.0.0.1/
data:text/plain,x
javascript:alert(1)
unix:///var/run/docker.sock
http+unix://%2Fvar%2Frun%2Fdocker.sock/x
jar:http://a/!/
netdoc:///etc/passwd
//evil.example/x
/x
x
http:
https:
http://
https:///x
https:/evil.example/x
https:evil.example/x
https://?x
https://#x
https://user@registry.ollama.ai/
https://user:pass@registry.ollama.ai/
https://registry.ollama.ai@127.0.0.1/
https://127.0.0.1:80@registry.ollama.ai/
https://registry.ollama.ai:443@127.0.0.1/
https://registry.ollama.ai\@127.0.0.1/
https://127.0.0.1\@registry.ollama.ai/
https:\\127.0.0.1\x
https:/\127.0.0.1/
https://127.0.0.1\.registry.ollama.ai/
https://0x7f000001/
https://0x7f.0.0.1/
https://0x7f.1/
https://2130706433/
https://017700000001/
https://0177.0.0.1/
https://127.1/
https://127.0.1/
https://127.0.0.01/
https://127.0.0.1./
https://1.2.3.4.5/
https://256.0.0.1/
https://127.0.0.1%00/
https://127.0.0.1%2f/
https://127.0.0.1%23.evil.example/
https://registry.ollama.ai%2eevil.example/
https://registry.ollama.ai./
https://.registry.ollama.ai/
https://registry..ollama.ai/
https://-registry.ollama.ai/
https://registry-.ollama.ai/
https://[::1/
https://::1/
https://[::1]x/
https://[::1]:/
https://[::1%25eth0]/
https://[fe80::1%1]/
https://[::ffff:127.0.0.1.2]/
https://[127.0.0.1]/
https://[v1.x]/
https://[]/
https://registry.ollama.ai:/
https://registry.ollama.ai:0/
https://registry.ollama.ai:00443/
https://registry.ollama.ai:65536/
https://registry.ollama.ai:99999/
https://registry.ollama.ai:443:443/
https://registry.ollama.ai:+443/
https://registry.ollama.ai:-1/
https://registry.ollama.ai:4 43/
https://registry.ollama.ai:４４３/
https://ｒegistry.ollama.ai/
https://registry。ollama。ai/
https://①②⑦.⓪.⓪.①/
https://registry.ollama.ai/ x
https://registry.ollama.ai/	x
https:// registry.ollama.ai/
https://regi stry.ollama.ai/
https://registry.ollama.ai/\..\x
https://localhost\
https://evil.example;registry.ollama.ai/
https://evil.example,registry.ollama.ai/
https://evil.example&registry.ollama.ai/
https://evil.example|registry.ollama.ai/
https://evil.example"registry.ollama.ai/
https://evil.example'registry.ollama.ai/
https://evil.example<registry.ollama.ai/
https://evil.example^registry.ollama.ai/
https://evil.example`registry.ollama.ai/
https://evil.example{registry.ollama.ai/
https://evil.example*registry.ollama.ai/
https://evil.example$registry.ollama.ai/
https://evil.example!registry.ollama.ai/
https://evil.example(registry.ollama.ai/
https://evil.example=registry.ollama.ai/
https://evil.example+registry.ollama.ai/
https://evil.example~registry.ollama.ai/
htttps://registry.ollama.ai/
https;//registry.ollama.ai/
http\://registry.ollama.ai/
URL:https://registry.ollama.ai/
""".strip("\n").split("\n")

UNASKED = """
http://registry.ollama.ai/
http://registry.ollama.ai:443/
https://registry.ollama.ai:80/
https://registry.ollama.ai:22/
https://registry.ollama.ai:5000/
https://evil.example:8443/
https://127.0.0.1/
https://127.0.0.1:443/
https://10.0.0.1/
https://8.8.8.8/
https://169.254.169.254/latest/meta-data/
http://169.254.169.254/latest/meta-data/
http://metadata.google.internal/computeMetadata/v1/
https://[::1]/
https://[2606:4700::1111]/
https://[::ffff:169.254.169.254]/
https://[64:ff9b::a9fe:a9fe]/
http://localhost/
http://localhost:11434/api/tags
http://127.0.0.1:5000/v2/
""".split()  # noqa: SIM905


def test_the_corpus_is_large_enough() -> None:
    assert len(BAD_URLS) + len(UNASKED) >= 120


@pytest.mark.parametrize("text", [*BAD_URLS, "https://x/\r\nHost: y", "https://x\x00/", "https://x/\x7f"])
def test_what_others_may_read_differently_is_no_url(text: str) -> None:
    with pytest.raises(Forbidden):
        parse_url(text)


@pytest.mark.parametrize("text", UNASKED)
def test_what_nobody_configured_is_not_asked(text: str) -> None:
    with pytest.raises(Forbidden):
        EgressClient().check(parse_url(text))


def test_plain_urls_are_read() -> None:
    url = parse_url("HTTPS://Registry.Ollama.AI/v2/library/x/blobs/sha256:ab?a=b%20c#part")
    assert url == Url("https", "registry.ollama.ai", 443, "/v2/library/x/blobs/sha256:ab?a=b%20c")
    assert str(url) == "https://registry.ollama.ai/v2/library/x/blobs/sha256:ab?a=b%20c"
    assert url.without_query == "https://registry.ollama.ai/v2/library/x/blobs/sha256:ab"
    assert parse_url("http://[2001:DB8::1]:5000") == Url("http", "2001:db8::1", 5000, "/")
    assert parse_url("http://[2001:DB8::1]:5000").site == "[2001:db8::1]:5000"
    assert parse_url("https://a.example?x=1").target == "/?x=1"
    assert url.with_query(("digest", "sha256:ab")).target.endswith("?a=b%20c&digest=sha256%3Aab")


def test_redirects_are_resolved_and_read_anew() -> None:
    base = parse_url("https://registry.example/v2/a/b/blobs/x")
    assert str(resolve(base, "/c?d")) == "https://registry.example/c?d"
    assert str(resolve(base, "y")) == "https://registry.example/v2/a/b/blobs/y"
    assert resolve(base, "//cdn.example/y").host == "cdn.example"
    for location in (
        "file:///etc/passwd",
        "//user@x/",
        "https://127.1/",
        "\\\\x\\y",
        "https:\\\\x",
        "//x\t/",
    ):
        with pytest.raises(Forbidden):
            resolve(base, location)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for whole in (text, f"https://{text}", f"https://registry.example/{text}"):
        try:
            url = parse_url(whole)
        except Forbidden:
            continue
        assert parse_url(str(url)) == url
        assert parse_host(url.site, url.port) == (url.host, url.port)


def test_configured_sites() -> None:
    plain = Site(host="registry.lan", port=5000, insecure=True, private=True)
    client = EgressClient([plain, Site(host="public.example", port=5443)])
    client.check(parse_url("http://registry.lan:5000/v2/"))
    client.check(parse_url("https://public.example:5443/v2/"))
    with pytest.raises(Forbidden, match="insecure protocol http"):
        client.check(parse_url("http://public.example:5443/v2/"))
    with pytest.raises(Forbidden):
        client.check(parse_url("http://registry.lan:5001/v2/"))
    with pytest.raises(Forbidden, match="sends us to the private"):
        client.check(parse_url("http://registry.lan:5000/x"), parse_url("https://public.example:5443/v2/"))
    client.check(parse_url("http://registry.lan:5000/x"), parse_url("http://registry.lan:5000/v2/"))
