"""Published flaws of other products, each tried on ours in its own way: who is let in, and what is told
(S-06, S-07, S-08, S-10, S-11, S-12)."""

from __future__ import annotations

import datetime
import ipaddress
import json
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from tests.access_world import exchanged
from tests.gateway_bench import HELLO, gateway
from tests.unit.access.test_access_tokens import NOW as TOKENS_NOW
from tests.unit.access.test_access_tokens import World as Tokens
from tests.unit.access.test_access_tokens import made, with_hmac
from tests.unit.identity.world import NOW

from ollama_distributed.access import service, tokens
from ollama_distributed.access.keys import make_key
from ollama_distributed.access.service import Authenticator
from ollama_distributed.adapters.engines.llamacpp.slots import Slots
from ollama_distributed.base.errors import Forbidden, Unauthenticated
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, RequestId
from ollama_distributed.base.inference import InferenceRequest, TextPrompt
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.names import Names
from ollama_distributed.gateway.app import Gateway
from ollama_distributed.gateway.auditing import refused_entry
from ollama_distributed.gateway.gate import Head
from ollama_distributed.streams.kept import Kept
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

REMOTE = "192.0.2.9"
PEM = serialization.Encoding.PEM
SECRET = "canary4711"


def keyed() -> tuple[Gateway, str]:
    """An app, and the key of an admin."""
    key, record = make_key("admin", now=0.0)
    return gateway(
        ScriptedInference(HELLO),
        authenticator=Authenticator([record], require_key=False, wall=lambda: 1_700_000_000.0),
    ), key


# ── no key (S-06) ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        # Ollama: everything that changes models asked nobody who they are.
        pytest.param("POST", "/api/create", {}, id="CVE-2025-63389"),
        # Consul: a path was judged as it is written, and served as it is meant.
        pytest.param("GET", "/api/generate/../../api/v1/keys", {}, id="CVE-2024-10005"),
        # NATS: headers from outside said who asks.
        pytest.param("DELETE", "/api/delete", {"nats-request-info": '{"acc":"$SYS"}',
                     "x-forwarded-for": "127.0.0.1", "x-user-id": "admin"}, id="CVE-2026-33223"),
    ],
)  # fmt: skip
async def test_who_shows_no_key_changes_nothing(method: str, path: str, fields: Mapping[str, str]) -> None:
    app, _ = keyed()
    status, _, _ = await exchanged(app, method, path, fields, peer=REMOTE)
    assert status in (401, 404)


async def test_cve_2026_42208_a_key_is_never_more_than_a_text() -> None:
    """LiteLLM: the key of a refused call was put into SQL."""
    app, _ = keyed()
    key = "sk-x' OR '1'='1' --"
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"authorization": key}):
        status, _, body = await exchanged(app, "GET", "/api/tags", headers, peer=REMOTE)
        assert status == 401
        assert b"sk-x" not in body


async def test_cve_2025_59425_no_letter_of_a_secret_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM: the key was compared letter by letter, and the time told how many were right. Hashes share
    nothing, however much of the secret is right."""
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(service, "compare_digest", compare)
    app, key = keyed()
    for letters in (14, 20, 30, 40):
        guess = key[:letters] + "".join("0" if letter != "0" else "1" for letter in key[letters:])
        status, _, _ = await exchanged(app, "GET", "/api/tags", {"authorization": f"Bearer {guess}"})
        assert status == 401
    assert compared
    assert not any(one[:8] == other[:8] or key[13:21] in one + other for one, other in compared)


# ── browsers (S-10) ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        # Ollama: a name of the attacker's that was turned to 127.0.0.1 was as good as localhost.
        pytest.param("POST", "/api/pull", {"host": "rebound.evil.example:8080"}, id="CVE-2024-28224"),
        # Ray: a browser was known by a User-Agent that begins with Mozilla, which a page may set.
        pytest.param(
            "POST", "/api/create",
            {"host": "rebound.evil.example", "user-agent": "Other/1.0", "sec-fetch-site": "same-origin"},
            id="CVE-2025-62593",
        ),
        # LocalAI: a form of another site changed models.
        pytest.param(
            "POST", "/api/delete",
            {"origin": "https://evil.example", "content-type": "text/plain"},
            id="GO-2024-2705",
        ),
    ],
)  # fmt: skip
async def test_a_page_elsewhere_is_refused(method: str, path: str, headers: Mapping[str, str]) -> None:
    app, _ = keyed()
    status, told, _ = await exchanged(app, method, path, headers)
    assert status == 403
    assert "access-control-allow-origin" not in told


# ── tokens (S-08) ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "token",
    [
        # Vault: a token for another audience was let in beside one for ours.
        pytest.param(made(aud=["another-service", tokens.AUDIENCE]), id="CVE-2024-5798"),
        # Dragonfly: the key that signs was a constant of the source.
        pytest.param(with_hmac(b"Secret Key"), id="CVE-2023-27584"),
    ],
)
def test_a_token_that_proves_nothing(token: str) -> None:
    world = Tokens()
    assert world.now == TOKENS_NOW
    with pytest.raises(Unauthenticated):
        world.role(token)


# ── certificates (S-07, S-14) ────────────────────────────────────────────────────────

AUTHORITY = ca.make_authority("c1", NOW)


def certificate(subject: list[x509.NameAttribute[str]], *, uri: str = "") -> bytes:
    """Signed by nobody but itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    begins = datetime.datetime.fromtimestamp(NOW, tz=datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(x509.Name(subject))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begins)
        .not_valid_after(begins + datetime.timedelta(hours=1))
    )
    if uri:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


