"""Published flaws of other products, each tried on ours in its own way: what is asked outside, what reaches a
runner, what a web server reads (S-04, S-09, S-13, S-14, S-15)."""

from __future__ import annotations

import asyncio
import json
import os
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from tests.access_world import exchanged
from tests.gateway_bench import HELLO, gateway, request_bytes, talking
from tests.limits import SOON_S
from tests.unit.test_runner_fields import BODIES, CONTEXT, SPEC, carried

from ollama_distributed.adapters.egress.addresses import is_public
from ollama_distributed.adapters.egress.client import EgressClient
from ollama_distributed.adapters.egress.urls import parse_url, resolve
from ollama_distributed.adapters.engines.llamacpp.schema import check_schema
from ollama_distributed.adapters.registry.challenge import parse_challenge
from ollama_distributed.adapters.registry.sites import BUILT_IN, RegistrySite, Sites
from ollama_distributed.base.errors import Forbidden, Invalid, OllamaDistributedError, Unsupported
from ollama_distributed.base.inference import TextPrompt
from ollama_distributed.gateway.dialects.table import HOT_ROUTES
from ollama_distributed.gateway.jsonguard import JsonGuard
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.multipart import MOST_FIELD_BYTES, Multipart
from ollama_distributed.models.names import ModelName
from ollama_distributed.node import data_dir
from ollama_distributed.node.listeners import parse_address
from ollama_distributed.node.settings import read_settings
from ollama_distributed.serving import prompts
from ollama_distributed.testing.inference import ScriptedInference

REGISTRY = parse_url("https://registry.ollama.ai/v2/library/x/blobs/sha256:ab")


# ── what is asked outside (S-09) ─────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        # LocalAI: a model's address may be a file.
        pytest.param("file:///etc/passwd", id="CVE-2024-6095"),
        # LocalAI: and a service on its own machine.
        pytest.param("http://localhost:2375/containers/json", id="CVE-2026-59707"),
        # Open WebUI: the check read one host in it, the client another.
        pytest.param("https://127.0.0.1\\@registry.ollama.ai/", id="CVE-2026-45400"),
        # Dragonfly: the manager fetched what it was asked to, from its own network too.
        pytest.param("http://169.254.169.254/latest/meta-data/iam/", id="CVE-2025-59346"),
    ],
)
def test_nobody_has_us_ask(url: str) -> None:
    with pytest.raises(Forbidden):
        EgressClient().check(parse_url(url))


@pytest.mark.parametrize(
    "location",
    [
        # Ollama, pull: a download led on to a service behind the firewall.
        pytest.param("http://127.0.0.1:6379/", id="CVE-2026-5530"),
        # Ollama, pull of tensors: the same in the newer code.
        pytest.param("https://10.0.0.1/", id="CVE-2026-85180"),
        # LocalAI: the check of the first address was not made again.
        pytest.param("http://169.254.169.254/latest/user-data", id="CVE-2026-114493"),
        # Open WebUI: likewise.
        pytest.param("//192.168.0.1/admin", id="CVE-2026-45401"),
        # Consul: a health check was led to its own agent.
        pytest.param("http://127.0.0.1:8500/v1/agent/self", id="CVE-2022-29153"),
    ],
)
def test_a_redirect_is_looked_at_anew(location: str) -> None:
    with pytest.raises(Forbidden):
        EgressClient().check(resolve(REGISTRY, location), REGISTRY)


def test_cve_2026_70485_an_address_inside_another() -> None:
    """Open WebUI: one of this machine inside one of IPv6, by way of NAT64."""
    assert not is_public(ip_address("64:ff9b::7f00:1"))


def test_cve_2026_108836_a_model_s_name_is_no_way_to_a_host() -> None:
    """Ollama: the host that a model's name begins with was asked, whatever it is."""
    sites = Sites(BUILT_IN)
    for host in ("169.254.169.254", "127.0.0.1:6379", "localhost:2375", "10.0.0.1"):
        with pytest.raises(Forbidden):
            sites.of(ModelName.parse(f"{host}/latest/meta-data:x"))


