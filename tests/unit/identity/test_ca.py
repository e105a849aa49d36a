"""Certificates say what the signer decided, and nothing that the asker wished."""

from __future__ import annotations

import datetime
import ipaddress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.identity.world import NOW

from ollama_distributed.base.errors import Conflict, Forbidden, Invalid
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.names import Names, canonical_host, decide_names, parse_spiffe_id
from ollama_distributed.cluster.identity.roll import OVERLAP_S, Authorities, announce, promote, retire

AUTHORITY = ca.make_authority("c1", NOW)
KEY = ca.make_key()
NO_NAMES = Names()
PEM = serialization.Encoding.PEM


def sign(
    request: bytes | None = None, *, names: Names = NO_NAMES, authority: ca.Authority = AUTHORITY
) -> bytes:
    return ca.sign_node(
        authority,
        ca.make_request(KEY) if request is None else request,
        cluster="c1",
        node="n1",
        role="node",
        names=names,
        now=NOW,
    )


def at(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)


def verify(certificate: bytes, trusted: tuple[bytes, ...], when: float) -> None:
    store = Store([x509.load_pem_x509_certificate(pem) for pem in trusted])
    PolicyBuilder().store(store).time(at(when)).build_client_verifier().verify(
        x509.load_pem_x509_certificate(certificate), []
    )


def test_a_certificate_names_its_node_lives_a_day_and_is_renewed_at_half_life() -> None:
    peer = ca.read_peer(sign())
    assert (peer.cluster, peer.node, peer.role) == ("c1", "n1", "node")
    assert peer.expires_at == NOW + 24 * 3600
    assert peer.renew_at == NOW + 12 * 3600


def test_a_clock_that_is_four_minutes_behind_accepts_a_fresh_certificate() -> None:
    verify(sign(), (AUTHORITY.certificate,), NOW - 240)
    with pytest.raises(x509.verification.VerificationError):
        verify(sign(), (AUTHORITY.certificate,), NOW - 360)
    with pytest.raises(x509.verification.VerificationError):
        verify(sign(), (AUTHORITY.certificate,), NOW + 24 * 3600 + 1)


def test_names_and_extensions_of_a_request_are_ignored() -> None:
    evil = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.COMMON_NAME, "n0"),
                    x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "server"),
                ]
            )
        )
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.UniformResourceIdentifier("spiffe://c1/node/n0"),
                    x509.DNSName("n0.c1.internal"),
                    x509.DNSName("*"),
                    x509.IPAddress(ipaddress.ip_address("10.0.0.1")),
                ]
            ),
            critical=True,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(PEM)
    )
    certificate = sign(evil, names=Names(dns=("n1.c1.internal",), addresses=("10.0.0.9",)))
    peer = ca.read_peer(certificate)
    assert (peer.node, peer.role) == ("n1", "node")
    assert peer.names == Names(dns=("n1.c1.internal",), addresses=("10.0.0.9",))
    parsed = x509.load_pem_x509_certificate(certificate)
    assert not parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = parsed.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP192R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ec.generate_private_key(ec.SECP384R1()),
    ],
    ids=["rsa", "p192", "secp256k1", "p384"],
)
def test_keys_of_another_kind_are_refused(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    with pytest.raises(Invalid, match="P-256"):
        ca.check_request(request.public_bytes(PEM))


def test_an_ed25519_request_is_refused() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, None)
    with pytest.raises(Invalid):
        ca.check_request(request.public_bytes(PEM))


def test_a_request_must_prove_its_key() -> None:
    der = bytearray(x509.load_pem_x509_csr(ca.make_request(KEY)).public_bytes(serialization.Encoding.DER))
    other = x509.load_pem_x509_csr(ca.make_request(ca.make_key())).public_key()
    mine = x509.load_pem_x509_csr(ca.make_request(KEY)).public_key()
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    swapped = bytes(der).replace(mine.public_bytes(*spki), other.public_bytes(*spki))
    assert swapped != bytes(der)
    with pytest.raises(Invalid, match="prove"):
        ca.check_request(x509.load_der_x509_csr(swapped).public_bytes(PEM))


