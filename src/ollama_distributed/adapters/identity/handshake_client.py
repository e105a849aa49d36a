"""The joiner's side: know the cluster first, then speak.

1. Read the CA over a connection that proves nothing, keep the one whose SHA-256 is the
   token's, and fail if there is none.
2. Connect again, trusting that CA alone, and check that a server of the cluster answers.
3. Only now send the secret.

A machine in the middle can hold the connection of step 1, never that of step 2: the secret
does not leave (the k3s procedure). Raw HTTP/1.1, so that the certificate is looked at between
the handshake and the first byte.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence

import anyio
import httptools
import msgspec
from anyio.abc import ByteStream
from anyio.streams.tls import TLSAttribute

from ollama_distributed.adapters.identity.files import NodeKeys
from ollama_distributed.adapters.identity.tls import peer_of, trusting, trusting_nobody
from ollama_distributed.base.errors import (
    Conflict,
    Forbidden,
    Invalid,
    OllamaDistributedError,
    QueueFull,
    Unauthenticated,
    Unavailable,
)
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.nats_jwt import read_jwt
from ollama_distributed.cluster.identity.tokens import Address, JoinToken
from ollama_distributed.cluster.identity.wire import (
    JOIN_PATH,
    MAX_ANSWER_BYTES,
    CAAnswer,
    Credentials,
    ErrorAnswer,
    JoinRequest,
    RenewRequest,
)

CONNECT_DEADLINE_S = 5.0
EXCHANGE_DEADLINE_S = 30.0
"""The server's own deadlines are 10 s for the body and 10 s for the answer."""

_IMPOSTOR = (
    "the machine at {address} is not the cluster that the token is for; the secret was not sent. "
    "Check the address, or make a new token if the cluster's CA was replaced since"
)
_CLOCK = (
    "by this machine's clock the certificate of the machine at {address} does not hold ({reason}): set the "
    "clocks of both and join again; the secret was not sent"
)
_WRONG_TIME = (9, 10)
"""X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED (OpenSSL, x509_vfy.h)."""
_BY_CODE: dict[str, type[OllamaDistributedError]] = {
    kind.code: kind for kind in (Invalid, Unauthenticated, Forbidden, Conflict)
}


async def join(token: JoinToken, *, node: str, keys: NodeKeys) -> Credentials:
    """Join by the first address of `token` that answers. Safe to repeat with the same `keys`.

    Raises:
        Unauthenticated: another cluster answered (the secret was not sent), or the token is not valid.
        Forbidden, Conflict, Invalid: the cluster refused; the message says why.
        QueueFull, Unavailable: it cannot answer now, or nobody is there.
    """
    request = JoinRequest(
        token_id=token.id,
        secret=token.secret,
        role=token.role,
        node=node,
        csr=ca.make_request(keys.tls).decode(),
        nats_user=keys.nats.public,
    )

    async def at(address: Address) -> Credentials:
        authority = await fetch_authority(address, token.ca_sha256)
        credentials = await _ask(address, authority, request)
        check_credentials(credentials, node=node, keys=keys, ca_sha256=token.ca_sha256)
        if credentials.role != token.role:
            raise Unauthenticated("the cluster admitted this node for another role than the token's")
        return credentials

    return await _first(token.addresses, at)


async def renew(addresses: Sequence[Address], current: Credentials, *, keys: NodeKeys) -> Credentials:
    """New credentials from the first server that answers; works after `current` has expired.

    Raises:
        Forbidden: this node was removed. Others as `join`.
    """
    request = RenewRequest(node=current.node, csr=ca.make_request(keys.tls).decode())
    trusted = "".join(current.authorities).encode()

    async def at(address: Address) -> Credentials:
        credentials = await _ask(address, trusted, request, cluster=current.facts.cluster)
        check_credentials(credentials, node=current.node, keys=keys)
        return credentials

    return await _first(addresses, at)


async def fetch_authority(address: Address, ca_sha256: str) -> bytes:
    """The CA certificate (PEM) with this SHA-256, from a machine that need not be believed.

    Raises:
        Unauthenticated: the machine has no such CA.
        Unavailable: it does not answer.
    """
    status, body = await _exchange(address, trusting_nobody(), "GET", b"", server=None)
    try:
        offered = msgspec.json.decode(body, type=CAAnswer).authorities if status == 200 else ()
        for pem in offered:
            if ca.fingerprint(pem.encode()) == ca_sha256:
                return pem.encode()
    except (msgspec.MsgspecError, UnicodeError, Invalid) as failure:
        raise Unauthenticated(_IMPOSTOR.format(address=address)) from failure
    raise Unauthenticated(_IMPOSTOR.format(address=address))