@pytest.mark.parametrize(
    "header",
    [
        # Ollama: the token of one registry went to the realm that another named.
        pytest.param(
            'Bearer realm="https://evil.example/token",service="registry.ollama.ai"', id="CVE-2025-51471"
        ),
        # oras-go: a realm whose name ends like the registry's.
        pytest.param('Bearer realm="https://registry.ollama.ai.evil.example/token"', id="CVE-2026-48978"),
    ],
)
def test_credentials_go_to_their_own_realm(header: str) -> None:
    challenge = parse_challenge(header)
    assert challenge is not None
    site = RegistrySite(host="registry.ollama.ai", auth_hosts=("ollama.com",), signed=True)
    assert not Sites((site,)).may_give_tokens(site, parse_url(challenge.realm))
    assert Sites((site,)).may_give_tokens(site, parse_url("https://ollama.com/token"))


# ── what reaches a runner (S-04, S-13) ───────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        # llama-server: a field of the body chose the parser of answers, and what it does.
        pytest.param({"chat_parser": "canary4711"}, id="CVE-2026-107183"),
        # llama-server: a negative count was subtracted from the context.
        pytest.param({"n_discard": -4711, "options": {"n_discard": -4711}}, id="CVE-2026-21869"),
        # llama-server: a slot was restored from a file that the request names.
        pytest.param(
            {"filename": "../canary4711", "action": "restore", "id_slot": 4711}, id="CVE-2026-43629"
        ),
        # vLLM: keywords for the template overrode those of the server.
        pytest.param({"chat_template_kwargs": {"tokenize": "canary4711"}}, id="CVE-2025-62426"),
        # vLLM: and those for reading images and films.
        pytest.param({"media_io_kwargs": {"video": {"num_frames": 4711}}}, id="CVE-2026-105760"),
        # LiteLLM: a request chose the server that it goes to, with the keys for another.
        pytest.param({"api_base": "https://canary4711.example"}, id="CVE-2024-6587"),
        # LiteLLM: and again, one level down.
        pytest.param(
            {"user_config": {"model_list": [{"api_base": "https://canary4711.example"}]}},
            id="PYSEC-2026-4070",
        ),
    ],
)
def test_a_field_that_is_not_ours_goes_no_further(fields: dict[str, Any]) -> None:
    for route in HOT_ROUTES:
        try:
            call = route.parse(json.dumps(BODIES[route.path] | fields).encode(), CONTEXT)
        except OllamaDistributedError:
            continue
        assert "4711" not in carried(call), route.path


@pytest.mark.parametrize(
    "template",
    [
        # llama-cpp-python: Jinja without a sandbox.
        pytest.param(
            "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
            "{{ x()._module.__builtins__['__import__']('os').popen('id').read() }}{% endif %}{% endfor %}",
            id="CVE-2024-34359",
        ),
        # SGLang: likewise, where documents are ranked.
        pytest.param(
            'The answer can only be "yes" or "no". {{ cycler.__init__.__globals__.os.popen("id").read() }}',
            id="CVE-2026-5760",
        ),
        # LiteLLM: likewise, of prompts.
        pytest.param("{{ lipsum.__globals__['os'].popen('id').read() }}", id="CVE-2026-42203"),
    ],
)
def test_a_template_of_others_is_not_rendered(template: str) -> None:
    with pytest.raises(Unsupported):
        prompts.with_template(SPEC, TextPrompt(text="p", template=template))


def test_cve_2025_54381_an_image_is_not_fetched() -> None:
    """BentoML: where a file is uploaded, an address could be given, and was fetched."""
    url = "http://169.254.169.254/latest/meta-data"
    parts = {
        "/v1/chat/completions": ("messages", {"type": "image_url", "image_url": {"url": url}}),
        "/v1/responses": ("input", {"type": "input_image", "image_url": url}),
        "/v1/messages": ("messages", {"type": "image", "source": {"type": "url", "url": url}}),
    }
    for route in HOT_ROUTES:
        if route.path in parts:
            field, part = parts[route.path]
            body = BODIES[route.path] | {field: [{"role": "user", "content": [part]}]}
            with pytest.raises(Invalid):
                route.parse(json.dumps(body).encode(), CONTEXT)


