"""The calls about nodes' disks as data. Pure; as `cluster_calls.py`."""

from __future__ import annotations

import msgspec

from ollama_distributed.base import disk as wire
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call, model_path
from ollama_distributed.client.cluster_calls import node_path

_decode_disk = decoder_of(wire.DiskAnswer)
_decode_scrub = decoder_of(wire.ScrubRow)
_decode_evicted = decoder_of(wire.EvictAnswer)
_encode = msgspec.json.Encoder().encode


def disk(node: str) -> Call[wire.DiskAnswer]:
    """How full a node's disk is, which models may go from it, how far a scrub is."""
    return Call(method="GET", path=node_path(node) + "/disk", decode=_decode_disk, repeat="always")


def scrub(node: str) -> Call[wire.ScrubRow]:
    """Have a node read all files of its models again; `disk` tells how far it is. Damaged ones are
    taken away, and fetched again where another node holds them."""
    return Call(method="POST", path=node_path(node) + "/scrub", decode=_decode_scrub, repeat="always")


def evict(name: str, node: str = "", *, last_copy: bool = False) -> Call[wire.EvictAnswer]:
    """Let a node's copy of a model go (empty: that of the node that is asked).

    Raises `Conflict` where it must stay; `last_copy`: even if nobody else holds it.
    """
    ask = wire.EvictAsk(node=node, last_copy=last_copy)
    return Call(method="POST", path=model_path(name) + "/evict", body=_encode(ask), decode=_decode_evicted)
