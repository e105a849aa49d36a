"""Keys, policies and verdicts as people see them; the calls of the SDK as the server reads them."""

from __future__ import annotations

import msgspec
import pytest
import typer

from ollama_distributed.base import access as wire
from ollama_distributed.base.policies import Limits, Policy
from ollama_distributed.cli import access_view
from ollama_distributed.cli import policies as access
from ollama_distributed.cli.tables import Look
from ollama_distributed.client import access_calls as calls
from ollama_distributed.client.errors import InvalidName

NOW = 1_000_000.0
ROW = wire.KeyRow(
    id="k3x9a2bc", name="ci", role="user", status="valid", team="red", holds="small",
    created_at=NOW - 7200, expires_at=NOW + 3 * 86_400, last_used_at=NOW - 5,
)  # fmt: skip
SMALL = Policy(
    name="small", version=3, models=("a*",), max_output=9, teams=("red",), cache_group="shop",
    limits=Limits(tokens_per_minute=1000, budget_per_month=2.5, shared_by="team"),
)  # fmt: skip


def test_keys_in_a_table() -> None:
    head, row = access_view.keys_text([ROW], NOW, Look()).splitlines()
    assert head.split()[:4] == ["ID", "NAME", "ROLE", "STATUS"]
    assert row.split() == [
        "k3x9a2bc",
        "ci",
        "user",
        "valid",
        "red",
        "small",
        "5s",
        "ago",
        "in",
        "3d",
        "2h",
        "ago",
    ]


def test_a_key_and_a_policy_in_full() -> None:
    assert "(of its role or team)" in access_view.key_text(ROW, NOW, Look())
    text = access_view.policy_text(SMALL, Look())
    assert "1000 tokens/min, 2.5 money/month, a team together" in text
    assert "9 tokens" in text
    assert "team red" in text
    assert "shop" in text


def test_a_verdict_says_why() -> None:
    said = wire.Explanation(
        allowed=False, reasons=("one", "two"), role="user", team="red", policy=SMALL, by="team"
    )
    lines = access_view.explanation_text(said, Look()).splitlines()
    assert [line.split(maxsplit=1)[-1].strip() for line in lines[1:]] == [
        "small (by team)", "refused", "one", "two",
    ]  # fmt: skip


def test_what_is_typed_becomes_a_policy_and_only_that() -> None:
    nothing = dict.fromkeys(
        ("model", "route", "role", "team", "read_only", "priority", "comment", "max_context",
         "max_output", "node_label", "cache_group", *access._LIMITS)
    )  # fmt: skip
    assert access._said(nothing) == {}
    typed = {**nothing, "model": ["a*"], "max_output": "none", "node_label": ["zone=eu"], "concurrency": "4"}
    assert access._said(typed) == {
        "models": ("a*",), "max_output": None, "nodes": {"zone": "eu"}, "limits": Limits(concurrency=4),
    }  # fmt: skip
    for typed_group, group in (("shop", "shop"), ("none", "")):
        assert access._said({**nothing, "cache_group": typed_group}) == {"cache_group": group}
    for wrong in ({"max_output": "many"}, {"node_label": ["zone"]}):
        with pytest.raises(typer.BadParameter):
            access._said({**nothing, **wrong})


def test_the_calls_say_what_the_server_reads() -> None:
    made = calls.create_key(name="ci", role="viewer", ttl_s=60)
    assert (made.method, made.path) == ("POST", "/api/v1/keys")
    assert msgspec.json.decode(made.body or b"", type=wire.KeyAsk) == wire.KeyAsk(
        name="ci", role="viewer", ttl_s=60
    )
    changed = calls.set_policy(SMALL)
    assert changed.path == "/api/v1/policies/small"
    ask = msgspec.json.decode(changed.body or b"", type=wire.PolicyAsk)
    assert (ask.version, ask.max_output, ask.cache_group, ask.limits) == (3, 9, "shop", SMALL.limits)
    with pytest.raises(InvalidName):
        calls.get_key("../users")


def test_what_one_may_do_alike_stands_in_one_line() -> None:
    may = {"audit": ["read"], "files": ["read", "models"], "nodes": ["read"]}
    text = access_view.whoami_text(wire.WhoAmI(role="viewer", team="t", may=may), 0.0, Look())
    assert text.endswith("may, if the policy allows it:\nread          audit, nodes\nread, models  files\n")
