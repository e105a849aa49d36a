"""The join handshake and node TLS over real sockets."""

from __future__ import annotations

import asyncio
import errno
import ssl
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.integration.identity_listener import GET_WHO, Seat, call, listening, node_keys
from tests.limits import SOON_S

from ollama_distributed.adapters.identity import files, handshake_client, handshake_server
from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.adapters.identity.tls import NodeTLS, peer_of, trusting, trusting_nobody
from ollama_distributed.base.errors import (
    DiskFull,
    Forbidden,
    Invalid,
    QueueFull,
    Unauthenticated,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.roll import OVERLAP_S, announce, promote, retire
from ollama_distributed.cluster.identity.tokens import Address, parse_token
from ollama_distributed.cluster.identity.wire import JOIN_PATH, MAX_REQUEST_BYTES, CAAnswer

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


@pytest.fixture
def seat(tmp_path: Path) -> Seat:
    return Seat(tmp_path / "n0")


async def admit(seat: Seat, folder: Path, node: str = "n1") -> NodeTLS:
    """A node that joined, with its files."""
    files = IdentityFiles(folder)
    token = parse_token(await seat.world.admission.create_token("node", creator="k1"))
    files.save(await handshake_client.join(token, node=node, keys=files.node_keys()))
    return NodeTLS(files.certificate, files.key, files.authorities)


# ── joining ─────────────────────────────────────────────────────────────────────────


async def test_a_node_joins_and_is_known_by_its_certificate(seat: Seat, tmp_path: Path) -> None:
    async with seat.open() as address:
        node = await admit(seat, tmp_path / "n1")
        answer = await call(address, node.client(), GET_WHO)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"n1")


class Middle:
    """A machine in the middle: its own certificate, every byte written down."""

    def __init__(self, authorities: tuple[bytes, ...]) -> None:
        self.authorities = authorities
        self.heard = bytearray()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        more = True
        while more:
            event = await receive()
            self.heard += event.get("body", b"")
            more = event.get("more_body", False)
        self.heard += scope["path"].encode() + scope["query_string"] + repr(scope["headers"]).encode()
        body = msgspec.json.encode(CAAnswer(tuple(pem.decode() for pem in self.authorities)))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("shows", ["its own CA", "the real CA", "both"])
async def test_a_machine_in_the_middle_never_hears_the_secret(seat: Seat, tmp_path: Path, shows: str) -> None:
    evil = Seat(tmp_path / "evil")
    real, own = seat.world.keys.authorities.trusted, evil.world.keys.authorities.trusted
    middle = Middle({"its own CA": own, "the real CA": real, "both": (*own, *real)}[shows])
    async with listening(middle, evil.tls.server(client_required=False)) as address:
        token = parse_token(await seat.world.admission.create_token("node", creator="k1"))
        token = msgspec.structs.replace(token, addresses=(address,))
        with pytest.raises(Unauthenticated, match="the secret was not sent"):
            await handshake_client.join(token, node="n1", keys=node_keys())
    assert JOIN_PATH.encode() in middle.heard  # it was spoken to
    assert token.secret.encode() not in middle.heard
    assert token.id.encode() not in middle.heard


async def test_a_mere_node_of_the_cluster_cannot_pose_as_its_door(seat: Seat, tmp_path: Path) -> None:
    async with seat.open():
        node = await admit(seat, tmp_path / "n1")
    middle = Middle(seat.world.keys.authorities.trusted)
    async with listening(middle, node.server(client_required=False)) as address:
        token = parse_token(await seat.world.admission.create_token("node", creator="k1"))
        token = msgspec.structs.replace(token, addresses=(address,))
        with pytest.raises(Unauthenticated, match="the secret was not sent"):
            await handshake_client.join(token, node="n2", keys=node_keys())
    assert token.secret.encode() not in middle.heard


async def test_fifty_joiners_over_sockets_one_token_one_success(
    seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake_client, "CONNECT_DEADLINE_S", SOON_S)  # a hundred at once, in one process
    async with seat.open():
        token = parse_token(await seat.world.admission.create_token("node", creator="k1"))
        outcomes = await asyncio.gather(
            *(handshake_client.join(token, node=f"n{i}", keys=node_keys()) for i in range(1, 51)),
            return_exceptions=True,
        )
    refused = [outcome for outcome in outcomes if isinstance(outcome, Forbidden)]
    assert len(refused) == 49