def test_cve_2025_29770_no_grammar_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM: each grammar that was ever asked for was kept, on the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for number in range(200):
        check_schema(
            {"type": "object", "properties": {f"p{number}": {"type": "string", "maxLength": number}}}
        )
    assert not list(tmp_path.rglob("*"))


# ── where it listens, what it writes (S-14) ──────────────────────────────────────────


def test_cve_2025_30202_nobody_else_reaches_a_fresh_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM: the socket on which a node publishes to its own was bound to every interface."""
    for name in [one for one in os.environ if one.startswith("OLLAMA")]:
        monkeypatch.delenv(name)
    assert not any(address.secure for address in map(parse_address, read_settings().listen))


def test_cve_2025_59349_a_node_s_folder_is_its_own(tmp_path: Path) -> None:
    """Dragonfly: folders that everyone on the machine could write to."""
    before = os.umask(0)
    try:
        with data_dir.locked(tmp_path / "data"):
            assert (tmp_path / "data").stat().st_mode & 0o077 == 0
    finally:
        os.umask(before)


# ── what a web server reads (S-15) ───────────────────────────────────────────────────


@pytest.mark.anyio
async def test_cve_2025_62727_ranges_of_a_page_are_not_merged() -> None:
    """Starlette: merging thousands of ranges of one file took minutes."""
    said = "bytes=" + ",".join(f"{at}-{at}" for at in range(0, 40_000, 2))
    app = gateway(ScriptedInference(HELLO))
    plain = await exchanged(app, "GET", "/docs", {"accept": "text/html"})
    asked = await exchanged(app, "GET", "/docs", {"accept": "text/html", "range": said})
    assert asked[0] == plain[0] == 200
    assert asked[2] == plain[2]


def test_cve_2024_47874_a_field_of_a_form_is_bounded() -> None:
    """Starlette: a part of a form that is no file could be of any size, in memory."""
    form = Multipart(b"b")
    form.feed(b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n')
    for _ in range(MOST_FIELD_BYTES // 1024):
        form.feed(b"y" * 1024)
    with pytest.raises(Invalid):
        form.feed(b"y" * 1024)


@pytest.mark.parametrize(
    "body",
    [
        # Vault: a body that is small and deep took all memory and processor there is.
        pytest.param(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, id="CVE-2025-6203"),
        # Vault: the bound on it was looked at behind the parser.
        pytest.param(b'{"a":[' + b"{}," * 200_000 + b"{}]}", id="CVE-2025-12044"),
    ],
)
def test_json_is_bounded_before_it_is_read(body: bytes) -> None:
    with pytest.raises(Invalid):
        JsonGuard(Limits()).check(body, max_string=1 << 20)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/api/generate", "/api/show"])
async def test_cve_2025_43859_a_chunk_ends_as_it_must(path: str) -> None:
    """h11: the two bytes behind a chunk were not looked at, and what is a request to one server was the body
    of another's."""
    inference = ScriptedInference(HELLO)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    async with talking(inference, "fast") as client:
        await client.send(head + b"2\r\n{}XX0\r\n\r\n" + request_bytes("GET", "/api/version"))
        assert (await client.answer()).status == 400
        assert await client.closed()
    assert not inference.requests


UPGRADE = (
    b"GET /api/v1/ws HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "frame",
    [
        # NATS: what a compressed message unpacks to was held before anyone had signed in.
        pytest.param(b"\xc1\xff" + (1 << 20).to_bytes(8, "big"), id="CVE-2026-27571"),
        # NATS: a frame said that it is longer than any number of the server's.
        pytest.param(b"\x81\xff" + ((1 << 64) - 1).to_bytes(8, "big"), id="CVE-2026-27889"),
    ],
)
async def test_a_websocket_unpacks_nothing_and_takes_no_length_on_trust(frame: bytes) -> None:
    async with talking(ScriptedInference(HELLO), "fast") as client:
        await client.send(UPGRADE)
        status, headers = await client.head()
        assert status == 101
        assert "sec-websocket-extensions" not in headers
        await client.send(frame + b"\0\0\0\0" + b"x" * 64)
        async with asyncio.timeout(SOON_S):
            said = await client.reader.read()
        assert said[:1] == b"\x88", "a close frame, and the end"
        assert int.from_bytes(said[2:4], "big") in (1002, 1009)
