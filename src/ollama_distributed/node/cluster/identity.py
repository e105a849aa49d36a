"""Who this node is in its cluster: found, restored, joined, renewed, given up.

A node has one identity at a time, in `DATA_DIR/identity`. A join prepares the next one beside
it (`DATA_DIR/joining`) and swaps the folders when the cluster has admitted the node, so a
crash at any moment leaves the old identity or the new one, and a repeated join shows the same
keys and is recognised.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import msgspec
import structlog

from ollama_distributed.adapters.identity import handshake_client
from ollama_distributed.adapters.identity.files import IdentityFiles, NodeKeys
from ollama_distributed.adapters.identity.tls import NodeTLS
from ollama_distributed.base.errors import (
    Conflict,
    Forbidden,
    OllamaDistributedError,
    Unauthenticated,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId, NodeRole, random_id
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.issuing import found as found_cluster
from ollama_distributed.cluster.identity.issuing import issue
from ollama_distributed.cluster.identity.names import canonical_host
from ollama_distributed.cluster.identity.roster import NodeRecord
from ollama_distributed.cluster.identity.tokens import MAX_ADDRESSES, Address, JoinToken, parse_address
from ollama_distributed.cluster.identity.wire import ClusterFacts, ClusterKeys, Credentials

log = structlog.get_logger("cluster.identity")

RENEWED = "identity.renewed"
RENEWAL_FAILED = "identity.renewal_failed"

NOT_NOW = "identity.cluster_cannot_decide"
MOVED = "identity.cluster_on_the_network"
NOT_NOW_S, NOT_NOW_PAUSE_S = 30.0, 1.0
"""A join waits so long for a cluster without a quorum; moving to three voters takes some 6 s."""
LOOK_S = 60.0
"""How often the clock is compared with the half-life: a machine that slept must not sleep on."""
RETRY_S, MAX_RETRY_S = 10.0, 600.0
"""Between tries to renew; half a day is left when the first one is made."""


class Identity:
    """A node's identity, in memory and on disk."""

    def __init__(self, files: IdentityFiles, keys: NodeKeys, credentials: Credentials) -> None:
        self.files = files
        self.keys = keys
        self.credentials = credentials
        self.cluster_keys: ClusterKeys | None = files.cluster_keys()
        self.tls = NodeTLS(files.certificate, files.key, files.authorities)

    @property
    def node(self) -> NodeId:
        return NodeId(self.credentials.node)

    @property
    def cluster(self) -> str:
        return self.credentials.facts.cluster

    @property
    def role(self) -> NodeRole:
        return self.credentials.role

    @property
    def peer(self) -> ca.Peer:
        """What this node's certificate says."""
        return ca.read_peer(self.credentials.certificate.encode())

    @property
    def ca_sha256(self) -> str:
        return ca.fingerprint(self.credentials.authorities[0].encode())

    def jwt(self) -> str:
        return self.credentials.nats_jwt

    def record(self, now: float, hosts: Sequence[str]) -> NodeRecord:
        """The roster's entry of a node that nobody admitted: the founder."""
        peer = self.peer
        return NodeRecord(
            node=peer.node,
            role=peer.role,
            key_sha256=peer.key_sha256,
            nats_user=self.keys.nats.public,
            hosts=tuple(hosts),
            admitted_at=now,
        )

    def take(self, credentials: Credentials) -> None:
        """Use renewed credentials from now on. Blocking, small."""
        self.files.save(credentials)
        self.credentials = credentials
        self.tls.reload()


# ── how a node comes by one ─────────────────────────────────────────────────────────


def restore(data_dir: Path) -> Identity | None:
    """The identity on disk; None on a node that never had one. Blocking, small.

    Raises:
        Invalid, Unavailable: it is damaged; the message says what to do.
    """
    _finish_join(data_dir)
    files = IdentityFiles(data_dir)
    credentials = files.restore()
    return Identity(files, files.node_keys(), credentials) if credentials is not None else None


def new_cluster() -> str:
    """An id for a cluster that is about to be founded."""
    return f"c{random_id(11)}"


