"""Who gets onto the bus and stays there: certificates and JWTs that are renewed, expire, are
revoked, or belong to the wrong role; servers that come and go."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import anyio
import anyio.abc
import msgspec
import pytest
from cryptography import x509
from tests.limits import SOON_S
from tests.suspended import suspended
from tests.trust import Trust
from tests.voters import ready, refused, written

from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.adapters.coordination.nats.session import Address, Session, short_connection
from ollama_distributed.base.errors import DeadlineExceeded, Unavailable
from ollama_distributed.cluster.identity import nats_jwt
from ollama_distributed.cluster.identity.roster import REVOKED_FOR_S
from ollama_distributed.cluster.ports import ABSENT, Message

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    return Trust(tmp_path)


async def _shows(trust: Trust, server: NatsServer) -> None:
    """Wait until the server shows the certificate that is in its files."""
    with anyio.fail_after(SOON_S):
        while await _serial(trust, server) != _own_serial(trust, server.name):
            await anyio.sleep(0.02)


async def _serial(trust: Trust, server: NatsServer) -> int:
    """Of the certificate that the server shows now."""
    context = trust.tls("looker").client()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname="any")
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown).serial_number
    finally:
        writer.transport.abort()


def _own_serial(trust: Trust, node: str) -> int:
    return x509.load_pem_x509_certificate(trust.files(node).certificate.read_bytes()).serial_number


async def test_a_renewed_certificate_is_shown_after_a_reload(trust: Trust) -> None:
    async with (
        trust.server("n1") as server,
        NatsCoordination(trust.address(server, node="n1"), name="n1", create=True) as one,
    ):
        old, pid = _own_serial(trust, "n1"), server.pid
        assert await _serial(trust, server) == old
        revision = await written(one, "k", b"1")
        trust.issue("n1")
        assert _own_serial(trust, "n1") != old
        await server.reload()
        await _shows(trust, server)
        assert (server.pid, server.restarts) == (pid, 0)
        assert one.connected
        assert await written(one, "k", b"2", revision=revision) > revision


async def test_a_subscription_is_there_when_flush_returns(
    trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a request that comes just then is told that nobody answers."""
    sent = bytearray()
    async with (
        trust.server("n1") as server,
        short_connection(trust.address(server, node="n1"), name="n1") as connection,
    ):
        transport = connection._transport
        write, writelines = transport.write, transport.writelines

        def writes(data: bytes) -> None:
            sent.extend(data)
            write(data)

        def writes_lines(lines: list[bytes]) -> None:
            sent.extend(b"".join(lines))
            writelines(lines)

        monkeypatch.setattr(transport, "write", writes)
        monkeypatch.setattr(transport, "writelines", writes_lines)
        await connection.subscribe("cmd.n1.x")
        await connection.flush()
    assert 0 <= sent.find(b"SUB cmd.n1.x") < sent.find(b"PING")


async def test_the_revoked_stay_out_after_a_reload_and_a_restart(trust: Trust) -> None:
    user = trust.files("n2").node_keys().nats.public
    async with trust.server("n1") as server:
        async with (
            NatsCoordination(trust.address(server, node="n1"), name="n1", create=True) as one,
            NatsCoordination(trust.address(server, node="n2", role="node"), name="n2") as two,
        ):
            await ready(two)
            assert (await two.scan()).entries == ()
            now = time.time()
            account = nats_jwt.account_jwt(trust.keys.nats, now, revoked={user: now + REVOKED_FOR_S})
            assert await server.push_account(account) == 1
            with anyio.fail_after(SOON_S):
                while two.connected:
                    await anyio.sleep(0.01)
            assert one.connected
            with pytest.raises(Unavailable):
                await two.publish("hb.n2", b"")
        await server.reload()
        await _refused(trust, server, "n2")
    async with trust.server("n1") as server:
        await _refused(trust, server, "n2")


async def _refused(trust: Trust, server: NatsServer, node: str) -> None:
    assert await refused(trust.address(server, node=node, role="node"), node, "uthorization")


