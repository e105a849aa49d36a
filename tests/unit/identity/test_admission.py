"""The door of the cluster: races, double use, throttle, renewal, removal."""

from __future__ import annotations

from collections.abc import Awaitable

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.identity.world import World

from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.base.errors import (
    Conflict,
    Forbidden,
    OllamaDistributedError,
    QueueFull,
    Unauthenticated,
)
from ollama_distributed.cluster.identity import ca, nats_jwt
from ollama_distributed.cluster.identity.roster import REVOKED_FOR_S, NodeRecord, check_peer, revoked_users
from ollama_distributed.cluster.identity.wire import Credentials, RenewRequest

pytestmark = pytest.mark.anyio

HERE = "10.0.0.5"


async def parallel(*joins: Awaitable[Credentials]) -> list[Credentials | OllamaDistributedError]:
    outcomes: list[Credentials | OllamaDistributedError] = []

    async def one(join: Awaitable[Credentials]) -> None:
        try:
            outcomes.append(await join)
        except OllamaDistributedError as refused:
            outcomes.append(refused)

    async with anyio.create_task_group() as group:
        for join in joins:
            group.start_soon(one, join)
    return outcomes


async def test_of_fifty_parallel_uses_of_a_one_use_token_one_succeeds() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    outcomes = await parallel(
        *(world.admission.join(world.request(token, f"n{i}"), f"10.0.0.{i}") for i in range(50))
    )
    admitted = [outcome for outcome in outcomes if isinstance(outcome, Credentials)]
    assert len(admitted) == 1
    assert sum(isinstance(outcome, Forbidden) for outcome in outcomes) == 49
    assert sum(event.kind == "node.admitted" for event in world.audit) == 1
    assert sum(event.alarm for event in world.audit) == 49
    assert [key for key in world.records.entries if "nodes" in key] == [f"admission.nodes.{admitted[0].node}"]


async def test_the_coordination_port_serves_as_records() -> None:
    async with MemoryEngine().client("n0") as coordination:
        world = World()
        world.use(coordination)
        token = await world.admission.create_token("node", creator="k1")
        outcomes = await parallel(
            *(world.admission.join(world.request(token, f"n{i}"), f"10.0.0.{i}") for i in range(50))
        )
        assert sum(isinstance(outcome, Credentials) for outcome in outcomes) == 1
        nodes = (await coordination.scan("admission.nodes.")).entries
        assert len(nodes) == 1
        await world.admission.remove(nodes[0].key.removeprefix("admission.nodes."), actor="k1")


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(1, 20))
def test_parallel_joins_never_exceed_the_uses(uses: int, joiners: int) -> None:
    async def run() -> int:
        world = World()
        token = await world.admission.create_token("node", creator="k1", uses=uses)
        joins = (world.admission.join(world.request(token, f"n{i}"), HERE) for i in range(joiners))
        return sum(isinstance(outcome, Credentials) for outcome in await parallel(*joins))

    assert anyio.run(run) == min(uses, joiners)


async def test_a_joiner_whose_answer_was_lost_asks_again_and_gets_it() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    request = world.request(token, "n1")
    await world.admission.join(request, HERE)
    again = await world.admission.join(request, HERE)
    assert ca.read_peer(again.certificate.encode()).node == "n1"
    assert world.audit[-1].kind == "node.admitted_again"
    with pytest.raises(Forbidden, match="used already"):
        await world.admission.join(world.request(token, "n1"), HERE)  # same name, another key
    assert world.audit[-1].alarm


async def test_a_node_certificate_states_what_the_server_saw_and_allowed() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1", hosts=["gpu.lan"])
    given_ = await world.admission.join(world.request(token, "n1"), HERE)
    peer = ca.read_peer(given_.certificate.encode())
    assert peer.names.dns == ("n1.c1.internal", "gpu.lan")
    assert peer.names.addresses == (HERE,)
    assert given_.keys is None
    claims = nats_jwt.read_jwt(given_.nats_jwt)
    assert (claims.name, claims.issuer) == ("n1", world.keys.nats.node_signing.public)
    assert claims.expires_at == peer.expires_at


async def test_a_token_for_a_node_makes_no_server() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    with pytest.raises(Forbidden, match="another role"):
        await world.admission.join(world.request(token, "n1", role="server"), HERE)
    assert world.audit[-1].reason == "wrong_role"
    assert world.audit[-1].alarm
    assert not any("nodes" in key for key in world.records.entries)


