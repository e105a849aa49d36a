"""What a person reads of the cluster, its nodes and its settings."""

import asyncio

import pytest
from msgspec.structs import replace

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import ConfigAnswer, NodeUsage, TokenRow
from ollama_distributed.cli import cluster_view, config_view
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.tables import Look
from ollama_distributed.testing.fake_cluster import FakeCluster

NOW = 1_700_000_000.0
RICH = Look(colour=False, bars=True, width=120)


@pytest.fixture
def cluster():
    return FakeCluster("alpha", "beta", "gamma", "delta")


def nodes(cluster):
    return asyncio.run(cluster.nodes())


def rows_of(text):
    return {line.split()[0]: line for line in text.splitlines() if line.strip()}


def test_nodes(cluster):
    cluster.set("gamma", status="suspect", reason="no heartbeat for 3 s")
    cluster.set("beta", usage=NodeUsage(cpu=95.0, requests=4, queued=2, age_s=0.1))
    text = cluster_view.nodes_text(nodes(cluster), NOW, RICH)
    rows = rows_of(text)
    assert "alpha *" in text
    assert "voter ★" in rows["alpha"]
    assert "████████ 95%" in rows["beta"]
    assert "4 +2 queued" in rows["beta"]
    assert "● suspect 3m" in text
    assert "gamma: no heartbeat for 3 s" in text
    assert "★ leads" in text


def test_nodes_in_a_pipe(cluster):
    text = cluster_view.nodes_text(nodes(cluster), NOW, Look())
    assert text.isascii()
    assert "voter,leader" in rows_of(text)["alpha"]


def test_a_gpu_has_a_column_only_where_there_is_one(cluster):
    assert "GPU" not in cluster_view.nodes_text(nodes(cluster), NOW, RICH)
    cluster.set("beta", usage=NodeUsage(gpu=50.0, age_s=0.1))
    text = cluster_view.nodes_text(nodes(cluster), NOW, RICH)
    assert text.splitlines()[0].split()[:6] == ["NAME", "STATUS", "ROLE", "CPU", "MEMORY", "GPU"]


def test_usage_that_nobody_knows_is_not_shown_as_zero(cluster):
    cluster.set("beta", usage=NodeUsage())
    rows = rows_of(cluster_view.nodes_text(nodes(cluster), NOW, RICH))
    assert "%" not in rows["beta"]
    assert "%" in rows["alpha"]


def test_one_node(cluster):
    cluster.set("beta", labels={"zone": "a"}, usage=NodeUsage(cpu=50.0, age_s=30.0))
    row = cluster.rows["beta-id"]
    text = cluster_view.node_text(row, NOW, Look())
    assert "Memory           16 GiB\n" in text
    assert "Labels           zone=a\n" in text
    assert "Last heard       30s ago\n" in text
    assert "Role             server, voter\n" in text
    assert "Models" not in text
    fresh = replace(row, usage=NodeUsage(age_s=1.0, gpu=10.0, gpu_memory=20.0))
    text = cluster_view.node_text(fresh, NOW, Look())
    assert "Last heard" not in text
    assert "GPU memory used  20%" in text


def test_the_cluster(cluster):
    cluster.set("gamma", status="offline")
    text = cluster_view.cluster_text(cluster.status(), nodes(cluster), NOW, RICH)
    assert "Status          degraded\n" in text
    assert "Leader          alpha, for 90s (term 3)\n" in text
    assert "Voters          alpha, beta, gamma\n" in text
    assert "Nodes           1 offline, 3 online\n" in text
    assert "▲ gamma does not answer: see to it, or remove it\n" in text
    assert "cluster token create" in text
    cluster.quorum = False
    text = cluster_view.cluster_text(cluster.status(), nodes(cluster), NOW, RICH)
    assert "Status          no quorum\n" in text
    assert "Leader          none now" in text


def test_what_nodes_say_of_themselves(cluster):
    cluster.set("gamma", status="offline")
    answer, full = cluster.status(), "the disk of alpha is nearly full; delete models"
    told = [*asyncio.run(cluster.alerts()), Alert(level="warning", code="disk_low", message=full)]
    answer = replace(answer, alerts=tuple(told))
    text = cluster_view.cluster_text(answer, nodes(cluster), NOW, RICH)
    assert text.count("▲ ") == 2
    assert text.count("gamma does not answer") == 1
    assert f"▲ {full}\n" in text
    assert full in cluster_view.cluster_lines(answer, nodes(cluster))["cluster"]


def test_what_changes_is_a_line_and_figures_are_not(cluster):
    before = cluster_view.cluster_lines(cluster.status(), nodes(cluster))
    cluster.set("beta", usage=NodeUsage(cpu=0.9, age_s=0.0))
    assert cluster_view.cluster_lines(cluster.status(), nodes(cluster)) == before
    cluster.set("beta", status="offline")
    after = cluster_view.cluster_lines(cluster.status(), nodes(cluster))
    assert {name for name in after if after[name] != before[name]} == {"cluster", "beta"}


def test_tokens():
    one = TokenRow(id="a", role="node", uses=2, used=1, created_at=NOW - 5, expires_at=NOW + 600, creator="k")
    text = cluster_view.tokens_text([one, replace(one, id="b", state="revoked")], NOW, Look())
    assert [line.split() for line in text.splitlines()] == [
        ["ID", "STATE", "ROLE", "USED", "EXPIRES", "CREATED", "BY"],
        ["a", "open", "node", "1/2", "in", "10m", "5s", "ago", "k"],
        ["b", "revoked", "node", "1/2", "-", "5s", "ago", "k"],
    ]


# ── settings ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10m", "10m"),
        ("8", 8),
        ("true", True),
        ("", ""),
        ("[a, b]", ["a", "b"]),
        ("null", None),
        ("0.5", 0.5),
    ],
)
def test_values(text, value):
    assert config_view.value_of(text) == value


def test_a_value_that_cannot_be_read():
    with pytest.raises(Problem, match="is not a value"):
        config_view.value_of("[a")


def test_changes():
    assert config_view.changes({"a": 1, "b": "x", "c": True}, {"a": 2, "b": "x", "d": [1]}) == [
        "a: 1 -> 2",
        "c: true -> (each node's own)",
        "d: (each node's own) -> [1]",
    ]


def test_history_says_what_each_version_changed():
    first = ConfigAnswer(version=1, values={"a": 1}, by="k", at=NOW - 60)
    second = ConfigAnswer(version=2, values={"a": 2}, by="k", at=NOW - 5, comment="more")
    text = config_view.history_text([second, first, ConfigAnswer(version=0, values={})], NOW, Look())
    lines = text.splitlines()
    assert lines[1].split("  ")[0] == "2"
    assert "a: 1 -> 2" in lines[1]
    assert lines[1].endswith("more")
    assert "a: (each node's own) -> 1" in lines[2]
    assert lines[3].split() == ["0", "-", "-", "-"]
    told = config_view.event_text(first, second, Look()).splitlines()
    assert told[0].endswith("version 2 by k (more)")
    assert told[1].strip() == "a: 1 -> 2"