@given(st.binary(max_size=400))
def test_whatever_comes_as_a_request_is_refused_in_our_words(data: bytes) -> None:
    with pytest.raises(Invalid):
        ca.check_request(b"-----BEGIN CERTIFICATE REQUEST-----\n" + data)


@given(st.binary(max_size=200))
def test_whatever_comes_as_a_certificate_is_refused_in_our_words(data: bytes) -> None:
    with pytest.raises(Forbidden):
        ca.read_peer(data)


def test_a_ca_certificate_is_no_node() -> None:
    with pytest.raises(Forbidden):
        ca.read_peer(AUTHORITY.certificate)


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://c1/node/n1/x",
        "spiffe://c1/node/n1?x",
        "spiffe://c1/node/N1",
        "spiffe://c1/Node/n1",
        "spiffe://c1/node/",
        "spiffe://c1/node/n1\n",
        "spiffe://c1//node/n1",
        "https://c1/node/n1",
        "spiffe://c1/node/-n1",
        "spiffe://c1/node/n%31",
    ],
)
def test_only_the_exact_form_of_the_uri_names_a_node(uri: str) -> None:
    with pytest.raises(Invalid):
        parse_spiffe_id(uri)


def test_names_are_those_seen_and_those_allowed() -> None:
    allowed = ["GPU.Lan.", "[2001:db8::1]"]
    names = decide_names("c1", "n1", "node", observed="::ffff:10.0.0.7", allowed=allowed)
    assert names.dns == ("n1.c1.internal", "gpu.lan")
    assert names.addresses == ("10.0.0.7", "2001:db8::1")


def test_only_a_server_is_called_as_nats_servers_are() -> None:
    assert decide_names("c1", "n1", "server", observed="").dns == ("n1.c1.internal", "nats.c1.internal")
    for allowed in ("nats.c1.internal", "NATS.c1.internal.", "n2.c1.internal"):
        with pytest.raises(Invalid, match="own"):
            decide_names("c1", "n1", "node", observed="", allowed=[allowed])
    with pytest.raises(Invalid, match="may be called"):
        decide_names("c1", "nats", "node", observed="")


@given(st.text(max_size=40))
def test_a_host_has_one_spelling(text: str) -> None:
    try:
        host = canonical_host(text)
    except Invalid:
        return
    assert canonical_host(host) == host


def test_a_ca_rolls_over_without_a_moment_of_distrust() -> None:
    new = ca.make_authority("c1", NOW)
    old_leaf = sign()
    authorities = announce(Authorities(active=AUTHORITY), new, NOW)
    verify(old_leaf, authorities.trusted, NOW)
    with pytest.raises(Conflict, match="less than a day"):
        promote(authorities, NOW + 3600)
    authorities = promote(authorities, NOW + OVERLAP_S)
    assert authorities.trusted[0] == new.certificate
    new_leaf = sign(authority=authorities.active)
    verify(old_leaf, authorities.trusted, NOW)
    verify(new_leaf, authorities.trusted, NOW)
    assert retire(authorities, NOW + OVERLAP_S) == authorities
    authorities = retire(authorities, NOW + 2 * OVERLAP_S)
    assert authorities.trusted == (new.certificate,)
    with pytest.raises(x509.verification.VerificationError):
        verify(old_leaf, authorities.trusted, NOW)


def test_a_stolen_ca_is_distrusted_at_once() -> None:
    new = ca.make_authority("c1", NOW)
    authorities = promote(announce(Authorities(active=AUTHORITY), new, NOW), NOW, at_once=True)
    assert authorities.trusted == (new.certificate,)


def test_one_roll_over_at_a_time() -> None:
    new = ca.make_authority("c1", NOW)
    with pytest.raises(Conflict):
        announce(announce(Authorities(active=AUTHORITY), new, NOW), new, NOW)


def test_a_ca_never_shows_its_key_when_printed() -> None:
    assert "PRIVATE" not in repr(AUTHORITY)
    assert "PRIVATE" not in repr(Authorities(active=AUTHORITY))