def found(data_dir: Path, cluster: str, node: NodeId, hosts: Sequence[str], now: float) -> Identity:
    """Make a cluster of one. Blocking: 10 ms."""
    files = IdentityFiles(data_dir)
    keys = files.node_keys()
    cluster_keys = found_cluster(cluster, now, secrets.token_bytes)
    files.save(_own(cluster_keys, ClusterFacts(cluster=cluster), node, keys, hosts, now))
    restored = restore(data_dir)
    assert restored is not None, "just saved"
    return restored


async def join(data_dir: Path, node: NodeId, token: JoinToken, *, mdns: bool) -> Credentials:
    """Be admitted by the cluster of `token`; `adopt` then makes it this node's. Safe to repeat.

    `mdns`: where no address of the token answers, look for the same cluster on the local network.
    It is the same if it has the CA that the token pins, so whoever lies there gets no secret.

    Raises:
        as `handshake_client.join`.
    """
    files = _joining(data_dir, token.ca_sha256)
    keys = await asyncio.to_thread(files.node_keys)
    deadline = anyio.current_time() + NOT_NOW_S
    while True:
        try:
            credentials = await handshake_client.join(token, node=node, keys=keys)
        except Unavailable as failure:
            if anyio.current_time() > deadline:
                raise
            if await _answers(token):
                # They cannot decide now: they elect, or the voters are being changed.
                log.warning(NOT_NOW, reason=failure.message)
                await asyncio.sleep(NOT_NOW_PAUSE_S)
                continue
            moved = await _elsewhere(token) if mdns else None
            if moved is None:
                raise
            token, mdns = moved, False
            continue
        await asyncio.to_thread(files.save, credentials)
        return credentials


async def _elsewhere(token: JoinToken) -> JoinToken | None:
    """The token with the addresses that its cluster has on the local network now."""
    from ollama_distributed.adapters.discovery.mdns import browse  # 0.1 s that few joins need

    try:
        found = [node for node in await browse() if node.ca_sha256 == token.ca_sha256]
    except Unavailable as failure:
        log.info(MOVED, reason=failure.message)
        return None
    where = tuple(parse_address(text) for node in found for text in node.addresses)[:MAX_ADDRESSES]
    if not where:
        return None
    log.info(MOVED, addresses=[str(address) for address in where])
    return msgspec.structs.replace(token, addresses=where)


async def _answers(token: JoinToken) -> bool:
    """Whether a machine with the token's CA is there."""
    for address in token.addresses:
        try:
            await handshake_client.fetch_authority(address, token.ca_sha256)
        except (Unavailable, Unauthenticated):
            continue
        return True
    return False


def adopt(data_dir: Path, ca_sha256: str) -> Identity:
    """Swap in what `join` prepared: from now on this node belongs there. Blocking, small."""
    joined = _joining(data_dir, ca_sha256).folder
    old = data_dir / "identity.left"
    shutil.rmtree(old, ignore_errors=True)
    current = IdentityFiles(data_dir).folder
    if current.exists():
        current.rename(old)
    joined.rename(current)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(data_dir / "joining", ignore_errors=True)
    restored = restore(data_dir)
    assert restored is not None, "was complete"
    return restored


def _joining(data_dir: Path, ca_sha256: str) -> IdentityFiles:
    return IdentityFiles(data_dir / "joining" / ca_sha256[:16])


def _finish_join(data_dir: Path) -> None:
    """A crash between the two renames of `adopt` left no identity and one that is complete."""
    if IdentityFiles(data_dir).folder.exists():
        return
    for waiting in sorted((data_dir / "joining").glob("*")):
        if IdentityFiles(waiting).credentials() is not None:
            IdentityFiles(waiting).folder.rename(IdentityFiles(data_dir).folder)
            return


