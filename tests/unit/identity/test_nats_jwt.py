"""NATS's keys and JWTs as its own libraries write them."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.identity.world import NOW

from ollama_distributed.base.errors import Invalid
from ollama_distributed.cluster.identity import nats_jwt, nkeys

KEYS = nats_jwt.make_keys((b"o" * 32, b"s" * 32, b"a" * 32, b"n" * 32, b"v" * 32))
USER = nkeys.make_key("user", b"u" * 32)

KNOWN_SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
KNOWN_PUBLIC = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"
"""From the NATS documentation of nkeys."""


def test_a_key_of_the_documentation_reads_as_documented() -> None:
    key = nkeys.read_seed(KNOWN_SEED)
    assert key.kind == "user"
    assert key.public == KNOWN_PUBLIC
    assert KNOWN_SEED not in repr(key)


@given(st.sampled_from(("operator", "account", "user")), st.binary(min_size=32, max_size=32))
def test_a_seed_reads_back_and_its_letters_say_what_it_is(kind: nkeys.KeyKind, raw: bytes) -> None:
    key = nkeys.make_key(kind, raw)
    assert nkeys.read_seed(key.seed) == key
    assert key.seed.startswith("S" + kind[0].upper())
    assert key.public.startswith(kind[0].upper())
    assert nkeys.check_public(kind, key.public) == key.public
    assert nkeys.verifies(key.public, key.sign(b"nonce"), b"nonce")
    assert not nkeys.verifies(key.public, key.sign(b"nonce"), b"other")


@given(st.text(max_size=70))
def test_any_other_text_is_no_key(text: str) -> None:
    with pytest.raises(Invalid):
        nkeys.read_seed(text)
    with pytest.raises(Invalid):
        nkeys.check_public("user", text)


@given(st.integers(0, 55), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"))
def test_a_mistyped_key_is_noticed(place: int, letter: str) -> None:
    changed = USER.public[:place] + letter + USER.public[place + 1 :]
    if changed != USER.public:
        with pytest.raises(Invalid):
            nkeys.check_public("user", changed)


def test_a_key_of_another_kind_is_refused() -> None:
    with pytest.raises(Invalid, match="user"):
        nats_jwt.user_jwt(KEYS, "node", "n1", KEYS.application.public, NOW, expires_at=NOW + 1)


@pytest.mark.parametrize("name", ["*", ">", "n1.>", "a b", "", "N1", "{{name()}}"])
def test_a_name_that_would_widen_the_template_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        nats_jwt.user_jwt(KEYS, "node", name, USER.public, NOW, expires_at=NOW + 1)


def test_a_user_is_signed_by_its_roles_key() -> None:
    for role, key in (("node", KEYS.node_signing), ("server", KEYS.server_signing)):
        claims = nats_jwt.read_jwt(
            nats_jwt.user_jwt(KEYS, role, "n1", USER.public, NOW, expires_at=NOW + 60)  # type: ignore[arg-type]
        )
        assert (claims.issuer, claims.subject, claims.name) == (key.public, USER.public, "n1")
        assert claims.expires_at == NOW + 60
        assert claims.nats["issuer_account"] == KEYS.application.public
        assert "pub" not in claims.nats  # what it may do is the template's alone


def test_the_same_claims_make_the_same_bytes() -> None:
    assert nats_jwt.account_jwt(KEYS, NOW) == nats_jwt.account_jwt(KEYS, NOW)


def test_revoked_users_are_in_the_accounts_jwt() -> None:
    claims = nats_jwt.read_jwt(nats_jwt.account_jwt(KEYS, NOW, revoked={USER.public: NOW + 5}))
    assert claims.nats["revocations"] == {USER.public: int(NOW) + 5}


@given(st.integers(0, 2000), st.integers(1, 255))
def test_a_changed_jwt_is_refused(place: int, flip: int) -> None:
    jwt = nats_jwt.system_account_jwt(KEYS, NOW)
    place %= len(jwt)
    changed = jwt[:place] + chr((ord(jwt[place]) ^ flip) & 0x7F or 65) + jwt[place + 1 :]
    unused_bits = place == len(jwt) - 1  # of the last base64 letter
    if changed != jwt and not unused_bits:
        with pytest.raises(Invalid):
            nats_jwt.read_jwt(changed)


@given(st.text(max_size=200))
def test_any_text_is_no_jwt(text: str) -> None:
    with pytest.raises(Invalid):
        nats_jwt.read_jwt(text)


def test_a_jwt_without_a_signature_is_refused() -> None:
    head = base64.urlsafe_b64encode(msgspec.json.encode({"typ": "JWT", "alg": "none"})).rstrip(b"=").decode()
    body = nats_jwt.system_account_jwt(KEYS, NOW).split(".")[1]
    with pytest.raises(Invalid):
        nats_jwt.read_jwt(f"{head}.{body}.")