async def test_a_server_gets_the_clusters_keys_once_and_never_by_renewal() -> None:
    world = World()
    token = await world.admission.create_token("server", creator="k1")
    request = world.request(token, "s2")
    assert (await world.admission.join(request, HERE)).keys == world.keys
    renewed = await world.admission.renew(RenewRequest(node="s2", csr=request.csr), HERE)
    assert renewed.keys is None
    assert renewed.role == "server"


async def test_expired_and_revoked_tokens_say_so() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    request = world.request(token, "n1")
    world.now += 601
    with pytest.raises(Forbidden, match="expired"):
        await world.admission.join(request, HERE)
    token = await world.admission.create_token("node", creator="k1")
    request = world.request(token, "n1")
    await world.admission.revoke_token(request.token_id, actor="k2")
    with pytest.raises(Forbidden, match="revoked"):
        await world.admission.join(request, HERE)


async def test_five_wrong_tries_close_the_door_for_that_address_only() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    right = world.request(token, "n1")
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            await world.admission.join(msgspec.structs.replace(right, secret="guess"), HERE)
    with pytest.raises(QueueFull) as refused:
        await world.admission.join(right, HERE)
    assert 0 < refused.value.retry_after_s <= 12
    await world.admission.join(right, "10.0.0.6")


async def test_an_unknown_token_reads_like_a_wrong_secret() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    right = world.request(token, "n1")
    texts = set()
    for wrong in ({"secret": "x"}, {"token_id": "zzzzzzzz"}, {"token_id": "../x"}):
        with pytest.raises(Unauthenticated) as refused:
            await world.admission.join(msgspec.structs.replace(right, **wrong), HERE)
        texts.add(refused.value.message)
    assert len(texts) == 1


async def test_the_id_of_a_living_node_cannot_be_taken_and_costs_no_use() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1", uses=2)
    await world.admission.join(world.request(token, "n1"), HERE)
    with pytest.raises(Conflict, match="in the cluster already"):
        await world.admission.join(world.request(token, "n1"), HERE)
    await world.admission.join(world.request(token, "n2"), HERE)


async def test_renewal_needs_the_key_and_works_after_a_week() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    request = world.request(token, "n1")
    await world.admission.join(request, HERE)
    world.now += 7 * ca.DAY_S
    renewed = await world.admission.renew(RenewRequest(node="n1", csr=request.csr), HERE)
    assert ca.read_peer(renewed.certificate.encode()).issued_at == world.now
    stranger = RenewRequest(node="n1", csr=ca.make_request(ca.make_key()).decode())
    with pytest.raises(Unauthenticated):
        await world.admission.renew(stranger, HERE)


async def test_a_removed_node_is_out_until_it_comes_with_a_new_key() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1", uses=3)
    request = world.request(token, "n1")
    credentials = await world.admission.join(request, HERE)
    peer = ca.read_peer(credentials.certificate.encode())
    check_peer(peer, "c1", None, world.now)
    record = await world.admission.remove("n1", actor="k1")
    assert await world.admission.remove("n1", actor="k1") == record
    with pytest.raises(Forbidden, match="removed"):
        check_peer(peer, "c1", record, world.now)
    with pytest.raises(Forbidden):
        await world.admission.renew(RenewRequest(node="n1", csr=request.csr), HERE)
    with pytest.raises(Forbidden, match="new key"):
        await world.admission.join(request, HERE)
    anew = world.request(token, "n1")
    await world.admission.join(anew, HERE)
    entry = world.records.entries["admission.nodes.n1"]
    record = msgspec.json.decode(entry.value, type=NodeRecord)
    with pytest.raises(Forbidden, match="another key"):
        check_peer(peer, "c1", record, world.now)
    # The old user stays refused, with JWTs made by a server that had not heard yet; then it is pruned.
    assert revoked_users([record], world.now) == {request.nats_user: world.now + REVOKED_FOR_S}
    assert revoked_users([record], world.now + REVOKED_FOR_S) == {}


async def test_a_peer_of_another_cluster_or_past_its_time_is_refused() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    peer = ca.read_peer((await world.admission.join(world.request(token, "n1"), HERE)).certificate.encode())
    with pytest.raises(Forbidden, match="another cluster"):
        check_peer(peer, "c2", None, world.now)
    with pytest.raises(Forbidden, match="expired"):
        check_peer(peer, "c1", None, peer.expires_at)


async def test_no_event_and_no_record_holds_a_secret() -> None:
    world = World()
    token = await world.admission.create_token("node", creator="k1")
    request = world.request(token, "n1")
    await world.admission.join(request, HERE)
    kept = b"".join(entry.value for entry in world.records.entries.values()).decode()
    for text in (repr(world.audit), kept, repr(request)):
        assert request.secret not in text
