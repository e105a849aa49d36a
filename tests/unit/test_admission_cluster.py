"""The queues of all nodes, asked at one; and their metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ollama_distributed.admission.cluster import ClusterQueues
from ollama_distributed.base.errors import NotFound, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.queue import Histogram, QueuedRow, QueueFigures, QueueNode, QueueWaiting
from ollama_distributed.gateway.queue_metrics import queue_lines

A, B, C, D = (NodeId(name) for name in "abcd")


class State:
    def __init__(self, *dead: NodeId) -> None:
        self.nodes = {
            one: SimpleNamespace(id=one, name=f"n-{one}", alive=one not in dead) for one in (A, B, C, D)
        }

    def resolve(self, name: str) -> NodeId:
        for node in self.nodes.values():
            if name in (node.id, node.name):
                return NodeId(node.id)
        raise NotFound(f"there is no node {name!r}")


class Others:
    async def queue(self, node: NodeId) -> QueueNode:
        if node == C:
            raise Unavailable("node c does not answer")
        return QueueNode(node=node, name=f"n-{node}", waiting=7)

    async def waiting(self, node: NodeId) -> QueueWaiting:
        if node == C:
            raise Unavailable("node c does not answer")
        return QueueWaiting(node=node, began=(1,))


def queues(*dead: NodeId) -> ClusterQueues:
    state: Any = State(*dead)

    async def own() -> QueueWaiting:
        return QueueWaiting(node=A, waiting=(QueuedRow(number=3, request_id="r", model="m", position=1),))

    return ClusterQueues(A, lambda: QueueNode(node=A, name="n-a", waiting=1), own, Others(), lambda: state)


async def test_all_living_nodes_this_one_first_and_who_does_not_answer_says_why() -> None:
    answer = await queues(D).queue()
    assert [(one.node, one.waiting, one.error) for one in answer.nodes] == [
        (A, 1, ""),
        (B, 7, ""),
        (C, 0, "node c does not answer"),
    ]
    assert answer.nodes[2].name == "n-c"


async def test_the_requests_of_all_living_nodes() -> None:
    answer = await queues(D).waiting()
    assert [(one.node, len(one.waiting), one.error) for one in answer] == [
        (A, 1, ""),
        (B, 0, ""),
        (C, 0, "node c does not answer"),
    ]


async def test_one_node_by_id_or_name() -> None:
    assert [one.node for one in (await queues().queue("n-b")).nodes] == [B]
    assert [one.node for one in (await queues().queue("a")).nodes] == [A]
    with pytest.raises(NotFound):
        await queues().queue("nobody")


def test_alone_is_who_has_no_living_neighbour() -> None:
    assert queues(B, C, D).alone
    assert not queues(B, C).alone


def test_metrics_are_prometheus_histograms() -> None:
    seen = Histogram(bounds=(-1.0, 0.0, 1.0), counts=(1, 0, 2, 3), total=12.5)
    lines = queue_lines("p", QueueFigures(refused={"full": 4}, waiting={"batch": 2}, eta_error=seen))
    assert 'p_queue_waiting{class="batch"} 2' in lines
    assert 'p_queue_refused_total{reason="full"} 4' in lines
    buckets = [line for line in lines if "bucket" in line]
    assert buckets == [
        'p_queue_eta_error_seconds_bucket{le="-1.0"} 1',
        'p_queue_eta_error_seconds_bucket{le="0.0"} 1',
        'p_queue_eta_error_seconds_bucket{le="1.0"} 3',
        'p_queue_eta_error_seconds_bucket{le="+Inf"} 6',
    ]
    assert "p_queue_eta_error_seconds_count 6" in lines