async def test_a_server_that_never_shakes_hands_is_given_up(trust: Trust) -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as silent:
        port = silent.extra(anyio.abc.SocketAttribute.local_port)
        url = f"tls://127.0.0.1:{port}"  # connects: the kernel accepts; nobody reads
        session = Session(Address(urls=(url,), login=trust.login("n1")), name="n1")
        with anyio.fail_after(SOON_S), pytest.raises(Unavailable):
            await session.open(0.2)


async def test_an_expired_login_comes_back_with_the_renewed_one(trust: Trust) -> None:
    async with trust.server("n1") as server:
        address = trust.address(server, node="n2", role="node")
        session = Session(address, name="n2")
        came = 0

        def count() -> None:
            nonlocal came
            came += 1

        session.on_connect(count)
        session.start()
        try:
            with anyio.fail_after(SOON_S):
                while not came:  # a busy machine may let one expire unused
                    trust.issue("n2", "node", life_s=2.0)
                    with anyio.move_on_after(2.0):
                        await session.wait_connected()
            trust.issue("n2", "node")  # renewed; the connection still has the old one
            with anyio.fail_after(SOON_S):
                while came < 2:  # cut off when the old one expired, and back
                    await anyio.sleep(0.02)
            await session.publish("hb.n2", b"")
            assert session.connected
        finally:
            await session.close()


async def test_who_stops_waiting_leaves_the_connection_as_it_was(trust: Trust) -> None:
    heard: list[bytes] = []
    async with trust.server("n1") as server:
        session = Session(trust.address(server, node="n1"), name="n1")
        came: list[int] = []
        session.on_connect(lambda: came.append(1))
        await session.open(SOON_S)
        try:
            with suspended(server.pid), anyio.move_on_after(0.2) as waited:
                await session.subscribe("hb.*", lambda message: heard.append(message.data))
            assert waited.cancelled_caught
            with anyio.fail_after(SOON_S):
                while not heard:
                    await session.publish("hb.n1", b"beat")
                    await anyio.sleep(0.05)
            assert came == [1], "the same connection"
        finally:
            await session.close()


async def test_a_mere_node_cannot_pose_as_a_server(trust: Trust) -> None:
    async with trust.server("n9") as posing:
        trust.issue("n9", "node")
        await posing.reload()
        await _shows(trust, posing)
        assert await refused(trust.address(posing, node="n2"), "n2", r"doesn't match|[Hh]ostname")


async def test_a_server_in_clear_text_gets_no_login(trust: Trust) -> None:
    heard: list[bytes] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","nonce":"abc","auth_required":true,"max_payload":1000}\r\n')
        heard.append(await reader.read(4096))
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with listener:
        url = f"tls://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        with anyio.fail_after(SOON_S):
            while not heard:
                with pytest.raises(Unavailable):
                    await Session(Address(urls=(url,), login=trust.login("n1")), name="n1").open(0.5)
    assert not any(b"CONNECT" in data or b"jwt" in data for data in heard)


async def test_strangers_without_a_certificate_are_refused(trust: Trust) -> None:
    async with trust.server("n1") as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=trust.keys.authorities.bundle.decode())
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.port, ssl=context, server_hostname="nats.c1.internal"
        )
        try:
            with anyio.fail_after(SOON_S), pytest.raises(ssl.SSLError, match="certificate required"):
                await reader.read()
        finally:
            writer.transport.abort()


async def test_a_node_writes_its_own_keys_only(trust: Trust) -> None:
    async with (
        trust.server("n1") as server,
        NatsCoordination(trust.address(server, node="n1"), name="n1", create=True) as one,
        NatsCoordination(trust.address(server, node="n2", role="node"), name="n2") as two,
    ):
        revision = await written(two, "nodes.n2.advert", b"1")
        assert [entry.key for entry in (await two.scan()).entries] == ["nodes.n2.advert"]
        assert await written(two, "nodes.n2.advert", b"2", revision=revision) > revision
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await two.create("members.n2", b"evil")
        assert await one.get("members.n2") is None
        async with one.subscribe("hb.*") as beats:
            await two.publish("hb.n2", b"beat")
            with anyio.fail_after(SOON_S):
                assert await anext(beats) == Message("hb.n2", b"beat")


