"""Who knocks at the sockets of a cluster: with no certificate, with a wrong one, with a node's."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from ollama_distributed.adapters.identity.tls import trusting_nobody
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.issuing import found
from ollama_distributed.cluster.identity.names import decide_names
from ollama_distributed.cluster.identity.wire import ClusterKeys
from tests.limits import SOON_S

Caller: TypeAlias = Literal["none", "foreign CA", "expired", "revoked", "node", "server"]
CALLERS: tuple[Caller, ...] = get_args(Caller)
STRANGERS: tuple[Caller, ...] = ("none", "foreign CA", "expired")
"""Whom TLS itself turns away, where a certificate is demanded."""
REVOKED = NodeId("gone")
DAY_S = 86400.0


def contexts(folder: Path, keys: ClusterKeys, cluster: str) -> Mapping[Caller, ssl.SSLContext]:
    """As each of them opens a connection; none asks who is on the other side. `keys`: of the cluster
    that is knocked at."""
    now = time.time()
    foreign = found(cluster, now, secrets.token_bytes)
    made: dict[Caller, ssl.SSLContext] = {"none": trusting_nobody()}

    def shows(caller: Caller, keys: ClusterKeys, node: str, role: NodeRole = "node", at: float = now) -> None:
        key = ca.make_key()
        certificate = ca.sign_node(
            keys.authorities.active,
            ca.make_request(key),
            cluster=cluster,
            node=node,
            role=role,
            names=decide_names(cluster, NodeId(node), role, observed="127.0.0.1", allowed=()),
            now=at,
        )
        path = folder / f"{caller.replace(' ', '-')}.pem"
        path.write_bytes(certificate + key)
        made[caller] = trusting_nobody()
        made[caller].load_cert_chain(path)

    shows("foreign CA", foreign, "n1", "server")
    shows("expired", keys, "n1", "server", now - 2 * DAY_S)
    shows("revoked", keys, REVOKED, "server", now - 60.0)
    shows("node", keys, "n1")
    shows("server", keys, "n2", "server")
    return made


# ── what they hear ──────────────────────────────────────────────────────────────────

REFUSED = 0
"""No answer at all: TLS ended."""


class Line:
    """A connection that is kept while the other side keeps it."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._port = port
        self._context = context
        self._pair: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, *, body: bytes = b"", headers: str = "") -> int:
        """The status; `REFUSED`: the connection was ended before there was one."""
        async with asyncio.timeout(SOON_S):
            try:
                if self._pair is None:
                    self._pair = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._context)
                reader, writer = self._pair
                head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
                writer.write(f"{head}content-type: application/json\r\n{headers}\r\n".encode() + body)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = re.search(rb"content-length: (\d+)", answer)
                if method != "HEAD" and size:
                    await reader.readexactly(int(size[1]))
                if b"connection: close" in answer or not size:
                    self.close()
                return int(answer[9:12])
            except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
                self.close()
                return REFUSED

    def close(self) -> None:
        if self._pair is not None:
            self._pair[1].transport.abort()
            self._pair = None


LOGINS = (
    b'CONNECT {"verbose":true,"pedantic":false}\r\nPING\r\n',
    b'CONNECT {"verbose":true,"user":"route","pass":"route","name":"n9"}\r\nPING\r\n',
)


async def said(port: int, context: ssl.SSLContext, login: bytes) -> bytes:
    """What a NATS server answers, until it ends the connection."""
    heard = bytearray()
    async with asyncio.timeout(SOON_S):
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname="any"
            )
            try:
                writer.write(login)
                while b"PONG" not in heard and (data := await reader.read(4096)):
                    heard += data
            finally:
                writer.transport.abort()
    return bytes(heard)
