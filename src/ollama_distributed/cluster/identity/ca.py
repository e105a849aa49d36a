"""The cluster's certificate authority: node keys, requests, certificates.

Functions over bytes; the time is an argument (seconds since the Unix epoch). Decides what a
certificate may say and what a request must be; knows no disk, socket or store.

ECDSA P-256 throughout: Go (nats-server), Python's and libtorrent's OpenSSL, browsers and
hardware key stores all take it in TLS 1.3. Ed25519 is a little faster, but browsers and
most key stores refuse it, and a cluster has one CA (ADR 5).

Sources: RFC 5280 4.2, CA/B baseline profile of extensions, SPIFFE X.509-SVID 4.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import ipaddress

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ollama_distributed.base.errors import Forbidden, Invalid
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.identity.names import (
    Names,
    check_label,
    parse_spiffe_id,
    spiffe_id,
)

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
NODE_LIFETIME_S = DAY_S
"""A stolen certificate of a node that hears no revocation is worth a day at most."""
AUTHORITY_LIFETIME_S = 3650 * DAY_S
"""Outlives any time that a cluster stays switched off; it is replaced by rolling, not by expiry."""
BACKDATE_S = 300.0
"""Two machines' clocks may differ so much before a fresh certificate is refused."""
MAX_REQUEST_BYTES = 8192
"""A P-256 request has 300 bytes; room for extensions that we ignore."""
MOST_PEERS = 4096
"""Certificates whose names are remembered, of a KiB each."""

_SIGNATURE_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


class Authority(msgspec.Struct, frozen=True):
    """One CA: certificate and private key, both PEM."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return f"Authority({fingerprint(self.certificate)[:16]}…)"


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Who a verified certificate says the other side is."""

    cluster: str
    node: NodeId
    role: NodeRole
    key_sha256: str
    """Of the public key (SubjectPublicKeyInfo), hex."""
    issued_at: float
    """Without the back-dating: what a revocation is compared with."""
    expires_at: float
    names: Names = Names()

    @property
    def begins_at(self) -> float:
        """What TLS compares the clock with."""
        return self.issued_at - BACKDATE_S

    @property
    def renew_at(self) -> float:
        """Half-life: leaves as long again to reach a signer."""
        return (self.issued_at + self.expires_at) / 2


def make_key() -> bytes:
    """A private key, PEM (PKCS 8)."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_request(key: bytes) -> bytes:
    """A signing request (PEM) that proves possession of `key` and asks for nothing."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(_private(key), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def make_authority(cluster: str, now: float, *, lifetime_s: float = AUTHORITY_LIFETIME_S) -> Authority:
    """A new self-signed CA of `cluster`, not allowed to make further CAs."""
    key = make_key()
    private = _private(key)
    identifier = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    # The key's digest in the name: two CAs of one roll-over must not look alike to a verifier
    # that searches by subject.
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Ollama Distributed"),
            x509.NameAttribute(
                NameOID.COMMON_NAME,
                f"{check_label(cluster, 'cluster id')} CA {identifier.digest.hex()[:8]}"[:64],
            ),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_utc(now - BACKDATE_S))
        .not_valid_after(_utc(now + lifetime_s))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False)
        .sign(private, hashes.SHA256())
    )
    return Authority(certificate.public_bytes(serialization.Encoding.PEM), key)


def check_request(request: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a signing request that is fit to be certified.

    Whatever else the request says (subject, names, usages) is not read.

    Raises:
        Invalid: not a request, a key other than P-256, or a signature that does not prove
            possession of it.
    """
    if len(request) > MAX_REQUEST_BYTES:
        raise Invalid("the signing request is too long", param="csr")
    try:
        parsed = x509.load_pem_x509_csr(request)
        key = parsed.public_key()
        strong = isinstance(parsed.signature_hash_algorithm, _SIGNATURE_HASHES)
        proven = parsed.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as failure:
        raise Invalid("the signing request cannot be read", param="csr") from failure
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("the signing request's key must be ECDSA P-256", param="csr")
    if not strong or not proven:
        raise Invalid("the signing request's signature does not prove its key", param="csr")
    return key


def sign_node(
    authority: Authority,
    request: bytes,
    *,
    cluster: str,
    node: str,
    role: NodeRole,
    names: Names,
    now: float,
    lifetime_s: float = NODE_LIFETIME_S,
) -> bytes:
    """A node's certificate (PEM): for TLS servers and clients, never for signing others.

    Takes the key from `request` and everything else from the arguments.

    Raises:
        Invalid: the request is not fit to be certified.
    """
    key = check_request(request)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    issuer_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe_id(cluster, node))]
    alternatives += [x509.DNSName(name) for name in names.dns]
    alternatives += [x509.IPAddress(ipaddress.ip_address(address)) for address in names.addresses]
    expires = min(now + lifetime_s, issuer.not_valid_after_utc.timestamp())
    return (
        x509.CertificateBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
                    x509.NameAttribute(NameOID.COMMON_NAME, node),
                ]
            )
        )
        .issuer_name(issuer.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_utc(now - BACKDATE_S))
        .not_valid_after(_utc(expires))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False
        )
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), False)
        .sign(_private(authority.key), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


@functools.lru_cache(maxsize=MOST_PEERS)
def read_peer(certificate: bytes) -> Peer:
    """Who a certificate (DER or PEM) names; TLS has already verified its chain and dates. The same ones
    come with each request of another node, and reading one takes longer than the rest of the hop's head.

    Raises:
        Forbidden: it is no node certificate: not exactly one SAN URI, a URI of another form,
            or no role.
    """
    try:
        parsed = (
            x509.load_pem_x509_certificate(certificate)
            if certificate.startswith(b"-----")
            else x509.load_der_x509_certificate(certificate)
        )
        san = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = san.get_values_for_type(x509.UniformResourceIdentifier)
        cluster, node = parse_spiffe_id(uri)
        (unit,) = parsed.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        role = msgspec.convert(unit.value, NodeRole)
        names = Names(
            dns=tuple(san.get_values_for_type(x509.DNSName)),
            addresses=tuple(map(str, san.get_values_for_type(x509.IPAddress))),
        )
        key_sha256 = public_key_sha256(parsed.public_key())
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, UnsupportedAlgorithm, Invalid) as no:
        raise Forbidden("the other side's certificate names no node") from no
    return Peer(
        cluster=cluster,
        node=node,
        role=role,
        key_sha256=key_sha256,
        issued_at=parsed.not_valid_before_utc.timestamp() + BACKDATE_S,
        expires_at=parsed.not_valid_after_utc.timestamp(),
        names=names,
    )


def public_key_sha256(key: CertificatePublicKeyTypes) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def fingerprint(certificate: bytes) -> str:
    """SHA-256 (hex) of a PEM certificate's DER: what a join token pins.

    Raises:
        Invalid: not one readable certificate.
    """
    try:
        return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()
    except ValueError as failure:
        raise Invalid("the CA's certificate cannot be read") from failure


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        loaded = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as failure:
        raise Invalid("the private key cannot be read") from failure
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise Invalid("the private key must be ECDSA P-256")
    return loaded


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), tz=datetime.UTC)
