"""Join tokens: their text, who may use them, how often one may be wrong."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.identity.world import NOW

from ollama_distributed.base.errors import Invalid
from ollama_distributed.cluster.identity.tokens import (
    Address,
    Admitted,
    Attempt,
    Refused,
    TokenRecord,
    judge,
    make_token,
    parse_address,
    parse_token,
)
from ollama_distributed.cluster.identity.tries import MAX_SOURCES, WrongTries

PORTS = st.integers(1, 65535)
HOSTS = st.one_of(
    st.ip_addresses().filter(lambda ip: ip.version == 4 or ip.ipv4_mapped is None).map(str),
    st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z]{2,5})?", fullmatch=True),
)


def new(
    *, uses: int = 1, lifetime_s: float = 600.0, addresses: tuple[Address, ...] = (Address("10.0.0.1", 7443),)
) -> tuple[str, TokenRecord]:
    return make_token(
        "node",
        token_id="abcd1234",
        secret=b"s" * 32,
        ca_sha256="ab" * 32,
        addresses=addresses,
        now=NOW,
        creator="k1",
        uses=uses,
        lifetime_s=lifetime_s,
    )


def attempt(text: str, **changes: str) -> Attempt:
    token = parse_token(text)
    known = Attempt(secret=token.secret, role=token.role, node="n1", key_sha256="k")
    return msgspec.structs.replace(known, **changes)


@given(st.lists(st.builds(Address, HOSTS, PORTS), min_size=1, max_size=8))
def test_what_is_made_reads_back(addresses: list[Address]) -> None:
    text, record = new(addresses=tuple(addresses))
    token = parse_token(f"  {text}\n")
    assert token.addresses == tuple(addresses)
    assert (token.role, token.id, token.ca_sha256) == ("node", record.id, "ab" * 32)


@given(st.data())
def test_one_changed_character_is_noticed(data: st.DataObject) -> None:
    text, _ = new()
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(min_codepoint=33, max_codepoint=126).filter(lambda c: c != text[place]))
    changed = text[:place] + other + text[place + 1 :]
    with pytest.raises(Invalid) as refused:
        parse_token(changed)
    assert parse_token(text).secret not in refused.value.message


@given(st.text(max_size=300))
def test_any_text_is_refused_with_help(text: str) -> None:
    with pytest.raises(Invalid, match="join token"):
        parse_token("odj_" + text)


@given(st.text(max_size=60))
def test_an_address_is_read_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except Invalid:
        return
    assert parse_address(str(address)) == address


def test_a_token_and_an_attempt_hide_their_secret_when_printed() -> None:
    text, record = new()
    secret = parse_token(text).secret
    for shown in (parse_token(text), attempt(text), record, msgspec.json.encode(record).decode()):
        assert secret not in repr(shown)


@pytest.mark.parametrize(
    "bounds", [{"uses": 0}, {"uses": 1001}, {"lifetime_s": 0}, {"lifetime_s": 86401}, {"addresses": ()}]
)
def test_a_token_out_of_bounds_is_not_made(bounds: dict[str, int]) -> None:
    with pytest.raises(Invalid):
        new(**bounds)  # type: ignore[arg-type]


def test_a_one_use_token_admits_one_node_and_the_same_one_again() -> None:
    text, record = new()
    first = judge(record, attempt(text), NOW)
    assert isinstance(first, Admitted)
    assert first.record.uses_left == 0
    again = judge(first.record, attempt(text), NOW)
    assert again == Admitted(first.record, again=True)
    for other in (attempt(text, node="n2"), attempt(text, key_sha256="other")):
        verdict = judge(first.record, other, NOW)
        assert verdict == Refused("used_up")
        assert verdict.alarming


def test_a_wrong_secret_learns_nothing_whatever_the_token_is() -> None:
    text, record = new()
    wrong = attempt(text, secret="x", role="server")
    used = msgspec.structs.replace(record, revoked_at=NOW, uses=0)
    assert judge(record, wrong, NOW) == judge(used, wrong, NOW + 9999) == Refused("wrong_secret")
    unknown = judge(None, wrong, NOW)
    assert isinstance(unknown, Refused)
    assert unknown.guessed


def test_expired_revoked_future_and_another_role() -> None:
    text, record = new()
    assert isinstance(judge(record, attempt(text), NOW + 599.9), Admitted)
    assert judge(record, attempt(text), NOW + 600) == Refused("expired")
    assert judge(record, attempt(text, role="server"), NOW) == Refused("wrong_role")
    revoked = msgspec.structs.replace(record, revoked_at=NOW)
    assert judge(revoked, attempt(text), NOW) == Refused("revoked")
    # A clock that was set back does not give a token more life than the tolerated skew.
    assert isinstance(judge(record, attempt(text), NOW - 299), Admitted)
    assert judge(record, attempt(text), NOW - 301) == Refused("not_yet_valid")


@given(st.integers(1, 20), st.lists(st.integers(0, 30), max_size=60))
def test_a_token_never_admits_more_nodes_than_its_uses(uses: int, askers: list[int]) -> None:
    text, record = new(uses=uses)
    admitted = set()
    for asker in askers:
        verdict = judge(record, attempt(text, node=f"n{asker}"), NOW)
        if isinstance(verdict, Admitted):
            record = verdict.record
            admitted.add(asker)
    assert len(admitted) == min(uses, len(set(askers)))


def test_five_wrong_tries_then_one_each_twelve_seconds() -> None:
    tries = WrongTries()
    for _ in range(5):
        assert tries.wait_s("10.0.0.1", NOW) == 0
        tries.wrong("10.0.0.1", NOW)
    assert tries.wait_s("10.0.0.1", NOW) == pytest.approx(12)
    assert tries.wait_s("10.0.0.2", NOW) == 0
    assert tries.wait_s("10.0.0.1", NOW + 12) == 0
    tries.wrong("10.0.0.1", NOW + 12)
    assert tries.wait_s("10.0.0.1", NOW + 12) == pytest.approx(12)
    assert tries.wait_s("::ffff:10.0.0.1", NOW + 12) == pytest.approx(12)


def test_a_whole_ipv6_network_counts_as_one_source() -> None:
    tries = WrongTries()
    for host in range(1, 6):
        tries.wrong(f"2001:db8::{host}", NOW)
    assert tries.wait_s("2001:db8::ffff", NOW) > 0
    assert tries.wait_s("2001:db8:0:1::1", NOW) == 0


def test_many_sources_take_bounded_memory() -> None:
    tries = WrongTries()
    for number in range(MAX_SOURCES + 100):
        tries.wrong(f"s{number}", NOW)
    assert len(tries._full_at) == MAX_SOURCES
