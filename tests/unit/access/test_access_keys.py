import secrets
import string
import sys
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.access.keys import is_well_formed, make_admin_key, make_key, parse_key
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
    key = parse_key(plain)
    assert key is not None
    assert is_well_formed(plain)
    assert (key.id, key.secret_sha256) == (record.id, record.secret_sha256)
    assert plain.split("_")[2] not in repr((record, key))


def test_a_secret_opens_under_its_own_id_only():
    plain, record = make_key("admin", now=1.0)
    _, other = make_key("admin", now=1.0)
    assert authenticator(record, other).identify(Caller(plain, at_this_machine=False)).key_id == record.id
    for known in ((other,), (msgspec.structs.replace(record, id=other.id), other)):
        with pytest.raises(Unauthenticated):
            authenticator(*known).identify(Caller(plain, at_this_machine=False))


def test_a_rotated_key_opens_with_both_secrets_until_its_time():
    old, record = make_key("user", now=0.0)
    new, latest = make_key("user", now=50.0, key_id=record.id)
    rotated = msgspec.structs.replace(latest, old_sha256=record.secret_sha256, old_until=100.0)
    for text, now, good in ((old, 99.0, True), (old, 100.0, False), (new, 99.0, True), (new, 200.0, True)):
        knows = authenticator(rotated, now=now)
        if good:
            assert knows.identify(Caller(text, at_this_machine=False)).key_id == record.id
        else:
            with pytest.raises(Unauthenticated):
                knows.identify(Caller(text, at_this_machine=False))


# ── what a look-up tells by its time (S-12) ─────────────────────────────────────────


def refused_in(knows, text):
    """Every bytecode instruction of ours in a look-up that is refused, in order."""
    seen = []

    def trace(frame, event, arg):
        if not frame.f_globals["__name__"].startswith("ollama_distributed."):
            return None  # the garbage collector's callbacks come as they like
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen.append((frame.f_code.co_name, frame.f_lasti))
        return trace

    caller = Caller(text, at_this_machine=True)
    parse_key.cache_clear()
    before = sys.gettrace()  # of the tool that measures coverage
    sys.settrace(trace)
    try:
        knows.identify(caller)
    except Unauthenticated:
        return seen
    finally:
        sys.settrace(before)
    raise AssertionError("it was let in")


def test_a_refusal_takes_the_same_steps_whatever_is_wrong():
    """A known id, an unknown one, a revoked or rotated key's, a wrong check, nonsense as long as a key:
    not one instruction differs, so that no time can. Texts of another length are no keys by their
    looks; who sends them knows that."""
    made = [make_key("user", now=0.0) for _ in range(40)]
    records = [record for _, record in made]
    records[1] = msgspec.structs.replace(records[1], revoked_at=1.0)
    records[2] = msgspec.structs.replace(records[2], old_sha256="ab" * 32, old_until=1e9)
    knows = authenticator(*records)
    wrong = [make_key("user", now=0.0, key_id=record.id)[0] for record in records[:4]]
    unknown = make_key("user", now=0.0)[0]
    mistyped = [plain[:-1] + ("0" if plain[-1] != "0" else "1") for plain in (*wrong, unknown)]
    nonsense = ["odk_" + "_" * 59, "odk_" + "!" * 59, "odk_" + secrets.token_hex(30)[:59]]
    expected = refused_in(knows, unknown)
    assert len(expected) > 100
    for text in (*wrong, *mistyped, *nonsense):
        assert refused_in(knows, text) == expected, text


def test_admin_key_is_an_admin():
    plain, record = make_admin_key(now=5.0)
    identity = authenticator(record).identify(Caller(plain, at_this_machine=False))
    assert identity == Identity(role="admin", key_id=record.id)


@given(at=st.integers(0, 63), to=st.sampled_from(string.ascii_letters + string.digits))
def test_one_wrong_character_is_caught_by_the_check(at, to):
    plain, record = make_key("admin", now=0.0)
    at %= len(plain)
    if plain[at] == to:
        return
    wrong = plain[:at] + to + plain[at + 1 :]
    assert not is_well_formed(wrong)
    with pytest.raises(Unauthenticated):
        authenticator(record).identify(Caller(wrong, at_this_machine=False))


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