async def test_a_dead_address_is_passed_over_and_a_dead_cluster_said(seat: Seat) -> None:
    dead = Address("127.0.0.1", 1)
    async with seat.open() as address:
        token = parse_token(await seat.world.admission.create_token("node", creator="k1"))
        both = msgspec.structs.replace(token, addresses=(dead, address))
        assert (await handshake_client.join(both, node="n1", keys=node_keys())).node == "n1"
    gone = msgspec.structs.replace(token, addresses=(dead,))
    with pytest.raises(Unavailable, match="no server"):
        await handshake_client.join(gone, node="n1", keys=node_keys())


@pytest.mark.parametrize("days", [-2, 2])
async def test_a_clock_that_is_wrong_is_named(seat: Seat, days: int) -> None:
    seat.world.now += days * ca.DAY_S
    seat.renew()
    seat.tls.reload()
    async with seat.open():
        token = parse_token(await seat.world.admission.create_token("node", creator="k1"))
        with pytest.raises(Unauthenticated, match="clock"):
            await handshake_client.join(token, node="n1", keys=node_keys())


async def test_wrong_secrets_are_refused_then_throttled(seat: Seat) -> None:
    async with seat.open():
        token = parse_token(await seat.world.admission.create_token("node", creator="k1"))
        wrong = msgspec.structs.replace(token, secret="x" * 43)
        for _ in range(5):
            with pytest.raises(Unauthenticated, match="not valid"):
                await handshake_client.join(wrong, node="n1", keys=node_keys())
        with pytest.raises(QueueFull):
            await handshake_client.join(token, node="n1", keys=node_keys())


async def test_a_node_renews_by_its_key_and_a_stranger_does_not(seat: Seat, tmp_path: Path) -> None:
    async with seat.open() as address:
        keys = IdentityFiles(tmp_path / "n1").node_keys()
        token = parse_token(await seat.world.admission.create_token("node", creator="k1"))
        first = await handshake_client.join(token, node="n1", keys=keys)
        second = await handshake_client.renew([address], first, keys=keys)
        assert second.certificate != first.certificate
        with pytest.raises(Unauthenticated):
            await handshake_client.renew([address], first, keys=node_keys())


# ── limits of the one open route ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /who HTTP/1.1\r\nHost: x\r\n\r\n", b"403"),
        (b"GET /cluster/v1/join/../../who HTTP/1.1\r\nHost: x\r\n\r\n", b"403"),
        (b"DELETE /cluster/v1/join HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
        (b"POST /cluster/v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 16385\r\n\r\n", b"413"),
        (b"POST /cluster/v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", b"400"),
        (b"POST /cluster/v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n[[[[", b"400"),
        (
            b"POST /cluster/v1/join HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"4000\r\n"
            + b"a" * 0x4000
            + b"\r\n1\r\na\r\n0\r\n\r\n",
            b"413",
        ),
    ],
    ids=["no certificate", "dots", "method", "too long", "empty", "depth", "too long in chunks"],
)
async def test_without_a_certificate_only_the_join_route_answers(
    seat: Seat, request_bytes: bytes, status: bytes
) -> None:
    async with seat.open() as address:
        head = request_bytes.replace(b"\r\nHost: x", b"\r\nHost: x\r\nConnection: close", 1)
        answer = await call(address, trusting_nobody(), head)
        assert answer.split(b" ", 2)[1] == status
    assert MAX_REQUEST_BYTES == 0x4000


async def test_a_slow_body_is_cut(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake_server, "BODY_DEADLINE_S", 0.05)
    async with seat.open() as address:
        head = (
            b"POST /cluster/v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{"
        )
        answer = await call(address, trusting_nobody(), head)
        assert answer.split(b" ", 2)[1] == b"408"


# ── TLS between nodes ───────────────────────────────────────────────────────────────


async def test_only_tls_1_3_is_spoken(seat: Seat) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with seat.open() as address:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await call(address, old, GET_WHO)


async def test_a_node_of_another_cluster_is_refused(seat: Seat, tmp_path: Path) -> None:
    other = Seat(tmp_path / "other")
    async with seat.open() as address:
        stranger = other.tls.client()
        stranger.verify_mode = ssl.CERT_NONE
        assert not await call(address, stranger, GET_WHO)


