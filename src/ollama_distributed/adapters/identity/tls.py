"""TLS between nodes: 1.3 only, both sides show a node certificate of this cluster.

OpenSSL checks chain, dates and usage; `peer_of` then reads who it is from the one SAN URI.
Host names are not compared (nodes move; the URI does not). No session tickets: a resumed
session would outlive the certificate that opened it.

Sources: SPIFFE X.509-SVID 5; RFC 8446 4.6.1; NATS CVE-2026-33248 (identity taken from a
subject that matched loosely).
"""

from __future__ import annotations

import ssl
from pathlib import Path

from ollama_distributed.base.errors import Forbidden, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer, read_peer


class NodeTLS:
    """The contexts of one node, kept up to date: `reload` after each renewal.

    A server keeps the context of `server()` for ever; each handshake takes what was loaded
    last. A client asks `client()` for each connection.
    """

    def __init__(self, certificate: Path, key: Path, authorities: Path) -> None:
        self._paths = (certificate, key, authorities)
        self._servers: dict[bool, ssl.SSLContext] = {}
        self.reload()

    def reload(self) -> None:
        """Use the files as they are now. Connections that are open stay as they were made.

        Raises:
            Unavailable: the files do not fit together; what was loaded before stays in use.
        """
        client = self._load(ssl.PROTOCOL_TLS_CLIENT, ssl.CERT_REQUIRED)
        bus = self._load(ssl.PROTOCOL_TLS_CLIENT, ssl.CERT_REQUIRED)
        bus.check_hostname = True
        servers = {
            required: self._load(
                ssl.PROTOCOL_TLS_SERVER, ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
            )
            for required in (False, True)
        }
        self._client, self._bus, self._servers = client, bus, servers

    def client(self) -> ssl.SSLContext:
        """For one connection to another node; check `peer_of` before the first byte."""
        return self._client

    def bus(self) -> ssl.SSLContext:
        """For one connection to a NATS server; it must show the expected host name, which only
        servers' certificates state (`names.bus_name`)."""
        return self._bus

    def server(self, *, client_required: bool = True) -> ssl.SSLContext:
        """For a listener's whole life.

        `client_required=False` lets a joiner in, who has no certificate yet: there each route
        must ask `peer_of` by itself.
        """
        front = self._load(
            ssl.PROTOCOL_TLS_SERVER, ssl.CERT_REQUIRED if client_required else ssl.CERT_OPTIONAL
        )

        def use_current(connection: ssl.SSLObject, _name: str | None, _front: ssl.SSLContext) -> None:
            connection.context = self._servers[client_required]

        front.sni_callback = use_current
        return front

    def _load(self, side: int, verify: ssl.VerifyMode) -> ssl.SSLContext:
        certificate, key, authorities = self._paths
        context = _context(side)
        context.verify_mode = verify
        try:
            context.load_cert_chain(certificate, key)
            context.load_verify_locations(authorities)
        except (OSError, ssl.SSLError) as failure:
            raise Unavailable(f"the node's certificate cannot be used: {failure}") from failure
        return context


def trusting(authority: bytes) -> ssl.SSLContext:
    """For a client without a certificate that trusts exactly these CA certificates (PEM)."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=authority.decode("ascii"))
    return context


def trusting_nobody() -> ssl.SSLContext:
    """For reading public data that is checked by other means (the CA, by the token's hash).

    Nothing secret may be written to such a connection, nothing read from it believed.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_NONE
    return context


def peer_of(connection: ssl.SSLObject | ssl.SSLSocket, *, expected: NodeId | None = None) -> Peer:
    """Who is on the other side of an established connection.

    Raises:
        Forbidden: nobody (no certificate), no node, or another node than `expected`.
    """
    certificate = connection.getpeercert(binary_form=True)
    if not certificate:
        raise Forbidden("a node certificate is needed here")
    peer = read_peer(certificate)
    if expected is not None and peer.node != expected:
        raise Forbidden(f"node {expected} was expected there, and node {peer.node} answered")
    return peer


def _context(side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    if side == ssl.PROTOCOL_TLS_CLIENT:
        context.check_hostname = False  # `peer_of` compares the SAN URI instead
    else:
        context.num_tickets = 0
    return context
