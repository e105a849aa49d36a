"""The call about who waits, as data. Pure; as `cluster_calls.py`."""

from __future__ import annotations

from urllib.parse import urlencode

from ollama_distributed.base import queue as wire
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call

_decode_queue = decoder_of(wire.QueueAnswer)


def queue(node: str = "") -> Call[wire.QueueAnswer]:
    """Who waits at which model, by class, and for how long: of all nodes that live, or of one by its id
    or name."""
    query = "?" + urlencode({"node": node}) if node else ""
    return Call(method="GET", path="/api/v1/queue" + query, decode=_decode_queue, repeat="always")
