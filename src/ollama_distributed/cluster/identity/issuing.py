"""What a member of the cluster is given: certificate, NATS credentials, whom to trust.

Pure but for the signatures. Decides nothing about who may have it (`admission.py` does).
"""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.cluster.identity import nats_jwt
from ollama_distributed.cluster.identity.ca import NODE_LIFETIME_S, make_authority, sign_node
from ollama_distributed.cluster.identity.names import decide_names
from ollama_distributed.cluster.identity.roll import Authorities
from ollama_distributed.cluster.identity.roster import NodeRecord
from ollama_distributed.cluster.identity.wire import ClusterFacts, ClusterKeys, Credentials


def found(cluster: str, now: float, random: Callable[[int], bytes]) -> ClusterKeys:
    """The keys of a new cluster; its first node makes them once. `random(n)`: n secret bytes."""
    raw = (random(32), random(32), random(32), random(32), random(32))
    return ClusterKeys(
        authorities=Authorities(active=make_authority(cluster, now), changed_at=now),
        nats=nats_jwt.make_keys(raw),
    )


def issue(
    keys: ClusterKeys,
    facts: ClusterFacts,
    record: NodeRecord,
    csr: bytes,
    *,
    observed: str,
    now: float,
    joins: bool = False,
) -> Credentials:
    """Credentials of one day for the node of `record`, seen at the address `observed`.

    `joins`: a joining server also gets the cluster's keys; a renewal never carries them,
    because a request for it can be repeated by whoever has seen one.

    Raises:
        Invalid: the request is not fit to be certified.
    """
    expires_at = now + NODE_LIFETIME_S
    certificate = sign_node(
        keys.authorities.active,
        csr,
        cluster=facts.cluster,
        node=record.node,
        role=record.role,
        names=decide_names(facts.cluster, record.node, record.role, observed=observed, allowed=record.hosts),
        now=now,
    )
    return Credentials(
        node=record.node,
        role=record.role,
        certificate=certificate.decode(),
        authorities=tuple(pem.decode() for pem in keys.authorities.trusted),
        nats_jwt=nats_jwt.user_jwt(
            keys.nats, record.role, record.node, record.nats_user, now, expires_at=expires_at
        ),
        facts=facts,
        keys=keys if joins and record.role == "server" else None,
    )