async def test_a_node_that_met_a_lost_quorum_writes_again_after_it(trust: Trust) -> None:
    async with (
        trust.server("n1") as server,
        NatsCoordination(trust.address(server, node="n1"), name="n1", create=True) as one,
        NatsCoordination(trust.address(server, node="n2", role="node"), name="n2") as two,
    ):
        revision = await written(two, "nodes.n2.advert", b"1")
        with suspended(server.pid):
            with pytest.raises(DeadlineExceeded):
                await two.put("nodes.n2.advert", b"2", revision=revision)
            assert not two.writable
        with anyio.fail_after(SOON_S):
            while not two.writable:
                await anyio.sleep(0.01)
        entry = await one.get("nodes.n2.advert")
        assert entry is not None
        await written(two, "nodes.n2.advert", b"3", revision=entry.revision)


async def test_a_consumer_speaks_in_nobodys_name(trust: Trust) -> None:
    """A node may read the state by a consumer, and a consumer delivers to any subject: what the
    node wrote would come as another's beat, or as a question of a server."""
    asked: list[bytes] = []

    async def answer(message: Message) -> bytes:
        asked.append(message.data)
        return b"done"

    async with (
        trust.server("n1") as server,
        NatsCoordination(trust.address(server, node="n1"), name="n1", create=True) as one,
        NatsCoordination(trust.address(server, node="n2", role="node"), name="n2") as two,
        one.subscribe("hb.*") as beats,
        one.serve("cmd.n1.propose", answer),
    ):
        await written(two, "nodes.n2.advert", b"forged")
        session = Session(trust.address(server, node="n2", role="node"), name="n2")
        await session.open(SOON_S)
        try:
            for number, subject in enumerate(("hb.n3", "cmd.n1.propose")):
                consumer = {
                    "name": f"c{number}",
                    "deliver_subject": subject,
                    "deliver_policy": "all",
                    "ack_policy": "none",
                    "filter_subject": "$KV.cfg.nodes.n2.advert",
                    "mem_storage": True,
                    "num_replicas": 1,
                }
                create = f"$JS.API.CONSUMER.CREATE.KV_cfg.c{number}.$KV.cfg.nodes.n2.advert"
                body = msgspec.json.encode({"stream_name": "KV_cfg", "config": consumer})
                answered = msgspec.json.decode(await session.request(create, body, timeout_s=SOON_S))
                assert "error" not in answered, answered
            await two.publish("hb.n2", b"beat")  # after what was forged
            with anyio.fail_after(SOON_S):
                assert await anext(beats) == Message("hb.n2", b"beat")
            assert await one.request("cmd.n1.propose", b"asked") == b"done"
        finally:
            await session.close()
    assert asked == [b"asked"]


async def test_a_node_starts_before_its_servers_and_follows_them(trust: Trust) -> None:
    first = trust.server("n1")
    async with first, NatsCoordination(trust.address(first, node="n1"), name="n1", create=True) as one:
        await written(one, "k", b"1")
    second = trust.server("n2")
    async with second, NatsCoordination(trust.address(second, node="n2"), name="n2", create=True) as two:
        revision = ABSENT
        for _ in range(9):  # its history goes further than the first one's
            revision = await two.put("k", b"2", revision=revision)

    # Both are down; the client knows the first one's place only.
    async with NatsCoordination(trust.address(first, node="n3"), name="n3") as client:
        with pytest.raises(Unavailable):
            await client.scan()
        with pytest.raises(Unavailable):
            await client.put("k", b"3", revision=ABSENT)
        async with client.subscribe("hb.*") as beats:  # waits for nothing either
            async with first:
                await ready(client)
                assert [entry.value for entry in (await client.scan()).entries] == [b"1"]
                await client.publish("hb.n3", b"beat")
                with anyio.fail_after(SOON_S):
                    assert await anext(beats) == Message("hb.n3", b"beat")
            client.update_servers([second.url])
            async with second:
                with anyio.fail_after(SOON_S):
                    while (entries := await _values(client)) != [b"2"]:
                        assert entries in ([b"1"], [b"2"]), "the mirror answers while nobody is there"
                        await anyio.sleep(0.05)


async def _values(client: NatsCoordination) -> list[bytes]:
    return [entry.value for entry in (await client.scan()).entries]
