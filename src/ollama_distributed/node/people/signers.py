"""This server's keys for tokens. The private half stays in `DATA_DIR/signers.json` (mode 0600); the
public half goes into the state, which all nodes read, an hour before it is first used.
"""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ollama_distributed.access import tokens
from ollama_distributed.access.people import People, SignerRecord
from ollama_distributed.base.errors import Conflict, Unavailable
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.cluster.ports import ABSENT, Coordination
from ollama_distributed.node.data_dir import read_file, write_file
from ollama_distributed.node.people.mirror import SIGNERS

log = structlog.get_logger("cluster.people")

SIGNS_S = 7 * 86_400.0
OVERLAP_S = 3600.0
"""The next key is known everywhere for so long before the last one stops."""
TRUSTED_S = tokens.LIFETIME_S + 2 * tokens.LEEWAY_S
"""After its last signature."""
KID_CHARS = 16


class OwnSigner(msgspec.Struct, frozen=True, kw_only=True):
    private: str
    """Base64 of the 32 bytes."""
    record: SignerRecord

    def __repr__(self) -> str:
        return f"OwnSigner({self.record.kid})"

    @property
    def key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(base64.b64decode(self.private))


class SignersFile(msgspec.Struct, frozen=True, kw_only=True):
    """`signers.json`."""

    cluster: str
    signers: tuple[OwnSigner, ...] = ()


class Signers:
    def __init__(self, data_dir: Path, node: NodeId, people: People) -> None:
        self._path = data_dir / "signers.json"
        self._node = node
        self._people = people
        self._cluster = ""
        self._own: tuple[OwnSigner, ...] = ()

    def sign(self, claims: tokens.Claims, *, type_: str = tokens.TYPE) -> str:
        """By the oldest key that still signs and that the others know.

        Raises:
            Unavailable: there is none yet.
        """
        usable = [
            own
            for own in self._own
            if claims.iat < own.record.signs_until and own.record.kid in self._people.signers
        ]
        if not usable:
            raise Unavailable("this server has no key for tokens yet; try again in a moment")
        oldest = min(usable, key=lambda own: own.record.signs_until)
        return tokens.sign(claims, oldest.key, oldest.record.kid, type_=type_)

    async def step(self, coordination: Coordination, *, cluster: str, now: float) -> None:
        """Have a key that signs, one that comes next, and none that is long over.

        Raises:
            DiskFull, Invalid: the file cannot be written or read.
            Unavailable, DeadlineExceeded: coordination is away.
        """
        if self._cluster != cluster:
            kept = await asyncio.to_thread(read_file, self._path, SignersFile)
            self._cluster = cluster
            self._own = kept.signers if kept is not None and kept.cluster == cluster else ()
        own = tuple(one for one in self._own if now < one.record.trusted_until)
        if not any(one.record.signs_until > now + OVERLAP_S for one in own):
            own = (*own, self._made(own, now))
        if own != self._own:
            await asyncio.to_thread(write_file, self._path, SignersFile(cluster=cluster, signers=own))
            self._own = own
        for one in own:
            if one.record.kid not in self._people.signers:
                await self._publish(coordination, one.record)
        await self._tidy(coordination, now)

    def _made(self, own: tuple[OwnSigner, ...], now: float) -> OwnSigner:
        key = Ed25519PrivateKey.generate()
        begins = max((one.record.signs_until for one in own), default=now)
        signs_until = max(begins, now) + SIGNS_S
        record = SignerRecord(
            kid=random_id(KID_CHARS),
            node=self._node,
            public=base64.b64encode(key.public_key().public_bytes_raw()).decode(),
            signs_until=signs_until,
            trusted_until=signs_until + TRUSTED_S,
        )
        log.info("people.signer_made", kid=record.kid)
        return OwnSigner(private=base64.b64encode(key.private_bytes_raw()).decode(), record=record)

    async def _publish(self, coordination: Coordination, record: SignerRecord) -> None:
        try:
            await coordination.put(SIGNERS + record.kid, msgspec.json.encode(record), revision=ABSENT)
        except Conflict:
            return  # an earlier try got through; its news is under way
        self._people.signers[record.kid] = record

    async def _tidy(self, coordination: Coordination, now: float) -> None:
        for record in list(self._people.signers.values()):
            if record.node == self._node and now >= record.trusted_until:
                stored = await coordination.get(SIGNERS + record.kid)
                if stored is not None:
                    await coordination.delete(SIGNERS + record.kid, revision=stored.revision)
