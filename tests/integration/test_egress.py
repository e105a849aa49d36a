"""The one way out against servers that lie, wait, flood and point elsewhere."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.limits import SOON_S
from tests.registries import Answer, Asked, RegistryDouble

from ollama_distributed.adapters.egress.addresses import Address
from ollama_distributed.adapters.egress.client import EgressClient, Patience, Site
from ollama_distributed.adapters.egress.urls import Url, parse_url
from ollama_distributed.base.errors import DeadlineExceeded, Forbidden, RegistryError, Unavailable

pytestmark = pytest.mark.integration

SHORT = Patience(connect_s=SOON_S, head_s=0.5, stall_s=0.5, stall_bytes=1000)
WITH_A_HEAD = Patience(connect_s=SOON_S, head_s=SOON_S, stall_s=2.0, stall_bytes=1000)
"""Longer than what comes at once takes on a machine that is slow for a moment."""
SECRET = "Bearer secret"


def site(server: RegistryDouble, host: str = "127.0.0.1") -> Site:
    return Site(host=host, port=server.port, insecure=True, private=True)


def url(server: RegistryDouble, path: str = "/x", host: str = "127.0.0.1") -> Url:
    return parse_url(f"http://{host}:{server.port}{path}")


class Names:
    """A resolver that knows what it was told, and what it was asked."""

    def __init__(self, **names: Sequence[str]) -> None:
        self.names = names
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[Address]:
        self.asked.append(host)
        return [ip_address(text) for text in self.names[host.replace(".", "_")]]


@asynccontextmanager
async def two() -> AsyncIterator[tuple[RegistryDouble, RegistryDouble]]:
    async with RegistryDouble().listening() as one, RegistryDouble().listening() as other:
        yield one, other


async def test_an_answer_is_read_and_a_connection_kept() -> None:
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: Answer(200, b"hello", {"X-Word": "yes"})
        async with EgressClient([site(server)]) as client:
            for _ in range(3):
                async with client.send("GET", url(server), authorization=SECRET) as response:
                    assert response.headers["x-word"] == "yes"
                    assert await response.read(10) == b"hello"
    asked = server.asked[0]
    assert asked.headers["authorization"] == SECRET
    assert asked.headers["host"] == server.host
    assert asked.headers["accept-encoding"] == "identity"


async def test_credentials_stay_with_their_origin() -> None:
    async with two() as (one, other):
        one.hook = lambda asked: (
            Answer(307, headers={"location": "/there"})
            if asked.path == "/x"
            else Answer(307, headers={"location": f"http://{other.host}/y"})
        )
        other.hook = lambda asked: (
            Answer(302, headers={"location": f"http://{one.host}/again"})
            if asked.path == "/y"
            else Answer(200, b"here")
        )
        one_again = one.hook
        one.hook = lambda asked: Answer(200, b"back") if asked.path == "/again" else one_again(asked)  # type: ignore[return-value]
        async with (
            EgressClient([site(one), site(other)]) as client,
            client.send("GET", url(one), authorization=SECRET) as response,
        ):
            assert await response.read(10) == b"back"
            assert str(response.url) == f"http://{one.host}/again"
    assert [asked.headers.get("authorization") for asked in one.asked] == [SECRET, SECRET, None]
    assert [asked.headers.get("authorization") for asked in other.asked] == [None]


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/iam",
        "https://169.254.169.254/latest",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "http://localhost:11434/api/tags",
        "http://127.0.0.1:{trap}/",
        "https://127.0.0.1:{trap}/",
        "https://127.0.0.1/",
        "https://rebound.example/x",
        "https://mixed.example/x",
        "https://mapped.example/x",
        "https://nat64.example/x",
        "https://v6.example/x",
        "//127.0.0.1:{trap}/",
        "https://user:pass@public.example/",
        "https://2130706433/",
        "https://public.example:22/",
        "http://public.example/",
        "",
        "\\\\127.0.0.1\\x",
    ],
)
async def test_a_redirect_leads_nowhere_it_may_not(location: str) -> None:
    names = Names(
        rebound_example=["127.0.0.1"],
        mixed_example=["93.184.215.14", "10.0.0.1"],
        mapped_example=["::ffff:127.0.0.1"],
        nat64_example=["64:ff9b::7f00:1"],
        v6_example=["fd12::1"],
        public_example=["93.184.215.14"],
    )
    async with two() as (server, trap):
        place = location.format(trap=trap.port)
        server.hook = lambda _: Answer(302, headers={"location": place})
        async with EgressClient([site(server)], resolver=names) as client:
            with pytest.raises((Forbidden, RegistryError)):
                async with client.send("GET", url(server), authorization=SECRET):
                    pass
    assert trap.asked == []


async def test_a_public_host_may_not_send_us_to_a_configured_private_one() -> None:
    async with two() as (public, private):
        # Named, but not as private: its addresses must be public, as those of any stranger.
        stranger = Site(host="127.0.0.1", port=public.port, insecure=True)
        async with EgressClient([stranger, site(private)]) as client:
            with pytest.raises(Forbidden, match="no public address"):
                async with client.send("GET", url(public)):
                    pass
            with pytest.raises(Forbidden, match="sends us to the private"):
                client.check(url(private), url(public))
    assert public.asked == private.asked == []


async def test_redirects_end() -> None:
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: Answer(302, headers={"location": "/x"})
        async with EgressClient([site(server)]) as client:
            with pytest.raises(RegistryError, match="too often"):
                async with client.send("GET", url(server)):
                    pass
    assert len(server.asked) == 4


async def test_a_name_is_looked_up_once_for_a_connection_and_not_believed_later() -> None:
    names = Names(registry_lan=["127.0.0.1"])
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: Answer(200, b"x")
        async with EgressClient([site(server, "registry.lan")], resolver=names) as client:
            for _ in range(2):
                async with client.send("GET", url(server, host="registry.lan")) as response:
                    await response.read(10)
            assert names.asked == ["registry.lan"]
            names.names["registry_lan"] = ["169.254.169.254"]
            async with client.send("GET", url(server, host="registry.lan")) as response:
                await response.read(10)
            server.hook = lambda _: Answer(200, b"x", {"connection": "close"})
            async with client.send("GET", url(server, host="registry.lan")) as response:
                await response.read(10)
            with pytest.raises(Forbidden, match=r"169\.254\.169\.254"):
                async with client.send("GET", url(server, host="registry.lan")):
                    pass
    assert names.asked == ["registry.lan", "registry.lan"]


async def test_posts_are_not_redirected() -> None:
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: Answer(307, headers={"location": "/elsewhere"})
        async with (
            EgressClient([site(server)]) as client,
            client.send("POST", url(server), content=b"body") as response,
        ):
            assert response.status == 307
    assert [asked.path for asked in server.asked] == ["/x"]


# ── slow, long, torn ────────────────────────────────────────────────────────────────


async def test_an_answer_that_does_not_come() -> None:
    async def wait(_: Asked) -> None:
        await asyncio.Event().wait()

    async with RegistryDouble().listening() as server:
        server.hook = wait
        async with EgressClient([site(server)], patience=SHORT) as client:
            with pytest.raises((DeadlineExceeded, Unavailable)):
                async with client.send("GET", url(server)):
                    pass


async def test_an_answer_that_trickles() -> None:
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: Answer(200, b"x" * 10_000, piece=1, pause_s=0.05)
        async with (
            EgressClient([site(server)], patience=WITH_A_HEAD) as client,
            client.send("GET", url(server)) as response,
        ):
            with pytest.raises(Unavailable, match="too slowly"):
                async for _ in response.chunks():
                    pass


async def test_a_slow_reader_is_not_the_senders_fault() -> None:
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: Answer(200, b"x" * 400_000)
        async with (
            EgressClient([site(server)], patience=WITH_A_HEAD) as client,
            client.send("GET", url(server)) as response,
        ):
            total = 0
            async for chunk in response.chunks():
                if not total:
                    await asyncio.sleep(1.25 * WITH_A_HEAD.stall_s)
                total += len(chunk)
    assert total == 400_000


async def test_more_than_may_be_read() -> None:
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: Answer(200, b"x" * 100_000)
        async with (
            EgressClient([site(server)]) as client,
            client.send("GET", url(server)) as response,
        ):
            with pytest.raises(RegistryError, match="more than 1000 bytes"):
                await response.read(1000)


@pytest.mark.parametrize("answer", [Answer(200, b"x" * 100, cut=50), Answer(200, b"", length=10, cut=0)])
async def test_a_torn_answer(answer: Answer) -> None:
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: answer
        async with EgressClient([site(server)]) as client:
            with pytest.raises(Unavailable):
                async with client.send("GET", url(server)) as response:
                    await response.read(1000)


async def test_nothing_is_unpacked() -> None:
    async with RegistryDouble().listening() as server:
        server.hook = lambda _: Answer(200, b"\x1f\x8b", {"content-encoding": "gzip"})
        async with (
            EgressClient([site(server)]) as client,
            client.send("GET", url(server)) as response,
        ):
            with pytest.raises(RegistryError, match="compressed"):
                await response.read(1000)


async def test_nobody_there() -> None:
    async with RegistryDouble().listening() as server:
        pass
    async with EgressClient([site(server)]) as client:
        with pytest.raises(Unavailable, match="cannot be reached"):
            async with client.send("GET", url(server)):
                pass


async def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two() as (server, proxy):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
        server.hook = lambda _: Answer(200, b"x")
        async with (
            EgressClient([site(server)]) as client,
            client.send("GET", url(server)) as response,
        ):
            await response.read(10)
    assert proxy.asked == []


# ── TLS ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file with key and certificate of `registry.lan`, which is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "registry.lan")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("registry.lan")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "registry.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


@pytest.mark.parametrize(
    ("host", "trusts", "reached"),
    [("registry.lan", True, True), ("other.lan", True, False), ("registry.lan", False, False)],
)
async def test_tls_checks_the_name_that_was_asked(
    certificate: Path, host: str, trusts: bool, reached: bool
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    names = Names(registry_lan=["127.0.0.1"], other_lan=["127.0.0.1"])
    async with RegistryDouble().listening(context) as server:
        server.hook = lambda _: Answer(200, b"x")
        named = Site(host=host, port=server.port, private=True, ca=str(certificate) if trusts else None)
        async with EgressClient([named], resolver=names) as client:
            where = parse_url(f"https://{host}:{server.port}/")
            if reached:
                async with client.send("GET", where) as response:
                    assert await response.read(10) == b"x"
            else:
                with pytest.raises(Unavailable, match="certificate is not trusted"):
                    async with client.send("GET", where):
                        pass
    assert bool(server.asked) is reached
