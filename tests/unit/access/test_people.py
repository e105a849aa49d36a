"""Users, sessions and tokens on nodes that share one state: the desk of a server, followed by others."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import msgspec
import pytest
from tests.limits import SOON_S

from ollama_distributed.access.attempts import FREE
from ollama_distributed.access.keys import make_admin_key, make_key
from ollama_distributed.access.passwords import Passwords
from ollama_distributed.access.people import (
    ABSOLUTE_S,
    IDLE_S,
    REPLACED_S,
    People,
    csrf_of,
)
from ollama_distributed.access.service import Authenticator, Caller
from ollama_distributed.access.tokens import kid_of
from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.base.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    OllamaDistributedError,
    TooManyAttempts,
    Unauthenticated,
    Unavailable,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.users import NewUserAsk, PasswordAsk, UserAsk
from ollama_distributed.cluster.ports import Coordination
from ollama_distributed.cluster.tasks import end
from ollama_distributed.node.people import ops
from ollama_distributed.node.people.desk import MAX_SESSIONS, Desk
from ollama_distributed.node.people.mirror import SESSIONS, USERS, SharedPeople
from ollama_distributed.node.people.ports import Person
from ollama_distributed.node.people.signers import OVERLAP_S, SIGNS_S, Signers

CLUSTER = "c1"
ADMIN, ADMIN_RECORD = make_admin_key(0.0)
VIEWER, VIEWER_RECORD = make_key("viewer", now=0.0)
PASSWORD, OTHER = "correct horse", "battery staple"
CHEAP = Passwords(time_cost=1, memory_kib=8)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Node:
    def __init__(self, folder: Path, name: str, clock: Clock, client: Coordination) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.client, self.clock = folder, client, clock
        self.people = People(wall=clock.time)
        self.shared = SharedPeople(folder, self.people)
        self.shared.restore(CLUSTER)
        self.authenticator = Authenticator([ADMIN_RECORD, VIEWER_RECORD], require_key=True, wall=clock.time)
        self.authenticator.know(self.people)
        self.signers = Signers(folder, NodeId(name), self.people)
        self.away = False
        self.desk = Desk(self.shared, self.signers, self.authenticator, clock, self._link, passwords=CHEAP)

    async def _link(self) -> Coordination:
        if self.away:
            raise Unavailable("away")
        return self.client

    async def sign(self) -> None:
        await self.signers.step(self.client, cluster=CLUSTER, now=self.clock.time())

    def who(self, credential: str) -> Identity:
        return self.authenticator.identify(Caller(credential, at_this_machine=False))

    def knows(self, credential: str) -> bool:
        try:
            self.who(credential)
        except Unauthenticated:
            return False
        return True

    async def sign_in(
        self, name: str = "ann", password: str = PASSWORD, address: str = "192.0.2.1"
    ) -> ops.Done:
        return await self.desk.do(ops.SignIn(name=name, password=password, address=address, agent="pytest"))


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.engine = folder, Clock(), MemoryEngine()
        self.tasks: list[asyncio.Task[None]] = []
        self.clients: list[object] = []

    async def node(self, name: str) -> Node:
        client = await self.engine.client(name).__aenter__()
        self.clients.append(client)
        node = Node(self.folder / name, name, self.clock, client)
        follow = node.shared.follow(client, cluster=CLUSTER, removed=lambda _: False)
        self.tasks.append(asyncio.create_task(follow))
        return node


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    try:
        yield world
    finally:
        await end(world.tasks)
        for client in world.clients:
            await client.__aexit__(None, None, None)  # type: ignore[attr-defined]


@pytest.fixture
async def one(world: World) -> Node:
    node = await world.node("one")
    await node.desk.do(new("ann"))
    return node


def new(name: str, role: str = "user", credential: str = ADMIN) -> ops.CreateUser:
    ask = msgspec.convert({"name": name, "password": PASSWORD, "role": role, "team": "red"}, NewUserAsk)
    return ops.CreateUser(credential=credential, ask=ask)


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON_S):
        while not true():
            await anyio.sleep(0.002)


async def test_a_session_made_on_one_node_holds_on_all_and_ends_on_all(world: World, one: Node) -> None:
    two = await world.node("two")
    token = (await one.sign_in()).token
    await until(lambda: two.knows(token))
    who = two.who(token)
    assert (who.role, who.team, who.user, who.key_id) == ("user", "red", "ann", None)
    await two.desk.do(ops.SignOut(credential=token))
    await until(lambda: not one.knows(token))


@pytest.mark.parametrize(
    "change",
    [
        ops.SetPassword(credential=ADMIN, name="ann", ask=PasswordAsk(password=OTHER)),
        ops.ChangeUser(credential=ADMIN, name="ann", ask=UserAsk(disabled=True)),
        ops.DeleteUser(credential=ADMIN, name="ann"),
        ops.EndSessions(credential=ADMIN, name="ann"),
    ],
    ids=lambda op: type(op).__name__,
)
async def test_what_ends_sessions_and_tokens_everywhere(world: World, one: Node, change: ops.Op) -> None:
    two = await world.node("two")
    await one.sign()
    token = (await one.sign_in()).token
    jwt = (await one.desk.do(ops.Exchange(credential=token))).token
    await until(lambda: two.knows(token) and two.knows(jwt))
    world.clock.now += 1
    await one.desk.do(change)
    await until(lambda: not two.knows(token) and not two.knows(jwt))
    if isinstance(change, ops.DeleteUser):
        await one.desk.do(new("ann"))  # another person of the same name
        assert not one.knows(jwt)
    assert not one.knows(token)


async def test_a_role_changes_at_once_and_a_session_stays(one: Node) -> None:
    token = (await one.sign_in()).token
    assert one.who(token).role == "user"
    await one.desk.do(ops.ChangeUser(credential=ADMIN, name="ann", ask=UserAsk(role="operator")))
    assert one.who(token).role == "operator"


async def test_wrong_names_and_passwords_look_alike_and_wait(one: Node) -> None:
    said = set()
    for name in ("ann", "nobody", "../etc", ""):
        with pytest.raises(Unauthenticated) as refused:
            await one.sign_in(name, "not the password")
        said.add(refused.value.message)
    assert len(said) == 1
    for _ in range(4):
        with pytest.raises(Unauthenticated):
            await one.sign_in("ann", "not the password")
    with pytest.raises(TooManyAttempts) as later:
        await one.sign_in("ann", "not the password")
    assert later.value.retry_after_s > 0
    one.clock.now += 60
    assert one.knows((await one.sign_in()).token)


async def test_many_tries_at_once_are_many_tries(one: Node) -> None:
    refused: list[type[OllamaDistributedError]] = []

    async def attempt() -> None:
        try:
            await one.sign_in(password="guess number one")
        except OllamaDistributedError as error:
            refused.append(type(error))

    async with anyio.create_task_group() as tasks:
        for _ in range(40):
            tasks.start_soon(attempt)
    assert refused.count(Unauthenticated) <= 6
    assert refused.count(TooManyAttempts) >= 34


async def test_a_session_ends_idle_and_in_any_case(world: World, one: Node) -> None:
    token = (await one.sign_in()).token
    for _ in range(int(ABSOLUTE_S / (IDLE_S / 2))):
        assert one.knows(token)
        await one.desk.do(ops.Touch(seen=dict(one.people.seen)))
        world.clock.now += IDLE_S / 2
    assert not one.knows(token)  # used all the time
    token = (await one.sign_in()).token
    world.clock.now += IDLE_S
    assert not one.knows(token)
    await one.desk.forget_old()
    assert not (await one.client.scan(SESSIONS)).entries


async def test_a_renewed_token_replaces_the_old_one_within_a_minute(world: World, one: Node) -> None:
    old = (await one.sign_in()).token
    renewed = await one.desk.do(ops.Renew(credential=old))
    assert renewed.token != old
    assert csrf_of(renewed.token) != csrf_of(old)
    assert one.knows(old)
    assert one.knows(renewed.token)
    world.clock.now += REPLACED_S
    assert not one.knows(old)
    assert one.knows(renewed.token)


async def test_the_oldest_session_makes_room(world: World, one: Node) -> None:
    first = (await one.sign_in()).token
    for _ in range(MAX_SESSIONS):
        world.clock.now += 1
        last = (await one.sign_in()).token
    assert not one.knows(first)
    assert one.knows(last)


async def test_only_administrators_change_users_whoever_passes_it_on(one: Node) -> None:
    session = (await one.sign_in()).token
    changes: list[ops.Op] = [
        new("bob"),
        ops.ChangeUser(credential="", name="ann", ask=UserAsk(role="admin")),
        ops.SetPassword(credential="", name="ann", ask=PasswordAsk(password=OTHER)),
        ops.DeleteUser(credential="", name="ann"),
        ops.EndSessions(credential="", name="ann"),
    ]
    for change in changes:
        for credential in ("", "Bearer", session, VIEWER, ADMIN[:-1] + "x"):
            with pytest.raises((Unauthenticated, Forbidden)):
                await one.desk.do(msgspec.structs.replace(change, credential=credential))
    await one.desk.do(new("root", "admin"))
    admin = (await one.sign_in("root")).token
    await one.desk.do(new("bob", credential=admin))
    assert one.people.users["bob"].created_by == "root"


async def test_nobody_ends_another_s_session(one: Node) -> None:
    await one.desk.do(new("bob"))
    mine, theirs = await one.sign_in(), await one.sign_in("bob")
    assert theirs.session is not None
    with pytest.raises(NotFound):
        await one.desk.do(ops.SignOut(credential=mine.token, session=theirs.session.id))
    assert one.knows(theirs.token)
    await one.desk.do(ops.SignOut(credential=ADMIN, session=theirs.session.id))
    assert not one.knows(theirs.token)


async def test_one_s_own_password_needs_the_current_one(one: Node) -> None:
    token = (await one.sign_in()).token
    wrong = PasswordAsk(password=OTHER, current="not the password")
    with pytest.raises(Unauthenticated):
        await one.desk.do(ops.ChangeOwnPassword(credential=token, ask=wrong))
    right = PasswordAsk(password=OTHER, current=PASSWORD)
    one.clock.now += 1
    await one.desk.do(ops.ChangeOwnPassword(credential=token, ask=right))
    assert not one.knows(token)
    with pytest.raises(Unauthenticated):
        await one.sign_in()
    assert one.knows((await one.sign_in(password=OTHER)).token)


@pytest.mark.parametrize("password", ["short", "a" * 20, "x" * 300])
async def test_passwords_that_are_none(one: Node, password: str) -> None:
    with pytest.raises(Invalid) as refused:
        await one.desk.do(ops.SetPassword(credential=ADMIN, name="ann", ask=PasswordAsk(password=password)))
    assert password not in refused.value.message


@pytest.mark.parametrize("name", ["", "Ann", "a b", "a/b", "a" * 65, ".a", "a\n", "é"])
async def test_names_that_are_none(one: Node, name: str) -> None:
    with pytest.raises(Invalid):
        await one.desk.do(new(name))


async def test_a_name_is_given_once(one: Node) -> None:
    with pytest.raises(Conflict):
        await one.desk.do(new("ann"))


async def test_what_is_stored_shows_no_secret(one: Node) -> None:
    token = (await one.sign_in()).token
    secret = token.split("_", 2)[2]  # which may hold more of them
    await one.sign()
    stored = b"".join(entry.value for entry in (await one.client.scan("people.")).entries)
    assert PASSWORD.encode() not in stored
    assert secret.encode() not in stored
    private = (one.folder / "signers.json").read_bytes()
    assert msgspec.json.decode(private)["signers"][0]["private"].encode() not in stored
    await until((one.folder / "people.json").exists)
    kept = (one.folder / "people.json").read_bytes()
    assert secret.encode() not in kept
    assert b"argon2" not in kept
    for name in ("people.json", "signers.json"):
        assert (one.folder / name).stat().st_mode & 0o077 == 0


async def test_who_is_signed_in_is_known_after_a_restart_without_coordination(
    world: World, one: Node
) -> None:
    await one.sign()
    token = (await one.sign_in()).token
    jwt = (await one.desk.do(ops.Exchange(credential=token))).token
    await until(
        lambda: (
            (one.folder / "people.json").exists() and token[4:20] in (one.folder / "people.json").read_text()
        )
    )
    again = Node(one.folder, "one", world.clock, one.client)
    again.away = True
    assert again.who(token).user == again.who(jwt).user == "ann"
    with pytest.raises(Unavailable):
        await again.sign_in()
    elsewhere = SharedPeople(one.folder, People(wall=world.clock.time))
    elsewhere.restore("another cluster")
    assert not elsewhere.people.users


async def test_signing_keys_change_with_an_overlap(world: World, one: Node) -> None:
    two = await world.node("two")
    await one.sign()
    session = (await one.sign_in()).token
    first = (await one.desk.do(ops.Exchange(credential=session))).token
    (kid,) = one.people.signers
    world.clock.now += SIGNS_S - OVERLAP_S
    await one.sign()
    session = (await one.sign_in()).token
    await until(lambda: len(two.people.signers) == 2 and two.knows(session))
    assert not two.knows(first)
    still = (await one.desk.do(ops.Exchange(credential=session))).token
    assert one.people.claims_of(still).sid
    assert kid_of(still) == kid
    world.clock.now += OVERLAP_S
    await one.sign()
    after = (await one.desk.do(ops.Exchange(credential=session))).token
    assert kid_of(after) != kid
    assert two.knows(after)
    world.clock.now += 2000
    await one.sign()
    await until(lambda: kid not in two.people.signers)


async def test_a_token_makes_no_token(one: Node) -> None:
    await one.sign()
    token = (await one.desk.do(ops.Exchange(credential=ADMIN))).token
    assert one.who(token).role == "admin"
    with pytest.raises(Forbidden):
        await one.desk.do(ops.Exchange(credential=token))


async def test_a_record_under_another_s_key_is_not_read(one: Node) -> None:
    value = msgspec.json.encode(msgspec.structs.replace(one.people.users["ann"], role="admin"))
    one.shared.learn(USERS + "0" * 32, value)
    assert one.people.users["ann"].role == "user"


class Provider:
    """Vouches for whom it is told to."""

    def __init__(self) -> None:
        self.person = Person(subject="https://idp|42", name="zoe", role="viewer", team="blue")

    async def start(self, **_: str) -> str:
        return "https://idp/authorize"

    async def finish(self, **_: str) -> Person:
        return self.person


FINISH = ops.OidcFinish(code="c", redirect_uri="u", nonce="n", verifier="v")


async def test_whom_the_provider_vouches_for(one: Node) -> None:
    one.desk._provider = provider = Provider()
    token = (await one.desk.do(FINISH)).token
    assert (one.who(token).role, one.who(token).team) == ("viewer", "blue")
    provider.person = msgspec.structs.replace(provider.person, role="operator")
    await one.desk.do(FINISH)
    assert one.who(token).role == "operator"  # as the provider has it now
    for password in ("", PASSWORD):
        with pytest.raises(Unauthenticated):
            await one.sign_in("zoe", password)
    with pytest.raises(Invalid):
        await one.desk.do(ops.SetPassword(credential=ADMIN, name="zoe", ask=PasswordAsk(password=OTHER)))
    for subject, name in (("https://idp|43", "zoe"), ("https://idp|42", "ann")):
        provider.person = msgspec.structs.replace(provider.person, subject=subject, name=name)
        with pytest.raises(Forbidden):  # nobody becomes another person by a name
            await one.desk.do(FINISH)


async def test_who_guesses_codes_waits_and_the_provider_is_left_alone(one: Node) -> None:
    """Anybody may send a code with a cookie of their own making; each would be asked of the provider."""
    asked: list[OllamaDistributedError | None] = []

    class Refusing(Provider):
        async def finish(self, **_: str) -> Person:
            asked.append(refusal)
            if refusal is not None:
                raise refusal
            return self.person

    one.desk._provider = Refusing()
    refusal: OllamaDistributedError | None = None
    here = msgspec.structs.replace(FINISH, address="192.0.2.7")
    for _ in range(30):
        await one.desk.do(here)  # an office behind one address
    refusal = Unavailable("the provider is away")
    for _ in range(30):
        with pytest.raises(Unavailable):
            await one.desk.do(here)
    refusal = Unauthenticated("no such code")
    asked.clear()
    for number in range(30):
        op = msgspec.structs.replace(here, program_challenge=s256("v" * 43) if number % 2 else "")
        with pytest.raises((Unauthenticated, TooManyAttempts)):
            await one.desk.do(op)
    assert len(asked) == 4 * FREE
    with pytest.raises(TooManyAttempts) as told:
        await one.desk.do(here)
    assert told.value.retry_after_s is not None
    refusal = None
    assert (await one.desk.do(msgspec.structs.replace(FINISH, address="192.0.2.8"))).token
    one.clock.now += told.value.retry_after_s
    assert (await one.desk.do(here)).token


async def test_a_code_for_a_program_holds_once_and_for_who_asked(one: Node) -> None:
    one.desk._provider = Provider()
    await one.sign()
    verifier = "v" * 43
    finish = msgspec.structs.replace(FINISH, program_challenge=s256(verifier))
    code = (await one.desk.do(finish)).token
    assert not one.knows(code)  # it is no credential
    for wrong in ("", "w" * 43, s256(verifier)):
        with pytest.raises(Unauthenticated):
            await one.desk.do(ops.Redeem(code=code, verifier=wrong))
    token = (await one.desk.do(ops.Redeem(code=code, verifier=verifier))).token
    assert one.who(token).user == "zoe"
    with pytest.raises(Unauthenticated):
        await one.desk.do(ops.Redeem(code=code, verifier=verifier))
    assert not one.knows(token)  # somebody else had the code
    late = (await one.desk.do(finish)).token
    one.clock.now += 61
    with pytest.raises(Unauthenticated):
        await one.desk.do(ops.Redeem(code=late, verifier=verifier))


def s256(verifier: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