def check_may_join(current: Identity | None, members: int, token: JoinToken) -> None:
    """
    Raises:
        Conflict: this node is in that cluster already, or in one with other members.
    """
    if current is None:
        return
    if any(ca.fingerprint(pem.encode()) == token.ca_sha256 for pem in current.credentials.authorities):
        raise Conflict("this node is in that cluster already; start it with: ollama-distributed serve")
    if members > 1:
        raise Conflict(
            f"this node is in cluster {current.cluster} with other nodes; take it out first with: "
            "ollama-distributed cluster leave"
        )


# ── how it stays valid ──────────────────────────────────────────────────────────────


def renew_alone(identity: Identity, facts: ClusterFacts, hosts: Sequence[str], now: float) -> None:
    """A server renews itself: it holds the cluster's keys. Blocking, small.

    Names that its certificate has stay in it; `hosts` are added.
    """
    assert identity.cluster_keys is not None, "a server"
    names = identity.peer.names
    kept = dict.fromkeys((*hosts, *names.addresses, *names.dns))
    own = _own(identity.cluster_keys, facts, identity.node, identity.keys, tuple(kept), now)
    identity.take(own)


def cover(identity: Identity, hosts: Sequence[str], now: float) -> None:
    """Let a server's certificate name the hosts that it advertises: other servers dial them, and
    check. Blocking, small."""
    if identity.cluster_keys is None:
        return
    names = identity.peer.names
    if not set(map(canonical_host, hosts)) <= {*names.addresses, *names.dns}:
        renew_alone(identity, identity.credentials.facts, hosts, now)


async def renew(identity: Identity, servers: Sequence[Address]) -> None:
    """Renew at the first server that answers.

    Raises:
        Forbidden: this node was removed.
        OllamaDistributedError: it did not work; what there is stays in use.
    """
    credentials = await handshake_client.renew(servers, identity.credentials, keys=identity.keys)
    await asyncio.to_thread(identity.take, credentials)


async def keep_valid(
    identity: Identity,
    *,
    facts: Callable[[], ClusterFacts],
    hosts: Callable[[], Sequence[str]],
    wall: Callable[[], float],
    renewed: Callable[[], Awaitable[None]],
) -> None:
    """Renew at half-life, again and again, and what does not hold yet: it was made while a clock was ahead.
    Returns when this node was removed. `renewed`: puts to use what is new; called again until it works."""
    retry_s, used = RETRY_S, True
    while True:
        peer = identity.peer
        wait_s = peer.renew_at - wall() if wall() >= peer.begins_at else 0.0
        if wait_s > 0 and used:
            await asyncio.sleep(min(wait_s, LOOK_S))
            continue
        try:
            if wait_s <= 0:
                if identity.cluster_keys is not None:
                    await asyncio.to_thread(renew_alone, identity, facts(), hosts(), wall())
                else:
                    await renew(identity, facts().servers)
                log.info(RENEWED, expires_at=identity.peer.expires_at)
                used = False
            await renewed()
            used = True
        except Forbidden as gone:
            log.warning(RENEWAL_FAILED, reason=gone.message)
            return
        except Exception as failure:  # the task's root: without it the node is shut out in a day
            foreign = not isinstance(failure, OllamaDistributedError | OSError)
            log.warning(RENEWAL_FAILED, reason=str(failure), again_in_s=retry_s, exc_info=foreign)
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, MAX_RETRY_S)
        else:
            retry_s = RETRY_S
            if wall() < identity.peer.begins_at:
                await asyncio.sleep(LOOK_S)  # this machine's clock is wrong, or a server's still


def _own(
    keys: ClusterKeys, facts: ClusterFacts, node: NodeId, own: NodeKeys, hosts: Sequence[str], now: float
) -> Credentials:
    """Credentials that a server issues to itself."""
    request = ca.make_request(own.tls)
    record = NodeRecord(
        node=node,
        role="server",
        key_sha256=ca.public_key_sha256(ca.check_request(request)),
        nats_user=own.nats.public,
        hosts=tuple(hosts),
        admitted_at=now,
    )
    return issue(keys, facts, record, request, observed="", now=now, joins=True)


def forget(identity: Identity) -> None:
    """This node is no member any more. Blocking, small."""
    identity.files.forget()
