"""Who a forwarded request is for, said by the node that took it and signed with that node's own key.

An assertion names an end user (never a secret or a policy), the node and a short time. It is worth
something only on a connection of that same node: its key must be the one in the connection's
certificate, so nothing has to be looked up. One signature serves an identity for a minute, and
both sides keep it: a request pays for two look-ups. Sources: RFC 7515 (what a compact signed
statement must bind), SPIFFE JWT-SVID 3 (short life, audience).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import TypeAlias

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.identity import Identity, Role
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.cluster.identity.ca import Peer

LIFE_S = 120.0
FRESH_S = 60.0
"""So long an assertion is used; the rest of its life is for requests on their way."""
SKEW_S = 300.0
"""As for certificates: two machines' clocks may differ so much."""
MAX_BYTES = 2_048
MAX_KEPT = 4_096
_ALGORITHM = ec.ECDSA(hashes.SHA256())

Who: TypeAlias = tuple[Role, KeyId | None, str, str]


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """What is signed."""

    cluster: str
    node: NodeId
    role: Role
    key_id: KeyId | None
    team: str
    user: str
    issued_at: float
    expires_at: float
    public_key: bytes
    """Of the node, as SubjectPublicKeyInfo (DER)."""


class Signed(msgspec.Struct, frozen=True, array_like=True):
    claim: bytes
    signature: bytes


_claims = msgspec.msgpack.Decoder(Claim)
_signed = msgspec.msgpack.Decoder(Signed)


def _who(identity: Identity) -> Who:
    return identity.role, identity.key_id, identity.team, identity.user


class Asserter:
    """The side of the gateway. `key`: this node's private key (PEM)."""

    def __init__(self, cluster: str, node: NodeId, key: bytes, wall: Callable[[], float]) -> None:
        private = serialization.load_pem_private_key(key, password=None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self._key = private
        self._public = private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._cluster = cluster
        self._node = node
        self._wall = wall
        self._kept: dict[Who, tuple[bytes, float]] = {}

    def say(self, identity: Identity) -> bytes:
        """The assertion, in the characters of a header."""
        who, now = _who(identity), self._wall()
        kept = self._kept.get(who)
        if kept is not None and now < kept[1]:
            return kept[0]
        claim = msgspec.msgpack.encode(
            Claim(self._cluster, self._node, *who, now, now + LIFE_S, self._public)
        )
        signed = Signed(claim, self._key.sign(claim, _ALGORITHM))
        text = base64.urlsafe_b64encode(msgspec.msgpack.encode(signed))
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[who] = (text, now + FRESH_S)
        return text


class Believer:
    """The side of the serving node. `vouch`: the identity as this node itself knows it."""

    def __init__(
        self, cluster: str, wall: Callable[[], float], vouch: Callable[[Identity], Identity]
    ) -> None:
        self._cluster = cluster
        self._wall = wall
        self._vouch = vouch
        self._kept: dict[tuple[NodeId, bytes], Claim] = {}

    def believe(self, peer: Peer, text: bytes) -> Identity:
        """Whom the request is for.

        Raises:
            Forbidden: nobody says so who may, or the key is not good here.
        """
        claim = self._kept.get((peer.node, text))
        if claim is None:
            claim = self._read(peer, text)
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[peer.node, text] = claim
        if not claim.issued_at - SKEW_S <= self._wall() <= claim.expires_at + SKEW_S:
            raise Forbidden(f"what node {peer.node} says of the caller is too old; check the clocks")
        return self._vouch(Identity(role=claim.role, key_id=claim.key_id, team=claim.team, user=claim.user))

    def _read(self, peer: Peer, text: bytes) -> Claim:
        try:
            if len(text) > MAX_BYTES:
                raise ValueError
            signed = _signed.decode(base64.b64decode(text, altchars=b"-_", validate=True))
            claim = _claims.decode(signed.claim)
            public = serialization.load_der_public_key(claim.public_key)
            if not isinstance(public, ec.EllipticCurvePublicKey):
                raise TypeError
            public.verify(signed.signature, signed.claim, _ALGORITHM)
        except (ValueError, TypeError, msgspec.MsgspecError, InvalidSignature, UnsupportedAlgorithm):
            raise Forbidden(f"node {peer.node} does not say who the request is for") from None
        same_key = hashlib.sha256(claim.public_key).hexdigest() == peer.key_sha256
        if not same_key or claim.node != peer.node or claim.cluster != self._cluster:
            raise Forbidden(f"node {peer.node} passes on what another node said of the caller")
        return claim
