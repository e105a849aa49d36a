"""Replacing the cluster's CA while it works: announce, promote, retire.

| step      | signs | trusted by everyone | next step when                              |
|-----------|-------|---------------------|---------------------------------------------|
| one CA    | old   | old                 | an operator asks, or the CA nears its end   |
| announced | old   | old, new            | every certificate alive was issued after it |
| promoted  | new   | new, old            | every certificate of the old CA has expired |
| one CA    | new   | new                 |                                             |

Pure. A node learns the trusted set with each renewal, so one certificate's life after the
announcement every node that can still speak to others trusts the new CA.
"""

from __future__ import annotations

import msgspec

from ollama_distributed.base.errors import Conflict
from ollama_distributed.cluster.identity.ca import BACKDATE_S, NODE_LIFETIME_S, Authority

OVERLAP_S = NODE_LIFETIME_S + BACKDATE_S
"""The longest that a certificate made before a step can still be in use."""


class Authorities(msgspec.Struct, frozen=True, kw_only=True):
    """The CA that signs, and those that are trusted beside it."""

    active: Authority
    announced: Authority | None = None
    retiring: bytes | None = None
    """Certificate (PEM) of the CA that signed before."""
    changed_at: float = 0.0

    @property
    def trusted(self) -> tuple[bytes, ...]:
        """CA certificates (PEM), the signing one first: libtorrent reads no further."""
        rest = (self.announced.certificate if self.announced else None, self.retiring)
        return (self.active.certificate, *(certificate for certificate in rest if certificate))

    @property
    def bundle(self) -> bytes:
        return b"".join(self.trusted)


def announce(authorities: Authorities, new: Authority, now: float) -> Authorities:
    """Let `new` be trusted, not yet used.

    Raises:
        Conflict: another roll-over is under way.
    """
    if authorities.announced is not None or authorities.retiring is not None:
        raise Conflict("the CA is being replaced already; wait until the old one is retired")
    return Authorities(active=authorities.active, announced=new, changed_at=now)


def promote(authorities: Authorities, now: float, *, at_once: bool = False) -> Authorities:
    """Sign with the announced CA from now on.

    `at_once`: the old key is in wrong hands. It is no longer trusted, and every node whose
    certificate it signed must join again.

    Raises:
        Conflict: nothing is announced, or nodes may exist that have not heard of it.
    """
    if authorities.announced is None:
        raise Conflict("no new CA is announced")
    if not at_once and now < authorities.changed_at + OVERLAP_S:
        raise Conflict("the new CA was announced less than a day ago; some nodes may not trust it yet")
    retiring = None if at_once else authorities.active.certificate
    return Authorities(active=authorities.announced, retiring=retiring, changed_at=now)


def retire(authorities: Authorities, now: float) -> Authorities:
    """Drop the old CA once nothing that it signed can be valid; else the same again. Idempotent."""
    if authorities.retiring is None or now < authorities.changed_at + OVERLAP_S:
        return authorities
    return Authorities(active=authorities.active, changed_at=authorities.changed_at)