async def test_a_removed_node_is_refused_while_its_certificate_is_valid(seat: Seat, tmp_path: Path) -> None:
    async with seat.open() as address:
        node = await admit(seat, tmp_path / "n1")
        seat.removed[NodeId("n1")] = await seat.world.admission.remove("n1", actor="k1")
        assert (await call(address, node.client(), GET_WHO)).startswith(b"HTTP/1.1 403")


async def test_an_expired_certificate_opens_nothing(seat: Seat, tmp_path: Path) -> None:
    async with seat.open() as address:
        today = seat.world.now
        seat.world.now -= 2 * ca.DAY_S
        node = await admit(seat, tmp_path / "n1")
        seat.world.now = today
        assert not await call(address, node.client(), GET_WHO)


async def test_a_client_knows_which_node_answered(seat: Seat, tmp_path: Path) -> None:
    async with seat.open() as address:
        node = await admit(seat, tmp_path / "n1")
        _, writer = await asyncio.open_connection(address.host, address.port, ssl=node.client())
        connection = writer.get_extra_info("ssl_object")
        assert peer_of(connection, expected=NodeId("n0")).role == "server"
        with pytest.raises(Forbidden, match="node n2 was expected"):
            peer_of(connection, expected=NodeId("n2"))
        writer.close()
        await writer.wait_closed()


async def test_a_listener_takes_a_renewed_certificate_without_a_restart(seat: Seat) -> None:
    async with seat.open() as address:

        async def seen() -> bytes | None:
            _, writer = await asyncio.open_connection(address.host, address.port, ssl=seat.tls.client())
            certificate: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            await writer.wait_closed()
            return certificate

        before = await seen()
        seat.renew()
        assert await seen() == before
        seat.tls.reload()
        assert await seen() != before


async def test_a_running_listener_follows_the_roll_of_the_ca(seat: Seat, tmp_path: Path) -> None:
    async with seat.open() as address:
        old = await admit(seat, tmp_path / "n1")
        world, now = seat.world, seat.world.now
        rolled = promote(announce(world.keys.authorities, ca.make_authority("c1", now), now - OVERLAP_S), now)

        def use(authorities: object) -> None:
            world.keys = msgspec.structs.replace(world.keys, authorities=authorities)
            seat.renew()
            seat.tls.reload()

        use(msgspec.structs.replace(rolled, active=rolled.active))
        new = await admit(seat, tmp_path / "n2", "n2")
        assert (await call(address, new.client(), GET_WHO)).endswith(b"n2")
        client = trusting(rolled.bundle)
        client.load_cert_chain(tmp_path / "n1/identity/node.pem", tmp_path / "n1/identity/key.pem")
        assert (await call(address, client, GET_WHO)).endswith(b"n1")
        use(retire(rolled, now + OVERLAP_S))
        assert not await call(address, client, GET_WHO)
        with pytest.raises(ssl.SSLCertVerificationError):
            await call(address, old.client(), GET_WHO)


# ── files ───────────────────────────────────────────────────────────────────────────


def test_identity_files_are_private_and_come_back(seat: Seat, tmp_path: Path) -> None:
    files = seat.files
    assert files.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in files.folder.iterdir()} == {0o600}
    assert files.cluster_keys() == seat.world.keys
    kept = files.credentials()
    assert kept is not None
    assert kept.keys is None
    assert "PRIVATE" not in (files.folder / "credentials.json").read_text()
    keys = files.node_keys()
    assert files.node_keys() == keys
    files.certificate.write_text("half")
    assert files.restore() == kept
    assert files.certificate.read_text() == kept.certificate
    files.forget()
    assert list(files.folder.iterdir()) == []
    assert files.node_keys() != keys


def test_nothing_is_written_where_all_is_right(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "replace_file", full)
    assert seat.files.restore() == seat.files.credentials()
    seat.files.certificate.write_text("half")
    with pytest.raises(DiskFull, match="No space left"):
        seat.files.restore()


def test_a_damaged_file_is_named_and_never_quoted(seat: Seat) -> None:
    path = seat.files.folder / "cluster.json"
    path.write_text('{"authorities": "SECRET"}')
    with pytest.raises(Invalid, match=r"cluster\.json") as refused:
        seat.files.cluster_keys()
    assert "SECRET" not in refused.value.message


def test_a_broken_reload_keeps_what_was_loaded(seat: Seat) -> None:
    before = seat.tls.client()
    seat.files.certificate.write_text("broken")
    with pytest.raises(Unavailable):
        seat.tls.reload()
    assert seat.tls.client() is before
