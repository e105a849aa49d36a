import string
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.access.keys import make_admin_key, make_key, parse_key, proves
from ollama_distributed.access.roles import MAY, TABLE, Resource, Right, Verb, demand
from ollama_distributed.access.service import Authenticator, Caller
from ollama_distributed.base.errors import Forbidden, Unauthenticated
from ollama_distributed.base.identity import ROLES, Identity

HERE = Caller(credential="", at_this_machine=True)
AWAY = Caller(credential="", at_this_machine=False)


def authenticator(*records, require_key=False, now=100.0):
    return Authenticator(records, require_key=require_key, wall=lambda: now)


def test_a_made_key_parses_and_proves_its_record_only():
    plain, record = make_key("admin", now=1.0)
    _, other = make_key("admin", now=1.0)
    key = parse_key(plain)
    assert key is not None
    assert key.id == record.id
    assert proves(key, record)
    assert not proves(key, other)
    assert not proves(key, None)
    assert key.secret not in repr(record)


def test_admin_key_is_an_admin():
    plain, record = make_admin_key(now=5.0)
    identity = authenticator(record).identify(Caller(plain, at_this_machine=False))
    assert identity == Identity(role="admin", key_id=record.id)


@given(at=st.integers(0, 63), to=st.sampled_from(string.ascii_letters + string.digits))
def test_one_wrong_character_is_caught_by_the_check(at, to):
    plain, _ = make_key("admin", now=0.0)
    if plain[at % len(plain)] == to:
        return
    at %= len(plain)
    assert parse_key(plain[:at] + to + plain[at + 1 :]) is None


@given(st.text(max_size=80))
def test_no_text_breaks_the_authenticator(text):
    with pytest.raises(Unauthenticated):
        authenticator().identify(Caller(text, at_this_machine=False))


def test_local_needs_this_machine_and_no_key_rule():
    assert authenticator().identify(HERE).role == "local"
    with pytest.raises(Unauthenticated):
        authenticator().identify(AWAY)
    with pytest.raises(Unauthenticated):
        authenticator(require_key=True).identify(HERE)


def test_a_placeholder_key_counts_as_none_and_a_wrong_key_of_ours_is_refused():
    assert authenticator().identify(Caller("sk-placeholder", at_this_machine=True)).role == "local"
    plain, _ = make_key("admin", now=0.0)
    for wrong in (plain, plain[:-1] + "!", "odk_"):
        with pytest.raises(Unauthenticated):
            authenticator().identify(Caller(wrong, at_this_machine=True))


def test_an_expired_key_is_refused():
    import msgspec

    plain, record = make_key("admin", now=0.0)
    expired = msgspec.structs.replace(record, expires_at=99.0)
    with pytest.raises(Unauthenticated):
        authenticator(expired).identify(Caller(plain, at_this_machine=True))
    valid = msgspec.structs.replace(record, expires_at=101.0)
    assert authenticator(valid).identify(Caller(plain, at_this_machine=True)).role == "admin"


def test_the_table_has_a_cell_for_every_role_and_denies_by_default():
    assert set(MAY) == set(ROLES)
    for role in ROLES:
        for resource in get_args(Resource):
            for verb in get_args(Verb):
                right = Right(verb, resource)
                if right in MAY[role]:
                    demand(Identity(role=role), right)
                else:
                    with pytest.raises(Forbidden):
                        demand(Identity(role=role), right)


def test_the_page_shows_this_very_table():
    page = (Path(__file__).parents[3] / "docs/access.md").read_text()
    for row in TABLE.strip().splitlines()[1:]:
        assert "| " + " | ".join(row.split()) + " |" in page


def test_only_an_admin_says_who_may_do_what():
    for resource in ("keys", "policies", "users", "members", "tokens", "config", "cluster"):
        may_change = {role for role in ROLES if Right("admin", resource) in MAY[role]}
        assert may_change == {"admin"}, resource