def test_cve_2026_33248_the_subject_of_a_certificate_says_nothing() -> None:
    """NATS: who it is was read from a subject that matched loosely."""
    subject = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit) for unit in ("server", "n1")]
    subject += [x509.NameAttribute(NameOID.COMMON_NAME, "spiffe://c1/node/n1")]
    with pytest.raises(Forbidden):
        ca.read_peer(certificate(subject))


def test_cve_2024_2048_a_certificate_is_what_the_ca_signed() -> None:
    """Vault: a crafted certificate was taken for the trusted one that it looks like."""
    real = x509.load_pem_x509_certificate(
        ca.sign_node(AUTHORITY, ca.make_request(ca.make_key()), cluster="c1", node="n1", role="server",
                     names=Names(), now=NOW)
    )  # fmt: skip
    named = real.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = named.get_values_for_type(x509.UniformResourceIdentifier)
    false = x509.load_pem_x509_certificate(certificate(list(real.subject), uri=uri))
    verifier = (
        PolicyBuilder()
        .store(Store([x509.load_pem_x509_certificate(AUTHORITY.certificate)]))
        .time(datetime.datetime.fromtimestamp(NOW + 1, tz=datetime.UTC))
        .build_client_verifier()
    )
    assert verifier.verify(real, [])
    with pytest.raises(VerificationError):
        verifier.verify(false, [])


def test_cve_2025_59353_nobody_chooses_the_names_in_its_certificate() -> None:
    """Dragonfly: a peer had its certificate made out for whatever address it named."""
    wished = "10.0.0.1"
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, wished)]))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(wished))]), critical=False
        )
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(PEM)
    )
    signed = ca.sign_node(
        AUTHORITY,
        request,
        cluster="c1",
        node="n1",
        role="node",
        names=Names(addresses=("10.0.0.9",)),
        now=NOW,
    )
    assert ca.read_peer(signed).names == Names(addresses=("10.0.0.9",))
    assert wished.encode() not in x509.load_pem_x509_certificate(signed).public_bytes(
        serialization.Encoding.DER
    )


# ── another's (S-07, S-16) ───────────────────────────────────────────────────────────


def test_cve_2026_59216_an_id_opens_nothing_of_another_s() -> None:
    """Open WebUI: whoever knew the id of another's session was told what it is told."""

    def asked(key: str) -> InferenceRequest:
        return InferenceRequest(
            request_id=RequestId("r1"),
            identity=Identity("user", KeyId(key), team="red"),
            model="m",
            prompt=TextPrompt(text="p"),
        )

    kept: Kept[str] = Kept()
    kept.keep(asked("k1"), "what was said", 10, 0.0)
    assert kept.find(asked("k1"), 1.0) == "what was said"
    assert kept.find(asked("k2"), 1.0) is None


def test_cve_2025_46570_no_cache_tells_what_another_asked() -> None:
    """vLLM: the first token of a prompt that another had sent came sooner."""
    slots, prompt = Slots(2, copies=False), "the other's secret"
    slots.leave(slots.take("red", prompt, 0.0), 0.0, whole=True)
    for _ in range(4):
        seat = slots.take("blue", prompt, 0.0)
        used_before = seat.fields["id_slot"] == 0
        assert seat.fields.get("cache_prompt", True) is (not used_before)
        slots.leave(seat, 0.0, whole=False)


# ── what is told (S-11) ──────────────────────────────────────────────────────────────

NO_IMAGE = "bm90IGFuIGltYWdl"
INPUT = {"type": "input_image", "image_url": "data:image/png;base64,!"}
PART = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{NO_IMAGE}"}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # vLLM: "cannot identify image file <_io.BytesIO object at 0x7a95e299e750>".
        pytest.param(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": [PART, {"type": "x"}]}]},
            id="CVE-2026-22778",
        ),
        # vLLM: and in five more places.
        pytest.param(
            "/v1/responses",
            {"input": [{"role": "user", "content": [INPUT]}]},
            id="CVE-2026-54236",
        ),
    ],
)  # fmt: skip
async def test_an_error_tells_of_no_address(path: str, body: dict[str, Any]) -> None:
    data = json.dumps({"model": "m", **body}).encode()
    status, _, told = await exchanged(gateway(ScriptedInference(HELLO)), "POST", path, {}, body=data)
    assert status == 400
    assert b"object at" not in told
    assert b"0x" not in told


# Nomad: the record of who did what had their tokens in it.
@pytest.mark.parametrize("field", [pytest.param("authorization", id="CVE-2025-1296"),
                                   # Vault: and so had its own, of the headers that it was told to record.
                                   pytest.param("x-api-key", id="CVE-2024-8365")])  # fmt: skip
def test_a_record_holds_no_credential(field: str) -> None:
    head = Head(
        "POST", f"/api/v1/{SECRET}", {"host": "localhost", field: f"Bearer odk_{SECRET}", "cookie": SECRET}
    )
    assert SECRET not in repr(refused_entry(head, "r1", "unauthenticated"))