def check_credentials(
    credentials: Credentials, *, node: str, keys: NodeKeys, ca_sha256: str | None = None
) -> None:
    """What the cluster gave must be for this node, its keys and the CA that was pinned.

    Raises:
        Unauthenticated: it is not.
    """
    peer = ca.read_peer(credentials.certificate.encode())
    own = ca.public_key_sha256(ca.check_request(ca.make_request(keys.tls)))
    claims = read_jwt(credentials.nats_jwt)
    hashes = {ca.fingerprint(pem.encode()) for pem in credentials.authorities}
    fits = (
        (peer.node, peer.role, peer.key_sha256) == (node, credentials.role, own)
        and peer.cluster == credentials.facts.cluster
        and (claims.subject, claims.name) == (keys.nats.public, node)
        and (ca_sha256 is None or ca_sha256 in hashes)
    )
    if not fits:
        raise Unauthenticated("the cluster's answer is not for this node; nothing was kept")


async def _first(
    addresses: Sequence[Address], at: Callable[[Address], Awaitable[Credentials]]
) -> Credentials:
    """From the first address that can decide; only `Unavailable` makes it try the next."""
    away: list[str] = []
    for address in addresses:
        try:
            return await at(address)
        except Unavailable as failure:
            away.append(failure.message)
    raise Unavailable("no server of the cluster can be reached: " + "; ".join(away))


async def _ask(
    address: Address, trusted: bytes, request: JoinRequest | RenewRequest, *, cluster: str | None = None
) -> Credentials:
    status, body = await _exchange(
        address, trusting(trusted), "POST", msgspec.json.encode(request), server=cluster or ""
    )
    try:
        if status == 200:
            return msgspec.json.decode(body, type=Credentials)
        refused = msgspec.json.decode(body, type=ErrorAnswer)
    except msgspec.MsgspecError:
        raise Unavailable(f"{address} gave an answer that cannot be read (status {status})") from None
    if refused.code == QueueFull.code:
        raise QueueFull(refused.error)
    raise _BY_CODE.get(refused.code, Unavailable)(refused.error)


async def _exchange(
    address: Address, context: ssl.SSLContext, method: str, body: bytes, *, server: str | None
) -> tuple[int, bytes]:
    """One request and its answer on a connection of its own.

    `server`: the cluster (empty: any) whose server must be on the other side before a byte is
    written; None asks nobody who it is.
    """
    try:
        with anyio.fail_after(CONNECT_DEADLINE_S):
            stream = await anyio.connect_tcp(
                address.host, address.port, ssl_context=context, tls_standard_compatible=False
            )
    except ssl.SSLCertVerificationError as failure:
        told = _CLOCK if failure.verify_code in _WRONG_TIME else _IMPOSTOR
        raise Unauthenticated(told.format(address=address, reason=failure.verify_message)) from failure
    except (OSError, TimeoutError, ssl.SSLError, anyio.BrokenResourceError) as failure:
        raise Unavailable(f"{address} cannot be reached ({type(failure).__name__})") from failure
    async with stream:
        if server is not None:
            peer = peer_of(stream.extra(TLSAttribute.ssl_object))  # noqa: S610  not Django
            if peer.role != "server" or server not in ("", peer.cluster):
                raise Unauthenticated(_IMPOSTOR.format(address=address))
        head = (
            f"{method} {JOIN_PATH} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        try:
            with anyio.fail_after(EXCHANGE_DEADLINE_S):
                await stream.send(head.encode() + body)
                return await _answer(stream)
        except (OSError, TimeoutError, ssl.SSLError, anyio.BrokenResourceError, anyio.EndOfStream) as failure:
            raise Unavailable(f"{address} broke off ({type(failure).__name__})") from failure
        except httptools.HttpParserError as failure:
            raise Unavailable(f"{address} does not speak HTTP") from failure


class _Response:
    """What the parser calls."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.done = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.done = True


async def _answer(stream: ByteStream) -> tuple[int, bytes]:
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    read = 0
    while not response.done:
        data = await stream.receive()
        read += len(data)
        if read > MAX_ANSWER_BYTES:
            raise Unavailable("the answer is too long to be a cluster's")
        parser.feed_data(data)
    return parser.get_status_code(), bytes(response.body)
